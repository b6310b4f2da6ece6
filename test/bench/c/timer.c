/*
 * Times launches with as little of its own as can be: posix_spawn, wait4, a
 * monotonic clock; nothing is printed until all are done.
 *
 * usage: timer rounds N GAP_MS   <contestants   N rounds, each contestant once a round
 *        timer rate MS PARALLEL  <contestants   each contestant for MS in all, PARALLEL at a time
 *
 * A contestant is a line: fields ended by the byte 0x1f. The first is a mount
 * point to hide from it in a private mount namespace, or "-"; the others are
 * its arguments, in which {} stands for a name that no other launch has.
 *
 * rounds prints "contestant wall_ns cpu_us wait_status" for each launch,
 * rate prints "contestant launches elapsed_ns failures" for each contestant.
 * SIGTERM ends it, with status 1, when the launches under way have ended: none
 * is left with half of its tidying up done.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
enum { MAX = 64, ARGS = 256 };
static struct contestant { char *hide, *argv[ARGS]; int ns; } contestants[MAX];
static int count, host_ns = -1;
static posix_spawn_file_actions_t null_files;
static volatile sig_atomic_t stop;

static void on_term(int signal)
{
	(void)signal;
	stop = 1;
}

static void die(const char *what)
{
	fprintf(stderr, "timer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void read_contestants(void)
{
	char *line = 0;
	size_t size = 0;
	while (getline(&line, &size, stdin) > 0) {
		if (count == MAX) {
			errno = E2BIG;
			die("read contestants");
		}
		struct contestant *c = &contestants[count++];
		int n = -1;
		for (char *p = strtok(strdup(line), "\x1f\n"); p && n < ARGS - 1; p = strtok(0, "\x1f\n"))
			if (n++ < 0)
				c->hide = p;
			else
				c->argv[n - 1] = p;
		c->ns = -1;
		if (!c->hide || !c->argv[0]) {
			errno = EINVAL;
			die("read contestants");
		}
		if (!strcmp(c->hide, "-"))
			continue;
		if (host_ns < 0 && (host_ns = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC)) < 0)
			die("open mount namespace");
		if (unshare(CLONE_NEWNS) < 0 || mount(0, "/", 0, MS_REC | MS_PRIVATE, 0) < 0 || umount2(c->hide, MNT_DETACH) < 0 ||
		    (c->ns = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC)) < 0 || setns(host_ns, CLONE_NEWNS) < 0)
			die(c->hide);
	}
	free(line);
}

/* start spawns c. The clock starts after the namespace was entered. */
static pid_t start(struct contestant *c, long long *t)
{
	static int serial;
	char *argv[ARGS], names[ARGS][64], *at;
	int i;
	pid_t pid;

	serial++;
	for (i = 0; c->argv[i]; i++) {
		argv[i] = c->argv[i];
		if ((at = strstr(c->argv[i], "{}"))) {
			snprintf(names[i], sizeof names[i], "%.*s%d-%d%s", (int)(at - c->argv[i]), c->argv[i], getpid(), serial, at + 2);
			argv[i] = names[i];
		}
	}
	argv[i] = 0;
	if (c->ns >= 0 && setns(c->ns, CLONE_NEWNS) < 0)
		die("enter mount namespace");
	*t = now();
	errno = posix_spawn(&pid, argv[0], &null_files, 0, argv, environ);
	if (errno)
		die(argv[0]);
	if (c->ns >= 0 && setns(host_ns, CLONE_NEWNS) < 0)
		die("leave mount namespace");
	return pid;
}

/* settle waits, at most 20 ms, until nothing but us wants to run: what the
 * launch before left to kernel threads is not the next one's time. */
static void settle(void)
{
	char b[64];
	for (int i = 0; i < 40; i++) {
		int f = open("/proc/loadavg", O_RDONLY | O_CLOEXEC), running = 0;
		ssize_t n = read(f, b, sizeof b - 1);
		close(f);
		b[n > 0 ? n : 0] = 0;
		if (sscanf(b, "%*s %*s %*s %d/", &running) != 1 || running <= 1)
			return;
		usleep(500);
	}
}

static long long micros(struct timeval t) { return t.tv_sec * 1000000LL + t.tv_usec; }

static void rounds(int n, int gap_ms)
{
	struct result { long long wall, cpu; int status; } *r = calloc((size_t)n * count, sizeof *r);
	if (!r)
		die("allocate");
	for (int i = 0; i < n; i++)
		for (int j = 0; j < count; j++) {
			struct result *x = &r[i * count + j];
			struct rusage u;
			long long t;
			if (gap_ms)
				usleep(gap_ms * 1000);
			settle();
			pid_t pid = start(&contestants[j], &t);
			if (wait4(pid, &x->status, 0, &u) < 0)
				die("wait");
			if (stop)
				exit(1);
			x->wall = now() - t;
			x->cpu = micros(u.ru_utime) + micros(u.ru_stime);
		}
	for (int i = 0; i < n * count; i++)
		printf("%d %lld %lld %d\n", i % count, r[i].wall, r[i].cpu, r[i].status);
}

/* rate gives each contestant its time in slices, in turn, so that a noisy
 * moment of the machine is not one contestant's. */
static void rate(int ms, int parallel)
{
	enum { SLICES = 4 };
	struct { long long elapsed; int done, failures; } sum[MAX] = { { 0 } };
	for (int s = 0; s < SLICES; s++)
		for (int j = 0; j < count; j++) {
			long long t, begin = now(), deadline = begin + ms * 1000000LL / SLICES;
			int alive = 0, status;
			while (alive || (!stop && now() < deadline)) {
				while (alive < parallel && !stop && now() < deadline)
					start(&contestants[j], &t), alive++;
				if (wait4(-1, &status, 0, 0) < 0)
					break;
				alive--, sum[j].done++, sum[j].failures += status != 0;
			}
			if (stop)
				exit(1);
			sum[j].elapsed += now() - begin;
		}
	for (int j = 0; j < count; j++)
		printf("%d %d %lld %d\n", j, sum[j].done, sum[j].elapsed, sum[j].failures);
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: timer rounds N GAP_MS | timer rate MS PARALLEL\n");
		return 2;
	}
	posix_spawn_file_actions_init(&null_files);
	posix_spawn_file_actions_addopen(&null_files, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&null_files, 1, "/dev/null", O_WRONLY, 0);
	posix_spawn_file_actions_addopen(&null_files, 2, "/dev/null", O_WRONLY, 0);
	signal(SIGTERM, on_term); /* restarts wait4; spawned programs have the default again */
	read_contestants();
	if (!strcmp(argv[1], "rounds"))
		rounds(atoi(argv[2]), atoi(argv[3]));
	else
		rate(atoi(argv[2]), atoi(argv[3]));
	return 0;
}
