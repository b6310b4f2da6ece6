// Package egress opens a network namespace that has only lo to what a policy
// allows, without a device, an address of the host's or translation there. It
// owns the sockets inside, to which all of the namespace's traffic is diverted,
// and the dialling outside:
//
//   - every address is a local one inside (AnyIP), and one nftables table leads
//     every TCP connection to one listener, which is told where it was meant to go;
//   - every DNS query leads to a responder that gives each allowed name an
//     address of its own, so that the name is known when it is connected to,
//     whatever protocol is spoken; a denied name is never looked up;
//   - what is connected to as 198.18.0.1:3128 speaks to an HTTP proxy;
//   - everything else but the job's own loopback is rejected at once.
//
// A name is looked up outside, and exactly the address that was checked is
// dialled, so that a name cannot change its meaning in between (DNS rebinding).
// Privileges are needed by Open only. It must never know sandboxes.
package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

// Config is what is asked for. 0 is no limit, for MaxConns the default of 256.
type Config struct {
	Policy      *Policy
	MaxConns    int   // connections at a time; more are refused
	MaxBytes    int64 // both ways together; may be passed by 64 KiB for each way of each connection
	RateUpBPS   int64 // bits per second
	RateDownBPS int64
	// Log is called for each decision, from one goroutine. When it is slow,
	// decisions are dropped, and their number is said. It may be nil.
	Log      func(netns.Decision)
	Upstream Upstream
}

// Upstream is the outside; the zero value is the host's network.
type Upstream struct {
	// Dial connects to a numeric address that was checked, or to the host's own proxy.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Lookup gives the addresses of a name. That there are none is a
	// *net.DNSError with IsNotFound.
	Lookup func(ctx context.Context, name string) ([]netip.Addr, error)
}

const defaultMaxConns = 256

// The tests shorten these.
var (
	slotTimeout = 2 * time.Second  // a new connection's wait for the end of another
	headTimeout = 10 * time.Second // from accept to the end of the head, however slowly it drips
	dialTimeout = 30 * time.Second // look-up and all addresses of a name
	addrTimeout = 10 * time.Second // one address
)

// Egress serves one namespace.
type Egress struct {
	policy   *Policy
	maxBytes int64
	upstream Upstream
	https    proxy
	http     proxy
	noProxy  []string
	sockets  *sockets
	names    names
	resolver resolver
	recent   recent
	journal  *journal

	ctx      context.Context // ends with Close: dials must not hold it up
	cancel   context.CancelFunc
	slots    chan struct{}
	wg       sync.WaitGroup
	up, down meter

	connections, denied atomic.Int64

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

// Open sets everything up in ns and serves it until Close. It needs
// CAP_NET_ADMIN over ns; afterwards ns may be closed and privileges dropped.
// HTTPS_PROXY, HTTP_PROXY and NO_PROXY of this process are honoured: through
// such a proxy names are resolved there, and only names are checked.
func Open(ns *netns.NS, c Config) (*Egress, error) {
	if c.Policy == nil {
		return nil, errors.New("open network: no policy")
	}
	e := newEgress(c)
	err := ns.Do(func() (err error) {
		e.sockets, err = setUp()
		return err
	})
	if err != nil {
		e.cancel()
		e.journal.close()
		return nil, err
	}
	for _, l := range e.sockets.tcp {
		e.start(func() { e.accept(l, e.serve) })
	}
	for _, s := range e.sockets.udp {
		e.start(func() { e.serveUDP(s) })
	}
	return e, nil
}

func newEgress(c Config) *Egress {
	if c.MaxConns <= 0 {
		c.MaxConns = defaultMaxConns
	}
	e := &Egress{
		policy: c.Policy, maxBytes: c.MaxBytes, upstream: c.Upstream, sockets: &sockets{},
		https: proxyFrom("HTTPS_PROXY", "https_proxy"), http: proxyFrom("HTTP_PROXY", "http_proxy"), noProxy: noProxyFrom("NO_PROXY", "no_proxy"),
		slots: make(chan struct{}, c.MaxConns), conns: map[net.Conn]bool{}, journal: openJournal(c.Log),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.up.init(c.RateUpBPS, c.MaxBytes)
	e.down.init(c.RateDownBPS, c.MaxBytes)
	if e.upstream.Dial == nil {
		e.upstream.Dial = (&net.Dialer{}).DialContext
	}
	if e.upstream.Lookup == nil {
		e.upstream.Lookup = hostLookup
	}
	e.resolver.init(e.upstream.Lookup)
	return e
}

func (e *Egress) start(f func()) {
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		f()
	}()
}

// Stats gives the figures so far. Bytes of a transfer are counted as it goes,
// all of them once it has ended; after Close that is all.
func (e *Egress) Stats() netns.Stats {
	return netns.Stats{
		Connections: e.connections.Load(), Denied: e.denied.Load(),
		UpBytes: e.up.bytes.Load(), DownBytes: e.down.bytes.Load(),
	}
}

// Env are the variables that lead programs to the proxy: a name then needs no
// look-up inside. There is no ALL_PROXY: what does not speak to HTTP proxies works
// without one.
func (e *Egress) Env() []string {
	url := "http://" + netip.AddrPortFrom(own4, proxyPort).String()
	direct := "localhost,127.0.0.1,::1," + own4.String()
	return []string{
		"HTTP_PROXY=" + url, "HTTPS_PROXY=" + url, "NO_PROXY=" + direct,
		"http_proxy=" + url, "https_proxy=" + url, "no_proxy=" + direct,
	}
}

// Resolv is the content of /etc/resolv.conf.
func (e *Egress) Resolv() string { return "nameserver " + own4.String() + "\n" }

// Close ends the sockets and every connection and waits for them; Log has then
// been told everything. It may be called again.
func (e *Egress) Close() error {
	e.mu.Lock()
	again := e.closed
	e.closed = true
	for c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	e.cancel()
	if again {
		e.wg.Wait()
		return nil
	}
	err := e.sockets.close()
	e.wg.Wait()
	e.journal.close()
	return err
}

// accept serves connections, as many at a time as there are slots. When there is
// none, one wait is granted; until one is free again all others are refused at
// once, so that a program is told rather than left hanging.
func (e *Egress) accept(l *net.TCPListener, serve func(*net.TCPConn)) {
	wait := slotTimeout
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || e.ctx.Err() != nil {
				return
			}
			e.pause()
			continue
		}
		if !e.slot(wait) {
			wait = 0
			e.refuseOneMore(c)
			continue
		}
		wait = slotTimeout
		e.start(func() {
			defer func() { <-e.slots }()
			defer c.Close()
			if e.track(c) {
				defer e.untrack(c)
				serve(c)
			}
		})
	}
}

func (e *Egress) slot(wait time.Duration) bool {
	select {
	case e.slots <- struct{}{}:
		return true
	default:
	}
	if wait == 0 {
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case e.slots <- struct{}{}:
		return true
	case <-timer.C:
	case <-e.ctx.Done():
	}
	return false
}

// refuseOneMore says what there was no slot for.
func (e *Egress) refuseOneMore(c *net.TCPConn) {
	d := netns.Decision{Via: "tcp", Rule: fmt.Sprintf("connection limit %d", cap(e.slots))}
	if to, err := originalTarget(c); err == nil {
		t := e.named(target{addr: to.Addr(), port: to.Port()})
		d.Host, d.Port = t.name, int(t.port)
		if t.name == "" {
			d.Address = t.addr.String()
		}
	}
	reset(c)
	e.note(d)
}

// pause waits after an error that passes: out of descriptors, perhaps.
func (e *Egress) pause() {
	select {
	case <-time.After(20 * time.Millisecond):
	case <-e.ctx.Done():
	}
}

// serve finds out what a connection from inside is.
func (e *Egress) serve(c *net.TCPConn) {
	to, err := originalTarget(c)
	switch own := slices.Contains([]netip.Addr{own4, own6}, to.Addr()); {
	case err != nil: // it was not diverted but came to our socket itself
		reset(c)
	case own && to.Port() == proxyPort:
		e.serveProxy(c)
	case to.Port() == dnsPort: // whatever server it was meant for
		e.serveDNS(c)
	case own:
		reset(c)
	default:
		e.serveTransparent(c, to)
	}
}

// serveTransparent serves what believes to be connected to to already.
func (e *Egress) serveTransparent(c *net.TCPConn, to netip.AddrPort) {
	t := target{addr: to.Addr(), port: to.Port()}
	ctx, cancel := context.WithTimeout(e.ctx, dialTimeout)
	out, d := e.reach(ctx, "tcp", t, e.https)
	cancel()
	e.note(d)
	if out == nil {
		reset(c)
		return
	}
	defer out.Close()
	if e.track(out) {
		defer e.untrack(out)
		e.tunnel(c, out, d)
	}
}

// reset has the other side see that there is no connection, and not an empty answer.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
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

// note counts a decision and has it logged.
func (e *Egress) note(d netns.Decision) {
	d.Time = time.Now()
	switch {
	case !d.Allowed:
		e.denied.Add(1)
	case d.Error == "" && d.Via != "dns":
		e.connections.Add(1)
	}
	e.journal.note(d)
}
