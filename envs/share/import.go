package share

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

// ImportOptions of an import or a pull.
type ImportOptions struct {
	Source string // a file or directory; for a pull registry/repository:tag or @sha256:…
	Name   string // "": a name of where it comes from, if it has one and nothing here has it
	Digest string // the content digest that it must have; "" is any
	Verify Verifier
	// Keep stores a signature for a content digest, unverified; nil drops them.
	Keep     func(digest string, bundle []byte) error
	Progress Progress // nil: silence
}

// Taken says what was imported.
type Taken struct {
	Digest  string   `json:"digest"`
	Key     string   `json:"key"`
	Names   []string `json:"names,omitempty"`
	Base    string   `json:"base"`
	From    string   `json:"from"`
	Signed  int      `json:"signatures"`
	Remarks []string `json:"remarks,omitempty"`
}

// taking is an import under way.
type taking struct {
	o        ImportOptions
	lim      limits
	store    *rootfs.Store
	m        *envs.Manager
	g        *rootfs.Staging
	verb     string // of errors
	from     string // as policies know it
	record   *record
	lock     []byte
	contents []content
	bundles  [][]byte
	base     *rootfs.Manifest   // nil: none came along, or it is here already
	layers   []*rootfs.Manifest // what is not here yet
}

// Import takes an environment in from a file or directory. Nothing of it is
// published unless every byte is what the content digests say.
func Import(ctx context.Context, store *rootfs.Store, m *envs.Manager, o ImportOptions) (out *Taken, err error) {
	from := o.Source
	if abs, aerr := filepath.Abs(o.Source); aerr == nil {
		from = abs
	}
	return importing(ctx, store, m, o, "import", "file:"+from, func(t *taking) error { return t.read(ctx, o.Source) })
}

// importing runs read, which collects an environment, and publishes it.
func importing(ctx context.Context, store *rootfs.Store, m *envs.Manager, o ImportOptions, verb, from string, read func(*taking) error) (out *Taken, err error) {
	if o.Digest != "" && !isDigest(o.Digest) {
		return nil, hinted.New(fmt.Errorf("digest %q: not sha256:<64 hex>", bounded.Text(o.Digest)), "the content digest that env list and env export give")
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	t := &taking{o: o, verb: verb, lim: standard, store: store, m: m, from: from}
	if t.g, err = store.Stage(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.g.Close()) }()
	if err := read(t); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, hinted.New(fmt.Errorf("%s %q: %w", verb, bounded.Text(o.Source), store.Explain(err)), hinted.Of(err))
	}
	return t.publish(ctx)
}

// read collects what a file or directory holds.
func (t *taking) read(ctx context.Context, source string) error {
	st, err := os.Stat(source)
	if err != nil {
		return errors.Unwrap(err)
	}
	if st.IsDir() {
		d, err := os.Open(source)
		if err != nil {
			return errors.Unwrap(err)
		}
		defer d.Close()
		p, err := readImage(directory{d}, t.lim)
		if err != nil {
			return err
		}
		return t.image(ctx, p)
	}
	if !st.Mode().IsRegular() {
		return errors.New("neither a file nor a directory")
	}
	f, err := os.Open(source)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer f.Close()
	if st.Size() == 0 {
		return errors.New("not an archive: it is empty")
	}
	u, err := unpack(ctx, f, t.lim)
	if err != nil {
		return err
	}
	defer u.z.Close()
	tr := tar.NewReader(u)
	h, err := tr.Next()
	if err != nil {
		return hinted.New(fmt.Errorf("not an archive: %w", err), "an OCI layout, an archive of one, docker save's, or what env export wrote")
	}
	if strings.TrimSuffix(h.Name, "/") == plainDir {
		return t.plain(u, tr)
	}
	if u.compressed {
		if f, err = t.spool(ctx, f); err != nil {
			return err
		}
		defer f.Close()
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	a, err := openArchive(f)
	if err != nil {
		return err
	}
	p, err := readImage(a, t.lim)
	if err != nil {
		return err
	}
	return t.image(ctx, p)
}

// spool unpacks a compressed archive of an image, whose parts are not read in
// the order they are in.
func (t *taking) spool(ctx context.Context, f *os.File) (*os.File, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	u, err := unpack(ctx, f, t.lim)
	if err != nil {
		return nil, err
	}
	defer u.z.Close()
	out, err := os.OpenFile(filepath.Join(t.g.Dir(), "archive.tar"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(out, u); err != nil {
		return nil, errors.Join(err, out.Close())
	}
	return out, nil
}

// accept judges the record, before any content is read.
func (t *taking) accept(ctx context.Context) error {
	e := &t.record.Env
	if t.o.Digest != "" && e.Digest != t.o.Digest {
		return hinted.New(fmt.Errorf("it is environment %s, not %s", e.Digest, t.o.Digest), "another file or tag, or somebody changed it")
	}
	if !isDigest(e.Digest) || !isDigest(e.Lock) {
		return errors.New("the record has no digests")
	}
	for _, d := range e.Below {
		if !isDigest(d) {
			return errors.New("the record has no digests")
		}
	}
	if err := t.record.agrees(t.contents); err != nil {
		return err
	}
	i := t.imported()
	if err := i.Check(); err != nil {
		return fmt.Errorf("the record: %w", err)
	}
	for _, b := range t.bundles {
		if int64(len(b)) > t.lim.bundleBytes {
			return fmt.Errorf("a signature of %d bytes: %w", len(b), errTooMuch)
		}
	}
	if t.o.Verify == nil {
		return nil
	}
	judged := e.Portable()
	if t.contents[0].base { // what it runs with is not the content alone
		judged.BaseVars = append([]string{}, t.record.BaseEnv...)
	}
	judged.Origin = &envs.Origin{From: t.from, At: time.Now().UTC()}
	return t.o.Verify(ctx, &judged, t.bundles)
}

func (t *taking) imported() envs.Imported {
	return envs.Imported{
		Env: t.record.Env.Portable(), LockKind: t.record.LockKind, Lock: t.lock, From: t.from,
		Name: t.o.Name, Offered: t.record.Names, Layers: t.layers,
	}
}

// image collects an environment from an image.
func (t *taking) image(ctx context.Context, p *packed) error {
	var c v1.Image
	if err := json.Unmarshal(p.config, &c); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if c.Config.Labels[labelLayers] == "" {
		return notOurs(errors.New("an image, but not one of an environment"))
	}
	if err := samePlatform(c.OS + "/" + c.Architecture); err != nil {
		return err
	}
	var err error
	if t.contents, err = parseLabel(c.Config.Labels[labelLayers]); err != nil {
		return err
	}
	n := len(t.contents)
	if len(p.layers) != n+1 || len(c.RootFS.DiffIDs) != n+1 {
		return fmt.Errorf("%d layers and %d digests, where it says %d", len(p.layers), len(c.RootFS.DiffIDs), n+1)
	}
	var files map[string][]byte
	err = t.layer(ctx, p.layers[n], string(c.RootFS.DiffIDs[n]), func(tr *tar.Reader) error {
		files, err = readFiles(tr, t.lim, recordDir, recordName, lockName)
		return err
	})
	if err != nil {
		return fmt.Errorf("layer %d (the record): %w", n+1, err)
	}
	if t.record, t.lock, err = decodeRecord(files); err != nil {
		return fmt.Errorf("layer %d (the record): %w", n+1, err)
	}
	t.record.Names, t.record.Layers = p.names, nil
	if t.record.Env.Digest != c.Config.Labels[labelDigest] {
		return errors.New("the record and the label are of different environments")
	}
	if t.bundles, err = p.bundles(ctx); err != nil {
		return err
	}
	if err := t.accept(ctx); err != nil {
		return err
	}
	for k, l := range t.contents {
		if t.have(l) {
			continue
		}
		t.o.Progress(fmt.Sprintf("layer %d of %d", k+1, n))
		var m *rootfs.Manifest
		err := t.layer(ctx, p.layers[k], string(c.RootFS.DiffIDs[k]), func(tr *tar.Reader) (err error) {
			m, err = (&entries{tr: tr, lim: t.lim}).tree(-1, t.g.Put)
			return err
		})
		if err == nil {
			err = t.add(l, m)
		}
		if err != nil {
			return fmt.Errorf("layer %d: %w", k+1, err)
		}
	}
	return nil
}

// have says whether a layer is in the store already.
func (t *taking) have(l content) bool {
	if l.base {
		_, ok := t.store.BaseOf(l.digest)
		return ok
	}
	_, err := t.store.LayerPath(l.digest)
	return err == nil
}

// add takes a layer that was read, if its content is what it should be.
func (t *taking) add(l content, m *rootfs.Manifest) error {
	if got := m.Digest(); got != l.digest {
		return fmt.Errorf("its content is %s, not %s", got, l.digest)
	}
	if err := m.Check(); err != nil {
		return err
	}
	if l.base {
		t.base = m
	} else {
		t.layers = append(t.layers, m)
	}
	return nil
}

// layer reads a layer's archive and compares what was read with its digests.
func (t *taking) layer(ctx context.Context, b blob, diffID string, read func(*tar.Reader) error) error {
	r, err := b.open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	var in io.Reader = r
	if b.size >= 0 {
		in = &exactly{r, b.size}
	}
	u, err := unpack(ctx, in, t.lim)
	if err != nil {
		return err
	}
	defer u.z.Close()
	if err := read(tar.NewReader(u)); err != nil {
		return err
	}
	if err := u.finish(); err != nil {
		return err
	}
	if got := sum(u.packed); b.digest != "" && got != b.digest {
		return fmt.Errorf("its digest is %s, not %s", got, b.digest)
	}
	if got := sum(u.plain); got != diffID {
		return fmt.Errorf("its uncompressed digest is %s, not %s", got, bounded.Text(diffID))
	}
	return nil
}

// exactly is a stream of that many bytes.
type exactly struct {
	r    io.Reader
	left int64
}

var (
	errTooLong  = errors.New("more bytes than it should have")
	errTooShort = errors.New("it ends early")
)

func (e *exactly) Read(p []byte) (int, error) {
	if e.left == 0 {
		var b [1]byte
		n, err := e.r.Read(b[:])
		if n > 0 {
			return 0, errTooLong
		}
		return 0, err
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	if errors.Is(err, io.EOF) && e.left > 0 {
		err = errTooShort
	} else if errors.Is(err, io.EOF) && n > 0 {
		err = nil
	}
	return n, err
}

// plain collects an environment from a plain archive, whose first directory was
// just read.
func (t *taking) plain(u *unpacked, tr *tar.Reader) error {
	files := map[string][]byte{}
	var h *tar.Header
	var name string
	var err error
	for {
		if h, name, err = nextEntry(tr, t.lim); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		rest, ok := strings.CutPrefix(name, plainDir+"/")
		if !ok {
			break
		}
		signature := strings.HasSuffix(rest, bundleNameSuffix)
		if h.Typeflag != tar.TypeReg || rest != recordName && rest != lockName && !signature || files[rest] != nil || len(files) > t.lim.bundles+2 {
			return fmt.Errorf("read archive: %q: does not belong there", bounded.Text(name))
		}
		limit := t.lim.recordBytes
		if signature {
			limit = t.lim.bundleBytes
		}
		b, err := readBounded(tr, limit)
		if err != nil {
			return fmt.Errorf("read archive: %q: %w", bounded.Text(name), err)
		}
		if files[rest] = b; signature {
			t.bundles = append(t.bundles, b)
		}
	}
	if t.record, t.lock, err = decodeRecord(files); err != nil {
		return err
	}
	if len(t.record.Layers) > t.lim.layers || len(t.record.Names) > maxNames {
		return fmt.Errorf("%d layers, %d names: %w", len(t.record.Layers), len(t.record.Names), errTooMuch)
	}
	for _, l := range t.record.Layers {
		if !isDigest(l.Digest) || l.Entries < 0 || l.Entries > t.lim.entries {
			return fmt.Errorf("%s: a layer of %d entries: out of range", recordName, l.Entries)
		}
		t.contents = append(t.contents, content{l.Base, l.Digest})
	}
	if err := t.accept(u.ctx); err != nil {
		return err
	}
	next := &entries{tr, t.lim, h, name}
	for k, l := range t.record.Layers {
		t.o.Progress(fmt.Sprintf("layer %d of %d", k+1, len(t.record.Layers)))
		put := t.g.Put
		skip := t.have(t.contents[k])
		if skip {
			put = func(io.Reader, bool) (string, int64, error) { return "", 0, nil }
		}
		m, err := next.tree(l.Entries, put)
		if err == nil && !skip {
			err = t.add(t.contents[k], m)
		}
		if err != nil {
			return fmt.Errorf("layer %d: %w", k+1, err)
		}
	}
	if _, _, err := next.next(); !errors.Is(err, io.EOF) {
		return errors.Join(errors.New("read archive: entries that are of no layer"), err)
	}
	return u.finish()
}

// publish names everything, when all of it is right.
func (t *taking) publish(ctx context.Context) (*Taken, error) {
	t.o.Progress("publish")
	i := t.imported()
	e := &i.Env
	added := ""
	if t.base != nil {
		b, err := t.g.AddBaseLayer(ctx, e.Base, t.from, t.record.BaseEnv, t.base)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", t.verb, bounded.Text(t.o.Source), err)
		}
		added = b.Name
	}
	if t.contents[0].base || e.Base != "host" { // its base is the one of this content, whatever that is called here
		if b, ok := t.store.BaseOf(e.BaseDigest); ok {
			e.Base = b.Name
		}
	}
	for _, b := range t.bundles {
		if t.o.Keep == nil {
			break
		}
		if err := t.o.Keep(e.Digest, b); err != nil {
			return nil, fmt.Errorf("%s %q: %w", t.verb, bounded.Text(t.o.Source), err)
		}
	}
	env, notes, err := t.m.Import(ctx, t.g, i)
	if err != nil {
		if added != "" {
			err = errors.Join(err, t.store.RemoveBase(added))
		}
		return nil, hinted.New(fmt.Errorf("%s %q: %w", t.verb, bounded.Text(t.o.Source), t.store.Explain(err)), hinted.Of(err))
	}
	out := &Taken{Digest: env.Digest, Key: env.Key, Names: env.Names, Base: env.Base, From: t.from, Signed: len(t.bundles), Remarks: notes}
	if added != "" {
		out.Remarks = append(out.Remarks, fmt.Sprintf("its base came along: %s", added))
	}
	if fits := t.m.Fits(env); fits != "" {
		out.Remarks = append(out.Remarks, fits)
	}
	if t.lock == nil {
		out.Remarks = append(out.Remarks, "its lock did not come along")
	}
	return out, nil
}
