/*
 * The load generator: one thread, one epoll, so that a server is never measured against a client
 * that is slower than itself. driver.py builds it, twice if it finds OpenSSL: where it cannot,
 * load.py does the same in Python, and is too slow to saturate a server.
 *
 *     load KIND NAME=VALUE...
 *
 *     echo       `conns` connections, of which `active` send `pipeline` messages of `size` bytes in
 *                a burst, and the next burst when all of it is answered; framing=raw, length (four
 *                bytes in front) or line (answered by +PONG)
 *     connect    `conns` at a time: connect, one message and its answer, close
 *     sink       `conns` connections are written to, as fast as they take it
 *     source     `conns` connections are read from
 *     broadcast  one message of `size` bytes at a time, to `conns` connections
 *     hold       `conns` connections, one after another, that do nothing once they were answered:
 *                says "ready", and ends when stdin does
 *
 * All take port, pid (the server's, whose CPU time is read at both ends of the window), seconds and
 * warmup. echo and connect take tls=1, if built with -DTLS -lssl -lcrypto; sessions are new. The
 * result is one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/ssl.h>
#endif

enum { EVENTS = 512, CHUNK = 1 << 18, BLOCK = 65536, PATIENCE_MS = 20000 };

static const char PONG[] = "+PONG\r\n";

static struct {
    const char *kind, *framing;
    long port, pid, conns, active, size, pipeline, tls;
    double seconds, warmup;
} opt = {.framing = "raw", .conns = 1, .active = -1, .size = 64, .pipeline = 1,
         .seconds = 1, .warmup = 0.2};

struct conn {
    int fd;
    long waiting;     /* bytes of the answer that have not come */
    uint64_t begun;   /* when the request was sent, ns */
#ifdef TLS
    SSL *tls;         /* if there is any */
#endif
};

static int ep;
static char scratch[CHUNK];

/* The window: counted and timed only inside it. */
static uint32_t *samples; /* ns / 10 */
static size_t sample_count, sample_room;
static uint64_t done;     /* requests, deliveries or bytes */

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double cpu_of(pid_t pid) {
    clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;
    struct timespec t;
    if (pid && clock_getcpuclockid(pid, &clock)) fail("no process %d", (int)pid);
    if (clock_gettime(clock, &t)) fail("no CPU time of process %d", (int)pid);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void note(uint64_t began) {
    if (sample_count == sample_room) {
        sample_room = sample_room ? 2 * sample_room : 1 << 16;
        samples = realloc(samples, sample_room * sizeof *samples);
        if (!samples) fail("out of memory");
    }
    uint64_t tens = (now() - began) / 10;
    samples[sample_count++] = tens > UINT32_MAX ? UINT32_MAX : (uint32_t)tens;
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Microseconds. */
static double percentile(double share) {
    if (!sample_count) return 0;
    size_t at = (size_t)((double)sample_count * share);
    return samples[at < sample_count ? at : sample_count - 1] / 100.0;
}

static int open_socket(int flags) {
    int fd = socket(AF_INET, SOCK_STREAM | flags, 0), one = 1;
    if (fd < 0) fail("socket: %s", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static struct sockaddr_in server_address(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void set_blocking(int fd, int blocking) {
    fcntl(fd, F_SETFL, blocking ? 0 : O_NONBLOCK);
}

static void watch(struct conn *c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl: %s", strerror(errno));
}

/* Blocking, but not for ever. */
static int connected(void) {
    struct sockaddr_in address = server_address();
    struct timeval patience = {.tv_sec = PATIENCE_MS / 1000};
    int fd = open_socket(0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        fail("connect: %s", strerror(errno));
    return fd;
}

#ifdef TLS
static SSL_CTX *context;

static void begin_tls(struct conn *c) {
    if (!context) {
        context = SSL_CTX_new(TLS_client_method());
        if (!context) fail("no TLS");
        /* A record and what comes around it by one read. */
        SSL_CTX_set_read_ahead(context, 1);
        SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE);
        SSL_CTX_set_mode(context, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    }
    c->tls = SSL_new(context);
    if (!c->tls || !SSL_set_fd(c->tls, c->fd)) fail("out of memory");
}

/* As a system call would: -1 with EAGAIN where it has to wait, 0 at the end. */
static ssize_t tls_result(struct conn *c, int result) {
    if (result > 0) return result;
    int why = SSL_get_error(c->tls, result);
    if (why == SSL_ERROR_ZERO_RETURN) return 0;
    if (why != SSL_ERROR_WANT_READ && why != SSL_ERROR_WANT_WRITE) {
        if (why != SSL_ERROR_SYSCALL || !errno) errno = EPROTO;
        return -1;
    }
    errno = EAGAIN;
    return -1;
}
#endif

static ssize_t put(struct conn *c, const char *data, size_t size) {
#ifdef TLS
    if (c->tls) return tls_result(c, SSL_write(c->tls, data, (int)size));
#endif
    return send(c->fd, data, size, MSG_NOSIGNAL);
}

static ssize_t get(struct conn *c, char *data, size_t size) {
#ifdef TLS
    if (c->tls) return tls_result(c, SSL_read(c->tls, data, (int)size));
#endif
    return recv(c->fd, data, size, 0);
}

static void send_whole(struct conn *c, const char *data, size_t size) {
    while (size) {
        ssize_t n = put(c, data, size);
        if (n < 0 && errno == EAGAIN) {
            struct pollfd room = {.fd = c->fd, .events = POLLOUT};
            if (!poll(&room, 1, PATIENCE_MS)) fail("nothing is read within %d ms", PATIENCE_MS);
            continue;
        }
        if (n <= 0) fail("send: %s", strerror(errno));
        data += n;
        size -= (size_t)n;
    }
}

/* What is there; how many bytes came, 0 if none has. */
static size_t receive(struct conn *c) {
    size_t got = 0;
    int more;
    do {
        ssize_t n = get(c, scratch, sizeof scratch);
        if (!n) fail("the server closed a connection");
        if (n < 0 && errno != EAGAIN) fail("recv: %s", strerror(errno));
        more = 0;
        if (n > 0) {
            got += (size_t)n;
#ifdef TLS
            /* No event tells of what OpenSSL has left. */
            more = c->tls && SSL_has_pending(c->tls);
#endif
        }
    } while (more);
    return got;
}

static struct conn *connect_all(void) {
    struct conn *conns = calloc((size_t)opt.conns, sizeof *conns);
    if (!conns) fail("out of memory");
    for (long i = 0; i < opt.conns; i++) {
        conns[i].fd = connected();
#ifdef TLS
        if (opt.tls) {
            begin_tls(&conns[i]);
            if (SSL_connect(conns[i].tls) != 1) fail("the handshake failed");
        }
#endif
    }
    return conns;
}

/* Runs `step` on ready connections until `until`, or while `more` says so after that. */
static void run(uint64_t until, void (*step)(struct conn *, uint32_t), int (*more)(void)) {
    struct epoll_event events[EVENTS];
    while (more ? more() : now() < until) {
        int n = epoll_wait(ep, events, EVENTS, more ? PATIENCE_MS : 100);
        if (more && !n) fail("no answer within %d ms", PATIENCE_MS);
        for (int i = 0; i < n; i++) step(events[i].data.ptr, events[i].events);
    }
}

static void measure(void (*step)(struct conn *, uint32_t)) {
    run(now() + (uint64_t)(opt.warmup * 1e9), step, NULL);
    sample_count = 0;
    done = 0;
    double server = opt.pid ? cpu_of((pid_t)opt.pid) : 0, own = cpu_of(0);
    uint64_t begun = now();
    run(begun + (uint64_t)(opt.seconds * 1e9), step, NULL);
    double seconds = (double)(now() - begun) / 1e9;
    uint64_t count = done;
    server = opt.pid ? cpu_of((pid_t)opt.pid) - server : 0;
    own = cpu_of(0) - own;
    qsort(samples, sample_count, sizeof *samples, by_value);
    printf("{\"count\": %llu, \"seconds\": %.6f, \"server_cpu\": %.9f, \"load_cpu\": %.9f, "
           "\"p50\": %.2f, \"p99\": %.2f}\n",
           (unsigned long long)count, seconds, server, own, percentile(0.5), percentile(0.99));
    fflush(stdout);
}

/* -- echo */

static char *burst;
static size_t burst_size;
static long answer_size;
static long in_flight;
static int stopping;

static void make_burst(void) {
    size_t unit = (size_t)opt.size, head = 0;
    int line = !strcmp(opt.framing, "line");
    if (!strcmp(opt.framing, "length")) head = 4;
    burst_size = (unit + head) * (size_t)opt.pipeline;
    burst = malloc(burst_size);
    if (!burst) fail("out of memory");
    for (long i = 0; i < opt.pipeline; i++) {
        char *at = burst + (unit + head) * (size_t)i;
        uint32_t length = htonl((uint32_t)unit);
        if (head) memcpy(at, &length, 4);
        /* Each another, so that a wrong order shows. */
        memset(at + head, 'a' + (int)(i % 26), unit);
        if (line) memcpy(at + unit - 2, "\r\n", 2);
    }
    answer_size = line ? (long)(sizeof PONG - 1) * opt.pipeline : (long)burst_size;
}

static void ask(struct conn *c) {
    c->waiting = answer_size;
    c->begun = now();
    in_flight++;
    send_whole(c, burst, burst_size);
}

static void echo_step(struct conn *c, uint32_t events) {
    (void)events;
    c->waiting -= (long)receive(c);
    if (c->waiting > 0) return;
    if (c->waiting < 0) fail("the server answered too much");
    note(c->begun);
    in_flight--;
    done += (uint64_t)opt.pipeline;
    if (!stopping) ask(c);
}

static int has_in_flight(void) { return in_flight > 0; }

/* Once each, so that the server has all of them and does what it is measured for. */
static void check_echo(struct conn *c) {
    size_t got = 0;
    char *answer = malloc((size_t)answer_size);
    if (!answer) fail("out of memory");
    send_whole(c, burst, burst_size);
    while (got < (size_t)answer_size) {
        ssize_t n = get(c, answer + got, (size_t)answer_size - got);
        if (n <= 0) fail("no answer: %s", n ? strerror(errno) : "closed");
        got += (size_t)n;
    }
    int right = strcmp(opt.framing, "line") ? !memcmp(answer, burst, burst_size)
                                            : !memcmp(answer, PONG, sizeof PONG - 1);
    if (!right) fail("a wrong answer");
    free(answer);
}

static void echo(void) {
    struct conn *conns = connect_all();
    make_burst();
    if (opt.active < 0 || opt.active > opt.conns) opt.active = opt.conns;
    for (long i = 0; i < opt.conns; i++) {
        check_echo(&conns[i]);
        set_blocking(conns[i].fd, 0);
    }
    /* The active ones are spread among the others. */
    for (long i = 0; i < opt.active; i++) watch(&conns[i * (opt.conns / opt.active)], EPOLLIN);
    for (long i = 0; i < opt.active; i++) ask(&conns[i * (opt.conns / opt.active)]);
    measure(echo_step);
    /* To close with an answer unread would be a reset. */
    stopping = 1;
    run(0, echo_step, has_in_flight);
}

/* -- connect */

enum { UNCONNECTED = -1, SHAKING_HANDS = -2 }; /* instead of what it waits for */

static void begin(struct conn *c) {
    struct sockaddr_in address = server_address();
    c->fd = open_socket(SOCK_NONBLOCK);
    c->waiting = UNCONNECTED;
    c->begun = now();
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    watch(c, EPOLLOUT | EPOLLIN | EPOLLET);
}

/* Whether it is connected, and its handshake is done. */
static int opened(struct conn *c, uint32_t events) {
    if (c->waiting == UNCONNECTED) {
        if (!(events & EPOLLOUT)) return 0;
        c->waiting = SHAKING_HANDS;
#ifdef TLS
        if (opt.tls) begin_tls(c);
#endif
    }
#ifdef TLS
    if (c->tls) {
        int result = SSL_connect(c->tls);
        if (tls_result(c, result) <= 0 && errno != EAGAIN) fail("the handshake failed");
        return result == 1;
    }
#endif
    return 1;
}

static void connect_step(struct conn *c, uint32_t events) {
    if (c->waiting < 0) {
        if (!opened(c, events)) return;
        c->waiting = (long)burst_size;
        send_whole(c, burst, burst_size);
        return;
    }
    c->waiting -= (long)receive(c);
    if (c->waiting > 0) return;
    if (c->waiting < 0) fail("the server answered too much");
#ifdef TLS
    if (c->tls) {
        SSL_shutdown(c->tls);
        SSL_free(c->tls);
        c->tls = NULL;
    }
#endif
    close(c->fd);
    note(c->begun);
    done++;
    if (!stopping) begin(c);
    else in_flight--;
}

static void connects(void) {
    struct conn *conns = calloc((size_t)opt.conns, sizeof *conns);
    if (!conns) fail("out of memory");
    make_burst();
    in_flight = opt.conns;
    for (long i = 0; i < opt.conns; i++) begin(&conns[i]);
    measure(connect_step);
    stopping = 1;
    run(0, connect_step, has_in_flight);
}

/* -- bulk, one way */

static char block[BLOCK];

static void sink_step(struct conn *c, uint32_t events) {
    (void)events;
    ssize_t n = send(c->fd, block, sizeof block, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) fail("send: %s", strerror(errno));
    if (n > 0) done += (uint64_t)n;
}

static void source_step(struct conn *c, uint32_t events) {
    (void)events;
    done += receive(c);
}

static void bulk(int writing) {
    struct conn *conns = connect_all();
    for (long i = 0; i < opt.conns; i++) {
        set_blocking(conns[i].fd, 0);
        watch(&conns[i], writing ? EPOLLOUT : EPOLLIN);
    }
    measure(writing ? sink_step : source_step);
}

/* -- broadcast */

static struct conn *crowd;
static uint64_t sent_at;
static long to_come; /* deliveries of the message that is on its way */
static long turn;
static int counting;

static void say(void) {
    /* Each client in its turn. */
    struct conn *sender = &crowd[turn++ % opt.conns];
    for (long i = 0; i < opt.conns; i++) crowd[i].waiting = opt.size;
    to_come = opt.conns;
    sent_at = now();
    send_whole(sender, burst, burst_size);
}

static void broadcast_step(struct conn *c, uint32_t events) {
    (void)events;
    c->waiting -= (long)receive(c);
    if (c->waiting > 0) return;
    if (c->waiting < 0) fail("a message too many");
    if (counting) note(sent_at);
    done++;
    if (!--to_come && !stopping) say();
}

static int has_to_come(void) { return to_come > 0; }

/* Says something until everybody hears it: then the server has them all. */
static void meet(void) {
    struct epoll_event events[EVENTS];
    for (int attempt = 0; attempt < 100; attempt++) {
        long heard = 0;
        int n;
        send_whole(&crowd[opt.conns - 1], burst, burst_size);
        while ((n = epoll_wait(ep, events, EVENTS, 200)) > 0)
            for (int i = 0; i < n; i++)
                heard += (long)receive(events[i].data.ptr);
        if (heard == opt.conns * opt.size) return;
    }
    fail("the server does not broadcast to all");
}

static void broadcast(void) {
    opt.framing = "raw";
    opt.pipeline = 1;
    make_burst();
    burst[burst_size - 1] = '\n';
    crowd = connect_all();
    for (long i = 0; i < opt.conns; i++) {
        set_blocking(crowd[i].fd, 0);
        watch(&crowd[i], EPOLLIN);
    }
    meet();
    counting = 1;
    say();
    measure(broadcast_step);
    stopping = 1;
    run(0, broadcast_step, has_to_come);
}

static void hold(void) {
    make_burst();
    /* One after another: a server that has to take thousands at once needs memory for that, which
       it keeps, and which is not theirs. */
    for (long i = 0; i < opt.conns; i++) {
        struct conn one = {.fd = connected()};
        check_echo(&one);
    }
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF) {
    }
}

static void parse(int argc, char **argv) {
    if (argc < 2) fail("load KIND NAME=VALUE...: see the head of load.c");
    opt.kind = argv[1];
    for (int i = 2; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value) fail("%s: pass NAME=VALUE", argv[i]);
        *value++ = 0;
        if (!strcmp(argv[i], "framing")) opt.framing = value;
        else if (!strcmp(argv[i], "port")) opt.port = atol(value);
        else if (!strcmp(argv[i], "pid")) opt.pid = atol(value);
        else if (!strcmp(argv[i], "conns")) opt.conns = atol(value);
        else if (!strcmp(argv[i], "active")) opt.active = atol(value);
        else if (!strcmp(argv[i], "size")) opt.size = atol(value);
        else if (!strcmp(argv[i], "pipeline")) opt.pipeline = atol(value);
        else if (!strcmp(argv[i], "seconds")) opt.seconds = atof(value);
        else if (!strcmp(argv[i], "tls")) opt.tls = atol(value);
        else if (!strcmp(argv[i], "warmup")) opt.warmup = atof(value);
        else fail("%s: no such name", argv[i]);
    }
    if (opt.port < 1 || opt.conns < 1 || opt.size < 2 || opt.pipeline < 1)
        fail("port, conns and pipeline must be at least 1, size at least 2");
}

int main(int argc, char **argv) {
    struct rlimit files;
    /* OpenSSL writes as it likes. */
    signal(SIGPIPE, SIG_IGN);
    parse(argc, argv);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
#ifndef TLS
    if (opt.tls) fail("built without TLS");
#endif
    ep = epoll_create1(0);
    if (!strcmp(opt.kind, "echo")) echo();
    else if (!strcmp(opt.kind, "connect")) connects();
    else if (!strcmp(opt.kind, "sink")) bulk(1);
    else if (!strcmp(opt.kind, "source")) bulk(0);
    else if (!strcmp(opt.kind, "broadcast")) broadcast();
    else if (!strcmp(opt.kind, "hold")) hold();
    else fail("%s: no such kind", opt.kind);
    return 0;
}
