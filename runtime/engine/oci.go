package engine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/pid1"
)

// The descriptors of the second binary. The launch is read to its end before
// anything happens; the reply is one JSON object.
const (
	OCILaunchFD = 3 + iota
	OCIReplyFD
	OCIInitFD
	OCIRecordFD
	OCIStatusFD
	OCILifelineFD
	OCIConsoleFD
	OCINetNSFD
	OCIPassedFD // the first of Launch.Passed
)

// Reply is what the second binary answers.
type Reply struct {
	Pid   int    `json:"pid"`
	Error string `json:"error,omitempty"`
}

// OCI is the client of sbxrun-oci, the binary that carries libcontainer.
type OCI struct {
	// Path of the binary; "" looks beside this executable, then in
	// ../libexec/sbxrun, then on PATH.
	Path string
	// Spawn runs a function on the thread that is in the private mount
	// namespace where the root is attached.
	Spawn func(func() error) error
	files Files
}

// Begin implements [Engine]: the second binary does all at Start.
func (o OCI) Begin(_ *Launch, f Files) (Begun, error) {
	o.files = f
	return &o, nil
}

// UserNS implements [Begun].
func (o *OCI) UserNS() (*os.File, error) { return nil, nil }

// Prepare implements [Begun].
func (o *OCI) Prepare(*Launch) error { return nil }

// Explain implements [Begun].
func (o *OCI) Explain(pid1.Message) error { return nil }

// Abort implements [Begun].
func (o *OCI) Abort() error { return nil }

// FindOCI gives the path of the second binary.
func FindOCI() (string, error) { return Find("sbxrun-oci") }

// Find gives the path of a binary of sbxrun's: beside this one, in
// ../libexec/sbxrun, named by SBXRUN_OCI, SBXRUN_NET or SBXRUN_ENV, or on PATH.
func Find(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		dir := filepath.Dir(self)
		for _, p := range []string{filepath.Join(dir, name), filepath.Join(dir, "../libexec/sbxrun", name)} {
			if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				return p, nil
			}
		}
	}
	if p := os.Getenv(strings.ToUpper(strings.ReplaceAll(name, "-", "_"))); p != "" {
		return p, nil
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find %q: not beside sbxrun and not on PATH", name)
	}
	return p, nil
}

// Start implements [Begun].
func (o *OCI) Start(l *Launch, binds []Mount, r *pid1.Record) (int, error) {
	all := *l
	all.Mounts = append(append([]Mount{}, l.Mounts...), binds...)
	slices.SortStableFunc(all.Mounts, func(a, b Mount) int { return a.Rank() - b.Rank() })
	f, path := o.files, o.Path
	record, err := r.Seal()
	if err != nil {
		return 0, err
	}
	defer record.Close()
	if path == "" {
		var err error
		if path, err = FindOCI(); err != nil {
			return 0, err
		}
	}
	plan, err := json.Marshal(&all)
	if err != nil {
		return 0, fmt.Errorf("encode launch: %w", err)
	}
	planR, planW, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("make pipe: %w", err)
	}
	defer planR.Close()
	replyR, replyW, err := os.Pipe()
	if err != nil {
		planW.Close()
		return 0, fmt.Errorf("make pipe: %w", err)
	}
	defer replyR.Close()

	null, err := os.Open(os.DevNull)
	if err != nil {
		planW.Close()
		replyW.Close()
		return 0, fmt.Errorf("open: %w", err)
	}
	defer null.Close()
	or := func(f *os.File) *os.File {
		if f == nil {
			return null
		}
		return f
	}
	// What libcontainer logs must not land in the command's stderr, and the
	// command's stderr must not be a copy of ours: the engine gets the files.
	cmd := exec.Command(path, "launch")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = or(f.Stdin), or(f.Stdout), or(f.Stderr)
	cmd.ExtraFiles = []*os.File{planR, replyW, f.Init, record, f.Status, f.Lifeline, or(f.Console), or(f.NetNS)}
	cmd.ExtraFiles = append(cmd.ExtraFiles, f.Passed...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	// The thread that spawns lives as long as the sandbox does, so this does
	// not fire early; the lifeline covers what it does not reach.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setsid: true}
	err = o.Spawn(cmd.Start)
	replyW.Close()
	if err != nil {
		planW.Close()
		return 0, fmt.Errorf("start engine %q: %w", path, err)
	}
	_, werr := planW.Write(plan)
	planW.Close()
	var out bytes.Buffer
	_, rerr := io.Copy(&out, io.LimitReader(replyR, 1<<20))
	xerr := cmd.Wait()
	var reply Reply
	if err := json.Unmarshal(out.Bytes(), &reply); err != nil {
		return 0, fmt.Errorf("engine %q gave no answer: %w", path, errors.Join(xerr, werr, rerr))
	}
	if reply.Error != "" {
		return 0, errors.New(strings.TrimSpace(reply.Error))
	}
	return reply.Pid, nil
}
