package seccomp

import (
	"encoding/binary"
	"fmt"
	"sort"
)

// Filter is an array of struct sock_filter for this machine.
type Filter []byte

// insn is one BPF instruction.
type insn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

// The instructions in use (linux/bpf_common.h).
const (
	ldAbs  = 0x20 // A = data[k]
	jeqK   = 0x15
	jgeK   = 0x35
	jaK    = 0x05
	andK   = 0x54
	retK   = 0x06
	offNr  = 0
	offArc = 4
	offArg = 16 // low word first: both architectures are little-endian
)

// maxInsns is the kernel's BPF_MAXINSNS.
const maxInsns = 4096

// span is a range of numbers, from lo on, that one block decides.
type span struct {
	lo    uint32
	block []insn
	key   string
}

// Compile gives the filter for this architecture: a check of the architecture,
// then a binary search over ranges of numbers. A rule that no filter can
// express is an error.
func (p *Policy) Compile() (Filter, error) { return p.compile(native) }

func (p *Policy) compile(t *arch) (Filter, error) {
	nrs := make(map[string]uint32, len(t.numbers))
	last := uint32(0)
	for _, n := range t.numbers {
		nrs[n.name], last = n.nr, max(last, n.nr)
	}
	known := make([]bool, last+1)
	for _, n := range t.numbers {
		known[n.nr] = true
	}
	byNr := map[uint32][]Rule{}
	for _, r := range p.rules {
		if nr, ok := nrs[r.Name]; ok { // others are not of this architecture
			byNr[nr] = append(byNr[nr], r)
		}
	}
	var spans []span
	for nr := uint32(0); nr <= last; nr++ {
		block, err := p.block(byNr[nr])
		if err != nil {
			return nil, err
		}
		if !known[nr] && len(byNr[nr]) == 0 {
			block = []insn{{retK, 0, 0, uint32(p.unknown)}}
		}
		key := fmt.Sprint(block)
		if n := len(spans); n == 0 || spans[n-1].key != key || len(block) > 1 {
			spans = append(spans, span{nr, block, key})
		}
	}
	spans = append(spans, span{lo: last + 1, block: []insn{{retK, 0, 0, uint32(p.unknown)}}})

	prog := []insn{
		{ldAbs, 0, 0, offArc},
		{jeqK, 1, 0, t.auditID},
		{retK, 0, 0, uint32(p.foreign)},
		{ldAbs, 0, 0, offNr},
	}
	if t.x32Bit != 0 {
		// Calls of the x32 ABI come with the native architecture and this bit.
		// -1 is no call of any ABI: a tracer's way to skip one.
		prog = append(prog, insn{jgeK, 0, 2, t.x32Bit}, insn{jeqK, 1, 0, 0xffffffff}, insn{retK, 0, 0, uint32(p.foreign)})
	}
	prog = append(prog, search(spans)...)
	if len(prog) > maxInsns {
		return nil, fmt.Errorf("compile policy: %d instructions, the kernel takes %d", len(prog), maxInsns)
	}
	out := make(Filter, 0, 8*len(prog))
	for _, i := range prog {
		out = binary.LittleEndian.AppendUint16(out, i.code)
		out = append(out, i.jt, i.jf)
		out = binary.LittleEndian.AppendUint32(out, i.k)
	}
	return out, nil
}

// search emits a binary search; each leaf decides and returns.
func search(spans []span) []insn {
	if len(spans) == 1 {
		return spans[0].block
	}
	mid := len(spans) / 2
	left, right := search(spans[:mid]), search(spans[mid:])
	var out []insn
	if len(left) <= 255 {
		out = []insn{{jgeK, uint8(len(left)), 0, spans[mid].lo}}
	} else {
		out = []insn{{jgeK, 0, 1, spans[mid].lo}, {jaK, 0, 0, uint32(len(left))}}
	}
	return append(append(out, left...), right...)
}

// block emits the decision about one call: its rules in order, then the default.
func (p *Policy) block(rules []Rule) ([]insn, error) {
	var out []insn
	for _, r := range rules {
		ret := insn{retK, 0, 0, uint32(r.Action)}
		if len(r.Args) == 0 {
			return append(out, ret), nil
		}
		// Every test that fails jumps to the instruction after ret.
		var tests []insn
		var fails []int // the instructions whose failing branch must be set
		args := append([]Arg{}, r.Args...)
		sort.SliceStable(args, func(i, j int) bool { return args[i].Index < args[j].Index })
		for _, a := range args {
			if a.Index > 5 {
				return nil, fmt.Errorf("compile rule for %s: argument %d", r.Name, a.Index)
			}
			lo, hi := uint32(offArg+8*uint32(a.Index)), uint32(offArg+8*uint32(a.Index)+4)
			word := func(off, mask, value uint32, masked bool) {
				tests = append(tests, insn{ldAbs, 0, 0, off})
				if masked {
					tests = append(tests, insn{andK, 0, 0, mask})
				}
				fails = append(fails, len(tests))
				tests = append(tests, insn{jeqK, 0, 0, value})
			}
			if a.Op == MaskedEqual && a.Value&^a.Mask != 0 || a.Op == EqualLow32 && a.Value>>32 != 0 {
				return nil, fmt.Errorf("compile rule for %s: value %#x can never be", r.Name, a.Value)
			}
			switch a.Op {
			case Equal:
				word(hi, 0, uint32(a.Value>>32), false)
				word(lo, 0, uint32(a.Value), false)
			case EqualLow32:
				word(lo, 0, uint32(a.Value), false)
			case MaskedEqual:
				if a.Mask>>32 != 0 {
					word(hi, uint32(a.Mask>>32), uint32(a.Value>>32), true)
				}
				word(lo, uint32(a.Mask), uint32(a.Value), true)
			default:
				return nil, fmt.Errorf("compile rule for %s: comparison %d", r.Name, a.Op)
			}
		}
		if len(tests) > 200 { // jumps are 8 bits
			return nil, fmt.Errorf("compile rule for %s: %d conditions", r.Name, len(r.Args))
		}
		for _, i := range fails {
			tests[i].jf = uint8(len(tests) - i) // past ret
		}
		out = append(append(out, tests...), ret)
	}
	return append(out, insn{retK, 0, 0, uint32(p.deflt)}), nil
}
