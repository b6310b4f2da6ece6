package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/netns"
)

// parsePublish reads docker's [ip:]host:container[/tcp|udp], or a container port
// alone, which gets any free port of the host's.
func parsePublish(s string) (p netns.Port, err error) {
	rest, proto, ok := strings.Cut(s, "/")
	if p.Proto = proto; !ok {
		p.Proto = "tcp"
	}
	if p.Proto != "tcp" && p.Proto != "udp" {
		return p, fmt.Errorf("%q: the protocol is tcp or udp", s)
	}
	i := strings.LastIndexByte(rest, ':')
	if p.ContainerPort, err = parsePort(rest[i+1:], 1); err != nil || i < 0 {
		return p, wrapPort(s, err)
	}
	rest = rest[:i]
	i = strings.LastIndexByte(rest, ':')
	host := rest[i+1:]
	if host == "" && i > 0 { // docker's address::container
		host = "0"
	}
	if p.HostPort, err = parsePort(host, 0); err != nil || i < 0 {
		return p, wrapPort(s, err)
	}
	p.HostIP = rest[:i]
	if v6, ok := strings.CutPrefix(p.HostIP, "["); ok {
		if p.HostIP, ok = strings.CutSuffix(v6, "]"); !ok || !strings.Contains(p.HostIP, ":") {
			return p, fmt.Errorf("%q: [address]:host:container", s)
		}
	} else if strings.Contains(p.HostIP, ":") {
		return p, fmt.Errorf("%q: an IPv6 address needs [ and ]", s)
	}
	// The helper reads it again, as an address.
	if p.HostIP == "" || strings.Trim(p.HostIP, "0123456789abcdefABCDEF.:") != "" {
		return p, fmt.Errorf("%q: %q is not an IP address", s, p.HostIP)
	}
	return p, nil
}

func wrapPort(s string, err error) error {
	if err != nil {
		err = fmt.Errorf("%q: %w", s, err)
	}
	return err
}

func parsePort(s string, least int) (int, error) {
	if strings.Contains(s, "-") {
		return 0, fmt.Errorf("%q: a range: give each port a flag of its own", s)
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > 65535 || s[0] == '+' {
		return 0, fmt.Errorf("%q is not a port from %d to 65535", s, least)
	}
	return n, nil
}

// parseUnixPort reads PATH:PORT.
func parseUnixPort(s string) (p netns.UnixPort, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 1 {
		return p, fmt.Errorf("%q: not PATH:PORT", s)
	}
	p.Path = s[:i]
	p.ContainerPort, err = parsePort(s[i+1:], 1)
	return p, wrapPort(s, err)
}

// parseHostPort reads PORT or INSIDE:PORT.
func parseHostPort(s string) (p netns.HostPort, err error) {
	inside, host, two := strings.Cut(s, ":")
	if !two {
		host = inside
	}
	if p.ContainerPort, err = parsePort(inside, 1); err == nil {
		p.HostPort, err = parsePort(host, 1)
	}
	return p, wrapPort(s, err)
}

// rateUnits are tc(8)'s.
var rateUnits = []struct {
	suffix string
	bps    float64
}{{"kbit", 1e3}, {"mbit", 1e6}, {"gbit", 1e9}, {"bit", 1}, {"", 1}}

// parseRate reads UP,DOWN in tc's words, or one value for both, as bits a second.
func parseRate(s string) (up, down int64, err error) {
	a, b, two := strings.Cut(s, ",")
	if !two {
		b = a
	}
	if up, err = parseBits(a); err == nil {
		down, err = parseBits(b)
	}
	return up, down, err
}

func parseBits(s string) (int64, error) {
	for _, u := range rateUnits {
		number, ok := strings.CutSuffix(strings.ToLower(s), u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(number, 64)
		if n *= u.bps; err != nil || strings.ContainsAny(number, "xpe_n+") || !(n >= 8000 && n <= 1e12) {
			return 0, fmt.Errorf("%q: a rate as 500kbit, 10mbit or 1gbit, of at least 8kbit", s)
		}
		return int64(n), nil
	}
	return 0, errors.New("not a rate")
}
