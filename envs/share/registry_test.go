package share

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"oras.land/oras-go/v2/registry"
)

// liar is a registry that serves one image from a layout; lie, where it answers a
// request itself, says true.
type liar struct {
	dir   string
	index string // digest of the manifest that tag 1 is
	lie   func(w http.ResponseWriter, r *http.Request) bool
	seen  []string
}

func newLiar(t *testing.T, dir string) (*liar, string) {
	t.Helper()
	l := &liar{dir: dir}
	b, err := readFile(directoryAt(t, dir), "index.json", "", 1<<20)
	require.NoError(t, err)
	m := b[strings.Index(string(b), "sha256:"):]
	l.index = string(m[:71])
	s := httptest.NewServer(l)
	t.Cleanup(s.Close)
	return l, strings.TrimPrefix(s.URL, "http://")
}

func directoryAt(t *testing.T, dir string) directory {
	t.Helper()
	f, err := os.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return directory{f}
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.seen = append(l.seen, r.URL.Path)
	if l.lie != nil && l.lie(w, r) {
		return
	}
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	switch {
	case strings.Contains(r.URL.Path, "/referrers/"):
		w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
		fmt.Fprintf(w, `{"schemaVersion":2,"mediaType":"%s","manifests":[]}`, v1.MediaTypeImageIndex)
		return
	case name == "1":
		name = l.index
	}
	if strings.Contains(r.URL.Path, "/manifests/") {
		w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
	}
	w.Header().Set("Docker-Content-Digest", name)
	http.ServeFile(w, r, filepath.Join(l.dir, "blobs", "sha256", strings.TrimPrefix(name, "sha256:"))) // heeds Range
}

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

func pullRefused(t *testing.T, ref, says string, o RegistryOptions) {
	t.Helper()
	s, m := testStore(t)
	_, err := Pull(context.Background(), s, m, ImportOptions{Source: ref, Name: "evil"}, o)
	require.ErrorContains(t, err, says)
	require.True(t, strings.HasPrefix(err.Error(), "pull "), err.Error())
	require.NotContains(t, err.Error(), "\n")
	require.NotContains(t, err.Error(), "s3cret")
	clean(t, s)
}

func TestLyingRegistriesAreFoundOut(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Error("reached: " + r.URL.Path) }))
	t.Cleanup(other.Close)
	image := forge(t, steps{})
	for name, c := range map[string]struct {
		lie  func(l *liar, w http.ResponseWriter, r *http.Request) bool
		says string
	}{
		"another blob": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r) {
				fmt.Fprint(w, "{}")
			}
			return isBlob(r)
		}, "mismatch Content-Length"},
		"other bytes of the same length": {func(l *liar, w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r) {
				return false
			}
			b, err := os.ReadFile(filepath.Join(l.dir, "blobs", "sha256", r.URL.Path[strings.LastIndexByte(r.URL.Path, ':')+1:]))
			b[len(b)/2] ^= 1
			_, _ = w.Write(b)
			return err == nil
		}, "its digest is"},
		"bytes without end": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			for isBlob(r) {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return true
				}
			}
			return false
		}, "more bytes than it should have"},
		"a blob that always breaks off": {func(l *liar, w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r) {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(size(l, r)))
			_, _ = w.Write([]byte("\x1f\x8b"))
			return true
		}, "unexpected EOF"},
		"another manifest than the digest": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
			fmt.Fprint(w, `{"schemaVersion":2}`)
			return true
		}, ""},
		"a manifest without end": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
			for r.Method == http.MethodGet {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return true
				}
			}
			return true
		}, ""},
		"a page": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>log in</html>")
			return true
		}, "read manifest"},
		"a redirect to another server here": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, other.URL+"/x?token=s3cret", http.StatusTemporaryRedirect)
			return true
		}, "the registry leads to 127.0.0.1:"},
		"a redirect to plain HTTP": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://example.invalid/x?token=s3cret", http.StatusFound)
			return true
		}, "by plain HTTP: refused"},
		"a redirect to the metadata of a cloud": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "https://169.254.169.254/latest", http.StatusFound)
			return true
		}, "on this machine or its link: refused"},
		"a realm on this machine": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+strings.Replace(other.URL, "127.0.0.1", "localhost", 1)+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}, ""},
		"an error of many words": {func(_ *liar, w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":"%s"}]}`, strings.Repeat("no ", 2000))
			return true
		}, "the registry refuses it (403: DENIED no no"},
	} {
		t.Run(name, func(t *testing.T) {
			l, host := newLiar(t, image)
			l.lie = func(w http.ResponseWriter, r *http.Request) bool { return c.lie(l, w, r) }
			login := filepath.Join(t.TempDir(), "config.json")
			require.NoError(t, os.WriteFile(login, []byte(`{"auths":{"`+host+`":{"auth":"`+base64.StdEncoding.EncodeToString([]byte("me:s3cret"))+`"}}}`), 0o600))
			o := RegistryOptions{Credentials: []string{login}}
			pullRefused(t, host+"/team/web:1", c.says, o)
			if strings.HasPrefix(name, "another manifest") {
				c.says = "digest" // that a tag is anything is no lie
			}
			if name != "a page" {
				pullRefused(t, host+"/team/web@"+l.index, c.says, o)
			}
		})
	}
}

func size(l *liar, r *http.Request) int64 {
	st, err := os.Stat(filepath.Join(l.dir, "blobs", "sha256", r.URL.Path[strings.LastIndexByte(r.URL.Path, ':')+1:]))
	if err != nil {
		return 0
	}
	return st.Size()
}

func TestForgeriesFromRegistriesAreRefused(t *testing.T) {
	for says, s := range map[string]steps{
		"its content is sha256:": {layer: func(f *forged) { f.content = contentOf(f.layer); f.layer = more(f.layer) }},
		"it is for linux/s390x":  {config: func(f *forged) { f.config.Architecture = "s390x" }},
		"layer 1 of media type":  {manifest: func(f *forged) { f.manifest.Layers[0].MediaType = "text/plain" }},
		"out of range":           {manifest: func(f *forged) { f.manifest.Layers[0].Digest = digest.Digest("sha256:../../x") }},
	} {
		_, host := newLiar(t, forge(t, s))
		pullRefused(t, host+"/team/web:1", says, RegistryOptions{})
	}
}

// A connection that breaks is taken up where it broke.
func TestAPullIsResumed(t *testing.T) {
	l, host := newLiar(t, forge(t, layerOf()))
	var broken, ranges atomic.Int32
	l.lie = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			ranges.Add(1)
		}
		if !isBlob(r) || broken.Load() >= 2 || size(l, r) < 200 || r.Header.Get("Range") != "" {
			return false
		}
		b, err := os.ReadFile(filepath.Join(l.dir, "blobs", "sha256", r.URL.Path[strings.LastIndexByte(r.URL.Path, ':')+1:]))
		if err != nil || b[0] != 0x1f {
			return false // the configuration: small, and asked for again by who wants it
		}
		broken.Add(1)
		w.Header().Set("Accept-Ranges", "bytes")
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b[:100])
		return true
	}
	s, m := testStore(t)
	_, err := Pull(context.Background(), s, m, ImportOptions{Source: host + "/team/web:1", Name: "web"}, RegistryOptions{})
	require.NoError(t, err)
	require.Positive(t, broken.Load())
	require.Positive(t, ranges.Load())
	e, err := m.Get("web")
	require.NoError(t, err)
	require.Equal(t, host+"/team/web:1", e.Origin.From)
	// Nothing of a layer is fetched twice.
	l.seen = nil
	_, err = Pull(context.Background(), s, m, ImportOptions{Source: host + "/team/web:1"}, RegistryOptions{})
	require.NoError(t, err)
	require.LessOrEqual(t, strings.Count(strings.Join(l.seen, " "), "/blobs/"), 2, "configuration and record")
}

func TestWhereARegistryMayLead(t *testing.T) {
	c := newClient("registry.example")
	for to, ok := range map[string]bool{
		"https://registry.example/v2/": true, "https://cdn.example/x": true, "https://10.0.0.1/x": true,
		"http://registry.example/v2/": false, "http://cdn.example/": false, "https://127.0.0.1/": false, "https://[::1]/": false,
		"https://[::ffff:127.0.0.1]/": false, "https://169.254.169.254/": false, "https://0.0.0.0/": false, "https://[fe80::1]/": false, "https://224.0.0.1/": false,
	} {
		u, err := url.Parse(to)
		require.NoError(t, err)
		passed := false
		_, err = c.roundTrip(roundTripper(func(*http.Request) (*http.Response, error) { passed = true; return nil, nil }), &http.Request{URL: u})
		require.Equal(t, ok, passed, to)
		if !ok {
			require.ErrorIs(t, err, errRefused)
		}
	}
	// A name that leads to this machine is refused when it is dialled.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	_, err = c.dial(context.Background(), "tcp", "localhost:"+port)
	require.ErrorIs(t, err, errRefused)
	require.True(t, near(netip.MustParseAddr("::ffff:169.254.1.1")))
}

func TestLogins(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(p, []byte(text), 0o600))
		return p
	}
	auth := func(user string) string { return base64.StdEncoding.EncodeToString([]byte(user + ":pw")) }
	podman := write("auth.json", `{"auths":{"r.example/team":{"auth":"`+auth("team")+`"},"r.example":{"auth":"`+auth("all")+`"}}}`)
	docker := write("config.json", `{"auths":{"r.example":{"auth":"`+auth("docker")+`"},"o.example":{"auth":"`+auth("other")+`"}}}`)
	l, err := openLogins([]string{filepath.Join(dir, "none"), podman, docker})
	require.NoError(t, err)
	for ref, want := range map[string]string{
		"r.example/team/web:1": "team", "r.example/team/a/b": "team", "r.example/teams/web": "all", "o.example/x": "other", "n.example/x": "",
	} {
		r, err := registry.ParseReference(ref)
		require.NoError(t, err)
		c, err := l.of(context.Background(), r.Host(), r)
		require.NoError(t, err)
		require.Equal(t, want, c.Username, ref)
	}
	_, err = openLogins([]string{write("helper", `{"credsStore":"../../tmp/evil"}`)})
	require.ErrorContains(t, err, "a helper with a slash")
	_, err = openLogins([]string{write("broken", `{"auths": s3cret`)})
	require.ErrorContains(t, err, "not JSON")
	require.NotContains(t, err.Error(), "s3cret")
}

func TestARegistryWithTLSOnLoopback(t *testing.T) {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "https://")
	pullRefused(t, host+"/team/web:1", "signed by an authority that is not trusted here", RegistryOptions{})
	pullRefused(t, host+"/team/web:1", "", RegistryOptions{InsecureHTTP: true}) // is what was asked for
}

func TestPlainHTTPNeedsAWord(t *testing.T) {
	c := newClient("registry.example")
	c.plain = true
	u, err := url.Parse("http://registry.example/v2/")
	require.NoError(t, err)
	passed := false
	_, _ = c.roundTrip(roundTripper(func(*http.Request) (*http.Response, error) { passed = true; return nil, nil }), &http.Request{URL: u})
	require.True(t, passed)
	for host, want := range map[string]bool{"localhost:5000": true, "127.0.0.1": true, "[::1]:5000": true, "127.1.2.3:80": true, "localhost.example:5000": false, "10.0.0.1:5000": false, "registry.example": false} {
		require.Equal(t, want, isLoopback(host), host)
	}
}
