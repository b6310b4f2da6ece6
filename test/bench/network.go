package main

import "context"

// networks times a launch of /bin/true, with the making and removing of its
// network, in each mode in turn. The first is what the others are compared with.
func (w *workshop) networks(ctx context.Context, n int) ([]NetworkRow, error) {
	var list, able []*contestant
	for _, m := range []struct {
		name  string
		flags []string
	}{
		{"none", []string{"--network", "none"}},
		{"none, a published port", []string{"--network", "none", "-p", "127.0.0.1:0:80"}},
		{"egress", []string{"--network", "egress", "--allow", "example.org"}},
		{"egress, a published port", []string{"--network", "egress", "--allow", "example.org", "-p", "127.0.0.1:0:80"}},
		{"full", []string{"--network", "full"}},
		{"full, a published port", []string{"--network", "full", "-p", "127.0.0.1:0:80"}},
	} {
		c := &contestant{name: m.name, command: func(args ...string) ([]string, error) {
			return append(append(w.own("run", m.flags...), "--"), args...), nil
		}}
		if w.try(ctx, c); c.failed == "" {
			able = append(able, c)
		}
		list = append(list, c)
	}
	if len(able) == 0 {
		return networkRows(list, nil), nil
	}
	times, err := w.rounds(ctx, able, n, 0)
	if err != nil {
		return nil, err
	}
	return networkRows(list, times), nil
}

func networkRows(list []*contestant, times map[*contestant][]sample) []NetworkRow {
	var rows []NetworkRow
	for _, c := range list {
		row := NetworkRow{Mode: c.name, Failed: c.failed}
		row.Stats, row.Failures = summarise(times[c])
		if row.Stats != nil && len(rows) > 0 && rows[0].Stats != nil {
			more := row.Stats.MedianUS - rows[0].Stats.MedianUS
			row.MoreUS = &more
		}
		rows = append(rows, row)
	}
	return rows
}
