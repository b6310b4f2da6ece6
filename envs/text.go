package envs

import (
	"bytes"
	"slices"
	"strings"
	"unicode/utf8"
)

// Patterns of requirement lines and of tools' output, by hand: package regexp
// and the tables of package unicode that it uses are initialised at every
// launch, and compiling the expressions cost each run with -r more than that.
// The tests hold them against the expressions that they stand for.

// white is what the formats call white space.
const white = " \t\n\f\r"

func isWhite(c byte) bool { return strings.IndexByte(white, c) >= 0 }

func isAlnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// isNameByte: of a distribution's name.
func isNameByte(c byte) bool { return isAlnum(c) || c == '.' || c == '_' || c == '-' }

// run is the length of the longest prefix of s whose bytes are all in.
func run(s string, in func(byte) bool) int {
	for i := range len(s) {
		if !in(s[i]) {
			return i
		}
	}
	return len(s)
}

// splitRequirement: ^([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*(.*)$, the
// name and what follows it and its extras.
func splitRequirement(line string) (name, rest string, ok bool) {
	n := run(line, isNameByte)
	if n == 0 || !isAlnum(line[0]) {
		return "", "", false
	}
	name, rest = line[:n], strings.TrimLeft(line[n:], white)
	if strings.HasPrefix(rest, "[") {
		if i := strings.IndexByte(rest, ']'); i >= 0 {
			rest = strings.TrimLeft(rest[i+1:], white)
		}
	}
	return name, rest, true
}

// exactPin: ^={2,3}\s*([^\s,;*]+)\s*(;.*)?$, the version; "" is no exact pin.
func exactPin(rest string) string {
	v, ok := strings.CutPrefix(rest, "==")
	if !ok {
		return ""
	}
	v = strings.TrimLeft(strings.TrimPrefix(v, "="), white)
	n := run(v, func(c byte) bool { return !isWhite(c) && c != ',' && c != ';' && c != '*' })
	if after := strings.TrimLeft(v[n:], white); after != "" && after[0] != ';' {
		return ""
	}
	return v[:n]
}

// cutHashes takes \s--hash[= ]([a-z0-9]+:[0-9a-fA-F]+) out of a line.
func cutHashes(line string) (rest string, hashes []string) {
	var b strings.Builder
	for {
		at := strings.Index(line, "--hash")
		if at < 0 {
			return b.String() + line, hashes
		}
		n := 0
		if v := line[at+len("--hash"):]; at > 0 && isWhite(line[at-1]) && v != "" && (v[0] == '=' || v[0] == ' ') {
			n = hashLength(v[1:])
		}
		if n == 0 {
			b.WriteString(line[:at+len("--hash")])
			line = line[at+len("--hash"):]
			continue
		}
		b.WriteString(line[:at-1])
		line = line[at+len("--hash="):]
		hashes = append(hashes, line[:n])
		line = line[n:]
	}
}

// hashLength: ^[a-z0-9]+:[0-9a-fA-F]+
func hashLength(s string) int {
	n := run(s, func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' })
	if n == 0 || n == len(s) || s[n] != ':' {
		return 0
	}
	hex := run(s[n+1:], func(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F' })
	if hex == 0 {
		return 0
	}
	return n + 1 + hex
}

// hasVariable: \$\{[A-Z0-9_]+\}
func hasVariable(s string) bool {
	for {
		_, rest, ok := strings.Cut(s, "${")
		if !ok {
			return false
		}
		n := run(rest, func(c byte) bool { return c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' })
		if n > 0 && strings.HasPrefix(rest[n:], "}") {
			return true
		}
		s = rest
	}
}

// urlsIn: https?://[^\s"'#;]+
func urlsIn(s string) (urls []string) {
	for {
		at := strings.Index(s, "http")
		if at < 0 {
			return urls
		}
		s = s[at:]
		start := len("http://")
		if strings.HasPrefix(s, "https://") {
			start = len("https://")
		} else if !strings.HasPrefix(s, "http://") {
			s = s[len("http"):]
			continue
		}
		n := run(s[start:], func(c byte) bool { return !isWhite(c) && strings.IndexByte(`"'#;`, c) < 0 })
		if n > 0 {
			urls = append(urls, s[:start+n])
		}
		s = s[start+n:]
	}
}

// withoutUserinfo drops user and password from the URLs of index options:
// ^(--[a-z-]*(?:index-url|find-links)[ =]\S*?://)[^/\s]*@ on each line.
func withoutUserinfo(text []byte) []byte {
	var out []byte
	for line := range bytes.Lines(text) {
		out = append(out, dropUserinfo(string(line))...)
	}
	return out
}

func dropUserinfo(line string) string {
	n := run(line, func(c byte) bool { return c >= 'a' && c <= 'z' || c == '-' })
	option := line[:n]
	if !strings.HasPrefix(option, "--") || !strings.HasSuffix(option, "index-url") && !strings.HasSuffix(option, "find-links") ||
		n == len(line) || line[n] != ' ' && line[n] != '=' {
		return line
	}
	end := n + 1 + run(line[n+1:], func(c byte) bool { return !isWhite(c) })
	for at := n + 1; ; {
		i := strings.Index(line[at:end], "://")
		if i < 0 {
			return line
		}
		at += i + len("://")
		host := line[at:end]
		if j := strings.IndexByte(host, '/'); j >= 0 {
			host = host[:j]
		}
		if j := strings.LastIndexByte(host, '@'); j >= 0 {
			return line[:at] + line[at+j+1:]
		}
	}
}

// withoutColours: \x1b\[[0-9;]*m
func withoutColours(s string) string {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(s, "\x1b[")
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		if n := run(rest, func(c byte) bool { return c >= '0' && c <= '9' || c == ';' }); strings.HasPrefix(rest[n:], "m") {
			s = rest[n+1:]
			continue
		}
		b.WriteString("\x1b[")
		s = rest
	}
}

// noPackage: ([A-Za-z0-9._-]+) was not found in the (?:package registry|provided)
func noPackage(flat string) string {
	const said = " was not found in the "
	for at := 0; ; {
		i := strings.Index(flat[at:], said)
		if i < 0 {
			return ""
		}
		name := lastRun(flat[at:at+i], isNameByte)
		at += i + len(said)
		if name != "" && (strings.HasPrefix(flat[at:], "package registry") || strings.HasPrefix(flat[at:], "provided")) {
			return name
		}
	}
}

// lastRun is the longest suffix of s whose bytes are all in.
func lastRun(s string, in func(byte) bool) string {
	i := len(s)
	for i > 0 && in(s[i-1]) {
		i--
	}
	return s[i:]
}

// noVersion: there is no version of [^ ,]|[Oo]nly .{0,80} available|No matching distribution found for \S
func noVersion(flat string) bool {
	for _, c := range []struct{ said, end string }{{"there is no version of ", " ,"}, {"No matching distribution found for ", white}} {
		for _, after := range strings.Split(flat, c.said)[1:] {
			if after != "" && strings.IndexByte(c.end, after[0]) < 0 {
				return true
			}
		}
	}
	for _, said := range []string{"only ", "Only "} {
		for i := strings.Index(flat, said); i >= 0; {
			rest := flat[i+len(said):]
			if j := strings.Index(rest, " available"); j >= 0 && utf8.RuneCountInString(rest[:j]) <= 80 {
				return true
			}
			j := strings.Index(rest, said)
			if j < 0 {
				break
			}
			i += len(said) + j
		}
	}
	return false
}

// hashMismatch: [Hh]ash mismatch for `?([^`\n]+)`?
func hashMismatch(flat string) string {
	i := strings.Index(flat, "ash mismatch for ")
	if i < 1 || flat[i-1] != 'h' && flat[i-1] != 'H' {
		return ""
	}
	what, _, _ := strings.Cut(strings.TrimPrefix(flat[i+len("ash mismatch for "):], "`"), "`")
	return what
}

// sdistOnly gives the distribution that a tool says has no wheel, by the first
// of its ways to say so: NAME==1 has no (usable) wheels; Distribution `NAME`
// can't be installed because it is marked as `--no-build`; `NAME` … building,
// source distribution, marked as `--no-build`.
func sdistOnly(flat string) string {
	low := lowerASCII(flat)
	name, first := "", len(flat)
	take := func(at int, s string) {
		if at < first && s != "" {
			name, first = s, at
		}
	}
	for _, said := range []string{" has no usable wheels", " has no wheels"} {
		if i := strings.Index(low, said); i >= 0 {
			word := flat[strings.LastIndexAny(flat[:i], " `")+1 : i]
			word, _, _ = strings.Cut(word, "==")
			take(i-len(word), lastRun(word, isNameByte))
		}
	}
	if i := strings.Index(low, "distribution "); i >= 0 {
		at := i + len("distribution ")
		what := strings.TrimPrefix(flat[at:], "`")
		n := run(what, func(c byte) bool { return c != ' ' && c != '`' })
		if strings.HasPrefix(strings.TrimPrefix(lowerASCII(what[n:]), "`"), " can't be installed because it is marked as `--no-build`") {
			take(i, what[:n])
		}
	}
	quoted := strings.Split(flat, "`") // odd ones are what is quoted
	at := 0
	for i := 1; i+1 < len(quoted); i++ {
		at += len(quoted[i-1]) + 1
		after := lowerASCII(quoted[i+1])
		marked := strings.HasSuffix(after, "marked as ") && i+3 < len(quoted) && lowerASCII(quoted[i+2]) == "--no-build"
		if quoted[i] != "" && (marked || strings.Contains(after, "source distribution") || strings.Contains(after, "building")) {
			take(at-1, quoted[i])
			break
		}
	}
	return name
}

// lowerASCII keeps every byte's place, as strings.ToLower does not.
func lowerASCII(s string) string {
	b := slices.Clone([]byte(s))
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}
