package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
)

// disk has room for some bytes.
type disk struct {
	bytes.Buffer
	room int
}

func (d *disk) Write(b []byte) (int, error) {
	n := min(len(b), d.room)
	d.room -= n
	d.Buffer.Write(b[:n])
	if n < len(b) {
		return n, unix.ENOSPC
	}
	return n, nil
}

// A disk that was full for a while costs the decisions of that while.
func TestTheLogGoesOnWhenThereIsRoomAgain(t *testing.T) {
	d := &disk{room: 100}
	l := ledger{log: d}
	for range 3 {
		l.note(netns.Decision{Via: "dns", Host: "early.test"})
	}
	d.room = 1 << 20
	for range 2 {
		l.note(netns.Decision{Via: "dns", Host: "late.test"})
	}
	late := 0
	for line := range strings.Lines(d.String()) {
		var got netns.Decision
		if json.Unmarshal([]byte(line), &got) == nil && got.Host == "late.test" {
			late++
		}
	}
	require.Equal(t, 2, late, d.String())
}
