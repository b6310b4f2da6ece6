// Package trust owns signatures of environments: keys in files, sigstore
// bundles over in-toto statements, and the policy that says whose signature is
// wanted. All of it works offline: there is no service, no log and no clock but
// the policy's own dates. It must never know how an environment is baked, moved
// or run.
//
// Of sigstore's libraries it takes the one that defines the bundle
// (protobuf-specs): sigstore-go would link 71 modules, for certificates,
// transparency logs and their mirrors, none of which a key in a file needs.
// What remains, DSSE over one key, is a hash and a signature.
package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/secure-systems-lab/go-securesystemslib/encrypted"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

// maxKeyBytes bounds a key's file.
const maxKeyBytes = 64 << 10

const keyHint = "a PEM file with an ECDSA P-256 or Ed25519 key, as openssl and cosign write them"

// PublicKey verifies.
type PublicKey struct {
	Name string // what it is called in messages: its file
	key  crypto.PublicKey
	der  []byte
}

// ID is the hex sha256 of the key (SubjectPublicKeyInfo, DER).
func (k PublicKey) ID() string {
	sum := sha256.Sum256(k.der)
	return hex.EncodeToString(sum[:])
}

// hint is how cosign names a key in a bundle.
func (k PublicKey) hint() string {
	sum := sha256.Sum256(k.der)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// verify says whether sig is the key's over message.
func (k PublicKey) verify(message, sig []byte) bool {
	switch p := k.key.(type) {
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return ecdsa.VerifyASN1(p, sum[:], sig)
	case ed25519.PublicKey:
		return ed25519.Verify(p, message, sig)
	}
	return false
}

// PrivateKey signs.
type PrivateKey struct {
	PublicKey
	signer crypto.Signer
}

func (k PrivateKey) sign(message []byte) ([]byte, error) {
	if _, ok := k.signer.(ed25519.PrivateKey); ok {
		return k.signer.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return k.signer.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// readFile reads what a message calls a key, a bundle or a policy.
func readFile(what, path string, limit int64) ([]byte, error) {
	b, err := bounded.File(path, limit)
	if errors.Is(err, bounded.ErrTooLarge) {
		err = errors.New("too large for a " + what)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s %q: %w", what, path, err)
	}
	return b, nil
}

// ReadPublicKey reads a public key's file.
func ReadPublicKey(path string) (PublicKey, error) {
	b, err := readFile("key", path, maxKeyBytes)
	if err != nil {
		return PublicKey{}, err
	}
	return ParsePublicKey(path, b)
}

// ParsePublicKey reads a public key in PEM; name is what messages call it.
func ParsePublicKey(name string, text []byte) (PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return PublicKey{}, hinted.New(fmt.Errorf("read key %q: no PEM in it", name), keyHint)
	}
	if block.Type != "PUBLIC KEY" {
		return PublicKey{}, hinted.New(fmt.Errorf("read key %q: %q, not a public key", name, block.Type), "openssl pkey -in KEY -pubout gives the public half")
	}
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return PublicKey{}, hinted.New(fmt.Errorf("read key %q: damaged", name), keyHint)
	}
	return publicKey(name, k)
}

func publicKey(name string, k crypto.PublicKey) (PublicKey, error) {
	switch p := k.(type) {
	case ed25519.PublicKey:
	case *ecdsa.PublicKey:
		if p.Curve != elliptic.P256() {
			return PublicKey{}, hinted.New(fmt.Errorf("read key %q: ECDSA over %s", name, p.Curve.Params().Name), keyHint)
		}
	default:
		return PublicKey{}, hinted.New(fmt.Errorf("read key %q: neither ECDSA nor Ed25519", name), keyHint)
	}
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return PublicKey{}, fmt.Errorf("read key %q: %w", name, err)
	}
	return PublicKey{Name: name, key: k, der: der}, nil
}

// ReadPrivateKey reads a private key's file: PKCS #8, SEC 1, or as cosign
// encrypts it. password is asked for in the last case alone.
func ReadPrivateKey(path string, password func() ([]byte, error)) (PrivateKey, error) {
	text, err := readFile("key", path, maxKeyBytes)
	if err != nil {
		return PrivateKey{}, err
	}
	var block *pem.Block
	for rest := text; ; { // openssl writes the curve's parameters first
		if block, rest = pem.Decode(rest); block == nil || block.Type != "EC PARAMETERS" {
			break
		}
	}
	if block == nil {
		return PrivateKey{}, hinted.New(fmt.Errorf("read key %q: no PEM in it", path), keyHint)
	}
	der := block.Bytes
	var k any
	switch block.Type {
	case "ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY":
		pw, err := password()
		if err != nil {
			return PrivateKey{}, err
		}
		if der, err = encrypted.Decrypt(der, pw); err != nil {
			return PrivateKey{}, hinted.New(fmt.Errorf("read key %q: it does not open with this password", path), "SBXRUN_KEY_PASSWORD, COSIGN_PASSWORD or --password-file gives it")
		}
		k, err = x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return PrivateKey{}, hinted.New(fmt.Errorf("read key %q: damaged", path), keyHint)
		}
	case "PRIVATE KEY":
		k, err = x509.ParsePKCS8PrivateKey(der)
	case "EC PRIVATE KEY":
		k, err = x509.ParseECPrivateKey(der)
	case "ENCRYPTED PRIVATE KEY":
		return PrivateKey{}, hinted.New(fmt.Errorf("read key %q: encrypted as PKCS #8", path), "openssl pkey -in KEY -out PLAIN decrypts it; cosign's own encryption is understood")
	default:
		return PrivateKey{}, hinted.New(fmt.Errorf("read key %q: %q, not a private key", path, block.Type), keyHint)
	}
	signer, ok := k.(crypto.Signer)
	if err != nil || !ok {
		return PrivateKey{}, hinted.New(fmt.Errorf("read key %q: damaged", path), keyHint)
	}
	pub, err := publicKey(path, signer.Public())
	if err != nil {
		return PrivateKey{}, err
	}
	return PrivateKey{PublicKey: pub, signer: signer}, nil
}
