package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Layers lie upon one another. What one takes away from those below it is a
// whiteout: an entry of type 'w', in the layer's directory the device 0:0 that
// overlayfs knows as one. Directories are never opaque: what an opaque one
// hides is whited out name by name, so layers need no extended attributes.

// Stack gives what is seen of layers that lie upon one another, topmost first,
// without whiteouts.
func Stack(layers ...*Manifest) *Manifest {
	// closed is what no layer further down adds to: also where a folder further
	// up is made anew.
	seen, closed := map[string]bool{}, map[string]bool{}
	hidden := func(p string) bool {
		for ; p != "."; p = path.Dir(p) {
			if closed[p] {
				return true
			}
		}
		return false
	}
	out := &Manifest{}
	for _, m := range layers {
		var shown []Entry
		for _, e := range m.Entries {
			if e.Type != 'w' && !seen[e.Path] && !hidden(e.Path) {
				shown = append(shown, e)
			}
		}
		for _, e := range shown {
			seen[e.Path] = true
		}
		for _, e := range m.Entries { // after the look: a layer does not hide its own
			if e.Type != 'd' {
				closed[e.Path] = true
			}
		}
		out.Entries = append(out.Entries, shown...)
	}
	sort.Slice(out.Entries, func(i, j int) bool { return out.Entries[i].Path < out.Entries[j].Path })
	return out
}

// AddUpper stores what a workload wrote into an overlay's upper directory and
// gives it as a layer upon below, which is what the overlay showed (see
// [Stack]). at is where the overlay was mounted. Only what differs from below is
// in it, so that the same change is the same layer however it was made. It goes by descriptors and follows no link; the workload must
// be dead. skip leaves out a path.
func (s *Store) AddUpper(ctx context.Context, dir *os.File, at string, below *Manifest, skip func(path string) bool) (*Manifest, error) {
	u := &upperWalk{store: s, skip: skip, options: addOptions{left: bound()}, below: map[string]Entry{}, names: map[string][]string{}, out: &Manifest{}}
	for _, e := range below.Entries {
		u.below[e.Path] = e
		u.names[path.Dir(e.Path)] = append(u.names[path.Dir(e.Path)], e.Path)
	}
	at = strings.Trim(path.Clean(at), "/")
	if err := u.dir(ctx, dir, at, false); err != nil {
		return nil, err
	}
	have := map[string]bool{}
	for _, e := range u.out.Entries {
		have[e.Path] = true
	}
	for _, e := range u.out.Entries[:len(u.out.Entries):len(u.out.Entries)] {
		for d := path.Dir(e.Path); d != "." && !have[d]; d = path.Dir(d) {
			have[d] = true
			u.out.Entries = append(u.out.Entries, Entry{Path: d, Type: 'd', Mode: 0o755})
		}
	}
	u.out.Encode() // sorts
	return u.out, nil
}

type upperWalk struct {
	store   *Store
	skip    func(string) bool
	options addOptions
	below   map[string]Entry
	names   map[string][]string // directory → what is in it below
	out     *Manifest
}

// dir walks one directory. In an opaque one, nothing from below is seen.
func (u *upperWalk) dir(ctx context.Context, dir *os.File, at string, opaque bool) error {
	if err := checkDepth(at); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read %q: %w", at, err)
	}
	sort.Strings(names)
	there := map[string]bool{}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := path.Join(at, name)
		if there[p] = true; u.skip != nil && u.skip(p) {
			there[p] = u.below[p].Type != 0 && !opaque // left as it is below
			continue
		}
		if err := u.entry(ctx, dir, name, p, opaque); err != nil {
			return err
		}
	}
	if opaque {
		for _, p := range u.names[at] {
			if !there[p] {
				u.out.Entries = append(u.out.Entries, Entry{Path: p, Type: 'w'})
			}
		}
	}
	return nil
}

func (u *upperWalk) entry(ctx context.Context, dir *os.File, name, p string, opaque bool) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("read %q: %w", p, err)
	}
	old := u.below[p]
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		if st.Rdev != 0 {
			return fmt.Errorf("add %q: a device", p)
		}
		if old.Type != 0 {
			u.out.Entries = append(u.out.Entries, Entry{Path: p, Type: 'w'})
		}
		return nil
	case unix.S_IFLNK:
		buf := make([]byte, 4096)
		n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
		if err != nil {
			return fmt.Errorf("read link %q: %w", p, err)
		}
		u.add(Entry{Path: p, Type: 'l', Mode: 0o777, Link: string(buf[:n])}, old)
		return nil
	case unix.S_IFDIR, unix.S_IFREG:
	default:
		return fmt.Errorf("add %q: neither file, directory nor link", p)
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open %q: %w", p, err)
	}
	f := os.NewFile(uintptr(fd), p)
	defer f.Close()
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		one := &Manifest{}
		if err := u.store.addFile(f, p, u.options, one); err != nil {
			return err
		}
		u.add(one.Entries[0], old)
		return nil
	}
	if old.Type != 'd' { // of a directory that is below, only what differs counts
		u.add(Entry{Path: p, Type: 'd', Mode: 0o755}, old)
	}
	return u.dir(ctx, f, p, opaque || isOpaque(fd))
}

// add keeps what is not the same below.
func (u *upperWalk) add(e, old Entry) {
	if e != old {
		u.out.Entries = append(u.out.Entries, e)
	}
}

// isOpaque asks for the mark that overlayfs sets on a directory that replaces
// one below. (Set only by the kernel: trusted attributes need host root.)
func isOpaque(fd int) bool {
	b := make([]byte, 8)
	n, err := unix.Fgetxattr(fd, "trusted.overlay.opaque", b)
	return err == nil && n == 1 && b[0] == 'y'
}

func isWhiteout(st os.FileInfo) bool {
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && sys.Mode&unix.S_IFMT == unix.S_IFCHR && sys.Rdev == 0
}

// MakeUpper makes in dir what a mount needs whose writes go there: see
// [VolumeMount].
func MakeUpper(dir string) error {
	return errors.Join(os.Mkdir(filepath.Join(dir, "upper"), 0o755), os.Mkdir(filepath.Join(dir, "work"), 0o700))
}

// OpenUpper opens what was written, to be given to [Store.AddUpper].
func OpenUpper(dir string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, "upper"), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// LayerAt gives the manifest of a layer by its directory (of [Base.Lowers]),
// nil where it is no layer of this store.
func (s *Store) LayerAt(dir string) (*Manifest, error) {
	up := filepath.Dir(dir)
	if filepath.Dir(up) != s.Path("layers") {
		return nil, nil
	}
	_, m, err := s.Layer("sha256:" + filepath.Base(up))
	return m, err
}

// Below gives the part of a manifest that is at a path or below it.
func (m *Manifest) Below(p string) *Manifest {
	out := &Manifest{}
	for _, e := range m.Entries {
		if e.Path == p || strings.HasPrefix(e.Path, p+"/") {
			out.Entries = append(out.Entries, e)
		}
	}
	return out
}

// Type gives the type of a path, 0 where it is not there.
func (m *Manifest) Type(p string) byte {
	i := sort.Search(len(m.Entries), func(i int) bool { return m.Entries[i].Path >= p })
	if i < len(m.Entries) && m.Entries[i].Path == p {
		return m.Entries[i].Type
	}
	return 0
}

// With gives the base with a layer on top: what is baked upon it is keyed by
// both.
func (b Base) With(layer, dir string) Base {
	b.Lowers = append([]string{dir}, b.Lowers...)
	b.Upon = append([]string{layer}, b.Upon...)
	return b
}

// Diff gives the layer that makes view of below: both as [Stack] gives them.
func Diff(view, below *Manifest) *Manifest {
	old, now := map[string]Entry{}, map[string]byte{".": 'd'}
	for _, e := range below.Entries {
		old[e.Path] = e
	}
	out := &Manifest{}
	have := map[string]bool{}
	add := func(e Entry) {
		for d := path.Dir(e.Path); d != "." && !have[d]; d = path.Dir(d) {
			have[d] = true
			out.Entries = append(out.Entries, Entry{Path: d, Type: 'd', Mode: 0o755})
		}
		if !have[e.Path] {
			have[e.Path] = true
			out.Entries = append(out.Entries, e)
		}
	}
	for _, e := range view.Entries {
		if now[e.Path] = e.Type; old[e.Path] != e {
			add(e)
		}
	}
	for _, e := range below.Entries { // what is in a directory that is gone is gone with it
		if now[e.Path] == 0 && now[path.Dir(e.Path)] == 'd' {
			add(Entry{Path: e.Path, Type: 'w'})
		}
	}
	out.Encode() // sorts
	return out
}
