package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The host base shows the host's own /usr and the few files of /etc that
// programs need, and nothing else: no /home, /root, /var, /srv, /boot, and no
// other part of /etc. Its lower is a skeleton that we generate.

// hostLinks are the places that merged-usr hosts have as links into /usr.
var hostLinks = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// hostCopies are files of /etc that are copied into the skeleton: they say
// nothing about this host's users or services.
var hostCopies = []string{"ld.so.cache", "ld.so.conf", "localtime", "mime.types", "services", "protocols", "os-release", "debian_version", "timezone", "ssl/openssl.cnf"}

// hostBinds are directories shown read-only.
var hostBinds = []string{"/usr", "/etc/ssl/certs", "/etc/alternatives", "/etc/ld.so.conf.d", "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted", "/etc/ca-certificates"}

// generated is what we write ourselves.
var generated = map[string]string{
	"etc/passwd":        "root:x:0:0:root:/root:/usr/sbin/nologin\nsandbox:x:1000:1000:sandbox:/home/sandbox:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"etc/group":         "root:x:0:\ntty:x:5:\nsandbox:x:1000:\nnogroup:x:65534:\n",
	"etc/hosts":         "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
	"etc/resolv.conf":   "",
	"etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
	"etc/host.conf":     "multi on\n",
}

var skeletonDirs = []string{"etc", "etc/ssl", "etc/ssl/certs", "dev", "proc", "home", "mnt", "opt", "opt/env", "root", "run", "srv", "tmp", "usr", "var", "var/tmp", "var/cache", "var/lib", "var/log", "work"}

const hostBaseVersion = 2

// hostRecord is the cached answer of HostBase.
type hostRecord struct {
	Key  string `json:"key"` // of the inputs, by their stat
	Base Base   `json:"base"`
}

// hostKey changes when an input of the skeleton, or the host's set of
// packages, does. It costs a few stats.
func hostKey() string {
	b := make([]byte, 0, 4096)
	number := func(n uint64) { b = strconv.AppendUint(append(b, ' '), n, 10) }
	number(hostBaseVersion)
	var st unix.Stat_t
	for _, p := range hostBinds { // whether they are there; what is in them is shown live
		b = strconv.AppendBool(append(append(b, p...), ' '), unix.Stat(p, &st) == nil)
	}
	add := func(dir, name string) {
		p := dir + name
		if err := unix.Lstat(p, &st); err == nil {
			b = append(append(b, '\n'), p...)
			for _, n := range [...]uint64{st.Dev, st.Ino, uint64(st.Size), uint64(st.Mtim.Sec), uint64(st.Mtim.Nsec)} {
				number(n)
			}
		}
	}
	for _, p := range [...]string{"/usr", "/usr/bin", "/usr/lib", "/var/lib/dpkg/status", "/var/lib/rpm", "/etc/alternatives"} {
		add("", p)
	}
	for _, c := range hostCopies {
		add("/etc/", c)
	}
	for _, l := range hostLinks {
		add("/", l)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// HostBase gives the base made of the host itself. It is generated when an
// input changed; otherwise this reads one small file.
func (s *Store) HostBase(ctx context.Context) (Base, error) {
	cache := s.Path("bases", "host.json")
	key := hostKey()
	if b, ok := readHostRecord(cache, key); ok {
		return b, nil
	}
	if err := s.Writable(); errors.Is(err, unix.EROFS) && s.Spare != "" {
		spare, err := OpenStore(s.Spare)
		if err != nil {
			return Base{}, err
		}
		return spare.HostBase(ctx)
	}
	release, err := s.Lock(ctx, "base-host", true)
	if err != nil {
		return Base{}, err
	}
	defer release()
	if b, ok := readHostRecord(cache, key); ok {
		return b, nil
	}
	publishing, err := s.Publishing(ctx)
	if err != nil {
		return Base{}, err
	}
	defer publishing()
	b, err := s.makeHostBase(ctx)
	if err != nil {
		return Base{}, s.Explain(err)
	}
	rec, err := json.Marshal(hostRecord{key, b})
	if err != nil {
		return Base{}, err
	}
	return b, s.WriteFile(cache, rec)
}

func readHostRecord(path, key string) (Base, bool) {
	b, err := ReadSmall(path)
	if err != nil {
		return Base{}, false
	}
	var r hostRecord
	if json.Unmarshal(b, &r) != nil || r.Key != key || len(r.Base.Lowers) == 0 {
		return Base{}, false
	}
	var st unix.Stat_t
	return r.Base, unix.Stat(r.Base.Lowers[0], &st) == nil
}

// ReadSmall reads a regular file, a small one with three system calls, where
// os.ReadFile needs about twelve: it tries to poll the file.
func ReadSmall(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 8192)
	n, err := unix.Read(fd, b)
	if n == len(b) {
		return os.ReadFile(path)
	}
	return b[:max(n, 0)], err
}

func (s *Store) makeHostBase(ctx context.Context) (base Base, err error) {
	release, err := s.Lock(ctx, "objects", false) // no pruning until ours are in a layer
	if err != nil {
		return Base{}, err
	}
	defer release()
	dir, done, err := s.TempDir("host")
	if err != nil {
		return Base{}, err
	}
	defer func() { err = errors.Join(err, done()) }()
	root := filepath.Join(dir, "root")
	mk := func(p string) error { return os.MkdirAll(filepath.Join(root, p), 0o755) }
	var errs []error
	for _, d := range skeletonDirs {
		errs = append(errs, mk(d))
	}
	base = Base{Name: "host"}
	bind := func(p string) {
		base.Binds = append(base.Binds, Bind{Source: p, Target: p})
	}
	for _, l := range hostLinks {
		st, err := os.Lstat("/" + l)
		switch {
		case err != nil:
		case st.Mode()&os.ModeSymlink != 0:
			to, err := os.Readlink("/" + l)
			errs = append(errs, err, os.Symlink(to, filepath.Join(root, l)))
		case st.IsDir(): // a host whose /usr is not merged
			errs = append(errs, mk(l))
			bind("/" + l)
		}
	}
	for _, p := range hostBinds {
		if st, err := os.Stat(p); err == nil && st.IsDir() {
			errs = append(errs, mk(p))
			bind(p)
		}
	}
	for _, c := range hostCopies {
		src := "/etc/" + c
		st, err := os.Stat(src)
		if err != nil || !st.Mode().IsRegular() || st.Size() > 16<<20 {
			continue
		}
		if to, err := os.Readlink(src); err == nil && strings.Contains(to, "usr/") {
			errs = append(errs, os.Symlink(to, filepath.Join(root, "etc", c)))
			continue
		}
		b, err := os.ReadFile(src)
		errs = append(errs, err, os.WriteFile(filepath.Join(root, "etc", c), b, 0o644))
	}
	for p, text := range generated {
		errs = append(errs, os.WriteFile(filepath.Join(root, p), []byte(text), 0o644))
	}
	if err := errors.Join(errs...); err != nil {
		return Base{}, fmt.Errorf("make host base: %w", err)
	}
	d, err := os.Open(root)
	if err != nil {
		return Base{}, fmt.Errorf("make host base: %w", err)
	}
	defer d.Close()
	m, err := s.AddTree(ctx, d, nil)
	if err != nil {
		return Base{}, fmt.Errorf("make host base: %w", err)
	}
	path, err := s.PublishLayer(ctx, m)
	if err != nil {
		return Base{}, err
	}
	base.Lowers = []string{path}
	// What the base is, not what the skeleton happens to hold: a new ld.so.cache
	// after an unrelated upgrade must not make every environment another one.
	// What an environment depends on, its interpreter, is in its own key.
	desc, err := json.Marshal(struct {
		Version int
		Binds   []Bind
		Host    string
	}{hostBaseVersion, base.Binds, hostIdentity()})
	if err != nil {
		return Base{}, err
	}
	sum := sha256.Sum256(desc)
	base.Digest = "sha256:" + hex.EncodeToString(sum[:])
	return base, nil
}

// hostIdentity names the distribution. Interpreters are part of an
// environment's key on their own.
func hostIdentity() string {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return ""
	}
	var out []string
	for _, line := range strings.Split(string(b), "\n") {
		if strings.HasPrefix(line, "ID=") || strings.HasPrefix(line, "VERSION_ID=") {
			out = append(out, line)
		}
	}
	return strings.Join(out, " ")
}
