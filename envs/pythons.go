package envs

// interpreter finds the one that a recipe wants: in the base, else among those
// that were added, which are put upon the base then.
func (m *Manager) interpreter(r *Recipe) (python, error) {
	return findPython(r.Base, r.Python)
}
