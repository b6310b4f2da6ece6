// Package behaviour asserts, from outside, how runs end: the exact exit status,
// the exact reason and status in the report, and that nothing is left behind
// (see harness). It knows the command line and the report only.
package behaviour

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/victim"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// ending is how a run ended: what the exit status and the report must say.
type ending struct {
	code           int
	status, reason string
}

func requireEnding(t *testing.T, want ending, o *harness.Outcome) {
	t.Helper()
	require.NotNil(t, o.Report, "no report: %v", o)
	require.Equal(t, want, ending{o.Code, o.Report.Status, o.Report.Reason}, "%v", o)
}

// Every reason, by really causing it.
func TestReasons(t *testing.T) {
	cases := []struct {
		name string
		args []string // "VICTIM" is the mounted victim
		want ending
	}{
		{"success", []string{"--", "true"}, ending{0, "ok", "exit"}},
		{"own exit code", []string{"--", "sh", "-c", "exit 7"}, ending{7, "failed", "exit"}},
		{"own exit code that looks like ours", []string{"--", "sh", "-c", "exit 125"}, ending{125, "failed", "exit"}},
		{"signal", []string{"--", "sh", "-c", "kill -SEGV $$"}, ending{139, "failed", "signal"}},
		{"signal of itself that looks like a kill", []string{"--", "sh", "-c", "kill -KILL $$"}, ending{137, "failed", "signal"}},
		{"wall time", []string{"--timeout", "1", "--", "sleep", "60"}, ending{124, "killed", "wall_timeout"}},
		{"wall time of one who ignores signals", []string{"--timeout", "1s", "--", "VICTIM", "ignore"}, ending{124, "killed", "wall_timeout"}},
		{"wall time of a fork bomb", []string{"--timeout", "2", "--pids-limit", "64", "--", "VICTIM", "forkbomb"}, ending{124, "killed", "wall_timeout"}},
		{"cpu time", []string{"--cpu-time", "1", "--timeout", "60", "--", "VICTIM", "cpu"}, ending{124, "killed", "cpu_timeout"}},
		{"memory", []string{"-m", "64m", "--timeout", "60", "--", "VICTIM", "memory"}, ending{137, "killed", "oom"}},
		{"memory in a child", []string{"-m", "64m", "--timeout", "60", "--", "sh", "-c", "VICTIM memory; sleep 50"}, ending{137, "killed", "oom"}},
		{"disk", []string{"--disk", "16m", "--timeout", "60", "-w", "/work", "--", "VICTIM", "disk", "."}, ending{3, "failed", "disk"}},
		{"inodes", []string{"--inodes", "500", "--timeout", "60", "-w", "/work", "--", "VICTIM", "inodes", "."}, ending{3, "failed", "disk"}},
		{"pids", []string{"--pids-limit", "32", "--timeout", "60", "--", "VICTIM", "forks"}, ending{3, "failed", "pids"}},
		{"output", []string{"--output-limit", "1m", "--timeout", "60", "--", "VICTIM", "flood"}, ending{137, "killed", "output"}},
		{"output on a terminal", []string{"-t", "--output-limit", "1m", "--timeout", "2", "--", "VICTIM", "flood"}, ending{137, "killed", "output"}},
		{"file size", []string{"--fsize", "1m", "--timeout", "60", "-w", "/work", "--", "VICTIM", "disk", "."}, ending{153, "failed", "signal"}},
		{"system call of another architecture", []string{"--", "VICTIM", "foreign"}, ending{159, "killed", "policy"}},
		{"zombies", []string{"--pids-limit", "64", "--timeout", "100", "--", "VICTIM", "zombies", "5000"}, ending{0, "ok", "exit"}},
		{"daemon left behind", []string{"--", "VICTIM", "daemon"}, ending{0, "ok", "exit"}},
		{"not found", []string{"--", "no-such-command"}, ending{127, "setup-failed", "internal"}},
		{"not executable", []string{"--", "/etc/passwd"}, ending{126, "setup-failed", "internal"}},
		{"no interpreter", []string{"--", "/script"}, ending{126, "setup-failed", "internal"}},
	}
	script := filepath.Join(t.TempDir(), "script")
	require.NoError(t, os.WriteFile(script, []byte("#!/no/such/interpreter\n"), 0o755)) //nolint:gosec // it is executed
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		engine := s.Engine
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				s := harness.NewOn(t, engine)
				args := []string{"-v", victim.Build(t) + ":/victim:ro", "-v", script + ":/script:ro"}
				for _, a := range c.args {
					args = append(args, strings.ReplaceAll(a, "VICTIM", "/victim"))
				}
				o := s.Run(args...)
				requireEnding(t, c.want, o)
				assert.Equal(t, c.want.reason == "oom", o.Report.OOMKilled, "oom_killed")
				if c.want.status != "ok" && c.want.reason != "exit" {
					assert.NotEmpty(t, o.Report.Message, "a run that did not end by itself says why")
				}
			})
		}
	})
}

// A limit must be the kernel's or the supervisor's, not luck: what was used
// stays near it.
func TestLimitsHold(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		v := victim.Build(t) + ":/victim:ro"
		o := s.Run("-v", v, "--disk", "16m", "-w", "/work", "--", "/victim", "disk", ".")
		require.NotNil(t, o.Report.DiskUsedBytes)
		assert.InDelta(t, 16<<20, *o.Report.DiskUsedBytes, 1<<20)
		o = s.Run("-v", v, "--output-limit", "1m", "--timeout", "60", "--", "/victim", "flood")
		assert.LessOrEqual(t, len(o.Stdout), 1<<20)
		o = s.Run("-v", v, "-m", "64m", "--timeout", "60", "--", "/victim", "memory")
		require.NotNil(t, o.Report.MemoryPeakBytes)
		assert.InDelta(t, 64<<20, *o.Report.MemoryPeakBytes, 4<<20)
		o = s.Run("-v", v, "--timeout", "1.5", "--", "/victim", "ignore")
		require.NotNil(t, o.Report.WallMS)
		assert.GreaterOrEqual(t, *o.Report.WallMS, 1500.0)
		o = s.Run("-v", v, "--cpu-time", "1", "--timeout", "60", "--", "/victim", "cpu")
		require.NotNil(t, o.Report.CPUUserMS)
		assert.GreaterOrEqual(t, *o.Report.CPUUserMS+*o.Report.CPUSystemMS, 900.0) // v1 splits them by ticks
		o = s.Run("-v", v, "--pids-limit", "32", "--timeout", "60", "--", "/victim", "forks")
		require.NotNil(t, o.Report.PidsPeak)
		assert.LessOrEqual(t, *o.Report.PidsPeak, int64(32))
	})
}

func TestDiskBackedUpperHoldsItsLimit(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("-v", victim.Build(t)+":/victim:ro", "-m", "64m", "--disk", "200m", "--timeout", "100", "-w", "/work",
			"--", "/victim", "disk", ".")
		requireEnding(t, ending{3, "failed", "disk"}, o)
		require.NotNil(t, o.Report.DiskUsedBytes)
		assert.InDelta(t, 200<<20, *o.Report.DiskUsedBytes, 20<<20)
	})
}

// Failures of sbxrun itself: 125, and what is in the way in words.
func TestSetupFailures(t *testing.T) {
	for _, c := range []struct {
		name, says string
		args       []string
	}{
		{"unknown flag", "no-such-flag", []string{"run", "--no-such-flag", "--", "true"}},
		{"no command", "command", []string{"run"}},
		{"empty command", "command", []string{"run", "--", ""}},
		{"missing requirements", "nowhere.txt", []string{"run", "-r", "nowhere.txt", "--", "true"}},
		{"missing volume", "/no/such/dir", []string{"run", "-v", "/no/such/dir:/x", "--", "true"}},
		{"volume out of the root", "..", []string{"run", "-v", "/tmp:/../../etc", "--", "true"}},
		{"unknown base", "nobase", []string{"run", "--base", "nobase", "--", "true"}},
		{"unknown environment", "noenv", []string{"run", "--with", "noenv", "--", "true"}},
		{"bad size", "12x", []string{"run", "-m", "12x", "--", "true"}},
		{"unknown user", "nosuchuser", []string{"run", "-u", "nosuchuser", "--", "true"}},
		{"the host's network by another name", "host's own", []string{"run", "--network", fmt.Sprintf("ns:/proc/%d/ns/net", os.Getpid()), "--", "true"}},
		{"a namespace that is none", "not a namespace", []string{"run", "--network", "ns:/etc/passwd", "--", "true"}},
		{"unknown engine", "unknown engine", []string{"run", "--engine", "podman", "--", "true"}},
		{"uid out of range", "70000", []string{"run", "-u", "70000", "--", "true"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := harness.New(t)
			o := s.Do(c.args...)
			require.Equal(t, 125, o.Code, "%v", o)
			assert.Empty(t, o.Stdout)
			assert.Contains(t, string(o.Stderr), c.says)
			assert.NotContains(t, string(o.Stderr), "goroutine")
		})
	}
}

func TestStreamsAreBinarySafeAndWhole(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		in := make([]byte, 3<<20)
		_, err := rand.Read(in)
		require.NoError(t, err)
		o := s.RunInput(bytes.NewReader(in), "--", "cat")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.True(t, bytes.Equal(in, o.Stdout), "%d of %d bytes came back", len(o.Stdout), len(in))
		o = s.Run("--", "sh", "-c", "echo out; echo err >&2")
		assert.Equal(t, "out\n", string(o.Stdout))
		assert.Contains(t, string(o.Stderr), "err\n")
	})
}

func TestArgumentsAndEnvironmentAreRawBytes(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("-e", "RAW=\xff\xfe", "--", "sh", "-c", `printf '%s|%s' "$RAW" "$1"`, "sh", "a b\xc3\x28\n")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, "\xff\xfe|a b\xc3\x28\n", string(o.Stdout))
	})
}

func TestEnvironmentIsAnAllowList(t *testing.T) {
	t.Setenv("SECRET_TOKEN", "hunter2")
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("-e", "GIVEN=1", "--", "env")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		var names []string
		for _, l := range strings.Split(strings.TrimSpace(string(o.Stdout)), "\n") {
			n, _, _ := strings.Cut(l, "=")
			names = append(names, n)
		}
		assert.Contains(t, names, "GIVEN")
		for _, n := range names {
			assert.Contains(t, strings.Fields("GIVEN PATH HOME USER LOGNAME LANG TERM HOSTNAME PWD SHELL TMPDIR SHLVL _"), n)
		}
	})
}

func TestFilesOfAVolumeBelongToItsOwner(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		dir := t.TempDir()
		require.NoError(t, os.Chown(dir, 4242, 4343))
		o := s.Run("-v", dir+":/data", "--", "sh", "-c", "id -u; stat -c %u /data; echo hello > /data/f")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, "1000\n1000\n", string(o.Stdout))
		var st syscall.Stat_t
		require.NoError(t, syscall.Stat(filepath.Join(dir, "f"), &st))
		assert.Equal(t, [2]uint32{4242, 4343}, [2]uint32{st.Uid, st.Gid})
	})
}

func TestVolumeModes(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("host\n"), 0o600))
		o := s.Run("-v", dir+":/data:ro", "--", "sh", "-c", "cat /data/f; echo x > /data/f")
		requireEnding(t, ending{2, "failed", "exit"}, o)
		o = s.Run("-v", dir+":/data:O", "--", "sh", "-c", "echo sandbox > /data/f; cat /data/f")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, "sandbox\n", string(o.Stdout))
		b, err := os.ReadFile(filepath.Join(dir, "f"))
		require.NoError(t, err)
		assert.Equal(t, "host\n", string(b))
	})
}

// What is mounted below another mount is not hidden by it, whichever kind is
// which and in whatever order they were asked for.
func TestMountsBelowMountsAreSeen(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		dir := t.TempDir()
		require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("host\n"), 0o600))
		for _, c := range []struct{ name, target, want string }{
			{"tmpfs below a volume", "/data/sub", "tmpfs\n"},
			{"tmpfs below the system", "/usr/local", "tmpfs\n"},
		} {
			o := s.Run("-v", dir+":/data", "--tmpfs", c.target, "--", "stat", "-f", "-c", "%T", c.target)
			assert.Equal(t, c.want, string(o.Stdout), "%s: %v", c.name, o)
		}
		o := s.Run("-v", dir+":/scratch/in", "--tmpfs", "/scratch", "--", "cat", "/scratch/in/f")
		assert.Equal(t, "host\n", string(o.Stdout), "volume in a tmpfs: %v", o)
		o = s.Run("-v", dir+":/data/sub", "-v", dir+":/data", "--", "cat", "/data/sub/f")
		assert.Equal(t, "host\n", string(o.Stdout), "volume below a later one: %v", o)
	})
}

// SIGPIPE and the like must not be ignored because sbxrun ignores them.
func TestSignalsAreAtTheirDefaults(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("--", "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n", string(o.Stdout))
	})
}

func TestReadOnlyRoot(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("--read-only", "--", "sh", "-c", "touch /tmp/a /dev/shm/a && ! touch /var/a /home/a 2>/dev/null")
		requireEnding(t, ending{0, "ok", "exit"}, o)
	})
}

func TestTwoSandboxesHaveDifferentIDs(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		seen := map[string]bool{}
		dir := t.TempDir()
		for i := range 2 {
			out := filepath.Join(dir, fmt.Sprint(i))
			require.NoError(t, os.Mkdir(out, 0o700))
			report := s.ReportFile()
			cmd := s.Cmd("run", "--report", report, "-v", out+":/out", "--", "sh", "-c", "cat /proc/self/uid_map > /out/map.tmp; mv /out/map.tmp /out/map; sleep 2")
			require.NoError(t, cmd.Start())
			t.Cleanup(func() {
				assert.Equal(t, 0, s.Wait(cmd).Code)
				s.ReadReport(report)
			})
			m := waitFile(t, filepath.Join(out, "map"))
			assert.False(t, seen[m], "two live sandboxes share %s", m)
			seen[m] = true
		}
	})
}

func waitFile(t *testing.T, path string) string {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if b, err := os.ReadFile(path); err == nil {
			return string(b)
		}
	}
	t.Fatalf("%s did not appear", path)
	return ""
}

// running starts a command that says so when it runs, and returns once it does.
func running(t *testing.T, s *harness.Sbx, script string, flags ...string) (wait func() *harness.Outcome, signal func(syscall.Signal)) {
	t.Helper()
	dir, report := t.TempDir(), s.ReportFile()
	args := append([]string{"run", "--report", report, "-v", dir + ":/out"}, flags...)
	cmd := s.Cmd(append(args, "--", "sh", "-c", script)...)
	require.NoError(t, cmd.Start())
	waitFile(t, filepath.Join(dir, "up"))
	return func() *harness.Outcome {
			o := s.Wait(cmd)
			o.Report = s.ReadReport(report)
			return o
		}, func(sig syscall.Signal) {
			require.NoError(t, cmd.Process.Signal(sig))
		}
}

func TestSignalReachesTheCommand(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		wait, signal := running(t, s, "trap 'exit 9' USR1; touch /out/up; while :; do sleep 0.05; done")
		signal(syscall.SIGUSR1)
		requireEnding(t, ending{9, "failed", "exit"}, wait())
		wait, signal = running(t, s, "trap 'exit 0' TERM; touch /out/up; while :; do sleep 0.05; done")
		signal(syscall.SIGTERM)
		requireEnding(t, ending{0, "ok", "exit"}, wait())
		wait, signal = running(t, s, "touch /out/up; exec sleep 60")
		signal(syscall.SIGTERM)
		requireEnding(t, ending{143, "canceled", "canceled"}, wait())
	})
}

// As soon as the command runs, a signal to sbxrun is the command's: sbxrun must
// listen before. Many times, because nobody knows when it does not.
func TestSignalRightAfterTheStartReachesTheCommand(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		for range 20 {
			dir, report := t.TempDir(), s.ReportFile()
			cmd := s.Cmd("run", "--report", report, "-v", dir+":/out", "--", "sh", "-c", "trap 'exit 9' TERM; : > /out/up; while :; do sleep 0.05; done")
			require.NoError(t, cmd.Start())
			for end := time.Now().Add(20 * time.Second); ; {
				if _, err := os.Lstat(filepath.Join(dir, "up")); err == nil {
					break
				}
				require.True(t, time.Now().Before(end), "the command did not start")
			}
			require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			o := s.Wait(cmd)
			o.Report = s.ReadReport(report)
			if o.Report == nil {
				require.Equal(t, 0, s.Do("gc").Code) // so that only this is said
			}
			requireEnding(t, ending{9, "failed", "exit"}, o)
		}
	})
}

func TestSecondInterruptKills(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		wait, signal := running(t, s, "trap '' INT; touch /out/up; while :; do sleep 0.05; done")
		signal(syscall.SIGINT)
		time.Sleep(200 * time.Millisecond)
		signal(syscall.SIGINT)
		requireEnding(t, ending{137, "canceled", "canceled"}, wait())
	})
}

// kill -9 of sbxrun leaves nothing running within a second, and the next
// command heals the rest.
func TestKillOfTheRuntimeKillsTheSandbox(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		marker := fmt.Sprintf("%d", 100000+os.Getpid())
		wait, signal := running(t, s, "setsid sleep "+marker+" & touch /out/up; trap '' TERM INT HUP; while :; do sleep 0.1; done", "--disk", "2g")
		require.NotZero(t, harness.Count("sleep\x00"+marker))
		signal(syscall.SIGKILL)
		killed := time.Now()
		require.Equal(t, syscall.SIGKILL, wait().Signal)
		for harness.Count("sleep\x00"+marker) > 0 {
			require.Less(t, time.Since(killed), time.Second, "still running")
			time.Sleep(5 * time.Millisecond)
		}
		requireEnding(t, ending{0, "ok", "exit"}, s.Run("--", "true"))
		require.Equal(t, 0, s.Do("gc").Code)
	})
}

func TestTheDefaultEngine(t *testing.T) {
	s := harness.New(t)
	o := s.Run("--", "true")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, harness.Engines[0], o.Report.Engine)
}

func TestReportIsWrittenToStandardErrorsEnd(t *testing.T) {
	s := harness.New(t)
	o := s.Do("run", "--report", "-", "--", "true")
	require.Equal(t, 0, o.Code, "%v", o)
	assert.Contains(t, string(o.Stderr), `"schema_version"`)
	assert.True(t, strings.HasSuffix(strings.TrimSpace(string(o.Stderr)), "}"))
}

func TestNumbersOfTheReport(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		o := s.Run("--", "sh", "-c", "head -c 2000000 /dev/zero > /tmp/x; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
		r := o.Report
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, 1, r.SchemaVersion)
		assert.NotEmpty(t, r.ID)
		assert.Equal(t, "host", r.Base)
		require.NotNil(t, r.CPUUserMS)
		assert.Positive(t, *r.CPUUserMS)
		require.NotNil(t, r.MemoryPeakBytes)
		assert.Greater(t, *r.MemoryPeakBytes, int64(100_000))
		require.NotNil(t, r.WallMS)
		assert.Positive(t, *r.WallMS)
		assert.NotEmpty(t, r.Limits)
		assert.Contains(t, r.PhasesMS, "launch")
		assert.Contains(t, r.PhasesMS, "mount")
		assert.Contains(t, r.PhasesMS, "teardown")
	})
}
