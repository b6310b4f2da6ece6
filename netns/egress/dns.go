package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/sbxrun/sbxrun/netns"
)

const (
	maxQueries    = 64   // at a time by UDP; more are dropped, and asked again
	maxQueryBytes = 1500 // no query is nearly as long
	answerTTL     = 60   // seconds
)

// serveUDP answers queries.
func (e *Egress) serveUDP(c *net.UDPConn) {
	slots := make(chan struct{}, maxQueries)
	buf := make([]byte, maxQueryBytes)
	// What is answered costs this process time that the job's limits do not hold.
	rate := newBucket(queriesPerSecond, queryBurst)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) || e.ctx.Err() != nil {
				return
			}
			e.pause()
			continue
		}
		if !rate.try(time.Now()) {
			continue // as a name server that is busy: the client asks again
		}
		select {
		case slots <- struct{}{}:
		default:
			continue
		}
		query := append([]byte(nil), buf[:n]...)
		e.start(func() {
			defer func() { <-slots }()
			if reply := e.answer(query); reply != nil {
				_, _ = c.WriteToUDPAddrPort(reply, from)
			}
		})
	}
}

const (
	queriesPerSecond = 500
	queryBurst       = 2000
)

// serveDNS answers queries that come by TCP, one after the other.
func (e *Egress) serveDNS(c net.Conn) {
	buf := make([]byte, 2+maxQueryBytes)
	for {
		_ = c.SetDeadline(time.Now().Add(headTimeout))
		if _, err := io.ReadFull(c, buf[:2]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(buf))
		if n > maxQueryBytes {
			return
		}
		if _, err := io.ReadFull(c, buf[2:2+n]); err != nil {
			return
		}
		reply := e.answer(buf[2 : 2+n])
		if reply == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
			return
		}
	}
}

// answer gives the reply to a message; nil where it is not a query.
func (e *Egress) answer(msg []byte) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil || h.Response {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	reply := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	switch _, err := p.Question(); {
	case !errors.Is(err, dnsmessage.ErrSectionDone):
		reply.RCode = dnsmessage.RCodeFormatError
	case h.OpCode != 0:
		reply.RCode = dnsmessage.RCodeNotImplemented
	case q.Class != dnsmessage.ClassINET:
		reply.RCode = dnsmessage.RCodeRefused
	default:
		var body dnsmessage.ResourceBody
		if reply.RCode, body = e.resolve(q); body != nil {
			reply.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: answerTTL}, Body: body}}
		}
	}
	b, err := reply.Pack()
	if err != nil {
		return nil
	}
	return b
}

// resolve answers one question; no body is an empty answer. A denied name does not
// exist: that ends the attempts of programs at once, which a refusal does not.
func (e *Egress) resolve(q dnsmessage.Question) (dnsmessage.RCode, dnsmessage.ResourceBody) {
	asked := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	if asked == "localhost" || strings.HasSuffix(asked, ".localhost") {
		return dnsmessage.RCodeSuccess, e.body(q.Type, netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback())
	}
	if strings.HasSuffix(asked, ".arpa") {
		return dnsmessage.RCodeNameError, nil // nothing leads back, and nobody is told of the attempt
	}
	name, err := canonicalName(asked)
	if err != nil {
		e.noteDNS(netns.Decision{Host: strconv.QuoteToASCII(asked), Rule: err.Error()})
		return dnsmessage.RCodeNameError, nil
	}
	rule, ok := e.policy.forName(name, 0)
	d := netns.Decision{Host: name, Rule: rule, Allowed: ok}
	if !ok {
		e.noteDNS(d)
		return dnsmessage.RCodeNameError, nil
	}
	if q.Type != dnsmessage.TypeA && q.Type != dnsmessage.TypeAAAA {
		return dnsmessage.RCodeSuccess, nil
	}
	if e.direct(name, e.https) { // else only the proxy may know it
		ctx, cancel := context.WithTimeout(e.ctx, addrTimeout)
		_, err = e.resolver.lookup(ctx, name)
		cancel()
	}
	n := 0
	if err == nil {
		if n, ok = e.names.number(name); !ok {
			err = errors.New("more than " + strconv.Itoa(maxNames) + " names")
		}
	}
	if err != nil {
		d.Error = err.Error()
		e.noteDNS(d)
		if notFound(err) {
			return dnsmessage.RCodeNameError, nil
		}
		return dnsmessage.RCodeServerFailure, nil
	}
	return dnsmessage.RCodeSuccess, e.body(q.Type, addr4(n), addr6(n))
}

func (e *Egress) body(kind dnsmessage.Type, v4, v6 netip.Addr) dnsmessage.ResourceBody {
	switch {
	case kind == dnsmessage.TypeA:
		return &dnsmessage.AResource{A: v4.As4()}
	case kind == dnsmessage.TypeAAAA && e.sockets.v6:
		return &dnsmessage.AAAAResource{AAAA: v6.As16()}
	}
	return nil
}

// recent is what was noted a moment ago: a program asks for both kinds of
// address, and again.
type recent struct {
	mu   sync.Mutex
	seen map[string]time.Time
}

func (r *recent) add(name string) (isNew bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if t, ok := r.seen[name]; ok && now.Sub(t) < time.Second {
		return false
	}
	if r.seen == nil || len(r.seen) >= maxAnswers {
		r.seen = map[string]time.Time{}
	}
	r.seen[name] = now
	return true
}

func (e *Egress) noteDNS(d netns.Decision) {
	if e.recent.add(d.Host) {
		d.Via = "dns"
		e.note(d)
	}
}
