// Package conda reads the locks that conda's tools write and installs what they
// name, without conda, Python or a solver.
//
// It owns conda's formats: @EXPLICIT lists, conda-lock.yml, pixi.lock, .conda and
// .tar.bz2 archives, paths.json, conda-meta, the activation of a prefix. Everything
// it reads comes from outside and is bounded and judged: it is meant to run inside
// a sandbox. It knows files and bytes only and must never know the network, the
// store of environments or the sandbox: others fetch archives, run link scripts
// and compile what [Install] lists.
//
// The order of use: [Parse] a lock (or [Decode] one that was stored), fetch each
// Package.URL into a folder, [Install], run or refuse Result.Scripts, compile
// Result.Compile, read the [Activation].
package conda
