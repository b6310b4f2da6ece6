package runtime

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/cgroup"
)

// Host ids of sandboxes: from 0x70000000 up, which neither /etc/subuid's usual
// ranges nor systemd's (UIDS-GIDS: containers end at 1879048191, the foreign
// range starts at 2147352576) use.
const (
	idRangeStart = 0x70000000
	maxSlots     = 4093
)

// journal is what the next command must know to heal a sandbox whose
// supervisor died. It lies in the slot's file, which the supervisor holds
// locked, and is written before what it names exists. Nothing in it can be
// changed by the workload.
type journal struct {
	ID, Name string
	Pid      int
	Cgroups  []string
}

// encode gives the journal as strings that each end with a NUL: a schema, id,
// name, pid, cgroups. What lacks its end was torn by a crash.
func (j *journal) encode() []byte {
	parts := append([]string{"1", j.ID, j.Name, strconv.Itoa(j.Pid)}, j.Cgroups...)
	return []byte(strings.Join(append(parts, "."), "\x00") + "\x00")
}

func parseJournal(b []byte) *journal {
	parts := strings.Split(string(b), "\x00")
	n := len(parts)
	if n < 6 || parts[0] != "1" || parts[n-1] != "" || parts[n-2] != "." {
		return nil
	}
	pid, err := strconv.Atoi(parts[3])
	if err != nil {
		return nil
	}
	return &journal{ID: parts[1], Name: parts[2], Pid: pid, Cgroups: parts[4 : n-2]}
}

// slot is a number that no other live sandbox has; the id range derives from it.
type slot struct {
	n    int
	path string
	file *os.File
}

func (s *slot) idBase() uint32 { return idRangeStart + uint32(s.n)*idRangeSize }

// lockFile opens and locks path; nil without error when another holds it. A
// file that was unlinked between open and lock is not the one others see, so
// that is tried again.
func lockFile(path string) (*os.File, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		f := os.NewFile(uintptr(fd), path)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, nil
			}
			return nil, fmt.Errorf("lock %q: %w", path, err)
		}
		var a, b unix.Stat_t
		if unix.Fstat(int(f.Fd()), &a) == nil && unix.Stat(path, &b) == nil && a.Ino == b.Ino && a.Dev == b.Dev {
			return f, nil
		}
		f.Close()
	}
}

func slotsDir(state string) string { return filepath.Join(state, "slots") }

// acquireSlot takes the lowest free slot and heals what a crash left in it.
func acquireSlot(state string) (*slot, error) {
	dir := slotsDir(state)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	for n := 0; n < maxSlots; n++ {
		path := filepath.Join(dir, strconv.Itoa(n))
		f, err := lockFile(path)
		if err != nil {
			return nil, err
		}
		if f == nil {
			continue
		}
		s := &slot{n: n, path: path, file: f}
		if _, err := s.heal(); err != nil {
			// Its range may still be in use: leave it locked for as long as we
			// live and take the next one.
			continue
		}
		return s, nil
	}
	return nil, fmt.Errorf("all %d slots are in use", maxSlots)
}

// heal ends what the journal names and empties it.
func (s *slot) heal() (*journal, error) {
	j, err := readJournal(s.file)
	if err != nil || j == nil {
		return nil, errors.Join(err, s.file.Truncate(0))
	}
	if err := cgroup.Remove(j.Cgroups); err != nil {
		return j, err
	}
	return j, s.file.Truncate(0)
}

func readJournal(f *os.File) (*journal, error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil {
		return nil, err
	}
	return parseJournal(b), nil // torn by a crash while it was written: nothing was made after it
}

func (s *slot) write(j journal) error {
	if err := s.file.Truncate(0); err != nil {
		return err
	}
	_, err := s.file.WriteAt(j.encode(), 0)
	return err
}

// release removes the file while it is locked: whoever opened it before sees
// that and opens anew.
func (s *slot) release() error {
	return errors.Join(os.Remove(s.path), s.file.Close())
}

// lockName makes a sandbox's name unique among live ones.
func lockName(state, name string) (*slot, error) {
	dir := filepath.Join(state, "names")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, hex.EncodeToString([]byte(name)))
	f, err := lockFile(path)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return nil, fmt.Errorf("a live sandbox has this name: %w", unix.EEXIST)
	}
	return &slot{path: path, file: f}, nil
}

func newID() string {
	var b [6]byte
	for {
		if n, _ := unix.Getrandom(b[:], 0); n == len(b) { // fails only for a moment, early at boot
			return hex.EncodeToString(b[:])
		}
	}
}

// healSlots heals every slot that nobody holds and that has content: its
// supervisor died.
func healSlots(state string) (did []string, err error) {
	ents, err := os.ReadDir(slotsDir(state))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	errs := []error{err}
	sort.Slice(ents, func(i, k int) bool { return ents[i].Name() < ents[k].Name() })
	for _, e := range ents {
		path := filepath.Join(slotsDir(state), e.Name())
		f, err := lockFile(path)
		if err != nil || f == nil {
			errs = append(errs, err)
			continue
		}
		s := &slot{path: path, file: f}
		j, err := s.heal()
		if err != nil {
			errs = append(errs, err, f.Close())
			continue
		}
		if j != nil {
			did = append(did, fmt.Sprintf("healed sandbox %s (its supervisor, process %d, had died)", j.ID, j.Pid))
		}
		errs = append(errs, s.release())
	}
	return did, errors.Join(errs...)
}

// GC heals what crashed sandboxes left and returns, in words, what it did. It
// is safe beside running sandboxes and bakes.
func GC(dirs Dirs) ([]string, error) {
	did, err := healSlots(dirs.State)
	errs := []error{err}
	names := filepath.Join(dirs.State, "names")
	ents, _ := os.ReadDir(names)
	for _, e := range ents {
		if f, err := lockFile(filepath.Join(names, e.Name())); err == nil && f != nil {
			errs = append(errs, (&slot{path: filepath.Join(names, e.Name()), file: f}).release())
		}
	}
	if _, err := os.Stat(dirs.Root); err == nil {
		store, err := rootfs.OpenStore(dirs.Root)
		if err == nil {
			var more []string
			more, err = store.GC(context.Background())
			did = append(did, more...)
		}
		errs = append(errs, err)
	}
	return did, errors.Join(errs...)
}
