/*
 * A simulated NVML. The directory named by SIMULATED_NVML_DIR is the machine, and it is read anew
 * at every call, so that a test can change it while a server looks:
 *
 *   gpu0, gpu1, ...  key=value lines: uuid, name, total_mib, reserved_mib; optional: extra_used_mib,
 *                    temperature_c, power_mw, power_limit_mw, utilization (percent), ecc_corrected,
 *                    ecc_uncorrected, clocks_event_reasons and recovery_action (as NVML numbers them),
 *                    and what is wrong with it (below)
 *   claims/ANY       one file per process, write-locked (fcntl, whole file) for as long as it lives
 *   late/ANY         "until <seconds since 1970>\n", then lines as in a claim: memory of a process that
 *                    has ended, in use until that time and nobody's
 *   events           "<uuid> <event type> <data>\n" per event, appended: an event set tells what came after
 *                    it was made
 *   fail_init        an NVML error number that initialising fails with
 *   inits            one byte per initialisation that succeeded, for tests to count
 *
 * What can be wrong with a GPU; a number that is not 0 switches it on:
 *
 *   fault            an NVML error number: every live reading fails with it
 *   fault_memory, fault_processes, fault_graphics   the same, of one query only
 *   fault_handle     finding the GPU fails with it, by index and by UUID
 *   fault_telemetry  utilisation, temperature, power, ECC and clocks fail with it
 *   fault_events     registering for events fails with it
 *   fault_recovery   asking for the recovery action fails with it
 *   lost             it fell off the bus: whatever is asked of it fails (GPU_IS_LOST). A handle that has
 *                    met this stays lost until NVML is initialised anew
 *   delay_ms         every query of memory or processes takes so long, or until this is 0 again
 *   hide_processes   none is listed: they are in a PID namespace that the reader cannot see
 *   pid_offset       they are listed with PIDs of another namespace, higher by this
 *   hide_usage       they are listed, and how much each has is NOT_AVAILABLE
 *
 * Which GPUs there are, and their order, is looked up when NVML is initialised, as the driver does; a
 * handle means the GPU with that UUID, wherever its file is by now, and dies when NVML is shut down.
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
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_FOUND = 6,
    NOT_SUPPORTED = 3,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMED_OUT = 10,
    GPU_IS_LOST = 15,
    VERSION_MISMATCH = 25,
    UNKNOWN = 999
};
enum { MAX_GPUS = 16, GENERATIONS = 256, WAIT_STEP_US = 5000 };
enum { RECOVERY_ACTION_FIELD = 230, UNSIGNED_INT_VALUE = 1, ALL_EVENTS = 65439 };
enum { MAX_HOLDERS = 1024, FILE_BYTES = 4096, PATH_BYTES = 4096, READ_TRIES = 1000 };

typedef unsigned long long u64;
typedef struct device { char uuid[96]; atomic_int is_lost; } *device_t;

typedef struct {
    char uuid[96], name[96];
    unsigned index; /* of its file, now */
    u64 total_mib, reserved_mib, extra_used_mib;
    u64 ecc_corrected, ecc_uncorrected, clocks_event_reasons;
    unsigned temperature_c, power_mw, power_limit_mw, utilization, recovery_action;
    unsigned fault, fault_memory, fault_processes, fault_graphics, fault_handle;
    unsigned fault_telemetry, fault_events, fault_recovery;
    unsigned lost, delay_ms, hide_processes, hide_usage, pid_offset;
} gpu_t;

typedef struct { unsigned pid; u64 mib; } holder_t;
typedef struct { u64 used_mib; unsigned count; holder_t holders[MAX_HOLDERS]; } usage_t;

typedef struct { u64 total, free, used; } memory_v1_t;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned pid; u64 used; } process_v1_t;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process_v3_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned version, sensor; int celsius; } temperature_v1_t;
typedef struct { device_t device; u64 type, data; unsigned gpu_instance, compute_instance; } event_t;
typedef struct { char uuid[96]; u64 types; } subscription_t;
typedef struct { off_t at; unsigned count; subscription_t on[MAX_GPUS]; } *event_set_t;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency_us;
    unsigned value_type, result;
    u64 value;
} field_t;
typedef struct {
    char legacy_bus_id[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_t;

static const unsigned MEMORY_V2 = sizeof(memory_v2_t) | 2u << 24;
static const unsigned TEMPERATURE_V1 = sizeof(temperature_v1_t) | 1u << 24;
static const u64 MIB = 1024 * 1024;

static const u64 NOT_AVAILABLE = ~0ull;

/* One row per initialisation (taken in turn), so that a handle of an earlier one is known as dead. */
static struct device handles[GENERATIONS][MAX_GPUS];
static unsigned generation, found; /* the row in use, and how many GPUs it has */
static int users;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

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
    const struct { const char *key; u64 *to; } sizes[] = {
        {"total_mib", &gpu->total_mib}, {"reserved_mib", &gpu->reserved_mib},
        {"extra_used_mib", &gpu->extra_used_mib},
        {"ecc_corrected", &gpu->ecc_corrected}, {"ecc_uncorrected", &gpu->ecc_uncorrected},
        {"clocks_event_reasons", &gpu->clocks_event_reasons}};
    const struct { const char *key; unsigned *to; } numbers[] = {
        {"temperature_c", &gpu->temperature_c}, {"power_mw", &gpu->power_mw},
        {"power_limit_mw", &gpu->power_limit_mw}, {"recovery_action", &gpu->recovery_action},
        {"fault_telemetry", &gpu->fault_telemetry}, {"fault_events", &gpu->fault_events},
        {"fault_recovery", &gpu->fault_recovery},
        {"utilization", &gpu->utilization}, {"fault", &gpu->fault},
        {"fault_memory", &gpu->fault_memory}, {"fault_processes", &gpu->fault_processes},
        {"fault_graphics", &gpu->fault_graphics}, {"fault_handle", &gpu->fault_handle},
        {"lost", &gpu->lost}, {"delay_ms", &gpu->delay_ms}, {"hide_processes", &gpu->hide_processes},
        {"hide_usage", &gpu->hide_usage}, {"pid_offset", &gpu->pid_offset}};
    u64 number = strtoull(value, NULL, 10);
    if (!strcmp(key, "uuid")) set_text(gpu->uuid, sizeof gpu->uuid, value);
    if (!strcmp(key, "name")) set_text(gpu->name, sizeof gpu->name, value);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (!strcmp(key, sizes[i].key)) *sizes[i].to = number;
    }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (!strcmp(key, numbers[i].key)) *numbers[i].to = (unsigned)number;
    }
}

static int read_gpu(unsigned index, gpu_t *gpu) {
    char name[16], text[FILE_BYTES], *rest = text;
    snprintf(name, sizeof name, "gpu%u", index);
    if (index >= MAX_GPUS || read_file(name, text) <= 0) return 0;
    *gpu = (gpu_t){.index = index, .temperature_c = 40, .power_mw = 20000, .power_limit_mw = 350000};
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

typedef int add_file_t(int fd, const gpu_t *gpu, unsigned index, usage_t *usage);

static int add_late(int fd, const gpu_t *gpu, unsigned index, usage_t *usage) {
    char text[FILE_BYTES], *rest = text;
    if (read_fd(fd, text) <= 0) return SUCCESS;
    const char *until = strsep(&rest, "\n");
    struct timespec now; /* not time(): its coarse clock lags behind the one that Python reads */
    clock_gettime(CLOCK_REALTIME, &now);
    if (rest && !strncmp(until, "until ", 6) && strtod(until + 6, NULL) > (double)now.tv_sec) {
        usage->used_mib += claimed_mib(rest, gpu, index);
    }
    return SUCCESS;
}

static int add_folder(const char *name, add_file_t *add, const gpu_t *gpu, unsigned index, usage_t *usage) {
    char path[PATH_BYTES];
    DIR *folder = path_of(path, name) ? opendir(path) : NULL;
    int result = folder ? SUCCESS : UNKNOWN;
    for (struct dirent *entry; result == SUCCESS && (entry = readdir(folder));) {
        if (entry->d_name[0] == '.') continue;
        int fd = openat(dirfd(folder), entry->d_name, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue; /* removed meanwhile */
        result = add(fd, gpu, index, usage);
        close(fd);
    }
    if (folder) closedir(folder);
    return result;
}

/* Claims first: one that becomes late is written there before it goes here, and so is never missed. */
static int read_usage(const gpu_t *gpu, usage_t *usage) {
    *usage = (usage_t){.used_mib = gpu->extra_used_mib};
    int result = add_folder("claims", add_claim, gpu, gpu->index, usage);
    return result == SUCCESS ? add_folder("late", add_late, gpu, gpu->index, usage) : result;
}

/* ---- handles ---- */

static unsigned index_of(device_t device) { return (unsigned)(device - handles[generation]); }

static int with_uuid(const char *uuid, gpu_t *gpu) {
    for (unsigned index = 0; read_gpu(index, gpu); index++) {
        if (!strcmp(gpu->uuid, uuid)) return 1;
    }
    return 0;
}

static int find_gpu(device_t device, gpu_t *gpu) {
    if (!users) return UNINITIALIZED;
    if (device < handles[generation] || device >= handles[generation] + found) return INVALID_ARGUMENT;
    if (!with_uuid(device->uuid, gpu) || gpu->lost) device->is_lost = 1;
    return device->is_lost ? GPU_IS_LOST : SUCCESS;
}

/* Like find_gpu, for live readings: a fault raised on the GPU is the answer. */
static int find_live_gpu(device_t device, gpu_t *gpu) {
    int result = find_gpu(device, gpu);
    return result == SUCCESS && gpu->fault ? (int)gpu->fault : result;
}

/* Like find_live_gpu, after its delay; the test may end that early. */
static int find_slow_gpu(device_t device, gpu_t *gpu) {
    int result = find_live_gpu(device, gpu);
    for (u64 waited_us = 0; result == SUCCESS && waited_us < gpu->delay_ms * 1000ull; waited_us += WAIT_STEP_US) {
        usleep(WAIT_STEP_US);
        result = find_live_gpu(device, gpu);
    }
    return result;
}

static int measure(device_t device, gpu_t *gpu, usage_t *usage) {
    int result = find_slow_gpu(device, gpu);
    return result == SUCCESS ? read_usage(gpu, usage) : result;
}

static int measure_memory(device_t device, gpu_t *gpu, usage_t *usage) {
    int result = measure(device, gpu, usage);
    return result == SUCCESS && gpu->fault_memory ? (int)gpu->fault_memory : result;
}

static int give_text(const char *text, char *to, unsigned size) {
    if (!to) return INVALID_ARGUMENT;
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

/* ---- library and system ---- */

static void enumerate(void) {
    gpu_t gpu;
    generation = (generation + 1) % GENERATIONS;
    for (found = 0; found < MAX_GPUS && read_gpu(found, &gpu); found++) {
        device_t device = &handles[generation][found];
        set_text(device->uuid, sizeof device->uuid, gpu.uuid);
        device->is_lost = 0;
    }
}

static void count_init(void) {
    char path[PATH_BYTES];
    int fd = path_of(path, "inits") ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd < 0) return;
    if (write(fd, ".", 1) < 0) perror(path);
    close(fd);
}

int nvmlInitWithFlags(unsigned flags) {
    char path[PATH_BYTES], text[FILE_BYTES];
    struct stat root;
    (void)flags;
    if (!path_of(path, "") || stat(path, &root)) return DRIVER_NOT_LOADED;
    if (read_file("fail_init", text) > 0 && atoi(text) != SUCCESS) return atoi(text);
    pthread_mutex_lock(&guard);
    if (!users++) {
        enumerate();
        count_init();
    }
    pthread_mutex_unlock(&guard);
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    pthread_mutex_lock(&guard);
    int was_used = users > 0;
    users -= was_used;
    pthread_mutex_unlock(&guard);
    return was_used ? SUCCESS : UNINITIALIZED;
}

const char *nvmlErrorString(int result) {
    static const char *const texts[] = {
        "The operation was successful", "Uninitialized", "Invalid Argument", "Not Supported",
        "Insufficient Permissions", "Already Initialized", "Not Found", "Insufficient Size",
        "Insufficient External Power", "Driver Not Loaded", "Timeout", "Interrupt Request Issue",
        "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM", "GPU is lost",
        "GPU requires reset", "The operating system has blocked the request",
        "RM has detected an NVML/RM version mismatch", "In use by another client", "Insufficient Memory",
        "No data", "ECC is enabled on a vGPU", "Insufficient Resources", "Frequency not supported",
        "Argument version mismatch", "Deprecated", "Not Ready", "GPU not found", "Invalid state"};
    const int known = sizeof texts / sizeof *texts;
    return result >= 0 && result < known ? texts[result] : "Unknown Error";
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
    if (!users) return UNINITIALIZED;
    if (!count) return INVALID_ARGUMENT;
    *count = found;
    return SUCCESS;
}
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

static int give_handle(device_t wanted, device_t *device) {
    gpu_t gpu;
    int result = find_gpu(wanted, &gpu);
    if (result == SUCCESS && gpu.fault_handle) return (int)gpu.fault_handle;
    if (result == SUCCESS) *device = wanted;
    return result;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    if (!users) return UNINITIALIZED;
    if (!device || index >= found) return INVALID_ARGUMENT;
    return give_handle(&handles[generation][index], device);
}
int nvmlDeviceGetHandleByIndex(unsigned index, device_t *device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    if (!users) return UNINITIALIZED;
    if (!uuid || !device) return INVALID_ARGUMENT;
    for (unsigned index = 0; index < found; index++) {
        if (!strcmp(handles[generation][index].uuid, uuid)) return nvmlDeviceGetHandleByIndex_v2(index, device);
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
    int result = measure_memory(device, &gpu, &usage);
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
    int result = measure_memory(device, &gpu, &usage);
    if (result != SUCCESS) return result;
    memory->total = gpu.total_mib * MIB;
    memory->reserved = gpu.reserved_mib * MIB;
    memory->free = free_mib(&gpu, &usage) * MIB;
    memory->used = usage.used_mib * MIB;
    return SUCCESS;
}

/* ---- processes ---- */

/* As the reader is shown them: perhaps none, perhaps with PIDs or without bytes that mean something. */
static void disguise(const gpu_t *gpu, usage_t *usage) {
    if (gpu->hide_processes) usage->count = 0;
    for (unsigned i = 0; i < usage->count; i++) usage->holders[i].pid += gpu->pid_offset;
}

/* Set `count` to what there is; INSUFFICIENT_SIZE if the caller's `room` cannot take it. */
static int list_holders(device_t device, unsigned *count, const void *to, gpu_t *gpu, usage_t *usage) {
    if (!count) return INVALID_ARGUMENT;
    int result = measure(device, gpu, usage);
    if (result == SUCCESS && gpu->fault_processes) return (int)gpu->fault_processes;
    if (result != SUCCESS) return result;
    disguise(gpu, usage);
    unsigned room = to ? *count : 0;
    *count = usage->count;
    return usage->count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

static u64 told_bytes(const gpu_t *gpu, const holder_t *holder) {
    return gpu->hide_usage ? NOT_AVAILABLE : holder->mib * MIB;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_v3_t *to) {
    const unsigned no_instance = ~0u;
    gpu_t gpu;
    usage_t usage;
    int result = list_holders(device, count, to, &gpu, &usage);
    for (unsigned i = 0; result == SUCCESS && i < usage.count; i++) {
        const holder_t *holder = &usage.holders[i];
        to[i] = (process_v3_t){holder->pid, told_bytes(&gpu, holder), no_instance, no_instance};
    }
    return result;
}
int nvmlDeviceGetComputeRunningProcesses_v2(device_t device, unsigned *count, process_v3_t *to) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, to);
}

int nvmlDeviceGetComputeRunningProcesses(device_t device, unsigned *count, process_v1_t *to) {
    gpu_t gpu;
    usage_t usage;
    int result = list_holders(device, count, to, &gpu, &usage);
    for (unsigned i = 0; result == SUCCESS && i < usage.count; i++) {
        to[i] = (process_v1_t){usage.holders[i].pid, told_bytes(&gpu, &usage.holders[i])};
    }
    return result;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, void *to) {
    gpu_t gpu;
    (void)to;
    if (!count) return INVALID_ARGUMENT;
    *count = 0;
    int result = find_slow_gpu(device, &gpu);
    return result == SUCCESS && gpu.fault_graphics ? (int)gpu.fault_graphics : result;
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(device_t device, unsigned *count, void *to) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, to);
}
int nvmlDeviceGetGraphicsRunningProcesses(device_t device, unsigned *count, void *to) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, to);
}

/* ---- other readings ---- */

static int find_telling_gpu(device_t device, gpu_t *gpu) {
    int result = find_live_gpu(device, gpu);
    return result == SUCCESS && gpu->fault_telemetry ? (int)gpu->fault_telemetry : result;
}

int nvmlDeviceGetUtilizationRates(device_t device, utilization_t *rates) {
    gpu_t gpu;
    int result = find_telling_gpu(device, &gpu);
    if (result == SUCCESS) *rates = (utilization_t){gpu.utilization, gpu.utilization / 2};
    return result;
}

int nvmlDeviceGetTemperature(device_t device, unsigned sensor, unsigned *celsius) {
    gpu_t gpu;
    int result = sensor == 0 ? find_telling_gpu(device, &gpu) : INVALID_ARGUMENT;
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
    int result = find_telling_gpu(device, &gpu);
    if (result == SUCCESS) *milliwatts = gpu.power_mw;
    return result;
}

int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts) {
    gpu_t gpu;
    int result = find_telling_gpu(device, &gpu);
    if (result == SUCCESS) *milliwatts = gpu.power_limit_mw;
    return result;
}

int nvmlDeviceGetTotalEccErrors(device_t device, unsigned error, unsigned counter, u64 *count) {
    gpu_t gpu;
    int result = error > 1 || counter > 1 ? INVALID_ARGUMENT : find_telling_gpu(device, &gpu);
    if (result == SUCCESS) *count = error ? gpu.ecc_uncorrected : gpu.ecc_corrected;
    return result;
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t device, u64 *reasons) {
    gpu_t gpu;
    int result = find_telling_gpu(device, &gpu);
    if (result == SUCCESS) *reasons = gpu.clocks_event_reasons;
    return result;
}

int nvmlDeviceGetFieldValues(device_t device, int count, field_t *fields) {
    gpu_t gpu;
    int result = find_live_gpu(device, &gpu);
    for (int i = 0; result == SUCCESS && i < count; i++) {
        int is_known = fields[i].field == RECOVERY_ACTION_FIELD;
        fields[i].value_type = UNSIGNED_INT_VALUE;
        fields[i].result = is_known ? gpu.fault_recovery : (unsigned)NOT_SUPPORTED;
        fields[i].value = gpu.recovery_action;
    }
    return result;
}

/* ---- events ---- */

static int open_events(void) {
    char path[PATH_BYTES];
    return path_of(path, "events") ? open(path, O_RDONLY | O_CLOEXEC) : -1;
}

int nvmlEventSetCreate(event_set_t *set) {
    if (!users) return UNINITIALIZED;
    if (!(*set = calloc(1, sizeof **set))) return UNKNOWN;
    int fd = open_events();
    if (fd >= 0) {
        (*set)->at = lseek(fd, 0, SEEK_END);
        close(fd);
    }
    return SUCCESS;
}

int nvmlEventSetFree(event_set_t set) {
    free(set);
    return SUCCESS;
}

int nvmlDeviceGetSupportedEventTypes(device_t device, u64 *types) {
    gpu_t gpu;
    int result = find_gpu(device, &gpu);
    if (result == SUCCESS) *types = ALL_EVENTS;
    return result;
}

int nvmlDeviceRegisterEvents(device_t device, u64 types, event_set_t set) {
    gpu_t gpu;
    int result = find_live_gpu(device, &gpu);
    if (result == SUCCESS && gpu.fault_events) return (int)gpu.fault_events;
    if (result != SUCCESS || set->count == MAX_GPUS) return result == SUCCESS ? UNKNOWN : result;
    subscription_t *on = &set->on[set->count++];
    set_text(on->uuid, sizeof on->uuid, gpu.uuid);
    on->types = types;
    return SUCCESS;
}

static int is_wanted(event_set_t set, const char *uuid, u64 type) {
    for (unsigned i = 0; i < set->count; i++) {
        if (!strcmp(set->on[i].uuid, uuid) && set->on[i].types & type) return 1;
    }
    return 0;
}

/* Take the next whole line; true if it is an event that the set wants. `is_last` if there was none. */
static int take_event(event_set_t set, int fd, event_t *event, int *is_last) {
    char text[256], uuid[96];
    ssize_t size = pread(fd, text, sizeof text - 1, set->at);
    text[size > 0 ? size : 0] = '\0';
    char *end = strchr(text, '\n');
    *is_last = !end;
    if (!end) return 0;
    set->at += end - text + 1;
    *event = (event_t){0};
    if (sscanf(text, "%95s %llu %llu", uuid, &event->type, &event->data) != 3) return 0;
    for (unsigned i = 0; i < found; i++) {
        if (!strcmp(handles[generation][i].uuid, uuid)) event->device = &handles[generation][i];
    }
    return event->device && is_wanted(set, uuid, event->type);
}

int nvmlEventSetWait_v2(event_set_t set, event_t *event, unsigned timeout_ms) {
    if (!users) return UNINITIALIZED;
    int fd = open_events(), is_last = 0, has_one = 0;
    for (u64 waited_us = 0; !has_one; waited_us += WAIT_STEP_US) {
        do {
            has_one = fd >= 0 && take_event(set, fd, event, &is_last);
        } while (fd >= 0 && !has_one && !is_last);
        if (waited_us >= timeout_ms * 1000ull) break;
        if (!has_one) usleep(WAIT_STEP_US);
    }
    if (fd >= 0) close(fd);
    return has_one ? SUCCESS : TIMED_OUT;
}
int nvmlEventSetWait(event_set_t set, event_t *event, unsigned timeout_ms) {
    return nvmlEventSetWait_v2(set, event, timeout_ms);
}
