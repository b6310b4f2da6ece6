package runtime

import (
	"testing"

	"github.com/stretchr/testify/require"
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
}
