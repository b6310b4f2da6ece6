// Package engines compares the engines with each other: all that a program sees
// inside a sandbox (c/seen.c), all that the host sees of it, and the reports of
// every way to end must be the same word by word. Where they may differ is in
// one table, with the reason; it knows nothing else of engines but their names.
package engines

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
	"github.com/sbxrun/sbxrun/test/victim"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// facts are what one engine made of a question, by name. A fact that one engine
// has and the other lacks differs too.
type facts map[string]string

const (
	absent        = "(absent)"
	absentPattern = `\(absent\)`
)

// A difference that is meant. Patterns match the whole name or value; an empty
// one matches all.
type difference struct {
	in                         string // the test's name
	name, direct, libcontainer string
	why                        string
	machine                    bool // whether it shows depends on the machine
	seen                       bool
}

// meant are the differences inside. Each must be seen, else it is a hole in the
// comparison that nothing needs any more.
var meant = []difference{
	{name: "pid", direct: `2`, libcontainer: `\d+`, why: "the threads of libcontainer's own stage took numbers of the pid namespace"},
	{name: `proc\.(1|pid\.1)\.cmdline`, direct: `sbxrun-init [nhf] base\+0`, libcontainer: `/proc/self/fd/6`, why: "direct names pid 1, its kind of network and its first id, libcontainer executes it by descriptor"},
	{name: `status\.1\.FDSize`, direct: `256|512|1024`, libcontainer: `64`, machine: true, why: "pid 1 had the descriptors of the root's mounts; the number is the table's room, not what is open"},
	{name: `(self|proc\.1)\.setgroups`, direct: `deny`, libcontainer: `allow`, why: "no group can ever be dropped: direct says so to the kernel too"},
	{name: `fd\.0\.flags`, direct: `100000 cloexec 0 pipe -1`, libcontainer: `100002 cloexec 0 pipe -1`, why: "libcontainer opens /dev/null again inside, direct passes on what it was given"},

	{name: `mount\./(dev|etc)/(null|zero|full|random|urandom|tty)(\..*)?`, direct: absentPattern, why: "direct makes nodes in its own tmpfs, libcontainer binds the host's"},
	{name: `mount\./proc/(interrupts|kallsyms|key-users|keys|kmsg|timer_list)`, direct: `tmpfs`, libcontainer: `devtmpfs`, why: "direct masks with the null of its own /dev, libcontainer with the host's"},
	{name: `mount\./proc/(interrupts|kallsyms|key-users|keys|kmsg|timer_list)\.source`, direct: `tmpfs`, libcontainer: `devtmpfs`, why: "the same"},
	{name: `mount\./proc/(interrupts|kallsyms|key-users|keys|kmsg|timer_list)\.flags`, direct: `rw,nosuid,noexec`, libcontainer: `rw,relatime`, why: "the same"},
	{name: `mount\./proc/(interrupts|kallsyms|key-users|keys|kmsg|timer_list)\.super`, direct: `rw,size=64k,nr_inodes=64,mode=755,uid=base\+0,gid=base\+0`, why: "the same"},
	{name: `mount\./proc/acpi\.(flags|source|super)`, direct: `ro,nosuid,nodev,noexec,relatime|none|rw,size=4k,mode=555,.*`, libcontainer: `ro,relatime|tmpfs|ro,size=4k,nr_inodes=1,.*`, machine: true, why: "the mask of a folder: direct's is stricter"},
	{name: `proc\./proc/acpi|proc\.entry\.acpi`, direct: `dir 0555 0:0`, libcontainer: `dir 1777 0:0`, machine: true, why: "the same"},

	{name: `proc\.1\.[a-z_]+`, direct: `(file|dir) \d+ 65534:65534`, libcontainer: `.* 0:0`, why: "direct's pid 1 was executed before it was in the user namespace: its files are the host root's"},
	{name: `proc\.1\.(fd|io|map_files|mountstats|ns|stack|syscall)\.read|proc\.1\.personality`, direct: `open EACCES|<open EACCES>`, why: "the same: not even uid 0 of the sandbox may look at pid 1"},
	{name: `sysctl\./proc/sys/kernel/pid_max`, direct: `file 0644 65534:65534 r ok w EACCES`, libcontainer: `file 0644 0:0 r ok w (EACCES|EROFS)`, machine: true, why: "the pid namespace is the host's user namespace's: not even uid 0 of the sandbox owns its sysctl"},

	{name: `report\.message|stderr`, direct: `(sbxrun: )?launch with engine "direct": .*`, libcontainer: `(sbxrun: )?launch with engine "libcontainer": .*`, why: "each engine says in its own words what it could not do"},
	{name: `report\.hint`, libcontainer: `sbxrun doctor says what this host lacks`, why: "the same: libcontainer's failures come as text alone"},
	{in: `TestStrangeRoots/dev_is_a_link`, name: `report\.(code|status|reason|stage|message)`, direct: `125|setup-failed|internal|launch|.*symbolic links`, why: "direct takes no link of a base for /dev, libcontainer follows it"},
	{in: `TestTheCallersStateDoesTheSame/one_CPU`, name: `sched\.cpus|status\.(1|self)\.Cpus_allowed(_list)?`, direct: `ok 1|1|0`, machine: true, why: "libcontainer, as runc, takes the caller's CPU affinity off; direct keeps it"},
	{in: `TestTheHostSeesTheSame/.*`, name: `pid 1 holds`, direct: `anon_inode pipe pipe`, libcontainer: `/memfd:sbxrun-init \(deleted\) anon_inode pipe pipe`, why: "what libcontainer executed pid 1 from stays open in it"},
	{in: `TestTheHostSeesTheSame/.*`, name: `pid 1 namespace time`, direct: `the host's`, libcontainer: `another`, why: "unshare(2) gives a time namespace to children only: the command is in it, pid 1 not"},
	{in: `TestTheHostSeesTheSame/.*`, name: `pid 1 environ`, direct: ``, libcontainer: `PATH=/\x00HOME=/.*\x00`, why: "pid 1 needs none; libcontainer cannot do without"},
	{in: `TestTheHostSeesTheSame/.*`, name: `(pid 1|command) group (name=systemd|freezer|cpuset|misc|hugetlb|rdma|perf_event|net_cls.*|)`, direct: `the caller's`, libcontainer: `.*/ID`, machine: true, why: "v1: direct enters the hierarchies that sbxrun limits or measures, libcontainer makes a group in each"},
	{in: `TestTheHostSeesTheSame/.*`, name: `(pid 1|command) (name=systemd|freezer|cpuset|misc|hugetlb|rdma|perf_event|net_cls.*|) [a-z_.]+`, direct: absentPattern, machine: true, why: "the same"},
	{in: `TestReportsAreTheSame/one_process`, name: `report\..*|std.*`, direct: ``, why: "libcontainer's own stages need more than two processes"},
	{in: `TestReportsAreTheSame/no_process`, name: `report\.(message|stage|hint)|stderr`, direct: `(sbxrun: )?fork: resource temporarily unavailable(\n.*)?\n?|exec|pid 1 counts too.*`, why: "the same: libcontainer does not come as far as pid 1"},
	{in: `TestReportsAreTheSame/directory_(in_proc_of_pid_1|of_another_process)`, name: `report\..*|std.*`, direct: `.*`, why: "direct follows no magic link, libcontainer ends at the root by it"},
	{in: `TestReportsAreTheSame/.*`, name: `report\.context_switches_(in)?voluntary`, direct: `measured|<nil>`, libcontainer: `measured|<nil>`, machine: true, why: "of a sandbox that was killed: whether pid 1 could still report"},
}

// compare fails the test for each difference that is not meant.
func compare(t *testing.T, direct, libcontainer facts) {
	t.Helper()
	compared++
	if direct["report.code"] != libcontainer["report.code"] {
		// One engine refused: what the other's program saw is not the question.
		direct, libcontainer = verdict(direct), verdict(libcontainer)
	}
	names := maps.Clone(direct)
	maps.Copy(names, libcontainer)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		d, l := value(direct, name), value(libcontainer, name)
		if d != l && !isMeant(t.Name(), name, d, l) {
			t.Errorf("%s\n\tdirect       %q\n\tlibcontainer %q", name, d, l)
		}
	}
}

// compared counts, so that the table is looked through only after all of them.
var compared int

func isMeant(test, name, direct, libcontainer string) bool {
	found := false
	for i := range meant {
		m := &meant[i]
		if whole(m.in, test) && whole(m.name, name) && whole(m.direct, direct) && whole(m.libcontainer, libcontainer) {
			m.seen, found = true, true
		}
	}
	return found
}

// verdict is what a report says of the end, without the numbers.
func verdict(f facts) facts {
	v := facts{}
	for _, name := range strings.Fields("report.code report.status report.reason report.stage report.message") {
		if x, ok := f[name]; ok {
			v[name] = x
		}
	}
	return v
}

func value(f facts, name string) string {
	if v, ok := f[name]; ok {
		return v
	}
	return absent
}

// whole tells whether the pattern matches all of s.
func whole(pattern, s string) bool {
	if pattern == "" {
		return true
	}
	re := patterns[pattern]
	if re == nil {
		re = regexp.MustCompile("(?s)^(?:" + pattern + ")$")
		patterns[pattern] = re
	}
	return re.MatchString(s)
}

var patterns = map[string]*regexp.Regexp{}

// both runs f on each engine, then compares what it gave.
func both(t *testing.T, f func(t *testing.T, s *harness.Sbx) facts) {
	t.Helper()
	got := map[string]facts{}
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) { got[s.Engine] = f(t, s) })
	if got["direct"] == nil || got["libcontainer"] == nil {
		return // narrowed to one engine, or it failed and said so
	}
	compare(t, got["direct"], got["libcontainer"])
}

// A case is one way to start the probe.
type asked struct {
	name   string
	flags  []string // "DIR", "FILE", "NETNS" are the case's own
	look   []string // paths that the probe looks at besides its own list
	input  string
	screen bool // on a terminal of the caller's
}

var cases = []asked{
	{name: "default"},
	{name: "root", flags: []string{"-u", "root"}},
	{name: "other ids", flags: []string{"-u", "12345:54321"}},
	{name: "last ids", flags: []string{"-u", "65535:65535"}},
	{name: "read-only", flags: []string{"--read-only"}},
	{name: "read-only root", flags: []string{"--read-only", "-u", "0"}},
	{name: "terminal without input", flags: []string{"-t"}},
	{name: "terminal", flags: []string{"-it"}, screen: true},
	{name: "terminal of root", flags: []string{"-it", "-u", "0"}, screen: true},
	{name: "input", flags: []string{"-i"}, input: "words\n"},
	{name: "output limit", flags: []string{"--output-limit", "10m"}},
	{name: "network of the host", flags: []string{"--network", "host"}},
	{name: "network by path", flags: []string{"--network", "ns:NETNS"}},
	{name: "tmpfs", flags: []string{"--tmpfs", "/scratch", "--tmpfs", "/deep/er:size=8m,mode=0700,exec", "--tmpfs", "/usr/local"}, look: []string{"/scratch", "/deep", "/deep/er", "/usr/local"}},
	{name: "volume", flags: []string{"-v", "DIR:/data"}, look: []string{"/data", "/data/sub", "/data/file"}},
	{name: "volume read-only", flags: []string{"-v", "DIR:/data:ro"}, look: []string{"/data", "/data/sub", "/data/file"}},
	{name: "volume copy-on-write", flags: []string{"-v", "DIR:/data:O"}, look: []string{"/data", "/data/sub", "/data/file"}},
	{name: "volume of root", flags: []string{"-v", "DIR:/data", "-u", "0"}, look: []string{"/data", "/data/sub", "/data/file"}},
	{name: "volume of a file", flags: []string{"-v", "FILE:/etc/hosts:ro", "-v", "FILE:/a/b/c"}, look: []string{"/etc/hosts", "/a", "/a/b", "/a/b/c"}},
	{name: "volumes in each other", flags: []string{"-v", "DIR:/data", "-v", "DIR:/data/sub:ro", "--tmpfs", "/scratch", "-v", "DIR:/scratch/in:O"}, look: []string{"/data/sub", "/scratch/in", "/scratch/in/file"}},
	{name: "volume over the system", flags: []string{"-v", "DIR:/usr/local:ro", "-v", "DIR:/tmp"}, look: []string{"/usr/local/file", "/tmp/file"}},
	{name: "host name", flags: []string{"--hostname", "kasten"}},
	{name: "missing directory", flags: []string{"-w", "/not/there/yet"}, look: []string{"/not", "/not/there"}},
	{name: "project directory", flags: []string{"-w", "/work/sub"}, look: []string{"/work/sub"}},
	{name: "shared memory", flags: []string{"--shm-size", "1m"}},
	{name: "ulimits", flags: []string{"--ulimit", "nofile=77:99", "--ulimit", "core=0", "--ulimit", "stack=1048576:2097152", "--ulimit", "nproc=500", "--fsize", "20m"}},
	{name: "limits", flags: []string{"-m", "256m", "--memory-swap", "-1", "--cpus", "0.5", "--cpuset-cpus", "0", "--pids-limit", "64", "--disk", "20m", "--inodes", "5000"}},
	{name: "no limits", flags: []string{"-m", "-1", "--pids-limit", "-1"}},
	{name: "root on disk", flags: []string{"-m", "128m", "--disk", "600m"}},
	{name: "environment", flags: []string{"-e", "RAW=\xff\xfe", "-e", "EMPTY=", "-e", "PATH=/nowhere"}},
}

// An abstract socket on the host, that the probe tries to reach.
func bait(t *testing.T) string {
	t.Helper()
	name := "sbxrun-seen-" + strconv.Itoa(os.Getpid())
	u, err := net.Listen("unix", "@"+name)
	require.NoError(t, err)
	t.Cleanup(func() { _ = u.Close() })
	return name
}

// prepare makes what the flags name, once for both engines.
func prepare(t *testing.T, c asked) asked {
	t.Helper()
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	require.NoError(t, os.MkdirAll(filepath.Join(data, "sub"), 0o755))
	file := filepath.Join(data, "file")
	require.NoError(t, os.WriteFile(file, []byte("x\n"), 0o640))
	for _, p := range []string{data, filepath.Join(data, "sub"), file} {
		require.NoError(t, os.Chown(p, 4242, 4343))
	}
	names := []string{"DIR", data, "FILE", file}
	if slices.Contains(c.flags, "ns:NETNS") {
		need.Root(t)
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		require.NoError(t, cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		names = append(names, "NETNS", fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	}
	flags := slices.Clone(c.flags)
	for i := range flags {
		flags[i] = strings.NewReplacer(names...).Replace(flags[i])
	}
	c.flags = flags
	return c
}

// callers are states that a caller of sbxrun can be in: shell code that ends in
// front of the command.
var callers = []struct{ name, state string }{
	{"closed umask", "umask 077; exec"},
	{"open umask", "umask 0; exec"},
	{"ignored signals", "trap '' HUP INT QUIT PIPE USR1 USR2 CHLD TERM; exec"},
	{"no standard input", "exec <&-; exec"},
	{"no standard error", "exec 2>&-; exec"},
	{"standard input of a folder", "exec </etc; exec"},
	{"open descriptors", "exec 7</etc/shadow 8</ 9>>/dev/null; exec"},
	{"ulimits", "exec prlimit --core=unlimited --stack=1048576 --nofile=500 --nproc=5000 --fsize=100000000"},
	{"nice", "exec nice -n 5"},
	{"idle", "exec ionice -c 3"},
	{"batch", "exec chrt -b 0"},
	{"one CPU", "exec taskset 1"},
	{"own session", "exec setsid -w"},
	{"directory that is gone", "mkdir gone && cd gone && rmdir ../gone; exec"},
	{"closed directory", "mkdir -m 0 closed && cd closed; exec"},
	{"first to be killed", "echo 500 >/proc/self/oom_score_adj; exec"},
	{"dumping all", "echo 0x7f >/proc/self/coredump_filter; exec"},
	{"no randomisation", "exec setarch -R"},
	{"no environment", "exec env -i SBXRUN_ROOT=$SBXRUN_ROOT SBXRUN_STATE=$SBXRUN_STATE"},
}

// What a sandbox takes from its caller, it takes with both engines.
func TestTheCallersStateDoesTheSame(t *testing.T) {
	for _, c := range callers {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, s *harness.Sbx) facts {
				file := s.ReportFile()
				cmd := s.Cmd("run", "--report", file, "-v", build(t)+":/seen:ro", "-w", "/a/b/c", "--tmpfs", "/q/r", "--", "/seen", "/a", "/a/b", "/q", "/q/r")
				cmd.Args = append([]string{"sh", "-c", c.state + ` "$0" "$@"`}, cmd.Args...)
				cmd.Path, cmd.Dir = "/bin/sh", t.TempDir()
				var stdout, stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = &stdout, &stderr
				require.NoError(t, cmd.Start())
				o := s.Wait(cmd)
				o.Report, o.Stdout, o.Stderr = s.ReadReport(file), stdout.Bytes(), stderr.Bytes()
				require.NotNil(t, o.Report, "%v", o)
				f := report(o)
				if o.Code == 0 {
					maps.Copy(f, read(t, o))
				}
				return f
			})
		})
	}
}

func build(t *testing.T) string {
	t.Helper()
	return harness.BuildC(t, filepath.Join(need.Repo(), "test/conformance/engines/c/seen.c"))
}

// look runs the probe and gives what it saw.
func look(t *testing.T, s *harness.Sbx, socket string, c asked) facts {
	t.Helper()
	args := append([]string{"-v", build(t) + ":/seen:ro", "-e", "SEEN_ABSTRACT=" + socket}, c.flags...)
	args = append(append(args, "--", "/seen"), c.look...)
	var o *harness.Outcome
	if c.screen {
		report := s.ReportFile()
		sc := harness.NewScreen(t)
		cmd := s.Cmd(append([]string{"run", "--report", report}, args...)...)
		sc.Start(cmd)
		o = s.Wait(cmd)
		o.Report, o.Stdout = s.ReadReport(report), []byte(sc.Text())
		require.NotNil(t, o.Report, "%v", o)
	} else {
		var in io.Reader // a file of the kernel's when there is none
		if c.input != "" {
			in = strings.NewReader(c.input)
		}
		o = s.RunInput(in, args...)
	}
	require.Equal(t, 0, o.Code, "%v", o)
	return read(t, o)
}

// read takes the probe's lines apart and names what no two runs have in common.
func read(t *testing.T, o *harness.Outcome) facts {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(o.Stdout), "\r", "")), "\n")
	require.Equal(t, "done", lines[len(lines)-1], "the probe did not end: %v", o)
	f := facts{}
	for _, l := range lines[:len(lines)-1] {
		name, v, ok := strings.Cut(l, "=")
		require.True(t, ok, "%q", l)
		require.NotContains(t, f, name)
		f[name] = v
	}
	m := strings.Fields(f["self.uid_map"])
	require.Len(t, m, 3, "uid_map %q", f["self.uid_map"])
	base, err := strconv.Atoi(m[1])
	require.NoError(t, err)
	for name, v := range f {
		if ns, ok := strings.CutPrefix(name, "ns."); ok {
			host, err := os.Readlink("/proc/self/ns/" + ns)
			require.NoError(t, err)
			v = map[bool]string{true: "the host's", false: "another"}[v == host]
		}
		f[name] = plain(v, o.Report.ID, base)
	}
	return f
}

var number = regexp.MustCompile(`\d+`)

// plain names the sandbox's id, and its host ids by their distance from the first.
func plain(v, id string, base int) string {
	if id != "" {
		v = strings.ReplaceAll(v, id, "ID")
	}
	return number.ReplaceAllStringFunc(v, func(d string) string {
		if n, err := strconv.Atoi(d); err == nil && base > 0 && n >= base && n < base+65536 {
			return fmt.Sprintf("base+%d", n-base)
		}
		return d
	})
}

func TestAProgramSeesTheSame(t *testing.T) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			c, socket := prepare(t, c), bait(t)
			both(t, func(t *testing.T, s *harness.Sbx) facts { return look(t, s, socket, c) })
		})
	}
}

// One engine compared with itself shows nothing, and with itself under another
// option shows that: else the comparison proves nothing.
func TestTheComparisonComparesWhatItShould(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		socket := bait(t)
		once := look(t, s, socket, asked{})
		twice := look(t, s, socket, asked{})
		if s.Engine != harness.Engines[0] {
			delete(once, "pid") // as in the table
			delete(twice, "pid")
		}
		assert.Equal(t, once, twice)
		other := look(t, s, socket, asked{flags: []string{"-u", "0", "--read-only", "--hostname", "x", "--ulimit", "nofile=99"}})
		for _, name := range []string{"id.uid", "mount./.flags", "uts", "rlimit.07", "place./tmp.statfs", "list./proc", "env.01"} {
			assert.NotEqual(t, once[name] == other[name], name != "list./proc", name)
		}
		for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
			assert.Equal(t, "another", once["ns."+ns], ns)
		}
	})
}

// Roots that are not what an engine hopes for.
var roots = []struct {
	name string
	make func(root string) error
}{
	{"nothing but the program", func(string) error { return nil }},
	{"dev is a link", link("/etc", "dev")},
	{"dev is a link out", link("../../../../dev", "dev")},
	{"dev is a file", file("dev")},
	{"dev is full of files", func(r string) error {
		for _, n := range []string{"dev/null", "dev/pts", "dev/shm", "dev/fd", "dev/tty"} {
			if err := file(n)(r); err != nil {
				return err
			}
		}
		return nil
	}},
	{"proc is a link", link("/etc", "proc")},
	{"proc is a file", file("proc")},
	{"proc is not empty", file("proc/sys/kernel/core_pattern")},
	{"shm is a link", link("/etc", "dev/shm")},
	{"tmp is a link", link("/etc", "tmp")},
	{"tmp is a link that goes nowhere", link("/no/where", "tmp")},
	{"home is a link", link("/proc/self/root", "home")},
	{"work is a link to proc", link("/proc/1/root", "work")},
}

func TestStrangeRoots(t *testing.T) {
	for _, c := range roots {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			program, err := os.ReadFile(build(t))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(root, "seen"), program, 0o755)) //nolint:gosec // it is executed
			require.NoError(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
			require.NoError(t, c.make(root))
			s := harness.New(t)
			name := "strange-" + strings.ReplaceAll(c.name, " ", "-")
			o := s.Do("base", "add", name, root)
			require.Equal(t, 0, o.Code, "%v", o)
			t.Cleanup(func() { assert.Equal(t, 0, s.Do("base", "rm", name).Code) })
			socket := bait(t)
			both(t, func(t *testing.T, s *harness.Sbx) facts {
				o := s.Run("--base", name, "-e", "SEEN_ABSTRACT="+socket, "-w", "/work", "--", "/seen", "/work")
				f := report(o)
				if o.Code == 0 {
					maps.Copy(f, read(t, o))
				}
				return f
			})
		})
	}
}

func link(to, name string) func(string) error {
	return func(root string) error {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		return os.Symlink(to, p)
	}
}

func file(name string) func(string) error {
	return func(root string) error {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		return os.WriteFile(p, []byte("x\n"), 0o666) //nolint:gosec // of a base
	}
}

// measured are the fields of a report that no two runs have in common; that
// they are there must be the same.
var measured = strings.Fields("started_at finished_at wall_ms cpu_user_ms cpu_system_ms memory_peak_bytes pids_peak disk_used_bytes inodes_used " +
	"io_read_bytes io_write_bytes net_rx_bytes net_tx_bytes context_switches_voluntary context_switches_involuntary throttled_ms")

var hits = regexp.MustCompile(`hit \d+ times`)

// report gives a report's fields, flat.
func report(o *harness.Outcome) facts {
	f := facts{"report.code": strconv.Itoa(o.Code), "report.killed by": o.Signal.String()}
	var add func(name string, v any)
	add = func(name string, v any) {
		switch x := v.(type) {
		case map[string]any:
			for k, v := range x {
				add(name+"."+k, v)
			}
			return
		case float64, string:
			field := strings.TrimPrefix(name, "report.")
			if slices.Contains(measured, field) || strings.HasPrefix(field, "pressure.") || strings.HasPrefix(field, "phases_ms.") {
				v = "measured"
			}
		}
		f[name] = hits.ReplaceAllString(plain(fmt.Sprint(v), o.Report.ID, 0), "hit N times")
	}
	for k, v := range o.Report.All {
		if k != "engine" && k != "id" {
			add("report."+k, v)
		}
	}
	return f
}

// ends are ways to end, and ways to fail before. DIR and SCRIPT are on the host.
var ends = []struct {
	name string
	args []string
}{
	{"exit 0", []string{"--", "true"}},
	{"exit 7", []string{"--", "sh", "-c", "echo out; echo err >&2; exit 7"}},
	{"exit 255", []string{"--", "sh", "-c", "exit 255"}},
	{"signal", []string{"--", "sh", "-c", "kill -SEGV $$"}},
	{"kill", []string{"--", "sh", "-c", "kill -KILL $$"}},
	{"wall time", []string{"--timeout", "0.3", "--", "/victim", "ignore"}},
	{"cpu time", []string{"--cpu-time", "0.3", "--timeout", "60", "--", "/victim", "cpu"}},
	{"memory", []string{"-m", "64m", "--timeout", "60", "--", "/victim", "memory"}},
	{"memory of its own files", []string{"-m", "64m", "--tmpfs", "/scratch:size=512m", "--timeout", "60", "--", "/victim", "disk", "/scratch"}},
	{"least memory", []string{"-m", "6m", "--", "/victim", "nothing"}},
	{"output", []string{"--output-limit", "1m", "--timeout", "60", "--", "/victim", "flood"}},
	{"pids", []string{"--pids-limit", "32", "--timeout", "60", "--", "/victim", "forks"}},
	{"one process", []string{"--pids-limit", "2", "--", "/victim", "nothing"}},
	{"no process", []string{"--pids-limit", "1", "--", "/victim", "nothing"}},
	{"disk", []string{"--disk", "16m", "--timeout", "60", "-w", "/work", "--", "/victim", "disk", "."}},
	{"disk of its own", []string{"-m", "64m", "--disk", "100m", "--timeout", "60", "-w", "/work", "--", "/victim", "disk", "."}},
	{"inodes", []string{"--inodes", "500", "--timeout", "60", "-w", "/work", "--", "/victim", "inodes", "."}},
	{"least inodes", []string{"--inodes", "64", "--", "true"}},
	{"least disk", []string{"--disk", "64k", "--", "true"}},
	{"file size", []string{"--fsize", "1m", "--timeout", "60", "-w", "/work", "--", "/victim", "disk", "."}},
	{"filter", []string{"--", "/victim", "foreign"}},
	{"daemon", []string{"--", "/victim", "daemon"}},
	{"not found", []string{"--", "no-such-command"}},
	{"not found by path", []string{"--", "/no/such/command"}},
	{"not executable", []string{"--", "/etc/passwd"}},
	{"a directory", []string{"--", "/usr"}},
	{"no interpreter", []string{"--", "/script"}},
	{"not a program", []string{"-v", "SCRIPT:/etc/hosts", "--tmpfs", "/scratch:exec", "--", "sh", "-c", "printf x > /scratch/p; chmod 755 /scratch/p; exec /scratch/p"}},
	{"argument too long", []string{"--", "true", strings.Repeat("a", 128<<10-1)}},
	{"hard limit", []string{"--ulimit", "nofile=3:3", "--", "true"}},
	{"no stack", []string{"--ulimit", "stack=4096:4096", "--", "true"}},
	{"no address space", []string{"--ulimit", "as=65536:65536", "--", "true"}},
	{"no file size", []string{"--ulimit", "fsize=0:0", "--", "true"}},
	{"no processes of the user", []string{"--ulimit", "nproc=1:1", "--", "sh", "-c", "true & wait"}},
	{"no descriptors", []string{"--ulimit", "nofile=0:0", "--", "true"}},

	{"directory is a file", []string{"-w", "/etc/passwd", "--", "true"}},
	{"directory below a file", []string{"-w", "/etc/passwd/x", "--", "true"}},
	{"directory is closed", []string{"-v", "DIR:/closed", "-u", "7:7", "-w", "/root", "--", "true"}},
	{"directory in the system", []string{"-w", "/usr/not/there", "--", "true"}},
	{"directory in proc", []string{"-w", "/proc/self", "--", "pwd"}},
	{"directory in proc of pid 1", []string{"-w", "/proc/1/cwd", "--", "pwd"}},
	{"directory by a descriptor", []string{"-w", "/proc/self/fd/3", "--", "pwd"}},
	{"directory of another process", []string{"-w", "/proc/1/root", "--", "ls"}},
	{"tmpfs on a file", []string{"--tmpfs", "/etc/passwd", "--", "true"}},
	{"tmpfs in the system", []string{"--tmpfs", "/usr/not/there", "--", "true"}},
	{"tmpfs on a link", []string{"--tmpfs", "/bin", "--", "/usr/bin/ls", "/bin/"}},
	{"tmpfs with a mode that is none", []string{"--tmpfs", "/x:mode=9", "--", "true"}},
	{"volume on a file", []string{"-v", "DIR:/etc/passwd", "--", "true"}},
	{"volume of a file on a directory", []string{"-v", "SCRIPT:/tmp", "--", "true"}},
	{"volume on a link", []string{"-v", "DIR:/lib64", "--", "true"}},
	{"volume in the system", []string{"-v", "DIR:/usr/not/there", "--", "true"}},
	{"volume of a device", []string{"-v", "/dev/null:/x", "--", "sh", "-c", "cat /x"}},
	{"host name with a colon", []string{"--hostname", "a:b", "--", "uname", "-n"}},
	{"longest host name", []string{"--hostname", strings.Repeat("a", 63), "--", "uname", "-n"}},
	{"network namespace that is another's kind", []string{"--network", "ns:/proc/self/ns/uts", "--", "true"}},
	{"network namespace that is not there", []string{"--network", "ns:/run/netns/not-there", "--", "true"}},
	{"terminal without a terminal", []string{"-it", "--", "true"}},
	{"output on a terminal", []string{"-t", "--", "sh", "-c", "echo a; echo b >&2; exit 3"}},
	{"output limit on a terminal", []string{"-t", "--output-limit", "1m", "--timeout", "1", "--", "/victim", "flood"}},
	{"one CPU that is not there", []string{"--cpuset-cpus", "4000", "--", "true"}},
	{"smallest shared memory", []string{"--shm-size", "1", "--", "true"}},
}

func TestReportsAreTheSame(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	require.NoError(t, os.WriteFile(script, []byte("#!/no/such/interpreter\n"), 0o755)) //nolint:gosec // it is executed
	names := strings.NewReplacer("SCRIPT", script, "DIR", t.TempDir())
	for _, c := range ends {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, s *harness.Sbx) facts {
				args := []string{"-v", victim.Build(t) + ":/victim:ro", "-v", script + ":/script:ro"}
				for _, a := range c.args {
					args = append(args, names.Replace(a))
				}
				o := s.Run(args...)
				f := report(o)
				if len(o.Stdout) < 1000 {
					f["stdout"] = string(o.Stdout)
				}
				f["stderr"] = plain(string(o.Stderr), o.Report.ID, 0)
				return f
			})
		})
	}
}

var seenByHost = []struct {
	name  string
	flags []string
}{
	{"default", nil},
	{"root", []string{"-u", "0"}},
	{"terminal", []string{"-t"}},
	{"output limit", []string{"--output-limit", "1m"}},
	{"network of the host", []string{"--network", "host"}},
	{"root on disk", []string{"-m", "64m", "--disk", "300m"}},
}

// What the host sees of a sandbox: which processes there are, what pid 1 holds,
// where they are.
func TestTheHostSeesTheSame(t *testing.T) {
	for _, c := range seenByHost {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, s *harness.Sbx) facts { return outside(t, s, c.flags) })
		})
	}
}

func outside(t *testing.T, s *harness.Sbx, flags []string) facts {
	t.Helper()
	file := s.ReportFile()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	cmd := s.Cmd(append(append([]string{"run", "--report", file, "--json-status-fd", "3", "-v", build(t) + ":/seen:ro"}, flags...), "--", "/seen", "wait")...)
	cmd.ExtraFiles = []*os.File{w}
	require.NoError(t, cmd.Start())
	require.NoError(t, w.Close())
	var started struct {
		Event, ID string
		Pid       int
	}
	require.NoError(t, json.NewDecoder(r).Decode(&started))
	require.Equal(t, "started", started.Event)
	// It says so, then lets go of the command's streams.
	require.Eventually(t, func() bool {
		_, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/2", started.Pid))
		return os.IsNotExist(err)
	}, 20*time.Second, time.Millisecond)

	f := facts{}
	pids := harness.Processes(started.ID)
	f["processes"] = strconv.Itoa(len(pids))
	base := 0
	for _, pid := range pids {
		who, dir := "command", fmt.Sprintf("/proc/%d", pid)
		if pid == started.Pid {
			who = "pid 1"
		}
		for _, n := range []string{"uid_map", "limits", "oom_score_adj", "loginuid", "sessionid", "environ", "personality", "coredump_filter", "timens_offsets"} {
			b, err := os.ReadFile(filepath.Join(dir, n))
			require.NoError(t, err)
			if n == "uid_map" {
				base, err = strconv.Atoi(strings.Fields(string(b))[1])
				require.NoError(t, err)
			}
			f[who+" "+n] = plain(string(b), started.ID, base)
		}
		maps.Copy(f, groups(t, who, pid, started.ID))
		b, err := os.ReadFile(filepath.Join(dir, "status"))
		require.NoError(t, err)
		for _, l := range strings.Split(string(b), "\n") {
			name, v, _ := strings.Cut(l, ":")
			switch name {
			case "PPid":
				switch strings.TrimSpace(v) {
				case strconv.Itoa(cmd.Process.Pid):
					v = "sbxrun"
				case strconv.Itoa(started.Pid):
					v = "pid 1"
				}
			case "Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigBlk", "SigIgn", "SigCgt", "Cpus_allowed_list", "Threads":
			default:
				continue
			}
			f[who+" "+name] = plain(strings.Join(strings.Fields(v), " "), started.ID, base)
		}
		for _, n := range strings.Fields("cgroup ipc mnt net pid time user uts") {
			inside, err := os.Readlink(filepath.Join(dir, "ns", n))
			require.NoError(t, err)
			host, err := os.Readlink("/proc/self/ns/" + n)
			require.NoError(t, err)
			f[who+" namespace "+n] = map[bool]string{true: "the host's", false: "another"}[inside == host]
		}
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		require.NoError(t, err)
		var held []string
		for _, fd := range fds {
			to, err := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
			require.NoError(t, err)
			to, _, _ = strings.Cut(to, ":[")
			held = append(held, to)
		}
		slices.Sort(held)
		f[who+" holds"] = strings.Join(held, " ")
		for _, n := range []string{"cwd", "root"} {
			f[who+" "+n], err = os.Readlink(filepath.Join(dir, n))
			require.NoError(t, err)
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		require.NoError(t, err)
		// After the name in brackets: state ppid pgrp session tty … priority nice.
		x := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		f[who+" group and session"] = fmt.Sprint(x[2] == strconv.Itoa(pid), x[3] == strconv.Itoa(started.Pid))
		f[who+" terminal and priority"] = fmt.Sprint(x[4] != "0", x[15], x[16])
	}
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	o := s.Wait(cmd)
	o.Report = s.ReadReport(file)
	require.NotNil(t, o.Report)
	maps.Copy(f, report(o))
	return f
}

// groups tells in which cgroups a process is and what they allow.
func groups(t *testing.T, who string, pid int, id string) facts {
	t.Helper()
	f := facts{}
	own := cgroups(t, os.Getpid())
	for h, path := range cgroups(t, pid) {
		if path == own[h] {
			f[who+" group "+h] = "the caller's"
			continue
		}
		f[who+" group "+h] = plain(path, id, 0)
		mounts := []string{strings.TrimPrefix(h, "name=")}
		if h == "" { // v2, beside v1 or alone
			mounts = []string{"unified", ""}
		}
		for _, mount := range mounts {
			for _, n := range strings.Fields("memory.limit_in_bytes memory.memsw.limit_in_bytes memory.soft_limit_in_bytes memory.oom_control memory.swappiness memory.use_hierarchy " +
				"pids.max cpu.cfs_quota_us cpu.cfs_period_us cpu.shares cpuset.cpus cpuset.mems blkio.weight devices.list notify_on_release " +
				"memory.max memory.high memory.swap.max memory.oom.group memory.zswap.max cpu.max cpu.weight io.weight io.max cgroup.type cgroup.subtree_control cgroup.freeze") {
				if b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", mount, path, n)); err == nil {
					f[who+" "+h+" "+n] = string(b)
				}
			}
		}
	}
	return f
}

// cgroups gives a process's cgroup in each hierarchy.
func cgroups(t *testing.T, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	require.NoError(t, err)
	m := map[string]string{}
	for _, l := range strings.Fields(string(b)) {
		p := strings.SplitN(l, ":", 3)
		require.Len(t, p, 3, "%q", l)
		m[p[1]] = p[2]
	}
	return m
}

// Last: a difference of the table that no comparison has is a hole in it.
func TestNothingIsMeantInVain(t *testing.T) {
	if compared < len(cases)+len(callers)+len(roots)+len(ends)+len(seenByHost) {
		t.Log("not all comparisons ran: nothing to say")
		return
	}
	for _, m := range meant {
		assert.True(t, m.seen || m.machine, "no test shows this any more: %+v", m)
	}
}
