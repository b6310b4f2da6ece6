// Package image unpacks what a base is made from: tarballs, docker save
// archives and OCI image layouts. Only cmd/sbxrun-oci imports it: the
// decompressors' tables would be set up at every launch.
package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Add adds a base from a directory, a tarball of a root, a `docker save`
// archive or an OCI image layout (directory or archive). The layers of an
// image are applied one on the other and stored as one. Owners and set-id bits
// are not kept: everything belongs to root inside.
func Add(ctx context.Context, s *rootfs.Store, name, source string, progress func(string)) (rootfs.Base, error) {
	if progress == nil {
		progress = func(string) {}
	}
	return s.AddBase(ctx, name, source, progress, func(tmp string) (root string, env []string, err error) {
		return unpackSource(ctx, source, tmp, progress)
	})
}

// unpackSource gives the directory that holds the source's tree: the source
// itself, or one below tmp, and the environment of an image.
func unpackSource(ctx context.Context, source, tmp string, progress func(string)) (root string, env []string, err error) {
	st, err := os.Stat(source)
	if err != nil {
		return "", nil, err
	}
	root = source // a plain directory is read where it is
	image := ""
	switch {
	case st.IsDir() && isFile(filepath.Join(source, "oci-layout")), st.IsDir() && isFile(filepath.Join(source, "manifest.json")) && isFile(filepath.Join(source, "repositories")):
		image = source
	case st.IsDir():
	case !st.Mode().IsRegular():
		return "", nil, errors.New("neither a file nor a directory")
	default:
		kind, err := archiveKind(source)
		if err != nil {
			return "", nil, err
		}
		to := filepath.Join(tmp, "root")
		if kind == "image" {
			to = filepath.Join(tmp, "image")
			image = to
		}
		if err := os.Mkdir(to, 0o755); err != nil {
			return "", nil, err
		}
		progress("unpack " + filepath.Base(source))
		if err := unpack(ctx, source, to, false); err != nil {
			return "", nil, err
		}
		root = to
	}
	if image == "" {
		return root, nil, nil
	}
	root = filepath.Join(tmp, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", nil, err
	}
	env, err = applyImage(ctx, image, root, progress)
	return root, env, err
}

func isFile(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}

// ctxReader ends when its context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func unpack(ctx context.Context, file, to string, whiteouts bool) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	x, err := newExtractor(to, whiteouts)
	if err != nil {
		return err
	}
	defer x.close()
	return x.apply(ctxReader{ctx, f}, nil)
}

// archiveKind looks at the names in an archive: "image" or "root".
func archiveKind(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	z, err := decompress(f)
	if err != nil {
		return "", err
	}
	defer z.Close()
	tr := tar.NewReader(z)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return "root", nil
		}
		if err != nil {
			return "", hinted.New(fmt.Errorf("not a tar archive: %w", err), "a tarball, gzip or zstd or plain")
		}
		switch strings.TrimPrefix(h.Name, "./") {
		case "oci-layout", "manifest.json", "index.json":
			return "image", nil
		case "etc/", "usr/", "bin/", "usr", "etc", "bin", "lib/":
			return "root", nil
		}
	}
}

type descriptor struct {
	MediaType string
	Digest    string
	Platform  *struct{ Architecture, OS string }
}

// imageConfig is what we read of an image's configuration.
type imageConfig struct {
	Config struct{ Env []string }
	RootFS struct {
		DiffIDs []string `json:"diff_ids"`
	}
}

// layerFile is one layer of an image: where it is and what it must be.
type layerFile struct {
	path   string
	digest string // of the file; "" is unknown
	diffID string // of the unpacked bytes; "" is unknown
}

// applyImage reads an image's description and applies its layers to root.
func applyImage(ctx context.Context, dir, root string, progress func(string)) (env []string, err error) {
	layers, cfg, err := readImage(dir)
	if err != nil {
		return nil, err
	}
	if n := len(cfg.RootFS.DiffIDs); n != 0 && n != len(layers) {
		return nil, fmt.Errorf("image has %d layers and %d digests", len(layers), n)
	}
	x, err := newExtractor(root, true)
	if err != nil {
		return nil, err
	}
	defer x.close()
	for i, l := range layers {
		if i < len(cfg.RootFS.DiffIDs) {
			l.diffID = cfg.RootFS.DiffIDs[i]
		}
		progress(fmt.Sprintf("layer %d of %d", i+1, len(layers)))
		if err := applyLayer(ctx, x, dir, l); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	for _, kv := range cfg.Config.Env {
		if k, _, ok := strings.Cut(kv, "="); ok && k != "" && strings.IndexByte(kv, 0) < 0 {
			env = append(env, kv)
		}
	}
	return env, nil
}

// applyLayer unpacks a layer and checks its digests over the very bytes that
// were unpacked: a source that changes meanwhile is found out, and nothing of
// it was published.
func applyLayer(ctx context.Context, x *extractor, dir string, l layerFile) error {
	if l.digest == "" && l.diffID == "" {
		return errors.New("no digest to check it against")
	}
	f, err := openBelow(dir, l.path)
	if err != nil {
		return err
	}
	defer f.Close()
	packed, unpacked := sha256.New(), sha256.New()
	if err := x.apply(io.TeeReader(ctxReader{ctx, f}, packed), unpacked); err != nil {
		return err
	}
	for _, c := range []struct {
		what, want string
		got        hash.Hash
	}{{"digest", l.digest, packed}, {"unpacked digest", l.diffID, unpacked}} {
		if got := "sha256:" + hex.EncodeToString(c.got.Sum(nil)); c.want != "" && got != c.want {
			return fmt.Errorf("%s is %s, not %s", c.what, got, c.want)
		}
	}
	return nil
}

// openBelow opens a file of an image: no name in it leads out.
func openBelow(dir, name string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", dir, err)
	}
	defer unix.Close(fd)
	f, err := unix.Openat2(fd, name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, fmt.Errorf("open %q in image: %w", name, err)
	}
	file := os.NewFile(uintptr(f), name)
	if st, err := file.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("open %q in image: not a file", name), err, file.Close())
	}
	return file, nil
}

func readJSON(dir, name, digest string, v any) error {
	f, err := openBelow(dir, name)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 16<<20))
	if err != nil {
		return fmt.Errorf("read %q: %w", name, err)
	}
	if sum := sha256.Sum256(b); digest != "" && digest != "sha256:"+hex.EncodeToString(sum[:]) {
		return fmt.Errorf("read %q: digest is not %s", name, digest)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %q: %w", name, err)
	}
	return nil
}

func blob(digest string) (string, error) {
	h, ok := strings.CutPrefix(digest, "sha256:")
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("digest %q: not sha256:<64 hex>", digest)
	}
	return "blobs/sha256/" + h, nil
}

// readImage finds the layers of the one image for this machine.
func readImage(dir string) (layers []layerFile, cfg imageConfig, err error) {
	if !isFile(filepath.Join(dir, "index.json")) {
		return readDockerSave(dir)
	}
	var index struct {
		Manifests []descriptor
		Layers    []descriptor
		Config    *descriptor
	}
	if err := readJSON(dir, "index.json", "", &index); err != nil {
		return nil, cfg, err
	}
	for hops := 0; index.Config == nil; hops++ {
		var pick *descriptor
		for i, d := range index.Manifests {
			if d.Platform == nil || d.Platform.OS == "linux" && d.Platform.Architecture == goruntime.GOARCH {
				if pick != nil && pick.Digest != d.Digest {
					return nil, cfg, hinted.New(errors.New("it holds several images"), "save one image for linux/"+goruntime.GOARCH)
				}
				pick = &index.Manifests[i]
			}
		}
		if pick == nil || hops > 4 {
			return nil, cfg, fmt.Errorf("no image for linux/%s in it", goruntime.GOARCH)
		}
		p, err := blob(pick.Digest)
		if err != nil {
			return nil, cfg, err
		}
		index.Manifests = nil
		if err := readJSON(dir, p, pick.Digest, &index); err != nil {
			return nil, cfg, err
		}
	}
	p, err := blob(index.Config.Digest)
	if err != nil {
		return nil, cfg, err
	}
	if err := readJSON(dir, p, index.Config.Digest, &cfg); err != nil {
		return nil, cfg, err
	}
	for _, l := range index.Layers {
		p, err := blob(l.Digest)
		if err != nil {
			return nil, cfg, err
		}
		layers = append(layers, layerFile{path: p, digest: l.Digest})
	}
	return layers, cfg, nil
}

func readDockerSave(dir string) (layers []layerFile, cfg imageConfig, err error) {
	var list []struct {
		Config string
		Layers []string
	}
	if err := readJSON(dir, "manifest.json", "", &list); err != nil {
		return nil, cfg, err
	}
	if len(list) != 1 {
		return nil, cfg, hinted.New(fmt.Errorf("it holds %d images", len(list)), "save one image: docker save NAME:TAG")
	}
	// The file's name is the digest of the configuration.
	digest := ""
	if h := strings.TrimSuffix(filepath.Base(list[0].Config), ".json"); len(h) == 64 {
		digest = "sha256:" + h
	}
	if err := readJSON(dir, list[0].Config, digest, &cfg); err != nil {
		return nil, cfg, err
	}
	for _, l := range list[0].Layers {
		layers = append(layers, layerFile{path: l})
	}
	return layers, cfg, nil
}
