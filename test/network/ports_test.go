package network_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// serversOnLoopback are a web server, a counter that answers when its client has
// ended, and an echo by UDP, all on 127.0.0.1 and ports below 1024.
const serversOnLoopback = attackLibrary + `
import http.server, threading
class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "5"); self.end_headers(); self.wfile.write(b"hello")
    def log_message(self, *a): pass
web = http.server.ThreadingHTTPServer(("127.0.0.1", 80), Web)
counter = socket.create_server(("127.0.0.1", 81))
echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); echo.bind(("127.0.0.1", 53))
def count():
    while True:
        c, _ = counter.accept(); n = 0
        while b := c.recv(65536): n += len(b)
        c.sendall(b"%d" % n); c.close()
def answer():
    while True:
        b, a = echo.recvfrom(2000); echo.sendto(b[::-1], a)
for f in (web.serve_forever, count, answer): threading.Thread(target=f, daemon=True).start()
print("up", flush=True); sys.stdin.read()`

// talk connects to a published port from the host, says something, ends its half
// and reads all of the answer.
func talk(t *testing.T, w *world, network, addr, say string) string {
	t.Helper()
	var c net.Conn
	require.NoError(t, w.host.Do(func() (err error) {
		c, err = net.DialTimeout(network, addr, 5*time.Second)
		return err
	}), "%s %s", network, addr)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err := io.WriteString(c, say)
	require.NoError(t, err)
	if network == "udp" {
		b := make([]byte, 2000)
		n, err := c.Read(b)
		require.NoError(t, err, "%s %s", network, addr)
		return string(b[:n])
	}
	require.NoError(t, c.(interface{ CloseWrite() error }).CloseWrite())
	b, err := io.ReadAll(c)
	require.NoError(t, err, "%s %s", network, addr)
	return string(b)
}

func TestPublishedPortsReachServersOnLoopback(t *testing.T) {
	t.Parallel()
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		w := newWorld(t, s)
		before := hostState(t, w)
		for _, mode := range []string{"none", "egress", "full"} {
			t.Run(mode, func(t *testing.T) {
				sock := filepath.Join(t.TempDir(), "job.sock")
				r := start(t, s, "--network", mode, "-p", "0:80", "-p", "127.0.0.1:0:81", "-p", "[2001:db8:1::1]:0:80", "-p", "203.0.113.1:0:53/udp", "-p", "18080:80", "-p", "0:9",
					"--expose-unix", sock+":81", "--", "python3", "-c", serversOnLoopback)
				require.Equal(t, "up", r.stdout.next(t))

				// The numbers that were taken are printed, and said in the status and the report.
				var printed []string
				for _, inside := range []string{"80/tcp", "81/tcp", "80/tcp", "53/udp", "9/tcp"} {
					line := r.stderr.next(t)
					before, at, ok := strings.Cut(line, " on ")
					require.True(t, ok && strings.HasSuffix(before, "published "+inside), line)
					printed = append(printed, at)
				}
				port := func(i int) string { _, p, _ := net.SplitHostPort(printed[i]); return p }
				var status []map[string]any
				for len(status) < 6 {
					var e struct {
						Event string
						Port  map[string]any
					}
					require.NoError(t, json.Unmarshal([]byte(r.status.next(t)), &e))
					if e.Event == "published" {
						status = append(status, e.Port)
					}
				}
				for i, at := range []string{"0.0.0.0:" + port(0), "127.0.0.1:" + port(1), "[2001:db8:1::1]:" + port(2), "203.0.113.1:" + port(3)} {
					require.Equal(t, at, printed[i])
					_, number, err := net.SplitHostPort(at)
					require.NoError(t, err)
					require.Equal(t, number, fmt.Sprint(status[i]["host_port"]))
				}

				const get = "GET / HTTP/1.0\r\n\r\n"
				for _, at := range []string{"127.0.0.1:" + port(0), "203.0.113.1:" + port(0), printed[2], "127.0.0.1:18080"} {
					require.True(t, strings.HasSuffix(talk(t, w, "tcp", at, get), "\r\n\r\nhello"), at)
				}
				much := strings.Repeat("x", 1<<20)
				require.Equal(t, strconv.Itoa(1<<20), talk(t, w, "tcp", printed[1], much))
				require.Equal(t, strconv.Itoa(1<<20), talk(t, w, "unix", sock, much))
				require.Equal(t, "cba", talk(t, w, "udp", printed[3], "abc"))
				var refused error
				require.NoError(t, w.host.Do(func() error {
					c, err := net.DialTimeout("tcp", "127.0.0.1:"+port(4), 5*time.Second) // nothing serves there
					if refused = err; err == nil {
						_ = c.SetDeadline(time.Now().Add(10 * time.Second))
						_, refused = io.ReadAll(c)
						c.Close()
					}
					return nil
				}))
				require.ErrorContains(t, refused, "connection reset by peer")
				st, err := os.Stat(sock)
				require.NoError(t, err)
				require.Equal(t, os.ModeSocket|0o600, st.Mode())

				o := r.wait()
				require.Equal(t, 0, o.Code, o)
				var reported []map[string]any
				for _, p := range network(o)["ports"].([]any) {
					reported = append(reported, p.(map[string]any))
				}
				require.Equal(t, status, reported)
				require.GreaterOrEqual(t, network(o)["in_bytes"].(float64), float64(2<<20))
				require.NoFileExists(t, sock)
				eventually(t, before, func() []string { return hostState(t, w) })
			})
		}
	})
}

// Silent clients of a port cost their slots, and not who works already.
func TestSilentClientsOfAPort(t *testing.T) {
	t.Parallel()
	s := sbx0(t)
	w := newWorld(t, s)
	r := start(t, s, "-p", "203.0.113.1:18081:81", "-p", "203.0.113.1:18053:53/udp", "--", "python3", "-c", strings.Replace(serversOnLoopback, "c, _ = counter.accept(); n = 0", "c, _ = counter.accept(); n = 0; c.sendall(b'!')", 1))
	require.Equal(t, "up", r.stdout.next(t))
	dial := func() (c net.Conn) {
		require.NoError(t, w.host.Do(func() (err error) {
			c, err = net.DialTimeout("tcp", "203.0.113.1:18081", 5*time.Second)
			return err
		}))
		require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		return c
	}
	works := dial()
	defer works.Close()
	_, err := io.ReadFull(works, make([]byte, 1))
	require.NoError(t, err)
	for range 400 {
		defer dial().Close()
	}
	require.Equal(t, "cba", talk(t, w, "udp", "203.0.113.1:18053", "abc"))
	_, err = io.WriteString(works, "12345")
	require.NoError(t, err)
	require.NoError(t, works.(*net.TCPConn).CloseWrite())
	b, err := io.ReadAll(works)
	require.NoError(t, err)
	require.Equal(t, "5", string(b))
	require.Equal(t, 0, r.wait().Code)
}

// A sandbox that joins another's network has what that one has, and no more.
func TestJoinedNetworks(t *testing.T) {
	t.Parallel()
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		w := newWorld(t, s)
		for _, c := range []struct {
			mode, flags string
			asks        []attack
		}{
			{"none", "", []attack{{"one", `r = hello("198.51.100.10", 80)`, "ENETUNREACH"}}},
			{"egress", "--allow one.test", []attack{{"one", `r = hello("one.test", 80)`, "one"}, {"two", `r = hello("two.test", 80)`, "no name"}, {"its address", `r = hello("198.51.100.20", 80)`, "ECONNRESET"}}},
			{"full", "", []attack{{"one", `r = hello("198.51.100.10", 80)`, "one"}, {"six", `r = hello("2001:db8:9::10", 80)`, "six"}, {"the host", `r = hello("203.0.113.1", 80)`, "ECONNREFUSED"}}},
		} {
			t.Run(c.mode, func(t *testing.T) {
				name := "first-" + c.mode
				first := start(t, s, append(append([]string{"--network", c.mode, "--name", name}, strings.Fields(c.flags)...), "--", "python3", "-c", serverInside)...)
				require.Equal(t, "up sandbox", first.stdout.next(t))
				slots, err := filepath.Glob(filepath.Join(s.State, "slots", "*"))
				require.NoError(t, err)
				require.Len(t, slots, 1)
				id := string(bytes.Split([]byte(readFile(t, slots[0])), []byte{0})[1])
				asks := append([]attack{{"the other", `r = hello("127.0.0.1", 8000)`, "sandbox"}, {"a route", refusedByTheKernel[8].code, "EPERM"}}, c.asks...)
				attackAll(t, s, []string{"--network", "container:" + name}, asks)
				attackAll(t, s, []string{"--network", "container:" + id}, asks[:1])
				attackAll(t, s, []string{"--network", "container:" + id[:6]}, asks[:1])
				require.Equal(t, 0, first.wait().Code)
				require.Equal(t, 125, s.Do("run", "--network", "container:"+name, "--", "true").Code)
			})
		}
		path := fmt.Sprintf("ns:/proc/%d/fd/%d", os.Getpid(), w.beyond.File().Fd())
		attackAll(t, s, []string{"--network", path}, []attack{{"one", `r = hello("198.51.100.10", 80)`, "one"}, {"a route", refusedByTheKernel[8].code, "EPERM"}})
	})
}

// A UNIX socket that a killed run left is replaced; what is no such thing stays.
func TestExposedSocketsOfTheDead(t *testing.T) {
	s := sbx0(t)
	w := newWorld(t, s)
	dir := t.TempDir()
	sock, file := filepath.Join(dir, "job.sock"), filepath.Join(dir, "file")
	args := []string{"--expose-unix", sock + ":81", "--", "python3", "-c", serversOnLoopback}
	r := start(t, s, args...)
	require.Equal(t, "up", r.stdout.next(t))
	busy := s.Do("run", "--expose-unix", sock+":81", "--", "true")
	require.Equal(t, 125, busy.Code)
	require.Equal(t, "sbxrun: set up network: expose UNIX socket \""+sock+"\": address already in use\nhint: a program listens on it; choose another path\n", string(busy.Stderr))
	require.Equal(t, "3", talk(t, w, "unix", sock, "abc"))
	r.kill(t)
	eventually(t, 0, func() int { return len(helpers(t, w)) })
	require.FileExists(t, sock)

	r = start(t, s, args...)
	require.Equal(t, "up", r.stdout.next(t))
	require.Equal(t, "3", talk(t, w, "unix", sock, "abc"))
	require.Equal(t, 0, r.wait().Code)
	require.NoFileExists(t, sock)

	require.NoError(t, os.WriteFile(file, []byte("mine"), 0o600))
	require.Equal(t, 125, s.Do("run", "--expose-unix", file+":81", "--", "true").Code)
	require.Equal(t, "mine", readFile(t, file))
}

// A job that can change the path of its UNIX socket has nothing else removed.
func TestSocketOfAnotherIsNotRemoved(t *testing.T) {
	s := harness.New(t)
	dir, other := t.TempDir(), t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "run"), 0o777))
	require.NoError(t, os.Chmod(dir, 0o777))
	l, err := net.Listen("unix", filepath.Join(other, "x.sock"))
	require.NoError(t, err)
	defer l.Close()
	o := s.Run("-q", "-v", dir+":/vol", "--expose-unix", filepath.Join(dir, "run", "x.sock")+":80", "--",
		"sh", "-c", "mv /vol/run /vol/old && ln -s "+other+" /vol/run")
	require.Equal(t, 0, o.Code, o)
	require.FileExists(t, filepath.Join(other, "x.sock"))
	require.NoFileExists(t, filepath.Join(dir, "old", "x.sock"))
	o = s.Run("-q", "--expose-unix", filepath.Join(dir, "a.sock")+":80", "--expose-unix", "/nonexistent/b.sock:80", "--", "true")
	require.Equal(t, 125, o.Code, o)
	require.NoFileExists(t, filepath.Join(dir, "a.sock"))
}
