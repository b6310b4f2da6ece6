package share

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	goruntime "runtime"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

// blob is a part of an image that is read once.
type blob struct {
	digest string // "" where only the uncompressed one is known
	size   int64  // -1: not known
	open   func(ctx context.Context) (io.ReadCloser, error)
}

// packed is an image as it comes from outside, before anything of it is believed.
type packed struct {
	config  []byte // compared with its digest
	layers  []blob
	names   []string
	bundles func(ctx context.Context) ([][]byte, error)
}

// files are those of an image in a directory or an archive.
type files interface {
	// open opens a regular file and gives its size.
	open(name string) (io.ReadCloser, int64, error)
}

// directory reads by descriptor; no name or link leads out of it.
type directory struct{ fd *os.File }

func (d directory) open(name string) (io.ReadCloser, int64, error) {
	fd, err := unix.Openat2(int(d.fd.Fd()), name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, 0, fmt.Errorf("open %q: %w", bounded.Text(name), err)
	}
	f := os.NewFile(uintptr(fd), name)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a file")
	}
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("open %q: %w", bounded.Text(name), err), f.Close())
	}
	return f, st.Size(), nil
}

// archive reads a tar file's members where they are.
type archive struct {
	f       *os.File
	members map[string]member
}

type member struct{ offset, size int64 }

// maxMembers bounds the files of an image's archive.
const maxMembers = 10_000

func openArchive(f *os.File) (*archive, error) {
	a := &archive{f, map[string]member{}}
	t := tar.NewReader(f)
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return a, nil
		}
		if err != nil {
			return nil, hinted.New(fmt.Errorf("read archive: %w", err), "an OCI layout, an archive of one, docker save's, or what env export wrote")
		}
		if n >= maxMembers {
			return nil, fmt.Errorf("read archive: over %d files: %w", maxMembers, errTooMuch)
		}
		name := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(name) {
			continue // docker's links to layers: the manifest names the files
		}
		if _, ok := a.members[name]; ok {
			return nil, fmt.Errorf("read archive: %q is in it twice", bounded.Text(name))
		}
		for k := range h.PAXRecords {
			if strings.HasPrefix(k, "GNU.sparse.") {
				return nil, fmt.Errorf("read archive: %q has holes", bounded.Text(name))
			}
		}
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, fmt.Errorf("read archive: %w", err)
		}
		a.members[name] = member{at, h.Size}
	}
}

func (a *archive) open(name string) (io.ReadCloser, int64, error) {
	m, ok := a.members[path.Clean(name)]
	if !ok {
		return nil, 0, fmt.Errorf("open %q: it is not in the archive", bounded.Text(name))
	}
	return io.NopCloser(io.NewSectionReader(a.f, m.offset, m.size)), m.size, nil
}

// readFile reads a small file. digest, where not "", is what it must be.
func readFile(fs files, name, digest string, limit int64) ([]byte, error) {
	r, _, err := fs.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := readBounded(r, limit)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", bounded.Text(name), err)
	}
	if err := same(b, digest); err != nil {
		return nil, fmt.Errorf("read %q: %w", bounded.Text(name), err)
	}
	return b, nil
}

func same(b []byte, want string) error {
	if got := digest.FromBytes(b).String(); want != "" && got != want {
		return fmt.Errorf("its digest is %s, not %s", got, bounded.Text(want))
	}
	return nil
}

func blobName(d v1.Descriptor) (string, error) {
	if !isDigest(string(d.Digest)) {
		return "", fmt.Errorf("digest %q is not sha256:<64 hex>", bounded.Text(string(d.Digest)))
	}
	return "blobs/sha256/" + d.Digest.Encoded(), nil
}

// maxNames bounds the names that an environment comes with.
const maxNames = 100

// readImage reads the description of the one image for this machine.
func readImage(fs files, lim limits) (*packed, error) {
	index, err := readFile(fs, "index.json", "", lim.jsonBytes)
	if err != nil {
		if p, derr := readSaved(fs, lim); derr == nil || !errors.Is(derr, errNotSaved) {
			return p, derr
		}
		return nil, hinted.New(err, "an OCI layout, an archive of one, docker save's, or what env export wrote")
	}
	fetch := func(d v1.Descriptor) ([]byte, error) {
		name, err := blobName(d)
		if err != nil {
			return nil, err
		}
		return readFile(fs, name, string(d.Digest), lim.jsonBytes)
	}
	m, err := findManifest(index, fetch)
	if err != nil {
		return nil, err
	}
	p := &packed{}
	var x v1.Index
	if json.Unmarshal(index, &x) == nil {
		if p.names = strings.Fields(x.Annotations[annotationNames]); len(p.names) > maxNames {
			return nil, fmt.Errorf("%d names: %w", len(p.names), errTooMuch)
		}
	}
	if p.config, err = fetch(m.Config); err != nil {
		return nil, err
	}
	open := func(d v1.Descriptor) (blob, error) {
		name, err := blobName(d)
		return blob{string(d.Digest), d.Size, func(context.Context) (io.ReadCloser, error) {
			r, n, err := fs.open(name)
			if err == nil && n != d.Size {
				err = errors.Join(fmt.Errorf("open %q: %d bytes, not %d", name, n, d.Size), r.Close())
			}
			return r, err
		}}, err
	}
	for _, d := range m.Layers {
		b, err := open(d)
		if err != nil {
			return nil, err
		}
		p.layers = append(p.layers, b)
	}
	p.bundles = func(context.Context) ([][]byte, error) { return layoutBundles(index, fetch, lim) }
	return p, nil
}

// layoutBundles gives the signatures that a layout's index lists.
func layoutBundles(index []byte, fetch func(v1.Descriptor) ([]byte, error), lim limits) (out [][]byte, err error) {
	var x v1.Index
	if err := json.Unmarshal(index, &x); err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	for _, d := range strings.Fields(x.Annotations[annotationReferrers]) {
		b, err := fetch(v1.Descriptor{Digest: digest.Digest(d)})
		if err != nil {
			return nil, err
		}
		layer, err := bundleOf(b)
		if err != nil {
			return nil, err
		}
		if b, err = fetch(layer); err != nil {
			return nil, err
		}
		if out = append(out, b); len(out) > lim.bundles {
			return nil, fmt.Errorf("over %d signatures: %w", lim.bundles, errTooMuch)
		}
	}
	return out, nil
}

// bundleOf gives what a signature's manifest holds.
func bundleOf(manifest []byte) (d v1.Descriptor, err error) {
	var m v1.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return d, fmt.Errorf("read signature: %w", err)
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != bundleType {
		return d, errors.New("read signature: not one bundle")
	}
	return m.Layers[0], nil
}

// maxHops bounds how deep indexes lie in indexes.
const maxHops = 4

var (
	indexTypes    = []string{"", v1.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json"}
	manifestTypes = []string{"", v1.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json"}
	configTypes   = []string{v1.MediaTypeImageConfig, "application/vnd.docker.container.image.v1+json"}
	layerTypes    = []string{
		v1.MediaTypeImageLayer, v1.MediaTypeImageLayerGzip, v1.MediaTypeImageLayerZstd,
		"application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.zstd",
	}
)

func mediaType(what, got string, want []string) error {
	for _, w := range want {
		if got == w {
			return nil
		}
	}
	return fmt.Errorf("%s of media type %q: not taken", what, bounded.Text(got))
}

// findManifest goes from an index or a manifest to the manifest for this machine.
func findManifest(text []byte, fetch func(v1.Descriptor) ([]byte, error)) (*v1.Manifest, error) {
	for range maxHops {
		var both struct {
			v1.Manifest
			Manifests []v1.Descriptor `json:"manifests"`
		}
		if err := json.Unmarshal(text, &both); err != nil {
			return nil, fmt.Errorf("read manifest: %w", err)
		}
		if both.Manifests == nil {
			return checkManifest(&both.Manifest)
		}
		if err := mediaType("index", both.MediaType, indexTypes); err != nil {
			return nil, err
		}
		d, err := choose(both.Manifests)
		if err != nil {
			return nil, err
		}
		if text, err = fetch(d); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("read manifest: indexes in indexes")
}

// choose gives the one manifest for this machine.
func choose(all []v1.Descriptor) (v1.Descriptor, error) {
	var pick *v1.Descriptor
	var others []string
	for i, d := range all {
		if d.Platform != nil && (d.Platform.OS != "linux" || d.Platform.Architecture != goruntime.GOARCH) {
			others = append(others, bounded.Text(d.Platform.OS+"/"+d.Platform.Architecture))
			continue
		}
		if pick != nil && pick.Digest != d.Digest {
			return d, hinted.New(errors.New("it holds several images"), "name one by its digest, or save one")
		}
		pick = &all[i]
	}
	if pick == nil {
		return v1.Descriptor{}, fmt.Errorf("no image for %s in it, only %s", platform(), bounded.Text(strings.Join(others, ", ")))
	}
	return *pick, nil
}

func checkManifest(m *v1.Manifest) (*v1.Manifest, error) {
	if err := mediaType("manifest", m.MediaType, manifestTypes); err != nil {
		return nil, err
	}
	if err := mediaType("configuration", m.Config.MediaType, configTypes); err != nil {
		return nil, notOurs(err)
	}
	if len(m.Layers) > standard.layers {
		return nil, fmt.Errorf("%d layers: %w", len(m.Layers), errTooMuch)
	}
	for i, l := range m.Layers {
		if err := mediaType(fmt.Sprintf("layer %d", i+1), l.MediaType, layerTypes); err != nil {
			return nil, err
		}
		if !isDigest(string(l.Digest)) || l.Size < 0 {
			return nil, fmt.Errorf("layer %d: digest %q, size %d: out of range", i+1, bounded.Text(string(l.Digest)), l.Size)
		}
	}
	return m, nil
}

func notOurs(err error) error {
	return hinted.New(err, "env import takes what env export and env push made; base add takes any image, as a base")
}

var errNotSaved = errors.New("not docker save's")

// readSaved reads docker's own form of an archive: layers are known by the
// digests that the configuration has, it by its name.
func readSaved(fs files, lim limits) (*packed, error) {
	b, err := readFile(fs, "manifest.json", "", lim.jsonBytes)
	if err != nil {
		return nil, errNotSaved
	}
	var list []struct {
		Config string
		Layers []string
	}
	if err := json.Unmarshal(bytes.TrimSpace(b), &list); err != nil {
		return nil, fmt.Errorf("read manifest.json: %w", err)
	}
	if len(list) != 1 {
		return nil, hinted.New(fmt.Errorf("it holds %d images", len(list)), "save one image: docker save NAME:TAG")
	}
	if len(list[0].Layers) > lim.layers {
		return nil, fmt.Errorf("%d layers: %w", len(list[0].Layers), errTooMuch)
	}
	want := ""
	if h := "sha256:" + strings.TrimSuffix(path.Base(list[0].Config), ".json"); isDigest(h) {
		want = h
	}
	p := &packed{bundles: func(context.Context) ([][]byte, error) { return nil, nil }}
	if p.config, err = readFile(fs, list[0].Config, want, lim.jsonBytes); err != nil {
		return nil, err
	}
	for _, name := range list[0].Layers {
		p.layers = append(p.layers, blob{size: -1, open: func(context.Context) (io.ReadCloser, error) {
			r, _, err := fs.open(name)
			return r, err
		}})
	}
	return p, nil
}
