package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

const schemaVersion = 1

// Report is the JSON. What was not measured is null or absent, never 0.
type Report struct {
	SchemaVersion int           `json:"schema_version"`
	Kernel        string        `json:"kernel"`
	CPUs          int           `json:"cpus"`
	CgroupMode    string        `json:"cgroup_mode"`  // v1, hybrid or v2
	LoadAverage   *float64      `json:"load_average"` // over a minute, before we began: others' work spoils the numbers
	Launches      int           `json:"launches"`     // asked for, of each contestant
	Launch        []LaunchRow   `json:"launch"`
	Paced         []LaunchRow   `json:"paced,omitempty"` // 250 ms apart; cgroup v1 only
	Features      []FeatureRow  `json:"features"`
	Networks      []NetworkRow  `json:"networks,omitempty"`
	Traffic       []TrafficRow  `json:"traffic,omitempty"`
	Throughput    []RateRow     `json:"throughput"`
	Resident      []ResidentRow `json:"resident"`
	Python        []PythonRow   `json:"python,omitempty"`
	Envs          []EnvRow      `json:"envs,omitempty"`
	Notes         []string      `json:"notes"`
}

// Stats are of the launches that succeeded; CPUUS is the median of user plus
// system time of the launcher and all children it waited for.
type Stats struct {
	Launches int     `json:"launches"`
	MinUS    float64 `json:"min_us"`
	MedianUS float64 `json:"median_us"`
	P99US    float64 `json:"p99_us"`
	CPUUS    float64 `json:"cpu_us"`
}

// LaunchRow is one contestant.
type LaunchRow struct {
	Name         string   `json:"name"`
	Own          bool     `json:"own"` // sbxrun itself
	Lacks        string   `json:"lacks"`
	Stats        *Stats   `json:"stats"`
	RatioToBwrap *float64 `json:"ratio_to_bwrap"` // of the medians
	Failures     int      `json:"failures"`       // launches that did not exit 0
	Failed       string   `json:"failed,omitempty"`
}

// FeatureRow is the price of one feature: the difference of two contestants.
type FeatureRow struct {
	Name     string  `json:"name"`
	With     string  `json:"with"`
	Without  string  `json:"without"`
	MedianUS float64 `json:"median_us"` // difference of the medians
	MinUS    float64 `json:"min_us"`
	CPUUS    float64 `json:"cpu_us"`
}

// NetworkRow is a launch in one network mode.
type NetworkRow struct {
	Mode     string   `json:"mode"`
	Stats    *Stats   `json:"stats"`
	MoreUS   *float64 `json:"more_us"` // than the first mode, of the medians
	Failures int      `json:"failures"`
	Failed   string   `json:"failed,omitempty"`
}

// Spread is of one value a round.
type Spread struct {
	Samples int     `json:"samples"`
	Min     float64 `json:"min"`
	Median  float64 `json:"median"`
	Max     float64 `json:"max"`
}

// TrafficRow is one way from a client to a server. A ratio is the median of the
// rounds' ratios to the row that Against names.
type TrafficRow struct {
	Way           string   `json:"way"`
	Gbit          *Spread  `json:"gbit_per_second"`     // one stream, to the client
	TripUS        *Spread  `json:"round_trip_us"`       // of the rounds' medians
	Connects      *Spread  `json:"connects_per_second"` // one after the other, each with a round trip
	Against       string   `json:"against,omitempty"`
	Aim           *float64 `json:"aim,omitempty"` // of GbitRatio, at least
	GbitRatio     *float64 `json:"gbit_ratio,omitempty"`
	TripRatio     *float64 `json:"round_trip_ratio,omitempty"`
	ConnectsRatio *float64 `json:"connects_ratio,omitempty"`
	Failed        string   `json:"failed,omitempty"`
}

// RateRow is a throughput.
type RateRow struct {
	Name      string  `json:"name"`
	Parallel  int     `json:"parallel"`
	PerSecond float64 `json:"per_second"`
	Failures  int     `json:"failures"`
}

// ResidentRow is what the runtime's own processes hold while commands run.
type ResidentRow struct {
	Name      string    `json:"name"`
	Sandboxes int       `json:"sandboxes"`
	PssKB     *float64  `json:"pss_kb"` // of each sandbox
	Processes *float64  `json:"processes"`
	Observed  *Observed `json:"observed"`
	Failed    string    `json:"failed,omitempty"`
}

// Observed is what the host sees of a command that runs.
type Observed struct {
	Namespaces   []string `json:"namespaces"`   // not the host's
	HostRoot     bool     `json:"host_root"`    // its user is the host's root
	Capabilities bool     `json:"capabilities"` // any, in any set
	NoNewPrivs   bool     `json:"no_new_privs"`
	Filter       bool     `json:"filter"`
}

// PythonRow compares a bare venv with the same files in a sandbox.
type PythonRow struct {
	Name           string `json:"name"`
	Bare           *Stats `json:"bare"`
	Sandbox        *Stats `json:"sandbox"` // --cpus 1, the default
	SandboxAllCPUs *Stats `json:"sandbox_all_cpus"`
}

func ms(us float64) string { return fmt.Sprintf("%.2f", us/1000) }

func (r *Report) print(out io.Writer) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	line := func(cells ...string) { fmt.Fprintln(t, strings.Join(cells, "\t")) }
	section := func(format string, a ...any) {
		_ = t.Flush() // the last Flush tells of errors: they stay
		fmt.Fprintf(out, "\n"+format+"\n", a...)
	}
	var failed []string // printed below a table: its columns stay narrow
	below := func() {
		_ = t.Flush()
		for _, f := range failed {
			fmt.Fprintln(out, f)
		}
		failed = nil
	}
	launches := func(rows []LaunchRow) {
		defer below()
		line("", "min", "median", "p99", "CPU", "to bwrap", "lacks")
		for _, row := range rows {
			switch {
			case row.Failed != "":
				failed = append(failed, row.Name+" failed: "+row.Failed)
				continue
			case row.Stats == nil:
				failed = append(failed, fmt.Sprintf("%s failed: all of %d launches", row.Name, row.Failures))
				continue
			}
			ratio, s, lacks := "", row.Stats, row.Lacks
			if row.RatioToBwrap != nil {
				ratio = fmt.Sprintf("%.2f", *row.RatioToBwrap)
			}
			if row.Failures > 0 {
				lacks = fmt.Sprintf("(%d launches failed) %s", row.Failures, lacks)
			}
			line(row.Name, ms(s.MinUS), ms(s.MedianUS), ms(s.P99US), ms(s.CPUUS), ratio, lacks)
		}
	}
	fmt.Fprintf(out, "Linux %s, %d CPUs, cgroup %s", r.Kernel, r.CPUs, r.CgroupMode)
	if r.LoadAverage != nil {
		fmt.Fprintf(out, ", load average beforehand %.2f", *r.LoadAverage)
	}
	fmt.Fprintln(out)
	section("Launch of /bin/true, ms, %d each, one contestant after the other", r.Launches)
	launches(r.Launch)
	if len(r.Paced) > 0 {
		section("The same, launches 250 ms apart (cgroup v1: a grace period of the kernel may then be due)")
		launches(r.Paced)
	}
	section("Price of one feature, ms (difference of two contestants)")
	line("", "median", "min", "CPU", "with", "without")
	for _, f := range r.Features {
		line(f.Name, ms(f.MedianUS), ms(f.MinUS), ms(f.CPUUS), f.With, f.Without)
	}
	if len(r.Networks) > 0 {
		section("Launch of /bin/true by network mode, set-up and removal included, ms")
		line("", "min", "median", "p99", "CPU", "more")
		for _, row := range r.Networks {
			if row.Stats == nil {
				failed = append(failed, fmt.Sprintf("%s failed: %s (%d launches)", row.Mode, row.Failed, row.Failures))
				continue
			}
			more, s := "", row.Stats
			if row.MoreUS != nil {
				more = ms(*row.MoreUS)
			}
			if row.Failures > 0 {
				more += fmt.Sprintf(" (%d launches failed)", row.Failures)
			}
			line(row.Mode, ms(s.MinUS), ms(s.MedianUS), ms(s.P99US), ms(s.CPUUS), more)
		}
		below()
	}
	if len(r.Traffic) > 0 {
		section("Traffic by network mode: one TCP stream to the client, round trips of a byte, connections with one round trip each")
		line("", "Gbit/s", "min", "max", "ratio", "aim", "trip µs", "min", "ratio", "connects/s", "max", "ratio", "ratios are to")
		number := func(format string, v *float64) string {
			if v == nil {
				return ""
			}
			return fmt.Sprintf(format, *v)
		}
		for _, row := range r.Traffic {
			g, l, c := row.Gbit, row.TripUS, row.Connects
			if g == nil || l == nil || c == nil {
				failed = append(failed, row.Way+": "+row.Failed)
				continue
			}
			line(row.Way, number("%.2f", &g.Median), number("%.2f", &g.Min), number("%.2f", &g.Max), number("%.2f", row.GbitRatio), number("%.1f", row.Aim), number("%.1f", &l.Median), number("%.1f", &l.Min), number("%.2f", row.TripRatio),
				number("%.0f", &c.Median), number("%.0f", &c.Max), number("%.2f", row.ConnectsRatio), row.Against)
		}
		below()
	}
	section("Launches per second, by how many at a time")
	line("", "1", "2", "8")
	names, cells := []string{}, map[string][]string{}
	for _, row := range r.Throughput {
		if cells[row.Name] == nil {
			names = append(names, row.Name)
		}
		text := fmt.Sprintf("%.0f", row.PerSecond)
		if row.Failures > 0 {
			text += fmt.Sprintf(" (%d failed)", row.Failures)
		}
		cells[row.Name] = append(cells[row.Name], text)
	}
	for _, n := range names {
		line(append([]string{n}, cells[n]...)...)
	}
	section("What stays resident of the runtime per running sandbox, and what the host sees of the command")
	line("", "PSS kB", "processes", "namespaces", "filter", "no_new_privs", "capabilities", "host's root")
	yes := map[bool]string{true: "yes", false: "no"}
	for _, row := range r.Resident {
		if row.PssKB == nil || row.Processes == nil {
			failed = append(failed, row.Name+" failed: "+row.Failed)
			continue
		}
		cells := []string{row.Name, fmt.Sprintf("%.0f", *row.PssKB), fmt.Sprintf("%.1f", *row.Processes)}
		if o := row.Observed; o != nil {
			cells = append(cells, fmt.Sprintf("%d of 8", len(o.Namespaces)), yes[o.Filter], yes[o.NoNewPrivs], yes[o.Capabilities], yes[o.HostRoot])
		}
		line(cells...)
	}
	below()
	if len(r.Envs) > 0 {
		section("Environments")
		for _, row := range r.Envs {
			figure := ""
			switch {
			case row.Skipped != "":
				failed = append(failed, row.Name+": left out: "+row.Skipped)
				continue
			case row.MS != nil:
				figure = fmt.Sprintf("%.0f ms", *row.MS)
			case row.Bytes != nil:
				figure = fmt.Sprintf("%.1f MB", float64(*row.Bytes)/1e6)
			}
			line(row.Name, figure, row.Note)
		}
		below()
	}
	if len(r.Python) > 0 {
		section("Python, ms (median)")
		line("", "bare venv", "sbxrun", "more", "all CPUs", "more")
		for _, row := range r.Python {
			if row.Bare == nil || row.Sandbox == nil || row.SandboxAllCPUs == nil {
				line(row.Name, "failed")
				continue
			}
			line(row.Name, ms(row.Bare.MedianUS), ms(row.Sandbox.MedianUS), ms(row.Sandbox.MedianUS-row.Bare.MedianUS), ms(row.SandboxAllCPUs.MedianUS), ms(row.SandboxAllCPUs.MedianUS-row.Bare.MedianUS))
		}
	}
	section("Notes")
	for _, n := range r.Notes {
		fmt.Fprintln(t, "- "+n)
	}
	return t.Flush()
}

// save writes the files whose names are not empty.
func (r *Report) save(jsonPath, svgPath string) error {
	var errs []error
	if jsonPath != "" {
		b, err := json.MarshalIndent(r, "", "  ")
		if err == nil {
			err = writeFile(jsonPath, append(b, '\n'))
		}
		errs = append(errs, err)
	}
	if svgPath != "" {
		errs = append(errs, writeFile(svgPath, []byte(r.picture())))
	}
	return errors.Join(errs...)
}

func writeFile(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
