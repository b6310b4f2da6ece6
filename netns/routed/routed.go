// Package routed owns --network full: a point-to-point veth for each sandbox,
// with addresses, routes and neighbours that follow from its slot, and the one
// ruleset of the host that keeps what comes out of such links to where it may
// go. It must never know sandboxes or what runs in them. What it sets up is the
// kernel's from then on: no process has to serve it, and all but the ruleset goes
// with the sandbox's namespace.
package routed

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

// Config is what is asked for.
type Config struct {
	ID    string // names the link
	Slot  int    // 0 to Slots-1
	State string // directory of notes and locks
	// Allow and Deny are ADDRESS[:PORT[-PORT]] or CIDR[:PORT[-PORT]]. Allow opens
	// what is closed to every sandbox (the host's services, link-local and metadata
	// addresses); a deny wins over all.
	Allow, Deny []string
	// RateUpBPS and RateDownBPS are bits per second, from and to the sandbox; 0 is no limit.
	RateUpBPS, RateDownBPS int64
	MTU                    int      // 0 is that of the host's default route, else 1500
	DNS                    []string // addresses; none is the host's
}

const (
	defaultMTU = 1500
	minMTU     = 576
	maxMTU     = 65535
	minMTU6    = 1280 // IPv6 does not exist on a link with less
	maxAlias   = 255
)

func (c Config) check() error {
	if len(c.ID) == 0 || len(c.ID) > maxAlias {
		return fmt.Errorf("name link: an id of %d bytes", len(c.ID))
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		return hinted.New(fmt.Errorf("set MTU to %d: out of range", c.MTU), fmt.Sprintf("it may be %d to %d", minMTU, maxMTU))
	}
	return errors.Join(checkRate("upload", c.RateUpBPS), checkRate("download", c.RateDownBPS))
}

// Open connects a namespace to the host's, which is that of the calling thread;
// the caller has it locked if that is not the process's. Somebody must hold
// forwarding (netns.HoldForwarding). After an error the caller closes the
// namespace, and with it goes all that was made.
func Open(ns *netns.NS, c Config) (ready *netns.Ready, err error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	a, err := addressesOf(c.Slot)
	if err != nil {
		return nil, err
	}
	exc, err := readExceptions(c.Allow, c.Deny)
	if err != nil {
		return nil, err
	}
	text, servers, err := resolv(c.DNS, resolvConf, resolvedsIs)
	if err != nil {
		return nil, err
	}
	if err := exc.allowServers(servers); err != nil {
		return nil, err
	}
	mtu, v6, notes, err := openHost(ns, c, a, exc)
	if err != nil {
		return nil, err
	}
	if err := ns.Do(func() error { return sandboxEnd(a, v6, c.RateUpBPS, mtu) }); err != nil {
		return nil, fmt.Errorf("set up network of sandbox %s: %w", c.ID, err)
	}
	if err := activate(a.link); err != nil {
		return nil, err
	}
	ready = &netns.Ready{Resolv: text, Notes: notes}
	for _, own := range a.of(v6) {
		ready.Addresses = append(ready.Addresses, netip.PrefixFrom(own, own.BitLen()).String())
	}
	return ready, nil
}

// openHost does the host's side: rules first, then forwarding, then the link
// with its exceptions. The sandbox's end is down all the time.
func openHost(ns *netns.NS, c Config, a addresses, exc exceptions) (mtu int, v6 bool, notes []string, err error) {
	plan, err := netns.PlanForwarding(c.State)
	if err != nil {
		return 0, false, nil, err
	}
	defer plan.Close()
	nft, err := dial(true)
	if err != nil {
		return 0, false, nil, err
	}
	defer nft.CloseLasting() //nolint:errcheck // nothing is pending
	if err := ensureRules(nft, plan.Guarded); err != nil {
		return 0, false, nil, err
	}
	if err := plan.Apply(); err != nil {
		return 0, false, nil, err
	}
	mtu, v6, notes = c.MTU, plan.IPv6, plan.Notes
	if mtu == 0 {
		if mtu, err = linkMTU(plan.Uplink); err != nil {
			mtu = defaultMTU // no default route
		}
	}
	if v6 && mtu < minMTU6 {
		v6, notes = false, append(notes, fmt.Sprintf("no IPv6 in the sandbox: it needs an MTU of %d", minMTU6))
	}
	index, err := createLink(a, int(ns.File().Fd()), mtu)
	if err != nil {
		return 0, false, nil, err
	}
	if len(exc.allow)+len(exc.deny) > 0 {
		if err := exc.add(nft, index); err != nil {
			return 0, false, nil, err
		}
	}
	if err := hostEnd(a, index, c.ID, v6, c.RateDownBPS, mtu); err != nil {
		return 0, false, nil, fmt.Errorf("set up link %q: %w", a.link, err)
	}
	return mtu, v6, notes, nil
}
