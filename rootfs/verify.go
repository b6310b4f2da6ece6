package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Damage is one thing that is not as the manifest says.
type Damage struct {
	Path    string `json:"path"`
	Problem string `json:"problem"`
}

// VerifyLayer reads a whole layer and compares it with its manifest, and the
// manifest with the digest. Content that is damaged in the store of objects
// too is taken out of it.
func (s *Store) VerifyLayer(ctx context.Context, digest string) ([]Damage, error) {
	root, m, err := s.Layer(digest)
	if err != nil && root != "" { // what it should hold is not known any more
		return []Damage{{"manifest", err.Error()}}, nil
	}
	if err != nil {
		return nil, err
	}
	var out []Damage
	if got := m.Digest(); got != digest {
		out = append(out, Damage{"manifest", "its digest is " + got})
	}
	more, err := s.verifyTree(ctx, root, m)
	return append(out, more...), err
}

// verifyTree compares a tree, or an image of one, with a manifest.
func (s *Store) verifyTree(ctx context.Context, path string, m *Manifest) (out []Damage, err error) {
	bad := func(path, format string, a ...any) { out = append(out, Damage{path, fmt.Sprintf(format, a...)}) }
	packed := Packed(path)
	tree, err := openTree(path)
	if packed && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EUCLEAN)) {
		return []Damage{{imageName, err.Error()}}, nil
	}
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	root := fdPath(int(tree.Fd())) + "/."
	want := map[string]bool{}
	for _, e := range m.Entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		want[e.Path] = true
		p := filepath.Join(root, e.Path)
		st, err := os.Lstat(p)
		if err != nil {
			bad(e.Path, "missing")
			continue
		}
		switch {
		case e.Type == 'd' && !st.IsDir(), e.Type == 'l' && st.Mode()&os.ModeSymlink == 0, e.Type == 'f' && !st.Mode().IsRegular(), e.Type == 'w' && !isWhiteout(st):
			bad(e.Path, "is another kind of file now")
			continue
		}
		if e.Type == 'l' {
			if l, err := os.Readlink(p); err != nil || l != e.Link {
				bad(e.Path, "links to %q, not %q", l, e.Link)
			}
			continue
		}
		if got := uint32(st.Mode().Perm()); got != e.Mode && e.Type != 'w' {
			bad(e.Path, "mode is %o, not %o", got, e.Mode)
		}
		if e.Type != 'f' {
			continue
		}
		got, err := FileDigest(p)
		if packed && err != nil {
			bad(e.Path, "%v", err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("verify: %w", err)
		}
		if got != e.Digest {
			bad(e.Path, "content changed: sha256 %s, not %s", got, e.Digest)
			if packed {
				continue
			}
			// The object is most likely the same inode: nothing new may be made
			// of it.
			if err := s.dropDamaged(e.Digest, e.Mode&0o111 != 0); err != nil {
				return nil, err
			}
		}
	}
	err = filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if rel, _ := filepath.Rel(root, p); err == nil && rel != "." && !want[rel] {
			bad(rel, "is not in the manifest")
		}
		return err
	})
	return out, err
}

// dropDamaged removes an object whose content is not what its name says.
func (s *Store) dropDamaged(digest string, exec bool) error {
	p := s.objectPath(digest, exec)
	got, err := FileDigest(p)
	if errors.Is(err, os.ErrNotExist) || err == nil && got == digest {
		return nil
	}
	if err == nil {
		err = os.Remove(p)
	}
	if err != nil {
		return fmt.Errorf("drop damaged object: %w", err)
	}
	return nil
}

// FileDigest gives the hex sha256 of a file's content.
func FileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
