package condachannel

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTheChannelSolvesAndInstalls(t *testing.T) {
	channel := Build(t)
	root := t.TempDir()
	a := Rattler(t, Ask{Channel: channel, Specs: []string{"greet"}, Root: root, Prefix: "/opt/env"})
	require.Contains(t, a.Packages, "greet-1.2-pyh5_0.conda")
	got, err := os.Readlink(filepath.Join(root, "bin", "python"))
	require.NoError(t, err)
	require.Equal(t, "python3", got)
	r := Rattler(t, Ask{Records: filepath.Join(root, "conda-meta")})
	require.Equal(t, "greet", r.Records["greet-1.2-pyh5_0.json"].Name)
	require.NotEmpty(t, Read(t, channel).Platform)
}
