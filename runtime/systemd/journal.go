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

// Journal writes one entry. Fields without a value are left out. The entry says
// itself whose unit's it is, which the journal takes from root: it looks the
// sender up only when it reads, and one that has exited by then would be in no
// `journalctl -u`.
func Journal(fields ...Field) error {
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		fields = append(fields, Field{Name: "OBJECT_SYSTEMD_UNIT", Value: unitOf(string(b))})
	}
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

// unitOf gives the unit of a process by its /proc/PID/cgroup: the first name
// below the slices in systemd's own hierarchy. "" is none.
func unitOf(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		p := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(p) != 3 || p[1] != "name=systemd" && (p[0] != "0" || strings.Contains(cgroups, ":name=systemd:")) {
			continue
		}
		for _, name := range strings.Split(strings.TrimPrefix(p[2], "/"), "/") {
			name = strings.TrimPrefix(name, "_") // systemd escapes what could be a file of the kernel's
			if strings.HasSuffix(name, ".slice") {
				continue
			}
			if strings.HasSuffix(name, ".service") || strings.HasSuffix(name, ".scope") {
				return name
			}
			return ""
		}
	}
	return ""
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
