package bounded

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRead(t *testing.T) {
	b, err := Read(strings.NewReader("12345"), 5)
	require.NoError(t, err)
	require.Equal(t, "12345", string(b))
	b, err = Read(strings.NewReader("123456"), 5)
	require.ErrorIs(t, err, ErrTooLarge)
	require.EqualError(t, err, "more than 5 bytes")
	require.Nil(t, b)
}

func TestFile(t *testing.T) {
	p := filepath.Join(t.TempDir(), "f")
	_, err := File(p, 3)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.EqualError(t, err, "no such file or directory")
	require.NoError(t, os.WriteFile(p, []byte("four"), 0o600))
	_, err = File(p, 3)
	require.ErrorIs(t, err, ErrTooLarge)
	b, err := File(p, 4)
	require.NoError(t, err)
	require.Equal(t, "four", string(b))
}

func TestText(t *testing.T) {
	require.Equal(t, "short", Text("short"))
	require.Equal(t, strings.Repeat("x", 120)+"…", Text(strings.Repeat("x", 121)))
}
