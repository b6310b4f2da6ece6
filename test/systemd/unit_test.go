// Package systemd runs what `sbxrun unit` writes, and what is packaged, under a
// real systemd.
package systemd

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

const unitDir = "/run/systemd/system"

// patience is generous: the guest is emulated.
const patience = time.Minute

func systemctl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := systemctl(t, args...)
	require.NoError(t, err, "systemctl %q: %s\n%s", args, out, status(t, args[len(args)-1]))
	return out
}

func status(t *testing.T, unit string) string {
	out, _ := systemctl(t, "status", "--no-pager", "--full", "--lines=30", unit)
	return out
}

func show(t *testing.T, unit, property string) string {
	return must(t, "show", "--value", "--property", property, unit)
}

// write has sbxrun write units and lets systemd read them. What they are is
// stopped and removed at the end.
func write(t *testing.T, args ...string) {
	t.Helper()
	need.Root(t)
	need.Systemd(t)
	need.CgroupV2(t)
	bin := need.Binary(t)
	out, err := exec.Command(bin, append([]string{"unit", "--output", unitDir, "--binary", bin}, args...)...).Output()
	require.NoError(t, err)
	files := strings.Fields(string(out))
	require.NotEmpty(t, files)
	must(t, "daemon-reload")
	t.Cleanup(func() {
		for i := len(files) - 1; i >= 0; i-- { // the timer, the socket before the service
			_, _ = systemctl(t, "stop", filepath.Base(files[i]))
			_, _ = systemctl(t, "reset-failed", filepath.Base(files[i]))
			os.Remove(files[i])
		}
		_, _ = systemctl(t, "daemon-reload")
	})
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// shared is a directory that a hardened unit can see and the sandbox's user write.
func shared(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/srv", "unit-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777)) //nolint:gosec // the sandbox's user writes there
	return dir
}

func engines(t *testing.T, f func(t *testing.T, engine string)) {
	for _, e := range []string{"direct", "libcontainer"} {
		t.Run(e, func(t *testing.T) { f(t, e) })
	}
}

// Arguments arrive byte for byte: systemd reads what was written.
func TestArgumentsArriveInTheUnit(t *testing.T) {
	dir := shared(t)
	args := []string{"a b", "100%", "%n", "$HOME", "${HOME}", "$$", `"q"`, "it's", `back\slash`, "new\nline\ttab", "", ";", "grüße 世界", "\u00a0\x01", "*"}
	script := `printf '%s\0' "$@" >/out/args`
	write(t, append([]string{"--name", "sbxrun-test-args", "--restart", "no", "--", "-v", dir + ":/out", "--", "sh", "-c", script, "sh"}, args...)...)
	must(t, "start", "sbxrun-test-args")
	var got []byte
	eventually(t, "the arguments were written", func() bool {
		got, _ = os.ReadFile(filepath.Join(dir, "args"))
		return show(t, "sbxrun-test-args", "ActiveState") == "inactive" && len(got) > 0
	})
	assert.Equal(t, strings.Join(args, "\x00")+"\x00", string(got))
}

// All that a supervisor does works behind the hardening, with both engines.
func TestHardenedServiceRuns(t *testing.T) {
	engines(t, func(t *testing.T, engine string) {
		dir := shared(t)
		// A disk limit above half of the memory lies on a loop device.
		write(t, "--name", "sbxrun-test-run", "--restart", "no", "--memory-max", "1g", "--", "--engine", engine, "-m", "128m", "--disk", "300m",
			"--ulimit", "nofile=1000:600000", "--report", filepath.Join(dir, "report.json"), "-v", dir+":/out", "--",
			"sh", "-c", "dd if=/dev/zero of=/tmp/big bs=1M count=200 2>/dev/null; ls /proc/sys >/dev/null && id -u >/out/uid; cat /proc/self/status >/out/status")
		must(t, "start", "sbxrun-test-run")
		eventually(t, "it ended", func() bool { return show(t, "sbxrun-test-run", "ActiveState") != "active" })
		assert.Equal(t, "success", show(t, "sbxrun-test-run", "Result"), status(t, "sbxrun-test-run"))
		uid, _ := os.ReadFile(filepath.Join(dir, "uid"))
		assert.Equal(t, "1000\n", string(uid))
		report, _ := os.ReadFile(filepath.Join(dir, "report.json"))
		assert.Contains(t, string(report), `"status":"ok"`)
		st, _ := os.ReadFile(filepath.Join(dir, "status"))
		assert.Contains(t, string(st), "CapEff:\t0000000000000000")
	})
}

// The command is told to stop, its end counts as success, nothing is left.
func TestServiceStops(t *testing.T) {
	engines(t, func(t *testing.T, engine string) {
		write(t, "--name", "sbxrun-test-stop", "--", "--engine", engine, "--", "sleep", "1000")
		must(t, "start", "sbxrun-test-stop") // returns when it is ready
		assert.Equal(t, "active", show(t, "sbxrun-test-stop", "ActiveState"))
		assert.Equal(t, "sbxrun.slice", show(t, "sbxrun-test-stop", "Slice"))
		group := "/sys/fs/cgroup" + show(t, "sbxrun-test-stop", "ControlGroup")
		inside := 0
		_ = filepath.WalkDir(group, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				if b, _ := os.ReadFile(filepath.Join(p, "cgroup.procs")); len(b) > 0 && p != group {
					inside++
				}
			}
			return nil
		})
		assert.GreaterOrEqual(t, inside, 2, "supervisor and sandbox in groups below the unit's")
		must(t, "stop", "sbxrun-test-stop")
		assert.Equal(t, "inactive", show(t, "sbxrun-test-stop", "ActiveState"), status(t, "sbxrun-test-stop"))
		assert.Equal(t, "success", show(t, "sbxrun-test-stop", "Result"), status(t, "sbxrun-test-stop"))
		assert.NoDirExists(t, group)
	})
}

// A sandbox that runs out of memory fails the unit with the command's code, and
// does not make systemd say that it was systemd's doing.
func TestOutOfMemoryIsTheSupervisorsToTell(t *testing.T) {
	write(t, "--name", "sbxrun-test-oom", "--restart", "no", "--", "-m", "32m", "--", "python3", "-c", "x = bytearray(200 << 20)")
	_, _ = systemctl(t, "start", "sbxrun-test-oom")
	eventually(t, "it ended", func() bool { return show(t, "sbxrun-test-oom", "ActiveState") == "failed" })
	assert.Equal(t, "exit-code", show(t, "sbxrun-test-oom", "Result"), status(t, "sbxrun-test-oom"))
	assert.Equal(t, "137", show(t, "sbxrun-test-oom", "ExecMainStatus"))
}

func TestTimerFires(t *testing.T) {
	dir := shared(t)
	write(t, "--name", "sbxrun-test-timer", "--type", "timer", "--on-calendar", "*:*:0/5", "--", "-v", dir+":/out", "--", "touch", "/out/fired")
	must(t, "start", "sbxrun-test-timer.timer")
	eventually(t, "the timer fired", func() bool { _, err := os.Stat(filepath.Join(dir, "fired")); return err == nil })
}

// The first connection starts the sandbox, which gets the listening socket
// although it has no network.
func TestSocketActivates(t *testing.T) {
	const script = `import os, socket
assert os.environ["LISTEN_FDS"] == "1"
s = socket.socket(fileno=3)
while True:
    c, _ = s.accept()
    c.sendall(b"hello from uid %d\n" % os.getuid()); c.close()
`
	engines(t, func(t *testing.T, engine string) {
		write(t, "--name", "sbxrun-test-socket", "--type", "socket", "--listen", "/run/sbxrun-test.sock", "--", "--engine", engine, "--", "python3", "-c", script)
		must(t, "start", "sbxrun-test-socket.socket")
		assert.Equal(t, "inactive", show(t, "sbxrun-test-socket.service", "ActiveState"))
		c, err := net.Dial("unix", "/run/sbxrun-test.sock")
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
		b, err := io.ReadAll(c)
		require.NoError(t, err, status(t, "sbxrun-test-socket.service"))
		assert.Equal(t, "hello from uid 1000\n", string(b))
	})
}

// The packaged template runs /etc/sbxrun/INSTANCE.toml, gc has what it needs.
func TestPackagedUnits(t *testing.T) {
	need.Root(t)
	need.Systemd(t)
	need.CgroupV2(t)
	bin := need.Binary(t)
	require.NoError(t, os.MkdirAll("/etc/sbxrun", 0o755)) //nolint:gosec // as an administrator makes it
	conf := "/etc/sbxrun/sbxrun-test.toml"
	require.NoError(t, os.WriteFile(conf, []byte("command = [\"sleep\", \"1000\"]\nmemory = \"128m\"\n"), 0o600))
	names := []string{"sbxrun.slice", "sbxrun@.service", "sbxrun-gc.service", "sbxrun-gc.timer"}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(need.Repo(), "packaging", n))
		require.NoError(t, err)
		path := filepath.Join(unitDir, n)
		require.NoError(t, os.WriteFile(path, []byte(strings.ReplaceAll(string(b), "/usr/local/bin/sbxrun", bin)), 0o600))
		t.Cleanup(func() { os.Remove(path) })
	}
	must(t, "daemon-reload")
	t.Cleanup(func() {
		_, _ = systemctl(t, "stop", "sbxrun-gc.timer", "sbxrun@sbxrun-test.service")
		os.Remove(conf)
	})
	must(t, "start", "sbxrun@sbxrun-test.service")
	assert.Equal(t, "active", show(t, "sbxrun@sbxrun-test.service", "ActiveState"))
	must(t, "start", "sbxrun-gc.timer")
	must(t, "start", "sbxrun-gc.service") // beside a live sandbox: it must not harm it
	assert.Equal(t, "success", show(t, "sbxrun-gc.service", "Result"), status(t, "sbxrun-gc.service"))
	assert.Equal(t, "active", show(t, "sbxrun@sbxrun-test.service", "ActiveState"))
	// What a crash leaves is healed: the supervisor is killed, its sandbox's journal stays.
	pid := show(t, "sbxrun@sbxrun-test.service", "MainPID")
	require.NoError(t, exec.Command("kill", "-9", pid).Run())
	must(t, "stop", "sbxrun@sbxrun-test.service")
	must(t, "start", "sbxrun-gc.service")
	assert.Equal(t, "success", show(t, "sbxrun-gc.service", "Result"), status(t, "sbxrun-gc.service"))
}
