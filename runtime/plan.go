package runtime

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"sort"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/cgroup"
	"github.com/sbxrun/sbxrun/runtime/engine"
	"github.com/sbxrun/sbxrun/seccomp"
)

// The defaults of a sandbox (docs/reference.md lists them by flag).
const (
	defaultUID         = 1000
	defaultHome        = "/home/sandbox"
	defaultPath        = "/usr/local/bin:/usr/bin:/bin"
	defaultMemoryBytes = 1 << 30
	minMemoryBytes     = 6 << 20
	defaultPids        = 256
	defaultCPUs        = 1
	defaultDiskBytes   = 1 << 30
	defaultShmBytes    = 64 << 20
	defaultTmpfsBytes  = 64 << 20
	defaultStopTimeout = 10 * time.Second
	// idRangeSize ids belong to each live sandbox.
	idRangeSize = 65536
	// projectDir is where a project is shown.
	projectDir = "/work"
)

// The engines.
const (
	engineDirect       = "direct"
	engineLibcontainer = "libcontainer"
)

// Dirs are the two places sbxrun writes to.
type Dirs struct {
	Root  string `json:"root"`  // /var/lib/sbxrun: survives reboots
	State string `json:"state"` // /run/sbxrun: does not
}

// Bytes is a string of any bytes. JSON shows it as a string where it is UTF-8
// and as {"base64": …} where it is not.
type Bytes string

// MarshalJSON implements json.Marshaler.
func (b Bytes) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(b)) {
		return json.Marshal(string(b))
	}
	return json.Marshal(map[string]string{"base64": base64.StdEncoding.EncodeToString([]byte(b))})
}

// Plan is all that will be done, absolute and without the host in it but for
// names: two plans of one Spec are equal. What only exists at run time (id,
// id range, descriptors) is not in it.
type Plan struct {
	SchemaVersion int               `json:"schema_version"`
	Name          string            `json:"name,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
	Engine        string            `json:"engine"`
	Dirs          Dirs              `json:"dirs"`

	Argv     []Bytes `json:"argv"`
	Env      []Bytes `json:"env"`
	Cwd      string  `json:"cwd"`
	UID      uint32  `json:"uid"`
	GID      uint32  `json:"gid"`
	Hostname string  `json:"hostname,omitempty"` // "" is the sandbox's id
	TTY      bool    `json:"tty"`
	Stdin    bool    `json:"stdin"` // with TTY: forward standard input

	Base      rootfs.Base    `json:"base"`
	Layer     *EnvLayer      `json:"env_layer"`
	Upper     rootfs.Upper   `json:"upper"`
	Seeds     []rootfs.Seed  `json:"seeds"`
	Volumes   []Volume       `json:"volumes"`
	ReadOnly  bool           `json:"read_only"`
	Mounts    []engine.Mount `json:"mounts"` // besides base binds and volumes
	Secrets   []Secret       `json:"secrets,omitempty"`
	Masked    []string       `json:"masked_paths"`
	ReadPaths []string       `json:"readonly_paths"`

	Namespaces []string `json:"namespaces"`
	IDRange    uint32   `json:"id_range"` // host ids, unique per live sandbox
	Network    string   `json:"network"`
	// Aliases are further names of localhost.
	Aliases []string `json:"aliases,omitempty"`
	// Net is what is asked of it beside the mode; nil is nothing.
	Net     *netns.Options `json:"network_options,omitempty"`
	Seccomp string         `json:"seccomp"` // digest of the policy
	// LandlockScoped is the set of LANDLOCK_SCOPE_* bits, 0 where the kernel
	// has none.
	LandlockScoped uint32   `json:"landlock_scoped"`
	Capabilities   []string `json:"capabilities"` // always empty
	NoNewPrivs     bool     `json:"no_new_privs"` // always true

	Limits       Limits   `json:"limits"`
	Rlimits      []Rlimit `json:"rlimits"`
	CgroupParent string   `json:"cgroup_parent,omitempty"`
	// CgroupManager is cgroupfs or systemd.
	CgroupManager string `json:"cgroup_manager"`

	PassFDs   int  `json:"pass_fds,omitempty"`
	ListenFDs int  `json:"listen_fds,omitempty"`
	Notify    bool `json:"notify,omitempty"` // the command has a socket to the service manager

	StopSignal  int           `json:"stop_signal"`
	StopTimeout time.Duration `json:"stop_timeout_ns"`

	// Degraded lists protections that are absent with the caller's consent.
	Degraded []string `json:"degraded"`
	// MayDegrade is what the caller agreed to.
	MayDegrade []string `json:"may_degrade,omitempty"`
}

// planErr is a refusal while planning: bad input, or a host that cannot.
func planErr(op, object string, err error, hint string) error {
	return &Error{Op: op, Object: object, Stage: "plan", Err: err, Hint: hint}
}

// NewPlan works out what a Spec means on a host. It reads (the base's passwd)
// but changes nothing. A limit or protection that cannot be had is an error.
func NewPlan(spec Spec, host *Host, dirs Dirs) (*Plan, error) {
	p := &Plan{
		SchemaVersion: SchemaVersion, Name: spec.Name, Labels: spec.Labels, Engine: spec.Engine, Dirs: dirs,
		Hostname: spec.Hostname, TTY: spec.TTY, Stdin: spec.Interactive || !spec.TTY,
		Base: spec.Base, Layer: spec.Layer, ReadOnly: spec.ReadOnly, Volumes: spec.Volumes,
		Namespaces: []string{"user", "mount", "pid", "ipc", "uts", "cgroup", "time", "net"},
		IDRange:    idRangeSize, Capabilities: []string{}, NoNewPrivs: true,
		StopSignal: spec.StopSignal, StopTimeout: spec.StopTimeout, CgroupParent: spec.CgroupParent, Aliases: spec.Aliases,
		Degraded: []string{}, MayDegrade: spec.Degrade,
		Masked: []string{
			"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/kmsg",
			"/proc/key-users", "/proc/kallsyms", "/proc/latency_stats", "/proc/modules", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		},
		ReadPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
	}
	for _, r := range spec.Name { // it goes into journals, reports and terminals
		if r < ' ' || r == 0x7f {
			return nil, planErr("use name", spec.Name, errors.New("holds a control character"), "choose another --name")
		}
	}
	if p.Engine == "" {
		p.Engine = engineDirect
	}
	if p.Engine != engineDirect && p.Engine != engineLibcontainer {
		return nil, planErr("choose engine", p.Engine, errors.New("unknown engine"), "engines: direct, libcontainer")
	}
	if p.StopSignal == 0 {
		p.StopSignal = int(unix.SIGTERM)
	}
	if p.StopTimeout == 0 {
		p.StopTimeout = defaultStopTimeout
	}
	for _, d := range spec.Degrade {
		if d != "idmap" {
			return nil, planErr("degrade", d, errors.New("not a protection that can be given up"), "only idmap can be given up")
		}
	}
	for _, step := range []func(Spec, *Host) error{p.command, p.network, p.rootfs, p.service, p.limits, p.protect} {
		if err := step(spec, host); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *Plan) command(spec Spec, _ *Host) error {
	if len(spec.Argv) == 0 || spec.Argv[0] == "" {
		return planErr("run", "", errors.New("empty command"), "give a command after --: sbxrun run -- python3 script.py")
	}
	for _, s := range append(append([]string{}, spec.Argv...), spec.Env...) {
		if strings.IndexByte(s, 0) >= 0 {
			return planErr("run", spec.Argv[0], errors.New("an argument or variable holds a NUL byte"), "")
		}
	}
	if len(spec.Hostname) > 63 || strings.ContainsAny(spec.Hostname, "/ \x00\n") {
		return planErr("set host name", spec.Hostname, errors.New("not a host name of at most 63 characters"), "")
	}
	uid, gid, home, name, err := resolveUser(spec.Base, spec.User)
	if err != nil {
		return planErr("find user", spec.User, err, "name a user of the base, or a number below 65536")
	}
	p.UID, p.GID = uid, gid
	for _, a := range spec.Argv {
		p.Argv = append(p.Argv, Bytes(a))
	}

	env := newEnviron()
	searchPath := defaultPath
	for _, kv := range spec.Base.Env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			searchPath = v
			continue
		}
		env.set(kv)
	}
	if spec.Layer != nil {
		for i := len(spec.Layer.PathPrefix) - 1; i >= 0; i-- {
			searchPath = spec.Layer.PathPrefix[i] + ":" + searchPath
		}
	}
	env.set("PATH=" + searchPath)
	env.set("HOME=" + home)
	env.set("USER=" + name)
	env.set("LANG=C.UTF-8")
	if spec.TTY {
		env.set("TERM=xterm")
	}
	if spec.Layer != nil {
		for _, kv := range spec.Layer.Env {
			env.set(kv)
		}
	}
	for _, kv := range spec.Env {
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" {
			return planErr("set variable", kv, errors.New("not KEY=VALUE"), "")
		}
		env.set(kv)
	}
	for _, kv := range serviceEnv(spec) {
		env.set(kv)
	}
	p.Env = env.list()

	p.Cwd = spec.Workdir
	if p.Cwd == "" {
		p.Cwd = home
		for _, v := range spec.Volumes {
			if v.Target == projectDir {
				p.Cwd = projectDir
			}
		}
	}
	if err := insidePath(p.Cwd); err != nil {
		return planErr("set working directory", p.Cwd, err, "give an absolute path inside the sandbox")
	}

	own := func(dir string, mode uint32) {
		p.Seeds = append(p.Seeds, rootfs.Seed{Path: dir, Dir: true, Mode: mode, UID: uid, GID: gid})
	}
	if home == defaultHome {
		p.Seeds = append(p.Seeds, rootfs.Seed{Path: "/home", Dir: true, Mode: 0o755})
		own(defaultHome, 0o755)
	}
	p.Seeds = append(p.Seeds, rootfs.Seed{Path: "/tmp", Dir: true, Mode: 0o1777},
		rootfs.Seed{Path: "/run", Dir: true, Mode: 0o755})
	if p.Cwd == projectDir || strings.HasPrefix(p.Cwd, projectDir+"/") {
		own(projectDir, 0o755)
	}
	return nil
}

// environ keeps the order of first appearance; later values win.
type environ struct {
	keys   []string
	values map[string]string
}

func newEnviron() *environ { return &environ{values: map[string]string{}} }

func (e *environ) set(kv string) {
	k, v, _ := strings.Cut(kv, "=")
	if _, ok := e.values[k]; !ok {
		e.keys = append(e.keys, k)
	}
	e.values[k] = v
}

func (e *environ) list() []Bytes {
	var out []Bytes
	for _, k := range e.keys {
		out = append(out, Bytes(k+"="+e.values[k]))
	}
	return out
}

// insidePath says what is wrong with a path inside the sandbox.
func insidePath(s string) error {
	switch {
	case !strings.HasPrefix(s, "/"):
		return errors.New("not an absolute path")
	case strings.IndexByte(s, 0) >= 0:
		return errors.New("holds a NUL byte")
	case len(s) >= unix.PathMax:
		return errors.New("longer than 4095 bytes")
	case path.Clean(s) != s && path.Clean(s)+"/" != s:
		return errors.New(`holds "..", "." or "//"`)
	}
	return nil
}

func (p *Plan) rootfs(spec Spec, _ *Host) error {
	if len(spec.Base.Lowers) == 0 {
		return planErr("use base", spec.Base.Name, errors.New("it has no layers"), "sbxrun base list shows what there is")
	}
	seen := map[string]bool{}
	target := func(s string) error {
		if err := insidePath(s); err != nil {
			return planErr("mount on", s, err, "give an absolute path inside the sandbox")
		}
		c := path.Clean(s)
		for _, no := range []string{"/proc", "/dev", "/sys"} {
			if c == no || strings.HasPrefix(c, no+"/") {
				return planErr("mount on", s, errors.New("reserved for the sandbox itself"), "")
			}
		}
		if c == "/" {
			return planErr("mount on", s, errors.New("the root is the base's"), "use sbxrun base add and --base")
		}
		if seen[c] {
			return planErr("mount on", s, errors.New("named twice"), "")
		}
		seen[c] = true
		return nil
	}
	for _, v := range spec.Volumes {
		if err := target(v.Target); err != nil {
			return err
		}
		if !strings.HasPrefix(v.Source, "/") || strings.IndexByte(v.Source, 0) >= 0 {
			return planErr("mount", v.Source, errors.New("not an absolute path"), "")
		}
		switch v.Mode {
		case "", "rw", "ro", "O":
		default:
			return planErr("mount", v.Source, fmt.Errorf("unknown option %q", v.Mode), "options: ro, rw, O (copy-on-write)")
		}
	}

	if l := spec.Layer; l != nil && l.At != "" {
		if err := target(l.At); err != nil {
			return err
		}
	}

	const safe = unix.MS_NOSUID | unix.MS_NODEV
	shm := spec.ShmSizeBytes
	if shm == 0 {
		shm = defaultShmBytes
	}
	if shm < 0 {
		return planErr("set shm size", fmt.Sprint(shm), errors.New("must be positive"), "")
	}
	p.Mounts = []engine.Mount{
		{Type: "proc", Source: "proc", Target: "/proc", Flags: safe | unix.MS_NOEXEC},
		{Type: "tmpfs", Source: "tmpfs", Target: "/dev", Flags: unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_STRICTATIME, Data: "mode=755,size=64k,nr_inodes=64"},
		{Type: "devpts", Source: "devpts", Target: "/dev/pts", Flags: unix.MS_NOSUID | unix.MS_NOEXEC, Data: "newinstance,ptmxmode=0666,mode=0620,gid=5,max=64"},
		{Type: "tmpfs", Source: "shm", Target: "/dev/shm", Flags: safe | unix.MS_NOEXEC, Data: fmt.Sprintf("mode=1777,size=%d", shm)},
	}
	tmpfs := append([]Tmpfs{}, spec.Tmpfs...)
	if spec.ReadOnly { // podman's rule: the usual scratch places stay writable
		for _, t := range []Tmpfs{{Target: "/tmp", Exec: true}, {Target: "/run", Mode: 0o755}, {Target: "/var/tmp", Exec: true}} {
			if !hasTarget(tmpfs, t.Target) && !seen[t.Target] {
				tmpfs = append(tmpfs, t)
			}
		}
	}
	for _, t := range tmpfs {
		if err := target(t.Target); err != nil {
			return err
		}
		if t.SizeBytes == 0 {
			t.SizeBytes = defaultTmpfsBytes
		}
		if t.SizeBytes < 0 {
			return planErr("mount tmpfs on", t.Target, errors.New("size must be positive"), "")
		}
		if t.Mode == 0 {
			t.Mode = 0o1777
		}
		flags := uintptr(safe)
		if !t.Exec {
			flags |= unix.MS_NOEXEC
		}
		p.Mounts = append(p.Mounts, engine.Mount{
			Type: "tmpfs", Source: "tmpfs", Target: t.Target, Flags: flags,
			Data: fmt.Sprintf("mode=%o,size=%d,nr_inodes=%d", t.Mode, t.SizeBytes, inodesFor(t.SizeBytes, 4096)),
		})
	}
	return nil
}

func hasTarget(list []Tmpfs, target string) bool {
	for _, t := range list {
		if t.Target == target {
			return true
		}
	}
	return false
}

func inodesFor(size, each int64) int64 { return max(size/each, 1024) }

func (p *Plan) limits(spec Spec, host *Host) error {
	l := spec.Limits
	def := func(v *int64, d int64) {
		switch {
		case *v == 0:
			*v = d
		case *v < 0:
			*v = -1
		}
	}
	def(&l.MemoryBytes, defaultMemoryBytes)
	def(&l.Pids, defaultPids)
	if l.SwapBytes < 0 {
		l.SwapBytes = -1
	}
	if l.MemoryBytes > 0 && l.MemoryBytes < minMemoryBytes {
		return planErr("limit memory to", fmt.Sprint(l.MemoryBytes), errors.New("too little to start a process in"), "the minimum is 6m")
	}
	switch {
	case l.CPUs == 0:
		l.CPUs = defaultCPUs
	case l.CPUs < 0:
		l.CPUs = -1
	case l.CPUs < 0.01 || l.CPUs > float64(host.CPUs):
		return planErr("limit cpus to", fmt.Sprint(l.CPUs), errors.New("out of range"), fmt.Sprintf("this host offers 0.01 to %d", host.CPUs))
	}
	if err := checkShares(&l.Limits); err != nil {
		return err
	}
	if host.cgroupE != nil {
		return planErr("limit resources", "", host.cgroupE, "sbxrun doctor says what is missing")
	}
	if err := host.Cgroup.Check(l.Limits); err != nil {
		return planErr("limit resources", "", err, HintOf(err))
	}

	// A tmpfs is charged to the sandbox's memory: an upper as large as the
	// memory would meet the OOM killer before it is full. By default it is
	// half; what is asked for beyond that lives on disk.
	if l.DiskBytes < 0 || l.Inodes < 0 {
		return planErr("limit disk to", fmt.Sprint(min(l.DiskBytes, l.Inodes)), errors.New("the root is always bounded"), "give a size: --disk 20g")
	}
	half := l.MemoryBytes / 2
	p.Upper.Kind = "tmpfs"
	switch {
	case l.DiskBytes == 0 && l.MemoryBytes > 0:
		l.DiskBytes = min(defaultDiskBytes, half)
	case l.DiskBytes == 0:
		l.DiskBytes = defaultDiskBytes
	case l.DiskBytes < 64<<10:
		return planErr("limit disk to", fmt.Sprint(l.DiskBytes), errors.New("too little"), "the minimum is 64k")
	case l.MemoryBytes > 0 && l.DiskBytes > half:
		p.Upper.Kind = "disk"
		if l.DiskBytes < 16<<20 {
			return planErr("limit disk to", fmt.Sprint(l.DiskBytes), errors.New("too little for a disk of its own"), "raise --memory or --disk (16m)")
		}
	}
	if l.Inodes == 0 {
		each := int64(4096)
		if p.Upper.Kind == "disk" {
			each = 16384
		}
		l.Inodes = inodesFor(l.DiskBytes, each)
	}
	if l.Inodes < 64 {
		return planErr("limit inodes to", fmt.Sprint(l.Inodes), errors.New("too few to start"), "the minimum is 64")
	}
	p.Upper.SizeBytes, p.Upper.Inodes = l.DiskBytes, l.Inodes
	if p.Upper.Kind == "disk" {
		p.Upper.ScratchDir = path.Join(p.Dirs.Root, "scratch")
	}
	for name, d := range map[string]time.Duration{"--timeout": l.WallTime, "--cpu-time": l.CPUTime, "--extra-time": l.ExtraTime} {
		if d < 0 {
			return planErr("set", name, errors.New("must not be negative"), "")
		}
	}
	if l.OutputBytes < 0 || l.FileBytes < 0 {
		return planErr("limit output", "", errors.New("must not be negative"), "")
	}

	rl := map[string]Rlimit{
		"nofile":  {"nofile", 1024, 1024},
		"core":    {"core", 0, 0},
		"memlock": {"memlock", 64 << 10, 64 << 10},
	}
	if l.FileBytes > 0 {
		rl["fsize"] = Rlimit{"fsize", uint64(l.FileBytes), uint64(l.FileBytes)}
	}
	for _, u := range l.Ulimits {
		if _, ok := rlimitNumbers[u.Name]; !ok {
			return planErr("set ulimit", u.Name, errors.New("unknown"), "names are those of setrlimit(2): nofile, nproc, core, stack, …")
		}
		if u.Soft > u.Hard {
			return planErr("set ulimit", u.Name, errors.New("soft limit above the hard one"), "")
		}
		rl[u.Name] = u
	}
	for name, u := range rl {
		if own, ok := host.hardLimits[name]; ok && u.Hard > own {
			if !host.SysResource {
				explicit := false
				for _, x := range l.Ulimits {
					explicit = explicit || x.Name == name
				}
				if explicit {
					return planErr("set ulimit", fmt.Sprintf("%s=%d", name, u.Hard), fmt.Errorf("above this process's hard limit %d: %w", own, unix.EPERM),
						"sbxrun has no CAP_SYS_RESOURCE here: lower it, or raise the limit of the calling shell or unit")
				}
				u.Hard = own
				u.Soft = min(u.Soft, own)
			}
		}
		p.Rlimits = append(p.Rlimits, u)
	}
	sort.Slice(p.Rlimits, func(i, j int) bool { return p.Rlimits[i].Name < p.Rlimits[j].Name })
	l.Ulimits = p.Rlimits
	p.Limits = l
	return nil
}

// checkShares checks what no default exists for, and finds the disks of rates.
func checkShares(l *cgroup.Limits) error {
	bad := func(what string, n int64, why, hint string) error {
		return planErr("limit "+what+" to", fmt.Sprint(n), errors.New(why), hint)
	}
	limited := l.MemoryBytes > 0
	switch {
	case l.MemoryLowBytes < 0 || limited && l.MemoryLowBytes > l.MemoryBytes:
		return bad("memory reservation", l.MemoryLowBytes, "above the memory limit", fmt.Sprintf("--memory is %s", num(l.MemoryBytes)))
	case l.MemoryHighBytes < 0 || l.MemoryHighBytes > 0 && l.MemoryHighBytes < minMemoryBytes:
		return bad("memory high", l.MemoryHighBytes, "too little to start a process in", "the minimum is 6m")
	case limited && l.MemoryHighBytes > l.MemoryBytes:
		return bad("memory high", l.MemoryHighBytes, "above the memory limit: it would do nothing", fmt.Sprintf("--memory is %s", num(l.MemoryBytes)))
	case l.CPUShares != 0 && (l.CPUShares < 2 || l.CPUShares > 262144):
		return bad("cpu shares", l.CPUShares, "out of range", "2 to 262144; 1024 is what others have")
	case l.CPUWeight != 0 && (l.CPUWeight < 1 || l.CPUWeight > 10000):
		return bad("cpu weight", l.CPUWeight, "out of range", "1 to 10000; 100 is what others have")
	case l.CPUShares != 0 && l.CPUWeight != 0:
		return bad("cpu weight", l.CPUWeight, "--cpu-shares says the same", "give one of them")
	case l.BlkioWeight != 0 && (l.BlkioWeight < 10 || l.BlkioWeight > 1000):
		return bad("blkio weight", l.BlkioWeight, "out of range", "10 to 1000")
	}
	var err error
	if l.IO, err = cgroup.Disks(l.IO); err != nil {
		return planErr("limit resources", "", err, HintOf(err))
	}
	return nil
}

func (p *Plan) protect(_ Spec, host *Host) error {
	if host.EUID != 0 {
		return planErr("run", "", errors.New("not root"), "run sbxrun as root: sudo sbxrun …")
	}
	if !seccompAvailable() {
		return planErr("filter system calls", "", errors.New("the kernel has no seccomp filters"), "a kernel with CONFIG_SECCOMP_FILTER is needed")
	}
	p.Seccomp = seccomp.DefaultDigest()
	if len(seccomp.DefaultFilter()) == 0 || p.Seccomp == "" {
		return planErr("filter system calls", "", errors.New("sbxrun was built without its filter"), "go generate ./seccomp; make build")
	}
	if host.LandlockABI >= 6 {
		p.LandlockScoped = 3 // abstract UNIX sockets, signals
	} else {
		p.Degraded = append(p.Degraded, "landlock") // the second layer; said, not refused
	}
	return nil
}

// cgroupLimits is what the kernel's controllers are told.
func (p *Plan) cgroupLimits() cgroup.Limits { return p.Limits.Limits }

// candidates are the paths that execvp would try.
func (p *Plan) candidates() []string {
	argv0 := string(p.Argv[0])
	if strings.Contains(argv0, "/") {
		return []string{argv0}
	}
	search := ""
	for _, kv := range p.Env {
		if v, ok := strings.CutPrefix(string(kv), "PATH="); ok {
			search = v
		}
	}
	var out []string
	for _, dir := range strings.Split(search, ":") {
		if dir == "" {
			dir = "."
		}
		out = append(out, dir+"/"+argv0)
	}
	return out
}

// Text is the plan for people.
func (p *Plan) Text() string {
	var b strings.Builder
	row := func(k, format string, a ...any) { fmt.Fprintf(&b, "%-13s %s\n", k, fmt.Sprintf(format, a...)) }
	var argv []string
	for _, a := range p.Argv {
		argv = append(argv, quote(string(a)))
	}
	row("command", "%s", strings.Join(argv, " "))
	row("as", "uid %d gid %d, no capabilities, no_new_privs, host ids from a range of %d of its own", p.UID, p.GID, p.IDRange)
	row("in", "%s", p.Cwd)
	row("base", "%s %s", p.Base.Name, p.Base.Digest)
	if p.Layer != nil {
		row("environment", "%s", p.Layer.Digest)
		if p.Layer.At != "" {
			row("environment", "on %s", p.Layer.At)
		}
	}
	ro := ""
	if p.ReadOnly {
		ro = ", read-only root"
	}
	row("upper", "%s, %d bytes, %d inodes%s", p.Upper.Kind, p.Upper.SizeBytes, p.Upper.Inodes, ro)
	for _, v := range p.Volumes {
		m := v.Mode
		if m == "" {
			m = "rw"
		}
		row("volume", "%s on %s (%s)", v.Source, v.Target, m)
	}
	for _, v := range p.Base.Binds {
		row("bind", "%s on %s (ro)", v.Source, v.Target)
	}
	for _, m := range p.Mounts {
		row("mount", "%s on %s %s", m.Type, m.Target, m.Data)
	}
	for _, v := range p.Secrets {
		row("secret", "%s on %s/%s (%04o)", v.Source, v.Dir, v.Name, v.Mode)
	}
	if p.PassFDs > 0 {
		row("descriptors", "3 to %d, %d of them sockets of the service manager's", 2+p.PassFDs, p.ListenFDs)
	}
	row("namespaces", "%s", strings.Join(p.Namespaces, " "))
	row("network", "%s", networkText(p.Network, p.Net))
	row("seccomp", "%s", p.Seccomp)
	l := p.Limits
	row("limits", "memory %s, swap %s, cpus %g, pids %d, cpuset %q", num(l.MemoryBytes), num(l.SwapBytes), l.CPUs, l.Pids, l.CPUSet)
	if more := moreLimits(l.Limits); more != "" {
		row("limits", "%s", more)
	}
	row("limits", "wall %s, cpu time %s, output %s, file size %s", dur(l.WallTime), dur(l.CPUTime), zero(l.OutputBytes), zero(l.FileBytes))
	for _, r := range p.Rlimits {
		row("ulimit", "%s %d:%d", r.Name, r.Soft, r.Hard)
	}
	for _, kv := range p.Env {
		row("env", "%s", quote(string(kv)))
	}
	row("engine", "%s", p.Engine)
	for _, d := range p.Degraded {
		row("degraded", "%s", d)
	}
	return b.String()
}

// moreLimits tells the limits that have no default.
func moreLimits(l cgroup.Limits) string {
	var out []string
	for _, x := range []struct {
		name string
		n    int64
	}{
		{"memory reservation", l.MemoryLowBytes},
		{"memory high", l.MemoryHighBytes},
		{"cpu shares", l.CPUShares},
		{"cpu weight", l.CPUWeight},
		{"blkio weight", l.BlkioWeight},
	} {
		if x.n != 0 {
			out = append(out, fmt.Sprintf("%s %d", x.name, x.n))
		}
	}
	if l.CPUSetMems != "" {
		out = append(out, fmt.Sprintf("cpuset mems %q", l.CPUSetMems))
	}
	for _, r := range l.IO {
		out = append(out, fmt.Sprintf("disk %s (%s) read %s B/s, write %s B/s, read %s IO/s, write %s IO/s",
			r.Device, r.Disk, zero(r.ReadBPS), zero(r.WriteBPS), zero(r.ReadIOPS), zero(r.WriteIOPS)))
	}
	return strings.Join(out, ", ")
}

func num(n int64) string {
	if n < 0 {
		return "unlimited"
	}
	return fmt.Sprint(n)
}

func zero(n int64) string {
	if n == 0 {
		return "unlimited"
	}
	return fmt.Sprint(n)
}

func dur(d time.Duration) string {
	if d == 0 {
		return "unlimited"
	}
	return d.String()
}
