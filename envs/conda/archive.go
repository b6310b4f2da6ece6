package conda

import (
	"archive/tar"
	"archive/zip"
	"compress/bzip2"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	maxArchiveBytes = 16 << 30
	// Ratios say little about small archives.
	freeBytes = 64 << 20
	// zstd --ultra --long of conda-build stays below; it is what the decoder allocates.
	maxWindowBytes = 128 << 20
	// What of info/ is read into memory: paths.json has some 300 bytes for a file.
	maxInfoBytes = 64 << 20
	// rattler's floor of modification times, for file systems that have no earlier ones.
	minTime = 315532800
)

// budget is what all archives of an installation may write together.
type budget struct{ bytes, entries atomic.Int64 }

var errBudget = errors.New("unpacks to more than is allowed")

// member is one file or link of an archive. Files lie in the package's stage, by
// number: what their names say matters only when they are placed.
type member struct {
	file   string // its name in the stage
	link   string // target; "" is a file
	size   int64
	sha256 string
	mode   uint32
	mtime  int64 // seconds
}

// unpacked is an archive's content: members by path, and what is in info/.
type unpacked struct {
	members map[string]member
	info    map[string][]byte // of wantedInfo, by name
	about   int64             // mtime of info/about.json
}

var wantedInfo = map[string]bool{"index.json": true, "paths.json": true, "link.json": true, "files": true, "has_prefix": true, "no_link": true, "no_softlink": true, "about.json": true}

// openArchive finds a package's file in dir and verifies it.
func openArchive(dir string, p *Package) (*os.File, int64, error) {
	d, err := os.OpenRoot(dir)
	if err != nil {
		return nil, 0, err
	}
	defer d.Close()
	var f *os.File
	for _, name := range []string{p.SHA256, p.FileName, p.MD5} {
		if name == "" {
			continue
		}
		f, err = d.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, 0, fmt.Errorf("open archive: %w", err)
		}
	}
	if f == nil {
		return nil, 0, errors.New("its archive is not there")
	}
	size, err := verify(f, p)
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, size, nil
}

func verify(f *os.File, p *Package) (int64, error) {
	st, err := f.Stat()
	switch {
	case err != nil:
		return 0, err
	case !st.Mode().IsRegular():
		return 0, errors.New("its archive is no file")
	case st.Size() > maxArchiveBytes:
		return 0, fmt.Errorf("archive has over %d bytes", int64(maxArchiveBytes))
	case p.SizeBytes > 0 && st.Size() != p.SizeBytes:
		return 0, fmt.Errorf("archive has %d bytes, the lock says %d", st.Size(), p.SizeBytes)
	}
	var h hash.Hash
	algorithm, want := "sha256", p.SHA256
	if want != "" {
		h = sha256.New()
	} else {
		algorithm, want = "md5", p.MD5
		h = md5.New()
	}
	if _, err := io.Copy(h, f); err != nil {
		return 0, fmt.Errorf("read archive: %w", err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return 0, fmt.Errorf("archive has %s %s, the lock says %s", algorithm, got, want)
	}
	return st.Size(), nil
}

// unpacker puts one archive into a stage of its own.
type unpacker struct {
	ctx    context.Context
	stage  *tree
	all    *budget
	limits Limits
	packed int64
	out    *unpacked
	places *places
	files  int // in the stage
	buf    []byte
	// what this archive's streams gave, for the ratio
	streamed int64
}

func (u *unpacker) unpack(f *os.File, name string) error {
	u.out = &unpacked{members: map[string]member{}, info: map[string][]byte{}, about: minTime}
	u.places = newPlaces()
	u.buf = make([]byte, 256<<10)
	if strings.HasSuffix(name, ".tar.bz2") {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		return u.tar(bzip2.NewReader(f))
	}
	z, err := zip.NewReader(f, u.packed)
	if err != nil {
		return fmt.Errorf("open archive: %w", err)
	}
	if len(z.File) > 16 {
		return errors.New("open archive: more than the parts of a .conda file")
	}
	parts := map[string]*zip.File{}
	for _, e := range z.File {
		kind, _, ok := strings.Cut(e.Name, "-")
		if !ok || !strings.HasSuffix(e.Name, ".tar.zst") || kind != "info" && kind != "pkg" {
			continue // metadata.json, and what later versions may add
		}
		if parts[kind] != nil {
			return fmt.Errorf("open archive: part %s twice", kind)
		}
		if e.Method != zip.Store {
			return fmt.Errorf("open archive: part %s is compressed twice", kind)
		}
		parts[kind] = e
	}
	for _, kind := range []string{"info", "pkg"} {
		if parts[kind] == nil {
			return fmt.Errorf("open archive: no part %s-….tar.zst", kind)
		}
		if err := u.part(parts[kind]); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) part(e *zip.File) error {
	r, err := e.Open()
	if err != nil {
		return fmt.Errorf("open archive: %w", err)
	}
	defer r.Close()
	d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindowBytes), zstd.WithDecoderLowmem(true))
	if err != nil {
		return fmt.Errorf("open archive: %w", err)
	}
	defer d.Close()
	return u.tar(d)
}

// meter counts what decompression gives: the tar reader skips what nobody reads,
// which costs time all the same.
type meter struct {
	u *unpacker
	r io.Reader
}

func (m meter) Read(b []byte) (int, error) {
	if err := m.u.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.r.Read(b)
	m.u.streamed += int64(n)
	if m.u.streamed > freeBytes && m.u.streamed/m.u.limits.Ratio > m.u.packed {
		return n, fmt.Errorf("%w: %d times its size", errBudget, m.u.limits.Ratio)
	}
	return n, err
}

func (u *unpacker) tar(r io.Reader) error {
	t := tar.NewReader(meter{u, r})
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		if u.all.entries.Add(-1) < 0 {
			return fmt.Errorf("unpack: %w: %d entries", errBudget, u.limits.Entries)
		}
		if err := u.entry(t, h); err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
}

func (u *unpacker) entry(r io.Reader, h *tar.Header) error {
	p := strings.TrimPrefix(h.Name, "./")
	if h.Typeflag == tar.TypeDir {
		if p = strings.TrimSuffix(p, "/"); p == "" || p == "." {
			return nil
		}
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := judge(p); err != nil {
		return err
	}
	if name, ok := strings.CutPrefix(p, "info/"); ok || p == "info" {
		return u.infoFile(r, h, name)
	}
	if h.Typeflag == tar.TypeDir {
		return nil // made where a file needs it, or paths.json has it
	}
	if err := u.places.add(p); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return u.file(p, r, h.Size, h)
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxPathBytes || strings.ContainsRune(h.Linkname, 0) {
			return fmt.Errorf("link %s: target %q", shown(p), shown(h.Linkname))
		}
		u.out.members[p] = member{link: h.Linkname, size: int64(len(h.Linkname)), mtime: max(h.ModTime.Unix(), minTime)}
		return nil
	case tar.TypeLink:
		// A copy: two names of one file would both change when one is patched.
		from := strings.TrimPrefix(h.Linkname, "./")
		if err := judge(from); err != nil {
			return fmt.Errorf("hard link %s: %w", shown(p), err)
		}
		m, ok := u.out.members[from]
		if !ok || m.link != "" || from == p {
			return fmt.Errorf("hard link %s: %q is no file before it", shown(p), shown(from))
		}
		fd, err := u.stage.open(m.file, m.mode, false)
		if err != nil {
			return fmt.Errorf("hard link %s: %w", shown(p), err)
		}
		f := os.NewFile(uintptr(fd), from)
		defer f.Close()
		return u.file(p, f, m.size, &tar.Header{Mode: int64(m.mode), ModTime: time.Unix(m.mtime, 0)})
	}
	return fmt.Errorf("%s is a device or another special file (tar type %q)", shown(p), h.Typeflag)
}

// file writes one file.
func (u *unpacker) file(p string, r io.Reader, size int64, h *tar.Header) error {
	if u.all.bytes.Add(-size) < 0 {
		return fmt.Errorf("%w: %d bytes", errBudget, u.limits.Bytes)
	}
	m := member{file: strconv.Itoa(u.files), size: size, mode: uint32(h.Mode) & 0o777, mtime: max(h.ModTime.Unix(), minTime)}
	u.files++
	fd, err := u.stage.create(m.file)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), p)
	defer f.Close()
	sum := sha256.New()
	n, err := io.CopyBuffer(io.MultiWriter(onlyWriter{f}, sum), onlyReader{io.LimitReader(r, size)}, u.buf)
	if err != nil {
		return fmt.Errorf("write %s: %w", shown(p), err)
	}
	if n != size {
		return fmt.Errorf("%s has %d of %d bytes", shown(p), n, size)
	}
	if err := finish(fd, m.mode, m.mtime); err != nil {
		return fmt.Errorf("write %s: %w", shown(p), err)
	}
	m.sha256 = hex.EncodeToString(sum.Sum(nil))
	u.out.members[p] = m
	return f.Close()
}

// Without ReadFrom and WriteTo io.CopyBuffer uses its buffer.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)

func (u *unpacker) infoFile(r io.Reader, h *tar.Header, name string) error {
	if h.Typeflag != tar.TypeReg || !wantedInfo[name] {
		return nil
	}
	if u.out.info[name] != nil {
		return fmt.Errorf("info/%s twice", name)
	}
	if h.Size > maxInfoBytes {
		return fmt.Errorf("info/%s has over %d bytes", name, maxInfoBytes)
	}
	b, err := io.ReadAll(io.LimitReader(r, maxInfoBytes))
	if err != nil {
		return fmt.Errorf("info/%s: %w", name, err)
	}
	if name == "about.json" {
		u.out.about = max(h.ModTime.Unix(), minTime)
	}
	u.out.info[name] = append([]byte{}, b...)
	return nil
}
