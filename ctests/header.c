/* The header stands alone, may be included twice, and needs no later C than C99. */
#include "alignedkv.h"
#include "alignedkv.h"

int main(void) {
    akv_usage usage = {0};
    return akv_abi_version() == AKV_ABI_VERSION && usage.struct_size == 0 ? 0 : 1;
}
