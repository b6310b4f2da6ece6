// Package share moves environments: to and from OCI images (a layout, an archive
// or a registry) and plain archives. It owns those formats and the client of
// registries, and must never know sandboxes, recipes or whom to trust: who asks
// hands it a [Verifier].
//
// An environment is an image of ordinary layers, bottom to top: the base (if
// asked for), the layers it extends, its own, and one with its record and lock.
// A layer's archive is made from its manifest and gives that manifest back, so
// the content digest covers every byte of the tree, whatever tools the image
// went through. Nothing is unpacked to a path that an archive names: its entries
// become a manifest and content by digest, in memory and in a staging directory,
// and only when all digests are right does the store make a tree of it.
package share

import (
	"context"
	"errors"
	"time"

	"github.com/sbxrun/sbxrun/envs"
)

// Verifier decides whether an environment may be taken in. Its record and the
// digests are what will be published; bundles are the signatures that came along,
// unverified. It is called before any content is fetched.
type Verifier func(ctx context.Context, e *envs.Env, bundles [][]byte) error

// Labels of an image's configuration.
const (
	// labelDigest is the environment's content digest.
	labelDigest = "io.github.sbxrun.environment"
	// labelLayers says what each layer is, bottom to top: "base:sha256:…",
	// "layer:sha256:…" (content digests), "record".
	labelLayers = "io.github.sbxrun.layers"
	labelKind   = "io.github.sbxrun.kind"
	labelLock   = "io.github.sbxrun.lock"
)

// epoch is the time of everything: that of the store's files.
var epoch = time.Unix(1577836800, 0).UTC() // 2020-01-01

// limits bound what outside input fills.
type limits struct {
	entries     int   // of one layer
	nameBytes   int   // of all names and links of a layer
	bytes       int64 // unpacked, of one layer
	ratio       int64 // unpacked to packed
	slack       int64 // unpacked bytes for which the ratio is not asked
	depth       int
	layers      int
	jsonBytes   int64 // index, manifest, configuration
	recordBytes int64 // the record and the lock, each
	bundleBytes int64
	bundles     int
}

var standard = limits{
	entries: 1_000_000, nameBytes: 256 << 20, bytes: 64 << 30, ratio: 1100, slack: 64 << 20, depth: 128, // gzip's ratio reaches 1032
	layers: 120, jsonBytes: 4 << 20, recordBytes: 64 << 20, bundleBytes: 8 << 20, bundles: 64,
}

var errTooMuch = errors.New("more than is taken")

// Progress hears of long work.
type Progress func(text string)
