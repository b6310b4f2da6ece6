package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTallyCounts(t *testing.T) {
	in := `{"Action":"run","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"B","Output":"    b_test.go:3: got 1, want 2\n"}
{"Action":"fail","Package":"p","Test":"B"}
{"Action":"output","Package":"p","Test":"C","Output":"    c_test.go:3: needs root\n"}
{"Action":"output","Package":"p","Test":"C","Output":"--- SKIP: C (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"C"}
{"Action":"fail","Package":"p","Elapsed":0.5}
`
	var out strings.Builder
	ta := newTally(&out)
	ta.read(strings.NewReader(in))
	ta.close()
	require.Equal(t, "    b_test.go:3: got 1, want 2\nFAIL    p  0.5s\nskipped   1: needs root\n1 passed, 1 failed, 1 skipped\n", out.String())
}

// A package that does not build, panics before its first test or runs out of
// time has no failed test: it must count all the same.
func TestTallyCountsPackageWithoutTests(t *testing.T) {
	in := `{"ImportPath":"p","Action":"build-output","Output":"p.go:1:1: broken\n"}
{"Action":"fail","Package":"p","Elapsed":0}
`
	var out strings.Builder
	ta := newTally(&out)
	ta.read(strings.NewReader(in))
	ta.close()
	require.Equal(t, "p.go:1:1: broken\nFAIL    p  0.0s\n0 passed, 1 failed, 0 skipped\n", out.String())
}
