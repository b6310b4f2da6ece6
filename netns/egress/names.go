package egress

import (
	"encoding/binary"
	"net/netip"
	"sync"
)

// Our own address inside, the ports that programs know there, and the ports of
// the sockets behind them: out of the way of what a job may want to serve on.
const (
	proxyPort = 3128
	dnsPort   = 53
	tcpPort   = 61080
	udpPort   = 61053
)

var (
	own4 = netip.AddrFrom4([4]byte{198, 18, 0, 1})
	own6 = netip.MustParseAddr("2001:2::1")
)

// maxNames bounds what a job can make us remember under a *.HOST that answers to
// every name.
const maxNames = 16384

// names gives each name an address inside: what is connected to then tells the
// name, whatever protocol is spoken. An address is never given to another name.
type names struct {
	mu      sync.Mutex
	numbers map[string]int
	list    []string
}

// number gives the name's; ok is false when there is no room for another name.
func (t *names) number(name string) (n int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n, ok := t.numbers[name]; ok {
		return n, true
	}
	if len(t.list) >= maxNames {
		return 0, false
	}
	n = len(t.list)
	if t.numbers == nil {
		t.numbers = map[string]int{}
	}
	t.numbers[name] = n
	t.list = append(t.list, name)
	return n, true
}

// The numbers start behind our own addresses.
const (
	first4 = 198<<24 | 18<<16 | 1<<8
	first6 = 1 << 16
)

var (
	given4 = netip.MustParsePrefix("198.18.0.0/15")
	given6 = netip.MustParsePrefix("2001:2::/48")
)

func addr4(n int) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(first4+n))
	return netip.AddrFrom4(b)
}

func addr6(n int) netip.Addr {
	b := given6.Addr().As16()
	binary.BigEndian.PutUint32(b[12:], uint32(first6+n))
	return netip.AddrFrom16(b)
}

// of gives the name of an address; "" is none.
func (t *names) of(ip netip.Addr) string {
	var n int
	switch {
	case given4.Contains(ip):
		b := ip.As4()
		n = int(binary.BigEndian.Uint32(b[:])) - first4
	case given6.Contains(ip):
		b := ip.As16()
		if n = int(binary.BigEndian.Uint32(b[12:])) - first6; ip != addr6(n) {
			n = -1
		}
	default:
		return ""
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n < 0 || n >= len(t.list) {
		return ""
	}
	return t.list[n]
}
