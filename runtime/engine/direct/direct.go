// Package direct is sbxrun's own launch path, the default for its own plans:
// every path that it handles is ours. It compiles a launch to a list of
// operations, starts the small pid-1 program (runtime/pid1) in a new pid
// namespace and lets it carry the list out. All policy is here, all effects
// are data.
//
// It must never read anything of the sandbox's root, and never handle plans
// that are not sbxrun's own (foreign OCI bundles are libcontainer's).
package direct

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/runtime/engine"
	"github.com/sbxrun/sbxrun/runtime/pid1"
)

// Engine is the direct engine. Linux 5.19, as for idmapped layers.
type Engine struct{}

// launch is one launch under way.
type launch struct {
	files   engine.Files
	control int // ours; the other end is descriptor 3 of pid 1
	spawned chan error
	pid     int
	userns  *os.File
	ids     [2]uint32 // base, size
	program program
	dev     *os.File
	nodes   []engine.Mount
	started bool
}

// Begin implements [engine.Engine]: it starts pid 1, which makes its
// namespaces while the caller does the rest.
func (Engine) Begin(l *engine.Launch, f engine.Files) (engine.Begun, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	b := &launch{files: f, control: fds[0], ids: [2]uint32{l.IDBase, l.IDSize}, spawned: make(chan error, 1)}
	net := map[string]string{"": "n", "host": "h", "fd": "f"}[l.NetNS]
	go func() {
		var err error
		b.pid, err = spawn(f, fds[1], net, l.IDBase)
		unix.Close(fds[1])
		b.spawned <- err
		close(b.spawned)
	}()
	return b, nil
}

// spawn executes pid 1 in a new pid namespace: by vfork, as nothing of this
// process is to be copied. The other namespaces pid 1 makes itself.
func spawn(f engine.Files, control int, net string, ids uint32) (int, error) {
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
	}
	defer unix.Close(null)
	fd := func(f *os.File) uintptr {
		if f == nil {
			return uintptr(null)
		}
		return f.Fd()
	}
	attr := &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{fd(f.Stdin), fd(f.Stdout), fd(f.Stderr), uintptr(control), f.Status.Fd(), f.Lifeline.Fd()},
		Sys:   &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID},
	}
	if f.NetNS != nil || len(f.Passed) > 0 {
		attr.Files = append(attr.Files, fd(f.NetNS))
	}
	for _, p := range f.Passed {
		attr.Files = append(attr.Files, p.Fd())
	}
	// Above the child's own, and where ForkExec moves those that are in the way:
	// what the program is executed from must not be overwritten by the setting
	// up of 0 to 6 and what is passed (go.dev/issue/61751).
	above := max(20, int(slices.Max(attr.Files))+len(attr.Files)+2)
	exe, err := unix.FcntlInt(f.Init.Fd(), unix.F_DUPFD_CLOEXEC, above)
	if err != nil {
		return 0, fmt.Errorf("duplicate descriptor: %w", err)
	}
	defer unix.Close(exe)
	if f.Cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(f.Cgroup.Fd())
	}
	pid, err := syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(exe), []string{"sbxrun-init", net, strconv.FormatUint(uint64(ids), 10)}, attr)
	if err != nil {
		return 0, hinted.New(fmt.Errorf("start pid 1: %w", err), spawnHint(err))
	}
	return pid, nil
}

func spawnHint(err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return "run as root with CAP_SYS_ADMIN; a seccomp filter around sbxrun must allow clone with namespaces"
	case errors.Is(err, unix.ENOSYS):
		return "clone3(2) is needed: Linux 5.7, and no seccomp filter around sbxrun that refuses it"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return "sysctl user.max_pid_namespaces"
	}
	return ""
}

// UserNS implements [engine.Begun]: it waits until pid 1 is in its user
// namespace and gives that its ids.
func (b *launch) UserNS() (*os.File, error) {
	if b.userns != nil {
		return b.userns, nil
	}
	if err := <-b.spawned; err != nil {
		return nil, err
	}
	var one [1]byte
	for {
		n, err := unix.Read(b.control, one[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 { // pid 1 is gone
			return nil, errors.Join(engine.ErrEnded, err)
		}
		break
	}
	proc := "/proc/" + strconv.Itoa(b.pid)
	ids := fmt.Sprintf("0 %d %d\n", b.ids[0], b.ids[1])
	for _, m := range [][2]string{{"/setgroups", "deny"}, {"/uid_map", ids}, {"/gid_map", ids}} {
		if err := write(proc+m[0], m[1]); err != nil {
			return nil, fmt.Errorf("map ids: %w", err)
		}
	}
	fd, err := unix.Open(proc+"/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open user namespace: %w", err)
	}
	b.userns = os.NewFile(uintptr(fd), "userns")
	return b.userns, nil
}

// write writes a kernel file in one call.
func write(path, text string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(text)); err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// Prepare implements [engine.Begun].
func (b *launch) Prepare(l *engine.Launch) (err error) {
	if _, err := b.UserNS(); err != nil {
		return err
	}
	if l.ResetOOMScore {
		if err := write("/proc/"+strconv.Itoa(b.pid)+"/oom_score_adj", "0"); err != nil {
			return err
		}
	}
	if b.dev, b.nodes, err = makeDev(l); err != nil {
		return err
	}
	t, err := b.program.before(l, b.dev, b.nodes)
	if err != nil {
		return err
	}
	return b.hand(t, 0)
}

// Start implements [engine.Begun].
func (b *launch) Start(l *engine.Launch, binds []engine.Mount, r *pid1.Record) (int, error) {
	record, err := r.Seal()
	if err != nil {
		return 0, err
	}
	defer record.Close()
	t, slot, err := b.program.inside(l, binds, record, b.files.Console)
	if err != nil {
		return 0, err
	}
	if err := b.hand(t, slot); err != nil {
		return 0, err
	}
	b.started = true
	return b.pid, nil
}

// hand sends a part, in as many messages as it takes. record is the slot of
// the record in the last part, 0 where more will come.
func (b *launch) hand(t *part, record int32) error {
	const each = 200 // SCM_MAX_FD is 253
	send := func(buf []byte, fds []int) error {
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		binary.NativeEndian.PutUint32(buf[4:], uint32(len(buf)-8))
		if err := unix.Sendmsg(b.control, buf, rights, nil, unix.MSG_NOSIGNAL); err != nil {
			err = fmt.Errorf("hand over: %w", err)
			if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
				err = errors.Join(engine.ErrEnded, err)
			}
			return err
		}
		return nil
	}
	fds := make([]int, len(t.send))
	for i, f := range t.send {
		fds[i] = int(f.Fd())
	}
	buf := make([]byte, 8, 2048)
	for len(fds) > each {
		if err := send(buf, fds[:each]); err != nil {
			return err
		}
		fds = fds[each:]
	}
	for _, o := range t.ops {
		n := len(buf)
		buf = o.append(buf)
		if len(buf) > maxOps {
			last := append(make([]byte, 8, 2048), buf[n:]...)
			if err := send(buf[:n], fds); err != nil {
				return err
			}
			buf, fds = last, nil
		}
	}
	binary.NativeEndian.PutUint32(buf, uint32(record))
	err := send(buf, fds)
	goruntime.KeepAlive(t)
	return err
}

// Explain implements [engine.Begun].
func (b *launch) Explain(m pid1.Message) error {
	if m.Stage < pid1.StageProc || m.Stage > pid1.StageKeyring {
		return nil
	}
	op, hint := m.Stage.String(), ""
	if m.Stage == pid1.StageOp {
		if m.Op < 0 || m.Op >= len(b.program.ops) {
			return fmt.Errorf("%s: operation %d: %w", op, m.Op, m.Errno)
		}
		o := b.program.ops[m.Op]
		op = o.what
		if o.code == opAttach && m.Errno == unix.EINVAL {
			hint = "is one of source and target a file and the other a folder?"
		}
		if o.code == opAttach && m.Errno == unix.ELOOP {
			hint = "a symbolic link of the base lies on the way"
		}
		if o.object != "" {
			op += " " + strconv.Quote(o.object)
		}
	}
	switch {
	case m.Errno == unix.ENOSYS:
		hint = "Linux 5.19 is needed, and no seccomp filter around sbxrun that refuses the call"
	case m.Errno == unix.ENOSPC && (m.Stage == pid1.StageUserNS || m.Stage == pid1.StageUnshare):
		hint = "sysctl user.max_user_namespaces, user.max_net_namespaces and the like must not be used up"
	case m.Errno == unix.EPERM:
		hint = "run as root with CAP_SYS_ADMIN; a container or a security module around sbxrun may refuse it"
	}
	return hinted.New(fmt.Errorf("%s: %w", op, m.Errno), hint)
}

// Abort implements [engine.Begun].
func (b *launch) Abort() error {
	err := <-b.spawned // nil also when it was taken before
	var errs []error
	if b.control >= 0 {
		errs = append(errs, unix.Close(b.control))
		b.control = -1
	}
	for _, m := range b.nodes {
		errs = append(errs, m.Tree.Close())
	}
	for _, f := range []*os.File{b.userns, b.dev} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	b.nodes, b.userns, b.dev = nil, nil, nil
	if err == nil && b.pid != 0 && !b.started {
		b.started = true // not twice
		_ = unix.Kill(b.pid, unix.SIGKILL)
		for {
			if _, err := unix.Wait4(b.pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
	return errors.Join(errs...)
}
