package routed

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Messages are written by hand and sent as one datagram: the kernel carries
// them out in order in that one call. Through vishvananda/netlink the same set-up
// is a dozen calls and threads' switches, twice the time.

// batch collects rtnetlink messages; each says what it does for the error.
type batch struct {
	buf   []byte
	start int // of the message that is being written
	verbs []string
}

// begin opens a message of a type with its fixed header.
func (b *batch) begin(verb string, typ, flags uint16, header []byte) {
	b.end()
	b.verbs = append(b.verbs, verb)
	b.start = len(b.buf)
	h := make([]byte, unix.NLMSG_HDRLEN)
	binary.NativeEndian.PutUint16(h[4:], typ)
	binary.NativeEndian.PutUint16(h[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	binary.NativeEndian.PutUint32(h[8:], uint32(len(b.verbs)))
	b.buf = append(append(b.buf, h...), header...)
}

// end fills in the length of the message that is open.
func (b *batch) end() {
	if len(b.verbs) > 0 {
		binary.NativeEndian.PutUint32(b.buf[b.start:], uint32(len(b.buf)-b.start))
	}
}

// nest opens an attribute; the function that it returns closes it.
func (b *batch) nest(typ uint16) func() {
	at := len(b.buf)
	b.buf = append(b.buf, 0, 0, 0, 0)
	binary.NativeEndian.PutUint16(b.buf[at+2:], typ)
	return func() {
		binary.NativeEndian.PutUint16(b.buf[at:], uint16(len(b.buf)-at))
		for len(b.buf)%unix.NLMSG_ALIGNTO != 0 {
			b.buf = append(b.buf, 0)
		}
	}
}

func (b *batch) bytes(typ uint16, v []byte) {
	end := b.nest(typ)
	b.buf = append(b.buf, v...)
	end()
}

func (b *batch) str(typ uint16, v string) { b.bytes(typ, append([]byte(v), 0)) }
func (b *batch) u8(typ uint16, v uint8)   { b.bytes(typ, []byte{v}) }
func (b *batch) u32(typ uint16, v uint32) { b.bytes(typ, binary.NativeEndian.AppendUint32(nil, v)) }

// send carries all messages out in the calling thread's namespace. It returns
// the first error; what follows a message that failed is tried all the same.
func (b *batch) send() error {
	b.end()
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open route socket: %w", err)
	}
	defer unix.Close(s)
	// An error is answered with the whole message unless it is capped.
	_ = unix.SetsockoptInt(s, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	if err := unix.Sendto(s, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send route messages: %w", err)
	}
	buf := make([]byte, 8192)
	var first error
	for acks := 0; acks < len(b.verbs); {
		n, err := unix.Read(s, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read route answers: %w", err)
		}
		for m := buf[:n]; len(m) >= unix.NLMSG_HDRLEN+4; acks++ {
			length := int(binary.NativeEndian.Uint32(m))
			if length < unix.NLMSG_HDRLEN+4 || length > len(m) || binary.NativeEndian.Uint16(m[4:]) != unix.NLMSG_ERROR {
				return errors.New("read route answers: not an acknowledgement")
			}
			seq := int(binary.NativeEndian.Uint32(m[8:]))
			errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m[unix.NLMSG_HDRLEN:])))
			if errno != 0 && first == nil && seq >= 1 && seq <= len(b.verbs) {
				first = fmt.Errorf("%s: %w", b.verbs[seq-1], errno)
			}
			m = m[min(len(m), (length+3)&^3):]
		}
	}
	return first
}

// ifinfo is a struct ifinfomsg. index 0 goes by the name in IFLA_IFNAME.
func ifinfo(index, flags, change uint32) []byte {
	h := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(h[4:], index)
	binary.NativeEndian.PutUint32(h[8:], flags)
	binary.NativeEndian.PutUint32(h[12:], change)
	return h
}
