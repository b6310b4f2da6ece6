package behaviour

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// putEnv puts an environment into a store as a bake would: one package that
// needs another. from is where it was imported from, "" is baked here.
func putEnv(t *testing.T, s *harness.Sbx, name, version, from string) *envs.Env {
	t.Helper()
	store, err := rootfs.OpenStore(s.Root)
	require.NoError(t, err)
	base, err := store.Base("host")
	require.NoError(t, err)
	m := &rootfs.Manifest{}
	dirs := map[string]bool{}
	const site = "opt/env/lib/python3.11/site-packages/"
	for p, text := range map[string]string{
		site + "app-" + version + ".dist-info/METADATA": "Name: app\nVersion: " + version + "\nLicense-Expression: MIT\nRequires-Dist: lib>=1\n",
		site + "lib-1.0.dist-info/METADATA":             "Name: Lib\nVersion: 1.0\n",
		site + "app.py":                                 "version = '" + version + "'\n",
	} {
		d, n, err := store.PutObject(strings.NewReader(text), false)
		require.NoError(t, err)
		m.Entries = append(m.Entries, rootfs.Entry{Path: p, Type: 'f', Mode: 0o444, Size: n, Digest: d})
		for d := path.Dir(p); d != "." && !dirs[d]; d = path.Dir(d) {
			dirs[d] = true
			m.Entries = append(m.Entries, rootfs.Entry{Path: d, Type: 'd', Mode: 0o755})
		}
	}
	digest := m.Digest() // sorts
	require.NoError(t, store.Publish(t.Context(), m, func(string) error { return nil }))
	key := strings.TrimPrefix(digest, "sha256:")
	e := &envs.Env{
		Key: key, Digest: digest, Kind: "venv", Lock: "sha256:" + strings.Repeat("1", 64), Base: "host", BaseDigest: base.Digest, Vars: []string{"APP=" + version}, CreatedAt: time.Unix(1770000000, 0).UTC(),
		Packages: []envs.Package{{Name: "app", Version: version}, {Name: "lib", Version: "1.0"}}, Files: 3,
	}
	if from != "" {
		e.Origin = &envs.Origin{From: from, At: time.Unix(1770000000, 0).UTC()}
	}
	b, err := json.Marshal(e)
	require.NoError(t, err)
	require.NoError(t, store.WriteFile(store.Path("envs", key+".json"), b))
	require.NoError(t, store.WriteFile(store.Path("envs", "names", name), []byte(key+"\n")))
	return e
}

// keyPair writes an ECDSA P-256 key's two halves.
func keyPair(t *testing.T, name string) (private, public string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	a, err := x509.MarshalPKCS8PrivateKey(k)
	require.NoError(t, err)
	b, err := x509.MarshalPKIXPublicKey(k.Public())
	require.NoError(t, err)
	private, public = filepath.Join(t.TempDir(), name+".pem"), filepath.Join(t.TempDir(), name+".pub")
	require.NoError(t, os.WriteFile(private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: a}), 0o600))
	require.NoError(t, os.WriteFile(public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: b}), 0o600))
	return private, public
}

// saysOnce is an ending with one clear line, and a hint at most.
func saysOnce(t *testing.T, o *harness.Outcome, code int, says string) {
	t.Helper()
	require.Equal(t, code, o.Code, "%v", o)
	lines := strings.Split(strings.TrimSpace(string(o.Stderr)), "\n")
	require.Contains(t, lines[0], says, "%v", o)
	require.LessOrEqual(t, len(lines), 2, "%v", o)
	if len(lines) == 2 {
		require.Contains(t, lines[1], "hint: ")
	}
}

func TestSignedEnvironmentsAreVerified(t *testing.T) {
	s := harness.NewEmpty(t)
	putEnv(t, s, "web", "1.0", "")
	putEnv(t, s, "other", "2.0", "")
	private, public := keyPair(t, "team")
	_, stranger := keyPair(t, "stranger")
	bundle := filepath.Join(t.TempDir(), "web.sigstore.json")

	saysOnce(t, s.Do("env", "verify", "web", "--key", public), 1, `verify "web": no signature`)
	o := s.Do("env", "sign", "web", "--key", private, "-o", bundle)
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "verify", "web", "--key", stranger+","+public)
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "ok, 3 files, signed by "+public)
	saysOnce(t, s.Do("env", "verify", "web", "--key", stranger), 1, "signed by another key")
	saysOnce(t, s.Do("env", "verify", "other", "--key", public, "--bundle", bundle), 1, "the signature is for another environment")

	o = s.Do("env", "inspect", "web")
	require.Equal(t, 0, o.Code, "%v", o)
	var shown struct {
		Signatures []struct {
			KeyID string `json:"key_id"`
		}
	}
	require.NoError(t, json.Unmarshal(o.Stdout, &shown))
	require.Len(t, shown.Signatures, 1)
	require.Len(t, shown.Signatures[0].KeyID, 64)

	b, err := os.ReadFile(bundle)
	require.NoError(t, err)
	i := strings.Index(string(b), `"payload":"`) + 40
	b[i] ^= 1
	require.NoError(t, os.WriteFile(bundle, b, 0o600))
	saysOnce(t, s.Do("env", "verify", "web", "--key", public, "--bundle", bundle), 1, "the signature does not match")
	require.NoError(t, os.WriteFile(bundle, b[:100], 0o600))
	saysOnce(t, s.Do("env", "verify", "web", "--key", public, "--bundle", bundle), 1, "not a sigstore bundle")
	saysOnce(t, s.Do("env", "sign", "web", "--key", public), 1, "not a private key")
	saysOnce(t, s.Do("env", "sign", "web"), 2, "no --key")
	saysOnce(t, s.Do("env", "sign", "nothing", "--key", private), 1, `"nothing": not found`)
}

// A record that was changed is not what was signed, though no byte of the layer is another.
func TestSignatureCoversTheRecord(t *testing.T) {
	s := harness.NewEmpty(t)
	e := putEnv(t, s, "web", "1.0", "")
	private, public := keyPair(t, "team")
	require.Equal(t, 0, s.Do("env", "sign", "web", "--key", private).Code)
	record := filepath.Join(s.Root, "envs", e.Key+".json")
	b, err := os.ReadFile(record)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(record, []byte(strings.Replace(string(b), `"APP=1.0"`, `"APP=1.0","LD_PRELOAD=/opt/env/x.so"`, 1)), 0o600))
	saysOnce(t, s.Do("env", "verify", "web", "--key", public), 1, "the record is not what was signed: another set of variables")
}

// A damaged layer is neither signed nor said to be signed.
func TestDamageIsNotSigned(t *testing.T) {
	s := harness.NewEmpty(t)
	putEnv(t, s, "web", "1.0", "")
	private, public := keyPair(t, "team")
	require.Equal(t, 0, s.Do("env", "sign", "web", "--key", private).Code)
	require.NoError(t, filepath.WalkDir(filepath.Join(s.Root, "layers"), func(p string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(p, "/app.py") {
			require.NoError(t, os.Chmod(p, 0o644))
			require.NoError(t, os.WriteFile(p, []byte("version = '6.6'\n"), 0o600))
		}
		return err
	}))
	o := s.Do("env", "verify", "web", "--key", public)
	require.Equal(t, 1, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "app.py")
	require.NotContains(t, string(o.Stdout), "signed by")
	saysOnce(t, s.Do("env", "sign", "web", "--key", private), 1, "damaged")
}

func TestPolicyDecidesWhatRuns(t *testing.T) {
	s := harness.NewEmpty(t)
	putEnv(t, s, "here", "1.0", "")
	putEnv(t, s, "web", "2.0", "registry.example/team/web:1")
	private, public := keyPair(t, "team")
	policy := filepath.Join(t.TempDir(), "policy.toml")
	write := func(text string) {
		t.Helper()
		require.NoError(t, os.WriteFile(policy, []byte(text), 0o600))
	}
	trusted := "[[trust]]\nkeys = ['" + public + "']\nfor = ['registry.example/*']\n"
	write(trusted)
	run := func(name string) *harness.Outcome {
		t.Helper()
		return s.Run("--with", name, "--project", "none", "--", "sh", "-c", "echo $APP")
	}
	requireEnding(t, ending{0, "ok", "exit"}, run("web"))
	t.Setenv("SBXRUN_POLICY", policy)
	o := run("web")
	requireEnding(t, ending{125, "setup-failed", "internal"}, o)
	require.Contains(t, string(o.Stderr), `from "registry.example/team/web:1" is refused by policy "`+policy+`": no signature`)
	requireEnding(t, ending{0, "ok", "exit"}, run("here"))
	saysOnce(t, s.Do("env", "verify", "web", "--policy", policy), 1, "no signature")

	require.Equal(t, 0, s.Do("env", "sign", "web", "--key", private).Code)
	o = run("web")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "2.0\n", string(o.Stdout))
	o = s.Do("env", "verify", "here", "web", "--policy", policy)
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "trusted: baked on this machine")
	require.Contains(t, string(o.Stdout), "signed by "+public)

	for text, says := range map[string]string{
		trusted + "until = 2020-01-01\n":                        "out of date since 2020-01-01",
		"[[trust]]\nkeys = ['" + public + "']\nfor = ['x/*']\n": "no key is trusted for it",
		"nonsense":                                 "read policy",
		"[[trust]]\nkeys = ['/nonexistent']\n":     "no such file",
		strings.Replace(trusted, "keys", "key", 1): "no such key: trust.key",
	} {
		write(text)
		o := run("web")
		requireEnding(t, ending{125, "setup-failed", "internal"}, o)
		require.Contains(t, string(o.Stderr), says)
	}
	require.NoError(t, os.Remove(policy))
	requireEnding(t, ending{125, "setup-failed", "internal"}, run("web"))
}

func TestInventoryOfAnEnvironment(t *testing.T) {
	s := harness.NewEmpty(t)
	a := putEnv(t, s, "a", "1.0", "")
	putEnv(t, s, "b", "2.0", "")
	for format, want := range map[string]string{"cyclonedx": `"specVersion": "1.6"`, "spdx": `"SPDX-2.3"`} {
		o := s.Do("env", "sbom", "--format", format, "a")
		require.Equal(t, 0, o.Code, "%v", o)
		require.Contains(t, string(o.Stdout), want)
		require.Contains(t, string(o.Stdout), "pkg:pypi/app@1.0")
		require.Contains(t, string(o.Stdout), a.Digest)
		again := s.Do("env", "sbom", "--format", format, "a")
		require.Equal(t, string(o.Stdout), string(again.Stdout))
	}
	saysOnce(t, s.Do("env", "sbom", "--format", "x", "a"), 2, `--format "x": not known`)

	o := s.Do("env", "diff", "a", "b")
	require.Equal(t, 1, o.Code, "%v", o)
	require.Equal(t, "- package app 1.0\n+ package app 2.0\n- variable APP \"1.0\"\n+ variable APP \"2.0\"\n2 files added, 2 removed, 1 changed\n", string(o.Stdout))
	o = s.Do("env", "diff", "--json", "a", "a")
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), `"same": true`)
	saysOnce(t, s.Do("env", "diff", "a", "nothing"), 2, `"nothing": not found`)

	db := filepath.Join(t.TempDir(), "X-1.json")
	require.NoError(t, os.WriteFile(db, []byte(`{"id":"X-1","summary":"bad","affected":[{"package":{"ecosystem":"PyPI","name":"App"},"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"1.5"}]}]}]}`), 0o600))
	o = s.Do("env", "scan", "--db", db, "a")
	require.Equal(t, 1, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "X-1")
	o = s.Do("env", "scan", "--db", db, "b")
	require.Equal(t, 0, o.Code, "%v", o)
	saysOnce(t, s.Do("env", "scan", "--db", "/nonexistent", "a"), 3, "no such file")
	saysOnce(t, s.Do("env", "scan", "--db", db, "nothing"), 3, `"nothing": not found`)
	saysOnce(t, s.Do("env", "scan", "a"), 2, "no --db")
	ignore := filepath.Join(t.TempDir(), "ignore.toml")
	require.NoError(t, os.WriteFile(ignore, []byte("[[ignore]]\nid = 'X-1'\nreason = 'not reachable'\n"), 0o600))
	o = s.Do("env", "scan", "--db", db, "--ignore", ignore, "a")
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "not reachable")
}

// A bake of wheels is the same each time; one whose hook leaves the time is not,
// and the file is named.
func TestRebuildComparesByteByByte(t *testing.T) {
	need.Network(t)
	need.Python(t)
	s := harness.NewEmpty(t)
	file := requirements(t, iniconfig231)
	o := s.Do("env", "build", "--name", "same", "-r", file)
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "rebuild", "--check", "same")
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "the same byte by byte")

	o = s.Do("env", "build", "--name", "timed", "-r", file, "--hook", "cat /proc/sys/kernel/random/uuid > /opt/env/uuid")
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "rebuild", "--check", "timed")
	require.Equal(t, 1, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "/opt/env/uuid: differs from byte ")
	require.Equal(t, 1, strings.Count(string(o.Stdout), "\n"), "one file, %v", o)
	saysOnce(t, s.Do("env", "rebuild", "same"), 2, "--check")
	o = s.Do("env", "verify")
	require.Equal(t, 0, o.Code, "the store is as it was: %v", o)
}

// A conda environment is rebuilt to the same bytes, and its bill has conda's own
// hashes and what it holds of PyPI.
func TestInventoryAndRebuildOfConda(t *testing.T) {
	s, channel := newConda(t)
	o := s.Do("env", "build", "--name", "c", "-r", environment(t, channel, "hello-bin", "greet", "python", "sounds"))
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "rebuild", "--check", "c")
	require.Equal(t, 0, o.Code, "%v", o)
	require.Contains(t, string(o.Stdout), "the same byte by byte")

	o = s.Do("env", "sbom", "c")
	require.Equal(t, 0, o.Code, "%v", o)
	var bill struct {
		Components []struct {
			Name, Purl string
			Hashes     []struct{ Alg, Content string }
		}
		Dependencies []struct {
			Ref       string
			DependsOn []string
		}
	}
	require.NoError(t, json.Unmarshal(o.Stdout, &bill))
	var names []string
	for _, c := range bill.Components {
		names = append(names, c.Name)
		require.True(t, strings.HasPrefix(c.Purl, "pkg:conda/"+c.Name+"@"), c.Purl)
		require.NotEmpty(t, c.Hashes)
		require.Equal(t, "SHA-256", c.Hashes[0].Alg)
	}
	require.Equal(t, []string{"greet", "hello-bin", "python", "sounds"}, names)
	for _, d := range bill.Dependencies {
		if strings.HasPrefix(d.Ref, "pkg:conda/greet@") {
			require.Len(t, d.DependsOn, 1)
			require.True(t, strings.HasPrefix(d.DependsOn[0], "pkg:conda/python@"))
		}
	}
}

// What is exported takes its signatures along, and another machine's policy is
// satisfied by them; what nobody signed does not come in, and leaves nothing.
func TestSignaturesTravel(t *testing.T) {
	here, there := harness.NewEmpty(t), harness.NewEmpty(t)
	signed, unsigned := putEnv(t, here, "signed", "1.0", ""), putEnv(t, here, "unsigned", "2.0", "")
	private, public := keyPair(t, "team")
	require.Equal(t, 0, here.Do("env", "sign", "signed", "--key", private).Code)
	dir := t.TempDir()
	policy := filepath.Join(dir, "policy.toml")
	require.NoError(t, os.WriteFile(policy, []byte("[[trust]]\nkeys = ['"+public+"']\nfor = ['file:"+dir+"/*']\n"), 0o600))
	t.Setenv("SBXRUN_POLICY", policy)
	for _, name := range []string{"signed", "unsigned"} {
		o := here.Do("env", "export", name, "-o", filepath.Join(dir, name+".tar"))
		require.Equal(t, 0, o.Code, "%v", o)
	}
	o := there.Do("env", "import", "--quiet", filepath.Join(dir, "unsigned.tar"))
	saysOnce(t, o, 1, "no signature")
	require.NoDirExists(t, filepath.Join(there.Root, "layers", strings.TrimPrefix(unsigned.Digest, "sha256:")))
	o = there.Do("env", "list", "--json")
	require.Equal(t, "[]\n", string(o.Stdout))

	o = there.Do("env", "import", "--quiet", "--name", "web", filepath.Join(dir, "signed.tar"))
	require.Equal(t, 0, o.Code, "%v", o)
	o = there.Do("env", "verify", "web", "--key", public, "--policy", policy)
	require.Equal(t, 0, o.Code, "%v", o)
	o = there.Do("env", "inspect", "web")
	require.Contains(t, string(o.Stdout), `"from": "file:`+dir)
	require.Contains(t, string(o.Stdout), signed.Digest)
	requireEnding(t, ending{0, "ok", "exit"}, there.Run("--with", "web", "--project", "none", "--", "true"))
}
