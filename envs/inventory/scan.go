package inventory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// ScanOptions say what counts.
type ScanOptions struct {
	Database string
	Ignore   string // a file; "" is none
	// Severity is the least that counts; what has none known counts always. "" is all.
	Severity string
	Now      time.Time
}

// Finding is a vulnerability of an installed package. Records that are aliases
// of each other are one.
type Finding struct {
	ID        string   `json:"id"`
	Aliases   []string `json:"aliases,omitempty"`
	System    string   `json:"system"`
	Package   string   `json:"package"`
	Version   string   `json:"version"`
	PURL      string   `json:"purl"`
	Severity  string   `json:"severity"` // unknown, low, medium, high, critical
	Fixed     []string `json:"fixed,omitempty"`
	Summary   string   `json:"summary,omitempty"`
	Reason    string   `json:"reason,omitempty"`     // why it is ignored
	ExpiredOn string   `json:"expired_on,omitempty"` // it was ignored until that day

	rank int
}

// Unjudged is a record whose ranges and a package's version cannot be compared.
type Unjudged struct {
	ID      string `json:"id"`
	Package string `json:"package"`
	Version string `json:"version"`
}

// ScanResult is what a database says of an environment.
type ScanResult struct {
	Findings []Finding  `json:"findings"`
	Ignored  []Finding  `json:"ignored,omitempty"`
	Unjudged []Unjudged `json:"unjudged,omitempty"`
	Below    int        `json:"below_severity"` // findings that are less than was asked for
	Unused   []string   `json:"unused_ignores,omitempty"`
	Packages int        `json:"packages"`
	Records  int        `json:"records"`
	Database time.Time  `json:"database_time"`
}

// Scan compares an inventory with a database in the OSV format.
func (v *Inventory) Scan(ctx context.Context, o ScanOptions) (*ScanResult, error) {
	least := slices.Index(severities, o.Severity)
	if o.Severity == "" {
		least = 0
	}
	if least < 0 {
		return nil, hinted.New(fmt.Errorf("severity %q: not known", o.Severity), "low, medium, high or critical")
	}
	ignores, err := readIgnores(o.Ignore)
	if err != nil {
		return nil, err
	}
	subjects := v.subjects()
	wanted, covered := map[string]bool{}, map[string]bool{}
	res := &ScanResult{Findings: []Finding{}}
	for k, s := range subjects {
		eco, _, _ := strings.Cut(k, "\x00")
		wanted[eco] = true
		res.Packages += len(s)
	}
	found := map[int][]Finding{} // by package
	res.Records, err = readDatabase(ctx, o.Database, func(r *osvRecord) {
		if r.Withdrawn != "" {
			return
		}
		for i := range r.Affected {
			a := &r.Affected[i]
			covered[a.Package.Ecosystem] = true
			for _, s := range subjects[subjectKey(a.Package.Ecosystem, a.Package.Name)] {
				hit, fixed, judged := a.affects(s.kind, s.version)
				switch {
				case hit:
					found[s.index] = append(found[s.index], v.finding(r, a, s, fixed))
				case !judged:
					res.Unjudged = append(res.Unjudged, Unjudged{clean(r.ID, 100), s.name, s.version})
				}
			}
		}
	})
	if err != nil {
		return nil, err
	}
	if res.Database, err = DatabaseAge(o.Database); err != nil {
		return nil, fmt.Errorf("read database %q: %w", o.Database, err)
	}
	for eco := range wanted {
		if !covered[eco] {
			return nil, hinted.New(fmt.Errorf("read database %q: no record of %s in it, which %d packages are of", o.Database, eco, countOf(subjects, eco)), "OSV publishes an all.zip for each ecosystem; several may be put into one directory")
		}
	}
	for i := range v.Packages { // in the inventory's order
		for _, f := range unite(found[i]) {
			if f.rank < least && f.rank > 0 {
				res.Below++
				continue
			}
			if n := ignores.match(&f, o.Now); n {
				res.Ignored = append(res.Ignored, f)
				continue
			}
			res.Findings = append(res.Findings, f)
		}
	}
	res.Unused = ignores.unused()
	slices.SortFunc(res.Unjudged, func(a, b Unjudged) int { return strings.Compare(a.Package+"\x00"+a.ID, b.Package+"\x00"+b.ID) })
	return res, nil
}

func countOf(subjects map[string][]subject, eco string) (n int) {
	for k, s := range subjects {
		if strings.HasPrefix(k, eco+"\x00") {
			n += len(s)
		}
	}
	return n
}

func (v *Inventory) finding(r *osvRecord, a *osvAffected, s subject, fixed []string) Finding {
	p := &v.Packages[s.index]
	summary := r.Summary
	if summary == "" {
		summary = firstLine(strings.TrimSpace(r.Details))
	}
	f := Finding{
		ID: clean(r.ID, 100), System: p.System, Package: p.Name, Version: p.Version, PURL: p.PURL(), Summary: clean(summary, 300),
		Fixed: later(fixed, s), rank: r.severity(a),
	}
	for _, x := range r.Aliases {
		if x = clean(x, 100); x != "" && len(f.Aliases) < 100 {
			f.Aliases = append(f.Aliases, x)
		}
	}
	return f
}

// later keeps the versions that are after the installed one, in order.
func later(fixed []string, s subject) []string {
	out := slices.DeleteFunc(fixed, func(f string) bool { c, ok := compareVersions(s.kind, f, s.version); return ok && c <= 0 })
	slices.SortFunc(out, func(a, b string) int {
		if c, ok := compareVersions(s.kind, a, b); ok && c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	return slices.Compact(out)
}

// unite makes one finding of those of a package that share a name.
func unite(all []Finding) []Finding {
	slices.SortFunc(all, func(a, b Finding) int { return strings.Compare(a.ID, b.ID) })
	var out []Finding
	for _, f := range all {
		names := append([]string{f.ID}, f.Aliases...)
		merged := f
		rest := out[:0:0]
		for _, o := range out {
			if !slices.ContainsFunc(append([]string{o.ID}, o.Aliases...), func(n string) bool { return slices.Contains(names, n) }) {
				rest = append(rest, o)
				continue
			}
			merged = join(o, merged)
			names = append([]string{merged.ID}, merged.Aliases...)
		}
		out = append(rest, merged)
	}
	for i := range out {
		out[i].Severity = severities[out[i].rank]
	}
	slices.SortFunc(out, func(a, b Finding) int { return strings.Compare(a.ID, b.ID) })
	return out
}

func join(a, b Finding) Finding {
	names := append(append([]string{b.ID}, a.Aliases...), b.Aliases...)
	slices.Sort(names)
	a.Aliases = slices.DeleteFunc(slices.Compact(names), func(n string) bool { return n == a.ID })
	a.rank = max(a.rank, b.rank)
	if a.Summary == "" {
		a.Summary = b.Summary
	}
	for _, f := range b.Fixed {
		if !slices.Contains(a.Fixed, f) {
			a.Fixed = append(slices.Clone(a.Fixed), f)
		}
	}
	return a
}

// ---- what is ignored ----------------------------------------------------------

type ignoreList struct {
	path    string
	entries []ignoreEntry
	used    []bool
}

type ignoreEntry struct {
	ID      string          `toml:"id"`
	Reason  string          `toml:"reason"`
	Until   *toml.LocalDate `toml:"until"`   // the last day (UTC) on which it is ignored
	Package string          `toml:"package"` // "" is any
}

func readIgnores(path string) (*ignoreList, error) {
	l := &ignoreList{path: path}
	if path == "" {
		return l, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read ignore list %q: %w", path, errors.Unwrap(err))
	}
	defer f.Close()
	var doc struct {
		Ignore []ignoreEntry `toml:"ignore"`
	}
	if err := toml.NewDecoder(io.LimitReader(f, 1<<20)).DisallowUnknownFields().Decode(&doc); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			err = fmt.Errorf("no such key: %s", strings.Join(strict.Errors[0].Key(), "."))
		}
		return nil, hinted.New(fmt.Errorf("read ignore list %q: %w", path, err), "[[ignore]] with id, reason, until and package")
	}
	for i, e := range doc.Ignore {
		if e.ID == "" || e.Reason == "" {
			return nil, hinted.New(fmt.Errorf("read ignore list %q: entry %d: id and reason are needed", path, i+1), "whoever reads it next wants to know why")
		}
	}
	l.entries, l.used = doc.Ignore, make([]bool, len(doc.Ignore))
	return l, nil
}

// match says whether a finding is ignored. One that was until a day that is
// past counts, and says so.
func (l *ignoreList) match(f *Finding, now time.Time) bool {
	for i, e := range l.entries {
		if e.ID != f.ID && !slices.Contains(f.Aliases, e.ID) || e.Package != "" && pep503.Normalise(e.Package) != pep503.Normalise(f.Package) {
			continue
		}
		l.used[i] = true
		if e.Until != nil && !now.Before(e.Until.AsTime(time.UTC).AddDate(0, 0, 1)) {
			f.ExpiredOn = e.Until.String()
			continue
		}
		f.Reason, f.ExpiredOn = clean(e.Reason, 300), ""
		return true
	}
	return false
}

func (l *ignoreList) unused() []string {
	var out []string
	for i, e := range l.entries {
		if !l.used[i] {
			out = append(out, clean(e.ID, 100))
		}
	}
	return out
}

// Table writes the result for people.
func (r *ScanResult) Table(w io.Writer) error {
	if len(r.Findings) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "PACKAGE\tVERSION\tSEVERITY\tID\tFIXED IN\tSUMMARY")
		for _, f := range r.Findings {
			note := f.Summary
			if f.ExpiredOn != "" {
				note = "(was ignored until " + f.ExpiredOn + ") " + note
			}
			fixed := "-"
			if len(f.Fixed) > 0 {
				fixed = strings.Join(f.Fixed, ", ")
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", f.Package, f.Version, f.Severity, f.ID, fixed, note)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	for _, f := range r.Ignored {
		fmt.Fprintf(w, "ignored: %s in %s %s: %s\n", f.ID, f.Package, f.Version, f.Reason)
	}
	for _, u := range r.Unjudged {
		fmt.Fprintf(w, "not judged: %s of %s: version %q cannot be compared\n", u.ID, u.Package, u.Version)
	}
	for _, id := range r.Unused {
		fmt.Fprintf(w, "nothing to ignore: %s\n", id)
	}
	below := ""
	if r.Below > 0 {
		below = fmt.Sprintf(", %d below the severity asked for", r.Below)
	}
	_, err := fmt.Fprintf(w, "%d packages, %d records (as of %s): %d found, %d ignored%s\n", r.Packages, r.Records, r.Database.UTC().Format(time.DateOnly), len(r.Findings), len(r.Ignored), below)
	return err
}
