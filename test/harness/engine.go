package harness

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Engines are the engines that a sandbox can be started with, the default first.
var Engines = []string{"direct", "libcontainer"}

// PerEngine runs f once for each engine, as a subtest named after it, with an
// installation whose runs ask for that engine. SBXRUN_TEST_ENGINES narrows the
// choice (a list with commas) for one who works on an engine; it cannot add one.
func PerEngine(t *testing.T, f func(t *testing.T, s *Sbx)) {
	t.Helper()
	only := strings.FieldsFunc(os.Getenv("SBXRUN_TEST_ENGINES"), func(r rune) bool { return r == ',' })
	for _, o := range only {
		if !slices.Contains(Engines, o) {
			t.Fatalf("SBXRUN_TEST_ENGINES: no engine is called %q", o)
		}
	}
	for _, e := range Engines {
		if len(only) > 0 && !slices.Contains(only, e) {
			continue
		}
		t.Run(e, func(t *testing.T) { f(t, NewOn(t, e)) })
	}
}

// NewOn is [New] for one engine.
func NewOn(t testing.TB, engine string) *Sbx {
	t.Helper()
	s := New(t)
	s.Engine = engine
	return s
}

// Degraded is what every sandbox does without on this kernel, as reports name
// it: Landlock scopes since its ABI 6 (Linux 6.12).
func Degraded() []string {
	abi, _, err := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if err != 0 || abi < 6 {
		return []string{"landlock"}
	}
	return nil
}
