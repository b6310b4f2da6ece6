// Package engine turns a prepared sandbox (root mounted, cgroup made, record
// written) into a running pid 1. It owns the launch and nothing else: it must
// never know limits, reports or environments.
//
// Two engines are planned behind [Engine]: libcontainer (the reference, in the
// second binary) and direct. This package holds what passes between them and
// the supervisor, and the client that hands a [Launch] to the second binary.
package engine

import "os"

// Launch is everything an engine needs to know. It is serialisable: it goes
// to the second binary as JSON. The command, its arguments and environment are
// not in it: they travel as raw bytes in the record that pid 1 maps.
type Launch struct {
	ID       string `json:"id"`
	Hostname string `json:"hostname"`
	// Rootfs is the mounted root and StateDir a directory for the engine's own
	// state, both in the supervisor's private mount namespace.
	Rootfs   string `json:"rootfs"`
	StateDir string `json:"state_dir"`
	ReadOnly bool   `json:"read_only"`
	// Mounts are made in this order, below the root.
	Mounts        []Mount  `json:"mounts"`
	MaskPaths     []string `json:"mask_paths"`
	ReadonlyPaths []string `json:"readonly_paths"`
	// Inside id i is host id IDBase+i, for i below IDSize.
	IDBase uint32 `json:"id_base"`
	IDSize uint32 `json:"id_size"`
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Cwd    string `json:"cwd"`
	// CgroupPath is what libcontainer's manager takes as Path: the group is
	// made and limited already, the engine only joins it.
	CgroupPath string `json:"cgroup_path"`
	// NetNS is "" for a fresh network namespace, "host" for the host's, "fd"
	// for the one in Files.NetNS.
	NetNS string `json:"netns"`
	TTY   bool   `json:"tty"`
	Rows  uint16 `json:"rows,omitempty"`
	Cols  uint16 `json:"cols,omitempty"`
}

// Mount is one mount below the root, in mount(2)'s terms.
type Mount struct {
	Type   string  `json:"type"` // bind, proc, tmpfs, devpts
	Source string  `json:"source"`
	Target string  `json:"target"`
	Flags  uintptr `json:"flags"`
	Data   string  `json:"data,omitempty"`
}

// Files are the descriptors of a launch. All stay the caller's to close.
type Files struct {
	Stdin, Stdout, Stderr *os.File
	Init                  *os.File // the pid-1 program, sealed
	Record                *os.File // pid1.RecordFD
	Status                *os.File // pid1.StatusFD
	Lifeline              *os.File // pid1.LifelineFD
	Console               *os.File // unix socket that receives the terminal's master; nil without TTY
	NetNS                 *os.File // nil unless Launch.NetNS is "fd"
}

// Engine starts pid 1. The caller must be a child subreaper: pid 1 becomes its
// child and the caller reaps it.
type Engine interface {
	// Start returns the host pid of pid 1. spawn runs a function on the thread
	// that is in the sandbox's private mount namespace.
	Start(l *Launch, f Files, spawn func(func() error) error) (pid int, err error)
}
