package inventory

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// SARIF writes the findings as SARIF 2.1.0, which code hosts show. What is
// ignored is there as suppressed.
func (r *ScanResult) SARIF(w io.Writer, tool string) error {
	type text struct {
		Text string `json:"text"`
	}
	type rule struct {
		ID    string `json:"id"`
		Short text   `json:"shortDescription"`
	}
	type suppression struct {
		Kind          string `json:"kind"`
		Justification string `json:"justification"`
	}
	type logical struct {
		FullName string `json:"fullyQualifiedName"`
		Kind     string `json:"kind"`
	}
	type location struct {
		Logical []logical `json:"logicalLocations"`
	}
	type result struct {
		RuleID       string        `json:"ruleId"`
		Level        string        `json:"level"`
		Message      text          `json:"message"`
		Locations    []location    `json:"locations"`
		Suppressions []suppression `json:"suppressions,omitempty"`
	}
	rules, results := []rule{}, []result{}
	seen := map[string]bool{}
	for i, f := range append(append([]Finding{}, r.Findings...), r.Ignored...) {
		if !seen[f.ID] {
			seen[f.ID] = true
			short := f.Summary
			if short == "" {
				short = f.ID
			}
			rules = append(rules, rule{f.ID, text{short}})
		}
		level := "error"
		if f.Severity == "low" || f.Severity == "medium" {
			level = "warning"
		}
		msg := fmt.Sprintf("%s %s: %s", f.Package, f.Version, f.Summary)
		if len(f.Fixed) > 0 {
			msg += " (fixed in " + strings.Join(f.Fixed, ", ") + ")"
		}
		x := result{RuleID: f.ID, Level: level, Message: text{msg}, Locations: []location{{[]logical{{f.PURL, "package"}}}}}
		if i >= len(r.Findings) {
			x.Suppressions = []suppression{{"external", f.Reason}}
		}
		results = append(results, x)
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(map[string]any{
		"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0",
		"runs": []any{map[string]any{
			"tool":    map[string]any{"driver": map[string]any{"name": "sbxrun", "version": tool, "rules": rules}},
			"results": results,
		}},
	})
}
