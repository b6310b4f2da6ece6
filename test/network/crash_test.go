package network_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// keepStage has all runs share /run/sbxrun, as they do on a host.
func keepStage(t *testing.T, s *harness.Sbx) {
	t.Helper()
	script := &s.Prefix[len(s.Prefix)-2]
	shared := strings.Replace(*script, "mount -t tmpfs -o mode=700 tmpfs /run/sbxrun", "mount --bind "+t.TempDir()+" /run/sbxrun", 1)
	require.NotEqual(t, *script, shared)
	*script = shared
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

// helpers are the processes of the made-up host that serve a sandbox.
func helpers(t *testing.T, w *world) (pids []int) {
	t.Helper()
	var own, other unix.Stat_t
	require.NoError(t, unix.Fstat(int(w.host.File().Fd()), &own))
	ents, err := os.ReadDir("/proc")
	require.NoError(t, err)
	for _, e := range ents {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if strings.HasPrefix(string(cmdline), "sbxrun-net\x00") && unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &other) == nil && other.Ino == own.Ino {
			pids = append(pids, pid)
		}
	}
	return pids
}

// helperOf is the one that a running sbxrun has started, if any.
func helperOf(sbxrun int) (pids []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", sbxrun))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil {
				if cmdline, _ := os.ReadFile("/proc/" + f + "/cmdline"); strings.HasPrefix(string(cmdline), "sbxrun-net\x00") {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

// hostState is what a network of a sandbox's could leave on the host, but for
// the ruleset, which stays.
func hostState(t *testing.T, w *world) (out []string) {
	t.Helper()
	for range helpers(t, w) {
		out = append(out, "helper")
	}
	require.NoError(t, w.host.Do(func() error {
		links, err := net.Interfaces()
		for _, l := range links {
			out = append(out, "link "+l.Name)
		}
		for _, f := range []string{"tcp", "tcp6", "udp", "udp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + f)
			if err != nil {
				return err
			}
			for _, l := range strings.Split(string(b), "\n") {
				if c := strings.Fields(l); len(c) > 3 && (c[3] == "0A" || strings.HasPrefix(f, "udp")) {
					out = append(out, f+" "+c[1])
				}
			}
		}
		for _, k := range []string{"ipv4/conf/all", "ipv4/conf/uplink0", "ipv6/conf/all", "ipv6/conf/uplink0"} {
			b, err := os.ReadFile("/proc/sys/net/" + k + "/forwarding")
			if err != nil {
				return err
			}
			out = append(out, "net/"+k+"/forwarding "+strings.TrimSpace(string(b)))
		}
		return err
	}))
	sort.Strings(out)
	return out
}

// eventually waits for a state that the kernel may take a moment for.
func eventually[T any](t *testing.T, want T, get func() T, what ...any) {
	t.Helper()
	for end := time.Now().Add(harness.LeakGrace); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if fmt.Sprint(get()) == fmt.Sprint(want) {
			return
		}
	}
	require.Equal(t, want, get(), what...)
}

// sandboxProcesses are those of all sandboxes that a state directory knows of.
func sandboxProcesses(s *harness.Sbx) (pids []int) {
	slots, _ := filepath.Glob(filepath.Join(s.State, "slots", "*"))
	for _, f := range slots {
		b, _ := os.ReadFile(f)
		if parts := strings.Split(string(b), "\x00"); len(parts) > 1 && parts[1] != "" {
			pids = append(pids, harness.Processes(parts[1])...)
		}
	}
	return pids
}

var modes = []struct {
	name  string
	flags []string
}{
	{"none", nil},
	{"egress", []string{"--allow", "one.test"}},
	{"full", []string{"--network", "full"}},
	{"publish", []string{"-p", "0:80", "-p", "0:53/udp"}},
	{"full with ports", []string{"--network", "full", "-p", "0:80"}},
}

func TestKillLeavesNothing(t *testing.T) {
	t.Parallel()
	s := harness.New(t)
	w := newWorld(t, s)
	keepStage(t, s)
	before := hostState(t, w)
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	for _, m := range modes[1:4] {
		t.Run(m.name, func(t *testing.T) {
			for i := range 20 {
				job := []string{"0.01", "60"}[i%2] // killed while it ends, or while it starts or runs
				cmd := s.Cmd(append(append([]string{"run", "-q"}, m.flags...), "--", "sleep", job)...)
				require.NoError(t, cmd.Start())
				time.Sleep(time.Duration(random.IntN(60_000)) * time.Microsecond)
				require.NoError(t, cmd.Process.Kill())
				o := s.Wait(cmd)
				require.True(t, o.Signal == unix.SIGKILL || o.Code == 0 && job != "60", o)
				eventually(t, 0, func() int { return len(sandboxProcesses(s)) + len(helpers(t, w)) }, "seed %d", seed)
			}
			o := s.Do("gc")
			require.Equal(t, 0, o.Code, o)
			eventually(t, before, func() []string { return hostState(t, w) }, "seed %d", seed)
			require.Empty(t, s.Leaks())
		})
	}
	for _, heal := range [][]string{{"gc"}, {"run", "--network", "full", "--", "true"}, {"run", "--", "true"}} {
		t.Run("healed by "+strings.Join(heal, " "), func(t *testing.T) {
			r := start(t, s, "--network", "full", "-p", "0:80", "--", "sh", "-c", "echo up; cat")
			require.Equal(t, "up", r.stdout.next(t))
			require.Contains(t, hostState(t, w), "net/ipv4/conf/uplink0/forwarding 1")
			r.kill(t)
			o := s.Do(heal...)
			require.Equal(t, 0, o.Code, o)
			eventually(t, before, func() []string { return hostState(t, w) })
		})
	}
}

func (r *running) kill(t *testing.T) {
	t.Helper()
	require.NoError(t, r.cmd.Process.Kill())
	require.Equal(t, unix.SIGKILL, r.s.Wait(r.cmd).Signal)
}

// A job whose helper is gone goes on without a network, and its end is its own.
func TestTheHelpersEndIsNotTheJobs(t *testing.T) {
	t.Parallel()
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		w := newWorld(t, s)
		before := hostState(t, w)
		for _, flags := range [][]string{{"--allow", "one.test"}, {"-p", "0:80"}, {"--network", "full", "-p", "0:80"}} {
			r := start(t, s, append(flags, "--", "python3", "-c", attackLibrary+`
print("up", flush=True); sys.stdin.readline()
try: hello("one.test", 80); sys.exit(1)
except OSError: sys.exit(7)`)...)
			require.Equal(t, "up", r.stdout.next(t))
			pids := helpers(t, w)
			require.Len(t, pids, 1)
			require.NoError(t, unix.Kill(pids[0], unix.SIGKILL))
			eventually(t, 0, func() int { return len(helpers(t, w)) }) // else a query can get lost in it
			_, err := r.stdin.Write([]byte("\n"))
			require.NoError(t, err)
			o := r.wait()
			require.Equal(t, 7, o.Code, o)
			require.Equal(t, "exit", o.Report.Reason, o)
			require.Contains(t, fmt.Sprint(o.Report.All["notes"]), "the network helper ended before the sandbox")
			eventually(t, before, func() []string { return hostState(t, w) })
		}
	})
}

// Whenever the helper ends, the run either is refused or is what it would have been.
func TestAHelperThatEndsEarly(t *testing.T) {
	t.Parallel()
	s := harness.New(t)
	w := newWorld(t, s)
	before := hostState(t, w)
	for i := range 20 {
		file := s.ReportFile()
		cmd := s.Cmd(append(append([]string{"run", "-q", "--report", file}, modes[1+i%4].flags...), "--", "sleep", "0.05")...)
		require.NoError(t, cmd.Start())
		var pids []int
		for end := time.Now().Add(time.Second); len(pids) == 0 && time.Now().Before(end); {
			pids = helperOf(cmd.Process.Pid)
		}
		time.Sleep(time.Duration(rand.IntN(10_000)) * time.Microsecond)
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have done its work
		}
		o := s.Wait(cmd)
		o.Report = s.ReadReport(file)
		require.NotNil(t, o.Report, o)
		switch o.Code {
		case 0:
			require.Equal(t, "ok", o.Report.Status, o)
		default:
			require.Equal(t, 125, o.Code, o)
			require.Contains(t, o.Report.Message, "sbxrun-net", o)
		}
	}
	eventually(t, before, func() []string { return hostState(t, w) })
}

func TestRapidRunsLeaveNothing(t *testing.T) {
	t.Parallel()
	s := harness.New(t)
	w := newWorld(t, s)
	keepStage(t, s)
	before := hostState(t, w)
	for _, m := range modes[:4] {
		t.Run(m.name, func(t *testing.T) {
			for range 100 {
				o := s.Do(append(append([]string{"run", "-q"}, m.flags...), "--", "true")...)
				require.Equal(t, 0, o.Code, o)
			}
			eventually(t, before, func() []string { return hostState(t, w) })
			require.Empty(t, s.Leaks())
		})
	}
}

func TestFullSandboxesAtOnceShareNoAddress(t *testing.T) {
	t.Parallel()
	s := harness.New(t)
	w := newWorld(t, s)
	keepStage(t, s)
	before := hostState(t, w)
	var all []*running
	for range 200 {
		all = append(all, start(t, s, "--network", "full", "-m", "32m", "--", "sh", "-c", "echo up; cat"))
	}
	for _, r := range all {
		require.Equal(t, "up", r.stdout.next(t))
	}
	require.Len(t, hostState(t, w), len(before)+len(all)) // a link each
	addresses := map[string]int{}
	for _, r := range all {
		o := r.wait()
		require.Equal(t, 0, o.Code, o)
		for _, a := range network(o)["addresses"].([]any) {
			addresses[a.(string)]++
		}
	}
	require.Len(t, addresses, 400)
	eventually(t, before, func() []string { return hostState(t, w) })
}

// What cannot be is said in one line and a hint, and leaves nothing.
func TestBadNetworkFlags(t *testing.T) {
	t.Parallel()
	s := harness.New(t)
	w := newWorld(t, s)
	before := hostState(t, w)
	for _, c := range []struct{ flags, says string }{
		{"--allow=", `sbxrun: set up network: read --allow "": a name has 1 to 253 bytes`},
		{"--allow=a\tb", `sbxrun: set up network: read --allow "a\tb": '\t' is not part of a name`},
		{"--allow=a_b c", `sbxrun: set up network: read --allow "a_b c": ' ' is not part of a name`},
		{"--allow 1.2.3.4/99", `sbxrun: set up network: read --allow "1.2.3.4/99": "1.2.3.4/99" is not an address or CIDR`},
		{"--allow host:99999", `sbxrun: set up network: read --allow "host:99999": "99999" is not a port or a range of ports`},
		{"--network full --allow name.test", `sbxrun: set up network: read --allow "name.test": a name`},
		{"--network full --allow 1.2.3.4/99", `sbxrun: set up network: read --allow "1.2.3.4/99": neither an address nor a CIDR`},
		{"--network bridge", `sbxrun: set up network "bridge": unknown mode`},
		{"--net-rate 5", `sbxrun: --net-rate: "5": a rate as 500kbit, 10mbit or 1gbit, of at least 8kbit`},
		{"--dns x", `sbxrun: set up network "none": --dns or --mtu does nothing there`},
		{"--network full --dns x", `sbxrun: set up network: name server "x": not an IP address`},
		{"--network egress --dns 1.1.1.1", `sbxrun: set up network "egress": --dns or --mtu does nothing there`},
		{"--network host --allow one.test", `sbxrun: set up network "host": --allow or --deny does nothing there`},
		{"--network full --net-bytes 1m", `sbxrun: set up network "full": --net-bytes or --net-conns does nothing there`},
		{"--network full --mtu 5", `sbxrun: set up network "5": MTU out of range`},
		{"-p 1-2:3", `sbxrun: --publish: "1-2:3": "1-2": a range: give each port a flag of its own`},
		{"-p 99999:80", `sbxrun: --publish: "99999:80": "99999" is not a port from 0 to 65535`},
		{"--network host -p 1:2", `sbxrun: set up network "host": --publish, --expose-unix or --host-port does nothing there`},
		{"-p 192.0.2.77:1234:80", `sbxrun: set up network: publish "-p 192.0.2.77:1234:80": bind: cannot assign requested address`},
		{"-p 203.0.113.1:443:80", `sbxrun: set up network: publish "-p 203.0.113.1:443:80": bind: address already in use`},
		{"-p 203.0.113.1:443:80/udp", `sbxrun: set up network: publish "-p 203.0.113.1:443:80/udp": bind: address already in use`},
		{"--network full -p 0:1 -p 203.0.113.1:443:80", `sbxrun: set up network: publish "-p 203.0.113.1:443:80": bind: address already in use`},
		{"--network ns:/etc/passwd", `sbxrun: open network namespace "/etc/passwd": not a namespace`},
		{"--network ns:/nonexistent", `sbxrun: open network namespace "/nonexistent": no such file or directory`},
		{"--network ns:/proc/self/ns/net", `sbxrun: open network namespace "/proc/self/ns/net": it is the host's own`},
		{"--network ns:/proc/self/ns/uts", `sbxrun: open network namespace "/proc/self/ns/uts": not a network namespace`},
		{"--network container:nobody", `sbxrun: find sandbox "nobody": no such sandbox is running`},
		{"--net-log /nonexistent/x", `sbxrun: --net-log "/nonexistent/x": no such file or directory`},
		{"--expose-unix /nonexistent/x:80", `sbxrun: set up network: expose UNIX socket "/nonexistent/x": open its directory: no such file or directory`},
	} {
		flags := []string{c.flags}
		if !strings.HasPrefix(c.flags, "--allow=") {
			flags = strings.Fields(c.flags)
		}
		o := s.Do(append(append([]string{"run"}, flags...), "--", "true")...)
		assert.Equal(t, 125, o.Code, "%s\n%v", c.flags, o)
		got := strings.Split(strings.TrimSuffix(string(o.Stderr), "\n"), "\n")
		assert.Equal(t, c.says, got[0], c.flags)
		require.Len(t, got, 2, "%s\n%v", c.flags, o)
		assert.True(t, strings.HasPrefix(got[1], "hint: ") && len(got[1]) > len("hint: "), o)
		assert.Empty(t, bytes.TrimSpace(o.Stdout))
	}
	eventually(t, before, func() []string { return hostState(t, w) })
}
