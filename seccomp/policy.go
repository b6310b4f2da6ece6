// Package seccomp owns the system call policy of sandboxes: what is allowed,
// why something is not, and its compilation to BPF. It must never know
// sandboxes or engines: it gives bytes.
package seccomp

//go:generate go run ./gen

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Op compares an argument.
type Op uint8

// The comparisons. All but EqualLow32 look at 64 bits.
const (
	Equal       Op = iota // arg == Value
	MaskedEqual           // arg & Mask == Value
	EqualLow32            // the low 32 bits == Value: what the kernel looks at where the parameter is an int
)

// Arg is one condition.
type Arg struct {
	Index uint8 // 0 to 5
	Op    Op
	Value uint64
	Mask  uint64 // MaskedEqual only
}

// Action is what happens to a call: a SECCOMP_RET_* value.
type Action uint32

// The actions in use.
const (
	Allow Action = 0x7fff0000
	Kill  Action = 0x80000000 // the whole process, by SIGSYS
)

// Errno refuses a call with e.
func Errno(e unix.Errno) Action { return 0x00050000 | Action(e) }

// String names the action.
func (a Action) String() string {
	switch {
	case a == Allow:
		return "allow"
	case a == Kill:
		return "kill"
	}
	return unix.ErrnoName(unix.Errno(a & 0xffff))
}

// Rule decides about one system call. The rules of a call are tried in order;
// the first whose conditions all hold decides, the policy's default if none.
type Rule struct {
	Name   string
	Args   []Arg
	Action Action
	Reason string // why, where it is not simply allowed
}

// Policy is a set of rules. It does not change once it is made.
type Policy struct {
	rules   []Rule
	deflt   Action // for calls the tables know
	unknown Action // for calls newer than the tables: ENOSYS, so that callers fall back
	foreign Action // for other architectures' calls
}

// Rules gives a copy of the rules, ordered by name and then by precedence.
func (p *Policy) Rules() []Rule {
	out := append([]Rule{}, p.rules...)
	for i := range out {
		out[i].Args = append([]Arg{}, out[i].Args...)
	}
	return out
}

// String prints the policy, a line a rule.
func (p *Policy) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "default %s\nunknown %s\nforeign %s\n", p.deflt, p.unknown, p.foreign)
	for _, r := range p.rules {
		fmt.Fprintf(&b, "%s%s %s\n", r.Name, argsString(r.Args), r.Action)
	}
	return b.String()
}

func argsString(args []Arg) string {
	var out []string
	for _, a := range args {
		switch a.Op {
		case Equal:
			out = append(out, fmt.Sprintf("arg%d == %#x", a.Index, a.Value))
		case MaskedEqual:
			out = append(out, fmt.Sprintf("arg%d & %#x == %#x", a.Index, a.Mask, a.Value))
		case EqualLow32:
			out = append(out, fmt.Sprintf("(u32)arg%d == %#x", a.Index, a.Value))
		}
	}
	if out == nil {
		return ""
	}
	return "(" + strings.Join(out, " && ") + ")"
}

// compilerVersion changes when the same policy would compile to other bytes.
const compilerVersion = "2"

// Digest identifies the policy and what it compiles to on this architecture:
// "sha256:…".
func (p *Policy) Digest() string { return p.digestFor(native) }

func (p *Policy) digestFor(t *arch) string {
	b := make([]byte, 0, 32<<10)
	str := func(s string) { b = append(append(b, s...), 0) }
	num := func(v uint64) { b = binary.LittleEndian.AppendUint64(b, v) }
	str(compilerVersion)
	str(t.name)
	for _, a := range []Action{p.deflt, p.unknown, p.foreign} {
		num(uint64(a))
	}
	for _, r := range p.rules {
		str(r.Name)
		num(uint64(r.Action))
		num(uint64(len(r.Args)))
		for _, a := range r.Args {
			num(uint64(a.Index)<<8 | uint64(a.Op))
			num(a.Value)
			num(a.Mask)
		}
	}
	// The table decides which numbers are unknown.
	for _, n := range t.numbers {
		str(n.name)
		b = binary.LittleEndian.AppendUint32(b, n.nr)
	}
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

func (p *Policy) sorted() *Policy {
	slices.SortStableFunc(p.rules, func(a, b Rule) int { return strings.Compare(a.Name, b.Name) })
	return p
}
