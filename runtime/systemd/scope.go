package systemd

import "time"

// ScopeRequest asks for a transient scope: runtime/systemd/scope makes it, in
// the second binary. A limit that is not above 0 is none; but SwapBytes, which
// counts with MemoryBytes, is none only below 0.
type ScopeRequest struct {
	Unit, Slice, Description string
	PID                      int           // its first process
	StopTimeout              time.Duration // after which systemd kills what it asked to stop; 0 is systemd's default

	MemoryBytes, SwapBytes          int64
	MemoryLowBytes, MemoryHighBytes int64
	CPUs                            float64
	CPUWeight                       int64
	CPUSet, CPUSetMems              string // lists, as 0-1,3
	Pids                            int64
	IO                              []IORate
}

// IORate bounds what goes to and from one disk, by the path of its device.
type IORate struct {
	Device                                 string
	ReadBPS, WriteBPS, ReadIOPS, WriteIOPS int64
}
