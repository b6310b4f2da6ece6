package routed

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

const (
	resolvConf  = "/etc/resolv.conf"
	resolvedsIs = "/run/systemd/resolve/resolv.conf" // the real servers behind 127.0.0.53
	resolvMax   = 64 << 10
)

// resolv is the sandbox's resolv.conf and the servers in it.
func resolv(dns []string, files ...string) (text string, servers []netip.Addr, err error) {
	var keep []string // search and options, of the file that the servers are from
	for _, s := range dns {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return "", nil, hinted.New(fmt.Errorf("name server %q: not an IP address", s), "--dns takes an IP address")
		}
		servers = append(servers, a)
	}
	for _, f := range files {
		if len(servers) > 0 {
			break
		}
		if servers, keep, err = readResolv(f); err != nil {
			return "", nil, err
		}
	}
	if len(servers) == 0 {
		err := fmt.Errorf("find name servers in %s: none that is not the host's loopback", strings.Join(files, " or "))
		return "", nil, hinted.New(err, "name one: --dns ADDRESS")
	}
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	for _, l := range keep {
		b.WriteString(l + "\n")
	}
	return b.String(), servers, nil
}

// readResolv gives the servers that a sandbox could reach: the host's loopback
// is not its own, and a link-local address needs the host's interface.
func readResolv(path string) (servers []netip.Addr, keep []string, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read name servers: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, resolvMax))
	if err != nil {
		return nil, nil, fmt.Errorf("read name servers: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		w := strings.Fields(line)
		if len(w) < 2 {
			continue
		}
		switch w[0] {
		case "nameserver":
			a, err := netip.ParseAddr(w[1])
			if err == nil && !a.IsLoopback() && !a.IsUnspecified() && a.Zone() == "" && len(servers) < 3 { // resolvers read three
				servers = append(servers, a)
			}
		case "search", "domain", "options":
			keep = append(keep, strings.Join(w, " "))
		}
	}
	return servers, keep, nil
}
