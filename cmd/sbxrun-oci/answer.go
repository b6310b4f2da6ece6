package main

import (
	"context"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
	asking "github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/internal/ask/answer"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/rootfs/image"
)

var asked = map[string]answer.Verb{ask.AddBaseVerb: addBase, ask.ScopeVerb: makeScope}

func addBase(ctx context.Context, read func(any) error, say func(asking.Reply)) error {
	var req ask.AddBase
	if err := read(&req); err != nil {
		return err
	}
	store, err := rootfs.OpenStore(string(req.Root))
	if err != nil {
		return err
	}
	b, err := image.Add(ctx, store, string(req.Name), string(req.Source), func(s string) { say(asking.Reply{Progress: s}) })
	if err == nil {
		say(asking.Reply{Digest: b.Digest})
	}
	return err
}
