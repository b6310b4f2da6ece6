package main

import (
	"bytes"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func newTestUI() (*ui, *bytes.Buffer, *bytes.Buffer) {
	var out, err bytes.Buffer
	return &ui{stdout: &out, stderr: &err}, &out, &err
}

func TestErrorIsOneLineAndAHint(t *testing.T) {
	u, out, stderr := newTestUI()
	u.error(fmt.Errorf("run: %w", usage("do\tthis", "bad\n\x1b[31m\u009b31mvalue \xff")))
	assert.Empty(t, out.String())
	assert.Equal(t, "sbxrun: run: bad; ?[31m?31mvalue \ufffd\nhint: do?this\n", stderr.String())
	u, _, stderr = newTestUI()
	u.color = true
	u.error(usage("", "x"))
	assert.Equal(t, "\x1b[1;31msbxrun:\x1b[0m x\n", stderr.String())
}

func TestProgressIsPlainLinesWithoutATerminal(t *testing.T) {
	u, _, stderr := newTestUI()
	u.Phase("resolve", "requirements.txt")
	u.Phase("download", "3\npackages")
	u.Done()
	assert.Equal(t, "sbxrun: resolve   requirements.txt\nsbxrun: download  3; packages\n", stderr.String())
	u, _, stderr = newTestUI()
	u.quiet = true
	u.Phase("resolve", "x")
	u.note("killed")
	u.Done()
	assert.Empty(t, stderr.String())
}

func TestProgressIsOneLineOnATerminal(t *testing.T) {
	u, _, stderr := newTestUI()
	u.tty = true
	u.Phase("resolve", "a")
	u.Phase("install", "b")
	u.Done()
	s := stderr.String()
	assert.NotContains(t, s, "\n")
	assert.Contains(t, s, "install   b")
	assert.True(t, bytes.HasSuffix(stderr.Bytes(), []byte("\r\x1b[K")), "%q", s)
}

func TestDidYouMean(t *testing.T) {
	for in, want := range map[string]string{"rnu": "did you mean run?", "docter": "did you mean doctor?", "env lst": "did you mean env list?"} {
		assert.Contains(t, suggest(in), want)
	}
	assert.NotContains(t, suggest("python3"), "did you mean")
}

// The settings under examples are read as they stand.
func TestExamplesAreValid(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "examples", "*.toml"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, path := range files {
		c := newCommand(newUI(), runVerb())
		_, err = applyFile(&c.flags, path)
		require.NoError(t, err, path)
		o := c.opts.(*runOptions)
		require.NoError(t, o.check(&c.flags), path)
		_, err = o.spec([]string{"true"})
		require.NoError(t, err, path)
	}
}

// Every flag has a description, and verbs are found by their names.
func TestVerbs(t *testing.T) {
	for _, v := range verbs() {
		assert.NotEmpty(t, v.short, v.name)
		assert.NotPanics(t, func() { helpText(v) }, v.name)
	}
}
