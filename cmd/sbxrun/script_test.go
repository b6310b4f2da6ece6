package main

import (
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

var update = flag.Bool("update", false, "write docs/reference.md and the goldens anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sbxrun": main})
}

func scripts(t *testing.T, dir string, setup func(*testscript.Env) error) {
	t.Helper()
	testscript.Run(t, testscript.Params{
		Dir: dir, UpdateScripts: *update, Setup: setup, RequireExplicitExec: true,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"code": code},
	})
}

// code N COMMAND… runs a command that must end with exactly this exit code.
func code(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N command [args...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func dirs(e *testscript.Env) error {
	e.Setenv("SBXRUN_ROOT", filepath.Join(e.WorkDir, "root"))
	e.Setenv("SBXRUN_STATE", filepath.Join(e.WorkDir, "state"))
	return nil
}

func TestScripts(t *testing.T) { scripts(t, filepath.Join("testdata", "script"), dirs) }

// TestRootScripts need root: planning opens the store, running makes sandboxes.
func TestRootScripts(t *testing.T) {
	need.Root(t)
	need.UserNS(t)
	need.Overlay(t)
	need.Cgroup(t)
	bin := filepath.Dir(need.Binary(t))
	scripts(t, filepath.Join("testdata", "root"), func(e *testscript.Env) error {
		// The engine is looked for beside the program and on PATH; the program is the test binary.
		e.Setenv("PATH", e.Getenv("PATH")+string(os.PathListSeparator)+bin)
		return dirs(e)
	})
}

// The reference is what the flags say. -update writes it.
func TestReferenceIsUpToDate(t *testing.T) {
	t.Setenv("SBXRUN_ROOT", "/elsewhere")
	path := filepath.Join("..", "..", "docs", "reference.md")
	want := markdown()
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(want), 0o644)) //nolint:gosec // documentation
	}
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, want, string(got), "go test ./cmd/sbxrun -run Reference -update")
	assert.NotContains(t, want, "/elsewhere")
}
