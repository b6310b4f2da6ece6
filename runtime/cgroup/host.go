package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Host is what there is of cgroups here.
type Host struct {
	// Mode is "v1", "hybrid" (v1 controllers, and a v2 tree that can kill and
	// tell of events) or "v2".
	Mode string
	// mounts maps a controller (v1), or "" (v2), to its mount point and own to
	// this process's own cgroup below it.
	mounts map[string]string
	own    map[string]string
	// home is the v2 cgroup below which "sbxrun" lies, and ours says that it is
	// a subtree that was given to us: see findHome.
	home string
	ours bool
	v2   map[string]bool // controllers that home has
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
				if _, dup := h.mounts[o]; !dup && slices.Contains(v1Controllers, o) {
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
		h.mounts = map[string]string{"": v2} // v1 hierarchies without a controller are not for us
		h.home, h.ours = findHome(v2, h.own[""])
		b, _ := readFile(filepath.Join(v2, h.home, "cgroup.controllers"))
		for _, c := range strings.Fields(string(b)) {
			h.v2[c] = true
		}
	default:
		return nil, hinted.New(errors.New("detect cgroups: no cgroup hierarchy is mounted"), "mount -t cgroup2 cgroup2 /sys/fs/cgroup")
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

// supervisorLeaf is where the processes of a home that is ours are moved, those
// of sbxrun too: a v2 group with processes can have no limited children.
// systemd's DelegateSubgroup= commonly has this name.
const supervisorLeaf = "supervisor"

// findHome chooses, on v2, the group below which sandboxes lie, relative to the
// mount. One that was delegated to us, our own or the one whose leaf we are in,
// keeps them within what its administrator allows. So does the root that a
// container sees. In both nobody else puts processes, so ours is true: they
// may be moved to a leaf. Else it is the root of all, where processes and
// limited groups may live side by side.
func findHome(mount, own string) (home string, ours bool) {
	if own != "/" {
		if delegated(filepath.Join(mount, own)) {
			return own, true
		}
		if up := filepath.Dir(own); up != "/" && delegated(filepath.Join(mount, up)) {
			return up, true
		}
	}
	return "/", unix.Access(filepath.Join(mount, "cgroup.type"), unix.F_OK) == nil // all but the root of all have it
}

// delegated says whether systemd marked a group with Delegate=yes: since 236 in
// trusted.delegate, since 251 also in user.delegate (Linux 5.7).
func delegated(dir string) bool {
	for _, a := range []string{"trusted.delegate", "user.delegate"} {
		var b [2]byte
		if n, err := unix.Getxattr(dir, a, b[:]); err == nil && string(b[:n]) == "1" {
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
	need := l.needs("v1")
	for c, want := range map[string]bool{
		"memory": true, "pids": true, "devices": true, "cpu": figures, "cpuset": false, "cpuacct": figures, "blkio": figures,
	} {
		if m, ok := h.mounts[c]; ok && (want || need[c] != "") {
			lean.mounts[c] = m
		}
	}
	return &lean
}

// Controllers are those that sandboxes can be limited by, and Enabled those of
// them that are on where sandboxes lie; the rest is turned on when it is needed.
func (h *Host) Controllers() []string {
	if h.Mode == "v2" {
		return slices.Sorted(maps.Keys(h.v2))
	}
	return slices.DeleteFunc(slices.Sorted(maps.Keys(h.mounts)), func(c string) bool { return c == "" })
}

// Enabled is told with [Host.Controllers]. On v1 what is there is on.
func (h *Host) Enabled() []string {
	if h.Mode != "v2" {
		return h.Controllers()
	}
	b, _ := readFile(filepath.Join(h.mounts[""], h.home, "cgroup.subtree_control"))
	return slices.Sorted(slices.Values(strings.Fields(string(b))))
}

// Home is the directory below which sandboxes lie without another parent (on v1
// that of the memory controller). ours says that it is a subtree of our own:
// a delegated unit, or all that a container sees.
func (h *Host) Home() (dir string, ours bool) {
	if h.Mode == "v2" {
		return filepath.Join(h.mounts[""], h.home, "sbxrun"), h.ours
	}
	return filepath.Join(h.mounts["memory"], h.own["memory"], "sbxrun"), false
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
		rel = filepath.Join("/", h.home, "sbxrun", name)
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

// homeOf gives the home that dir lies in, "" where it does not or where the
// home is not ours.
func (h *Host) homeOf(dir string) string {
	home := filepath.Join(h.mounts[""], h.home)
	if h.Mode == "v2" && h.ours && strings.HasPrefix(dir, home+"/") {
		return home
	}
	return ""
}

// enable turns the controllers on in every group from the home that is ours, or
// else from the root, down to dir. What lies above a home is not ours to change.
func (h *Host) enable(dir string, l Limits) error {
	top := h.homeOf(dir + "/")
	if top == "" {
		top = h.mounts[""]
	}
	rel, err := filepath.Rel(top, dir)
	if err != nil {
		return fmt.Errorf("make cgroup %q: %w", dir, err)
	}
	need := l.needs("v2")
	want := []string{"memory", "cpu", "pids", "io"} // these count, too
	for c := range need {
		if !slices.Contains(want, c) {
			want = append(want, c)
		}
	}
	cur := top
	parts := strings.Split(rel, "/")
	for i := 0; ; i++ {
		b, _ := readFile(filepath.Join(cur, "cgroup.subtree_control")) // what is enabled needs no write
		enabled := strings.Fields(string(b))
		for _, c := range want {
			if slices.Contains(enabled, c) || !h.v2[c] && need[c] == "" {
				continue
			}
			if err := h.enableOne(cur, c); err != nil && need[c] != "" {
				return hinted.New(fmt.Errorf("enable controller %s in %q: %w", c, cur, err), enableHint(err, c))
			}
		}
		if i >= len(parts) || rel == "." {
			return nil
		}
		cur = filepath.Join(cur, parts[i])
		if err := mkdir(cur); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
}

// enableOne turns one controller on. In a home that is ours, processes may be in
// the way: they are moved to the leaf, and again where they forked meanwhile.
func (h *Host) enableOne(dir, controller string) error {
	err := write(dir, "cgroup.subtree_control", "+"+controller)
	for i := 0; i < 100 && errors.Is(err, unix.EBUSY) && h.ours && dir == filepath.Join(h.mounts[""], h.home); i++ {
		if err := vacate(dir); err != nil {
			return err
		}
		err = write(dir, "cgroup.subtree_control", "+"+controller)
	}
	return err
}

func enableHint(err error, controller string) string {
	switch {
	case errors.Is(err, unix.EBUSY):
		return "a cgroup with processes cannot have limited children: choose another --cgroup-parent"
	case errors.Is(err, unix.ENOENT):
		return "the cgroup above does not pass it on: name " + controller + " in Delegate= of the unit, or enable it in cgroup.subtree_control there"
	}
	return mountHint(err)
}

// mountHint is what to do about a cgroup file system that cannot be written.
func mountHint(err error) string {
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return "cgroups cannot be written here: in a container, mount them writable (--privileged, or --cgroupns=private and -v /sys/fs/cgroup)"
	}
	return ""
}

// vacate moves the processes of a group to its leaf.
func vacate(dir string) error {
	leaf := filepath.Join(dir, supervisorLeaf)
	if err := mkdir(leaf); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	b, err := readFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return fmt.Errorf("move processes to %q: %w", leaf, err)
	}
	for _, pid := range strings.Fields(string(b)) {
		if pid == "0" {
			return hinted.New(fmt.Errorf("move processes to %q: one is of another pid namespace", leaf), "run sbxrun in a cgroup of its own, or choose another --cgroup-parent")
		}
		if err := write(leaf, "cgroup.procs", pid); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %s to %q: %w", pid, leaf, err)
		}
	}
	return nil
}

// hold keeps a home as it is, until the descriptor is closed: others that are
// in it do not tidy it up.
func hold(home string) (int, error) {
	fd, err := open(home, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return -1, fmt.Errorf("hold cgroup %q: %w", home, err)
	}
	if err := flock(fd, unix.LOCK_SH); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("hold cgroup %q: %w", home, err)
	}
	return fd, nil
}

// letGo ends a hold. The last one turns the controllers off again where nothing
// but our leaf is in home: with them on no process can enter it, and the next
// ExecStart= of a unit, or `docker exec`, has to. Failures leave it as it is.
func letGo(fd int, home string) {
	defer unix.Close(fd)
	if flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return
	}
	if err := unix.Rmdir(filepath.Join(home, "sbxrun")); err != nil && !errors.Is(err, unix.ENOENT) {
		return // a sandbox of one who crashed
	}
	children, err := subgroups(home)
	if err != nil || len(children) != 1 || children[0] != supervisorLeaf {
		return
	}
	b, _ := readFile(filepath.Join(home, "cgroup.subtree_control"))
	if on := strings.Fields(string(b)); len(on) > 0 {
		_ = write(home, "cgroup.subtree_control", "-"+strings.Join(on, " -"))
	}
}
