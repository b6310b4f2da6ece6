/*
 * Both ends of a connection, for measuring what lies between them. As small as
 * can be, and the same on both sides of every contestant.
 *
 * usage: net serve IP PORT
 *                         says "up"; sends for ever to who says 'd', gives back all else
 *        net ask          reads questions from standard input, a line each:
 *                           down IP PORT PROXY MS      ->  bytes ns
 *                           trips IP PORT PROXY N      ->  ns of one, N times
 *                           connects IP PORT PROXY N   ->  ns of one, N times
 *                         and answers with a line, or with "error ..."
 *
 * PROXY is "-", or "proxy" for HTTP CONNECT through that of HTTPS_PROXY. Both
 * end with standard input, so nothing outlives who asked. A connection counts
 * when a byte has gone there and back: proxies take it before they have one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 128 << 10 };
static char buffer[CHUNK];
static const char *failed;

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int fail(const char *what)
{
	failed = what;
	return -1;
}

static void die(const char *what)
{
	fprintf(stderr, "net: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* ---- serve ---- */

static void *pour(void *arg)
{
	static const char zeros[CHUNK];
	int c = (int)(long)arg;
	while (send(c, zeros, CHUNK, MSG_NOSIGNAL) > 0)
		;
	close(c);
	return 0;
}

static void serve(const char *ip, int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct epoll_event e = { .events = EPOLLIN }, got[64];
	int one = 1, ep = epoll_create1(EPOLL_CLOEXEC), l = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (ep < 0 || l < 0)
		die("open socket");
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (inet_pton(AF_INET, ip, &a.sin_addr) != 1 || bind(l, (void *)&a, sizeof a) < 0 || listen(l, 1024) < 0)
		die("listen");
	e.data.fd = l;
	epoll_ctl(ep, EPOLL_CTL_ADD, l, &e);
	e.data.fd = 0;
	epoll_ctl(ep, EPOLL_CTL_ADD, 0, &e);
	puts("up");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(ep, got, 64, -1);
		for (int i = 0; i < n; i++) {
			int c = got[i].data.fd;
			if (c == 0) {
				if (read(0, buffer, sizeof buffer) <= 0)
					exit(0);
				continue;
			}
			if (c == l) {
				if ((c = accept4(l, 0, 0, SOCK_CLOEXEC)) < 0)
					continue;
				setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
				e.data.fd = c;
				epoll_ctl(ep, EPOLL_CTL_ADD, c, &e);
				continue;
			}
			ssize_t r = recv(c, buffer, sizeof buffer, 0);
			pthread_t t;
			if (r > 0 && *buffer == 'd') {
				epoll_ctl(ep, EPOLL_CTL_DEL, c, 0);
				if (pthread_create(&t, 0, pour, (void *)(long)c))
					close(c);
				else
					pthread_detach(t);
			} else if (r <= 0 || send(c, buffer, r, MSG_NOSIGNAL) != r) {
				close(c);
			}
		}
	}
}

/* ---- ask ---- */

/* through asks the proxy of HTTPS_PROXY, http://IP:PORT, for what s is to lead to. */
static int through(int s, const char *ip, int port)
{
	char line[256];
	int n = snprintf(line, sizeof line, "CONNECT %s:%d HTTP/1.1\r\nHost: %s:%d\r\n\r\n", ip, port, ip, port);
	if (send(s, line, n, MSG_NOSIGNAL) != n)
		return fail("ask proxy");
	for (n = 0; n < 4 || memcmp(line + n - 4, "\r\n\r\n", 4);) {
		if (n == sizeof line || recv(s, line + n, 1, 0) != 1)
			return fail("proxy's answer");
		n++;
	}
	errno = EACCES;
	return n > 12 && !memcmp(line + 9, "200", 3) ? 0 : fail("proxy refuses");
}

static int dial(const char *ip, int port, int proxy)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct timeval limit = { .tv_sec = 5 };
	char host[64];
	int one = 1, s, to = port;
	const char *p = getenv("HTTPS_PROXY");
	if (proxy) {
		errno = EINVAL;
		if (!p || sscanf(p, "http://%63[0-9.]:%d", host, &to) != 2)
			return fail("HTTPS_PROXY");
	} else {
		snprintf(host, sizeof host, "%s", ip);
	}
	a.sin_port = htons(to);
	if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
		return errno = EINVAL, fail("address");
	if ((s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0)
		return fail("open socket");
	setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	if (connect(s, (void *)&a, sizeof a) < 0)
		fail("connect");
	else if (!proxy || through(s, ip, port) == 0)
		return s;
	int e = errno;
	close(s);
	errno = e;
	return -1;
}

static int trip(int s)
{
	char b = 't';
	if (send(s, &b, 1, MSG_NOSIGNAL) != 1 || recv(s, &b, 1, 0) != 1)
		return fail("round trip");
	return 0;
}

/* down begins to count after a tenth of the time: connections start slowly. */
static int down(int s, long ms)
{
	long long t, begin = now(), from = begin + ms * 100000, first = 0, bytes = 0;
	if (send(s, "d", 1, MSG_NOSIGNAL) != 1)
		return fail("begin");
	do {
		ssize_t r = recv(s, buffer, sizeof buffer, 0);
		if (r <= 0)
			return fail("receive");
		t = now();
		if (first)
			bytes += r;
		else if (t >= from)
			first = t;
	} while (t < begin + ms * 1000000LL + ms * 100000LL);
	if (!first || t == first)
		return errno = ETIMEDOUT, fail("receive");
	printf("%lld %lld\n", bytes, t - first);
	return 0;
}

static int answer(const char *what, const char *ip, int port, int proxy, long n)
{
	int s = -1;
	if (!strcmp(what, "connects")) {
		for (long i = 0; i < n; i++) {
			long long t = now();
			if ((s = dial(ip, port, proxy)) < 0)
				return -1;
			if (trip(s) < 0)
				break;
			printf("%lld ", now() - t);
			close(s), s = -1;
		}
	} else {
		if ((s = dial(ip, port, proxy)) < 0)
			return -1;
		if (!strcmp(what, "down")) {
			int r = down(s, n);
			int e = errno;
			close(s);
			errno = e;
			return r;
		}
		for (long i = 0; i < n; i++) {
			long long t = now();
			if (trip(s) < 0)
				break;
			printf("%lld ", now() - t);
		}
	}
	int e = errno;
	if (s >= 0)
		close(s);
	errno = e;
	if (failed)
		return -1;
	puts("");
	return 0;
}

static void ask(void)
{
	char line[512], what[16], ip[64], proxy[16];
	int port;
	long n;
	while (fgets(line, sizeof line, stdin)) {
		failed = 0;
		if (sscanf(line, "%15s %63s %d %15s %ld", what, ip, &port, proxy, &n) != 5)
			errno = EINVAL, failed = "question";
		else
			answer(what, ip, port, strcmp(proxy, "-") != 0, n);
		if (failed)
			printf("error %s: %s\n", failed, strerror(errno));
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	static char out[1 << 20];
	setvbuf(stdout, out, _IOFBF, sizeof out);
	if (argc == 4 && !strcmp(argv[1], "serve"))
		serve(argv[2], atoi(argv[3]));
	else if (argc == 2 && !strcmp(argv[1], "ask"))
		ask();
	else {
		fprintf(stderr, "usage: net serve IP PORT | net ask\n");
		return 2;
	}
	return 0;
}
