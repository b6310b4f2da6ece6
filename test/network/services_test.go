package network_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

const (
	webServer = `command = ["python3", "-m", "http.server", "--directory", "/usr/share/zoneinfo"]` + "\n"
	askWeb    = "import urllib.request as u; print(u.urlopen('http://%s:8000/UTC').status)"
)

// settings writes a settings file.
func settings(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sbxrun.toml")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// services of a report, by name.
func services(t *testing.T, o *harness.Outcome) map[string]map[string]any {
	t.Helper()
	all, ok := o.Report.All["services"].([]any)
	require.True(t, ok, o)
	out := map[string]map[string]any{}
	for _, s := range all {
		out[s.(map[string]any)["name"].(string)] = s.(map[string]any)
	}
	return out
}

func TestServicesAreReachedByNameAndLocalhost(t *testing.T) {
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		for _, ready := range []string{`ready = 8000`, `ready = "tcp:8000"`, `ready = "log:Serving HTTP"`, `ready = ["python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 8000))"]`} {
			file := settings(t, "[services.web]\n"+webServer+ready+"\nready_timeout = '60s'\nenv = {PYTHONUNBUFFERED = '1'}\n")
			o := s.Run("-q", "-f", file, "--", "python3", "-c", fmt.Sprintf(askWeb+"; "+askWeb, "web", "localhost"))
			require.Equal(t, 0, o.Code, "%s: %v", ready, o)
			require.Equal(t, "200\n200\n", string(o.Stdout))
			web := services(t, o)["web"]
			require.Equal(t, "canceled", web["status"], o)
			require.Contains(t, web["log"], "GET /UTC")
			require.NotZero(t, web["ready_ms"])
		}
	})
}

func TestServicesThatDoNotComeUpEndTheRun(t *testing.T) {
	need.Python(t)
	s := harness.New(t)
	for name, c := range map[string]struct{ table, says, hint string }{
		"ends":          {`command = ["sh", "-c", "echo no room; exit 3"]` + "\nready = 8000", "it ended before it was ready (exit, exit code 3)", "no room"},
		"not found":     {`command = ["no-such-command"]` + "\nready = 8000", "no such file or directory", "it wrote nothing"},
		"silent":        {`command = ["sleep", "60"]` + "\nready = 8000\nready_timeout = '300ms'", "not ready after 300ms", "it wrote nothing"},
		"no check":      {webServer + `ready = ["no-such-command"]`, "no-such-command", ""},
		"check hangs":   {`command = ["sleep", "60"]` + "\nready = ['sleep', '50']\nready_timeout = '300ms'", "not ready after 300ms", "it wrote nothing"},
		"ends in check": {`command = ["sleep", "1"]` + "\nready = ['sleep', '50']", "it ended before it was ready", "it wrote nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			o := s.Run("-q", "-f", settings(t, "[services.db]\n"+c.table+"\n"), "--", "echo", "started")
			require.Equal(t, 125, o.Code, o)
			require.Equal(t, "setup-failed", o.Report.Status)
			require.Equal(t, "services", o.Report.Stage)
			require.Empty(t, o.Stdout)
			assert.Contains(t, o.Report.Message, c.says)
			assert.Contains(t, o.Report.Hint, c.hint)
			assert.Contains(t, o.Report.Message, "db")
		})
	}
}

func TestBadServicesAreRefused(t *testing.T) {
	s := harness.New(t)
	for name, c := range map[string]struct{ text, says string }{
		"no command":   {"[services.a]\nready = 1\n", "command is missing"},
		"no table":     {"services = 3\n", "not a table of services"},
		"bad name":     {"[services.A_b]\ncommand = ['x']\n", "not a name"},
		"localhost":    {"[services.localhost]\ncommand = ['x']\n", "not a name"},
		"own network":  {"[services.a]\ncommand = ['x']\nnetwork = 'host'\n", "not for a service"},
		"own report":   {"[services.a]\ncommand = ['x']\nreport = '/tmp/x'\n", "not for a service"},
		"bad ready":    {"[services.a]\ncommand = ['x']\nready = 70000\n", "neither a port"},
		"bad timeout":  {"[services.a]\ncommand = ['x']\nready_timeout = 'soon'\n", "not a duration"},
		"unknown key":  {"[services.a]\ncommand = ['x']\nrestart = 'always'\n", "unknown key"},
		"host network": {"network = 'host'\n[services.a]\ncommand = ['x']\n", "services need a network"},
		"no such base": {"[services.a]\ncommand = ['x']\nbase = 'nowhere'\n", "nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			o := s.Run("-f", settings(t, c.text), "--", "true")
			require.Equal(t, 125, o.Code, o)
			require.Contains(t, string(o.Stderr), c.says)
		})
	}
}

// A service that dies does not end the job, and is told.
func TestServiceThatDiesIsTold(t *testing.T) {
	s := harness.New(t)
	o := s.Run("-f", settings(t, "[services.a]\ncommand = ['sh', '-c', 'echo bye; exit 7']\n"), "--", "sleep", "1")
	require.Equal(t, 0, o.Code, o)
	a := services(t, o)["a"]
	require.Equal(t, "failed", a["status"])
	require.EqualValues(t, 7, a["exit_code"])
	require.Contains(t, a["log"], "bye")
	require.Contains(t, string(o.Stderr), "service a: failed")
}

// Whoever waits for a service can be stopped, and what is killed leaves nothing.
func TestServicesEndWithSbxrun(t *testing.T) {
	s := harness.New(t)
	file := settings(t, "[services.a]\ncommand = ['sleep', '1000']\nready = 8000\n")
	for sig, code := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143, syscall.SIGKILL: -1} {
		cmd := s.Cmd("run", "-f", file, "--", "true")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		require.NoError(t, cmd.Start())
		time.Sleep(300 * time.Millisecond) // it waits for the service
		require.NoError(t, cmd.Process.Signal(sig))
		require.Equal(t, code, s.Wait(cmd).Code, "%v: %s", sig, stderr.String())
	}
	require.Equal(t, 0, s.Do("gc").Code)
}

// In egress mode a service has the way out that the job has.
func TestServicesShareTheWayOut(t *testing.T) {
	s := sbx(t)
	file := settings(t, `allow = ["one.test"]
[services.mirror]
command = ["python3", "-c", """
import http.server, urllib.request
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        b = urllib.request.urlopen('http://one.test/').read()
        self.send_response(200); self.end_headers(); self.wfile.write(b)
http.server.HTTPServer(('127.0.0.1', 8000), H).serve_forever()"""]
ready = 8000
ready_timeout = '60s'
`)
	o := s.Run("-q", "-f", file, "--", "python3", "-c", "import urllib.request as u; print(u.urlopen('http://mirror:8000/').read().decode())")
	require.Equal(t, 0, o.Code, o)
	require.Equal(t, "one\n", string(o.Stdout))
}

// A real database, where Debian's is installed.
func TestPostgreSQLBesideAJob(t *testing.T) {
	need.Python(t)
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(found) == 0 {
		t.Skip("needs Debian's postgresql below /usr/lib/postgresql")
	}
	s := harness.New(t)
	bin := filepath.Dir(found[0])
	file := settings(t, fmt.Sprintf(`[services.db]
command = ["sh", "-c", "%[1]s/initdb -D /tmp/data -U postgres >/dev/null && exec %[1]s/postgres -D /tmp/data -k /tmp"]
ready = ["%[1]s/pg_isready", "-h", "127.0.0.1"]
disk = "400m"
`, bin))
	o := s.Run("-q", "-f", file, "--", bin+"/psql", "-h", "db", "-U", "postgres", "-Atc", "select 6 * 7")
	require.Equal(t, 0, o.Code, o)
	require.Equal(t, "42\n", string(o.Stdout))
	require.Equal(t, "ok", services(t, o)["db"]["status"], "it was stopped as it wants to be")
}

// A service is ready when its command runs, not before; and it has the network
// until it has stopped.
func TestServicesHaveTheNetworkToTheEnd(t *testing.T) {
	need.Python(t)
	s := sbx(t)
	o := s.Run("-q", "-f", settings(t, "[services.db]\ncommand = ['/nonexistent']\n"), "--", "true")
	require.Equal(t, 125, o.Code, o)
	require.Contains(t, o.Report.Message, "it ended before it was ready")
	file := settings(t, `network = "full"
[services.last]
command = ["python3", "-c", """
import signal, socket, time, os
def end(*_):
    time.sleep(0.3)
    s = socket.create_connection(("198.51.100.10", 80), 5); s.sendall(b"bye\\n"); print(s.recv(100), flush=True); os._exit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
while True: time.sleep(1)"""]
ready = "log:up"
`)
	o = s.Run("-q", "-f", file, "--", "true")
	require.Equal(t, 0, o.Code, o)
	require.Contains(t, services(t, o)["last"]["log"], "one bye")
	file = settings(t, "[services.web]\ncommand = ['python3', '-c', 'import http.server as h; h.HTTPServer((\"127.0.0.1\", 80), h.SimpleHTTPRequestHandler).serve_forever()']\nready = 80\nready_timeout = '30s'\n")
	o = s.Run("-q", "-f", file, "--", "true")
	require.Equal(t, 0, o.Code, "a low port without privileges: %v", o)
}
