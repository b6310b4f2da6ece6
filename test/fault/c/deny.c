/*
 * deny makes chosen system calls of a command fail, as an old kernel or a
 * full machine would, and says afterwards how often it did.
 *
 *   deny [-o FILE] [-x TEXT] RULE... -- PROGRAM [ARG...]
 *   RULE: NAME[=ERRNO][,argN=VALUE][,argN&MASK][,memN&MASK][,strN~TEXT][,skip=K][,times=T]
 *
 * ERRNO is a name (default ENOSYS). All conditions must hold: argN is the
 * argument itself (its low 32 bits where VALUE has no more), memN the 64 bits
 * that it points to (flags of clone3 and of mount_setattr), strN the string.
 * The first K calls that match go through; after T failures the rest does too.
 * A process whose executable has TEXT in its path is left alone.
 *
 * Theory of operation: a filter that only a listener can answer
 * (SECCOMP_RET_USER_NOTIF), because a filter alone has no memory to count in
 * and cannot follow pointers.
 *
 *   this process (becomes PROGRAM)       watcher (reparented to init)
 *   ------------------------------       ----------------------------
 *   fork, fork ----------------------->  standard descriptors to /dev/null
 *   filter; its number into shared page
 *                                        pidfd_getfd takes the listener
 *   spins until it is taken  <---------  ready
 *   execve                               answers until no process has the filter
 *                                        writes FILE
 *
 * Between the filter and execve this process makes no system call, since any
 * may be one that is to fail; its own execve is let through. no_new_privs is
 * not set: root does not need it, and the tests look for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "amd64 and arm64"
#endif
#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5) /* Linux 5.19 */
#endif

static const struct { const char *name; int nr; } calls[] = {
#define C(n) { #n, SYS_##n }
	C(accept4), C(bind), C(capget), C(capset), C(chdir), C(chroot), C(clone), C(clone3), C(close_range), C(connect),
	C(copy_file_range), C(dup3), C(epoll_create1), C(eventfd2), C(execve), C(execveat), C(faccessat), C(faccessat2), C(fallocate),
	C(fchdir), C(fchmod), C(fchmodat), C(fchown), C(fchownat), C(fcntl), C(flock), C(fsconfig), C(fsmount), C(fsopen), C(fspick), C(fstat),
	C(fstatfs), C(fsync), C(ftruncate), C(getcwd), C(getdents64), C(getrandom), C(inotify_init1), C(inotify_add_watch), C(io_uring_setup), C(ioctl), C(keyctl), C(kill),
	C(landlock_create_ruleset), C(landlock_restrict_self), C(linkat), C(memfd_create), C(mkdirat), C(mknodat), C(mmap), C(mount),
	C(mount_setattr), C(move_mount), C(mprotect), C(newfstatat), C(open_tree), C(openat), C(openat2), C(pidfd_getfd), C(pidfd_open),
	C(pidfd_send_signal), C(pipe2), C(pivot_root), C(ppoll), C(prctl), C(pread64), C(prlimit64), C(pwrite64), C(read), C(readlinkat), C(recvmsg),
	C(renameat), C(renameat2), C(rt_sigaction), C(rt_sigprocmask), C(seccomp), C(sendmsg), C(sendto), C(setdomainname), C(setgid), C(setgroups), C(sethostname), C(setns),
	C(setpgid), C(setregid), C(setresgid), C(setresuid), C(setreuid), C(setsid), C(setuid), C(signalfd4), C(socket), C(socketpair), C(statfs), C(statx),
	C(symlinkat), C(timerfd_create), C(umount2), C(unlinkat), C(unshare), C(wait4), C(waitid), C(write),
#if defined(__x86_64__)
	C(arch_prctl), C(fork), C(mkdir), C(open), C(pipe), C(stat), C(unlink), C(vfork),
#endif
#undef C
};

static const struct { const char *name; int nr; } errnos[] = {
#define E(n) { #n, n }
	E(E2BIG), E(EACCES), E(EAGAIN), E(EBADF), E(EBUSY), E(EEXIST), E(EFAULT), E(EINTR), E(EINVAL), E(EIO), E(EISDIR), E(ELOOP), E(EMFILE), E(EDQUOT), E(ENOBUFS), E(ENOLCK),
	E(ENFILE), E(ENODEV), E(ENOENT), E(ENOEXEC), E(ENOMEM), E(ENOSPC), E(ENOSYS), E(ENOTDIR), E(ENOTSUP), E(ENOTTY), E(ENXIO), E(EOPNOTSUPP), E(EPERM), E(EROFS), E(ETXTBSY), E(EUSERS),
#undef E
};

struct cond { char kind, op; int arg; uint64_t value; const char *text; };
struct rule { const char *name; int nr, err, nconds; struct cond conds[6]; long skip, times, seen, failed; };
static struct rule rules[64];
static int nrules;
static const char *spared;

static void die(const char *what, const char *object)
{
	fprintf(stderr, "deny: %s%s%s\n", what, object ? ": " : "", object ? object : "");
	exit(99);
}

static void parse(char *s)
{
	if (nrules == sizeof rules / sizeof *rules)
		die("too many rules", s);
	struct rule *r = &rules[nrules++];
	char *save = NULL, *word = strtok_r(s, ",", &save), *err;
	r->nr = -1;
	r->err = ENOSYS;
	r->times = -1;
	if ((err = strchr(word, '=')))
		*err++ = 0;
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		if (!strcmp(word, calls[i].name))
			r->nr = calls[i].nr;
	if (r->nr < 0)
		die("unknown system call", word);
	r->name = word;
	if (err) {
		r->err = 0;
		for (size_t i = 0; i < sizeof errnos / sizeof *errnos; i++)
			if (!strcmp(err, errnos[i].name))
				r->err = errnos[i].nr;
		if (!r->err)
			die("unknown errno", err);
	}
	while ((word = strtok_r(NULL, ",", &save))) {
		struct cond *c = &r->conds[r->nconds];
		if (!strncmp(word, "skip=", 5))
			r->skip = strtol(word + 5, NULL, 0);
		else if (!strncmp(word, "times=", 6))
			r->times = strtol(word + 6, NULL, 0);
		else if (strlen(word) > 5 && r->nconds < 6 && word[3] >= '0' && word[3] <= '5') {
			c->kind = word[0]; /* a, m or s */
			c->arg = word[3] - '0';
			c->op = word[4];
			c->text = word + 5;
			c->value = strtoull(word + 5, NULL, 0);
			r->nconds++;
		} else
			die("not understood", word);
	}
}

static int holds(const struct cond *c, const struct seccomp_notif *n)
{
	uint64_t v = n->data.args[c->arg];
	char buf[4096], path[64];
	if (c->kind != 'a') {
		snprintf(path, sizeof path, "/proc/%d/mem", n->pid);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t len = -1, want = c->kind == 'm' ? 8 : (ssize_t)sizeof buf - 1;
		if (fd >= 0) {
			len = pread(fd, buf, want, (off_t)v);
			if (len < 0) /* the string ends before its page does, the buffer does not */
				len = pread(fd, buf, 4096 - v % 4096 < (uint64_t)want ? 4096 - v % 4096 : (uint64_t)want, (off_t)v);
			close(fd);
		}
		if (len < 0 || (c->kind == 'm' && len < 8))
			return 0;
		buf[len] = 0;
		if (c->kind == 's')
			return strstr(buf, c->text) != NULL;
		memcpy(&v, buf, 8);
	}
	if (c->op == '&')
		return (v & c->value) != 0;
	return c->value <= UINT32_MAX ? (uint32_t)v == c->value : v == c->value;
}

static int is_spared(int pid)
{
	char path[64], exe[4096];
	snprintf(path, sizeof path, "/proc/%d/exe", pid);
	ssize_t len = spared ? readlink(path, exe, sizeof exe - 1) : -1;
	if (len < 0)
		return 0;
	exe[len] = 0;
	return strstr(exe, spared) != NULL;
}

/* verdict is the errno for a call, 0 lets it through. */
static int verdict(const struct seccomp_notif *n)
{
	if (is_spared((int)n->pid))
		return 0;
	for (int i = 0; i < nrules; i++) {
		struct rule *r = &rules[i];
		int ok = r->nr == n->data.nr;
		for (int k = 0; ok && k < r->nconds; k++)
			ok = holds(&r->conds[k], n);
		if (!ok || r->seen++ < r->skip || r->failed == r->times)
			continue;
		r->failed++;
		return r->err;
	}
	return 0;
}

static void tell(const char *file)
{
	char tmp[4096];
	snprintf(tmp, sizeof tmp, "%s.tmp", file);
	FILE *f = fopen(tmp, "w");
	if (!f)
		return;
	for (int i = 0; i < nrules; i++)
		fprintf(f, "%s seen %ld failed %ld\n", rules[i].name, rules[i].seen, rules[i].failed);
	if (!fclose(f))
		rename(tmp, file);
}

static void watch(int listener, int program, const char *file)
{
	struct pollfd p = { listener, POLLIN, 0 };
	int started = 0;
	for (;;) {
		if (poll(&p, 1, -1) < 0 && errno != EINTR)
			break;
		if (!(p.revents & POLLIN)) {
			if (p.revents & (POLLHUP | POLLERR | POLLNVAL))
				break;
			continue;
		}
		struct seccomp_notif n;
		struct seccomp_notif_resp a;
		memset(&n, 0, sizeof n);
		memset(&a, 0, sizeof a);
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &n) < 0)
			continue;
		int e = 0;
		if (!started && (int)n.pid == program && n.data.nr == SYS_execve)
			started = 1; /* our own */
		else
			e = verdict(&n);
		a.id = n.id;
		if (e)
			a.error = -e;
		else
			a.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &a);
	}
	if (file)
		tell(file);
}

int main(int argc, char **argv)
{
	const char *file = NULL;
	int i = 1;
	for (; i + 1 < argc && argv[i][0] == '-' && argv[i][1] != '-'; i += 2)
		if (argv[i][1] == 'o')
			file = argv[i + 1];
		else
			spared = argv[i + 1];
	for (; i < argc && strcmp(argv[i], "--"); i++)
		parse(argv[i]);
	if (++i >= argc)
		die("usage: deny [-o FILE] [-x TEXT] RULE... -- PROGRAM [ARG...]", NULL);

	volatile int *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		die("mmap", strerror(errno));
	int program = getpid();
	pid_t child = fork();
	if (child == 0) {
		if (fork())
			_exit(0); /* PROGRAM must not find a child that it did not make */
		setsid();
		int null = open("/dev/null", O_RDWR);
		for (int k = 0; k < 3; k++)
			dup2(null, k);
		/* a caller waits for the end of its pipes, not for ours */
		syscall(SYS_close_range, 3, ~0U, 0);
		while (!shared[0])
			if (kill(program, 0) < 0)
				_exit(1);
		int pidfd = (int)syscall(SYS_pidfd_open, program, 0);
		int listener = (int)syscall(SYS_pidfd_getfd, pidfd, shared[0], 0);
		close(pidfd);
		shared[1] = listener < 0 ? -1 : 1;
		if (listener >= 0)
			watch(listener, program, file);
		_exit(0);
	}
	if (child < 0)
		die("fork", strerror(errno));
	waitpid(child, NULL, 0);

	struct sock_filter f[2 * 64 + 5];
	int n = 0;
	f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
	f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
	f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (int k = 0; k < nrules; k++) {
		f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)rules[k].nr, 0, 1);
		f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
	}
	f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog prog = { (unsigned short)n, f };
	int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			      SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &prog);
	if (fd < 0)
		die("install filter", strerror(errno));
	shared[0] = fd;
	while (!shared[1])
		;
	if (shared[1] < 0)
		_exit(99);
	execv(argv[i], argv + i);
	die(argv[i], strerror(errno));
}
