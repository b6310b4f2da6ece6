package source

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Config is what conda's and mamba's files say of channels. The zero value is
// no configuration.
type Config struct {
	Channels, DefaultChannels []string
	Alias                     string              // base of channels that are given by name
	Custom                    map[string]string   // channel_name: base
	Multi                     map[string][]string // name: channels
	Priority                  string              // "strict", "flexible", "disabled" or "" (not said)
}

// Add reads one more file, of lower rank than those before: lists are
// continued, single values stay. $NAME and ${NAME} are what env has for them.
// where names it in errors.
func (c *Config) Add(data []byte, env map[string]string, where string) error {
	var f struct {
		Channels        []string            `yaml:"channels"`
		DefaultChannels []string            `yaml:"default_channels"`
		Alias           string              `yaml:"channel_alias"`
		Custom          map[string]string   `yaml:"custom_channels"`
		Multi           map[string][]string `yaml:"custom_multichannels"`
		Priority        any                 `yaml:"channel_priority"`
	}
	if err := yaml.Unmarshal(data, &f); err != nil {
		return fmt.Errorf("%s: not valid YAML", where) // not its text: there may be a token in it
	}
	expand := func(s string) string {
		return os.Expand(s, func(name string) string {
			if v, ok := env[name]; ok {
				return v
			}
			return "${" + name + "}"
		})
	}
	each := func(list []string) (out []string) {
		for _, s := range list {
			out = append(out, expand(s))
		}
		return out
	}
	c.Channels = appendNew(c.Channels, each(f.Channels))
	c.DefaultChannels = appendNew(c.DefaultChannels, each(f.DefaultChannels))
	if c.Alias == "" {
		c.Alias = expand(f.Alias)
	}
	switch p := f.Priority.(type) {
	case string:
		c.setPriority(p)
	case bool: // of old: true is flexible
		c.setPriority(map[bool]string{true: "flexible", false: "disabled"}[p])
	}
	for k, v := range f.Custom {
		if c.Custom[k] == "" {
			c.Custom = with(c.Custom, k, expand(v))
		}
	}
	for k, v := range f.Multi {
		if c.Multi[k] == nil {
			c.Multi = with(c.Multi, k, each(v))
		}
	}
	return nil
}

// AddVariables takes the CONDA_* variables, which come before every file.
func (c *Config) AddVariables(env map[string]string) {
	list := func(k string) []string {
		return strings.FieldsFunc(env[k], func(r rune) bool { return r == ',' || r == ' ' || r == '&' })
	}
	c.Channels = appendNew(c.Channels, list("CONDA_CHANNELS"))
	c.DefaultChannels = appendNew(c.DefaultChannels, list("CONDA_DEFAULT_CHANNELS"))
	c.Alias = env["CONDA_CHANNEL_ALIAS"]
	c.setPriority(env["CONDA_CHANNEL_PRIORITY"])
}

func (c *Config) setPriority(p string) {
	if c.Priority == "" && slices.Contains([]string{"strict", "flexible", "disabled"}, p) {
		c.Priority = p
	}
}

func with[V any](m map[string]V, k string, v V) map[string]V {
	if m == nil {
		m = map[string]V{}
	}
	m[k] = v
	return m
}

func appendNew(to, more []string) []string {
	for _, s := range more {
		if s != "" && !slices.Contains(to, s) {
			to = append(to, s)
		}
	}
	return to
}

// Resolve gives the URLs that channels are at, credentials included, without a
// slash at the end. dir is what a relative path is relative to; fallbackAlias
// is used where no channel_alias is configured.
func (c *Config) Resolve(channels []string, dir, fallbackAlias string) ([]string, error) {
	if len(channels) == 0 {
		channels = c.Channels
	}
	if len(channels) == 0 {
		channels = []string{"defaults"}
	}
	var out []string
	for _, name := range channels {
		urls, err := c.resolve(name, dir, fallbackAlias, 0)
		if err != nil {
			return nil, err
		}
		out = appendNew(out, urls)
	}
	return out, nil
}

func (c *Config) resolve(name, dir, fallback string, depth int) (out []string, err error) {
	name = strings.TrimRight(name, "/")
	several := func(names []string) ([]string, error) {
		if depth > 4 {
			return nil, fmt.Errorf("channel %q: defined by itself", name)
		}
		for _, n := range names {
			urls, err := c.resolve(n, dir, fallback, depth+1)
			if err != nil {
				return nil, err
			}
			out = append(out, urls...)
		}
		return out, nil
	}
	alias := c.Alias
	if alias == "" {
		alias = fallback
	}
	switch {
	case name == "" || strings.ContainsAny(name, " \t\n\x00\"<>"):
		return nil, fmt.Errorf("channel %q: neither a name nor a URL", name)
	case strings.HasPrefix(name, "https://"), strings.HasPrefix(name, "http://"):
		return []string{name}, nil
	case strings.HasPrefix(name, "file://"):
		p := strings.TrimPrefix(name, "file://")
		if !path.IsAbs(p) {
			return nil, fmt.Errorf("channel %q: file:// needs a path from /", name)
		}
		return []string{"file://" + path.Clean(p)}, nil
	case strings.Contains(name, "://"):
		return nil, hinted.New(fmt.Errorf("channel %q: an unknown kind of URL", name), "https:// and file:// are known")
	case path.IsAbs(name):
		return []string{"file://" + path.Clean(name)}, nil
	case strings.HasPrefix(name, "./"), strings.HasPrefix(name, "../"):
		return []string{"file://" + path.Join(dir, name)}, nil
	case c.Multi[name] != nil:
		return several(c.Multi[name])
	case name == "defaults" && len(c.DefaultChannels) > 0:
		return several(c.DefaultChannels)
	}
	first, _, _ := strings.Cut(name, "/")
	if base := c.Custom[first]; base != "" {
		alias = base
	}
	if alias == "" {
		return nil, hinted.New(fmt.Errorf("channel %q: where such names lead is not known", name), "set channel_alias in .condarc, or give the channel's URL")
	}
	if !strings.Contains(alias, "://") {
		alias = "https://" + alias
	}
	alias = strings.TrimRight(alias, "/")
	if name == "defaults" { // what the index calls them
		return []string{alias + "/main", alias + "/r"}, nil
	}
	return []string{alias + "/" + name}, nil
}
