package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sbxrun/sbxrun/netns"
)

// The addresses of the made-up networks, and what everything serves on.
const (
	hostAddress   = "198.51.100.1" // on lo of the namespace that plays the host: pasta copies those of other links
	beyondAddress = "203.0.113.254"
	bareAddress   = "192.0.2.2"
	trafficPort   = 5201
	publishedPort = 5202
)

const (
	loopbackName = "host loopback"
	vethName     = "bare veth hop"
)

// way is one way from a client to a server, and what was measured on it.
type way struct {
	name                   string
	against                string // the way it is compared with
	aim                    float64
	client                 *agent
	ip, proxy              string
	port                   int
	failed                 string
	gbit, tripUS, connects []float64 // one value a round
}

// agent is net.c somewhere. It ends when its standard input does: at the latest
// with us, whatever ends us.
type agent struct {
	cmd  *exec.Cmd
	in   *os.File // or what else it ends with
	out  *os.File
	read *bufio.Reader
	errs bytes.Buffer
	done chan struct{}
}

// traffic is the networks that the bench makes for itself: a namespace that
// plays the host, one for what is beyond it, and two with nothing but a veth,
// where no rules slow down what others are compared with. They hang on
// descriptors and on the agents: nothing is left of them when we are gone.
type traffic struct {
	w                  *workshop
	host, beyond, a, b *netns.NS
	agents             []*agent
	undo               []func() error
}

func (w *workshop) traffic(ctx context.Context, rounds, ms int) (rows []TrafficRow, err error) {
	if err := w.compile(ctx, "net", true); err != nil {
		return nil, err
	}
	t := &traffic{w: w}
	defer func() { err = errors.Join(err, t.close()) }()
	if err := t.build(); err != nil {
		return nil, fmt.Errorf("make networks: %w", err)
	}
	ways, err := t.ways(ctx)
	if err != nil {
		return nil, err
	}
	for range rounds {
		for _, y := range ways {
			if y.failed != "" {
				continue
			}
			if err := y.measure(ctx, ms); err != nil {
				y.failed = oneLine(err.Error())
			}
			if ctx.Err() != nil {
				return nil, fmt.Errorf("measure networks: %w", context.Cause(ctx))
			}
		}
	}
	return trafficRows(ways), nil
}

func (t *traffic) build() error {
	for _, ns := range []**netns.NS{&t.host, &t.beyond, &t.a, &t.b} {
		var err error
		if *ns, err = netns.New(); err != nil {
			return err
		}
		t.undo = append(t.undo, (*ns).Close)
	}
	if err := veth(t.host, "uplink0", "203.0.113.1/24", t.beyond, "world0", beyondAddress+"/24"); err != nil {
		return err
	}
	if err := veth(t.a, "a0", "192.0.2.1/24", t.b, "b0", bareAddress+"/24"); err != nil {
		return err
	}
	return t.host.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := address(lo, hostAddress+"/32"); err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(beyondAddress)}); err != nil {
			return fmt.Errorf("add route: %w", err)
		}
		return nil
	})
}

// veth joins two namespaces.
func veth(a *netns.NS, aName, aAddress string, b *netns.NS, bName, bAddress string) error {
	err := a.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = aName
		link := &netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(b.File().Fd())}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("add veth %q: %w", aName, err)
		}
		return up(aName, aAddress)
	})
	if err != nil {
		return err
	}
	return b.Do(func() error { return up(bName, bAddress) })
}

func up(name, cidr string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %q: %w", name, err)
	}
	if err := address(link, cidr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %q up: %w", name, err)
	}
	return nil
}

func address(link netlink.Link, cidr string) error {
	a, err := netlink.ParseAddr(cidr)
	if err == nil {
		err = netlink.AddrAdd(link, a)
	}
	if err != nil {
		return fmt.Errorf("add address %q: %w", cidr, err)
	}
	return nil
}

// ways starts servers and clients, and tries each way once. Only what the
// others are compared with must work.
func (t *traffic) ways(ctx context.Context) ([]*way, error) {
	for _, s := range []struct {
		ns *netns.NS
		ip string
	}{{t.host, hostAddress}, {t.beyond, beyondAddress}, {t.a, "127.0.0.1"}, {t.b, bareAddress}} {
		if _, err := t.serve(ctx, s.ns, s.ip); err != nil {
			return nil, err
		}
	}
	var list []*way
	add := func(name, against string, aim float64, c *agent, err error, ip string, port int, proxy string) {
		y := &way{name: name, against: against, aim: aim, client: c, ip: ip, port: port, proxy: proxy}
		if err == nil {
			_, err = y.ask(ctx, "trips", 1)
		}
		if err != nil {
			y.failed = oneLine(err.Error())
		}
		list = append(list, y)
	}
	none := "-"
	bare, err := t.start(ctx, t.a, nil, t.net("ask")...)
	if err != nil {
		return nil, err
	}
	add(loopbackName, "", 0, bare, nil, "127.0.0.1", trafficPort, none)
	add(vethName, "", 0, bare, nil, bareAddress, trafficPort, none)
	for _, y := range list {
		if y.failed != "" {
			return nil, fmt.Errorf("try %s: %s", y.name, y.failed)
		}
	}

	full, err := t.sandbox(ctx, []string{"--network", "full", "--dns", beyondAddress, "--allow", hostAddress}, "ask")
	add("full, to the host", vethName, 0.9, full, err, hostAddress, trafficPort, none)
	add("full, beyond it (two hops, NAT)", vethName, 0, full, err, beyondAddress, trafficPort, none)
	egress, err := t.sandbox(ctx, []string{"--network", "egress", "--allow", hostAddress}, "ask")
	add("egress", loopbackName, 0.6, egress, err, hostAddress, trafficPort, none)
	add("egress, by HTTP CONNECT", loopbackName, 0.6, egress, err, hostAddress, trafficPort, "proxy")
	inHost, err := t.start(ctx, t.host, nil, t.net("ask")...)
	if err == nil {
		published, err1 := t.sandbox(ctx, []string{"--network", "none", "-p", fmt.Sprintf("127.0.0.1:%d:%d", publishedPort, trafficPort)}, "serve", "127.0.0.1", strconv.Itoa(trafficPort))
		if err = err1; err == nil {
			err = published.expect(ctx, "up")
		}
	}
	add("published port (-p), from the host", loopbackName, 0, inHost, err, "127.0.0.1", publishedPort, none)

	slirp, err := t.slirp(ctx)
	add("slirp4netns", loopbackName, 0, slirp, err, hostAddress, trafficPort, none)
	pasta, err := t.pasta(ctx)
	add("pasta", loopbackName, 0, pasta, err, hostAddress, trafficPort, none)
	podman, err := t.podman(ctx)
	add("podman's bridge", vethName, 0, podman, err, hostAddress, trafficPort, none)
	docker, gateway, err := t.docker(ctx)
	add("docker's bridge", vethName, 0, docker, err, gateway, trafficPort, none)
	return list, nil
}

// net gives the arguments of net.c.
func (t *traffic) net(args ...string) []string {
	return append([]string{filepath.Join(t.w.dir, "net")}, args...)
}

func (t *traffic) serve(ctx context.Context, ns *netns.NS, ip string) (*agent, error) {
	a, err := t.start(ctx, ns, nil, t.net("serve", ip, strconv.Itoa(trafficPort))...)
	if err == nil {
		err = a.expect(ctx, "up")
	}
	return a, err
}

// sandbox runs net.c in one. It has all CPUs, as the others have. The state
// directory is our own: what it says of forwarding is about our host, not this
// machine.
func (t *traffic) sandbox(ctx context.Context, flags []string, args ...string) (*agent, error) {
	argv := append(t.own("run"), "-q", "--cpus", strconv.Itoa(runtime.NumCPU()), "-v", filepath.Join(t.w.dir, "net")+":/tmp/net:ro")
	argv = append(append(append(argv, flags...), "--", "/tmp/net"), args...)
	return t.start(ctx, t.host, nil, argv...)
}

func (t *traffic) own(verb string) []string {
	return []string{t.w.o.sbxrun, verb, "--root", filepath.Join(t.w.dir, "root"), "--state", filepath.Join(t.w.state, "networks")}
}

var errNotHere = errors.New("not here")

func look(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", errNotHere
	}
	return path, nil
}

// slirp gives a client in a namespace that slirp4netns connects to the host.
func (t *traffic) slirp(ctx context.Context) (*agent, error) {
	path, err := look("slirp4netns")
	if err != nil {
		return nil, err
	}
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	t.undo = append(t.undo, ns.Close)
	ready, readyIn, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start slirp4netns: %w", err)
	}
	defer ready.Close()
	exit, lifeline, err := os.Pipe()
	if err != nil {
		readyIn.Close()
		return nil, fmt.Errorf("start slirp4netns: %w", err)
	}
	s, err := t.start(ctx, t.host, []*os.File{readyIn, exit}, path, "--configure", "--mtu=65520", "--netns-type=path", "--ready-fd=3", "--exit-fd=4", ns.Path(), "tap0")
	readyIn.Close()
	exit.Close()
	if err != nil {
		lifeline.Close()
		return nil, err
	}
	s.in.Close()
	s.in = lifeline
	_ = ready.SetReadDeadline(time.Now().Add(10 * time.Second)) // pipes have deadlines
	if n, err := ready.Read(make([]byte, 1)); n != 1 {
		return nil, fmt.Errorf("wait for slirp4netns: %w: %s", err, s.end())
	}
	return t.start(ctx, ns, nil, t.net("ask")...)
}

// pasta has a user namespace of its own: as the host's root it would become
// nobody, who may not look at itself.
func (t *traffic) pasta(ctx context.Context) (*agent, error) {
	path, err := look("pasta")
	if err != nil {
		return nil, err
	}
	return t.start(ctx, t.host, nil, append([]string{"unshare", "--user", "--map-root-user", path, "--config-net", "--quiet", "--"}, t.net("ask")...)...)
}

// podman runs where /run is its own, and its rules and bridge are our host's.
func (t *traffic) podman(ctx context.Context) (*agent, error) {
	path, err := look("podman")
	if err != nil {
		return nil, err
	}
	dir, hide := filepath.Join(t.w.dir, "podman"), ""
	if t.w.cgroups.Mode == "hybrid" {
		hide = v2Mount() // crun refuses
	}
	return t.start(ctx, t.host, nil, "unshare", "--mount", "--propagation", "private", "sh", "-c", `mount -t tmpfs tmpfs /run && { [ -z "$0" ] || umount -l "$0"; } && exec "$@"`, hide,
		path, "--root", filepath.Join(dir, "root"), "--runroot", "/run/podman", "--cgroup-manager", "cgroupfs", "--events-backend", "none",
		"run", "--rm", "--interactive", "--log-driver", "none", "--cgroups", "disabled", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--network", "bridge", "--volume", filepath.Join(t.w.dir, "net")+":/tmp/net:ro", "--rootfs", filepath.Join(t.w.dir, "rootfs"), "/tmp/net", "ask")
}

// docker uses the daemon that runs here with the bridge that it has: the server
// is on the bridge's own address, and the only one outside our namespaces.
func (t *traffic) docker(ctx context.Context) (a *agent, gateway string, err error) {
	path, err := look("docker")
	if err != nil {
		return nil, "", err
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(short, path, "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}").Output()
	gateway = strings.TrimSpace(string(out))
	if err != nil || net.ParseIP(gateway) == nil {
		return nil, "", fmt.Errorf("%w: no daemon with a bridge", errNotHere)
	}
	const image = "sbxrun-bench-net:latest"
	if out, err := exec.CommandContext(ctx, "sh", "-c", `tar -C "$0" -c . | "$1" import - "$2"`, filepath.Join(t.w.dir, "rootfs"), path, image).CombinedOutput(); err != nil {
		return nil, "", fmt.Errorf("import image: %w: %s", err, out)
	}
	t.undo = append(t.undo, func() error { return exec.Command(path, "rmi", image).Run() })
	if _, err := t.serve(ctx, nil, gateway); err != nil {
		return nil, "", err
	}
	a, err = t.start(ctx, nil, nil, path, "run", "--rm", "--interactive", "--volume", filepath.Join(t.w.dir, "net")+":/tmp/net:ro", image, "/tmp/net", "ask")
	return a, gateway, err
}

// start runs a command in a namespace, or where we are.
func (t *traffic) start(ctx context.Context, ns *netns.NS, files []*os.File, argv ...string) (*agent, error) {
	a := &agent{cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	a.cmd.ExtraFiles, a.cmd.Stderr = files, &a.errs
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // ^C is for us, who end it
	a.cmd.WaitDelay = 5 * time.Second
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start %q: %w", argv[0], err)
	}
	inRead, in, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %q: %w", argv[0], err)
	}
	out, outWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %q: %w", argv[0], errors.Join(err, inRead.Close(), in.Close()))
	}
	a.cmd.Stdin, a.cmd.Stdout = inRead, outWrite
	a.in, a.out, a.read = in, out, bufio.NewReaderSize(out, 1<<16)
	if ns == nil {
		err = a.cmd.Start()
	} else {
		err = ns.Do(a.cmd.Start)
	}
	inRead.Close()
	outWrite.Close()
	if err != nil {
		return nil, fmt.Errorf("start %q: %w", argv[0], errors.Join(err, in.Close(), out.Close()))
	}
	go func() {
		_ = a.cmd.Wait() // what went wrong, its output says
		close(a.done)
	}()
	t.agents = append(t.agents, a)
	return a, nil
}

// line reads the next line, within a time that no honest answer takes.
func (a *agent) line(ctx context.Context) (string, error) {
	if err := a.out.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return "", fmt.Errorf("read answer: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = a.out.SetReadDeadline(time.Unix(1, 0)) })()
	s, err := a.read.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("read answer: %w: %s", err, a.end())
	}
	return strings.TrimSpace(s), nil
}

func (a *agent) expect(ctx context.Context, want string) error {
	got, err := a.line(ctx)
	if err == nil && got != want {
		err = fmt.Errorf("read answer: %q", got)
	}
	return err
}

// end ends the agent and gives what it said last. It may be called again.
func (a *agent) end() string {
	_ = a.in.Close() // of a second call: already closed
	for _, kill := range []func(){
		func() { _ = a.cmd.Process.Signal(syscall.SIGTERM) }, // it may have ended
		func() { killGroup(a.cmd) },
	} {
		select {
		case <-a.done:
			return oneLine(a.errs.String())
		case <-time.After(5 * time.Second):
			kill()
		}
	}
	<-a.done
	return oneLine(a.errs.String())
}

// close ends all that runs, then what sbxrun keeps for the next command, then
// lets the namespaces go.
func (t *traffic) close() error {
	for i := len(t.agents) - 1; i >= 0; i-- {
		t.agents[i].end()
		t.agents[i].out.Close()
	}
	var errs []error
	if t.host != nil {
		argv := t.own("gc")
		var out []byte
		err := t.host.Do(func() (err error) {
			out, err = exec.Command(argv[0], argv[1:]...).CombinedOutput()
			return err
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("collect what sbxrun left: %w: %s", err, oneLine(string(out))))
		}
	}
	for i := len(t.undo) - 1; i >= 0; i-- {
		errs = append(errs, t.undo[i]())
	}
	return errors.Join(errs...)
}

func (y *way) ask(ctx context.Context, what string, n int) ([]float64, error) {
	if _, err := fmt.Fprintf(y.client.in, "%s %s %d %s %d\n", what, y.ip, y.port, y.proxy, n); err != nil {
		return nil, fmt.Errorf("ask: %w: %s", err, y.client.end())
	}
	s, err := y.client.line(ctx)
	if err != nil {
		return nil, err
	}
	return parseAnswer(s)
}

func parseAnswer(s string) ([]float64, error) {
	if _, problem, is := strings.Cut(s, "error "); is {
		return nil, errors.New(problem)
	}
	var out []float64
	for _, f := range strings.Fields(s) {
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return nil, fmt.Errorf("read answer: %w", err)
		}
		out = append(out, v)
	}
	if len(out) == 0 {
		return nil, errors.New("read answer: empty")
	}
	return out, nil
}

// measure is one round of a way.
func (y *way) measure(ctx context.Context, ms int) error {
	down, err := y.ask(ctx, "down", ms)
	if err != nil {
		return err
	}
	if len(down) != 2 || down[1] <= 0 {
		return fmt.Errorf("read answer: %v", down)
	}
	trips, err := y.ask(ctx, "trips", ms)
	if err != nil {
		return err
	}
	connects, err := y.ask(ctx, "connects", max(ms/6, 10))
	if err != nil {
		return err
	}
	sum := 0.0
	for _, ns := range connects {
		sum += ns
	}
	y.gbit = append(y.gbit, down[0]*8/down[1])
	y.tripUS = append(y.tripUS, percentile(trips, 50)/1000)
	y.connects = append(y.connects, float64(len(connects))/sum*1e9)
	return nil
}

// spread is nil where nothing was measured.
func spread(values []float64) *Spread {
	if len(values) == 0 {
		return nil
	}
	return &Spread{Samples: len(values), Min: percentile(values, 0), Median: percentile(values, 50), Max: percentile(values, 100)}
}

func trafficRows(ways []*way) []TrafficRow {
	rows := []TrafficRow{}
	byName := map[string]*way{}
	for _, y := range ways {
		byName[y.name] = y
		row := TrafficRow{Way: y.name, Against: y.against, Failed: y.failed}
		if y.aim > 0 {
			row.Aim = &y.aim
		}
		if y.failed == "" {
			row.Gbit, row.TripUS, row.Connects = spread(y.gbit), spread(y.tripUS), spread(y.connects)
			if base := byName[y.against]; base != nil {
				row.GbitRatio, row.TripRatio, row.ConnectsRatio = ratio(y.gbit, base.gbit), ratio(y.tripUS, base.tripUS), ratio(y.connects, base.connects)
			}
		}
		rows = append(rows, row)
	}
	return rows
}

// ratio is the median of the rounds' ratios: a noisy moment spoils its round
// only, and often both sides of it.
func ratio(a, b []float64) *float64 {
	if len(a) == 0 || len(a) != len(b) {
		return nil
	}
	var all []float64
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	r := percentile(all, 50)
	return &r
}
