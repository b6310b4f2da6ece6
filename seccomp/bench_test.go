package seccomp

import "testing"

// What building sbxrun pays once and no launch.
func BenchmarkDigest(b *testing.B) {
	for b.Loop() {
		_ = build(native).Digest()
	}
}

func BenchmarkCompile(b *testing.B) {
	for b.Loop() {
		if _, err := Default().Compile(); err != nil {
			b.Fatal(err)
		}
	}
}
