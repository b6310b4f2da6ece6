package envs

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/rootfs"
)

// What is kept for bakes to come, and goes by its age: locks, what was
// downloaded, tools, notes.

// remove takes files and folders away, or says with a dry run only what that
// would free.
func (o PruneOptions) remove(paths ...string) (freed int64, err error) {
	for _, p := range paths {
		n, err := new(rootfs.Meter).Add(p)
		if err == nil && !o.DryRun {
			err = os.RemoveAll(p)
		}
		if err != nil {
			return freed, fmt.Errorf("prune: %w", err)
		}
		freed += n
	}
	return freed, nil
}

// pruneKept is for what a running bake may be using.
func (m *Manager) pruneKept(o PruneOptions, p *Pruned) error {
	for _, f := range []func(PruneOptions, *Pruned) (int64, error){m.pruneCache, m.pruneTools, m.pruneLockFiles, m.pruneNotes} {
		freed, err := f(o, p)
		if p.FreedBytes += freed; err != nil {
			return err
		}
	}
	return nil
}

// locksOf gives the digests of the locks of environments that stay, and of those
// that went with this prune.
func (m *Manager) locksOf(p *Pruned) (stay, went map[string]bool, err error) {
	all, err := m.List()
	if err != nil {
		return nil, nil, err
	}
	gone := map[string]bool{}
	stay, went = map[string]bool{}, map[string]bool{}
	for _, e := range p.Removed {
		gone[e.Key], went[e.Lock] = true, true
	}
	for _, e := range all {
		if !gone[e.Key] { // with a dry run they are there still
			stay[e.Lock] = true
		}
	}
	return stay, went, nil
}

// pruneLocks forgets resolved locks that no environment has: the next bake of
// the same requirements resolves anew.
func (m *Manager) pruneLocks(o PruneOptions, p *Pruned) error {
	stay, went, err := m.locksOf(p)
	if err != nil {
		return err
	}
	age := o.OlderThan
	if age == 0 && !o.Named {
		age = lockKeeps
	}
	gone := map[string]bool{}
	for _, path := range m.glob("envs", "locks", "*") {
		kind := map[string]string{".txt": "requirements", ".json": "conda"}[filepath.Ext(path)]
		info, err := os.Lstat(path)
		if err != nil || !info.Mode().IsRegular() || kind == "" {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		digest := "sha256:" + (&lock{kind: kind, text: b}).digest()
		if stay[digest] || went[digest] && age == lockKeeps {
			if !o.DryRun {
				touch(path) // its time without an environment begins later
			}
			continue
		}
		if time.Since(info.ModTime()) < age {
			continue
		}
		freed, err := o.remove(path)
		if err != nil {
			return err
		}
		p.Locks++
		p.FreedBytes += freed
		gone[filepath.Base(path)] = true
	}
	// Which lock a file had last is of use as long as there is that lock.
	for _, path := range m.glob("envs", "lastlocks", "*") {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		name := filepath.Base("/" + strings.TrimSpace(string(b)))
		if _, err := os.Lstat(m.store.Path("envs", "locks", name)); err == nil && !gone[name] {
			continue
		}
		freed, err := o.remove(path)
		if p.FreedBytes += freed; err != nil {
			return err
		}
	}
	return nil
}

// pruneLockFiles removes the texts of locks that no environment has any more.
func (m *Manager) pruneLockFiles(o PruneOptions, p *Pruned) (int64, error) {
	stay, _, err := m.locksOf(p)
	if err != nil {
		return 0, err
	}
	var loose []string
	for _, path := range m.glob("envs", "lockfiles", "*") {
		if !stay["sha256:"+filepath.Base(path)] {
			loose = append(loose, path)
		}
	}
	return o.remove(loose...)
}

// noteDirs are below envs.
var noteDirs = []string{"targets", "digests", "inline", "copies"}

// unread says that a note was of no use for long.
func unread(path string, age time.Duration) bool {
	info, err := os.Lstat(path)
	return err == nil && time.Since(info.ModTime()) >= age
}

// pruneNotes forgets what was written down to be quicker and was not of use for
// long: what targets and interpreters are, requirements of recipes; and what
// copies came to, which goes as steps do.
func (m *Manager) pruneNotes(o PruneOptions, _ *Pruned) (int64, error) {
	var old []string
	for _, dir := range noteDirs {
		age := max(o.OlderThan, lockKeeps)
		if dir == "copies" {
			age = o.OlderThan
		}
		for _, path := range m.glob("envs", dir, "*") {
			if unread(path, age) {
				old = append(old, path)
			}
		}
	}
	return o.remove(old...)
}

// pruneCache empties what was downloaded and not used since.
func (m *Manager) pruneCache(o PruneOptions, _ *Pruned) (freed int64, err error) {
	top := m.store.Path("cache")
	err = filepath.WalkDir(top, func(p string, de fs.DirEntry, err error) error {
		if err != nil || de.IsDir() {
			return err
		}
		info, err := de.Info()
		if err != nil {
			return nil //nolint:nilerr // gone
		}
		last := info.ModTime()
		st, ok := info.Sys().(*unixStat)
		if ok {
			if at := time.Unix(st.Atim.Unix()); at.After(last) {
				last = at
			}
		}
		if o.SizeBytes == 0 && time.Since(last) < o.OlderThan {
			return nil
		}
		if !o.DryRun {
			if err := os.Remove(p); err != nil {
				return err
			}
		}
		if ok && st.Nlink == 1 {
			freed += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		return freed, fmt.Errorf("prune caches: %w", err)
	}
	return freed, nil
}

// pruneTools removes the versions of the resolvers that are not the ones in use.
func (m *Manager) pruneTools(o PruneOptions, _ *Pruned) (int64, error) {
	keep := []string{m.rattlerDir()}
	for _, p := range m.glob("tools", solverRecords+"*") { // one a base
		if !unread(p, max(o.OlderThan, lockKeeps)) {
			keep = append(keep, p)
		}
	}
	have := slices.Concat(m.glob("tools", "py-rattler-*"), m.glob("tools", "conda-solver-*"))
	var t tool
	b, err := os.ReadFile(m.store.Path("tools", "tool.json"))
	if err == nil && json.Unmarshal(b, &t) == nil && t.Path != "" { // else it is not known which is current
		have, keep = append(have, m.glob("tools", "uv-*")...), append(keep, filepath.Dir(t.Path))
	}
	return o.remove(slices.DeleteFunc(have, func(p string) bool { return slices.Contains(keep, p) })...)
}
