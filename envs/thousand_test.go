package envs

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

// manyEnvs makes n environments of small layers, as bakes leave them. Every
// tenth has a name.
func manyEnvs(t testing.TB, m *Manager, n int) []*Env {
	t.Helper()
	var out []*Env
	for i := range n {
		d, size, err := m.store.PutObject(strings.NewReader(fmt.Sprint("own ", i)), false)
		require.NoError(t, err)
		c, csize, err := m.store.PutObject(strings.NewReader("common"+strings.Repeat(".", 9000)), false)
		require.NoError(t, err)
		man := &rootfs.Manifest{Entries: []rootfs.Entry{
			{Path: "opt", Type: 'd', Mode: 0o755},
			{Path: "opt/common", Type: 'f', Mode: 0o444, Size: csize, Digest: c},
			{Path: "opt/own", Type: 'f', Mode: 0o444, Size: size, Digest: d},
		}}
		e := &Env{Key: digestOf("env", fmt.Sprint(i)), Digest: man.Digest(), Base: "host", Python: "/usr/bin/python3.11", Tool: "uv 0.13.9", CreatedAt: time.Now().UTC(), Lock: "sha256:" + digestOf("lock", fmt.Sprint(i))}
		for p := range 30 {
			e.Packages = append(e.Packages, Package{fmt.Sprintf("package-%d", p), fmt.Sprintf("%d.%d", p, i)})
		}
		_, err = m.store.PublishLayer(t.Context(), man)
		require.NoError(t, err)
		require.NoError(t, m.save(e))
		if i%10 == 0 {
			require.NoError(t, m.addName(fmt.Sprintf("env-%d", i), e))
		}
		out = append(out, e)
	}
	return out
}

// benchManager is over a thousand environments. They are made in memory: there
// is nothing to wait for but the program.
func benchManager(b *testing.B) (*Manager, []*Env) {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "envs-")
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, os.RemoveAll(dir)) })
	store, err := rootfs.OpenStore(filepath.Join(dir, "store"))
	require.NoError(b, err)
	m := Open(store, Options{})
	return m, manyEnvs(b, m, 1000)
}

func BenchmarkThousand(b *testing.B) {
	m, all := benchManager(b)
	bench := func(name string, f func() error) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				require.NoError(b, f())
			}
		})
	}
	get := func(ref string) func() error {
		return func() error { _, err := m.Get(ref); return err }
	}
	bench("list", func() error {
		l, err := m.List()
		if len(l) != len(all) {
			return fmt.Errorf("%d listed", len(l))
		}
		b, jerr := json.Marshal(l[0])
		_ = b
		if err == nil {
			err = jerr
		}
		return err
	})
	bench("by name", get("env-500"))
	bench("by key", get(all[500].Key[:12]))
	bench("by digest", get(Short(all[500].Digest)))
	bench("load", func() error { _, err := m.load(all[500].Key); return err })
}
