package main

import (
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
)

// picture draws the medians as bars, the fastest first. It has no background
// and takes its colours from the reader's mode.
func (r *Report) picture() string {
	const width, left, right, row, top, bar = 800, 270, 90, 26, 44, 16
	var rows []LaunchRow
	longest := 0.0
	for _, l := range r.Launch {
		if l.Stats != nil {
			rows = append(rows, l)
			longest = max(longest, l.Stats.MedianUS)
		}
	}
	slices.SortStableFunc(rows, func(a, b LaunchRow) int {
		switch {
		case a.Stats.MedianUS < b.Stats.MedianUS:
			return -1
		case a.Stats.MedianUS > b.Stats.MedianUS:
			return 1
		}
		return 0
	})
	height := top + row*len(rows) + 12

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n", width, height, width, height)
	title := fmt.Sprintf("Median time of a launch of /bin/true, ms (Linux %s, %d CPUs, cgroup %s)", r.Kernel, r.CPUs, r.CgroupMode)
	fmt.Fprintf(&b, "<title>%s</title>\n", escape(title))
	b.WriteString(`<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.head { font-weight: 600 }
.bar { fill: #9aa4af }
.own { fill: #0969da }
text.own { font-weight: 600 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.bar { fill: #6e7681 }
.own { fill: #4493f8 }
}
</style>
`)
	fmt.Fprintf(&b, `<text class="head" x="8" y="22">%s</text>`+"\n", escape(title))
	for i, l := range rows {
		y := top + i*row
		class, label := "bar", ""
		if l.Own {
			class, label = "own", ` class="own"`
		}
		length := max(l.Stats.MedianUS/longest*(width-left-right), 1)
		fmt.Fprintf(&b, `<text%s x="%d" y="%d" text-anchor="end">%s</text>`, label, left-8, y+bar-3, escape(l.Name))
		fmt.Fprintf(&b, `<rect class="%s" x="%d" y="%d" width="%.1f" height="%d" rx="2"/>`, class, left, y, length, bar)
		fmt.Fprintf(&b, `<text%s x="%.1f" y="%d">%s</text>`+"\n", label, left+length+6, y+bar-3, ms(l.Stats.MedianUS))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder never fails
	return b.String()
}
