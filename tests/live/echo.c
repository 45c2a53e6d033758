/* A line server for the network tests: every connection is told what it sent, and large answers may wait.
 *   big N    N bytes of a pattern, then a newline
 *   stop     answered; from now on this connection is not read, until another one says go
 *   go       answered; every connection is read again
 *   (else)   the line, with "= " before it; at the peer's end "bye N", N being the bytes that it has sent */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX = 128, ROOM = 1 << 20 };
static struct conn {
    int stopped, ended;
    long got, out_at, out_len, line_len;
    char line[4096];
    char *out;
} conns[MAX];
static struct pollfd fds[MAX];
static int nfds;

static void say(struct conn *c, const char *bytes, long len)
{
    if (c->out_at + c->out_len + len > ROOM) {
        memmove(c->out, c->out + c->out_at, c->out_len);
        c->out_at = 0;
    }
    if (c->out_len + len > ROOM)
        abort();
    memcpy(c->out + c->out_at + c->out_len, bytes, len);
    c->out_len += len;
}

static void obey(struct conn *c)
{
    char answer[5000];
    if (!strncmp(c->line, "big ", 4)) {
        for (long i = 0, n = atol(c->line + 4); i < n; i++) {
            char b = 'a' + i % 23;
            say(c, &b, 1);
        }
        say(c, "\n", 1);
        return;
    }
    if (!strcmp(c->line, "stop"))
        c->stopped = 1;
    if (!strcmp(c->line, "go"))
        for (int i = 0; i < MAX; i++)
            conns[i].stopped = 0;
    say(c, answer, snprintf(answer, sizeof answer, "= %s\n", c->line));
}

static void hear(int i)
{
    struct conn *c = &conns[i];
    char b[1];
    while (!c->stopped && !c->ended) {
        ssize_t n = recv(fds[i].fd, b, 1, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            char bye[64];
            c->ended = 1;
            say(c, bye, snprintf(bye, sizeof bye, "bye %ld\n", c->got));
            return;
        }
        c->got++;
        if (*b == '\n') {
            c->line[c->line_len] = 0;
            c->line_len = 0;
            obey(c);
        } else if (c->line_len < (long)sizeof c->line - 1) {
            c->line[c->line_len++] = *b;
        }
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    int one = 1, l = socket(AF_INET6, SOCK_STREAM, 0);
    setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(l, (void *)&any, sizeof any) || listen(l, 64)) {
        perror("listen");
        return 1;
    }
    fds[nfds++] = (struct pollfd){l, POLLIN, 0};
    puts("ready");
    fflush(stdout);
    for (;;) {
        for (int i = 1; i < nfds; i++)
            fds[i].events = (conns[i].stopped || conns[i].ended ? 0 : POLLIN) | (conns[i].out_len ? POLLOUT : 0);
        if (poll(fds, nfds, -1) < 0)
            continue;
        for (int i = 1; i < nfds; i++) {
            if (fds[i].revents & POLLIN)
                hear(i);
            if (conns[i].out_len && fds[i].revents & POLLOUT) {
                struct conn *c = &conns[i];
                ssize_t n = send(fds[i].fd, c->out + c->out_at, c->out_len, MSG_DONTWAIT | MSG_NOSIGNAL);
                if (n > 0) {
                    c->out_at += n;
                    c->out_len -= n;
                }
            }
            if (conns[i].ended && !conns[i].out_len && fds[i].fd >= 0) {
                close(fds[i].fd);
                fds[i].fd = -1;
            }
        }
        if (fds[0].revents & POLLIN && nfds < MAX) {
            int fd = accept(l, 0, 0);
            if (fd >= 0) {
                conns[nfds].out = malloc(ROOM);
                fds[nfds++] = (struct pollfd){fd, 0, 0};
            }
        }
    }
}
