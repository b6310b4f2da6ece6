package seccomp

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"

	moby "github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/seccomp/internal/bpfsim"
)

var update = flag.Bool("update", false, "rewrite golden files and docs/seccomp.md")

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), got, "go test ./seccomp -update writes it anew")
}

func TestDefaultPolicyGolden(t *testing.T) {
	for _, a := range []*arch{amd64, arm64} {
		golden(t, filepath.Join("testdata", "policy_"+a.name+".txt"), build(a).String())
	}
}

func (a *arch) nr(t testing.TB, name string) uint32 {
	for _, n := range a.numbers {
		if n.name == name {
			return n.nr
		}
	}
	t.Fatalf("%s has no %s", a.name, name)
	return 0
}

func TestDefaultVerdicts(t *testing.T) {
	const (
		eperm, enosys = Action(0x50001), Action(0x50026)
		high          = 0xdead_beef << 32
	)
	for _, c := range []struct {
		call string
		args [6]uint64
		want Action
	}{
		{"read", [6]uint64{}, Allow},
		{"execve", [6]uint64{}, Allow},
		{"clone", [6]uint64{0x01200011}, Allow},        // fork
		{"clone", [6]uint64{0x003d0f00}, Allow},        // a thread
		{"clone", [6]uint64{0x10000000 | 0x11}, eperm}, // CLONE_NEWUSER
		{"clone", [6]uint64{0x40000000 | 0x11}, eperm}, // CLONE_NEWNET
		{"clone3", [6]uint64{}, enosys},
		{"openat2", [6]uint64{}, enosys},
		{"unshare", [6]uint64{0x10000000}, eperm},
		{"setns", [6]uint64{}, eperm},
		{"mount", [6]uint64{}, eperm},
		{"bpf", [6]uint64{}, eperm},
		{"io_uring_setup", [6]uint64{}, eperm},
		{"ptrace", [6]uint64{}, eperm},
		{"keyctl", [6]uint64{}, eperm},
		{"add_key", [6]uint64{}, eperm},
		{"userfaultfd", [6]uint64{}, eperm},
		{"socket", [6]uint64{1, 1}, Allow},
		{"socket", [6]uint64{2, 1, 6}, Allow},
		{"socket", [6]uint64{10, 2}, Allow},
		{"socket", [6]uint64{16, 3, 0}, Allow},
		{"socket", [6]uint64{16 | high, 3, high}, Allow}, // ints: the kernel sees the low half
		{"socket", [6]uint64{16, 3, 12}, eperm},          // NETLINK_NETFILTER
		{"socket", [6]uint64{16, 3, 6}, eperm},           // NETLINK_XFRM
		{"socket", [6]uint64{16, 3, 16}, eperm},          // NETLINK_GENERIC
		{"socket", [6]uint64{17, 3}, eperm},              // AF_PACKET
		{"socket", [6]uint64{33, 5}, eperm},              // AF_RXRPC
		{"socket", [6]uint64{38, 5}, eperm},              // AF_ALG
		{"socket", [6]uint64{38 | high, 5}, eperm},
		{"socket", [6]uint64{40, 1}, eperm}, // AF_VSOCK
		{"socketpair", [6]uint64{1, 1}, Allow},
		{"socketpair", [6]uint64{2, 1}, eperm},
		{"ioctl", [6]uint64{0, 0x5401}, Allow},
		{"ioctl", [6]uint64{0, 0x5412}, eperm},
		{"ioctl", [6]uint64{0, 0x5412 | high}, eperm}, // CVE-2019-10063
		{"ioctl", [6]uint64{0, 0x541c | 1<<32}, eperm},
		{"fchmod", [6]uint64{3, 0o755}, Allow},
		{"fchmod", [6]uint64{3, 0o4755}, eperm},
		{"fchmod", [6]uint64{3, 0o2755 | high}, eperm},
		{"fchmodat", [6]uint64{3, 0, 0o6755}, eperm},
		{"mkdirat", [6]uint64{3, 0, 0o2755}, eperm},
		{"mkdirat", [6]uint64{3, 0, 0o1777}, Allow},
		{"mknodat", [6]uint64{3, 0, 0o104755}, eperm},
		{"openat", [6]uint64{3, 0, 0, 0o4755}, Allow}, // makes no file: the mode is what lay in the register
		{"openat", [6]uint64{3, 0, 0o101, 0o644}, Allow},
		{"openat", [6]uint64{3, 0, 0o101, 0o4644}, eperm},
		{"openat", [6]uint64{3, 0, 0o20000002, 0o2644}, eperm}, // O_TMPFILE
		{"personality", [6]uint64{0}, Allow},
		{"personality", [6]uint64{0xffffffff}, Allow},
		{"personality", [6]uint64{0x40000}, eperm}, // ADDR_NO_RANDOMIZE
		{"personality", [6]uint64{0 | 1<<32}, eperm},
	} {
		for _, a := range []*arch{amd64, arm64} {
			f, err := build(a).compile(a)
			require.NoError(t, err)
			got, _, err := bpfsim.Run(f, bpfsim.Data{Nr: a.nr(t, c.call), Arch: a.auditID, Args: c.args})
			require.NoError(t, err)
			require.Equal(t, c.want, Action(got), "%s %s%#x: %s", a.name, c.call, c.args, Action(got))
		}
	}
}

func TestForeignABIsAreKilledAndUnknownCallsUnimplemented(t *testing.T) {
	f, err := build(amd64).compile(amd64)
	require.NoError(t, err)
	for _, c := range []struct {
		arch, nr uint32
		want     Action
	}{
		{0x40000003, 1, Kill}, // i386
		{0x40000003, 0xffffffff, Kill},
		{0xc00000b7, 1, Kill},
		{amd64.auditID, 0x40000000, Kill}, // x32 read
		{amd64.auditID, 0x40000000 + 520, Kill},
		{amd64.auditID, 0x80000000, Kill},
		{amd64.auditID, 0xfffffffe, Kill},
		{amd64.auditID, 0xffffffff, 0x50026},
		{amd64.auditID, 340, 0x50026}, // a hole in the table
		{amd64.auditID, 9999, 0x50026},
	} {
		got, _, err := bpfsim.Run(f, bpfsim.Data{Arch: c.arch, Nr: c.nr})
		require.NoError(t, err)
		require.Equal(t, c.want, Action(got), "%#x %#x: %s", c.arch, c.nr, Action(got))
	}
}

// The walk through the filter is paid at every system call.
func TestFilterStaysShort(t *testing.T) {
	for _, a := range []*arch{amd64, arm64} {
		f, err := build(a).compile(a)
		require.NoError(t, err)
		require.LessOrEqual(t, len(f)/8, 450)
		for _, n := range a.numbers {
			_, steps, err := bpfsim.Run(f, bpfsim.Data{Nr: n.nr, Arch: a.auditID})
			require.NoError(t, err)
			require.LessOrEqual(t, steps, 40, n.name)
		}
	}
}

// Nothing is allowed that moby refuses a process without capabilities, and
// what moby allows is either allowed, conditional or refused with a reason.
func TestEveryDifferenceToMobyHasAReason(t *testing.T) {
	want, caps := mobyAllows()
	ours := map[string][]Rule{}
	for _, a := range []*arch{amd64, arm64} {
		for _, r := range build(a).rules {
			ours[r.Name] = append(ours[r.Name], r)
			if r.Action == Allow {
				require.True(t, want[r.Name], "%s is allowed, but not by moby (it asks for %v)", r.Name, caps[r.Name])
			} else {
				require.NotEmpty(t, r.Reason, r.Name)
			}
		}
	}
	for name := range want {
		require.NotEmpty(t, ours[name], "moby allows %s, we say nothing; go generate ./seccomp", name)
	}
	for _, r := range removed {
		require.NotEmpty(t, r.reason, r.name)
	}
}

func mobyAllows() (allows map[string]bool, caps map[string][]string) {
	allows, caps = map[string]bool{}, map[string][]string{}
	for _, s := range moby.DefaultProfile().Syscalls {
		if s.Action != specs.ActAllow {
			continue
		}
		foreign := s.Includes != nil && len(s.Includes.Arches) > 0 &&
			!slices.Contains(s.Includes.Arches, "amd64") && !slices.Contains(s.Includes.Arches, "arm64")
		for _, n := range s.Names {
			switch {
			case foreign:
			case s.Includes != nil && len(s.Includes.Caps) > 0:
				caps[n] = append(caps[n], s.Includes.Caps...)
			default:
				allows[n] = true
			}
		}
	}
	return allows, caps
}

func TestDigestDependsOnEveryPart(t *testing.T) {
	base := build(amd64)
	seen := map[string]string{base.Digest(): "the default"}
	require.Equal(t, base.Digest(), build(amd64).Digest(), "it is not deterministic")
	for name, change := range map[string]func(p *Policy){
		"default": func(p *Policy) { p.deflt = Kill },
		"unknown": func(p *Policy) { p.unknown = Kill },
		"foreign": func(p *Policy) { p.foreign = Errno(1) },
		"action":  func(p *Policy) { p.rules[0].Action = Kill },
		"name":    func(p *Policy) { p.rules[0].Name += "x" },
		"dropped": func(p *Policy) { p.rules = p.rules[1:] },
		"args":    func(p *Policy) { p.rules[0].Args = []Arg{{Index: 1}} },
		"value":   func(p *Policy) { p.rules[0].Args = []Arg{{Index: 1, Value: 1}} },
		"op":      func(p *Policy) { p.rules[0].Args = []Arg{{Index: 1, Value: 1, Op: EqualLow32}} },
	} {
		p := build(amd64)
		change(p)
		require.NotContains(t, seen, p.Digest(), name)
		seen[p.Digest()] = name
	}
}

func TestRulesAreACopy(t *testing.T) {
	before := Default().Digest()
	for _, r := range Default().Rules() {
		for i := range r.Args {
			r.Args[i].Value = 99
		}
	}
	require.Equal(t, before, build(native).Digest())
	require.Equal(t, before, Default().Digest())
}

func TestCompileRefusesWhatCannotBe(t *testing.T) {
	many := make([]Arg, 120)
	for _, r := range []Rule{
		{Name: "read", Args: []Arg{{Index: 6}}},
		{Name: "read", Args: []Arg{{Op: 9}}},
		{Name: "read", Args: []Arg{{Op: MaskedEqual, Mask: 1, Value: 2}}},
		{Name: "read", Args: []Arg{{Op: EqualLow32, Value: 1 << 32}}},
		{Name: "read", Args: many},
	} {
		_, err := (&Policy{rules: []Rule{r}}).Compile()
		require.ErrorContains(t, err, "compile rule for read: ")
	}
	var rules []Rule
	for range 2000 {
		rules = append(rules, Rule{Name: "read", Args: []Arg{{Index: 1, Value: 1}}})
	}
	_, err := (&Policy{rules: rules}).Compile()
	require.ErrorContains(t, err, "the kernel takes 4096")
}

// decide is the meaning of a policy, written without any BPF.
func decide(p *Policy, a *arch, d bpfsim.Data) Action {
	if d.Arch != a.auditID {
		return p.foreign
	}
	if a.x32Bit != 0 && d.Nr >= a.x32Bit && d.Nr != 0xffffffff {
		return p.foreign
	}
	for _, n := range a.numbers {
		if n.nr != d.Nr {
			continue
		}
		for _, r := range p.rules {
			if r.Name != n.name {
				continue
			}
			all := true
			for _, c := range r.Args {
				v := d.Args[c.Index]
				all = all && (c.Op == Equal && v == c.Value || c.Op == MaskedEqual && v&c.Mask == c.Value || c.Op == EqualLow32 && uint32(v) == uint32(c.Value))
			}
			if all {
				return r.Action
			}
		}
		return p.deflt
	}
	return p.unknown
}

// FuzzCompile makes policies out of bytes and compares the filter's verdict
// with the policy's meaning.
func FuzzCompile(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x03\x04\x05\x06\x07\x08"), uint32(0), uint64(0), uint64(0))
	f.Add([]byte("socketioctlclonechmodopenat"), uint32(41), uint64(16), uint64(0x5412))
	f.Fuzz(func(t *testing.T, b []byte, nr uint32, v0, v1 uint64) {
		for _, a := range []*arch{amd64, arm64} {
			p := &Policy{deflt: Errno(1), unknown: Errno(38), foreign: Kill}
			for i := 0; i+4 <= len(b) && i < 100; i += 4 {
				r := Rule{Name: a.numbers[(int(b[i])|int(b[i+1])<<8)%len(a.numbers)].name, Action: Errno(2) + Action(b[i+1]%8)}
				for range b[i+2] % 3 {
					c := Arg{Index: (b[i+3] + uint8(len(r.Args))) % 2, Op: Op(b[i+2] >> 6), Value: uint64(b[i+3])<<(b[i+2]&48) | uint64(b[i+1]&3)}
					switch c.Op {
					case MaskedEqual:
						c.Mask = c.Value | uint64(b[i])<<30
					case EqualLow32:
						c.Value &= 0xffffffff
					case 3:
						c.Op = Equal
					}
					r.Args = append(r.Args, c)
				}
				p.rules = append(p.rules, r)
				v0 ^= uint64(len(r.Args)) // near what is compared
			}
			filter, err := p.compile(a)
			if err != nil {
				t.Fatal(err)
			}
			datas := []bpfsim.Data{{Nr: nr, Arch: a.auditID, Args: [6]uint64{v0, v1}}, {Nr: nr % 512, Arch: a.auditID, Args: [6]uint64{v0, v1}}, {Nr: nr, Arch: uint32(v0)}}
			for _, r := range p.rules {
				d := bpfsim.Data{Nr: a.nr(t, r.Name), Arch: a.auditID, Args: [6]uint64{v0, v1}}
				for _, c := range r.Args {
					d.Args[c.Index] = c.Value
				}
				datas = append(datas, d)
				d.Args[0] ^= v1
				datas = append(datas, d)
			}
			for _, d := range datas {
				got, _, err := bpfsim.Run(filter, d)
				if err != nil {
					t.Fatal(err)
				}
				if want := decide(p, a, d); Action(got) != want {
					t.Fatalf("%s %+v: filter says %s, policy %s\n%s", a.name, d, Action(got), want, p)
				}
			}
		}
	})
}

// TestDocs keeps docs/seccomp.md what the policy is.
func TestDocs(t *testing.T) {
	var b strings.Builder
	out := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	out("<!-- Written by `go test ./seccomp -run TestDocs -update`; do not edit. -->\n")
	out("# The system call policy\n")
	out("Every sandbox runs behind this filter. It starts from moby's default profile (`github.com/moby/profiles/seccomp` v0.3.0) for a")
	out("process without capabilities, and refuses more. It is compiled once to BPF for the machine's own architecture (x86_64, arm64),")
	out("kept in the state directory by its digest, and cannot be changed from inside.\n")
	out("| a call that is | gets |\n|---|---|")
	out("| allowed below | done |\n| refused | `EPERM`, or `ENOSYS` where callers know to fall back |\n| newer than our tables | `ENOSYS` |\n| of another ABI (i386, x32) | the process is killed by SIGSYS |\n")
	out("## Refused, though moby allows it, or asks for a capability\n")
	out("| call | answer | why |\n|---|---|---|")
	p := build(amd64)
	uncond := map[string]bool{}
	for _, r := range p.rules {
		if r.Action != Allow && len(r.Args) == 0 {
			uncond[r.Name] = true
			out("| `%s` | %s | %s |", r.Name, r.Action, r.Reason)
		}
	}
	out("\n## Allowed or refused by its arguments\n")
	out("The first line that holds decides; if none does, the answer is EPERM. `(u32)` compares the low 32 bits, which are all that the kernel looks at.\n")
	out("| call | if | then | why |\n|---|---|---|---|")
	cond := map[string]bool{}
	for _, r := range p.rules {
		if len(r.Args) > 0 {
			cond[r.Name] = true
		}
	}
	for _, r := range p.rules {
		if cond[r.Name] {
			why := r.Reason
			if why == "" {
				why = conditionWhy[r.Name]
			}
			args := strings.TrimSuffix(strings.TrimPrefix(argsString(r.Args), "("), ")")
			if args == "" {
				args = "otherwise"
			} else {
				args = "`" + args + "`"
			}
			out("| `%s` | %s | %s | %s |", r.Name, args, r.Action, why)
		}
	}
	allows, caps := mobyAllows()
	out("\n## Refused as moby refuses it (EPERM)\n")
	out("| call | why |\n|---|---|")
	names := map[string]bool{}
	for _, n := range append(slices.Clone(numbersAMD64), numbersARM64...) {
		names[n.name] = true
	}
	allowed := map[string]bool{}
	for _, a := range []*arch{amd64, arm64} {
		for _, r := range build(a).rules {
			allowed[r.Name] = allowed[r.Name] || r.Action == Allow
		}
	}
	for _, n := range sortedKeys(names) {
		if allowed[n] || uncond[n] || allows[n] {
			continue
		}
		why := "moby's profile leaves it out: obsolete, privileged, or newer than the profile"
		if c := caps[n]; len(c) > 0 {
			slices.Sort(c)
			why = "needs " + strings.Join(slices.Compact(c), " or ") + ", which no sandbox has"
		}
		out("| `%s` | %s |", n, why)
	}
	out("\n## Allowed\n")
	var list []string
	for _, n := range sortedKeys(allowed) {
		if allowed[n] && !cond[n] && names[n] {
			list = append(list, "`"+n+"`")
		}
	}
	out("%s", strings.Join(list, ", "))
	golden(t, "../docs/seccomp.md", b.String())
}

var conditionWhy = map[string]string{
	"clone":       "threads and processes, but no new namespaces: they give capabilities over more of the kernel (CVE-2022-0185)",
	"socket":      "UNIX, INET, INET6 and routing information; all other families are attack surface that jobs do not need (AF_ALG, AF_VSOCK, AF_PACKET, AF_RXRPC, xfrm)",
	"socketpair":  "UNIX is the only family that has pairs of use",
	"personality": "moby's list: Linux, Linux32, UNAME26 and asking; not ADDR_NO_RANDOMIZE",
}

func sortedKeys(m map[string]bool) []string {
	var k []string
	for n := range m {
		k = append(k, n)
	}
	sort.Strings(k)
	return k
}

func TestBakedFilter(t *testing.T) {
	for _, a := range []*arch{amd64, arm64} {
		p := build(a)
		f, err := p.compile(a)
		require.NoError(t, err)
		golden(t, "baked_"+a.name+".bpf", string(f))
		golden(t, "baked_"+a.name+".digest", p.digestFor(a))
	}
	require.Equal(t, Default().Digest(), DefaultDigest())
	want, err := Default().Compile()
	require.NoError(t, err)
	require.Equal(t, want, DefaultFilter())
}
