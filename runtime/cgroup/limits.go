package cgroup

// Limits are the limits the kernel's controllers enforce. For each field zero
// means "leave the controller's default", a negative value "no limit".
type Limits struct {
	MemoryBytes int64   `json:"memory_bytes"`          // memory.max / memory.limit_in_bytes
	SwapBytes   int64   `json:"swap_bytes"`            // swap on top of memory; 0 with MemoryBytes set forbids swap
	CPUs        float64 `json:"cpus"`                  // cpu.max / cfs quota, in CPUs
	CPUSet      string  `json:"cpuset_cpus,omitempty"` // cpuset.cpus list, "" is the parent's
	Pids        int64   `json:"pids"`                  // pids.max
}
