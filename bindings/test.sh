#!/bin/sh
# The bindings against an installed library: Go and C# tests, the same trace in every language, the programs of the pages.
# usage: test.sh ROOT STAGE    where STAGE is what make install DESTDIR=STAGE PREFIX=/usr wrote to
set -eu
root=$1 stage=$2
lib=$stage/usr/lib work=$stage/work
mkdir -p "$work"
fail() { echo "bindings: $*"; exit 1; }
export PKG_CONFIG_PATH="$lib/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$stage" PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1
export LD_LIBRARY_PATH="$lib"
flags=$(pkg-config --cflags --libs alignedkv)
passed=0

echo "== go"
cd "$root/bindings/go"
unformatted=$(gofmt -l . ../trace ../bench)
[ -z "$unformatted" ] || fail "gofmt would change $unformatted"
go vet ./...
go test ./...
GOEXPERIMENT=cgocheck2 go test -race -count=1 ./...
passed=$((passed + 2))

echo "== csharp"
cd "$root/bindings/csharp"
mcs -unsafe -langversion:7.2 -warnaserror -target:library -doc:"$work/AlignedKV.xml" -out:"$work/AlignedKV.dll" src/*.cs
mcs -unsafe -langversion:7.2 -warnaserror -nowarn:1591 -out:"$work/tests.exe" src/*.cs test/*.cs
mono "$work/tests.exe"
passed=$((passed + 1))

echo "== the same trace in every language"
trace=$root/bindings/trace
cd "$work"
python3 "$trace/make.py" trace.bin
# shellcheck disable=SC2086 # a list of flags
{
    cc -std=c11 -O1 -Wall -Wextra -Werror "$trace/trace.c" -o trace_c $flags
    c++ -std=c++17 -O1 -Wall -Wextra -Werror "$trace/trace.cpp" -o trace_cpp $flags
}
(cd "$root/bindings/go" && go build -o "$work/trace_go" "$trace/trace.go")
mcs -langversion:7.2 -warnaserror -r:AlignedKV.dll -out:trace_csharp.exe "$trace/Trace.cs"
{
    ./trace_c trace.bin
    ./trace_cpp trace.bin
    ./trace_go trace.bin
    mono trace_csharp.exe trace.bin
    AKV_ISA=scalar ./trace_c trace.bin
} >hashes
[ "$(wc -l <hashes)" = 5 ] && [ "$(sort -u hashes | wc -l)" = 1 ] || fail "C, C++, Go, C# and portable code differ: $(tr '\n' ' ' <hashes)"
passed=$((passed + 1))

echo "== the pages' programs"
python3 "$root/tools/pages.py" "$root" "$work/pages"
for page in "$work"/pages/*; do
    cd "$page"
    for program in *; do
        # shellcheck disable=SC2086 # a list of flags
        case $program in
            *.c) cc -std=c11 -Wall -Wextra -Werror "$program" -o program $flags -lm && ./program ;;
            *.cpp) c++ -std=c++17 -Wall -Wextra -Werror "$program" -o program $flags && ./program ;;
            *.go) (cd "$root/bindings/go" && go vet "$page/$program" && go build -o "$page/program" "$page/$program") && ./program ;;
            *.cs) mcs -langversion:7.2 -warnaserror -r:"$work/AlignedKV.dll" -out:program.exe "$program" && MONO_PATH="$work" mono program.exe ;;
            *) fail "no way to run $program" ;;
        esac >output || fail "$program of docs/$(basename "$page").md does not run"
        [ -s output ] || fail "$program of docs/$(basename "$page").md says nothing"
        rm output
        passed=$((passed + 1))
    done
done
echo "bindings: $passed passed, 0 failed"
