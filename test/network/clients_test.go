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
	"curl":     `curl -sS -m 20 "$1"`,
	"wget":     `wget -q -T 20 -t 1 -O - "$1"`,
	"git":      `git ls-remote "$1/repo.git"`,
	"pip":      `python3 -m pip --disable-pip-version-check download -q --retries 0 --timeout 20 --no-cache-dir -d /tmp -i "$1/simple" --trusted-host one.test --trusted-host two.test nothing`,
	"node":     `node -e 'fetch(process.argv[1]).then(r => r.text()).then(console.log)' "$1"`,
	"npm":      `npm_config_cache=/tmp/npm npm view --fetch-retries 0 --registry "$1/" nothing`,
	"java":     `java -XX:+UseSerialGC -Xshare:auto /client/Get.java "$1"`,
	"go":       `/client/get "$1"`,
	"python":   `python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read())' "$1"`,
	"requests": `python3 -c 'import sys, requests; print(requests.get(sys.argv[1], timeout=20).text)' "$1"`,
	"httpx":    `python3 -c 'import sys, httpx; print(httpx.get(sys.argv[1], timeout=20).text)' "$1"`,
	"aiohttp": `python3 -c '
import sys, asyncio, aiohttp
async def main():
    async with aiohttp.ClientSession() as s, s.get(sys.argv[1]) as r: print(await r.text())
asyncio.run(main())' "$1"`,
}

// installed says whether a program is there.
func installed(name string) bool {
	switch name {
	case "python", "pip", "go":
		return true
	case "requests", "httpx", "aiohttp":
		return exec.Command("/usr/bin/python3", "-c", "import "+name).Run() == nil
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
	const script = `ask() { eval "$PROGRAM"; }
for host in one.test two.test; do
	ask "http://$host" </dev/null
	(unset HTTP_PROXY HTTPS_PROXY http_proxy https_proxy NO_PROXY no_proxy; ask "http://$host" </dev/null)
done; true`
	for name, program := range programs {
		t.Run(name, func(t *testing.T) {
			if !installed(name) {
				t.Skipf("%s is not installed", name)
			}
			etc, _ := filepath.Glob("/etc/java-*-openjdk") // Debian's Java is not complete without
			var volumes []string
			for _, d := range etc {
				volumes = append(volumes, "-v", d+":"+d+":ro")
			}
			o := s.Run(append(volumes, "-q", "-m", "2g", "--cpus", "2", "--allow", "one.test:80", "-v", dir+":/client:ro", "-e", "PROGRAM="+program, "--timeout", "100", "--", "sh", "-c", script)...)
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
		})
	}
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
