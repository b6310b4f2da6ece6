/*
 * System calls without a libc, for amd64 and arm64.
 */
typedef unsigned int u32;
typedef unsigned long u64;
typedef int s32;
typedef long s64;

/* ---- system calls ------------------------------------------------------ */
#if defined(__x86_64__)
enum {
	NR_read = 0, NR_write = 1, NR_close = 3, NR_mmap = 9, NR_rt_sigprocmask = 14,
	NR_ioctl = 16, NR_wait4 = 61, NR_kill = 62, NR_umask = 95,
	NR_getrusage = 98, NR_setpgid = 109, NR_prctl = 157, NR_exit_group = 231,
	NR_faccessat = 269, NR_ppoll = 271, NR_signalfd4 = 289, NR_pipe2 = 293,
	NR_prlimit64 = 302, NR_clone = 56, NR_execve = 59, NR_fstat = 5,
	NR_rt_sigaction = 13, NR_getpid = 39, NR_socket = 41, NR_sendmsg = 46, NR_recvmsg = 47, NR_getcwd = 79,
	NR_chdir = 80, NR_fchdir = 81, NR_fchown = 93, NR_setsid = 112, NR_setgroups = 116,
	NR_setresuid = 117, NR_setresgid = 119, NR_capget = 125, NR_fstatfs = 138, NR_getpriority = 140, NR_setpriority = 141,
	NR_sched_setscheduler = 144, NR_sched_getscheduler = 145, NR_personality = 135, NR_capset = 126, NR_pivot_root = 155,
	NR_umount2 = 166, NR_sethostname = 170, NR_keyctl = 250, NR_openat = 257,
	NR_mkdirat = 258, NR_fcntl = 72, NR_unshare = 272, NR_dup3 = 292, NR_setns = 308, NR_seccomp = 317,
};
static s64 sys(s64 n, s64 a, s64 b, s64 c, s64 d, s64 e, s64 f)
{
	s64 r;
	register s64 r10 __asm__("r10") = d;
	register s64 r8 __asm__("r8") = e;
	register s64 r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(r)
		: "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		: "rcx", "r11", "memory");
	return r;
}
__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall start\n");
#elif defined(__aarch64__)
enum {
	NR_read = 63, NR_write = 64, NR_close = 57, NR_mmap = 222, NR_rt_sigprocmask = 135,
	NR_ioctl = 29, NR_wait4 = 260, NR_kill = 129, NR_umask = 166,
	NR_getrusage = 165, NR_setpgid = 154, NR_prctl = 167, NR_exit_group = 94,
	NR_faccessat = 48, NR_ppoll = 73, NR_signalfd4 = 74, NR_pipe2 = 59,
	NR_prlimit64 = 261, NR_clone = 220, NR_execve = 221, NR_fstat = 80,
	NR_rt_sigaction = 134, NR_getpid = 172, NR_socket = 198, NR_sendmsg = 211, NR_recvmsg = 212, NR_getcwd = 17,
	NR_chdir = 49, NR_fchdir = 50, NR_fchown = 55, NR_setsid = 157, NR_setgroups = 159,
	NR_setresuid = 147, NR_setresgid = 149, NR_capget = 90, NR_fstatfs = 44, NR_getpriority = 141, NR_setpriority = 140,
	NR_sched_setscheduler = 119, NR_sched_getscheduler = 120, NR_personality = 92, NR_capset = 91, NR_pivot_root = 41,
	NR_umount2 = 39, NR_sethostname = 161, NR_keyctl = 219, NR_openat = 56,
	NR_mkdirat = 34, NR_fcntl = 25, NR_unshare = 97, NR_dup3 = 24, NR_setns = 268, NR_seccomp = 277,
};
static s64 sys(s64 n, s64 a, s64 b, s64 c, s64 d, s64 e, s64 f)
{
	register s64 x8 __asm__("x8") = n;
	register s64 x0 __asm__("x0") = a;
	register s64 x1 __asm__("x1") = b;
	register s64 x2 __asm__("x2") = c;
	register s64 x3 __asm__("x3") = d;
	register s64 x4 __asm__("x4") = e;
	register s64 x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0)
		: "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}
__asm__(".globl _start\n_start:\n\tmov x29,#0\n\tmov x0,sp\n\tbl start\n");
#else
#error "sbxrun supports amd64 and arm64"
#endif
/* The same numbers everywhere. */
enum { NR_open_tree = 428, NR_move_mount, NR_fsopen, NR_fsconfig, NR_fsmount,
	NR_close_range = 436, NR_openat2, NR_mount_setattr = 442,
	NR_landlock_create = 444, NR_landlock_restrict = 446 };
#define S0(n) sys(n, 0, 0, 0, 0, 0, 0)
#define S1(n, a) sys(n, (s64)(a), 0, 0, 0, 0, 0)
#define S2(n, a, b) sys(n, (s64)(a), (s64)(b), 0, 0, 0, 0)
#define S3(n, a, b, c) sys(n, (s64)(a), (s64)(b), (s64)(c), 0, 0, 0)
#define S4(n, a, b, c, d) sys(n, (s64)(a), (s64)(b), (s64)(c), (s64)(d), 0, 0)
#define S5(n, a, b, c, d, e) sys(n, (s64)(a), (s64)(b), (s64)(c), (s64)(d), (s64)(e), 0)
#define S6(n, a, b, c, d, e, f) sys(n, (s64)(a), (s64)(b), (s64)(c), (s64)(d), (s64)(e), (s64)(f))

/* The compiler may emit calls to these even when it is told not to. */
void *memset(void *p, int c, u64 n)
{
	volatile char *q = p;
	while (n--)
		*q++ = (char)c;
	return p;
}
