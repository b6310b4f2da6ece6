package pep440

import (
	"fmt"
	"strings"
)

// Specifiers is a list of conditions that must all hold: ">=1.0, !=1.3.*, <2".
// The zero value takes every version.
type Specifiers []Specifier

// Specifier is one condition.
type Specifier struct {
	op      string
	version Version
	text    string // as it was written, for ===
	prefix  bool   // ends in .*
}

// operators, longer ones first.
var operators = []string{"===", "==", "~=", "!=", "<=", ">=", "<", ">"}

// ParseSpecifiers reads a comma-separated list; "" takes everything.
func ParseSpecifiers(s string) (Specifiers, error) {
	var out Specifiers
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		sp, err := parseSpecifier(part)
		if err != nil {
			return nil, err
		}
		out = append(out, sp)
	}
	return out, nil
}

func parseSpecifier(s string) (Specifier, error) {
	for _, op := range operators {
		rest, ok := strings.CutPrefix(s, op)
		if !ok {
			continue
		}
		sp := Specifier{op: op, text: strings.TrimSpace(rest)}
		if op == "===" {
			return sp, nil
		}
		text := sp.text
		if op == "==" || op == "!=" {
			text, sp.prefix = strings.CutSuffix(text, ".*")
		}
		v, err := Parse(text)
		if err != nil {
			return sp, fmt.Errorf("specifier %q: %w", s, err)
		}
		if op == "~=" && len(v.release) < 2 {
			return sp, fmt.Errorf("specifier %q: ~= needs two numbers", s)
		}
		sp.version = v
		return sp, nil
	}
	return Specifier{}, fmt.Errorf("specifier %q: no operator", s)
}

// Contains says whether every condition holds. Whether pre-releases are wanted
// is the caller's to decide.
func (s Specifiers) Contains(v Version) bool {
	for _, sp := range s {
		if !sp.contains(v) {
			return false
		}
	}
	return true
}

func (sp Specifier) contains(v Version) bool {
	w := sp.version
	switch sp.op {
	case "===":
		return strings.EqualFold(sp.text, v.String())
	case "==":
		return sp.equal(v)
	case "!=":
		return !sp.equal(v)
	case "<=":
		return v.comparePublic(w) <= 0
	case ">=":
		return v.comparePublic(w) >= 0
	case "~=":
		p := Specifier{op: "==", prefix: true, version: Version{epoch: w.epoch, release: w.release[:len(w.release)-1]}}
		return v.comparePublic(w) >= 0 && p.equal(v)
	case "<": // not the pre-releases of what is excluded
		if !w.IsPrerelease() {
			w.dev = "0"
		}
		return v.comparePublic(w) < 0
	}
	// ">": neither its post-releases nor its local versions
	if w.post == "" && v.post != "" {
		of := v
		of.post, of.dev = "", ""
		if of.comparePublic(w) == 0 {
			return false
		}
	}
	return v.comparePublic(w) > 0
}

func (sp Specifier) equal(v Version) bool {
	w := sp.version
	switch {
	case sp.prefix && w.pre == "" && w.post == "" && w.dev == "":
		for i := range w.release {
			if at(v.release, i) != w.release[i] {
				return false
			}
		}
		return v.epoch == w.epoch
	case sp.prefix: // 1.0a1.*
		return v.sameRelease(w) && v.pre == w.pre && v.preNum == w.preNum && (w.post == "" || v.post == w.post)
	case len(w.local) == 0:
		return v.comparePublic(w) == 0
	}
	return v.Compare(w) == 0
}

func (v Version) sameRelease(w Version) bool {
	a, b := Version{epoch: v.epoch, release: v.release}, Version{epoch: w.epoch, release: w.release}
	return a.comparePublic(b) == 0
}
