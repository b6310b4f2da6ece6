package runtime

import (
	"time"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/cgroup"
)

// Spec is what the caller asked for, before the host was looked at. The zero
// value of every field means "the default"; [Spec.Argv] alone is required.
// Strings that reach the workload (Argv, Env) are raw bytes, not UTF-8.
type Spec struct {
	// Argv is the command. Empty is an error.
	Argv []string
	// Env holds KEY=VALUE pairs added to the allow-listed default environment
	// (PATH, HOME, USER, LANG, TERM with a terminal); later pairs win.
	Env []string
	// Workdir is an absolute path inside the sandbox; "" is /work when a
	// project is mounted there, else the user's home. Created when missing.
	Workdir string
	// User is "uid", "uid:gid", "name" or "name:group"; "" is 1000:1000.
	User string
	// Hostname is the UTS host name; "" is the sandbox id.
	Hostname string
	// Name is a label for people, unique among live sandboxes; "" is none.
	Name   string
	Labels map[string]string

	// Base is the read-only root below everything.
	Base rootfs.Base
	// Env layer on top of Base; nil is none.
	Layer *EnvLayer

	Volumes []Volume
	Tmpfs   []Tmpfs
	// ReadOnly makes the root read-only; /tmp, /run and /dev/shm stay writable.
	ReadOnly bool
	// ShmSizeBytes bounds /dev/shm; 0 is 64 MiB.
	ShmSizeBytes int64

	Limits Limits
	// Network is "none" (the default, also for ""), "egress", "full", "host",
	// "ns:PATH" or "container:ID"; Net is what else is asked of it.
	Network string
	Net     netns.Options
	// Aliases are further names of localhost, in /etc/hosts: of what is served in
	// the same network namespace.
	Aliases []string

	// TTY gives the command a terminal of its own.
	TTY bool
	// Interactive forwards standard input also with TTY. Without TTY standard
	// input is always the caller's own descriptor.
	Interactive bool

	// StopSignal is sent when a limit or a cancellation ends the command;
	// 0 is SIGTERM. StopTimeout is the grace before SIGKILL; 0 is 10 s for
	// cancellation; limits kill at once.
	StopSignal  int
	StopTimeout time.Duration

	// Secrets are files that only the sandbox's user can read, on a file system
	// in memory.
	Secrets []Secret
	// PassFDs descriptors of this process, from 3 up, become the command's, under
	// the same numbers. The first ListenFDs of them are sockets in the sense of
	// sd_listen_fds(3), named ListenNames: the command's LISTEN_ variables say so.
	PassFDs     int
	ListenFDs   int
	ListenNames string
	// Notify gives the command a socket to the service manager of its own
	// (IO.Service relays).
	Notify bool

	// CgroupManager is "cgroupfs" or "systemd": who makes the sandbox's cgroup;
	// "" and "auto" are cgroupfs.
	CgroupManager string
	// CgroupParent is a cgroup path below the mount point; "" is sbxrun in the
	// caller's own cgroup (v1), in the one that was delegated to the caller, or in
	// the root (v2).
	CgroupParent string
	// Engine is "libcontainer" (default for "").
	Engine string
	// Degrade lists protections the caller agreed to do without, by name
	// ("landlock", "idmap", "seccomp", …); what was in fact done without is in
	// Result.Degraded.
	Degrade []string
}

// EnvLayer is a baked environment: a read-only overlay lower.
type EnvLayer struct {
	// Key is the recipe's digest, Digest the content's ("sha256:…").
	Key    string `json:"key"`
	Digest string `json:"digest"`
	// Path is the host directory that holds opt/env.
	Path string `json:"path"`
	// Lowers are the host directories of the layers below it, topmost first:
	// those of the environments that it extends.
	Lowers []string `json:"lowers,omitempty"`
	// Env holds the environment's own variables (VIRTUAL_ENV=…); PathPrefix is
	// put before PATH.
	Env        []string `json:"env,omitempty"`
	PathPrefix []string `json:"path_prefix,omitempty"`
	// At is a second place inside where its prefix (Prefix, below the layers) is
	// shown; "" is none.
	At     string `json:"at,omitempty"`
	Prefix string `json:"prefix,omitempty"`
}

// layers are all its directories, topmost first.
func (l *EnvLayer) layers() []string { return append([]string{l.Path}, l.Lowers...) }

// Volume is a host directory or file shown inside.
type Volume struct {
	// Source is an absolute host path, Target an absolute path inside.
	Source string `json:"source"`
	Target string `json:"target"`
	// Mode is "rw" (also ""), "ro" or "O": copy-on-write, writes are thrown
	// away with the sandbox and count against its disk limit.
	Mode string `json:"mode"`
	// NoIDMap binds without translating owners (bakes want files of host root).
	// The zero value maps the source's owner to the sandbox's user.
	NoIDMap bool `json:"no_idmap,omitempty"`
	// NoLinks refuses a Source that holds a symbolic link: for what lies in a
	// folder that sandboxes write to.
	NoLinks bool `json:"no_links,omitempty"`
	// Lowers are host directories below Source, topmost first, and UpperDir is
	// where writes go and stay (rootfs.MakeUpper); both with mode "O" only.
	Lowers   []string `json:"lowers,omitempty"`
	UpperDir string   `json:"upper_dir,omitempty"`
}

// Secret is a file whose content is in no plan, report or message.
type Secret struct {
	// Source is an absolute host path, read at launch: a regular file of at most
	// 1 MiB.
	Source string `json:"source"`
	// Dir is /run/secrets or /run/credentials, Name a plain file name in it.
	Dir  string `json:"dir"`
	Name string `json:"name"`
	// Mode is among the bits 0444; 0 is 0400. The file is the sandbox's user's.
	Mode uint32 `json:"mode"`
}

// Where secrets are shown.
const (
	SecretsDir     = "/run/secrets"     // docker's
	CredentialsDir = "/run/credentials" // systemd's
)

// Tmpfs is an in-memory file system.
type Tmpfs struct {
	Target    string `json:"target"`
	SizeBytes int64  `json:"size_bytes"` // 0 is 64 MiB
	Mode      uint32 `json:"mode"`       // 0 is 01777
	Exec      bool   `json:"exec"`       // zero value: noexec
}

// Limits bound one sandbox. Zero is the default named in each comment,
// negative is "no limit" where the kernel allows it.
type Limits struct {
	cgroup.Limits

	DiskBytes   int64         `json:"disk_bytes"`   // default 1 GiB
	Inodes      int64         `json:"inodes"`       // default 1 inode per 4 KiB of disk
	WallTime    time.Duration `json:"wall_ns"`      // default none
	CPUTime     time.Duration `json:"cpu_time_ns"`  // user + system of the whole sandbox; default none
	ExtraTime   time.Duration `json:"extra_ns"`     // grace over WallTime and CPUTime before the kill; default 0
	OutputBytes int64         `json:"output_bytes"` // stdout + stderr; default none
	FileBytes   int64         `json:"file_bytes"`   // RLIMIT_FSIZE; default none
	Ulimits     []Rlimit      `json:"ulimits,omitempty"`
}

// IORate bounds what goes to and from one disk.
type IORate = cgroup.IORate

// Rlimit is one resource limit by its lower-case setrlimit(2) name without
// RLIMIT_ ("nofile"); RlimInfinity (all ones) is unlimited.
type Rlimit struct {
	Name string `json:"name"`
	Soft uint64 `json:"soft"`
	Hard uint64 `json:"hard"`
}
