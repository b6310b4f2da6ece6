package seccomp

//go:generate go test -run TestBakedFilter -update .

// DefaultFilter is the compiled default policy of this architecture. It is
// compiled when sbxrun is built, not when a sandbox is launched (libseccomp
// takes half a launch of runc for it): TestBakedFilter keeps both in step.
func DefaultFilter() Filter { return Filter(bakedFilter) }

// DefaultDigest is Default().Digest(), known ahead.
func DefaultDigest() string { return bakedDigest }
