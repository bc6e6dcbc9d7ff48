/* A disk that is slow or fails on command, for one process: preloaded, it stands before the C library.
 *
 * FAULTY_DISK names a file with two numbers: milliseconds that each write to a file of a database takes
 * ("….db", "….db-wal" and what is beside them), and the errno it fails with (0: it succeeds). The file is
 * read at every write; while it is missing the disk is well. With EROFS all file systems look read-only. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

static int is_database(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return strstr(path, ".db") != NULL;
}

static void read_control(long *delay_ms, long *error) {
  *delay_ms = *error = 0;
  const char *control = getenv("FAULTY_DISK");
  int file = control == NULL ? -1 : open(control, O_RDONLY | O_CLOEXEC);
  if (file < 0) return;
  char text[64] = {0};
  ssize_t length = read(file, text, sizeof text - 1);
  close(file);
  if (length <= 0 || sscanf(text, "%ld %ld", delay_ms, error) != 2) *delay_ms = *error = 0;
}

/* 0, or -1 with errno set. */
static int fault(int fd) {
  long delay_ms, error;
  if (!is_database(fd)) return 0;
  read_control(&delay_ms, &error);
  struct timespec delay = {delay_ms / 1000, (delay_ms % 1000) * 1000000};
  nanosleep(&delay, NULL);
  if (error == 0) return 0;
  errno = (int)error;
  return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
  return fault(fd) ? -1 : REAL(pwrite64)(fd, bytes, count, offset);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
  return fault(fd) ? -1 : REAL(pwrite)(fd, bytes, count, offset);
}

int fsync(int fd) { return fault(fd) ? -1 : REAL(fsync)(fd); }

int fdatasync(int fd) { return fault(fd) ? -1 : REAL(fdatasync)(fd); }

int statvfs64(const char *path, struct statvfs64 *found) {
  long delay_ms, error;
  int result = REAL(statvfs64)(path, found);
  read_control(&delay_ms, &error);
  if (result == 0 && error == EROFS) found->f_flag |= ST_RDONLY;
  return result;
}
