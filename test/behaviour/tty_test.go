package behaviour

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/harness"
)

// screen is a terminal that a program runs on, and what it showed.
type screen struct {
	t      *testing.T
	master *os.File
	slave  *os.File
	mu     sync.Mutex
	text   bytes.Buffer
}

func newScreen(t *testing.T) *screen {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	fd := int(master.Fd())
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 77}))
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	s := &screen{t: t, master: master, slave: slave}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			s.mu.Lock()
			s.text.Write(buf[:n])
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = slave.Close() // the last slave: the reader sees EIO
		<-done
		_ = master.Close()
	})
	return s
}

func (s *screen) start(cmd *exec.Cmd) {
	s.t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.slave, s.slave, s.slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	require.NoError(s.t, cmd.Start())
}

func (s *screen) shows(want string) {
	s.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		ok := strings.Contains(s.text.String(), want)
		s.mu.Unlock()
		if ok {
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	require.Failf(s.t, "the terminal does not show it", "want %q in %q", want, s.text.String())
}

func (s *screen) mode() unix.Termios {
	s.t.Helper()
	m, err := unix.IoctlGetTermios(int(s.slave.Fd()), unix.TCGETS)
	require.NoError(s.t, err)
	return *m
}

// A terminal of its own, of the caller's size, with the caller's keys; raw mode
// is over when the command is.
func TestTerminal(t *testing.T) {
	s := harness.New(t)
	sc := newScreen(t)
	before := sc.mode()
	report := s.ReportFile()
	cmd := s.Cmd("run", "-it", "--report", report, "--", "sh", "-c", "stty size; test -t 0 && echo is-a-tty; read x; echo got-$x; sleep 60")
	sc.start(cmd)
	sc.shows("33 77")
	sc.shows("is-a-tty")
	require.NoError(t, unix.IoctlSetWinsize(int(sc.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 20, Col: 50}))
	_, err := sc.master.WriteString("word\r")
	require.NoError(t, err)
	sc.shows("got-word")
	_, err = sc.master.WriteString("\x03") // Ctrl-C goes to the command, as on any terminal
	require.NoError(t, err)
	o := s.Wait(cmd)
	o.Report = s.ReadReport(report)
	require.NotNil(t, o.Report)
	assert.Equal(t, 130, o.Code)
	assert.Equal(t, before, sc.mode(), "raw mode must be over")
}
