package share

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

// unpacked is a decompressed stream that ends where it grows beyond all
// proportion. It hashes what goes in and what comes out.
type unpacked struct {
	ctx           context.Context
	z             io.ReadCloser
	compressed    bool
	lim           limits
	in, out       int64
	packed, plain hash.Hash
}

func sum(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// inReader counts and hashes what is read of the packed stream.
type inReader struct {
	r io.Reader
	u *unpacked
}

func (i inReader) Read(p []byte) (int, error) {
	if err := i.u.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := i.r.Read(p)
	i.u.in += int64(n)
	_, _ = i.u.packed.Write(p[:n])
	return n, err
}

// unpack finds gzip, zstd or plain by the first bytes.
func unpack(ctx context.Context, r io.Reader, lim limits) (*unpacked, error) {
	u := &unpacked{ctx: ctx, compressed: true, lim: lim, packed: sha256.New(), plain: sha256.New()}
	br := bufio.NewReaderSize(inReader{r, u}, 1<<16)
	head, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b:
		u.z, err = gzip.NewReader(br)
	case len(head) >= 4 && string(head[:4]) == "\x28\xb5\x2f\xfd":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20), zstd.WithDecoderMaxWindow(128<<20)); err == nil {
			u.z = z.IOReadCloser()
		}
	case strings.HasPrefix(string(head), "\xfd7zXZ\x00"), strings.HasPrefix(string(head), "BZh"):
		return nil, hinted.New(errors.New("xz and bzip2 are not read"), "unpack it first: xz -d, bzip2 -d")
	default:
		u.z, u.compressed = io.NopCloser(br), false
	}
	return u, err
}

func (u *unpacked) Read(p []byte) (int, error) {
	n, err := u.z.Read(p)
	u.out += int64(n)
	if u.out > u.lim.bytes || u.out > u.in*u.lim.ratio+u.lim.slack {
		return 0, fmt.Errorf("%d bytes from %d: %w", u.out, u.in, errTooMuch)
	}
	_, _ = u.plain.Write(p[:n])
	return n, err
}

// finish reads the rest, which must be zeros: what is in no entry is refused.
func (u *unpacked) finish() error {
	buf := make([]byte, 1<<15)
	for {
		n, err := u.Read(buf)
		for _, b := range buf[:n] {
			if b != 0 {
				return errors.New("something follows the archive's end")
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// nextEntry reads a header and refuses what no export writes: links to files,
// devices, attributes, holes, set-id bits, names that lead out.
func nextEntry(t *tar.Reader, lim limits) (*tar.Header, string, error) {
	h, err := t.Next()
	if errors.Is(err, io.EOF) {
		return nil, "", err
	}
	if err != nil {
		return nil, "", fmt.Errorf("read archive: %w", err)
	}
	name := h.Name
	if h.Typeflag == tar.TypeDir {
		name = strings.TrimSuffix(name, "/")
	}
	bad := ""
	switch {
	case !filepath.IsLocal(name) || path.Clean(name) != name || strings.IndexByte(name, 0) >= 0 || name == ".":
		bad = "a name that leads out, or not the plain one"
	case strings.Count(name, "/") > lim.depth || len(name) > 4000:
		bad = "its name is too deep"
	case h.Typeflag == tar.TypeLink:
		bad = "a hard link"
	case h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir && h.Typeflag != tar.TypeSymlink:
		bad = fmt.Sprintf("an entry of type %q", h.Typeflag)
	case h.Mode&0o6000 != 0:
		bad = "a set-id bit"
	case h.Size < 0 || h.Size > lim.bytes:
		bad = "its size"
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "SCHILY.xattr.") || strings.HasPrefix(k, "LIBARCHIVE.xattr.") || strings.HasPrefix(k, "SCHILY.acl.") {
			bad = "an extended attribute"
		}
		if strings.HasPrefix(k, "GNU.sparse.") {
			bad = "holes"
		}
	}
	if bad != "" {
		return nil, "", fmt.Errorf("read archive: %q: %s: not taken", bounded.Text(h.Name), bad)
	}
	return h, name, nil
}

// entryOf gives the manifest's entry of an archive's, after put has taken its
// content.
func entryOf(h *tar.Header, name string, t io.Reader, put func(io.Reader, bool) (string, int64, error)) (e rootfs.Entry, err error) {
	e = rootfs.Entry{Path: name}
	dir, base := path.Split(name)
	gone, whiteout := strings.CutPrefix(base, whiteoutPrefix)
	switch {
	case whiteout && (h.Typeflag != tar.TypeReg || h.Size != 0 || strings.HasPrefix(gone, whiteoutPrefix) || gone == "" || gone == "." || gone == ".."):
		return e, fmt.Errorf("read archive: %q: not a whiteout that is taken", bounded.Text(name))
	case whiteout:
		e.Type, e.Path = 'w', dir+gone
	case h.Typeflag == tar.TypeDir:
		e.Type, e.Mode = 'd', 0o755
	case h.Typeflag == tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > 4000 || strings.IndexByte(h.Linkname, 0) >= 0 {
			return e, fmt.Errorf("read archive: %q: a bad link", bounded.Text(name))
		}
		e.Type, e.Mode, e.Link = 'l', 0o777, h.Linkname
	default:
		exec := h.Mode&0o111 != 0
		e.Type, e.Mode = 'f', 0o444
		if exec {
			e.Mode = 0o555
		}
		if e.Digest, e.Size, err = put(t, exec); err != nil {
			return e, fmt.Errorf("read archive: %q: %w", bounded.Text(name), err)
		}
	}
	return e, nil
}

// entries are those of an archive, of which one may have been read already.
type entries struct {
	tr   *tar.Reader
	lim  limits
	h    *tar.Header // nil: none was
	name string
}

func (n *entries) next() (h *tar.Header, name string, err error) {
	if h, name = n.h, n.name; h != nil {
		n.h = nil
		return h, name, nil
	}
	return nextEntry(n.tr, n.lim)
}

// tree gives the manifest of as many entries, -1 is all, whose content put takes.
func (n *entries) tree(count int, put func(io.Reader, bool) (string, int64, error)) (*rootfs.Manifest, error) {
	m := &rootfs.Manifest{}
	names := 0
	for count < 0 || len(m.Entries) < count {
		h, name, err := n.next()
		if errors.Is(err, io.EOF) {
			if count >= 0 {
				return nil, fmt.Errorf("read archive: %w", errTooShort)
			}
			return m, nil
		}
		if err != nil {
			return nil, err
		}
		if names += len(name) + len(h.Linkname); len(m.Entries) >= n.lim.entries || names > n.lim.nameBytes {
			return nil, fmt.Errorf("read archive: over %d entries: %w", len(m.Entries), errTooMuch)
		}
		e, err := entryOf(h, name, n.tr, put)
		if err != nil {
			return nil, err
		}
		m.Entries = append(m.Entries, e)
	}
	return m, nil
}

// readFiles gives the files of an archive that are named, and refuses others.
func readFiles(t *tar.Reader, lim limits, dir string, names ...string) (map[string][]byte, error) {
	out := map[string][]byte{}
	for {
		h, name, err := nextEntry(t, lim)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeDir && (name == dir || strings.HasPrefix(dir, name+"/")) {
			continue
		}
		known := false
		for _, n := range names {
			known = known || name == path.Join(dir, n)
		}
		if !known || h.Typeflag != tar.TypeReg || out[path.Base(name)] != nil {
			return nil, fmt.Errorf("read archive: %q: does not belong there", bounded.Text(name))
		}
		b, err := readBounded(t, lim.recordBytes)
		if err != nil {
			return nil, fmt.Errorf("read archive: %q: %w", bounded.Text(name), err)
		}
		out[path.Base(name)] = b
	}
}

// readBounded reads all, or fails where it is more.
func readBounded(r io.Reader, limit int64) ([]byte, error) {
	b, err := bounded.Read(r, limit)
	if errors.Is(err, bounded.ErrTooLarge) {
		err = fmt.Errorf("over %d bytes: %w", limit, errTooMuch)
	}
	return b, err
}
