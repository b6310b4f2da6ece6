/*
 * sbxrun's pid 1: starts the command, reaps, forwards signals, reports, and
 * takes the whole pid namespace with it when it ends.
 *
 * Theory of operation
 *
 *   supervisor (host)              this program (pid 1)            command
 *   ------------------             --------------------            -------
 *   memfd with the record   --3->  map, check every offset
 *                                  become non-dumpable
 *                                  fork  ----------------------->  own group, terminal
 *                                                                  rlimits, Landlock, filter
 *                                                                  execve
 *   status pipe             <-4--  started | stage+errno   <-err pipe-
 *   lifeline pipe           --5->  end of file: the supervisor died; so do we
 *   kill(pid1, sig)         ---->  signalfd: passed to the command
 *   status pipe             <-4--  exited: wait status, rusage
 *
 * It is entered by an engine that has already made the namespaces, the root,
 * the ids, and dropped every capability: nothing here is privileged. Nothing
 * from inside is trusted: the command has no descriptor of ours, cannot trace
 * us (non-dumpable, and the filter has no ptrace), cannot kill us (pid 1 of
 * its namespace), and signals it sends us are dropped (si_pid is not 0; where
 * Landlock scopes signals they do not even come). It has our uid, so the filter
 * refuses it what may be done to a process of one's own uid: see seccomp.
 *
 * No libc: every system call that can happen is in this file.
 * The record is written by runtime/pid1/record.go; keep both in step.
 */
#include "sys.h"

/* ---- the record (fd 3) and the status messages (fd 4) ------------------ */
enum { FD_RECORD = 3, FD_STATUS = 4, FD_LIFELINE = 5, FD_PASSED = 7, MAX_PASSED = 64 };
enum { MAGIC = 0x31584253, FLAG_TTY = 1, FLAG_JAILED = 2, FLAG_LISTEN = 4 };
struct record {
	u32 magic, total, flags;
	u32 argc, envc, candc;          /* number of strings */
	u32 argv, envp, cand;           /* offset of the first, NUL-terminated, one after the other */
	u32 filter, filter_len;         /* offset and number of struct sock_filter */
	u32 rlimits, rlimit_len;        /* offset and number of struct rlim */
	u32 landlock_scoped;            /* LANDLOCK_SCOPE_*; 0 is none */
	u32 passed;                     /* descriptors from FD_PASSED up that are the command's from 3 up */
};
struct rlim { u32 resource, pad; u64 soft, hard; };

enum { MSG_STARTED = 1, MSG_FAILED = 2, MSG_EXITED = 3 };
enum { ST_RECORD = 1, ST_SIGNALS, ST_PIPE, ST_FORK, ST_GROUP, ST_TERMINAL, ST_RLIMIT,
	ST_CLOSE, ST_LANDLOCK, ST_SECCOMP, ST_EXEC, ST_INTERPRETER,
	ST_PROC, ST_GROUPS, ST_USERNS, ST_NETNS, ST_UNSHARE, ST_LOOPBACK, ST_CONTROL, ST_OP,
	ST_SESSION, ST_KEYRING, ST_DUMPABLE, ST_PRIVILEGE, ST_PASS };
struct msg {
	u32 type, stage;
	s32 errno_, wstatus;            /* of ST_OP: the index of the operation */
	s64 nvcsw, nivcsw;
};

static void die(void) { for (;;) S1(NR_exit_group, 125); }

static void send(struct msg *m)
{
	while (S3(NR_write, FD_STATUS, m, sizeof *m) == -4 /* EINTR */)
		;
}

static void fail(u32 stage, s64 e)
{
	struct msg m = { MSG_FAILED, stage, (s32)-e, 0, 0, 0 };
	send(&m);
	die();
}

static u32 length(const char *s)
{
	u32 n = 0;
	while (s[n])
		n++;
	return n;
}

static u32 number(const char *s)
{
	u32 n = 0;
	while (*s >= '0' && *s <= '9')
		n = n * 10 + (u32)(*s++ - '0');
	return n;
}

/* strings fills v with pointers to n strings at off, and a final null. */
static char *base;
static u32 total;
static char **strings(u32 off, u32 n)
{
	char **v = (char **)S6(NR_mmap, 0, ((u64)n + 1) * sizeof *v, 3, 0x22, -1, 0);
	if ((u64)v > -4096UL)
		fail(ST_RECORD, (s64)v);
	for (u32 i = 0; i < n; i++) {
		v[i] = base + off;
		while (off < total && base[off])
			off++;
		if (off++ >= total)
			fail(ST_RECORD, -22);
	}
	v[n] = 0;
	return v;
}

/* within says whether n things of size bytes at off lie inside the record. */
static int within(u32 off, u32 n, u32 size)
{
	return off <= total && (u64)n * size <= total - off;
}

/* ---- the command's side of the fork ------------------------------------ */
static int errfd;
static void child_fail(u32 stage, s64 e)
{
	struct msg m = { MSG_FAILED, stage, (s32)-e, 0, 0, 0 };
	S3(NR_write, errfd, &m, sizeof m);
	die();
}

/* listen_pid writes LISTEN_PID=n at the end of v, which is long enough, and
 * gives its start: readers take a leading 0 for octal. */
enum { LISTEN_PID_LEN = 21 };
static char *listen_pid(char *v, u32 n)
{
	static const char name[] = "LISTEN_PID=";
	char *at = v + LISTEN_PID_LEN;

	do
		*--at = (char)('0' + n % 10);
	while (n /= 10);
	for (u32 i = sizeof name - 1; i;)
		*--at = name[--i];
	return at;
}

static void child(struct record *r, char **argv, char **envp, char **cand)
{
	s64 e;
	u64 none = 0;

	/* A group of its own, so that the terminal can make it the foreground. */
	if ((e = S2(NR_setpgid, 0, 0)) < 0)
		child_fail(ST_GROUP, e);
	if (r->flags & FLAG_TTY) {
		int pgrp = (int)S0(NR_getpid); /* SIGTTOU is still blocked */
		if ((e = S3(NR_ioctl, 0, 0x5410 /* TIOCSPGRP */, &pgrp)) < 0)
			child_fail(ST_TERMINAL, e);
	}
	struct rlim *l = (struct rlim *)(base + r->rlimits);
	for (u32 i = 0; i < r->rlimit_len; i++)
		if ((e = S4(NR_prlimit64, 0, l[i].resource, &l[i].soft, 0)) < 0)
			child_fail(ST_RLIMIT, e);

	/* Upwards: a place is filled once what lay there has been moved. */
	for (u32 i = 0; i < r->passed; i++)
		if ((e = S3(NR_dup3, FD_PASSED + i, 3 + i, 0)) < 0)
			child_fail(ST_PASS, e);
	/* Nothing but 0, 1, 2 and these may reach the command (CVE-2024-21626). Linux 5.11. */
	if ((e = S3(NR_close_range, 3 + r->passed, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */)) < 0)
		child_fail(ST_CLOSE, e);
	if (r->flags & FLAG_LISTEN)
		envp[0] = listen_pid(envp[0], (u32)S0(NR_getpid));

	if (r->landlock_scoped) { /* Linux 6.12; the plan asks only where it is there */
		u64 attr[3] = { 0, 0, r->landlock_scoped };
		if ((e = S3(NR_landlock_create, attr, sizeof attr, 0)) < 0 ||
		    (e = S2(NR_landlock_restrict, e, 0)) < 0)
			child_fail(ST_LANDLOCK, e);
	}
	S4(NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &none, 0, 8);

	/* Last: from here on the filter judges us too. */
	if (r->filter_len) {
		struct { unsigned short len; void *filter; } prog = {
			(unsigned short)r->filter_len, base + r->filter };
		if ((e = S3(NR_seccomp, 1 /* SET_MODE_FILTER */, 0, &prog)) < 0)
			child_fail(ST_SECCOMP, e);
	}

	/* execvp's rules: go on past what is not there, remember a refusal. */
	s64 worst = -2;
	u32 stage = ST_EXEC;
	for (; *cand; cand++) {
		e = S3(NR_execve, *cand, argv, envp);
		if (e == -2 && S3(NR_faccessat, -100, *cand, 0) == 0) {
			worst = e;
			stage = ST_INTERPRETER; /* the file is there; its loader is not */
			break;
		}
		if (e != -2 && e != -20 /* ENOTDIR */) {
			worst = e;
			if (e != -13 /* EACCES */)
				break;
		}
	}
	child_fail(stage, worst);
}

/* ---- pid 1's side ------------------------------------------------------ */
struct siginfo { u32 signo; s32 errno_, code; u32 pid; char rest[112]; };
struct pollfd { s32 fd; short events, revents; };

/* load maps the record and checks every offset. */
static struct record *load(int fd)
{
	u32 size;

	/* The supervisor wrote the record's size in front of it. */
	if (S3(NR_read, fd, &size, 4) != 4 || size < sizeof(struct record) + 4 || size > 64 << 20)
		fail(ST_RECORD, -22);
	base = (char *)S6(NR_mmap, 0, size, 3, 2 /* MAP_PRIVATE */, fd, 0);
	if ((u64)base > -4096UL)
		fail(ST_RECORD, (s64)base);
	total = size;
	struct record *r = (struct record *)(base + 4);
	if (r->magic != MAGIC || r->total != size || r->argc == 0 || r->filter_len > 4096 ||
	    r->rlimit_len > 32 || r->passed > MAX_PASSED || !within(r->filter, r->filter_len, 8) ||
	    !within(r->rlimits, r->rlimit_len, sizeof(struct rlim)))
		fail(ST_RECORD, -22);
	S1(NR_close, fd);
	return r;
}

/* unprivileged trusts no engine: what execve could give or keep must be gone. */
static void unprivileged(void)
{
	u32 head[2] = { 0x20080522, 0 }, sets[6];
	s64 e = S2(NR_capget, head, sets);

	for (int i = 0; e == 0 && i < 6; i++)
		if (sets[i])
			e = -1; /* EPERM */
	for (int c = 0; e == 0 && c < 64; c++)
		if (S5(NR_prctl, 23 /* PR_CAPBSET_READ */, c, 0, 0, 0) == 1 ||
		    S5(NR_prctl, 47 /* PR_CAP_AMBIENT */, 1 /* IS_SET */, c, 0, 0) == 1)
			e = -1;
	if (e == 0 && S5(NR_prctl, 39 /* PR_GET_NO_NEW_PRIVS */, 0, 0, 0, 0) != 1)
		e = -1;
	if (e)
		fail(ST_PRIVILEGE, e);
}

#include "stage.c"

/* hold stays in a cgroup, so that it does not go with its last process, until
 * the supervisor ends: see runtime/scope.go. */
static void hold(void)
{
	char c;

	S5(NR_prctl, 15 /* PR_SET_NAME */, "sbxrun-hold", 0, 0, 0);
	while (S3(NR_read, 3, &c, 1) == -4 /* EINTR */)
		;
	S1(NR_exit_group, 0);
}

void start(s64 *sp);
void start(s64 *sp)
{
	s64 e;
	u64 all = ~0UL;
	int err[2];

	if ((e = S5(NR_prctl, 4 /* PR_SET_DUMPABLE */, 0, 0, 0, 0)) < 0)
		fail(ST_DUMPABLE, e);
	S5(NR_prctl, 15 /* PR_SET_NAME */, "sbxrun-init", 0, 0, 0);
	S1(NR_umask, 022);
	S4(NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &all, 0, 8);
	/* What the supervisor ignores (SIGPIPE) is not the command's to ignore. */
	u64 dfl[4] = { 0, 0, 0, 0 };
	for (int sig = 1; sig <= 64; sig++)
		S4(NR_rt_sigaction, sig, dfl, 0, 8);

	if (sp[0] == 2 && *(char *)sp[2] == 'i')
		hold();
	/* An engine that did everything gives no argument; the direct one gives
	 * two, the network and the first host id: see stage.c. */
	struct record *r = sp[0] == 3 ? stage(*(char *)sp[2], number((char *)sp[3])) : load(FD_RECORD);
	if ((e = S5(NR_prctl, 4 /* PR_SET_DUMPABLE */, 0, 0, 0, 0)) < 0) /* changing ids may have set it */
		fail(ST_DUMPABLE, e);
	S1(NR_personality, 0); /* not the caller's, which may have turned address randomisation off */
	if (r->flags & FLAG_JAILED) {
		unprivileged();
		if (!r->filter_len)
			fail(ST_SECCOMP, -22);
	}
	char **argv = strings(r->argv, r->argc);
	char **envp = strings(r->envp, r->envc);
	char **cand = strings(r->cand, r->candc);
	if (r->flags & FLAG_LISTEN && (!r->envc || length(envp[0]) != LISTEN_PID_LEN))
		fail(ST_RECORD, -22);

	int sfd = (int)S4(NR_signalfd4, -1, &all, 8, 02000000 /* SFD_CLOEXEC */);
	if (sfd < 0)
		fail(ST_SIGNALS, sfd);
	if ((e = S2(NR_pipe2, err, 02000000 /* O_CLOEXEC */)) < 0)
		fail(ST_PIPE, e);

	/* A supervisor that died meanwhile must not have its command started. */
	struct pollfd life = { FD_LIFELINE, 1, 0 };
	u64 now[2] = { 0, 0 };
	if (S5(NR_ppoll, &life, 1, now, 0, 8) != 0)
		S1(NR_exit_group, 137);

	s64 pid = S5(NR_clone, 17 /* SIGCHLD */, 0, 0, 0, 0);
	if (pid < 0)
		fail(ST_FORK, pid);
	if (pid == 0) {
		errfd = err[1];
		if (r->passed) { /* out of its way */
			e = S3(NR_fcntl, err[1], 1030 /* F_DUPFD_CLOEXEC */, FD_PASSED + r->passed);
			if (e < 0)
				child_fail(ST_PASS, e);
			errfd = (int)e;
		}
		child(r, argv, envp, cand);
	}
	S1(NR_close, err[1]);

	/* End of file means that execve closed the other end: it worked. */
	struct msg m;
	do
		e = S3(NR_read, err[0], &m, sizeof m);
	while (e == -4);
	if (e == sizeof m) {
		send(&m);
		die();
	}
	S1(NR_close, err[0]);
	memset(&m, 0, sizeof m);
	m.type = MSG_STARTED;
	m.wstatus = (s32)pid;
	send(&m);

	/* Our copies of 0, 1, 2 would keep the caller's pipes open past the
	 * command's end of them. */
	for (int i = 0; i < 3; i++)
		S1(NR_close, i);
	for (u32 i = 0; i < r->passed; i++)
		S1(NR_close, FD_PASSED + i);

	struct pollfd p[2] = { { sfd, 1, 0 }, { FD_LIFELINE, 1, 0 } };
	for (;;) {
		e = S5(NR_ppoll, p, 2, 0, 0, 8);
		if (e < 0 && e != -4)
			die();
		if (p[1].revents)
			S1(NR_exit_group, 137); /* the supervisor is gone */
		struct siginfo si;
		if (!(p[0].revents & 1) || S3(NR_read, sfd, &si, sizeof si) != sizeof si)
			continue;
		if (si.signo != 17 /* SIGCHLD */) {
			if (si.pid == 0 || si.code > 0) /* from outside or from the kernel, not from the command */
				S2(NR_kill, pid, si.signo);
			continue;
		}
		for (;;) {
			s32 ws = 0;
			s64 w = S4(NR_wait4, -1, &ws, 1 /* WNOHANG */, 0);
			if (w <= 0)
				break;
			if (w != pid)
				continue;
			s64 ru[18];
			memset(ru, 0, sizeof ru);
			S2(NR_getrusage, -1 /* RUSAGE_CHILDREN */, ru);
			memset(&m, 0, sizeof m);
			m.type = MSG_EXITED;
			m.wstatus = ws;
			m.nvcsw = ru[16];
			m.nivcsw = ru[17];
			send(&m);
			S1(NR_exit_group, 0);
		}
	}
}
