package egress

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

var errByteLimit = errors.New("byte limit")

func (e *Egress) full() bool {
	return e.maxBytes > 0 && e.up.bytes.Load()+e.down.bytes.Load() >= e.maxBytes
}

func (e *Egress) byteLimit() string { return fmt.Sprintf("byte limit %d", e.maxBytes) }

// spend accounts for n bytes that were passed on, and waits until more may be.
func (e *Egress) spend(m *meter, n int64) error {
	m.bytes.Add(n)
	if e.full() {
		return errByteLimit
	}
	wait := m.rate.spend(time.Now(), n)
	if wait == 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-e.ctx.Done():
		return e.ctx.Err()
	}
}

// next is how many bytes may be passed before the next spend.
func (e *Egress) next(m *meter) int64 {
	if e.maxBytes == 0 {
		return m.chunk
	}
	return max(0, min(m.chunk, e.maxBytes-e.up.bytes.Load()-e.down.bytes.Load()))
}

// pass copies until src ends, which is nil. Between two TCP connections the
// kernel does it (splice), as their other ends read and write: who does not read
// stops who writes.
func (e *Egress) pass(dst io.Writer, src io.Reader, m *meter) error {
	for {
		want := e.next(m)
		if want == 0 {
			return errByteLimit
		}
		n, err := io.CopyN(dst, src, want)
		if serr := e.spend(m, n); serr != nil {
			return serr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// tunnel copies both ways; the end of one way is passed on as such, and the other
// goes on. A reset is passed on too. c has the inside at its other end.
func (e *Egress) tunnel(c, out net.Conn, d netns.Decision) {
	var wg sync.WaitGroup
	var limited sync.Once
	one := func(dst, src net.Conn, m *meter) {
		defer wg.Done()
		err := e.pass(dst, src, m)
		if w, ok := dst.(interface{ CloseWrite() error }); ok && err == nil && w.CloseWrite() == nil {
			return
		}
		if errors.Is(err, errByteLimit) || e.full() {
			limited.Do(func() { e.overLimit(d) })
		}
		reset(c)
		reset(out)
	}
	wg.Add(2)
	go one(out, c, &e.up)
	go one(c, out, &e.down)
	wg.Wait()
}

// overLimit says that a connection was ended, and ends all others: their next
// bytes would be too many as well.
func (e *Egress) overLimit(d netns.Decision) {
	d.Allowed, d.Rule = false, e.byteLimit()
	e.note(d)
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range e.conns {
		reset(c)
	}
}
