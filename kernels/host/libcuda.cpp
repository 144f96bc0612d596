// A stand-in for libcuda: the driver functions that the library calls, on the CPU, with kernels run as kernels/host does.
// For tests alone. It is stricter than a driver where it can be:
//   - device memory cannot be touched by the host between the driver's calls (unless it was allocated by the caller);
//   - what a driver refuses during stream capture is refused;
//   - with AKV_STANDIN=lazy nothing runs before somebody waits for it, so that memory which is reused too early shows;
//   - every launch permutes blocks and warps.
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "device.h"

extern "C" int akv_host_launch(const char *, const akv::u32[3], akv::u32, akv::u32, const void *, akv::u64, akv::u64);
extern "C" const char *akv_host_error();

namespace {

using Work = std::function<int()>;
using u64 = unsigned long long;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
       INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900 };

constexpr int DEVICES = 2;

struct Context {
    int device;
    int retained;
};
struct Graph {
    std::vector<Work> nodes;
};
struct Stream {
    Context *context;
    Graph *capturing;
};
struct Event {
    std::atomic<bool> done;
};
struct Function {
    const akv::host::Kernel *kernel;
    int shared = 48 << 10;
};

std::recursive_mutex mutex;
Context contexts[DEVICES] = {{0, 0}, {1, 0}};
thread_local std::vector<Context *> current;
std::map<void *, size_t> allocations;  // device memory
std::map<void *, size_t> pinned;
std::map<std::string, Function> functions;
std::deque<Work> queue;
bool initialized = false;
int failed = OK;  // sticky, as a driver's
int captures = 0;
long allocations_made = 0, waits = 0;
u64 seed = 1;

bool lazy() {
    static const bool lazy = [] {
        const char *mode = getenv("AKV_STANDIN");
        return mode && strcmp(mode, "lazy") == 0;
    }();
    return lazy;
}

size_t pages(size_t bytes) { return (bytes + 4095) & ~size_t(4095); }

// Device memory can be touched while this lives.
struct Reach {
    static int depth;
    Reach() {
        if (depth++ == 0) protect(PROT_READ | PROT_WRITE);
    }
    ~Reach() {
        if (--depth == 0) protect(PROT_NONE);
    }
    static void protect(int how) {
        for (auto &[p, bytes] : allocations) mprotect(p, pages(bytes), how);
    }
};
int Reach::depth = 0;

// Returns when everything has run; if somebody else than an eager stand-in asks, that is a wait.
int drain(bool wait = true) {
    if (captures > 0) return CAPTURE_UNSUPPORTED;
    waits += wait;
    Reach reach;
    while (!queue.empty()) {
        Work work = std::move(queue.front());
        queue.pop_front();
        if (failed == OK) failed = work();
    }
    return failed;
}

int submit(Stream *stream, Work work) {
    if (stream && stream->capturing) {
        stream->capturing->nodes.push_back(std::move(work));
        return OK;
    }
    if (captures > 0 && !stream) return CAPTURE_UNSUPPORTED;  // the legacy stream depends on the capturing one
    queue.push_back(std::move(work));
    return lazy() ? failed : drain(false);
}

bool lies_in(const std::map<void *, size_t> &blocks, u64 address, size_t bytes) {
    auto it = blocks.upper_bound(reinterpret_cast<void *>(address));
    if (it == blocks.begin()) return false;
    --it;
    const u64 start = reinterpret_cast<u64>(it->first);
    return address + bytes <= start + it->second;
}

bool on_device(u64 address, size_t bytes) { return lies_in(allocations, address, bytes) || lies_in(pinned, address, bytes); }

// As real programs have it: 1 and 2 are the legacy and the per-thread default stream.
Stream *stream_of(void *stream) { return reinterpret_cast<u64>(stream) <= 2 ? nullptr : static_cast<Stream *>(stream); }

int ready() { return !initialized ? NOT_INITIALIZED : current.empty() ? INVALID_CONTEXT : failed; }

}  // namespace

// For tests: memory allocated (device or pinned), and calls that waited, so far.
extern "C" __attribute__((visibility("default"))) long standin_allocations() { return allocations_made; }
extern "C" __attribute__((visibility("default"))) long standin_waits() { return waits; }

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCK std::lock_guard<std::recursive_mutex> lock(mutex)
#define READY                            \
    LOCK;                                \
    if (int code = ready()) return code

API cuInit(unsigned flags) {
    LOCK;
    if (const char *code = getenv("AKV_STANDIN_INIT")) return atoi(code);
    if (flags) return INVALID_VALUE;
    initialized = true;
    return OK;
}
API cuDriverGetVersion(int *version) { return *version = 12020, OK; }
API cuDeviceGetCount(int *n) { return *n = DEVICES, initialized ? OK : NOT_INITIALIZED; }
API cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
API cuDeviceGetName(char *name, int bytes, int) {
    snprintf(name, size_t(bytes), "stand-in");
    return OK;
}
API cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 16: *value = 2; return OK;
    case 75: *value = 9; return OK;
    case 76: *value = 0; return OK;
    case 97: *value = 227 << 10; return OK;
    default: return INVALID_VALUE;
    }
}
API cuDevicePrimaryCtxRetain(void **context, int device) {
    LOCK;
    if (!initialized) return NOT_INITIALIZED;
    contexts[device].retained++;
    *context = &contexts[device];
    return OK;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    LOCK;
    if (contexts[device].retained == 0) return INVALID_CONTEXT;
    contexts[device].retained--;
    return OK;
}
API cuCtxPushCurrent_v2(void *context) {
    if (!context) return INVALID_CONTEXT;
    current.push_back(static_cast<Context *>(context));
    return OK;
}
API cuCtxPopCurrent_v2(void **context) {
    if (current.empty()) return INVALID_CONTEXT;
    *context = current.back();
    current.pop_back();
    return OK;
}
API cuCtxGetCurrent(void **context) {
    *context = current.empty() ? nullptr : current.back();
    return OK;
}
API cuCtxGetDevice(int *device) {
    if (current.empty()) return INVALID_CONTEXT;
    *device = current.back()->device;
    return OK;
}
API cuCtxSynchronize() {
    READY;
    return drain();
}

API cuStreamCreate(void **stream, unsigned) {
    READY;
    *stream = new Stream{current.back(), nullptr};
    return OK;
}
API cuStreamDestroy_v2(void *stream) {
    READY;
    int code = drain();
    delete static_cast<Stream *>(stream);
    return code;
}
API cuStreamGetCtx(void *stream, void **context) {
    *context = static_cast<Stream *>(stream)->context;
    return OK;
}
API cuStreamSynchronize(void *stream) {
    READY;
    return stream_of(stream) && stream_of(stream)->capturing ? int(CAPTURE_UNSUPPORTED) : drain();
}
API cuStreamIsCapturing(void *stream, int *status) {
    READY;
    *status = stream_of(stream) && stream_of(stream)->capturing ? 1 : 0;
    return OK;
}
API cuStreamBeginCapture_v2(void *stream, int) {
    READY;
    Stream *s = stream_of(stream);
    if (!s || s->capturing) return CAPTURE_UNSUPPORTED;
    s->capturing = new Graph;
    captures++;
    return OK;
}
API cuStreamEndCapture(void *stream, void **graph) {
    READY;
    Stream *s = stream_of(stream);
    if (!s || !s->capturing) return INVALID_VALUE;
    *graph = s->capturing;
    s->capturing = nullptr;
    captures--;
    return OK;
}
API cuGraphInstantiateWithFlags(void **exec, void *graph, u64) {
    *exec = new Graph(*static_cast<Graph *>(graph));
    return OK;
}
API cuGraphLaunch(void *exec, void *stream) {
    READY;
    for (const Work &work : static_cast<Graph *>(exec)->nodes) {
        if (int code = submit(stream_of(stream), work)) return code;
    }
    return OK;
}
API cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), OK; }
API cuGraphExecDestroy(void *exec) {
    READY;
    delete static_cast<Graph *>(exec);
    return OK;
}

API cuEventCreate(void **event, unsigned) {
    READY;
    *event = new Event{{true}};
    return OK;
}
API cuEventDestroy_v2(void *event) {
    READY;
    int code = drain();
    delete static_cast<Event *>(event);
    return code;
}
API cuEventRecord(void *event, void *stream) {
    READY;
    Event *e = static_cast<Event *>(event);
    e->done = false;
    return submit(stream_of(stream), [e] { return e->done = true, OK; });
}
API cuEventSynchronize(void *event) {
    READY;
    return static_cast<Event *>(event)->done ? failed : drain();
}

API cuModuleLoadData(void **module, const void *image) {
    READY;
    const char *bytes = static_cast<const char *>(image);
    if (memcmp(bytes, "\x7f" "ELF", 4) != 0 && !strstr(bytes, ".version")) return INVALID_VALUE;
    *module = &functions;
    return OK;
}
API cuModuleUnload(void *) {
    READY;
    return drain();
}
API cuModuleGetFunction(void **function, void *, const char *name) {
    READY;
    const akv::host::Kernel *kernel = akv::host::Kernel::find(name);
    if (!kernel) return NOT_FOUND;
    functions[name].kernel = kernel;
    *function = &functions[name];
    return OK;
}
API cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    static_cast<Function *>(function)->shared = value;
    return OK;
}
API cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **params, void **) {
    READY;
    const Function *f = static_cast<Function *>(function);
    if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || ty != 1 || tz != 1 || int(shared) > f->shared) return INVALID_VALUE;
    const akv::host::Kernel *kernel = f->kernel;
    std::vector<char> copy(static_cast<char *>(params[0]), static_cast<char *>(params[0]) + kernel->params_bytes);
    return submit(stream_of(stream), [=, order = seed++] {
        const akv::u32 grid[3] = {x, y, z};
        if (akv_host_launch(kernel->name, grid, threads, shared, copy.data(), copy.size(), order) == 0) return OK;
        fprintf(stderr, "stand-in: %s\n", akv_host_error());
        return LAUNCH_FAILED;
    });
}

API cuMemAlloc_v2(u64 *address, size_t bytes) {
    READY;
    if (captures > 0) return CAPTURE_UNSUPPORTED;
    if (bytes == 0) return INVALID_VALUE;
    allocations_made++;
    void *p = mmap(nullptr, pages(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return OUT_OF_MEMORY;
    allocations[p] = bytes;
    *address = reinterpret_cast<u64>(p);
    return OK;
}
// Memory that the host may touch at any time.
API cuMemAllocManaged(u64 *address, size_t bytes, unsigned) {
    READY;
    void *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p) return OUT_OF_MEMORY;
    pinned[p] = bytes;
    *address = reinterpret_cast<u64>(p);
    return OK;
}
API cuMemFree_v2(u64 address) {
    READY;
    if (captures > 0) return CAPTURE_UNSUPPORTED;
    int code = drain();
    void *p = reinterpret_cast<void *>(address);
    if (pinned.erase(p)) return free(p), code;
    auto it = allocations.find(p);
    if (it == allocations.end()) return INVALID_VALUE;
    munmap(p, pages(it->second));
    allocations.erase(it);
    return code;
}
API cuMemHostAlloc(void **p, size_t bytes, unsigned) {
    READY;
    if (captures > 0) return CAPTURE_UNSUPPORTED;
    *p = malloc(bytes);
    allocations_made++;
    if (!*p) return OUT_OF_MEMORY;
    pinned[*p] = bytes;
    return OK;
}
API cuMemFreeHost(void *p) {
    READY;
    int code = drain();
    if (!pinned.erase(p)) return INVALID_VALUE;
    free(p);
    return code;
}
API cuMemHostGetDevicePointer_v2(u64 *address, void *p, unsigned) {
    READY;
    if (!pinned.count(p)) return INVALID_VALUE;
    *address = reinterpret_cast<u64>(p);
    return OK;
}
API cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t bytes, void *stream) {
    READY;
    if (stream_of(stream) && stream_of(stream)->capturing) return CAPTURE_UNSUPPORTED;
    if (!on_device(to, bytes)) return INVALID_VALUE;
    auto it = pinned.upper_bound(const_cast<void *>(from));
    const bool is_pinned = it != pinned.begin() && static_cast<const char *>((--it)->first) + it->second > from;
    // Pinned memory is read when the copy is made, other memory now.
    std::vector<char> copy(static_cast<const char *>(from), static_cast<const char *>(from) + (is_pinned ? 0 : bytes));
    return submit(stream_of(stream), [=] {
        memcpy(reinterpret_cast<void *>(to), is_pinned ? from : copy.data(), bytes);
        return OK;
    });
}
API cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t bytes, void *stream) {
    READY;
    if (!on_device(from, bytes)) return INVALID_VALUE;
    return submit(stream_of(stream), [=] { return memcpy(to, reinterpret_cast<void *>(from), bytes), OK; });
}
API cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void *stream) {
    READY;
    if (!on_device(to, bytes) || !on_device(from, bytes)) return INVALID_VALUE;
    return submit(stream_of(stream), [=] { return memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes), OK; });
}
API cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, void *stream) {
    READY;
    return submit(stream_of(stream), [=] { return memset(reinterpret_cast<void *>(to), value, bytes), OK; });
}
API cuGetErrorName(int code, const char **name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code < 1000 ? "CUDA_ERROR" : nullptr;
    return *name ? OK : INVALID_VALUE;
}
API cuGetErrorString(int code, const char **text) {
    *text = code < 1000 ? "as the stand-in says" : nullptr;
    return *text ? OK : INVALID_VALUE;
}
