/*
 * A simulated NVML. The directory named by SIMULATED_NVML_DIR is the machine, and it is read anew
 * at every call, so that a test can change it while a server looks:
 *
 *   gpu0, gpu1, ...  key=value lines: uuid, name, total_mib, reserved_mib; optional: extra_used_mib,
 *                    fault (NVML error number), temperature_c, power_mw, utilization (percent)
 *   claims/ANY       one file per process, write-locked (fcntl, whole file) for as long as it lives
 *   fail_init        an NVML error number that initialising fails with
 *
 * A claim is "<uuid or index> <mib>\n" per GPU, then "sum <adler32 of all before, 8 hex digits>\n".
 * Its owner writes it whole and with a constant length. A reader that meets half of a write sees a
 * wrong sum and reads again. The kernel says whether the lock is held and by which PID, translated
 * into the reader's PID namespace (0 if it is not visible there: such memory has no process entry).
 *
 * A process does not see its own claims, because F_GETLK tells of other processes' locks only.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    VERSION_MISMATCH = 25,
    UNKNOWN = 999
};
enum { MAX_GPUS = 16, MAX_HOLDERS = 1024, FILE_BYTES = 4096, PATH_BYTES = 4096, READ_TRIES = 1000 };

typedef unsigned long long u64;
typedef struct device { char unused; } *device_t; /* only its address means something: the index */

typedef struct {
    char uuid[96], name[96];
    u64 total_mib, reserved_mib, extra_used_mib;
    unsigned fault, temperature_c, power_mw, utilization;
} gpu_t;

typedef struct { unsigned pid; u64 mib; } holder_t;
typedef struct { u64 used_mib; unsigned count; holder_t holders[MAX_HOLDERS]; } usage_t;

typedef struct { u64 total, free, used; } memory_v1_t;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned pid; u64 used; } process_v1_t;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process_v3_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned version, sensor; int celsius; } temperature_v1_t;
typedef struct {
    char legacy_bus_id[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_t;

static const unsigned MEMORY_V2 = sizeof(memory_v2_t) | 2u << 24;
static const unsigned TEMPERATURE_V1 = sizeof(temperature_v1_t) | 1u << 24;
static const u64 MIB = 1024 * 1024;

static struct device handles[MAX_GPUS];
static atomic_int users;

/* ---- files ---- */

static int path_of(char *path, const char *name) {
    const char *root = getenv("SIMULATED_NVML_DIR");
    return root && *root && snprintf(path, PATH_BYTES, "%s/%s", root, name) < PATH_BYTES;
}

/* Read up to FILE_BYTES - 1 bytes as a string; returns their number, or -1. */
static ssize_t read_fd(int fd, char *text) {
    ssize_t size = pread(fd, text, FILE_BYTES - 1, 0);
    text[size > 0 ? size : 0] = '\0';
    return size;
}

static ssize_t read_file(const char *name, char *text) {
    char path[PATH_BYTES];
    if (!path_of(path, name)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t size = read_fd(fd, text);
    close(fd);
    return size;
}

static void set_text(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static void set_key(gpu_t *gpu, const char *key, const char *value) {
    u64 number = strtoull(value, NULL, 10);
    if (!strcmp(key, "uuid")) set_text(gpu->uuid, sizeof gpu->uuid, value);
    else if (!strcmp(key, "name")) set_text(gpu->name, sizeof gpu->name, value);
    else if (!strcmp(key, "total_mib")) gpu->total_mib = number;
    else if (!strcmp(key, "reserved_mib")) gpu->reserved_mib = number;
    else if (!strcmp(key, "extra_used_mib")) gpu->extra_used_mib = number;
    else if (!strcmp(key, "fault")) gpu->fault = (unsigned)number;
    else if (!strcmp(key, "temperature_c")) gpu->temperature_c = (unsigned)number;
    else if (!strcmp(key, "power_mw")) gpu->power_mw = (unsigned)number;
    else if (!strcmp(key, "utilization")) gpu->utilization = (unsigned)number;
}

static int read_gpu(unsigned index, gpu_t *gpu) {
    char name[16], text[FILE_BYTES], *rest = text;
    snprintf(name, sizeof name, "gpu%u", index);
    if (index >= MAX_GPUS || read_file(name, text) <= 0) return 0;
    *gpu = (gpu_t){.temperature_c = 40, .power_mw = 20000};
    for (char *line; (line = strsep(&rest, "\n"));) {
        char *equals = strchr(line, '=');
        if (!equals) continue;
        *equals = '\0';
        set_key(gpu, line, equals + 1);
    }
    return 1;
}

/* ---- claims ---- */

static unsigned adler32(const char *text, size_t size) {
    unsigned a = 1, b = 0;
    for (size_t i = 0; i < size; i++) {
        a = (a + (unsigned char)text[i]) % 65521;
        b = (b + a) % 65521;
    }
    return b << 16 | a;
}

/* The PID of the lock's holder (0: not visible from here), or -1 if nobody holds it. */
static int lock_holder(int fd) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(fd, F_GETLK, &lock) || lock.l_type == F_UNLCK) return -1;
    return lock.l_pid > 0 ? lock.l_pid : 0;
}

/* Cut the sum off `text`; false if it is not the sum of what stands before it. */
static int take_sum(char *text, ssize_t size) {
    const ssize_t length = sizeof "sum 01234567\n" - 1;
    if (size < length || strncmp(text + size - length, "sum ", 4)) return 0;
    unsigned sum = (unsigned)strtoul(text + size - length + 4, NULL, 16);
    text[size - length] = '\0';
    return sum == adler32(text, (size_t)(size - length));
}

static u64 claimed_mib(char *text, const gpu_t *gpu, unsigned index) {
    char own_index[16];
    u64 mib = 0;
    snprintf(own_index, sizeof own_index, "%u", index);
    for (char *line; (line = strsep(&text, "\n"));) {
        char *space = strchr(line, ' ');
        if (!space) continue;
        *space = '\0';
        if (!strcmp(line, gpu->uuid) || !strcmp(line, own_index)) mib += strtoull(space + 1, NULL, 10);
    }
    return mib;
}

static int add_holder(usage_t *usage, unsigned pid, u64 mib) {
    unsigned i = 0;
    usage->used_mib += mib;
    if (!pid || !mib) return SUCCESS;
    while (i < usage->count && usage->holders[i].pid != pid) i++;
    if (i == MAX_HOLDERS) return UNKNOWN;
    if (i == usage->count) usage->holders[usage->count++] = (holder_t){.pid = pid};
    usage->holders[i].mib += mib;
    return SUCCESS;
}

static int add_claim(int fd, const gpu_t *gpu, unsigned index, usage_t *usage) {
    char text[FILE_BYTES];
    for (int tries = 0; tries < READ_TRIES; tries++) {
        int pid = lock_holder(fd);
        if (pid < 0) return SUCCESS;
        ssize_t size = read_fd(fd, text);
        if (size == 0) return SUCCESS; /* locked, and nothing claimed yet */
        if (take_sum(text, size)) return add_holder(usage, (unsigned)pid, claimed_mib(text, gpu, index));
        sched_yield();
    }
    return UNKNOWN;
}

static int read_usage(const gpu_t *gpu, unsigned index, usage_t *usage) {
    char path[PATH_BYTES];
    *usage = (usage_t){.used_mib = gpu->extra_used_mib};
    DIR *claims = path_of(path, "claims") ? opendir(path) : NULL;
    int result = claims ? SUCCESS : UNKNOWN;
    for (struct dirent *entry; result == SUCCESS && (entry = readdir(claims));) {
        if (entry->d_name[0] == '.') continue;
        int fd = openat(dirfd(claims), entry->d_name, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue; /* removed meanwhile */
        result = add_claim(fd, gpu, index, usage);
        close(fd);
    }
    if (claims) closedir(claims);
    return result;
}

/* ---- handles ---- */

static unsigned index_of(device_t device) { return (unsigned)(device - handles); }

static int find_gpu(device_t device, gpu_t *gpu) {
    if (!users) return UNINITIALIZED;
    if (device < handles || device >= handles + MAX_GPUS) return INVALID_ARGUMENT;
    return read_gpu(index_of(device), gpu) ? SUCCESS : INVALID_ARGUMENT;
}

/* Like find_gpu, for live readings: a fault raised on the GPU is the answer. */
static int find_live_gpu(device_t device, gpu_t *gpu) {
    int result = find_gpu(device, gpu);
    return result == SUCCESS && gpu->fault ? (int)gpu->fault : result;
}

static int measure(device_t device, gpu_t *gpu, usage_t *usage) {
    int result = find_live_gpu(device, gpu);
    return result == SUCCESS ? read_usage(gpu, index_of(device), usage) : result;
}

static int give_text(const char *text, char *to, unsigned size) {
    if (!to) return INVALID_ARGUMENT;
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

/* ---- library and system ---- */

int nvmlInitWithFlags(unsigned flags) {
    char path[PATH_BYTES], text[FILE_BYTES];
    struct stat root;
    (void)flags;
    if (!path_of(path, "") || stat(path, &root)) return DRIVER_NOT_LOADED;
    if (read_file("fail_init", text) > 0 && atoi(text) != SUCCESS) return atoi(text);
    users++;
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    int now = users;
    while (now > 0 && !atomic_compare_exchange_weak(&users, &now, now - 1)) {}
    return now > 0 ? SUCCESS : UNINITIALIZED;
}

const char *nvmlErrorString(int result) {
    switch (result) {
    case SUCCESS: return "The operation was successful";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case 10: return "Timeout";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 17: return "The operating system has blocked the request";
    case 18: return "RM has detected an NVML/RM version mismatch";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) { return give_text("615.71.02", version, size); }
int nvmlSystemGetNVMLVersion(char *version, unsigned size) { return give_text("13.615.71.02", version, size); }

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    if (!version) return INVALID_ARGUMENT;
    *version = 13000;
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

/* ---- which devices ---- */

int nvmlDeviceGetCount_v2(unsigned *count) {
    gpu_t gpu;
    if (!users) return UNINITIALIZED;
    if (!count) return INVALID_ARGUMENT;
    for (*count = 0; read_gpu(*count, &gpu);) ++*count;
    return SUCCESS;
}
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    gpu_t gpu;
    if (!users) return UNINITIALIZED;
    if (!device || !read_gpu(index, &gpu)) return INVALID_ARGUMENT;
    *device = &handles[index];
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex(unsigned index, device_t *device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    gpu_t gpu;
    if (!users) return UNINITIALIZED;
    if (!uuid || !device) return INVALID_ARGUMENT;
    for (unsigned index = 0; read_gpu(index, &gpu); index++) {
        if (!strcmp(gpu.uuid, uuid)) return nvmlDeviceGetHandleByIndex_v2(index, device);
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(device_t device, char *uuid, unsigned size) {
    gpu_t gpu;
    int result = find_gpu(device, &gpu);
    return result == SUCCESS ? give_text(gpu.uuid, uuid, size) : result;
}

int nvmlDeviceGetName(device_t device, char *name, unsigned size) {
    gpu_t gpu;
    int result = find_gpu(device, &gpu);
    return result == SUCCESS ? give_text(gpu.name, name, size) : result;
}

int nvmlDeviceGetIndex(device_t device, unsigned *index) {
    gpu_t gpu;
    int result = find_gpu(device, &gpu);
    if (result == SUCCESS) *index = index_of(device);
    return result;
}
int nvmlDeviceGetMinorNumber(device_t device, unsigned *minor) { return nvmlDeviceGetIndex(device, minor); }

int nvmlDeviceGetPciInfo_v3(device_t device, pci_t *pci) {
    gpu_t gpu;
    int result = find_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    *pci = (pci_t){.bus = index_of(device) + 1};
    snprintf(pci->legacy_bus_id, sizeof pci->legacy_bus_id, "0000:%02X:00.0", pci->bus & 0xffu);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus & 0xffu);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    gpu_t gpu;
    int result = find_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    *major = 8;
    *minor = 6;
    return SUCCESS;
}

/* ---- memory ---- */

static u64 free_mib(const gpu_t *gpu, const usage_t *usage) {
    u64 taken = gpu->reserved_mib + usage->used_mib;
    return gpu->total_mib > taken ? gpu->total_mib - taken : 0;
}

/* Version 1: `used` includes the driver's reserve. */
int nvmlDeviceGetMemoryInfo(device_t device, memory_v1_t *memory) {
    gpu_t gpu;
    usage_t usage;
    int result = measure(device, &gpu, &usage);
    if (result != SUCCESS) return result;
    u64 available = free_mib(&gpu, &usage);
    *memory = (memory_v1_t){gpu.total_mib * MIB, available * MIB, (gpu.total_mib - available) * MIB};
    return SUCCESS;
}

/* Version 2: the reserve is a number of its own. */
int nvmlDeviceGetMemoryInfo_v2(device_t device, memory_v2_t *memory) {
    gpu_t gpu;
    usage_t usage;
    if (memory->version != MEMORY_V2) return VERSION_MISMATCH;
    int result = measure(device, &gpu, &usage);
    if (result != SUCCESS) return result;
    memory->total = gpu.total_mib * MIB;
    memory->reserved = gpu.reserved_mib * MIB;
    memory->free = free_mib(&gpu, &usage) * MIB;
    memory->used = usage.used_mib * MIB;
    return SUCCESS;
}

/* ---- processes ---- */

/* Set `count` to what there is; INSUFFICIENT_SIZE if the caller's `room` cannot take it. */
static int list_holders(device_t device, unsigned *count, const void *to, usage_t *usage) {
    gpu_t gpu;
    if (!count) return INVALID_ARGUMENT;
    int result = measure(device, &gpu, usage);
    if (result != SUCCESS) return result;
    unsigned room = to ? *count : 0;
    *count = usage->count;
    return usage->count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_v3_t *to) {
    const unsigned no_instance = ~0u;
    usage_t usage;
    int result = list_holders(device, count, to, &usage);
    for (unsigned i = 0; result == SUCCESS && i < usage.count; i++) {
        to[i] = (process_v3_t){usage.holders[i].pid, usage.holders[i].mib * MIB, no_instance, no_instance};
    }
    return result;
}
int nvmlDeviceGetComputeRunningProcesses_v2(device_t device, unsigned *count, process_v3_t *to) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, to);
}

int nvmlDeviceGetComputeRunningProcesses(device_t device, unsigned *count, process_v1_t *to) {
    usage_t usage;
    int result = list_holders(device, count, to, &usage);
    for (unsigned i = 0; result == SUCCESS && i < usage.count; i++) {
        to[i] = (process_v1_t){usage.holders[i].pid, usage.holders[i].mib * MIB};
    }
    return result;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, void *to) {
    gpu_t gpu;
    (void)to;
    if (!count) return INVALID_ARGUMENT;
    *count = 0;
    return find_live_gpu(device, &gpu);
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(device_t device, unsigned *count, void *to) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, to);
}
int nvmlDeviceGetGraphicsRunningProcesses(device_t device, unsigned *count, void *to) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, to);
}

/* ---- other readings ---- */

int nvmlDeviceGetUtilizationRates(device_t device, utilization_t *rates) {
    gpu_t gpu;
    int result = find_live_gpu(device, &gpu);
    if (result == SUCCESS) *rates = (utilization_t){gpu.utilization, gpu.utilization / 2};
    return result;
}

int nvmlDeviceGetTemperature(device_t device, unsigned sensor, unsigned *celsius) {
    gpu_t gpu;
    int result = sensor == 0 ? find_live_gpu(device, &gpu) : INVALID_ARGUMENT;
    if (result == SUCCESS) *celsius = gpu.temperature_c;
    return result;
}

int nvmlDeviceGetTemperatureV(device_t device, temperature_v1_t *reading) {
    unsigned celsius = 0;
    if (reading->version != TEMPERATURE_V1) return VERSION_MISMATCH;
    int result = nvmlDeviceGetTemperature(device, reading->sensor, &celsius);
    if (result == SUCCESS) reading->celsius = (int)celsius;
    return result;
}

int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts) {
    gpu_t gpu;
    int result = find_live_gpu(device, &gpu);
    if (result == SUCCESS) *milliwatts = gpu.power_mw;
    return result;
}
