package envs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// python is a base's interpreter.
type python struct {
	path string // in the sandbox: /usr/bin/python3.11, links followed
	stat string // changes when the binary does
	host string // on the host
}

// key names the interpreter and what it runs on.
func (p python) key(base rootfs.Base) string { return p.path + " " + p.stat + " " + baseKey(base) }

// baseKey names all that a base shows. What steps of a recipe put upon it is
// anybody's code: nothing that it had a hand in may be found without it.
func baseKey(base rootfs.Base) string {
	return strings.Join(append([]string{base.Digest}, base.Upon...), " ")
}

// findPython looks an interpreter up in the base without running it.
func findPython(base rootfs.Base, want string) (python, error) {
	var try []string
	switch {
	case strings.HasPrefix(want, "/"):
		try = []string{want}
	case want != "" && strings.Trim(want, "0123456789.") == "":
		try = []string{"/usr/local/bin/python" + want, "/usr/bin/python" + want, "/opt/python/bin/python" + want}
	case want == "":
		try = []string{"/usr/local/bin/python3", "/usr/bin/python3", "/opt/python/bin/python3"}
		if base.Name == "host" { // what lies in /usr/local there may link out of what is visible
			try = []string{"/usr/bin/python3", "/usr/local/bin/python3"}
		}
	default:
		return python{}, fail("--python takes a version (3.12) or a path in the base", "find interpreter %q: neither", want)
	}
	for _, t := range try {
		p, host, ok := resolveInBase(base, t)
		if !ok {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(host, &st) != nil || st.Mode&0o111 == 0 {
			continue
		}
		return python{path: p, stat: fmt.Sprintf("%d %d.%09d", st.Size, st.Mtim.Sec, st.Mtim.Nsec), host: host}, nil
	}
	hint := "apt-get install python3 on the host, or choose a --base that has it"
	if want != "" {
		hint = "choose a --base that has it, or another --python"
	}
	return python{}, fail(hint, "find interpreter in base %q: no %s", base.Name, strings.Join(try, ", no "))
}

// resolveInBase follows a path's links inside the base and gives its final
// name there and the host path of the file.
func resolveInBase(base rootfs.Base, p string) (inside, host string, ok bool) {
	rest := strings.Split(strings.TrimPrefix(path.Clean(p), "/"), "/")
	cur := "/"
	for hops := 0; len(rest) > 0; {
		next := path.Join(cur, rest[0])
		rest = rest[1:]
		h, found := hostPath(base, next)
		if !found {
			return "", "", false
		}
		st, err := os.Lstat(h)
		if err != nil {
			return "", "", false
		}
		if st.Mode()&os.ModeSymlink == 0 {
			cur = next
			continue
		}
		to, err := os.Readlink(h)
		if hops++; err != nil || hops > 40 {
			return "", "", false
		}
		rest = append(strings.Split(strings.Trim(path.Clean(to), "/"), "/"), rest...)
		if path.IsAbs(to) {
			cur = "/"
		}
	}
	h, found := hostPath(base, cur)
	return cur, h, found
}

// hostPath finds the host's path of a name in the base whose parents hold no link.
func hostPath(base rootfs.Base, p string) (string, bool) {
	for _, b := range base.Binds {
		if rel, ok := strings.CutPrefix(p, b.Target+"/"); ok {
			return filepath.Join(b.Source, rel), true
		}
		if p == b.Target {
			return b.Source, true
		}
	}
	for _, l := range base.Lowers {
		h, there, hidden := inLower(l, p)
		if there || hidden {
			return h, there
		}
	}
	return "", false
}

// inLower looks a path up in one layer. No link is followed, not even one in
// place of a folder that a layer further up has: it would lead out to the host.
// hidden says that what further layers have there is not seen.
func inLower(lower, p string) (host string, there, hidden bool) {
	dir, err := unix.Open(lower, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false, false
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, strings.TrimPrefix(p, "/"), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return "", false, errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", false, true
	}
	whiteout := st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
	return filepath.Join(lower, p), !whiteout, whiteout
}
