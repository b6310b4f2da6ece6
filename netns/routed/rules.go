package routed

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

// The ruleset is one table, the same for every sandbox: it knows them by the
// group of their links. Nothing of it matters to a packet that neither comes
// from nor goes to such a link, but for the guard (see forward).
//
// An accept here is not the last word: every base chain of every table is asked,
// and a drop of another table's stands. So a host whose own forward chain drops
// by default (docker's does) must let the links through; Probe says how. A drop
// here is final, whatever the order. We come before priority 0 so that what we
// refuse is refused with an answer before somebody drops it without one.
const (
	tableName = "sbxrun"
	// version is part of the guard set's name, by which the table is found to be
	// current. Raise it with every change of the rules.
	version   = "3"
	guardName = "guarded_v" + version
)

func table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}
}

// dial opens a connection for the calling thread's namespace.
func dial(lasting bool) (*nftables.Conn, error) {
	opts := []nftables.ConnOption{nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetReadBuffer(1 << 20) // an answer for each message of the ruleset: ENOBUFS with the default
	})}
	if lasting {
		opts = append(opts, nftables.AsLasting())
	}
	c, err := nftables.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	return c, nil
}

// ensureRules makes the table if it is absent or of another version, and makes
// the guard's content what it should be. The caller has the plan's lock.
func ensureRules(c *nftables.Conn, guarded []netns.Guarded) error {
	guard := guardSet()
	elems, found, err := elementsOf(c, guard)
	if err != nil {
		return hinted.New(err, "--network full needs nf_tables in the kernel and CAP_NET_ADMIN")
	}
	if !found {
		return makeRules(c, guarded)
	}
	want := guardElements(guarded)
	add := missing(want, elems)
	// Interfaces that others made forward by now; our guard would be in the way
	// of a router. A delete makes the close of the socket wait (15 ms), which
	// happens once after such a change.
	remove := missing(elems, want)
	if len(add)+len(remove) == 0 {
		return nil
	}
	err = errors.Join(c.SetAddElements(guard, add), c.SetDeleteElements(guard, remove))
	if err == nil {
		err = c.Flush()
	}
	if err != nil {
		return fmt.Errorf("guard interfaces %v: %w", guarded, err)
	}
	return nil
}

// elementsOf lists a set; found is whether there is one.
func elementsOf(c *nftables.Conn, s *nftables.Set) (elems []nftables.SetElement, found bool, err error) {
	elems, err = c.GetSetElements(s)
	if err == nil {
		return elems, true, nil
	}
	// The library loses the errno there, and keeps it here.
	if _, byName := c.GetSetByName(s.Table, s.Name); errors.Is(byName, unix.ENOENT) {
		return nil, false, nil
	}
	return nil, false, fmt.Errorf("read nftables set %q: %w", s.Name, err)
}

func missing(want, have []nftables.SetElement) []nftables.SetElement {
	return slices.DeleteFunc(slices.Clone(want), func(w nftables.SetElement) bool {
		return slices.ContainsFunc(have, func(h nftables.SetElement) bool { return bytes.Equal(h.Key, w.Key) })
	})
}

// guardElements are keyed by family, padded to a word, and interface.
func guardElements(gs []netns.Guarded) (out []nftables.SetElement) {
	for _, g := range gs {
		key := make([]byte, 4+unix.IFNAMSIZ)
		key[0] = unix.NFPROTO_IPV4
		if g.IPv6 {
			key[0] = unix.NFPROTO_IPV6
		}
		copy(key[4:], g.Device)
		out = append(out, nftables.SetElement{Key: key})
	}
	return out
}

func guardSet() *nftables.Set {
	return &nftables.Set{
		Table: table(), Name: guardName, Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeNFProto, nftables.TypeIFName),
	}
}

// makeRules replaces the table in one transaction. What live sandboxes were
// allowed and denied is taken over.
func makeRules(c *nftables.Conn, guarded []netns.Guarded) error {
	kept := map[string][]nftables.SetElement{}
	for _, s := range exceptionSets() {
		elems, _, err := elementsOf(c, s)
		if err != nil {
			return err
		}
		kept[s.Name] = elems
	}
	t := table()
	c.AddTable(t) // so that the delete finds one
	c.DelTable(t)
	c.AddTable(t)
	r := &ruleset{c: c, t: t}
	r.set(guardSet(), guardElements(guarded))
	for _, s := range exceptionSets() {
		r.set(s, kept[s.Name])
	}
	r.never()
	r.write()
	if r.err == nil {
		r.err = c.Flush()
	}
	if r.err != nil {
		err := fmt.Errorf("make nftables table %q: %w", tableName, r.err)
		return hinted.New(err, "--network full needs nf_tables with nat, fib, ct and reject in the kernel, and CAP_NET_ADMIN")
	}
	return nil
}

// Remove removes the table, for when no sandbox lives. While it stays it costs
// other traffic what connection tracking costs, and nothing is changed by it.
func Remove() error {
	c, err := dial(false)
	if err != nil {
		return err
	}
	c.AddTable(table())
	c.DelTable(table())
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove nftables table %q: %w", tableName, err)
	}
	return nil
}

type ruleset struct {
	c   *nftables.Conn
	t   *nftables.Table
	err error
}

func (r *ruleset) set(s *nftables.Set, elems []nftables.SetElement) {
	if err := r.c.AddSet(s, elems); err != nil {
		r.err = errors.Join(r.err, fmt.Errorf("set %q: %w", s.Name, err))
	}
}

// Never reached unless allowed: this host's or network's own addresses, those of
// no single machine, and the clouds' metadata services.
var (
	never4 = []string{
		"0.0.0.0/8", "100.100.100.200/32", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "192.0.0.192/32", "224.0.0.0/3",
	}
	never6 = []string{
		"::/127", "::ffff:0:0/96", "64:ff9b::a9fe:0/112", "fd00:ec2::254/128", "fd20:ce::254/128", "fe80::/10", "ff00::/8",
	}
)

func neverReached(a netip.Addr) bool {
	return slices.ContainsFunc(append(slices.Clone(never4), never6...), func(p string) bool {
		return netip.MustParsePrefix(p).Contains(a)
	})
}

func (r *ruleset) never() {
	for name, list := range map[string][]string{"never4": never4, "never6": never6} {
		s := &nftables.Set{Table: r.t, Name: name, Interval: true, Constant: true, KeyType: nftables.TypeIPAddr}
		if name == "never6" {
			s.KeyType = nftables.TypeIP6Addr
		}
		var elems []nftables.SetElement
		for _, p := range list {
			lo, hi := bounds(netip.MustParsePrefix(p))
			elems = append(elems, nftables.SetElement{Key: lo.AsSlice()})
			if end := hi.Next(); end.IsValid() { // else it reaches to the last address
				elems = append(elems, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		}
		r.set(s, elems)
	}
}

// bounds are the first and the last address of a prefix.
func bounds(p netip.Prefix) (lo, hi netip.Addr) {
	lo = p.Masked().Addr()
	b := lo.AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	hi, _ = netip.AddrFromSlice(b)
	return lo, hi
}

// base adds a chain at a hook.
func (r *ruleset) base(name string, typ nftables.ChainType, hook *nftables.ChainHook, priority int) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return r.c.AddChain(&nftables.Chain{
		Table: r.t, Name: name, Type: typ, Hooknum: hook,
		Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), Policy: &accept,
	})
}

func (r *ruleset) chain(name string) *nftables.Chain {
	return r.c.AddChain(&nftables.Chain{Table: r.t, Name: name})
}

// rule adds one: the packet must pass all matches to get the verdict.
func (r *ruleset) rule(ch *nftables.Chain, matches ...[]expr.Any) {
	r.c.AddRule(&nftables.Rule{Table: r.t, Chain: ch, Exprs: slices.Concat(matches...)})
}

const reg = 1

func cmp(b ...byte) expr.Any    { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: b} }
func cmpNot(b ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: b} }
func u32(v uint32) []byte       { return binaryutil.NativeEndian.PutUint32(v) }

func meta(k expr.MetaKey, c expr.Any) []expr.Any {
	return []expr.Any{&expr.Meta{Key: k, Register: reg}, c}
}

func verdict(k expr.VerdictKind, chain ...string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: k, Chain: strings.Join(chain, "")}}
}

func goTo(ch *nftables.Chain) []expr.Any { return verdict(expr.VerdictGoto, ch.Name) }
func jump(ch *nftables.Chain) []expr.Any { return verdict(expr.VerdictJump, ch.Name) }

// network loads bytes of the network header.
func network(offset, length uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}
}

func bits(load expr.Any, mask uint32, c expr.Any) []expr.Any {
	return []expr.Any{load, &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: u32(mask), Xor: u32(0)}, c}
}

func (r *ruleset) in(set string, invert bool) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: set, Invert: invert}
}

func (r *ruleset) write() {
	var (
		accept, drop = verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
		fromUs       = meta(expr.MetaKeyIIFGROUP, cmp(u32(group)...))
		fromOthers   = meta(expr.MetaKeyIIFGROUP, cmpNot(u32(group)...))
		toUs         = meta(expr.MetaKeyOIFGROUP, cmp(u32(group)...))
		toOthers     = meta(expr.MetaKeyOIFGROUP, cmpNot(u32(group)...))
		v4           = meta(expr.MetaKeyNFPROTO, cmp(unix.NFPROTO_IPV4))
		v6           = meta(expr.MetaKeyNFPROTO, cmp(unix.NFPROTO_IPV6))
		answers      = bits(&expr.Ct{Key: expr.CtKeySTATE, Register: reg},
			expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED, cmpNot(u32(0)...))
	)

	// Refused with an answer, so that programs fail at once and do not wait. TCP
	// gets a reset: an ICMPv6 error that comes while connect still holds the
	// socket is only noted, and the program waits all the same.
	refuse := r.chain("refuse")
	r.rule(refuse, meta(expr.MetaKeyL4PROTO, cmp(unix.IPPROTO_TCP)), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	r.rule(refuse, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}})

	// What comes from a sandbox has its address: the route to the source must
	// lead back to the link. Before connection tracking, to leave no entries.
	spoof := r.base("spoof", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, -300)
	r.rule(spoof, fromOthers, accept)
	// The kernel's lookup lets 0.0.0.0 pass to broadcast and multicast (DHCP).
	r.rule(spoof, v4, []expr.Any{network(12, 1), cmp(0)}, drop)
	r.rule(spoof, v6, []expr.Any{
		network(8, 4), &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: []byte{0xff, 0xc0, 0, 0}, Xor: make([]byte, 4)}, cmp(0xfe, 0x80, 0, 0),
	}, drop)
	r.rule(spoof, v6, []expr.Any{network(8, 16), cmp(make([]byte, 16)...)}, drop)
	// No neighbour discovery, router advertisements (which would set the host's
	// routes where accept_ra is on) or multicast listeners: 130–137 and 143.
	icmp6 := meta(expr.MetaKeyL4PROTO, cmp(unix.IPPROTO_ICMPV6))
	icmpType := &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}
	r.rule(spoof, v6, icmp6, []expr.Any{icmpType, &expr.Range{Op: expr.CmpOpEq, Register: reg, FromData: []byte{130}, ToData: []byte{137}}}, drop)
	r.rule(spoof, v6, icmp6, []expr.Any{icmpType, cmp(143)}, drop)
	r.rule(spoof, []expr.Any{&expr.Fib{Register: reg, FlagSADDR: true, FlagIIF: true, ResultOIF: true}, cmp(u32(0)...)}, drop)

	// What was asked for by --allow and --deny, for this sandbox.
	r.set(&nftables.Set{Table: r.t, Name: "ported", Constant: true, KeyType: nftables.TypeInetProto},
		[]nftables.SetElement{{Key: []byte{unix.IPPROTO_TCP}}, {Key: []byte{unix.IPPROTO_UDP}}})
	asked4, asked6 := r.chain("asked4"), r.chain("asked6")
	r.asked(asked4, "4", 16, 4, refuse)
	r.asked(asked6, "6", 24, 16, refuse)

	// Where a sandbox may send to. Every packet is asked about, not only a
	// connection's first: what was tracked for the slot's last sandbox is no pass
	// for the next. Before other tables' DNAT, so what the sandbox asked for is
	// judged: a port that docker publishes on the host is the host's.
	var unrouted []nftables.SetElement
	for _, typ := range []uint32{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST} {
		unrouted = append(unrouted, nftables.SetElement{Key: u32(typ)})
	}
	r.set(&nftables.Set{Table: r.t, Name: "unrouted", Constant: true, KeyType: nftables.TypeFIBAddr}, unrouted)
	policy := r.base("policy", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, -150)
	r.rule(policy, fromOthers, accept)
	r.rule(policy, v4, jump(asked4))
	r.rule(policy, v6, jump(asked6))
	r.rule(policy, []expr.Any{&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true}, r.in("unrouted", false)}, goTo(refuse))
	r.rule(policy, v4, []expr.Any{network(16, 4), r.in("never4", false)}, goTo(refuse))
	r.rule(policy, v6, []expr.Any{network(24, 16), r.in("never6", false)}, goTo(refuse))

	// The host's own services, also where another table redirects to them.
	input := r.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, -10)
	r.rule(input, fromOthers, accept)
	r.rule(input, v4, jump(asked4))
	r.rule(input, v6, jump(asked6))
	r.rule(input, goTo(refuse))

	// Nobody begins anything with a sandbox, the host included: published ports
	// come from sockets inside its namespace.
	output := r.base("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, -10)
	r.rule(output, toOthers, accept)
	r.rule(output, answers, accept)
	r.rule(output, drop)

	forward := r.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, -10)
	r.rule(forward, fromUs, toUs, goTo(refuse))
	// Connection tracking is one table for the host: a sandbox gets a share. What
	// is over it is refused when it begins; the rest goes on.
	r.set(&nftables.Set{Table: r.t, Name: "tracked", Dynamic: true, Size: 2 * Slots, KeyType: nftables.TypeIFIndex}, nil)
	r.rule(forward, fromUs, bits(&expr.Ct{Key: expr.CtKeySTATE, Register: reg}, expr.CtStateBitNEW, cmpNot(u32(0)...)), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: reg},
		&expr.Dynset{
			SrcRegKey: reg, SetName: "tracked", Operation: unix.NFT_DYNSET_OP_ADD,
			Exprs: []expr.Any{&expr.Connlimit{Count: maxTracked, Flags: expr.NFT_CONNLIMIT_F_INV}},
		},
	}, goTo(refuse))
	r.rule(forward, fromUs, accept)
	r.rule(forward, toUs, answers, accept)
	r.rule(forward, toUs, drop)
	// The guard: interfaces that forward only because of us make the host no
	// router for their neighbours. It goes by interface, and the set is emptied by
	// the next sandbox when others made them forward. Until then answers and what
	// somebody published (DNAT) pass, so that a docker started meanwhile works;
	// only an unsolicited, untranslated packet is dropped.
	const first = unix.NFT_REG32_00
	r.rule(forward, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: first},
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: first + 1},
		&expr.Lookup{SourceRegister: first, SetName: guardName, Invert: true},
	}, accept)
	r.rule(forward, answers, accept)
	r.rule(forward, bits(&expr.Ct{Key: expr.CtKeySTATUS, Register: reg}, ipsDstNAT, cmpNot(u32(0)...)), accept)
	r.rule(forward, drop)

	nat := r.base("nat", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	r.rule(nat, fromUs, toOthers, []expr.Any{&expr.Masq{}})
}

// maxTracked is how many connections of one sandbox the host keeps track of: a
// TCP connection for two minutes after its end, UDP for half a minute.
const maxTracked = 16384

const ipsDstNAT = 1 << 5 // IPS_DST_NAT

// asked looks the packet up in the sandbox's exceptions; a deny wins. The key is
// the link's index, which the kernel does not use twice (an element that was
// left says nothing about another sandbox), destination and port. Other
// protocols than TCP and UDP have port 0, which only an entry for all ports has.
func (r *ruleset) asked(ch *nftables.Chain, family string, offset, length uint32, refuse *nftables.Chain) {
	const first = unix.NFT_REG32_00
	port := first + 1 + length/4
	key := func(p expr.Any) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIF, Register: first},
			&expr.Payload{DestRegister: first + 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
			p,
		}
	}
	for _, withPorts := range []bool{true, false} {
		k := key(&expr.Immediate{Register: port, Data: []byte{0, 0}})
		if withPorts {
			k = key(&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
		}
		proto := meta(expr.MetaKeyL4PROTO, r.in("ported", !withPorts))
		r.rule(ch, proto, k, []expr.Any{&expr.Lookup{SourceRegister: first, SetName: "deny" + family}}, goTo(refuse))
		r.rule(ch, proto, k, []expr.Any{&expr.Lookup{SourceRegister: first, SetName: "allow" + family}}, verdict(expr.VerdictAccept))
	}
}
