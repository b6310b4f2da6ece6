// Package shim tests the folders of `env shim` and the kernels of `env kernel` with
// the tools that use them: all of them run on the host and know nothing of sbxrun.
package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

func TestMain(m *testing.M) {
	code := harness.Main(m)
	if tools.dir != "" {
		if err := os.RemoveAll(tools.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// What is in the environment, and what its users have on the host.
const (
	inEnv    = "pytest==8.3.4\npytest-xdist==3.6.1\nipykernel==6.29.5\n"
	onHost   = "pytest==8.3.4\npytest-xdist==3.6.1\ntox==4.23.2\nnox==2024.10.9\npre-commit==4.0.1\njupyter_client==8.6.3\n"
	oneTest  = "import os\ndef test_sandboxed():\n    assert os.getuid() == 1000 and not os.path.exists('/etc/shadow')\n"
	printOne = "import sys; print(sys.prefix, sys.executable)"
)

var tools struct {
	sync.Once
	dir string
	err error
}

// hostTools are a plain venv of the system's Python, for the whole package.
func hostTools(t *testing.T) string {
	t.Helper()
	need.Root(t)
	need.Network(t)
	need.Python(t)
	tools.Do(func() {
		if tools.dir, tools.err = os.MkdirTemp("", "sbxrun-tools-"); tools.err != nil {
			return
		}
		req := filepath.Join(tools.dir, "requirements.txt")
		if tools.err = os.WriteFile(req, []byte(onHost), 0o600); tools.err != nil {
			return
		}
		for _, argv := range [][]string{
			{"/usr/bin/python3", "-m", "venv", tools.dir},
			{tools.dir + "/bin/pip", "install", "-q", "--disable-pip-version-check", "-r", req},
		} {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
			cancel()
			if err != nil {
				tools.err = fmt.Errorf("%v: %w\n%s", argv, err, out)
				return
			}
		}
	})
	require.NoError(t, tools.err)
	return filepath.Join(tools.dir, "bin")
}

// box is a project with a shim folder in it.
type box struct {
	t         *testing.T
	s         *harness.Sbx
	dir, venv string
}

func newBox(t *testing.T, flags ...string) *box {
	t.Helper()
	need.Network(t)
	need.Python(t)
	b := &box{t: t, s: harness.New(t), dir: t.TempDir()}
	b.venv = filepath.Join(b.dir, ".venv")
	b.write("requirements.txt", inEnv)
	b.write("test_one.py", oneTest)
	b.shim(append(append([]string{"-r", "requirements.txt"}, flags...), b.venv)...)
	return b
}

func (b *box) write(name, text string) {
	b.t.Helper()
	require.NoError(b.t, os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o644))
}

// shim runs env shim in the project.
func (b *box) shim(args ...string) {
	b.t.Helper()
	cmd := b.s.Cmd(append([]string{"env", "shim"}, args...)...)
	cmd.Dir = b.dir
	out, err := cmd.CombinedOutput()
	require.NoError(b.t, err, "%s", out)
}

// cmd prepares a program in the project; a name without a slash is the shim's.
func (b *box) cmd(program string, args ...string) *exec.Cmd {
	b.t.Helper()
	if !strings.Contains(program, "/") {
		program = filepath.Join(b.venv, "bin", program)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	b.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = b.dir
	cmd.Env = append(os.Environ(), "SBXRUN_SECRET=visible")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run gives the exit code and both outputs.
func (b *box) run(program string, args ...string) (int, string) {
	b.t.Helper()
	cmd := b.cmd(program, args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestAShimIsUsedAsAVenv(t *testing.T) {
	b := newBox(t)
	outside := filepath.Join(t.TempDir(), "probe.py")
	require.NoError(t, os.WriteFile(outside, []byte("import os, sys; print(sys.argv[1:], os.listdir(os.path.dirname(__file__)))"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(outside), "secret"), nil, 0o600))
	own := b.venv + " " + b.venv + "/bin/python\n"
	for name, c := range map[string]struct {
		args []string
		code int
		out  string
	}{
		"its paths are the shim's":          {[]string{"python", "-c", printOne}, 0, own},
		"by another name":                   {[]string{"python3.11", "-c", "import sys; print(sys.prefix)"}, 0, b.venv + "\n"},
		"a child finds the same":            {[]string{"python", "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(sys.prefix, sys.executable)'])"}, 0, own},
		"exit code":                         {[]string{"python", "-c", "raise SystemExit(7)"}, 7, ""},
		"a file that is missing":            {[]string{"python", "none.py"}, 2, b.venv + "/bin/python: can't open file '" + b.dir + "/none.py': [Errno 2] No such file or directory\n"},
		"a script of an editor's":           {[]string{"python", "-I", outside, "a b", "$x"}, 0, "['a b', '$x'] ['probe.py']\n"},
		"the caller's variables stay out":   {[]string{"python", "-c", "import os; print('SBXRUN_SECRET' in os.environ, os.environ['VIRTUAL_ENV'])"}, 0, "False " + b.venv + "\n"},
		"the project is written as its own": {[]string{"python", "-c", "open('made.txt', 'w').write('x'); import os; print(os.getcwd())"}, 0, b.dir + "\n"},
		"no network":                        {[]string{"python", "-c", "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 5)\nexcept OSError as e: print(e.errno)"}, 0, "101\n"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out := b.run(c.args[0], c.args[1:]...)
			assert.Equal(t, c.code, code, out)
			if c.out != "" {
				assert.Equal(t, c.out, out)
			}
		})
	}
	st, err := os.Stat(filepath.Join(b.dir, "made.txt"))
	require.NoError(t, err)
	assert.EqualValues(t, 0, st.Sys().(*syscall.Stat_t).Uid, "the project's owner")

	cmd := b.cmd("python", "-c", "import sys; [print(l.upper(), end='', flush=True) for l in sys.stdin]")
	cmd.Stdin = strings.NewReader("one\ntwo\n")
	out, err := cmd.Output()
	require.NoError(t, err)
	assert.Equal(t, "ONE\nTWO\n", string(out))

	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1} {
		cmd := b.cmd("python", "-c", "import time; print('up', flush=True); time.sleep(100)")
		var said bytes.Buffer
		cmd.Stderr = &said
		r, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = io.ReadFull(r, make([]byte, 3))
		require.NoError(t, err)
		require.NoError(t, cmd.Process.Signal(sig))
		_ = cmd.Wait()
		assert.Equal(t, sig, cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(), "it ends as python does: %v", cmd.ProcessState)
		assert.NotContains(t, said.String(), "sbxrun")
	}
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSEGV, syscall.SIGABRT} {
		cmd := b.cmd("python", "-c", fmt.Sprintf("import os; os.kill(os.getpid(), %d)", sig))
		out, _ := cmd.CombinedOutput()
		assert.Equal(t, sig, cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(), "%v", cmd.ProcessState)
		assert.Empty(t, string(out))
	}

	sh := b.cmd("/bin/sh", "-c", `. .venv/bin/activate; command -v pytest; pytest -q test_one.py | tail -n 1; deactivate; command -v pytest || echo none`)
	sh.Env = []string{"PATH=/usr/bin:/bin", "NO_COLOR=1"}
	out, err = sh.CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Regexp(t, `^`+b.venv+`/bin/pytest\n1 passed in [^\n]*\nnone\n$`, string(out))
}

// What is in the folder is executed on the host.
func TestNothingInsideCanChangeTheShim(t *testing.T) {
	b := newBox(t)
	before, err := os.ReadFile(filepath.Join(b.venv, "bin/python"))
	require.NoError(t, err)
	for _, code := range []string{
		"open('.venv/bin/python', 'w')", "open('.venv/sbxrun.json', 'w')", "os.rename('.venv', 'x')", "os.unlink('.venv/bin/pytest')",
		"os.rename('requirements.txt', '.venv/bin/python')", "shutil.rmtree('.venv')", "os.symlink('/x', '.venv/bin/evil')", "os.chmod('.venv', 0o777)",
	} {
		rc, out := b.run("python", "-c", "import os, shutil; "+code)
		assert.Equal(t, 1, rc, "%s: %s", code, out)
	}
	after, err := os.ReadFile(filepath.Join(b.venv, "bin/python"))
	require.NoError(t, err)
	assert.Equal(t, string(before), string(after))
	_, err = os.Stat(filepath.Join(b.venv, "bin/evil"))
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestToolsThatRunTests(t *testing.T) {
	bin := hostTools(t)
	b := newBox(t, "-v", filepath.Dir(bin)+":"+filepath.Dir(bin)+":ro")
	b.write("tox.ini", "[tox]\nenv_list = py\nno_package = true\n[testenv]\nskip_install = true\nallowlist_externals = {tox_root}/.venv/bin/*\n"+
		"commands = {tox_root}/.venv/bin/pytest -q test_one.py\n")
	b.write("noxfile.py", "import nox\n@nox.session(venv_backend='none')\ndef tests(session):\n    session.run('.venv/bin/pytest', '-q', 'test_one.py', external=True)\n")
	b.write(".pre-commit-config.yaml", "repos:\n- repo: local\n  hooks:\n  - {id: tests, name: tests, language: system, entry: .venv/bin/pytest -q test_one.py, pass_filenames: false, always_run: true}\n")
	for _, argv := range [][]string{{"init", "-q"}, {"add", "requirements.txt", ".pre-commit-config.yaml"}} {
		out, err := b.cmd("/usr/bin/git", argv...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	python := "popen//python=" + filepath.Join(b.venv, "bin/python")
	for name, argv := range map[string][]string{
		"pytest":                     {"pytest", "-q", "test_one.py"},
		"xdist inside":               {"pytest", "-q", "-n", "2", "test_one.py"},
		"xdist over two sandboxes":   {bin + "/pytest", "-q", "--dist", "load", "--maxfail=1", "--max-worker-restart=0", "--tx", python, "--tx", python, "test_one.py"},
		"tox":                        {bin + "/tox", "run"},
		"nox":                        {bin + "/nox", "-s", "tests"},
		"pre-commit":                 {bin + "/pre-commit", "run", "-a", "-v"},
		"virtualenv's own discovery": {bin + "/virtualenv", "--no-seed", "--app-data", t.TempDir(), "-p", filepath.Join(b.venv, "bin/python"), filepath.Join(t.TempDir(), "made")},
	} {
		t.Run(name, func(t *testing.T) {
			code, out := b.run(argv[0], argv[1:]...)
			require.Equal(t, 0, code, out)
			if !strings.HasPrefix(name, "virtualenv") {
				assert.Contains(t, out, "1 passed", out)
			}
		})
	}
	b.write("test_one.py", oneTest+"def test_bad(): assert 0\n")
	for name, argv := range map[string][]string{
		"xdist": {bin + "/pytest", "-q", "--dist", "load", "--max-worker-restart=0", "--tx", python, "test_one.py"},
		"tox":   {bin + "/tox", "run"},
	} {
		code, out := b.run(argv[0], argv[1:]...)
		assert.Equal(t, 1, code, "%s: %s", name, out)
		assert.Contains(t, out, "1 failed, 1 passed", name)
	}
}

func TestAJupyterKernelRunsInASandbox(t *testing.T) {
	bin := hostTools(t)
	b := newBox(t)
	data := t.TempDir()
	o := b.s.Do("env", "kernel", "-r", filepath.Join(b.dir, "requirements.txt"), "--data-dir", data, "box")
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	script, err := filepath.Abs("testdata/jupyter.py")
	require.NoError(t, err)
	cmd := b.cmd(bin+"/python", script, b.dir)
	cmd.Env = append(cmd.Env, "JUPYTER_DATA_DIR="+data, "JUPYTER_RUNTIME_DIR="+t.TempDir())
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(t, cmd.Run(), "%s%s", &stdout, &stderr)
	assert.Equal(t, "42\n1000 "+b.dir+" False\nKeyboardInterrupt\nlives\nforgot\nforgot\nended\n", stdout.String())

	o = b.s.Do("env", "kernel", "--remove", "--data-dir", data, "box")
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	_, err = os.Stat(filepath.Join(data, "kernels/box"))
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestADebuggerAttachesByAPublishedPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	b := newBox(t, "-p", fmt.Sprintf("127.0.0.1:%d:5678", port)) // debugpy comes with ipykernel
	b.write("app.py", "print('ran')\n")
	cmd := b.cmd("python", "-Xfrozen_modules=off", "-m", "debugpy", "--listen", "5678", "--wait-for-client", "app.py")
	require.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	const ask = `{"seq":1,"type":"request","command":"initialize","arguments":{"adapterID":"t"}}`
	answer := make([]byte, 16)
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return false
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintf(c, "Content-Length: %d\r\n\r\n%s", len(ask), ask)
		_, err = io.ReadFull(c, answer)
		return err == nil
	}, time.Minute, 100*time.Millisecond)
	assert.Equal(t, "Content-Length: ", string(answer))
}

// A sandbox may write the recipe. What it wrote there must neither be baked nor
// asked of an index, whatever the network of the shim is.
func TestAShimKeepsItsEnvironment(t *testing.T) {
	need.Network(t)
	need.Python(t)
	b := &box{t: t, s: harness.NewEmpty(t), dir: t.TempDir()}
	b.venv = filepath.Join(b.dir, ".venv")
	b.write("requirements.txt", "iniconfig==2.1.0\n")
	b.shim("-r", "requirements.txt", b.venv)
	version := []string{"-c", "import importlib.metadata as m; print(m.version('iniconfig'))"}
	_, out := b.run("python", version...)
	assert.Equal(t, "2.1.0\n", out)

	b.write("requirements.txt", "--index-url http://127.0.0.1:9/\niniconfig==2.3.1\n")
	_, out = b.run("python", version...)
	assert.Equal(t, "2.1.0\n", out)
	o := b.s.Do("env", "prune", "--all") // what is gone is baked again, from the lock
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	_, out = b.run("python", version...)
	assert.Equal(t, "2.1.0\n", out)

	b.write("requirements.txt", "iniconfig==2.3.1\npytest==8.3.4\n")
	b.shim("-r", "requirements.txt", b.venv)
	_, out = b.run("python", version...)
	assert.Equal(t, "2.3.1\n", out)
	code, out := b.run("pytest", "-q", "test_none.py")
	assert.Equal(t, 4, code, out)

	o = b.s.Do("env", "build", "--name", "n", "-r", filepath.Join(b.dir, "requirements.txt"))
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	b.shim("--with", "n", b.venv)
	o = b.s.Do("env", "rm", "n")
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	code, out = b.run("python", version...)
	assert.Equal(t, 125, code)
	assert.Regexp(t, `^sbxrun: use environment "?[0-9a-f]{12}"?: it was removed\nhint: .*env shim --with n `+b.venv+`\n$`, out)

	b.shim("--remove", b.venv)
	_, err := os.Stat(b.venv)
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestWhereAShimMayNotBe(t *testing.T) {
	b := newBox(t)
	other := filepath.Join(t.TempDir(), "other")
	require.NoError(t, os.Mkdir(other, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(other, "mine"), nil, 0o600))
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"deep in the project":   {[]string{"-r", "requirements.txt", filepath.Join(b.dir, "a/b")}, "could replace it"},
		"the project itself":    {[]string{"-r", "requirements.txt", b.dir}, "could replace it"},
		"in a writable volume":  {[]string{"-r", "requirements.txt", "-v", filepath.Dir(other) + ":/x", other}, "could replace it"},
		"a colon":               {[]string{"-r", "requirements.txt", filepath.Join(t.TempDir(), "a:b")}, "colon"},
		"a flag of one run":     {[]string{"-r", "requirements.txt", "--name", "x", filepath.Join(t.TempDir(), "v")}, "not for shims"},
		"credentials":           {[]string{"-r", "requirements.txt", "--index-url", "https://me:secret@127.0.0.1/", filepath.Join(t.TempDir(), "v")}, "written down"},
		"a folder of others":    {[]string{"-r", "requirements.txt", other}, "there is something else"},
		"removing it":           {[]string{"--remove", other}, "there is something else"},
		"removing nothing":      {[]string{"--remove", filepath.Join(other, "none")}, "no folder of env shim"},
		"no environment":        {[]string{other}, "no environment"},
		"a file that is no one": {[]string{"-r", "none.txt", filepath.Join(t.TempDir(), "v")}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := b.s.Cmd(append([]string{"env", "shim"}, c.args...)...)
			cmd.Dir = b.dir
			out, err := cmd.CombinedOutput()
			require.Error(t, err)
			assert.Contains(t, string(out), c.want)
			assert.LessOrEqual(t, strings.Count(string(out), "\n"), 2, "%s", out)
		})
	}
	_, err := os.Stat(filepath.Join(other, "mine"))
	require.NoError(t, err)
}
