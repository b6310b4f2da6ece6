package egress

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPolicy(t *testing.T) {
	p := policy(t, []string{
		"one.test", "Two.Test.:443", "*.sub.test:8000-8100", "203.0.113.7", "198.51.100.0/24:443", "10.1.0.0/16", "2001:db8::/32:443",
		"[2001:db8:1::1]:22", "2001:db8:2::2", "[2001:db8:3::]", "localhost:9", "127.0.0.1:5432", "0.0.0.0/0:123", "169.254.169.254:80", "::ffff:192.0.2.1",
		"bad.sub.test",
	}, []string{"bad.sub.test", "one.test:25", "198.51.100.64/26", "10.1.2.3:22"}, nil)
	for _, c := range []struct{ host, port, rule string }{
		{"one.test", "1", "+--allow one.test"},
		{"ONE.test.", "65535", "+--allow one.test"},
		{"one.test", "25", "--deny one.test:25"},
		{"two.test", "443", "+--allow Two.Test.:443"},
		{"two.test", "80", "default deny"},
		{"a.sub.test", "8000", "+--allow *.sub.test:8000-8100"},
		{"b.a.sub.test", "8100", "+--allow *.sub.test:8000-8100"},
		{"a.sub.test", "8101", "default deny"},
		{"sub.test", "8000", "default deny"},
		{"xsub.test", "8000", "default deny"},
		{"bad.sub.test", "8000", "--deny bad.sub.test"},
		{"x.one.test", "443", "default deny"},
		{"203.0.113.7", "1", "+--allow 203.0.113.7"},
		{"::ffff:203.0.113.7", "1", "+--allow 203.0.113.7"},
		{"203.0.113.8", "1", "default deny"},
		{"198.51.100.1", "443", "+--allow 198.51.100.0/24:443"},
		{"198.51.100.1", "444", "default deny"},
		{"198.51.100.65", "443", "--deny 198.51.100.64/26"},
		{"64:ff9b::198.51.100.65", "443", "--deny 198.51.100.64/26"},
		{"10.1.2.3", "80", "+--allow 10.1.0.0/16"},
		{"10.1.2.3", "22", "--deny 10.1.2.3:22"},
		{"10.2.0.1", "80", "default deny"},
		{"2001:db8::5", "443", "+--allow 2001:db8::/32:443"},
		{"2001:db8:1::1", "22", "+--allow [2001:db8:1::1]:22"},
		{"2001:db8:2::2", "7", "+--allow 2001:db8:2::2"},
		{"2001:db8:3::", "7", "+--allow [2001:db8:3::]"},
		{"localhost", "9", "+--allow localhost:9"},
		{"127.0.0.1", "9", "default deny"},
		{"127.0.0.1", "5432", "+--allow 127.0.0.1:5432"},
		{"8.8.8.8", "123", "+--allow 0.0.0.0/0:123"},
		{"10.2.0.1", "123", "private address 10.2.0.1"},
		{"127.0.0.2", "123", "loopback address 127.0.0.2"},
		{"169.254.169.254", "123", "link-local address 169.254.169.254"},
		{"169.254.169.254", "80", "+--allow 169.254.169.254:80"},
		{"192.0.2.1", "80", "+--allow ::ffff:192.0.2.1"},
	} {
		to, err := parseTarget(c.host, c.port)
		require.NoError(t, err)
		rule, ok := p.forName(to.name, to.port)
		if to.name == "" {
			rule, ok = p.forAddress(to.addr, to.port)
		}
		want, allowed := strings.CutPrefix(c.rule, "+")
		require.Equal(t, want, rule, "%s:%s", c.host, c.port)
		require.Equal(t, allowed, ok, "%s:%s", c.host, c.port)
	}
	// Whether a name may be looked up.
	for name, want := range map[string]bool{"one.test": true, "two.test": true, "x.sub.test": true, "bad.sub.test": false, "sub.test": false, "three.test": false} {
		_, ok := p.forName(name, 0)
		require.Equal(t, want, ok, name)
	}
}

func TestWhereNamesLead(t *testing.T) {
	p := policy(t, []string{"10.1.0.0/16:443", "0.0.0.0/0"}, []string{"203.0.113.0/24", "10.0.0.0/8:25"}, []string{"192.168.1.0/24", "fd00::1"})
	for to, want := range map[string]string{
		"198.51.100.1": "", "10.1.2.3": "", "192.168.1.7": "", "fd00::1": "", "2001:db8::1": "",
		"10.2.3.4":             "private address 10.2.3.4 of n.test",
		"192.168.2.7":          "private address 192.168.2.7 of n.test",
		"127.0.0.1":            "loopback address 127.0.0.1 of n.test",
		"::1":                  "loopback address ::1 of n.test",
		"fe80::1":              "link-local address fe80::1 of n.test",
		"198.18.1.0":           "reserved address 198.18.1.0 of n.test",
		"2001:2::1:0":          "reserved address 2001:2::1:0 of n.test",
		"64:ff9b::10.0.0.1":    "private address 64:ff9b::a00:1 of n.test",
		"2002:0a00:0001::1":    "reserved address 2002:a00:1::1 of n.test",
		"203.0.113.9":          "--deny 203.0.113.0/24",
		"64:ff9b::203.0.113.9": "--deny 203.0.113.0/24",
	} {
		why, ok := p.leadsTo("n.test", netip.MustParseAddr(to), 443)
		require.Equal(t, want, why, to)
		require.Equal(t, want == "", ok, to)
	}
	_, ok := p.leadsTo("n.test", netip.MustParseAddr("10.1.2.3"), 80)
	require.False(t, ok, "the entry is for another port")
	_, ok = p.leadsTo("localhost", netip.MustParseAddr("127.0.0.1"), 80)
	require.True(t, ok)
}

func TestBadEntries(t *testing.T) {
	for entry, want := range map[string]string{
		"":                                "a name has 1 to 253 bytes",
		"*":                               `'*' is not part of a name`,
		"*.":                              "a name has 1 to 253 bytes",
		"a.*.test":                        `'*' is not part of a name`,
		"one.test:":                       `"" is not a port or a range of ports`,
		"one.test:0":                      `"0" is not a port or a range of ports`,
		"one.test:65536":                  `"65536" is not a port or a range of ports`,
		"one.test:https":                  `"https" is not a port or a range of ports`,
		"one.test:+1":                     `"+1" is not a port or a range of ports`,
		"one.test:9-8":                    `"9-8" is not a port or a range of ports`,
		"one.test:1-":                     `"1-" is not a port or a range of ports`,
		"http://one.test":                 `"http://one.test" is not an address or CIDR`,
		"one.test/x":                      `"one.test/x" is not an address or CIDR`,
		"10.0.0.0/33":                     `"10.0.0.0/33" is not an address or CIDR`,
		"*.10.0.0.0":                      "neither an address nor a name",
		"10.0.0":                          "neither an address nor a name",
		"0x7f000001":                      "neither an address nor a name",
		"[one.test]:1":                    "brackets are for IPv6 addresses",
		"[2001:db8::1":                    "brackets are for IPv6 addresses",
		"[2001:db8::1]1":                  `"1" follows the address`,
		"fe80::1%eth0":                    `"fe80::1%eth0" is not an address or CIDR`,
		"::ffff:0.0.0.0/90":               `"::ffff:0.0.0.0/90" is not an address or CIDR`,
		"bücher.test":                     "a name beyond ASCII is written as xn--…",
		"one..test":                       "the labels of a name have 1 to 63 bytes",
		strings.Repeat("x", 64) + ".test": "the labels of a name have 1 to 63 bytes",
		strings.Repeat("x.", 127) + "x":   "a name has 1 to 253 bytes",
		"one test":                        `' ' is not part of a name`,
	} {
		_, err := ParsePolicy(nil, []string{"fine.test", entry}, nil)
		require.ErrorContains(t, err, want, entry)
		require.ErrorContains(t, err, "read --deny ", entry)
	}
	_, err := ParsePolicy(nil, nil, []string{"one.test"})
	require.EqualError(t, err, `read prefix "one.test": not an address or CIDR`)
}

// What is read is the one spelling that targets are compared with, and a rule is
// for what it says.
func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"one.test", "*.one.test:1-2", "10.0.0.0/8:443", "[2001:db8::1]:22", "2001:db8::/32:443", "::1", "::ffff:1.2.3.4/100", "A.:80", "xn--bcher-kva.test"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseRule(s)
		if err != nil {
			return
		}
		if r.lo == 0 || r.lo > r.hi || (r.name == "") == !r.prefix.IsValid() {
			t.Fatalf("%q is %+v", s, r)
		}
		if r.name == "" {
			if r.prefix != r.prefix.Masked() || r.prefix.Addr().Is4In6() || !r.contains(r.prefix.Addr()) {
				t.Fatalf("%q is %+v", s, r)
			}
			return
		}
		to, err := parseTarget(r.name, "1")
		if err != nil || to.name != r.name || r.isFor(r.name) == r.below || r.isFor("a."+r.name) != r.below || r.isFor("a"+r.name) {
			t.Fatalf("%q is %+v", s, r)
		}
	})
}
