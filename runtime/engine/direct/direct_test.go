package direct

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/engine"
	"github.com/sbxrun/sbxrun/runtime/pid1"
	"github.com/sbxrun/sbxrun/test/need"
)

const testIDs = 0x70000000 + 4001*65536 // a range no other test uses

// begun starts a real pid 1 as far as its namespaces, and gives the end of its
// status pipe.
func begun(t *testing.T) (*launch, *os.File) {
	t.Helper()
	need.Root(t)
	need.UserNS(t)
	status, w, err := os.Pipe()
	require.NoError(t, err)
	life, lifeW, err := os.Pipe()
	require.NoError(t, err)
	init, err := pid1.Open()
	require.NoError(t, err)
	b, err := Engine{}.Begin(&engine.Launch{IDBase: testIDs, IDSize: 65536}, engine.Files{Init: init, Status: w, Lifeline: life})
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, b.Abort())
		for _, f := range []*os.File{status, life, lifeW, init} {
			require.NoError(t, f.Close())
		}
	})
	_, err = b.UserNS()
	require.NoError(t, err)
	w.Close()
	return b.(*launch), status
}

func TestUserNamespaceHasItsIDsAndNoGroups(t *testing.T) {
	b, _ := begun(t)
	read := func(name string) string {
		raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(b.pid), name))
		require.NoError(t, err)
		return strings.Join(strings.Fields(string(raw)), " ")
	}
	ids := "0 " + strconv.Itoa(testIDs) + " 65536"
	require.Equal(t, ids, read("uid_map"))
	require.Equal(t, ids, read("gid_map"))
	require.Equal(t, "deny", read("setgroups"))
	require.Contains(t, read("status"), "Groups: NStgid")
	var theirs, ours unix.Stat_t
	for _, ns := range []string{"user", "pid"} {
		require.NoError(t, unix.Stat("/proc/"+strconv.Itoa(b.pid)+"/ns/"+ns, &theirs))
		require.NoError(t, unix.Stat("/proc/self/ns/"+ns, &ours))
		require.NotEqual(t, ours.Ino, theirs.Ino, ns)
	}
}

// order is a message as hand sends it, with a wrong length where asked.
func order(length int, ops ...[]byte) []byte {
	buf := make([]byte, 8)
	for _, o := range ops {
		buf = append(buf, o...)
	}
	if length < 0 {
		length = len(buf) - 8
	}
	binary.NativeEndian.PutUint32(buf[4:], uint32(length))
	return buf
}

func TestDamagedOrdersAreRefused(t *testing.T) {
	good := (&op{code: opHostname, data: []string{"x"}}).append(nil)
	change := func(f func(b []byte)) []byte {
		b := append([]byte{}, good...)
		f(b)
		return b
	}
	length := func(n uint32) []byte {
		return change(func(b []byte) { binary.NativeEndian.PutUint32(b[4:], n) })
	}
	for name, c := range map[string]struct {
		msg   []byte
		stage pid1.Stage
	}{
		"no header":               {[]byte{1, 2, 3}, pid1.StageControl},
		"length beyond message":   {order(4096, good), pid1.StageControl},
		"length below message":    {order(8, good), pid1.StageControl},
		"rest of an operation":    {order(-1, good, []byte{1, 2, 3, 4, 5, 6, 7, 8}), pid1.StageOp},
		"operation of no length":  {order(-1, length(0)), pid1.StageOp},
		"operation too short":     {order(-1, length(24)), pid1.StageOp},
		"operation too long":      {order(-1, length(4096)), pid1.StageOp},
		"odd length":              {order(-1, length(31)), pid1.StageOp},
		"no NUL at the end":       {order(-1, change(func(b []byte) { b[len(b)-1] = 'x' })), pid1.StageOp},
		"unknown operation":       {order(-1, change(func(b []byte) { b[0] = 200 })), pid1.StageOp},
		"slot that is not there":  {order(-1, (&op{code: opJoin, a: 7}).append(nil)), pid1.StageOp},
		"negative slot":           {order(-1, (&op{code: opJoin, a: -1}).append(nil)), pid1.StageOp},
		"slot beyond the table":   {order(-1, (&op{code: opAttach, a: 0, b: 1 << 30, data: []string{"/x"}}).append(nil)), pid1.StageOp},
		"mount in a taken slot":   {order(-1, (&op{code: opFsmount, a: 0, data: []string{"tmpfs"}}).append(nil)), pid1.StageOp},
		"record that is not sent": {append(binary.NativeEndian.AppendUint32(nil, 9), 0, 0, 0, 0), pid1.StageOp},
	} {
		t.Run(name, func(t *testing.T) {
			b, status := begun(t)
			require.NoError(t, unix.Sendmsg(b.control, c.msg, nil, nil, unix.MSG_NOSIGNAL))
			m, err := pid1.ReadMessage(status)
			require.NoError(t, err)
			require.Equal(t, pid1.Failed, m.Kind)
			require.Equal(t, c.stage, m.Stage, "%s: %v", m.Stage, m.Errno)
			require.Equal(t, unix.EINVAL, m.Errno)
			require.Error(t, b.Explain(m))
		})
	}
}

func TestAbortEndsPid1(t *testing.T) {
	b, status := begun(t)
	pid := b.pid
	require.NoError(t, b.Abort())
	require.ErrorIs(t, unix.Kill(pid, 0), unix.ESRCH)
	_, err := pid1.ReadMessage(status)
	require.Error(t, err)
	require.NoError(t, b.Abort())
}

func launchOf() *engine.Launch {
	return &engine.Launch{
		Hostname: "box", Cwd: "/work", UID: 1000, GID: 1001, IDBase: testIDs, IDSize: 65536,
		MaskPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
		Mounts: []engine.Mount{
			{Type: "proc", Source: "proc", Target: "/proc", Flags: unix.MS_NOSUID},
			{Type: "tmpfs", Source: "tmpfs", Target: "/dev"},
			{Type: "devpts", Source: "devpts", Target: "/dev/pts", Data: "newinstance,gid=5"},
		},
	}
}

// words is a part as one reads it.
func words(t *part) string {
	var b strings.Builder
	for _, o := range t.ops {
		b.WriteString(strings.TrimSpace(o.what + " " + o.object))
		b.WriteByte('\n')
	}
	return b.String()
}

func TestCompiledOrder(t *testing.T) {
	var p program
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	l := launchOf()
	l.CgroupTasks = []*os.File{null}
	before, err := p.before(l, null, nil)
	require.NoError(t, err)
	require.Equal(t, `enter cgroup /dev/null
make cgroup namespace
become the sandbox's root
set host name box
empty the bounding set
attach procfs
attach /dev
hide /proc/kcore
hide /proc/sys
make devpts for /dev/pts
`, words(before))
	l.Root = null
	l.ReadOnly = true
	inside, record, err := p.inside(l, []engine.Mount{{Type: "bind", Target: "/usr", Tree: null}}, null, nil)
	require.NoError(t, err)
	require.Equal(t, `attach root
mount on /proc
mount on /dev
mount on /usr
mount on /dev/pts
make working directory /work
make root read-only
enter root
enter working directory /work
drop privileges
`, words(inside))
	// Slots are counted as pid 1 counts them: procfs, what came, what it made.
	require.Equal(t, []int32{0, 1, 2, 3}, []int32{procSlot, p.dev, before.ops[0].a, p.devpt})
	require.EqualValues(t, 4, record)
	require.Len(t, p.ops, len(before.ops)+len(inside.ops))
}

func TestWhatThisEngineDoesNotKnowIsRefused(t *testing.T) {
	for name, change := range map[string]func(*engine.Launch){
		"mount":      func(l *engine.Launch) { l.Mounts = append(l.Mounts, engine.Mount{Type: "sysfs", Target: "/sys"}) },
		"other proc": func(l *engine.Launch) { l.Mounts[0].Target = "/other" },
		"mask":       func(l *engine.Launch) { l.MaskPaths = []string{"/sys/firmware"} },
	} {
		t.Run(name, func(t *testing.T) {
			l := launchOf()
			change(l)
			var p program
			_, err := p.before(l, os.Stdin, nil)
			require.ErrorContains(t, err, "launch: ")
		})
	}
	l := launchOf()
	var p program
	_, err := p.before(l, os.Stdin, nil)
	require.NoError(t, err)
	many := make([]engine.Mount, maxFDs)
	for i := range many {
		many[i] = engine.Mount{Type: "bind", Target: "/x", Tree: os.Stdin}
	}
	_, _, err = p.inside(l, many, os.Stdin, nil)
	require.ErrorIs(t, err, unix.E2BIG)
}

func TestDevIsOurs(t *testing.T) {
	need.Root(t)
	dev, binds, err := makeDev(&engine.Launch{IDBase: testIDs, TTY: true, Mounts: []engine.Mount{{Type: "tmpfs", Target: "/dev", Flags: unix.MS_NOSUID | unix.MS_NOEXEC}}})
	require.NoError(t, err)
	defer dev.Close()
	require.Empty(t, binds, "this machine makes nodes")
	for _, n := range devNodes {
		var st unix.Stat_t
		require.NoError(t, unix.Fstatat(int(dev.Fd()), n.name, &st, unix.AT_SYMLINK_NOFOLLOW))
		require.EqualValues(t, unix.S_IFCHR|0o666, st.Mode, n.name)
		require.Equal(t, unix.Mkdev(n.major, n.minor), st.Rdev, n.name)
	}
	var fs unix.Statfs_t
	require.NoError(t, unix.Fstatfs(int(dev.Fd()), &fs))
	require.EqualValues(t, unix.TMPFS_MAGIC, fs.Type)
	require.NotZero(t, fs.Flags&unix.ST_NOEXEC)
	require.NotZero(t, fs.Flags&unix.ST_NOSUID)
}
