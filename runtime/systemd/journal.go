package systemd

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// journalSocket takes entries in the native protocol; a variable for tests.
var journalSocket = "/run/systemd/journal/socket"

// Field is one field of a journal entry: an upper-case name and any bytes.
type Field struct{ Name, Value string }

// Journaled says whether a descriptor leads to the journal: JOURNAL_STREAM names
// it. A shell below a service that redirected its output has the variable too,
// so it is compared.
func Journaled(fd int) bool {
	want := os.Getenv("JOURNAL_STREAM")
	if want == "" {
		return false
	}
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && want == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// Journal writes one entry. Fields without a value are left out.
func Journal(fields ...Field) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket: %w", err)
	}
	defer unix.Close(fd)
	// Not to wait for a journal that is busy: standard error is there too.
	if err := unix.Sendto(fd, entry(fields), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, &unix.SockaddrUnix{Name: journalSocket}); err != nil {
		return fmt.Errorf("write to the journal: %w", err)
	}
	return nil
}

// entry serialises fields: NAME=value and a newline, or, where the value holds
// one, NAME, a newline, the length in 8 bytes, the value, a newline.
func entry(fields []Field) []byte {
	var b []byte
	for _, f := range fields {
		switch {
		case f.Value == "":
		case strings.Contains(f.Value, "\n"):
			b = append(b, f.Name+"\n"...)
			b = binary.LittleEndian.AppendUint64(b, uint64(len(f.Value)))
			b = append(b, f.Value+"\n"...)
		default:
			b = append(b, f.Name+"="+f.Value+"\n"...)
		}
	}
	return b
}
