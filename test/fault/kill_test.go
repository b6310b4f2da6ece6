package fault

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
)

// launchTakes is how long a launch of an engine takes, about: moments to kill
// it at are spread over that.
var launchTakes = map[string]time.Duration{direct: 15 * time.Millisecond, "libcontainer": 40 * time.Millisecond}

// seed gives the moments. SBXRUN_TEST_SEED repeats a run of the test, as far as
// time can be repeated.
func seed(t *testing.T) *rand.Rand {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if v := os.Getenv("SBXRUN_TEST_SEED"); v != "" {
		var err error
		n, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("SBXRUN_TEST_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0)) //nolint:gosec // no secret
}

// kill -9 of sbxrun, of its process group or of the sandbox's pid 1 at any
// moment of a launch: the next run works and leaves nothing of them.
func TestKillAtAnyMoment(t *testing.T) {
	for _, victim := range []struct {
		name  string
		times int
		// kill does it. false is that there was nothing to kill.
		kill func(t *testing.T, cmd *exec.Cmd) bool
		// codes are the exit codes that sbxrun may end with; none is by the signal.
		codes []int
	}{
		{"sbxrun", 50, func(t *testing.T, cmd *exec.Cmd) bool {
			require.NoError(t, cmd.Process.Kill())
			return true
		}, nil},
		{"its group", 30, func(t *testing.T, cmd *exec.Cmd) bool {
			require.NoError(t, syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL))
			return true
		}, nil},
		{"pid 1", 30, func(t *testing.T, cmd *exec.Cmd) bool {
			pid := pid1Of(cmd.Process.Pid)
			return pid != 0 && syscall.Kill(pid, syscall.SIGKILL) == nil
		}, []int{125, 137}},
	} {
		t.Run(victim.name, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, s *harness.Sbx) {
				y, random := newYard(t), seed(t)
				tmp := t.TempDir()
				t.Setenv("TMPDIR", tmp)
				before := tree(s.Root)
				killed := 0
				for n := range victim.times {
					args := []string{"run", "--cgroup-parent", y.name}
					if n%2 == 1 {
						args = append(args, "--disk", "1200m") // in an image, on a loop device
					}
					cmd := s.Cmd(append(args, "--", "sleep", "60")...)
					cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
					require.NoError(t, cmd.Start())
					time.Sleep(time.Duration(random.Int64N(int64(launchTakes[s.Engine]))))
					if victim.kill(t, cmd) {
						killed++
					} else {
						require.NoError(t, cmd.Process.Kill()) // there was no pid 1 yet
						s.Wait(cmd)
						continue
					}
					guard := time.AfterFunc(hangGuard, func() { _ = cmd.Process.Kill() })
					o := s.Wait(cmd)
					guard.Stop()
					if victim.codes == nil {
						require.Equal(t, syscall.SIGKILL, o.Signal, "%v", o)
					} else {
						require.Contains(t, victim.codes, o.Code, "%v", o)
					}
					if n%5 == 4 {
						if s.Engine == direct {
							// Nobody has to come for the processes: they hang on the lifeline. An
							// init of libcontainer's that waits for its start has none yet.
							becomesEmpty(t, y.processes)
						}
						o = s.Run("--cgroup-parent", y.name, "--", "true")
						require.Equal(t, 0, o.Code, "%v", o)
						y.nothingLeft(s, tmp, before)
						require.False(t, t.Failed(), "after %d", n)
					}
				}
				assert.NotZero(t, killed)
				t.Logf("%d of %d killed", killed, victim.times)
				o := s.Run("--cgroup-parent", y.name, "--", "true")
				require.Equal(t, 0, o.Code, "%v", o)
				y.nothingLeft(s, tmp, before)
			})
		})
	}
}

// A check that finds nothing must be able to find something; and what a live
// sandbox is from the host's side, with nothing of it taken on trust.
func TestALiveSandboxIsFound(t *testing.T) {
	eachEngine(t, func(t *testing.T, s *harness.Sbx) {
		y := newYard(t)
		before := tree(s.Root)
		st, err := begin(s, "--cgroup-parent", y.name, "--", "sleep", "600")
		require.NoError(t, err)
		found := strings.Join(y.left(s, t.TempDir(), before), "\n")
		all := processes()
		var command process
		for _, p := range all {
			if p.parent == st.pid1 {
				command = p
			}
		}
		status := map[int]string{}
		for _, pid := range []int{st.pid1, command.pid} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			assert.NoError(t, err)
			status[pid] = string(b)
		}
		require.NoError(t, st.cmd.Process.Kill())
		s.Wait(st.cmd)
		becomesEmpty(t, y.processes)
		o := s.Run("--", "true")
		require.Equal(t, 0, o.Code, "%v", o)
		y.nothingLeft(s, t.TempDir(), before)

		assert.Contains(t, found, fmt.Sprintf("pid:%d", st.cmd.Process.Pid))
		assert.Contains(t, found, fmt.Sprintf("pid:%d", st.pid1))
		assert.Contains(t, found, y.dirs[0]+"/")
		assert.Contains(t, found, s.State)
		assert.Equal(t, st.cmd.Process.Pid, all[st.pid1].parent)
		assert.True(t, all[st.pid1].inside)
		for pid, text := range status {
			fields := map[string]string{}
			for line := range strings.Lines(text) {
				k, v, _ := strings.Cut(line, ":")
				fields[k] = strings.TrimSpace(v)
			}
			for _, k := range []string{"Uid", "Gid"} {
				for _, id := range strings.Fields(fields[k]) {
					n, err := strconv.Atoi(id)
					assert.NoError(t, err)
					assert.GreaterOrEqual(t, n, 0x70000000, "%s of process %d: an id of the host's", k, pid)
				}
			}
			assert.Empty(t, fields["Groups"])
			for _, k := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
				assert.Equal(t, "0000000000000000", fields[k], "%s of process %d", k, pid)
			}
			assert.Equal(t, "1", fields["NoNewPrivs"])
		}
		assert.Contains(t, status[command.pid], "Seccomp:\t2\n")
	})
}

// pid1Of finds the pid 1 of the sandbox whose supervisor is pid; 0 is none yet.
func pid1Of(pid int) int {
	all := processes()
	for _, p := range all {
		if !p.inside {
			continue
		}
		for up := p.parent; up > 1; up = all[up].parent {
			if up == pid {
				return p.pid
			}
		}
	}
	return 0
}
