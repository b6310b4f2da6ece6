package envs

import (
	"regexp"
	"sync"
)

// lazyRegexp is compiled when it is first used: the package is initialised at
// every launch, and most launches match nothing.
type lazyRegexp func() *regexp.Regexp

func lazy(expr string) lazyRegexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}
