package publish

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

// The other direction: a listener inside, and a connection of the host's to its
// own loopback for each of its clients. In the words of [stream], the client is
// inside then.

func hostRule(p netns.HostPort) string {
	return fmt.Sprintf("--host-port %d:%d", p.ContainerPort, p.HostPort)
}

func (t target) via() string {
	if t.onHost {
		return "host-port"
	}
	return "publish"
}

// listenInside makes the socket in the namespace, on 127.0.0.1.
func (f *Forwarder) listenInside(p netns.HostPort) (l net.Listener, err error) {
	if err = errors.Join(checkInside(p.ContainerPort), checkInside(p.HostPort)); err == nil {
		err = f.in.Do(func() (err error) {
			l, err = net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.ContainerPort)))
			return err
		})
	}
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		hint := ""
		if errors.Is(err, unix.EADDRINUSE) {
			hint = "each port inside leads to one place: give another one, --host-port INSIDE:HOST"
		}
		return nil, hinted.New(fmt.Errorf("give %q: %w", hostRule(p), err), hint)
	}
	return l, nil
}

// dialHost connects to a server on the host's loopback.
func (f *Forwarder) dialHost(port int) (c *net.TCPConn, at netip.Addr, err error) {
	d := net.Dialer{Timeout: connectTimeout}
	for _, ip := range loopbacks {
		n, e := d.DialContext(f.ctx, "tcp", netip.AddrPortFrom(ip, uint16(port)).String())
		if e == nil {
			return n.(*net.TCPConn), ip, nil
		}
		if err == nil {
			at, err = ip, e
		}
	}
	return nil, at, err
}
