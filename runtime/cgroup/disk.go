package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// IORate bounds what goes to and from one disk. v1 counts only what a process
// itself waits for: reads and direct writes, not what is written back later.
// Zero is no limit.
type IORate struct {
	Device    string `json:"device"` // the path as it was given
	Disk      string `json:"disk"`   // its disk as major:minor
	ReadBPS   int64  `json:"read_bytes_per_second,omitempty"`
	WriteBPS  int64  `json:"write_bytes_per_second,omitempty"`
	ReadIOPS  int64  `json:"read_operations_per_second,omitempty"`
	WriteIOPS int64  `json:"write_operations_per_second,omitempty"`
}

// ioKinds are the four rates, as io.max and as v1's files name them.
var ioKinds = []struct {
	key, v1, flag string
	of            func(*IORate) *int64
}{
	{"rbps", "blkio.throttle.read_bps_device", "device-read-bps", func(r *IORate) *int64 { return &r.ReadBPS }},
	{"wbps", "blkio.throttle.write_bps_device", "device-write-bps", func(r *IORate) *int64 { return &r.WriteBPS }},
	{"riops", "blkio.throttle.read_iops_device", "device-read-iops", func(r *IORate) *int64 { return &r.ReadIOPS }},
	{"wiops", "blkio.throttle.write_iops_device", "device-write-iops", func(r *IORate) *int64 { return &r.WriteIOPS }},
}

// v2 is what follows the device in a line of io.max.
func (r *IORate) v2() string {
	var b strings.Builder
	for _, k := range ioKinds {
		if n := *k.of(r); n > 0 {
			fmt.Fprintf(&b, " %s=%d", k.key, n)
		}
	}
	return b.String()
}

// Disks finds the disk of each rate's device and gives one element a disk.
// Two rates of one kind for one disk are an error.
func Disks(rates []IORate) ([]IORate, error) {
	var out []IORate
	for _, r := range rates {
		var err error
		if r.Disk, err = diskOf(r.Device); err != nil {
			return nil, err
		}
		same := -1
		for i := range out {
			if out[i].Disk == r.Disk {
				same = i
			}
		}
		if same < 0 {
			out = append(out, r)
			continue
		}
		for _, k := range ioKinds {
			from, to := k.of(&r), k.of(&out[same])
			if *from > 0 && *to > 0 {
				return nil, hinted.New(fmt.Errorf("limit rate of %q: --%s is given twice for its disk", r.Device, k.flag), "partitions share the rate of their disk")
			}
			*to = max(*from, *to)
		}
	}
	return out, nil
}

// diskOf gives major:minor of the block device at path, or of the disk that it
// is a partition of: a rate is of a whole disk.
func diskOf(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", hinted.New(fmt.Errorf("limit rate of %q: %w", path, err), deviceHint)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", hinted.New(fmt.Errorf("limit rate of %q: %w", path, unix.ENOTBLK), deviceHint)
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	sys := "/sys/dev/block/" + dev
	if !exists(sys) {
		return "", hinted.New(fmt.Errorf("limit rate of %q: no disk has the number %s: %w", path, dev, unix.ENXIO), deviceHint)
	}
	if !exists(sys + "/partition") {
		return dev, nil
	}
	part, err := filepath.EvalSymlinks(sys)
	if err != nil {
		return "", fmt.Errorf("find disk of partition %q: %w", path, err)
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(part), "dev"))
	if err != nil {
		return "", hinted.New(fmt.Errorf("find disk of partition %q: %w", path, err), "name the disk itself")
	}
	return strings.TrimSpace(string(b)), nil
}

const deviceHint = "name a block device, as /dev/sda: lsblk lists them, findmnt -T FILE tells where a file lies"

// appliedIO reads the rates back.
func (g *Group) appliedIO() []IORate {
	var out []IORate
	for _, r := range g.limits.IO {
		got := IORate{Device: r.Device, Disk: r.Disk}
		var errs []error
		for _, k := range ioKinds {
			n, err := g.ioRate(k.key, k.v1, r.Disk)
			*k.of(&got) = n
			errs = append(errs, err)
		}
		if errors.Join(errs...) != nil {
			got = r
		}
		out = append(out, got)
	}
	return out
}

// ioRate reads one rate of one disk, 0 is none.
func (g *Group) ioRate(key, v1, disk string) (int64, error) {
	file := v1
	if g.h.Mode == "v2" {
		file = "io.max"
	}
	b, err := readFile(filepath.Join(g.dir("blkio"), file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != disk {
			continue
		}
		for _, v := range f[1:] {
			if g.h.Mode == "v2" {
				k, n, _ := strings.Cut(v, "=")
				if k != key || n == "max" {
					continue
				}
				v = n
			}
			return strconv.ParseInt(v, 10, 64)
		}
	}
	return 0, nil
}
