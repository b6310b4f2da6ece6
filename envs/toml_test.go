package envs

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRecipesAreRead(t *testing.T) {
	const text = `
memory = "1g"
[env]
extends = "stack"
python = "3.12"
apt = ["libpq5", "libc6=2.36-9+deb12u10"]
requirements = ["six", "idna>=3"]
extras = "dev"
hooks = "true"
copy = [{from = "src", to = "/opt/app"}, {stage = "build", from = "/opt/out/", to = "/usr/local/x/"}]
run = ["a", """
b
c"""]
network = ["mirror.test:8080"]
env = {B = "2", A = "1"}
system_site_packages = true
[env.stages.build]
conda = "environment.yml"
`
	for _, c := range []struct{ file, text string }{{"sbxrun.toml", text}, {"pyproject.toml", "[project]\nname = 'x'\n[tool.sbxrun.env]\nrun = 'a'\n"}} {
		r, err := parseRecipe(c.file, []byte(c.text))
		require.NoError(t, err)
		if c.file != "sbxrun.toml" {
			require.Equal(t, []string{"a"}, r.final.runs)
			continue
		}
		s := r.final
		require.Equal(t, []string{"A=1", "B=2"}, s.env)
		require.Equal(t, []string{"six", "idna>=3"}, s.inline)
		require.Equal(t, []string{"dev"}, s.extras)
		require.Equal(t, []copyStep{{"", "src", "/opt/app"}, {"build", "/opt/out/", "/usr/local/x/"}}, s.copies)
		require.Equal(t, []string{"a", "b\nc"}, s.runs)
		require.Equal(t, "environment.yml", r.stages["build"].conda)
		require.True(t, s.system)
	}
}

// Variables of a settings file are no recipe.
func TestATableOfVariablesIsNoRecipe(t *testing.T) {
	for _, text := range []string{"[env]\nPATH = '/x'\n", "[tool.sbxrun.env]\nPATH = '/x'\n", "[env]\n", "x = 1\n"} {
		_, err := parseRecipe("sbxrun.toml", []byte(text))
		require.ErrorIs(t, err, errNoRecipe)
	}
}

func TestBadRecipesAreRefused(t *testing.T) {
	for name, c := range map[string]struct{ text, says string }{
		"no toml":            {"[env]\nrun = [", "f.toml:2"},
		"unknown key":        {"[env]\nrun = 'a'\nruns = 'b'\n", `f.toml:3: key "env.runs": unknown`},
		"unknown in a stage": {"[env]\nrun = 'a'\n\n[env.stages.b]\nx = 1\n", `f.toml:5: key "env.stages.b.x": unknown`},
		"stages in a stage":  {"[env]\nrun = 'a'\n[env.stages.b.stages.c]\nrun = 'a'\n", "unknown"},
		"stages no tables":   {"[env]\nstages = 3\n", "not a table of stages"},
		"a stage no table":   {"[env]\nstages = {a = 1}\n", "not a table"},
		"bad stage name":     {"[env]\n[env.stages.\"a/b\"]\nrun = 'x'\n", "not a plain name"},
		"a number":           {"[env]\npython = 3.12\n", `f.toml:2: key "env.python": a text`},
		"two lines":          {"[env]\nbase = \"a\\nb\"\n", "a text in one line"},
		"run no text":        {"[env]\nrun = [1]\n", "a list of texts"},
		"apt option":         {"[env]\napt = ['--allow-unauthenticated']\n", "is not a package"},
		"apt path":           {"[env]\napt = ['./x.deb']\n", "is not a package"},
		"requirements":       {"[env]\nrequirements = 3\n", "a file, or a list"},
		"requirement lines":  {"[env]\nrequirements = [\"a\\n--index-url x\"]\n", "a list of texts"},
		"both kinds":         {"[env]\nrequirements = 'a'\nconda = 'b'\n", "requirements are given too"},
		"base and extends":   {"[env]\nbase = 'a'\nextends = 'b'\n", "extends is given too"},
		"copy no list":       {"[env]\ncopy = {from = 'a', to = '/opt/b'}\n", "a list of tables"},
		"copy no to":         {"[env]\ncopy = [{from = 'a'}]\n", "with from and to"},
		"copy key":           {"[env]\ncopy = [{from = 'a', to = '/opt/b', mode = '1'}]\n", `unknown key "mode"`},
		"copy out":           {"[env]\ncopy = [{from = '../a', to = '/opt/b'}]\n", "leaves the recipe's folder"},
		"copy out later":     {"[env]\ncopy = [{from = 'a/../../b', to = '/opt/b'}]\n", "leaves the recipe's folder"},
		"copy absolute":      {"[env]\ncopy = [{from = '/etc/shadow', to = '/opt/b'}]\n", "leaves the recipe's folder"},
		"copy to relative":   {"[env]\ncopy = [{from = 'a', to = 'b'}]\n", "an absolute path"},
		"copy to dots":       {"[env]\ncopy = [{from = 'a', to = '/opt/../etc'}]\n", "an absolute path"},
		"copy to /etc":       {"[env]\ncopy = [{from = 'a', to = '/etc/x'}]\n", "not there"},
		"copy to /opt":       {"[env]\ncopy = [{from = 'a', to = '/opt'}]\n", "not there"},
		"copy from relative": {"[env]\ncopy = [{stage = 'b', from = 'a', to = '/opt/x'}]\n[env.stages.b]\nrun = 'x'\n", "an absolute path of the stage's"},
		"unknown stage":      {"[env]\nrun = 'a'\ncopy = [{stage = 'b', from = '/opt/a', to = '/opt/x'}]\n", `f.toml:3: copy: stage "b" is not in the recipe`},
		"copies in a circle": {"[env]\nrun = 'x'\n[env.stages.a]\ncopy = [{stage = 'b', from = '/opt/a', to = '/opt/x'}]\n[env.stages.b]\ncopy = [{stage = 'a', from = '/opt/a', to = '/opt/x'}]\n", "a → b → a"},
		"extends itself":     {"[env]\nrun = 'x'\n[env.stages.a]\nextends = 'a'\n", "a → a"},
		"env of a stage":     {"[env]\nrun = 'x'\n[env.stages.a]\nenv = {A = '1'}\n", "not for a stage"},
		"env no text":        {"[env]\nrun = 'x'\nenv = {A = 1}\n", "not a variable"},
		"network":            {"[env]\nrun = 'x'\nnetwork = ['*']\n", "is not a host"},
		"flag":               {"[env]\nallow_build = 'yes'\n", "true or false"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseRecipe("f.toml", []byte(c.text))
			require.ErrorContains(t, err, c.says)
		})
	}
}

func FuzzRecipe(f *testing.F) {
	f.Add([]byte("[env]\ncopy = [{from = 'a', to = '/opt/b'}]\n[env.stages.x]\nrun = ['y']\n"))
	f.Add([]byte("env = {run = 'a', stages = {b = {extends = 'c'}}}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := parseRecipe("f.toml", text)
		if err != nil {
			return
		}
		for _, c := range r.final.copies {
			if !writable(c.to, true) && !writable(c.to[:len(c.to)-1], true) {
				t.Fatalf("copies to %q", c.to)
			}
		}
	})
}
