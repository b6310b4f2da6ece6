package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Namespace is a private mount namespace that one OS thread lives in, for what
// needs mounts with a path (the libcontainer engine, older kernels). None is
// ever in the host's table, and all go with the last process that is in it.
type Namespace struct {
	stage string
	work  chan func()
	quit  chan struct{}
	done  chan struct{}
	once  sync.Once
}

// NewNamespace starts the thread and covers the directory stage with a small
// tmpfs of mode 0711, so that the mapped root of a user namespace can pass.
func NewNamespace(stage string) (*Namespace, error) {
	n := &Namespace{stage: stage, work: make(chan func()), quit: make(chan struct{}), done: make(chan struct{})}
	ready := make(chan error, 1)
	var serve func()
	serve = func() {
		// Never unlocked: the thread's state cannot be restored, so it dies
		// with the goroutine. The main thread cannot die, and what it is in is
		// what /proc/PID shows of the process: another one is taken while this
		// goroutine holds it.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			started := make(chan struct{})
			go func() { close(started); serve() }()
			<-started
			runtime.UnlockOSThread()
			return
		}
		defer close(n.done)
		err := enterPrivate(stage)
		ready <- err
		if err != nil {
			return
		}
		for {
			select {
			case f := <-n.work:
				f()
			case <-n.quit:
				return
			}
		}
	}
	go serve()
	if err := <-ready; err != nil {
		<-n.done
		return nil, err
	}
	return n, nil
}

func enterPrivate(stage string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return hinted.New(fmt.Errorf("unshare mount namespace: %w", err), "run as root, with CAP_SYS_ADMIN")
	}
	// Slave, not private: what the host unmounts later goes here too and stays
	// unmountable there; nothing of ours goes out.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("sbxrun", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0711,size=4m"); err != nil {
		return fmt.Errorf("mount tmpfs on %q: %w", stage, err)
	}
	if err := unix.Mount("", stage, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %q private: %w", stage, err)
	}
	return nil
}

// Do runs f on the namespace's thread. Children that f starts are in the
// namespace. After Close, and where f ends its goroutine, it is an error.
func (n *Namespace) Do(f func() error) error {
	res := make(chan error, 1)
	call := func() {
		err := errors.New("mount namespace: the function ended its thread")
		defer func() { res <- err }() // also on Goexit
		err = f()
	}
	select {
	case n.work <- call:
		return <-res
	case <-n.done:
		return fmt.Errorf("mount namespace: %w", os.ErrClosed)
	}
}

// Attach gives the root's mounts paths in the namespace, of the root and of its
// Mounts in their order.
func (n *Namespace) Attach(r *Root) (root string, mounts []string, err error) {
	at := func(name string, tree *os.File, file bool) (string, error) {
		p := filepath.Join(n.stage, name)
		var err error
		if file {
			err = os.WriteFile(p, nil, 0o600)
		} else {
			err = os.Mkdir(p, 0o711)
		}
		if err != nil {
			return "", fmt.Errorf("make mountpoint: %w", err)
		}
		return p, moveTo(int(tree.Fd()), p)
	}
	err = n.Do(func() (err error) {
		if root, err = at("root", r.Tree, false); err != nil {
			return err
		}
		for i, m := range r.Mounts {
			p, err := at("mount"+strconv.Itoa(i), m.Tree, m.File)
			if err != nil {
				return err
			}
			mounts = append(mounts, p)
		}
		return nil
	})
	return root, mounts, err
}

// Close ends the thread. What was mounted goes a moment later, with the last
// process in the namespace.
func (n *Namespace) Close() error {
	n.once.Do(func() { close(n.quit) })
	<-n.done
	return nil
}
