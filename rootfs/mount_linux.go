package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
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
	NoLinks        bool   // Source must hold no symbolic link
	// Lowers are host directories below Source in a copy-on-write mount, topmost
	// first.
	Lowers []string
	// UpperDir is a host directory from [MakeUpper]: a copy-on-write mount's
	// writes go there, unbounded, and stay. "" is the sandbox's own upper.
	UpperDir string
}

// Again is a folder of the first Layers lowers, shown at Target as well. It is
// as it is in the root: what is written there goes with the sandbox, but the two
// do not see each other's changes.
type Again struct {
	Folder string // below a layer, as opt/env
	Target string
	Layers int
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
	// Again shows folders of the topmost layers a second time.
	Again []Again
	// NoIDMapOK allows lowers whose file system cannot map owners: their files
	// then look as if nobody owned them.
	NoIDMapOK bool
	// UserNS is a user namespace that maps inside ids to IDs, for the lowers:
	// the sandbox's own. nil makes one for the purpose, which costs a process.
	UserNS *os.File
	// Stage is an existing directory that a kernel on which an overlay cannot
	// be made of detached mounts needs (before Linux 6.15); see [NewNamespace].
	Stage string
}

// BindMount is a mount below the root: detached, its flags and owners set.
type BindMount struct {
	Tree     *os.File
	Target   string
	ReadOnly bool
	File     bool
}

// Root is an assembled root. Its mounts are attached nowhere: they are held by
// descriptors and go with the last of these.
type Root struct {
	Tree     *os.File
	Mounts   []BindMount // in the order in which they are to be attached
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

// Assemble makes the root. Nothing appears in any mount table: all is done on
// detached mounts, by descriptor.
func Assemble(a Assembly) (*Root, error) {
	b := &builder{a: a, r: &Root{IDMapped: true, limit: a.Upper.SizeBytes}, userns: a.UserNS}
	err := b.build()
	err = errors.Join(err, b.close())
	if err != nil {
		return nil, errors.Join(err, b.r.Close())
	}
	return b.r, nil
}

// builder holds what is needed only while a root is made.
type builder struct {
	a      Assembly
	r      *Root
	userns *os.File
	lowers []int
	ns     *Namespace // only where the kernel wants attached mounts
	staged map[int]string
	// mappings are namespaces of volumes, by what they map.
	mappings map[string]*os.File
}

func (b *builder) close() error {
	for _, fd := range b.lowers {
		unix.Close(fd)
	}
	if b.userns != nil && b.userns != b.a.UserNS {
		b.userns.Close()
	}
	for _, ns := range b.mappings {
		ns.Close()
	}
	if b.ns != nil {
		return b.ns.Close()
	}
	return nil
}

func (b *builder) build() (err error) {
	if len(b.a.Lowers) == 0 {
		return errors.New("assemble root: no layers")
	}
	if b.userns == nil {
		if b.userns, err = userns(pairs(0, b.a.IDs), pairs(0, b.a.IDs)); err != nil {
			return err
		}
	}
	if b.r.upper, b.r.Notes, err = b.a.Upper.mount(); err != nil {
		return err
	}
	up := int(b.r.upper.Fd())
	if err := makeUpper(up, "root", "work", b.a.IDs.Base, b.a.IDs.Base, 0o755); err != nil {
		return err
	}
	for _, s := range b.a.Seeds {
		if err := plant(up, "root", s, b.a.IDs); err != nil {
			return err
		}
	}
	for _, l := range b.a.Lowers {
		fd, err := b.lower(l)
		if err != nil {
			return err
		}
		b.lowers = append(b.lowers, fd)
	}
	tree, err := b.overlay("the root", b.lowers, "", "root", "work")
	if err != nil {
		return err
	}
	b.r.Tree = os.NewFile(uintptr(tree), "root")

	for _, bind := range b.a.Binds {
		at, st, err := source(bind.Source, bind.Target)
		if err != nil {
			return err
		}
		fd, err := b.clone(at, bind.Source)
		unix.Close(at)
		if err != nil {
			return err
		}
		b.add(fd, st, bind.Target, true)
	}
	layers := b.lowers[:len(b.lowers):len(b.lowers)]
	for i, v := range b.a.Volumes {
		if err := b.volume(i, v); err != nil {
			return err
		}
	}
	for i, v := range b.a.Again {
		if err := b.again(strconv.Itoa(i), v, layers[:v.Layers]); err != nil {
			return err
		}
	}
	return nil
}

// again shows a folder of layers. A layer that has none of it is left out.
func (b *builder) again(id string, v Again, layers []int) error {
	var have []int
	var st unix.Stat_t
	for i := len(layers) - 1; i >= 0; i-- { // the topmost one's stat is what counts
		var one unix.Stat_t
		if unix.Fstatat(layers[i], v.Folder, &one, unix.AT_SYMLINK_NOFOLLOW) == nil && one.Mode&unix.S_IFMT == unix.S_IFDIR {
			have, st = append([]int{layers[i]}, have...), one
		}
	}
	if len(have) == 0 {
		return fmt.Errorf("mount environment on %q: its layers have no %q", v.Target, v.Folder)
	}
	root := b.a.IDs.Base
	if err := makeUpper(int(b.r.upper.Fd()), "again"+id, "againwork"+id, root, root, st.Mode&0o777); err != nil {
		return err
	}
	fd, err := b.overlay(v.Target, have, v.Folder, "again"+id, "againwork"+id)
	if err != nil {
		return err
	}
	b.add(fd, st, v.Target, false)
	return nil
}

// lower gives a layer's mount: of a directory, or of an image.
func (b *builder) lower(path string) (int, error) {
	at, st, err := openPath(path)
	if err != nil {
		return -1, fmt.Errorf("open layer %q: %w", path, err)
	}
	defer unix.Close(at)
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return b.clone(at, path)
	}
	fd, err := mountImage(path)
	if err != nil {
		return -1, err
	}
	// The mount is fresh and nobody else's: no copy is needed.
	err = setTree(fd, path, false, b.userns, safeAttr|unix.MOUNT_ATTR_RDONLY)
	if errors.Is(err, errNoIDMap) {
		err = b.unmapped(err)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// unmapped gives err unless the caller agreed to do without mapped owners.
func (b *builder) unmapped(err error) error {
	if !b.a.NoIDMapOK {
		return hinted.New(err, "--degrade idmap runs without: the files then look as if nobody owned them")
	}
	b.r.IDMapped = false
	return nil
}

func (b *builder) add(fd int, st unix.Stat_t, target string, readOnly bool) {
	b.r.Mounts = append(b.r.Mounts, BindMount{
		Tree: os.NewFile(uintptr(fd), target), Target: target, ReadOnly: readOnly, File: st.Mode&unix.S_IFMT != unix.S_IFDIR,
	})
}

// clone gives a read-only copy of a layer's or base's mount, owners mapped
// where possible.
func (b *builder) clone(at int, src string) (int, error) {
	const attr = safeAttr | unix.MOUNT_ATTR_RDONLY
	fd, err := cloneTree(at, src, false, b.userns, attr)
	if errors.Is(err, errNoIDMap) {
		if err := b.unmapped(err); err != nil {
			return -1, err
		}
		fd, err = cloneTree(at, src, false, nil, attr)
	}
	return fd, err
}

// source opens a host path that is to be mounted on target.
func source(src, target string) (int, unix.Stat_t, error) { return sourceBy(openPath, src, target) }

func sourceBy(open func(string) (int, unix.Stat_t, error), src, target string) (int, unix.Stat_t, error) {
	at, st, err := open(src)
	if err != nil {
		return -1, st, hinted.New(fmt.Errorf("mount %q on %q: %w", src, target, err), "the host path must be there: it is not made for you")
	}
	return at, st, nil
}

// volumeSource opens a host path, or a folder in the image of a packed layer
// (Linux 6.15: a part of a detached mount is cloned).
func (b *builder) volumeSource(src, target string) (int, unix.Stat_t, error) {
	image, in, ok := strings.Cut(src, "/"+imageName+"/")
	if !ok {
		return source(src, target)
	}
	var st unix.Stat_t
	m, err := mountImage(image + "/" + imageName)
	if err != nil {
		return -1, st, err
	}
	b.lowers = append(b.lowers, m) // until all is made: it goes with this descriptor
	at, err := unix.Openat2(m, in, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err == nil {
		err = unix.Fstat(at, &st)
	}
	if err != nil {
		return -1, st, fmt.Errorf("open %q in layer %q: %w", in, image, err)
	}
	return at, st, nil
}

// inWritable says whether a volume is a part of another one that is writable, and
// shown in it: its files are seen as they are there, by the same mapping.
func (b *builder) inWritable(v VolumeMount) bool {
	for _, o := range b.a.Volumes {
		if v.NoLinks && o.Mode == "rw" && !o.NoIDMap && strings.HasPrefix(v.Source, o.Source+"/") && strings.HasPrefix(v.Target, o.Target+"/") {
			return true
		}
	}
	return false
}

// mapping is userns, once for volumes of the same owner: each costs a process.
func (b *builder) mapping(uids, gids []syscall.SysProcIDMap) (*os.File, error) {
	key := fmt.Sprint(uids, gids)
	if ns := b.mappings[key]; ns != nil {
		return ns, nil
	}
	ns, err := userns(uids, gids)
	if err == nil {
		if b.mappings == nil {
			b.mappings = map[string]*os.File{}
		}
		b.mappings[key] = ns
	}
	return ns, err
}

// volume shows a host path of the user's. Its owner there is the sandbox's
// user inside, and the other way round for what the sandbox writes; in a
// writable volume no other id can own anything.
func (b *builder) volume(i int, v VolumeMount) error {
	a := b.a
	attr := uint64(safeAttr)
	switch v.Mode {
	case "rw":
	case "ro", "O":
		attr |= unix.MOUNT_ATTR_RDONLY
	default:
		return fmt.Errorf("mount %q on %q: unknown mode %q", v.Source, v.Target, v.Mode)
	}
	open := b.volumeSource
	if v.NoLinks {
		open = func(src, target string) (int, unix.Stat_t, error) { return sourceBy(openExact, src, target) }
	}
	at, st, err := open(v.Source, v.Target)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	if v.Mode == "O" && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return hinted.New(fmt.Errorf("mount %q on %q: copy-on-write needs a directory", v.Source, v.Target), "use :ro for a single file")
	}
	var ns *os.File
	if !v.NoIDMap {
		uids, gids := onePair(st.Uid, a.IDs.Base+a.UID), onePair(st.Gid, a.IDs.Base+a.GID)
		if v.Mode != "rw" && !b.inWritable(v) { // nothing is written: the others may be seen as who they are
			uids, gids = swapped(st.Uid, a.UID, a.IDs), swapped(st.Gid, a.GID, a.IDs)
		}
		if ns, err = b.mapping(uids, gids); err != nil {
			return err
		}
	}
	// Docker's rule: what is mounted below comes along.
	fd, err := cloneTree(at, v.Source, v.Mode != "O", ns, attr)
	if errors.Is(err, errNoIDMap) && v.Mode != "rw" && a.NoIDMapOK {
		b.r.IDMapped = false
		fd, err = cloneTree(at, v.Source, v.Mode != "O", nil, attr)
	}
	if errors.Is(err, errNoIDMap) {
		return hinted.New(err, "the volume's file system (or one mounted below it) cannot map owners; use a directory on ext4, xfs or btrfs")
	}
	if err != nil {
		return err
	}
	if v.Mode == "O" {
		b.lowers = append(b.lowers, fd)
		lowers := []int{fd}
		for _, l := range v.Lowers {
			at, _, err := b.volumeSource(l, v.Target)
			if err != nil {
				return err
			}
			fd, err := cloneTree(at, l, false, ns, attr)
			unix.Close(at)
			if err != nil {
				return err
			}
			b.lowers, lowers = append(b.lowers, fd), append(lowers, fd)
		}
		if fd, err = b.copyOnWrite(i, v, lowers, st.Mode&0o777); err != nil {
			return err
		}
	}
	b.add(fd, st, v.Target, v.Mode == "ro")
	return nil
}

// copyOnWrite gives the overlay of a copy-on-write volume.
func (b *builder) copyOnWrite(i int, v VolumeMount, lowers []int, mode uint32) (int, error) {
	uid, gid := b.a.IDs.Base+b.a.UID, b.a.IDs.Base+b.a.GID
	if v.UpperDir != "" {
		upper, err := OpenUpper(v.UpperDir)
		if err != nil {
			return -1, fmt.Errorf("mount %q: %w", v.Target, err)
		}
		defer upper.Close()
		if err := errors.Join(upper.Chown(int(uid), int(gid)), upper.Chmod(os.FileMode(mode))); err != nil {
			return -1, fmt.Errorf("mount %q: %w", v.Target, err)
		}
		// What an earlier mount left says that it was volatile, and refuses another.
		work := v.UpperDir + "/work"
		if err := errors.Join(os.RemoveAll(work), os.Mkdir(work, 0o700)); err != nil {
			return -1, fmt.Errorf("mount %q: %w", v.Target, err)
		}
		fd, err := b.overlay(v.Target, lowers, "", v.UpperDir+"/upper", work)
		if errors.Is(err, unix.EINVAL) {
			return -1, hinted.New(err, "the store must be on a file system that can be written in layers: ext4, xfs, btrfs or tmpfs (--root)")
		}
		return fd, err
	}
	id := strconv.Itoa(i)
	if err := makeUpper(int(b.r.upper.Fd()), "vol"+id, "volwork"+id, uid, gid, mode); err != nil {
		return -1, err
	}
	return b.overlay(v.Target, lowers, "", "vol"+id, "volwork"+id)
}

// makeUpper makes an overlay's two directories in the file system up.
func makeUpper(up int, upper, work string, uid, gid, mode uint32) error {
	for _, d := range []string{upper, work} {
		if err := unix.Mkdirat(up, d, 0o700); err != nil {
			return fmt.Errorf("make upper: %w", err)
		}
	}
	if err := unix.Fchownat(up, upper, int(uid), int(gid), 0); err != nil {
		return fmt.Errorf("make upper: %w", err)
	}
	if err := unix.Fchmodat(up, upper, mode, 0); err != nil {
		return fmt.Errorf("make upper: %w", err)
	}
	return nil
}

// plant makes one seed below root, and its parents as root's. The file system
// up is ours alone until the overlay is mounted.
func plant(up int, root string, s Seed, ids IDMap) error {
	p := root + filepath.Clean("/"+s.Path)
	for d := filepath.Dir(p); d != root; d = filepath.Dir(d) {
		var st unix.Stat_t
		if unix.Fstatat(up, d, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			break
		}
		if err := plant(up, root, Seed{Path: strings.TrimPrefix(d, root), Dir: true, Mode: 0o755}, ids); err != nil {
			return err
		}
	}
	var err error
	switch {
	case s.Link != "":
		err = unix.Symlinkat(s.Link, up, p)
	case s.Dir:
		if err = unix.Mkdirat(up, p, 0o700); errors.Is(err, unix.EEXIST) {
			err = nil
		}
	default:
		err = writeAt(up, p, s.Data)
	}
	if err == nil {
		err = unix.Fchownat(up, p, int(ids.Base+s.UID), int(ids.Base+s.GID), unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && s.Link == "" {
		err = unix.Fchmodat(up, p, s.Mode, 0)
	}
	if err != nil {
		return fmt.Errorf("put %q in the root: %w", s.Path, err)
	}
	return nil
}

func writeAt(dir int, path string, data []byte) error {
	fd, err := unix.Openat(dir, path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// overlay gives a detached overlay of a folder ("" is all) of lowers (topmost
// first), an upper and a work directory: of the upper's file system, or absolute
// paths on the host. The layers go in one by one (lowerdir+, Linux 6.5): no
// 4096-byte limit.
func (b *builder) overlay(what string, lowers []int, folder, upper, work string) (int, error) {
	up := fdPath(int(b.r.upper.Fd()))
	var paths []string
	for _, l := range lowers {
		paths = append(paths, filepath.Join(fdPath(l), folder))
	}
	fd, err := fsmountOverlay(what, paths, under(up, upper), under(up, work))
	if err == nil || !errors.Is(err, errOldOverlay) {
		return fd, err
	}
	return b.stagedOverlay(what, lowers, folder, upper, work)
}

func under(dir, p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return dir + "/" + p
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// stagedOverlay is for kernels that take only attached mounts as layers
// (before Linux 6.15): they are attached in a private mount namespace, and the
// overlay is cloned out of it.
func (b *builder) stagedOverlay(what string, lowers []int, folder, upper, work string) (tree int, err error) {
	if b.ns == nil {
		if b.ns, err = NewNamespace(b.a.Stage); err != nil {
			return -1, err
		}
		b.staged = map[int]string{}
	}
	err = b.ns.Do(func() error {
		var paths []string
		for _, fd := range append([]int{int(b.r.upper.Fd())}, lowers...) {
			if b.staged[fd] == "" {
				p := filepath.Join(b.a.Stage, "layer"+strconv.Itoa(fd))
				if err := os.Mkdir(p, 0o711); err != nil {
					return fmt.Errorf("make mountpoint: %w", err)
				}
				if err := moveTo(fd, p); err != nil {
					return err
				}
				b.staged[fd] = p
			}
			paths = append(paths, b.staged[fd])
		}
		up, paths := paths[0], paths[1:]
		for i := range paths {
			paths[i] = filepath.Join(paths[i], folder)
		}
		tree, err = fsmountOverlay(what, paths, under(up, upper), under(up, work))
		if !errors.Is(err, errOldOverlay) {
			return err
		}
		target := filepath.Join(b.a.Stage, "overlay-"+filepath.Base(upper)+strconv.Itoa(lowers[0]))
		if err := os.Mkdir(target, 0o711); err != nil {
			return fmt.Errorf("make mountpoint: %w", err)
		}
		opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=off,metacopy=off,index=off,volatile", strings.Join(paths, ":"), under(up, upper), under(up, work))
		if len(opts) > 4000 {
			return hinted.New(fmt.Errorf("mount overlay for %s: too many layers for this kernel", what), "Linux 6.5 takes any number")
		}
		if err := unix.Mount("sbxrun", target, "overlay", unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
			return overlayErr(what, err)
		}
		tree, err = unix.OpenTree(unix.AT_FDCWD, target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		return err
	})
	return tree, err
}

func overlayErr(what string, err error) error {
	e := fmt.Errorf("mount overlay for %s: %w", what, err)
	if errors.Is(err, unix.ENODEV) {
		return hinted.New(e, "modprobe overlay")
	}
	return e
}

// errOldOverlay says that this kernel does not take the layers in this form.
var errOldOverlay = errors.New("overlay without lowerdir+ or with detached layers")

func fsmountOverlay(what string, lowers []string, upper, work string) (int, error) {
	fs, err := fsopen("overlay")
	if err != nil {
		return -1, overlayErr(what, err)
	}
	defer unix.Close(fs)
	for i, l := range lowers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", l); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return -1, errOldOverlay
			}
			return -1, fmt.Errorf("add layer to overlay for %s: %w", what, err)
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
			return -1, fmt.Errorf("mount overlay for %s: option %s: %w", what, kv[0], err)
		}
	}
	if err := unix.FsconfigSetFlag(fs, "volatile"); err != nil { // thrown away, never synced
		return -1, fmt.Errorf("mount overlay for %s: option volatile: %w", what, err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		if errors.Is(err, unix.EINVAL) {
			return -1, errOldOverlay // older kernels judge the options and the mounts only here
		}
		return -1, overlayErr(what, err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, safeAttr)
	if err != nil {
		return -1, overlayErr(what, err)
	}
	return m, nil
}

// fsopen begins a file system (Linux 5.2).
func fsopen(kind string) (int, error) {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		return -1, hinted.New(fmt.Errorf("open file system %q: %w", kind, err), "fsopen(2) is needed: Linux 5.2, CAP_SYS_ADMIN, and no seccomp filter around sbxrun that refuses it")
	}
	if err != nil {
		return -1, fmt.Errorf("open file system %q: %w", kind, err)
	}
	return fs, nil
}

// Fsmount gives a detached mount of a fresh file system. An option without
// value is a flag. data and attr are as for fsconfig(2) and fsmount(2).
func Fsmount(kind string, attr int, options ...[2]string) (int, error) {
	fs, err := fsopen(kind)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	for _, kv := range options {
		if kv[1] == "" {
			err = unix.FsconfigSetFlag(fs, kv[0])
		} else {
			err = unix.FsconfigSetString(fs, kv[0], kv[1])
		}
		if err != nil {
			return -1, fmt.Errorf("mount %s: option %s=%s: %w", kind, kv[0], kv[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mount %s: %w", kind, err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w", kind, err)
	}
	return m, nil
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

// Detach lets go of the mounts once an engine has attached them: what is left
// is the upper, for its usage.
func (r *Root) Detach() error {
	var errs []error
	for _, m := range r.Mounts {
		errs = append(errs, m.Tree.Close())
	}
	r.Mounts = nil
	if r.Tree != nil {
		errs = append(errs, r.Tree.Close())
		r.Tree = nil
	}
	return errors.Join(errs...)
}

// Close lets go of everything.
func (r *Root) Close() error {
	if r == nil {
		return nil
	}
	err := r.Detach()
	if r.upper != nil {
		err = errors.Join(err, r.upper.Close())
		r.upper = nil
	}
	return err
}
