package routed

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/require"
	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
)

func links(t *testing.T, n *netns.NS) (names []string) {
	t.Helper()
	require.NoError(t, n.Do(func() error {
		ls, err := rtnl.LinkList()
		require.NoError(t, err)
		for _, l := range ls {
			names = append(names, l.Attrs().Name)
		}
		return nil
	}))
	return names
}

func TestFiftyAtOnceHaveAddressesOfTheirOwnAndLeaveNothing(t *testing.T) {
	w := newWorld(t)
	var (
		mu   sync.Mutex
		wg   sync.WaitGroup
		seen = map[string]int{}
		open []*netns.NS
	)
	for slot := range 50 {
		n := newNS(t)
		open = append(open, n)
		wg.Go(func() {
			r, err := w.tryOpen(n, Config{Slot: slot, ID: fmt.Sprintf("box-%d", slot), Allow: []string{hostV4}})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			for _, a := range r.Addresses {
				seen[a]++
			}
		})
	}
	wg.Wait()
	require.Len(t, seen, 100)
	require.NoError(t, w.host.Do(func() error {
		l, err := rtnl.LinkByName("sbx7")
		require.NoError(t, err)
		require.Equal(t, "box-7", l.Attrs().Alias)
		require.Equal(t, uint32(group), l.Attrs().Group)
		require.Equal(t, 1400, l.Attrs().MTU) // of the default route's link
		return nil
	}))
	for _, n := range open {
		require.NoError(t, n.Close())
	}
	require.Eventually(t, func() bool { return len(links(t, w.host)) == 2 }, 5*time.Second, 10*time.Millisecond, "lo and up0 stay")
	require.NoError(t, w.host.Do(func() error {
		rs, err := rtnl.RouteList(nil, rtnl.FAMILY_ALL)
		require.NoError(t, err)
		for _, r := range rs {
			l, err := rtnl.LinkByIndex(r.LinkIndex)
			require.NoError(t, err)
			require.Contains(t, []string{"up0", "lo"}, l.Attrs().Name)
		}
		return nil
	}))
}

func TestALinkThatIsStillThere(t *testing.T) {
	w := newWorld(t)
	old, _ := w.open(Config{Slot: 3}) // its namespace lives on
	again, _ := w.open(Config{Slot: 3})
	require.Equal(t, []string{"lo"}, links(t, old))
	require.Equal(t, ok, askFor(t, ok, again, "icmp", inetV4, ""))
	require.NoError(t, w.host.Do(func() error {
		return rtnl.LinkAdd(&rtnl.Veth{LinkAttrs: rtnl.LinkAttrs{Name: "sbx4"}, PeerName: "mine"})
	}))
	_, err := w.tryOpen(newNS(t), Config{Slot: 4})
	require.EqualError(t, err, `create link "sbx4": another link has this name`)
	require.Contains(t, links(t, w.host), "sbx4")
}

func TestRatesAreTokenBuckets(t *testing.T) {
	w := newWorld(t)
	box, _ := w.open(Config{Slot: 0, RateUpBPS: 8_000_000, RateDownBPS: 80_000_000_000})
	rate := func(n *netns.NS, link string) (v uint64) {
		require.NoError(t, n.Do(func() error {
			l, err := rtnl.LinkByName(link)
			require.NoError(t, err)
			qs, err := rtnl.QdiscList(l)
			require.NoError(t, err)
			for _, q := range qs {
				if tbf, isTBF := q.(*rtnl.Tbf); isTBF {
					v = tbf.Rate
				}
			}
			return nil
		}))
		return v
	}
	require.EqualValues(t, 1_000_000, rate(box, inner))
	require.NotZero(t, rate(w.host, "sbx0"))
	require.Equal(t, ok, askFor(t, ok, box, "icmp", inetV4, ""))
	plain, _ := w.open(Config{Slot: 1})
	require.Zero(t, rate(plain, inner)+rate(w.host, "sbx1"))
}

func TestSmallMTUHasNoIPv6(t *testing.T) {
	w := newWorld(t)
	box, r := w.open(Config{Slot: 0, MTU: 1000})
	require.Equal(t, []string{"198.19.80.2/32"}, r.Addresses)
	require.Equal(t, []string{"no IPv6 in the sandbox: it needs an MTU of 1280"}, r.Notes)
	require.Equal(t, ok, askFor(t, ok, box, "icmp", inetV4, ""))
}

func TestHostWithoutIPv6(t *testing.T) {
	w := newWorld(t)
	setSysctl(t, w.host, "ipv6/conf/all/disable_ipv6", "1")
	box, r := w.open(Config{Slot: 0})
	require.Equal(t, []string{"198.19.80.2/32"}, r.Addresses)
	require.Equal(t, []string{"no IPv6 in the sandbox: it is disabled on the host"}, r.Notes)
	require.Equal(t, ok, askFor(t, ok, box, "icmp", inetV4, ""))
	require.NoError(t, box.Do(func() error {
		l, err := rtnl.LinkByName(inner)
		require.NoError(t, err)
		as, err := rtnl.AddrList(l, rtnl.FAMILY_V6)
		require.Empty(t, as)
		return err
	}))
}

// Administrators read the table with nft, where it is installed.
func TestNftReadsTheRules(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skipf("needs nft: %v", err)
	}
	w := newWorld(t)
	w.open(Config{Slot: 0, Allow: []string{hostV4 + ":80-90"}, Deny: []string{inetV6}})
	require.NoError(t, w.host.Do(func() error {
		out, err := exec.Command(nft, "list", "table", "inet", tableName).CombinedOutput()
		t.Logf("%s", out)
		require.NoError(t, err)
		require.Contains(t, string(out), hostV4+" . 80-90")
		return nil
	}))
}

// dump is all of nftables but our table, as the kernel says it.
func dump(t *testing.T, n *netns.NS) (out [][]byte) {
	t.Helper()
	require.NoError(t, n.Do(func() error {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		require.NoError(t, err)
		defer c.Close()
		for _, msg := range []int{unix.NFT_MSG_GETTABLE, unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_GETRULE, unix.NFT_MSG_GETSET} {
			rs, err := c.Execute(netlink.Message{
				Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg), Flags: netlink.Request | netlink.Dump},
				Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
			})
			require.NoError(t, err)
			for _, r := range rs {
				d := r.Data[4:] // after the header, whose generation counts
				if len(d) > 11 && string(d[4:4+len(tableName)+1]) != tableName+"\x00" {
					out = append(out, d)
				}
			}
		}
		return nil
	}))
	return out
}

// foreign makes rules as docker does: its own chains, a forward policy, nat.
func foreign(t *testing.T, n *netns.NS, policy nftables.ChainPolicy) {
	t.Helper()
	require.NoError(t, n.Do(func() error {
		c, err := nftables.New()
		require.NoError(t, err)
		for _, fam := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet} {
			tb := c.AddTable(&nftables.Table{Family: fam, Name: "filter"})
			user := c.AddChain(&nftables.Chain{Table: tb, Name: "DOCKER-USER"})
			c.AddRule(&nftables.Rule{Table: tb, Chain: user, Exprs: []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictReturn}}})
			fwd := c.AddChain(&nftables.Chain{
				Table: tb, Name: "FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &policy,
			})
			c.AddRule(&nftables.Rule{Table: tb, Chain: fwd, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: user.Name}}})
		}
		return c.Flush()
	}))
}

func TestForeignRulesStayAsTheyAre(t *testing.T) {
	w := newWorld(t)
	foreign(t, w.host, nftables.ChainPolicyAccept)
	before := dump(t, w.host)
	require.NotEmpty(t, before)
	box, _ := w.open(Config{Slot: 0, Allow: []string{hostV4}, Deny: []string{lanV4}})
	box.Close()
	w.open(Config{Slot: 0})
	require.Equal(t, before, dump(t, w.host))
	require.NoError(t, w.host.Do(Remove))
	require.Equal(t, before, dump(t, w.host))
}

func TestRulesThatAreGoneOrOldAreMadeAgain(t *testing.T) {
	w := newWorld(t)
	serve(t, w.inet, otherV4, "80")
	first, _ := w.open(Config{Slot: 0, Deny: []string{otherV4}})
	require.Equal(t, refused, askFor(t, refused, first, "tcp", otherV4, "80"))
	require.NoError(t, w.host.Do(func() error { // what a later version finds
		c, err := nftables.New()
		require.NoError(t, err)
		return makeRules(c, []netns.Guarded{{Device: "up0"}})
	}))
	require.Equal(t, refused, askFor(t, refused, first, "tcp", otherV4, "80"), "a live sandbox's deny is kept")
	require.NoError(t, w.host.Do(Remove))
	second, _ := w.open(Config{Slot: 1})
	require.Equal(t, refused, askFor(t, refused, second, "icmp", hostV4, ""))
	require.Equal(t, ok, askFor(t, ok, second, "icmp", otherV4, ""))
}

func TestExceptionsOfGoneSandboxesAreRemovedAtLast(t *testing.T) {
	w := newWorld(t)
	count := func() (n int) {
		require.NoError(t, w.host.Do(func() error {
			c, err := nftables.New()
			require.NoError(t, err)
			elems, _, err := elementsOf(c, exceptionSets()[1])
			n = len(elems)
			return err
		}))
		return n
	}
	var allow []string
	for i := range maxLeftover + 1 {
		allow = append(allow, fmt.Sprintf("%s:%d", hostV4, 1000+2*i))
	}
	box, _ := w.open(Config{Slot: 0, Allow: allow})
	require.Equal(t, len(allow), count())
	box.Close()
	require.Eventually(t, func() bool { return len(links(t, w.host)) == 2 }, 5*time.Second, 10*time.Millisecond)
	for range lookEvery { // one of them has the index at which it looks
		w.open(Config{Slot: 1, Allow: []string{metaV4}})
	}
	require.LessOrEqual(t, count(), lookEvery)
}

func TestProbe(t *testing.T) {
	w := newWorld(t)
	probe := func() (ps []Problem) {
		require.NoError(t, w.host.Do(func() error { ps = Probe(); return nil }))
		return ps
	}
	require.Empty(t, probe())
	foreign(t, w.host, nftables.ChainPolicyDrop)
	ps := probe()
	require.Len(t, ps, 2)
	require.Equal(t, `chain "FORWARD" of nftables table "ip filter" drops what it does not know`, ps[0].What)
	require.Contains(t, ps[0].Hint, "DOCKER-USER")
}

func TestNothingStaysInThisNamespace(t *testing.T) {
	w := newWorld(t)
	w.open(Config{Slot: 0})
	ifs, err := net.Interfaces()
	require.NoError(t, err)
	for _, i := range ifs {
		require.NotContains(t, i.Name, netns.LinkPrefix)
	}
	_, err = os.Stat("/proc/sys/net/ipv4/conf/sbx0")
	require.ErrorIs(t, err, os.ErrNotExist)
}
