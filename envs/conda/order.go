package conda

import (
	"maps"
	"slices"
)

// order gives the indexes of packages so that each follows what it depends on:
// the order of linking and of link scripts, and, for a path that several have, who
// wins (the last). It is the order rattler finds, cycles included, because a tree
// has to be the same whoever installed it: a cycle of noarch and others loses the
// edge to the noarch package (it is compiled by what it depends on), any other the
// edge that closes it.
func order(pkgs []*Package) []int {
	index := make(map[string]int, len(pkgs))
	for i, p := range pkgs {
		index[p.Name] = i
	}
	deps := make([][]int, len(pkgs)) // sorted by name
	for i, p := range pkgs {
		var to []string
		for _, d := range p.Depends {
			to = append(to, dependencyName(d))
		}
		slices.Sort(to)
		for _, name := range slices.Compact(to) {
			if j, ok := index[name]; ok {
				deps[i] = append(deps[i], j)
			}
		}
	}
	names := slices.Sorted(maps.Keys(index))
	cut := cuts(pkgs, names, index)
	needed := make([]bool, len(pkgs))
	for i, to := range deps {
		deps[i] = slices.DeleteFunc(to, func(j int) bool { return cut[[2]int{i, j}] })
		for _, j := range deps[i] {
			needed[j] = true
		}
	}
	// A stack, not recursion: a chain may be as long as the lock.
	type step struct {
		i    int
		link bool
	}
	var out []int
	var stack []step
	seen := make([]bool, len(pkgs))
	push := func(roots func(i int) bool) {
		for _, n := range names {
			if i := index[n]; roots(i) {
				stack = append(stack, step{i: i})
			}
		}
		for len(stack) > 0 {
			s := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			switch {
			case s.link:
				out = append(out, s.i)
			case !seen[s.i]:
				seen[s.i] = true
				stack = append(stack, step{s.i, true})
				for _, j := range deps[s.i] {
					stack = append(stack, step{i: j})
				}
			}
		}
	}
	push(func(i int) bool { return !needed[i] })
	push(func(i int) bool { return !seen[i] }) // cycles that nothing outside needs
	return out
}

// cuts finds cycles by a depth-first walk from each name in order, following
// depends in the order they are written, and names one edge of each to drop.
func cuts(pkgs []*Package, names []string, index map[string]int) map[[2]int]bool {
	cut := map[[2]int]bool{}
	type frame struct{ i, next int }
	visited := make([]bool, len(pkgs))
	at := make([]int, len(pkgs)) // position on the path + 1; 0: not on it
	for _, n := range names {
		if visited[index[n]] {
			continue
		}
		path := []frame{{i: index[n]}}
		visited[index[n]], at[index[n]] = true, 1
		for len(path) > 0 {
			f := &path[len(path)-1]
			if f.next == len(pkgs[f.i].Depends) {
				at[f.i] = 0
				path = path[:len(path)-1]
				continue
			}
			j, ok := index[dependencyName(pkgs[f.i].Depends[f.next])]
			f.next++
			switch {
			case !ok:
			case at[j] > 0:
				var cycle []int
				for _, g := range path[at[j]-1:] {
					cycle = append(cycle, g.i)
				}
				cut[weakest(pkgs, cycle)] = true
			case !visited[j]:
				visited[j] = true
				path = append(path, frame{i: j})
				at[j] = len(path)
			}
		}
	}
	return cut
}

func weakest(pkgs []*Package, cycle []int) [2]int {
	for k, a := range cycle {
		b := cycle[(k+1)%len(cycle)]
		an, bn := pkgs[a].Noarch != "", pkgs[b].Noarch != ""
		switch {
		case !an && bn:
			return [2]int{a, b}
		case an && !bn || k == len(cycle)-1:
			return [2]int{b, a}
		}
	}
	return [2]int{-1, -1}
}
