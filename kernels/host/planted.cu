// Kernels with a fault each, which running them must bring to light, and a right one beside those that could be.
#include "../device.cuh"

namespace akv {

struct PlantedParams {
    u64 a, b, out;
    i32 n, reserved;
};

DEVICE float *floats(u64 address) { return reinterpret_cast<float *>(address); }

// A thread that leaves before a barrier.
KERNEL(planted_skipped_barrier, 64, 1, PlantedParams) {
    if (thread() == 5) return;
    sync_block();
    floats(p.out)[thread()] = 1.0f;
}

// Warps that meet at different barriers.
KERNEL(planted_two_barriers, 64, 1, PlantedParams) {
    if (warp() == 0) {
        sync_block();
    } else {
        sync_block();
    }
    floats(p.out)[thread()] = 1.0f;
}

// Lanes that do not all shuffle.
KERNEL(planted_half_a_warp, 32, 1, PlantedParams) {
    float x = floats(p.a)[thread()];
    if (lane() < 16) x = shuffle_xor(x, 1);
    floats(p.out)[thread()] = x;
}

// Reads what another warp has written, with no barrier between if n is 0.
KERNEL(planted_missing_barrier, 64, 1, PlantedParams) {
    float *x = shared<float>();
    x[thread()] = float(thread());
    if (p.n) sync_block();
    floats(p.out)[thread()] = x[63 - thread()];
}

// Writes beside its shared memory.
KERNEL(planted_shared_overrun, 32, 1, PlantedParams) { shared<float>()[p.n + thread()] = 1.0f; }

// Reads rows up to n.
KERNEL(planted_row_out_of_range, 32, 1, PlantedParams) {
    float sum = 0.0f;
    for (i32 row = 0; row <= p.n; row++) sum += floats(p.a)[32 * row + thread()];
    floats(p.out)[thread()] = sum;
}

// 16 x 32 bytes times 32 x 8; two fragments swapped if n is 0.
KERNEL(planted_swapped_fragments, 32, 1, PlantedParams) {
    const u8 *a = reinterpret_cast<const u8 *>(p.a), *b = reinterpret_cast<const u8 *>(p.b);
    const i32 g = lane() / 4, t = lane() % 4;
    u32 fragments[4] = {}, columns[2] = {};
    for (i32 i = 0; i < 4; i++) {
        for (i32 n = 0; n < 4; n++) fragments[n] |= u32(a[32 * (g + 8 * (n % 2)) + 16 * (n / 2) + 4 * t + i]) << 8 * i;
        for (i32 n = 0; n < 2; n++) columns[n] |= u32(b[8 * (16 * n + 4 * t + i) + g]) << 8 * i;
    }
    if (p.n == 0) {
        u32 x = fragments[1];
        fragments[1] = fragments[2];
        fragments[2] = x;
    }
    i32 c[4] = {};
    mma_u8s8(c, fragments, columns[0], columns[1]);
    for (i32 n = 0; n < 4; n++) floats(p.out)[8 * (g + 8 * (n / 2)) + 2 * t + n % 2] = float(c[n]);
}

// The same of floats: 16 x 8 times 8 x 8.
KERNEL(planted_swapped_tf32, 32, 1, PlantedParams) {
    const float *a = floats(p.a), *b = floats(p.b);
    const i32 g = lane() / 4, t = lane() % 4;
    const float left[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + 4 + t], a[8 * (g + 8) + 4 + t]};
    const float swapped[4] = {left[0], left[2], left[1], left[3]};
    float c[4] = {};
    mma_tf32(c, p.n ? left : swapped, b[8 * t + g], b[8 * (4 + t) + g]);
    for (i32 n = 0; n < 4; n++) floats(p.out)[8 * (g + 8 * (n / 2)) + 2 * t + n % 2] = c[n];
}

// 16 x 16 f16 times 16 x 8, likewise.
KERNEL(planted_swapped_f16, 32, 1, PlantedParams) {
    const float *a = floats(p.a), *b = floats(p.b);
    const i32 g = lane() / 4, t = lane() % 4;
    u32 left[4], right[2];
    for (i32 n = 0; n < 4; n++) {
        const float *from = a + 16 * (g + 8 * (p.n ? n % 2 : n / 2)) + 8 * (p.n ? n / 2 : n % 2) + 2 * t;
        left[n] = halves(from[0], from[1]);
    }
    for (i32 n = 0; n < 2; n++) right[n] = halves(b[8 * (8 * n + 2 * t) + g], b[8 * (8 * n + 2 * t + 1) + g]);
    float c[4] = {};
    mma_f16(c, left, right[0], right[1]);
    for (i32 n = 0; n < 4; n++) floats(p.out)[8 * (g + 8 * (n / 2)) + 2 * t + n % 2] = c[n];
}

// Two groups of copies to the same place, each read when it has arrived. n = 0: the first is read too early, 1: the second
// starts too early, 2: nobody waits for the second.
KERNEL(planted_copies, 32, 1, PlantedParams) {
    const uint4 *from = reinterpret_cast<const uint4 *>(p.a) + thread();
    float4 *x = shared<float4>() + thread(), *out = reinterpret_cast<float4 *>(p.out) + thread();
    *x = float4{-1.0f, -1.0f, -1.0f, -1.0f};
    copy_async(near(x), from);
    commit();
    if (p.n == 1) copy_async(near(x), from + 32);
    if (p.n == 0) wait<1>();
    else wait<0>();
    out[0] = *x;
    if (p.n != 1) copy_async(near(x), from + 32);
    commit();
    if (p.n != 2) wait<0>();
    out[32] = *x;
}

// Blocks that merge in the order in which they come.
KERNEL(planted_order_of_blocks, 32, 1, PlantedParams) {
    if (thread() == 0) floats(p.out)[0] = floats(p.out)[0] * 0.5f + float(block_x());
}

}  // namespace akv
