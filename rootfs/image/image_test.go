package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	goruntime "runtime"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

func testStore(t testing.TB) *rootfs.Store {
	t.Helper()
	s, err := rootfs.OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	return s
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(b)
	require.NoError(t, errors.Join(err, w.Close()))
	return out.Bytes()
}

// writeOCI makes an image layout; spoil may change the files first.
func writeOCI(t testing.TB, spoil func(files map[string][]byte, layers []string), layers ...[]byte) string {
	t.Helper()
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	type desc map[string]any
	add := func(b []byte) desc {
		files["blobs/sha256/"+sum(b)] = b
		return desc{"digest": "sha256:" + sum(b), "size": len(b)}
	}
	js := func(v any) []byte {
		b, err := json.Marshal(v)
		require.NoError(t, err)
		return b
	}
	var ds []desc
	var diffs, paths []string
	for _, l := range layers {
		diffs = append(diffs, "sha256:"+sum(l))
		z := gz(t, l)
		ds = append(ds, add(z))
		paths = append(paths, "blobs/sha256/"+sum(z))
	}
	cfg := add(js(desc{"config": desc{"Env": []string{"PATH=/x:/bin", "LANG=C.UTF-8", "bad"}, "User": "1:1"}, "rootfs": desc{"diff_ids": diffs}}))
	m := add(js(desc{"schemaVersion": 2, "config": cfg, "layers": ds}))
	m["platform"] = desc{"os": "linux", "architecture": goruntime.GOARCH}
	other := desc{"digest": "sha256:" + sum([]byte("x")), "platform": desc{"os": "linux", "architecture": "pdp11"}}
	inner := add(js(desc{"manifests": []desc{other, m}}))
	files["index.json"] = js(desc{"manifests": []desc{inner}})
	if spoil != nil {
		spoil(files, paths)
	}
	d := t.TempDir()
	for p, b := range files {
		require.NoError(t, os.MkdirAll(filepath.Join(d, filepath.Dir(p)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(d, p), b, 0o644))
	}
	return d
}

func packDir(t testing.TB, d string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(out)
	require.NoError(t, err)
	w := tar.NewWriter(f)
	require.NoError(t, errors.Join(w.AddFS(os.DirFS(d)), w.Close(), f.Close()))
	return out
}

func TestAddBaseKinds(t *testing.T) {
	l1 := makeTar(t, dir("usr"), file("usr/gone", "1"), file("usr/kept", "1"), link("bin", "usr"))
	l2 := makeTar(t, file("usr/.wh.gone", ""), file("bin/new", "2"))
	d := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(d, "usr"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(d, "usr/kept"), []byte("1"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(d, "usr/new"), []byte("2"), 0o644))
	require.NoError(t, os.Chmod(filepath.Join(d, "usr/new"), 0o4644|os.ModeSetuid))
	require.NoError(t, os.Symlink("usr", filepath.Join(d, "bin")))
	flat := filepath.Join(t.TempDir(), "flat.tar")
	require.NoError(t, os.WriteFile(flat, makeTar(t, dir("./usr/"), file("./usr/kept", "1"), file("./usr/new", "2"), link("./bin", "usr")), 0o644))
	flatGz := flat + ".gz"
	b, err := os.ReadFile(flat)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(flatGz, gz(t, b), 0o644))
	oci := writeOCI(t, nil, l1, l2)
	save := t.TempDir()
	cfg := []byte(`{"config":{"Env":["PATH=/x:/bin","LANG=C.UTF-8"]},"rootfs":{"diff_ids":["sha256:` + sum(l1) + `","sha256:` + sum(l2) + `"]}}`)
	for p, b := range map[string][]byte{
		"a/layer.tar": l1, "b/layer.tar": l2, sum(cfg) + ".json": cfg,
		"manifest.json": []byte(`[{"Config":"` + sum(cfg) + `.json","RepoTags":["a:b"],"Layers":["a/layer.tar","b/layer.tar"]}]`),
	} {
		require.NoError(t, os.MkdirAll(filepath.Join(save, filepath.Dir(p)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(save, p), b, 0o644))
	}
	s := testStore(t)
	ctx := context.Background()
	digest := ""
	for name, src := range map[string]string{"dir": d, "tar": flat, "targz": flatGz, "oci": oci, "ociarchive": packDir(t, oci), "save": packDir(t, save)} {
		got, err := Add(ctx, s, name, src, nil)
		require.NoError(t, err, name)
		if digest == "" {
			digest = got.Digest
		}
		require.Equal(t, digest, got.Digest, "%s: the same tree by another way", name)
		var files []string
		for _, l := range tree(t, got.Lowers[0]) {
			if l[0] != 'd' {
				files = append(files, l)
			}
		}
		require.Equal(t, []string{"f usr/kept=1", "f usr/new=2", "l bin>usr"}, files, name)
		for _, p := range []string{"proc", "dev", "tmp", "opt/env", "work", "var/tmp"} {
			require.DirExists(t, filepath.Join(got.Lowers[0], p), name)
		}
		if name == "oci" || name == "save" || name == "ociarchive" {
			require.Equal(t, []string{"PATH=/x:/bin", "LANG=C.UTF-8"}, got.Env, name)
		}
		again, err := s.Base(name)
		require.NoError(t, err)
		require.Equal(t, got, again)
		_, err = Add(ctx, s, name, src, nil)
		require.ErrorIs(t, err, os.ErrExist)
	}
	infos, err := s.Bases()
	require.NoError(t, err)
	require.Len(t, infos, 6)
	for i, b := range infos {
		require.NoError(t, s.RemoveBase(b.Name))
		l, err := s.Layers()
		require.NoError(t, err)
		require.Len(t, l, map[bool]int{true: 0, false: 1}[i == 5], "the layer goes with its last base")
	}
	_, n, err := s.PruneObjects(nil)
	require.NoError(t, err)
	require.NotZero(t, n)
	left, err := os.ReadDir(s.Path("tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestAddBaseRefusesWrongDigests(t *testing.T) {
	l := makeTar(t, dir("usr"), file("usr/f", "1"))
	evil := makeTar(t, dir("usr"), file("usr/f", "evil"))
	for name, spoil := range map[string]func(map[string][]byte, []string){
		"layer":        func(f map[string][]byte, ls []string) { f[ls[0]] = gz(t, evil) },
		"layer, tail":  func(f map[string][]byte, ls []string) { f[ls[0]] = append(f[ls[0]], gz(t, make([]byte, 512))...) },
		"missing":      func(f map[string][]byte, ls []string) { delete(f, ls[0]) },
		"config":       func(f map[string][]byte, _ []string) { spoilWith(f, "diff_ids", "LANG=C", "LANG=D") },
		"manifest":     func(f map[string][]byte, _ []string) { spoilWith(f, "schemaVersion", `2}`, `3}`) },
		"digest names": func(f map[string][]byte, _ []string) { spoilWith(f, "index.json", "sha256:", "sha256:../../") },
	} {
		t.Run(name, func(t *testing.T) {
			s := testStore(t)
			_, err := Add(context.Background(), s, "b", writeOCI(t, spoil, l), nil)
			require.Error(t, err)
			infos, err := s.Bases()
			require.NoError(t, err)
			require.Empty(t, infos)
			layers, err := s.Layers()
			require.NoError(t, err)
			require.Empty(t, layers)
			left, err := os.ReadDir(s.Path("tmp"))
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// spoilWith changes the text of the file that is named what or holds it.
func spoilWith(f map[string][]byte, what, from, to string) {
	for p, b := range f {
		if p == what || bytes.Contains(b, []byte(what)) {
			f[p] = bytes.ReplaceAll(b, []byte(from), []byte(to))
		}
	}
}

// The mountpoints are added to a tree that an archive made.
func TestMountpointsStayInside(t *testing.T) {
	out := t.TempDir()
	f := filepath.Join(t.TempDir(), "x.tar")
	require.NoError(t, os.WriteFile(f, makeTar(t, dir("usr"), file("usr/f", "x"), link("var", out), link("etc", out), link("opt", out)), 0o644))
	_, err := Add(context.Background(), testStore(t), "b", f, nil)
	require.NoError(t, err)
	require.Empty(t, tree(t, out))
}
