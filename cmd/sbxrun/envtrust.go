package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/runtime"
)

// aboutEnv names an environment of a store to sbxrun-env.
type aboutEnv struct {
	Root []byte `json:"root"`
	Ref  string `json:"ref"`
}

// systemPolicy is who is trusted where nothing else is said. A settings file of
// a project cannot say it: that is no place for whom to trust.
const systemPolicy = "/etc/sbxrun/policy.toml"

// policyFile gives the policy that holds, "" is none: that of the flag, of
// SBXRUN_POLICY, the system's.
func policyFile(flag string) string {
	if flag != "" {
		return flag
	}
	if p := os.Getenv("SBXRUN_POLICY"); p != "" {
		return p
	}
	if _, err := os.Lstat(systemPolicy); errors.Is(err, os.ErrNotExist) {
		return ""
	}
	return systemPolicy
}

// checkTrusted refuses an environment that the policy does not let through. What
// was baked here over nothing else costs no look at it.
func checkTrusted(ctx context.Context, c *command, e *envs.Env) error {
	if e.Origin == nil && len(e.Below) == 0 {
		return nil
	}
	policy := policyFile("")
	if policy == "" {
		return nil
	}
	return askEnv(ctx, c, "policy", struct {
		aboutEnv
		Policy string `json:"policy"`
	}{aboutEnv{[]byte(c.dirs.Root), e.Key}, policy}, nil)
}

type signOptions struct {
	key, passwordFile, out string
	json                   bool
}

func envSignVerb() *verb {
	return &verb{
		name: "env sign", args: "--key FILE NAME|DIGEST", short: "sign an environment's content digest, as a sigstore bundle",
		setup: func(c *command) {
			o := &signOptions{}
			c.flags.StringVar(&o.key, "key", "", "private key's `file`: PEM with an ECDSA P-256 or Ed25519 key, plain or as cosign encrypts it")
			c.flags.StringVar(&o.passwordFile, "password-file", "", "`file` with the key's password (default: SBXRUN_KEY_PASSWORD or COSIGN_PASSWORD)")
			c.flags.StringVarP(&o.out, "output", "o", "", "write the bundle to this `file` too")
			c.flags.BoolVar(&o.json, "json", "print JSON")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*signOptions)
			if _, err := onStore(c, args, 1, 1); err != nil {
				return 0, err
			}
			if o.key == "" {
				return 2, usage("openssl genpkey -algorithm ed25519 -out key.pem makes one", "env sign: no --key")
			}
			var password []byte
			for _, v := range []string{"SBXRUN_KEY_PASSWORD", "COSIGN_PASSWORD"} {
				if s, ok := os.LookupEnv(v); ok {
					password = []byte(s)
					break
				}
			}
			var a struct {
				Digest string `json:"digest"`
				KeyID  string `json:"key_id"`
				Bundle string `json:"bundle"`
			}
			ctx, stop := canceled()
			defer stop()
			err := askEnv(ctx, c, "sign", struct {
				aboutEnv
				Key          string `json:"key"`
				Password     []byte `json:"password,omitempty"`
				PasswordFile string `json:"password_file,omitempty"`
				Output       string `json:"output,omitempty"`
			}{aboutEnv{[]byte(c.dirs.Root), args[0]}, o.key, password, o.passwordFile, o.out}, &a)
			if err != nil {
				return 1, err
			}
			if o.json {
				return c.json(a)
			}
			c.ui.outf("%s signed by %s\n", a.Digest, envs.Short(a.KeyID))
			return 0, nil
		},
	}
}

type verifyOptions struct {
	keys           []string
	bundle, policy string
}

func envVerifyVerb() *verb {
	return &verb{
		name: "env verify", args: "[flags] [NAME|DIGEST…]", short: "read environments (all without argument), compare every byte with their digests, and check signatures",
		setup: func(c *command) {
			o := &verifyOptions{}
			c.flags.ListVar(&o.keys, "key", "public key's `file` (PEM): one of these must have signed it; several, or with commas")
			c.flags.StringVar(&o.bundle, "bundle", "", "with --key: the signature is in this `file`, not in the store")
			c.flags.StringVar(&o.policy, "policy", "", "`file` that says whom to trust: it must let the environment through")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*verifyOptions)
			store, err := onStore(c, args, 0, 1<<20)
			if err != nil {
				return 0, err
			}
			if o.bundle != "" && (len(o.keys) == 0 || len(args) != 1) {
				return 2, usage("env verify NAME --key PUB --bundle FILE", "env verify: --bundle is for one environment and a key")
			}
			m := envs.Open(store, envs.Options{})
			if len(args) == 0 {
				all, err := m.List()
				if err != nil {
					return 1, err
				}
				for _, e := range all {
					args = append(args, e.Key)
				}
			}
			ctx, stop := canceled()
			defer stop()
			damaged := false
			for _, a := range args {
				e, bad, err := m.Verify(ctx, a)
				if err != nil {
					return 1, err
				}
				for _, d := range bad {
					c.ui.outf("%s: %s: %s\n", envs.Short(e.Digest), d.Path, d.Problem)
					damaged = true
				}
				if len(bad) > 0 {
					continue
				}
				more, err := o.signatures(ctx, c, a)
				if err != nil {
					return 1, err
				}
				c.ui.outf("%s: ok, %d files%s\n", envs.Short(e.Digest), e.Files, more)
			}
			if damaged {
				return 1, &runtime.Error{Op: "verify", Err: errors.New("damage found"), Hint: "sbxrun env rm it, then run again with -r: it is baked anew"}
			}
			return 0, nil
		},
	}
}

type signature struct {
	Key string `json:"key"`
	ID  string `json:"key_id"`
}

func (s signature) String() string {
	return fmt.Sprintf(", signed by %s (%s)", s.Key, envs.Short(s.ID))
}

// signatures checks those of an environment as far as that was asked for, and
// says whose there are.
func (o *verifyOptions) signatures(ctx context.Context, c *command, ref string) (string, error) {
	out := ""
	about := aboutEnv{[]byte(c.dirs.Root), ref}
	if len(o.keys) > 0 {
		var keys []string
		for _, k := range o.keys {
			keys = append(keys, strings.Split(k, ",")...)
		}
		var s signature
		if err := askEnv(ctx, c, "verify", struct {
			aboutEnv
			Keys   []string `json:"keys"`
			Bundle string   `json:"bundle,omitempty"`
		}{about, keys, o.bundle}, &s); err != nil {
			return "", err
		}
		out = s.String()
	}
	if o.policy != "" {
		var v struct {
			Signature *signature `json:"signature"`
			Reason    string     `json:"reason"`
		}
		if err := askEnv(ctx, c, "policy", struct {
			aboutEnv
			Policy string `json:"policy"`
		}{about, o.policy}, &v); err != nil {
			return "", err
		}
		if v.Signature != nil && out == "" {
			out = v.Signature.String()
		}
		if v.Reason != "" {
			out += ", trusted: " + v.Reason
		}
	}
	return out, nil
}
