package egress

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Policy says what may be reached. A deny wins over every allow, and what no
// entry allows is denied.
type Policy struct {
	allow, deny []rule
	into        []netip.Prefix
}

// rule is one entry: a name, all names below one, or a prefix of addresses, and ports.
type rule struct {
	text   string // as it was given, behind its flag
	name   string // "" where it is about addresses
	below  bool   // all names below name, not name itself
	prefix netip.Prefix
	lo, hi uint16
}

const defaultDeny = "default deny"

// ParsePolicy reads entries HOST, *.HOST (names below HOST at any depth, not
// HOST itself), ADDRESS or CIDR, each with :PORT, :PORT-PORT or, for any port,
// nothing behind it. IPv6 addresses with a port stand in brackets. into are
// prefixes that an allowed name may lead into although they are not public.
func ParsePolicy(allow, deny, into []string) (*Policy, error) {
	p := &Policy{}
	for _, l := range []struct {
		flag    string
		entries []string
		to      *[]rule
	}{{"--allow ", allow, &p.allow}, {"--deny ", deny, &p.deny}} {
		for _, entry := range l.entries {
			r, err := parseRule(entry)
			if err != nil {
				return nil, hinted.New(fmt.Errorf("read %s%q: %w", l.flag, entry, err), "HOST, *.HOST, an address or a CIDR; with :PORT or :FROM-TO")
			}
			r.text = l.flag + entry
			*l.to = append(*l.to, r)
		}
	}
	for _, entry := range into {
		x, ok := parsePrefix(entry)
		if !ok {
			return nil, fmt.Errorf("read prefix %q: not an address or CIDR", entry)
		}
		p.into = append(p.into, x)
	}
	return p, nil
}

func parseRule(entry string) (rule, error) {
	host, ports, hasPort, err := splitPort(entry)
	if err != nil {
		return rule{}, err
	}
	r := rule{lo: 1, hi: 65535}
	if hasPort {
		if r.lo, r.hi, err = parsePorts(ports); err != nil {
			return rule{}, err
		}
	}
	var ok bool
	if r.prefix, ok = parsePrefix(host); ok {
		return r, nil
	}
	if strings.ContainsAny(host, "/:") {
		return rule{}, fmt.Errorf("%q is not an address or CIDR", host)
	}
	host, r.below = strings.CutPrefix(host, "*.")
	r.name, err = canonicalName(host)
	return r, err
}

// splitPort takes the port off. IPv6 makes colons ambiguous: without brackets
// they are the address's, unless they follow the length of a prefix.
func splitPort(s string) (host, ports string, has bool, err error) {
	if inner, ok := strings.CutPrefix(s, "["); ok {
		host, rest, ok := strings.Cut(inner, "]")
		if !ok || !strings.Contains(host, ":") {
			return "", "", false, fmt.Errorf("brackets are for IPv6 addresses")
		}
		if rest == "" {
			return host, "", false, nil
		}
		ports, ok = strings.CutPrefix(rest, ":")
		if !ok {
			return "", "", false, fmt.Errorf("%q follows the address", rest)
		}
		return host, ports, true, nil
	}
	slash := strings.LastIndexByte(s, '/')
	if slash < 0 && strings.Count(s, ":") > 1 {
		return s, "", false, nil
	}
	if i := strings.LastIndexByte(s, ':'); i > slash {
		return s[:i], s[i+1:], true, nil
	}
	return s, "", false, nil
}

func parsePorts(s string) (lo, hi uint16, err error) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	lo, ok1 := parsePort(from)
	hi, ok2 := parsePort(to)
	if !ok1 || !ok2 || lo > hi {
		return 0, 0, fmt.Errorf("%q is not a port or a range of ports", s)
	}
	return lo, hi, nil
}

func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n != 0 && digits(s)
}

func digits(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
}

// parsePrefix reads an address or a CIDR. IPv4 within IPv6 is IPv4.
func parsePrefix(s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		ip, err := netip.ParseAddr(s)
		if err != nil || ip.Zone() != "" {
			return p, false
		}
		p = netip.PrefixFrom(ip, ip.BitLen())
	}
	if ip := p.Addr(); ip.Is4In6() {
		if p.Bits() < 96 {
			return p, false
		}
		p = netip.PrefixFrom(ip.Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

// canonicalName gives the one spelling of a name that rules are compared with.
func canonicalName(s string) (string, error) {
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	if name == "" || len(name) > 253 {
		return "", fmt.Errorf("a name has 1 to 253 bytes")
	}
	label := ""
	for label = range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return "", fmt.Errorf("the labels of a name have 1 to 63 bytes")
		}
	}
	for i := range len(name) {
		if c := name[i]; c != '.' && c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			if c >= 0x80 {
				return "", fmt.Errorf("a name beyond ASCII is written as xn--…")
			}
			return "", fmt.Errorf("%q is not part of a name", c)
		}
	}
	// Resolvers read these as addresses: 0x7f000001, 127.1, 2130706433.
	if digits(label) || strings.HasPrefix(label, "0x") {
		return "", fmt.Errorf("neither an address nor a name")
	}
	return name, nil
}

func (r *rule) covers(port uint16) bool { return r.lo <= port && port <= r.hi }

func (r *rule) isFor(name string) bool {
	if r.name == "" {
		return false
	}
	if !r.below {
		return r.name == name
	}
	rest, ok := strings.CutSuffix(name, r.name)
	return ok && len(rest) > 1 && rest[len(rest)-1] == '.'
}

func (r *rule) contains(ip netip.Addr) bool { return r.name == "" && r.prefix.Contains(ip) }

// names says whether the entry was written for the addresses in it. One as wide
// as 0.0.0.0/0 was not: it means the internet, not the metadata service.
func (r *rule) names(ip netip.Addr) bool { return r.contains(ip) && r.prefix.Bits() >= 7 }

// forName decides about a name; port 0 asks whether any port of it may be
// reached. Its addresses are decided by leadsTo.
func (p *Policy) forName(name string, port uint16) (why string, ok bool) {
	for i := range p.deny {
		r := &p.deny[i]
		if r.isFor(name) && (r.covers(port) || port == 0 && r.lo == 1 && r.hi == 65535) {
			return r.text, false
		}
	}
	for i := range p.allow {
		if r := &p.allow[i]; r.isFor(name) && (port == 0 || r.covers(port)) {
			return r.text, true
		}
	}
	return defaultDeny, false
}

// forAddress decides about an address that was asked for as such.
func (p *Policy) forAddress(ip netip.Addr, port uint16) (why string, ok bool) {
	if why, denied := p.denies(ip, port); denied {
		return why, false
	}
	why = defaultDeny
	for i := range p.allow {
		r := &p.allow[i]
		if !r.contains(ip) || !r.covers(port) {
			continue
		}
		if r.names(ip) {
			return r.text, true
		}
		kind := special(ip)
		if kind == "" {
			return r.text, true
		}
		why = fmt.Sprintf("%s address %s", kind, ip)
	}
	return why, false
}

// leadsTo decides whether an allowed name may lead to an address: to a public
// one, or one that an entry names. why is the reason where it may not.
func (p *Policy) leadsTo(name string, ip netip.Addr, port uint16) (why string, ok bool) {
	if why, denied := p.denies(ip, port); denied {
		return why, false
	}
	kind := special(ip)
	if kind == "" || name == "localhost" && ip.IsLoopback() {
		return "", true
	}
	for i := range p.allow {
		if r := &p.allow[i]; r.names(ip) && r.covers(port) {
			return "", true
		}
	}
	for _, x := range p.into {
		if x.Contains(ip) {
			return "", true
		}
	}
	return fmt.Sprintf("%s address %s of %s", kind, ip, name), false
}

func (p *Policy) denies(ip netip.Addr, port uint16) (string, bool) {
	in := inner(ip)
	for i := range p.deny {
		if r := &p.deny[i]; (r.contains(ip) || r.contains(in)) && r.covers(port) {
			return r.text, true
		}
	}
	return "", false
}
