package publish

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

// listen makes the host's socket of a port, and sets its number. One of the two
// is nil.
func listen(p *netns.Port) (net.Listener, *net.UDPConn, error) {
	if err := check(*p); err != nil {
		return nil, nil, fmt.Errorf("publish %q: %w", rule(*p), err)
	}
	addr := net.JoinHostPort(p.HostIP, strconv.Itoa(p.HostPort))
	if p.Proto == "udp" {
		lc := net.ListenConfig{Control: tellDestination}
		c, err := lc.ListenPacket(context.Background(), "udp", addr)
		if err != nil {
			return nil, nil, explain(*p, err)
		}
		u := c.(*net.UDPConn)
		p.HostPort = u.LocalAddr().(*net.UDPAddr).Port
		return nil, u, nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, nil, explain(*p, err)
	}
	p.HostPort = l.Addr().(*net.TCPAddr).Port
	return l, nil, nil
}

func check(p netns.Port) error {
	if p.Proto != "tcp" && p.Proto != "udp" {
		return fmt.Errorf("protocol %q is neither tcp nor udp", p.Proto)
	}
	if p.HostPort < 0 || p.HostPort > 65535 {
		return fmt.Errorf("host port %d is not from 0 to 65535", p.HostPort)
	}
	if p.HostIP != "" {
		if _, err := netip.ParseAddr(p.HostIP); err != nil {
			return fmt.Errorf("host address %q is not an IP address", p.HostIP)
		}
	}
	return checkInside(p.ContainerPort)
}

func checkInside(port int) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("port %d in the namespace is not from 1 to 65535", port)
	}
	return nil
}

func explain(p netns.Port, err error) error {
	var op *net.OpError
	if errors.As(err, &op) { // it names the address once more
		err = op.Err
	}
	err = fmt.Errorf("publish %q: %w", rule(p), err)
	hint := ""
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		hint = fmt.Sprintf("something on this host has port %d already (ss -lnp); choose another, or any free one: -p 0:%d", p.HostPort, p.ContainerPort)
	case errors.Is(err, unix.EACCES) && p.HostPort < 1024:
		hint = fmt.Sprintf("ports below 1024 need CAP_NET_BIND_SERVICE (or the sysctl net.ipv4.ip_unprivileged_port_start); choose a higher one: -p %d:%d", 8000+p.HostPort, p.ContainerPort)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		hint = fmt.Sprintf("this host has no address %s (ip address); without one, -p %d:%d, all are served", p.HostIP, p.HostPort, p.ContainerPort)
	}
	return hinted.New(err, hint)
}

// tellDestination has the kernel say which address of the host's a datagram was
// sent to: the answer must come from there, not from what the route would choose.
func tellDestination(_, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if family, e := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); e == nil && family == unix.AF_INET6 {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}
	})
	return errors.Join(cerr, err)
}

// answerFrom turns what the kernel said with a datagram into what sends its
// answer from the address that it was sent to.
func answerFrom(oob []byte) []byte {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			// Not the interface: the route back may be another.
			return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[4:8])})
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			info := unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])}
			if netip.AddrFrom16(info.Addr).IsMulticast() {
				return nil // nothing can be sent from there
			}
			return unix.PktInfo6(&info)
		}
	}
	return nil
}
