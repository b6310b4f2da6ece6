package envs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// PruneOptions say what may go. The zero value removes every environment that
// has no name, and all that nothing needs then.
type PruneOptions struct {
	// OlderThan spares what was used more recently; 0 spares nothing.
	OlderThan time.Duration
	// Keep spares the most recently used ones of those that may go.
	Keep int
	// SizeBytes removes, least recently used first, only until the whole store
	// takes no more than this on disk; 0 is no bound: all that may go goes.
	SizeBytes int64
	// Named lets environments with a name go too.
	Named bool
	// DryRun changes nothing and says what would be done.
	DryRun bool
}

// Pruned is what a prune did.
type Pruned struct {
	Removed []*Env // what went, least recently used first
	Busy    []*Env // what would have gone, but a live sandbox uses it
	// FreedBytes is what the disk got back: environments, content, caches.
	FreedBytes int64
	// StoreBytes is what the store takes now; only with PruneOptions.SizeBytes.
	StoreBytes int64
	Parts      int // wheels seen before that were forgotten
	Locks      int // resolved locks that were forgotten
	// ContentStays: a bake is running, so content was left for the next prune.
	ContentStays bool
}

// bakeWait is how long a prune waits for running bakes before it leaves the
// content that they may be using.
const bakeWait = 5 * time.Second

// lockKeeps is how long a resolved lock is kept that no environment has, where
// no age is given: with it, the pins go.
const lockKeeps = 30 * 24 * time.Hour

// useGrain is how precisely the last use is known.
const useGrain = time.Hour

// Used notes that an environment is being used: its record gets a new time of
// change, at most once an hour. Where that cannot be written it is not noted.
func (m *Manager) Used(e *Env) { touch(m.recordPath(e.Key)) }

func touch(p string) {
	var st unix.Stat_t
	if unix.Stat(p, &st) != nil || time.Since(time.Unix(st.Mtim.Unix())) < useGrain {
		return
	}
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, p, nil, 0)
}

func (m *Manager) lastUse(e *Env) time.Time {
	var st unix.Stat_t
	if unix.Stat(m.recordPath(e.Key), &st) != nil {
		return e.CreatedAt
	}
	return time.Unix(st.Mtim.Unix())
}

// layers are all that an environment needs, its own first.
func (e *Env) layers() []string { return append([]string{e.Digest}, e.Below...) }

// Prune removes environments and then all that nothing uses: layers without a
// record, parts, content, locks, caches, old tools. It is safe beside runs, bakes
// and other prunes, and what a killed one left the next one finishes.
func (m *Manager) Prune(ctx context.Context, o PruneOptions) (*Pruned, error) {
	p := &Pruned{}
	err := m.prune(ctx, o, p)
	return p, m.store.Explain(err)
}

func (m *Manager) prune(ctx context.Context, o PruneOptions, p *Pruned) error {
	if !o.DryRun {
		if err := m.store.Writable(); err != nil {
			return err
		}
		if _, err := m.store.GC(ctx); err != nil {
			return err
		}
	}
	swept, err := m.sweep(ctx, o)
	p.FreedBytes += swept
	if err != nil {
		return err
	}
	over := int64(0) // bytes that have to go; 0: all that may go
	if o.SizeBytes > 0 {
		u, err := m.Usage()
		if err != nil {
			return err
		}
		p.StoreBytes = u.TotalBytes
		if u.TotalBytes <= o.SizeBytes {
			return nil
		}
		// What is kept for bakes to come goes before any environment.
		loose, err := m.store.Unlinked(nil)
		if err != nil {
			return err
		}
		dry := o
		dry.DryRun = true
		kept := &Pruned{}
		if err := m.pruneKept(dry, kept); err != nil {
			return err
		}
		if over = u.TotalBytes - o.SizeBytes - loose - kept.FreedBytes; o.DryRun {
			over -= swept // it is there still
		}
		if over <= 0 {
			return m.pruneContent(ctx, o, p)
		}
	}
	victims, err := m.victims(o, over)
	if err != nil {
		return err
	}
	gain := m.store.Reclaim()
	for len(victims) > 0 {
		gone, err := m.drop(ctx, victims, gain, o.DryRun, p)
		if err != nil {
			return err
		}
		if o.SizeBytes == 0 || over-gone <= 0 || len(p.Busy) == 0 || o.DryRun {
			break
		}
		// Others have to go in place of those that are in use.
		over -= gone
		if victims, err = m.victims(o, over, p.Busy...); err != nil {
			return err
		}
	}
	return m.pruneContent(ctx, o, p)
}

// victims chooses the environments that may go, least recently used first. With
// over they are no more than what frees so many bytes.
func (m *Manager) victims(o PruneOptions, over int64, except ...*Env) ([]*Env, error) {
	all, err := m.List()
	if err != nil {
		return nil, err
	}
	skip := map[string]bool{}
	for _, e := range except {
		skip[e.Key] = true
	}
	// An environment is in use as long as those are that extend it.
	used := map[string]time.Time{}
	for _, e := range all {
		for _, l := range e.layers() {
			if t := m.lastUse(e); t.After(used[l]) {
				used[l] = t
			}
		}
	}
	var may []*Env
	for _, e := range all {
		if (len(e.Names) == 0 || o.Named) && !skip[e.Key] {
			may = append(may, e)
		}
	}
	sort.SliceStable(may, func(i, j int) bool { // what extends comes before what it extends
		a, b := used[may[i].Digest], used[may[j].Digest]
		if !a.Equal(b) {
			return a.Before(b)
		}
		return len(may[i].Below) > len(may[j].Below)
	})
	may = may[:max(0, len(may)-o.Keep)]
	var out []*Env
	gone := map[string]bool{}
	gain := m.store.Reclaim()
	refs, err := m.layerRefs(all)
	if err != nil {
		return nil, err
	}
	for _, e := range may {
		if o.SizeBytes > 0 && over <= 0 {
			break
		}
		if time.Since(used[e.Digest]) < o.OlderThan || extended(e, all, gone) != "" {
			continue
		}
		gone[e.Key] = true
		out = append(out, e)
		for _, l := range e.layers() {
			if refs[l]--; refs[l] > 0 || o.SizeBytes == 0 {
				continue
			}
			u, err := gain.Add(l)
			if err != nil {
				return nil, err
			}
			over -= u.OwnBytes()
		}
	}
	return out, nil
}

// extended gives the name or key of an environment that stays and extends e.
func extended(e *Env, all []*Env, gone map[string]bool) string {
	for _, o := range all {
		if gone[o.Key] || o.Key == e.Key {
			continue
		}
		for _, l := range o.Below {
			if l == e.Digest {
				if len(o.Names) > 0 {
					return o.Names[0]
				}
				return Short(o.Key)
			}
		}
	}
	return ""
}

// sharedLayer says whether an environment that stays has the same content.
func sharedLayer(e *Env, all []*Env, gone map[string]bool) bool {
	for _, o := range all {
		if !gone[o.Key] && o.Key != e.Key && o.Digest == e.Digest {
			return true
		}
	}
	return false
}

// drop removes environments: under one lock what names them and the places of
// their layers, so that nobody meets half of one, and then their files. A layer
// goes with the last record that has it. Those in use stay. It gives the bytes
// that are free when the content is pruned.
func (m *Manager) drop(ctx context.Context, victims []*Env, gain *rootfs.Reclaim, dry bool, p *Pruned) (freed int64, err error) {
	release := func() {}
	if !dry {
		if release, err = m.store.Removing(ctx); err != nil {
			return 0, err
		}
	}
	defer func() { release() }()
	all, err := m.List()
	if err != nil {
		return 0, err
	}
	refs, err := m.layerRefs(all)
	if err != nil {
		return 0, err
	}
	now := map[string]*Env{}
	for _, e := range all {
		now[e.Key] = e
	}
	gone := map[string]bool{}
	var rest []func() error
	for _, v := range victims {
		e := now[v.Key]
		if e == nil || len(e.Names) > len(v.Names) || extended(e, all, gone) != "" {
			continue // removed, named or extended meanwhile
		}
		var doomed []string
		for _, l := range e.layers() {
			if refs[l] == 1 {
				doomed = append(doomed, l)
			}
		}
		var own, direct int64
		for _, l := range doomed {
			u, err := gain.Add(l)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return freed, err
			}
			own, direct = own+u.OwnBytes(), direct+u.DirectBytes
		}
		if dry {
			direct = own
		}
		if !dry {
			finish, err := m.store.RemoveLayers(doomed, func() error { return m.forget(e) })
			if errors.Is(err, rootfs.ErrBusy) {
				p.Busy = append(p.Busy, e)
				continue
			}
			if err != nil {
				return freed, err
			}
			rest = append(rest, finish)
		}
		for _, l := range e.layers() {
			refs[l]--
		}
		gone[e.Key] = true
		freed += own
		p.FreedBytes += direct // the content is counted when it is pruned
		p.Removed = append(p.Removed, e)
	}
	release()
	release = func() {}
	var errs []error
	for _, finish := range rest {
		errs = append(errs, finish())
	}
	return freed, errors.Join(errs...)
}

// forget removes what names an environment.
func (m *Manager) forget(e *Env) error {
	for _, n := range e.Names {
		if err := os.Remove(m.store.Path("envs", "names", n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove environment: %w", err)
		}
	}
	if err := os.Remove(m.recordPath(e.Key)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove environment: %w", err)
	}
	return nil
}

// Remove forgets an environment and removes its layer, unless another
// environment has the same content. One that a live sandbox uses stays, and one
// that another extends.
func (m *Manager) Remove(ref string) error {
	e, err := m.Get(ref)
	if err != nil {
		return err
	}
	if err := m.store.Writable(); err != nil {
		return err
	}
	all, err := m.List()
	if err != nil {
		return err
	}
	for _, o := range all {
		if o.Key == e.Key {
			e = o // with all its names
		}
	}
	if by := extended(e, all, nil); by != "" {
		return fail("sbxrun env rm "+by+" first", "remove environment %q: %q extends it", ref, by)
	}
	p := &Pruned{}
	if _, err := m.drop(context.Background(), []*Env{e}, m.store.Reclaim(), false, p); err != nil {
		return m.store.Explain(err)
	}
	if len(p.Busy) > 0 {
		return &Error{Msg: fmt.Sprintf("remove environment %q: a live sandbox uses it", ref), Tip: "wait for its end", Err: rootfs.ErrBusy}
	}
	return nil
}

// sweep removes layers that nothing needs: those of steps that no environment has,
// unless a recent bake made or used them, and what killed bakes and removals left
// where names are looked for: layers that no record has, records without their
// layer, names of nothing.
// With a dry run it says only what that would free.
func (m *Manager) sweep(ctx context.Context, o PruneOptions) (freed int64, err error) {
	if o.DryRun {
		_, freed, err = m.sweepLocked(o)
		return freed, err
	}
	release, err := m.store.Removing(ctx)
	if err != nil {
		return 0, err
	}
	var rest []func() error
	rest, freed, err = m.sweepLocked(o)
	release()
	for _, finish := range rest {
		err = errors.Join(err, finish())
	}
	return freed, err
}

func (m *Manager) sweepLocked(o PruneOptions) (rest []func() error, freed int64, err error) {
	all, err := m.List()
	if err != nil {
		return nil, 0, err
	}
	keys, signed := map[string]bool{}, map[string]bool{}
	for _, e := range all {
		keys[e.Key], signed[strings.TrimPrefix(e.Digest, "sha256:")] = true, true
	}
	// needless says that a record's file may go.
	for _, r := range []struct {
		dir      string
		needless func(name, path string) bool
	}{
		{"", func(name, _ string) bool { k, ok := strings.CutSuffix(name, ".json"); return ok && !keys[k] }},
		{"names", func(_, path string) bool {
			b, err := os.ReadFile(path)
			return err == nil && !keys[strings.TrimSpace(string(b))]
		}},
		{"signatures", func(name, _ string) bool { return !signed[name] }},
	} {
		for _, p := range m.glob("envs", r.dir, "*") {
			if r.needless(filepath.Base(p), p) {
				if _, err := o.remove(p); err != nil {
					return nil, 0, err
				}
			}
		}
	}
	refs, err := m.layerRefs(all)
	if err != nil {
		return nil, 0, err
	}
	steps := m.steps()
	for l, s := range steps {
		if refs[l] == 0 && s.recent(o) {
			refs[l]++
		}
	}
	orphans, err := m.store.Orphans(func(l string) bool { return refs[l] > 0 })
	if err != nil {
		return nil, 0, err
	}
	gain := m.store.Reclaim()
	for _, l := range orphans {
		u, err := gain.Add(l)
		if err != nil {
			return rest, freed, err
		}
		if o.DryRun {
			freed += u.OwnBytes()
			continue
		}
		finish, err := m.store.RemoveLayers([]string{l}, nil)
		if errors.Is(err, rootfs.ErrBusy) {
			continue // a bake goes on with it, or it was found when it still had a name
		}
		if err != nil {
			return rest, freed, err
		}
		freed += u.DirectBytes
		rest = append(rest, finish)
	}
	for l, s := range steps {
		if _, err := m.store.LayerPath(l); l == "" && !s.recent(o) || l != "" && errors.Is(err, os.ErrNotExist) {
			if _, err := o.remove(s.records...); err != nil {
				return rest, freed, err
			}
		}
	}
	return rest, freed, nil
}

// layerRefs counts by layer the environments and interpreters that have it.
func (m *Manager) layerRefs(all []*Env) (map[string]int, error) {
	refs := map[string]int{}
	for _, e := range all {
		for _, l := range e.layers() {
			refs[l]++
		}
	}
	pythons, err := m.Pythons()
	for _, p := range pythons {
		refs[p.Digest]++
	}
	return refs, err
}

// stepLayer is the layer of a bake's step, and the records that say of which.
type stepLayer struct {
	records []string
	used    time.Time
}

func (s *stepLayer) recent(o PruneOptions) bool {
	return o.SizeBytes == 0 && o.OlderThan > 0 && time.Since(s.used) < o.OlderThan
}

// steps gives the layers of steps that are remembered, by digest; those that made
// none are at "".
func (m *Manager) steps() map[string]*stepLayer {
	out := map[string]*stepLayer{}
	for _, p := range m.glob("envs", "steps", "*") {
		b, err := os.ReadFile(p)
		st, serr := os.Stat(p)
		if err != nil || serr != nil {
			continue
		}
		l := strings.TrimSpace(string(b))
		if out[l] == nil {
			out[l] = &stepLayer{}
		}
		out[l].records = append(out[l].records, p)
		if st.ModTime().After(out[l].used) {
			out[l].used = st.ModTime()
		}
	}
	return out
}

// pruneContent removes what is kept for bakes to come and is needed by nothing:
// parts, content, locks, caches, tools.
func (m *Manager) pruneContent(ctx context.Context, o PruneOptions, p *Pruned) error {
	if o.DryRun {
		if err := errors.Join(m.pruneLocks(o, p), m.pruneKept(o, p)); err != nil {
			return err
		}
		keep, n, err := m.parts(o, false)
		if err != nil {
			return err
		}
		p.Parts += n
		loose, err := m.store.Unlinked(keep)
		if p.FreedBytes += loose; o.SizeBytes > 0 {
			p.StoreBytes -= p.FreedBytes
		}
		return err
	}
	if err := m.pruneLocks(o, p); err != nil {
		return err
	}
	if err := m.pruneSteps(); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, bakeWait)
	defer cancel()
	release, err := m.store.BlockBakes(wait)
	if errors.Is(err, rootfs.ErrBusy) && ctx.Err() == nil {
		p.ContentStays = true
		err = nil
	} else if err == nil {
		defer release()
		err = m.pruneBlocked(ctx, o, p)
	}
	if err == nil && o.SizeBytes > 0 {
		u, uerr := m.Usage()
		if err = uerr; err == nil {
			p.StoreBytes = u.TotalBytes
		}
	}
	return err
}

// pruneBlocked is the part that no bake may be beside.
func (m *Manager) pruneBlocked(ctx context.Context, o PruneOptions, p *Pruned) error {
	keep, n, err := m.parts(o, true)
	if err != nil {
		return err
	}
	p.Parts += n
	freed, _, err := m.store.PruneObjects(keep)
	p.FreedBytes += freed
	if err != nil {
		return err
	}
	if err := m.pruneKept(o, p); err != nil {
		return err
	}
	if _, err := m.store.PruneLocks(); err != nil {
		return err
	}
	return ctx.Err()
}

// parts decides which of the wheels seen before stay: those whose content is in
// layers anyway, and those of recent bakes, unless room has to be made. It gives
// what to keep for the latter, and how many go.
func (m *Manager) parts(o PruneOptions, remove bool) (keep func(digest string, exec bool) bool, n int, err error) {
	type object struct {
		digest string
		exec   bool
	}
	wanted := map[object]bool{}
	dir := m.store.Path("envs", "parts")
	ents, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, 0, fmt.Errorf("prune parts: %w", err)
	}
	for _, de := range ents {
		man, whole := m.part(de.Name())
		info, err := de.Info()
		if err != nil {
			continue
		}
		linked := whole
		for i := 0; linked && i < len(man.Entries); i++ {
			linked = man.Entries[i].Type != 'f' || m.store.Linked(man.Entries[i])
		}
		switch {
		case linked:
		case whole && o.SizeBytes == 0 && o.OlderThan > 0 && time.Since(info.ModTime()) < o.OlderThan:
			for _, e := range man.Entries {
				if e.Type == 'f' {
					wanted[object{e.Digest, e.Mode&0o111 != 0}] = true
				}
			}
		default:
			n++
			if remove {
				if err := os.Remove(filepath.Join(dir, de.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
					return nil, n, fmt.Errorf("prune parts: %w", err)
				}
			}
		}
	}
	return func(digest string, exec bool) bool { return wanted[object{digest, exec}] }, n, nil
}
