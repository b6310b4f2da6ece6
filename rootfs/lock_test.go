package rootfs

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// A base under a live sandbox stays, with its record.
func TestBaseInUseStays(t *testing.T) {
	s := testStore(t)
	ctx := context.Background()
	src := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(src, "usr"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(src, "usr/f"), []byte("x"), 0o644))
	b := addDirectory(t, s, "b", src)
	one, err := s.Use(ctx, b.Lowers...)
	require.NoError(t, err)
	two, err := s.Use(ctx, b.Lowers...)
	require.NoError(t, err)
	one()
	require.ErrorIs(t, s.RemoveBase("b"), ErrBusy)
	require.FileExists(t, filepath.Join(b.Lowers[0], "usr/f"))
	_, err = s.Base("b")
	require.NoError(t, err)
	two()
	require.NoError(t, s.RemoveBase("b"))
	_, err = s.Use(ctx, b.Lowers...)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Error(t, s.RemoveBase("b"))
	host, err := s.HostBase(ctx)
	require.NoError(t, err)
	three, err := s.Use(ctx, host.Lowers...)
	require.NoError(t, err)
	three()
}

func TestRemoveBaseWaitsForNoAdd(t *testing.T) {
	s := testStore(t)
	ctx := context.Background()
	adding, err := s.Lock(ctx, "bases", false)
	require.NoError(t, err)
	defer adding()
	require.ErrorIs(t, s.RemoveBase("b"), ErrBusy)
}
