package envs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

// usedAgo sets the last use of environments, so that they are in order.
func usedAgo(t testing.TB, m *Manager, ages map[*Env]time.Duration) {
	t.Helper()
	for e, d := range ages {
		at := time.Now().Add(-d)
		require.NoError(t, os.Chtimes(m.recordPath(e.Key), at, at))
	}
}

func keysOf(all []*Env) []string {
	var out []string
	for _, e := range all {
		out = append(out, e.Key)
	}
	return out
}

// layersLeft gives how many layers are in the store.
func layersLeft(t testing.TB, m *Manager) int {
	t.Helper()
	l, err := m.store.Layers()
	require.NoError(t, err)
	return len(l)
}

func TestPruneChooses(t *testing.T) {
	const day = 24 * time.Hour
	for name, c := range map[string]struct {
		o    PruneOptions
		gone []int
	}{
		"all without a name":             {PruneOptions{}, []int{4, 3, 2, 1}},
		"those with a name too":          {PruneOptions{Named: true}, []int{4, 3, 2, 1, 0}},
		"older than, by last use":        {PruneOptions{OlderThan: 36 * time.Hour}, []int{4, 3}},
		"the last used stay":             {PruneOptions{Keep: 1}, []int{4, 3, 2}},
		"more stay than there are":       {PruneOptions{Keep: 9}, nil},
		"old, but among those that stay": {PruneOptions{OlderThan: time.Hour, Keep: 3}, []int{4}},
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := testManager(t, &script{})
			all := manyEnvs(t, m, 5)
			// 0 has a name; 1 was baked and used last.
			usedAgo(t, m, map[*Env]time.Duration{all[0]: 0, all[1]: 0, all[2]: day, all[3]: 2 * day, all[4]: 9 * day})
			var want []string
			for _, i := range c.gone {
				want = append(want, all[i].Key)
			}
			o := c.o
			o.DryRun = true
			dry, err := m.Prune(t.Context(), o)
			require.NoError(t, err)
			require.ElementsMatch(t, want, keysOf(dry.Removed))
			require.Equal(t, 5, layersLeft(t, m), "a dry run removes nothing")

			p, err := m.Prune(t.Context(), c.o)
			require.NoError(t, err)
			require.ElementsMatch(t, want, keysOf(p.Removed))
			require.Equal(t, dry.FreedBytes, p.FreedBytes)
			require.Equal(t, 5-len(want), layersLeft(t, m))
			left, err := m.List()
			require.NoError(t, err)
			require.Len(t, left, 5-len(want))
			for _, e := range left {
				damage, err := m.store.VerifyLayer(t.Context(), e.Digest)
				require.NoError(t, err)
				require.Empty(t, damage)
			}
		})
	}
}

// A use counts, however long ago the environment was baked.
func TestUseIsNoted(t *testing.T) {
	m, _ := testManager(t, &script{})
	all := manyEnvs(t, m, 3)
	usedAgo(t, m, map[*Env]time.Duration{all[1]: 1000 * time.Hour, all[2]: 1000 * time.Hour})
	m.Used(all[2])
	p, err := m.Prune(t.Context(), PruneOptions{OlderThan: 2 * time.Hour})
	require.NoError(t, err)
	require.Equal(t, []string{all[1].Key}, keysOf(p.Removed))
	before, err := os.Stat(m.recordPath(all[2].Key))
	require.NoError(t, err)
	m.Used(all[2])
	after, err := os.Stat(m.recordPath(all[2].Key))
	require.NoError(t, err)
	require.Equal(t, before.ModTime(), after.ModTime(), "once an hour")
}

// The store shrinks to what was asked for, by what was used least recently, and
// no further.
func TestPruneToASize(t *testing.T) {
	m, _ := testManager(t, &script{})
	all := manyEnvs(t, m, 6)
	ages := map[*Env]time.Duration{}
	for i, e := range all {
		ages[e] = time.Duration(i) * time.Hour
	}
	usedAgo(t, m, ages)
	u, err := m.Usage()
	require.NoError(t, err)
	d, err := m.Disk(all[5], all)
	require.NoError(t, err)
	require.Positive(t, d.OwnBytes)
	require.EqualValues(t, 12288, d.SharedBytes, "the file that all have")

	p, err := m.Prune(t.Context(), PruneOptions{SizeBytes: u.TotalBytes})
	require.NoError(t, err)
	require.Empty(t, p.Removed)
	p, err = m.Prune(t.Context(), PruneOptions{SizeBytes: u.TotalBytes - d.OwnBytes - 1})
	require.NoError(t, err)
	require.Equal(t, []string{all[5].Key, all[4].Key}, keysOf(p.Removed))
	require.LessOrEqual(t, p.StoreBytes, u.TotalBytes-d.OwnBytes-1)
	now, err := m.Usage()
	require.NoError(t, err)
	require.Equal(t, now.TotalBytes, p.StoreBytes)
	require.InDelta(t, u.TotalBytes-now.TotalBytes, p.FreedBytes, 64<<10, "directories stay")

	p, err = m.Prune(t.Context(), PruneOptions{SizeBytes: 1})
	require.NoError(t, err)
	require.Len(t, p.Removed, 3, "0 has a name")
	require.Greater(t, p.StoreBytes, int64(1))
}

// What is counted is what the disk has: each inode once.
func TestUsageIsWhatTheDiskHas(t *testing.T) {
	s := &script{}
	m, base := testManager(t, s)
	manyEnvs(t, m, 20)
	_, _, err := m.Ensure(t.Context(), Recipe{File: writeInput(t, pin("six", "1.0")+pin("idna", "3.0")), Base: base})
	require.NoError(t, err)
	_, _, err = m.store.PutObject(strings.NewReader(strings.Repeat("nobody's", 10000)), false)
	require.NoError(t, err)
	u, err := m.Usage()
	require.NoError(t, err)
	var meter rootfs.Meter
	whole, err := meter.Add(m.store.Path())
	require.NoError(t, err)
	require.InDelta(t, whole, u.TotalBytes, 64<<10, "but for the top directories")
	sum := int64(0)
	for _, r := range u.Rows {
		sum += r.SizeBytes
	}
	require.Equal(t, u.TotalBytes, sum)

	_, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	after, err := m.Usage()
	require.NoError(t, err)
	require.InDelta(t, u.ReclaimableBytes, u.TotalBytes-after.TotalBytes, 64<<10, "what was promised is free")
	require.Less(t, after.ReclaimableBytes, int64(32<<10))
}

// Two environments of the same content have no bytes of their own.
func TestTwinsShareAll(t *testing.T) {
	m, _ := testManager(t, &script{})
	all := manyEnvs(t, m, 3)
	twin := *all[1]
	twin.Key, twin.Names = digestOf("twin"), nil
	require.NoError(t, m.save(&twin))
	list, err := m.ListUsed(true)
	require.NoError(t, err)
	for _, l := range list {
		require.Equal(t, l.Digest == twin.Digest, l.OwnBytes == 0, l.Key)
	}
	path := list[1].Path
	require.NoError(t, m.Remove(twin.Key[:12]))
	require.DirExists(t, path)
	require.NoError(t, m.Remove(all[1].Key[:12]))
	require.NoDirExists(t, path)
}

// child makes an environment that extends others, topmost first.
func child(t testing.TB, m *Manager, name string, below ...*Env) *Env {
	t.Helper()
	d, size, err := m.store.PutObject(strings.NewReader(name), false)
	require.NoError(t, err)
	man := &rootfs.Manifest{Entries: []rootfs.Entry{{Path: "child", Type: 'f', Mode: 0o444, Size: size, Digest: d}}}
	e := &Env{Key: digestOf(name), Digest: man.Digest(), CreatedAt: time.Now()}
	for _, b := range below {
		e.Below = append(e.Below, b.Digest)
	}
	require.NoError(t, m.store.Publish(t.Context(), man, func(string) error { return m.save(e) }))
	return e
}

func TestWhatIsExtendedStays(t *testing.T) {
	m, _ := testManager(t, &script{})
	all := manyEnvs(t, m, 4)
	parent := all[1]
	kid := child(t, m, "kid", parent)
	grandkid := child(t, m, "grandkid", kid, parent)
	require.NoError(t, m.addName("leaf", grandkid))
	usedAgo(t, m, map[*Env]time.Duration{parent: 100 * time.Hour, kid: 100 * time.Hour})

	err := m.Remove(parent.Key[:12])
	requireHint(t, err, "extends it", "env rm")
	p, err := m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.ElementsMatch(t, []string{all[2].Key, all[3].Key}, keysOf(p.Removed))
	got, err := m.Get("leaf")
	require.NoError(t, err)
	require.Len(t, got.Lowers, 2)
	d, err := m.Disk(got, all)
	require.NoError(t, err)
	require.Positive(t, d.SharedBytes, "what it extends")

	// All in one go, children first.
	p, err = m.Prune(t.Context(), PruneOptions{Named: true, OlderThan: time.Hour})
	require.NoError(t, err)
	require.Empty(t, p.Removed, "a use of the child is a use of what it extends")
	p, err = m.Prune(t.Context(), PruneOptions{Named: true})
	require.NoError(t, err)
	require.Len(t, p.Removed, 4)
	require.Zero(t, layersLeft(t, m))
}

func TestPruneLeavesWhatRuns(t *testing.T) {
	m, _ := testManager(t, &script{})
	all := manyEnvs(t, m, 4)
	path, err := m.store.LayerPath(all[2].Digest)
	require.NoError(t, err)
	release, err := m.store.Use(t.Context(), path)
	require.NoError(t, err)
	err = m.Remove(all[2].Key[:12])
	requireHint(t, err, "a live sandbox uses it", "wait")
	p, err := m.Prune(t.Context(), PruneOptions{SizeBytes: 1})
	require.NoError(t, err)
	require.Equal(t, []string{all[2].Key}, keysOf(p.Busy))
	require.ElementsMatch(t, []string{all[1].Key, all[3].Key}, keysOf(p.Removed), "others in its place")
	_, err = m.Get(all[2].Key[:12])
	require.NoError(t, err, "it has its record still")
	release()
	p, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Len(t, p.Removed, 1)
}

// Parts stay for as long as an environment or a recent bake has them, locks for
// as long as an environment has them.
func TestPruneOfPartsAndLocks(t *testing.T) {
	s := &script{lock: pin("six", "1.0") + pin("idna", "3.0")}
	m, base := testManager(t, s)
	files := func(dir string) int {
		ents, err := os.ReadDir(m.store.Path("envs", dir))
		require.NoError(t, err)
		return len(ents)
	}
	r := Recipe{File: writeInput(t, "six\nidna\n"), Base: base, Name: "n"}
	e, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, 3, files("parts"))
	_, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{3, 1, 1}, []int{files("parts"), files("locks"), files("lockfiles")}, "in use")

	require.NoError(t, m.Remove("n"))
	_, err = m.Prune(t.Context(), PruneOptions{OlderThan: time.Hour})
	require.NoError(t, err)
	require.Equal(t, []int{3, 1, 0}, []int{files("parts"), files("locks"), files("lockfiles")}, "of a recent bake")
	before := len(s.steps())
	again, _, err := m.Ensure(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, e.Digest, again.Digest)
	require.Len(t, s.steps(), before, "put together from the parts that were kept")

	require.NoError(t, m.Remove("n"))
	p, err := m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, p.Parts)
	require.Equal(t, []int{0, 1}, []int{files("parts"), files("locks")}, "pins move only when that is asked for, or after a month")
	p, err = m.Prune(t.Context(), PruneOptions{Named: true})
	require.NoError(t, err)
	require.Equal(t, 1, p.Locks)
	n := 0
	require.NoError(t, filepath.WalkDir(m.store.Path("objects"), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	}))
	require.Zero(t, n)
	_, _, err = m.Ensure(t.Context(), r)
	require.NoError(t, err)
}

func TestPruneOfToolsAndCaches(t *testing.T) {
	m, _ := testManager(t, &script{})
	tools := m.store.Path("tools")
	for _, v := range []string{"uv-0.1.0", "uv-" + uvVersion} {
		require.NoError(t, os.MkdirAll(filepath.Join(tools, v), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(tools, v, "uv"), []byte("x"), 0o700))
	}
	require.NoError(t, os.WriteFile(filepath.Join(tools, "tool.json"), fmt.Appendf(nil, `{"kind":"uv","path":%q}`, filepath.Join(tools, "uv-"+uvVersion, "uv")), 0o600))
	require.NoError(t, os.MkdirAll(m.store.Path("cache", "pkgs"), 0o700))
	for name, age := range map[string]time.Duration{"old": 100 * time.Hour, "new": 0} {
		p := m.store.Path("cache", "pkgs", name)
		require.NoError(t, os.WriteFile(p, []byte("x"), 0o600))
		require.NoError(t, os.Chtimes(p, time.Now().Add(-age), time.Now().Add(-age)))
	}
	_, err := m.Prune(t.Context(), PruneOptions{OlderThan: time.Hour})
	require.NoError(t, err)
	require.NoDirExists(t, filepath.Join(tools, "uv-0.1.0"))
	require.FileExists(t, filepath.Join(tools, "uv-"+uvVersion, "uv"))
	require.NoFileExists(t, m.store.Path("cache", "pkgs", "old"))
	require.FileExists(t, m.store.Path("cache", "pkgs", "new"))
}

// What a killed bake or prune left between two of its steps goes with the next.
func TestPruneHeals(t *testing.T) {
	m, _ := testManager(t, &script{})
	all := manyEnvs(t, m, 5)
	// A bake that died before its record was written.
	d, size, err := m.store.PutObject(strings.NewReader("orphan"), false)
	require.NoError(t, err)
	_, err = m.store.PublishLayer(t.Context(), &rootfs.Manifest{Entries: []rootfs.Entry{{Path: "o", Type: 'f', Mode: 0o444, Size: size, Digest: d}}})
	require.NoError(t, err)
	// A prune that died: after the name; after the record; amid the files.
	require.NoError(t, m.addName("gone", all[1]))
	require.NoError(t, os.Remove(m.recordPath(all[1].Key)))
	require.NoError(t, os.Rename(m.store.Path("layers", strings.TrimPrefix(all[2].Digest, "sha256:")), m.store.Path("tmp", "removed-0011223344556677")))
	left, err := m.List()
	require.NoError(t, err)
	require.Len(t, left, 3, "half of one is none")

	_, err = m.Prune(t.Context(), PruneOptions{OlderThan: time.Hour})
	require.NoError(t, err)
	require.Equal(t, 3, layersLeft(t, m))
	ents, err := os.ReadDir(m.store.Path("tmp"))
	require.NoError(t, err)
	require.Empty(t, ents)
	ents, err = os.ReadDir(m.store.Path("locks"))
	require.NoError(t, err)
	require.LessOrEqual(t, len(ents), 1, "the one that was held")
	require.NoFileExists(t, m.recordPath(all[2].Key))
	_, err = m.Get("gone")
	requireHint(t, err, "not found", "env list")
	_, err = m.Get("env-0")
	require.NoError(t, err)
}

// Bakes, prunes, removals and uses beside each other: each works or says why
// not, and what there is is whole.
func TestPruneBesideBakesAndRuns(t *testing.T) {
	s := &script{}
	m, base := testManager(t, s)
	var files []string
	for i := range 4 {
		files = append(files, writeInput(t, pin("six", "1.0")+pin("idna", fmt.Sprint(i))))
	}
	end := time.Now().Add(3 * time.Second)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	count := map[string]int{}
	note := func(what string, err error) {
		mu.Lock()
		defer mu.Unlock()
		count[what]++
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	loop := func(f func(i int)) {
		wg.Go(func() {
			for i := 0; time.Now().Before(end); i++ {
				f(i)
			}
		})
	}
	for range 3 { // bakes and uses what it baked
		loop(func(i int) {
			e, _, err := m.Ensure(t.Context(), Recipe{File: files[i%len(files)], Base: base})
			note("bake", err)
			if err != nil {
				return
			}
			release, err := m.store.Use(t.Context(), e.Path)
			if errors.Is(err, os.ErrNotExist) {
				note("gone before use", nil)
				return
			}
			note("use", err)
			if err != nil {
				return
			}
			defer release()
			damage, err := m.store.VerifyLayer(t.Context(), e.Digest)
			note("verify", err)
			if len(damage) > 0 {
				note("verify", fmt.Errorf("%v", damage))
			}
		})
	}
	for range 2 {
		loop(func(int) {
			_, err := m.Prune(t.Context(), PruneOptions{})
			note("prune", err)
		})
	}
	loop(func(int) {
		all, err := m.List()
		note("list", err)
		if len(all) == 0 {
			return
		}
		if err := m.Remove(all[0].Key); err != nil && !errors.Is(err, rootfs.ErrBusy) && !strings.Contains(err.Error(), "not found") {
			note("remove", err)
		}
	})
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	t.Log(count)
	for _, what := range []string{"use", "verify", "prune"} {
		require.Positive(t, count[what], "%v", count)
	}
	_, err := m.Prune(t.Context(), PruneOptions{Named: true})
	require.NoError(t, err)
	require.Zero(t, layersLeft(t, m))
}

// Interpreters are nobody's to prune; layers of steps are, when no environment
// has them and no recent bake.
func TestPruneOfInterpretersAndSteps(t *testing.T) {
	m, _ := testManager(t, &script{})
	publish := func(name string, record func() error) string {
		d, size, err := m.store.PutObject(strings.NewReader(name), false)
		require.NoError(t, err)
		man := &rootfs.Manifest{Entries: []rootfs.Entry{{Path: name, Type: 'f', Mode: 0o444, Size: size, Digest: d}}}
		require.NoError(t, m.store.Publish(t.Context(), man, func(string) error { return nil }))
		require.NoError(t, record())
		return man.Digest()
	}
	python := publish("python", func() error { return nil })
	require.NoError(t, m.store.WriteFile(m.pythonPath("3.12.1"), fmt.Appendf(nil, `{"version":"3.12.1","digest":%q}`, python)))
	step := func(name string) string {
		d := publish(name, func() error { return nil })
		require.NoError(t, m.store.WriteFile(m.store.Path("envs", "steps", digestOf(name)), []byte(d+"\n")))
		return d
	}
	used, loose := step("used"), step("loose")
	require.NoError(t, m.store.WriteFile(m.store.Path("envs", "steps", digestOf("none")), []byte("\n")))
	e := manyEnvs(t, m, 1)[0]
	e.Below = []string{used, python}
	require.NoError(t, m.save(e))
	there := func(want ...string) {
		t.Helper()
		got, err := m.store.Layers()
		require.NoError(t, err)
		require.ElementsMatch(t, want, got)
	}
	u, err := m.Usage()
	require.NoError(t, err)
	for _, r := range u.Rows {
		if r.Kind == "steps" {
			require.Equal(t, 1, r.Count, "the one that no environment has")
			require.Positive(t, r.ReclaimableBytes)
		}
	}
	_, err = m.Prune(t.Context(), PruneOptions{OlderThan: time.Hour})
	require.NoError(t, err)
	there(e.Digest, used, python, loose)
	_, err = m.Prune(t.Context(), PruneOptions{})
	require.NoError(t, err)
	there(e.Digest, used, python)
	require.Len(t, m.steps(), 1)
	require.NoError(t, m.Remove("env-0"))
	there(python)
	_, err = m.Prune(t.Context(), PruneOptions{Named: true})
	require.NoError(t, err)
	there(python)
	require.Empty(t, m.steps())
	require.NoError(t, m.RemovePython(t.Context(), "3.12.1"))
	there()
}
