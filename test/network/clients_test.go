package network_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

const javaClient = `import java.net.URI; import java.net.http.*;
class Get { public static void main(String[] a) throws Exception {
  System.out.println(HttpClient.newHttpClient().send(HttpRequest.newBuilder(URI.create(a[0])).build(), HttpResponse.BodyHandlers.ofString()).body()); } }`

const goClient = `package main
import ("fmt"; "io"; "net/http"; "os")
func main() { r, err := http.Get(os.Args[1]); if err != nil { fmt.Println(err); os.Exit(1) }; b, _ := io.ReadAll(r.Body); fmt.Println(string(b)) }`

// programs people have, as they ask for $1. Those that are not installed are left
// out; what each says is its own affair: the report says what was reached.
var programs = map[string]string{
	"curl":   `curl -sS -m 20 "$1"`,
	"wget":   `wget -q -T 20 -t 1 -O - "$1"`,
	"git":    `git ls-remote "$1/repo.git"`,
	"pip":    `python3 -m pip --disable-pip-version-check download -q --retries 0 --timeout 20 --no-cache-dir -d /tmp -i "$1/simple" --trusted-host one.test --trusted-host two.test nothing`,
	"node":   `node -e 'fetch(process.argv[1]).then(r => r.text()).then(console.log)' "$1"`,
	"npm":    `npm_config_cache=/tmp/npm npm view --fetch-retries 0 --registry "$1/" nothing`,
	"java":   `java -XX:+UseSerialGC -Xshare:auto /client/Get.java "$1"`,
	"go":     `/client/get "$1"`,
	"python": `python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read())' "$1"`,
}

// libraries of Python's, from the index.
var libraries = map[string]string{
	"requests": `python3 -c 'import sys, requests; print(requests.get(sys.argv[1], timeout=20).text)' "$1"`,
	"httpx":    `python3 -c 'import sys, httpx; print(httpx.get(sys.argv[1], timeout=20).text)' "$1"`,
	"aiohttp": `python3 -c '
import sys, asyncio, aiohttp
async def main():
    async with aiohttp.ClientSession() as s, s.get(sys.argv[1]) as r: print(await r.text())
asyncio.run(main())' "$1"`,
	"uv": `UV_NO_CACHE=1 uv pip install --target /tmp/x --default-index "$1/simple" --allow-insecure-host one.test --allow-insecure-host two.test nothing`,
}

// installed says whether a program is there.
func installed(name string) bool {
	switch name {
	case "python", "pip", "go":
		return true
	}
	p, err := exec.LookPath(name)
	real, _ := filepath.EvalSymlinks(p)
	return err == nil && strings.HasPrefix(real, "/usr/") // what a sandbox over the host's /usr sees
}

// Programs reach what is allowed and nothing else, whether they know of proxies or not.
func TestProgramsNeedNotKnow(t *testing.T) {
	need.Python(t)
	s := sbx(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Get.java"), []byte(javaClient), 0o644))
	src := filepath.Join(dir, "get.go")
	require.NoError(t, os.WriteFile(src, []byte(goClient), 0o644))
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "get"), src)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Logf("go client left out: %v: %s", err, out)
		delete(programs, "go")
	}
	for name, program := range programs {
		t.Run(name, func(t *testing.T) {
			if !installed(name) {
				t.Skipf("%s is not installed", name)
			}
			flags := []string{"-v", dir + ":/client:ro"}
			etc, _ := filepath.Glob("/etc/java-*-openjdk") // Debian's Java is not complete without
			for _, d := range etc {
				flags = append(flags, "-v", d+":"+d+":ro")
			}
			askBoth(t, s, program, flags...)
		})
	}
}

func TestPythonLibrariesNeedNotKnow(t *testing.T) {
	need.Python(t)
	need.Network(t)
	s := harness.New(t)
	file := filepath.Join(t.TempDir(), "requirements.txt")
	require.NoError(t, os.WriteFile(file, []byte("requests\nhttpx\naiohttp\nuv\n"), 0o600))
	o := s.Do("env", "build", "-q", "--name", "clients", "-r", file) // the index is beyond the real host
	require.Equal(t, 0, o.Code, o)
	newWorld(t, s)
	for name, program := range libraries {
		t.Run(name, func(t *testing.T) { askBoth(t, s, program, "--with", "clients") })
	}
}

// askBoth has a program ask what is allowed and what is not, with the proxy's
// variables and without, and looks at what was reached.
func askBoth(t *testing.T, s *harness.Sbx, program string, flags ...string) {
	t.Helper()
	const script = `ask() { eval "$PROGRAM"; }
for host in one.test two.test; do
	ask "http://$host" </dev/null
	(unset HTTP_PROXY HTTPS_PROXY http_proxy https_proxy NO_PROXY no_proxy; ask "http://$host" </dev/null)
done; true`
	o := s.Run(append(flags, "-q", "-m", "2g", "--cpus", "2", "--allow", "one.test:80", "-e", "PROGRAM="+program, "--timeout", "100", "--", "sh", "-c", script)...)
	require.Equal(t, 0, o.Code, o)
	reached := map[string]bool{}
	for _, d := range decisions(t, o) {
		reached[fmt.Sprintf("%s %v", d.Host, d.Allowed)] = true
		if d.Allowed {
			reached[d.Via] = true
		}
	}
	assert.True(t, reached["one.test true"], o)
	assert.True(t, reached["tcp"], "without a proxy: %v", o)
	assert.True(t, reached["two.test false"], o)
	assert.False(t, reached["one.test false"] || reached["two.test true"], o)
}

type decision struct {
	Via, Host, Address, Rule string
	Port                     int
	Allowed                  bool
	Count                    int64
}

// decisions of a report.
func decisions(t *testing.T, o *harness.Outcome) (out []decision) {
	t.Helper()
	b, err := json.Marshal(o.Report.All["network"].(map[string]any)["decisions"])
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &out))
	return out
}
