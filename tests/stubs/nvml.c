/* A stand-in for libnvidia-ml.so.1: the calls that telemetry makes, answered from a text file.
 *
 *   cc -shared -fPIC -o libnvidia-ml.so.1 nvml.c
 *
 * NVML_STUB names the file, read anew at each call; without it there are 8 busy GPUs. Its lines are "key value" for all
 * GPUs or "GPU.key value" for one; the last that fits counts. Keys: count, mig (instances on the GPU), processes
 * ("pid:MiB,pid:MiB", "pid:-" for memory that the driver hides), slow_ms (a driver that answers late), minor, lost (1: the
 * GPU has gone), and the quantities asked for below. Instead of a number: unsupported, old (a driver without that call),
 * unknown (an error). Structures and numbers are nvml.h's (docs.nvidia.com/deploy/nvml-api).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, OLD = 13, LOST = 15, UNKNOWN = 999 };
enum { MAX_GPUS = 16, MAX_MIG = 7 };
typedef struct { int gpu, mig; } Device; /* mig: -1 for the whole GPU */
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
typedef struct { unsigned pid; unsigned long long used; unsigned instance, compute; } Process;
typedef struct { unsigned id, scope; long long time, latency; int type, result; unsigned long long value; } Field;
static Device devices[MAX_GPUS][MAX_MIG + 1];

/* Copies the last value that the file gives a key of this GPU (-1: of the machine); returns 0 where it gives none. */
static int configured(int gpu, const char *key, char *value) {
  const char *path = getenv("NVML_STUB");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[512], name[64], own[64];
  int found = 0;
  if (!file) return 0;
  snprintf(own, sizeof own, "%d.%s", gpu, key);
  while (fgets(line, sizeof line, file)) {
    char text[512] = "";
    if (sscanf(line, "%63s %511s", name, text) >= 1 && (!strcmp(name, key) || !strcmp(name, own)))
      found = 1, strcpy(value, text);
  }
  fclose(file);
  return found;
}

static int get(int gpu, const char *key, unsigned long long otherwise, unsigned long long *out) {
  char value[512];
  if (gpu >= 0 && configured(gpu, "lost", value) && *value == '1') return LOST;
  *out = otherwise;
  if (!configured(gpu, key, value)) return OK;
  if (!strcmp(value, "unsupported")) return UNSUPPORTED;
  if (!strcmp(value, "old")) return OLD;
  if (!strcmp(value, "unknown")) return UNKNOWN;
  *out = strtoull(value, NULL, 0);
  return OK;
}

static int number(Device *device, const char *key, unsigned otherwise, unsigned *out) {
  unsigned long long value = 0;
  int code = get(device->gpu, key, otherwise, &value);
  *out = (unsigned)value;
  return device->mig >= 0 ? UNSUPPORTED : code; /* an instance has memory and processes only */
}

static unsigned long long plain(int gpu, const char *key, unsigned long long value) { get(gpu, key, value, &value); return value; }

int nvmlInitWithFlags(unsigned flags) { unsigned long long v; (void)flags; return get(-1, "driver", 0, &v); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "an error of the stub"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { return snprintf(text, size, "555.42.06") < 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = (unsigned)plain(-1, "count", 8); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
  if (index >= plain(-1, "count", 8) || index >= MAX_GPUS) return INVALID;
  *device = &devices[index][MAX_MIG];
  **device = (Device){(int)index, -1};
  return OK;
}

int nvmlDeviceGetName(Device *d, char *s, unsigned n) { return snprintf(s, n, "NVIDIA A100-SXM4-40GB%s", d->mig < 0 ? "" : " MIG 1g.5gb") < 0; }
int nvmlDeviceGetUUID(Device *d, char *text, unsigned size) {
  return snprintf(text, size, "%s-%08d-0000-4000-8000-%012d", d->mig < 0 ? "GPU" : "MIG", d->gpu, d->mig + 1) < 0;
}
int nvmlDeviceGetMinorNumber(Device *d, unsigned *out) { return number(d, "minor", (unsigned)d->gpu, out); }
int nvmlDeviceGetMigMode(Device *d, unsigned *now, unsigned *later) { return *now = *later = plain(d->gpu, "mig", 0) > 0, OK; }
int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *count) { (void)d; *count = MAX_MIG; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned index, Device **mig) {
  if (index >= plain(d->gpu, "mig", 0) || index >= MAX_MIG) return NOT_FOUND;
  *mig = &devices[d->gpu][index];
  **mig = (Device){d->gpu, (int)index};
  return OK;
}

int nvmlDeviceGetUtilizationRates(Device *d, Utilization *rates) {
  unsigned long long slow_ms = plain(d->gpu, "slow_ms", 0);
  if (slow_ms) usleep((useconds_t)slow_ms * 1000);
  rates->memory = 20;
  return number(d, "utilization", 90, &rates->gpu);
}
int nvmlDeviceGetMemoryInfo(Device *d, Memory *m) {
  unsigned long long total = 40960ull << 20, used = 0;
  int code = get(d->gpu, "memory_mib", 1024, &used);
  *m = (Memory){total, total - (used << 20), used << 20};
  return code;
}
int nvmlDeviceGetMemoryInfo_v2(Device *d, Memory2 *m) {
  Memory first;
  int code = nvmlDeviceGetMemoryInfo(d, &first);
  if (plain(-1, "driver_year", 2024) < 2022) return OLD;
  if (m->version != (sizeof *m | 2u << 24)) return 25; /* NVML_ERROR_ARGUMENT_VERSION_MISMATCH */
  *m = (Memory2){m->version, first.total, 0, first.free, first.used};
  return code;
}
int nvmlDeviceGetPowerUsage(Device *d, unsigned *out) { return number(d, "power_mw", 250000, out); }
int nvmlDeviceGetTemperature(Device *d, int kind, unsigned *out) { (void)kind; return number(d, "temperature", 60, out); }
int nvmlDeviceGetClockInfo(Device *d, int kind, unsigned *out) {
  return number(d, kind == 1 ? "sm_clock" : "memory_clock", kind == 1 ? 1410 : 1215, out);
}
int nvmlDeviceGetCurrentClocksEventReasons(Device *d, unsigned long long *out) {
  if (plain(-1, "driver_year", 2024) < 2023) return OLD;
  return d->mig >= 0 ? UNSUPPORTED : get(d->gpu, "reasons", 0, out);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, unsigned long long *out) { return get(d->gpu, "reasons", 0, out); }
int nvmlDeviceGetPcieThroughput(Device *d, int kind, unsigned *out) { /* the driver counts for 20 ms */
  return number(d, kind ? "pcie_rx_kib_s" : "pcie_tx_kib_s", kind ? 2048 : 1024, out);
}
int nvmlDeviceGetTotalEnergyConsumption(Device *d, unsigned long long *out) {
  return d->mig >= 0 ? UNSUPPORTED : get(d->gpu, "energy_mj", 1000, out);
}
int nvmlDeviceGetFieldValues(Device *d, int count, Field *fields) { /* 138, 139: NVLink data sent, received, in KiB */
  for (int i = 0; i < count; i++) {
    int known = d->mig < 0 && (fields[i].id == 138 || fields[i].id == 139) && fields[i].scope == ~0u;
    fields[i].type = 3; /* unsigned long long */
    fields[i].result = known ? get(d->gpu, fields[i].id == 138 ? "nvlink_tx_kib" : "nvlink_rx_kib", 0, &fields[i].value) : UNSUPPORTED;
  }
  return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned *count, Process *out) {
  char list[512] = "";
  unsigned room = *count, seen = 0;
  if (!configured(d->gpu, "processes", list)) snprintf(list, sizeof list, "%d:512", getpid());
  if (!strcmp(list, "unsupported")) return UNSUPPORTED;
  for (char *word = strtok(list, ","); word; word = strtok(NULL, ","), seen++) {
    char *memory = strchr(word, ':');
    unsigned long long used = memory && memory[1] != '-' ? strtoull(memory + 1, NULL, 0) << 20 : ~0ull;
    if (seen < room) out[seen] = (Process){(unsigned)atoi(word), used, ~0u, ~0u};
  }
  *count = seen;
  return seen > room ? TOO_SMALL : OK;
}
