package seccomp

import (
	"sync"

	"golang.org/x/sys/unix"
)

// removed is what we refuse although moby allows it, or allows it to a process
// with some capability, or does not know it; docs/seccomp.md prints the reasons.
var removed = []struct{ name, reason string }{
	{"bpf", "attack surface of the verifier; no sandbox loads programs"},
	{"fsconfig", "CVE-2022-0185 class: file system parsers reached from inside"},
	{"fsmount", "mounting is the supervisor's"},
	{"fsopen", "mounting is the supervisor's"},
	{"fspick", "mounting is the supervisor's"},
	{"io_uring_enter", "operations that pass no filter, and a long list of escapes"},
	{"io_uring_register", "as io_uring_enter"},
	{"io_uring_setup", "as io_uring_enter"},
	{"kcmp", "tells kernel addresses apart; for debuggers"},
	{"keyctl", "keyrings are not namespaced"},
	{"memfd_secret", "memory that the host cannot account for or inspect"},
	{"modify_ldt", "16-bit segments: a recurring source of kernel bugs, of use to emulators only"},
	{"mount_setattr", "mounting is the supervisor's"},
	{"move_mount", "mounting is the supervisor's"},
	{"name_to_handle_at", "half of the open_by_handle_at escape, and tells paths apart outside the root"},
	{"open_by_handle_at", "opens files outside the root (shocker)"},
	{"open_tree", "mounting is the supervisor's"},
	{"perf_event_open", "side channels and a large attack surface"},
	{"pidfd_getfd", "takes descriptors from other processes"},
	{"process_madvise", "acts on other processes"},
	{"process_vm_readv", "reads other processes' memory past ptrace's checks"},
	{"process_vm_writev", "writes other processes' memory"},
	{"ptrace", "a traced process can be made to do what the tracer may not (and changes its calls after the filter saw them before Linux 4.8)"},
	{"socketcall", "hides the address family from the filter"},
	{"userfaultfd", "holds the kernel in the middle of a copy: makes races winnable"},
	{"vmsplice", "with splice, the way to write to page-cache pages that others read (Dirty Pipe class)"},
	{"openat2", "its mode lies in memory, where the filter cannot see it; callers fall back on ENOSYS"},
	{"clone3", "its flags lie in memory, where the filter cannot see them; the C library falls back on ENOSYS"},
	{"quotactl", "no sandbox manages quotas"},
	{"quotactl_fd", "no sandbox manages quotas"},
	{"map_shadow_stack", "of the C library's own start only, which falls back on ENOSYS"},
	{"set_mempolicy_home_node", "memory policy is the host's; callers fall back on ENOSYS"},
}

const (
	oCreat    = 0o100
	oTmpfile  = 0o20000000
	tiocsti   = 0x5412
	tioclinux = 0x541C
	// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
	cloneNamespaces = 0x7E020000
)

var defaultPolicy = sync.OnceValue(func() *Policy { return build(native) })

// Default is the policy of every sandbox: an allow-list after moby's for a
// process without capabilities, less what removed says, with conditions on
// what is dangerous by its arguments.
func Default() *Policy { return defaultPolicy() }

func build(t *arch) *Policy {
	p := &Policy{deflt: Errno(unix.EPERM), unknown: Errno(unix.ENOSYS), foreign: Kill}
	p.rules = make([]Rule, 0, 512)
	add := func(r Rule) { p.rules = append(p.rules, r) }

	decided := make(map[string]bool, 512)
	deny := func(name, reason string, args ...Arg) {
		decided[name] = true
		add(Rule{Name: name, Args: args, Action: Errno(unix.EPERM), Reason: reason})
	}
	allow := func(name string, args ...Arg) {
		decided[name] = true
		add(Rule{Name: name, Args: args, Action: Allow})
	}

	// New namespaces give new capabilities over kernel code (CVE-2022-0185,
	// overlayfs in user namespaces, nft). clone's flags are in its first argument.
	allow("clone", Arg{Index: 0, Op: MaskedEqual, Mask: cloneNamespaces, Value: 0})

	// Files with a set-id bit would outlive the sandbox on a volume and make a
	// host user its owner (systemd's RestrictSUIDSGID, same calls). The mode
	// counts only where a file is made.
	for _, bit := range []uint64{0o4000, 0o2000} {
		const why = "makes a set-user-id or set-group-id file, which could come to be on a volume of the host's"
		mode := func(i uint8) Arg { return Arg{Index: i, Op: MaskedEqual, Mask: bit, Value: bit} }
		for name, i := range map[string]uint8{"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2} {
			deny(name, why, mode(i))
		}
		for _, flag := range []uint64{oCreat, oTmpfile} {
			deny("open", why, Arg{Index: 1, Op: MaskedEqual, Mask: flag, Value: flag}, mode(2))
			deny("openat", why, Arg{Index: 2, Op: MaskedEqual, Mask: flag, Value: flag}, mode(3))
		}
	}
	for _, name := range []string{"chmod", "fchmod", "fchmodat", "fchmodat2", "creat", "mkdir", "mkdirat", "mknod", "mknodat", "open", "openat"} {
		allow(name)
	}

	// The kernel looks at the low 32 bits only (CVE-2019-10063).
	for _, cmd := range []uint64{tiocsti, tioclinux} {
		deny("ioctl", "puts input into a terminal that someone outside reads (CVE-2017-5226)", Arg{Index: 1, Op: EqualLow32, Value: cmd})
	}
	allow("ioctl")

	// Everything else is attack surface that no job needs: AF_ALG, AF_VSOCK,
	// AF_KEY, AF_RXRPC, AF_PACKET, xfrm (CVE-2026-31431 and its family).
	// All three parameters are ints: the kernel looks at the low 32 bits.
	for _, family := range []uint64{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6} {
		allow("socket", Arg{Index: 0, Op: EqualLow32, Value: family})
	}
	allow("socket", Arg{Index: 0, Op: EqualLow32, Value: unix.AF_NETLINK}, Arg{Index: 2, Op: EqualLow32, Value: unix.NETLINK_ROUTE})
	allow("socketpair", Arg{Index: 0, Op: EqualLow32, Value: unix.AF_UNIX})

	// Pid 1 is ours but has the command's uid. What may be done to a process of
	// the same uid without tracing it could starve it, so that it does not end
	// when it is told to, or end it. Threads pass their own numbers here: only 1
	// is refused, and what means all processes of a uid.
	pid1 := func(name string, who uint8, more ...Arg) {
		deny(name, "could starve or end pid 1, which runs the sandbox", append(more, Arg{Index: who, Op: EqualLow32, Value: 1})...)
	}
	for _, name := range []string{"sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "prlimit64"} {
		pid1(name, 0)
		allow(name)
	}
	for name, first := range map[string]uint64{"setpriority": 0, "ioprio_set": 1} { // PRIO_PROCESS, IOPRIO_WHO_PROCESS
		for _, which := range []uint64{first, first + 1} {
			pid1(name, 1, Arg{Index: 0, Op: EqualLow32, Value: which})
		}
		deny(name, "could starve pid 1, which has the same uid", Arg{Index: 0, Op: EqualLow32, Value: first + 2})
		allow(name)
	}

	// moby's own list of harmless personalities.
	for _, v := range []uint64{0, 0x8, 0x20000, 0x20008, 0xffffffff} {
		allow("personality", Arg{Index: 0, Op: Equal, Value: v})
	}

	for _, r := range removed {
		act := Errno(unix.EPERM)
		switch r.name {
		case "clone3", "openat2", "map_shadow_stack", "set_mempolicy_home_node":
			act = Errno(unix.ENOSYS)
		}
		decided[r.name] = true
		add(Rule{Name: r.name, Action: act, Reason: r.reason})
	}
	for _, list := range [][]string{mobyAllowed, t.allowed} {
		for _, name := range list {
			if !decided[name] {
				decided[name] = true
				add(Rule{Name: name, Action: Allow})
			}
		}
	}
	return p.sorted()
}
