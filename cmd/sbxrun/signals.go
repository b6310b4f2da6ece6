package main

import (
	"context"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// signals listens only when it is told to, in the shadow of pid 1's start or
// before a bake: each signal that is listened to costs two switches between
// threads. Until then they do what they do to any process; what is left then is
// healed as after kill -9.
type signals struct {
	once sync.Once
	ch   chan os.Signal
	// early is the terminating signal that came while there was no sandbox.
	early os.Signal
}

// listen starts to; it may be called again.
func (s *signals) listen() <-chan os.Signal {
	s.once.Do(func() {
		s.ch = make(chan os.Signal, 16)
		signal.Notify(s.ch, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT)
		if os.Getenv("WATCHDOG_USEC") != "" { // what systemd's watchdog sends: the command's, to leave a trace of itself
			signal.Notify(s.ch, unix.SIGABRT)
		}
		signal.Ignore(unix.SIGPIPE)
	})
	return s.ch
}

// during runs f, a bake, under a context that a terminating signal ends.
func (s *signals) during(f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ch := s.listen()
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case sig := <-ch:
				if sig == unix.SIGINT || sig == unix.SIGTERM || sig == unix.SIGHUP || sig == unix.SIGQUIT {
					s.early = sig
					cancel()
				}
			case <-quit:
				return
			}
		}
	}()
	err := f(ctx)
	close(quit)
	<-done
	return err
}
