// sbxrun-net opens a sandbox's network namespace to the outside, as far as was
// asked: it is started by sbxrun with a socket on descriptor 3, and is no
// program for people. Once all is set up it has no privileges; it ends with
// that socket, whatever became of sbxrun.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/netns/egress"
	"github.com/sbxrun/sbxrun/netns/publish"
	"github.com/sbxrun/sbxrun/netns/routed"
)

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "serve":
		os.Exit(serve())
	case len(os.Args) == 2 && os.Args[1] == "doctor":
		os.Exit(doctor())
	case len(os.Args) == 3 && os.Args[1] == "gc":
		os.Exit(gc(os.Args[2]))
	}
	fmt.Fprintln(os.Stderr, "sbxrun-net: started by sbxrun, not by hand (see sbxrun --help)")
	os.Exit(125)
}

// doctor writes what keeps a mode from working here, as JSON: by mode, in pairs
// of what and what to do.
func doctor() int {
	problems := map[string][][2]string{}
	if err := tryEgress(); err != nil {
		problems[netns.ModeEgress] = [][2]string{{err.Error(), hinted.Of(err)}}
	}
	for _, p := range routed.Probe() {
		problems[netns.ModeFull] = append(problems[netns.ModeFull], [2]string{p.What, p.Hint})
	}
	if err := json.NewEncoder(os.Stdout).Encode(problems); err != nil {
		return 1
	}
	return 0
}

func tryEgress() error {
	ns, err := netns.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	policy, err := egress.ParsePolicy(nil, nil, nil)
	if err != nil {
		return err
	}
	e, err := egress.Open(ns, egress.Config{Policy: policy})
	if err != nil {
		return err
	}
	return e.Close()
}

// gc removes the host's rules when no sandbox needs them.
func gc(state string) int {
	if err := netns.WhileIdle(state, routed.Remove); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// endTimeout is longer than sbxrun waits for the figures.
const endTimeout = 10 * time.Second

// maxRequestBytes bounds what is read of a request: 64 KiB hold a thousand rules.
const maxRequestBytes = 1 << 20

func serve() int {
	signal.Ignore(unix.SIGPIPE, unix.SIGINT, unix.SIGTERM, unix.SIGHUP) // the socket's end is ours
	control := os.NewFile(netns.ControlFD, "control")
	unix.CloseOnExec(netns.ControlFD)
	lines := json.NewEncoder(control)
	req, ns, err := receive()
	var s *server
	if err == nil {
		s, err = open(req, ns)
	}
	if err != nil {
		_ = lines.Encode(netns.Reply{Error: err.Error(), Hint: hinted.Of(err)}) // who does not read it is gone
		return 1
	}
	if err := lines.Encode(netns.Reply{Ready: &s.ready}); err != nil {
		return 1
	}
	if s.ready.Serving {
		_, _ = io.Copy(io.Discard, control)
	}
	// A log that does not take what is written must not keep us: sbxrun may be gone.
	time.AfterFunc(endTimeout, func() { os.Exit(1) })
	if err := s.close(); err != nil {
		_ = lines.Encode(netns.Reply{Error: err.Error()})
		return 1
	}
	stats := s.stats()
	_ = lines.Encode(netns.Reply{Stats: &stats})
	return 0
}

// receive reads the request and the namespace that comes with its first byte.
func receive() (req netns.Request, ns *netns.NS, err error) {
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(netns.ControlFD, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return req, nil, fmt.Errorf("read request: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return req, nil, errors.Join(errors.New("read request: no namespace came with it"), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return req, nil, errors.Join(errors.New("read request: no namespace came with it"), err)
	}
	ns = netns.FromFile(os.NewFile(uintptr(fds[0]), "netns"))
	text := buf[:n]
	for len(text) > 0 && text[len(text)-1] != '\n' && len(text) < maxRequestBytes {
		n, err := unix.Read(netns.ControlFD, buf)
		if n <= 0 {
			return req, nil, errors.Join(errors.New("read request: it is not complete"), err)
		}
		text = append(text[:len(text):len(text)], buf[:n]...)
	}
	if err := json.Unmarshal(text, &req); err != nil {
		return req, nil, fmt.Errorf("read request: %w", err)
	}
	return req, ns, nil
}

// server is what is served for one sandbox.
type server struct {
	ready  netns.Ready
	ledger ledger
	egress *egress.Egress
	ports  *publish.Forwarder
	inside *netns.Inside
}

func open(req netns.Request, ns *netns.NS) (s *server, err error) {
	s = &server{}
	if req.Log {
		unix.CloseOnExec(netns.LogFD)
		s.ledger.log = os.NewFile(netns.LogFD, "net-log")
	}
	if err := ns.OpenToUsers(); err != nil {
		return nil, err
	}
	switch req.Mode {
	case netns.ModeEgress:
		policy, err := egress.ParsePolicy(req.Allow, req.Deny, req.Into)
		if err != nil {
			return nil, err
		}
		s.egress, err = egress.Open(ns, egress.Config{
			Policy: policy, MaxConns: req.MaxConns, MaxBytes: req.MaxBytes,
			RateUpBPS: req.RateUpBPS, RateDownBPS: req.RateDownBPS, Log: s.ledger.note,
		})
		if err != nil {
			return nil, err
		}
		s.ready.Env, s.ready.Resolv, s.ready.Serving = s.egress.Env(), s.egress.Resolv(), true
	case netns.ModeFull:
		r, err := routed.Open(ns, routed.Config{
			ID: req.ID, Slot: req.Slot, State: req.State, Allow: req.Allow, Deny: req.Deny,
			RateUpBPS: req.RateUpBPS, RateDownBPS: req.RateDownBPS, MTU: req.MTU, DNS: req.DNS,
		})
		if err != nil {
			return nil, err
		}
		s.ready = *r
	case netns.ModeNone:
	default:
		return nil, fmt.Errorf("set up network %q: unknown mode", req.Mode)
	}
	if req.Served() {
		if s.inside, err = ns.Enter(); err != nil {
			return nil, err
		}
		if s.ports, s.ready.Ports, err = publish.Open(s.inside, req.Options, s.ledger.note); err != nil {
			return nil, err
		}
		s.ready.Serving = true
	}
	// The namespace must go with the sandbox, and not wait for us.
	if err := ns.Close(); err != nil {
		return nil, err
	}
	return s, drop(req.DropTo)
}

// drop gives up all privileges, on every thread: what comes from inside is
// parsed without them.
func drop(id uint32) error {
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); e != 0 {
		return fmt.Errorf("drop privileges: %w", e)
	}
	n := int(id)
	// Package syscall's act on all threads, as the kernel's do not.
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(n, n, n), syscall.Setresuid(n, n, n)); err != nil {
		return fmt.Errorf("drop privileges: %w", err)
	}
	// The change of ids does this too, unless the caller's securebits say no.
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&none)), 0); e != 0 {
		return fmt.Errorf("drop privileges: %w", e)
	}
	return nil
}

func (s *server) close() error {
	var errs []error
	if s.ports != nil {
		errs = append(errs, s.ports.Close())
	}
	if s.inside != nil {
		s.inside.Close()
	}
	if s.egress != nil {
		errs = append(errs, s.egress.Close())
	}
	return errors.Join(errs...)
}

func (s *server) stats() (out netns.Summary) {
	if s.egress != nil {
		stats := s.egress.Stats()
		out.Stats = &stats
	}
	if s.ports != nil {
		out.PortStats = &netns.PortStats{}
		out.PortConnections, out.InBytes, out.OutBytes = s.ports.Stats()
	}
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	out.Decisions, out.Omitted = s.ledger.tallies, s.ledger.omitted
	return out
}

// ledger counts decisions, and writes each down where that was asked for.
type ledger struct {
	mu      sync.Mutex
	index   map[netns.Decision]int
	tallies []netns.Tally
	room    map[bool]int // used, of allowed ones and of others
	omitted int64

	logging sync.Mutex // not mu: a log that stalls must not keep the figures
	log     io.Writer
	torn    bool // the log ends in the middle of a line
	written int64
	full    bool
}

// A job can ask for any number of names: what is kept is bounded, and what was
// reached has room of its own, so that refusals cannot push it out.
const (
	maxTallies  = 256 // of either kind
	maxLogBytes = 64 << 20
)

func (l *ledger) note(d netns.Decision) {
	l.tally(d)
	if l.log != nil {
		l.write(d)
	}
}

func (l *ledger) tally(d netns.Decision) {
	l.mu.Lock()
	defer l.mu.Unlock()
	same := d
	same.Time = time.Time{}
	if l.index == nil {
		l.index, l.room = map[netns.Decision]int{}, map[bool]int{}
	}
	if i, ok := l.index[same]; ok {
		l.tallies[i].Count++
		return
	}
	if l.room[d.Allowed] == maxTallies {
		l.omitted++
		return
	}
	l.room[d.Allowed]++
	l.index[same] = len(l.tallies)
	l.tallies = append(l.tallies, netns.Tally{Decision: d, Count: 1})
}

// write writes a line. A full disk is no reason to end what is served, nor to
// write nothing when there is room again.
func (l *ledger) write(d netns.Decision) {
	l.logging.Lock()
	defer l.logging.Unlock()
	if l.full {
		return
	}
	if l.written >= maxLogBytes { // --disk does not bound it
		l.full = true
		d = netns.Decision{Time: d.Time, Via: "log", Rule: fmt.Sprintf("%d bytes are written: nothing more is", l.written)}
	}
	b, err := json.Marshal(d)
	if err != nil {
		return
	}
	b = append(b, '\n')
	if l.torn {
		b = append([]byte{'\n'}, b...)
	}
	n, err := l.log.Write(b)
	l.written += int64(n)
	if n > 0 {
		l.torn = err != nil
	}
}
