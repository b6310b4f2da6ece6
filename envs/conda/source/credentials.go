package source

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"path"
	"slices"
	"sort"
	"strings"
)

// Credentials are what servers are shown, by what they are for. They are held
// in memory by the job that fetches and are in nothing that it writes or says.
type Credentials struct{ all []credential }

type credential struct {
	host, below string // host may begin with "*."; below is a path, "" is all of the host
	user, pass  string
	bearer      string
	token       string // a path of its own: /t/TOKEN/…
}

// Strip parts a URL from its credentials: user:password@ and /t/TOKEN/.
func (c *Credentials) Strip(raw string) (clean string, err error) {
	u, err := url.Parse(raw)
	if err != nil {
		return "", errors.New("a URL that cannot be read") // its text may hold a token
	}
	cred := credential{host: strings.ToLower(u.Host)}
	if u.User != nil {
		cred.user = u.User.Username()
		cred.pass, _ = u.User.Password()
		u.User = nil
	}
	p, token := cutToken(u.Path)
	if token != "" {
		cred.token = token
		u.Path, u.RawPath = p, ""
	}
	clean = u.String()
	if cred.user != "" || cred.token != "" {
		cred.below = u.Path
		c.all = append(c.all, cred)
	}
	return clean, nil
}

// cutToken takes /t/TOKEN out of a path.
func cutToken(p string) (rest, token string) {
	before, after, ok := strings.Cut(p, "/t/")
	if !ok || before != "" {
		return p, ""
	}
	token, rest, _ = strings.Cut(after, "/")
	return "/" + rest, token
}

// Clone gives a copy that may be added to.
func (c *Credentials) Clone() Credentials { return Credentials{slices.Clone(c.all)} }

// Clean is [Credentials.Strip] for what is only to be shown or kept.
func Clean(raw string) (string, error) {
	var c Credentials
	return c.Strip(raw)
}

// AddConfig takes those in a configuration's URLs.
func (c *Credentials) AddConfig(conf *Config) {
	take := func(raw string) {
		if strings.Contains(raw, "://") {
			c.AddURL(raw)
		}
	}
	for _, list := range [][]string{conf.Channels, conf.DefaultChannels, {conf.Alias}} {
		for _, u := range list {
			take(u)
		}
	}
	for _, u := range conf.Custom {
		take(u)
	}
	for _, list := range conf.Multi {
		for _, u := range list {
			take(u)
		}
	}
}

// AddRattler reads rattler's credentials.json.
func (c *Credentials) AddRattler(data []byte) error {
	var f map[string]struct {
		BearerToken, CondaToken string
		BasicHTTP               *struct {
			Username string `json:"username"`
			Password string `json:"password"`
		}
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return errors.New("credentials file: not the JSON that rattler writes")
	}
	for where, v := range f {
		cred := credential{host: strings.ToLower(where), bearer: v.BearerToken, token: v.CondaToken}
		if _, rest, ok := strings.Cut(where, "://"); ok {
			host, below, _ := strings.Cut(rest, "/")
			cred.host, cred.below = strings.ToLower(host), "/"+strings.TrimRight(below, "/")
		}
		if v.BasicHTTP != nil {
			cred.user, cred.pass = v.BasicHTTP.Username, v.BasicHTTP.Password
		}
		c.all = append(c.all, cred)
	}
	return nil
}

// AddNetrc reads a netrc file: machine, default, login, password; macros are
// passed over.
func (c *Credentials) AddNetrc(data []byte) {
	var words []string
	macro := false
	for _, line := range strings.Split(string(data), "\n") {
		f := strings.Fields(line)
		switch {
		case macro:
			macro = len(f) > 0 // until an empty line
			continue
		case len(f) > 0 && strings.HasPrefix(f[0], "#"):
			continue
		case len(f) > 0 && f[0] == "macdef":
			macro = true
			continue
		}
		words = append(words, f...)
	}
	var cur *credential
	flush := func() {
		if cur != nil && cur.user != "" {
			c.all = append(c.all, *cur)
		}
	}
	for i := 0; i < len(words); i++ {
		value := ""
		if i+1 < len(words) {
			value = words[i+1]
		}
		switch words[i] {
		case "machine":
			flush()
			cur = &credential{host: strings.ToLower(value)}
		case "default":
			flush()
			cur = &credential{host: "*"}
			continue
		case "login", "password", "account":
			if cur != nil && words[i] == "login" {
				cur.user = value
			} else if cur != nil && words[i] == "password" {
				cur.pass = value
			}
		default:
			continue
		}
		i++
	}
	flush()
}

// Authorize adds to a request what its server is to be shown: of several the
// one for the longest part of the address.
func (c *Credentials) Authorize(r *http.Request) {
	var fit []credential
	for _, cred := range c.all {
		if cred.fits(r.URL) {
			fit = append(fit, cred)
		}
	}
	if len(fit) == 0 {
		return
	}
	sort.SliceStable(fit, func(i, j int) bool { return fit[i].rank() > fit[j].rank() })
	switch best := fit[0]; {
	case best.bearer != "":
		r.Header.Set("Authorization", "Bearer "+best.bearer)
	case best.token != "":
		r.URL = r.URL.JoinPath() // a copy
		r.URL.Path, r.URL.RawPath = "/t/"+best.token+r.URL.Path, ""
	case best.user != "":
		r.SetBasicAuth(best.user, best.pass)
	}
}

func (c credential) rank() int {
	n := len(c.below)
	if !strings.HasPrefix(c.host, "*") {
		n += 1 << 20
	}
	return n
}

func (c credential) fits(u *url.URL) bool {
	host := strings.ToLower(u.Host)
	switch {
	case c.host == "*", c.host == host, c.host == strings.ToLower(u.Hostname()):
	case strings.HasPrefix(c.host, "*.") && strings.HasSuffix(strings.ToLower(u.Hostname()), c.host[1:]):
	default:
		return false
	}
	below := path.Clean("/" + c.below)
	return below == "/" || u.Path == below || strings.HasPrefix(u.Path, below+"/")
}

// AddURL takes those of a URL, if it has some.
func (c *Credentials) AddURL(raw string) { _, _ = c.Strip(raw) }
