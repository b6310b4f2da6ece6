package seccomp

import (
	"bytes"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sbxrun/sbxrun/seccomp/internal/bpfsim"
)

// oracleRules says what the default policy means in libseccomp's terms, where
// rules have no order: the refusals are written as the complement of what is
// allowed, by hand, so that a mistake in default.go is not copied.
func oracleRules(name string) (rules [][]Arg, known bool) {
	masked := func(i uint8, mask, v uint64) Arg { return Arg{Index: i, Op: MaskedEqual, Mask: mask, Value: v} }
	one := func(a ...Arg) [][]Arg { return [][]Arg{a} }
	// differs: the low 32 bits of argument i are not 1, so one of them differs;
	// together with what must hold besides.
	differs := func(i uint8, and ...Arg) (rules [][]Arg) {
		for b := range uint(32) {
			m := uint64(1) << b
			rules = append(rules, append(append([]Arg{}, and...), masked(i, m, ^uint64(1)&m)))
		}
		return rules
	}
	// large: the low 32 bits of argument 0 are above 3.
	large := func() (rules [][]Arg) {
		for b := uint(2); b < 32; b++ {
			rules = append(rules, one(masked(0, 1<<b, 1<<b))...)
		}
		return rules
	}
	switch name {
	case "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "prlimit64":
		return differs(0), true
	case "setpriority": // 0 and 1 not for process 1, never 2
		return append(append(large(), one(masked(0, 0xffffffff, 3))...), differs(1, masked(0, 0xfffffffe, 0))...), true
	case "ioprio_set": // 1 and 2 not for process 1, never 3
		rules = append(large(), one(masked(0, 0xffffffff, 0))...)
		rules = append(rules, differs(1, masked(0, 0xffffffff, 1))...)
		return append(rules, differs(1, masked(0, 0xffffffff, 2))...), true
	case "chmod", "fchmod", "creat", "mkdir", "mknod":
		return one(masked(1, 0o6000, 0)), true
	case "fchmodat", "fchmodat2", "mkdirat", "mknodat":
		return one(masked(2, 0o6000, 0)), true
	case "open", "openat":
		i := uint8(1)
		if name == "openat" {
			i = 2
		}
		return [][]Arg{{masked(i, 0o20000100, 0)}, {masked(i+1, 0o6000, 0)}}, true
	case "clone":
		return one(masked(0, 0x7E020000, 0)), true
	case "socket":
		u32 := func(i uint8, v uint64) Arg { return masked(i, 0xffffffff, v) }
		return [][]Arg{{u32(0, 1)}, {u32(0, 2)}, {u32(0, 10)}, {u32(0, 16), u32(2, 0)}}, true
	case "socketpair":
		return one(masked(0, 0xffffffff, 1)), true
	case "personality":
		for _, v := range []uint64{0, 8, 0x20000, 0x20008, 0xffffffff} {
			rules = append(rules, []Arg{{Index: 0, Op: Equal, Value: v}})
		}
		return rules, true
	case "ioctl":
		// Not 0x5412 and not 0x541c in the low 32 bits: another bit differs,
		// or the three bits in which those two differ are neither's.
		for b := range uint(32) {
			if m := uint64(1) << b; m&0xe == 0 {
				rules = append(rules, []Arg{masked(1, m, ^uint64(0x5412)&m)})
			}
		}
		for _, v := range []uint64{0x0, 0x4, 0x6, 0x8, 0xa, 0xe} {
			rules = append(rules, []Arg{masked(1, 0xe, v)})
		}
		return rules, true
	}
	return nil, false
}

// TestAgainstLibseccomp compares our compiler and policy with libseccomp's
// verdicts, for both architectures.
func TestAgainstLibseccomp(t *testing.T) {
	cc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("needs gcc and libseccomp-dev, to compile with libseccomp")
	}
	bin := filepath.Join(t.TempDir(), "oracle")
	if out, err := exec.Command(cc, "-O1", "-Wall", "-o", bin, "testdata/oracle.c", "-lseccomp").CombinedOutput(); err != nil {
		if bytes.Contains(out, []byte("seccomp.h")) || bytes.Contains(out, []byte("-lseccomp")) {
			t.Skipf("needs libseccomp-dev, to compile with libseccomp: %s", bytes.SplitN(out, []byte("\n"), 2)[0])
		}
		t.Fatalf("compile the oracle: %v\n%s", err, out)
	}
	for _, a := range []*arch{amd64, arm64} {
		t.Run(a.name, func(t *testing.T) {
			nrs := map[string]uint32{}
			for _, n := range a.numbers {
				nrs[n.name] = n.nr
			}
			p := build(a)
			var in strings.Builder
			done := map[string]bool{}
			for _, r := range p.rules {
				nr, ok := nrs[r.Name]
				if !ok || done[r.Name] {
					continue
				}
				conds, special := oracleRules(r.Name)
				action := Allow
				switch {
				case special:
					done[r.Name] = true
				case r.Action == p.deflt:
					continue // libseccomp refuses a rule that says the default
				default:
					if len(r.Args) > 0 {
						t.Fatalf("%s has conditions that the oracle was not told", r.Name)
					}
					action, conds = r.Action, [][]Arg{nil}
				}
				for _, c := range conds {
					fmt.Fprintf(&in, "%s %d %d %d", r.Name, nr, uint32(action), len(c))
					for _, x := range c {
						op := 0
						if x.Op == MaskedEqual {
							op = 1
						}
						fmt.Fprintf(&in, " %d %d %d %d", x.Index, op, x.Mask, x.Value)
					}
					in.WriteByte('\n')
				}
			}
			cmd := exec.Command(bin, a.name)
			cmd.Stdin, cmd.Stderr = strings.NewReader(in.String()), os.Stderr
			theirs, err := cmd.Output()
			if err != nil {
				t.Fatalf("oracle: %v", err)
			}
			ours, err := p.compile(a)
			if err != nil {
				t.Fatal(err)
			}
			known := map[uint32]bool{}
			for _, n := range a.numbers {
				known[n.nr] = true
			}
			rnd := rand.New(rand.NewSource(1))
			n, differ := 0, 0
			check := func(d bpfsim.Data) {
				got, _, err := bpfsim.Run(ours, d)
				if err != nil {
					t.Fatal(err)
				}
				want, _, err := bpfsim.Run(theirs, d)
				if err != nil {
					t.Fatal(err)
				}
				if d.Arch == a.auditID && !known[d.Nr] && want == uint32(p.deflt) {
					want = uint32(p.unknown) // libseccomp has no such thing
				}
				if a == arm64 && d.Arch == a.auditID && newerThanLibrary[d.Nr] {
					return
				}
				n++
				if got != want {
					if differ++; differ < 10 {
						t.Errorf("nr %d args %#x: ours %#x, libseccomp %#x", d.Nr, d.Args, got, want)
					}
				}
			}
			for nr := range uint32(520) {
				for range 60 {
					d := bpfsim.Data{Nr: nr, Arch: a.auditID, IP: rnd.Uint64()}
					for i := range d.Args {
						d.Args[i] = sample(rnd)
					}
					check(d)
				}
			}
			for range 5000 {
				d := bpfsim.Data{Nr: uint32(rnd.Intn(512)), Arch: rnd.Uint32()}
				check(d)
				if a.x32Bit != 0 {
					d.Arch, d.Nr = a.auditID, d.Nr|a.x32Bit
					check(d)
				}
			}
			check(bpfsim.Data{Nr: 0xffffffff, Arch: a.auditID})
			t.Logf("%d samples; ours %d instructions, libseccomp's %d", n, len(ours)/8, len(theirs)/8)
		})
	}
}

// newerThanLibrary is what an older libseccomp has no name for; on the foreign
// architecture it takes calls by name only.
var newerThanLibrary = func() map[uint32]bool {
	m := map[uint32]bool{}
	for _, n := range numbersARM64 {
		if n.nr >= 424 {
			m[n.nr] = true
		}
	}
	return m
}()

// sample gives values at which a comparison may err: the ones in the policy,
// with bits turned, and with something in the high half.
func sample(rnd *rand.Rand) uint64 {
	vals := []uint64{
		0, 1, 2, 3, 8, 10, 15, 16, 17, 38, 40, 0o100, 0o20000000, 0o4000, 0o2000, 0o4755, 0o2755, 0o644, 0x5412, 0x541c, 0x5413, 0x5401,
		0x20000, 0x20008, 0xffffffff, 0x7e020000, 0x10000000, 0x01200011, 0x7fffffff,
	}
	v := vals[rnd.Intn(len(vals))]
	switch rnd.Intn(6) {
	case 0:
		v |= rnd.Uint64() << 32
	case 1:
		v ^= 1 << rnd.Intn(64)
	case 2:
		v = rnd.Uint64()
	}
	return v
}
