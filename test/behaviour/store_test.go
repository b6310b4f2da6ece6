package behaviour

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// newStore is an installation with an empty store of its own.
func newStore(t *testing.T) *harness.Sbx {
	t.Helper()
	need.Network(t)
	need.Python(t)
	return harness.NewEmpty(t)
}

// do runs a verb that must succeed and gives its output.
func do(t *testing.T, s *harness.Sbx, args ...string) string {
	t.Helper()
	o := s.Do(args...)
	require.Equal(t, 0, o.Code, "%v: %v", args, o)
	return string(o.Stdout)
}

// refused runs a verb that must fail in one line that says what, and a hint.
func refused(t *testing.T, s *harness.Sbx, code int, says, hint string, args ...string) {
	t.Helper()
	o := s.Do(args...)
	require.Equal(t, code, o.Code, "%v: %v", args, o)
	lines := strings.Split(strings.TrimSpace(string(o.Stderr)), "\n")
	var told []string
	for _, l := range lines {
		if !regexp.MustCompile(`^sbxrun: [a-z]+ {2,}`).MatchString(l) {
			told = append(told, l) // else: a phase of the bake
		}
	}
	require.Len(t, told, 2, "%v", o)
	assert.Contains(t, told[0], says)
	assert.Contains(t, told[1], hint)
}

// A packed environment runs as it did, on both engines, and unpacks to the same.
func TestRunOverAnImage(t *testing.T) {
	need.Network(t)
	need.Python(t)
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("needs mkfs.erofs (erofs-utils)")
	}
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		s.Root = filepath.Join(t.TempDir(), "root")
		digest := do(t, s, "env", "build", "--name", "t", "-r", requirements(t, iniconfig231))
		do(t, s, "env", "pack", "t")
		o := s.Run("--with", "t", "--", "python3", "-c", printVersion+"; import iniconfig; print(iniconfig.__file__, iniconfig.__cached__)")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Contains(t, string(o.Stdout), "2.3.1\n/opt/env/")
		assert.Equal(t, strings.TrimSpace(digest), o.Report.Env.Digest)
		assert.Positive(t, o.Report.PhasesMS["mount"])
		o = s.Run("--with", "t", "-u", "0:0", "--", "sh", "-c", "echo x > $(python3 -c 'import iniconfig; print(iniconfig.__file__)')")
		assert.Empty(t, o.Report.Degraded)
		assert.Contains(t, do(t, s, "env", "verify", "t"), ": ok, ")
		assert.Contains(t, do(t, s, "env", "inspect", "t"), "/image.erofs\"")
		do(t, s, "env", "prune")
		do(t, s, "env", "pack", "--undo", "t")
		assert.Contains(t, do(t, s, "env", "verify", "t"), ": ok, ")
		requireEnding(t, ending{0, "ok", "exit"}, s.Run("--with", "t", "--", "python3", "-c", printVersion))
	})
}

// What a sandbox runs on stays until it ends.
func TestPruneLeavesWhatASandboxUses(t *testing.T) {
	s := newStore(t)
	do(t, s, "env", "build", "--name", "t", "-r", requirements(t, iniconfig231))
	ready := filepath.Join(t.TempDir(), "ready")
	require.NoError(t, os.Mkdir(ready, 0o777))
	require.NoError(t, os.Chmod(ready, 0o777))
	live := s.Cmd("run", "--with", "t", "-v", ready+":/ready", "--", "sh", "-c", `touch /ready/1; sleep 2; python3 -c "$1"`, "sh", printVersion)
	var out strings.Builder
	live.Stdout = &out
	require.NoError(t, live.Start())
	require.Eventually(t, func() bool { _, err := os.Stat(ready + "/1"); return err == nil }, 10*time.Second, 10*time.Millisecond)
	o := s.Do("env", "prune", "--all")
	require.Equal(t, 0, o.Code, "%v", o)
	assert.Contains(t, string(o.Stderr), "a live sandbox uses it")
	refused(t, s, 1, "a live sandbox uses it", "wait", "env", "rm", "t")
	require.Equal(t, 0, s.Wait(live).Code)
	assert.Equal(t, "2.3.1\n", out.String())
	assert.Contains(t, do(t, s, "env", "prune", "--all"), "1 environments removed")
	refused(t, s, 1, "not found", "env list", "env", "inspect", "t")
}

// Runs, bakes, prunes and removals in loops: each run works or says in one line
// why not, and what is left in the end is whole.
func TestRunsBakesAndPrunesBesideEachOther(t *testing.T) {
	s := newStore(t)
	files := []string{requirements(t, iniconfig231), requirements(t, iniconfig210)}
	versions := []string{"2.3.1\n", "2.1.0\n"}
	gone := regexp.MustCompile(`sbxrun: (use environment|use base|open layer|hold layer|environment|bake|name environment).*(no such file|not found|is gone|removed meanwhile)`)
	end := time.Now().Add(8 * time.Second)
	var wg sync.WaitGroup
	var mu sync.Mutex
	count := map[string]int{}
	for i := range 3 {
		wg.Go(func() {
			for n := i; time.Now().Before(end); n++ {
				o := s.Do("run", "-r", files[n%2], "--", "python3", "-c", printVersion)
				mu.Lock()
				switch {
				case o.Code == 0:
					count["ran"]++
					assert.Equal(t, versions[n%2], string(o.Stdout))
				case o.Code == 125 && gone.Match(o.Stderr):
					count["gone"]++
				default:
					t.Errorf("%v", o)
				}
				mu.Unlock()
			}
		})
	}
	for range 2 {
		wg.Go(func() {
			for time.Now().Before(end) {
				o := s.Do("env", "prune")
				mu.Lock()
				count["pruned"]++
				assert.Equal(t, 0, o.Code, "%v", o)
				mu.Unlock()
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	t.Log(count)
	assert.Positive(t, count["ran"])
	o := s.Do("env", "verify")
	assert.Equal(t, 0, o.Code, "%v", o)
	do(t, s, "env", "prune", "--all")
	left, err := os.ReadDir(filepath.Join(s.Root, "tmp"))
	require.NoError(t, err)
	assert.Empty(t, left)
}

// A prune that is killed leaves whole environments, and the next one finishes.
func TestKilledPrune(t *testing.T) {
	s := newStore(t)
	file := requirements(t, iniconfig231)
	for _, after := range []time.Duration{0, 1, 2, 3, 4, 6, 8, 12} {
		do(t, s, "env", "build", "--name", "t", "-r", file)
		cmd := s.Cmd("env", "prune", "--all")
		require.NoError(t, cmd.Start())
		time.Sleep(after * time.Millisecond)
		_ = cmd.Process.Kill()
		s.Wait(cmd)
		o := s.Do("run", "--with", "t", "--", "python3", "-c", printVersion)
		if o.Code != 0 { // gone as a whole
			assert.Equal(t, 125, o.Code, "%v", o)
			assert.Regexp(t, "not found|is gone", string(o.Stderr))
		}
		o = s.Do("env", "verify")
		assert.Equal(t, 0, o.Code, "%v", o)
		do(t, s, "env", "prune", "--all")
		assert.NotContains(t, do(t, s, "env", "list"), " t ")
		for _, dir := range []string{"tmp", "envs/names"} {
			left, err := os.ReadDir(filepath.Join(s.Root, dir))
			require.NoError(t, err)
			assert.Empty(t, left, "%s after %d ms", dir, after)
		}
	}
}

// inMounts makes every command of s run behind mounts that a script makes, in a
// mount namespace of its own.
func inMounts(s *harness.Sbx, script string) {
	s.Prefix = []string{"unshare", "--mount", "--propagation", "private", "sh", "-ec", script + `; exec "$@"`, "sh"}
}

// A store that was filled elsewhere and is mounted read-only runs what is in it.
func TestReadOnlyStore(t *testing.T) {
	s := newStore(t)
	file := requirements(t, iniconfig231)
	do(t, s, "env", "build", "--name", "t", "-r", file)
	rw, ro := s.Root, filepath.Join(t.TempDir(), "ro")
	require.NoError(t, os.Mkdir(ro, 0o700))
	// As if from another host: the base's skeleton of this one is not in it.
	require.NoError(t, os.Remove(filepath.Join(rw, "bases/host.json")))
	s.Root = ro
	inMounts(s, fmt.Sprintf("mount --bind '%s' '%s'; mount -o remount,ro,bind '%s'", rw, ro, ro))
	for _, args := range [][]string{{"--with", "t"}, {"-r", file}} {
		o := s.Run(append(args, "--", "python3", "-c", printVersion)...)
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, "2.3.1\n", string(o.Stdout))
	}
	assert.Contains(t, do(t, s, "env", "list", "--size"), " t ")
	assert.Contains(t, do(t, s, "env", "df"), "environments")
	do(t, s, "env", "verify", "t")
	refused(t, s, 125, "read-only", "--with NAME", "run", "-q", "-r", requirements(t, iniconfig210), "--", "true")
	refused(t, s, 1, "read-only", "--with NAME", "env", "build", "-r", requirements(t, "iniconfig\n"))
	refused(t, s, 1, "read-only", "writable", "env", "rm", "t")
	refused(t, s, 1, "read-only", "writable", "env", "prune", "--all")
	refused(t, s, 1, "read-only", "writable", "base", "rm", "x")
	require.NoError(t, os.RemoveAll(filepath.Join(s.State, "spare")))
}

// A bake that fills the disk says so, leaves nothing, and the next one works when
// there is room again.
func TestFullStore(t *testing.T) {
	s := newStore(t)
	img := filepath.Join(t.TempDir(), "img")
	f, err := os.Create(img)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(112<<20))
	require.NoError(t, f.Close())
	out, err := exec.Command("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", img).CombinedOutput()
	require.NoError(t, err, "%s", out)
	disk := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.Mkdir(disk, 0o755))
	s.Root = filepath.Join(disk, "root")
	inMounts(s, fmt.Sprintf("mount -o loop '%s' '%s'", img, disk))
	do(t, s, "env", "build", "--name", "small", "-r", requirements(t, iniconfig231))
	big := requirements(t, "numpy==2.1.1\npandas==2.2.3\n")
	refused(t, s, 1, "no space left", "env prune", "env", "build", "-q", "--name", "big", "-r", big)
	assert.NotContains(t, do(t, s, "env", "list"), "big")
	o := s.Run("--with", "small", "--", "python3", "-c", printVersion)
	requireEnding(t, ending{0, "ok", "exit"}, o)

	var u struct {
		Rows []struct {
			Kind      string
			Count     int
			SizeBytes int64 `json:"size_bytes"`
		}
	}
	require.NoError(t, json.Unmarshal([]byte(do(t, s, "env", "df", "--json")), &u))
	for _, r := range u.Rows {
		if r.Kind == "unfinished" {
			assert.Zero(t, r.Count, "%v", u)
		}
	}
	do(t, s, "env", "prune", "--all")
	do(t, s, "env", "build", "--name", "other", "-r", requirements(t, iniconfig210))
	assert.Contains(t, do(t, s, "env", "verify", "other"), ": ok, ")
}
