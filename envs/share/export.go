package share

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Formats are what an export can be.
var Formats = []string{"oci", "oci-archive", "tar.zst", "erofs"}

// ExportOptions of an export.
type ExportOptions struct {
	Output      string // a file, for "oci" a directory that is not there yet; "-" is Stdout
	Format      string // of Formats; "" goes by Output's ending
	Compression string // of an image's layers: "gzip" (the default) or "zstd"
	Ref         string // NAME:TAG that loaders call it by; "" is the environment's name
	WithBase    bool
	Bundles     [][]byte // signatures that go along
	Stdout      io.Writer
	Progress    Progress // nil: silence
}

// Exported says what was written.
type Exported struct {
	Digest  string   `json:"digest"`           // the environment's content digest
	Image   string   `json:"image,omitempty"`  // the image manifest's
	Format  string   `json:"format,omitempty"` // of Formats
	Ref     string   `json:"ref,omitempty"`
	Bytes   int64    `json:"bytes,omitempty"`
	Signed  int      `json:"signatures"`
	Remarks []string `json:"remarks,omitempty"`
}

func formatOf(path string) string {
	switch {
	case strings.HasSuffix(path, ".tar.zst"), strings.HasSuffix(path, ".tzst"):
		return "tar.zst"
	case strings.HasSuffix(path, ".tar"), path == "-":
		return "oci-archive"
	case strings.HasSuffix(path, ".erofs"):
		return "erofs"
	}
	return "oci"
}

// Export writes an environment to a file or directory. The same environment
// gives the same bytes with the same options. What was there stays whole until
// the new is.
func Export(ctx context.Context, store *rootfs.Store, m *envs.Manager, e *envs.Env, o ExportOptions) (out *Exported, err error) {
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if o.Format == "" {
		o.Format = formatOf(o.Output)
	}
	release, err := store.Use(ctx, append([]string{e.Path}, e.Lowers...)...)
	if err != nil {
		return nil, err
	}
	defer release()
	out = &Exported{Digest: e.Digest, Format: o.Format}
	if o.Format == "erofs" {
		return out, o.erofs(ctx, store, e, out)
	}
	p, err := gather(store, m, e, o.WithBase)
	if err != nil {
		return nil, fmt.Errorf("export %q: %w", named(e), err)
	}
	if p.lock == nil {
		out.Remarks = append(out.Remarks, "its lock stays here: it has credentials in it, or was not kept")
	}
	p.bundles, out.Signed = o.Bundles, len(o.Bundles)
	if out.Ref, err = refOf(o.Ref, e); err != nil {
		return nil, err
	}
	switch {
	case o.Format == "tar.zst":
		p.record.Names = e.Names
		err = o.writeFile(out, func(w io.Writer) error { return writePlain(ctx, store, p, w, o.Progress) })
	case o.Format == "oci":
		err = o.layout(ctx, store, p, out)
	default:
		err = o.archive(ctx, store, p, out)
	}
	if err != nil {
		return nil, fmt.Errorf("export %q: %w", named(e), err)
	}
	return out, nil
}

func named(e *envs.Env) string {
	if len(e.Names) > 0 {
		return e.Names[0]
	}
	return envs.Short(e.Digest)
}

// refOf gives NAME:TAG, the name and tag of an image, in small letters as all
// tools want it.
func refOf(ref string, e *envs.Env) (string, error) {
	if ref == "" {
		ref = strings.ToLower(strings.Trim(named(e), "._-"))
	}
	name, tag := ref, "latest"
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		name, tag = ref[:i], ref[i+1:]
	}
	ok := name != "" && len(name) <= 255 && tag != "" && len(tag) <= 128 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789._-/:") == "" &&
		strings.Trim(tag, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == "" && tag[0] != '.' && tag[0] != '-' && !strings.Contains(name, "//") && name[0] != '/'
	if !ok {
		return "", hinted.New(fmt.Errorf("image name %q: not NAME:TAG", bounded.Text(ref)), "as web:1 or registry.example/team/web:1, in small letters")
	}
	return name + ":" + tag, nil
}

// index is an image layout's. The signatures are not among the manifests: tools
// that copy or load an image take a layout of one.
func (i *image) index(ref string, names []string) ([]byte, error) {
	d := i.manifest
	_, tag, _ := strings.Cut(ref[strings.LastIndexByte(ref, '/')+1:], ":")
	d.Annotations = map[string]string{v1.AnnotationRefName: tag, "io.containerd.image.name": ref}
	d.Platform = &v1.Platform{Architecture: strings.TrimPrefix(platform(), "linux/"), OS: "linux"}
	x := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{d}}
	if len(names) > 0 {
		x.Annotations = map[string]string{annotationNames: strings.Join(names, " ")}
	}
	if len(i.referrers) > 0 {
		if x.Annotations == nil {
			x.Annotations = map[string]string{}
		}
		var all []string
		for _, r := range i.referrers {
			all = append(all, r.Digest.String())
		}
		x.Annotations[annotationReferrers] = strings.Join(all, " ")
	}
	return json.Marshal(x)
}

// Annotations of a layout's index, which is no part of the image.
const (
	// annotationReferrers lists the manifests that refer to the image.
	annotationReferrers = "io.github.sbxrun.referrers"
	// annotationNames lists the environment's names.
	annotationNames = "io.github.sbxrun.names"
)

const ociLayout = `{"imageLayoutVersion":"1.0.0"}`

// saved is docker's own list of the images in an archive.
func (i *image) saved(ref string) ([]byte, error) {
	type one struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	blob := func(d v1.Descriptor) string { return "blobs/sha256/" + d.Digest.Encoded() }
	s := one{Config: blob(i.config), RepoTags: []string{ref}}
	for _, l := range i.layers {
		s.Layers = append(s.Layers, blob(l))
	}
	return json.Marshal([]one{s})
}

// layout makes the image beside its place and renames it.
func (o *ExportOptions) layout(ctx context.Context, store *rootfs.Store, p *parts, out *Exported) (err error) {
	if o.Output == "-" {
		return hinted.New(errors.New("a layout is a directory"), "--format oci-archive")
	}
	if _, err := os.Lstat(o.Output); err == nil {
		return hinted.New(fmt.Errorf("write %q: it is there", o.Output), "choose another directory")
	}
	dir, err := os.MkdirTemp(filepath.Dir(o.Output), ".sbxrun-export-")
	if err != nil {
		return fmt.Errorf("write %q: %w", o.Output, errors.Unwrap(err))
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	work := filepath.Join(dir, "image")
	i, err := build(ctx, store, p, work, o.Compression, o.Progress)
	if err != nil {
		return err
	}
	x, err := i.index(out.Ref, p.env.Names)
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(filepath.Join(work, "index.json"), x, 0o644), os.WriteFile(filepath.Join(work, "oci-layout"), []byte(ociLayout), 0o644)); err != nil {
		return err
	}
	out.Image = i.manifest.Digest.String()
	for _, b := range append(i.blobs(), i.manifest) {
		out.Bytes += b.Size
	}
	return os.Rename(work, o.Output)
}

// archive writes the layout as one tar file, which docker and podman load too.
func (o *ExportOptions) archive(ctx context.Context, store *rootfs.Store, p *parts, out *Exported) (err error) {
	dir, done, err := store.TempDir("export")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	i, err := build(ctx, store, p, dir, o.Compression, o.Progress)
	if err != nil {
		return store.Explain(err)
	}
	out.Image = i.manifest.Digest.String()
	x, err := i.index(out.Ref, p.env.Names)
	if err != nil {
		return err
	}
	s, err := i.saved(out.Ref)
	if err != nil {
		return err
	}
	return o.writeFile(out, func(to io.Writer) error {
		w := tar.NewWriter(to)
		if err := writeFiles(w, ".", []file{{"oci-layout", []byte(ociLayout)}, {"index.json", x}, {"manifest.json", s}}); err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, b := range append(append(i.blobs(), i.manifest), i.referrers...) {
			name := "blobs/sha256/" + b.Digest.Encoded()
			if seen[name] {
				continue
			}
			seen[name] = true
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: b.Size, ModTime: epoch}); err != nil {
				return err
			}
			if err := copyFrom(w, i.path(b)); err != nil {
				return err
			}
		}
		return w.Close()
	})
}

func copyFrom(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// writeFile writes the output by a temporary name and a rename, so that no half
// of it is taken for the whole.
func (o *ExportOptions) writeFile(out *Exported, write func(io.Writer) error) (err error) {
	if o.Output == "-" {
		c := &counter{w: o.Stdout}
		b := bufio.NewWriterSize(c, 1<<18)
		err := write(b)
		if err == nil {
			err = b.Flush()
		}
		out.Bytes = c.n
		return err
	}
	if st, err := os.Stat(o.Output); err == nil && !st.Mode().IsRegular() {
		return hinted.New(fmt.Errorf("write %q: it is there and no file", o.Output), "choose another name")
	}
	f, name, err := nameless(o.Output)
	if err != nil {
		return fmt.Errorf("write %q: %w", o.Output, err)
	}
	c := &counter{w: f}
	b := bufio.NewWriterSize(c, 1<<18)
	if err = write(b); err == nil {
		err = errors.Join(b.Flush(), f.Chmod(0o644))
	}
	if err == nil && name == "" {
		name = filepath.Join(filepath.Dir(o.Output), fmt.Sprintf(".sbxrun-export-%d", os.Getpid()))
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(name, o.Output)
	}
	if err != nil && name != "" {
		return errors.Join(err, os.Remove(name))
	}
	out.Bytes = c.n
	return err
}

// nameless makes a file beside path that has no name until it is whole, so that a
// kill leaves nothing; where the file system has no such files it has one.
func nameless(path string) (f *os.File, name string, err error) {
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), path), "", nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, "", err
	}
	if f, err = os.CreateTemp(dir, ".sbxrun-export-"); err != nil {
		return nil, "", errors.Unwrap(err)
	}
	return f, f.Name(), nil
}

// erofs writes the environment's own layer as a file system image. That is for
// mounting: it has no record and is not imported.
func (o *ExportOptions) erofs(ctx context.Context, store *rootfs.Store, e *envs.Env, out *Exported) error {
	switch {
	case o.Output == "-":
		return hinted.New(fmt.Errorf("export %q: an EROFS image is no stream", named(e)), "-o FILE")
	case o.WithBase || len(e.Below) > 0:
		return hinted.New(fmt.Errorf("export %q: an EROFS image is one layer, and this would be several", named(e)), "--format oci or tar.zst")
	}
	o.Progress("EROFS image")
	if err := store.WriteEROFS(ctx, e.Digest, o.Output); err != nil {
		return fmt.Errorf("export %q: %w", named(e), err)
	}
	st, err := os.Stat(o.Output)
	if err != nil {
		return fmt.Errorf("export %q: %w", named(e), err)
	}
	out.Bytes = st.Size()
	return nil
}

// writePlain writes one compressed archive: the record, the signatures, then the
// trees of the layers, bottom to top.
func writePlain(ctx context.Context, store *rootfs.Store, p *parts, to io.Writer, progress Progress) error {
	z, err := squeeze(to, "zstd")
	if err != nil {
		return err
	}
	r := p.record
	for _, c := range p.contents {
		_, m, err := store.Layer(c.digest)
		if err != nil {
			return err
		}
		r.Layers = append(r.Layers, plainLayer{c.base, c.digest, len(m.Entries)})
	}
	files, err := p.files(r)
	if err != nil {
		return err
	}
	for n, b := range p.bundles {
		files = append(files, file{fmt.Sprint(n) + bundleNameSuffix, b})
	}
	w := tar.NewWriter(z)
	if err := writeFiles(w, plainDir, files); err != nil {
		return err
	}
	for n, c := range p.contents {
		progress(fmt.Sprintf("layer %d of %d", n+1, len(p.contents)))
		if err := writeStored(ctx, store, w, c.digest); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), z.Close())
}
