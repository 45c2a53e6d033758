/* Every kind of descriptor, with contents. */
#include "self.h"
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/un.h>

static int pipe_fd[2], packet[2], half[2], pair[2], dgram[2], ev, sem, tfd, sfd, ep, deleted, mem, dup_a, dup_b, dir, append, lonely;
static int round_no;

static void fill(void) {
    char b[64];
    snprintf(b, sizeof b, "in the pipe %d", round_no);
    write(pipe_fd[1], b, strlen(b));
    write(packet[1], "one", 3);
    write(pair[0], "to one", 6);
    write(pair[1], "to zero", 7);
    write(dgram[0], "gram", 4);
    eventfd_write(ev, 40);
    eventfd_write(sem, 2);
    raise(SIGUSR2);
    pwrite(deleted, b, strlen(b), 10000);
    pwrite(mem, b, strlen(b), 5000);
    lseek(dup_a, 3 + round_no, SEEK_SET);
    struct itimerspec in = {.it_value.tv_nsec = 1000, .it_interval.tv_sec = 3600};
    timerfd_settime(tfd, 0, &in, NULL);
}

static void check(void) {
    char b[256], want[64];
    snprintf(want, sizeof want, "in the pipe %d", round_no);
    CHECK(fcntl(pipe_fd[0], F_GETPIPE_SZ) == 1 << 18);
    ssize_t n = read(pipe_fd[0], b, sizeof b);
    CHECK(n == (ssize_t)strlen(want) && !memcmp(b, want, n));
    CHECK(read(packet[0], b, sizeof b) == 3 && !memcmp(b, "one", 3));
    CHECK(fcntl(packet[1], F_GETFL) & O_DIRECT);
    CHECK(read(half[0], b, sizeof b) == 0); /* its write end was closed */
    CHECK(read(pair[1], b, sizeof b) == 6 && !memcmp(b, "to one", 6));
    CHECK(read(pair[0], b, sizeof b) == 7 && !memcmp(b, "to zero", 7));
    CHECK(recv(pair[0], b, sizeof b, MSG_DONTWAIT) < 0 && errno == EAGAIN);
    CHECK(recv(dgram[1], b, sizeof b, MSG_DONTWAIT) == 4 && !memcmp(b, "gram", 4));
    eventfd_t v;
    CHECK(eventfd_read(ev, &v) == 0 && v == 40);
    CHECK(eventfd_read(sem, &v) == 0 && v == 1);
    CHECK(eventfd_read(sem, &v) == 0 && v == 1);
    struct signalfd_siginfo si;
    CHECK(read(sfd, &si, sizeof si) == sizeof si && si.ssi_signo == SIGUSR2);
    CHECK(pread(deleted, b, sizeof b, 10000) == (ssize_t)strlen(want) && !memcmp(b, want, strlen(want)));
    struct stat st;
    CHECK(fstat(deleted, &st) == 0 && st.st_nlink == 0);
    CHECK(pread(mem, b, strlen(want), 5000) == (ssize_t)strlen(want) && !memcmp(b, want, strlen(want)));
    CHECK(fcntl(mem, F_GET_SEALS) == F_SEAL_SHRINK);
    CHECK(lseek(dup_b, 0, SEEK_CUR) == 3 + round_no);
    CHECK(fcntl(dup_b, F_GETFD) == FD_CLOEXEC && fcntl(dup_a, F_GETFD) == 0);
    CHECK(dup_b == 200 && fcntl(201, F_GETFD) == -1);
    CHECK(fcntl(append, F_GETFL) & O_APPEND);
    CHECK(flock(append, LOCK_SH | LOCK_NB) == 0);
    CHECK(fcntl(dir, F_GETFL) & O_DIRECTORY);
    uint64_t ticks = 0;
    CHECK(read(tfd, &ticks, 8) == 8 && ticks == 1);
    struct itimerspec left;
    CHECK(timerfd_gettime(tfd, &left) == 0 && left.it_interval.tv_sec == 3600 && left.it_value.tv_sec > 3000);
    struct sockaddr_un a;
    socklen_t l = sizeof a;
    CHECK(getsockname(lonely, (struct sockaddr *)&a, &l) == 0 && a.sun_path[0] == 0 && a.sun_path[1] == 'm');
    /* Registrations: data words, edge trigger, a set in a set. */
    struct epoll_event got[8];
    eventfd_write(ev, 1);
    int k = epoll_wait(ep, got, 8, 0), seen = 0;
    for (int i = 0; i < k; i++) seen += got[i].data.u64 == 0xfeedfacecafebeef;
    CHECK(seen == 1);
    CHECK(epoll_wait(ep, got, 8, 0) == 0); /* edge: reported once */
    eventfd_read(ev, &v);
    round_no++;
    fill();
}

int main(int argc, char **argv) {
    (void)argc;
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    start_listening(argv[1]);
    pipe(pipe_fd);
    fcntl(pipe_fd[0], F_SETPIPE_SZ, 1 << 18);
    pipe2(packet, O_DIRECT | O_CLOEXEC);
    pipe(half);
    close(half[1]);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    socketpair(AF_UNIX, SOCK_DGRAM, 0, dgram);
    ev = eventfd(0, EFD_NONBLOCK);
    sem = eventfd(0, EFD_SEMAPHORE);
    tfd = timerfd_create(CLOCK_MONOTONIC, 0);
    sfd = signalfd(-1, &mask, SFD_NONBLOCK);
    char name[] = "/tmp/mcr-fdzoo-XXXXXX";
    deleted = mkstemp(name);
    unlink(name);
    mem = memfd_create("zoo", MFD_ALLOW_SEALING);
    ftruncate(mem, 9000);
    fcntl(mem, F_ADD_SEALS, F_SEAL_SHRINK);
    dup_a = open("/etc/passwd", O_RDONLY);
    dup_b = dup3(dup_a, 200, O_CLOEXEC);
    dir = open("/tmp", O_RDONLY | O_DIRECTORY);
    char log[] = "/tmp/mcr-fdzoo-log-XXXXXX";
    close(mkstemp(log));
    append = open(log, O_WRONLY | O_APPEND);
    flock(append, LOCK_EX);
    lonely = socket(AF_UNIX, SOCK_DGRAM, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "mcr-fdzoo-%d", getpid());
    bind(lonely, (struct sockaddr *)&a, 3 + strlen(a.sun_path + 1));
    ep = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN | EPOLLET, .data.u64 = 0xfeedfacecafebeef};
    epoll_ctl(ep, EPOLL_CTL_ADD, ev, &e);
    int outer = epoll_create1(0);
    e.data.u64 = 5;
    epoll_ctl(outer, EPOLL_CTL_ADD, ep, &e);
    fill();
    struct epoll_event got;
    epoll_wait(ep, &got, 1, 0);
    serve(check);
}
