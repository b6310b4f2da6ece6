// Package network_test runs sbxrun on a host whose network is made up: a
// namespace that plays the host, and one that plays everything beyond it.
package network_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// The addresses beyond the host. Every server says its own name to whoever
// connects, by any protocol: then it says back what it is told.
var servers = map[string]string{
	"198.51.100.10":   "one",
	"198.51.100.20":   "two",
	"10.77.0.5":       "lan",
	"169.254.169.254": "metadata",
	"2001:db8:9::10":  "six",
}

// What the host itself serves on.
var hostServers = map[string]string{"203.0.113.1": "host", "127.0.0.1": "hostlo", "2001:db8:1::1": "host6"}

const names = `127.0.0.1 localhost
198.51.100.10 one.test a.one.test b.a.one.test
198.51.100.20 two.test
10.77.0.5 lan.test
169.254.169.254 meta.test
2001:db8:9::10 six.test
127.0.0.1 rebind.test
203.0.113.1 host.test
`

// world is a host and what is beyond it.
type world struct {
	host, beyond *netns.NS
}

func newWorld(t *testing.T, s *harness.Sbx) *world {
	t.Helper()
	w := &world{}
	for _, ns := range []**netns.NS{&w.host, &w.beyond} {
		n, err := netns.New()
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, n.Close()) })
		*ns = n
	}
	require.NoError(t, w.beyond.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "world0"
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "uplink0", PeerNamespace: netlink.NsFd(w.host.File().Fd())}
		err := netlink.LinkAdd(veth)
		if err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for a := range servers {
			if err := addAddress(lo, a, 0); err != nil {
				return err
			}
		}
		err = errors.Join(addAddress(veth, "203.0.113.254", 24), addAddress(veth, "2001:db8:1::254", 64), netlink.LinkSetUp(veth))
		return err
	}))
	require.NoError(t, w.host.Do(func() error {
		up, err := netlink.LinkByName("uplink0")
		if err != nil {
			return err
		}
		err = errors.Join(addAddress(up, "203.0.113.1", 24), addAddress(up, "2001:db8:1::1", 64), netlink.LinkSetUp(up))
		for _, gw := range []string{"203.0.113.254", "2001:db8:1::254"} {
			err = errors.Join(err, netlink.RouteAdd(&netlink.Route{LinkIndex: up.Attrs().Index, Gw: net.ParseIP(gw)}))
		}
		return err
	}))
	for a, name := range servers {
		serve(t, w.beyond, a, name)
	}
	for a, name := range hostServers {
		serve(t, w.host, a, name)
	}
	dir := t.TempDir()
	hosts, resolv, nsswitch := filepath.Join(dir, "hosts"), filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "nsswitch.conf")
	require.NoError(t, os.WriteFile(hosts, []byte(names), 0o644))
	require.NoError(t, os.WriteFile(resolv, []byte("nameserver 198.51.100.10\noptions timeout:1 attempts:1\n"), 0o644))
	require.NoError(t, os.WriteFile(nsswitch, []byte("hosts: files dns\n"), 0o644))
	s.Prefix = []string{
		"nsenter", fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), w.host.File().Fd()), "--", "unshare", "--mount", "--propagation", "private",
		"sh", "-c", fmt.Sprintf(`mkdir -p /run/sbxrun && mount -t tmpfs -o mode=700 tmpfs /run/sbxrun && mount --bind %s /etc/hosts && touch /etc/resolv.conf && mount --bind %s /etc/resolv.conf && mount --bind %s /etc/nsswitch.conf && exec "$@"`, hosts, resolv, nsswitch), "sh",
	}
	return w
}

func addAddress(l netlink.Link, ip string, bits int) error {
	a := net.ParseIP(ip)
	if a.To4() != nil {
		a = a.To4()
	}
	if bits == 0 {
		bits = len(a) * 8
	}
	const noDAD = 0x02 // IFA_F_NODAD
	return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a, Mask: net.CIDRMask(bits, len(a)*8)}, Flags: noDAD})
}

// ports are those that every server serves on.
var ports = []string{"80", "443", "5432"}

// serve answers at an address, TCP with its name and then with what it is told,
// UDP with its name.
func serve(t *testing.T, n *netns.NS, ip, name string) {
	t.Helper()
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait) // the last: what ends them comes before
	for _, port := range ports {
		var l net.Listener
		var p net.PacketConn
		require.NoError(t, n.Do(func() (err error) {
			if l, err = net.Listen("tcp", net.JoinHostPort(ip, port)); err == nil {
				p, err = net.ListenPacket("udp", net.JoinHostPort(ip, port))
			}
			return err
		}), ip)
		wg.Add(2)
		go func() {
			defer wg.Done()
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go answer(c, name)
			}
		}()
		go func() {
			defer wg.Done()
			b := make([]byte, 2048)
			for {
				_, from, err := p.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = p.WriteTo([]byte(name), from)
			}
		}()
		t.Cleanup(func() { l.Close(); p.Close() })
	}
}

// answer speaks HTTP to who does, and says back what it is told to others.
func answer(c net.Conn, name string) {
	defer c.Close()
	br := bufio.NewReader(c)
	line, err := br.ReadString('\n')
	if err != nil {
		return
	}
	if !strings.Contains(line, " HTTP/1.") {
		_, _ = io.WriteString(c, name+" "+line)
		_, _ = io.Copy(c, br)
		return
	}
	for {
		l, err := br.ReadString('\n')
		if err != nil || l == "\r\n" {
			break
		}
	}
	fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(name), name)
}
