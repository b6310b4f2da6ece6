package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"github.com/secure-systems-lab/go-securesystemslib/encrypted"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/test/need"
)

func noPassword() ([]byte, error) { return nil, errors.New("no password") }

func writePEM(t *testing.T, name, kind string, der []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(p, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return p
}

func keyFile(t *testing.T, k crypto.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(k)
	require.NoError(t, err)
	return writePEM(t, "key.pem", "PRIVATE KEY", der)
}

func pubFile(t *testing.T, k PrivateKey) string {
	t.Helper()
	return writePEM(t, "key.pub", "PUBLIC KEY", k.der)
}

func newKey(t *testing.T) PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	p, err := ReadPrivateKey(keyFile(t, k), noPassword)
	require.NoError(t, err)
	return p
}

func anEnv(digit string) *envs.Env {
	return &envs.Env{
		Digest: "sha256:" + strings.Repeat(digit, 64), Kind: "venv", Names: []string{"web"}, Lock: "sha256:" + strings.Repeat("1", 64), Base: "host", BaseDigest: "sha256:b",
		Python: "/usr/bin/python3.11", Vars: []string{"VIRTUAL_ENV=/opt/env"}, Packages: []envs.Package{{Name: "six", Version: "1.16"}},
	}
}

func TestKeysOfEachKindSign(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	sec1, err := x509.MarshalECPrivateKey(ec)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(ec)
	require.NoError(t, err)
	box, err := encrypted.Encrypt(pkcs8, []byte("secret"))
	require.NoError(t, err)
	for name, path := range map[string]string{
		"ECDSA, PKCS #8": keyFile(t, ec), "Ed25519": keyFile(t, ed), "SEC 1": writePEM(t, "k", "EC PRIVATE KEY", sec1),
		"cosign": writePEM(t, "k", "ENCRYPTED SIGSTORE PRIVATE KEY", box), "older cosign": writePEM(t, "k", "ENCRYPTED COSIGN PRIVATE KEY", box),
	} {
		t.Run(name, func(t *testing.T) {
			k, err := ReadPrivateKey(path, func() ([]byte, error) { return []byte("secret"), nil })
			require.NoError(t, err)
			b, err := Sign(anEnv("a"), k)
			require.NoError(t, err)
			pub, err := ReadPublicKey(pubFile(t, k))
			require.NoError(t, err)
			s, err := Verify(b, anEnv("a"), []PublicKey{newKey(t).PublicKey, pub})
			require.NoError(t, err)
			require.Equal(t, Signature{Key: pub.Name, ID: k.ID()}, s)
		})
	}
	_, err = ReadPrivateKey(writePEM(t, "k", "ENCRYPTED SIGSTORE PRIVATE KEY", box), func() ([]byte, error) { return []byte("wrong"), nil })
	require.ErrorContains(t, err, "does not open with this password")
}

func TestBadKeysAreRefused(t *testing.T) {
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	text := filepath.Join(t.TempDir(), "text")
	require.NoError(t, os.WriteFile(text, []byte("hello"), 0o600))
	good := newKey(t)
	for path, says := range map[string]string{
		keyFile(t, r): "neither ECDSA nor Ed25519", keyFile(t, p384): "ECDSA over P-384", text: "no PEM", pubFile(t, good): "not a private key",
		writePEM(t, "k", "PRIVATE KEY", []byte("junk")): "damaged", writePEM(t, "k", "ENCRYPTED PRIVATE KEY", nil): "encrypted as PKCS #8", "/nonexistent": "no such file",
	} {
		_, err := ReadPrivateKey(path, noPassword)
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "\n")
	}
	_, err = ReadPublicKey(good.Name)
	require.ErrorContains(t, err, "not a public key")
}

// tamper changes one byte of what is signed, in the bundle.
func tamper(t *testing.T, bundle []byte, old, new string) []byte {
	t.Helper()
	var b map[string]any
	require.NoError(t, json.Unmarshal(bundle, &b))
	e := b["dsseEnvelope"].(map[string]any)
	var payload []byte
	require.NoError(t, json.Unmarshal([]byte(`"`+e["payload"].(string)+`"`), &payload))
	require.Contains(t, string(payload), old)
	e["payload"] = []byte(strings.Replace(string(payload), old, new, 1))
	out, err := json.Marshal(b)
	require.NoError(t, err)
	return out
}

func TestWhatIsNotSignedIsRefused(t *testing.T) {
	k, other := newKey(t), newKey(t)
	e := anEnv("a")
	b, err := Sign(e, k)
	require.NoError(t, err)
	keys := []PublicKey{k.PublicKey}
	changed := func(f func(e *envs.Env)) *envs.Env { c := *anEnv("a"); f(&c); return &c }
	foreign := Statement{Type: statementType, PredicateType: "https://example.org/other", Subject: StatementOf(e).Subject}
	payload, err := json.Marshal(foreign)
	require.NoError(t, err)
	sig, err := k.sign(dsse.PAE(payloadType, payload))
	require.NoError(t, err)
	foreignBundle, err := json.Marshal(map[string]any{
		"mediaType": mediaType, "verificationMaterial": map[string]any{"publicKey": map[string]any{"hint": k.hint()}},
		"dsseEnvelope": map[string]any{"payload": payload, "payloadType": payloadType, "signatures": []any{map[string]any{"sig": sig}}},
	})
	require.NoError(t, err)
	for _, c := range []struct {
		name   string
		bundle []byte
		env    *envs.Env
		keys   []PublicKey
		is     error
		says   string
	}{
		{"tampered", tamper(t, b, "six", "sex"), e, keys, ErrTampered, ""},
		{"wrong key", b, e, []PublicKey{other.PublicKey}, ErrOtherKey, ""},
		{"no key", b, e, nil, ErrOtherKey, ""},
		{"another environment's", b, anEnv("b"), keys, ErrReplayed, "aaaaaaaaaaaa"},
		{"other variables", b, changed(func(e *envs.Env) { e.Vars = append(e.Vars, "LD_PRELOAD=/opt/env/x.so") }), keys, ErrRecord, "variables"},
		{"other layers below", b, changed(func(e *envs.Env) { e.Below = []string{"sha256:evil"} }), keys, ErrRecord, "layers below"},
		{"other kind", b, changed(func(e *envs.Env) { e.Kind = "conda" }), keys, ErrRecord, "kind"},
		{"other lock", b, changed(func(e *envs.Env) { e.Lock = "sha256:2" }), keys, ErrRecord, "lock"},
		{"other interpreter", b, changed(func(e *envs.Env) { e.Python = "/tmp/python" }), keys, ErrRecord, "interpreter"},
		{"other base", b, changed(func(e *envs.Env) { e.BaseDigest = "sha256:evil" }), keys, ErrRecord, "base"},
		{"other base's variables", b, changed(func(e *envs.Env) { e.BaseVars = []string{"LD_PRELOAD=/opt/env/x.so"} }), keys, ErrRecord, "base's variables"},
		{"another kind of statement", foreignBundle, e, keys, nil, "not about an environment"},
		{"empty", nil, e, keys, nil, "not a sigstore bundle"},
		{"truncated", b[:len(b)/2], e, keys, nil, "not a sigstore bundle"},
		{"older bundle", []byte(strings.Replace(string(b), "v0.3", "v0.1", 1)), e, keys, nil, "not a bundle v0.3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Verify(c.bundle, c.env, c.keys)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
			}
		})
	}
	_, err = VerifyAny(nil, e, keys)
	require.ErrorIs(t, err, ErrUnsigned)
	s, err := VerifyAny([][]byte{[]byte("{}"), b}, e, keys)
	require.NoError(t, err)
	require.Equal(t, k.ID(), s.ID)
}

func policy(t *testing.T, text string, keys map[string]PrivateKey) *Policy {
	t.Helper()
	dir := t.TempDir()
	for name, k := range keys {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.der}), 0o600))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "policy.toml"), []byte(text), 0o600))
	p, err := ReadPolicy(filepath.Join(dir, "policy.toml"))
	require.NoError(t, err)
	return p
}

func TestPolicy(t *testing.T) {
	team, stranger := newKey(t), newKey(t)
	e := anEnv("a")
	signed, err := Sign(e, team)
	require.NoError(t, err)
	strange, err := Sign(e, stranger)
	require.NoError(t, err)
	now := time.Date(2026, 6, 30, 23, 0, 0, 0, time.UTC)
	named := "[[trust]]\nkeys = ['team.pub']\nfor = ['registry.example/*']\n"
	for _, c := range []struct {
		name, text string
		bundles    [][]byte
		says       string // "" is let through
	}{
		{"signed", named, [][]byte{signed}, ""},
		{"one of two signed", named, [][]byte{strange, signed}, ""},
		{"unsigned", named, nil, "no signature"},
		{"a stranger's", named, [][]byte{strange}, "signed by another key"},
		{"unsigned though not required elsewhere", "require = false\n" + named, nil, "no signature"},
		{"from elsewhere", "[[trust]]\nkeys = ['team.pub']\nfor = ['other.example/*']\n", [][]byte{signed}, "no key is trusted for it"},
		{"from elsewhere, not required", "require = false\n[[trust]]\nkeys = ['team.pub']\nfor = ['other.example/*']\n", nil, ""},
		{"everywhere", "[[trust]]\nkeys = ['team.pub']\n", [][]byte{signed}, ""},
		{"empty policy", "", [][]byte{signed}, "no key is trusted"},
		{"last day", named + "until = 2026-06-30\n", [][]byte{signed}, ""},
		{"expired", named + "until = 2026-06-29\n", [][]byte{signed}, "out of date since 2026-06-29"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, err := policy(t, c.text, map[string]PrivateKey{"team.pub": team}).Check(e, "registry.example/team/web:1", c.bundles, now)
			if c.says == "" {
				require.NoError(t, err)
				require.True(t, v.Signature != nil || v.Reason != "")
				return
			}
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
			require.NotEmpty(t, hinted.Of(err))
		})
	}
	for _, file := range []string{"", policy(t, named, map[string]PrivateKey{"team.pub": team}).file} {
		check, err := Verifier(file)
		require.NoError(t, err)
		taken := *e
		require.Equal(t, file == "", check(t.Context(), &taken, [][]byte{signed}) == nil, "from nowhere")
		taken.Origin = &envs.Origin{From: "registry.example/team/web:1"}
		require.Equal(t, file == "", check(t.Context(), &taken, nil) == nil)
		require.NoError(t, check(t.Context(), &taken, [][]byte{signed}))
	}
	_, err = Verifier("/nonexistent")
	require.ErrorContains(t, err, "no such file")
}

// What was baked here may lie upon what was not.
func TestPolicyLooksBelow(t *testing.T) {
	store, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	put := func(key, text string, below []string, origin *envs.Origin) *envs.Env {
		t.Helper()
		d, n, err := store.PutObject(strings.NewReader(text), false)
		require.NoError(t, err)
		m := &rootfs.Manifest{Entries: []rootfs.Entry{{Path: "f", Type: 'f', Mode: 0o444, Size: n, Digest: d}}}
		e := &envs.Env{Key: key, Digest: m.Digest(), Kind: "venv", Below: below, Origin: origin}
		require.NoError(t, store.Publish(t.Context(), m, func(string) error { return nil }))
		b, err := json.Marshal(e)
		require.NoError(t, err)
		require.NoError(t, store.WriteFile(store.Path("envs", key+".json"), b))
		return e
	}
	k := newKey(t)
	p := policy(t, "[[trust]]\nkeys = ['k.pub']\n", map[string]PrivateKey{"k.pub": k})
	m := envs.Open(store, envs.Options{})
	parent := put("a1", "parent", nil, &envs.Origin{From: "x"})
	child := put("b2", "child", []string{parent.Digest}, nil)
	alone := put("c3", "alone", nil, nil)
	v, err := p.CheckStored(store, m, alone, time.Now())
	require.NoError(t, err)
	require.Equal(t, "baked on this machine", v.Reason)
	_, err = p.CheckStored(store, m, child, time.Now())
	require.ErrorIs(t, err, ErrUnsigned)
	b, err := Sign(parent, k)
	require.NoError(t, err)
	_, err = Keep(store, parent.Digest, b, true)
	require.NoError(t, err)
	_, err = p.CheckStored(store, m, child, time.Now())
	require.NoError(t, err)
}

func TestBadPoliciesTrustNobody(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "p.toml")
	for text, says := range map[string]string{
		"requires = true": "no such key: requires", "[[trust]]\nfor = ['*']": "no keys", "[[trust]]\nkeys = ['gone.pub']": "gone.pub", "x": "p.toml",
		"[[trust]]\nkeys = ['''-----BEGIN PUBLIC KEY-----''']": "no PEM",
	} {
		require.NoError(t, os.WriteFile(p, []byte(text), 0o600))
		_, err := ReadPolicy(p)
		require.ErrorContains(t, err, says, text)
	}
	_, err := ReadPolicy(filepath.Join(dir, "none"))
	require.ErrorContains(t, err, "no such file")
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"*", "", true},
		{"registry.example/*", "registry.example/a/b:1", true},
		{"registry.example/*", "registry.example.evil/a", false},
		{"registry.example/*", "evil/registry.example/a", false},
		{"*/team/*:1", "r/team/a:1", true},
		{"*/team/*:1", "r/team/a:2", false},
		{"a*a", "a", false},
		{"exact", "exact", true},
		{"exact", "exactly", false},
	} {
		require.Equal(t, c.want, match(c.pattern, c.s), "%s against %s", c.pattern, c.s)
	}
}

// Others read what we sign: the DSSE envelope and the in-toto statement in it,
// by the Python libraries of those projects.
const others = `import base64, json, sys
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

def verify(bundle, pub):
    key = SSlibKey.from_crypto(load_pem_public_key(open(pub, "rb").read()))
    e = json.load(open(bundle))["dsseEnvelope"]
    env = Envelope.from_dict({"payload": e["payload"], "payloadType": e["payloadType"], "signatures": [{"keyid": key.keyid, "sig": e["signatures"][0]["sig"]}]})
    try:
        env.verify([key], 1)
    except VerificationError:
        return "refused"
    st = json_format.Parse(base64.b64decode(e["payload"]), statement_pb2.Statement())
    Statement.copy_from_pb(st).validate()
    return st.subject[0].digest["sha256"]

print(verify(sys.argv[1], sys.argv[2]), verify(sys.argv[1], sys.argv[3]))
`

func TestOthersVerifyWhatWeSign(t *testing.T) {
	python := need.Packages(t, "securesystemslib==1.6.0", "in-toto-attestation==0.9.3", "cryptography==50.0.2")
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	edKey, err := ReadPrivateKey(keyFile(t, ed), noPassword)
	require.NoError(t, err)
	ecKey := newKey(t)
	for _, k := range [][2]PrivateKey{{ecKey, edKey}, {edKey, ecKey}} {
		b, err := Sign(anEnv("a"), k[0])
		require.NoError(t, err)
		file := filepath.Join(t.TempDir(), "bundle.json")
		require.NoError(t, os.WriteFile(file, b, 0o600))
		out, err := exec.Command(python, "-c", others, file, pubFile(t, k[0]), pubFile(t, k[1])).CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Equal(t, strings.Repeat("a", 64)+" refused\n", string(out))
	}
}

func TestForeignSignaturesAreNotKept(t *testing.T) {
	store, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	b, err := Sign(anEnv("a"), newKey(t))
	require.NoError(t, err)
	keep := Keeper(store)
	for _, text := range [][]byte{b, b, []byte("junk"), []byte("{}")} {
		require.NoError(t, keep(anEnv("a").Digest, text))
	}
	got, err := Bundles(store, anEnv("a").Digest)
	require.NoError(t, err)
	require.Equal(t, [][]byte{b}, got)
}

// What somebody else sends in the name of a key does not push out what that key
// signed; a new signature of our own does.
func TestAForgedBundleTakesNoOnesPlace(t *testing.T) {
	store, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	e, k := anEnv("a"), newKey(t)
	first, err := Sign(e, k)
	require.NoError(t, err)
	_, err = Keep(store, e.Digest, first, true)
	require.NoError(t, err)
	require.NoError(t, Keeper(store)(e.Digest, tamper(t, first, "six", "sex")))
	all, err := Bundles(store, e.Digest)
	require.NoError(t, err)
	require.Len(t, all, 2)
	_, err = VerifyAny(all, e, []PublicKey{k.PublicKey})
	require.NoError(t, err)
	again, err := Sign(e, k)
	require.NoError(t, err)
	_, err = Keep(store, e.Digest, again, true)
	require.NoError(t, err)
	all, err = Bundles(store, e.Digest)
	require.NoError(t, err)
	require.Equal(t, [][]byte{again}, all)
}

func FuzzReadBundle(f *testing.F) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	pub, err := publicKey("k", ed.Public())
	require.NoError(f, err)
	k := PrivateKey{PublicKey: pub, signer: ed}
	b, err := Sign(anEnv("a"), k)
	require.NoError(f, err)
	f.Add(b)
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","dsseEnvelope":{"signatures":[null]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Verify(text, anEnv("a"), []PublicKey{k.PublicKey})
		if err == nil && s.ID != k.ID() {
			t.Fatal("another key")
		}
		_, err = Verify(text, anEnv("b"), []PublicKey{k.PublicKey})
		require.Error(t, err, "one environment's bundle is never another's")
	})
}
