package egress

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/need"
)

func newNS(t testing.TB) *netns.NS {
	t.Helper()
	need.Root(t)
	n, err := netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { _ = n.Close() })
	return n
}

func TestOpenSmoke(t *testing.T) {
	n := newNS(t)
	e, err := Open(n, Config{Policy: policy(t, []string{"*.test"}, nil, nil), Upstream: Upstream{Lookup: func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("203.0.113.1")}, nil
	}}})
	require.NoError(t, err)
	defer e.Close()
	_ = net.Dial
}

func BenchmarkOpen(b *testing.B) {
	need.Root(b)
	for b.Loop() {
		b.StopTimer()
		n, err := netns.New()
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		e, err := Open(n, Config{Policy: &Policy{}})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		e.Close()
		n.Close()
		b.StartTimer()
	}
}
