// Package hinted gives an error the line that says what to do about it.
package hinted

import "errors"

type hinted struct {
	err  error
	hint string
}

func (e *hinted) Error() string { return e.err.Error() }
func (e *hinted) Unwrap() error { return e.err }
func (e *hinted) Hint() string  { return e.hint }

// New returns err, whose text and chain stay as they are, with a Hint() string
// method that returns hint: commands print it below the error. An empty hint
// prints nothing. err must not be nil.
func New(err error, hint string) error { return &hinted{err, hint} }

// Of gives the first hint in err's tree, "" is none.
func Of(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}
