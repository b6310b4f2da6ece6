package conda

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// put writes files below root, by path.
func put(t testing.TB, root string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		p := filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	}
}

func TestActivationFollowsWhatScriptsOfPackagesDo(t *testing.T) {
	for name, c := range map[string]struct {
		script string
		files  map[string]string
		vars   []string
		path   []string
	}{
		"nothing": {script: "#!/bin/sh\n# no more\n"},
		"assignments": {
			script: "export A=1 B=\"${CONDA_PREFIX}/x y\"\nC='$A'\nexport C\nD=$A\nexport \"E=$D/$C\"\nunset A\nexport B+=:more\n",
			vars:   []string{"B=/opt/env/x y:more", "C=$A", "E=1/$A"},
		},
		"defaults": {
			script: "export OLD=\"${JAVA_HOME:-}\"\nexport JAVA_HOME=${CONDA_PREFIX}/lib/jvm\nexport X=${JAVA_HOME:+set} Y=${Z:-${X}y} V=${JAVA_HOME##*/}\n",
			vars:   []string{"JAVA_HOME=/opt/env/lib/jvm", "OLD=", "V=jvm", "X=set", "Y=y"},
		},
		"like proj": {
			files: map[string]string{"share/proj/proj.db": ""},
			script: `if [ -n "${PROJ_DATA:-}" ]; then
    export _CONDA_SET_PROJ_DATA=$PROJ_DATA
fi
if [ -d "${CONDA_PREFIX}/share/proj" ]; then
  export "PROJ_DATA=${CONDA_PREFIX}/share/proj"
elif [ -d "${CONDA_PREFIX}/Library/share/proj" ]; then
  export PROJ_DATA="${CONDA_PREFIX}/Library/share/proj"
fi
if [ -f "${CONDA_PREFIX}/share/proj/licenses.csv" ]; then export PROJ_NETWORK="OFF"
else export PROJ_NETWORK="ON"; fi
`,
			vars: []string{"PROJ_DATA=/opt/env/share/proj", "PROJ_NETWORK=ON"},
		},
		"like gdal": {
			files: map[string]string{"share/gdal/x": ""},
			script: `if [[ -n "$GDAL_DATA" ]]; then
    export _CONDA_SET_GDAL_DATA=$GDAL_DATA
fi
if [ -d $CONDA_PREFIX/share/gdal ]; then
    export GDAL_DATA=$CONDA_PREFIX/share/gdal
    export GDAL_DRIVER_PATH=$CONDA_PREFIX/lib/gdalplugins
fi
if [[ ! -d "$GDAL_DRIVER_PATH" ]]; then
    unset GDAL_DRIVER_PATH
fi
export CPL_ZIP_ENCODING=UTF-8
`,
			vars: []string{"CPL_ZIP_ENCODING=UTF-8", "GDAL_DATA=/opt/env/share/gdal"},
		},
		"like libxml2": {
			script: `if test -n "${XML_CATALOG_FILES:-}"; then
    XML_CATALOG_FILES="${XML_CATALOG_FILES} "
else
    XML_CATALOG_FILES=""
fi
files=""
ifs_save="${IFS}"
IFS=" "
rem="${CONDA_PREFIX}"
for pre in ${rem}; do
    while test "${rem#"${pre}"}" = "${rem}"; do
	files="${files}%20"
	rem=${rem#" "}
    done
    files="${files}${pre}"
    rem=${rem#"${pre}"}
done
IFS="${ifs_save}"
files="file://${files}/etc/xml/catalog file:///etc/xml/catalog"
export XML_CATALOG_FILES="${XML_CATALOG_FILES}${files}"
unset files ifs_save rem
`,
			vars: []string{"XML_CATALOG_FILES=file:///opt/env/etc/xml/catalog file:///etc/xml/catalog"},
		},
		"folders before PATH": {
			script: "export PATH=\"$CONDA_PREFIX/a:$PATH\"\nPATH=${CONDA_PREFIX}/b:${PATH}\n",
			path:   []string{"/opt/env/b", "/opt/env/a", "/opt/env/bin"},
		},
		"lists and blocks": {
			script: "[ -z \"$X\" ] && export X=1 || export X=2\n[ \"$X\" = 1 ] && { export Y=1; }\n! [ \"$X\" != 1 ] && export Z=1\n[[ $X == 1 && ( -n $Y || -z $Y ) ]] && export W=1\n",
			vars:   []string{"W=1", "X=1", "Y=1", "Z=1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			put(t, root, c.files)
			put(t, root, map[string]string{"etc/conda/activate.d/x.sh": c.script, "etc/conda/activate.d/x.fish": "nothing of ours", "etc/conda/activate.d/x.csh": "("})
			vars, front, warnings, err := Activation(root, "/opt/env")
			require.NoError(t, err)
			require.Empty(t, warnings)
			want := []string{"CONDA_DEFAULT_ENV=/opt/env", "CONDA_PREFIX=/opt/env", "CONDA_SHLVL=1"}
			if c.path == nil {
				c.path = []string{"/opt/env/bin"}
			}
			require.ElementsMatch(t, append(want, c.vars...), vars)
			require.IsIncreasing(t, vars)
			require.Equal(t, c.path, front)
		})
	}
}

func TestActivationReportsWhatItDoesNotUnderstandAndGuessesNothing(t *testing.T) {
	for name, script := range map[string]string{
		"a command":               "export A=1\nuname -s\n",
		"a substitution":          "export A=1\nos=$(uname -s)\n",
		"backquotes":              "export A=`pwd`\n",
		"arithmetic":              "export A=$((1+1))\n",
		"a function":              "f() { export A=1; }\nf\n",
		"source":                  ". /etc/profile\n",
		"eval":                    "eval export A=1\n",
		"a redirection":           "export A=1 > /tmp/x\n",
		"a pipe":                  "echo a | true\n",
		"a job":                   "true &\n",
		"an array":                "A=(1 2)\n",
		"local":                   "local A=1\n",
		"HOME":                    "export A=$HOME/x\n",
		"a tilde":                 "export A=~/x\n",
		"a pattern":               "for f in $CONDA_PREFIX/*; do export A=$f; done\n",
		"braces":                  "for f in {1..999999999}; do :; done\n",
		"a pattern in a variable": "p='/*'\nfor f in $p; do export A=$f; done\n",
		"files outside":           "if [ -d /etc ]; then export A=1; fi\n",
		"files outside by ..":     "if [ -d $CONDA_PREFIX/../../etc ]; then export A=1; fi\n",
		"PATH replaced":           "export PATH=/usr/bin\n",
		"PATH extended behind":    "export PATH=$PATH:$CONDA_PREFIX/x\n",
		"PATH kept":               "export OLD_PATH=$PATH\n",
		"PATH compared":           "if [ \"$PATH\" = /bin ]; then export A=1; fi\n",
		"an endless loop":         "while true; do :; done\n",
		"an endless test":         "while [[ a ]]; do [[ a ]]; done\n",
		"a growing value":         "x=xxxxxxxxxxxxxxxx\nwhile true; do x=$x$x; done\n",
		"an indirection":          "export A=${!B}\n",
		"exit status":             "false\nexport A=$?\n",
		"the script's name":       "export A=$0 B=$BASH_SOURCE\n",
		"no shell at all":         "if then\n",
		"NUL":                     "export A=\"a\x00b\"\nfoo\n",
		"a quoted pattern":        "A=abc; export B=${A#\"a*\"}\n",
		"a pattern by value":      "P='a*'; A=abc; export B=${A#$P}\n",
		"an early export":         "export A\nA=1\n",
		"an escape":               "export A=a\\ b\n",
		"IFS":                     "IFS=:\n",
		"a test of two":           "if [ -n a -a -n b ]; then export A=1; fi\n",
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			put(t, root, map[string]string{"etc/conda/activate.d/bad.sh": script, "etc/conda/activate.d/good.sh": "export GOOD=1\n"})
			vars, front, warnings, err := Activation(root, "/opt/env")
			require.NoError(t, err)
			require.Len(t, warnings, 1)
			require.Contains(t, warnings[0], "etc/conda/activate.d/bad.sh is not applied: ")
			require.Equal(t, []string{"CONDA_DEFAULT_ENV=/opt/env", "CONDA_PREFIX=/opt/env", "CONDA_SHLVL=1", "GOOD=1"}, vars)
			require.Equal(t, []string{"/opt/env/bin"}, front)
		})
	}
}

func TestActivationReadsVariablesOfPackagesAndOfTheState(t *testing.T) {
	root := t.TempDir()
	put(t, root, map[string]string{
		"etc/conda/env_vars.d/a.json": `{"A": "1", "B": "1"}`,
		"etc/conda/env_vars.d/b.json": `{"B": "2", "PATH": "/x", "N": 3, "x-y": "1"}`,
		"etc/conda/env_vars.d/c.json": `[`,
		"conda-meta/state":            `{"version": 1, "env_vars": {"C": "3", "A": "***unset***"}}`,
		"etc/conda/activate.d/a.sh":   "export D=$C\n",
	})
	vars, _, warnings, err := Activation(root, "/opt/env")
	require.NoError(t, err)
	require.Equal(t, []string{"A=1", "B=2", "C=3", "CONDA_DEFAULT_ENV=/opt/env", "CONDA_PREFIX=/opt/env", "CONDA_SHLVL=1", "D=3"}, vars)
	require.Len(t, warnings, 4)
}

func TestActivationFollowsNoLinkOutOfThePrefix(t *testing.T) {
	out := t.TempDir()
	put(t, out, map[string]string{"x.sh": "export A=1\n", "x.json": `{"A": "1"}`})
	root := t.TempDir()
	for _, p := range []string{"etc/conda/activate.d/x.sh", "etc/conda/env_vars.d/x.json"} {
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(root, p)), 0o755))
		require.NoError(t, os.Symlink(filepath.Join(out, filepath.Base(p)), filepath.Join(root, p)))
	}
	vars, _, warnings, err := Activation(root, "/opt/env")
	require.NoError(t, err)
	require.NotContains(t, vars, "A=1")
	require.Len(t, warnings, 2)
}

func FuzzActivation(f *testing.F) {
	for _, s := range []string{"export A=1\n", "if [ -n \"${A:-}\" ]; then export B=$A; fi\n", "for i in a b; do export PATH=$i:$PATH; done", "while [[ -z $x ]]; do x=${x}1; done", "export A=${B##*/}${C%%:*}"} {
		f.Add(s)
	}
	dir, err := os.OpenRoot(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, script string) {
		if len(script) > 1000 {
			return
		}
		s := shellState{vars: map[string]shellVar{"CONDA_PREFIX": {"/opt/env", true}}}
		s.setPath([]string{"/opt/env/bin"})
		next, err := s.run(script, dir, "/opt/env")
		if err != nil {
			return
		}
		for name, v := range next.vars {
			if !variableName.MatchString(name) || len(v.value) > 2*maxValueBytes {
				t.Fatalf("%q=%q", name, v.value)
			}
		}
		if len(next.path()) == 0 {
			t.Fatal("no path")
		}
	})
}

// What is followed without a shell is what a shell does.
func TestActivationIsWhatBashDoes(t *testing.T) {
	for name, script := range map[string]string{
		"quotes":             `export A='a "b" $C' B="a 'b' \"c\" \$D \\ \x" D=a"b"'c'$A E=${A}x; export F=$A`,
		"no splitting":       `X="a  b"; export A=$X B="$X" C=${X} D=${U:-$X}`,
		"splitting":          `X=" a  b c "; for i in $X "$X" x$X; do Y="$Y<$i>"; done; export Y`,
		"IFS":                `IFS=" "; P="a b	c "; for i in $P; do Y="$Y<$i>"; done; export Y; IFS=; for i in $P; do Y="$Y<$i>"; done`,
		"unset and empty":    `E=; export A=${E-x} B=${E:-x} C=${U-x} D=${U:-x} F=${E+x} G=${E:+x} H=${U+x} I=${CONDA_PREFIX:+x}`,
		"patterns":           `V=a/b.c/d.tar.gz; export A=${V#*/} B=${V##*/} C=${V%.*} D=${V%%.*} F=${V%[a-z]z} G=${V#??}`,
		"pattern by value":   `P="a"; V=abc; export A=${V#$P} B=${V#"$P"} C=${V#"$P"*} D=${V%%"c"}`,
		"append":             `export A=1; A+=2; B+=3; export B`,
		"export later":       `A=1; export A; A=2; B=3`,
		"unset":              `export A=1 B=2; unset A C`,
		"empty tests":        `[ ] || export A=1; [ "" ] || export B=1; [ x ] && export C=1; [ -n $U ] && export D=1; [ -n "$U" ] || export E=1; test -z $U && export F=1`,
		"not":                `[ ! -n "$U" ] && export A=1; ! [ x ] || export B=1; [[ ! -n $U ]] && export C=1; if ! false; then export D=1; fi`,
		"else":               `if [ a = b ]; then export A=1; elif [ a != b ]; then export A=2; else export A=3; fi; if false; then :; else export B=1; fi`,
		"status of if":       `if false; then :; fi && export A=1; if true; then false; fi || export B=1`,
		"lists":              `true && false || export A=1; false && true && export B=1; false || true && export C=1; { false; true; } && export D=1`,
		"double brackets":    `X="a b"; [[ $X == "a b" ]] && export A=1; [[ $X = 'a b' && ( -z $U || x ) ]] && export B=1; [[ a != b ]] && export C=1; [[ $U ]] || export D=1`,
		"files":              `[ -d "$CONDA_PREFIX/share" ] && export A=1; [ -f $CONDA_PREFIX/share/f ] && export B=1; [ -e $CONDA_PREFIX/none ] || export C=1; [ -x $CONDA_PREFIX/share/f ] || export D=1; [[ -r ${CONDA_PREFIX}/share/f ]] && export E=1; [ -d $CONDA_PREFIX ] && export F=1; [ -d $CONDA_PREFIX/ ] && export G=1`,
		"until":              `until [ "$X" = xxx ]; do X=x$X; done; export X`,
		"a comment":          "export A=1 # B=2\n# export C=1\nexport D=a#b",
		"lines":              "export A=\"1\n2\" \\\n  B=3",
		"a semicolon":        `export A=1;export B=2`,
		"an option's name":   `A=-n; [ $A ] && export B=1; [ "$A" = -n ] && export C=1`,
		"quoted export":      `V="a b"; export "A=$V" 'B=$V' "C=$V"/x`,
		"values as patterns": `V='*'; export A=$V B="x$V"`,
		"dollar at the end":  `export A=a$ B="b$" C='$'`,
		"nested defaults":    `export A=${U:-${V:-"a b"}} B="${U:-"c d"}" C=${U:-'e f'}`,
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			file := "etc/conda/activate.d/x.sh"
			put(t, root, map[string]string{file: script + "\n", "share/f": "x"})
			vars, _, warnings, err := Activation(root, root)
			require.NoError(t, err)
			require.Empty(t, warnings)
			cmd := exec.CommandContext(t.Context(), "bash", "--noprofile", "--norc", "-c", `. "$0"; IFS=$' \t\n'; exec env -0`, filepath.Join(root, file))
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CONDA_PREFIX=" + root, "CONDA_DEFAULT_ENV=" + root, "CONDA_SHLVL=1"}
			out, err := cmd.Output()
			require.NoError(t, err)
			var want []string
			for v := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
				if n, _, _ := strings.Cut(v, "="); !slices.Contains([]string{"PATH", "PWD", "OLDPWD", "SHLVL", "_"}, n) {
					want = append(want, v)
				}
			}
			require.ElementsMatch(t, want, vars)
		})
	}
}
