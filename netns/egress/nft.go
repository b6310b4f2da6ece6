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
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetReadBuffer(1 << 20) // each rule is echoed; see ENOBUFS
	}))
	if err != nil {
		return fmt.Errorf("open nf_tables: %w", err)
	}
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
	if err := c.Flush(); err != nil {
		err = fmt.Errorf("set nftables rules: %w", err)
		for _, missing := range []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EINVAL} {
			if errors.Is(err, missing) {
				return hinted.New(err, "network egress needs nf_tables with NAT in the kernel: modprobe nf_tables nft_chain_nat nft_ct nft_nat nft_reject_inet")
			}
		}
		return err
	}
	return nil
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
