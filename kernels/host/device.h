// The machine of kernels/device.cuh on the CPU: threads are fibres of one OS thread, and meet at barriers, shuffles and
// mma as the lanes of a warp would. What must not happen is an error that names the place: a barrier that a thread
// skips, lanes that meet at different places.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include "../params.h"

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

#define DEVICE inline
#define DEVICE_CALL inline
#define ROLLED
#define UNROLLED
#define UNROLLED_BY(n)
#define KERNEL(name, threads, blocks, Params)                                                                              \
    static void name(const Params &p);                                                                                     \
    static const akv::host::Kernel name##_kernel(#name, threads, sizeof(Params),                                           \
                                                 [](const void *p) { name(*static_cast<const Params *>(p)); });            \
    static void name(const Params &p)

namespace akv {
namespace host {

// A kernel by its name.
struct Kernel {
    const char *name;
    u32 threads;
    size_t params_bytes;
    void (*run)(const void *params);
    const Kernel *next;

    Kernel(const char *name, u32 threads, size_t params_bytes, void (*run)(const void *));
    static const Kernel *find(const char *name);
};

// The thread that runs.
struct Place {
    u32 thread, block[3];
    u8 *shared;
};
extern Place place;

enum Kind { BARRIER, WARP_BARRIER, SHUFFLE, BALLOT, MMA_U8S8, MMA_TF32, MMA_F16 };

// What a lane brings to a meeting of its warp, and takes from it.
struct Operand {
    u64 value;
    u32 from, a[4], b[2];
    i32 c[4];
};

// A place in the sources.
struct Site {
    const char *file;
    int line;

    static Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Site &other) const { return line == other.line && strcmp(file, other.file) == 0; }
};

// Waits for all threads of the block or lanes of the warp, which must meet at the same place.
void meet_block(Site site);
void meet_warp(Kind kind, Site site, Operand &operand);

}  // namespace host

DEVICE u32 thread() { return host::place.thread; }
DEVICE u32 lane() { return host::place.thread % 32; }
DEVICE u32 warp() { return host::place.thread / 32; }
DEVICE u32 block_x() { return host::place.block[0]; }
DEVICE u32 block_y() { return host::place.block[1]; }
DEVICE u32 block_z() { return host::place.block[2]; }

template <class T>
const T &anew(const T &x) {
    return x;
}
template <class T>
T *shared() {
    return reinterpret_cast<T *>(host::place.shared);
}


inline void sync_block(host::Site site = host::Site::here()) { host::meet_block(site); }
inline void sync_warp(host::Site site = host::Site::here()) {
    host::Operand x = {};
    host::meet_warp(host::WARP_BARRIER, site, x);
}
inline void fence() {}
inline void fence_system() {}

template <class T>
T shuffle(T x, u32 from, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    memcpy(&operand.value, &x, sizeof x);
    operand.from = from % 32;
    host::meet_warp(host::SHUFFLE, site, operand);
    memcpy(&x, &operand.value, sizeof x);
    return x;
}
template <class T>
T shuffle_xor(T x, u32 mask, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    memcpy(&operand.value, &x, sizeof x);
    operand.from = lane() ^ mask;
    host::meet_warp(host::SHUFFLE, site, operand);
    memcpy(&x, &operand.value, sizeof x);
    return x;
}
inline u32 ballot(bool x, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    operand.value = x;
    host::meet_warp(host::BALLOT, site, operand);
    return u32(operand.value);
}
inline bool any(bool x, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    operand.value = x;
    host::meet_warp(host::BALLOT, site, operand);
    return operand.value != 0;
}
inline u32 reduce_max(u32 x, host::Site site = host::Site::here()) {
    for (u32 mask = 16; mask > 0; mask /= 2) {
        u32 y = shuffle_xor(x, mask, site);
        x = x > y ? x : y;
    }
    return x;
}
inline void mma_u8s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    memcpy(operand.a, a, sizeof a);
    memcpy(operand.c, c, sizeof c);
    operand.b[0] = b0, operand.b[1] = b1;
    host::meet_warp(host::MMA_U8S8, site, operand);
    memcpy(c, operand.c, sizeof c);
}

inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    memcpy(operand.a, a, sizeof a);
    memcpy(operand.c, c, sizeof c);
    memcpy(&operand.b[0], &b0, 4), memcpy(&operand.b[1], &b1, 4);
    host::meet_warp(host::MMA_TF32, site, operand);
    memcpy(c, operand.c, sizeof c);
}

inline void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, host::Site site = host::Site::here()) {
    host::Operand operand = {};
    memcpy(operand.a, a, sizeof a);
    memcpy(operand.c, c, sizeof c);
    operand.b[0] = b0, operand.b[1] = b1;
    host::meet_warp(host::MMA_F16, site, operand);
    memcpy(c, operand.c, sizeof c);
}

template <class T>
T *global(T *p) {
    return p;
}

using Near = u8 *;
inline Near near(void *p) { return static_cast<u8 *>(p); }
// By the seed at once or when they are waited for: who reads too early, and who has not read yet, has something else.
void copy_async(Near to, const uint4 *from);
void commit();
void wait_for(u32 groups);
template <i32 n>
void wait() {
    wait_for(n);
}

// Loads must be aligned on the device: this one is checked, those through pointers by the sanitizer.
u32 load_u32(const void *p);

template <class T>
T atomic_add(T *p, T x) {
    T old = *p;
    *p += x;
    return old;
}
inline u32 atomic_max(u32 *p, u32 x) {
    u32 old = *p;
    *p = x > old ? x : old;
    return old;
}
inline u32 atomic_cas(u32 *p, u32 expected, u32 x) {
    u32 old = *p;
    if (old == expected) *p = x;
    return old;
}

inline i32 popc(u32 x) { return __builtin_popcount(x); }
inline u32 permute(u32 a, u32 b, u32 order) {
    u32 y = 0;
    for (u32 i = 0; i < 4; i++) y |= u32((u64(b) << 32 | a) >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
    return y;
}
inline float most(float a, float b) { return a > b ? a : b; }
inline float magnitude(float x) { return std::fabs(x); }
inline u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float x) { return std::sqrt(x); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float sqrt_fast(float x) { return std::sqrt(x); }
inline float inverse_fast(float x) { return 1.0f / x; }

float half_to_float(u16 x);
u16 float_to_half(float x);
inline u32 halves(float low, float high) { return float_to_half(low) | u32(float_to_half(high)) << 16; }
inline u32 fma_halves(u32 x, u32 a, u32 b) {
    auto part = [=](i32 shift) { return half_to_float(u16(x >> shift)) * half_to_float(u16(a >> shift)) + half_to_float(u16(b >> shift)); };
    return halves(part(0), part(16));
}

using std::exp;
using std::expm1;
using std::log;
using std::log1p;
using std::sqrt;

}  // namespace akv
