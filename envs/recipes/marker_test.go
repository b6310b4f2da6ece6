package recipes

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// rows reads a table that Python's packaging made (testdata/tables.py).
func rows(t *testing.T, name string) (out []json.RawMessage) {
	t.Helper()
	f, err := os.Open("testdata/" + name)
	require.NoError(t, err)
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if !strings.HasPrefix(s.Text(), "#") {
			out = append(out, json.RawMessage(s.Text()))
		}
	}
	require.NoError(t, s.Err())
	require.Greater(t, len(out), 1000)
	return out
}

func TestMarkersAreWhatPythonsPackagingMakesOfThem(t *testing.T) {
	all := rows(t, "markers.txt")
	var vars []map[string]string
	require.NoError(t, json.Unmarshal(all[0], &vars))
	for _, raw := range all[1:] {
		var r []string
		require.NoError(t, json.Unmarshal(raw, &r))
		m, err := parseMarker(r[0])
		if r[1] == "-" {
			assert.Error(t, err, "%q", r[0])
			continue
		}
		if err != nil && strings.Contains(r[1], "-") {
			continue // undefined where it is evaluated, for packaging
		}
		if !assert.NoError(t, err) {
			continue
		}
		got := ""
		for _, v := range vars {
			e := &Environment{Vars: v, Extras: map[string]bool{v["extra"]: true}}
			got += map[bool]string{true: "1", false: "0"}[m(e)]
		}
		for i := range got {
			if r[1][i] != '-' {
				assert.Equal(t, r[1][i], got[i], "%q is %s, not %s", r[0], r[1], got)
			}
		}
	}
}

func FuzzMarker(f *testing.F) {
	f.Add("python_version >= '3.8' and (extra == \"x\" or 'a' in extras)")
	f.Add("os_name not in 'nt' or platform_release ~= '6.1'")
	f.Fuzz(func(t *testing.T, text string) {
		m, err := parseMarker(text)
		if err != nil {
			return
		}
		e := &Environment{Vars: map[string]string{"python_version": "3.11", "platform_release": "6.1-x"}}
		and, err := parseMarker("(" + text + ") and sys_platform == ''")
		if err != nil {
			if !strings.Contains(err.Error(), "nesting") {
				t.Fatalf("%q in parentheses: %v", text, err)
			}
			return
		}
		if m(e) != and(e) { // sys_platform is '' there
			t.Fatalf("%q is another in parentheses", text)
		}
	})
}
