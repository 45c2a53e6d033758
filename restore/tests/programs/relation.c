/* A server that checks itself from inside. "relation PORT THREADS": a list of items with back pointers and a sum,
   and workers that each know themselves. CHECK walks all of it; ADD makes an item, MANY makes 500; USR1 counts
   signals. With -DB an item is larger. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef B
#define VERSION "new"
#else
#define VERSION "old"
#endif

struct item {
	long key;
#ifdef B
	long stamp;
#endif
	struct item *next, *prev;
	char text[16];
	long (*weigh)(const struct item *); /* of a new item: in its block, behind the end of an old one */
};

struct worker {
	pthread_mutex_t lock;
	pthread_cond_t ask, answer;
	struct worker *self;
	int id, job;
	long done, sum;
};

static struct item *first, *last;
static long count, sum, asked;
static struct worker workers[64];
static int nworkers;
static long *marks;
static volatile sig_atomic_t signals;
static int listener, epfd;

static void on_signal(int s)
{
	(void)s;
	signals++;
}

static long weight(const struct item *i)
{
	return i->key;
}

static long walk(void)
{
	long total = 0;
	for (struct item *i = first; i; i = i->next)
		total += i->weigh(i);
	return total;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	pthread_mutex_lock(&w->lock);
	for (;;) {
		while (!w->job)
			pthread_cond_wait(&w->ask, &w->lock);
		w->sum = w->self == w && &workers[w->id] == w ? walk() : -1;
		marks[w->id] = ++w->done;
		w->job = 0;
		pthread_cond_signal(&w->answer);
	}
	return 0;
}

static void add(void)
{
	struct item *i = calloc(1, sizeof *i);
	i->key = ++count;
	i->weigh = weight;
	sum += i->key;
	snprintf(i->text, sizeof i->text, "item %ld", i->key);
	i->prev = last;
	*(last ? &last->next : &first) = i;
	last = i;
}

static void check(char *out, size_t room)
{
	long n = 0;
	struct item *before = 0;
	for (struct item *i = first; i; before = i, i = i->next) {
		char text[24];
		snprintf(text, sizeof text, "item %ld", ++n);
		if (i->key != n || i->prev != before || strcmp(i->text, text)) {
			snprintf(out, room, "BAD item %ld\n", n);
			return;
		}
	}
	if (n != count || before != last || walk() != sum) {
		snprintf(out, room, "BAD list: %ld of %ld\n", n, count);
		return;
	}
	asked++;
	for (int k = 0; k < nworkers; k++) {
		struct worker *w = &workers[k];
		pthread_mutex_lock(&w->lock);
		w->job = 1;
		pthread_cond_signal(&w->ask);
		while (w->job)
			pthread_cond_wait(&w->answer, &w->lock);
		long got = w->sum, done = w->done;
		pthread_mutex_unlock(&w->lock);
		if (got != sum || done != asked || marks[k] != asked) {
			snprintf(out, room, "BAD worker %d: %ld, %ld of %ld\n", k, got, done, asked);
			return;
		}
	}
	snprintf(out, room, "OK %s items %ld workers %d signals %d\n", VERSION, count, nworkers, (int)signals);
}

static void serve(int fd)
{
	char b[64], out[128] = "OK\n";
	ssize_t r = read(fd, b, sizeof b);
	if (r <= 0) {
		close(fd);
		return;
	}
	if (b[0] == 'A')
		add();
	else if (b[0] == 'M')
		for (int i = 0; i < 500; i++)
			add();
	else
		check(out, sizeof out);
	if (write(fd, out, strlen(out)) < 0)
		close(fd);
}

static void event_loop(void)
{
	struct epoll_event ev[8] = { 0 };
	for (;;) {
		int n = epoll_wait(epfd, ev, 8, -1);
		if (n < 0 && errno != EINTR)
			abort();
		for (int i = 0; i < n; i++) {
			if (ev[i].data.fd != listener) {
				serve(ev[i].data.fd);
				continue;
			}
			int c = accept(listener, 0, 0);
			struct epoll_event e = { EPOLLIN, { .fd = c } };
			epoll_ctl(epfd, EPOLL_CTL_ADD, c, &e);
		}
	}
}

int main(int argc, char **argv)
{
	int one = 1;
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])) };
	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (argc < 3 || bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 64))
		return 1;
	struct sigaction sa = { .sa_handler = on_signal };
	sigaction(SIGUSR1, &sa, 0);
	nworkers = atoi(argv[2]);
	marks = calloc(nworkers + 1, sizeof *marks);
	for (int k = 0; k < nworkers; k++) {
		struct worker *w = &workers[k];
		pthread_t t;
		pthread_mutex_init(&w->lock, 0);
		pthread_cond_init(&w->ask, 0);
		pthread_cond_init(&w->answer, 0);
		w->self = w;
		w->id = k;
		if (pthread_create(&t, 0, work, w))
			return 2;
	}
	epfd = epoll_create1(0);
	struct epoll_event e = { EPOLLIN, { .fd = listener } };
	epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &e);
	event_loop();
}
