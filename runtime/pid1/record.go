// Package pid1 owns the program that is process 1 of every sandbox (init.c),
// the record it is started from and the messages it sends back.
//
// It must never know how a sandbox is made: engines start the program, the
// supervisor listens to it.
package pid1

import (
	_ "embed" // the program
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Binary is the static program for this architecture, built from init/init.c by
// `make init`.
//
//go:embed init.bin
var Binary []byte

// The descriptors the program expects besides 0, 1 and 2.
const (
	RecordFD   = 3 // the record, readable from offset 0 and mappable
	StatusFD   = 4 // write end of the status pipe
	LifelineFD = 5 // read end of a pipe that only the supervisor holds open for writing
	PassedFD   = 7 // the first of Record.Passed descriptors (6 is the engine's)
)

// HoldArg as its one argument makes the program do nothing until descriptor 3,
// a pipe, is closed at its other end: to keep a cgroup.
const HoldArg = "idle"

// maxRecordBytes is what the program maps at most; argv and environment of
// the kernel's own limit (6 MiB) fit many times.
const maxRecordBytes = 64 << 20

// Rlimit is one resource limit by its kernel number.
type Rlimit struct {
	Resource   uint32
	Soft, Hard uint64
}

// Record is what the program needs to start the command. Strings are raw
// bytes without NUL.
type Record struct {
	Argv, Env  []string
	Candidates []string // paths to try in turn, as execvp would
	Filter     []byte   // struct sock_filter[], empty is none
	Rlimits    []Rlimit
	TTY        bool // fd 0 is the controlling terminal: become its foreground
	// Jailed makes the program check that it holds no capability in any set and
	// can gain none; only tests start it otherwise.
	Jailed bool
	// LandlockScoped is a set of LANDLOCK_SCOPE_* bits, 0 is no Landlock.
	LandlockScoped uint32
	// Passed descriptors, from PassedFD up, become the command's from 3 up.
	Passed int
	// ListenPID adds LISTEN_PID, the command's own process id, to Env.
	ListenPID bool
}

// listenPID leaves room for the number.
const listenPID = "LISTEN_PID=0000000000"

// Encode gives the bytes that init.c maps: a length, the header, the parts.
func (r *Record) Encode() ([]byte, error) {
	const headerBytes = 15 * 4
	buf := make([]byte, 4+headerBytes, 4096)
	align := func() {
		for len(buf)%8 != 0 {
			buf = append(buf, 0)
		}
	}
	put := func(list []string) (uint32, error) {
		off := len(buf)
		for _, s := range list {
			if strings.IndexByte(s, 0) >= 0 {
				return 0, fmt.Errorf("encode %q: NUL byte", s)
			}
			buf = append(append(buf, s...), 0)
		}
		return uint32(off), nil
	}
	if len(r.Argv) == 0 || len(r.Candidates) == 0 {
		return nil, errors.New("encode record: empty command")
	}
	align()
	filter := len(buf)
	buf = append(buf, r.Filter...)
	align()
	rlimits := len(buf)
	for _, l := range r.Rlimits {
		buf = binary.NativeEndian.AppendUint32(buf, l.Resource)
		buf = binary.NativeEndian.AppendUint32(buf, 0)
		buf = binary.NativeEndian.AppendUint64(buf, l.Soft)
		buf = binary.NativeEndian.AppendUint64(buf, l.Hard)
	}
	argv, err := put(r.Argv)
	if err != nil {
		return nil, err
	}
	vars := r.Env
	if r.ListenPID {
		vars = append([]string{listenPID}, vars...)
	}
	env, err := put(vars)
	if err != nil {
		return nil, err
	}
	cand, err := put(r.Candidates)
	if err != nil {
		return nil, err
	}
	buf = append(buf, 0)
	if len(buf) > maxRecordBytes {
		return nil, fmt.Errorf("encode record: %d bytes of arguments and environment, at most %d: %w", len(buf), maxRecordBytes, unix.E2BIG)
	}
	var flags uint32
	if r.TTY {
		flags |= 1
	}
	if r.Jailed {
		flags |= 2
	}
	if r.ListenPID {
		flags |= 4
	}
	h := []uint32{
		uint32(len(buf)), // read first, to know what to map
		0x31584253, uint32(len(buf)), flags,
		uint32(len(r.Argv)), uint32(len(vars)), uint32(len(r.Candidates)),
		argv, env, cand,
		uint32(filter), uint32(len(r.Filter) / 8),
		uint32(rlimits), uint32(len(r.Rlimits)),
		r.LandlockScoped, uint32(r.Passed),
	}
	for i, v := range h {
		binary.NativeEndian.PutUint32(buf[4*i:], v)
	}
	return buf, nil
}

// Seal gives the record in a memfd, as the program takes it.
func (r *Record) Seal() (*os.File, error) {
	b, err := r.Encode()
	if err != nil {
		return nil, err
	}
	return sealed("sbxrun-record", b, false)
}

// Open gives the program in a memfd, ready to be executed: what runs inside is
// no file on disk, and nobody can write to it (CVE-2019-5736).
func Open() (*os.File, error) { return sealed("sbxrun-init", Binary, true) }

// sealed gives a memfd with the bytes that nobody can change any more.
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

// Kind is what a message says.
type Kind uint32

// The kinds of messages, in the order in which they can come.
const (
	Started Kind = 1 // execve of the command worked
	Failed  Kind = 2 // it did not come to that; Stage and Errno say why
	Exited  Kind = 3 // the command ended; WaitStatus and the counters are set
)

// Stage is the step of the launch that failed.
type Stage uint32

// The stages of init.c.
const (
	StageRecord Stage = iota + 1
	StageSignals
	StagePipe
	StageFork
	StageGroup
	StageTerminal
	StageRlimit
	StageClose
	StageLandlock
	StageSeccomp
	StageExec
	StageInterpreter
	StageProc
	StageGroups
	StageUserNS
	StageNetNS
	StageUnshare
	StageLoopback
	StageControl
	StageOp // Message.Op says which
	StageSession
	StageKeyring
	StageDumpable
	StagePrivilege
	StagePass
)

var stageNames = [...]string{
	"", "read launch record", "block signals", "make pipe", "fork", "set process group",
	"take terminal", "set resource limits", "close descriptors", "apply Landlock", "load seccomp filter", "execute", "execute",
	"mount procfs", "drop groups", "make user namespace", "enter network namespace", "make namespaces", "set lo up",
	"receive root", "set up", "make session", "join session keyring", "hide from tracing", "give up privileges",
	"pass descriptors",
}

// String names the operation.
func (s Stage) String() string {
	if int(s) < len(stageNames) {
		return stageNames[s]
	}
	return fmt.Sprintf("stage %d", uint32(s))
}

// Message is one report of the program.
type Message struct {
	Kind       Kind
	Stage      Stage
	Errno      unix.Errno
	WaitStatus unix.WaitStatus
	Op         int // the index of the operation that failed
	// Context switches of the command and the descendants that were reaped.
	Voluntary, Involuntary int64
}

// ReadMessage reads one message; io.EOF when the program is gone.
func ReadMessage(r io.Reader) (Message, error) {
	var b [32]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Message{}, err
	}
	ne := binary.NativeEndian
	m := Message{
		Kind: Kind(ne.Uint32(b[0:])), Stage: Stage(ne.Uint32(b[4:])),
		Errno: unix.Errno(ne.Uint32(b[8:])), WaitStatus: unix.WaitStatus(ne.Uint32(b[12:])),
		Voluntary: int64(ne.Uint64(b[16:])), Involuntary: int64(ne.Uint64(b[24:])),
	}
	if m.Stage == StageOp {
		m.Op, m.WaitStatus = int(m.WaitStatus), 0
	}
	return m, nil
}
