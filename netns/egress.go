package netns

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// Event is one decision of the proxy.
type Event struct {
	Host    string // host:port as asked
	Allowed bool
	Rule    string // the entry that decided, or why not
}

// Dial connects to an address on behalf of the inside.
type Dial func(ctx context.Context, network, addr string) (net.Conn, error)

// Egress is an HTTP CONNECT proxy that reaches named hosts only. It exists for
// bakes: no name is looked up inside, and what was checked is what is dialled.
type Egress struct {
	l      net.Listener
	allow  []string
	dial   Dial
	log    func(Event)
	proxy  string // the host's own proxy, host:port; "" is none
	wg     sync.WaitGroup
	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Limits of a request's head and of the time it may take.
const (
	maxHeadBytes = 16 << 10
	headTimeout  = 10 * time.Second
	dialTimeout  = 30 * time.Second
	maxConns     = 128
)

// Serve answers on l until Close. allow holds "host" (port 443) or
// "host:port". dial and log may be nil. The host's own HTTPS_PROXY is used.
func Serve(l net.Listener, allow []string, dial Dial, log func(Event)) *Egress {
	e := &Egress{l: l, dial: dial, log: log, conns: map[net.Conn]bool{}, proxy: upstream()}
	for _, a := range allow {
		if _, _, err := net.SplitHostPort(a); err != nil {
			a = net.JoinHostPort(strings.Trim(a, "[]"), "443")
		}
		e.allow = append(e.allow, strings.ToLower(a))
	}
	if e.dial == nil {
		e.dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	if e.log == nil {
		e.log = func(Event) {}
	}
	e.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}
	e.wg.Add(1)
	go e.accept()
	return e
}

// upstream is the proxy that the host itself must use.
func upstream() string {
	for _, k := range []string{"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"} {
		u, err := url.Parse(os.Getenv(k))
		if err == nil && u.Scheme == "http" && u.Host != "" {
			if u.Port() == "" {
				return u.Host + ":80"
			}
			return u.Host
		}
	}
	return ""
}

func (e *Egress) accept() {
	defer e.wg.Done()
	for {
		c, err := e.l.Accept()
		if err != nil {
			return
		}
		if !e.track(c, true) {
			c.Close()
			continue
		}
		e.wg.Add(1)
		go func() {
			defer e.wg.Done()
			defer e.track(c, false)
			defer c.Close()
			e.serve(c)
		}()
	}
}

func (e *Egress) track(c net.Conn, on bool) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !on {
		delete(e.conns, c)
		return true
	}
	if e.closed || len(e.conns) >= maxConns {
		return false
	}
	e.conns[c] = true
	return true
}

// Close ends the listener and every connection and waits for them.
func (e *Egress) Close() error {
	err := e.l.Close()
	e.mu.Lock()
	e.closed = true
	for c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	e.wg.Wait()
	return err
}

func (e *Egress) serve(c net.Conn) {
	_ = c.SetReadDeadline(time.Now().Add(headTimeout))
	br := bufio.NewReader(io.LimitReader(c, maxHeadBytes))
	target, err := readConnect(br)
	if err != nil {
		fmt.Fprintf(c, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nsbxrun: %v\n", err)
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	out, rule, err := e.open(ctx, target)
	e.log(Event{Host: target, Allowed: out != nil, Rule: rule})
	if err != nil {
		code := "502 Bad Gateway"
		if errors.Is(err, errDenied) {
			code = "403 Forbidden"
		}
		fmt.Fprintf(c, "HTTP/1.1 %s\r\nConnection: close\r\n\r\nsbxrun: %v\n", code, err)
		return
	}
	defer out.Close()
	if !e.track(out, true) {
		return
	}
	defer e.track(out, false)
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	// What came along with the head belongs to the tunnel.
	early, _ := br.Peek(br.Buffered())
	if _, err := out.Write(early); err != nil {
		return
	}
	splice(c, out)
}

// splice copies both ways; the end of one way is passed on as such.
func splice(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, p := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := io.Copy(p[0], p[1])
			if w, ok := p[0].(interface{ CloseWrite() error }); ok && err == nil {
				_ = w.CloseWrite()
				return
			}
			p[0].Close()
			p[1].Close()
		}()
	}
	wg.Wait()
}

// readConnect reads the head of a CONNECT request and nothing else.
func readConnect(br *bufio.Reader) (string, error) {
	tp := textproto.NewReader(br)
	line, err := tp.ReadLine()
	if err != nil {
		return "", errors.New("no request")
	}
	f := strings.Split(line, " ")
	if len(f) != 3 || f[0] != "CONNECT" || !strings.HasPrefix(f[2], "HTTP/1.") {
		return "", errors.New("only CONNECT is served")
	}
	if _, err := tp.ReadMIMEHeader(); err != nil {
		return "", errors.New("bad header")
	}
	host, port, err := net.SplitHostPort(f[1])
	if err != nil || host == "" || port == "" || strings.ContainsAny(f[1], "@/\\%") {
		return "", errors.New("bad target")
	}
	return strings.ToLower(net.JoinHostPort(strings.TrimSuffix(host, "."), port)), nil
}

var errDenied = errors.New("not allowed")

func (e *Egress) open(ctx context.Context, target string) (net.Conn, string, error) {
	rule := ""
	for _, a := range e.allow {
		if a == target {
			rule = a
		}
	}
	if rule == "" {
		return nil, "not in the list", fmt.Errorf("connect to %s: %w", target, errDenied)
	}
	if e.proxy != "" {
		return e.viaProxy(ctx, target, rule)
	}
	host, port, _ := net.SplitHostPort(target)
	var addrs []netip.Addr
	literal := false
	if ip, err := netip.ParseAddr(host); err == nil {
		addrs, literal = []netip.Addr{ip}, true
	} else if addrs, err = e.lookup(ctx, host); err != nil {
		return nil, rule, fmt.Errorf("look up %s: %w", host, err)
	}
	var errs []error
	for _, ip := range addrs {
		ip = ip.Unmap()
		// A name may point anywhere (DNS rebinding): at what is the host's own
		// only if the list names that address itself, or localhost.
		if !literal && host != "localhost" && special(ip) {
			errs = append(errs, fmt.Errorf("connect to %s: %s is an address of this host or its network: %w", target, ip, errDenied))
			continue
		}
		c, err := e.dial(ctx, "tcp", net.JoinHostPort(ip.String(), port))
		if err == nil {
			return c, rule, nil
		}
		errs = append(errs, err)
	}
	return nil, rule, errors.Join(errs...)
}

// special says whether an address is not a public one. Private ranges are not
// in it: the indexes of companies live there, and the list names them.
func special(ip netip.Addr) bool {
	return ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast() || ip.IsInterfaceLocalMulticast()
}

func (e *Egress) viaProxy(ctx context.Context, target, rule string) (net.Conn, string, error) {
	c, err := e.dial(ctx, "tcp", e.proxy)
	if err != nil {
		return nil, rule, fmt.Errorf("connect to proxy: %w", err)
	}
	_ = c.SetDeadline(time.Now().Add(dialTimeout))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target)
	// Byte by byte: what follows the head is the tunnel's.
	head, one := make([]byte, 0, 512), make([]byte, 1)
	for !strings.HasSuffix(string(head), "\r\n\r\n") && len(head) < maxHeadBytes {
		if _, err := c.Read(one); err != nil {
			c.Close()
			return nil, rule, fmt.Errorf("connect through proxy: %w", err)
		}
		head = append(head, one[0])
	}
	status, _, _ := strings.Cut(string(head), "\r\n")
	if f := strings.Fields(status); len(f) < 2 || f[1] != "200" {
		c.Close()
		return nil, rule, fmt.Errorf("connect through proxy: it answered %q", status)
	}
	_ = c.SetDeadline(time.Time{})
	return c, rule, nil
}
