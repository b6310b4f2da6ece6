package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// half is what TCP and UNIX connections have in common; io.Copy between two of
// them does not copy, it splices.
type half interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// stream is one connection: the client's and, once there is one, that inside.
type stream struct {
	client   half
	answered chan struct{} // closed when nothing comes from inside any more

	mu     sync.Mutex
	inside *net.TCPConn
	closed bool
}

// close ends both. What was sent to the client is still delivered.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.client.Close()
	if s.inside != nil {
		s.inside.Close()
	}
}

func (f *Forwarder) accept(l net.Listener, to target) {
	for pause := time.Duration(0); ; {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if !f.pause(&pause) {
				return
			}
			continue
		}
		pause = 0
		// Not the slot first: each port that nobody asks for would hold one.
		select {
		case f.slots <- struct{}{}:
		case <-f.ctx.Done():
			c.Close()
			return
		}
		s := &stream{client: c.(half), answered: make(chan struct{})}
		if !f.start(s, to) {
			c.Close()
			return
		}
	}
}

func (f *Forwarder) serve(s *stream, to target) {
	defer func() {
		s.close()
		f.mu.Lock()
		delete(f.streams, s)
		f.mu.Unlock()
		<-f.slots
	}()
	inside, at, err := f.dial(to)
	f.decided(to, at, err)
	s.mu.Lock()
	s.inside = inside
	closed := s.closed
	s.mu.Unlock()
	if err != nil || closed {
		close(s.answered)
		reset(s.client)
		return
	}
	var failed atomic.Bool
	var in sync.WaitGroup
	inBytes, outBytes := &f.inBytes, &f.outBytes
	if to.onHost {
		inBytes, outBytes = outBytes, inBytes
	}
	in.Go(func() { inBytes.Add(direct(inside, s.client, &failed)) })
	outBytes.Add(direct(s.client, inside, &failed))
	close(s.answered)
	in.Wait()
	if failed.Load() {
		reset(s.client)
		reset(inside)
	}
}

// direct moves bytes one way until the source ends, and says so to the destination.
func direct(dst, src half, failed *atomic.Bool) int64 {
	n, err := io.Copy(dst, src)
	if err == nil {
		_ = dst.CloseWrite() // where the destination is gone, the other way finds out
		return n
	}
	// One of the two is broken, both ways. The other way first gets what the
	// destination has sent before; then it ends, instead of waiting for more.
	failed.Store(true)
	_ = dst.CloseRead()
	return n
}

// reset closes c so that its peer knows that it was no ordinary end, unless
// bytes are on their way: a reset would overtake them.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		if raw, err := t.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				if n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil && n == 0 {
					_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
				}
			})
		}
	}
	c.Close()
}

// loopbacks are where a server inside may listen, in the order of trying.
var loopbacks = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// dial connects to a server inside. Where nothing listens, the error is of the
// first address.
func (f *Forwarder) dial(to target) (c *net.TCPConn, at netip.Addr, err error) {
	if to.onHost {
		return f.dialHost(to.port)
	}
	port := to.port
	for _, ip := range loopbacks {
		c, e := f.connect(netip.AddrPortFrom(ip, uint16(port)))
		if e == nil {
			return c, ip, nil
		}
		if err == nil {
			at, err = ip, e
		}
		if !errors.Is(e, unix.ECONNREFUSED) {
			break // something is there
		}
	}
	return nil, at, err
}

func (f *Forwarder) connect(to netip.AddrPort) (_ *net.TCPConn, err error) {
	sock, err := f.socket(unix.SOCK_STREAM, to)
	if err != nil {
		return nil, err
	}
	c := sock.(*net.TCPConn)
	defer func() {
		if err != nil {
			c.Close()
			err = fmt.Errorf("connect to %s in the namespace: %w", to, err)
		}
	}()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := c.SetWriteDeadline(time.Now().Add(connectTimeout)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(f.ctx, func() { _ = c.SetWriteDeadline(time.Now()) })
	var status int
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		// Ask first: the poller tells of a change, which may have been before.
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(p, 0); n == 0 || err != nil {
			return false
		}
		status, serr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		return true
	})
	if !stop() && err == nil {
		err = net.ErrClosed
	}
	switch {
	case err != nil:
		return nil, err
	case serr != nil:
		return nil, serr
	case status != 0:
		return nil, unix.Errno(status)
	}
	return c, c.SetWriteDeadline(time.Time{})
}

// socket makes a socket inside and begins to connect it.
func (f *Forwarder) socket(kind int, to netip.AddrPort) (net.Conn, error) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
	if to.Addr().Is4() {
		sa.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	} else {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	fd := -1
	err := f.in.Do(func() (err error) {
		fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make socket in the namespace: %w", err)
	}
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close() // FileConn has its own
	if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return nil, fmt.Errorf("connect to %s in the namespace: %w", to, err)
	}
	c, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("make socket in the namespace: %w", err)
	}
	return c, nil
}

func addrOf(c net.Conn) netip.Addr {
	a, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	return a.Addr()
}
