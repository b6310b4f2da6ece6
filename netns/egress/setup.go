package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockets are those inside.
type sockets struct {
	tcp []*net.TCPListener
	udp []*net.UDPConn
	v6  bool
}

func (s *sockets) close() error {
	var errs []error
	for _, l := range s.tcp {
		errs = append(errs, l.Close())
	}
	for _, c := range s.udp {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// setUp makes every address one of the namespace's own (AnyIP), opens the
// sockets and diverts to them what goes elsewhere. It must run on a thread inside.
func setUp() (*sockets, error) {
	s := &sockets{}
	var err error
	if s.v6, err = addAddresses(); err == nil {
		err = s.listen(own4)
	}
	if err == nil && s.v6 {
		err = s.listen(own6)
	}
	if err == nil {
		err = divert(s.v6)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *sockets) listen(ip netip.Addr) error {
	lc := net.ListenConfig{KeepAlive: -1} // who is inside cannot vanish
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(ip, tcpPort).String())
	if err != nil {
		return err
	}
	s.tcp = append(s.tcp, l.(*net.TCPListener))
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, udpPort)))
	if err != nil {
		return err
	}
	s.udp = append(s.udp, c)
	return nil
}

// lo has this number in every namespace.
const lo = 1

// addAddresses gives lo our own addresses, which also has programs believe that
// they are on a network (AI_ADDRCONFIG), and routes every other one to it too,
// in one datagram. v6 is false where the host has IPv6 off.
func addAddresses() (v6 bool, err error) {
	s, err := openNetlink(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer s.close()
	var b []byte
	for _, ip := range []netip.Addr{own4, own6} {
		family := byte(unix.AF_INET)
		if ip.Is6() {
			family = unix.AF_INET6
		}
		a := message(unix.RTM_NEWADDR)
		// ifaddrmsg: family, prefix length, flags, scope, interface
		a = append(a, family, byte(ip.BitLen()), unix.IFA_F_NODAD, unix.RT_SCOPE_UNIVERSE)
		a = binary.NativeEndian.AppendUint32(a, lo)
		a = attribute(a, unix.IFA_LOCAL, ip.AsSlice())
		a = attribute(a, unix.IFA_ADDRESS, ip.AsSlice())
		b = append(b, finish(a)...)

		r := message(unix.RTM_NEWROUTE)
		// rtmsg: family, two prefix lengths, tos, table, protocol, scope, type, flags
		r = append(r, family, 0, 0, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_STATIC, unix.RT_SCOPE_HOST, unix.RTN_LOCAL, 0, 0, 0, 0)
		r = attribute(r, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, lo))
		r = attribute(r, unix.RTA_PREFSRC, ip.AsSlice())
		b = append(b, finish(r)...)
	}
	err = s.send(b)
	var errnos []unix.Errno
	if err == nil {
		errnos, err = s.acks(4)
	}
	if err != nil {
		return false, fmt.Errorf("set addresses and routes on lo: %w", err)
	}
	for i, what := range []string{"add address to lo", "add local route", "add IPv6 address to lo", "add local IPv6 route"} {
		errno := errnos[i]
		off := i == 2 && (errno == unix.EACCES || errno == unix.EOPNOTSUPP || errno == unix.EAFNOSUPPORT)
		if off {
			return false, nil
		}
		if errno != 0 {
			return false, fmt.Errorf("%s: %w", what, errno)
		}
	}
	return true, nil
}

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST.
const soOriginalDst = 80

// originalTarget is where the inside wanted to connect to, before the redirection.
func originalTarget(c *net.TCPConn) (to netip.AddrPort, err error) {
	local, ok := c.LocalAddr().(*net.TCPAddr)
	raw, rawErr := c.SyscallConn()
	if !ok || rawErr != nil {
		return to, errors.Join(errors.New("read original target"), rawErr)
	}
	cerr := raw.Control(func(fd uintptr) {
		// Any option of the right size will do to get the bytes out.
		if local.IP.To4() != nil {
			var m *unix.IPv6Mreq
			if m, err = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, soOriginalDst); err == nil {
				a := (*unix.RawSockaddrInet4)(unsafe.Pointer(m))
				to = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), swap(a.Port))
			}
			return
		}
		var m *unix.IPv6MTUInfo
		if m, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, soOriginalDst); err == nil {
			to = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr).Unmap(), swap(m.Addr.Port))
		}
	})
	if err = errors.Join(err, cerr); err != nil {
		return to, fmt.Errorf("read original target: %w", err)
	}
	return to, nil
}

// swap reads a port that the kernel wrote in network order.
func swap(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}
