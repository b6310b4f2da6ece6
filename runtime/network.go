package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

// network is a sandbox's network namespace, where this process made it, and
// the helper that opens it (cmd/sbxrun-net). The namespace is made here, as
// pid 1 is born in it; the helper starts and sets it up while pid 1, the cgroup
// and the root are made, and is waited for when the root needs what it says.
type network struct {
	ns         *netns.NS
	forwarding *netns.Forwarding
	*Helper    // nil where the namespace is all that is needed
	ready      *netns.Ready
	stopping   bool
	sockets    []hostSocket
	helperCPU  time.Duration
	stats      *netns.Summary
	err        error // why there are no stats
}

// maxReplyBytes is more than the helper ever says: it may have been taken over.
const maxReplyBytes = 8 << 20

// Helper is an sbxrun-net that starts, or waits to be asked.
type Helper struct {
	pid     int
	control *os.File
	replies *json.Decoder
	started chan error
}

// StartHelper starts sbxrun-net before anything is planned: it takes as long as
// planning does. netLog, which may be nil, is [IO.NetLog]. Close ends it unless a
// sandbox was given it.
func StartHelper(netLog *os.File) *Helper {
	started := make(chan error, 1)
	h := &Helper{started: started}
	go func() { started <- h.start(netLog) }() // h.started may be nil by then
	return h
}

// Close ends a helper that no sandbox took.
func (h *Helper) Close() {
	if h == nil || h.started == nil || <-h.started != nil {
		return
	}
	h.started = nil
	h.control.Close()
	h.wait()
}

// wait gives the CPU time that it took.
func (h *Helper) wait() time.Duration {
	var u unix.Rusage
	for {
		if _, err := unix.Wait4(h.pid, nil, 0, &u); !errors.Is(err, unix.EINTR) {
			return time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
}

// helperID is the id, in the sandbox's own range, that the helper goes on as:
// nothing else of the host or of another sandbox has it.
func (p *Plan) helperID() uint32 {
	id := uint32(65533)
	for id == p.UID || id == p.GID {
		id--
	}
	return id
}

// helped says whether the plan's network takes sbxrun-net.
func (p *Plan) helped() bool {
	return p.Network == netns.ModeEgress || p.Network == netns.ModeFull || p.Net != nil && p.Net.Served()
}

func (s *sandbox) openNetwork() error {
	p := s.plan
	switch {
	case p.helped() || s.io.Beside != nil && p.Network == netns.ModeNone:
		return s.makeNetwork()
	case strings.HasPrefix(p.Network, "ns:"):
		return s.joinNetwork(strings.TrimPrefix(p.Network, "ns:"), s.io.Joined)
	case strings.HasPrefix(p.Network, "container:"):
		path, ready, err := networkOf(p.Dirs.State, strings.TrimPrefix(p.Network, "container:"))
		if err != nil {
			return err
		}
		return s.joinNetwork(path, ready)
	}
	return nil
}

// joinNetwork has the sandbox share a namespace; ready, which may be nil, is how
// it was set up.
func (s *sandbox) joinNetwork(path string, ready *netns.Ready) error {
	bad := func(err error) error {
		return &Error{Op: "open network namespace", Object: path, Err: err, Hint: "ip netns add NAME makes /run/netns/NAME"}
	}
	f, err := os.Open(path)
	if err != nil {
		return bad(errors.Unwrap(err))
	}
	var st unix.Statfs_t
	err = unix.Fstatfs(int(f.Fd()), &st)
	if err == nil && st.Type != unix.NSFS_MAGIC {
		err = errors.New("not a namespace")
	}
	if kind, kerr := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err == nil && (kerr != nil || kind != unix.CLONE_NEWNET) {
		err = errors.New("not a network namespace")
	}
	if err != nil {
		f.Close()
		return bad(err)
	}
	var own, given unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/net", &own), unix.Fstat(int(f.Fd()), &given)); err != nil || own.Ino == given.Ino && own.Dev == given.Dev {
		f.Close()
		return &Error{Op: "open network namespace", Object: path, Err: errors.Join(errors.New("it is the host's own"), err), Hint: "--network host says so by name, and the report too"}
	}
	s.files.NetNS = f
	s.push(f.Close)
	if ready != nil {
		s.net = &network{ready: ready}
	}
	return nil
}

// networkOf gives the path of a live sandbox's network namespace, and how it was
// set up.
func networkOf(state, name string) (string, *netns.Ready, error) {
	j, err := findSandbox(state, name)
	if err != nil {
		return "", nil, &Error{Op: "find sandbox", Object: name, Err: err, Hint: "give the id or the --name of a sandbox that runs"}
	}
	for _, dir := range j.Cgroups {
		for pid := range strings.FieldsSeq(readTrim(dir + "/cgroup.procs")) {
			path := "/proc/" + pid + "/ns/net"
			if _, err := os.Stat(path); err == nil {
				return path, j.Net, nil
			}
		}
	}
	return "", nil, &Error{Op: "find sandbox", Object: name, Err: errors.New("it has no process yet, or no more")}
}

func (s *sandbox) makeNetwork() (err error) {
	p, n := s.plan, &network{}
	s.net = n
	s.push(n.close)
	if p.Network == netns.ModeFull {
		if n.forwarding, err = netns.HoldForwarding(stageDir); err != nil {
			return err
		}
	}
	if !p.helped() {
		if n.ns, err = netns.New(); err == nil {
			err = n.ns.OpenToUsers()
		}
	} else {
		req := netns.Request{Mode: p.Network, ID: s.id, Slot: s.slot.n, State: stageDir, Log: s.io.NetLog != nil, DropTo: s.slot.idBase() + p.helperID()}
		if p.Net != nil {
			req.Options = *p.Net
		}
		h := s.io.Helper
		if h == nil {
			h = StartHelper(s.io.NetLog)
		}
		n.ns, err = netns.New()
		started := h.started
		h.started = nil // it is ours to end
		serr := <-started
		if serr == nil {
			n.Helper = h
		}
		if serr != nil || err != nil {
			return errors.Join(serr, err)
		}
		err = n.ask(req)
	}
	if err != nil {
		return err
	}
	s.files.NetNS = n.ns.File()
	return nil
}

// start executes the helper.
func (n *Helper) start(netLog *os.File) error {
	path, err := engine.Find("sbxrun-net")
	if err != nil {
		return hinted.New(err, "make install puts all binaries into one directory")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket pair: %w", err)
	}
	defer unix.Close(fds[1])
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return errors.Join(err, unix.Close(fds[0]))
	}
	defer null.Close()
	files := []uintptr{null.Fd(), null.Fd(), 2, uintptr(fds[1])} // standard error: a panic's
	if netLog != nil {
		files = append(files, netLog.Fd())
	}
	// What the caller left open is not the helper's.
	if err := unix.CloseRange(3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return errors.Join(fmt.Errorf("close descriptors: %w", err), unix.Close(fds[0]))
	}
	n.pid, err = syscall.ForkExec(path, []string{"sbxrun-net", "serve"}, &syscall.ProcAttr{
		Dir: "/", Env: helperEnv(os.Environ()), Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return errors.Join(fmt.Errorf("start %q: %w", path, err), unix.Close(fds[0]))
	}
	_ = unix.SetNonblock(fds[0], true)
	n.control = os.NewFile(uintptr(fds[0]), "sbxrun-net")
	n.replies = json.NewDecoder(io.LimitReader(n.control, maxReplyBytes))
	return nil
}

// helperEnv is what of the caller's environment is the host's way out.
func helperEnv(env []string) []string {
	out := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"GOGC=50", // what stays resident counts, not speed
	}
	for _, kv := range env {
		switch k, _, _ := strings.Cut(kv, "="); strings.ToUpper(k) {
		case "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SBXRUN_NET_POOL":
			out = append(out, kv)
		}
	}
	return out
}

// ask sends the request, and the namespace with its first byte.
func (n *network) ask(req netns.Request) error {
	b, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	b = append(b, '\n')
	c, err := n.control.SyscallConn()
	if err != nil {
		return err
	}
	sent := 0
	werr := c.Write(func(fd uintptr) bool {
		sent, err = unix.SendmsgN(int(fd), b, unix.UnixRights(int(n.ns.File().Fd())), nil, unix.MSG_NOSIGNAL)
		return !errors.Is(err, unix.EAGAIN)
	})
	if err = errors.Join(err, werr); err == nil && sent < len(b) {
		_, err = n.control.Write(b[sent:])
	}
	if err != nil {
		return fmt.Errorf("ask sbxrun-net: %w", err)
	}
	return nil
}

// next reads the helper's next word.
func (n *Helper) next() (r netns.Reply, err error) {
	if err := n.replies.Decode(&r); err != nil {
		return r, fmt.Errorf("sbxrun-net gave no answer: %w", err)
	}
	if r.Error != "" {
		return r, hinted.New(errors.New(r.Error), r.Hint)
	}
	return r, nil
}

// awaitNetwork waits until the network is as the plan says.
func (s *sandbox) awaitNetwork() error {
	n := s.net
	if n == nil || n.Helper == nil || n.ready != nil {
		return nil
	}
	_ = n.control.SetReadDeadline(time.Now().Add(20 * time.Second))
	r, err := n.next()
	if err != nil {
		return err
	}
	if r.Ready == nil {
		return errors.New("set up network: sbxrun-net gave no answer")
	}
	n.ready = r.Ready
	if s.plan.Net != nil {
		for _, x := range s.plan.Net.ExposeUnix {
			sock, err := noteSocket(x.Path)
			if err != nil {
				return fmt.Errorf("expose UNIX socket %q: %w", x.Path, err)
			}
			n.sockets = append(n.sockets, sock)
		}
	}
	if !r.Ready.Serving { // it has ended
		n.stop()
	}
	if r.Ready.Resolv != "" {
		if err := s.slot.share(r.Ready); err != nil {
			return err
		}
	}
	s.res.Notes = append(s.res.Notes, r.Ready.Notes...)
	if s.io.NetworkReady != nil {
		s.io.NetworkReady(r.Ready)
	}
	for _, p := range r.Ready.Ports {
		s.status1(map[string]any{"event": "published", "id": s.id, "port": p})
	}
	return nil
}

// hostSocket is a UNIX socket of the host's that the helper made. The job may be
// able to change the path (a volume): it is removed from the directory that it
// was made in, and only if it is still the same.
type hostSocket struct {
	dir      *os.File
	name     string
	dev, ino uint64
}

func noteSocket(path string) (s hostSocket, err error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return s, err
	}
	s = hostSocket{dir: os.NewFile(uintptr(fd), filepath.Dir(path)), name: filepath.Base(path)}
	var st unix.Stat_t
	if err := unix.Fstatat(fd, s.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return s, errors.Join(err, s.dir.Close())
	}
	s.dev, s.ino = st.Dev, st.Ino
	return s, nil
}

func (s hostSocket) remove() error {
	defer s.dir.Close()
	var st unix.Stat_t
	fd := int(s.dir.Fd())
	if unix.Fstatat(fd, s.name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Dev != s.dev || st.Ino != s.ino {
		return nil
	}
	return unix.Unlinkat(fd, s.name, 0)
}

// networkSeeds are the files of the root that the network decides.
func (s *sandbox) networkSeeds() []rootfs.Seed {
	etc := []rootfs.Seed{{Path: "/etc", Dir: true, Mode: 0o755}}
	resolv := ""
	switch {
	case s.net == nil:
	case s.net.ready != nil:
		resolv = s.net.ready.Resolv
	case s.plan.Network == netns.ModeEgress:
		resolv = netns.EgressResolv
	}
	if resolv != "" {
		etc = append(etc, rootfs.Seed{Path: "/etc/resolv.conf", Mode: 0o644, Data: []byte(resolv)})
	}
	if len(s.plan.Aliases) > 0 {
		hosts := "127.0.0.1\tlocalhost " + strings.Join(s.plan.Aliases, " ") + "\n::1\tlocalhost ip6-localhost ip6-loopback\n"
		etc = append(etc, rootfs.Seed{Path: "/etc/hosts", Mode: 0o644, Data: []byte(hosts)})
	}
	if len(etc) == 1 {
		return nil
	}
	return etc
}

// networkEnv are the variables that lead to the proxy, but for those that the
// caller has set otherwise.
func (s *sandbox) networkEnv() (env []string) {
	if s.net == nil || s.net.ready == nil {
		return nil
	}
	set := map[string]bool{}
	for _, kv := range s.plan.Env {
		k, _, _ := strings.Cut(string(kv), "=")
		set[strings.ToUpper(k)] = true // programs differ in which case they read
	}
	for _, kv := range s.net.ready.Env {
		k, _, _ := strings.Cut(kv, "=")
		if strings.EqualFold(k, "NO_PROXY") {
			kv = strings.Join(append([]string{kv}, s.plan.Aliases...), ",")
		}
		if !set[strings.ToUpper(k)] {
			env = append(env, kv)
		}
	}
	return env
}

// askStop says that nothing more is to be served.
func (n *network) askStop() {
	if n == nil || n.Helper == nil || n.stopping {
		return
	}
	n.stopping = true
	if raw, err := n.control.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
	}
}

// stop ends the helper and takes its figures.
func (n *network) stop() {
	if n.Helper == nil {
		return
	}
	n.askStop()
	c := n.control
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for n.stats == nil && n.err == nil {
		var r netns.Reply
		if r, n.err = n.next(); n.err == nil {
			n.stats = r.Stats
		}
	}
	if n.stats == nil {
		_ = unix.Kill(n.pid, unix.SIGKILL)
	}
	n.helperCPU = n.wait()
	n.Helper = nil
}

func (n *network) close() error {
	n.stop()
	var errs []error
	for _, x := range n.sockets {
		errs = append(errs, x.remove())
	}
	n.sockets = nil
	if n.ns != nil {
		errs = append(errs, n.ns.Close())
		n.ns = nil
	}
	if n.forwarding != nil {
		errs = append(errs, n.forwarding.Release())
		n.forwarding = nil
	}
	return errors.Join(errs...)
}

// measureNetwork ends what serves the network and fills in its figures.
func (s *sandbox) measureNetwork() {
	n, p, r := s.net, s.plan, s.res
	var rx, tx int64
	known := p.Network == netns.ModeNone || p.Network == netns.ModeEgress || p.Network == netns.ModeFull
	if n != nil && n.ns != nil && p.Network == netns.ModeFull { // while the namespace is there
		in, out, err := n.ns.Counters()
		rx, tx, known = int64(in), int64(out), err == nil
	}
	if n != nil && n.ns != nil {
		n.stop()
		r.Network = &ResultNetwork{Mode: p.Network, Summary: n.stats}
		if p.helped() {
			ms := float64(n.helperCPU.Microseconds()) / 1000
			r.Network.HelperCPUMS = &ms
		}
		if n.ready != nil {
			r.Network.Addresses, r.Network.Ports = n.ready.Addresses, n.ready.Ports
		}
		if n.err != nil {
			r.Notes = append(r.Notes, "the network helper ended before the sandbox, which had no network then: "+n.err.Error())
			r.Degraded = append(r.Degraded, "network-record")
			known = false
		}
		if st := n.stats; st != nil {
			if st.Stats != nil {
				rx, tx = rx+st.DownBytes, tx+st.UpBytes
			}
			if st.PortStats != nil {
				rx, tx = rx+st.InBytes, tx+st.OutBytes
			}
			r.addDenials(st)
		}
	}
	if known { // with lo only nothing can have crossed: that is known too
		r.NetRxBytes, r.NetTxBytes = &rx, &tx
	}
}

// addDenials says what was refused.
func (r *Result) addDenials(st *netns.Summary) {
	for _, d := range st.Decisions {
		if !d.Allowed {
			r.Denials = append(r.Denials, denial(d))
		}
	}
	if st.Omitted > 0 {
		r.Denials = append(r.Denials, fmt.Sprintf("network: %d more decisions, allowed and denied, than there is room for here (--net-log)", st.Omitted))
	}
}

func denial(d netns.Tally) string {
	what := d.Host
	if what == "" {
		what = d.Address
	}
	if d.Port != 0 {
		if strings.Contains(what, ":") {
			what = "[" + what + "]"
		}
		what += ":" + strconv.Itoa(d.Port)
	}
	s := "network: " + d.Via + " " + what + ": " + d.Rule
	if d.Count > 1 {
		s += fmt.Sprintf(" (%d times)", d.Count)
	}
	return s
}

// network plans the network.
func (p *Plan) network(spec Spec, _ *Host) error {
	mode, o := spec.Network, spec.Net
	if mode == "" {
		mode = netns.ModeNone
	}
	p.Network = mode
	bad := func(what, why, hint string) error {
		return planErr("set up network", what, errors.New(why), hint)
	}
	rules := len(o.Allow)+len(o.Deny)+len(o.Into) > 0
	ports := o.Served()
	rate := o.RateUpBPS != 0 || o.RateDownBPS != 0
	quota := o.MaxBytes != 0 || o.MaxConns != 0 && !ports
	wants := func(ok bool, flag, where string) error {
		if ok {
			return nil
		}
		return bad(mode, flag+" does nothing there", "it is for --network "+where)
	}
	egress, full := mode == netns.ModeEgress, mode == netns.ModeFull
	switch {
	case mode == netns.ModeNone || egress || full:
	case mode == netns.ModeHost:
		p.Degraded = append(p.Degraded, "network=host")
		p.Namespaces = p.Namespaces[:len(p.Namespaces)-1]
	case strings.HasPrefix(mode, "ns:/"):
	case strings.HasPrefix(mode, "container:") && len(mode) > len("container:"):
	default:
		return bad(mode, "unknown mode", "modes: none, egress, full, host, ns:PATH, container:ID")
	}
	for _, err := range []error{
		wants(!rules || egress || full, "--allow or --deny", "egress or full"),
		wants(!rate || egress || full, "--net-rate", "egress or full"),
		wants(!quota || egress, "--net-bytes or --net-conns", "egress"),
		wants(len(o.DNS) == 0 && o.MTU == 0 || full, "--dns or --mtu", "full"),
		wants(!ports || egress || full || mode == netns.ModeNone, "--publish, --expose-unix or --host-port", "none, egress or full"),
	} {
		if err != nil {
			return err
		}
	}
	if o.MaxBytes < 0 || o.MaxConns < 0 || o.RateUpBPS < 0 || o.RateDownBPS < 0 || o.MTU < 0 {
		return bad(mode, "a limit is negative", "")
	}
	if o.MTU != 0 && (o.MTU < 576 || o.MTU > 65535) {
		return bad(strconv.Itoa(o.MTU), "MTU out of range", "576 to 65535; IPv6 needs 1280")
	}
	if rules || ports || rate || quota || len(o.DNS) > 0 || o.MTU != 0 {
		p.Net = &o
	}
	return nil
}

// networkChecks asks the helper what of the modes works here.
func networkChecks() (out []Check) {
	path, err := engine.Find("sbxrun-net")
	if err != nil {
		return []Check{{Name: "network helper", Detail: err.Error(), Hint: "make build; make install"}}
	}
	out = []Check{{Name: "network helper", OK: true, Detail: path}}
	var problems map[string][][2]string
	b, err := exec.Command(path, "doctor").Output()
	if err == nil {
		err = json.Unmarshal(b, &problems)
	}
	if err != nil {
		return append(out, Check{Name: "networks", OK: true, Warn: true, Detail: "could not be tried: " + err.Error(), Hint: "run sbxrun as root"})
	}
	for _, mode := range []string{netns.ModeEgress, netns.ModeFull} {
		if len(problems[mode]) == 0 {
			out = append(out, Check{Name: "network " + mode, OK: true, Detail: "works"})
		}
		for _, p := range problems[mode] {
			out = append(out, Check{Name: "network " + mode, OK: true, Warn: true, Detail: p[0], Hint: p[1]})
		}
	}
	return out
}

// gcNetwork removes the rules of full networks that nobody needs.
func gcNetwork() error {
	if _, err := os.Stat(stageDir + "/net"); err != nil {
		return nil //nolint:nilerr // then there never was such a network
	}
	path, err := engine.Find("sbxrun-net")
	if err != nil {
		return nil //nolint:nilerr // then there never was such a network
	}
	if out, err := exec.Command(path, "gc", stageDir).CombinedOutput(); err != nil {
		return fmt.Errorf("remove network rules: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// networkText says for people what is planned beside the mode.
func networkText(mode string, o *netns.Options) string {
	parts := []string{mode}
	if o == nil {
		return mode
	}
	for _, x := range []struct {
		word string
		list []string
	}{{"allow", o.Allow}, {"deny", o.Deny}, {"names may lead into", o.Into}, {"dns", o.DNS}} {
		if len(x.list) > 0 {
			parts = append(parts, x.word+" "+strings.Join(x.list, " "))
		}
	}
	for _, x := range o.Publish {
		parts = append(parts, fmt.Sprintf("publish %s:%d to %d/%s", x.HostIP, x.HostPort, x.ContainerPort, x.Proto))
	}
	for _, x := range o.ExposeUnix {
		parts = append(parts, fmt.Sprintf("publish %s to %d", x.Path, x.ContainerPort))
	}
	for _, x := range o.HostPorts {
		parts = append(parts, fmt.Sprintf("%d leads to port %d of the host's loopback", x.ContainerPort, x.HostPort))
	}
	if o.RateUpBPS != 0 || o.RateDownBPS != 0 {
		parts = append(parts, fmt.Sprintf("rate up %s down %s bit/s", zero(o.RateUpBPS), zero(o.RateDownBPS)))
	}
	if o.MaxBytes != 0 {
		parts = append(parts, fmt.Sprintf("at most %d bytes", o.MaxBytes))
	}
	if o.MaxConns != 0 {
		parts = append(parts, fmt.Sprintf("at most %d connections", o.MaxConns))
	}
	if o.MTU != 0 {
		parts = append(parts, fmt.Sprintf("mtu %d", o.MTU))
	}
	return strings.Join(parts, "; ")
}

// beforeStart lets the caller start what shares the network, and stop it while
// that is there.
func (s *sandbox) beforeStart() error {
	s.push(func() error { s.io.Beside.Stop(); return nil })
	if err := s.awaitNetwork(); err != nil {
		return err
	}
	return s.io.Beside.Start(s.files.NetNS, s.net.ready)
}
