package publish

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// udpIdle is how long a client is remembered that neither asks nor is answered;
// a variable for tests.
var udpIdle = 90 * time.Second

const maxDatagramBytes = 65535

// udpPort is a published UDP port: each client has a socket inside of its own,
// so that answers find back.
type udpPort struct {
	f    *Forwarder
	host *net.UDPConn
	to   target

	mu    sync.Mutex // guards what is in the flows too
	flows map[udpClient]*flow
}

// udpClient is who asked, and at which of the host's addresses: as the control
// message that answers from there.
type udpClient struct {
	addr netip.AddrPort
	at   string
}

type flow struct {
	client   udpClient
	conn     net.Conn // connected to loopbacks[on]
	on       int
	first    []byte // the first datagram, as long as it may have to go elsewhere
	answered bool
	last     time.Time // that anything was moved
	ended    bool
}

// serve has the goroutine that all datagrams from the host go through.
func (u *udpPort) serve() {
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		for _, fl := range u.flows {
			u.end(fl)
		}
	}()
	b, oob := make([]byte, maxDatagramBytes), make([]byte, 128)
	for pause := time.Duration(0); ; {
		n, oobn, _, addr, err := u.host.ReadMsgUDPAddrPort(b, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if !u.f.pause(&pause) {
				return
			}
			continue
		}
		pause = 0
		u.send(udpClient{addr, string(answerFrom(oob[:oobn]))}, b[:n])
	}
}

// send moves a datagram inside. What cannot be sent is lost, as datagrams are.
func (u *udpPort) send(client udpClient, b []byte) {
	for range 3 { // an error may be an earlier datagram's, which this one need not pay for
		fl, conn := u.flow(client, b)
		if fl == nil {
			return
		}
		n, err := conn.Write(b)
		if err == nil {
			u.f.inBytes.Add(int64(n))
			return
		}
		u.retry(fl, conn, err)
	}
}

// flow gives the client's, and the socket inside to send by; nil where none can be made.
func (u *udpPort) flow(client udpClient, first []byte) (*flow, net.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if fl := u.flows[client]; fl != nil {
		fl.last = time.Now()
		return fl, fl.conn
	}
	if len(u.flows) >= cap(u.f.slots) {
		u.end(u.leastWanted())
	}
	conn, err := u.f.socket(unix.SOCK_DGRAM, netip.AddrPortFrom(loopbacks[0], uint16(u.to.port)))
	if err != nil {
		u.f.decided(u.to, loopbacks[0], err)
		return nil, nil
	}
	fl := &flow{client: client, conn: conn, first: bytes.Clone(first), last: time.Now()}
	u.flows[client] = fl
	u.f.running.Go(func() { u.answer(fl, conn) }) // serve is running: Close waits
	return fl, conn
}

// leastWanted is the flow that makes room: one that was never answered, so that
// a flood from forged addresses does not push out who is talking; of those the
// one idle for longest.
func (u *udpPort) leastWanted() *flow {
	var least *flow
	for _, fl := range u.flows {
		if least == nil || least.answered && !fl.answered || least.answered == fl.answered && fl.last.Before(least.last) {
			least = fl
		}
	}
	return least
}

// end forgets a flow. The caller holds u.mu.
func (u *udpPort) end(fl *flow) {
	if !fl.ended {
		fl.ended = true
		delete(u.flows, fl.client)
		fl.conn.Close()
	}
}

// retry says whether the flow goes on after an error of conn, with the socket
// that it has then.
func (u *udpPort) retry(fl *flow, conn net.Conn, err error) (net.Conn, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case fl.ended:
		return nil, false
	case fl.conn != conn: // it was moved meanwhile
		return fl.conn, true
	case errors.Is(err, os.ErrDeadlineExceeded) && time.Since(fl.last) < udpIdle:
		return conn, true
	case errors.Is(err, unix.ECONNREFUSED) && fl.first != nil && fl.on+1 < len(loopbacks):
		// Nothing was ever answered: the server may be at the next address.
		fl.on++
		next, err := u.f.socket(unix.SOCK_DGRAM, netip.AddrPortFrom(loopbacks[fl.on], uint16(u.to.port)))
		if err == nil {
			conn.Close()
			fl.conn = next
			_, _ = next.Write(fl.first)
			return next, true
		}
	}
	u.end(fl)
	return nil, false
}

// answer moves what comes from inside to the client, until the flow ends.
func (u *udpPort) answer(fl *flow, conn net.Conn) {
	b := make([]byte, maxDatagramBytes)
	last, answered := time.Now(), false
	for {
		_ = conn.SetReadDeadline(last.Add(udpIdle)) // fails on a closed socket, as the read does
		n, err := conn.Read(b)
		if err != nil {
			next, ok := u.retry(fl, conn, err)
			if !ok && !answered {
				if !errors.Is(err, unix.ECONNREFUSED) {
					err = nil // nobody has to answer
				}
				u.f.decided(u.to, addrOf(conn), err)
			}
			if !ok {
				return
			}
			conn = next
		}
		u.mu.Lock()
		if err == nil {
			fl.first, fl.answered, fl.last = nil, true, time.Now()
		}
		last = fl.last
		u.mu.Unlock()
		if err != nil {
			continue
		}
		if !answered {
			answered = true
			u.f.decided(u.to, addrOf(conn), nil)
		}
		if n, _, err := u.host.WriteMsgUDPAddrPort(b[:n], []byte(fl.client.at), fl.client.addr); err == nil {
			u.f.outBytes.Add(int64(n))
		}
	}
}
