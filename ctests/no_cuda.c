/* A machine whose driver is missing, broken or too old: no_cuda WORDS expects AKV_E_UNSUPPORTED, with a text that has the
 * words, and a CPU backend that works as ever. */
#include "check.h"

int main(int argc, char **argv) {
    akv_context *context = NULL;
    akv_context_desc desc = {.struct_size = sizeof desc, .abi_version = AKV_ABI_VERSION, .backend = AKV_CUDA};
    for (int i = 0; i < 2; i++) {
        akv_status status = akv_context_create(&desc, &context);
        CHECK(status == AKV_E_UNSUPPORTED && context == NULL, "status %d", status);
        CHECK(argc > 1 && strstr(last_error(), argv[1]), "%s", last_error());
    }
    desc.backend = AKV_CPU;
    OK(akv_context_create(&desc, &context));
    OK(akv_context_destroy(context));
    return finish("no_cuda");
}
