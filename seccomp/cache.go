package seccomp

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Load gives the compiled filter of p, from cacheDir if it is there and whole,
// else compiled and put there. A cache that cannot be written is no error: the
// filter is what counts.
func Load(cacheDir string, p *Policy) (Filter, error) {
	path := filepath.Join(cacheDir, "seccomp-"+strings.TrimPrefix(p.Digest(), "sha256:"))
	if b, err := os.ReadFile(path); err == nil && len(b) > sha256.Size && len(b) <= sha256.Size+8*maxInsns {
		sum := sha256.Sum256(b[sha256.Size:])
		if string(sum[:]) == string(b[:sha256.Size]) && (len(b)-sha256.Size)%8 == 0 {
			return Filter(b[sha256.Size:]), nil
		}
	}
	f, err := p.Compile()
	if err != nil {
		return nil, err
	}
	_ = store(path, f) // see above
	return f, nil
}

func store(path string, f Filter) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("cache filter: %w", err)
	}
	t, err := os.CreateTemp(filepath.Dir(path), ".seccomp-*")
	if err != nil {
		return fmt.Errorf("cache filter: %w", err)
	}
	sum := sha256.Sum256(f)
	_, err = t.Write(append(sum[:], f...))
	err = errors.Join(err, t.Sync(), t.Close())
	if err == nil {
		err = os.Rename(t.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cache filter: %w", err), os.Remove(t.Name()))
	}
	return nil
}
