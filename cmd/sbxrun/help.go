package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/sbxrun/sbxrun/runtime"
)

func help(u *ui, args []string) int {
	if len(args) == 0 {
		u.out(helpText(nil))
		return 0
	}
	if args[0] == "--markdown" {
		u.out(markdown())
		return 0
	}
	if isGroup(args[0]) && len(args) == 1 {
		u.out(groupHelp(args[0]))
		return 0
	}
	v, _ := find(args)
	if v == nil {
		u.error(unknownVerb(args))
		return 2
	}
	u.out(helpText(v))
	return 0
}

// helpText is the help of a verb, or of all.
func helpText(v *verb) string {
	var b strings.Builder
	if v == nil {
		b.WriteString("sbxrun runs a command in a throw-away sandbox over a baked environment.\n\n" +
			"  sbxrun run -r requirements.txt -- pytest tests/\n  sbxrun run -- sh -c 'id; ls /'\n\nVerbs:\n")
		for _, v := range verbs() {
			fmt.Fprintf(&b, "  %-13s %s\n", v.name, v.short)
		}
		b.WriteString("\nsbxrun VERB --help tells the flags of a verb.\n")
		return b.String()
	}
	fmt.Fprintf(&b, "Usage: sbxrun %s %s\n\n%s\n", v.name, v.args, v.short)
	if v.long != "" {
		b.WriteString("\n" + v.long + "\n")
	}
	c := newCommand(newUI(), v)
	b.WriteString("\nFlags:\n" + ownFlags(c))
	return b.String()
}

// ownFlags lists the flags of a verb; run's, where it takes them all, are told once.
func ownFlags(c *command) string {
	if !c.verb.asRun {
		return c.flags.Usages(100)
	}
	r := newCommand(newUI(), runVerb())
	for i := range c.flags.all {
		o := &c.flags.all[i]
		same := r.flags.Lookup(o.name)
		o.hidden = o.hidden || same != nil && same.usage == o.usage
	}
	own := c.flags.Usages(100)
	if own != "" {
		own += "\n"
	}
	return own + "  and all flags of run: sbxrun run --help\n"
}

// groupHelp lists the verbs that begin with a word (env, base).
func groupHelp(group string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: sbxrun %s VERB [flags]\n\nVerbs:\n", group)
	for _, v := range verbs() {
		if strings.HasPrefix(v.name, group+" ") {
			fmt.Fprintf(&b, "  %-13s %s\n", v.name, v.short)
		}
	}
	return b.String()
}

func unknownVerb(args []string) error {
	word := args[0]
	if isGroup(word) && len(args) > 1 {
		word += " " + args[1]
	}
	if strings.HasPrefix(word, "-") {
		return usage("flags come after the verb: sbxrun run "+word+" …; sbxrun --help lists the verbs", "%q: no verb before it", word)
	}
	return usage(suggest(word), "unknown verb %q", word)
}

// markdown is docs/reference.md.
func markdown() string {
	var b strings.Builder
	b.WriteString("# sbxrun: reference\n\nGenerated from the flags by `sbxrun help --markdown`; a test keeps it up to date.\n")
	for _, v := range verbs() {
		fmt.Fprintf(&b, "\n## sbxrun %s\n\n`sbxrun %s %s`\n\n%s.\n", v.name, v.name, v.args, strings.TrimSuffix(v.short, "."))
		if v.long != "" {
			b.WriteString("\n" + v.long + "\n")
		}
		b.WriteString("\n```\n")
		c := newCommand(newUI(), v)
		// The directories depend on the caller's variables.
		c.dirs = runtime.Dirs{Root: "/var/lib/sbxrun", State: "/run/sbxrun"}
		b.WriteString(ownFlags(c) + "```\n")
	}
	b.WriteString(exitCodes)
	return b.String()
}

const exitCodes = `
## Exit codes

| code | meaning |
|---|---|
| 0–255 | of ` + "`run`" + `: the command's own |
| 128+n | the command died of signal n |
| 124 | a time limit (wall or CPU) is over |
| 137 | killed: out of memory, too much output, or stopped twice |
| 125 | sbxrun itself failed, wrong usage of ` + "`run`" + ` too |
| 126 | the command is there but cannot be executed |
| 127 | the command was not found |
| 0, 1, 2 | of all other verbs: success, failure, wrong usage |

Codes can collide with the command's own; the report (` + "`--report`" + `) is the authority.
`

func flagHint(f *flagSet, err error, v *verb) string {
	var unknown *unknownFlag
	if errors.As(err, &unknown) && unknown.name != "" {
		best, dist := "", 4
		for _, o := range f.Sorted() {
			if d := distance(unknown.name, o.name); d < dist {
				best, dist = o.name, d
			}
		}
		if best != "" {
			return "did you mean --" + best + "?"
		}
	}
	return "sbxrun " + v.name + " --help tells the flags"
}

func suggest(word string) string {
	best, dist := "", 4
	for _, v := range verbs() {
		if d := distance(word, v.name); d < dist {
			best, dist = v.name, d
		}
	}
	if best != "" {
		return "did you mean " + best + "? sbxrun --help lists the verbs"
	}
	return "sbxrun --help lists the verbs; a command comes after run --"
}

// distance is the number of edits between two words (Levenshtein).
func distance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		cur := make([]int, len(b)+1)
		cur[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			cur[j+1] = min(prev[j]+cost, prev[j+1]+1, cur[j]+1)
		}
		prev = cur
	}
	return prev[len(b)]
}
