/* Shared by the self-verifying programs: a control connection over which the test asks for a check.
 * Usage: PROGRAM PORT. The program listens on 127.0.0.1:PORT, accepts one control connection and answers each
 * line with the result of check(): "ok" or what is wrong. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static char wrong[4096];
static void bad(const char *format, ...) {
    va_list args;
    va_start(args, format);
    size_t n = strlen(wrong);
    vsnprintf(wrong + n, sizeof wrong - n, format, args);
    va_end(args);
    strncat(wrong, "; ", sizeof wrong - strlen(wrong) - 1);
}
#define CHECK(condition) do { if (!(condition)) bad("line %d: %s (errno %d)", __LINE__, #condition, errno); } while (0)

static int listen_fd = -1;

static int start_listening(const char *port) {
    int one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listen_fd, (struct sockaddr *)&a, sizeof a) || listen(listen_fd, 16)) { perror("bind"); exit(2); }
    return listen_fd;
}

/* Serves control connections for ever, one at a time; blocked in epoll_wait between the lines. */
static void serve(void (*check)(void)) {
    int ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event ev = {.events = EPOLLIN, .data.u64 = 0x1122334455667788};
    epoll_ctl(ep, EPOLL_CTL_ADD, listen_fd, &ev);
    for (;;) {
        struct epoll_event got[8];
        int n = epoll_wait(ep, got, 8, -1);
        if (n < 0 && errno != EINTR) { bad("epoll_wait errno %d", errno); }
        for (int i = 0; i < n; i++) {
            if (got[i].data.u64 == 0x1122334455667788) {
                int c = accept(listen_fd, NULL, NULL);
                struct epoll_event e = {.events = EPOLLIN, .data.fd = c};
                epoll_ctl(ep, EPOLL_CTL_ADD, c, &e);
                continue;
            }
            char line[64];
            ssize_t len = read(got[i].data.fd, line, sizeof line);
            if (len <= 0) { close(got[i].data.fd); continue; }
            wrong[0] = 0;
            if (memmem(line, len, "check", 5)) check();
            const char *answer = wrong[0] ? wrong : "ok";
            dprintf(got[i].data.fd, "%s\n", answer);
        }
    }
}
