package main

import (
	"context"

	"github.com/sbxrun/sbxrun/envs/relocate"
)

func init() {
	inside["python-relocate"] = func(_ context.Context, read func(any) error) (any, error) {
		var r relocate.Request
		if err := read(&r); err != nil {
			return nil, err
		}
		return relocate.Python(r)
	}
}
