package routed

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestVerdicts(t *testing.T) {
	w := newWorld(t)
	for _, a := range []string{inetV4, inetV6, otherV4, lanV4, metaV4, metaV6} {
		for _, p := range []string{"80", "443"} {
			serve(t, w.inet, a, p)
		}
	}
	for _, p := range []string{"80", "443"} {
		serve(t, w.host, "", p)
	}
	plain, r := w.open(Config{Slot: 0})
	require.Empty(t, r.Notes)
	require.Equal(t, []string{"198.19.80.2/32", "fd73:6278:7275:6e00::2/128"}, r.Addresses)
	peer, _ := w.open(Config{Slot: 1})
	const peerV4, peerV6 = "198.19.80.3", "fd73:6278:7275:6e00::3"
	serve(t, peer, "", "80")
	picky, _ := w.open(Config{
		Slot:  2,
		Allow: []string{hostV4 + ":80", metaV4, "[" + hostV6 + "]:80", otherV4 + ":443", "0.0.0.0/0:9", "224.0.0.0/4"},
		Deny:  []string{otherV4, lanV4 + ":80", "[2001:db8:2::/48]:443"},
	})
	type row struct{ proto, to, port, verdict string }
	rows := func(verdict string, to ...string) (out []row) {
		for _, a := range to {
			for _, p := range []string{"tcp", "udp", "icmp"} {
				out = append(out, row{p, a, "80", verdict})
			}
		}
		return out
	}
	t.Run("default", func(t *testing.T) {
		for _, r := range append(rows(ok, inetV4, inetV6, lanV4, gwV4), rows(refused,
			hostV4, hostV6, metaV4, metaV6, peerV4, peerV6, "169.254.1.1", "192.0.2.255")...) {
			if r.to == gwV4 && r.proto != "icmp" || r.to == "192.0.2.255" && r.proto != "tcp" {
				continue // nothing listens on the gateway; broadcasts are refused without an answer
			}
			require.Equal(t, r.verdict, askFor(t, r.verdict, plain, r.proto, r.to, r.port), "%+v", r)
		}
	})
	t.Run("asked for", func(t *testing.T) {
		for _, r := range append(append(rows(ok, inetV4, inetV6, metaV4), rows(refused, otherV4)...), []row{
			{"tcp", hostV4, "80", ok},
			{"udp", hostV4, "80", ok},
			{"icmp", hostV4, "", refused},
			{"tcp", hostV4, "443", refused},
			{"tcp", hostV6, "80", ok},
			{"tcp", hostV6, "443", refused},
			{"tcp", otherV4, "443", refused}, // a deny wins
			{"tcp", lanV4, "80", refused},
			{"tcp", lanV4, "443", ok},
			{"icmp", lanV4, "", ok},
			{"tcp", inetV6, "443", refused},
			{"tcp", peerV4, "80", refused},
		}...) {
			require.Equal(t, r.verdict, askFor(t, r.verdict, picky, r.proto, r.to, r.port), "%+v", r)
		}
	})
	t.Run("nobody begins anything with a sandbox", func(t *testing.T) {
		for _, p := range []string{"tcp", "udp"} {
			require.Contains(t, ask(t, w.host, p, peerV4, "80"), dropped)
			require.Contains(t, ask(t, w.host, p, peerV6, "80"), dropped)
		}
		require.NoError(t, w.inet.Do(func() error {
			route(t, "in0", "198.19.80.0/20", hostV4)
			route(t, "in0", pool6, hostV6)
			return nil
		}))
		for _, p := range []string{"tcp", "udp", "icmp"} {
			require.Equal(t, dropped, ask(t, w.inet, p, peerV4, "80"))
			require.Equal(t, dropped, ask(t, w.inet, p, peerV6, "80"))
		}
	})
}

// The host's end may send as soon as Open returns.
func TestTheFirstPacketIsAnswered(t *testing.T) {
	w := newWorld(t)
	serve(t, w.inet, inetV4, "80")
	for slot := range 60 {
		box, _ := w.open(Config{Slot: slot})
		require.Equal(t, ok, askFor(t, ok, box, "udp", inetV4, "80"), "of sandbox %d", slot)
		require.NoError(t, box.Close())
	}
}
