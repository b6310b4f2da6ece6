package systemd_test

import (
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
)

// said is what the two say of an end: systemd to ExecStopPost= and in `show`,
// sbxrun in its report ("" is none).
type said struct{ systemd, active, report string }

// ends is a service that tells how it ended: RESULT CODE STATUS of systemd's.
type ends struct{ unit, file, report string }

// service starts `sbxrun run --report … args…` as a unit with flags of systemd-run's.
func service(t *testing.T, s *harness.Sbx, flags, args []string) (e ends, err error) {
	t.Helper()
	dir := t.TempDir()
	e = ends{"", filepath.Join(dir, "said"), s.ReportFile()}
	told := filepath.Join(dir, "told")
	// Written under another name: it is whole when it is seen.
	require.NoError(t, os.WriteFile(told, fmt.Appendf(nil,
		"#!/bin/sh\necho $SERVICE_RESULT $EXIT_CODE $EXIT_STATUS >%[1]s.new && mv %[1]s.new %[1]s\n", e.file), 0o755)) //nolint:gosec // a program
	flags = append(flags, "--property=ExecStopPost="+told)
	e.unit, err = start(t, s, flags, append([]string{s.Bin, "run", "--report", e.report}, args...)...)
	return e, err
}

// start runs a command as a unit.
func start(t *testing.T, s *harness.Sbx, flags []string, command ...string) (unit string, err error) {
	t.Helper()
	unit = "sbxrun-test-" + strings.NewReplacer("/", "-", "_", "-").Replace(strings.ToLower(t.Name()))
	t.Cleanup(func() {
		for _, u := range []string{unit + ".timer", unit + ".socket", unit + ".service"} {
			ctl("stop", u)
			ctl("reset-failed", u)
		}
	})
	args := append([]string{"--quiet", "--unit", unit, "--setenv=SBXRUN_ROOT=" + s.Root, "--setenv=SBXRUN_STATE=" + s.State}, flags...)
	out, err := exec.Command("systemd-run", append(append(args, "--"), command...)...).CombinedOutput()
	if err != nil {
		t.Logf("systemd-run: %s", out)
	}
	return unit + ".service", err
}

// said waits for the end.
func (e ends) said(t *testing.T, s *harness.Sbx) said {
	t.Helper()
	var got said
	eventually(t, "it ends: "+e.unit, func() bool {
		b, err := os.ReadFile(e.file)
		got.systemd, got.active = strings.TrimSpace(string(b)), show(e.unit, "ActiveState")
		return err == nil && (got.active == "failed" || got.active == "inactive")
	})
	if r := s.ReadReport(e.report); r != nil {
		got.report = fmt.Sprint(r.Status, " ", r.Reason, " ", r.ExitCode)
	}
	return got
}

// remains lists what sandboxes of any installation have on this machine.
func remains(s *harness.Sbx) map[string]bool {
	found := map[string]bool{}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(p, "sbxrun") && !strings.HasSuffix(p, "/sbxrun") && !strings.HasSuffix(p, ".slice") {
			found["cgroup "+p] = true
		}
		return nil
	})
	mounts, _ := os.ReadFile("/proc/1/mountinfo")
	for _, l := range strings.Split(string(mounts), "\n") {
		if strings.Contains(l, "sbxrun") {
			found["mount "+l] = true
		}
	}
	for _, dir := range []string{"/run/sbxrun", s.State, filepath.Join(s.Root, "tmp"), filepath.Join(s.Root, "scratch"), "/run/credentials"} {
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && (!d.IsDir() || strings.Contains(p, "sbxrun-test")) {
				found["file "+p] = true
			}
			return nil
		})
	}
	for _, l := range strings.Split(ctl("list-units", "--all", "--plain", "--no-legend", "sbxrun*.scope"), "\n") {
		found["scope "+l] = true
	}
	return found
}

// fresh lists what was not there before.
func fresh(s *harness.Sbx, before map[string]bool) []string {
	found := s.Leaks()
	for what := range remains(s) {
		if !before[what] {
			found = append(found, what)
		}
	}
	return found
}

func nothingLeft(t *testing.T, s *harness.Sbx, before map[string]bool) {
	t.Helper()
	found := fresh(s, before)
	for end := time.Now().Add(harness.LeakGrace); len(found) > 0 && time.Now().Before(end); found = fresh(s, before) {
		time.Sleep(50 * time.Millisecond)
	}
	assert.Empty(t, found, "left behind")
}

// TestSystemdAndTheReportAgree: how a service ends is told by systemd and by the
// report as docs/services.md has it, and nothing is left of it.
func TestSystemdAndTheReportAgree(t *testing.T) {
	property := func(ps ...string) (flags []string) {
		for _, p := range ps {
			flags = append(flags, "--property="+p)
		}
		return flags
	}
	hog := []string{"-m", "24m", "--", "python3", "-c", "x = bytearray(200 << 20)"}
	oom := func(ps ...string) []string { return property(append(ps, "Type=notify")...) }
	secret := filepath.Join(t.TempDir(), "pw")
	require.NoError(t, os.WriteFile(secret, []byte("hunter2"), 0o600))
	forever := []string{"--", "sleep", "1000"}
	main := func(signal string) func(*testing.T, ends) {
		return func(t *testing.T, e ends) { require.Empty(t, ctl("kill", "-s", signal, "--kill-whom=main", e.unit)) }
	}
	stop := func(_ *testing.T, e ends) { ctl("stop", e.unit) }

	for _, c := range []struct {
		name        string
		flags, args []string
		act         func(*testing.T, ends) // once it is ready
		want        said
	}{
		{"oom", oom(), hog, nil, said{"exit-code exited 137", "failed", "killed oom 137"}},
		{"oom delegated", oom("Delegate=yes"), hog, nil, said{"exit-code exited 137", "failed", "killed oom 137"}},
		{"oom OOMPolicy stop", oom("Delegate=yes", "OOMPolicy=stop"), hog, nil, said{"oom-kill exited 137", "failed", "killed oom 137"}},
		{"oom OOMPolicy kill", oom("Delegate=yes", "OOMPolicy=kill"), hog, nil, said{"oom-kill killed KILL", "failed", ""}},
		{"timeout", oom(), []string{"--timeout", "2s", "--", "sleep", "1000"}, nil, said{"exit-code exited 124", "failed", "killed wall_timeout 124"}},
		{"stopped", oom("KillMode=mixed", "SuccessExitStatus=143"), forever, stop, said{"success exited 143", "inactive", "canceled canceled 143"}},
		{"stopped without SuccessExitStatus", oom("Delegate=yes"), forever, stop, said{"exit-code exited 143", "failed", "canceled canceled 143"}},
		{
			"deaf to TERM", oom("KillMode=mixed", "TimeoutStopSec=15"),
			[]string{"--stop-timeout", "1s", "--", "sh", "-c", `trap "" TERM; while :; do sleep 1; done`},
			stop,
			said{"exit-code exited 137", "failed", "canceled canceled 137"},
		},
		{
			"deaf for longer than systemd waits", oom("KillMode=mixed", "TimeoutStopSec=2"),
			[]string{"--stop-timeout", "1m", "--", "sh", "-c", `trap "" TERM; while :; do sleep 1; done`},
			stop,
			said{"timeout killed KILL", "failed", ""},
		},
		{
			"socket",
			[]string{"--socket-property=ListenStream=/run/sbxrun-test-show.sock"},
			[]string{"--", "python3", "-c", "import socket; c = socket.socket(fileno=3).accept()[0]; c.sendall(b'served'); c.close()"},
			func(t *testing.T, _ ends) {
				c, err := net.Dial("unix", "/run/sbxrun-test-show.sock")
				require.NoError(t, err)
				defer c.Close()
				b, err := io.ReadAll(c)
				require.NoError(t, err)
				require.Equal(t, "served", string(b))
			},
			said{"success exited 0", "inactive", "ok exit 0"},
		},
		{
			"credentials", oom("LoadCredential=pw:" + secret),
			[]string{"--credential", "pw", "--", "sh", "-c", `[ "$(cat $CREDENTIALS_DIRECTORY/pw)" = hunter2 ] && exit 3`},
			nil,
			said{"exit-code exited 3", "failed", "failed exit 3"},
		},
		{
			"watchdog of a command that hangs", oom("WatchdogSec=2", "TimeoutAbortSec=15"),
			[]string{"--sdnotify", "container", "--", "python3", "-c", "import os, socket, time; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); time.sleep(1000)"},
			nil,
			said{"watchdog exited 134", "failed", "canceled canceled 134"},
		},
		{"watchdog of a supervisor that hangs", oom("WatchdogSec=2", "TimeoutAbortSec=2"), forever, main("STOP"), said{"watchdog exited 134", "failed", "canceled canceled 134"}},
		{"timer", []string{"--on-active=1", "--timer-property=AccuracySec=1ms"}, []string{"--", "sh", "-c", "exit 4"}, nil, said{"exit-code exited 4", "failed", "failed exit 4"}},
		{"supervisor killed", oom(), forever, main("KILL"), said{"signal killed KILL", "failed", ""}},
		{"supervisor killed, delegated", oom("Delegate=yes"), forever, main("KILL"), said{"signal killed KILL", "failed", ""}},
		{"supervisor killed, scope", oom(), append([]string{"--cgroup-manager", "systemd"}, forever...), main("KILL"), said{"signal killed KILL", "failed", ""}},
	} {
		t.Run(strings.ReplaceAll(c.name, ",", ""), func(t *testing.T) {
			s := sbx(t)
			require.Zero(t, s.Do("run", "--", "true").Code) // what is made once is there
			before := remains(s)
			e, err := service(t, s, c.flags, c.args)
			require.NoError(t, err)
			if c.act != nil {
				c.act(t, e)
			}
			got := e.said(t, s)
			t.Logf("%s; status %q", got, show(e.unit, "StatusText"))
			if c.name == "oom OOMPolicy stop" && got == (said{"oom-kill killed KILL", "failed", ""}) {
				// systemd that hears of a second kill while it stops the unit waits
				// for nobody: docs/services.md says so too.
				c.want = got
			}
			assert.Equal(t, c.want, got, logged(e.unit))
			if got.active == "failed" { // systemd has not forgotten it
				f := strings.Fields(got.systemd)
				assert.Equal(t, f[0], show(e.unit, "Result"))
				code := map[string]string{"exited": "1", "killed": "2"}[f[1]]
				assert.Equal(t, code, show(e.unit, "ExecMainCode"))
				if code == "1" {
					assert.Equal(t, f[2], show(e.unit, "ExecMainStatus"))
				}
				if r := s.ReadReport(e.report); r != nil && show(e.unit, "Type") == "notify" {
					text := show(e.unit, "StatusText")
					assert.Contains(t, text, "sandbox "+r.ID+": ")
					assert.Contains(t, text, r.Message)
				}
			}
			if got.report == "" { // who could have cleaned up was killed: gc does, or the next run
				assert.NotEmpty(t, fresh(s, before))
				heal := []string{"gc"}
				if strings.Contains(c.name, "delegated") {
					heal = []string{"run", "--", "true"}
				}
				o := s.Do(heal...)
				assert.Zero(t, o.Code, "%v", o)
			}
			ctl("stop", strings.TrimSuffix(e.unit, ".service")+".socket")
			nothingLeft(t, s, before)
		})
	}
}

// TestTenSandboxesInOneUnit lie below the unit's cgroup and in its account. One
// that hogs meets its own limit, or the unit's where that is lower.
func TestTenSandboxesInOneUnit(t *testing.T) {
	for _, c := range []struct{ name, max, limit, message string }{
		{"its own limit", "600M", "24m", "at the limit of 25165824 bytes"},
		{"the limit of the unit", "360M", "800m", "a cgroup above"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := sbx(t)
			require.Zero(t, s.Do("run", "--", "true").Code)
			before := remains(s)
			dir := t.TempDir()
			require.NoError(t, os.Chmod(dir, 0o755)) //nolint:gosec // the sandboxes look into it
			// Nine hold 10 MiB each until they may go; the hog starts when it is told to.
			script := `for i in 1 2 3 4 5 6 7 8 9; do
	"$1" run --report "$2/$i" -m 40m --disk 20m -v "$2:/out:ro" -- sh -c 'head -c 10M /dev/zero >/tmp/x; until [ -e /out/go ]; do sleep 0.2; done' &
done
"$1" run --report "$2/hog" -m "$3" --disk 10m -v "$2:/out:ro" -- python3 -c 'import os, time
while not os.path.exists("/out/hog"): time.sleep(0.1)
x = bytearray(500 << 20)'
touch "$2/hogged"; wait`
			unit, err := start(t, s, []string{"--property=Delegate=yes", "--property=MemoryMax=" + c.max, "--property=MemorySwapMax=0"}, "sh", "-c", script, "sh", s.Bin, dir, c.limit)
			require.NoError(t, err)
			group := "/sys/fs/cgroup" + show(unit, "ControlGroup")
			inside := func() int {
				n := 0
				m, _ := filepath.Glob(group + "/sbxrun/*/cgroup.procs")
				for _, f := range m {
					if b, _ := os.ReadFile(f); len(b) > 0 {
						n++
					}
				}
				return n
			}
			current := func() (n int64) { _, _ = fmt.Sscan(show(unit, "MemoryCurrent"), &n); return n }
			eventually(t, "ten run, and the unit's account has them", func() bool { return inside() == 10 && current() > 90<<20 })
			for what := range remains(s) {
				if strings.HasPrefix(what, "cgroup ") && !before[what] {
					assert.True(t, strings.HasPrefix(what, "cgroup "+group), what)
				}
			}
			require.NoError(t, os.WriteFile(filepath.Join(dir, "hog"), nil, 0o600))
			eventually(t, "the hog is killed", func() bool { _, err := os.Stat(filepath.Join(dir, "hogged")); return err == nil })
			r := s.ReadReport(filepath.Join(dir, "hog"))
			require.NotNil(t, r)
			assert.Equal(t, "killed oom 137", fmt.Sprint(r.Status, " ", r.Reason, " ", r.ExitCode))
			assert.Contains(t, r.Message, c.message)
			assert.Equal(t, 9, inside(), "the others go on")
			require.NoError(t, os.WriteFile(filepath.Join(dir, "go"), nil, 0o600))
			eventually(t, "the unit ends", func() bool { return show(unit, "ActiveState") == "inactive" })
			for i := 1; i <= 9; i++ {
				r := s.ReadReport(filepath.Join(dir, fmt.Sprint(i)))
				require.NotNil(t, r)
				assert.Equal(t, "ok", r.Status, r.Message)
			}
			assert.NoDirExists(t, group)
			nothingLeft(t, s, before)
		})
	}
}
