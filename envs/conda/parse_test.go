package conda

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

const (
	sum   = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	sum5  = "0123456789abcdef0123456789abcdef"
	chan1 = "https://conda.example/forge"
)

var linux = ParseOptions{Platform: "linux-64"}

func TestExplicitListsAreRead(t *testing.T) {
	l, err := Parse("", []byte(`# This file may be used to create an environment using:
# platform: linux-64
@EXPLICIT
`+chan1+`/linux-64/libb-1.2.3-h1_4.conda#`+sum5+`
`+chan1+`/noarch/tzdata-2024b-hc8b5060_0.conda#`+sum+`
`+chan1+`/linux-64/_libgcc_mutex-0.1-conda_forge.tar.bz2#sha256:`+strings.ToUpper(sum)+`
https://user:secret@conda.example/t/tk-123/private/linux-64/x-y-1!2.0-0.tar.bz2#md5:`+sum5+`
`), linux)
	require.NoError(t, err)
	require.Equal(t, "linux-64", l.Platform)
	require.Equal(t, []string{chan1, "https://conda.example/private"}, l.Channels)
	require.Equal(t, []Package{
		{Name: "_libgcc_mutex", Version: "0.1", Build: "conda_forge", Subdir: "linux-64", Channel: chan1, FileName: "_libgcc_mutex-0.1-conda_forge.tar.bz2", URL: chan1 + "/linux-64/_libgcc_mutex-0.1-conda_forge.tar.bz2", SHA256: sum},
		{Name: "libb", Version: "1.2.3", Build: "h1_4", BuildNumber: 4, Subdir: "linux-64", Channel: chan1, FileName: "libb-1.2.3-h1_4.conda", URL: chan1 + "/linux-64/libb-1.2.3-h1_4.conda", MD5: sum5},
		{Name: "tzdata", Version: "2024b", Build: "hc8b5060_0", Subdir: "noarch", Channel: chan1, FileName: "tzdata-2024b-hc8b5060_0.conda", URL: chan1 + "/noarch/tzdata-2024b-hc8b5060_0.conda", SHA256: sum},
		{Name: "x-y", Version: "1!2.0", Build: "0", Subdir: "linux-64", Channel: "https://conda.example/private", FileName: "x-y-1!2.0-0.tar.bz2", URL: "https://conda.example/private/linux-64/x-y-1!2.0-0.tar.bz2", MD5: sum5},
	}, l.Packages)
	b, err := l.Encode()
	require.NoError(t, err)
	require.NotContains(t, string(b), "secret")
	require.NotContains(t, string(b), "tk-123")
}

const condaLockText = `version: 1
metadata:
  content_hash: {linux-64: x, osx-arm64: y}
  channels:
  - {url: conda-forge, used_env_vars: []}
  platforms: [linux-64, osx-arm64]
  sources: [environment.yml]
package:
- name: python
  version: 3.12.1
  manager: conda
  platform: linux-64
  dependencies: {libb: '>=1.2,<2.0a0', __glibc: ''}
  url: ` + chan1 + `/linux-64/python-3.12.1-hab00c5b_1_cpython.conda
  hash: {md5: ` + sum5 + `, sha256: ` + sum + `}
  category: main
  optional: false
- {name: libb, version: '1.10', manager: conda, platform: linux-64, dependencies: {}, url: '` + chan1 + `/linux-64/libb-1.10-h1_4.conda', hash: {sha256: ` + sum + `}, category: main, optional: false}
- {name: libb, version: '1.10', manager: conda, platform: linux-64, dependencies: {}, url: '` + chan1 + `/linux-64/libb-1.10-h1_4.conda', hash: {sha256: ` + sum + `}, category: dev, optional: true}
- {name: tool, version: '1', manager: conda, platform: linux-64, dependencies: {}, url: '` + chan1 + `/noarch/tool-1-pyh_0.conda', hash: {sha256: ` + sum + `}, category: dev, optional: true}
- {name: libb, version: '1.9', manager: conda, platform: osx-arm64, dependencies: {}, url: '` + chan1 + `/osx-arm64/libb-1.9-h1_4.conda', hash: {sha256: ` + sum + `}, category: main, optional: false}
- {name: Flask_SQL.Alchemy, version: 3.1.1, manager: pip, platform: linux-64, dependencies: {}, url: 'https://u:p@files.example/a.whl#sha256=x', hash: {sha256: ` + sum + `}, category: main, optional: false}
`

func TestCondaLocksAreRead(t *testing.T) {
	l, err := Parse("", []byte(condaLockText), linux)
	require.NoError(t, err)
	names := func(l *Lock) (out []string) {
		for _, p := range l.Packages {
			out = append(out, p.Name+" "+p.Version)
		}
		return out
	}
	require.Equal(t, []string{"libb 1.10", "python 3.12.1"}, names(l))
	require.Equal(t, []string{"__glibc", "libb >=1.2,<2.0a0"}, l.Packages[1].Depends)
	require.Equal(t, "3.12", l.Python())
	require.Equal(t, []string{"conda-forge"}, l.Channels)
	require.Equal(t, []PipPackage{{Name: "flask-sql-alchemy", Version: "3.1.1", URL: "https://files.example/a.whl", SHA256: sum}}, l.Pip)

	l, err = Parse(CondaLock, []byte(condaLockText), ParseOptions{Platform: "linux-64", Categories: []string{"main", "dev"}})
	require.NoError(t, err)
	require.Equal(t, []string{"libb 1.10", "python 3.12.1", "tool 1"}, names(l))

	l, err = Parse(CondaLock, []byte(condaLockText), ParseOptions{Platform: "osx-arm64"})
	require.NoError(t, err)
	require.Equal(t, []string{"libb 1.9"}, names(l))
}

func pixiText(version, platforms string) string {
	return "version: " + version + "\n" + platforms + `environments:
  default:
    channels:
    - url: ` + chan1 + `/
    indexes: [https://index.example/simple]
    packages:
      linux-64:
      - conda: ` + chan1 + `/linux-64/libb-1.10-h1_4.conda
      - conda: ` + chan1 + `/noarch/tool-1-pyhd8ed1ab_0.conda
      - pypi: https://files.example/numpy-2.2.1.whl
      osx-arm64:
      - conda: ` + chan1 + `/noarch/tool-1-pyhd8ed1ab_0.conda
  test:
    channels: []
    packages:
      linux-64:
      - conda: /srv/channel/linux-64/libb-1.11-h1_4.conda
packages:
- conda: ` + chan1 + `/linux-64/libb-1.10-h1_4.conda
  sha256: ` + sum + `
  md5: ` + sum5 + `
  depends: [__glibc >=2.17, tool]
  constrains: [other <0a0]
  license: MIT
  size: 12
  timestamp: 1728047496079
  purls: []
- conda: ` + chan1 + `/noarch/tool-1-pyhd8ed1ab_0.conda
  sha256: ` + sum + `
- conda: /srv/channel/linux-64/libb-1.11-h1_4.conda
  sha256: ` + sum + `
- pypi: https://files.example/numpy-2.2.1.whl
  name: numpy
  version: 2.2.1
  sha256: ` + sum + `
  requires_python: '>=3.10'
`
}

func TestPixiLocksAreRead(t *testing.T) {
	for version, platforms := range map[string]string{"6": "", "7": "platforms:\n- name: linux-64\n- name: osx-arm64\n"} {
		l, err := Parse("", []byte(pixiText(version, platforms)), linux)
		require.NoError(t, err)
		require.Equal(t, []Package{
			{
				Name: "libb", Version: "1.10", Build: "h1_4", BuildNumber: 4, Subdir: "linux-64", Channel: chan1, FileName: "libb-1.10-h1_4.conda", URL: chan1 + "/linux-64/libb-1.10-h1_4.conda",
				SHA256: sum, MD5: sum5, SizeBytes: 12, Depends: []string{"__glibc >=2.17", "tool"}, Constrains: []string{"other <0a0"}, License: "MIT", TimestampMS: 1728047496079,
			},
			{Name: "tool", Version: "1", Build: "pyhd8ed1ab_0", Subdir: "noarch", Channel: chan1, FileName: "tool-1-pyhd8ed1ab_0.conda", URL: chan1 + "/noarch/tool-1-pyhd8ed1ab_0.conda", SHA256: sum, Noarch: "python"},
		}, l.Packages)
		require.Equal(t, []PipPackage{{Name: "numpy", Version: "2.2.1", URL: "https://files.example/numpy-2.2.1.whl", SHA256: sum}}, l.Pip)

		l, err = Parse(Pixi, []byte(pixiText(version, platforms)), ParseOptions{Platform: "linux-64", Environment: "test"})
		require.NoError(t, err)
		require.Equal(t, "file:///srv/channel/linux-64/libb-1.11-h1_4.conda", l.Packages[0].URL)
	}
	// Version 7 may name a platform as it likes.
	named := strings.ReplaceAll(pixiText("7", "platforms:\n- {name: gpu, subdir: linux-64}\n"), "      linux-64:", "      gpu:")
	l, err := Parse("", []byte(named), linux)
	require.NoError(t, err)
	require.Len(t, l.Packages, 2)
}

func TestBadLocksAreRefusedByName(t *testing.T) {
	explicit := func(lines ...string) string { return "@EXPLICIT\n" + strings.Join(lines, "\n") + "\n" }
	lock := func(old, new string) string {
		s := strings.Replace(condaLockText, old, new, 1)
		if s == condaLockText {
			panic(old)
		}
		return s
	}
	pixi := func(old, new string) string {
		s := strings.Replace(pixiText("7", ""), old, new, 1)
		if s == pixiText("7", "") {
			panic(old)
		}
		return s
	}
	u := chan1 + "/linux-64/"
	for name, c := range map[string]struct {
		text, err, hint string
		o               ParseOptions
	}{
		"nothing":               {text: "", err: "read lock: neither @EXPLICIT, conda-lock.yml nor pixi.lock"},
		"no package":            {text: explicit(), err: "read lock: it names no package"},
		"no hash":               {text: explicit(u + "a-1-0.conda"), err: "read lock: package a-1-0.conda: has no hash", hint: "conda list --explicit --sha256 (or --md5) writes them; conda-lock and pixi always do"},
		"a short hash":          {text: explicit(u + "a-1-0.conda#abc"), err: `line 2: read lock: package a-1-0.conda: "abc" is neither md5 nor sha256`},
		"no hex":                {text: explicit(u + "a-1-0.conda#" + strings.Repeat("g", 64)), err: `read lock: package a-1-0.conda: sha256 "` + strings.Repeat("g", 64) + `" is no hash`},
		"no package's name":     {text: explicit(u + "a-1.conda#" + sum), err: "line 2: read lock: package a-1.conda: no file name of a conda package (name-version-build.conda or .tar.bz2)"},
		"another archive":       {text: explicit(u + "a-1-0.zip#" + sum), err: "line 2: read lock: package a-1-0.zip: no file name of a conda package (name-version-build.conda or .tar.bz2)"},
		"upper case":            {text: explicit(u+"a-1-0.conda#"+sum, u+"A-2-0.conda#"+sum), err: "read lock: package a twice: A-2-0.conda and a-1-0.conda"},
		"two of one name":       {text: explicit(u+"a-1-0.conda#"+sum, u+"a-2-0.conda#"+sum), err: "read lock: package a twice: a-1-0.conda and a-2-0.conda"},
		"mixed platforms":       {text: explicit(u+"a-1-0.conda#"+sum, chan1+"/osx-64/b-2-0.conda#"+sum), err: "read lock: package b-2-0.conda: is for osx-64, not linux-64"},
		"another platform":      {text: "# platform: osx-arm64\n" + explicit(u+"a-1-0.conda#"+sum), err: "read lock: nothing for linux-64: it is for osx-arm64"},
		"no platform":           {text: explicit("https://h/a-1-0.conda#" + sum), err: "read lock: package a-1-0.conda: its URL does not tell the platform"},
		"a strange scheme":      {text: explicit("s3://h/linux-64/a-1-0.conda#" + sum), err: `read lock: package a-1-0.conda: URL "s3://h/linux-64/a-1-0.conda" is neither https nor file`},
		"no URL":                {text: explicit("https://user:secret@[::1/linux-64/a-1-0.conda#" + sum), err: "line 2: read lock: package [::1/linux-64/a-1-0.conda: no URL"},
		"a name that climbs":    {text: explicit(u + "..-1-0.conda#" + sum), err: `read lock: package ..-1-0.conda: name ".." is none of conda's`},
		"a version that climbs": {text: explicit(u + "a-..%2fx-0.conda#" + sum), err: `line 2: read lock: package x-0.conda: no file name of a conda package (name-version-build.conda or .tar.bz2)`},

		"conda-lock of old":       {text: lock("version: 1", "version: 2"), err: "read lock: conda-lock version 2 is unknown"},
		"conda-lock cut off":      {text: condaLockText[:900], err: "read lock: "},
		"conda-lock elsewhere":    {text: condaLockText, o: ParseOptions{Platform: "linux-aarch64"}, err: "read lock: nothing for linux-aarch64: it is for linux-64, osx-arm64"},
		"conda-lock's manager":    {text: lock("manager: conda", "manager: spack"), err: `read lock: package python: manager "spack" is neither conda nor pip`},
		"conda-lock without hash": {text: lock("  hash: {md5: "+sum5+", sha256: "+sum+"}\n", ""), err: "read lock: package python-3.12.1-hab00c5b_1_cpython.conda: has no hash"},
		"conda-lock tampered":     {text: lock("version: 3.12.1", "version: 3.12.2"), err: "read lock: package python-3.12.1-hab00c5b_1_cpython.conda: file name does not fit python 3.12.2 hab00c5b_1_cpython"},
		"conda-lock's pip":        {text: lock("x', hash: {sha256: "+sum+"}", "x', hash: {}"), err: "read lock: pip package flask-sql-alchemy: has no sha256"},
		"conda-lock's category":   {text: condaLockText, o: ParseOptions{Platform: "linux-64", Categories: []string{"docs"}}, err: "read lock: no package is of category docs"},

		"pixi of old":            {text: pixi("version: 7", "version: 5"), err: "read lock: pixi.lock version 5 is unknown"},
		"pixi's environment":     {text: pixiText("7", ""), o: ParseOptions{Platform: "linux-64", Environment: "prod"}, err: `read lock: no environment "prod"`, hint: "it has: default, test"},
		"pixi's platform":        {text: pixiText("7", ""), o: ParseOptions{Platform: "win-64"}, err: "read lock: nothing for win-64: it is for linux-64, osx-arm64"},
		"pixi without a package": {text: pixi("- conda: "+chan1+"/linux-64/libb-1.10-h1_4.conda\n  sha256", "- conda: "+chan1+"/linux-64/libb-1.12-h1_4.conda\n  sha256"), err: "read lock: package " + chan1 + "/linux-64/libb-1.10-h1_4.conda: environment default names it, packages has no such entry"},
		"pixi without hash":      {text: pixi("  sha256: "+sum+"\n  md5: "+sum5+"\n", ""), err: "read lock: package libb-1.10-h1_4.conda: has no hash"},
		"pixi of a source":       {text: pixi("      - pypi: https://files.example/numpy-2.2.1.whl", "      - conda_source: x"), err: "read lock: package x: is built from source"},
		"pixi of a local path":   {text: pixi("- conda: "+chan1+"/linux-64/libb", "- conda: ./linux-64/libb"), err: "read lock: package ./linux-64/libb-1.10-h1_4.conda: environment default names it, packages has no such entry"},
		"pixi with text":         {text: pixi("environments:", "environments: x\nx:"), err: "read lock: "},
		"an alias bomb":          {text: bomb(), err: "read lock: "},
		"a deep document":        {text: "version: 7\nenvironments: " + strings.Repeat("[", 100_000), err: "read lock: "},
		"two documents":          {text: pixiText("7", "") + "---\na: 1\n", err: "read lock: more than one YAML document"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.o.Platform == "" {
				c.o = linux
			}
			_, err := Parse("", []byte(c.text), c.o)
			require.Error(t, err)
			if strings.HasSuffix(c.err, ": ") {
				require.True(t, strings.HasPrefix(err.Error(), c.err), err)
			} else {
				require.EqualError(t, err, c.err)
			}
			require.NotContains(t, err.Error(), "\n")
			require.NotContains(t, err.Error(), "secret")
			if c.hint != "" {
				require.Equal(t, c.hint, hinted.Of(err))
			}
		})
	}
}

func bomb() string {
	var b strings.Builder
	b.WriteString("version: 7\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 9; i++ {
		fmt.Fprintf(&b, "a%d: &a%d [%s*a%d]\n", i, i, strings.Repeat(fmt.Sprintf("*a%d,", i-1), 9), i-1)
	}
	b.WriteString("environments: {default: {channels: [], packages: {linux-64: *a8}}}\n")
	return b.String()
}

func TestEqualLocksAreEqualBytes(t *testing.T) {
	a, err := Parse("", []byte("@EXPLICIT\n"+chan1+"/linux-64/a-1-0.conda#"+sum+"\n"+chan1+"/linux-64/b-1-0.conda#"+sum+"\n"), linux)
	require.NoError(t, err)
	b, err := Parse("", []byte("@EXPLICIT\n"+chan1+"/linux-64/b-1-0.conda#sha256:"+sum+"\n\n"+chan1+"/linux-64/a-1-0.conda#"+sum+"\n"), linux)
	require.NoError(t, err)
	x, err := a.Encode()
	require.NoError(t, err)
	y, err := b.Encode()
	require.NoError(t, err)
	require.Equal(t, string(x), string(y))
	c, err := Parse("", x, linux)
	require.NoError(t, err)
	require.Equal(t, a, c)
	_, err = Decode(x[:len(x)-20])
	require.EqualError(t, err, "read conda lock: unexpected EOF")
	_, err = Decode(bytes.Replace(x, []byte(`"platform"`), []byte(`"plattform"`), 1))
	require.EqualError(t, err, `read conda lock: json: unknown field "plattform"`)
}

// TestLargeLocksAreRead shows its time with -v; nothing is asserted about it.
func TestLargeLocksAreRead(t *testing.T) {
	var explicit, lock, env, pkgs strings.Builder
	explicit.WriteString("@EXPLICIT\n")
	lock.WriteString("version: 1\nmetadata: {platforms: [linux-64]}\npackage:\n")
	for i := range 10_000 {
		u := fmt.Sprintf("%s/linux-64/package%d-1.%d-h123_0.conda", chan1, i, i)
		fmt.Fprintf(&explicit, "%s#%s\n", u, sum)
		fmt.Fprintf(&lock, "- name: package%d\n  version: '1.%d'\n  manager: conda\n  platform: linux-64\n  dependencies: {package%d: '>=1'}\n  url: %s\n  hash: {md5: %s, sha256: %s}\n  category: main\n  optional: false\n", i, i, (i+1)%10_000, u, sum5, sum)
		fmt.Fprintf(&env, "      - conda: %s\n", u)
		fmt.Fprintf(&pkgs, "- conda: %s\n  sha256: %s\n  md5: %s\n  depends: [package%d >=1]\n  license: MIT\n  size: 123\n", u, sum, sum5, (i+1)%10_000)
	}
	for kind, text := range map[Kind]string{
		Explicit: explicit.String(), CondaLock: lock.String(),
		Pixi: "version: 7\nenvironments:\n  default:\n    channels: []\n    packages:\n      linux-64:\n" + env.String() + "packages:\n" + pkgs.String(),
	} {
		start := time.Now()
		l, err := Parse("", []byte(text), linux)
		require.NoError(t, err)
		require.Len(t, l.Packages, 10_000)
		var list []*Package
		for i := range l.Packages {
			list = append(list, &l.Packages[i])
		}
		parsed := time.Since(start)
		require.Len(t, order(list), 10_000) // one cycle of all
		t.Logf("%s: %d bytes, parsed in %v, ordered in %v", kind, len(text), parsed, time.Since(start)-parsed)
	}
}

func TestOrderPutsDependenciesFirst(t *testing.T) {
	for name, c := range map[string]struct {
		depends map[string][]string
		noarch  string
		want    string
	}{
		"a chain":                    {depends: map[string][]string{"a": {"b >=1"}, "b": {"c[version='>=1']"}, "c": {"__glibc"}}, want: "c b a"},
		"independent":                {depends: map[string][]string{"a": nil, "b": nil}, want: "b a"},
		"a cycle":                    {depends: map[string][]string{"a": {"b"}, "b": {"a"}}, want: "a b"},
		"a cycle with noarch":        {depends: map[string][]string{"a": {"b"}, "b": {"a"}}, noarch: "a", want: "b a"},
		"itself":                     {depends: map[string][]string{"a": {"a"}}, want: "a"},
		"a cycle that others depend": {depends: map[string][]string{"a": {"b"}, "b": {"a"}, "c": {"a"}}, want: "a b c"},
	} {
		t.Run(name, func(t *testing.T) {
			var list []*Package
			for n := 'a'; n <= 'c'; n++ {
				if d, ok := c.depends[string(n)]; ok {
					p := &Package{Name: string(n), Depends: d}
					if c.noarch == p.Name {
						p.Noarch = "generic"
					}
					list = append(list, p)
				}
			}
			var got []string
			for _, i := range order(list) {
				got = append(got, list[i].Name)
			}
			require.ElementsMatch(t, strings.Fields(c.want), got)
			if name != "a cycle that others depend" {
				require.Equal(t, c.want, strings.Join(got, " "))
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{condaLockText, pixiText("6", ""), pixiText("7", ""), "# platform: linux-64\n@EXPLICIT\n" + chan1 + "/linux-64/a-1-0.conda#" + sum + "\n", bomb(), `{"platform":"linux-64","packages":[]}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		l, err := Parse("", []byte(text), linux)
		if err != nil {
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 2000 {
				t.Fatalf("%q", err)
			}
			return
		}
		x, err := l.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Decode(x)
		if err != nil {
			t.Fatal(err)
		}
		y, err := again.Encode()
		if err != nil || !bytes.Equal(x, y) {
			t.Fatalf("%v\n%s\n%s", err, x, y)
		}
	})
}
