package main

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Each of these is initialised, or makes the program's tables larger, at every
// launch, whether it is used or not.
func TestNothingHeavyIsLinked(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	linked := map[string]bool{}
	for p := range strings.FieldsSeq(string(out)) {
		linked[p] = true
	}
	require.True(t, linked["github.com/sbxrun/sbxrun/runtime"], "the list is of this program")
	for p, instead := range map[string]string{
		"archive/tar":            "unpack in rootfs/image, by sbxrun-oci",
		"archive/zip":            "unpack in packages of sbxrun-env",
		"encoding/xml":           "parse in packages of sbxrun-env",
		"compress/flate":         "builds its Huffman tables",
		"hash/crc32":             "builds its tables",
		"net":                    "networks are sbxrun-net's",
		"net/netip":              "and unique, which it brings; see hostPort in envs for URLs",
		"net/url":                "imports net/netip; see hostPort in envs",
		"regexp":                 "keeps the tables of package unicode; see envs/text.go",
		"os/user":                "runtime reads the base's own passwd",
		"text/template":          "keeps every exported method of every type",
		"log":                    "return errors; cmd prints them",
		"encoding/gob":           "compiles decoders for its own types",
		"github.com/spf13/pflag": "imports net; see flags.go",
		"github.com/opencontainers/runc/libcontainer": "belongs into sbxrun-oci",
		"github.com/containerd/cgroups/v3":            "more than 1 ms; runtime/cgroup writes the files itself",
		"github.com/godbus/dbus/v5":                   "imports net; scopes are made by sbxrun-oci",
		"github.com/vishvananda/netlink":              "ioctl does for lo; the rest is sbxrun-net's",
		"github.com/google/nftables":                  "belongs into sbxrun-net",
		"github.com/sbxrun/sbxrun/rootfs/image":       "belongs into sbxrun-oci",
	} {
		require.False(t, linked[p], "%s: %s", p, instead)
	}
	// Of these modules nothing at all.
	for module, home := range map[string]string{
		"go.yaml.in/yaml":                         "packages of sbxrun-env",
		"oras.land/oras-go":                       "envs/share",
		"github.com/opencontainers":               "sbxrun-oci and envs/share",
		"github.com/sigstore":                     "envs/trust",
		"github.com/secure-systems-lab":           "envs/trust",
		"google.golang.org":                       "envs/trust",
		"golang.org/x/crypto":                     "test/sharing",
		"github.com/klauspost/compress":           "sbxrun-oci and packages of sbxrun-env",
		"mvdan.cc/sh":                             "envs/conda",
		"github.com/CycloneDX":                    "envs/inventory",
		"github.com/github/go-spdx":               "envs/inventory",
		"github.com/sbxrun/sbxrun/envs/conda":     "sbxrun-env",
		"github.com/sbxrun/sbxrun/envs/inventory": "sbxrun-env",
		"github.com/sbxrun/sbxrun/envs/recipes":   "sbxrun-env",
		"github.com/sbxrun/sbxrun/envs/relocate":  "sbxrun-env",
		"github.com/sbxrun/sbxrun/envs/share":     "sbxrun-env",
		"github.com/sbxrun/sbxrun/envs/trust":     "sbxrun-env",
		"github.com/sbxrun/sbxrun/netns/egress":   "sbxrun-net",
		"github.com/sbxrun/sbxrun/netns/routed":   "sbxrun-net",
		"github.com/sbxrun/sbxrun/netns/publish":  "sbxrun-net",
	} {
		for p := range linked {
			require.False(t, strings.HasPrefix(p+"/", module+"/"), "%s belongs into %s", p, home)
		}
	}
}
