package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/runtime"
)

// unitOptions are the flags of unit.
type unitOptions struct {
	name, kind, calendar, restart string
	output, binary                string
	listen, load                  []string
	memoryMax                     int64
	template                      bool
}

func unitVerb() *verb {
	return &verb{
		name: "unit", args: "[flags] FILE.toml [flags of run] [-- COMMAND…] | [flags] -- [flags of run] -- COMMAND…", passes: true,
		short: "write a hardened systemd unit that runs a sandbox: a service, with a timer or a socket if asked",
		long: "The sandbox's flags and command are given as to run, or FILE.toml has them (command = [\"python3\", …]).\n" +
			"Relative paths are relative to FILE.toml's directory, without one to the current directory. What the unit\n" +
			"may write to follows from the flags: volumes, the report. docs/systemd.md explains the rest.",
		setup: func(c *command) {
			o := &unitOptions{}
			f := &c.flags
			f.StringVar(&o.name, "name", "", "`name` of the unit (default: that of FILE.toml)")
			f.StringVar(&o.kind, "type", "service", "service, timer or socket; the last two come with their service")
			f.StringVar(&o.calendar, "on-calendar", "", "when the timer starts it, as systemd.time(7) says `when`: daily, Mon *-*-* 04:00")
			f.ListVar(&o.listen, "listen", "`address` of the socket, as ListenStream= takes it: 8080, 127.0.0.1:8080, /run/x.sock")
			f.StringVar(&o.restart, "restart", "", "no, on-failure or always (default: on-failure for a service, no for timer and socket)")
			f.ListVar(&o.load, "load-credential", "`name:path` of a credential that the unit loads, for run --credential and --secret")
			f.VarP(sizeValue{&o.memoryMax, false}, "memory-max", "", "memory limit of the whole unit, the sandbox and its supervisor")
			f.StringVarP(&o.output, "output", "o", "-", "`directory` to write the units to; - is standard output")
			f.StringVar(&o.binary, "binary", "", "`path` of sbxrun in the unit (default: this program)")
			f.BoolVar(&o.template, "template", "write sbxrun@.service, which runs /etc/sbxrun/INSTANCE.toml")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			files, err := c.opts.(*unitOptions).units(c, args)
			if err != nil {
				return 2, err
			}
			return c.opts.(*unitOptions).write(c, files)
		},
	}
}

// unitFile is one file of what is written.
type unitFile struct{ name, text string }

// service is what the text of a service is made of. Paths are absolute.
type service struct {
	description string
	kind        string // Type=
	dir         string // WorkingDirectory=, "" is /
	exec        []string
	instance    bool // a template: %i may be in exec
	installed   bool // has [Install]
	restart     string
	stop, start time.Duration
	memoryMax   int64
	write       []string // ReadWritePaths=
	load        []string // LoadCredential=
	forwards    bool     // a full network: host settings are changed
	home, tmp   bool     // paths below /home, below /tmp are needed
}

// units gives the text of all, or refuses.
func (o *unitOptions) units(c *command, args []string) ([]unitFile, error) {
	binary, err := o.program()
	if err != nil {
		return nil, err
	}
	if o.template {
		if len(args) > 0 || o.kind != "service" || o.name != "" {
			return nil, usage("sbxrun unit --template takes --binary and --output alone", "unit: a template has neither name nor command")
		}
		return []unitFile{{"sbxrun@.service", templateService(binary).text()}}, nil
	}
	s := &service{exec: []string{binary, "run"}, load: o.load, memoryMax: o.memoryMax}
	for _, d := range []string{"root", "state"} { // ours are the service's too
		if c.flags.Changed(d) {
			v := map[string]string{"root": c.dirs.Root, "state": c.dirs.State}[d]
			if v, err = filepath.Abs(v); err != nil {
				return nil, err
			}
			s.exec = append(s.exec, "--"+d, v)
			s.write = append(s.write, v)
		}
	}
	if s.dir, err = os.Getwd(); err != nil {
		return nil, fmt.Errorf("find current directory: %w", err)
	}
	if len(args) > 0 && strings.HasSuffix(args[0], ".toml") {
		path, err := filepath.Abs(args[0])
		if err != nil {
			return nil, err
		}
		s.dir = filepath.Dir(path)
		args = append([]string{"-f", path}, args[1:]...)
		if o.name == "" {
			o.name = strings.TrimSuffix(filepath.Base(path), ".toml")
		}
	}
	o.name = strings.TrimSuffix(o.name, "."+o.kind)
	if !only(o.name, ":_.-") || len(o.name) > 200 {
		return nil, usage("--name NAME, of letters, digits and : _ . - (at most 200)", "--name %q: not a name of a unit", o.name)
	}
	if err := s.readRun(c, args); err != nil {
		return nil, err
	}
	if err := o.judge(s); err != nil {
		return nil, err
	}
	s.description = "sbxrun sandbox " + o.name
	files := []unitFile{{o.name + ".service", s.text()}}
	switch o.kind {
	case "timer":
		files = append(files, unitFile{o.name + ".timer", timerText(o.name, o.calendar)})
	case "socket":
		files = append(files, unitFile{o.name + ".socket", socketText(o.name, o.listen)})
	}
	return files, nil
}

const alnum = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// only says whether s has 1 to 255 characters, all of them letters, digits or
// of more. (No regexp: packages are initialised at every launch.)
func only(s, more string) bool {
	return s != "" && len(s) < 256 && strings.IndexFunc(s, func(r rune) bool { return !strings.ContainsRune(alnum+more, r) }) < 0
}

// program is the absolute path of sbxrun in the unit.
func (o *unitOptions) program() (string, error) {
	p := o.binary
	if p == "" {
		exe, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("find this program: %w", err)
		}
		p = exe
	}
	switch {
	case !filepath.IsAbs(p):
		return "", usage("systemd wants an absolute path", "--binary %q: relative", p)
	case strings.ContainsAny(p, "$\"'\\%\n") || !utf8.ValidString(p): // systemd neither expands nor unescapes all of them here
		return "", usage("install it elsewhere: make install", "--binary %q: systemd cannot execute a path with quotes, $, %% or \\", p)
	}
	return p, nil
}

// readRun takes run's flags and command, and what of them the unit must know.
func (s *service) readRun(c *command, args []string) error {
	rc := newCommand(c.ui, runVerb())
	if err := rc.flags.Parse(args); err != nil {
		return usage("sbxrun run --help tells the flags of run", "unit: %v", err)
	}
	o := rc.opts.(*runOptions)
	flags := args[:len(args)-len(rc.flags.rest)]
	if n := len(flags); n > 0 && flags[n-1] == "--" {
		flags = flags[:n-1]
	}
	// Flags and files are judged as in the directory that the unit runs in.
	at := func(p string) string {
		if filepath.IsAbs(p) {
			return filepath.Clean(p)
		}
		return filepath.Join(s.dir, p)
	}
	if o.file != "" {
		o.file = at(o.file)
		if err := o.load(rc); err != nil {
			return err
		}
	}
	switch {
	case len(rc.flags.rest) == 0 && len(o.command) == 0:
		return usage("sbxrun unit --name NAME -- -m 512m -- python3 /srv/app.py; or command = [\"python3\", …] in FILE.toml", "unit: no command")
	case o.tty || o.interactive:
		return usage("a service has no terminal: leave -i and -t out", "unit: -t and -i: not in a unit")
	case o.status >= 0:
		return usage("use --report FILE", "unit: --json-status-fd: a unit has no such descriptor")
	}
	for _, e := range o.env {
		if !strings.Contains(e, "=") {
			return usage("write "+e+"=VALUE, or keep it in a file for --env-file or --secret", "--env %s: a unit does not have the caller's own value", e)
		}
	}
	used := []string{s.dir}
	for _, p := range append([]string{o.file, o.requirements}, o.envFiles...) {
		if p != "" {
			used = append(used, at(p))
		}
	}
	if o.project != "" && o.project != "none" {
		used = append(used, at(o.project))
	}
	for _, x := range o.secrets {
		if k, v, ok := strings.Cut(strings.SplitN(x, ",", 2)[0], "="); ok && (k == "source" || k == "src") {
			used = append(used, at(v))
		}
	}
	if o.report != "" && o.report != "-" {
		// It is replaced by a rename, so its directory must be writable.
		s.write = append(s.write, filepath.Dir(at(o.report)))
	}
	s.forwards = o.network == netns.ModeFull
	if o.netLog != "" {
		s.write = append(s.write, filepath.Dir(at(o.netLog)))
	}
	for _, x := range o.exposeUnix {
		if path, _, ok := strings.Cut(x, ":"); ok {
			s.write = append(s.write, filepath.Dir(at(path)))
		}
	}
	for _, list := range []struct {
		flag  string
		specs []string
	}{{"volume", o.volumes}, {"mount", o.mounts}} {
		for _, v := range list.specs {
			vol, src, err := volumeOf(list.flag, v)
			if err != nil {
				return usage("sbxrun run --help tells the form", "--%s: %v", list.flag, err)
			}
			if vol == nil {
				continue
			}
			src = at(src)
			if vol.Mode == "rw" {
				s.write = append(s.write, src)
			} else {
				used = append(used, src)
			}
		}
	}
	for _, p := range append(used, s.write...) {
		s.home = s.home || below(p, "/home") || below(p, "/root") || below(p, "/run/user")
		s.tmp = s.tmp || below(p, "/tmp") || below(p, "/var/tmp")
	}
	slices.Sort(s.write)
	s.write = slices.Compact(s.write)

	s.kind = "notify"
	if o.sdnotify == "ignore" {
		s.kind = "exec"
	}
	if s.stop = 10 * time.Second; rc.flags.Changed("stop-timeout") {
		s.stop = o.stopTimeout
	}
	if o.requirements != "" {
		s.start = 15 * time.Minute
	}
	memory := o.memory
	if memory == 0 {
		memory = 1 << 30
	}
	if s.memoryMax > 0 && (memory < 0 || memory > s.memoryMax) {
		return usage("lower the sandbox's own with run's -m: it is what the report can name as the reason", "--memory-max: less than the sandbox's own --memory")
	}
	s.exec = append(s.exec, flags...)
	if len(rc.flags.rest) > 0 {
		s.exec = append(append(s.exec, "--"), rc.flags.rest...)
	}
	return nil
}

// volumeOf gives a volume, nil for a tmpfs, and its source as it was written:
// that in the volume is already relative to the current directory.
func volumeOf(flag, v string) (*runtime.Volume, string, error) {
	if flag == "volume" {
		vol, err := parseVolume(v)
		src, _, _ := strings.Cut(v, ":")
		return &vol, src, err
	}
	vol, _, err := parseMount(v)
	var src string
	for _, kv := range strings.Split(v, ",") {
		if k, val, _ := strings.Cut(kv, "="); k == "source" || k == "src" {
			src = val
		}
	}
	return vol, src, err
}

func below(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// judge refuses what does not go together, and fills in what follows.
func (o *unitOptions) judge(s *service) error {
	switch o.kind {
	case "service":
		s.installed = true
	case "timer", "socket":
	default:
		return usage("service, timer or socket", "--type %q: unknown", o.kind)
	}
	switch {
	case o.kind == "timer" && o.calendar == "":
		return usage("--on-calendar daily", "--type timer: no --on-calendar")
	case o.kind != "timer" && o.calendar != "":
		return usage("--type timer", "--on-calendar: not a timer")
	case o.kind == "socket" && len(o.listen) == 0:
		return usage("--listen 127.0.0.1:8080", "--type socket: no --listen")
	case o.kind != "socket" && len(o.listen) > 0:
		return usage("--type socket", "--listen: not a socket")
	case o.calendar != "" && (!only(o.calendar, " *,./:~+_-") || strings.HasPrefix(o.calendar, " ")):
		return usage("systemd-analyze calendar WHEN tells whether and how it is understood", "--on-calendar %q: not a calendar expression", o.calendar)
	}
	for _, l := range o.listen {
		if !listens(l) {
			return usage("8080, 127.0.0.1:8080, [::1]:8080, /run/x.sock", "--listen %q: not an address", l)
		}
	}
	for _, l := range o.load {
		name, path, ok := strings.Cut(l, ":")
		if !ok || !only(name, "_.-") || !filepath.IsAbs(path) || !only(path, "/._@+-") {
			return usage("--load-credential token:/etc/sbxrun/token", "--load-credential %q: not NAME:PATH", l)
		}
	}
	switch s.restart = o.restart; s.restart {
	case "no", "on-failure", "always":
	case "":
		s.restart = map[bool]string{true: "on-failure", false: "no"}[o.kind == "service"]
	default:
		return usage("no, on-failure or always", "--restart %q: unknown", o.restart)
	}
	for _, p := range append([]string{s.dir}, s.write...) {
		if !plainPath(p) {
			return usage("give a path of printable characters, without spaces at its ends", "%q: systemd cannot name this path", p)
		}
	}
	for _, a := range s.exec {
		if !utf8.ValidString(a) || strings.IndexByte(a, 0) >= 0 {
			return usage("put it into a script, and give the script's name", "argument %q: not UTF-8; systemd takes no other", a)
		}
	}
	return nil
}

// listens says whether l is a port, HOST:PORT, [HOST]:PORT, a path or an
// abstract name.
func listens(l string) bool {
	if strings.HasPrefix(l, "/") || strings.HasPrefix(l, "@") {
		return only(l[1:], "/._@:+-")
	}
	host, port, both := "", l, strings.Contains(l, ":")
	if both {
		i := strings.LastIndexByte(l, ':')
		host, port = l[:i], l[i+1:]
		if six, ok := strings.CutPrefix(host, "["); ok {
			six, ok = strings.CutSuffix(six, "]")
			if !ok || !only(six, ":.") {
				return false
			}
		} else if !only(host, ".") {
			return false
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0
}

// plainPath: settings of paths are not unescaped as ExecStart= is.
func plainPath(p string) bool {
	return utf8.ValidString(p) && strings.TrimSpace(p) == p && strings.IndexFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// unitWord writes one argument so that systemd reads exactly it: % begins a
// specifier and $ a variable everywhere, and quotes do not keep them from it;
// the rest is systemd.syntax(7)'s C-like quoting. vars says whether $ counts:
// it does in ExecStart= only.
func unitWord(s string, vars bool) string {
	if s != "" && strings.IndexFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && !strings.ContainsRune("/._-=:,+@", r)
	}) < 0 {
		return s
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '%':
			b.WriteString("%%")
		case r == '$' && vars:
			b.WriteString("$$")
		case r == '"' || r == '\\':
			b.WriteString(`\` + string(r))
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x80 && !unicode.IsPrint(r):
			fmt.Fprintf(&b, `\x%02x`, r)
		case !unicode.IsPrint(r) && r > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, r)
		case !unicode.IsPrint(r): // also spaces other than the plain one
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// seconds is a time span, rounded up.
func seconds(d time.Duration) string {
	return strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10) + "s"
}

func (s *service) text() string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	p("%s", unitMark)
	p("[Unit]")
	p("Description=%s", s.description)
	if s.start > 0 { // it may bake
		p("After=network-online.target")
		p("Wants=network-online.target")
	}
	if s.restart != "no" {
		p("# A sandbox that cannot start is not tried for ever.\nStartLimitIntervalSec=60\nStartLimitBurst=5")
	}
	p("\n[Service]")
	if s.kind == "notify" {
		p("# Ready is when the command runs, not when its root is being made.")
	}
	p("Type=%s", s.kind)
	words := make([]string, len(s.exec))
	for i, a := range s.exec {
		words[i] = unitWord(a, true)
		if s.instance {
			words[i] = strings.ReplaceAll(words[i], `"`, "")
			words[i] = strings.ReplaceAll(words[i], "%%i", "%i")
		}
	}
	p("ExecStart=%s", strings.Join(words, " "))
	if s.dir != "" {
		p("WorkingDirectory=%s", strings.ReplaceAll(s.dir, "%", "%%"))
	}
	for _, l := range s.load {
		p("LoadCredential=%s", l)
	}
	p("Restart=%s", s.restart)
	if s.restart != "no" {
		p("RestartSec=1s")
		p("# 126, 127: the command cannot be executed, is not there. The next try would end so too.\nRestartPreventExitStatus=126 127")
	}
	if s.start > 0 {
		p("# The first start bakes the environment.\nTimeoutStartSec=%s", seconds(s.start))
	}
	p("# The supervisor alone is told to stop: it passes TERM on. --stop-timeout and 5 s later all that is left is killed.\nKillMode=mixed\nTimeoutStopSec=%s", seconds(s.stop+5*time.Second))
	p("# 143: the command ended by the TERM of systemctl stop.\nSuccessExitStatus=143")
	if s.memoryMax > 0 {
		p("# Of the sandbox and its supervisor together; the sandbox's own --memory lies below.\nMemoryMax=%d", s.memoryMax)
	}
	common := serviceCommon
	if s.forwards {
		common = strings.Replace(common, "ProtectKernelTunables=yes\n", "# Not ProtectKernelTunables=: a full network has the host forward packets.\n", 1)
	}
	b.WriteString(common)
	if s.home {
		p("# Paths of the flags lie below /home, /root or /run/user: seen, and written only where ReadWritePaths says so.\nProtectHome=read-only")
	} else {
		p("ProtectHome=yes")
	}
	if s.tmp {
		p("# No PrivateTmp=: paths of the flags lie in /tmp.")
	} else {
		p("PrivateTmp=yes")
	}
	for _, w := range s.write {
		p("ReadWritePaths=%s", unitWord(w, false))
	}
	if s.installed {
		p("\n[Install]\nWantedBy=multi-user.target")
	}
	return b.String()
}

// unitMark begins what sbxrun wrote, and so may write anew.
const unitMark = "# Written by sbxrun unit. Change it with a drop-in: systemctl edit."

// serviceCommon is what a supervisor needs, and what it can do without. Every
// line was tried with both engines, a disk limit (loop device), volumes, a
// terminal and a bake; what is left out on purpose says what breaks.
const serviceCommon = `Slice=sbxrun.slice
# Sandboxes lie in this unit's own cgroup. The subgroup keeps the supervisor out of the inner node (systemd 254; before, it
# moves itself and systemd says that it does not know the key).
Delegate=memory pids cpu cpuset io
DelegateSubgroup=supervisor
# A sandbox that meets its memory limit is the supervisor's to judge, not a reason to stop the unit.
OOMPolicy=continue
StateDirectory=sbxrun
StateDirectoryMode=0700
RuntimeDirectory=sbxrun
RuntimeDirectoryMode=0700
# Other sandboxes' locks are in there.
RuntimeDirectoryPreserve=yes
UMask=0077

# The sandbox protects from the command; what follows bounds the supervisor. Filters are inherited by the command.
NoNewPrivileges=yes
# chown, dac_override, fowner: the upper and /dev belong to the sandbox's ids. setuid, setgid: those ids. net_admin: lo.
# sys_ptrace: to open a sandbox's namespaces. sys_resource: hard limits. sys_admin, sys_chroot: mounts, namespaces, bpf.
# kill: to stop what runs under a sandbox's ids. Not mknod: the kernel's devtmpfs makes loop devices' nodes.
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_KILL CAP_NET_ADMIN CAP_SETGID CAP_SETUID
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_RESOURCE
SystemCallArchitectures=native
# Not @debug: ids are mapped while a helper is held by ptrace. Not @mount, @privileged, @resources: that is the work.
SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
# netlink: lo is brought up. No packet sockets and whatever else the kernel has.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
LockPersonality=yes
RestrictRealtime=yes
KeyringMode=private
PrivateIPC=yes
# Not RestrictNamespaces=: a sandbox needs every kind, so nothing would be left to restrict.
# Not RestrictSUIDSGID=: it answers openat2 with ENOSYS, which all look-ups below a sandbox's root are made with.
# Not MemoryDenyWriteExecute=: the command would inherit it, and node, java and PyPy compile as they run.
# Not PrivateUsers=: mounts and id ranges are made in the host's user namespace. Not PrivateNetwork=: a bake needs the index.
# Not ProtectHostname=: sandboxes set their own host name, and its filter denies that.
ProtectSystem=strict
ProtectClock=yes
ProtectKernelModules=yes
# These cover parts of this procfs. A sandbox's own is mounted with the supervisor's rights, so that does not matter to it.
ProtectKernelLogs=yes
ProtectKernelTunables=yes
ProtectProc=invisible
# Not ProcSubset=pid: /proc/swaps and /proc/sys say whether a limit can be kept.
# Not ProtectControlGroups=: sandboxes get cgroups.
# Not PrivateDevices=: a --disk larger than half of the memory lies on a loop device.
DevicePolicy=closed
DeviceAllow=/dev/loop-control rw
DeviceAllow=block-loop rw
`

func timerText(name, calendar string) string {
	return unitMark + "\n[Unit]\nDescription=When to start " + name + ".service\n\n[Timer]\nOnCalendar=" + calendar +
		"\n# What was missed while the machine was off is made up for.\nPersistent=yes\n\n[Install]\nWantedBy=timers.target\n"
}

func socketText(name string, listen []string) string {
	var b strings.Builder
	b.WriteString(unitMark + "\n[Unit]\nDescription=Socket of " + name + ".service\n\n[Socket]\n")
	for _, l := range listen {
		b.WriteString("ListenStream=" + l + "\n")
	}
	b.WriteString("# For those that are paths: root alone may connect.\nSocketMode=0600\n\n[Install]\nWantedBy=sockets.target\n")
	return b.String()
}

// templateService is packaging/sbxrun@.service.
func templateService(binary string) *service {
	return &service{
		description: "sbxrun sandbox %i", kind: "notify", dir: "/etc/sbxrun",
		exec: []string{binary, "run", "-f", "/etc/sbxrun/%i.toml"}, instance: true, installed: true,
		restart: "on-failure", stop: 10 * time.Second, start: 15 * time.Minute,
	}
}

// write puts the units on standard output or, each by a rename, into a directory.
func (o *unitOptions) write(c *command, files []unitFile) (int, error) {
	if o.output == "-" {
		for i, f := range files {
			if len(files) > 1 {
				c.ui.outf("%s# %s\n", map[bool]string{true: "\n"}[i > 0], f.name)
			}
			c.ui.out(f.text)
		}
		return 0, nil
	}
	var paths []string
	for _, f := range files { // all are judged before the first is written
		path := filepath.Join(o.output, f.name)
		old, err := os.ReadFile(path)
		if err == nil && !strings.HasPrefix(string(old), unitMark) {
			return 1, &runtime.Error{Op: "write unit", Object: path, Err: os.ErrExist, Hint: "sbxrun did not write that file: remove it, or give another --name"}
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 1, fmt.Errorf("write unit: %w", err)
		}
		paths = append(paths, path)
	}
	for i, f := range files {
		if err := replaceFile(paths[i], f.text, 0o644); err != nil {
			return 1, fmt.Errorf("write unit: %w", err)
		}
		c.ui.outf("%s\n", paths[i])
	}
	last := files[len(files)-1].name
	if !o.template {
		c.ui.hint("systemctl daemon-reload && systemctl enable --now " + last)
	}
	return 0, nil
}

// replaceFile writes a file at once or not at all.
func replaceFile(path, text string, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".sbxrun-*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
