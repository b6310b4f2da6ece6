package pep440

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// ordered is PEP 440's own list and what its rules add.
var ordered = []string{
	"1.0.dev456", "1.0a1", "1.0a2.dev456", "1.0a12.dev456", "1.0a12", "1.0b1.dev456", "1.0b2", "1.0b2.post345.dev456", "1.0b2.post345",
	"1.0rc1.dev456", "1.0rc1", "1.0", "1.0+abc.5", "1.0+abc.7", "1.0+5", "1.0+5.1", "1.0.post456.dev34", "1.0.post456", "1.0.15", "1.1.dev1", "1.10",
	"20240101000000000000000000", "1!0.1",
}

func TestOrder(t *testing.T) {
	for i, a := range ordered {
		for j, b := range ordered {
			va, err := Parse(a)
			require.NoError(t, err)
			vb, err := Parse(b)
			require.NoError(t, err)
			require.Equal(t, sign(i-j), va.Compare(vb), "%s against %s", a, b)
		}
	}
}

func TestSpellings(t *testing.T) {
	for in, want := range map[string]string{
		"v1.0": "1.0", " 1.0 ": "1.0", "1.0ALPHA1": "1.0a1", "1.0-beta.2": "1.0b2", "1.0c1": "1.0rc1", "1.0preview": "1.0rc0", "1.0-1": "1.0.post1", "1.0.rev3": "1.0.post3",
		"1.0dev": "1.0.dev0", "1.0+Ubuntu-1": "1.0+ubuntu.1", "01.002": "1.2", "0!1": "1", "2!1.0": "2!1.0", "1.0.post": "1.0.post0", "1.0-r4": "1.0.post4",
	} {
		v, err := Parse(in)
		require.NoError(t, err)
		require.Equal(t, want, v.String(), in)
	}
	for _, bad := range []string{"", "x", "1.", "1.x", "1.0+", "1.0++a", "1.0 1", "1!", "!1", "1.0-", "french toast", strings.Repeat("1", maxBytes+1), "1.0a1b1"} {
		_, err := Parse(bad)
		require.Error(t, err, bad)
	}
}

func TestSpecifiers(t *testing.T) {
	for _, c := range []struct {
		spec string
		yes  []string
		no   []string
	}{
		{"", []string{"1", "2.dev1"}, nil},
		{">=1.0, !=1.3.*, <2", []string{"1.0", "1.4", "1.0.post1"}, []string{"0.9", "1.3", "1.3.5", "2", "2.0rc1", "1.0rc1"}},
		{"~=1.4.2", []string{"1.4.2", "1.4.9"}, []string{"1.5", "1.4.1"}},
		{"~=2.2.post3", []string{"2.2.post3", "2.9"}, []string{"2.2", "3.0"}},
		{"==1.0", []string{"1", "1.0.0", "1.0+local"}, []string{"1.0.post1"}},
		{"==1.0+local", []string{"1.0+local"}, []string{"1.0"}},
		{"==1.*", []string{"1.9", "1", "1.0rc1"}, []string{"2", "1!1.0"}},
		{">1.7", []string{"1.7.1"}, []string{"1.7", "1.7.post1", "1.7+local"}},
		{">1.7.post2", []string{"1.7.post3"}, []string{"1.7.post2"}},
		{"<1.0rc2", []string{"1.0rc1"}, []string{"1.0"}},
		{"===1.0", []string{"1.0"}, []string{"1.0.0"}},
	} {
		s, err := ParseSpecifiers(c.spec)
		require.NoError(t, err)
		for _, v := range append(slices.Clone(c.yes), c.no...) {
			p, err := Parse(v)
			require.NoError(t, err)
			require.Equal(t, slices.Contains(c.yes, v), s.Contains(p), "%s in %q", v, c.spec)
		}
	}
	for _, bad := range []string{"1.0", ">=x", "~=1", "=>1"} {
		_, err := ParseSpecifiers(bad)
		require.Error(t, err, bad)
	}
}

// What packaging made of them is kept: pip's own copy may be of any age.
func TestSameAsRecordedPackaging(t *testing.T) {
	b, err := os.ReadFile("testdata/packaging.txt")
	require.NoError(t, err)
	_, table, _ := strings.Cut(string(b), "\n")
	for line := range strings.Lines(table) {
		var r []string
		require.NoError(t, json.Unmarshal([]byte(line), &r))
		switch r[0] {
		case "v":
			_, err := Parse(r[1])
			assert.Equal(t, r[2] == "-", err != nil, "version %q", r[1])
		case "c":
			a, err := Parse(r[1])
			require.NoError(t, err)
			b, err := Parse(r[2])
			require.NoError(t, err)
			assert.Equal(t, r[3], string("<=>"[a.Compare(b)+1]), "%q and %q", r[1], r[2])
			assert.Equal(t, a.Compare(b), -b.Compare(a))
		case "s":
			_, err := ParseSpecifiers(r[1])
			assert.Error(t, err, "specifier %q", r[1])
		case "a":
			c, err := ParseSpecifiers(r[1])
			if assert.NoError(t, err) {
				v, err := Parse(r[2])
				assert.Equal(t, r[3] == "1", err == nil && c.Contains(v), "%q allows %q", r[1], r[2])
			}
		}
	}
}

// As the packaging library says, where pip has brought it.
func TestSameAsPackaging(t *testing.T) {
	script := `import sys, json
from pip._vendor.packaging.version import Version
from pip._vendor.packaging.specifiers import SpecifierSet
vs, ss = json.load(sys.stdin)
print(json.dumps([[[(Version(a) > Version(b)) - (Version(a) < Version(b)) for b in vs] for a in vs], [[SpecifierSet(s).contains(v, prereleases=True) for v in vs] for s in ss]]))`
	specs := []string{">=1.0", "<=1.0", ">1.0", "<1.0", "==1.0.*", "!=1.0.*", "~=1.0", "~=1.0b2", "==1.0", "!=1.0+abc.5", "<1.1", ">=1.0rc1,<1.1", ">=1!0", "==1.0.post456"}
	in, err := json.Marshal([]any{ordered, specs})
	require.NoError(t, err)
	cmd := exec.Command("python3", "-c", script)
	cmd.Stdin = strings.NewReader(string(in))
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("needs python3 with pip: %v", err)
	}
	var want []json.RawMessage
	require.NoError(t, json.Unmarshal(out, &want))
	var order [][]int
	var contains [][]bool
	require.NoError(t, json.Unmarshal(want[0], &order))
	require.NoError(t, json.Unmarshal(want[1], &contains))
	for i, a := range ordered {
		va, _ := Parse(a)
		for j, b := range ordered {
			vb, _ := Parse(b)
			require.Equal(t, order[i][j], va.Compare(vb), "%s against %s", a, b)
		}
		for k, sp := range specs {
			s, err := ParseSpecifiers(sp)
			require.NoError(t, err)
			require.Equal(t, contains[k][i], s.Contains(va), "%s in %q", a, sp)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, v := range ordered {
		f.Add(v, ">=1.0,<2")
	}
	f.Fuzz(func(t *testing.T, s, spec string) {
		v, err := Parse(s)
		if err != nil {
			return
		}
		again, err := Parse(v.String())
		require.NoError(t, err)
		require.Zero(t, v.Compare(again))
		if sp, err := ParseSpecifiers(spec); err == nil {
			sp.Contains(v)
		}
	})
}
