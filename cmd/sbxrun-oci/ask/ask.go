// Package ask is what sbxrun asks sbxrun-oci for (by internal/ask).
package ask

import (
	"github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

// The words on sbxrun-oci's command line, and what is asked with them.
const (
	AddBaseVerb = "base-add"
	ScopeVerb   = "scope" // systemd.ScopeRequest
)

// AddBase asks for a base. Paths are any bytes, which JSON's strings are not.
type AddBase struct {
	Root   []byte `json:"root"` // of the store
	Name   []byte `json:"name"`
	Source []byte `json:"source"`
}

// Start asks.
func Start(verb string, request any) (*ask.Call, error) {
	path, err := engine.FindOCI()
	if err != nil {
		return nil, ask.NewError(err.Error(), "make install puts all binaries into one directory")
	}
	return ask.Start(path, verb, request, nil)
}
