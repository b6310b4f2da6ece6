package runtime

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Error is a failure of sbxrun itself: operation, object, cause, and a hint
// where the cause is known. It prints as `op "object": cause`.
type Error struct {
	Op     string // "mount overlay on"
	Object string // "/run/…"; "" is none
	Stage  string // the phase for the report: plan, lock, cgroup, mount, net, launch, exec
	Err    error
	Hint   string // what the user can do; "" is unknown
	Code   int    // exit code of run; 0 is 125
}

// Error implements error.
func (e *Error) Error() string {
	s := e.Op
	if e.Object != "" {
		s += " " + quote(e.Object)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// HintOf returns the first hint in err's tree, "" when there is none. Leaves
// that never import this package carry hints by a Hint() string method.
func HintOf(err error) string {
	var e *Error
	if errors.As(err, &e) && e.Hint != "" {
		return e.Hint
	}
	if hint := hinted.Of(err); hint != "" {
		return hint
	}
	return causeHint(err)
}

// causeHint is for errors that carry no hint: what the cause alone tells.
func causeHint(err error) string {
	for _, c := range []struct {
		errno unix.Errno
		hint  string
	}{
		{unix.ENOSYS, "Linux 5.19 is needed, and no seccomp filter around sbxrun that refuses the call: sbxrun doctor"},
		{unix.EINVAL, "this kernel may lack something: sbxrun doctor"},
		{unix.EOPNOTSUPP, "this kernel may lack something: sbxrun doctor"},
		{unix.EMFILE, "too many open files: raise the limit (ulimit -n)"},
		{unix.ENFILE, "too many open files on this host"},
		{unix.ENOSPC, "no space left there: free some, or choose another --root or --state"},
		{unix.EDQUOT, "the quota there is used up"},
		{unix.EROFS, "it is read-only: choose another --root or --state"},
		{unix.ENOMEM, "the host is short of memory"},
		{unix.EAGAIN, "too many processes: raise the limit (ulimit -u, pids.max)"},
	} {
		if errors.Is(err, c.errno) {
			return c.hint
		}
	}
	return ""
}

func quote(s string) string { return strconv.Quote(s) }
