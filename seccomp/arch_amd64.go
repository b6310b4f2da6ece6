package seccomp

const (
	archName = "amd64"
	auditID  = 0xc000003e // AUDIT_ARCH_X86_64
	x32Bit   = 0x40000000 // set in the numbers of the x32 ABI
)

func archAllowed() []string { return mobyAllowedAMD64 }
