package main

import (
	"context"
	"errors"

	"github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/runtime/systemd"
	"github.com/sbxrun/sbxrun/runtime/systemd/scope"
)

// makeScope makes a scope and, as its controller, tells when it is to be
// stopped, until that is not wanted any more.
func makeScope(ctx context.Context, read func(any) error, say func(ask.Reply)) (err error) {
	var req systemd.ScopeRequest
	if err := read(&req); err != nil {
		return err
	}
	s, err := scope.Make(ctx, req)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	say(ask.Reply{Cgroup: s.Cgroup})
	select {
	case <-s.Stop:
		say(ask.Reply{Stop: true})
		<-ctx.Done()
	case <-ctx.Done():
	}
	return nil
}
