// A program that misbehaves in one way, named by its first argument. Static, so
// that it runs over any base. It prints a line before it starts and, where it
// survives, one at the end.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static _Noreturn void die(const char *what) {
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(3);
}

static long number(const char *s) { return s ? strtol(s, 0, 10) : 0; }

// Touches memory until it is killed.
static _Noreturn void memory(void) {
	for (;;) {
		char *p = malloc(1 << 20);
		if (!p) die("malloc");
		memset(p, 1, 1 << 20);
	}
}

// Writes one file until the file system is full, and exits 3.
static _Noreturn void disk(const char *dir) {
	static char buf[1 << 16];
	char path[512];
	snprintf(path, sizeof path, "%s/filler", dir);
	int fd = open(path, O_WRONLY | O_CREAT, 0600);
	if (fd < 0) die("open");
	memset(buf, 'x', sizeof buf);
	for (;;)
		if (write(fd, buf, sizeof buf) < 0) die("write");
}

// Makes empty files until none can be made, and exits 3.
static _Noreturn void inodes(const char *dir) {
	char path[512];
	for (long i = 0;; i++) {
		snprintf(path, sizeof path, "%s/%ld", dir, i);
		int fd = open(path, O_WRONLY | O_CREAT, 0600);
		if (fd < 0) die("open");
		close(fd);
	}
}

// Writes to standard output for ever.
static _Noreturn void flood(void) {
	static char buf[1 << 16];
	memset(buf, 'y', sizeof buf);
	for (;;)
		if (write(1, buf, sizeof buf) < 0) die("write");
}

// Forks until it cannot, each child doing the same; never ends by itself.
static _Noreturn void forkbomb(void) {
	for (;;) {
		pid_t p = fork();
		if (p < 0) usleep(1000);
	}
}

// Forks until it cannot and exits 3 with its children asleep.
static _Noreturn void forks(void) {
	for (;;) {
		pid_t p = fork();
		if (p < 0) die("fork");
		if (p == 0) {
			pause();
			_exit(0);
		}
	}
}

// Makes n orphans that become zombies of pid 1, a few at a time.
static int zombies(long n) {
	for (long i = 0; i < n; i++) {
		pid_t p = fork();
		if (p == 0) {
			pid_t q = fork();
			if (q < 0) _exit(1);
			_exit(0);
		}
		int status;
		if (p < 0 || waitpid(p, &status, 0) < 0) die("zombie");
		if (status) {
			usleep(1000); // pids are used up until pid 1 reaps: try again
			i--;
		}
	}
	printf("made %ld\n", n);
	return 0;
}

static _Noreturn void cpu(void) {
	for (volatile unsigned long i = 0;; i++) {
	}
}

// Ignores every signal that can be ignored and sleeps.
static _Noreturn void ignore(void) {
	for (int s = 1; s < 65; s++) signal(s, SIG_IGN);
	printf("ignoring\n");
	fflush(stdout);
	for (;;) pause();
}

// Leaves a daemon behind (own session, descriptors closed) and exits 0.
static int daemonize(void) {
	if (fork() == 0) {
		setsid();
		if (fork() == 0) {
			for (int i = 0; i < 64; i++) close(i);
			sleep(1000);
		}
		_exit(0);
	}
	wait(0);
	return 0;
}

// Calls the kernel by another architecture's convention (getpid of i386).
static int foreign(void) {
#if defined(__x86_64__)
	long r;
	__asm__ volatile("int $0x80" : "=a"(r) : "a"(20) : "memory");
	printf("int 0x80 gave %ld\n", r);
	return 0;
#else
	return raise(SIGSYS); // no second convention here
#endif
}

int main(int argc, char **argv) {
	const char *what = argc > 1 ? argv[1] : "", *arg = argc > 2 ? argv[2] : 0;
	if (!strcmp(what, "memory")) memory();
	if (!strcmp(what, "disk")) disk(arg);
	if (!strcmp(what, "inodes")) inodes(arg);
	if (!strcmp(what, "flood")) flood();
	if (!strcmp(what, "forkbomb")) forkbomb();
	if (!strcmp(what, "forks")) forks();
	if (!strcmp(what, "zombies")) return zombies(number(arg));
	if (!strcmp(what, "cpu")) cpu();
	if (!strcmp(what, "ignore")) ignore();
	if (!strcmp(what, "daemon")) return daemonize();
	if (!strcmp(what, "foreign")) return foreign();
	fprintf(stderr, "victim: unknown misbehaviour\n");
	return 2;
}
