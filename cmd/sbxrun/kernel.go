package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs"
)

type kernelOptions struct {
	*runOptions
	dataDir, display string
	remove           bool
}

func envKernelVerb() *verb {
	return &verb{
		name: "env kernel", args: "[flags of run] NAME", passes: true,
		short: "make a Jupyter kernel that runs in a sandbox over an environment (which has ipykernel)",
		long: "Writes DATA/kernels/NAME/kernel.json. Each kernel is a sandbox of its own, reached through its\n" +
			"five ports on the host's 127.0.0.1. With --project DIR that directory is shown writable at its\n" +
			"own path; without, the one that the notebook lies in, unless that holds more than a project.",
		setup: func(c *command) {
			o := &kernelOptions{runOptions: declareRun(c)}
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
			data, err := o.data()
			if err != nil {
				return 1, err
			}
			dir := filepath.Join(data, "kernels", name)
			if o.remove {
				return 0, removeShim(dir)
			}
			if _, err := os.Stat(dir); err == nil {
				if err := oursAt(dir); err != nil {
					return 1, err
				}
			}
			anywhere := o.project == ""
			if anywhere {
				o.project = "none"
			}
			set, env, err := shimOf(c, o.runOptions, withoutKernelFlags(c.raw[:len(c.raw)-len(args)]), dir)
			if err != nil {
				return 1, err
			}
			if !hasPackage(env, "ipykernel") {
				return 1, usage("add ipykernel to its recipe", "env kernel %q: the environment has no ipykernel", name)
			}
			if anywhere {
				set.Project = "." // where the kernel is started
			}
			return 0, o.write(c, dir, name, set)
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

// withoutKernelFlags leaves run's own flags.
func withoutKernelFlags(args []string) (out []string) {
	for i := 0; i < len(args); i++ {
		switch name, _, joined := strings.Cut(args[i], "="); name {
		case "--data-dir", "--display-name":
			if !joined {
				i++
			}
		default:
			out = append(out, args[i])
		}
	}
	return out
}

func hasPackage(env *envs.Env, name string) bool {
	for _, p := range env.Packages {
		if p.Name == name {
			return true
		}
	}
	return false
}

func (o *kernelOptions) write(c *command, dir, name string, set *shimSettings) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("env kernel: %w", err)
	}
	display := o.display
	if display == "" {
		display = name + " (sbxrun)"
	}
	spec := map[string]any{
		"argv":         []string{self, "kernel-exec", dir, "{connection_file}"},
		"display_name": display, "language": "python",
		// By message: a signal would have to find the kernel among its children.
		"interrupt_mode": "message",
		"metadata":       map[string]any{"debugger": true},
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("env kernel: %w", err)
	}
	for file, v := range map[string]any{shimSettingsFile: set, "kernel.json": spec} {
		b, err := json.MarshalIndent(v, "", "  ")
		if err == nil {
			err = replaceFile(filepath.Join(dir, file), string(b)+"\n", 0o644)
		}
		if err != nil {
			return fmt.Errorf("env kernel: %w", err)
		}
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
	file, err := filepath.Abs(args[1])
	if err != nil {
		return fail(err)
	}
	b, err := os.ReadFile(file)
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
		if cwd, err := os.Getwd(); err == nil && !unsafeProject(cwd) {
			set.Project = cwd
		}
	}
	// A kernel outlives no server: ipykernel watches its parent, which it cannot see.
	if os.Getenv("JPY_PARENT_PID") != "" {
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
			return fail(fmt.Errorf("watch Jupyter: %w", err))
		}
	}
	return set.exec(u, "", func(_ *envs.Env, home string) []string {
		return []string{home + "/bin/python", "-m", "ipykernel_launcher", "-f", file, "--IPKernelApp.parent_handle=1"} // 1: there is a server, and no parent to watch
	}, func(o *runOptions) error {
		for _, p := range ports {
			o.publish = append(o.publish, fmt.Sprintf("127.0.0.1:%d:%d", p, p))
		}
		return nil
	})
}
