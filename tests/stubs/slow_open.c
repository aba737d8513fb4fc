/* Makes opening a file wait, as a metadata server of a parallel file system does: for LD_PRELOAD.
 *
 * Files whose path begins with $SLOW_OPEN_UNDER take $SLOW_OPEN_US microseconds more to open, whoever opens them: Python,
 * TensorFlow, or a thread of theirs. Both are read at each call, so a program can turn it on and off.
 *
 *     cc -shared -fPIC -O2 -o libslow_open.so slow_open.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void wait_for(const char *path) {
    const char *under = getenv("SLOW_OPEN_UNDER"), *us = getenv("SLOW_OPEN_US");
    if (path && under && us && *under && strncmp(path, under, strlen(under)) == 0) usleep((useconds_t)atoi(us));
}

#define MODE(last)                                   \
    mode_t mode = 0;                                 \
    if (flags & (O_CREAT | __O_TMPFILE)) {           \
        va_list rest;                                \
        va_start(rest, last);                        \
        mode = va_arg(rest, mode_t);                 \
        va_end(rest);                                \
    }

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        static int (*real)(const char *, int, ...);                                  \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);  \
        MODE(flags)                                                                  \
        wait_for(path);                                                              \
        return real(path, flags, mode);                                              \
    }

#define OPENAT(name)                                                                          \
    int name(int at, const char *path, int flags, ...) {                                      \
        static int (*real)(int, const char *, int, ...);                                      \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name);      \
        MODE(flags)                                                                           \
        wait_for(path);                                                                       \
        return real(at, path, flags, mode);                                                   \
    }

#define FOPEN(name)                                                                            \
    FILE *name(const char *path, const char *how) {                                            \
        static FILE *(*real)(const char *, const char *);                                      \
        if (!real) real = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, #name);    \
        wait_for(path);                                                                        \
        return real(path, how);                                                                \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)
