package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// flagSet reads flags as docker and podman do (POSIX with long names). It is
// ours because it is built at every launch: a flag costs one element of a
// slice, and a library would bring package net along.
type flagSet struct {
	all  []option
	rest []string // after Parse: the arguments
	// passes says that flags end at the first argument.
	passes bool
}

// option is one flag. A value that is its type's zero has no default to show.
type option struct {
	name, short string
	usage       string // `x` in it names the value
	value       value
	changed     bool
	given       []string // what it was set to, as it was written
	hidden      bool
}

type value interface {
	String() string // "" is the zero value
	Set(s string) error
	Type() string
}

type (
	stringValue string
	boolValue   bool
	intValue    int
	int64Value  int64
	listValue   []string // given several times
)

func (v *stringValue) String() string     { return string(*v) }
func (v *stringValue) Set(s string) error { *v = stringValue(s); return nil }
func (v *stringValue) Type() string       { return "string" }

func (v *boolValue) String() string { return "" } // none is preset
func (v *boolValue) Type() string   { return "bool" }
func (v *boolValue) Set(s string) error {
	b, err := strconv.ParseBool(s)
	*v = boolValue(b)
	return err
}

func (v *intValue) String() string { return number(int64(*v)) }
func (v *intValue) Type() string   { return "int" }
func (v *intValue) Set(s string) error {
	n, err := strconv.ParseInt(s, 0, strconv.IntSize)
	*v = intValue(n)
	return err
}

func (v *int64Value) String() string { return number(int64(*v)) }
func (v *int64Value) Type() string   { return "int" }
func (v *int64Value) Set(s string) error {
	n, err := strconv.ParseInt(s, 0, 64)
	*v = int64Value(n)
	return err
}

func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func (v *listValue) String() string     { return "" } // none is preset
func (v *listValue) Set(s string) error { *v = append(*v, s); return nil }
func (v *listValue) Type() string       { return "stringArray" }

func (f *flagSet) Var(v value, name, usage string) { f.VarP(v, name, "", usage) }

func (f *flagSet) VarP(v value, name, short, usage string) {
	f.all = append(f.all, option{name: name, short: short, usage: usage, value: v})
}

func (f *flagSet) StringVar(p *string, name, preset, usage string) {
	f.StringVarP(p, name, "", preset, usage)
}

func (f *flagSet) StringVarP(p *string, name, short, preset, usage string) {
	*p = preset
	f.VarP((*stringValue)(p), name, short, usage)
}

func (f *flagSet) BoolVar(p *bool, name, usage string) { f.BoolVarP(p, name, "", usage) }

func (f *flagSet) BoolVarP(p *bool, name, short, usage string) {
	f.VarP((*boolValue)(p), name, short, usage)
}

func (f *flagSet) IntVar(p *int, name string, preset int, usage string) {
	*p = preset
	f.Var((*intValue)(p), name, usage)
}

func (f *flagSet) Int64Var(p *int64, name, usage string) { f.Var((*int64Value)(p), name, usage) }

func (f *flagSet) ListVar(p *[]string, name, usage string) { f.ListVarP(p, name, "", usage) }

func (f *flagSet) ListVarP(p *[]string, name, short, usage string) {
	f.VarP((*listValue)(p), name, short, usage)
}

// Lookup gives the flag of that long name, nil when there is none.
func (f *flagSet) Lookup(name string) *option {
	for i := range f.all {
		if f.all[i].name == name {
			return &f.all[i]
		}
	}
	return nil
}

// Changed says whether the flag was given.
func (f *flagSet) Changed(name string) bool {
	o := f.Lookup(name)
	return o != nil && o.changed
}

// Sorted gives the flags that help shows, by name.
func (f *flagSet) Sorted() []option {
	out := slices.DeleteFunc(slices.Clone(f.all), func(o option) bool { return o.hidden })
	slices.SortFunc(out, func(a, b option) int { return strings.Compare(a.name, b.name) })
	return out
}

var errHelp = errors.New("help requested")

// unknownFlag is a flag that is not there; name is "" for a short one.
type unknownFlag struct{ name, text string }

func (e *unknownFlag) Error() string { return "unknown flag " + e.text }

func (o *option) set(s string) error {
	if err := o.value.Set(s); err != nil {
		name := "--" + o.name
		if o.short != "" {
			name = "-" + o.short + ", " + name
		}
		return fmt.Errorf("invalid value %q for %q flag: %w", s, name, err)
	}
	o.changed, o.given = true, append(o.given, s)
	return nil
}

// Parse reads arguments up to the first error.
func (f *flagSet) Parse(args []string) (err error) {
	for len(args) > 0 {
		s := args[0]
		if len(s) < 2 || s[0] != '-' {
			if f.passes {
				break
			}
			f.rest = append(f.rest, s)
			args = args[1:]
			continue
		}
		args = args[1:]
		if s == "--" {
			break
		}
		if s[1] == '-' {
			args, err = f.long(s, args)
		} else {
			args, err = f.shorts(s, args)
		}
		if err != nil {
			return err
		}
	}
	f.rest = append(f.rest, args...)
	return nil
}

// long reads --name, --name=value and --name value.
func (f *flagSet) long(s string, args []string) ([]string, error) {
	name, v, has := strings.Cut(s[2:], "=")
	if name == "" || name[0] == '-' {
		return args, fmt.Errorf("bad flag syntax: %s", s)
	}
	o := f.Lookup(name)
	if o == nil {
		if name == "help" {
			return args, errHelp
		}
		return args, &unknownFlag{name, "--" + name}
	}
	if _, isBool := o.value.(*boolValue); isBool && !has {
		v, has = "true", true
	}
	if !has {
		if len(args) == 0 {
			return args, fmt.Errorf("flag needs an argument: --%s", name)
		}
		v, args = args[0], args[1:]
	}
	return args, o.set(v)
}

// shorts reads -b, -bc, -nvalue, -n=value and -n value.
func (f *flagSet) shorts(s string, args []string) ([]string, error) {
	for s = s[1:]; s != ""; {
		i := slices.IndexFunc(f.all, func(o option) bool { return o.short != "" && o.short[0] == s[0] })
		if i < 0 {
			if s[0] == 'h' {
				return args, errHelp
			}
			return args, &unknownFlag{"", fmt.Sprintf("%q in -%s", rune(s[0]), s)}
		}
		_, isBool := f.all[i].value.(*boolValue)
		v := s[1:]
		switch {
		case len(v) > 1 && v[0] == '=':
			v, s = v[1:], ""
		case isBool:
			v, s = "true", v
		case v != "":
			s = ""
		case len(args) > 0:
			v, args, s = args[0], args[1:], ""
		default:
			return args, fmt.Errorf("flag needs an argument: %q in -%s", rune(s[0]), s)
		}
		if err := f.all[i].set(v); err != nil {
			return args, err
		}
	}
	return args, nil
}

// Usages is the help of all flags, wrapped to cols columns.
func (f *flagSet) Usages(cols int) string {
	type line struct{ left, right string }
	var lines []line
	const widest = 30 // a longer flag has a line of its own
	width := 0
	for _, o := range f.Sorted() {
		l := line{left: "      --" + o.name, right: o.usage}
		if o.short != "" {
			l.left = "  -" + o.short + ", --" + o.name
		}
		what := strings.TrimSuffix(o.value.Type(), "Array")
		if before, rest, ok := strings.Cut(o.usage, "`"); ok {
			if name, after, ok := strings.Cut(rest, "`"); ok {
				what, l.right = name, before+name+after
			}
		}
		switch v := o.value.(type) {
		case *boolValue:
		case *stringValue:
			l.left += " " + what
			if *v != "" {
				l.right += fmt.Sprintf(" (default %q)", string(*v))
			}
		default:
			l.left += " " + what
			if s := v.String(); s != "" {
				l.right += " (default " + s + ")"
			}
		}
		if len(l.left) <= widest {
			width = max(width, len(l.left))
		}
		lines = append(lines, l)
	}
	var b strings.Builder
	indent := width + 2
	for _, l := range lines {
		gap := strings.Repeat(" ", max(indent-len(l.left), 0))
		if len(l.left) > widest { // its text begins on the next line
			gap = "\n" + strings.Repeat(" ", indent)
		}
		b.WriteString(l.left + gap + wrap(l.right, indent, cols) + "\n")
	}
	return b.String()
}

// wrap breaks s at spaces so that it ends before column cols when each line
// begins at column indent. The last line may be a little longer, so that no
// short word stands alone.
func wrap(s string, indent, cols int) string {
	const slop = 5
	room := cols - indent - slop
	var lines []string
	for len(s) >= room+slop {
		i := strings.LastIndexByte(s[:room], ' ')
		if i <= 0 {
			if i = strings.IndexByte(s, ' '); i <= 0 {
				break
			}
		}
		lines = append(lines, s[:i])
		s = s[i+1:]
	}
	return strings.Join(append(lines, s), "\n"+strings.Repeat(" ", indent))
}
