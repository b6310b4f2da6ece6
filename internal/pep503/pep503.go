// Package pep503 owns how names of Python distributions are compared. It must
// never know where they are written. It is linked into sbxrun: no regexp here.
package pep503

import "strings"

// Normalise gives a distribution's, extra's or group's canonical name: lower
// case, and one dash for each run of dashes, underscores and dots.
func Normalise(name string) string {
	var b strings.Builder
	dash := false
	for _, r := range name {
		if r == '-' || r == '_' || r == '.' {
			if !dash {
				b.WriteByte('-')
			}
			dash = true
			continue
		}
		dash = false
		b.WriteRune(r)
	}
	return strings.ToLower(b.String())
}
