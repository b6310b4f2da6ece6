package routed

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/sbxrun/sbxrun/netns"
)

// A host that forwards only for sandboxes is no router for its neighbours; one
// that others make a router meanwhile is, from the next sandbox on.
func TestTheHostBecomesNoRouter(t *testing.T) {
	w := newWorld(t)
	behind := newNS(t) // a network behind the host
	require.NoError(t, w.host.Do(func() error {
		require.NoError(t, netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "lan0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(behind.File().Fd())),
		}))
		addrs(t, "lan0", "10.7.0.1/24", "2001:db8:7::1/64")
		return nil
	}))
	require.NoError(t, behind.Do(func() error {
		addrs(t, "eth0", "10.7.0.2/24", "2001:db8:7::2/64")
		route(t, "eth0", "0.0.0.0/0", "10.7.0.1")
		route(t, "eth0", "::/0", "2001:db8:7::1")
		return nil
	}))
	require.NoError(t, w.inet.Do(func() error {
		route(t, "in0", "10.7.0.0/24", hostV4)
		route(t, "in0", "2001:db8:7::/64", hostV6)
		return nil
	}))
	serve(t, behind, "10.7.0.2", "80")
	serve(t, behind, "2001:db8:7::2", "80")
	serve(t, w.inet, inetV4, "80")
	serve(t, w.inet, inetV6, "80")
	box, _ := w.open(Config{Slot: 0})
	for _, to := range []string{inetV4, inetV6, "10.7.0.2", "2001:db8:7::2"} {
		require.Equal(t, ok, askFor(t, ok, box, "tcp", to, "80"), to)
	}
	for _, proto := range []string{"tcp", "udp", "icmp"} {
		for _, to := range []string{"10.7.0.2", "2001:db8:7::2"} {
			require.Equal(t, dropped, ask(t, w.inet, proto, to, "80"), to)
		}
		for _, to := range []string{inetV4, inetV6} {
			require.Equal(t, dropped, ask(t, behind, proto, to, "80"), to)
		}
	}
	setSysctl(t, w.host, "ipv4/ip_forward", "1")
	w.open(Config{Slot: 1})
	require.Equal(t, ok, askFor(t, ok, behind, "tcp", inetV4, "80"))
	require.Equal(t, ok, askFor(t, ok, w.inet, "tcp", "10.7.0.2", "80"))
	require.NoError(t, w.host.Do(w.hold.Release))
	require.Equal(t, "1", sysctl(t, w.host, "ipv4/conf/up0/forwarding"))
}

func TestForwardingGoesWithTheLastSandbox(t *testing.T) {
	w := newWorld(t)
	other := w.held()
	box, _ := w.open(Config{Slot: 0})
	require.Equal(t, ok, askFor(t, ok, box, "icmp", inetV4, ""))
	require.NoError(t, w.host.Do(w.hold.Release))
	require.Equal(t, ok, askFor(t, ok, box, "icmp", inetV4, ""))
	require.NoError(t, w.host.Do(other.Release))
	require.Equal(t, dropped, ask(t, box, "icmp", inetV4, ""))
	require.Equal(t, "0", sysctl(t, w.host, "ipv4/conf/up0/forwarding"))
	_, err := w.tryOpen(newNS(t), Config{Slot: 1})
	require.EqualError(t, err, "plan forwarding: nobody holds it")
	_, err = net.InterfaceByName(netns.LinkPrefix + "1")
	require.Error(t, err)
}
