package recipes

// Dependency is one that a distribution's installed metadata names.
type Dependency struct {
	Name   string   // normalised
	Extras []string // of what it needs, normalised
	r      requirement
}

// ParseDependency reads a Requires-Dist.
func ParseDependency(text string) (Dependency, error) {
	r, err := parseRequirement(text)
	return Dependency{r.name, r.extras, r}, err
}

// Applies says whether it counts in an environment.
func (d Dependency) Applies(e *Environment) bool { return d.r.applies(e) }
