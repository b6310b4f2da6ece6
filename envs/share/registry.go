package share

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

// RegistryOptions say how a registry is reached.
type RegistryOptions struct {
	// InsecureHTTP allows plain HTTP; a registry on this machine's loopback needs
	// no word for it.
	InsecureHTTP bool
	// Credentials are files with logins, as docker's config.json and podman's
	// auth.json: the first that knows the registry is heeded.
	Credentials []string
}

// reach gives a client of the repository that ref names.
func (o RegistryOptions) reach(ctx context.Context, ref string) (*remote.Repository, error) {
	r, err := registry.ParseReference(ref)
	if err != nil {
		return nil, hinted.New(fmt.Errorf("registry reference %q: not registry/repository:tag", bounded.Text(ref)), "as registry.example/team/web:1 or …@sha256:<64 hex>")
	}
	repo, err := remote.NewRepository(ref)
	if err != nil {
		return nil, fmt.Errorf("registry reference %q: %w", bounded.Text(ref), err)
	}
	repo.Reference = r
	repo.MaxMetadataBytes, repo.ReferrerListMaxPages = standard.jsonBytes, 16
	repo.ManifestMediaTypes = slices.Concat(indexTypes[1:], manifestTypes[1:])
	repo.SkipReferrersGC = true // deleting is more than many may
	c := newClient(r.Host())
	repo.PlainHTTP = o.InsecureHTTP
	if isLoopback(r.Host()) && !o.InsecureHTTP {
		repo.PlainHTTP = !c.speaksTLS(ctx)
	}
	c.plain = repo.PlainHTTP
	logins, err := openLogins(o.Credentials)
	if err != nil {
		return nil, err
	}
	repo.Client = &auth.Client{
		Client: c.http(), Cache: auth.NewCache(), Header: map[string][]string{"User-Agent": {"sbxrun"}},
		Credential: func(ctx context.Context, hostport string) (auth.Credential, error) {
			return logins.of(ctx, hostport, r)
		},
	}
	return repo, nil
}

const loginHint = "log in with docker login, podman login or skopeo login: their files are read; may this user do it?"

// describe puts what a registry or the way to it says into one line, without
// URLs: their queries can be as good as credentials.
func describe(err error) (msg, hint string) {
	var resp *errcode.ErrorResponse
	switch {
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		return "the registry wants a login, and there is none for it", loginHint
	case errors.As(err, &resp) && (resp.StatusCode == 401 || resp.StatusCode == 403):
		return fmt.Sprintf("the registry refuses it (%d%s)", resp.StatusCode, said(resp)), loginHint
	case errors.As(err, &resp):
		return fmt.Sprintf("the registry answers %d%s", resp.StatusCode, said(resp)), ""
	case errors.Is(err, errdef.ErrNotFound):
		return "not found", "is the name right, and the tag?"
	}
	return networkError(err, hinted.Of(err))
}

// remoteError is an error in those words; [transient] still knows its cause.
type remoteError struct {
	msg, hint string
	cause     error
}

func (e *remoteError) Error() string { return e.msg }
func (e *remoteError) Hint() string  { return e.hint }
func (e *remoteError) Unwrap() error { return e.cause }

func remotely(err error) error {
	msg, hint := describe(err)
	return &remoteError{msg, hint, err}
}

func said(r *errcode.ErrorResponse) string {
	if len(r.Errors) == 0 {
		return ""
	}
	return ": " + bounded.Text(r.Errors[0].Code+" "+r.Errors[0].Message)
}

// PushOptions of a push.
type PushOptions struct {
	RegistryOptions
	Ref         string // registry/repository:tag
	Compression string
	WithBase    bool
	Bundles     [][]byte
	Progress    Progress
}

// Push sends an environment to a registry, as the image that an export is, and
// its signatures as artifacts that refer to it.
func Push(ctx context.Context, store *rootfs.Store, m *envs.Manager, e *envs.Env, o PushOptions) (out *Exported, err error) {
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	repo, err := o.reach(ctx, o.Ref)
	if err != nil {
		return nil, err
	}
	tag := repo.Reference.ReferenceOrDefault()
	if repo.Reference.ValidateReferenceAsTag() != nil && repo.Reference.Reference != "" {
		return nil, hinted.New(fmt.Errorf("push %q: a digest is no name to push to", bounded.Text(o.Ref)), "registry/repository:tag")
	}
	release, err := store.Use(ctx, append([]string{e.Path}, e.Lowers...)...)
	if err != nil {
		return nil, err
	}
	defer release()
	p, err := gather(store, m, e, o.WithBase)
	if err != nil {
		return nil, fmt.Errorf("push %q: %w", named(e), err)
	}
	p.bundles = o.Bundles
	dir, done, err := store.TempDir("push")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	i, err := build(ctx, store, p, dir, o.Compression, o.Progress)
	if err != nil {
		return nil, fmt.Errorf("push %q: %w", named(e), store.Explain(err))
	}
	out = &Exported{Digest: e.Digest, Image: i.manifest.Digest.String(), Ref: repo.Reference.Registry + "/" + repo.Reference.Repository + ":" + tag, Signed: len(p.bundles)}
	if p.lock == nil {
		out.Remarks = append(out.Remarks, "its lock stays here: it has credentials in it, or was not kept")
	}
	for n, b := range i.blobs() {
		o.Progress(fmt.Sprintf("push %d of %d", n+1, len(i.blobs())))
		if err := pushBlob(ctx, repo, i, b); err != nil {
			return nil, fmt.Errorf("push %q: %w", bounded.Text(o.Ref), remotely(err))
		}
		out.Bytes += b.Size
	}
	for n, d := range append([]v1.Descriptor{i.manifest}, i.referrers...) {
		to := tag
		if n > 0 {
			to = d.Digest.String()
		}
		f, err := os.Open(i.path(d))
		if err != nil {
			return nil, err
		}
		err = repo.PushReference(ctx, d, f, to)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("push %q: %w", bounded.Text(o.Ref), remotely(err))
		}
	}
	return out, nil
}

// attempts is how often a transfer that broke off is taken up again.
const attempts = 4

func pushBlob(ctx context.Context, repo *remote.Repository, i *image, d v1.Descriptor) error {
	for n := 1; ; n++ {
		there, err := repo.Blobs().Exists(ctx, d)
		if err == nil && there {
			return nil
		}
		if err == nil {
			var f *os.File
			if f, err = os.Open(i.path(d)); err != nil {
				return err
			}
			err = repo.Blobs().Push(ctx, d, f)
			f.Close()
			if err == nil {
				return nil
			}
		}
		if n == attempts || !transient(ctx, err) {
			return err
		}
		wait(ctx, n)
	}
}

// transient says whether trying again may help.
func transient(ctx context.Context, err error) bool {
	var resp *errcode.ErrorResponse
	if errors.As(err, &resp) {
		return resp.StatusCode >= 500 || resp.StatusCode == 429 || resp.StatusCode == 408
	}
	for _, final := range []error{errdef.ErrNotFound, errRefused, auth.ErrBasicCredentialNotFound, syscall.ECONNREFUSED} {
		if errors.Is(err, final) {
			return false
		}
	}
	return ctx.Err() == nil
}

func wait(ctx context.Context, n int) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(n*n) * 200 * time.Millisecond):
	}
}

// Pull takes an environment in from a registry. Where ref is by digest, so is what
// is taken.
func Pull(ctx context.Context, store *rootfs.Store, m *envs.Manager, o ImportOptions, r RegistryOptions) (*Taken, error) {
	repo, err := r.reach(ctx, o.Source)
	if err != nil {
		return nil, err
	}
	ref := repo.Reference
	from := ref.Registry + "/" + ref.Repository + ":" + ref.ReferenceOrDefault()
	if ref.ValidateReferenceAsDigest() == nil {
		from = ref.Registry + "/" + ref.Repository + "@" + ref.Reference
	}
	return importing(ctx, store, m, o, "pull", from, func(t *taking) error {
		p, err := readRemote(ctx, repo, t.lim)
		if err != nil {
			return err
		}
		return t.image(ctx, p)
	})
}

// readRemote reads an image's description from a registry.
func readRemote(ctx context.Context, repo *remote.Repository, lim limits) (*packed, error) {
	ref := repo.Reference.ReferenceOrDefault()
	d, rc, err := repo.Manifests().FetchReference(ctx, ref)
	if err != nil {
		return nil, remotely(err)
	}
	text, err := readAll(rc, d, lim.jsonBytes)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if repo.Reference.ValidateReferenceAsDigest() == nil {
		if err := same(text, ref); err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
	}
	found := d
	fetch := func(d v1.Descriptor) ([]byte, error) {
		if !isDigest(string(d.Digest)) {
			return nil, fmt.Errorf("digest %q is not sha256:<64 hex>", bounded.Text(string(d.Digest)))
		}
		from := repo.Blobs()
		if slices.Contains(repo.ManifestMediaTypes, d.MediaType) {
			found, from = d, repo.Manifests()
		}
		rc, err := from.Fetch(ctx, d)
		if err != nil {
			return nil, remotely(err)
		}
		return readAll(rc, d, lim.jsonBytes)
	}
	man, err := findManifest(text, fetch)
	if err != nil {
		return nil, err
	}
	p := &packed{}
	if p.config, err = fetch(man.Config); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	for _, l := range man.Layers {
		p.layers = append(p.layers, blob{string(l.Digest), l.Size, func(ctx context.Context) (io.ReadCloser, error) {
			return openRemote(ctx, repo, l)
		}})
	}
	p.bundles = func(ctx context.Context) ([][]byte, error) { return remoteBundles(ctx, repo, found, lim) }
	return p, nil
}

// readAll reads a small blob and compares it with its descriptor.
func readAll(rc io.ReadCloser, d v1.Descriptor, limit int64) ([]byte, error) {
	defer rc.Close()
	if d.Size > limit {
		return nil, fmt.Errorf("%d bytes: %w", d.Size, errTooMuch)
	}
	b, err := readBounded(&exactly{rc, d.Size}, limit)
	if err != nil {
		return nil, err
	}
	return b, same(b, string(d.Digest))
}

// remoteBundles gives the signatures that refer to an image.
func remoteBundles(ctx context.Context, repo *remote.Repository, image v1.Descriptor, lim limits) (out [][]byte, err error) {
	var refer []v1.Descriptor
	err = repo.Referrers(ctx, image, bundleType, func(ds []v1.Descriptor) error {
		if refer = append(refer, ds...); len(refer) > lim.bundles {
			return fmt.Errorf("over %d signatures: %w", lim.bundles, errTooMuch)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("signatures: %w", remotely(err))
	}
	for _, d := range refer {
		rc, err := repo.Manifests().Fetch(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("signatures: %w", remotely(err))
		}
		b, err := readAll(rc, d, lim.jsonBytes)
		if err != nil {
			return nil, fmt.Errorf("signatures: %w", err)
		}
		var m v1.Manifest
		if json.Unmarshal(b, &m) != nil || m.Subject == nil || m.Subject.Digest != image.Digest {
			return nil, errors.New("signatures: one is of another image")
		}
		layer, err := bundleOf(b)
		if err != nil {
			return nil, err
		}
		if rc, err = repo.Blobs().Fetch(ctx, layer); err != nil {
			return nil, fmt.Errorf("signatures: %w", remotely(err))
		}
		if b, err = readAll(rc, layer, lim.bundleBytes); err != nil {
			return nil, fmt.Errorf("signatures: %w", err)
		}
		out = append(out, b)
	}
	return out, nil
}

// remoteBlob reads a blob and takes it up again where the connection broke.
type remoteBlob struct {
	ctx    context.Context
	repo   *remote.Repository
	d      v1.Descriptor
	rc     io.ReadCloser
	offset int64
	tries  int
	cancel context.CancelFunc
	stall  *time.Timer
}

// stallTime is how long a registry may be silent.
const stallTime = 60 * time.Second

func openRemote(ctx context.Context, repo *remote.Repository, d v1.Descriptor) (io.ReadCloser, error) {
	b := &remoteBlob{ctx: ctx, repo: repo, d: d}
	return b, b.connect()
}

func (b *remoteBlob) connect() error {
	ctx, cancel := context.WithCancel(b.ctx)
	rc, err := b.repo.Blobs().Fetch(ctx, b.d)
	if err == nil && b.offset > 0 {
		if s, ok := rc.(io.Seeker); ok {
			_, err = s.Seek(b.offset, io.SeekStart)
		} else {
			_, err = io.CopyN(io.Discard, rc, b.offset)
		}
		if err != nil {
			rc.Close()
		}
	}
	if err != nil {
		cancel()
		return remotely(err)
	}
	b.rc, b.cancel, b.stall = rc, cancel, time.AfterFunc(stallTime, cancel)
	return nil
}

func (b *remoteBlob) Read(p []byte) (int, error) {
	for {
		if b.rc == nil {
			if err := b.connect(); err != nil {
				if b.tries++; b.tries >= attempts || !transient(b.ctx, err) {
					return 0, err
				}
				wait(b.ctx, b.tries)
				continue
			}
		}
		b.stall.Reset(stallTime)
		n, err := b.rc.Read(p)
		b.offset += int64(n)
		if errors.Is(err, io.EOF) && b.offset < b.d.Size && b.tries+1 < attempts {
			err = io.ErrUnexpectedEOF // the connection's end, not the blob's
		}
		if err == nil || errors.Is(err, io.EOF) || b.ctx.Err() != nil {
			return n, err
		}
		b.Close()
		if b.tries++; b.tries >= attempts {
			return n, remotely(err)
		}
		wait(b.ctx, b.tries)
		if n > 0 {
			return n, nil
		}
	}
}

func (b *remoteBlob) Close() error {
	if b.rc == nil {
		return nil
	}
	b.stall.Stop()
	err := b.rc.Close()
	b.cancel()
	b.rc = nil
	return err
}
