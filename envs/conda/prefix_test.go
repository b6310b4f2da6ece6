package conda

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTextPrefixesAreReplaced(t *testing.T) {
	const old = "/build/placehold"
	long := "/opt/" + strings.Repeat("l", 130)
	for name, c := range map[string]struct{ prefix, in, want string }{
		"everywhere":                  {"/opt/env", old + " x " + old + old + "\n\xff" + old, "/opt/env x /opt/env/opt/env\n\xff/opt/env"},
		"nowhere":                     {"/opt/env", "#!/bin/sh\nx\n", "#!/bin/sh\nx\n"},
		"nothing":                     {"/opt/env", "", ""},
		"a shebang":                   {"/opt/env", "#!" + old + "/bin/python -E\n" + old, "#!/opt/env/bin/python -E\n/opt/env"},
		"a shebang without an end":    {"/opt/env", "#!" + old + "/bin/tool", "#!/opt/env/bin/tool"},
		"a long shebang of python":    {long, "#!" + old + "/bin/python3.12 -E\nx", "#!/bin/sh\n'''exec' \"" + long + "/bin/python3.12\" -E \"$0\" \"$@\" #'''\nx"},
		"a long shebang of another":   {long, "#!" + old + "/bin/perl -w\nx", "#!/usr/bin/env perl -w\nx"},
		"a shebang that just fits":    {"/opt/" + strings.Repeat("l", 127-7-4), "#!" + old + "/bin", "#!/opt/" + strings.Repeat("l", 127-7-4) + "/bin"},
		"a prefix with a space":       {"/opt/my env", "#!" + old + "/bin/python\n" + old, "#!/bin/sh\n'''exec' \"/opt/my env/bin/python\" \"$0\" \"$@\" #'''\n/opt/my env"},
		"a space, another's shebang":  {"/opt/my env", "#!/bin/sh\n" + old, "#!/bin/sh\n/opt/my env"},
		"a first line without an end": {"/opt/env", "#!" + strings.Repeat("x", 70_000) + old, "#!" + strings.Repeat("x", 70_000) + "/opt/env"},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, replaceText(&b, []byte(c.in), old, c.prefix))
			require.Equal(t, c.want, b.String())
		})
	}
}

func TestBinaryPrefixesKeepTheLength(t *testing.T) {
	const old = "/build/placehold"
	for name, c := range map[string]struct{ in, want string }{
		"one":                   {"\x7fELF\x00" + old + "/lib\x00tail", "\x7fELF\x00/opt/env/lib" + strings.Repeat("\x00", 9) + "tail"},
		"several in one string": {old + "/a:" + old + "/b\x00t", "/opt/env/a:/opt/env/b" + strings.Repeat("\x00", 17) + "t"},
		"at the end":            {"x" + old, "x/opt/env" + strings.Repeat("\x00", 8)},
		"none":                  {"\x00abc\x00", "\x00abc\x00"},
		"half of one":           {"\x00/build/place\x00hold", "\x00/build/place\x00hold"},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, replaceBinary(&b, []byte(c.in), old, "/opt/env"))
			require.Equal(t, c.want, b.String())
			require.Len(t, b.String(), len(c.in))
		})
	}
	require.EqualError(t, replaceBinary(&bytes.Buffer{}, nil, "/short", "/opt/env"), "the prefix /opt/env is longer than the 6 bytes it was built with")
}

func FuzzReplace(f *testing.F) {
	f.Add([]byte("#!/p/bin/python\n/p\x00/p/lib\x00"), "/p", true)
	f.Add([]byte("/build/x:/build/y\x00z"), "/build", false)
	f.Fuzz(func(t *testing.T, data []byte, placeholder string, text bool) {
		if placeholder == "" || strings.Contains(placeholder, "\x00") {
			return // refused before
		}
		var b bytes.Buffer
		if text {
			if err := replaceText(&b, data, placeholder, "/opt/env"); err != nil {
				t.Fatal(err)
			}
			return
		}
		if err := replaceBinary(&b, data, placeholder, "/opt/env"); err != nil {
			return
		}
		if b.Len() != len(data) {
			t.Fatalf("%d bytes of %d", b.Len(), len(data))
		}
	})
}

// FuzzMetadata reads what a package says of itself: no entry may leave the prefix.
func FuzzMetadata(f *testing.F) {
	f.Add([]byte(`{"name":"a","version":"1","build":"0","noarch":"python"}`), []byte(`{"paths_version":1,"paths":[{"_path":"x","path_type":"hardlink"}]}`), []byte(`{"noarch":{"type":"python","entry_points":["a = b:c"]}}`), []byte("x\n"), []byte("/p text x\n\"/p q\" binary \"x\"\n"))
	f.Fuzz(func(t *testing.T, index, paths, link, files, prefixes []byte) {
		p := Package{Name: "a", Version: "1", Build: "0"}
		_ = p.complete(index, "linux-64")
		py := python{"3.12", "lib/python3.12/site-packages"}
		points, err := py.entryPoints(link, "/opt/env")
		for _, e := range points {
			if err == nil && judge(e.Path) != nil {
				t.Fatal(e.Path)
			}
		}
		for _, info := range []map[string][]byte{{"paths.json": paths}, {"files": files, "has_prefix": prefixes}} {
			u := unpacked{members: map[string]member{"x": {size: 1, sha256: sum}, "l": {link: "x"}}, info: info}
			list, err := u.paths()
			for _, e := range list {
				if err == nil && (judge(e.Path) != nil || judge(py.place(e.Path)) != nil) {
					t.Fatal(e.Path)
				}
			}
		}
	})
}
