package share

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

var errHostBase = hinted.New(errors.New("the base is this host itself, which does not travel"), "sbxrun base add NAME IMAGE, bake on it, and export that; or leave --with-base out")

const bundleType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// image is an image whose blobs lie in a directory as in an OCI layout's.
type image struct {
	dir      string
	manifest v1.Descriptor
	config   v1.Descriptor
	layers   []v1.Descriptor
	bundles  []v1.Descriptor // signatures, and their own manifests in referrers
	// referrers are manifests with the image as their subject, one a bundle.
	referrers []v1.Descriptor
	empty     v1.Descriptor // what referrers have as a configuration
}

func (i *image) path(d v1.Descriptor) string {
	return filepath.Join(i.dir, "blobs", "sha256", d.Digest.Encoded())
}

// blobs lists all there is, each once.
func (i *image) blobs() []v1.Descriptor {
	out := append([]v1.Descriptor{i.config}, i.layers...)
	if len(i.bundles) > 0 {
		out = append(out, i.empty)
	}
	return append(out, i.bundles...)
}

// put writes a small blob.
func (i *image) put(mediaType string, b []byte) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return d, os.WriteFile(i.path(d), b, 0o644)
}

func (i *image) putJSON(mediaType string, v any) (v1.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return i.put(mediaType, b)
}

// squeeze is a compressor of a format.
func squeeze(w io.Writer, compression string) (io.WriteCloser, error) {
	if compression == "zstd" {
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault))
	}
	return gzip.NewWriterLevel(w, gzip.DefaultCompression)
}

// putLayer writes a layer that write makes and gives its uncompressed digest.
func (i *image) putLayer(compression string, write func(w *tar.Writer) error) (d v1.Descriptor, diffID digest.Digest, err error) {
	f, err := os.CreateTemp(i.dir, "layer-")
	if err != nil {
		return d, "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	packed, plain := sha256.New(), sha256.New()
	buf := bufio.NewWriterSize(io.MultiWriter(f, packed), 1<<18)
	z, err := squeeze(buf, compression)
	if err != nil {
		return d, "", err
	}
	w := tar.NewWriter(io.MultiWriter(z, plain))
	if err := write(w); err != nil {
		return d, "", err
	}
	if err := errors.Join(w.Close(), z.Close(), buf.Flush()); err != nil {
		return d, "", err
	}
	st, err := f.Stat()
	if err != nil {
		return d, "", err
	}
	d = v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip, Digest: digest.NewDigest(digest.SHA256, packed), Size: st.Size()}
	if compression == "zstd" {
		d.MediaType = v1.MediaTypeImageLayerZstd
	}
	if err = errors.Join(f.Chmod(0o644), f.Close()); err != nil {
		return d, "", err
	}
	return d, digest.NewDigest(digest.SHA256, plain), os.Rename(f.Name(), i.path(d))
}

// build makes the image of an environment below dir, an empty directory.
func build(ctx context.Context, store *rootfs.Store, p *parts, dir, compression string, progress Progress) (*image, error) {
	i := &image{dir: dir}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	c := v1.Image{Created: &epoch, Platform: v1.Platform{Architecture: goruntime.GOARCH, OS: "linux"}, RootFS: v1.RootFS{Type: "layers"}}
	c.Config = p.imageConfig()
	add := func(by string, write func(w *tar.Writer) error) error {
		d, diffID, err := i.putLayer(compression, write)
		if err != nil {
			return err
		}
		i.layers = append(i.layers, d)
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, diffID)
		c.History = append(c.History, v1.History{Created: &epoch, CreatedBy: "sbxrun env export: " + by})
		return nil
	}
	for n, l := range p.contents {
		progress(fmt.Sprintf("layer %d of %d", n+1, len(p.contents)))
		if err := add(envs.Short(l.digest), func(w *tar.Writer) error { return writeStored(ctx, store, w, l.digest) }); err != nil {
			return nil, err
		}
	}
	files, err := p.files(p.record)
	if err != nil {
		return nil, err
	}
	if err := add("record", func(w *tar.Writer) error { return writeFiles(w, recordDir, files) }); err != nil {
		return nil, err
	}
	if i.config, err = i.putJSON(v1.MediaTypeImageConfig, c); err != nil {
		return nil, err
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: i.config, Layers: i.layers,
		Annotations: map[string]string{labelDigest: p.env.Digest, v1.AnnotationCreated: epoch.Format("2006-01-02T15:04:05Z")},
	}
	if i.manifest, err = i.putJSON(v1.MediaTypeImageManifest, m); err != nil {
		return nil, err
	}
	return i, i.addBundles(p.bundles)
}

// addBundles makes an artifact of each signature, which refers to the image.
func (i *image) addBundles(bundles [][]byte) (err error) {
	if len(bundles) == 0 {
		return nil
	}
	if i.empty, err = i.put(v1.MediaTypeEmptyJSON, []byte("{}")); err != nil {
		return err
	}
	for _, b := range bundles {
		d, err := i.put(bundleType, b)
		if err != nil {
			return err
		}
		subject := i.manifest
		r, err := i.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: bundleType,
			Config: i.empty, Layers: []v1.Descriptor{d}, Subject: &subject,
		})
		if err != nil {
			return err
		}
		r.ArtifactType = bundleType
		i.bundles, i.referrers = append(i.bundles, d), append(i.referrers, r)
	}
	return nil
}

// files are the record and the lock as they are written.
func (p *parts) files(r record) ([]file, error) {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	out := []file{{recordName, append(b, '\n')}}
	if p.lock != nil {
		out = append(out, file{lockName, p.lock})
	}
	return out, nil
}

// writeStored writes a layer of the store.
func writeStored(ctx context.Context, store *rootfs.Store, w *tar.Writer, content string) error {
	_, m, err := store.Layer(content)
	if err != nil {
		return err
	}
	if m.Digest() != content {
		return hinted.New(fmt.Errorf("layer %s: its manifest is damaged", envs.Short(content)), "sbxrun env verify")
	}
	tree, err := store.OpenLayer(content)
	if err != nil {
		return err
	}
	defer tree.Close()
	return writeTree(ctx, w, tree, m)
}

// imageConfig is how other runtimes run the image: as sbxrun would, with the
// environment's programs first and its variables, not as root.
func (p *parts) imageConfig() v1.ImageConfig {
	vars := map[string]string{}
	var order []string
	set := func(kv string) {
		k, v, ok := strings.Cut(kv, "=")
		if _, old := vars[k]; ok && !old {
			order = append(order, k)
		}
		vars[k] = v
	}
	for _, kv := range p.record.BaseEnv {
		set(kv)
	}
	if vars["PATH"] == "" {
		set("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	set("PATH=" + strings.Join(append(p.env.PathPrefix(), vars["PATH"]), ":"))
	set("HOME=/tmp")
	for _, kv := range p.env.Vars {
		set(kv)
	}
	c := v1.ImageConfig{User: "1000:1000", WorkingDir: "/work", Cmd: []string{"python"}, Labels: map[string]string{
		labelDigest: p.env.Digest, labelKind: p.record.Env.Kind, labelLock: p.env.Lock, labelLayers: label(p.contents),
	}}
	if p.env.Python == "" {
		c.Cmd = []string{"/bin/sh"}
	}
	for _, k := range order {
		c.Env = append(c.Env, k+"="+vars[k])
	}
	return c
}
