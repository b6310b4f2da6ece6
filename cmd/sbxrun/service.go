package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
	asking "github.com/sbxrun/sbxrun/internal/ask"
	"github.com/sbxrun/sbxrun/runtime"
	"github.com/sbxrun/sbxrun/runtime/systemd"
)

// serviceOptions are what a service manager hands down, and how it is told.
type serviceOptions struct {
	sdnotify             string
	preserveFDs          int64
	secrets, credentials []string
	cgroupManager        string

	// listen is how many sockets systemd passed, names what it calls them.
	listen int
	names  string
}

func (o *serviceOptions) declare(f *flagSet) {
	f.StringVar(&o.cgroupManager, "cgroup-manager", "auto", "cgroupfs, or systemd: a scope in sbxrun.slice or the slice that --cgroup-parent names; auto is cgroupfs")
	f.StringVar(&o.sdnotify, "sdnotify", "conmon", "`who` tells the service manager (NOTIFY_SOCKET) that it is ready: conmon is sbxrun, once the command runs; container the command itself; ignore nobody")
	f.Int64Var(&o.preserveFDs, "preserve-fds", "pass `n` descriptors on, from 3 up, after those of LISTEN_FDS (which always are)")
	f.ListVar(&o.secrets, "secret", "`secret` to show in /run/secrets, as source=FILE[,target=NAME][,mode=0400], or NAME of a credential of systemd's instead of source")
	f.ListVar(&o.credentials, "credential", "`name` of a credential of systemd's (LoadCredential=) to show in /run/credentials")
}

// fill puts them into a Spec.
func (o *serviceOptions) fill(s *runtime.Spec) (err error) {
	bad := func(flag, hint string, err error) error { return usage(hint, "--%s: %v", flag, err) }
	s.CgroupManager = o.cgroupManager
	if o.listen, o.names, err = systemd.Listened(); err != nil {
		return usage("systemd sets it; unset it when it is not meant for sbxrun", "%v", err)
	}
	if o.preserveFDs < 0 || o.preserveFDs > systemd.MaxFDs-int64(o.listen) {
		return bad("preserve-fds", "", fmt.Errorf("%d: not 0 to %d descriptors", o.preserveFDs, systemd.MaxFDs-o.listen))
	}
	s.PassFDs, s.ListenFDs, s.ListenNames = o.listen+int(o.preserveFDs), o.listen, o.names
	switch o.sdnotify {
	case systemd.NotifyConmon, systemd.NotifyIgnore:
	case systemd.NotifyContainer:
		s.Notify = os.Getenv("NOTIFY_SOCKET") != ""
		if v := os.Getenv("WATCHDOG_USEC"); s.Notify && v != "" { // without WATCHDOG_PID it is for whoever reads it
			s.Env = append([]string{"WATCHDOG_USEC=" + v}, s.Env...)
		}
	default:
		return bad("sdnotify", "conmon, container or ignore", fmt.Errorf("%q: unknown", o.sdnotify))
	}
	for _, v := range o.secrets {
		x, err := parseSecret(v)
		if err != nil {
			return bad("secret", "sbxrun run --help tells the form", err)
		}
		s.Secrets = append(s.Secrets, x)
	}
	for _, v := range o.credentials {
		x := runtime.Secret{Dir: runtime.CredentialsDir, Name: v}
		if x.Source, err = credential(v); err != nil {
			return bad("credential", "LoadCredential= in the unit loads one", err)
		}
		s.Secrets = append(s.Secrets, x)
	}
	return nil
}

// parseSecret reads podman's form: a name or source=FILE, then options. Without
// source the name is that of a credential.
func parseSecret(s string) (runtime.Secret, error) {
	x := runtime.Secret{Dir: runtime.SecretsDir}
	var err error
	for i, part := range strings.Split(s, ",") {
		k, v, has := strings.Cut(part, "=")
		switch {
		case i == 0 && !has:
			x.Name = k
			x.Source, err = credential(k)
		case (k == "source" || k == "src") && v != "" && x.Source == "":
			x.Source, err = filepath.Abs(v)
		case k == "target" && v != "":
			x.Name = v
		case k == "mode":
			x.Mode, err = parseMode(v)
		case k == "type" && v == "mount", k == "type" && v == "file":
		case k == "type":
			err = fmt.Errorf("type=%s: a secret is shown as a file only", v)
		case k == "uid" || k == "gid":
			err = fmt.Errorf("%s: a secret is the sandbox's user's", k)
		default:
			err = fmt.Errorf("unknown option %q", part)
		}
		if err != nil {
			return x, fmt.Errorf("%q: %w", s, err)
		}
	}
	if x.Source == "" {
		return x, fmt.Errorf("%q has no source", s)
	}
	if x.Name == "" {
		x.Name = filepath.Base(x.Source)
	}
	return x, nil
}

// credential gives the file of a credential that systemd loaded.
func credential(name string) (string, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", fmt.Errorf("%q: there is no CREDENTIALS_DIRECTORY", name)
	}
	if name == "" || name == "." || name == ".." || strings.Contains(name, "/") {
		return "", fmt.Errorf("%q: not the name of a credential", name)
	}
	return filepath.Join(dir, name), nil
}

// open takes the descriptors and finds the service manager.
func (o *serviceOptions) open(io *runtime.IO, statusFD int) error {
	n := o.listen + int(o.preserveFDs)
	if statusFD >= systemd.FirstFD && statusFD < systemd.FirstFD+n {
		return usage("give it a number above those that are passed", "--json-status-fd %d: the command would have it too", statusFD)
	}
	var err error
	if io.Passed, err = systemd.Take(n); err != nil {
		return usage(runtime.HintOf(err), "pass %v", err)
	}
	if io.Service, err = systemd.Find(o.sdnotify); err != nil {
		return usage(runtime.HintOf(err), "%v", err)
	}
	io.Scope = askScope
	return nil
}

// journal tells the journal how it ended, with fields to search for. false is
// that standard error does not lead there, or that it cannot be told.
func journal(res *runtime.Result) bool {
	if !systemd.Journaled(2) {
		return false
	}
	var priority string
	switch res.Status {
	case runtime.StatusSetupFailed:
		priority = "3" // error
	case runtime.StatusFailed, runtime.StatusKilled:
		priority = "4" // warning
	case runtime.StatusOK, runtime.StatusCanceled:
		priority = "6" // info
	}
	return systemd.Journal(
		systemd.Field{Name: "MESSAGE", Value: printable(res.End())}, systemd.Field{Name: "PRIORITY", Value: priority},
		systemd.Field{Name: "SYSLOG_IDENTIFIER", Value: "sbxrun"}, systemd.Field{Name: "SBXRUN_ID", Value: res.ID},
		systemd.Field{Name: "SBXRUN_HINT", Value: printable(res.Hint)}, systemd.Field{Name: "SBXRUN_NAME", Value: res.Name}, systemd.Field{Name: "SBXRUN_STATUS", Value: string(res.Status)},
		systemd.Field{Name: "SBXRUN_REASON", Value: string(res.Reason)}, systemd.Field{Name: "SBXRUN_EXIT_CODE", Value: strconv.Itoa(res.ExitCode)},
	) == nil
}

// scope is a scope that sbxrun-oci holds for us.
type scope struct {
	call   *asking.Call
	cgroup string
	stop   chan struct{}
	done   chan struct{}
}

// askScope has sbxrun-oci make a scope.
func askScope(r systemd.ScopeRequest) (runtime.Scope, error) {
	call, err := ask.Start(ask.ScopeVerb, r)
	if err != nil {
		return nil, err
	}
	reply, err := call.Next()
	if err != nil {
		_ = call.Close()
		return nil, err
	}
	s := &scope{call: call, cgroup: reply.Cgroup, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		if r, err := call.Next(); err == nil && r.Stop {
			close(s.stop)
		}
	}()
	return s, nil
}

func (s *scope) Cgroup() string           { return s.cgroup }
func (s *scope) Stopped() <-chan struct{} { return s.stop }

func (s *scope) Close() error {
	s.call.Stop() // its end is that of the goroutine
	<-s.done
	return s.call.Close()
}
