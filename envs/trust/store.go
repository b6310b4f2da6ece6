package trust

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
)

// maxBundles bounds how many signatures of one environment are looked at.
const maxBundles = 64

// Bundles gives what is stored for a content digest.
func Bundles(store *rootfs.Store, digest string) ([][]byte, error) {
	dir := envs.SignaturesDir(store, digest)
	ents, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read signatures: %w", err)
	}
	var out [][]byte
	for _, e := range ents[:min(len(ents), maxBundles)] {
		b, err := ReadBundle(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// ReadBundle reads a bundle's file, which is not verified.
func ReadBundle(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read bundle %q: %w", path, errors.Unwrap(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxBundleBytes+1))
	if err == nil && len(b) > MaxBundleBytes {
		err = errors.New("too large for a bundle")
	}
	if err != nil {
		return nil, fmt.Errorf("read bundle %q: %w", path, err)
	}
	return b, nil
}

// Keep stores a bundle with its environment's content digest: one of each key.
// It says nothing about whether the signature holds.
func Keep(store *rootfs.Store, digest string, bundle []byte) (path string, err error) {
	s, err := readBundle(bundle)
	if err != nil {
		return "", fmt.Errorf("keep signature: %w", err)
	}
	path = filepath.Join(envs.SignaturesDir(store, digest), fileName(s.hint))
	return path, store.WriteFile(path, bundle)
}

// Keeper stores signatures that came along with what is imported. What is no
// bundle of ours (others sign images in other ways) is left out: it could not
// be verified anyway.
func Keeper(store *rootfs.Store) func(digest string, bundle []byte) error {
	return func(digest string, bundle []byte) error {
		if _, err := readBundle(bundle); err != nil {
			return nil //nolint:nilerr // see above
		}
		_, err := Keep(store, digest, bundle)
		return err
	}
}
