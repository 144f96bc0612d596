#!/bin/sh
# Builds a pinned llama.cpp, the AlignedKV backend and what is measured with them, and
#   ci.sh load     builds no more than ggml and the backend, and loads it
#   ci.sh test     runs llama.cpp's own tests and the demo model through the backend (default)
#   ci.sh bench    measures quality and speed (or only one of them: ci.sh quality, ci.sh speed), writes
#                  benches/results/llamacpp.json and .svg; nothing else should run meanwhile
# Everything lies in LLAMA_CPP_WORK (default target/llamacpp) and is kept for the next run. LLAMA_CPP_DIR and
# LLAMA_CPP_BUILD name a source tree and a build of one's own instead. BENCH_FLAGS goes to `speed`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
what=${1:-test}
case $what in load | test | bench | quality | speed) ;; *) echo "usage: ci.sh [load|test|bench|quality|speed]"; exit 2 ;; esac
work=${LLAMA_CPP_WORK:-$root/target/llamacpp}
mkdir -p "$work/logs"
work=$(cd "$work" && pwd)
say() { echo "llamacpp: $*"; }

# ---- llama.cpp, as the package llama-cpp-python carries it ----

version="llama-cpp-python 0.3.36"
archive=llama_cpp_python-0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
url=https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/$archive.tar.gz

if [ -z "${LLAMA_CPP_DIR:-}" ]; then
    LLAMA_CPP_DIR=$work/src LLAMA_CPP_BUILD=$work/build
    if [ ! -e "$LLAMA_CPP_DIR/CMakeLists.txt" ]; then
        [ -e "$work/$archive.tar.gz" ] || {
            say "fetching $archive"
            curl --proto '=https' --tlsv1.2 -sSfL -o "$work/download" "$url"
            mv "$work/download" "$work/$archive.tar.gz"
        }
        echo "$sha256  $work/$archive.tar.gz" | sha256sum -c --quiet -
        rm -rf "$work/unpacked" && mkdir "$work/unpacked"
        tar -xzf "$work/$archive.tar.gz" -C "$work/unpacked" "$archive/vendor/llama.cpp"
        rm -f "$work/unpacked/$archive/vendor/llama.cpp/.git" # names a repository that is not there: ninja would never be done
        rm -rf "$LLAMA_CPP_DIR" && mv "$work/unpacked/$archive/vendor/llama.cpp" "$LLAMA_CPP_DIR"
        rm -r "$work/unpacked"
    fi
    tools="test-backend-ops test-save-load-state test-state-restore-fragmented test-llama-archs llama-completion llama-batched-bench"
    say "building llama.cpp (the first time takes minutes)"
    [ -e "$LLAMA_CPP_BUILD/build.ninja" ] ||
        cmake -S "$LLAMA_CPP_DIR" -B "$LLAMA_CPP_BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
            -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF >"$work/logs/llama-configure.log"
    targets="ggml llama $tools"
    [ "$what" != load ] || targets=ggml
    # shellcheck disable=SC2086 # a list of words
    ninja -C "$LLAMA_CPP_BUILD" $targets >"$work/logs/llama-build.log" || { tail -n 30 "$work/logs/llama-build.log"; exit 1; }
fi
LLAMA_CPP_BUILD=${LLAMA_CPP_BUILD:-$LLAMA_CPP_DIR/build}
bin=$LLAMA_CPP_BUILD/bin

# ---- the library, the backend, the programs, the models ----

say "building libalignedkv, the backend and the programs"
make -s -C "$root" install PREFIX="$work/alignedkv" DESTDIR= LIBDIR="$work/alignedkv/lib"
build() { # name, source, options...
    name=$1 source=$2
    shift 2
    cmake -S "$source" -B "$work/$name" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP_DIR="$LLAMA_CPP_DIR" -DLLAMA_CPP_BUILD="$LLAMA_CPP_BUILD" \
        "$@" >"$work/logs/$name.log"
    cmake --build "$work/$name" >>"$work/logs/$name.log" || { cat "$work/logs/$name.log"; exit 1; }
}
build backend "$here" -DALIGNEDKV_DIR="$work/alignedkv"
backend=$work/backend/libggml-alignedkv.so
if [ "$what" = load ]; then
    python3 - "$bin/libggml.so" "$backend" <<'END'
import ctypes, sys
ggml = ctypes.CDLL(sys.argv[1])
ggml.ggml_backend_load.restype = ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
assert ggml.ggml_backend_load(sys.argv[2].encode()), "the backend refuses to be loaded"
assert ggml.ggml_backend_dev_by_name(b"AlignedKV"), "it has no device AlignedKV"
END
    say "the backend is built, and ggml loads it"
    exit 0
fi
build bench "$here/bench"

[ -x "$work/venv/bin/python3" ] || {
    python3 -m venv "$work/venv"
    "$work/venv/bin/python3" -m pip install -q numpy pyyaml tqdm # what llama.cpp's gguf-py needs
}
python() { PYTHONPATH=$LLAMA_CPP_DIR/gguf-py PYTHONDONTWRITEBYTECODE=1 "$work/venv/bin/python3" "$@"; }
python "$here/tools/tinylm_gguf.py" "$work/tinylm.gguf"

if [ "$what" != test ]; then
    results=$work/results
    mkdir -p "$results" "$root/benches/results"
    if [ "$what" != quality ]; then
        python "$here/tools/random_gguf.py" "$work/random.gguf"
        python "$here/tools/random_gguf.py" --sharpness 3 "$work/random-sharp.gguf"
        for model in random random-sharp; do
            say "speed, $model"
            # shellcheck disable=SC2086 # a list of words
            "$work/bench/speed" --model "$work/$model.gguf" --json "$results/$model.json" --device "$backend" ${BENCH_FLAGS:-}
        done
    fi
    if [ "$what" != speed ] || [ ! -e "$results/quality.json" ]; then
        say "quality"
        "$work/bench/quality" --model "$work/tinylm.gguf" --text "$root/examples/data/eval.txt" --json "$results/quality.json" --device "$backend"
    fi
    set -- "$results/quality.json"
    for model in random random-sharp; do [ ! -e "$results/$model.json" ] || set -- "$@" "$results/$model.json"; done
    python "$here/bench/report.py" --out "$root/benches/results" --version "$version" "$@" >"$root/benches/results/llamacpp.md"
    cat "$root/benches/results/llamacpp.md"
    say "wrote $root/benches/results/llamacpp.json, .md and .svg"
    exit 0
fi

# ---- tests: each with the backend loaded by the unmodified program, its output in logs/ ----

passed=0 failed=''
try() { # name, words that its output must have, command...
    name=$1 expected=$2
    shift 2
    if (cd "$work/logs" && "$@") >"$work/logs/$name.log" 2>&1 </dev/null && grep -qa -- "$expected" "$work/logs/$name.log"; then
        passed=$((passed + 1))
        echo "ok   $name"
    else
        failed="$failed $name"
        echo "FAIL $name: $work/logs/$name.log ends with"
        tail -n 15 "$work/logs/$name.log" | sed 's/^/     /'
    fi
}

export GGML_BACKEND_PATH="$backend"
device="-ngl 99 -dev AlignedKV"
model="-m $work/tinylm.gguf -t 2"
head -c 200 "$root/examples/data/eval.txt" >"$work/prompt.txt"
ours="AlignedKV: attention reads digit planes: placement"

# Random data is flat and its error limit tight: exact mode, so that what is tested is the operation.
export ALIGNEDKV_MODE=exact
try set-rows "tests passed" "$bin/test-backend-ops" test -b AlignedKV -o SET_ROWS
try flash-attn-ext "$ours" "$bin/test-backend-ops" test -b AlignedKV -o FLASH_ATTN_EXT -p 'hsk=(40|64|72|80|96|128|192|256),.*type_K=f16'
unset ALIGNEDKV_MODE

# shellcheck disable=SC2086 # lists of words
for placement in slots attached; do
    export ALIGNEDKV_PLACEMENT=$placement
    # Looks for devices before it loads any backend: hence the preload.
    try archs-$placement "test(s) passed" env LD_PRELOAD="$work/bench/preload.so" "$bin/test-llama-archs" -b AlignedKV -s 1
    try save-load-state-$placement "All tests passed" "$bin/test-save-load-state" $model $device -c 2048
    try restore-fragmented-$placement "SUCCESS" "$bin/test-state-restore-fragmented" $model $device
    try batched-$placement "$ours $placement" "$bin/llama-batched-bench" $model $device -lv 4 -c 4096 -npp 128,512 -ntg 32 -npl 1,4
    try batched-shared-prompt-$placement "$ours $placement" "$bin/llama-batched-bench" $model $device -lv 4 -c 4096 -npp 512 -ntg 32 -npl 4 -pps -kvu
    for flash in on auto off; do # off: attention is ggml's, over rows that the backend keeps plain
        expected="$ours $placement"
        [ $flash = off ] && expected="AlignedKV KV buffer"
        try context-shift-fa-$flash-$placement "$expected" "$bin/llama-completion" $model $device -lv 4 -f "$work/prompt.txt" -c 256 -n 600 \
            --keep 16 --context-shift --temp 0 -no-cnv --no-warmup -fa $flash
    done
done
unset ALIGNEDKV_PLACEMENT GGML_BACKEND_PATH

# What comes out: the demo model's predictions, also in a context that shifts.
quality() {
    "$work/bench/quality" --model "$work/tinylm.gguf" --text "$root/examples/data/eval.txt" --device "$backend" --json "$work/logs/quality.json" "$@" &&
        python "$here/bench/report.py" --check "$work/logs/quality.json"
}
try quality "ok   slots exact" quality --windows 3 --greedy 64
try quality-shift "ok   slots exact" quality --windows 2 --greedy 0 --shift 256
grep -ha "^alignedkv\|^q8_0\|^f16\|^KV cache" "$work/logs/quality.log" || true

[ -z "$failed" ] || { say "$passed passed, failed:$failed"; exit 1; }
say "$passed passed"
