/* The old and the new version of a process in one program.
 *
 * Old: N threads (argument 1) beside the main thread are blocked in calls of several kinds and check that no
 * call ends early or with EINTR. The main thread answers "?" on stdin with what it finds.
 * New: entered by a commit at new_start, on other stacks, with other registers, thread pointer, vector
 * registers and masks, which it checks against formulas. It uses no libc.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX 80
#define MAX_WORDS 100000
#define STRIDE 8
#define STACK 16384

typedef uint64_t u64;

static u64 words[MAX_WORDS * STRIDE], count = MAX_WORDS;
static u64 old_word(u64 i) { return i * 0x9e3779b97f4a7c15ull ^ 0x1111; }

/* ---- old ---- */
static volatile int bad, eintr, sleeps, signals, threads, mp[2], up[MAX], hits[MAX];
static int stop;
static long scale = 1; /* of all timeouts */
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t c = PTHREAD_COND_INITIALIZER;
static void fail(int n) { __sync_fetch_and_add(&bad, 1); dprintf(2, "check %d, errno %d\n", n, errno); }
static long ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000L + t.tv_nsec; }
static void on(int s) { (void)s; __sync_fetch_and_add(&signals, 1); }
static void interrupted(long i) { __sync_fetch_and_add(&eintr, 1); __sync_fetch_and_add(&hits[i], 1); }

static void *work(void *a) {
    long i = (long)a, t; int p[2]; if (pipe(p)) fail(1);
    int ep = epoll_create1(0); struct epoll_event e = { EPOLLIN, { .u64 = 0xabcdef01 } };
    epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &e);
    static _Thread_local u64 mine; mine = i * 3 + 1;
    double x = i + 0.5; u64 y = i * 77 + 5;
    up[i] = syscall(SYS_gettid);
    __sync_fetch_and_add(&threads, 1);
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        t = ns(); errno = 0;
        switch (i % 8) {
        case 0: { struct epoll_event g; int r = epoll_wait(ep, &g, 1, -1);
            if (r < 0 && errno == EINTR) interrupted(i); else fail(2); break; }
        case 1: pthread_mutex_lock(&m); if (!stop) pthread_cond_wait(&c, &m); pthread_mutex_unlock(&m); break;
        case 2: { struct timespec d = { 0, 200000000 }; if (scale > 1) d.tv_sec = scale; int r = nanosleep(&d, scale > 1 ? 0 : &d); /* the kernel writes what is left at every stop */
            if (r < 0 && errno == EINTR) interrupted(i);
            else { if (r || ns() - t < 200000000) fail(3); __sync_fetch_and_add(&sleeps, 1); } break; }
        case 3: { char b[8]; ssize_t r = read(p[0], b, 8);
            if (r < 0 && errno == EINTR) interrupted(i); else fail(4); break; }
        case 4: { struct timespec d = { 0, 40000000 }; struct pollfd f = { p[0], POLLIN, 0 };
            int r = ppoll(&f, 1, scale > 1 ? 0 : &d, 0); /* likewise */ if (r < 0 && errno == EINTR) interrupted(i); else if (r || ns() - t < 39000000) fail(5); break; }
        case 5: { struct pollfd f = { p[0], POLLIN, 0 }; int r = poll(&f, 1, 200 * scale);
            if (r < 0 && errno == EINTR) interrupted(i);
            else { if (r || ns() - t < 199000000) fail(6); __sync_fetch_and_add(&sleeps, 1); } break; }
        case 6: { int w = 0; struct timespec d = { 0, 200000000 }; if (scale > 1) d.tv_sec = scale;
            long r = syscall(SYS_futex, &w, FUTEX_WAIT, 0, &d, 0, 0);
            if (r < 0 && errno == EINTR) interrupted(i);
            else { if (r == 0 || errno != ETIMEDOUT || ns() - t < 200000000) fail(7); __sync_fetch_and_add(&sleeps, 1); } break; }
        case 7: pause(); if (!stop) interrupted(i); break;
        }
        x = x * 3 - 2 * i - 1; y = y * 5 - 4 * (i * 77 + 5);
        if (x != i + 0.5 || y != (u64)i * 77 + 5 || mine != (u64)i * 3 + 1) fail(8);
    }
    return 0;
}

/* ---- new ---- */
struct slot { u64 fs, rbx, rbp, r12, r13, r14, r15, xmm1[2], xmm15[2], flags, mask, tid, mxcsr; };
struct slot slots[MAX];
char stacks[MAX][STACK] __attribute__((aligned(64)));
u64 blocks[MAX][8];
volatile int arrived, expected, never, new_bad, new_signals;
u64 altstack_seen;
extern char new_start[], new_restorer[];

__asm__(".globl new_start\nnew_start:\n"
    "  pushfq\n imul $120, %rdi, %rsi\n lea slots(%rip), %rax\n add %rax, %rsi\n"
    "  mov %fs:0, %rax\n mov %rax, (%rsi)\n mov %rbx, 8(%rsi)\n mov %rbp, 16(%rsi)\n mov %r12, 24(%rsi)\n"
    "  mov %r13, 32(%rsi)\n mov %r14, 40(%rsi)\n mov %r15, 48(%rsi)\n movdqu %xmm1, 56(%rsi)\n"
    "  movdqu %xmm15, 72(%rsi)\n pop 88(%rsi)\n stmxcsr 112(%rsi)\n"
    "  and $-16, %rsp\n push $0\n jmp new_thread\n"
    ".globl new_restorer\nnew_restorer:\n mov $15, %eax\n syscall\n");

static long sys(long n, long a, long b, long d, long e) {
    long r; register long r10 __asm__("r10") = e; register long r8 __asm__("r8") = 0; register long r9 __asm__("r9") = 0;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(d), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return r;
}
void new_handler(int s) { (void)s; __sync_fetch_and_add(&new_signals, 1); }
static char *number(char *to, long v) { char b[24]; int n = 0; do b[n++] = '0' + v % 10; while (v /= 10); while (n) *to++ = b[--n]; return to; }
static char *text(char *to, const char *s) { while (*s) *to++ = *s++; return to; }

static void new_main(void) {
    int n;
    while ((n = arrived) != expected) sys(SYS_futex, (long)&arrived, FUTEX_WAIT, n, 0);
    for (u64 i = 0; i < count; i++) if (words[i * STRIDE] != ~old_word(i)) { new_bad++; break; }
    for (u64 i = 0; i < count; i++) if (words[i * STRIDE + 1]) { new_bad++; break; }
    if (sys(SYS_fcntl, 200, 1, 0, 0) < 0) new_bad++;
    for (;;) {
        char b[64]; long r = sys(SYS_read, 0, (long)b, 64, 0);
        if (r == 0) sys(SYS_exit_group, new_bad, 0, 0, 0);
        if (r < 0) { new_bad++; continue; }
        char out[128], *o = text(out, "new bad "); o = number(o, new_bad); o = text(o, " threads "); o = number(o, arrived);
        o = text(o, " signals "); o = number(o, new_signals); o = text(o, "\n");
        sys(SYS_write, 1, (long)out, o - out, 0);
    }
}
__attribute__((used)) void new_thread(long i) {
    struct slot *s = &slots[i]; u64 k = i + 1;
    if (s->fs != (u64)blocks[i] || s->rbx != k * 3 || s->rbp != k * 5 || s->r12 != k * 7 || s->r13 != k * 11
        || s->r14 != k * 13 || s->r15 != k * 17) new_bad |= 1 << 8;
    if (s->xmm1[0] != k * 19 || s->xmm1[1] != k * 23 || s->xmm15[0] != k * 29 || s->xmm15[1] != k * 31
        || (uint32_t)s->mxcsr != 0x1f80 + 0x8000) new_bad |= 1 << 9;
    if ((s->flags & 0xcd5) != 0x45) new_bad |= 1 << 10; /* CF PF ZF, nothing else */
    u64 mask = 0; sys(SYS_rt_sigprocmask, 0, 0, (long)&mask, 8); if (mask != ((u64)i << 40)) new_bad |= 1 << 11;
    s->tid = sys(SYS_gettid, 0, 0, 0, 0);
    stack_t alt; sys(SYS_sigaltstack, 0, (long)&alt, 0, 0); if ((u64)alt.ss_sp != (u64)&stacks[i][0]) new_bad |= 1 << 12;
    __sync_fetch_and_add(&arrived, 1); sys(SYS_futex, (long)&arrived, FUTEX_WAKE, 1, 0);
    if (i == 0) new_main();
    for (;;) sys(SYS_futex, (long)&never, FUTEX_WAIT, 0, 0);
}

int main(int argc, char **argv) {
    int n = argc > 1 ? atoi(argv[1]) : 0; scale = argc > 2 ? atol(argv[2]) : 1;
    if (argc > 3) count = atol(argv[3]);
    for (u64 i = 0; i < count; i++) words[i * STRIDE] = old_word(i);
    struct sigaction sa = { .sa_handler = on }; sigaction(SIGUSR1, &sa, 0); sa.sa_flags = SA_RESTART; sigaction(SIGUSR2, &sa, 0);
    pthread_attr_t at; pthread_attr_init(&at); pthread_attr_setstacksize(&at, 65536);
    pthread_t t[MAX]; for (long i = 0; i < n; i++) if (pthread_create(&t[i], &at, work, (void *)i)) fail(9);
    while (threads < n) usleep(1000);
    if (argc > 4) { /* no more threads */
        struct sock_filter f[] = { BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAGAIN), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW) };
        struct sock_fprog g = { 4, f };
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 1, &g)) fail(14);
    }
    puts("ready");
    printf("%lx %lx %lx %lx %lx %lx %lx %lx\n", (long)words, (long)new_start, (long)stacks, (long)blocks, (long)&expected,
        (long)new_handler, (long)new_restorer, (long)&slots);
    for (int i = 0; i < n; i++) printf("%d ", up[i]);
    puts(""); fflush(stdout);
    char b[64]; ssize_t r;
    while ((r = read(0, b, 64)) > 0) {
        for (u64 i = 0; i < count; i++) if (words[i * STRIDE] != old_word(i)) { fail(10); break; }
        for (u64 i = 0; i < count; i++) if (words[i * STRIDE + 1]) { fail(11); break; }
        if (fcntl(200, F_GETFD) >= 0 || new_bad || arrived || expected) fail(12);
        printf("old bad %d eintr %d sleeps %d signals %d hits", bad, eintr, sleeps, signals);
        for (int i = 0; i < n && i < 8; i++) printf(" %d", hits[i]);
        puts(""); fflush(stdout);
    }
    if (r < 0) fail(13);
    _exit(bad != 0);
}
