package egress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sbxrun/sbxrun/netns"
)

// Bounds of what the inside and servers can make the proxy hold.
const (
	maxHeadBytes     = 16 << 10
	maxRespHeadBytes = 64 << 10
)

// replyTimeout is how long a plain HTTP server may be silent.
var replyTimeout = 2 * time.Minute

// refusal is an answer to the inside.
type refusal struct {
	status string
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refuse(status, format string, a ...any) error {
	return &refusal{status, fmt.Errorf(format, a...)}
}

const (
	badRequest = "400 Bad Request"
	forbidden  = "403 Forbidden"
	tooLarge   = "431 Request Header Fields Too Large"
)

// serveProxy serves one request of a program that knows of the proxy.
func (e *Egress) serveProxy(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(headTimeout))
	br := bufio.NewReaderSize(c, maxHeadBytes)
	req, err := readRequest(br)
	if err != nil {
		e.note(netns.Decision{Via: "http", Host: req.target.name, Port: int(req.target.port), Rule: "bad request: " + err.Error()})
		refuseWith(c, err)
		return
	}
	_ = c.SetDeadline(time.Time{})
	via, p := "http", e.http
	if req.method == "CONNECT" {
		via, p = "connect", e.https
	}
	ctx, cancel := context.WithTimeout(e.ctx, dialTimeout)
	out, d := e.reach(ctx, via, req.target, p)
	cancel()
	e.note(d)
	if out == nil {
		err := fmt.Errorf("%s: %s", req.target, d.Error)
		if !d.Allowed {
			err = refuse(forbidden, "%s is denied (%s)", req.target, d.Rule)
		}
		refuseWith(c, err)
		return
	}
	defer out.Close()
	if !e.track(out) {
		return
	}
	defer e.untrack(out)
	if req.method != "CONNECT" {
		e.forward(c, br, out, req, d)
		return
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	// What came along with the head belongs to the tunnel.
	early, _ := br.Peek(br.Buffered())
	if _, err := out.Write(early); err != nil {
		return
	}
	if e.spend(&e.up, int64(len(early))) != nil {
		e.overLimit(d)
		return
	}
	e.tunnel(c, out, d)
}

// refuseWith tells the inside why not.
func refuseWith(c net.Conn, err error) {
	status := "502 Bad Gateway"
	var r *refusal
	if errors.As(err, &r) {
		status = r.status
	}
	body := "sbxrun: " + err.Error() + "\n"
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(body), body)
	// Closing over unread input resets the connection, and the answer is lost.
	if w, ok := c.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, c, 1<<20)
	}
}

// forward passes one plain request on and its answer back. Only bytes that were
// understood go out: a second request hidden behind the first never does, which
// matters most where the other side is a proxy that would serve it.
func (e *Egress) forward(c net.Conn, br *bufio.Reader, out net.Conn, req request, d netns.Decision) {
	var b strings.Builder
	uri, auth := req.path, ""
	if !e.direct(req.target.host(), e.http) {
		uri, auth = "http://"+req.authority+req.path, e.http.auth
	}
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n%s", req.method, uri, req.authority, auth)
	for _, h := range req.header {
		b.WriteString(h + "\r\n")
	}
	b.WriteString("Connection: close\r\n\r\n")
	if _, err := io.WriteString(out, b.String()); err != nil {
		return
	}
	limited := e.spend(&e.up, int64(b.Len()))
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		body := io.LimitReader(br, req.bodyBytes)
		if err := e.pass(out, body, &e.up); err != nil || body.(*io.LimitedReader).N > 0 { // the client left in the middle
			out.Close()
		}
	}()
	if limited == nil {
		limited = e.passReply(c, out)
	}
	// As in refuseWith: closing over unread input would lose what was just sent.
	_ = c.SetDeadline(time.Now().Add(time.Second))
	out.Close()
	wg.Wait()
	if e.full() || errors.Is(limited, errByteLimit) {
		e.overLimit(d)
		reset(c)
		return
	}
	if w, ok := c.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, c, 1<<20)
	}
}

// passReply passes an answer on, with "Connection: close" in its head so that
// the client does not send a next request here.
func (e *Egress) passReply(c io.Writer, out net.Conn) error {
	_ = out.SetReadDeadline(time.Now().Add(replyTimeout))
	br := bufio.NewReaderSize(out, maxHeadBytes)
	for i := range 8 { // interim answers come before the one that counts
		lines, err := readHead(br, maxRespHeadBytes, false)
		if err != nil {
			if i == 0 {
				_, _ = io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			}
			return err
		}
		interim := strings.HasPrefix(lines[0], "HTTP/1.1 1") || strings.HasPrefix(lines[0], "HTTP/1.0 1")
		var b strings.Builder
		for i, l := range lines {
			if name, _, _ := strings.Cut(l, ":"); i == 0 || !hopByHop[strings.ToLower(name)] {
				b.WriteString(l + "\r\n")
			}
		}
		if !interim {
			b.WriteString("Connection: close\r\n")
		}
		n, err := io.WriteString(c, b.String()+"\r\n")
		if err := errors.Join(err, e.spend(&e.down, int64(n))); err != nil {
			return err
		}
		if !interim {
			break
		}
	}
	return e.pass(c, &patient{out, br}, &e.down)
}

// patient reads with a time limit for each read.
type patient struct {
	c net.Conn
	r io.Reader
}

func (p *patient) Read(b []byte) (int, error) {
	_ = p.c.SetReadDeadline(time.Now().Add(replyTimeout))
	return p.r.Read(b)
}

// hopByHop is what concerns one connection only. Transfer-Encoding is in an
// answer's body, which passes as it is.
var hopByHop = map[string]bool{"connection": true, "proxy-connection": true, "keep-alive": true, "upgrade": true, "proxy-authenticate": true}

// request is what was read of one.
type request struct {
	method    string
	target    target
	authority string   // for plain requests: what Host says to the server
	path      string   // for plain requests: with the query
	header    []string // what is passed on
	bodyBytes int64
}

// readHead reads lines up to the empty one, without their ends. Strict reading
// ends lines with CR LF only and takes no control characters.
func readHead(br *bufio.Reader, limit int, strict bool) ([]string, error) {
	var lines []string
	for n := 0; ; {
		b, err := br.ReadSlice('\n')
		n += len(b)
		if errors.Is(err, bufio.ErrBufferFull) || n > limit {
			return nil, refuse(tooLarge, "the head is larger than %d bytes", limit)
		}
		if err != nil {
			return nil, refuse(badRequest, "the head is not complete")
		}
		l, ok := strings.CutSuffix(string(b), "\r\n")
		if !ok {
			if strict {
				return nil, refuse(badRequest, "a line does not end with CR LF")
			}
			l = strings.TrimSuffix(l, "\n")
		}
		if strings.ContainsFunc(l, func(r rune) bool { return r < ' ' && (r != '\t' || strict && len(lines) == 0) || r == 0x7f }) {
			return nil, refuse(badRequest, "a control character in the head")
		}
		if l == "" {
			if len(lines) == 0 {
				return nil, refuse(badRequest, "no request")
			}
			return lines, nil
		}
		lines = append(lines, l)
	}
}

// readRequest reads the head of a request and nothing else.
func readRequest(br *bufio.Reader) (req request, err error) {
	lines, err := readHead(br, maxHeadBytes, true)
	if err != nil {
		return req, err
	}
	f := strings.Split(lines[0], " ")
	if len(f) != 3 || !token(f[0]) || f[2] != "HTTP/1.1" && f[2] != "HTTP/1.0" {
		return req, refuse(badRequest, "not an HTTP/1 request")
	}
	req.method = f[0]
	if req.method == "CONNECT" {
		host, port, err := net.SplitHostPort(f[1])
		if err != nil {
			return req, refuse(badRequest, "the target is not host:port")
		}
		if req.target, err = parseTarget(host, port); err != nil {
			return req, refuse(badRequest, "%w", err)
		}
	} else {
		u, err := url.Parse(f[1])
		if err != nil || u.Scheme != "http" || u.Host == "" {
			return req, refuse(badRequest, "neither CONNECT nor an http:// address")
		}
		if u.User != nil || u.Fragment != "" || u.Opaque != "" {
			return req, refuse(badRequest, "a user or fragment in the address")
		}
		port := u.Port()
		if port == "" {
			port = "80"
		}
		if req.target, err = parseTarget(u.Hostname(), port); err != nil {
			return req, refuse(badRequest, "%w", err)
		}
		req.authority = strings.TrimSuffix(req.target.String(), ":80")
		req.path = u.RequestURI()
		if !strings.HasPrefix(req.path, "/") {
			return req, refuse(badRequest, "no path in the address")
		}
	}
	drop := map[string]bool{"host": true, "te": true, "trailer": true, "proxy-authorization": true, "http2-settings": true}
	for k := range hopByHop {
		drop[k] = true
	}
	var header [][2]string
	length := ""
	for _, l := range lines[1:] {
		name, value, ok := strings.Cut(l, ":")
		if !ok || !token(name) { // folded lines and "Name :" too: others read them differently
			return req, refuse(badRequest, "a bad header line")
		}
		name, value = strings.ToLower(name), strings.Trim(value, " \t")
		switch name {
		case "transfer-encoding":
			return req, refuse("411 Length Required", "only bodies with Content-Length are served")
		case "content-length":
			if length != "" {
				return req, refuse(badRequest, "two Content-Length headers")
			}
			if req.bodyBytes, err = strconv.ParseInt(value, 10, 62); err != nil || !digits(value) {
				return req, refuse(badRequest, "a bad Content-Length")
			}
			length = value
		case "connection":
			for _, n := range strings.Split(value, ",") {
				// What it names is not passed on; but not all may be named.
				if n = strings.ToLower(strings.Trim(n, " \t")); n != "content-length" {
					drop[n] = true
				}
			}
		}
		header = append(header, [2]string{name, l})
	}
	if req.method == "CONNECT" {
		if length != "" {
			return req, refuse(badRequest, "CONNECT with a body")
		}
		return req, nil
	}
	for _, h := range header {
		if !drop[h[0]] {
			req.header = append(req.header, h[1])
		}
	}
	return req, nil
}

func token(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune("\"(),/:;<=>?@[\\]{}", r)
	})
}
