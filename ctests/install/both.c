/* Two Rust libraries in one program: each keeps its own standard library to itself. */
#include <alignedkv.h>
#include <stdio.h>

uint32_t other_answer(uint32_t n);

int main(void) {
    akv_context *context;
    akv_context_desc desc = {.struct_size = sizeof desc, .abi_version = AKV_ABI_VERSION, .n_threads = 2};
    if (akv_context_create(&desc, &context) != AKV_OK) return 1;
    if (other_answer(12) != 14) return 2; /* the digits of 0 to 11 */
    puts(akv_version_string());
    return akv_context_destroy(context) != AKV_OK;
}
