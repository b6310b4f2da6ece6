package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs"
)

func TestScriptOf(t *testing.T) {
	for _, c := range []struct {
		want string
		args []string
	}{
		{"", nil},
		{"a.py", []string{"a.py", "-c", "x"}},
		{"a.py", []string{"-I", "-Xdev", "-X", "utf8", "-Wignore", "-W", "error", "--check-hash-based-pycs", "never", "a.py"}},
		{"a.py", []string{"-uB", "a.py"}},
		{"a.py", []string{"-BX", "dev", "a.py"}},
		{"", []string{"-c", "a.py"}},
		{"", []string{"-Ic", "a.py"}},
		{"", []string{"-m", "a.py"}},
		{"", []string{"-umpytest", "a.py"}},
		{"", []string{"-", "a.py"}},
		{"", []string{"", "a.py"}},
		{"", []string{"-X"}},
	} {
		assert.Equal(t, c.want, scriptOf(c.args), "%q", c.args)
	}
}

func TestDebugPorts(t *testing.T) {
	for _, c := range []struct {
		connect, listen []int
		args            []string
	}{
		{nil, []int{5678}, []string{"-m", "debugpy", "--listen", "5678", "--wait-for-client", "app.py"}},
		{[]int{41}, nil, []string{"-Xfrozen_modules=off", "-m", "debugpy", "--connect", "127.0.0.1:41", "--configure-subProcess", "true", "app.py", "--listen", "1"}},
		{[]int{41}, nil, []string{"/ext/debugpy", "--connect", "localhost:41", "app.py"}},
		{nil, []int{41}, []string{"-m", "debugpy", "--listen", "0.0.0.0:41", "-m", "app", "--connect", "5"}},
		{nil, nil, []string{"-m", "debugpy", "--connect", "192.0.2.1:41", "app.py"}},
		{nil, nil, []string{"-m", "debugpy", "--connect", "70000", "app.py"}},
		{[]int{41}, nil, []string{"/p/pydev/pydevd.py", "--multiprocess", "--qt-support=auto", "--client", "127.0.0.1", "--port", "41", "--file", "/x/app.py", "--port", "22"}},
		{nil, []int{41}, []string{"/p/pydev/pydevd.py", "--server", "--port", "41", "--file", "/x/app.py"}},
		{nil, nil, []string{"/p/pydev/pydevd.py", "--client", "192.0.2.1", "--port", "41", "--file", "/x/app.py"}},
		{nil, nil, []string{"app.py", "-m", "debugpy", "--connect", "41"}},
		{nil, nil, []string{"-c", "x", "-m", "debugpy", "--connect", "41"}},
		{nil, nil, []string{"-m", "app", "-m", "debugpy", "--connect", "41"}},
		{nil, nil, []string{"app.py", "pydevd.py", "--client", "127.0.0.1", "--port", "41"}},
		{nil, nil, nil},
	} {
		connect, listen := debugPorts(c.args)
		assert.Equal(t, c.connect, connect, "%q", c.args)
		assert.Equal(t, c.listen, listen, "%q", c.args)
	}
}

func TestVariablesThatShimsPassOn(t *testing.T) {
	for name, want := range map[string]bool{
		"PYTHONPATH": true, "PYTEST_ADDOPTS": true, "LC_ALL": true, "CI": true, "TERM": true, "JPY_SESSION_NAME": true,
		"PYTHONHOME": false, "PYTHONUSERBASE": false, "JPY_PARENT_PID": false, "CIRCLE_TOKEN": false, "PATH": false, "LD_PRELOAD": false,
		"PIP_INDEX_URL": false, "AWS_SECRET_ACCESS_KEY": false, "SSH_AUTH_SOCK": false, "TERMCAP": false, "": false,
	} {
		assert.Equal(t, want, passesEnv(name), name)
	}
}

func TestConnectionFiles(t *testing.T) {
	good := connection{Transport: "tcp", IP: "127.0.0.1", Shell: 1, IOPub: 2, Stdin: 3, Control: 4, Heartbeat: 65535}
	ports, err := good.ports()
	require.NoError(t, err)
	assert.Equal(t, []int{1, 2, 3, 4, 65535}, ports)
	for _, spoil := range []func(*connection){
		func(c *connection) { c.Transport = "ipc" },
		func(c *connection) { c.IP = "0.0.0.0" },
		func(c *connection) { c.Shell = 0 },
		func(c *connection) { c.Heartbeat = 65536 },
	} {
		bad := good
		spoil(&bad)
		_, err := bad.ports()
		assert.ErrorContains(t, err, "connection file")
	}
}

func TestWhatOfAProjectIsProtected(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{".git", "venv", "other/venv", "src"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, f := range []string{"venv/pyvenv.cfg", "other/venv/pyvenv.cfg", ".envrc", "pyvenv.cfg"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, f), nil, 0o600))
	}
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, ".idea")))
	require.NoError(t, os.Symlink("venv", filepath.Join(dir, "link")))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, ".vscode"), 0o600))
	assert.Equal(t, []string{filepath.Join(dir, ".envrc"), filepath.Join(dir, ".git"), filepath.Join(dir, "venv")}, protectedIn(dir))
}

func TestParseHostPort(t *testing.T) {
	p, err := parseHostPort("5678")
	require.NoError(t, err)
	assert.Equal(t, [2]int{5678, 5678}, [2]int{p.ContainerPort, p.HostPort})
	p, err = parseHostPort("80:5678")
	require.NoError(t, err)
	assert.Equal(t, [2]int{80, 5678}, [2]int{p.ContainerPort, p.HostPort})
	for _, s := range []string{"", "0", ":1", "1:", "1:2:3", "x", "127.0.0.1:1", "70000", "1-2"} {
		_, err := parseHostPort(s)
		assert.Error(t, err, s)
	}
}

func TestVenvConfigIsOurs(t *testing.T) {
	l := &envs.Layout{Python: "python3.12", Config: "home = /tmp/evil\nexecutable = /tmp/evil\nversion_info = 3.12.4.final.0\ninclude-system-site-packages = true\ncommand = x\n"}
	assert.Equal(t, "home = /usr/bin\nimplementation = CPython\ninclude-system-site-packages = true\nversion = 3.12.4.final.0\n", venvConfig(l))
	l.Config = "version = $(evil)\nhome = /usr/local/bin\n"
	assert.Equal(t, "home = /usr/local/bin\nimplementation = CPython\ninclude-system-site-packages = false\nversion = 3.12\n", venvConfig(l))
}

func TestAShimsSettingsAreRootsToReadAndLieWhereItIs(t *testing.T) {
	dir := t.TempDir()
	w := openShimWriter(filepath.Join(dir, "shim"))
	w.settings(&shimSettings{Flags: []string{"--env=TOKEN=hunter2"}}, shimFiles{"sbxrun.toml": []byte("x")})
	require.NoError(t, w.err)
	for _, name := range []string{shimSettingsFile, "sbxrun.toml"} {
		st, err := os.Stat(filepath.Join(dir, "shim", name))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), st.Mode())
	}
	w.close()

	elsewhere := t.TempDir()
	require.NoError(t, os.Symlink(elsewhere, filepath.Join(dir, ".venv")))
	_, err := oursAt(filepath.Join(dir, ".venv")) // what is there is empty, but not there
	require.Error(t, err)
	require.Error(t, (&shimSettings{Project: dir}).checkPlace(filepath.Join(dir, "it's"), true, nil))
}
