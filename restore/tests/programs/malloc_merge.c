/* Two generations of one heap. "old SEED": makes a heap with three threads and waits.
   "new SEED START-END ...": reserves the given ranges (old's heaps will be put there from outside), makes a
   heap of its own, waits for a line on stdin, and then works on both until everything is free. Contents are
   checked at every step; glibc checks its own lists. */
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 3, SLOTS = 600, ROUNDS = 6 };
struct slot { unsigned char *p; size_t n; unsigned fill; };

struct slot tab[THREADS][SLOTS];   /* old's objects; written from outside in the new process */
struct slot mine[THREADS][SLOTS];  /* new's own */
struct { uint64_t fs_base, tid; } info[THREADS];
volatile int ready, go;
static pthread_barrier_t barrier;
static struct { char *start; size_t len; } held[64];
static int nheld;
static int old_side;
static unsigned seed0;

static unsigned next(unsigned *s) { return *s = *s * 1103515245u + 12345u, *s >> 8; }

static size_t pick_size(unsigned *s) {
	unsigned k = next(s) % 100;
	if (k < 55) return 1 + next(s) % 200;
	if (k < 85) return 1 + next(s) % 2000;
	if (k < 97) return 1 + next(s) % 20000;
	if (k < 99) return 1 + next(s) % 120000;
	return 140000 + next(s) % 200000;
}

static void check(struct slot *s, size_t n, const char *what) {
	for (size_t i = 0; i < n; i++)
		if (s->p[i] != (unsigned char)(s->fill + i)) {
			fprintf(stderr, "%s: byte %zu of %zu at %p is wrong\n", what, i, n, (void *)s->p);
			abort();
		}
}
static void fill(struct slot *s) {
	for (size_t i = 0; i < s->n; i++) s->p[i] = (unsigned char)(s->fill + i);
}
static void drop(struct slot *s) {
	check(s, s->n, "free");
	if (malloc_usable_size(s->p) < s->n) { fprintf(stderr, "usable size shrank\n"); abort(); }
	free(s->p);
	s->p = NULL;
}

static void churn(struct slot *t, int ops, unsigned *s) {
	while (ops--) {
		struct slot *e = &t[next(s) % SLOTS];
		if (!e->p) {
			e->n = pick_size(s);
			e->fill = next(s);
			switch (next(s) % 4) {
			case 0: {
				e->p = calloc(1, e->n);
				for (size_t i = 0; i < e->n; i++) if (e->p[i]) { fprintf(stderr, "calloc: not zero\n"); abort(); }
				break;
			}
			case 1: e->p = aligned_alloc(64, (e->n + 63) & ~(size_t)63); break;
			default: e->p = malloc(e->n);
			}
			fill(e);
		} else if (next(s) % 3) {
			drop(e);
		} else {
			size_t n = pick_size(s), keep = n < e->n ? n : e->n;
			check(e, e->n, "before realloc");
			e->p = realloc(e->p, n);
			check(e, keep, "realloc");
			e->n = n;
			fill(e);
		}
	}
}

static void drop_all(struct slot *t, unsigned order, unsigned *s) {
	for (int i = 0; i < SLOTS; i++) {
		int k = order == 0 ? i : order == 1 ? SLOTS - 1 - i : (int)(next(s) % SLOTS);
		if (t[k].p) drop(&t[k]);
	}
	for (int i = 0; i < SLOTS; i++) if (t[i].p) drop(&t[i]);
}

static void *work(void *arg) {
	int me = (int)(intptr_t)arg;
	unsigned s = seed0 * 31 + me * 7 + old_side;
	__asm__("mov %%fs:0, %0" : "=r"(info[me].fs_base));
	info[me].tid = syscall(SYS_gettid);
	churn(old_side ? tab[me] : mine[me], 4000, &s);
	__atomic_add_fetch(&ready, 1, __ATOMIC_SEQ_CST);
	while (!__atomic_load_n(&go, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &go, 128, 0, NULL, NULL, 0);
	if (old_side) return NULL;
	pthread_barrier_wait(&barrier);
	for (int r = 0; r < ROUNDS; r++) {
		int other = (me + r) % THREADS;   /* frees what another thread allocated */
		churn(tab[other], 2500, &s);
		churn(mine[other], 2500, &s);
		pthread_barrier_wait(&barrier);
		if (me == 1) malloc_trim(0);
		pthread_barrier_wait(&barrier);
	}
	drop_all(tab[me], (seed0 + me) % 3, &s);
	pthread_barrier_wait(&barrier);
	drop_all(mine[me], (seed0 + me + 1) % 3, &s);
	return NULL;
}

/* The main thread's share of the second part. */
static void rest(void) {
	unsigned s = seed0 * 17;
	pthread_barrier_wait(&barrier);
	for (int r = 0; r < ROUNDS; r++) {
		int other = r % THREADS;
		churn(tab[other], 2500, &s);
		churn(mine[other], 2500, &s);
		pthread_barrier_wait(&barrier);
		if (r % 2) {
			pid_t pid = fork();
			if (pid == 0) {
				churn(tab[0], 500, &s);
				_exit(0);
			}
			int st = -1;
			waitpid(pid, &st, 0);
			if (st) { fprintf(stderr, "the forked child ended with %#x\n", st); abort(); }
		}
		pthread_barrier_wait(&barrier);
	}
	drop_all(tab[0], seed0 % 3, &s);
	pthread_barrier_wait(&barrier);
	drop_all(mine[0], (seed0 + 1) % 3, &s);
}

int main(int argc, char **argv) {
	old_side = !strcmp(argv[1], "old");
	seed0 = (unsigned)atoi(argv[2]);
	for (int i = 3; i < argc; i++) {
		char *end;
		uintptr_t a = strtoul(argv[i], &end, 16), b = strtoul(end + 1, NULL, 16);
		held[nheld].start = (char *)a;
		held[nheld++].len = b - a;
		if (mmap((void *)a, b - a, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0) != (void *)a) {
			perror("reserving a range");
			return 3;
		}
	}
	/* Free chunks that are 16 bytes larger than a thread's cache: too little to split off, so with one arena
	   the caches of the threads take them whole. */
	void *roomy[40], *between[40];
	for (int i = 0; i < 40; i++) roomy[i] = malloc(0x298), between[i] = malloc(24);
	for (int i = 0; i < 40; i++) free(roomy[i]);
	if (!between[39]) return 6;
	pthread_barrier_init(&barrier, NULL, THREADS);
	pthread_t t[THREADS];
	for (int i = 1; i < THREADS; i++) pthread_create(&t[i], NULL, work, (void *)(intptr_t)i);
	/* The main thread's start-up part, as in work(). */
	unsigned s = seed0 * 31 + old_side;
	__asm__("mov %%fs:0, %0" : "=r"(info[0].fs_base));
	info[0].tid = syscall(SYS_gettid);
	churn(old_side ? tab[0] : mine[0], 4000, &s);
	while (__atomic_load_n(&ready, __ATOMIC_SEQ_CST) < THREADS - 1) usleep(1000);
	char line[256];
	int n = snprintf(line, sizeof line, "%p %p\n", (void *)tab, (void *)info);
	if (write(1, line, n) != n || read(0, line, 1) != 1) return 4;
	for (int i = 0; i < nheld; i++)
		if (mprotect(held[i].start, held[i].len, PROT_READ | PROT_WRITE)) { perror("mprotect"); return 5; }
	/* work() again would churn once more: join the others at the barrier instead. */
	go = 1;
	syscall(SYS_futex, &go, 129, 1 << 20, NULL, NULL, 0);
	if (old_side) return 0;
	ready = 0;
	rest();
	for (int i = 1; i < THREADS; i++) pthread_join(t[i], NULL);
	malloc_trim(0);
	/* Everything was freed: what malloc counts as in use is what was leaked on purpose. */
	for (int i = 0; i < 2000; i++) free(malloc(1 + (size_t)i * 37));
	puts("done");
	return 0;
}

