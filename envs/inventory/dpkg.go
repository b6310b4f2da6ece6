package inventory

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/rootfs"
)

const maxStatusBytes = 64 << 20

// AddBase adds the Debian packages of the base: what its dpkg status says is
// installed. A base without dpkg adds none.
func (v *Inventory) AddBase(b rootfs.Base) error {
	roots := b.Lowers
	if b.Name == "host" {
		roots = []string{"/"} // its /usr is what the sandbox sees
	}
	osRelease, status := "", ""
	var parts []string
	for _, root := range roots {
		if osRelease == "" {
			for _, p := range []string{"etc/os-release", "usr/lib/os-release"} {
				if s, err := readBeneath(root, p, 1<<16); err == nil {
					osRelease = s
					break
				}
			}
		}
		if status == "" {
			s, err := readBeneath(root, "var/lib/dpkg/status", maxStatusBytes)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("read base %q: %w", b.Name, err)
			}
			status = s
		}
		// Images without dpkg itself have a file for each package.
		names, err := listBeneath(root, "var/lib/dpkg/status.d")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("read base %q: %w", b.Name, err)
		}
		for _, n := range names {
			if strings.HasSuffix(n, ".md5sums") {
				continue
			}
			s, err := readBeneath(root, "var/lib/dpkg/status.d/"+n, 1<<20)
			if err != nil {
				return fmt.Errorf("read base %q: %w", b.Name, err)
			}
			parts = append(parts, s)
		}
	}
	id, version := release(osRelease)
	debs := parseStatus(strings.Join(append(parts, status), "\n\n"), id, version)
	sortPackages(debs)
	v.Packages = append(v.Packages, debs...) // after the others, which know each other by index
	if len(v.Packages) > maxPackages {
		return errors.New("read base: too many packages")
	}
	return nil
}

// readBeneath reads a file below a directory that nobody trusts: through no
// link, and not out of it.
func readBeneath(root, name string, max int64) (string, error) {
	f, err := openBeneath(root, name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%q is no file", name)
	}
	if err != nil {
		return "", err
	}
	b, err := bounded.Read(f, max)
	if err != nil {
		err = fmt.Errorf("%q: %w", name, err)
	}
	return string(b), err
}

func openBeneath(root, name string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ELOOP) { // os-release is a link as a rule: its target is tried next
		err = unix.ENOENT
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Base(name)), nil
}

func listBeneath(root, name string) ([]string, error) {
	f, err := openBeneath(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxPackages)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	slices.Sort(names)
	return names, err
}

// release reads ID and VERSION_ID.
func release(text string) (id, version string) {
	for line := range strings.SplitSeq(text, "\n") {
		k, val, _ := strings.Cut(line, "=")
		val = strings.ToLower(clean(strings.Trim(strings.TrimSpace(val), `"'`), 60))
		switch k {
		case "ID":
			id = val
		case "VERSION_ID":
			version = val
		}
	}
	return id, version
}

// parseStatus reads the paragraphs of installed packages.
func parseStatus(text, id, version string) []Package {
	var out []Package
	for para := range strings.SplitSeq(strings.ReplaceAll(text, "\r", ""), "\n\n") {
		hs := parseMetadata(strings.TrimLeft(para, "\n"))
		state := get(hs, "status")
		p := Package{
			System: Deb, Name: clean(get(hs, "package"), 200), Version: clean(get(hs, "version"), 200), Summary: clean(firstLine(get(hs, "description")), 500),
			Qualifiers: map[string]string{}, distro: id,
		}
		if p.Name == "" || p.Version == "" || state != "" && !strings.HasSuffix(state, " installed") {
			continue
		}
		p.source, p.sourceVersion = p.Name, p.Version
		if src := get(hs, "source"); src != "" {
			name, ver, has := strings.Cut(src, "(")
			p.source = clean(name, 200)
			if has {
				p.sourceVersion = clean(strings.TrimSuffix(strings.TrimSpace(ver), ")"), 200)
			}
		}
		if arch := clean(get(hs, "architecture"), 40); arch != "" {
			p.Qualifiers["arch"] = arch
		}
		if id != "" && version != "" {
			p.Qualifiers["distro"] = id + "-" + version
		}
		if out = append(out, p); len(out) > maxPackages {
			break
		}
	}
	return out
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}

func (p *Package) distroID() string {
	if p.distro == "" {
		return "debian"
	}
	return purlEscape(p.distro)
}
