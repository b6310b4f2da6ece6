package share

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
	"oras.land/oras-go/v2/registry/remote/retry"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

// client is the way to one registry. A registry may send a reader elsewhere, as
// many do for blobs, but neither to plain HTTP nor to this machine or the link
// it is on: what listens there is not for others to reach.
type client struct {
	host  string // the registry's, host or host:port
	plain bool

	mu      sync.Mutex
	proxies map[string]bool // addresses that are dialled on the user's word
}

var errRefused = errors.New("refused")

func newClient(host string) *client { return &client{host: host, proxies: map[string]bool{}} }

func isLoopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

func near(ip netip.Addr) bool {
	ip = ip.Unmap()
	return ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsLinkLocalMulticast() || ip.IsMulticast() || ip.IsUnspecified()
}

// address gives a URL's host:port.
func address(u *url.URL) string {
	port := u.Port()
	if port == "" {
		if port = "443"; u.Scheme == "http" {
			port = "80"
		}
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// own is the registry's own host:port.
func (c *client) own() string {
	scheme := "https"
	if c.plain {
		scheme = "http"
	}
	return address(&url.URL{Scheme: scheme, Host: c.host})
}

func (c *client) proxy(r *http.Request) (*url.URL, error) {
	u, err := http.ProxyFromEnvironment(r)
	if err == nil && u != nil {
		c.mu.Lock()
		c.proxies[address(u)] = true
		c.mu.Unlock()
	}
	return u, err
}

func (c *client) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 30 * time.Second}
	c.mu.Lock()
	trusted := addr == c.own() || c.proxies[addr]
	c.mu.Unlock()
	if !trusted {
		d.Control = func(_, to string, _ syscall.RawConn) error {
			if a, err := netip.ParseAddrPort(to); err != nil || near(a.Addr()) {
				return fmt.Errorf("the registry leads to %s, on this machine or its link: %w", to, errRefused)
			}
			return nil
		}
	}
	return d.DialContext(ctx, network, addr)
}

// RoundTrip refuses what no registry may lead to; see client.
func (c *client) roundTrip(base http.RoundTripper, r *http.Request) (*http.Response, error) {
	to := address(r.URL)
	if r.URL.Scheme != "https" && (!c.plain || to != c.own()) {
		return nil, fmt.Errorf("the registry leads to %s by plain HTTP: %w", bounded.Text(r.URL.Host), errRefused)
	}
	if ip, err := netip.ParseAddr(r.URL.Hostname()); err == nil && near(ip) && to != c.own() {
		return nil, fmt.Errorf("the registry leads to %s, on this machine or its link: %w", to, errRefused)
	}
	return base.RoundTrip(r)
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (c *client) http() *http.Client {
	t := &http.Transport{
		Proxy: c.proxy, DialContext: c.dial, TLSHandshakeTimeout: 30 * time.Second, ResponseHeaderTimeout: stallTime,
		MaxResponseHeaderBytes: 1 << 20, ForceAttemptHTTP2: true, DisableCompression: true,
	}
	checked := roundTripper(func(r *http.Request) (*http.Response, error) { return c.roundTrip(t, r) })
	again := retry.NewTransport(checked)
	again.Policy = func() retry.Policy {
		return &retry.GenericPolicy{
			Retryable: func(resp *http.Response, err error) (bool, error) {
				var slow net.Error
				if errors.Is(err, errRefused) || errors.Is(err, syscall.ECONNREFUSED) || errors.As(err, &slow) && slow.Timeout() {
					return false, nil
				}
				return retry.DefaultPredicate(resp, err)
			},
			Backoff: retry.DefaultBackoff, MinWait: 200 * time.Millisecond, MaxWait: 3 * time.Second, MaxRetry: 3,
		}
	}
	return &http.Client{Transport: again}
}

// speaksTLS says whether a registry on this machine answers a TLS handshake.
func (c *client) speaksTLS(ctx context.Context) bool {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // nothing is sent; the real connection verifies
	conn, err := d.DialContext(ctx, "tcp", c.own())
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// networkError puts what went wrong on the way into words, without the URL.
func networkError(err error, hint string) (string, string) {
	var (
		u       *url.Error
		unknown x509.UnknownAuthorityError
		header  tls.RecordHeaderError
	)
	if errors.As(err, &u) {
		err = u.Err
	}
	switch {
	case errors.As(err, &header), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "the registry speaks plain HTTP", "--insecure-http, where nobody can listen or change what passes"
	case errors.As(err, &unknown):
		return "its certificate is signed by an authority that is not trusted here", "add it to the system's, or SSL_CERT_FILE=…"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused", "is the registry running, and the port right?"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "the registry does not answer", "check the network and HTTPS_PROXY"
	}
	msg := err.Error()
	if i := strings.Index(msg, `"http`); i >= 0 { // of a library's: METHOD "URL": what
		if j := strings.Index(msg[i+1:], `"`); j >= 0 {
			msg = strings.TrimLeft(msg[i+1+j+1:], ": ")
		}
	}
	if len(msg) > 300 {
		msg = msg[:300] + "…"
	}
	return msg, hint
}

// logins are files with credentials. What they name as a helper is run, as docker
// and podman do: it is the user's own file, and no image says what is in it.
type logins []credentials.Store

func openLogins(files []string) (out logins, err error) {
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var conf struct {
			CredsStore  string            `json:"credsStore"`
			CredHelpers map[string]string `json:"credHelpers"`
		}
		if err == nil {
			err = json.Unmarshal(b, &conf)
		}
		if err != nil {
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				err = errors.New("not JSON")
			}
			return nil, fmt.Errorf("read credentials %q: %w", f, err)
		}
		for _, h := range conf.CredHelpers {
			conf.CredsStore += h
		}
		if strings.ContainsAny(conf.CredsStore, "/\x00") { // it is looked for on PATH, where root put it
			return nil, hinted.New(fmt.Errorf("read credentials %q: a helper with a slash in its name", f), "docker-credential-NAME on PATH is run")
		}
		s, err := credentials.NewStore(f, credentials.StoreOptions{})
		if err != nil {
			return nil, fmt.Errorf("read credentials %q: damaged", f)
		}
		out = append(out, s)
	}
	return out, nil
}

// of gives the login for a host: for a registry's own the one of the longest
// name that its repository lies below, as podman has them.
func (l logins) of(ctx context.Context, hostport string, r registry.Reference) (auth.Credential, error) {
	names := []string{credentials.ServerAddressFromHostname(hostport)}
	if hostport == r.Host() {
		for p := r.Repository; p != "."; p = path.Dir(p) {
			names = append(names[:len(names)-1], r.Registry+"/"+p, names[len(names)-1])
		}
	}
	for _, s := range l {
		for _, n := range names {
			c, err := s.Get(ctx, n)
			if err != nil {
				return c, fmt.Errorf("credentials for %q: %w", n, err)
			}
			if c != auth.EmptyCredential {
				return c, nil
			}
		}
	}
	return auth.EmptyCredential, nil
}
