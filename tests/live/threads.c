/* A thread blocked in each blocking call; each must wake as if nothing had happened, with its own TLS, signal
 * mask, name and vector registers. */
#include "self.h"
#include <linux/futex.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/resource.h>

enum { COND, SEM, READ, POLL, PPOLL, SELECT, ACCEPT, RECV, EPOLL, SIGWAIT, SLEEP, VECTOR, JOIN, KINDS };
static pthread_t thread[KINDS];
static int wake[KINDS][2], sock[2];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static sem_t sem;
static int go, round_no, slot_of[KINDS];
static volatile int woke[KINDS];
static __thread int tls = 42;
static __thread char name[16];
static int unix_listener;
static char unix_name[64];
static struct timespec started;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* Blocks in read(2) with all sixteen ymm registers holding a pattern; true if they survive. */
static int vector_read(int fd, char *buf) {
    static uint64_t in[64] __attribute__((aligned(64))), out[64] __attribute__((aligned(64)));
    for (int i = 0; i < 64; i++) in[i] = 0x0101010101010101ull * (i + 1 + round_no);
    memset(out, 0, sizeof out);
    long r = SYS_read;
    int avx = __builtin_cpu_supports("avx");
#define LOAD(n) "vmovdqu " #n "*32(%[in]), %%ymm" #n "\n"
#define STORE(n) "vmovdqu %%ymm" #n ", " #n "*32(%[out])\n"
    if (avx)
        __asm__ volatile(LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7) LOAD(8) LOAD(9) LOAD(10)
            LOAD(11) LOAD(12) LOAD(13) LOAD(14) LOAD(15) "syscall\n" STORE(0) STORE(1) STORE(2) STORE(3) STORE(4)
            STORE(5) STORE(6) STORE(7) STORE(8) STORE(9) STORE(10) STORE(11) STORE(12) STORE(13) STORE(14) STORE(15)
            "vzeroupper\n"
            : "+a"(r) : "D"((long)fd), "S"(buf), "d"(1L), [in] "r"(in), [out] "r"(out)
            : "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    else { r = read(fd, buf, 1); memcpy(out, in, sizeof out); }
    return r == 1 && !memcmp(in, out, sizeof in);
}

static int block(int kind) {
    char b[8];
    int fd = wake[kind][0];
    switch (kind) {
    case COND: {
        int mine = round_no;
        pthread_mutex_lock(&lock);
        while (go == mine) pthread_cond_wait(&cond, &lock);
        pthread_mutex_unlock(&lock);
        return 1;
    }
    case SEM: while (sem_wait(&sem)) if (errno != EINTR) return 0; return 1;
    case READ: return read(fd, b, 1) == 1;
    case POLL: { struct pollfd p = {fd, POLLIN, 0}; return poll(&p, 1, -1) == 1 && read(fd, b, 1) == 1; }
    case PPOLL: { struct pollfd p = {fd, POLLIN, 0}; struct timespec t = {3600, 0}; return ppoll(&p, 1, &t, NULL) == 1 && read(fd, b, 1) == 1; }
    case SELECT: { fd_set s; FD_ZERO(&s); FD_SET(fd, &s); return select(fd + 1, &s, 0, 0, 0) == 1 && read(fd, b, 1) == 1; }
    case ACCEPT: { int c = accept(unix_listener, 0, 0); int ok = c >= 0; close(c); return ok; }
    case RECV: return recv(sock[0], b, 1, 0) == 1;
    case EPOLL: {
        int ep = epoll_create1(0);
        struct epoll_event e = {EPOLLIN, {.u64 = 99}}, got = {0, {0}};
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
        int n = epoll_wait(ep, &got, 1, -1);
        close(ep);
        return n == 1 && got.data.u64 == 99 && read(fd, b, 1) == 1;
    }
    case SIGWAIT: {
        sigset_t s; int got = 0;
        sigemptyset(&s); sigaddset(&s, SIGUSR1);
        int r;
        while ((r = sigwait(&s, &got)) == EINTR) {}
        return r == 0 && got == SIGUSR1;
    }
    case SLEEP: { struct timespec t = {0, 700 * 1000 * 1000}; while (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t) == EINTR) {} return 1; }
    case VECTOR: return vector_read(fd, b);
    }
    return 0;
}

static void *run(void *arg) {
    int kind = *(int *)arg;
    tls = 1000 + kind;
    snprintf(name, sizeof name, "zoo-%d", kind);
    prctl(PR_SET_NAME, name);
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR1);
    sigaddset(&s, 40 + kind);
    pthread_sigmask(SIG_SETMASK, &s, NULL);
    stack_t alt = {.ss_sp = malloc(16384), .ss_size = 16384};
    sigaltstack(&alt, NULL);
    if (kind == READ) setpriority(PRIO_PROCESS, syscall(SYS_gettid), 5);
    for (;;) {
        if (kind == JOIN) { pthread_join(thread[READ], NULL); continue; }
        int ok = block(kind);
        char have[16];
        sigset_t now_set;
        stack_t now_alt;
        prctl(PR_GET_NAME, have);
        pthread_sigmask(0, NULL, &now_set);
        sigaltstack(NULL, &now_alt);
        ok &= tls == 1000 + kind && !strcmp(name, have) && sigismember(&now_set, 40 + kind) && !sigismember(&now_set, SIGTERM);
        ok &= now_alt.ss_sp == alt.ss_sp && now_alt.ss_size == 16384 && !(now_alt.ss_flags & SS_DISABLE);
        if (kind == READ) ok &= getpriority(PRIO_PROCESS, syscall(SYS_gettid)) == 5;
        woke[kind] = ok ? 1 : 2;
        while (woke[kind]) usleep(1000);
    }
    return NULL;
}

static void check(void) {
    for (int k = 0; k < KINDS; k++)
        if (k != SLEEP && woke[k]) bad("thread %d woke by itself: %d", k, woke[k]);
    pthread_mutex_lock(&lock);
    go++;
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&lock);
    sem_post(&sem);
    for (int k = 0; k < KINDS; k++) write(wake[k][1], "x", 1);
    write(sock[1], "x", 1);
    pthread_kill(thread[SIGWAIT], SIGUSR1);
    int c = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr a = {.sa_family = AF_UNIX};
    memcpy(a.sa_data, unix_name, 14);
    CHECK(connect(c, &a, 16) == 0);
    close(c);
    double until = now() + 10;
    for (int k = 0; k < KINDS; k++) {
        if (k == JOIN) continue;
        while (!woke[k] && now() < until) usleep(1000);
        if (woke[k] != 1) bad("thread %d: %d", k, woke[k]);
    }
    round_no++;
    /* What was not read by its thread. */
    for (int k = 0; k < KINDS; k++) {
        char b[8];
        fcntl(wake[k][0], F_SETFL, O_NONBLOCK);
        while (read(wake[k][0], b, 8) > 0) {}
        fcntl(wake[k][0], F_SETFL, 0);
    }
    for (int k = 0; k < KINDS; k++) woke[k] = 0;
    usleep(50000); /* until each is blocked again */
}

int main(int argc, char **argv) {
    (void)argc;
    start_listening(argv[1]);
    sem_init(&sem, 0, 0);
    socketpair(AF_UNIX, SOCK_STREAM, 0, sock);
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &s, NULL);
    unix_listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr a = {.sa_family = AF_UNIX};
    snprintf(unix_name, sizeof unix_name, "%cmcrt-%08d", 0, getpid());
    memcpy(a.sa_data, unix_name, 14);
    if (bind(unix_listener, &a, 16) || listen(unix_listener, 4)) perror("unix");
    for (int k = 0; k < KINDS; k++) {
        pipe(wake[k]);
        slot_of[k] = k;
        pthread_create(&thread[k], NULL, run, &slot_of[k]);
    }
    clock_gettime(CLOCK_MONOTONIC, &started);
    serve(check);
}
