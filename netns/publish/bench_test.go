package publish

import (
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/need"
)

// What a published port costs over the host's own loopback: bytes out of the
// namespace, round trips, and connections.
func BenchmarkPort(b *testing.B) {
	need.Root(b)
	ns, err := netns.New()
	require.NoError(b, err)
	defer ns.Close()
	in, err := ns.Enter()
	require.NoError(b, err)
	defer in.Close()
	var inside net.Listener
	require.NoError(b, in.Do(func() (err error) { inside, err = net.Listen("tcp", "127.0.0.1:80"); return err }))
	defer inside.Close()
	host, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(b, err)
	defer host.Close()
	f, ports, err := Open(in, netns.Options{Publish: []netns.Port{{Proto: "tcp", HostIP: "127.0.0.1", ContainerPort: 80}}}, nil)
	require.NoError(b, err)
	defer f.Close()
	for _, l := range []net.Listener{inside, host} {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { // the first byte says what is wanted
					defer c.Close()
					first := make([]byte, 1)
					if _, err := io.ReadFull(c, first); err != nil {
						return
					}
					for block := make([]byte, 128<<10); first[0] == 's'; {
						if _, err := c.Write(block); err != nil {
							return
						}
					}
					_, _ = c.Write(first)
					_, _ = io.Copy(c, c)
				}()
			}
		}()
	}
	for _, at := range []struct{ name, addr string }{{"loopback", host.Addr().String()}, {"published", ports[0].Host()}} {
		begin := func(b *testing.B, how string) net.Conn {
			c, err := net.Dial("tcp", at.addr)
			require.NoError(b, err)
			_, err = io.WriteString(c, how)
			require.NoError(b, err)
			return c
		}
		b.Run(at.name+"/stream", func(b *testing.B) {
			c := begin(b, "s")
			defer c.Close()
			block := make([]byte, 1<<20)
			b.SetBytes(int64(len(block)))
			for b.Loop() {
				_, err := io.ReadFull(c, block)
				require.NoError(b, err)
			}
		})
		b.Run(at.name+"/roundtrip", func(b *testing.B) {
			c := begin(b, "e")
			defer c.Close()
			one := make([]byte, 1)
			for b.Loop() {
				_, err := io.ReadFull(c, one)
				require.NoError(b, err)
				_, err = c.Write(one)
				require.NoError(b, err)
			}
		})
		b.Run(at.name+"/connect", func(b *testing.B) {
			for b.Loop() {
				c := begin(b, "e")
				_, err := io.ReadFull(c, make([]byte, 1))
				require.NoError(b, err)
				c.Close()
			}
		})
	}
}
