package conda

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
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
// would at Prefix. It runs nothing. Equal locks give equal trees: contents, modes and
// the modification times of files. On an error Root holds rubbish: throw it away.
//
// The tree is the one that rattler makes, but for what is judged safer or better:
// folders of paths.json are made (rattler fails), links that lead out of the prefix
// are refused, absolute links to what is in the prefix become relative, a path that
// both an entry point and a file of another package want is settled like any other,
// conda-meta names no cache and has mode 0644, and there is no CACHEDIR.TAG.
func Install(ctx context.Context, o InstallOptions) (*Result, error) {
	i, err := newInstallation(o)
	if err != nil {
		return nil, err
	}
	defer i.close()
	for _, step := range []func(context.Context) error{i.unpackAll, i.sort, i.plan, i.link, i.checkLinks, i.record, i.clear} {
		if err := step(ctx); err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("install conda packages: %w", err)
		}
	}
	return &i.result, nil
}

// installation is one run of Install. Packages and what belongs to them are in the
// order of linking from sort on.
type installation struct {
	o      InstallOptions
	root   *tree
	pkgs   []*installed
	python *python
	links  map[string]*installed // installed links by path
	result Result
	budget budget
}

// installed is one package on its way.
type installed struct {
	Package
	*unpacked
	stage   string // folder below the stage
	entries []pathEntry
}

func (p *installed) fail(err error) error {
	return fmt.Errorf("install %s: %w", p.FileName, err)
}

const stageName = ".sbxrun-unpacked"

func newInstallation(o InstallOptions) (*installation, error) {
	if o.Lock == nil {
		return nil, errors.New("install conda packages: no lock")
	}
	lock := *o.Lock
	lock.Packages, lock.Pip = slices.Clone(lock.Packages), slices.Clone(lock.Pip)
	if err := lock.check(); err != nil {
		return nil, err
	}
	o.Lock = &lock
	if !path.IsAbs(o.Prefix) || path.Clean(o.Prefix) != o.Prefix || o.Prefix == "/" || judge(o.Prefix[1:]) != nil {
		return nil, fmt.Errorf("install conda packages: prefix %q is no clean absolute path", shown(o.Prefix))
	}
	if o.Limits.Bytes == 0 {
		o.Limits.Bytes = 64 << 30
	}
	if o.Limits.Entries == 0 {
		o.Limits.Entries = 2_000_000
	}
	if o.Limits.Ratio == 0 {
		o.Limits.Ratio = 500
	}
	if err := os.Mkdir(o.Root, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("install conda packages: %w", err)
	}
	root, err := openTree(unix.AT_FDCWD, o.Root)
	if err != nil {
		return nil, fmt.Errorf("install conda packages: %w", err)
	}
	i := &installation{o: o, root: root, links: map[string]*installed{}}
	if names, err := os.ReadDir(o.Root); err != nil || len(names) > 0 {
		root.close()
		return nil, fmt.Errorf("install conda packages: %s is not empty", o.Root)
	}
	i.budget.bytes.Store(o.Limits.Bytes)
	i.budget.entries.Store(int64(o.Limits.Entries))
	return i, nil
}

func (i *installation) close() {
	i.root.close()
	os.RemoveAll(filepath.Join(i.o.Root, stageName)) // no more than an attempt: the result is thrown away
}

// clear removes what of the archives nobody wanted.
func (i *installation) clear(context.Context) error {
	if err := os.RemoveAll(filepath.Join(i.o.Root, stageName)); err != nil {
		return fmt.Errorf("install conda packages: %w", err)
	}
	return nil
}

// unpackAll verifies and unpacks each package into a folder of its own.
func (i *installation) unpackAll(ctx context.Context) error {
	lock := i.o.Lock
	i.pkgs = make([]*installed, len(lock.Packages))
	errs := make([]error, len(lock.Packages))
	next := make(chan int)
	var failed atomic.Bool
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 8) {
		wg.Go(func() {
			for n := range next {
				p := &installed{Package: lock.Packages[n], stage: strconv.Itoa(n)}
				i.pkgs[n] = p
				if err := i.unpackOne(ctx, p); err != nil {
					errs[n] = p.fail(err)
					failed.Store(true)
				}
			}
		})
	}
	if _, err := i.root.dir(stageName, true); err != nil {
		errs = append(errs, fmt.Errorf("install conda packages: %w", err))
		failed.Store(true)
	}
	for n := range lock.Packages {
		if failed.Load() || ctx.Err() != nil {
			break
		}
		next <- n
	}
	close(next)
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (i *installation) unpackOne(ctx context.Context, p *installed) error {
	f, size, err := openArchive(i.o.Archives, &p.Package)
	if err != nil {
		return err
	}
	defer f.Close()
	under, err := openTree(i.root.root, stageName)
	if err != nil {
		return err
	}
	defer under.close()
	if _, err := under.dir(p.stage, true); err != nil {
		return err
	}
	stage, err := openTree(under.root, p.stage)
	if err != nil {
		return err
	}
	defer stage.close()
	p.SizeBytes = size
	u := unpacker{ctx: ctx, stage: stage, all: &i.budget, limits: i.o.Limits, packed: size}
	if err := u.unpack(f, p.FileName); err != nil {
		return err
	}
	p.unpacked = u.out
	if err := p.complete(u.out.info["index.json"], i.o.Lock.Platform); err != nil {
		return err
	}
	p.entries, err = u.out.paths()
	return err
}

// sort puts the packages into the order of linking and finds Python.
func (i *installation) sort(context.Context) error {
	list := make([]*Package, len(i.pkgs))
	for n, p := range i.pkgs {
		list[n] = &p.Package
	}
	var sorted []*installed
	for _, n := range order(list) {
		p := i.pkgs[n]
		sorted = append(sorted, p)
		i.result.Packages = append(i.result.Packages, p.Package)
		if p.SHA256 == "" {
			i.result.WeakHashes = append(i.result.WeakHashes, p.FileName)
		}
	}
	i.pkgs = sorted
	var err error
	if i.python, err = findPython(list); err != nil {
		return fmt.Errorf("install %w", err)
	}
	if i.python != nil {
		i.result.Python = i.python.version
	}
	return nil
}

// plan decides where each path of each package goes, before anything is placed.
func (i *installation) plan(context.Context) error {
	var all claims
	for n, p := range i.pkgs {
		if err := i.destine(p); err != nil {
			return p.fail(err)
		}
		for k := range p.entries {
			all.add(p.entries[k].Path, claim{n, k, p.entries[k].PathType == directory})
		}
	}
	clobbered := map[string]*ClobberedPath{}
	all.settle(func(by int, at claim) {
		p := i.pkgs[at.pkg]
		e := &p.entries[at.entry]
		if at.folder {
			e.from = "" // no longer wanted
			return
		}
		c := clobbered[e.Path]
		if c == nil {
			c = &ClobberedPath{Path: e.Path, Winner: i.pkgs[by].Name}
			clobbered[e.Path] = c
		}
		c.Losers = append(c.Losers, p.Name)
		e.OriginalPath, e.Path = e.Path, clobbersDir+"/"+p.Name+"/"+e.Path
	})
	for _, name := range slices.Sorted(maps.Keys(clobbered)) {
		slices.Sort(clobbered[name].Losers)
		i.result.Clobbered = append(i.result.Clobbered, *clobbered[name])
	}
	for _, p := range i.pkgs {
		i.leftToDo(p)
	}
	return nil
}

// destine gives a package's paths the place where conda puts them.
func (i *installation) destine(p *installed) error {
	if p.Noarch == "python" {
		if i.python == nil {
			return hinted.New(errors.New("is a Python package, and the lock has no python"), "lock it together with python")
		}
		points, err := i.python.entryPoints(p.info["link.json"], i.o.Prefix)
		if err != nil {
			return err
		}
		own := map[string]bool{}
		for _, e := range points {
			own[e.Path] = true
		}
		seen := map[string]string{}
		kept := p.entries[:0]
		for _, e := range p.entries {
			e.Path = i.python.place(e.Path)
			if was, ok := seen[e.Path]; ok {
				return fmt.Errorf("%s and %s are to be the same file", shown(was), shown(e.from))
			}
			seen[e.Path] = e.from
			if !own[e.Path] { // the entry point overwrites it, with rattler too
				kept = append(kept, e)
			}
		}
		p.entries = append(kept, points...)
	}
	all := newPlaces()
	for k := range p.entries {
		e := &p.entries[k]
		if err := judge(e.Path); err != nil {
			return err
		}
		add := all.add
		if e.PathType == directory {
			add = all.addFolder
		}
		if err := add(e.Path); err != nil {
			return err
		}
		top, rest, _ := strings.Cut(e.Path, "/")
		if top == clobbersDir || top == stageName || top == "conda-meta" && (rest == "" && e.PathType != directory || rest == "history" || strings.HasSuffix(rest, ".json")) {
			return fmt.Errorf("%s is not a package's to write", shown(e.Path))
		}
		if e.PathType == softlink {
			if err := i.judgeLink(p, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// judgeLink refuses links that leave the prefix by what they say; checkLinks
// follows those that are left.
func (i *installation) judgeLink(p *installed, e *pathEntry) error {
	e.target = p.members[e.from].link
	leaves := func() error {
		return fmt.Errorf("link %s leads out of the prefix: %q", shown(e.Path), shown(e.target))
	}
	if strings.HasPrefix(e.target, "/") {
		in, ok := "", false
		for _, prefix := range []string{i.o.Prefix, e.Placeholder, p.placeholder()} {
			if prefix != "" && !ok {
				in, ok = strings.CutPrefix(path.Clean(e.target)+"/", prefix+"/")
			}
		}
		if !ok {
			return leaves()
		}
		rel, err := filepath.Rel("/"+path.Dir(e.Path), path.Clean("/"+in))
		if err != nil {
			return leaves()
		}
		e.target = rel
	}
	e.Placeholder, e.FileMode = "", ""
	if in := path.Join(path.Dir(e.Path), e.target); in == ".." || strings.HasPrefix(in, "../") {
		return leaves()
	}
	return nil
}

// placeholder is what the package's files have for the prefix.
func (p *installed) placeholder() string {
	for k := range p.entries {
		if p.entries[k].Placeholder != "" {
			return p.entries[k].Placeholder
		}
	}
	return ""
}

// leftToDo lists a package's scripts and what is to be compiled.
func (i *installation) leftToDo(p *installed) {
	var compile []string
	have := map[string]bool{}
	for _, e := range p.entries {
		have[e.Path] = true
	}
	for _, kind := range []string{"pre-link", "post-link"} {
		at := "bin/." + p.Name + "-" + kind + ".sh"
		if have[at] {
			i.result.Scripts = append(i.result.Scripts, LinkScript{p.Name, kind, at, map[string]string{
				"PREFIX": i.o.Prefix, "PKG_NAME": p.Name, "PKG_VERSION": p.Version, "PKG_BUILDNUM": strconv.Itoa(p.BuildNumber),
			}})
		}
	}
	if p.Noarch != "python" {
		return
	}
	for _, e := range p.entries {
		if e.PathType == hardlink && strings.HasPrefix(e.from, "site-packages/") && strings.HasSuffix(e.from, ".py") && e.OriginalPath == "" && !have[i.python.pycName(e.Path)] {
			compile = append(compile, e.Path)
		}
	}
	if len(compile) > 0 {
		slices.Sort(compile)
		i.result.Compile = append(i.result.Compile, Compile{p.Name, compile})
	}
	if i.o.Pycs {
		for _, f := range compile {
			p.entries = append(p.entries, pathEntry{Path: i.python.pycName(f), PathType: pycFile})
		}
	}
}
