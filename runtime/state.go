package runtime

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"time"

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
	ID        string    `json:"id"`
	Name      string    `json:"name,omitempty"`
	Pid       int       `json:"pid"`
	Cgroups   []string  `json:"cgroups"`
	StartedAt time.Time `json:"started_at"`
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
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
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
	if err != nil || len(b) == 0 {
		return nil, err
	}
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		// Torn by a crash while it was written: nothing was made after it.
		return nil, nil //nolint:nilerr // see above
	}
	return &j, nil
}

func (s *slot) write(j journal) error {
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	if err := s.file.Truncate(0); err != nil {
		return err
	}
	_, err = s.file.WriteAt(b, 0)
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
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
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
