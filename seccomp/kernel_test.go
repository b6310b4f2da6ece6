package seccomp

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const childEnv = "SECCOMP_TEST_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		child(what)
	}
	os.Exit(m.Run())
}

// child puts itself behind the default filter and tries one thing.
func child(what string) {
	f, err := Default().Compile()
	if err != nil {
		os.Exit(100)
	}
	prog := unix.SockFprog{Len: uint16(len(f) / 8), Filter: (*unix.SockFilter)(unsafe.Pointer(&f[0]))}
	runtime.LockOSThread()
	if unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != nil {
		os.Exit(101)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); e != 0 {
		os.Exit(102)
	}
	if what == "x32" {
		_, _, _ = unix.RawSyscall(0x40000000|39, 0, 0, 0)
		os.Exit(0)
	}
	nr := map[string][4]uintptr{
		"getpid":      {unix.SYS_GETPID},
		"unshare":     {unix.SYS_UNSHARE, unix.CLONE_NEWUSER},
		"clone3":      {unix.SYS_CLONE3},
		"alg":         {unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET},
		"alg-high":    {unix.SYS_SOCKET, unix.AF_ALG | 1<<40, unix.SOCK_SEQPACKET},
		"unix":        {unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM},
		"tiocsti":     {unix.SYS_IOCTL, 0, 0x5412 | 1<<40},
		"unknown":     {1000},
		"minus-one":   {^uintptr(0)},
		"setuid-mode": {unix.SYS_FCHMOD, 0, 0o4755},
	}[what]
	_, _, e := unix.RawSyscall(nr[0], nr[1], nr[2], nr[3])
	os.Exit(int(e))
}

// The kernel takes the filter and reads it as the interpreter does.
func TestKernelAgrees(t *testing.T) {
	for what, want := range map[string]int{
		"getpid": 0, "unix": 0, "unshare": int(unix.EPERM), "clone3": int(unix.ENOSYS), "alg": int(unix.EPERM), "alg-high": int(unix.EPERM),
		"tiocsti": int(unix.EPERM), "unknown": int(unix.ENOSYS), "minus-one": int(unix.ENOSYS), "setuid-mode": int(unix.EPERM), "x32": -int(unix.SIGSYS),
	} {
		if what == "x32" && runtime.GOARCH != "amd64" {
			continue
		}
		t.Run(what, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), childEnv+"="+what)
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState == nil {
				t.Fatal(err)
			}
			ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
			got := ws.ExitStatus()
			if ws.Signaled() {
				got = -int(ws.Signal())
			}
			require.Equal(t, want, got, strings.TrimSpace(string(out)))
		})
	}
}
