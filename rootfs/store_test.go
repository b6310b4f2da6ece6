package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func addFiles(t testing.TB, s *Store, files map[string]string) *Manifest {
	t.Helper()
	d := t.TempDir()
	for p, text := range files {
		require.NoError(t, os.MkdirAll(filepath.Join(d, filepath.Dir(p)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(d, p), []byte(text), 0o644))
	}
	f, err := os.Open(d)
	require.NoError(t, err)
	defer f.Close()
	m, err := s.AddTree(context.Background(), f, nil)
	require.NoError(t, err)
	return m
}

func TestLayerIsSharedAndIdempotent(t *testing.T) {
	s := testStore(t)
	m := addFiles(t, s, map[string]string{"a/x": "same", "b": "same", "empty": "", "n\xff\n\"": "raw"})
	var wg sync.WaitGroup
	paths := make([]string, 8)
	for i := range paths {
		own := &Manifest{Entries: append([]Entry(nil), m.Entries...)}
		wg.Go(func() {
			p, err := s.PublishLayer(context.Background(), own)
			if err == nil {
				paths[i] = p
			}
		})
	}
	wg.Wait()
	for _, p := range paths {
		require.Equal(t, paths[0], p)
	}
	p, back, err := s.Layer(m.Digest())
	require.NoError(t, err)
	require.Equal(t, paths[0], p)
	require.Equal(t, m, back)
	var a, b, e unix.Stat_t
	require.NoError(t, errors.Join(unix.Lstat(filepath.Join(p, "a/x"), &a), unix.Lstat(filepath.Join(p, "b"), &b), unix.Lstat(filepath.Join(p, "empty"), &e)))
	require.Equal(t, a.Ino, b.Ino)
	require.EqualValues(t, 3, a.Nlink)
	require.EqualValues(t, 1, e.Nlink, "empty files are never shared")
	require.EqualValues(t, layerTime.Unix(), a.Mtim.Sec)
	require.EqualValues(t, unix.S_IFREG|0o444, a.Mode)
	damage, err := s.VerifyLayer(context.Background(), m.Digest())
	require.NoError(t, err)
	require.Empty(t, damage)
	left, err := os.ReadDir(s.Path("tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestVerifyNamesTheDamage(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(root string) error
		path  string
	}{
		"a flipped byte": {func(r string) error {
			p := filepath.Join(r, "a/x")
			return errors.Join(os.Chmod(p, 0o644), os.WriteFile(p, []byte("senf"), 0o644), os.Chmod(p, 0o444))
		}, "a/x"},
		"a mode":         {func(r string) error { return os.Chmod(filepath.Join(r, "a/x"), 0o755) }, "a/x"},
		"a missing file": {func(r string) error { return os.Remove(filepath.Join(r, "a/x")) }, "a/x"},
		"one too many":   {func(r string) error { return os.WriteFile(filepath.Join(r, "a/y"), nil, 0o444) }, "a/y"},
		"another kind": {func(r string) error {
			return errors.Join(os.Remove(filepath.Join(r, "a/x")), os.Symlink("/etc/passwd", filepath.Join(r, "a/x")))
		}, "a/x"},
		"the manifest": {func(r string) error {
			p := filepath.Join(filepath.Dir(r), "manifest")
			b, err := os.ReadFile(p)
			b[len(b)/2] ^= 1
			return errors.Join(err, os.WriteFile(p, b, 0o600))
		}, "manifest"},
	} {
		t.Run(name, func(t *testing.T) {
			s := testStore(t)
			m := addFiles(t, s, map[string]string{"a/x": "same", "b": "other"})
			root, err := s.PublishLayer(context.Background(), m)
			require.NoError(t, err)
			require.NoError(t, c.spoil(root))
			damage, err := s.VerifyLayer(context.Background(), m.Digest())
			require.NoError(t, err)
			require.NotEmpty(t, damage)
			require.Equal(t, c.path, damage[0].Path)
		})
	}
}

func TestPublishRefusesWhatIsNoTree(t *testing.T) {
	s := testStore(t)
	out := t.TempDir()
	d, n, err := s.PutObject(strings.NewReader("x"), false)
	require.NoError(t, err)
	f := func(p string) Entry { return Entry{Path: p, Type: 'f', Mode: 0o444, Size: n, Digest: d} }
	for name, entries := range map[string][]Entry{
		"below a link":  {{Path: "l", Type: 'l', Mode: 0o777, Link: out}, f("l/x")},
		"below a file":  {f("a"), f("a/b")},
		"below nothing": {f("a/b")},
		"twice":         {f("a"), f("a")},
		"parent":        {f("../a")},
		"absolute":      {f("/a")},
		"set-id":        {{Path: "a", Type: 'f', Mode: 0o4755, Size: n, Digest: d}},
		"device":        {{Path: "a", Type: 'c'}},
		"no digest":     {{Path: "a", Type: 'f', Mode: 0o444}},
		"digest ../":    {{Path: "a", Type: 'f', Mode: 0o444, Digest: strings.Repeat("../", 21) + "a"}},
	} {
		_, err := s.PublishLayer(context.Background(), &Manifest{Entries: entries})
		require.Error(t, err, name)
	}
	ents, err := os.ReadDir(out)
	require.NoError(t, err)
	require.Empty(t, ents)
	layers, err := s.Layers()
	require.NoError(t, err)
	require.Empty(t, layers)
}

func TestAddTreeRefuses(t *testing.T) {
	for name, make := range map[string]func(d string) error{
		"pipe":   func(d string) error { return unix.Mkfifo(filepath.Join(d, "p"), 0o644) },
		"socket": func(d string) error { return unix.Mknod(filepath.Join(d, "s"), unix.S_IFSOCK|0o644, 0) },
		"set-id": func(d string) error {
			p := filepath.Join(d, "f")
			return errors.Join(os.WriteFile(p, nil, 0o755), os.Chmod(p, 0o755|os.ModeSetgid))
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := t.TempDir()
			require.NoError(t, make(d))
			f, err := os.Open(d)
			require.NoError(t, err)
			defer f.Close()
			_, err = testStore(t).AddTree(context.Background(), f, nil)
			require.Error(t, err)
		})
	}
}

func TestOutOfLinks(t *testing.T) {
	s := testStore(t)
	const most = 3
	osLink = func(from, to string) error {
		var st unix.Stat_t
		if err := unix.Lstat(from, &st); err != nil {
			return err
		}
		if st.Nlink >= most {
			return &os.LinkError{Op: "link", Old: from, New: to, Err: unix.EMLINK}
		}
		return os.Link(from, to)
	}
	defer func() { osLink = os.Link }()
	files := map[string]string{}
	for i := range 10 {
		files[fmt.Sprint(i)] = "same"
	}
	m := addFiles(t, s, files)
	root, err := s.PublishLayer(context.Background(), m)
	require.NoError(t, err)
	inodes := map[uint64]int{}
	for p := range files {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(root, p), &st))
		inodes[st.Ino]++
	}
	require.Len(t, inodes, 5, "the object itself is a link: two files each, %v", inodes)
	damage, err := s.VerifyLayer(context.Background(), m.Digest())
	require.NoError(t, err)
	require.Empty(t, damage)
}

func TestPruneObjects(t *testing.T) {
	s := testStore(t)
	ctx := context.Background()
	m := addFiles(t, s, map[string]string{"used": "used"})
	_, err := s.PublishLayer(ctx, m)
	require.NoError(t, err)
	d, _, err := s.PutObject(strings.NewReader("unused"), true)
	require.NoError(t, err)
	release, err := s.Lock(ctx, "objects", false)
	require.NoError(t, err)
	_, err = s.BlockBakes(expired())
	require.ErrorIs(t, err, ErrBusy)
	release()
	release, err = s.BlockBakes(ctx)
	require.NoError(t, err)
	defer release()
	_, n, err := s.PruneObjects(func(digest string, exec bool) bool { return digest == d && exec })
	require.NoError(t, err)
	require.Zero(t, n)
	_, n, err = s.PruneObjects(nil)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.False(t, s.HasObject(d, m.Entries[0].Size, true))
	require.True(t, s.HasObject(m.Entries[0].Digest, m.Entries[0].Size, false))
}

// A power cut may leave an object's name without its content.
func TestObjectWithoutItsContentIsReplaced(t *testing.T) {
	s := testStore(t)
	digest, size, err := s.PutObject(strings.NewReader("content"), false)
	require.NoError(t, err)
	require.NoError(t, os.Truncate(s.objectPath(digest, false), 0))
	require.False(t, s.HasObject(digest, size, false))
	_, _, err = s.PutObject(strings.NewReader("content"), false)
	require.NoError(t, err)
	require.True(t, s.HasObject(digest, size, false))
	b, err := os.ReadFile(s.objectPath(digest, false))
	require.NoError(t, err)
	require.Equal(t, "content", string(b))
}

func TestLocks(t *testing.T) {
	s := testStore(t)
	ctx := context.Background()
	one, err := s.Lock(ctx, "x", false)
	require.NoError(t, err)
	two, err := s.Lock(ctx, "x", false)
	require.NoError(t, err)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_, err = s.Lock(short, "x", true)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	one()
	two()
	three, err := s.Lock(ctx, "x", true)
	require.NoError(t, err)
	three()
	for _, n := range []string{"", "../x", "a/b", ".x", "a\x00"} {
		_, err := s.Lock(ctx, n, true)
		require.Error(t, err)
	}
	m := addFiles(t, s, map[string]string{"a": "1"})
	p, err := s.PublishLayer(ctx, m)
	require.NoError(t, err)
	live, err := s.Use(ctx, p)
	require.NoError(t, err)
	require.ErrorIs(t, s.RemoveLayer(m.Digest()), ErrBusy)
	live()
	require.NoError(t, s.RemoveLayer(m.Digest()))
}

// A GC beside a running bake takes nothing of it.
func TestGCLeavesWhatIsBeingMade(t *testing.T) {
	s := testStore(t)
	ctx := context.Background()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = s.GC(ctx)
			}
		}
	})
	for i := range 200 {
		dir, done, err := s.TempDir("t")
		require.NoError(t, err)
		_, _, err = s.PutObject(strings.NewReader(fmt.Sprint(i)), false)
		require.NoError(t, err)
		require.DirExists(t, dir)
		require.NoError(t, done())
	}
	close(stop)
	wg.Wait()
}

func FuzzDecodeManifest(f *testing.F) {
	m := &Manifest{Entries: []Entry{{Path: "a", Type: 'd', Mode: 0o755}, {Path: "a/b", Type: 'f', Mode: 0o444, Size: 1, Digest: strings.Repeat("0", 64)}, {Path: "l\xff", Type: 'l', Mode: 0o777, Link: "a"}}}
	f.Add(m.Encode())
	f.Add([]byte(`["Li4vYQ==","f",292,1,"","",1]` + "\n"))
	f.Add([]byte("[null,\"d\"]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeManifest(b)
		if err != nil {
			return
		}
		require.Equal(t, b, append([]byte{}, m.Encode()...))
		for i, e := range m.Entries {
			require.True(t, filepath.IsLocal(e.Path))
			require.True(t, i == 0 || m.Entries[i-1].Path < e.Path)
		}
	})
}
