// Package ask is how sbxrun has another of its binaries do what is too heavy to
// initialise at every launch: sbxrun-oci (unpacking images, D-Bus) and sbxrun-env
// (recipes, conda, registries, signatures). The engine and networks have
// protocols of their own.
//
// The request is one JSON object on a pipe that stays open as long as the
// answer is wanted: its end, by Close or by the asker's death, whatever that
// was, makes the other stop and clean up. So it is never killed, and in no
// process group that a terminal signals. It answers in lines of JSON. Package
// internal/ask/answer is the other side.
package ask

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// The descriptors of the one that is asked.
const (
	RequestFD = 3 + iota
	ReplyFD
)

// Reply is one line of an answer. What fields mean beyond these is the verb's.
type Reply struct {
	Progress string          `json:"progress,omitempty"`
	Digest   string          `json:"digest,omitempty"`
	Cgroup   string          `json:"cgroup,omitempty"` // scope: it is there; its path below the mount point
	Stop     bool            `json:"stop,omitempty"`   // scope: systemd wants it stopped
	Result   json.RawMessage `json:"result,omitempty"` // the end
	Error    string          `json:"error,omitempty"`  // the end
	Hint     string          `json:"hint,omitempty"`
}

// Error is the other's, in its own words.
type Error struct{ msg, hint string }

// NewError makes one of a message and a hint ("" is none).
func NewError(msg, hint string) *Error { return &Error{msg, hint} }

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

// Start asks the program at path. What it prints goes to stdout (nil is
// nowhere); env is added to its environment, which is PATH alone.
func Start(path, verb string, request any, stdout *os.File, env ...string) (*Call, error) {
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
	if stdout != nil {
		c.cmd.Stdout = stdout
	}
	c.cmd.Stderr = os.Stderr // a panic's
	c.cmd.ExtraFiles = []*os.File{reqR, repW}
	c.cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...)
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

// Close stops and waits for the end of the one that was asked. It may be called twice.
func (c *Call) Close() error {
	c.Stop()
	c.reply.Close()
	if c.cmd.ProcessState != nil {
		return nil
	}
	return c.cmd.Wait()
}
