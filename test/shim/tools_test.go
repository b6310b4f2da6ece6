package shim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
)

// A terminal: the prompt, keys, Ctrl-C to the program, its size.
func TestATerminal(t *testing.T) {
	b := newBox(t)
	sc := harness.NewScreen(t)
	before := sc.Mode()
	sc.Start(b.cmd("python", "-q"))
	sc.Shows(">>> ")
	key := func(s string) {
		_, err := sc.Master.WriteString(s)
		require.NoError(t, err)
	}
	key("import os; print(os.get_terminal_size().columns * 1000)\r")
	sc.Shows("77000")
	key("while True: pass\r\r")
	time.Sleep(300 * time.Millisecond)
	key("\x03")
	sc.Shows("KeyboardInterrupt")
	key("print(6 * 7 * 1000)\r")
	sc.Shows("42000")
	key("exit(5)\r")
	require.Eventually(t, func() bool { return sc.Mode() == before }, 20*time.Second, 20*time.Millisecond, "raw mode is over")
}

// pytest's debugger asks on the terminal.
func TestPytestStopsInTheDebugger(t *testing.T) {
	b := newBox(t)
	b.write("test_bad.py", "def test_bad():\n    answer = 42 * 1000\n    assert 0\n")
	sc := harness.NewScreen(t)
	before := sc.Mode()
	sc.Start(b.cmd("pytest", "--pdb", "-q", "test_bad.py"))
	sc.Shows("(Pdb)")
	_, err := sc.Master.WriteString("answer\r")
	require.NoError(t, err)
	sc.Shows("42000")
	_, err = sc.Master.WriteString("q\r")
	require.NoError(t, err)
	require.Eventually(t, func() bool { return sc.Mode() == before }, 20*time.Second, 20*time.Millisecond)
}

// xdist's workers over the environment's own packages, where the master is of
// another Python: they keep their own sys.path.
func TestXdistWorkersKeepTheirOwnPackages(t *testing.T) {
	bin := hostTools(t)
	b := newBox(t)
	b.write("conftest.py", "try:\n    import xdist.workermanage\nexcept ImportError:\n    pass\nelse:\n    xdist.workermanage._sys_path = None\n")
	b.write("test_own.py", "import sys\ndef test_own(tmp_path):\n    import ipykernel\n    assert sys.prefix.endswith('.venv') and ipykernel.__file__.startswith(sys.prefix)\n    (tmp_path / 'x').write_text('y')\n")
	rc, out := b.run(bin+"/pytest", "-q", "--basetemp", "basetemp", "--dist", "load", "--max-worker-restart=0", "--tx", "2*popen//python="+b.venv+"/bin/python", "test_own.py")
	assert.Equal(t, 0, rc, out)
	assert.Contains(t, out, "1 passed")
}

// PyCharm keeps its scripts in a folder of which they import one another.
func TestAFolderOfHelpersIsShownByAFlag(t *testing.T) {
	b := newBox(t)
	helpers := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(helpers, "helper.py"), []byte("word = 'helped'\n"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(helpers, "packaging_tool.py"), []byte("import sys, helper, importlib.metadata as m\nprint(helper.word, m.version('pytest'), sys.path[0])\n"), 0o644))
	tool := filepath.Join(helpers, "packaging_tool.py")
	rc, out := b.run("python", tool, "list")
	assert.Equal(t, 1, rc, "%s: only the script is shown", out)
	b.shim("-r", "requirements.txt", "-v", helpers+":"+helpers+":ro", b.venv)
	rc, out = b.run("python", tool, "list")
	assert.Equal(t, 0, rc, out)
	assert.Equal(t, "helped 8.3.4 "+helpers+"\n", out)
}

// VS Code's debugger: the adapter speaks on standard input and output, starts the
// program itself and is in one sandbox with it; no port of the host's is used.
func TestVSCodesDebuggerStopsAtABreakpoint(t *testing.T) {
	b := newBox(t)
	app := filepath.Join(b.dir, "app.py")
	b.write("app.py", "word = 'sto'\nword += 'pped'\nprint(word)\n")
	cmd := b.cmd("python", "-Xfrozen_modules=off", "-m", "debugpy.adapter")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	d := &dap{t: t, in: in, out: bufio.NewReader(stdout), stderr: &stderr}
	defer time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }).Stop()
	d.send("initialize", map[string]any{"adapterID": "python", "pathFormat": "path", "linesStartAt1": true})
	d.until("response", "initialize")
	d.send("launch", map[string]any{"program": app, "cwd": b.dir, "console": "internalConsole", "python": []string{b.venv + "/bin/python", "-Xfrozen_modules=off"}})
	d.until("event", "initialized")
	d.send("setBreakpoints", map[string]any{"source": map[string]any{"path": app}, "breakpoints": []any{map[string]any{"line": 3}}})
	d.send("configurationDone", map[string]any{})
	stopped := d.until("event", "stopped")
	d.send("stackTrace", map[string]any{"threadId": stopped["body"].(map[string]any)["threadId"]})
	frame := d.until("response", "stackTrace")["body"].(map[string]any)["stackFrames"].([]any)[0].(map[string]any)
	assert.Equal(t, app, frame["source"].(map[string]any)["path"])
	assert.EqualValues(t, 3, frame["line"])
	d.send("evaluate", map[string]any{"expression": "word", "frameId": frame["id"]})
	assert.Equal(t, "'stopped'", d.until("response", "evaluate")["body"].(map[string]any)["result"])
	d.send("continue", map[string]any{"threadId": stopped["body"].(map[string]any)["threadId"]})
	code := d.until("event", "exited")["body"].(map[string]any)["exitCode"]
	assert.EqualValues(t, 0, code)
}

// dap speaks the debug adapter protocol.
type dap struct {
	t      *testing.T
	in     io.Writer
	out    *bufio.Reader
	stderr *bytes.Buffer
	seq    int
}

func (d *dap) send(command string, args map[string]any) {
	d.t.Helper()
	d.seq++
	b, err := json.Marshal(map[string]any{"seq": d.seq, "type": "request", "command": command, "arguments": args})
	require.NoError(d.t, err)
	_, err = fmt.Fprintf(d.in, "Content-Length: %d\r\n\r\n%s", len(b), b)
	require.NoError(d.t, err)
}

// until reads up to a message of that kind; a request that failed ends the test.
func (d *dap) until(kind, name string) map[string]any {
	d.t.Helper()
	for {
		size := 0
		for {
			line, err := d.out.ReadString('\n')
			require.NoError(d.t, err, "%s %s: %s", kind, name, d.stderr)
			if line = strings.TrimSpace(line); line == "" {
				break
			}
			if v, ok := strings.CutPrefix(line, "Content-Length: "); ok {
				size, err = strconv.Atoi(v)
				require.NoError(d.t, err)
			}
		}
		b := make([]byte, size)
		_, err := io.ReadFull(d.out, b)
		require.NoError(d.t, err)
		var m map[string]any
		require.NoError(d.t, json.Unmarshal(b, &m))
		require.NotEqual(d.t, false, m["success"], "%s", b)
		if m["type"] == kind && (m["event"] == name || m["command"] == name) {
			return m
		}
	}
}

// A server that is killed takes its kernels along.
func TestAKernelEndsWithItsServer(t *testing.T) {
	bin := hostTools(t)
	b := newBox(t)
	data := t.TempDir()
	o := b.s.Do("env", "kernel", "-r", filepath.Join(b.dir, "requirements.txt"), "--data-dir", data, "box")
	require.Equal(t, 0, o.Code, "%s", o.Stderr)
	cmd := b.cmd(bin+"/python", "-c", "import sys, time\nfrom jupyter_client.manager import KernelManager\nkm = KernelManager(kernel_name='box')\nkm.start_kernel()\n"+
		"kc = km.blocking_client()\nkc.start_channels()\nkc.wait_for_ready(timeout=90)\nprint(km.provisioner.pid, flush=True)\ntime.sleep(100)")
	cmd.Env = append(cmd.Env, "JUPYTER_DATA_DIR="+data, "JUPYTER_RUNTIME_DIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	pid := "/proc/" + strings.TrimSpace(line)
	require.Eventually(t, func() bool { _, err := os.Stat(pid + "/exe"); return err != nil }, time.Minute, 100*time.Millisecond)
}

// An old test runner's interpreter of another path, as pip's: --python starts the
// interpreter with a script of pip's own folder.
func TestPipListsTheEnvironment(t *testing.T) {
	bin := hostTools(t)
	top := filepath.Dir(bin)
	b := newBox(t, "-v", top+":"+top+":ro")
	rc, out := b.run(bin+"/pip", "--python", b.venv, "list", "--disable-pip-version-check")
	assert.Equal(t, 0, rc, out)
	assert.Contains(t, out, "pytest-xdist")
	rc, out = b.run(bin+"/pip", "--python", b.venv, "install", "--no-index", "nothing")
	assert.NotEqual(t, 0, rc, out)
}
