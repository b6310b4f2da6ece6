package publish

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/need"
)

// sandbox is a namespace with servers, and what was said of it.
type sandbox struct {
	t  *testing.T
	ns *netns.NS
	in *netns.Inside

	mu        sync.Mutex
	decisions []netns.Decision
}

func newSandbox(t *testing.T) *sandbox {
	t.Helper()
	need.Root(t)
	s := &sandbox{t: t}
	var err error
	s.ns, err = netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { s.ns.Close() })
	s.in, err = s.ns.Enter()
	require.NoError(t, err)
	t.Cleanup(s.in.Close)
	return s
}

func (s *sandbox) note(d netns.Decision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decisions = append(s.decisions, d)
}

func (s *sandbox) noted() []netns.Decision {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]netns.Decision(nil), s.decisions...)
}

// publish opens one port and gives its address.
func (s *sandbox) publish(p netns.Port, maxConns int) (*Forwarder, string) {
	s.t.Helper()
	f, ports, err := Open(s.in, netns.Options{Publish: []netns.Port{p}, MaxConns: maxConns}, s.note)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, f.Close()) })
	require.Len(s.t, ports, 1)
	require.NotZero(s.t, ports[0].HostPort)
	p.HostPort = ports[0].HostPort
	require.Equal(s.t, []netns.Port{p}, ports)
	host := p.HostIP
	if host == "" {
		host = "127.0.0.1"
	}
	return f, net.JoinHostPort(host, strconv.Itoa(p.HostPort))
}

func tcp(port int) netns.Port {
	return netns.Port{Proto: "tcp", HostIP: "127.0.0.1", ContainerPort: port}
}

func udp(port int) netns.Port {
	return netns.Port{Proto: "udp", HostIP: "127.0.0.1", ContainerPort: port}
}

// serve has each connection to address inside handled.
func (s *sandbox) serve(address string, handle func(*net.TCPConn)) {
	s.t.Helper()
	var l net.Listener
	require.NoError(s.t, s.in.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	}))
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	s.t.Cleanup(func() { l.Close(); running.Wait() })
}

// serveUDP answers each datagram with itself, until stop.
func (s *sandbox) serveUDP(address string) (stop func()) {
	s.t.Helper()
	var c net.PacketConn
	require.NoError(s.t, s.in.Do(func() (err error) {
		c, err = net.ListenPacket("udp", address)
		return err
	}))
	var running sync.WaitGroup
	running.Go(func() {
		b := make([]byte, maxDatagramBytes)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(b[:n], from)
		}
	})
	stop = func() { c.Close(); running.Wait() }
	s.t.Cleanup(stop)
	return stop
}

func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

func dial(t *testing.T, network, address string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, address)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second))) // a failure instead of a test that hangs
	return c
}

func say(t *testing.T, c net.Conn, text string) {
	t.Helper()
	_, err := io.WriteString(c, text)
	require.NoError(t, err)
}

func hear(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, text, string(b))
}

// ask asks until an answer comes: datagrams may be lost while an address inside is found.
func ask(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, maxDatagramBytes)
	for range 100 {
		say(t, c, text)
		require.NoError(t, c.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
		if n, err := c.Read(b); err == nil && string(b[:n]) == text { // else an earlier one's
			return
		}
	}
	t.Fatal("no answer")
}

func TestEveryKindOfPortReachesAServer(t *testing.T) {
	for _, c := range []struct{ proto, hostIP, inside, rule string }{
		{"tcp", "127.0.0.1", "127.0.0.1:80", "-p 127.0.0.1:0:80"},
		{"tcp", "::1", "127.0.0.1:80", "-p [::1]:0:80"},
		{"tcp", "", "0.0.0.0:80", "-p 0:80"},
		{"tcp", "127.0.0.1", "[::1]:80", "-p 127.0.0.1:0:80"},
		{"tcp", "127.0.0.1", "[::]:80", "-p 127.0.0.1:0:80"},
		{"udp", "127.0.0.1", "127.0.0.1:80", "-p 127.0.0.1:0:80/udp"},
		{"udp", "::1", "0.0.0.0:80", "-p [::1]:0:80/udp"},
		{"udp", "0.0.0.0", "127.0.0.1:80", "-p 0.0.0.0:0:80/udp"},
		{"udp", "", "127.0.0.1:80", "-p 0:80/udp"},
		{"udp", "127.0.0.1", "[::1]:80", "-p 127.0.0.1:0:80/udp"},
	} {
		t.Run(strings.Join([]string{c.proto, c.hostIP, c.inside}, " "), func(t *testing.T) {
			s := newSandbox(t)
			f, addr := s.publish(netns.Port{Proto: c.proto, HostIP: c.hostIP, ContainerPort: 80}, 0)
			if c.proto == "tcp" {
				s.serve(c.inside, echo)
			} else {
				s.serveUDP(c.inside)
			}
			conn := dial(t, c.proto, addr)
			if c.proto == "udp" {
				ask(t, conn, "hello")
			} else {
				say(t, conn, "hello")
				hear(t, conn, "hello")
			}
			require.NoError(t, f.Close())
			at := "127.0.0.1"
			if strings.Contains(c.inside, "[::1]") {
				at = "::1"
			}
			conns, in, out := f.Stats()
			require.Equal(t, [2]int64{1, 5}, [2]int64{conns, out})
			require.GreaterOrEqual(t, in, int64(5))
			d := s.noted()
			require.Len(t, d, 1)
			d[0].Time = time.Time{}
			require.Equal(t, netns.Decision{Via: "publish", Address: at, Port: 80, Allowed: true, Rule: c.rule}, d[0])
		})
	}
}

// All addresses means those of both families.
func TestEveryAddressIsServed(t *testing.T) {
	s := newSandbox(t)
	s.serve("127.0.0.1:80", echo)
	_, addr := s.publish(netns.Port{Proto: "tcp", ContainerPort: 80}, 0)
	_, port, _ := net.SplitHostPort(addr)
	for _, ip := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		c := dial(t, "tcp", net.JoinHostPort(ip, port))
		say(t, c, ip)
		hear(t, c, ip)
	}
}

func TestHalfClose(t *testing.T) {
	s := newSandbox(t)
	s.serve("127.0.0.1:80", func(c *net.TCPConn) { // answers when all was said
		b, _ := io.ReadAll(c)
		fmt.Fprintf(c, "%d bytes", len(b))
	})
	s.serve("127.0.0.1:81", func(c *net.TCPConn) { // says all, then listens
		_, _ = io.WriteString(c, "bye")
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		s.note(netns.Decision{Via: "test", Rule: string(b)})
	})
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			f, ports, addrs := s.open(t, network, 80, 81)
			_ = ports
			c := dial(t, network, addrs[0])
			say(t, c, "twelve bytes")
			require.NoError(t, c.(half).CloseWrite())
			b, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "12 bytes", string(b))

			c = dial(t, network, addrs[1])
			b, err = io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "bye", string(b))
			say(t, c, "last word of "+network)
			require.NoError(t, c.Close())
			require.Eventually(t, func() bool {
				for _, d := range s.noted() {
					if d.Rule == "last word of "+network {
						return true
					}
				}
				return false
			}, 10*time.Second, 5*time.Millisecond)
			require.NoError(t, f.Close())
		})
	}
}

// open publishes ports by TCP or as UNIX sockets.
func (s *sandbox) open(t *testing.T, network string, inside ...int) (*Forwarder, []netns.Port, []string) {
	t.Helper()
	var ports []netns.Port
	var sockets []netns.UnixPort
	var addrs []string
	dir := t.TempDir()
	for _, p := range inside {
		if network == "tcp" {
			ports = append(ports, tcp(p))
			continue
		}
		sockets = append(sockets, netns.UnixPort{Path: filepath.Join(dir, strconv.Itoa(p)), ContainerPort: p})
		addrs = append(addrs, sockets[len(sockets)-1].Path)
	}
	f, ports, err := Open(s.in, netns.Options{Publish: ports, ExposeUnix: sockets}, s.note)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	for _, p := range ports {
		addrs = append(addrs, p.Host())
	}
	return f, ports, addrs
}

func TestMuchBothWaysAtOnce(t *testing.T) {
	const size = 48 << 20
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i * 7 >> 3)
	}
	want := sha256.New()
	for range size / len(block) {
		want.Write(block)
	}
	// talk writes and reads size bytes at once, and gives what was read.
	talk := func(c half) (string, error) {
		failed := make(chan error, 1)
		go func() {
			var err error
			for range size / len(block) {
				if _, e := c.Write(block); e != nil {
					err = e
				}
			}
			failed <- errors.Join(err, c.CloseWrite())
		}()
		h := sha256.New()
		_, err := io.Copy(h, c)
		return string(h.Sum(nil)), errors.Join(err, <-failed)
	}
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			s := newSandbox(t)
			type result struct {
				sum string
				err error
			}
			got := make(chan result, 1)
			s.serve("127.0.0.1:80", func(c *net.TCPConn) {
				sum, err := talk(c)
				got <- result{sum, err}
			})
			f, _, addrs := s.open(t, network, 80)
			sum, err := talk(dial(t, network, addrs[0]).(half))
			require.NoError(t, err)
			require.Equal(t, string(want.Sum(nil)), sum)
			require.Equal(t, result{string(want.Sum(nil)), nil}, <-got)
			require.NoError(t, f.Close())
			conns, in, out := f.Stats()
			require.Equal(t, [3]int64{1, size, size}, [3]int64{conns, in, out})
		})
	}
}

func TestTwoHundredConnections(t *testing.T) {
	s := newSandbox(t)
	s.serve("127.0.0.1:80", echo)
	f, addr := s.publish(tcp(80), 0)
	var all sync.WaitGroup
	var here sync.WaitGroup
	here.Add(200)
	errs := make(chan error, 200)
	for i := range 200 {
		all.Go(func() {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				here.Done()
				errs <- err
				return
			}
			defer c.Close()
			text := fmt.Sprintf("client %d", i)
			_, err = io.WriteString(c, text)
			b := make([]byte, len(text))
			if err == nil {
				_, err = io.ReadFull(c, b)
			}
			here.Done()
			here.Wait() // all are open at once
			if err == nil && string(b) != text {
				err = fmt.Errorf("%q was answered %q", text, b)
			}
			errs <- err
		})
	}
	all.Wait()
	for range 200 {
		require.NoError(t, <-errs)
	}
	conns, _, _ := f.Stats()
	require.Equal(t, int64(200), conns)
}

// While no server is there a client is told so at once, and later it is served.
func TestNobodyListensYet(t *testing.T) {
	s := newSandbox(t)
	f, addr := s.publish(tcp(80), 0)
	c, err := net.Dial("tcp", addr)
	if err == nil { // else the reset came before connect returned
		defer c.Close()
		_, err = io.ReadAll(c)
	}
	require.ErrorIs(t, err, unix.ECONNRESET)
	d := s.noted()
	require.Len(t, d, 1)
	require.Equal(t, "connect to 127.0.0.1:80 in the namespace: connection refused", d[0].Error)
	require.True(t, d[0].Allowed)
	s.serve("127.0.0.1:80", echo)
	c = dial(t, "tcp", addr)
	say(t, c, "now")
	hear(t, c, "now")
	conns, _, _ := f.Stats()
	require.Equal(t, int64(1), conns)
}

// A reset is told to the other side as one, and what was sent before it arrives.
func TestReset(t *testing.T) {
	s := newSandbox(t)
	ended := make(chan error, 1)
	s.serve("127.0.0.1:80", func(c *net.TCPConn) {
		_, err := io.ReadAll(c)
		ended <- err
	})
	s.serve("127.0.0.1:81", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1)) // of more: the close is a reset
		_, _ = io.WriteString(c, "refused")
	})
	_, addr := s.publish(tcp(80), 0)
	c := dial(t, "tcp", addr).(*net.TCPConn)
	say(t, c, "x")
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	require.ErrorIs(t, <-ended, unix.ECONNRESET)

	_, addr = s.publish(tcp(81), 0)
	c = dial(t, "tcp", addr).(*net.TCPConn)
	say(t, c, "a long request")
	b, err := io.ReadAll(c)
	require.Equal(t, "refused", string(b))
	require.ErrorIs(t, err, unix.ECONNRESET)
}

// A client that does not read stops its server, and nobody else's.
func TestSlowReader(t *testing.T) {
	const much = 256 << 20
	s := newSandbox(t)
	written := make(chan int, 1)
	s.serve("127.0.0.1:80", func(c *net.TCPConn) {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		n, _ := c.Write(make([]byte, much))
		written <- n
	})
	s.serve("127.0.0.1:81", echo)
	_, slow := s.publish(tcp(80), 0)
	_, other := s.publish(tcp(81), 0)
	c := dial(t, "tcp", slow)
	o := dial(t, "tcp", other)
	say(t, o, "quick")
	hear(t, o, "quick")
	n := <-written
	require.Less(t, n, much)
	got, err := io.Copy(io.Discard, c)
	require.NoError(t, err)
	require.Equal(t, int64(n), got)
}

// Beyond maxConns connections wait, and do not reach the server.
func TestFloodOfSilentConnections(t *testing.T) {
	const limit = 4
	s := newSandbox(t)
	var now, most atomic.Int64
	s.serve("127.0.0.1:80", func(c *net.TCPConn) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		_, _ = io.Copy(c, c)
		now.Add(-1)
	})
	_, addr := s.publish(tcp(80), limit)
	var silent []net.Conn
	for range 10 * limit {
		silent = append(silent, dial(t, "tcp", addr))
	}
	last := dial(t, "tcp", addr)
	say(t, last, "patience")
	require.Eventually(t, func() bool { return now.Load() == limit }, 10*time.Second, 5*time.Millisecond)
	require.NoError(t, last.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	_, err := last.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, last.SetDeadline(time.Now().Add(20*time.Second)))
	for _, c := range silent {
		require.NoError(t, c.Close())
	}
	hear(t, last, "patience")
	require.LessOrEqual(t, most.Load(), int64(limit))
}

// counted counts how often it is asked.
type counted struct {
	net.Listener
	asked atomic.Int64
}

func (l *counted) Accept() (net.Conn, error) {
	l.asked.Add(1)
	return l.Listener.Accept()
}

func TestNoDescriptorsLeftIsNotSpun(t *testing.T) {
	s := newSandbox(t)
	s.serve("127.0.0.1:80", echo)
	f, addr := s.publish(tcp(80), 0)
	first := dial(t, "tcp", addr) // the server inside waits from here on: it is not what is tested
	say(t, first, "x")
	hear(t, first, "x")
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer inner.Close()
	l := &counted{Listener: inner}
	f.running.Go(func() { f.accept(l, target{port: 80}) })

	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	file := os.NewFile(uintptr(fd), "client")
	defer file.Close()
	dir, err := os.Open("/proc/self/fd") // the lowest number that is free is above all in use
	require.NoError(t, err)
	var was unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}))
	cerr := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: inner.Addr().(*net.TCPAddr).Port})
	time.Sleep(300 * time.Millisecond)
	asked := l.asked.Load()
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
	dir.Close()
	require.NoError(t, cerr)
	require.Greater(t, asked, int64(1))
	require.Less(t, asked, int64(12))
	_, err = unix.Write(fd, []byte("later"))
	require.NoError(t, err)
	b := make([]byte, 5)
	_, err = io.ReadFull(file, b)
	require.NoError(t, err)
	require.Equal(t, "later", string(b))
	inner.Close()
}

// What a server has sent before it ended is delivered, also when Close comes first.
func TestCloseDeliversTheLastAnswer(t *testing.T) {
	s := newSandbox(t)
	answer := bytes.Repeat([]byte("answer"), 40_000)
	done := make(chan struct{})
	s.serve("127.0.0.1:80", func(c *net.TCPConn) {
		_, _ = c.Write(answer)
		c.Close()
		close(done)
	})
	f, addr := s.publish(tcp(80), 0)
	c := dial(t, "tcp", addr)
	<-done
	require.NoError(t, f.Close())
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	require.True(t, bytes.Equal(answer, b), "%d bytes of %d", len(b), len(answer))
}

// sockets are the descriptors of sockets (pipes may be the runtime's, kept for splice).
func sockets(t *testing.T) map[string]bool {
	t.Helper()
	ents, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	open := map[string]bool{}
	for _, e := range ents {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			open[to] = true
		}
	}
	return open
}

func TestCloseLeavesNothing(t *testing.T) {
	s := newSandbox(t)
	s.serve("127.0.0.1:80", echo)
	s.serve("127.0.0.1:81", func(c *net.TCPConn) { _, _ = c.Write(make([]byte, 64<<20)) })
	s.serveUDP("127.0.0.1:82")
	path := filepath.Join(t.TempDir(), "s")
	before, goroutines := sockets(t), runtime.NumGoroutine()
	f, ports, err := Open(s.in, netns.Options{Publish: []netns.Port{tcp(80), tcp(81), udp(82), tcp(83)}, ExposeUnix: []netns.UnixPort{{Path: path, ContainerPort: 80}}}, nil)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	var clients []net.Conn
	for _, p := range ports {
		c, err := net.Dial(p.Proto, p.Host())
		if p.ContainerPort == 83 && err != nil {
			continue // nobody listens there: a reset may come at any time
		}
		require.NoError(t, err)
		_, err = io.WriteString(c, "x")
		require.True(t, err == nil || p.ContainerPort == 83, err)
		clients = append(clients, c)
	}
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	clients = append(clients, c)
	require.Eventually(t, func() bool { conns, _, _ := f.Stats(); return conns == 4 }, 10*time.Second, 5*time.Millisecond)
	require.NoError(t, f.Close())
	require.NoError(t, f.Close())
	require.Empty(t, f.streams)
	for _, c := range clients {
		require.NoError(t, c.Close())
	}
	require.Eventually(t, func() bool { // the servers' goroutines have to notice
		for s := range sockets(t) {
			if !before[s] {
				return false
			}
		}
		return runtime.NumGoroutine() <= goroutines+1 // this one
	}, 10*time.Second, 10*time.Millisecond)
}

func TestPortsThatCannotBeHad(t *testing.T) {
	s := newSandbox(t)
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busy.Close()
	busyUDP, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busyUDP.Close()
	number := func(a net.Addr) int { _, p, _ := net.SplitHostPort(a.String()); n, _ := strconv.Atoi(p); return n }
	before := sockets(t)
	for _, c := range []struct {
		p          netns.Port
		cause      error
		says, hint string
	}{
		{netns.Port{Proto: "tcp", HostIP: "127.0.0.1", HostPort: number(busy.Addr()), ContainerPort: 80}, unix.EADDRINUSE, "address already in use", "-p 0:80"},
		{netns.Port{Proto: "tcp", HostPort: number(busy.Addr()), ContainerPort: 80}, unix.EADDRINUSE, "address already in use", "-p 0:80"},
		{netns.Port{Proto: "udp", HostIP: "127.0.0.1", HostPort: number(busyUDP.LocalAddr()), ContainerPort: 53}, unix.EADDRINUSE, "address already in use", "-p 0:53"},
		{netns.Port{Proto: "tcp", HostIP: "198.51.100.7", HostPort: 8080, ContainerPort: 80}, unix.EADDRNOTAVAIL, `publish "-p 198.51.100.7:8080:80": bind: cannot assign`, "-p 8080:80"},
		{netns.Port{Proto: "sctp", ContainerPort: 80}, nil, `protocol "sctp"`, ""},
		{netns.Port{Proto: "tcp", HostIP: "localhost", ContainerPort: 80}, nil, `"localhost" is not an IP address`, ""},
		{netns.Port{Proto: "tcp", HostPort: 65536, ContainerPort: 80}, nil, "host port 65536", ""},
		{netns.Port{Proto: "tcp"}, nil, "port 0 in the namespace", ""},
	} {
		_, _, err := Open(s.in, netns.Options{Publish: []netns.Port{tcp(80), udp(80), c.p}}, nil)
		require.ErrorContains(t, err, c.says)
		if c.cause != nil {
			require.ErrorIs(t, err, c.cause)
		}
		var h interface{ Hint() string }
		if errors.As(err, &h) {
			require.Contains(t, h.Hint(), c.hint)
		} else {
			require.Empty(t, c.hint)
		}
	}
	require.Equal(t, before, sockets(t))
}

func TestUnixSocket(t *testing.T) {
	s := newSandbox(t)
	s.serve("127.0.0.1:80", echo)
	dir := t.TempDir()
	long := filepath.Join(dir, strings.Repeat("d", 120))
	require.NoError(t, os.Mkdir(long, 0o700))
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink("nowhere", link))
	served := filepath.Join(dir, "served")
	other, err := net.Listen("unix", served)
	require.NoError(t, err)
	defer other.Close()
	left := filepath.Join(dir, "left")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	require.NoError(t, err)
	dead.SetUnlinkOnClose(false)
	require.NoError(t, dead.Close())
	for _, c := range []struct {
		path  string
		port  int
		cause error // nil: it works
	}{
		{filepath.Join(dir, "new"), 80, nil},
		{left, 80, nil},
		{filepath.Join(long, "s"), 80, nil},
		{file, 80, unix.EEXIST},
		{link, 80, unix.EEXIST},
		{dir, 80, unix.EEXIST},
		{served, 80, unix.EADDRINUSE},
		{filepath.Join(dir, "no", "s"), 80, unix.ENOENT},
	} {
		t.Run(filepath.Base(c.path), func(t *testing.T) {
			f, _, err := Open(s.in, netns.Options{ExposeUnix: []netns.UnixPort{{Path: c.path, ContainerPort: c.port}}}, nil)
			if c.cause != nil {
				require.ErrorIs(t, err, c.cause)
				require.ErrorContains(t, err, strconv.Quote(c.path))
				return
			}
			require.NoError(t, err)
			defer f.Close()
			st, err := os.Lstat(c.path)
			require.NoError(t, err)
			require.Equal(t, os.ModeSocket|0o600, st.Mode())
			if len(c.path) < 108 {
				conn := dial(t, "unix", c.path)
				say(t, conn, "hello")
				hear(t, conn, "hello")
			}
			_, _, err = Open(s.in, netns.Options{ExposeUnix: []netns.UnixPort{{Path: c.path, ContainerPort: c.port}}}, nil)
			require.ErrorIs(t, err, unix.EADDRINUSE)
			require.NoError(t, f.Close())
			require.FileExists(t, c.path) // the caller's to remove
		})
	}
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))
	c := dial(t, "unix", served)
	c.Close()
	names, err := filepath.Glob(filepath.Join(dir, ".sbxrun*"))
	require.NoError(t, err)
	require.Empty(t, names)
}

// Of many that find the same stale socket, one has it in the end and serves.
func TestStaleUnixSocketIsTakenByOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 30 {
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		require.NoError(t, err)
		dead.SetUnlinkOnClose(false)
		require.NoError(t, dead.Close())
		won := make(chan net.Listener, 8)
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				if l, err := placeUnix(path); err == nil {
					won <- l
				}
			})
		}
		all.Wait()
		require.Len(t, won, 1)
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		c.Close()
		(<-won).Close()
		require.NoError(t, os.Remove(path))
	}
}

func TestDatagrams(t *testing.T) {
	t.Run("each client gets its answers", func(t *testing.T) {
		s := newSandbox(t)
		s.serveUDP("127.0.0.1:80")
		_, addr := s.publish(udp(80), 0)
		var clients []net.Conn
		for range 20 {
			clients = append(clients, dial(t, "udp", addr))
		}
		for range 3 {
			for i, c := range clients {
				ask(t, c, fmt.Sprintf("client %d", i))
			}
		}
		ask(t, clients[0], strings.Repeat("x", 65507))
	})
	// A connected socket takes answers only from where it asked.
	t.Run("answers come from the address that was asked", func(t *testing.T) {
		s := newSandbox(t)
		s.serveUDP("127.0.0.1:80")
		for _, all := range []string{"", "0.0.0.0"} {
			_, addr := s.publish(netns.Port{Proto: "udp", HostIP: all, ContainerPort: 80}, 0)
			_, port, _ := net.SplitHostPort(addr)
			ask(t, dial(t, "udp", "127.0.0.77:"+port), "hello")
		}
	})
	t.Run("a server that comes, goes and comes elsewhere", func(t *testing.T) {
		s := newSandbox(t)
		_, addr := s.publish(udp(80), 0)
		c := dial(t, "udp", addr)
		say(t, c, "nobody there")
		for _, at := range []string{"127.0.0.1:80", "[::1]:80", "127.0.0.1:80"} {
			stop := s.serveUDP(at)
			ask(t, c, at)
			stop()
		}
	})
	t.Run("a full table keeps who is answered", func(t *testing.T) {
		s := newSandbox(t)
		s.serveUDP("127.0.0.1:80")
		silent := netns.Port{Proto: "udp", HostIP: "127.0.0.1", ContainerPort: 80}
		f, addr := s.publish(silent, 3)
		talks := dial(t, "udp", addr)
		ask(t, talks, "hello")
		u := &udpPort{f: f, flows: map[udpClient]*flow{}}
		now := time.Now()
		for i, fl := range []*flow{{answered: true, last: now.Add(-time.Hour)}, {last: now}, {last: now.Add(-time.Minute)}} {
			fl.client.at = strconv.Itoa(i)
			u.flows[fl.client] = fl
		}
		require.Equal(t, "2", u.leastWanted().client.at)
		before := len(sockets(t))
		for range 50 {
			c, err := net.Dial("udp", addr)
			require.NoError(t, err)
			ask(t, c, "flood")
			c.Close()
		}
		require.LessOrEqual(t, len(sockets(t)), before+2)
		ask(t, talks, "still there")
	})
	t.Run("idle clients are forgotten, and come back", func(t *testing.T) {
		was := udpIdle
		udpIdle = 50 * time.Millisecond
		defer func() { udpIdle = was }()
		s := newSandbox(t)
		s.serveUDP("127.0.0.1:80")
		before := len(sockets(t))
		f, addr := s.publish(udp(80), 0)
		c := dial(t, "udp", addr)
		ask(t, c, "hello")
		require.Eventually(t, func() bool { return len(sockets(t)) == before+2 }, 10*time.Second, 10*time.Millisecond)
		ask(t, c, "again")
		require.NoError(t, f.Close())
	})
}

// In a process of its own, as privileges go for good.
func TestServesWithoutPrivileges(t *testing.T) {
	dir := os.Getenv("PUBLISH_CHILD")
	if dir == "" {
		need.Root(t)
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "PUBLISH_CHILD="+t.TempDir())
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "--- PASS: "+t.Name())
		return
	}
	s := newSandbox(t)
	path := filepath.Join(dir, "s")
	f, ports, err := Open(s.in, netns.Options{Publish: []netns.Port{tcp(80), udp(80)}, ExposeUnix: []netns.UnixPort{{Path: path, ContainerPort: 80}}}, s.note)
	require.NoError(t, err)
	// Servers of another's, before: the port is privileged inside too.
	s.serve("127.0.0.1:80", echo)
	s.serveUDP("127.0.0.1:80")
	toUnix := dial(t, "unix", path)
	const id = 1<<30 + 1
	require.NoError(t, unix.Setgroups(nil))
	require.NoError(t, unix.Setresgid(id, id, id))
	require.NoError(t, unix.Setresuid(id, id, id))
	require.ErrorIs(t, s.ns.Do(func() error { return nil }), unix.EPERM)
	for range 3 {
		c := dial(t, "tcp", ports[0].Host())
		say(t, c, "hello")
		hear(t, c, "hello")
		ask(t, dial(t, "udp", ports[1].Host()), "hello")
	}
	say(t, toUnix, "hello")
	hear(t, toUnix, "hello")
	if start, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil && strings.TrimSpace(string(start)) == "1024" {
		_, _, err := Open(s.in, netns.Options{Publish: []netns.Port{{Proto: "tcp", HostIP: "127.0.0.1", HostPort: 81, ContainerPort: 80}}}, nil)
		require.ErrorIs(t, err, unix.EACCES)
		var h interface{ Hint() string }
		require.ErrorAs(t, err, &h)
		require.Contains(t, h.Hint(), "-p 8081:80")
	}
	require.NoError(t, f.Close())
}
