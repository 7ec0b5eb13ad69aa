/* Counts the calls of libc that write below some folders, and fails one of them, or kills the process at it.
 *
 * Built and preloaded (LD_PRELOAD) by tests/faults/shim.py. The state lies in the file $FAULT_SHIM_STATE, so that a
 * process, its forks and the programs that it starts share one count, which outlives a killed process. Calls count that
 * name a path below a prefix, or a descriptor of one: standard output, pipes and sockets don't.
 *
 * A failed call does nothing. With `persists`, every later call that takes room on the disk fails too, as on a full
 * disk, where renaming and removing still work. glibc's own stdio writes by inner functions that can't be replaced, so
 * its fwrite, fflush and fclose are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define PREFIXES 4096
#define LOG (16 << 20)

struct state {
    atomic_long count;  /* calls so far */
    atomic_long logged; /* bytes of `log` so far */
    long number;        /* the call that is struck; 0: none */
    int error;          /* its errno; 0: SIGKILL */
    int persists;
    atomic_int armed, struck;
    char prefixes[PREFIXES]; /* each ends with NUL, the last is empty */
    char log[LOG];           /* a line a call: its name and path */
};
static struct state *state;

enum kind { GROWS, CHANGES }; /* takes room on the disk, or changes what is there */

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULT_SHIM_STATE");
    int file = path == NULL ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return;
    void *place = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (place != MAP_FAILED) state = place;
    syscall(SYS_close, file);
}

/* For tests/faults/shim.py: the size of the state file; begin to count anew; stop; what was counted. */
long shim_size(void) { return sizeof *state; }

void shim_arm(const char *prefixes, long size, long number, int error, int persists) {
    atomic_store(&state->armed, 0);
    memset(state->prefixes, 0, PREFIXES);
    memcpy(state->prefixes, prefixes, size < PREFIXES - 1 ? size : PREFIXES - 2);
    memset(state->log, 0, atomic_load(&state->logged) < LOG ? atomic_load(&state->logged) : LOG);
    state->number = number, state->error = error, state->persists = persists;
    atomic_store(&state->count, 0), atomic_store(&state->logged, 0), atomic_store(&state->struck, 0);
    atomic_store(&state->armed, 1);
}

void shim_disarm(void) { atomic_store(&state->armed, 0); }
long shim_count(void) { return atomic_load(&state->count); }
int shim_struck(void) { return atomic_load(&state->struck); }
const char *shim_log(void) { return state->log; }

static int below_a_prefix(const char *path) {
    for (const char *prefix = state->prefixes; *prefix; prefix += strlen(prefix) + 1) {
        size_t length = strlen(prefix);
        if (strncmp(path, prefix, length) == 0 && (path[length] == '/' || path[length] == 0)) return 1;
    }
    return 0;
}

static void note(const char *call, const char *path) {
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    long place = atomic_fetch_add(&state->logged, length);
    if (place + length < LOG) memcpy(state->log + place, line, length);
}

/* The errno that a call must fail with, or 0. */
static int strikes(enum kind kind, const char *call, const char *path) {
    if (!below_a_prefix(path)) return 0;
    long number = atomic_fetch_add(&state->count, 1) + 1;
    note(call, path);
    if (number == state->number) {
        atomic_store(&state->struck, 1);
        if (state->error == 0) {
            kill(getpid(), SIGKILL);
            for (;;) pause();
        }
        return state->error;
    }
    return state->persists && kind == GROWS && state->number > 0 && number > state->number ? state->error : 0;
}

static int fails(enum kind kind, const char *call, const char *path) {
    int kept = errno, error = strikes(kind, call, path);
    errno = error ? error : kept;
    return error;
}

static int descriptor_fails(enum kind kind, const char *call, int file) {
    if (state == NULL || !atomic_load(&state->armed)) return 0;
    char link[32], path[PATH_MAX];
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length <= 0 || path[0] != '/') return 0;
    path[length] = 0;
    return fails(kind, call, path);
}

static int path_fails(enum kind kind, const char *call, int folder, const char *path) {
    if (state == NULL || !atomic_load(&state->armed) || path == NULL) return 0;
    char whole[2 * PATH_MAX], link[32];
    int kept = errno;
    ssize_t length = 0;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, whole, PATH_MAX);
        errno = kept;
        if (length <= 0) return 0;
        whole[length++] = '/';
    }
    snprintf(whole + length, sizeof whole - length, "%s", path);
    return fails(kind, call, whole);
}

#define REAL(result, name, ...)                                     \
    static result (*real)(__VA_ARGS__);                             \
    if (real == NULL) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* result name(parameters) { fail, or call the real one } */
#define BY_DESCRIPTOR(result, name, kind, file, types, parameters, arguments) \
    result name parameters {                                                  \
        REAL(result, name, types);                                            \
        if (descriptor_fails(kind, #name, file)) return -1;                   \
        return real arguments;                                                \
    }
#define TYPES(...) __VA_ARGS__

BY_DESCRIPTOR(ssize_t, write, GROWS, f, TYPES(int, const void *, size_t), (int f, const void *b, size_t n), (f, b, n))
BY_DESCRIPTOR(ssize_t, pwrite, GROWS, f, TYPES(int, const void *, size_t, off_t),
              (int f, const void *b, size_t n, off_t o), (f, b, n, o))
BY_DESCRIPTOR(ssize_t, pwrite64, GROWS, f, TYPES(int, const void *, size_t, off64_t),
              (int f, const void *b, size_t n, off64_t o), (f, b, n, o))
BY_DESCRIPTOR(ssize_t, writev, GROWS, f, TYPES(int, const struct iovec *, int),
              (int f, const struct iovec *v, int n), (f, v, n))
BY_DESCRIPTOR(ssize_t, pwritev, GROWS, f, TYPES(int, const struct iovec *, int, off_t),
              (int f, const struct iovec *v, int n, off_t o), (f, v, n, o))
BY_DESCRIPTOR(ssize_t, pwritev64, GROWS, f, TYPES(int, const struct iovec *, int, off64_t),
              (int f, const struct iovec *v, int n, off64_t o), (f, v, n, o))
BY_DESCRIPTOR(ssize_t, pwritev2, GROWS, f, TYPES(int, const struct iovec *, int, off_t, int),
              (int f, const struct iovec *v, int n, off_t o, int g), (f, v, n, o, g))
BY_DESCRIPTOR(ssize_t, pwritev64v2, GROWS, f, TYPES(int, const struct iovec *, int, off64_t, int),
              (int f, const struct iovec *v, int n, off64_t o, int g), (f, v, n, o, g))
BY_DESCRIPTOR(ssize_t, sendfile, GROWS, f, TYPES(int, int, off_t *, size_t),
              (int f, int i, off_t *o, size_t n), (f, i, o, n))
BY_DESCRIPTOR(ssize_t, sendfile64, GROWS, f, TYPES(int, int, off64_t *, size_t),
              (int f, int i, off64_t *o, size_t n), (f, i, o, n))
BY_DESCRIPTOR(ssize_t, copy_file_range, GROWS, f, TYPES(int, off64_t *, int, off64_t *, size_t, unsigned),
              (int i, off64_t *p, int f, off64_t *q, size_t n, unsigned g), (i, p, f, q, n, g))
BY_DESCRIPTOR(ssize_t, splice, GROWS, f, TYPES(int, off64_t *, int, off64_t *, size_t, unsigned),
              (int i, off64_t *p, int f, off64_t *q, size_t n, unsigned g), (i, p, f, q, n, g))
BY_DESCRIPTOR(int, ftruncate, GROWS, f, TYPES(int, off_t), (int f, off_t n), (f, n))
BY_DESCRIPTOR(int, ftruncate64, GROWS, f, TYPES(int, off64_t), (int f, off64_t n), (f, n))
BY_DESCRIPTOR(int, fallocate, GROWS, f, TYPES(int, int, off_t, off_t), (int f, int m, off_t o, off_t n), (f, m, o, n))
BY_DESCRIPTOR(int, fallocate64, GROWS, f, TYPES(int, int, off64_t, off64_t),
              (int f, int m, off64_t o, off64_t n), (f, m, o, n))
BY_DESCRIPTOR(int, fsync, CHANGES, f, TYPES(int), (int f), (f))
BY_DESCRIPTOR(int, fdatasync, CHANGES, f, TYPES(int), (int f), (f))

/* These two return the error number. */
int posix_fallocate(int file, off_t offset, off_t size) {
    REAL(int, posix_fallocate, int, off_t, off_t);
    int error = descriptor_fails(GROWS, "posix_fallocate", file);
    return error ? error : real(file, offset, size);
}
int posix_fallocate64(int file, off64_t offset, off64_t size) {
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    int error = descriptor_fails(GROWS, "posix_fallocate64", file);
    return error ? error : real(file, offset, size);
}

#define BY_PATH(name, kind, folder, path, types, parameters, arguments)   \
    int name parameters {                                                 \
        REAL(int, name, types);                                           \
        if (path_fails(kind, #name, folder, path)) return -1;             \
        return real arguments;                                            \
    }

/* A folder that is there is no write: the call says so, as it does on a full disk. */
static int mkdir_fails(const char *call, int folder, const char *path) {
    int kept = errno, is_new = syscall(SYS_faccessat, folder, path, F_OK) != 0;
    errno = kept;
    return is_new && path_fails(GROWS, call, folder, path);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return mkdir_fails("mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    return mkdir_fails("mkdirat", folder, path) ? -1 : real(folder, path, mode);
}
BY_PATH(link, GROWS, AT_FDCWD, q, TYPES(const char *, const char *), (const char *p, const char *q), (p, q))
BY_PATH(linkat, GROWS, g, q, TYPES(int, const char *, int, const char *, int),
        (int f, const char *p, int g, const char *q, int flags), (f, p, g, q, flags))
BY_PATH(symlink, GROWS, AT_FDCWD, q, TYPES(const char *, const char *), (const char *p, const char *q), (p, q))
BY_PATH(symlinkat, GROWS, f, q, TYPES(const char *, int, const char *), (const char *p, int f, const char *q), (p, f, q))
BY_PATH(truncate, CHANGES, AT_FDCWD, p, TYPES(const char *, off_t), (const char *p, off_t n), (p, n))
BY_PATH(truncate64, CHANGES, AT_FDCWD, p, TYPES(const char *, off64_t), (const char *p, off64_t n), (p, n))
BY_PATH(rename, CHANGES, AT_FDCWD, q, TYPES(const char *, const char *), (const char *p, const char *q), (p, q))
BY_PATH(renameat, CHANGES, g, q, TYPES(int, const char *, int, const char *),
        (int f, const char *p, int g, const char *q), (f, p, g, q))
BY_PATH(renameat2, CHANGES, g, q, TYPES(int, const char *, int, const char *, unsigned),
        (int f, const char *p, int g, const char *q, unsigned flags), (f, p, g, q, flags))

/* Opening counts if it may make or empty a file; it takes room if the file is new. */
static int open_fails(const char *call, int folder, const char *path, int flags) {
    if ((flags & (O_CREAT | O_TRUNC)) == 0 && (flags & O_TMPFILE) != O_TMPFILE) return 0;
    int kept = errno, is_new = syscall(SYS_faccessat, folder, path, F_OK) != 0;
    errno = kept;
    return path_fails(is_new ? GROWS : CHANGES, call, folder, path);
}

#define MODE(last)                       \
    va_list list;                        \
    va_start(list, last);                \
    mode_t mode = va_arg(list, mode_t);  \
    va_end(list)

int open(const char *path, int flags, ...) {
    REAL(int, open, const char *, int, ...);
    MODE(flags);
    return open_fails("open", AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(int, open64, const char *, int, ...);
    MODE(flags);
    return open_fails("open64", AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    REAL(int, openat, int, const char *, int, ...);
    MODE(flags);
    return open_fails("openat", folder, path, flags) ? -1 : real(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    REAL(int, openat64, int, const char *, int, ...);
    MODE(flags);
    return open_fails("openat64", folder, path, flags) ? -1 : real(folder, path, flags, mode);
}
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int mode_flags(const char *mode) {
    return mode[0] == 'w' ? O_CREAT | O_TRUNC : mode[0] == 'a' ? O_CREAT : 0;
}
FILE *fopen(const char *path, const char *mode) {
    REAL(FILE *, fopen, const char *, const char *);
    return open_fails("fopen", AT_FDCWD, path, mode_flags(mode)) ? NULL : real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(FILE *, fopen64, const char *, const char *);
    return open_fails("fopen64", AT_FDCWD, path, mode_flags(mode)) ? NULL : real(path, mode);
}
size_t fwrite(const void *bytes, size_t size, size_t count, FILE *stream) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    return descriptor_fails(GROWS, "fwrite", fileno(stream)) ? 0 : real(bytes, size, count, stream);
}
int fflush(FILE *stream) {
    REAL(int, fflush, FILE *);
    int pending = stream != NULL && __fpending(stream) > 0;
    return pending && descriptor_fails(GROWS, "fflush", fileno(stream)) ? EOF : real(stream);
}
int fclose(FILE *stream) {
    REAL(int, fclose, FILE *);
    int error = __fpending(stream) > 0 ? descriptor_fails(GROWS, "fclose", fileno(stream)) : 0;
    if (error) __fpurge(stream);
    int result = real(stream);
    if (error) errno = error;
    return error ? EOF : result;
}
