/* A system that fails: preloaded, it counts the calls of a process on files below one folder, and lets the n-th one fail.

Calls of Python, of torch and of Rust all pass here, as they are the C library's. What counts as which operation is in
``operation``; tests/failing/system.py has the same names in the same order. Nothing counts before ``arm``. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum operation { OPEN, CREATE, READ, WRITE, FSYNC, RENAME, MKDIR, UNLINK, STAT, LIST, LOCK, CONTROL, TRUNCATE, SEEK, SPACE, MAP,
                 MEMORY, THREAD, CONNECT, SEND, RECEIVE, OPERATIONS };

static char folder[PATH_MAX];
static size_t folder_length;
static atomic_int armed;
static unsigned operations; /* those that may fail, as bits */
static long failing_call;   /* the n-th of those, 0: none */
static int failure;         /* errno, or 0: the process is killed before the call */
static int goes_on;         /* whether all later ones fail as well */
static size_t least_tensor, least_memory; /* bytes of an allocation that counts: aligned, as those of torch, and any other */
static atomic_long calls, fallen, counts[OPERATIONS];
static atomic_uchar below[1 << 16]; /* descriptors of files below the folder */

void failing_arm(const char *where, unsigned which, long at, int error, int later, size_t tensor, size_t memory)
{
    folder_length = strlen(where);
    memcpy(folder, where, folder_length + 1);
    operations = which, failing_call = at, failure = error, goes_on = later, least_tensor = tensor, least_memory = memory;
    atomic_store(&armed, 1);
}

void failing_disarm(void) { atomic_store(&armed, 0); }
long failing_count(int which) { return atomic_load(&counts[which]); }
long failing_fallen(void) { return atomic_load(&fallen); }

static int fails(enum operation which)
{
    if (!atomic_load(&armed))
        return 0;
    atomic_fetch_add(&counts[which], 1);
    if (!(operations >> which & 1))
        return 0;
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (!failing_call || call < failing_call || (call > failing_call && !goes_on))
        return 0;
    if (!failure)
        kill(getpid(), SIGKILL);
    atomic_fetch_add(&fallen, 1);
    errno = failure;
    return 1;
}

static int is_below(const char *path)
{
    return folder_length && path && !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}
static int is_ours(int descriptor) { return descriptor >= 0 && descriptor < 1 << 16 && atomic_load(&below[descriptor]); }
static int at_ours(int at, const char *path) { return path && path[0] != '/' ? is_ours(at) : is_below(path); }
static int noted(int descriptor, int ours)
{
    if (descriptor >= 0 && descriptor < 1 << 16)
        atomic_store(&below[descriptor], ours && folder_length);
    return descriptor;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define PLAIN(which, ours, returns, name, parameters, arguments) \
    returns name parameters \
    { \
        REAL(name); \
        return (ours) && fails(which) ? (returns)-1 : real arguments; \
    }

static int opened(int (*real)(int, const char *, int, ...), int at, const char *path, int flags, mode_t mode)
{
    int ours = at_ours(at, path);
    if (ours && fails((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT) ? OPEN : CREATE))
        return -1;
    return noted(real(at, path, flags, mode), ours);
}
#define OPENING(name, parameters, at) \
    int name parameters \
    { \
        static int (*real)(int, const char *, int, ...); \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64"); \
        mode_t mode = 0; \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        return opened(real, at, path, flags, mode); \
    }
OPENING(open, (const char *path, int flags, ...), AT_FDCWD)
OPENING(open64, (const char *path, int flags, ...), AT_FDCWD)
OPENING(openat, (int at, const char *path, int flags, ...), at)
OPENING(openat64, (int at, const char *path, int flags, ...), at)

int close(int descriptor)
{
    REAL(close);
    noted(descriptor, 0);
    return real(descriptor);
}

PLAIN(READ, is_ours(fd), ssize_t, read, (int fd, void *data, size_t size), (fd, data, size))
PLAIN(READ, is_ours(fd), ssize_t, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
PLAIN(READ, is_ours(fd), ssize_t, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
PLAIN(READ, is_ours(fd), ssize_t, readv, (int fd, const struct iovec *data, int count), (fd, data, count))
PLAIN(WRITE, is_ours(fd), ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
PLAIN(WRITE, is_ours(fd), ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
PLAIN(WRITE, is_ours(fd), ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
PLAIN(WRITE, is_ours(fd), ssize_t, writev, (int fd, const struct iovec *data, int count), (fd, data, count))
PLAIN(FSYNC, is_ours(fd), int, fsync, (int fd), (fd))
PLAIN(FSYNC, is_ours(fd), int, fdatasync, (int fd), (fd))
PLAIN(RENAME, is_below(from) || is_below(to), int, rename, (const char *from, const char *to), (from, to))
PLAIN(RENAME, at_ours(in, from) || at_ours(out, to), int, renameat, (int in, const char *from, int out, const char *to),
      (in, from, out, to))
PLAIN(MKDIR, is_below(path), int, mkdir, (const char *path, mode_t mode), (path, mode))
PLAIN(MKDIR, at_ours(at, path), int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode))
PLAIN(UNLINK, is_below(path), int, unlink, (const char *path), (path))
PLAIN(UNLINK, is_below(path), int, rmdir, (const char *path), (path))
PLAIN(UNLINK, at_ours(at, path), int, unlinkat, (int at, const char *path, int flags), (at, path, flags))
PLAIN(STAT, is_below(path), int, stat, (const char *path, struct stat *found), (path, found))
PLAIN(STAT, is_below(path), int, stat64, (const char *path, struct stat64 *found), (path, found))
PLAIN(STAT, is_below(path), int, lstat, (const char *path, struct stat *found), (path, found))
PLAIN(STAT, is_below(path), int, lstat64, (const char *path, struct stat64 *found), (path, found))
PLAIN(STAT, is_ours(fd), int, fstat, (int fd, struct stat *found), (fd, found))
PLAIN(STAT, is_ours(fd), int, fstat64, (int fd, struct stat64 *found), (fd, found))
PLAIN(STAT, at_ours(at, path), int, fstatat, (int at, const char *path, struct stat *found, int flags), (at, path, found, flags))
PLAIN(STAT, at_ours(at, path), int, fstatat64, (int at, const char *path, struct stat64 *found, int flags),
      (at, path, found, flags))
PLAIN(STAT, *path ? at_ours(at, path) : is_ours(at), int, statx,
      (int at, const char *path, int flags, unsigned mask, struct statx *found), (at, path, flags, mask, found))
PLAIN(STAT, is_below(path), int, access, (const char *path, int how), (path, how))
PLAIN(STAT, is_below(path), ssize_t, readlink, (const char *path, char *to, size_t size), (path, to, size))
PLAIN(SPACE, is_below(path), int, statvfs, (const char *path, struct statvfs *found), (path, found))
PLAIN(SPACE, is_below(path), int, statvfs64, (const char *path, struct statvfs64 *found), (path, found))
PLAIN(LOCK, is_ours(fd), int, flock, (int fd, int how), (fd, how))
PLAIN(TRUNCATE, is_ours(fd), int, ftruncate, (int fd, off_t size), (fd, size))
PLAIN(TRUNCATE, is_ours(fd), int, ftruncate64, (int fd, off64_t size), (fd, size))
PLAIN(SEEK, is_ours(fd), off_t, lseek, (int fd, off_t at, int from), (fd, at, from))
PLAIN(SEEK, is_ours(fd), off64_t, lseek64, (int fd, off64_t at, int from), (fd, at, from))
PLAIN(CONNECT, 1, int, connect, (int fd, const struct sockaddr *to, socklen_t size), (fd, to, size))

/* A connection that fails once does not come back. */
#define CONNECTED(which, name, parameters, arguments) \
    ssize_t name parameters \
    { \
        REAL(name); \
        if (!fails(which)) \
            return real arguments; \
        int error = errno; \
        shutdown(fd, SHUT_RDWR); \
        errno = error; \
        return -1; \
    }
CONNECTED(SEND, send, (int fd, const void *data, size_t size, int flags), (fd, data, size, flags))
CONNECTED(RECEIVE, recv, (int fd, void *data, size_t size, int flags), (fd, data, size, flags))

#define CONTROLLING(name) \
    int name(int fd, int command, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        if (is_ours(fd) && (command == F_SETFL || command == F_GETFL) && fails(CONTROL)) \
            return -1; \
        int result = real(fd, command, argument); \
        return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? noted(result, is_ours(fd)) : result; \
    }
CONTROLLING(fcntl)
CONTROLLING(fcntl64)

DIR *opendir(const char *path)
{
    REAL(opendir);
    if (is_below(path) && fails(LIST))
        return NULL;
    DIR *stream = real(path);
    if (stream)
        noted(dirfd(stream), is_below(path));
    return stream;
}
int closedir(DIR *stream)
{
    REAL(closedir);
    noted(dirfd(stream), 0);
    return real(stream);
}
DIR *fdopendir(int fd)
{
    REAL(fdopendir);
    return is_ours(fd) && fails(LIST) ? NULL : real(fd);
}

struct dirent *readdir(DIR *stream)
{
    REAL(readdir);
    return is_ours(dirfd(stream)) && fails(LIST) ? NULL : real(stream);
}
struct dirent64 *readdir64(DIR *stream)
{
    REAL(readdir64);
    return is_ours(dirfd(stream)) && fails(LIST) ? NULL : real(stream);
}

#define MAPPING(name, offset) \
    void *name(void *address, size_t size, int protection, int flags, int fd, offset at) \
    { \
        REAL(name); \
        int counts = fd >= 0 ? is_ours(fd) : least_memory && size >= least_memory; \
        return counts && fails(fd >= 0 ? MAP : MEMORY) ? MAP_FAILED : real(address, size, protection, flags, fd, at); \
    }
MAPPING(mmap, off_t)
MAPPING(mmap64, off64_t)

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
static int lacks(size_t size) { return least_memory && size >= least_memory && fails(MEMORY); }
void *malloc(size_t size) { return lacks(size) ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return lacks(count * size) ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return lacks(size) ? NULL : __libc_realloc(old, size); }
void *aligned_alloc(size_t alignment, size_t size) { return lacks(size) ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void **found, size_t alignment, size_t size)
{
    if ((least_tensor && size >= least_tensor && fails(MEMORY)) || !(*found = __libc_memalign(alignment, size)))
        return ENOMEM;
    return 0;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *argument)
{
    REAL(pthread_create);
    return fails(THREAD) ? errno : real(thread, how, run, argument);
}
