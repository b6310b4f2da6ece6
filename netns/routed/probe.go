package routed

import (
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
)

// Problem is something that keeps --network full from working on this host, and
// what to do about it.
type Problem struct{ What, Hint string }

// Probe looks for what full networks need, by trying it in a namespace that goes
// again, and for rules of others that are in the way. It changes nothing.
func Probe() (ps []Problem) {
	add := func(what, hint string) { ps = append(ps, Problem{what, hint}) }
	if err := try(); err != nil {
		add(err.Error(), "--network full needs veth, nf_tables (nat, fib, ct, reject) and CAP_NET_ADMIN; --network egress needs none of them")
	}
	const forward = "/proc/sys/net/ipv4/conf/all/forwarding"
	if err := unix.Access(forward, unix.W_OK); err != nil {
		if b, _ := os.ReadFile(forward); strings.TrimSpace(string(b)) != "1" {
			add("IP forwarding is off and cannot be switched on: "+err.Error(), "set net.ipv4.ip_forward=1 on the host")
		}
	}
	c, err := dial(false)
	if err != nil {
		return ps // said by try
	}
	chains, err := c.ListChains()
	if err != nil {
		add("list nftables chains: "+err.Error(), "")
	}
	names := map[string]bool{}
	for _, ch := range chains {
		names[familyNames[ch.Table.Family]+" "+ch.Table.Name+" "+ch.Name] = true
	}
	for _, ch := range chains {
		fam := familyNames[ch.Table.Family]
		if fam == "" || ch.Table.Name == tableName || ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward || ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop {
			continue
		}
		what := fmt.Sprintf("chain %q of nftables table %q drops what it does not know", ch.Name, fam+" "+ch.Table.Name)
		tool, into := "iptables", ch.Name
		if fam == "ip6" {
			tool = "ip6tables"
		}
		if names[fam+" "+ch.Table.Name+" DOCKER-USER"] {
			into = "DOCKER-USER" // docker leaves this one alone
		}
		hint := fmt.Sprintf("%s -I %s -i %s+ -j ACCEPT; %s -I %s -o %s+ -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
			tool, into, netns.LinkPrefix, tool, into, netns.LinkPrefix)
		if fam == "inet" && into == ch.Name {
			hint = fmt.Sprintf(`nft insert rule inet %s %s iifname "%s*" accept; nft insert rule inet %s %s oifname "%s*" ct state established,related accept`,
				ch.Table.Name, ch.Name, netns.LinkPrefix, ch.Table.Name, ch.Name, netns.LinkPrefix)
		}
		add(what, hint)
	}
	if names["inet firewalld filter_FORWARD"] {
		add("firewalld refuses to forward between zones", "firewall-cmd --zone=trusted --add-interface="+netns.LinkPrefix+"+ (with --permanent to keep it)")
	}
	if b, err := os.ReadFile("/proc/net/ip_tables_names"); err == nil && strings.Contains(string(b), "filter") {
		add("legacy iptables rules are loaded, which cannot be read from here",
			"if its FORWARD policy is DROP: iptables-legacy -I FORWARD -i "+netns.LinkPrefix+"+ -j ACCEPT, and -o "+netns.LinkPrefix+"+ for what is ESTABLISHED,RELATED")
	}
	return ps
}

var familyNames = map[nftables.TableFamily]string{
	nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
}

// try makes a link and the ruleset where nobody sees them.
func try() error {
	host, err := netns.New()
	if err != nil {
		return err
	}
	defer host.Close()
	box, err := netns.New()
	if err != nil {
		return err
	}
	defer box.Close()
	return host.Do(func() error {
		a, err := addressesOf(0)
		if err != nil {
			return err
		}
		if _, err := createLink(a, int(box.File().Fd()), defaultMTU); err != nil {
			return err
		}
		c, err := dial(false)
		if err != nil {
			return err
		}
		return makeRules(c, nil)
	})
}
