package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/runtime"
)

// Services run beside a job, each in a sandbox of its own, and share the job's
// network namespace: the job reaches them at localhost and by their names.

// serviceTable is one [services.NAME] of a settings file.
type serviceTable struct {
	name    string
	file    tomlFile
	prefix  string
	table   map[string]any // of flags alone
	ready   readiness
	timeout time.Duration // to be ready in
}

// readiness is how one sees that a service is ready; the zero value is that it
// was started.
type readiness struct {
	port    int      // it listens
	text    string   // its output has this
	command []string // this, in a sandbox like the service's, ends with 0
}

const (
	defaultReadyTimeout = time.Minute
	serviceLogBytes     = 64 << 10
	maxServices         = 32
)

// notForServices are flags that only a job has, and why.
var notForServices = map[string]string{
	"network": "it is the job's", "allow": "it is the job's", "deny": "it is the job's", "publish": "it is the job's", "expose-unix": "it is the job's", "host-port": "it is the job's",
	"dns": "it is the job's", "net-rate": "it is the job's", "net-bytes": "it is the job's", "net-conns": "it is the job's", "net-log": "it is the job's", "mtu": "it is the job's",
	"report": "a service is in the job's report", "json-status-fd": "a service is in the job's report",
	"tty": "a service has no terminal", "interactive": "a service has no standard input",
	"preserve-fds": "descriptors are the job's", "sdnotify": "the service manager's unit is the job", "requirements": "bake it first: sbxrun env build, then with",
}

// takeServices takes the tables of services out of a settings table.
func takeServices(file *tomlFile, table map[string]any, prefix string) ([]serviceTable, error) {
	v, ok := table["services"]
	if !ok {
		return nil, nil
	}
	delete(table, "services")
	all, ok := v.(map[string]any)
	if !ok {
		return nil, usage("[services.postgres]", "%s: key %q: not a table of services", file.at("services"), prefix+"services")
	}
	if len(all) > maxServices {
		return nil, usage("", "%s: %d services: at most %d can run beside a job", file.at("services"), len(all), maxServices)
	}
	var out []serviceTable
	for name, v := range all {
		at, key := file.at(name), prefix+"services."+name
		t, ok := v.(map[string]any)
		if !ok {
			return nil, usage("[services."+name+"]", "%s: key %q: not a table", at, key)
		}
		if !hostLabel(name) {
			return nil, usage("a service's name is a host name: a-z, 0-9 and -", "%s: key %q: not a name", at, key)
		}
		s := serviceTable{name: name, file: *file, prefix: key + ".", table: t, timeout: defaultReadyTimeout}
		for k := range t {
			if why, no := notForServices[strings.ReplaceAll(k, "_", "-")]; no {
				return nil, usage(why, "%s: key %q: not for a service", file.at(k), s.prefix+k)
			}
		}
		if v, ok := t["ready"]; ok {
			var err error
			if s.ready, err = parseReadiness(v); err != nil {
				return nil, usage(`ready = 5432, ready = "log:some text", or ready = ["pg_isready", "-h", "127.0.0.1"]`, "%s: key %q: %v", file.at("ready"), s.prefix+"ready", err)
			}
			delete(t, "ready")
		}
		for _, k := range []string{"ready_timeout", "ready-timeout"} {
			if v, ok := t[k]; ok {
				if err := (durationValue{&s.timeout}).Set(fmt.Sprint(v)); err != nil || s.timeout <= 0 {
					return nil, usage("as 30s or 2m", "%s: key %q: not a duration", file.at(k), s.prefix+k)
				}
				delete(t, k)
			}
		}
		out = append(out, s)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out, nil
}

func hostLabel(s string) bool {
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-' && s != "localhost"
}

func parseReadiness(v any) (r readiness, err error) {
	switch v := v.(type) {
	case int64:
		r.port = int(v)
	case string:
		if text, ok := strings.CutPrefix(v, "log:"); ok {
			r.text = text
			break
		}
		r.port, err = strconv.Atoi(strings.TrimPrefix(v, "tcp:"))
	case []any:
		if r.command, err = asStrings(v); err == nil && len(r.command) == 0 {
			err = errors.New("an empty command")
		}
		return r, err
	default:
		err = errors.New("neither a port, nor log:TEXT, nor a command")
	}
	if err != nil || r.text == "" && (r.port < 1 || r.port > 65535) {
		return r, errors.New("neither a port, nor log:TEXT, nor a command")
	}
	return r, nil
}

// jobService is a service that is being run.
type jobService struct {
	serviceTable
	plan  *runtime.Plan
	log   *tail
	took  time.Duration // until it was ready
	began chan struct{} // its command runs
	ended chan struct{}
	res   *runtime.Result
	err   error
}

// jobServices are the services of one job.
type jobServices struct {
	all    []*jobService
	sigs   *signals
	ui     *ui
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// newJobServices plans all services, so that bad input is refused before
// anything runs.
func newJobServices(sigs *signals, c *command, o *runOptions) (*jobServices, error) {
	js := &jobServices{sigs: sigs, ui: c.ui}
	for _, t := range o.services {
		sc := newCommand(c.ui, c.verb)
		sc.dirs = c.dirs
		so := sc.opts.(*runOptions)
		if err := t.file.apply(&sc.flags, t.table, t.prefix); err != nil {
			return nil, err
		}
		if len(so.command) == 0 {
			return nil, usage(`command = ["redis-server"]`, "%s: %scommand is missing", t.file.at(t.name), t.prefix)
		}
		if so.hostname == "" {
			so.hostname = t.name
		}
		if so.project == "" {
			so.project = "none"
		}
		plan, _, err := so.prepare(sigs, sc, nil, nil, false)
		if err != nil {
			return nil, fmt.Errorf("service %s: %w", t.name, err)
		}
		plan.Aliases, plan.PassFDs, plan.ListenFDs = o.aliases(), 0, 0 // sockets of the service manager's are the job's
		plan.Env = slices.DeleteFunc(plan.Env, func(kv runtime.Bytes) bool { return strings.HasPrefix(string(kv), "LISTEN_") })
		js.all = append(js.all, &jobService{serviceTable: t, plan: plan, log: &tail{}, began: make(chan struct{}), ended: make(chan struct{})})
	}
	return js, nil
}

func (o *runOptions) aliases() (names []string) {
	for _, s := range o.services {
		names = append(names, s.name)
	}
	return names
}

// Start implements runtime.Beside: it starts all in the job's namespace and waits
// until each is ready.
func (js *jobServices) Start(ns *os.File, ready *netns.Ready) error {
	ctx, cancel := context.WithCancel(context.Background())
	js.cancel = cancel
	path := fmt.Sprintf("ns:/proc/%d/fd/%d", os.Getpid(), ns.Fd())
	for _, s := range js.all {
		s.plan.Network = path
		js.wg.Add(1)
		go func() {
			defer js.wg.Done()
			defer close(s.ended)
			s.res, s.err = runInto(ctx, s.plan, s.log, runtime.IO{Joined: ready, Started: func() { close(s.began) }})
		}()
	}
	return js.sigs.during(func(sctx context.Context) error {
		errs := make([]error, len(js.all))
		var wg sync.WaitGroup
		for i, s := range js.all {
			wg.Add(1)
			go func() {
				defer wg.Done()
				start := time.Now()
				errs[i] = s.await(sctx, ns, ready)
				if errs[i] == nil {
					s.took = time.Since(start)
					js.ui.Phase("service "+s.name, "is ready")
				}
			}()
		}
		wg.Wait()
		return errors.Join(errs...)
	})
}

// await waits until the service is ready.
func (s *jobService) await(ctx context.Context, ns *os.File, ready *netns.Ready) error {
	limit := time.NewTimer(s.timeout)
	defer limit.Stop()
	check, cancel := context.WithTimeout(ctx, s.timeout) // a check may hang
	defer cancel()
	go func() {
		select {
		case <-s.ended:
			cancel()
		case <-check.Done():
		}
	}()
	fail := func(why string) error {
		return &runtime.Error{Op: "start service", Object: s.name, Stage: "services", Err: errors.New(why), Hint: s.log.hint()}
	}
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		ok, err := s.isReady(check, ns, ready)
		if err != nil {
			return fail(err.Error())
		}
		if ok {
			return nil
		}
		select {
		case <-s.ended:
			if ok, err := s.isReady(check, ns, ready); ok && err == nil { // it was, for a moment
				return nil
			}
			why := "it ended before it was ready"
			switch {
			case s.err != nil:
				why += ": " + s.err.Error()
			case s.res != nil:
				why += " (" + string(s.res.Reason) + ", exit code " + strconv.Itoa(s.res.ExitCode) + ")"
			}
			return fail(why)
		case <-limit.C:
			return fail(fmt.Sprintf("not ready after %s", s.timeout))
		case <-ctx.Done():
			return fmt.Errorf("start service %s: %w", s.name, ctx.Err())
		case <-time.After(pause):
		}
	}
}

func (s *jobService) isReady(ctx context.Context, ns *os.File, joined *netns.Ready) (bool, error) {
	r := s.ready
	switch {
	case r.port != 0:
		return accepts(ns, r.port)
	case r.text != "":
		return s.log.saw(r.text), nil
	case len(r.command) > 0:
		plan := *s.plan
		plan.Name, plan.Argv = "", nil
		for _, a := range r.command {
			plan.Argv = append(plan.Argv, runtime.Bytes(a))
		}
		res, err := runInto(ctx, &plan, nil, runtime.IO{Joined: joined})
		if err != nil && res != nil && res.ExitCode >= 126 { // it will not be found later either
			return false, fmt.Errorf("its check cannot be run: %w", err)
		}
		return err == nil && res.Status == runtime.StatusOK, nil
	}
	select {
	case <-s.began:
		return true, nil
	default:
		return false, nil
	}
}

// accepts says whether anything accepts connections at a port of the
// namespace, by IPv4 or IPv6.
func accepts(ns *os.File, port int) (ok bool, err error) {
	fd, err := unix.FcntlInt(ns.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	n := netns.FromFile(os.NewFile(uintptr(fd), "netns"))
	defer n.Close()
	err = n.Do(func() error {
		for family, to := range map[int]unix.Sockaddr{
			unix.AF_INET:  &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}},
			unix.AF_INET6: &unix.SockaddrInet6{Port: port, Addr: [16]byte{15: 1}},
		} {
			s, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				continue // a host without IPv6
			}
			// On lo it is answered at once, unless the server's backlog is full.
			_ = unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 200_000})
			ok = ok || unix.Connect(s, to) == nil
			unix.Close(s)
		}
		return nil
	})
	return ok, err
}

// Stop implements runtime.Beside.
func (js *jobServices) Stop() {
	if js.cancel != nil {
		js.cancel()
		js.wg.Wait()
	}
}

// report gives what is reported of services that were stopped.
func (js *jobServices) report() (out []runtime.ResultService) {
	if js.cancel == nil { // never started
		return nil
	}
	for _, s := range js.all {
		r := runtime.ResultService{Name: s.name, Log: s.log.String(), ReadyMS: float64(s.took.Microseconds()) / 1000}
		if s.res != nil {
			r.ID, r.Status, r.Reason, r.ExitCode, r.Message = s.res.ID, s.res.Status, s.res.Reason, s.res.ExitCode, s.res.Message
		}
		if s.err != nil {
			r.Message = s.err.Error()
		}
		if r.Status != runtime.StatusCanceled && r.Status != runtime.StatusOK {
			js.ui.note("service %s: %s (exit code %d)", s.name, strings.TrimSpace(string(r.Status)+" "+r.Message), r.ExitCode)
		}
		out = append(out, r)
	}
	return out
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	b    []byte
	cut  bool
	want string
	seen bool
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.look()
	if over := len(t.b) - serviceLogBytes; over > 0 {
		t.b, t.cut = slices.Clone(t.b[over:]), true
	}
	return len(p), nil
}

func (t *tail) look() {
	t.seen = t.seen || t.want != "" && bytes.Contains(t.b, []byte(t.want))
}

// saw says whether text was written, ever since it was asked for the first time.
func (t *tail) saw(text string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.want = text
	t.look()
	return t.seen
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cut {
		return "…" + string(t.b)
	}
	return string(t.b)
}

// hint gives the last lines.
func (t *tail) hint() string {
	lines := strings.Split(strings.TrimSpace(t.String()), "\n")
	lines = lines[max(0, len(lines)-3):]
	if len(lines) == 1 && lines[0] == "" {
		return "it wrote nothing"
	}
	return "it wrote: " + printable(strings.Join(lines, " | "))
}
