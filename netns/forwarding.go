package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// LinkPrefix starts the name of every sandbox's link on the host; its slot
// number follows.
const LinkPrefix = "sbx"

const sysctls = "/proc/sys/net/" // of the calling thread's namespace

// Forwarding is the word of a live sandbox that the host has to forward
// packets: a shared lock. Whoever finds that nobody holds it any more puts back
// what was changed.
type Forwarding struct {
	live  *os.File
	state string
}

// record is what was changed and has to be put back. It is written before the
// change. Sysctls do not survive a reboot, so an old one does no harm: only
// what has the value that was written is put back.
type record struct {
	// IPv4All is conf/all/forwarding as it was.
	IPv4All string           `json:"ipv4_all"`
	Changes []forwardingEdit `json:"changes"`
	// Keep are values that putting back ipv6/conf/all/forwarding overwrites.
	Keep []forwardingEdit `json:"keep,omitempty"`
}

type forwardingEdit struct {
	Path string `json:"path"` // below /proc/sys/net
	Old  string `json:"old"`
	New  string `json:"new"`
}

func noteDir(state string) string    { return filepath.Join(state, "net") }
func recordPath(state string) string { return filepath.Join(noteDir(state), "forwarding.json") }

func openLock(state, name string, how int) (*os.File, error) {
	path := filepath.Join(noteDir(state), name)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(noteDir(state), 0o700); err != nil {
			return nil, fmt.Errorf("make directory of network notes: %w", err)
		}
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := flock(f, how); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %q: %w", f.Name(), err)
	}
	return f, nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR { //nolint:errorlint // a bare errno
			return err
		}
	}
}

// HoldForwarding says that a sandbox with a routed network is about to live. It
// changes nothing: PlanForwarding does, once the rules are in place.
func HoldForwarding(state string) (*Forwarding, error) {
	f, err := openLock(state, "forwarding.live", unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	return &Forwarding{f, state}, nil
}

// Release takes the word back; the last one puts the host's settings back.
func (f *Forwarding) Release() error {
	_, err := restoreIfLast(f.live, f.state)
	return errors.Join(err, f.live.Close())
}

// HealForwarding puts back what sandboxes that were killed left switched on, and
// says what. It does nothing while a sandbox lives.
func HealForwarding(state string) ([]string, error) {
	if _, err := os.Stat(recordPath(state)); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	f, err := openLock(state, "forwarding.live", unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return restoreIfLast(f, state)
}

// WhileIdle runs f if no sandbox with a routed network lives, and keeps new ones
// waiting meanwhile.
func WhileIdle(state string, f func() error) error {
	live, err := openLock(state, "forwarding.live", unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer live.Close()
	return f()
}

// restoreIfLast gives up the shared lock on live for the exclusive one, which
// only the last holder gets: the kernel drops the old lock before it looks.
func restoreIfLast(live *os.File, state string) ([]string, error) {
	if err := flock(live, unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK { //nolint:errorlint // a bare errno
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("lock %q: %w", live.Name(), err)
	}
	r, found, err := readRecord(state)
	if err != nil || !found {
		return nil, err
	}
	done, err := r.restore()
	if err != nil {
		return done, err // the record stays for the next attempt
	}
	if err := os.Remove(recordPath(state)); err != nil {
		return done, fmt.Errorf("remove forwarding record: %w", err)
	}
	return done, nil
}

// restore puts back what still has our value. Where IPv4 forwarding was switched
// on for all interfaces meanwhile (docker does, when it starts), ours is part of
// that by now and stays.
func (r *record) restore() (done []string, err error) {
	all4, _ := readSysctl("ipv4/conf/all/forwarding")
	for _, c := range r.Changes {
		if strings.HasPrefix(c.Path, "ipv4/") && all4 != r.IPv4All {
			continue
		}
		if now, ok := readSysctl(c.Path); !ok || now != c.New {
			continue
		}
		if err := change(c.Path, c.Old); err != nil {
			return done, err
		}
		done = append(done, c.describe())
	}
	for _, c := range r.Keep {
		if now, ok := readSysctl(c.Path); ok && now != c.Old && len(done) > 0 {
			if err := change(c.Path, c.Old); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

func (c forwardingEdit) describe() string {
	return fmt.Sprintf("net/%s put back to %s", c.Path, c.Old)
}

// device is the interface that a change is for, or "all".
func (c forwardingEdit) device() string { return filepath.Base(filepath.Dir(c.Path)) }

func readRecord(state string) (r record, found bool, err error) {
	b, err := os.ReadFile(recordPath(state))
	if errors.Is(err, os.ErrNotExist) {
		return r, false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return r, false, fmt.Errorf("read forwarding record %q: %w", recordPath(state), err)
	}
	return r, true, nil
}

func (r *record) write(state string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write forwarding record: %w", err)
	}
	tmp := recordPath(state) + ".new" // one writer: Plan has the mutex
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write forwarding record: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, recordPath(state))
	}
	if err != nil {
		return fmt.Errorf("write forwarding record: %w", err)
	}
	return nil
}

// readSysctl and WriteSysctl are bare system calls: package os asks three times
// as many of the kernel, and a launch reads a dozen of these files.
func readSysctl(path string) (string, bool) {
	fd, err := unix.Open(sysctls+path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	defer unix.Close(fd)
	var b [64]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(b[:n])), true
}

// WriteSysctl sets one below /proc/sys/net, of the calling thread's namespace.
func WriteSysctl(path, value string) error {
	fd, err := unix.Open(sysctls+path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		err = errors.Join(err, unix.Close(fd))
	}
	if err != nil {
		return fmt.Errorf("set sysctl net/%s to %s: %w", path, value, err)
	}
	return nil
}

// HasSysctl is whether there is such a file or directory.
func HasSysctl(path string) bool { return unix.Access(sysctls+path, unix.F_OK) == nil }

// change sets one of the host's. An interface may be gone since.
func change(path, value string) error {
	err := WriteSysctl(path, value)
	if err == nil || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return hinted.New(err, "--network full needs to forward packets; where /proc/sys is read-only, set net.ipv4.ip_forward=1 beforehand")
}

// Guarded is an interface that forwards a family's packets only because of us.
type Guarded struct {
	Device string
	IPv6   bool
}

// ForwardingPlan is what the host needs for routed sandboxes. Until Close no
// other process plans.
type ForwardingPlan struct {
	// Guarded is where whatever comes in and is not for a sandbox must not be
	// forwarded.
	Guarded []Guarded
	// Uplink is the interface of the IPv4 (else IPv6) default route; "" is none.
	Uplink string
	// IPv6 is whether sandboxes get IPv6; Notes say why not.
	IPv6  bool
	Notes []string

	mutex   *os.File
	live    *os.File
	state   string
	rec     record
	changed bool // rec is not what is on disk
}

// PlanForwarding finds what has to be switched on, for the calling thread's
// namespace. The caller guards Guarded, then calls Apply. It fails when nobody
// holds forwarding: nobody would put it back.
func PlanForwarding(state string) (*ForwardingPlan, error) {
	mutex, err := openLock(state, "forwarding.plan", unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	p := &ForwardingPlan{mutex: mutex, state: state}
	if err := p.fill(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *ForwardingPlan) fill() error {
	if live, err := openLock(p.state, "forwarding.live", unix.LOCK_EX|unix.LOCK_NB); err == nil {
		live.Close()
		return errors.New("plan forwarding: nobody holds it")
	} else if !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	// Whoever heals when the holder is killed meanwhile would remove the record
	// before what is in it was changed.
	var err error
	if p.live, err = openLock(p.state, "forwarding.live", unix.LOCK_SH); err != nil {
		return err
	}
	rec, _, err := readRecord(p.state)
	if err != nil {
		return err
	}
	// What others, or a killed run, switched on is ours to put back while it
	// stands and nobody else wants it.
	all4, _ := readSysctl("ipv4/conf/all/forwarding")
	p.rec = rec
	p.rec.Changes = slices.DeleteFunc(slices.Clone(rec.Changes), func(c forwardingEdit) bool {
		now, ok := readSysctl(c.Path)
		return !ok || now != c.New || strings.HasPrefix(c.Path, "ipv4/") && all4 != rec.IPv4All
	})
	p.changed = len(p.rec.Changes) != len(rec.Changes)
	p.rec.IPv4All = all4
	if len(p.rec.Changes) == 0 {
		p.rec.Keep = nil
	}
	v4, err := listRoutes(unix.AF_INET)
	if err != nil {
		return err
	}
	v6, err := listRoutes(unix.AF_INET6)
	if err != nil {
		return err
	}
	// The kernel asks the interface that a packet came in by (IN_DEV_FORWARD), so
	// the interfaces where answers arrive are enough, and the sandboxes' own.
	for _, dev := range v4.devices {
		p.want("ipv4/conf/" + dev + "/forwarding")
	}
	p.Uplink = v4.uplink
	if p.Uplink == "" {
		p.Uplink = v6.uplink
	}
	if why := p.planIPv6(v6); why != "" {
		p.Notes = append(p.Notes, "no IPv6 in the sandbox: "+why)
	} else {
		p.IPv6 = true
	}
	for _, c := range p.rec.Changes {
		devices := []string{c.device()}
		if devices[0] == "all" { // of IPv6, where it makes every interface forward
			devices = interfaces("ipv6")
		}
		for _, d := range devices {
			p.Guarded = append(p.Guarded, Guarded{d, strings.HasPrefix(c.Path, "ipv6/")})
		}
	}
	return nil
}

func (p *ForwardingPlan) want(path string) {
	if slices.ContainsFunc(p.rec.Changes, func(c forwardingEdit) bool { return c.Path == path }) {
		return // is on, because of us
	}
	if old, ok := readSysctl(path); ok && old == "0" {
		p.rec.Changes = append(p.rec.Changes, forwardingEdit{Path: path, Old: old, New: "1"})
		p.changed = true
	}
}

// forceForwarding is a variable so that tests see kernels without it.
var forceForwarding = "force_forwarding"

// planIPv6 returns why there is none.
func (p *ForwardingPlan) planIPv6(r routes) string {
	if off, ok := readSysctl("ipv6/conf/all/disable_ipv6"); !ok || off != "0" {
		return "it is disabled on the host"
	}
	if len(r.devices) == 0 {
		return "the host has no IPv6 route"
	}
	const all = "ipv6/conf/all/forwarding"
	if on, _ := readSysctl(all); on != "0" {
		return ""
	}
	// Linux 6.17: forwards what comes in there and leaves all else of a host as it is.
	if HasSysctl("ipv6/conf/" + r.devices[0] + "/" + forceForwarding) {
		for _, dev := range r.devices {
			p.want("ipv6/conf/" + dev + "/" + forceForwarding)
		}
		return ""
	}
	// Before, only the global switch counts. It drops the default routes that
	// came by router advertisements and ends listening to them (accept_ra=1).
	for _, dev := range r.byRA {
		if v, _ := readSysctl("ipv6/conf/" + dev + "/accept_ra"); v == "1" {
			return "the host's own comes by router advertisements, to which a forwarding host does not listen (net.ipv6.conf." +
				dev + ".accept_ra=2 and net.ipv6.conf.all.forwarding=1 let it)"
		}
	}
	for _, dev := range append(interfaces("ipv6"), "default") {
		path := "ipv6/conf/" + dev + "/forwarding"
		if v, ok := readSysctl(path); ok && v != "0" {
			p.rec.Keep = append(p.rec.Keep, forwardingEdit{Path: path, Old: v})
		}
	}
	p.want(all)
	return ""
}

// interfaces are those that have settings, without lo and the sandboxes'.
func interfaces(family string) (names []string) {
	ents, _ := os.ReadDir(filepath.Join(sysctls, family, "conf"))
	for _, e := range ents {
		if n := e.Name(); n != "all" && n != "default" && n != "lo" && !ours(n) {
			names = append(names, n)
		}
	}
	return names
}

// ours is whether a name is that of a sandbox's link.
func ours(name string) bool {
	n, ok := strings.CutPrefix(name, LinkPrefix)
	return ok && n != "" && strings.Trim(n, "0123456789") == ""
}

// Apply notes what changes, then changes it.
func (p *ForwardingPlan) Apply() error {
	if !p.changed {
		return nil
	}
	if err := p.rec.write(p.state); err != nil {
		return err
	}
	p.changed = false
	for _, c := range p.rec.Changes {
		if now, ok := readSysctl(c.Path); !ok || now == c.New {
			continue
		}
		if err := change(c.Path, c.New); err != nil {
			return err
		}
	}
	return nil
}

// Close lets others plan.
func (p *ForwardingPlan) Close() error {
	err := p.mutex.Close()
	if p.live != nil {
		err = errors.Join(err, p.live.Close())
	}
	return err
}

// routes are where a family's packets may go by the routing tables.
type routes struct {
	devices []string // that unicast routes lead to, without lo and the sandboxes'
	byRA    []string // whose default route came by a router advertisement
	uplink  string   // of the default route with the smallest metric
}

func listRoutes(family int) (r routes, err error) {
	b, err := syscall.NetlinkRIB(unix.RTM_GETROUTE, family)
	if err != nil {
		return r, fmt.Errorf("list routes: %w", err)
	}
	msgs, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return r, fmt.Errorf("list routes: %w", err)
	}
	names := map[uint32]string{}
	best := uint32(0)
	for i := range msgs {
		if msgs[i].Header.Type != unix.RTM_NEWROUTE || len(msgs[i].Data) < unix.SizeofRtMsg {
			continue
		}
		rt := (*unix.RtMsg)(unsafe.Pointer(&msgs[i].Data[0]))
		attrs, err := syscall.ParseNetlinkRouteAttr(&msgs[i])
		if err != nil {
			return r, fmt.Errorf("list routes: %w", err)
		}
		// A prefix length of 0 is a default route; IPv6's fe80::/10 and ff00::/8
		// are on every interface.
		if rt.Type != unix.RTN_UNICAST || family == unix.AF_INET6 && linkScope(attrs) {
			continue
		}
		links, metric := outs(attrs)
		for _, index := range links {
			name, ok := names[index]
			if !ok {
				if name, err = linkName(index); err != nil {
					continue // gone since
				}
				names[index] = name
			}
			if name == "lo" || ours(name) {
				continue
			}
			if !slices.Contains(r.devices, name) {
				r.devices = append(r.devices, name)
			}
			if rt.Dst_len != 0 {
				continue
			}
			if rt.Protocol == unix.RTPROT_RA || rt.Protocol == unix.RTPROT_KERNEL && family == unix.AF_INET6 {
				r.byRA = append(r.byRA, name) // the kernel's own listener, or a daemon's
			}
			if r.uplink == "" || metric < best {
				r.uplink, best = name, metric
			}
		}
	}
	return r, nil
}

func linkScope(attrs []syscall.NetlinkRouteAttr) bool {
	for _, a := range attrs {
		if a.Attr.Type == unix.RTA_DST && len(a.Value) == 16 {
			return a.Value[0] == 0xff || a.Value[0] == 0xfe && a.Value[1]&0xc0 == 0x80
		}
	}
	return false
}

// outs are the interfaces that a route leads to, and its metric.
func outs(attrs []syscall.NetlinkRouteAttr) (links []uint32, metric uint32) {
	u32 := func(b []byte) uint32 { return *(*uint32)(unsafe.Pointer(&b[0])) }
	for _, a := range attrs {
		switch {
		case a.Attr.Type == unix.RTA_OIF && len(a.Value) >= 4:
			links = append(links, u32(a.Value))
		case a.Attr.Type == unix.RTA_PRIORITY && len(a.Value) >= 4:
			metric = u32(a.Value)
		case a.Attr.Type == unix.RTA_MULTIPATH:
			for b := a.Value; len(b) >= unix.SizeofRtNexthop; {
				nh := (*unix.RtNexthop)(unsafe.Pointer(&b[0]))
				links = append(links, uint32(nh.Ifindex))
				n := (int(nh.Len) + 3) &^ 3
				if n < unix.SizeofRtNexthop || n > len(b) {
					break
				}
				b = b[n:]
			}
		}
	}
	return links, metric
}

func linkName(index uint32) (string, error) {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("")
	if err != nil {
		return "", err
	}
	req.SetUint32(index)
	if err := unix.IoctlIfreq(s, unix.SIOCGIFNAME, req); err != nil {
		return "", fmt.Errorf("name of interface %d: %w", index, err)
	}
	return req.Name(), nil
}

// LinkExists is whether the calling thread's namespace has an interface of this
// index. No index is used twice.
func LinkExists(index uint32) bool {
	_, err := linkName(index)
	return err == nil
}
