package envs

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"

	"github.com/sbxrun/sbxrun/rootfs"
)

// SignedBy is a signature as it lies in the store. Whether it holds, only a key
// says: sbxrun env verify.
type SignedBy struct {
	KeyID  string `json:"key_id"` // hex sha256 of the key, as the bundle has it
	Bundle string `json:"bundle"` // its file
}

// maxSignatureBytes and maxSignatures bound what is read for Inspect.
const (
	maxSignatureBytes = 8 << 20
	maxSignatures     = 64
)

// signatures lists what is stored for a content digest.
func signatures(store *rootfs.Store, digest string) []SignedBy {
	dir := SignaturesDir(store, digest)
	ents, _ := os.ReadDir(dir)
	var out []SignedBy
	for _, de := range ents[:min(len(ents), maxSignatures)] {
		s := SignedBy{Bundle: filepath.Join(dir, de.Name())}
		var b struct {
			VerificationMaterial struct {
				PublicKey struct {
					Hint string `json:"hint"`
				} `json:"publicKey"`
			} `json:"verificationMaterial"`
		}
		if f, err := os.Open(s.Bundle); err == nil {
			if json.NewDecoder(io.LimitReader(f, maxSignatureBytes)).Decode(&b) == nil {
				if id, err := base64.StdEncoding.DecodeString(b.VerificationMaterial.PublicKey.Hint); err == nil {
					s.KeyID = hex.EncodeToString(id)
				}
			}
			f.Close()
		}
		out = append(out, s)
	}
	return out
}
