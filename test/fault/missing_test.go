package fault

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/sbxrun/sbxrun/test/harness"
)

// old is how kernels before a feature answer for it.
const old = "function not implemented"

// missing lists kernel features by the call that an older kernel, or one built
// without them, refuses. For each engine: "" where sbxrun must work without and
// hold the command as ever, else the stage at which it must refuse to start.
var missing = []struct {
	feature    string
	rule       string
	direct     string
	oci        string
	cause      string
	changed    []string // facts that may change, for the kernel itself lacks them
	onlyDirect bool
	unused     bool // this machine, or an engine, never asks for it
}{
	{feature: "openat2 (5.6)", rule: "openat2", direct: "launch", oci: "", cause: old},
	{feature: "clone3 (5.3)", rule: "clone3", direct: "", oci: "", unused: true},
	{feature: "clone3 into a cgroup (5.7)", rule: "clone3=EINVAL,mem0&0x200000000", direct: "", oci: "", unused: true},
	{feature: "mount_setattr (5.12)", rule: "mount_setattr", direct: "mount", oci: "mount", cause: old},
	{feature: "idmapped layers (5.19)", rule: "mount_setattr=EINVAL,mem3&0x100000", direct: "mount", oci: "mount", cause: "cannot map owners: invalid argument"},
	{feature: "fsopen (5.2)", rule: "fsopen", direct: "launch", oci: "mount", cause: old},
	{feature: "fsconfig (5.2)", rule: "fsconfig", direct: "launch", oci: "mount", cause: old},
	{feature: "lower layers by fsconfig (6.5)", rule: "fsconfig=EINVAL,arg1=1,str2~lowerdir+", direct: "", oci: "", unused: true},
	{feature: "fsmount (5.2)", rule: "fsmount", direct: "launch", oci: "mount", cause: old},
	{feature: "open_tree (5.2)", rule: "open_tree", direct: "mount", oci: "mount", cause: old},
	{feature: "move_mount (5.2)", rule: "move_mount", direct: "launch", oci: "launch", cause: old},
	{feature: "close_range (5.9)", rule: "close_range", direct: "exec", oci: "exec", cause: old},
	{feature: "pidfd_open (5.3)", rule: "pidfd_open", direct: "", oci: ""},
	{feature: "pidfd_send_signal (5.1)", rule: "pidfd_send_signal", direct: "", oci: ""},
	{feature: "memfd_create (3.17)", rule: "memfd_create", direct: "launch", oci: "launch", cause: old},
	{feature: "memfd_create with exec flags (6.3)", rule: "memfd_create=EINVAL,arg1&0x18", direct: "", oci: ""},
	{feature: "seccomp", rule: "seccomp", direct: "plan", oci: "plan", cause: "no seccomp filters"},
	{feature: "seccomp filters, but they cannot be asked for", rule: "seccomp=EINVAL,arg0=1", direct: "exec", oci: "exec", cause: "invalid argument"},
	{feature: "no_new_privs (3.5)", rule: "prctl=EINVAL,arg0=38", direct: "launch", oci: "launch", cause: "invalid argument"},
	{feature: "child subreaper (3.4)", rule: "prctl=EINVAL,arg0=36", direct: "lock", oci: "lock", cause: "invalid argument"},
	{feature: "user namespaces, for idmapped mounts", rule: "clone=EINVAL,arg0&0x10000000", direct: "mount", oci: "mount", cause: "invalid argument"},
	{feature: "user namespaces, for the sandbox", rule: "unshare=EINVAL,arg0&0x10000000", direct: "launch", oci: "launch", cause: "invalid argument"},
	{feature: "time namespaces (5.6)", rule: "unshare=EINVAL,arg0&0x80", direct: "launch", oci: "launch", cause: "invalid argument"},
	{feature: "network namespaces", rule: "unshare=EINVAL,arg0&0x40000000", direct: "launch", oci: "launch", cause: "invalid argument"},
	{
		feature: "Landlock (5.13)", rule: "landlock_create_ruleset", direct: "", oci: "",
		// Without it the signal is let through by us and dropped by pid 1.
		changed: []string{"kill 1 EPERM → kill 1 DONE"},
	},
	{
		feature: "Landlock, switched off", rule: "landlock_create_ruleset=EOPNOTSUPP", direct: "", oci: "",
		changed: []string{"kill 1 EPERM → kill 1 DONE"},
	},
	{
		feature: "making device nodes, as in a container", rule: "mknodat=EPERM,arg2&0x2000", direct: "", oci: "", unused: true,
		// The host's own nodes are bound instead, as libcontainer always does.
		changed: hostNodes(), onlyDirect: true,
	},
	{feature: "statx (4.11)", rule: "statx", direct: "", oci: "", unused: true},
	{feature: "faccessat2 (5.8)", rule: "faccessat2", direct: "", oci: "", unused: true},
	{feature: "io_uring", rule: "io_uring_setup", direct: "", oci: "", unused: true},
	{feature: "copy_file_range", rule: "copy_file_range", direct: "", oci: "", unused: true},
	{feature: "execveat", rule: "execveat", direct: "", oci: "", unused: true},
	{feature: "keyrings", rule: "keyctl", direct: "", oci: "", unused: true},
}

// hostNodes is what shows that device nodes come from the host's /dev.
func hostNodes() (changed []string) {
	for _, n := range []string{"full", "null", "random", "tty", "urandom", "zero"} {
		changed = append(changed, " → mount /dev/"+n+" devtmpfs rw,nosuid,noexec")
	}
	// Files are masked with the same node.
	for _, n := range []string{"interrupts", "kallsyms", "kcore", "key-users", "keys", "kmsg", "latency_stats", "modules", "sched_debug", "timer_list"} {
		changed = append(changed, "mount /proc/"+n+" tmpfs rw,nosuid,noexec → mount /proc/"+n+" devtmpfs rw,nosuid,noexec")
	}
	return changed
}

// A feature that the kernel lacks changes nothing for the command or nothing is
// started: never less isolation, a hang or a crash.
func TestKernelWithout(t *testing.T) {
	eachEngine(t, func(t *testing.T, s *harness.Sbx) {
		base := baseline(t, s)
		for _, m := range missing {
			t.Run(m.feature, func(t *testing.T) {
				stage := m.oci
				if s.Engine == direct {
					stage = m.direct
				}
				changed := m.changed
				if m.onlyDirect && s.Engine != direct {
					changed = nil
				}
				i := inject(t, s, []string{m.rule}, factsArgs(t)...)
				if !m.unused {
					assert.NotZero(t, i.failed[0], "the call was never made: the row tests nothing")
				}
				leftNothing(t, s)
				if stage == "" {
					isolated(t, i, base, changed...)
					return
				}
				failsClosed(t, i, 125, stage, m.cause)
				if i.Report != nil {
					assert.NotEmpty(t, i.Report.Hint, "what can its user do?")
				}
			})
		}
	})
}
