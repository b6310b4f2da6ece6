package share

import (
	"encoding/json"
	"errors"
	"fmt"
	goruntime "runtime"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/rootfs"
)

// recordVersion is of the form below.
const recordVersion = 1

// The record's directory in an image and in a plain archive, and its files.
const (
	recordDir        = "opt/sbxrun"
	plainDir         = ".sbxrun"
	recordName       = "environment.json"
	lockName         = "lock"
	bundleNameSuffix = ".sigstore.json"
)

// record is what goes with an environment's layers.
type record struct {
	Version  int      `json:"version"`
	Platform string   `json:"platform"` // as "linux/amd64"
	Env      envs.Env `json:"environment"`
	LockKind string   `json:"lock_kind,omitempty"` // "": the lock did not come along
	// BaseEnv are the variables of a base that comes along.
	BaseEnv []string `json:"base_env,omitempty"`
	// What follows is of plain archives, which have no other place for it.
	Layers []plainLayer `json:"layers,omitempty"`
	Names  []string     `json:"names,omitempty"`
}

// plainLayer is a layer of a plain archive, bottom to top.
type plainLayer struct {
	Base    bool   `json:"base,omitempty"`
	Digest  string `json:"digest"`
	Entries int    `json:"entries"`
}

func platform() string { return "linux/" + goruntime.GOARCH }

// decodeRecord reads a record and its lock, which nobody trusts.
func decodeRecord(files map[string][]byte) (*record, []byte, error) {
	b := files[recordName]
	if b == nil {
		return nil, nil, fmt.Errorf("no %s in it", recordName)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", recordName, err)
	}
	if r.Version != recordVersion {
		return nil, nil, fmt.Errorf("%s: version %d, not %d", recordName, r.Version, recordVersion)
	}
	if err := samePlatform(r.Platform); err != nil {
		return nil, nil, err
	}
	for _, v := range r.BaseEnv {
		if k, _, ok := strings.Cut(v, "="); !ok || k == "" || strings.IndexByte(v, 0) >= 0 {
			return nil, nil, fmt.Errorf("%s: variable %q of the base is not KEY=VALUE", recordName, bounded.Text(v))
		}
	}
	lock := files[lockName]
	if (lock != nil) != (r.LockKind != "") {
		return nil, nil, errors.New("the lock and its kind do not come together")
	}
	return &r, lock, nil
}

func samePlatform(p string) error {
	if p != platform() {
		return fmt.Errorf("it is for %s, and this machine is %s", bounded.Text(p), platform())
	}
	return nil
}

// content says which layer is what.
type content struct {
	base   bool
	digest string // content digest
}

// contents lists the layers of an environment, bottom to top.
func contents(e *envs.Env, base string) (out []content) {
	if base != "" {
		out = append(out, content{true, base})
	}
	for i := len(e.Below) - 1; i >= 0; i-- {
		out = append(out, content{digest: e.Below[i]})
	}
	return append(out, content{digest: e.Digest})
}

// label writes what parseLabel reads.
func label(all []content) string {
	var words []string
	for _, c := range all {
		kind := "layer:"
		if c.base {
			kind = "base:"
		}
		words = append(words, kind+c.digest)
	}
	return strings.Join(append(words, "record"), " ")
}

// parseLabel says what the layers of an image are; the last is the record.
func parseLabel(text string) ([]content, error) {
	words := strings.Fields(text)
	if len(words) < 2 || words[len(words)-1] != "record" {
		return nil, errors.New("it does not say what its layers are")
	}
	var out []content
	for i, w := range words[:len(words)-1] {
		kind, digest, _ := strings.Cut(w, ":")
		if !isDigest(digest) || kind != "layer" && (kind != "base" || i > 0) {
			return nil, fmt.Errorf("layer %d: %q is no kind of layer", i+1, bounded.Text(w))
		}
		out = append(out, content{kind == "base", digest})
	}
	return out, nil
}

func isDigest(s string) bool {
	h, ok := strings.CutPrefix(s, "sha256:")
	return ok && len(h) == 64 && strings.Trim(h, "0123456789abcdef") == ""
}

// agrees says whether the record is about these layers.
func (r *record) agrees(all []content) error {
	base := ""
	if len(all) > 0 && all[0].base {
		base = all[0].digest
		if base != r.Env.BaseDigest {
			return errors.New("its base is not the one it was baked on")
		}
	}
	want := contents(&r.Env, base)
	if len(want) != len(all) {
		return errors.New("the record has other layers")
	}
	for i := range want {
		if want[i] != all[i] {
			return fmt.Errorf("the record has other layers: layer %d is %s, not %s", i+1, envs.Short(want[i].digest), envs.Short(all[i].digest))
		}
	}
	return nil
}

// parts is what an export reads from the store.
type parts struct {
	env      *envs.Env
	record   record
	lock     []byte
	contents []content
	bundles  [][]byte
}

// gather reads what an environment consists of. With withBase its base is a layer.
func gather(store *rootfs.Store, m *envs.Manager, e *envs.Env, withBase bool) (*parts, error) {
	p := &parts{env: e, record: record{Version: recordVersion, Platform: platform(), Env: e.Portable()}}
	p.record.LockKind, p.lock = m.PortableLock(e)
	base := ""
	if withBase {
		b, err := store.Base(e.Base)
		if err != nil {
			return nil, err
		}
		if b.Name == "host" || len(b.Binds) > 0 || len(b.Lowers) != 1 {
			return nil, errHostBase
		}
		if b.Digest != e.BaseDigest {
			return nil, fmt.Errorf("base %q is another than it was baked on: %s, not %s", e.Base, envs.Short(b.Digest), envs.Short(e.BaseDigest))
		}
		base, p.record.BaseEnv = b.Digest, b.Env
	}
	p.contents = contents(e, base)
	return p, nil
}
