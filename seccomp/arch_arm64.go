package seccomp

const (
	archName = "arm64"
	auditID  = 0xc00000b7 // AUDIT_ARCH_AARCH64
	x32Bit   = 0          // no second ABI
)

func archAllowed() []string { return mobyAllowedARM64 }
