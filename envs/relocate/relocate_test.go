package relocate

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

const was = "/a/folder/of/some/users/versions/3.12.1"

// prefix makes what the prefix of an interpreter looks like; its program is a real
// binary with a library path.
func prefix(t *testing.T) string {
	t.Helper()
	need.Compiler(t)
	dir := t.TempDir()
	for name, text := range map[string]string{
		"include/python3.12/patchlevel.h":               "#define PY_MAJOR_VERSION 3\n#define PY_VERSION      \t\"3.12.1+\"\n",
		"lib/python3.12/os.py":                          "# " + was + "\n",
		"lib/python3.12/_sysconfigdata__linux_.py":      "'" + was + "/lib' '" + was + "-other' '" + was + "'\n",
		"lib/python3.12/__pycache__/os.cpython.pyc":     "x",
		"lib/python3.12/test/test_os.py":                "x",
		"lib/python3.12/site-packages/six.py":           "x",
		"lib/python3.12/sqlite3/tests/x.py":             "x",
		"lib/python3.12/config-3.12/libpython3.12.a":    "x",
		"lib/pkgconfig/python-3.12.pc":                  "prefix=" + was + "\n",
		"bin/pip3":                                      "#!" + was + "/bin/python3.12\n",
		"share/man/man1/python3.1":                      "x",
		"lib/python3.12/ensurepip/_bundled/x.whl":       "x",
		"lib/python3.12/idlelib/idle_test/test_idle.py": "x",
	} {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	}
	src := filepath.Join(t.TempDir(), "a.c")
	require.NoError(t, os.WriteFile(src, []byte("int main(void) { return 0; }\n"), 0o600))
	out, err := exec.Command("gcc", "-o", filepath.Join(dir, "bin/python3.12"), src, "-Wl,-rpath,"+was+"/lib:/usr/lib/kept").CombinedOutput()
	require.NoError(t, err, string(out))
	require.NoError(t, os.Symlink("python3.12", filepath.Join(dir, "bin/python3")))
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "lib/out")))
	require.NoError(t, os.Symlink("../../etc/passwd", filepath.Join(dir, "lib/up")))
	return dir
}

func TestAPrefixIsCopiedWithoutItsOldPath(t *testing.T) {
	src, dst := prefix(t), filepath.Join(t.TempDir(), "out")
	r, err := Python(Request{Source: src, Dest: dst, Was: []string{was}, At: "/opt/python"})
	require.NoError(t, err)
	require.Equal(t, &Result{Version: "3.12.1", Program: "bin/python3.12", Patched: 1}, r)

	f, err := elf.Open(filepath.Join(dst, "bin/python3.12"))
	require.NoError(t, err)
	defer f.Close()
	run, err := f.DynString(elf.DT_RUNPATH)
	require.NoError(t, err)
	require.Equal(t, []string{"$ORIGIN/../lib:/usr/lib/kept"}, run)
	require.NoError(t, exec.Command(filepath.Join(dst, "bin/python")).Run(), "it still starts, by a link that was missing")

	var there []string
	require.NoError(t, filepath.WalkDir(dst, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dst, p)
			there = append(there, rel)
		}
		return err
	}))
	require.Equal(t, []string{
		"bin/python", "bin/python3", "bin/python3.12", "include/python3.12/patchlevel.h", "lib/pkgconfig/python-3.12.pc",
		"lib/python3.12/_sysconfigdata__linux_.py", "lib/python3.12/ensurepip/_bundled/x.whl", "lib/python3.12/os.py",
	}, there)
	b, err := os.ReadFile(filepath.Join(dst, "lib/python3.12/_sysconfigdata__linux_.py"))
	require.NoError(t, err)
	require.Equal(t, "'/opt/python/3.12.1/lib' '"+was+"-other' '/opt/python/3.12.1'\n", string(b))
}

func TestWhatIsNoPrefixIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(dir string) error
		says   string
	}{
		"no headers": {func(d string) error { return os.RemoveAll(filepath.Join(d, "include")) }, "not the prefix of a CPython"},
		"two": {func(d string) error {
			return os.CopyFS(filepath.Join(d, "include/python3.13"), os.DirFS(filepath.Join(d, "include/python3.12")))
		}, "several"},
		"odd version": {func(d string) error {
			return os.WriteFile(filepath.Join(d, "include/python3.12/patchlevel.h"), []byte("#define PY_VERSION \"../../x\""), 0o600)
		}, "names no version"},
		"no program": {func(d string) error { return os.Remove(filepath.Join(d, "bin/python3.12")) }, `no program "bin/python3.12"`},
		"damaged": {func(d string) error {
			b, err := os.ReadFile(filepath.Join(d, "bin/python3.12"))
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(d, "bin/python3.12"), b[:len(b)/2], 0o755)
		}, "bin/python3.12: "},
	} {
		t.Run(name, func(t *testing.T) {
			src := prefix(t)
			require.NoError(t, c.change(src))
			_, err := Python(Request{Source: src, Dest: filepath.Join(t.TempDir(), "out"), Was: []string{was}, At: "/opt/python"})
			require.ErrorContains(t, err, c.says)
		})
	}
}

func TestALibraryPathWithoutRoomIsSaid(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(prefix(t), "bin/python3.12"))
	require.NoError(t, err)
	_, err = patchELF(bytes.Clone(b), []string{"/a"}, "bin/deep/down/in/the/very/deepest/of/all/the/many/folders/python")
	require.ErrorContains(t, err, "no room")
}

func FuzzPatchELF(f *testing.F) {
	b, err := os.ReadFile("/bin/true")
	if err != nil {
		f.Skip(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		n := len(b)
		if _, err := patchELF(b, []string{"/"}, "bin/x"); err == nil && len(b) != n {
			t.Fatal("another size")
		}
	})
}
