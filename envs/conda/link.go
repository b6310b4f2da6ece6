package conda

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// link places what plan decided on, package by package.
func (i *installation) link(ctx context.Context) error {
	under, err := openTree(i.root.root, stageName)
	if err != nil {
		return fmt.Errorf("install conda packages: %w", err)
	}
	defer under.close()
	for _, p := range i.pkgs {
		if err := i.linkOne(ctx, under, p); err != nil {
			return p.fail(err)
		}
	}
	return nil
}

func (i *installation) linkOne(ctx context.Context, under *tree, p *installed) error {
	stage, err := openTree(under.root, p.stage)
	if err != nil {
		return err
	}
	defer stage.close()
	// As rattler: what is changed is a second younger than the package, not now.
	changed := p.about + 1
	for k := range p.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &p.entries[k]
		m := p.members[e.from]
		switch {
		case e.PathType == pycFile:
			continue
		case e.PathType == directory:
			if e.from != "" {
				if _, err := i.root.dir(e.Path, true); err != nil {
					return err
				}
			}
			continue
		case e.PathType == softlink:
			// Its own text's hash, as rattler has it: what it leads to may change.
			sum := sha256.Sum256([]byte(e.target))
			e.InPrefix = hex.EncodeToString(sum[:])
			if e.SizeBytes == nil {
				n := int64(len(e.target))
				e.SizeBytes = &n
			}
			if err := i.root.symlink(e.Path, e.target); err != nil {
				return err
			}
			i.links[e.Path] = p
		case e.PathType == entryPoint:
			n := int64(len(e.content))
			e.SizeBytes = &n
			if e.SHA256, _, err = i.write(e.Path, 0o775, changed, func(w io.Writer) error {
				_, err := io.WriteString(w, e.content)
				return err
			}); err != nil {
				return err
			}
		case e.Placeholder != "":
			if err := i.patch(stage, e, m, changed); err != nil {
				return err
			}
		default:
			if err := i.keep(stage, p, e, m); err != nil {
				return err
			}
		}
		i.result.Files++
		i.result.Bytes += *e.SizeBytes
	}
	return nil
}

// keep moves a file as it is.
func (i *installation) keep(stage *tree, p *installed, e *pathEntry, m member) error {
	if e.SHA256 != m.sha256 { // old packages have none
		e.InPrefix = m.sha256
	}
	if err := i.root.move(stage, m.file, e.Path); err != nil {
		return err
	}
	if i.o.FreezePycs && strings.HasSuffix(e.Path, ".pyc") && e.OriginalPath == "" {
		sum, err := i.freeze(p, e, m)
		if err != nil {
			return err
		}
		if sum != "" {
			e.InPrefix = sum
		}
	}
	return nil
}

// patch writes a file with the prefix it will be found at.
func (i *installation) patch(stage *tree, e *pathEntry, m member, mtime int64) error {
	replace := replaceText
	if e.FileMode == "binary" {
		replace = replaceBinary
	}
	var data []byte
	if m.size > 0 {
		fd, err := stage.open(m.file, m.mode, false)
		if err != nil {
			return err
		}
		// Mapped: a binary may be larger than the memory that a bake has.
		data, err = unix.Mmap(fd, 0, int(m.size), unix.PROT_READ, unix.MAP_PRIVATE)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("read %s: %w", shown(e.from), err)
		}
		defer unix.Munmap(data) //nolint:errcheck // nothing follows from it
	}
	sum, n, err := i.write(e.Path, m.mode, mtime, func(w io.Writer) error { return replace(w, data, e.Placeholder, i.o.Prefix) })
	if err != nil {
		return err
	}
	if sum != e.SHA256 {
		e.InPrefix = sum
	}
	e.SizeBytes = &n
	return nil
}

// write makes a file and gives its hash and size.
func (i *installation) write(p string, mode uint32, mtime int64, fill func(io.Writer) error) (sum string, size int64, err error) {
	fd, err := i.root.create(p)
	if err != nil {
		return "", 0, err
	}
	f := os.NewFile(uintptr(fd), p)
	defer f.Close()
	h := sha256.New()
	c := &capped{w: io.MultiWriter(f, h), left: i.o.Limits.Bytes}
	w := bufio.NewWriterSize(c, 64<<10)
	if err := errors.Join(fill(w), w.Flush()); err != nil {
		return "", 0, fmt.Errorf("write %s: %w", shown(p), err)
	}
	if err := finish(fd, mode, mtime); err != nil {
		return "", 0, fmt.Errorf("finish %s: %w", shown(p), err)
	}
	return hex.EncodeToString(h.Sum(nil)), i.o.Limits.Bytes - c.left, f.Close()
}

// capped bounds what a replacement may grow to: a one-byte placeholder would make
// a text as many times longer as the prefix has bytes.
type capped struct {
	w    io.Writer
	left int64
}

func (c *capped) Write(b []byte) (int, error) {
	if c.left -= int64(len(b)); c.left < 0 {
		return 0, errBudget
	}
	return c.w.Write(b)
}

// freeze makes a time-stamped .pyc that belongs to its source valid for good: PEP
// 552's unchecked hash, of which the value is not looked at. Whoever changes the
// source later has to compile it. It gives the new content's hash, "" for none.
func (i *installation) freeze(p *installed, e *pathEntry, m member) (string, error) {
	dir, file := path.Split(e.from)
	stem, _, _ := strings.Cut(file, ".cpython-")
	source, ok := p.members[path.Join(path.Dir(path.Clean(dir)), stem+".py")]
	if path.Base(path.Clean(dir)) != "__pycache__" || !ok || source.link != "" || m.size < 16 {
		return "", nil
	}
	fd, err := i.root.open(e.Path, m.mode, true)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), e.Path)
	defer f.Close()
	var head [16]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return "", fmt.Errorf("read %s: %w", shown(e.Path), err)
	}
	flags, mtime, size := binary.LittleEndian.Uint32(head[4:]), binary.LittleEndian.Uint32(head[8:]), binary.LittleEndian.Uint32(head[12:])
	if flags != 0 || mtime != uint32(source.mtime) || size != uint32(source.size) {
		return "", finish(fd, m.mode, m.mtime)
	}
	copy(head[4:], []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	if _, err := f.WriteAt(head[:], 0); err != nil {
		return "", fmt.Errorf("write %s: %w", shown(e.Path), err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", shown(e.Path), err)
	}
	if err := finish(fd, m.mode, m.mtime); err != nil {
		return "", fmt.Errorf("finish %s: %w", shown(e.Path), err)
	}
	return hex.EncodeToString(h.Sum(nil)), f.Close()
}

// checkLinks follows every link that was placed: by way of other links one may
// leave the prefix though its text does not.
func (i *installation) checkLinks(context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(i.links)) {
		outside, err := i.root.leads(name)
		if outside {
			err = fmt.Errorf("link %s leads out of the prefix by way of other links", shown(name))
		}
		if err != nil {
			return i.links[name].fail(err)
		}
	}
	return nil
}
