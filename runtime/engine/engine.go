// Package engine turns a prepared sandbox (root made, cgroup made, record
// ready) into a running pid 1. It owns the launch and nothing else: it must
// never know limits, reports or environments.
//
// Two engines stand behind [Engine]: direct, our own, and libcontainer, the
// reference, in the second binary. This package holds what passes between them
// and the supervisor, and the client that hands a [Launch] to that binary.
package engine

import (
	"errors"
	"os"
	"path"
	"strings"

	"github.com/sbxrun/sbxrun/runtime/pid1"
)

// Launch is everything an engine needs to know. It is serialisable: it goes
// to the second binary as JSON. The command, its arguments and environment are
// not in it: they travel as raw bytes in the record that pid 1 maps.
type Launch struct {
	ID       string `json:"id"`
	Hostname string `json:"hostname"`
	// Root is the root as a detached mount. Rootfs is where it is attached in
	// the supervisor's private mount namespace, and StateDir a directory there
	// for the engine's own state: for an engine that needs paths.
	Root     *os.File `json:"-"`
	Rootfs   string   `json:"rootfs"`
	StateDir string   `json:"state_dir"`
	ReadOnly bool     `json:"read_only"`
	// Mounts are made below the root, in order of Rank and then in this order:
	// proc, tmpfs, devpts; binds come with Begun.Start.
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
	// CgroupTasks are the group's `tasks` files, open for writing (v1).
	CgroupTasks []*os.File `json:"-"`
	// ResetOOMScore sets pid 1's oom_score_adj to 0: the caller's is negative.
	ResetOOMScore bool `json:"reset_oom_score,omitempty"`
	// NetNS is "" for a fresh network namespace, "host" for the host's, "fd"
	// for the one in Files.NetNS.
	NetNS string `json:"netns"`
	TTY   bool   `json:"tty"`
	Rows  uint16 `json:"rows,omitempty"`
	Cols  uint16 `json:"cols,omitempty"`
	// Passed is the length of Files.Passed.
	Passed int `json:"passed,omitempty"`
}

// Mount is one mount below the root, in mount(2)'s terms.
type Mount struct {
	Type   string  `json:"type"` // bind, proc, tmpfs, devpts
	Source string  `json:"source"`
	Target string  `json:"target"`
	Flags  uintptr `json:"flags"`
	Data   string  `json:"data,omitempty"`
	// Tree is a bind's source as a detached mount, File that it is no folder.
	Tree *os.File `json:"-"`
	File bool     `json:"file,omitempty"`
	// Base says that it is part of the base, as its layers are.
	Base bool `json:"base,omitempty"`
}

// Files are the descriptors of a launch. All stay the caller's to close.
type Files struct {
	Stdin, Stdout, Stderr *os.File
	Init                  *os.File // the pid-1 program, sealed
	Status                *os.File // pid1.StatusFD
	Lifeline              *os.File // pid1.LifelineFD
	Console               *os.File // unix socket that receives the terminal's master; nil without TTY
	NetNS                 *os.File // nil unless Launch.NetNS is "fd"
	// Cgroup is the group's v2 directory, for pid 1 to be born in; nil on v1.
	Cgroup *os.File
	// Passed become pid 1's descriptors from pid1.PassedFD up, for the command.
	Passed []*os.File
}

// Engine begins launches. The caller must be a child subreaper: pid 1 becomes
// its child and the caller reaps it.
type Engine interface {
	// Begin starts what can be started before the group and the root are there:
	// then l has everything but these. Prepare and Start must follow, and Abort.
	Begin(l *Launch, f Files) (Begun, error)
}

// Begun is a launch under way.
type Begun interface {
	// UserNS is the sandbox's user namespace, its ids mapped; nil where the
	// engine makes none before Start. It is closed by the engine.
	UserNS() (*os.File, error)
	// Prepare does what needs the group (Launch.CgroupTasks) but no root yet.
	Prepare(l *Launch) error
	// Start lets pid 1 go on in the finished root, Launch.Root, with binds on
	// top of Launch.Mounts, and gives its host pid.
	Start(l *Launch, binds []Mount, r *pid1.Record) (pid int, err error)
	// Explain turns pid 1's message of a failure of the engine's own part into
	// an error; nil says that it is not the engine's.
	Explain(m pid1.Message) error
	// Abort ends what was begun. After Start it only lets go of descriptors. It
	// may be called again.
	Abort() error
}

// ErrEnded is that pid 1 ended before it was told to start: its last message
// says why.
var ErrEnded = errors.New("pid 1 ended during its start")

// Rank orders mounts: what lies deeper is mounted later, or a mount above would
// hide it (docker's rule). What is part of the base comes before all others.
func (m Mount) Rank() int {
	n := strings.Count(path.Clean(m.Target), "/")
	if !m.Base {
		n += 1 << 16
	}
	return n
}
