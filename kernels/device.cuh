// What kernels use of the machine: indices, barriers, shuffles, tensor cores, rounded arithmetic. On the device as PTX and
// built-ins; elsewhere from kernels/host, which runs the same sources on the CPU.
#pragma once
#include "params.h"

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
// What is called now and then, by many kernels: compiled once.
#define DEVICE_CALL static __device__ __noinline__
// Before a loop that is not worth its copies.
#define ROLLED _Pragma("unroll 1")
// Before a loop whose index chooses registers.
#define UNROLLED _Pragma("unroll")
// So many copies.
#define UNROLLED_BY(n) PRAGMA(unroll(n))
#define PRAGMA(text) _Pragma(#text)
// Blocks are one-dimensional. The parameters, `p`, are one struct.
#define KERNEL(name, threads, blocks, Params) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)

namespace akv {

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 lane() { return threadIdx.x & 31; }
DEVICE u32 warp() { return threadIdx.x >> 5; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 block_z() { return blockIdx.z; }

// The same, but not to the compiler: it reads anew what it would keep in registers.
template <class T>
DEVICE const T &anew(const T &x) {
    const T *p = &x;
    asm volatile("" : "+l"(p));
    return *p;
}

// Dynamic shared memory.
template <class T>
DEVICE T *shared() {
    extern __shared__ uint4 shared_memory[];
    return reinterpret_cast<T *>(shared_memory);
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void fence() { __threadfence(); }
DEVICE void fence_system() { __threadfence_system(); }  // the host's reads, too

// Among all lanes of a warp.
template <class T>
DEVICE T shuffle(T x, u32 from) {
    return __shfl_sync(~0u, x, from);
}
template <class T>
DEVICE T shuffle_xor(T x, u32 mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
DEVICE u32 ballot(bool x) { return __ballot_sync(~0u, x); }
DEVICE bool any(bool x) { return __any_sync(~0u, x); }
DEVICE u32 reduce_max(u32 x) { return __reduce_max_sync(~0u, x); }

// c += a * b: 16 x 32 unsigned by 32 x 8 signed bytes (PTX ISA, "Matrix fragments for mma.m16n8k32").
DEVICE void mma_u8s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a * b: 16 x 8 by 8 x 8 of tf32, which are floats whose last 13 bits are 0 (the same, "mma.m16n8k8").
DEVICE void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// c += a * b: 16 x 16 by 16 x 8 of f16, two in a word (the same, "mma.m16n8k16").
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same, and known to be global memory: what was an integer does not tell.
template <class T>
DEVICE T *global(T *p) {
    __builtin_assume(__isGlobal(p));
    return p;
}

// Copies to shared memory that go on while the thread does; it sees its own copies once it has waited. `commit` ends a group
// of them, `wait<n>` waits until at most n groups are under way.
using Near = u32;  // an address of shared memory
DEVICE Near near(const void *p) { return u32(__cvta_generic_to_shared(p)); }
DEVICE void copy_async(Near to, const uint4 *from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <i32 n>
DEVICE void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Of memory that nobody writes while the kernel runs.
DEVICE u32 load_u32(const void *p) { return __ldg(static_cast<const u32 *>(p)); }

DEVICE u32 atomic_add(u32 *p, u32 x) { return atomicAdd(p, x); }
DEVICE u64 atomic_add(u64 *p, u64 x) { return atomicAdd(p, x); }
DEVICE u32 atomic_max(u32 *p, u32 x) { return atomicMax(p, x); }
DEVICE u32 atomic_cas(u32 *p, u32 expected, u32 x) { return atomicCAS(p, expected, x); }

DEVICE i32 popc(u32 x) { return __popc(x); }
// Four bytes of b:a, whose bytes are 7 to 0, by the hex digits of `order`.
DEVICE u32 permute(u32 a, u32 b, u32 order) { return __byte_perm(a, b, order); }
// Of numbers that are not NaN.
DEVICE float most(float a, float b) { return fmaxf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

// Rounded once, and never contracted into something else.
DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float sqrt_rn(float x) { return __fsqrt_rn(x); }

// Two f16 in a word: of floats, and their products with a plus b.
DEVICE u32 halves(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE u32 fma_halves(u32 x, u32 a, u32 b) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(a), "r"(b));
    return y;
}

// Within 2 units in the last place; what is below the smallest normal number is 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
DEVICE u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Of floats within 2 units in the last place.
using ::exp;
using ::expm1;
using ::log;
using ::log1p;
using ::sqrt;

}  // namespace akv

#else
#include "host/device.h"
#endif

namespace akv {

DEVICE float bf16_to_float(u16 x) { return bits_float(u32(x) << 16); }
// To the nearest, ties to even; NaN stays NaN.
DEVICE u16 float_to_bf16(float x) {
    u32 bits = float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return u16(bits >> 16 | 0x40);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace akv
