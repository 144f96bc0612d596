#!/bin/sh
# Makes of Rust's static library one that shows the C functions alone, so that it links beside other Rust libraries: one
# object of the members that these functions need, in which all other symbols are local.
# usage: localise.sh FROM TO
set -eu
from=$1 to=$2
symbols=$(dirname "$0")/symbols.txt
object=$(mktemp -d)/alignedkv.o
trap 'rm -r "$(dirname "$object")"' EXIT
# shellcheck disable=SC2046 # a list of options
"${LD:-ld}" -r $(sed 's/^/-u /' "$symbols") "$from" -o "$object"
# Bitcode that the standard library carries along only makes plug-ins of other LLVMs fail.
"${OBJCOPY:-objcopy}" --keep-global-symbols="$symbols" --remove-section .llvmbc --remove-section .llvmcmd "$object"
rm -f "$to"
"${AR:-ar}" rcs "$to" "$object"
chmod 644 "$to"
