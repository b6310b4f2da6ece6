package routed

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func hint(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

func (a area) String() string { return fmt.Sprintf("%s-%s %d-%d", a.lo, a.hi, a.portLo, a.portHi) }

func TestParseEntry(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1":              "192.0.2.1-192.0.2.1 0-65535",
		"192.0.2.1:443":          "192.0.2.1-192.0.2.1 443-443",
		"192.0.2.77/24:80-90":    "192.0.2.0-192.0.2.255 80-90",
		"0.0.0.0/0":              "0.0.0.0-255.255.255.255 0-65535",
		"2001:db8::1":            "2001:db8::1-2001:db8::1 0-65535",
		"2001:db8::/127":         "2001:db8::-2001:db8::1 0-65535",
		"[2001:db8::1]":          "2001:db8::1-2001:db8::1 0-65535",
		"[2001:db8::/32]:1-9":    "2001:db8::-2001:db8:ffff:ffff:ffff:ffff:ffff:ffff 1-9",
		"::ffff:192.0.2.1":       "192.0.2.1-192.0.2.1 0-65535",
		"[::ffff:192.0.2.1]:443": "192.0.2.1-192.0.2.1 443-443",
	} {
		a, err := parseEntry("--allow", in)
		require.NoError(t, err, in)
		require.Equal(t, want, a.String(), in)
	}
	const (
		name = "names need --network egress; --network full takes addresses and CIDRs"
		addr = "for example 192.0.2.0/24:443 or [2001:db8::1]:443"
		port = "for example 192.0.2.1:443"
	)
	for in, want := range map[string]string{
		"example.org": name, "example.org:443": name, "*.example.org": name, "localhost": name, "": addr,
		"1.2.3": addr, "1.2.3.4/33": addr, "fe80::1%eth0": addr, "[example.org]:1": name,
		"1.2.3.4:0": port, "1.2.3.4:65536": port, "1.2.3.4:9-8": port, "1.2.3.4:": port, "1.2.3.4:http": port, "1.2.3.4:1-": port,
		"[::1": "for example [2001:db8::1]:443", "[::1]443": "for example [2001:db8::1]:443",
	} {
		_, err := parseEntry("--deny", in)
		require.ErrorContains(t, err, fmt.Sprintf("read --deny %q: ", in))
		require.Equal(t, want, hint(err), in)
	}
}

func FuzzParseEntry(f *testing.F) {
	for _, s := range []string{"192.0.2.1:443", "[2001:db8::/32]:1-9", "example.org", "[]:", "::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseEntry("--allow", s)
		if err == nil && (a.hi.Less(a.lo) || a.portHi < a.portLo || a.lo.BitLen() != a.hi.BitLen()) {
			t.Fatalf("%q: %v", s, a)
		}
	})
}

// Against the definition, on a small square.
func TestDisjointCoversTheSame(t *testing.T) {
	at := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{255, 255, 255, byte(240 + n)}) }
	for range 300 {
		var in []area
		for range 1 + rand.IntN(6) {
			a, b, p, q := rand.IntN(16), rand.IntN(16), rand.IntN(16), rand.IntN(16)
			in = append(in, area{at(min(a, b)), at(max(a, b)), uint16(65520 + min(p, q)), uint16(65520 + max(p, q))})
		}
		out, err := disjoint(in)
		require.NoError(t, err)
		count := func(list []area, x, y int) (n int) {
			for _, a := range list {
				if !at(x).Less(a.lo) && !a.hi.Less(at(x)) && a.portLo <= uint16(65520+y) && uint16(65520+y) <= a.portHi {
					n++
				}
			}
			return n
		}
		for x := range 16 {
			for y := range 16 {
				require.Equal(t, min(count(in, x, y), 1), count(out, x, y), "%v → %v at %d %d", in, out, x, y)
			}
		}
	}
}

func TestExceptionsAreBounded(t *testing.T) {
	var many []string
	for i := range maxPieces + 1 {
		many = append(many, fmt.Sprintf("10.0.%d.%d", i/256, i%256))
	}
	_, err := readExceptions(many[1:], nil)
	require.NoError(t, err)
	_, err = readExceptions(nil, many)
	require.EqualError(t, err, "read --allow and --deny: more than 4096 separate areas")
}

// As many as may be, overlapping, in the kernel's own structure.
func TestManyExceptions(t *testing.T) {
	w := newWorld(t)
	serve(t, w.inet, inetV4, "80")
	serve(t, w.inet, inetV6, "80")
	var deny []string
	for i := range 400 {
		deny = append(deny, fmt.Sprintf("10.%d.0.0/16:%d", i%200, 1+i), fmt.Sprintf("10.%d.%d.0/24", i%200, i%7), fmt.Sprintf("[2001:db8:%x::/48]:443", i+16))
	}
	box, _ := w.open(Config{Slot: 0, Deny: append(deny, inetV4, "["+inetV6+"]:80")})
	require.Equal(t, refused, askFor(t, refused, box, "tcp", inetV4, "80"))
	require.Equal(t, refused, askFor(t, refused, box, "tcp", inetV6, "80"))
	require.Equal(t, ok, askFor(t, ok, box, "icmp", inetV6, ""))
}

func TestAddresses(t *testing.T) {
	for slot, want := range map[int]string{
		0:    "sbx0 198.19.80.2 198.19.80.1 fd73:6278:7275:6e00::2",
		300:  "sbx300 198.19.81.46 198.19.80.1 fd73:6278:7275:6e00::12e",
		4092: "sbx4092 198.19.95.254 198.19.80.1 fd73:6278:7275:6e00::ffe",
	} {
		a, err := addressesOf(slot)
		require.NoError(t, err)
		require.Equal(t, want, fmt.Sprint(a.link, " ", a.v4, " ", a.gw4, " ", a.v6))
	}
	for _, slot := range []int{-1, Slots} {
		_, err := addressesOf(slot)
		require.Error(t, err)
	}
	for pool, want := range map[string]string{
		"10.1.2.3/8":     "",
		"10.9.0.0/29":    `address of slot 5: SBXRUN_NET_POOL="10.9.0.0/29" has room for 5 sandboxes`,
		"10.9.0.0/28":    "",
		"10.9.0.0":       `read SBXRUN_NET_POOL="10.9.0.0": not an IPv4 prefix`,
		"2001:db8::/64":  `read SBXRUN_NET_POOL="2001:db8::/64": not an IPv4 prefix`,
		"192.168.1.0/32": `address of slot 5: SBXRUN_NET_POOL="192.168.1.0/32" has room for 0 sandboxes`,
	} {
		t.Setenv(poolEnv, pool)
		a, err := addressesOf(5)
		if want == "" {
			require.NoError(t, err)
			require.True(t, netip.MustParsePrefix(pool).Contains(a.v4))
			continue
		}
		require.EqualError(t, err, want)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []struct {
		Config
		want string
	}{
		{Config{}, "name link: an id of 0 bytes"},
		{Config{ID: strings.Repeat("x", 256)}, "name link: an id of 256 bytes"},
		{Config{ID: "a", MTU: 100}, "set MTU to 100: out of range"},
		{Config{ID: "a", RateUpBPS: 7999}, "limit the upload rate to 7999 bit/s: out of range"},
		{Config{ID: "a", RateDownBPS: -1}, "limit the download rate to -1 bit/s: out of range"},
	} {
		_, err := Open(nil, c.Config)
		require.EqualError(t, err, c.want)
	}
}

func TestResolv(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		p := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(p, []byte(content), 0o600))
		return p
	}
	stub := file("stub", "# resolved\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch stub.example\n")
	realOne := file("real", "nameserver 192.0.2.53\nnameserver fe80::1%eth0\nnameserver 2001:db8::53\nsearch  a.example b.example\nnameserver 192.0.2.54\nnameserver 192.0.2.55\n")
	for _, c := range []struct {
		dns, files []string
		want, err  string
	}{
		{nil, []string{stub, realOne}, "nameserver 192.0.2.53\nnameserver 2001:db8::53\nnameserver 192.0.2.54\nsearch a.example b.example\n", ""},
		{[]string{"192.0.2.1", "2001:db8::1"}, []string{stub}, "nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ""},
		{nil, []string{stub, dir + "/none"}, "", "find name servers in " + stub + " or " + dir + "/none: none that is not the host's loopback"},
		{[]string{"dns.example"}, nil, "", `name server "dns.example": not an IP address`},
		{nil, []string{file("long", strings.Repeat("#\n", resolvMax)+"nameserver 192.0.2.1\n")}, "", "find name servers in " + dir + "/long: none that is not the host's loopback"},
	} {
		text, servers, err := resolv(c.dns, c.files...)
		if c.err != "" {
			require.EqualError(t, err, c.err)
			require.NotEmpty(t, hint(err))
			continue
		}
		require.NoError(t, err)
		require.Equal(t, c.want, text)
		require.Equal(t, strings.Count(text, "nameserver"), len(servers))
	}
}

// A name server that the built-in rules would refuse is reached, for DNS alone.
func TestNameServersAreReachable(t *testing.T) {
	w := newWorld(t)
	for _, p := range []string{"53", "80"} {
		serve(t, w.host, hostV4, p)
		serve(t, w.inet, metaV4, p)
	}
	box, r := w.open(Config{Slot: 0, DNS: []string{hostV4, metaV4}})
	require.Equal(t, "nameserver "+hostV4+"\nnameserver "+metaV4+"\n", r.Resolv)
	for _, a := range []string{hostV4, metaV4} {
		require.Equal(t, ok, askFor(t, ok, box, "udp", a, "53"))
		require.Equal(t, ok, askFor(t, ok, box, "tcp", a, "53"))
		require.Equal(t, refused, askFor(t, refused, box, "tcp", a, "80"))
	}
}

func TestMetadataServicesAreNeverReached(t *testing.T) {
	for _, a := range []string{"169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254", "64:ff9b::a9fe:a9fe"} {
		require.True(t, neverReached(netip.MustParseAddr(a)), a)
	}
	require.False(t, neverReached(netip.MustParseAddr("168.63.129.17")))
}
