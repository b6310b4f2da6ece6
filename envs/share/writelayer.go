package share

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

// whiteoutPrefix marks, in an archive, a name that the layers below lose.
const whiteoutPrefix = ".wh."

// writeTree writes a layer's entries to an archive. What it writes depends on
// the manifest alone, with which every file is compared.
func writeTree(ctx context.Context, w *tar.Writer, tree *os.File, m *rootfs.Manifest) error {
	for _, e := range m.Entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := tar.Header{Name: e.Path, Mode: int64(e.Mode), ModTime: epoch}
		dir, base := path.Split(e.Path)
		if strings.HasPrefix(base, whiteoutPrefix) {
			return fmt.Errorf("write %q: an image cannot hold this name", e.Path)
		}
		switch e.Type {
		case 'd':
			h.Typeflag, h.Name = tar.TypeDir, e.Path+"/"
			if e.Path == "tmp" || e.Path == "var/tmp" { // sandboxes have their own; other runtimes do not
				h.Mode = 0o1777
			}
		case 'l':
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.Link
		case 'w':
			h.Typeflag, h.Name, h.Mode = tar.TypeReg, dir+whiteoutPrefix+base, 0o600
		case 'f':
			h.Typeflag, h.Size = tar.TypeReg, e.Size
		}
		if err := w.WriteHeader(&h); err != nil {
			return fmt.Errorf("write %q: %w", e.Path, err)
		}
		if e.Type != 'f' || e.Size == 0 {
			continue
		}
		if err := writeContent(w, tree, e); err != nil {
			return err
		}
	}
	return nil
}

func writeContent(w io.Writer, tree *os.File, e rootfs.Entry) error {
	fd, err := unix.Openat2(int(tree.Fd()), e.Path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return fmt.Errorf("read %q: %w", e.Path, err)
	}
	f := os.NewFile(uintptr(fd), e.Path)
	defer f.Close()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, hash), io.LimitReader(f, e.Size))
	if err != nil && !errors.Is(err, tar.ErrWriteTooLong) {
		return fmt.Errorf("read %q: %w", e.Path, err)
	}
	if hex.EncodeToString(hash.Sum(nil)) != e.Digest || n != e.Size {
		return hinted.New(fmt.Errorf("read %q: its content is damaged in the store", e.Path), "sbxrun env verify tells what else is; remove the environment and bake it again")
	}
	return nil
}

// writeFiles writes small files and their directory.
func writeFiles(w *tar.Writer, dir string, files []file) error {
	var up []string
	for d := dir; d != "."; d = path.Dir(d) {
		up = append([]string{d}, up...)
	}
	for _, d := range up {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755, ModTime: epoch}); err != nil {
			return fmt.Errorf("write %q: %w", d, err)
		}
	}
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: path.Join(dir, f.name), Mode: 0o444, Size: int64(len(f.data)), ModTime: epoch}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("write %q: %w", f.name, err)
		}
		if _, err := w.Write(f.data); err != nil {
			return fmt.Errorf("write %q: %w", f.name, err)
		}
	}
	return nil
}

type file struct {
	name string
	data []byte
}
