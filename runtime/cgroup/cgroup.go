// Package cgroup is the one writer of limits: it makes a sandbox's cgroup on
// v1, on hybrid hosts and on v2, reads its counters, tells of an OOM kill and
// takes it down again. It must never know sandboxes, reports or engines.
package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hinted is an error that says what to do.
type hinted struct {
	err  error
	hint string
}

func (e *hinted) Error() string { return e.err.Error() }
func (e *hinted) Unwrap() error { return e.err }
func (e *hinted) Hint() string  { return e.hint }

// Host is what there is of cgroups here.
type Host struct {
	// Mode is "v1", "hybrid" (v1 controllers, and a v2 tree that can kill and
	// tell of events) or "v2".
	Mode string
	// mounts maps a controller (v1), or "" (v2), to its mount point and own to
	// this process's own cgroup below it.
	mounts map[string]string
	own    map[string]string
	v2     map[string]bool // controllers of the v2 root
}

// v1Controllers are those a sandbox joins, where they are there.
var v1Controllers = []string{"memory", "cpu", "cpuacct", "cpuset", "pids", "blkio", "freezer", "devices", "perf_event", "net_cls", "net_prio", "hugetlb", "rdma", "misc", "name=systemd"}

// Detect reads mountinfo and this process's own cgroups.
func Detect() (*Host, error) {
	h := &Host{mounts: map[string]string{}, own: map[string]string{}, v2: map[string]bool{}}
	info, err := readFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("detect cgroups: %w", err)
	}
	roots := map[string]string{} // what part of the hierarchy the mount shows
	for line := range strings.Lines(string(info)) {
		if !strings.Contains(line, " - cgroup") {
			continue
		}
		pre, post, ok := strings.Cut(line, " - ")
		a, b := strings.Fields(pre), strings.Fields(post)
		if !ok || len(a) < 5 || len(b) < 3 {
			continue
		}
		switch b[0] {
		case "cgroup2":
			if _, dup := h.mounts[""]; !dup {
				h.mounts[""], roots[""] = a[4], a[3]
			}
		case "cgroup":
			for _, o := range strings.Split(b[2], ",") {
				if _, dup := h.mounts[o]; !dup && known(o) {
					h.mounts[o], roots[o] = a[4], a[3]
				}
			}
		}
	}
	b, err := readFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("detect cgroups: %w", err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		p := strings.SplitN(line, ":", 3)
		if len(p) != 3 {
			continue
		}
		for _, c := range strings.Split(p[1], ",") {
			h.own[c] = below(roots[c], p[2])
		}
	}
	v2, hasV2 := h.mounts[""]
	hasV1 := h.mounts["memory"] != "" || h.mounts["cpu"] != "" || h.mounts["pids"] != ""
	switch {
	case hasV1 && hasV2:
		h.Mode = "hybrid"
	case hasV1:
		h.Mode = "v1"
	case hasV2:
		h.Mode = "v2"
	default:
		return nil, &hinted{errors.New("detect cgroups: no cgroup hierarchy is mounted"), "mount -t cgroup2 cgroup2 /sys/fs/cgroup"}
	}
	if hasV2 {
		b, _ := readFile(filepath.Join(v2, "cgroup.controllers"))
		for _, c := range strings.Fields(string(b)) {
			h.v2[c] = true
		}
	}
	return h, nil
}

// below gives own relative to a mount that shows only root of its hierarchy, as
// in a container without a cgroup namespace. What lies outside of it is "/".
func below(root, own string) string {
	if root == "" {
		root = "/"
	}
	rel, err := filepath.Rel(root, own)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "/"
	}
	return filepath.Join("/", rel)
}

func known(c string) bool {
	for _, k := range v1Controllers {
		if k == c {
			return true
		}
	}
	return false
}

func (h *Host) has(controller string) bool {
	if h.Mode == "v2" {
		return h.v2[controller]
	}
	return h.mounts[controller] != ""
}

// Lean is the host with only those v1 hierarchies that limit something, and,
// if figures are wanted, those that count: each one more costs every launch its
// making, joining and removing. A v2 host has but one.
func (h *Host) Lean(l Limits, figures bool) *Host {
	if h.Mode == "v2" {
		return h
	}
	lean := *h
	lean.Mode = "v1"
	lean.mounts = map[string]string{}
	for c, want := range map[string]bool{
		"memory": true, "pids": true, "devices": true, "cpu": l.CPUs > 0 || figures, "cpuset": l.CPUSet != "",
		"cpuacct": figures, "blkio": figures,
	} {
		if m, ok := h.mounts[c]; ok && want {
			lean.mounts[c] = m
		}
	}
	return &lean
}

// Check says whether each limit that is asked for can be enforced here.
func (h *Host) Check(l Limits) error {
	need := func(asked bool, what, controller string) error {
		if asked && !h.has(controller) {
			return &hinted{fmt.Errorf("limit %s: no %s controller", what, controller), "enable the " + controller + " controller on the kernel command line (cgroup_enable=" + controller + ")"}
		}
		return nil
	}
	return errors.Join(
		need(l.MemoryBytes > 0, "memory", "memory"), need(l.CPUs > 0, "cpus", "cpu"),
		need(l.CPUSet != "", "cpuset", "cpuset"), need(l.Pids > 0, "pids", "pids"), h.checkSwap(l))
}

func (h *Host) checkSwap(l Limits) error {
	if l.MemoryBytes <= 0 && l.SwapBytes > 0 {
		return &hinted{errors.New("limit swap: no memory limit"), "swap is limited on top of memory: set --memory too"}
	}
	if h.Mode == "v2" || l.MemoryBytes <= 0 || l.SwapBytes < 0 || h.mounts["memory"] == "" {
		return nil
	}
	if exists(filepath.Join(h.mounts["memory"], "memory.memsw.limit_in_bytes")) || !hostSwaps() {
		return nil
	}
	return &hinted{errors.New("limit swap: this kernel does not account for swap"), "boot with swapaccount=1, turn swap off, or allow it: --memory-swap -1"}
}

func hostSwaps() bool {
	b, _ := readFile("/proc/swaps")
	return strings.Count(string(b), "\n") > 1
}

func exists(p string) bool { _, err := os.Stat(p); return err == nil }

// Group is one sandbox's cgroup.
type Group struct {
	h       *Host
	rel     string
	dirs    map[string]string // controller → directory; "" is v2
	made    []string          // directories that Create made, what Close removes
	limits  Limits
	oom     chan struct{}
	stop    chan struct{}
	closers []func()
	once    sync.Once
	fire    sync.Once // closes oom
}

// dirsOf gives the directories that a group will have, before it is made.
func (h *Host) dirsOf(parent, name string) (map[string]string, string, error) {
	if name == "" || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return nil, "", fmt.Errorf("name cgroup %q: not a plain name", name)
	}
	if parent != "" && (strings.Contains("/"+parent+"/", "/../") || strings.IndexByte(parent, 0) >= 0) {
		return nil, "", fmt.Errorf("cgroup parent %q: not a plain path", parent)
	}
	out := map[string]string{}
	rel := filepath.Join("sbxrun", name) // relative: to the own cgroup of each hierarchy
	if parent != "" {
		rel = filepath.Join("/", parent, name)
	} else if h.Mode == "v2" {
		rel = "/sbxrun/" + name
	}
	for c, m := range h.mounts {
		if strings.HasPrefix(rel, "/") {
			out[c] = filepath.Join(m, rel)
		} else {
			out[c] = filepath.Join(m, h.own[c], rel)
		}
	}
	return out, rel, nil
}

// Paths lists the directories Create will make: for a journal.
func (h *Host) Paths(parent, name string) ([]string, error) {
	m, _, err := h.dirsOf(parent, name)
	if err != nil {
		return nil, err
	}
	return unique(m), nil
}

// Create makes the group and writes its limits. Without parent it lies in
// "sbxrun" below the caller's own cgroup (v1, hybrid) or below the mount point
// (v2, where a group with processes can have no limited children).
func (h *Host) Create(parent, name string, l Limits) (_ *Group, err error) {
	if err := h.Check(l); err != nil {
		return nil, err
	}
	dirs, rel, err := h.dirsOf(parent, name)
	if err != nil {
		return nil, err
	}
	g := &Group{h: h, rel: rel, dirs: dirs, limits: l, oom: make(chan struct{}), stop: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Close()) // only what this call made
		}
	}()
	if err := h.checkParent(parent, dirs, l); err != nil {
		return nil, err
	}
	for c, d := range dirs {
		if h.Mode == "v2" {
			if err := h.enable(filepath.Dir(d), l); err != nil {
				return nil, err
			}
			if parent == "" {
				limitDevicesV2(filepath.Dir(d))
			}
		} else if err := mkdirAll(filepath.Dir(d), c); err != nil {
			return nil, err
		}
		// Controllers that share a mount share the directory. One that was
		// there before is another sandbox's and must not be joined or removed.
		if !slices.Contains(g.made, d) {
			if err := os.Mkdir(d, 0o755); err != nil {
				return nil, err // says mkdir, which and why
			}
			g.made = append(g.made, d)
		}
		switch c {
		case "cpuset":
			err = copyCPUSet(d)
		case "devices":
			err = limitDevices(d)
		case "":
			if h.Mode == "v2" && parent != "" {
				limitDevicesV2(d)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if h.Mode == "v2" {
		err = g.writeV2()
	} else {
		err = g.writeV1()
	}
	if err != nil {
		return nil, err
	}
	return g, nil
}

// checkParent refuses a parent in which a process would never start, and one
// that is not there: a mistyped name must not become an unlimited cgroup.
func (h *Host) checkParent(parent string, dirs map[string]string, l Limits) error {
	var found bool
	for _, c := range slices.Sorted(maps.Keys(dirs)) {
		d := dirs[c]
		up := filepath.Dir(d)
		if (c == "freezer" || c == "") && frozen(up) {
			return &hinted{fmt.Errorf("enter cgroup %q: it or one above it is frozen", up), "thaw it (freezer.state, cgroup.freeze): a process would never start there"}
		}
		if parent == "" {
			continue
		}
		ok := exists(up)
		found = found || ok
		asked := c == "" && h.Mode == "v2" || c == "memory" && l.MemoryBytes > 0 || c == "cpu" && l.CPUs > 0 ||
			c == "cpuset" && l.CPUSet != "" || c == "pids" && l.Pids > 0
		if asked && !ok {
			return &hinted{fmt.Errorf("find parent cgroup %q: %w", up, os.ErrNotExist), "make the parent first, or leave out --cgroup-parent"}
		}
	}
	if parent != "" && !found {
		return &hinted{fmt.Errorf("find parent cgroup %q: %w", parent, os.ErrNotExist), "make the parent first, or leave out --cgroup-parent"}
	}
	return nil
}

// frozen says whether dir or one above it is frozen, or about to be.
func frozen(dir string) bool {
	for ; len(dir) > 1; dir = filepath.Dir(dir) {
		b, err := readFile(filepath.Join(dir, "freezer.state"))
		if err == nil && strings.TrimSpace(string(b)) != "THAWED" {
			return true
		}
		b, err = readFile(filepath.Join(dir, "cgroup.freeze"))
		if err == nil && strings.TrimSpace(string(b)) == "1" {
			return true
		}
	}
	return false
}

// mkdirAll makes the shared parents; they stay, other sandboxes use them.
func mkdirAll(dir, controller string) error {
	if exists(dir) {
		return nil
	}
	if err := mkdirAll(filepath.Dir(dir), controller); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if controller == "devices" && filepath.Base(dir) == "sbxrun" {
		return limitDevices(dir) // all below inherit it
	}
	if controller == "cpuset" {
		return copyCPUSet(dir)
	}
	return nil
}

// copyCPUSet gives a new v1 cpuset its parent's CPUs and memory nodes: it is
// born without any, and then no process can enter.
func copyCPUSet(dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		cur, err := readFile(filepath.Join(dir, f))
		if err != nil {
			return fmt.Errorf("read cpuset: %w", err)
		}
		if strings.TrimSpace(string(cur)) != "" {
			continue
		}
		up, err := readFile(filepath.Join(filepath.Dir(dir), f))
		if err != nil {
			return fmt.Errorf("read cpuset: %w", err)
		}
		// Another launch has made the shared parent and not yet filled it.
		if strings.TrimSpace(string(up)) == "" {
			if err := copyCPUSet(filepath.Dir(dir)); err != nil {
				return err
			}
			if up, err = readFile(filepath.Join(filepath.Dir(dir), f)); err != nil {
				return fmt.Errorf("read cpuset: %w", err)
			}
		}
		if err := write(dir, f, strings.TrimSpace(string(up))); err != nil {
			return err
		}
	}
	return nil
}

// enable turns the controllers on in every group from the root down to dir.
func (h *Host) enable(dir string, l Limits) error {
	root := h.mounts[""]
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		return fmt.Errorf("make cgroup %q: %w", dir, err)
	}
	want := map[string]bool{"memory": l.MemoryBytes > 0, "cpu": l.CPUs > 0, "pids": l.Pids > 0, "io": false}
	if l.CPUSet != "" { // it has nothing to count: only where it is asked for
		want["cpuset"] = true
	}
	cur := root
	parts := strings.Split(rel, "/")
	for i := 0; ; i++ {
		b, _ := readFile(filepath.Join(cur, "cgroup.subtree_control")) // what is enabled needs no write
		enabled := strings.Fields(string(b))
		for c, must := range want {
			if !h.v2[c] || slices.Contains(enabled, c) {
				continue
			}
			if err := write(cur, "cgroup.subtree_control", "+"+c); err != nil && must {
				return &hinted{fmt.Errorf("enable controller %s in %q: %w", c, cur, err), "a cgroup with processes cannot have limited children: choose another --cgroup-parent"}
			}
		}
		if i >= len(parts) || rel == "." {
			return nil
		}
		cur = filepath.Join(cur, parts[i])
		if err := os.Mkdir(cur, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
}

const cpuPeriodUS = 100000

func (g *Group) writeV1() error {
	l := g.limits
	mem := g.dirs["memory"]
	if l.MemoryBytes > 0 {
		if err := write(mem, "memory.limit_in_bytes", strconv.FormatInt(l.MemoryBytes, 10)); err != nil {
			return err
		}
		if l.SwapBytes >= 0 {
			if exists(filepath.Join(mem, "memory.memsw.limit_in_bytes")) {
				if err := write(mem, "memory.memsw.limit_in_bytes", strconv.FormatInt(l.MemoryBytes+l.SwapBytes, 10)); err != nil {
					return err
				}
			} else if l.SwapBytes == 0 && exists(filepath.Join(mem, "memory.swappiness")) {
				if err := write(mem, "memory.swappiness", "0"); err != nil {
					return err
				}
			}
		}
	}
	if l.CPUs > 0 {
		if err := write(g.dirs["cpu"], "cpu.cfs_period_us", strconv.Itoa(cpuPeriodUS)); err != nil {
			return err
		}
		if err := write(g.dirs["cpu"], "cpu.cfs_quota_us", strconv.Itoa(quota(l.CPUs))); err != nil {
			return &hinted{err, "a parent cgroup allows less CPU than --cpus asks for"}
		}
	}
	if l.CPUSet != "" {
		if err := write(g.dirs["cpuset"], "cpuset.cpus", l.CPUSet); err != nil {
			return &hinted{err, "name CPUs that are online and allowed here, as 0-1 or 0,2"}
		}
	}
	if l.Pids > 0 {
		return write(g.dirs["pids"], "pids.max", strconv.FormatInt(l.Pids, 10))
	}
	return nil
}

func quota(cpus float64) int { return max(int(cpus*cpuPeriodUS+0.5), 1000) }

func (g *Group) writeV2() error {
	l, d := g.limits, g.dirs[""]
	if l.MemoryBytes > 0 {
		if err := write(d, "memory.max", strconv.FormatInt(l.MemoryBytes, 10)); err != nil {
			return err
		}
		if err := write(d, "memory.oom.group", "1"); err != nil {
			return err
		}
		if l.SwapBytes >= 0 && (exists(filepath.Join(d, "memory.swap.max")) || hostSwaps()) {
			if err := write(d, "memory.swap.max", strconv.FormatInt(l.SwapBytes, 10)); err != nil {
				return err
			}
		}
	}
	if l.CPUs > 0 {
		if err := write(d, "cpu.max", fmt.Sprintf("%d %d", quota(l.CPUs), cpuPeriodUS)); err != nil {
			return err
		}
	}
	if l.CPUSet != "" {
		if err := write(d, "cpuset.cpus", l.CPUSet); err != nil {
			return &hinted{err, "name CPUs that are online and allowed here, as 0-1 or 0,2"}
		}
	}
	if l.Pids > 0 {
		return write(d, "pids.max", strconv.FormatInt(l.Pids, 10))
	}
	return nil
}

// Watch starts to listen for OOM kills, also those that were before it: it can
// wait until the group is at work.
func (g *Group) Watch() error {
	if g.limits.MemoryBytes <= 0 {
		return nil
	}
	if err := g.watch(); err != nil {
		return err
	}
	if n := g.oomKills(); n != nil && *n > 0 {
		g.fire.Do(func() { close(g.oom) })
	}
	return nil
}

func (g *Group) watch() error {
	if g.h.Mode == "v2" {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return fmt.Errorf("watch memory events: %w", err)
		}
		f := os.NewFile(uintptr(fd), "memory.events")
		if _, err := unix.InotifyAddWatch(fd, filepath.Join(g.dirs[""], "memory.events"), unix.IN_MODIFY); err != nil {
			f.Close()
			return fmt.Errorf("watch memory events: %w", err)
		}
		g.listen(f, make([]byte, 4096))
		return nil
	}
	ctl, err := os.Open(filepath.Join(g.dirs["memory"], "memory.oom_control"))
	if err != nil {
		return fmt.Errorf("watch memory events: %w", err)
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		ctl.Close()
		return fmt.Errorf("watch memory events: %w", err)
	}
	f := os.NewFile(uintptr(fd), "oom")
	err = write(g.dirs["memory"], "cgroup.event_control", fmt.Sprintf("%d %d", fd, ctl.Fd()))
	ctl.Close()
	if err != nil {
		f.Close()
		return err
	}
	g.listen(f, make([]byte, 8))
	return nil
}

// listen turns wake-ups into one close of the channel. The v1 event comes when
// the limit is hit, before the victim is chosen, and comes to the groups below
// the one that is out of memory too: the counter of kills decides. The kill may
// follow late on a busy machine and nothing tells of it, so the counter is
// looked at for five seconds, ever less often.
func (g *Group) listen(f *os.File, buf []byte) {
	done := make(chan struct{})
	g.closers = append(g.closers, func() { close(g.stop); f.Close(); <-done })
	go func() {
		defer close(done)
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			for until, wait := time.Now().Add(5*time.Second), time.Millisecond/4; ; wait = min(2*wait, 20*time.Millisecond) {
				if n := g.oomKills(); n != nil && *n > 0 {
					g.fire.Do(func() { close(g.oom) })
					return
				}
				if g.h.Mode == "v2" || time.Now().After(until) {
					break // v2 tells of each change of the counters
				}
				select {
				case <-g.stop:
					return
				case <-time.After(wait):
				}
			}
		}
	}()
}

// OOM is closed when the kernel killed a process of the group for memory.
func (g *Group) OOM() <-chan struct{} { return g.oom }

// LibcontainerPath is the group as libcontainer's cgroupfs manager names it.
func (g *Group) LibcontainerPath() string { return g.rel }

// Dirs lists the group's directories.
func (g *Group) Dirs() []string { return unique(g.dirs) }

func unique(m map[string]string) []string {
	return slices.Compact(slices.Sorted(maps.Values(m)))
}

// DirFD opens the v2 directory for CLONE_INTO_CGROUP (Linux 5.7).
func (g *Group) DirFD() (*os.File, error) {
	if g.h.Mode != "v2" {
		return nil, errors.New("open cgroup: no v2 hierarchy")
	}
	return os.Open(g.dirs[""])
}

// Tasks opens the group's `tasks` files for writing (v1). A thread that writes
// "0" to one moves itself, and only that spares it the grace period of about
// 10 ms that moving a process costs after a pause (Linux 5.12,
// cgroup_procs_write_start): the writer's rights are those of the opener.
func (g *Group) Tasks() ([]*os.File, error) {
	if g.h.Mode == "v2" {
		return nil, nil
	}
	var out []*os.File
	for _, d := range g.Dirs() {
		p := filepath.Join(d, "tasks")
		if d == g.dirs[""] {
			p = filepath.Join(d, "cgroup.procs") // the v2 tree of a hybrid host
		}
		fd, err := open(p, unix.O_WRONLY)
		if err != nil {
			for _, f := range out {
				f.Close()
			}
			return nil, &os.PathError{Op: "open", Path: p, Err: err}
		}
		out = append(out, os.NewFile(uintptr(fd), p))
	}
	return out, nil
}

// Add moves a process into the group.
func (g *Group) Add(pid int) error {
	for _, d := range g.Dirs() {
		if err := write(d, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return err
		}
	}
	return nil
}

// Usage is what the group used. nil is: not measured.
type Usage struct {
	CPUUserUS, CPUSystemUS, CPUTotalUS *uint64
	MemoryPeakBytes, MemoryNowBytes    *uint64
	PidsPeak, PidsMaxHits              *uint64
	OOMKills                           *uint64
	IOReadBytes, IOWriteBytes          *uint64
	ThrottledUS                        *uint64
	Pressure                           map[string]uint64 // µs stalled, by resource
}

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

// keyed reads one value of a "key value" file.
func keyed(dir, file, key string) *uint64 {
	if dir == "" {
		return nil
	}
	b, err := readFile(filepath.Join(dir, file))
	if err != nil {
		return nil
	}
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(line, " "); ok && k == key {
			if n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64); err == nil {
				return &n
			}
		}
	}
	return nil
}

func scaled(n *uint64, div uint64) *uint64 {
	if n == nil {
		return nil
	}
	v := *n / div
	return &v
}

func (g *Group) oomKills() *uint64 {
	if g.h.Mode == "v2" {
		return keyed(g.dirs[""], "memory.events", "oom_kill")
	}
	return keyed(g.dirs["memory"], "memory.oom_control", "oom_kill")
}

// CPUTotal is the CPU time used so far, user and system.
func (g *Group) CPUTotal() (time.Duration, error) {
	var us *uint64
	if g.h.Mode == "v2" {
		us = keyed(g.dirs[""], "cpu.stat", "usage_usec")
	} else {
		us = scaled(number(g.dirs["cpuacct"], "cpuacct.usage"), 1000)
	}
	if us == nil {
		return 0, errors.New("read CPU time: no counter")
	}
	return time.Duration(*us) * time.Microsecond, nil
}

// Events reads only the counters that say why a command may have ended:
// OOMKills and PidsMaxHits.
func (g *Group) Events() Usage {
	d := g.dirs["pids"]
	if g.h.Mode == "v2" {
		d = g.dirs[""]
	}
	return Usage{OOMKills: g.oomKills(), PidsMaxHits: keyed(d, "pids.events", "max")}
}

// Usage reads the counters.
func (g *Group) Usage() Usage {
	u := g.Events()
	if t, err := g.CPUTotal(); err == nil {
		us := uint64(t.Microseconds())
		u.CPUTotalUS = &us
	}
	if g.h.Mode == "v2" {
		d := g.dirs[""]
		u.CPUUserUS, u.CPUSystemUS = keyed(d, "cpu.stat", "user_usec"), keyed(d, "cpu.stat", "system_usec")
		u.ThrottledUS = keyed(d, "cpu.stat", "throttled_usec")
		u.MemoryPeakBytes, u.MemoryNowBytes = number(d, "memory.peak"), number(d, "memory.current")
		u.PidsPeak = number(d, "pids.peak")
		u.IOReadBytes, u.IOWriteBytes = sumIO(d)
		u.Pressure = pressure(d)
		return u
	}
	acct := g.dirs["cpuacct"]
	u.CPUUserUS, u.CPUSystemUS = scaled(number(acct, "cpuacct.usage_user"), 1000), scaled(number(acct, "cpuacct.usage_sys"), 1000)
	u.ThrottledUS = scaled(keyed(g.dirs["cpu"], "cpu.stat", "throttled_time"), 1000)
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

func pressure(d string) map[string]uint64 {
	out := map[string]uint64{}
	for _, res := range []string{"cpu", "memory", "io"} {
		b, err := readFile(filepath.Join(d, res+".pressure"))
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(b), "\n") {
			if _, v, ok := strings.Cut(line, "total="); ok && strings.HasPrefix(line, "some") {
				if n, err := strconv.ParseUint(v, 10, 64); err == nil {
					out[res] = n
				}
			}
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// Applied reads back the limits that were asked for, as the kernel rounded them
// (memory to pages, CPUs to microseconds of a period). What cannot be read, as
// swap where the kernel does not account for it, is given as asked.
func (g *Group) Applied() Limits {
	l := g.limits
	v2 := g.h.Mode == "v2"
	file := func(controller, v1, v2name string) *uint64 {
		if v2 {
			return number(g.dirs[""], v2name)
		}
		return number(g.dirs[controller], v1)
	}
	if l.MemoryBytes > 0 {
		if n := file("memory", "memory.limit_in_bytes", "memory.max"); n != nil {
			l.MemoryBytes = int64(*n)
		}
		if n := file("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"); n != nil && l.SwapBytes >= 0 {
			l.SwapBytes = int64(*n)
			if !v2 {
				l.SwapBytes -= l.MemoryBytes
			}
		}
	}
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
	if l.CPUSet != "" {
		d := g.dirs["cpuset"]
		if v2 {
			d = g.dirs[""]
		}
		if b, err := readFile(filepath.Join(d, "cpuset.cpus")); err == nil {
			l.CPUSet = strings.TrimSpace(string(b))
		}
	}
	if l.Pids > 0 {
		if n := file("pids", "pids.max", "pids.max"); n != nil {
			l.Pids = int64(*n)
		}
	}
	return l
}

// Kill ends every process of the group, also those being forked. It does not
// wait until they are gone.
func (g *Group) Kill() error { return killDirs(g.made) }

func killDirs(dirs []string) error {
	defer thaw(dirs) // a process that the v1 freezer holds does not die
	for _, d := range dirs {
		if err := write(d, "cgroup.kill", "1"); err == nil {
			return nil // Linux 5.14, v2 or the v2 tree of a hybrid host
		}
	}
	freeze(dirs)
	var errs []error
	for range 10 { // without a freezer a fork may slip through one pass
		errs = nil
		var n int
		for _, d := range dirs {
			for _, pid := range procs(d) {
				n++
				if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					errs = append(errs, fmt.Errorf("kill process %d: %w", pid, err))
				}
			}
		}
		if n == 0 {
			break
		}
	}
	return errors.Join(errs...)
}

// freeze stops the groups' processes from forking; it waits 50 ms at most.
func freeze(dirs []string) {
	for _, d := range dirs {
		if write(d, "freezer.state", "FROZEN") != nil {
			continue
		}
		for range 50 {
			b, err := readFile(filepath.Join(d, "freezer.state"))
			if err != nil || strings.TrimSpace(string(b)) == "FROZEN" {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func thaw(dirs []string) {
	for _, d := range dirs {
		_ = write(d, "freezer.state", "THAWED") // only the v1 freezer has the file
	}
}

func procs(dir string) []int {
	b, _ := readFile(filepath.Join(dir, "cgroup.procs"))
	var out []int
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil && n > 1 && n != os.Getpid() {
			out = append(out, n)
		}
	}
	return out
}

// Close kills what is left and removes the group. It may be called again.
func (g *Group) Close() error {
	var err error
	g.once.Do(func() {
		for _, f := range g.closers {
			f()
		}
		err = Remove(g.made)
	})
	return err
}

// Remove ends and removes groups by directory. What is gone is fine.
func Remove(dirs []string) error {
	deadline := time.Now().Add(2 * time.Second)
	left := dirs
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		var again []string
		var errs []error
		for _, d := range left {
			err := unix.Rmdir(d)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				again = append(again, d)
				errs = append(errs, fmt.Errorf("remove cgroup %q: %w", d, err))
			}
		}
		if len(again) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(errs...)
		}
		left = again
		_ = killDirs(left) // judged by the next rmdir
		time.Sleep(wait)
	}
}
