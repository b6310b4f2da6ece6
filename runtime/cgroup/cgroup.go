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

	"github.com/sbxrun/sbxrun/internal/hinted"
)

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
	home    string // the home of ours that it lies in, "" is none
	held    int    // hold on home
	low     string // where its memory.low is part of a sum, "" is nowhere
	once    sync.Once
	fire    sync.Once // closes oom
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
// "sbxrun" below the caller's own cgroup (v1, hybrid), or on v2, where a group
// with processes can have no limited children, below what findHome chose.
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
	if home := h.homeOf(dirs[""]); home != "" {
		if g.held, err = hold(home); err != nil {
			return nil, err
		}
		g.home = home
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
			if err := mkdir(d); err != nil {
				return nil, err
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
	if h.Mode == "v2" && parent == "" && l.MemoryLowBytes > 0 {
		g.low = filepath.Dir(dirs[""])
		if err := passLow(g.low); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// checkParent refuses a parent in which a process would never start, and one
// that is not there: a mistyped name must not become an unlimited cgroup.
func (h *Host) checkParent(parent string, dirs map[string]string, l Limits) error {
	var found bool
	need := l.needs(h.Mode)
	for _, c := range slices.Sorted(maps.Keys(dirs)) {
		d := dirs[c]
		up := filepath.Dir(d)
		if (c == "freezer" || c == "") && frozen(up) {
			return hinted.New(fmt.Errorf("enter cgroup %q: it or one above it is frozen", up), "thaw it (freezer.state, cgroup.freeze): a process would never start there")
		}
		if parent == "" {
			continue
		}
		ok := exists(up)
		found = found || ok
		if asked := c == "" && h.Mode == "v2" || need[c] != ""; asked && !ok {
			return hinted.New(fmt.Errorf("find parent cgroup %q: %w", up, os.ErrNotExist), "make the parent first, or leave out --cgroup-parent")
		}
	}
	if parent != "" && !found {
		return hinted.New(fmt.Errorf("find parent cgroup %q: %w", parent, os.ErrNotExist), "make the parent first, or leave out --cgroup-parent")
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
	if err := mkdir(dir); err != nil && !errors.Is(err, os.ErrExist) {
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

// Thaw lets go of what was frozen from outside: on v1 a frozen process does not
// die, on v2 it does.
func (g *Group) Thaw() {
	if d := g.dirs["freezer"]; d != "" {
		thaw([]string{d})
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
		if g.low != "" {
			err = errors.Join(err, passLow(g.low))
		}
		if g.home != "" {
			letGo(g.held, g.home)
		}
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
