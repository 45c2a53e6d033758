/* A server in few lines. PING is answered with PONG. Macros make versions that misbehave at start-up. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef PORT_OFFSET
#define PORT_OFFSET 0
#endif

static int listener, epfd;
/* EXTRA: what makes one more descriptor. */
#ifdef EXTRA
int extra;
#endif

#ifdef FOREIGN
static int watch;
#endif
#ifdef PIPES
int pipes[5][2];

/* What goes in at one end comes out at the other one. */
static int joined(void)
{
	for (int i = 0; i < 5; i++) {
		char in = 'a' + i, out = 0;
		if (write(pipes[i][1], &in, 1) != 1 || read(pipes[i][0], &out, 1) != 1 || in != out)
			return 0;
	}
	return 1;
}
#endif

void break_down(void)
{
	*(volatile int *)8 = 1;
}

void start_up(int argc, char **argv)
{
	(void)argc;
	(void)argv;
#ifdef CRASH
	if (write(2, "about to crash\n", 15) < 0)
		_exit(9);
	break_down();
#endif
#ifdef EXIT
	fprintf(stderr, "cannot start\n");
	exit(EXIT);
#endif
#ifdef PAUSE
	pause();
#endif
#ifdef SPIN
	for (;;)
		__asm__ volatile("");
#endif
#ifdef FORK
	if (fork() == 0)
		_exit(0);
#endif
#ifdef SYSTEM
	if (system("true"))
		exit(1);
#endif
#ifdef LOCK
	int lock = open(argv[2], O_RDWR | O_CREAT, 0600);
	struct flock fl = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1 };
	if (lock < 0 || fcntl(lock, F_SETLK, &fl))
		exit(4); /* already running */
#endif
#ifdef PIPES
	for (int i = 0; i < 5; i++)
		if (i % 2 ? socketpair(AF_UNIX, SOCK_STREAM, 0, pipes[i]) : pipe2(pipes[i], O_NONBLOCK))
			exit(5);
#endif
#ifdef FOREIGN
	struct sockaddr_nl nl = { .nl_family = AF_NETLINK, .nl_groups = 1 };
	int routes = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	if (routes < 0 || bind(routes, (struct sockaddr *)&nl, sizeof nl))
		exit(6);
	if (socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) < 0)
		exit(7);
	watch = inotify_init1(IN_NONBLOCK);
	if (watch < 0 || inotify_add_watch(watch, argv[2], IN_CREATE) < 0)
		exit(8);
#endif
#ifdef EXTRA
	/* Takes a number that belongs to the listener. */
	extra = EXTRA;
	if (extra < 0)
		exit(9);
#endif
#ifdef OVER
	/* Insists on numbers one of which belongs to a client. */
	dup2(0, 5);
	dup2(0, 6);
#endif
#ifdef FILES
	int s = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (s < 0)
		exit(1);
	FILE *old = fopen(argv[3], "r");
	int pid;
	if (old && fscanf(old, "%d", &pid) == 1 && kill(pid, 0) == 0)
		exit(2); /* already running */
	if (old)
		fclose(old);
	FILE *f = fopen(argv[3], "w");
	if (!f)
		exit(3);
	fprintf(f, "%d\n", getpid());
	fclose(f);
#endif
}

void event_loop(void)
{
	struct epoll_event ev[8];
	for (;;) {
		int n = epoll_wait(epfd, ev, 8, -1);
		for (int i = 0; i < n; i++) {
			int fd = ev[i].data.fd;
			if (fd == listener) {
				int c = accept(listener, 0, 0);
				struct epoll_event e = { EPOLLIN, { .fd = c } };
				epoll_ctl(epfd, EPOLL_CTL_ADD, c, &e);
				continue;
			}
			char b[64];
			ssize_t r = read(fd, b, sizeof b);
#ifdef FRAGILE
			if (r > 0 && write(2, "cannot stand requests\n", 22) > 0)
				break_down();
#endif
			if (r <= 0)
				close(fd);
#ifdef FOREIGN
			else if (read(watch, b, sizeof b) > 0 && write(fd, "PONG news\n", 10) == 10)
				continue;
#endif
#ifdef PIPES
			else if (!joined())
				close(fd);
#endif
			else if (write(fd, "PONG\n", 5) < 0)
				close(fd);
		}
	}
}

int main(int argc, char **argv)
{
	start_up(argc, argv);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	int one = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[1]) + PORT_OFFSET) };
	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 64))
		return 1;
	epfd = epoll_create1(0);
	struct epoll_event e = { EPOLLIN, { .fd = listener } };
	epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &e);
	event_loop();
}
