package runtime

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/netns"
)

func TestJournalComesBackOrIsTorn(t *testing.T) {
	for _, j := range []journal{
		{ID: "a1", Name: "", Pid: 7},
		{ID: "a1", Name: "with space\nand line", Pid: 1 << 22, Cgroups: []string{"/sys/fs/cgroup/x", "/sys/fs/cgroup/y z"}},
	} {
		b := j.encode()
		got := parseJournal(b)
		require.NotNil(t, got)
		require.Equal(t, j.ID+j.Name, got.ID+got.Name)
		require.Equal(t, j.Pid, got.Pid)
		require.ElementsMatch(t, j.Cgroups, got.Cgroups)
		for i := range b { // a crash in the middle of the write
			require.Nil(t, parseJournal(b[:i]), "the first %d bytes", i)
		}
	}
	require.Nil(t, parseJournal([]byte(`{"id":"x"}`)))

	// What is added later is there or not; the journal is, whatever becomes of that.
	f, err := os.Create(filepath.Join(t.TempDir(), "0"))
	require.NoError(t, err)
	defer f.Close()
	s := &slot{file: f}
	j := journal{ID: "a1", Pid: 7, Cgroups: []string{"/x"}}
	require.NoError(t, s.write(j))
	require.NoError(t, s.share(&netns.Ready{Resolv: "nameserver 192.0.2.1\n"}))
	b, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	require.Equal(t, "nameserver 192.0.2.1\n", parseJournal(b).Net.Resolv)
	for i := len(j.encode()); i < len(b)-1; i++ {
		require.Equal(t, &j, parseJournal(b[:i]), "the first %d bytes", i)
	}
}
