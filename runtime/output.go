package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// output counts what the command prints, where there is a limit on it. Each
// stream is a pipe of its own that is read only as fast as the caller's
// descriptor takes it: back-pressure reaches the command.
type output struct {
	stdoutR, stdoutW *os.File
	stderrR, stderrW *os.File
	dst              [2]*os.File
	left             atomic.Int64
	over             chan struct{}
	overOnce         sync.Once
	wg               sync.WaitGroup
	mu               sync.Mutex
	err              error
}

// newCounter counts for who copies by itself: a terminal.
func newCounter(limit int64) *output {
	o := &output{over: make(chan struct{})}
	o.left.Store(limit)
	return o
}

func newOutput(out IO, limit int64) (*output, error) {
	o := newCounter(limit)
	o.dst = [2]*os.File{out.Stdout, out.Stderr}
	var err error
	if o.stdoutR, o.stdoutW, err = os.Pipe(); err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	if o.stderrR, o.stderrW, err = os.Pipe(); err != nil {
		return nil, errors.Join(fmt.Errorf("make pipe: %w", err), o.stdoutR.Close(), o.stdoutW.Close())
	}
	return o, nil
}

// started begins to copy; the write ends are the command's alone from now on.
func (o *output) started() {
	o.stdoutW.Close()
	o.stderrW.Close()
	for i, r := range []*os.File{o.stdoutR, o.stderrR} {
		o.wg.Add(1)
		go func() {
			defer o.wg.Done()
			o.copy(o.dst[i], r)
		}()
	}
}

func (o *output) copy(dst, src *os.File) {
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			left := o.left.Add(-int64(n))
			over := left < 0
			if over {
				n = int(max(int64(n)+left, 0))
			}
			if dst != nil && n > 0 {
				if _, werr := dst.Write(buf[:n]); werr != nil {
					o.mu.Lock()
					if o.err == nil && !errors.Is(werr, unix.EPIPE) {
						o.err = &Error{Op: "write output", Stage: "output", Err: werr}
					}
					o.mu.Unlock()
					src.Close() // the command gets SIGPIPE, as from any closed pipe
					return
				}
			}
			if over {
				o.overOnce.Do(func() { close(o.over) })
				_, _ = io.Copy(io.Discard, src)
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// drain waits for the rest of what the command wrote before it ended. Its
// processes are dead; an end of the pipe that was passed out of the sandbox is
// not waited for, and who reads from us may be given up by a signal.
func (o *output) drain(signals <-chan os.Signal) { drain(&o.wg, signals, o.stdoutR, o.stderrR) }

func drain(wg *sync.WaitGroup, signals <-chan os.Signal, sources ...*os.File) {
	done := make(chan struct{})
	go func() { defer close(done); wg.Wait() }()
	check := time.NewTicker(20 * time.Millisecond)
	defer check.Stop()
	for {
		select {
		case <-done:
			return
		case sig := <-signals:
			if sig != unix.SIGWINCH && sig != unix.SIGCONT && sig != unix.SIGUSR1 && sig != unix.SIGUSR2 {
				return
			}
		case <-check.C:
			left := 0
			for _, f := range sources {
				c, err := f.SyscallConn()
				if err == nil {
					_ = c.Control(func(fd uintptr) {
						if n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ); err == nil {
							left += n
						}
					})
				}
			}
			if left == 0 {
				for _, f := range sources {
					f.Close() // ends the reading; what was read is still written
				}
			}
		}
	}
}

func (o *output) writeError() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

func (o *output) close() error {
	for _, f := range []*os.File{o.stdoutR, o.stdoutW, o.stderrR, o.stderrW} {
		f.Close() // double close is harmless, the data is through
	}
	return nil
}

// status1 writes one JSON line to the status descriptor. A reader that is
// gone is no reason to end the command.
func (s *sandbox) status1(v map[string]any) {
	if s.io.StatusFD == nil {
		return
	}
	b, err := json.Marshal(v)
	if err != nil {
		return
	}
	_, _ = s.io.StatusFD.Write(append(b, '\n'))
}
