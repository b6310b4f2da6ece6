// Command tally runs `go test -json …` (its arguments after --) and prints what
// a person wants to read: failing tests with their output, one line per package,
// why tests were skipped, and at the end the line "N passed, N failed, N skipped".
// It exits 1 when a test, a package or the build failed, or when no test ran.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sort"
	"strings"
)

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "usage: tally -- go test -json ./...")
		os.Exit(2)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		fmt.Fprintln(os.Stderr, "tally: open pipe:", err)
		os.Exit(1)
	}
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "tally: start %q: %v\n", args[0], err)
		os.Exit(1)
	}
	t := newTally(os.Stdout)
	t.read(out)
	waitErr := cmd.Wait()
	t.close()
	if waitErr != nil || t.failed > 0 || t.passed == 0 {
		os.Exit(1)
	}
}

// event is one line of test2json(1), and of the build output beside it.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64
	Output     string
}

type key struct{ pkg, test string }

// tally counts. A test with subtests counts once, as do its subtests: what
// `go test -v` would print a line for.
type tally struct {
	w                       io.Writer
	passed, failed, skipped int
	output                  map[key]*strings.Builder
	pkgFails                map[string]int
	skips                   map[string]int
}

func newTally(w io.Writer) *tally {
	return &tally{w: w, output: map[key]*strings.Builder{}, pkgFails: map[string]int{}, skips: map[string]int{}}
}

func (t *tally) read(r io.Reader) {
	in := bufio.NewReaderSize(r, 1<<20)
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) == nil && e.Action != "" {
				t.add(e)
			} else {
				fmt.Fprint(t.w, line)
			}
		}
		if err != nil {
			return
		}
	}
}

func (t *tally) add(e event) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(t.w, e.Output)
	case "output":
		b := t.output[k]
		if b == nil {
			b = &strings.Builder{}
			t.output[k] = b
		}
		b.WriteString(e.Output)
	case "pass", "fail", "skip":
		t.end(e, k)
	}
}

func (t *tally) end(e event, k key) {
	text := ""
	if b := t.output[k]; b != nil {
		text = b.String()
		delete(t.output, k)
	}
	if e.Test == "" {
		t.endPackage(e, text)
		return
	}
	switch e.Action {
	case "pass":
		t.passed++
	case "skip":
		t.skipped++
		t.skips[skipReason(text)]++
	case "fail":
		t.failed++
		t.pkgFails[e.Package]++
		fmt.Fprint(t.w, text)
	}
}

func (t *tally) endPackage(e event, text string) {
	switch e.Action {
	case "pass":
		fmt.Fprintf(t.w, "ok      %s  %.1fs\n", e.Package, e.Elapsed)
	case "fail":
		// No failed test in it: the build, TestMain, a panic or a time-out.
		if t.pkgFails[e.Package] == 0 {
			t.failed++
			fmt.Fprint(t.w, text)
		}
		fmt.Fprintf(t.w, "FAIL    %s  %.1fs\n", e.Package, e.Elapsed)
	}
}

// close prints the summary, and the output of tests that never ended.
func (t *tally) close() {
	for k, b := range t.output {
		if k.test != "" && t.pkgFails[k.pkg] == 0 && b.Len() > 0 {
			fmt.Fprintf(t.w, "did not end: %s %s\n%s", k.pkg, k.test, b)
		}
	}
	reasons := make([]string, 0, len(t.skips))
	for r := range t.skips {
		reasons = append(reasons, r)
	}
	sort.Strings(reasons)
	for _, r := range reasons {
		fmt.Fprintf(t.w, "skipped %3d: %s\n", t.skips[r], r)
	}
	fmt.Fprintf(t.w, "%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
}

// skipReason picks the message of t.Skip out of a test's output.
func skipReason(text string) string {
	reason := "no reason given"
	for _, l := range strings.Split(text, "\n") {
		if s := strings.TrimSpace(l); s != "" && !strings.HasPrefix(s, "=== ") && !strings.HasPrefix(s, "--- ") {
			if _, after, ok := strings.Cut(s, ".go:"); ok {
				if _, msg, ok := strings.Cut(after, ": "); ok {
					s = msg
				}
			}
			reason = s
		}
	}
	return reason
}
