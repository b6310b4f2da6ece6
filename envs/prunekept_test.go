package envs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	testDay  = 24 * time.Hour
	testLong = 100 * testDay
)

// put writes a file of the store as if that was some time ago.
func put(t testing.TB, m *Manager, age time.Duration, text string, path ...string) string {
	t.Helper()
	p := m.store.Path(path...)
	require.NoError(t, m.store.WriteFile(p, []byte(text)))
	at := time.Now().Add(-age)
	require.NoError(t, os.Chtimes(p, at, at))
	return p
}

// What goes by each rule, and what stays. A dry run and env df say the same
// before.
func TestPruneOfWhatIsKept(t *testing.T) {
	const big = 1 << 16
	text := func(s string) string { return s + strings.Repeat("\n", big) }
	conda, py := text("conda"), text("six==1.0")
	type kept map[string]bool // by path below the store: does it stay?
	for name, c := range map[string]struct {
		o    PruneOptions
		want kept
	}{
		"by default": {PruneOptions{}, kept{
			"envs/locks/used.json": true, "envs/locks/used.txt": true, "envs/locks/new.txt": true, "envs/locks/old.txt": false, "envs/locks/old.json": false,
			"envs/lastlocks/used": true, "envs/lastlocks/old": false, "envs/lastlocks/nothing": false,
			"envs/targets/old.json": false, "envs/targets/new.json": true, "envs/digests/old": false, "envs/digests/new": true,
			"envs/inline/old": false, "envs/inline/new": true, "envs/copies/new": false, "envs/copies/old": false,
			"cache/conda/pkgs/new": false, "cache/conda/pkgs/old": false, "cache/conda/repodata/new.json": false,
		}},
		"by age": {PruneOptions{OlderThan: 50 * testDay}, kept{
			"envs/locks/used.json": true, "envs/locks/used.txt": true, "envs/locks/new.txt": true, "envs/locks/old.txt": false, "envs/locks/old.json": false,
			"envs/lastlocks/used": true, "envs/lastlocks/old": false, "envs/lastlocks/nothing": false,
			"envs/targets/old.json": false, "envs/targets/new.json": true, "envs/digests/old": false, "envs/digests/new": true,
			"envs/inline/old": false, "envs/inline/new": true, "envs/copies/new": true, "envs/copies/old": false,
			"cache/conda/pkgs/new": true, "cache/conda/pkgs/old": false, "cache/conda/repodata/new.json": true,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := testManager(t, &script{})
			for i, l := range []*lock{{kind: "conda", text: []byte(conda)}, {kind: "requirements", text: []byte(py)}} {
				e := child(t, m, l.kind)
				e.Lock = "sha256:" + l.digest()
				require.NoError(t, m.save(e))
				require.NoError(t, m.addName(string(rune('a'+i)), e))
				require.NoError(t, m.keepLock(l))
			}
			texts := map[string]string{
				"envs/locks/used.json": conda, "envs/locks/used.txt": py, "envs/lastlocks/used": "used.json\n", "envs/lastlocks/old": "old.txt\n", "envs/lastlocks/nothing": "none.txt\n",
			}
			for path := range c.want {
				s, ok := texts[path]
				if !ok {
					s = text(path)
				}
				age := testLong
				if strings.HasPrefix(filepath.Base(path), "new") {
					age = testDay
				}
				put(t, m, age, s, path)
			}
			loose := put(t, m, 0, text("no environment has it"), "envs/lockfiles", digestOf("loose"))
			current := []string{m.solverRecord("base"), m.rattlerDir(), m.store.Path("tools", "uv-"+uvVersion)}
			for _, p := range current {
				put(t, m, testLong, text("tool"), strings.TrimPrefix(p, m.store.Path()))
				require.NoError(t, os.Chtimes(m.solverRecord("base"), time.Now(), time.Now()))
			}
			// Where nothing says which uv is in use, all stay; of the others it is known.
			require.NoError(t, os.Remove(m.store.Path("tools", "tool.json")))
			before := []string{put(t, m, 0, text("old"), "tools/py-rattler-0.0.1/x.so"), put(t, m, 0, text("old"), "tools/conda-solver-0.0.1-base.json"), put(t, m, testLong, text("gone"), "tools", filepath.Base(m.solverRecord("removed")))}

			u, err := m.Usage()
			require.NoError(t, err)
			dry := c.o
			dry.DryRun = true
			says, err := m.Prune(t.Context(), dry)
			require.NoError(t, err)
			for path := range c.want {
				require.FileExists(t, m.store.Path(path), "of a dry run")
			}
			p, err := m.Prune(t.Context(), c.o)
			require.NoError(t, err)
			require.Equal(t, []int64{says.FreedBytes, int64(says.Locks)}, []int64{p.FreedBytes, int64(p.Locks)})
			require.Equal(t, 2, p.Locks)
			for path, stays := range c.want {
				_, err := os.Lstat(m.store.Path(path))
				require.Equal(t, stays, err == nil, path)
			}
			require.NoFileExists(t, loose)
			for _, p := range before {
				require.NoFileExists(t, p)
			}
			for _, p := range current {
				require.FileExists(t, p)
			}
			after, err := m.Usage()
			require.NoError(t, err)
			require.InDelta(t, p.FreedBytes, u.TotalBytes-after.TotalBytes, 32<<10, "but for folders")
			if c.o == (PruneOptions{}) {
				require.InDelta(t, u.ReclaimableBytes, p.FreedBytes, 32<<10)
			}
		})
	}
}

// The month of a lock begins when its environment goes, however old the lock is.
func TestPinsOutliveTheirEnvironment(t *testing.T) {
	m, _ := testManager(t, &script{})
	l := &lock{kind: "requirements", text: []byte("six==1.0\n")}
	e := child(t, m, "e")
	e.Lock = "sha256:" + l.digest()
	require.NoError(t, m.save(e))
	path := put(t, m, testLong, string(l.text), "envs/locks/l.txt")
	p, err := m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Len(t, p.Removed, 1)
	require.FileExists(t, path)
	p, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Zero(t, p.Locks)
	put(t, m, lockKeeps, string(l.text), "envs/locks/l.txt")
	p, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Equal(t, 1, p.Locks)
}

// Downloads go before environments where room has to be made.
func TestASizeIsMadeOfDownloadsFirst(t *testing.T) {
	m, _ := testManager(t, &script{})
	child(t, m, "no name")
	put(t, m, 0, strings.Repeat("x", 1<<20), "cache/conda/pkgs/x")
	u, err := m.Usage()
	require.NoError(t, err)
	p, err := m.Prune(t.Context(), PruneOptions{SizeBytes: u.TotalBytes - 1<<19})
	require.NoError(t, err)
	require.Empty(t, p.Removed)
	require.NoFileExists(t, m.store.Path("cache/conda/pkgs/x"))
	require.LessOrEqual(t, p.StoreBytes, u.TotalBytes-1<<19)
}

// What is read is of use: its age begins again.
func TestNotesThatAreReadStay(t *testing.T) {
	m, base := testManager(t, &script{})
	py, err := findPython(base, "")
	require.NoError(t, err)
	path := put(t, m, testLong, `{"vars":{"os_name":"posix"}}`, strings.TrimPrefix(m.targetPath(base, py), m.store.Path()))
	require.NotNil(t, m.keptTarget(base, py))
	_, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.FileExists(t, path)
}
