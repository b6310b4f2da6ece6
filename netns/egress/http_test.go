package egress

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/netns"
)

// outside is what the proxy sees of the world, and what it did.
type outside struct {
	mu      sync.Mutex
	names   map[string][]string
	to      string // where every dial really goes
	lookups []string
	dialled []string
	events  []netns.Decision
	serving []*Egress
}

func (o *outside) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	o.mu.Lock()
	o.dialled = append(o.dialled, addr)
	to := o.to
	o.mu.Unlock()
	if to == "" {
		return nil, errors.New("nothing there")
	}
	return (&net.Dialer{}).DialContext(ctx, network, to)
}

// seen ends the proxies: only then all is logged.
func (o *outside) seen() (dialled []string, events []netns.Decision) {
	for _, e := range o.serving {
		_ = e.Close()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]string{}, o.dialled...), append([]netns.Decision{}, o.events...)
}

func (o *outside) asked() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]string{}, o.lookups...)
}

// shorten sets a time limit until the proxies that are made after it have ended.
func shorten(t *testing.T, limit *time.Duration, to time.Duration) {
	before := *limit
	t.Cleanup(func() { *limit = before })
	*limit = to
}

func clearProxies(t *testing.T) {
	for _, k := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"} {
		t.Setenv(k, "")
	}
}

// serve has a proxy on the host's loopback; ports 443 and 80 of names without one.
func (o *outside) serve(t *testing.T, allow ...string) *Egress {
	t.Helper()
	var entries []string
	for _, a := range allow {
		if strings.ContainsAny(a, ":/") {
			entries = append(entries, a)
		} else {
			entries = append(entries, a+":443", a+":80")
		}
	}
	return o.serveConfig(t, Config{Policy: policy(t, entries, nil, nil)})
}

func policy(t testing.TB, allow, deny, into []string) *Policy {
	t.Helper()
	p, err := ParsePolicy(allow, deny, into)
	require.NoError(t, err)
	return p
}

func (o *outside) serveConfig(t *testing.T, c Config) *Egress {
	t.Helper()
	c.Log = func(d netns.Decision) {
		o.mu.Lock()
		defer o.mu.Unlock()
		d.Time = time.Time{}
		o.events = append(o.events, d)
	}
	if c.Upstream.Dial == nil {
		c.Upstream.Dial = o.dial
	}
	c.Upstream.Lookup = o.lookup
	e := newEgress(c)
	o.serving = append(o.serving, e)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	e.sockets.tcp = append(e.sockets.tcp, l.(*net.TCPListener))
	e.start(func() { e.accept(l.(*net.TCPListener), func(c *net.TCPConn) { e.serveProxy(c) }) })
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	return e
}

func (o *outside) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lookups = append(o.lookups, host)
	var out []netip.Addr
	for _, a := range o.names[host] {
		out = append(out, netip.MustParseAddr(a))
	}
	if out == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return out, nil
}

func open(t *testing.T, e *Egress, send string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", e.sockets.tcp[0].Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = io.WriteString(c, send)
	require.NoError(t, err)
	return c, bufio.NewReader(c)
}

func status(t *testing.T, br *bufio.Reader) string {
	t.Helper()
	l, err := br.ReadString('\n')
	require.NoError(t, err)
	f := strings.SplitN(l, " ", 3)
	require.Len(t, f, 3, l)
	return f[1]
}

// upper answers with the input in capitals, and only when the input has ended.
func upper(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				_, _ = c.Write(bytes.ToUpper(b))
			}()
		}
	}()
	return l.Addr().String()
}

func TestTunnelPassesEarlyDataAndTheEndOfOneSide(t *testing.T) {
	clearProxies(t)
	o := &outside{names: map[string][]string{"index.test": {"198.51.100.7"}}, to: upper(t)}
	e := o.serve(t, "index.test")
	c, br := open(t, e, "CONNECT Index.test.:443 HTTP/1.1\r\nHost: x\r\n\r\nearly ")
	require.Equal(t, "200", status(t, br))
	_, err := br.ReadString('\n')
	require.NoError(t, err)
	big := strings.Repeat("a", 1<<20)
	_, err = io.WriteString(c, big)
	require.NoError(t, err)
	require.NoError(t, c.(*net.TCPConn).CloseWrite())
	got, err := io.ReadAll(br)
	require.NoError(t, err)
	require.Equal(t, "EARLY "+strings.ToUpper(big), string(got))
	dialled, events := o.seen()
	require.Equal(t, []string{"198.51.100.7:443"}, dialled)
	require.Equal(t, []netns.Decision{{Via: "connect", Host: "index.test", Address: "198.51.100.7", Port: 443, Allowed: true, Rule: "--allow index.test:443"}}, events)
	require.NoError(t, e.Close())
	require.Equal(t, netns.Stats{Connections: 1, UpBytes: 6 + 1<<20, DownBytes: 6 + 1<<20}, e.Stats())
}

func TestOnlyListedTargetsAreReached(t *testing.T) {
	clearProxies(t)
	o := &outside{names: map[string][]string{"index.test": {"198.51.100.7"}, "evil.test": {"198.51.100.8"}}, to: upper(t)}
	e := o.serve(t, "index.test", "other.test:8443", "10.1.2.3:443", "localhost:9")
	for target, want := range map[string]string{
		"index.test:443": "200", "index.test:80": "200", "index.test:22": "403", "evil.test:443": "403", "xindex.test:443": "403", "index.test.evil.test:443": "403",
		"other.test:443": "403", "other.test:8443": "502", "10.1.2.3:443": "200", "10.1.2.4:443": "403", "[::ffff:10.1.2.3]:443": "200",
		"127.0.0.1:9": "403", "0x0a010203:443": "400", "167838211:443": "400",
	} {
		_, br := open(t, e, "CONNECT "+target+" HTTP/1.1\r\n\r\n")
		require.Equal(t, want, status(t, br), target)
	}
	_, events := o.seen()
	denied := 0
	for _, ev := range events {
		if !ev.Allowed {
			denied++
			require.NotEmpty(t, ev.Rule)
			require.NotEmpty(t, ev.Host+ev.Address+strings.TrimPrefix(ev.Rule, "bad request: "))
		}
	}
	require.Equal(t, 9, denied)
}

func TestNamesDoNotLeadToTheHostsNetwork(t *testing.T) {
	clearProxies(t)
	for _, a := range []string{
		"127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "169.254.169.254", "168.63.129.16", "fe80::1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "fd00::1",
		"100.64.0.1", "224.0.0.1", "255.255.255.255", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "::127.0.0.1", "198.18.0.1",
	} {
		o := &outside{names: map[string][]string{"index.test": {a}}, to: upper(t)}
		_, br := open(t, o.serve(t, "index.test"), "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
		require.Equal(t, "403", status(t, br), a)
		dialled, events := o.seen()
		require.Empty(t, dialled, a)
		require.Len(t, events, 1)
		require.Contains(t, events[0].Rule, " address "+netip.MustParseAddr(a).Unmap().String()+" of index.test")
	}
	for _, a := range []string{"198.51.100.1", "2a00:1450::1", "64:ff9b::c633:6401"} {
		require.Empty(t, special(netip.MustParseAddr(a)), a)
	}
	o := &outside{names: map[string][]string{"index.test": {"10.9.8.7"}}, to: upper(t)}
	_, br := open(t, o.serve(t, "index.test", "10.9.0.0/16"), "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
	require.Equal(t, "200", status(t, br))
}

// The name is looked up once, and the address that was checked is dialled.
func TestRebindingChangesNothing(t *testing.T) {
	clearProxies(t)
	o := &outside{names: map[string][]string{"index.test": {"127.0.0.1", "198.51.100.7"}}, to: upper(t)}
	_, br := open(t, o.serve(t, "index.test"), "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
	require.Equal(t, "200", status(t, br))
	dialled, _ := o.seen()
	require.Equal(t, []string{"198.51.100.7:443"}, dialled)
	require.Equal(t, []string{"index.test"}, o.asked())
}

func TestBadHeadsAreRefused(t *testing.T) {
	clearProxies(t)
	o := &outside{names: map[string][]string{"index.test": {"198.51.100.7"}}, to: upper(t)}
	e := o.serve(t, "index.test")
	for head, want := range map[string]string{
		"\r\n":                   "400",
		"GET / HTTP/1.1\r\n\r\n": "400",
		"GET https://index.test/ HTTP/1.1\r\n\r\n":                                            "400",
		"GET ftp://index.test/ HTTP/1.1\r\n\r\n":                                              "400",
		"GET http://u:p@index.test/ HTTP/1.1\r\n\r\n":                                         "400",
		"GET http://evil.test@index.test/ HTTP/1.1\r\n\r\n":                                   "400",
		"GET http://index.test/ HTTP/2.0\r\n\r\n":                                             "400",
		"PRI * HTTP/2.0\r\n\r\n":                                                              "400",
		"CONNECT index.test HTTP/1.1\r\n\r\n":                                                 "400",
		"CONNECT index.test:0 HTTP/1.1\r\n\r\n":                                               "400",
		"CONNECT index.test:https HTTP/1.1\r\n\r\n":                                           "400",
		"CONNECT index.test:+443 HTTP/1.1\r\n\r\n":                                            "400",
		"CONNECT index.test:65979 HTTP/1.1\r\n\r\n":                                           "400",
		"CONNECT :443 HTTP/1.1\r\n\r\n":                                                       "400",
		"CONNECT [fe80::1%25lo]:443 HTTP/1.1\r\n\r\n":                                         "400",
		"CONNECT index.test/x:443 HTTP/1.1\r\n\r\n":                                           "400",
		"CONNECT  index.test:443 HTTP/1.1\r\n\r\n":                                            "400",
		"CONNECT index.test:443 HTTP/1.1\n\n":                                                 "400",
		"CONNECT index.test:443 HTTP/1.1\r\nA: b\rX: y\r\n\r\n":                               "400",
		"CONNECT index.test:443 HTTP/1.1\r\nA: b\r\n folded\r\n\r\n":                          "400",
		"CONNECT index.test:443 HTTP/1.1\r\nA : b\r\n\r\n":                                    "400",
		"CONNECT index.test:443 HTTP/1.1\r\nA\r\n\r\n":                                        "400",
		"CONNECT index.test:443 HTTP/1.1\r\nA: \x00\r\n\r\n":                                  "400",
		"CONNECT index.test:443 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello":                   "400",
		"POST http://index.test/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":     "411",
		"POST http://index.test/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx": "400",
		"POST http://index.test/ HTTP/1.1\r\nContent-Length: +1\r\n\r\nx":                     "400",
		"POST http://index.test/ HTTP/1.1\r\nContent-Length: -1\r\n\r\nx":                     "400",
		"POST http://index.test/ HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\nx":                   "400",
		"CONNECT index.test:443 HTTP/1.1\r\nA: " + strings.Repeat("x", 20<<10) + "\r\n\r\n":   "431",
		"CONNECT index.test:443 HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", 4000) + "\r\n":     "431",
	} {
		_, br := open(t, e, head)
		require.Equal(t, want, status(t, br), "%.80q", head)
	}
	dialled, events := o.seen()
	require.Empty(t, dialled)
	for _, ev := range events {
		require.False(t, ev.Allowed)
		require.Contains(t, ev.Rule, "bad request: ")
	}
}

func TestDrippingHeadIsCutOff(t *testing.T) {
	clearProxies(t)
	shorten(t, &headTimeout, 300*time.Millisecond)
	o := &outside{}
	c, br := open(t, o.serve(t, "index.test"), "CONNECT ")
	start := time.Now()
	go func() {
		for range 100 {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	_, _ = io.ReadAll(br)
	require.Less(t, time.Since(start), 4*time.Second)
}

func TestPlainHTTP(t *testing.T) {
	clearProxies(t)
	var mu sync.Mutex
	var got []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		got = append(got, fmt.Sprintf("%s %s %s %q te=%q conn=%q auth=%q", r.Method, r.Host, r.RequestURI, b, r.Header.Get("TE"), r.Header.Get("Connection"), r.Header.Get("Proxy-Authorization")))
		mu.Unlock()
		w.Header().Set("X-It", "yes")
		fmt.Fprintf(w, "hello %s", strings.Repeat("y", 100000))
	}))
	defer srv.Close()
	o := &outside{names: map[string][]string{"index.test": {"198.51.100.7"}}, to: srv.Listener.Addr().String()}
	e := o.serve(t, "index.test", "index.test:8080")
	u, _ := url.Parse("http://" + e.sockets.tcp[0].Addr().String())
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(u)}, Timeout: 10 * time.Second}
	for range 2 { // the connection is not used again
		r, err := client.Get("http://index.test/simple/?a=b%20c")
		require.NoError(t, err)
		b, err := io.ReadAll(r.Body)
		require.NoError(t, err)
		require.Len(t, b, 100006)
		require.Equal(t, "yes", r.Header.Get("X-It"))
	}
	r, err := client.Post("http://index.test:8080", "text/plain", strings.NewReader("body"))
	require.NoError(t, err)
	require.Equal(t, 200, r.StatusCode)
	r, err = client.Get("http://evil.test/")
	require.NoError(t, err)
	require.Equal(t, 403, r.StatusCode)
	_, br := open(t, e, "GET http://index.test/one HTTP/1.1\r\nHost: evil.test\r\nConnection: close, X-Secret, Content-Length\r\nX-Secret: 1\r\nTE: trailers\r\nProxy-Authorization: x\r\nContent-Length: 2\r\n\r\nokGET /two HTTP/1.1\r\nHost: evil.test\r\n\r\n")
	require.Equal(t, "200", status(t, br))
	_, err = io.ReadAll(br)
	require.NoError(t, err)
	mu.Lock()
	defer mu.Unlock()
	one := `GET index.test /simple/?a=b%20c "" te="" conn="close" auth=""`
	require.Equal(t, []string{
		one, one,
		`POST index.test:8080 / "body" te="" conn="close" auth=""`,
		`GET index.test /one "ok" te="" conn="close" auth=""`,
	}, got)
}

func TestHostsOwnProxyIsUsed(t *testing.T) {
	clearProxies(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	seen := make(chan string, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				var head string
				for !strings.HasSuffix(head, "\r\n\r\n") {
					l, err := br.ReadString('\n')
					if err != nil {
						return
					}
					head += l
				}
				if !strings.HasPrefix(head, "CONNECT") {
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nplain")
					_ = c.(*net.TCPConn).CloseWrite()
					rest, _ := io.ReadAll(br)
					seen <- head + string(rest)
					return
				}
				seen <- head
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nX: y\r\n\r\nfirst")
				_, _ = io.Copy(c, br)
			}()
		}
	}()
	t.Setenv("HTTPS_PROXY", "http://me:secret@"+l.Addr().String())
	t.Setenv("HTTP_PROXY", l.Addr().String())
	t.Setenv("NO_PROXY", ".direct.test, 10.0.0.0/8")
	o := &outside{names: map[string][]string{"a.direct.test": {"198.51.100.1"}}, to: l.Addr().String()}
	e := o.serve(t, "index.test", "a.direct.test:70")
	c, br := open(t, e, "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
	require.Equal(t, "200", status(t, br))
	_, _ = br.ReadString('\n')
	_, _ = io.WriteString(c, " second")
	_ = c.(*net.TCPConn).CloseWrite()
	b, _ := io.ReadAll(br)
	require.Equal(t, "first second", string(b))
	require.Equal(t, "CONNECT index.test:443 HTTP/1.1\r\nHost: index.test:443\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n\r\n", <-seen)

	_, br = open(t, e, "GET http://index.test/x HTTP/1.1\r\nA: b\r\n\r\nGET http://evil.test/ HTTP/1.1\r\n\r\n")
	require.Equal(t, "200", status(t, br))
	_, _ = io.ReadAll(br)
	require.Equal(t, "GET http://index.test/x HTTP/1.1\r\nHost: index.test\r\nA: b\r\nConnection: close\r\n\r\n", <-seen, "the second request must not reach the proxy")

	_, br = open(t, e, "CONNECT evil.test:443 HTTP/1.1\r\n\r\n")
	require.Equal(t, "403", status(t, br))
	_, br = open(t, e, "CONNECT a.direct.test:70 HTTP/1.1\r\n\r\n")
	require.Equal(t, "200", status(t, br))
	dialled, _ := o.seen()
	require.Equal(t, []string{l.Addr().String(), l.Addr().String(), "198.51.100.1:70"}, dialled)

	t.Setenv("HTTPS_PROXY", "socks5://me:secret@127.0.0.1:1")
	_, br = open(t, o.serve(t, "index.test"), "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
	require.Equal(t, "502", status(t, br))
	b, _ = io.ReadAll(br)
	require.Contains(t, string(b), "HTTPS_PROXY")
	require.NotContains(t, string(b), "secret")
}

func TestCloseDoesNotWaitForDials(t *testing.T) {
	clearProxies(t)
	o := &outside{names: map[string][]string{"index.test": {"198.51.100.7"}}}
	hung := make(chan bool, 1)
	e := o.serveConfig(t, Config{Policy: policy(t, []string{"index.test"}, nil, nil), Upstream: Upstream{Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		hung <- true
		<-ctx.Done()
		return nil, ctx.Err()
	}}})
	_, _ = open(t, e, "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
	<-hung
	start := time.Now()
	require.NoError(t, e.Close())
	require.NoError(t, e.Close())
	require.Less(t, time.Since(start), 5*time.Second)
	require.Empty(t, o.dialled)
}

// One wait is granted to a connection too many, so that a burst passes; then
// the rest is refused at once, and said.
func TestTooManyConnections(t *testing.T) {
	clearProxies(t)
	shorten(t, &slotTimeout, 100*time.Millisecond)
	o := &outside{names: map[string][]string{"index.test": {"198.51.100.7"}}, to: upper(t)}
	e := o.serveConfig(t, Config{Policy: policy(t, []string{"index.test"}, nil, nil), MaxConns: 2})
	first, _ := open(t, e, "CONNECT")
	_, _ = open(t, e, "CONNECT")
	for range 3 {
		c, err := net.Dial("tcp", e.sockets.tcp[0].Addr().String())
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	first.Close()
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", e.sockets.tcp[0].Addr().String())
		if err != nil {
			return false
		}
		defer c.Close()
		fmt.Fprint(c, "CONNECT index.test:443 HTTP/1.1\r\n\r\n")
		b := make([]byte, 12)
		_, _ = io.ReadFull(c, b)
		return string(b) == "HTTP/1.1 200"
	}, 5*time.Second, 10*time.Millisecond)
	require.NoError(t, e.Close())
	_, events := o.seen()
	require.Equal(t, "connection limit 2", events[0].Rule)
	require.GreaterOrEqual(t, e.Stats().Denied, int64(3))
}

// What is read of a request is the one spelling that rules are compared with,
// and nothing of it can end a line or a field.
func FuzzReadRequest(f *testing.F) {
	f.Add([]byte("CONNECT index.test:443 HTTP/1.1\r\nHost: x\r\n\r\nrest"))
	f.Add([]byte("POST http://index.test:8080/a?b HTTP/1.1\r\nContent-Length: 4\r\nConnection: a\r\nA: b\r\n\r\nbody"))
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := readRequest(bufio.NewReaderSize(bytes.NewReader(b), maxHeadBytes))
		if err != nil {
			return
		}
		host, port, err := net.SplitHostPort(req.target.String())
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseTarget(host, port); err != nil || again != req.target {
			t.Fatalf("%q is spelled %q", req.target, again)
		}
		if req.bodyBytes < 0 || strings.ContainsAny(req.target.String()+req.authority+req.path+req.method, " \r\n\x00") {
			t.Fatalf("%+v", req)
		}
		for _, h := range req.header {
			if strings.ContainsAny(h, "\r\n\x00") {
				t.Fatalf("%q", h)
			}
		}
		if req.method == "CONNECT" {
			return
		}
		// net/http reads what we would send as the same request.
		head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\n", req.method, req.path, req.authority)
		for _, h := range req.header {
			head += h + "\r\n"
		}
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head + "\r\n")))
		if err == nil && (r.Host != req.authority || r.ContentLength != req.bodyBytes && r.ContentLength > 0 || len(r.TransferEncoding) > 0) {
			t.Fatalf("%q is read as %+v", head, r)
		}
	})
}
