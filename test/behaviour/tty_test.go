package behaviour

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/harness"
)

// A terminal of its own, of the caller's size, with the caller's keys; raw mode
// is over when the command is.
func TestTerminal(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		sc := harness.NewScreen(t)
		before := sc.Mode()
		report := s.ReportFile()
		cmd := s.Cmd("run", "-it", "--report", report, "--", "sh", "-c", "stty size; test -t 0 && echo is-a-tty; read x; echo got-$x; read y")
		sc.Start(cmd)
		sc.Shows("33 77")
		sc.Shows("is-a-tty")
		require.NoError(t, unix.IoctlSetWinsize(int(sc.Master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 20, Col: 50}))
		_, err := sc.Master.WriteString("word\r")
		require.NoError(t, err)
		sc.Shows("got-word")
		// The shell itself reads: a child could lose it between fork and exec.
		_, err = sc.Master.WriteString("\x03") // Ctrl-C goes to the command, as on any terminal
		require.NoError(t, err)
		o := s.Wait(cmd)
		o.Report = s.ReadReport(report)
		require.NotNil(t, o.Report)
		assert.Equal(t, 130, o.Code)
		assert.Equal(t, before, sc.Mode(), "raw mode must be over")
	})
}
