// Command bench measures what a launch costs: sbxrun, every peer found on this
// machine, and a C floor that makes our system calls and nothing else, each in
// turn in the same rounds. It prints tables, and writes JSON and a picture.
//
// It owns the comparison: what each contestant is asked for and what it lacks.
// It needs root, gcc, and bin/sbxrun; it must never be part of a test, because
// nothing here passes or fails.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/cgroup"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	rounds   int // of the interleaved part; the others follow from it
	rateMS   int // of each contestant and parallelism
	sleepers int
	only     *regexp.Regexp
	json     string // "" writes none
	svg      string // "" writes none
	sbxrun   string
	source   string // directory of the C programs
}

func parse(args []string, stderr io.Writer) (options, error) {
	o := options{rateMS: 800, sleepers: 20}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.IntVar(&o.rounds, "n", 100, "launches of each contestant")
	quick := fs.Bool("quick", false, "20 launches each, and the rest shortened alike")
	only := fs.String("only", "", "only contestants whose name matches this regular expression")
	fs.StringVar(&o.json, "json", "build/bench/bench.json", "write the numbers to this file")
	fs.StringVar(&o.svg, "svg", "docs/bench.svg", "write the picture to this file")
	fs.StringVar(&o.sbxrun, "sbxrun", "bin/sbxrun", "the sbxrun to measure")
	fs.StringVar(&o.source, "c", "test/bench/c", "directory of floor.c, timer.c and net.c")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("parse flags: %q is none", fs.Arg(0))
	}
	if *quick {
		o.rounds, o.rateMS = 20, 300
	}
	if o.rounds < 1 {
		return o, fmt.Errorf("parse flags: -n %d: must be at least 1", o.rounds)
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return o, fmt.Errorf("parse flags: -only: %w", err)
	}
	if o.sbxrun, err = filepath.Abs(o.sbxrun); err != nil {
		return o, fmt.Errorf("find sbxrun: %w", err)
	}
	return o, nil
}

// run does everything, in this order, and leaves nothing behind but its output.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	say := func(format string, a ...any) { fmt.Fprintf(stderr, "bench: "+format+"\n", a...) }
	if os.Geteuid() != 0 {
		return errors.New("start: it needs root, as sbxrun does")
	}
	w, err := newWorkshop(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()

	r := &Report{SchemaVersion: schemaVersion, Kernel: kernel(), CPUs: runtime.NumCPU(), CgroupMode: w.cgroups.Mode, Launches: o.rounds}
	if r.LoadAverage = loadAverage(); r.LoadAverage != nil && *r.LoadAverage > 0.5 {
		say("the machine is busy: trust minima and CPU times only")
	}
	say("preparing the contestants")
	all := w.contestants(ctx, o.only)
	var able []*contestant
	for _, c := range all {
		if c.failed == "" {
			able = append(able, c)
		}
	}
	if len(able) == 0 && len(all) > 0 {
		return fmt.Errorf("measure: no contestant can run: %s: %s", all[0].name, all[0].failed)
	}
	plain := without(able, func(c *contestant) bool { return c.variant })

	say("%d rounds of %d contestants", o.rounds, len(able))
	times, err := w.rounds(ctx, able, o.rounds, 0)
	if err != nil {
		return err
	}
	r.Launch = launchRows(all, times)
	r.Features = featureRows(times)
	if w.cgroups.Mode != "v2" {
		n := max(o.rounds/8, 3)
		say("%d rounds of %d contestants, 250 ms apart", n, len(plain))
		if times, err = w.rounds(ctx, plain, n, 250); err != nil {
			return err
		}
		r.Paced = launchRows(plain, times)
	}
	if o.only.MatchString("network") {
		say("%d rounds of the network modes", o.rounds)
		if r.Networks, err = w.networks(ctx, o.rounds); err != nil {
			return err
		}
	}
	if o.only.MatchString("traffic") {
		n := min(max(o.rounds/20, 3), 5)
		say("%d rounds of traffic through the network modes", n)
		if r.Traffic, err = w.traffic(ctx, n, o.rateMS*3/4); err != nil {
			return err
		}
	}
	say("launches per second")
	for _, parallel := range []int{1, 2, 8} {
		rates, err := w.rate(ctx, plain, o.rateMS, parallel)
		if err != nil {
			return err
		}
		r.Throughput = append(r.Throughput, rates...)
	}
	say("memory of %d running sandboxes each", o.sleepers)
	r.Resident = w.resident(ctx, plain, o.sleepers)
	if o.only.MatchString("python") {
		say("Python: baking numpy and pandas, then importing them")
		rows, err := w.python(ctx, max(o.rounds/10, 3))
		if err != nil {
			r.Notes = append(r.Notes, "Python rows left out: "+err.Error())
		}
		r.Python = rows
	}
	if o.only.MatchString("environments") {
		say("environments: bakes, disk, conda's installers")
		r.Envs = w.envs(ctx)
	}
	if ctx.Err() != nil { // it looks like failures of contestants
		return fmt.Errorf("measure: %w", context.Cause(ctx))
	}
	r.Notes = append(r.Notes, w.notes...)
	r.Notes = append(r.Notes, notes...)
	if err := r.print(stdout); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return r.save(o.json, o.svg)
}

func without(in []*contestant, drop func(*contestant) bool) []*contestant {
	var out []*contestant
	for _, c := range in {
		if !drop(c) {
			out = append(out, c)
		}
	}
	return out
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func loadAverage() *float64 {
	var load float64
	b, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		_, err = fmt.Sscan(string(b), &load)
	}
	if err != nil {
		return nil
	}
	return &load
}

// workshop owns what a benchmark leaves lying around while it runs.
type workshop struct {
	o       options
	dir     string // root of sbxrun, bundles, rootfs
	state   string // what belongs on /run
	timer   string
	floor   string
	cgroups *cgroup.Host
	notes   []string
	undo    []func() error // run last to first
}

func newWorkshop(ctx context.Context, o options) (w *workshop, err error) {
	w = &workshop{o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.cgroups, err = cgroup.Detect(); err != nil {
		return w, err
	}
	// Not /tmp: where that is a tmpfs, kernels before 6.12 cannot map owners on it.
	if w.dir, err = w.tempDir("/var/tmp"); err != nil {
		return w, err
	}
	if w.state, err = w.tempDir("/run"); err != nil {
		if w.state, err = w.tempDir(""); err != nil {
			return w, err
		}
	}
	if err = w.install(); err != nil {
		return w, err
	}
	w.undo = append(w.undo, w.collect)
	for name, static := range map[string]bool{"timer": false, "floor": true} {
		if err := w.compile(ctx, name, static); err != nil {
			return w, err
		}
	}
	w.timer, w.floor = filepath.Join(w.dir, "timer"), filepath.Join(w.dir, "floor")
	return w, nil
}

// tempDir makes a directory that ids of other user namespaces can pass through.
func (w *workshop) tempDir(parent string) (string, error) {
	dir, err := os.MkdirTemp(parent, "sbxrun-bench-")
	if err != nil {
		return "", fmt.Errorf("make directory: %w", err)
	}
	w.undo = append(w.undo, func() error { return os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", fmt.Errorf("make directory: %w", err)
	}
	return dir, nil
}

// install copies the programs, as `make install` does: in the page cache, what
// the linker wrote lies in smaller pieces, and each costs a launch a page fault
// (0.4 ms in all, measured).
func (w *workshop) install() error {
	for _, suffix := range []string{"", "-net", "-oci", "-env"} {
		b, err := os.ReadFile(w.o.sbxrun + suffix)
		if suffix != "" && errors.Is(err, os.ErrNotExist) {
			continue // only networks, environments or the other engine need it
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(w.dir, "sbxrun"+suffix), b, 0o755) //nolint:gosec // a program
		}
		if err != nil {
			return fmt.Errorf("copy sbxrun: %w", err)
		}
	}
	w.o.sbxrun = filepath.Join(w.dir, "sbxrun")
	return nil
}

// collect removes what an interrupted sbxrun has left, as any sbxrun would that
// has the same directories.
func (w *workshop) collect() error {
	argv := w.own("gc")
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("collect what sbxrun left: %w: %s", err, oneLine(string(out)))
	}
	return nil
}

func (w *workshop) compile(ctx context.Context, name string, static bool) error {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "gcc"
	}
	args := []string{"-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", filepath.Join(w.dir, name), filepath.Join(w.o.source, name+".c")}
	if static {
		args = append([]string{"-static"}, args...)
	}
	if out, err := exec.CommandContext(ctx, cc, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("compile %q: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (w *workshop) close() error {
	var errs []error
	for i := len(w.undo) - 1; i >= 0; i-- {
		errs = append(errs, w.undo[i]())
	}
	w.undo = nil
	return errors.Join(errs...)
}
