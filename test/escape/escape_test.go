// Package escape attacks sbxrun from inside with a probe (c/probe.c) that tries
// every way out that we know of, and asserts how each of them ended. It knows
// nothing of sbxrun's insides: whatever the engine, the answers are the same.
package escape

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// refused lists, for every attack of the probe, the errnos that count as
// refused; more than one only where the kernel's configuration decides.
var refused = map[string]string{
	// Host files are not hidden by permissions: they are not there.
	"read_shadow": "ENOENT", "read_root_home": "ENOENT EACCES", "read_home": "ENOENT", "read_var_lib": "ENOENT", "read_run_state": "ENOENT",
	"write_usr": "EROFS EACCES", "write_etc_passwd": "EROFS EACCES", "write_env": "ENOENT EROFS EACCES",

	"w_core_pattern": "EROFS EACCES ENOENT", "w_hostname_sysctl": "EROFS EACCES ENOENT", "w_ip_forward": "EROFS EACCES ENOENT", "w_sysrq": "EROFS EACCES ENOENT",
	"r_kcore": "ENOENT EACCES EPERM", "r_kallsyms": "ENOENT EACCES EPERM", "r_kmsg": "ENOENT EACCES EPERM", "r_dev_mem": "ENOENT", "r_dev_kmsg": "ENOENT",
	"r_sysfs": "ENOENT", "r_cgroupfs": "ENOENT",
	"pid1_fd": "EACCES", "pid1_root": "EACCES", "pid1_exe": "EACCES", "pid1_mem": "EACCES EROFS", "pid1_environ": "EACCES",
	"self_exe_write": "EROFS EACCES ETXTBSY", "uid_map_write": "EPERM EROFS EACCES", "oom_score": "EACCES EROFS",

	"un_user": "EPERM", "un_mount": "EPERM", "un_net": "EPERM", "un_pid": "EPERM", "un_cgroup": "EPERM", "un_time": "EPERM",
	"clone_user": "EPERM", "clone3_user": "ENOSYS", "setns_pid1": "EACCES EPERM",
	"do_mount": "EPERM", "mount_cgroup": "EPERM", "mount_proc": "EPERM", "remount_root": "EPERM", "umount_proc": "EPERM",
	"do_fsopen": "EPERM", "do_open_tree": "EPERM", "do_move_mount": "EPERM", "do_mount_setattr": "EPERM", "do_pivot": "EPERM", "do_chroot": "EPERM",
	"handle_at": "EPERM", "name_handle": "EPERM",

	"do_setuid0": "EPERM EINVAL", "do_setgroups": "EPERM EINVAL",
	"chmod_setuid": "EPERM", "fchmod_setgid": "EPERM", "open_setuid": "EPERM", "mkdir_setgid": "EPERM", "openat2_setuid": "ENOSYS",
	"mknod_mem": "EPERM", "mknod_block": "EPERM", "mount_setcap": "EPERM ENOENT", "drop_nnp": "EINVAL", "ambient": "EPERM",

	"ptrace_pid1": "EPERM", "ptrace_me": "EPERM", "vm_read_pid1": "EPERM", "kcmp_pid1": "EPERM", "kill_pid1": "EPERM", "kill_host_pid": "ESRCH", "pidfd_getfd1": "EPERM",
	"sched_pid1": "EPERM", "affinity_pid1": "EPERM", "prlimit_pid1": "EPERM", "nice_pid1": "EPERM", "nice_user": "EPERM", "ioprio_pid1": "EPERM",

	"do_bpf": "EPERM", "uring": "EPERM ENOSYS", "do_userfaultfd": "EPERM", "perf": "EPERM", "do_keyctl": "EPERM", "do_add_key": "EPERM", "do_request_key": "EPERM",
	"do_vmsplice": "EPERM", "do_memfd_secret": "EPERM ENOSYS", "do_modify_ldt": "EPERM", "do_kexec": "EPERM", "do_init_module": "EPERM", "do_reboot": "EPERM",
	"do_swapon": "EPERM", "do_settime": "EPERM", "do_sethostname": "EPERM", "do_syslog": "EPERM", "do_acct": "EPERM", "do_iopl": "EPERM", "do_fanotify": "EPERM",
	"int80": "SIGSYS SIGSEGV", "x32": "SIGSYS",

	"s_raw": "EPERM", "s_packet": "EAFNOSUPPORT EPERM", "s_alg": "EAFNOSUPPORT EPERM", "s_vsock": "EAFNOSUPPORT EPERM", "s_key": "EAFNOSUPPORT EPERM",
	"s_rxrpc": "EAFNOSUPPORT EPERM", "s_can": "EAFNOSUPPORT EPERM", "s_tipc": "EAFNOSUPPORT EPERM", "s_bluetooth": "EAFNOSUPPORT EPERM", "s_xdp": "EAFNOSUPPORT EPERM",
	"s_xfrm": "EAFNOSUPPORT EPERM EPROTONOSUPPORT", "s_netfilter": "EAFNOSUPPORT EPERM EPROTONOSUPPORT", "s_audit": "EAFNOSUPPORT EPERM EPROTONOSUPPORT", "s_high_bits": "EAFNOSUPPORT EPERM",
	"s_abstract": "ECONNREFUSED EPERM", "s_host_tcp": "ECONNREFUSED EACCES", "s_internet": "ENETUNREACH",

	"tiocsti": "EPERM", "tiocsti_high": "EPERM", "tioclinux": "EPERM", "cwd_inside": "ENOENT", "dotdot": "EPERM",
}

// probe is the probe's output: the last word of every fact and attack.
type probe struct {
	facts, attacks map[string]string
	mounts         map[string]string
}

func parse(t *testing.T, out string) probe {
	t.Helper()
	p := probe{map[string]string{}, map[string]string{}, map[string]string{}}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	require.Equal(t, "done", lines[len(lines)-1], "the probe did not end:\n%s", out)
	for _, l := range lines[:len(lines)-1] {
		name, rest, _ := strings.Cut(l, " ")
		switch {
		case strings.HasPrefix(name, "fact."):
			p.facts[strings.TrimPrefix(name, "fact.")] = strings.TrimSpace(rest)
		case name == "mount":
			target, opts, _ := strings.Cut(rest, " ")
			p.mounts[target] = opts
		default:
			p.attacks[name] = rest
		}
	}
	return p
}

func build(t *testing.T) string {
	t.Helper()
	return harness.BuildC(t, filepath.Join(need.Repo(), "test/escape/c/probe.c"))
}

// bait starts what the probe tries to reach on the host: an abstract socket, a
// TCP server and a process. It returns the probe's environment that names them.
func bait(t *testing.T) []string {
	t.Helper()
	name := "sbxrun-bait-" + strconv.Itoa(os.Getpid())
	u, err := net.Listen("unix", "@"+name)
	require.NoError(t, err)
	t.Cleanup(func() { _ = u.Close() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return []string{"PROBE_ABSTRACT=" + name, "PROBE_TCP_PORT=" + port, "PROBE_HOST_PID=" + strconv.Itoa(os.Getpid())}
}

func runProbe(t *testing.T, s *harness.Sbx, args ...string) probe {
	t.Helper()
	exe := build(t)
	for _, e := range bait(t) {
		args = append(args, "-e", e)
	}
	args = append(args, "-v", exe+":/probe:ro", "--", "/probe")
	o := s.Run(args...)
	require.Equal(t, 0, o.Code, "%v", o)
	require.ElementsMatch(t, harness.Degraded(), o.Report.Degraded)
	return parse(t, string(o.Stdout))
}

func TestEveryAttackIsRefused(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		checkAttacks(t, runProbe(t, s), nil)
	})
}

// The attacks must also fail for uid 0 of the sandbox, who is nobody outside,
// beside a writable volume. What is his by right is the throw-away root.
func TestEveryAttackIsRefusedToInsideRoot(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		p := runProbe(t, s, "-u", "0:0", "-v", t.TempDir()+":/data", "-w", "/data", "--tmpfs", "/scratch")
		assert.Equal(t, "0 0 0 0", p.facts["Uid"])
		assert.Equal(t, "0000000000000000", p.facts["CapEff"])
		checkAttacks(t, p, map[string]string{"do_setuid0": "ok", "write_env": "ok"})
	})
}

func checkAttacks(t *testing.T, p probe, but map[string]string) {
	t.Helper()
	for name, got := range p.attacks {
		want, known := refused[name]
		if w, ok := but[name]; ok {
			want = w
		}
		if assert.True(t, known, "the probe has an attack that the table lacks: %s", name) {
			assert.Contains(t, strings.Fields(want), got, "attack %s", name)
		}
	}
	for name := range refused {
		assert.Contains(t, p.attacks, name, "the probe lacks an attack of the table")
	}
}

// The same probe without a sandbox must be able to succeed, else the tests above
// prove nothing.
func TestProbeSucceedsWithoutSandbox(t *testing.T) {
	need.Root(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, build(t))
	cmd.Env = bait(t)
	// In namespaces of its own, so that the attacks that work do no harm.
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
	}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err)
	p := parse(t, string(out))
	for _, name := range []string{"chmod_setuid", "open_setuid", "name_handle", "ptrace_me", "do_modify_ldt", "do_vmsplice", "s_xfrm", "s_abstract", "s_host_tcp", "clone3_user", "r_sysfs", "do_keyctl"} {
		assert.Equal(t, "ok", p.attacks[name], name)
	}
}

// A folder of the host's as a standard stream would be a way out of the root:
// /proc/self/fd/0/.. is the host's.
func TestAFolderIsNoStandardStream(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		for fd := range 3 {
			report := s.ReportFile()
			cmd := s.Cmd("run", "--report", report, "--", "true")
			// By a shell: os/exec knows streams, not folders.
			cmd.Args = append([]string{"sh", "-c", fmt.Sprintf(`exec "$0" "$@" %d</etc`, fd)}, cmd.Args...)
			cmd.Path = "/bin/sh"
			require.NoError(t, cmd.Start())
			o := s.Wait(cmd)
			o.Report = s.ReadReport(report)
			require.NotNil(t, o.Report, "%v", o)
			assert.Equal(t, []any{125, "setup-failed", "internal"}, []any{o.Code, o.Report.Status, o.Report.Reason}, "folder as descriptor %d: %v", fd, o)
		}
	})
}

func TestIdentityOfTheCommand(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		p := runProbe(t, s)
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			assert.Equal(t, "0000000000000000", p.facts[set], set)
		}
		assert.Equal(t, "1", p.facts["NoNewPrivs"])
		assert.Equal(t, "2", p.facts["Seccomp"])
		assert.Equal(t, "1000 1000 1000 1000", p.facts["Uid"])
		assert.Equal(t, "1000 1000 1000 1000", p.facts["Gid"])
		assert.Empty(t, p.facts["Groups"])
		assert.Equal(t, "0 1 2", p.facts["fds"])
		assert.Equal(t, "1024", p.facts["nofile"])
		assert.Equal(t, "0", p.facts["core"])
		assert.Equal(t, "65536", p.facts["memlock"])
		assert.NotEqual(t, "1", p.facts["pid"], "pid 1 is sbxrun's")
		for _, m := range []string{"uid_map", "gid_map"} {
			f := strings.Fields(p.facts[m])
			require.Len(t, f, 3, m)
			assert.NotEqual(t, "0", f[1], "%s maps host id 0", m)
			host, err := strconv.Atoi(f[1])
			require.NoError(t, err)
			assert.GreaterOrEqual(t, host, 65536, m)
			assert.Equal(t, "65536", f[2], m)
		}
	})
}

func TestDevHoldsOnlyTheHarmless(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		p := runProbe(t, s)
		allowed := strings.Fields("console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero")
		for _, d := range strings.Fields(p.facts["dev"]) {
			assert.Contains(t, allowed, d)
		}
		for _, d := range strings.Fields("null zero full random urandom tty pts shm") {
			assert.Contains(t, strings.Fields(p.facts["dev"]), d)
		}
	})
}

// Every mount is nosuid and nodev, save single device nodes and the masks over
// files of /proc, which hold no programs.
func TestEveryMountIsNosuidNodev(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		p := runProbe(t, s)
		require.Contains(t, p.mounts, "/")
		for target, opts := range p.mounts {
			if strings.HasPrefix(target, "/proc/") || (strings.HasPrefix(target, "/dev/") && target != "/dev/shm" && target != "/dev/pts") {
				continue
			}
			o := strings.Split(opts, ",")
			assert.Contains(t, o, "nosuid", "%s %s", target, opts)
			if target != "/dev" && target != "/dev/pts" {
				assert.Contains(t, o, "nodev", "%s %s", target, opts)
			}
		}
	})
}
