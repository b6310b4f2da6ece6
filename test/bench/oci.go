package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/sbxrun/sbxrun/seccomp"
)

// The range of host ids of the OCI runtimes' user namespace.
const (
	ociIDBase = 1610612736
	ociIDSize = 65536
)

type object = map[string]any

// bundle writes an OCI bundle for args over the peers' rootfs. The filter is a
// "profile", which the runtime compiles at each launch, or "precompiled".
func (w *workshop) bundle(filter string, args []string) (string, error) {
	b, err := json.MarshalIndent(ociConfig(filepath.Join(w.dir, "rootfs"), args), "", " ")
	if filter == "precompiled" {
		b, err = w.precompiled(args)
	}
	if err != nil {
		return "", fmt.Errorf("write bundle: %w", err)
	}
	dir, err := os.MkdirTemp(w.dir, "bundle-")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("write bundle: %w", err)
	}
	return dir, nil
}

// precompiled is for crun: an annotation carries the raw filter.
func (w *workshop) precompiled(args []string) ([]byte, error) {
	f, err := seccomp.Default().Compile()
	if err != nil {
		return nil, err
	}
	c := ociConfig(filepath.Join(w.dir, "rootfs"), args)
	c["annotations"] = object{"run.oci.seccomp_bpf_data": base64.StdEncoding.EncodeToString(f)}
	return json.MarshalIndent(c, "", " ")
}

// ociConfig is as near to a default sandbox of sbxrun as an OCI runtime comes.
func ociConfig(root string, args []string) object {
	mount := func(kind, target string, options ...string) object {
		return object{"type": kind, "source": kind, "destination": target, "options": options}
	}
	ids := []object{{"containerID": 0, "hostID": ociIDBase, "size": ociIDSize}}
	none := []string{}
	var namespaces []object
	for _, n := range []string{"user", "mount", "pid", "ipc", "uts", "cgroup", "network"} {
		namespaces = append(namespaces, object{"type": n})
	}
	return object{
		"ociVersion": "1.0.2",
		"process": object{
			"terminal": false, "user": object{"uid": 1000, "gid": 1000}, "args": args, "cwd": "/",
			"env":             []string{"PATH=/usr/local/bin:/usr/bin:/bin"},
			"capabilities":    object{"bounding": none, "effective": none, "permitted": none, "inheritable": none, "ambient": none},
			"rlimits":         []object{{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}, {"type": "RLIMIT_CORE", "hard": 0, "soft": 0}},
			"noNewPrivileges": true,
		},
		"root":     object{"path": root, "readonly": true},
		"hostname": "bench",
		"mounts": []object{
			mount("proc", "/proc", "nosuid", "nodev", "noexec"),
			mount("tmpfs", "/dev", "nosuid", "strictatime", "mode=755", "size=65536k"),
			mount("devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
			mount("tmpfs", "/dev/shm", "nosuid", "nodev", "noexec", "mode=1777", "size=64m"),
			mount("tmpfs", "/tmp", "nosuid", "nodev", "mode=1777", "size=512m"),
		},
		"linux": object{
			"uidMappings": ids, "gidMappings": ids, "namespaces": namespaces,
			"resources": object{
				"devices": []object{{"allow": false, "access": "rwm"}},
				"memory":  object{"limit": 1 << 30, "swap": 1 << 30},
				"cpu":     object{"quota": 100000, "period": 100000},
				"pids":    object{"limit": 256},
			},
			"seccomp": ociSeccomp(seccomp.Default().Rules()),
			"maskedPaths": []string{
				"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/kmsg", "/proc/key-users", "/proc/kallsyms",
				"/proc/latency_stats", "/proc/modules", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
			},
			"readonlyPaths": []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

// ociSeccomp says our policy as an OCI profile, for the architectures that
// docker's has. What we refuse is what it does not allow.
func ociSeccomp(rules []seccomp.Rule) object {
	var plain []string
	syscalls := []object{}
	for _, r := range rules {
		if r.Action != seccomp.Allow {
			continue
		}
		if len(r.Args) == 0 {
			plain = append(plain, r.Name)
			continue
		}
		args := []object{}
		for _, a := range r.Args {
			switch a.Op {
			case seccomp.Equal:
				args = append(args, object{"index": a.Index, "value": a.Value, "op": "SCMP_CMP_EQ"})
			case seccomp.MaskedEqual:
				args = append(args, object{"index": a.Index, "value": a.Mask, "valueTwo": a.Value, "op": "SCMP_CMP_MASKED_EQ"})
			case seccomp.EqualLow32:
				args = append(args, object{"index": a.Index, "value": uint64(0xffffffff), "valueTwo": a.Value, "op": "SCMP_CMP_MASKED_EQ"})
			}
		}
		syscalls = append(syscalls, object{"names": []string{r.Name}, "action": "SCMP_ACT_ALLOW", "args": args})
	}
	architectures := []string{"SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"}
	if runtime.GOARCH == "arm64" {
		architectures = []string{"SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"}
	}
	return object{
		"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
		"architectures": architectures,
		"syscalls":      append(syscalls, object{"names": plain, "action": "SCMP_ACT_ALLOW"}),
	}
}
