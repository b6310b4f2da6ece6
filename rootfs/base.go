package rootfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Base is a read-only root file system, ready to be a lower layer.
type Base struct {
	// Name is "host" or the name given to `base add`; Digest identifies the
	// content (for the host base: of its description).
	Name   string `json:"name"`
	Digest string `json:"digest"`
	// Lowers are host directories, topmost first.
	Lowers []string `json:"lowers"`
	// Binds are shown read-only on top (the host base's /usr and /etc parts).
	Binds []Bind `json:"binds,omitempty"`
	// Env holds the image's own KEY=VALUE variables.
	Env []string `json:"env,omitempty"`
	// Upon are the digests of layers that were put upon it, topmost first; their
	// directories are the first of Lowers. See [Base.With].
	Upon []string `json:"upon,omitempty"`
}

// Bind is one read-only host path of a base.
type Bind struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// BaseInfo is one line of `base list`.
type BaseInfo struct {
	Name      string `json:"name"`
	Digest    string `json:"digest"`
	SizeBytes int64  `json:"size_bytes"`
	Source    string `json:"source"`
}

// Base gives the base of that name; "" and "host" are the host's own.
func (s *Store) Base(name string) (Base, error) {
	if name == "" || name == "host" {
		return s.HostBase(context.Background())
	}
	if err := checkBaseName(name); err != nil {
		return Base{}, err
	}
	b, err := os.ReadFile(s.Path("bases", name+".json"))
	if err != nil {
		return Base{}, hinted.New(fmt.Errorf("use base %q: %w", name, errors.Unwrap(err)), "sbxrun base list shows what there is; sbxrun base add NAME SOURCE adds one")
	}
	var r baseRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return Base{}, fmt.Errorf("use base %q: %w", name, err)
	}
	for _, l := range r.Layers {
		p, err := s.LayerPath(l)
		if err != nil {
			return Base{}, fmt.Errorf("use base %q: %w", name, err)
		}
		r.Base.Lowers = append(r.Base.Lowers, p)
	}
	return r.Base, nil
}

// baseRecord is a base as it is stored.
type baseRecord struct {
	Base   Base     `json:"base"`   // without Lowers
	Layers []string `json:"layers"` // digests, topmost first
	Info   BaseInfo `json:"info"`
}

func checkBaseName(name string) error {
	ok := name != "" && len(name) <= 64 && name[0] != '.' && name[0] != '-'
	for _, c := range name {
		ok = ok && (c == '.' || c == '-' || c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z')
	}
	if !ok {
		return hinted.New(fmt.Errorf("base name %q: not a plain name", name), "letters, digits, dot, dash and underscore, at most 64")
	}
	return nil
}

// Bases lists the bases that were added, by name.
func (s *Store) Bases() ([]BaseInfo, error) {
	ents, err := os.ReadDir(s.Path("bases"))
	if err != nil {
		return nil, fmt.Errorf("list bases: %w", err)
	}
	var out []BaseInfo
	for _, e := range ents {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || name == "host" {
			continue
		}
		b, err := os.ReadFile(s.Path("bases", e.Name()))
		if err != nil {
			return nil, fmt.Errorf("list bases: %w", err)
		}
		var r baseRecord
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, fmt.Errorf("list bases: %q: %w", name, err)
		}
		out = append(out, r.Info)
	}
	return out, nil
}

// RemoveBase removes a base, and its layers unless another base has them too.
// One that a live sandbox runs on (see Use) is left as it is: ErrBusy.
func (s *Store) RemoveBase(name string) error {
	if err := checkBaseName(name); err != nil {
		return err
	}
	if name == "host" {
		return errors.New("remove base \"host\": it is the host itself")
	}
	if err := s.Writable(); err != nil {
		return fmt.Errorf("remove base %q: %w", name, err)
	}
	release, err := s.tryLock("bases") // a base that is being added may share a layer
	if err != nil {
		return hinted.New(fmt.Errorf("remove base %q: %w", name, err), "a base is being added or removed: try again when that is done")
	}
	defer release()
	path := s.Path("bases", name+".json")
	b, err := os.ReadFile(path)
	if err != nil {
		return hinted.New(fmt.Errorf("remove base %q: %w", name, errors.Unwrap(err)), "sbxrun base list shows what there is")
	}
	var r baseRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("remove base %q: %w", name, err)
	}
	removing, err := s.Removing(context.Background())
	if err != nil {
		return err
	}
	defer removing()
	used, err := s.baseLayers(name)
	if err != nil {
		return fmt.Errorf("remove base %q: %w", name, err)
	}
	// The record goes last: what is left by a crash can be removed again.
	for _, l := range r.Layers {
		if used[l] != "" {
			continue
		}
		if err := s.RemoveLayer(l); errors.Is(err, ErrBusy) {
			return hinted.New(fmt.Errorf("remove base %q: %w", name, err), "a sandbox runs on it: end it first")
		} else if err != nil {
			return fmt.Errorf("remove base %q: %w", name, err)
		}
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove base: %w", err)
	}
	return syncDir(s.Path("bases"))
}

// baseLayers gives the digests of the layers that bases have, the host's skeleton
// too, each with a base's name. One base may be left out.
func (s *Store) baseLayers(except string) (map[string]string, error) {
	ents, err := os.ReadDir(s.Path("bases"))
	if err != nil {
		return nil, fmt.Errorf("list bases: %w", err)
	}
	used := map[string]string{}
	for _, e := range ents {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || name == except {
			continue
		}
		b, err := os.ReadFile(s.Path("bases", e.Name()))
		if err != nil {
			return nil, fmt.Errorf("list bases: %w", err)
		}
		var r baseRecord // host.json is of the same form, but for its paths
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, fmt.Errorf("list bases: %q: %w", name, err)
		}
		for _, l := range r.Base.Lowers {
			r.Layers = append(r.Layers, "sha256:"+filepath.Base(filepath.Dir(l)))
		}
		for _, l := range r.Layers {
			used[l] = name
		}
	}
	return used, nil
}
