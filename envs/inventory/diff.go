package inventory

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Change is one thing that two environments have differently; "" is where one
// has none.
type Change struct {
	Name string `json:"name"`
	A    string `json:"a,omitempty"`
	B    string `json:"b,omitempty"`
}

// Difference is how two environments differ.
type Difference struct {
	Same     bool     `json:"same"`
	Facts    []Change `json:"facts,omitempty"` // kind, base, python, lock
	Packages []Change `json:"packages,omitempty"`
	Vars     []Change `json:"env,omitempty"`
	// Files are counted always and listed where that is asked for.
	FilesAdded   int      `json:"files_added"`
	FilesRemoved int      `json:"files_removed"`
	FilesChanged int      `json:"files_changed"`
	Files        []Change `json:"files,omitempty"`
}

// Diff compares two environments: what their records say, and every file by its
// digest. Facts that decide nothing (when, where from) are not compared.
func Diff(store *rootfs.Store, a, b *envs.Env, packagesA, packagesB []Package, files bool) (*Difference, error) {
	d := &Difference{}
	d.Facts = changes([][2]string{{"kind", kindOf(a)}, {"base", a.Base}, {"base digest", a.BaseDigest}, {"python", a.Python}, {"lock", a.Lock}},
		[][2]string{{"kind", kindOf(b)}, {"base", b.Base}, {"base digest", b.BaseDigest}, {"python", b.Python}, {"lock", b.Lock}})
	d.Packages = changes(packagePairs(packagesA), packagePairs(packagesB))
	d.Vars = changes(varPairs(a.Vars), varPairs(b.Vars))
	ta, err := OpenTree(store, a)
	if err != nil {
		return nil, err
	}
	tb, err := OpenTree(store, b)
	if err != nil {
		return nil, err
	}
	all := append(slices.Clone(ta.names), tb.names...)
	slices.Sort(all)
	for _, p := range slices.Compact(all) {
		ea, inA := ta.entries[p]
		eb, inB := tb.entries[p]
		switch {
		case ea == eb:
			continue
		case !inA:
			d.FilesAdded++
		case !inB:
			d.FilesRemoved++
		default:
			d.FilesChanged++
		}
		if files {
			d.Files = append(d.Files, Change{"/" + clean(p, 4096), describe(ea, inA), describe(eb, inB)})
		}
	}
	d.Same = len(d.Facts)+len(d.Packages)+len(d.Vars)+d.FilesAdded+d.FilesRemoved+d.FilesChanged == 0
	return d, nil
}

func kindOf(e *envs.Env) string {
	if e.Kind == "" {
		return "venv"
	}
	return e.Kind
}

func describe(e rootfs.Entry, there bool) string {
	switch {
	case !there:
		return ""
	case e.Type == 'd':
		return fmt.Sprintf("directory %o", e.Mode)
	case e.Type == 'l':
		return "link to " + clean(e.Link, 4096)
	}
	return fmt.Sprintf("%o sha256:%s", e.Mode, e.Digest)
}

func packagePairs(ps []Package) (out [][2]string) {
	for _, p := range ps {
		name, version := p.Name, p.Version
		if p.System != PyPI {
			name = p.System + ":" + name
		}
		if b := p.Qualifiers["build"]; b != "" {
			version += " " + b
		}
		out = append(out, [2]string{name, version})
	}
	return out
}

func varPairs(vars []string) (out [][2]string) {
	for _, v := range vars {
		k, val, _ := strings.Cut(v, "=")
		out = append(out, [2]string{k, strconv.Quote(val)})
	}
	return out
}

// changes compares two lists of names and values. A name may come more than once.
func changes(a, b [][2]string) []Change {
	in := func(l [][2]string) map[string][]string {
		m := map[string][]string{}
		for _, kv := range l {
			m[kv[0]] = append(m[kv[0]], kv[1])
		}
		return m
	}
	ma, mb := in(a), in(b)
	var names []string
	for k := range ma {
		names = append(names, k)
	}
	for k := range mb {
		if _, both := ma[k]; !both {
			names = append(names, k)
		}
	}
	slices.Sort(names)
	var out []Change
	for _, k := range names {
		if !slices.Equal(ma[k], mb[k]) {
			out = append(out, Change{k, strings.Join(ma[k], ", "), strings.Join(mb[k], ", ")})
		}
	}
	return out
}

// Text writes the difference as diff does: - is only in the first, + only in
// the second.
func (d *Difference) Text(w io.Writer) error {
	for _, group := range []struct {
		title string
		list  []Change
	}{{"", d.Facts}, {"package ", d.Packages}, {"variable ", d.Vars}, {"", d.Files}} {
		for _, c := range group.list {
			if c.A != "" {
				fmt.Fprintf(w, "- %s%s %s\n", group.title, c.Name, c.A)
			}
			if c.B != "" {
				fmt.Fprintf(w, "+ %s%s %s\n", group.title, c.Name, c.B)
			}
		}
	}
	if d.Same {
		return nil
	}
	_, err := fmt.Fprintf(w, "%d files added, %d removed, %d changed\n", d.FilesAdded, d.FilesRemoved, d.FilesChanged)
	return err
}
