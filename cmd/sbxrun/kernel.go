package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/runtime"
)

type kernelOptions struct {
	*shimOptions
	dataDir, display string
}

func envKernelVerb() *verb {
	return &verb{
		name: "env kernel", args: "[flags of run] NAME", asRun: true,
		short: "make a Jupyter kernel that runs in a sandbox over an environment (which has ipykernel)",
		long: "Writes DATA/kernels/NAME/kernel.json. Each kernel is a sandbox of its own, reached through its\n" +
			"five ports on the host's 127.0.0.1. With --project DIR that directory is shown writable at its\n" +
			"own path; without, the one that the notebook lies in, unless that holds more than a project.",
		setup: func(c *command) {
			o := &kernelOptions{shimOptions: declareShim(c)}
			c.flags.Lookup("debug").hidden = true
			c.flags.StringVar(&o.dataDir, "data-dir", "", "Jupyter's data `directory` (default: JUPYTER_DATA_DIR, else ~/.local/share/jupyter)")
			c.flags.StringVar(&o.display, "display-name", "", "`name` that people see (default: NAME (sbxrun))")
			c.flags.BoolVar(&o.remove, "remove", "remove a kernel that was made by this verb")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			if err := wantArgs(c, args, 1, 1); err != nil {
				return 0, err
			}
			name, o := args[0], c.opts.(*kernelOptions)
			if strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" || name == "" || name[0] == '.' {
				return 0, usage("letters, digits, dot, dash and underscore", "env kernel %q: not a kernel's name", name)
			}
			if err := needRoot(c); err != nil {
				return 0, err
			}
			data, err := o.data()
			if err != nil {
				return 1, err
			}
			dir, err := realParent(filepath.Join(data, "kernels", name))
			if err != nil {
				return 1, fmt.Errorf("env kernel: %w", err)
			}
			if o.remove {
				return 0, removeShim(dir)
			}
			if _, err := oursAt(dir); err != nil {
				return 1, err
			}
			anywhere := o.project == ""
			if anywhere {
				o.project = "none"
			}
			set, env, files, err := o.settings(c, dir, false)
			if err != nil {
				return 1, err
			}
			if !hasPackage(env, "ipykernel") {
				return 1, usage("add ipykernel to its recipe", "env kernel %q: the environment has no ipykernel", name)
			}
			if anywhere {
				set.Project = "." // where the kernel is started
			}
			return 0, o.write(c, dir, name, set, files)
		},
	}
}

func (o *kernelOptions) data() (string, error) {
	if o.dataDir != "" {
		return filepath.Abs(o.dataDir)
	}
	if d := os.Getenv("JUPYTER_DATA_DIR"); d != "" {
		return filepath.Abs(d)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", usage("--data-dir DIR", "env kernel: %v", err)
	}
	return filepath.Join(home, ".local/share/jupyter"), nil
}

func hasPackage(env *envs.Env, name string) bool {
	for _, p := range env.Packages {
		if p.Name == name {
			return true
		}
	}
	return false
}

func (o *kernelOptions) write(c *command, dir, name string, set *shimSettings, files shimFiles) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("env kernel: %w", err)
	}
	display := o.display
	if display == "" {
		display = name + " (sbxrun)"
	}
	b, err := json.MarshalIndent(map[string]any{
		"argv":         []string{self, "kernel-exec", dir, "{connection_file}"},
		"display_name": display, "language": "python",
		// By message: a signal would have to find the kernel among its children.
		"interrupt_mode": "message",
		"metadata":       map[string]any{"debugger": true},
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("env kernel: %w", err)
	}
	w := openShimWriter(dir)
	defer w.close()
	w.settings(set, files)
	w.file("kernel.json", string(b)+"\n", 0o644)
	if w.err != nil {
		return fmt.Errorf("env kernel: %w", w.err)
	}
	c.ui.outf("%s\n", filepath.Join(dir, "kernel.json"))
	return nil
}

// connection is Jupyter's connection file.
type connection struct {
	Transport string `json:"transport"`
	IP        string `json:"ip"`
	Shell     int    `json:"shell_port"`
	IOPub     int    `json:"iopub_port"`
	Stdin     int    `json:"stdin_port"`
	Control   int    `json:"control_port"`
	Heartbeat int    `json:"hb_port"`
}

func (k connection) ports() ([]int, error) {
	if k.Transport != "tcp" || k.IP != "127.0.0.1" {
		return nil, usage("Jupyter's default is both", "connection file: transport %q at %q: only tcp at 127.0.0.1", k.Transport, k.IP)
	}
	all := []int{k.Shell, k.IOPub, k.Stdin, k.Control, k.Heartbeat}
	for _, p := range all {
		if p < 1 || p > 65535 {
			return nil, usage("", "connection file: port %d", p)
		}
	}
	return all, nil
}

// kernelExec is what kernel.json names: args are the kernel's folder and the
// connection file.
func kernelExec(u *ui, args []string) int {
	fail := func(err error) int {
		u.error(err)
		return 125
	}
	if len(args) != 2 {
		return fail(usage("sbxrun env kernel writes kernels that are run so", "kernel-exec: %d arguments", len(args)))
	}
	set, err := readShim(args[0])
	if err != nil {
		return fail(err)
	}
	defer set.Close()
	file, err := filepath.Abs(args[1])
	if err != nil {
		return fail(err)
	}
	b, err := readSmall(file)
	if err != nil {
		return fail(fmt.Errorf("read connection file: %w", err))
	}
	var k connection
	if err := json.Unmarshal(b, &k); err != nil {
		return fail(fmt.Errorf("read connection file %q: %w", file, err))
	}
	ports, err := k.ports()
	if err != nil {
		return fail(err)
	}
	if set.Project == "." {
		set.Project = ""
		if cwd, err := currentDir(); err == nil && !unsafeProject(cwd) {
			set.Project = cwd
		}
		if err := set.checkPlace(args[0], false, nil); err != nil {
			return fail(err)
		}
	}
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return fail(fmt.Errorf("read connection file: %w", err))
	}
	set.again = "sbxrun env kernel"
	x := shimRun{
		shimSettings: set,
		// 1: there is a server, and no parent to watch, which could not be seen.
		argv: []string{envs.EnvDir + "/bin/python", "-m", "ipykernel_launcher", "-f", file, "--IPKernelApp.parent_handle=1"},
	}
	if !within(set.Project, real) {
		x.shown = []runtime.Volume{{Source: real, Target: file, Mode: "ro", NoLinks: true}}
	}
	for _, p := range ports {
		x.publish = append(x.publish, fmt.Sprintf("127.0.0.1:%d:%d", p, p))
	}
	x.at = args[0]
	return x.run(u)
}

// readSmall reads a regular file of at most 64 KiB.
func readSmall(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64<<10))
}
