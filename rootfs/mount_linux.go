package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Seed is something that is in the upper from the start. Ids are inside ids.
type Seed struct {
	Path string `json:"path"`
	Dir  bool   `json:"dir"`
	Mode uint32 `json:"mode"`
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Data []byte `json:"data,omitempty"`
	Link string `json:"link,omitempty"` // a symbolic link to this
}

// VolumeMount is a host path to be shown in the root.
type VolumeMount struct {
	Source, Target string
	Mode           string // ro, rw, O (copy-on-write)
	NoIDMap        bool   // keep owners as they are on disk
}

// Assembly is what a root is put together from.
type Assembly struct {
	Lowers   []string // topmost first
	Binds    []Bind
	IDs      IDMap
	UID, GID uint32 // inside ids of the sandbox's user
	Upper    Upper
	Seeds    []Seed
	Volumes  []VolumeMount
	// NoIDMapOK allows lowers whose file system cannot map owners: their files
	// then look as if nobody owned them.
	NoIDMapOK bool
}

// BindMount is a mount that the engine makes below the root.
type BindMount struct {
	Source   string // valid in the namespace
	Target   string
	ReadOnly bool
	File     bool
}

// Root is an assembled root.
type Root struct {
	Path     string
	Mounts   []BindMount
	IDMapped bool
	Notes    []string
	upper    *os.File
	limit    int64 // bytes asked for
}

// Usage is what the upper holds.
type Usage struct {
	UsedBytes, Inodes       int64
	TotalBytes, TotalInodes int64
	Full                    bool
}

const safeAttr = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

// Assemble mounts the root below the namespace's stage. On failure nothing
// needs to be undone but the namespace.
func (n *Namespace) Assemble(a Assembly) (*Root, error) {
	r := &Root{IDMapped: true, limit: a.Upper.SizeBytes}
	err := n.Do(func() error { return n.assemble(a, r) })
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (n *Namespace) assemble(a Assembly, r *Root) error {
	if len(a.Lowers) == 0 {
		return errors.New("assemble root: no layers")
	}
	dir := func(parts ...string) (string, error) {
		p := filepath.Join(append([]string{n.stage}, parts...)...)
		if err := os.MkdirAll(p, 0o711); err != nil {
			return "", fmt.Errorf("make directory: %w", err)
		}
		return p, nil
	}
	all, err := userns(pairs(0, a.IDs), pairs(0, a.IDs))
	if err != nil {
		return err
	}
	defer all.Close()

	// clone shows a host path under the stage, owners mapped where possible.
	clone := func(at int, src, dst string, attr uint64) error {
		fd, err := cloneTree(at, src, false, all, attr)
		if errors.Is(err, errNoIDMap) {
			if !a.NoIDMapOK {
				return &hinted{err, "--degrade idmap runs without: the files then look as if nobody owned them"}
			}
			r.IDMapped = false
			fd, err = cloneTree(at, src, false, nil, attr)
		}
		if err != nil {
			return err
		}
		return attach(fd, dst)
	}
	var lowers []string
	for i, l := range a.Lowers {
		p, err := dir("lower", strconv.Itoa(i))
		if err != nil {
			return err
		}
		at, _, err := openPath(l)
		if err != nil {
			return fmt.Errorf("open layer %q: %w", l, err)
		}
		err = clone(at, l, p, safeAttr|unix.MOUNT_ATTR_RDONLY)
		unix.Close(at)
		if err != nil {
			return err
		}
		lowers = append(lowers, p)
	}

	up, err := dir("upper")
	if err != nil {
		return err
	}
	if r.Notes, err = a.Upper.mount(up); err != nil {
		return err
	}
	if r.upper, err = os.Open(up); err != nil {
		return fmt.Errorf("open upper: %w", err)
	}
	if err := makeUpper(up+"/root", up+"/work", a.IDs.Base, a.IDs.Base, 0o755); err != nil {
		return err
	}
	for _, s := range a.Seeds {
		if err := plant(up+"/root", s, a.IDs); err != nil {
			return err
		}
	}
	if r.Path, err = dir("root"); err != nil {
		return err
	}
	if err := mountOverlay(r.Path, lowers, up+"/root", up+"/work"); err != nil {
		return err
	}

	for i, b := range a.Binds {
		m, err := n.bind("bind", i, b.Source, b.Target, func(at int, _ unix.Stat_t, dst string) error {
			return clone(at, b.Source, dst, safeAttr|unix.MOUNT_ATTR_RDONLY)
		})
		if err != nil {
			return err
		}
		m.ReadOnly = true
		r.Mounts = append(r.Mounts, m)
	}
	for i, v := range a.Volumes {
		if err := n.volume(a, r, up, i, v); err != nil {
			return err
		}
	}
	return nil
}

// bind makes a mountpoint of the source's kind and lets show fill it.
func (n *Namespace) bind(kind string, i int, src, target string, show func(at int, st unix.Stat_t, dst string) error) (BindMount, error) {
	m := BindMount{Target: target, Source: filepath.Join(n.stage, kind, strconv.Itoa(i))}
	at, st, err := openPath(src)
	if err != nil {
		return m, &hinted{fmt.Errorf("mount %q on %q: %w", src, target, err), "the host path must be there: it is not made for you"}
	}
	defer unix.Close(at)
	if err := os.MkdirAll(filepath.Dir(m.Source), 0o711); err != nil {
		return m, fmt.Errorf("make directory: %w", err)
	}
	if m.File = st.Mode&unix.S_IFMT != unix.S_IFDIR; m.File {
		err = os.WriteFile(m.Source, nil, 0o600)
	} else {
		err = os.Mkdir(m.Source, 0o711)
	}
	if err != nil {
		return m, fmt.Errorf("make mountpoint: %w", err)
	}
	return m, show(at, st, m.Source)
}

// volume shows a host path of the user's. Its owner there is the sandbox's
// user inside, and the other way round for what the sandbox writes; in a
// writable volume no other id can own anything.
func (n *Namespace) volume(a Assembly, r *Root, up string, i int, v VolumeMount) error {
	attr := uint64(safeAttr)
	switch v.Mode {
	case "rw":
	case "ro", "O":
		attr |= unix.MOUNT_ATTR_RDONLY
	default:
		return fmt.Errorf("mount %q on %q: unknown mode %q", v.Source, v.Target, v.Mode)
	}
	var owner unix.Stat_t
	m, err := n.bind("vol", i, v.Source, v.Target, func(at int, st unix.Stat_t, dst string) error {
		owner = st
		var ns *os.File
		var err error
		if !v.NoIDMap {
			uids, gids := onePair(st.Uid, a.IDs.Base+a.UID), onePair(st.Gid, a.IDs.Base+a.GID)
			if v.Mode != "rw" { // nothing is written: the others may be seen as who they are
				uids, gids = swapped(st.Uid, a.UID, a.IDs), swapped(st.Gid, a.GID, a.IDs)
			}
			if ns, err = userns(uids, gids); err != nil {
				return err
			}
			defer ns.Close()
		}
		// Docker's rule: what is mounted below comes along.
		fd, err := cloneTree(at, v.Source, v.Mode != "O", ns, attr)
		if errors.Is(err, errNoIDMap) && v.Mode != "rw" && a.NoIDMapOK {
			r.IDMapped = false
			fd, err = cloneTree(at, v.Source, v.Mode != "O", nil, attr)
		}
		if errors.Is(err, errNoIDMap) {
			return &hinted{err, "the volume's file system (or one mounted below it) cannot map owners; use a directory on ext4, xfs or btrfs"}
		}
		if err != nil {
			return err
		}
		return attach(fd, dst)
	})
	if err != nil {
		return err
	}
	if v.Mode == "O" {
		if m.File {
			return &hinted{fmt.Errorf("mount %q on %q: copy-on-write needs a directory", v.Source, v.Target), "use :ro for a single file"}
		}
		lower := m.Source
		id := strconv.Itoa(i)
		if err := makeUpper(up+"/vol"+id, up+"/volwork"+id, a.IDs.Base+a.UID, a.IDs.Base+a.GID, owner.Mode&0o777); err != nil {
			return err
		}
		m.Source = filepath.Join(n.stage, "cow", id)
		if err := os.MkdirAll(m.Source, 0o711); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := mountOverlay(m.Source, []string{lower}, up+"/vol"+id, up+"/volwork"+id); err != nil {
			return err
		}
	}
	m.ReadOnly = v.Mode == "ro"
	r.Mounts = append(r.Mounts, m)
	return nil
}

// makeUpper makes an overlay's two directories.
func makeUpper(upper, work string, uid, gid, mode uint32) error {
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("make upper: %w", err)
		}
	}
	if err := os.Chown(upper, int(uid), int(gid)); err != nil {
		return fmt.Errorf("make upper: %w", err)
	}
	return os.Chmod(upper, os.FileMode(mode))
}

// plant makes one seed, and its parents as root's. The upper is ours alone
// until the overlay is mounted.
func plant(root string, s Seed, ids IDMap) error {
	p := filepath.Join(root, filepath.Clean("/"+s.Path))
	for d := filepath.Dir(p); d != root; d = filepath.Dir(d) {
		if _, err := os.Lstat(d); err == nil {
			break
		}
		if err := plant(root, Seed{Path: strings.TrimPrefix(d, root), Dir: true, Mode: 0o755}, ids); err != nil {
			return err
		}
	}
	var err error
	switch {
	case s.Link != "":
		err = os.Symlink(s.Link, p)
	case s.Dir:
		if err = os.Mkdir(p, 0o700); errors.Is(err, os.ErrExist) {
			err = nil
		}
	default:
		err = os.WriteFile(p, s.Data, 0o600)
	}
	if err == nil {
		err = os.Lchown(p, int(ids.Base+s.UID), int(ids.Base+s.GID))
	}
	if err == nil && s.Link == "" {
		err = unix.Chmod(p, s.Mode)
	}
	if err != nil {
		return fmt.Errorf("put %q in the root: %w", s.Path, err)
	}
	return nil
}

// mountOverlay mounts lowers (topmost first) and an upper on target. The
// layers go in one by one (lowerdir+, Linux 6.5): no 4096-byte limit.
func mountOverlay(target string, lowers []string, upper, work string) error {
	err := fsmountOverlay(target, lowers, upper, work)
	if err == nil || !errors.Is(err, errOldOverlay) {
		return err
	}
	for _, p := range append(append([]string{}, lowers...), upper, work) {
		if strings.ContainsAny(p, ":,\\") {
			return fmt.Errorf("mount overlay on %q: %q has a character that this kernel cannot take", target, p)
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=off,metacopy=off,index=off,volatile", strings.Join(lowers, ":"), upper, work)
	if len(opts) > 4000 {
		return &hinted{fmt.Errorf("mount overlay on %q: too many layers for this kernel", target), "Linux 6.5 takes any number"}
	}
	if err := unix.Mount("sbxrun", target, "overlay", unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		return overlayErr(target, err)
	}
	return nil
}

func overlayErr(target string, err error) error {
	e := fmt.Errorf("mount overlay on %q: %w", target, err)
	if errors.Is(err, unix.ENODEV) {
		return &hinted{e, "modprobe overlay"}
	}
	return e
}

var errOldOverlay = errors.New("overlay without lowerdir+")

func fsmountOverlay(target string, lowers []string, upper, work string) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return errOldOverlay
		}
		return overlayErr(target, err)
	}
	defer unix.Close(fs)
	for i, l := range lowers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", l); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return errOldOverlay
			}
			return fmt.Errorf("add layer %q: %w", l, err)
		}
	}
	for _, kv := range [][2]string{
		{"source", "sbxrun"},
		{"upperdir", upper},
		{"workdir", work},
		{"redirect_dir", "off"},
		{"metacopy", "off"},
		{"index", "off"},
	} {
		if err := unix.FsconfigSetString(fs, kv[0], kv[1]); err != nil {
			return fmt.Errorf("mount overlay on %q: option %s: %w", target, kv[0], err)
		}
	}
	if err := unix.FsconfigSetFlag(fs, "volatile"); err != nil { // thrown away, never synced
		return fmt.Errorf("mount overlay on %q: option volatile: %w", target, err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		if errors.Is(err, unix.EINVAL) {
			return errOldOverlay // before 6.5 the options are judged only here
		}
		return overlayErr(target, err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, safeAttr)
	if err != nil {
		return overlayErr(target, err)
	}
	return attach(m, target)
}

// Usage reads what the upper holds. It may be called from any thread.
func (r *Root) Usage() (Usage, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(r.upper.Fd()), &st); err != nil {
		return Usage{}, fmt.Errorf("read usage of upper: %w", err)
	}
	u := Usage{
		TotalBytes: int64(st.Blocks) * st.Bsize, UsedBytes: int64(st.Blocks-st.Bfree) * st.Bsize,
		TotalInodes: int64(st.Files), Inodes: int64(st.Files - st.Ffree),
	}
	// A writer stops where the next block does not fit; on ext4 a little before,
	// by what it keeps for data that has no place yet.
	slack := int64(4096)
	if st.Type == unix.EXT4_SUPER_MAGIC {
		slack = min(r.limit/16, 4<<20)
	}
	u.Full = int64(st.Bavail)*st.Bsize < slack || st.Ffree == 0
	return u, nil
}

// Close lets go of the upper. The mounts go with the namespace.
func (r *Root) Close() error {
	if r == nil || r.upper == nil {
		return nil
	}
	f := r.upper
	r.upper = nil
	return f.Close()
}
