package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
)

// file, dir, link, hard are tar entries as an attacker would write them.
func file(name, text string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text)), Uname: text} // makeTar writes Uname as the content
}

func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }

func link(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
}

func hard(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
}

func makeTar(t testing.TB, hs ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		text := h.Uname
		h.Uname = ""
		require.NoError(t, w.WriteHeader(&h))
		_, err := w.Write([]byte(text))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// tree lists what is below root: "d usr", "f usr/x=text", "l bin>usr".
func tree(t testing.TB, root string) []string {
	t.Helper()
	var out []string
	require.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, p)
		switch {
		case err != nil || rel == ".":
		case d.IsDir():
			out = append(out, "d "+rel)
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			require.NoError(t, err)
			out = append(out, "l "+rel+">"+to)
		default:
			b, err := os.ReadFile(p)
			require.NoError(t, err)
			st, err := d.Info()
			require.NoError(t, err)
			require.True(t, st.Mode().IsRegular(), "%s is %v", rel, st.Mode())
			require.Zero(t, st.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky), rel)
			out = append(out, "f "+rel+"="+string(b))
		}
		return err
	}))
	sort.Strings(out)
	return out
}

func TestNothingLeavesTheRoot(t *testing.T) {
	// "OUT" in a name stands for a directory of the host beside the root.
	setid := file("su", "x")
	setid.Mode = 0o6755
	xattr := file("x", "x")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "SCHILY.xattr.trusted.overlay.opaque": "y"}
	sparse := file("big", "x")
	sparse.PAXRecords = map[string]string{"X.y": "z"}
	dev := func(name string, typ byte, major, minor int64) tar.Header {
		return tar.Header{Typeflag: typ, Name: name, Devmajor: major, Devminor: minor}
	}
	for name, c := range map[string]struct {
		in   []tar.Header
		want []string // nil: refused
	}{
		"parent name":                   {[]tar.Header{file("../victim", "evil")}, nil},
		"parent name inside":            {[]tar.Header{file("a/../../victim", "evil")}, nil},
		"absolute name":                 {[]tar.Header{file("OUT/victim", "evil")}, []string{"f OUT/victim=evil"}},
		"write through absolute link":   {[]tar.Header{link("l", "OUT"), file("l/victim", "evil")}, nil},
		"write through relative link":   {[]tar.Header{link("l", "../out"), file("l/victim", "evil")}, nil},
		"write on a link":               {[]tar.Header{link("l", "OUT/victim"), file("l", "evil")}, []string{"f l=evil"}},
		"write through link chain":      {[]tar.Header{dir("a"), link("a/b", ".."), link("c", "a/b/../../out"), file("c/victim", "evil")}, nil},
		"write through link, inside":    {[]tar.Header{dir("usr"), link("bin", "/usr"), file("bin/sh", "x")}, []string{"d usr", "f usr/sh=x", "l bin>/usr"}},
		"mkdir through link":            {[]tar.Header{link("l", "OUT"), dir("l/made")}, nil},
		"dir on a link":                 {[]tar.Header{link("l", "OUT"), dir("l"), file("l/x", "x")}, []string{"d l", "f l/x=x"}},
		"magic link":                    {[]tar.Header{link("l", "/proc/self/root"), file("l/tmp/evil", "evil")}, nil},
		"hard link to outside":          {[]tar.Header{hard("h", "../out/victim")}, nil},
		"hard link to absolute":         {[]tar.Header{hard("h", "OUT/victim")}, nil},
		"hard link through link":        {[]tar.Header{link("l", "OUT"), hard("h", "l/victim")}, nil},
		"hard link through link inside": {[]tar.Header{dir("d"), file("d/f", "x"), link("l", "d"), hard("h", "l/f")}, nil},
		"hard link to link, then write": {[]tar.Header{link("l", "OUT/victim"), hard("h", "l"), file("h", "evil")}, []string{"f h=evil", "l l>OUT/victim"}},
		"hard link to itself":           {[]tar.Header{file("f", "x"), hard("f", "f")}, nil},
		"hard link to directory":        {[]tar.Header{dir("d"), hard("h", "d")}, nil},
		"hard link":                     {[]tar.Header{file("f", "x"), hard("h", "f")}, []string{"f f=x", "f h=x"}},
		"write on a hard link":          {[]tar.Header{file("f", "x"), hard("h", "f"), file("h", "y")}, []string{"f f=x", "f h=y"}},
		"devices":                       {[]tar.Header{dev("dev/sda", tar.TypeBlock, 8, 0), dev("dev/mem", tar.TypeChar, 1, 1), dev("p", tar.TypeFifo, 0, 0), dev("wh", tar.TypeChar, 0, 0)}, []string{}},
		"set-id":                        {[]tar.Header{setid}, []string{"f su=x"}},
		"xattrs":                        {[]tar.Header{xattr}, []string{"f x=x"}},
		"too deep":                      {[]tar.Header{file(strings.Repeat("a/", 200)+"f", "x")}, nil},
		"too deep through a link":       {[]tar.Header{dir(strings.Repeat("a/", 100)), link("l", strings.Repeat("a/", 100)), file("l/"+strings.Repeat("a/", 100)+"f", "x")}, nil},
		"name too long":                 {[]tar.Header{file(strings.Repeat("a", 300), "x")}, nil},
		"link loop":                     {[]tar.Header{link("a", "b"), link("b", "a"), file("a/f", "x")}, nil},
		"the root itself":               {[]tar.Header{dir("./"), link("/", "OUT"), file("f", "x")}, []string{"f f=x"}},
		"unknown type":                  {[]tar.Header{{Typeflag: 'Z', Name: "z"}}, nil},
		"file in the place of dir":      {[]tar.Header{dir("d"), file("d/f", "x"), file("d", "y")}, []string{"f d=y"}},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			root, out := filepath.Join(top, "root"), filepath.Join(top, "out")
			require.NoError(t, os.Mkdir(root, 0o755))
			require.NoError(t, os.Mkdir(out, 0o755))
			victim := filepath.Join(out, "victim")
			require.NoError(t, os.WriteFile(victim, []byte("good"), 0o600))
			for i := range c.in {
				c.in[i].Name = strings.ReplaceAll(c.in[i].Name, "OUT", out)
				c.in[i].Linkname = strings.ReplaceAll(c.in[i].Linkname, "OUT", out)
			}
			x, err := newExtractor(root, false)
			require.NoError(t, err)
			defer x.close()
			err = x.apply(bytes.NewReader(makeTar(t, c.in...)), nil)
			if c.want == nil {
				require.Error(t, err)
			} else {
				require.NoError(t, err)
				var got []string
				for _, l := range tree(t, root) {
					l = strings.ReplaceAll(l, out, "OUT")
					if l = strings.ReplaceAll(l, strings.TrimPrefix(out, "/"), "OUT"); strings.Contains(l, "OUT") || !strings.HasPrefix(strings.TrimPrefix(out, "/"), strings.TrimPrefix(l, "d ")) {
						if l != "d OUT" {
							got = append(got, l)
						}
					}
				}
				require.ElementsMatch(t, c.want, got)
			}
			b, err := os.ReadFile(victim)
			require.NoError(t, err)
			require.Equal(t, "good", string(b), "the victim was written")
			require.Equal(t, []string{"f victim=good"}, tree(t, out))
			st, err := os.Stat(victim)
			require.NoError(t, err)
			require.Equal(t, fs.FileMode(0o600), st.Mode())
		})
	}
}

func TestWhiteouts(t *testing.T) {
	lower := []tar.Header{dir("a"), file("a/old", "1"), dir("a/sub"), file("a/sub/old", "1"), file("keep", "1"), link("l", "a")}
	for name, c := range map[string]struct {
		upper []tar.Header
		want  []string
	}{
		"file":                         {[]tar.Header{file("a/.wh.old", "")}, []string{"d a", "d a/sub", "f a/sub/old=1", "f keep=1", "l l>a"}},
		"directory":                    {[]tar.Header{file(".wh.a", "")}, []string{"f keep=1", "l l>a"}},
		"link, not what it points to":  {[]tar.Header{file(".wh.l", "")}, []string{"d a", "d a/sub", "f a/old=1", "f a/sub/old=1", "f keep=1"}},
		"opaque":                       {[]tar.Header{dir("a"), file("a/.wh..wh..opq", ""), file("a/new", "2")}, []string{"d a", "f a/new=2", "f keep=1", "l l>a"}},
		"opaque after its files":       {[]tar.Header{dir("a"), file("a/new", "2"), file("a/.wh..wh..opq", "")}, []string{"d a", "f a/new=2", "f keep=1", "l l>a"}},
		"opaque over a merged dir":     {[]tar.Header{dir("a"), dir("a/sub"), file("a/sub/new", "2"), file("a/.wh..wh..opq", "")}, []string{"d a", "d a/sub", "f a/sub/new=2", "f keep=1", "l l>a"}},
		"opaque, parents not named":    {[]tar.Header{file("a/sub/new", "2"), file("a/.wh..wh..opq", "")}, []string{"d a", "d a/sub", "f a/sub/new=2", "f keep=1", "l l>a"}},
		"whiteout after its new file":  {[]tar.Header{file("keep", "2"), file(".wh.keep", "")}, []string{"d a", "d a/sub", "f a/old=1", "f a/sub/old=1", "f keep=2", "l l>a"}},
		"whiteout of what is not":      {[]tar.Header{file("a/.wh.none", "")}, []string{"d a", "d a/sub", "f a/old=1", "f a/sub/old=1", "f keep=1", "l l>a"}},
		"whiteout of dot, dot-dot":     {[]tar.Header{file("a/.wh..", ""), file("a/.wh...", ""), file(".wh.", "")}, []string{"d a", "d a/sub", "f a/old=1", "f a/sub/old=1", "f keep=1", "l l>a"}},
		"aufs names are left out":      {[]tar.Header{file(".wh..wh.aufs", ""), dir(".wh..wh.plnk")}, []string{"d a", "d a/sub", "f a/old=1", "f a/sub/old=1", "f keep=1", "l l>a"}},
		"replaced by a file, then dir": {[]tar.Header{file("a", "2")}, []string{"f a=2", "f keep=1", "l l>a"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			x, err := newExtractor(root, true)
			require.NoError(t, err)
			defer x.close()
			require.NoError(t, x.apply(bytes.NewReader(makeTar(t, lower...)), nil))
			require.NoError(t, x.apply(bytes.NewReader(makeTar(t, c.upper...)), nil))
			require.ElementsMatch(t, c.want, tree(t, root))
		})
	}
}

// An absolute link out of the root and a whiteout below it: in the root, or nowhere.
func TestWhiteoutThroughLinkStaysInside(t *testing.T) {
	top := t.TempDir()
	root, out := filepath.Join(top, "root"), filepath.Join(top, "out")
	require.NoError(t, os.Mkdir(root, 0o755))
	require.NoError(t, os.Mkdir(out, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(out, "victim"), []byte("good"), 0o600))
	for _, name := range []string{"l/.wh.victim", "l/.wh..wh..opq"} {
		x, err := newExtractor(root, true)
		require.NoError(t, err)
		_ = x.apply(bytes.NewReader(makeTar(t, link("l", out))), nil)
		_ = x.apply(bytes.NewReader(makeTar(t, file(name, ""))), nil)
		x.close()
		require.Equal(t, []string{"f victim=good"}, tree(t, out))
	}
}

func TestCompressions(t *testing.T) {
	// Larger than the ratio allows for the bytes read when its header is seen.
	big := file("big", strings.Repeat("0123456789abcdef", 10<<20))
	plain := makeTar(t, big)
	var gz, zs bytes.Buffer
	g := gzip.NewWriter(&gz)
	_, err := g.Write(plain)
	require.NoError(t, errors.Join(err, g.Close()))
	z, err := zstd.NewWriter(&zs)
	require.NoError(t, err)
	_, err = z.Write(makeTar(t, file("small", "x")))
	require.NoError(t, errors.Join(err, z.Close()))
	for name, b := range map[string][]byte{"plain": plain, "gzip": gz.Bytes(), "zstd": zs.Bytes()} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			x, err := newExtractor(root, false)
			require.NoError(t, err)
			defer x.close()
			require.NoError(t, x.apply(bytes.NewReader(b), nil))
		})
	}
	for name, b := range map[string][]byte{"cut off gzip": gz.Bytes()[:gz.Len()/2], "xz": []byte("\xfd7zXZ\x00aaaa"), "cut off tar": plain[:1000], "text": []byte(strings.Repeat("hello ", 200))} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			x, err := newExtractor(root, false)
			require.NoError(t, err)
			defer x.close()
			require.Error(t, x.apply(bytes.NewReader(b), nil))
		})
	}
}

// A zstd stream of zeros packs far denser than any honest layer.
func TestBombIsRefused(t *testing.T) {
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b, zstd.WithEncoderLevel(zstd.SpeedFastest))
	require.NoError(t, err)
	w := tar.NewWriter(z)
	const size = 256 << 20
	require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: size, Mode: 0o644}))
	zeros := make([]byte, 1<<20)
	for range size >> 20 {
		_, err := w.Write(zeros)
		require.NoError(t, err)
	}
	require.NoError(t, errors.Join(w.Close(), z.Close()))
	x, err := newExtractor(t.TempDir(), false)
	require.NoError(t, err)
	defer x.close()
	require.ErrorContains(t, x.apply(&b, nil), "more than is taken")
}

func FuzzExtract(f *testing.F) {
	f.Add(makeTar(f, dir("d"), file("d/f", "x"), link("l", "/d"), hard("h", "d/f"), file("l/g", "y")))
	f.Add(makeTar(f, link("l", "../out"), file("l/victim", "evil")))
	f.Add(makeTar(f, file("d/.wh..wh..opq", ""), file(".wh.d", "")))
	f.Fuzz(func(t *testing.T, b []byte) {
		top := t.TempDir()
		root, out := filepath.Join(top, "root"), filepath.Join(top, "out")
		require.NoError(t, errors.Join(os.Mkdir(root, 0o755), os.Mkdir(out, 0o755), os.WriteFile(filepath.Join(out, "victim"), []byte("good"), 0o600)))
		x, err := newExtractor(root, true)
		require.NoError(t, err)
		defer x.close()
		_ = x.apply(bytes.NewReader(b), nil)
		tree(t, root)
		require.Equal(t, []string{"f victim=good"}, tree(t, out))
		ents, err := os.ReadDir(top)
		require.NoError(t, err)
		require.Len(t, ents, 2)
	})
}
