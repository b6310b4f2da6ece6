/*
 * facts prints what holds the process that runs it, one "name value" a line,
 * the same in every sandbox of one kind: nothing in it depends on the slot,
 * the id or the time. A test compares it with what it must be.
 *
 * HOST_NS in the environment is "net=INODE mnt=INODE ...", HOST_FILE a file of
 * the host that nothing shows in the sandbox.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

static const char *word(long r) { return r < 0 ? strerrorname_np(errno) : "DONE"; }
static void fact(const char *name, const char *value) { printf("%s %s\n", name, value); }

static void status_of_self(void)
{
	char line[256];
	FILE *f = fopen("/proc/self/status", "r");
	while (f && fgets(line, sizeof line, f)) {
		char *v = strchr(line, ':');
		if (!v)
			continue;
		*v++ = 0;
		v += strspn(v, " \t");
		v[strcspn(v, "\n")] = 0;
		if (!strncmp(line, "Cap", 3) || !strcmp(line, "NoNewPrivs") || !strncmp(line, "Seccomp", 7) ||
		    !strcmp(line, "Uid") || !strcmp(line, "Gid") || !strcmp(line, "Groups") || !strcmp(line, "NSpid")) {
			for (char *c = v; *c; c++)
				if (*c == '\t')
					*c = ' ';
			v[strcspn(v, "\n")] = 0;
			while (*v && v[strlen(v) - 1] == ' ')
				v[strlen(v) - 1] = 0;
			if (!strcmp(line, "NSpid"))
				v = strchr(v, ' ') ? "several" : "one";
			fact(line, *v ? v : "none");
		}
	}
}

/* map says whether the ids here are a range of the host's that holds nobody. */
static void map(const char *file)
{
	unsigned in, out, len;
	int n = 0;
	char b[64];
	FILE *f = fopen(file, "r");
	while (f && fscanf(f, "%u %u %u", &in, &out, &len) == 3) {
		n++;
		snprintf(b, sizeof b, "%u %s %u", in, out >= 0x70000000 ? "range" : "HOST", len);
		fact(file, b);
	}
	if (n != 1)
		fact(file, "not one line");
}

static void namespaces(void)
{
	char *list = strdup(getenv("HOST_NS") ? getenv("HOST_NS") : ""), *save = NULL;
	for (char *w = strtok_r(list, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
		char *ino = strchr(w, '='), path[64], name[64];
		struct stat st;
		*ino++ = 0;
		snprintf(path, sizeof path, "/proc/self/ns/%s", w);
		snprintf(name, sizeof name, "ns.%s", w);
		fact(name, stat(path, &st) < 0 ? word(-1) : st.st_ino == strtoul(ino, NULL, 10) ? "HOST" : "own");
	}
}

static void files(void)
{
	static const char *paths[] = { "/root", "/var/lib/sbxrun", "/run/sbxrun", "/etc/shadow", "/sys/fs/cgroup", "/sys/kernel",
		"/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/boot", "/.oldroot", "/put_old", "/proc/kcore", "/proc/1/environ", "/proc/1/maps", "/proc/sysrq-trigger" };
	char b[128];
	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
		int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
		char c;
		snprintf(b, sizeof b, "open %s", paths[i]);
		/* A masked file is an empty one, a masked folder too. */
		struct stat st;
		DIR *d;
		int entries = 0;
		if (fd < 0)
			fact(b, word(-1));
		else if (!fstat(fd, &st) && S_ISDIR(st.st_mode) && (d = fdopendir(fd))) {
			while (readdir(d))
				entries++;
			fact(b, entries > 2 ? "FULL" : "empty");
		} else
			fact(b, read(fd, &c, 1) > 0 ? "FULL" : "empty");
	}
	const char *host = getenv("HOST_FILE");
	fact("host file", host ? word(open(host, O_RDONLY | O_CLOEXEC)) : "not asked");
	static const char *links[] = { "/proc/1/root", "/proc/1/exe", "/proc/1/cwd" };
	for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
		snprintf(b, sizeof b, "readlink %s", links[i]);
		char to[64];
		fact(b, word(readlink(links[i], to, sizeof to)));
	}
	fact("list /proc/1/fd", word(open("/proc/1/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
	static const char *writes[] = { "/usr/x", "/etc/x", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/dev/x", "/x" };
	for (size_t i = 0; i < sizeof writes / sizeof *writes; i++) {
		snprintf(b, sizeof b, "write %s", writes[i]);
		fact(b, word(open(writes[i], O_WRONLY | O_CREAT | O_CLOEXEC, 0600)));
	}
	char cwd[256];
	fact("cwd", getcwd(cwd, sizeof cwd) ? cwd : word(-1));
}

static void descriptors(void)
{
	int n = 0;
	for (int fd = 3; fd < 1024; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	char b[16];
	snprintf(b, sizeof b, "%d", n);
	fact("descriptors above 2", b);
}

static int compare(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* mounts: where, what, and the flags that hold; sorted, for engines differ in order. */
static void mounts(void)
{
	char line[4096], *lines[256];
	int n = 0;
	FILE *f = fopen("/proc/self/mountinfo", "r");
	while (f && fgets(line, sizeof line, f) && n < 256) {
		char target[1024], opts[512], type[64], out[2048], *sep = strstr(line, " - ");
		if (!sep || sscanf(line, "%*s %*s %*s %*s %1023s %511s", target, opts) != 2 || sscanf(sep, " - %63s", type) != 1)
			continue;
		snprintf(out, sizeof out, "mount %s %s %s%s%s%s", target, type, strstr(opts, "ro") == opts ? "ro" : "rw",
			 strstr(opts, "nosuid") ? ",nosuid" : "", strstr(opts, "nodev") ? ",nodev" : "", strstr(opts, "noexec") ? ",noexec" : "");
		lines[n++] = strdup(out);
		if (strstr(line, " shared:") || strstr(line, " master:"))
			fact("PROPAGATES", target);
	}
	qsort(lines, n, sizeof *lines, compare);
	for (int i = 0; i < n; i++)
		puts(lines[i]);
}

int main(void)
{
	char b[256];
	descriptors(); /* before we open any */
	status_of_self();
	map("/proc/self/uid_map");
	map("/proc/self/gid_map");
	fact("setgroups", word(syscall(SYS_setgroups, 0, NULL)));
	namespaces();
	files();
	fact("pid", getpid() == 1 ? "1" : "not 1");
	fact("session", getsid(0) ? "own" : "HOST"); /* 0: its leader is not in this namespace */
	FILE *f = fopen("/proc/self/cgroup", "r");
	int own = 0, far = 0;
	while (f && fgets(b, sizeof b, f))
		if (strstr(b, ":/\n"))
			own++;
		else
			far++;
	fact("cgroup", far ? "SHOWN" : own ? "/" : "none");

	/* The filter, by what only it denies. */
	fact("keyctl", word(syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, -3, 1)));
	fact("socket AF_ALG", word(socket(38, SOCK_SEQPACKET, 0)));
	fact("io_uring_setup", word(syscall(SYS_io_uring_setup, 1, NULL)));
	fact("unshare user", word(unshare(CLONE_NEWUSER)));
	fact("unshare mount", word(unshare(CLONE_NEWNS)));
	fact("mount", word(mount("none", "/tmp", "tmpfs", 0, NULL)));
	fact("umount /proc", word(umount2("/proc", MNT_DETACH)));
	fact("chroot", word(chroot("/tmp")));
	fact("sethostname", word(sethostname("x", 1)));
	fact("setuid 0", word(setuid(0)));
	fact("dumpable", prctl(PR_GET_DUMPABLE) == 1 ? "yes" : "no");
	/* Pid 1 has handlers for nothing: what we send must not reach it. */
	fact("kill 1", word(kill(1, SIGKILL)));
	mounts();
	puts("done");
	return 0;
}
