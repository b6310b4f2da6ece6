package egress

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

// journal stands between the data path, which must not wait, and a log that may.
type journal struct {
	queue chan netns.Decision
	lost  atomic.Int64
	done  chan struct{}
}

const journalSize = 1024

func openJournal(log func(netns.Decision)) *journal {
	j := &journal{queue: make(chan netns.Decision, journalSize), done: make(chan struct{})}
	go func() {
		defer close(j.done)
		for d := range j.queue {
			if log == nil {
				continue
			}
			log(d)
			if n := j.lost.Swap(0); n > 0 {
				log(netns.Decision{Time: time.Now(), Via: d.Via, Rule: fmt.Sprintf("%d decisions were not logged: they came too fast", n)})
			}
		}
	}()
	return j
}

func (j *journal) note(d netns.Decision) {
	select {
	case j.queue <- d:
	default:
		j.lost.Add(1)
	}
}

// close waits until the log has everything. Nothing may be noted any more.
func (j *journal) close() error {
	close(j.queue)
	<-j.done
	return nil
}
