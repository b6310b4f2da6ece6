package pid1

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// start runs the real program as an ordinary process (pid 1 is not needed for
// what these tests look at) and returns its messages.
func start(t *testing.T, rec []byte, stdout io.Writer) (status *os.File, lifeline *os.File, cmd *exec.Cmd) {
	t.Helper()
	bin := t.TempDir() + "/init"
	require.NoError(t, os.WriteFile(bin, Binary, 0o755))
	f, err := os.CreateTemp(t.TempDir(), "record")
	require.NoError(t, err)
	_, err = f.WriteAt(rec, 0)
	require.NoError(t, err)
	sr, sw, err := os.Pipe()
	require.NoError(t, err)
	lr, lw, err := os.Pipe()
	require.NoError(t, err)
	cmd = exec.Command(bin)
	cmd.ExtraFiles = []*os.File{f, sw, lr}
	cmd.Stdout = stdout
	require.NoError(t, cmd.Start())
	sw.Close()
	lr.Close()
	f.Close()
	t.Cleanup(func() { sr.Close(); lw.Close(); cmd.Wait() })
	return sr, lw, cmd
}

func encode(t *testing.T, r Record) []byte {
	t.Helper()
	b, err := r.Encode()
	require.NoError(t, err)
	return b
}

func TestCommandGetsRawBytesAndItsExitStatusComesBack(t *testing.T) {
	var out bytes.Buffer
	odd := "a\xff\xfe b"
	s, _, cmd := start(t, encode(t, Record{
		Argv: []string{"sh", "-c", `printf '%s|%s' "$1" "$ODD"; exit 7`, "sh", odd}, Env: []string{"ODD=" + odd},
		Candidates: []string{"/nonexistent/sh", "/etc/passwd/sh", "/bin/sh"},
		Rlimits:    []Rlimit{{unix.RLIMIT_CORE, 0, 0}},
	}), &out)
	m, err := ReadMessage(s)
	require.NoError(t, err)
	require.Equal(t, Started, m.Kind)
	m, err = ReadMessage(s)
	require.NoError(t, err)
	require.Equal(t, Exited, m.Kind)
	require.True(t, m.WaitStatus.Exited())
	require.Equal(t, 7, m.WaitStatus.ExitStatus())
	require.NoError(t, cmd.Wait())
	require.Equal(t, odd+"|"+odd, out.String())
}

func TestExecFailuresAreTold(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(dir+"/plain", []byte("x"), 0o644))
	require.NoError(t, os.WriteFile(dir+"/noloader", []byte("#!/nonexistent/python\n"), 0o755))
	require.NoError(t, os.WriteFile(dir+"/garbage", []byte("not a program"), 0o755))
	for name, c := range map[string]struct {
		path  string
		stage Stage
		errno unix.Errno
	}{
		"missing":     {dir + "/none", StageExec, unix.ENOENT},
		"no x bit":    {dir + "/plain", StageExec, unix.EACCES},
		"a directory": {dir, StageExec, unix.EACCES},
		"no loader":   {dir + "/noloader", StageInterpreter, unix.ENOENT},
		"bad format":  {dir + "/garbage", StageExec, unix.ENOEXEC},
	} {
		t.Run(name, func(t *testing.T) {
			s, _, _ := start(t, encode(t, Record{Argv: []string{"x"}, Candidates: []string{c.path}}), nil)
			m, err := ReadMessage(s)
			require.NoError(t, err)
			require.Equal(t, Message{Kind: Failed, Stage: c.stage, Errno: c.errno}, m)
		})
	}
}

func TestSignalReachesTheCommandAndLifelineEndsAll(t *testing.T) {
	s, life, cmd := start(t, encode(t, Record{Argv: []string{"sleep", "60"}, Candidates: []string{"/bin/sleep"}}), nil)
	_, err := ReadMessage(s)
	require.NoError(t, err)
	life.Close()
	var ee *exec.ExitError
	require.ErrorAs(t, waitFor(t, cmd), &ee)
	require.Equal(t, 137, ee.ExitCode())
}

func waitFor(t *testing.T, cmd *exec.Cmd) error {
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(20 * time.Second):
		cmd.Process.Kill()
		t.Fatal("pid 1 outlived its supervisor")
		return nil
	}
}

func TestDamagedRecordIsRefused(t *testing.T) {
	good := encode(t, Record{Argv: []string{"true"}, Env: []string{"A=b"}, Candidates: []string{"/bin/true"}, Filter: make([]byte, 16)})
	for i := 0; i < 60; i++ {
		bad := bytes.Clone(good)
		bad[i] ^= 0x80
		s, _, cmd := start(t, bad, nil)
		m, err := ReadMessage(s)
		if err == nil && m.Kind == Failed {
			continue
		}
		err = waitFor(t, cmd)
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			require.False(t, ee.Sys().(interface{ Signaled() bool }).Signaled(), "byte %d: died of a signal", i)
		}
	}
}

func TestEncodeRefusesNULAndEmpty(t *testing.T) {
	_, err := (&Record{Argv: []string{"a\x00b"}, Candidates: []string{"/x"}}).Encode()
	require.ErrorContains(t, err, "NUL byte")
	_, err = (&Record{}).Encode()
	require.ErrorContains(t, err, "empty command")
}

// TestPassedDescriptorsAreTheCommandsFrom3Up: more than there is room for below
// the program's own, and nothing else beside them.
func TestPassedDescriptorsAreTheCommandsFrom3Up(t *testing.T) {
	for _, n := range []int{0, 1, 4, 9, 64} {
		rec := Record{
			Argv: []string{"sh", "-c", `i=3; while [ $i -lt $1 ]; do cat /dev/fd/$i; i=$((i+1)); done; set -- /proc/$$/fd/*; echo $#; echo pid $LISTEN_PID $$`, "sh", strconv.Itoa(3 + n)},
			Env:  []string{"PATH=/usr/bin:/bin"}, Candidates: []string{"/bin/sh"}, Passed: n, ListenPID: true,
		}
		dir := t.TempDir()
		record, err := rec.Seal()
		require.NoError(t, err)
		sr, sw, err := os.Pipe()
		require.NoError(t, err)
		lr, lw, err := os.Pipe()
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(dir+"/init", Binary, 0o755))
		cmd := exec.Command(dir + "/init")
		cmd.ExtraFiles = []*os.File{record, sw, lr, lr} // 6 is an engine's
		want := ""
		for i := range n {
			require.NoError(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, i), fmt.Appendf(nil, "%d\n", i), 0o600))
			f, err := os.Open(fmt.Sprintf("%s/%d", dir, i))
			require.NoError(t, err)
			defer f.Close()
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
			want += fmt.Sprintf("%d\n", i)
		}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		require.NoError(t, cmd.Start())
		sw.Close()
		lr.Close()
		for _, k := range []Kind{Started, Exited} {
			m, err := ReadMessage(sr)
			require.NoError(t, err)
			require.Equal(t, k, m.Kind, "%s: %v", m.Stage, m.Errno)
		}
		require.NoError(t, cmd.Wait())
		for _, f := range []*os.File{record, sr, lw} {
			f.Close()
		}
		got, pids, ok := strings.Cut(out.String(), "pid ")
		require.True(t, ok, out.String())
		require.Equal(t, want+strconv.Itoa(3+n+1)+"\n", got, "and the folder that the shell reads")
		a, b, _ := strings.Cut(strings.TrimSpace(pids), " ")
		require.Equal(t, a, b, "LISTEN_PID is the command's own, without leading zeros")
	}
}

func TestPassedDescriptorsThatAreNotThere(t *testing.T) {
	s, _, _ := start(t, encode(t, Record{Argv: []string{"true"}, Candidates: []string{"/bin/true"}, Passed: 2}), nil)
	m, err := ReadMessage(s)
	require.NoError(t, err)
	require.Equal(t, Message{Kind: Failed, Stage: StagePass, Errno: unix.EBADF}, m)
}

func TestHoldStaysUntilItsPipeIsClosed(t *testing.T) {
	bin := t.TempDir() + "/init"
	require.NoError(t, os.WriteFile(bin, Binary, 0o755))
	r, w, err := os.Pipe()
	require.NoError(t, err)
	cmd := exec.Command(bin, HoldArg)
	cmd.ExtraFiles = []*os.File{r}
	require.NoError(t, cmd.Start())
	r.Close()
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM)) // it is systemd's to send, and the sandbox's to heed
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, cmd.Process.Signal(unix.Signal(0)))
	require.NoError(t, w.Close())
	require.NoError(t, cmd.Wait())
}
