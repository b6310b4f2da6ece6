package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/share"
	"github.com/sbxrun/sbxrun/envs/trust"
	"github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/internal/ask/answer"
	"github.com/sbxrun/sbxrun/rootfs"
)

func init() {
	asked["export"] = telling(export)
	asked["push"] = telling(push)
	asked["import"] = telling(importEnv)
	asked["pull"] = telling(pull)
}

// telling is answered for what takes long and says how far it is.
func telling[Q, R any](do func(ctx context.Context, q Q, progress share.Progress) (R, error)) answer.Verb {
	return func(ctx context.Context, read func(any) error, say func(ask.Reply)) error {
		var q Q
		if err := read(&q); err != nil {
			return err
		}
		r, err := do(ctx, q, func(text string) { say(ask.Reply{Progress: text}) })
		if err != nil {
			return err
		}
		b, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("encode answer: %w", err)
		}
		say(ask.Reply{Result: b})
		return nil
	}
}

type exportQuestion struct {
	about
	Output      string   `json:"output"`
	Format      string   `json:"format"`
	Compression string   `json:"compression"`
	As          string   `json:"as"`
	WithBase    bool     `json:"with_base"`
	Insecure    bool     `json:"insecure_http"`
	Credentials []string `json:"credentials"`
}

// signed opens the environment of a question, and its signatures.
func (q exportQuestion) signed() (*rootfs.Store, *envs.Manager, *envs.Env, [][]byte, error) {
	store, m, e, err := q.open()
	if err != nil {
		return nil, nil, nil, nil, err
	}
	bundles, err := trust.Bundles(store, e.Digest)
	return store, m, e, bundles, err
}

func export(ctx context.Context, q exportQuestion, progress share.Progress) (*share.Exported, error) {
	store, m, e, bundles, err := q.signed()
	if err != nil {
		return nil, err
	}
	return share.Export(ctx, store, m, e, share.ExportOptions{
		Output: q.Output, Format: q.Format, Compression: q.Compression, Ref: q.As, WithBase: q.WithBase, Bundles: bundles, Stdout: os.Stdout, Progress: progress,
	})
}

func push(ctx context.Context, q exportQuestion, progress share.Progress) (*share.Exported, error) {
	store, m, e, bundles, err := q.signed()
	if err != nil {
		return nil, err
	}
	return share.Push(ctx, store, m, e, share.PushOptions{
		RegistryOptions: share.RegistryOptions{InsecureHTTP: q.Insecure, Credentials: q.Credentials},
		Ref:             q.As, Compression: q.Compression, WithBase: q.WithBase, Bundles: bundles, Progress: progress,
	})
}

type importQuestion struct {
	Root        []byte   `json:"root"`
	Source      string   `json:"source"`
	Name        string   `json:"name"`
	Digest      string   `json:"digest"`
	Policy      string   `json:"policy"` // "" is none
	Insecure    bool     `json:"insecure_http"`
	Credentials []string `json:"credentials"`
}

func (q importQuestion) open(progress share.Progress) (*rootfs.Store, *envs.Manager, share.ImportOptions, error) {
	o := share.ImportOptions{Source: q.Source, Name: q.Name, Digest: q.Digest, Progress: progress}
	store, err := rootfs.OpenStore(string(q.Root))
	if err != nil {
		return nil, nil, o, err
	}
	o.Keep = trust.Keeper(store)
	if o.Verify, err = trust.Verifier(q.Policy); err != nil {
		return nil, nil, o, err
	}
	return store, envs.Open(store, envs.Options{}), o, nil
}

func importEnv(ctx context.Context, q importQuestion, progress share.Progress) (*share.Taken, error) {
	store, m, o, err := q.open(progress)
	if err != nil {
		return nil, err
	}
	return share.Import(ctx, store, m, o)
}

func pull(ctx context.Context, q importQuestion, progress share.Progress) (*share.Taken, error) {
	store, m, o, err := q.open(progress)
	if err != nil {
		return nil, err
	}
	return share.Pull(ctx, store, m, o, share.RegistryOptions{InsecureHTTP: q.Insecure, Credentials: q.Credentials})
}
