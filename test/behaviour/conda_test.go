package behaviour

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/condachannel"
	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// newConda gives an installation whose store has the solver, and a channel.
func newConda(t *testing.T) (*harness.Sbx, string) {
	t.Helper()
	s := harness.New(t)
	channel := condachannel.Build(t)
	need.Network(t) // for the solver
	o := s.Do("env", "lock", "-r", environment(t, channel, "sounds"))
	require.Equal(t, 0, o.Code, "%v", o)
	return s, channel
}

// environment writes an environment.yml over a channel.
func environment(t *testing.T, channel string, specs ...string) string {
	t.Helper()
	if !strings.Contains(channel, "://") {
		channel = "file://" + channel
	}
	return fileOf(t, "environment.yml", "channels: ["+channel+"]\ndependencies:\n- "+strings.Join(specs, "\n- ")+"\n")
}

func fileOf(t *testing.T, name, text string) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(f, []byte(text), 0o600))
	return f
}

func TestCondaEnvironmentIsBakedOnce(t *testing.T) {
	s, channel := newConda(t)
	file := environment(t, channel, "hello-bin", "greet", "pymod", "sounds", "uselink", "pip: []", "python")
	o := s.Run("-r", file, "--", "greet")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "hello\n", string(o.Stdout))
	first := *o.Report.Env

	// Without any program on PATH: the second run must start none on the host.
	t.Setenv("PATH", "/nonexistent")
	for _, c := range []struct{ want, command string }{
		{"hello\n", "greet"},
		{"hello from the prefix\n/opt/env/lib:/opt/env/lib64:/usr/lib\n", "hello-bin"},
		{"/opt/env/share/sounds 44100 /opt/env\n", `echo "$SOUNDS_HOME" "$SOUNDS_RATE" "$CONDA_PREFIX"`},
		{"/opt/env 42 /opt/env/lib/python", `python -c "import sys, value; print(sys.prefix, value.value, value.__file__)"`},
		// Compiled once for good: nothing is to be compiled at a run.
		{"True\n", `python -c "import greet, os; print(os.path.exists(greet.__cached__))"`},
	} {
		o := s.Run("-r", file, "--", "/bin/sh", "-c", c.command)
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.True(t, strings.HasPrefix(string(o.Stdout), c.want), "%s: %v", c.command, o)
		assert.Equal(t, first, *o.Report.Env)
		assert.Empty(t, string(o.Stderr), "no phase of a bake is told")
	}
}

// What was locked is baked by anyone without a solver, to the same content.
func TestEveryLockOfCondaIsBaked(t *testing.T) {
	s, channel := newConda(t)
	file := environment(t, channel, "hello-bin", "greet", "python")
	o := s.Do("env", "build", "--json", "-r", file)
	require.Equal(t, 0, o.Code, "%v", o)
	want := decodeEnv(t, o)
	assert.Equal(t, "conda", want.Kind)
	var names []string
	for _, p := range want.Packages {
		names = append(names, p.Name)
	}
	assert.Equal(t, []string{"greet", "hello-bin", "python"}, names)

	o = s.Do("env", "lock", "-r", file)
	require.Equal(t, 0, o.Code, "%v", o)
	ours := string(o.Stdout)
	dir := t.TempDir()
	pixi, explicit := filepath.Join(dir, "pixi.lock"), filepath.Join(dir, "theirs.txt")
	condachannel.Rattler(t, condachannel.Ask{Channel: channel, Specs: []string{"hello-bin", "greet", "python"}, Lock: pixi, Explicit: explicit})
	for _, lock := range []string{fileOf(t, "ours.txt", ours), pixi, explicit} {
		fresh := harness.NewEmpty(t) // no solver in it
		o := fresh.Do("env", "build", "--json", "-r", lock)
		require.Equal(t, 0, o.Code, "%s: %v", lock, o)
		got := decodeEnv(t, o)
		assert.Equal(t, want.Files, got.Files, lock)
		assert.Equal(t, want.Packages, got.Packages, lock)
		assert.NoFileExists(t, fresh.Root+"/tools/tool.json")
		again := fresh.Do("env", "lock", "-r", lock)
		require.Equal(t, 0, again.Code, "%v", again)
		assert.ElementsMatch(t, strings.Split(ours, "\n"), strings.Split(string(again.Stdout), "\n"), lock)
	}
}

type bakedEnv struct {
	Kind, Digest string
	Files        int
	Notes        []string
	Packages     []struct{ Name, Version string }
}

func decodeEnv(t *testing.T, o *harness.Outcome) (e bakedEnv) {
	t.Helper()
	require.NoError(t, json.Unmarshal(o.Stdout, &e), "%v", o)
	return e
}

// What needs no Python has none; libraries are found by their RPATH, as conda's
// are: nothing is set for the loader.
func TestCondaEnvironmentWithoutPython(t *testing.T) {
	s, _ := newConda(t)
	channel := compiledChannel(t)
	file := environment(t, channel, "answer")
	o := s.Run("-r", file, "--", "/bin/sh", "-c", "answer; echo ${LD_LIBRARY_PATH-unset}; ls /opt/env/bin")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "42 from /opt/env\nunset\nanswer\n", string(o.Stdout))
}

// compiledChannel has a program and, in another package, the library that it
// finds beside itself.
func compiledChannel(t *testing.T) string {
	t.Helper()
	need.Compiler(t)
	dir := t.TempDir()
	script := `
import hashlib, json, os, subprocess, sys, asyncio
from conda_package_handling import api
from rattler.index import index_fs
out, subdir = sys.argv[1], sys.argv[2]
prefix = ("/home/builder/host_env" + "_placehold" * 30)[:255]
def package(name, files, depends):
    work = os.path.join(out, "work-" + name)
    paths = []
    for path, source, flags in files:
        at = os.path.join(work, path)
        os.makedirs(os.path.dirname(at), exist_ok=True)
        subprocess.run(["gcc", "-x", "c", "-", "-o", at, *flags], input=source, text=True, check=True)
        data = open(at, "rb").read()
        e = {"_path": path, "path_type": "hardlink", "sha256": hashlib.sha256(data).hexdigest(), "size_in_bytes": len(data)}
        if prefix.encode() in data:
            e |= {"file_mode": "binary", "prefix_placeholder": prefix}
        paths.append(e)
    os.makedirs(work + "/info")
    for n, v in {"index.json": {"name": name, "version": "1.0", "build": "h0_0", "build_number": 0, "depends": depends, "subdir": subdir},
                 "paths.json": {"paths": paths, "paths_version": 1}, "about.json": {}}.items():
        json.dump(v, open(work + "/info/" + n, "w"))
    os.makedirs(os.path.join(out, subdir), exist_ok=True)
    api.create(work, [p[0] for p in files] + ["info/index.json", "info/paths.json", "info/about.json"], os.path.join(out, subdir, name + "-1.0-h0_0.conda"), os.path.join(out, subdir))
    return os.path.join(work, files[0][0])
lib = package("libanswer", [("lib/libanswer.so", 'const char *where(void) { return "' + prefix + '"; }', ["-shared", "-fPIC"])], [])
package("answer", [("bin/answer", '#include <stdio.h>\nconst char *where(void);\nint main(void) { printf("42 from %s\\n", where()); }',
    ["-L" + os.path.dirname(lib), "-lanswer", "-Wl,-rpath,$ORIGIN/../lib"])], ["libanswer >=1"])
asyncio.run(index_fs(out, write_zst=False, write_shards=False))
`
	platform := condachannel.Read(t, condachannel.Build(t)).Platform
	out, err := exec.Command(condachannel.Python(t), "-I", "-c", script, dir, platform).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return dir
}

func TestLinkScriptsRunOnlyWhenAllowed(t *testing.T) {
	s, channel := newConda(t)
	file := environment(t, channel, "scripted")
	o := s.Do("env", "build", "--json", "-r", file)
	require.Equal(t, 0, o.Code, "%v", o)
	assert.Contains(t, strings.Join(decodeEnv(t, o).Notes, "\n"), "scripted")
	o = s.Run("-r", file, "--", "/bin/cat", "/opt/env/share/scripted.txt")
	requireEnding(t, ending{1, "failed", "exit"}, o)
	o = s.Run("--allow-scripts", "-r", file, "--", "/bin/cat", "/opt/env/share/scripted.txt")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "scripted 1.0 0\n", string(o.Stdout))
}

func TestBadCondaEnvironmentsAreRefused(t *testing.T) {
	s, channel := newConda(t)
	o := s.Do("env", "lock", "-r", environment(t, channel, "sounds"))
	require.Equal(t, 0, o.Code, "%v", o)
	lock := string(o.Stdout)
	hash := lock[strings.Index(lock, "#sha256:")+8:][:64]
	for _, c := range []struct{ name, file, says string }{
		{"conflict", environment(t, channel, "liblink <2", "liblink >=2"), "liblink"},
		{"unknown package", environment(t, channel, "no-such-package"), "no channel has no-such-package"},
		{"unknown version", environment(t, channel, "liblink 9.*"), "no channel has liblink"},
		{"a spec that is none", environment(t, channel, "'liblink>>1'"), "cannot be read"},
		{"no such channel", environment(t, "/nonexistent/channel", "sounds"), "/nonexistent/channel: no such directory"},
		{"a folder that is no channel", environment(t, t.TempDir(), "sounds"), "noarch"},
		{"unreachable channel", environment(t, "http://127.0.0.1:9/channel", "sounds"), "127.0.0.1:9"},
		{"not YAML", fileOf(t, "environment.yml", "dependencies: [\n"), "not valid YAML"},
		{"python for pip", fileOf(t, "environment.yml", "channels: [file://"+channel+"]\ndependencies: [sounds, {pip: [iniconfig]}]\n"), "needs python"},
		{"another hash", fileOf(t, "lock.txt", strings.ReplaceAll(lock, hash, strings.Repeat("0", 64))), "hash mismatch"},
		{"a package that is gone", fileOf(t, "lock.txt", strings.ReplaceAll(strings.ReplaceAll(lock, "sounds-2.0", "sounds-2.1"), hash, strings.Repeat("1", 64))), "404"},
		{"another platform", fileOf(t, "lock.txt", strings.ReplaceAll(strings.ReplaceAll(lock, "# platform: linux-", "# platform: osx-"), "/noarch/", "/osx-64/")), "osx"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := s.Do("env", "build", "-q", "-r", c.file)
			require.Equal(t, 1, o.Code, "%v", o)
			said := string(o.Stderr)
			assert.Contains(t, said, c.says)
			assert.LessOrEqual(t, strings.Count(strings.TrimSpace(said), "\n"), 1, "one line and a hint: %s", said)
		})
	}
}

// A pip section is installed beside what conda brought, by its hashes.
func TestPipSection(t *testing.T) {
	s, channel := newConda(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "more.txt"), []byte("iniconfig==2.1.0\n"), 0o600))
	file := filepath.Join(dir, "environment.yml")
	require.NoError(t, os.WriteFile(file, []byte("channels: [file://"+channel+"]\ndependencies:\n- python\n- greet\n- pip:\n  - -r more.txt\n"), 0o600))
	o := s.Run("-r", file, "--", "python", "-c", "import greet, iniconfig; "+printVersion)
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "2.1.0\n", string(o.Stdout))
	o = s.Do("env", "build", "--json", "-r", file)
	require.Equal(t, 0, o.Code, "%v", o)
	assert.Contains(t, fmt.Sprint(decodeEnv(t, o).Packages), "{iniconfig 2.1.0}")

	// The included file is part of the recipe.
	require.NoError(t, os.WriteFile(filepath.Join(dir, "more.txt"), []byte("iniconfig==2.3.1\n"), 0o600))
	o = s.Run("-r", file, "--", "python", "-c", printVersion)
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "2.3.1\n", string(o.Stdout))
}

// A damaged archive in the store is noticed, thrown away and fetched again.
func TestATamperedPackageIsFetchedAgain(t *testing.T) {
	newConda(t)
	s := harness.NewEmpty(t)
	channel := condachannel.Build(t)
	lock := explicitOf(t, channel, "noarch/sounds-2.0-6_0.conda")
	o := s.Do("env", "build", "--name", "x", "-r", lock)
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "rm", "x")
	require.Equal(t, 0, o.Code, "%v", o)
	archives, err := filepath.Glob(s.Root + "/cache/conda/pkgs/*")
	require.NoError(t, err)
	require.Len(t, archives, 1)
	b, err := os.ReadFile(archives[0])
	require.NoError(t, err)
	b[len(b)/2] ^= 1
	require.NoError(t, os.WriteFile(archives[0], b, 0o600))
	o = s.Do("env", "build", "--name", "x", "-r", lock)
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "verify", "x")
	require.Equal(t, 0, o.Code, "%v", o)
}

// explicitOf is a lock of one package, by its hash in the repodata.
func explicitOf(t *testing.T, channel, pkg string) string {
	t.Helper()
	var repodata struct {
		Conda map[string]struct{ SHA256 string } `json:"packages.conda"`
	}
	b, err := os.ReadFile(filepath.Join(channel, filepath.Dir(pkg), "repodata.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &repodata))
	return fileOf(t, "lock.txt", "@EXPLICIT\nfile://"+channel+"/"+pkg+"#sha256:"+repodata.Conda[filepath.Base(pkg)].SHA256+"\n")
}

// Killed at any moment, a bake leaves nothing that the next one trips over.
func TestABakeOfCondaThatIsKilled(t *testing.T) {
	s, channel := newConda(t)
	file := environment(t, channel, "hello-bin", "greet", "python", "text-prefix", "old-format")
	for _, after := range []time.Duration{20, 60, 120, 200, 300, 450} {
		cmd := s.Cmd("env", "build", "-r", file)
		require.NoError(t, cmd.Start())
		time.Sleep(after * time.Millisecond)
		_ = cmd.Process.Signal(unix.SIGKILL)
		_ = cmd.Wait()
	}
	o := s.Run("-r", file, "--", "greet")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "hello\n", string(o.Stdout))
}

const (
	secret = "sEcReT-9f2c1"
	token  = "tOkEn-77ab30"
)

// Channels that want credentials get them from the usual files; and these are in
// nothing that is kept or said.
func TestCredentialsOfChannels(t *testing.T) {
	s, channel := newConda(t)
	var refused atomic.Int32
	serveChannel(t, s, func(w http.ResponseWriter, r *http.Request) {
		user, pass, _ := r.BasicAuth()
		path, ok := r.URL.Path, false
		switch {
		case strings.HasPrefix(path, "/t/"+token+"/tokened/"):
			path, ok = strings.TrimPrefix(path, "/t/"+token+"/tokened"), true
		case strings.HasPrefix(path, "/basic/"):
			path, ok = strings.TrimPrefix(path, "/basic"), user == "me" && pass == secret
		case strings.HasPrefix(path, "/redirected/"):
			http.Redirect(w, r, "http://files.test:8080/files"+strings.TrimPrefix(path, "/redirected"), http.StatusFound)
			return
		case strings.HasPrefix(path, "/files/"):
			path, ok = strings.TrimPrefix(path, "/files"), r.Header.Get("Authorization") == "" && r.Host == "files.test:8080"
		case strings.HasPrefix(path, "/bearer/"):
			path, ok = strings.TrimPrefix(path, "/bearer"), r.Header.Get("Authorization") == "Bearer "+secret
		}
		if !ok {
			refused.Add(1)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.ServeFile(w, r, channel+filepath.Clean("/"+path))
	})
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("CHANNEL_TOKEN", token)
	netrc, condarc, rattler := home+"/.netrc", home+"/.condarc", filepath.Join(home, ".rattler", "credentials.json")
	require.NoError(t, os.Mkdir(filepath.Dir(rattler), 0o700))
	url := func(path string) string { return "http://channel.test:8080" + path }

	o := s.Do("env", "build", "-r", environment(t, url("/basic"), "sounds"))
	require.Equal(t, 1, o.Code, "%v", o)
	assert.Contains(t, string(o.Stderr), "401 Unauthorized")
	assert.Positive(t, refused.Load())

	for _, c := range []struct{ name, file, text, channel string }{
		{"netrc", netrc, "machine channel.test login me password " + secret + "\n", url("/basic")},
		{"URL of a channel in .condarc", condarc, "channels: [http://me:" + secret + "@channel.test:8080/basic]\n", url("/basic")},
		{"alias with a token", condarc, "channel_alias: http://channel.test:8080/t/${CHANNEL_TOKEN}\n", "tokened"},
		{"rattler's file", rattler, `{"channel.test": {"BearerToken": "` + secret + `"}}`, url("/bearer")},
		{"the environment's own URL", netrc, "", strings.Replace(url("/basic"), "//", "//me:"+secret+"@", 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(c.file, []byte(c.text), 0o600))
			defer os.Remove(c.file)
			file := fileOf(t, "environment.yml", "channels: ['"+c.channel+"']\ndependencies: [sounds, nolink] # "+c.name+"\n")
			o := s.Run("-r", file, "--", "/bin/cat", "/opt/env/share/sounds/ping.wav")
			requireEnding(t, ending{0, "ok", "exit"}, o)
			report, err := json.Marshal(o.Report)
			require.NoError(t, err)
			said := string(o.Stderr) + string(report)
			for _, args := range [][]string{{"env", "lock", "-r", file}, {"env", "build", "--json", "-r", file}, {"env", "list", "--json"}} {
				o := s.Do(args...)
				require.Equal(t, 0, o.Code, "%v", o)
				said += string(o.Stdout) + string(o.Stderr)
			}
			assert.NotContains(t, said, secret)
			assert.NotContains(t, said, token)
			assert.Empty(t, grep(t, s.Root, secret, token))
			assert.Empty(t, grep(t, s.State, secret, token))
		})
	}

	// A host that the channel leads to is reached where that is allowed, and is
	// shown no credentials.
	t.Run("redirect", func(t *testing.T) {
		require.NoError(t, os.WriteFile(netrc, []byte("machine channel.test login me password "+secret+"\n"), 0o600))
		file := environment(t, url("/redirected"), "sounds", "nolink")
		o := s.Do("env", "build", "-q", "-r", file)
		require.Equal(t, 1, o.Code, "%v", o)
		assert.Contains(t, string(o.Stderr), "which leads to files.test:8080")
		o = s.Do("env", "build", "-q", "--index-host", "files.test:8080", "-r", file)
		require.Equal(t, 0, o.Code, "%v", o)
	})

	// Without the server: what was solved needs none, and what changed takes the
	// repodata of last time.
	t.Run("unreachable", func(t *testing.T) {
		require.NoError(t, os.WriteFile(netrc, []byte("machine channel.test login me password "+secret+"\n"), 0o600))
		s.Prefix = nil
		o := s.Do("env", "lock", "-r", environment(t, url("/basic"), "nolink"))
		require.Equal(t, 0, o.Code, "%v", o)
		o = s.Do("env", "lock", "--refresh", "-r", environment(t, url("/basic"), "nolink"))
		require.Equal(t, 1, o.Code, "%v", o)
		assert.Contains(t, string(o.Stderr), "http://channel.test:8080/basic")
	})
}

// grep gives the files below a folder that hold one of the words.
func grep(t *testing.T, dir string, words ...string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // gone, or never there
		}
		b, err := os.ReadFile(p)
		for _, w := range words {
			if strings.Contains(string(b)+p, w) {
				found = append(found, p)
			}
		}
		return err
	})
	require.NoError(t, err)
	return found
}

// serveChannel gives sbxrun a host of its own from now on, which reaches one
// more, channel.test:8080.
func serveChannel(t *testing.T, s *harness.Sbx, h http.HandlerFunc) {
	t.Helper()
	const address, port = "10.77.0.5", "8080"
	host, err := netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, host.Close()) })
	beyond, err := netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, beyond.Close()) })
	set := func(name, cidr string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	}
	var l net.Listener
	require.NoError(t, beyond.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "beyond0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink0", PeerNamespace: netlink.NsFd(host.File().Fd())}); err != nil {
			return err
		}
		err := set("beyond0", address+"/24")
		if err == nil {
			l, err = net.Listen("tcp", net.JoinHostPort(address, port))
		}
		return err
	}))
	require.NoError(t, host.Do(func() error { return set("uplink0", "10.77.0.1/24") }))
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	hosts := fileOf(t, "hosts", "127.0.0.1 localhost\n"+address+" channel.test files.test\n")
	nsswitch := fileOf(t, "nsswitch.conf", "hosts: files\n")
	for _, f := range []string{hosts, nsswitch} { // whoever looks names up may not be root
		require.NoError(t, os.Chmod(f, 0o644))
	}
	before := s.Prefix
	s.Prefix = []string{
		"nsenter", fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), host.File().Fd()), "--", "unshare", "--mount", "--propagation", "private",
		"sh", "-c", fmt.Sprintf(`mount --bind %s /etc/hosts && mount --bind %s /etc/nsswitch.conf && exec "$@"`, hosts, nsswitch), "sh",
	}
	t.Cleanup(func() { s.Prefix = before })
}

// A file that changes keeps its pins where they fit; --upgrade lets go of them.
func TestAChangedFileKeepsItsPins(t *testing.T) {
	for _, c := range []struct{ name, file, old, changed, oldPin, newPin string }{
		{"conda", "environment.yml", "dependencies: [liblink <2]\n", "dependencies: [liblink, sounds]\n", "liblink-1.0-", "liblink-2.0-"},
		{"requirements", "requirements.txt", "iniconfig<2.1\n", "iniconfig<2.3.1\n", "iniconfig==2.0.0", "iniconfig==2.3.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, channel := newConda(t)
			file := fileOf(t, c.file, "")
			lock := func(text string, args ...string) string {
				if strings.HasPrefix(text, "dependencies") {
					text = "channels: [file://" + channel + "]\n" + text
				}
				require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
				o := s.Do(append([]string{"env", "lock", "-r", file}, args...)...)
				require.Equal(t, 0, o.Code, "%v", o)
				return string(o.Stdout)
			}
			name, _, _ := strings.Cut(c.oldPin, "-")
			name, _, _ = strings.Cut(name, "=")
			assert.Contains(t, lock(c.old), c.oldPin)
			assert.Contains(t, lock(c.changed), c.oldPin)
			assert.Contains(t, lock(c.changed, "--upgrade", name), c.newPin)
			assert.Contains(t, lock(c.changed), c.newPin)

			assert.Contains(t, lock(c.old), c.oldPin, "where it does not fit, it is not kept")
			assert.Contains(t, lock(c.changed, "--upgrade"), c.newPin)
			o := s.Do("env", "lock", "-r", file, "--upgrade", "no-such-thing")
			require.Equal(t, 1, o.Code, "%v", o)
			assert.Contains(t, string(o.Stderr), "no-such-thing is not in it")
		})
	}
}

// A conda environment in a recipe with steps: its variables and its own folders of
// programs are there for the steps and for the command.
func TestCondaInARecipe(t *testing.T) {
	s, channel := newConda(t)
	dir := filepath.Dir(environment(t, channel, "sounds", "greet", "python"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "sbxrun.toml"), []byte("[env]\nconda = \"environment.yml\"\nrun = ['greet > \"$SOUNDS_HOME/said\"; echo $PATH >> \"$SOUNDS_HOME/said\"']\n"), 0o600))
	o := s.Run("-r", filepath.Join(dir, "sbxrun.toml"), "--", "/bin/sh", "-c", "cat $SOUNDS_HOME/said; echo $PATH")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	path := "/opt/env/share/sounds/bin:/opt/env/bin:/usr/local/bin:/usr/bin:/bin\n"
	assert.Equal(t, "hello\n"+path+path, string(o.Stdout))
}

// Equal locks give equal bytes: what is baked again is the same.
func TestCondaIsReproducible(t *testing.T) {
	s, channel := newConda(t)
	o := s.Do("env", "build", "--name", "again", "-r", environment(t, channel, "greet", "hello-bin", "old-format", "python", "pymod", "long-shebang"))
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "rebuild", "--check", "again")
	require.Equal(t, 0, o.Code, "%v", o)
	assert.Contains(t, string(o.Stdout), "the same byte by byte")
}
