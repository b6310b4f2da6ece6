package routed

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
)

// captured says whether a frame that is wanted crosses a link while f runs.
func captured(t *testing.T, n *netns.NS, link string, want func(frame []byte) bool, f func()) bool {
	t.Helper()
	var s int
	require.NoError(t, n.Do(func() (err error) {
		s, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		return unix.Bind(s, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Attrs().Index})
	}))
	defer unix.Close(s)
	f()
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	require.NoError(t, unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	b := make([]byte, 2000)
	for {
		k, _, err := unix.Recvfrom(s, b, 0)
		if err != nil {
			return false
		}
		if want(b[:k]) {
			return true
		}
	}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// spoofed sends UDP with a source that is not the sandbox's, as root inside could
// when it has all capabilities there.
func spoofed(t *testing.T, n *netns.NS, from, to string) {
	t.Helper()
	require.NoError(t, n.Do(func() error {
		l, err := netlink.LinkByName(inner)
		require.NoError(t, err)
		a := netip.MustParseAddr(from)
		require.NoError(t, netlink.AddrAdd(l, &netlink.Addr{
			IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Flags: unix.IFA_F_NODAD,
		}))
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: a.AsSlice(), Zone: zone(a)}, &net.UDPAddr{IP: net.ParseIP(to), Port: 7777})
		require.NoError(t, err)
		defer c.Close()
		_, err = c.Write([]byte("spoofed"))
		require.NoError(t, err)
		return nil
	}))
}

func zone(a netip.Addr) string {
	if a.IsLinkLocalUnicast() && a.Is6() {
		return inner
	}
	return ""
}

func toPort7777(b []byte) bool {
	for i := 14; i+4 < len(b) && i < 90; i++ {
		if b[i] == 0x1e && b[i+1] == 0x61 { // 7777
			return true
		}
	}
	return false
}

func TestSpoofedSourcesDoNotLeave(t *testing.T) {
	w := newWorld(t)
	box, r := w.open(Config{Slot: 5})
	w.open(Config{Slot: 6})
	for _, own := range r.Addresses { // the probe works
		from := netip.MustParsePrefix(own).Addr()
		to := inetV4
		if from.Is6() {
			to = inetV6
		}
		require.True(t, captured(t, w.inet, "in0", toPort7777, func() {
			require.NoError(t, box.Do(func() error {
				c, err := net.Dial("udp", net.JoinHostPort(to, "7777"))
				require.NoError(t, err)
				defer c.Close()
				_, err = c.Write([]byte("own"))
				return err
			}))
		}))
	}
	for _, c := range []struct{ from, to string }{
		{"198.19.80.8", inetV4}, // a neighbour slot's
		{"8.8.8.8", inetV4},     // anybody's
		{hostV4, inetV4},
		{"fd73:6278:7275:6e00::8", inetV6},
		{"2001:db8:9::9", inetV6},
		{"fe80::1234", inetV6},
	} {
		require.False(t, captured(t, w.inet, "in0", toPort7777, func() { spoofed(t, box, c.from, c.to) }), "%+v", c)
	}
}

// raw sends a frame as it is from the sandbox's interface.
func raw(t *testing.T, n *netns.NS, frame []byte) {
	t.Helper()
	require.NoError(t, n.Do(func() error {
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(s)
		l, err := netlink.LinkByName(inner)
		require.NoError(t, err)
		return unix.Sendto(s, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Protocol: htons(unix.ETH_P_ALL)})
	}))
}

func frame(a addresses, proto uint16, payload []byte) []byte {
	f := append(append([]byte{}, a.macUp[:]...), a.macIn[:]...)
	return append(append(f, byte(proto>>8), byte(proto)), payload...)
}

// icmp6 is a packet from a link-local address with hop limit 255, as neighbour
// discovery demands.
func icmp6(to string, body []byte) []byte {
	src, dst := netip.MustParseAddr("fe80::bad").As16(), netip.MustParseAddr(to).As16()
	pseudo := append(append(append([]byte{}, src[:]...), dst[:]...), 0, 0, 0, byte(len(body)), 0, 0, 0, unix.IPPROTO_ICMPV6)
	sum := checksum(append(pseudo, body...))
	body[2], body[3] = byte(sum>>8), byte(sum)
	p := []byte{0x60, 0, 0, 0, 0, byte(len(body)), unix.IPPROTO_ICMPV6, 255}
	return append(append(append(p, src[:]...), dst[:]...), body...)
}

func TestTheHostIsDeafToNeighbourMessages(t *testing.T) {
	w := newWorld(t)
	box, _ := w.open(Config{Slot: 7})
	a, err := addressesOf(7)
	require.NoError(t, err)
	state := func() (out []string) {
		require.NoError(t, w.host.Do(func() error {
			for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				ns, err := netlink.NeighList(0, fam)
				require.NoError(t, err)
				l, err := netlink.LinkByName(a.link)
				require.NoError(t, err)
				for _, n := range ns {
					if n.LinkIndex == l.Attrs().Index {
						out = append(out, n.String())
					}
				}
				rs, err := netlink.RouteList(nil, fam)
				require.NoError(t, err)
				for _, r := range rs {
					out = append(out, r.String())
				}
				as, err := netlink.AddrList(l, fam)
				require.NoError(t, err)
				for _, a := range as {
					out = append(out, a.String())
				}
			}
			return nil
		}))
		return out
	}
	before := state()

	arp := func(op byte, sender, target string) []byte {
		s, d := netip.MustParseAddr(sender).As4(), netip.MustParseAddr(target).As4()
		p := []byte{0, 1, 8, 0, 6, 4, 0, op}
		p = append(append(append(p, 2, 0, 0, 0, 0, 0xbad&0xff), s[:]...), 0, 0, 0, 0, 0, 0)
		return frame(a, unix.ETH_P_ARP, append(p, d[:]...))
	}
	isReply := func(b []byte) bool {
		return len(b) > 21 && b[12] == 8 && b[13] == 6 && b[21] == 2 && b[6] == a.macUp[0]
	}
	for _, sender := range []string{"198.19.80.9", gwV4, "198.19.80.10"} {
		for _, op := range []byte{1, 2} {
			require.False(t, captured(t, box, inner, isReply, func() { raw(t, box, arp(op, sender, hostV4)) }), "answered for %s", sender)
		}
	}
	host16 := netip.MustParseAddr(hostV6).As16()
	mac := []byte{1, 1, 2, 0, 0, 0, 0, 9}
	for name, body := range map[string][]byte{
		"router advertisement": append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, mac...),
		"neighbour solicit":    append(append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, host16[:]...), mac...),
		"neighbour advert":     append(append([]byte{136, 0, 0, 0, 0x60, 0, 0, 0}, host16[:]...), 2, 1, 2, 0, 0, 0, 0, 9),
		"router solicit":       append([]byte{133, 0, 0, 0, 0, 0, 0, 0}, mac...),
	} {
		answer := func(b []byte) bool {
			return len(b) > 54 && b[20] == unix.IPPROTO_ICMPV6 && b[54] >= 134 && b[6] == a.macUp[0]
		}
		for _, to := range []string{"ff02::1", hostV6} {
			require.False(t, captured(t, box, inner, answer, func() { raw(t, box, frame(a, unix.ETH_P_IPV6, icmp6(to, body))) }), name)
		}
	}
	require.Equal(t, before, state(), "the host learned something")
	for path, want := range map[string]string{
		"ipv4/conf/sbx7/rp_filter": "1", "ipv4/conf/sbx7/accept_redirects": "0", "ipv4/conf/sbx7/send_redirects": "0", "ipv4/conf/sbx7/forwarding": "1",
		"ipv6/conf/sbx7/accept_ra": "0", "ipv6/conf/sbx7/accept_redirects": "0", "ipv6/conf/sbx7/addr_gen_mode": "1",
	} {
		require.Equal(t, want, sysctl(t, w.host, path), path)
	}
	require.Equal(t, "0", sysctl(t, box, "ipv6/conf/eth0/accept_ra"))
}

// A service that listens on all of the host's IPv6 addresses is reachable by no
// link-local one: the link has none, and the sandbox's own is no source.
func TestHostByLinkLocal(t *testing.T) {
	w := newWorld(t)
	serve(t, w.host, "::", "80")
	box, _ := w.open(Config{Slot: 8, Allow: []string{"fe80::/10", "ff02::1"}})
	require.NoError(t, w.host.Do(func() error { addrs(t, "sbx8", "fe80::1/64"); return nil })) // some daemon adds one
	require.NoError(t, box.Do(func() error {
		addrs(t, inner, "fe80::2/64")
		require.Equal(t, dropped, askHere(t, "tcp", "fe80::1%eth0", "80"))
		require.Equal(t, dropped, askHere(t, "udp", "fe80::1%eth0", "80"))
		return nil
	}))
}

// What was tracked for the last sandbox of a slot is no pass for the next.
func TestConnectionsOfTheSlotsLastSandboxAreNoPass(t *testing.T) {
	w := newWorld(t)
	serve(t, w.host, hostV4, "80")
	send := func(n *netns.NS) string {
		var v string
		require.NoError(t, n.Do(func() error {
			c, err := net.DialUDP("udp", &net.UDPAddr{Port: 4444}, &net.UDPAddr{IP: net.ParseIP(hostV4), Port: 80})
			require.NoError(t, err)
			defer c.Close()
			_, err = c.Write([]byte("x"))
			require.NoError(t, err)
			require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
			_, err = c.Read(make([]byte, 9))
			v = judge(t, err)
			return nil
		}))
		return v
	}
	first, _ := w.open(Config{Slot: 9, Allow: []string{hostV4 + ":80"}})
	require.Equal(t, ok, send(first))
	require.NoError(t, first.Close())
	second, _ := w.open(Config{Slot: 9})
	require.Equal(t, refused, send(second))
}

// A flood of beginnings fills the sandbox's share of connection tracking and
// nobody else's.
func TestConnectionTrackingIsShared(t *testing.T) {
	w := newWorld(t)
	serve(t, w.inet, otherV4, "80")
	box, _ := w.open(Config{Slot: 0})
	peer, _ := w.open(Config{Slot: 1})
	require.Equal(t, ok, askFor(t, ok, box, "tcp", otherV4, "80"))
	require.NoError(t, box.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(s)
		for i := range maxTracked + 100 {
			// Errors of earlier packets are reported here.
			_ = unix.Sendto(s, []byte("x"), 0, &unix.SockaddrInet4{Addr: netip.MustParseAddr(inetV4).As4(), Port: 1000 + i})
		}
		return nil
	}))
	require.Equal(t, refused, askFor(t, refused, box, "tcp", otherV4, "80"))
	require.Equal(t, ok, askFor(t, ok, peer, "tcp", otherV4, "80"))
	require.NoError(t, w.host.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		require.NoError(t, err)
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		require.NoError(t, err)
		require.Less(t, n, maxTracked+50)
		return nil
	}))
}
