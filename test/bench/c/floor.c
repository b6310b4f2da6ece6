/*
 * The floor: what a sandbox of ours would cost if nothing but the kernel had
 * to be paid. One static program that makes the system calls of the direct
 * engine and of its pid 1, in their order, without planning, probing, checks,
 * reports or a Go runtime. Switches leave features out, so that the difference
 * of two runs is the price of one. It is a measuring instrument, not a sandbox:
 * never run anything untrusted in it. It needs Linux 6.15, which clones mounts
 * that are attached nowhere.
 *
 * Theory of operation
 *
 *   parent (host)                         child (clone: new pid namespace)
 *   -------------                         --------------------------------
 *   slot, record, pipes, clone  ------->  proc made; user namespace
 *   v1 cgroups, upper, /dev     <-- U --
 *   id maps                     -- g -->  net, mount, ipc, uts, time namespaces
 *   idmapped lowers, overlay              devpts, shm, lo up, become root inside
 *   root, dev, binds, cgroups   -- fds->  join cgroups, cgroup namespace
 *                                         attach, mask, pivot, drop, fork the command
 *   started, exited             <- pipe-  (pid 1: signals, lifeline, reap)
 *   wait, rmdir, unlink
 *
 * usage: floor [-N] [-U] -s SLOTDIR [-f FILTER] -l LOWER... [-b DIR]... [-g KIND=DIR]... -- COMMAND [ARG]...
 *   -N  no network namespace       -U  no user namespace (and no idmapped mounts)
 *   -f  file of struct sock_filter; left out: no filter
 *   -l  a lower, the lowest last   -b  host directory to show read-only
 *   -g  parent directory of a cgroup: KIND is a v1 controller, or v2; left out: no cgroup
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/filter.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_restrict_self 446
#endif

enum { MAX = 32, ID_BASE = 1879048192, ID_SIZE = 65536, SLOTS = 4096, UID = 1000 };

static char *lowers[MAX], *binds[MAX], *groups[MAX], *slot_dir, *filter_path, **command;
static int nlowers, nbinds, ngroups, no_net, no_user;

#define CK(x) check((long)(x), #x, __LINE__)
static long check(long r, const char *what, int line)
{
	if (r < 0) {
		dprintf(2, "floor: line %d: %s: %s\n", line, what, strerror(errno));
		_exit(125);
	}
	return r;
}

/* ---- mounts by descriptor ---------------------------------------------- */
struct attr { unsigned long set, clr, propagation, userns; };
static int fs_open(const char *type) { return CK(syscall(SYS_fsopen, type, 1 /* CLOEXEC */)); }
static long fs_set(int fs, const char *key, const char *value) { return syscall(SYS_fsconfig, fs, 1, key, value, 0); }
static int fs_mount(int fs, unsigned attrs)
{
	CK(syscall(SYS_fsconfig, fs, 6 /* CREATE */, 0, 0, 0));
	int m = CK(syscall(SYS_fsmount, fs, 1 /* CLOEXEC */, attrs));
	close(fs);
	return m;
}
static long attach(int mount, int dir, const char *path) { return syscall(SYS_move_mount, mount, "", dir, path, 4 /* F_EMPTY_PATH */); }
static int clone_tree(int dir, const char *path, unsigned flags) { return syscall(SYS_open_tree, dir, path, 1 /* CLONE */ | O_CLOEXEC | flags); }
static void set_attr(int mount, struct attr a) { CK(syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH | AT_RECURSIVE, &a, sizeof a)); }

static void put(const char *path, const char *value)
{
	int f = CK(open(path, O_WRONLY | O_CLOEXEC));
	CK(write(f, value, strlen(value)));
	close(f);
}

/* ---- the record: argument strings are kept in argv, the filter goes along -- */
static int make_record(int *filter_len)
{
	static char buf[64 << 10];
	int n = 0, m = CK(memfd_create("record", MFD_CLOEXEC | MFD_ALLOW_SEALING));
	if (filter_path) {
		int f = CK(open(filter_path, O_RDONLY | O_CLOEXEC));
		n = CK(read(f, buf, sizeof buf));
		close(f);
	}
	*filter_len = n / (int)sizeof(struct sock_filter);
	CK(write(m, buf, n + 4096));
	CK(fcntl(m, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
	return m;
}

/* ---- the command's side of the last fork -------------------------------- */
static void run_command(int record, int filter_len)
{
	struct rlimit files = { 1024, 1024 }, core = { 0, 0 }, lock = { 65536, 65536 };
	unsigned long scope[3] = { 0, 0, 3 };
	sigset_t none;

	char *r = mmap(0, 64 << 10, PROT_READ, MAP_PRIVATE, record, 0);
	setpgid(0, 0);
	CK(setrlimit(RLIMIT_NOFILE, &files));
	CK(setrlimit(RLIMIT_CORE, &core));
	CK(setrlimit(RLIMIT_MEMLOCK, &lock));
	int rules = syscall(SYS_landlock_create_ruleset, scope, sizeof scope, 0);
	if (rules >= 0) /* Linux 6.12; there is nothing to measure before */
		CK(syscall(SYS_landlock_restrict_self, rules, 0));
	CK(syscall(SYS_close_range, 3, ~0U, 4 /* CLOEXEC */));
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, 0);
	if (filter_len) {
		struct sock_fprog p = { filter_len, (struct sock_filter *)r };
		CK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &p));
	}
	execv(command[0], command);
	CK(-1);
}

/* ---- pid 1 --------------------------------------------------------------- */
struct message { int type, status; struct rusage usage; };

static void pid_one(int status, int lifeline, int record, int filter_len)
{
	struct message m = { .type = 1 };
	struct signalfd_siginfo si;
	sigset_t all;
	int err[2];
	char b;

	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	prctl(PR_SET_NAME, "floor-init", 0, 0, 0);
	umask(022);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, 0);
	int sfd = CK(signalfd(-1, &all, SFD_CLOEXEC));
	CK(pipe2(err, O_CLOEXEC));
	pid_t pid = CK(fork());
	if (!pid)
		run_command(record, filter_len);
	close(err[1]);
	if (read(err[0], &b, 1) < 0)
		_exit(125);
	close(err[0]);
	CK(write(status, &m, sizeof m));
	for (int i = 0; i < 3; i++)
		close(i);
	struct pollfd p[2] = { { sfd, POLLIN, 0 }, { lifeline, POLLIN, 0 } };
	for (;;) {
		poll(p, 2, -1);
		if (p[1].revents)
			_exit(137);
		if (read(sfd, &si, sizeof si) != sizeof si)
			continue;
		if (si.ssi_signo != SIGCHLD) {
			kill(pid, si.ssi_signo);
			continue;
		}
		for (pid_t w; (w = waitpid(-1, &m.status, WNOHANG)) > 0;)
			if (w == pid) {
				m.type = 2;
				getrusage(RUSAGE_CHILDREN, &m.usage);
				CK(write(status, &m, sizeof m));
				_exit(0);
			}
	}
}

/* ---- the child until it is pid 1 ------------------------------------------ */
static const char *masked[] = { "proc/acpi", "proc/asound", "proc/interrupts", "proc/kcore", "proc/keys", "proc/kmsg",
	"proc/key-users", "proc/kallsyms", "proc/latency_stats", "proc/modules", "proc/sched_debug", "proc/scsi",
	"proc/timer_list", "proc/timer_stats" };
static const char *read_only[] = { "proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger" };

static void lo_up(void)
{
	struct ifreq r = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	int s = CK(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	CK(ioctl(s, SIOCSIFFLAGS, &r));
	close(s);
}

static void receive(int sock, int *fds, int n)
{
	char b[8], control[CMSG_SPACE(sizeof(int) * 3 * MAX)];
	struct iovec io = { b, sizeof b };
	struct msghdr m = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	if (CK(recvmsg(sock, &m, MSG_CMSG_CLOEXEC)) == 0)
		_exit(125); /* the parent failed and said why */
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int) * n);
}

static void hide(int root, int null)
{
	int empty = -1;
	struct stat st;
	for (unsigned i = 0; i < sizeof masked / sizeof *masked; i++) {
		if (fstatat(root, masked[i], &st, 0) < 0)
			continue;
		if (S_ISDIR(st.st_mode) && empty < 0)
			empty = fs_mount(fs_open("tmpfs"), MOUNT_ATTR_RDONLY);
		int t = CK(clone_tree(S_ISDIR(st.st_mode) ? empty : null, "", AT_EMPTY_PATH));
		CK(attach(t, root, masked[i]));
		close(t);
	}
	for (unsigned i = 0; i < sizeof read_only / sizeof *read_only; i++) {
		int t = clone_tree(root, read_only[i], AT_RECURSIVE);
		if (t < 0)
			continue;
		set_attr(t, (struct attr){ .set = MOUNT_ATTR_RDONLY });
		CK(attach(t, root, read_only[i]));
		close(t);
	}
}

static void drop(void)
{
	struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { { 0 } };
	for (int i = 0; i <= 63; i++)
		if (prctl(PR_CAPBSET_DROP, i, 0, 0, 0) < 0)
			break;
	CK(setresgid(UID, UID, UID));
	CK(setresuid(UID, UID, UID));
	CK(syscall(SYS_capset, &h, none));
	CK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

static void child(int sock, int status, int lifeline, int record, int filter_len)
{
	int fds[3 * MAX], v1 = 0;
	char b;

	/* Before the namespaces: proc shows the pid namespace it is made in, and
	 * made by root it need not prove that nothing of it was masked before. */
	int proc = fs_mount(fs_open("proc"), MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	CK(setgroups(0, 0));
	if (!no_user)
		CK(unshare(CLONE_NEWUSER));
	CK(write(sock, "U", 1));
	CK(unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWTIME | (no_net ? 0 : CLONE_NEWNET)));
	if (CK(read(sock, &b, 1)) == 0)
		_exit(125);
	CK(setresgid(0, 0, 0));
	CK(setresuid(0, 0, 0));
	CK(mount(0, "/", 0, MS_REC | MS_PRIVATE, 0));
	if (!no_net)
		lo_up();
	CK(sethostname("floor", 5));
	int fs = fs_open("devpts");
	CK(fs_set(fs, "ptmxmode", "0666"));
	CK(fs_set(fs, "mode", "0620"));
	CK(fs_set(fs, "gid", "5"));
	int pts = fs_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
	fs = fs_open("tmpfs");
	CK(fs_set(fs, "size", "64m"));
	CK(fs_set(fs, "mode", "1777"));
	int shm = fs_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);

	for (int i = 0; i < ngroups; i++)
		v1 += strncmp(groups[i], "v2=", 3) != 0;
	receive(sock, fds, 3 + nbinds + v1);
	int root = fds[0], dev = fds[1], null = fds[2], *tree = fds + 3, *tasks = tree + nbinds;
	for (int i = 0; i < v1; i++) {
		CK(write(tasks[i], "0", 1));
		close(tasks[i]);
	}
	if (ngroups)
		CK(unshare(CLONE_NEWCGROUP));

	CK(attach(root, AT_FDCWD, "/tmp"));
	CK(attach(proc, root, "proc"));
	hide(root, null);
	CK(attach(dev, root, "dev"));
	CK(attach(pts, root, "dev/pts"));
	CK(attach(shm, root, "dev/shm"));
	for (int i = 0; i < nbinds; i++)
		CK(attach(tree[i], root, binds[i] + 1));
	CK(fchdir(root));
	CK(syscall(SYS_pivot_root, ".", "."));
	CK(umount2(".", MNT_DETACH));
	CK(chdir("/tmp"));
	for (int i = 0; i < 3 + nbinds; i++)
		close(fds[i]);
	close(proc), close(pts), close(shm), close(sock);
	drop();
	pid_one(status, lifeline, record, filter_len);
}

/* ---- the parent ------------------------------------------------------------ */
static int take_slot(char *path, int size)
{
	for (int i = 0; i < SLOTS; i++) {
		struct stat st;
		snprintf(path, size, "%s/%d", slot_dir, i);
		int f = CK(open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600));
		/* The holder before us may have unlinked it between the two calls. */
		if (flock(f, LOCK_EX | LOCK_NB) == 0 && fstat(f, &st) == 0 && st.st_nlink > 0) {
			CK(dprintf(f, "{\"pid\": %d, \"slot\": %d, \"cgroups\": \"%-400s\"}\n", getpid(), i, ngroups ? groups[0] : ""));
			return i;
		}
		close(f);
	}
	errno = EBUSY;
	return CK(-1);
}

/* The directory of cgroup i and the value of one of its files. */
static char dirs[MAX][512];
static void limit(int i, const char *file, const char *value, int may_lack)
{
	char p[600];
	snprintf(p, sizeof p, "%s/%s", dirs[i], file);
	if (!may_lack || access(p, F_OK) == 0)
		put(p, value);
}

static void make_group(int i, int slot)
{
	char *kind = groups[i], *eq = strchr(kind, '=');
	snprintf(dirs[i], sizeof dirs[i], "%s/%d", eq + 1, slot);
	CK(mkdir(dirs[i], 0755));
	if (!strncmp(kind, "v2=", 3)) {
		limit(i, "memory.max", "1073741824", 0);
		limit(i, "memory.oom.group", "1", 0);
		limit(i, "memory.swap.max", "0", 1);
		limit(i, "cpu.max", "100000 100000", 0);
		limit(i, "pids.max", "256", 0);
	} else if (!strncmp(kind, "memory=", 7)) {
		limit(i, "memory.limit_in_bytes", "1073741824", 0);
		limit(i, "memory.memsw.limit_in_bytes", "1073741824", 1);
	} else if (!strncmp(kind, "cpu=", 4)) {
		limit(i, "cpu.cfs_period_us", "100000", 0);
		limit(i, "cpu.cfs_quota_us", "100000", 0);
	} else if (!strncmp(kind, "pids=", 5)) {
		limit(i, "pids.max", "256", 0);
	}
}

static int make_upper(unsigned base)
{
	int fs = fs_open("tmpfs");
	CK(fs_set(fs, "size", "512m"));
	CK(fs_set(fs, "nr_inodes", "131072"));
	CK(fs_set(fs, "mode", "0711"));
	int up = fs_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	CK(mkdirat(up, "root", 0755));
	CK(mkdirat(up, "work", 0755));
	CK(mkdirat(up, "root/tmp", 01777));
	CK(fchownat(up, "root", base, base, 0));
	CK(fchownat(up, "root/tmp", base, base, 0));
	CK(fchmodat(up, "root/tmp", 01777, 0));
	return up;
}

static int make_dev(unsigned base)
{
	static const struct { const char *name; int major, minor; } nodes[] = {
		{ "null", 1, 3 }, { "zero", 1, 5 }, { "full", 1, 7 }, { "random", 1, 8 }, { "urandom", 1, 9 }, { "tty", 5, 0 } };
	int fs = fs_open("tmpfs");
	CK(fs_set(fs, "size", "64k"));
	CK(fs_set(fs, "nr_inodes", "64"));
	CK(fs_set(fs, "mode", "0755"));
	int dev = fs_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
	for (unsigned i = 0; i < sizeof nodes / sizeof *nodes; i++) {
		CK(mknodat(dev, nodes[i].name, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)));
		CK(fchownat(dev, nodes[i].name, base, base, 0));
	}
	CK(mkdirat(dev, "pts", 0755));
	CK(mkdirat(dev, "shm", 0755));
	CK(symlinkat("/proc/self/fd", dev, "fd"));
	CK(symlinkat("/proc/self/fd/0", dev, "stdin"));
	CK(symlinkat("/proc/self/fd/1", dev, "stdout"));
	CK(symlinkat("/proc/self/fd/2", dev, "stderr"));
	CK(symlinkat("pts/ptmx", dev, "ptmx"));
	return dev;
}

static int make_root(int up, int userns)
{
	int tree[MAX];
	char p[64];
	for (int i = 0; i < nlowers; i++) {
		struct attr a = { .set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, .propagation = MS_PRIVATE };
		if (userns >= 0)
			a.set |= MOUNT_ATTR_IDMAP, a.userns = userns;
		tree[i] = CK(clone_tree(AT_FDCWD, lowers[i], 0));
		set_attr(tree[i], a);
	}
	int fs = fs_open("overlay");
	for (int i = 0; i < nlowers; i++) {
		snprintf(p, sizeof p, "/proc/self/fd/%d", tree[i]);
		CK(fs_set(fs, "lowerdir+", p)); /* Linux 6.8 */
	}
	snprintf(p, sizeof p, "/proc/self/fd/%d/root", up);
	CK(fs_set(fs, "upperdir", p));
	snprintf(p, sizeof p, "/proc/self/fd/%d/work", up);
	CK(fs_set(fs, "workdir", p));
	fs_set(fs, "redirect_dir", "off");
	fs_set(fs, "metacopy", "off");
	fs_set(fs, "index", "off");
	syscall(SYS_fsconfig, fs, 0, "volatile", 0, 0);
	int root = fs_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	for (int i = 0; i < nlowers; i++)
		close(tree[i]);
	return root;
}

static void send_fds(int sock, int *fds, int n)
{
	char b = 'r', control[CMSG_SPACE(sizeof(int) * 3 * MAX)];
	struct iovec io = { &b, 1 };
	struct msghdr m = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = CMSG_SPACE(sizeof(int) * n) };
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(sizeof(int) * n);
	memcpy(CMSG_DATA(h), fds, sizeof(int) * n);
	CK(sendmsg(sock, &m, MSG_NOSIGNAL));
}

static void add(char **list, int *n, char *value)
{
	if (*n == MAX) {
		errno = E2BIG;
		CK(-1);
	}
	list[(*n)++] = value;
}

int main(int argc, char **argv)
{
	char slot_path[512], p[600], map[64];
	int opt, sock[2], status[2], lifeline[2], filter_len, pidfd = -1, fds[3 * MAX], n = 0, into = -1, userns = -1;

	while ((opt = getopt(argc, argv, "+NUs:f:l:b:g:")) != -1)
		switch (opt) {
		case 'N': no_net = 1; break;
		case 'U': no_user = 1; break;
		case 's': slot_dir = optarg; break;
		case 'f': filter_path = optarg; break;
		case 'l': add(lowers, &nlowers, optarg); break;
		case 'b': add(binds, &nbinds, optarg); break;
		case 'g': add(groups, &ngroups, optarg); break;
		default: return 2;
		}
	command = argv + optind;
	if (!*command || !slot_dir || !nlowers) {
		dprintf(2, "usage: floor [-N] [-U] -s SLOTDIR [-f FILTER] -l LOWER... [-b DIR]... [-g KIND=DIR]... -- COMMAND [ARG]...\n");
		return 2;
	}
	umask(0);
	int slot = take_slot(slot_path, sizeof slot_path);
	unsigned base = no_user ? 0 : ID_BASE + (unsigned)slot * ID_SIZE;
	int record = make_record(&filter_len);
	CK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sock));
	CK(pipe2(status, O_CLOEXEC));
	CK(pipe2(lifeline, O_CLOEXEC));
	for (int i = 0; i < ngroups; i++)
		if (!strncmp(groups[i], "v2=", 3)) {
			make_group(i, slot);
			into = CK(open(dirs[i], O_PATH | O_DIRECTORY | O_CLOEXEC));
		}

	struct clone_args ca = { .flags = CLONE_NEWPID | CLONE_PIDFD, .pidfd = (unsigned long)&pidfd, .exit_signal = SIGCHLD };
	if (into >= 0)
		ca.flags |= CLONE_INTO_CGROUP, ca.cgroup = into;
	pid_t pid = CK(syscall(SYS_clone3, &ca, sizeof ca));
	if (!pid) {
		close(sock[0]), close(status[0]), close(lifeline[1]);
		child(sock[1], status[1], lifeline[0], record, filter_len);
	}
	close(sock[1]), close(status[1]), close(lifeline[0]), close(record);

	/* While the child makes its user namespace. */
	int tasks[MAX], ntasks = 0;
	for (int i = 0; i < ngroups; i++)
		if (strncmp(groups[i], "v2=", 3)) {
			make_group(i, slot);
			snprintf(p, sizeof p, "%s/tasks", dirs[i]);
			tasks[ntasks++] = CK(open(p, O_WRONLY | O_CLOEXEC));
		}
	int up = make_upper(base);
	char b;
	if (CK(read(sock[0], &b, 1)) == 0)
		goto wait;
	if (!no_user) {
		int len = snprintf(map, sizeof map, "0 %u %d", base, ID_SIZE);
		(void)len;
		snprintf(p, sizeof p, "/proc/%d/uid_map", pid);
		put(p, map);
		snprintf(p, sizeof p, "/proc/%d/gid_map", pid);
		put(p, map);
		snprintf(p, sizeof p, "/proc/%d/ns/user", pid);
		userns = CK(open(p, O_RDONLY | O_CLOEXEC));
	}
	CK(send(sock[0], "g", 1, MSG_NOSIGNAL));

	/* While it makes the other namespaces. */
	fds[n++] = make_root(up, userns);
	int dev = fds[n++] = make_dev(base);
	fds[n++] = CK(openat(dev, "null", O_PATH | O_CLOEXEC));
	for (int i = 0; i < nbinds; i++) {
		int t = CK(clone_tree(AT_FDCWD, binds[i], AT_RECURSIVE));
		set_attr(t, (struct attr){ .set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, .propagation = MS_PRIVATE });
		fds[n++] = t;
	}
	memcpy(fds + n, tasks, sizeof(int) * ntasks);
	n += ntasks;
	send_fds(sock[0], fds, n);
	for (int i = 0; i < n; i++)
		close(fds[i]);
	close(sock[0]), close(up);

	struct message m = { 0 };
	int code = 125;
wait:
	m = (struct message){ 0 };
	code = 125;
	while (read(status[0], &m, sizeof m) == sizeof m && m.type != 2)
		;
	if (m.type == 2)
		code = WIFEXITED(m.status) ? WEXITSTATUS(m.status) : 128 + WTERMSIG(m.status);
	CK(waitid(P_PIDFD, pidfd, &(siginfo_t){ 0 }, WEXITED));
	for (int i = 0; i < ngroups; i++)
		for (int try = 0; rmdir(dirs[i]) < 0 && errno == EBUSY && try < 1000; try++)
			usleep(100);
	unlink(slot_path);
	return code;
}
