// Both headers stand alone and may be included twice; alignedkv.h is C++, too.
#include "alignedkv.hpp"
#include "alignedkv.hpp"
#include "alignedkv.h"

int main() { return akv_abi_version() == AKV_ABI_VERSION ? 0 : 1; }
