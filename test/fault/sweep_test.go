package fault

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/sbxrun/sbxrun/test/harness"
)

// sweeps lists calls of which every single one of a launch is made to fail in
// turn. What that does is not known in advance, as some failures are borne (a
// counter that cannot be read is null in the report): it is one of two things.
//
// Not in the list: what Go's own runtime ends the program for (mmap, epoll, the
// making of threads), and read and write, which the command's output needs.
var sweeps = []string{
	"capset=EPERM", "chdir=EACCES", "clone=EAGAIN,arg0&0x11", "dup3=EBUSY", "fchdir=EACCES", "fchmodat=EROFS", "fchown=EPERM", "fcntl=EMFILE,arg1=1030", "fcntl=EPERM,arg1=1033",
	"flock=ENOLCK", "fsconfig=EINVAL", "fsmount=ENOSPC", "fsopen=ENOMEM", "fstatfs=EIO", "ftruncate=EIO", "getcwd=ENOENT", "ioctl=ENOTTY", "keyctl=EDQUOT",
	"landlock_create_ruleset=ENOMEM,arg1&0xffff", "memfd_create=ENFILE", "mkdirat=ENOSPC", "mknodat=ENOSPC", "mount=ENOMEM", "mount_setattr=EINVAL",
	"move_mount=EINVAL", "newfstatat=EACCES", "open_tree=ENOMEM", "openat=EMFILE", "openat2=EMFILE", "pidfd_open=EMFILE", "pipe2=EMFILE", "pwrite64=ENOSPC",
	"pivot_root=EINVAL", "prctl=EPERM", "prlimit64=EPERM", "readlinkat=EACCES", "recvmsg=ENOMEM", "sendmsg=ENOBUFS", "setgroups=EPERM", "sethostname=EPERM", "setns=EPERM",
	"setresgid=EPERM", "setresuid=EAGAIN", "setpgid=EPERM", "setsid=EPERM", "signalfd4=EMFILE", "socket=EMFILE", "socketpair=EMFILE", "statfs=EACCES", "symlinkat=ENOSPC",
	"umount2=EBUSY", "unlinkat=EBUSY", "unshare=ENOSPC",
}

// tries bounds how many of a call's places are tried, evenly spread. Of
// libcontainer's many calls most are the library's own business.
var tries = map[string]int{direct: 60, "libcontainer": 6}

// Whichever call fails, the command is isolated as ever or does not run.
func TestEveryCallFailsOnce(t *testing.T) {
	eachEngine(t, func(t *testing.T, s *harness.Sbx) {
		base := baseline(t, s)
		var count []string
		for _, rule := range sweeps {
			count = append(count, rule+",skip=1000000")
		}
		for n, places := range inject(t, s, count, factsArgs(t)...).seen {
			t.Run(sweeps[n], func(t *testing.T) {
				borne, refused := 0, 0
				for at := 0; at < places; at += 1 + places/tries[s.Engine] {
					i := inject(t, s, []string{fmt.Sprintf("%s,skip=%d,times=1", sweeps[n], at)}, factsArgs(t)...)
					if i.Code == 0 {
						borne++
						isolated(t, i, base)
					} else {
						refused++
						sane(t, i)
					}
					if t.Failed() {
						t.Fatalf("at place %d of %d", at, places)
					}
				}
				t.Logf("%d places, borne %d, refused %d", places, borne, refused)
			})
		}
		o := s.Do("gc") // a slot whose removal failed is healed by whoever comes next
		assert.Equal(t, 0, o.Code, "%v", o)
	})
}

// sane asserts a failure of sbxrun's own, whichever.
func sane(t *testing.T, i *injection) {
	t.Helper()
	assert.Contains(t, []int{125, 126, 127}, i.Code, "%v", i)
	assert.Empty(t, i.Stdout, "the command ran")
	assert.NotContains(t, string(i.Stderr), "goroutine ", "a crash")
	if i.Report == nil {
		assert.Contains(t, string(i.Stderr), "report", "none was written, and why is not said\n%v", i)
		return
	}
	r := i.Report
	assert.Equal(t, []any{i.Code, "setup-failed", "internal"}, []any{r.ExitCode, r.Status, r.Reason}, "%v", i)
	assert.NotEmpty(t, r.Stage, "%v", i)
	assert.NotEmpty(t, r.Message, "%v", i)
	assert.Contains(t, string(i.Stderr), said(r), "%v", i)
}
