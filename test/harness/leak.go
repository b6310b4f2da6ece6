package harness

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// world is what sandboxes could leave on the host. Other packages' tests run
// beside ours, so only what can be attributed to this installation counts: by
// its folders, by the ids in its reports, by its environment.
type world struct {
	links map[string]bool
}

func look() world {
	w := world{links: map[string]bool{}}
	ents, _ := os.ReadDir("/sys/class/net")
	for _, e := range ents {
		w.links[e.Name()] = true
	}
	return w
}

// stageDir is where every sandbox's root is assembled, whatever its state folder.
const stageDir = "/run/sbxrun"

// LeakGrace is how long the kernel and sbxrun's own clean-up may take after
// sbxrun ended, at most, before a find is a leak.
const LeakGrace = 3 * time.Second

func (s *Sbx) checkLeaks() {
	s.t.Helper()
	var found []string
	for end := time.Now().Add(LeakGrace); ; time.Sleep(50 * time.Millisecond) {
		if found = s.Leaks(); len(found) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, f := range found {
		s.t.Errorf("left behind: %s", f)
	}
}

// Leaks lists what this installation's sandboxes have on the host right now:
// mounts, cgroups, processes, loop devices, links, and files in the state folder.
func (s *Sbx) Leaks() []string {
	s.mu.Lock()
	ids := append([]string(nil), s.ids...)
	s.mu.Unlock()
	var found []string
	add := func(format string, a ...any) { found = append(found, fmt.Sprintf(format, a...)) }

	for _, mi := range []string{"/proc/1/mountinfo", "/proc/self/mountinfo"} {
		b, err := os.ReadFile(mi)
		if err != nil {
			continue
		}
		for _, l := range strings.Split(string(b), "\n") {
			if mentions(l, s.Root+"/", s.State) {
				add("mount in %s: %s", mi, l)
			}
		}
	}
	for _, d := range cgroupDirs() {
		if mentions(filepath.Base(d), ids...) {
			add("cgroup %s", d)
		}
	}
	for _, p := range processes() {
		switch {
		case mentions(p.cgroup, ids...):
			add("process %d %q in cgroup of a sandbox", p.pid, p.cmdline)
		case mentions(p.environ, "SBXRUN_STATE="+s.State):
			add("process %d %q of sbxrun", p.pid, p.cmdline)
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && mentions(string(b), s.Root, s.State) {
			add("loop device %s of %s", l, strings.TrimSpace(string(b)))
		}
	}
	for l := range look().links {
		if !s.before.links[l] && strings.HasPrefix(l, "sbx") {
			add("network link %s", l)
		}
	}
	// Live sandboxes hold a slot and, when they have one, a name.
	for _, dir := range []string{"slots", "names"} {
		ents, _ := os.ReadDir(filepath.Join(s.State, dir))
		for _, e := range ents {
			add("state %s/%s", dir, e.Name())
		}
	}
	for _, dir := range []string{s.State, stageDir, filepath.Join(s.Root, "scratch")} {
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && mentions(d.Name(), ids...) {
				add("file %s", p)
			}
			return nil
		})
	}
	return found
}

// mentions tells whether s contains one of words; empty words never match.
func mentions(s string, words ...string) bool {
	for _, w := range words {
		if w != "" && strings.Contains(s, w) {
			return true
		}
	}
	return false
}

// Groups lists every sandbox cgroup on the host, other installations' too.
func Groups() []string { return cgroupDirs() }

// cgroupDirs lists every cgroup below a folder named sbxrun, in all hierarchies.
func cgroupDirs() []string {
	var dirs []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // it went away while we looked
		}
		if d.IsDir() && strings.Contains(p, "/sbxrun/") {
			dirs = append(dirs, p)
		}
		return nil
	})
	return dirs
}

type process struct {
	pid                      int
	cmdline, cgroup, environ string
}

func processes() []process {
	var ps []process
	ents, _ := os.ReadDir("/proc")
	for _, e := range ents {
		var p process
		if _, err := fmt.Sscanf(e.Name(), "%d", &p.pid); err != nil || p.pid == os.Getpid() {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		read := func(name string) string { b, _ := os.ReadFile(filepath.Join(dir, name)); return string(b) }
		p.cmdline, p.cgroup, p.environ = read("cmdline"), read("cgroup"), read("environ")
		ps = append(ps, p)
	}
	return ps
}

// Processes lists the pids of the sandbox whose cgroup is named after id.
func Processes(id string) []int {
	var pids []int
	for _, p := range processes() {
		if mentions(p.cgroup, id) {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// Count counts the host's processes whose NUL-separated command line contains
// part.
func Count(part string) int {
	n := 0
	for _, p := range processes() {
		if strings.Contains(p.cmdline, part) {
			n++
		}
	}
	return n
}
