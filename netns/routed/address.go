package routed

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

// Slots is how many sandboxes there may be at a time.
const Slots = 4093

const (
	// Of 198.18.0.0/15, which is for measuring networks: no LAN, VPN or default of
	// docker's (172.17–31, 192.168), podman's (10.88–10.255), libvirt's
	// (192.168.122) or a cloud's is there.
	defaultPool = "198.19.80.0/20"
	poolEnv     = "SBXRUN_NET_POOL"
	// A unique local prefix; its bytes spell sbxrun.
	pool6 = "fd73:6278:7275:6e00::/64"
)

// addresses are all that a slot decides.
type addresses struct {
	link         string // the host end's name
	v4, v6       netip.Addr
	gw4, gw6     netip.Addr // the next hop: nobody has this address, the neighbour entry is all there is
	macIn, macUp [6]byte    // of the sandbox's end and the host's
}

// addressesOf derives a slot's addresses. 4096 addresses without the network's,
// the gateway's and the last one are one for each slot.
func addressesOf(slot int) (a addresses, err error) {
	if slot < 0 || slot >= Slots {
		return a, fmt.Errorf("address of slot %d: there are %d slots", slot, Slots)
	}
	pool := defaultPool
	if e := os.Getenv(poolEnv); e != "" {
		pool = e
	}
	p, err := netip.ParsePrefix(pool)
	if err != nil || !p.Addr().Is4() {
		return a, hinted.New(fmt.Errorf("read %s=%q: not an IPv4 prefix", poolEnv, pool), "for example "+poolEnv+"="+defaultPool)
	}
	if n := 1 << (32 - p.Bits()); slot+3 >= n {
		return a, hinted.New(fmt.Errorf("address of slot %d: %s=%q has room for %d sandboxes", slot, poolEnv, pool, max(0, n-3)), "a /20 is enough for all")
	}
	p = p.Masked()
	a.link = netns.LinkPrefix + strconv.Itoa(slot)
	a.gw4, a.v4 = plus(p.Addr(), 1), plus(p.Addr(), 2+slot)
	p6 := netip.MustParsePrefix(pool6).Addr()
	a.gw6, a.v6 = plus(p6, 1), plus(p6, 2+slot)
	// Locally administered; the slot is in the last two bytes.
	a.macIn = [6]byte{0x02, 's', 'b', 'x', byte(slot >> 8), byte(slot)}
	a.macUp = [6]byte{0x06, 's', 'b', 'x', byte(slot >> 8), byte(slot)}
	return a, nil
}

// plus adds n to the last four bytes of an address.
func plus(a netip.Addr, n int) netip.Addr {
	b := a.AsSlice()
	tail := b[len(b)-4:]
	binary.BigEndian.PutUint32(tail, binary.BigEndian.Uint32(tail)+uint32(n))
	r, _ := netip.AddrFromSlice(b)
	return r
}
