package behaviour

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// kill -9 at any moment of a launch leaves nothing that the next run and gc do
// not heal; the harness looks afterwards.
func TestKillAtAnyMomentOfALaunch(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		requireEnding(t, ending{0, "ok", "exit"}, s.Run("--", "true")) // the base is made
		before := harness.Groups()
		for _, after := range []time.Duration{0, 2, 4, 7, 10, 14, 18, 23, 28, 34, 40, 50, 70} {
			cmd := s.Cmd("run", "--disk", "1200m", "--", "sleep", "60")
			require.NoError(t, cmd.Start())
			time.Sleep(after * time.Millisecond)
			require.NoError(t, cmd.Process.Kill())
			s.Wait(cmd)
		}
		o := s.Do("gc")
		require.Equal(t, 0, o.Code, "%v", o)
		// A killed run has no report that names it, so look at all: what is there now
		// and not ours belongs to tests of other packages, and ends with them.
		left := harness.Groups()
		require.Eventually(t, func() bool {
			left = slices.DeleteFunc(left, func(g string) bool {
				_, err := os.Stat(g)
				return err != nil || slices.Contains(before, g)
			})
			return len(left) == 0
		}, 20*time.Second, 50*time.Millisecond, "%v", &left)
		requireEnding(t, ending{0, "ok", "exit"}, s.Run("--", "true"))
	})
}

// A bake that is killed leaves no environment behind, and the next try heals.
func TestKilledBakeLeavesNoEnvironment(t *testing.T) {
	need.Network(t)
	need.Python(t)
	s := harness.NewEmpty(t)
	file := requirements(t, iniconfig231)
	for _, after := range []time.Duration{30, 200, 500, 900} {
		cmd := s.Cmd("env", "build", "--name", "t", "-r", file)
		require.NoError(t, cmd.Start())
		time.Sleep(after * time.Millisecond)
		_ = cmd.Process.Kill()
		if o := s.Wait(cmd); o.Signal == 0 {
			break // it was faster than we
		}
		o := s.Do("env", "inspect", "t")
		require.Equal(t, 1, o.Code, "%v", o)
	}
	o := s.Do("env", "build", "--name", "t", "-r", file)
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "verify", "t")
	require.Equal(t, 0, o.Code, "%v", o)
}

// Two bakes of the same environment at once do the work once, and both succeed.
func TestTwoBakesAtOnce(t *testing.T) {
	need.Network(t)
	need.Python(t)
	s := harness.NewEmpty(t)
	file := requirements(t, iniconfig231)
	var cmds []*exec.Cmd
	var reports []string
	said := make([]bytes.Buffer, 2)
	for i := range said {
		reports = append(reports, s.ReportFile())
		cmd := s.Cmd("run", "--report", reports[i], "-r", file, "--", "python3", "-c", printVersion)
		cmd.Stderr = &said[i]
		require.NoError(t, cmd.Start())
		cmds = append(cmds, cmd)
	}
	digests := map[string]bool{}
	installs := 0
	for i, cmd := range cmds {
		require.Equal(t, 0, s.Wait(cmd).Code, "%s", said[i].String())
		r := s.ReadReport(reports[i])
		require.NotNil(t, r)
		require.NotNil(t, r.Env)
		digests[r.Env.Digest] = true
		installs += strings.Count(said[i].String(), "sbxrun: publish")
	}
	assert.Len(t, digests, 1)
	assert.Equal(t, 1, installs, "published once: %s\n%s", said[0].String(), said[1].String())
}

func TestNotRootIsOneClearLine(t *testing.T) {
	s := harness.New(t)
	cmd := s.Cmd("run", "--", "true")
	// The project's folder may be closed to others: run a copy.
	dir, err := os.MkdirTemp("", "sbxrun-copy-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	b, err := os.ReadFile(s.Bin)
	require.NoError(t, err)
	cmd.Path = filepath.Join(dir, "sbxrun")
	require.NoError(t, os.WriteFile(cmd.Path, b, 0o755)) //nolint:gosec // others must run it
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var text strings.Builder
	cmd.Stderr = &text
	require.NoError(t, cmd.Start())
	o := s.Wait(cmd)
	assert.Equal(t, 125, o.Code)
	assert.Contains(t, text.String(), "root")
	assert.LessOrEqual(t, strings.Count(text.String(), "\n"), 2, "%s", text.String())
}

func TestStateThatCannotBeWritten(t *testing.T) {
	s := harness.New(t)
	s.State = "/proc/self/nowhere"
	o := s.Run("--", "true")
	requireEnding(t, ending{125, "setup-failed", "internal"}, o)
	assert.Contains(t, string(o.Stderr), "/proc/self/nowhere")
	assert.NotEmpty(t, o.Report.Hint)
}

// One argument may be as long as the kernel takes, and one longer is a clear error.
func TestLongArguments(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		long := strings.Repeat("a", 100_000)
		o := s.Run("--", "sh", "-c", `echo ${#1} ${#2} ${#3} ${#4} ${#5} ${#6} ${#7} ${#8} ${#9} ${#10}`, "sh", long, long, long, long, long, long, long, long, long, long)
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, strings.TrimSpace(strings.Repeat("100000 ", 10))+"\n", string(o.Stdout))
	})
}
