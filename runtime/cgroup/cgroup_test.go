package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/need"
)

// TestMain is also the victim: it waits for a line that says what to do, so
// that it can be moved into a group first. It needs nothing from the machine.
func TestMain(m *testing.M) {
	if os.Getenv("CGROUP_VICTIM") == "" {
		os.Exit(m.Run())
	}
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	switch strings.TrimSpace(line) {
	case "hog": // until the limit
		for keep := [][]byte{}; ; {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			keep = append(keep, b)
		}
	case "spin":
		for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end); {
		}
	case "fork": // says how many children it got
		n := 0
		for ; n < 50; n++ {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), "CGROUP_VICTIM=1")
			if _, err := cmd.StdinPipe(); err != nil || cmd.Start() != nil {
				break
			}
		}
		fmt.Println(n)
		time.Sleep(time.Minute)
	case "sleep":
		time.Sleep(time.Minute)
	}
}

type victim struct {
	*exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

func start(t *testing.T, g *Group) *victim {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "CGROUP_VICTIM=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := g.Add(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return &victim{cmd, in, bufio.NewReader(out)}
}

func (v *victim) do(t *testing.T, what string) {
	t.Helper()
	if _, err := fmt.Fprintln(v.in, what); err != nil {
		t.Fatal(err)
	}
}

func (v *victim) signal() syscall.Signal {
	var exit *exec.ExitError
	if err := v.Wait(); errors.As(err, &exit) {
		return exit.Sys().(syscall.WaitStatus).Signal()
	}
	return 0
}

func fds(t *testing.T) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

func detect(t *testing.T) *Host {
	t.Helper()
	need.Root(t)
	need.Cgroup(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// group makes one and checks, at the end, that Close left nothing.
func group(t *testing.T, l Limits) *Group {
	t.Helper()
	h := detect(t)
	name := fmt.Sprintf("test-%d-%d", os.Getpid(), time.Now().UnixNano())
	g, err := h.Create("", name, l)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Watch(); err != nil {
		t.Fatal(err)
	}
	dirs := g.Dirs()
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if err := g.Close(); err != nil {
			t.Error("second Close:", err)
		}
		for _, d := range dirs {
			if exists(d) {
				t.Errorf("%s is left", d)
			}
		}
	})
	return g
}

func TestNoLeakAfterClose(t *testing.T) {
	h := detect(t)
	make1 := func(i int) {
		g, err := h.Create("", fmt.Sprintf("test-leak-%d-%d", os.Getpid(), i), Limits{MemoryBytes: 64 << 20, Pids: 10})
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
	make1(0)
	f0, r0 := fds(t), runtime.NumGoroutine()
	for i := range 5 {
		make1(i + 1)
	}
	// A goroutine is still counted for a moment after its last deferred call.
	for i := 0; i < 50 && runtime.NumGoroutine() > r0; i++ {
		time.Sleep(time.Millisecond)
	}
	if f, r := fds(t), runtime.NumGoroutine(); f > f0 || r > r0 {
		t.Fatalf("%d fds, %d goroutines; before %d, %d", f, r, f0, r0)
	}
}

func TestAppliedIsWhatWasAsked(t *testing.T) {
	l := Limits{MemoryBytes: 64 << 20, CPUs: 0.5, CPUSet: "0", Pids: 20}
	if got := group(t, l).Applied(); !reflect.DeepEqual(got, l) {
		t.Fatalf("got %+v, want %+v", got, l)
	}
}

func TestAppliedRoundsToPages(t *testing.T) {
	if got := group(t, Limits{MemoryBytes: 64<<20 + 1}).Applied(); got.MemoryBytes != 64<<20 {
		t.Fatal(got.MemoryBytes)
	}
}

func TestMemoryLimitTellsOfTheKill(t *testing.T) {
	g := group(t, Limits{MemoryBytes: 48 << 20})
	v := start(t, g)
	select {
	case <-g.OOM():
		t.Fatal("an OOM kill before there was one")
	case <-time.After(20 * time.Millisecond):
	}
	v.do(t, "hog")
	if s := v.signal(); s != unix.SIGKILL {
		t.Fatalf("signal %v", s)
	}
	dead := time.Now()
	select {
	case <-g.OOM():
		t.Logf("told %v after the death", time.Since(dead))
	case <-time.After(3 * time.Second):
		t.Fatal("not told of the OOM kill")
	}
	u := g.Usage()
	if u.OOMKills == nil || *u.OOMKills < 1 {
		t.Fatalf("oom kills %v", u.OOMKills)
	}
	// The kernel charges a dying process a few pages past the limit.
	if u.MemoryPeakBytes != nil && (*u.MemoryPeakBytes < 40<<20 || *u.MemoryPeakBytes > 49<<20) {
		t.Fatalf("peak %d", *u.MemoryPeakBytes)
	}
}

func TestKillIsNotAnOOM(t *testing.T) {
	g := group(t, Limits{MemoryBytes: 256 << 20})
	v := start(t, g)
	v.do(t, "sleep")
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	if s := v.signal(); s != unix.SIGKILL {
		t.Fatalf("signal %v", s)
	}
	select {
	case <-g.OOM():
		t.Fatal("told of an OOM kill that was none")
	case <-time.After(50 * time.Millisecond):
	}
}

func TestPidsLimit(t *testing.T) {
	g := group(t, Limits{Pids: 16})
	v := start(t, g)
	v.do(t, "fork")
	line, err := v.out.ReadString('\n')
	if err != nil {
		t.Log("the victim could not even say so:", err) // Go itself may fail to make a thread
	}
	t.Logf("children: %q", line)
	u := g.Usage()
	if u.PidsMaxHits == nil || *u.PidsMaxHits == 0 {
		t.Fatalf("hits %v", u.PidsMaxHits)
	}
	if u.PidsPeak != nil && *u.PidsPeak != 16 {
		t.Fatalf("peak %d", *u.PidsPeak)
	}
}

func TestCPULimitThrottles(t *testing.T) {
	g := group(t, Limits{CPUs: 0.2})
	v := start(t, g)
	begun := time.Now()
	v.do(t, "spin") // 400 ms of wall time
	if s := v.signal(); s != 0 {
		t.Fatalf("signal %v", s)
	}
	u := g.Usage()
	if u.ThrottledUS == nil || *u.ThrottledUS == 0 {
		t.Fatalf("throttled %v", u.ThrottledUS)
	}
	// One period's quota may be used at once at either end, and what an emulated
	// processor sleeps through counts as used: half is far from all.
	most := uint64(time.Since(begun).Microseconds())/2 + 2*cpuPeriodUS
	if u.CPUTotalUS == nil || *u.CPUTotalUS == 0 || *u.CPUTotalUS > most {
		t.Fatalf("CPU %d µs at 0.2 CPUs, at most %d", *u.CPUTotalUS, most)
	}
	if total, err := g.CPUTotal(); err != nil || total < time.Duration(*u.CPUTotalUS)*time.Microsecond {
		t.Fatal(total, err)
	}
}

func TestCloseEndsWhatRuns(t *testing.T) {
	g := group(t, Limits{})
	v := start(t, g)
	v.do(t, "sleep")
	go func() { _ = v.Wait() }() // a zombie keeps its cgroup
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// A frozen process does not die; Close thaws it.
func TestCloseEndsWhatIsFrozen(t *testing.T) {
	g := group(t, Limits{})
	v := start(t, g)
	file, value := filepath.Join(g.dirs["freezer"], "freezer.state"), "FROZEN"
	if g.h.Mode == "v2" {
		file, value = filepath.Join(g.dirs[""], "cgroup.freeze"), "1"
	} else if g.dirs["freezer"] == "" {
		t.Skip("no freezer")
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	go func() { _ = v.Wait() }()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// Without cgroup.kill (v1 alone, or before Linux 5.14) the freezer stands in.
func TestKillWithoutCgroupKill(t *testing.T) {
	g := group(t, Limits{})
	if g.h.Mode == "v2" {
		t.Skip("v2 has cgroup.kill here")
	}
	v := start(t, g)
	v.do(t, "sleep")
	var v1 []string
	for _, d := range g.made {
		if !exists(filepath.Join(d, "cgroup.kill")) {
			v1 = append(v1, d)
		}
	}
	if err := killDirs(v1); err != nil {
		t.Fatal(err)
	}
	if s := v.signal(); s != unix.SIGKILL {
		t.Fatalf("signal %v", s)
	}
}

func TestRemoveIsIdempotent(t *testing.T) {
	g := group(t, Limits{Pids: 5})
	for range 2 {
		if err := Remove(g.Dirs()); err != nil {
			t.Fatal(err)
		}
	}
}

// A name that is taken must leave the one who has it alone.
func TestCreateOfATakenName(t *testing.T) {
	g := group(t, Limits{Pids: 5})
	v := start(t, g)
	if _, err := g.h.Create("", filepath.Base(g.rel), Limits{}); !errors.Is(err, os.ErrExist) {
		t.Fatalf("error %v", err)
	}
	for _, d := range g.Dirs() {
		if !exists(d) {
			t.Fatalf("%s was removed", d)
		}
	}
	if err := unix.Kill(v.Process.Pid, 0); err != nil {
		t.Fatal(err)
	}
}

func hint(t *testing.T, err error) {
	t.Helper()
	var h interface{ Hint() string }
	if !errors.As(err, &h) || h.Hint() == "" {
		t.Fatalf("error %v has no hint", err)
	}
}

func TestParentThatIsNotThere(t *testing.T) {
	_, err := detect(t).Create("/no-such-parent-of-tests", "x", Limits{Pids: 5})
	if !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("error %v", err)
	}
	hint(t, err)
}

func TestParentThatIsFrozen(t *testing.T) {
	g := group(t, Limits{})
	file, value, up := filepath.Join(g.dirs["freezer"], "freezer.state"), "FROZEN", g.dirs["freezer"]
	mount := g.h.mounts["freezer"]
	if g.h.Mode == "v2" {
		up, mount = g.dirs[""], g.h.mounts[""]
		file, value = filepath.Join(up, "cgroup.freeze"), "1"
	} else if up == "" {
		t.Skip("no freezer")
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	_, err := g.h.Create(strings.TrimPrefix(up, mount), "x", Limits{})
	if err == nil || !strings.Contains(err.Error(), "frozen") {
		t.Fatalf("error %v", err)
	}
	hint(t, err)
}

func TestCPUSetThatIsNotThere(t *testing.T) {
	h := detect(t)
	name := fmt.Sprintf("test-cpuset-%d", os.Getpid())
	_, err := h.Create("", name, Limits{CPUSet: "4000"})
	if err == nil {
		t.Fatal("accepted")
	}
	hint(t, err)
	dirs, _ := h.Paths("", name)
	for _, d := range dirs {
		if exists(d) {
			t.Errorf("%s is left", d)
		}
	}
}

// Two launches at once: one has made the shared parent and not yet filled it.
func TestCPUSetBelowAnEmptyParent(t *testing.T) {
	h := detect(t)
	if h.Mode == "v2" || h.mounts["cpuset"] == "" {
		t.Skip("only v1 cpusets are born empty")
	}
	up := filepath.Join(h.mounts["cpuset"], fmt.Sprintf("test-empty-%d", os.Getpid()))
	dir := filepath.Join(up, "x")
	for _, d := range []string{up, dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Rmdir(d) })
	}
	if err := copyCPUSet(dir); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || strings.TrimSpace(string(b)) == "" {
			t.Errorf("%s %q, %v", f, b, err)
		}
	}
}

func TestCheckSaysWhatIsMissing(t *testing.T) {
	h := &Host{Mode: "v2", v2: map[string]bool{"memory": true}}
	if err := h.Check(Limits{MemoryBytes: 1}); err != nil {
		t.Fatal(err)
	}
	for _, l := range []Limits{{CPUs: 1}, {Pids: 1}, {CPUSet: "0"}, {SwapBytes: 1}} {
		hint(t, h.Check(l))
	}
}

func TestBelow(t *testing.T) {
	for _, c := range [][3]string{
		{"/", "/a/b", "/a/b"},
		{"", "/a", "/a"},
		{"/docker/1", "/docker/1", "/"},
		{"/docker/1", "/docker/1/x", "/x"},
		{"/docker/1", "/other", "/"},
		{"/", "/../..", "/"},
	} {
		if got := below(c[0], c[1]); got != c[2] {
			t.Errorf("below(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

func TestQuota(t *testing.T) {
	for cpus, want := range map[float64]int{1: 100000, 0.5: 50000, 1.0 / 3: 33333, 0.001: 1000, 2.000006: 200001} {
		if got := quota(cpus); got != want {
			t.Errorf("quota(%v) = %d, want %d", cpus, got, want)
		}
	}
}

func TestNamesAreChecked(t *testing.T) {
	h := &Host{mounts: map[string]string{}}
	for _, c := range [][2]string{{"", ""}, {"", ".."}, {"", "a/b"}, {"/a/../..", "x"}, {"", "a\x00"}} {
		if _, _, err := h.dirsOf(c[0], c[1]); err == nil {
			t.Errorf("parent %q, name %q accepted", c[0], c[1])
		}
	}
}
