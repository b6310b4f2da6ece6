package routed

import (
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/sbxrun/sbxrun/netns"
)

// BenchmarkOpen says what Open adds to making the namespace.
func BenchmarkOpen(b *testing.B) {
	for name, c := range map[string]Config{
		"plain":      {},
		"exceptions": {Allow: []string{hostV4 + ":80"}, Deny: []string{"10.0.0.0/8"}},
		"rates":      {RateUpBPS: 100e6, RateDownBPS: 100e6},
	} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b)
			w.open(Config{Slot: 4000}) // the ruleset
			var took []time.Duration
			c.ID, c.State, c.DNS = "box", w.state, []string{inetV4}
			for b.Loop() {
				c.Slot = (c.Slot + 1) % 4000
				n, err := netns.New()
				require.NoError(b, err)
				require.NoError(b, w.host.Do(func() error {
					begun := time.Now()
					_, err := Open(n, c)
					took = append(took, time.Since(begun))
					return err
				}))
				n.Close()
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs-median")
			b.ReportMetric(float64(took[0].Microseconds()), "µs-min")
		})
	}
}

// BenchmarkThroughput compares with one bare veth hop.
func BenchmarkThroughput(b *testing.B) {
	w := newWorld(b)
	box, _ := w.open(Config{Slot: 0, MTU: 1400})
	bare := newNS(b)
	require.NoError(b, w.inet.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "bare", MTU: 1400}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(bare.File().Fd())),
		})
		require.NoError(b, err)
		addrs(b, "bare", "10.99.0.1/24")
		return nil
	}))
	require.NoError(b, bare.Do(func() error { addrs(b, "eth0", "10.99.0.2/24"); return nil }))
	// The same two hops without a rule.
	w2 := newWorld(b)
	through := newNS(b)
	require.NoError(b, w2.host.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "fwd", MTU: 1400}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(through.File().Fd())),
		})
		require.NoError(b, err)
		addrs(b, "fwd", "10.98.0.1/24")
		return nil
	}))
	setSysctl(b, w2.host, "ipv4/ip_forward", "1")
	require.NoError(b, through.Do(func() error { addrs(b, "eth0", "10.98.0.2/24"); route(b, "eth0", "0.0.0.0/0", "10.98.0.1"); return nil }))
	require.NoError(b, w2.inet.Do(func() error { route(b, "in0", "10.98.0.0/24", hostV4); return nil }))
	service, _ := w.open(Config{Slot: 1, MTU: 1400, Allow: []string{hostV4}})
	var l net.Listener
	for _, n := range []*netns.NS{w.inet, w2.inet, w.host} {
		require.NoError(b, n.Do(func() (err error) { l, err = net.Listen("tcp", ":5001"); return err }))
		defer l.Close()
		go func(l net.Listener) {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
					c.Close()
				}()
			}
		}(l)
	}
	best := map[string]float64{}
	for range 4 {
		for name, from := range map[string]struct {
			n  *netns.NS
			to string
		}{"bare": {bare, "10.99.0.1"}, "routed": {box, inetV4}, "two-bare": {through, inetV4}, "service": {service, hostV4}} {
			var c net.Conn
			require.NoError(b, from.n.Do(func() (err error) { c, err = net.Dial("tcp", from.to+":5001"); return err }))
			buf, begun, sent := make([]byte, 256<<10), time.Now(), 0
			for time.Since(begun) < time.Second {
				k, err := c.Write(buf)
				require.NoError(b, err)
				sent += k
			}
			best[name] = max(best[name], float64(sent)*8/time.Since(begun).Seconds()/1e9)
			c.Close()
		}
	}
	for b.Loop() { // which drops what was reported before
	}
	for name, v := range best {
		b.ReportMetric(v, "Gbit/s-"+name)
	}
	b.ReportMetric(best["routed"]/best["bare"], "ratio")
}
