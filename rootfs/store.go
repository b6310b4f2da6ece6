// Package rootfs owns what a sandbox's root is made of: bases, the content
// store and its layers, the private mount namespace, overlays and bounded
// uppers. It must never know sandboxes, limits of processes or environments.
package rootfs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Store is the directory of everything that survives a sandbox. All of it is
// published by a temporary name, fsync and rename.
type Store struct {
	root string
	// Spare is a directory on this host for what can be made anew and has no
	// place in a store that is read-only: the skeleton of the host's base. ""
	// is none.
	Spare string
}

// OpenStore opens or makes the store at root, for root's eyes only.
func OpenStore(root string) (*Store, error) {
	s := &Store{root: root}
	for _, d := range []string{"", "bases", "objects", "layers", "locks", "tmp", "scratch", "cache"} {
		p := filepath.Join(root, d)
		if unix.Access(p, unix.F_OK) == nil { // as at nearly every launch, which pays for each mkdir
			continue
		}
		if err := os.MkdirAll(p, 0o700); err != nil {
			return nil, hinted.New(fmt.Errorf("open store: %w", err), "is it read-only or full? --root DIR chooses another")
		}
	}
	return s, nil
}

// Path joins below the store's directory.
func (s *Store) Path(parts ...string) string {
	return filepath.Join(append([]string{s.root}, parts...)...)
}

// Lock takes the flock named name, shared or exclusive, and waits for it until
// ctx ends. The kernel frees it when the process dies.
func (s *Store) Lock(ctx context.Context, name string, exclusive bool) (release func(), err error) {
	if strings.ContainsAny(name, "/\x00") || name == "" || name[0] == '.' {
		return nil, fmt.Errorf("lock %q: not a plain name", name)
	}
	for {
		f, err := os.OpenFile(s.Path("locks", name), os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, unix.EROFS) { // a lock that is there can be taken all the same
			f, err = os.Open(s.Path("locks", name))
			if errors.Is(err, os.ErrNotExist) {
				err = unix.EROFS
			}
		}
		if err != nil {
			return nil, s.Explain(fmt.Errorf("lock %q: %w", name, err))
		}
		if err := flock(ctx, int(f.Fd()), exclusive); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %q: %w", name, err)
		}
		// PruneLocks may have removed the file between the two: a lock that
		// nobody else can find is none.
		var st unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 0 {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// ErrBusy is given where something is in use by a live sandbox or bake.
var ErrBusy = errors.New("in use")

// tryLock takes an exclusive lock or gives ErrBusy.
func (s *Store) tryLock(name string) (func(), error) {
	release, err := s.Lock(expired(), name, true)
	if errors.Is(err, context.Canceled) {
		return nil, ErrBusy
	}
	return release, err
}

// TempDir makes a directory below tmp/ that belongs to this process until done
// is called; after a crash GC removes it. It is on the store's file system.
func (s *Store) TempDir(prefix string) (path string, done func() error, err error) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	path = s.Path("tmp", prefix+"-"+hex.EncodeToString(b[:]))
	lock, err := lockTemp(path + ".lock")
	if err != nil {
		return "", nil, s.Explain(fmt.Errorf("make temporary directory: %w", err))
	}
	done = func() error {
		err := removeTree(path)
		return errors.Join(err, os.Remove(path+".lock"), lock.Close())
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return "", nil, errors.Join(s.Explain(fmt.Errorf("make temporary directory: %w", err)), done())
	}
	return path, done, nil
}

// lockTemp makes a lock file and holds it. A GC that came between the two may
// have taken the file for a crashed one's and removed it: then again.
func lockTemp(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if errors.Is(err, unix.EINTR) {
			f.Close()
			continue
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		mine, err := f.Stat()
		there, serr := os.Stat(path)
		if err == nil && serr == nil && os.SameFile(mine, there) {
			return f, nil
		}
		f.Close()
		if err != nil || serr != nil && !errors.Is(serr, os.ErrNotExist) {
			return nil, errors.Join(err, serr)
		}
	}
}

// orphanAge is how long a file without a lock may lie unchanged in tmp/.
const orphanAge = time.Hour

// GC removes what crashed bakes left and says what.
func (s *Store) GC(ctx context.Context) ([]string, error) {
	var did []string
	var errs []error
	ents, err := os.ReadDir(s.Path("tmp"))
	if err != nil {
		return nil, fmt.Errorf("collect garbage: %w", err)
	}
	locked := map[string]bool{}
	for _, e := range ents {
		name, ok := strings.CutSuffix(e.Name(), ".lock")
		if !ok {
			continue
		}
		f, err := os.OpenFile(s.Path("tmp", e.Name()), os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			locked[name] = true
			f.Close()
			continue
		}
		errs = append(errs, removeTree(s.Path("tmp", name)))
		if err := os.Remove(s.Path("tmp", e.Name())); !errors.Is(err, os.ErrNotExist) { // else its owner was done between our open and our lock
			errs = append(errs, err)
		}
		f.Close()
		did = append(did, "removed unfinished work "+name)
	}
	for _, e := range ents {
		if name := e.Name(); !strings.HasSuffix(name, ".lock") && !locked[name] {
			if strings.HasPrefix(name, removedPrefix) { // no name leads there any more
				errs = append(errs, removeTree(s.Path("tmp", name)))
				did = append(did, "finished removing "+name)
				continue
			}
			// An object or file that another process is writing has no lock.
			// It has a young ctime, however long its content takes.
			var st unix.Stat_t
			if err := unix.Lstat(s.Path("tmp", name), &st); err != nil || time.Since(time.Unix(st.Ctim.Unix())) < orphanAge {
				continue
			}
			if _, err := os.Stat(s.Path("tmp", name+".lock")); errors.Is(err, os.ErrNotExist) {
				errs = append(errs, removeTree(s.Path("tmp", name)))
			}
		}
	}
	return did, errors.Join(append(errs, ctx.Err())...)
}

// WriteFile publishes a small file atomically and durably.
func (s *Store) WriteFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return s.Explain(fmt.Errorf("write: %w", err))
	}
	f, err := os.CreateTemp(s.Path("tmp"), "file-")
	if err != nil {
		return s.Explain(fmt.Errorf("write %q: %w", path, err))
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(s.Explain(fmt.Errorf("write %q: %w", path, err)), os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}

// syncAll is one flush for thousands of files: what a rename publishes is on disk.
func syncAll(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync layer: %w", err)
	}
	if err = unix.Syncfs(int(d.Fd())); err != nil {
		err = fmt.Errorf("sync layer: %w", err)
	}
	return errors.Join(err, d.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// ---- manifests ----------------------------------------------------------

// Entry is one path of a layer. Path is relative, without a leading "./".
type Entry struct {
	Path   string
	Type   byte   // 'f', 'd', 'l'; 'w' takes a path of the layers below away
	Mode   uint32 // permission bits
	Size   int64
	Digest string // hex sha256 of a file's content
	Link   string
}

// Manifest lists a layer's content, sorted by path.
type Manifest struct{ Entries []Entry }

// Encode gives one JSON array a line; paths are kept byte by byte.
func (m *Manifest) Encode() []byte {
	sort.Slice(m.Entries, func(i, j int) bool { return m.Entries[i].Path < m.Entries[j].Path })
	var b bytes.Buffer
	for _, e := range m.Entries {
		line, err := json.Marshal([]any{[]byte(e.Path), string(e.Type), e.Mode, e.Size, e.Digest, []byte(e.Link)})
		if err != nil {
			panic(err) // plain values
		}
		b.Write(append(line, '\n'))
	}
	return b.Bytes()
}

// Digest identifies the content: "sha256:…".
func (m *Manifest) Digest() string {
	h := sha256.Sum256(m.Encode())
	return "sha256:" + hex.EncodeToString(h[:])
}

// DecodeManifest reads what Encode gave and refuses anything else.
func DecodeManifest(b []byte) (*Manifest, error) {
	m := &Manifest{}
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		var path, link []byte
		var typ string
		e := Entry{}
		if err := json.Unmarshal(sc.Bytes(), &[]any{&path, &typ, &e.Mode, &e.Size, &e.Digest, &link}); err != nil || len(typ) != 1 {
			return nil, fmt.Errorf("decode manifest line %d: %w", n, errors.Join(errors.New("damaged"), err))
		}
		e.Path, e.Type, e.Link = string(path), typ[0], string(link)
		if err := e.check(); err != nil {
			return nil, fmt.Errorf("decode manifest line %d: %w", n, err)
		}
		m.Entries = append(m.Entries, e)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("decode manifest: %w", err)
	}
	for i := 1; i < len(m.Entries); i++ {
		if m.Entries[i-1].Path >= m.Entries[i].Path {
			return nil, fmt.Errorf("decode manifest line %d: out of order", i+1)
		}
	}
	if !bytes.Equal(m.Encode(), b) {
		return nil, errors.New("decode manifest: damaged: not as it was written")
	}
	return m, nil
}

// checkTree says whether the entries make one tree: no name twice, and nothing
// below a link or a file, through which making it would leave the layer.
func (m *Manifest) checkTree() error {
	dirs := map[string]bool{".": true}
	for i, e := range m.Entries { // sorted: a directory comes before its content
		if err := e.check(); err != nil {
			return err
		}
		if i > 0 && m.Entries[i-1].Path == e.Path {
			return fmt.Errorf("path %q is there twice", e.Path)
		}
		if !dirs[filepath.Dir(e.Path)] {
			return fmt.Errorf("path %q lies in no directory of the layer", e.Path)
		}
		if e.Type == 'd' {
			dirs[e.Path] = true
		}
	}
	return nil
}

func (e Entry) check() error {
	if !filepath.IsLocal(e.Path) || filepath.Clean(e.Path) != e.Path || e.Path == "." || strings.IndexByte(e.Path, 0) >= 0 {
		return fmt.Errorf("path %q leaves the layer", e.Path)
	}
	if e.Mode&^0o777 != 0 || e.Size < 0 {
		return fmt.Errorf("mode %o, size %d of %q: out of range", e.Mode, e.Size, e.Path)
	}
	switch e.Type {
	case 'd', 'l', 'w':
		if e.Digest != "" {
			return fmt.Errorf("digest of %q, which has no content", e.Path)
		}
	case 'f':
		if b, err := hex.DecodeString(e.Digest); err != nil || len(b) != sha256.Size {
			return fmt.Errorf("digest %q of %q is none", e.Digest, e.Path)
		}
	default:
		return fmt.Errorf("type %q of %q is unknown", e.Type, e.Path)
	}
	return nil
}

// ---- objects ------------------------------------------------------------

// layerTime is the mtime of everything in a layer: two bakes are equal.
var layerTime = time.Unix(1577836800, 0) // 2020-01-01

// emptyDigest is of no content: there is no object of it.
var emptyDigest = hex.EncodeToString(sha256.New().Sum(nil))

// objectPath is where a file's content lies. Files that are executable have
// an object of their own: hard links share the mode.
func (s *Store) objectPath(digest string, exec bool) string {
	x := ""
	if exec {
		x = "x"
	}
	return s.Path("objects", digest[:2], digest[2:]+x)
}

// HasObject says whether the content is there. Empty files need none.
func (s *Store) HasObject(digest string, size int64, exec bool) bool {
	if size == 0 && digest == emptyDigest {
		return true
	}
	st, err := os.Lstat(s.objectPath(digest, exec))
	return err == nil && st.Size() == size
}

// OpenObject opens content for reading.
func (s *Store) OpenObject(digest string, exec bool) (*os.File, error) {
	if digest == emptyDigest {
		return os.Open(os.DevNull)
	}
	return os.Open(s.objectPath(digest, exec))
}

// PutObject stores content and gives its digest and size.
func (s *Store) PutObject(r io.Reader, exec bool) (digest string, size int64, err error) {
	f, err := os.CreateTemp(s.Path("tmp"), "object-")
	if err != nil {
		return "", 0, s.Explain(fmt.Errorf("store object: %w", err))
	}
	defer os.Remove(f.Name()) // gone already when it was published
	h := sha256.New()
	size, err = io.Copy(io.MultiWriter(f, h), r)
	if err != nil {
		return "", 0, errors.Join(s.Explain(fmt.Errorf("store object: %w", err)), f.Close())
	}
	digest = hex.EncodeToString(h.Sum(nil))
	if size == 0 {
		return digest, 0, f.Close()
	}
	path := s.objectPath(digest, exec)
	mode := os.FileMode(0o444)
	if exec {
		mode = 0o555
	}
	err = errors.Join(f.Chmod(mode), f.Close(), os.Chtimes(f.Name(), layerTime, layerTime))
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		// Link, not rename: a second writer of the same content must not
		// replace an inode that layers link to.
		if err = os.Link(f.Name(), path); errors.Is(err, os.ErrExist) {
			err = nil
			// A power cut may leave a name without all of its content: no layer
			// has it, for those are published after a flush.
			if st, serr := os.Lstat(path); serr != nil || st.Size() != size {
				err = os.Rename(f.Name(), path)
			}
		}
	}
	if err != nil {
		return "", 0, s.Explain(fmt.Errorf("store object: %w", err))
	}
	return digest, size, nil
}

// AddTree stores every file below dir and gives the manifest. It goes by
// descriptors and follows no link: what is there may have been written by a
// workload, which must be dead. skip leaves out a path and what is below it.
// A tree below the store's own tmp/ is given up: its files may become the
// store's (see adopt) instead of being copied.
func (s *Store) AddTree(ctx context.Context, dir *os.File, skip func(path string) bool) (*Manifest, error) {
	m := &Manifest{}
	err := s.addDir(ctx, dir, "", addOptions{skip: skip, adopt: s.isStaged(dir), left: bound()}, m)
	return m, s.Explain(err)
}

// maxTreeBytes bounds what is taken of a tree: a file may say that it has any
// size, and take nothing on the disk that it comes from.
const maxTreeBytes = 64 << 30

func bound() *int64 {
	n := int64(maxTreeBytes)
	return &n
}

// addOptions say what a tree may hold.
type addOptions struct {
	left *int64                 // bytes that may still come; nil is no bound
	skip func(path string) bool // nil: nothing
	// lenient leaves out devices, sockets and pipes and drops set-id bits,
	// where it is an error otherwise: every distribution's root has some.
	lenient bool
	// adopt takes files over instead of copying them where that is safe.
	adopt bool
}

// maxDepth bounds how deep folders lie, each of which is held open.
const maxDepth = 512

func checkDepth(path string) error {
	if strings.Count(path, "/") >= maxDepth {
		return fmt.Errorf("add %q…: more than %d folders deep", path[:80], maxDepth)
	}
	return nil
}

func (s *Store) addDir(ctx context.Context, dir *os.File, prefix string, o addOptions, m *Manifest) error {
	if err := checkDepth(prefix); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read %q: %w", prefix, err)
	}
	sort.Strings(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(prefix, name)
		if o.skip != nil && o.skip(path) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("read %q: %w", path, err)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			buf := make([]byte, 4096)
			n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
			if err != nil {
				return fmt.Errorf("read link %q: %w", path, err)
			}
			m.Entries = append(m.Entries, Entry{Path: path, Type: 'l', Mode: 0o777, Link: string(buf[:n])})
		case unix.S_IFDIR, unix.S_IFREG:
			fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				return fmt.Errorf("open %q: %w", path, err)
			}
			f := os.NewFile(uintptr(fd), path)
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				m.Entries = append(m.Entries, Entry{Path: path, Type: 'd', Mode: 0o755})
				err = s.addDir(ctx, f, path, o, m)
			} else {
				err = s.addFile(f, path, o, m)
			}
			f.Close()
			if err != nil {
				return err
			}
		default:
			if o.lenient {
				continue
			}
			return fmt.Errorf("add %q: neither file, directory nor link", path)
		}
	}
	return nil
}

func (s *Store) addFile(f *os.File, path string, o addOptions, m *Manifest) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read %q: %w", path, err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("add %q: not a regular file", path)
	}
	if st.Mode()&(os.ModeSetuid|os.ModeSetgid) != 0 && !o.lenient {
		return fmt.Errorf("add %q: set-id bit", path)
	}
	if o.left != nil {
		if *o.left -= st.Size(); *o.left < 0 {
			return fmt.Errorf("add %q: more than %d GiB in all", path, maxTreeBytes>>30)
		}
	}
	exec := st.Mode()&0o111 != 0
	mode := uint32(0o444)
	if exec {
		mode = 0o555
	}
	var d string
	var n int64
	adopted := false
	if o.adopt {
		if d, n, adopted, err = s.adopt(f, exec); err == nil && !adopted {
			_, err = f.Seek(0, io.SeekStart)
		}
	}
	if err == nil && !adopted {
		d, n, err = s.PutObject(io.LimitReader(f, st.Size()), exec) // somebody may still be writing
	}
	if err != nil {
		return fmt.Errorf("add %q: %w", path, err)
	}
	m.Entries = append(m.Entries, Entry{Path: path, Type: 'f', Mode: mode, Size: n, Digest: d})
	return nil
}

// ---- layers -------------------------------------------------------------

func hexOf(digest string) (string, error) {
	h, ok := strings.CutPrefix(digest, "sha256:")
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("digest %q: not sha256:<64 hex>", digest)
	}
	return h, nil
}

// PublishLayer makes the layer of a manifest out of hard links to objects.
// Publishing what is there already does nothing; two at once are fine.
// What names the layer must be written before a prune may look: see Publish.
func (s *Store) PublishLayer(ctx context.Context, m *Manifest) (path string, err error) {
	defer func() { err = s.Explain(err) }()
	enc := m.Encode() // sorts
	if err := m.checkTree(); err != nil {
		return "", fmt.Errorf("make layer: %w", err)
	}
	sum := sha256.Sum256(enc)
	id := hex.EncodeToString(sum[:])
	final := s.Path("layers", id)
	if p, err := s.LayerPath("sha256:" + id); err == nil {
		return p, nil
	}
	tmp, done, err := s.TempDir("layer")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, done()) }()
	work := filepath.Join(tmp, "layer")
	if err := os.Mkdir(work, 0o755); err != nil {
		return "", fmt.Errorf("make layer: %w", err)
	}
	if err := s.linkTree(ctx, m, filepath.Join(work, treeName)); err != nil {
		return "", err
	}
	if err := s.WriteFile(filepath.Join(work, "manifest"), enc); err != nil {
		return "", err
	}
	if err := syncAll(work); err != nil {
		return "", err
	}
	if err := os.Rename(work, final); err != nil {
		if p, serr := s.LayerPath("sha256:" + id); serr == nil {
			return p, nil // another was first
		}
		return "", fmt.Errorf("publish layer: %w", err)
	}
	return filepath.Join(final, "root"), syncDir(s.Path("layers"))
}

// linkTree makes the tree of a manifest, which was checked, at root.
func (s *Store) linkTree(ctx context.Context, m *Manifest, root string) error {
	if err := os.Mkdir(root, 0o755); err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	dirs := []string{root}
	for _, e := range m.Entries {
		err := ctx.Err()
		if err != nil {
			return err
		}
		p := filepath.Join(root, e.Path)
		switch e.Type {
		case 'd':
			err = os.Mkdir(p, os.FileMode(e.Mode&0o777))
			dirs = append(dirs, p)
		case 'l':
			if err = os.Symlink(e.Link, p); err == nil {
				ts := unix.NsecToTimespec(layerTime.UnixNano())
				err = unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
			}
		case 'f':
			err = s.linkObject(e, p)
		case 'w':
			err = unix.Mknod(p, unix.S_IFCHR, 0)
		}
		if err != nil {
			return fmt.Errorf("make layer: %w", err)
		}
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := errors.Join(os.Chmod(dirs[i], 0o755), os.Chtimes(dirs[i], layerTime, layerTime)); err != nil {
			return fmt.Errorf("make layer: %w", err)
		}
	}
	return nil
}

// osLink is replaced by tests that run out of links.
var osLink = os.Link

// linkObject links a file of a layer to its content. Empty files are never
// shared: they gain nothing and reach the file system's limit of links first.
// Where content reaches it (ext4: 65,000) a copy takes its place in the store;
// the layers that are there keep the first.
func (s *Store) linkObject(e Entry, p string) error {
	obj := s.objectPath(e.Digest, e.Mode&0o111 != 0)
	if e.Size == 0 {
		if e.Digest != emptyDigest {
			return fmt.Errorf("make %q: size 0, but not the digest of it", e.Path)
		}
		return copyFile(os.DevNull, p, e.Mode)
	}
	err := osLink(obj, p)
	if !errors.Is(err, unix.EMLINK) {
		return err
	}
	if err := copyFile(obj, p, e.Mode); err != nil {
		return err
	}
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	tmp := s.Path("tmp", "object-"+hex.EncodeToString(b[:]))
	if err := os.Link(p, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, obj); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

// copyFile copies content to a name that must not be there.
func copyFile(from, to string, mode uint32) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Chmod(os.FileMode(mode&0o777)), dst.Close(), os.Chtimes(to, layerTime, layerTime))
}

// Layers lists the digests of all layers.
func (s *Store) Layers() ([]string, error) {
	ents, err := os.ReadDir(s.Path("layers"))
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	var out []string
	for _, e := range ents {
		out = append(out, "sha256:"+e.Name())
	}
	return out, nil
}
