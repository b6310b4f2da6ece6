package main

import (
	"context"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
)

// addBase has sbxrun-oci add a base and gives its digest.
func addBase(ctx context.Context, req ask.AddBase, progress func(string)) (digest string, err error) {
	call, err := ask.Start(ask.AddBaseVerb, req)
	if err != nil {
		return "", err
	}
	defer call.Close()
	defer context.AfterFunc(ctx, call.Stop)()
	for {
		r, err := call.Next()
		switch {
		case err != nil || r.Digest != "":
			return r.Digest, err
		case r.Progress != "":
			progress(r.Progress)
		}
	}
}
