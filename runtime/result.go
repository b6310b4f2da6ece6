package runtime

import (
	"strconv"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

// Status says how a run ended, in one word.
type Status string

// The statuses of [Result.Status].
const (
	StatusOK          Status = "ok"
	StatusFailed      Status = "failed"
	StatusKilled      Status = "killed"
	StatusSetupFailed Status = "setup-failed"
	StatusCanceled    Status = "canceled"
)

// Reason says why a run ended.
type Reason string

// The reasons of [Result.Reason].
const (
	ReasonExit        Reason = "exit"
	ReasonSignal      Reason = "signal"
	ReasonWallTimeout Reason = "wall_timeout"
	ReasonCPUTimeout  Reason = "cpu_timeout"
	ReasonOOM         Reason = "oom"
	ReasonDisk        Reason = "disk"
	ReasonPids        Reason = "pids"
	ReasonOutput      Reason = "output"
	ReasonPolicy      Reason = "policy"
	ReasonCanceled    Reason = "canceled"
	ReasonInternal    Reason = "internal"
)

// SchemaVersion is the version of the report's JSON form.
const SchemaVersion = 1

// Result is the report. Numbers that could not be measured are nil, never 0.
type Result struct {
	SchemaVersion int    `json:"schema_version"`
	ID            string `json:"id"`
	Name          string `json:"name,omitempty"`
	Status        Status `json:"status"`
	Reason        Reason `json:"reason"`
	Stage         string `json:"stage,omitempty"`
	ExitCode      int    `json:"exit_code"`        // what sbxrun itself exits with
	Signal        string `json:"signal,omitempty"` // "SIGSEGV"
	OOMKilled     bool   `json:"oom_killed"`
	Message       string `json:"message,omitempty"`
	Hint          string `json:"hint,omitempty"`

	StartedAt  time.Time `json:"started_at"`
	FinishedAt time.Time `json:"finished_at"`
	WallMS     float64   `json:"wall_ms"`

	CPUUserMS       *float64 `json:"cpu_user_ms"`
	CPUSystemMS     *float64 `json:"cpu_system_ms"`
	MemoryPeakBytes *int64   `json:"memory_peak_bytes"`
	PidsPeak        *int64   `json:"pids_peak"`
	PidsMaxHits     *int64   `json:"pids_max_hits"` // forks that the limit refused
	DiskUsedBytes   *int64   `json:"disk_used_bytes"`
	InodesUsed      *int64   `json:"inodes_used"`
	IOReadBytes     *int64   `json:"io_read_bytes"`
	IOWriteBytes    *int64   `json:"io_write_bytes"`
	NetRxBytes      *int64   `json:"net_rx_bytes"`
	NetTxBytes      *int64   `json:"net_tx_bytes"`
	CtxVoluntary    *int64   `json:"context_switches_voluntary"`
	CtxInvoluntary  *int64   `json:"context_switches_involuntary"`
	ThrottledMS     *float64 `json:"throttled_ms"`
	// Pressure is by resource: cpu, memory, io (v2 with PSI).
	Pressure map[string]Pressure `json:"pressure"`

	Limits   Limits             `json:"limits"`
	Degraded []string           `json:"degraded"`
	Denials  []string           `json:"denials"`
	Services []ResultService    `json:"services,omitempty"`
	Network  *ResultNetwork     `json:"network,omitempty"` // nil where no helper or shared namespace was needed
	Notes    []string           `json:"notes,omitempty"`   // what the caller should know and is no failure
	Env      *ResultEnv         `json:"env"`
	Base     string             `json:"base"`
	Engine   string             `json:"engine"`
	PhasesMS map[string]float64 `json:"phases_ms"`
}

// ResultNetwork is the network as it was.
type ResultNetwork struct {
	Mode      string       `json:"mode"`
	Addresses []string     `json:"addresses,omitempty"`
	Ports     []netns.Port `json:"ports,omitempty"` // with the numbers that were taken
	*netns.Summary
	// HelperCPUMS is the CPU time of sbxrun-net, which the sandbox's limits do not
	// hold; nil where there was none.
	HelperCPUMS *float64 `json:"helper_cpu_ms"`
}

// ResultService is a service that ran beside the job, in a sandbox of its own.
type ResultService struct {
	Name     string  `json:"name"`
	ID       string  `json:"id,omitempty"`
	Status   Status  `json:"status"` // ok or canceled where it was stopped when the job had ended
	Reason   Reason  `json:"reason"`
	ExitCode int     `json:"exit_code"`
	Message  string  `json:"message,omitempty"`
	ReadyMS  float64 `json:"ready_ms"` // from its start; 0 where it never was
	// Log is the end of what it wrote, at most 64 KiB.
	Log string `json:"log"`
}

// Pressure is how long some, and all, processes together waited for a resource.
type Pressure struct {
	SomeMS *float64 `json:"some_ms"`
	FullMS *float64 `json:"full_ms"`
}

// ResultEnv names the environment that was used.
type ResultEnv struct {
	Key    string `json:"key"`
	Digest string `json:"digest"`
}

// End says in one line how it ended.
func (r *Result) End() string {
	end := "sandbox " + r.ID + ": "
	if r.ID == "" {
		end = "no sandbox: "
	}
	switch {
	case r.Message != "":
		return end + r.Message
	case r.ExitCode == 0:
		return end + "ended"
	}
	return end + "ended with " + strconv.Itoa(r.ExitCode)
}
