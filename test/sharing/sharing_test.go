// Package sharing moves real environments between stores by what people have: a
// registry, skopeo, umoci, files. What a forged image can do is tested beside the
// code, in envs/share.
package sharing

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
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
	"golang.org/x/crypto/bcrypt"

	"github.com/sbxrun/sbxrun/test/condachannel"
	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

const (
	iniconfig = "iniconfig==2.3.1 --hash=sha256:9121e2c1fdb355232495be3194c8dfe87ccc2d5dee45947b78e68f499790d7a7 " +
		"--hash=sha256:67f4b9c50da0dedf52af349e7749a80a9057a5031199791b906c3bb3ae878960\n"
	printVersion = "import importlib.metadata as m; print(m.version('iniconfig'))"
)

// installation is a store with an environment "web" of the host's Python.
func installation(t *testing.T) (s *harness.Sbx, digest string) {
	t.Helper()
	need.Network(t)
	need.Python(t)
	s = harness.New(t)
	return s, ok(t, s, "env", "build", "-q", "--name", "web", "-r", write(t, "requirements.txt", iniconfig))
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(p, []byte(text), 0o600))
	return p
}

// another is a second machine's store.
func another(t *testing.T) *harness.Sbx {
	t.Helper()
	return harness.NewEmpty(t)
}

// ok runs sbxrun, wants success and gives the last line of its output.
func ok(t *testing.T, s *harness.Sbx, args ...string) string {
	t.Helper()
	o := s.Do(args...)
	require.Equal(t, 0, o.Code, "%v", o)
	lines := strings.Split(strings.TrimSpace(string(o.Stdout)), "\n")
	return lines[len(lines)-1]
}

// no runs sbxrun and wants the exit code 1 and one line that says why.
func no(t *testing.T, s *harness.Sbx, says string, args ...string) {
	t.Helper()
	o := s.Do(args...)
	require.Equal(t, 1, o.Code, "%v", o)
	require.Contains(t, string(o.Stderr), says)
	require.LessOrEqual(t, strings.Count(string(o.Stderr), "\n"), 2, "an error and a hint: %s", o.Stderr)
}

// works wants an environment that is whole and runs.
func works(t *testing.T, s *harness.Sbx, name, digest string, flags ...string) {
	t.Helper()
	require.Contains(t, ok(t, s, "env", "verify", name), ": ok, ")
	require.Contains(t, ok(t, s, "env", "inspect", name)+string(s.Do("env", "inspect", name).Stdout), digest)
	o := s.Run(append(flags, "--with", name, "--", "python3", "-c", printVersion)...)
	require.Equal(t, "2.3.1\n", string(o.Stdout), "%v", o)
	require.Equal(t, digest, o.Report.Env.Digest)
}

// serve starts Debian's docker-registry on a free port of the loopback. With a
// password, its user is "me".
func serve(t *testing.T, password string) (host string) {
	t.Helper()
	program := need.Program(t, "docker-registry")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	host = l.Addr().String()
	require.NoError(t, l.Close())
	conf := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q}\n", t.TempDir(), host)
	if password != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		require.NoError(t, err)
		conf += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %q}}\n", write(t, "htpasswd", "me:"+string(hash)+"\n"))
	}
	cmd := exec.Command(program, "serve", write(t, "registry.yml", conf))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 200 {
		if r, err := http.Get("http://" + host + "/v2/"); err == nil {
			r.Body.Close()
			return host
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("the registry does not answer")
	return ""
}

// newKey makes a key pair, KEY and KEY.pub.
func newKey(t *testing.T) string {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key.pem")
	out, err := exec.Command("openssl", "genpkey", "-algorithm", "ed25519", "-out", key).CombinedOutput()
	require.NoError(t, err, "%s", out)
	out, err = exec.Command("openssl", "pkey", "-in", key, "-pubout", "-out", key+".pub").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return key
}

func TestPushAndPull(t *testing.T) {
	s, digest := installation(t)
	host := serve(t, "")
	key := newKey(t)
	ok(t, s, "env", "sign", "--key", key, "web")
	pushed := ok(t, s, "env", "push", "-q", "web", host+"/team/web:1")
	require.Equal(t, pushed, ok(t, s, "env", "push", "-q", "web", host+"/team/web:2"), "the same environment is the same image")
	no(t, s, "a digest is no name", "env", "push", "-q", "web", pushed)

	b := another(t)
	policy := write(t, "policy.toml", fmt.Sprintf("[[trust]]\nkeys = [%q]\nfor = ['%s/team/*']\n", key+".pub", host))
	require.Equal(t, digest, ok(t, b, "env", "pull", "-q", "--name", "web", "--digest", digest, "--policy", policy, host+"/team/web:1"))
	works(t, b, "web", digest)
	require.Contains(t, ok(t, b, "env", "verify", "--key", key+".pub", "web"), "signed by")
	require.Equal(t, digest, ok(t, b, "env", "pull", "-q", "--name", "pinned", pushed), "by digest")

	no(t, another(t), "not found", "env", "pull", "-q", host+"/team/web:3")
	no(t, another(t), "not found", "env", "pull", "-q", host+"/team/none:1")
	no(t, another(t), "it is environment "+digest, "env", "pull", "-q", "--digest", "sha256:"+strings.Repeat("0", 64), host+"/team/web:1")
	no(t, another(t), "no key is trusted for it", "env", "pull", "-q", "--policy", write(t, "policy.toml", ""), host+"/team/web:1")
	no(t, another(t), "connection refused", "env", "pull", "-q", "127.0.0.1:1/team/web:1")
	no(t, another(t), "not registry/repository:tag", "env", "pull", "-q", "web")
}

func TestLoginsAreUsedAndStayInTheirFiles(t *testing.T) {
	s, digest := installation(t)
	host := serve(t, "s3cret-word")
	t.Setenv("HOME", t.TempDir())
	no(t, s, "the registry wants a login", "env", "push", "-q", "web", host+"/team/web:1")
	login := func(password string) string {
		b, err := json.Marshal(map[string]any{"auths": map[string]any{host + "/team": map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("me:" + password))}}})
		require.NoError(t, err)
		return write(t, "auth.json", string(b))
	}
	t.Setenv("REGISTRY_AUTH_FILE", login("wrong-s3cret"))
	no(t, s, "the registry refuses it (401", "env", "push", "-q", "web", host+"/team/web:1")
	t.Setenv("REGISTRY_AUTH_FILE", login("s3cret-word"))
	ok(t, s, "env", "push", "-q", "web", host+"/team/web:1")
	b := another(t)
	o := b.Do("env", "pull", "--json", "--name", "web", host+"/team/web:1")
	require.Equal(t, 0, o.Code, "%v", o)
	require.NotContains(t, string(o.Stdout)+string(o.Stderr), "s3cret")
	works(t, b, "web", digest)
	require.NoError(t, filepath.WalkDir(b.Root, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			text, err := os.ReadFile(p)
			require.NoError(t, err)
			require.NotContains(t, string(text), "s3cret", p)
		}
		return nil
	}))
}

func tool(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(need.Program(t, argv[0]), argv[1:]...).CombinedOutput()
	require.NoError(t, err, "%v: %s", argv, out)
	return string(out)
}

func TestSkopeoCopiesWhatIsImported(t *testing.T) {
	s, digest := installation(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "web.tar")
	ok(t, s, "env", "export", "-q", "-o", file, "web")
	require.Contains(t, tool(t, "skopeo", "inspect", "oci-archive:"+file), digest)
	tool(t, "skopeo", "copy", "oci-archive:"+file, "docker-archive:"+filepath.Join(dir, "docker.tar")+":web:1")
	tool(t, "skopeo", "copy", "docker-archive:"+file, "oci:"+filepath.Join(dir, "layout")+":web")
	host := serve(t, "")
	tool(t, "skopeo", "copy", "--dest-tls-verify=false", "oci-archive:"+file, "docker://"+host+"/web:1")
	tool(t, "skopeo", "copy", "--dest-tls-verify=false", "--format", "v2s2", "oci-archive:"+file, "docker://"+host+"/web:docker")
	out, err := exec.Command("gzip", "-k", file).CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, source := range [][]string{{"import", filepath.Join(dir, "docker.tar")}, {"import", filepath.Join(dir, "layout")}, {"import", file + ".gz"}, {"pull", host + "/web:1"}, {"pull", host + "/web:docker"}} {
		b := another(t)
		require.Equal(t, digest, ok(t, b, "env", source[0], "-q", "--name", "web", source[1]))
		works(t, b, "web", digest)
	}
}

// interpreter makes a small root with the host's Python.
func interpreter(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	out, err := exec.Command("sh", "-euc", `
		d=$1; py=$(readlink -f /usr/bin/python3); v=$(basename "$py")
		mkdir -p "$d/usr/bin" "$d/usr/lib" "$d/usr/lib64" "$d/etc"
		ln -s usr/bin "$d/bin"; ln -s usr/lib "$d/lib"; ln -s usr/lib64 "$d/lib64"
		cp "$py" "$d/usr/bin/"; ln -s "$v" "$d/usr/bin/python3"; cp -L /bin/sh "$d/usr/bin/sh"
		cp -r "/usr/lib/$v" "$d/usr/lib/"; rm -rf "$d/usr/lib/$v/test" "$d/usr/lib/$v/EXTERNALLY-MANAGED"
		libc=$(ldd "$py" | grep -o '/[^ ]*/libc\.so[^ ]*'); libs=$(dirname "$libc")
		{ ldd "$py" /bin/sh "/usr/lib/$v"/lib-dynload/*.so 2>/dev/null | grep -o '/[^ :]*'; for l in libgcc_s.so.1 libpthread.so.0 librt.so.1 libdl.so.2; do echo "$libs/$l"; done; } | sort -u |
		while read -r l; do case $l in *.so*) mkdir -p "$d$(dirname "$l")"; cp -L "$l" "$d$l" || true;; esac; done
		echo 'root:x:0:0::/:/bin/sh' > "$d/etc/passwd"`, "sh", root).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return root
}

func TestWithItsBaseAnEnvironmentIsAnImageThatRuns(t *testing.T) {
	s, _ := installation(t)
	s.Root = filepath.Join(t.TempDir(), "root")
	ok(t, s, "base", "add", "-q", "small", interpreter(t))
	digest := ok(t, s, "env", "build", "-q", "--name", "web", "--base", "small", "-r", write(t, "requirements.txt", iniconfig))
	dir := t.TempDir()
	file := filepath.Join(dir, "web.tar")
	key := newKey(t)
	ok(t, s, "env", "sign", "--key", key, "web")
	ok(t, s, "env", "export", "-q", "--with-base", "-o", file, "web")

	// Another machine, as an environment: its base comes along, signed too.
	b := another(t)
	policy := write(t, "policy.toml", fmt.Sprintf("[[trust]]\nkeys = [%q]\n", key+".pub"))
	require.Equal(t, digest, ok(t, b, "env", "import", "-q", "--policy", policy, file))
	works(t, b, "web", digest)
	require.Contains(t, string(b.Do("base", "list").Stdout), "small")

	// As a base, by what takes any image.
	ok(t, b, "base", "add", "-q", "image", file)
	o := b.Run("--base", "image", "--", "/opt/env/bin/python", "-c", printVersion)
	require.Equal(t, "2.3.1\n", string(o.Stdout), "%v", o)

	// Without it, on a machine whose base lacks the interpreter.
	plain := filepath.Join(dir, "plain.tar.zst")
	ok(t, s, "env", "export", "-q", "-o", plain, "web")
	c := another(t)
	o = c.Do("env", "import", plain)
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stderr), `baked on base "small"`)
	empty := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(empty, "x"), nil, 0o600))
	ok(t, c, "base", "add", "-q", "empty", empty)
	o = c.Run("--base", "empty", "--with", "web", "--", "python3")
	require.Equal(t, 125, o.Code, "%v", o)
	require.Contains(t, o.Report.Message, `and base "empty" here has none`)
	works(t, c, "web", digest, "--base", "host")

	// By a tool of others.
	layout := filepath.Join(dir, "layout")
	ok(t, s, "env", "export", "-q", "--with-base", "-o", layout, "web")
	bundle := filepath.Join(dir, "bundle")
	tool(t, "umoci", "unpack", "--rootless", "--image", layout+":latest", bundle)
	cmd := exec.Command("/opt/env/bin/python", "-c", printVersion)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: filepath.Join(bundle, "rootfs")}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "2.3.1\n", string(out))
}

func TestAPlainArchiveIsATree(t *testing.T) {
	s, _ := installation(t)
	dir := t.TempDir()
	ok(t, s, "env", "export", "-q", "-o", filepath.Join(dir, "web.tar.zst"), "web")
	tool(t, "tar", "--zstd", "-C", dir, "-xf", filepath.Join(dir, "web.tar.zst"))
	require.FileExists(t, filepath.Join(dir, ".sbxrun", "environment.json"))
	require.FileExists(t, filepath.Join(dir, "opt", "env", "pyvenv.cfg"))
}

// Whatever the moment of a kill: no half of an environment is there, nothing
// unfinished stays after the next command, and the next import does it.
func TestAKilledImportLeavesNothing(t *testing.T) {
	s, _ := installation(t)
	host := serve(t, "")
	file := filepath.Join(t.TempDir(), "web.tar")
	// Content that takes a while: noise does not compress.
	s.Root = filepath.Join(t.TempDir(), "root")
	root := interpreter(t)
	noise := make([]byte, 24<<20)
	for i := range noise {
		noise[i] = byte(i * i >> 7)
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "noise"), noise, 0o600))
	ok(t, s, "base", "add", "-q", "small", root)
	digest := ok(t, s, "env", "build", "-q", "--name", "web", "--base", "small", "-r", write(t, "requirements.txt", iniconfig))
	ok(t, s, "env", "export", "-q", "--with-base", "-o", file, "web")
	ok(t, s, "env", "push", "-q", "--with-base", "web", host+"/web:1")
	for _, source := range [][]string{{"import", file}, {"pull", host + "/web:1"}} {
		b := another(t)
		for i := range 8 {
			cmd := b.Cmd("env", source[0], "-q", "--name", "web", source[1])
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			require.NoError(t, cmd.Start())
			time.Sleep(time.Duration(30+i*90) * time.Millisecond)
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			assert.Equal(t, 0, b.Do("env", "verify").Code)
		}
		require.Equal(t, digest, ok(t, b, "env", source[0], "-q", "--name", "web", source[1]))
		works(t, b, "web", digest)
		ok(t, b, "gc")
		left, err := os.ReadDir(filepath.Join(b.Root, "tmp"))
		require.NoError(t, err)
		for _, e := range left {
			require.False(t, e.IsDir(), "left: %s", e.Name())
		}
	}
}

func TestTwoImportsAtOnce(t *testing.T) {
	s, digest := installation(t)
	file := filepath.Join(t.TempDir(), "web.tar")
	ok(t, s, "env", "export", "-q", "-o", file, "web")
	b := another(t)
	var all sync.WaitGroup
	var outcomes [4]*harness.Outcome
	for i := range outcomes {
		all.Go(func() { outcomes[i] = b.Do("env", "import", "-q", "--name", fmt.Sprintf("web%d", i), file) })
	}
	all.Wait()
	for i, o := range outcomes {
		require.Equal(t, 0, o.Code, "%v", o)
		require.Equal(t, digest+"\n", string(o.Stdout))
		works(t, b, fmt.Sprintf("web%d", i), digest)
	}
}

func TestACondaPrefixTravels(t *testing.T) {
	need.Network(t) // for the solver
	need.Python(t)
	s := harness.New(t)
	channel := condachannel.Build(t)
	digest := ok(t, s, "env", "build", "-q", "--name", "science", "-r",
		write(t, "environment.yml", "channels: [file://"+channel+"]\ndependencies: [hello-bin, greet, sounds, python]\n"))
	file := filepath.Join(t.TempDir(), "science.tar.zst")
	ok(t, s, "env", "export", "-q", "-o", file, "science")
	b := another(t)
	require.Equal(t, digest, ok(t, b, "env", "import", "-q", file))
	o := b.Run("--with", "science", "--", "greet")
	require.Equal(t, "hello\n", string(o.Stdout), "%v", o)
	var mine, theirs struct {
		Kind, Lock string
		Env        []string
		Packages   []struct{ Name, Version string }
	}
	require.NoError(t, json.Unmarshal(s.Do("env", "inspect", "science").Stdout, &mine))
	require.NoError(t, json.Unmarshal(b.Do("env", "inspect", "science").Stdout, &theirs))
	require.Equal(t, "conda", theirs.Kind)
	require.Equal(t, mine, theirs)
}

// What extends another is several layers: all travel, and are stored once.
func TestWhatExtendsAnotherTravels(t *testing.T) {
	s, digest := installation(t)
	ok(t, s, "env", "build", "-q", "--name", "child", "-r", write(t, "sbxrun.toml", "[env]\nextends = \"web\"\nrun = [\"echo child > /opt/env/child; rm /opt/env/lib/python3*/site-packages/iniconfig/py.typed\"]\n"))
	child := ok(t, s, "env", "verify", "child")
	host := serve(t, "")
	ok(t, s, "env", "push", "-q", "web", host+"/web:1")
	ok(t, s, "env", "push", "-q", "child", host+"/web:child")
	b := another(t)
	require.Equal(t, digest, ok(t, b, "env", "pull", "-q", "--name", "web", host+"/web:1"))
	ok(t, b, "env", "pull", "-q", "--name", "child", host+"/web:child")
	require.Equal(t, child, ok(t, b, "env", "verify", "child"))
	o := b.Run("--with", "child", "--", "sh", "-c", "cat /opt/env/child; ls /opt/env/lib/python3*/site-packages/iniconfig; python3 -c \""+printVersion+"\"")
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "child\n")
	require.Contains(t, string(o.Stdout), "2.3.1\n")
	require.NotContains(t, string(o.Stdout), "py.typed")
	layers, err := os.ReadDir(filepath.Join(b.Root, "layers"))
	require.NoError(t, err)
	require.Len(t, layers, 3, "the host base's, web's, the child's")
}

// A signal ends an import as it ends any command, and nothing of it stays.
func TestAnImportThatIsInterruptedLeavesNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // answers nobody
	require.NoError(t, err)
	defer l.Close()
	b := another(t)
	cmd := b.Cmd("env", "pull", "-q", "--name", "web", l.Addr().String()+"/web:1")
	require.NoError(t, cmd.Start())
	time.Sleep(300 * time.Millisecond)
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	require.Equal(t, 130, b.Wait(cmd).Code)
	left, err := os.ReadDir(filepath.Join(b.Root, "tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
}
