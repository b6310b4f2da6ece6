package cgroup

import (
	"errors"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Usage is what the group used. nil is: not measured.
type Usage struct {
	CPUUserUS, CPUSystemUS, CPUTotalUS *uint64
	MemoryPeakBytes, MemoryNowBytes    *uint64
	PidsPeak, PidsMaxHits              *uint64
	// OOMKills are the processes of the group that the kernel killed for memory,
	// at whatever limit. OOMs tells how often the group's own limit was why: 0
	// beside kills is that the host or a group above was out of memory. On v1,
	// read only where there were kills, it counts what met the limit at all.
	OOMKills, OOMs            *uint64
	IOReadBytes, IOWriteBytes *uint64
	ThrottledUS               *uint64
	// Pressure is by resource: cpu, memory, io (v2, Linux 4.20 with PSI on).
	Pressure map[string]Pressure
}

// Pressure is how long, in µs, some or all processes of a group waited for a
// resource. FullUS is nil where the kernel does not tell (cpu before 5.13).
type Pressure struct{ SomeUS, FullUS *uint64 }

func number(dir, file string) *uint64 {
	if dir == "" {
		return nil
	}
	b, err := readFile(filepath.Join(dir, file))
	if err != nil {
		return nil
	}
	return parse(string(b))
}

func parse(s string) *uint64 {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 64)
	if err != nil {
		return nil
	}
	return &n
}

// keyed reads a "key value" file. What is not in it is not in the map.
func keyed(dir, file string) map[string]*uint64 {
	if dir == "" {
		return nil
	}
	b, err := readFile(filepath.Join(dir, file))
	if err != nil {
		return nil
	}
	out := map[string]*uint64{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, " "); ok {
			if n := parse(v); n != nil {
				out[k] = n
			}
		}
	}
	return out
}

func scaled(n *uint64, div uint64) *uint64 {
	if n == nil {
		return nil
	}
	v := *n / div
	return &v
}

func sum(a, b *uint64) *uint64 {
	if a == nil || b == nil {
		return a
	}
	v := *a + *b
	return &v
}

// dir is where a controller's files are.
func (g *Group) dir(controller string) string {
	if g.h.Mode == "v2" {
		return g.dirs[""]
	}
	return g.dirs[controller]
}

func (g *Group) oomKills() *uint64 {
	if g.h.Mode == "v2" {
		return keyed(g.dirs[""], "memory.events")["oom_kill"]
	}
	return keyed(g.dirs["memory"], "memory.oom_control")["oom_kill"]
}

// CPUTotal is the CPU time used so far, user and system.
func (g *Group) CPUTotal() (time.Duration, error) {
	var us *uint64
	if g.h.Mode == "v2" {
		us = keyed(g.dirs[""], "cpu.stat")["usage_usec"]
	} else {
		us = scaled(number(g.dirs["cpuacct"], "cpuacct.usage"), 1000)
	}
	if us == nil {
		return 0, errors.New("read CPU time: no counter")
	}
	return time.Duration(*us) * time.Microsecond, nil
}

// Events reads only the counters that say why a command may have ended:
// OOMKills, OOMs and PidsMaxHits. No group is below this one, so memory.events
// is about it alone, as memory.events.local is (Linux 5.2).
func (g *Group) Events() Usage {
	u := Usage{PidsMaxHits: keyed(g.dir("pids"), "pids.events")["max"]}
	if g.h.Mode == "v2" {
		e := keyed(g.dirs[""], "memory.events")
		u.OOMKills, u.OOMs = e["oom_kill"], e["oom"]
		return u
	}
	if u.OOMKills = g.oomKills(); u.OOMKills != nil && *u.OOMKills > 0 {
		d := g.dirs["memory"]
		u.OOMs = sum(number(d, "memory.failcnt"), number(d, "memory.memsw.failcnt"))
	}
	return u
}

// Usage reads the counters.
func (g *Group) Usage() Usage {
	u := g.Events()
	if g.h.Mode == "v2" {
		d := g.dirs[""]
		cpu := keyed(d, "cpu.stat")
		u.CPUTotalUS, u.CPUUserUS, u.CPUSystemUS = cpu["usage_usec"], cpu["user_usec"], cpu["system_usec"]
		u.ThrottledUS = cpu["throttled_usec"]
		u.MemoryPeakBytes, u.MemoryNowBytes = number(d, "memory.peak"), number(d, "memory.current")
		u.PidsPeak = number(d, "pids.peak")
		u.IOReadBytes, u.IOWriteBytes = sumIO(d)
		u.Pressure = pressure(d)
		return u
	}
	if t, err := g.CPUTotal(); err == nil {
		us := uint64(t.Microseconds())
		u.CPUTotalUS = &us
	}
	acct := g.dirs["cpuacct"]
	u.CPUUserUS, u.CPUSystemUS = scaled(number(acct, "cpuacct.usage_user"), 1000), scaled(number(acct, "cpuacct.usage_sys"), 1000)
	u.ThrottledUS = scaled(keyed(g.dirs["cpu"], "cpu.stat")["throttled_time"], 1000)
	u.MemoryPeakBytes = number(g.dirs["memory"], "memory.max_usage_in_bytes")
	u.MemoryNowBytes = number(g.dirs["memory"], "memory.usage_in_bytes")
	u.PidsPeak = number(g.dirs["pids"], "pids.peak")
	u.IOReadBytes, u.IOWriteBytes = blkio(g.dirs["blkio"])
	return u
}

func sumIO(d string) (r, w *uint64) {
	b, err := readFile(filepath.Join(d, "io.stat"))
	if err != nil {
		return nil, nil
	}
	var rn, wn uint64
	for _, f := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(f, "rbytes="); ok {
			n, _ := strconv.ParseUint(v, 10, 64)
			rn += n
		}
		if v, ok := strings.CutPrefix(f, "wbytes="); ok {
			n, _ := strconv.ParseUint(v, 10, 64)
			wn += n
		}
	}
	return &rn, &wn
}

func blkio(d string) (r, w *uint64) {
	if d == "" {
		return nil, nil
	}
	b, err := readFile(filepath.Join(d, "blkio.throttle.io_service_bytes"))
	if err != nil {
		return nil, nil
	}
	var rn, wn uint64
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		n, _ := strconv.ParseUint(f[2], 10, 64)
		switch f[1] {
		case "Read":
			rn += n
		case "Write":
			wn += n
		}
	}
	return &rn, &wn
}

// pressure reads the PSI totals; nil where the kernel has none or they are off.
func pressure(d string) map[string]Pressure {
	var out map[string]Pressure
	for _, res := range []string{"cpu", "memory", "io"} {
		b, err := readFile(filepath.Join(d, res+".pressure"))
		if err != nil {
			continue
		}
		var p Pressure
		for line := range strings.Lines(string(b)) {
			_, v, _ := strings.Cut(line, "total=")
			switch {
			case strings.HasPrefix(line, "some"):
				p.SomeUS = parse(v)
			case strings.HasPrefix(line, "full"):
				p.FullUS = parse(v)
			}
		}
		if out == nil {
			out = map[string]Pressure{}
		}
		out[res] = p
	}
	return out
}
