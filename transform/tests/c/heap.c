// Fills a heap in many ways, then prints what is live and sleeps.
// usage: heap THREADS ROUNDS SEED [nobrk|wide]
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SLOTS 4000
struct worker { pthread_t thread; unsigned seed; int rounds; void *slot[SLOTS]; int tid; };
static pthread_barrier_t done;
static size_t extra; // added to every size

static unsigned rnd(unsigned *s) { *s = *s * 1103515245u + 12345u; return *s >> 8; }

static void *work(void *arg) {
    struct worker *w = arg;
    w->tid = syscall(SYS_gettid);
    for (int r = 0; r < w->rounds; r++) {
        int i = rnd(&w->seed) % SLOTS;
        if (w->slot[i] && rnd(&w->seed) % 2) { free(w->slot[i]); w->slot[i] = 0; continue; }
        unsigned kind = rnd(&w->seed) % 1000;
        size_t n = kind < 800 ? rnd(&w->seed) % 300 : kind < 990 ? rnd(&w->seed) % 5000 : kind < 999 ? rnd(&w->seed) % 70000 : 200000 + rnd(&w->seed) % 400000;
        n += kind < 999 ? extra : 0;
        if (kind % 50 == 7) { free(w->slot[i]); w->slot[i] = aligned_alloc(64 << (kind % 4), (n + 63) & ~63ul); }
        else w->slot[i] = realloc(w->slot[i], n + 1);
        memset(w->slot[i], rnd(&w->seed), n);
    }
    pthread_barrier_wait(&done);
    if (w->thread) for (;;) pause();
    return 0;
}

int main(int argc, char **argv) {
    int threads = atoi(argv[1]), rounds = atoi(argv[2]);
    if (argc > 4) mallopt(M_MMAP_THRESHOLD, 128 << 10);
    if (argc > 4 && !strcmp(argv[4], "nobrk")) {
        // Something in the way of the break: malloc must fall back to mmap.
        char *end = sbrk(0);
        mmap((void *)(((uintptr_t)end + 4095) & ~4095ul), 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    }
    if (argc > 4 && !strcmp(argv[4], "wide")) extra = 50000;
    pthread_barrier_init(&done, 0, threads + 1);
    struct worker *all = calloc(threads + 1, sizeof *all);
    for (int i = 0; i <= threads; i++) { all[i].seed = atoi(argv[3]) + i; all[i].rounds = rounds; }
    for (int i = 1; i <= threads; i++) pthread_create(&all[i].thread, 0, work, &all[i]);
    work(&all[0]);
    void *big = aligned_alloc(1 << 16, 1 << 20);
    void *reuse[40];
    for (int i = 0; i < 40; i++) reuse[i] = malloc(40);
    for (int i = 0; i < 40; i++) free(reuse[i]); // 7 into the cache, the rest into a fastbin
    struct mallinfo2 m = mallinfo2();
    static char out[1 << 16];
    setvbuf(stdout, out, _IOFBF, sizeof out);
    for (int t = 0; t <= threads; t++) {
        printf("T %d %lx\n", all[t].tid, t ? (unsigned long)all[t].thread : (unsigned long)pthread_self());
        for (int i = 0; i < SLOTS; i++) if (all[t].slot[i]) printf("P %lx %zu\n", (unsigned long)all[t].slot[i], malloc_usable_size(all[t].slot[i]));
    }
    printf("P %lx %zu\n", (unsigned long)big, malloc_usable_size(big));
    for (int i = 0; i < 40; i++) printf("F %lx\n", (unsigned long)reuse[i]);
    printf("M %zu %zu %zu %zu %zu\n", m.arena, m.uordblks, m.fordblks, m.hblks, m.keepcost);
    printf("ready\n");
    fflush(stdout);
    for (;;) pause();
}
