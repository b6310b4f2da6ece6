package trust

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

const maxPolicyBytes = 1 << 20

// Policy says whose signature an environment from elsewhere needs.
type Policy struct {
	file string
	text policyText
	keys [][]PublicKey // of each entry
}

type policyText struct {
	// Require refuses what comes from a place that no entry names; true if absent.
	Require *bool   `toml:"require"`
	Trust   []entry `toml:"trust"`
}

type entry struct {
	Keys  []string        `toml:"keys"`  // files, relative to the policy's own, or PEM
	For   []string        `toml:"for"`   // where from, "*" stands for anything; none is everywhere
	Until *toml.LocalDate `toml:"until"` // the last day (UTC) on which it counts
}

// ReadPolicy reads a policy and all of its keys.
func ReadPolicy(path string) (*Policy, error) {
	b, err := readFile("policy", path, maxPolicyBytes)
	if err != nil {
		return nil, hinted.New(err, "a policy that cannot be read trusts nobody")
	}
	p := &Policy{file: path}
	d := toml.NewDecoder(strings.NewReader(string(b))).DisallowUnknownFields()
	if err := d.Decode(&p.text); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			return nil, hinted.New(fmt.Errorf("read policy %q: no such key: %s", path, strings.Join(strict.Errors[0].Key(), ".")), "require, and [[trust]] with keys, for, until")
		}
		return nil, fmt.Errorf("read policy %q: %w", path, err)
	}
	for i, t := range p.text.Trust {
		if len(t.Keys) == 0 {
			return nil, fmt.Errorf("read policy %q: trust entry %d has no keys", path, i+1)
		}
		var keys []PublicKey
		for _, k := range t.Keys {
			var key PublicKey
			if strings.Contains(k, "-----BEGIN") {
				key, err = ParsePublicKey(fmt.Sprintf("%s, entry %d", path, i+1), []byte(k))
			} else {
				if !filepath.IsAbs(k) {
					k = filepath.Join(filepath.Dir(path), k)
				}
				key, err = ReadPublicKey(k)
			}
			if err != nil {
				return nil, hinted.New(fmt.Errorf("read policy %q: %w", path, err), hinted.Of(err))
			}
			keys = append(keys, key)
		}
		p.keys = append(p.keys, keys)
	}
	return p, nil
}

// Verdict is why an environment is let through.
type Verdict struct {
	Signature *Signature `json:"signature,omitempty"`
	Reason    string     `json:"reason,omitempty"` // where no signature was needed
}

// Check says whether an environment that comes from elsewhere (see
// [envs.Origin]) may be taken in or run. bundles are its signatures.
func (p *Policy) Check(e *envs.Env, from string, bundles [][]byte, now time.Time) (Verdict, error) {
	var keys []PublicKey
	named, expired := false, ""
	for i, t := range p.text.Trust {
		if !t.covers(from) {
			continue
		}
		named = true
		if t.Until != nil && !now.Before(t.Until.AsTime(time.UTC).AddDate(0, 0, 1)) {
			expired = fmt.Sprintf("; entry %d is out of date since %s", i+1, t.Until)
			continue
		}
		keys = append(keys, p.keys[i]...)
	}
	if !named && p.text.Require != nil && !*p.text.Require {
		return Verdict{Reason: "the policy asks for no signature of what comes from there"}, nil
	}
	err := errors.New("no key is trusted for it")
	if len(keys) > 0 {
		var s Signature
		if s, err = VerifyAny(bundles, e, keys); err == nil {
			return Verdict{Signature: &s}, nil
		}
	}
	hint := hinted.Of(Explain(err))
	if hint == "" || expired != "" {
		hint = "see " + p.file
	}
	return Verdict{}, hinted.New(fmt.Errorf("environment %s from %q is refused by policy %q: %w%s", envs.Short(e.Digest), bounded.Text(from), p.file, err, expired), hint)
}

// Verifier gives the check of what is imported by the policy in a file; "" is no
// policy, which admits everything. Where it comes from is in its Origin.
func Verifier(file string) (func(ctx context.Context, e *envs.Env, bundles [][]byte) error, error) {
	if file == "" {
		return func(context.Context, *envs.Env, [][]byte) error { return nil }, nil
	}
	p, err := ReadPolicy(file)
	if err != nil {
		return nil, err
	}
	return func(_ context.Context, e *envs.Env, bundles [][]byte) error {
		if e.Origin == nil {
			return fmt.Errorf("environment %s: where it comes from is not known", envs.Short(e.Digest))
		}
		_, err := p.Check(e, e.Origin.From, bundles, time.Now())
		return err
	}, nil
}

// CheckStored checks an environment of a store and those that it extends: what
// lies below a layer that was baked here may come from elsewhere. What was baked
// here needs no signature.
func (p *Policy) CheckStored(store *rootfs.Store, m *envs.Manager, e *envs.Env, now time.Time) (Verdict, error) {
	if len(e.Below) > 0 {
		all, err := m.List()
		if err != nil {
			return Verdict{}, err
		}
		// One that is here by two ways, of which a bake is one, is trusted.
		for _, d := range e.Below {
			var first error
			ok := false
			for _, o := range all {
				if o.Digest != d {
					continue
				}
				_, err := p.checkOne(store, o, now)
				ok = ok || err == nil
				first = errors.Join(first, err)
			}
			if first != nil && !ok {
				return Verdict{}, first
			}
		}
	}
	return p.checkOne(store, e, now)
}

func (p *Policy) checkOne(store *rootfs.Store, e *envs.Env, now time.Time) (Verdict, error) {
	if e.Origin == nil {
		return Verdict{Reason: "baked on this machine"}, nil
	}
	bundles, err := Bundles(store, e.Digest)
	if err != nil {
		return Verdict{}, err
	}
	return p.Check(e, e.Origin.From, bundles, now)
}

func (t entry) covers(from string) bool {
	for _, pattern := range t.For {
		if match(pattern, from) {
			return true
		}
	}
	return len(t.For) == 0
}

// match compares with a pattern in which * stands for any text.
func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, parts[0])
	last := parts[len(parts)-1]
	for _, p := range parts[1 : len(parts)-1] {
		var found bool
		if _, s, found = strings.Cut(s, p); !found {
			return false
		}
	}
	return ok && strings.HasSuffix(s, last)
}
