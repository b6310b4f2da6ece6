package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
	"github.com/sbxrun/sbxrun/test/need"
)

// The proxy of a bake is sbxrun-oci's: it answers inside the namespace, tells
// whom it refused, and is gone when it is not wanted any more.
func TestEgressTellsWhomItRefused(t *testing.T) {
	need.Root(t)
	need.Python(t)
	t.Setenv("PATH", filepath.Dir(need.Binary(t))+":"+os.Getenv("PATH"))
	ns, denied, err := openEgress(ask.Egress{Listen: proxyAddress, Allow: []string{"index.test"}})
	require.NoError(t, err)
	out, err := exec.Command("nsenter", "--net="+ns, "python3", "-c", `
import socket
for host in "other.test", "other.test", "more.test":
    s = socket.create_connection(("127.0.0.1", 3128), 10)
    s.sendall(b"CONNECT %s:443 HTTP/1.1\r\nHost: x\r\n\r\n" % host.encode())
    print(s.recv(100).split()[1].decode())
`).CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Equal(t, "403\n403\n403\n", string(out))
	assert.Equal(t, []string{"other.test:443", "more.test:443"}, denied())
	require.Eventually(t, func() bool { _, err := os.Stat(ns); return err != nil }, 10*time.Second, 10*time.Millisecond)
	_, _, err = openEgress(ask.Egress{Listen: "nowhere", Allow: nil})
	require.ErrorContains(t, err, "nowhere", "its error is ours")
}
