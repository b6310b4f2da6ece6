package conda

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/syntax"
)

// shellState is what scripts have set so far.
type shellState struct{ vars map[string]shellVar }

type shellVar struct {
	value    string
	exported bool
}

// pathMark stands for the PATH that is not known here. No script can write it: NUL
// ends a string for a shell.
const pathMark = "\x00PATH\x00"

func (s *shellState) setPath(front []string) {
	s.vars["PATH"] = shellVar{strings.Join(append(front, pathMark), ":"), true}
}

// path gives what stands before the unknown PATH; run sees to the form.
func (s *shellState) path() []string {
	front, _ := strings.CutSuffix(s.vars["PATH"].value, ":"+pathMark)
	return strings.Split(front, ":")
}

// shell interprets one script. It knows what can be followed without running
// anything; all else makes it give up.
type shell struct {
	shellState
	root   *os.Root
	prefix string
	steps  int
	work   int // bytes that expansions went over
	status int
	err    error // what was not understood
}

// Bounds of loops, and of what is done in them.
const (
	maxSteps = 10_000
	maxWork  = 32 << 20
)

// run gives the state after a script, or why the script was not understood.
func (s shellState) run(text string, root *os.Root, prefix string) (shellState, error) {
	f, err := syntax.NewParser(syntax.Variant(syntax.LangBash)).Parse(strings.NewReader(text), "")
	if err != nil {
		return s, fmt.Errorf("not understood: %s", shown(err.Error()))
	}
	sh := &shell{shellState: shellState{maps.Clone(s.vars)}, root: root, prefix: prefix}
	sh.stmts(f.Stmts)
	if p := sh.vars["PATH"].value; sh.err == nil && (!strings.HasSuffix(p, ":"+pathMark) || strings.Count(p, pathMark) != 1 || !sh.vars["PATH"].exported) {
		sh.err = errors.New("it does more to PATH than to put folders before it")
	}
	for name, v := range sh.vars {
		if sh.err == nil && name != "PATH" && strings.Contains(v.value, pathMark) {
			sh.err = fmt.Errorf("%s depends on PATH", name)
		}
	}
	if sh.err != nil {
		return s, sh.err
	}
	return sh.shellState, nil
}

func (s *shell) stop(n syntax.Node, what string) {
	if s.err == nil {
		s.err = fmt.Errorf("line %d: %s", n.Pos().Line(), what)
	}
}

func (s *shell) stmts(list []*syntax.Stmt) {
	for _, st := range list {
		if s.err != nil {
			return
		}
		s.stmt(st)
	}
}

func (s *shell) stmt(st *syntax.Stmt) {
	if s.steps++; s.steps > maxSteps {
		s.stop(st, "it takes too many steps")
		return
	}
	if st.Background || st.Coprocess || len(st.Redirs) > 0 {
		s.stop(st, "a redirection or a job")
		return
	}
	switch c := st.Cmd.(type) {
	case *syntax.CallExpr:
		s.call(c)
	case *syntax.DeclClause:
		s.export(c)
	case *syntax.IfClause:
		s.ifClause(c)
	case *syntax.TestClause:
		s.setStatus(s.test(c.X))
	case *syntax.Block:
		s.stmts(c.Stmts)
	case *syntax.BinaryCmd:
		s.stmt(c.X)
		switch {
		case c.Op == syntax.AndStmt && s.status == 0, c.Op == syntax.OrStmt && s.status != 0:
			s.stmt(c.Y)
		case c.Op != syntax.AndStmt && c.Op != syntax.OrStmt:
			s.stop(c, "a pipe")
		}
	case *syntax.WhileClause:
		s.while(c)
	case *syntax.ForClause:
		s.forClause(c)
	default:
		s.stop(st, "what only a shell can do")
	}
	if st.Negated {
		s.setStatus(s.status != 0)
	}
}

func (s *shell) setStatus(ok bool) {
	s.status = 1
	if ok {
		s.status = 0
	}
}

func (s *shell) ifClause(c *syntax.IfClause) {
	for ; c != nil && s.err == nil; c = c.Else {
		if len(c.Cond) > 0 {
			s.stmts(c.Cond)
			if s.err != nil {
				return
			}
			if s.status != 0 {
				s.status = 0
				continue
			}
		}
		s.status = 0
		s.stmts(c.Then)
		return
	}
}

func (s *shell) while(c *syntax.WhileClause) {
	for s.err == nil {
		s.steps++ // [[ ]] alone would turn for ever
		s.stmts(c.Cond)
		if s.err != nil || (s.status == 0) == c.Until {
			break
		}
		s.stmts(c.Do)
	}
	s.status = 0
}

func (s *shell) forClause(c *syntax.ForClause) {
	w, ok := c.Loop.(*syntax.WordIter)
	if !ok || !w.InPos.IsValid() || c.Select {
		s.stop(c, "a loop over what is not written there")
		return
	}
	for _, item := range s.fields(w.Items) {
		if s.err != nil {
			return
		}
		s.set(c, w.Name.Value, item, false)
		s.stmts(c.Do)
	}
}

func (s *shell) call(c *syntax.CallExpr) {
	if len(c.Args) == 0 {
		for _, a := range c.Assigns {
			if set := s.assignment(a, false); s.err == nil {
				set()
			}
		}
		s.status = 0
		return
	}
	if len(c.Assigns) > 0 {
		s.stop(c, "a command")
		return
	}
	args := s.fields(c.Args)
	if s.err != nil || len(args) == 0 {
		return
	}
	switch name, args := args[0], args[1:]; name {
	case ":", "true", "echo": // what is printed changes nothing
		s.status = 0
	case "false":
		s.status = 1
	case "test":
		s.setStatus(s.condition(c, args))
	case "[":
		if len(args) == 0 || args[len(args)-1] != "]" {
			s.stop(c, "[ without ]")
			return
		}
		s.setStatus(s.condition(c, args[:len(args)-1]))
	case "unset":
		for _, v := range args {
			if !variableName.MatchString(v) {
				s.stop(c, "unset of what is no variable")
				return
			}
			s.known(c, v)
			delete(s.vars, v)
		}
		s.status = 0
	default:
		s.stop(c, "the command "+shown(name))
	}
}

func (s *shell) export(c *syntax.DeclClause) {
	if c.Variant.Value != "export" {
		s.stop(c, c.Variant.Value)
		return
	}
	// All is expanded before anything is set: export A=1 B=$A has the old A.
	var set []func()
	for _, a := range c.Args {
		if a.Name != nil {
			set = append(set, s.assignment(a, true))
			continue
		}
		// export "NAME=value"
		name, value, ok := strings.Cut(s.literal(a.Value), "=")
		switch {
		case s.err != nil:
		case !variableName.MatchString(name):
			s.stop(c, "an option of export")
		case ok:
			set = append(set, func() { s.set(c, name, value, true) })
		default:
			set = append(set, func() { s.mark(c, name) })
		}
	}
	for _, do := range set {
		if s.err == nil {
			do()
		}
	}
	s.status = 0
}

// mark is export NAME.
func (s *shell) mark(n syntax.Node, name string) {
	s.known(n, name)
	v, ok := s.vars[name]
	if !ok {
		s.stop(n, "it exports "+name+" before it is set")
		return
	}
	s.vars[name] = shellVar{v.value, true}
}

// assignment expands a value and gives what sets it.
func (s *shell) assignment(a *syntax.Assign, export bool) func() {
	if a.Array != nil || a.Index != nil {
		s.stop(a, "an array")
		return func() {}
	}
	name := a.Name.Value
	if a.Naked {
		return func() { s.mark(a, name) }
	}
	value := s.literal(a.Value)
	return func() {
		if a.Append {
			s.known(a, name)
			value = s.vars[name].value + value
		}
		s.set(a, name, value, export)
	}
}

func (s *shell) set(n syntax.Node, name, value string, export bool) {
	switch {
	case s.err != nil:
	case !variableName.MatchString(name) || name == "OPTIND" || name == "BASH_ENV":
		s.stop(n, "it sets "+shown(name))
	case name == "IFS" && strings.Trim(value, " \t\n") != "":
		s.stop(n, "it splits words at other characters than white space")
	case len(value) > maxValueBytes:
		s.stop(n, fmt.Sprintf("%s has over %d bytes", name, maxValueBytes))
	default:
		s.vars[name] = shellVar{value, export || s.vars[name].exported}
	}
}

// foreign variables are set by who runs the environment, not by any activation.
var foreign = []string{"HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "TMPDIR", "TERM", "HOSTNAME", "LANG", "UID", "EUID", "PPID", "RANDOM", "LINENO", "SECONDS", "BASH", "BASHOPTS", "SHELLOPTS", "HOSTTYPE", "MACHTYPE", "OSTYPE", "FUNCNAME", "DIRSTACK", "PIPESTATUS", "OPTIND", "OPTARG", "EPOCHSECONDS", "EPOCHREALTIME", "SRANDOM", "ZSH_NAME", "COMP_WORDBREAKS", "GROUPS", "SHLVL", "PS1", "PS4"}

func (s *shell) known(n syntax.Node, name string) {
	if _, set := s.vars[name]; !set && (slices.Contains(foreign, name) || strings.HasPrefix(name, "BASH_")) {
		s.stop(n, "it depends on "+name)
	}
}

// plain stops at words with parts whose value is not to be had here: commands,
// arithmetic, arrays, files' names, braces (which multiply).
func (s *shell) plain(w *syntax.Word) {
	const (
		bare = iota
		inQuotes
		inPattern // after # and %: matched with the value, not with files
	)
	var parts func(list []syntax.WordPart, how int)
	parts = func(list []syntax.WordPart, how int) {
		for _, p := range list {
			switch p := p.(type) {
			case *syntax.Lit:
				switch {
				case how == inQuotes:
				case strings.Contains(p.Value, `\`):
					s.stop(p, "an escape outside of quotes") // expand keeps it in assignments
				case how == bare && strings.ContainsAny(p.Value, "{}*?[]~") && p.Value != "[" && p.Value != "]":
					s.stop(p, "a pattern")
				}
			case *syntax.SglQuoted:
				if p.Dollar {
					s.stop(p, "a quote with $")
				}
			case *syntax.DblQuoted:
				if p.Dollar {
					s.stop(p, "a quote with $")
				}
				parts(p.Parts, inQuotes)
			case *syntax.ParamExp:
				s.parameter(p)
				switch {
				case p.Exp == nil || p.Exp.Word == nil || s.err != nil:
				case matches(p.Exp.Op):
					parts(p.Exp.Word.Parts, inPattern)
					s.noPattern(p.Exp.Word)
				default:
					parts(p.Exp.Word.Parts, how)
				}
			default:
				s.stop(p, "the output of a command or a calculation")
			}
		}
	}
	parts(w.Parts, bare)
}

// noPattern stops at a pattern's quoted and expanded parts that have characters of
// patterns: expand does not tell the two apart.
func (s *shell) noPattern(w *syntax.Word) {
	for _, p := range w.Parts {
		if _, ok := p.(*syntax.Lit); ok || s.err != nil {
			continue
		}
		v, err := expand.Literal(s.config(), &syntax.Word{Parts: []syntax.WordPart{p}})
		if err != nil || strings.ContainsAny(v, `*?[\`) {
			s.stop(p, "a pattern that comes of a variable or is quoted")
		}
	}
}

func (s *shell) parameter(p *syntax.ParamExp) {
	if p.Param == nil || p.Flags != nil || p.Excl || p.Length || p.Width || p.IsSet || p.NestedParam != nil || p.Index != nil || len(p.Modifiers) > 0 || p.Slice != nil || p.Repl != nil || p.Names != 0 {
		s.stop(p, "an expansion")
		return
	}
	if !variableName.MatchString(p.Param.Value) {
		s.stop(p, "it depends on $"+shown(p.Param.Value))
		return
	}
	s.known(p, p.Param.Value)
	n := len(s.vars[p.Param.Value].value) + 16
	s.work += n
	if p.Exp != nil {
		switch {
		case matches(p.Exp.Op): // a pattern is tried at each byte
			s.work += n * n
		case p.Exp.Op != syntax.AlternateUnset && p.Exp.Op != syntax.AlternateUnsetOrNull && p.Exp.Op != syntax.DefaultUnset && p.Exp.Op != syntax.DefaultUnsetOrNull:
			s.stop(p, "an expansion")
		}
	}
	if s.work > maxWork {
		s.stop(p, "it takes too many steps")
	}
}

// matches says that an operator's word is a pattern for the value.
func matches(op syntax.ParExpOperator) bool {
	return op == syntax.RemSmallPrefix || op == syntax.RemLargePrefix || op == syntax.RemSmallSuffix || op == syntax.RemLargeSuffix
}

// Get and Each are expand's view of the variables.
func (s *shell) Get(name string) expand.Variable {
	v, ok := s.vars[name]
	if !ok {
		return expand.Variable{}
	}
	return expand.Variable{Set: true, Exported: v.exported, Kind: expand.String, Str: v.value}
}

// Each is not needed by any expansion that plain lets through.
func (s *shell) Each(func(string, expand.Variable) bool) {}

func (s *shell) config() *expand.Config {
	return &expand.Config{Env: s, ReadDir2: func(string) ([]fs.DirEntry, error) {
		if s.err == nil {
			s.err = errors.New("a pattern comes of a variable")
		}
		return nil, s.err
	}}
}

func (s *shell) literal(w *syntax.Word) string {
	if w == nil {
		return ""
	}
	if s.plain(w); s.err != nil {
		return ""
	}
	out, err := expand.Literal(s.config(), w)
	if err != nil {
		s.stop(w, shown(err.Error()))
	}
	return out
}

func (s *shell) fields(words []*syntax.Word) []string {
	for _, w := range words {
		if s.plain(w); s.err != nil {
			return nil
		}
	}
	out, err := expand.Fields(s.config(), words...)
	if err != nil && s.err == nil {
		s.err = errors.New(shown(err.Error()))
	}
	return out
}

// condition is test's.
func (s *shell) condition(n syntax.Node, a []string) bool {
	if len(a) > 1 && a[0] == "!" {
		return !s.condition(n, a[1:])
	}
	switch {
	case len(a) == 0:
		return false
	case len(a) == 1:
		return a[0] != ""
	case len(a) == 2:
		return s.unary(n, a[0], a[1])
	case len(a) == 3 && (a[1] == "=" || a[1] == "==" || a[1] == "!="):
		return s.equal(n, a[0], a[2]) == (a[1] != "!=")
	}
	s.stop(n, "a condition")
	return false
}

func (s *shell) equal(n syntax.Node, a, b string) bool {
	if strings.Contains(a+b, pathMark) {
		s.stop(n, "it depends on PATH")
	}
	return a == b
}

func (s *shell) unary(n syntax.Node, op, v string) bool {
	switch op {
	case "-n":
		return v != ""
	case "-z":
		return v == ""
	case "-d", "-e", "-f", "-x", "-r":
		rel, ok := strings.CutPrefix(path.Clean(v)+"/", s.prefix+"/")
		if !ok || strings.Contains(v, "..") {
			s.stop(n, "it depends on files outside of the prefix")
			return false
		}
		st, err := s.root.Stat(path.Clean("./" + rel))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return false
		case err != nil:
			s.stop(n, "it depends on a file that cannot be looked at")
			return false
		}
		switch op {
		case "-d":
			return st.IsDir()
		case "-f":
			return st.Mode().IsRegular()
		case "-x":
			return st.Mode()&0o111 != 0
		}
		return true
	}
	s.stop(n, "a condition")
	return false
}

// test is [[ ]]'s condition.
func (s *shell) test(x syntax.TestExpr) bool {
	if s.err != nil {
		return false
	}
	switch x := x.(type) {
	case *syntax.ParenTest:
		return s.test(x.X)
	case *syntax.Word:
		return s.literal(x) != ""
	case *syntax.UnaryTest:
		if x.Op == syntax.TsNot {
			return !s.test(x.X)
		}
		w, ok := x.X.(*syntax.Word)
		if !ok {
			break
		}
		op := map[syntax.UnTestOperator]string{syntax.TsNempStr: "-n", syntax.TsEmpStr: "-z", syntax.TsDirect: "-d", syntax.TsExists: "-e", syntax.TsRegFile: "-f", syntax.TsExec: "-x", syntax.TsRead: "-r"}[x.Op]
		return s.unary(x, op, s.literal(w))
	case *syntax.BinaryTest:
		switch x.Op {
		case syntax.AndTest:
			return s.test(x.X) && s.test(x.Y)
		case syntax.OrTest:
			return s.test(x.X) || s.test(x.Y)
		case syntax.TsMatch, syntax.TsMatchShort, syntax.TsNoMatch:
			a, ok := x.X.(*syntax.Word)
			b, ok2 := x.Y.(*syntax.Word)
			if !ok || !ok2 {
				break
			}
			left, right := s.literal(a), s.literal(b)
			if strings.ContainsAny(right, "*?[\\") {
				s.stop(x, "a pattern")
			}
			return s.equal(x, left, right) == (x.Op != syntax.TsNoMatch)
		default:
		}
	}
	s.stop(x, "a condition")
	return false
}
