package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime"
)

// parseSize reads a size as docker does: a number and b, k, m, g, t or their
// i-forms, all of 1024.
func parseSize(s string) (int64, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	num := strings.TrimRight(t, "bkmgti ")
	unit := strings.TrimSpace(t[len(num):])
	shift := map[string]uint{
		"": 0, "b": 0, "k": 10, "kb": 10, "ki": 10, "kib": 10, "m": 20, "mb": 20, "mi": 20, "mib": 20,
		"g": 30, "gb": 30, "gi": 30, "gib": 30, "t": 40, "tb": 40, "ti": 40, "tib": 40,
	}
	sh, ok := shift[unit]
	f, err := strconv.ParseFloat(num, 64)
	if !ok || err != nil || strings.ContainsAny(num, "xXpPeE_nN+") {
		return 0, fmt.Errorf("%q is not a size; write 512m or 2g", s)
	}
	f *= float64(uint64(1) << sh)
	if f < 0 {
		return 0, fmt.Errorf("%q is negative", s)
	}
	if f >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is too large", s)
	}
	return int64(f), nil
}

// parseDuration reads Go's form or plain seconds.
func parseDuration(s string) (time.Duration, error) {
	if f, err := strconv.ParseFloat(s, 64); err == nil && !strings.ContainsAny(s, "xXpPeE_nN") {
		if f < 0 {
			return 0, fmt.Errorf("%q is negative", s)
		}
		if f > float64(math.MaxInt64/int64(time.Second)) {
			return 0, fmt.Errorf("%q is too long", s)
		}
		d := time.Duration(f * float64(time.Second))
		if d == 0 && f > 0 {
			d = 1 // 0 would mean no limit
		}
		return d, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a duration; write 30, 1.5s or 10m", s)
	}
	if d < 0 {
		return 0, fmt.Errorf("%q is negative", s)
	}
	return d, nil
}

// sizeValue and durationValue are flags. unlimited allows -1.
type sizeValue struct {
	v         *int64
	unlimited bool
}

func (f sizeValue) String() string {
	if f.v == nil || *f.v == 0 {
		return ""
	}
	return strconv.FormatInt(*f.v, 10)
}
func (f sizeValue) Type() string { return "size" }
func (f sizeValue) Set(s string) error {
	if s == "-1" && f.unlimited {
		*f.v = -1
		return nil
	}
	n, err := parseSize(s)
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("must not be 0")
	}
	*f.v = n
	return nil
}

type durationValue struct{ v *time.Duration }

func (f durationValue) String() string {
	if f.v == nil || *f.v == 0 {
		return ""
	}
	return f.v.String()
}
func (f durationValue) Type() string { return "duration" }
func (f durationValue) Set(s string) error {
	d, err := parseDuration(s)
	if err == nil {
		*f.v = d
	}
	return err
}

// ioRates are the limits of what goes to and from a disk.
var ioRates = []ioRate{
	{"device-read-bps", "`device:rate`: bytes a second read from a disk, as /dev/sda:10m", true, func(r *runtime.IORate) *int64 { return &r.ReadBPS }},
	{"device-write-bps", "`device:rate`: bytes a second written to a disk; on cgroup v1 only direct writes", true, func(r *runtime.IORate) *int64 { return &r.WriteBPS }},
	{"device-read-iops", "`device:rate`: reads a second from a disk, as /dev/sda:100", false, func(r *runtime.IORate) *int64 { return &r.ReadIOPS }},
	{"device-write-iops", "`device:rate`: writes a second to a disk; on cgroup v1 only direct writes", false, func(r *runtime.IORate) *int64 { return &r.WriteIOPS }},
}

type ioRate struct {
	flag, usage string
	bytes       bool // else operations
	of          func(*runtime.IORate) *int64
}

// rateValue is one of these flags, given once a device.
type rateValue struct {
	list *[]runtime.IORate
	ioRate
}

func (f rateValue) String() string { return "" } // none is preset
func (f rateValue) Type() string   { return "rate" }
func (f rateValue) Set(s string) error {
	device, rate, ok := cutLast(s, ":")
	if !ok || device == "" || rate == "" {
		return errors.New("not DEVICE:RATE")
	}
	abs, err := filepath.Abs(device)
	if err != nil {
		return err
	}
	var n int64
	if f.bytes {
		n, err = parseSize(rate)
	} else if n, err = strconv.ParseInt(rate, 10, 32); err != nil {
		err = fmt.Errorf("%q is not a number of operations a second", rate)
	}
	if err == nil && n <= 0 {
		err = fmt.Errorf("%q: must be above 0", rate)
	}
	if err != nil {
		return err
	}
	r := runtime.IORate{Device: abs}
	*f.of(&r) = n
	*f.list = append(*f.list, r)
	return nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// parseVolume reads -v SRC:DST[:OPTIONS] as docker does; a relative source is
// relative to the current directory.
func parseVolume(s string) (runtime.Volume, error) {
	p := strings.Split(s, ":")
	if len(p) < 2 || len(p) > 3 || p[0] == "" || p[1] == "" {
		return runtime.Volume{}, fmt.Errorf("%q is not SOURCE:TARGET[:ro|rw|O]", s)
	}
	v := runtime.Volume{Source: p[0], Target: p[1], Mode: "rw"}
	if len(p) == 3 {
		for _, o := range strings.Split(p[2], ",") {
			switch o {
			case "ro", "rw", "O":
				v.Mode = o
			case "z", "Z": // labels: there is no SELinux labelling of ours
			default:
				return v, fmt.Errorf("%q: unknown option %q (ro, rw, O)", s, o)
			}
		}
	}
	return v, absSource(&v)
}

func absSource(v *runtime.Volume) error {
	if strings.IndexByte(v.Source, 0) >= 0 || strings.IndexByte(v.Target, 0) >= 0 {
		return errors.New("a path holds a NUL byte")
	}
	abs, err := filepath.Abs(v.Source)
	if err != nil {
		return err
	}
	v.Source = abs
	if len(v.Target) > 1 {
		v.Target = strings.TrimSuffix(v.Target, "/")
	}
	return nil
}

// parseMount reads docker's --mount type=…,source=…,target=….
func parseMount(s string) (*runtime.Volume, *runtime.Tmpfs, error) {
	var v runtime.Volume
	var t runtime.Tmpfs
	v.Mode = "rw"
	kind := "bind"
	type only1 struct{ kind, option string }
	var only []only1 // options that one kind of mount has
	for _, kv := range strings.Split(s, ",") {
		k, val, has := strings.Cut(kv, "=")
		var err error
		switch k {
		case "type":
			kind = val
		case "source", "src":
			v.Source = val
			only = append(only, only1{"bind", k})
		case "target", "dst", "destination":
			v.Target, t.Target = val, val
		case "readonly", "ro":
			only = append(only, only1{"bind", k})
			ro := true
			if has {
				if ro, err = strconv.ParseBool(val); err != nil {
					err = fmt.Errorf("%s=%q is not true or false", k, val)
				}
			}
			if ro {
				v.Mode = "ro"
			}
		case "tmpfs-size":
			only = append(only, only1{"tmpfs", k})
			t.SizeBytes, err = positiveSize(val)
		case "tmpfs-mode":
			only = append(only, only1{"tmpfs", k})
			t.Mode, err = parseMode(val)
		default:
			err = fmt.Errorf("unknown option %q", k)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%q: %w", s, err)
		}
	}
	for _, o := range only {
		if (kind == "bind" || kind == "tmpfs") && o.kind != kind {
			return nil, nil, fmt.Errorf("%q: a %s has no option %q", s, kind, o.option)
		}
	}
	switch {
	case v.Target == "":
		return nil, nil, fmt.Errorf("%q has no target", s)
	case kind == "tmpfs":
		return nil, &t, nil
	case kind == "bind" && v.Source != "":
		return &v, nil, absSource(&v)
	case kind == "bind":
		return nil, nil, fmt.Errorf("%q has no source", s)
	}
	return nil, nil, fmt.Errorf("%q: type %q is not bind or tmpfs", s, kind)
}

// positiveSize is parseSize where 0 would be taken for the default.
func positiveSize(s string) (int64, error) {
	n, err := parseSize(s)
	if err == nil && n == 0 {
		err = fmt.Errorf("%q: must not be 0", s)
	}
	return n, err
}

func parseMode(s string) (uint32, error) {
	m, err := strconv.ParseUint(s, 8, 12)
	if err != nil || m == 0 {
		return 0, fmt.Errorf("%q is not an octal mode", s)
	}
	return uint32(m), nil
}

// parseTmpfs reads --tmpfs TARGET[:size=…,mode=…,exec].
func parseTmpfs(s string) (runtime.Tmpfs, error) {
	target, opts, _ := strings.Cut(s, ":")
	t := runtime.Tmpfs{Target: target}
	for _, o := range strings.Split(opts, ",") {
		k, v, _ := strings.Cut(o, "=")
		var err error
		switch k {
		case "", "rw", "noexec", "nosuid", "nodev":
		case "exec":
			t.Exec = true
		case "size":
			t.SizeBytes, err = positiveSize(v)
		case "mode":
			t.Mode, err = parseMode(v)
		default:
			err = fmt.Errorf("unknown option %q", k)
		}
		if err != nil {
			return t, fmt.Errorf("%q: %w", s, err)
		}
	}
	return t, nil
}

// parseUlimit reads docker's name=soft[:hard].
func parseUlimit(s string) (runtime.Rlimit, error) {
	name, v, ok := strings.Cut(s, "=")
	soft, hard, two := strings.Cut(v, ":")
	if !two {
		hard = soft
	}
	r := runtime.Rlimit{Name: strings.ToLower(name)}
	for _, p := range []struct {
		s string
		n *uint64
	}{{soft, &r.Soft}, {hard, &r.Hard}} {
		if p.s == "-1" || p.s == "unlimited" {
			*p.n = math.MaxUint64
			continue
		}
		n, err := strconv.ParseUint(p.s, 10, 63)
		if err != nil || !ok || name == "" {
			return r, fmt.Errorf("%q is not NAME=SOFT[:HARD]", s)
		}
		*p.n = n
	}
	return r, nil
}

// parseEnv reads -e: KEY=VALUE, or KEY for the caller's own value (nothing
// where the caller has none), as docker does.
func parseEnv(list, files []string) ([]string, error) {
	var out []string
	add := func(kv, where string) error {
		k, _, has := strings.Cut(kv, "=")
		if k == "" || strings.IndexByte(kv, 0) >= 0 {
			return fmt.Errorf("%s%q is not KEY=VALUE", where, kv)
		}
		if !has {
			v, ok := os.LookupEnv(k)
			if !ok {
				return nil
			}
			kv = k + "=" + v
		}
		out = append(out, kv)
		return nil
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read --env-file: %w", err)
		}
		for i, line := range strings.Split(string(b), "\n") {
			line = strings.TrimLeft(strings.TrimSuffix(line, "\r"), " \t")
			if line == "" || line[0] == '#' {
				continue
			}
			if err := add(line, fmt.Sprintf("%s:%d: ", f, i+1)); err != nil {
				return nil, err
			}
		}
	}
	for _, kv := range list {
		if err := add(kv, ""); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// parseSignal reads TERM, SIGTERM or 15.
func parseSignal(s string) (int, error) {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 65 {
		return n, nil
	}
	if n := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(s), "SIG")); n != 0 {
		return int(n), nil
	}
	return 0, fmt.Errorf("%q is not a signal", s)
}
