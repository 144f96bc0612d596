"""The C ABI for Python: structs of include/alignedkv.h, and calls that raise on errors (ctypes alone)."""
import ctypes as C

F32, F16, BF16 = 0, 1, 2
ALIGNED, PUBLISHED, RAW = 0, 1, 2
EXPECTED, GUARANTEED, EXACT = 0, 1, 2
CPU, CUDA = 1, 2
NONE = 2**32 - 1


def struct(name, fields):
    codes = {"u": C.c_uint32, "i": C.c_int32, "U": C.c_uint64, "I": C.c_int64, "f": C.c_float, "p": C.c_void_p}
    pairs = []
    for field in fields.split():
        field, code = field.split(":")
        pairs.append((field, codes[code] if code in codes else STRUCTS[code]))
    STRUCTS[name] = type(name, (C.Structure,), {"_fields_": pairs})
    return STRUCTS[name]


STRUCTS = {"c5": C.c_uint64 * 5}
Context = struct("context", "struct_size:u abi_version:u backend:i device:i isa:i n_threads:i cuda:p alloc:p dealloc:p alloc_user:p log:p log_user:p")
Layer = struct("layer", "n_q_heads:i n_kv_heads:i dim_k:i dim_v:i dtype_k:i dtype_v:i planes_k:i planes_v:i window:i group:i share_with:i v_is_prefix_of_k:i")
Cache = struct("cache", "struct_size:u flags:u format:i placement:i nan_policy:i n_layers:i layers:p max_sequences:u exact_head:u exact_tail:u reserved:u n_slots:U max_bytes:U")
Batch = struct("batch", "struct_size:u n_sequences:u sequences:p n_new:p n_q:p positions:p max_sequences:i max_q:i max_kv:I max_threads:i reserved:i")
Rows = struct("rows", "data:p stride_row:I stride_head:I dtype:i reserved:i")
Stats = struct("stats", "bytes_k:U bytes_v:U bytes_scales:U bytes_exact:U planes_k:c5 planes_v:c5 tokens:U dense_rows:U backend:i isa:i path:i reserved:i")
Attention = struct("attention", "struct_size:u flags:u q:rows out:rows scale:f softcap:f tolerance:f mode:i visibility:i window:i sink_tokens:i reserved:i alibi:p sink:p mask:p kv_from:p "
                   "kv_to:p tree:p lse:p bound:p lse_bound:p estimate:p amplitude:p stats:p threads:p workspace:p workspace_bytes:U stream:p")


class Library:
    def __init__(self, path, backend=CPU):
        self.lib = C.CDLL(str(path))
        self.context = C.c_void_p()
        self("context_create", C.byref(sized(Context, abi_version=1, backend=backend)), C.byref(self.context))

    def __call__(self, name, *args):
        if getattr(self.lib, "akv_" + name)(*args) != 0:
            text = C.create_string_buffer(512)
            self.lib.akv_last_error(text, C.c_size_t(512), None)
            raise RuntimeError(f"akv_{name}: {text.value.decode()}")

    def version(self):
        self.lib.akv_version_string.restype = C.c_char_p
        return self.lib.akv_version_string().decode()


def sized(struct, **fields):
    return struct(struct_size=C.sizeof(struct), **fields)
