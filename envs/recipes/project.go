package recipes

import (
	"fmt"

	"github.com/sbxrun/sbxrun/internal/pep503"
)

// project is a pyproject.toml, as far as locks leave questions open.
type project struct {
	Project struct {
		Name         string
		Dependencies []string
		Optional     map[string][]string `toml:"optional-dependencies"`
	}
	Groups map[string]any `toml:"dependency-groups"`
	Tool   struct {
		Poetry struct {
			Dependencies map[string]any
			Dev          map[string]any `toml:"dev-dependencies"` // of poetry before 1.2
			Group        map[string]struct{ Dependencies map[string]any }
		}
		PDM struct {
			Dev map[string]any `toml:"dev-dependencies"`
		}
	}
}

func readProject(b []byte) (*project, error) {
	var p project
	if err := decode(b, &p); err != nil {
		return nil, fmt.Errorf("pyproject.toml: %w", err)
	}
	return &p, nil
}

// groupNames are those that the project declares, of any tool.
func (p *project) groupNames() []string {
	out := append(sortedKeys(p.Groups), sortedKeys(p.Tool.Poetry.Group)...)
	return append(out, sortedKeys(p.Tool.PDM.Dev)...)
}

// staleError: the lock has not what the pyproject.toml needs.
type staleError struct{ needs, hint string }

func (e *staleError) Error() string { return "older than its pyproject.toml, which needs " + e.needs }

// fresh compares a lock with the pyproject.toml beside it: what that asks for
// must be there. It is no proof that a tool would lock the same.
func (c *converter) fresh(b []byte, has func(name string) bool, lock string) error {
	if b == nil || !c.main() {
		return nil
	}
	p, err := readProject(b)
	if err != nil {
		return err
	}
	stale := func(name string) error { return &staleError{name, lock} }
	for _, d := range p.Project.Dependencies {
		r, err := parseRequirement(d)
		if err != nil {
			return fmt.Errorf("pyproject.toml: %w", err)
		}
		if r.applies(c.env) && r.name != pep503.Normalise(p.Project.Name) && !has(r.name) {
			return stale(r.name)
		}
	}
	for name, v := range p.Tool.Poetry.Dependencies {
		t, table := v.(map[string]any)
		if n := pep503.Normalise(name); n != "python" && !(table && (t["optional"] != nil || t["markers"] != nil || t["python"] != nil)) && !has(n) {
			return stale(n)
		}
	}
	return nil
}
