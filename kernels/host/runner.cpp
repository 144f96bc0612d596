#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#include "device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

namespace akv {
namespace host {

Place place;

namespace {

constexpr size_t STACK = SANITIZED ? 256 << 10 : 64 << 10;
constexpr size_t GUARD = 4096;  // beside shared memory
constexpr u8 POISON = 0xcd;     // as floats and integers: large, and never right

const Kernel *kernels = nullptr;
std::string failure;

// A thread of a block. It runs on its own stack until it has to wait.
struct Fibre {
    void *stack_pointer;
    std::unique_ptr<u8[]> stack;
    void *fake_stack;
    u32 index;
    bool done;
    const u64 *waits_for;  // it waits until this is no longer `seen`; or null
    u64 seen;
    Site site;
    const char *at;
};

struct Warp {
    u32 arrived;
    u64 meetings;
    Kind kind;
    Site site;
    Operand *operands[32];
};

// A thread's copies under way: groups of them, the last one still open.
struct Copy {
    Near to;
    const uint4 *from;
};
using Copies = std::vector<std::vector<Copy>>;

struct Block {
    const Kernel *kernel;
    const void *params;
    u32 threads, arrived;
    u64 barriers;
    Site site;  // of the barrier that some have arrived at
    std::vector<Warp> warps;
};

std::vector<Copies> copies;  // by thread
bool copies_wait;            // until they are waited for
std::vector<Fibre> fibres;
Block block;
Fibre *current;
void *scheduler_stack;
#if SANITIZED
const void *scheduler_bottom;
size_t scheduler_size;
#endif

extern "C" void akv_host_switch(void **from, void *to);
// Saves what a call preserves on the stack, and goes on with another one.
asm(R"(
.text
.type akv_host_switch, @function
akv_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size akv_host_switch, .-akv_host_switch
)");

void fail(const std::string &text) {
    if (failure.empty()) failure = text;
}

// Back to the scheduler, until what the fibre waits for has happened.
void pause() {
    Fibre *self = current;
#if SANITIZED
    __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
#endif
    akv_host_switch(&self->stack_pointer, scheduler_stack);
#if SANITIZED
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void wait(const u64 *for_, u64 seen, Site site, const char *at) {
    Fibre *self = current;
    self->waits_for = for_, self->seen = seen, self->site = site, self->at = at;
    pause();
    self->waits_for = nullptr;
}

void begin() {
#if SANITIZED
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    block.kernel->run(block.params);
    current->done = true;
    pause();
}

void resume(Fibre &fibre) {
    current = &fibre;
    place.thread = fibre.index;
#if SANITIZED
    void *fake;
    __sanitizer_start_switch_fiber(&fake, fibre.stack.get(), STACK);
#endif
    akv_host_switch(&scheduler_stack, fibre.stack_pointer);
#if SANITIZED
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void start(Fibre &fibre, u32 index) {
    if (!fibre.stack) fibre.stack.reset(new u8[STACK]);
#if SANITIZED
    // What a launch that failed has left.
    __asan_unpoison_memory_region(fibre.stack.get(), STACK);
#endif
    fibre.index = index, fibre.done = false, fibre.waits_for = nullptr, fibre.site = {"", 0}, fibre.fake_stack = nullptr;
    void **top = reinterpret_cast<void **>((reinterpret_cast<size_t>(fibre.stack.get()) + STACK) & ~size_t(63));
    *--top = nullptr;  // alignment, as after a call
    *--top = reinterpret_cast<void *>(begin);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fibre.stack_pointer = top;
}

std::string text(Site site) {
    const char *name = strrchr(site.file, '/');
    return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string describe(const Fibre &fibre) {
    char text[128];
    snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", fibre.index, place.block[0], place.block[1], place.block[2]);
    return text;
}

void run_block(const std::vector<u32> &order) {
    block.arrived = 0, block.barriers = 0;
    block.warps.assign(block.threads / 32, Warp{});
    for (u32 i = 0; i < block.threads; i++) start(fibres[i], i);
    u32 left = block.threads;
    while (left > 0 && failure.empty()) {
        bool moved = false;
        for (u32 warp : order) {
            for (u32 i = 32 * warp; i < 32 * warp + 32 && failure.empty(); i++) {
                Fibre &fibre = fibres[i];
                if (fibre.done || (fibre.waits_for && *fibre.waits_for == fibre.seen)) continue;
                resume(fibre);
                moved = true;
                left -= fibre.done;
            }
        }
        if (moved || !failure.empty()) continue;
        for (u32 i = 0; i < block.threads; i++) {
            if (fibres[i].done) continue;
            u32 other = 0;
            while (other < block.threads && !fibres[other].done && fibres[other].site == fibres[i].site) other++;
            std::string why = other == block.threads ? "" : "; thread " + std::to_string(other) + (fibres[other].done ? " has ended" : " waits in " + text(fibres[other].site));
            fail(describe(fibres[i]) + " waits for others at the " + fibres[i].at + " in " + text(fibres[i].site) + why);
            break;
        }
    }
}

void product(Operand *const (&x)[32]) {
    // Row-major A: lane 4 g + t has rows g and g + 8, columns 4 t .. and 16 + 4 t ..; B: column g, rows likewise.
    i32 a[16][32], b[32][8];
    for (u32 l = 0; l < 32; l++) {
        for (u32 i = 0; i < 4; i++) {
            for (u32 n = 0; n < 4; n++) a[l / 4 + 8 * (n % 2)][16 * (n / 2) + 4 * (l % 4) + i] = x[l]->a[n] >> 8 * i & 255;
            for (u32 n = 0; n < 2; n++) b[16 * n + 4 * (l % 4) + i][l / 4] = i8(x[l]->b[n] >> 8 * i & 255);
        }
    }
    for (u32 l = 0; l < 32; l++) {
        for (u32 n = 0; n < 4; n++) {
            u32 sum = u32(x[l]->c[n]);
            for (u32 k = 0; k < 32; k++) sum += u32(a[l / 4 + 8 * (n / 2)][k] * b[k][2 * (l % 4) + n % 2]);
            x[l]->c[n] = i32(sum);
        }
    }
}

// The worst that a device may do with a sum of floats: each addend is cut in the last bit of the largest, and so is the sum.
template <int N>
float cut_sum(const double (&addends)[N]) {
    double most = 0.0, sum = 0.0;
    for (double y : addends) most = std::fabs(y) > most ? std::fabs(y) : most;
    int exponent = 0;
    std::frexp(most, &exponent);
    const double unit = std::ldexp(1.0, exponent - 24), inverse = std::ldexp(1.0, 24 - exponent);
    for (double y : addends) sum += most < HUGE_VAL ? double(i32(y * inverse)) * unit : y;
    const float cut = float(sum);
    return std::fabs(cut) > std::fabs(sum) && std::fabs(cut) < HUGE_VALF ? std::nextafterf(cut, 0.0f) : cut;
}

void product_tf32(Operand *const (&x)[32]) {
    // Row-major A: lane 4 g + t has rows g and g + 8, columns t and 4 + t; B: column g, rows likewise.
    double a[16][8], b[8][8], addends[9];
    auto operand = [](u32 bits) {
        if (bits & 0x1fff) fail("an operand has more bits than tf32");
        return (bits & 0x7f800000) == 0 ? 0.0 : double(bits_float(bits));  // a device may flush what is subnormal
    };
    for (u32 l = 0; l < 32; l++) {
        for (u32 n = 0; n < 4; n++) a[l / 4 + 8 * (n % 2)][4 * (n / 2) + l % 4] = operand(x[l]->a[n]);
        for (u32 n = 0; n < 2; n++) b[4 * n + l % 4][l / 4] = operand(x[l]->b[n]);
    }
    for (u32 l = 0; l < 32; l++) {
        for (u32 n = 0; n < 4; n++) {
            for (u32 k = 0; k < 8; k++) addends[k] = a[l / 4 + 8 * (n / 2)][k] * b[k][2 * (l % 4) + n % 2];
            addends[8] = bits_float(u32(x[l]->c[n]));
            x[l]->c[n] = i32(float_bits(cut_sum(addends)));
        }
    }
}

void product_f16(Operand *const (&x)[32]) {
    // Row-major A: lane 4 g + t has rows g and g + 8, columns 2 t, 2 t + 1, and 8 more; B: column g, rows likewise.
    double a[16][16], b[16][8], addends[17];
    for (u32 l = 0; l < 32; l++) {
        for (u32 i = 0; i < 2; i++) {
            auto half = [&](u32 pair) { return double(half_to_float(u16(pair >> 16 * i))); };
            for (u32 n = 0; n < 4; n++) a[l / 4 + 8 * (n % 2)][8 * (n / 2) + 2 * (l % 4) + i] = half(x[l]->a[n]);
            for (u32 n = 0; n < 2; n++) b[8 * n + 2 * (l % 4) + i][l / 4] = half(x[l]->b[n]);
        }
    }
    for (u32 l = 0; l < 32; l++) {
        for (u32 n = 0; n < 4; n++) {
            for (u32 k = 0; k < 16; k++) addends[k] = a[l / 4 + 8 * (n / 2)][k] * b[k][2 * (l % 4) + n % 2];
            addends[16] = bits_float(u32(x[l]->c[n]));
            x[l]->c[n] = i32(float_bits(cut_sum(addends)));
        }
    }
}

}  // namespace

Kernel::Kernel(const char *name, u32 threads, size_t params_bytes, void (*run)(const void *))
    : name(name), threads(threads), params_bytes(params_bytes), run(run), next(kernels) {
    kernels = this;
}

const Kernel *Kernel::find(const char *name) {
    const Kernel *kernel = kernels;
    while (kernel && strcmp(kernel->name, name) != 0) kernel = kernel->next;
    return kernel;
}

void meet_block(Site site) {
    // All threads of a block meet at the same barrier, not just at any one.
    if (block.arrived == 0) block.site = site;
    if (!(block.site == site)) {
        fail(describe(*current) + " is at the barrier in " + text(site) + ", others at that in " + text(block.site));
        pause();
    }
    if (++block.arrived == block.threads) {
        block.arrived = 0;
        block.barriers++;
        return;
    }
    wait(&block.barriers, block.barriers, site, "barrier");
}

void meet_warp(Kind kind, Site site, Operand &operand) {
    Warp &w = block.warps[place.thread / 32];
    if (w.arrived == 0) w.kind = kind, w.site = site;
    if (w.kind != kind || !(w.site == site)) {
        fail(describe(*current) + " meets its warp in " + text(site) + ", lanes before it in " + text(w.site));
        pause();
    }
    w.operands[place.thread % 32] = &operand;
    if (++w.arrived < 32) {
        wait(&w.meetings, w.meetings, site, "meeting of its warp");
        return;
    }
    if (kind == SHUFFLE) {
        u64 values[32];
        for (u32 l = 0; l < 32; l++) values[l] = w.operands[w.operands[l]->from]->value;
        for (u32 l = 0; l < 32; l++) w.operands[l]->value = values[l];
    } else if (kind == BALLOT) {
        u64 bits = 0;
        for (u32 l = 0; l < 32; l++) bits |= (w.operands[l]->value & 1) << l;
        for (u32 l = 0; l < 32; l++) w.operands[l]->value = bits;
    } else if (kind == MMA_U8S8) {
        product(w.operands);
    } else if (kind == MMA_TF32) {
        product_tf32(w.operands);
    } else if (kind == MMA_F16) {
        product_f16(w.operands);
    }
    w.arrived = 0;
    w.meetings++;
}

}  // namespace host

void copy_async(Near to, const uint4 *from) {
    if (reinterpret_cast<size_t>(to) % 16 != 0 || reinterpret_cast<size_t>(from) % 16 != 0) host::fail("a copy of 16 bytes is not aligned");
    if (host::copies_wait) host::copies[host::place.thread].back().push_back({to, from});
    else memcpy(to, from, sizeof *from);
}
void commit() { host::copies[host::place.thread].emplace_back(); }
void wait_for(u32 groups) {
    host::Copies &all = host::copies[host::place.thread];
    while (all.size() > groups + 1) {
        for (const host::Copy &copy : all.front()) memcpy(copy.to, copy.from, sizeof *copy.from);
        all.erase(all.begin());
    }
}

u32 load_u32(const void *p) {
    if (reinterpret_cast<size_t>(p) % 4 != 0) host::fail("a load of 4 bytes is not aligned");
    u32 x;
    memcpy(&x, p, sizeof x);
    return x;
}

float half_to_float(u16 x) {
    u32 sign = u32(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | fraction << 13);
    float size = exponent == 0 ? float(fraction) * 5.9604644775390625e-8f : bits_float((exponent + 112) << 23 | fraction << 13);
    return bits_float(sign | float_bits(size));
}

u16 float_to_half(float x) {
    u32 bits = float_bits(x), sign = bits >> 16 & 0x8000;
    float size = bits_float(bits & 0x7fffffff);
    if (size != size) return u16(sign | 0x7e00);
    if (size >= 65520.0f) return u16(sign | 0x7c00);
    if (size < 6.103515625e-5f) return u16(sign | u32(std::nearbyint(size * 16777216.0f)));
    u32 rounded = float_bits(size) + 0xfff + (float_bits(size) >> 13 & 1);
    return u16(sign | ((rounded >> 13) - (112 << 10)));
}

}  // namespace akv

using namespace akv;
using namespace akv::host;

extern "C" {

// Runs a kernel: 0, or -1 and a text. Blocks and warps go in an order that `seed` decides (0: as they are numbered).
__attribute__((visibility("default"))) int akv_host_launch(const char *name, const u32 grid[3], u32 threads, u32 shared_bytes,
                                                           const void *params, u64 params_bytes, u64 seed) {
    failure.clear();
    const Kernel *kernel = Kernel::find(name);
    if (!kernel) fail(std::string("no kernel ") + name);
    if (kernel && (threads % 32 != 0 || threads == 0 || threads > kernel->threads)) fail(std::string(name) + ": threads beyond the launch bounds");
    if (kernel && params_bytes != kernel->params_bytes) fail(std::string(name) + ": parameters of another size");
    if (!failure.empty()) return -1;
    std::vector<u8> shared(shared_bytes + 2 * GUARD + 16);
    u8 *start = reinterpret_cast<u8 *>((reinterpret_cast<size_t>(shared.data()) + GUARD + 15) & ~size_t(15));
    place.shared = start;
    if (fibres.size() < threads) fibres.resize(threads);
    copies_wait = seed % 2;
    block.kernel = kernel, block.params = params, block.threads = threads;
    const u64 n = u64(grid[0]) * grid[1] * grid[2];
    std::vector<u64> blocks(n);
    std::vector<u32> warps(threads / 32);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::iota(warps.begin(), warps.end(), 0);
    std::mt19937_64 random(seed);
    if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
#if SANITIZED
    __asan_poison_memory_region(shared.data(), start - shared.data());
    __asan_poison_memory_region(start + shared_bytes, shared.data() + shared.size() - start - shared_bytes);
#else
    memset(shared.data(), POISON, shared.size());
#endif
    for (u64 i : blocks) {
        if (seed) std::shuffle(warps.begin(), warps.end(), random);
        memset(start, POISON, shared_bytes);
        place.block[0] = u32(i % grid[0]), place.block[1] = u32(i / grid[0] % grid[1]), place.block[2] = u32(i / grid[0] / grid[1]);
        copies.assign(threads, Copies(1));
        run_block(warps);
        for (const Copies &all : copies) {
            for (const auto &group : all) {
                if (!group.empty()) fail(std::string(name) + ": a copy that nobody waits for");
            }
        }
        if (!failure.empty()) break;
    }
#if SANITIZED
    __asan_unpoison_memory_region(shared.data(), shared.size());
#else
    for (u8 *p = shared.data(); p < shared.data() + shared.size() && failure.empty(); p++) {
        if ((p < start || p >= start + shared_bytes) && *p != POISON) fail(std::string(name) + ": wrote beside its shared memory");
    }
#endif
    return failure.empty() ? 0 : -1;
}

// Non-zero if memory that nobody has allocated is noticed.
__attribute__((visibility("default"))) int akv_host_sanitized() { return SANITIZED; }

// Why the last launch failed.
__attribute__((visibility("default"))) const char *akv_host_error() { return failure.c_str(); }
}
