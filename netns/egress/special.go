package egress

import (
	"net"
	"net/netip"
)

// special names the kind of an address that is not a public one; "" is public.
func special(ip netip.Addr) string {
	ip = inner(ip)
	switch {
	case ip.IsUnspecified():
		return "unspecified"
	case ip.IsLoopback():
		return "loopback"
	case ip.IsLinkLocalUnicast():
		return "link-local" // the metadata services of clouds
	case ip.IsPrivate():
		return "private"
	case ip.IsMulticast():
		return "multicast"
	}
	for _, p := range reserved {
		if p.Contains(ip) {
			return "reserved"
		}
	}
	// A service on the host may trust what comes from the host.
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "perhaps the host's own"
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == ip {
			return "host's own"
		}
	}
	return ""
}

// inner is where packets to an address really go.
func inner(ip netip.Addr) netip.Addr {
	if nat64.Contains(ip) {
		b := ip.As16()
		return netip.AddrFrom4([4]byte(b[12:]))
	}
	return ip
}

var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// reserved has, besides shared and reserved ranges, those in which another
// address hides (local NAT64, 6to4, Teredo, IPv4-compatible), our own, and
// Azure's host (WireServer), which is at a public address.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("::/96"), netip.MustParsePrefix("64:ff9b::/32"), netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("2001:2::/48"), netip.MustParsePrefix("fec0::/10"),
}
