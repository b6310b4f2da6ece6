package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/rootfs/image"
	"github.com/sbxrun/sbxrun/runtime"
)

// answer reads one request, has it done by the function of that verb and gives
// the exit code.
func answer(verb string) int {
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
	var err error
	switch verb {
	case ask.AddBaseVerb:
		err = addBase(ctx, read, say)
	case ask.ScopeVerb:
		err = makeScope(ctx, read, say)
	}
	if err != nil {
		say(ask.Reply{Error: err.Error(), Hint: runtime.HintOf(err)})
		return 1
	}
	return 0
}

func addBase(ctx context.Context, read func(any) error, say func(ask.Reply)) error {
	var req ask.AddBase
	if err := read(&req); err != nil {
		return err
	}
	store, err := rootfs.OpenStore(string(req.Root))
	if err != nil {
		return err
	}
	b, err := image.Add(ctx, store, string(req.Name), string(req.Source), func(s string) { say(ask.Reply{Progress: s}) })
	if err == nil {
		say(ask.Reply{Digest: b.Digest})
	}
	return err
}
