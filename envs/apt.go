package envs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// System packages are a layer upon a base of Debian's kind: resolved by apt
// against what the base has, verified by apt against its archive's signatures,
// and unpacked. Their maintainer scripts do not run: no users, alternatives or
// caches are made.

// SystemPackage is a package of the base's distribution.
type SystemPackage struct {
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"`
	SHA256       string `json:"sha256"` // of the archive it came in
}

// systemDir is where a layer of system packages says what is in it.
const systemDir = "var/lib/sbxrun/apt"

const dpkgStatus = "var/lib/dpkg/status"

// What one step takes of apt, which is the base's own and may say anything.
const (
	maxDebBytes     = 4 << 30
	maxDebs         = 10_000
	maxControlBytes = 1 << 20
)

// apt puts a stage's system packages on top.
func (b *recipeBake) apt(ctx context.Context, s *stage, out *built) error {
	where := fmt.Sprintf("%s:%d", b.file.path, s.at["apt"])
	if out.base.Name == "host" || out.base.Name == "" {
		return fail("sbxrun base add NAME SOURCE adds a base; base = \"NAME\" takes it", "%s: apt: the host's own /usr is the base, and nothing is put into that", where)
	}
	wanted := append([]string{}, s.apt...)
	sort.Strings(wanted)
	b.anew = b.r.Refresh
	defer func() { b.anew = false }()
	return b.step(ctx, out, func() (*rootfs.Manifest, error) {
		man, err := b.aptLayer(ctx, wanted, out, where)
		if err != nil && ctx.Err() == nil {
			return nil, errorAt(where, err)
		}
		return man, err
	}, append([]string{"apt"}, wanted...)...)
}

func (b *recipeBake) aptLayer(ctx context.Context, wanted []string, out *built, where string) (_ *rootfs.Manifest, err error) {
	base, err := b.upon(out)
	if err != nil {
		return nil, err
	}
	top, done, err := b.store.TempDir("apt")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	dir := filepath.Join(top, "work")
	for _, d := range []string{"", "state/lists/partial", "cache/archives/partial", "none", "sources", "tree"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("apt: %w", err)
		}
	}
	status, err := readInBase(base, "/"+dpkgStatus)
	if err != nil {
		return nil, fail("apt needs a base of Debian's kind, with its package database", "apt: base %q has no /%s", out.base.Name, dpkgStatus)
	}
	if err := os.WriteFile(filepath.Join(dir, "status"), status, 0o644); err != nil {
		return nil, fmt.Errorf("apt: %w", err)
	}
	hosts, err := aptSources(base, dir)
	if err != nil {
		return nil, err
	}
	if base, err = b.aptRoot(base); err != nil {
		return nil, err
	}
	j := Job{
		Name: "apt", Base: base, Dir: scratchDir, AllowHosts: hosts, Binds: []JobBind{{Source: dir, Target: scratchDir}},
		Env: []string{"HOME=/tmp", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "APT_CONFIG=" + scratchDir + "/apt.conf", "SOURCE_DATE_EPOCH=1577836800"},
	}
	b.progress.Phase("apt", strings.Join(wanted, " "))
	if err := b.aptRun(ctx, j, "apt-get", "-qq", "update"); err != nil {
		return nil, err
	}
	b.progress.Phase("download", strings.Join(wanted, " "))
	if err := b.aptRun(ctx, j, append([]string{"apt-get", "-qq", "-y", "--no-install-recommends", "--download-only", "--", "install"}, wanted...)...); err != nil {
		return nil, err
	}
	debs, err := b.debs(filepath.Join(dir, "cache/archives"))
	if err != nil {
		return nil, err
	}
	b.progress.Phase("unpack", fmt.Sprintf("%d packages", len(debs)))
	j.AllowHosts = nil
	if err := b.aptRun(ctx, j, "/bin/sh", "-ec", unpackDebs); err != nil {
		return nil, err
	}
	return b.debTree(ctx, dir, base, out, status, debs)
}

// unpackDebs unpacks what was downloaded, and writes each one's control fields.
const unpackDebs = `for d in cache/archives/*.deb; do
	[ -e "$d" ] || break
	dpkg-deb -x "$d" tree
	dpkg-deb -f "$d" >"$d.control"
done
chmod -R u+rwX,go+rX,u-s,g-s,-t tree
`

// aptRun runs one command and makes its failure one line.
func (b *recipeBake) aptRun(ctx context.Context, j Job, argv ...string) error {
	var out tail
	j.Argv, j.Stdout, j.Stderr = argv, &out, &out
	res, err := b.runner.Run(ctx, j)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("apt: %w", ctx.Err())
	case err != nil:
		return fmt.Errorf("apt: %w", err)
	case res.Reason != "" && res.Reason != "exit":
		return fail("", "apt: %s", res.Message)
	case res.ExitCode == 0:
		return nil
	}
	msg, hint := "", ""
	for _, line := range strings.Split(string(out.b), "\n") {
		if m, ok := strings.CutPrefix(line, "E: "); ok && msg == "" {
			msg = m
		}
		if m := strings.TrimSpace(line); msg == "" && strings.Contains(m, " : Depends: ") {
			msg = m
		}
	}
	if msg == "" {
		msg = lastLine(string(out.b))
	}
	switch {
	case strings.Contains(msg, "Unable to locate package"), strings.Contains(msg, "has no installation candidate"):
		hint = "is the name right, and in the base's distribution?"
	case strings.Contains(msg, "Unmet dependencies"):
		hint = "is the base's package database whole? /" + dpkgStatus + " must list what its packages need"
	case strings.Contains(msg, "Failed to fetch"), strings.Contains(msg, "Could not resolve"):
		hint = "check the network and the base's /etc/apt/sources.list.d"
	}
	if len(res.Denied) > 0 {
		hint = "its sources do not name " + strings.Join(res.Denied, ", ")
	}
	return fail(hint, "apt: %s", msg)
}

// aptRoot is where apt runs: in the base if it has one, else over the host's.
func (b *recipeBake) aptRoot(base rootfs.Base) (rootfs.Base, error) {
	has := func(base rootfs.Base) bool {
		for _, p := range []string{"/usr/bin/apt-get", "/usr/bin/dpkg-deb", "/bin/sh"} {
			if _, _, ok := resolveInBase(base, p); !ok {
				return false
			}
		}
		return true
	}
	if has(base) {
		return base, nil
	}
	host, err := b.store.Base("host")
	if err == nil && !has(host) {
		err = fail("apt-get install apt dpkg, or a base with them", "apt: neither base %q nor the host has apt-get and dpkg-deb", base.Name)
	}
	return host, err
}

// aptSources writes apt's configuration and gives the hosts that it names: the
// base's own sources, else those of a host of the same distribution.
func aptSources(base rootfs.Base, dir string) (hosts []string, err error) {
	read := func(p string) ([]byte, error) { return readInBase(base, p) }
	list := func(p string) []string { return namesInBase(base, p) }
	find := func() (files map[string][]byte) {
		files = map[string][]byte{}
		names := []string{"/etc/apt/sources.list"}
		for _, n := range list("/etc/apt/sources.list.d") {
			names = append(names, "/etc/apt/sources.list.d/"+n)
		}
		for _, n := range names {
			if b, err := read(n); err == nil && (strings.HasSuffix(n, ".list") || strings.HasSuffix(n, ".sources")) && len(urlsIn(string(b))) > 0 {
				files[path.Base(n)] = b
			}
		}
		return files
	}
	files := find()
	if len(files) == 0 {
		ours, err := read("/etc/os-release")
		theirs, herr := os.ReadFile("/etc/os-release")
		if err != nil || herr != nil || release(ours) == "" || release(ours) != release(theirs) {
			return nil, fail("put /etc/apt/sources.list into the base", "apt: base %q names no sources, and the host is another distribution", base.Name)
		}
		for _, n := range []string{"sources.list", "sources.list.d/debian.sources", "sources.list.d/ubuntu.sources"} {
			if b, err := os.ReadFile("/etc/apt/" + n); err == nil && len(urlsIn(string(b))) > 0 {
				files[path.Base(n)] = b
			}
		}
		read, list = func(p string) ([]byte, error) { return os.ReadFile(p) }, func(p string) (out []string) {
			ents, _ := os.ReadDir(p)
			for _, e := range ents {
				out = append(out, e.Name())
			}
			return out
		}
	}
	if len(files) == 0 {
		return nil, fail("put /etc/apt/sources.list into the base", "apt: neither base %q nor the host names sources", base.Name)
	}
	var named []string
	for n, b := range files {
		for _, line := range strings.Split(string(b), "\n") {
			if !strings.HasPrefix(strings.TrimSpace(line), "#") {
				named = append(named, urlsIn(line)...)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "sources", n), b, 0o644); err != nil {
			return nil, fmt.Errorf("apt: %w", err)
		}
	}
	conf := aptConf
	for _, n := range list("/etc/apt/apt.conf.d") { // how the network is reached, nothing else
		b, _ := read("/etc/apt/apt.conf.d/" + n)
		for _, line := range strings.Split(string(b), "\n") {
			if strings.HasPrefix(line, "Acquire::") && strings.HasSuffix(strings.TrimSpace(line), ";") {
				conf += line + "\n"
				named = append(named, urlsIn(line)...)
			}
		}
	}
	for _, u := range named {
		if h := hostPort(u); h != "" {
			hosts = append(hosts, h)
		}
	}
	sort.Strings(hosts)
	return hosts, os.WriteFile(filepath.Join(dir, "apt.conf"), []byte(conf), 0o644)
}

// aptConf gives apt a state of its own.
const aptConf = `Dir::State "` + scratchDir + `/state";
Dir::State::status "` + scratchDir + `/status";
Dir::Cache "` + scratchDir + `/cache";
Dir::Etc::main "` + scratchDir + `/none/none";
Dir::Etc::parts "` + scratchDir + `/none";
Dir::Etc::preferences "` + scratchDir + `/none/none";
Dir::Etc::preferencesparts "` + scratchDir + `/none";
Dir::Etc::sourcelist "` + scratchDir + `/none/none";
Dir::Etc::sourceparts "` + scratchDir + `/sources";
APT::Sandbox::User "";
APT::Install-Recommends "false";
Debug::NoLocking "true";
Acquire::Languages "none";
`

// release names a distribution's version.
func release(osRelease []byte) string {
	id, version := "", ""
	for _, line := range strings.Split(string(osRelease), "\n") {
		if v, ok := strings.CutPrefix(line, "ID="); ok {
			id = strings.Trim(v, `"`)
		}
		if v, ok := strings.CutPrefix(line, "VERSION_ID="); ok {
			version = strings.Trim(v, `"`)
		}
	}
	if id == "" || version == "" {
		return ""
	}
	return id + " " + version
}

// deb is a package that was downloaded.
type deb struct {
	SystemPackage
	path string
}

// debs looks at what was downloaded by a job that is dead.
func (b *recipeBake) debs(dir string) (out []deb, err error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("apt: %w", err)
	}
	total := int64(0)
	for _, e := range ents {
		if !strings.HasSuffix(e.Name(), ".deb") {
			continue
		}
		st, err := e.Info()
		if err != nil || !st.Mode().IsRegular() {
			return nil, fmt.Errorf("apt: %q is no regular file", e.Name())
		}
		if total += st.Size(); total > maxDebBytes || len(out) >= maxDebs {
			return nil, fail("", "apt: more than %d bytes or %d packages", int64(maxDebBytes), maxDebs)
		}
		d := deb{path: filepath.Join(dir, e.Name())}
		if d.SHA256, err = rootfs.FileDigest(d.path); err != nil {
			return nil, fmt.Errorf("apt: %w", err)
		}
		out = append(out, d)
	}
	return out, nil
}

// debTree makes the layer of what was unpacked.
func (b *recipeBake) debTree(ctx context.Context, dir string, base rootfs.Base, out *built, status []byte, debs []deb) (*rootfs.Manifest, error) {
	var list []SystemPackage
	for _, d := range debs {
		control, err := readOutput(d.path + ".control")
		if err == nil && (len(control) > maxControlBytes || len(status) > maxInputBytes) {
			err = fmt.Errorf("%q: more is said of packages than is taken", filepath.Base(d.path))
		}
		if err != nil {
			return nil, fmt.Errorf("apt: %w", err)
		}
		d.Name, d.Version, d.Architecture = field(control, "Package"), field(control, "Version"), field(control, "Architecture")
		if !plainPackage(d.Name) || d.Version == "" || d.Architecture == "" {
			return nil, fail("", "apt: %q has no name, version and architecture", filepath.Base(d.path))
		}
		status = withPackage(status, d.Name, d.Architecture, control)
		list = append(list, d.SystemPackage)
	}
	if len(list) == 0 {
		return &rootfs.Manifest{}, nil // the base has them all
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	top, err := os.OpenFile(filepath.Join(dir, "tree"), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("apt: %w", err)
	}
	defer top.Close()
	man, err := b.store.AddTree(ctx, top, nil)
	if err != nil {
		return nil, fmt.Errorf("apt: %w", err)
	}
	on, err := b.upon(out)
	if err != nil {
		return nil, err
	}
	throughLinks(man, func(dir string) string {
		if real, _, ok := resolveInBase(on, "/"+dir); ok {
			return strings.TrimPrefix(real, "/")
		}
		return dir
	})
	text, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return nil, err
	}
	for p, data := range map[string][]byte{dpkgStatus: status, systemDir + "/" + digestOf(string(text))[:16] + ".json": append(text, '\n')} {
		digest, n, err := b.store.PutObject(bytes.NewReader(data), false)
		if err != nil {
			return nil, err
		}
		man.Entries = append(man.Entries, rootfs.Entry{Path: p, Type: 'f', Mode: 0o444, Size: n, Digest: digest})
	}
	return withParents(man), nil
}

// throughLinks moves entries to where the folders that they lie in lead in the
// base: a folder /lib of a package must not hide a base's link from /lib to /usr/lib.
func throughLinks(man *rootfs.Manifest, real func(dir string) string) {
	man.Encode() // sorts: parents first
	moved := map[string]string{".": ""}
	kept := man.Entries[:0]
	have := map[string]bool{}
	for _, e := range man.Entries {
		p := path.Join(moved[path.Dir(e.Path)], path.Base(e.Path))
		if e.Type == 'd' {
			p = real(p)
			moved[e.Path] = p
		}
		if e.Path = p; p == "" || have[p] {
			continue
		}
		have[p] = true
		kept = append(kept, e)
	}
	man.Entries = kept
}

// field gives a control file's field.
func field(control []byte, name string) string {
	for _, line := range strings.Split(string(control), "\n") {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// withPackage puts a package into dpkg's list, in place of another version.
func withPackage(status []byte, name, arch string, control []byte) []byte {
	var out []string
	for _, s := range strings.Split(strings.TrimSpace(string(status)), "\n\n") {
		if a := field([]byte(s), "Architecture"); s != "" && (field([]byte(s), "Package") != name || a != arch && a != "all" && arch != "all") {
			out = append(out, s)
		}
	}
	first, rest, _ := strings.Cut(strings.TrimSpace(string(control)), "\n")
	out = append(out, first+"\nStatus: install ok unpacked\n"+rest)
	return []byte(strings.Join(out, "\n\n") + "\n")
}

// systemPackages reads what the layers of system packages say.
func (b *recipeBake) systemPackages(layers []string) (out []SystemPackage, err error) {
	view, err := b.view(nil, layers)
	if err != nil {
		return nil, err
	}
	for _, e := range view.Below(systemDir).Entries {
		if e.Type != 'f' || e.Size > maxInputBytes {
			continue
		}
		f, err := b.store.OpenObject(e.Digest, false)
		if err != nil {
			return nil, fmt.Errorf("read system packages: %w", err)
		}
		var some []SystemPackage
		err = json.NewDecoder(io.LimitReader(f, maxInputBytes)).Decode(&some)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read system packages: %w", err)
		}
		if out = append(out, some...); len(out) > maxDebs {
			return nil, fmt.Errorf("read system packages: more than %d", maxDebs)
		}
	}
	return out, nil
}

// readInBase reads a file of a base, its links followed inside.
func readInBase(base rootfs.Base, p string) ([]byte, error) {
	_, host, ok := resolveInBase(base, p)
	if !ok {
		return nil, os.ErrNotExist
	}
	f, err := os.OpenFile(host, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > 64<<20 {
		return nil, fmt.Errorf("read %q: not a file of a sane size", p)
	}
	return io.ReadAll(io.LimitReader(f, 64<<20))
}

// isDir says whether a path is a folder itself, no link to one.
func isDir(p string) bool {
	st, err := os.Lstat(p)
	return err == nil && st.IsDir()
}

// namesInBase lists a folder of a base.
func namesInBase(base rootfs.Base, p string) (out []string) {
	seen := map[string]bool{}
	for _, l := range base.Lowers {
		h, there, _ := inLower(l, p)
		if !there || !isDir(h) {
			continue
		}
		ents, _ := os.ReadDir(h)
		for _, e := range ents {
			if !seen[e.Name()] && e.Type().IsRegular() {
				seen[e.Name()] = true
				out = append(out, e.Name())
			}
		}
	}
	sort.Strings(out)
	return out
}
