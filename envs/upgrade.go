package envs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/internal/pep503"
)

// anew says that a lock that was kept is not to be taken.
func (r *Recipe) anew() bool { return r.Refresh || len(r.Upgrade) > 0 }

// A file that changes keeps its pins where they still satisfy it: the lock that
// it had last is what the next one prefers. lastPath names it, by the file's
// place.
func (m *Manager) lastPath(r Recipe, in *input) string {
	abs, err := filepath.Abs(r.File)
	if err != nil {
		abs = r.File
	}
	upon := ""
	if strings.HasPrefix(abs, m.store.Path("envs", "inline")+"/") { // several projects': what one's steps gave is not for another
		upon = strings.Join(r.Base.Upon, " ")
	}
	return m.store.Path("envs", "lastlocks", digestOf(schema, string(in.kind), abs, r.Base.Name, r.Python, strings.Join(r.Groups, " "), strings.Join(r.Extras, " "), upon))
}

// remember keeps which lock a file has now.
func (m *Manager) remember(r Recipe, in *input, lock string) error {
	return m.store.WriteFile(m.lastPath(r, in), []byte(filepath.Base(lock)+"\n"))
}

// last gives the text of the lock that a file had; nil where it had none, or
// where all is to be resolved anew.
func (m *Manager) last(r Recipe, in *input) []byte {
	if r.Refresh {
		return nil
	}
	name, err := os.ReadFile(m.lastPath(r, in))
	if err != nil {
		return nil
	}
	b, err := os.ReadFile(m.store.Path("envs", "locks", filepath.Base("/"+strings.TrimSpace(string(name)))))
	if err != nil {
		return nil // pruned
	}
	return b
}

// upgradable checks that what is to be upgraded is in the lock.
func upgradable(r Recipe, have []string) error {
	for _, u := range r.Upgrade {
		if !slices.ContainsFunc(have, func(h string) bool { return pep503.Normalise(h) == pep503.Normalise(u) }) {
			return fail("is the name right?", "lock %q: %s is not in it", r.File, u)
		}
	}
	return nil
}

// upgradeArguments tell uv of it.
func upgradeArguments(r Recipe) (args []string) {
	for _, u := range r.Upgrade {
		args = append(args, "--upgrade-package", u)
	}
	return args
}

// pins are the packages of a file's last lock that its next one prefers.
func (m *Manager) pins(r Recipe, in *input) (pins []condaPackage, requirements string) {
	l, err := parseCondaLock(m.last(r, in))
	if err != nil {
		return nil, ""
	}
	for _, p := range l.view.Packages {
		if !slices.ContainsFunc(r.Upgrade, func(u string) bool { return pep503.Normalise(u) == pep503.Normalise(p.Name) }) {
			pins = append(pins, p)
		}
	}
	return pins, l.Requirements
}
