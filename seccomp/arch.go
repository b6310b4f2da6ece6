package seccomp

import "runtime"

// number is one system call of an architecture.
type number struct {
	name string
	nr   uint32
}

// arch is what a filter must know of an architecture. Both are little-endian.
type arch struct {
	name    string // GOARCH
	auditID uint32 // AUDIT_ARCH_*, what the kernel tells the filter
	x32Bit  uint32 // set in the numbers of a second ABI; 0 is none
	numbers []number
	allowed []string // by moby, besides what it allows everywhere
}

var (
	amd64 = &arch{"amd64", 0xc000003e, 0x40000000, numbersAMD64, mobyAllowedAMD64}
	arm64 = &arch{"arm64", 0xc00000b7, 0, numbersARM64, mobyAllowedARM64}
)

// native is this machine's; other architectures are not supported and fail to
// start rather than run without a filter.
var native = func() *arch {
	switch runtime.GOARCH {
	case "amd64":
		return amd64
	case "arm64":
		return arm64
	}
	panic("seccomp: no table for " + runtime.GOARCH)
}()
