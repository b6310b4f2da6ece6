// Package ask is how sbxrun has sbxrun-oci do what is too heavy to initialise
// at every launch: unpacking images, D-Bus. (The engine has a
// protocol of its own, in runtime/engine.)
//
// The request is one JSON object on a pipe that stays open as long as the
// answer is wanted: its end, by Close or by the asker's death, whatever that
// was, makes sbxrun-oci stop and clean up. So it is never killed, and in no
// process group that a terminal signals. It answers in lines of JSON.
package ask

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/sbxrun/sbxrun/runtime/engine"
)

// The descriptors of sbxrun-oci.
const (
	RequestFD = 3 + iota
	ReplyFD
)

// The words on sbxrun-oci's command line, and what is asked with them.
const (
	AddBaseVerb = "base-add"
	ScopeVerb   = "scope" // systemd.ScopeRequest
)

// AddBase asks for a base. Paths are any bytes, which JSON's strings are not.
type AddBase struct {
	Root   []byte `json:"root"` // of the store
	Name   []byte `json:"name"`
	Source []byte `json:"source"`
}

// Reply is one line of an answer.
type Reply struct {
	Progress string `json:"progress,omitempty"` // base-add
	Digest   string `json:"digest,omitempty"`   // base-add: the end
	Cgroup   string `json:"cgroup,omitempty"`   // scope: it is there; its path below the mount point
	Stop     bool   `json:"stop,omitempty"`     // scope: systemd wants it stopped
	Error    string `json:"error,omitempty"`    // the end
	Hint     string `json:"hint,omitempty"`
}

// Error is one of sbxrun-oci's, in its own words.
type Error struct{ msg, hint string }

func (e *Error) Error() string { return e.msg }

// Hint says what to do.
func (e *Error) Hint() string { return e.hint }

// Call is a question that is being answered.
type Call struct {
	path    string
	cmd     *exec.Cmd
	request *os.File
	reply   *os.File
	replies *json.Decoder
}

// Start asks.
func Start(verb string, request any) (*Call, error) {
	path, err := engine.FindOCI()
	if err != nil {
		return nil, &Error{err.Error(), "make install puts both binaries into one directory"}
	}
	b, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	reqR, reqW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	defer reqR.Close()
	repR, repW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make pipe: %w", err), reqW.Close())
	}
	defer repW.Close()
	c := &Call{path: path, cmd: exec.Command(path, verb), request: reqW, reply: repR, replies: json.NewDecoder(repR)}
	c.cmd.Stderr = os.Stderr // a panic's
	c.cmd.ExtraFiles = []*os.File{reqR, repW}
	c.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %q: %w", path, err), reqW.Close(), repR.Close())
	}
	if _, err := reqW.Write(append(b, '\n')); err != nil { // it died: Next says so
		c.Stop()
	}
	return c, nil
}

// Next gives the next line of the answer.
func (c *Call) Next() (r Reply, err error) {
	if err := c.replies.Decode(&r); err != nil {
		return r, fmt.Errorf("%q gave no answer: %w", c.path, errors.Join(err, c.Close()))
	}
	if r.Error != "" {
		return r, &Error{r.Error, r.Hint}
	}
	return r, nil
}

// Stop says that no answer is wanted any more. What comes still can be read.
func (c *Call) Stop() { c.request.Close() }

// Close stops and waits for the end of sbxrun-oci. It may be called twice.
func (c *Call) Close() error {
	c.Stop()
	c.reply.Close()
	if c.cmd.ProcessState != nil {
		return nil
	}
	return c.cmd.Wait()
}
