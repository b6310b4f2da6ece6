package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

// askEnv has sbxrun-env do a verb on the store. What it prints goes to standard
// output; result (nil: none) is filled from its answer. env is what it may know
// of this environment: as with all that runs as root, nothing that is not named.
func askEnv(ctx context.Context, c *command, verb string, request, result any, env ...string) error {
	path, err := engine.Find("sbxrun-env")
	if err != nil {
		return ask.NewError(err.Error(), "make install puts all binaries into one directory")
	}
	call, err := ask.Start(path, verb, request, os.Stdout, env...)
	if err != nil {
		return err
	}
	defer call.Close()
	defer context.AfterFunc(ctx, call.Stop)()
	for {
		r, err := call.Next()
		switch {
		case err != nil:
			return err
		case r.Progress != "":
			c.ui.Phase("env", r.Progress)
			continue
		case result == nil:
			return nil
		}
		if err := json.Unmarshal(r.Result, result); err != nil {
			return fmt.Errorf("decode answer of %s: %w", verb, err)
		}
		return nil
	}
}
