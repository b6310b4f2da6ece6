package direct

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

// code is an operation of init/stage.c; keep both in step.
type code uint32

const (
	opJoin code = iota + 1
	opUnshare
	opIDs
	opFsmount
	opAttach
	opMkdir
	opMask
	opReadonly
	opHostname
	opTTY
	opPivot
	opChdir
	opDrop
	opBound
	opPark
)

// op is one operation. a and b are slots of descriptors or ids.
type op struct {
	code  code
	a, b  int32
	flags uint64
	data  []string // each ends with a NUL
	raw   []byte   // instead of data
	// what says it in words, for an error: "mount tmpfs on", "/dev/shm".
	what, object string
}

// Flags of opAttach.
const (
	targetFolder = 1 << iota // what is missing at the end is made as a folder
	targetNoLink             // no symbolic link may be on the way
)

const (
	procSlot = 0 // made by stage.c itself
	// maxFDs is what stage.c has room for (NFD), maxOps for bytes of one message.
	maxFDs = 512
	maxOps = 60 << 10
)

// program is a launch being compiled: operations, and the descriptors they
// name. Slots are given in the order in which pid 1 gets or makes descriptors.
type program struct {
	ops   []op // all, also those that were handed over: for errors
	next  int32
	dev   int32
	made  map[int]int32 // index of a mount → slot of what was made for it
	devpt int32
}

// part is what one hand-over brings.
type part struct {
	ops  []op
	send []*os.File
}

func (p *program) file(t *part, f *os.File) int32 {
	t.send = append(t.send, f)
	p.next++
	return p.next
}

// before compiles what needs no root: the order is the safety of it. The group
// is joined before the namespace that makes it the root that is seen; ids are
// the sandbox's before anything is mounted; procfs is masked before it is
// anywhere that the sandbox can see.
func (p *program) before(l *engine.Launch, dev *os.File, nodes []engine.Mount) (*part, error) {
	t := &part{}
	add := func(o op) { t.ops = append(t.ops, o) }
	p.dev = p.file(t, dev)
	for _, f := range l.CgroupTasks {
		add(op{code: opJoin, a: p.file(t, f), what: "enter cgroup", object: f.Name()})
	}
	add(op{code: opUnshare, flags: unix.CLONE_NEWCGROUP, what: "make cgroup namespace"})
	add(op{code: opIDs, what: "become the sandbox's root"})
	add(op{code: opHostname, data: []string{l.Hostname}, what: "set host name", object: l.Hostname})
	add(op{code: opBound, what: "empty the bounding set"})
	// Before Linux 6.15 only attached mounts can be cloned or mounted on: until
	// the root is there they lie over the host's, in pid 1's namespace alone.
	add(op{code: opPark, a: procSlot, data: []string{"/proc"}, what: "attach procfs"})
	add(op{code: opPark, a: p.dev, data: []string{"/dev"}, what: "attach /dev"})
	for _, m := range nodes {
		add(op{code: opAttach, a: p.file(t, m.Tree), b: p.dev, data: []string{m.Target}, what: "mount on", object: "/dev/" + m.Target})
	}
	for _, h := range []struct {
		code  code
		paths []string
	}{{opMask, l.MaskPaths}, {opReadonly, l.ReadonlyPaths}} {
		for _, path := range h.paths {
			name, ok := strings.CutPrefix(path, "/proc/")
			if !ok {
				return nil, fmt.Errorf("launch: hide %q: not below /proc", path)
			}
			add(op{code: h.code, a: procSlot, b: p.dev, data: []string{name}, what: "hide", object: path})
		}
	}
	p.made = map[int]int32{}
	for i, m := range l.Mounts {
		switch {
		case m.Type == "proc" && m.Target == "/proc":
			p.made[i] = procSlot
		case m.Type == "tmpfs" && m.Target == "/dev":
			p.made[i] = p.dev
		case m.Type == "tmpfs" || m.Type == "devpts":
			data := []string{m.Type, "source", m.Source}
			for _, o := range strings.Split(m.Data, ",") {
				if k, v, _ := strings.Cut(o, "="); k != "" {
					data = append(data, k, v)
				}
			}
			p.next++
			p.made[i] = p.next
			if m.Type == "devpts" {
				p.devpt = p.next
			}
			add(op{code: opFsmount, a: p.next, flags: attrs(m.Flags), data: data, what: "make " + m.Type + " for", object: m.Target})
		default:
			return nil, fmt.Errorf("launch: mount %q on %q: not known to this engine", m.Type, m.Target)
		}
	}
	p.ops = append(p.ops, t.ops...)
	return t, nil
}

// inside compiles the rest: all names below the root are looked up from its
// descriptor, privileges are given up last. It gives the record's slot.
func (p *program) inside(l *engine.Launch, binds []engine.Mount, record, console *os.File) (*part, int32, error) {
	t := &part{}
	add := func(o op) { t.ops = append(t.ops, o) }
	slot := p.file(t, record)
	root := p.file(t, l.Root)
	add(op{code: opPark, a: root, data: []string{"/usr"}, what: "attach root"})
	type mount struct {
		slot int32
		engine.Mount
	}
	var all []mount
	for i, m := range l.Mounts {
		all = append(all, mount{p.made[i], m})
	}
	for _, m := range binds {
		all = append(all, mount{p.file(t, m.Tree), m})
	}
	slices.SortStableFunc(all, func(a, b mount) int { return a.Rank() - b.Rank() })
	for _, m := range all {
		var flags uint64
		if !m.File {
			flags |= targetFolder
		}
		if m.Tree == nil && (m.slot == procSlot || m.slot == p.dev || strings.HasPrefix(m.Target, "/dev/")) {
			flags |= targetNoLink
		}
		add(op{code: opAttach, a: m.slot, b: root, flags: flags, data: []string{m.Target}, what: "mount on", object: m.Target})
	}
	add(op{code: opMkdir, a: root, data: []string{l.Cwd}, what: "make working directory", object: l.Cwd})
	if l.TTY {
		if p.devpt == 0 {
			return nil, 0, errors.New("launch: terminal without devpts")
		}
		raw := binary.NativeEndian.AppendUint32(nil, uint32(p.dev))
		raw = binary.NativeEndian.AppendUint32(raw, l.UID)
		add(op{code: opTTY, a: p.devpt, b: p.file(t, console), flags: uint64(l.Rows) | uint64(l.Cols)<<16, raw: raw, what: "make terminal"})
	}
	if l.ReadOnly {
		add(op{code: opReadonly, a: root, data: []string{""}, what: "make root read-only"})
	}
	add(op{code: opPivot, a: root, what: "enter root"})
	add(op{code: opChdir, data: []string{l.Cwd}, what: "enter working directory", object: l.Cwd})
	add(op{code: opDrop, a: int32(l.UID), b: int32(l.GID), what: "drop privileges"})
	p.ops = append(p.ops, t.ops...)
	if p.next >= maxFDs {
		return nil, 0, hinted.New(fmt.Errorf("launch: %d mounts: %w", len(l.Mounts)+len(binds), unix.E2BIG), "about 500 are possible: give folders above them, or --engine libcontainer")
	}
	return t, slot, nil
}

// attrs turns mount(2)'s flags into mount_setattr(2)'s.
func attrs(flags uintptr) uint64 {
	var out uint64
	for _, x := range [][2]uintptr{
		{unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY},
		{unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID},
		{unix.MS_NODEV, unix.MOUNT_ATTR_NODEV},
		{unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC},
		{unix.MS_STRICTATIME, unix.MOUNT_ATTR_STRICTATIME},
	} {
		if flags&x[0] != 0 {
			out |= uint64(x[1])
		}
	}
	return out
}

// append gives the operation's bytes as stage.c reads them: code, length, a, b,
// flags, data.
func (o *op) append(buf []byte) []byte {
	ne := binary.NativeEndian
	start := len(buf)
	buf = ne.AppendUint32(buf, uint32(o.code))
	buf = ne.AppendUint32(buf, 0)
	buf = ne.AppendUint32(buf, uint32(o.a))
	buf = ne.AppendUint32(buf, uint32(o.b))
	buf = ne.AppendUint64(buf, o.flags)
	buf = append(buf, o.raw...)
	for _, s := range o.data {
		buf = append(append(buf, s...), 0)
	}
	for n := 8 - len(buf)%8; n > 0; n-- { // at least one: the last byte is 0
		buf = append(buf, 0)
	}
	ne.PutUint32(buf[start+4:], uint32(len(buf)-start))
	return buf
}
