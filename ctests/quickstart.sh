#!/bin/sh
# The README's program, compiled against the installed library as a reader would, and run; and it is examples/quickstart.c.
# usage: quickstart.sh ROOT STAGE
set -eu
root=$1 stage=$2
lib=$stage/usr/lib
cd "$stage"
sed -n '/<!-- quickstart -->/,/<!-- \/quickstart -->/p' "$root/README.md" | sed '/^<!--/d; /^```/d' >quickstart.c
diff -u "$root/examples/quickstart.c" quickstart.c || { echo "quickstart: README.md is stale: run make readme"; exit 1; }
export PKG_CONFIG_PATH="$lib/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$stage" PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1
# shellcheck disable=SC2046 # a list of flags
cc -std=c11 -Wall -Wextra -Werror quickstart.c -o quickstart $(pkg-config --cflags --libs alignedkv) -lm
LD_LIBRARY_PATH=$lib ./quickstart
