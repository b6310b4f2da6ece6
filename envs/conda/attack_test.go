package conda

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// thing is one entry of a crafted archive.
type thing struct {
	name string
	typ  byte // 0: a file
	link string
	data string
	mode int64
}

// crafted is a .conda archive nobody would build.
type crafted struct {
	name   string // of the package; "": evil
	things []thing
	info   map[string]string // replaces what is made of things; "" leaves one out
	extra  []thing           // more of the info part
	noarch string
	// zip changes the parts' writing; nil: as they should be.
	zip func(t testing.TB, w *zip.Writer, info, pkg []byte)
}

func tarOf(t testing.TB, list []thing) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, x := range list {
		h := &tar.Header{Name: x.name, Typeflag: x.typ, Linkname: x.link, Mode: x.mode, ModTime: time.Unix(1.6e9, 0), Format: tar.FormatPAX}
		if x.typ == 0 {
			h.Typeflag, h.Size = tar.TypeReg, int64(len(x.data))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		require.NoError(t, w.WriteHeader(h))
		if h.Size > 0 {
			_, err := io.WriteString(w, x.data)
			require.NoError(t, err)
		}
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	return w.EncodeAll(b, nil)
}

func stored(t testing.TB, w *zip.Writer, name string, data []byte) {
	t.Helper()
	f, err := w.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Store})
	require.NoError(t, err)
	_, err = f.Write(data)
	require.NoError(t, err)
}

func hexOf(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func (c crafted) bytes(t testing.TB) []byte {
	t.Helper()
	type entry map[string]any
	paths := []entry{}
	for _, x := range c.things {
		switch x.typ {
		case 0:
			paths = append(paths, entry{"_path": x.name, "path_type": "hardlink", "sha256": hexOf(x.data), "size_in_bytes": len(x.data)})
		case tar.TypeSymlink:
			paths = append(paths, entry{"_path": x.name, "path_type": "softlink"})
		case tar.TypeLink:
			paths = append(paths, entry{"_path": x.name, "path_type": "hardlink"})
		}
	}
	list, err := json.Marshal(map[string]any{"paths_version": 1, "paths": paths})
	require.NoError(t, err)
	index := map[string]any{"name": c.called(), "version": "1", "build": "0", "build_number": 0, "subdir": "linux-64", "depends": []string{}}
	if c.noarch != "" {
		index["noarch"] = c.noarch
	}
	own, err := json.Marshal(index)
	require.NoError(t, err)
	info := map[string]string{"index.json": string(own), "paths.json": string(list)}
	for k, v := range c.info {
		info[k] = v
	}
	var part []thing
	for _, k := range []string{"index.json", "paths.json", "link.json", "files", "has_prefix"} {
		if info[k] != "" {
			part = append(part, thing{name: "info/" + k, data: info[k]})
		}
	}
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	i, p := zst(t, tarOf(t, append(part, c.extra...))), zst(t, tarOf(t, c.things))
	if c.zip != nil {
		c.zip(t, w, i, p)
	} else {
		stored(t, w, "metadata.json", []byte(`{"conda_pkg_format_version": 2}`))
		stored(t, w, "pkg-x.tar.zst", p)
		stored(t, w, "info-x.tar.zst", i)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func (c crafted) called() string { return cmpOr(c.name, "evil") }

// lay writes crafted packages and gives the options that install them.
func lay(t testing.TB, list ...crafted) InstallOptions {
	t.Helper()
	top := t.TempDir()
	put(t, top, map[string]string{"outside/secret": "secret"})
	archives := filepath.Join(top, "archives")
	require.NoError(t, os.Mkdir(archives, 0o755))
	l := &Lock{Platform: "linux-64"}
	for _, c := range list {
		b := c.bytes(t)
		h := sha256.Sum256(b)
		file := c.called() + "-1-0.conda"
		require.NoError(t, os.WriteFile(filepath.Join(archives, file), b, 0o644))
		l.Packages = append(l.Packages, Package{Name: c.called(), Version: "1", Build: "0", Subdir: "linux-64", FileName: file, URL: "https://conda.example/x/linux-64/" + file, Channel: "https://conda.example/x", SHA256: hex.EncodeToString(h[:])})
	}
	return InstallOptions{Lock: l, Archives: archives, Root: filepath.Join(top, "env"), Prefix: "/opt/env"}
}

// seen lists a folder's paths, the environment left out.
func seen(t testing.TB, top string) (out []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err == nil && p == filepath.Join(top, "env") {
			return filepath.SkipDir
		}
		out = append(out, p)
		return err
	}))
	return out
}

const python312 = `{"noarch": {"type": "python", "entry_points": [%]}, "package_metadata_version": 1}`

func TestCraftedArchivesAreRefusedByName(t *testing.T) {
	file := func(name string) thing { return thing{name: name, data: "x"} }
	sym := func(name, to string) thing { return thing{name: name, typ: tar.TypeSymlink, link: to} }
	paths := func(entries string) map[string]string {
		return map[string]string{"paths.json": `{"paths_version": 1, "paths": [` + entries + `]}`}
	}
	points := func(s string) crafted {
		b, _ := json.Marshal(s)
		return crafted{noarch: "python", info: map[string]string{"link.json": strings.Replace(python312, "%", string(b), 1)}}
	}
	pythonToo := crafted{name: "python", info: map[string]string{"index.json": `{"name": "python", "version": "1", "build": "0", "python_site_packages_path": "lib/py/site"}`}}
	zeros := strings.Repeat("\x00", 1<<20)
	deep := strings.Repeat("d/", 70) + "x"
	for name, c := range map[string]struct {
		crafted
		with []crafted
		o    func(*InstallOptions)
		err  string // after "install evil-1-0.conda: "
	}{
		"an absolute path":             {crafted: crafted{things: []thing{file("/outside/x")}}, err: `unpack: path "/outside/x" is absolute`},
		"a path that climbs":           {crafted: crafted{things: []thing{file("../outside/x")}}, err: `unpack: path "../outside/x" has a .. in it`},
		"a path that climbs later":     {crafted: crafted{things: []thing{file("a/../../outside/x")}}, err: `unpack: path "a/../../outside/x" has a .. in it`},
		"a path that is not clean":     {crafted: crafted{things: []thing{file("a//x")}}, err: `unpack: path "a//x" is not clean`},
		"a path too deep":              {crafted: crafted{things: []thing{file(deep)}}, err: `unpack: path "` + deep[:120] + `…" is over 64 folders deep`},
		"a name too long":              {crafted: crafted{things: []thing{file(strings.Repeat("n", 300))}}, err: `unpack: path "` + strings.Repeat("n", 120) + `…" has a name over 255 bytes`},
		"a path too long":              {crafted: crafted{things: []thing{file(strings.Repeat("nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn/", 40) + "x")}}, err: "unpack: path \"" + strings.Repeat("nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn/", 3)[:120] + "…\" is over 1024 bytes"},
		"a link out":                   {crafted: crafted{things: []thing{sym("lib/x", "../../outside/secret")}}, err: `link lib/x leads out of the prefix: "../../outside/secret"`},
		"an absolute link":             {crafted: crafted{things: []thing{sym("x", "/etc/passwd")}}, err: `link x leads out of the prefix: "/etc/passwd"`},
		"an absolute link that climbs": {crafted: crafted{things: []thing{sym("x", "/opt/env/../../etc/passwd")}}, err: `link x leads out of the prefix: "/opt/env/../../etc/passwd"`},
		"a link beside the prefix":     {crafted: crafted{things: []thing{sym("x", "/opt/env2/x")}}, err: `link x leads out of the prefix: "/opt/env2/x"`},
		"links that lead out together": {crafted: crafted{things: []thing{sym("x/y/k", "../.."), sym("x/y/m", "k/../../outside")}}, err: `link x/y/m leads out of the prefix by way of other links`},
		"links of two packages":        {crafted: crafted{things: []thing{sym("x/y/m", "k/../../outside")}}, with: []crafted{{name: "other", things: []thing{sym("x/y/k", "../..")}}}, err: `link x/y/m leads out of the prefix by way of other links`},
		"a file through a link":        {crafted: crafted{things: []thing{sym("d", "share"), file("share/y"), file("d/x")}}, err: `unpack: path "d" is a folder and a file`},
		"a file through a link out":    {crafted: crafted{things: []thing{sym("d", "../../outside"), file("d/x")}}, err: `unpack: path "d" is a folder and a file`},
		"a file through a file":        {crafted: crafted{things: []thing{file("d"), file("d/x")}}, err: `unpack: path "d" is a folder and a file`},
		"a file over a folder":         {crafted: crafted{things: []thing{file("d/x"), file("d")}}, err: `unpack: path "d" is a folder and a file`},
		"a device":                     {crafted: crafted{things: []thing{{name: "null", typ: tar.TypeChar}}}, err: `unpack: null is a device or another special file (tar type '3')`},
		"a disk":                       {crafted: crafted{things: []thing{{name: "sda", typ: tar.TypeBlock}}}, err: `unpack: sda is a device or another special file (tar type '4')`},
		"a pipe":                       {crafted: crafted{things: []thing{{name: "fifo", typ: tar.TypeFifo}}}, err: `unpack: fifo is a device or another special file (tar type '6')`},
		"a hard link through a link":   {crafted: crafted{things: []thing{sym("l", "../outside/secret"), {name: "h", typ: tar.TypeLink, link: "l"}}}, err: `unpack: hard link h: "l" is no file before it`},
		"a hard link out":              {crafted: crafted{things: []thing{{name: "h", typ: tar.TypeLink, link: "../outside/secret"}}}, err: `unpack: hard link h: path "../outside/secret" has a .. in it`},
		"a hard link to nothing":       {crafted: crafted{things: []thing{{name: "h", typ: tar.TypeLink, link: "etc/passwd"}}}, err: `unpack: hard link h: "etc/passwd" is no file before it`},

		"a bomb":           {crafted: crafted{things: []thing{{name: "zeros", data: strings.Repeat(zeros, 80)}}}, err: "unpack: write zeros: unpacks to more than is allowed: 500 times its size"},
		"a bomb in info":   {crafted: crafted{extra: []thing{{name: "info/recipe/zeros", data: strings.Repeat(zeros, 80)}}}, err: "unpack: unpacks to more than is allowed: 500 times its size"},
		"too many bytes":   {crafted: crafted{things: []thing{{name: "zeros", data: zeros}}}, o: func(o *InstallOptions) { o.Limits.Bytes = 1000 }, err: "unpack: unpacks to more than is allowed: 1000 bytes"},
		"too many entries": {crafted: crafted{things: []thing{file("a"), file("b"), file("c"), file("d")}}, o: func(o *InstallOptions) { o.Limits.Entries = 5 }, err: "unpack: unpacks to more than is allowed: 5 entries"},

		"no archive":         {crafted: crafted{}, o: func(o *InstallOptions) { os.Remove(filepath.Join(o.Archives, "evil-1-0.conda")) }, err: "its archive is not there"},
		"another hash":       {crafted: crafted{}, o: func(o *InstallOptions) { o.Lock.Packages[0].SHA256 = sum }, err: "archive has sha256 HASH, the lock says " + sum},
		"another md5":        {crafted: crafted{}, o: func(o *InstallOptions) { o.Lock.Packages[0].SHA256, o.Lock.Packages[0].MD5 = "", sum5 }, err: "archive has md5 HASH, the lock says " + sum5},
		"another size":       {crafted: crafted{}, o: func(o *InstallOptions) { o.Lock.Packages[0].SizeBytes = 7 }, err: "archive has SIZE bytes, the lock says 7"},
		"no zip":             {crafted: crafted{}, o: func(o *InstallOptions) { rewrite(o, []byte("PK\x03\x04")) }, err: "open archive: zip: not a valid zip file"},
		"an archive cut off": {crafted: crafted{}, o: func(o *InstallOptions) { rewrite(o, nil) }, err: "open archive: zip: not a valid zip file"},
		"no info part":       {crafted: crafted{zip: func(t testing.TB, w *zip.Writer, _, p []byte) { stored(t, w, "pkg-x.tar.zst", p) }}, err: "open archive: no part info-….tar.zst"},
		"two info parts": {crafted: crafted{zip: func(t testing.TB, w *zip.Writer, i, _ []byte) {
			stored(t, w, "info-x.tar.zst", i)
			stored(t, w, "info-y.tar.zst", i)
		}}, err: "open archive: part info twice"},
		"many parts": {crafted: crafted{zip: func(t testing.TB, w *zip.Writer, i, _ []byte) {
			for range 17 {
				stored(t, w, "x", nil)
			}
		}}, err: "open archive: more than the parts of a .conda file"},
		"a part in a part": {crafted: crafted{zip: func(t testing.TB, w *zip.Writer, i, _ []byte) {
			_, err := w.Create("info-x.tar.zst")
			require.NoError(t, err)
		}}, err: "open archive: part info is compressed twice"},
		"a part of no zstd": {crafted: crafted{zip: func(t testing.TB, w *zip.Writer, i, p []byte) {
			stored(t, w, "info-x.tar.zst", []byte("none"))
			stored(t, w, "pkg-x.tar.zst", p)
		}}, err: "unpack: invalid input: magic number mismatch"},
		"a part cut off": {crafted: crafted{things: []thing{{name: "x", data: strings.Repeat("random", 10000)}}, zip: func(t testing.TB, w *zip.Writer, i, p []byte) {
			stored(t, w, "info-x.tar.zst", i)
			stored(t, w, "pkg-x.tar.zst", p[:len(p)-20])
		}}, err: "unpack: unexpected EOF"},
		"info twice":          {crafted: crafted{extra: []thing{{name: "info/index.json", data: "{}"}}}, err: "unpack: info/index.json twice"},
		"no index":            {crafted: crafted{info: map[string]string{"index.json": ""}}, err: "has no info/index.json"},
		"another name":        {crafted: crafted{info: map[string]string{"index.json": `{"name": "good", "version": "1", "build": "0"}`}}, err: "says that it is good 1 0"},
		"another version":     {crafted: crafted{info: map[string]string{"index.json": `{"name": "evil", "version": "2", "build": "0"}`}}, err: "says that it is evil 2 0"},
		"another platform":    {crafted: crafted{info: map[string]string{"index.json": `{"name": "evil", "version": "1", "build": "0", "subdir": "linux-aarch64"}`}}, err: "is for linux-aarch64, not linux-64"},
		"a strange noarch":    {crafted: crafted{info: map[string]string{"index.json": `{"name": "evil", "version": "1", "build": "0", "noarch": "ruby"}`}}, err: `noarch "ruby" is neither python nor generic`},
		"no paths":            {crafted: crafted{info: map[string]string{"paths.json": ""}}, err: "has neither info/paths.json nor info/files"},
		"paths of the future": {crafted: crafted{info: map[string]string{"paths.json": `{"paths_version": 2, "paths": []}`}}, err: "info/paths.json: version 2 is unknown"},

		"a lie about size":        {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "hardlink", "size_in_bytes": 2}`)}, err: "x: has 1 bytes, paths.json says 2"},
		"a lie about content":     {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "hardlink", "sha256": "` + sum + `"}`)}, err: "x: has sha256 " + hexOf("x") + ", paths.json says " + sum},
		"a lie about a file":      {crafted: crafted{info: paths(`{"_path": "x", "path_type": "hardlink"}`)}, err: "x: the archive does not have it"},
		"a lie about a link":      {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "softlink"}`)}, err: "x: paths.json says link, the archive has a file"},
		"a lie about a folder":    {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "directory"}`)}, err: "x: paths.json says folder, the archive has a file"},
		"an absolute entry":       {crafted: crafted{info: paths(`{"_path": "/etc/x", "path_type": "directory"}`)}, err: `info/paths.json: path "/etc/x" is absolute`},
		"an entry that climbs":    {crafted: crafted{info: paths(`{"_path": "a/../../x", "path_type": "directory"}`)}, err: `info/paths.json: path "a/../../x" has a .. in it`},
		"an entry twice":          {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "hardlink"}, {"_path": "x", "path_type": "hardlink"}`)}, err: "info/paths.json: x twice"},
		"a strange type":          {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "socket"}`)}, err: `x: path_type "socket" is unknown`},
		"a strange mode":          {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "hardlink", "prefix_placeholder": "/p", "file_mode": "x"}`)}, err: `x: file_mode "x" is neither text nor binary`},
		"a placeholder that ends": {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "hardlink", "prefix_placeholder": "/p\u0000x", "file_mode": "binary"}`)}, err: `x: prefix_placeholder "/p?x" is no path`},
		"a short placeholder":     {crafted: crafted{things: []thing{file("x")}, info: paths(`{"_path": "x", "path_type": "hardlink", "prefix_placeholder": "x", "file_mode": "binary"}`)}, err: `write x: the prefix /opt/env is longer than the 1 bytes it was built with`},
		"a growing text":          {crafted: crafted{things: []thing{{name: "x", data: strings.Repeat("x", 1000)}}, info: paths(`{"_path": "x", "path_type": "hardlink", "prefix_placeholder": "x", "file_mode": "text"}`)}, o: func(o *InstallOptions) { o.Limits.Bytes = 4000 }, err: `write x: unpacks to more than is allowed`},

		"its own record":        {crafted: crafted{things: []thing{file("conda-meta/good-1-0.json")}}, err: "conda-meta/good-1-0.json is not a package's to write"},
		"the history":           {crafted: crafted{things: []thing{file("conda-meta/history")}}, err: "conda-meta/history is not a package's to write"},
		"conda-meta":            {crafted: crafted{things: []thing{sym("conda-meta", "share")}}, err: "conda-meta is not a package's to write"},
		"others' losses":        {crafted: crafted{things: []thing{file("__clobbers__/good/x")}}, err: "__clobbers__/good/x is not a package's to write"},
		"no python":             {crafted: crafted{noarch: "python"}, err: "is a Python package, and the lock has no python"},
		"a command that climbs": {crafted: points("../../outside/x = m:f"), with: []crafted{pythonToo}, err: `info/link.json: entry point "../../outside/x = m:f": its name is no plain file name`},
		"an absolute command":   {crafted: points("/outside/x = m:f"), with: []crafted{pythonToo}, err: `info/link.json: entry point "/outside/x = m:f": its name is no plain file name`},
		"a hidden command":      {crafted: points(".. = m:f"), with: []crafted{pythonToo}, err: `info/link.json: entry point ".. = m:f": its name is no plain file name`},
		"code in a command":     {crafted: points("x = m:f();import os"), with: []crafted{pythonToo}, err: `info/link.json: entry point "x = m:f();import os": module and function are no Python names`},
		"code in a module":      {crafted: points("x = m\nimport os:f"), with: []crafted{pythonToo}, err: `info/link.json: entry point "x = m?import os:f": module and function are no Python names`},
		"a command twice":       {crafted: crafted{noarch: "python", info: map[string]string{"link.json": strings.Replace(python312, "%", `"x = m:f", "x = m:g"`, 1)}}, with: []crafted{pythonToo}, err: `info/link.json: entry point "x = m:g": is there twice`},
	} {
		t.Run(name, func(t *testing.T) {
			o := lay(t, append([]crafted{c.crafted}, c.with...)...)
			for i := range o.Lock.Packages { // the order of linking does not depend on it
				if p := &o.Lock.Packages[i]; p.Name == "python" {
					p.Version, p.FileName, p.URL = "3.12", "python-3.12-0.conda", "https://conda.example/x/linux-64/python-3.12-0.conda"
					fresh := crafted{name: "python", info: map[string]string{"index.json": `{"name": "python", "version": "3.12", "build": "0"}`}}.bytes(t)
					require.NoError(t, os.WriteFile(filepath.Join(o.Archives, p.FileName), fresh, 0o644))
					h := sha256.Sum256(fresh)
					p.SHA256 = hex.EncodeToString(h[:])
				}
			}
			if c.o != nil {
				c.o(&o)
			}
			top := filepath.Dir(o.Root)
			before := seen(t, top)
			_, err := Install(t.Context(), o)
			require.Error(t, err)
			got, ok := strings.CutPrefix(err.Error(), "install evil-1-0.conda: ")
			require.True(t, ok, err)
			if st, err := os.Stat(filepath.Join(o.Archives, "evil-1-0.conda")); err == nil {
				b, err := os.ReadFile(filepath.Join(o.Archives, "evil-1-0.conda"))
				require.NoError(t, err)
				got = strings.Replace(got, hexOf(string(b)), "HASH", 1)
				got = strings.Replace(got, "has "+itoa(st.Size())+" bytes, the lock", "has SIZE bytes, the lock", 1)
			}
			if strings.Contains(c.err, "md5 HASH") {
				require.Regexp(t, "^"+strings.Replace(c.err, "HASH", "[0-9a-f]{32}", 1)+"$", got)
			} else {
				require.Equal(t, c.err, got)
			}
			require.Equal(t, before, seen(t, top), "nothing outside is made or removed")
			b, err := os.ReadFile(filepath.Join(top, "outside/secret"))
			require.NoError(t, err)
			require.Equal(t, "secret", string(b))
			require.NoDirExists(t, filepath.Join(o.Root, stageName))
		})
	}
}

func itoa(n int64) string { b, _ := json.Marshal(n); return string(b) }

// rewrite replaces an archive and the lock's hash with it; nil cuts it off.
func rewrite(o *InstallOptions, b []byte) {
	p := filepath.Join(o.Archives, "evil-1-0.conda")
	if b == nil {
		b, _ = os.ReadFile(p)
		b = b[:len(b)/2]
	}
	os.WriteFile(p, b, 0o644)
	o.Lock.Packages[0].SHA256 = hexOf(string(b))
}

func TestSetIDBitsAndLinksIntoThePrefixAreMadeHarmless(t *testing.T) {
	placeholder := "/build/" + strings.Repeat("placehold_", 10)
	o := lay(t, crafted{
		things: []thing{
			{name: "bin/su", data: "x", mode: 0o6755},
			{name: "share/hard", typ: tar.TypeLink, link: "bin/su"},
			{name: "share/in", typ: tar.TypeSymlink, link: "/opt/env/bin/su"},
			{name: "share/there", typ: tar.TypeSymlink, link: placeholder + "/bin/su"},
			{name: "etc/conf", data: placeholder},
		},
		info: map[string]string{"paths.json": `{"paths_version": 1, "paths": [
			{"_path": "bin/su", "path_type": "hardlink"}, {"_path": "share/hard", "path_type": "hardlink"}, {"_path": "share/in", "path_type": "softlink"},
			{"_path": "share/there", "path_type": "softlink"}, {"_path": "etc/conf", "path_type": "hardlink", "file_mode": "text", "prefix_placeholder": "` + placeholder + `"}]}`},
	})
	_, err := Install(t.Context(), o)
	require.NoError(t, err)
	for _, name := range []string{"bin/su", "share/hard"} {
		st, err := os.Lstat(filepath.Join(o.Root, name))
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o755), st.Mode())
	}
	for _, name := range []string{"share/in", "share/there"} {
		to, err := os.Readlink(filepath.Join(o.Root, name))
		require.NoError(t, err)
		require.Equal(t, "../bin/su", to)
	}
}

func TestInstallWantsAnEmptyFolderAndACleanPrefix(t *testing.T) {
	o := lay(t, crafted{})
	put(t, o.Root, map[string]string{"x": ""})
	_, err := Install(t.Context(), o)
	require.EqualError(t, err, "install conda packages: "+o.Root+" is not empty")
	for _, prefix := range []string{"", "opt/env", "/", "/opt/../env", "/opt/env/"} {
		o := lay(t, crafted{})
		o.Prefix = prefix
		_, err := Install(t.Context(), o)
		require.EqualError(t, err, `install conda packages: prefix "`+prefix+`" is no clean absolute path`)
	}
	o = lay(t, crafted{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Install(ctx, o)
	require.ErrorIs(t, err, context.Canceled)
}

// FuzzUnpack reads tar archives of any content; nothing may be left outside.
func FuzzUnpack(f *testing.F) {
	f.Add(tarOf(f, []thing{{name: "a/b", data: "x"}, {name: "l", typ: tar.TypeSymlink, link: "a"}, {name: "h", typ: tar.TypeLink, link: "a/b"}, {name: "info/index.json", data: "{}"}}))
	f.Add(tarOf(f, []thing{{name: "../x", data: "x"}, {name: "d", typ: tar.TypeSymlink, link: "../.."}, {name: "d/x", data: "y"}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		if os.Mkdir(filepath.Join(top, "env"), 0o755) != nil {
			t.Fatal()
		}
		stage, err := openTree(unix.AT_FDCWD, filepath.Join(top, "env"))
		if err != nil {
			t.Fatal(err)
		}
		defer stage.close()
		u := unpacker{ctx: t.Context(), stage: stage, all: &budget{}, limits: Limits{Bytes: 1 << 20, Entries: 100, Ratio: 500}, packed: int64(len(data)), out: &unpacked{members: map[string]member{}, info: map[string][]byte{}}, places: newPlaces(), buf: make([]byte, 4096)}
		u.all.bytes.Store(1 << 20)
		u.all.entries.Store(100)
		err = u.tar(bytes.NewReader(data))
		if got := seen(t, top); len(got) != 1 {
			t.Fatal(got)
		}
		for name, m := range u.out.members {
			if judge(name) != nil {
				t.Fatal(name)
			}
			if m.link != "" {
				continue
			}
			if st, err := os.Lstat(filepath.Join(top, "env", m.file)); err != nil || !st.Mode().IsRegular() || st.Size() != m.size || st.Mode()&^0o777 != 0 {
				t.Fatal(name, err)
			}
		}
		if err == nil {
			list, err := u.out.paths()
			if err == nil && len(list) > 0 && u.out.info["files"] == nil && u.out.info["paths.json"] == nil {
				t.Fatal("paths of nothing")
			}
		}
	})
}
