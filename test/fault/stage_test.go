package fault

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
)

// stages lists one failure for each thing that a launch does, in its order.
// The command must not run, whatever fails, and nothing may be left.
var stages = []struct {
	name  string
	rules string // separated by blanks
	only  string // the engine that does it; "" is both
	code  int    // 0 is 125
	stage string
	cause string
}{
	{name: "mounts cannot be read", rules: "openat=EACCES,str1~/mountinfo", stage: "plan", cause: "permission denied"},
	{name: "slot file on a full disk", rules: "openat=ENOSPC,str1~/slots/", stage: "lock", cause: "no space left on device"},
	{name: "slot lock", rules: "flock=ENOLCK", stage: "lock", cause: "no locks available"},
	{name: "cgroup folder", rules: "mkdirat=ENOSPC,str1~/sys/fs/cgroup/", stage: "cgroup", cause: "no space left on device"},
	{name: "second cgroup folder", rules: "mkdirat=ENOSPC,str1~/sys/fs/cgroup/,skip=1", stage: "cgroup", cause: "no space left on device"},
	{name: "memory limit", rules: "openat=EACCES,str1~/memory.limit_in_bytes openat=EACCES,str1~/memory.max", stage: "cgroup", cause: "permission denied"},
	{name: "pids limit", rules: "openat=EACCES,str1~/pids.max", stage: "cgroup", cause: "permission denied"},
	{name: "limit that the kernel refuses", rules: "write=EINVAL,arg2=10,str1~1073741824", stage: "cgroup", cause: "invalid argument"},
	{name: "mount namespace of the supervisor", rules: "unshare=ENOSPC,arg0=0x20200", only: "libcontainer", stage: "launch", cause: "no space left on device"},
	{name: "user namespace for the layers", rules: "clone=ENOSPC,arg0&0x10000000", stage: "mount", cause: "no space left on device"},
	{name: "layer's mount", rules: "open_tree=ENOMEM", stage: "mount", cause: "cannot allocate memory"},
	{name: "layer's owners", rules: "mount_setattr=EPERM", stage: "mount", cause: "operation not permitted"},
	{name: "overlay not in the kernel", rules: "fsopen=ENODEV,str0~overlay", stage: "mount", cause: "no such device"},
	{name: "overlay refuses", rules: "fsconfig=EINVAL,str2~upperdir mount=EINVAL,str2~overlay", stage: "mount", cause: "invalid argument"},
	{name: "overlay's mount", rules: "fsmount=ENOSPC", only: "libcontainer", stage: "mount", cause: "no space left on device"},
	{name: "record", rules: "memfd_create=ENOMEM", stage: "launch", cause: "cannot allocate memory"},
	{name: "pid 1's program", rules: "memfd_create=ENOMEM,skip=1", stage: "launch", cause: "cannot allocate memory"},
	{name: "record cannot be sealed", rules: "fcntl=EPERM,arg1=1033", stage: "launch", cause: "operation not permitted"},
	{name: "control socket", rules: "socketpair=EMFILE", only: direct, stage: "launch", cause: "too many open files"},
	{name: "pid namespace", rules: "clone=ENOSPC,arg0&0x20000000 clone3=ENOSPC,mem0&0x20000000", only: direct, stage: "launch", cause: "no space left on device"},
	{name: "no process to be had", rules: "clone=EAGAIN,arg0&0x20000000 clone3=EAGAIN,mem0&0x20000000", only: direct, stage: "launch", cause: "resource temporarily unavailable"},
	{name: "pid 1 cannot be executed", rules: "execve=EACCES,str0~/proc/self/fd execveat=EACCES", only: direct, stage: "launch", cause: "permission denied"},
	{name: "engine cannot be executed", rules: "execve=EACCES,str0~sbxrun-oci", only: "libcontainer", stage: "launch", cause: "permission denied"},
	{name: "pid 1 stays readable", rules: "prctl=EPERM,arg0=4", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "procfs's mount", rules: "fsmount=ENOSPC", only: direct, stage: "launch", cause: "no space left on device"},
	{name: "procfs", rules: "fsopen=EPERM,str0~proc", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "session", rules: "setsid=EPERM", stage: "launch", cause: "operation not permitted"},
	{name: "supplementary groups", rules: "setgroups=EPERM", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "session keyring", rules: "keyctl=EDQUOT,arg0=1", only: direct, stage: "launch", cause: "quota exceeded"},
	{name: "user namespaces used up", rules: "unshare=ENOSPC,arg0&0x10000000", only: direct, stage: "launch", cause: "no space left on device"},
	{name: "id map", rules: "openat=EPERM,str1~/uid_map", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "ids that the kernel refuses", rules: "write=EINVAL,arg2&0x3f,str1~65536,times=1", only: direct, stage: "launch", cause: "invalid argument"},
	{name: "setgroups stays allowed", rules: "write=EPERM,arg2=4,str1~deny", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "namespaces", rules: "unshare=ENOSPC,arg0&0x40000000", only: direct, stage: "launch", cause: "no space left on device"},
	{name: "loopback", rules: "ioctl=EPERM,arg1=0x8914", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "descriptors to pid 1", rules: "sendmsg=ENOBUFS", only: direct, stage: "launch", cause: "no buffer space available"},
	{name: "descriptors from the engine", rules: "recvmsg=EMFILE", only: direct, stage: "launch", cause: "too many open files"},
	{name: "cgroup", rules: "write=EBUSY,arg2=1,str1~0 clone3=EBUSY,mem0&0x200000000", only: direct, stage: "launch", cause: "device or resource busy"},
	{name: "cgroup namespace", rules: "unshare=ENOSPC,arg0&0x2000000", only: direct, stage: "launch", cause: "no space left on device"},
	{name: "root's attachment", rules: "move_mount=EINVAL", stage: "launch", cause: "invalid argument"},
	{name: "a mount below the root", rules: "move_mount=ENOENT,skip=3", only: direct, stage: "launch", cause: "no such file or directory"},
	{name: "a link where a folder was", rules: "openat2=ELOOP", only: direct, stage: "launch", cause: "too many levels of symbolic links"},
	{name: "mask", rules: "open_tree=EPERM,str1~null", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "host name", rules: "sethostname=EPERM", stage: "launch", cause: "operation not permitted"},
	{name: "pivot", rules: "pivot_root=EINVAL", stage: "launch", cause: "invalid argument"},
	{name: "old root stays", rules: "umount2=EBUSY", stage: "launch", cause: "device or resource busy"},
	{name: "working directory", rules: "chdir=EACCES,str0~/home/sandbox", stage: "launch", cause: "permission denied"},
	{name: "bounding set", rules: "prctl=EPERM,arg0=24", stage: "launch", cause: "operation not permitted"},
	{name: "bounding set, one of them unknown", rules: "prctl=EINVAL,arg0=24,arg1=21", only: direct, stage: "launch", cause: "invalid argument"},
	{name: "ambient set", rules: "prctl=EPERM,arg0=47", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "group", rules: "setresgid=EPERM", only: direct, stage: "launch", cause: "operation not permitted"},
	{name: "user", rules: "setresuid=EAGAIN", only: direct, stage: "launch", cause: "resource temporarily unavailable"},
	{name: "capabilities", rules: "capset=EPERM", stage: "launch", cause: "operation not permitted"},
	{name: "no_new_privs", rules: "prctl=EPERM,arg0=38", stage: "launch", cause: "operation not permitted"},
	{name: "signals", rules: "signalfd4=EMFILE", stage: "exec", cause: "too many open files"},
	{name: "fork of the command", rules: "clone=EAGAIN,arg0=17", stage: "exec", cause: "resource temporarily unavailable"},
	{name: "process group", rules: "setpgid=EPERM", stage: "exec", cause: "operation not permitted"},
	{name: "rlimits", rules: "prlimit64=EPERM,arg1=4", stage: "exec", cause: "operation not permitted"},
	{name: "descriptors of ours", rules: "close_range=EINVAL,arg0=3", stage: "exec", cause: "invalid argument"},
	{name: "Landlock's rules", rules: "landlock_create_ruleset=ENOMEM,arg1&0xffff", stage: "exec", cause: "cannot allocate memory"},
	{name: "Landlock", rules: "landlock_restrict_self=EPERM", stage: "exec", cause: "operation not permitted"},
	{name: "filter", rules: "seccomp=ENOMEM,arg0=1", stage: "exec", cause: "cannot allocate memory"},
	{name: "command not executable", rules: "execve=EACCES,str0~/facts", code: 126, stage: "exec", cause: "permission denied"},
	{name: "command for another machine", rules: "execve=ENOEXEC,str0~/facts", code: 126, stage: "exec", cause: "exec format error"},
	{name: "arguments too long", rules: "execve=E2BIG,str0~/facts", code: 126, stage: "exec", cause: "argument list too long"},
	{name: "no memory for the command", rules: "execve=ENOMEM,str0~/facts", code: 126, stage: "exec", cause: "cannot allocate memory"},
	{name: "command is being written", rules: "execve=ETXTBSY,str0~/facts", code: 126, stage: "exec", cause: "text file busy"},
	{name: "the command's loader is missing", rules: "execve=ENOENT,str0~/facts", code: 126, stage: "exec", cause: "no such file or directory"},
	{name: "the command is missing", rules: "execve=ENOENT,str0~/facts faccessat=ENOENT,str1~/facts", code: 127, stage: "exec", cause: "no such file or directory"},
}

func TestFailureAtEachStage(t *testing.T) {
	eachEngine(t, func(t *testing.T, s *harness.Sbx) {
		baseline(t, s)
		for _, c := range stages {
			if c.only != "" && c.only != s.Engine {
				continue
			}
			t.Run(c.name, func(t *testing.T) {
				code := 125
				if c.code != 0 {
					code = c.code
				}
				i := inject(t, s, strings.Fields(c.rules), factsArgs(t)...)
				failed := 0
				for _, n := range i.failed {
					failed += n
				}
				assert.NotZero(t, failed, "the call was never made: the row tests nothing")
				failsClosed(t, i, code, c.stage, c.cause)
				leftNothing(t, s)
			})
		}
	})
}

// The first run of a machine makes the base: what fails then is said, and is no
// trouble for the second.
func TestFirstRunFails(t *testing.T) {
	eachEngine(t, func(t *testing.T, s *harness.Sbx) {
		base := baseline(t, s)
		for _, c := range []struct{ name, rule string }{
			{"no folder", "mkdirat=ENOSPC,str1~/objects"},
			{"no file", "openat=ENOSPC,str1~/tmp/object-"},
			{"no link", "linkat=ENOSPC"},
			{"no sync", "fsync=EIO"},
			{"no rename", "renameat=EROFS,str1~/root/tmp/"},
		} {
			t.Run(c.name, func(t *testing.T) {
				s.Root = filepath.Join(t.TempDir(), "root")
				i := inject(t, s, []string{c.rule}, factsArgs(t)...)
				assert.NotZero(t, i.failed[0], "the call was never made: the row tests nothing")
				assert.Equal(t, 125, i.Code, "%v", i)
				sane(t, i)
				isolated(t, inject(t, s, []string{notAsked}, factsArgs(t)...), base)
				leftNothing(t, s)
			})
		}
	})
}

// Parents in which no sandbox can live.
func TestCgroupParentThatCannotHoldASandbox(t *testing.T) {
	eachEngine(t, func(t *testing.T, s *harness.Sbx) {
		y := newYard(t)
		set := func(value string, files ...string) (undo func()) {
			done := 0
			var old []func()
			for _, d := range y.dirs {
				for _, f := range files {
					p := filepath.Join(d, f)
					was, err := os.ReadFile(p)
					if err != nil {
						continue // another version's or controller's
					}
					require.NoError(t, os.WriteFile(p, []byte(value), 0))
					old = append(old, func() { assert.NoError(t, os.WriteFile(p, []byte(strings.TrimSpace(string(was))), 0)) })
					done++
				}
			}
			if done == 0 {
				t.Skipf("no %v in %v", files, y.dirs)
			}
			return func() {
				for _, f := range old {
					f()
				}
			}
		}
		for _, c := range []struct {
			name, parent string
			prepare      func() func()
			stage, cause string
		}{
			{"missing", y.name + "/no-such-group", nil, "cgroup", "find parent cgroup"},
			{"frozen (v1)", y.name, func() func() { return set("FROZEN", "freezer.state") }, "cgroup", "is frozen"},
			{"frozen (v2)", y.name, func() func() { return set("1", "cgroup.freeze") }, "cgroup", "is frozen"},
			// Who enters first and forks then (v1) fails later than who is born there.
			{"takes no process", y.name, func() func() { return set("0", "pids.max") }, "launch exec", "resource temporarily unavailable"},
		} {
			t.Run(c.name, func(t *testing.T) {
				if c.prepare != nil {
					defer c.prepare()()
				}
				i := inject(t, s, []string{notAsked}, append([]string{"--cgroup-parent", c.parent}, factsArgs(t)...)...)
				stage := c.stage
				if i.Report != nil && i.Report.Stage != "" && strings.Contains(stage, " ") && strings.Contains(stage, i.Report.Stage) {
					stage = i.Report.Stage
				}
				failsClosed(t, i, 125, stage, c.cause)
				leftNothing(t, s)
				assert.Empty(t, y.groups())
			})
		}
	})
}
