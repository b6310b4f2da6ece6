package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// proc is what we need to know of a process.
type proc struct {
	pid, parent int
	argv        []string
}

// processes lists what runs; kernel threads have no arguments.
func processes() map[int]proc {
	all := map[int]proc{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well formed
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		stat, err1 := os.ReadFile(d + "/stat")
		line, err2 := os.ReadFile(d + "/cmdline")
		_, after, ok := strings.Cut(string(stat), ") ") // a name with ") " in it is nobody we look for
		f := strings.Fields(after)
		if err1 != nil || err2 != nil || !ok || len(f) < 2 {
			continue // it has ended
		}
		parent, _ := strconv.Atoi(f[1])
		all[pid] = proc{pid, parent, strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")}
	}
	return all
}

// sleepers are the commands themselves, known by the time they sleep.
func sleepers(all map[int]proc, marker string) []int {
	var out []int
	for pid, p := range all {
		if len(p.argv) == 2 && filepath.Base(p.argv[0]) == "sleep" && p.argv[1] == marker {
			out = append(out, pid)
		}
	}
	return out
}

// staying gives the processes that descend from the launchers, or are new and
// known helpers of an engine whose launches are not its client's children,
// without the commands.
func staying(before, now map[int]proc, launchers map[int]bool, marker string) []int {
	command := map[int]bool{}
	for _, pid := range sleepers(now, marker) {
		command[pid] = true
	}
	var out []int
	for pid, p := range now {
		if command[pid] {
			continue
		}
		_, old := before[pid]
		helper := filepath.Base(p.argv[0])
		mine := !old && (helper == "conmon" || strings.HasPrefix(helper, "containerd-shim"))
		for up, hops := pid, 0; up > 1 && hops < 64; up, hops = now[up].parent, hops+1 {
			mine = mine || launchers[up]
		}
		if mine {
			out = append(out, pid)
		}
	}
	return out
}

func pssKB(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, fmt.Errorf("read memory: %w", err)
	}
	return parsePSS(string(b))
}

func parsePSS(rollup string) (float64, error) {
	for _, line := range strings.Split(rollup, "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
			return strconv.ParseFloat(f[1], 64)
		}
	}
	return 0, errors.New("read memory: no Pss")
}

// resident starts n sleepers by each contestant that isolates, and weighs what
// else runs then.
func (w *workshop) resident(ctx context.Context, list []*contestant, n int) []ResidentRow {
	rows := []ResidentRow{}
	for i, c := range list {
		if c.name == "fork+exec" || c.name == "chroot" {
			continue // nothing stays
		}
		row := ResidentRow{Name: c.name, Sandboxes: n}
		pss, count, seen, err := w.weigh(ctx, c, n, fmt.Sprintf("1000.%d%02d", os.Getpid(), i))
		if err != nil {
			row.Failed = oneLine(err.Error())
		} else {
			pss, count = pss/float64(n), count/float64(n)
			row.PssKB, row.Processes, row.Observed = &pss, &count, seen
		}
		rows = append(rows, row)
	}
	return rows
}

// weigh gives the sum over all sandboxes.
func (w *workshop) weigh(ctx context.Context, c *contestant, n int, marker string) (pss, count float64, seen *Observed, err error) {
	argv, err := c.command("/bin/sleep", marker)
	if err != nil {
		return 0, 0, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	before := processes()
	launchers := map[int]bool{}
	var cmds []*exec.Cmd
	defer func() { err = errors.Join(err, end(cmds, marker, len(cmds))) }()
	for i := range n {
		cmd := w.start(ctx, c, strings.ReplaceAll(strings.Join(argv, "\x1f"), "{}", fmt.Sprintf("sleeper-%d-%d", os.Getpid(), i)))
		if err := cmd.Start(); err != nil {
			return 0, 0, nil, fmt.Errorf("start sleeper: %w", err)
		}
		cmds = append(cmds, cmd)
		launchers[cmd.Process.Pid] = true
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		if len(sleepers(processes(), marker)) == n {
			break
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return 0, 0, nil, fmt.Errorf("start sleepers: %d of %d run", len(sleepers(processes(), marker)), n)
		}
		time.Sleep(20 * time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // launchers that only wait for their own last steps
	if seen, err = observe(sleepers(processes(), marker)[0]); err != nil {
		return 0, 0, nil, err
	}
	for _, pid := range staying(before, processes(), launchers, marker) {
		kb, err := pssKB(pid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // ended meanwhile, or a zombie
		}
		if err != nil {
			return 0, 0, nil, err
		}
		pss, count = pss+kb, count+1
	}
	return pss, count, seen, nil
}

// observe looks at a running command from the host: what a contestant lacks is
// not a matter of belief.
func observe(pid int) (*Observed, error) {
	o := &Observed{Namespaces: []string{}}
	for _, ns := range []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("look at command: %w", err)
		}
		if ours != theirs {
			o.Namespaces = append(o.Namespaces, ns)
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, fmt.Errorf("look at command: %w", err)
	}
	o.status(string(b))
	return o, nil
}

func (o *Observed) status(text string) {
	for _, line := range strings.Split(text, "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "Uid:":
			o.HostRoot = f[1] == "0"
		case "Seccomp:":
			o.Filter = f[1] == "2"
		case "NoNewPrivs:":
			o.NoNewPrivs = f[1] == "1"
		case "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:":
			o.Capabilities = o.Capabilities || strings.Trim(f[1], "0") != ""
		}
	}
}

// end ends the commands, by their ids, and waits for their launchers to tidy up.
func end(cmds []*exec.Cmd, marker string, n int) error {
	done := make(chan struct{})
	go func() {
		for _, c := range cmds {
			_ = c.Wait() // the command was killed: never a success
		}
		close(done)
	}()
	for range 150 {
		for _, pid := range sleepers(processes(), marker) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		select {
		case <-done:
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
	for _, c := range cmds {
		killGroup(c)
	}
	<-done
	return fmt.Errorf("end sleepers: launchers of %d did not end by themselves", n)
}
