// Threads that rest in different calls, deep stacks, callee-saved registers in use, a signal handler, PLT calls.
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

__thread long per_thread = 41;
__thread char big_zero[100];
long counter = 7;
long zeroed[64];
static const char *const names[] = {"alpha", "beta", "gamma"};
const char *chosen = "literal";
long *pointer_to_global = &counter;
void *to_libc = (void *)&getenv;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;
static sem_t ready;

static __attribute__((noinline)) long deep(int n, long a, long b)
{
	if (n == 0) {
		per_thread++;
		sem_post(&ready);
		struct pollfd none;
		poll(&none, 0, -1);
		return a;
	}
	long r = deep(n - 1, b, a + n);
	counter += r + a;
	return r + b;
}

static __attribute__((noinline)) void serve(int ep)
{
	struct epoll_event ev[4];
	for (;;) {
		sem_post(&ready);
		int n = epoll_wait(ep, ev, 4, -1);
		counter += n;
	}
}

static void *poller(void *arg) { return (void *)deep(20, (long)arg, 3); }

static void *waiter(void *arg)
{
	pthread_mutex_lock(&lock);
	sem_post(&ready);
	for (;;)
		pthread_cond_wait(&never, &lock);
	return arg;
}

static void on_signal(int sig)
{
	(void)sig;
	sem_post(&ready);
	for (;;)
		pause();
}

static int compare(const void *a, const void *b)
{
	per_thread++;
	sem_post(&ready);
	for (;;)
		clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){1000, 0}, 0);
	return *(int *)a - *(int *)b;
}

static void *sorter(void *arg)
{
	int v[] = {3, 1, 2};
	qsort(v, 3, sizeof *v, compare);
	return arg;
}

static void *signalled(void *arg)
{
	raise(SIGUSR1);
	return arg;
}

int main(int argc, char **argv)
{
	pthread_t t;
	int extra = argc > 1 ? atoi(argv[1]) : 0;
	sem_init(&ready, 0, 0);
	signal(SIGUSR1, on_signal);
	pthread_create(&t, 0, poller, (void *)5);
	pthread_create(&t, 0, waiter, 0);
	pthread_create(&t, 0, sorter, 0);
	pthread_create(&t, 0, signalled, 0);
	for (int i = 0; i < extra; i++)
		pthread_create(&t, 0, poller, (void *)9);
	for (int i = 0; i < 4 + extra; i++)
		sem_wait(&ready);
	printf("ready %p %p %p %s\n", (void *)&per_thread, (void *)&counter, (void *)main, names[argc % 3]);
	fflush(stdout);
	serve(epoll_create1(0));
}
