package main

import (
	"math"
	"slices"
)

// percentile gives the p-th percentile by the nearest rank: a value that was
// measured, never one between two. NaN where nothing was measured.
func percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Clone(values)
	slices.Sort(s)
	i := int(math.Ceil(p/100*float64(len(s)))) - 1
	return s[min(max(i, 0), len(s)-1)]
}

// summarise leaves failed launches out, and counts them. Nil where none succeeded.
func summarise(samples []sample) (st *Stats, failures int) {
	var wall, cpu []float64
	for _, s := range samples {
		if !s.ok {
			failures++
			continue
		}
		wall, cpu = append(wall, s.wallUS), append(cpu, s.cpuUS)
	}
	if len(wall) == 0 {
		return nil, failures
	}
	return &Stats{
		Launches: len(wall), MinUS: percentile(wall, 0), MedianUS: percentile(wall, 50), P99US: percentile(wall, 99),
		CPUUS: percentile(cpu, 50),
	}, failures
}

// launchRows has a row for each contestant that is no variant, in their order.
func launchRows(list []*contestant, times map[*contestant][]sample) []LaunchRow {
	var base *Stats
	for c, s := range times {
		if c.name == ratioBase {
			base, _ = summarise(s)
		}
	}
	rows := []LaunchRow{}
	for _, c := range list {
		if c.variant {
			continue
		}
		row := LaunchRow{Name: c.name, Lacks: c.lacks, Failed: c.failed, Own: c.own}
		row.Stats, row.Failures = summarise(times[c])
		if base != nil && row.Stats != nil {
			ratio := row.Stats.MedianUS / base.MedianUS
			row.RatioToBwrap = &ratio
		}
		rows = append(rows, row)
	}
	return rows
}

// featureRows compares each variant with the contestant it varies.
func featureRows(times map[*contestant][]sample) []FeatureRow {
	rows := []FeatureRow{}
	byName := map[string]*Stats{}
	for c, s := range times {
		if st, _ := summarise(s); st != nil {
			byName[c.name] = st
		}
	}
	for _, f := range features {
		with, without := byName[f.with], byName[f.without]
		if with == nil || without == nil {
			continue
		}
		rows = append(rows, FeatureRow{
			Name: f.name, With: f.with, Without: f.without,
			MedianUS: with.MedianUS - without.MedianUS, MinUS: with.MinUS - without.MinUS, CPUUS: with.CPUUS - without.CPUUS,
		})
	}
	return rows
}
