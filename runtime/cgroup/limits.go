package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Limits are the limits the kernel's controllers enforce. For each field zero
// means "leave the controller's default", a negative value "no limit".
type Limits struct {
	MemoryBytes int64   `json:"memory_bytes"`          // memory.max / memory.limit_in_bytes
	SwapBytes   int64   `json:"swap_bytes"`            // swap on top of memory; 0 with MemoryBytes set forbids swap
	CPUs        float64 `json:"cpus"`                  // cpu.max / cfs quota, in CPUs
	CPUSet      string  `json:"cpuset_cpus,omitempty"` // cpuset.cpus list, "" is the parent's
	Pids        int64   `json:"pids"`                  // pids.max

	// MemoryLowBytes is reclaimed last: memory.low, as far as the cgroups above
	// "sbxrun", or --cgroup-parent, have one too, or memory.soft_limit_in_bytes.
	MemoryLowBytes int64 `json:"memory_reservation_bytes,omitempty"`
	// MemoryHighBytes is where the group is slowed down and reclaimed from:
	// memory.high, which v1 has not.
	MemoryHighBytes int64 `json:"memory_high_bytes,omitempty"`
	// CPUShares (2 to 262144, default 1024) and CPUWeight (1 to 10000, default
	// 100) say the same in the terms of v1 and v2; one at most is given, and
	// [Group.Applied] gives that of the kernel.
	CPUShares  int64  `json:"cpu_shares,omitempty"`
	CPUWeight  int64  `json:"cpu_weight,omitempty"`
	CPUSetMems string `json:"cpuset_mems,omitempty"` // cpuset.mems list, "" is the parent's
	// BlkioWeight is 10 to 1000 as docker has it: blkio.bfq.weight, io.bfq.weight,
	// or scaled to io.weight where io.cost is on (Linux 5.4).
	BlkioWeight int64 `json:"blkio_weight,omitempty"`
	// IO has one element a disk.
	IO []IORate `json:"io,omitempty"`
}

// needs maps the controllers that l needs, in terms of mode, to the limit that
// needs each.
func (l Limits) needs(mode string) map[string]string {
	out := map[string]string{}
	need := func(asked bool, controller, what string) {
		if asked && out[controller] == "" {
			out[controller] = what
		}
	}
	need(l.MemoryBytes > 0, "memory", "memory")
	need(l.MemoryLowBytes > 0, "memory", "memory-reservation")
	need(l.MemoryHighBytes > 0, "memory", "memory-high")
	need(l.CPUs > 0, "cpu", "cpus")
	need(l.CPUShares > 0 || l.CPUWeight > 0, "cpu", "cpu-shares")
	need(l.CPUSet != "", "cpuset", "cpuset")
	need(l.CPUSetMems != "", "cpuset", "cpuset-mems")
	need(l.Pids > 0, "pids", "pids")
	io := "io"
	if mode != "v2" {
		io = "blkio"
	}
	need(len(l.IO) > 0, io, "device rates")
	need(l.BlkioWeight > 0, io, "blkio-weight")
	return out
}

// Check says whether each limit that is asked for can be enforced here.
func (h *Host) Check(l Limits) error {
	var errs []error
	need := l.needs(h.Mode)
	for _, c := range slices.Sorted(maps.Keys(need)) {
		if h.has(c) {
			continue
		}
		hint := "enable the " + c + " controller on the kernel command line (cgroup_enable=" + c + ")"
		if h.ours {
			dir, _ := h.Home()
			hint = "the cgroup " + filepath.Dir(dir) + " was given none: Delegate=yes in a unit gives all; in a container the engine decides"
		}
		errs = append(errs, hinted.New(fmt.Errorf("limit %s: no %s controller", need[c], c), hint))
	}
	if l.MemoryHighBytes > 0 && h.Mode != "v2" {
		errs = append(errs, hinted.New(errors.New("limit memory-high: cgroup v1 has no such limit"), "--memory is the limit on v1; boot with systemd.unified_cgroup_hierarchy=1 for v2"))
	}
	if l.BlkioWeight > 0 && len(errs) == 0 && h.weigher() == "" {
		errs = append(errs, hinted.New(errors.New("limit blkio-weight: no disk is shared by weight here"), weightHint))
	}
	return errors.Join(append(errs, h.checkSwap(l))...)
}

// weigher says what shares disks by weight: "bfq", "io.cost" or nothing. The
// kernel takes a weight also where nothing heeds it.
func (h *Host) weigher() string {
	disks, _ := filepath.Glob("/sys/block/*/queue/scheduler")
	for _, d := range disks {
		if b, err := readFile(d); err == nil && strings.Contains(string(b), "[bfq]") {
			return "bfq"
		}
	}
	if b, err := readFile(filepath.Join(h.mounts[""], "io.cost.qos")); h.Mode == "v2" && err == nil && strings.Contains(string(b), "enable=1") {
		return "io.cost"
	}
	return ""
}

func (h *Host) checkSwap(l Limits) error {
	if l.MemoryBytes <= 0 && l.SwapBytes > 0 {
		return hinted.New(errors.New("limit swap: no memory limit"), "swap is limited on top of memory: set --memory too")
	}
	if h.Mode == "v2" || l.MemoryBytes <= 0 || l.SwapBytes < 0 || h.mounts["memory"] == "" {
		return nil
	}
	if exists(filepath.Join(h.mounts["memory"], "memory.memsw.limit_in_bytes")) || !hostSwaps() {
		return nil
	}
	return hinted.New(errors.New("limit swap: this kernel does not account for swap"), swapHint)
}

const swapHint = "boot with swapaccount=1, turn swap off, or allow it: --memory-swap -1"

func hostSwaps() bool {
	b, _ := readFile("/proc/swaps")
	return strings.Count(string(b), "\n") > 1
}

const cpuPeriodUS = 100000

func quota(cpus float64) int { return max(int(cpus*cpuPeriodUS+0.5), 1000) }

// weightOf turns v1's shares into v2's weight as runc does: least, default and
// most of the one are those of the other.
func weightOf(shares int64) int64 {
	switch {
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return int64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34)))
}

// Weight is the share of CPUs that is asked for in v2's terms, 0 is none.
func (l Limits) Weight() int64 {
	if l.CPUWeight <= 0 && l.CPUShares > 0 {
		return weightOf(l.CPUShares)
	}
	return max(l.CPUWeight, 0)
}

// sharesOf turns v2's weight into v1's shares as the kernel's scheduler does.
func sharesOf(weight int64) int64 { return max((weight*1024+50)/100, 2) }

// setting is one value for one file.
type setting struct {
	dir, file, value string
	hint             string // for a failure, "" is none
}

func apply(list []setting) error {
	for _, s := range list {
		if err := write(s.dir, s.file, s.value); err != nil {
			if s.hint != "" {
				return hinted.New(err, s.hint)
			}
			return err
		}
	}
	return nil
}

const (
	cpusetHint = "name what is online and allowed here, as 0-1 or 0,2"
	weightHint = "BFQ does (echo bfq > /sys/block/DISK/queue/scheduler), and on cgroup v2 io.cost (io.cost.qos)"
	rateHint   = "the kernel needs CONFIG_BLK_DEV_THROTTLING, and the device must be a whole disk"
)

func (g *Group) writeV1() error {
	l := g.limits
	var out []setting
	set := func(controller, file string, n int64, hint string) {
		out = append(out, setting{g.dirs[controller], file, strconv.FormatInt(n, 10), hint})
	}
	if l.MemoryBytes > 0 {
		set("memory", "memory.limit_in_bytes", l.MemoryBytes, "")
		if l.SwapBytes >= 0 {
			mem := g.dirs["memory"]
			if exists(filepath.Join(mem, "memory.memsw.limit_in_bytes")) {
				set("memory", "memory.memsw.limit_in_bytes", l.MemoryBytes+l.SwapBytes, "")
			} else if l.SwapBytes == 0 && exists(filepath.Join(mem, "memory.swappiness")) {
				set("memory", "memory.swappiness", 0, "")
			}
		}
	}
	if l.MemoryLowBytes > 0 {
		set("memory", "memory.soft_limit_in_bytes", l.MemoryLowBytes, "")
	}
	if l.CPUs > 0 {
		set("cpu", "cpu.cfs_period_us", cpuPeriodUS, "")
		set("cpu", "cpu.cfs_quota_us", int64(quota(l.CPUs)), "a parent cgroup allows less CPU than --cpus asks for")
	}
	switch {
	case l.CPUShares > 0:
		set("cpu", "cpu.shares", l.CPUShares, "")
	case l.CPUWeight > 0:
		set("cpu", "cpu.shares", sharesOf(l.CPUWeight), "")
	}
	if l.CPUSet != "" {
		out = append(out, setting{g.dirs["cpuset"], "cpuset.cpus", l.CPUSet, cpusetHint})
	}
	if l.CPUSetMems != "" {
		out = append(out, setting{g.dirs["cpuset"], "cpuset.mems", l.CPUSetMems, cpusetHint})
	}
	if l.Pids > 0 {
		set("pids", "pids.max", l.Pids, "")
	}
	if l.BlkioWeight > 0 {
		set("blkio", "blkio.bfq.weight", l.BlkioWeight, weightHint)
	}
	for _, r := range l.IO {
		for _, k := range ioKinds {
			if n := *k.of(&r); n > 0 {
				out = append(out, setting{g.dirs["blkio"], k.v1, r.Disk + " " + strconv.FormatInt(n, 10), rateHint})
			}
		}
	}
	return apply(out)
}

func (g *Group) writeV2() error {
	l, d := g.limits, g.dirs[""]
	var out []setting
	set := func(file string, n int64, hint string) {
		out = append(out, setting{d, file, strconv.FormatInt(n, 10), hint})
	}
	if l.MemoryBytes > 0 {
		set("memory.max", l.MemoryBytes, "")
		set("memory.oom.group", 1, "")
		if l.SwapBytes >= 0 && (exists(filepath.Join(d, "memory.swap.max")) || hostSwaps()) {
			set("memory.swap.max", l.SwapBytes, swapHint)
		}
	}
	if l.MemoryLowBytes > 0 {
		set("memory.low", l.MemoryLowBytes, "")
	}
	if l.MemoryHighBytes > 0 {
		set("memory.high", l.MemoryHighBytes, "")
	}
	if l.CPUs > 0 {
		out = append(out, setting{d, "cpu.max", fmt.Sprintf("%d %d", quota(l.CPUs), cpuPeriodUS), ""})
	}
	if w := l.Weight(); w > 0 {
		set("cpu.weight", w, "")
	}
	if l.CPUSet != "" {
		out = append(out, setting{d, "cpuset.cpus", l.CPUSet, cpusetHint})
	}
	if l.CPUSetMems != "" {
		out = append(out, setting{d, "cpuset.mems", l.CPUSetMems, cpusetHint})
	}
	if l.Pids > 0 {
		set("pids.max", l.Pids, "")
	}
	if l.BlkioWeight > 0 {
		if g.h.weigher() == "bfq" {
			set("io.bfq.weight", l.BlkioWeight, weightHint)
		} else {
			set("io.weight", 1+(l.BlkioWeight-10)*9999/990, weightHint) // as runc does
		}
	}
	for _, r := range l.IO {
		out = append(out, setting{d, "io.max", r.Disk + r.v2(), rateHint})
	}
	if err := apply(out); err != nil {
		return err
	}
	for file, asked := range map[string]string{"cpuset.cpus": l.CPUSet, "cpuset.mems": l.CPUSetMems} {
		if asked == "" {
			continue
		}
		// v2 takes what is not there, and gives what is left of it, or all.
		want, _ := readFile(filepath.Join(d, file)) // as the kernel writes it
		got, err := readFile(filepath.Join(d, file+".effective"))
		if err != nil || string(got) != string(want) {
			return hinted.New(fmt.Errorf("set limit %s=%q: only %q of it: %w", file, asked, strings.TrimSpace(string(got)), errors.Join(err, unix.ERANGE)), cpusetHint)
		}
	}
	return nil
}

// passLow gives "sbxrun" what the groups below it have of memory.low together:
// a group is protected no further than the one above it, and what that has
// beyond would be spread over all (mount option memory_recursiveprot).
func passLow(dir string) error {
	fd, err := open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("set limit memory.low: %w", err)
	}
	defer unix.Close(fd)
	if err := flock(fd, unix.LOCK_EX); err != nil { // others sum up too
		return fmt.Errorf("lock %q: %w", dir, err)
	}
	groups, err := subgroups(dir)
	if err != nil {
		return fmt.Errorf("set limit memory.low: %w", err)
	}
	var all uint64
	for _, g := range groups {
		if n := number(filepath.Join(dir, g), "memory.low"); n != nil {
			all += *n
		}
	}
	return write(dir, "memory.low", strconv.FormatUint(all, 10))
}

// Applied reads back the limits that were asked for, as the kernel rounded them
// (memory to pages, CPUs to microseconds of a period). What cannot be read, as
// swap where the kernel does not account for it, is given as asked.
func (g *Group) Applied() Limits {
	l := g.limits
	v2 := g.h.Mode == "v2"
	read := func(asked *int64, controller, v1, v2name string) {
		file := v1
		if v2 {
			file = v2name
		}
		if *asked <= 0 {
			return
		}
		if n := number(g.dir(controller), file); n != nil {
			*asked = int64(min(*n, math.MaxInt64))
		}
	}
	read(&l.MemoryBytes, "memory", "memory.limit_in_bytes", "memory.max")
	if l.MemoryBytes > 0 && l.SwapBytes >= 0 {
		file := "memory.memsw.limit_in_bytes"
		if v2 {
			file = "memory.swap.max"
		}
		if n := number(g.dir("memory"), file); n != nil {
			l.SwapBytes = int64(*n)
			if !v2 {
				l.SwapBytes -= l.MemoryBytes
			}
		}
	}
	read(&l.MemoryLowBytes, "memory", "memory.soft_limit_in_bytes", "memory.low")
	read(&l.MemoryHighBytes, "memory", "", "memory.high")
	if l.CPUs > 0 {
		quota, period := number(g.dirs["cpu"], "cpu.cfs_quota_us"), number(g.dirs["cpu"], "cpu.cfs_period_us")
		if v2 {
			b, _ := readFile(filepath.Join(g.dirs[""], "cpu.max"))
			q, p, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
			quota, period = parse(q), parse(p)
		}
		if quota != nil && period != nil && *period > 0 {
			l.CPUs = float64(*quota) / float64(*period)
		}
	}
	if l.CPUShares > 0 || l.CPUWeight > 0 {
		if v2 {
			l.CPUShares, l.CPUWeight = 0, max(l.CPUWeight, 1)
		} else {
			l.CPUShares, l.CPUWeight = max(l.CPUShares, 2), 0
		}
		read(&l.CPUShares, "cpu", "cpu.shares", "")
		read(&l.CPUWeight, "cpu", "", "cpu.weight")
	}
	for file, list := range map[string]*string{"cpuset.cpus": &l.CPUSet, "cpuset.mems": &l.CPUSetMems} {
		if *list == "" {
			continue
		}
		if b, err := readFile(filepath.Join(g.dir("cpuset"), file)); err == nil {
			*list = strings.TrimSpace(string(b))
		}
	}
	read(&l.Pids, "pids", "pids.max", "pids.max")
	if l.BlkioWeight > 0 && g.h.weigher() == "bfq" { // io.cost has a scale of its own
		for _, file := range []string{"io.bfq.weight", "blkio.bfq.weight"} {
			if b, err := readFile(filepath.Join(g.dir("blkio"), file)); err == nil {
				first, _, _ := strings.Cut(strings.TrimPrefix(string(b), "default "), "\n")
				if n := parse(first); n != nil {
					l.BlkioWeight = int64(*n)
				}
			}
		}
	}
	if l.IO != nil {
		l.IO = g.appliedIO()
	}
	return l
}
