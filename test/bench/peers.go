package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/seccomp"
)

// contestant is one way to launch a command.
type contestant struct {
	name    string
	lacks   string // of what sbxrun gives
	own     bool
	variant bool   // there for its difference only
	hide    string // a mount point that it must not see
	failed  string // why it cannot take part
	argv    []string
	// command gives argv for another command than /bin/true. The program must
	// be /bin/true or /bin/sleep: the peers' rootfs has no other.
	command func(args ...string) ([]string, error)
}

// The names that other parts of the program refer to.
const (
	ratioBase = "bwrap, host's root"
	floorName = "C floor"
	ownName   = "sbxrun"
)

// features are the differences worth a line.
var features = []struct{ name, with, without string }{
	{"network namespace", ownName, ownName + ", host's network"},
	{"network namespace", floorName, floorName + ", no network namespace"},
	{"cgroup with limits", floorName, floorName + ", no cgroup"},
	{"system call filter", floorName, floorName + ", no filter"},
	{"user namespace, idmapped mounts", floorName, floorName + ", no user namespace"},
	{"overlay: 5 lowers, not 1", floorName + ", 5 lowers", floorName},
	{"overlay: 20 lowers, not 1", floorName + ", 20 lowers", floorName},
}

// notes say what the tables cannot.
var notes = []string{
	"p99 is the nearest rank: with up to 100 launches it is the largest.",
	"CPU is the launcher's and of all it waited for; of podman and docker it is the client's only.",
	"sbxrun, the C floor and bwrap see the host's /usr; chroot, unshare and the OCI runtimes a read-only folder with the command and its libraries: fewer mounts.",
	"The C floor makes the direct engine's system calls, but plans, probes, checks and reports nothing.",
	"crun, runc and youki: user namespace, all namespaces, sbxrun's filter as a profile for three architectures (precompiled: for one), limits of memory, processes and CPU, masked paths, no capabilities, no_new_privs.",
	"Before each launch of the rounds the timer waits, at most 20 ms, until nothing else is runnable; launches per second are without that.",
	"Traffic: all clients and servers are one C program, in namespaces made for it (docker's: on its own bridge); sandboxes have all CPUs. Loopback and veth hop have no rules and no connection tracking. A ratio is the median of the rounds' ratios, so of what ran at nearly the same time.",
	"Python in the sandbox has one CPU (--cpus 1, the default) or, in the last columns, all of them, as the bare venv has; all read the same files, byte-compiled.",
}

// contestants gives all that are on this machine and match, each tried once.
func (w *workshop) contestants(ctx context.Context, only *regexp.Regexp) []*contestant {
	var list []*contestant
	add := func(c contestant) { list = append(list, &c) }
	prefix := func(p ...string) func(...string) ([]string, error) {
		return func(args ...string) ([]string, error) { return append(append([]string{}, p...), args...), nil }
	}
	// peer adds a program if it is on PATH.
	peer := func(program string, c contestant, with func(path string) func(...string) ([]string, error)) {
		if path, err := exec.LookPath(program); err == nil {
			c.command = with(path)
			add(c)
		}
	}
	root, rootErr := filepath.Join(w.dir, "rootfs"), w.makeRootfs()

	add(contestant{name: "fork+exec", lacks: "everything: the command on the host", command: prefix()})
	peer("chroot", contestant{name: "chroot", lacks: "everything but the other root"}, func(p string) func(...string) ([]string, error) { return prefix(p, root) })
	peer("unshare", contestant{name: "unshare+chroot", lacks: "limits, filter, no capabilities, no_new_privs, /proc, /dev, a user that is not the host's root, writable root, supervision"}, func(p string) func(...string) ([]string, error) {
		return prefix(p, "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--cgroup", "--pid", "--fork", "--root="+root)
	})
	peer("bwrap", contestant{name: ratioBase, lacks: "limits, filter, masks, no capabilities, a user that is not the host's root, a root and /proc of its own"}, func(p string) func(...string) ([]string, error) {
		return prefix(p, "--unshare-all", "--ro-bind", "/", "/")
	})
	peer("bwrap", contestant{name: "bwrap, view of sbxrun", lacks: "limits, filter, masks, a user that is not the host's root, bounded root"}, func(p string) func(...string) ([]string, error) {
		return prefix(p, "--unshare-all", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--die-with-parent", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
			"--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp")
	})
	w.addOCI(peer)
	w.addEngines(ctx, peer, root)
	w.addFloor(ctx, add)
	w.addOwn(ctx, add)

	var out []*contestant
	for _, c := range list {
		if !only.MatchString(c.name) {
			continue
		}
		if rootErr != nil && c.failed == "" && strings.Contains(strings.Join(c.argv, " "), root) {
			c.failed = rootErr.Error()
		}
		if c.failed == "" {
			w.try(ctx, c)
		}
		out = append(out, c)
	}
	return out
}

// try runs c once, and a second time: what is cached is cached then.
func (w *workshop) try(ctx context.Context, c *contestant) {
	var err error
	if c.argv, err = c.command("/bin/true"); err != nil {
		c.failed = err.Error()
		return
	}
	for range 2 {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		cmd := w.start(ctx, c, strings.ReplaceAll(strings.Join(c.argv, "\x1f"), "{}", "try"))
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil {
			killGroup(cmd)
			c.failed = oneLine(fmt.Sprintf("%v: %s", err, out))
			return
		}
	}
}

// start gives the command of a launch, with what c must not see hidden.
func (w *workshop) start(ctx context.Context, c *contestant, joined string) *exec.Cmd {
	argv := strings.Split(joined, "\x1f")
	if c.hide != "" {
		argv = append([]string{"unshare", "--mount", "sh", "-c", `umount -l "$0" && exec "$@"`, c.hide}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it may tidy up
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return s
}

// makeRootfs makes the peers' root: two commands, their libraries, and the
// directories that an OCI runtime would make.
func (w *workshop) makeRootfs() error {
	root := filepath.Join(w.dir, "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return fmt.Errorf("make rootfs: %w", err)
		}
	}
	for _, p := range []string{"/bin/true", "/bin/sleep"} {
		out, err := exec.Command("ldd", p).Output()
		if err != nil {
			return fmt.Errorf("find libraries of %q: %w", p, err)
		}
		files := []string{p}
		for _, f := range strings.Fields(string(out)) {
			if strings.HasPrefix(f, "/") {
				files = append(files, f)
			}
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err == nil {
				err = os.MkdirAll(filepath.Join(root, filepath.Dir(f)), 0o755)
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(root, f), b, 0o755)
			}
			if err != nil {
				return fmt.Errorf("make rootfs: %w", err)
			}
		}
	}
	// Its owner is root of the OCI runtimes' user namespace.
	return filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, ociIDBase, ociIDBase)
	})
}

// adder adds a contestant if its program is on PATH.
type adder func(program string, c contestant, with func(path string) func(...string) ([]string, error))

func (w *workshop) addOCI(peer adder) {
	const lacks = "writable root (the caller's to mount), Landlock, time namespace, report"
	oci := func(filter string, flags ...string) func(string) func(...string) ([]string, error) {
		return func(path string) func(...string) ([]string, error) {
			return func(args ...string) ([]string, error) {
				bundle, err := w.bundle(filter, args)
				if err != nil {
					return nil, err
				}
				return append(append([]string{path, "--root", filepath.Join(w.state, filepath.Base(path))}, flags...), "run", "--bundle", bundle, "sbxrun-bench-{}"), nil
			}
		}
	}
	// crun up to 1.8 refuses a v2 tree beside v1 controllers.
	hide := ""
	if w.cgroups.Mode == "hybrid" {
		hide = v2Mount()
	}
	for _, name := range []string{"crun", "runc", "youki"} {
		w.undo = append(w.undo, func() error { return w.deleteContainers(name) })
	}
	peer("crun", contestant{name: "crun", lacks: lacks, hide: hide}, oci("profile"))
	peer("crun", contestant{name: "crun, filter precompiled", lacks: lacks, hide: hide}, oci("precompiled"))
	peer("runc", contestant{name: "runc", lacks: lacks}, oci("profile"))
	peer("youki", contestant{name: "youki", lacks: lacks}, oci("profile"))
}

// deleteContainers removes what an interrupted runtime has left.
func (w *workshop) deleteContainers(runtime string) error {
	dir := filepath.Join(w.state, runtime)
	left, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list containers: %w", err)
	}
	var errs []error
	for _, l := range left {
		if !strings.HasPrefix(l.Name(), "sbxrun-bench-") {
			continue
		}
		if out, err := exec.Command(runtime, "--root", dir, "delete", "--force", l.Name()).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("delete container %q: %w: %s", l.Name(), err, oneLine(string(out))))
		}
	}
	return errors.Join(errs...)
}

func v2Mount() string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	return ""
}

func (w *workshop) addEngines(ctx context.Context, peer adder, root string) {
	flags := []string{
		"run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
		"--memory", "1g", "--cpus", "1", "--pids-limit", "256", "--user", "1000:1000",
	}
	const lacks = "user namespace (not by default), writable root, Landlock, time namespace"
	peer("podman", contestant{name: "podman", lacks: lacks}, func(p string) func(...string) ([]string, error) {
		return func(args ...string) ([]string, error) {
			return append(append(append([]string{p}, flags...), "--rootfs", root), args...), nil
		}
	})
	peer("docker", contestant{name: "docker", lacks: lacks}, func(p string) func(...string) ([]string, error) {
		const image = "sbxrun-bench:latest"
		made := false
		return func(args ...string) ([]string, error) {
			if !made {
				out, err := exec.CommandContext(ctx, "sh", "-c", `tar -C "$0" -c . | "$1" import - "$2"`, root, p, image).CombinedOutput()
				if err != nil {
					return nil, errors.New(oneLine(fmt.Sprintf("import image: %v: %s", err, out)))
				}
				made = true
				w.undo = append(w.undo, func() error { return exec.Command(p, "rmi", image).Run() })
			}
			return append(append(append([]string{p}, flags...), image), args...), nil
		}
	})
}

// hostBase is the base sbxrun uses by default, in a store of our own.
func (w *workshop) hostBase(ctx context.Context) (rootfs.Base, error) {
	s, err := rootfs.OpenStore(filepath.Join(w.dir, "store"))
	if err != nil {
		return rootfs.Base{}, err
	}
	return s.HostBase(ctx)
}

func (w *workshop) addFloor(ctx context.Context, add func(contestant)) {
	const lacks = "planning, checks, report: not a sandbox to use"
	c := contestant{name: floorName, lacks: lacks}
	base, err := w.hostBase(ctx)
	var filter seccomp.Filter
	if err == nil {
		filter, err = seccomp.Default().Compile()
	}
	slots, filterPath := filepath.Join(w.state, "slots"), filepath.Join(w.dir, "filter")
	if err == nil {
		err = errors.Join(os.MkdirAll(slots, 0o700), os.WriteFile(filterPath, filter, 0o600))
	}
	var lowers []string
	for i := range 20 {
		lower := filepath.Join(w.dir, "lowers", fmt.Sprint(i))
		err = errors.Join(err, os.MkdirAll(lower, 0o755))
		lowers = append(lowers, lower)
	}
	if err != nil {
		c.failed = err.Error()
		add(c)
		return
	}
	groups, err := w.floorCgroups()
	if err != nil {
		w.notes = append(w.notes, "The C floor has no cgroup: "+err.Error())
	}
	// floor gives the command line with what is asked for; lowers is their number.
	floor := func(nlowers int, groups []string, filter bool, more ...string) func(...string) ([]string, error) {
		return func(args ...string) ([]string, error) {
			argv := append([]string{w.floor, "-s", slots}, more...)
			for _, l := range append(append([]string{}, lowers[:nlowers-1]...), base.Lowers...) {
				argv = append(argv, "-l", l)
			}
			for _, b := range base.Binds {
				argv = append(argv, "-b", b.Target)
			}
			for _, g := range groups {
				argv = append(argv, "-g", g)
			}
			if filter {
				argv = append(argv, "-f", filterPath)
			}
			return append(append(argv, "--"), args...), nil
		}
	}
	c.command = floor(1, groups, true)
	add(c)
	variant := func(name string, command func(...string) ([]string, error)) {
		add(contestant{name: floorName + ", " + name, variant: true, lacks: lacks, command: command})
	}
	variant("no network namespace", floor(1, groups, true, "-N"))
	if len(groups) > 0 {
		variant("no cgroup", floor(1, nil, true))
	}
	variant("no filter", floor(1, groups, false))
	variant("no user namespace", floor(1, groups, true, "-U"))
	variant("5 lowers", floor(5, groups, true))
	variant("20 lowers", floor(20, groups, true))
}

// floorCgroups makes the parent of the floor's cgroups where sbxrun would make
// its own, and tells controllers apart by the files they bring.
func (w *workshop) floorCgroups() ([]string, error) {
	paths, err := w.cgroups.Paths("", "floor")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range paths {
		dir := filepath.Join(filepath.Dir(filepath.Dir(p)), "sbxrun-floor")
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		w.undo = append(w.undo, func() error { return removeCgroup(dir) })
		if w.cgroups.Mode == "v2" {
			for _, d := range []string{filepath.Dir(dir), dir} {
				if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte("+memory +cpu +pids"), 0o644); err != nil {
					return nil, fmt.Errorf("enable controllers: %w", err)
				}
			}
			out = append(out, "v2="+dir)
			continue
		}
		for _, k := range []struct{ kind, file string }{
			{"memory", "memory.limit_in_bytes"},
			{"cpu", "cpu.cfs_quota_us"},
			{"cpuacct", "cpuacct.usage"},
			{"pids", "pids.max"},
			{"blkio", "blkio.reset_stats"},
			{"devices", "devices.list"},
		} {
			if unix.Access(filepath.Join(dir, k.file), unix.F_OK) == nil {
				out = append(out, k.kind+"="+dir) // controllers that share a mount share the directory
				break
			}
		}
	}
	return out, nil
}

// removeCgroup removes dir and its children: directories only, its files go
// with them. A group is busy for a moment after its last process.
func removeCgroup(dir string) error {
	subs, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove cgroup: %w", err)
	}
	for _, s := range subs {
		if s.IsDir() {
			if err := removeCgroup(filepath.Join(dir, s.Name())); err != nil {
				return err
			}
		}
	}
	for range 100 {
		if err = unix.Rmdir(dir); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("remove cgroup %q: %w", dir, err)
	}
	return nil
}

// own gives sbxrun's arguments: a root of the workshop's and the usual state directory, as users have it (another costs a lock more).
func (w *workshop) own(verb string, flags ...string) []string {
	return append([]string{w.o.sbxrun, verb, "--root", filepath.Join(w.dir, "root"), "--state", "/run/sbxrun"}, flags...)
}

func (w *workshop) addOwn(ctx context.Context, add func(contestant)) {
	sbxrun := func(flags ...string) func(...string) ([]string, error) {
		return func(args ...string) ([]string, error) {
			return append(append(w.own("run", flags...), "--"), args...), nil
		}
	}
	engine := w.defaultEngine(ctx)
	add(contestant{name: ownName, own: true, lacks: "(engine " + engine + ")", command: sbxrun()})
	if engine != "libcontainer" {
		add(contestant{name: ownName + ", libcontainer", own: true, lacks: "(engine libcontainer)", command: sbxrun("--engine", "libcontainer")})
	}
	add(contestant{name: ownName + ", host's network", own: true, variant: true, command: sbxrun("--network", "host")})
}

// defaultEngine asks sbxrun's plan.
func (w *workshop) defaultEngine(ctx context.Context) string {
	argv := append(w.own("plan"), "--", "/bin/true")
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output()
	if err != nil {
		return "unknown"
	}
	for _, line := range strings.Split(string(out), "\n") {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "engine" {
			return f[1]
		}
	}
	return "unknown"
}
