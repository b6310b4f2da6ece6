package systemd_test

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// sbx is an installation on a machine with systemd.
func sbx(t *testing.T) *harness.Sbx {
	t.Helper()
	need.Systemd(t)
	need.CgroupV2(t)
	need.Python(t)
	return harness.New(t)
}

// ctl asks systemd; what it says is judged by the caller.
func ctl(args ...string) string {
	out, _ := exec.Command("systemctl", args...).CombinedOutput()
	return strings.TrimSpace(string(out))
}

func show(unit, property string) string { return ctl("show", "--value", "--property", property, unit) }

// transient starts `sbxrun run args…` as a service with properties.
func transient(t *testing.T, s *harness.Sbx, properties []string, args ...string) (unit string, err error) {
	t.Helper()
	unit = "sbxrun-test-" + strings.ReplaceAll(strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")), "_", "-") + ".service"
	cmd := []string{"--quiet", "--unit", unit, "--setenv=SBXRUN_ROOT=" + s.Root, "--setenv=SBXRUN_STATE=" + s.State}
	for _, p := range properties {
		cmd = append(cmd, "--property="+p)
	}
	cmd = append(append(cmd, s.Bin, "run"), args...)
	out, err := exec.Command("systemd-run", cmd...).CombinedOutput()
	if err != nil {
		t.Logf("systemd-run: %s", out)
	}
	t.Cleanup(func() { ctl("stop", unit); ctl("reset-failed", unit) })
	return unit, err
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	require.Eventually(t, f, time.Minute, 100*time.Millisecond, what)
}

// logged gives a unit's entries in the journal, fields as `journalctl -o export`
// has them.
func logged(unit string) string {
	exec.Command("journalctl", "--sync").Run()
	out, _ := exec.Command("journalctl", "--boot", "--unit", unit, "--output", "export").Output()
	return string(out)
}

func TestReadyWhenTheCommandRuns(t *testing.T) {
	s := sbx(t)
	unit, err := transient(t, s, []string{"Type=notify", "WatchdogSec=2", "KillMode=mixed"},
		"--", "sh", "-c", `trap "exit 0" TERM; while :; do sleep 0.1; done`)
	require.NoError(t, err)
	require.Equal(t, "active", show(unit, "ActiveState"))
	require.Regexp(t, `^sandbox [0-9a-f]{12} runs sh$`, show(unit, "StatusText"))
	time.Sleep(5 * time.Second) // longer than the watchdog waits
	require.Equal(t, "active", show(unit, "ActiveState"))
	ctl("stop", unit)
	require.Equal(t, "success", show(unit, "Result"))
}

func TestReadyIsNotSaidOfACommandThatDoesNotStart(t *testing.T) {
	s := sbx(t)
	unit, err := transient(t, s, []string{"Type=notify"}, "--", "no-such-command")
	require.Error(t, err)
	require.Equal(t, "127", show(unit, "ExecMainStatus"))
	require.Contains(t, logged(unit), "SBXRUN_STATUS=setup-failed\n")
}

func TestOutOfMemoryIsInTheJournal(t *testing.T) {
	s := sbx(t)
	unit, err := transient(t, s, []string{"Type=notify", "OOMPolicy=continue"}, "-m", "24m", "--", "python3", "-c", "x = bytearray(200 << 20)")
	require.NoError(t, err)
	eventually(t, "it ends", func() bool { return show(unit, "ActiveState") == "failed" })
	require.Equal(t, "137", show(unit, "ExecMainStatus"))
	for _, field := range []string{"SBXRUN_REASON=oom", "SBXRUN_STATUS=killed", "SBXRUN_EXIT_CODE=137", "SYSLOG_IDENTIFIER=sbxrun", "PRIORITY=4"} {
		require.Contains(t, logged(unit), field+"\n")
	}
}

func TestTheCommandTellsItself(t *testing.T) {
	s := sbx(t)
	command := `
import os, socket, time
def tell(m):
    c = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); c.sendto(m, os.environ["NOTIFY_SOCKET"])
time.sleep(1)
tell(b"READY=1\nSTATUS=serving\nMAINPID=1")
assert os.environ["WATCHDOG_USEC"] == "8000000"
for i in range(4): tell(b"WATCHDOG=1"); time.sleep(1)
time.sleep(100)`
	unit, err := transient(t, s, []string{"Type=notify", "WatchdogSec=8", "TimeoutAbortSec=5"}, "--sdnotify", "container", "--", "python3", "-c", command)
	require.NoError(t, err)
	require.Equal(t, "serving", show(unit, "StatusText"))
	require.NotEqual(t, "1", show(unit, "MainPID"))
	eventually(t, "the watchdog ends what fell silent", func() bool { return show(unit, "ActiveState") == "failed" })
	require.Equal(t, "watchdog", show(unit, "Result"))
	require.Contains(t, logged(unit), "MESSAGE=sandbox")
	require.NotContains(t, logged(unit), "goroutine")
}

func TestCredentials(t *testing.T) {
	s := sbx(t)
	file := filepath.Join(t.TempDir(), "pw")
	require.NoError(t, os.WriteFile(file, []byte("hunter2"), 0o600))
	unit, err := transient(t, s, []string{"Type=oneshot", "RemainAfterExit=yes", "LoadCredential=pw:" + file},
		"--credential", "pw", "--secret", "pw,target=db", "--", "sh", "-c",
		`cat $CREDENTIALS_DIRECTORY/pw /run/secrets/db | tr a-z A-Z | grep -x "HUNTER2HUNTER2" && ! env | tr a-z A-Z | grep HUNTER2`)
	require.NoError(t, err, logged(unit))
	require.NotContains(t, logged(unit), "hunter2")
}

// TestScope looks at what an administrator sees.
func TestScope(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		sbx(t)
		report := s.ReportFile()
		cmd := s.Cmd("run", "--report", report, "--cgroup-manager", "systemd", "--name", "job", "-m", "64m", "--pids-limit", "20", "--cpus", "0.5", "--",
			"sh", "-c", `trap "exit 3" TERM; while :; do sleep 0.1; done`)
		require.NoError(t, cmd.Start())
		unit := ""
		eventually(t, "there is a scope", func() bool {
			unit, _, _ = strings.Cut(ctl("list-units", "--plain", "--no-legend", "--state=active", "sbxrun-*.scope"), " ")
			b, _ := os.ReadFile("/sys/fs/cgroup" + show(unit, "ControlGroup") + "/sandbox/pids.current")
			return unit != "" && len(b) > 0 && string(b) != "0\n" && string(b) != "1\n"
		})
		require.Equal(t, "sbxrun.slice", show(unit, "Slice"))
		require.Contains(t, show(unit, "Description"), "(job)")
		require.Equal(t, "500ms", show(unit, "CPUQuotaPerSecUSec"))
		require.Equal(t, "21", show(unit, "TasksMax"))
		require.Equal(t, "0", show(unit, "MemorySwapMax"))
		own, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/cgroup")
		require.NoError(t, err)
		require.NotContains(t, string(own), unit, "the limits are not the supervisor's")
		time.Sleep(time.Second) // the trap is set
		require.Empty(t, ctl("stop", unit))
		o := s.Wait(cmd)
		require.Equal(t, 3, o.Code, "stopped as by a signal: asked, not killed")
		require.Equal(t, "exit", s.ReadReport(report).Reason)
		gone(t, unit)
	})
}

// gone waits until systemd has forgotten a scope, also a failed one.
func gone(t *testing.T, unit string) {
	t.Helper()
	eventually(t, "the scope goes", func() bool { return show(unit, "LoadState") == "not-found" })
}

// TestScopeOutOfMemory: the counters are read before they go with the scope.
func TestScopeOutOfMemory(t *testing.T) {
	s := sbx(t)
	o := s.Run("--cgroup-manager", "systemd", "-m", "24m", "--", "python3", "-c", "x = bytearray(200 << 20)")
	require.Equal(t, 137, o.Code, o)
	require.Equal(t, "oom", o.Report.Reason)
	require.NotNil(t, o.Report.MemoryPeakBytes)
	require.NotNil(t, o.Report.CPUUserMS)
	gone(t, "sbxrun-"+o.Report.ID+".scope")
}

// TestScopeOfASupervisorThatDied goes with it.
func TestScopeOfASupervisorThatDied(t *testing.T) {
	s := sbx(t)
	cmd := s.Cmd("run", "--cgroup-manager", "systemd", "--cgroup-parent", "sbxruntest-died.slice", "--", "sleep", "100")
	require.NoError(t, cmd.Start())
	dir := "/sys/fs/cgroup/sbxruntest.slice/sbxruntest-died.slice"
	eventually(t, "it runs", func() bool {
		m, _ := filepath.Glob(dir + "/*.scope/sandbox/cgroup.procs")
		return len(m) == 1
	})
	time.Sleep(time.Second)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	eventually(t, "its scope goes", func() bool {
		m, _ := filepath.Glob(dir + "/*.scope")
		return len(m) == 0
	})
	require.Zero(t, s.Do("gc").Code)
	ctl("stop", "sbxruntest-died.slice", "sbxruntest.slice")
}

func TestScopeIsRefusedWhereItCannotBe(t *testing.T) {
	s := sbx(t)
	for _, parent := range []string{"/a/path", "x.scope", "a--b.slice"} {
		o := s.Run("--cgroup-manager", "systemd", "--cgroup-parent", parent, "--", "true")
		require.Equal(t, 125, o.Code, parent)
		require.Contains(t, string(o.Stderr), "not the name of a slice")
	}
}

// TestASocketOfANetworkIsSaid: through it the command reaches what made it, so
// --network none is not none. That is so with any service manager.
func TestASocketOfANetworkIsSaid(t *testing.T) {
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		web, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer web.Close()
		local, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
		require.NoError(t, err)
		defer local.Close()
		tcp, err := web.(*net.TCPListener).File()
		require.NoError(t, err)
		defer tcp.Close()
		un, err := local.(*net.UnixListener).File()
		require.NoError(t, err)
		defer un.Close()
		report := s.ReportFile()
		cmd := s.Cmd("run", "--report", report, "--preserve-fds", "2", "--", "python3", "-c", `
import socket
for fd in 3, 4:
    c, _ = socket.socket(fileno=fd).accept()
    c.sendall(b"served"); c.close()`)
		cmd.ExtraFiles = []*os.File{un, tcp}
		require.NoError(t, cmd.Start())
		for _, l := range []net.Listener{local, web} {
			c, err := net.Dial(l.Addr().Network(), l.Addr().String())
			require.NoError(t, err)
			b, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "served", string(b))
			c.Close()
		}
		require.Zero(t, s.Wait(cmd).Code)
		require.Contains(t, s.ReadReport(report).Degraded, "network=fd:4")
		require.NotContains(t, s.ReadReport(report).Degraded, "network=fd:3")
	})
}

// Networks work as units are written: egress and ports where the host's settings
// are protected, full where they are not.
func TestNetworksInAUnit(t *testing.T) {
	for name, c := range map[string]struct {
		property string
		flags    []string
	}{
		"egress": {"ProtectKernelTunables=yes", []string{"--network", "egress", "-p", "127.0.0.1:0:80"}},
		"full":   {"ProtectKernelTunables=no", []string{"--network", "full", "--dns", "192.0.2.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := sbx(t)
			require.NoError(t, os.MkdirAll(s.State, 0o700)) // ReadWritePaths= wants it
			require.NoError(t, os.MkdirAll("/run/sbxrun", 0o700))
			properties := []string{
				"Type=oneshot", "RemainAfterExit=yes", "Delegate=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", c.property,
				"ReadWritePaths=" + s.State + " " + s.Root + " /run", "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
			}
			unit, err := transient(t, s, properties, append(c.flags, "--", "sh", "-c", "grep nameserver /etc/resolv.conf")...)
			require.NoError(t, err, logged(unit))
			require.Equal(t, "success", show(unit, "Result"), logged(unit))
		})
	}
}
