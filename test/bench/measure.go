package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// sample is one launch.
type sample struct {
	wallUS, cpuUS float64
	ok            bool // exit status 0
}

// timed runs the timer over the contestants and gives its lines.
func (w *workshop) timed(ctx context.Context, list []*contestant, limit time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var in, out, errs bytes.Buffer
	for _, c := range list {
		hide := c.hide
		if hide == "" {
			hide = "-"
		}
		fmt.Fprintln(&in, strings.Join(append([]string{hide}, c.argv...), "\x1f"))
	}
	cmd := exec.CommandContext(ctx, w.timer, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		killGroup(cmd) // a contestant that hangs
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", fmt.Errorf("time launches: %w: %s", err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// killGroup kills what is left of a command's process group, if it began.
func killGroup(cmd *exec.Cmd) {
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // nothing may be left
	}
}

// rounds launches each contestant n times, in turn, gapMS apart.
func (w *workshop) rounds(ctx context.Context, list []*contestant, n, gapMS int) (map[*contestant][]sample, error) {
	limit := time.Minute + time.Duration(n*len(list))*(time.Second+time.Duration(gapMS)*time.Millisecond)
	out, err := w.timed(ctx, list, limit, "rounds", fmt.Sprint(n), fmt.Sprint(gapMS))
	if err != nil {
		return nil, err
	}
	return parseRounds(out, list)
}

func parseRounds(out string, list []*contestant) (map[*contestant][]sample, error) {
	all := map[*contestant][]sample{}
	for sc := bufio.NewScanner(strings.NewReader(out)); sc.Scan(); {
		var i, status int
		var wallNS, cpuUS int64
		if _, err := fmt.Sscan(sc.Text(), &i, &wallNS, &cpuUS, &status); err != nil || i < 0 || i >= len(list) {
			return nil, fmt.Errorf("read timer's line %q: not of %d contestants", sc.Text(), len(list))
		}
		all[list[i]] = append(all[list[i]], sample{float64(wallNS) / 1000, float64(cpuUS), status == 0})
	}
	return all, nil
}

// rate launches each contestant alone, parallel at a time.
func (w *workshop) rate(ctx context.Context, list []*contestant, ms, parallel int) ([]RateRow, error) {
	limit := time.Minute + time.Duration(len(list))*(20*time.Second+time.Duration(ms)*time.Millisecond)
	out, err := w.timed(ctx, list, limit, "rate", fmt.Sprint(ms), fmt.Sprint(parallel))
	if err != nil {
		return nil, err
	}
	var rows []RateRow
	for sc := bufio.NewScanner(strings.NewReader(out)); sc.Scan(); {
		var i, launches, failures int
		var ns float64
		if _, err := fmt.Sscan(sc.Text(), &i, &launches, &ns, &failures); err != nil || i < 0 || i >= len(list) || ns <= 0 {
			return nil, fmt.Errorf("read timer's line %q: not of %d contestants", sc.Text(), len(list))
		}
		rows = append(rows, RateRow{Name: list[i].name, Parallel: parallel, PerSecond: float64(launches-failures) / (ns / 1e9), Failures: failures})
	}
	return rows, nil
}
