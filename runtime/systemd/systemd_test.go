package systemd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// listen stands in for systemd or the journal.
func listen(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	require.NoError(t, err)
	require.NoError(t, c.SetReadDeadline(time.Now().Add(10*time.Second)))
	t.Cleanup(func() { c.Close() })
	return c
}

func next(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	b := make([]byte, 1<<16)
	n, err := c.Read(b)
	require.NoError(t, err)
	return string(b[:n])
}

func TestConmonTellsHowTheCommandIs(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "notify"), "@sbxrun-test-" + strconv.Itoa(os.Getpid())} {
		manager := listen(t, path)
		t.Setenv("NOTIFY_SOCKET", path)
		t.Setenv("WATCHDOG_USEC", "20000")
		t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
		s, err := Find("")
		require.NoError(t, err)
		s.Started("runs\nMAINPID=1")
		require.Equal(t, "STATUS=runs?MAINPID=1\nREADY=1", next(t, manager), "a status is one line")
		beat, stop := s.Beat()
		<-beat
		s.Alive()
		stop()
		require.Equal(t, "WATCHDOG=1", next(t, manager))
		s.Stopping("ends")
		require.Equal(t, "STOPPING=1\nSTATUS=ends", next(t, manager))
		require.NoError(t, s.Close())
	}
}

func TestNobodyIsTold(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	s, err := Find(NotifyConmon)
	require.NoError(t, err)
	require.Nil(t, s)
	s.Started("")
	s.Stopping("")
	s.Alive()
	s.Status("")
	beat, stop := s.Beat()
	require.Nil(t, beat)
	stop()
	require.NoError(t, s.Close())

	t.Setenv("NOTIFY_SOCKET", "/run/nowhere")
	s, err = Find(NotifyIgnore)
	require.NoError(t, err)
	require.Nil(t, s)
	s, err = Find(NotifyConmon)
	require.NoError(t, err)
	s.Started("x") // who is not there hears nothing
	require.NoError(t, s.Close())
}

func TestBadSocketsAndWordsAreRefused(t *testing.T) {
	_, err := Find("healthy")
	require.ErrorContains(t, err, "not conmon, container or ignore")
	for _, bad := range []string{"relative", "/", "@", "vsock:2:1234", "/" + strings.Repeat("x", 200)} {
		t.Setenv("NOTIFY_SOCKET", bad)
		_, err := Find("")
		require.Error(t, err, bad)
	}
}

func TestWatchdogOfAnotherProcessIsNotOurs(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/run/x")
	t.Setenv("WATCHDOG_USEC", "1000000")
	t.Setenv("WATCHDOG_PID", "1")
	s, err := Find("")
	require.NoError(t, err)
	require.Zero(t, s.Watchdog)
	require.NoError(t, s.Close())
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	s, err = Find(NotifyContainer)
	require.NoError(t, err)
	require.Equal(t, time.Second, s.Watchdog)
	beat, stop := s.Beat()
	require.Nil(t, beat, "the command answers itself")
	stop()
	require.NoError(t, s.Close())
}

func TestFilterKeepsWhatACommandMaySayOfItself(t *testing.T) {
	for in, want := range map[string]string{
		"READY=1":                            "READY=1",
		"READY=2":                            "",
		"STATUS=a\x1b[1m":                    "STATUS=a?[1m",
		"STATUS=" + strings.Repeat("x", 999): "STATUS=" + strings.Repeat("x", maxStatus),
		"WATCHDOG=1":                         "WATCHDOG=1",
		"WATCHDOG=trigger":                   "WATCHDOG=trigger",
		"WATCHDOG_USEC=1":                    "",
		"MAINPID=1":                          "",
		"MAINPIDFD=1":                        "",
		"FDSTORE=1\nFDNAME=x":                "",
		"ERRNO=2":                            "",
		"BUSERROR=x":                         "",
		"NOTIFYACCESS=all":                   "",
		"EXTEND_TIMEOUT_USEC=5000000":        "EXTEND_TIMEOUT_USEC=5000000",
		"EXTEND_TIMEOUT_USEC=-1":             "",
		"RELOADING=1\nMONOTONIC_USEC=12\n":   "RELOADING=1\nMONOTONIC_USEC=12",
		"STOPPING=1\nMAINPID=7\nX_Y=1":       "STOPPING=1",
		"":                                   "",
		"READY":                              "",
	} {
		require.Equal(t, want, strings.Join(Filter(in), "\n"), "%q", in)
	}
}

func TestRelayPassesOnAndSlowsDown(t *testing.T) {
	manager := listen(t, filepath.Join(t.TempDir(), "notify"))
	t.Setenv("NOTIFY_SOCKET", manager.LocalAddr().String())
	s, err := Find(NotifyContainer)
	require.NoError(t, err)
	inside := t.TempDir()
	dir, err := os.Open(inside)
	require.NoError(t, err)
	defer dir.Close()
	r, err := Listen(int(dir.Fd()), os.Getuid(), os.Getgid())
	require.NoError(t, err)
	r.Serve(s)
	command, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: filepath.Join(inside, "notify.sock"), Net: "unixgram"})
	require.NoError(t, err)
	defer command.Close()
	say := func(msg string, rights ...int) {
		var oob []byte
		if len(rights) > 0 {
			oob = unix.UnixRights(rights...)
		}
		raw, err := command.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Write(func(fd uintptr) bool {
			err = unix.Sendmsg(int(fd), []byte(msg), oob, nil, 0)
			return !errors.Is(err, unix.EAGAIN)
		}))
		require.NoError(t, err)
	}
	say("MAINPID=1")
	say(strings.Repeat("READY=1\n", 1000)) // too long
	say("READY=1\nMAINPID=1", int(dir.Fd()))
	require.Equal(t, "READY=1", next(t, manager))
	start := time.Now()
	for range 2 * relayBurst / 5 {
		for range 5 { // no more than fit into the queues
			say("WATCHDOG=1")
		}
		for range 5 {
			require.Equal(t, "WATCHDOG=1", next(t, manager))
		}
	}
	require.Greater(t, time.Since(start), (relayBurst-5)*relayEvery)
	say("STATUS=last")
	require.NoError(t, r.Close())
	require.NoError(t, s.Close())
	require.Equal(t, "STATUS=last", next(t, manager), "what was said before the end is passed on")
}

func TestAManagerThatDoesNotListenHoldsNobodyUp(t *testing.T) {
	manager := listen(t, filepath.Join(t.TempDir(), "notify"))
	t.Setenv("NOTIFY_SOCKET", manager.LocalAddr().String())
	s, err := Find("")
	require.NoError(t, err)
	defer s.Close()
	blocked := false
	for range 2000 { // more than any queue takes
		start := time.Now()
		s.Alive()
		if d := time.Since(start); d > patience/2 {
			require.Less(t, d, 10*patience)
			blocked = true
			break
		}
	}
	require.True(t, blocked)
}

func TestListenedIsForThisProcessOnly(t *testing.T) {
	t.Setenv("LISTEN_FDS", "2")
	t.Setenv("LISTEN_FDNAMES", "a:b")
	t.Setenv("LISTEN_PID", "1")
	n, _, err := Listened()
	require.NoError(t, err)
	require.Zero(t, n)
	t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	n, names, err := Listened()
	require.NoError(t, err)
	require.Equal(t, 2, n)
	require.Equal(t, "a:b", names)
	for _, bad := range []string{"x", "-1", "65"} {
		t.Setenv("LISTEN_FDS", bad)
		_, _, err := Listened()
		require.Error(t, err, bad)
	}
}

func TestOnlyHarmlessDescriptorsArePassed(t *testing.T) {
	open := func(path string, flags int) int {
		fd, err := unix.Open(path, flags, 0)
		require.NoError(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	socket := func(domain int) int {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM, 0)
		require.NoError(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	for _, fd := range []int{open("/proc/self/status", 0), open(os.DevNull, unix.O_RDWR), socket(unix.AF_UNIX), socket(unix.AF_INET)} {
		require.NoError(t, check(fd))
	}
	for what, fd := range map[string]int{
		"a folder":      open("/", 0),
		"O_PATH":        open("/proc/self/status", unix.O_PATH),
		"namespace":     open("/proc/self/ns/mnt", 0),
		"not open":      999,
		"a folder ":     open("/", unix.O_DIRECTORY),
		"not open,":     open(os.DevNull, unix.O_CLOEXEC), // our own
		"is not passed": epoll(t),
	} {
		require.ErrorContains(t, check(fd), strings.Trim(what, " ,"), what)
	}
	require.True(t, OfNetwork(os.NewFile(uintptr(socket(unix.AF_INET)), "")))
	require.False(t, OfNetwork(os.NewFile(uintptr(socket(unix.AF_UNIX)), "")))
}

func epoll(t *testing.T) int {
	fd, err := unix.EpollCreate1(0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestJournalEntry(t *testing.T) {
	c := listen(t, filepath.Join(t.TempDir(), "socket"))
	defer func(old string) { journalSocket = old }(journalSocket)
	journalSocket = c.LocalAddr().String()
	require.NoError(t, Journal(Field{"MESSAGE", "two\nlines"}, Field{"EMPTY", ""}, Field{"PRIORITY", "6"}))
	require.Equal(t, "MESSAGE\n\x09\x00\x00\x00\x00\x00\x00\x00two\nlines\nPRIORITY=6\n", next(t, c))
	journalSocket = "/run/nowhere"
	require.Error(t, Journal(Field{"MESSAGE", "x"}))
}

func TestJournaledComparesTheDescriptor(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	require.NoError(t, err)
	defer f.Close()
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(int(f.Fd()), &st))
	t.Setenv("JOURNAL_STREAM", "")
	require.False(t, Journaled(int(f.Fd())))
	t.Setenv("JOURNAL_STREAM", strconv.FormatUint(st.Dev, 10)+":"+strconv.FormatUint(st.Ino, 10))
	require.True(t, Journaled(int(f.Fd())))
	require.False(t, Journaled(1<<20))
	t.Setenv("JOURNAL_STREAM", "1:1")
	require.False(t, Journaled(int(f.Fd())))
}

func FuzzFilter(f *testing.F) {
	f.Add("READY=1\nSTATUS=x\nMAINPID=1")
	f.Fuzz(func(t *testing.T, msg string) {
		for _, line := range Filter(msg) {
			k, v, ok := strings.Cut(line, "=")
			if !ok || strings.ContainsAny(line, "\n\x00") || len(v) > maxMessage {
				t.Fatalf("%q", line)
			}
			switch k {
			case "READY", "STATUS", "WATCHDOG", "RELOADING", "STOPPING", "EXTEND_TIMEOUT_USEC", "MONOTONIC_USEC":
			default:
				t.Fatalf("%q", line)
			}
		}
	})
}

func TestUnitOfTheCallerIsInItsCgroup(t *testing.T) {
	for cgroups, want := range map[string]string{
		"0::/system.slice/job.service\n":                               "job.service",
		"0::/system.slice/system-job.slice/job@1.service/supervisor\n": "job@1.service",
		"0::/user.slice/user-0.slice/session-3.scope\n":                "session-3.scope",
		"0::/sbxrun.slice/_cgroup.service\n":                           "cgroup.service",
		"0::/\n":                                                       "",
		"0::/init.scope\n":                                             "init.scope",
		"0::/job/x.service\n":                                          "",
		"4:memory:/a.service\n1:name=systemd:/system.slice/b.service\n0::/c.service\n": "b.service",
		"": "",
	} {
		require.Equal(t, want, unitOf(cgroups), cgroups)
	}
}
