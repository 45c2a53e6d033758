/* Workers whose start-up order is a race: each pushes its logger on one list whenever it gets there, and
   keeps it as thread-specific data. `race PORT`; asked CHECK, every worker looks whether it still has its
   own logger. */
#include <arpa/inet.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { WORKERS = 4 };
struct logger { struct logger *next; long owner; long lines; char pad[200]; };

static struct logger *loggers;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_key_t key;
static int wake[WORKERS];
static int verdict[WORKERS];
static long lines[WORKERS];
static sem_t done;

static void *worker(void *arg)
{
	long me = (long)(intptr_t)arg;
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	usleep((unsigned)((now.tv_nsec / 1000 * (me + 3)) % 7 * 3000)); /* the race */
	struct logger *l = calloc(1, sizeof *l);
	l->owner = me;
	pthread_mutex_lock(&lock);
	l->next = loggers;
	loggers = l;
	pthread_mutex_unlock(&lock);
	pthread_setspecific(key, l);
#ifdef NOTES
	/* Known to this stack alone. */
	struct notes { struct notes *self; long owner, count; char pad[300]; } *volatile notes = calloc(1, sizeof *notes);
	notes->self = notes;
	notes->owner = me;
#endif
	for (;;) {
		uint64_t n;
		if (read(wake[me], &n, sizeof n) != sizeof n)
			continue;
		struct logger *mine = pthread_getspecific(key);
		mine->lines++;
		lines[me]++;
		verdict[me] = mine->owner == me && mine->lines == lines[me];
#ifdef NOTES
		verdict[me] = verdict[me] && notes->self == notes && notes->owner == me && ++notes->count == lines[me];
#endif
		sem_post(&done);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_key_create(&key, NULL);
	sem_init(&done, 0, 0);
	pthread_t t[WORKERS];
	for (long i = 0; i < WORKERS; i++)
		wake[i] = eventfd(0, 0);
	for (long i = 0; i < WORKERS; i++)
		pthread_create(&t[i], NULL, worker, (void *)(intptr_t)i);
	int s = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[argc - 1])) };
	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(s, (struct sockaddr *)&a, sizeof a) || listen(s, 16))
		return 1;
	for (;;) {
		int c = accept(s, NULL, NULL);
		char line[64];
		if (c < 0)
			continue;
		while (read(c, line, sizeof line) > 0) {
			char reply[64] = "";
			for (long i = 0; i < WORKERS; i++) {
				uint64_t one = 1;
				if (write(wake[i], &one, sizeof one) != sizeof one)
					return 2;
			}
			for (long i = 0; i < WORKERS; i++)
				sem_wait(&done);
			for (long i = 0; i < WORKERS; i++)
				snprintf(reply + strlen(reply), 16, "%ld:%s ", lines[i], verdict[i] ? "ok" : "WRONG");
			strcat(reply, "\n");
			if (write(c, reply, strlen(reply)) < 0)
				break;
		}
		close(c);
	}
}
