package conda_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
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
