package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/runtime"
)

// runOptions are the flags of run and plan, and the keys of the TOML file.
type runOptions struct {
	recipeOptions
	serviceOptions
	with    string
	project string
	file    string
	command []string // of the file: what is run when no arguments are given
	report  string
	status  int

	memory, memorySwap, shmSize, disk, output, fsize sizeValueHolder
	cpus                                             string
	cpuset, cpusetMems                               string
	reservation, memoryHigh                          sizeValueHolder
	cpuShares, cpuWeight, blkioWeight                int64
	io                                               []runtime.IORate
	pids                                             int64
	inodes                                           int64
	ulimits                                          []string
	volumes, mounts, tmpfs                           []string
	readOnly                                         bool
	env, envFiles                                    []string
	workdir, user, userns                            string
	capAdd, capDrop, securityOpt                     []string
	network, netLog                                  string
	net                                              netns.Options
	publish, exposeUnix, hostPorts                   []string
	netRate                                          string
	mtu, netConns                                    int64
	hostname, name                                   string
	labels                                           []string
	interactive, tty                                 bool
	stopSignal                                       string
	stopTimeout, wall, cpuTime, extra                time.Duration
	cgroupParent, engine                             string
	degrade                                          []string
	json                                             bool // plan
	networkIsDefault                                 bool
	services                                         []serviceTable
	// arrange changes the spec when the environment (nil: none) is known: what is
	// not flags of run's own. It may be nil.
	arrange func(*runtime.Spec, *envs.Env) error
	// ended, which may be nil, sees the result, and says whether people need not be
	// told how it ended.
	ended func(*runtime.Result, error) (told bool)
}

type sizeValueHolder = int64

// notYet are flags of docker's that a caller may bring along and that this
// version cannot honour: refused, never ignored.
var notYet = []struct{ name, short, why string }{
	{"cap-add", "", "no sandbox has capabilities"},
}

func runVerb() *verb {
	return &verb{
		name: "run", args: "[flags] [--] COMMAND [ARG…]", passes: true,
		short: "run a command in a fresh sandbox and end with its exit code",
		long: "With -r FILE the command runs over the environment of that file: it is resolved to a hashed\n" +
			"lock and baked once, and found again from then on. Without, over the base alone. When an\n" +
			"environment is used, the current directory is shown at /work, copy-on-write, unless it is /,\n" +
			"a home directory or a system directory (--project DIR or none says otherwise).\n" +
			"Standard input, output and error are the caller's own.",
		setup: func(c *command) { c.opts = declareRun(c) },
		run: func(c *command, args []string) (int, error) {
			return run(c, c.opts.(*runOptions), args)
		},
	}
}

func planVerb() *verb {
	return &verb{
		name: "plan", args: "[flags of run] [--] COMMAND [ARG…]", passes: true, asRun: true,
		short: "print what run would do, and do nothing",
		long:  "An environment that is not baked yet is named, not baked.",
		setup: func(c *command) {
			o := declareRun(c)
			c.flags.BoolVar(&o.json, "json", "print JSON")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*runOptions)
			if err := o.load(c); err != nil {
				return 2, err
			}
			p, _, err := o.prepare(nil, c, nil, args, true)
			if err != nil {
				return 1, err
			}
			if o.json {
				b, err := json.MarshalIndent(p, "", "  ")
				if err != nil {
					return 1, err
				}
				c.ui.outf("%s\n", b)
				return 0, nil
			}
			c.ui.out(p.Text())
			return 0, nil
		},
	}
}

func declareRun(c *command) *runOptions {
	o := &runOptions{status: -1}
	f := &c.flags
	o.declareRecipe(f)
	o.serviceOptions.declare(f)
	size := func(v *int64, name, short, what string, unlimited bool) {
		f.VarP(sizeValue{v, unlimited}, name, short, what)
	}
	f.StringVar(&o.with, "with", "", "run over the environment of this `name` or digest")
	f.StringVar(&o.project, "project", "", "`directory` to show at /work, copy-on-write; none is none (default: the current one, when an environment is used)")
	f.StringVarP(&o.file, "file", "f", "", "read these settings from a TOML `file` (sbxrun.toml, or [tool.sbxrun] in pyproject.toml)")
	f.StringVar(&o.report, "report", "", "write the report to this `file`, - is standard error's end")
	f.IntVar(&o.status, "json-status-fd", -1, "write a JSON line to this descriptor when the command starts and ends")
	size(&o.memory, "memory", "m", "memory limit, -1 is none (default 1g)", true)
	size(&o.memorySwap, "memory-swap", "", "memory plus swap, -1 is unlimited swap (default: the memory limit, no swap)", true)
	f.StringVar(&o.cpus, "cpus", "", "CPUs, as 0.5 or 2 (default 1)")
	f.StringVar(&o.cpuset, "cpuset-cpus", "", "CPUs to run on, as 0-1 or 0,2")
	size(&o.reservation, "memory-reservation", "", "memory that is reclaimed last: memory.low on cgroup v2, the soft limit on v1", false)
	size(&o.memoryHigh, "memory-high", "", "memory above which the sandbox is slowed down; cgroup v2 only", false)
	f.Int64Var(&o.cpuShares, "cpu-shares", "share of busy CPUs, 2 to 262144 (default: 1024, as all have)")
	f.Int64Var(&o.cpuWeight, "cpu-weight", "the same in the terms of cgroup v2, 1 to 10000 (default: 100, as all have)")
	f.StringVar(&o.cpusetMems, "cpuset-mems", "", "memory `nodes` to use, as 0-1 or 0,2")
	f.Int64Var(&o.blkioWeight, "blkio-weight", "share of busy disks, 10 to 1000; the kernel needs BFQ or io.cost")
	for _, r := range ioRates {
		f.Var(rateValue{&o.io, r}, r.flag, r.usage)
	}
	f.Int64Var(&o.pids, "pids-limit", "processes and threads, -1 is no limit (default 256)")
	f.ListVar(&o.ulimits, "ulimit", "`name=soft[:hard]` of setrlimit(2) (default nofile=1024, core=0, memlock=65536)")
	size(&o.shmSize, "shm-size", "", "size of /dev/shm (default 64m)", false)
	size(&o.disk, "disk", "", "what may be written to the root; above half of the memory it lies on disk (default: half of the memory limit, at most 1g)", false)
	f.Int64Var(&o.inodes, "inodes", "files that may be made in the root (default: one per 4k of --disk)")
	f.ListVarP(&o.volumes, "volume", "v", "`source:target[:ro|rw|O]`: show a host path; O is copy-on-write")
	f.ListVar(&o.mounts, "mount", "`type=bind|tmpfs,source=…,target=…[,readonly]`")
	f.ListVar(&o.tmpfs, "tmpfs", "`target[:size=…,mode=…,exec]`: a file system in memory")
	f.BoolVar(&o.readOnly, "read-only", "read-only root; /tmp, /run, /var/tmp and /dev/shm stay writable")
	f.ListVarP(&o.env, "env", "e", "`KEY=VALUE`, or KEY for the caller's own value")
	f.ListVar(&o.envFiles, "env-file", "`file` of KEY=VALUE lines")
	f.StringVarP(&o.workdir, "workdir", "w", "", "working `directory` inside (default /work with a project, else the user's home)")
	f.StringVarP(&o.user, "user", "u", "", "`uid[:gid]` or name[:group] inside (default 1000:1000); never the host's")
	f.StringVar(&o.userns, "userns", "", "auto, the default: a user namespace and an id range of its own")
	f.ListVar(&o.capAdd, "cap-add", "refused: no sandbox has capabilities")
	f.ListVar(&o.capDrop, "cap-drop", "accepted: all are dropped anyway")
	f.ListVar(&o.securityOpt, "security-opt", "no-new-privileges is accepted: it is always on")
	f.StringVar(&o.network, "network", "none", "none (lo only), egress (what --allow names, through a proxy), full (routed, with address translation), host, ns:`path` or container:ID")
	f.ListVar(&o.net.Allow, "allow", "what may be reached: `host[:port]`, *.host, address or CIDR; a deny wins. Implies --network egress")
	f.ListVar(&o.net.Deny, "deny", "what may not, although it is allowed: `host[:port]`, *.host, address or CIDR")
	f.ListVarP(&o.publish, "publish", "p", "`[ip:]host:container[/udp]`: a port of the host's that leads inside, also to 127.0.0.1; host port 0 is any free one")
	f.ListVar(&o.exposeUnix, "expose-unix", "`path:port`: a UNIX socket of the host's, for its owner only, that leads to a TCP port inside")
	f.ListVar(&o.hostPorts, "host-port", "`[inside:]port`: 127.0.0.1:inside leads to this TCP port of the host's 127.0.0.1, with none, egress and full")
	f.ListVar(&o.net.DNS, "dns", "name server's `address` (--network full; default: the host's)")
	f.StringVar(&o.netRate, "net-rate", "", "`up,down` as tc writes rates: 10mbit,100mbit; one value is both")
	size(&o.net.MaxBytes, "net-bytes", "", "what may cross the network, both ways together (--network egress)", false)
	f.Int64Var(&o.netConns, "net-conns", "connections at a time (default 256)")
	f.Int64Var(&o.mtu, "mtu", "MTU of --network full (default: that of the host's default route)")
	f.StringVar(&o.netLog, "net-log", "", "append a JSON line for each decision about the network to this `file`")
	f.StringVar(&o.hostname, "hostname", "", "host `name` inside (default: the sandbox's id)")
	f.StringVar(&o.name, "name", "", "a `name`, unique among live sandboxes")
	f.ListVar(&o.labels, "label", "`key=value` for people and tools")
	f.BoolVarP(&o.interactive, "interactive", "i", "with -t: pass standard input on (without -t it always is)")
	f.BoolVarP(&o.tty, "tty", "t", "give the command a terminal of its own")
	f.StringVar(&o.stopSignal, "stop-signal", "TERM", "`signal` that asks the command to stop")
	f.Var(durationValue{&o.stopTimeout}, "stop-timeout", "grace before it is killed then (default 10s)")
	f.Var(durationValue{&o.wall}, "timeout", "wall time limit: killed, exit code 124")
	f.Var(durationValue{&o.wall}, "wall-time", "the same as --timeout")
	f.Var(durationValue{&o.cpuTime}, "cpu-time", "limit of user plus system time of all processes: killed, exit code 124")
	f.Var(durationValue{&o.extra}, "extra-time", "grace over --timeout and --cpu-time before the kill")
	size(&o.fsize, "fsize", "", "limit of a single file's size (RLIMIT_FSIZE)", false)
	size(&o.output, "output-limit", "", "limit of standard output plus standard error: killed, exit code 137", false)
	f.StringVar(&o.cgroupParent, "cgroup-parent", "", "cgroup `path` to lie in (default: sbxrun in the caller's own)")
	f.StringVar(&o.engine, "engine", "direct", "what makes the namespaces: direct, or libcontainer (the reference, slower)")
	f.ListVar(&o.degrade, "degrade", "run without this protection where the host lacks it (idmap); the report lists it")
	f.BoolVarP(&c.quiet, "quiet", "q", "no progress")
	f.ListVar(&o.command, "command", "the command, as a list: for the file, arguments say it otherwise")
	f.Lookup("command").hidden = true
	for _, n := range notYet {
		if f.Lookup(n.name) == nil { // --cap-add is in the help
			f.ListVarP(new([]string), n.name, n.short, n.why)
			f.Lookup(n.name).hidden = true
		}
	}
	return o
}

// load takes the settings of -f that no flag gave.
func (o *runOptions) load(c *command) error {
	if o.file == "" {
		return nil
	}
	var err error
	o.services, err = applyFile(&c.flags, o.file)
	c.ui.quiet = c.quiet
	return err
}

// check refuses what cannot be honoured.
func (o *runOptions) check(f *flagSet) error {
	for _, n := range notYet {
		if f.Changed(n.name) {
			return usage(n.why, "--%s: not supported", n.name)
		}
	}
	for _, s := range o.securityOpt {
		if s != "no-new-privileges" && s != "no-new-privileges:true" && s != "no-new-privileges=true" {
			return usage("protections cannot be turned off here", "--security-opt %q: not supported", s)
		}
	}
	if o.userns != "" && o.userns != "auto" {
		return usage("a sandbox always has a user namespace and an id range of its own", "--userns %q: not supported", o.userns)
	}
	for _, s := range o.capDrop {
		if !knownCap(s) {
			return usage("ALL, or a name of capabilities(7)", "--cap-drop %q: not a capability", s)
		}
	}
	if f.Changed("json-status-fd") {
		if _, err := unix.FcntlInt(uintptr(max(o.status, 0)), unix.F_GETFD, 0); err != nil || o.status < 0 {
			return usage("open it in the calling shell: 3>status.json", "--json-status-fd %d: not an open descriptor", o.status)
		}
	}
	if f.Changed("stop-timeout") && o.stopTimeout == 0 {
		o.stopTimeout = 1 // at once; the zero value is the default
	}
	for _, l := range o.labels {
		if k, _, _ := strings.Cut(l, "="); k == "" {
			return usage("", "--label %q: not key=value", l)
		}
	}
	if mode := o.network; len(o.services) > 0 && mode != netns.ModeNone && mode != netns.ModeEgress && mode != netns.ModeFull {
		return usage("use none, egress or full", "--network %s: services need a network of the job's own", mode)
	}
	o.networkIsDefault = !f.Changed("network")
	if o.with != "" && o.requirements != "" {
		return usage("-r bakes, --with takes what is baked", "--with and -r: both given")
	}
	return nil
}

// spec turns flags into a Spec without base and environment.
func (o *runOptions) spec(args []string) (s runtime.Spec, err error) {
	s = runtime.Spec{
		Argv: args, Workdir: o.workdir, User: o.user, Hostname: o.hostname, Name: o.name, ReadOnly: o.readOnly,
		ShmSizeBytes: o.shmSize, Network: o.network, TTY: o.tty, Interactive: o.interactive,
		StopTimeout: o.stopTimeout, CgroupParent: o.cgroupParent, Engine: o.engine, Degrade: o.degrade,
	}
	wrap := func(flag string, err error) error {
		return usage("sbxrun run --help tells the form", "--%s: %v", flag, err)
	}
	if s.Env, err = parseEnv(o.env, o.envFiles); err != nil {
		return s, wrap("env", err)
	}
	if s.StopSignal, err = parseSignal(o.stopSignal); err != nil {
		return s, wrap("stop-signal", err)
	}
	for _, v := range o.volumes {
		vol, err := parseVolume(v)
		if err != nil {
			return s, wrap("volume", err)
		}
		s.Volumes = append(s.Volumes, vol)
	}
	for _, v := range o.mounts {
		vol, t, err := parseMount(v)
		switch {
		case err != nil:
			return s, wrap("mount", err)
		case vol != nil:
			s.Volumes = append(s.Volumes, *vol)
		default:
			s.Tmpfs = append(s.Tmpfs, *t)
		}
	}
	for _, v := range o.tmpfs {
		t, err := parseTmpfs(v)
		if err != nil {
			return s, wrap("tmpfs", err)
		}
		s.Tmpfs = append(s.Tmpfs, t)
	}
	for _, l := range o.labels {
		if s.Labels == nil {
			s.Labels = map[string]string{}
		}
		k, v, _ := strings.Cut(l, "=")
		s.Labels[k] = v
	}
	l := &s.Limits
	l.MemoryBytes, l.Pids, l.DiskBytes, l.Inodes = o.memory, o.pids, o.disk, o.inodes
	l.CPUSet, l.WallTime, l.CPUTime, l.ExtraTime = o.cpuset, o.wall, o.cpuTime, o.extra
	l.OutputBytes, l.FileBytes = o.output, o.fsize
	l.MemoryLowBytes, l.MemoryHighBytes, l.CPUSetMems = o.reservation, o.memoryHigh, o.cpusetMems
	l.CPUShares, l.CPUWeight, l.BlkioWeight, l.IO = o.cpuShares, o.cpuWeight, o.blkioWeight, o.io
	if o.cpus != "" {
		f, err := strconv.ParseFloat(o.cpus, 64)
		if err != nil || !(f > 0 && f < 1e6) {
			return s, wrap("cpus", fmt.Errorf("%q is not a number of CPUs", o.cpus))
		}
		l.CPUs = f
	}
	switch mem := o.memory; {
	case o.memorySwap == -1:
		l.SwapBytes = -1
	case o.memorySwap > 0:
		if mem == 0 {
			mem = 1 << 30
		}
		if mem < 0 || o.memorySwap < mem {
			return s, wrap("memory-swap", errors.New("it is memory plus swap: not less than --memory"))
		}
		l.SwapBytes = o.memorySwap - mem
	}
	for _, u := range o.ulimits {
		r, err := parseUlimit(u)
		if err != nil {
			return s, wrap("ulimit", err)
		}
		l.Ulimits = append(l.Ulimits, r)
	}
	s.Aliases = o.aliases()
	if s.Net, err = o.options(); err != nil {
		return s, err
	}
	if len(s.Net.Allow) > 0 && o.networkIsDefault {
		s.Network = netns.ModeEgress
	}
	return s, o.fill(&s)
}

// options turns the flags about the network into what the plan takes.
func (o *runOptions) options() (netns.Options, error) {
	n := o.net
	n.MTU, n.MaxConns = int(o.mtu), int(o.netConns)
	wrap := func(flag string, err error) error {
		return usage("sbxrun run --help tells the form", "--%s: %v", flag, err)
	}
	for _, v := range o.publish {
		p, err := parsePublish(v)
		if err != nil {
			return n, wrap("publish", err)
		}
		n.Publish = append(n.Publish, p)
	}
	for _, v := range o.exposeUnix {
		p, err := parseUnixPort(v)
		if err == nil {
			p.Path, err = filepath.Abs(p.Path)
		}
		if err != nil {
			return n, wrap("expose-unix", err)
		}
		n.ExposeUnix = append(n.ExposeUnix, p)
	}
	for _, v := range o.hostPorts {
		p, err := parseHostPort(v)
		if err != nil {
			return n, wrap("host-port", err)
		}
		n.HostPorts = append(n.HostPorts, p)
	}
	if o.netRate != "" {
		var err error
		if n.RateUpBPS, n.RateDownBPS, err = parseRate(o.netRate); err != nil {
			return n, wrap("net-rate", err)
		}
	}
	return n, nil
}

// openNetLog opens what the decisions are appended to.
func (o *runOptions) openNetLog() (*os.File, error) {
	if o.netLog == "" {
		return nil, nil
	}
	if st, err := os.Stat(o.netLog); err == nil && !st.Mode().IsRegular() {
		return nil, usage("a pipe that nobody reads would hold the network up", "--net-log %q: not a regular file", o.netLog)
	}
	f, err := os.OpenFile(o.netLog, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, usage("give a file in a directory that is there and writable", "--net-log %q: %v", o.netLog, errors.Unwrap(err))
	}
	return f, nil
}

// projectOf gives the directory to show at /work, "" is none.
func (o *runOptions) projectOf() (string, error) {
	switch o.project {
	case "none":
		return "", nil
	case "":
		if o.requirements == "" && o.with == "" {
			return "", nil
		}
		dir, err := os.Getwd()
		if err != nil || unsafeProject(dir) {
			return "", nil //nolint:nilerr // a directory that is gone is no project
		}
		return dir, nil
	}
	abs, err := filepath.Abs(o.project)
	if err != nil {
		return "", err
	}
	if st, err := os.Stat(abs); err != nil || !st.IsDir() {
		return "", usage("", "--project %q: not a directory", o.project)
	}
	return abs, nil
}

// unsafeProject says whether a directory holds more than a project: showing
// it must be asked for by name.
func unsafeProject(dir string) bool {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	home, _ := os.UserHomeDir()
	if dir == "/" || dir == home || dir == "/root" || filepath.Dir(dir) == "/home" || dir == "/home" || dir == "/tmp" || dir == "/mnt" || dir == "/media" || dir == "/srv" || dir == "/opt" {
		return true
	}
	for _, p := range []string{"/usr", "/etc", "/var", "/proc", "/sys", "/dev", "/run", "/boot", "/bin", "/sbin", "/lib", "/lib64"} {
		if dir == p || strings.HasPrefix(dir, p+"/") {
			return !strings.HasPrefix(dir, "/var/lib/") && !strings.HasPrefix(dir, "/var/tmp/") || strings.Count(dir, "/") < 4
		}
	}
	return false
}

// prepare does all that comes before a sandbox, the bake too unless dry, and
// fills in io.
func (o *runOptions) prepare(sigs *signals, c *command, io *runtime.IO, args []string, dry bool) (*runtime.Plan, envs.Phases, error) {
	if err := o.check(&c.flags); err != nil {
		return nil, nil, err
	}
	if len(args) == 0 {
		args = o.command
	}
	if len(args) == 0 {
		return nil, nil, usage("give one after --: sbxrun run -- python3 script.py", "%s: no command", c.verb.name)
	}
	spec, err := o.spec(args)
	if err != nil {
		return nil, nil, err
	}
	if os.Geteuid() != 0 {
		return nil, nil, &runtime.Error{Op: c.verb.name, Stage: "plan", Err: errors.New("not root"), Hint: "run sbxrun as root: sudo sbxrun " + c.verb.name + " …"}
	}
	if io != nil { // before a bake: what it starts must not have the descriptors
		if err := o.open(io, o.status); err != nil {
			return nil, nil, err
		}
		c.ui.tell = io.Service.Status
		if io.NetLog, err = o.openNetLog(); err != nil {
			return nil, nil, err
		}
		if o.network == netns.ModeEgress || o.network == netns.ModeFull || len(spec.Net.Allow) > 0 || spec.Net.Served() {
			io.Helper = runtime.StartHelper(io.NetLog)
		}
		io.NetworkReady = func(r *netns.Ready) {
			for i, p := range r.Ports {
				if i < len(spec.Net.Publish) && spec.Net.Publish[i].HostPort == 0 {
					c.ui.note("published %s on %s", strconv.Itoa(p.ContainerPort)+"/"+p.Proto, p.Host())
				}
			}
		}
	}
	dir, err := o.projectOf()
	if err != nil {
		return nil, nil, err
	}
	if dir != "" {
		taken := false
		for _, v := range spec.Volumes {
			taken = taken || v.Target == "/work"
		}
		if taken && o.project != "" {
			return nil, nil, usage("give one of them", "--project and --volume: both show something at /work")
		}
		if !taken {
			spec.Volumes = append(spec.Volumes, runtime.Volume{Source: dir, Target: "/work", Mode: "O"})
		}
	}
	host, err := runtime.Probe()
	if err != nil {
		return nil, nil, err
	}
	store, err := c.store()
	if err != nil {
		return nil, nil, err
	}
	if spec.Base, err = store.Base(o.base); err != nil {
		return nil, nil, err
	}
	phases := envs.Phases{}
	var env *envs.Env
	mgr := newManager(c, store, host)
	switch {
	case o.with != "":
		if env, err = mgr.Get(o.with); err == nil {
			err = checkTrusted(context.Background(), c, env)
		}
	case o.requirements != "" && dry:
		// Judge all else first: what would be baked has no digest yet.
		_, err = runtime.NewPlan(spec, host, c.dirs)
		if err == nil {
			env, err = mgr.Find(o.recipe(spec.Base))
		}
		if err == nil && env == nil {
			env = &envs.Env{Digest: "(not baked yet)", Vars: []string{"VIRTUAL_ENV=" + envs.EnvDir}}
		}
	case o.requirements != "":
		start := time.Now()
		env, err = mgr.Find(o.recipe(spec.Base))
		if err == nil && env == nil {
			// Bad input is refused before minutes of baking.
			if _, err = runtime.NewPlan(spec, host, c.dirs); err == nil {
				err = sigs.during(func(ctx context.Context) (err error) {
					env, phases, err = mgr.Ensure(ctx, o.recipe(spec.Base))
					return err
				})
			}
			if err == nil && !c.quiet {
				for _, n := range env.Notes {
					c.ui.note("%s", n)
				}
			}
		} else {
			phases["resolve"] = float64(time.Since(start).Microseconds()) / 1000
		}
	}
	if err != nil {
		return nil, phases, err
	}
	if env != nil {
		if !dry {
			mgr.Used(env)
		}
		if env.Base != "" && env.Base != spec.Base.Name && !c.flags.Changed("base") { // what it was baked upon
			if spec.Base, err = store.Base(env.Base); err != nil {
				return nil, phases, err
			}
		}
		if err := envs.CheckPython(env, spec.Base); err != nil && env.Path != "" {
			return nil, phases, err
		}
		spec.Layer = &runtime.EnvLayer{Key: env.Key, Digest: env.Digest, Path: env.Path, Lowers: env.Lowers, Env: env.Vars, PathPrefix: env.PathPrefix()}
	}
	if o.arrange != nil {
		if err := o.arrange(&spec, env); err != nil {
			return nil, phases, err
		}
	}
	p, err := runtime.NewPlan(spec, host, c.dirs)
	return p, phases, err
}

func run(c *command, o *runOptions, args []string) (code int, err error) {
	start := time.Now()
	var sigs signals
	if err := o.load(c); err != nil {
		c.ui.error(err)
		reportUsage(c, err)
		return 125, nil
	}
	rep, err := openReport(o.report)
	if err != nil {
		return 125, err
	}
	io := runtime.IO{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Signals: sigs.listen, NoFigures: o.report == ""}
	plan, phases, err := o.prepare(&sigs, c, &io, args, false)
	defer io.Helper.Close()
	c.ui.Done()
	var res *runtime.Result
	switch {
	case sigs.early != nil:
		res = runtime.SetupFailed(fmt.Errorf("canceled by %s: %w", unix.SignalName(sigs.early.(unix.Signal)), context.Canceled))
		res.ExitCode = 128 + int(sigs.early.(unix.Signal))
		err = errors.New(res.Message)
	case err != nil:
		res = runtime.SetupFailed(err)
		var ue *usageError
		switch {
		case res.Stage != "":
		case errors.As(err, &ue):
			res.Stage = "usage"
		case o.requirements != "":
			res.Stage = "bake"
		default:
			res.Stage = "base"
		}
	default:
		if o.status >= 0 {
			unix.CloseOnExec(o.status)
			io.StatusFD = os.NewFile(uintptr(o.status), "json-status-fd")
		}
		var services *jobServices
		if services, err = newJobServices(&sigs, c, o); err != nil {
			res = runtime.SetupFailed(err)
			res.Stage = "services"
			break
		}
		if len(services.all) > 0 {
			io.Beside = services
		}
		res, err = runtime.Run(context.Background(), plan, io)
		c.ui.Done()
		res.Services = services.report()
		if err != nil && sigs.early != nil { // while services were started
			res.ExitCode = 128 + int(sigs.early.(unix.Signal))
		}
	}
	for k, v := range phases {
		res.PhasesMS[k] += v
	}
	if res.ID == "" { // there was no sandbox: what was spent went into preparing one
		res.StartedAt, res.FinishedAt = start, time.Now()
		res.WallMS = float64(res.FinishedAt.Sub(start).Microseconds()) / 1000
	}
	for _, n := range res.Notes {
		c.ui.note("%s", n)
	}
	told := journal(res)
	if o.ended != nil {
		told = o.ended(res, err) || told
	}
	if err == nil && res.Message != "" && res.Status != runtime.StatusOK && !told {
		c.ui.note("%s", res.Message)
		if res.Hint != "" && !c.quiet {
			c.ui.hint(res.Hint)
		}
	}
	if err == nil && strings.Contains(res.Message, "teardown:") {
		c.ui.error(errors.New(res.Message))
	}
	if err != nil {
		io.Service.Stopping(res.End())
	}
	if err != nil && !told {
		c.ui.error(err) // before the report, which is standard error's end
	}
	if rerr := rep.write(res); rerr != nil {
		c.ui.error(rerr)
		if res.ExitCode == 0 {
			return 125, nil
		}
	}
	return res.ExitCode, nil
}

// report is where the report goes: a file that is replaced at once, or the
// end of standard error.
type report struct {
	path string
	dir  *os.File // where a file is to be made
	file *os.File // the file, without a name yet; nil where the file system has none such
	out  *os.File // a device or a pipe
}

// openReport opens, before anything is run, what the report goes to: the job
// may be able to change the path (a volume), and root must not follow it.
func openReport(path string) (*report, error) {
	if path == "" || path == "-" {
		return &report{path: path}, nil
	}
	r := &report{path: path}
	switch st, err := os.Stat(path); {
	case err == nil && st.IsDir():
		return nil, usage("give a file", "--report %q: is a directory", path)
	case err == nil && !st.Mode().IsRegular():
		if r.out, err = os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
			return nil, usage("give something that can be written", "--report %q: %v", path, errors.Unwrap(err))
		}
		return r, nil
	}
	const hint = "give a file in a directory that is there and writable"
	fd, err := unix.Open(filepath.Dir(path), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, usage(hint, "--report %q: %v", path, err)
	}
	if err := unix.Faccessat(fd, ".", unix.W_OK, 0); err != nil {
		unix.Close(fd)
		return nil, usage(hint, "--report %q: %v", path, err)
	}
	r.dir = os.NewFile(uintptr(fd), filepath.Dir(path))
	// Now, so that nothing but the writing can fail when the command has run.
	if fd, err = unix.Openat(fd, ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600); err == nil {
		r.file = os.NewFile(uintptr(fd), path)
	} else if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		r.dir.Close()
		return nil, usage(hint, "--report %q: %v", path, err)
	}
	return r, nil
}

// create gives the file, and an unused name in the directory that is its own.
func (r *report) create() (string, *os.File, error) {
	for n := 0; ; n++ {
		name := fmt.Sprintf(".report-%d-%d", os.Getpid(), n)
		if r.file != nil {
			err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", r.file.Fd()), int(r.dir.Fd()), name, unix.AT_SYMLINK_FOLLOW)
			if err == nil || !errors.Is(err, unix.EEXIST) || n > 100 {
				return name, r.file, err
			}
			continue
		}
		fd, err := unix.Openat(int(r.dir.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return name, os.NewFile(uintptr(fd), name), nil
		}
		if !errors.Is(err, unix.EEXIST) || n > 100 {
			return "", nil, err
		}
	}
}

func (r *report) write(res *runtime.Result) error {
	if r.path == "" {
		return nil
	}
	b, err := json.Marshal(res)
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	b = append(b, '\n')
	switch {
	case r.path == "-":
		_, err = os.Stderr.Write(b)
		return err
	case r.out != nil:
		_, err = r.out.Write(b)
		return errors.Join(err, r.out.Close())
	}
	defer r.dir.Close()
	name, f, err := r.create()
	if err != nil {
		return fmt.Errorf("write report %q: %w", r.path, err)
	}
	dir := int(r.dir.Fd())
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = unix.Renameat(dir, name, dir, filepath.Base(r.path))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write report %q: %w", r.path, err), unix.Unlinkat(dir, name, 0))
	}
	return nil
}

// reportUsage writes the report of a run whose flags were wrong, if the flag
// that names it was read before.
func reportUsage(c *command, err error) {
	o, ok := c.opts.(*runOptions)
	if !ok || c.verb.name != "run" {
		return
	}
	if rep, rerr := openReport(o.report); rerr == nil {
		res := runtime.SetupFailed(err)
		res.Stage = "usage"
		_ = rep.write(res) // the error itself is told already
	}
}

// knownCap says whether s is ALL or names a capability, with or without CAP_.
func knownCap(s string) bool {
	s = strings.TrimPrefix(strings.ToUpper(s), "CAP_")
	for _, c := range strings.Fields("ALL CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP " +
		"LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT " +
		"SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE " +
		"AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE") {
		if s == c {
			return true
		}
	}
	return false
}
