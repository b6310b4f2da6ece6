package seccomp

import "testing"

// What every launch pays.
func BenchmarkDefaultDigest(b *testing.B) {
	for b.Loop() {
		_ = build(native).Digest()
	}
}

func BenchmarkLoadCached(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		if _, err := Load(dir, Default()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	for b.Loop() {
		if _, err := Default().Compile(); err != nil {
			b.Fatal(err)
		}
	}
}
