// sbxrun-env carries what sbxrun must not initialise at every launch and
// environments need: the parsers of foreign formats, conda's installer, images,
// registries, signatures. It is started by sbxrun and is no program for people,
// in one of two ways:
//
//	sbxrun-env VERB       on the host, for a verb on the store: a request on descriptor 3 (internal/ask)
//	sbxrun-env inside VERB  in a sandbox, as a step of a bake, over files that nobody trusts: the request on
//	                      standard input, the answer (ask.Reply) as the last line of standard output
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/internal/ask/answer"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

// step is a verb inside a sandbox: read decodes the request; what it returns is
// the answer's result.
type step func(ctx context.Context, read func(any) error) (result any, err error)

// Each room of environments registers its verbs in a file of its own here.
var (
	asked  = map[string]answer.Verb{}
	inside = map[string]step{}
)

func main() {
	a := os.Args[1:]
	switch {
	case len(a) == 1 && asked[a[0]] != nil:
		os.Exit(answer.Serve(asked[a[0]]))
	case len(a) == 2 && a[0] == "inside" && inside[a[1]] != nil:
		os.Exit(serveInside(inside[a[1]]))
	}
	fmt.Fprintln(os.Stderr, "sbxrun-env: started by sbxrun, not by hand (see sbxrun --help)")
	os.Exit(125)
}

// maxRequestBytes bounds what is read; the largest are locks of 10,000 packages.
const maxRequestBytes = 64 << 20

func serveInside(do step) int {
	var r ask.Reply
	out, err := do(context.Background(), func(to any) error {
		if err := json.NewDecoder(io.LimitReader(os.Stdin, maxRequestBytes)).Decode(to); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		return nil
	})
	if err == nil {
		r.Result, err = json.Marshal(out)
	}
	code := 0
	if err != nil {
		r, code = ask.Reply{Error: err.Error(), Hint: hinted.Of(err)}, 1
	}
	if json.NewEncoder(os.Stdout).Encode(r) != nil {
		return 125
	}
	return code
}
