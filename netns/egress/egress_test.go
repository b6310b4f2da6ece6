package egress

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

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

// world is a namespace that plays the internet, and one that is opened to it.
type world struct {
	outside
	t        testing.TB
	internet *netns.NS
	ns       *netns.NS
	e        *Egress
	resolv   string
}

// The internet's addresses; each has a web server at port 80, which tells the
// address, and at port 7 a server that answers in capitals.
var servers = []string{"203.0.113.1", "203.0.113.2", "2001:db8::1", "10.0.0.1", "169.254.169.254", "198.51.100.1"}

func newWorld(t testing.TB, c Config, names map[string][]string) *world {
	t.Helper()
	for _, k := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"} {
		t.Setenv(k, "")
	}
	w := &world{t: t, internet: newNS(t), ns: newNS(t)}
	w.names = names
	for _, a := range servers {
		web, echo := w.listen(a, 80), w.listen(a, 7)
		go func() {
			_ = http.Serve(web, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, a) }))
		}()
		go serveCapitals(echo)
	}
	c.Log = func(d netns.Decision) {
		w.mu.Lock()
		defer w.mu.Unlock()
		d.Time = time.Time{}
		w.events = append(w.events, d)
	}
	c.Upstream = Upstream{Dial: w.dial, Lookup: w.lookup}
	var err error
	w.e, err = Open(w.ns, c)
	require.NoError(t, err)
	w.serving = append(w.serving, w.e)
	t.Cleanup(func() { require.NoError(t, w.e.Close()) })
	require.NoError(t, w.ns.Do(func() error { // as the helper sets it
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
	}))
	w.resolv = filepath.Join(t.TempDir(), "resolv.conf")
	require.NoError(t, os.WriteFile(w.resolv, []byte(w.e.Resolv()), 0o644))
	return w
}

func (w *world) listen(ip string, port int) (l net.Listener) {
	w.t.Helper()
	require.NoError(w.t, w.internet.Do(func() (err error) {
		link, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		bits := 32
		if strings.Contains(ip, ":") {
			bits = 128
		}
		_ = netlink.AddrReplace(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(ip), Mask: net.CIDRMask(bits, bits)}, Flags: unix.IFA_F_NODAD})
		l, err = net.Listen("tcp", net.JoinHostPort(ip, fmt.Sprint(port)))
		return err
	}))
	w.t.Cleanup(func() { l.Close() })
	return l
}

func (w *world) dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	w.mu.Lock()
	w.dialled = append(w.dialled, addr)
	w.mu.Unlock()
	err = w.internet.Do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

func serveCapitals(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b, _ := io.ReadAll(c)
			_, _ = c.Write(bytes.ToUpper(b))
		}()
	}
}

// run runs a shell script inside as a job does: without privileges, and with our
// resolv.conf. PROXY=1 in front of a command has it use the proxy's variables.
func (w *world) run(script string) string {
	w.t.Helper()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all sh -c "$1"`, w.resolv, script)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "VARS=" + strings.Join(w.e.Env(), " ")}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(w.t, w.ns.Do(cmd.Start))
	_ = cmd.Wait()
	return strings.TrimSpace(out.String())
}

// connect connects from inside.
func (w *world) connect(addr string) (c net.Conn, err error) {
	err = w.ns.Do(func() error {
		c, err = net.DialTimeout("tcp", addr, 5*time.Second)
		return err
	})
	if err == nil {
		w.t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c, err
}

// exchange sends text and its end, and gives the answer.
func exchange(c net.Conn, text string) (string, error) {
	if _, err := io.WriteString(c, text); err != nil {
		return "", err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// requireReset is that a connection comes to nothing; depending on who is
// faster, that is seen by connect or later.
func (w *world) requireReset(addr string) {
	w.t.Helper()
	c, err := w.connect(addr)
	if err == nil {
		_, err = exchange(c, "GET / HTTP/1.0\r\n\r\n")
	}
	require.Truef(w.t, errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ENOTCONN), "%s: %v", addr, err)
}

// query asks our DNS by UDP, at an address that is nobody's.
func (w *world) query(name string, kind dnsmessage.Type) dnsmessage.Message {
	w.t.Helper()
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	require.NoError(w.t, err)
	var c net.Conn
	require.NoError(w.t, w.ns.Do(func() (err error) {
		c, err = net.Dial("udp", "8.8.8.8:53")
		return err
	}))
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = c.Write(b)
	require.NoError(w.t, err)
	buf := make([]byte, 1500)
	n, err := c.Read(buf)
	require.NoError(w.t, err)
	var m dnsmessage.Message
	require.NoError(w.t, m.Unpack(buf[:n]))
	require.Equal(w.t, uint16(7), m.ID)
	require.Equal(w.t, q.Questions, m.Questions)
	return m
}

var internet = map[string][]string{
	"one.test": {"203.0.113.1"}, "two.test": {"203.0.113.2"}, "six.test": {"2001:db8::1"}, "both.test": {"2001:db8::9", "203.0.113.2"},
	"a.sub.test": {"203.0.113.2"}, "sub.test": {"203.0.113.2"}, "private.test": {"10.0.0.1"}, "metadata.test": {"169.254.169.254"},
	"loop.test": {"127.0.0.1"}, "denied.test": {"203.0.113.2"}, "far.test": {"198.51.100.1"},
}

// The same destinations by programs that know of the proxy and that do not.
func TestDestinations(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t,
		[]string{"one.test:80", "six.test", "both.test", "*.sub.test", "private.test", "metadata.test", "loop.test", "denied.test", "far.test", "none.test", "203.0.113.1", "[2001:db8::1]:80"},
		[]string{"denied.test", "198.51.100.0/24"}, nil)}, internet)
	clients := map[string]string{
		"curl":          `curl -sS -m 20 http://%s/`,
		"curl, proxy":   `env $VARS curl -sSf -m 20 http://%s/`,
		"curl, tunnel":  `env $VARS curl -sSfp -m 20 http://%s/`,
		"urllib":        `/usr/bin/python3 -c 'import urllib.request as r; print(r.urlopen("http://%s/", timeout=20).read().decode())' 2>&1 | tail -1`,
		"urllib, proxy": `env $VARS /usr/bin/python3 -c 'import urllib.request as r; print(r.urlopen("http://%s/", timeout=20).read().decode())' 2>&1 | tail -1`,
	}
	reached := map[string]string{
		"one.test": "203.0.113.1", "ONE.test.": "203.0.113.1", "six.test": "2001:db8::1", "both.test": "203.0.113.2", "a.sub.test": "203.0.113.2",
		"203.0.113.1": "203.0.113.1", "[2001:db8::1]": "2001:db8::1",
		"one.test:7": "", "two.test": "", "sub.test": "", "private.test": "", "metadata.test": "", "loop.test": "", "denied.test": "", "far.test": "", "none.test": "",
		"203.0.113.2": "", "10.0.0.1": "", "169.254.169.254": "", "198.51.100.1": "", "198.18.0.200": "", "198.18.70.1": "", "[2001:db8::1]:7": "", "[2001:2::77]": "",
	}
	for client, command := range clients {
		if _, err := os.Stat("/usr/bin/curl"); err != nil && strings.HasPrefix(client, "curl") {
			continue
		}
		for to, want := range reached {
			got := w.run(fmt.Sprintf(command, to))
			if want != "" {
				require.Equal(t, want, got, "%s %s", client, to)
			} else {
				require.Regexp(t, `^curl: \((6|7|22|52|55|56)\)|^urllib\.error|^ConnectionResetError|^http\.client\.RemoteDisconnected`, got, "%s %s", client, to)
			}
		}
	}
	dialled, events := w.seen()
	for _, a := range dialled {
		require.Contains(t, []string{"203.0.113.1:80", "203.0.113.2:80", "[2001:db8::1]:80", "[2001:db8::9]:80"}, a)
	}
	require.NotContains(t, w.asked(), "two.test", "a denied name was looked up")
	require.NotContains(t, w.asked(), "denied.test", "a denied name was looked up")
	for _, want := range []netns.Decision{
		{Via: "tcp", Host: "one.test", Address: "203.0.113.1", Port: 80, Allowed: true, Rule: "--allow one.test:80"},
		{Via: "http", Host: "a.sub.test", Address: "203.0.113.2", Port: 80, Allowed: true, Rule: "--allow *.sub.test"},
		{Via: "connect", Host: "six.test", Address: "2001:db8::1", Port: 80, Allowed: true, Rule: "--allow six.test"},
		{Via: "tcp", Address: "2001:db8::1", Port: 80, Allowed: true, Rule: "--allow [2001:db8::1]:80"},
		{Via: "tcp", Address: "2001:db8::1", Port: 7, Rule: "default deny"},
		{Via: "tcp", Host: "one.test", Port: 7, Rule: "default deny"},
		{Via: "tcp", Address: "203.0.113.2", Port: 80, Rule: "default deny"},
		{Via: "tcp", Host: "private.test", Address: "10.0.0.1", Port: 80, Rule: "private address 10.0.0.1 of private.test"},
		{Via: "tcp", Host: "metadata.test", Address: "169.254.169.254", Port: 80, Rule: "link-local address 169.254.169.254 of metadata.test"},
		{Via: "tcp", Host: "loop.test", Address: "127.0.0.1", Port: 80, Rule: "loopback address 127.0.0.1 of loop.test"},
		{Via: "tcp", Host: "far.test", Address: "198.51.100.1", Port: 80, Rule: "--deny 198.51.100.0/24"},
		{Via: "tcp", Address: "198.51.100.1", Port: 80, Rule: "--deny 198.51.100.0/24"},
		{Via: "tcp", Address: "198.18.70.1", Port: 80, Rule: "default deny"},
		{Via: "dns", Host: "two.test", Rule: "default deny"},
		{Via: "dns", Host: "denied.test", Rule: "--deny denied.test"},
		{Via: "dns", Host: "none.test", Allowed: true, Rule: "--allow none.test", Error: "lookup none.test: no such host"},
		{Via: "http", Host: "two.test", Port: 80, Rule: "default deny"},
	} {
		require.Contains(t, events, want)
	}
}

// What neither is TCP nor a query is refused at once, and the job's own loopback
// and own address are left to it.
func TestNothingElseLeavesAndLoopbackIsTheJobs(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"0.0.0.0/0", "::/0"}, nil, nil)}, nil)
	got := w.run(`/usr/bin/python3 - <<'E'
import socket, errno, os
def t(what, f):
    try: print(what, f())
    except OSError as e: print(what, errno.errorcode[e.errno])
def udp(fam, to):
    s = socket.socket(fam, socket.SOCK_DGRAM); s.settimeout(20); s.connect(to); s.send(b"x"); return s.recv(9)
def ping(fam, proto, to):
    s = socket.socket(fam, socket.SOCK_DGRAM, proto); s.settimeout(20); s.connect(to); s.send(bytes([8 if proto == 1 else 128]) + bytes(7)); return s.recv(99)[0]
def own(fam, kind, at):
    s = socket.socket(fam, kind); s.bind((at, 0)); c = socket.socket(fam, kind)
    if kind == socket.SOCK_STREAM: s.listen()
    c.connect(s.getsockname()); c.send(b"x")
    return (s.accept()[0] if kind == socket.SOCK_STREAM else s).recv(9)
t("quic", lambda: udp(socket.AF_INET, ("203.0.113.1", 443)))
t("quic6", lambda: udp(socket.AF_INET6, ("2001:db8::1", 443)))
t("multicast", lambda: udp(socket.AF_INET, ("224.0.0.251", 5353)))
t("ping", lambda: ping(socket.AF_INET, 1, ("203.0.113.1", 0)))
t("ping6", lambda: ping(socket.AF_INET6, 58, ("2001:db8::1", 0)))
t("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
for at in "127.0.0.1", "127.7.7.7", "198.18.0.1":
    t("tcp " + at, lambda: own(socket.AF_INET, socket.SOCK_STREAM, at))
    t("udp " + at, lambda: own(socket.AF_INET, socket.SOCK_DGRAM, at))
for at in "::1", "2001:2::1":
    t("tcp " + at, lambda: own(socket.AF_INET6, socket.SOCK_STREAM, at))
    t("udp " + at, lambda: own(socket.AF_INET6, socket.SOCK_DGRAM, at))
t("ping lo", lambda: ping(socket.AF_INET, 1, ("127.0.0.1", 0)))
t("nobody", lambda: socket.create_connection(("127.0.0.1", 9)))
s = socket.socket(); s.bind(("127.0.0.1", 0))
t("from lo", lambda: (s.connect(("203.0.113.1", 7)), s.send(b"a"), s.shutdown(1), s.recv(9))[3])
t("own tcp", lambda: socket.create_connection(("198.18.0.1", 61080)).recv(9))
l = socket.socket(); l.bind(("0.0.0.0", 3128)); l.listen()
l = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); l.bind(("0.0.0.0", 5353))
print([a[4][0] for a in socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)] != [])
E`)
	require.Equal(t, `quic EPERM
quic6 EPERM
multicast EPERM
ping EPERM
ping6 EACCES
raw EPERM
tcp 127.0.0.1 b'x'
udp 127.0.0.1 b'x'
tcp 127.7.7.7 b'x'
udp 127.7.7.7 b'x'
tcp 198.18.0.1 b'x'
udp 198.18.0.1 b'x'
tcp ::1 b'x'
udp ::1 b'x'
tcp 2001:2::1 b'x'
udp 2001:2::1 b'x'
ping lo 0
nobody ECONNREFUSED
from lo b'A'
own tcp ECONNRESET
True`, got)
}

// Two connections from one source port to different places are told apart.
func TestOneSourcePortTwoTargets(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"203.0.113.0/24"}, nil, nil)}, nil)
	got := w.run(`/usr/bin/python3 - <<'E'
import socket
o = []
for to in "203.0.113.1", "203.0.113.2":
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("198.18.0.1", 40000)); s.connect((to, 80)); o.append(s)
for s in o: s.send(b"GET / HTTP/1.0\r\n\r\n")
for s in o: print(s.makefile().read().split("\n")[-1])
E`)
	require.Equal(t, "203.0.113.1\n203.0.113.2", got)
}

func TestDNS(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"one.test", "*.sub.test"}, []string{"x.sub.test"}, nil)}, internet)
	require.Equal(t, "nameserver 198.18.0.1\n", w.e.Resolv())
	for _, c := range []struct {
		name string
		kind dnsmessage.Type
		code dnsmessage.RCode
		want string
	}{
		{"one.test.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, "198.18.1.0"},
		{"oNe.TEst.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, "198.18.1.0"},
		{"one.test.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, "2001:2::1:0"},
		{"a.sub.test.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, "198.18.1.1"},
		{"one.test.", dnsmessage.TypeMX, dnsmessage.RCodeSuccess, ""},
		{"one.test.", dnsmessage.TypeTXT, dnsmessage.RCodeSuccess, ""},
		{"one.test.", dnsmessage.Type(65), dnsmessage.RCodeSuccess, ""},
		{"none.sub.test.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
		{"x.sub.test.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
		{"two.test.", dnsmessage.TypeTXT, dnsmessage.RCodeNameError, ""},
		{"0.1.18.198.in-addr.arpa.", dnsmessage.TypePTR, dnsmessage.RCodeNameError, ""},
		{"localhost.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, "127.0.0.1"},
		{"x.localhost.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, "::1"},
		{"h\xc3\xa9.test.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
	} {
		m := w.query(c.name, c.kind)
		got := ""
		for _, a := range m.Answers {
			switch b := a.Body.(type) {
			case *dnsmessage.AResource:
				got += netip.AddrFrom4(b.A).String()
			case *dnsmessage.AAAAResource:
				got += netip.AddrFrom16(b.AAAA).String()
			}
		}
		require.Equal(t, c.want, got, c.name)
		require.Equal(t, c.code, m.RCode, c.name)
	}
	// By TCP, and two on one connection.
	c, err := w.connect("9.9.9.9:53")
	require.NoError(t, err)
	for range 2 {
		q := dnsmessage.Message{Header: dnsmessage.Header{ID: 9}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("one.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		b, err := q.AppendPack([]byte{0, 26})
		require.NoError(t, err)
		_, err = c.Write(b)
		require.NoError(t, err)
		head := make([]byte, 2)
		_, err = io.ReadFull(c, head)
		require.NoError(t, err)
		rest := make([]byte, head[1])
		_, err = io.ReadFull(c, rest)
		require.NoError(t, err)
		require.Equal(t, []byte{198, 18, 1, 0}, rest[len(rest)-4:])
	}
	_, events := w.seen()
	require.Equal(t, []string{"one.test", "a.sub.test", "none.sub.test"}, w.asked())
	require.Equal(t, []netns.Decision{
		{Via: "dns", Host: "none.sub.test", Allowed: true, Rule: "--allow *.sub.test", Error: "lookup none.sub.test: no such host"},
		{Via: "dns", Host: "x.sub.test", Rule: "--deny x.sub.test"},
		{Via: "dns", Host: "two.test", Rule: "default deny"},
		{Via: "dns", Host: `"h\u00e9.test"`, Rule: "a name beyond ASCII is written as xn--…"},
	}, events)
}

// Data in names leaves only below an allowed name, and there at a bounded rate
// and for a bounded number of names.
func TestNamesAreNoWayOut(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"*.sub.test"}, nil, nil)}, nil)
	long := strings.Repeat("x", 63) + "." + strings.Repeat("y", 63) + "."
	require.Equal(t, dnsmessage.RCodeNameError, w.query(long+"evil.test.", dnsmessage.TypeTXT).RCode)
	require.Empty(t, w.asked())
	refused := 0
	for i := range 2 * lookupsBurst {
		if w.query(fmt.Sprintf("%s%d.sub.test.", long, i), dnsmessage.TypeA).RCode == dnsmessage.RCodeServerFailure {
			refused++
		}
	}
	require.NotZero(t, refused)
	require.Len(t, w.asked(), 2*lookupsBurst-refused)
	var n names
	for i := range maxNames {
		_, ok := n.number(fmt.Sprint(i))
		require.True(t, ok)
	}
	_, ok := n.number("more")
	require.False(t, ok)
	for _, a := range []netip.Addr{addr4(maxNames - 1), addr6(maxNames - 1)} {
		require.Equal(t, fmt.Sprint(maxNames-1), n.of(a))
		require.Empty(t, n.of(a.Next()))
	}
	for _, a := range []netip.Addr{own4, own6, addr4(0).Prev(), addr6(0).Prev(), netip.MustParseAddr("2001:2:0:1::1:0"), netip.MustParseAddr("8.8.8.8")} {
		require.Empty(t, n.of(a), a)
	}
}

func FuzzDNS(f *testing.F) {
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("one.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	require.NoError(f, err)
	f.Add(b)
	f.Add(b[:11])
	o := &outside{names: internet}
	p, err := ParsePolicy([]string{"one.test", "*.sub.test"}, nil, nil)
	require.NoError(f, err)
	e := newEgress(Config{Policy: p, Upstream: Upstream{Lookup: o.lookup}})
	f.Fuzz(func(t *testing.T, b []byte) {
		reply := e.answer(b)
		var m dnsmessage.Message
		if reply != nil && (m.Unpack(reply) != nil || !m.Response || len(reply) > 600) {
			t.Fatalf("%x gave %x", b, reply)
		}
	})
}

// A name that changes its meaning after the check leads nowhere else.
func TestRebinding(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"evil.test"}, nil, nil)}, map[string][]string{"evil.test": {"203.0.113.1"}})
	require.Equal(t, dnsmessage.RCodeSuccess, w.query("evil.test.", dnsmessage.TypeA).RCode)
	w.mu.Lock()
	w.names["evil.test"] = []string{"169.254.169.254"}
	w.mu.Unlock()
	c, err := w.connect("198.18.1.0:80")
	require.NoError(t, err)
	got, err := exchange(c, "GET / HTTP/1.0\r\n\r\n")
	require.NoError(t, err)
	require.True(t, strings.HasSuffix(got, "\r\n\r\n203.0.113.1"), got)
	c, err = w.connect("198.18.0.1:3128")
	require.NoError(t, err)
	got, err = exchange(c, "CONNECT 198.18.1.0:80 HTTP/1.1\r\n\r\nGET / HTTP/1.0\r\n\r\n")
	require.NoError(t, err)
	require.True(t, strings.HasSuffix(got, "\r\n\r\n203.0.113.1"), got)
	w.e.resolver.mu.Lock()
	clear(w.e.resolver.known) // time passes
	w.e.resolver.mu.Unlock()
	w.requireReset("198.18.1.0:80")
	dialled, _ := w.seen()
	require.Equal(t, []string{"203.0.113.1:80", "203.0.113.1:80"}, dialled)
}

// A tunnel is to its target, whatever is said in it.
func TestSmuggling(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"one.test:80"}, nil, nil)}, internet)
	c, err := w.connect("198.18.0.1:3128")
	require.NoError(t, err)
	fmt.Fprint(c, "CONNECT one.test:80 HTTP/1.1\r\nHost: two.test\r\n\r\nCONNECT two.test:80 HTTP/1.1\r\n\r\nGET http://two.test/ HTTP/1.1\r\nHost: two.test\r\n\r\n")
	_ = c.(*net.TCPConn).CloseWrite()
	_, _ = io.ReadAll(c)
	dialled, _ := w.seen()
	require.Equal(t, []string{"203.0.113.1:80"}, dialled)
}

func TestHalfCloseAndCounts(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"203.0.113.1", "2001:db8::1"}, nil, nil)}, nil)
	big := strings.Repeat("a", 3<<20)
	for _, addr := range []string{"203.0.113.1:7", "[2001:db8::1]:7"} {
		c, err := w.connect(addr)
		require.NoError(t, err)
		got, err := exchange(c, big)
		require.NoError(t, err)
		require.Equal(t, strings.ToUpper(big), got)
	}
	w.requireReset("203.0.113.2:7")
	w.requireReset("203.0.113.1:9") // nobody is there
	require.NoError(t, w.e.Close())
	require.Equal(t, netns.Stats{Connections: 2, Denied: 1, UpBytes: 6 << 20, DownBytes: 6 << 20}, w.e.Stats())
}

func TestByteLimit(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"203.0.113.1"}, nil, nil), MaxBytes: 100_000}, nil)
	idle, err := w.connect("203.0.113.1:7")
	require.NoError(t, err)
	c, err := w.connect("203.0.113.1:7")
	require.NoError(t, err)
	_, err = exchange(c, strings.Repeat("a", 1<<20))
	require.Error(t, err)
	_, err = io.ReadAll(idle)
	require.ErrorIs(t, err, unix.ECONNRESET, "others end as well")
	w.requireReset("203.0.113.1:7")
	_, events := w.seen()
	require.Equal(t, netns.Decision{Via: "tcp", Address: "203.0.113.1", Port: 7, Rule: "byte limit 100000"}, events[len(events)-1])
	require.Equal(t, int64(100_000), w.e.Stats().UpBytes+w.e.Stats().DownBytes)
}

func TestBucket(t *testing.T) {
	b := newBucket(1000, 100)
	now := time.Now()
	require.Zero(t, b.spend(now, 100))
	require.Equal(t, 500*time.Millisecond, b.spend(now, 500))
	require.Equal(t, 600*time.Millisecond, b.spend(now, 100), "the second in debt waits behind the first")
	require.Zero(t, b.spend(now.Add(time.Second), 100), "the burst is all that is saved")
	require.False(t, b.try(now.Add(time.Second)))
	require.True(t, b.try(now.Add(time.Second+time.Millisecond)))
	var none *bucket
	require.Zero(t, none.spend(now, 1<<40))
}

// Who is over the rate waits, all connections together. At this one each may pass
// its first chunk, and then none another for as long as a test can take.
func TestRate(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"203.0.113.1"}, nil, nil), RateUpBPS: 80}, nil)
	for range 4 {
		c, err := w.connect("203.0.113.1:7")
		require.NoError(t, err)
		_, err = c.Write(make([]byte, 64<<10))
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return w.e.Stats().UpBytes == 4*minChunk }, 10*time.Second, 5*time.Millisecond)
	require.NoError(t, w.e.Close())
	require.Equal(t, int64(4*minChunk), w.e.Stats().UpBytes)
}

// A connection that nobody reads from holds one slot and stops who writes.
func TestSlowReader(t *testing.T) {
	w := newWorld(t, Config{Policy: policy(t, []string{"203.0.113.1"}, nil, nil), MaxConns: 2}, nil)
	l := w.listen("203.0.113.1", 1000)
	sent := make(chan int, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		n, _ := c.Write(make([]byte, 256<<20))
		sent <- n
	}()
	_, err := w.connect("203.0.113.1:1000")
	require.NoError(t, err)
	require.Less(t, <-sent, 64<<20)
	c, err := w.connect("203.0.113.1:7")
	require.NoError(t, err)
	got, err := exchange(c, "a")
	require.NoError(t, err)
	require.Equal(t, "A", got)
}

// A namespace of lo only, as a bake has, reaches the host's loopback where it is
// named, and nothing else.
func TestEgressFromANamespace(t *testing.T) {
	clearProxies(t)
	n := newNS(t)
	srv, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer srv.Close()
	go serveCapitals(srv)
	e, err := Open(n, Config{Policy: policy(t, []string{srv.Addr().String()}, nil, nil)})
	require.NoError(t, err)
	defer e.Close()
	ask := func(to string) (status, answer string) {
		require.NoError(t, n.Do(func() error {
			_, err := net.DialTimeout("tcp", srv.Addr().String(), time.Second)
			require.ErrorIs(t, err, unix.ECONNREFUSED, "loopback inside is the job's own")
			c, err := net.Dial("tcp", "198.18.0.1:3128")
			if err != nil {
				return err
			}
			defer c.Close()
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\nabc", to)
			_ = c.(*net.TCPConn).CloseWrite()
			br := bufio.NewReader(c)
			status, _ = br.ReadString('\n')
			b, err := io.ReadAll(br)
			answer = string(b)
			return err
		}))
		return status, answer
	}
	status, answer := ask(srv.Addr().String())
	require.Equal(t, "HTTP/1.1 200 Connection established\r\n", status)
	require.Equal(t, "\r\nABC", answer)
	status, answer = ask("127.0.0.1:22")
	require.Equal(t, "HTTP/1.1 403 Forbidden\r\n", status)
	require.Contains(t, answer, "sbxrun: 127.0.0.1:22 is denied (default deny)\n")
	rx, tx, err := n.Counters()
	require.NoError(t, err)
	require.Zero(t, rx+tx, "lo does not count")
}

// Privileges are needed by Open only. They cannot come back, so a process of its
// own gives them up.
func TestWithoutPrivilegesAfterOpen(t *testing.T) {
	need.Root(t)
	if os.Getenv("EGRESS_TEST_DROP") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "EGRESS_TEST_DROP=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		require.Contains(t, string(out), "--- PASS: "+t.Name())
		return
	}
	clearProxies(t)
	srv, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer srv.Close()
	go serveCapitals(srv)
	n := newNS(t)
	e, err := Open(n, Config{Policy: policy(t, []string{"localhost", "203.0.113.1"}, nil, nil), Upstream: Upstream{Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, srv.Addr().String())
	}}})
	require.NoError(t, err)
	in, err := n.Enter()
	require.NoError(t, err)
	defer in.Close()
	require.NoError(t, n.Close())
	require.NoError(t, errors.Join(syscall.Setgroups(nil), syscall.Setresgid(65534, 65534, 65534), syscall.Setresuid(65534, 65534, 65534)))
	for addr, text := range map[string]string{"203.0.113.1:7": "abc", "198.18.0.1:3128": "CONNECT localhost:7 HTTP/1.1\r\n\r\nabc"} {
		var c net.Conn
		require.NoError(t, in.Do(func() (err error) {
			c, err = net.Dial("tcp", addr)
			return err
		}))
		got, err := exchange(c, text)
		require.NoError(t, err)
		require.True(t, strings.HasSuffix(got, "ABC"), got)
		c.Close()
	}
	require.NoError(t, e.Close())
	require.Equal(t, netns.Stats{Connections: 2, UpBytes: 6, DownBytes: 6}, e.Stats())
}

// The kernel's memory of connections is not the job's to fill.
func TestConntrackIsBounded(t *testing.T) {
	w := newWorld(t, Config{Policy: &Policy{}}, nil)
	const sent = 40_000
	require.Empty(t, w.run(fmt.Sprintf(`/usr/bin/python3 - <<'E'
import socket
for i in range(%d):
    if i %% 20000 == 0:
        s = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(100)]
        for k, x in enumerate(s): x.bind(("5.5.%%d.%%d" %% (i / 20000, k), 0))
    try: s[i %% 100].sendto(b"x", ("6.%%d.%%d.1" %% (i / 200 %% 200, i / 40000), 53))
    except PermissionError: pass
E`, sent)))
	var count string
	require.NoError(t, w.ns.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		count = strings.TrimSpace(string(b))
		return err
	}))
	n, err := strconv.Atoi(count)
	require.NoError(t, err)
	require.Less(t, n, sent/2)
}

func TestNothingIsLeft(t *testing.T) {
	descriptors := func() int {
		runtime.GC()
		runtime.GC() // splice's pipes go with the pool that holds them
		time.Sleep(10 * time.Millisecond)
		ents, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(ents)
	}
	newWorld(t, Config{Policy: &Policy{}}, nil).e.Close()
	routines, fds := runtime.NumGoroutine(), descriptors()
	n := newNS(t)
	for range 5 {
		e, err := Open(n, Config{Policy: policy(t, []string{"203.0.113.1"}, nil, nil), Upstream: Upstream{Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}})
		require.NoError(t, err)
		var conns []net.Conn
		require.NoError(t, n.Do(func() error {
			for _, a := range []string{"203.0.113.1:1", "198.18.0.1:3128", "8.8.8.8:53"} {
				c, err := net.Dial("tcp", a)
				require.NoError(t, err)
				conns = append(conns, c)
			}
			return nil
		}))
		require.NoError(t, e.Close())
		require.NoError(t, e.Close())
		for _, c := range conns {
			c.Close()
		}
		n.Close()
		n = newNS(t)
	}
	n.Close()
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > routines || descriptors() > fds; time.Sleep(50 * time.Millisecond) {
		require.True(t, time.Now().Before(end), "%d goroutines of %d, %d descriptors of %d", runtime.NumGoroutine(), routines, descriptors(), fds)
	}
}

func TestOpenTwiceIsAnError(t *testing.T) {
	n := newNS(t)
	e, err := Open(n, Config{Policy: &Policy{}})
	require.NoError(t, err)
	defer e.Close()
	_, err = Open(n, Config{Policy: &Policy{}})
	require.ErrorIs(t, err, unix.EEXIST)
	_, err = Open(n, Config{})
	require.EqualError(t, err, "open network: no policy")
}

// Without IPv6 on the host there is IPv4.
func TestWithoutIPv6(t *testing.T) {
	n := newNS(t)
	require.NoError(t, n.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte("1"), 0)
	}))
	e, err := Open(n, Config{Policy: &Policy{}})
	require.NoError(t, err)
	require.False(t, e.sockets.v6)
	require.NoError(t, e.Close())
}

// What the kernel says about any message of a transaction is the error.
func TestKernelWithoutAPartOfNFTables(t *testing.T) {
	n := newNS(t)
	err := n.Do(func() error {
		return transaction(func(c *nftables.Conn) {
			table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "x"})
			c.AddChain(&nftables.Chain{Table: table, Name: "a", Type: "none-such", Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw})
			c.AddChain(&nftables.Chain{Table: table, Name: "b", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw})
		})
	})
	require.ErrorIs(t, err, unix.ENOENT)
	var h interface{ Hint() string }
	require.ErrorAs(t, err, &h)
	require.Contains(t, h.Hint(), "nf_tables")
}

// A connection that knows nothing of the host's proxy goes through it all the
// same, by name: behind such a proxy the host itself may know no name.
func TestTransparentThroughTheHostsProxy(t *testing.T) {
	clearProxies(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	heads := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		br := bufio.NewReader(c)
		line, _ := br.ReadString('\n')
		heads <- line
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\nhello")
	}()
	t.Setenv("HTTPS_PROXY", l.Addr().String())
	n := newNS(t)
	e, err := Open(n, Config{Policy: policy(t, []string{"one.test"}, nil, nil), Upstream: Upstream{Lookup: func(context.Context, string) ([]netip.Addr, error) {
		t.Error("looked up")
		return nil, errors.New("no names here")
	}}})
	require.NoError(t, err)
	defer e.Close()
	w := &world{t: t, ns: n, e: e}
	require.Equal(t, dnsmessage.RCodeSuccess, w.query("one.test.", dnsmessage.TypeA).RCode)
	c, err := w.connect("198.18.1.0:443")
	require.NoError(t, err)
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, "hello", string(b))
	require.Equal(t, "CONNECT one.test:443 HTTP/1.1\r\n", <-heads)
}

// A log that hangs holds nothing up, and what it missed is counted.
func TestSlowLog(t *testing.T) {
	hang := make(chan bool)
	var got []netns.Decision
	j := openJournal(func(d netns.Decision) {
		<-hang
		got = append(got, d)
	})
	for range journalSize + 50 {
		j.note(netns.Decision{Via: "dns"})
	}
	close(hang)
	j.close()
	require.Regexp(t, `^(49|50) decisions were not logged: they came too fast$`, got[1].Rule)
}

// Connections that come in masses, and that nobody finishes, take no more than
// their slots, and leave the next ones alone once they are gone.
func TestFlood(t *testing.T) {
	shorten(t, &slotTimeout, 50*time.Millisecond)
	w := newWorld(t, Config{Policy: policy(t, []string{"203.0.113.1"}, nil, nil), MaxConns: 8}, nil)
	before := runtime.NumGoroutine()
	var flood []net.Conn
	require.NoError(t, w.ns.Do(func() error {
		for range 500 {
			if c, err := net.Dial("tcp", "198.18.0.1:3128"); err == nil {
				flood = append(flood, c)
			}
		}
		return nil
	}))
	require.Less(t, runtime.NumGoroutine(), before+40)
	require.Eventually(t, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Contains(w.events, netns.Decision{Via: "tcp", Address: "198.18.0.1", Port: 3128, Rule: "connection limit 8"})
	}, 10*time.Second, 10*time.Millisecond)
	for _, c := range flood {
		c.Close()
	}
	require.Eventually(t, func() bool {
		c, err := w.connect("203.0.113.1:7")
		if err != nil {
			return false
		}
		got, err := exchange(c, "a")
		return err == nil && got == "A"
	}, 20*time.Second, 20*time.Millisecond)
}

// BenchmarkStream compares a stream through the diversion and the tunnel with
// one on a loopback.
func BenchmarkStream(b *testing.B) {
	w := newWorld(b, Config{Policy: policy(b, []string{"203.0.113.1"}, nil, nil)}, nil)
	l := w.listen("203.0.113.1", 1000)
	ends := make(chan bool)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 256<<10)
			for err == nil {
				_, err = c.Read(buf)
			}
			c.Close()
			ends <- true
		}
	}()
	for name, ns := range map[string]*netns.NS{"loopback": w.internet, "egress": w.ns} {
		b.Run(name, func(b *testing.B) {
			var c net.Conn
			require.NoError(b, ns.Do(func() (err error) {
				c, err = net.Dial("tcp", "203.0.113.1:1000")
				return err
			}))
			buf := make([]byte, 1<<20)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				_, err := c.Write(buf)
				require.NoError(b, err)
			}
			c.Close()
			<-ends
		})
	}
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
