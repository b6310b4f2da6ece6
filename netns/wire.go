package netns

import (
	"strconv"
	"strings"
	"time"
)

// The network modes of a sandbox. A mode may also be "ns:PATH".
const (
	ModeNone   = "none"   // lo only
	ModeEgress = "egress" // lo only, and a proxy of ours that reaches what is allowed
	ModeFull   = "full"   // a routed veth, with address translation
	ModeHost   = "host"   // the host's own
)

// EgressResolv is the /etc/resolv.conf of every sandbox with ModeEgress: it
// need not wait for the helper.
const EgressResolv = "nameserver 198.18.0.1\n"

// Options are what was asked of the network, beside its mode.
type Options struct {
	// Allow and Deny are HOST[:PORT], *.HOST[:PORT], ADDRESS[:PORT], CIDR[:PORT];
	// a deny wins over every allow. With ModeFull addresses and CIDRs only.
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
	// Into are prefixes that an allowed name may lead into although they are
	// private; they allow nothing by themselves.
	Into []string `json:"into,omitempty"`

	Publish    []Port     `json:"publish,omitempty"`
	ExposeUnix []UnixPort `json:"expose_unix,omitempty"`
	HostPorts  []HostPort `json:"host_ports,omitempty"`
	// DNS are the name servers' addresses (ModeFull); none is the host's own.
	DNS []string `json:"dns,omitempty"`
	MTU int      `json:"mtu,omitempty"` // 0 is that of the host's default route

	// Limits; 0 is none, for MaxConns the default of 256 at a time.
	MaxConns    int   `json:"max_conns,omitempty"`
	MaxBytes    int64 `json:"max_bytes,omitempty"`     // both ways together
	RateUpBPS   int64 `json:"rate_up_bps,omitempty"`   // bits per second
	RateDownBPS int64 `json:"rate_down_bps,omitempty"` // bits per second
}

// Request is what sbxrun asks of sbxrun-net, as one JSON object. The namespace
// comes with it as a descriptor.
type Request struct {
	// Mode is ModeEgress, ModeFull, or ModeNone where ports are all that is wanted.
	Mode string `json:"mode"`
	// ID names the sandbox, Slot is its number: all addresses derive from it.
	ID   string `json:"id"`
	Slot int    `json:"slot"`
	// State is the directory where what outlives this process is noted.
	State string `json:"state"`
	Options
	// Log says that descriptor LogFD takes a JSON line for each decision.
	Log bool `json:"log,omitempty"`
	// DropTo is the host uid and gid that sbxrun-net goes on as once all is set up.
	DropTo uint32 `json:"drop_to"`
}

// The descriptors of sbxrun-net.
const (
	ControlFD = 3 // a stream socket: the request, then replies; its end is the helper's
	LogFD     = 4
)

// Port is a published port: what comes to the host's Host:HostPort goes to
// ContainerPort in the namespace.
type Port struct {
	Proto         string `json:"proto"`     // tcp, udp
	HostIP        string `json:"host_ip"`   // "" is every address
	HostPort      int    `json:"host_port"` // 0 in a request is any free one
	ContainerPort int    `json:"container_port"`
}

// Host is the host's side as host:port.
func (p Port) Host() string {
	ip := p.HostIP
	switch {
	case ip == "":
		ip = "0.0.0.0"
	case strings.Contains(ip, ":"):
		ip = "[" + ip + "]"
	}
	return ip + ":" + strconv.Itoa(p.HostPort)
}

// UnixPort is a UNIX socket of the host's, mode 0600, that leads to a TCP port in
// the namespace. The caller removes it at the end.
type UnixPort struct {
	Path          string `json:"path"`
	ContainerPort int    `json:"container_port"`
}

// HostPort leads from a TCP port of 127.0.0.1 in the namespace to one of the
// host's: a published port the other way round.
type HostPort struct {
	ContainerPort int `json:"container_port"`
	HostPort      int `json:"host_port"`
}

// Served says whether ports, of either direction, are asked for.
func (o *Options) Served() bool { return len(o.Publish)+len(o.ExposeUnix)+len(o.HostPorts) > 0 }

// Reply is one JSON line of sbxrun-net's: first Ready or Error, at the end Stats.
type Reply struct {
	Ready *Ready   `json:"ready,omitempty"`
	Stats *Summary `json:"stats,omitempty"`
	Error string   `json:"error,omitempty"`
	Hint  string   `json:"hint,omitempty"`
}

// Ready is that the network is set up.
type Ready struct {
	Ports []Port `json:"ports,omitempty"` // with the numbers that were taken
	// Resolv is the content of /etc/resolv.conf; "" is none.
	Resolv string `json:"resolv,omitempty"`
	// Env are the variables that lead programs to the proxy.
	Env []string `json:"env,omitempty"`
	// Addresses are the sandbox's own, with their prefix length (ModeFull).
	Addresses []string `json:"addresses,omitempty"`
	Notes     []string `json:"notes,omitempty"`
	// Serving is that this process must live as long as the sandbox.
	Serving bool `json:"serving"`
}

// Decision is one allow or deny, with the rule that decided.
type Decision struct {
	Time time.Time `json:"time"`
	// Via is how it was asked: connect, http, tcp (transparent), dns, publish, host-port.
	Via     string `json:"via"`
	Host    string `json:"host,omitempty"`    // the name that was asked for; "" is an address alone
	Address string `json:"address,omitempty"` // that was connected to or refused; "" where none was looked up
	Port    int    `json:"port,omitempty"`
	Allowed bool   `json:"allowed"`
	// Rule is the entry that decided ("--allow *.example.org"), or the built-in
	// one ("default deny", "private address"), or the limit.
	Rule string `json:"rule"`
	// Error is why an allowed connection did not come about.
	Error string `json:"error,omitempty"`
}

// Stats are the figures of ModeEgress.
type Stats struct {
	Connections int64 `json:"connections"`
	Denied      int64 `json:"denied"`
	UpBytes     int64 `json:"up_bytes"`   // from the sandbox
	DownBytes   int64 `json:"down_bytes"` // to the sandbox
}

// PortStats are the figures of published ports and sockets.
type PortStats struct {
	PortConnections int64 `json:"port_connections"` // and UDP clients
	InBytes         int64 `json:"in_bytes"`         // to published ports
	OutBytes        int64 `json:"out_bytes"`        // from published ports
}

// Summary is what was seen until the end: nothing of what was not there to see.
type Summary struct {
	*Stats
	*PortStats
	// Decisions are the different ones, in order of appearance; more than there is
	// room for are only counted.
	Decisions []Tally `json:"decisions,omitempty"`
	Omitted   int64   `json:"omitted,omitempty"`
}

// Tally is a decision that was taken Count times; Time is the first.
type Tally struct {
	Decision
	Count int64 `json:"count"`
}
