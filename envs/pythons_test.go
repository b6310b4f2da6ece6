package envs

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

// addPython puts an interpreter into the store as AddPython leaves it.
func addPython(t *testing.T, m *Manager, version string) Python {
	t.Helper()
	short := version[:strings.LastIndexByte(version, '.')]
	d, n, err := m.store.PutObject(strings.NewReader("interpreter "+version), true)
	require.NoError(t, err)
	man := withParents(&rootfs.Manifest{Entries: []rootfs.Entry{{Path: "opt/python/" + version + "/bin/python" + short, Type: 'f', Mode: 0o555, Size: n, Digest: d}}})
	_, err = m.store.PublishLayer(context.Background(), man)
	require.NoError(t, err)
	p := Python{Version: version, Digest: man.Digest(), Program: "/opt/python/" + version + "/bin/python" + short}
	b, err := json.Marshal(p)
	require.NoError(t, err)
	require.NoError(t, m.store.WriteFile(m.pythonPath(version), b))
	return p
}

func TestAnInterpreterIsLookedForInTheBaseFirst(t *testing.T) {
	m, base := testManager(t, &script{})
	for _, v := range []string{"3.12.9", "3.12.10", "3.9.1", "3.11.1"} {
		addPython(t, m, v)
	}
	all, err := m.Pythons()
	require.NoError(t, err)
	require.Equal(t, "3.9.1", all[0].Version)
	for want, c := range map[string]struct {
		path string
		upon int
	}{
		"":       {"/usr/bin/python3.11", 0},
		"3.11":   {"/usr/bin/python3.11", 0},
		"3.11.1": {"/opt/python/3.11.1/bin/python3.11", 1},
		"3.12":   {"/opt/python/3.12.10/bin/python3.12", 1},
		"3.12.9": {"/opt/python/3.12.9/bin/python3.12", 1},
	} {
		r := Recipe{Base: base, Python: want}
		py, err := m.interpreter(&r)
		require.NoError(t, err, want)
		require.Equal(t, c.path, py.path, want)
		require.Len(t, r.Base.Upon, c.upon, want)
		require.Len(t, py.stat, 64, "the binary's digest")
	}
	for want, tip := range map[string]string{"3.1": "env python add", "3.12.1": "env python add 3.12.1", "/usr/bin/pypy": "--base"} {
		_, err := m.interpreter(&Recipe{Base: base, Python: want})
		requireHint(t, err, "find interpreter", tip)
	}

	// Another base that has it is named.
	other := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(other, "usr/bin"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(other, "usr/bin/python3.99"), []byte("x"), 0o755))
	_, err = m.store.AddBase(context.Background(), "newer", other, func(string) {}, func(string) (string, []string, error) { return other, nil, nil })
	require.NoError(t, err)
	_, err = m.interpreter(&Recipe{Base: base, Python: "3.99"})
	requireHint(t, err, "find interpreter", "base newer has it: --base newer")
}

// An upgrade of the interpreter bakes anew, a copy of the same binary does not.
func TestTheInterpretersBinaryIsInTheKey(t *testing.T) {
	m, base := testManager(t, &script{})
	file := writeInput(t, pin("iniconfig", "1.0"))
	bake := func() *Env {
		e, _, err := m.Ensure(context.Background(), Recipe{File: file, Base: base})
		require.NoError(t, err)
		return e
	}
	first := bake()
	py := filepath.Join(base.Lowers[0], "usr/bin/python3.11")
	require.NoError(t, os.Chtimes(py, time.Now(), time.Now()))
	require.Equal(t, first.Key, bake().Key)
	require.NoError(t, os.WriteFile(py, []byte("interpreteR"), 0o755))
	require.NotEqual(t, first.Key, bake().Key)

	require.NoError(t, CheckPython(first, base), "the old one goes on with what is there")
	require.NoError(t, os.Remove(py))
	requireHint(t, CheckPython(first, base), "/usr/bin/python3.11 is gone from base \"test\"", "bake it again")
	first.Kind = "conda"
	require.NoError(t, CheckPython(first, base), "it has its own")
}

// What an environment is baked on stays until that goes.
func TestARemovedInterpreterStaysBelowItsEnvironments(t *testing.T) {
	m, base := testManager(t, &script{})
	used, loose := addPython(t, m, "3.12.1"), addPython(t, m, "3.13.1")
	e, _, err := m.Ensure(context.Background(), Recipe{File: writeInput(t, pin("iniconfig", "1.0")), Base: base, Python: "3.12", Name: "n"})
	require.NoError(t, err)
	require.Equal(t, []string{used.Digest}, e.Below)
	require.Len(t, e.Lowers, 1)
	require.Empty(t, e.BaseDigest[len(base.Digest):], "the base is the base")
	_, err = m.Prune(context.Background(), PruneOptions{})
	require.NoError(t, err)
	_, err = m.store.LayerPath(loose.Digest)
	require.NoError(t, err, "a prune leaves what was added")
	for _, v := range []string{"3.12.1", "3.13.1"} {
		require.NoError(t, m.RemovePython(context.Background(), v))
	}
	requireHint(t, m.RemovePython(context.Background(), "3.13.1"), "not found", "list")
	_, err = m.store.LayerPath(loose.Digest)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = m.Get("n")
	require.NoError(t, err)
	require.NoError(t, m.Remove("n"))
	_, err = m.Prune(context.Background(), PruneOptions{})
	require.NoError(t, err)
	_, err = m.store.LayerPath(used.Digest)
	require.ErrorIs(t, err, os.ErrNotExist)
}
