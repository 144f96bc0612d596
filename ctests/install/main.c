/* A program of someone who has installed the library. */
#include <alignedkv.h>
#include <stdio.h>

int main(void) {
    akv_context *context;
    akv_context_desc desc = {.struct_size = sizeof desc, .abi_version = AKV_ABI_VERSION};
    if (akv_context_create(&desc, &context) != AKV_OK) return 1;
    puts(akv_version_string());
    return akv_context_destroy(context) != AKV_OK;
}
