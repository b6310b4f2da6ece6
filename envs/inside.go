package envs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/sbxrun/sbxrun/internal/ask"
)

// insideBinary is where sbxrun-env is shown in a job.
const insideBinary = "/mnt/sbxrun-env"

// inside has sbxrun-env do a verb as the job's command, in its sandbox: what
// parses and unpacks what nobody trusts runs there. dir is the host's side of
// the job's /opt: the request is left there. result (nil: none) is filled from
// the answer; an error is the verb's own, with its hint.
func (m *Manager) inside(ctx context.Context, j Job, dir, verb string, request, result any) error {
	helper, err := m.helper()
	if err != nil {
		return fail("make install puts all binaries into one directory", "%s: %v", j.Name, err)
	}
	b, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("%s: encode request: %w", j.Name, err)
	}
	name := "request-" + verb + ".json"
	if err := handOver(dir, name, b); err != nil {
		return fmt.Errorf("%s: %w", j.Name, err)
	}
	j.Binds = append(j.Binds[:len(j.Binds):len(j.Binds)], JobBind{Source: helper, Target: insideBinary, ReadOnly: true})
	j.Argv, j.Stdin = []string{insideBinary, "inside", verb}, filepath.Join(dir, name)
	var out tail // 64 KiB: more than that is left in a file
	j.Stdout, j.Stderr = &out, &out
	res, err := m.runner.Run(ctx, j)
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", j.Name, ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", j.Name, err)
	}
	var r ask.Reply
	line := bytes.TrimSpace(out.b)
	line = line[bytes.LastIndexByte(line, '\n')+1:]
	switch {
	case res.Reason != "" && res.Reason != "exit":
		return fail("", "%s: %s", j.Name, res.Message)
	case json.Unmarshal(line, &r) != nil:
		return explain(j.Name, verb, res, string(out.b))
	case r.Error != "" && len(res.Denied) > 0:
		return fail("--index-host NAME, if you trust what refers to it", "%s: %s (refused: %s)", j.Name, r.Error, strings.Join(res.Denied, ", "))
	case r.Error != "":
		return fail(r.Hint, "%s: %s", j.Name, r.Error)
	case res.ExitCode != 0:
		return fail("", "%s: %s ended with %d", j.Name, verb, res.ExitCode)
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(r.Result, result); err != nil {
		return fmt.Errorf("%s: decode answer of %s: %w", j.Name, verb, err)
	}
	return nil
}

// handOver writes a file for a job below a folder that earlier jobs could write to,
// which are dead by now: what they left in its place is removed, not followed.
func handOver(dir, name string, data []byte) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}
