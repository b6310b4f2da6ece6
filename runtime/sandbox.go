package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/cgroup"
	"github.com/sbxrun/sbxrun/runtime/engine"
	"github.com/sbxrun/sbxrun/runtime/pid1"
	"github.com/sbxrun/sbxrun/seccomp"
)

// IO is what the command is connected to. The files are handed over as they
// are, never reopened: with no terminal and no output limit the command reads
// and writes the caller's own descriptors.
type IO struct {
	Stdin, Stdout, Stderr *os.File
	// Signals are passed to the command; a second INT or TERM kills. nil is none.
	Signals <-chan os.Signal
	// StatusFD gets a JSON line when the command started and when it ended; nil is none.
	StatusFD *os.File
}

// stageDir is covered by a tmpfs in each supervisor's private mount namespace.
// It is always this one, whatever Dirs.State is: the mapped root of a sandbox
// must be able to reach it, and every directory above it is open to all.
const stageDir = "/run/sbxrun"

// sandbox owns the resources of one run. Every acquire pushes its undo.
type sandbox struct {
	plan *Plan
	io   IO
	id   string
	res  *Result

	slot     *slot
	host     *cgroup.Host
	group    *cgroup.Group
	ns       *rootfs.Namespace
	root     *rootfs.Root
	filter   seccomp.Filter
	record   *os.File
	initFile *os.File
	netns    *os.File
	status   *os.File // read end
	lifeline *os.File // write end
	output   *output
	term     *terminal
	pid      int

	undo []func() error
}

func (s *sandbox) push(f func() error) { s.undo = append(s.undo, f) }

// close unwinds in reverse order and joins the errors.
func (s *sandbox) close() error {
	var errs []error
	for i := len(s.undo) - 1; i >= 0; i-- {
		errs = append(errs, s.undo[i]())
	}
	s.undo = nil
	return errors.Join(errs...)
}

// step runs one verb of the launch and notes how long it took.
func (s *sandbox) step(phase, op string, f func() error) error {
	start := time.Now()
	err := f()
	s.res.PhasesMS[phase] += msSince(start)
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		if e.Stage == "" {
			e.Stage = phase
		}
		return err
	}
	return &Error{Op: op, Stage: phase, Err: err, Hint: HintOf(err)}
}

// Run starts the plan's command in a fresh sandbox, waits for its end and
// takes everything down again. The Result is never nil. The error is non-nil
// only where the command could not be started (then Result.ExitCode is 125,
// 126 or 127) or where sbxrun itself failed.
//
// The launch, top to bottom: a slot (lock, id range, journal), a cgroup with
// its limits, a private mount namespace with the root in it, the filter and
// the record, then an engine that makes the namespaces and executes pid 1 in
// them. From then on three things hold the sandbox: pid 1 dies with the
// lifeline's other end, which only this process has; the mounts die with the
// last process in the private namespace; the cgroup is in the journal.
func Run(ctx context.Context, plan *Plan, io IO) (*Result, error) {
	s := &sandbox{plan: plan, io: io, id: newID()}
	s.res = &Result{
		SchemaVersion: SchemaVersion, ID: s.id, Name: plan.Name, StartedAt: time.Now(),
		Limits: plan.Limits, Degraded: append([]string{}, plan.Degraded...), Base: plan.Base.Name,
		Engine: plan.Engine, PhasesMS: map[string]float64{},
	}
	if plan.Layer != nil {
		s.res.Env = &ResultEnv{Key: plan.Layer.Key, Digest: plan.Layer.Digest}
	}
	err := s.launch()
	if err == nil {
		err = s.supervise(ctx)
	}
	start := time.Now()
	cerr := s.close()
	s.res.PhasesMS["teardown"] += msSince(start)
	s.res.FinishedAt = time.Now()
	_, _ = healSlots(plan.Dirs.State) // of others, which crashed; what cannot be healed now stays in its journal
	s.res.WallMS = float64(s.res.FinishedAt.Sub(s.res.StartedAt).Microseconds()) / 1000
	if err != nil {
		fillSetupFailure(s.res, err)
	}
	if cerr != nil {
		// The command's end stands; what was left is said and healed later.
		s.res.Message = strings.TrimPrefix(s.res.Message+"; teardown: "+cerr.Error(), "; ")
		s.res.Hint = "sbxrun gc heals what is left"
	}
	if err == nil && s.output != nil {
		err = s.output.writeError()
	}
	return s.res, err
}

// SetupFailed is the report of a run that ended before there was a sandbox.
func SetupFailed(err error) *Result {
	now := time.Now()
	r := &Result{SchemaVersion: SchemaVersion, StartedAt: now, FinishedAt: now, Degraded: []string{}, PhasesMS: map[string]float64{}}
	fillSetupFailure(r, err)
	return r
}

func fillSetupFailure(r *Result, err error) {
	r.Status, r.Reason, r.ExitCode = StatusSetupFailed, ReasonInternal, 125
	r.Message, r.Hint = err.Error(), HintOf(err)
	var e *Error
	if errors.As(err, &e) {
		r.Stage = e.Stage
		if e.Code != 0 {
			r.ExitCode = e.Code
		}
	}
	if errors.Is(err, context.Canceled) {
		r.Status, r.Reason = StatusCanceled, ReasonCanceled
	}
}

func msSince(t time.Time) float64 { return float64(time.Since(t).Microseconds()) / 1000 }

func (s *sandbox) launch() error {
	for _, v := range []struct {
		phase, op string
		f         func() error
	}{
		{"lock", "take a slot", s.takeSlot},
		{"cgroup", "make cgroup", s.makeCgroup},
		{"mount", "make root", s.makeRoot},
		{"seccomp", "prepare filter", s.loadFilter},
		{"net", "set up network", s.openNetwork},
		{"launch", "prepare launch", s.openPipes},
		{"launch", "start", s.start},
	} {
		if err := s.step(v.phase, v.op, v.f); err != nil {
			return err
		}
	}
	return nil
}

func (s *sandbox) takeSlot() error {
	if err := becomeSubreaper(); err != nil {
		return err
	}
	for _, d := range []string{s.plan.Dirs.State, stageDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return &Error{Op: "make state directory", Object: d, Err: err, Hint: "is it read-only or full? --state DIR chooses another"}
		}
	}
	if s.plan.Name != "" {
		l, err := lockName(s.plan.Dirs.State, s.plan.Name)
		if err != nil {
			return &Error{Op: "use name", Object: s.plan.Name, Err: err, Hint: "choose another --name"}
		}
		s.push(l.release)
	}
	store, err := rootfs.OpenStore(s.plan.Dirs.Root)
	if err != nil {
		return err
	}
	use := func(op, object, hint string, lowers ...string) error {
		release, err := store.Use(context.Background(), lowers...)
		if err != nil {
			return &Error{Op: op, Object: object, Err: err, Hint: hint}
		}
		s.push(func() error { release(); return nil })
		return nil
	}
	if err := use("use base", s.plan.Base.Name, "it was removed: sbxrun base list", s.plan.Base.Lowers...); err != nil {
		return err
	}
	if l := s.plan.Layer; l != nil {
		if err := use("use environment", l.Digest, "it was removed: run again with -r to bake it", l.Path); err != nil {
			return err
		}
	}
	sl, err := acquireSlot(s.plan.Dirs.State)
	if err != nil {
		return &Error{Op: "take a slot in", Object: s.plan.Dirs.State, Err: err, Hint: "sbxrun gc; is the directory writable?"}
	}
	s.slot = sl
	s.push(sl.release)
	return nil
}

func (s *sandbox) makeCgroup() error {
	var err error
	if s.host, err = detectCgroups(); err != nil {
		return err
	}
	// Intent first: a crash between the two leaves a journal that names too
	// much, never a cgroup that nothing names.
	dirs, err := s.host.Paths(s.plan.CgroupParent, s.id)
	if err != nil {
		return err
	}
	if err := s.slot.write(journal{ID: s.id, Name: s.plan.Name, Pid: os.Getpid(), Cgroups: dirs, StartedAt: s.res.StartedAt}); err != nil {
		return err
	}
	if s.group, err = s.host.Create(s.plan.CgroupParent, s.id, s.plan.cgroupLimits()); err != nil {
		return err
	}
	s.push(s.group.Close)
	s.res.Limits.Limits = s.group.Applied()
	return nil
}

func (s *sandbox) makeRoot() error {
	ns, err := rootfs.NewNamespace(stageDir)
	if err != nil {
		return err
	}
	s.ns = ns
	s.push(ns.Close)
	p := s.plan
	a := rootfs.Assembly{
		Lowers: p.Base.Lowers, Binds: p.Base.Binds, Upper: p.Upper, Seeds: p.Seeds,
		IDs: rootfs.IDMap{Base: s.slot.idBase(), Size: p.IDRange}, UID: p.UID, GID: p.GID,
		NoIDMapOK: slices.Contains(p.MayDegrade, "idmap"),
	}
	if p.Layer != nil {
		a.Lowers = append([]string{p.Layer.Path}, a.Lowers...)
	}
	for _, v := range p.Volumes {
		mode := v.Mode
		if mode == "" {
			mode = "rw"
		}
		a.Volumes = append(a.Volumes, rootfs.VolumeMount{Source: v.Source, Target: v.Target, Mode: mode, NoIDMap: v.NoIDMap})
	}
	if s.root, err = ns.Assemble(a); err != nil {
		return err
	}
	s.push(s.root.Close)
	s.res.Notes = append(s.res.Notes, s.root.Notes...)
	if !s.root.IDMapped {
		s.res.Degraded = append(s.res.Degraded, "idmap")
	}
	return nil
}

func (s *sandbox) loadFilter() error {
	var err error
	s.filter, err = seccomp.Load(filepath.Join(s.plan.Dirs.Root, "cache"), seccomp.Default())
	return err
}

func (s *sandbox) openNetwork() error {
	path, ok := strings.CutPrefix(s.plan.Network, "ns:")
	if !ok {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return &Error{Op: "open network namespace", Object: path, Err: err}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		f.Close()
		return &Error{Op: "open network namespace", Object: path, Err: errors.Join(errors.New("not a namespace"), err), Hint: "ip netns add NAME makes /run/netns/NAME"}
	}
	var own, given unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/net", &own), unix.Fstat(int(f.Fd()), &given)); err != nil || own.Ino == given.Ino && own.Dev == given.Dev {
		f.Close()
		return &Error{Op: "open network namespace", Object: path, Err: errors.Join(errors.New("it is the host's own"), err), Hint: "--network host says so by name, and the report too"}
	}
	s.netns = f
	s.push(f.Close)
	return nil
}

// sealed gives a memfd with the bytes, sealed where the kernel can.
func sealed(name string, b []byte, exec bool) (*os.File, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if exec {
		flags |= unix.MFD_EXEC // Linux 6.3: said outright where vm.memfd_noexec asks
	} else {
		flags |= unix.MFD_NOEXEC_SEAL
	}
	fd, err := unix.MemfdCreate(name, flags)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("make memfd %q: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write memfd %q: %w", name, err)
	}
	if exec {
		if err := f.Chmod(0o555); err != nil {
			f.Close()
			return nil, fmt.Errorf("chmod memfd %q: %w", name, err)
		}
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal memfd %q: %w", name, err)
	}
	return f, nil
}

func (s *sandbox) openPipes() error {
	p := s.plan
	rec := pid1.Record{
		Filter: s.filter, TTY: p.TTY, LandlockScoped: p.LandlockScoped, Candidates: p.candidates(),
	}
	for _, b := range p.Argv {
		rec.Argv = append(rec.Argv, string(b))
	}
	for _, b := range p.Env {
		rec.Env = append(rec.Env, string(b))
	}
	for _, r := range p.Rlimits {
		nr := rlimitNumbers[r.Name]
		rec.Rlimits = append(rec.Rlimits, pid1.Rlimit{Resource: uint32(nr), Soft: r.Soft, Hard: r.Hard})
		// Nothing inside may raise a hard limit: ours is what it inherits.
		var own unix.Rlimit
		if err := unix.Getrlimit(nr, &own); err == nil && r.Hard > own.Max {
			own.Max = r.Hard
			if err := unix.Setrlimit(nr, &own); err != nil {
				return &Error{Op: "raise ulimit", Object: r.Name, Err: err, Hint: "raise the hard limit of the calling shell or unit"}
			}
		}
	}
	b, err := rec.Encode()
	if err != nil {
		return err
	}
	if s.record, err = sealed("sbxrun-record", b, false); err != nil {
		return err
	}
	s.push(s.record.Close)
	if s.initFile, err = sealed("sbxrun-init", pid1.Binary, true); err != nil {
		return err
	}
	s.push(s.initFile.Close)
	return nil
}

func (s *sandbox) start() error {
	p := s.plan
	statusR, statusW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer statusW.Close()
	s.status = statusR
	s.push(statusR.Close)
	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer lifeR.Close()
	s.lifeline = lifeW
	s.push(lifeW.Close)

	l := &engine.Launch{
		ID: s.id, Hostname: p.Hostname, Rootfs: s.root.Path, StateDir: filepath.Join(stageDir, "engine"),
		ReadOnly: p.ReadOnly, MaskPaths: p.Masked, ReadonlyPaths: p.ReadPaths,
		IDBase: s.slot.idBase(), IDSize: p.IDRange, UID: p.UID, GID: p.GID, Cwd: p.Cwd,
		CgroupPath: s.group.LibcontainerPath(), TTY: p.TTY,
	}
	if l.Hostname == "" {
		l.Hostname = s.id
	}
	for _, m := range s.root.Mounts {
		flags := uintptr(unix.MS_BIND | unix.MS_REC | unix.MS_NOSUID | unix.MS_NODEV)
		if m.ReadOnly {
			flags |= unix.MS_RDONLY
		}
		l.Mounts = append(l.Mounts, engine.Mount{Type: "bind", Source: m.Source, Target: m.Target, Flags: flags})
	}
	l.Mounts = append(append([]engine.Mount{}, p.Mounts...), l.Mounts...)

	f := engine.Files{Init: s.initFile, Record: s.record, Status: statusW, Lifeline: lifeR, NetNS: s.netns}
	switch {
	case p.Network == "host":
		l.NetNS = "host"
	case s.netns != nil:
		l.NetNS = "fd"
	}
	if p.TTY {
		if s.term, err = newTerminal(s.io, p.Stdin); err != nil {
			return err
		}
		s.push(s.term.close)
		f.Console = s.term.peer
		l.Rows, l.Cols = s.term.rows, s.term.cols
	} else {
		f.Stdin, f.Stdout, f.Stderr = s.io.Stdin, s.io.Stdout, s.io.Stderr
		if p.Limits.OutputBytes > 0 {
			if s.output, err = newOutput(s.io, p.Limits.OutputBytes); err != nil {
				return err
			}
			s.push(s.output.close)
			f.Stdout, f.Stderr = s.output.stdoutW, s.output.stderrW
		}
		for _, x := range []*os.File{f.Stdin, f.Stdout, f.Stderr} {
			ownPipe(x, int(s.slot.idBase()+p.UID), int(s.slot.idBase()+p.GID))
		}
	}
	var eng engine.Engine = engine.OCI{}
	pid, err := eng.Start(l, f, s.ns.Do)
	if s.output != nil {
		s.output.started()
	}
	if err != nil {
		return &Error{Op: "launch with engine", Object: p.Engine, Err: err, Hint: launchHint(err)}
	}
	s.pid = pid
	s.push(s.reap)
	if s.term != nil {
		if err := s.term.receive(); err != nil {
			return err
		}
	}
	goruntime.KeepAlive(f)
	return nil
}

// ownPipe lets the command reopen /dev/stdout and its like: an anonymous pipe
// is the caller's and ours alone, so its owner may change. Files and
// terminals keep theirs.
func ownPipe(f *os.File, uid, gid int) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if f == nil || unix.Fstat(int(f.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO ||
		unix.Fstatfs(int(f.Fd()), &fs) != nil || fs.Type != 0x50495045 /* PIPEFS_MAGIC */ {
		return
	}
	_ = unix.Fchown(int(f.Fd()), uid, gid) // without it only the reopening fails
}

func launchHint(err error) string {
	if errors.Is(err, os.ErrNotExist) || strings.Contains(err.Error(), "not on PATH") {
		return "make build installs sbxrun-oci beside sbxrun"
	}
	return ""
}

// reap waits for pid 1 if the supervisor has not done so. Killing pid 1 ends
// every process of its namespace; the kernel lets it go last.
func (s *sandbox) reap() error {
	if s.pid == 0 {
		return nil
	}
	_ = unix.Kill(s.pid, unix.SIGKILL)
	for {
		_, err := unix.Wait4(s.pid, nil, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		s.pid = 0
		return nil
	}
}
