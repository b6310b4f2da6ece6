package routed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

const (
	maxPieces   = 4096 // of one sandbox's exceptions
	perMessage  = 256  // an attribute holds 64 kB
	maxLeftover = 64   // elements of sandboxes that are gone
	lookEvery   = 16   // links: then it is looked for such elements
)

// area is destinations and ports, both inclusive.
type area struct {
	lo, hi         netip.Addr
	portLo, portHi uint16
}

// parseEntry reads ADDRESS[:PORT[-PORT]] or CIDR[:PORT[-PORT]], IPv6 with a port
// in brackets. Without a port it is every port, and every protocol.
func parseEntry(flag, s string) (area, error) {
	fail := func(why, hint string) (area, error) {
		return area{}, hinted.New(fmt.Errorf("read %s %q: %s", flag, s, why), hint)
	}
	host, port, hasPort := s, "", false
	if rest, ok := strings.CutPrefix(s, "["); ok {
		h, after, closed := strings.Cut(rest, "]")
		if host, hasPort = h, after != ""; !closed || hasPort && after[0] != ':' {
			return fail("not [ADDRESS]:PORT", "for example [2001:db8::1]:443")
		}
		port = strings.TrimPrefix(after, ":")
	} else if strings.Count(s, ":") == 1 {
		host, port, hasPort = strings.Cut(s, ":")
	}
	p, err := netip.ParsePrefix(host)
	if a, aerr := netip.ParseAddr(host); err != nil && aerr == nil && a.Zone() == "" {
		a = a.Unmap()
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil {
		if strings.ContainsAny(host, "/:") || strings.Trim(host, "0123456789.") == "" {
			return fail("neither an address nor a CIDR", "for example 192.0.2.0/24:443 or [2001:db8::1]:443")
		}
		return fail("a name", "names need --network egress; --network full takes addresses and CIDRs")
	}
	a := area{portHi: 0xffff}
	a.lo, a.hi = bounds(p)
	if !hasPort {
		return a, nil
	}
	from, to, ranged := strings.Cut(port, "-")
	if !ranged {
		to = from
	}
	lo, err1 := strconv.ParseUint(from, 10, 16)
	hi, err2 := strconv.ParseUint(to, 10, 16)
	if err1 != nil || err2 != nil || lo == 0 || hi < lo {
		return fail("the port is no number or range of 1 to 65535", "for example 192.0.2.1:443")
	}
	a.portLo, a.portHi = uint16(lo), uint16(hi)
	return a, nil
}

// disjoint gives the same areas without overlap: the kernel refuses an element
// that overlaps another one in part.
func disjoint(in []area) (out []area, err error) {
	for _, a := range in {
		pieces := []area{a}
		for _, have := range out {
			var left []area
			for _, p := range pieces {
				left = append(left, p.without(have)...)
			}
			pieces = left
		}
		if out = append(out, pieces...); len(out) > maxPieces {
			return nil, fmt.Errorf("read --allow and --deny: more than %d separate areas", maxPieces)
		}
	}
	return out, nil
}

func (a area) without(b area) (out []area) {
	if a.lo.BitLen() != b.lo.BitLen() || a.hi.Less(b.lo) || b.hi.Less(a.lo) || a.portHi < b.portLo || b.portHi < a.portLo {
		return []area{a}
	}
	if a.lo.Less(b.lo) {
		out = append(out, area{a.lo, b.lo.Prev(), a.portLo, a.portHi})
		a.lo = b.lo
	}
	if b.hi.Less(a.hi) {
		out = append(out, area{b.hi.Next(), a.hi, a.portLo, a.portHi})
		a.hi = b.hi
	}
	if a.portLo < b.portLo {
		out = append(out, area{a.lo, a.hi, a.portLo, b.portLo - 1})
	}
	if b.portHi < a.portHi {
		out = append(out, area{a.lo, a.hi, b.portHi + 1, a.portHi})
	}
	return out
}

// exceptions are the elements of one sandbox by set.
type exceptions struct{ allow, deny []area }

func readExceptions(allow, deny []string) (e exceptions, err error) {
	for _, l := range []struct {
		flag string
		in   []string
		out  *[]area
	}{{"--allow", allow, &e.allow}, {"--deny", deny, &e.deny}} {
		for _, s := range l.in {
			a, err := parseEntry(l.flag, s)
			if err != nil {
				return e, err
			}
			*l.out = append(*l.out, a)
		}
		if *l.out, err = disjoint(*l.out); err != nil {
			return e, err
		}
	}
	return e, nil
}

// allowServers lets the name servers be asked that the built-in rules would
// refuse: a cloud's at its link-local address, a resolver on the host itself.
func (e *exceptions) allowServers(servers []netip.Addr) (err error) {
	for _, a := range servers {
		if a = a.Unmap(); neverReached(a) || onHost(a) {
			e.allow = append(e.allow, area{a, a, 53, 53})
		}
	}
	e.allow, err = disjoint(e.allow)
	return err
}

// onHost is whether an address is the host's own: only then a socket binds to it.
func onHost(a netip.Addr) bool {
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: a.As16()}
	if a.Is4() {
		sa = &unix.SockaddrInet4{Addr: a.As4()}
	}
	s, err := unix.Socket(int(family(a)), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(s)
	return unix.Bind(s, sa) == nil
}

func exceptionSets() (out []*nftables.Set) {
	for _, name := range []string{"deny4", "allow4", "deny6", "allow6"} {
		addr := nftables.TypeIPAddr
		if strings.HasSuffix(name, "6") {
			addr = nftables.TypeIP6Addr
		}
		out = append(out, &nftables.Set{
			Table: table(), Name: name, Interval: true, Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeIFIndex, addr, nftables.TypeInetService),
		})
	}
	return out
}

// add puts the exceptions of the sandbox with this link in, in one transaction,
// and takes those of sandboxes that are gone out when they have become many:
// they match nothing, and a delete costs 15 ms.
func (e exceptions) add(c *nftables.Conn, link uint32) error {
	for _, s := range exceptionSets() {
		areas := e.allow
		if strings.HasPrefix(s.Name, "deny") {
			areas = e.deny
		}
		var elems []nftables.SetElement
		for _, a := range areas {
			if a.lo.Is4() == strings.HasSuffix(s.Name, "4") {
				elems = append(elems, nftables.SetElement{Key: key(link, a.lo, a.portLo), KeyEnd: key(link, a.hi, a.portHi)})
			}
		}
		if len(elems) == 0 {
			continue
		}
		var old []nftables.SetElement
		var err error
		if link%lookEvery == 0 {
			if old, err = leftovers(c, s); err != nil {
				return err
			}
		}
		for chunk := range slices.Chunk(old, perMessage) {
			err = errors.Join(err, c.SetDeleteElements(s, chunk))
		}
		for chunk := range slices.Chunk(elems, perMessage) {
			err = errors.Join(err, c.SetAddElements(s, chunk))
		}
		if err != nil {
			return fmt.Errorf("write nftables set %q: %w", s.Name, err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("add exceptions: %w", err)
	}
	return nil
}

func key(link uint32, a netip.Addr, port uint16) []byte {
	k := append(binary.NativeEndian.AppendUint32(nil, link), a.AsSlice()...)
	return append(binary.BigEndian.AppendUint16(k, port), 0, 0) // each field is padded to a word
}

func leftovers(c *nftables.Conn, s *nftables.Set) ([]nftables.SetElement, error) {
	elems, _, err := elementsOf(c, s)
	if err != nil || len(elems) <= maxLeftover {
		return nil, err
	}
	alive := map[uint32]bool{}
	old := slices.DeleteFunc(elems, func(e nftables.SetElement) bool {
		index := binary.NativeEndian.Uint32(e.Key)
		live, seen := alive[index]
		if !seen {
			live = netns.LinkExists(index)
			alive[index] = live
		}
		return live
	})
	if len(old) <= maxLeftover {
		return nil, nil
	}
	return old, nil
}
