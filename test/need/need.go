// Package need says what a test requires of the machine. It owns the decision
// between skip and failure, and knows nothing of sbxrun beyond where its
// binaries are built.
//
// An unmet need skips the test and says why. With CI=true in the environment it
// fails instead for everything that a CI machine promises ([Root], [UserNS],
// [Overlay], [Cgroup], [Network], [Binary], [Python]): a test that silently stopped running is worse than a
// red one. Kinds of machine that no single CI machine can be at once
// ([CgroupV1], [CgroupV2], [Systemd]) always skip. With -short every privileged
// need skips.
package need

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// promised skips the test, or fails it where CI promised the need.
func promised(t testing.TB, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if os.Getenv("CI") == "true" && !testing.Short() {
		t.Fatalf("needs %s, which CI promises: %v", what, err)
	}
	t.Skipf("needs %s: %v", what, err)
}

func privileged(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs privilege; -short leaves it out")
	}
}

type reason string

func (r reason) Error() string { return string(r) }

// Root needs effective uid 0 with CAP_SYS_ADMIN.
func Root(t testing.TB) {
	t.Helper()
	privileged(t)
	promised(t, "root", rootErr())
}

var rootErr = sync.OnceValue(func() error {
	if os.Geteuid() != 0 {
		return reason("run as another user")
	}
	// A child that unshares its mount namespace: what every sandbox does first.
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	return cmd.Run()
})

// UserNS needs user namespaces that root can map a range of ids into.
func UserNS(t testing.TB) {
	t.Helper()
	privileged(t)
	promised(t, "user namespaces", usernsErr())
}

var usernsErr = sync.OnceValue(func() error {
	cmd := exec.Command("/bin/true")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1 << 30, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	return cmd.Run()
})

// Overlay needs overlayfs on a tmpfs, mounted by root.
func Overlay(t testing.TB) {
	t.Helper()
	privileged(t)
	promised(t, "overlayfs", overlayErr())
}

var overlayErr = sync.OnceValue(func() error {
	// In a child with a mount namespace of its own, so that nothing can be left.
	script := `mount -t tmpfs none /mnt && cd /mnt && mkdir l u w m && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return reason(err.Error() + ": " + string(bytes.TrimSpace(out)))
	}
	return nil
})

// Cgroup needs cgroups that this process may write, of either version.
func Cgroup(t testing.TB) {
	t.Helper()
	privileged(t)
	promised(t, "writable cgroups", cgroupErr())
}

func cgroupErr() error {
	for _, d := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(d, "cgroup.procs")); err == nil {
			return unix.Access(d, unix.W_OK)
		}
	}
	return reason("no cgroup file system below /sys/fs/cgroup")
}

// CgroupV2 needs the unified hierarchy at /sys/fs/cgroup.
func CgroupV2(t testing.TB) {
	t.Helper()
	Cgroup(t)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		t.Skipf("needs cgroup v2: %v", err)
	}
}

// CgroupV1 needs a version 1 hierarchy for memory.
func CgroupV1(t testing.TB) {
	t.Helper()
	Cgroup(t)
	if _, err := os.Stat("/sys/fs/cgroup/memory/memory.limit_in_bytes"); err != nil {
		t.Skipf("needs cgroup v1: %v", err)
	}
}

// Systemd needs systemd as pid 1.
func Systemd(t testing.TB) {
	t.Helper()
	privileged(t)
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		t.Skipf("needs systemd as pid 1: %v", err)
	}
}

// Network needs the package index, reached the way pip on this machine is
// configured to reach it. SBXRUN_TEST_OFFLINE takes the promise back, for a
// machine that keeps all the others (see test/vm).
func Network(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs the package index; -short leaves it out")
	}
	if os.Getenv("SBXRUN_TEST_OFFLINE") != "" {
		t.Skip("needs the package index: this machine has no network (SBXRUN_TEST_OFFLINE)")
	}
	promised(t, "the package index", networkErr())
}

var networkErr = sync.OnceValue(func() error {
	dir, err := os.MkdirTemp("", "need-network-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	// A wheel of 6 kB with no dependencies.
	cmd := exec.CommandContext(ctx, "python3", "-m", "pip", "download", "-q", "--disable-pip-version-check",
		"--no-cache-dir", "--no-deps", "--only-binary", ":all:", "-d", dir, "iniconfig")
	if out, err := cmd.CombinedOutput(); err != nil {
		return reason("pip download: " + err.Error() + ": " + lastLine(out))
	}
	return nil
})

// Python needs the system's interpreter, the one that the host base shows.
func Python(t testing.TB) {
	t.Helper()
	_, err := os.Stat("/usr/bin/python3")
	promised(t, "/usr/bin/python3", err)
}

// Compiler needs a C compiler that can link statically.
func Compiler(t testing.TB) {
	t.Helper()
	_, err := exec.LookPath("gcc")
	promised(t, "gcc", err)
}

// CrossCompiler needs a C compiler by its full name, as Debian calls it.
func CrossCompiler(t testing.TB, name string) {
	t.Helper()
	_, err := exec.LookPath(name)
	promised(t, name, err)
}

// Binary needs bin/sbxrun and what it starts (-net, -env, -oci) and returns the path of the first.
// SBXRUN_BIN names another one.
func Binary(t testing.TB) string {
	t.Helper()
	if p := os.Getenv("SBXRUN_BIN"); p != "" {
		return p
	}
	p := filepath.Join(Repo(), "bin", "sbxrun")
	for _, f := range []string{p, p + "-net", p + "-env", p + "-oci"} {
		if _, err := os.Stat(f); err != nil {
			promised(t, "bin/sbxrun, -net, -env and -oci (make build)", err)
		}
	}
	return p
}

// Repo is the project's root folder.
func Repo() string {
	_, file, _, ok := runtime.Caller(0)
	if dir := filepath.Dir(filepath.Dir(filepath.Dir(file))); ok && filepath.IsAbs(dir) {
		return dir
	}
	// Built with -trimpath: tests run in their package's folder.
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, statErr := os.Stat(filepath.Join(dir, "go.mod")); statErr == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// Program needs a program of a Debian package that scripts/setup.sh installs for
// tests.
func Program(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s (scripts/setup.sh test installs it): %v", name, err)
	}
	return p
}
