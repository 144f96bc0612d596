# Builds, tests and installs libalignedkv. `make help` lists the targets.

PREFIX  ?= /usr/local
LIBDIR  ?= $(PREFIX)/lib
DESTDIR ?=
BUILD   ?= build

export PATH := $(CURDIR)/.go/bin:$(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/local/go/bin
CARGO_TARGET_DIR ?= target
RELEASE := $(CARGO_TARGET_DIR)/release
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
MAJOR   := $(firstword $(subst ., ,$(VERSION)))
PYTHON   = $(shell for p in .venv/bin/python3 python3 /usr/bin/python3; do $$p -c 'import numpy' 2>/dev/null && echo $$p && break; done)
CFLAGS  ?= -O3 -Wall -Wextra
RESULTS ?= $(BUILD)
BENCH   ?=
DEMO    ?=

.PHONY: all demo test test-rust test-c test-sanitize test-kernels test-cuda check-kernels kernels gpu-bundle test-oracle test-mpi test-tensorrt test-transfer test-bindings test-coreclr test-reliability test-race fuzz soak test-llamacpp bench bench-full bench-pieces bench-llamacpp bench-bindings install abi csharp header results readme lint clean help setup setup-test

all: setup ## build the shared and the static library
	cargo build --release --lib

demo: all ## build the library and the demonstration, run it, write its table to benches/results
	@mkdir -p $(BUILD) benches/results
	$(CC) -std=c11 $(CFLAGS) -Iinclude examples/tinylm*.c -o $(BUILD)/tinylm $(RELEASE)/libalignedkv.a -lpthread -ldl -lm
	$(BUILD)/tinylm --json benches/results/tinylm.json $(DEMO)

test: setup-test test-rust test-kernels check-kernels test-cuda test-c test-sanitize test-oracle test-mpi test-tensorrt test-transfer test-bindings test-reliability test-race ## run every test
	@echo "all tests passed"

test-rust: ## unit and property tests
	cargo test

test-c: | setup-test ## C and C++ programs against the built library, some under valgrind
	cargo build --release --lib
	cmake -S ctests -B $(BUILD)/ctests -G Ninja -DCMAKE_BUILD_TYPE=Release -DALIGNEDKV_RELEASE=$(abspath $(RELEASE)) >/dev/null
	cmake --build $(BUILD)/ctests
	ctest --test-dir $(BUILD)/ctests --output-on-failure

test-sanitize: | setup-test ## the C tests again under AddressSanitizer and UndefinedBehaviorSanitizer
	cargo build --release --lib
	cmake -S ctests -B $(BUILD)/sanitize -G Ninja -DSANITIZE=ON -DALIGNEDKV_RELEASE=$(abspath $(RELEASE)) >/dev/null
	cmake --build $(BUILD)/sanitize
	ctest --test-dir $(BUILD)/sanitize --output-on-failure

KERNELS_HOST = $(CXX) -std=c++17 -fPIC -shared -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Werror kernels/host/runner.cpp -x c++ kernels/alignedkv.cu kernels/host/planted.cu
TEST_KERNELS = cargo test --release --features kernels-host --test kernels

test-kernels: | setup-test ## the CUDA kernels, run on the CPU against the CPU backend, twice: the second time under sanitizers
	mkdir -p $(BUILD)
	$(KERNELS_HOST) -O2 -o $(BUILD)/libakv_kernels.so
	AKV_KERNELS_HOST=$(abspath $(BUILD)/libakv_kernels.so) $(TEST_KERNELS)
	$(KERNELS_HOST) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -o $(BUILD)/libakv_kernels_sanitized.so
	AKV_KERNELS_HOST=$(abspath $(BUILD)/libakv_kernels_sanitized.so) ASAN_OPTIONS=detect_leaks=0 $(TEST_KERNELS) \
		--config 'target."cfg(all())".runner=["env", "LD_PRELOAD=$(shell $(CXX) -print-file-name=libasan.so)"]'

STANDIN = $(BUILD)/standin

test-cuda: | setup-test ## the CUDA backend without a GPU: C programs under a stand-in for the driver, which runs the kernels on the CPU
	cargo build --release --lib
	mkdir -p $(STANDIN)
	$(CXX) -std=c++17 -O2 -fPIC -shared -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Werror -Wl,-soname,libcuda.so.1 \
		-o $(STANDIN)/libcuda.so.1 kernels/host/runner.cpp kernels/host/libcuda.cpp -x c++ kernels/alignedkv.cu
	ln -sf libcuda.so.1 $(STANDIN)/libcuda.so
	cmake -S ctests -B $(BUILD)/ctests -G Ninja -DCMAKE_BUILD_TYPE=Release -DALIGNEDKV_RELEASE=$(abspath $(RELEASE)) >/dev/null
	cmake --build $(BUILD)/ctests
	mkdir -p $(STANDIN)/old
	echo 'int cuInit(unsigned flags) { return (int)flags; }' | $(CC) -shared -fPIC -x c - -o $(STANDIN)/old/libcuda.so
	ldconfig -p | grep -q libcuda.so || $(BUILD)/ctests/no_cuda 'no libcuda'
	LD_LIBRARY_PATH=$(STANDIN)/old $(BUILD)/ctests/no_cuda 'too old: it has no cu'
	AKV_STANDIN_INIT=100 LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/no_cuda 'cuInit failed: error 100'
	AKV_STANDIN_INIT=4242 LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/no_cuda 'error 4242 (unknown to the driver)'
	AKV_BACKEND=cuda LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/attention
	AKV_BACKEND=cuda AKV_TEST_SMALL=1 LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/attention_managed
	AKV_BACKEND=cuda AKV_TEST_SMALL=1 LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/slots_managed
	AKV_BACKEND=cuda AKV_TEST_SMALL=1 LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/snapshot_managed
	LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/cuda
	AKV_STANDIN=lazy LD_LIBRARY_PATH=$(STANDIN) $(BUILD)/ctests/cuda
	LD_LIBRARY_PATH=$(STANDIN) $(PYTHON) benches/gpu/decode.py --library $(RELEASE)/libalignedkv.so --check

BUNDLE = $(BUILD)/gpu-bundle

gpu-bundle: | setup-test ## a folder for a machine with a GPU and a driver: run-tests, and run-bench (with PyTorch)
	cargo build --release --lib
	cmake -S ctests -B $(BUILD)/ctests -G Ninja -DCMAKE_BUILD_TYPE=Release -DALIGNEDKV_RELEASE=$(abspath $(RELEASE)) >/dev/null
	cmake --build $(BUILD)/ctests
	rm -rf $(BUNDLE)
	mkdir -p $(BUNDLE)/benches/gpu $(BUNDLE)/benches/peers $(BUNDLE)/tests/oracle $(BUNDLE)/examples/data
	cp $(RELEASE)/libalignedkv.so $(BUNDLE)/libalignedkv.so.0
	cp $(BUILD)/ctests/cuda $(BUILD)/ctests/attention_managed $(BUILD)/ctests/slots_managed benches/gpu/run-tests benches/gpu/run-bench $(BUNDLE)
	cp benches/gpu/decode.py $(BUNDLE)/benches/gpu
	cp benches/peers/inputs.py $(BUNDLE)/benches/peers
	cp tests/oracle/abi.py $(BUNDLE)/tests/oracle
	cp examples/data/tinylm.json examples/data/tinylm.safetensors examples/data/eval.txt $(BUNDLE)/examples/data
	@du -sh $(BUNDLE)

kernels: ## compile the CUDA kernels for every architecture, and write what they need to benches/results
	python3 kernels/build.py --tools $(CARGO_TARGET_DIR)/cuda

check-kernels: ## compile them, and compare with benches/results
	python3 kernels/build.py --tools $(CARGO_TARGET_DIR)/cuda --check

RELIABILITY = $(BUILD)/reliability
TARGET  := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
SOAK_SECONDS ?= 1200
FUZZ_SECONDS ?= 3600

test-reliability: | setup-test ## random traffic, allocations that fail, fuzzed input, in short; and that faults which are planted are found
	cargo build --release -p alignedkv-reliability
	cargo test --release -p alignedkv-reliability
	$(RELEASE)/soak --seconds 8 >/dev/null
	$(RELEASE)/faults >/dev/null
	$(RELEASE)/fuzz --seconds 6 >/dev/null

# The standard library is not instrumented: all locks that the library and the traffic use are compiled here.
RACE = RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0 RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" \
	cargo build --release -p alignedkv-reliability --bin soak --target $(TARGET) --target-dir $(CARGO_TARGET_DIR)/race
RACE_SOAK = $(CARGO_TARGET_DIR)/race/$(TARGET)/release/soak

test-race: | setup-test ## the traffic of eight threads under ThreadSanitizer, which finds a race that is planted
	$(RACE)
	$(RACE_SOAK) --seconds 10 --sequences 60 >/dev/null
	! $(RACE_SOAK) --seconds 3 --sequences 60 --plant race >/dev/null 2>&1

# Coverage by LLVM's own pass, and AddressSanitizer; libFuzzer itself comes with the crate.
FUZZ = RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0 RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer" \
	cargo build --release -p alignedkv-reliability --bin fuzz --features libfuzzer --target $(TARGET) --target-dir $(CARGO_TARGET_DIR)/fuzz

fuzz: | setup-test ## fuzz with coverage, under AddressSanitizer, for FUZZ_SECONDS (an hour)
	$(FUZZ)
	cargo build --release -p alignedkv-reliability
	mkdir -p $(RELIABILITY)
	$(RELEASE)/fuzz --seconds $(FUZZ_SECONDS) --guided $(CARGO_TARGET_DIR)/fuzz/$(TARGET)/release/fuzz \
		--corpus $(RELIABILITY)/corpus --json $(RELIABILITY)/fuzz.json

soak: fuzz ## the record run (SOAK_SECONDS, twenty minutes, after the fuzzing), written to benches/results
	$(RELEASE)/fuzz --seconds 300 --json $(RELIABILITY)/fuzz-random.json
	$(RELEASE)/faults --json $(RELIABILITY)/faults.json
	$(RACE)
	$(RACE_SOAK) --seconds 120 --sequences 200 --json $(RELIABILITY)/race.json
	$(RELEASE)/soak --seconds $(SOAK_SECONDS) --json $(RELIABILITY)/soak.json
	$(RELEASE)/report $(RELIABILITY) benches/results/reliability

test-oracle: | setup-test ## the library against its definition in NumPy
	cargo build --release --lib
	$(PYTHON) tests/oracle/test_oracle.py $(RELEASE)/libalignedkv.so

STAGE = $(abspath $(BUILD)/bindings)

test-bindings: | setup-test ## Go and C# against an installed library, the same bits in every language, the programs of docs
	rm -rf $(STAGE)
	$(MAKE) --no-print-directory -s install DESTDIR=$(STAGE) PREFIX=/usr
	bindings/test.sh $(CURDIR) $(STAGE)

test-coreclr: | setup-test ## the C# tests under CoreCLR too, from the Python package that carries it (30 MB)
	cargo build --release --lib
	bindings/csharp/coreclr.sh $(abspath $(RELEASE)) $(CARGO_TARGET_DIR)/coreclr

bench-bindings: | setup-test ## what a call costs from C, Go and C#, written to benches/results
	rm -rf $(STAGE)
	$(MAKE) --no-print-directory -s install DESTDIR=$(STAGE) PREFIX=/usr
	python3 bindings/bench/report.py $(STAGE)

# As root, on fewer cores than ranks, and over TCP, whose bytes are counted.
MPIRUN = mpirun $(if $(filter 0,$(shell id -u)),--allow-run-as-root) --oversubscribe --mca mpi_yield_when_idle 1 \
	--mca btl self,tcp --mca btl_tcp_if_include lo

test-mpi: | setup-test ## context parallelism: one sequence over 2 and 4 MPI ranks against one process and float64 (tables: RESULTS=FOLDER)
	cargo build --release --lib
	mkdir -p $(BUILD)
	mpicc -std=c11 $(CFLAGS) -Iinclude examples/context_parallel.c examples/tinylm_model.c -o $(BUILD)/context_parallel $(RELEASE)/libalignedkv.a -lpthread -ldl -lm
	$(MPIRUN) -n 2 $(BUILD)/context_parallel
	$(MPIRUN) -n 4 $(BUILD)/context_parallel --results $(RESULTS)/context_parallel

TENSORRT = $(BUILD)/tensorrt

test-tensorrt: | setup-test ## the TensorRT plugin: an interface check without a TensorRT runtime, kernels on the CPU
	cargo build --release --lib
	mkdir -p $(TENSORRT)
	$(CXX) -std=c++17 -O2 -fPIC -shared -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Werror -Wl,-soname,libcuda.so.1 -Ikernels/host \
		-o $(TENSORRT)/libcuda.so.1 kernels/host/runner.cpp bindings/tensorrt/test/libcuda.cpp -x c++ kernels/alignedkv.cu
	ln -sf $(abspath $(RELEASE))/libalignedkv.so $(TENSORRT)/libalignedkv.so.0
	set -e; headers=$$(bindings/tensorrt/headers.sh $(CARGO_TARGET_DIR)/tensorrt); \
	for build in plain sanitized; do \
		flags="-std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-deprecated-declarations -Iinclude -isystem $$headers -isystem $$headers/.."; \
		[ $$build = plain ] || flags="$$flags -fsanitize=address,undefined -fno-sanitize-recover=undefined"; \
		mkdir -p $(TENSORRT)/$$build; \
		$(CXX) $$flags -fPIC -fvisibility=hidden -shared -Wl,--version-script=bindings/tensorrt/exports.map \
			-o $(TENSORRT)/$$build/libalignedkv_tensorrt.so bindings/tensorrt/plugin.cpp $(TENSORRT)/libalignedkv.so.0; \
		$(CXX) $$flags -rdynamic -o $(TENSORRT)/$$build/host bindings/tensorrt/test/host.cpp $(TENSORRT)/libalignedkv.so.0 \
			$(TENSORRT)/libcuda.so.1 -ldl -lpthread; \
	done
	test "$$(nm -D --defined-only $(TENSORRT)/plain/libalignedkv_tensorrt.so | cut -d' ' -f3 | sort | xargs)" = "getCreators setLoggerFinder"
	LD_LIBRARY_PATH=$(TENSORRT) $(TENSORRT)/plain/host $(TENSORRT)/plain/libalignedkv_tensorrt.so
	AKV_STANDIN=lazy LD_LIBRARY_PATH=$(TENSORRT) $(TENSORRT)/sanitized/host $(TENSORRT)/sanitized/libalignedkv_tensorrt.so

test-transfer: | setup-test ## prefill in one process, decoding in another, over a socket (tables: RESULTS=FOLDER)
	cargo build --release --lib
	mkdir -p $(BUILD)
	$(CC) -std=c11 $(CFLAGS) -Iinclude examples/kv_transfer.c examples/tinylm_model.c -o $(BUILD)/kv_transfer $(RELEASE)/libalignedkv.a -lpthread -ldl -lm
	$(BUILD)/kv_transfer --results $(RESULTS)/kv_transfer

test-llamacpp: | setup-test ## a pinned llama.cpp, built here, with its KV cache in this library (minutes the first time)
	bindings/llamacpp/ci.sh test

bench-llamacpp: | setup-test ## quality and speed inside llama.cpp, written to benches/results
	bindings/llamacpp/ci.sh bench

bench: all setup-test ## decode side by side with ggml (a quarter of an hour; BENCH="--only words" picks cases), written to benches/results
	$(PYTHON) benches/peers/cpu_decode.py run --build $(CARGO_TARGET_DIR)/peers $(BENCH)

bench-full: all setup-test ## the same for every shape, length, data and peer (hours)
	$(PYTHON) benches/peers/cpu_decode.py run --full --build $(CARGO_TARGET_DIR)/peers $(BENCH)

bench-pieces: all ## criterion benchmarks of the pieces: scan, refine, encode, prefill, merge (BENCH=name picks some)
	cargo bench --bench attention -- $(BENCH)

install: ## install into DESTDIR, PREFIX (default /usr/local), LIBDIR
	cargo build --release --lib
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(LIBDIR)/cmake/alignedkv
	install -m 644 include/alignedkv.h include/alignedkv.hpp $(DESTDIR)$(PREFIX)/include
	install -m 755 $(RELEASE)/libalignedkv.so $(DESTDIR)$(LIBDIR)/libalignedkv.so.$(VERSION)
	ln -sf libalignedkv.so.$(VERSION) $(DESTDIR)$(LIBDIR)/libalignedkv.so.$(MAJOR)
	ln -sf libalignedkv.so.$(MAJOR) $(DESTDIR)$(LIBDIR)/libalignedkv.so
	bindings/abi/localise.sh $(RELEASE)/libalignedkv.a $(DESTDIR)$(LIBDIR)/libalignedkv.a
	sed 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@VERSION@|$(VERSION)|' bindings/pkgconfig/alignedkv.pc.in >$(DESTDIR)$(LIBDIR)/pkgconfig/alignedkv.pc
	for f in Config ConfigVersion; do \
		sed 's|@VERSION@|$(VERSION)|; s|@MAJOR@|$(MAJOR)|' bindings/cmake/alignedkv$$f.cmake.in >$(DESTDIR)$(LIBDIR)/cmake/alignedkv/alignedkv$$f.cmake || exit 1; \
	done

csharp: | setup-test ## the C# assembly with its documentation, and what a NuGet package holds, in build/csharp
	cargo build --release --lib
	mkdir -p $(BUILD)/csharp bindings/csharp/runtimes/linux-x64/native
	install -m 755 $(RELEASE)/libalignedkv.so bindings/csharp/runtimes/linux-x64/native
	mcs -unsafe -langversion:7.2 -warnaserror -target:library -doc:$(BUILD)/csharp/AlignedKV.xml -out:$(BUILD)/csharp/AlignedKV.dll bindings/csharp/src/*.cs
	cp -r bindings/csharp/runtimes $(BUILD)/csharp

header: ## regenerate include/alignedkv.h and the raw layers of the bindings from src/capi
	cargo run -q -p alignedkv-gen

abi: header | setup-test ## take the header as it is for the baseline that tests compare with
	python3 bindings/abi/check.py --accept

results: setup-test ## measure the figures that README.md quotes
	$(MAKE) demo
	$(PYTHON) tests/oracle/test_oracle.py $(RELEASE)/libalignedkv.so --json benches/results/traces.json
	$(MAKE) test-mpi test-transfer RESULTS=benches/results
	$(MAKE) readme

readme: ## refresh what README.md and docs quote: the quickstart program and measured figures
	python3 tools/readme.py
	python3 tools/choosing.py

lint: ## formatting, clippy, and drift of generated files
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	cargo run -q -p alignedkv-gen -- --check
	python3 tools/readme.py --check
	python3 tools/choosing.py --check

setup: # installs what is missing to build; nothing where all is present
	@tools/setup.sh build

setup-test:
	@tools/setup.sh test

clean: ## remove everything built
	cargo clean
	rm -rf $(BUILD)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1: /p' Makefile
