// sbxrun-oci carries what sbxrun must not initialise at every launch: the
// libcontainer engine, the unpacking of images, D-Bus. It is started by sbxrun, with a request on descriptor 3, and is no program for people.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/ask/answer"
	"github.com/sbxrun/sbxrun/runtime/engine"
	"github.com/sbxrun/sbxrun/runtime/engine/libcontainer"
)

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init()
	}
}

func main() {
	if len(os.Args) == 2 && asked[os.Args[1]] != nil {
		os.Exit(answer.Serve(asked[os.Args[1]]))
	}
	if len(os.Args) != 2 || os.Args[1] != "launch" {
		fmt.Fprintln(os.Stderr, "sbxrun-oci: started by sbxrun, not by hand (see sbxrun --help)")
		os.Exit(125)
	}
	var r engine.Reply
	pid, err := launch()
	r.Pid = pid
	code := 0
	if err != nil {
		r.Error, code = err.Error(), 125
	}
	if err := json.NewEncoder(os.NewFile(engine.OCIReplyFD, "reply")).Encode(r); err != nil {
		code = 125
	}
	os.Exit(code)
}

func launch() (int, error) {
	unix.Umask(0o022) // what is made inside is for the sandbox's user, whatever the caller keeps from others
	for fd := engine.OCILaunchFD; fd <= engine.OCINetNSFD; fd++ {
		unix.CloseOnExec(fd) // libcontainer passes on what it is told to, nothing else
	}
	b, err := io.ReadAll(os.NewFile(engine.OCILaunchFD, "launch"))
	if err != nil {
		return 0, fmt.Errorf("read launch: %w", err)
	}
	var l engine.Launch
	if err := json.Unmarshal(b, &l); err != nil {
		return 0, fmt.Errorf("decode launch: %w", err)
	}
	var passed []*os.File
	for i := range l.Passed {
		unix.CloseOnExec(engine.OCIPassedFD + i)
		passed = append(passed, os.NewFile(uintptr(engine.OCIPassedFD+i), "passed"))
	}
	return libcontainer.Start(&l, engine.Files{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Init:     os.NewFile(engine.OCIInitFD, "init"),
		Status:   os.NewFile(engine.OCIStatusFD, "status"),
		Lifeline: os.NewFile(engine.OCILifelineFD, "lifeline"),
		Console:  os.NewFile(engine.OCIConsoleFD, "console"),
		NetNS:    os.NewFile(engine.OCINetNSFD, "netns"),
		Passed:   passed,
	}, os.NewFile(engine.OCIRecordFD, "record"))
}
