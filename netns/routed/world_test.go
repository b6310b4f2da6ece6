package routed

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/need"
)

// world is a host and what it is connected to, each a namespace.
type world struct {
	t     testing.TB
	host  *netns.NS
	inet  *netns.NS // the internet, the LAN and the metadata service
	state string
	hold  *netns.Forwarding
}

const (
	hostV4, hostV6 = "192.0.2.2", "2001:db8:1::2"
	lanV4          = "192.168.77.5"
	inetV4, inetV6 = "203.0.113.1", "2001:db8:2::1"
	otherV4        = "203.0.113.9"
	metaV4, metaV6 = "169.254.169.254", "fd00:ec2::254"
	gwV4, gwV6     = "192.0.2.1", "2001:db8:1::1"
)

func newNS(t testing.TB) *netns.NS {
	t.Helper()
	need.Root(t)
	n, err := netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { n.Close() })
	return n
}

func addrs(t testing.TB, link string, list ...string) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetUp(l))
	for _, s := range list {
		a, err := netlink.ParseAddr(s)
		require.NoError(t, err)
		a.Flags = unix.IFA_F_NODAD
		require.NoError(t, netlink.AddrAdd(l, a))
	}
}

func route(t testing.TB, link, to, via string) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	require.NoError(t, err)
	_, dst, err := net.ParseCIDR(to)
	require.NoError(t, err)
	require.NoError(t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: net.ParseIP(via)}))
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, host: newNS(t), inet: newNS(t), state: t.TempDir()}
	require.NoError(t, w.host.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "up0", MTU: 1400}, PeerName: "in0", PeerNamespace: netlink.NsFd(int(w.inet.File().Fd())),
		})
	}))
	require.NoError(t, w.inet.Do(func() error {
		addrs(t, "in0", gwV4+"/24", inetV4+"/32", otherV4+"/32", lanV4+"/32", metaV4+"/32", gwV6+"/64", inetV6+"/128", metaV6+"/128")
		return nil
	}))
	require.NoError(t, w.host.Do(func() error {
		addrs(t, "up0", hostV4+"/24", hostV6+"/64")
		route(t, "up0", "0.0.0.0/0", gwV4)
		route(t, "up0", "::/0", gwV6)
		return nil
	}))
	// The kernel answers a peer with six ICMP errors, then one a second.
	setSysctl(t, w.host, "ipv4/icmp_ratelimit", "0")
	setSysctl(t, w.host, "ipv6/icmp/ratelimit", "0")
	w.hold = w.held()
	return w
}

func (w *world) held() *netns.Forwarding {
	w.t.Helper()
	f, err := netns.HoldForwarding(w.state)
	require.NoError(w.t, err)
	return f
}

// open makes a sandbox's namespace and connects it.
func (w *world) open(c Config) (*netns.NS, *netns.Ready) {
	w.t.Helper()
	n := newNS(w.t)
	r, err := w.tryOpen(n, c)
	require.NoError(w.t, err)
	return n, r
}

func (w *world) tryOpen(n *netns.NS, c Config) (r *netns.Ready, err error) {
	c.State = w.state
	if c.ID == "" {
		c.ID = "box"
	}
	if c.DNS == nil {
		c.DNS = []string{inetV4}
	}
	err = w.host.Do(func() (err error) {
		r, err = Open(n, c)
		return err
	})
	return r, err
}

// serve answers TCP and UDP on a port of an address with the name.
func serve(t testing.TB, n *netns.NS, address string, port string) {
	t.Helper()
	at := net.JoinHostPort(address, port)
	require.NoError(t, n.Do(func() error {
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		u, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		t.Cleanup(func() { u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte("tcp"))
				c.Close()
			}
		}()
		go func() {
			b := make([]byte, 100)
			for {
				n, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo(b[:n], from)
			}
		}()
		return nil
	}))
}

// Verdicts as a client sees them.
const (
	ok      = "ok"
	refused = "refused" // told at once
	dropped = "dropped" // no answer
)

const patience = 400 * time.Millisecond

// ask tries proto (tcp, udp, icmp) to an address from a namespace.
func ask(t testing.TB, from *netns.NS, proto, address, port string) (verdict string) {
	t.Helper()
	require.NoError(t, from.Do(func() error {
		verdict = askHere(t, proto, address, port)
		return nil
	}))
	return verdict
}

// askFor is ask where an answer is expected: a machine that has other work may
// take its time.
func askFor(t testing.TB, want string, from *netns.NS, proto, address, port string) (verdict string) {
	t.Helper()
	for range 10 {
		if verdict = ask(t, from, proto, address, port); verdict != dropped || want == dropped {
			break
		}
	}
	return verdict
}

func askHere(t testing.TB, proto, address, port string) string {
	t.Helper()
	if proto == "icmp" {
		return ping(t, netip.MustParseAddr(address))
	}
	c, err := net.DialTimeout(proto, net.JoinHostPort(address, port), patience)
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = c.Write([]byte("hello"))
		_, err = c.Read(make([]byte, 10))
	}
	return judge(t, err)
}

func judge(t testing.TB, err error) string {
	t.Helper()
	switch {
	case err == nil:
		return ok
	case errors.Is(err, os.ErrDeadlineExceeded), os.IsTimeout(err), errors.Is(err, unix.EAGAIN):
		return dropped
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES):
		return refused
	}
	return err.Error()
}

func ping(t testing.TB, to netip.Addr) string {
	t.Helper()
	fam, proto, typ, reply := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0)
	var sa unix.Sockaddr
	if to.Is6() {
		fam, proto, typ, reply = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129
		sa = &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		sa = &unix.SockaddrInet4{Addr: to.As4()}
	}
	s, err := unix.Socket(fam, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	require.NoError(t, err)
	defer unix.Close(s)
	msg := []byte{typ, 0, 0, 0, 0x12, 0x34, 0, 1}
	if to.Is4() {
		binary.BigEndian.PutUint16(msg[2:], checksum(msg))
	}
	if err := unix.Sendto(s, msg, 0, sa); err != nil {
		return judge(t, err)
	}
	tv := unix.NsecToTimeval(int64(patience))
	require.NoError(t, unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	b := make([]byte, 1500)
	for {
		n, _, err := unix.Recvfrom(s, b, 0)
		if err != nil {
			return judge(t, err)
		}
		p := b[:n]
		if to.Is4() {
			p = p[20:]
		}
		switch {
		case p[0] == reply && p[4] == 0x12:
			return ok
		case to.Is4() && p[0] == 3, to.Is6() && p[0] == 1:
			return refused
		}
	}
}

func checksum(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

func sysctl(t testing.TB, n *netns.NS, path string) (v string) {
	t.Helper()
	require.NoError(t, n.Do(func() error {
		b, err := os.ReadFile(filepath.Join("/proc/sys/net", path))
		v = strings.TrimSpace(string(b))
		return err
	}))
	return v
}

func setSysctl(t testing.TB, n *netns.NS, path, v string) {
	t.Helper()
	require.NoError(t, n.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys/net", path), []byte(v), 0) }))
}
