package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/inventory"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
)

func init() {
	asked["sbom"] = answered(sbom)
	asked["scan"] = answered(scan)
	asked["diff"] = answered(diff)
}

// version is set by the linker.
var version = "dev"

// readInventory reads what is inside an environment.
func readInventory(store *rootfs.Store, m *envs.Manager, e *envs.Env, withBase bool) (*inventory.Inventory, error) {
	t, err := inventory.OpenTree(store, e)
	if err != nil {
		return nil, err
	}
	kind, lock, err := m.LockText(e)
	if err != nil {
		kind, lock = "", nil // of an older version: its hashes are not known
	}
	v, err := inventory.Read(t, e, kind, lock)
	if err != nil {
		return nil, hinted.New(err, "sbxrun env verify says whether the store is damaged")
	}
	if withBase {
		b, err := store.Base(e.Base)
		if err != nil {
			return nil, err
		}
		if err := v.AddBase(b); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// output writes to a file, "" is standard output.
func output(path string, write func(io.Writer) error) error {
	if path == "" {
		return write(os.Stdout)
	}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	err = write(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

type sbomQuestion struct {
	about
	Format   string `json:"format"`
	Output   string `json:"output,omitempty"`
	WithBase bool   `json:"with_base,omitempty"`
}

type sbomAnswer struct {
	Packages int `json:"packages"`
}

func sbom(_ context.Context, q sbomQuestion) (sbomAnswer, error) {
	store, m, e, err := q.open()
	if err != nil {
		return sbomAnswer{}, err
	}
	v, err := readInventory(store, m, e, q.WithBase)
	if err != nil {
		return sbomAnswer{}, err
	}
	write := v.CycloneDX
	if q.Format == "spdx" {
		write = v.SPDX
	}
	return sbomAnswer{len(v.Packages)}, output(q.Output, func(w io.Writer) error { return write(w, version) })
}

type scanQuestion struct {
	about
	Database string `json:"database"`
	Ignore   string `json:"ignore,omitempty"`
	Severity string `json:"severity,omitempty"`
	Format   string `json:"format"`
	WithBase bool   `json:"with_base,omitempty"`
}

type scanAnswer struct {
	Found    int `json:"found"`
	Unjudged int `json:"unjudged"`
}

func scan(ctx context.Context, q scanQuestion) (scanAnswer, error) {
	store, m, e, err := q.open()
	if err != nil {
		return scanAnswer{}, err
	}
	v, err := readInventory(store, m, e, q.WithBase)
	if err != nil {
		return scanAnswer{}, err
	}
	r, err := v.Scan(ctx, inventory.ScanOptions{Database: q.Database, Ignore: q.Ignore, Severity: q.Severity, Now: time.Now()})
	if err != nil {
		return scanAnswer{}, err
	}
	switch q.Format {
	case "json":
		err = printJSON(r)
	case "sarif":
		err = r.SARIF(os.Stdout, version)
	default:
		err = r.Table(os.Stdout)
	}
	return scanAnswer{len(r.Findings), len(r.Unjudged)}, err
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

type diffQuestion struct {
	about
	Other string `json:"other"`
	Files bool   `json:"files,omitempty"`
	JSON  bool   `json:"json,omitempty"`
}

type diffAnswer struct {
	Same bool `json:"same"`
}

func diff(_ context.Context, q diffQuestion) (diffAnswer, error) {
	store, m, a, err := q.open()
	if err != nil {
		return diffAnswer{}, err
	}
	b, err := m.Get(q.Other)
	if err != nil {
		return diffAnswer{}, err
	}
	va, err := readInventory(store, m, a, false)
	if err != nil {
		return diffAnswer{}, err
	}
	vb, err := readInventory(store, m, b, false)
	if err != nil {
		return diffAnswer{}, err
	}
	d, err := inventory.Diff(store, a, b, va.Packages, vb.Packages, q.Files)
	if err != nil {
		return diffAnswer{}, err
	}
	if q.JSON {
		return diffAnswer{d.Same}, printJSON(d)
	}
	return diffAnswer{d.Same}, d.Text(os.Stdout)
}
