// The same with find_package and the C++ header.
#include <alignedkv.hpp>
#include <cstdio>

int main() {
    std::puts(akv_version_string());
    return akv_abi_version() == AKV_ABI_VERSION ? 0 : 1;
}
