package runtime

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
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
	// Net is what is known of the network, for who joins it: see [slot.share].
	Net *netns.Ready
}

// encode gives the journal as strings that each end with a NUL: a schema, id,
// name, pid, cgroups, a dot. What lacks its end was torn by a crash. Behind it
// may be Net.
func (j *journal) encode() []byte {
	parts := append([]string{"1", j.ID, j.Name, strconv.Itoa(j.Pid)}, j.Cgroups...)
	return []byte(strings.Join(append(parts, "."), "\x00") + "\x00")
}

func parseJournal(b []byte) *journal {
	parts := strings.Split(string(b), "\x00")
	if len(parts) < 6 || parts[0] != "1" {
		return nil
	}
	n := 4 + slices.Index(parts[4:], ".")
	if n < 4 || n == len(parts)-1 {
		return nil
	}
	pid, err := strconv.Atoi(parts[3])
	if err != nil {
		return nil
	}
	j := &journal{ID: parts[1], Name: parts[2], Pid: pid, Cgroups: parts[4:n]}
	if json.Unmarshal([]byte(parts[n+1]), &j.Net) != nil {
		j.Net = nil
	}
	return j
}

// slot is a number that no other live sandbox has; the id range derives from it.
type slot struct {
	n    int
	path string
	file *os.File
	// ids is the same number in [stageDir], where the ids of all state
	// directories are given out; nil where that is the state directory.
	ids *slot
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

// unhealed are the files of slots that stay locked.
var unhealed []*os.File

func slotsDir(state string) string { return filepath.Join(state, "slots") }

// acquireSlot takes the lowest free slot and heals what a crash left in it.
func acquireSlot(state string) (*slot, error) {
	dir := slotsDir(state)
	for _, d := range []string{dir, slotsDir(stageDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
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
			unhealed = append(unhealed, f)
			continue
		}
		if state != stageDir {
			ids := filepath.Join(slotsDir(stageDir), strconv.Itoa(n))
			g, err := lockFile(ids)
			if err == nil && g != nil {
				s.ids = &slot{n: n, path: ids, file: g}
				_, err = s.ids.heal()
			}
			if err != nil || g == nil { // another state directory has it
				if err := errors.Join(err, s.release()); err != nil {
					return nil, err
				}
				continue
			}
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
	if err := cgroup.Remove(slices.DeleteFunc(j.Cgroups, func(d string) bool { return !ownGroup(d, j.ID) })); err != nil {
		return j, err
	}
	return j, s.file.Truncate(0)
}

// ownGroup says whether a directory can be a sandbox's cgroup: whatever a
// journal holds, nothing else is ever killed or removed.
func ownGroup(dir, id string) bool {
	var fs unix.Statfs_t
	return len(id) == 12 && strings.Contains(dir, id) && unix.Statfs(dir, &fs) == nil &&
		(fs.Type == unix.CGROUP_SUPER_MAGIC || fs.Type == unix.CGROUP2_SUPER_MAGIC)
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

// share adds to the journal what a sandbox that joins the network must know.
func (s *slot) share(r *netns.Ready) error {
	b, err := json.Marshal(netns.Ready{Resolv: r.Resolv, Env: r.Env})
	if err != nil {
		return err
	}
	st, err := s.file.Stat()
	if err != nil {
		return err
	}
	_, err = s.file.WriteAt(append(b, 0), st.Size()) // what is there is never rewritten: it names cgroups
	return err
}

// release removes the file while it is locked: whoever opened it before sees
// that and opens anew.
func (s *slot) release() error {
	err := errors.Join(os.Remove(s.path), s.file.Close())
	if s.ids != nil {
		err = errors.Join(err, s.ids.release())
	}
	return err
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
	if state != stageDir {
		did, err = healSlots(stageDir)
	} else {
		did, err = netns.HealForwarding(stageDir)
	}
	ents, rerr := os.ReadDir(slotsDir(state))
	err = errors.Join(err, rerr)
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

// findSandbox gives the journal of a live sandbox by its name, its id or the
// beginning of it.
func findSandbox(state, name string) (*journal, error) {
	ents, err := os.ReadDir(slotsDir(state))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var found *journal
	for _, e := range ents {
		path := filepath.Join(slotsDir(state), e.Name())
		free, err := lockFile(path)
		if err != nil {
			return nil, err
		}
		if free != nil { // nobody runs it
			free.Close()
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue // it ended meanwhile
		}
		j, err := readJournal(f)
		f.Close()
		switch {
		case err != nil || j == nil:
		case j.Name == name && name != "" || j.ID == name:
			return j, nil
		case len(name) >= 4 && strings.HasPrefix(j.ID, name):
			if found != nil {
				return nil, errors.New("more than one id begins so")
			}
			found = j
		}
	}
	if found == nil {
		return nil, errors.New("no such sandbox is running")
	}
	return found, nil
}

// GC heals what crashed sandboxes left and returns, in words, what it did. It
// is safe beside running sandboxes and bakes.
func GC(dirs Dirs) ([]string, error) {
	did, err := healSlots(dirs.State)
	errs := []error{err, gcNetwork()}
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
