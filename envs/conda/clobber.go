package conda

import (
	"slices"
	"strings"
)

// clobbersDir keeps the files of packages that lost their path, as rattler does.
const clobbersDir = "__clobbers__"

// claim is one path of one package: indexes into the packages in order of linking
// and into the package's entries.
type claim struct {
	pkg, entry int
	folder     bool // shared with others unless a file takes the path
}

// claims is a trie of all packages' paths.
type claims struct {
	kids map[string]*claims
	at   []claim
	top  int // the last package that has something here or below, plus one
}

func (c *claims) add(p string, at claim) {
	c.top = max(c.top, at.pkg+1)
	for part := range strings.SplitSeq(p, "/") {
		if c.kids == nil {
			c.kids = map[string]*claims{}
		}
		k := c.kids[part]
		if k == nil {
			k = &claims{}
			c.kids[part] = k
		}
		c = k
		c.top = max(c.top, at.pkg+1)
	}
	c.at = append(c.at, at)
}

// settle calls lost for each claim that does not get its path, with the package
// that does: the one linked last wins, be it with a file or with a folder. It is
// what rattler's tree ends as.
func (c *claims) settle(lost func(by int, at claim)) {
	winner := c.top - 1
	mine := slices.ContainsFunc(c.at, func(f claim) bool { return f.pkg == winner && !f.folder })
	for _, f := range c.at {
		if f.pkg != winner && (mine || !f.folder) {
			lost(winner, f)
		}
	}
	for _, k := range c.kids {
		if mine {
			k.all(func(f claim) { lost(winner, f) })
		} else {
			k.settle(lost)
		}
	}
}

func (c *claims) all(visit func(claim)) {
	for _, f := range c.at {
		visit(f)
	}
	for _, k := range c.kids {
		k.all(visit)
	}
}
