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
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("open rtnetlink: %w", err)
	}
	defer unix.Close(s)
	var b []byte
	for i, ip := range []netip.Addr{own4, own6} {
		family := byte(unix.AF_INET)
		if ip.Is6() {
			family = unix.AF_INET6
		}
		a := message(unix.RTM_NEWADDR, uint32(2*i))
		// ifaddrmsg: family, prefix length, flags, scope, interface
		a = append(a, family, byte(ip.BitLen()), unix.IFA_F_NODAD, unix.RT_SCOPE_UNIVERSE)
		a = binary.NativeEndian.AppendUint32(a, lo)
		a = attribute(a, unix.IFA_LOCAL, ip.AsSlice())
		a = attribute(a, unix.IFA_ADDRESS, ip.AsSlice())
		b = append(b, finish(a)...)

		r := message(unix.RTM_NEWROUTE, uint32(2*i+1))
		// rtmsg: family, two prefix lengths, tos, table, protocol, scope, type, flags
		r = append(r, family, 0, 0, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_STATIC, unix.RT_SCOPE_HOST, unix.RTN_LOCAL, 0, 0, 0, 0)
		r = attribute(r, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, lo))
		r = attribute(r, unix.RTA_PREFSRC, ip.AsSlice())
		b = append(b, finish(r)...)
	}
	if err := unix.Sendto(s, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, fmt.Errorf("set addresses and routes on lo: %w", err)
	}
	errnos, err := acks(s, 4)
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

func message(kind uint16, seq uint32) []byte {
	b := binary.NativeEndian.AppendUint32(nil, 0)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	b = binary.NativeEndian.AppendUint32(b, seq)
	return binary.NativeEndian.AppendUint32(b, 0)
}

// attribute appends one; all of ours are multiples of four bytes.
func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(b, value...)
}

func finish(b []byte) []byte {
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// acks reads n acknowledgements, which the kernel queued before the request returned.
func acks(s, n int) ([]unix.Errno, error) {
	out := make([]unix.Errno, n)
	buf := make([]byte, 8<<10)
	for got := 0; got < n; {
		k, _, err := unix.Recvfrom(s, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return nil, err
		}
		for b := buf[:k]; len(b) >= 20; got++ {
			size := int(binary.NativeEndian.Uint32(b))
			seq := binary.NativeEndian.Uint32(b[8:])
			if size < 20 || size > len(b) || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR || int(seq) >= n {
				return nil, errors.New("the answer is not an acknowledgement")
			}
			out[seq] = unix.Errno(-int32(binary.NativeEndian.Uint32(b[16:])))
			b = b[min(len(b), (size+3)&^3):]
		}
	}
	return out, nil
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
