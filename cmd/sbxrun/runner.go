package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime"
)

// proxyAddress is where a bake's sandbox finds its way out.
const proxyAddress = "127.0.0.1:3128"

// runner runs the jobs of a bake, each in a sandbox.
type runner struct {
	dirs runtime.Dirs
	host *runtime.Host
}

func newManager(c *command, store *rootfs.Store, host *runtime.Host) *envs.Manager {
	return envs.Open(store, envs.Options{Runner: &runner{c.dirs, host}, Progress: c.ui})
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
	// Compiling and unpacking take what there is; a bake is bounded by what it
	// is given: no way out but the index, no file but its own directory.
	spec.Limits.MemoryBytes = 4 << 30
	spec.Limits.CPUs = float64(r.host.CPUs)
	spec.Limits.Pids = 1024
	spec.Limits.WallTime = job.Timeout
	spec.Limits.Ulimits = []runtime.Rlimit{{Name: "nofile", Soft: 8192, Hard: 8192}}
	if len(job.AllowHosts) > 0 {
		// The hosts come from the user's configuration: a company's index may
		// well be in a private range. Loopback and link-local stay refused.
		allow := append([]string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"}, job.AllowHosts...)
		ns, denied, err := openEgress(ask.Egress{Listen: proxyAddress, Allow: allow})
		if err != nil {
			return res, err
		}
		defer func() { res.Denied = denied() }()
		spec.Network = "ns:" + ns
		for _, k := range []string{"HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"} {
			spec.Env = append(spec.Env, k+"=http://"+proxyAddress)
		}
	}
	plan, err := runtime.NewPlan(spec, r.host, r.dirs)
	if err != nil {
		return res, err
	}
	out, err := newCollector(job.Stdout)
	if err != nil {
		return res, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return res, err
	}
	defer null.Close()
	plan.StopTimeout = 2 * time.Second
	rr, err := runtime.Run(ctx, plan, runtime.IO{Stdin: null, Stdout: out.w, Stderr: out.w})
	out.finish()
	if err != nil {
		return res, err
	}
	res.ExitCode, res.Message, res.Reason = rr.ExitCode, rr.Message, ""
	if rr.Status == runtime.StatusKilled || rr.Reason == runtime.ReasonDisk {
		res.Reason = string(rr.Reason)
	}
	return res, nil
}

// openEgress has sbxrun-oci make a network namespace with a proxy and gives
// its path. denied ends it and gives the hosts that were refused.
func openEgress(req ask.Egress) (ns string, denied func() []string, err error) {
	call, err := ask.Start(ask.EgressVerb, req)
	if err != nil {
		return "", nil, err
	}
	first, err := call.Next()
	if err != nil {
		return "", nil, errors.Join(err, call.Close())
	}
	var hosts []string
	read := make(chan struct{})
	go func() {
		defer close(read)
		for {
			r, err := call.Next()
			if err != nil { // it ends when it is told to
				return
			}
			if len(hosts) < 8 && !slices.Contains(hosts, r.Denied) {
				hosts = append(hosts, r.Denied)
			}
		}
	}()
	return first.NetNS, func() []string {
		call.Stop()
		<-read
		return hosts
	}, nil
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
