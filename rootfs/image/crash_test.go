package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/test/need"
)

// TestMain is also the child of the tests that need a process to lose.
func TestMain(m *testing.M) {
	root, source := os.Getenv("IMAGE_TEST_STORE"), os.Getenv("IMAGE_TEST_SOURCE")
	if root == "" {
		os.Exit(m.Run()) //nolint:forbidigo // a test binary's main
	}
	if size := os.Getenv("IMAGE_TEST_SIZE"); size != "" {
		if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size="+size); err != nil {
			fmt.Println(err) //nolint:forbidigo // a test binary's main
			os.Exit(3)       //nolint:forbidigo // a test binary's main
		}
	}
	s, err := rootfs.OpenStore(root)
	for i := 0; err == nil && (i == 0 || os.Getenv("IMAGE_TEST_SIZE") == ""); i++ {
		_, err = Add(context.Background(), s, fmt.Sprintf("b%d-%d", os.Getpid(), i), source, nil)
	}
	ents, _ := os.ReadDir(filepath.Join(root, "tmp"))
	layers, _ := os.ReadDir(filepath.Join(root, "layers"))
	bases, _ := os.ReadDir(filepath.Join(root, "bases"))
	fmt.Println(errors.Is(err, unix.ENOSPC), len(ents), len(layers), len(bases), err) //nolint:forbidigo // a test binary's main
}

func child(root, source, size string) *exec.Cmd {
	c := exec.Command(os.Args[0], "-test.run=^$") //nolint:gosec // ourselves
	c.Env = append(os.Environ(), "IMAGE_TEST_STORE="+root, "IMAGE_TEST_SOURCE="+source, "IMAGE_TEST_SIZE="+size)
	return c
}

// Whatever the moment, kill -9 leaves whole layers, readable bases, and
// nothing that GC does not take.
func TestKillAtAnyMoment(t *testing.T) {
	s := testStore(t)
	entries := makeTar(t, dir("usr"), file("usr/a", "some text"), file("usr/b", strings.Repeat("b", 1<<20)), file("usr/empty", ""), link("bin", "usr"))
	src := filepath.Join(t.TempDir(), "x.tar")
	require.NoError(t, os.WriteFile(src, entries, 0o644))
	ctx := context.Background()
	for i := range 12 {
		c := child(s.Path(), src, "")
		require.NoError(t, c.Start())
		time.Sleep(time.Duration(5+i*9) * time.Millisecond)
		require.NoError(t, c.Process.Kill())
		_ = c.Wait()
		_, err := s.GC(ctx)
		require.NoError(t, err)
		left, err := os.ReadDir(s.Path("tmp"))
		require.NoError(t, err)
		for _, e := range left { // single files without a lock wait for their hour
			require.False(t, e.IsDir() || strings.HasSuffix(e.Name(), ".lock"), e.Name())
		}
		layers, err := s.Layers()
		require.NoError(t, err)
		for _, l := range layers {
			damage, err := s.VerifyLayer(ctx, l)
			require.NoError(t, err)
			require.Empty(t, damage)
		}
		bases, err := s.Bases()
		require.NoError(t, err)
		for _, b := range bases {
			_, err := s.Base(b.Name)
			require.NoError(t, err)
		}
		for _, l := range layers { // the next child publishes anew
			for _, b := range bases {
				require.NoError(t, s.RemoveBase(b.Name))
			}
			_ = s.RemoveLayer(l)
			break
		}
	}
}

func TestFullDiskLeavesNothing(t *testing.T) {
	need.Root(t)
	src := filepath.Join(t.TempDir(), "x.tar")
	// A file of two names is copied into the store, not taken over.
	tree := makeTar(t, dir("usr"), file("usr/a", "1"), file("usr/b", strings.Repeat("b", 3<<20)), hard("usr/c", "usr/b"))
	require.NoError(t, os.WriteFile(src, tree, 0o644))
	for _, size := range []string{"1m", "4m"} { // full while unpacking; while storing
		c := child(t.TempDir(), src, size)
		c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		out, err := c.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.True(t, bytes.HasPrefix(out, []byte("true 0 0 0 ")), "%s: %s", size, out)
	}
}
