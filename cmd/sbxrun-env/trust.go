package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/share"
	"github.com/sbxrun/sbxrun/envs/trust"
	"github.com/sbxrun/sbxrun/internal/ask/answer"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

func init() {
	asked["sign"] = answered(sign)
	asked["verify"] = answered(verify)
	asked["policy"] = answered(policy)
}

// answered is a verb on the store that has one answer.
func answered[Q, R any](do func(ctx context.Context, q Q) (R, error)) answer.Verb {
	return telling(func(ctx context.Context, q Q, _ share.Progress) (R, error) { return do(ctx, q) })
}

// about names an environment of a store.
type about struct {
	Root []byte `json:"root"`
	Ref  string `json:"ref"`
}

func (a about) open() (*rootfs.Store, *envs.Manager, *envs.Env, error) {
	store, err := rootfs.OpenStore(string(a.Root))
	if err != nil {
		return nil, nil, nil, err
	}
	m := envs.Open(store, envs.Options{})
	e, err := m.Get(a.Ref)
	return store, m, e, err
}

type signQuestion struct {
	about
	Key          string `json:"key"`
	Password     []byte `json:"password,omitempty"`
	PasswordFile string `json:"password_file,omitempty"`
	Output       string `json:"output,omitempty"`
}

type signAnswer struct {
	Digest string `json:"digest"`
	KeyID  string `json:"key_id"`
	Bundle string `json:"bundle"`
}

// password gives what opens a key: that of the file if there is one.
func (q signQuestion) password() ([]byte, error) {
	if q.PasswordFile == "" {
		if q.Password == nil {
			return nil, hinted.New(fmt.Errorf("read key %q: it is encrypted", q.Key), "SBXRUN_KEY_PASSWORD, COSIGN_PASSWORD or --password-file gives the password")
		}
		return q.Password, nil
	}
	st, err := os.Stat(q.PasswordFile)
	if err == nil && st.Size() > 4096 {
		err = errors.New("too large for a password")
	}
	if err != nil {
		return nil, fmt.Errorf("read password: %w", err)
	}
	b, err := os.ReadFile(q.PasswordFile)
	if err != nil {
		return nil, fmt.Errorf("read password: %w", err)
	}
	return bytes.TrimRight(b, "\r\n"), nil
}

func sign(ctx context.Context, q signQuestion) (signAnswer, error) {
	key, err := trust.ReadPrivateKey(q.Key, q.password)
	if err != nil {
		return signAnswer{}, err
	}
	store, m, e, err := q.open()
	if err != nil {
		return signAnswer{}, err
	}
	_, bad, err := m.Verify(ctx, e.Key)
	if err != nil {
		return signAnswer{}, err
	}
	if len(bad) > 0 {
		return signAnswer{}, hinted.New(fmt.Errorf("sign %q: damaged: %s: %s", q.Ref, bad[0].Path, bad[0].Problem), "sbxrun env rm it, then bake it again")
	}
	if b, err := store.Base(e.Base); err == nil && b.Digest == e.BaseDigest {
		e.BaseVars = b.Env
	}
	b, err := trust.Sign(e, key)
	if err != nil {
		return signAnswer{}, err
	}
	a := signAnswer{Digest: e.Digest, KeyID: key.ID()}
	if a.Bundle, err = trust.Keep(store, e.Digest, b, true); err != nil {
		return a, err
	}
	if q.Output != "" {
		a.Bundle = q.Output
		if err := os.WriteFile(q.Output, b, 0o644); err != nil {
			return a, fmt.Errorf("write bundle: %w", err)
		}
	}
	return a, nil
}

type verifyQuestion struct {
	about
	Keys   []string `json:"keys"`
	Bundle string   `json:"bundle,omitempty"` // in place of those of the store
}

func verify(_ context.Context, q verifyQuestion) (trust.Signature, error) {
	store, _, e, err := q.open()
	if err != nil {
		return trust.Signature{}, err
	}
	var keys []trust.PublicKey
	for _, p := range q.Keys {
		k, err := trust.ReadPublicKey(p)
		if err != nil {
			return trust.Signature{}, err
		}
		keys = append(keys, k)
	}
	var bundles [][]byte
	if q.Bundle == "" {
		bundles, err = trust.Bundles(store, e.Digest)
	} else {
		var b []byte
		b, err = trust.ReadBundle(q.Bundle)
		bundles = [][]byte{b}
	}
	if err != nil {
		return trust.Signature{}, err
	}
	s, err := trust.VerifyAny(bundles, e, keys)
	if err != nil {
		err = hinted.New(fmt.Errorf("verify %q: %w", q.Ref, err), hinted.Of(trust.Explain(err)))
	}
	return s, err
}

type policyQuestion struct {
	about
	Policy string `json:"policy"`
}

func policy(_ context.Context, q policyQuestion) (trust.Verdict, error) {
	p, err := trust.ReadPolicy(q.Policy)
	if err != nil {
		return trust.Verdict{}, err
	}
	store, m, e, err := q.open()
	if err != nil {
		return trust.Verdict{}, err
	}
	return p.CheckStored(store, m, e, time.Now())
}
