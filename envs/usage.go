package envs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sbxrun/sbxrun/rootfs"
)

type unixStat = syscall.Stat_t

// UsageRow is what one kind of thing takes in the store.
type UsageRow struct {
	Kind  string `json:"kind"`
	Count int    `json:"count"`
	// SizeBytes are allocated on disk. What is shared counts for the first row
	// that has it.
	SizeBytes int64 `json:"size_bytes"`
	// ReclaimableBytes is what env prune without flags frees.
	ReclaimableBytes int64 `json:"reclaimable_bytes"`
}

// Usage is what the whole store takes.
type Usage struct {
	Rows             []UsageRow `json:"rows"`
	TotalBytes       int64      `json:"total_bytes"`
	ReclaimableBytes int64      `json:"reclaimable_bytes"`
}

// Usage measures the store. It looks at every file.
func (m *Manager) Usage() (*Usage, error) {
	u := &Usage{}
	var meter rootfs.Meter
	add := func(kind string, count int, reclaimable bool, paths ...string) error {
		n, err := meter.Add(paths...)
		r := UsageRow{Kind: kind, Count: count, SizeBytes: n}
		if reclaimable {
			r.ReclaimableBytes = n
		}
		if k := len(u.Rows) - 1; k >= 0 && u.Rows[k].Kind == kind {
			r.Count += u.Rows[k].Count
			r.SizeBytes += u.Rows[k].SizeBytes
			r.ReclaimableBytes += u.Rows[k].ReclaimableBytes
			u.Rows = u.Rows[:k]
		}
		u.Rows = append(u.Rows, r)
		u.TotalBytes += n
		if reclaimable {
			u.ReclaimableBytes += n
		}
		return err
	}
	all, err := m.List()
	if err != nil {
		return nil, err
	}
	bases, err := m.store.BasePaths()
	if err != nil {
		return nil, err
	}
	layer := func(d string) string { return m.store.Path("layers", strings.TrimPrefix(d, "sha256:")) }
	var kept, loose []string // what environments with a name need, and the rest
	seen := map[string]bool{}
	once := func(to *[]string, p string) {
		if !seen[p] {
			seen[p] = true
			*to = append(*to, p)
		}
	}
	for _, named := range []bool{true, false} {
		to := &kept
		if !named {
			to = &loose
		}
		for _, e := range all {
			if len(e.Names) > 0 != named {
				continue
			}
			once(to, m.recordPath(e.Key))
			for _, l := range e.layers() {
				once(to, layer(l))
			}
		}
	}
	pythons, err := m.Pythons()
	if err != nil {
		return nil, err
	}
	interpreters := []string{m.store.Path("envs", "pythons")}
	for _, p := range pythons {
		once(&interpreters, layer(p.Digest))
	}
	var steps, orphans []string
	for l := range m.steps() {
		if l != "" {
			once(&steps, layer(l))
		}
	}
	for _, p := range m.glob("layers", "*") {
		if !slices.Contains(bases, p) {
			once(&orphans, p)
		}
	}
	tmp, _ := os.ReadDir(m.store.Path("tmp"))
	err = add("bases", len(bases)-1, false, bases...)
	for _, r := range []struct {
		kind        string
		count       int
		reclaimable bool
		paths       []string
	}{
		{"environments", len(all), false, kept},
		{"environments", 0, true, loose},
		{"environments", 0, false, []string{m.store.Path("envs", "names"), m.store.Path("envs", "signatures")}},
		{"interpreters", len(pythons), false, interpreters},
		{"steps", len(steps), true, steps},
		{"steps", 0, false, []string{m.store.Path("envs", "steps")}},
		// Layers that no record has; there are some after a crash only.
		{"orphans", len(orphans), true, orphans},
		{"caches", filesBelow(m.store.Path("cache")), true, m.glob("cache", "*")},
		{"parts", len(m.glob("envs", "parts", "*")), false, []string{m.store.Path("envs", "parts")}},
	} {
		err = errors.Join(err, add(r.kind, r.count, r.reclaimable, r.paths...))
	}
	// Content that no layer has is there for the parts.
	unlinked, uerr := m.store.Unlinked(nil)
	err = errors.Join(err, uerr)
	err = errors.Join(err, add("parts", 0, false, m.store.Path("objects")))
	u.Rows[len(u.Rows)-1].ReclaimableBytes += unlinked
	u.ReclaimableBytes += unlinked
	// Of the rest, what a prune that changes nothing finds.
	dry := PruneOptions{DryRun: true}
	var locks Pruned
	err = errors.Join(err, m.pruneLocks(dry, &locks))
	lockFiles, lerr := m.pruneLockFiles(dry, &locks)
	tools, terr := m.pruneTools(dry, &locks)
	notes, nerr := m.pruneNotes(dry, &locks)
	err = errors.Join(err, lerr, terr, nerr)
	var other []string
	for dir, known := range map[string][]string{
		"":     {"bases", "cache", "envs", "layers", "locks", "objects", "tmp", "tools"},
		"envs": append([]string{"lastlocks", "lockfiles", "locks", "names", "parts", "pythons", "signatures", "steps"}, noteDirs...),
	} {
		for _, p := range m.glob(dir, "*") {
			if base := filepath.Base(p); !slices.Contains(known, base) && !strings.HasSuffix(base, ".json") {
				other = append(other, p)
			}
		}
	}
	var noted []string
	for _, d := range noteDirs {
		noted = append(noted, m.glob("envs", d, "*")...)
	}
	for _, r := range []struct {
		kind             string
		count            int
		reclaimableBytes int64
		paths            []string
	}{
		{"locks", len(m.glob("envs", "locks", "*")), locks.FreedBytes, m.glob("envs", "locks")},
		{"locks", 0, 0, m.glob("envs", "lastlocks")},
		{"locks", len(m.glob("envs", "lockfiles", "*")), lockFiles, m.glob("envs", "lockfiles")},
		{"tools", len(m.glob("tools", "uv-*")) + len(m.glob("tools", "py-rattler-*")), tools, m.glob("tools")},
		{"notes", len(noted), notes, noted},
		{"unfinished", len(tmp), 0, m.glob("tmp")},
		{"other", len(other), 0, append(other, m.glob("locks")...)},
	} {
		err = errors.Join(err, add(r.kind, r.count, false, r.paths...))
		u.Rows[len(u.Rows)-1].ReclaimableBytes += r.reclaimableBytes
		u.ReclaimableBytes += r.reclaimableBytes
	}
	if err != nil {
		return nil, err
	}
	return u, nil
}

// filesBelow counts what is not a folder.
func filesBelow(top string) (n int) {
	_ = filepath.WalkDir(top, func(_ string, de fs.DirEntry, err error) error {
		if err == nil && !de.IsDir() {
			n++
		}
		return nil
	})
	return n
}

func (m *Manager) glob(parts ...string) []string {
	out, _ := filepath.Glob(m.store.Path(parts...))
	return out
}

// Disk is what one environment's layer takes on disk, in allocated bytes.
type Disk struct {
	OwnBytes    int64 `json:"own_bytes"`    // free when it is removed and pruned
	SharedBytes int64 `json:"shared_bytes"` // in other layers too
}

// Disk measures an environment: it looks at every file of its layer. all are the
// environments that there are, for those with the same content.
func (m *Manager) Disk(e *Env, all []*Env) (Disk, error) {
	u, err := m.store.Reclaim().Add(e.Digest)
	d := Disk{u.OwnBytes(), u.SharedBytes}
	if sharedLayer(e, all, nil) || extended(e, all, nil) != "" {
		d = Disk{0, d.OwnBytes + d.SharedBytes}
	}
	for _, l := range e.Below {
		u, berr := m.store.Reclaim().Add(l)
		d.SharedBytes += u.OwnBytes() + u.SharedBytes
		err = errors.Join(err, berr)
	}
	return d, err
}

// Listed is an environment as lists show it.
type Listed struct {
	*Env
	UsedAt time.Time `json:"used_at"` // to the hour
	*Disk            // nil: not asked for
}

// ListUsed gives all environments with their last use, oldest first, and, where
// asked for, what each takes on disk.
func (m *Manager) ListUsed(disk bool) ([]Listed, error) {
	all, err := m.List()
	if err != nil {
		return nil, err
	}
	out := make([]Listed, 0, len(all))
	for _, e := range all {
		l := Listed{Env: e, UsedAt: m.lastUse(e).UTC()}
		if disk {
			d, err := m.Disk(e, all)
			if err != nil {
				return nil, err
			}
			l.Disk = &d
		}
		out = append(out, l)
	}
	return out, nil
}

// Inspection is all about an environment.
type Inspection struct {
	Listed
	Path       string     `json:"path"` // of the layer: a directory, or an EROFS image
	Signatures []SignedBy `json:"signatures,omitempty"`
}

// Inspect gives all about an environment.
func (m *Manager) Inspect(ref string) (*Inspection, error) {
	e, err := m.Get(ref)
	if err != nil {
		return nil, err
	}
	all, err := m.List()
	if err != nil {
		return nil, err
	}
	for _, o := range all {
		if o.Key == e.Key {
			e = o // with all its names
		}
	}
	d, err := m.Disk(e, all)
	if err != nil {
		return nil, err
	}
	return &Inspection{Listed{e, m.lastUse(e).UTC(), &d}, e.Path, signatures(m.store, e.Digest)}, nil
}

// Pack turns an environment's layer into an EROFS image, or with undo back. Those
// that it extends stay as they are.
func (m *Manager) Pack(ctx context.Context, ref string, undo bool) error {
	e, err := m.Get(ref)
	if err != nil {
		return err
	}
	if err := m.store.Writable(); err != nil {
		return err
	}
	if undo {
		return m.store.Unpack(ctx, e.Digest)
	}
	return m.store.Pack(ctx, e.Digest)
}

// notPacked says that a layer must be a tree for what is wanted.
func notPacked(op, digest string) error {
	return fail("sbxrun env pack --undo "+Short(digest), "%s: layer %s is packed into an image", op, Short(digest))
}
