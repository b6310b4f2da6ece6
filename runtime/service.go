package runtime

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/systemd"
)

// What a service manager or a caller hands down to the command beside its
// standard streams: descriptors, secrets, a notification socket.

// The cgroup managers, in podman's words.
const (
	managerAuto     = "auto"
	managerCgroupfs = "cgroupfs"
	managerSystemd  = "systemd"
)

// maxSecretBytes is systemd's limit for a credential.
const maxSecretBytes = 1 << 20

// serviceEnv is what the command's environment says of it. LISTEN_PID is pid 1's
// to add: only it knows the number.
func serviceEnv(spec Spec) (env []string) {
	if spec.ListenFDs > 0 {
		env = append(env, "LISTEN_FDS="+strconv.Itoa(spec.ListenFDs))
		if spec.ListenNames != "" {
			env = append(env, "LISTEN_FDNAMES="+spec.ListenNames)
		}
	}
	if spec.Notify {
		env = append(env, "NOTIFY_SOCKET="+systemd.RelaySocket)
	}
	for _, s := range spec.Secrets {
		if s.Dir == CredentialsDir {
			return append(env, "CREDENTIALS_DIRECTORY="+CredentialsDir)
		}
	}
	return env
}

func (p *Plan) service(spec Spec, host *Host) error {
	p.PassFDs, p.ListenFDs, p.Notify = spec.PassFDs, spec.ListenFDs, spec.Notify
	if p.PassFDs < 0 || p.PassFDs > systemd.MaxFDs || p.ListenFDs < 0 || p.ListenFDs > p.PassFDs {
		return planErr("pass descriptors", strconv.Itoa(p.PassFDs), errors.New("out of range"), fmt.Sprintf("at most %d can be passed", systemd.MaxFDs))
	}
	switch p.CgroupManager = spec.CgroupManager; p.CgroupManager {
	case "", managerAuto:
		p.CgroupManager = managerCgroupfs
	case managerCgroupfs:
	case managerSystemd:
		if err := checkScope(p.CgroupParent, host); err != nil {
			return err
		}
	default:
		return planErr("choose cgroup manager", p.CgroupManager, errors.New("unknown"), "managers: auto, cgroupfs, systemd")
	}
	var dirs []string
	if p.Notify {
		dirs = append(dirs, systemd.RelayDir)
	}
	named := map[string]bool{}
	for _, s := range spec.Secrets {
		at := s.Dir + "/" + s.Name
		if s.Dir != SecretsDir && s.Dir != CredentialsDir || s.Name == "" || s.Name == "." || s.Name == ".." || strings.ContainsAny(s.Name, "/\x00") || len(s.Name) > 255 {
			return planErr("show secret", at, errors.New("not a plain file name"), "")
		}
		if named[at] {
			return planErr("show secret", at, errors.New("named twice"), "give another target=")
		}
		if s.Mode == 0 {
			s.Mode = 0o400
		}
		if s.Mode&^0o444 != 0 {
			return planErr("show secret", at, fmt.Errorf("mode %04o", s.Mode), "a secret is read-only: 0400, 0440 or 0444")
		}
		named[at] = true
		dirs = append(dirs, s.Dir)
		p.Secrets = append(p.Secrets, s)
	}
	for _, d := range dirs {
		for _, v := range spec.Volumes {
			if v.Target == d || strings.HasPrefix(v.Target, d+"/") {
				return planErr("mount on", v.Target, errors.New("reserved for the sandbox itself"), "secrets or the notification socket are shown there")
			}
		}
		for _, t := range spec.Tmpfs {
			if t.Target == d || strings.HasPrefix(t.Target, d+"/") {
				return planErr("mount on", t.Target, errors.New("reserved for the sandbox itself"), "secrets or the notification socket are shown there")
			}
		}
	}
	return nil
}

// openPassed looks at the descriptors that the caller passes on.
func (s *sandbox) openPassed() error {
	if len(s.io.Passed) != s.plan.PassFDs {
		return &Error{Op: "pass descriptors", Err: fmt.Errorf("%d are planned, %d are there", s.plan.PassFDs, len(s.io.Passed))}
	}
	for i, f := range s.io.Passed {
		if s.plan.Network != "host" && systemd.OfNetwork(f) {
			s.res.Degraded = append(s.res.Degraded, "network=fd:"+strconv.Itoa(systemd.FirstFD+i))
		}
	}
	s.files.Passed = s.io.Passed
	return nil
}

// makeServiceMounts makes the file systems that secrets and the notification
// socket lie on and adds them to the root's.
func (s *sandbox) makeServiceMounts() error {
	uid, gid := int(s.slot.idBase()+s.plan.UID), int(s.slot.idBase()+s.plan.GID)
	for _, dir := range []string{SecretsDir, CredentialsDir} {
		var of []Secret
		for _, x := range s.plan.Secrets {
			if x.Dir == dir {
				of = append(of, x)
			}
		}
		if len(of) == 0 {
			continue
		}
		fd, err := secretFS(of, uid, gid)
		if err != nil {
			return err
		}
		s.root.Mounts = append(s.root.Mounts, rootfs.BindMount{Tree: os.NewFile(uintptr(fd), dir), Target: dir, ReadOnly: true})
	}
	if s.plan.Notify && s.io.Service != nil {
		fd, err := smallFS(uid, gid, "0755", "4k")
		if err != nil {
			return err
		}
		s.root.Mounts = append(s.root.Mounts, rootfs.BindMount{Tree: os.NewFile(uintptr(fd), systemd.RelayDir), Target: systemd.RelayDir, ReadOnly: true})
		relay, err := systemd.Listen(fd, uid, gid)
		if err != nil {
			return err
		}
		relay.Serve(s.io.Service)
		s.push(relay.Close)
		return seal(fd)
	}
	return nil
}

const smallAttr = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// smallFS makes a file system in memory, never in swap where the kernel can
// promise that (Linux 6.4).
func smallFS(uid, gid int, mode, size string) (int, error) {
	opts := [][2]string{
		{"source", "sbxrun"}, {"mode", mode}, {"uid", strconv.Itoa(uid)}, {"gid", strconv.Itoa(gid)}, {"size", size}, {"nr_inodes", "300"},
	}
	fd, err := rootfs.Fsmount("tmpfs", smallAttr, append(opts, [2]string{"noswap", ""})...)
	if err != nil {
		fd, err = rootfs.Fsmount("tmpfs", smallAttr, opts...)
	}
	return fd, err
}

// seal makes a detached mount read-only.
func seal(fd int) error {
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make read-only: %w", err)
	}
	return nil
}

// secretFS gives a detached, read-only file system with the files.
func secretFS(list []Secret, uid, gid int) (_ int, err error) {
	fd, err := smallFS(uid, gid, "0500", "64m")
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	for _, s := range list {
		if err := writeSecret(fd, s, uid, gid); err != nil {
			return -1, &Error{Op: "show secret", Object: s.Dir + "/" + s.Name, Err: err, Hint: HintOf(err)}
		}
	}
	return fd, seal(fd)
}

func writeSecret(dir int, s Secret, uid, gid int) error {
	// Not to wait for the writer of a pipe.
	in, err := os.OpenFile(s.Source, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	if st, err := in.Stat(); err != nil || !st.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%q is not a regular file", s.Source), err)
	}
	b, err := bounded.Read(in, maxSecretBytes)
	if err != nil {
		return fmt.Errorf("%q: %w", s.Source, err)
	}
	fd, err := unix.Openat(dir, s.Name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o400)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), s.Name)
	_, err = out.Write(b)
	return errors.Join(err, out.Chmod(os.FileMode(s.Mode)), out.Chown(uid, gid), out.Close())
}
