package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

// privateRanges are where a company's index may well be. Loopback and
// link-local stay refused.
var privateRanges = []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"}

// runner runs the jobs of a bake, each in a sandbox.
type runner struct {
	dirs runtime.Dirs
	host *runtime.Host
}

func newManager(c *command, store *rootfs.Store, host *runtime.Host) *envs.Manager {
	return envs.Open(store, envs.Options{
		Runner: &runner{c.dirs, host}, Progress: c.ui,
		Helper:  func() (string, error) { return engine.Find("sbxrun-env") },
		Trusted: func(ctx context.Context, e *envs.Env) error { return checkTrusted(ctx, c, e) },
	})
}

// Run implements envs.Runner.
func (r *runner) Run(ctx context.Context, job envs.Job) (res envs.JobResult, err error) {
	spec := runtime.Spec{Argv: job.Argv, Env: slices.Clone(job.Env), Workdir: job.Dir, Base: job.Base, Degrade: []string{"idmap"}}
	for _, b := range job.Binds {
		v := runtime.Volume{Source: b.Source, Target: b.Target, Mode: "rw"}
		if b.ReadOnly {
			v.Mode = "ro"
		}
		spec.Volumes = append(spec.Volumes, v)
	}
	for _, t := range job.Trees {
		v := runtime.Volume{Source: t.Lowers[0], Lowers: t.Lowers[1:], Target: t.Target, Mode: "O", UpperDir: t.Dir}
		spec.Volumes = append(spec.Volumes, v)
	}
	// Compiling and unpacking take what there is; a bake is bounded by what it
	// is given: no way out but the index, no file but its own directory.
	spec.Limits.MemoryBytes = 4 << 30
	spec.Limits.CPUs = float64(r.host.CPUs)
	spec.Limits.Pids = 1024
	spec.Limits.WallTime = job.Timeout
	spec.Limits.Ulimits = []runtime.Rlimit{{Name: "nofile", Soft: 8192, Hard: 8192}}
	if len(job.AllowHosts) > 0 {
		spec.Network, spec.Net.Into = netns.ModeEgress, privateRanges
		for _, h := range job.AllowHosts {
			if _, _, ok := strings.Cut(strings.TrimPrefix(h, "["), ":"); ok && !strings.HasSuffix(h, "]") {
				spec.Net.Allow = append(spec.Net.Allow, h)
			} else {
				spec.Net.Allow = append(spec.Net.Allow, h+":443", h+":80")
			}
		}
	}
	plan, err := runtime.NewPlan(spec, r.host, r.dirs)
	if err != nil {
		return res, err
	}
	plan.StopTimeout = 2 * time.Second
	var rio runtime.IO
	if job.Stdin != "" {
		if rio.Stdin, err = os.Open(job.Stdin); err != nil {
			return res, err
		}
		defer rio.Stdin.Close()
	}
	rr, err := runInto(ctx, plan, job.Stdout, rio)
	if err != nil {
		return res, err
	}
	res.Denied = denied(rr)
	res.ExitCode, res.Message, res.Reason = rr.ExitCode, rr.Message, ""
	if rr.Status == runtime.StatusKilled || rr.Reason == runtime.ReasonDisk {
		res.Reason = string(rr.Reason)
	}
	return res, nil
}

// runInto runs a plan, with no input unless io has one, and all its output in to, which may be nil.
// The result is nil only where that could not be arranged.
func runInto(ctx context.Context, plan *runtime.Plan, to io.Writer, io runtime.IO) (*runtime.Result, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out, err := newCollector(to)
	if err != nil {
		return nil, err
	}
	defer out.finish()
	if io.Stdin == nil {
		io.Stdin = null
	}
	io.Stdout, io.Stderr = out.w, out.w
	return runtime.Run(ctx, plan, io)
}

// denied gives the first hosts that a job asked for and that are not allowed.
func denied(r *runtime.Result) (hosts []string) {
	if r.Network == nil || r.Network.Summary == nil {
		return nil
	}
	for _, d := range r.Network.Decisions {
		host := d.Host
		if d.Port != 0 {
			host += ":" + strconv.Itoa(d.Port)
		}
		if !d.Allowed && d.Host != "" && len(hosts) < 8 && !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}

// collector reads what a job prints.
type collector struct {
	w    *os.File
	done chan struct{}
}

func newCollector(to io.Writer) (*collector, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	c := &collector{w: w, done: make(chan struct{})}
	if to == nil {
		to = io.Discard
	}
	go func() {
		defer close(c.done)
		defer r.Close()
		_, _ = io.Copy(to, r)
	}()
	return c, nil
}

func (c *collector) finish() {
	c.w.Close()
	<-c.done
}
