package envs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

// script is a Runner that does to the job's directory what the tool would. A
// wheel is one module, one program and a RECORD; "clash" and "crash" own the
// same file.
type script struct {
	mu    sync.Mutex
	ran   []string
	lock  string            // what resolving gives
	fails map[string]string // step: what the tool prints before exit status 1
	kill  string            // step that never comes back whole: the sandbox fails half-way
}

func (s *script) steps() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ran)
}

func (s *script) Run(_ context.Context, j Job) (JobResult, error) {
	opt := j.Binds[0].Source
	env := filepath.Join(opt, "env")
	site := filepath.Join(env, "lib/python3.11/site-packages")
	cmd := strings.Join(j.Argv, " ")
	write := func(p, text string, mode os.FileMode) error {
		return errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), mode))
	}
	step, detail := "hook", ""
	var do func() error
	switch {
	case strings.Contains(cmd, " pip compile "):
		step, do = "resolve", func() error { return write(filepath.Join(opt, "lock.txt"), s.lock, 0o644) }
	case strings.Contains(cmd, " venv "):
		step, do = "venv", func() error {
			return errors.Join(write(filepath.Join(env, "pyvenv.cfg"), "home = /usr/bin\n", 0o644), write(filepath.Join(env, ".lock"), fmt.Sprint(time.Now()), 0o644),
				os.MkdirAll(filepath.Join(env, "bin"), 0o755), os.Symlink("/usr/bin/python3", filepath.Join(env, "bin/python")), os.MkdirAll(site, 0o755))
		}
	case strings.Contains(cmd, " pip sync "):
		in, err := readInput(filepath.Join(opt, "requirements.txt"))
		if err != nil {
			return JobResult{}, err
		}
		for _, q := range in.reqs {
			detail += " " + q.name + "==" + q.version
		}
		step, do = "sync", func() error {
			for _, q := range in.reqs {
				info := fmt.Sprintf("%s-%s.dist-info", q.name, q.version)
				rec := fmt.Sprintf("%[1]s.py,,\n../../../bin/%[1]s,,\n%[2]s/METADATA,,\n%[2]s/RECORD,,\n", q.name, info)
				if q.name == "clash" || q.name == "crash" {
					rec += "shared.py,,\n"
					if err := write(filepath.Join(site, "shared.py"), q.name, 0o644); err != nil {
						return err
					}
				}
				if err := errors.Join(write(filepath.Join(site, q.name+".py"), "V = '"+q.version+"'\n", 0o644), write(filepath.Join(env, "bin", q.name), "#!/opt/env/bin/python\n", 0o755),
					write(filepath.Join(site, info, "METADATA"), "Name: "+q.name+"\n", 0o644), write(filepath.Join(site, info, "RECORD"), rec, 0o644)); err != nil {
					return err
				}
			}
			return nil
		}
	case strings.Contains(cmd, compileScript):
		step, do = "compile", func() error {
			py, err := filepath.Glob(filepath.Join(site, "*.py"))
			for _, p := range py {
				err = errors.Join(err, write(filepath.Join(site, "__pycache__", strings.TrimSuffix(filepath.Base(p), ".py")+".cpython-311.pyc"), "code of "+filepath.Base(p), 0o644))
			}
			return err
		}
	default:
		do = func() error { return write(filepath.Join(env, "hooked"), cmd, 0o644) }
	}
	s.mu.Lock()
	s.ran = append(s.ran, step+detail)
	s.mu.Unlock()
	if text, ok := s.fails[step]; ok {
		fmt.Fprint(j.Stderr, text)
		return JobResult{ExitCode: 2, Reason: "exit"}, nil
	}
	if err := do(); err != nil {
		return JobResult{}, err
	}
	if s.kill == step {
		return JobResult{}, errors.New("the sandbox is gone")
	}
	return JobResult{Reason: "exit"}, nil
}

func testManager(t testing.TB, s *script) (*Manager, rootfs.Base) {
	t.Helper()
	store, err := rootfs.OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	fake := filepath.Join(t.TempDir(), "uv")
	require.NoError(t, os.WriteFile(fake, nil, 0o755))
	b, err := json.Marshal(tool{Kind: "uv", Version: "1.2.3", Path: fake, IndexURL: "https://index.test/simple", FileHost: "files.test"})
	require.NoError(t, err)
	require.NoError(t, store.WriteFile(store.Path("tools", "tool.json"), b))
	return Open(store, Options{Runner: s}), testBase(t)
}

// testBase is a base with an interpreter that is the same file in every test.
func testBase(t testing.TB) rootfs.Base {
	t.Helper()
	dir := t.TempDir()
	py := filepath.Join(dir, "usr/bin/python3.11")
	require.NoError(t, os.MkdirAll(filepath.Dir(py), 0o755))
	require.NoError(t, os.WriteFile(py, []byte("interpreter"), 0o755))
	require.NoError(t, os.Chtimes(py, time.Unix(1e9, 0), time.Unix(1e9, 0)))
	require.NoError(t, os.Symlink("python3.11", filepath.Join(dir, "usr/bin/python3")))
	return rootfs.Base{Name: "test", Digest: "sha256:00", Lowers: []string{dir}}
}

func pin(name, version string) string {
	h := sha256.Sum256([]byte(name + version))
	return fmt.Sprintf("%s==%s \\\n    --hash=sha256:%s\n", name, version, hex.EncodeToString(h[:]))
}

func writeInput(t testing.TB, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "requirements.txt")
	require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	return p
}

func requireHint(t testing.TB, err error, text, hint string) {
	t.Helper()
	require.ErrorContains(t, err, text)
	var h interface{ Hint() string }
	require.ErrorAs(t, err, &h)
	require.Contains(t, h.Hint(), hint)
	require.NotContains(t, err.Error(), "\n", "one line")
}

func TestASecondEnsureRunsNothing(t *testing.T) {
	s := &script{lock: pin("six", "1.0")}
	m, base := testManager(t, s)
	r := Recipe{File: writeInput(t, "six\n"), Base: base, Name: "mine"}
	e, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, []string{"resolve", "venv", "sync six==1.0", "compile"}, s.steps())
	require.Equal(t, []Package{{"six", "1.0"}}, e.Packages)
	require.NoFileExists(t, filepath.Join(e.Path, "opt/env/.lock"))
	require.FileExists(t, filepath.Join(e.Path, "opt/env/lib/python3.11/site-packages/__pycache__/six.cpython-311.pyc"))

	again, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Len(t, s.steps(), 4)
	require.Equal(t, e.Key, again.Key)
	found, err := m.Find(r)
	require.NoError(t, err)
	require.Equal(t, e.Digest, found.Digest)
	for _, ref := range []string{"mine", e.Key[:8], e.Digest, e.Digest[7:19]} {
		got, err := m.Get(ref)
		require.NoError(t, err, ref)
		require.Equal(t, e.Key, got.Key, ref)
	}

	r.Refresh = true
	s.lock = pin("six", "2.0")
	newer, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.NotEqual(t, e.Key, newer.Key)
}

func TestAChangedPinInstallsThatWheelOnly(t *testing.T) {
	s := &script{}
	m, base := testManager(t, s)
	r := Recipe{File: writeInput(t, pin("six", "1.0")+pin("idna", "3.0")), Base: base}
	_, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	before := len(s.steps())
	r.File = writeInput(t, pin("six", "1.1")+pin("idna", "3.0"))
	part, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, []string{"venv", "sync six==1.1", "compile"}, s.steps()[before:])

	// Known wheels in a new mixture: nothing runs, and what comes out is what
	// an install of all in one go gives.
	before = len(s.steps())
	r.File = writeInput(t, pin("six", "1.1"))
	_, _, err = m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Len(t, s.steps(), before)
	other, _ := testManager(t, s)
	r.File = writeInput(t, pin("six", "1.1")+pin("idna", "3.0"))
	whole, _, err := other.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, whole.Digest, part.Digest)
	require.Equal(t, whole.Key, part.Key)
}

func TestWheelsThatClashAreInstalledInOneGo(t *testing.T) {
	s := &script{}
	m, base := testManager(t, s)
	_, _, err := m.Ensure(t.Context(), Recipe{File: writeInput(t, pin("clash", "1")+pin("crash", "1")), Base: base})
	require.NoError(t, err)
	sync := 0
	for _, x := range s.steps() {
		if x == "sync clash==1 crash==1" {
			sync++
		}
	}
	require.Equal(t, 2, sync, "once to split, once whole: %v", s.steps())
}

func TestTwoBakesDoTheWorkOnce(t *testing.T) {
	s := &script{lock: pin("six", "1.0")}
	m, base := testManager(t, s)
	r := Recipe{File: writeInput(t, "six"), Base: base}
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		wg.Go(func() { _, _, errs[i] = m.Ensure(t.Context(), r) })
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	require.Len(t, s.steps(), 4, "%v", s.steps())
}

func TestAFailedBakeLeavesNothingAndHeals(t *testing.T) {
	for _, step := range []string{"venv", "sync", "compile", "hook"} {
		t.Run(step, func(t *testing.T) {
			s := &script{kill: step}
			m, base := testManager(t, s)
			r := Recipe{File: writeInput(t, pin("six", "1.0")), Base: base, Hooks: []string{"true"}, Name: "n"}
			_, _, err := m.Ensure(t.Context(), r)
			require.ErrorContains(t, err, "the sandbox is gone")
			all, err := m.List()
			require.NoError(t, err)
			require.Empty(t, all)
			left, err := os.ReadDir(m.store.Path("tmp"))
			require.NoError(t, err)
			require.Empty(t, left)
			s.kill = ""
			e, _, err := m.Ensure(t.Context(), r)
			require.NoError(t, err)
			require.FileExists(t, filepath.Join(e.Path, "opt/env/hooked"))
		})
	}
}

func TestVerifyRemoveAndPrune(t *testing.T) {
	s := &script{}
	m, base := testManager(t, s)
	r := Recipe{File: writeInput(t, pin("six", "1.0")), Base: base, Name: "kept"}
	e, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	_, damage, err := m.Verify(t.Context(), "kept")
	require.NoError(t, err)
	require.Empty(t, damage)
	pruned, err := m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Empty(t, pruned.Removed, "it has a name")
	require.NoError(t, m.Remove("kept"))
	require.NoDirExists(t, e.Path)
	_, err = m.Get("kept")
	requireHint(t, err, "not found", "env list")
	_, err = m.Prune(t.Context(), PruneOptions{Named: true})
	require.NoError(t, err)
	_, _, err = m.Ensure(t.Context(), r)
	require.NoError(t, err, "parts whose objects were pruned are not used")
}

func BenchmarkEnsureAgain(b *testing.B) {
	s := &script{lock: pin("six", "1.0")}
	m, base := testManager(b, s)
	r := Recipe{File: writeInput(b, "six\n"), Base: base}
	for b.Loop() {
		if _, _, err := m.Ensure(b.Context(), r); err != nil {
			b.Fatal(err)
		}
	}
}
