package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/need"
)

// systemd's mark says what is ours; the root of all never is.
func TestHomeIsWhatWasDelegated(t *testing.T) {
	mount := t.TempDir()
	for _, d := range []string{"a.service/supervisor/x", "b.service", "user.slice/c.scope"} {
		if err := os.MkdirAll(filepath.Join(mount, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"a.service", "user.slice/c.scope"} {
		if err := unix.Setxattr(filepath.Join(mount, d), "user.delegate", []byte("1"), 0); err != nil {
			t.Skip("needs extended attributes:", err)
		}
	}
	if err := unix.Setxattr(filepath.Join(mount, "b.service"), "user.delegate", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	check := func(own, want string, ours bool) {
		t.Helper()
		if home, o := findHome(mount, own); home != want || o != ours {
			t.Errorf("own %q: home %q, ours %v; want %q, %v", own, home, o, want, ours)
		}
	}
	check("/", "/", false)
	check("/a.service", "/a.service", true)
	check("/a.service/supervisor", "/a.service", true)
	check("/a.service/supervisor/x", "/", false)
	check("/b.service", "/", false)
	check("/user.slice/c.scope", "/user.slice/c.scope", true)
	check("/user.slice", "/", false)
	// All groups but the root of all have a type: this is a container's root.
	if err := os.WriteFile(filepath.Join(mount, "cgroup.type"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("/", "/", true)
	check("/supervisor", "/", true)
}

// unit makes a group with this process's victim in it and a host that has it as
// its home, as in a unit with Delegate=yes.
func unit(t *testing.T) (*Host, string, *victim) {
	t.Helper()
	need.CgroupV2(t)
	real := detect(t)
	g, err := real.Create("", fmt.Sprintf("unit-%d", os.Getpid()), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	v := start(t, g)
	v.do(t, "sleep")
	h := *real
	h.home, h.ours = g.rel, true
	t.Cleanup(func() {
		_ = v.Process.Kill()
		_ = v.Wait()
		if err := Remove([]string{filepath.Join(g.dirs[""], "sbxrun"), filepath.Join(g.dirs[""], supervisorLeaf)}); err != nil {
			t.Error(err)
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return &h, g.dirs[""], v
}

func content(t *testing.T, parts ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// Inner groups hold no processes while there are sandboxes, and can hold some
// again afterwards.
func TestProcessesOfAHomeMoveToItsLeaf(t *testing.T) {
	h, dir, v := unit(t)
	var groups []*Group
	for i := range 2 {
		g, err := h.Create("", fmt.Sprintf("s%d", i), Limits{MemoryBytes: 64 << 20, Pids: 5})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		groups = append(groups, g)
	}
	if got := content(t, dir, "cgroup.procs"); got != "" {
		t.Errorf("processes %q in an inner group", got)
	}
	if got := content(t, dir, supervisorLeaf, "cgroup.procs"); got != fmt.Sprint(v.Process.Pid) {
		t.Errorf("processes %q in the leaf, want %d", got, v.Process.Pid)
	}
	if got := groups[1].Dirs(); !slices.Equal(got, []string{filepath.Join(dir, "sbxrun", "s1")}) {
		t.Errorf("directories %q", got)
	}
	if err := groups[0].Close(); err != nil {
		t.Fatal(err)
	}
	if got := content(t, dir, "cgroup.subtree_control"); !strings.Contains(got, "memory") {
		t.Errorf("controllers %q while there is a sandbox", got)
	}
	if err := groups[1].Close(); err != nil {
		t.Fatal(err)
	}
	if got := content(t, dir, "cgroup.subtree_control"); got != "" || exists(filepath.Join(dir, "sbxrun")) {
		t.Errorf("controllers %q after the last one", got)
	}
	if err := write(dir, "cgroup.procs", fmt.Sprint(v.Process.Pid)); err != nil {
		t.Error(err) // systemd does so for the next ExecStart=
	}
}

// What others made in a home stays as it is, its limits too.
func TestOthersInAHomeKeepTheirControllers(t *testing.T) {
	h, dir, _ := unit(t)
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Rmdir(other); err != nil {
			t.Error(err)
		}
	}()
	g, err := h.Create("", "s", Limits{Pids: 5})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if got := content(t, dir, "cgroup.subtree_control"); !strings.Contains(got, "pids") {
		t.Errorf("controllers %q", got)
	}
}

// Many at once: each enables, moves and tidies up while others do.
func TestManyInOneHomeAtOnce(t *testing.T) {
	h, dir, _ := unit(t)
	errs := make(chan error)
	const n = 8
	for i := range n {
		go func() {
			var err error
			for j := 0; j < 5 && err == nil; j++ {
				var g *Group
				if g, err = h.Create("", fmt.Sprintf("s%d-%d", i, j), Limits{MemoryBytes: 64 << 20, CPUs: 1, Pids: 5}); err == nil {
					err = g.Close()
				}
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := content(t, dir, "cgroup.subtree_control"); got != "" {
		t.Errorf("controllers %q after the last one", got)
	}
}

// A controller that the home was not given is refused before anything is made.
func TestControllerThatIsNotDelegated(t *testing.T) {
	h := &Host{Mode: "v2", ours: true, home: "/x.service", mounts: map[string]string{"": "/sys/fs/cgroup"}, v2: map[string]bool{"pids": true}}
	err := h.Check(Limits{Pids: 5, MemoryBytes: 1 << 20})
	if err == nil || !strings.Contains(err.Error(), "memory") {
		t.Fatalf("error %v", err)
	}
	hint(t, err)
}

func TestMemoryHighIsOfV2(t *testing.T) {
	h := &Host{Mode: "v1", mounts: map[string]string{"memory": "/m"}}
	hint(t, h.Check(Limits{MemoryHighBytes: 1 << 20}))
}

func TestLeanHasWhatLimits(t *testing.T) {
	h := &Host{Mode: "hybrid", mounts: map[string]string{}}
	for _, c := range v1Controllers {
		h.mounts[c] = "/" + c
	}
	for _, c := range []struct {
		l    Limits
		want string
	}{
		{Limits{MemoryBytes: 1}, "devices memory pids"},
		{Limits{CPUShares: 5}, "cpu devices memory pids"},
		{Limits{CPUSetMems: "0"}, "cpuset devices memory pids"},
		{Limits{IO: []IORate{{Disk: "8:0", ReadBPS: 1}}}, "blkio devices memory pids"},
	} {
		if got := strings.Join(h.Lean(c.l, false).Controllers(), " "); got != c.want {
			t.Errorf("%+v: %q, want %q", c.l, got, c.want)
		}
	}
}

// What is reserved for sandboxes is passed on by the group above them, no more.
func TestReservationsAreSummed(t *testing.T) {
	h, dir, _ := unit(t)
	var groups []*Group
	for i, low := range []int64{16 << 20, 8 << 20, 0} {
		g, err := h.Create("", fmt.Sprintf("s%d", i), Limits{MemoryBytes: 64 << 20, MemoryLowBytes: low})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		groups = append(groups, g)
	}
	for i, want := range []int{24 << 20, 8 << 20, 0} {
		if got := content(t, dir, "sbxrun/memory.low"); got != fmt.Sprint(want) {
			t.Errorf("memory.low %s, want %d", got, want)
		}
		if err := groups[i].Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// What a kernel killed beyond the group's own limit is not the group's doing.
func TestOOMAtALimitAbove(t *testing.T) {
	need.CgroupV2(t)
	h := detect(t)
	up, err := h.Create("", fmt.Sprintf("above-%d", os.Getpid()), Limits{MemoryBytes: 48 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	g, err := h.Create(up.rel, "below", Limits{MemoryBytes: 512 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	v := start(t, g)
	v.do(t, "hog")
	if s := v.signal(); s != unix.SIGKILL {
		t.Fatalf("signal %v", s)
	}
	e := g.Events()
	if e.OOMKills == nil || e.OOMs == nil || *e.OOMKills == 0 || *e.OOMs != 0 {
		t.Fatalf("kills %d, own %d", *e.OOMKills, *e.OOMs)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestSharesAndWeight(t *testing.T) {
	for shares, want := range map[int64]int64{2: 1, 1024: 100, 512: 59, 262144: 10000, 1 << 20: 10000, 1: 1} {
		if got := weightOf(shares); got != want {
			t.Errorf("weightOf(%d) = %d, want %d", shares, got, want)
		}
	}
	for weight, want := range map[int64]int64{1: 10, 100: 1024, 10000: 102400} {
		if got := sharesOf(weight); got != want {
			t.Errorf("sharesOf(%d) = %d, want %d", weight, got, want)
		}
	}
}

func TestMoreLimitsAreApplied(t *testing.T) {
	l := Limits{MemoryBytes: 64 << 20, MemoryLowBytes: 16 << 20, CPUShares: 512, CPUSet: "0", CPUSetMems: "0"}
	got := group(t, l).Applied()
	want := l
	if detect(t).Mode == "v2" {
		want.CPUShares, want.CPUWeight = 0, 59
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if disk := anyDisk(t); disk != "" {
		want := IORate{Device: "/dev/x", Disk: disk, ReadBPS: 1 << 20, WriteIOPS: 50}
		got := group(t, Limits{IO: []IORate{want}}).Applied()
		if len(got.IO) != 1 || got.IO[0] != want {
			t.Errorf("got %+v, want %+v", got.IO, want)
		}
	}
}

func TestMemoryHighIsApplied(t *testing.T) {
	need.CgroupV2(t)
	if got := group(t, Limits{MemoryHighBytes: 32 << 20}).Applied(); got.MemoryHighBytes != 32<<20 {
		t.Fatalf("%+v", got)
	}
}

// anyDisk gives major:minor of a disk that is no loop device, "" is none.
func anyDisk(t *testing.T) string {
	t.Helper()
	all, _ := filepath.Glob("/sys/block/*/device")
	if len(all) == 0 {
		return ""
	}
	return content(t, filepath.Dir(all[0]), "dev")
}

func TestDisksAreFoundOrRefused(t *testing.T) {
	for _, p := range []string{"/dev/null", "/no/such/device", t.TempDir()} {
		_, err := Disks([]IORate{{Device: p, ReadBPS: 1}})
		if err == nil {
			t.Errorf("%q accepted", p)
			continue
		}
		hint(t, err)
	}
	disk := anyDisk(t)
	if disk == "" || os.Geteuid() != 0 {
		t.Skip("needs a disk")
	}
	a := node(t, disk)
	got, err := Disks([]IORate{{Device: a, ReadBPS: 1}, {Device: a, WriteBPS: 2}})
	if err != nil || len(got) != 1 || got[0] != (IORate{Device: a, Disk: disk, ReadBPS: 1, WriteBPS: 2}) {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = Disks([]IORate{{Device: a, ReadBPS: 1}, {Device: a, ReadBPS: 2}})
	hint(t, err)
}

// node makes a block device file.
func node(t *testing.T, dev string) string {
	t.Helper()
	var major, minor uint32
	if _, err := fmt.Sscanf(dev, "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(t.TempDir(), "node")
	err := unix.Mknod(p, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs mknod:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A rate is of the whole disk that a partition is on.
func TestPartitionIsItsDisk(t *testing.T) {
	need.Root(t)
	image := filepath.Join(t.TempDir(), "image")
	mbr := make([]byte, 4<<20)
	copy(mbr[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0, 8, 0, 0}) // sectors 8 to 2055
	mbr[510], mbr[511] = 0x55, 0xaa
	if err := os.WriteFile(image, mbr, 0o600); err != nil {
		t.Fatal(err)
	}
	loop, err := attachLoop(t, image)
	if err != nil {
		t.Skip("needs a loop device with partitions:", err)
	}
	parts, _ := filepath.Glob("/sys/block/" + loop + "/" + loop + "p1/dev")
	if len(parts) != 1 {
		t.Skip("the kernel found no partition")
	}
	got, err := diskOf(node(t, content(t, parts[0])))
	if want := content(t, "/sys/block", loop, "dev"); err != nil || got != want {
		t.Fatalf("disk %q, %v; want %q", got, err, want)
	}
}

// attachLoop makes a loop device that is scanned for partitions and goes with
// its last user.
func attachLoop(t *testing.T, image string) (string, error) {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer ctl.Close()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for range 10 { // another may take the free one first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", err
		}
		name := fmt.Sprintf("loop%d", n)
		dev, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		t.Cleanup(func() { dev.Close() })
		c := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_PARTSCAN}}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &c)
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		return name, err
	}
	return "", unix.EBUSY
}
