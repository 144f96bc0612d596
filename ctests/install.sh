#!/bin/sh
# make install into a staging directory; then the packages it wrote link and run programs, shared and static.
# usage: install.sh ROOT STAGE
set -eu
root=$1 stage=$2
lib=$stage/usr/lib
rm -rf "$stage"
mkdir -p "$stage"
fail() { echo "install: $*"; exit 1; }

make -s -C "$root" install DESTDIR="$stage" PREFIX=/usr
cd "$stage"

# What is exported, under which name, and what that needs.
python3 "$root/bindings/abi/check.py" "$stage"

# pkg-config, relocated into the stage.
export PKG_CONFIG_PATH="$lib/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$stage" PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1
programs=$root/ctests/install
version=$(pkg-config --modversion alignedkv)
shared_flags=$(pkg-config --cflags --libs alignedkv)
static_flags="$(pkg-config --cflags alignedkv) -Wl,-Bstatic $(pkg-config --libs alignedkv) -Wl,-Bdynamic $(pkg-config --static --libs-only-l alignedkv | sed 's/-lalignedkv//')"
runs() { LD_LIBRARY_PATH=$2 "./$1" | grep -q "alignedkv $version" || fail "$1: another version than $version"; }
# shellcheck disable=SC2086 # lists of flags
for linked in shared static; do
    eval flags=\$${linked}_flags
    cc -std=c11 "$programs/main.c" -o c_$linked $flags
    c++ -std=c++17 "$programs/main.cpp" -o cpp_$linked $flags
done
runs c_shared "$lib" && runs cpp_shared "$lib" && runs c_static /nowhere && runs cpp_static /nowhere
if readelf -d c_static cpp_static | grep -q libalignedkv; then fail "static: linked to the shared library"; fi

# Beside another Rust library, with all that is in either.
rustc --edition 2024 -O --crate-type staticlib "$programs/other.rs" -o libother.a
# shellcheck disable=SC2086
cc -std=c11 "$programs/both.c" -o both libother.a -L"$lib" -Wl,--whole-archive,-Bstatic -lalignedkv -Wl,-Bdynamic,--no-whole-archive $(pkg-config --cflags alignedkv) -lpthread -ldl -lm
runs both /nowhere

# find_package.
cmake -S "$root/ctests/install" -B cmake -Dalignedkv_DIR="$lib/cmake/alignedkv" >/dev/null
cmake --build cmake >/dev/null
cmake/c_shared >/dev/null && cmake/c_static >/dev/null && cmake/cpp_shared >/dev/null && cmake/cpp_static >/dev/null || fail "programs built with find_package do not run"
if cmake -S "$root/ctests/install" -B newer -DCMAKE_PREFIX_PATH="$stage/usr" -DCMAKE_PROJECT_INCLUDE=/dev/stdin >/dev/null 2>&1 <<'END'
find_package(alignedkv 0.2 REQUIRED)
END
then fail "find_package accepted another minor version"; fi
echo "install: $version links and runs from C and C++ by pkg-config and find_package, shared, static and beside another Rust library"
