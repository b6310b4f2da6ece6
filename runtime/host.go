package runtime

import (
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/cgroup"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

// detectCgroups looks once: planning and launching are one process, in one
// cgroup.
var detectCgroups = sync.OnceValues(cgroup.Detect)

// Host is what was probed of this machine. It changes nothing.
type Host struct {
	EUID    int
	Kernel  string // uname -r
	CPUs    int    // online, as this process may use them
	Cgroup  *cgroup.Host
	cgroupE error
	// LandlockABI is 0 where the kernel has none or it is disabled.
	LandlockABI int
	// SysResource says whether hard resource limits can be raised.
	SysResource bool
	hardLimits  map[string]uint64
}

// Probe looks at the host. It fails only where nothing could be run at all;
// everything else is judged when a plan asks for it.
func Probe() (*Host, error) {
	h := &Host{EUID: os.Geteuid(), CPUs: goruntime.NumCPU(), hardLimits: map[string]uint64{}}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	h.Cgroup, h.cgroupE = detectCgroups()
	h.LandlockABI = landlockABI()
	h.SysResource = haveCap(unix.CAP_SYS_RESOURCE)
	for name, nr := range rlimitNumbers {
		var l unix.Rlimit
		if err := unix.Getrlimit(nr, &l); err == nil {
			h.hardLimits[name] = l.Max
		}
	}
	return h, nil
}

// landlockABI asks the kernel for its version (Linux 5.13), 0 is none.
func landlockABI() int {
	v, _, e := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 {
		return 0
	}
	return int(v)
}

// haveCap says whether the effective set of this process has capability c.
func haveCap(c int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// Check is one line of `sbxrun doctor`.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Warn   bool   `json:"warn,omitempty"` // works, but weakens the host or costs something
	Detail string `json:"detail"`
	Hint   string `json:"hint,omitempty"`
}

// Report says what this host can do and how to mend what it cannot.
func (h *Host) Report() []Check {
	var out []Check
	add := func(name string, ok bool, detail, hint string) {
		if ok {
			hint = ""
		}
		out = append(out, Check{Name: name, OK: ok, Detail: detail, Hint: hint})
	}
	add("root", h.EUID == 0, fmt.Sprintf("effective uid %d", h.EUID), "run sbxrun as root (sudo sbxrun …)")
	add("kernel", kernelAtLeast(h.Kernel, 5, 19), h.Kernel, "Linux 5.19 or newer is needed (idmapped overlay layers)")
	if h.cgroupE != nil {
		add("cgroups", false, h.cgroupE.Error(), "mount a cgroup hierarchy: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
	} else {
		err := h.Cgroup.Check(cgroup.Limits{MemoryBytes: defaultMemoryBytes, Pids: defaultPids, CPUs: defaultCPUs})
		d := "mode " + h.Cgroup.Mode
		if err != nil {
			d += ": " + err.Error()
		}
		add("cgroups", err == nil, d, HintOf(err))
		home, ours := h.Cgroup.Home()
		add("cgroup controllers", true, "there: "+strings.Join(h.Cgroup.Controllers(), " ")+"; on: "+strings.Join(h.Cgroup.Enabled(), " "), "")
		switch {
		case ours:
			home += " (that cgroup is ours: a delegated unit, or a container's root)"
		case h.Cgroup.Mode == "v2":
			home += " (this process's own cgroup is not delegated to it)"
		}
		add("cgroup of sandboxes", true, home, "")
	}
	for _, ns := range []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"} {
		_, err := os.Stat("/proc/self/ns/" + ns)
		add("namespace "+ns, err == nil, "", "the kernel lacks this namespace")
	}
	max := readTrim("/proc/sys/user/max_user_namespaces")
	add("user namespaces", max != "0", "user.max_user_namespaces="+max, "sysctl user.max_user_namespaces=15000")
	_, _, e := syscall.Syscall(unix.SYS_OPENAT2, ^uintptr(0), 0, 0)
	add("openat2", e != unix.ENOSYS, "", "Linux 5.6 or newer is needed")
	add("seccomp", seccompAvailable(), "filter mode", "the kernel lacks CONFIG_SECCOMP_FILTER")
	fs, _ := os.ReadFile("/proc/filesystems")
	add("overlayfs", strings.Contains(string(fs), "\toverlay\n"), "", "modprobe overlay")
	_, err := os.Stat("/dev/loop-control")
	add("loop devices", err == nil, "for --disk larger than memory", "modprobe loop")
	ll := fmt.Sprintf("ABI %d", h.LandlockABI)
	add("landlock", true, ll+map[bool]string{true: "", false: " (scoping needs 6: Linux 6.12; sandboxes run without this second layer)"}[h.LandlockABI >= 6], "")
	oci, err := engine.FindOCI()
	if err != nil {
		oci = err.Error()
	}
	add("engine libcontainer", err == nil, oci, "make build; make install")

	out = append(out, networkChecks()...)

	warn := func(path, bad, name, hint string) {
		if v := readTrim(path); v == bad {
			out = append(out, Check{Name: name, OK: true, Warn: true, Detail: path + "=" + v, Hint: hint})
		}
	}
	warn("/proc/sys/dev/tty/legacy_tiocsti", "1", "legacy TIOCSTI", "sysctl dev.tty.legacy_tiocsti=0 (sandboxes are denied it by their filter)")
	warn("/proc/sys/kernel/io_uring_disabled", "0", "io_uring", "sysctl kernel.io_uring_disabled=2 unless the host needs it (sandboxes are denied it by their filter)")
	warn("/proc/sys/kernel/unprivileged_bpf_disabled", "0", "unprivileged bpf", "sysctl kernel.unprivileged_bpf_disabled=1 (sandboxes are denied it by their filter)")
	if !h.SysResource {
		out = append(out, Check{Name: "hard limits", OK: true, Warn: true, Detail: "no CAP_SYS_RESOURCE", Hint: "--ulimit cannot go above this process's own hard limits"})
	}
	return out
}

func readTrim(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// seccompAvailable asks for an action the kernel must know (Linux 4.14).
func seccompAvailable() bool {
	action := uint32(0x80000000) // SECCOMP_RET_KILL_PROCESS
	_, _, e := syscall.Syscall(unix.SYS_SECCOMP, 2 /* GET_ACTION_AVAIL */, 0, uintptr(unsafe.Pointer(&action)))
	return e == 0
}

func kernelAtLeast(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return true // unknown: let the probes decide
	}
	return a > major || a == major && b >= minor
}

var rlimitNumbers = map[string]int{
	"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA,
	"fsize": unix.RLIMIT_FSIZE, "locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK,
	"msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE, "nofile": unix.RLIMIT_NOFILE,
	"nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
	"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

var subreaper struct {
	once sync.Once
	err  error
}

// becomeSubreaper makes pid 1 of every sandbox our child once its starter has
// ended (Linux 3.4).
func becomeSubreaper() error {
	subreaper.once.Do(func() {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			subreaper.err = errors.Join(errors.New("become child subreaper"), err)
		}
	})
	return subreaper.err
}
