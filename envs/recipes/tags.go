package recipes

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
)

// tags are the wheel tags (PEP 425) that a target takes, each with its rank: 0
// is the best.
type tags map[string]int

// legacy manylinux names, by glibc's minor version.
var legacyManylinux = map[int]string{17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}

func targetTags(t envs.Target) (tags, error) {
	impl := t.Vars["implementation_name"]
	major, minor, ok := twoNumbers(t.Vars["python_version"])
	if !ok || t.Vars["platform_machine"] == "" {
		return nil, fmt.Errorf("the interpreter says no sane version and machine: %q, %q", t.Vars["python_version"], t.Vars["platform_machine"])
	}
	out := tags{}
	platforms := platformTags(t)
	add := func(python, abi string, platforms ...string) {
		for _, p := range platforms {
			k := python + "-" + abi + "-" + p
			if _, have := out[k]; !have {
				out[k] = len(out)
			}
		}
	}
	version := strconv.Itoa(major) + strconv.Itoa(minor)
	abi := ""
	switch impl {
	case "cpython":
		// cpython-311-x86_64-linux-gnu, cpython-313t-…
		if parts := strings.Split(t.SOABI, "-"); len(parts) > 1 && parts[0] == "cpython" {
			abi = "cp" + parts[1]
		} else {
			abi = "cp" + version
		}
		threaded := strings.HasSuffix(abi, "t")
		add("cp"+version, abi, platforms...)
		if !threaded {
			add("cp"+version, "abi3", platforms...)
		}
		add("cp"+version, "none", platforms...)
		for m := minor - 1; m >= 2 && !threaded; m-- {
			add("cp"+strconv.Itoa(major)+strconv.Itoa(m), "abi3", platforms...)
		}
		add("cp"+version, "none", "any")
	case "pypy":
		// pypy310-pp73
		if a, b, ok := strings.Cut(t.SOABI, "-"); ok {
			b, _, _ = strings.Cut(b, "-")
			add("pp"+version, a+"_"+b, platforms...)
		}
		add("pp"+version, "none", platforms...)
		add("pp"+version, "none", "any")
	}
	generic := []string{"py" + version, "py" + strconv.Itoa(major)}
	for m := minor - 1; m >= 0; m-- {
		generic = append(generic, "py"+strconv.Itoa(major)+strconv.Itoa(m))
	}
	for _, py := range generic {
		add(py, "none", platforms...)
	}
	for _, py := range generic {
		add(py, "none", "any")
	}
	return out, nil
}

func twoNumbers(s string) (a, b int, ok bool) {
	x, y, _ := strings.Cut(s, ".")
	y, _, _ = strings.Cut(y, ".")
	a, err1 := strconv.Atoi(x)
	b, err2 := strconv.Atoi(y)
	return a, b, err1 == nil && err2 == nil && a >= 0 && a < 100 && b >= 0 && b < 1000
}

// platformTags of Linux, best first. (Wheels name architectures as the kernel
// does; a 32-bit interpreter on a 64-bit kernel is not looked for.)
func platformTags(t envs.Target) (out []string) {
	arch := t.Vars["platform_machine"]
	switch {
	case t.Glibc != "":
		_, minor, ok := twoNumbers(t.Glibc)
		oldest := 17
		if arch == "x86_64" || arch == "i686" {
			oldest = 5
		}
		for m := minor; ok && m >= oldest; m-- {
			out = append(out, fmt.Sprintf("manylinux_2_%d_%s", m, arch))
			if old := legacyManylinux[m]; old != "" && (m == 17 || oldest == 5) {
				out = append(out, old+"_"+arch)
			}
		}
	case t.Musl != "":
		_, minor, ok := twoNumbers(t.Musl)
		for m := minor; ok && m >= 0; m-- {
			out = append(out, fmt.Sprintf("musllinux_1_%d_%s", m, arch))
		}
	}
	return append(out, "linux_"+arch)
}

// wheelTags takes the three tags out of a wheel's file name: each may be a set
// with dots between.
func wheelTags(file string) (python, abi, platform []string, ok bool) {
	stem, ok := strings.CutSuffix(file, ".whl")
	parts := strings.Split(stem, "-")
	if !ok || len(parts) != 5 && len(parts) != 6 {
		return nil, nil, nil, false
	}
	parts = parts[len(parts)-3:]
	python, abi, platform = strings.Split(parts[0], "."), strings.Split(parts[1], "."), strings.Split(parts[2], ".")
	return python, abi, platform, len(python)*len(abi)*len(platform) <= 1024
}

// rank is the best rank among a wheel's tags; ok is false where none is taken.
func (t tags) rank(file string) (best int, ok bool) {
	python, abi, platform, valid := wheelTags(file)
	if !valid {
		return 0, false
	}
	for _, p := range python {
		for _, a := range abi {
			for _, f := range platform {
				if r, taken := t[p+"-"+a+"-"+f]; taken && (!ok || r < best) {
					best, ok = r, true
				}
			}
		}
	}
	return best, ok
}
