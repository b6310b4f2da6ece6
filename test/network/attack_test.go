package network_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// An attack is Python that leaves in r what it achieved; what it raises is its
// result as well, an OSError by the name of its number.
type attack struct{ name, code, want string }

const attackLibrary = `
import ctypes, errno, json, os, select, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *a):
    if getattr(libc, name)(*a) < 0: raise OSError(ctypes.get_errno(), name)
    return "done"
def netlink(proto, kind, body):
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, proto); s.settimeout(5)
    s.send(struct.pack("=IHHII", 16 + len(body), kind, 0x605, 1, 0) + body)
    e = -struct.unpack("=i", s.recv(4096)[16:20])[0]
    if e: raise OSError(e, "netlink")
    return "done"
def write(path, text):
    with open(path, "w") as f: f.write(text)
    return "done"
def hello(host, port, timeout=3):
    with socket.create_connection((host, port), timeout) as s:
        s.settimeout(timeout)
        s.sendall(b"hello\n")
        return (s.recv(100).split() or [b"closed"])[0].decode()
def ask(raw):
    with socket.create_connection(("198.18.0.1", 3128), 5) as s:
        s.settimeout(8)
        s.sendall(raw); s.shutdown(socket.SHUT_WR)
        b = b""
        while c := s.recv(65536): b += c
    return "%s %d" % (b[9:12].decode(), b.count(b"HTTP/1.1 "))
def query(name, kind=1, server="198.18.0.1"):
    q = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\0" + struct.pack(">HH", kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(5); s.connect((server, 53)); s.send(q); b = s.recv(2000)
    return "rcode %d answers %d" % (b[3] & 15, struct.unpack(">H", b[6:8])[0])
def attack(code):
    v = dict(globals(), r=None)
    try: exec(code, v)
    except TimeoutError: return "timeout"
    except socket.gaierror: return "no name"
    except OSError as e: return errno.errorcode.get(e.errno, str(e))
    except Exception as e: return repr(e)
    return str(v["r"])
`

const attacker = attackLibrary + `
print(json.dumps([attack(c) for c in json.load(sys.stdin)]))
`

// attackAll runs all from one sandbox and compares how each ended.
func attackAll(t *testing.T, s *harness.Sbx, flags []string, attacks []attack) *harness.Outcome {
	t.Helper()
	var codes []string
	for _, a := range attacks {
		codes = append(codes, a.code)
	}
	in, err := json.Marshal(codes)
	require.NoError(t, err)
	o := s.RunInput(strings.NewReader(string(in)), append(append([]string{"-q"}, flags...), "--", "python3", "-c", attacker)...)
	require.Equal(t, 0, o.Code, o)
	var got []string
	require.NoError(t, json.Unmarshal(o.Stdout, &got), o)
	for i, a := range attacks {
		assert.Equal(t, a.want, got[i], "%s with %v", a.name, flags)
	}
	return o
}

// refusedByTheKernel needs a capability that nobody inside has.
var refusedByTheKernel = []attack{
	{"raw IPv4", `r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)`, "EPERM"},
	{"raw ICMP", `r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)`, "EPERM"},
	{"raw ICMPv6, for a router advertisement", `r = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58)`, "EPERM"},
	{"packet socket, for ARP", `r = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))`, "EPERM"},
	{"cooked packet socket", `r = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))`, "EPERM"},
	{"transparent proxy", `r = socket.socket().setsockopt(0, 19, 1)`, "EPERM"},
	{"packet mark", `r = socket.socket().setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)`, "EPERM"},
	{"new address", `r = netlink(0, 20, struct.pack("=BBBBI", 2, 32, 0, 0, 1) + struct.pack("=HH", 8, 2) + socket.inet_aton("10.9.9.9"))`, "EPERM"},
	{"new route", `r = netlink(0, 24, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 4, 253, 1, 0) + struct.pack("=HHI", 8, 4, 1))`, "EPERM"},
	{"new rule", `r = netlink(0, 32, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 0, 0, 1, 0))`, "EPERM"},
	{"new neighbour", `r = netlink(0, 28, struct.pack("=BxxxiHBB", 2, 1, 128, 0, 1) + struct.pack("=HH", 8, 1) + socket.inet_aton("10.9.9.9"))`, "EPERM"},
	{"lo down", `r = netlink(0, 16, struct.pack("=BxHiII", 0, 0, 1, 0, 1))`, "EPERM"},
	{"delete the nftables table", `r = netlink(12, 0xa02, struct.pack(">BBH", 1, 0, 0))`, "EPERM"},
	{"sysctl of addresses", `r = write("/proc/sys/net/ipv4/conf/all/forwarding", "1")`, "EROFS"},
	{"sysctl of ports", `r = write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "1024")`, "EROFS"},
	{"a namespace of its own", `r = call("unshare", 0x40000000)`, "EPERM"},
	{"a user namespace for one", `r = call("unshare", 0x50000000)`, "EPERM"},
	{"pid 1's namespace", `r = os.open("/proc/1/ns/net", os.O_RDONLY)`, "EACCES"},
	{"entering its own", `r = call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0x40000000)`, "EPERM"},
	{"a tunnel", `r = os.open("/dev/net/tun", os.O_RDWR)`, "ENOENT"},
	{"the host's abstract socket", `s = socket.socket(socket.AF_UNIX); r = s.connect("\0sbxrun-test-abstract")`, "ECONNREFUSED"},
}

// A ping socket is no way to other messages.
var notByPing = []attack{{"router advertisement by ping", `
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, 58)
r = s.sendto(struct.pack("BBHI", 134, 0, 0, 0) + bytes(8), ("::1", 0))`, "EINVAL"}}

func TestNothingOfTheNetworkIsTheSandboxesToChange(t *testing.T) {
	t.Parallel()
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		need.Python(t)
		w := newWorld(t, s)
		var abstract net.Listener
		require.NoError(t, w.host.Do(func() (err error) {
			abstract, err = net.Listen("unix", "@sbxrun-test-abstract")
			return err
		}))
		defer abstract.Close()
		attackAll(t, s, nil, refusedByTheKernel)
		attackAll(t, s, []string{"--network", "egress"}, join2(refusedByTheKernel, notByPing))
		attackAll(t, s, []string{"--network", "full"}, join2(refusedByTheKernel, notByPing))
		if len(harness.Degraded()) == 0 { // Landlock keeps it where the namespace does not
			attackAll(t, s, []string{"--network", "host"}, []attack{{"abstract", refusedByTheKernel[len(refusedByTheKernel)-1].code, "EPERM"}})
		}
	})
}

func join2(a, b []attack) []attack { return append(a[:len(a):len(a)], b...) }

// recorder keeps what comes to it.
type recorder struct {
	mu  sync.Mutex
	got []string
}

func (r *recorder) add(s string) {
	r.mu.Lock()
	r.got = append(r.got, s)
	r.mu.Unlock()
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string{}, r.got...)
}

// listen has handle serve each connection to an address of a namespace.
func listen(t *testing.T, n *netns.NS, addr string, handle func(net.Conn)) {
	t.Helper()
	var l net.Listener
	require.NoError(t, n.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			go func() { defer c.Close(); handle(c) }()
		}
	}()
}

// listenUDP has answer give the reply to each datagram, nil is none.
func listenUDP(t *testing.T, n *netns.NS, addr string, answer func([]byte) []byte) {
	t.Helper()
	var p net.PacketConn
	require.NoError(t, n.Do(func() (err error) {
		p, err = net.ListenPacket("udp", addr)
		return err
	}))
	t.Cleanup(func() { p.Close() })
	go func() {
		b := make([]byte, 4096)
		for {
			k, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			if r := answer(b[:k]); r != nil {
				_, _ = p.WriteTo(r, from)
			}
		}
	}()
}

func TestSpoofedSourcesStayInside(t *testing.T) {
	s := sbx0(t)
	w := newWorld(t, s)
	var seen recorder
	for _, a := range []string{"198.51.100.10:7777", "[2001:db8:9::10]:7777"} {
		listenUDP(t, w.beyond, a, func(b []byte) []byte { seen.add(string(b)); return b })
	}
	from := func(family, level, option, source, to, say string) string {
		return fmt.Sprintf("s = socket.socket(socket.%s, socket.SOCK_DGRAM); s.settimeout(5); s.setsockopt(%s, %s, 1)\n"+
			"if not %q: s.sendto(b%q, (%q, 7777)); r = s.recv(100).decode()\n"+
			"else:\n s.bind((%q, 0))\n try: s.sendto(b%q, (%q, 7777)); r = 'tried'\n except OSError: r = 'tried'", family, level, option, source, say, to, source, say, to)
	}
	v4 := func(source, say string) string {
		return from("AF_INET", "0", "15", source, "198.51.100.10", say)
	}
	v6 := func(source, say string) string {
		return from("AF_INET6", "41", "78", source, "2001:db8:9::10", say)
	}
	attackAll(t, s, []string{"--network", "full"}, []attack{
		{"a neighbour's address", v4("198.19.80.9", "spoofed"), "tried"},
		{"anybody's", v4("8.8.8.8", "spoofed"), "tried"},
		{"the host's", v4("203.0.113.1", "spoofed"), "tried"},
		{"a neighbour's IPv6 address", v6("fd73:6278:7275:6e00::9", "spoofed"), "tried"},
		{"anybody's IPv6 address", v6("2001:db8:77::1", "spoofed"), "tried"},
		{"its own", v4("", "own4"), "own4"},
		{"its own IPv6 address", v6("", "own6"), "own6"},
	})
	require.Equal(t, []string{"own4", "own6"}, seen.all())
}

// sbx0 is an installation without a world.
func sbx0(t *testing.T) *harness.Sbx {
	t.Helper()
	need.Python(t)
	return harness.New(t)
}

func TestTheProxyIsNoWayAroundTheRules(t *testing.T) {
	s := sbx0(t)
	w := newWorld(t, s)
	var one, two recorder
	record := func(r *recorder) func(net.Conn) {
		return func(c net.Conn) {
			var all []byte
			b := make([]byte, 4096)
			for answered := false; ; {
				n, err := c.Read(b)
				all = append(all, b[:n]...)
				post := strings.HasPrefix(string(all), "POST ") // has a body
				if !answered && strings.Contains(string(all), "\r\n\r\n") && (!post || strings.HasSuffix(string(all), "hi")) {
					answered = true
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
					_ = c.(*net.TCPConn).CloseWrite()
				}
				if err != nil {
					r.add(string(all))
					return
				}
			}
		}
	}
	listen(t, w.beyond, "198.51.100.10:8080", record(&one))
	listen(t, w.beyond, "198.51.100.20:8080", record(&two))
	const head = "Host: one.test:8080\r\nConnection: close\r\n\r\n"
	cases := []struct{ name, raw, want, arrives string }{
		{"a second request behind the first", "GET http://one.test:8080/1 HTTP/1.1\r\n\r\nGET http://two.test:8080/ HTTP/1.1\r\n\r\n", "200 1", "GET /1 HTTP/1.1\r\n" + head},
		{"one behind a body", "POST http://one.test:8080/2 HTTP/1.1\r\nContent-Length: 2\r\n\r\nhiGET http://two.test:8080/ HTTP/1.1\r\n\r\n", "200 1", "POST /2 HTTP/1.1\r\nHost: one.test:8080\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"},
		{"another Host", "GET http://one.test:8080/3 HTTP/1.1\r\nHost: two.test:8080\r\n\r\n", "200 1", "GET /3 HTTP/1.1\r\n" + head},
		{"two Hosts", "GET http://one.test:8080/4 HTTP/1.1\r\nHost: one.test\r\nHost: two.test\r\n\r\n", "200 1", "GET /4 HTTP/1.1\r\n" + head},
		{"Host named by Connection", "GET http://one.test:8080/5 HTTP/1.1\r\nX: y\r\nConnection: x, host\r\n\r\n", "200 1", "GET /5 HTTP/1.1\r\n" + head},
		{"a CONNECT in a tunnel is the server's", "CONNECT one.test:8080 HTTP/1.1\r\n\r\nCONNECT two.test:8080 HTTP/1.1\r\n\r\n", "200 2", "CONNECT two.test:8080 HTTP/1.1\r\n\r\n"},
		{"upper case", "CONNECT ONE.TEST:8080 HTTP/1.1\r\n\r\nA\r\n\r\n", "200 2", "A\r\n\r\n"},
		{"the Host of a CONNECT", "CONNECT two.test:8080 HTTP/1.1\r\nHost: one.test:8080\r\n\r\n", "403 1", ""},
		{"an address of a name", "CONNECT 198.51.100.10:8080 HTTP/1.1\r\n\r\n", "403 1", ""},
		{"one in IPv6", "CONNECT [::ffff:198.51.100.10]:8080 HTTP/1.1\r\n\r\n", "403 1", ""},
		{"another name", "GET http://two.test:8080/ HTTP/1.1\r\nHost: one.test:8080\r\n\r\n", "403 1", ""},
		{"a name below", "CONNECT x.one.test:8080 HTTP/1.1\r\n\r\n", "403 1", ""},
		{"a name that ends so", "CONNECT xone.test:8080 HTTP/1.1\r\n\r\n", "403 1", ""},
		{"a user", "GET http://one.test:8080@two.test:8080/ HTTP/1.1\r\n\r\n", "400 1", ""},
		{"a fragment", "GET http://two.test:8080#@one.test:8080/ HTTP/1.1\r\n\r\n", "400 1", ""},
		{"a backslash", "GET http://two.test:8080\\@one.test:8080/ HTTP/1.1\r\n\r\n", "400 1", ""},
		{"a NUL in the name", "CONNECT two.test\x00.one.test:8080 HTTP/1.1\r\n\r\n", "400 1", ""},
		{"an encoded name", "CONNECT two%2etest:8080 HTTP/1.1\r\n\r\n", "400 1", ""},
		{"a bare CR", "GET http://one.test:8080/\rX HTTP/1.1\r\n\r\n", "400 1", ""},
		{"a bare LF", "GET http://one.test:8080/ HTTP/1.1\nHost: one.test\n\n", "400 1", ""},
		{"an encoded line end goes on encoded", "GET http://one.test:8080/%0d%0aX:1 HTTP/1.1\r\n\r\n", "200 1", "GET /%0d%0aX:1 HTTP/1.1\r\n" + head},
		{"a folded line", "GET http://one.test:8080/ HTTP/1.1\r\nX: a\r\n b\r\n\r\n", "400 1", ""},
		{"a space before the colon", "GET http://one.test:8080/ HTTP/1.1\r\nContent-Length : 5\r\n\r\nhello", "400 1", ""},
		{"two lengths", "POST http://one.test:8080/ HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\nhello", "400 1", ""},
		{"a length with a sign", "POST http://one.test:8080/ HTTP/1.1\r\nContent-Length: +5\r\n\r\nhello", "400 1", ""},
		{"chunks", "POST http://one.test:8080/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "411 1", ""},
		{"chunks and a length", "POST http://one.test:8080/ HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "411 1", ""},
		{"CONNECT with a body", "CONNECT one.test:8080 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "400 1", ""},
		{"no scheme", "GET / HTTP/1.1\r\nHost: one.test:8080\r\n\r\n", "400 1", ""},
		{"another scheme", "GET file:///etc/passwd HTTP/1.1\r\n\r\n", "400 1", ""},
		{"HTTP/0.9", "GET http://one.test:8080/\r\n\r\n", "400 1", ""},
		{"an endless head", "GET http://one.test:8080/ HTTP/1.1\r\nX: " + strings.Repeat("x", 20000) + "\r\n\r\n", "431 1", ""},
	}
	var attacks []attack
	arrived := []string{}
	for _, c := range cases {
		b, err := json.Marshal(c.raw)
		require.NoError(t, err)
		attacks = append(attacks, attack{c.name, "r = ask(" + string(b) + ".encode('latin1'))", c.want})
		if c.arrives != "" {
			arrived = append(arrived, c.arrives)
		}
	}
	o := attackAll(t, s, []string{"--allow", "one.test"}, attacks)
	eventually(t, len(arrived), func() int { return len(one.all()) })
	require.ElementsMatch(t, arrived, one.all())
	require.Empty(t, two.all())
	require.Contains(t, fmt.Sprint(o.Report.Denials), "connect 198.51.100.10:8080: default deny")
}

// All addresses are allowed, and all names: still none leads to the host, to
// what is beside it, or to the sandboxes.
func TestWideRulesDoNotMeanTheHost(t *testing.T) {
	s := sbx0(t)
	newWorld(t, s)
	var attacks []attack
	for _, target := range []string{
		"127.0.0.1", "127.1.2.3", "0.0.0.0", "203.0.113.1", "169.254.169.254", "10.77.0.5", "198.19.80.2", "255.255.255.255", "224.0.0.1",
		"[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[2001:db8:1::1]", "[fd73:6278:7275:6e00::2]", "[fe80::1]",
		"host.test", "rebind.test", "meta.test", "lan.test",
	} {
		attacks = append(attacks, attack{"CONNECT " + target, `r = ask(b"CONNECT ` + target + `:80 HTTP/1.1\r\n\r\n")`, "403 1"})
	}
	for _, target := range []string{"127.1", "2130706433", "0x7f000001", "0x7f.1", "127.0.0.1.", "0177.0.0.1", "[fe80::1%25eth0]", "localhost\\x00"} {
		attacks = append(attacks, attack{"CONNECT " + target, `r = ask(b"CONNECT ` + target + `:80 HTTP/1.1\r\n\r\n")`, "400 1"})
	}
	attackAll(t, s, []string{"--allow", "0.0.0.0/0", "--allow", "::/0", "--allow", "*.test"}, attacks)
}

// nameServer is the one that /etc/resolv.conf of the host names. It counts the
// questions for A by name.
type nameServer struct {
	mu    sync.Mutex
	asked map[string]int
}

func (n *nameServer) names() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.asked)
}

// newNameServer answers by lookup, which is told how often a name was asked for.
func newNameServer(t *testing.T, w *world, lookup func(name string, time int) []string) *nameServer {
	t.Helper()
	n := &nameServer{asked: map[string]int{}}
	listenUDP(t, w.beyond, "198.51.100.10:53", func(b []byte) []byte {
		var m dnsmessage.Message
		if m.Unpack(b) != nil || len(m.Questions) != 1 {
			return nil
		}
		q := m.Questions[0]
		name := strings.TrimSuffix(q.Name.String(), ".")
		n.mu.Lock()
		if q.Type != dnsmessage.TypeAAAA {
			n.asked[name]++
		}
		addrs := lookup(name, n.asked[name])
		n.mu.Unlock()
		m.Response, m.Additionals = true, nil
		if addrs == nil {
			m.RCode = dnsmessage.RCodeNameError
		}
		for _, a := range addrs {
			ip := netip.MustParseAddr(a)
			var body dnsmessage.ResourceBody = &dnsmessage.AAAAResource{AAAA: ip.As16()}
			kind := dnsmessage.TypeAAAA
			if ip.Is4() {
				body, kind = &dnsmessage.AResource{A: ip.As4()}, dnsmessage.TypeA
			}
			if kind == q.Type {
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class}, Body: body})
			}
		}
		out, err := m.Pack()
		if err != nil {
			return nil
		}
		return out
	})
	return n
}

func TestNamesCannotChangeWhereTheyLead(t *testing.T) {
	t.Parallel()
	s := sbx0(t)
	w := newWorld(t, s)
	newNameServer(t, w, func(name string, time int) []string {
		switch {
		case name != "flip.evil":
			return map[string][]string{
				"both.evil": {"127.0.0.1", "169.254.169.254", "198.51.100.10"},
				"lo.evil":   {"127.0.0.1"}, "lan.evil": {"10.77.0.5"}, "meta.evil": {"169.254.169.254"}, "host.evil": {"203.0.113.1"},
				"mapped.evil": {"::ffff:169.254.169.254"}, "nat.evil": {"64:ff9b::a9fe:a9fe"}, "host6.evil": {"2001:db8:1::1"},
			}[name]
		case time < 2:
			return []string{"198.51.100.10"}
		}
		return []string{"169.254.169.254"}
	})
	attacks := []attack{
		{"a public address first", `r = hello("flip.evil", 80)`, "one"},
		{"the metadata service then", `time.sleep(5.2); r = hello("flip.evil", 80)`, "ECONNRESET"},
		{"and by the proxy", `r = ask(b"CONNECT flip.evil:80 HTTP/1.1\r\n\r\n")`, "403 1"},
		{"of many the one that may be", `r = hello("both.evil", 80)`, "one"},
	}
	for _, n := range []string{"lo", "lan", "meta", "host", "mapped", "nat", "host6"} {
		attacks = append(attacks, attack{n, `r = hello("` + n + `.evil", 80)`, "ECONNRESET"})
	}
	o := attackAll(t, s, []string{"--allow", "*.evil"}, attacks)
	require.Contains(t, fmt.Sprint(o.Report.Denials), "flip.evil:80: link-local address 169.254.169.254 of flip.evil")
}

func TestNamesCarryNothingOut(t *testing.T) {
	s := sbx0(t)
	w := newWorld(t, s)
	n := newNameServer(t, w, func(string, int) []string { return []string{"198.51.100.10"} })
	deep := strings.Repeat("ab.", 60)
	o := attackAll(t, s, []string{"--allow", "*.good.evil", "--allow", "one.test", "--deny", "*.bad.good.evil"}, []attack{
		{"60 labels below a denied zone", `r = query("` + deep + `bad.good.evil")`, "rcode 3 answers 0"},
		{"60 labels below what nobody named", `r = query("` + deep + `evil")`, "rcode 3 answers 0"},
		{"to a server of its own", `r = query("` + deep + `evil", server="198.51.100.10")`, "rcode 3 answers 0"},
		{"text of a denied name", `r = query("a.bad.good.evil", 16)`, "rcode 3 answers 0"},
		{"text of an allowed name", `r = query("a.good.evil", 16)`, "rcode 0 answers 0"},
		{"a zone", `r = query("good.evil", 252)`, "rcode 3 answers 0"},
		{"backwards", `r = query("1.2.0.192.in-addr.arpa", 12)`, "rcode 3 answers 0"},
	})
	require.Zero(t, n.names())
	require.Contains(t, fmt.Sprint(o.Report.Denials), "bad.good.evil: --deny *.bad.good.evil")

	// What is allowed is asked for at a bounded rate, however many ask.
	o = attackAll(t, s, []string{"--allow", "*.good.evil", "--pids-limit", "100"}, []attack{{"1000 names from 10 processes", `
children = []
for i in range(10):
    if (pid := os.fork()) == 0:
        got = [query("n%d-%d.good.evil" % (i, j)) for j in range(100)]
        os._exit(0 if set(got) <= {"rcode 0 answers 1", "rcode 2 answers 0"} else 1)
    children.append(pid)
r = {os.waitpid(c, 0)[1] for c in children}`, "{0}"}})
	require.GreaterOrEqual(t, n.names(), 200)
	require.Less(t, n.names(), 600)
	require.Contains(t, fmt.Sprint(o.Report.All["network"]), "too many look-ups")
}

// running starts a sandbox that says "up" when it is ready for what stdin gives.
type running struct {
	s                      *harness.Sbx
	cmd                    *exec.Cmd
	file                   string
	stdin                  io.WriteCloser
	stdout, stderr, status *lines
	wait                   func() *harness.Outcome
}

// lines are those that a command has written.
type lines struct {
	ch  chan string
	buf []byte
}

func (l *lines) Write(b []byte) (int, error) {
	l.buf = append(l.buf, b...)
	for {
		line, rest, ok := strings.Cut(string(l.buf), "\n")
		if !ok {
			return len(b), nil
		}
		l.buf = []byte(rest)
		select {
		case l.ch <- line:
		default: // nobody reads so many
		}
	}
}

func (l *lines) next(t *testing.T) string {
	t.Helper()
	select {
	case line := <-l.ch:
		return line
	case <-time.After(20 * time.Second):
		require.Fail(t, "the sandbox says nothing")
		return ""
	}
}

func newLines() *lines { return &lines{ch: make(chan string, 1000)} }

// start runs `sbxrun run` with args and does not wait; fails the test where it
// did not end by itself.
func start(t *testing.T, s *harness.Sbx, args ...string) *running {
	t.Helper()
	r := &running{s: s, file: s.ReportFile(), stdout: newLines(), stderr: newLines(), status: newLines()}
	cmd := s.Cmd(append([]string{"run", "--report", r.file, "--json-status-fd", "3"}, args...)...)
	r.cmd, cmd.Stdout, cmd.Stderr = cmd, r.stdout, r.stderr
	status, w, err := os.Pipe()
	require.NoError(t, err)
	cmd.ExtraFiles = []*os.File{w}
	t.Cleanup(func() { status.Close() })
	r.stdin, err = cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	w.Close()
	go func() { _, _ = io.Copy(r.status, status) }()
	t.Cleanup(func() { _ = r.stdin.Close() })
	r.wait = func() *harness.Outcome {
		t.Helper()
		r.stdin.Close()
		o := s.Wait(cmd)
		o.Report = s.ReadReport(r.file)
		require.NotNil(t, o.Report, o)
		return o
	}
	return r
}

// serverInside serves on all addresses until its input ends.
const serverInside = attackLibrary + `
import threading
def serve(family, addr):
    l = socket.socket(family); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6: l.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    l.bind((addr, 8000)); l.listen()
    def run():
        while True:
            c, _ = l.accept(); c.sendall(b"sandbox\n"); c.close()
    threading.Thread(target=run, daemon=True).start()
serve(socket.AF_INET, "0.0.0.0"); serve(socket.AF_INET6, "::")
print("up", hello("127.0.0.1", 8000), flush=True); sys.stdin.read()`

func TestSandboxesAndTheirHostAreOutOfReach(t *testing.T) {
	t.Parallel()
	s := sbx0(t)
	w := newWorld(t, s)
	keepStage(t, s)
	var seen recorder
	served := func(c net.Conn) { seen.add(c.RemoteAddr().String()); _, _ = io.WriteString(c, "host\n") }
	listen(t, w.host, ":9191", served) // on every address there is
	require.NoError(t, w.host.Do(func() error {
		up, err := netlink.LinkByName("uplink0")
		if err != nil {
			return err
		}
		return addAddress(up, "fe80::77", 64)
	}))

	victim := start(t, s, "--network", "full", "--", "python3", "-c", serverInside)
	require.Equal(t, "up sandbox", victim.stdout.next(t))
	other := start(t, s, "--network", "egress", "--", "python3", "-c", serverInside)
	require.Equal(t, "up sandbox", other.stdout.next(t))
	targets, err := json.Marshal([]string{"198.19.80.2", "198.19.80.1", "fd73:6278:7275:6e00::2", "fd73:6278:7275:6e00::1", "203.0.113.1", "2001:db8:1::1", "fe80::77%IF", "fe80::1%IF", "ff02::1%IF", "127.0.0.1", "::1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "198.18.0.1"})
	require.NoError(t, err)
	reached := func(link string) []attack {
		return []attack{{"by " + link, `
import concurrent.futures
def reach(a):
    try: return hello(a[0], a[1], 1)
    except OSError: return ""
all = [(a, p) for a in ` + strings.ReplaceAll(string(targets), "IF", link) + ` for p in (8000, 9191)]
with concurrent.futures.ThreadPoolExecutor(len(all)) as pool: r = [x for x in zip(all, pool.map(reach, all)) if x[1]]`, "[]"}}
	}
	attackAll(t, s, []string{"--network", "full"}, reached("eth0"))
	attackAll(t, s, []string{"--network", "egress", "--allow", "0.0.0.0/0", "--allow", "::/0"}, reached("lo"))
	require.Empty(t, seen.all())
	require.Equal(t, 0, other.wait().Code)
	o := victim.wait()
	require.Equal(t, 0, o.Code, o)
	require.Equal(t, []any{"198.19.80.2/32", "fd73:6278:7275:6e00::2/128"}, network(o)["addresses"])
}

func network(o *harness.Outcome) map[string]any {
	n, _ := o.Report.All["network"].(map[string]any)
	return n
}

func TestHalfOpenConnectionsAndSlowReadersHurtNobodyElse(t *testing.T) {
	t.Parallel()
	s := sbx0(t)
	w := newWorld(t, s)
	listen(t, w.beyond, "198.51.100.10:9999", func(c net.Conn) { // more than anybody reads
		b := make([]byte, 1<<16)
		for i := 0; i < 1<<12; i++ {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	prog := attackLibrary + `
work = socket.create_connection(("one.test", 5432), 5)
work.settimeout(10)
def works():
    work.sendall(b"still\n"); b = b""
    while not b.endswith(b"\n"): b += work.recv(100)
    return "still" in b.decode()
assert works()
silent = []
for i in range(500):
    c = socket.socket(); c.setblocking(False)
    c.connect_ex(("198.18.0.1", 3128)) if i % 2 else c.connect_ex(("198.51.100.10", 80))
    silent.append(c)
    if i % 50 == 0: assert works()
select.select(silent, [], [], 15) # the first that is refused
assert works()
for c in silent: c.close()
def until(f):
    for i in range(200):
        try: return f()
        except OSError: time.sleep(0.05)
    return f()
assert until(lambda: hello("one.test", 80)) == "one"
slow = [until(lambda: socket.create_connection(("one.test", 9999), 5)) for i in range(50)]
assert works() and hello("one.test", 80) == "one"
print("slow", flush=True); sys.stdin.read()
assert works()
`
	r := start(t, s, "--allow", "one.test", "--allow", "198.51.100.10", "--", "python3", "-c", prog)
	require.Equal(t, "slow", r.stdout.next(t))
	pids := helpers(t, w)
	require.Len(t, pids, 1)
	require.Less(t, residentBytes(t, pids[0]), int64(100<<20)) // what is not read is not held
	o := r.wait()
	require.Equal(t, 0, o.Code, o)
	require.Contains(t, fmt.Sprint(o.Report.Denials), "connection limit 256")
}

func TestNetworkLimitsHold(t *testing.T) {
	t.Parallel()
	s := sbx0(t)
	w := newWorld(t, s)
	listen(t, w.beyond, "198.51.100.10:9999", func(c net.Conn) {
		b := make([]byte, 1<<16)
		for i := 0; i < 64; i++ { // 4 MiB
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	const read = `
def take():
    n = 0
    try:
        s = socket.create_connection(("one.test", 9999), 5); s.settimeout(10)
        while b := s.recv(65536): n += len(b)
    except ConnectionResetError: pass
    return n
`
	t.Run("bytes", func(t *testing.T) {
		o := attackAll(t, s, []string{"--allow", "one.test", "--net-bytes", "1m"}, []attack{
			{"more than may be", read + `r = take() <= (1 << 20) + (128 << 10)`, "True"},
			{"and again", `r = hello("one.test", 80)`, "ECONNRESET"},
			{"by the proxy", `r = ask(b"GET http://one.test/ HTTP/1.1\r\n\r\n")`, "403 1"},
		})
		require.Contains(t, fmt.Sprint(o.Report.Denials), "byte limit 1048576")
		crossed := network(o)["down_bytes"].(float64) + network(o)["up_bytes"].(float64)
		require.GreaterOrEqual(t, crossed, float64(1<<20))
		require.LessOrEqual(t, crossed, float64(1<<20+128<<10))
	})
	t.Run("connections", func(t *testing.T) {
		o := attackAll(t, s, []string{"--allow", "one.test", "--net-conns", "3"}, []attack{
			{"three", `
held = [socket.create_connection(("one.test", 80), 5) for i in range(3)]
for c in held: c.sendall(b"x\n"); c.settimeout(5); c.recv(100)
try: r = hello("one.test", 80, 10)
except ConnectionResetError: r = "reset"
for c in held: c.close()`, "reset"},
			{"one when they have ended", `
for i in range(100):
    try: r = hello("one.test", 80); break
    except OSError as e: time.sleep(0.05)`, "one"},
		})
		require.Contains(t, fmt.Sprint(o.Report.Denials), "connection limit 3")
	})
	// A rate cannot be passed, so that the least time is exact whatever the machine does.
	for _, mode := range []string{"egress", "full"} {
		t.Run("rate "+mode, func(t *testing.T) {
			flags := []string{"--network", mode, "--net-rate", "8mbit"}
			if mode == "egress" {
				flags = append(flags, "--allow", "198.51.100.10")
			}
			o := attackAll(t, s, flags, []attack{{"800 KB", `
s = socket.create_connection(("198.51.100.10", 9999), 5); s.settimeout(10); n = 0; begun = time.monotonic()
while n < 800000: n += len(s.recv(65536))
r = time.monotonic() - begun >= 0.4`, "True"}})
			require.Equal(t, mode, network(o)["mode"])
		})
	}
}

func residentBytes(t *testing.T, pid int) int64 {
	t.Helper()
	var size, resident int64
	_, err := fmt.Sscan(readFile(t, fmt.Sprintf("/proc/%d/statm", pid)), &size, &resident)
	require.NoError(t, err)
	return resident * int64(unix.Getpagesize())
}
