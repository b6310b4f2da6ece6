package envs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// Files of a project go into an environment by descriptors below the project's
// folder: no link leads out of it, whatever changes meanwhile.

// maxCopyFiles bounds what one copy takes: a home that was named by mistake.
const maxCopyFiles = 200_000

// project is the folder of a recipe.
type project struct {
	dir    *os.File
	path   string
	ignore *ignores
}

func openProject(dir string) (*project, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open project: %w", err)
	}
	p := &project{dir: f, path: dir, ignore: &ignores{}}
	name := filepath.Join(dir, ".dockerignore")
	b, err := readBelow(dir, name)
	if err == nil {
		p.ignore, err = parseIgnores(name, b)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		f.Close()
		return nil, err
	}
	return p, nil
}

// open opens a path of the project, and gives its name there, links followed as
// far as they stay inside.
func (p *project) open(from string) (*os.File, error) {
	fd, err := unix.Openat2(int(p.dir.Fd()), from, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch {
	case errors.Is(err, unix.EXDEV):
		return nil, fail("only what is in the recipe's folder can be copied: move it there", "copy %q: it lies outside of %q", from, p.path)
	case err != nil:
		return nil, fail("", "copy %q: %v", from, err)
	}
	return os.NewFile(uintptr(fd), from), nil
}

// skip says what a copy of from leaves out; below is relative to from.
func (p *project) skip(from string) func(below string) bool {
	return func(below string) bool {
		rel := path.Join(from, below)
		return len(p.ignore.patterns) > 0 && p.ignore.match(rel)
	}
}

// add stores what from holds: entries with paths relative to it. A file is
// singleFile.
func (p *project) add(ctx context.Context, store *rootfs.Store, from string) (*rootfs.Manifest, error) {
	f, err := p.open(from)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("copy %q: %w", from, err)
	}
	switch {
	case st.Mode().IsRegular():
		if st.Size() > maxSourceBytes {
			return nil, fail("", "copy %q: more than %d MiB in one file", from, maxSourceBytes>>20)
		}
		d, n, err := store.PutObject(io.LimitReader(f, st.Size()), st.Mode()&0o111 != 0)
		if err != nil {
			return nil, fmt.Errorf("copy %q: %w", from, err)
		}
		return &rootfs.Manifest{Entries: []rootfs.Entry{{Path: singleFile, Type: 'f', Mode: fileMode(st.Mode()&0o111 != 0), Size: n, Digest: d}}}, nil
	case !st.IsDir():
		return nil, fail("", "copy %q: neither a file nor a folder", from)
	}
	skip := p.skip(from)
	m, err := store.AddTree(ctx, f, func(rel string) bool {
		return skip(rel) && !p.ignore.back // with exceptions, folders are entered
	})
	if err != nil {
		return nil, fail("leave it out by a line in .dockerignore", "copy %q: %v", from, err)
	}
	if p.ignore.back {
		m = pick(m, skip)
	}
	return m, nil
}

func fileMode(exec bool) uint32 {
	if exec {
		return 0o555
	}
	return 0o444
}

// pick drops what skip says, but keeps the folders of what stays.
func pick(m *rootfs.Manifest, skip func(string) bool) *rootfs.Manifest {
	keep := map[string]bool{}
	for _, e := range m.Entries {
		if !skip(e.Path) {
			for d := e.Path; d != "." && !keep[d]; d = path.Dir(d) {
				keep[d] = true
			}
		}
	}
	out := &rootfs.Manifest{}
	for _, e := range m.Entries {
		if keep[e.Path] {
			out.Entries = append(out.Entries, e)
		}
	}
	return out
}

// settled is how old a change must be for a look at the times to find the next
// one: a change within the same tick of the clock would look the same.
const settled = 2 * time.Second

// addition is what a copy puts into an environment: its digest, and the files
// where they are needed.
type addition struct {
	digest string
	load   func(context.Context) (*rootfs.Manifest, error)
}

// writable says whether what can be made again may be kept.
func (m *Manager) writable() bool { return m.store.Writable() == nil }

// remembered gives an addition whose digest is known by what it was made from;
// where it is not, or is not to be kept, it is loaded.
func (m *Manager) remembered(ctx context.Context, keep bool, key string, load func(context.Context) (*rootfs.Manifest, error)) (addition, error) {
	p := m.store.Path("envs", "copies", key)
	if b, err := os.ReadFile(p); err == nil && keep {
		touch(p)
		return addition{string(b), load}, nil
	}
	man, err := load(ctx)
	if err != nil {
		return addition{}, err
	}
	a := addition{man.Digest(), func(context.Context) (*rootfs.Manifest, error) { return man, nil }}
	if keep && m.writable() {
		err = m.store.WriteFile(p, []byte(a.digest))
	}
	return a, err
}

// copyOf gives what a copy of from to a path adds.
func (m *Manager) copyOf(ctx context.Context, p *project, from, to string) (addition, error) {
	s, err := p.sign(ctx, from)
	if err != nil {
		return addition{}, err
	}
	return m.remembered(ctx, !s.fresh, digestOf(copyKey(p, from, s), to), func(ctx context.Context) (*rootfs.Manifest, error) {
		return m.copied(ctx, p, from, to)
	})
}

// copied gives what a copy of from to a path adds. Where nothing has another
// size, time or inode than before, no file is read.
func (m *Manager) copied(ctx context.Context, p *project, from, to string) (*rootfs.Manifest, error) {
	s, err := p.sign(ctx, from)
	if err != nil {
		return nil, err
	}
	key := copyKey(p, from, s)
	man, ok := m.part(key)
	if !ok {
		if man, err = p.add(ctx, m.store, from); err != nil {
			return nil, err
		}
		if !s.fresh && m.writable() {
			if err := m.store.WriteFile(m.store.Path("envs", "parts", key), man.Encode()); err != nil {
				return nil, err
			}
		}
	}
	return place(man, s.file, from, to), nil
}

func copyKey(p *project, from string, s signature) string {
	return digestOf(schema, "copy", p.path, from, s.digest)
}

// singleFile is the path of a copied file in its manifest.
const singleFile = "file"

// signature is a digest of all names, sizes, times and inodes that a copy reads.
type signature struct {
	digest string
	fresh  bool // something changed too recently to trust it
	file   bool // a file, not a folder
}

func (p *project) sign(ctx context.Context, from string) (s signature, err error) {
	f, err := p.open(from)
	if err != nil {
		return s, err
	}
	defer f.Close()
	h, n, now := sha256.New(), 0, time.Now()
	for _, pat := range p.ignore.patterns {
		fmt.Fprintf(h, "%v %q\n", pat.back, pat.text)
	}
	skip := p.skip(from)
	var walk func(dir *os.File, at string) error
	see := func(st *unix.Stat_t, name string) {
		s.fresh = s.fresh || now.Sub(time.Unix(st.Ctim.Unix())) < settled
		fmt.Fprintf(h, "%q %o %d %d.%d %d.%d %d:%d\n", name, st.Mode, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, st.Dev, st.Ino)
	}
	walk = func(dir *os.File, at string) error {
		names, err := dir.Readdirnames(-1)
		if err != nil {
			return fmt.Errorf("copy %q: %w", path.Join(from, at), err)
		}
		sort.Strings(names)
		for _, name := range names {
			rel := path.Join(at, name)
			left := skip(rel)
			if left && !p.ignore.back {
				continue
			}
			if n++; n > maxCopyFiles {
				return fail("leave some out by a .dockerignore", "copy %q: more than %d files", from, maxCopyFiles)
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return fmt.Errorf("copy %q: %w", path.Join(from, rel), err)
			}
			kind := st.Mode & unix.S_IFMT
			if kind != unix.S_IFDIR {
				if !left {
					see(&st, rel)
				}
				continue
			}
			fmt.Fprintf(h, "%q/\n", rel) // its own times tell nothing that its content does not
			fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("copy %q: %w", path.Join(from, rel), err)
			}
			sub := os.NewFile(uintptr(fd), rel)
			err = walk(sub, rel)
			sub.Close()
			if err != nil {
				return err
			}
		}
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return s, fmt.Errorf("copy %q: %w", from, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = walk(f, "")
	} else {
		see(&st, "")
		s.file = true
	}
	s.digest = hex.EncodeToString(h.Sum(nil))
	return s, err
}

// place puts entries below a path: the layer of a copy. What a folder holds goes
// into to; a file becomes to, or goes into it where it ends with a slash.
func place(man *rootfs.Manifest, file bool, from, to string) *rootfs.Manifest {
	at := strings.Trim(path.Clean(to), "/")
	out := &rootfs.Manifest{}
	if file {
		e := man.Entries[0]
		if e.Path = at; strings.HasSuffix(to, "/") {
			e.Path = path.Join(at, path.Base(from))
		}
		out.Entries = append(out.Entries, e)
		return out
	}
	out.Entries = append(out.Entries, rootfs.Entry{Path: at, Type: 'd', Mode: 0o755})
	for _, e := range man.Entries {
		e.Path = path.Join(at, e.Path)
		out.Entries = append(out.Entries, e)
	}
	return out
}
