/* What the kernel keeps per process: signals, timers, limits, credentials, names. */
#include "self.h"
#include <grp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/time.h>

static volatile sig_atomic_t alarms, ticks, queued, value;
static timer_t timer, quiet;
static int drop;

static void on_alarm(int n) { (void)n; alarms++; }
static void on_timer(int n, siginfo_t *i, void *c) { (void)n; (void)c; ticks++; value = i->si_value.sival_int; }
static void on_queue(int n, siginfo_t *i, void *c) {
    (void)n; (void)c;
    queued = i->si_value.sival_int;
}

static void check(void) {
    struct sigaction a;
    CHECK(sigaction(SIGALRM, NULL, &a) == 0 && a.sa_handler == on_alarm && (a.sa_flags & SA_RESTART));
    CHECK(sigaction(SIGPIPE, NULL, &a) == 0 && a.sa_handler == SIG_IGN);
    CHECK(sigaction(SIGTERM, NULL, &a) == 0 && a.sa_handler == SIG_DFL);
    /* A queued signal that was pending comes with its value. */
    sigset_t s, old;
    sigpending(&s);
    CHECK(sigismember(&s, SIGRTMIN + 3) && sigismember(&s, SIGUSR1));
    sigemptyset(&s);
    sigaddset(&s, SIGRTMIN + 3);
    sigprocmask(SIG_UNBLOCK, &s, &old);
    CHECK(queued == 4242);
    CHECK(sigismember(&old, SIGUSR1) && sigismember(&old, SIGRTMIN + 3) && !sigismember(&old, SIGTERM));
    sigprocmask(SIG_SETMASK, &old, NULL);
    int t0 = ticks, a0 = alarms;
    struct timespec d = {0, 120 * 1000 * 1000};
    while (nanosleep(&d, &d) == -1 && errno == EINTR) {}
    CHECK(ticks > t0 && value == 77);
    CHECK(alarms > a0);
    struct itimerspec left;
    CHECK(timer_gettime(quiet, &left) == 0 && left.it_value.tv_sec > 3000 && left.it_interval.tv_sec == 5);
    struct itimerval iv;
    CHECK(getitimer(ITIMER_REAL, &iv) == 0 && iv.it_interval.tv_usec == 50000);
    struct rlimit r;
    CHECK(getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur == 777 && r.rlim_max == 5000);
    CHECK(getrlimit(RLIMIT_CORE, &r) == 0 && r.rlim_cur == 12345);
    CHECK(umask(0) == 031);
    umask(031);
    char b[256];
    CHECK(getcwd(b, sizeof b) && !strcmp(b, "/tmp"));
    prctl(PR_GET_NAME, b);
    CHECK(!strcmp(b, "renamed"));
    CHECK(getsid(0) == getpid() && getpgrp() == getpid());
    uid_t ru, eu, su;
    getresuid(&ru, &eu, &su);
    if (drop) {
        gid_t g[8];
        CHECK(ru == 12345 && eu == 12345 && su == 12345);
        CHECK(getegid() == 23456 && getgroups(8, g) == 2 && g[0] == 100 && g[1] == 200);
        CHECK(open("/etc/shadow", O_RDONLY) == -1);
        CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
        CHECK(prctl(PR_CAPBSET_READ, 2, 0, 0, 0) == 0);
    } else {
        CHECK(ru == 0 && eu == 0 && su == 0);
        CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0);
    }
    CHECK(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 1);
    CHECK(prctl(PR_GET_PDEATHSIG, &ru, 0, 0, 0) == 0 && ru == 0);
    queued = 0;
    sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = 4242});
}

int main(int argc, char **argv) {
    drop = argc > 2 && !strcmp(argv[2], "drop");
    start_listening(argv[1]);
    chdir("/tmp");
    umask(031);
    prctl(PR_SET_NAME, "renamed");
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){777, 5000});
    setrlimit(RLIMIT_CORE, &(struct rlimit){12345, RLIM_INFINITY});
    if (drop) {
        gid_t g[] = {100, 200};
        setgroups(2, g);
        prctl(PR_CAPBSET_DROP, 2, 0, 0, 0);
        setresgid(23456, 23456, 23456);
        setresuid(12345, 12345, 12345);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        prctl(PR_SET_DUMPABLE, 1);
    }
    signal(SIGPIPE, SIG_IGN);
    struct sigaction a = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &a, NULL);
    a = (struct sigaction){.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &a, NULL);
    a.sa_sigaction = on_queue;
    sigaction(SIGRTMIN + 3, &a, NULL);
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGRTMIN + 3);
    sigaddset(&s, SIGUSR1);
    sigprocmask(SIG_BLOCK, &s, NULL);
    sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = 4242});
    raise(SIGUSR1);
    struct sigevent e = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN, .sigev_value.sival_int = 77};
    timer_t gap;
    timer_create(CLOCK_REALTIME, &e, &gap);
    timer_create(CLOCK_MONOTONIC, &e, &timer);
    timer_delete(gap); /* so that ids do not start at 0 */
    timer_create(CLOCK_REALTIME, &e, &quiet);
    timer_settime(timer, 0, &(struct itimerspec){.it_value = {0, 30000000}, .it_interval = {0, 30000000}}, NULL);
    timer_settime(quiet, 0, &(struct itimerspec){.it_value = {3600, 0}, .it_interval = {5, 0}}, NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){.it_value = {0, 50000}, .it_interval = {0, 50000}}, NULL);
    serve(check);
}
