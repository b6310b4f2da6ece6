package trust

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	bundlepb "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonpb "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	dssepb "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

const (
	mediaType     = "application/vnd.dev.sigstore.bundle.v0.3+json"
	payloadType   = "application/vnd.in-toto+json"
	statementType = "https://in-toto.io/Statement/v1"
	// PredicateType names what we say of an environment.
	PredicateType = "https://github.com/sbxrun/sbxrun/environment/v1"
	// MaxBundleBytes bounds a bundle: 10,000 packages take 1 MB.
	MaxBundleBytes = 8 << 20
)

// Statement is an in-toto statement about an environment. Its subject is the
// content digest, which is also the sha256 of the layer's manifest: the file
// `manifest` in the store is what other tools verify.
type Statement struct {
	Type          string    `json:"_type"`
	Subject       []subject `json:"subject"`
	PredicateType string    `json:"predicateType"`
	Predicate     Predicate `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// Predicate is what is signed beside the content: what a record adds to the
// layer decides what runs, so a record that differs is not what was signed.
type Predicate struct {
	Kind     string         `json:"kind"`
	Lock     string         `json:"lock"`
	Below    []string       `json:"below,omitempty"`
	Env      []string       `json:"env"`
	Base     base           `json:"base"`
	Python   string         `json:"python"`
	Tool     string         `json:"tool"`
	Packages []envs.Package `json:"packages"`
}

type base struct {
	Name   string   `json:"name"`
	Digest string   `json:"digest,omitempty"`
	Env    []string `json:"env,omitempty"` // its variables
}

// StatementOf says what is signed of an environment.
func StatementOf(e *envs.Env) Statement {
	name := "environment"
	if len(e.Names) > 0 {
		name = e.Names[0]
	}
	return Statement{
		Type: statementType, PredicateType: PredicateType,
		Subject:   []subject{{Name: name, Digest: map[string]string{"sha256": strings.TrimPrefix(e.Digest, "sha256:")}}},
		Predicate: predicateOf(e),
	}
}

func predicateOf(e *envs.Env) Predicate {
	return Predicate{
		Kind: kindOf(e), Lock: e.Lock, Below: e.Below, Env: e.Vars,
		Base: base{e.Base, e.BaseDigest, e.BaseVars}, Python: e.Python, Tool: e.Tool, Packages: e.Packages,
	}
}

func kindOf(e *envs.Env) string {
	if e.Kind == "" {
		return "venv"
	}
	return e.Kind
}

// Sign gives the bundle of an environment's statement.
func Sign(e *envs.Env, k PrivateKey) ([]byte, error) {
	payload, err := json.Marshal(StatementOf(e))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if len(payload) > MaxBundleBytes/2 {
		return nil, fmt.Errorf("sign: a statement of %d bytes is too large", len(payload))
	}
	sig, err := k.sign(dsse.PAE(payloadType, payload))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	b := &bundlepb.Bundle{
		MediaType: mediaType,
		VerificationMaterial: &bundlepb.VerificationMaterial{
			Content: &bundlepb.VerificationMaterial_PublicKey{PublicKey: &commonpb.PublicKeyIdentifier{Hint: k.hint()}},
		},
		Content: &bundlepb.Bundle_DsseEnvelope{DsseEnvelope: &dssepb.Envelope{
			Payload: payload, PayloadType: payloadType, Signatures: []*dssepb.Signature{{Sig: sig}},
		}},
	}
	out, err := protojson.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	var text bytes.Buffer // protojson puts spaces in at random
	if err := json.Compact(&text, out); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return append(text.Bytes(), '\n'), nil
}

// signed is a bundle that was read, and not verified.
type signed struct {
	payload, sig []byte
	hint         string
}

// readBundle reads a bundle of one DSSE envelope over an in-toto statement.
func readBundle(text []byte) (s signed, err error) {
	if len(text) > MaxBundleBytes {
		return s, errors.New("too large for a bundle")
	}
	var b bundlepb.Bundle
	if err := protojson.Unmarshal(text, &b); err != nil {
		return s, errors.New("not a sigstore bundle")
	}
	env := b.GetDsseEnvelope()
	switch {
	case b.MediaType != mediaType && b.MediaType != "application/vnd.dev.sigstore.bundle+json;version=0.3":
		return s, fmt.Errorf("media type %q, not a bundle v0.3", bounded.Text(b.MediaType))
	case env == nil:
		return s, errors.New("signs a plain message, not a statement")
	case env.PayloadType != payloadType:
		return s, fmt.Errorf("payload of type %q, not an in-toto statement", bounded.Text(env.PayloadType))
	case len(env.Signatures) != 1: // as sigstore has it
		return s, fmt.Errorf("%d signatures, not one", len(env.Signatures))
	case b.VerificationMaterial.GetPublicKey() == nil:
		return s, errors.New("signed with a certificate, not a key")
	}
	return signed{payload: env.Payload, sig: env.Signatures[0].Sig, hint: b.VerificationMaterial.GetPublicKey().Hint}, nil
}

// shortHint gives the beginning of a key's ID where the hint is one.
func shortHint(hint string) string {
	if id, err := base64.StdEncoding.DecodeString(hint); err == nil && len(id) == sha256.Size {
		return envs.Short(hex.EncodeToString(id))
	}
	return strconv.Quote(bounded.Text(hint))
}

// Signature is one that holds.
type Signature struct {
	Key string `json:"key"` // what the key is called
	ID  string `json:"key_id"`
}

// Errors of a signature. Failure gives them in one line.
var (
	ErrUnsigned = errors.New("no signature")
	ErrOtherKey = errors.New("signed by another key")
	ErrTampered = errors.New("the signature does not match: the bundle was changed")
	ErrReplayed = errors.New("the signature is for another environment")
	ErrRecord   = errors.New("the record is not what was signed")
)

// Verify says which of the keys signed this very environment in that bundle.
func Verify(text []byte, e *envs.Env, keys []PublicKey) (Signature, error) {
	s, err := readBundle(text)
	if err != nil {
		return Signature{}, fmt.Errorf("bundle: %w", err)
	}
	message := dsse.PAE(payloadType, s.payload)
	i := slices.IndexFunc(keys, func(k PublicKey) bool { return k.verify(message, s.sig) })
	if i < 0 {
		if slices.ContainsFunc(keys, func(k PublicKey) bool { return k.hint() == s.hint }) {
			return Signature{}, ErrTampered
		}
		return Signature{}, fmt.Errorf("%w (%s)", ErrOtherKey, shortHint(s.hint))
	}
	// From here on it is the key's owner who speaks.
	var st Statement
	if err := json.Unmarshal(s.payload, &st); err != nil {
		return Signature{}, fmt.Errorf("bundle: its statement is damaged: %w", err)
	}
	if st.Type != statementType || st.PredicateType != PredicateType || len(st.Subject) != 1 {
		return Signature{}, fmt.Errorf("bundle: a statement of type %q about %d subjects, not about an environment", bounded.Text(st.PredicateType), len(st.Subject))
	}
	if got := "sha256:" + st.Subject[0].Digest["sha256"]; got != e.Digest {
		return Signature{}, fmt.Errorf("%w: %q, %s", ErrReplayed, bounded.Text(st.Subject[0].Name), envs.Short(bounded.Text(got)))
	}
	if what := st.Predicate.differs(predicateOf(e)); what != "" {
		return Signature{}, fmt.Errorf("%w: another %s", ErrRecord, what)
	}
	return Signature{Key: keys[i].Name, ID: keys[i].ID()}, nil
}

// differs names the first thing that decides what runs and is not the same.
func (p Predicate) differs(q Predicate) string {
	switch {
	case p.Kind != q.Kind:
		return "kind"
	case p.Lock != q.Lock:
		return "lock"
	case !slices.Equal(p.Below, q.Below):
		return "list of layers below"
	case !slices.Equal(p.Env, q.Env):
		return "set of variables"
	case p.Python != q.Python:
		return "interpreter"
	case p.Base.Digest != q.Base.Digest: // it may have come along
		return "base"
	case q.Base.Env != nil && !slices.Equal(p.Base.Env, q.Base.Env):
		return "set of the base's variables"
	}
	return ""
}

// VerifyAny says which key signed the environment in any of the bundles. Where
// none did, the error is that of the bundle that came nearest.
func VerifyAny(bundles [][]byte, e *envs.Env, keys []PublicKey) (Signature, error) {
	worst := ErrUnsigned
	for _, b := range bundles {
		s, err := Verify(b, e, keys)
		if err == nil {
			return s, nil
		}
		if errors.Is(worst, ErrUnsigned) || errors.Is(worst, ErrOtherKey) {
			worst = err
		}
	}
	return Signature{}, worst
}

// Explain adds the hint that an error of VerifyAny asks for.
func Explain(err error) error {
	hint := ""
	switch {
	case errors.Is(err, ErrUnsigned):
		hint = "sbxrun env sign NAME --key FILE signs it"
	case errors.Is(err, ErrOtherKey):
		hint = "give that key's public half, or have it signed by one that you trust"
	case errors.Is(err, ErrTampered), errors.Is(err, ErrReplayed), errors.Is(err, ErrRecord):
		hint = "somebody or something changed it on its way: fetch it anew, and ask who signed it"
	}
	return hinted.New(err, hint)
}
