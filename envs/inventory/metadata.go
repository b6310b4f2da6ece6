package inventory

import (
	"strings"
)

// Bounds of what is read of one distribution.
const (
	maxMetadataBytes = 1 << 20  // the headers of METADATA; its description may go on
	maxHeaders       = 20000    // the largest has some 500
	maxValueBytes    = 64 << 10 // of one header; whole licences are put there
)

// header is a line of METADATA with those that continue it.
type header struct{ key, value string }

// parseMetadata reads the headers of a METADATA or PKG-INFO file, up to the
// description. What is no header is left out, as importlib.metadata does.
func parseMetadata(text string) []header {
	var out []header
	for line := range strings.SplitSeq(text, "\n") {
		line = strings.TrimSuffix(line, "\r")
		if line == "" {
			break
		}
		if line[0] == ' ' || line[0] == '\t' {
			if n := len(out); n > 0 && len(out[n-1].value) < maxValueBytes {
				// Licences are folded with "       |" or eight spaces.
				l := strings.TrimLeft(line, " \t")
				out[n-1].value += "\n" + strings.TrimPrefix(l, "|")
			}
			continue
		}
		k, v, ok := strings.Cut(line, ":")
		if !ok || k == "" || strings.ContainsAny(k, " \t") {
			break // a body without an empty line before it
		}
		if len(out) == maxHeaders {
			break
		}
		if v = strings.TrimSpace(v); len(v) > maxValueBytes {
			v = v[:maxValueBytes]
		}
		out = append(out, header{strings.ToLower(k), strings.ToValidUTF8(v, "�")})
	}
	return out
}

// get gives the first value of a header, "" is none.
func get(hs []header, key string) string {
	for _, h := range hs {
		if h.key == key && h.value != "UNKNOWN" {
			return h.value
		}
	}
	return ""
}

func getAll(hs []header, key string) []string {
	var out []string
	for _, h := range hs {
		if h.key == key {
			out = append(out, h.value)
		}
	}
	return out
}
