package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/sbxrun/sbxrun/runtime"
)

// ui is the only part that prints for people: errors and progress on standard
// error, answers on standard output.
type ui struct {
	stdout, stderr io.Writer
	tty            bool // standard error is a terminal
	color          bool
	quiet          bool
	phase          string
	began, phaseAt time.Time
	drawn          bool
	stop           chan struct{}
	stopped        chan struct{}
	tell           func(status string) // a service manager; nil is none
}

func newUI() *ui {
	tty := term.IsTerminal(int(os.Stderr.Fd()))
	return &ui{stdout: os.Stdout, stderr: os.Stderr, tty: tty, color: tty && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (u *ui) paint(code, s string) string {
	if !u.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (u *ui) out(s string) { fmt.Fprint(u.stdout, s) }

func (u *ui) outf(format string, a ...any) { fmt.Fprintf(u.stdout, format, a...) }

// error prints one line and the hint.
func (u *ui) error(err error) {
	u.Done()
	fmt.Fprintf(u.stderr, "%s %s\n", u.paint("1;31", "sbxrun:"), printable(err.Error()))
	if h := runtime.HintOf(err); h != "" {
		u.hint(h)
	}
}

func (u *ui) hint(h string) { fmt.Fprintf(u.stderr, "%s %s\n", u.paint("36", "hint:"), printable(h)) }

func (u *ui) note(format string, a ...any) {
	if u.quiet {
		return
	}
	u.Done()
	fmt.Fprintf(u.stderr, "%s %s\n", u.paint("2", "sbxrun:"), printable(fmt.Sprintf(format, a...)))
}

// printable keeps an error on one line and control characters off the terminal.
func printable(s string) string {
	s = strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 { // C0, DEL, C1: 0x9b begins a control sequence too
			return '?'
		}
		return r
	}, s)
}

func (u *ui) usage(v *verb) { fmt.Fprint(u.stderr, helpText(v)) }

// Phase implements envs.Progress: one line that is rewritten on a terminal,
// plain lines elsewhere.
func (u *ui) Phase(name, detail string) {
	if u.tell != nil {
		u.tell(printable(name + " " + detail))
	}
	if u.quiet {
		return
	}
	u.halt()
	now := time.Now()
	if u.began.IsZero() {
		u.began = now
	}
	u.phaseAt = now
	u.phase = printable(strings.TrimSpace(fmt.Sprintf("%-9s %s", name, detail)))
	if !u.tty {
		fmt.Fprintf(u.stderr, "sbxrun: %s\n", u.phase)
		return
	}
	u.draw()
	u.stop, u.stopped = make(chan struct{}), make(chan struct{})
	go func(stop, stopped chan struct{}) {
		defer close(stopped)
		t := time.NewTicker(100 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-stop:
				return
			case <-t.C:
				u.draw()
			}
		}
	}(u.stop, u.stopped)
}

func (u *ui) draw() {
	spin := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
	since := time.Since(u.began)
	line := fmt.Sprintf("%c %s  %.1fs", spin[int(since/(100*time.Millisecond))%len(spin)], u.phase, since.Seconds())
	if w, _, err := term.GetSize(int(os.Stderr.Fd())); err == nil && w > 8 && len([]rune(line)) >= w {
		line = string([]rune(line)[:w-1])
	}
	fmt.Fprintf(u.stderr, "\r\x1b[K%s", line)
	u.drawn = true
}

func (u *ui) halt() {
	if u.stop != nil {
		close(u.stop)
		<-u.stopped
		u.stop = nil
	}
}

// Done ends the progress line.
func (u *ui) Done() {
	u.halt()
	if u.drawn {
		fmt.Fprint(u.stderr, "\r\x1b[K")
		u.drawn = false
	}
	u.began = time.Time{}
}
