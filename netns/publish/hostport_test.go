package publish

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
)

// A client inside reaches a server that listens on the host's 127.0.0.1 only,
// both ways to the end; where none listens it is told so.
func TestAPortOfTheHostIsReachedFromInside(t *testing.T) {
	s := newSandbox(t)
	host, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer host.Close()
	port := host.Addr().(*net.TCPAddr).Port
	f, _, err := Open(s.in, netns.Options{HostPorts: []netns.HostPort{{ContainerPort: 7000, HostPort: port}, {ContainerPort: 7001, HostPort: 1}}}, s.note)
	require.NoError(t, err)
	defer f.Close()
	go func() {
		for {
			c, err := host.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				_, _ = c.Write(append([]byte("host:"), b...))
			}()
		}
	}()
	dial := func(addr string) (c *net.TCPConn) {
		require.NoError(t, s.in.Do(func() error {
			n, err := net.DialTimeout("tcp", addr, 5*time.Second)
			if err == nil {
				c = n.(*net.TCPConn)
			}
			return err
		}))
		return c
	}
	c := dial("127.0.0.1:7000")
	_, err = io.WriteString(c, "hello")
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	assert.Equal(t, "host:hello", string(b))
	c.Close()

	require.ErrorIs(t, s.in.Do(func() error {
		c, err := net.DialTimeout("tcp", "127.0.0.1:7001", 5*time.Second)
		if err == nil { // else it was reset even before
			defer c.Close()
			_, err = io.ReadAll(c)
		}
		return err
	}), unix.ECONNRESET)
	require.NoError(t, f.Close())
	conns, in, out := f.Stats()
	assert.Equal(t, []int64{1, 10, 5}, []int64{conns, in, out}, "connections, bytes into and out of the namespace")
	for _, d := range s.noted() {
		assert.Equal(t, "host-port", d.Via)
	}
}

func TestAPortInsideLeadsToOnePlace(t *testing.T) {
	s := newSandbox(t)
	_, _, err := Open(s.in, netns.Options{HostPorts: []netns.HostPort{{ContainerPort: 7000, HostPort: 1}, {ContainerPort: 7000, HostPort: 2}}}, nil)
	require.EqualError(t, err, `give "--host-port 7000:2": bind: address already in use`)
}
