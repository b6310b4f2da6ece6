package envs

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/internal/pep503"
)

func TestRequirementLines(t *testing.T) {
	in, err := readInput(writeInput(t, "Foo_Bar.baz[x, y] == 1.0 ; python_version > '3' # why\n--index-url https://index.test/s\n"+
		"zope.interface>=5,<6\nwheel @ https://files.test/w-1-py3-none-any.whl#sha256=ab\na===1 --hash sha256:AB --hash=sha256:cd\n"))
	require.NoError(t, err)
	require.Equal(t, []string{"--index-url https://index.test/s"}, in.opts)
	require.Len(t, in.reqs, 4)
	require.Equal(t, "foo-bar-baz", in.reqs[0].name)
	require.Equal(t, "1.0", in.reqs[0].version)
	require.True(t, in.reqs[0].marker)
	require.Equal(t, "zope-interface", in.reqs[1].name)
	require.Empty(t, in.reqs[1].version)
	require.Empty(t, in.reqs[2].version)
	require.Equal(t, []string{"sha256:ab", "sha256:cd"}, in.reqs[3].hashes)
}

func FuzzPartOfALockReadsBackTheSame(f *testing.F) {
	for _, s := range []string{"six==1.0 \\\n --hash=sha256:ab\n", "a[b]>=1; c\n", "-r x\n", "--index-url y", "x @ https://h/x", "\\\n", "é"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		in := &input{kind: KindRequirements}
		if err := in.add("/nowhere/r.txt", []byte(s), "/nowhere", false, map[string]bool{}, 0); err != nil {
			return
		}
		for _, r := range in.reqs {
			if r.name == "" || r.name != pep503.Normalise(r.name) {
				t.Fatalf("name %q", r.name)
			}
		}
		_ = in.text()
		if !in.isLock() || len(in.reqs) == 0 {
			return
		}
		// What is installed for the missing wheels is read back the same.
		l := subset(&lock{kind: "requirements", in: in}, in.reqs)
		back := &input{kind: KindRequirements}
		if err := back.add("/nowhere/s.txt", l.text, "/nowhere", false, map[string]bool{}, 0); err != nil || len(back.reqs) != len(in.reqs) {
			t.Fatalf("%v: %q gives %q", err, s, l.text)
		}
		for i, r := range in.reqs {
			if b := back.reqs[i]; b.name != r.name || b.version != r.version || len(b.hashes) != len(r.hashes) {
				t.Fatalf("%q: %+v became %+v", s, r, b)
			}
		}
	})
}
