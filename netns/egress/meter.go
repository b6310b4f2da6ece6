package egress

import (
	"sync"
	"sync/atomic"
	"time"
)

// bucket is a rate with a burst. Who spends more than there is owes it and
// waits, so that the rate holds for all spenders together. A nil one is no limit.
type bucket struct {
	perSecond, burst float64

	mu     sync.Mutex
	tokens float64
	last   time.Time
}

func newBucket(perSecond, burst float64) *bucket {
	if perSecond <= 0 {
		return nil
	}
	return &bucket{perSecond: perSecond, burst: burst, tokens: burst}
}

func (b *bucket) fill(now time.Time) {
	if d := now.Sub(b.last); d > 0 { // the first time it is more than enough
		b.tokens = min(b.burst, b.tokens+d.Seconds()*b.perSecond)
		b.last = now
	}
}

// spend takes n and gives the time to wait before going on.
func (b *bucket) spend(now time.Time, n int64) time.Duration {
	if b == nil {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fill(now)
	b.tokens -= float64(n)
	return time.Duration(max(0, -b.tokens/b.perSecond) * float64(time.Second))
}

// try takes one if there is one.
func (b *bucket) try(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fill(now)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// meter counts and slows one direction.
type meter struct {
	bytes atomic.Int64
	rate  *bucket
	chunk int64 // bytes to pass between two looks at the limits
}

// maxChunk is large enough for splice, limitedChunk small enough that a limit is
// passed by little: by one of each direction of each connection.
const (
	maxChunk     = 1 << 20
	limitedChunk = 64 << 10
	minChunk     = 4 << 10
)

func (m *meter) init(bitsPerSecond, maxBytes int64) {
	m.chunk = maxChunk
	if maxBytes > 0 {
		m.chunk = limitedChunk
	}
	if perSecond := float64(bitsPerSecond) / 8; perSecond > 0 {
		m.chunk = min(limitedChunk, max(minChunk, int64(perSecond/20)))
		m.rate = newBucket(perSecond, perSecond/10)
	}
}
