// Package fault makes the machine fail under sbxrun: kernel features that are
// not there, system calls that fail in the middle of a launch, kill -9 at any
// moment, many launches one after the other and at once. It owns the two C
// helpers (c/deny.c makes calls fail, c/facts.c says what holds a command) and
// knows of sbxrun its command line and report only, so that every engine is
// held to the same answers.
package fault

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

func TestMain(m *testing.M) {
	code := harness.Main(m)
	if installed != "" {
		_ = os.RemoveAll(installed)
	}
	os.Exit(code)
}

// hangGuard ends a run that would never end by itself. It is no expectation of
// speed: the slowest run of this folder takes a hundredth of it.
const hangGuard = 30 * time.Second

const direct = "direct"

// eachEngine runs f for every engine that this build of sbxrun has.
func eachEngine(t *testing.T, f func(t *testing.T, s *harness.Sbx)) {
	t.Helper()
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		install(t, s)
		f(t, s)
	})
}

// installed holds copies of the binaries, so that a process of ours is known by
// its executable, whatever it did to its environment and its cgroup.
var installed string

func install(t *testing.T, s *harness.Sbx) {
	t.Helper()
	if installed == "" {
		dir, err := os.MkdirTemp("", "sbxrun-fault-")
		require.NoError(t, err)
		installed = dir
		for _, suffix := range []string{"", "-oci"} {
			b, err := os.ReadFile(s.Bin + suffix)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "sbxrun"+suffix), b, 0o755)) //nolint:gosec // they are run
		}
	}
	s.Bin = filepath.Join(installed, "sbxrun")
	o := s.Do("run", "--", "true") // the base and the filter are made, once
	require.Equal(t, 0, o.Code, "%v", o)
}

// injection is a run during which calls were made to fail.
type injection struct {
	*harness.Outcome
	// seen and failed count the calls that matched, by rule.
	seen, failed []int
}

func (i *injection) String() string {
	o := *i.Outcome
	if len(o.Stdout) > 0 {
		o.Stdout = fmt.Appendf(nil, "(%d bytes: the command ran)", len(o.Stdout))
	}
	return fmt.Sprintf("calls that matched %v, failed %v, %v", i.seen, i.failed, &o)
}

// inject is `sbxrun run args…` under deny with rules.
func inject(t *testing.T, s *harness.Sbx, rules []string, args ...string) *injection {
	t.Helper()
	deny := source(t, "deny.c")
	report, said := s.ReportFile(), filepath.Join(t.TempDir(), "calls")
	cmd := s.Cmd(append([]string{"run", "--report", report}, args...)...)
	wrapped := append([]string{deny, "-o", said, "-x", "/facts"}, rules...)
	cmd.Path, cmd.Args = deny, append(append(wrapped, "--"), cmd.Args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	require.NoError(t, cmd.Start())
	guard := time.AfterFunc(hangGuard, func() { _ = cmd.Process.Kill() })
	i := &injection{Outcome: s.Wait(cmd)}
	guard.Stop()
	i.Stdout, i.Stderr, i.Elapsed, i.Report = stdout.Bytes(), stderr.Bytes(), time.Since(start), s.ReadReport(report)
	// The counts are written when the last process with the filter is gone.
	require.Eventually(t, func() bool { _, err := os.Stat(said); return err == nil }, hangGuard, time.Millisecond, "a process of the run lives on\n%v", i.Outcome)
	b, err := os.ReadFile(said)
	require.NoError(t, err)
	for line := range strings.Lines(string(b)) {
		var name string
		var seen, failed int
		_, err := fmt.Sscanf(line, "%s seen %d failed %d", &name, &seen, &failed)
		require.NoError(t, err, "%q", line)
		i.seen, i.failed = append(i.seen, seen), append(i.failed, failed)
	}
	return i
}

// failsClosed asserts the end of a run that must not have started its command:
// code, status, stage, what went wrong in message and on standard error.
func failsClosed(t *testing.T, i *injection, code int, stage, cause string) {
	t.Helper()
	if !assert.Equal(t, code, i.Code, "%v", i) || !assert.NotNil(t, i.Report, "%v", i) {
		return
	}
	r := i.Report
	assert.Equal(t, []any{code, "setup-failed", "internal", stage}, []any{r.ExitCode, r.Status, r.Reason, r.Stage}, "%v", i)
	// C libraries write the same texts with a capital.
	assert.Contains(t, strings.ToLower(r.Message), cause, "%v", i)
	assert.Empty(t, i.Stdout, "the command ran")
	assert.Equal(t, said(r), string(i.Stderr))
}

// said is what standard error says of a failure: the report's message on one
// line, and the hint, where there is one, on another.
func said(r *harness.Report) string {
	s := "sbxrun: " + strings.ReplaceAll(r.Message, "\n", "; ") + "\n"
	if r.Hint != "" {
		s += "hint: " + r.Hint + "\n"
	}
	return s
}

// notAsked is a rule that matches no call: a run under it has deny's filter and
// is otherwise left alone.
const notAsked = "keyctl,arg0=0x7fffffff"

// factsArgs are the arguments of a run whose command tells what holds it.
func factsArgs(t *testing.T) []string {
	t.Helper()
	exe := source(t, "facts.c")
	args := []string{"-v", exe + ":/facts:ro", "-e", "HOST_FILE=" + exe}
	ns := []string{}
	for _, n := range []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"} {
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+n, &st); err != nil {
			continue // the kernel has no such namespace
		}
		ns = append(ns, fmt.Sprintf("%s=%d", n, st.Ino))
	}
	return append(args, "-e", "HOST_NS="+strings.Join(ns, " "), "--", "/facts")
}

// mustHold is what facts.c must print in every sandbox of every engine, among
// other things. deny has one filter, sbxrun the second.
var mustHold = strings.Split(`descriptors above 2 0
Uid 1000 1000 1000 1000
Gid 1000 1000 1000 1000
Groups none
NSpid one
CapInh 0000000000000000
CapPrm 0000000000000000
CapEff 0000000000000000
CapBnd 0000000000000000
CapAmb 0000000000000000
NoNewPrivs 1
Seccomp 2
Seccomp_filters 2
/proc/self/uid_map 0 range 65536
/proc/self/gid_map 0 range 65536
setgroups EPERM
ns.user own
ns.mnt own
ns.pid own
ns.net own
ns.ipc own
ns.uts own
ns.cgroup own
open /root empty
open /var/lib/sbxrun ENOENT
open /run/sbxrun ENOENT
open /etc/shadow ENOENT
open /sys/fs/cgroup ENOENT
open /sys/kernel ENOENT
open /dev/mem ENOENT
open /dev/kmsg ENOENT
open /boot ENOENT
open /proc/1/environ EACCES
open /proc/1/maps EACCES
host file ENOENT
readlink /proc/1/root EACCES
readlink /proc/1/exe EACCES
readlink /proc/1/cwd EACCES
list /proc/1/fd EACCES
write /usr/x EROFS
cwd /home/sandbox
pid not 1
session own
cgroup /
keyctl EPERM
socket AF_ALG EPERM
io_uring_setup EPERM
unshare user EPERM
unshare mount EPERM
mount EPERM
umount /proc EPERM
chroot EPERM
sethostname EPERM
setuid 0 EPERM
done`, "\n")

// baseline is what facts.c prints on this machine when nothing fails.
func baseline(t *testing.T, s *harness.Sbx) []string {
	t.Helper()
	i := inject(t, s, []string{notAsked}, factsArgs(t)...)
	require.Equal(t, 0, i.Code, "%v", i)
	require.Empty(t, string(i.Stderr))
	facts := strings.Split(strings.TrimSuffix(string(i.Stdout), "\n"), "\n")
	for _, f := range mustHold {
		require.Contains(t, facts, f)
	}
	require.NotContains(t, string(i.Stdout), "PROPAGATES")
	return facts
}

// isolated asserts that the command ran and was held as in the baseline, but
// for the facts that changed, each as "old → new"; without an old one it is
// new, without a new one it may be gone.
func isolated(t *testing.T, i *injection, base []string, changed ...string) {
	t.Helper()
	if !assert.Equal(t, 0, i.Code, "%v", i) {
		return
	}
	got := strings.Split(strings.TrimSuffix(string(i.Stdout), "\n"), "\n")
	want := slices.Clone(base)
	for _, c := range changed {
		from, to, _ := strings.Cut(c, " → ")
		n := slices.Index(want, from)
		switch {
		case from == "":
			want = append(want, to)
		case n >= 0 && to == "":
			want = slices.Delete(want, n, n+1)
		case n >= 0: // else this kernel or this engine never had it
			want[n] = to
		}
	}
	less := func(of, than []string) []string {
		return slices.DeleteFunc(slices.Clone(of), func(f string) bool { return slices.Contains(than, f) })
	}
	assert.Empty(t, less(got, want), "new facts")
	assert.Empty(t, less(want, got), "missing facts")
}

func source(t *testing.T, name string) string {
	t.Helper()
	return harness.BuildC(t, filepath.Join(need.Repo(), "test/fault/c", name))
}

// yard is a cgroup of the test's own in every hierarchy: whatever lies in it is
// ours, also where no report names it.
type yard struct {
	t    *testing.T
	name string
	dirs []string
}

func newYard(t *testing.T) *yard {
	t.Helper()
	y := &yard{t: t, name: fmt.Sprintf("sbxrun-fault-%d-%d", os.Getpid(), time.Now().UnixNano())}
	b, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if !strings.Contains(line, " - cgroup") || slices.Contains(y.dirs, filepath.Join(f[4], y.name)) {
			continue
		}
		dir := filepath.Join(f[4], y.name)
		require.NoError(t, os.Mkdir(dir, 0o755))
		y.dirs = append(y.dirs, dir)
	}
	t.Cleanup(func() {
		for _, d := range y.dirs {
			assert.NoError(t, os.Remove(d), "a cgroup that is not empty cannot be removed")
		}
	})
	return y
}

// groups lists the cgroups in the yard.
func (y *yard) groups() []string {
	var found []string
	for _, d := range y.dirs {
		ents, err := os.ReadDir(d)
		require.NoError(y.t, err)
		for _, e := range ents {
			if e.IsDir() {
				found = append(found, filepath.Join(d, e.Name()))
			}
		}
	}
	return found
}

// process is one of the host's processes that lives: taking the dead away that
// a killed sbxrun leaves is for init, and some are slow at it.
type process struct {
	pid, parent int
	exe, cgroup string
	inside      bool // in a pid namespace of its own, as pid 1
}

func processes() map[int]process {
	all := map[int]process{}
	ents, _ := os.ReadDir("/proc")
	for _, e := range ents {
		var p process
		if _, err := fmt.Sscanf(e.Name(), "%d", &p.pid); err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		p.exe, _ = os.Readlink(filepath.Join(dir, "exe"))
		b, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		p.cgroup = string(b)
		dead := false
		b, _ = os.ReadFile(filepath.Join(dir, "status"))
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "State:\tZ") {
				dead = true
			}
			if v, ok := strings.CutPrefix(line, "PPid:\t"); ok {
				_, _ = fmt.Sscan(v, &p.parent)
			}
			if v, ok := strings.CutPrefix(line, "NSpid:\t"); ok {
				ids := strings.Fields(v)
				p.inside = len(ids) == 2 && ids[1] == "1"
			}
		}
		if !dead {
			all[p.pid] = p
		}
	}
	return all
}

// leftNothing asserts that no sandbox of s has anything on the host any more.
func leftNothing(t *testing.T, s *harness.Sbx) {
	t.Helper()
	becomesEmpty(t, s.Leaks)
}

// processes lists what of the yard's sandboxes lives: by its executable, by its
// cgroup, or as a pid 1 whose supervisor is no more.
func (y *yard) processes() []string {
	var found []string
	all := processes()
	for _, p := range all {
		_, supervised := all[p.parent]
		orphan := strings.Contains(p.exe, "memfd:sbxrun") && (!supervised || p.parent == 1)
		if strings.HasPrefix(p.exe, installed) || strings.Contains(p.cgroup, y.name) || orphan {
			found = append(found, fmt.Sprintf("process %+v", p))
		}
	}
	return found
}

// left lists what the yard's sandboxes have on the host: processes, cgroups,
// what lies in the state folder, in tmp and new in the root.
func (y *yard) left(s *harness.Sbx, tmp string, rootBefore []string) []string {
	found := append(y.processes(), y.groups()...)
	found = append(found, s.Leaks()...)
	for _, dir := range []string{s.State, tmp} {
		for _, f := range tree(dir) {
			if st, err := os.Lstat(f); err == nil && !st.IsDir() {
				found = append(found, "file "+f)
			}
		}
	}
	for _, f := range tree(s.Root) {
		if !slices.Contains(rootBefore, f) {
			found = append(found, "file "+f)
		}
	}
	return found
}

// nothingLeft waits for left to be empty: the kernel takes processes and
// namespaces down on its own time.
func (y *yard) nothingLeft(s *harness.Sbx, tmp string, rootBefore []string) {
	y.t.Helper()
	becomesEmpty(y.t, func() []string { return y.left(s, tmp, rootBefore) })
}

// becomesEmpty asserts that look finds nothing any more within the grace.
func becomesEmpty(t *testing.T, look func() []string) {
	t.Helper()
	var found []string
	for end := time.Now().Add(harness.LeakGrace); ; time.Sleep(10 * time.Millisecond) {
		if found = look(); len(found) == 0 || time.Now().After(end) {
			break
		}
	}
	assert.Empty(t, found, "left behind")
}

// tree lists what is below dir.
func tree(dir string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err == nil && p != dir {
			found = append(found, p)
		}
		return nil
	})
	return found
}

// started is a sandbox whose command runs.
type started struct {
	cmd    *exec.Cmd
	pid1   int // as the host numbers it
	stderr *bytes.Buffer
}

// begin starts `sbxrun run args…` and returns when its command runs.
func begin(s *harness.Sbx, args ...string) (*started, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	st := &started{cmd: s.Cmd(append([]string{"run", "--json-status-fd", "3"}, args...)...), stderr: &bytes.Buffer{}}
	st.cmd.ExtraFiles, st.cmd.Stderr = []*os.File{w}, st.stderr
	err = st.cmd.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	var event struct {
		Event string
		Pid   int
	}
	if err := json.NewDecoder(r).Decode(&event); err != nil || event.Event != "started" {
		_ = st.cmd.Process.Kill()
		_ = st.cmd.Wait()
		rest, _ := io.ReadAll(r)
		return nil, fmt.Errorf("not started: %w\n%s%s", err, st.stderr, rest)
	}
	st.pid1 = event.Pid
	return st, nil
}
