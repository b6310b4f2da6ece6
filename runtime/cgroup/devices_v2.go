package cgroup

import (
	"encoding/binary"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// limitDevicesV2 attaches the device rule to a v2 group (CONFIG_CGROUP_BPF,
// Linux 4.15). All groups below are bound by it too, so it is attached to the
// shared parent, once. It is the second layer behind nodev, the user namespace
// and the filter: a kernel without it, or a container that refuses bpf(2),
// leaves these.
func limitDevicesV2(dir string) {
	fd, err := open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if n, err := attachedDevicePrograms(fd); err != nil || n > 0 {
		return
	}
	prog, err := loadDeviceProgram()
	if err != nil {
		return
	}
	defer unix.Close(prog)
	attr := struct{ target, prog, kind, flags uint32 }{uint32(fd), uint32(prog), unix.BPF_CGROUP_DEVICE, unix.BPF_F_ALLOW_MULTI}
	_, _ = bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

func bpf(cmd uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	r, _, e := unix.Syscall(unix.SYS_BPF, cmd, uintptr(attr), size)
	if e != 0 {
		return -1, e
	}
	return int(r), nil
}

func attachedDevicePrograms(fd int) (int, error) {
	attr := struct {
		target, kind, flags, attachFlags uint32
		ids                              uint64
		count, pad                       uint32
	}{target: uint32(fd), kind: unix.BPF_CGROUP_DEVICE}
	_, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return int(attr.count), err
}

// loadDeviceProgram compiles [devices] to eBPF: 1 allows, 0 denies. Nothing
// may be made, only opened.
func loadDeviceProgram() (int, error) {
	const (
		ldW  = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
		jne  = unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jset = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		mov  = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K
		movX = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X
		and  = unix.BPF_ALU64 | unix.BPF_AND | unix.BPF_K
		exit = unix.BPF_JMP | unix.BPF_EXIT
	)
	var p []byte
	n := 0
	ins := func(code, dst, src int, off int16, imm int32) {
		p = append(p, byte(code), byte(dst|src<<4))
		p = binary.NativeEndian.AppendUint16(p, uint16(off))
		p = binary.NativeEndian.AppendUint32(p, uint32(imm))
		n++
	}
	// The context: access<<16|type, major, minor. Devices are pairs below.
	chars := [][2]int32{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}}
	allow := 8 + 2*len(chars) + 2 // index of "allow"; "deny" is two before
	ins(ldW, 2, 1, 0, 0)
	ins(ldW, 4, 1, 4, 0)
	ins(ldW, 5, 1, 8, 0)
	ins(movX, 3, 2, 0, 0)
	ins(and, 3, 0, 0, 0xffff)
	ins(jne, 3, 0, int16(allow-2-n-1), unix.BPF_DEVCG_DEV_CHAR)
	ins(jset, 2, 0, int16(allow-2-n-1), unix.BPF_DEVCG_ACC_MKNOD<<16)
	ins(jeq, 4, 0, int16(allow-n-1), 136)
	for _, c := range chars {
		ins(jne, 4, 0, 1, c[0])
		ins(jeq, 5, 0, int16(allow-n-1), c[1])
	}
	ins(mov, 0, 0, 0, 0)
	ins(exit, 0, 0, 0, 0)
	ins(mov, 0, 0, 0, 1)
	ins(exit, 0, 0, 0, 0)

	license := []byte("Apache-2.0\x00")
	var pin runtime.Pinner // the kernel gets addresses: what they name must stay where it is
	defer pin.Unpin()
	pin.Pin(&p[0])
	pin.Pin(&license[0])
	attr := struct {
		kind, count           uint32
		insns, license        uint64
		level, size           uint32
		log                   uint64
		kernelVersion, flags  uint32
		name                  [16]byte
		ifindex, expectedType uint32
	}{kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(n), insns: uint64(uintptr(unsafe.Pointer(&p[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0])))}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return fd, err
}
