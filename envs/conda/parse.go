package conda

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Kind is a format of locks.
type Kind string

// The formats that Parse reads.
const (
	Explicit  Kind = "explicit"   // a list with an @EXPLICIT line
	CondaLock Kind = "conda-lock" // conda-lock.yml, version 1
	Pixi      Kind = "pixi"       // pixi.lock, versions 6 and 7
	Native    Kind = "conda"      // what Lock.Encode writes
)

// ParseOptions choose what of a lock is meant.
type ParseOptions struct {
	Platform    string   // linux-64, linux-aarch64, …; "": an error
	Environment string   // of a pixi.lock; "": default
	Categories  []string // of a conda-lock.yml; none: main
	Optional    bool     // of a conda-lock.yml: take packages marked optional of these categories (always so in version 1 for any category but main)
}

// Parse reads a lock. Kind "" finds it out (see [Detect]). Errors name the package.
func Parse(kind Kind, data []byte, o ParseOptions) (*Lock, error) {
	if len(data) > MaxLockBytes {
		return nil, fmt.Errorf("read lock: over %d bytes", MaxLockBytes)
	}
	if !subdirRule.MatchString(o.Platform) {
		return nil, fmt.Errorf("read lock: platform %q is none of conda's", shown(o.Platform))
	}
	if kind == "" {
		if kind = Detect(data); kind == "" {
			return nil, errors.New("read lock: neither @EXPLICIT, conda-lock.yml nor pixi.lock")
		}
	}
	var l *Lock
	var err error
	switch kind {
	case Explicit:
		l, err = parseExplicit(data, o)
	case CondaLock:
		l, err = parseCondaLock(data, o)
	case Pixi:
		l, err = parsePixi(data, o)
	case Native:
		if l, err = Decode(data); err == nil && l.Platform != o.Platform {
			err = otherPlatform(o.Platform, []string{l.Platform})
		}
	default:
		err = fmt.Errorf("read lock: kind %q is unknown", shown(string(kind)))
	}
	if err != nil {
		return nil, err
	}
	if err := l.check(); err != nil {
		return nil, err
	}
	return l, nil
}

// Detect tells a lock's format by its content; "" is none.
func Detect(data []byte) Kind {
	head := data
	if len(head) > 1<<20 {
		head = head[:1<<20]
	}
	if t := bytes.TrimSpace(head); len(t) > 0 && t[0] == '{' && bytes.Contains(head, []byte(`"platform"`)) {
		return Native
	}
	keys := map[string]bool{}
	for line := range strings.Lines(string(head)) {
		line = strings.TrimRight(line, "\r\n \t")
		if line == "@EXPLICIT" {
			return Explicit
		}
		if key, _, ok := strings.Cut(line, ":"); ok && line[0] != ' ' && line[0] != '#' {
			keys[key] = true
		}
	}
	switch {
	case keys["environments"] && keys["version"]:
		return Pixi
	case keys["metadata"] && (keys["package"] || keys["version"]):
		return CondaLock
	}
	return ""
}

func otherPlatform(want string, have []string) error {
	slices.Sort(have)
	if have = slices.Compact(have); len(have) > 10 {
		have = have[:10]
	}
	return hinted.New(fmt.Errorf("read lock: nothing for %s: it is for %s", want, shown(strings.Join(have, ", "))),
		"lock it for this platform too: conda-lock -p "+want+", or pixi.toml platforms")
}

func parseExplicit(data []byte, o ParseOptions) (*Lock, error) {
	l := &Lock{Platform: o.Platform}
	seen := false
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		line = strings.TrimSpace(line)
		if v, ok := strings.CutPrefix(line, "# platform:"); ok {
			if v = strings.TrimSpace(v); v != o.Platform {
				return nil, otherPlatform(o.Platform, []string{v})
			}
			continue
		}
		switch {
		case line == "" || line[0] == '#':
			continue
		case line == "@EXPLICIT":
			seen = true
			continue
		}
		raw, hash, _ := strings.Cut(line, "#")
		var p Package
		if err := p.fromURL(raw); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		switch algorithm, value, ok := strings.Cut(hash, ":"); {
		case ok && algorithm == "sha256":
			p.SHA256 = value
		case ok && algorithm == "md5":
			p.MD5 = value
		case len(hash) == 64:
			p.SHA256 = hash
		case len(hash) == 32:
			p.MD5 = hash
		case hash != "":
			return nil, fmt.Errorf("line %d: read lock: package %s: %q is neither md5 nor sha256", n, p.FileName, shown(hash))
		}
		p.BuildNumber = numberOf(p.Build)
		l.Packages = append(l.Packages, p)
		if len(l.Packages) > maxPackages {
			return nil, fmt.Errorf("read lock: over %d packages", maxPackages)
		}
		if !slices.Contains(l.Channels, p.Channel) {
			l.Channels = append(l.Channels, p.Channel)
		}
	}
	if !seen {
		return nil, errors.New("read lock: no @EXPLICIT line")
	}
	if len(l.Packages) == 0 {
		return nil, errors.New("read lock: it names no package")
	}
	return l, nil
}
