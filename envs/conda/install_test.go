package conda_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/envs/conda"
	"github.com/sbxrun/sbxrun/test/condachannel"
)

const prefix = "/opt/env"

// archives copies a channel's packages into one folder, as a fetch would leave them.
func archives(t testing.TB, channel string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, filepath.WalkDir(channel, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(p, ".conda") && !strings.HasSuffix(p, ".tar.bz2") {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, filepath.Base(p)), b, 0o644)
	}))
	return dir
}

func lockOf(t testing.TB, channel, file string) *conda.Lock {
	t.Helper()
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	l, err := conda.Parse("", b, conda.ParseOptions{Platform: condachannel.Read(t, channel).Platform})
	require.NoError(t, err)
	return l
}

// tree is what can be seen of a folder: kind, mode and content of each path.
func tree(t testing.TB, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		st, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			out[rel] = st.Mode().String()
		case st.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			out[rel] = "-> " + to
			return err
		default:
			b, err := os.ReadFile(p)
			out[rel] = st.Mode().String() + " " + string(b)
			return err
		}
		return nil
	}))
	return out
}

// asRattler drops what differs for a reason (see Install's comment): its record
// tells of its cache and of the hour the channel was indexed at, in mode 0600.
func asRattler(t testing.TB, root, format string) map[string]string {
	t.Helper()
	out := tree(t, root)
	delete(out, "CACHEDIR.TAG")
	delete(out, "conda-meta/history")
	// Where files were moved away again, rattler leaves the folders.
	for name := range out {
		if strings.HasPrefix(name, "__clobbers__") && out[name][0] == 'd' {
			delete(out, name)
		}
	}
	for name, text := range out {
		if !strings.HasPrefix(name, "conda-meta/") {
			continue
		}
		var r map[string]any
		_, text, _ = strings.Cut(text, " ")
		require.NoError(t, json.Unmarshal([]byte(text), &r), name)
		for _, k := range []string{"link", "extracted_package_dir", "indexed_timestamp"} {
			delete(r, k)
		}
		if format == "explicit" { // it does not tell
			delete(r, "md5")
		}
		r["channel"] = strings.TrimSuffix(r["channel"].(string), "/")
		// Which of two clashing packages rattler links first is up to its threads,
		// and the order of its lists with it.
		files := map[string]any{}
		for _, e := range r["paths_data"].(map[string]any)["paths"].([]any) {
			files[e.(map[string]any)["_path"].(string)] = e
		}
		require.Len(t, r["files"], len(files))
		r["files"], r["paths_data"] = len(files), files
		b, err := json.MarshalIndent(r, "", " ")
		require.NoError(t, err)
		out[name] = string(b)
	}
	return out
}

// same compares path by path: a tree has megabytes.
func same(t *testing.T, want, got map[string]string) {
	t.Helper()
	for name, text := range want {
		if got[name] != text {
			require.Equal(t, text, got[name], name)
		}
	}
	for name := range got {
		require.Contains(t, want, name)
	}
}

func install(t testing.TB, o conda.InstallOptions) *conda.Result {
	t.Helper()
	if o.Root == "" {
		o.Root = filepath.Join(t.TempDir(), "env")
	}
	if o.Prefix == "" {
		o.Prefix = prefix
	}
	r, err := conda.Install(t.Context(), o)
	require.NoError(t, err)
	return r
}

func TestTheTreeIsRattlers(t *testing.T) {
	channel := condachannel.Build(t)
	dir := archives(t, channel)
	for _, specs := range []string{
		"python", "hello-bin", "text-prefix", "text-twin", "long-shebang", "greet", "sounds", "liblink", "liblink=1", "uselink", "nolink",
		"clobber-b", "clobber-b clobber-c", "scripted", "old-format", "pymod", "cycle-a",
		"greet hello-bin text-prefix text-twin long-shebang sounds uselink nolink clobber-b clobber-c scripted old-format pymod cycle-a",
	} {
		for _, format := range []string{"pixi", "explicit"} {
			if format == "explicit" && !strings.Contains(specs, " ") {
				continue // the clashes and all together will do
			}
			t.Run(fmt.Sprint(specs, "/", format), func(t *testing.T) {
				work := t.TempDir()
				lock, theirs, ours := filepath.Join(work, "lock"), filepath.Join(work, "theirs"), filepath.Join(work, "ours")
				require.NoError(t, os.Mkdir(theirs, 0o755))
				ask := condachannel.Ask{Channel: channel, Specs: strings.Fields(specs), Root: theirs, Prefix: prefix}
				if format == "pixi" {
					ask.Lock = lock
				} else {
					ask.Explicit = lock
				}
				condachannel.Rattler(t, ask)
				install(t, conda.InstallOptions{Lock: lockOf(t, channel, lock), Archives: dir, Root: ours})
				same(t, asRattler(t, theirs, format), asRattler(t, ours, format))
			})
		}
	}
}

// lock solves specs and gives the lock.
func lock(t testing.TB, channel string, specs ...string) *conda.Lock {
	t.Helper()
	file := filepath.Join(t.TempDir(), "pixi.lock")
	condachannel.Rattler(t, condachannel.Ask{Channel: channel, Specs: specs, Lock: file})
	return lockOf(t, channel, file)
}

func TestRattlerReadsOurRecords(t *testing.T) {
	channel := condachannel.Build(t)
	root := filepath.Join(t.TempDir(), "env")
	r := install(t, conda.InstallOptions{Lock: lock(t, channel, "greet", "clobber-b", "clobber-c", "old-format", "liblink", "kind-b", "directory"), Archives: archives(t, channel), Root: root, Pycs: true})
	records := condachannel.Rattler(t, condachannel.Ask{Records: filepath.Join(root, "conda-meta")}).Records
	require.Len(t, records, len(r.Packages))
	for _, p := range r.Packages {
		got, ok := records[p.Name+"-"+p.Version+"-"+p.Build+".json"]
		require.True(t, ok, p.Name)
		require.Equal(t, []string{p.Name, p.Version, p.Build, p.URL}, []string{got.Name, got.Version, got.Build, got.URL})
		require.Len(t, got.Files, got.Paths)
		for _, f := range got.Files {
			if !strings.HasSuffix(f, ".pyc") { // the caller makes them
				_, err := os.Lstat(filepath.Join(root, f))
				require.NoError(t, err)
			}
		}
	}
	history, err := os.ReadFile(filepath.Join(root, "conda-meta", "history"))
	require.NoError(t, err)
	require.Regexp(t, `(?s)^==> 1980-01-01 00:00:00 <==\n# cmd: .*\n\+file:///.*/noarch::greet-1.2-pyh5_0\n`, string(history))
}

func TestTwoInstallationsAreEqualToTheSecond(t *testing.T) {
	channel := condachannel.Build(t)
	o := conda.InstallOptions{Lock: lock(t, channel, "greet", "clobber-b", "clobber-c", "text-prefix", "pymod"), Archives: archives(t, channel), FreezePycs: true, Pycs: true}
	times := func(root string) map[string]string {
		out := tree(t, root)
		for name := range out {
			st, err := os.Lstat(filepath.Join(root, name))
			require.NoError(t, err)
			if st.Mode().IsRegular() {
				out[name] += st.ModTime().UTC().String()
			}
		}
		return out
	}
	o.Root = filepath.Join(t.TempDir(), "a")
	first := install(t, o)
	a := times(o.Root)
	o.Root = filepath.Join(t.TempDir(), "b")
	require.Equal(t, first, install(t, o))
	require.Equal(t, a, times(o.Root))
}

func TestProgramsRunWhereTheyAreInstalled(t *testing.T) {
	channel := condachannel.Build(t)
	root := filepath.Join(t.TempDir(), "env")
	install(t, conda.InstallOptions{Lock: lock(t, channel, "hello-bin", "greet"), Archives: archives(t, channel), Root: root, Prefix: root})
	for name, want := range map[string]string{
		"hello-bin":    "hello from the prefix\n" + root + "/lib:" + root + "/lib64:/usr/lib\n",
		"greet":        "hello\n",
		"greet-run":    "run\n",
		"greet-script": "hello\n",
	} {
		out, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin", name)).CombinedOutput()
		require.NoError(t, err, string(out))
		require.Equal(t, want, string(out))
	}
}

func TestTheLastPackageWinsAFileAgainstAFolder(t *testing.T) {
	channel := condachannel.Build(t)
	root := filepath.Join(t.TempDir(), "env")
	r := install(t, conda.InstallOptions{Lock: lock(t, channel, "kind-b"), Archives: archives(t, channel), Root: root})
	require.Equal(t, []conda.ClobberedPath{
		{Path: "share/kind/one", Winner: "kind-b", Losers: []string{"kind-a"}},
		{Path: "share/kind/two/x", Winner: "kind-b", Losers: []string{"kind-a"}},
		{Path: "share/kind/two/y", Winner: "kind-b", Losers: []string{"kind-a"}},
	}, r.Clobbered)
	for name, want := range map[string]string{
		"share/kind/one/below": "b below", "share/kind/two": "b file",
		"__clobbers__/kind-a/share/kind/one": "a file", "__clobbers__/kind-a/share/kind/two/x": "ax", "__clobbers__/kind-a/share/kind/two/y": "ay",
	} {
		b, err := os.ReadFile(filepath.Join(root, name))
		require.NoError(t, err)
		require.Equal(t, want, string(b))
	}
}

func TestFoldersAndBytesThatAreNoTextAreKept(t *testing.T) {
	channel := condachannel.Build(t)
	root := filepath.Join(t.TempDir(), "env")
	install(t, conda.InstallOptions{Lock: lock(t, channel, "directory", "latin1"), Archives: archives(t, channel), Root: root})
	require.DirExists(t, filepath.Join(root, "var/empty/here"))
	b, err := os.ReadFile(filepath.Join(root, "share/latin1.txt"))
	require.NoError(t, err)
	require.Equal(t, "#!/bin/sh \xe9\n/opt/env \xff\n", string(b))
}

func TestScriptsAreListedAndNotRun(t *testing.T) {
	channel := condachannel.Build(t)
	root := filepath.Join(t.TempDir(), "env")
	r := install(t, conda.InstallOptions{Lock: lock(t, channel, "scripted"), Archives: archives(t, channel), Root: root})
	require.Equal(t, []conda.LinkScript{{
		Package: "scripted", Kind: "post-link", Path: "bin/.scripted-post-link.sh",
		Env: map[string]string{"PREFIX": prefix, "PKG_NAME": "scripted", "PKG_VERSION": "1.0", "PKG_BUILDNUM": "0"},
	}}, r.Scripts)
	require.NoFileExists(t, filepath.Join(root, "share/scripted.txt"))
	vars, path, warnings, err := conda.Activation(root, prefix)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, []string{"CONDA_DEFAULT_ENV=/opt/env", "CONDA_PREFIX=/opt/env", "CONDA_SHLVL=1", "SOUNDS_HOME=/opt/env/share/sounds", "SOUNDS_RATE=44100"}, vars)
	require.Equal(t, []string{"/opt/env/share/sounds/bin", "/opt/env/bin"}, path)
}

func TestPycsAreRecordedWhereTheCallerMakesThem(t *testing.T) {
	channel := condachannel.Build(t)
	root := filepath.Join(t.TempDir(), "env")
	r := install(t, conda.InstallOptions{Lock: lock(t, channel, "greet"), Archives: archives(t, channel), Root: root, Pycs: true})
	site := "lib/python" + r.Python + "/site-packages/greet/"
	require.Equal(t, []conda.Compile{{Package: "greet", Files: []string{site + "__init__.py", site + "template.py", site + "where.py"}}}, r.Compile)
	tag := ".cpython-" + strings.ReplaceAll(r.Python, ".", "") + ".pyc"
	b, err := os.ReadFile(filepath.Join(root, "conda-meta/greet-1.2-pyh5_0.json"))
	require.NoError(t, err)
	var record struct {
		Files []string `json:"files"`
		Data  struct {
			Paths []map[string]any `json:"paths"`
		} `json:"paths_data"`
	}
	require.NoError(t, json.Unmarshal(b, &record))
	require.Subset(t, record.Files, []string{site + "__pycache__/__init__" + tag, site + "__pycache__/template" + tag, site + "__pycache__/where" + tag})
	require.Contains(t, record.Data.Paths, map[string]any{"_path": site + "__pycache__/where" + tag, "path_type": "pyc_file"})
}

// A store gives every file the same time, which would make Python compile anew.
func TestFrozenPycsOutliveTheirSourcesTime(t *testing.T) {
	channel := condachannel.Build(t)
	for _, freeze := range []bool{false, true} {
		root := filepath.Join(t.TempDir(), "env")
		r := install(t, conda.InstallOptions{Lock: lock(t, channel, "pymod"), Archives: archives(t, channel), Root: root, FreezePycs: freeze})
		source := filepath.Join(root, "lib/python"+r.Python+"/site-packages/value.py")
		require.NoError(t, os.WriteFile(source, []byte("value = 43\n"), 0o644))
		cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", "import value; print(value.value)")
		cmd.Dir, cmd.Env = filepath.Dir(source), []string{"PYTHONDONTWRITEBYTECODE=1"}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		require.Equal(t, map[bool]string{false: "43\n", true: "42\n"}[freeze], string(out))
	}
}

func TestAnMD5AloneIsAcceptedAndNamed(t *testing.T) {
	channel := condachannel.Build(t)
	l := lock(t, channel, "sounds")
	l.Packages[0].SHA256, l.Packages[0].SizeBytes = "", 0
	require.NotEmpty(t, l.Packages[0].MD5)
	r := install(t, conda.InstallOptions{Lock: l, Archives: archives(t, channel)})
	require.Equal(t, []string{"sounds-2.0-6_0.conda"}, r.WeakHashes)
}

// BenchmarkInstall compares with rattler: packages of the whole channel from cold
// caches, all of them small but python.
func BenchmarkInstall(b *testing.B) {
	channel := condachannel.Build(b)
	specs := strings.Fields("greet hello-bin text-prefix text-twin long-shebang sounds uselink nolink clobber-b clobber-c scripted old-format pymod cycle-a")
	l, dir := lock(b, channel, specs...), archives(b, channel)
	b.Run("sbxrun", func(b *testing.B) {
		top := b.TempDir()
		for i := range b.N {
			install(b, conda.InstallOptions{Lock: l, Archives: dir, Root: filepath.Join(top, fmt.Sprint(i))})
		}
	})
	b.Run("rattler", func(b *testing.B) {
		a := condachannel.Rattler(b, condachannel.Ask{Channel: channel, Specs: specs, Root: b.TempDir(), Prefix: prefix, Times: b.N})
		b.ReportMetric(a.Seconds*1e9/float64(b.N), "ns/op") // without its start and solving
	})
}
