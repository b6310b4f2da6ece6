package rootfs

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const testIDs = 0x70000000 + 4000*65536 // a range no other test uses

// hostState is what a namespace must not change: this process's mount table,
// loop devices with a file, open descriptors.
func hostState(t *testing.T) (mounts string, loops int, fds map[string]bool) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	mine := filepath.Dir(t.TempDir()) + "/" // other packages' tests have loop devices of their own
	all, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range all {
		if b, err := os.ReadFile(l); err == nil && strings.HasPrefix(string(b), mine) {
			loops++
		}
	}
	f, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	fds = map[string]bool{}
	for _, e := range f {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // else: of this reading itself
			fds[e.Name()+" "+to] = true
		}
	}
	return string(b), loops, fds
}

// inNamespace gives a fresh namespace and checks, when the test ends, that
// nothing of it is left.
func inNamespace(t *testing.T) *Namespace {
	t.Helper()
	if os.Geteuid() != 0 || testing.Short() {
		t.Skip("needs root; -short leaves it out")
	}
	// Every directory above must be open to all, as /run/sbxrun's are.
	stage, err := os.MkdirTemp("/run", "sbxrun-test-")
	require.NoError(t, err)
	mounts, loops, fds := hostState(t)
	n, err := NewNamespace(stage)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, n.Close())
		require.Eventually(t, func() bool { // the last unmount is the kernel's
			m, l, f := hostState(t)
			for fd := range f {
				if !fds[fd] {
					return false
				}
			}
			return m == mounts && l == loops
		}, 10*time.Second, 20*time.Millisecond, "mounts, loop devices or descriptors were left")
		require.NoError(t, os.Remove(stage))
	})
	return n
}

// lower makes a layer on disk (tmpfs cannot map owners before Linux 6.3).
func lower(t *testing.T, files map[string]string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "sbxrun-test-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	for name, text := range files {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	}
	return dir
}

func assembly(lowers ...string) Assembly {
	return Assembly{Lowers: lowers, IDs: IDMap{testIDs, 65536}, UID: 1000, GID: 1000, Upper: Upper{Kind: "tmpfs", SizeBytes: 1 << 20, Inodes: 64}}
}

// attached is a root with paths in a namespace.
type attached struct {
	*Root
	Path  string
	paths []string
}

func assembleIn(n *Namespace, a Assembly) (*attached, error) {
	a.Stage = n.stage
	r, err := Assemble(a)
	if err != nil {
		return nil, err
	}
	root, paths, err := n.Attach(r)
	return &attached{r, root, paths}, err
}

func TestLayersAreStackedAndOwnedByTheSandboxsRoot(t *testing.T) {
	n := inNamespace(t)
	a := assembly(lower(t, map[string]string{"top": "1", "both": "top"}), lower(t, map[string]string{"below": "2", "both": "below"}))
	a.Seeds = []Seed{{Path: "/home/x", Dir: true, Mode: 0o700, UID: 1000, GID: 1000}, {Path: "/link", Link: "top"}, {Path: "/etc/f", Mode: 0o640, Data: []byte("seed")}}
	r, err := assembleIn(n, a)
	require.NoError(t, err)
	require.True(t, r.IDMapped)
	require.NoError(t, n.Do(func() error {
		for name, want := range map[string]string{"top": "1", "below": "2", "both": "top", "link": "1", "etc/f": "seed"} {
			b, err := os.ReadFile(filepath.Join(r.Path, name))
			if err != nil || string(b) != want {
				t.Errorf("%s: %q, %v", name, b, err)
			}
		}
		for name, id := range map[string]uint32{".": 0, "below": 0, "home": 0, "home/x": 1000} {
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(r.Path, name), &st); err != nil || st.Uid != testIDs+id {
				t.Errorf("%s belongs to %d, %v", name, st.Uid, err)
			}
		}
		return nil
	}))
	require.NoError(t, r.Close())
}

func TestUppersAreBoundedAndFullIsSeen(t *testing.T) {
	for name, u := range map[string]Upper{
		"tmpfs": {Kind: "tmpfs", SizeBytes: 1 << 20, Inodes: 64},
		"disk":  {Kind: "disk", SizeBytes: 24 << 20, Inodes: 128},
	} {
		fill := func(t *testing.T, each int64) (*Namespace, *attached, int64, int, error) {
			n := inNamespace(t)
			a := assembly(lower(t, map[string]string{"a": "1"}))
			a.Upper = u
			a.Upper.ScratchDir = lower(t, nil)
			r, err := assembleIn(n, a)
			require.NoError(t, err)
			use, err := r.Usage()
			require.NoError(t, err)
			require.False(t, use.Full, "full from the start")
			var wrote int64
			var made int
			err = n.Do(func() error {
				for i := 0; i < 10000; i++ {
					f, err := os.Create(filepath.Join(r.Path, "f"+strings.Repeat("x", i%7)+time.Now().Format("150405.000000000")))
					if err != nil {
						return err
					}
					made++
					k, err := f.Write(make([]byte, each))
					wrote += int64(k)
					f.Close()
					if err != nil {
						return err
					}
				}
				return nil
			})
			return n, r, wrote, made, err
		}
		t.Run(name+" bytes", func(t *testing.T) {
			_, r, wrote, _, err := fill(t, 1<<20)
			require.ErrorIs(t, err, unix.ENOSPC)
			require.LessOrEqual(t, wrote, u.SizeBytes+u.SizeBytes/8)
			require.GreaterOrEqual(t, wrote, u.SizeBytes-u.SizeBytes/8)
			use, err := r.Usage()
			require.NoError(t, err)
			require.True(t, use.Full, "%+v", use)
			require.NoError(t, r.Close())
		})
		t.Run(name+" inodes", func(t *testing.T) {
			_, r, _, made, err := fill(t, 0)
			require.True(t, errors.Is(err, unix.ENOSPC), err)
			require.LessOrEqual(t, int64(made), u.Inodes)
			use, err := r.Usage()
			require.NoError(t, err)
			require.True(t, use.Full, "%+v", use)
			require.NoError(t, r.Close())
		})
	}
}

func TestVolumesMapTheirOwnerAndKeepTheirMode(t *testing.T) {
	n := inNamespace(t)
	dir := lower(t, map[string]string{"f": "host"})
	require.NoError(t, os.Chown(dir, 4321, 4322))
	a := assembly(lower(t, map[string]string{"a": "1"}))
	a.Volumes = []VolumeMount{
		{Source: dir, Target: "/rw", Mode: "rw"},
		{Source: dir, Target: "/ro", Mode: "ro"},
		{Source: dir, Target: "/cow", Mode: "O"},
		{Source: dir + "/f", Target: "/file", Mode: "ro"},
	}
	r, err := assembleIn(n, a)
	require.NoError(t, err)
	require.Len(t, r.Mounts, 4)
	require.True(t, r.Mounts[3].File)
	require.NoError(t, n.Do(func() error {
		var st unix.Stat_t
		if err := unix.Stat(r.paths[0], &st); err != nil || st.Uid != testIDs+1000 || st.Gid != testIDs+1000 {
			t.Errorf("the volume belongs to %d:%d, %v", st.Uid, st.Gid, err)
		}
		if err := os.WriteFile(r.paths[1]+"/new", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("write to a read-only volume: %v", err)
		}
		return os.RemoveAll(r.paths[2] + "/f") // copy-on-write: root may, and the host keeps it
	}))
	b, err := os.ReadFile(dir + "/f")
	require.NoError(t, err)
	require.Equal(t, "host", string(b))
	require.NoError(t, r.Close())
}

func TestWhatCannotBeMountedIsSaid(t *testing.T) {
	base := lower(t, map[string]string{"a": "1"})
	for name, c := range map[string]struct {
		change func(*Assembly)
		want   string
	}{
		"no layer":       {func(a *Assembly) { a.Lowers = nil }, "no layers"},
		"missing layer":  {func(a *Assembly) { a.Lowers = []string{"/nonexistent"} }, "no such file"},
		"missing volume": {func(a *Assembly) { a.Volumes = []VolumeMount{{Source: "/nonexistent", Target: "/x", Mode: "rw"}} }, "no such file"},
		"unknown mode":   {func(a *Assembly) { a.Volumes = []VolumeMount{{Source: base, Target: "/x"}} }, "unknown mode"},
		"cow of a file":  {func(a *Assembly) { a.Volumes = []VolumeMount{{Source: base + "/a", Target: "/x", Mode: "O"}} }, "needs a directory"},
		"unknown upper":  {func(a *Assembly) { a.Upper.Kind = "floppy" }, "unknown kind"},
		"no scratch":     {func(a *Assembly) { a.Upper = Upper{"disk", 16 << 20, 128, "/proc/none"} }, "scratch"},
	} {
		t.Run(name, func(t *testing.T) {
			n := inNamespace(t)
			a := assembly(base)
			c.change(&a)
			_, err := assembleIn(n, a)
			require.ErrorContains(t, err, c.want)
		})
	}
}

func TestNamespaceAfterItsEnd(t *testing.T) {
	n := inNamespace(t)
	require.ErrorContains(t, n.Do(func() error { runtime.Goexit(); return nil }), "ended its thread")
	require.NoError(t, n.Close())
	require.NoError(t, n.Close())
	require.ErrorIs(t, n.Do(func() error { return nil }), os.ErrClosed)
}

func TestSwappedMapsEveryIDOnce(t *testing.T) {
	for _, owner := range []uint32{0, 1, 999, 1000, 1001, 65535, 65536, 4000000} {
		disk, host := map[int]bool{}, map[int]bool{}
		for _, p := range swapped(owner, 1000, IDMap{testIDs, 65536}) {
			for i := range p.Size {
				require.False(t, disk[p.ContainerID+i] || host[p.HostID+i], "owner %d", owner)
				disk[p.ContainerID+i], host[p.HostID+i] = true, true
				if p.ContainerID+i == int(owner) {
					require.Equal(t, testIDs+1000, p.HostID+i)
				}
			}
		}
		require.Len(t, disk, 65536)
	}
}

// Kernels before 6.15 take only attached mounts as layers: the way of these
// must give the same root.
func TestOverlayOfStagedLayers(t *testing.T) {
	n := inNamespace(t)
	a := assembly(lower(t, map[string]string{"f": "upper one"}), lower(t, map[string]string{"f": "lower one", "g": "2"}))
	a.Stage = n.stage
	b := &builder{a: a, r: &Root{IDMapped: true, limit: a.Upper.SizeBytes}}
	require.NoError(t, b.build())
	for i := range 3 { // the upper is staged once, for the root and for volumes
		id := strings.Repeat("x", i+1)
		upper, work := id, "work"+id
		if i == 2 { // one that stays
			dir := t.TempDir()
			require.NoError(t, MakeUpper(dir))
			upper, work = dir+"/upper", dir+"/work"
		} else {
			require.NoError(t, makeUpper(int(b.r.upper.Fd()), upper, work, testIDs, testIDs, 0o755))
		}
		tree, err := b.stagedOverlay("a test", b.lowers, "", upper, work)
		require.NoError(t, err)
		fd, err := unix.Openat(tree, "f", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		text := make([]byte, 16)
		k, err := unix.Read(fd, text)
		require.NoError(t, err)
		require.Equal(t, "upper one", string(text[:k]))
		unix.Close(fd)
		fd, err = unix.Openat(tree, "new", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		require.NoError(t, err)
		unix.Close(fd)
		unix.Close(tree)
	}
	require.NoError(t, b.close())
	require.NoError(t, b.r.Close())
}
