// Package fetch brings packages and repodata from channels, by https and from
// directories. It owns retries, verification and what is told of failures, and
// runs inside a sandbox that reaches the channels' hosts only. It must never
// know what is in a package.
package fetch

import (
	"context"
	"crypto/md5" //nolint:gosec // what old locks have; they are told apart by it, not trusted
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sbxrun/sbxrun/envs/conda/source"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Client fetches. The zero value has no credentials and no local channels.
type Client struct {
	Credentials source.Credentials
	// Local is where the host's file system is seen: what file:///x names is
	// Local+"/x". "" is nowhere.
	Local string
	// Attempts is how often a server that fails is asked; 0 is 4.
	Attempts int
	// Pause is the time before the second attempt, doubled each time; 0 is 500 ms.
	Pause time.Duration

	once sync.Once
	http *http.Client
}

// Item is one package to be fetched. One of the hashes must be set; with both,
// both are verified. SizeBytes 0 is not known.
type Item struct {
	Name      string `json:"name"`
	URL       string `json:"url"`
	SHA256    string `json:"sha256,omitempty"`
	MD5       string `json:"md5,omitempty"`
	SizeBytes int64  `json:"size_bytes,omitempty"`
}

// maxPackageBytes bounds a package whose size the lock does not say.
const maxPackageBytes = 16 << 30

// Packages fetches all items, some at a time, into dir, each under its base
// name of to (see [Item]). The first failure ends all.
func (c *Client) Packages(ctx context.Context, items []Item, dir string, parallel int, to func(Item) string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan Item)
	var wg sync.WaitGroup
	for range max(1, min(parallel, len(items))) {
		wg.Go(func() {
			for it := range work {
				if err := c.fetch(ctx, it, filepath.Join(dir, to(it))); err != nil {
					cancel(err)
				}
			}
		})
	}
	for _, it := range items {
		if ctx.Err() != nil {
			break
		}
		work <- it
	}
	close(work)
	wg.Wait()
	return context.Cause(ctx)
}

func (c *Client) fetch(ctx context.Context, it Item, to string) error {
	sum256, sum5 := sha256.New(), md5.New() //nolint:gosec // as above
	limit := it.SizeBytes
	if limit <= 0 {
		limit = maxPackageBytes
	}
	err := c.retry(ctx, func() error {
		sum256.Reset()
		sum5.Reset()
		r, err := c.open(ctx, it.URL, nil)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
		if err != nil {
			return gone{err}
		}
		n, err := io.Copy(io.MultiWriter(f, sum256, sum5), io.LimitReader(r.Body, limit+1))
		if cerr := f.Close(); cerr != nil {
			return gone{cerr} // no space, most likely
		}
		switch {
		case errors.As(err, new(*os.PathError)):
			return gone{err}
		case err != nil:
			return fmt.Errorf("broken off after %d bytes: %w", n, plain(err))
		case n > limit:
			return gonef("it is larger than the %d bytes that the lock says", limit)
		case it.SizeBytes > 0 && n < it.SizeBytes:
			return fmt.Errorf("it has %d bytes, the lock says %d", n, it.SizeBytes)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("fetch package %s: %w", it.Name, err)
	}
	for _, h := range []struct{ kind, want, got string }{
		{"sha256", it.SHA256, hex.EncodeToString(sum256.Sum(nil))}, {"md5", it.MD5, hex.EncodeToString(sum5.Sum(nil))},
	} {
		if h.want != "" && !strings.EqualFold(h.want, h.got) {
			return hinted.New(fmt.Errorf("fetch package %s: hash mismatch: its %s is %s, the lock says %s", it.Name, h.kind, h.got, h.want),
				"the file at the channel is not the one that was locked: lock again only if you know why")
		}
	}
	if it.SHA256 == "" && it.MD5 == "" {
		return fmt.Errorf("fetch package %s: the lock has no hash for it", it.Name)
	}
	return nil
}

// retry tries until it works, is of no use or was tried often enough.
func (c *Client) retry(ctx context.Context, try func() error) error {
	attempts, pause := c.Attempts, c.Pause
	if attempts == 0 {
		attempts = 4
	}
	if pause == 0 {
		pause = 500 * time.Millisecond
	}
	for i := 1; ; i++ {
		err := try()
		var final gone
		switch {
		case err == nil:
			return nil
		case errors.As(err, &final):
			return final.error
		case ctx.Err() != nil:
			return ctx.Err()
		case i >= attempts:
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
			pause *= 2
		}
	}
}

// gone marks an error as one that no further attempt would change.
type gone struct{ error }

func (g gone) Unwrap() error { return g.error }

type response struct {
	Body   io.ReadCloser
	Header http.Header
	Status int
}

// StatusError is an answer that is no success.
type StatusError struct {
	Where string // the URL, without credentials
	Code  int    // of HTTP; 404 for a file that is not there
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: %d %s", e.Where, e.Code, http.StatusText(e.Code))
}

// Hint says what is most likely wrong.
func (e *StatusError) Hint() string {
	switch e.Code {
	case http.StatusUnauthorized, http.StatusForbidden:
		return "the channel wants credentials: ~/.netrc, .condarc or RATTLER_AUTH_FILE"
	case http.StatusNotFound:
		return "is the URL right, and the package still there?"
	}
	return ""
}

// open asks for a URL. header are more headers; 304 is a success.
func (c *Client) open(ctx context.Context, raw string, header http.Header) (*response, error) {
	cred := c.Credentials.Clone() // others fetch at the same time
	clean, err := cred.Strip(raw)
	if err != nil {
		return nil, gone{err}
	}
	if p, ok := strings.CutPrefix(clean, "file://"); ok {
		return c.openFile(p)
	}
	ctx, stop := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, clean, nil)
	if err != nil {
		stop(nil)
		return nil, gonef("%s: not a URL", clean)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", "sbxrun")
	req.Header.Set("Accept-Encoding", "identity") // sizes and hashes are of the file
	cred.Authorize(req)
	c.once.Do(func() {
		c.http = &http.Client{Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 20 * time.Second, ResponseHeaderTimeout: 60 * time.Second,
			DialContext: (&net.Dialer{Timeout: 20 * time.Second}).DialContext, MaxIdleConnsPerHost: 16, ForceAttemptHTTP2: true,
		}}
	})
	res, err := c.http.Do(req)
	if err != nil {
		stop(nil)
		var u *url.Error
		if errors.As(err, &u) {
			if at, perr := url.Parse(u.URL); perr == nil {
				clean = byWay(clean, req.URL.Host, at.Host)
			}
		}
		return nil, fmt.Errorf("%s: cannot be reached: %w", clean, plain(err))
	}
	clean = byWay(clean, req.URL.Host, res.Request.URL.Host)
	res.Body = &watched{res.Body, time.AfterFunc(stallTime, func() { stop(errStalled) }), func() { stop(nil) }}
	switch {
	case res.StatusCode == http.StatusOK, res.StatusCode == http.StatusNotModified:
		return &response{Body: res.Body, Header: res.Header, Status: res.StatusCode}, nil
	case res.StatusCode >= 500, res.StatusCode == http.StatusTooManyRequests, res.StatusCode == http.StatusRequestTimeout:
		res.Body.Close()
		return nil, &StatusError{clean, res.StatusCode}
	}
	res.Body.Close()
	return nil, gone{&StatusError{clean, res.StatusCode}}
}

// byWay adds the host that a redirect led to; no more of it: it may be signed.
func byWay(clean, asked, answered string) string {
	if answered == asked || answered == "" {
		return clean
	}
	return clean + ", which leads to " + answered
}

// stallTime is how long a server may send nothing.
const stallTime = time.Minute

var errStalled = fmt.Errorf("nothing came for %v", stallTime)

// watched ends a request whose body stalls.
type watched struct {
	io.ReadCloser
	timer *time.Timer
	done  func()
}

func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(stallTime)
	return w.ReadCloser.Read(p)
}

func (w *watched) Close() error {
	w.timer.Stop()
	err := w.ReadCloser.Close()
	w.done()
	return err
}

// plain drops the URL that net/http puts into its errors: it holds the token.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func (c *Client) openFile(p string) (*response, error) {
	un, err := url.PathUnescape(p)
	if err != nil || !path.IsAbs(un) || c.Local == "" {
		return nil, gonef("file://%s: not a path that can be read", p)
	}
	f, err := os.Open(c.Local + path.Clean(un))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, gone{&StatusError{"file://" + un, http.StatusNotFound}}
	case err != nil:
		return nil, gone{err}
	}
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, gonef("file://%s: not a regular file", un)
	}
	return &response{Body: f, Header: http.Header{}, Status: http.StatusOK}, nil
}

func gonef(format string, a ...any) error { return gone{fmt.Errorf(format, a...)} }
