package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

const requirements = "numpy\npandas\n"

// python bakes an environment, copies it beside as a bare venv (the same
// interpreter, files and byte code), and times both in turn. The sandbox has one
// CPU by default, which numpy's threads feel: it is also given all of them.
func (w *workshop) python(ctx context.Context, n int) ([]PythonRow, error) {
	file := filepath.Join(w.dir, "requirements.txt")
	if err := os.WriteFile(file, []byte(requirements), 0o644); err != nil {
		return nil, fmt.Errorf("write requirements: %w", err)
	}
	inside := func(flags ...string) []string {
		return append(w.own("run", append([]string{"-q", "-r", file, "--project", "none"}, flags...)...), "--", "python", "-c")
	}
	sandbox, allCPUs := inside(), inside("--cpus", fmt.Sprint(runtime.NumCPU()))
	bake := w.start(ctx, &contestant{}, strings.Join(append(sandbox, "pass"), "\x1f"))
	bake.Dir = w.dir
	if out, err := bake.CombinedOutput(); err != nil {
		return nil, errors.New(oneLine(fmt.Sprintf("bake: %v: %s", err, out)))
	}
	layers, err := filepath.Glob(filepath.Join(w.dir, "root", "layers", "*", "root", "opt", "env", "pyvenv.cfg"))
	if err != nil || len(layers) != 1 {
		return nil, fmt.Errorf("find the baked layer: %d of them", len(layers))
	}
	venv := filepath.Join(w.dir, "venv")
	if out, err := exec.CommandContext(ctx, "cp", "-a", filepath.Dir(layers[0]), venv).CombinedOutput(); err != nil {
		return nil, errors.New(oneLine(fmt.Sprintf("copy venv: %v: %s", err, out)))
	}
	bare := []string{filepath.Join(venv, "bin", "python"), "-c"}

	codes := []string{"pass", "import numpy", "import pandas"}
	var list []*contestant
	for _, code := range codes {
		for _, argv := range [][]string{bare, sandbox, allCPUs} {
			list = append(list, &contestant{name: code, argv: append(append([]string{}, argv...), code)})
		}
	}
	if _, err := w.rounds(ctx, list, 1, 0); err != nil { // reads the files into memory
		return nil, err
	}
	times, err := w.rounds(ctx, list, n, 0)
	if err != nil {
		return nil, err
	}
	var rows []PythonRow
	for i, code := range codes {
		row := PythonRow{Name: "python -c '" + code + "'"}
		row.Bare, _ = summarise(times[list[3*i]])
		row.Sandbox, _ = summarise(times[list[3*i+1]])
		row.SandboxAllCPUs, _ = summarise(times[list[3*i+2]])
		rows = append(rows, row)
	}
	return rows, nil
}
