package conda

import (
	"context"
	"errors"
)

// InstallOptions say what to install, from where and where to.
type InstallOptions struct {
	Lock *Lock
	// Archives is a folder with the packages' files, each named by its sha256
	// (where the lock has it), its file name, or its md5.
	Archives string
	Root     string // the folder to write: empty, or absent
	Prefix   string // the path that Root will have when it is used, as /opt/env
	// Pycs says that the caller will compile what Result.Compile lists: conda-meta
	// then records the .pyc files as conda does.
	Pycs bool
	// FreezePycs makes the packages' own time-stamped .pyc files valid for good
	// (PEP 552, unchecked hash): whoever resets modification times, as the store
	// does, would invalidate them all.
	FreezePycs bool
	Limits     Limits // zero values: the defaults
}

// Limits bound what archives may make Install write.
type Limits struct {
	Bytes   int64 // of all unpacked files; 0: 64 GiB
	Entries int   // files, links and folders; 0: 2,000,000
	Ratio   int64 // unpacked to packed bytes of one archive (beyond 64 MiB unpacked); 0: 500
}

// Result is what Install did and what is left for the caller.
type Result struct {
	Packages   []Package       `json:"packages"`              // in the order they were linked, completed from the packages themselves
	Python     string          `json:"python,omitempty"`      // "3.12"; "": the environment has none
	Files      int             `json:"files"`                 // files and links installed
	Bytes      int64           `json:"bytes"`                 // their size
	WeakHashes []string        `json:"weak_hashes,omitempty"` // file names of packages that only an md5 identifies
	Clobbered  []ClobberedPath `json:"clobbered,omitempty"`   // paths of several packages
	Scripts    []LinkScript    `json:"scripts,omitempty"`     // not run: to run in this order, or to report
	Compile    []Compile       `json:"compile,omitempty"`     // .py files of noarch packages, which come without .pyc
	Warnings   []string        `json:"warnings,omitempty"`
}

// ClobberedPath is a path that several packages have. The one that was linked last
// owns it; the others' files are kept below __clobbers__/PACKAGE, as rattler does.
type ClobberedPath struct {
	Path   string   `json:"path"`
	Winner string   `json:"winner"` // package
	Losers []string `json:"losers"` // packages
}

// LinkScript is a script a package wants to be run; it may do anything.
type LinkScript struct {
	Package string            `json:"package"`
	Kind    string            `json:"kind"` // pre-link, post-link
	Path    string            `json:"path"` // relative to the prefix; run with bash
	Env     map[string]string `json:"env"`  // PREFIX, PKG_NAME, PKG_VERSION, PKG_BUILDNUM
}

// Compile lists a package's .py files, relative to the prefix, that conda compiles
// at installation. With Pycs their __pycache__/NAME.cpython-XY.pyc are recorded.
type Compile struct {
	Package string   `json:"package"`
	Files   []string `json:"files"`
}

// Install verifies, unpacks and links the packages of a lock into Root as conda
// would at Prefix. It runs nothing. On an error Root holds rubbish: throw it away.
func Install(ctx context.Context, o InstallOptions) (*Result, error) {
	return nil, errors.New("install conda packages: not yet")
}
