package share

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

// forged is an image of one layer and a record as an attacker makes it who knows
// the format: all digests fit unless a test says otherwise.
type forged struct {
	layer    []byte // an archive, uncompressed
	packed   []byte // nil: the layer compressed by gzip
	files    []file // of the record layer
	record   record
	config   v1.Image
	index    v1.Index
	manifest v1.Manifest
	content  string // content digest that all claim
	blobs    map[string][]byte
}

func tarOf(t testing.TB, hs ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		text := h.Uname // what the content is
		h.Uname = ""
		if h.Size == 0 {
			h.Size = int64(len(text))
		}
		require.NoError(t, w.WriteHeader(&h))
		_, err := w.Write([]byte(text))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return out.Bytes()
}

func contentOf(layer []byte) string {
	m, err := (&entries{tr: tar.NewReader(bytes.NewReader(layer)), lim: standard}).tree(-1, func(r io.Reader, _ bool) (string, int64, error) {
		b, err := io.ReadAll(r)
		return digest.FromBytes(b).Encoded(), int64(len(b)), err
	})
	if err != nil {
		return "sha256:" + strings.Repeat("1", 64)
	}
	return m.Digest()
}

func opt() []tar.Header {
	return []tar.Header{{Typeflag: tar.TypeDir, Name: "opt/", Mode: 0o755}, {Typeflag: tar.TypeDir, Name: "opt/env/", Mode: 0o755}, {Name: "opt/env/a.py", Mode: 0o444, Uname: "pass"}}
}

// steps at which a forger changes things, each before what depends on it is made.
type steps struct {
	layer    func(f *forged)
	record   func(f *forged)
	config   func(f *forged)
	manifest func(f *forged)
	index    func(f *forged)
	blobs    func(f *forged)
}

func forge(t testing.TB, s steps) string {
	t.Helper()
	call := func(step func(*forged), f *forged) {
		if step != nil {
			step(f)
		}
	}
	f := &forged{layer: tarOf(t, opt()...), blobs: map[string][]byte{}}
	call(s.layer, f)
	if f.content == "" {
		f.content = contentOf(f.layer)
	}
	if f.packed == nil {
		f.packed = gzipped(t, f.layer)
	}
	f.record = record{Version: recordVersion, Platform: platform()}
	f.record.Env.Kind, f.record.Env.Digest, f.record.Env.Base, f.record.Env.BaseDigest = "venv", f.content, "host", "sha256:"+strings.Repeat("b", 64)
	f.record.Env.Lock = "sha256:" + strings.Repeat("c", 64)
	call(s.record, f)
	if f.files == nil {
		b, err := json.Marshal(f.record)
		require.NoError(t, err)
		f.files = []file{{recordName, b}}
	}
	var rec bytes.Buffer
	w := tar.NewWriter(&rec)
	require.NoError(t, writeFiles(w, recordDir, f.files))
	require.NoError(t, w.Close())
	put := func(mediaType string, b []byte) v1.Descriptor {
		d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		f.blobs[d.Digest.Encoded()] = b
		return d
	}
	f.config = v1.Image{Platform: v1.Platform{OS: "linux", Architecture: strings.TrimPrefix(platform(), "linux/")}}
	f.config.Config.Labels = map[string]string{labelDigest: f.content, labelLayers: "layer:" + f.content + " record"}
	f.config.RootFS.DiffIDs = []digest.Digest{digest.FromBytes(f.layer), digest.FromBytes(rec.Bytes())}
	call(s.config, f)
	c, err := json.Marshal(f.config)
	require.NoError(t, err)
	f.manifest = v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: put(v1.MediaTypeImageConfig, c), Layers: []v1.Descriptor{
		put(v1.MediaTypeImageLayerGzip, f.packed), put(v1.MediaTypeImageLayerGzip, gzipped(t, rec.Bytes())),
	}}
	call(s.manifest, f)
	m, err := json.Marshal(f.manifest)
	require.NoError(t, err)
	f.index = v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{put(v1.MediaTypeImageManifest, m)}}
	call(s.index, f)
	call(s.blobs, f)
	dir := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755))
	x, err := json.Marshal(f.index)
	require.NoError(t, err)
	if b := f.blobs["index.json"]; b != nil {
		x = b
		delete(f.blobs, "index.json")
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.json"), x, 0o644))
	for name, b := range f.blobs {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "blobs", "sha256", name), b, 0o644))
	}
	return dir
}

func layerOf(hs ...tar.Header) steps {
	return steps{layer: func(f *forged) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range append(opt(), hs...) {
			if h.Typeflag == 0 {
				h.Typeflag = tar.TypeReg
			}
			text := h.Uname
			h.Uname, h.Size = "", int64(len(text))
			if err := w.WriteHeader(&h); err != nil {
				panic(err)
			}
			_, _ = w.Write([]byte(text))
		}
		w.Close()
		f.layer = b.Bytes()
	}}
}

func recordOf(change func(r *record)) steps {
	return steps{record: func(f *forged) { change(&f.record) }}
}

func TestForgeriesAreRefused(t *testing.T) {
	elsewhere := "sha256:" + strings.Repeat("2", 64)
	var many []tar.Header
	for i := range 130 {
		many = append(many, tar.Header{Typeflag: tar.TypeDir, Name: "opt" + strings.Repeat("/d", i+1) + "/", Mode: 0o755})
	}
	for name, c := range map[string]struct {
		steps
		says string
	}{
		"content that is another":  {steps{layer: func(f *forged) { f.content = elsewhere }}, "its content is sha256:"},
		"a file more":              {steps{layer: func(f *forged) { f.content = contentOf(f.layer); f.layer = more(f.layer) }}, "its content is sha256:"},
		"a name that leads up":     {layerOf(tar.Header{Name: "opt/../../x"}), "leads out"},
		"an absolute name":         {layerOf(tar.Header{Name: "/etc/passwd"}), "leads out"},
		"a dotted name":            {layerOf(tar.Header{Name: "./opt/x"}), "leads out"},
		"the root itself":          {layerOf(tar.Header{Typeflag: tar.TypeDir, Name: "./"}), "leads out"},
		"a hard link":              {layerOf(tar.Header{Typeflag: tar.TypeLink, Name: "opt/x", Linkname: "../../etc/shadow"}), "a hard link"},
		"a device":                 {layerOf(tar.Header{Typeflag: tar.TypeChar, Name: "opt/null", Devmajor: 1, Devminor: 3}), `type '3'`},
		"a pipe":                   {layerOf(tar.Header{Typeflag: tar.TypeFifo, Name: "opt/fifo"}), `type '6'`},
		"set-uid":                  {layerOf(tar.Header{Name: "opt/su", Mode: 0o4755}), "set-id"},
		"set-gid":                  {layerOf(tar.Header{Name: "opt/sg", Mode: 0o2755}), "set-id"},
		"a capability":             {layerOf(tar.Header{Name: "opt/cap", Mode: 0o755, Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"}}), "extended attribute"},
		"a name twice":             {layerOf(tar.Header{Name: "opt/env/a.py", Mode: 0o444, Uname: "evil"}), "is there twice"},
		"a file below a link":      {layerOf(tar.Header{Typeflag: tar.TypeSymlink, Name: "opt/out", Linkname: "/etc"}, tar.Header{Name: "opt/out/passwd", Mode: 0o444, Uname: "root::0"}), "lies in no directory"},
		"a file below a file":      {layerOf(tar.Header{Name: "opt/env/a.py/x", Mode: 0o444, Uname: "x"}), "lies in no directory"},
		"a link to nothing":        {layerOf(tar.Header{Typeflag: tar.TypeSymlink, Name: "opt/l"}), "a bad link"},
		"an opaque directory":      {layerOf(tar.Header{Name: "opt/.wh..wh..opq"}), "not a whiteout that is taken"},
		"a whiteout with content":  {layerOf(tar.Header{Name: "opt/.wh.x", Uname: "content"}), "not a whiteout that is taken"},
		"a whiteout upwards":       {layerOf(tar.Header{Name: "opt/.wh..."}), "not a whiteout that is taken"},
		"a deep tree":              {layerOf(many...), "too deep"},
		"something after its end":  {steps{layer: func(f *forged) { f.layer = append(f.layer, "evil"...) }}, "follows the archive's end"},
		"a layer cut short":        {steps{layer: func(f *forged) { f.layer = f.layer[:1538] }}, "layer 1"},
		"a layer that is no tar":   {steps{layer: func(f *forged) { f.layer = bytes.Repeat([]byte("x"), 4096) }}, "layer 1"},
		"a gzip cut short":         {steps{layer: func(f *forged) { f.packed = gzipped(t, f.layer)[:100] }}, "layer 1"},
		"xz":                       {steps{layer: func(f *forged) { f.packed = []byte("\xfd7zXZ\x00 and so on") }}, "xz and bzip2 are not read"},
		"uncompressed digest":      {steps{config: func(f *forged) { f.config.RootFS.DiffIDs[0] = digest.Digest(elsewhere) }}, "its uncompressed digest is"},
		"another configuration":    {steps{manifest: func(f *forged) { f.manifest.Config.Digest = digest.Digest(elsewhere) }}, "no such file"},
		"a changed configuration":  {steps{blobs: func(f *forged) { f.blobs[f.manifest.Config.Digest.Encoded()] = []byte("{}") }}, "its digest is"},
		"a changed manifest":       {steps{blobs: func(f *forged) { f.blobs[f.index.Manifests[0].Digest.Encoded()] = []byte("{}") }}, "its digest is"},
		"a changed layer":          {steps{blobs: func(f *forged) { f.blobs[f.manifest.Layers[0].Digest.Encoded()][20] ^= 1 }}, "layer 1"},
		"a longer layer":           {steps{blobs: func(f *forged) { k := f.manifest.Layers[0].Digest.Encoded(); f.blobs[k] = append(f.blobs[k], 0) }}, "layer 1"},
		"a layer of another size":  {steps{manifest: func(f *forged) { f.manifest.Layers[0].Size++ }}, "layer 1"},
		"a negative size":          {steps{manifest: func(f *forged) { f.manifest.Layers[0].Size = -1 }}, "out of range"},
		"a digest that is a path":  {steps{manifest: func(f *forged) { f.manifest.Layers[0].Digest = "sha256:../../../etc/passwd" }}, "out of range"},
		"another digest algorithm": {steps{manifest: func(f *forged) { f.manifest.Layers[0].Digest = digest.SHA512.FromString("x") }}, "out of range"},
		"layers swapped":           {steps{manifest: func(f *forged) { l := f.manifest.Layers; l[0], l[1] = l[1], l[0] }}, "(the record)"},
		"a layer more":             {steps{manifest: func(f *forged) { f.manifest.Layers = append(f.manifest.Layers, f.manifest.Layers[0]) }}, "3 layers and 2 digests"},
		"200 layers": {steps{manifest: func(f *forged) {
			for range 200 {
				f.manifest.Layers = append(f.manifest.Layers, f.manifest.Layers[0])
			}
		}}, "more than is taken"},
		"a layer of another type": {steps{manifest: func(f *forged) { f.manifest.Layers[0].MediaType = "application/x-evil" }}, `layer 1 of media type "application/x-evil"`},
		"a foreign layer": {steps{manifest: func(f *forged) {
			f.manifest.Layers[0].MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		}}, "not taken"},
		"a configuration of another":  {steps{manifest: func(f *forged) { f.manifest.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" }}, "configuration of media type"},
		"a manifest of another type":  {steps{manifest: func(f *forged) { f.manifest.MediaType = "text/plain" }}, "manifest of media type"},
		"an index of another type":    {steps{index: func(f *forged) { f.index.MediaType = "text/plain" }}, "index of media type"},
		"a platform of another":       {steps{config: func(f *forged) { f.config.Architecture = "s390x" }}, "it is for linux/s390x, and this machine is"},
		"an index of other platforms": {steps{index: func(f *forged) { f.index.Manifests[0].Platform = &v1.Platform{OS: "linux", Architecture: "s390x"} }}, "no image for " + platform() + " in it, only linux/s390x"},
		"several images": {steps{index: func(f *forged) {
			f.index.Manifests = append(f.index.Manifests, v1.Descriptor{Digest: digest.Digest(elsewhere)})
		}}, "several images"},
		"an index without an image":      {steps{index: func(f *forged) { f.index.Manifests = []v1.Descriptor{} }}, "no image for"},
		"an index of itself":             {steps{blobs: func(f *forged) { loop(f) }}, "its digest is"},
		"an index that is large":         {steps{blobs: func(f *forged) { f.blobs["index.json"] = bytes.Repeat([]byte(" "), 5<<20) }}, "more than is taken"},
		"an index that is no JSON":       {steps{blobs: func(f *forged) { f.blobs["index.json"] = []byte("<html>") }}, "read manifest"},
		"no labels":                      {steps{config: func(f *forged) { f.config.Config.Labels = nil }}, "not one of an environment"},
		"labels of nothing":              {steps{config: func(f *forged) { f.config.Config.Labels[labelLayers] = "record" }}, "does not say what its layers are"},
		"labels of another kind":         {steps{config: func(f *forged) { f.config.Config.Labels[labelLayers] = "evil:" + f.content + " record" }}, "no kind of layer"},
		"a base that is none":            {steps{config: func(f *forged) { f.config.Config.Labels[labelLayers] = "base:" + f.content + " record" }}, "its base is not the one it was baked on"},
		"a label of another":             {steps{config: func(f *forged) { f.config.Config.Labels[labelDigest] = elsewhere }}, "of different environments"},
		"a record of another":            {recordOf(func(r *record) { r.Env.Digest = elsewhere }), "of different environments"},
		"a record of other layers":       {recordOf(func(r *record) { r.Env.Below = []string{elsewhere} }), "the record has other layers"},
		"a record of no version":         {recordOf(func(r *record) { r.Version = 9 }), "version 9, not 1"},
		"a record of another platform":   {recordOf(func(r *record) { r.Platform = "linux/s390x" }), "it is for linux/s390x"},
		"a record of another kind":       {recordOf(func(r *record) { r.Env.Kind = "evil" }), `kind "evil" is not known`},
		"a record with control codes":    {recordOf(func(r *record) { r.Env.Tool = "\x1b]0;evil\a" }), "control characters"},
		"a record with bad variables":    {recordOf(func(r *record) { r.Env.Vars = []string{"=x"} }), "not KEY=VALUE"},
		"a record with an odd python":    {recordOf(func(r *record) { r.Env.Python = "/usr/../etc/x" }), "is not a path"},
		"a record with a base of a path": {recordOf(func(r *record) { r.Env.Base = "../../x" }), "is not a name"},
		"a record without digests":       {recordOf(func(r *record) { r.Env.Lock = "" }), "no digests"},
		"a base with bad variables":      {recordOf(func(r *record) { r.BaseEnv = []string{"x"} }), "of the base is not KEY=VALUE"},
		"a lock that is announced":       {recordOf(func(r *record) { r.LockKind = "requirements" }), "do not come together"},
		"a lock of another": {steps{record: func(f *forged) {
			f.record.LockKind = "requirements"
			b, _ := json.Marshal(f.record)
			f.files = []file{{recordName, b}, {lockName, []byte("evil==1\n")}}
		}}, "the lock is not the one of the record"},
		"no record":                {steps{record: func(f *forged) { f.files = []file{{lockName, []byte("x")}} }}, "no environment.json in it"},
		"a file beside a record":   {steps{record: func(f *forged) { f.files = []file{{"evil", []byte("x")}} }}, "does not belong there"},
		"a record that is no JSON": {steps{record: func(f *forged) { f.files = []file{{recordName, []byte("[")}} }}, "environment.json"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, forge(t, c.steps), c.says) })
	}
	// What they all are without the forgery.
	s, m := testStore(t)
	_, err := Import(context.Background(), s, m, ImportOptions{Source: forge(t, steps{})})
	require.NoError(t, err)
}

// more adds a file to an archive.
func more(layer []byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	r := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := r.Next()
		if err != nil {
			break
		}
		_ = w.WriteHeader(h)
		_, _ = io.Copy(w, r)
	}
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "opt/env/evil.pth", Mode: 0o444, Size: 4})
	_, _ = w.Write([]byte("evil"))
	w.Close()
	return b.Bytes()
}

// loop makes the manifest an index of itself, as far as digests let it.
func loop(f *forged) {
	x, _ := json.Marshal(f.index)
	f.blobs[f.index.Manifests[0].Digest.Encoded()] = x
}

// refused wants one line that says why, and a store as it was.
func refused(t *testing.T, source, says string) {
	t.Helper()
	s, m := testStore(t)
	_, err := Import(context.Background(), s, m, ImportOptions{Source: source, Name: "evil"})
	require.ErrorContains(t, err, says)
	require.True(t, strings.HasPrefix(err.Error(), "import "), err.Error())
	require.NotContains(t, err.Error(), "\n")
	require.Less(t, len(err.Error()), 700)
	clean(t, s)
}

func TestForgedPlainArchivesAreRefused(t *testing.T) {
	layer := tarOf(t, opt()...)
	content := contentOf(layer)
	base := record{Version: recordVersion, Platform: platform(), Layers: []plainLayer{{Digest: content, Entries: 3}}}
	base.Env.Kind, base.Env.Digest, base.Env.Base, base.Env.BaseDigest, base.Env.Lock = "venv", content, "host", content, content
	build := func(change func(r *record), files []tar.Header, more ...tar.Header) string {
		r := base
		r.Layers = append([]plainLayer{}, base.Layers...)
		change(&r)
		text, err := json.Marshal(r)
		require.NoError(t, err)
		hs := append([]tar.Header{{Typeflag: tar.TypeDir, Name: plainDir + "/"}, {Name: plainDir + "/" + recordName, Uname: string(text)}}, files...)
		p := filepath.Join(t.TempDir(), "x.tar")
		require.NoError(t, os.WriteFile(p, tarOf(t, append(append(hs, opt()...), more...)...), 0o600))
		return p
	}
	as := func(*record) {}
	for name, c := range map[string]struct{ source, says string }{
		"a layer of less":        {build(func(r *record) { r.Layers[0].Entries = 2 }, nil), "its content is"},
		"a layer of more":        {build(func(r *record) { r.Layers[0].Entries = 4 }, nil), "it ends early"},
		"a layer of minus one":   {build(func(r *record) { r.Layers[0].Entries = -1 }, nil), "out of range"},
		"a layer of very many":   {build(func(r *record) { r.Layers[0].Entries = 1 << 40 }, nil), "out of range"},
		"entries of no layer":    {build(as, nil, tar.Header{Name: "etc/cron.d/evil", Uname: "x"}), "entries that are of no layer"},
		"no layers":              {build(func(r *record) { r.Layers = nil }, nil), "the record has other layers"},
		"a layer twice":          {build(func(r *record) { r.Layers = append(r.Layers, r.Layers[0]) }, nil), "the record has other layers"},
		"another digest":         {build(func(r *record) { r.Layers[0].Digest = "sha256:evil" }, nil), "out of range"},
		"a record twice":         {build(as, []tar.Header{{Name: plainDir + "/" + recordName, Uname: "{}"}}), "does not belong there"},
		"a file beside":          {build(as, []tar.Header{{Name: plainDir + "/evil", Uname: "{}"}}), "does not belong there"},
		"a file beside, deeper":  {build(as, []tar.Header{{Name: plainDir + "/a/x" + bundleNameSuffix, Typeflag: tar.TypeDir}}), "does not belong there"},
		"names without end":      {build(func(r *record) { r.Names = make([]string, 101) }, nil), "101 names"},
		"a layer below a file":   {build(as, nil, tar.Header{Name: "opt/env/a.py/x", Uname: "x"}), "entries that are of no layer"},
		"a record of a platform": {build(func(r *record) { r.Platform = "plan9/mips" }, nil), "it is for plan9/mips"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, c.source, c.says) })
	}
	// A name that leads out is no name, and read nowhere.
	s, m := testStore(t)
	taken, err := Import(context.Background(), s, m, ImportOptions{Source: build(func(r *record) { r.Names = []string{"../../evil", "fine"} }, nil)})
	require.NoError(t, err)
	require.Equal(t, []string{"fine"}, taken.Names)
	// A base that comes along as "host" is not this host.
	s, m = testStore(t)
	taken, err = Import(context.Background(), s, m, ImportOptions{Source: build(func(r *record) {
		r.Layers = []plainLayer{{Base: true, Digest: content, Entries: 3}, {Digest: content, Entries: 3}}
	}, nil, opt()...)})
	require.NoError(t, err)
	require.Equal(t, "host-"+content[7:19], taken.Base)
}

func TestBombs(t *testing.T) {
	// 200 MB of zeros in a file, by both compressors: far beyond any ratio of text.
	bomb := func(compress func(io.Writer) io.WriteCloser, entries int) steps {
		return steps{layer: func(f *forged) {
			var b bytes.Buffer
			z := compress(&b)
			w := tar.NewWriter(z)
			for _, h := range opt()[:2] {
				require.NoError(t, w.WriteHeader(&h))
			}
			if entries == 0 {
				require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "opt/zeros", Mode: 0o444, Size: 200 << 20}))
				zeros := make([]byte, 1<<20)
				for range 200 {
					_, err := w.Write(zeros)
					require.NoError(t, err)
				}
			}
			for i := range entries {
				require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("opt/%07d/", i), Mode: 0o755}))
			}
			require.NoError(t, w.Close())
			require.NoError(t, z.Close())
			f.packed = b.Bytes()
		}}
	}
	gz := func(w io.Writer) io.WriteCloser { z, _ := gzip.NewWriterLevel(w, gzip.BestCompression); return z }
	zs := func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z }
	t.Run("zstd", func(t *testing.T) { refused(t, forge(t, bomb(zs, 0)), "more than is taken") })
	t.Run("gzip of gzip", func(t *testing.T) {
		// gzip alone stays below the ratio that text has; entries and bytes bound it.
		if testing.Short() {
			t.Skip("writes a million entries")
		}
		refused(t, forge(t, bomb(gz, 1_000_100)), "more than is taken")
	})
	t.Run("bytes", func(t *testing.T) {
		old := standard
		defer func() { standard = old }()
		standard.bytes = 100 << 20
		refused(t, forge(t, bomb(gz, 0)), "its size: not taken")
	})
	t.Run("names", func(t *testing.T) {
		old := standard
		defer func() { standard = old }()
		standard.nameBytes = 1000
		refused(t, forge(t, bomb(gz, 200)), "more than is taken")
	})
}

// An export that is damaged anywhere is refused, or is what it was.
func TestEveryByteCounts(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	for _, format := range []string{"oci-archive", "tar.zst"} {
		path, _ := exportTo(t, s, m, e, ExportOptions{Format: format, WithBase: true})
		whole, err := os.ReadFile(path)
		require.NoError(t, err)
		step := 1499
		if testing.Short() {
			step = 4001
		}
		for i := 0; i < len(whole); i += step {
			for _, b := range [][]byte{flip(whole, i), whole[:i]} {
				require.NoError(t, os.WriteFile(path, b, 0o644))
				tampered(t, path, e.Digest, fmt.Sprintf("%s, byte %d of %d", format, i, len(whole)))
			}
		}
	}
}

func flip(b []byte, i int) []byte {
	out := bytes.Clone(b)
	out[i] ^= 0x40
	return out
}

func tampered(t *testing.T, path, want, what string) {
	t.Helper()
	s, m := testStore(t)
	_, err := Import(context.Background(), s, m, ImportOptions{Source: path})
	if err != nil {
		require.NotContains(t, err.Error(), "\n", what)
		clean(t, s)
		return
	}
	all, err := m.List() // padding, times, names of the outer archive: nothing of the environment
	require.NoError(t, err)
	require.Len(t, all, 1, what)
	require.Equal(t, want, all[0].Digest, what)
	_, damage, err := m.Verify(context.Background(), want)
	require.NoError(t, err)
	require.Empty(t, damage, what)
}

func TestOtherFilesAreNoEnvironments(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(p, b, 0o644))
		return p
	}
	require.NoError(t, os.Mkdir(filepath.Join(dir, "empty"), 0o755))
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "empty", "blobs")))
	for source, says := range map[string]string{
		filepath.Join(dir, "none"):                                                   "no such file",
		filepath.Join(dir, "empty"):                                                  "index.json",
		write("text", []byte("hello, world\n")):                                      "not an archive",
		write("nothing", nil):                                                        "not an archive",
		write("x.tar", tarOf(t, tar.Header{Name: "usr/bin/sh", Uname: "x"})):         "index.json",
		write("twice.tar", tarOf(t, tar.Header{Name: "a"}, tar.Header{Name: "./a"})): "twice",
		write("links.tar", tarOf(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "index.json", Linkname: "/etc/passwd"}, tar.Header{Name: "a"})): "index.json",
		write("saved.tar", tarOf(t, tar.Header{Name: "manifest.json", Uname: `[{"Config":"../../etc/passwd","Layers":["../x"]}]`})):             "not in the archive",
		write("two.tar", tarOf(t, tar.Header{Name: "manifest.json", Uname: `[{},{}]`})):                                                         "it holds 2 images",
		"/dev/null": "neither a file nor a directory",
	} {
		refused(t, source, says)
	}
}

func FuzzLayer(f *testing.F) {
	f.Add(tarOf(f, opt()...))
	f.Add(tarOf(f, tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "b"}, tar.Header{Name: "opt/.wh.x"}))
	lim := standard
	lim.bytes, lim.slack, lim.entries = 1<<20, 1<<16, 1000
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := unpack(context.Background(), bytes.NewReader(b), lim)
		if err != nil {
			return
		}
		m, err := (&entries{tr: tar.NewReader(u), lim: lim}).tree(-1, func(r io.Reader, _ bool) (string, int64, error) {
			c, err := io.ReadAll(r)
			return digest.FromBytes(c).Encoded(), int64(len(c)), err
		})
		if err != nil || m.Check() != nil {
			return
		}
		again, err := rootfs.DecodeManifest(m.Encode())
		require.NoError(t, err)
		require.Equal(t, m.Digest(), again.Digest())
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"digest":"sha256:` + strings.Repeat("a", 64) + `"}]}`))
	f.Add([]byte(`{"config":{"mediaType":"` + v1.MediaTypeImageConfig + `"},"layers":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := findManifest(b, func(v1.Descriptor) ([]byte, error) { return b, nil })
		if err == nil && len(m.Layers) > standard.layers {
			t.Fatal("too many layers")
		}
	})
}
