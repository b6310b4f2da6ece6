package shim

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/condachannel"
	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// By a path with a link in it the folder is the same one, and covered.
func TestAShimIsCoveredByWhateverPathItIsCalled(t *testing.T) {
	b := newBox(t)
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(b.dir, link))
	script := filepath.Join(t.TempDir(), "script")
	require.NoError(t, os.Symlink(filepath.Join(b.venv, "bin/python"), script))
	for _, python := range []string{filepath.Join(link, ".venv/bin/python"), script} {
		for _, code := range []string{
			fmt.Sprintf("os.rename(%q, %q)", b.venv, b.venv+"2"), fmt.Sprintf("open(%q, 'w')", filepath.Join(b.venv, "bin/pytest")),
		} {
			rc, out := b.run(python, "-c", "import os, sys; print(sys.prefix); "+code)
			assert.Equal(t, 1, rc, out)
			assert.Contains(t, out, b.venv+"\n")
		}
	}
	// The sandbox's root may write its own view of the folder: nobody else sees it.
	b.shim("-r", "requirements.txt", "-u", "0:0", b.venv)
	before, err := os.ReadFile(filepath.Join(b.venv, "bin/pytest"))
	require.NoError(t, err)
	_, out := b.run("python", "-c", "import os; os.unlink('.venv/bin/pytest'); open('.venv/bin/pytest', 'w').write('evil'); open('.venv/sbxrun.json', 'w'); print('done')")
	assert.Equal(t, "done\n", out)
	after, err := os.ReadFile(filepath.Join(b.venv, "bin/pytest"))
	require.NoError(t, err)
	assert.Equal(t, string(before), string(after))
}

// What a run reads by a path in the project would be what a sandbox leads it to.
func TestPathsInTheProjectLeadNowhereElse(t *testing.T) {
	b := newBox(t)
	secret := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(secret, "key"), nil, 0o644))
	require.NoError(t, os.MkdirAll(filepath.Join(b.dir, "data"), 0o755))
	b.write("vars", "SEEN=first\n")
	b.shim("-r", "requirements.txt", "-v", filepath.Join(b.dir, "data")+":/data:ro", "--env-file", "vars", b.venv)
	rc, out := b.run("python", "-c", fmt.Sprintf("import os; print(os.environ['SEEN']); os.rmdir('data'); os.symlink(%q, 'data'); open('vars', 'w').write('SEEN=second\\nSBXRUN_SECRET')", secret))
	require.Equal(t, 0, rc, out)
	rc, out = b.run("python", "-c", "import os; print(os.listdir('/data'))")
	assert.Equal(t, 125, rc)
	assert.Contains(t, out, "too many levels of symbolic links")
	b.shim("-r", "requirements.txt", b.venv)
	require.NoError(t, os.Remove(filepath.Join(b.dir, "data")))
	b.write("vars", "SEEN=first\n")
	b.shim("-r", "requirements.txt", "--env-file", "vars", b.venv)
	b.write("vars", "SBXRUN_SECRET\n")
	rc, out = b.run("python", "-c", "import os; print(os.environ['SEEN'], 'SBXRUN_SECRET' in os.environ)")
	assert.Equal(t, "first False\n", out, rc)

	require.NoError(t, os.Symlink(secret, filepath.Join(b.dir, "link")))
	for flag, value := range map[string]string{
		"--secret": "source=" + filepath.Join(b.dir, "vars"), "--net-log": filepath.Join(b.dir, "log"),
		"--expose-unix": filepath.Join(b.dir, "socket") + ":80", "--volume": filepath.Join(b.dir, "link") + ":/x",
	} {
		cmd := b.s.Cmd("env", "shim", "-r", "requirements.txt", flag, value, b.venv)
		cmd.Dir = b.dir
		out, err := cmd.CombinedOutput()
		require.Error(t, err, flag)
		assert.Contains(t, string(out), "link", flag)
		assert.LessOrEqual(t, strings.Count(string(out), "\n"), 2, "%s", out)
	}
}

// A sandbox that runs already may make what will be the folder of a shim.
func TestNoLinkLeadsOutOfAShimThatIsMade(t *testing.T) {
	b := newBox(t)
	other := filepath.Join(b.dir, ".other")
	victim := t.TempDir()
	precious := filepath.Join(victim, "precious")
	require.NoError(t, os.WriteFile(precious, nil, 0o600))
	for name, links := range map[string]map[string]string{
		"the folder": {".other": victim},
		"a folder":   {".other/bin": victim},
		"lib":        {".other/lib": victim},
		"a file":     {".other/pyvenv.cfg": precious, ".other/bin/python": precious},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.RemoveAll(other))
			code := "import os, shutil\n"
			if name != "the folder" {
				code += "os.makedirs('.other/bin' if '" + name + "' == 'a file' else '.other')\nshutil.copy('.venv/../settings', '.other/sbxrun.json')\n"
			}
			for at, to := range links {
				code += fmt.Sprintf("os.symlink(%q, %q)\n", to, at)
			}
			text, err := os.ReadFile(filepath.Join(b.venv, "sbxrun.json"))
			require.NoError(t, err)
			b.write("settings", string(text))
			rc, out := b.run("python", "-c", code)
			require.Equal(t, 0, rc, out)
			cmd := b.s.Cmd("env", "shim", "-r", "requirements.txt", other)
			cmd.Dir = b.dir
			out2, err := cmd.CombinedOutput()
			if name == "a file" { // replaced, not written through
				require.NoError(t, err, "%s", out2)
			} else {
				require.Error(t, err)
			}
			left, err := os.ReadDir(victim)
			require.NoError(t, err)
			require.Len(t, left, 1)
			st, err := os.Stat(precious)
			require.NoError(t, err)
			assert.EqualValues(t, 0, st.Size())
		})
	}
}

// What a tool has open is not its programs' (an engine must not matter).
func TestDescriptorsOfTheToolStayOutside(t *testing.T) {
	b := newBox(t)
	for _, engine := range []string{"direct", "libcontainer"} {
		b.shim("-r", "requirements.txt", "--engine", engine, b.venv)
		open, err := os.Open("/etc/passwd")
		require.NoError(t, err)
		cmd := b.cmd("python", "-c", "import os, sys; print(sys.prefix, [os.readlink('/proc/self/fd/' + f) for f in os.listdir('/proc/self/fd') if f not in '012' and os.path.exists('/proc/self/fd/' + f)])")
		cmd.ExtraFiles = []*os.File{open}
		out, err := cmd.CombinedOutput()
		open.Close()
		require.NoError(t, err, "%s", out)
		assert.Equal(t, b.venv+" []\n", string(out), engine)
	}
}

// A settings file lies in the project, which a sandbox may write.
func TestSettingsAreThoseOfWhenTheShimWasMade(t *testing.T) {
	b := newBox(t)
	secret := t.TempDir()
	b.write("sbxrun.toml", "memory = \"300m\"\n[env]\nSEEN = \"first\"\n")
	b.shim("-r", "requirements.txt", "-f", "sbxrun.toml", b.venv)
	b.write("sbxrun.toml", fmt.Sprintf("volumes = [%q]\n[env]\nSEEN = \"second\"\n", secret+":"+secret+":rw"))
	rc, out := b.run("python", "-c", fmt.Sprintf("import os; print(os.environ['SEEN'], os.path.exists(%q))", secret))
	assert.Equal(t, 0, rc, out)
	assert.Equal(t, "first False\n", out)
}

func TestWhoElseCouldWriteSettingsIsNotObeyed(t *testing.T) {
	b := newBox(t)
	settings := filepath.Join(b.venv, "sbxrun.json")
	for name, spoil := range map[string]func() error{
		"others may write": func() error { return os.Chmod(settings, 0o646) },
		"another's":        func() error { return os.Chown(settings, 1234, 0) },
		"a link": func() error {
			return os.Rename(settings, settings+"2")
		},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, spoil())
			if name == "a link" {
				require.NoError(t, os.Symlink(settings+"2", settings))
			}
			rc, out := b.run("python", "-c", "print(1)")
			assert.Equal(t, 125, rc)
			assert.Contains(t, out, "read shim")
			if name == "a link" {
				require.NoError(t, os.Rename(settings+"2", settings))
			}
			require.NoError(t, os.Chmod(settings, 0o644))
			require.NoError(t, os.Chown(settings, 0, 0))
		})
	}
	rc, out := b.run("python", "-c", "print(1)")
	assert.Equal(t, 0, rc, out)
}

// What the host's tools execute unasked stays as it is, and no link of a sandbox's
// is followed to show what it leads to.
func TestWhatHostToolsExecuteUnaskedIsReadOnly(t *testing.T) {
	b := newBox(t)
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.MkdirAll(secret, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(secret, "key"), nil, 0o644))
	require.NoError(t, os.MkdirAll(filepath.Join(b.dir, ".git/hooks"), 0o755))
	b.write(".envrc", "")
	for _, code := range []string{"open('.git/hooks/pre-commit', 'w')", "os.rename('.git', 'x')", "open('.envrc', 'a')", "os.unlink('.envrc')"} {
		rc, out := b.run("python", "-c", "import os; "+code)
		assert.Equal(t, 1, rc, "%s: %s", code, out)
	}
	rc, out := b.run("python", "-c", fmt.Sprintf("import os; os.symlink(%q, '.vscode')", secret))
	require.Equal(t, 0, rc, out)
	rc, out = b.run("python", "-c", "import os; print(os.path.islink('.vscode'), os.path.exists('.vscode/key'))")
	assert.Equal(t, "True False\n", out, rc)
	// The user's word wins.
	b.shim("-r", "requirements.txt", "-v", b.dir+"/.git:"+b.dir+"/.git", b.venv)
	rc, out = b.run("python", "-c", "open('.git/hooks/mine', 'w')")
	assert.Equal(t, 0, rc, out)
}

// Tools pass on what a project's own files say: only a script of python's is shown.
func TestOnlyAScriptOfPythonsIsShown(t *testing.T) {
	b := newBox(t)
	dir := t.TempDir()
	key, script, module := filepath.Join(dir, "key"), filepath.Join(dir, "probe.py"), filepath.Join(dir, "zipped")
	for _, f := range []string{key, script, module} {
		require.NoError(t, os.WriteFile(f, []byte("import sys; print(open(sys.argv[1]).read())"), 0o644))
	}
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"another argument":      {[]string{script, key}, 1, "No such file or directory: '" + key},
		"a script that is none": {[]string{key, key}, 2, "lies outside of the project"},
		"an argument of -c":     {[]string{"-c", "open(" + "'" + script + "')", script}, 1, "No such file"},
		"a script":              {[]string{"-I", "-X", "utf8", "-W", "ignore", script, "/etc/passwd"}, 0, "root:"},
	} {
		t.Run(name, func(t *testing.T) {
			rc, out := b.run("python", c.args...)
			assert.Equal(t, c.code, rc, out)
			assert.Contains(t, out, c.says)
		})
	}
}

// The current directory keeps its name, and shows nothing of the host's.
func TestOutsideOfTheProjectThereIsNothing(t *testing.T) {
	b := newBox(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "test_one.py"), []byte("raise SystemExit('the wrong one')"), 0o644))
	cmd := b.cmd("python", "-c", "import os; print(os.getcwd(), os.listdir())")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Equal(t, dir+" []\n", string(out))
	cmd = b.cmd("python", "test_one.txt")
	cmd.Dir = dir
	require.NoError(t, os.WriteFile(filepath.Join(dir, "test_one.txt"), nil, 0o644))
	out, err = cmd.CombinedOutput()
	require.Error(t, err)
	assert.Contains(t, string(out), filepath.Join(dir, "test_one.txt")+" lies outside of the project")
}

// A debuggee connects to its editor, and to no other port of the host's.
func TestADebuggeeReachesItsEditor(t *testing.T) {
	b := newBox(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	args := []string{"-Xfrozen_modules=off", "-m", "debugpy", "--connect", fmt.Sprintf("127.0.0.1:%d", port), "--configure-subProcess", "false", "app.py"}
	b.write("app.py", "import socket\ns = socket.socket()\nprint(s.connect_ex(('127.0.0.1', 22)))\n")
	rc, out := b.run("python", args...)
	assert.NotEqual(t, 0, rc, "without --debug: %s", out)

	b.shim("-r", "requirements.txt", "--debug", b.venv)
	cmd := b.cmd("python", args...)
	require.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	require.NoError(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute)))
	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(time.Minute)))
	const ask = `{"seq":1,"type":"request","command":"initialize","arguments":{"adapterID":"t"}}`
	fmt.Fprintf(c, "Content-Length: %d\r\n\r\n%s", len(ask), ask)
	head := make([]byte, 16)
	_, err = c.Read(head)
	require.NoError(t, err)
	assert.Equal(t, "Content-Length: ", string(head))
}

// Whoever uses the folder while it is made again has all of the old one or of the new.
func TestAShimIsMadeAgainWhileItIsUsed(t *testing.T) {
	b := newBox(t)
	done := make(chan string, 2)
	for range 2 {
		go func() {
			for range 20 {
				cmd := b.cmd("python", "-c", "import pytest, sys; print(sys.prefix)")
				if out, err := cmd.CombinedOutput(); err != nil || string(out) != b.venv+"\n" {
					done <- fmt.Sprint(err, " ", string(out))
					return
				}
			}
			done <- ""
		}()
	}
	for range 15 {
		b.shim("-r", "requirements.txt", b.venv)
	}
	for range 2 {
		assert.Empty(t, <-done)
	}
	left, err := filepath.Glob(filepath.Join(b.dir, ".sbxrun-*"))
	require.NoError(t, err)
	assert.Empty(t, left)
}

// An environment of layers, one that is an image, and a path that is not plain.
func TestAShimOfAnyEnvironment(t *testing.T) {
	b := newBox(t)
	o := b.s.Do("env", "build", "--name", "parent", "-r", filepath.Join(b.dir, "requirements.txt"))
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	b.write("child.toml", "[env]\nextends = \"parent\"\nrequirements = [\"iniconfig==2.0.0\"]\n")
	o = b.s.Do("env", "build", "--name", "child", "-r", filepath.Join(b.dir, "child.toml"))
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	const ask = "import iniconfig, pytest, sys, importlib.metadata as m; print(sys.prefix, sys.executable, pytest.__file__, m.version('iniconfig'))"
	site := "/lib/python3.11/site-packages/pytest/__init__.py"
	for name, c := range map[string]struct{ env, dir, version string }{
		"of layers":       {"child", filepath.Join(b.dir, ".child"), "2.0.0"},
		"a path of words": {"child", filepath.Join(t.TempDir(), "ein Ort «über» $HOME"), "2.0.0"},
	} {
		t.Run(name, func(t *testing.T) {
			b.shim("--with", c.env, c.dir)
			for _, program := range []string{"python", "python3.11"} {
				rc, out := b.run(filepath.Join(c.dir, "bin", program), "-c", ask)
				require.Equal(t, 0, rc, out)
				assert.True(t, strings.HasPrefix(out, c.dir+" "+c.dir+"/bin/"+program+" "+c.dir+site), out)
				assert.True(t, strings.HasSuffix(out, " "+c.version+"\n"), out)
			}
			rc, out := b.run(filepath.Join(c.dir, "bin/pytest"), "-q", "test_one.py")
			assert.Equal(t, 0, rc, out)
		})
	}
}

// A conda prefix: its own interpreter, programs that are none of Python's.
func TestAShimOfACondaEnvironment(t *testing.T) {
	b := newBox(t)
	channel := condachannel.Build(t)
	b.write("environment.yml", "channels: [file://"+channel+"]\ndependencies:\n- python\n- greet\n- hello-bin\n")
	b.shim("-r", "environment.yml", b.venv)
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"python":                   {[]string{"python", "-c", "import greet, os, sys; print(sys.executable, greet.__file__.startswith(sys.prefix), os.environ['PATH'].split(':')[0], os.environ['CONDA_PREFIX'])"}, b.venv + "/bin/python True " + b.venv + "/bin " + b.venv + "\n"},
		"a script of Python's":     {[]string{"greet-script"}, "hello\n"},
		"a program of no Python's": {[]string{"hello-bin"}, "hello from the prefix\n/opt/env/lib:/opt/env/lib64:/usr/lib\n"},
	} {
		t.Run(name, func(t *testing.T) {
			rc, out := b.run(c.args[0], c.args[1:]...)
			assert.Equal(t, 0, rc, out)
			assert.Equal(t, c.want, out)
		})
	}
}

// An image in the place of the layer's files.
func TestAShimOfAPackedEnvironment(t *testing.T) {
	need.Network(t)
	need.Python(t)
	b := &box{t: t, s: harness.NewEmpty(t), dir: t.TempDir()}
	b.venv = filepath.Join(b.dir, ".venv")
	b.write("requirements.txt", "iniconfig==2.1.0\n")
	b.shim("-r", "requirements.txt", b.venv)
	o := b.s.Do("env", "build", "--name", "packed", "-r", filepath.Join(b.dir, "requirements.txt"))
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	o = b.s.Do("env", "pack", "packed")
	if strings.Contains(string(o.Stderr), "mkfs.erofs") {
		t.Skip("needs mkfs.erofs")
	}
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	rc, out := b.run("python", "-c", "import iniconfig, sys; print(iniconfig.__file__.startswith(sys.prefix), sys.prefix)")
	assert.Equal(t, "True "+b.venv+"\n", out, rc)
	cmd := b.s.Cmd("env", "shim", "--with", "packed", b.venv)
	cmd.Dir = b.dir
	text, err := cmd.CombinedOutput()
	require.Error(t, err)
	assert.Contains(t, string(text), "it is an image")
	assert.Contains(t, string(text), "pack --undo")
}

// Editors without root can index copies.
func TestSourcesAreCopiedForOthers(t *testing.T) {
	b := newBox(t)
	b.shim("-r", "requirements.txt", "--copy", b.venv)
	site := filepath.Join(b.venv, "lib/python3.11/site-packages")
	st, err := os.Stat(filepath.Join(site, "pytest/__init__.py"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o644), st.Mode())
	pycs, err := filepath.Glob(filepath.Join(site, "*/__pycache__"))
	require.NoError(t, err)
	assert.Empty(t, pycs)
	rc, out := b.run("python", "-c", "import pytest; print(pytest.__file__)")
	assert.Equal(t, 0, rc)
	assert.Equal(t, filepath.Join(site, "pytest/__init__.py")+"\n", out)
}

// The folder says to editors what they look for without starting anything.
func TestWhatEditorsReadInTheFolder(t *testing.T) {
	b := newBox(t)
	text, err := os.ReadFile(filepath.Join(b.venv, "pyvenv.cfg"))
	require.NoError(t, err)
	assert.Regexp(t, `(?m)^home = /usr/bin$`, string(text))
	assert.Regexp(t, `(?m)^version = 3\.\d+\.\d+$`, string(text))
	assert.Regexp(t, `(?m)^include-system-site-packages = false$`, string(text))
	_, err = os.Stat(filepath.Join(b.venv, "lib/python3.11/site-packages/pytest/__init__.py"))
	require.NoError(t, err)

	// The question of VS Code's Python extension (interpreterInfo.py), its own words.
	info := filepath.Join(t.TempDir(), "interpreterInfo.py")
	require.NoError(t, os.WriteFile(info, []byte("import json, sys\nobj = {}\nobj['versionInfo'] = tuple(sys.version_info)\nobj['sysPrefix'] = sys.prefix\n"+
		"obj['sysVersion'] = sys.version\nobj['is64Bit'] = sys.maxsize > 2**32\nobj['exe'] = sys.executable\nprint(json.dumps(obj))\n"), 0o600))
	cmd := b.cmd("python", "-I", info)
	cmd.Dir = "/"
	out, err := cmd.Output()
	require.NoError(t, err)
	var got struct{ SysPrefix, Exe string }
	require.NoError(t, json.Unmarshal(out, &got), "%s", out)
	assert.Equal(t, [2]string{b.venv, filepath.Join(b.venv, "bin/python")}, [2]string{got.SysPrefix, got.Exe})
}
