package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/cgroup"
	"github.com/sbxrun/sbxrun/runtime/engine"
	"github.com/sbxrun/sbxrun/runtime/engine/direct"
	"github.com/sbxrun/sbxrun/runtime/pid1"
	"github.com/sbxrun/sbxrun/runtime/systemd"
	"github.com/sbxrun/sbxrun/seccomp"
)

// IO is what the command is connected to. The files are handed over as they
// are, never reopened: with no terminal and no output limit the command reads
// and writes the caller's own descriptors.
type IO struct {
	Stdin, Stdout, Stderr *os.File
	// Signals gives what is passed to the command; a second INT or TERM kills.
	// It is called just before pid 1 is let go. nil is none.
	Signals func() <-chan os.Signal
	// StatusFD gets a JSON line when the command started and when it ended; nil is none.
	StatusFD *os.File
	// Passed are Plan.PassFDs descriptors (systemd.Take).
	Passed []*os.File
	// Service is told when the command runs and ends; nil is nobody.
	Service *systemd.Service
	// Scope makes a scope of systemd's for a plan that asks for one.
	Scope ScopeMaker
	// NoFigures leaves out what only a report shows: the measured numbers and
	// the limits as the kernel took them.
	NoFigures bool
	// NetLog takes a JSON line for each decision about the network; nil is none.
	NetLog *os.File
	// Helper was started by StartHelper; nil starts one where the plan needs it.
	Helper *Helper
	// NetworkReady is told, before the command starts, what the helper set up; nil is nobody.
	NetworkReady func(*netns.Ready)
	// Beside is what shares the sandbox's network namespace; nil is nothing.
	Beside Beside
	// Started is told when the command has started; nil is nobody.
	Started func()
	// Joined is what was said of the namespace that is joined (ns:PATH); nil is nothing.
	Joined *netns.Ready
}

// Beside is started when the network is there, before pid 1 makes anything of the
// command, and stopped when the command has ended, while the network still is.
// Stop may be called again, and without Start.
type Beside interface {
	Start(netNS *os.File, ready *netns.Ready) error
	Stop()
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
	net      *network // nil where pid 1 makes the namespace, or joins one
	host     *cgroup.Host
	group    *cgroup.Group
	launched engine.Launch
	files    engine.Files
	begun    engine.Begun
	ns       *rootfs.Namespace // only for libcontainer
	root     *rootfs.Root
	scope    Scope    // nil without the systemd manager
	status   *os.File // read end
	output   *output
	term     *terminal
	pid      int
	signals  <-chan os.Signal
	early    []os.Signal // that came before the command had started

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
// The launch, top to bottom: a slot (lock, id range, journal), the pipes, the
// engine begins (pid 1 makes its namespaces meanwhile), a cgroup with its
// limits, the root as detached mounts, the filter, and the engine lets pid 1 go
// on in them. From then on three things hold the sandbox: pid 1 dies with the
// lifeline's other end, which only this process has; the mounts die with pid
// 1's namespace; the cgroup is in the journal.
func Run(ctx context.Context, plan *Plan, io IO) (*Result, error) {
	s := &sandbox{plan: plan, io: io, id: newID()}
	s.res = &Result{
		SchemaVersion: SchemaVersion, ID: s.id, Name: plan.Name, StartedAt: time.Now().UTC(),
		Limits: plan.Limits, Degraded: append([]string{}, plan.Degraded...), Denials: []string{}, Base: plan.Base.Name,
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
	r := &Result{SchemaVersion: SchemaVersion, StartedAt: now, FinishedAt: now, Degraded: []string{}, Denials: []string{}, PhasesMS: map[string]float64{}}
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
	type verb struct {
		phase, op string
		f         func() error
	}
	begin, limit := verb{"launch", "begin launch", s.begin}, verb{"cgroup", "make cgroup", s.makeCgroup}
	if h, err := detectCgroups(); err == nil && h.Mode == "v2" {
		begin, limit = limit, begin // pid 1 is born in its group
	}
	early := verb{"net", "set up network", nil}
	if s.plan.Network == netns.ModeFull { // the root has the name servers that it says
		early.f = s.awaitNetwork
	}
	services := verb{"services", "start services", nil}
	if s.io.Beside != nil {
		services.f = s.beforeStart
	}
	for _, v := range []verb{
		{"lock", "take a slot", s.takeSlot},
		{"net", "set up network", s.openNetwork},
		{"launch", "open pipes", s.openPipes},
		begin,
		limit,
		services,
		{"launch", "prepare launch", s.prepare},
		{"cgroup", "watch memory", func() error { return s.group.Watch() }},
		early,
		{"mount", "make root", s.makeRoot},
		{"net", "set up network", s.awaitNetwork},
		{"launch", "start", s.start},
	} {
		if v.f == nil {
			continue
		}
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
		if err := use("use environment", l.Digest, "it was removed: run again with -r to bake it", l.layers()...); err != nil {
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
	if s.plan.Engine == engineDirect && s.plan.CgroupParent == "" {
		s.host = s.host.Lean(s.plan.cgroupLimits(), !s.io.NoFigures || s.plan.Limits.CPUTime > 0)
	}
	parent, name := s.plan.CgroupParent, s.id
	if s.plan.CgroupManager == managerSystemd {
		if parent, err = scopePath(s.plan.CgroupParent, s.id); err != nil {
			return err
		}
		name = "sandbox"
	}
	// Intent first: a crash between the two leaves a journal that names too
	// much, never a cgroup that nothing names.
	dirs, err := s.host.Paths(parent, name)
	if err != nil {
		return err
	}
	if err := s.slot.write(journal{ID: s.id, Name: s.plan.Name, Pid: os.Getpid(), Cgroups: dirs}); err != nil {
		return err
	}
	if s.plan.CgroupManager == managerSystemd {
		if err := s.makeScope(parent); err != nil {
			return &Error{Op: "make scope", Object: parent, Err: err, Hint: HintOf(err)}
		}
	}
	if s.group, err = s.host.Create(parent, name, s.plan.cgroupLimits()); err != nil {
		return err
	}
	s.push(s.group.Close)
	return nil
}

func (s *sandbox) makeRoot() error {
	p := s.plan
	userns, err := s.begun.UserNS()
	if err != nil {
		return s.endedEarly(err)
	}
	a := rootfs.Assembly{
		Lowers: p.Base.Lowers, Binds: p.Base.Binds, Upper: p.Upper, Seeds: append(p.Seeds[:len(p.Seeds):len(p.Seeds)], s.networkSeeds()...),
		IDs: rootfs.IDMap{Base: s.slot.idBase(), Size: p.IDRange}, UID: p.UID, GID: p.GID,
		NoIDMapOK: slices.Contains(p.MayDegrade, "idmap"), UserNS: userns, Stage: stageDir,
	}
	if p.Layer != nil {
		a.Lowers = append(p.Layer.layers(), a.Lowers...)
		if p.Layer.At != "" {
			a.Again = []rootfs.Again{{Folder: p.Layer.Prefix, Target: p.Layer.At, Layers: len(p.Layer.layers())}}
		}
	}
	for _, v := range p.Volumes {
		mode := v.Mode
		if mode == "" {
			mode = "rw"
		}
		a.Volumes = append(a.Volumes, rootfs.VolumeMount{Source: v.Source, Target: v.Target, Mode: mode, NoIDMap: v.NoIDMap, NoLinks: v.NoLinks, Lowers: v.Lowers, UpperDir: v.UpperDir})
	}
	if s.root, err = rootfs.Assemble(a); err != nil {
		return err
	}
	s.push(s.root.Close)
	s.res.Notes = append(s.res.Notes, s.root.Notes...)
	if !s.root.IDMapped {
		s.res.Degraded = append(s.res.Degraded, "idmap")
	}
	return s.makeServiceMounts()
}

// openPipes makes what connects this process with pid 1 and the command.
func (s *sandbox) openPipes() error {
	p, f := s.plan, &s.files
	pipe := func(reader int) (r, w *os.File, err error) {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, fmt.Errorf("make pipe: %w", err)
		}
		if reader != 0 {
			_ = unix.SetNonblock(fds[0], true)
		}
		r, w = os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe")
		s.push(func() error { r.Close(); w.Close(); return nil }) // one of them is closed before
		return r, w, nil
	}
	var err error
	if s.status, f.Status, err = pipe(unix.O_NONBLOCK); err != nil { // read by the poller, not by a thread
		return err
	}
	if f.Lifeline, _, err = pipe(0); err != nil {
		return err
	}
	if f.Init, err = pid1.Open(); err != nil {
		return err
	}
	s.push(f.Init.Close)
	if err := s.openPassed(); err != nil {
		return err
	}
	if p.TTY {
		if s.term, err = newTerminal(s.io, p.Stdin, p.Limits.OutputBytes); err != nil {
			return err
		}
		s.push(s.term.close)
		f.Console = s.term.peer
		return nil
	}
	f.Stdin, f.Stdout, f.Stderr = s.io.Stdin, s.io.Stdout, s.io.Stderr
	for i, x := range []*os.File{f.Stdin, f.Stdout, f.Stderr} {
		// By /proc/self/fd/0/.. a folder would lead out of the root.
		var st unix.Stat_t
		if x != nil && unix.Fstat(int(x.Fd()), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return &Error{Op: "use standard stream", Object: strconv.Itoa(i), Err: unix.EISDIR, Hint: "redirect it from or to a file or a pipe; -v shows a folder"}
		}
	}
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
	return nil
}

// record is what pid 1 starts the command from.
func (s *sandbox) record() (*pid1.Record, error) {
	p := s.plan
	rec := &pid1.Record{
		Filter: seccomp.DefaultFilter(), TTY: p.TTY, Jailed: true, LandlockScoped: p.LandlockScoped, Candidates: p.candidates(),
		Passed: p.PassFDs, ListenPID: p.ListenFDs > 0,
	}
	for _, b := range p.Argv {
		rec.Argv = append(rec.Argv, string(b))
	}
	for _, b := range p.Env {
		rec.Env = append(rec.Env, string(b))
	}
	rec.Env = append(rec.Env, s.networkEnv()...)
	for _, r := range p.Rlimits {
		rec.Rlimits = append(rec.Rlimits, pid1.Rlimit{Resource: uint32(rlimitNumbers[r.Name]), Soft: r.Soft, Hard: r.Hard})
	}
	return rec, nil
}

// raiseLimits makes room for hard limits above this process's: nothing inside
// may raise one, ours is what pid 1 inherits.
func (s *sandbox) raiseLimits() error {
	for _, r := range s.plan.Rlimits {
		nr := rlimitNumbers[r.Name]
		var own unix.Rlimit
		if err := unix.Getrlimit(nr, &own); err == nil && r.Hard > own.Max {
			own.Max = r.Hard
			if err := unix.Setrlimit(nr, &own); err != nil {
				return &Error{Op: "raise ulimit", Object: r.Name, Err: err, Hint: "raise the hard limit of the calling shell or unit"}
			}
		}
	}
	return nil
}

// begin lets the engine start what needs no root and no group yet.
func (s *sandbox) begin() error {
	p, l := s.plan, &s.launched
	if err := s.raiseLimits(); err != nil {
		return err
	}
	*l = engine.Launch{
		ID: s.id, Hostname: p.Hostname, StateDir: filepath.Join(stageDir, "engine"),
		ReadOnly: p.ReadOnly, MaskPaths: p.Masked, ReadonlyPaths: p.ReadPaths,
		IDBase: s.slot.idBase(), IDSize: p.IDRange, UID: p.UID, GID: p.GID, Cwd: p.Cwd, TTY: p.TTY, Mounts: p.Mounts, Passed: p.PassFDs,
	}
	if l.Hostname == "" {
		l.Hostname = s.id
	}
	// A service that is spared by the OOM killer must not spare its sandboxes:
	// with -1000 their own memory limit could kill nothing.
	l.ResetOOMScore = strings.HasPrefix(readTrim("/proc/self/oom_score_adj"), "-")
	switch {
	case p.Network == "host":
		l.NetNS = "host"
	case s.files.NetNS != nil:
		l.NetNS = "fd"
	}
	if p.TTY {
		l.Rows, l.Cols = s.term.rows, s.term.cols
	}
	if s.group != nil { // v2
		dir, err := s.group.DirFD()
		if err != nil {
			return err
		}
		s.push(dir.Close)
		s.files.Cgroup = dir
	}
	var eng engine.Engine = direct.Engine{}
	if p.Engine == engineLibcontainer {
		ns, err := rootfs.NewNamespace(stageDir)
		if err != nil {
			return err
		}
		s.ns = ns
		s.push(ns.Close)
		eng = engine.OCI{Spawn: ns.Do}
	}
	var err error
	if s.begun, err = eng.Begin(l, s.files); err != nil {
		return err
	}
	s.push(s.begun.Abort)
	return nil
}

// prepare gives the engine what it can do before there is a root.
func (s *sandbox) prepare() error {
	l := &s.launched
	l.CgroupPath = s.group.LibcontainerPath()
	if s.ns == nil {
		tasks, err := s.group.Tasks()
		if err != nil {
			return err
		}
		for _, t := range tasks {
			defer t.Close()
		}
		l.CgroupTasks = tasks
	}
	// From here on a signal is the command's, and no longer ends this process;
	// and now, as pid 1 takes longer to make its namespaces than we did.
	if s.io.Signals != nil {
		s.signals = s.io.Signals()
	}
	return s.endedEarly(s.begun.Prepare(l))
}

// start lets pid 1 go on in the finished root.
func (s *sandbox) start() error {
	l := &s.launched
	l.Root = s.root.Tree
	paths := make([]string, len(s.root.Mounts))
	if s.ns != nil {
		var err error
		if l.Rootfs, paths, err = s.ns.Attach(s.root); err != nil {
			return err
		}
	}
	var binds []engine.Mount
	for i, m := range s.root.Mounts {
		flags := uintptr(unix.MS_BIND | unix.MS_REC | unix.MS_NOSUID | unix.MS_NODEV)
		if m.ReadOnly {
			flags |= unix.MS_RDONLY
		}
		binds = append(binds, engine.Mount{Type: "bind", Source: paths[i], Target: m.Target, Flags: flags, Tree: m.Tree, File: m.File, Base: i < len(s.plan.Base.Binds)})
	}
	rec, err := s.record()
	if err != nil {
		return err
	}
	pid, err := s.begun.Start(l, binds, rec)
	if s.output != nil {
		s.output.started()
	}
	if err != nil {
		return s.endedEarly(err)
	}
	s.pid = pid
	s.push(s.reap)
	s.files.Status.Close() // pid 1's copy is the last: its end is ours to see
	s.files.Lifeline.Close()
	return s.root.Detach() // pid 1 has them
}

// endedEarly finds the reason of an engine's failure: where pid 1 ended, it is
// in its last message.
func (s *sandbox) endedEarly(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, engine.ErrEnded) {
		_ = s.begun.Abort() // it is dead: nothing more will come
		s.files.Status.Close()
		if m, rerr := pid1.ReadMessage(s.status); rerr == nil {
			if err = s.begun.Explain(m); err == nil {
				err = fmt.Errorf("%s: %w", m.Stage, m.Errno)
			}
		}
	}
	hint := HintOf(err)
	if hint == "" {
		hint = launchHint(err)
	}
	return &Error{Op: "launch with engine", Object: s.plan.Engine, Stage: "launch", Err: err, Hint: hint}
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
	return "sbxrun doctor says what this host lacks"
}

// reap waits for pid 1 if the supervisor has not done so. Killing pid 1 ends
// every process of its namespace; the kernel lets it go last.
func (s *sandbox) reap() error {
	if s.pid == 0 {
		return nil
	}
	_ = unix.Kill(s.pid, unix.SIGKILL)
	s.group.Thaw()
	// What it has to end may keep the CPU from it.
	help := time.AfterFunc(100*time.Millisecond, func() { _ = s.group.Kill() })
	defer help.Stop()
	for {
		_, err := unix.Wait4(s.pid, nil, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		s.pid = 0
		return nil
	}
}
