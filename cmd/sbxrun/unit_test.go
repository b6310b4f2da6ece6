package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestUnitWord(t *testing.T) {
	for _, x := range []struct{ in, want string }{
		{"plain-1.0_x", "plain-1.0_x"},
		{"/a/b:c=d,e+f@g", "/a/b:c=d,e+f@g"},
		{"", `""`},
		{"two words", `"two words"`},
		{"100%", `"100%%"`},
		{"%n%%", `"%%n%%%%"`},
		{"$HOME", `"$$HOME"`},
		{"${HOME}", `"$${HOME}"`},
		{"$$", `"$$$$"`},
		{`say "hi"`, `"say \"hi\""`},
		{"it's", `"it's"`},
		{`back\slash\n`, `"back\\slash\\n"`},
		{"a\nb\tc\rd", `"a\nb\tc\x0dd"`},
		{"\x01\x1b\x7f", `"\x01\x1b\x7f"`},
		{"grüße, 世界 🎉", `"grüße, 世界 🎉"`},
		{"\u00a0\u2028\ufeff", `"\u00a0\u2028\ufeff"`},
		{"\U000e0001", `"\U000e0001"`},
		{";", `";"`},
		{"#", `"#"`},
		{"*?~[]{}", `"*?~[]{}"`},
		{`trailing\`, `"trailing\\"`},
	} {
		assert.Equal(t, x.want, unitWord(x.in, true), "%q", x.in)
	}
	assert.Equal(t, `"$x %%"`, unitWord("$x %", false))
}

// What systemd has no word for is refused.
func TestUnitRefusesWhatSystemdCannotName(t *testing.T) {
	for _, a := range []string{"\xff", "a\xc3", "nul\x00"} {
		o := &unitOptions{kind: "service"}
		assert.ErrorContains(t, o.judge(&service{dir: "/", exec: []string{"/b", a}}), "not UTF-8", "%q", a)
	}
	for _, p := range []string{"/a\nb", "/a\xff", "/a ", "/a\u00a0b"} {
		o := &unitOptions{kind: "service"}
		assert.ErrorContains(t, o.judge(&service{dir: p}), "cannot name", "%q", p)
		assert.ErrorContains(t, o.judge(&service{dir: "/", write: []string{p}}), "cannot name", "%q", p)
	}
}

func TestListens(t *testing.T) {
	for _, l := range []string{"80", "127.0.0.1:80", "[::1]:80", "/run/x.sock", "@abstract"} {
		assert.True(t, listens(l), l)
	}
	for _, l := range []string{"", "0", "65536", "x", "a b:80", "[::1:80", "/run/x y", "/run/%n", "80\nExecStart=/x", "::1:80"} {
		assert.False(t, listens(l), l)
	}
}

func packaged(name string) string { return filepath.Join("..", "..", "packaging", name) }

// The packaged template is what the verb writes. -update writes it.
func TestPackagedTemplateIsUpToDate(t *testing.T) {
	path := packaged("sbxrun@.service")
	want := templateService("/usr/local/bin/sbxrun").text()
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(want), 0o644)) //nolint:gosec // for all to read
	}
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, want, string(got), "go test ./cmd/sbxrun -run Packaged -update")
}

// systemd itself understands all that is written or packaged.
func TestSystemdUnderstandsUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skipf("needs systemd-analyze: %v", err)
	}
	dir := t.TempDir()
	put := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	names := []string{"sbxrun@.service", "sbxrun.slice", "sbxrun-gc.service", "sbxrun-gc.timer"}
	for _, n := range names {
		b, err := os.ReadFile(packaged(n))
		require.NoError(t, err)
		put(n, strings.ReplaceAll(string(b), "/usr/local/bin/sbxrun", "/bin/true"))
	}
	all := &service{
		description: "all", kind: "notify", dir: "/tmp", exec: []string{"/bin/true", "a b", "%n $x \"", "\n;", ";", "世界"},
		installed: true, restart: "on-failure", memoryMax: 1 << 30, write: []string{"/var/tmp/my data"}, load: []string{"a:/etc/hostname"}, home: true, tmp: true,
	}
	put("all.service", all.text())
	put("all.timer", timerText("all", "Mon *-*-* 04:00"))
	put("all.socket", socketText("all", []string{"8080", "[::1]:81", "/run/x.sock"}))
	for _, n := range append(names, "all.service", "all.timer", "all.socket") {
		cmd := exec.Command("systemd-analyze", "verify", "--man=no", filepath.Join(dir, n))
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":", "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		assert.NoError(t, err, "%s: %s", n, out)
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, dir) && !strings.Contains(line, "DelegateSubgroup") { // systemd 254
				t.Errorf("%s: %s", n, line)
			}
		}
	}
}

// The figure of systemd-analyze security: it may fall, and rise only for a reason.
func TestExposureOfUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skipf("needs systemd-analyze: %v", err)
	}
	for name, most := range map[string]string{"sbxrun@.service": "53", "sbxrun-gc.service": "30"} {
		out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold="+most, packaged(name)).CombinedOutput()
		if strings.Contains(string(out), "unrecognized option") || strings.Contains(string(out), "Unknown") {
			t.Skip("needs systemd 250")
		}
		assert.NoError(t, err, "%s: %s", name, out)
	}
}
