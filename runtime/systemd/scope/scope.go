// Package scope makes transient scopes: it is the sole importer of a D-Bus
// library, and so belongs into the second binary. It knows systemd's words for
// limits and nothing of sandboxes.
package scope

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/runtime/systemd"
)

const (
	manager   = "org.freedesktop.systemd1"
	ifManager = manager + ".Manager"
	ifScope   = manager + ".Scope"
)

// Scope is a scope that was made. This connection is its controller: when it is
// to be stopped, systemd asks here, and kills what is in it only after its
// TimeoutStopSec.
type Scope struct {
	// Cgroup is its path below the mount point.
	Cgroup string
	// Stop is closed when systemd wants it stopped.
	Stop <-chan struct{}
	conn *dbus.Conn
}

// timeout is for a systemd that does not answer.
const timeout = 30 * time.Second

// Make makes a scope, which is delegated: its processes may make groups below.
// The end of ctx is that of the connection.
func Make(ctx context.Context, r systemd.ScopeRequest) (_ *Scope, err error) {
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return nil, hinted.New(fmt.Errorf("connect to the system bus: %w", err), "is dbus installed and running? --cgroup-manager cgroupfs needs none")
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	props, err := properties(r, conn.Names()[0])
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	// Only what is about this unit: jobs come and go on a busy host.
	match := []dbus.MatchOption{dbus.WithMatchInterface(ifManager), dbus.WithMatchMember("JobRemoved"), dbus.WithMatchArg(2, r.Unit)}
	if err := conn.AddMatchSignalContext(ctx, match...); err != nil {
		return nil, fmt.Errorf("listen to systemd: %w", err)
	}
	var job dbus.ObjectPath
	o := conn.Object(manager, "/org/freedesktop/systemd1")
	type aux struct {
		Name  string
		Props []property
	}
	if err := o.CallWithContext(ctx, ifManager+".StartTransientUnit", 0, r.Unit, "fail", props, []aux{}).Store(&job); err != nil {
		return nil, hinted.New(fmt.Errorf("start %s: %w", r.Unit, err), "journalctl -b -u "+r.Unit)
	}
	stop := make(chan struct{})
	result, err := wait(ctx, signals, job)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", r.Unit, err)
	}
	if result != "done" {
		return nil, hinted.New(fmt.Errorf("start %s: its job is %s", r.Unit, result), "journalctl -b -u "+r.Unit)
	}
	if err := conn.RemoveMatchSignalContext(ctx, match...); err != nil {
		return nil, fmt.Errorf("listen to systemd: %w", err)
	}
	var path dbus.ObjectPath
	if err := o.CallWithContext(ctx, ifManager+".GetUnit", 0, r.Unit).Store(&path); err != nil {
		return nil, fmt.Errorf("find %s: %w", r.Unit, err)
	}
	group, err := conn.Object(manager, path).GetProperty(ifScope + ".ControlGroup")
	if err != nil {
		return nil, fmt.Errorf("find cgroup of %s: %w", r.Unit, err)
	}
	s := &Scope{Stop: stop, conn: conn}
	if s.Cgroup, _ = group.Value().(string); s.Cgroup == "" {
		return nil, fmt.Errorf("find cgroup of %s: it has none", r.Unit)
	}
	go func() {
		for sig := range signals {
			if sig.Name == ifScope+".RequestStop" && stop != nil {
				close(stop)
				stop = nil
			}
		}
	}()
	return s, nil
}

// Close lets go of the scope, which lasts as long as its processes.
func (s *Scope) Close() error { return s.conn.Close() }

// wait gives the result of a job.
func wait(ctx context.Context, signals <-chan *dbus.Signal, job dbus.ObjectPath) (string, error) {
	for {
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case sig, ok := <-signals:
			if !ok {
				return "", errors.New("the system bus is gone")
			}
			var id uint32
			var path dbus.ObjectPath
			var unit, result string
			if sig.Name == ifManager+".JobRemoved" && dbus.Store(sig.Body, &id, &path, &unit, &result) == nil && path == job {
				return result, nil
			}
		}
	}
}

// property is one of systemd's, as it comes over the bus.
type property struct {
	Name  string
	Value dbus.Variant
}

// properties puts a request into systemd's words.
func properties(r systemd.ScopeRequest, controller string) ([]property, error) {
	var out []property
	set := func(name string, v any) { out = append(out, property{Name: name, Value: dbus.MakeVariant(v)}) }
	set("Description", r.Description)
	set("Slice", r.Slice)
	set("PIDs", []uint32{uint32(r.PID)})
	set("Delegate", true)
	set("Controller", controller)
	set("DefaultDependencies", false) // it ends with its supervisor, which has an order of its own
	set("CollectMode", "inactive-or-failed")
	if r.StopTimeout > 0 {
		set("TimeoutStopUSec", uint64(r.StopTimeout.Microseconds()))
	}
	for _, a := range []string{"CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting"} {
		set(a, true)
	}
	if r.MemoryBytes > 0 {
		set("MemoryMax", uint64(r.MemoryBytes))
		if r.SwapBytes >= 0 {
			set("MemorySwapMax", uint64(r.SwapBytes))
		}
	}
	for _, x := range []struct {
		name string
		n    int64
	}{
		{"MemoryLow", r.MemoryLowBytes},
		{"MemoryHigh", r.MemoryHighBytes},
		{"TasksMax", r.Pids},
		{"CPUWeight", r.CPUWeight},
		{"CPUQuotaPerSecUSec", int64(math.Round(r.CPUs * 1e6))},
	} {
		if x.n > 0 {
			set(x.name, uint64(x.n))
		}
	}
	for _, x := range [][2]string{{"AllowedCPUs", r.CPUSet}, {"AllowedMemoryNodes", r.CPUSetMems}} {
		if x[1] == "" {
			continue
		}
		mask, err := bits(x[1])
		if err != nil {
			return nil, err
		}
		set(x[0], mask)
	}
	type rate struct {
		Path string
		N    uint64
	}
	for _, x := range []struct {
		name string
		of   func(systemd.IORate) int64
	}{
		{"IOReadBandwidthMax", func(r systemd.IORate) int64 { return r.ReadBPS }},
		{"IOWriteBandwidthMax", func(r systemd.IORate) int64 { return r.WriteBPS }},
		{"IOReadIOPSMax", func(r systemd.IORate) int64 { return r.ReadIOPS }},
		{"IOWriteIOPSMax", func(r systemd.IORate) int64 { return r.WriteIOPS }},
	} {
		var rates []rate
		for _, io := range r.IO {
			if n := x.of(io); n > 0 {
				rates = append(rates, rate{io.Device, uint64(n)})
			}
		}
		if rates != nil {
			set(x.name, rates)
		}
	}
	return out, nil
}

// bits turns a list of numbers into systemd's mask, the lowest first.
func bits(list string) ([]byte, error) {
	var mask []byte
	for part := range strings.SplitSeq(list, ",") {
		a, b, two := strings.Cut(strings.TrimSpace(part), "-")
		if !two {
			b = a
		}
		from, err := strconv.ParseUint(a, 10, 13)
		to, err2 := strconv.ParseUint(b, 10, 13)
		if err := errors.Join(err, err2); err != nil || from > to {
			return nil, fmt.Errorf("limit to %q: not a list of CPUs or nodes", list)
		}
		for i := from; i <= to; i++ {
			for uint64(len(mask)) <= i/8 {
				mask = append(mask, 0)
			}
			mask[i/8] |= 1 << (i % 8)
		}
	}
	return mask, nil
}
