package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/netns"
)

func TestParsePublish(t *testing.T) {
	for in, want := range map[string]netns.Port{
		"80":                    {Proto: "tcp", ContainerPort: 80},
		"53/udp":                {Proto: "udp", ContainerPort: 53},
		"8080:80":               {Proto: "tcp", HostPort: 8080, ContainerPort: 80},
		"8080:80/tcp":           {Proto: "tcp", HostPort: 8080, ContainerPort: 80},
		"0:8080":                {Proto: "tcp", ContainerPort: 8080},
		"127.0.0.1:8080:80/udp": {Proto: "udp", HostIP: "127.0.0.1", HostPort: 8080, ContainerPort: 80},
		"127.0.0.1:0:80":        {Proto: "tcp", HostIP: "127.0.0.1", ContainerPort: 80},
		"127.0.0.1::80":         {Proto: "tcp", HostIP: "127.0.0.1", ContainerPort: 80}, // docker's
		"[::1]:8080:80":         {Proto: "tcp", HostIP: "::1", HostPort: 8080, ContainerPort: 80},
		"[::1]::80":             {Proto: "tcp", HostIP: "::1", ContainerPort: 80},
		"0.0.0.0:65535:65535":   {Proto: "tcp", HostIP: "0.0.0.0", HostPort: 65535, ContainerPort: 65535},
	} {
		got, err := parsePublish(in)
		require.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for in, says := range map[string]string{
		"":                    "port from 1",
		"0":                   "port from 1",
		"8080:0":              "port from 1",
		"8080:":               "port from 1",
		":80":                 "port from 0",
		"65536:80":            "port from 0",
		"8080:65536":          "port from 1",
		"-1:80":               "range",
		"+1:80":               "port from 0",
		"8000-8010:8000-8010": "a range",
		"8000-8010":           "a range",
		"http:80":             "port from 0",
		"80/sctp":             "tcp or udp",
		"80/":                 "tcp or udp",
		"80/TCP":              "tcp or udp",
		"localhost:8080:80":   "not an IP address",
		":8080:80":            "not an IP address",
		"::1:8080:80":         "[ and ]",
		"[::1:8080:80":        "[address]",
		"[]:8080:80":          "[address]",
		"[127.0.0.1]:8080:80": "[address]",
		" 80":                 "port from 1",
		"127.0.0.1:80:81:82":  "[ and ]",
	} {
		_, err := parsePublish(in)
		assert.ErrorContains(t, err, says, in)
	}
}

func TestParseUnixPort(t *testing.T) {
	for in, want := range map[string]netns.UnixPort{
		"/run/s:80":    {Path: "/run/s", ContainerPort: 80},
		"s:65535":      {Path: "s", ContainerPort: 65535},
		"/run/a:b:443": {Path: "/run/a:b", ContainerPort: 443},
	} {
		got, err := parseUnixPort(in)
		require.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for _, in := range []string{"", "/run/s", ":80", "/run/s:", "/run/s:0", "/run/s:65536", "/run/s:80-90", "/run/s:x"} {
		_, err := parseUnixPort(in)
		assert.Error(t, err, in)
	}
}

func TestParseRate(t *testing.T) {
	for in, want := range map[string][2]int64{
		"10mbit,100mbit": {10e6, 100e6},
		"1gbit":          {1e9, 1e9},
		"500kbit":        {500e3, 500e3},
		"1.5Mbit":        {1.5e6, 1.5e6},
		"64000,128kbit":  {64e3, 128e3},
		"64000bit":       {64e3, 64e3},
	} {
		up, down, err := parseRate(in)
		require.NoError(t, err, in)
		assert.Equal(t, want, [2]int64{up, down}, in)
	}
	for _, in := range []string{
		"", ",", "10mbit,", ",10mbit", "1mbit,2mbit,3mbit", "0", "-1mbit", "10mb", "10mbps", "10 mbit", "1", "nan", "inf", "infgbit", "1e400gbit", "99999gbit", "mbit", "0x10mbit", "1_0mbit", "1e3mbit", "+1mbit", "0x1p20bit",
	} {
		_, _, err := parseRate(in)
		assert.Error(t, err, in)
	}
}
