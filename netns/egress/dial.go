package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

// target is what the inside asks for, in its one spelling.
type target struct {
	name string // "" where an address was asked for
	addr netip.Addr
	port uint16
}

func parseTarget(host, port string) (t target, err error) {
	var ok bool
	if t.port, ok = parsePort(port); !ok {
		return t, errors.New("the target is not host:port")
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		t.addr = ip.Unmap()
		if ip.Zone() != "" {
			return t, errors.New("the target has a zone")
		}
		return t, nil
	}
	if t.name, err = canonicalName(host); err != nil {
		return t, fmt.Errorf("the target is not host:port: %w", err)
	}
	return t, nil
}

func (t target) host() string {
	if t.name != "" {
		return t.name
	}
	return t.addr.String()
}

func (t target) String() string {
	return net.JoinHostPort(t.host(), strconv.Itoa(int(t.port)))
}

// named gives the name that an address was given for: a program may have looked
// it up itself before it asks the proxy.
func (e *Egress) named(t target) target {
	if t.name == "" {
		if name := e.names.of(t.addr); name != "" {
			return target{name: name, port: t.port}
		}
	}
	return t
}

// reach decides about a target and connects to it, through the host's own proxy
// p where there is one. The connection is nil where d says why.
func (e *Egress) reach(ctx context.Context, via string, t target, p proxy) (c net.Conn, d netns.Decision) {
	t = e.named(t)
	d = netns.Decision{Via: via, Host: t.name, Port: int(t.port)}
	if t.name == "" {
		d.Address = t.addr.String()
	}
	switch {
	case e.full():
		d.Rule = e.byteLimit()
	case t.name != "":
		d.Rule, d.Allowed = e.policy.forName(t.name, t.port)
	default:
		d.Rule, d.Allowed = e.policy.forAddress(t.addr, t.port)
	}
	if !d.Allowed {
		return nil, d
	}
	var err error
	switch {
	case e.direct(t.host(), p):
		c, err = e.dial(ctx, t, &d)
	case p.err != nil:
		err = p.err
	default:
		c, err = e.throughProxy(ctx, p, t, via == "http")
	}
	if err != nil {
		d.Error = err.Error()
		return nil, d
	}
	return c, d
}

// dial looks a name up and connects to the first address that may be and answers.
func (e *Egress) dial(ctx context.Context, t target, d *netns.Decision) (net.Conn, error) {
	ips := []netip.Addr{t.addr}
	if t.name != "" {
		var err error
		if ips, err = e.resolver.lookup(ctx, t.name); err != nil {
			return nil, fmt.Errorf("look up %s: %w", t.name, err)
		}
	}
	var errs []error
	refused := ""
	for _, ip := range ips {
		ip = ip.Unmap().WithZone("")
		if t.name != "" {
			if why, ok := e.policy.leadsTo(t.name, ip, t.port); !ok {
				if refused == "" {
					refused, d.Address = why, ip.String()
				}
				continue
			}
		}
		actx, cancel := context.WithTimeout(ctx, addrTimeout)
		c, err := e.upstream.Dial(actx, "tcp", netip.AddrPortFrom(ip, t.port).String())
		cancel()
		if err == nil {
			d.Address = ip.String()
			return c, nil
		}
		errs = append(errs, err)
	}
	if errs == nil && refused != "" {
		d.Rule, d.Allowed = refused, false
		return nil, nil
	}
	if refused != "" {
		d.Address = ""
	}
	return nil, errors.Join(errs...)
}

func hostLookup(ctx context.Context, name string) ([]netip.Addr, error) {
	if strings.Contains(name, ".") {
		name += "." // as it is, without the host's search domains
	}
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// resolver looks names up outside. Programs ask for each name several times at
// once and then connect, so answers are kept for a moment; and at a bounded rate,
// so that look-ups below a *.HOST are no way out for data.
type resolver struct {
	look func(context.Context, string) ([]netip.Addr, error)
	rate *bucket

	mu    sync.Mutex
	known map[string]*answer
}

type answer struct {
	done  chan struct{}
	until time.Time
	ips   []netip.Addr
	err   error
}

const (
	lookupsPerSecond = 20
	lookupsBurst     = 200
	answerTime       = 5 * time.Second
	maxAnswers       = 1024
)

var errTooManyLookups = fmt.Errorf("too many look-ups: more than %d in a second", lookupsPerSecond)

func (r *resolver) init(look func(context.Context, string) ([]netip.Addr, error)) {
	r.look, r.rate, r.known = look, newBucket(lookupsPerSecond, lookupsBurst), map[string]*answer{}
}

func (r *resolver) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	now := time.Now()
	r.mu.Lock()
	a := r.known[name]
	if a == nil || now.After(a.until) {
		if !r.rate.try(now) {
			r.mu.Unlock()
			return nil, errTooManyLookups
		}
		if len(r.known) >= maxAnswers {
			clear(r.known) // whoever waits for one of them has it
		}
		a = &answer{done: make(chan struct{}), until: now.Add(dialTimeout)}
		r.known[name] = a
		r.mu.Unlock()
		ips, err := r.look(ctx, name)
		if err == nil && len(ips) == 0 {
			err = &net.DNSError{Err: "no address", Name: name, IsNotFound: true}
		}
		r.mu.Lock()
		a.ips, a.err, a.until = ips, err, time.Now().Add(answerTime)
		if err != nil && !notFound(err) {
			a.until = time.Time{} // the next one tries again
		}
		close(a.done)
		r.mu.Unlock()
		return ips, err
	}
	r.mu.Unlock()
	select {
	case <-a.done:
		return a.ips, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func notFound(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound
}
