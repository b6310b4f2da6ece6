package egress

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
)

// proxy is one that the host itself must use.
type proxy struct {
	addr string // host:port; "" is none
	auth string // a header line, or ""
	err  error  // it is asked for and cannot be used
}

func proxyFrom(vars ...string) proxy {
	for _, k := range vars {
		v := os.Getenv(k)
		if v == "" {
			continue
		}
		if !strings.Contains(v, "://") {
			v = "http://" + v
		}
		u, err := url.Parse(v)
		if err != nil || u.Scheme != "http" || u.Hostname() == "" {
			// Not the value: it may hold a password.
			return proxy{err: fmt.Errorf("use the proxy of %s: only http://host:port can be used", k)}
		}
		p := proxy{addr: u.Host}
		if u.Port() == "" {
			p.addr = net.JoinHostPort(u.Hostname(), "80")
		}
		if u.User != nil {
			pw, _ := u.User.Password()
			p.auth = "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+pw)) + "\r\n"
		}
		return p
	}
	return proxy{}
}

func noProxyFrom(vars ...string) (names []string) {
	for _, k := range vars {
		names = append(names, strings.FieldsFunc(strings.ToLower(os.Getenv(k)), func(r rune) bool { return r == ',' || r == ' ' })...)
	}
	return names
}

// direct says whether a host is reached without p: there is none, or NO_PROXY
// names the host.
func (e *Egress) direct(host string, p proxy) bool {
	if p.addr == "" && p.err == nil {
		return true
	}
	ip, ipErr := netip.ParseAddr(host)
	for _, n := range e.noProxy {
		if p, err := netip.ParsePrefix(n); err == nil && ipErr == nil && p.Contains(ip) {
			return true
		}
		n = strings.TrimPrefix(strings.TrimPrefix(n, "*"), ".")
		if n == "" || host == n || strings.HasSuffix(host, "."+n) {
			return true
		}
	}
	return false
}

// throughProxy connects to t through p, or, for plain requests that name their
// target themselves, to p alone.
func (e *Egress) throughProxy(ctx context.Context, p proxy, t target, plain bool) (net.Conn, error) {
	c, err := e.upstream.Dial(ctx, "tcp", p.addr)
	if err != nil {
		return nil, fmt.Errorf("connect to the host's proxy: %w", err)
	}
	if plain {
		return c, nil
	}
	stop := context.AfterFunc(ctx, func() { c.Close() }) // Close and the time limit
	status, err := connectThrough(c, p, t.String())
	if !stop() {
		err = errors.Join(err, context.Cause(ctx))
	}
	if err == nil && status != "200" {
		err = fmt.Errorf("it answered %q", status)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to %s through the host's proxy: %w", t, err)
	}
	return c, nil
}

func connectThrough(c net.Conn, p proxy, target string) (status string, err error) {
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", target, target, p.auth); err != nil {
		return "", err
	}
	// Byte by byte: what follows the head is the tunnel's.
	head, one := make([]byte, 0, 512), make([]byte, 1)
	for !strings.HasSuffix(string(head[max(0, len(head)-4):]), "\r\n\r\n") {
		if len(head) >= maxHeadBytes {
			return "", errors.New("its answer has no end")
		}
		if _, err := io.ReadFull(c, one); err != nil {
			return "", err
		}
		head = append(head, one[0])
	}
	line, _, _ := strings.Cut(string(head), "\r\n")
	f := strings.Fields(line)
	if len(f) < 2 || !strings.HasPrefix(f[0], "HTTP/1.") {
		return "", errors.New("its answer is not HTTP")
	}
	return f[1], nil
}
