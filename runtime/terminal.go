package runtime

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// terminal connects the caller's terminal with the sandbox's own: the slave
// is made inside, the master comes over a socket.
type terminal struct {
	io         IO
	stdin      bool
	limit      *output  // counts what is copied; nil is no limit
	sock, peer *os.File // ours, the engine's
	master     *os.File
	rows, cols uint16
	saved      *unix.Termios // nil where stdin is no terminal
	guard      *os.File
	guardCmd   *exec.Cmd
	wg         sync.WaitGroup
}

func newTerminal(out IO, stdin bool, outputLimit int64) (*terminal, error) {
	t := &terminal{io: out, stdin: stdin, rows: 24, cols: 80}
	if outputLimit > 0 {
		t.limit = newCounter(outputLimit)
	}
	if stdin && out.Stdin != nil {
		saved, err := unix.IoctlGetTermios(int(out.Stdin.Fd()), unix.TCGETS)
		if err != nil {
			return nil, &Error{Op: "open terminal", Stage: "launch", Err: errors.New("standard input is not a terminal"), Hint: "leave -t away, or run from a terminal"}
		}
		t.saved = saved
	}
	t.size()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	t.sock, t.peer = os.NewFile(uintptr(fds[0]), "console"), os.NewFile(uintptr(fds[1]), "console-peer")
	return t, nil
}

// size reads the caller's window; the first of stdin, stdout, stderr that has one.
func (t *terminal) size() {
	for _, f := range []*os.File{t.io.Stdin, t.io.Stdout, t.io.Stderr} {
		if f == nil {
			continue
		}
		if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Row > 0 {
			t.rows, t.cols = ws.Row, ws.Col
			return
		}
	}
}

// receive takes the master and starts to copy.
func (t *terminal) receive() error {
	t.peer.Close()
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(t.sock.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return &Error{Op: "receive terminal", Stage: "launch", Err: err}
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return &Error{Op: "receive terminal", Stage: "launch", Err: errors.Join(errors.New("no descriptor came"), err)}
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return &Error{Op: "receive terminal", Stage: "launch", Err: errors.Join(errors.New("no descriptor came"), err)}
	}
	_ = unix.SetNonblock(fds[0], true) // so that Close ends a Read
	t.master = os.NewFile(uintptr(fds[0]), "pty")
	t.resize()
	if t.saved != nil {
		if err := t.startGuard(); err != nil {
			return err
		}
		raw := *t.saved
		raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
		raw.Oflag &^= unix.OPOST
		raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
		raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
		raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
		if err := unix.IoctlSetTermios(int(t.io.Stdin.Fd()), unix.TCSETS, &raw); err != nil {
			return &Error{Op: "set terminal to raw mode", Stage: "launch", Err: err}
		}
	}
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		// Ends with EIO when the last slave is closed.
		if t.limit != nil {
			t.limit.copy(t.io.Stdout, t.master)
			return
		}
		_, _ = io.Copy(t.io.Stdout, t.master)
	}()
	if t.stdin && t.io.Stdin != nil {
		go func() { _, _ = io.Copy(t.master, t.io.Stdin) }() // ends with the process
	}
	return nil
}

// resize gives the sandbox's terminal the caller's window size.
func (t *terminal) resize() {
	t.size()
	if t.master != nil {
		_ = unix.IoctlSetWinsize(int(t.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: t.rows, Col: t.cols})
	}
}

func (t *terminal) drain(signals <-chan os.Signal) { drain(&t.wg, signals, t.master) }

func (t *terminal) close() error {
	var errs []error
	if t.saved != nil {
		errs = append(errs, unix.IoctlSetTermios(int(t.io.Stdin.Fd()), unix.TCSETS, t.saved))
	}
	if t.guard != nil {
		_, _ = t.guard.Write([]byte{'k'})
		t.guard.Close()
		_ = t.guardCmd.Wait()
	}
	t.sock.Close()
	t.peer.Close()
	if t.master != nil {
		t.master.Close()
	}
	return errors.Join(errs...)
}

// ttyGuardName is argv[0] of the guard.
const ttyGuardName = "sbxrun-tty-guard"

// startGuard starts a copy of ourselves that puts the terminal back if we
// should be killed while it is raw.
func (t *terminal) startGuard() error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{ttyGuardName}
	cmd.Stdin = t.io.Stdin
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// The state to restore travels in the pipe, ahead of raw mode.
	err = binary.Write(w, binary.NativeEndian, t.saved)
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		w.Close()
		return &Error{Op: "start terminal guard", Stage: "launch", Err: err}
	}
	t.guard, t.guardCmd = w, cmd
	return nil
}

// TTYGuard is the guard's main: it returns false at once in any other process.
func TTYGuard(args []string) bool {
	if len(args) == 0 || args[0] != ttyGuardName {
		return false
	}
	var saved unix.Termios
	pipe := os.NewFile(3, "supervisor")
	if err := binary.Read(pipe, binary.NativeEndian, &saved); err != nil {
		return true
	}
	// One byte: all is well. End of file: the supervisor was killed.
	if n, _ := pipe.Read(make([]byte, 1)); n == 0 {
		_ = unix.IoctlSetTermios(0, unix.TCSETS, &saved)
	}
	return true
}
