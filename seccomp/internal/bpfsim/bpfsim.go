// Package bpfsim interprets seccomp filters, for tests: a second, independent
// reading of the bytes that the kernel gets. It must never know policies.
package bpfsim

import (
	"encoding/binary"
	"fmt"
)

// Data is struct seccomp_data.
type Data struct {
	Nr   uint32
	Arch uint32
	IP   uint64
	Args [6]uint64
}

// Run gives the filter's verdict (a SECCOMP_RET_* value) and the number of
// instructions that it took. A filter that the kernel would refuse, as far as
// the path taken shows it, is an error.
func Run(filter []byte, d Data) (verdict uint32, steps int, err error) {
	if len(filter) == 0 || len(filter)%8 != 0 || len(filter)/8 > 4096 {
		return 0, 0, fmt.Errorf("interpret filter: %d bytes", len(filter))
	}
	var mem [64]byte
	binary.LittleEndian.PutUint32(mem[0:], d.Nr)
	binary.LittleEndian.PutUint32(mem[4:], d.Arch)
	binary.LittleEndian.PutUint64(mem[8:], d.IP)
	for i, a := range d.Args {
		binary.LittleEndian.PutUint64(mem[16+8*i:], a)
	}
	var acc, x uint32
	var scratch [16]uint32
	for pc := 0; pc < len(filter)/8; pc++ {
		steps++
		in := filter[8*pc:]
		code, jt, jf, k := binary.LittleEndian.Uint16(in), int(in[2]), int(in[3]), binary.LittleEndian.Uint32(in[4:])
		jump := func(yes bool) {
			if yes {
				pc += jt
			} else {
				pc += jf
			}
		}
		switch code {
		case 0x20: // ld [k]
			if k%4 != 0 || k > 60 {
				return 0, steps, fmt.Errorf("interpret filter: load at %d", k)
			}
			acc = binary.LittleEndian.Uint32(mem[k:])
		case 0x00: // ld #k
			acc = k
		case 0x60: // ld M[k]
			acc = scratch[k&15]
		case 0x02: // st M[k]
			scratch[k&15] = acc
		case 0x07: // tax
			x = acc
		case 0x87: // txa
			acc = x
		case 0x54: // and #k
			acc &= k
		case 0x05: // ja
			pc += int(k)
		case 0x15: // jeq #k
			jump(acc == k)
		case 0x25: // jgt #k
			jump(acc > k)
		case 0x35: // jge #k
			jump(acc >= k)
		case 0x45: // jset #k
			jump(acc&k != 0)
		case 0x06: // ret #k
			return k, steps, nil
		default:
			return 0, steps, fmt.Errorf("interpret filter: instruction %#x", code)
		}
	}
	return 0, steps, fmt.Errorf("interpret filter: ran off its end")
}
