// Package cgroup compares runtime/cgroup with the libraries that the field
// trusts: opencontainers/cgroups (what runc writes) and containerd/cgroups
// (what it reads). It owns only comparisons; neither library is linked into a
// binary for it.
package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	oc "github.com/opencontainers/cgroups"                //nolint:depguard // the oracle; only this test links it
	"github.com/opencontainers/cgroups/fs"                //nolint:depguard // the oracle; only this test links it
	"github.com/opencontainers/cgroups/fs2"               //nolint:depguard // the oracle; only this test links it
	ocmanager "github.com/opencontainers/cgroups/manager" //nolint:depguard // the oracle; only this test links it

	"github.com/sbxrun/sbxrun/runtime/cgroup"
	"github.com/sbxrun/sbxrun/test/need"
)

const mount = "/sys/fs/cgroup"

// TestMain is also the victim: it uses memory and CPU time, says so, and waits.
func TestMain(m *testing.M) {
	if os.Getenv("CGROUP_VICTIM") == "" {
		os.Exit(m.Run())
	}
	var b [1]byte
	_, _ = os.Stdin.Read(b[:]) // moved into the group now
	keep := make([]byte, 20<<20)
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); {
		for i := 0; i < len(keep); i += 4096 {
			keep[i]++
		}
	}
	fmt.Println("done")
	_, _ = os.Stdin.Read(b[:])
}

func create(t *testing.T, l cgroup.Limits) (*cgroup.Host, *cgroup.Group) {
	t.Helper()
	need.Root(t)
	need.Cgroup(t)
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	g, err := h.Create("", fmt.Sprintf("conform-%d-%d", os.Getpid(), time.Now().UnixNano()), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return h, g
}

// byController names the v1 directories by the folder they are mounted at.
func byController(g *cgroup.Group) map[string]string {
	out := map[string]string{}
	for _, d := range g.Dirs() {
		c, _, _ := strings.Cut(strings.TrimPrefix(d, mount+"/"), "/")
		for _, one := range strings.Split(c, ",") {
			out[one] = d
		}
	}
	return out
}

// The same limits through opencontainers/cgroups in a group beside ours leave
// the same files.
func TestLimitsAreWrittenAsRuncWritesThem(t *testing.T) {
	for _, l := range []cgroup.Limits{
		{MemoryBytes: 64 << 20, CPUs: 0.5, CPUSet: "0", Pids: 20},
		{MemoryBytes: 64<<20 + 1, SwapBytes: 16 << 20, CPUs: 1},
		{MemoryBytes: 32 << 20, SwapBytes: -1},
		{Pids: 7},
		{CPUs: 1.0 / 3},
		{MemoryBytes: 64 << 20, MemoryLowBytes: 16<<20 + 1, CPUSetMems: "0"},
		{CPUShares: 2},
		{CPUShares: 512},
		{CPUShares: 1025},
		{CPUShares: 262144},
		{IO: disk(1<<20, 2<<20, 30, 0)},
		{},
	} {
		t.Run(fmt.Sprintf("%+v", l), func(t *testing.T) {
			h, g := create(t, l)
			pids := l.Pids
			r := &oc.Resources{
				Memory: l.MemoryBytes, CpusetCpus: l.CPUSet, SkipDevices: true,
				MemoryReservation: l.MemoryLowBytes, CpusetMems: l.CPUSetMems, CpuShares: uint64(l.CPUShares),
				CpuWeight: oc.ConvertCPUSharesToCgroupV2Value(uint64(l.CPUShares)),
			}
			for _, d := range l.IO {
				var major, minor int64
				if _, err := fmt.Sscanf(d.Disk, "%d:%d", &major, &minor); err != nil {
					t.Skip("needs a disk")
				}
				r.BlkioThrottleReadBpsDevice = []*oc.ThrottleDevice{oc.NewThrottleDevice(major, minor, uint64(d.ReadBPS))}
				r.BlkioThrottleWriteBpsDevice = []*oc.ThrottleDevice{oc.NewThrottleDevice(major, minor, uint64(d.WriteBPS))}
				r.BlkioThrottleReadIOPSDevice = []*oc.ThrottleDevice{oc.NewThrottleDevice(major, minor, uint64(d.ReadIOPS))}
			}
			if pids != 0 {
				r.PidsLimit = &pids
			}
			if l.MemoryBytes > 0 {
				r.MemorySwap = l.MemoryBytes + l.SwapBytes
				if l.SwapBytes < 0 {
					r.MemorySwap = -1
				}
			}
			if l.CPUs > 0 {
				r.CpuPeriod = 100000
				r.CpuQuota = int64(l.CPUs*100000 + 0.5)
			}
			cg := &oc.Cgroup{Name: "oc", Resources: r}
			var theirs oc.Manager
			var err error
			beside := func(d string) string { return d + "-oc" }
			if h.Mode == "v2" {
				theirs, err = fs2.NewManager(cg, beside(g.Dirs()[0]))
			} else {
				paths := map[string]string{}
				for c, d := range byController(g) {
					switch c { // those that have limits
					case "memory", "cpu", "cpuset", "pids", "blkio":
						paths[c] = beside(d)
					}
				}
				theirs, err = fs.NewManager(cg, paths)
			}
			if err != nil {
				t.Fatal(err)
			}
			cmd := idle(t)
			t.Cleanup(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
				if err := theirs.Destroy(); err != nil {
					t.Error(err)
				}
			})
			if err := theirs.Apply(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if err := theirs.Set(r); err != nil {
				t.Fatal(err)
			}
			compared := 0
			for _, d := range g.Dirs() {
				for _, f := range []string{
					"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swappiness", "memory.use_hierarchy",
					"cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares", "cpuset.cpus", "cpuset.mems", "pids.max",
					"memory.soft_limit_in_bytes", "blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device",
					"blkio.throttle.read_iops_device", "blkio.throttle.write_iops_device",
					"memory.max", "memory.high", "memory.low", "memory.swap.max", "cpu.max", "cpu.weight", "io.max",
				} {
					ours, err := os.ReadFile(filepath.Join(d, f))
					if err != nil {
						continue
					}
					want, err := os.ReadFile(filepath.Join(beside(d), f))
					if os.IsNotExist(err) {
						continue // that controller is off in their group
					}
					if err != nil {
						t.Fatal(err)
					}
					compared++
					if string(ours) != string(want) {
						t.Errorf("%s: ours %q, theirs %q", filepath.Join(d, f), ours, want)
					}
				}
			}
			if compared < 4 {
				t.Fatalf("only %d files compared", compared)
			}
		})
	}
}

// disk gives rates of a disk of this machine.
func disk(rbps, wbps, riops, wiops int64) []cgroup.IORate {
	all, _ := filepath.Glob("/sys/block/*/device")
	if len(all) == 0 {
		return []cgroup.IORate{{}}
	}
	dev, _ := os.ReadFile(filepath.Join(filepath.Dir(all[0]), "dev"))
	return []cgroup.IORate{{Disk: strings.TrimSpace(string(dev)), ReadBPS: rbps, WriteBPS: wbps, ReadIOPS: riops, WriteIOPS: wiops}}
}

// libcontainer finds our group by the path that we give it.
func TestPathIsReadAsRuncReadsIt(t *testing.T) {
	h, g := create(t, cgroup.Limits{})
	m, err := ocmanager.New(&oc.Cgroup{Path: g.LibcontainerPath(), Resources: &oc.Resources{SkipDevices: true}})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	for _, d := range g.Dirs() {
		want[d] = true
	}
	n := 0
	for c, p := range m.GetPaths() {
		if !want[p] {
			t.Errorf("%s: theirs %q is not one of ours %q", c, p, g.Dirs())
		}
		n++
	}
	if n == 0 || h.Mode != "v2" && n < 4 {
		t.Fatalf("only %d paths", n)
	}
}

func idle(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "CGROUP_VICTIM=1")
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// Counters read by us and by containerd/cgroups agree on a stopped process.
func TestUsageAgreesWithContainerd(t *testing.T) {
	h, g := create(t, cgroup.Limits{MemoryBytes: 128 << 20, CPUs: 0.5, Pids: 50})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "CGROUP_VICTIM=1")
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
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // until it is idle, past a period's throttling

	near := func(what string, ours *uint64, theirs, tolerance uint64) {
		t.Helper()
		if ours == nil {
			t.Errorf("%s: not measured", what)
			return
		}
		if diff := max(*ours, theirs) - min(*ours, theirs); diff > tolerance {
			t.Errorf("%s: ours %d, theirs %d", what, *ours, theirs)
		}
		t.Logf("%-12s ours %d, theirs %d", what, *ours, theirs)
	}
	if h.Mode == "v2" {
		m, err := cgroup2.Load(strings.TrimPrefix(g.Dirs()[0], mount))
		if err != nil {
			t.Fatal(err)
		}
		u := g.Usage()
		s, err := m.Stat()
		if err != nil {
			t.Fatal(err)
		}
		near("cpu total", u.CPUTotalUS, s.GetCPU().GetUsageUsec(), 5000)
		near("cpu user", u.CPUUserUS, s.GetCPU().GetUserUsec(), 5000)
		near("cpu system", u.CPUSystemUS, s.GetCPU().GetSystemUsec(), 5000)
		near("throttled", u.ThrottledUS, s.GetCPU().GetThrottledUsec(), 0)
		near("memory", u.MemoryNowBytes, s.GetMemory().GetUsage(), 1<<20)
		near("oom kills", u.OOMKills, s.GetMemoryEvents().GetOomKill(), 0)
		if u.MemoryPeakBytes != nil && s.GetMemory().GetMaxUsage() > 0 {
			near("memory peak", u.MemoryPeakBytes, s.GetMemory().GetMaxUsage(), 1<<20)
		}
		return
	}
	dirs := byController(g)
	m, err := cgroup1.Load(func(s cgroup1.Name) (string, error) {
		d := dirs[string(s)]
		if d == "" {
			return "", cgroup1.ErrControllerNotActive
		}
		return strings.TrimPrefix(d, filepath.Join(mount, string(s))), nil
	}, func(c *cgroup1.InitConfig) error {
		c.InitCheck = func(cgroup1.Subsystem, cgroup1.Path, error) error { return cgroup1.ErrIgnoreSubsystem }
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	u := g.Usage()
	s, err := m.Stat(cgroup1.IgnoreNotExist)
	if err != nil {
		t.Fatal(err)
	}
	near("cpu total", u.CPUTotalUS, s.GetCPU().GetUsage().GetTotal()/1000, 5000)
	// Theirs count ticks of 10 ms.
	near("cpu user", u.CPUUserUS, s.GetCPU().GetUsage().GetUser()/1000, 30000)
	near("cpu system", u.CPUSystemUS, s.GetCPU().GetUsage().GetKernel()/1000, 30000)
	near("throttled", u.ThrottledUS, s.GetCPU().GetThrottling().GetThrottledTime()/1000, 0)
	near("memory", u.MemoryNowBytes, s.GetMemory().GetUsage().GetUsage(), 1<<20)
	near("memory peak", u.MemoryPeakBytes, s.GetMemory().GetUsage().GetMax(), 1<<20)
	near("oom kills", u.OOMKills, s.GetMemoryOomControl().GetOomKill(), 0)
}
