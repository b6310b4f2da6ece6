package conda

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// maxShebang is what the kernel reads of a first line, the terminator left out.
const maxShebang = 127

var (
	shebangLine = regexp.MustCompile(`^#! *(/(?:\\ |[^ \n\r\t])*)(.*)$`)
	pythonName  = regexp.MustCompile(`^python(?:\d+(?:\.\d+)?)?$`)
)

// replaceText writes data with placeholder replaced by prefix everywhere, as conda
// and rattler do.
func replaceText(w io.Writer, data []byte, placeholder, prefix string) error {
	if bytes.HasPrefix(data, []byte("#!")) {
		end := bytes.IndexByte(data, '\n')
		if end < 0 {
			end = len(data)
		}
		if end < 64<<10 { // else it is no line that anyone executes
			if _, err := io.WriteString(w, replaceShebang(string(data[:end]), placeholder, prefix)); err != nil {
				return err
			}
			data = data[end:]
		}
	}
	old := []byte(placeholder)
	for {
		i := bytes.Index(data, old)
		if i < 0 {
			_, err := w.Write(data)
			return err
		}
		if _, err := w.Write(data[:i]); err != nil {
			return err
		}
		if _, err := io.WriteString(w, prefix); err != nil {
			return err
		}
		data = data[i+len(old):]
	}
}

func replaceShebang(line, placeholder, prefix string) string {
	if strings.Contains(prefix, " ") {
		if !strings.Contains(line, placeholder) {
			return line
		}
		return strings.ReplaceAll(throughEnv(line), placeholder, prefix)
	}
	line = strings.ReplaceAll(line, placeholder, prefix)
	if len(line) <= maxShebang {
		return line
	}
	return throughEnv(line)
}

// throughEnv starts the interpreter of a line that the kernel would cut off by
// other means: python by sh (the rest is a string to python), all others by PATH.
func throughEnv(line string) string {
	m := shebangLine.FindStringSubmatch(line)
	if m == nil {
		return line
	}
	name := m[1][strings.LastIndexByte(m[1], '/')+1:]
	if pythonName.MatchString(name) {
		return "#!/bin/sh\n'''exec' \"" + m[1] + "\"" + m[2] + " \"$0\" \"$@\" #'''"
	}
	return "#!/usr/bin/env " + name + m[2]
}

// replaceBinary writes data with placeholder replaced by prefix in each C string
// that has it; NULs at the end of the string keep its length.
func replaceBinary(w io.Writer, data []byte, placeholder, prefix string) error {
	if len(prefix) > len(placeholder) {
		return fmt.Errorf("the prefix %s is longer than the %d bytes it was built with", prefix, len(placeholder))
	}
	old := []byte(placeholder)
	for {
		i := bytes.Index(data, old)
		if i < 0 {
			_, err := w.Write(data)
			return err
		}
		if _, err := w.Write(data[:i]); err != nil {
			return err
		}
		data = data[i:]
		end := bytes.IndexByte(data, 0)
		if end < 0 {
			end = len(data)
		}
		written := 0
		for s := data[:end]; len(s) > 0; {
			next := bytes.Index(s, old)
			if next < 0 {
				next = len(s)
			}
			if _, err := w.Write(s[:next]); err != nil {
				return err
			}
			written += next
			if s = s[next:]; len(s) > 0 {
				if _, err := io.WriteString(w, prefix); err != nil {
					return err
				}
				written += len(prefix)
				s = s[len(old):]
			}
		}
		if err := zeros(w, end-written); err != nil {
			return err
		}
		data = data[end:]
	}
}

func zeros(w io.Writer, n int) error {
	var z [4096]byte
	for n > 0 {
		k := min(n, len(z))
		if _, err := w.Write(z[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}
