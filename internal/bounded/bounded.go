// Package bounded reads no more than a limit of what others wrote, and repeats
// no more of it than fits into a line. It must never know what is read.
package bounded

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// ErrTooLarge is what is there beyond the limit.
var ErrTooLarge = errors.New("too large")

type tooLarge int64

func (e tooLarge) Error() string        { return fmt.Sprintf("more than %d bytes", int64(e)) }
func (e tooLarge) Is(target error) bool { return target == ErrTooLarge }

// Read reads all of r. Where that is more than limit bytes the error is
// [ErrTooLarge] and says so.
func Read(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, tooLarge(limit)
	}
	return b, err
}

// File reads all of a file as [Read] does. Errors do not name it: the caller
// says what it is.
func File(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		var named *os.PathError
		if errors.As(err, &named) {
			err = named.Err
		}
		return nil, err
	}
	defer f.Close()
	return Read(f, limit)
}

// Text gives the beginning of a text, for an error.
func Text(s string) string {
	const most = 120 // bytes
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
