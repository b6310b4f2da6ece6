package inventory

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/recipes"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/test/need"
)

const site = "opt/env/lib/python3.11/site-packages/"

// publish makes an environment of files in a store, as a bake would.
func publish(t *testing.T, store *rootfs.Store, files map[string]string) *envs.Env {
	t.Helper()
	m := &rootfs.Manifest{}
	dirs := map[string]bool{}
	for p, text := range files {
		d, n, err := store.PutObject(strings.NewReader(text), false)
		require.NoError(t, err)
		m.Entries = append(m.Entries, rootfs.Entry{Path: p, Type: 'f', Mode: 0o444, Size: n, Digest: d})
		for d := path.Dir(p); d != "." && !dirs[d]; d = path.Dir(d) {
			dirs[d] = true
			m.Entries = append(m.Entries, rootfs.Entry{Path: d, Type: 'd', Mode: 0o755})
		}
	}
	digest := m.Digest() // sorts
	require.NoError(t, store.Publish(t.Context(), m, func(string) error { return nil }))
	return &envs.Env{
		Digest: digest, Kind: "venv", Names: []string{"web"}, Base: "host", BaseDigest: "sha256:b", Python: "/usr/bin/python3.11", Lock: "sha256:l",
		Vars: []string{"VIRTUAL_ENV=/opt/env"}, CreatedAt: time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC),
	}
}

func newStore(t *testing.T) *rootfs.Store {
	t.Helper()
	s, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	return s
}

func distInfo(name, version, more string) (string, string) {
	return site + name + "-" + version + ".dist-info/METADATA", "Metadata-Version: 2.4\nName: " + name + "\nVersion: " + version + "\n" + more + "\nBody\nName: not-this\n"
}

func with(files map[string]string, name, version, more string) {
	p, text := distInfo(name, version, more)
	files[p] = text
}

// someFiles is an environment with one of everything.
func someFiles() map[string]string {
	files := map[string]string{
		"opt/env/pyvenv.cfg":                                   "home = /usr/bin\nversion_info = 3.11.2\n",
		site + "web_app-1.0.dist-info/RECORD":                  "web_app.py,,\n",
		site + "web_app-1.0.dist-info/licenses/LICENSE":        "do as you like",
		site + "fast-2.0.dist-info/WHEEL":                      "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux2014_x86_64\nTag: cp311-cp311-manylinux_2_17_x86_64\n",
		site + "direct-1.dist-info/direct_url.json":            `{"url":"https://me:secret@example.org/a.whl?token=x","archive_info":{"hashes":{"sha256":"` + strings.Repeat("d", 64) + `"}}}`,
		site + "setuptools/_vendor/inner-9.dist-info/METADATA": "Name: inner\nVersion: 9\n",
		"opt/env/conda-meta/libz-1.3-h1_0.json": `{"name":"libz","version":"1.3","build":"h1_0","subdir":"linux-64","channel":"https://user:pw@conda.example/t/tk-secret/main/linux-64","fn":"libz-1.3-h1_0.conda",` +
			`"url":"https://user:pw@conda.example/t/tk-secret/main/linux-64/libz-1.3-h1_0.conda","sha256":"` + strings.Repeat("c", 64) + `","md5":"` + strings.Repeat("a", 32) + `","license":"Zlib","depends":[],"files":["lib/libz.so"]}`,
		"opt/env/conda-meta/six-1.16-py_0.json": `{"name":"six","version":"1.16","build":"py_0","subdir":"noarch","channel":"main","fn":"six-1.16-py_0.tar.bz2","depends":["libz >=1","python"],"license":"MIT License",` +
			`"files":["lib/python3.11/site-packages/six-1.16.0.dist-info/METADATA"]}`,
	}
	with(files, "web_app", "1.0", "Summary: an\x1b[31m app\nLicense-Expression: mit OR Apache-2.0\nLicense-File: LICENSE\nLicense-File: ../../../etc/passwd\n"+
		"Requires-Dist: Fast[speed] (>=1)\nRequires-Dist: gone; python_version < '3'\nRequires-Dist: six\nRequires-Dist: not-installed\n")
	with(files, "fast", "2.0", "License: BSD\n        Redistribution …\nClassifier: License :: OSI Approved :: BSD License\nProvides-Extra: speed\nRequires-Dist: turbo; extra == 'speed'\nRequires-Dist: direct; extra == 'other'\n")
	with(files, "turbo", "3.0+local.1", "Classifier: License :: OSI Approved :: ISC License (ISCL)\nRequires-Dist: fast\n")
	with(files, "direct", "1", "License: UNKNOWN\n")
	with(files, "six", "1.16.0", "")
	return files
}

const pylock = `lock-version = "1.0"
[[packages]]
name = "fast"
version = "2.0"
wheels = [
 {url = "https://files.example/fast-2.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", hashes = {sha256 = "1111111111111111111111111111111111111111111111111111111111111111"}},
 {url = "https://files.example/fast-2.0-cp312-cp312-manylinux_2_17_x86_64.whl", hashes = {sha256 = "2222222222222222222222222222222222222222222222222222222222222222"}},
]
[[packages]]
name = "turbo"
version = "3.0+local.1"
wheels = [
 {name = "turbo-3.0+local.1-py3-none-any.whl", hashes = {sha256 = "3333333333333333333333333333333333333333333333333333333333333333"}},
 {name = "turbo-3.0+local.1-py2-none-any.whl", hashes = {sha256 = "4444444444444444444444444444444444444444444444444444444444444444"}},
]
`

func read(t *testing.T, store *rootfs.Store, e *envs.Env, kind, lock string) *Inventory {
	t.Helper()
	tree, err := OpenTree(store, e)
	require.NoError(t, err)
	v, err := Read(tree, e, kind, []byte(lock))
	require.NoError(t, err)
	return v
}

func TestWhatIsInstalledIsKnown(t *testing.T) {
	store := newStore(t)
	v := read(t, store, publish(t, store, someFiles()), "pylock", pylock)
	require.Equal(t, "3.11.2", v.Python)
	byName := map[string]Package{}
	var names []string
	for _, p := range v.Packages {
		byName[p.Name] = p
		names = append(names, p.PURL())
	}
	require.Equal(t, []string{
		"pkg:conda/libz@1.3?build=h1_0&channel=main&subdir=linux-64&type=conda", "pkg:conda/six@1.16?build=py_0&channel=main&subdir=noarch&type=tar.bz2",
		"pkg:pypi/direct@1", "pkg:pypi/fast@2.0", "pkg:pypi/turbo@3.0%2Blocal.1", "pkg:pypi/web-app@1.0",
	}, names, "six is conda's, inner is setuptools' own")
	app := byName["web-app"]
	require.Equal(t, Licence{Expression: "MIT OR Apache-2.0"}, app.Licence)
	require.Equal(t, []string{"/" + site + "web_app-1.0.dist-info/licenses/LICENSE"}, app.LicenceFiles, "none outside")
	require.Equal(t, "an [31m app", app.Summary, "no escapes")
	require.Len(t, app.Record, 64)
	require.Equal(t, Licence{Names: []string{"BSD", "BSD License"}}, byName["fast"].Licence)
	require.Equal(t, Licence{Expression: "ISC"}, byName["turbo"].Licence)
	require.Equal(t, Licence{}, byName["direct"].Licence)
	require.Equal(t, Licence{Expression: "Zlib"}, byName["libz"].Licence)
	require.Equal(t, Licence{Names: []string{"MIT License"}}, byName["six"].Licence, "a name, not an identifier")
	require.Equal(t, "six 1.16.0", byName["six"].Project+" "+byName["six"].ProjectVersion)
	require.Equal(t, strings.Repeat("1", 64), byName["fast"].SHA256, "the wheel with the tags of the installed one")
	require.Equal(t, []string{strings.Repeat("3", 64), strings.Repeat("4", 64)}, byName["turbo"].Locked, "either")
	require.Equal(t, "https://example.org/a.whl", byName["direct"].URL)
	require.Equal(t, strings.Repeat("d", 64), byName["direct"].SHA256)
	require.Equal(t, "https://conda.example/main/linux-64/libz-1.3-h1_0.conda", byName["libz"].URL)
	needs := func(name string) (out []string) {
		for _, i := range byName[name].Depends {
			out = append(out, v.Packages[i].Name)
		}
		return out
	}
	require.Equal(t, []string{"six", "fast"}, needs("web-app"))
	require.Equal(t, []string{"turbo"}, needs("fast"), "by the extra that web-app asks for, and no other")
	require.Equal(t, []string{"fast"}, needs("turbo"))
	require.Equal(t, []string{"libz"}, needs("six"))
}

func TestRequirementsLockGivesHashes(t *testing.T) {
	store := newStore(t)
	files := map[string]string{}
	with(files, "one", "1.0", "")
	with(files, "two", "1.0", "Requires-Dist: one; extra == 'x'\n")
	a, b := strings.Repeat("a", 64), strings.Repeat("b", 64)
	v := read(t, store, publish(t, store, files), "requirements", "--index-url https://x\none==1.0 \\\n    --hash=sha256:"+a+"  # via two\ntwo[x]==1.0 --hash=sha256:"+a+" --hash=sha256:"+b+"\n")
	require.Equal(t, a, v.Packages[0].SHA256)
	require.Equal(t, []string{a, b}, v.Packages[1].Locked)
	require.Equal(t, []int{0}, v.Packages[1].Depends, "by the extra of the lock")
}

func TestDamagedMetadataIsNamed(t *testing.T) {
	for name, c := range map[string]struct{ file, text, says string }{
		"no name":         {site + "x-1.dist-info/METADATA", "Version: 1\n", "x-1.dist-info/METADATA"},
		"binary":          {site + "x-1.dist-info/METADATA", "\x00\xff\xfe", "x-1.dist-info/METADATA"},
		"empty":           {site + "x-1.dist-info/METADATA", "", "x-1.dist-info/METADATA"},
		"conda-meta":      {"opt/env/conda-meta/x-1-0.json", `{"name":`, "conda-meta/x-1-0.json"},
		"conda-meta type": {"opt/env/conda-meta/x-1-0.json", `{"name":1,"version":"1"}`, "conda-meta/x-1-0.json"},
	} {
		t.Run(name, func(t *testing.T) {
			store := newStore(t)
			tree, err := OpenTree(store, publish(t, store, map[string]string{c.file: c.text}))
			require.NoError(t, err)
			_, err = Read(tree, &envs.Env{}, "", nil)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestContentThatChangedInTheStoreIsNotRead(t *testing.T) {
	store := newStore(t)
	files := map[string]string{}
	with(files, "x", "1", "")
	e := publish(t, store, files)
	tree, err := OpenTree(store, e)
	require.NoError(t, err)
	var object string
	for _, f := range tree.Files() {
		if d := tree.entries[f].Digest; d != "" {
			object = store.Path("objects", d[:2], d[2:])
		}
	}
	require.NoError(t, os.Chmod(object, 0o644))
	require.NoError(t, os.WriteFile(object, []byte("Name: y\nVersion: 2\n"), 0o600))
	_, err = Read(tree, e, "", nil)
	require.ErrorContains(t, err, "changed in the store")
}

func TestLayersLieUponEachOther(t *testing.T) {
	store := newStore(t)
	parent, child := map[string]string{}, map[string]string{}
	with(parent, "a", "1", "")
	with(parent, "b", "1", "")
	with(child, "c", "1", "Requires-Dist: a\n")
	below, e := publish(t, store, parent), publish(t, store, child)
	e.Below = []string{below.Digest}
	v := read(t, store, e, "", "")
	require.Len(t, v.Packages, 3)
	require.Equal(t, []int{0}, v.Packages[2].Depends)
}

func documents(t *testing.T, v *Inventory) (cyclone, spdx []byte) {
	t.Helper()
	var a, b bytes.Buffer
	require.NoError(t, v.CycloneDX(&a, "1.0"))
	require.NoError(t, v.SPDX(&b, "1.0"))
	return a.Bytes(), b.Bytes()
}

func inventoryWithBase(t *testing.T) *Inventory {
	t.Helper()
	store := newStore(t)
	v := read(t, store, publish(t, store, someFiles()), "pylock", pylock)
	require.NoError(t, v.AddBase(rootfs.Base{Name: "debian", Lowers: []string{debianRoot(t)}}))
	return v
}

func debianRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for p, text := range map[string]string{
		"etc/os-release": "ID=debian\nVERSION_ID=\"12\"\n",
		"var/lib/dpkg/status": "Package: libssl3\nStatus: install ok installed\nArchitecture: amd64\nSource: openssl (3.0.1-1)\nVersion: 3.0.1-1+b1\nDescription: TLS\n more\n\n" +
			"Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nPackage: epoch\nStatus: install ok installed\nArchitecture: all\nVersion: 2:1.0~rc1\n",
	} {
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(root, p)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(root, p), []byte(text), 0o600))
	}
	return root
}

func TestBasePackages(t *testing.T) {
	v := inventoryWithBase(t)
	debs := v.Packages[6:]
	require.Equal(t, "pkg:deb/debian/epoch@2:1.0~rc1?arch=all&distro=debian-12", debs[0].PURL())
	require.Equal(t, "pkg:deb/debian/libssl3@3.0.1-1%2Bb1?arch=amd64&distro=debian-12", debs[1].PURL())
	require.Equal(t, "openssl 3.0.1-1", debs[1].source+" "+debs[1].sourceVersion)
	require.Len(t, debs, 2)
	// A status that is a link out of the base is not followed.
	root := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(root, "var/lib/dpkg"), 0o755))
	require.NoError(t, os.Symlink(filepath.Join(debianRoot(t), "var/lib/dpkg/status"), filepath.Join(root, "var/lib/dpkg/status")))
	w := &Inventory{}
	require.NoError(t, w.AddBase(rootfs.Base{Name: "x", Lowers: []string{root}}))
	require.Empty(t, w.Packages)
}

func TestBillsAreTheSameEachTime(t *testing.T) {
	v := inventoryWithBase(t)
	c1, s1 := documents(t, v)
	c2, s2 := documents(t, inventoryWithBase(t))
	require.Equal(t, string(c1), string(c2))
	require.Equal(t, string(s1), string(s2))
	for _, doc := range [][]byte{c1, s1} {
		require.NotContains(t, string(doc), "secret")
		require.NotContains(t, string(doc), "user:pw")
		require.Contains(t, string(doc), strings.TrimPrefix(v.Env.Digest, "sha256:"))
		require.Contains(t, string(doc), "2026-02-03T04:05:06Z")
	}
	var c struct {
		Components   []struct{ Name string }
		Dependencies []struct {
			Ref       string
			DependsOn []string
		}
	}
	require.NoError(t, json.Unmarshal(c1, &c))
	require.Len(t, c.Components, 8)
	require.Len(t, c.Dependencies, 9)
	require.Contains(t, c.Dependencies[0].DependsOn, "pkg:pypi/web-app@1.0")
	require.NotContains(t, c.Dependencies[0].DependsOn, "pkg:pypi/turbo@3.0%2Blocal.1", "fast needs it")
}

// The official schema of CycloneDX and SPDX's own validator, from the index.
const validate = `import sys
from cyclonedx.validation.json import JsonStrictValidator
from cyclonedx.schema import SchemaVersion
from cyclonedx.model.bom import Bom
import json
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
text = open(sys.argv[1]).read()
bad = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
print("cyclonedx", bad, len(list(Bom.from_json(json.loads(text)).components)))
d = parse_file(sys.argv[2])
print("spdx", [m.validation_message for m in validate_full_spdx_document(d)], len(d.packages))
`

func TestBillsAreValid(t *testing.T) {
	python := need.Packages(t, "cyclonedx-python-lib[json-validation]==11.12.0", "spdx-tools==0.8.5")
	dir := t.TempDir()
	c, s := documents(t, inventoryWithBase(t))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "c.json"), c, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "s.spdx.json"), s, 0o600))
	cmd := exec.Command(python, "-c", validate, filepath.Join(dir, "c.json"), filepath.Join(dir, "s.spdx.json"))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "cyclonedx None 8\nspdx [] 9\n", string(out))
}

// ---- scanning -------------------------------------------------------------------

func writeDB(t *testing.T, records ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i, r := range records {
		require.NoError(t, os.WriteFile(filepath.Join(dir, string(rune('a'+i))+".json"), []byte(r), 0o600))
	}
	return dir
}

func osv(id, name, rest string) string {
	return `{"id":"` + id + `","affected":[{"package":{"ecosystem":"PyPI","name":"` + name + `"},` + rest + `}]}`
}

func scanned(t *testing.T, o ScanOptions) *ScanResult {
	t.Helper()
	store := newStore(t)
	v := read(t, store, publish(t, store, someFiles()), "", "")
	if o.Now.IsZero() {
		o.Now = time.Date(2026, 6, 30, 12, 0, 0, 0, time.UTC)
	}
	r, err := v.Scan(t.Context(), o)
	require.NoError(t, err)
	return r
}

func TestRangesAreAsOSVHasThem(t *testing.T) {
	events := func(kind, e string) string { return `"ranges":[{"type":"` + kind + `","events":[` + e + `]}]` }
	for _, c := range []struct {
		name, affected string
		hit, judged    bool
	}{
		{"before the fix", events("ECOSYSTEM", `{"introduced":"0"},{"fixed":"2.1"}`), true, true},
		{"the fix", events("ECOSYSTEM", `{"introduced":"0"},{"fixed":"2"}`), false, true},
		{"events in any order", events("ECOSYSTEM", `{"fixed":"1.0"},{"introduced":"1.5"},{"introduced":"0"}`), true, true},
		{"between two", events("ECOSYSTEM", `{"introduced":"0"},{"fixed":"1.0"},{"introduced":"2.0.post1"}`), false, true},
		{"last affected", events("ECOSYSTEM", `{"introduced":"0"},{"last_affected":"2.0.0"}`), true, true},
		{"after the last affected", events("ECOSYSTEM", `{"introduced":"0"},{"last_affected":"1.9"}`), false, true},
		{"pre-releases", events("ECOSYSTEM", `{"introduced":"2.0rc1"},{"fixed":"2.0.post1"}`), true, true},
		{"limit", events("ECOSYSTEM", `{"introduced":"0"},{"limit":"1.0"}`), false, true},
		{"no end", events("ECOSYSTEM", `{"introduced":"2.0"},{"limit":"*"}`), true, true},
		{"semver", events("SEMVER", `{"introduced":"2.0.0-rc.1"},{"fixed":"2.0.1"}`), true, true},
		{"commits", events("GIT", `{"introduced":"0"}`), false, true},
		{"listed", `"versions":["1.0","2.0.0"]`, true, true},
		{"not listed", `"versions":["1.0"]`, false, true},
		{"unreadable event", events("ECOSYSTEM", `{"introduced":"0"},{"fixed":"next"}`), false, false},
		{"unreadable event, but listed versions", events("ECOSYSTEM", `{"introduced":"0"},{"fixed":"next"}`) + `,"versions":["1.0"]`, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := scanned(t, ScanOptions{Database: writeDB(t, osv("X-1", "Fast", c.affected))})
			require.Equal(t, c.hit, len(r.Findings) == 1)
			require.Equal(t, c.judged, len(r.Unjudged) == 0)
		})
	}
}

const everything = `"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"99"}]}]`

func TestScanFindsEachOnce(t *testing.T) {
	db := writeDB(t,
		`{"id":"GHSA-1","aliases":["CVE-1"],"summary":"bad\u001b[0m","database_specific":{"severity":"HIGH","cwe_ids":[]},"affected":[{"package":{"ecosystem":"PyPI","name":"fast"},`+everything+`}]}`,
		`[{"id":"PYSEC-1","aliases":["CVE-1"],"affected":[{"package":{"ecosystem":"PyPI","name":"fast"},`+everything+`}]}]`,
		`{"id":"GONE","withdrawn":"2024-01-01T00:00:00Z","affected":[{"package":{"ecosystem":"PyPI","name":"fast"},`+everything+`}]}`,
		osv("SIX-1", "six", everything)+"\n"+osv("VENDORED", "inner", everything),
		`{"id":"NPM","affected":[{"package":{"ecosystem":"npm","name":"fast"},`+everything+`}]}`,
		`{"id":"LOW","severity":[{"type":"CVSS_V3","score":"CVSS:3.1/AV:L/AC:H/PR:H/UI:R/S:U/C:L/I:N/A:N"}],"affected":[{"package":{"ecosystem":"PyPI","name":"turbo"},`+everything+`}]}`,
	)
	r := scanned(t, ScanOptions{Database: db, Severity: "high"})
	require.Len(t, r.Findings, 2)
	require.Equal(t, []string{"six SIX-1 unknown", "fast GHSA-1 high"}, []string{
		r.Findings[0].Package + " " + r.Findings[0].ID + " " + r.Findings[0].Severity, r.Findings[1].Package + " " + r.Findings[1].ID + " " + r.Findings[1].Severity,
	})
	require.Equal(t, []string{"CVE-1", "PYSEC-1"}, r.Findings[1].Aliases)
	require.Equal(t, []string{"99"}, r.Findings[1].Fixed)
	require.Equal(t, "bad [0m", r.Findings[1].Summary)
	require.Equal(t, 1, r.Below)
	require.Equal(t, 7, r.Records)
	require.Len(t, scanned(t, ScanOptions{Database: db}).Findings, 3)
}

func TestDebianIsComparedBySource(t *testing.T) {
	v := &Inventory{}
	require.NoError(t, v.AddBase(rootfs.Base{Name: "debian", Lowers: []string{debianRoot(t)}}))
	debian := func(id, eco, fixed string) string {
		return `{"id":"` + id + `","affected":[{"package":{"ecosystem":"` + eco + `","name":"openssl"},"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"` + fixed + `"}]}]}]}`
	}
	r, err := v.Scan(t.Context(), ScanOptions{Database: writeDB(t, debian("A", "Debian:12", "3.0.1-1+deb12u1"), debian("B", "Debian:12", "3.0.1-1"), debian("C", "Debian:11", "9"))})
	require.NoError(t, err)
	require.Len(t, r.Findings, 1)
	require.Equal(t, "A libssl3", r.Findings[0].ID+" "+r.Findings[0].Package)
}

func TestIgnoreListsExpire(t *testing.T) {
	db := writeDB(t, `{"id":"GHSA-1","aliases":["CVE-1"],"affected":[{"package":{"ecosystem":"PyPI","name":"fast"},`+everything+`}]}`)
	for _, c := range []struct {
		name, text string
		ignored    bool
		expired    string
		unused     []string
	}{
		{"by alias", "[[ignore]]\nid='CVE-1'\nreason='r'\n", true, "", nil},
		{"on its last day", "[[ignore]]\nid='GHSA-1'\nreason='r'\nuntil=2026-06-30\n", true, "", nil},
		{"expired", "[[ignore]]\nid='GHSA-1'\nreason='r'\nuntil=2026-06-29\n", false, "2026-06-29", nil},
		{"expired, and ignored again", "[[ignore]]\nid='GHSA-1'\nreason='r'\nuntil=2026-06-29\n[[ignore]]\nid='CVE-1'\nreason='r'\n", true, "", nil},
		{"of another package", "[[ignore]]\nid='GHSA-1'\nreason='r'\npackage='other'\n", false, "", []string{"GHSA-1"}},
		{"of this package", "[[ignore]]\nid='GHSA-1'\nreason='r'\npackage='Fast'\n", true, "", nil},
		{"another", "[[ignore]]\nid='GHSA-2'\nreason='r'\n", false, "", []string{"GHSA-2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := filepath.Join(t.TempDir(), "ignore.toml")
			require.NoError(t, os.WriteFile(p, []byte(c.text), 0o600))
			r := scanned(t, ScanOptions{Database: db, Ignore: p})
			require.Equal(t, c.ignored, len(r.Ignored) == 1)
			require.Equal(t, !c.ignored, len(r.Findings) == 1)
			require.Equal(t, c.unused, r.Unused)
			var b bytes.Buffer
			require.NoError(t, r.Table(&b))
			if c.expired != "" {
				require.Equal(t, c.expired, r.Findings[0].ExpiredOn)
				require.Contains(t, b.String(), "was ignored until "+c.expired)
			}
		})
	}
}

func TestWhatCannotBeScannedIsAnError(t *testing.T) {
	good := osv("X", "fast", everything)
	empty, zipped, noReason := t.TempDir(), filepath.Join(t.TempDir(), "all.zip"), filepath.Join(t.TempDir(), "i.toml")
	require.NoError(t, os.WriteFile(noReason, []byte("[[ignore]]\nid='X'\n"), 0o600))
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	f, err := w.Create("X.json")
	require.NoError(t, err)
	_, err = f.Write([]byte(good))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.NoError(t, os.WriteFile(zipped, b.Bytes(), 0o600))
	require.Len(t, scanned(t, ScanOptions{Database: zipped}).Findings, 1)
	truncated := filepath.Join(t.TempDir(), "all.zip")
	require.NoError(t, os.WriteFile(truncated, b.Bytes()[:b.Len()/2], 0o600))
	store := newStore(t)
	v := read(t, store, publish(t, store, someFiles()), "", "")
	for name, c := range map[string]struct {
		o    ScanOptions
		says string
	}{
		"no such file":     {ScanOptions{Database: "/nonexistent"}, "no such file"},
		"empty directory":  {ScanOptions{Database: empty}, "no record"},
		"truncated ZIP":    {ScanOptions{Database: truncated}, "zip"},
		"one bad record":   {ScanOptions{Database: writeDB(t, good, "{")}, "b.json"},
		"no record at all": {ScanOptions{Database: writeDB(t, good, `{"x":1}`)}, "b.json: not a record"},
		"other ecosystem":  {ScanOptions{Database: writeDB(t, `{"id":"N","affected":[{"package":{"ecosystem":"npm","name":"x"}}]}`)}, "no record of PyPI"},
		"ignore: reason":   {ScanOptions{Database: writeDB(t, good), Ignore: noReason}, "id and reason"},
		"ignore: gone":     {ScanOptions{Database: writeDB(t, good), Ignore: "/nonexistent"}, "no such file"},
		"severity":         {ScanOptions{Database: writeDB(t, good), Severity: "huge"}, "not known"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := v.Scan(t.Context(), c.o)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = v.Scan(ctx, ScanOptions{Database: writeDB(t, good)})
	require.ErrorIs(t, err, context.Canceled)
}

// From FIRST's own examples.
func TestScores(t *testing.T) {
	for vector, want := range map[string]float64{
		"CVSS:3.0/AV:N/AC:L/PR:N/UI:R/S:C/C:L/I:L/A:N": 6.1, "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H": 9.8, "CVSS:3.0/AV:N/AC:L/PR:L/UI:N/S:C/C:L/I:L/A:N": 6.4,
		"CVSS:3.1/AV:N/AC:H/PR:N/UI:R/S:U/C:L/I:N/A:N": 3.1, "CVSS:3.0/AV:L/AC:L/PR:H/UI:N/S:U/C:L/I:L/A:L": 4.2, "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:C/C:H/I:H/A:H": 10,
		"CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:N/I:N/A:N": 0, "CVSS:3.1/AV:X": 0, "": 0, "CVSS:4.0/AV:N/AC:L": 0,
	} {
		require.InDelta(t, want, cvss3(vector), 0.0001, vector)
	}
}

func TestDebianAndSemanticVersions(t *testing.T) {
	for kind, list := range map[string][]string{
		Deb:    {"0", "1.0~~", "1.0~~a", "1.0~", "1.0", "1.0-1", "1.0-1+b1", "1.0-1.1", "1.0-10", "1.0a", "1.0+dfsg", "1.0.1", "1:0.1", "2:0"},
		semver: {"0.9", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.10.0", "2"},
	} {
		for i, a := range list {
			for j, b := range list {
				c, ok := compareVersions(kind, a, b)
				require.True(t, ok)
				require.Equal(t, min(max(i-j, -1), 1), c, "%s: %s against %s", kind, a, b)
			}
		}
	}
	_, ok := compareVersions(semver, "1.x", "1")
	require.False(t, ok)
}

// As dpkg says.
func TestSameAsDpkg(t *testing.T) {
	if _, err := exec.LookPath("dpkg"); err != nil {
		t.Skip("needs dpkg")
	}
	list := []string{"1.0", "1.0-0", "1.0~rc1-1", "1.0+git20240101-2", "1:1.0", "1.0-1~bpo12+1", "7.88.1-10+deb12u5", "7.88.1-10+deb12u12", "1.2.a", "1.2.+", "09", "9"}
	for _, a := range list {
		for _, b := range list {
			less := exec.Command("dpkg", "--compare-versions", a, "lt", b).Run() == nil
			require.Equal(t, less, compareDebian(a, b) < 0, "%s < %s", a, b)
		}
	}
}

func TestDiff(t *testing.T) {
	store := newStore(t)
	files := someFiles()
	a := publish(t, store, files)
	delete(files, site+"direct-1.dist-info/METADATA")
	delete(files, site+"direct-1.dist-info/direct_url.json")
	delete(files, site+"turbo-3.0+local.1.dist-info/METADATA")
	with(files, "turbo", "4", "")
	files["opt/env/pyvenv.cfg"] = "version = 3.11.3\n"
	b := publish(t, store, files)
	b.Vars = append(b.Vars, "EMPTY=")
	va, vb := read(t, store, a, "", ""), read(t, store, b, "", "")
	d, err := Diff(store, a, b, va.Packages, vb.Packages, true)
	require.NoError(t, err)
	require.False(t, d.Same)
	require.Equal(t, []Change{{"direct", "1", ""}, {"turbo", "3.0+local.1", "4"}}, d.Packages)
	require.Equal(t, []Change{{"EMPTY", "", `""`}}, d.Vars)
	require.Equal(t, []int{2, 5, 1}, []int{d.FilesAdded, d.FilesRemoved, d.FilesChanged})
	var out bytes.Buffer
	require.NoError(t, d.Text(&out))
	require.Contains(t, out.String(), "- package turbo 3.0+local.1\n+ package turbo 4\n+ variable EMPTY \"\"\n")
	require.Contains(t, out.String(), "- /opt/env/pyvenv.cfg 444 sha256:")
	d, err = Diff(store, a, a, va.Packages, va.Packages, true)
	require.NoError(t, err)
	require.True(t, d.Same)
}

// ---- hostile text ---------------------------------------------------------------

func FuzzMetadata(f *testing.F) {
	f.Add("Name: x\nVersion: 1\nRequires-Dist: y[z] ; extra == 'a'\nLicense: MIT\n", "x==1 --hash=sha256:"+strings.Repeat("a", 64))
	f.Add("Name: x\n folded\n\tfolded\nLicense-Expression: (MIT OR (GPL-2.0+ WITH x))\nClassifier: License :: OSI Approved", "[[packages]]\n")
	f.Fuzz(func(t *testing.T, text, lock string) {
		hs := parseMetadata(text)
		l := licenceOf(hs)
		for _, n := range append(l.Names, l.Expression, clean(get(hs, "summary"), 100)) {
			if strings.ContainsAny(n, "\x00\x1b\n\r") {
				t.Fatalf("%q", n)
			}
		}
		parseStatus(text, "debian", "12")
		for _, kind := range []string{"requirements", "pylock"} {
			if s, err := readLock(kind, []byte(lock)); err == nil {
				p := Package{Name: "x", Version: "1"}
				s.apply(&p, []string{"py3-none-any"})
			}
		}
	})
}

func FuzzOSV(f *testing.F) {
	f.Add([]byte(osv("X", "fast", everything)), "1.0")
	f.Add([]byte(`[{"id":"a","affected":[{"ranges":[{"type":"SEMVER","events":[{"introduced":"x"},{"limit":"*"}]}]}],"database_specific":1}]`), "1.0-1")
	f.Fuzz(func(t *testing.T, text []byte, version string) {
		d := &database{use: func(r *osvRecord) {
			for i := range r.Affected {
				for _, kind := range []string{PyPI, Deb, semver} {
					hit, _, judged := r.Affected[i].affects(kind, version)
					if hit && !judged {
						t.Fatal("found, and not judged")
					}
				}
				r.severity(&r.Affected[i])
			}
		}}
		_ = d.read(t.Context(), "x.json", bytes.NewReader(text))
	})
}

func FuzzVersions(f *testing.F) {
	f.Add("1.0~rc1-1", "1:2+b1")
	f.Add("1.0.0-alpha.1", "1.0.0")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, kind := range []string{PyPI, Deb, semver} {
			c, ok := compareVersions(kind, a, b)
			d, ok2 := compareVersions(kind, b, a)
			if ok != ok2 || c != -d {
				t.Fatalf("%s: %q %q: %d and %d", kind, a, b, c, d)
			}
		}
	})
}

// A chain of extras that ask for one another, each found a round later, is read a
// bounded number of times.
func TestExtrasThatAskForExtrasEnd(t *testing.T) {
	p := Package{System: PyPI, Name: "a", Version: "1"}
	for i := 3000; i > 0; i-- {
		q, err := recipes.ParseDependency(fmt.Sprintf("a[x%d] ; extra == 'x%d'", i, i-1))
		require.NoError(t, err)
		p.requires = append(p.requires, q)
	}
	v := &Inventory{Python: "3.11.2", Packages: []Package{p}}
	v.link(lockedSet{extras: map[string][]string{"a": {"x0"}}})
	require.Len(t, v.Packages[0].extras, maxRounds+1)
}
