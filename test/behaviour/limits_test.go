package behaviour

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// v2 says whether this machine has cgroup v2 alone.
func v2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// The limits that have no default are in the report as the kernel took them.
func TestMoreLimitsAreReadBack(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("-m", "64m", "--memory-reservation", "16m", "--cpu-shares", "512", "--cpuset-mems", "0", "--", "true")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.EqualValues(t, 16<<20, o.Report.Limits["memory_reservation_bytes"])
		assert.Equal(t, "0", o.Report.Limits["cpuset_mems"])
		if v2() {
			assert.EqualValues(t, 59, o.Report.Limits["cpu_weight"])
			assert.NotContains(t, o.Report.Limits, "cpu_shares")
		} else {
			assert.EqualValues(t, 512, o.Report.Limits["cpu_shares"])
		}
		o = s.Run("--cpu-weight", "200", "--", "true")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		if v2() {
			assert.EqualValues(t, 200, o.Report.Limits["cpu_weight"])
		} else {
			assert.EqualValues(t, 2048, o.Report.Limits["cpu_shares"])
		}
		o = s.Run("--", "true")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		for _, k := range []string{"memory_reservation_bytes", "memory_high_bytes", "cpu_shares", "cpu_weight", "cpuset_mems", "blkio_weight", "io"} {
			assert.NotContains(t, o.Report.Limits, k, "a limit that nobody asked for")
		}
		assert.EqualValues(t, 0, o.Report.All["pids_max_hits"])
	})
}

// memory.high slows a command down; it does not end it.
func TestMemoryHigh(t *testing.T) {
	need.CgroupV2(t)
	s := harness.New(t)
	// Files on disk can be reclaimed: the command stays below without being stuck.
	o := s.Run("-m", "128m", "--memory-high", "24m", "--disk", "80m", "-w", "/work", "--timeout", "100", "--",
		"sh", "-c", "head -c 40000000 /dev/zero > f && cat f > /dev/null")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.EqualValues(t, 24<<20, o.Report.Limits["memory_high_bytes"])
	require.NotNil(t, o.Report.MemoryPeakBytes)
	assert.Less(t, *o.Report.MemoryPeakBytes, int64(36<<20))
}

// What cannot be had is refused in one line with a hint, and nothing is run.
func TestLimitsThatAreRefused(t *testing.T) {
	s := harness.New(t)
	cases := [][]string{
		{"--memory-reservation", "2g"},
		{"--memory-reservation", "0"},
		{"--memory-high", "1m"},
		{"--memory-high", "2g"},
		{"--cpu-shares", "1"},
		{"--cpu-shares", "262145"},
		{"--cpu-shares", "x"},
		{"--cpu-weight", "10001"},
		{"--cpu-weight", "-1"},
		{"--cpu-shares", "512", "--cpu-weight", "50"},
		{"--blkio-weight", "9"},
		{"--cpuset-mems", "63"},
		{"--cpuset-mems", "x"},
		{"--cpuset-cpus", "0,4000"},
		{"--device-read-bps", "/dev/null"},
		{"--device-read-bps", "/dev/null:1m"},
		{"--device-read-bps", "/no/such/device:1m"},
		{"--device-write-bps", "/tmp:1m"},
		{"--device-write-bps", "/dev/null:0"},
		{"--device-read-iops", "/dev/null:1m"},
		{"--device-write-iops", "/dev/null:-5"},
	}
	if !v2() {
		cases = append(cases, []string{"--memory-high", "100m"})
	}
	for _, c := range cases {
		t.Run(strings.Join(c, " "), func(t *testing.T) {
			o := s.Do(append(append([]string{"run"}, c...), "--", "echo", "ran")...)
			assert.Equal(t, 125, o.Code, "%v", o)
			assert.Empty(t, string(o.Stdout))
			lines := strings.Split(strings.TrimSpace(string(o.Stderr)), "\n")
			require.Len(t, lines, 2, "%s", o.Stderr)
			assert.True(t, strings.HasPrefix(lines[0], "sbxrun: "), "%s", o.Stderr)
			assert.True(t, strings.HasPrefix(lines[1], "hint: "), "%s", o.Stderr)
		})
	}
}

// folderOnDisk makes a folder on a disk that has a device file.
func folderOnDisk(t *testing.T) (dir, device string) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "sbxrun-disk-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	var st unix.Stat_t
	require.NoError(t, unix.Stat(dir, &st))
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Skipf("needs /var/tmp on a disk: %v", err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if name, ok := strings.CutPrefix(l, "DEVNAME="); ok {
			device = "/dev/" + name
		}
	}
	if _, err := os.Stat(device); err != nil {
		t.Skipf("needs the device file of /var/tmp's disk: %v", err)
	}
	return dir, device
}

// The rate is really kept, in a file of settings too.
func TestDiskRate(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		dir, device := folderOnDisk(t)
		settings := filepath.Join(t.TempDir(), "sbxrun.toml")
		require.NoError(t, os.WriteFile(settings, []byte(fmt.Sprintf("device-write-bps = [%q]\ndevice_read_iops = %q\n", device+":1m", device+":1000")), 0o600))
		o := s.Run("-f", settings, "-v", dir+":/d", "--timeout", "100", "--",
			"dd", "if=/dev/zero", "of=/d/f", "bs=256k", "count=12", "oflag=direct", "status=none")
		if strings.Contains(string(o.Stderr), "Invalid argument") {
			t.Skipf("needs direct writes to %s", dir)
		}
		requireEnding(t, ending{0, "ok", "exit"}, o)
		require.NotNil(t, o.Report.WallMS)
		assert.GreaterOrEqual(t, *o.Report.WallMS, 1500.0, "3 MiB at 1 MiB/s")
		io, _ := o.Report.Limits["io"].([]any)
		require.Len(t, io, 1, "%v", o)
		rate, _ := io[0].(map[string]any)
		assert.Equal(t, device, rate["device"])
		assert.EqualValues(t, 1<<20, rate["write_bytes_per_second"])
		assert.EqualValues(t, 1000, rate["read_operations_per_second"])
		assert.NotContains(t, rate, "read_bytes_per_second")
	})
}

// sleeper is a run that was told to sleep, and its id.
func sleeper(t *testing.T, s *harness.Sbx, args ...string) (cmd *exec.Cmd, id, report string) {
	t.Helper()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	report = s.ReportFile()
	cmd = s.Cmd(append(append([]string{"run", "--report", report, "--json-status-fd", "3"}, args...), "--", "sleep", "600")...)
	cmd.ExtraFiles = []*os.File{w}
	require.NoError(t, cmd.Start())
	w.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	line, err := bufio.NewReader(r).ReadBytes('\n')
	require.NoError(t, err)
	var started struct{ ID string }
	require.NoError(t, json.Unmarshal(line, &started))
	return cmd, started.ID, report
}

// groupsOf gives the cgroups of a sandbox.
func groupsOf(id string) (out []string) {
	for _, g := range harness.Groups() {
		if filepath.Base(g) == id {
			out = append(out, g)
		}
	}
	return out
}

// A sandbox that somebody froze ends all the same, at its limit and when asked.
func TestFrozenSandboxIsKilled(t *testing.T) {
	// Of the direct engine's groups on v1 none is a freezer: there libcontainer's.
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		cmd, id, report := sleeper(t, s, "--timeout", "2")
		frozen := false
		for _, g := range groupsOf(id) {
			for file, value := range map[string]string{"freezer.state": "FROZEN", "cgroup.freeze": "1"} {
				if f, err := os.OpenFile(filepath.Join(g, file), os.O_WRONLY, 0); err == nil {
					_, err = f.WriteString(value)
					f.Close()
					require.NoError(t, err)
					frozen = true
				}
			}
		}
		if !frozen {
			_ = cmd.Process.Signal(syscall.SIGTERM)
		}
		o := s.Wait(cmd)
		o.Report = s.ReadReport(report)
		if !frozen {
			t.Skip("no group of it can be frozen")
		}
		requireEnding(t, ending{124, "killed", "wall_timeout"}, o)
	})
}

// asUnit starts sbxrun in a unit of systemd's, as with `systemd-run --wait`.
func asUnit(s *harness.Sbx, cmd *exec.Cmd, unit string, properties ...string) *exec.Cmd {
	args := []string{"--wait", "--pipe", "--quiet", "--collect", "--unit", unit, "-E", "SBXRUN_ROOT=" + s.Root, "-E", "SBXRUN_STATE=" + s.State}
	for _, p := range properties {
		args = append(args, "-p", p)
	}
	c := exec.Command("systemd-run", append(append(args, "--"), cmd.Args...)...)
	return c
}

func procs(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	require.NoError(t, err)
	return strings.TrimSpace(string(b))
}

// In a unit with Delegate=yes sandboxes are children of the unit, its processes
// lie in a leaf, and the unit is as it was afterwards.
func TestDelegatedUnit(t *testing.T) {
	need.Systemd(t)
	need.CgroupV2(t)
	s := harness.New(t)
	requireEnding(t, ending{0, "ok", "exit"}, s.Run("--", "true")) // the base is made
	unit := fmt.Sprintf("sbxrun-test-%d.service", os.Getpid())
	dir := "/sys/fs/cgroup/system.slice/" + unit
	report := s.ReportFile()
	inner := s.Cmd("run", "--report", report, "-m", "64m", "--", "sleep", "3")
	cmd := asUnit(s, exec.Command("sh", "-c", `"$0" "$@" & "$0" run -- sleep 1 & wait $!; wait; cat "/sys/fs/cgroup$(dirname "$(cut -d: -f3 /proc/self/cgroup)")/cgroup.subtree_control"`, inner.Path), unit, "Delegate=yes")
	cmd.Args = append(cmd.Args, inner.Args[1:]...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool {
		groups, _ := filepath.Glob(dir + "/sbxrun/*/cgroup.procs")
		return len(groups) == 2 && procs(t, filepath.Dir(groups[0])) != "" && procs(t, filepath.Dir(groups[1])) != ""
	}, time.Minute, 10*time.Millisecond, "%s", &out)
	assert.Empty(t, procs(t, dir), "an inner group with processes")
	assert.Empty(t, procs(t, dir+"/sbxrun"), "an inner group with processes")
	assert.NotEmpty(t, procs(t, dir+"/supervisor"))
	require.NoError(t, cmd.Wait(), "%s", &out)
	r := s.ReadReport(report)
	require.NotNil(t, r)
	assert.Equal(t, "ok", r.Status)
	assert.Equal(t, "", strings.TrimSpace(out.String()), "controllers that are still on")
}

// Every command of a unit can start: nothing is left that keeps the next from
// entering the unit's cgroup.
func TestDelegatedUnitWithManyCommands(t *testing.T) {
	need.Systemd(t)
	need.CgroupV2(t)
	s := harness.New(t)
	name := fmt.Sprintf("sbxrun-test-many-%d.service", os.Getpid())
	file := "/run/systemd/system/" + name
	run := s.Bin + " run -- true\n"
	text := "[Service]\nType=oneshot\nDelegate=yes\nEnvironment=SBXRUN_ROOT=" + s.Root + " SBXRUN_STATE=" + s.State +
		"\nExecStartPre=" + run + "ExecStart=" + run + "ExecStart=" + run + "ExecStartPost=" + run
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(t, os.WriteFile(file, []byte(text), 0o644)) //nolint:gosec // systemd wants it readable
	t.Cleanup(func() {
		_ = os.Remove(file)
		_ = exec.Command("systemctl", "daemon-reload").Run()
	})
	require.NoError(t, exec.Command("systemctl", "daemon-reload").Run())
	b, err := exec.Command("systemctl", "start", name).CombinedOutput()
	require.NoError(t, err, "%s", b)
}

// A limit of the unit's that is met is not called the sandbox's.
func TestOutOfMemoryOfTheUnit(t *testing.T) {
	need.Systemd(t)
	need.CgroupV2(t)
	need.Python(t)
	s := harness.New(t)
	report := s.ReportFile()
	inner := s.Cmd("run", "--report", report, "-m", "800m", "--disk", "10m", "--", "python3", "-c", "b = bytearray(300 << 20)")
	cmd := asUnit(s, inner, fmt.Sprintf("sbxrun-test-oom-%d.service", os.Getpid()), "Delegate=yes", "MemoryMax=100M", "MemorySwapMax=0", "OOMPolicy=continue")
	_ = cmd.Run()
	r := s.ReadReport(report)
	require.NotNil(t, r)
	assert.Equal(t, "oom", r.Reason)
	assert.Contains(t, r.Message, "a cgroup above")
}

// In a container with a cgroup namespace all stays below its root, though other
// processes are in it, and they can be joined by more afterwards.
func TestCgroupNamespaceRoot(t *testing.T) {
	need.CgroupV2(t)
	s := harness.New(t)
	box := fmt.Sprintf("/sys/fs/cgroup/sbxrun-test-box-%d", os.Getpid())
	require.NoError(t, os.Mkdir(box, 0o755))
	t.Cleanup(func() {
		assert.Eventually(t, func() bool { // what was killed takes its time to go
			_ = unix.Rmdir(box + "/supervisor")
			return unix.Rmdir(box) == nil
		}, 30*time.Second, 10*time.Millisecond)
	})
	report := s.ReportFile()
	inner := s.Cmd("run", "--report", report, "-m", "64m", "--", "true")
	script := `echo $$ > ` + box + `/cgroup.procs && exec unshare -C -m sh -c '
		umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup || exit 99
		sleep 100 & other=$!
		"$0" "$@"; code=$?
		cat /proc/self/cgroup /proc/$other/cgroup; cat /sys/fs/cgroup/cgroup.subtree_control
		kill $other; exit $code' "$0" "$@"`
	cmd := exec.Command("sh", append([]string{"-c", script}, inner.Args...)...)
	cmd.Env = inner.Env
	b, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", b)
	assert.Equal(t, "0::/supervisor\n0::/supervisor\n", strings.TrimRight(string(b), "\n")+"\n", "no controller is on")
	r := s.ReadReport(report)
	require.NotNil(t, r)
	assert.Equal(t, "ok", r.Status)
	assert.EqualValues(t, 64<<20, r.Limits["memory_bytes"])
}
