package image

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Bounds of what an archive may unpack to: an archive is not trusted.
const (
	maxTarBytes   = 64 << 30
	maxTarEntries = 2 << 20
	maxTarDepth   = 128
	maxTarRatio   = 1100     // gzip reaches 1032
	maxTarSlack   = 64 << 20 // unpacked bytes for which the ratio is not asked
	maxTarSparse  = 1 << 30  // holes cost no bytes of the archive
)

var errTooMuch = errors.New("more than is taken")

// extractor applies tar archives below one directory. Every name is looked up
// as a process chrooted there would (openat2, RESOLVE_IN_ROOT), so no link
// leads out; what is made is made by name in a directory that is held open.
type extractor struct {
	root           int // O_PATH descriptor
	depth          int // of the root below /
	entries, bytes int64
	sparse         int64
	links          bool // a symbolic link was made: depth must be measured
	whiteouts      bool // honour .wh. names
	// fresh are the names that the layer being applied made: its whiteouts
	// hide what is below it, in whatever order they come.
	fresh map[place]bool
}

// place is a name in a directory, whichever way led there.
type place struct {
	dir  uint64 // inode: all directories are of one file system
	name string
}

func newExtractor(dir string, whiteouts bool) (*extractor, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", dir, err)
	}
	x := &extractor{root: fd, whiteouts: whiteouts}
	if x.depth, err = depthOf(fd); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return x, nil
}

// depthOf counts the directories above an open one.
func depthOf(fd int) (int, error) {
	p, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return strings.Count(p, "/"), err
}

func inode(fd int) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return st.Ino, err
}

func (x *extractor) close() { unix.Close(x.root) }

// decompress finds gzip, zstd or plain by their first bytes.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 1<<16)
	head, _ := br.Peek(6)
	switch {
	case len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b:
		return gzip.NewReader(br)
	case len(head) >= 4 && string(head[:4]) == "\x28\xb5\x2f\xfd":
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case len(head) >= 6 && string(head) == "\xfd7zXZ\x00", len(head) >= 3 && string(head[:3]) == "BZh":
		return nil, hinted.New(errors.New("xz and bzip2 are not read"), "unpack it first: xz -d, bzip2 -d")
	}
	return io.NopCloser(br), nil
}

// counted counts compressed bytes, for the ratio.
type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// bounded ends an unpacked stream that grows beyond all proportion.
type bounded struct {
	r  io.Reader
	in *counted
	n  int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.n += int64(n)
	if b.n > maxTarBytes || b.n > b.in.n*maxTarRatio+maxTarSlack {
		return 0, fmt.Errorf("%d bytes from %d: %w", b.n, b.in.n, errTooMuch)
	}
	return n, err
}

// apply unpacks one archive and reads it to its end, so that who hashes r has
// seen all of it. each, where not nil, is given every unpacked byte.
func (x *extractor) apply(r io.Reader, each io.Writer) error {
	in := &counted{r: r}
	z, err := decompress(in)
	if err != nil {
		return err
	}
	defer z.Close()
	var out io.Reader = &bounded{r: z, in: in}
	if each != nil {
		out = io.TeeReader(out, each)
	}
	x.fresh = map[place]bool{}
	tr := tar.NewReader(out)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if _, err = io.Copy(io.Discard, out); err == nil { // padding
				_, err = io.Copy(io.Discard, in)
			}
			return err
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		x.entries++
		x.bytes += max(h.Size, 0)
		if isSparse(h) {
			x.sparse += max(h.Size, 0)
		}
		if x.entries > maxTarEntries || x.bytes > maxTarBytes || x.bytes < 0 || x.sparse > maxTarSparse {
			return fmt.Errorf("read archive: %d entries, %d bytes: %w", x.entries, x.bytes, errTooMuch)
		}
		if err := x.entry(h, tr); err != nil {
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
	}
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// clean gives a name as a path below the root; "" is the root itself.
func clean(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("NUL byte in a name")
	}
	for _, p := range strings.Split(name, "/") {
		if p == ".." {
			return "", errors.New(`".." in a name`)
		}
	}
	c := strings.TrimPrefix(path.Clean("/"+name), "/")
	if strings.Count(c, "/") > maxTarDepth || len(c) > 4000 {
		return "", errors.New("name is too deep")
	}
	return c, nil
}

// parent opens the directory that name lies in, and makes what is missing.
func (x *extractor) parent(name string) (fd int, base string, err error) {
	if fd, base, err = x.walk(name); err != nil || !x.links {
		return fd, base, err
	}
	// Links let short names lead arbitrarily deep.
	if d, err := depthOf(fd); err != nil || d-x.depth > maxTarDepth {
		unix.Close(fd)
		return -1, "", errors.Join(errors.New("name is too deep"), err)
	}
	return fd, base, nil
}

func (x *extractor) walk(name string) (fd int, base string, err error) {
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	p := dir
	if p == "" {
		p = "."
	}
	fd, err = unix.Openat2(x.root, p, &how)
	if errors.Is(err, unix.ENOENT) && dir != "" {
		up, b, err := x.parent(dir)
		if err != nil {
			return -1, "", err
		}
		if err = unix.Mkdirat(up, b, 0o755); err == nil {
			err = x.made(up, b)
		}
		unix.Close(up)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, "", err
		}
		if fd, err = unix.Openat2(x.root, p, &how); err != nil {
			return -1, "", err // a link to nowhere
		}
		return fd, base, nil
	}
	return fd, base, err
}

// made notes that this layer has the name.
func (x *extractor) made(dir int, name string) error {
	if !x.whiteouts {
		return nil
	}
	ino, err := inode(dir)
	x.fresh[place{ino, name}] = true
	return err
}

func (x *extractor) entry(h *tar.Header, r io.Reader) error {
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return nil // the sandbox has a /dev of its own
	}
	if name == "" {
		return nil
	}
	dir, base, err := x.parent(name)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if x.whiteouts && strings.HasPrefix(base, ".wh.") {
		return x.whiteout(dir, base)
	}
	if err := x.made(dir, base); err != nil {
		return err
	}
	var st unix.Stat_t
	there := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	if there && !(h.Typeflag == tar.TypeDir && st.Mode&unix.S_IFMT == unix.S_IFDIR) {
		if err := removeAt(dir, base); err != nil {
			return err
		}
		there = false
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if there {
			return nil
		}
		return unix.Mkdirat(dir, base, 0o755)
	case tar.TypeReg, tar.TypeGNUSparse:
		mode := uint32(0o644)
		if h.Mode&0o111 != 0 {
			mode = 0o755 // and no set-id bit
		}
		fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), base)
		_, err = io.Copy(f, r)
		return errors.Join(err, f.Close())
	case tar.TypeSymlink:
		if h.Linkname == "" || strings.IndexByte(h.Linkname, 0) >= 0 || len(h.Linkname) > 4000 {
			return errors.New("bad link")
		}
		x.links = true
		return unix.Symlinkat(h.Linkname, dir, base)
	case tar.TypeLink:
		to, err := clean(h.Linkname)
		if err != nil || to == "" {
			return errors.Join(errors.New("bad link"), err)
		}
		// No link through links: what is shared is what the name says.
		up, b := path.Split(to)
		from, err := unix.Openat2(x.root, "./"+up, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if err != nil {
			return err
		}
		defer unix.Close(from)
		if err := unix.Fstatat(from, b, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if m := st.Mode & unix.S_IFMT; m != unix.S_IFREG && m != unix.S_IFLNK {
			return errors.New("hard link to what is no file")
		}
		return unix.Linkat(from, b, dir, base, 0)
	}
	return fmt.Errorf("entries of type %q are not taken", h.Typeflag)
}

// whiteout hides what a lower layer has: one name, or (opaque) all names of
// the directory. What the present layer made stays.
func (x *extractor) whiteout(dir int, base string) error {
	if base == ".wh..wh..opq" {
		_, err := x.hideAll(dir)
		return err
	}
	hidden := strings.TrimPrefix(base, ".wh.")
	if hidden == "" || hidden == "." || hidden == ".." || strings.HasPrefix(base, ".wh..wh.") {
		return nil // aufs's own names
	}
	_, err := x.hide(dir, hidden)
	return err
}

// hideAll hides every name of a directory and says whether any stayed.
func (x *extractor) hideAll(dir int) (stayed bool, err error) {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	d := os.NewFile(uintptr(fd), ".")
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return false, err
	}
	for _, n := range names {
		s, err := x.hide(fd, n)
		if err != nil {
			return false, err
		}
		stayed = stayed || s
	}
	return stayed, nil
}

func (x *extractor) hide(dir int, name string) (stayed bool, err error) {
	ino, err := inode(dir)
	if err != nil {
		return false, err
	}
	fresh := x.fresh[place{ino, name}]
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP):
		if fresh {
			return true, nil
		}
		return false, unix.Unlinkat(dir, name, 0)
	case err != nil:
		return false, err
	}
	stayed, err = x.hideAll(fd)
	unix.Close(fd)
	if err != nil || stayed || fresh {
		return true, err
	}
	return false, unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}

// removeAt removes a name and all below it, by descriptors.
func removeAt(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), name)
	names, err := d.Readdirnames(-1)
	for _, n := range names {
		if err == nil {
			err = removeAt(fd, n)
		}
	}
	d.Close()
	if err != nil {
		return err
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}
