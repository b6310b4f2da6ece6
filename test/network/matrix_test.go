package network_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// A client is a program that asks one address or name, and prints the name of
// the server that answered.
var clients = map[string]string{
	"socket": `
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
s.sendall(b"hello\n")
print(s.recv(100).split()[0].decode())`,
	"udp": `
import socket, sys
f, k, p, _, a = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
s = socket.socket(f, k, p); s.settimeout(3); s.connect(a); s.send(b"x")
print(s.recv(100).decode())`,
	"http": `
import sys, urllib.request
h = sys.argv[1]
h = "[" + h + "]" if ":" in h else h
print(urllib.request.urlopen("http://%s:%s/" % (h, sys.argv[2]), timeout=10).read().decode())`,
	"direct": `
import os, sys, urllib.request
h = sys.argv[1]
h = "[" + h + "]" if ":" in h else h
o = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(o.open("http://%s:%s/" % (h, sys.argv[2]), timeout=10).read().decode())`,
}

// ask is one question; want is the server that answers, "" is none.
type ask struct{ client, host, port, want string }

// askAll asks all of a mode's questions from one sandbox and compares.
func askAll(t *testing.T, s *harness.Sbx, flags []string, asks []ask) *harness.Outcome {
	t.Helper()
	var script strings.Builder
	script.WriteString("import subprocess, sys, json, concurrent.futures as c\nqs = json.load(sys.stdin)\n" +
		"def q(a):\n" +
		"    r = subprocess.run([sys.executable, '-c', a[0], a[1], a[2]], capture_output=True, text=True)\n" +
		"    return [r.stdout.strip(), r.stderr.strip().split('\\n')[-1]]\n" +
		"with c.ThreadPoolExecutor(4) as p: print(json.dumps(list(p.map(q, qs))))\n")
	var qs [][3]string
	for _, a := range asks {
		qs = append(qs, [3]string{clients[a.client], a.host, a.port})
	}
	in, err := json.Marshal(qs)
	require.NoError(t, err)
	o := s.RunInput(strings.NewReader(string(in)), append(append([]string{"-q", "--cpus", "2"}, flags...), "--", "python3", "-c", script.String())...)
	require.Equal(t, 0, o.Code, o)
	var got [][2]string
	require.NoError(t, json.Unmarshal(o.Stdout, &got), o)
	for i, a := range asks {
		assert.Equal(t, a.want, got[i][0], "%s to %s:%s with %v: %s", a.client, a.host, a.port, flags, got[i][1])
	}
	return o
}

// each makes a question of each client.
func each(clients, host, port, want string) (out []ask) {
	for _, c := range strings.Fields(clients) {
		out = append(out, ask{c, host, port, want})
	}
	return out
}

func join(lists ...[]ask) (out []ask) {
	for _, l := range lists {
		out = append(out, l...)
	}
	return out
}

const tcp = "socket http direct"

// everything is all that there is, which a mode reaches or not.
func nothing(hosts ...string) (out []ask) {
	for _, h := range hosts {
		out = append(out, each(tcp, h, "80", "")...)
	}
	return out
}

var everywhere = []string{
	"198.51.100.10", "198.51.100.20", "10.77.0.5", "169.254.169.254", "2001:db8:9::10", "203.0.113.1", "2001:db8:1::1", "127.0.0.1",
	"one.test", "lan.test", "meta.test", "six.test", "rebind.test", "host.test", "nowhere.test",
}

func sbx(t *testing.T) *harness.Sbx {
	t.Helper()
	need.Python(t)
	s := harness.New(t)
	newWorld(t, s)
	return s
}

func TestNoneReachesNothing(t *testing.T) {
	askAll(t, sbx(t), nil, nothing(everywhere...))
}

func TestEgressReachesWhatIsAllowed(t *testing.T) {
	s := sbx(t)
	t.Run("nothing", func(t *testing.T) {
		o := askAll(t, s, []string{"--network", "egress"}, nothing(everywhere...))
		require.NotEmpty(t, o.Report.Denials)
	})
	t.Run("a name", func(t *testing.T) {
		askAll(t, s, []string{"--allow", "one.test"}, join(
			each(tcp, "one.test", "80", "one"), each("socket", "one.test", "5432", "one"), each("udp", "one.test", "80", ""),
			nothing("a.one.test", "two.test", "198.51.100.10", "lan.test", "203.0.113.1"),
		))
	})
	t.Run("a name and a port", func(t *testing.T) {
		askAll(t, s, []string{"--allow", "one.test:443"}, join(
			each("socket http direct", "one.test", "443", "one"), each("socket http direct", "one.test", "80", ""),
		))
	})
	t.Run("subdomains", func(t *testing.T) {
		askAll(t, s, []string{"--allow", "*.one.test"}, join(
			each(tcp, "a.one.test", "80", "one"), each("socket", "b.a.one.test", "80", "one"), nothing("one.test", "two.test"),
		))
	})
	t.Run("an address", func(t *testing.T) {
		askAll(t, s, []string{"--allow", "198.51.100.20"}, join(
			each(tcp, "198.51.100.20", "80", "two"), nothing("198.51.100.10", "one.test"),
		))
	})
	t.Run("IPv6", func(t *testing.T) {
		askAll(t, s, []string{"--allow", "2001:db8:9::/64", "--allow", "six.test"}, join(
			each(tcp, "2001:db8:9::10", "80", "six"), each(tcp, "six.test", "80", "six"), nothing("2001:db8:1::1"),
		))
	})
	t.Run("names into private ranges", func(t *testing.T) {
		askAll(t, s, []string{"--allow", "*.test"}, join(
			each("socket http", "one.test", "80", "one"), nothing("lan.test", "meta.test", "rebind.test", "host.test"),
		))
		askAll(t, s, []string{"--allow", "lan.test", "--allow", "10.77.0.0/16"}, join(
			each(tcp, "lan.test", "80", "lan"), each("socket", "10.77.0.5", "80", "lan"), nothing("meta.test"),
		))
	})
	t.Run("a deny wins", func(t *testing.T) {
		o := askAll(t, s, []string{"--allow", "*.test", "--deny", "two.test", "--deny", "198.51.100.10:443"}, join(
			each("socket http", "one.test", "80", "one"), each("socket http", "one.test", "443", ""), nothing("two.test"),
		))
		require.Contains(t, fmt.Sprint(o.Report.Denials), "--deny two.test")
	})
}

func TestFullReachesTheWorldAndNotTheHost(t *testing.T) {
	s := sbx(t)
	reach := join(
		each("socket direct udp", "198.51.100.10", "80", "one"), each("socket udp", "2001:db8:9::10", "443", "six"), each("socket", "10.77.0.5", "5432", "lan"),
	)
	t.Run("plain", func(t *testing.T) {
		o := askAll(t, s, []string{"--network", "full"}, join(reach, nothing("169.254.169.254", "203.0.113.1", "2001:db8:1::1", "127.0.0.1")))
		require.NotEmpty(t, o.Report.All["net_rx_bytes"])
	})
	t.Run("allow", func(t *testing.T) {
		askAll(t, s, []string{"--network", "full", "--allow", "203.0.113.1:5432", "--allow", "169.254.169.254"}, join(
			reach, each("socket", "203.0.113.1", "5432", "host"), each("socket", "203.0.113.1", "80", ""), each("socket", "169.254.169.254", "80", "metadata"),
		))
	})
	t.Run("deny", func(t *testing.T) {
		askAll(t, s, []string{"--network", "full", "--deny", "198.51.100.0/24:80", "--deny", "10.0.0.0/8"}, join(
			each("socket", "198.51.100.10", "443", "one"), each("socket udp", "198.51.100.10", "80", ""), nothing("10.77.0.5"),
		))
	})
}

// What is decided is said: in the report, and line by line.
func TestDecisionsAreLogged(t *testing.T) {
	s := sbx(t)
	file := filepath.Join(t.TempDir(), "net.jsonl")
	o := askAll(t, s, []string{"--allow", "one.test", "--net-log", file}, join(each("socket http", "one.test", "80", "one"), each("http", "two.test", "80", ""), each("socket", "198.51.100.20", "80", "")))
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	seen := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		var d struct {
			Time, Via, Host, Address, Rule string
			Port                           int
			Allowed                        bool
		}
		require.NoError(t, json.Unmarshal([]byte(line), &d), line)
		require.NotEmpty(t, d.Rule)
		require.NotEmpty(t, d.Time)
		seen[fmt.Sprintf("%s %s %v", d.Host, d.Address, d.Allowed)] = true
	}
	require.Contains(t, seen, "one.test 198.51.100.10 true")
	require.Contains(t, fmt.Sprint(o.Report.Denials), "two.test:80")
	require.Contains(t, fmt.Sprint(o.Report.Denials), "198.51.100.20:80")
	st, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode())
}

func TestEnginesHaveTheSameNetwork(t *testing.T) {
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		newWorld(t, s)
		askAll(t, s, []string{"--allow", "one.test"}, join(each(tcp, "one.test", "80", "one"), nothing("two.test", "198.51.100.10")))
		askAll(t, s, []string{"--network", "full"}, join(each("socket udp", "198.51.100.10", "80", "one"), nothing("203.0.113.1", "169.254.169.254")))
	})
}

// What a mode does not count is not in its report as a nought.
func TestReportsTellOnlyWhatWasCounted(t *testing.T) {
	s := sbx(t)
	for mode, want := range map[string][]string{"egress": {"connections", "denied", "down_bytes", "up_bytes"}, "full": nil} {
		o := s.Run("-q", "--network", mode, "--", "true")
		require.Equal(t, 0, o.Code, o)
		network := o.Report.All["network"].(map[string]any)
		for _, figure := range []string{"connections", "denied", "down_bytes", "up_bytes", "port_connections", "in_bytes", "out_bytes"} {
			_, there := network[figure]
			require.Equal(t, slices.Contains(want, figure), there, "%s in mode %s: %v", figure, mode, o)
		}
		require.NotNil(t, network["helper_cpu_ms"])
		require.NotNil(t, o.Report.All["net_rx_bytes"])
	}
}
