// Package systemd speaks the small protocols between systemd and a service:
// notifications, the watchdog, passed sockets, credentials, the journal. It
// reads what systemd says in the environment and owns nothing else; it must
// never know sandboxes, cgroups or D-Bus (that is runtime/systemd/scope), and
// neither package net nor a library may come in: it is on the way of `run`.
package systemd

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// The ways of --sdnotify, in podman's words.
const (
	// NotifyConmon: the supervisor tells when the command runs and when it
	// stops, and answers the watchdog while the command lives.
	NotifyConmon = "conmon"
	// NotifyContainer: the command tells that itself, by a socket inside.
	NotifyContainer = "container"
	// NotifyIgnore: nobody is told anything.
	NotifyIgnore = "ignore"
)

// Service is the service manager above this process. A nil Service is none:
// every method may be called on it and does nothing.
type Service struct {
	// Relay says that the command itself tells what it does (NotifyContainer).
	Relay bool
	// Watchdog is the time within which the manager wants to hear of us; 0 is
	// never.
	Watchdog time.Duration

	fd   int
	addr *unix.SockaddrUnix
}

// Find gives the service manager that the environment names, nil where there
// is none or where nobody is to be told. mode is one of the words above; ""
// is NotifyConmon.
func Find(mode string) (*Service, error) {
	switch mode {
	case "", NotifyConmon, NotifyContainer:
	case NotifyIgnore:
		return nil, nil
	default:
		return nil, fmt.Errorf("%q is not conmon, container or ignore", mode)
	}
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, nil
	}
	addr, err := address(path)
	if err != nil {
		return nil, hinted.New(fmt.Errorf("NOTIFY_SOCKET=%q: %w", path, err), "--sdnotify ignore tells nobody")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	// A manager that does not listen must not keep the supervisor from its limits.
	wait := unix.NsecToTimeval(int64(patience))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait); err != nil {
		return nil, errors.Join(fmt.Errorf("set time limit of socket: %w", err), unix.Close(fd))
	}
	s := &Service{Relay: mode == NotifyContainer, fd: fd, addr: addr}
	if us, err := strconv.ParseUint(os.Getenv("WATCHDOG_USEC"), 10, 62); err == nil && forUs("WATCHDOG_PID") {
		s.Watchdog = time.Duration(min(us, 1<<52)) * time.Microsecond
	}
	return s, nil
}

// forUs says whether a variable names this process. Without it, any is meant.
func forUs(pid string) bool {
	v := os.Getenv(pid)
	return v == "" || v == strconv.Itoa(os.Getpid())
}

// address reads sd_notify(3)'s: a path, or @ and an abstract name.
func address(path string) (*unix.SockaddrUnix, error) {
	if path[0] != '/' && path[0] != '@' || len(path) < 2 {
		return nil, errors.New("neither a path nor an abstract name")
	}
	if len(path) > 107 {
		return nil, errors.New("too long for a socket's name")
	}
	return &unix.SockaddrUnix{Name: path}, nil // unix takes @ for the abstract NUL
}

// patience is how long send waits where the manager's queue is full.
const patience = time.Second

// send gives the manager lines of KEY=VALUE. Who is not there or does not listen
// hears nothing: a command does not end for that.
func (s *Service) send(lines ...string) {
	if s == nil {
		return
	}
	for errors.Is(unix.Sendto(s.fd, []byte(strings.Join(lines, "\n")), unix.MSG_NOSIGNAL, s.addr), unix.EINTR) {
	}
}

// Status is a line for `systemctl status`.
func (s *Service) Status(text string) { s.send("STATUS=" + printable(text, maxStatus)) }

// Started says that the command runs.
func (s *Service) Started(text string) {
	if s == nil {
		return
	}
	lines := []string{"STATUS=" + printable(text, maxStatus)}
	if !s.Relay {
		lines = append(lines, "READY=1")
	}
	s.send(lines...)
}

// Stopping says that the command was asked to stop, or has ended.
func (s *Service) Stopping(text string) {
	s.send("STOPPING=1", "STATUS="+printable(text, maxStatus))
}

// Alive answers the watchdog.
func (s *Service) Alive() { s.send("WATCHDOG=1") }

// Beat gives ticks at which Alive is due, nil (which never ticks) where the
// manager does not want to know or hears it from the command itself.
func (s *Service) Beat() (ticks <-chan time.Time, stop func()) {
	if s == nil || s.Watchdog <= 0 || s.Relay {
		return nil, func() {}
	}
	t := time.NewTicker(max(s.Watchdog/2, time.Millisecond)) // half of it, says sd_watchdog_enabled(3)
	return t.C, t.Stop
}

// Close lets go of the socket.
func (s *Service) Close() error {
	if s == nil {
		return nil
	}
	return unix.Close(s.fd)
}

// maxStatus bounds a status line.
const maxStatus = 256

// printable is s without control characters, cut to n bytes.
func printable(s string, n int) string {
	s = strings.ToValidUTF8(s, "?")
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "")
	}
	return s
}
