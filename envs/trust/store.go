package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

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
	return readFile("bundle", path, MaxBundleBytes)
}

// Keep stores a bundle with its environment's content digest. own says that it
// was made here: it takes the place of those that name the same key. One that
// came from elsewhere takes nobody's place: anybody can name any key.
func Keep(store *rootfs.Store, digest string, bundle []byte, own bool) (path string, err error) {
	s, err := readBundle(bundle)
	if err != nil {
		return "", fmt.Errorf("keep signature: %w", err)
	}
	dir := envs.SignaturesDir(store, digest)
	key, content := sha256.Sum256([]byte(s.hint)), sha256.Sum256(bundle)
	prefix := hex.EncodeToString(key[:8]) + "-"
	path = filepath.Join(dir, prefix+hex.EncodeToString(content[:8])+".sigstore.json")
	if err := store.WriteFile(path, bundle); err != nil {
		return "", err
	}
	if !own {
		return path, nil
	}
	ents, err := os.ReadDir(dir)
	for _, o := range ents {
		if strings.HasPrefix(o.Name(), prefix) && o.Name() != filepath.Base(path) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, o.Name())))
		}
	}
	return path, err
}

// Keeper stores signatures that came along with what is imported. What is no
// bundle of ours (others sign images in other ways) is left out: it could not
// be verified anyway.
func Keeper(store *rootfs.Store) func(digest string, bundle []byte) error {
	return func(digest string, bundle []byte) error {
		if _, err := readBundle(bundle); err != nil {
			return nil //nolint:nilerr // see above
		}
		_, err := Keep(store, digest, bundle, false)
		return err
	}
}
