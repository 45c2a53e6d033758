/* A server that uses much of what the kernel keeps for a process and checks it from inside. Arguments: port,
 * directory, and "drop" to give up root. -DV2 makes the version whose state moves. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x776f726c64L

struct state {
	long magic;
#ifdef V2
	long added[64];
#endif
	/* A timer that is set again for each expiry: one is always under way, or its signal is. */
	volatile long ticks, sets, wrong;
	volatile long alarms, users, expirations;
	timer_t chain, hour, late;
	char *privileges;
	char where[256];
};

static struct state *state;
static int epfd, listener, by_path, by_name, logfile, periodic;
static int queued, event, hourfd, data, lock_posix, lock_flock, lock_ofd, in[2], stream[2], packets[2];
static char *alt;
static const size_t alt_size = 65536;
static char reply[512];

static int on_alt(void)
{
	char here, *volatile p = &here;
	return p >= alt && p < alt + alt_size;
}

static void set_chain(struct state *s)
{
	struct itimerspec t = { .it_value = { 0, 700000 } };
	s->sets++;
	if (timer_settime(s->chain, 0, &t, 0))
		s->wrong++;
}

void on_tick(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	struct state *s = info->si_value.sival_ptr;
	if (s != state || s->magic != MAGIC || info->si_code != SI_TIMER || !on_alt()) {
		state->wrong++;
		return;
	}
	s->ticks++;
	set_chain(s);
}

void on_alarm(int sig)
{
	(void)sig;
	state->alarms++;
}

void on_user(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)info, (void)context;
	state->users += on_alt() ? 1 : 1000;
}

static void handle(int sig, void (*f)(int, siginfo_t *, void *), void (*simple)(int))
{
	struct sigaction a = { .sa_flags = SA_RESTART };
	sigemptyset(&a.sa_mask);
	if (f) {
		a.sa_sigaction = f;
		a.sa_flags |= SA_SIGINFO | SA_ONSTACK;
		sigaddset(&a.sa_mask, SIGUSR2);
	} else {
		a.sa_handler = simple;
	}
	sigaction(sig, &a, 0);
}

static void watch(int fd)
{
	struct epoll_event e = { EPOLLIN, { .fd = fd } };
	if (epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &e))
		exit(20);
}

static int local(const char *path, int abstract)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	strncpy(a.sun_path + abstract, path, sizeof a.sun_path - 2);
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	socklen_t n = sizeof a.sun_family + abstract + strlen(path) + !abstract;
	if (!abstract)
		unlink(path);
	if (bind(s, (struct sockaddr *)&a, n) || listen(s, 16))
		exit(21);
	return s;
}

static void privileges(char *out, size_t room)
{
	static const char *keys[] = { "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:",
				      "NoNewPrivs:" };
	char line[256];
	FILE *f = fopen("/proc/self/status", "r");
	out[0] = 0;
	while (f && fgets(line, sizeof line, f))
		for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
			if (!strncmp(line, keys[i], strlen(keys[i])))
				strncat(out, line, room - strlen(out) - 1);
	if (f)
		fclose(f);
}

static void fill(void)
{
	if (write(in[1], "pipe data", 9) != 9 || write(stream[1], "stream data", 11) != 11)
		exit(30);
	if (write(packets[1], "one", 3) != 3 || write(packets[1], "second", 6) != 6 || write(packets[1], "3", 1) != 1)
		exit(31);
	unsigned long long five = 5;
	if (write(event, &five, 8) != 8)
		exit(32);
	sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = 11 });
	sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = 22 });
}

static int lock(const char *name, int cmd)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 5 };
	int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || (cmd ? fcntl(fd, cmd, &l) : flock(fd, LOCK_EX)))
		exit(33);
	return fd;
}

/* All of this comes after the start-up. */
static void setup(void)
{
	mkdir("sub", 0755);
	if (chdir("sub"))
		exit(34);
	if (!getcwd(state->where, sizeof state->where))
		exit(35);
	umask(027);
	struct rlimit files = { 333, 777 }, core = { 0, 4096 };
	setrlimit(RLIMIT_NOFILE, &files);
	setrlimit(RLIMIT_CORE, &core);
	if (pipe2(in, O_CLOEXEC) || socketpair(AF_UNIX, SOCK_STREAM, 0, stream) ||
	    socketpair(AF_UNIX, SOCK_DGRAM, 0, packets))
		exit(36);
	event = eventfd(0, EFD_NONBLOCK);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	queued = signalfd(-1, &set, SFD_NONBLOCK);
	hourfd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	struct itimerspec hour = { .it_value = { 3600, 0 }, .it_interval = { 60, 0 } };
	timerfd_settime(hourfd, 0, &hour, 0);
	struct sigevent none = { .sigev_notify = SIGEV_NONE };
	if (timer_create(CLOCK_REALTIME, &none, &state->hour) || timer_create(CLOCK_MONOTONIC, 0, &state->late))
		exit(37);
	timer_settime(state->hour, 0, &hour, 0);
	data = open("data", O_RDWR | O_CREAT | O_TRUNC, 0666);
	if (write(data, "0123456789", 10) != 10)
		exit(38);
	lseek(data, 5, SEEK_SET);
	lock_posix = lock("posix", F_SETLK);
	lock_flock = lock("flock", 0);
	lock_ofd = lock("ofd", F_OFD_SETLK);
	state->privileges = malloc(2048);
	privileges(state->privileges, 2048);
	fill();
}

static const char *timers(void)
{
	struct itimerspec t;
	sigset_t set, old;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigprocmask(SIG_BLOCK, &set, &old);
	long under_way = state->sets - state->ticks;
	int gone = timer_gettime(state->chain, &t);
	sigset_t waiting;
	sigpending(&waiting);
	int runs = t.it_value.tv_nsec || t.it_value.tv_sec || sigismember(&waiting, SIGRTMIN + 1);
	sigprocmask(SIG_SETMASK, &old, 0);
	if (state->wrong)
		return "a tick with a wrong value or off the signal stack";
	if (under_way != 1)
		return "a tick was lost or doubled";
	if (gone || !runs)
		return "the chain of ticks has ended";
	if (timer_gettime(state->hour, &t) || t.it_value.tv_sec < 3000 || t.it_value.tv_sec > 3600 ||
	    t.it_interval.tv_sec != 60)
		return "the timer of an hour";
	if (timer_gettime(state->late, &t) || t.it_value.tv_sec || t.it_value.tv_nsec)
		return "the timer that was never set";
	if (timerfd_gettime(hourfd, &t) || t.it_value.tv_sec < 3000 || t.it_interval.tv_sec != 60)
		return "the timerfd";
	struct itimerval i;
	if (getitimer(ITIMER_REAL, &i) || i.it_interval.tv_usec != 900)
		return "the interval timer";
	return 0;
}

static int conflicts(int fd, int pid)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 12, .l_len = 1 };
	return !fcntl(fd, F_OFD_GETLK, &l) && l.l_type == F_WRLCK && l.l_pid == pid && l.l_start == 10 && l.l_len == 5;
}

static const char *check(void)
{
	char b[4096];
	struct stat st;
	struct rlimit l;
	if (state->magic != MAGIC)
		return "the state";
	const char *t = timers();
	if (t)
		return t;
	if (!getcwd(b, sizeof b) || strcmp(b, state->where))
		return "the working directory";
	mode_t mask = umask(0);
	umask(mask);
	if (mask != 027)
		return "the umask";
	if (getrlimit(RLIMIT_NOFILE, &l) || l.rlim_cur != 333 || l.rlim_max != 777)
		return "the limit of files";
	if (getrlimit(RLIMIT_CORE, &l) || l.rlim_cur != 0 || l.rlim_max != 4096)
		return "the limit of core files";
	if (!(fcntl(logfile, F_GETFL) & O_APPEND))
		return "O_APPEND of the log";
	fstat(logfile, &st);
	if (write(logfile, "checked\n", 8) != 8 || lseek(logfile, 0, SEEK_CUR) != st.st_size + 8)
		return "the log's end";
	if (lseek(data, 0, SEEK_CUR) != 5 || read(data, b, 3) != 3 || memcmp(b, "567", 3))
		return "the offset of a file";
	lseek(data, 5, SEEK_SET);
	if (read(in[0], b, sizeof b) != 9 || memcmp(b, "pipe data", 9))
		return "the pipe";
	if (recv(stream[0], b, sizeof b, MSG_DONTWAIT) != 11 || memcmp(b, "stream data", 11))
		return "the stream pair";
	if (recv(packets[0], b, sizeof b, MSG_DONTWAIT) != 3 || memcmp(b, "one", 3) ||
	    recv(packets[0], b, sizeof b, MSG_DONTWAIT) != 6 || memcmp(b, "second", 6) ||
	    recv(packets[0], b, sizeof b, MSG_DONTWAIT) != 1 || b[0] != '3' ||
	    recv(packets[0], b, sizeof b, MSG_DONTWAIT) >= 0)
		return "the pair of datagram sockets";
	unsigned long long n;
	if (read(event, &n, 8) != 8 || n != 5)
		return "the eventfd";
	struct signalfd_siginfo si[3];
	ssize_t got = read(queued, si, sizeof si);
	if (got != 2 * sizeof *si || si[0].ssi_int != 11 || si[1].ssi_int != 22 || si[1].ssi_code != SI_QUEUE)
		return "the signalfd";
	fill();
	stack_t alt_now;
	if (sigaltstack(0, &alt_now) || alt_now.ss_sp != alt || alt_now.ss_size != alt_size)
		return "the signal stack";
	struct sigaction a;
	if (sigaction(SIGUSR1, 0, &a) || a.sa_sigaction != on_user || !(a.sa_flags & SA_ONSTACK) ||
	    !sigismember(&a.sa_mask, SIGUSR2))
		return "the handler of SIGUSR1";
	long users = state->users;
	raise(SIGUSR1);
	if (state->users != users + 1)
		return "handling SIGUSR1";
	if (sigaction(SIGPIPE, 0, &a) || a.sa_handler != SIG_IGN)
		return "ignoring SIGPIPE";
	if (!conflicts(lock_posix, getpid()))
		return "the POSIX lock";
	if (!conflicts(open("ofd", O_RDWR | O_CLOEXEC), -1))
		return "the OFD lock";
	int other = open("flock", O_RDWR | O_CLOEXEC);
	if (!flock(other, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK)
		return "the flock";
	close(other);
	privileges(b, sizeof b);
	if (strcmp(b, state->privileges)) {
		snprintf(reply, sizeof reply, "privileges: %.200s instead of %.200s", b, state->privileges);
		for (char *c = reply; *c; c++)
			if (*c == '\n')
				*c = ' ';
		return reply;
	}
	return 0;
}

static void answer(int fd, const char *line)
{
	char b[600] = "PONG\n";
	if (!strncmp(line, "SETUP", 5))
		setup();
	if (!strncmp(line, "CHECK", 5)) {
		const char *wrong = check();
		snprintf(b, sizeof b, "%s\n", wrong ? wrong : "OK");
	}
	if (!strncmp(line, "COUNT", 5))
		snprintf(b, sizeof b, "%ld %ld %ld\n", state->ticks, state->alarms, state->expirations);
	if (write(fd, b, strlen(b)) < 0)
		close(fd);
}

void event_loop(void)
{
	struct epoll_event ev[8];
	for (;;) {
		int n = epoll_wait(epfd, ev, 8, -1);
		for (int i = 0; i < n; i++) {
			int fd = ev[i].data.fd;
			if (fd == listener || fd == by_path || fd == by_name) {
				watch(accept4(fd, 0, 0, SOCK_CLOEXEC));
				continue;
			}
			char b[64] = "";
			ssize_t r = read(fd, b, sizeof b - 1);
			if (fd == periodic)
				state->expirations += *(long *)b;
			else if (r <= 0)
				close(fd);
			else
				answer(fd, b);
		}
	}
}

static void drop(void)
{
	gid_t groups[] = { 1234, 4321 };
	if (setgroups(2, groups) || setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534) ||
	    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		exit(40);
	prctl(PR_SET_DUMPABLE, 1);
}

int main(int argc, char **argv)
{
	char path[200];
	if (argc < 3 || chdir(argv[2]))
		return 1;
	logfile = open("log", O_WRONLY | O_APPEND | O_CREAT, 0666);
	state = calloc(1, sizeof *state);
	state->magic = MAGIC;
	alt = malloc(alt_size);
	stack_t s = { .ss_sp = alt, .ss_size = alt_size };
	sigaltstack(&s, 0);
	signal(SIGPIPE, SIG_IGN);
	handle(SIGRTMIN + 1, on_tick, 0);
	handle(SIGUSR1, on_user, 0);
	handle(SIGALRM, 0, on_alarm);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	sigprocmask(SIG_BLOCK, &set, 0);

	snprintf(path, sizeof path, "%s/sock", argv[2]);
	by_path = local(path, 0);
	snprintf(path, sizeof path, "mcr-world-%s", argv[1]);
	by_name = local(path, 1);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	int one = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])) };
	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 64))
		return 2;
	epfd = epoll_create1(EPOLL_CLOEXEC);
	periodic = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	struct itimerspec every = { .it_value = { 0, 5000000 }, .it_interval = { 0, 5000000 } };
	timerfd_settime(periodic, 0, &every, 0);
	watch(listener);
	watch(by_path);
	watch(by_name);
	watch(periodic);
	if (argc > 3)
		drop();

	struct sigevent e = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1 };
	e.sigev_value.sival_ptr = state;
	if (timer_create(CLOCK_MONOTONIC, &e, &state->chain))
		return 3;
	set_chain(state);
	struct itimerval i = { { 0, 900 }, { 0, 900 } };
	setitimer(ITIMER_REAL, &i, 0);
	event_loop();
}
