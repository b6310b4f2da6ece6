package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/conda"
	"github.com/sbxrun/sbxrun/envs/conda/fetch"
	"github.com/sbxrun/sbxrun/envs/conda/source"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

func init() {
	inside["conda-read"] = condaRead
	inside["conda-repodata"] = condaRepodata
	inside["conda-lock"] = condaLock
	inside["conda-fetch"] = condaFetch
	inside["conda-install"] = condaInstall
}

// condaFiles says where conda's configuration and credentials are seen.
type condaFiles struct {
	Configs        []string          `json:"configs"`
	Netrc, Rattler string            // "" is none
	Input          string            `json:"input"`
	Variables      map[string]string `json:"variables"`
	Local          string            `json:"local"`
}

// maxConfigBytes bounds a configuration file.
const maxConfigBytes = 1 << 20

func readBounded(path string, limit int64) ([]byte, error) {
	b, err := bounded.File(path, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return b, nil
}

func (f *condaFiles) config() (*source.Config, error) {
	c := &source.Config{}
	c.AddVariables(f.Variables)
	for _, p := range f.Configs {
		b, err := readBounded(p, maxConfigBytes)
		if err != nil {
			return nil, fmt.Errorf("read conda's configuration: %w", err)
		}
		if err := c.Add(b, f.Variables, "conda's configuration"); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// client makes a client with the credentials of all files; those of the URLs
// of the input come first.
func (f *condaFiles) client() (*fetch.Client, error) {
	c := &fetch.Client{Local: f.Local}
	if f.Input != "" {
		b, err := readBounded(f.Input, conda.MaxLockBytes)
		if err != nil {
			return nil, err
		}
		for _, word := range bytes.FieldsFunc(b, func(r rune) bool { return strings.ContainsRune(" \t\r\n\"'[],", r) }) {
			if bytes.Contains(word, []byte("://")) && (bytes.Contains(word, []byte("@")) || bytes.Contains(word, []byte("/t/"))) {
				c.Credentials.AddURL(string(word))
			}
		}
	}
	if f.Rattler != "" {
		b, err := readBounded(f.Rattler, maxConfigBytes)
		if err != nil {
			return nil, fmt.Errorf("read credentials: %w", err)
		}
		if err := c.Credentials.AddRattler(b); err != nil {
			return nil, err
		}
	}
	conf, err := f.config()
	if err != nil {
		return nil, err
	}
	c.Credentials.AddConfig(conf)
	if f.Netrc != "" {
		b, err := readBounded(f.Netrc, maxConfigBytes)
		if err != nil {
			return nil, fmt.Errorf("read credentials: %w", err)
		}
		c.Credentials.AddNetrc(b)
	}
	return c, nil
}

type condaSpec struct {
	Channels   []string `json:"channels"`
	Specs      []string `json:"specs"`
	Pip        []string `json:"pip"`
	Variables  []string `json:"variables"`
	AnyChannel bool     `json:"any_channel"`
}

// condaRead reads an environment.yml and gives the URLs of its channels.
func condaRead(_ context.Context, read func(any) error) (any, error) {
	var q struct {
		condaFiles
		Platform, Dir, Alias string
	}
	if err := read(&q); err != nil {
		return nil, err
	}
	b, err := readBounded(q.Input, conda.MaxLockBytes)
	if err != nil {
		return nil, err
	}
	e, err := source.ReadEnvironment(b, q.Platform)
	if err != nil {
		return nil, err
	}
	conf, err := q.config()
	if err != nil {
		return nil, err
	}
	s := condaSpec{Pip: e.Pip, Variables: e.Variables, AnyChannel: conf.Priority == "disabled"}
	add := func(names []string) (urls []string, err error) {
		if urls, err = conf.Resolve(names, q.Dir, q.Alias); err != nil {
			return nil, err
		}
		for i := range urls {
			if urls[i], err = source.Clean(urls[i]); err != nil {
				return nil, fmt.Errorf("channel: %w", err)
			}
			if !slices.Contains(s.Channels, urls[i]) {
				s.Channels = append(s.Channels, urls[i])
			}
		}
		return urls, nil
	}
	if _, err := add(e.Channels); err != nil {
		return nil, err
	}
	for _, spec := range e.Specs {
		if name, rest, ok := strings.Cut(spec, "::"); ok { // the channel comes last, and this package from it
			urls, err := add([]string{name})
			if err != nil {
				return nil, err
			}
			if len(urls) == 1 {
				spec = urls[0] + "::" + rest
			} else {
				spec = rest // "defaults" is several
			}
		}
		s.Specs = append(s.Specs, spec)
	}
	return s, nil
}

// condaRepodata fetches indexes of channels.
func condaRepodata(ctx context.Context, read func(any) error) (any, error) {
	var q struct {
		condaFiles
		Items []struct {
			Channel, Subdir, To string
			Known               fetch.Repodata
		}
	}
	if err := read(&q); err != nil {
		return nil, err
	}
	c, err := q.client()
	if err != nil {
		return nil, err
	}
	type result struct {
		Meta        fetch.Repodata `json:"meta"`
		SHA256      string         `json:"sha256"`
		Same        bool           `json:"same"`
		Missing     bool           `json:"missing"`
		Error       string         `json:"error,omitempty"`
		Hint        string         `json:"hint,omitempty"`
		Unreachable bool           `json:"unreachable,omitempty"`
	}
	out := make([]result, len(q.Items))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i, it := range q.Items {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			r, err := c.Repodata(ctx, it.Channel, it.Subdir, it.To, it.Known)
			out[i] = result{SHA256: r.SHA256, Same: r.Same, Missing: r.Missing}
			r.Same = false
			out[i].Meta = r
			if err != nil {
				var status *fetch.StatusError
				out[i] = result{Error: err.Error(), Hint: hinted.Of(err), Unreachable: !errors.As(err, &status) || status.Code >= 500}
				if out[i].Hint == "" {
					out[i].Hint = "check the channel's URL, the network and HTTPS_PROXY"
				}
			}
		})
	}
	wg.Wait()
	return out, nil
}

// condaLock makes the one form of a lock out of any.
func condaLock(_ context.Context, read func(any) error) (any, error) {
	var q struct {
		File, Platform, To string
		Kind               envs.Kind
	}
	if err := read(&q); err != nil {
		return nil, err
	}
	b, err := readBounded(q.File, conda.MaxLockBytes)
	if err != nil {
		return nil, err
	}
	var l *conda.Lock
	switch kind := map[envs.Kind]conda.Kind{envs.KindExplicit: conda.Explicit, envs.KindCondaLock: conda.CondaLock, envs.KindPixi: conda.Pixi}[q.Kind]; {
	case q.Kind == "":
		l, err = solvedLock(b, q.Platform)
	case kind == "":
		return nil, fmt.Errorf("kind %q is no lock of conda's", q.Kind)
	default:
		l, err = conda.Parse(kind, b, conda.ParseOptions{Platform: q.Platform})
	}
	if err != nil {
		return nil, err
	}
	if b, err = l.Encode(); err != nil {
		return nil, err
	}
	return nil, os.WriteFile(q.To, b, 0o644)
}

// solvedLock takes what the solver chose.
func solvedLock(b []byte, platform string) (*conda.Lock, error) {
	var s struct {
		Packages []struct {
			conda.Package
			FN           string          `json:"fn"`
			Size         int64           `json:"size"`
			Timestamp    int64           `json:"timestamp"`
			PURLs        []string        `json:"purls"`
			Features     string          `json:"features"`
			TrackFeature json.RawMessage `json:"track_features"`
		}
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("the solver's answer: %w", err)
	}
	l := &conda.Lock{Platform: platform}
	for _, r := range s.Packages {
		p := r.Package
		p.FileName, p.SizeBytes, p.TimestampMS, p.PURLs, p.Features = r.FN, r.Size, r.Timestamp, r.PURLs, r.Features
		p.TrackFeatures = nil
		var list []string
		var one string
		switch {
		case json.Unmarshal(r.TrackFeature, &list) == nil:
			p.TrackFeatures = list
		case json.Unmarshal(r.TrackFeature, &one) == nil:
			p.TrackFeatures = strings.Fields(one)
		}
		p.Channel = strings.TrimRight(p.Channel, "/")
		if p.SHA256 == "" && p.MD5 == "" {
			return nil, fmt.Errorf("package %s: its channel gives no hash", p.Name)
		}
		l.Packages = append(l.Packages, p)
		if !slices.Contains(l.Channels, p.Channel) {
			l.Channels = append(l.Channels, p.Channel)
		}
	}
	slices.SortFunc(l.Packages, func(a, b conda.Package) int { return strings.Compare(a.Name, b.Name) })
	return l, nil
}

// condaFetch fetches archives, each to the name of its hash.
func condaFetch(ctx context.Context, read func(any) error) (any, error) {
	var q struct {
		condaFiles
		Items []conda.Package
		To    string
	}
	if err := read(&q); err != nil {
		return nil, err
	}
	c, err := q.client()
	if err != nil {
		return nil, err
	}
	var items []fetch.Item
	for _, p := range q.Items {
		items = append(items, fetch.Item{Name: p.Name + "-" + p.Version + "-" + p.Build, URL: p.URL, SHA256: p.SHA256, MD5: p.MD5, SizeBytes: p.SizeBytes})
	}
	return nil, c.Packages(ctx, items, q.To, 8, func(it fetch.Item) string {
		if it.SHA256 != "" {
			return it.SHA256
		}
		return it.MD5
	})
}

// condaInstall installs a lock at its prefix: /opt/env is at once where it is
// written and where it will be used.
func condaInstall(ctx context.Context, read func(any) error) (any, error) {
	var q struct {
		Lock                      json.RawMessage
		Archives, Prefix, Compile string
		AllowScripts              bool `json:"allow_scripts"`
	}
	if err := read(&q); err != nil {
		return nil, err
	}
	l, err := conda.Decode(q.Lock)
	if err != nil {
		return nil, err
	}
	r, err := conda.Install(ctx, conda.InstallOptions{Lock: l, Archives: q.Archives, Root: q.Prefix, Prefix: q.Prefix, Pycs: true, FreezePycs: true})
	if err != nil {
		return nil, err
	}
	var got struct {
		Python     string   `json:"python"`
		Scripts    []string `json:"scripts"`
		Vars       []string `json:"vars"`
		PathPrefix []string `json:"path_prefix"`
		Notes      []string `json:"notes"`
		Compile    int      `json:"compile"`
	}
	got.Python = r.Python
	for _, s := range r.Scripts {
		if q.AllowScripts {
			if err := runLinkScript(ctx, q.Prefix, s); err != nil {
				return nil, err
			}
		} else if !slices.Contains(got.Scripts, s.Package) {
			got.Scripts = append(got.Scripts, s.Package)
		}
	}
	var list bytes.Buffer
	for _, c := range r.Compile {
		for _, f := range c.Files {
			got.Compile++
			fmt.Fprintln(&list, filepath.Join(q.Prefix, f))
		}
	}
	if err := os.WriteFile(q.Compile, list.Bytes(), 0o644); err != nil {
		return nil, err
	}
	var warnings []string
	if got.Vars, got.PathPrefix, warnings, err = conda.Activation(q.Prefix, q.Prefix); err != nil {
		return nil, err
	}
	for _, c := range r.Clobbered {
		warnings = append(warnings, fmt.Sprintf("%s is in %s and in %s: the first has it", c.Path, c.Winner, strings.Join(c.Losers, ", ")))
	}
	for _, w := range r.WeakHashes {
		warnings = append(warnings, w+": the lock identifies it by an md5 only")
	}
	got.Notes = append(slices.Clone(r.Warnings), warnings...)
	if len(got.Notes) > 20 { // an answer is bounded
		got.Notes = append(got.Notes[:20], fmt.Sprintf("and %d more", len(got.Notes)-20))
	}
	return got, nil
}

// runLinkScript runs a package's own script; the sandbox it runs in holds the
// environment that is made and nothing else of worth.
func runLinkScript(ctx context.Context, prefix string, s conda.LinkScript) error {
	cmd := exec.CommandContext(ctx, "/bin/bash", filepath.Join(prefix, s.Path))
	cmd.Dir = prefix
	cmd.Env = []string{"HOME=/tmp", "PATH=" + prefix + "/bin:/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"}
	for k, v := range s.Env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("package %s: its %s script: %w: %s", s.Package, s.Kind, err, lines[len(lines)-1])
	}
	return nil
}
