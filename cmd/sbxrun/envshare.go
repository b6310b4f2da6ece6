package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// exportRequest is what sbxrun-env is asked for by export and push.
type exportRequest struct {
	aboutEnv
	Output      string   `json:"output,omitempty"`
	Format      string   `json:"format,omitempty"`
	Compression string   `json:"compression,omitempty"`
	As          string   `json:"as,omitempty"`
	WithBase    bool     `json:"with_base,omitempty"`
	Insecure    bool     `json:"insecure_http,omitempty"`
	Credentials []string `json:"credentials,omitempty"`
}

// exported is its answer.
type exported struct {
	Digest  string   `json:"digest"`
	Image   string   `json:"image,omitempty"`
	Format  string   `json:"format,omitempty"`
	Ref     string   `json:"ref,omitempty"`
	Bytes   int64    `json:"bytes"`
	Signed  int      `json:"signatures"`
	Remarks []string `json:"remarks,omitempty"`
}

// importRequest is what it is asked for by import and pull.
type importRequest struct {
	Root        []byte   `json:"root"`
	Source      string   `json:"source"`
	Name        string   `json:"name,omitempty"`
	Digest      string   `json:"digest,omitempty"`
	Policy      string   `json:"policy,omitempty"`
	Insecure    bool     `json:"insecure_http,omitempty"`
	Credentials []string `json:"credentials,omitempty"`
}

type imported struct {
	Digest  string   `json:"digest"`
	Key     string   `json:"key"`
	Names   []string `json:"names,omitempty"`
	Base    string   `json:"base"`
	From    string   `json:"from"`
	Signed  int      `json:"signatures"`
	Remarks []string `json:"remarks,omitempty"`
}

// credentialFiles are where the logins of registries are looked for: podman's
// files, then docker's.
func credentialFiles() (out []string) {
	add := func(dir string, more ...string) {
		if dir != "" {
			out = append(out, filepath.Join(append([]string{dir}, more...)...))
		}
	}
	add(os.Getenv("REGISTRY_AUTH_FILE"))
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	add(os.Getenv("HOME"), ".config", "containers", "auth.json")
	if d := os.Getenv("DOCKER_CONFIG"); d != "" {
		add(d, "config.json")
	} else {
		add(os.Getenv("HOME"), ".docker", "config.json")
	}
	return out
}

// registryEnv is what a client of registries may know of the environment.
func registryEnv() (out []string) {
	for _, k := range []string{"HOME", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v, ok := os.LookupEnv(k); ok {
			out = append(out, k+"="+v)
		}
	}
	return out
}

// shareOptions are the flags of the four verbs.
type shareOptions struct {
	out, format, compression, ref string
	name, digest, policy          string
	base, insecure, json          bool
}

func (o *shareOptions) declareImage(c *command) {
	c.flags.StringVar(&o.compression, "compression", "gzip", "`how` an image's layers are compressed: gzip (every tool reads it) or zstd (faster, smaller)")
	c.flags.BoolVar(&o.base, "with-base", "the base too, so that other tools run the image; not for base host")
	c.flags.BoolVar(&o.json, "json", "print JSON")
	c.flags.BoolVarP(&c.quiet, "quiet", "q", "no progress")
}

func (o *shareOptions) declareTake(c *command) {
	c.flags.StringVar(&o.name, "name", "", "a `name` for it, for run --with (default: the one it comes with, if none here has it)")
	c.flags.StringVar(&o.digest, "digest", "", "the content `digest` (sha256:…) that it must have")
	c.flags.StringVar(&o.policy, "policy", "", "`file` that says whose signatures are trusted (default: SBXRUN_POLICY, "+systemPolicy+")")
	c.flags.BoolVar(&o.json, "json", "print JSON")
	c.flags.BoolVarP(&c.quiet, "quiet", "q", "no progress")
}

func (o *shareOptions) declareRegistry(c *command) {
	c.flags.BoolVar(&o.insecure, "insecure-http", "plain HTTP: who is between can read and change what passes; loopback needs no word for it")
}

func (o *shareOptions) checkCompression() error {
	if o.compression != "gzip" && o.compression != "zstd" {
		return usage("gzip or zstd", "--compression %q: not known", o.compression)
	}
	return nil
}

// exporting asks for an export or a push and says what came of it.
func (o *shareOptions) exporting(c *command, verb string, q exportRequest, env ...string) (int, error) {
	ctx, stop := canceled()
	defer stop()
	var a exported
	err := askEnv(ctx, c, verb, q, &a, env...)
	c.ui.Done()
	if ctx.Err() != nil {
		return 130, fmt.Errorf("env %s: %w", verb, ctx.Err())
	}
	if err != nil {
		return 1, err
	}
	for _, r := range a.Remarks {
		c.ui.note("%s", r)
	}
	switch {
	case q.Output == "-":
	case o.json:
		return c.json(a)
	case verb == "push":
		c.ui.outf("%s\n", a.Ref[:strings.LastIndexByte(a.Ref, ':')]+"@"+a.Image)
	default:
		c.ui.outf("%s\n", a.Digest)
	}
	return 0, nil
}

// taking asks for an import or a pull and says what came of it.
func (o *shareOptions) taking(c *command, verb string, q importRequest, env ...string) (int, error) {
	q.Root, q.Name, q.Digest, q.Policy = []byte(c.dirs.Root), o.name, o.digest, policyFile(o.policy)
	ctx, stop := canceled()
	defer stop()
	var a imported
	err := askEnv(ctx, c, verb, q, &a, env...)
	c.ui.Done()
	if ctx.Err() != nil {
		return 130, fmt.Errorf("env %s: %w", verb, ctx.Err())
	}
	if err != nil {
		return 1, err
	}
	for _, r := range a.Remarks {
		c.ui.note("%s", r)
	}
	if o.json {
		return c.json(a)
	}
	c.ui.outf("%s\n", a.Digest)
	return 0, nil
}

func envExportVerb() *verb {
	return &verb{
		name: "env export", args: "[flags] -o FILE NAME|DIGEST", short: "write an environment to a file: an OCI image, a plain archive or an EROFS image",
		long: "The same environment gives the same bytes. env import takes all but EROFS images, which are for mounting.",
		setup: func(c *command) {
			o := &shareOptions{}
			c.flags.StringVarP(&o.out, "output", "o", "", "`file` to write, a new directory for oci; - is standard output")
			c.flags.StringVar(&o.format, "format", "", "`format`: oci (a layout's directory), oci-archive (docker and podman load it), tar.zst, erofs (default: by the file's name)")
			c.flags.StringVar(&o.ref, "ref", "", "`NAME:TAG` that other tools call the image (default: the environment's name)")
			o.declareImage(c)
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*shareOptions)
			if _, err := onStore(c, args, 1, 1); err != nil {
				return 0, err
			}
			if o.out == "" {
				return 2, usage("-o FILE", "env export: no file")
			}
			switch o.format {
			case "", "oci", "oci-archive", "tar.zst", "erofs":
			default:
				return 2, usage("oci, oci-archive, tar.zst or erofs", "--format %q: not known", o.format)
			}
			if err := o.checkCompression(); err != nil {
				return 2, err
			}
			if _, err := unix.IoctlGetTermios(1, unix.TCGETS); err == nil && o.out == "-" {
				return 2, usage("-o FILE, or | docker load", "env export: no archive is written to a terminal")
			}
			return o.exporting(c, "export", exportRequest{
				aboutEnv: aboutEnv{[]byte(c.dirs.Root), args[0]}, Output: o.out, Format: o.format, Compression: o.compression, As: o.ref, WithBase: o.base,
			})
		},
	}
}

func envImportVerb() *verb {
	return &verb{
		name: "env import", args: "[flags] FILE|DIR", short: "take in an environment that env export wrote, or an image of one that docker, podman or skopeo saved",
		long: "Every byte is compared with the content digest, and the signature with the policy where there is one,\nbefore anything is published.",
		setup: func(c *command) {
			o := &shareOptions{}
			o.declareTake(c)
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			if _, err := onStore(c, args, 1, 1); err != nil {
				return 0, err
			}
			return c.opts.(*shareOptions).taking(c, "import", importRequest{Source: args[0]})
		},
	}
}

func envPushVerb() *verb {
	return &verb{
		name: "env push", args: "[flags] NAME|DIGEST REGISTRY/REPOSITORY[:TAG]", short: "send an environment and its signatures to an OCI registry",
		long: "Logins are those of podman, skopeo and docker: $REGISTRY_AUTH_FILE, containers/auth.json, .docker/config.json.",
		setup: func(c *command) {
			o := &shareOptions{}
			o.declareImage(c)
			o.declareRegistry(c)
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*shareOptions)
			if _, err := onStore(c, args, 2, 2); err != nil {
				return 0, err
			}
			if err := o.checkCompression(); err != nil {
				return 2, err
			}
			return o.exporting(c, "push", exportRequest{
				aboutEnv: aboutEnv{[]byte(c.dirs.Root), args[0]}, As: args[1], Compression: o.compression, WithBase: o.base, Insecure: o.insecure, Credentials: credentialFiles(),
			}, registryEnv()...)
		},
	}
}

func envPullVerb() *verb {
	return &verb{
		name: "env pull", args: "[flags] REGISTRY/REPOSITORY[:TAG|@sha256:…]", short: "take in an environment from an OCI registry",
		long: "As env import. Layers that the store has are not fetched. Logins are looked for as by env push.",
		setup: func(c *command) {
			o := &shareOptions{}
			o.declareTake(c)
			o.declareRegistry(c)
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*shareOptions)
			if _, err := onStore(c, args, 1, 1); err != nil {
				return 0, err
			}
			return o.taking(c, "pull", importRequest{Source: args[0], Insecure: o.insecure, Credentials: credentialFiles()}, registryEnv()...)
		},
	}
}
