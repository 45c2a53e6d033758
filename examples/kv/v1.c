/*
 * kv: a small key-value server with the habits of real ones. Version 1.
 *
 *   kv PORT LOGFILE [POLLERS]
 *
 * One line a request, one line a reply. Nothing in here knows about live update.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define VERSION "1.0"
#define BUCKETS 1024

/* ---- data ---- */

struct session;
struct command;
struct poller;
typedef void (*reply_fn)(struct session *, const char *text);

enum mode { MODE_PLAIN, MODE_UPPER, MODE_QUIET };

struct entry {                  /* 32 bytes in a chunk of 40 */
	struct entry *next;
	char *key;
	char *value;
	uint32_t hash;
	uint32_t hits;
};

struct session {                /* 104 bytes fill their chunk */
	struct session *next, *prev;
	int fd;
	int id;
	enum mode mode;
	int nreq;
	char *name;
	const struct command *last;
	reply_fn reply;
	char *in;
	int in_len;
	int in_cap;
	uint64_t token;
	double load;
	struct poller *poller;  /* who serves it: NULL is main() */
	struct session *peer;   /* the next one of that poller */
};

struct command {
	const char *name;
	int args;
	void (*run)(struct session *, char **argv);
};

struct op {                     /* lives on the heap, points at code and at literals */
	const char *name;
	reply_fn fn;
	enum mode mode;
};

struct config {
	int port;
	int max_keys;
	const char *greeting;
	struct op *ops;
	int nops;
	char *logpath;
};

struct job {
	struct job *next;
	long input;
	long output;
	int done;
};

struct source {                 /* what an epoll watch points at, when it is not a session */
	int fd;
	void (*ready)(struct source *);
	unsigned long events;
};

struct loop {
	int epfd;
	int cap;
	struct epoll_event *events;
	unsigned long turns;
};

struct thread_ctx {
	const char *role;
	pthread_t self;
	unsigned long jobs;
};

struct logger {                 /* thread-specific; 24 bytes fill their chunk */
	struct poller *owner;
	unsigned long requests, closed;
};

struct poller {                 /* one of several equal threads, in an array */
	struct thread_ctx ctx;
	struct session *sessions;
	int nsessions, epfd;
	struct logger *logger;
	unsigned long gone, closed; /* requests of its closed sessions, and how many */
	int astray;             /* it once had what belongs to another thread */
};

static struct entry *table[BUCKETS];
static unsigned long nkeys;
static struct session *sessions;
static int nsessions;
static int next_id = 1;
static int total_requests;
static struct config *config;
static FILE *logfile;
static struct source listener, ticker;
static unsigned long ticks;
static unsigned long turns;     /* the same number as in main()'s loop */
static int lost_turns;
static int epoll_fd;
static char hidden[16] __attribute__((aligned(8))); /* two pointers that no type admits to */
static __thread unsigned long thread_ops;
static __thread struct thread_ctx *thread_ctx;
static struct thread_ctx *contexts[4];

static struct poller *pollers;
static int npollers;            /* 0: main() serves the sessions */
static pthread_barrier_t pollers_up;
static pthread_key_t logger_key;
static __thread struct poller *own_poller;
static pthread_mutex_t data_lock = PTHREAD_MUTEX_INITIALIZER; /* everything but the jobs */

static pthread_mutex_t job_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t job_ready = PTHREAD_COND_INITIALIZER;
static struct job *job_head, *job_tail, *jobs_done;
static unsigned long njobs_done;
static pthread_t worker;

/* ---- small things ---- */

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void *xalloc(size_t n)
{
	void *p = calloc(1, n);
	if (!p)
		die("calloc");
	return p;
}

static void logline(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	vfprintf(logfile, fmt, ap);
	va_end(ap);
	fputc('\n', logfile);
}

static uint32_t hash_of(const char *s)
{
	uint32_t h = 2166136261u;
	while (*s)
		h = (h ^ (unsigned char)*s++) * 16777619u;
	return h;
}

static void send_all(int fd, const char *buf, size_t n)
{
	while (n) {
		ssize_t w = send(fd, buf, n, MSG_NOSIGNAL);
		if (w <= 0) {
			if (w < 0 && (errno == EINTR || errno == EAGAIN))
				continue;
			return;
		}
		buf += w;
		n -= (size_t)w;
	}
}

/* ---- replies: chosen through a function pointer in the session ---- */

static void reply_plain(struct session *s, const char *text)
{
	char out[1200];
	int n = snprintf(out, sizeof out, "%s\n", text);
	send_all(s->fd, out, (size_t)n);
}

static void reply_upper(struct session *s, const char *text)
{
	char out[1200];
	int n = snprintf(out, sizeof out, "%s\n", text);
	for (int i = 0; i < n; i++)
		if (out[i] >= 'a' && out[i] <= 'z')
			out[i] -= 32;
	send_all(s->fd, out, (size_t)n);
}

static void reply_quiet(struct session *s, const char *text)
{
	(void)text;
	send_all(s->fd, ".\n", 2);
}

static void replyf(struct session *s, const char *fmt, ...)
{
	char text[1100];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	s->reply(s, text);
}

/* ---- the table ---- */

static struct entry **slot_of(const char *key)
{
	uint32_t h = hash_of(key);
	struct entry **p = &table[h % BUCKETS];
	while (*p && strcmp((*p)->key, key))
		p = &(*p)->next;
	return p;
}

static void cmd_set(struct session *s, char **argv)
{
	struct entry **p = slot_of(argv[1]);
	if (!*p) {
		if (nkeys >= (unsigned long)config->max_keys) {
			replyf(s, "ERR full");
			return;
		}
		struct entry *e = xalloc(sizeof *e);
		e->key = strdup(argv[1]);
		e->hash = hash_of(e->key);
		*p = e;
		nkeys++;
	} else {
		free((*p)->value);
	}
	(*p)->value = strdup(argv[2]);
	replyf(s, "OK");
}

static void cmd_get(struct session *s, char **argv)
{
	struct entry *e = *slot_of(argv[1]);
	if (!e) {
		replyf(s, "NONE");
		return;
	}
	e->hits++;
	replyf(s, "%s", e->value);
}

static void cmd_del(struct session *s, char **argv)
{
	struct entry **p = slot_of(argv[1]), *e = *p;
	if (!e) {
		replyf(s, "NONE");
		return;
	}
	*p = e->next;
	free(e->key);
	free(e->value);
	free(e);
	nkeys--;
	replyf(s, "OK");
}

static void cmd_hits(struct session *s, char **argv)
{
	struct entry *e = *slot_of(argv[1]);
	replyf(s, "%u", e ? e->hits : 0);
}

static void cmd_count(struct session *s, char **argv)
{
	(void)argv;
	replyf(s, "%lu", nkeys);
}

static void cmd_name(struct session *s, char **argv)
{
	free(s->name);
	s->name = strdup(argv[1]);
	replyf(s, "OK");
}

static void cmd_mode(struct session *s, char **argv)
{
	for (int i = 0; i < config->nops; i++)
		if (!strcasecmp(config->ops[i].name, argv[1])) {
			s->reply = config->ops[i].fn;
			s->mode = config->ops[i].mode;
			replyf(s, "OK");
			return;
		}
	replyf(s, "ERR mode");
}

static const char *mode_name(enum mode m)
{
	switch (m) {
	case MODE_PLAIN: return "plain";
	case MODE_UPPER: return "upper";
	case MODE_QUIET: return "quiet";
	}
	return "?";
}

static void cmd_whoami(struct session *s, char **argv)
{
	(void)argv;
	replyf(s, "id=%d name=%s mode=%s last=%s nreq=%d token=%llx", s->id, s->name ? s->name : "-", mode_name(s->mode),
	       s->last ? s->last->name : "-", s->nreq, (unsigned long long)s->token);
}

static void cmd_work(struct session *s, char **argv)
{
	struct job *j = xalloc(sizeof *j);
	j->input = atol(argv[1]);
	pthread_mutex_lock(&job_lock);
	if (job_tail)
		job_tail->next = j;
	else
		job_head = j;
	job_tail = j;
	pthread_cond_signal(&job_ready);
	pthread_mutex_unlock(&job_lock);
	replyf(s, "OK");
}

static void cmd_jobs(struct session *s, char **argv)
{
	long sum = 0;
	(void)argv;
	pthread_mutex_lock(&job_lock);
	for (struct job *j = jobs_done; j; j = j->next)
		sum += j->output;
	unsigned long n = njobs_done;
	pthread_mutex_unlock(&job_lock);
	replyf(s, "done=%lu sum=%ld", n, sum);
}

static void cmd_info(struct session *s, char **argv)
{
	(void)argv;
	replyf(s, "version=%s greeting=%s requests=%d sessions=%d keys=%lu ops=%lu", VERSION, config->greeting,
	       total_requests, nsessions, nkeys, thread_ops);
}

static void cmd_ticks(struct session *s, char **argv)
{
	(void)argv;
	replyf(s, "%lu", ticks);
}

static void cmd_flush(struct session *s, char **argv)
{
	(void)argv;
	for (int i = 0; i < BUCKETS; i++)
		while (table[i]) {
			struct entry *e = table[i];
			table[i] = e->next;
			free(e->key);
			free(e->value);
			free(e);
			nkeys--;
		}
	replyf(s, "OK");
}

/* Frees neighbours in a scrambled order, with realloc and calloc between, over and over. */
static void cmd_churn(struct session *s, char **argv)
{
	unsigned seed = (unsigned)atoi(argv[1]), freed = 0;
	for (int round = 0; round < 4; round++)
		for (int i = 0; i < BUCKETS; i++) {
			seed = seed * 1103515245u + 12345u;
			struct entry **p = &table[(seed >> 8) % BUCKETS];
			while (*p) {
				struct entry *e = *p;
				seed = seed * 1103515245u + 12345u;
				if ((seed >> 16) & 1) {
					*p = e->next;
					free(e->key);
					free(e->value);
					free(e);
					nkeys--;
					freed++;
				} else {
					size_t n = strlen(e->value);
					e->value = realloc(e->value, n + 1 + ((seed >> 17) & 511));
					free(calloc(1, 16 + ((seed >> 20) & 1023)));
					p = &e->next;
				}
			}
		}
	replyf(s, "freed=%u left=%lu", freed, nkeys);
}

static void cmd_poller(struct session *s, char **argv)
{
	(void)argv;
	int i = own_poller ? (int)(own_poller - pollers) : -1;
	replyf(s, "poller=%d sessions=%d", i, own_poller ? own_poller->nsessions : nsessions);
}

static void cmd_version(struct session *s, char **argv)
{
	(void)argv;
	replyf(s, "%s", VERSION);
}

static void cmd_selfcheck(struct session *s, char **argv);

static const struct command commands[] = {
	{ "SET", 2, cmd_set },     { "GET", 1, cmd_get },         { "DEL", 1, cmd_del },
	{ "HITS", 1, cmd_hits },   { "COUNT", 0, cmd_count },     { "NAME", 1, cmd_name },
	{ "MODE", 1, cmd_mode },   { "WHOAMI", 0, cmd_whoami },   { "WORK", 1, cmd_work },
	{ "JOBS", 0, cmd_jobs },   { "INFO", 0, cmd_info },       { "TICKS", 0, cmd_ticks },
	{ "FLUSH", 0, cmd_flush }, { "CHURN", 1, cmd_churn },     { "VERSION", 0, cmd_version },
	{ "SELFCHECK", 0, cmd_selfcheck },                       { "POLLER", 0, cmd_poller },
};
#define NCOMMANDS (sizeof commands / sizeof *commands)

static reply_fn reply_of(enum mode mode)
{
	for (int i = 0; i < config->nops; i++)
		if (config->ops[i].mode == mode)
			return config->ops[i].fn;
	return NULL;
}

static int text_ok(const char *p)
{
	size_t n = strnlen(p, 1024);
	for (size_t i = 0; i < n; i++)
		if (p[i] < 32 || p[i] > 126)
			return 0;
	return 1;
}

static struct logger *own_logger(void)
{
	return pthread_getspecific(logger_key);
}

/* Does this thread have what is its own, and nobody else's? */
static int at_home(const struct poller *p)
{
	return own_poller == p && thread_ctx == &p->ctx && pthread_equal(p->ctx.self, pthread_self()) &&
	       own_logger() == p->logger && p->logger->owner == p && p->logger->requests == thread_ops;
}

/* Walks every structure and every relation between them. */
static const char *selfcheck(struct session *me)
{
	static char why[200];
	unsigned long n = 0;
#define CHECK(cond)                                                                    \
	do {                                                                           \
		if (!(cond)) {                                                         \
			snprintf(why, sizeof why, "BAD line %d: %s", __LINE__, #cond); \
			return why;                                                    \
		}                                                                      \
	} while (0)
	for (int i = 0; i < BUCKETS; i++)
		for (struct entry *e = table[i]; e; e = e->next, n++) {
			CHECK(e->hash == hash_of(e->key));
			CHECK(e->hash % BUCKETS == (uint32_t)i);
			CHECK(e->value && text_ok(e->value));
		}
	CHECK(n == nkeys);
	int seen = 0, found = 0;
	struct session *prev = NULL;
	for (struct session *t = sessions; t; prev = t, t = t->next, seen++) {
		CHECK(t->prev == prev);
		CHECK(t->token == (uint64_t)t->id * 0x9e3779b97f4a7c15ull);
		CHECK(t->load == (double)t->id / 4);
		CHECK(t->reply == reply_of(t->mode));
		CHECK(!t->last || (t->last >= commands && t->last < commands + NCOMMANDS));
		CHECK(!t->name || text_ok(t->name));
		CHECK(t->in_len >= 0 && t->in_len <= t->in_cap);
		CHECK(fcntl(t->fd, F_GETFD) >= 0);
		found |= t == me;
	}
	CHECK(seen == nsessions);
	CHECK(found);
	for (const struct poller *p = pollers; p < pollers + npollers; p++) {
		unsigned long mine = 0, requests = p->gone;
		for (struct session *t = p->sessions; t; t = t->peer, mine++) {
			CHECK(t->poller == p);
			requests += (unsigned long)t->nreq;
		}
		CHECK(mine == (unsigned long)p->nsessions);
		CHECK(p->logger->owner == p && p->logger->requests == requests);
		CHECK(p->logger->closed == p->closed && !p->astray && !strcmp(p->ctx.role, "poller"));
		seen -= (int)mine;
	}
	CHECK(!npollers || !seen);
	CHECK(me->poller == own_poller && (!own_poller || at_home(own_poller)));
	CHECK(config->nops == 3);
	static const reply_fn replies[] = { [MODE_PLAIN] = reply_plain, [MODE_UPPER] = reply_upper,
					    [MODE_QUIET] = reply_quiet };
	for (int i = 0; i < config->nops; i++) {
		const struct op *op = &config->ops[i];
		CHECK(op->fn == replies[op->mode]);
		CHECK(!strcmp(op->name, mode_name(op->mode)));
	}
	CHECK(!strncmp(config->greeting, "hello", 5));
	void *p[2];
	memcpy(p, hidden, sizeof p);
	CHECK(p[0] == (void *)config);
	CHECK(p[1] == (void *)cmd_get);
	CHECK((own_poller || thread_ctx == contexts[0]) && !strcmp(contexts[0]->role, "main"));
	CHECK(pthread_equal(thread_ctx->self, pthread_self()));
	CHECK(pthread_equal(contexts[1]->self, worker) && !strcmp(contexts[1]->role, "worker"));
	CHECK(listener.events >= (unsigned long)nsessions);
	CHECK(fileno(logfile) > 2);
	CHECK(!lost_turns);
	pthread_mutex_lock(&job_lock);
	unsigned long done = 0;
	for (struct job *j = jobs_done; j; j = j->next, done++)
		CHECK(j->done && j->output == j->input * j->input);
	CHECK(done == njobs_done && contexts[1]->jobs == njobs_done);
	pthread_mutex_unlock(&job_lock);
	return "OK";
}

static void cmd_selfcheck(struct session *s, char **argv)
{
	(void)argv;
	replyf(s, "%s", selfcheck(s));
}

/* ---- sessions ---- */

static void hand_over(struct session *s)
{
	struct poller *p = &pollers[s->id % npollers];
	s->poller = p;
	s->peer = p->sessions;
	p->sessions = s;
	p->nsessions++;
}

static void take_back(struct session *s)
{
	struct poller *p = s->poller;
	struct session **at = &p->sessions;
	while (*at != s)
		at = &(*at)->peer;
	*at = s->peer;
	p->nsessions--;
	p->gone += (unsigned long)s->nreq;
	p->closed++;
	own_logger()->closed++;
}

static void session_open(int fd)
{
	struct session *s = malloc(sizeof *s);
	if (!s)
		die("malloc");
	memset(s, 0, sizeof *s);
	s->fd = fd;
	s->id = next_id++;
	s->token = (uint64_t)s->id * 0x9e3779b97f4a7c15ull;
	s->load = (double)s->id / 4;
	s->mode = MODE_PLAIN;
	s->reply = config->ops[0].fn;
	s->in_cap = 512;
	s->in = xalloc((size_t)s->in_cap);
	s->next = sessions;
	if (sessions)
		sessions->prev = s;
	sessions = s;
	nsessions++;
	if (npollers)
		hand_over(s);
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = s };
	if (epoll_ctl(s->poller ? s->poller->epfd : epoll_fd, EPOLL_CTL_ADD, fd, &ev))
		die("epoll_ctl");
	logline("session %d opened", s->id);
}

static void session_close(struct session *s)
{
	logline("session %d closed after %d requests", s->id, s->nreq);
	close(s->fd);
	if (s->next)
		s->next->prev = s->prev;
	if (s->prev)
		s->prev->next = s->next;
	else
		sessions = s->next;
	nsessions--;
	if (s->poller)
		take_back(s);
	free(s->name);
	free(s->in);
	free(s);
}

static void run_line(struct session *s, char *line)
{
	char *argv[4] = { 0 }, *save = NULL;
	int argc = 0;
	for (char *t = strtok_r(line, " \r", &save); t && argc < 3; t = strtok_r(NULL, " \r", &save))
		argv[argc++] = t;
	if (!argc)
		return;
	s->nreq++;
	total_requests++;
	thread_ops++;
	if (own_poller)
		own_logger()->requests++;
	for (size_t i = 0; i < NCOMMANDS; i++)
		if (!strcasecmp(commands[i].name, argv[0])) {
			if (argc - 1 < commands[i].args) {
				replyf(s, "ERR arguments");
				return;
			}
			commands[i].run(s, argv);
			s->last = &commands[i];
			return;
		}
	replyf(s, "ERR command");
}

static void session_ready(struct session *s)
{
	ssize_t n = recv(s->fd, s->in + s->in_len, (size_t)(s->in_cap - s->in_len), 0);
	if (n <= 0) {
		session_close(s);
		return;
	}
	s->in_len += (int)n;
	char *nl;
	while ((nl = memchr(s->in, '\n', (size_t)s->in_len))) {
		*nl = 0;
		run_line(s, s->in);
		int used = (int)(nl + 1 - s->in);
		memmove(s->in, nl + 1, (size_t)(s->in_len - used));
		s->in_len -= used;
	}
	if (s->in_len == s->in_cap)
		session_close(s);
}

/* ---- sources ---- */

static void listener_ready(struct source *src)
{
	int fd = accept4(src->fd, NULL, NULL, SOCK_CLOEXEC);
	if (fd >= 0)
		session_open(fd);
}

static void ticker_ready(struct source *src)
{
	uint64_t n;
	if (read(src->fd, &n, sizeof n) == sizeof n)
		ticks += n;
}

static void *worker_main(void *arg)
{
	thread_ctx = arg;
	pthread_mutex_lock(&job_lock);
	for (;;) {
		while (!job_head)
			pthread_cond_wait(&job_ready, &job_lock);
		struct job *j = job_head;
		job_head = j->next;
		if (!job_head)
			job_tail = NULL;
		j->output = j->input * j->input;
		j->done = 1;
		j->next = jobs_done;
		jobs_done = j;
		njobs_done++;
		thread_ctx->jobs++;
		thread_ops++;
	}
	return NULL;
}

/* One of several equals: it serves the sessions that main() hands to it. */
static void *poller_main(void *arg)
{
	struct poller *p = arg;
	struct logger *l = xalloc(sizeof *l);
	struct epoll_event events[16];
	l->owner = p;
	own_poller = p;
	thread_ctx = &p->ctx;
	pthread_setspecific(logger_key, l);
	p->logger = l;
	pthread_barrier_wait(&pollers_up);
	for (;;) {
		int n = epoll_wait(p->epfd, events, 16, -1);
		if (n < 0 && errno != EINTR)
			die("epoll_wait");
		pthread_mutex_lock(&data_lock);
		for (int i = 0; i < n; i++) {
			p->astray |= !at_home(p);
			session_ready(events[i].data.ptr);
		}
		pthread_mutex_unlock(&data_lock);
	}
	return NULL;
}

/* ---- start-up ---- */

static struct thread_ctx *context(int i, const char *role)
{
	struct thread_ctx *c = xalloc(sizeof *c);
	c->role = role;
	contexts[i] = c;
	return c;
}

static void add_op(const char *name, reply_fn fn, enum mode mode)
{
	config->ops = realloc(config->ops, sizeof *config->ops * (size_t)(config->nops + 1));
	config->ops[config->nops].name = name;
	config->ops[config->nops].fn = fn;
	config->ops[config->nops].mode = mode;
	config->nops++;
}

static void watch(struct source *src, int fd, void (*ready)(struct source *))
{
	src->fd = fd;
	src->ready = ready;
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = src };
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev))
		die("epoll_ctl");
}

static void setup(int port, const char *logpath)
{
	config = xalloc(sizeof *config);
	config->port = port;
	config->max_keys = 2000000;
	config->greeting = "hello";
	config->logpath = strdup(logpath);
	add_op("plain", reply_plain, MODE_PLAIN);
	add_op("upper", reply_upper, MODE_UPPER);
	add_op("quiet", reply_quiet, MODE_QUIET);
	void *p[2] = { config, (void *)cmd_get };
	memcpy(hidden, p, sizeof p);

	logfile = fopen(logpath, "ae");
	if (!logfile)
		die(logpath);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);

	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 1024))
		die("listen");
	watch(&listener, fd, listener_ready);

	int tfd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	struct itimerspec its = { .it_value.tv_nsec = 50000000, .it_interval.tv_nsec = 50000000 };
	timerfd_settime(tfd, 0, &its, NULL);
	watch(&ticker, tfd, ticker_ready);

	thread_ctx = context(0, "main");
	thread_ctx->self = pthread_self();
	struct thread_ctx *c = context(1, "worker");
	if (pthread_create(&worker, NULL, worker_main, c))
		die("pthread_create");
	c->self = worker;
}

static void start_pollers(int n)
{
	pthread_key_create(&logger_key, free);
	pollers = xalloc(sizeof *pollers * (size_t)n);
	npollers = n;
	pthread_barrier_init(&pollers_up, NULL, (unsigned)n + 1);
	for (int i = 0; i < n; i++) {
		pollers[i].ctx.role = "poller";
		pollers[i].epfd = epoll_create1(EPOLL_CLOEXEC);
		if (pthread_create(&pollers[i].ctx.self, NULL, poller_main, &pollers[i]))
			die("pthread_create");
	}
	pthread_barrier_wait(&pollers_up);
}

__attribute__((noinline)) static void serve(struct loop *loop)
{
	for (;;) {
		int n = epoll_wait(loop->epfd, loop->events, loop->cap, -1);
		if (n < 0 && errno != EINTR)
			die("epoll_wait");
		loop->turns++;
		turns++;
		lost_turns |= loop->turns != turns;
		pthread_mutex_lock(&data_lock);
		for (int i = 0; i < n; i++) {
			void *p = loop->events[i].data.ptr;
			if (p == &listener || p == &ticker) {
				struct source *src = p;
				src->events++;
				src->ready(src);
			} else {
				session_ready(p);
			}
		}
		pthread_mutex_unlock(&data_lock);
	}
}

int main(int argc, char **argv)
{
	if (argc != 3 && argc != 4) {
		fprintf(stderr, "usage: %s PORT LOGFILE [POLLERS]\n", argv[0]);
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	setup(atoi(argv[1]), argv[2]);
	if (argc == 4)
		start_pollers(atoi(argv[3]));
	struct loop *loop = xalloc(sizeof *loop); /* the only pointer to it is this local */
	loop->epfd = epoll_fd;
	loop->cap = 64;
	loop->events = calloc((size_t)loop->cap, sizeof *loop->events);
	logline("kv %s on port %d", VERSION, config->port);
	printf("ready\n");
	fflush(stdout);
	serve(loop);
	return (int)loop->turns;
}
