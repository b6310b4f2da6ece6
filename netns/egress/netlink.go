package egress

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// netlinkSocket is one for one datagram of many messages, in the namespace of the
// thread that opened it.
type netlinkSocket int

func openNetlink(protocol int) (netlinkSocket, error) {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return 0, fmt.Errorf("open netlink socket %d: %w", protocol, err)
	}
	return netlinkSocket(s), nil
}

func (s netlinkSocket) close() { unix.Close(int(s)) }

func (s netlinkSocket) send(b []byte) error {
	return unix.Sendto(int(s), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// acks gives the n acknowledgements that were asked for, or the first error of
// a message whose acknowledgement was not. The kernel has queued them before
// send returned.
func (s netlinkSocket) acks(n int) ([]unix.Errno, error) {
	var out []unix.Errno
	buf := make([]byte, 16<<10)
	for len(out) < n {
		k, _, err := unix.Recvfrom(int(s), buf, unix.MSG_DONTWAIT)
		if err != nil {
			return nil, err
		}
		for b := buf[:k]; len(b) >= unix.SizeofNlMsghdr+4; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr+4 || size > len(b) || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
				return nil, errors.New("the answer is not an acknowledgement")
			}
			out = append(out, unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))))
			b = b[min(len(b), (size+3)&^3):]
		}
	}
	return out, nil
}

func message(kind uint16) []byte {
	b := binary.NativeEndian.AppendUint32(nil, 0)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	return append(b, make([]byte, 8)...) // sequence and port, which nobody needs
}

// attribute appends one; all of ours are multiples of four bytes.
func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(b, value...)
}

func finish(b []byte) []byte {
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}
