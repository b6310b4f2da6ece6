package main

import (
	"path/filepath"
	"strconv"
	"strings"
)

// openDebugPorts reads what ports a debugger's command line names, as debugpy and
// pydevd take them. One that connects to the editor gets that port of the host's
// loopback; one that listens is published on the host's loopback.
func openDebugPorts(o *runOptions, args []string) {
	connect, listen := debugPorts(args)
	for _, p := range connect {
		o.hostPorts = append(o.hostPorts, strconv.Itoa(p))
	}
	for _, p := range listen {
		o.publish = append(o.publish, "127.0.0.1:"+strconv.Itoa(p)+":"+strconv.Itoa(p))
	}
}

// debugPorts gives the ports that a debugger among python's arguments connects
// to on this host, and those that it listens on. Ports of programs that are
// debugged are not looked at: the debugger's options end where they begin.
func debugPorts(args []string) (connect, listen []int) {
	var rest []string
	pydevd := false
	for i, a := range args {
		switch {
		case a == "-m" && i+1 < len(args) && (args[i+1] == "debugpy" || args[i+1] == "debugpy.adapter"),
			strings.HasSuffix(a, "/debugpy") && scriptOf(args[:i+1]) == a:
			rest = args[i+1:]
			if a == "-m" {
				rest = args[i+2:]
			}
		case filepath.Base(a) == "pydevd.py" && scriptOf(args[:i+1]) == a:
			rest, pydevd = args[i+1:], true
		default:
			if scriptOf(args[:i+1]) != "" || a == "-m" || a == "-c" {
				return nil, nil // another program
			}
			continue
		}
		break
	}
	client, port, server := "", 0, false
	for i := 0; i+1 < len(rest); i++ {
		v := rest[i+1]
		switch a := rest[i]; {
		case pydevd && a == "--client":
			client, i = v, i+1
		case pydevd && a == "--port":
			port, i = portOf(v), i+1
		case pydevd && a == "--server":
			server = true
		case pydevd && a == "--file":
			i = len(rest)
		case !pydevd && a == "--connect":
			if p := portOf(v); p > 0 {
				connect = append(connect, p)
			}
			i++
		case !pydevd && a == "--listen":
			if p := portOf(v); p > 0 {
				listen = append(listen, p)
			}
			i++
		case pydevd || a == "--wait-for-client":
		case strings.HasPrefix(a, "--"): // each of the others has a value
			i++
		default:
			i = len(rest)
		}
	}
	switch {
	case port == 0:
	case server:
		listen = append(listen, port)
	case onLoopback(client):
		connect = append(connect, port)
	}
	return connect, listen
}

// portOf reads PORT or HOST:PORT with a loopback host; 0 is none.
func portOf(s string) int {
	i := strings.LastIndexByte(s, ':')
	if i >= 0 && !onLoopback(strings.Trim(s[:i], "[]")) && s[:i] != "0.0.0.0" {
		return 0
	}
	n, err := parsePort(s[i+1:], 1)
	if err != nil {
		return 0
	}
	return n
}

func onLoopback(host string) bool {
	return host == "localhost" || host == "::1" || strings.HasPrefix(host, "127.")
}
