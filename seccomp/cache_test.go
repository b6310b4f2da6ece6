package seccomp

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCacheHealsWhatIsBroken(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	want, err := Default().Compile()
	require.NoError(t, err)
	load := func() {
		t.Helper()
		got, err := Load(dir, Default())
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	load()
	ents, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, ents, 1)
	path := filepath.Join(dir, ents[0].Name())
	whole, err := os.ReadFile(path)
	require.NoError(t, err)
	flipped := append([]byte{}, whole...)
	flipped[len(flipped)/2] ^= 1
	for _, bad := range [][]byte{nil, whole[:40], whole[:len(whole)-8], append(whole[:len(whole):len(whole)], 0), flipped} {
		require.NoError(t, os.WriteFile(path, bad, 0o600))
		load()
		again, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, whole, again, "not healed")
	}
	load()
	ents, err = os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, ents, 1, "temporary files stay")
}

func TestCacheThatCannotBeWrittenIsNoError(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	f, err := Load(filepath.Join(file, "cache"), Default())
	require.NoError(t, err)
	require.NotEmpty(t, f)
}

func TestCacheIsMadeByManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	want, err := Default().Compile()
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if got, err := Load(dir, Default()); err != nil || string(got) != string(want) {
				t.Errorf("load: %v", err)
			}
		})
	}
	wg.Wait()
	ents, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, ents, 1)
}
