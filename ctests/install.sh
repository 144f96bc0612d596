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

# What is exported, and under which name.
readelf -d "$lib/libalignedkv.so" | grep -q 'SONAME.*\[libalignedkv\.so\.0\]' || fail "soname is not libalignedkv.so.0"
readelf -d "$lib/libalignedkv.so" | grep -q NODELETE || fail "not marked nodelete"
other=$(nm -D --defined-only "$lib/libalignedkv.so" | awk '{print $3}' | grep -v '^akv_' || true)
[ -z "$other" ] || fail "exports beyond akv_: $other"
for name in $(sed -n 's/^[a-z][a-z0-9_ ]*[ *]\(akv_[a-z_]*\)(.*/\1/p' "$root/include/alignedkv.h"); do
    nm -D --defined-only "$lib/libalignedkv.so" | grep -q " $name\$" || fail "$name is declared and not exported"
done

# pkg-config, relocated into the stage.
export PKG_CONFIG_PATH="$lib/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$stage" PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1
main=$root/ctests/install/main.c
version=$(pkg-config --modversion alignedkv)
# shellcheck disable=SC2046 # lists of flags
cc -std=c11 "$main" -o shared $(pkg-config --cflags --libs alignedkv)
LD_LIBRARY_PATH=$lib ./shared | grep -q "alignedkv $version" || fail "shared: another version than $version"
# shellcheck disable=SC2046
cc -std=c11 "$main" -o static $(pkg-config --cflags alignedkv) -Wl,-Bstatic $(pkg-config --libs alignedkv) -Wl,-Bdynamic $(pkg-config --static --libs-only-l alignedkv | sed 's/-lalignedkv//')
./static | grep -q "alignedkv $version" || fail "static: another version than $version"
if readelf -d static | grep -q libalignedkv; then fail "static: linked to the shared library"; fi

# find_package.
cmake -S "$root/ctests/install" -B cmake -Dalignedkv_DIR="$lib/cmake/alignedkv" >/dev/null
cmake --build cmake >/dev/null
cmake/shared >/dev/null && cmake/static >/dev/null || fail "programs built with find_package do not run"
if cmake -S "$root/ctests/install" -B newer -DCMAKE_PREFIX_PATH="$stage/usr" -DCMAKE_PROJECT_INCLUDE=/dev/stdin >/dev/null 2>&1 <<'END'
find_package(alignedkv 0.2 REQUIRED)
END
then fail "find_package accepted another minor version"; fi
echo "install: $version links and runs by pkg-config and find_package, shared and static"
