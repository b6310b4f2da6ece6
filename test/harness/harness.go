// Package harness runs bin/sbxrun as a user would and checks what it left
// behind. It owns directories, processes and the reading of reports; it knows
// the command line and the JSON report, and imports nothing of sbxrun, so that
// a change of either contract breaks a test.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sbxrun/sbxrun/test/need"
)

// Report is the JSON report as a consumer reads it. Absent numbers are nil.
type Report struct {
	SchemaVersion   int                `json:"schema_version"`
	ID              string             `json:"id"`
	Status          string             `json:"status"`
	Reason          string             `json:"reason"`
	Stage           string             `json:"stage"`
	ExitCode        int                `json:"exit_code"`
	Signal          string             `json:"signal"`
	OOMKilled       bool               `json:"oom_killed"`
	Message         string             `json:"message"`
	Hint            string             `json:"hint"`
	WallMS          *float64           `json:"wall_ms"`
	CPUUserMS       *float64           `json:"cpu_user_ms"`
	CPUSystemMS     *float64           `json:"cpu_system_ms"`
	MemoryPeakBytes *int64             `json:"memory_peak_bytes"`
	PidsPeak        *int64             `json:"pids_peak"`
	DiskUsedBytes   *int64             `json:"disk_used_bytes"`
	InodesUsed      *int64             `json:"inodes_used"`
	Limits          map[string]any     `json:"limits"`
	Degraded        []string           `json:"degraded"`
	Denials         []string           `json:"denials"`
	Base            string             `json:"base"`
	Engine          string             `json:"engine"`
	PhasesMS        map[string]float64 `json:"phases_ms"`
	Env             *struct{ Key, Digest string }

	// All is the whole report, for tests that compare two.
	All map[string]any `json:"-"`
}

// Outcome is one finished run of sbxrun.
type Outcome struct {
	// Code is sbxrun's own exit status, -1 when a signal ended it.
	Code   int
	Signal syscall.Signal
	Stdout []byte
	Stderr []byte
	// Report is nil when none was asked for or none was written.
	Report  *Report
	Elapsed time.Duration
}

// String shows an outcome for a failing test's message.
func (o *Outcome) String() string {
	r, _ := json.Marshal(o.Report)
	return fmt.Sprintf("code %d signal %v after %v\nstdout: %s\nstderr: %s\nreport: %s",
		o.Code, o.Signal, o.Elapsed.Round(time.Millisecond), clip(o.Stdout), clip(o.Stderr), r)
}

func clip(b []byte) []byte {
	if len(b) > 4000 {
		return append(b[:4000:4000], "…"...)
	}
	return b
}

// Sbx is one sbxrun installation with a state folder of its own. Root is shared
// by the tests of a package (the environments in it are costly), State is not.
type Sbx struct {
	Bin, Root, State string
	// Engine is what every `run` asks for with --engine, and what its report must
	// name; "" asks for none and takes what comes. What a run bakes, it bakes with
	// the default engine whatever is asked.
	Engine string
	// Prefix is put before the command: it changes what sbxrun runs in and then
	// executes its arguments.
	Prefix []string
	t      testing.TB
	mu     sync.Mutex
	ids    []string
	before world
}

var shared struct {
	sync.Once
	root string
	err  error
}

// Main runs a package's tests and removes what they shared after them; call it
// from TestMain.
func Main(m *testing.M) int {
	code := m.Run()
	for _, dir := range []string{shared.root, built.dir} {
		if dir == "" {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, "harness: remove shared folder:", err)
			return 1
		}
	}
	return code
}

// New checks the needs of every privileged test and prepares an installation.
// When the test ends, everything that its sandboxes could have left is looked
// for, and a find fails the test.
func New(t testing.TB) *Sbx {
	t.Helper()
	need.Root(t)
	need.UserNS(t)
	need.Overlay(t)
	need.Cgroup(t)
	bin := need.Binary(t)
	shared.Do(func() { shared.root, shared.err = os.MkdirTemp("", "sbxrun-root-") })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return newAt(t, bin, shared.root)
}

// NewEmpty is [New] with an empty root of its own.
func NewEmpty(t testing.TB) *Sbx {
	t.Helper()
	s := New(t)
	s.Root = filepath.Join(t.TempDir(), "root")
	return s
}

func newAt(t testing.TB, bin, root string) *Sbx {
	t.Helper()
	s := &Sbx{Bin: bin, Root: root, State: filepath.Join(t.TempDir(), "state"), t: t, before: look()}
	t.Cleanup(s.checkLeaks)
	return s
}

// Cmd prepares sbxrun with args in the installation's environment, killed with
// its group after a minute.
func (s *Sbx) Cmd(args ...string) *exec.Cmd {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	s.t.Cleanup(cancel)
	if s.Engine != "" && len(args) > 0 && args[0] == "run" {
		args = append([]string{"run", "--engine", s.Engine}, args[1:]...)
	}
	argv := append(append(append([]string{}, s.Prefix...), s.Bin), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "SBXRUN_ROOT="+s.Root, "SBXRUN_STATE="+s.State)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Do runs sbxrun with args and no standard input.
func (s *Sbx) Do(args ...string) *Outcome {
	s.t.Helper()
	return s.DoInput(nil, args...)
}

// DoInput is [Sbx.Do] with standard input.
func (s *Sbx) DoInput(stdin io.Reader, args ...string) *Outcome {
	s.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := s.Cmd(args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	o := s.Wait(cmd)
	o.Stdout, o.Stderr, o.Elapsed = stdout.Bytes(), stderr.Bytes(), time.Since(start)
	return o
}

// Wait waits for a command from [Sbx.Cmd] and reads its exit status.
func (s *Sbx) Wait(cmd *exec.Cmd) *Outcome {
	s.t.Helper()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("%q: %v", cmd.Args, err)
	}
	o := &Outcome{Code: cmd.ProcessState.ExitCode()}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		o.Signal = ws.Signal()
	}
	return o
}

// Run is `sbxrun run --report FILE args…`; the report must be written and agree
// with the exit status.
func (s *Sbx) Run(args ...string) *Outcome {
	s.t.Helper()
	return s.RunInput(nil, args...)
}

// RunInput is [Sbx.Run] with standard input.
func (s *Sbx) RunInput(stdin io.Reader, args ...string) *Outcome {
	s.t.Helper()
	file := s.ReportFile()
	o := s.DoInput(stdin, append([]string{"run", "--report", file}, args...)...)
	o.Report = s.ReadReport(file)
	if o.Report == nil {
		s.t.Errorf("no report was written\n%v", o)
		o.Report = &Report{}
	} else if o.Report.ExitCode != o.Code {
		s.t.Errorf("the report says exit_code %d, sbxrun exited %d\n%v", o.Report.ExitCode, o.Code, o)
	}
	return o
}

// ReportFile names a file for one report.
func (s *Sbx) ReportFile() string {
	s.t.Helper()
	return filepath.Join(s.t.TempDir(), "report.json")
}

// ReadReport reads a report, nil when there is none.
func (s *Sbx) ReadReport(file string) *Report {
	s.t.Helper()
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.t.Fatal(err)
	}
	r := &Report{}
	if err := json.Unmarshal(b, r); err != nil {
		s.t.Fatalf("report is not JSON: %v\n%s", err, b)
	}
	if err := json.Unmarshal(b, &r.All); err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	if r.ID != "" {
		s.ids = append(s.ids, r.ID)
	}
	s.mu.Unlock()
	// A run that was refused before there was a plan has no id and no engine.
	if s.Engine != "" && r.ID != "" && r.Engine != s.Engine {
		s.t.Errorf("asked for engine %q, the report names %q", s.Engine, r.Engine)
	}
	return r
}

// BuildC compiles a C program statically, once per package, and returns its
// path, which any user may reach. SBXRUN_TEST_C names a folder that holds it
// already, for a machine without a compiler (see test/vm).
func BuildC(t testing.TB, source string) string {
	t.Helper()
	name := strings.TrimSuffix(filepath.Base(source), ".c")
	if dir := os.Getenv("SBXRUN_TEST_C"); dir != "" {
		return filepath.Join(dir, name)
	}
	need.Compiler(t)
	built.Lock()
	defer built.Unlock()
	if p, ok := built.paths[source]; ok {
		return p
	}
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "sbxrun-cc-")
		if err != nil {
			t.Fatal(err)
		}
		built.dir = dir
		if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // others must run what is in it
			t.Fatal(err)
		}
	}
	out := filepath.Join(built.dir, name)
	cmd := exec.Command("gcc", "-std=gnu11", "-O1", "-Wall", "-Werror", "-static", "-o", out, source)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", cmd.Args, err, b)
	}
	built.paths[source] = out
	return out
}

var built = struct {
	sync.Mutex
	dir   string
	paths map[string]string
}{paths: map[string]string{}}
