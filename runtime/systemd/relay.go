package systemd

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// RelayDir is where the command finds its socket; RelaySocket is its
// NOTIFY_SOCKET. The names are podman's.
const (
	RelayDir    = "/run/notify"
	RelaySocket = RelayDir + "/notify.sock"
)

// What a command may send: no more than this at once and this often. A command
// that sends more is slept over, and its socket's queue (ten messages) fills:
// it blocks itself.
const (
	maxMessage = 4096
	relayBurst = 20
	relayEvery = 50 * time.Millisecond
)

// Relay is a notification socket for one command.
type Relay struct {
	fd   *os.File
	done chan struct{}
}

// Listen makes the socket in dir, a folder's descriptor: for uid and gid to
// write to, and nobody else.
func Listen(dir, uid, gid int) (_ *Relay, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), RelaySocket)
	at := "/proc/self/fd/" + strconv.Itoa(dir) + "/notify.sock"
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: at})
	if err == nil {
		err = unix.Fchmodat(dir, "notify.sock", 0o600, 0)
	}
	if err == nil {
		err = unix.Fchownat(dir, "notify.sock", uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make notification socket: %w", err), f.Close())
	}
	return &Relay{fd: f, done: make(chan struct{})}, nil
}

// Serve passes on what the command may say, until Close.
func (r *Relay) Serve(s *Service) {
	go func() {
		defer close(r.done)
		buf := make([]byte, maxMessage+1)
		tokens, last := relayBurst, time.Now()
		for {
			// read, not recvmsg: descriptors that come along are dropped by the kernel.
			n, err := r.fd.Read(buf)
			if err != nil {
				return
			}
			if since := int(time.Since(last) / relayEvery); since > 0 {
				tokens, last = min(tokens+since, relayBurst), time.Now()
			}
			if tokens--; tokens < 0 {
				time.Sleep(relayEvery)
				tokens, last = 0, time.Now()
			}
			if n > maxMessage {
				continue
			}
			if lines := Filter(string(buf[:n])); len(lines) > 0 {
				s.send(lines...)
			}
		}
	}()
}

// Close ends it. What was sent before is passed on.
func (r *Relay) Close() error {
	_ = r.fd.SetReadDeadline(time.Now().Add(time.Millisecond)) // what is queued is read first
	<-r.done
	return r.fd.Close()
}

// Filter gives the lines of a message that a command may say of itself. Not
// among them: MAINPID and what else names processes (the main one is the
// supervisor), FDSTORE, and all that is not known.
func Filter(msg string) []string {
	var out []string
	for line := range strings.SplitSeq(msg, "\n") {
		k, v, ok := strings.Cut(line, "=")
		if !ok {
			continue
		}
		switch k {
		case "READY", "RELOADING", "STOPPING":
			ok = v == "1"
		case "WATCHDOG":
			ok = v == "1" || v == "trigger"
		case "EXTEND_TIMEOUT_USEC", "MONOTONIC_USEC":
			_, err := strconv.ParseUint(v, 10, 64)
			ok = err == nil
		case "STATUS":
			line = "STATUS=" + printable(v, maxStatus)
		default:
			ok = false
		}
		if ok {
			out = append(out, line)
		}
	}
	return out
}
