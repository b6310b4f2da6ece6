// Package answer is the asked side of internal/ask.
package answer

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Verb does what is asked: read decodes the request, once; say gives a line of
// the answer, the last of which has neither Progress nor Stop. ctx ends when the
// answer is not wanted any more.
type Verb func(ctx context.Context, read func(any) error, say func(ask.Reply)) error

// Serve reads one request, has it done and gives the exit code.
func Serve(do Verb) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in, out := os.NewFile(ask.RequestFD, "request"), os.NewFile(ask.ReplyFD, "reply")
	unix.CloseOnExec(ask.RequestFD)
	unix.CloseOnExec(ask.ReplyFD)
	if in == nil || out == nil {
		return 125
	}
	var mu sync.Mutex
	lines := json.NewEncoder(out)
	say := func(r ask.Reply) {
		mu.Lock()
		defer mu.Unlock()
		_ = lines.Encode(r) // who cannot read it is gone, which ends ctx
	}
	request := json.NewDecoder(in)
	read := func(to any) error {
		if err := request.Decode(to); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		go func() {
			_, _ = io.Copy(io.Discard, in)
			cancel()
		}()
		return nil
	}
	if err := do(ctx, read, say); err != nil {
		say(ask.Reply{Error: err.Error(), Hint: hinted.Of(err)})
		return 1
	}
	return 0
}
