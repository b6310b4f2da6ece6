package scope

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/runtime/systemd"
)

func TestPropertiesAreSystemdsWords(t *testing.T) {
	text := func(r systemd.ScopeRequest) string {
		p, err := properties(r, ":1.7")
		require.NoError(t, err)
		var b strings.Builder
		for _, x := range p[7:] { // what every scope has comes first
			if !strings.HasSuffix(x.Name, "Accounting") {
				fmt.Fprintf(&b, "%s=%s %s\n", x.Name, x.Value.Signature(), x.Value)
			}
		}
		return b.String()
	}
	require.Empty(t, text(systemd.ScopeRequest{MemoryBytes: -1, SwapBytes: -1, CPUs: -1, Pids: -1}))
	require.Equal(t, "TimeoutStopUSec=t @t 2000000\nMemoryMax=t @t 1\nTasksMax=t @t 3\n",
		text(systemd.ScopeRequest{MemoryBytes: 1, SwapBytes: -1, Pids: 3, StopTimeout: 2 * time.Second}))
	require.Equal(t, `MemoryMax=t @t 64
MemorySwapMax=t @t 0
MemoryLow=t @t 16
MemoryHigh=t @t 32
CPUWeight=t @t 50
CPUQuotaPerSecUSec=t @t 1500000
AllowedCPUs=ay @ay [0xb, 0x1]
AllowedMemoryNodes=ay @ay [0x1]
IOReadBandwidthMax=a(st) @a(st) [("/dev/vda", 7,)]
IOWriteIOPSMax=a(st) @a(st) [("/dev/vda", 9,), ("/dev/vdb", 10,)]
`, text(systemd.ScopeRequest{
		MemoryBytes: 64, MemoryLowBytes: 16, MemoryHighBytes: 32, CPUs: 1.5, CPUWeight: 50, CPUSet: "0-1,3,8", CPUSetMems: "0",
		IO: []systemd.IORate{{Device: "/dev/vda", ReadBPS: 7, WriteIOPS: 9}, {Device: "/dev/vdb", WriteIOPS: 10}},
	}))
}

func TestBadListsOfCPUs(t *testing.T) {
	for _, bad := range []string{"", "x", "3-1", "1-", "-1", "99999", "0,,1"} {
		_, err := bits(bad)
		require.Error(t, err, bad)
	}
}
