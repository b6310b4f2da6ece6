package routed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
)

const (
	// group is the link group of every sandbox's host end ("sbxr"). The ruleset
	// goes by it, so it needs no change when a sandbox comes or goes.
	group = 0x73627872
	// inner is the interface's name in the sandbox.
	inner = "eth0"
)

// The kernel's names, which x/sys lacks.
const (
	vethInfoPeer      = 1
	inetConf          = 1 // IFLA_INET_CONF
	inet6AddrGenMode  = 8
	addrGenModeNone   = 1
	confForwarding    = 1 // IPV4_DEVCONF_…
	confAcceptRedir   = 4
	confSecureRedir   = 5
	confSendRedirects = 6
	confRPFilter      = 8
	confAcceptSource  = 9
)

// createLink makes both ends at once, the sandbox's in its namespace: moving it
// there later takes 25 ms. The host's end answers no ARP: everything about a
// neighbour is told, nothing asked. It returns the host end's index.
func createLink(a addresses, nsFD, mtu int) (index uint32, err error) {
	var b batch
	b.begin(fmt.Sprintf("create link %q", a.link), unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		ifinfo(0, unix.IFF_NOARP, unix.IFF_NOARP))
	end := func(name string, mac [6]byte) {
		b.str(unix.IFLA_IFNAME, name)
		b.bytes(unix.IFLA_ADDRESS, mac[:])
		b.u32(unix.IFLA_MTU, uint32(mtu))
		b.u32(unix.IFLA_NUM_TX_QUEUES, 1)
		b.u32(unix.IFLA_NUM_RX_QUEUES, 1)
	}
	end(a.link, a.macUp)
	b.u32(unix.IFLA_GROUP, group)
	info := b.nest(unix.IFLA_LINKINFO)
	b.str(unix.IFLA_INFO_KIND, "veth")
	data := b.nest(unix.IFLA_INFO_DATA)
	peer := b.nest(vethInfoPeer)
	b.buf = append(b.buf, ifinfo(0, unix.IFF_NOARP, unix.IFF_NOARP)...)
	end(inner, a.macIn)
	b.u32(unix.IFLA_NET_NS_FD, uint32(nsFD))
	peer()
	data()
	info()
	for begun, deleted := time.Now(), false; ; time.Sleep(2 * time.Millisecond) {
		if err = b.send(); !errors.Is(err, unix.EEXIST) || deleted {
			break
		}
		// That of a sandbox that was killed a moment ago: the kernel is about to
		// remove it. Where it does not, a stray process holds its namespace.
		if time.Since(begun) > 100*time.Millisecond {
			if err := deleteLeftover(a.link); err != nil {
				return 0, err
			}
			deleted = true
		}
	}
	if err != nil {
		return 0, err
	}
	return linkIndex(a.link)
}

// activate makes the host's end send from now on. It was up before it had a
// carrier, and the kernel lets it send only when a worker comes to it, which
// drops the first answers: a name lookup, or a SYN-ACK for a second. Who asks by
// ethtool for the link's state makes the kernel catch up (linkwatch_sync_dev).
func activate(link string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(s)
	value := struct{ cmd, data uint32 }{cmd: unix.ETHTOOL_GLINK}
	req := struct {
		name  [unix.IFNAMSIZ]byte
		value unsafe.Pointer
		_     [16]byte // a struct ifreq is longer than what is used of it
	}{value: unsafe.Pointer(&value)}
	copy(req.name[:], link)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("ask for the state of link %q: %w", link, errno)
	}
	return nil
}

// deleteLeftover removes a link of this name if it is one of ours.
func deleteLeftover(name string) error {
	dump, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	msgs, err := syscall.ParseNetlinkMessage(dump)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for i := range msgs {
		if msgs[i].Header.Type != unix.RTM_NEWLINK || len(msgs[i].Data) < unix.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&msgs[i])
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		named, grouped := false, false
		for _, at := range attrs {
			named = named || at.Attr.Type == unix.IFLA_IFNAME && strings.TrimRight(string(at.Value), "\x00") == name
			grouped = grouped || at.Attr.Type == unix.IFLA_GROUP && len(at.Value) == 4 && binary.NativeEndian.Uint32(at.Value) == group
		}
		if !named {
			continue
		}
		if !grouped {
			return fmt.Errorf("create link %q: another link has this name", name)
		}
		var b batch
		b.begin(fmt.Sprintf("delete leftover link %q", name), unix.RTM_DELLINK, 0, ifinfo(binary.NativeEndian.Uint32(msgs[i].Data[4:]), 0, 0))
		if err := b.send(); err != nil && !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	return nil
}

// ifreq asks the calling thread's namespace about an interface by name.
func ifreq(name string, request uint) (*unix.Ifreq, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(s, request, req)
	}
	if err != nil {
		return nil, fmt.Errorf("look up link %q: %w", name, err)
	}
	return req, nil
}

func linkIndex(name string) (uint32, error) {
	req, err := ifreq(name, unix.SIOCGIFINDEX)
	if err != nil {
		return 0, err
	}
	return req.Uint32(), nil
}

func linkMTU(name string) (int, error) {
	req, err := ifreq(name, unix.SIOCGIFMTU)
	if err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

// quiet sets what makes an interface deaf to routers and neighbours, on either
// end. IPv6 makes up no address for the link, so it has nothing to announce or to
// check for duplicates.
func (b *batch) quiet(index uint32, v6 bool, alias string, conf map[uint16]uint32) {
	b.begin("configure link", unix.RTM_SETLINK, 0, ifinfo(index, 0, 0))
	if alias != "" {
		b.bytes(unix.IFLA_IFALIAS, []byte(alias))
	}
	spec := b.nest(unix.IFLA_AF_SPEC)
	inet := b.nest(unix.AF_INET)
	values := b.nest(inetConf)
	for k, v := range conf {
		b.u32(k, v)
	}
	values()
	inet()
	if v6 {
		inet6 := b.nest(unix.AF_INET6)
		b.u8(inet6AddrGenMode, addrGenModeNone)
		inet6()
	}
	spec()
	b.begin("set link up", unix.RTM_NEWLINK, 0, ifinfo(index, unix.IFF_UP, unix.IFF_UP))
}

// knownAt tells the link-layer address of a neighbour, for good.
func (b *batch) knownAt(index uint32, a netip.Addr, mac [6]byte) {
	h := make([]byte, unix.SizeofNdMsg)
	h[0] = family(a)
	binary.NativeEndian.PutUint32(h[4:], index)
	binary.NativeEndian.PutUint16(h[8:], unix.NUD_PERMANENT)
	b.begin(fmt.Sprintf("add neighbour %s", a), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, h)
	b.bytes(unix.NDA_DST, a.AsSlice())
	b.bytes(unix.NDA_LLADDR, mac[:])
}

// route adds one to p over the link; with via it is the default gateway's, which
// has no address on the link.
func (b *batch) route(index uint32, p netip.Prefix, via netip.Addr) {
	h := make([]byte, unix.SizeofRtMsg)
	h[0], h[1] = family(p.Addr()), byte(p.Bits())
	h[4], h[5], h[6], h[7] = unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_LINK, unix.RTN_UNICAST
	if via.IsValid() {
		h[6] = unix.RT_SCOPE_UNIVERSE
		binary.NativeEndian.PutUint32(h[8:], unix.RTNH_F_ONLINK)
	}
	b.begin(fmt.Sprintf("add route to %s", p), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, h)
	if p.Bits() > 0 {
		b.bytes(unix.RTA_DST, p.Addr().AsSlice())
	}
	b.u32(unix.RTA_OIF, index)
	if via.IsValid() {
		b.bytes(unix.RTA_GATEWAY, via.AsSlice())
	}
}

func (b *batch) address(index uint32, a netip.Addr) {
	h := make([]byte, unix.SizeofIfAddrmsg)
	h[0], h[1] = family(a), byte(a.BitLen())
	binary.NativeEndian.PutUint32(h[4:], index)
	b.begin(fmt.Sprintf("add address %s", a), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, h)
	b.bytes(unix.IFA_LOCAL, a.AsSlice())
	b.bytes(unix.IFA_ADDRESS, a.AsSlice())
	b.u32(unix.IFA_FLAGS, unix.IFA_F_NODAD)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// sysctls6 are those of IPv6, which netlink does not set. on is whether the link
// has IPv6 at all.
func sysctls6(link string, on bool, more ...string) error {
	const dir = "ipv6/conf/"
	if !netns.HasSysctl(dir + link) {
		return nil // a kernel without IPv6, or an MTU below its least
	}
	// Without advertisements there is nothing to configure from (autoconf), and an
	// interface without ARP looks for no duplicates (accept_dad).
	set := append([]string{"accept_ra=0", "accept_redirects=0"}, more...)
	if !on {
		set = []string{"disable_ipv6=1"}
	}
	for _, s := range set {
		name, value, _ := strings.Cut(s, "=")
		if err := netns.WriteSysctl(dir+link+"/"+name, value); err != nil && !(name == "force_forwarding" && errors.Is(err, os.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// hostEnd sets up the host's side. The sandbox cannot send yet: its end is down.
func hostEnd(a addresses, index uint32, id string, v6 bool, downBPS int64, mtu int) error {
	if err := sysctls6(a.link, v6, "force_forwarding=1"); err != nil {
		return err
	}
	var b batch
	b.quiet(index, v6, id, map[uint16]uint32{
		confForwarding: 1, confRPFilter: 1, confAcceptRedir: 0, confSecureRedir: 0, confSendRedirects: 0, confAcceptSource: 0,
	})
	for _, to := range a.of(v6) {
		b.knownAt(index, to, a.macIn)
		b.route(index, netip.PrefixFrom(to, to.BitLen()), netip.Addr{})
	}
	if downBPS != 0 {
		b.addTBF(index, downBPS, mtu)
	}
	return b.send()
}

// sandboxEnd sets up the sandbox's side, on a thread in its namespace.
func sandboxEnd(a addresses, v6 bool, upBPS int64, mtu int) error {
	index, err := linkIndex(inner)
	if err != nil {
		return err
	}
	if err := sysctls6(inner, v6); err != nil {
		return err
	}
	var b batch
	b.quiet(index, v6, "", map[uint16]uint32{confAcceptRedir: 0, confSecureRedir: 0, confSendRedirects: 0, confAcceptSource: 0})
	if upBPS != 0 {
		b.addTBF(index, upBPS, mtu)
	}
	for i, own := range a.of(v6) {
		gw := []netip.Addr{a.gw4, a.gw6}[i]
		b.address(index, own)
		b.knownAt(index, gw, a.macUp)
		all, _ := gw.Prefix(0)
		b.route(index, all, gw)
	}
	return b.send()
}

// of are the sandbox's addresses.
func (a addresses) of(v6 bool) []netip.Addr {
	if v6 {
		return []netip.Addr{a.v4, a.v6}
	}
	return []netip.Addr{a.v4}
}
