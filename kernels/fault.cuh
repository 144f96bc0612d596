// What cannot be returned by the call that launched it: the first fault is kept until the host asks.
#pragma once
#include "device.cuh"

namespace akv {

struct Place {
    u64 sequence;
    i64 row;
    i32 layer, head;
    u32 where;
};

DEVICE_CALL void report_fault(u64 to, u32 status, Place at) {
    Fault *fault = reinterpret_cast<Fault *>(to);
    if (atomic_cas(&fault->claimed, 0u, 1u) != 0) return;
    fault->sequence = at.sequence;
    fault->row = at.row;
    fault->layer = at.layer;
    fault->head = at.head;
    fault->where = at.where;
    fence_system();
    *static_cast<volatile u32 *>(&fault->status) = status;
}

}  // namespace akv
