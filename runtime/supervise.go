package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/cgroup"
	"github.com/sbxrun/sbxrun/runtime/pid1"
)

// outcome is what the supervisor knows when the command has ended.
type outcome struct {
	wait      unix.WaitStatus
	haveWait  bool   // pid 1 reported the command's own end
	killed    Reason // why we killed it, "" is that we did not
	canceled  bool   // a terminating signal was passed on before the end
	lost      bool   // pid 1 went without a word and not by our hand
	oom       bool
	oomOwn    bool // at the sandbox's own limit, as far as is known
	diskFull  bool
	pidsHits  int64
	voluntary int64
	involun   int64
}

// supervise listens until the command's end: to pid 1, to the limits that no
// controller enforces, and to the caller's signals.
func (s *sandbox) supervise(ctx context.Context) error {
	msgs := make(chan pid1.Message)
	gone := make(chan struct{})
	quit := make(chan struct{})
	defer close(quit)
	go func() {
		defer close(gone)
		for {
			m, err := pid1.ReadMessage(s.status)
			if err != nil {
				return
			}
			select {
			case msgs <- m:
			case <-quit:
				return
			}
		}
	}()

	start := time.Now()
	var limit <-chan time.Time
	if l := s.plan.Limits; l.WallTime > 0 {
		limit = time.After(l.WallTime + l.ExtraTime)
	}
	// execve may take its time (a file that someone holds a lease on): then a
	// signal, kept for the command, ends the waiting.
	var late <-chan time.Time
	for started := false; !started; {
		select {
		case m := <-msgs:
			if m.Kind == pid1.Failed {
				return s.execError(m)
			}
			started = true
		case <-limit:
			return s.endUnstarted(StatusKilled, ReasonWallTimeout, 124)
		case <-ctx.Done():
			return s.endUnstarted(StatusCanceled, ReasonCanceled, 137)
		case sig := <-s.signals:
			s.early = append(s.early, sig)
			if late == nil {
				late = time.After(s.plan.StopTimeout)
			}
		case <-late:
			return s.endUnstarted(StatusCanceled, ReasonCanceled, 137)
		case <-gone:
			if s.oomKilled() {
				return &Error{Op: "start", Object: string(s.plan.Argv[0]), Stage: "launch", Err: errors.New("pid 1 was killed for memory"), Hint: "raise --memory"}
			}
			return &Error{Op: "start", Object: string(s.plan.Argv[0]), Stage: "launch", Err: errors.New("pid 1 ended without a word")}
		}
	}
	if s.term != nil { // pid 1 sent the master before it started the command
		if err := s.term.receive(); err != nil {
			return err
		}
	}
	s.res.PhasesMS["launch"] += msSince(start)
	s.status1(map[string]any{"event": "started", "id": s.id, "pid": s.pid})
	s.io.Service.Started("sandbox " + s.id + " runs " + string(s.plan.Argv[0]))

	if s.io.Started != nil {
		s.io.Started()
	}

	o := s.wait(ctx, msgs, gone, limit)

	if s.io.Beside != nil {
		_ = s.reap()
		s.io.Beside.Stop()
	}
	s.net.askStop() // beside the kernel's taking down
	// Everything inside is dead once pid 1 is reaped; only now are the
	// counters final and is it safe to look at what was left.
	_ = s.reap()
	if s.output != nil {
		s.output.drain(s.signals)
	}
	if s.term != nil {
		s.term.drain(s.signals)
	}
	s.measureNetwork()
	s.measure(&o)
	s.judge(&o)
	s.io.Service.Stopping(s.res.End())
	s.status1(map[string]any{"event": "exited", "id": s.id, "exit_code": s.res.ExitCode, "reason": s.res.Reason})
	return nil
}

// endUnstarted ends a sandbox whose command does not come to its start.
func (s *sandbox) endUnstarted(st Status, why Reason, code int) error {
	_ = s.group.Kill()
	_ = s.reap()
	s.res.Status, s.res.Reason, s.res.ExitCode = st, why, code
	s.res.Message = "ended before the command had started"
	return nil
}

// wait runs until pid 1 is gone and says how that came.
func (s *sandbox) wait(ctx context.Context, msgs <-chan pid1.Message, gone <-chan struct{}, wall <-chan time.Time) outcome {
	var o outcome
	l := s.plan.Limits
	kill := func(why Reason) {
		if o.killed == "" && !o.haveWait {
			o.killed = why
		}
		_ = unix.Kill(s.pid, unix.SIGKILL)
		s.group.Thaw()
		// Its end is that of all, but it must be given the CPU to end.
		_ = s.group.Kill()
	}
	timer := func(d time.Duration) <-chan time.Time {
		if d <= 0 {
			return nil
		}
		return time.After(d)
	}
	var cpu <-chan time.Time
	if l.CPUTime > 0 {
		cpu = timer(s.cpuCheckIn(l.CPUTime + l.ExtraTime))
	}
	var over <-chan struct{}
	switch {
	case s.output != nil:
		over = s.output.over
	case s.term != nil && s.term.limit != nil:
		over = s.term.limit.over
	}
	oom := s.group.OOM()
	var grace <-chan time.Time
	done := ctx.Done()
	beat, stopBeat := s.io.Service.Beat()
	defer stopBeat()
	var stopScope <-chan struct{}
	if s.scope != nil {
		stopScope = s.scope.Stopped()
	}
	stop := func() {
		o.canceled = true
		s.io.Service.Stopping("sandbox " + s.id + " was asked to stop")
		_ = unix.Kill(s.pid, unix.Signal(s.plan.StopSignal))
		grace = timer(s.plan.StopTimeout)
	}

	for _, sig := range s.early {
		s.forward(sig, &o, kill)
	}
	for {
		select {
		case m := <-msgs:
			if m.Kind == pid1.Exited {
				o.wait, o.haveWait = m.WaitStatus, true
				o.voluntary, o.involun = m.Voluntary, m.Involuntary
			}
		case <-gone:
			o.lost = !o.haveWait && o.killed == ""
			return o
		case <-wall:
			kill(ReasonWallTimeout)
		case <-cpu:
			if used, err := s.group.CPUTotal(); err == nil && used >= l.CPUTime+l.ExtraTime {
				kill(ReasonCPUTimeout)
			} else {
				cpu = timer(s.cpuCheckIn(l.CPUTime + l.ExtraTime))
			}
		case <-over:
			over = nil
			kill(ReasonOutput)
		case <-oom:
			oom = nil
			// As a group, also where the kernel kills one process only (v1).
			kill(ReasonOOM)
		case <-done:
			done = nil
			stop()
		case <-stopScope:
			stopScope = nil
			stop()
		case <-beat:
			s.io.Service.Alive()
		case <-grace:
			kill(ReasonCanceled)
		case sig := <-s.signals:
			s.forward(sig, &o, kill)
			if sig == unix.SIGTERM && grace == nil { // as the stop of a service; who types INT has a second one
				grace = timer(s.plan.StopTimeout)
			}
		}
	}
}

// forward passes a signal to the command through pid 1. The second
// terminating signal kills.
func (s *sandbox) forward(sig os.Signal, o *outcome, kill func(Reason)) {
	n, ok := sig.(syscall.Signal)
	if !ok {
		return
	}
	switch n {
	case unix.SIGWINCH:
		if s.term != nil {
			s.term.resize()
			return
		}
	case unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP, unix.SIGABRT:
		if o.canceled && (n == unix.SIGINT || n == unix.SIGTERM) {
			kill(ReasonCanceled)
			return
		}
		o.canceled = true
		s.io.Service.Stopping("sandbox " + s.id + " was asked to stop by " + unix.SignalName(n))
	}
	_ = unix.Kill(s.pid, n)
}

// cpuCheckIn says when to look at the CPU time again: no sooner than all CPUs
// together could have used the rest up, but within 10 ms to 1 s.
func (s *sandbox) cpuCheckIn(limit time.Duration) time.Duration {
	used, err := s.group.CPUTotal()
	if err != nil {
		return 10 * time.Millisecond
	}
	cpus := s.plan.Limits.CPUs
	if cpus < 1 {
		cpus = 1
	}
	rest := time.Duration(float64(limit-used) / cpus)
	return min(max(rest, 10*time.Millisecond), time.Second)
}

// execError is the failure to start the command itself: 127 not found, 126 not
// executable, 125 ours.
func (s *sandbox) execError(m pid1.Message) error {
	argv0 := string(s.plan.Argv[0])
	if err := s.begun.Explain(m); err != nil {
		return &Error{Op: "launch with engine", Object: s.plan.Engine, Stage: "launch", Err: err, Hint: HintOf(err), Code: 125}
	}
	e := &Error{Op: m.Stage.String(), Object: argv0, Stage: "exec", Err: m.Errno, Code: 125}
	switch m.Stage {
	case pid1.StageInterpreter:
		e.Code, e.Hint = 126, "the file is there, but the interpreter of its first line (or its loader) is not"
	case pid1.StageExec:
		e.Code = 126
		switch m.Errno {
		case unix.ENOENT, unix.ENOTDIR:
			e.Code, e.Hint = 127, "not found in the sandbox: is it in the base, the environment or a volume?"
		case unix.EACCES:
			e.Hint = "not executable for the sandbox's user"
		case unix.ENOEXEC:
			e.Hint = "not a program for this machine; a script needs a first line such as #!/bin/sh"
		case unix.E2BIG:
			e.Hint = "the kernel takes 128 KiB per argument and about 2 MiB in all"
		case unix.ENOMEM:
			e.Hint = "raise --memory"
		}
	case pid1.StageFork:
		e.Object, e.Hint = "", "pid 1 counts too: --pids-limit must be at least 2"
	case pid1.StageRlimit:
		e.Object, e.Hint = "", "a hard limit cannot be raised from inside; lower --ulimit"
	case pid1.StagePass:
		e.Object, e.Hint = "", "the descriptors that are passed need room: --ulimit nofile"
	default:
		e.Object = ""
	}
	return e
}

func (s *sandbox) oomKilled() bool {
	n := s.group.Events().OOMKills
	return n != nil && *n > 0
}

// measure fills in the numbers. What could not be read stays nil.
func (s *sandbox) measure(o *outcome) {
	r := s.res
	u := s.group.Events()
	if !s.io.NoFigures {
		u = s.group.Usage()
		fillUsage(r, u)
		r.Limits.Limits = s.group.Applied()
	}
	o.oom = u.OOMKills != nil && *u.OOMKills > 0
	o.oomOwn = u.OOMs == nil || *u.OOMs > 0
	if u.PidsMaxHits != nil {
		o.pidsHits = int64(*u.PidsMaxHits)
	}
	if o.haveWait {
		r.CtxVoluntary, r.CtxInvoluntary = &o.voluntary, &o.involun
	}
	if u, err := s.root.Usage(); err == nil {
		r.DiskUsedBytes, r.InodesUsed = &u.UsedBytes, &u.Inodes
		o.diskFull = u.Full
	}
}

func fillUsage(r *Result, u cgroup.Usage) {
	ms := func(us *uint64) *float64 {
		if us == nil {
			return nil
		}
		f := float64(*us) / 1000
		return &f
	}
	n := func(v *uint64) *int64 {
		if v == nil {
			return nil
		}
		i := int64(*v)
		return &i
	}
	r.CPUUserMS, r.CPUSystemMS, r.ThrottledMS = ms(u.CPUUserUS), ms(u.CPUSystemUS), ms(u.ThrottledUS)
	r.MemoryPeakBytes, r.PidsPeak = n(u.MemoryPeakBytes), n(u.PidsPeak)
	r.PidsMaxHits = n(u.PidsMaxHits)
	r.IOReadBytes, r.IOWriteBytes = n(u.IOReadBytes), n(u.IOWriteBytes)
	if u.Pressure != nil {
		r.Pressure = map[string]Pressure{}
		for k, v := range u.Pressure {
			r.Pressure[k] = Pressure{SomeMS: ms(v.SomeUS), FullMS: ms(v.FullUS)}
		}
	}
}

// judge turns what happened into status, reason and exit code. The order is
// that of certainty: what we did, what the kernel did for a limit, what the
// command did.
func (s *sandbox) judge(o *outcome) {
	r := s.res
	l := s.plan.Limits
	r.OOMKilled = o.oom
	end := func(st Status, why Reason, code int, format string, a ...any) {
		r.Status, r.Reason, r.ExitCode, r.Message = st, why, code, fmt.Sprintf(format, a...)
	}
	own := 128 + int(unix.SIGKILL)
	signal := unix.Signal(0)
	if o.haveWait {
		own = o.wait.ExitStatus()
		if o.wait.Signaled() {
			signal = o.wait.Signal()
			own = 128 + int(signal)
		}
	}
	if signal != 0 {
		r.Signal = unix.SignalName(signal)
	} else if !o.haveWait {
		r.Signal = "SIGKILL"
	}
	failed := own != 0

	switch {
	case o.killed == ReasonWallTimeout:
		end(StatusKilled, ReasonWallTimeout, 124, "killed: the time limit of %s is over", l.WallTime)
	case o.killed == ReasonCPUTimeout:
		end(StatusKilled, ReasonCPUTimeout, 124, "killed: the CPU time limit of %s is used up", l.CPUTime)
	case o.killed == ReasonOutput:
		end(StatusKilled, ReasonOutput, 137, "killed: more than %d bytes of output", l.OutputBytes)
	case o.oom && !o.oomOwn && (o.killed == ReasonOOM || signal == unix.SIGKILL || !o.haveWait):
		end(StatusKilled, ReasonOOM, 137, "killed: the host, or a cgroup above, was out of memory; the limit of %s bytes was not met", num(l.MemoryBytes))
		r.Hint = "free memory there, or raise that limit"
	case o.oom && (o.killed == ReasonOOM || signal == unix.SIGKILL || !o.haveWait):
		end(StatusKilled, ReasonOOM, 137, "killed: out of memory at the limit of %s bytes", num(l.MemoryBytes))
		if s.plan.Upper.Kind == "tmpfs" && r.DiskUsedBytes != nil && *r.DiskUsedBytes > l.MemoryBytes/4 {
			r.Message += fmt.Sprintf(", %d of them files of its root", *r.DiskUsedBytes)
			r.Hint = "give more --memory, or a --disk above half of it: that lives on disk"
		} else {
			r.Hint = "give more --memory"
		}
	case o.killed == ReasonCanceled:
		end(StatusCanceled, ReasonCanceled, 137, "canceled: killed after it was asked to stop")
	case o.killed != "":
		end(StatusKilled, o.killed, 137, "killed: %s", o.killed)
	case o.lost:
		end(StatusKilled, ReasonSignal, 137, "pid 1 was killed")
	case o.canceled && signal != 0:
		end(StatusCanceled, ReasonCanceled, own, "canceled: ended by %s", unix.SignalName(signal))
	case signal == unix.SIGSYS:
		end(StatusKilled, ReasonPolicy, own, "killed by the system call filter (SIGSYS)")
	case failed && o.diskFull:
		end(StatusFailed, ReasonDisk, own, "ended with %d while its disk (%d bytes, %d inodes) was full", own, l.DiskBytes, l.Inodes)
		r.Hint = "give more --disk or --inodes"
	case failed && o.pidsHits > 0:
		end(StatusFailed, ReasonPids, own, "ended with %d after the limit of %s processes was hit %d times", own, num(l.Pids), o.pidsHits)
		r.Hint = "give more --pids-limit"
	case signal == unix.SIGXFSZ && l.FileBytes > 0:
		end(StatusFailed, ReasonSignal, own, "ended by SIGXFSZ: a file above the limit of %d bytes", l.FileBytes)
	case signal != 0:
		end(StatusFailed, ReasonSignal, own, "ended by %s", unix.SignalName(signal))
	case failed:
		end(StatusFailed, ReasonExit, own, "")
	default:
		end(StatusOK, ReasonExit, 0, "")
	}
	if o.pidsHits > 0 && r.Reason != ReasonPids {
		r.Message = trimJoin(r.Message, fmt.Sprintf("the limit of %s processes was hit %d times", num(l.Pids), o.pidsHits))
	}
}

func trimJoin(a, b string) string {
	if a == "" {
		return b
	}
	return a + "; " + b
}
