// Package recipes turns the locks of Python projects (uv.lock, poetry.lock,
// pdm.lock, Pipfile.lock, pylock.toml) into what the installer takes: a hashed
// list for one target. It owns their formats, markers (PEP 508), versions
// (PEP 440) and wheel tags (PEP 425).
//
// It runs inside a sandbox, as a step of sbxrun-env, over files that nobody
// trusts. It must never know the store, reach the network or run anything.
package recipes
