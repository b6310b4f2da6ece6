package egress

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// divert makes the one table of the namespace. In the words of nft:
//
//	table inet sbxrun {
//	  chain track {                       # the job's own loopback needs no conntrack
//	    type filter hook output priority raw
//	    ip saddr 127.0.0.0/8 ip daddr 127.0.0.0/8 notrack
//	  }
//	  chain divert {
//	    type nat hook output priority dstnat
//	    limit rate over 1000/second burst 5000 packets drop    # new connections
//	    ip daddr 127.0.0.0/8 accept
//	    udp dport 53 dnat ip to 198.18.0.1:61053
//	    tcp dport 53 dnat ip to 198.18.0.1:61080
//	    tcp dport 3128 dnat ip to 198.18.0.1:61080
//	    ip daddr 198.18.0.1 accept        # what the job serves there itself
//	    meta l4proto tcp dnat ip to 198.18.0.1:61080
//	  }
//	  chain refuse {                      # what is not diverted: QUIC, NTP, ping
//	    type filter hook output priority filter
//	    ct state established,related accept
//	    ip daddr 127.0.0.0/8 accept
//	    ip daddr 198.18.0.1 accept
//	    reject with icmpx admin-prohibited
//	  }
//	}
//
// and the same for IPv6. It must run on a thread inside.
func divert(v6 bool) error {
	return transaction(func(c *nftables.Conn) { rules(c, v6) })
}

func transaction(f func(*nftables.Conn)) error {
	batch, err := encode(f)
	if err != nil {
		return fmt.Errorf("encode nftables rules: %w", err)
	}
	s, err := openNetlink(unix.NETLINK_NETFILTER)
	if err != nil {
		return hinted.New(err, kernelHint)
	}
	defer s.close()
	var first []unix.Errno
	if err = s.send(batch); err == nil {
		first, err = s.acks(1)
	}
	if err == nil && first[0] != 0 {
		err = first[0]
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("set nftables rules: %w", err)
	for _, missing := range []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT} {
		if errors.Is(err, missing) {
			return hinted.New(err, kernelHint)
		}
	}
	return err
}

// Connections and queries that a job may begin, whether allowed or not.
const (
	newPerSecond = 1000
	newBurst     = 5000
)

const kernelHint = "network egress needs nf_tables with NAT in the kernel: modprobe -a nf_tables nft_chain_nat nft_ct nft_nat nft_limit nft_reject_inet"

// encode has the library write a batch and does not let it send: it asks for an
// echo and an acknowledgement of every rule, and reading 25 of them takes three
// times as long as all the rest. One for the last message says that all is done,
// as a batch is a transaction; a failure is said in any case.
func encode(f func(*nftables.Conn)) (batch []byte, err error) {
	var messages []netlink.Message
	caught := errors.New("caught")
	c, err := nftables.New(nftables.WithTestDial(func(m []netlink.Message) ([]netlink.Message, error) {
		messages = m
		return nil, caught
	}))
	if err != nil {
		return nil, err
	}
	f(c)
	if err := c.Flush(); !errors.Is(err, caught) {
		return nil, err
	}
	for i, m := range messages {
		m.Header.Flags &^= netlink.Acknowledge | netlink.Echo
		if i == len(messages)-2 { // the last but the batch's end
			m.Header.Flags |= netlink.Acknowledge
		}
		m.Header.PID, m.Header.Sequence = 0, 0
		b, err := m.MarshalBinary()
		if err != nil {
			return nil, err
		}
		batch = append(batch, b...)
	}
	return batch, nil
}

func rules(c *nftables.Conn, v6 bool) {
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "sbxrun"})
	chain := func(name string, kind nftables.ChainType, prio *nftables.ChainPriority) func(...[]expr.Any) {
		ch := c.AddChain(&nftables.Chain{Table: table, Name: name, Type: kind, Hooknum: nftables.ChainHookOutput, Priority: prio})
		return func(parts ...[]expr.Any) {
			r := &nftables.Rule{Table: table, Chain: ch}
			for _, p := range parts {
				r.Exprs = append(r.Exprs, p...)
			}
			c.AddRule(r)
		}
	}
	families := []family{ipv4}
	if v6 {
		families = append(families, ipv6)
	}
	track := chain("track", nftables.ChainTypeFilter, nftables.ChainPriorityRaw)
	nat := chain("divert", nftables.ChainTypeNAT, nftables.ChainPriorityNATDest)
	refuse := chain("refuse", nftables.ChainTypeFilter, nftables.ChainPriorityFilter)
	// Each connection leaves an entry in conntrack, for up to two minutes, in memory
	// that is nobody's to pay. Who is over the limit tries again (SYN) a second later.
	nat([]expr.Any{
		&expr.Limit{Type: expr.LimitTypePkts, Rate: newPerSecond, Unit: expr.LimitTimeSecond, Burst: newBurst, Over: true},
		&expr.Verdict{Kind: expr.VerdictDrop},
	})
	refuse(established, accept)
	for _, f := range families {
		is := meta(expr.MetaKeyNFPROTO, f.proto)
		own := f.own.AsSlice()
		tcp, udp := meta(expr.MetaKeyL4PROTO, unix.IPPROTO_TCP), meta(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP)
		dport := func(port uint16) []expr.Any {
			return payload(expr.PayloadBaseTransportHeader, 2, binaryutil.BigEndian.PutUint16(port))
		}
		loopback := payload(expr.PayloadBaseNetworkHeader, f.daddr, f.loopback)

		track(is, payload(expr.PayloadBaseNetworkHeader, f.saddr, f.loopback), loopback, []expr.Any{&expr.Notrack{}})

		nat(is, loopback, accept)
		nat(is, udp, dport(dnsPort), f.dnat(udpPort))
		nat(is, tcp, dport(dnsPort), f.dnat(tcpPort))
		nat(is, tcp, dport(proxyPort), f.dnat(tcpPort))
		nat(is, payload(expr.PayloadBaseNetworkHeader, f.daddr, own), accept)
		nat(is, tcp, f.dnat(tcpPort))

		refuse(is, loopback, accept)
		refuse(is, payload(expr.PayloadBaseNetworkHeader, f.daddr, own), accept)
	}
	refuse([]expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}})
}

type family struct {
	proto        byte
	own          netip.Addr
	saddr, daddr uint32 // offsets in the IP header
	loopback     []byte // how a loopback address starts
}

var (
	ipv4 = family{unix.NFPROTO_IPV4, own4, 12, 16, []byte{127}}
	ipv6 = family{unix.NFPROTO_IPV6, own6, 8, 24, netip.IPv6Loopback().AsSlice()}

	accept      = []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	established = []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4),
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
)

func (f family) dnat(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: f.own.AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.proto), RegAddrMin: 1, RegProtoMin: 2, Specified: true},
	}
}

func meta(key expr.MetaKey, value byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}}}
}

func payload(base expr.PayloadBase, offset uint32, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(value))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value},
	}
}
