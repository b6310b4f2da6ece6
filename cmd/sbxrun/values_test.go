package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/runtime"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1": 1, "512b": 512, "1k": 1 << 10, "1K": 1 << 10, "1kb": 1 << 10, "1KiB": 1 << 10, "1ki": 1 << 10,
		"512m": 512 << 20, "2g": 2 << 30, "1.5g": 3 << 29, "3t": 3 << 40, "3TiB": 3 << 40, "1 g": 1 << 30, ".5k": 512,
	} {
		got, err := parseSize(in)
		require.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for in, says := range map[string]string{
		"": "not a size", "g": "not a size", "12x": "not a size", "1e3": "not a size", "0x10": "not a size", "1_000": "not a size",
		"NaN": "not a size", "inf": "not a size", "-Inf": "not a size", "1gg": "not a size", "1mk": "not a size", "+1": "not a size", "1.2.3": "not a size",
		"-5m": "negative", "9000000t": "too large", "9223372036854775808": "too large",
	} {
		_, err := parseSize(in)
		assert.ErrorContains(t, err, says, "%q", in)
	}
}

func TestParseDuration(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "30": 30 * time.Second, "1.5": 1500 * time.Millisecond, "1.5s": 1500 * time.Millisecond, "10m": 10 * time.Minute,
		"1h30m": 90 * time.Minute, "0.0000000001": 1,
	} {
		got, err := parseDuration(in)
		require.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for in, says := range map[string]string{
		"": "not a duration", "soon": "not a duration", "NaN": "not a duration", "Inf": "not a duration", "1e3": "not a duration",
		"-1": "negative", "-1s": "negative", "99999999999": "too long", "1d": "not a duration", "0x5": "not a duration",
	} {
		_, err := parseDuration(in)
		assert.ErrorContains(t, err, says, "%q", in)
	}
}

func TestParseVolume(t *testing.T) {
	cwd, err := os.Getwd()
	require.NoError(t, err)
	for in, want := range map[string]runtime.Volume{
		"/a:/b":         {Source: "/a", Target: "/b", Mode: "rw"},
		"/a:/b:ro":      {Source: "/a", Target: "/b", Mode: "ro"},
		"/a:/b/:O":      {Source: "/a", Target: "/b", Mode: "O"},
		"/a:/b:z,ro":    {Source: "/a", Target: "/b", Mode: "ro"},
		"x/../y:/b":     {Source: filepath.Join(cwd, "y"), Target: "/b", Mode: "rw"},
		"/a:/../etc":    {Source: "/a", Target: "/../etc", Mode: "rw"}, // the plan refuses it
		"/a/\xff:/\xfe": {Source: "/a/\xff", Target: "/\xfe", Mode: "rw"},
	} {
		got, err := parseVolume(in)
		require.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for _, in := range []string{"", "/a", ":/b", "/a:", "/a:/b:", "/a:/b:rx", "/a:/b:ro:x", "/a\x00:/b", "/a:/b\x00"} {
		_, err := parseVolume(in)
		assert.Error(t, err, "%q", in)
	}
}

func TestParseMount(t *testing.T) {
	v, tm, err := parseMount("type=bind,src=/a,dst=/b,readonly")
	require.NoError(t, err)
	assert.Nil(t, tm)
	assert.Equal(t, &runtime.Volume{Source: "/a", Target: "/b", Mode: "ro"}, v)
	v, _, err = parseMount("source=/a,target=/b,readonly=false")
	require.NoError(t, err)
	assert.Equal(t, "rw", v.Mode)
	v, tm, err = parseMount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700")
	require.NoError(t, err)
	assert.Nil(t, v)
	assert.Equal(t, &runtime.Tmpfs{Target: "/t", SizeBytes: 1 << 20, Mode: 0o700}, tm)
	// What a mount cannot honour is refused, not ignored.
	for _, in := range []string{
		"", "type=bind,target=/b", "type=volume,source=a,target=/b", "type=bind,source=/a", "type=tmpfs,target=/t,readonly",
		"type=tmpfs,target=/t,source=/a", "type=bind,source=/a,target=/b,tmpfs-size=1m", "source=/a,target=/b,readonly=perhaps",
		"type=tmpfs,target=/t,tmpfs-size=0", "type=tmpfs,target=/t,tmpfs-mode=9", "source=/a,target=/b,bind-propagation=shared",
	} {
		_, _, err := parseMount(in)
		assert.Error(t, err, "%q", in)
	}
}

func TestParseTmpfs(t *testing.T) {
	got, err := parseTmpfs("/t:size=2m,mode=1777,exec,nosuid")
	require.NoError(t, err)
	assert.Equal(t, runtime.Tmpfs{Target: "/t", SizeBytes: 2 << 20, Mode: 0o1777, Exec: true}, got)
	for _, in := range []string{"/t:size=", "/t:size=0", "/t:mode=888", "/t:mode=0", "/t:suid", "/t:size=-1"} {
		_, err := parseTmpfs(in)
		assert.Error(t, err, "%q", in)
	}
}

func TestParseUlimit(t *testing.T) {
	got, err := parseUlimit("nofile=10:20")
	require.NoError(t, err)
	assert.Equal(t, runtime.Rlimit{Name: "nofile", Soft: 10, Hard: 20}, got)
	got, err = parseUlimit("NPROC=-1")
	require.NoError(t, err)
	assert.Equal(t, runtime.Rlimit{Name: "nproc", Soft: math.MaxUint64, Hard: math.MaxUint64}, got)
	for _, in := range []string{"", "nofile", "nofile=", "=1", "nofile=1:", "nofile=a", "nofile=1:2:3", "nofile=-2", "nofile=99999999999999999999"} {
		_, err := parseUlimit(in)
		assert.Error(t, err, "%q", in)
	}
}

func TestParseEnv(t *testing.T) {
	t.Setenv("FROM_HOST", "v=1")
	file := filepath.Join(t.TempDir(), "env")
	require.NoError(t, os.WriteFile(file, []byte("# comment\n\nA=1\r\n  B= two \nFROM_HOST\nNOT_SET_ANYWHERE\n"), 0o600))
	got, err := parseEnv([]string{"A=2", "FROM_HOST", "NOT_SET_ANYWHERE", "E=", "RAW=\xff"}, []string{file})
	require.NoError(t, err)
	assert.Equal(t, []string{"A=1", "B= two ", "FROM_HOST=v=1", "A=2", "FROM_HOST=v=1", "E=", "RAW=\xff"}, got)
	for _, in := range []string{"", "=x", "A=\x00"} {
		_, err := parseEnv([]string{in}, nil)
		assert.Error(t, err, "%q", in)
	}
	require.NoError(t, os.WriteFile(file, []byte("A=1\n=2\n"), 0o600))
	_, err = parseEnv(nil, []string{file})
	assert.ErrorContains(t, err, file+":2:")
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]int{"TERM": 15, "SIGTERM": 15, "sigint": 2, "9": 9} {
		got, err := parseSignal(in)
		require.NoError(t, err)
		assert.Equal(t, want, got)
	}
	for _, in := range []string{"", "0", "65", "-1", "NOPE"} {
		_, err := parseSignal(in)
		assert.Error(t, err, in)
	}
}

func TestUnsafeProject(t *testing.T) {
	for _, d := range []string{"/", "/root", "/home", "/home/x", "/usr", "/usr/lib", "/etc/ssl", "/var", "/tmp", "/proc/self", "/run/x"} {
		assert.True(t, unsafeProject(d), d)
	}
	for _, d := range []string{"/home/x/project", "/root/project", "/srv/app", "/tmp/app"} {
		assert.False(t, unsafeProject(d), d)
	}
}

// settings applies a TOML text after flags and gives the options.
func settings(t testing.TB, name, text string, flags ...string) (*runOptions, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	c := newCommand(newUI(), runVerb())
	require.NoError(t, c.flags.Parse(flags))
	_, err := applyFile(&c.flags, path)
	return c.opts.(*runOptions), err
}

func TestSettings(t *testing.T) {
	o, err := settings(t, "sbxrun.toml", `
requirements = "requirements.txt"
pids-limit = 64
read_only = true
timeout = 1.5
max_cpu_percent = 50
max_memory_mb = 256
max_disk_mb = 100
volume = ["/a:/b:ro"]
env = {A = "1", B = 2}
label = []
`)
	require.NoError(t, err)
	assert.Equal(t, "requirements.txt", o.requirements)
	assert.Equal(t, int64(64), o.pids)
	assert.True(t, o.readOnly)
	assert.Equal(t, 1500*time.Millisecond, o.wall)
	assert.Equal(t, "0.5", o.cpus)
	assert.Equal(t, int64(256<<20), o.memory)
	assert.Equal(t, int64(100<<20), o.disk)
	assert.Equal(t, []string{"/a:/b:ro"}, o.volumes)
	assert.Equal(t, []string{"A=1", "B=2"}, o.env)

	o, err = settings(t, "pyproject.toml", "[project]\nname = 'x'\n[tool.other]\ny = 1\n[tool.sbxrun]\nmemory = '1g'\n")
	require.NoError(t, err)
	assert.Equal(t, int64(1<<30), o.memory)
}

// Flags win over the file, also under their other names.
func TestFlagsWinOverSettings(t *testing.T) {
	o, err := settings(t, "sbxrun.toml", "memory = '1g'\nmax_cpu_percent = 10\ntimeout = 60\nenv = ['A=1']\n",
		"-m", "2g", "--cpus", "1", "--wall-time", "5", "-e", "B=2")
	require.NoError(t, err)
	assert.Equal(t, int64(2<<30), o.memory)
	assert.Equal(t, "1", o.cpus)
	assert.Equal(t, 5*time.Second, o.wall)
	assert.Equal(t, []string{"B=2"}, o.env)
}

func TestBadSettings(t *testing.T) {
	for _, c := range []struct{ name, text, says string }{
		{"sbxrun.toml", "x = 1\n\nno_such_key = 2\n", `sbxrun.toml:3: unknown key "no_such_key"`},
		{"sbxrun.toml", "memory = \n", "sbxrun.toml:1:"},
		{"sbxrun.toml", "\nmemory = '12x'\n", "sbxrun.toml:2:"},
		{"sbxrun.toml", "memory = ['1g', '2g']\n", "one value"},
		{"sbxrun.toml", "memory = nan\n", "not a size"},
		{"sbxrun.toml", "pids_limit = 1.5\n", "sbxrun.toml:1:"},
		{"sbxrun.toml", "max_cpu_percent = 'x'\n", "not a number"},
		{"sbxrun.toml", "max_memory_mb = '1g'\n", "not a size"},
		{"sbxrun.toml", "max_memory_mb = -5\n", "negative"},
		{"sbxrun.toml", "read-only = true\nread_only = false\n", "says the same"},
		{"sbxrun.toml", "cpus = 1\nmax_cpu_percent = 50\n", "says the same"},
		{"sbxrun.toml", "timeout = 1\nwall_time = 2\n", "says the same"},
		{"sbxrun.toml", "root = '/x'\n", "unknown key"},
		{"sbxrun.toml", "volume = [[1]]\n", "plain values"},
		{"sbxrun.toml", "timeout = 2026-01-01\n", "no flag takes"},
		{"pyproject.toml", "[project]\nname = 'x'\n", "no table [tool.sbxrun]"},
		{"pyproject.toml", "[tool.sbxrun]\nnope = 1\n", `pyproject.toml:2: unknown key "tool.sbxrun.nope"`},
	} {
		text := strings.ReplaceAll(c.text, "x = 1\n\n", "cpus = 1\n\n")
		_, err := settings(t, c.name, text)
		assert.ErrorContains(t, err, c.says, "%q", c.text)
	}
}

// -f may name a directory.
func TestSettingsOfADirectory(t *testing.T) {
	dir := t.TempDir()
	c := newCommand(newUI(), runVerb())
	_, err := applyFile(&c.flags, dir)
	assert.ErrorContains(t, err, "neither")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "sbxrun.toml"), []byte("memory = '2g'\n"), 0o600))
	_, err = applyFile(&c.flags, dir)
	require.NoError(t, err)
	assert.Equal(t, int64(2<<30), c.opts.(*runOptions).memory)
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"1g", "-1", "1.5 MiB", "NaN", "9e99", "999999999999t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := parseSize(s); err == nil && n < 0 {
			t.Fatalf("%q is %d", s, n)
		}
	})
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"1", "1.5s", "-1", "NaN", "9223372036.9", "1e99"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDuration(s)
		if err == nil && d < 0 {
			t.Fatalf("%q is %v", s, d)
		}
		if err == nil && d == 0 && strings.ContainsAny(s, "123456789") && !strings.ContainsAny(s, "nuµμ") {
			t.Fatalf("%q is no limit", s)
		}
	})
}

func FuzzParseVolume(f *testing.F) {
	for _, s := range []string{"/a:/b:ro", "a:b", "::", "/a:/b:O,z"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := parseVolume(s)
		if err != nil {
			return
		}
		if !filepath.IsAbs(v.Source) || v.Target == "" || strings.Contains(v.Source+v.Target, "\x00") || !strings.Contains("ro rw O", v.Mode) {
			t.Fatalf("%q is %+v", s, v)
		}
	})
}

func FuzzSettings(f *testing.F) {
	for _, s := range []string{"memory='1g'", "[tool.sbxrun]\ncpus=1", "env={A=1}", "volume=['a:b']", "max_cpu_percent=50", "x=[[]]"} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(dir, "sbxrun.toml")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c := newCommand(newUI(), runVerb())
		if _, err := applyFile(&c.flags, path); err == nil {
			_, _ = c.opts.(*runOptions).spec([]string{"true"})
		}
	})
}

func TestRates(t *testing.T) {
	var got []runtime.IORate
	bytes, operations := rateValue{&got, ioRates[0]}, rateValue{&got, ioRates[3]}
	for _, s := range []string{"", "/dev/sda", "/dev/sda:", ":1m", "/dev/sda:0", "/dev/sda:-1", "/dev/sda:1x"} {
		if bytes.Set(s) == nil || operations.Set(s) == nil {
			t.Errorf("%q accepted", s)
		}
	}
	if operations.Set("/dev/sda:1m") == nil || operations.Set("/dev/sda:1.5") == nil {
		t.Error("a size is no number of operations")
	}
	for _, err := range []error{bytes.Set("/dev/disk/by-path/a:b:1m"), operations.Set("/dev/sda:50")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []runtime.IORate{{Device: "/dev/disk/by-path/a:b", ReadBPS: 1 << 20}, {Device: "/dev/sda", WriteIOPS: 50}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestAgesOfEnvironmentsHaveAUnit(t *testing.T) {
	for in, want := range map[string]time.Duration{"30d": 720 * time.Hour, "12h": 12 * time.Hour, "0": 0, "30": -1, "1.5": -1, "": -1} {
		var v time.Duration
		if err := (daysValue{&v}).Set(in); err != nil {
			v = -1
		}
		if v != want {
			t.Errorf("%q: %v, want %v", in, v, want)
		}
	}
}
