package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

func sum(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

func bySum(it Item) string { return it.SHA256 }

func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func TestPackagesAreFetchedAndVerified(t *testing.T) {
	body := bytes.Repeat([]byte("package"), 1000)
	var tries atomic.Int32
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/flaky":
			if tries.Add(1) < 3 {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
		case "/cut": // always
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			_, _ = w.Write(body[:10])
			return
		case "/gone":
			http.NotFound(w, r)
			return
		case "/private":
			if u, p, _ := r.BasicAuth(); u != "me" || p != "secret" {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
		}
		_, _ = w.Write(body)
	})
	host := strings.TrimPrefix(url, "http://")
	local := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(local, "file"), body, 0o600))
	for _, c := range []struct{ name, url, sum, says string }{
		{"plain", url + "/a", sum(body), ""},
		{"a server that fails twice", url + "/flaky", sum(body), ""},
		{"user and password in the URL", "http://me:secret@" + host + "/private", sum(body), ""},
		{"a local channel", "file:///file", sum(body), ""},
		{"another content", url + "/a", sum([]byte("x")), "hash mismatch"},
		{"broken off", url + "/cut", sum(body), "broken off"},
		{"not there", url + "/gone", sum(body), "404 Not Found"},
		{"no credentials", url + "/private", sum(body), "401"},
		{"wrong credentials", "http://me:topsecret@" + host + "/private", sum(body), "401"},
		{"nobody listens", "http://127.0.0.1:1/t/topsecret/x", sum(body), "cannot be reached"},
		{"not a local file", "file:///none", sum(body), "404"},
		{"a local directory", "file:///", sum(body), "not a regular file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			f := &Client{Local: local, Pause: time.Millisecond}
			err := f.Packages(context.Background(), []Item{{Name: "thing-1-0", URL: c.url, SHA256: c.sum}}, dir, 4, bySum)
			if c.says == "" {
				require.NoError(t, err)
				got, err := os.ReadFile(filepath.Join(dir, c.sum))
				require.NoError(t, err)
				assert.Equal(t, body, got)
				return
			}
			require.Error(t, err)
			assert.Contains(t, err.Error(), "thing-1-0")
			assert.Contains(t, err.Error(), c.says)
			assert.NotContains(t, err.Error()+hinted.Of(err), "topsecret")
		})
	}
}

func TestASizeThatIsLockedIsHeeded(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 1 << 14 { // more than anyone asked for
			if _, err := w.Write(make([]byte, 1<<10)); err != nil {
				return
			}
		}
	})
	dir := t.TempDir()
	f := &Client{Attempts: 1}
	err := f.Packages(context.Background(), []Item{{Name: "big", URL: url, SHA256: sum(nil), SizeBytes: 5}}, dir, 1, bySum)
	require.ErrorContains(t, err, "fetch package big: it is larger than the 5 bytes")
	st, err := os.Stat(filepath.Join(dir, sum(nil)))
	require.NoError(t, err)
	assert.LessOrEqual(t, st.Size(), int64(6))
}

func TestTheFirstFailureEndsAll(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) })
	var items []Item
	for i := range 100 {
		items = append(items, Item{Name: fmt.Sprint(i), URL: url, SHA256: sum([]byte{byte(i)})})
	}
	require.ErrorContains(t, (&Client{}).Packages(context.Background(), items, t.TempDir(), 8, bySum), "404")
}

// A token for one host is not for the host that this one sends to.
func TestCredentialsDoNotFollowARedirect(t *testing.T) {
	seen := make(chan string, 1)
	other := serve(t, func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header.Get("Authorization") + r.URL.Path
		_, _ = w.Write([]byte("x"))
	})
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, strings.Replace(other, "127.0.0.1", "localhost", 1)+"/there", http.StatusFound)
	})
	u := strings.Replace(url, "http://", "http://me:secret@", 1)
	require.NoError(t, (&Client{}).Packages(context.Background(), []Item{{Name: "x", URL: u, SHA256: sum([]byte("x"))}}, t.TempDir(), 1, bySum))
	assert.Equal(t, "/there", <-seen)
}

func TestRepodata(t *testing.T) {
	text := []byte(`{"packages":{}}`)
	var packed bytes.Buffer
	z, err := zstd.NewWriter(&packed)
	require.NoError(t, err)
	_, err = z.Write(text)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/zst/noarch/repodata.json.zst":
			w.Header().Set("ETag", `"one"`)
			if r.Header.Get("If-None-Match") == `"one"` {
				w.WriteHeader(http.StatusNotModified)
				return
			}
			_, _ = w.Write(packed.Bytes())
		case "/plain/noarch/repodata.json":
			_, _ = w.Write(text)
		case "/broken/noarch/repodata.json.zst":
			_, _ = w.Write(packed.Bytes()[:packed.Len()-3])
		case "/closed/noarch/repodata.json.zst":
			w.WriteHeader(http.StatusForbidden)
		default:
			http.NotFound(w, r)
		}
	})
	to := filepath.Join(t.TempDir(), "to")
	c := &Client{Pause: time.Millisecond}
	ctx := context.Background()
	first, err := c.Repodata(ctx, url+"/zst", "noarch", to, Repodata{})
	require.NoError(t, err)
	assert.Equal(t, Repodata{SHA256: sum(text), SizeBytes: int64(len(text)), ETag: `"one"`, Variant: "repodata.json.zst"}, first)
	again, err := c.Repodata(ctx, url+"/zst", "noarch", "/nonexistent/x", first)
	require.NoError(t, err)
	assert.True(t, again.Same)
	plain, err := c.Repodata(ctx, url+"/plain", "noarch", to, Repodata{})
	require.NoError(t, err)
	assert.Equal(t, sum(text), plain.SHA256)
	missing, err := c.Repodata(ctx, url+"/none", "noarch", to, Repodata{})
	require.NoError(t, err)
	assert.Equal(t, Repodata{Missing: true}, missing)
	_, err = c.Repodata(ctx, url+"/broken", "noarch", to, Repodata{})
	require.ErrorContains(t, err, "unpack repodata.json.zst")
	_, err = c.Repodata(ctx, url+"/closed", "noarch", to, Repodata{})
	require.ErrorContains(t, err, "403 Forbidden")
	assert.Contains(t, hinted.Of(err), "credentials")
}
