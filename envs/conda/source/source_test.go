package source

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestReadEnvironment(t *testing.T) {
	e, err := ReadEnvironment([]byte(`
name: science
channels: [nodefaults, forge, ./local]
prefix: /home/someone/envs/science
dependencies:
  - python >=3.11
  - forge::numpy=2
  - gcc  # [linux]
  - clang  # [osx or win]
  - wine  # [not linux and x86_64]
  - sel(win): pywin32
  - sel(unix): sh
  - pip
  - pip:
    - -r requirements.txt
    - "iniconfig==2.1.0"
variables:
  B: two words
  A: 1
`), "linux-64")
	require.NoError(t, err)
	assert.Equal(t, &Environment{
		Name: "science", Channels: []string{"forge", "./local"}, Specs: []string{"python >=3.11", "forge::numpy=2", "gcc", "sh", "pip"},
		Pip: []string{"-r requirements.txt", "iniconfig==2.1.0"}, Variables: []string{"A=1", "B=two words"},
	}, e)
}

func TestBadEnvironmentsAreRefused(t *testing.T) {
	for text, says := range map[string]string{
		"dependencies: [":                         "not valid YAML",
		"dependencies: []":                        "no dependencies for linux-64",
		"dependencies:\n- wine # [win]":           "no dependencies for linux-64",
		"dependencies:\n- a\n- {pip: x}":          "line 3: not a dependency",
		"dependencies:\n- {conda: [x]}":           "line 2: not a dependency",
		"dependencies:\n- [a]":                    "line 2: not a dependency",
		"dependencies:\n- {pip: [{a: b}]}":        "must be one line",
		"dependencies: [\"a\\nb\"]":               "several lines",
		"dependencies: [a]\nvariables: {x: [1]}":  `variable "x"`,
		"dependencies: [a]\nvariables: {x=y: 1}":  `variable "x=y"`,
		"dependencies: [a]\n---\ndependencies: 1": "more than one",
		"a: &a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\ndependencies: [*c,*c,*c,*c]": "",
	} {
		_, err := ReadEnvironment([]byte(text), "linux-64")
		require.Error(t, err, text)
		assert.Contains(t, err.Error(), says, text)
	}
}

func TestChannelsAreResolved(t *testing.T) {
	c := &Config{}
	c.AddVariables(map[string]string{"CONDA_CHANNELS": "first"})
	require.NoError(t, c.Add([]byte("channels: [second]\nchannel_alias: https://user:secret@mirror.example/conda/\ncustom_channels: {own: https://own.example}\ncustom_multichannels: {both: [own, forge]}\nchannel_priority: flexible\n"), nil, "a"))
	require.NoError(t, c.Add([]byte("channels: [second, third]\nchannel_alias: https://late.example\ndefault_channels: [https://d.example/main]\nchannel_priority: disabled\n"), nil, "b"))
	assert.Equal(t, []string{"first", "second", "third"}, c.Channels)
	assert.Equal(t, "flexible", c.Priority)
	got, err := c.Resolve([]string{"forge", "forge/label/dev", "defaults", "own", "own/sub", "both", "file:///a/../b/", "/abs", "../rel", "https://x.example/y/"}, "/home/me/project", "https://fallback.example")
	require.NoError(t, err)
	assert.Equal(t, []string{
		"https://user:secret@mirror.example/conda/forge", "https://user:secret@mirror.example/conda/forge/label/dev", "https://d.example/main",
		"https://own.example/own", "https://own.example/own/sub", "file:///b", "file:///abs", "file:///home/me/rel", "https://x.example/y",
	}, got)

	v := &Config{}
	require.NoError(t, v.Add([]byte("channels: ['https://$USER:${PASS}@x.example/$NONE']\ncustom_channels: {own: 'https://${HOST}/'}\n"), map[string]string{"USER": "me", "PASS": "secret", "HOST": "own.example"}, "c"))
	assert.Equal(t, []string{"https://me:secret@x.example/${NONE}"}, v.Channels)
	assert.Equal(t, map[string]string{"own": "https://own.example/"}, v.Custom)

	got, err = (&Config{}).Resolve(nil, "/", "https://fallback.example/")
	require.NoError(t, err)
	assert.Equal(t, []string{"https://fallback.example/main", "https://fallback.example/r"}, got)
	for name, says := range map[string]string{"forge": "not known", "ftp://x": "unknown kind", "file://x": "path from /", "a b": "neither", "loop": "by itself"} {
		_, err := (&Config{Multi: map[string][]string{"loop": {"loop"}}}).Resolve([]string{name}, "/", "")
		require.Error(t, err, name)
		assert.Contains(t, err.Error(), says)
	}
	assert.NotContains(t, (&Config{}).Add([]byte("channels: [https://u:secret@x"), nil, "f").Error(), "secret")
}

func TestCredentialsGoWhereTheyBelong(t *testing.T) {
	var c Credentials
	c.AddNetrc([]byte("machine plain.example login me password mine\nmacdef x\n machine no.example login a password b\n\nmachine port.example\nlogin p\npassword q\n"))
	require.NoError(t, c.AddRattler([]byte(`{"bearer.example": {"BearerToken": "B"}, "*.wild.example": {"CondaToken": "T"}, "https://path.example/a": {"BasicHTTP": {"username": "u", "password": "v"}}}`)))
	clean, err := c.Strip("https://own:pw@chan.example/private")
	require.NoError(t, err)
	assert.Equal(t, "https://chan.example/private", clean)
	clean, err = c.Strip("https://chan.example/t/tok-en/other/linux-64/x.conda")
	require.NoError(t, err)
	assert.Equal(t, "https://chan.example/other/linux-64/x.conda", clean)
	for url, want := range map[string]struct{ header, path string }{
		"https://plain.example/x":                     {"Basic bWU6bWluZQ==", "/x"},
		"https://no.example/x":                        {"", "/x"},
		"https://port.example:8443/x":                 {"Basic cDpx", "/x"},
		"https://bearer.example/x":                    {"Bearer B", "/x"},
		"https://bearer.example.evil.example/x":       {"", "/x"},
		"https://a.wild.example/ch/noarch/x":          {"", "/t/T/ch/noarch/x"},
		"https://path.example/a/x":                    {"Basic dTp2", "/a/x"},
		"https://path.example/ab":                     {"", "/ab"},
		"https://chan.example/private/noarch/x":       {"Basic b3duOnB3", "/private/noarch/x"},
		"https://chan.example/public/noarch/x":        {"", "/public/noarch/x"},
		"https://chan.example/other/linux-64/x.conda": {"", "/t/tok-en/other/linux-64/x.conda"},
		"https://chan.example/other/linux-64/y.conda": {"", "/other/linux-64/y.conda"},
	} {
		r, err := http.NewRequest(http.MethodGet, url, nil)
		require.NoError(t, err)
		c.Authorize(r)
		assert.Equal(t, want.header, r.Header.Get("Authorization"), url)
		assert.Equal(t, want.path, r.URL.Path, url)
	}
}

func FuzzReadEnvironment(f *testing.F) {
	f.Add([]byte("name: x\nchannels: [a]\ndependencies:\n- b # [linux]\n- pip: [c]\nvariables: {d: e}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ReadEnvironment(b, "linux-64")
		if err == nil && len(e.Specs)+len(e.Pip) == 0 {
			t.Fatal("nothing, and no error")
		}
	})
}

func FuzzCredentials(f *testing.F) {
	f.Add("https://user:secret@h.example/t/secret/c", []byte("machine h login a password secret"))
	f.Fuzz(func(t *testing.T, url string, netrc []byte) {
		var c Credentials
		c.AddNetrc(netrc)
		if clean, err := c.Strip(url); err == nil {
			if again, err := Clean(clean); err == nil && len(again) > len(clean)+16 {
				t.Fatal("cleaning grows:", clean, again)
			}
		}
	})
}
