package inventory

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// Bounds of a database of vulnerabilities.
const (
	maxRecordBytes   = 32 << 20 // the largest lists some 100,000 versions
	maxDatabaseFiles = 2_000_000
	maxDatabaseBytes = 32 << 30 // unpacked
)

// osvRecord is a record of the OSV schema, as far as it is used.
type osvRecord struct {
	ID        string        `json:"id"`
	Aliases   []string      `json:"aliases"`
	Withdrawn string        `json:"withdrawn"`
	Summary   string        `json:"summary"`
	Details   string        `json:"details"`
	Severity  []osvSeverity `json:"severity"`
	Affected  []osvAffected `json:"affected"`
	Database  osvDatabase   `json:"database_specific"`
}

type osvSeverity struct {
	Type  string `json:"type"`
	Score string `json:"score"`
}

// osvDatabase is what a source of records adds: anything else may be there.
type osvDatabase struct{ severity string }

// UnmarshalJSON takes the severity if there is one, and minds nothing else.
func (d *osvDatabase) UnmarshalJSON(b []byte) error {
	var v map[string]json.RawMessage
	if json.Unmarshal(b, &v) == nil {
		_ = json.Unmarshal(v["severity"], &d.severity) // of another type: none
	}
	return nil
}

type osvAffected struct {
	Package struct {
		Ecosystem string `json:"ecosystem"`
		Name      string `json:"name"`
	} `json:"package"`
	Severity []osvSeverity `json:"severity"`
	Ranges   []osvRange    `json:"ranges"`
	Versions []string      `json:"versions"`
}

type osvRange struct {
	Type   string              `json:"type"`
	Events []map[string]string `json:"events"`
}

// subject is what records are compared with: a package in an ecosystem.
type subject struct {
	index   int    // in the inventory
	kind    string // how its versions are ordered
	name    string
	version string
}

// subjects gives what the database may know, by ecosystem and name.
func (v *Inventory) subjects() map[string][]subject {
	out := map[string][]subject{}
	for i, p := range v.Packages {
		switch {
		case p.System == PyPI:
			k := "PyPI\x00" + p.Name
			out[k] = append(out[k], subject{i, PyPI, p.Name, p.Version})
		case p.System == Conda && p.Project != "":
			k := "PyPI\x00" + p.Project
			out[k] = append(out[k], subject{i, PyPI, p.Project, p.ProjectVersion})
		case p.System == Deb && p.distro == "debian":
			release := strings.TrimPrefix(p.Qualifiers["distro"], "debian-")
			k := "Debian:" + release + "\x00" + p.source
			out[k] = append(out[k], subject{i, Deb, p.source, p.sourceVersion})
		}
	}
	return out
}

func subjectKey(ecosystem, name string) string {
	if ecosystem == "PyPI" {
		name = pep503.Normalise(name)
	}
	return ecosystem + "\x00" + name
}

// affects says whether a version is affected, the versions that mend it, and
// whether it could be judged.
func (a *osvAffected) affects(kind, version string) (hit bool, fixed []string, judged bool) {
	judged = true
	for _, v := range a.Versions {
		if v == version {
			hit = true
		} else if c, ok := compareVersions(kind, v, version); ok && c == 0 {
			hit = true
		}
	}
	for _, r := range a.Ranges {
		order := kind
		switch r.Type {
		case "ECOSYSTEM":
		case "SEMVER":
			order = semver
		default:
			continue // GIT: commits are not known
		}
		in, ok := r.contains(order, version)
		// A list of versions is complete by the schema's word: it judges alone.
		judged = judged && (ok || len(a.Versions) > 0)
		hit = hit || ok && in
		for _, e := range r.Events {
			if f := e["fixed"]; f != "" {
				fixed = append(fixed, clean(f, 100))
			}
		}
	}
	return hit, fixed, judged || hit
}

// contains is the schema's algorithm: events in order, each of which turns it on or off.
func (r *osvRange) contains(kind, version string) (in, ok bool) {
	type event struct{ kind, version string }
	var events []event
	limited, below := false, false
	for _, e := range r.Events {
		for _, k := range []string{"fixed", "last_affected", "introduced"} {
			if v, has := e[k]; has {
				events = append(events, event{k, v})
			}
		}
		if l, has := e["limit"]; has {
			limited = true
			c, good := compareVersions(kind, version, l)
			if l == "*" {
				c, good = -1, true
			}
			if !good {
				return false, false
			}
			below = below || c < 0
		}
	}
	ok = true
	compare := func(a, b string) int {
		switch {
		case a == b:
			return 0
		case a == "0":
			return -1
		case b == "0":
			return 1
		}
		c, good := compareVersions(kind, a, b)
		ok = ok && good
		return c
	}
	slices.SortStableFunc(events, func(a, b event) int { return compare(a.version, b.version) })
	for _, e := range events {
		c := 1
		if e.version != "0" {
			c = compare(version, e.version)
		}
		switch {
		case e.kind == "introduced" && c >= 0:
			in = true
		case e.kind == "fixed" && c >= 0, e.kind == "last_affected" && c > 0:
			in = false
		}
	}
	return in && (!limited || below), ok
}

// readDatabase gives every record of a file, a directory of files, or a ZIP as
// OSV publishes it. What cannot be read as a record is an error: a scan that
// saw half of the database says nothing.
func readDatabase(ctx context.Context, path string, use func(*osvRecord)) (records int, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, hinted.New(fmt.Errorf("read database %q: %w", path, errors.Unwrap(err)), "a file, a directory or an all.zip of records in the OSV format")
	}
	d := &database{path: path, use: use}
	if st.IsDir() {
		err = d.dir(ctx)
	} else {
		err = d.file(ctx)
	}
	if err != nil {
		return d.records, fmt.Errorf("read database %q: %w", path, err)
	}
	if d.records == 0 {
		return 0, hinted.New(fmt.Errorf("read database %q: no record in it", path), "a file, a directory or an all.zip of records in the OSV format")
	}
	return d.records, nil
}

type database struct {
	path    string
	use     func(*osvRecord)
	records int
	files   int
	bytes   int64
}

func (d *database) file(ctx context.Context) error {
	f, err := os.Open(d.path)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer f.Close()
	if strings.HasSuffix(d.path, ".zip") {
		return d.zip(ctx, "", f)
	}
	return d.read(ctx, "", f)
}

// dir reads a directory's files and ZIPs.
func (d *database) dir(ctx context.Context) error {
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || !strings.HasSuffix(p, ".json") && !strings.HasSuffix(p, ".zip") {
			return err
		}
		f, err := root.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		if strings.HasSuffix(p, ".zip") {
			return d.zip(ctx, p+": ", f)
		}
		return d.read(ctx, p, f)
	})
}

func (d *database) zip(ctx context.Context, prefix string, file *os.File) error {
	st, err := file.Stat()
	if err != nil {
		return err
	}
	z, err := zip.NewReader(file, st.Size())
	if err != nil {
		return fmt.Errorf("%s%w", prefix, err)
	}
	for _, f := range z.File {
		if !strings.HasSuffix(f.Name, ".json") {
			continue
		}
		r, err := f.Open()
		if err == nil {
			err = d.read(ctx, prefix+f.Name, r)
			r.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// read reads the records of one file: one, a list, or one after the other.
func (d *database) read(ctx context.Context, name string, r io.Reader) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.files++; d.files > maxDatabaseFiles {
		return errors.New("too many files")
	}
	if name != "" {
		name = clean(name, 200) + ": "
	}
	max := int64(maxRecordBytes)
	if name == "" {
		max = 1 << 30 // one file for all
	}
	b, err := bounded.Read(r, max)
	if err != nil {
		return fmt.Errorf("%s%w", name, err)
	}
	if d.bytes += int64(len(b)); d.bytes > maxDatabaseBytes {
		return errors.New("too large when unpacked")
	}
	var only osvRecord
	if json.Unmarshal(b, &only) == nil && only.ID != "" { // as nearly always
		d.records++
		d.use(&only)
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	for {
		var raw json.RawMessage
		if err := dec.Decode(&raw); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("%snot JSON: %w", name, err)
		}
		list := []json.RawMessage{raw}
		if raw[0] == '[' {
			if err := json.Unmarshal(raw, &list); err != nil {
				return fmt.Errorf("%snot JSON: %w", name, err)
			}
		}
		for _, one := range list {
			var rec osvRecord
			if err := json.Unmarshal(one, &rec); err != nil || rec.ID == "" {
				return fmt.Errorf("%snot a record in the OSV format", name)
			}
			d.records++
			d.use(&rec)
		}
	}
}

// ---- severity ---------------------------------------------------------------

// severities, by rank; 0 is not known.
var severities = []string{"unknown", "low", "medium", "high", "critical"}

// severity is the highest that a record gives: a source's own word, or the base
// score of CVSS 3. (Records with CVSS 4 alone have a source's word as a rule.)
func (r *osvRecord) severity(a *osvAffected) int {
	rank := 0
	switch strings.ToUpper(r.Database.severity) {
	case "LOW":
		rank = 1
	case "MODERATE", "MEDIUM":
		rank = 2
	case "HIGH", "IMPORTANT":
		rank = 3
	case "CRITICAL":
		rank = 4
	}
	if strings.HasPrefix(r.ID, "MAL-") {
		rank = 4
	}
	for _, s := range append(slices.Clone(r.Severity), a.Severity...) {
		if s.Type == "CVSS_V3" {
			rank = max(rank, rankOfScore(cvss3(s.Score)))
		}
	}
	return rank
}

func rankOfScore(score float64) int {
	switch {
	case score >= 9:
		return 4
	case score >= 7:
		return 3
	case score >= 4:
		return 2
	case score > 0:
		return 1
	}
	return 0
}

// cvss3 computes the base score of a vector of CVSS 3.0 or 3.1; 0 if it is none.
func cvss3(vector string) float64 {
	m := map[string]string{}
	for part := range strings.SplitSeq(vector, "/") {
		k, v, _ := strings.Cut(part, ":")
		m[k] = v
	}
	if m["CVSS"] != "3.0" && m["CVSS"] != "3.1" {
		return 0
	}
	changed := m["S"] == "C"
	weight := func(metric string, weights map[string]float64) float64 {
		w, ok := weights[m[metric]]
		if !ok {
			return math.NaN()
		}
		return w
	}
	cia := map[string]float64{"H": 0.56, "L": 0.22, "N": 0}
	pr := map[string]float64{"N": 0.85, "L": 0.62, "H": 0.27}
	if changed {
		pr["L"], pr["H"] = 0.68, 0.5
	}
	iss := 1 - (1-weight("C", cia))*(1-weight("I", cia))*(1-weight("A", cia))
	impact := 6.42 * iss
	if changed {
		impact = 7.52*(iss-0.029) - 3.25*math.Pow(iss-0.02, 15)
	}
	exploit := 8.22 * weight("AV", map[string]float64{"N": 0.85, "A": 0.62, "L": 0.55, "P": 0.2}) * weight("AC", map[string]float64{"L": 0.77, "H": 0.44}) *
		weight("PR", pr) * weight("UI", map[string]float64{"N": 0.85, "R": 0.62})
	if math.IsNaN(impact) || math.IsNaN(exploit) || impact <= 0 {
		return 0
	}
	score := impact + exploit
	if changed {
		score *= 1.08
	}
	return math.Ceil(math.Round(min(score, 10)*100000)/10000) / 10
}

// DatabaseAge is when the newest file of a database was changed: what was found
// later is not in it.
func DatabaseAge(path string) (time.Time, error) {
	st, err := os.Stat(path)
	if err != nil || !st.IsDir() {
		if err != nil {
			return time.Time{}, err
		}
		return st.ModTime(), nil
	}
	newest := st.ModTime()
	err = filepath.WalkDir(path, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if i, err := e.Info(); err == nil && i.ModTime().After(newest) {
			newest = i.ModTime()
		}
		return nil
	})
	return newest, err
}
