// Tries to get out of, or to weaken, the sandbox it runs in: one attack a line,
// each in a child of its own, printed as "name result" where result is "ok" (the
// attack worked), an errno's name, or the signal that killed the child. Static, so
// that it runs over any base. Facts (descriptors, capabilities, mappings) are
// printed as "fact.name value". CVEs name the class that an attack stands for.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_alg.h>
#include <linux/netlink.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

// An attack returns 0 when it worked, else an errno.
typedef int (*attack)(void);

static int err(long r) { return r < 0 ? errno : 0; }

static int file(const char *path, int flags) {
	int fd = open(path, flags | O_CLOEXEC);
	return err(fd);
}

static int put(const char *path, const char *text) {
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0) return errno;
	return err(write(fd, text, strlen(text)));
}

// --- host files
static int read_shadow(void) { return file("/etc/shadow", O_RDONLY); }
// An empty folder of that name is no leak.
static int listed(const char *path, const char *but) {
	DIR *d = opendir(path);
	if (!d) return errno;
	struct dirent *e;
	while ((e = readdir(d)))
		if (e->d_name[0] != '.' || (e->d_name[1] && strcmp(e->d_name, "..")))
			if (strcmp(e->d_name, but)) return 0;
	return ENOENT;
}
static int read_root_home(void) { return listed("/root", ""); }
static int read_home(void) { return listed("/home", "sandbox"); }
static int read_var_lib(void) { return file("/var/lib/sbxrun", O_RDONLY | O_DIRECTORY); }
static int read_run_state(void) { return file("/run/sbxrun", O_RDONLY | O_DIRECTORY); }
static int write_usr(void) { return err(open("/usr/bin/sbx-probe", O_WRONLY | O_CREAT | O_CLOEXEC, 0755)); }
static int write_etc_passwd(void) { return file("/etc/passwd", O_WRONLY); }
static int write_env(void) { return err(open("/opt/env/probe", O_WRONLY | O_CREAT | O_CLOEXEC, 0644)); }

// --- proc and sys
static int w_core_pattern(void) { return put("/proc/sys/kernel/core_pattern", "|/x"); }
static int w_hostname_sysctl(void) { return put("/proc/sys/kernel/hostname", "x"); }
static int w_ip_forward(void) { return put("/proc/sys/net/ipv4/ip_forward", "1"); }
static int w_sysrq(void) { return put("/proc/sysrq-trigger", "h"); }
static int has_bytes(const char *path) { // a mask may open, but reads as empty
	char b[16];
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0) return errno;
	ssize_t n = read(fd, b, sizeof b);
	return n > 0 ? 0 : n < 0 ? errno : ENOENT;
}
static int r_kcore(void) { return has_bytes("/proc/kcore"); }
static int r_kallsyms(void) { char b[64] = ""; int fd = open("/proc/kallsyms", O_RDONLY); if (fd < 0) return errno; ssize_t n = read(fd, b, 16); return n == 16 && strncmp(b, "0000000000000000", 16) ? 0 : EPERM; }
static int r_kmsg(void) { return has_bytes("/proc/kmsg"); }
static int r_dev_mem(void) { return file("/dev/mem", O_RDONLY); }
static int r_dev_kmsg(void) { return file("/dev/kmsg", O_RDONLY); }
static int r_sysfs(void) { return file("/sys/kernel", O_RDONLY | O_DIRECTORY); }
static int r_cgroupfs(void) { return file("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY); }
static int pid1_fd(void) { // CVE-2016-9962
	int last = ENOENT;
	for (int i = 0; i < 16; i++) {
		char path[32];
		snprintf(path, sizeof path, "/proc/1/fd/%d", i);
		int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (fd >= 0) return 0;
		if (errno != ENOENT) last = errno;
	}
	return last;
}
static int pid1_root(void) { return file("/proc/1/root", O_RDONLY | O_DIRECTORY); }
static int pid1_exe(void) { return file("/proc/1/exe", O_RDONLY); }                   // CVE-2019-5736
static int pid1_mem(void) { return file("/proc/1/mem", O_RDWR); }
static int pid1_environ(void) { return file("/proc/1/environ", O_RDONLY); }
static int self_exe_write(void) { return file("/proc/self/exe", O_WRONLY); }
static int uid_map_write(void) { return put("/proc/self/uid_map", "0 0 1"); }
static int oom_score(void) { return put("/proc/self/oom_score_adj", "-1000"); }

// --- namespaces and mounts
static int un(int flag) { return err(syscall(SYS_unshare, flag)); }
static int un_user(void) { return un(CLONE_NEWUSER); }
static int un_mount(void) { return un(CLONE_NEWNS); }
static int un_net(void) { return un(CLONE_NEWNET); }
static int un_pid(void) { return un(CLONE_NEWPID); }
static int un_cgroup(void) { return un(CLONE_NEWCGROUP); }
static int un_time(void) { return un(0x80); }
static int clone_user(void) { long p = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0); if (p == 0) _exit(0); return err(p); }
static int clone3_user(void) {
	struct { uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls; } a = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
	long p = syscall(SYS_clone3, &a, sizeof a);
	if (p == 0) _exit(0);
	return err(p);
}
static int setns_pid1(void) { int fd = open("/proc/1/ns/mnt", O_RDONLY); if (fd < 0) return errno; return err(syscall(SYS_setns, fd, 0)); }
static int do_mount(void) { return err(mount("none", "/tmp", "tmpfs", 0, "")); }
static int mount_cgroup(void) { return err(mount("none", "/tmp", "cgroup", 0, "memory")); }  // CVE-2022-0492
static int mount_proc(void) { return err(mount("proc", "/tmp", "proc", 0, "")); }
static int remount_root(void) { return err(mount(0, "/", 0, MS_REMOUNT | MS_BIND, 0)); }
static int umount_proc(void) { return err(umount2("/proc", MNT_DETACH)); }
static int do_fsopen(void) { return err(syscall(SYS_fsopen, "tmpfs", 0)); }                   // CVE-2022-0185
static int do_open_tree(void) { return err(syscall(SYS_open_tree, AT_FDCWD, "/", 1)); }
static int do_move_mount(void) { return err(syscall(SYS_move_mount, -1, "/proc", -1, "/tmp", 0)); }
static int do_mount_setattr(void) { char a[32] = {0}; return err(syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, a, sizeof a)); }
static int do_pivot(void) { return err(syscall(SYS_pivot_root, "/", "/tmp")); }
static int do_chroot(void) { return err(chroot("/tmp")); }
static int handle_at(void) { char h[128] = {0}; *(unsigned *)h = 8; return err(syscall(SYS_open_by_handle_at, AT_FDCWD, h, 0)); }
static int name_handle(void) { char h[128] = {0}; int m; *(unsigned *)h = 64; return err(syscall(SYS_name_to_handle_at, AT_FDCWD, "/", h, &m, 0)); }

// --- identity and files with power
static int do_setuid0(void) { return err(syscall(SYS_setuid, 0)); }
static int do_setgroups(void) { gid_t g = 0; return err(syscall(SYS_setgroups, 1, &g)); }
static int chmod_setuid(void) { int fd = open("/tmp/suid", O_CREAT | O_WRONLY | O_CLOEXEC, 0755); if (fd < 0) return errno; close(fd); return err(chmod("/tmp/suid", 04755)); }
static int fchmod_setgid(void) { int fd = open("/tmp/sgid", O_CREAT | O_WRONLY | O_CLOEXEC, 0755); if (fd < 0) return errno; return err(fchmod(fd, 02755)); }
static int open_setuid(void) { return err(open("/tmp/suid2", O_CREAT | O_WRONLY | O_CLOEXEC, 04755)); }
// mkdir(2) itself drops the bit; a file system that kept it would be a hole.
static int mkdir_setgid(void) {
	struct stat st;
	if (mkdir("/tmp/sgiddir", 02755) || stat("/tmp/sgiddir", &st)) return errno;
	return st.st_mode & S_ISGID ? 0 : EPERM;
}
static int openat2_setuid(void) { uint64_t how[3] = {O_CREAT | O_WRONLY, 04755, 0}; return err(syscall(SYS_openat2, AT_FDCWD, "/tmp/suid3", how, sizeof how)); }
static int mknod_mem(void) { return err(mknod("/tmp/mem", S_IFCHR | 0600, makedev(1, 1))); }
static int mknod_block(void) { return err(mknod("/tmp/blk", S_IFBLK | 0600, makedev(254, 0))); }
static int mount_setcap(void) { return err(syscall(SYS_setxattr, "/tmp/suid", "security.capability", "\1\0\0\2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20, 0)); }
static int drop_nnp(void) { return err(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0)); }
static int ambient(void) { return err(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 21, 0, 0)); }

// --- other processes
static int ptrace_pid1(void) { return err(ptrace(PTRACE_ATTACH, 1, 0, 0)); }
static int ptrace_me(void) { return err(ptrace(PTRACE_TRACEME, 0, 0, 0)); }
static int vm_read_pid1(void) { char b[8]; struct iovec l = {b, 8}, r = {(void *)0x400000, 8}; return err(syscall(SYS_process_vm_readv, 1, &l, 1, &r, 1, 0)); }
static int kcmp_pid1(void) { return err(syscall(SYS_kcmp, 1, getpid(), 0, 0, 0)); }
static int kill_pid1(void) { kill(1, SIGKILL); usleep(50000); return kill(1, 0) && errno == ESRCH ? 0 : EPERM; }
static int kill_host_pid(void) { const char *p = getenv("PROBE_HOST_PID"); return p ? err(kill(atoi(p), 0)) : ESRCH; }
static int pidfd_getfd1(void) { int p = syscall(SYS_pidfd_open, 1, 0); if (p < 0) return errno; return err(syscall(SYS_pidfd_getfd, p, 0, 0)); }

// Pid 1 has the command's uid: what starves it or ends it is refused.
static int sched_pid1(void) { int p = 0; return err(syscall(SYS_sched_setscheduler, 1, 5 /* SCHED_IDLE */, &p)); }
static int affinity_pid1(void) { unsigned long m = 1; return err(syscall(SYS_sched_setaffinity, 1, sizeof m, &m)); }
static int prlimit_pid1(void) { unsigned long l[2] = {1, 1}; return err(syscall(SYS_prlimit64, 1, 0 /* RLIMIT_CPU */, l, 0)); }
static int nice_pid1(void) { return err(syscall(SYS_setpriority, 0, 1, 19)); }
static int nice_user(void) { return err(syscall(SYS_setpriority, 2, 0, 19)); }
static int ioprio_pid1(void) { return err(syscall(SYS_ioprio_set, 1, 1, 3 << 13)); }

// --- kernel interfaces with a history
static int do_bpf(void) { char a[128] = {0}; return err(syscall(SYS_bpf, 0, a, sizeof a)); }
static int uring(void) { char p[120] = {0}; return err(syscall(SYS_io_uring_setup, 4, p)); }
static int do_userfaultfd(void) { return err(syscall(SYS_userfaultfd, 0)); }
static int perf(void) { char a[128] = {0}; return err(syscall(SYS_perf_event_open, a, 0, -1, -1, 0)); }
static int do_keyctl(void) { return err(syscall(SYS_keyctl, 0, -3, 1)); }
static int do_add_key(void) { return err(syscall(SYS_add_key, "user", "x", "y", 1, -3)); }
static int do_request_key(void) { return err(syscall(SYS_request_key, "user", "x", 0, -3)); }
static int do_vmsplice(void) { int p[2]; if (pipe(p)) return errno; char b[1] = "x"; struct iovec v = {b, 1}; return err(syscall(SYS_vmsplice, p[1], &v, 1, 0)); }
static int do_memfd_secret(void) { return err(syscall(447, 0)); }
static int do_modify_ldt(void) { char b[16]; return err(syscall(SYS_modify_ldt, 0, b, sizeof b)); }
static int do_kexec(void) { return err(syscall(SYS_kexec_load, 0, 0, 0, 0)); }
static int do_init_module(void) { return err(syscall(SYS_init_module, "", 0, "")); }
static int do_reboot(void) { return err(syscall(SYS_reboot, 0, 0, 0, 0)); }
static int do_swapon(void) { return err(syscall(SYS_swapon, "/tmp/suid", 0)); }
static int do_settime(void) { struct timespec t = {1, 0}; return err(syscall(SYS_clock_settime, 0, &t)); }
static int do_sethostname(void) { return err(syscall(SYS_sethostname, "x", 1)); }
static int do_syslog(void) { char b[16]; return err(syscall(SYS_syslog, 3, b, sizeof b)); }
static int do_acct(void) { return err(syscall(SYS_acct, "/tmp/suid")); }
static int do_iopl(void) { return err(syscall(SYS_iopl, 3)); }
static int do_fanotify(void) { return err(syscall(SYS_fanotify_init, 0, 0)); }
// i386 system calls bypass a filter that looks at x86-64 numbers only. getpid is 20 there.
static int int80(void) { long r = 20; __asm__ volatile("int $0x80" : "+a"(r)::"memory", "r8", "r9", "r10", "r11"); return r < 0 ? -r : 0; }
static int x32(void) { return err(syscall(0x40000000 | SYS_getpid)); }

// --- sockets
static int sock(int f, int t, int p) { return err(socket(f, t | SOCK_CLOEXEC, p)); }
static int s_raw(void) { return sock(AF_INET, SOCK_RAW, IPPROTO_ICMP); }
static int s_packet(void) { return sock(AF_PACKET, SOCK_RAW, 0x300); }
static int s_alg(void) { return sock(AF_ALG, SOCK_SEQPACKET, 0); }         // CVE-2026-31431
static int s_vsock(void) { return sock(AF_VSOCK, SOCK_STREAM, 0); }
static int s_key(void) { return sock(AF_KEY, SOCK_RAW, 2); }
static int s_rxrpc(void) { return sock(AF_RXRPC, SOCK_DGRAM, AF_INET); }
static int s_can(void) { return sock(AF_CAN, SOCK_RAW, 1); }
static int s_tipc(void) { return sock(AF_TIPC, SOCK_SEQPACKET, 0); }
static int s_bluetooth(void) { return sock(AF_BLUETOOTH, SOCK_RAW, 1); }
static int s_xdp(void) { return sock(44, SOCK_RAW, 0); }
static int s_xfrm(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_XFRM); }
static int s_netfilter(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER); }
static int s_audit(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_AUDIT); }
static int s_high_bits(void) { return err(syscall(SYS_socket, 0x100000000ul | AF_ALG, SOCK_SEQPACKET, 0)); }
static int s_abstract(void) {
	const char *name = getenv("PROBE_ABSTRACT");
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (s < 0) return errno;
	strncpy(a.sun_path + 1, name ? name : "sbx", sizeof a.sun_path - 2);
	return err(connect(s, (void *)&a, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(a.sun_path + 1)));
}
static int s_host_tcp(void) {
	const char *port = getenv("PROBE_TCP_PORT");
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port ? atoi(port) : 22), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (s < 0) return errno;
	return err(connect(s, (void *)&a, sizeof a));
}
static int s_internet(void) { // a documentation address: never answers, so a route would time out, not be refused
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(53), .sin_addr.s_addr = htonl(0xC0000201)};
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (s < 0) return errno;
	return err(connect(s, (void *)&a, sizeof a));
}

// --- terminal
static int tty_fd(void) {
	int fd = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC), n, zero = 0;
	if (fd < 0 || ioctl(fd, TIOCSPTLCK, &zero) || ioctl(fd, TIOCGPTN, &n)) return -1;
	char path[32];
	snprintf(path, sizeof path, "/dev/pts/%d", n);
	setsid();
	return open(path, O_RDWR);
}
static int tiocsti(void) { int fd = tty_fd(); if (fd < 0) return errno; return err(ioctl(fd, TIOCSTI, "x")); }  // CVE-2017-5226
static int tiocsti_high(void) { int fd = tty_fd(); if (fd < 0) return errno; return err(syscall(SYS_ioctl, fd, 0x100000000ul | TIOCSTI, "x")); }  // CVE-2019-10063
static int tioclinux(void) { int fd = tty_fd(); char c = 3; if (fd < 0) return errno; return err(ioctl(fd, TIOCLINUX, &c)); }

// --- leaving the root
static int cwd_inside(void) { char b[4096]; if (!getcwd(b, sizeof b)) return errno; return b[0] == '/' ? ENOENT : 0; }  // CVE-2024-21626
static int dotdot(void) { struct stat a, b; int fd = open("/", O_PATH | O_DIRECTORY); for (int i = 0; i < 40; i++) { int n = openat(fd, "..", O_PATH | O_DIRECTORY); close(fd); fd = n; } if (fstat(fd, &a) || stat("/", &b)) return errno; return a.st_ino == b.st_ino && a.st_dev == b.st_dev ? EPERM : 0; }

static const struct { const char *name; attack f; } attacks[] = {
#define A(x) {#x, x}
	A(read_shadow), A(read_root_home), A(read_home), A(read_var_lib), A(read_run_state), A(write_usr), A(write_etc_passwd), A(write_env),
	A(w_core_pattern), A(w_hostname_sysctl), A(w_ip_forward), A(w_sysrq), A(r_kcore), A(r_kallsyms), A(r_kmsg), A(r_dev_mem), A(r_dev_kmsg), A(r_sysfs), A(r_cgroupfs),
	A(pid1_fd), A(pid1_root), A(pid1_exe), A(pid1_mem), A(pid1_environ), A(self_exe_write), A(uid_map_write), A(oom_score),
	A(un_user), A(un_mount), A(un_net), A(un_pid), A(un_cgroup), A(un_time), A(clone_user), A(clone3_user), A(setns_pid1),
	A(do_mount), A(mount_cgroup), A(mount_proc), A(remount_root), A(umount_proc), A(do_fsopen), A(do_open_tree), A(do_move_mount), A(do_mount_setattr), A(do_pivot), A(do_chroot), A(handle_at), A(name_handle),
	A(do_setuid0), A(do_setgroups), A(chmod_setuid), A(fchmod_setgid), A(open_setuid), A(mkdir_setgid), A(openat2_setuid), A(mknod_mem), A(mknod_block), A(mount_setcap), A(drop_nnp), A(ambient),
	A(ptrace_pid1), A(ptrace_me), A(vm_read_pid1), A(kcmp_pid1), A(kill_pid1), A(kill_host_pid), A(pidfd_getfd1),
	A(sched_pid1), A(affinity_pid1), A(prlimit_pid1), A(nice_pid1), A(nice_user), A(ioprio_pid1),
	A(do_bpf), A(uring), A(do_userfaultfd), A(perf), A(do_keyctl), A(do_add_key), A(do_request_key), A(do_vmsplice), A(do_memfd_secret), A(do_modify_ldt), A(do_kexec), A(do_init_module), A(do_reboot), A(do_swapon), A(do_settime), A(do_sethostname), A(do_syslog), A(do_acct), A(do_iopl), A(do_fanotify), A(int80), A(x32),
	A(s_raw), A(s_packet), A(s_alg), A(s_vsock), A(s_key), A(s_rxrpc), A(s_can), A(s_tipc), A(s_bluetooth), A(s_xdp), A(s_xfrm), A(s_netfilter), A(s_audit), A(s_high_bits), A(s_abstract), A(s_host_tcp), A(s_internet),
	A(tiocsti), A(tiocsti_high), A(tioclinux), A(cwd_inside), A(dotdot),
};

static void facts(void) {
	char line[512];
	FILE *f = fopen("/proc/self/status", "re");
	while (f && fgets(line, sizeof line, f)) {
		static const char *keys[] = {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Uid", "Gid", "Groups"};
		for (unsigned i = 0; i < sizeof keys / sizeof *keys; i++) {
			size_t n = strlen(keys[i]);
			if (!strncmp(line, keys[i], n) && line[n] == ':') {
				char *v = line + n + 1;
				v += strspn(v, " \t");
				v[strcspn(v, "\n")] = 0;
				for (char *c = v; *c; c++) if (*c == '\t') *c = ' ';
				printf("fact.%s %s\n", keys[i], v);
			}
		}
	}
	if (f) fclose(f);
	printf("fact.fds");
	DIR *d = opendir("/proc/self/fd");
	struct dirent *e;
	while (d && (e = readdir(d)))
		if (e->d_name[0] != '.' && atoi(e->d_name) != dirfd(d)) printf(" %s", e->d_name);
	if (d) closedir(d);
	printf("\n");
	static const char *maps[] = {"uid_map", "gid_map"};
	for (int i = 0; i < 2; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/self/%s", maps[i]);
		f = fopen(path, "re");
		unsigned a, b, c;
		while (f && fscanf(f, "%u %u %u", &a, &b, &c) == 3) printf("fact.%s %u %u %u\n", maps[i], a, b, c);
		if (f) fclose(f);
	}
	printf("fact.pid %d\n", getpid());
	printf("fact.sid_is_own %d\n", getsid(0) != 0);
	struct rlimit_ { uint64_t cur, max; } r;
	if (!syscall(SYS_prlimit64, 0, 7, 0, &r)) printf("fact.nofile %lu\n", (unsigned long)r.cur);
	if (!syscall(SYS_prlimit64, 0, 4, 0, &r)) printf("fact.core %lu\n", (unsigned long)r.max);
	if (!syscall(SYS_prlimit64, 0, 8, 0, &r)) printf("fact.memlock %lu\n", (unsigned long)r.cur);
	struct dirent **dev;
	int n = scandir("/dev", &dev, 0, alphasort);
	printf("fact.dev");
	for (int i = 0; i < n; i++) if (dev[i]->d_name[0] != '.') printf(" %s", dev[i]->d_name);
	printf("\n");
	f = fopen("/proc/self/mountinfo", "re");
	while (f && fgets(line, sizeof line, f)) {
		char target[256], opts[256];
		if (sscanf(line, "%*s %*s %*s %*s %255s %255s", target, opts) == 2) printf("mount %s %s\n", target, opts);
	}
	if (f) fclose(f);
}

static void tidy(void) {
	static const char *files[] = {"suid", "suid2", "suid3", "sgid", "sgiddir", "mem", "blk"};
	for (unsigned i = 0; i < sizeof files / sizeof *files; i++) {
		char path[64];
		snprintf(path, sizeof path, "/tmp/%s", files[i]);
		remove(path);
	}
}

int main(void) {
	tidy();
	facts();
	for (unsigned i = 0; i < sizeof attacks / sizeof *attacks; i++) {
		fflush(stdout);
		pid_t p = fork();
		if (p == 0) {
			alarm(5);
			_exit(attacks[i].f() & 0xff);
		}
		int status = 0;
		if (p < 0 || waitpid(p, &status, 0) < 0)
			printf("%s could-not-run\n", attacks[i].name);
		else if (WIFSIGNALED(status))
			printf("%s SIG%s\n", attacks[i].name, sigabbrev_np(WTERMSIG(status)));
		else if (WEXITSTATUS(status) == 0)
			printf("%s ok\n", attacks[i].name);
		else
			printf("%s %s\n", attacks[i].name, strerrorname_np(WEXITSTATUS(status)));
	}
	tidy();
	puts("done");
	return 0;
}
