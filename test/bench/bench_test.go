package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/seccomp"
)

// No test here asserts a time.

func TestPercentileIsTheNearestRank(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i) // 100 … 1: not sorted
	}
	for _, c := range []struct {
		values []float64
		p      float64
		want   float64
	}{
		{hundred, 0, 1},
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred, 100, 100},
		{[]float64{7}, 0, 7},
		{[]float64{7}, 50, 7},
		{[]float64{7}, 99, 7},
		{[]float64{4, 1, 3, 2}, 50, 2},
		{[]float64{5, 1, 3, 2, 4}, 50, 3},
		{[]float64{2, 1}, 99, 2},
	} {
		require.Equal(t, c.want, percentile(c.values, c.p), "%v of %v", c.p, c.values)
	}
	require.Equal(t, 100.0, hundred[0], "the input was sorted in place")
	require.True(t, math.IsNaN(percentile(nil, 50)))
}

func TestSummariseLeavesFailuresOut(t *testing.T) {
	st, failures := summarise([]sample{{3, 30, true}, {1, 10, true}, {2, 20, true}, {1000, 1000, false}})
	require.Equal(t, 1, failures)
	require.Equal(t, &Stats{Launches: 3, MinUS: 1, MedianUS: 2, P99US: 3, CPUUS: 20}, st)
	st, failures = summarise([]sample{{1, 1, false}})
	require.Nil(t, st, "nothing was measured: not zeros")
	require.Equal(t, 1, failures)
}

// some gives contestants of known times.
func some() ([]*contestant, map[*contestant][]sample) {
	base := &contestant{name: ratioBase, lacks: "limits"}
	own := &contestant{name: ownName, own: true}
	noNet := &contestant{name: ownName + ", host's network", variant: true}
	broken := &contestant{name: "docker", failed: "no <daemon> & co"}
	return []*contestant{base, own, noNet, broken}, map[*contestant][]sample{
		base:  {{4000, 2000, true}, {4000, 2000, true}},
		own:   {{8000, 6000, true}, {6000, 5000, true}},
		noNet: {{5500, 4400, true}, {9000, 7000, true}},
	}
}

func TestLaunchRowsCompareWithBwrap(t *testing.T) {
	list, times := some()
	rows := launchRows(list, times)
	require.Len(t, rows, 3, "variants have no row")
	require.Equal(t, 1.0, *rows[0].RatioToBwrap)
	require.Equal(t, 1.5, *rows[1].RatioToBwrap)
	require.True(t, rows[1].Own)
	require.Nil(t, rows[2].Stats)
	require.Nil(t, rows[2].RatioToBwrap)
	require.Equal(t, "no <daemon> & co", rows[2].Failed)

	for _, r := range launchRows(list[1:2], map[*contestant][]sample{list[1]: times[list[1]]}) {
		require.Nil(t, r.RatioToBwrap, "there is no bwrap here")
	}
}

func TestFeatureRowsAreDifferences(t *testing.T) {
	_, times := some()
	require.Equal(t, []FeatureRow{{
		Name: "network namespace", With: "sbxrun", Without: "sbxrun, host's network",
		MedianUS: 500, MinUS: 500, CPUUS: 600,
	}}, featureRows(times))
}

func TestTimerLinesAreChecked(t *testing.T) {
	list, _ := some()
	got, err := parseRounds("0 4000000 2000 0\n1 5000000 3000 256\n0 4500000 2100 0\n", list)
	require.NoError(t, err)
	require.Equal(t, []sample{{4000, 2000, true}, {4500, 2100, true}}, got[list[0]])
	require.Equal(t, []sample{{5000, 3000, false}}, got[list[1]])
	for _, bad := range []string{"4 1 1 0\n", "-1 1 1 0\n", "0 1 1\n", "timer: died\n"} {
		_, err := parseRounds(bad, list)
		require.Error(t, err, bad)
	}
}

func report() *Report {
	list, times := some()
	pss, processes, load := 100.5, 2.0, 0.25
	return &Report{
		SchemaVersion: schemaVersion, Kernel: "6.1", CPUs: 2, CgroupMode: "hybrid", LoadAverage: &load, Launches: 2,
		Launch: launchRows(list, times), Paced: launchRows(list[:1], times), Features: featureRows(times),
		Throughput: []RateRow{{Name: "sbxrun", Parallel: 1, PerSecond: 100}, {Name: "sbxrun", Parallel: 2, PerSecond: 150, Failures: 1}},
		Resident: []ResidentRow{
			{Name: "sbxrun", Sandboxes: 20, PssKB: &pss, Processes: &processes, Observed: &Observed{Namespaces: []string{"user"}, Filter: true}},
			{Name: "docker", Sandboxes: 20, Failed: "no daemon"},
		},
		Traffic: trafficRows([]*way{
			{name: loopbackName, gbit: []float64{20, 10}, tripUS: []float64{10, 20}, connects: []float64{1000, 1000}},
			{name: "egress", against: loopbackName, aim: 0.6, gbit: []float64{12, 8}, tripUS: []float64{20, 50}, connects: []float64{100, 200}},
			{name: "pasta", against: loopbackName, failed: "not here"},
		}),
		Python: []PythonRow{{Name: "pass", Bare: &Stats{Launches: 1, MedianUS: 9000}}},
		Notes:  []string{"a note"},
	}
}

func TestPictureIsWellFormed(t *testing.T) {
	r := report()
	r.Launch[0].Name = `a <b> & "c"`
	picture := r.picture()
	bars, texts := []string{}, []string{}
	d := xml.NewDecoder(strings.NewReader(picture))
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err, picture)
		switch tok := tok.(type) {
		case xml.StartElement:
			for _, a := range tok.Attr {
				require.NotContains(t, a.Value, "NaN")
				if tok.Name.Local == "rect" && a.Name.Local == "width" {
					bars = append(bars, a.Value)
				}
			}
		case xml.CharData:
			texts = append(texts, strings.TrimSpace(string(tok)))
		}
	}
	require.Equal(t, []string{"293.3", "440.0"}, bars, "4 and 6 ms, the fastest first, the longest fills the width; no bar for what failed")
	require.Contains(t, texts, `a <b> & "c"`)
	require.Contains(t, texts, "6.00")
	require.NotContains(t, texts, "docker")
	require.Contains(t, picture, "prefers-color-scheme: dark")

	r.Launch = nil
	require.NoError(t, xml.Unmarshal([]byte(r.picture()), new(struct{})), "no rows")
}

// What reads bench.json relies on these names.
func TestJSONKeepsItsSchema(t *testing.T) {
	dir := t.TempDir()
	jsonPath, svgPath := filepath.Join(dir, "a", "bench.json"), filepath.Join(dir, "b", "bench.svg")
	require.NoError(t, report().save(jsonPath, svgPath))
	require.FileExists(t, svgPath)
	b, err := os.ReadFile(jsonPath)
	require.NoError(t, err)
	var top map[string]any
	require.NoError(t, json.Unmarshal(b, &top))
	require.Equal(t, "cgroup_mode cpus features kernel launch launches load_average notes paced python resident schema_version throughput traffic", keys(top))
	launch := top["launch"].([]any)
	require.Equal(t, "failures lacks name own ratio_to_bwrap stats", keys(launch[0]))
	require.Equal(t, "cpu_us launches median_us min_us p99_us", keys(launch[0].(map[string]any)["stats"]))
	require.Equal(t, "failed failures lacks name own ratio_to_bwrap stats", keys(launch[2]))
	require.Nil(t, launch[2].(map[string]any)["stats"], "what was not measured is null")
	require.Equal(t, "cpu_us median_us min_us name with without", keys(top["features"].([]any)[0]))
	require.Equal(t, "failures name parallel per_second", keys(top["throughput"].([]any)[0]))
	traffic := top["traffic"].([]any)
	require.Equal(t, "against aim connects_per_second connects_ratio gbit_per_second gbit_ratio round_trip_ratio round_trip_us way", keys(traffic[1]))
	require.Equal(t, "max median min samples", keys(traffic[1].(map[string]any)["gbit_per_second"]))
	require.Nil(t, traffic[2].(map[string]any)["gbit_per_second"], "what was not measured is null")
	resident := top["resident"].([]any)
	require.Equal(t, "name observed processes pss_kb sandboxes", keys(resident[0]))
	require.Equal(t, "capabilities filter host_root namespaces no_new_privs", keys(resident[0].(map[string]any)["observed"]))
	require.Equal(t, "failed name observed processes pss_kb sandboxes", keys(resident[1]))
	require.Nil(t, resident[1].(map[string]any)["pss_kb"], "what was not measured is null")
	require.Equal(t, "bare name sandbox sandbox_all_cpus", keys(top["python"].([]any)[0]))

	require.NoError(t, report().save("", ""), "no name, no file")
	require.Error(t, report().save(filepath.Join(jsonPath, "x"), ""))
}

func keys(v any) string {
	return strings.Join(slices.Sorted(maps.Keys(v.(map[string]any))), " ")
}

func TestTableSaysWhatFailed(t *testing.T) {
	var b strings.Builder
	require.NoError(t, report().print(&b))
	for _, want := range []string{
		"\ndocker failed: no <daemon> & co\n",
		"bwrap, host's root  4.00  4.00    4.00  2.00  1.00      limits",
		"150 (1 failed)",
		"\negress         8.00    8.00   12.00  0.60   0.6  20.0     20.0  2.00   100         200   0.10   host loopback\n",
		"\npasta: not here\n",
		"\ndocker failed: no daemon\n",
		"1 of 8",
		"- a note",
	} {
		require.Contains(t, b.String(), want)
	}
}

func TestOnlyTheRuntimesOwnProcessesCount(t *testing.T) {
	before := map[int]proc{1: {1, 0, []string{"init"}}, 5: {5, 1, []string{"conmon", "old"}}, 7: {7, 1, []string{"bash"}}}
	now := map[int]proc{
		1: before[1], 5: before[5], 7: before[7],
		10: {10, 7, []string{"/usr/bin/bwrap", "sleep", "9.5"}}, 11: {11, 10, []string{"bwrap"}}, 12: {12, 11, []string{"/bin/sleep", "9.5"}},
		20: {20, 1, []string{"/usr/bin/conmon", "-c"}}, 21: {21, 20, []string{"sleep", "9.5"}},
		30: {30, 7, []string{"go", "build"}}, 31: {31, 7, []string{"sleep", "10"}},
	}
	require.ElementsMatch(t, []int{12, 21}, sleepers(now, "9.5"))
	require.ElementsMatch(t, []int{10, 11, 20}, staying(before, now, map[int]bool{10: true}, "9.5"))
}

func TestMemoryIsThePss(t *testing.T) {
	kb, err := parsePSS("55d0-7ffc ---p 00000000 00:00 0 [rollup]\nRss:  900 kB\nPss:  421 kB\nPss_Dirty:  100 kB\n")
	require.NoError(t, err)
	require.Equal(t, 421.0, kb)
	_, err = parsePSS("")
	require.Error(t, err, "a zombie's is empty: not 0")
}

func TestWhatIsObservedOfACommand(t *testing.T) {
	var o Observed
	o.status("Uid:\t0\t0\t0\t0\nCapBnd:\t0000000000000400\nCapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t0\n")
	require.Equal(t, Observed{HostRoot: true, Capabilities: true}, o)
	o = Observed{}
	o.status("Uid:\t1000\t0\t0\t0\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n")
	require.Equal(t, Observed{NoNewPrivs: true, Filter: true}, o)
}

func TestOCIProfileAllowsWhatThePolicyAllows(t *testing.T) {
	p := ociSeccomp([]seccomp.Rule{
		{Name: "read", Action: seccomp.Allow},
		{Name: "bpf", Action: seccomp.Errno(1), Reason: "x"},
		{Name: "clone", Action: seccomp.Allow, Args: []seccomp.Arg{{Index: 0, Op: seccomp.MaskedEqual, Mask: 0x7e020000}}},
		{Name: "personality", Action: seccomp.Allow, Args: []seccomp.Arg{{Index: 0, Op: seccomp.EqualLow32, Value: 8}}},
	})
	b, err := json.Marshal(p["syscalls"])
	require.NoError(t, err)
	require.JSONEq(t, `[
		{"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
		{"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":4294967295,"valueTwo":8,"op":"SCMP_CMP_MASKED_EQ"}]},
		{"names":["read"],"action":"SCMP_ACT_ALLOW"}]`, string(b))
	require.Equal(t, "SCMP_ACT_ERRNO", p["defaultAction"])
}

func TestFlags(t *testing.T) {
	o, err := parse([]string{"-quick", "-only", "^bwrap", "-json", "x"}, io.Discard)
	require.NoError(t, err)
	require.Equal(t, 20, o.rounds)
	require.True(t, o.only.MatchString("bwrap, host's root"))
	require.False(t, o.only.MatchString("sbxrun"))
	require.True(t, filepath.IsAbs(o.sbxrun))
	for _, bad := range [][]string{{"-n", "0"}, {"-only", "("}, {"rest"}, {"-nonsense"}} {
		_, err := parse(bad, io.Discard)
		require.Error(t, err, bad)
	}
}

// A mode that cannot run has its reason, and no figures.
func TestNetworkModesAreComparedWithTheFirst(t *testing.T) {
	none, egress, full := &contestant{name: "none"}, &contestant{name: "egress"}, &contestant{name: "full", failed: "no veth"}
	rows := networkRows([]*contestant{none, egress, full}, map[*contestant][]sample{
		none: {{1000, 1, true}}, egress: {{1500, 1, true}, {9, 9, false}},
	})
	require.Len(t, rows, 3)
	require.Nil(t, rows[0].MoreUS)
	require.Equal(t, 500.0, *rows[1].MoreUS)
	require.Equal(t, 1, rows[1].Failures)
	require.Equal(t, NetworkRow{Mode: "full", Failed: "no veth"}, rows[2])
}

// A machine that is slow for a round is so for both sides of a ratio.
func TestTrafficIsComparedRoundByRound(t *testing.T) {
	require.Nil(t, ratio(nil, nil))
	require.Nil(t, ratio([]float64{1, 2}, []float64{1}), "one of them failed half-way")
	require.Equal(t, 0.5, *ratio([]float64{5, 1, 4}, []float64{10, 2, 4}))
}

func TestAnswersAreChecked(t *testing.T) {
	got, err := parseAnswer("620104282 200031001")
	require.NoError(t, err)
	require.Equal(t, []float64{620104282, 200031001}, got)
	for _, bad := range []string{"", "1 x", "17 18 error round trip: Connection reset by peer"} {
		_, err := parseAnswer(bad)
		require.Error(t, err, bad)
	}
}
