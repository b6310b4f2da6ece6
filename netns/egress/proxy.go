package egress

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Event is one decision of the proxy.
type Event struct {
	Method  string // "CONNECT", "GET", …; "" when there was no readable request
	Host    string // host:port as asked, lower case; "" when it could not be read
	Allowed bool   // and connected
	Rule    string // the entry that decided, or why it did not come about
}

// Dial connects to an address on behalf of the inside. The address is always
// one of the host's own proxy or a numeric one that was checked.
type Dial func(ctx context.Context, network, addr string) (net.Conn, error)

// Egress is an HTTP proxy that reaches named hosts only: by CONNECT, and for
// plain http:// also by requests in absolute form. No name is looked up inside,
// and the address that was checked is the one that is dialled, so that a name
// cannot change its meaning in between (DNS rebinding).
type Egress struct {
	l        net.Listener
	hosts    map[string]string // host:port to the entry that allows it
	prefixes []netip.Prefix
	dial     Dial
	log      func(Event)
	lookup   func(ctx context.Context, host string) ([]netip.Addr, error)
	https    upstream
	http     upstream
	noProxy  []string

	ctx      context.Context // ends with Close: dials must not hold it up
	cancel   context.CancelFunc
	slots    chan struct{}
	wg       sync.WaitGroup
	up, down atomic.Int64

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

// Bounds of what the inside can make the proxy hold, and for how long.
const (
	maxHeadBytes     = 16 << 10
	maxRespHeadBytes = 64 << 10
	maxConns         = 128
)

// The tests shorten these.
var (
	headTimeout  = 10 * time.Second // from accept to the end of the head, however slowly it drips
	dialTimeout  = 30 * time.Second // look-up and all addresses of a name
	addrTimeout  = 10 * time.Second // one address
	replyTimeout = 2 * time.Minute  // a plain HTTP server's silence
)

// Serve answers on l until Close, which closes l too. An entry of allow is
//
//   - "host": ports 443 and 80 of it;
//   - "host:port";
//   - an address prefix ("10.0.0.0/8"): names that are allowed may have addresses
//     in it, although it is private, link-local or loopback. Without such an entry
//     only an address that is itself the host of an entry, or localhost, may be.
//
// dial and log may be nil; log is called from several goroutines. HTTPS_PROXY,
// HTTP_PROXY and NO_PROXY of this process are honoured: through such a proxy
// names are resolved there, and only names are checked.
func Serve(l net.Listener, allow []string, dial func(ctx context.Context, network, addr string) (net.Conn, error), log func(Event)) *Egress {
	e := newEgress(l, allow, dial, log)
	e.start()
	return e
}

func newEgress(l net.Listener, allow []string, dial Dial, log func(Event)) *Egress {
	e := &Egress{
		l: l, dial: dial, log: log, conns: map[net.Conn]bool{}, hosts: map[string]string{}, slots: make(chan struct{}, maxConns),
		https: proxyFrom("HTTPS_PROXY", "https_proxy"), http: proxyFrom("HTTP_PROXY", "http_proxy"),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	for _, k := range []string{"NO_PROXY", "no_proxy"} {
		e.noProxy = append(e.noProxy, strings.FieldsFunc(strings.ToLower(os.Getenv(k)), func(r rune) bool { return r == ',' || r == ' ' })...)
	}
	for _, a := range allow {
		if p, err := netip.ParsePrefix(a); err == nil {
			e.prefixes = append(e.prefixes, p.Masked())
			continue
		}
		host, port, err := net.SplitHostPort(a)
		ports := []string{port}
		if err != nil {
			host, ports = strings.Trim(a, "[]"), []string{"443", "80"}
		}
		if host, ok := canonical(host); ok {
			for _, p := range ports {
				e.hosts[net.JoinHostPort(host, p)] = a
			}
		}
	}
	if e.dial == nil {
		e.dial = (&net.Dialer{}).DialContext
	}
	if e.log == nil {
		e.log = func(Event) {}
	}
	e.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}
	return e
}

func (e *Egress) start() {
	e.wg.Add(1)
	go e.accept()
}

// Counters gives the bytes sent out and received for the inside by transfers
// that have ended; after Close that is all of them.
func (e *Egress) Counters() (up, down int64) { return e.up.Load(), e.down.Load() }

// Close ends the listener and every connection and waits for them. It may be
// called again.
func (e *Egress) Close() error {
	e.mu.Lock()
	again := e.closed
	e.closed = true
	for c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	e.cancel()
	err := e.l.Close()
	e.wg.Wait()
	if again {
		return nil
	}
	return err
}

func (e *Egress) accept() {
	defer e.wg.Done()
	for {
		// A slot first: who asks for too much waits in the kernel's queue.
		select {
		case e.slots <- struct{}{}:
		case <-e.ctx.Done():
			return
		}
		c, err := e.l.Accept()
		if err != nil {
			<-e.slots
			if errors.Is(err, net.ErrClosed) || e.ctx.Err() != nil {
				return
			}
			select { // out of descriptors, perhaps: that passes
			case <-time.After(20 * time.Millisecond):
			case <-e.ctx.Done():
			}
			continue
		}
		e.wg.Add(1)
		go func() {
			defer e.wg.Done()
			defer func() { <-e.slots }()
			defer c.Close()
			if e.track(c) {
				defer e.untrack(c)
				e.serve(c)
			}
		}()
	}
}

func (e *Egress) track(c net.Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		e.conns[c] = true
	}
	return !e.closed
}

func (e *Egress) untrack(c net.Conn) {
	e.mu.Lock()
	delete(e.conns, c)
	e.mu.Unlock()
}

// refusal is an answer to the inside.
type refusal struct {
	status string
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refuse(status, format string, a ...any) error {
	return &refusal{status, fmt.Errorf(format, a...)}
}

const (
	badRequest = "400 Bad Request"
	forbidden  = "403 Forbidden"
	tooLarge   = "431 Request Header Fields Too Large"
)

func (e *Egress) serve(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(headTimeout))
	br := bufio.NewReaderSize(c, maxHeadBytes)
	req, err := readRequest(br)
	if err != nil {
		e.log(Event{Method: req.method, Host: req.target, Rule: "bad request: " + err.Error()})
		answer(c, err)
		return
	}
	_ = c.SetDeadline(time.Time{})
	ctx, cancel := context.WithTimeout(e.ctx, dialTimeout)
	defer cancel()
	out, rule, viaProxy, err := e.open(ctx, req)
	ev := Event{Method: req.method, Host: req.target, Allowed: err == nil, Rule: rule}
	if err != nil {
		ev.Rule = err.Error()
		e.log(ev)
		answer(c, err)
		return
	}
	defer out.Close()
	if !e.track(out) {
		return
	}
	defer e.untrack(out)
	e.log(ev)
	if req.method == "CONNECT" {
		e.tunnel(c, br, out)
	} else {
		e.forward(c, br, out, req, viaProxy)
	}
}

// answer tells the inside why not.
func answer(c net.Conn, err error) {
	status := "502 Bad Gateway"
	var r *refusal
	if errors.As(err, &r) {
		status = r.status
	}
	body := "sbxrun: " + err.Error() + "\n"
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(body), body)
	// Closing over unread input resets the connection, and the answer is lost.
	if w, ok := c.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, c, 1<<20)
	}
}

// tunnel copies both ways; the end of one way is passed on as such, the other
// goes on.
func (e *Egress) tunnel(c net.Conn, br *bufio.Reader, out net.Conn) {
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	// What came along with the head belongs to the tunnel.
	early, _ := br.Peek(br.Buffered())
	if _, err := out.Write(early); err != nil {
		return
	}
	e.up.Add(int64(len(early)))
	var wg sync.WaitGroup
	one := func(dst, src net.Conn, count *atomic.Int64) {
		defer wg.Done()
		n, err := io.Copy(dst, src)
		count.Add(n)
		if w, ok := dst.(interface{ CloseWrite() error }); ok && err == nil && w.CloseWrite() == nil {
			return
		}
		c.Close()
		out.Close()
	}
	wg.Add(2)
	go one(out, c, &e.up)
	go one(c, out, &e.down)
	wg.Wait()
}

// forward passes one plain request on and its answer back. Only bytes that were
// understood go out: a second request hidden behind the first never does, which
// matters most where the other side is a proxy that would serve it.
func (e *Egress) forward(c net.Conn, br *bufio.Reader, out net.Conn, req request, viaProxy bool) {
	var b strings.Builder
	uri := req.path
	if viaProxy {
		uri = "http://" + req.authority + req.path
	}
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", req.method, uri, req.authority)
	if viaProxy {
		b.WriteString(e.http.auth)
	}
	for _, h := range req.header {
		b.WriteString(h + "\r\n")
	}
	b.WriteString("Connection: close\r\n\r\n")
	if _, err := io.WriteString(out, b.String()); err != nil {
		return
	}
	e.up.Add(int64(b.Len()))
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		n, err := io.CopyN(out, br, req.bodyBytes)
		e.up.Add(n)
		if err != nil { // the client left in the middle
			out.Close()
		}
	}()
	n, _ := copyReply(c, out)
	e.down.Add(n)
	// As in answer: closing over unread input would lose what was just sent.
	_ = c.SetDeadline(time.Now().Add(time.Second))
	out.Close()
	wg.Wait()
	if w, ok := c.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, c, 1<<20)
	}
}

// copyReply passes an answer on, with "Connection: close" in its head so that
// the client does not send a next request here.
func copyReply(c io.Writer, out net.Conn) (int64, error) {
	_ = out.SetReadDeadline(time.Now().Add(replyTimeout))
	br := bufio.NewReaderSize(out, maxHeadBytes)
	var total int64
	for range 8 { // interim answers come before the one that counts
		lines, err := readHead(br, maxRespHeadBytes, false)
		if err != nil {
			if total == 0 {
				_, _ = io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			}
			return total, err
		}
		interim := strings.HasPrefix(lines[0], "HTTP/1.1 1") || strings.HasPrefix(lines[0], "HTTP/1.0 1")
		var b strings.Builder
		for i, l := range lines {
			if name, _, _ := strings.Cut(l, ":"); i == 0 || !hopByHop[strings.ToLower(name)] {
				b.WriteString(l + "\r\n")
			}
		}
		if !interim {
			b.WriteString("Connection: close\r\n")
		}
		n, err := io.WriteString(c, b.String()+"\r\n")
		total += int64(n)
		if err != nil {
			return total, err
		}
		if !interim {
			break
		}
	}
	buf := make([]byte, 32<<10)
	for {
		_ = out.SetReadDeadline(time.Now().Add(replyTimeout))
		n, err := br.Read(buf)
		if n > 0 {
			if _, werr := c.Write(buf[:n]); werr != nil {
				return total, werr
			}
			total += int64(n)
		}
		if err != nil {
			return total, err
		}
	}
}

// hopByHop is what concerns one connection only. Transfer-Encoding is in an
// answer's body, which passes as it is.
var hopByHop = map[string]bool{"connection": true, "proxy-connection": true, "keep-alive": true, "upgrade": true, "proxy-authenticate": true}

// request is what was read of one.
type request struct {
	method    string
	target    string   // host:port, canonical
	authority string   // for plain requests: what Host says to the server
	path      string   // for plain requests: with the query
	header    []string // what is passed on
	bodyBytes int64
}

// readHead reads lines up to the empty one, without their ends. Strict reading
// ends lines with CR LF only and takes no control characters.
func readHead(br *bufio.Reader, limit int, strict bool) ([]string, error) {
	var lines []string
	for n := 0; ; {
		b, err := br.ReadSlice('\n')
		n += len(b)
		if errors.Is(err, bufio.ErrBufferFull) || n > limit {
			return nil, refuse(tooLarge, "the head is larger than %d bytes", limit)
		}
		if err != nil {
			return nil, refuse(badRequest, "the head is not complete")
		}
		l, ok := strings.CutSuffix(string(b), "\r\n")
		if !ok {
			if strict {
				return nil, refuse(badRequest, "a line does not end with CR LF")
			}
			l = strings.TrimSuffix(l, "\n")
		}
		if strings.ContainsFunc(l, func(r rune) bool { return r < ' ' && (r != '\t' || strict && len(lines) == 0) || r == 0x7f }) {
			return nil, refuse(badRequest, "a control character in the head")
		}
		if l == "" {
			if len(lines) == 0 {
				return nil, refuse(badRequest, "no request")
			}
			return lines, nil
		}
		lines = append(lines, l)
	}
}

// readRequest reads the head of a request and nothing else.
func readRequest(br *bufio.Reader) (req request, err error) {
	lines, err := readHead(br, maxHeadBytes, true)
	if err != nil {
		return req, err
	}
	f := strings.Split(lines[0], " ")
	if len(f) != 3 || !token(f[0]) || f[2] != "HTTP/1.1" && f[2] != "HTTP/1.0" {
		return req, refuse(badRequest, "not an HTTP/1 request")
	}
	req.method = f[0]
	if req.method == "CONNECT" {
		host, port, err := net.SplitHostPort(f[1])
		if err != nil {
			return req, refuse(badRequest, "the target is not host:port")
		}
		if req.target, err = target(host, port); err != nil {
			return req, err
		}
	} else {
		u, err := url.Parse(f[1])
		if err != nil || u.Scheme != "http" || u.Host == "" {
			return req, refuse(badRequest, "neither CONNECT nor an http:// address")
		}
		if u.User != nil || u.Fragment != "" || u.Opaque != "" {
			return req, refuse(badRequest, "a user or fragment in the address")
		}
		port := u.Port()
		if port == "" {
			port = "80"
		}
		if req.target, err = target(u.Hostname(), port); err != nil {
			return req, err
		}
		req.authority = strings.TrimSuffix(req.target, ":80")
		req.path = u.RequestURI()
		if !strings.HasPrefix(req.path, "/") {
			return req, refuse(badRequest, "no path in the address")
		}
	}
	drop := map[string]bool{"host": true, "te": true, "trailer": true, "proxy-authorization": true, "http2-settings": true}
	for k := range hopByHop {
		drop[k] = true
	}
	var header [][2]string
	length := ""
	for _, l := range lines[1:] {
		name, value, ok := strings.Cut(l, ":")
		if !ok || !token(name) { // folded lines and "Name :" too: others read them differently
			return req, refuse(badRequest, "a bad header line")
		}
		name, value = strings.ToLower(name), strings.Trim(value, " \t")
		switch name {
		case "transfer-encoding":
			return req, refuse("411 Length Required", "only bodies with Content-Length are served")
		case "content-length":
			if length != "" {
				return req, refuse(badRequest, "two Content-Length headers")
			}
			if req.bodyBytes, err = strconv.ParseInt(value, 10, 62); err != nil || !digits(value) {
				return req, refuse(badRequest, "a bad Content-Length")
			}
			length = value
		case "connection":
			for _, n := range strings.Split(value, ",") {
				// What it names is not passed on; but not all may be named.
				if n = strings.ToLower(strings.Trim(n, " \t")); n != "content-length" {
					drop[n] = true
				}
			}
		}
		header = append(header, [2]string{name, l})
	}
	if req.method == "CONNECT" {
		if length != "" {
			return req, refuse(badRequest, "CONNECT with a body")
		}
		return req, nil
	}
	for _, h := range header {
		if !drop[h[0]] {
			req.header = append(req.header, h[1])
		}
	}
	return req, nil
}

func token(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune("\"(),/:;<=>?@[\\]{}", r)
	})
}

func digits(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
}

// target gives the one spelling of a host and port that rules are compared with.
func target(host, port string) (string, error) {
	h, ok := canonical(host)
	n, err := strconv.ParseUint(port, 10, 16)
	if !ok || err != nil || n == 0 || !digits(port) {
		return "", refuse(badRequest, "the target is not host:port")
	}
	return net.JoinHostPort(h, strconv.FormatUint(n, 10)), nil
}

func canonical(host string) (string, bool) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().String(), ip.Zone() == ""
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	ok := host != "" && len(host) <= 253 && !strings.ContainsFunc(host, func(r rune) bool {
		return r != '.' && r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z')
	})
	return host, ok
}

func (e *Egress) open(ctx context.Context, req request) (c net.Conn, rule string, viaProxy bool, err error) {
	rule, ok := e.hosts[req.target]
	if !ok {
		return nil, "", false, refuse(forbidden, "%s is not in the list of allowed hosts", req.target)
	}
	host, port, _ := net.SplitHostPort(req.target)
	proxy := e.https
	if req.method != "CONNECT" {
		proxy = e.http
	}
	if proxy.err != nil {
		return nil, rule, false, proxy.err
	}
	if proxy.addr != "" && !e.direct(host) {
		c, err := e.viaProxy(ctx, proxy, req)
		return c, rule, true, err
	}
	ips := make([]netip.Addr, 1)
	if ips[0], err = netip.ParseAddr(host); err != nil {
		if ips, err = e.lookup(ctx, host); err != nil {
			return nil, rule, false, fmt.Errorf("look up %s: %w", host, err)
		}
	}
	var errs []error
	for _, ip := range ips {
		ip = ip.Unmap().WithZone("")
		if err := e.check(host, ip); err != nil {
			errs = append(errs, err)
			continue
		}
		actx, cancel := context.WithTimeout(ctx, addrTimeout)
		c, err := e.dial(actx, "tcp", net.JoinHostPort(ip.String(), port))
		cancel()
		if err == nil {
			return c, rule, false, nil
		}
		errs = append(errs, fmt.Errorf("connect to %s: %w", req.target, err))
	}
	if errs == nil {
		errs = []error{fmt.Errorf("look up %s: no address", host)}
	}
	return nil, rule, false, errors.Join(errs...)
}

// check refuses an address that a name of the outside has no business with.
func (e *Egress) check(host string, ip netip.Addr) error {
	if host == ip.String() || host == "localhost" && ip.IsLoopback() {
		return nil // the list names it
	}
	for _, p := range e.prefixes {
		if p.Contains(ip) {
			return nil
		}
	}
	what := special(ip)
	if what == "" {
		return nil
	}
	return refuse(forbidden, "%s has the %s address %s, which the list of allowed hosts does not name", host, what, ip)
}

// special names the kind of an address that is not a public one; "" is public.
func special(ip netip.Addr) string {
	switch {
	case ip.IsUnspecified():
		return "unspecified"
	case ip.IsLoopback():
		return "loopback"
	case ip.IsLinkLocalUnicast():
		return "link-local" // the metadata services of clouds
	case ip.IsPrivate():
		return "private"
	case ip.IsMulticast():
		return "multicast"
	}
	if nat64.Contains(ip) { // the address within is where it goes
		b := ip.As16()
		return special(netip.AddrFrom4([4]byte(b[12:])))
	}
	for _, p := range reserved {
		if p.Contains(ip) {
			return "reserved"
		}
	}
	// A service on the host may trust what comes from the host.
	if addrs, err := net.InterfaceAddrs(); err == nil {
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == ip {
				return "host's own"
			}
		}
	}
	return ""
}

// reserved has, besides shared and reserved ranges, those in which another
// address hides (local NAT64, 6to4, Teredo, IPv4-compatible).
var reserved = []netip.Prefix{
	prefix4(0, 0, 8), prefix4(100, 64, 10), prefix4(192, 0, 24), prefix4(198, 18, 15), prefix4(240, 0, 4),
	prefix6(0, 0, 96), prefix6(0x0064, 0xff9b, 32), prefix6(0x2002, 0, 16), prefix6(0x2001, 0, 32), prefix6(0xfec0, 0, 10),
}

var nat64 = prefix6(0x0064, 0xff9b, 96)

func prefix4(a, b byte, bits int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{a, b}), bits)
}

func prefix6(a, b uint16, bits int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{byte(a >> 8), byte(a), byte(b >> 8), byte(b)}), bits)
}

// upstream is a proxy that the host itself must use.
type upstream struct {
	addr string // host:port; "" is none
	auth string // a header line, or ""
	err  error  // it is asked for and cannot be used
}

func proxyFrom(vars ...string) upstream {
	for _, k := range vars {
		v := os.Getenv(k)
		if v == "" {
			continue
		}
		if !strings.Contains(v, "://") {
			v = "http://" + v
		}
		u, err := url.Parse(v)
		if err != nil || u.Scheme != "http" || u.Hostname() == "" {
			// Not the value: it may hold a password.
			return upstream{err: fmt.Errorf("use the proxy of %s: only http://host:port can be used", k)}
		}
		p := upstream{addr: u.Host}
		if u.Port() == "" {
			p.addr = net.JoinHostPort(u.Hostname(), "80")
		}
		if u.User != nil {
			pw, _ := u.User.Password()
			p.auth = "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+pw)) + "\r\n"
		}
		return p
	}
	return upstream{}
}

// direct says whether NO_PROXY names the host.
func (e *Egress) direct(host string) bool {
	ip, ipErr := netip.ParseAddr(host)
	for _, n := range e.noProxy {
		if p, err := netip.ParsePrefix(n); err == nil && ipErr == nil && p.Contains(ip) {
			return true
		}
		n = strings.TrimPrefix(strings.TrimPrefix(n, "*"), ".")
		if n == "" || host == n || strings.HasSuffix(host, "."+n) {
			return true
		}
	}
	return false
}

func (e *Egress) viaProxy(ctx context.Context, p upstream, req request) (net.Conn, error) {
	c, err := e.dial(ctx, "tcp", p.addr)
	if err != nil {
		return nil, fmt.Errorf("connect to the host's proxy: %w", err)
	}
	if req.method != "CONNECT" {
		return c, nil
	}
	stop := context.AfterFunc(ctx, func() { c.Close() }) // Close and the time limit
	status, err := connectThrough(c, p, req.target)
	if !stop() {
		err = errors.Join(err, context.Cause(ctx))
	}
	if err == nil && status != "200" {
		err = fmt.Errorf("it answered %q", status)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to %s through the host's proxy: %w", req.target, err)
	}
	return c, nil
}

func connectThrough(c net.Conn, p upstream, target string) (status string, err error) {
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", target, target, p.auth); err != nil {
		return "", err
	}
	// Byte by byte: what follows the head is the tunnel's.
	head, one := make([]byte, 0, 512), make([]byte, 1)
	for !strings.HasSuffix(string(head[max(0, len(head)-4):]), "\r\n\r\n") {
		if len(head) >= maxHeadBytes {
			return "", errors.New("its answer has no end")
		}
		if _, err := io.ReadFull(c, one); err != nil {
			return "", err
		}
		head = append(head, one[0])
	}
	line, _, _ := strings.Cut(string(head), "\r\n")
	f := strings.Fields(line)
	if len(f) < 2 || !strings.HasPrefix(f[0], "HTTP/1.") {
		return "", errors.New("its answer is not HTTP")
	}
	return f[1], nil
}
