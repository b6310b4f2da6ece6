/*
 * The direct engine's half inside: from a fresh process in a new pid namespace
 * to one that is jailed and unprivileged. Part of init.c; policy is Go's
 * (runtime/engine/direct): what follows carries out a list and nothing more.
 *
 *   engine (host)                         this process (pid 1)
 *   -------------                         --------------------
 *   clone(NEWPID), exec from a memfd -->  non-dumpable, own session, no groups
 *                                         procfs of this pid namespace, detached
 *   control socket                  <-3-  'U': in the new user namespace
 *   writes the id maps                    unshare the other namespaces, lo up
 *   operations that need no root    --3-> run them
 *   builds root and binds: detached
 *   record, mounts, operations      --3-> run them
 *   status pipe                     <-4-  nothing, or stage, errno, operation
 *
 * The user namespace is entered before anything of the root is touched. Every
 * name below the root is looked up with openat2 from its one descriptor;
 * mounts move by descriptor. What only the engine may decide comes in the
 * record; nothing is read from the root.
 */
enum { FD_CONTROL = 3, FD_NETNS = 6, NFD = 512 };
enum { NEWNS = 0x20000, NEWCGROUP = 0x2000000, NEWUTS = 0x4000000, NEWIPC = 0x8000000,
	NEWUSER = 0x10000000, NEWNET = 0x40000000, NEWTIME = 0x80 };
enum { OP_JOIN = 1, OP_UNSHARE, OP_IDS, OP_FSMOUNT, OP_ATTACH, OP_MKDIR, OP_MASK,
	OP_READONLY, OP_HOSTNAME, OP_TTY, OP_PIVOT, OP_CHDIR, OP_DROP, OP_BOUND, OP_PARK };
struct op { u32 code, len; s32 a, b; u64 flags; char data[]; };

/* fds[0] is the procfs, then what is received or made, in order. */
static s32 fds[NFD];
static u32 nfds = 1;
static u32 opnr;

/* What comes over the control socket: a header, operations, descriptors. */
struct order {
	u32 record;             /* slot of the record; 0 is: more will come */
	u32 len;                /* bytes of operations */
	u64 ops[8192 - 1];
};
static struct order order;

static void op_fail(s64 e)
{
	struct msg m = { MSG_FAILED, ST_OP, (s32)-e, (s32)opnr, 0, 0 };
	send(&m);
	die();
}

static s64 ok(s64 e)
{
	if (e < 0)
		op_fail(e);
	return e;
}

static s32 slot(s32 i)
{
	if (i < 0 || i >= NFD || (u32)i >= nfds)
		op_fail(-22);
	return fds[i];
}

/* take puts a descriptor in the slot that the engine expects: the next. */
static void take(s32 i, s64 fd)
{
	ok(fd);
	if ((u32)i != nfds || nfds >= NFD)
		op_fail(-22);
	fds[nfds++] = (s32)fd;
}

/* fsmount takes pairs of key and value, each with its NUL, up to end. */
static s64 fsmount(const char *type, const char *kv, const char *end, u64 attr)
{
	s64 fs = S2(NR_fsopen, type, 1 /* FSOPEN_CLOEXEC */), e = 0;
	if (fs < 0)
		return fs;
	while (e >= 0 && kv < end && *kv) {
		const char *v = kv + length(kv) + 1;
		if (v >= end)
			return -22;
		e = *v ? S5(NR_fsconfig, fs, 1 /* SET_STRING */, kv, v, 0) : S5(NR_fsconfig, fs, 0 /* SET_FLAG */, kv, 0, 0);
		kv = v + length(v) + 1;
	}
	if (e >= 0)
		e = S5(NR_fsconfig, fs, 6 /* CMD_CREATE */, 0, 0, 0);
	if (e >= 0)
		e = S3(NR_fsmount, fs, 1 /* FSMOUNT_CLOEXEC */, attr);
	S1(NR_close, fs);
	return e;
}

/* lookup opens path below dir. Symbolic links are followed as if dir were the
 * root; magic links never. Linux 5.6. */
enum { IN_ROOT = 0x10, NO_MAGICLINKS = 2, NO_XDEV = 1, NO_SYMLINKS = 4, BENEATH = 8 };
enum { O_PATH_ = 010000000, CLOEXEC = 02000000 };
static s64 lookup(s32 dir, const char *path, u64 resolve)
{
	u64 how[3] = { O_PATH_ | CLOEXEC, 0, resolve | NO_MAGICLINKS };
	return S4(NR_openat2, dir, path, how, sizeof how);
}

static int is_dir(s32 fd)
{
	u32 st[64]; /* struct stat: st_mode is word 6 on amd64, 4 on arm64 */
	ok(S2(NR_fstat, fd, st));
#if defined(__x86_64__)
	return (st[6] & 0170000) == 0040000;
#else
	return (st[4] & 0170000) == 0040000;
#endif
}

/* target opens the path below root, and makes what is missing of it: folders,
 * and a file at its end unless T_FOLDER. */
enum { T_FOLDER = 1, T_NOLINK = 2 };
static s64 target(s32 root, char *path, u64 flags)
{
	/* Our own places are where they say (CVE-2019-19921: /proc as a link). */
	u64 resolve = IN_ROOT | (flags & T_NOLINK ? NO_SYMLINKS : 0);
	s64 fd = lookup(root, path, resolve);
	if (fd != -2 /* ENOENT */)
		return fd;
	s64 up = lookup(root, "/", IN_ROOT);
	char *p = path;
	for (;;) {
		while (*p == '/')
			p++;
		char *name = p;
		while (*p && *p != '/')
			p++;
		char sep = *p, *rest = p;
		while (*rest == '/')
			rest++;
		if (up < 0 || p == name)
			return up;
		*p = 0;
		fd = lookup(root, path, resolve); /* from the root: links are seen as inside */
		if (fd == -2) {
			if (*rest || flags & T_FOLDER)
				fd = S3(NR_mkdirat, up, name, 0755);
			else
				fd = S4(NR_openat, up, name, 0100 | 0200 | CLOEXEC /* CREAT, EXCL: follows no link */, 0644);
			if (fd > 0)
				S1(NR_close, fd);
			if (fd >= 0)
				fd = lookup(root, path, resolve);
		}
		*p = sep;
		S1(NR_close, up);
		up = fd;
		p = rest;
		if (!*p)
			return up;
	}
}

/* EMPTY_PATH on both sides: descriptor onto descriptor. */
static s64 move_onto(s32 mount, s32 at)
{
	return S5(NR_move_mount, mount, "", at, "", 0x4 | 0x40);
}

static s64 clone_tree(s32 dir, const char *path, u64 flags)
{
	return S3(NR_open_tree, dir, path, 1 /* OPEN_TREE_CLONE */ | CLOEXEC | flags);
}

static s64 set_attr(s32 mount, u64 set)
{
	u64 attr[4] = { set, 0, 0, 0 };
	return S5(NR_mount_setattr, mount, "", 0x1000 /* AT_EMPTY_PATH */, attr, sizeof attr);
}

/* mask hides one entry of procfs: a file behind the device null of our /dev, a
 * folder behind an empty one. What is not there needs no mask. */
static void mask(s32 proc, const char *path, s32 dev)
{
	static const char opts[] = "mode\0" "555\0size\0" "4k";
	s64 fd = lookup(proc, path, BENEATH | NO_XDEV | NO_SYMLINKS), m;
	if (fd == -2 || fd == -20 /* ENOTDIR */)
		return;
	if (is_dir((s32)ok(fd)))
		m = fsmount("tmpfs", opts, opts + sizeof opts, 15 /* ro nosuid nodev noexec */);
	else
		m = clone_tree(dev, "null", 0);
	ok(move_onto((s32)ok(m), (s32)fd));
	S1(NR_close, m);
	S1(NR_close, fd);
}

static void readonly(s32 proc, const char *path)
{
	s64 fd = lookup(proc, path, BENEATH | NO_XDEV | NO_SYMLINKS);
	if (fd == -2)
		return;
	s64 m = ok(clone_tree((s32)ok(fd), "", 0x1000));
	ok(set_attr((s32)m, 15));
	ok(move_onto((s32)m, (s32)fd));
	S1(NR_close, m);
	S1(NR_close, fd);
}

struct iovec { void *base; u64 len; };
struct msghdr { void *name; u64 namelen; struct iovec *iov; u64 iovlen; void *control; u64 controllen; u64 flags; };

/* tty makes the sandbox's own terminal: its slave becomes 0, 1, 2 and
 * /dev/console, its master goes to the supervisor. */
static void tty(s32 devpts, s32 sock, u32 uid, u64 winsize, s32 dev)
{
	s32 unlock = 0;
	s64 master = ok(S4(NR_openat, devpts, "ptmx", 2 | 0400 /* NOCTTY */ | CLOEXEC, 0));
	ok(S3(NR_ioctl, master, 0x40045431 /* TIOCSPTLCK */, &unlock));
	s64 slave = ok(S3(NR_ioctl, master, 0x5441 /* TIOCGPTPEER */, 2 | 0400 | CLOEXEC));
	unsigned short ws[4] = { (unsigned short)winsize, (unsigned short)(winsize >> 16), 0, 0 };
	ok(S3(NR_ioctl, master, 0x5414 /* TIOCSWINSZ */, ws));
	ok(S3(NR_fchown, slave, uid, -1));
	s64 at = ok(lookup(dev, "console", IN_ROOT));
	s64 m = ok(clone_tree((s32)slave, "", 0x1000));
	ok(move_onto((s32)m, (s32)at));
	ok(S3(NR_ioctl, slave, 0x540e /* TIOCSCTTY */, 0));
	for (int i = 0; i < 3; i++)
		ok(S3(NR_dup3, slave, i, 0));

	char x = 0;
	struct iovec io = { &x, 1 };
	struct { u64 len; u32 level, type; s32 fd, pad; } c = { 20, 1 /* SOL_SOCKET */, 1 /* SCM_RIGHTS */, (s32)master, 0 };
	struct msghdr h = { 0, 0, &io, 1, &c, sizeof c, 0 };
	ok(S3(NR_sendmsg, sock, &h, 0x4000 /* NOSIGNAL */));
}

/* bound empties the bounding set: what execve could give. */
static void bound(void)
{
	for (int c = 0; c < 64; c++) {
		s64 e = S5(NR_prctl, 24 /* PR_CAPBSET_DROP */, c, 0, 0, 0);
		if (e == -22 && c > 36)
			break; /* past the last one of this kernel */
		ok(e);
	}
}

/* drop gives up everything, for good. */
static void drop(u32 uid, u32 gid)
{
	ok(S5(NR_prctl, 38 /* PR_SET_NO_NEW_PRIVS */, 1, 0, 0, 0));
	ok(S5(NR_prctl, 47 /* PR_CAP_AMBIENT */, 4 /* CLEAR_ALL */, 0, 0, 0));
	ok(S3(NR_setresgid, gid, gid, gid));
	ok(S3(NR_setresuid, uid, uid, uid));
	u32 head[2] = { 0x20080522, 0 }, none[6] = { 0 };
	ok(S2(NR_capset, head, none));
}

static void run(struct op *o)
{
	char *end = (char *)o + o->len;

	switch (o->code) {
	case OP_JOIN: /* v1: "0" in `tasks` moves this one thread without waiting for a grace period */
		ok(S3(NR_write, slot(o->a), "0", 1));
		break;
	case OP_UNSHARE:
		ok(S1(NR_unshare, o->flags));
		break;
	case OP_IDS: /* the sandbox's root, for what is made in its root */
		ok(S3(NR_setresgid, 0, 0, 0));
		ok(S3(NR_setresuid, 0, 0, 0));
		break;
	case OP_FSMOUNT: { /* data: type, then keys and values */
		char *kv = o->data + length(o->data) + 1;
		take(o->a, fsmount(o->data, kv, end, o->flags));
		break;
	}
	case OP_ATTACH: { /* mount a on data below b */
		s64 at = ok(target(slot(o->b), o->data, o->flags)), fs[16];
		/* By a link of the base's a name can lie in our procfs. */
		ok(S2(NR_fstatfs, at, fs));
		if (fs[0] == 0x9fa0 /* PROC_SUPER_MAGIC */)
			op_fail(-40 /* ELOOP */);
		ok(move_onto(slot(o->a), (s32)at));
		S1(NR_close, at);
		break;
	}
	case OP_MKDIR:
		S1(NR_close, ok(target(slot(o->a), o->data, T_FOLDER)));
		break;
	case OP_MASK:
		mask(slot(o->a), o->data, slot(o->b));
		break;
	case OP_READONLY:
		if (*o->data)
			readonly(slot(o->a), o->data);
		else
			ok(set_attr(slot(o->a), 1));
		break;
	case OP_HOSTNAME:
		ok(S2(NR_sethostname, o->data, length(o->data)));
		break;
	case OP_TTY: /* a devpts, b socket; data: dev slot, then uid; flags: rows, columns */
		tty(slot(o->a), slot(o->b), ((u32 *)o->data)[1], o->flags, slot(((s32 *)o->data)[0]));
		break;
	case OP_PARK: /* mount a on a path of the host's that this namespace alone will see covered */
		ok(S5(NR_move_mount, slot(o->a), "", -100, o->data, 4));
		break;
	case OP_PIVOT:
		ok(S1(NR_fchdir, slot(o->a)));
		ok(S2(NR_pivot_root, ".", "."));
		ok(S2(NR_umount2, ".", 2 /* MNT_DETACH */));
		ok(S1(NR_chdir, "/"));
		break;
	case OP_CHDIR: { /* inside, or not at all (CVE-2024-21626) */
		char cwd[4096];
		ok(S1(NR_chdir, o->data));
		ok(S2(NR_getcwd, cwd, sizeof cwd));
		if (cwd[0] != '/')
			op_fail(-2);
		break;
	}
	case OP_BOUND:
		bound();
		break;
	case OP_DROP:
		drop((u32)o->a, (u32)o->b);
		break;
	default:
		op_fail(-22);
	}
}

/* loopback sets lo up. */
static s64 loopback(void)
{
	struct { char name[16]; short flags; char pad[22]; } ifr;
	memset(&ifr, 0, sizeof ifr);
	ifr.name[0] = 'l';
	ifr.name[1] = 'o';
	ifr.flags = 0x41; /* IFF_UP | IFF_RUNNING */
	s64 s = S3(NR_socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */ | CLOEXEC, 0);
	if (s < 0)
		return s;
	s64 e = S3(NR_ioctl, s, 0x8914 /* SIOCSIFFLAGS */, &ifr);
	S1(NR_close, s);
	return e;
}

/* receive takes one message. */
static void receive(void)
{
	static u64 control[2 + 256 / 2];
	struct iovec io = { &order, sizeof order };
	struct msghdr h = { 0, 0, &io, 1, control, sizeof control, 0 };
	s64 n;
	do
		n = S3(NR_recvmsg, FD_CONTROL, &h, 0x40000000 /* MSG_CMSG_CLOEXEC */);
	while (n == -4);
	if (n == 0)
		die(); /* the engine gave up and knows why */
	if (n < 8 || order.len != n - 8 || h.flags & (0x8 | 0x20) /* MSG_CTRUNC, MSG_TRUNC */)
		fail(ST_CONTROL, n < 0 ? n : -22);
	u64 got = h.controllen < 16 ? 0 : (control[0] - 16) / 4;
	for (u64 i = 0; i < got; i++) {
		if (nfds >= NFD)
			fail(ST_CONTROL, -7);
		fds[nfds++] = ((s32 *)(control + 2))[i];
	}
}

static struct record *stage(char net, u32 ids)
{
	s64 e;

	if ((e = S0(NR_setsid)) < 0)
		fail(ST_SESSION, e);
	/* What gives the caller more than others must not come along; less may. */
	s32 prio = (s32)S2(NR_getpriority, 0 /* PRIO_PROCESS */, 0); /* 20 - nice */
	if (prio > 20)
		S3(NR_setpriority, 0, 0, 0);
	s32 sched = 0;
	s64 policy = S1(NR_sched_getscheduler, 0) & ~0x40000000L /* SCHED_RESET_ON_FORK */;
	if ((policy == 1 || policy == 2 || policy == 6 /* FIFO, RR, DEADLINE */) && (e = S3(NR_sched_setscheduler, 0, 0 /* SCHED_OTHER */, &sched)) < 0)
		fail(ST_PRIVILEGE, e);
	/* Room for the descriptors of the root; the command has its own limit. */
	u64 nofile[2];
	if (S4(NR_prlimit64, 0, 7 /* RLIMIT_NOFILE */, 0, nofile) == 0 && nofile[0] < nofile[1]) {
		nofile[0] = nofile[1];
		S4(NR_prlimit64, 0, 7, nofile, 0);
	}
	/* While this process still has the host's rights, and from the kernel, not
	 * by a path: so that it is a procfs, of this pid namespace, and that its
	 * root-owned entries stay the host's. */
	static const char source[] = "source\0proc";
	if ((e = fsmount("proc", source, source + sizeof source, 14 /* nosuid nodev noexec */)) < 0)
		fail(ST_PROC, e);
	fds[0] = (s32)e;
	if ((e = S2(NR_setgroups, 0, 0)) < 0)
		fail(ST_GROUPS, e);
	if (net == 'f' && (e = S2(NR_setns, FD_NETNS, NEWNET)) < 0)
		fail(ST_NETNS, e);
	e = S5(NR_keyctl, 1 /* JOIN_SESSION_KEYRING */, 0, 0, 0, 0); /* not the caller's */
	if (e < 0 && e != -38 /* ENOSYS: a kernel without keys */)
		fail(ST_KEYRING, e);
	/* As the sandbox's own root: the owner of a user namespace pays for what is
	 * counted by user (inotify, queued signals), and that must not be the host's
	 * root. Its rights are needed for one more call. */
	u32 head[2] = { 0x20080522, 0 }, caps[6];
	if ((e = S2(NR_prctl, 8 /* PR_SET_KEEPCAPS */, 1)) < 0 || (e = S2(NR_capget, head, caps)) < 0 ||
	    (e = S3(NR_setresgid, ids, ids, ids)) < 0 || (e = S3(NR_setresuid, ids, ids, ids)) < 0)
		fail(ST_USERNS, e);
	caps[0] = caps[1]; /* effective: what is permitted */
	caps[3] = caps[4];
	if ((e = S2(NR_capset, head, caps)) < 0 || (e = S1(NR_unshare, NEWUSER)) < 0)
		fail(ST_USERNS, e);
	if ((e = S3(NR_write, FD_CONTROL, "U", 1)) < 0)
		fail(ST_CONTROL, e);
	if ((e = S1(NR_unshare, NEWNS | NEWIPC | NEWUTS | NEWTIME | (net == 'n' ? NEWNET : 0))) < 0)
		fail(ST_UNSHARE, e);
	if (net == 'n' && (e = loopback()) < 0)
		fail(ST_LOOPBACK, e);

	do {
		receive();
		for (u32 at = 0; at < order.len; opnr++) {
			struct op *o = (struct op *)((char *)order.ops + at);
			u32 left = order.len - at;
			if (left < sizeof *o || o->len < sizeof *o + 8 || o->len % 8 || o->len > left || ((char *)o)[o->len - 1])
				op_fail(-22);
			run(o);
			at += o->len;
		}
	} while (!order.record);
	struct record *r = load(slot((s32)order.record));
	S1(NR_close, FD_CONTROL);
	S1(NR_close, FD_NETNS);
	if ((e = S3(NR_close_range, FD_PASSED + r->passed, ~0U, 0)) < 0) /* all that is left is 0 to 2, ours and what is passed */
		fail(ST_CLOSE, e);
	return r;
}
