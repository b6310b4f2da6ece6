package routed

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

const (
	minRateBPS = 8_000
	maxRateBPS = 400_000_000_000
)

func checkRate(direction string, bps int64) error {
	if bps != 0 && (bps < minRateBPS || bps > maxRateBPS) {
		return hinted.New(fmt.Errorf("limit the %s rate to %d bit/s: out of range", direction, bps), "--net-rate takes 8kbit to 400gbit")
	}
	return nil
}

// The kernel's names, which x/sys lacks.
const (
	tcaTBFParms  = 1
	tcaTBFRate64 = 4
	tcaTBFBurst  = 6
)

// addTBF limits what an interface sends. A token bucket delays where an nft
// limit drops, so TCP keeps to it without retransmissions.
func (b *batch) addTBF(index uint32, bps int64, mtu int) {
	bytes := uint64(bps) / 8
	// 20 ms of the rate, and never less than a packet with its header: what is
	// larger (GSO) is cut up. A packet waits at most 50 ms longer.
	burst := max(bytes/50, uint64(mtu)+64, 4096)
	limit := bytes/20 + burst
	h := make([]byte, 20) // struct tcmsg
	binary.NativeEndian.PutUint32(h[4:], index)
	binary.NativeEndian.PutUint32(h[12:], 0xffffffff) // TC_H_ROOT
	b.begin("limit the rate (tbf)", unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, h)
	b.str(unix.TCA_KIND, "tbf")
	end := b.nest(unix.TCA_OPTIONS)
	q := make([]byte, 36) // struct tc_tbf_qopt
	q[1] = 1              // TC_LINKLAYER_ETHERNET: no rate table is needed
	binary.NativeEndian.PutUint32(q[8:], uint32(min(bytes, 0xffffffff)))
	binary.NativeEndian.PutUint32(q[24:], uint32(min(limit, 0xffffffff)))
	b.bytes(tcaTBFParms, q)
	if bytes > 0xffffffff {
		b.bytes(tcaTBFRate64, binary.NativeEndian.AppendUint64(nil, bytes))
	}
	b.u32(tcaTBFBurst, uint32(burst))
	end()
}
