// Package publish owns the ports of a namespace that the host serves, and ports
// of the host's loopback that the namespace is given. The former are a socket
// of the host's for each, and for each of its clients a socket that was made
// inside. So it reaches servers that listen on 127.0.0.1 only, and needs no
// address translation, no route and, once Open returned, no privilege. It must
// never know sandboxes, nor decide who may come: that is the host's address
// that a port is bound to, or the mode of a UNIX socket.
//
// A server sees its clients come from 127.0.0.1, or ::1 where it listens there
// only. While nothing listens, a TCP client is accepted and reset at once, as
// docker's proxy does: to hold it until a server comes would hang every loop
// that waits for one by trying.
package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

const (
	defaultMaxConns = 256
	connectTimeout  = 10 * time.Second // a server inside whose backlog is full answers nothing
	// drainTimeout is what Close leaves a server's last answer to get to its client.
	drainTimeout = 500 * time.Millisecond
	// A failed accept or read is tried again after these: what EMFILE is about
	// does not go away by asking.
	minPause, maxPause = 5 * time.Millisecond, time.Second
)

// Forwarder serves the ports until Close.
type Forwarder struct {
	in     *netns.Inside
	log    func(netns.Decision)
	slots  chan struct{} // one for each TCP or UNIX connection at a time
	ctx    context.Context
	cancel context.CancelFunc

	conns, inBytes, outBytes atomic.Int64

	mu      sync.Mutex
	closed  bool
	sockets map[io.Closer]struct{} // the host's listeners
	streams map[*stream]struct{}
	running sync.WaitGroup
}

// Open serves o's Publish, ExposeUnix and HostPorts, and gives the published ports
// with the numbers that were taken. Connections at a time are at most MaxConns over
// all TCP ports and UNIX sockets, and clients at a time at most MaxConns for each
// UDP port; 0 is 256. Log, which may be nil, is called by many goroutines at once.
// The thread in must live until Close returned.
func Open(in *netns.Inside, o netns.Options, log func(netns.Decision)) (*Forwarder, []netns.Port, error) {
	maxConns := o.MaxConns
	if maxConns <= 0 {
		maxConns = defaultMaxConns
	}
	if log == nil {
		log = func(netns.Decision) {}
	}
	f := &Forwarder{
		in: in, log: log, slots: make(chan struct{}, maxConns),
		sockets: map[io.Closer]struct{}{}, streams: map[*stream]struct{}{},
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	var serve []func() // once all are there: none is served where one fails
	taken := make([]netns.Port, 0, len(o.Publish))
	for _, p := range o.Publish {
		to := target{port: p.ContainerPort, rule: rule(p)}
		l, u, err := listen(&p)
		if err != nil {
			return nil, nil, f.fail(err)
		}
		if u != nil {
			f.sockets[u] = struct{}{}
			serve = append(serve, (&udpPort{f: f, host: u, to: to, flows: map[udpClient]*flow{}}).serve)
		} else {
			f.sockets[l] = struct{}{}
			serve = append(serve, func() { f.accept(l, to) })
		}
		taken = append(taken, p)
	}
	for _, p := range o.HostPorts {
		l, err := f.listenInside(p)
		if err != nil {
			return nil, nil, f.fail(err)
		}
		f.sockets[l] = struct{}{}
		to := target{port: p.HostPort, rule: hostRule(p), onHost: true}
		serve = append(serve, func() { f.accept(l, to) })
	}
	var placed []string
	for _, p := range o.ExposeUnix {
		l, err := listenUnix(p)
		if err != nil {
			for _, x := range placed {
				err = errors.Join(err, os.Remove(x)) // ours: served since, and no job runs yet
			}
			return nil, nil, f.fail(err)
		}
		placed = append(placed, p.Path)
		f.sockets[l] = struct{}{}
		to := target{port: p.ContainerPort, rule: fmt.Sprintf("--expose-unix %s:%d", p.Path, p.ContainerPort)}
		serve = append(serve, func() { f.accept(l, to) })
	}
	for _, s := range serve {
		f.running.Go(s)
	}
	return f, taken, nil
}

func (f *Forwarder) fail(err error) error {
	_ = f.Close() // of what has served nobody
	return err
}

// Stats are connections and UDP clients so far, and the bytes to and from the
// namespace. A direction of a connection counts when it has ended: after Close
// all have.
func (f *Forwarder) Stats() (conns, in, out int64) {
	return f.conns.Load(), f.inBytes.Load(), f.outBytes.Load()
}

// Close ends all, and returns when all has ended. Whoever serves inside should
// be gone by then: what it sent before is still delivered, within limits. The
// files of UNIX sockets stay.
func (f *Forwarder) Close() error {
	f.mu.Lock()
	first := !f.closed
	f.closed = true
	var streams []*stream
	for s := range f.streams {
		streams = append(streams, s)
	}
	f.mu.Unlock()
	var err error
	if first {
		for s := range f.sockets {
			if e := s.Close(); e != nil && err == nil {
				err = fmt.Errorf("close published port: %w", e)
			}
		}
		drained := time.NewTimer(drainTimeout)
		defer drained.Stop()
	wait:
		for _, s := range streams {
			select {
			case <-s.answered:
			case <-drained.C:
				break wait
			}
		}
		f.cancel()
		for _, s := range streams {
			s.close()
		}
	}
	f.running.Wait()
	return err
}

// start serves a connection, unless Close was called.
func (f *Forwarder) start(s *stream, to target) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.streams[s] = struct{}{}
		f.running.Go(func() { f.serve(s, to) })
	}
	return !f.closed
}

// pause waits before something is tried again, each time longer. It is false
// when there is no again.
func (f *Forwarder) pause(d *time.Duration) bool {
	*d = min(max(2**d, minPause), maxPause)
	t := time.NewTimer(*d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-f.ctx.Done():
		return false
	}
}

// target is where a port leads, and how the user named it.
type target struct {
	port   int
	rule   string
	onHost bool
}

func rule(p netns.Port) string {
	s := "-p "
	if p.HostIP != "" {
		s += net.JoinHostPort(p.HostIP, strconv.Itoa(p.HostPort))
	} else {
		s += strconv.Itoa(p.HostPort)
	}
	s += ":" + strconv.Itoa(p.ContainerPort)
	if p.Proto != "tcp" {
		s += "/" + p.Proto
	}
	return s
}

func (f *Forwarder) decided(to target, at netip.Addr, err error) {
	d := netns.Decision{Time: time.Now(), Via: to.via(), Address: at.String(), Port: to.port, Allowed: true, Rule: to.rule}
	if err != nil {
		d.Error = err.Error()
	} else {
		f.conns.Add(1)
	}
	f.log(d)
}
