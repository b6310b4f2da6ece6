package netns

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// aHost is a namespace with an uplink up0 for both families and a LAN on lan0.
func aHost(t *testing.T) *NS {
	t.Helper()
	host, out := newNS(t), newNS(t)
	require.NoError(t, host.Do(func() error {
		for name, list := range map[string][]string{"up0": {"192.0.2.2/24", "2001:db8::2/64"}, "lan0": {"192.168.1.2/24"}, "idle0": nil} {
			require.NoError(t, netlink.LinkAdd(&netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name, PeerNamespace: netlink.NsFd(int(out.File().Fd())),
			}))
			l, err := netlink.LinkByName(name)
			require.NoError(t, err)
			require.NoError(t, netlink.LinkSetUp(l))
			for _, s := range list {
				a, err := netlink.ParseAddr(s)
				require.NoError(t, err)
				a.Flags = unix.IFA_F_NODAD
				require.NoError(t, netlink.AddrAdd(l, a))
			}
			if name == "up0" {
				require.NoError(t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP("192.0.2.1")}))
			}
		}
		return nil
	}))
	return host
}

func setting(t *testing.T, n *NS, path string) (v string) {
	t.Helper()
	require.NoError(t, n.Do(func() error { v, _ = readSysctl(path); return nil }))
	return v
}

func set(t *testing.T, n *NS, path, v string) {
	t.Helper()
	require.NoError(t, n.Do(func() error { return WriteSysctl(path, v) }))
}

func plan(t *testing.T, n *NS, state string) (p *ForwardingPlan) {
	t.Helper()
	require.NoError(t, n.Do(func() (err error) {
		if p, err = PlanForwarding(state); err != nil {
			return err
		}
		if err := p.Apply(); err != nil {
			return err
		}
		return p.Close()
	}))
	return p
}

func hold(t *testing.T, state string) *Forwarding {
	t.Helper()
	f, err := HoldForwarding(state)
	require.NoError(t, err)
	return f
}

func release(t *testing.T, n *NS, f *Forwarding) {
	t.Helper()
	require.NoError(t, n.Do(f.Release))
}

func heal(t *testing.T, n *NS, state string) (done []string) {
	t.Helper()
	require.NoError(t, n.Do(func() (err error) { done, err = HealForwarding(state); return err }))
	return done
}

const upForwards, lanForwards, all4 = "ipv4/conf/up0/forwarding", "ipv4/conf/lan0/forwarding", "ipv4/conf/all/forwarding"

func guarded(devices ...string) (g []Guarded) {
	for _, d := range devices {
		g = append(g, Guarded{Device: d})
	}
	return g
}

func on4(p *ForwardingPlan) (g []Guarded) {
	for _, x := range p.Guarded {
		if !x.IPv6 {
			g = append(g, x)
		}
	}
	return g
}

func TestForwardingIsOnWhileSomebodyHoldsIt(t *testing.T) {
	host, state := aHost(t), t.TempDir()
	a, b := hold(t, state), hold(t, state)
	p := plan(t, host, state)
	require.Equal(t, "up0", p.Uplink)
	require.True(t, p.IPv6)
	require.ElementsMatch(t, guarded("up0", "lan0"), on4(p))
	var byInterface bool // else by the global switch, before Linux 6.17
	require.NoError(t, host.Do(func() error { byInterface = HasSysctl("ipv6/conf/up0/force_forwarding"); return nil }))
	check := func(up, lan string) {
		t.Helper()
		all6 := up
		if byInterface {
			all6 = "0"
		}
		require.Equal(t, []string{up, lan, "0", "0", all6}, []string{
			setting(t, host, upForwards), setting(t, host, lanForwards), setting(t, host, all4),
			setting(t, host, "ipv4/conf/idle0/forwarding"), setting(t, host, "ipv6/conf/all/forwarding"),
		})
	}
	check("1", "1")
	require.Empty(t, heal(t, host, state), "somebody lives")
	release(t, host, a)
	check("1", "1")
	release(t, host, b)
	check("0", "0")
	require.NoFileExists(t, recordPath(state))
	require.Empty(t, heal(t, host, state))
}

func TestWhatAKilledRunLeftIsPutBack(t *testing.T) {
	host, state := aHost(t), t.TempDir()
	killed := hold(t, state)
	plan(t, host, state)
	require.NoError(t, killed.live.Close()) // what the kernel does
	next := hold(t, state)                  // takes it over
	require.ElementsMatch(t, guarded("up0", "lan0"), on4(plan(t, host, state)))
	require.NoError(t, next.live.Close())
	done := heal(t, host, state)
	require.Contains(t, done, "net/ipv4/conf/up0/forwarding put back to 0")
	require.Equal(t, "0", setting(t, host, upForwards))
	require.Empty(t, heal(t, host, state))
}

// Nobody heals between the record and the change.
func TestAPlanIsFinishedAlthoughItsHolderWasKilled(t *testing.T) {
	host, state := aHost(t), t.TempDir()
	a := hold(t, state)
	var p *ForwardingPlan
	require.NoError(t, host.Do(func() (err error) { p, err = PlanForwarding(state); return err }))
	require.NoError(t, p.rec.write(state))
	require.NoError(t, a.live.Close())
	require.Empty(t, heal(t, host, state))
	require.FileExists(t, recordPath(state))
	require.NoError(t, host.Do(p.Apply))
	require.NoError(t, p.Close())
	require.Equal(t, "1", setting(t, host, upForwards))
	require.NotEmpty(t, heal(t, host, state))
	require.Equal(t, "0", setting(t, host, upForwards))
}

func TestForwardingOfOthersStays(t *testing.T) {
	t.Run("on before", func(t *testing.T) {
		host, state := aHost(t), t.TempDir()
		set(t, host, all4, "1")
		set(t, host, "ipv6/conf/all/forwarding", "1")
		f := hold(t, state)
		require.Empty(t, plan(t, host, state).Guarded)
		require.NoFileExists(t, recordPath(state))
		release(t, host, f)
		require.Equal(t, "1", setting(t, host, upForwards))
	})
	t.Run("on meanwhile", func(t *testing.T) { // docker starts
		host, state := aHost(t), t.TempDir()
		f := hold(t, state)
		plan(t, host, state)
		set(t, host, all4, "1")
		require.Empty(t, on4(plan(t, host, state)), "the host is a router now")
		release(t, host, f)
		require.Equal(t, "1", setting(t, host, upForwards))
	})
	t.Run("one interface, by an administrator", func(t *testing.T) {
		host, state := aHost(t), t.TempDir()
		set(t, host, lanForwards, "1")
		f := hold(t, state)
		plan(t, host, state)
		release(t, host, f)
		require.Equal(t, []string{"1", "0"}, []string{setting(t, host, lanForwards), setting(t, host, upForwards)})
	})
}

// Before Linux 6.17 there is only one switch for IPv6.
func TestIPv6ByTheGlobalSwitch(t *testing.T) {
	defer func(s string) { forceForwarding = s }(forceForwarding)
	forceForwarding = "absent"
	values := func(host *NS) (v []string) {
		for _, d := range []string{"all", "up0", "lan0", "default"} {
			v = append(v, setting(t, host, "ipv6/conf/"+d+"/forwarding"))
		}
		return v
	}
	t.Run("put back with what it overwrote", func(t *testing.T) {
		host, state := aHost(t), t.TempDir()
		set(t, host, "ipv6/conf/lan0/forwarding", "1")
		f := hold(t, state)
		p := plan(t, host, state)
		require.True(t, p.IPv6)
		var on6 []string
		for _, g := range p.Guarded {
			if g.IPv6 {
				on6 = append(on6, g.Device)
			}
		}
		require.ElementsMatch(t, []string{"up0", "lan0", "idle0"}, on6, "it is on for all of them")
		require.Equal(t, []string{"1", "1", "1", "1"}, values(host))
		require.NotEmpty(t, plan(t, host, state).Guarded, "still ours")
		release(t, host, f)
		require.Equal(t, []string{"0", "0", "1", "0"}, values(host))
	})
	t.Run("not where the route comes by advertisements", func(t *testing.T) {
		host, state := aHost(t), t.TempDir()
		require.NoError(t, host.Do(func() error {
			l, err := netlink.LinkByName("up0")
			require.NoError(t, err)
			return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP("2001:db8::1"), Protocol: unix.RTPROT_RA})
		}))
		f := hold(t, state)
		p := plan(t, host, state)
		require.False(t, p.IPv6)
		require.Len(t, p.Notes, 1)
		require.Contains(t, p.Notes[0], "router advertisements")
		require.Equal(t, []string{"0", "0", "0", "0"}, values(host))
		set(t, host, "ipv6/conf/up0/accept_ra", "2")
		require.True(t, plan(t, host, state).IPv6)
		release(t, host, f)
	})
}

func TestPlanNeedsAHolder(t *testing.T) {
	host, state := aHost(t), t.TempDir()
	require.ErrorContains(t, host.Do(func() error { _, err := PlanForwarding(state); return err }), "nobody holds it")
	require.Equal(t, "0", setting(t, host, upForwards))
}

func TestRecordThatIsNotOurs(t *testing.T) {
	host, state := aHost(t), t.TempDir()
	require.NoError(t, os.MkdirAll(noteDir(state), 0o700))
	for content, want := range map[string]string{"": "unexpected end", "{": "unexpected end"} {
		require.NoError(t, os.WriteFile(recordPath(state), []byte(content), 0o600))
		err := host.Do(func() error { _, err := HealForwarding(state); return err })
		require.ErrorContains(t, err, want)
	}
	// Of before a reboot: nothing has the value that was written.
	require.NoError(t, os.WriteFile(recordPath(state), []byte(`{"ipv4_all":"0","changes":[{"path":"ipv4/conf/up0/forwarding","old":"0","new":"1"},{"path":"ipv4/conf/gone0/forwarding","old":"0","new":"1"}]}`), 0o600))
	require.Empty(t, heal(t, host, state))
	ents, err := os.ReadDir(noteDir(state))
	require.NoError(t, err)
	for _, e := range ents {
		require.True(t, strings.HasPrefix(e.Name(), "forwarding."), filepath.Join(state, e.Name()))
	}
}

func TestOurLinksByName(t *testing.T) {
	for name, want := range map[string]bool{"sbx0": true, "sbx4092": true, "sbx": false, "sbxx": false, "eth0": false, "asbx1": false} {
		require.Equal(t, want, ours(name), name)
	}
}
