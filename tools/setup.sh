#!/bin/sh
# Installs what a fresh Debian or Ubuntu lacks to build (setup.sh build) or to build and test (setup.sh test). Where all
# is present it does nothing and needs no network. Uses sudo if not root, and prints what it installs.
set -eu
cd "$(dirname "$0")/.."
what=${1:-build}
PATH="$PWD/.go/bin:${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/local/go/bin"
RUST=1.89 # rust-version in Cargo.toml
GO=1.22   # go in bindings/go/go.mod

say() { echo "setup: $*"; }
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }
has() { command -v "$1" >/dev/null 2>&1; }
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
update() {
    [ -n "${updated:-}" ] || root apt-get update -qq
    updated=1
}
apt() {
    has apt-get || { say "please install $* with this system's package manager"; exit 1; }
    say "installing with apt: $*"
    update
    root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

missing=
need() { has "$1" || missing="$missing $2"; }
need cc build-essential
need make build-essential
if [ "$what" = test ]; then
    need c++ build-essential
    need cmake cmake
    need ninja ninja-build
    need pkg-config pkg-config
    need curl "curl ca-certificates"
    need valgrind "valgrind libc6-dbg"
    need python3 python3
    need abidiff abigail-tools
    need mcs mono-mcs
    need mono mono-runtime
    need mpicc "libopenmpi-dev openmpi-bin"
fi
# shellcheck disable=SC2086 # a list of words
[ -z "$missing" ] || apt $missing

new_enough() {
    has cargo || return 1
    at_least "$RUST" "$(cargo --version 2>/dev/null | cut -d' ' -f2)"
}
if ! new_enough; then
    if ! has rustup; then
        if has apt-get; then update; fi
        if has apt-get && apt-cache policy rustup | grep -q 'Candidate: [0-9]'; then # Debian 13, Ubuntu 24.04
            apt rustup
        else
            has curl || apt curl ca-certificates
            say "installing Rust with https://sh.rustup.rs into ${CARGO_HOME:-$HOME/.cargo}"
            script=$(mktemp)
            curl --proto '=https' --tlsv1.2 -sSf -o "$script" https://sh.rustup.rs || { say "no Rust: please install cargo $RUST or later"; exit 1; }
            sh "$script" -y -q --no-modify-path --profile minimal -c clippy -c rustfmt
            rm "$script"
        fi
    fi
    if ! new_enough; then
        say "installing Rust's stable toolchain"
        rustup toolchain install stable --profile minimal -c clippy -c rustfmt
        rustup default stable
    fi
    new_enough || { say "cargo $RUST or later is needed"; exit 1; }
fi

# New enough, and with the race detector, which some distributions leave out.
good_go() { has go && at_least "$GO" "$(go env GOVERSION | sed 's/^go//')" && [ -n "$(find "$(go env GOROOT)/src/runtime/race/" -name '*.syso' 2>/dev/null)" ]; }
if [ "$what" = test ] && ! good_go; then
    has go || apt golang-go
    if ! good_go; then
        # Go's toolchains are modules, which any Go can fetch; it cannot run them by itself before 1.21.
        toolchain=golang.org/toolchain@v0.0.1-go1.24.0.linux-$(go env GOARCH)
        say "installing $toolchain into .go"
        rm -rf .go
        cp -r "$(cd / && go mod download -json "$toolchain" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')" .go
        chmod -R u+w .go
        chmod +x .go/bin/* .go/pkg/tool/*/*
        hash -r
    fi
    good_go || { say "Go $GO or later, with its race detector, is needed"; exit 1; }
fi

numpy() {
    for python in .venv/bin/python3 python3 /usr/bin/python3; do
        "$python" -c 'import numpy' 2>/dev/null && return
    done
    return 1
}
if [ "$what" = test ] && ! numpy; then
    say "installing numpy into .venv"
    if ! { python3 -m venv .venv && .venv/bin/python3 -m pip install -q numpy; } 2>/dev/null; then
        rm -rf .venv
        apt python3-numpy
    fi
    numpy || { say "numpy is needed"; exit 1; }
fi
