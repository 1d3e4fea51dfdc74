/*
 * The floor: what the works of the suite cost in C, on one edge-triggered epoll, with as little as can
 * be done for them. No limits, no deadlines, no care for a client that does not read.
 *
 *     floor loop WORK        echo, lines, framed, sink, source or broadcast; prints its port
 *
 * suite.py builds it where there is a C compiler.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

static const char PONG[] = "+PONG\r\n";

/* An answer is at most one for each byte of a read: all of it may be empty lines. Frames need less,
   one that was begun before and what came after it. */
enum { EVENTS = 256, CHUNK = 65536, DESCRIPTORS = 65536, ANSWER = CHUNK * (sizeof PONG - 1) };

struct conn {
    size_t have;  /* of `data`: the beginning of a message */
    char *data;
};

static struct conn conns[DESCRIPTORS];
static int alive[DESCRIPTORS], alive_count; /* for broadcasts */
static int ep;
static char chunk[CHUNK], answer[ANSWER];
static enum { ECHO, LINES, FRAMED, SINK, SOURCE, BROADCAST } work;

static void drop(int fd) {
    free(conns[fd].data);
    memset(&conns[fd], 0, sizeof conns[fd]);
    for (int i = 0; i < alive_count; i++)
        if (alive[i] == fd) {
            alive[i] = alive[--alive_count];
            break;
        }
    close(fd);
}

/* Waits in the kernel's queue for those who do not read. */
static void put(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) continue;
        if (n < 0) return;
        data += n;
        size -= (size_t)n;
    }
}

static void push(int fd) {
    while (send(fd, chunk, sizeof chunk, MSG_NOSIGNAL) > 0) {
    }
}

/* How much of `data` is whole messages; what they are answered by is appended to `answer`. */
static size_t messages(char *data, size_t size, size_t *answered) {
    size_t at = 0;
    *answered = 0;
    if (work == FRAMED) {
        uint32_t length;
        while (size - at >= 4) {
            memcpy(&length, data + at, 4);
            length = ntohl(length);
            if (length > CHUNK || size - at < 4 + length) break;
            at += 4 + length;
        }
        memcpy(answer, data, at);
        *answered = at;
    } else if (work == LINES) {
        char *end;
        while ((end = memchr(data + at, '\n', size - at))) {
            at = (size_t)(end + 1 - data);
            memcpy(answer + *answered, PONG, sizeof PONG - 1);
            *answered += sizeof PONG - 1;
        }
    } else {
        char *end = memrchr(data, '\n', size);
        at = end ? (size_t)(end + 1 - data) : 0;
    }
    return at;
}

static void take(int fd, size_t n) {
    struct conn *c = &conns[fd];
    char *data = chunk;
    size_t size = n, answered;
    if (c->have) {
        c->data = realloc(c->data, c->have + n);
        memcpy(c->data + c->have, chunk, n);
        data = c->data;
        size = c->have + n;
    }
    size_t whole = messages(data, size, &answered);
    if (work == BROADCAST)
        for (int i = 0; i < alive_count; i++) put(alive[i], data, whole);
    else if (answered)
        put(fd, answer, answered);
    if (whole < size) {
        char *rest = malloc(size - whole);
        memcpy(rest, data + whole, size - whole);
        free(c->data);
        c->data = rest;
    }
    c->have = size - whole;
}

static void readable(int fd, int hangup) {
    for (;;) {
        ssize_t n = recv(fd, chunk, sizeof chunk, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            drop(fd);
            return;
        }
        if (work == ECHO) put(fd, chunk, (size_t)n);
        else if (work != SINK && work != SOURCE) take(fd, (size_t)n);
        /* No further edge comes for an end that is behind this already. */
        if ((size_t)n < sizeof chunk && !hangup) return;
    }
}

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                    .data.fd = fd};
        if (fd >= DESCRIPTORS || epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event)) close(fd);
        else alive[alive_count++] = fd;
    }
}

int main(int argc, char **argv) {
    static const char *works[] = {"echo", "lines", "framed", "sink", "source", "broadcast"};
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    struct epoll_event event = {.events = EPOLLIN}, events[EVENTS];
    struct rlimit files;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    size_t chosen = 0;
    while (chosen < 6 && (argc < 3 || strcmp(argv[2], works[chosen]))) chosen++;
    if (chosen == 6) {
        fprintf(stderr, "floor loop WORK: see the head of floor.c\n");
        return 2;
    }
    work = (int)chosen;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) return 1;
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    ep = epoll_create1(0);
    event.data.fd = listener;
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(ep, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                accept_all(listener);
                continue;
            }
            if (work == SOURCE && events[i].events & EPOLLOUT) push(fd);
            int hangup = events[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
            if (hangup || events[i].events & EPOLLIN) readable(fd, hangup);
        }
    }
}
