#!/bin/sh
# Prints a folder with TensorRT's headers, for compiling against them: TENSORRT_INCLUDE if it is set, otherwise those that
# the crate trtx-sys carries (TensorRT for RTX 1.3, Apache-2.0), fetched into the folder given and checked.
set -eu
[ -z "${TENSORRT_INCLUDE:-}" ] || { echo "$TENSORRT_INCLUDE"; exit; }
folder=$1
crate=trtx-sys-0.3.1
sha256=2ae9dd5b3c7ecf5a2509b42b4118124d8bf0169d88adc04dc82e8c87c23b7627
mkdir -p "$folder"
if [ ! -e "$folder/$crate.crate" ]; then
    echo "tensorrt: fetching headers in $crate" >&2
    curl --proto '=https' --tlsv1.2 -sSfL -o "$folder/download" "https://static.crates.io/crates/trtx-sys/$crate.crate"
    mv "$folder/download" "$folder/$crate.crate"
fi
echo "$sha256  $folder/$crate.crate" | sha256sum -c --quiet - >&2
[ -d "$folder/$crate" ] || tar -xzf "$folder/$crate.crate" -C "$folder" "$crate/TensorRT-Headers"
echo "$folder/$crate/TensorRT-Headers/TRT-RTX-1.3"
