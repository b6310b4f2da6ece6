package seccomp

import _ "embed" // what was baked

//go:embed baked_arm64.bpf
var bakedFilter string

//go:embed baked_arm64.digest
var bakedDigest string
