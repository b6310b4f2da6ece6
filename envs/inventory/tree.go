// Package inventory owns the knowledge of what is inside an environment: the
// packages that its installed metadata names, bills of materials of them, what
// a database of vulnerabilities says of them, and how two environments differ.
//
// Whatever an environment's files say was written by strangers: they are read
// from the store by content digest, never by path, and never without a bound.
// The package must never know how an environment is baked, signed or moved.
package inventory

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Tree is the files of an environment: those of its layer over those below.
type Tree struct {
	store   *rootfs.Store
	layers  []string // digests, topmost first
	entries map[string]rootfs.Entry
	names   []string // sorted
}

// OpenTree reads the manifests of an environment's layers.
func OpenTree(store *rootfs.Store, e *envs.Env) (*Tree, error) {
	var layers []*rootfs.Manifest
	digests := append([]string{e.Digest}, e.Below...)
	for _, digest := range digests {
		_, m, err := store.Layer(digest)
		if err != nil {
			return nil, fmt.Errorf("read environment %s: %w", envs.Short(digest), err)
		}
		layers = append(layers, m)
	}
	t := &Tree{store: store, layers: digests, entries: map[string]rootfs.Entry{}}
	for _, f := range rootfs.Stack(layers...).Entries { // sorted
		t.entries[f.Path] = f
		t.names = append(t.names, f.Path)
	}
	return t, nil
}

// Files lists all paths, sorted.
func (t *Tree) Files() []string { return t.names }

// errNoFile is a path where no file is.
var errNoFile = errors.New("no such file")

// read gives the beginning of a file, and whether that is all. Content that is
// not what the manifest says is an error.
func (t *Tree) read(p string, max int64) (text []byte, whole bool, err error) {
	e, ok := t.entries[p]
	if !ok || e.Type != 'f' {
		return nil, false, fmt.Errorf("read %q: %w", p, errNoFile)
	}
	if e.Size == 0 {
		return nil, true, nil // empty files have no object to speak of
	}
	f, err := t.store.OpenFile(e, t.layers...)
	if err != nil {
		return nil, false, fmt.Errorf("read %q: %w", p, err)
	}
	defer f.Close()
	h := sha256.New()
	var b bytes.Buffer
	n, err := io.Copy(io.MultiWriter(h, &first{&b, max}), f)
	if err != nil {
		return nil, false, fmt.Errorf("read %q: %w", p, err)
	}
	if hex.EncodeToString(h.Sum(nil)) != e.Digest {
		return nil, false, fmt.Errorf("read %q: its content was changed in the store", p)
	}
	return b.Bytes(), n <= max, nil
}

// first keeps the beginning of what is written.
type first struct {
	to   *bytes.Buffer
	left int64
}

func (f *first) Write(p []byte) (int, error) {
	n := min(int64(len(p)), f.left)
	f.to.Write(p[:n])
	f.left -= n
	return len(p), nil
}

// clean makes a stranger's text fit for one line of a document or a terminal.
func clean(s string, max int) string {
	s = strings.ToValidUTF8(s, "�")
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return ' '
		}
		return r
	}, s)
	s = strings.TrimSpace(s)
	if len(s) > max {
		s = strings.ToValidUTF8(s[:max], "") + "…"
	}
	return s
}
