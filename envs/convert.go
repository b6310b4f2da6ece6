package envs

// What sbxrun-env is asked to make of a project's lock, inside a sandbox, and
// what it answers. Package envs/recipes does it.

// ConvertVerb is the step's name.
const ConvertVerb = "recipe-convert"

// Target is what an environment is made for.
type Target struct {
	Vars  map[string]string `json:"vars"`            // PEP 508's variables but extra
	SOABI string            `json:"soabi"`           // cpython-311-x86_64-linux-gnu; "" where the interpreter has none
	Glibc string            `json:"glibc,omitempty"` // 2.36; "" is another libc
	Musl  string            `json:"musl,omitempty"`  // 1.2
}

// Conversion is the request.
type Conversion struct {
	Kind Kind `json:"kind"`
	// Dir holds the files: the first of Files is the lock, a pyproject.toml that
	// lay beside it may follow.
	Dir   string   `json:"dir"`
	Files []string `json:"files"`
	// Output is where the hashed requirements.txt is written.
	Output      string   `json:"output"`
	Extras      []string `json:"extras,omitempty"`
	Groups      []string `json:"groups,omitempty"`
	OnlyGroups  []string `json:"only_groups,omitempty"` // these and not the project's own dependencies
	AllExtras   bool     `json:"all_extras,omitempty"`
	AllowBuild  bool     `json:"allow_build,omitempty"`
	Target      Target   `json:"target"`
	PublicIndex string   `json:"public_index,omitempty"` // what the user's configuration stands for; "" is unknown
}

// Converted is the answer.
type Converted struct {
	Packages int      `json:"packages"`
	Sources  []Source `json:"sources,omitempty"`
	Hosts    []string `json:"hosts,omitempty"` // https://host, of files that other indexes than the public one refer to
	// Stale names what the pyproject.toml beside needs and the lock has not: then
	// there is no output.
	Stale     string `json:"stale,omitempty"`
	StaleHint string `json:"stale_hint,omitempty"`
}

// Source is a package that is not taken from an index: it is built, or a wheel
// of the project's own.
type Source struct {
	Name string `json:"name"`
	Path string `json:"path,omitempty"` // local, relative to the lock's folder
	Hash string `json:"hash,omitempty"` // sha256:…, of a file that the lock knows
	// URL and Rev (a full commit hash) of a git repository.
	URL          string `json:"url,omitempty"`
	Rev          string `json:"rev,omitempty"`
	Subdirectory string `json:"subdirectory,omitempty"`
	Editable     bool   `json:"editable,omitempty"` // it is installed as a copy all the same
}
