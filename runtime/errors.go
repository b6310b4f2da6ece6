package runtime

import (
	"errors"
	"strconv"
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
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

func quote(s string) string { return strconv.Quote(s) }
