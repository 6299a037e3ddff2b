# `make demo` runs the main job, `make test` everything that CI does; each sets itself up.
# Needs: a Rust toolchain, Python 3.10 or later, crates.io and PyPI.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := target/bench/venv
export CARGO_TERM_COLOR ?= never

.PHONY: demo test lint rust-test ptx ptx-check wheel bench bench-wheel bench-paging accuracy \
	training gpu-check clean

demo: wheel
	$(BIN)/python examples/demo.py

test: lint ptx-check rust-test wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest qadam._core --ignore-disjoint-bases
	$(BIN)/pytest
	cargo build --package softgpu --locked --quiet
	QADAM_SOFTGPU=$(CURDIR)/target/debug/libsoftgpu.so $(BIN)/pytest -m "not cpu_only"

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

rust-test:
	cargo test --workspace --locked --quiet

# The kernels as shipped: compiled, and compared with what is committed (Linux on x86-64).
ptx: $(VENV)/.installed
	$(BIN)/python crates/qadam-core/kernels/build.py

ptx-check: $(VENV)/.installed
	$(BIN)/python crates/qadam-core/kernels/build.py --check

# The package as users get it: built as a wheel, installed into the virtual environment.
wheel: $(VENV)/.installed
	rm -f target/wheels/qadam-*.whl
	$(BIN)/maturin build --release --locked --quiet --out target/wheels
	$(BIN)/pip install --quiet --force-reinstall --no-deps target/wheels/qadam-*.whl

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "maturin>=1.9,<2" "torch>=2.10" --group test --group demo
	touch $@

# Step times on the CPU beside torch, DeepSpeed, bitsandbytes and torchao, which get a virtual
# environment of their own (6 GB; rm -rf target/bench/venv to install them anew): an hour, 15 GB of
# memory. `make bench QUICK=1`: torch alone, two cases, three minutes. More options: BENCH="--cases b".
ifeq ($(QUICK),1)
bench: wheel
	$(BIN)/python benches/cpu.py --quick $(BENCH)
else
bench: bench-wheel
	$(BENCH_VENV)/bin/python benches/cpu.py $(BENCH)
endif

bench-wheel: wheel $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/pip install --quiet --force-reinstall --no-deps target/wheels/qadam-*.whl

# A peer that will not install is reported as absent: see target/bench/peers.json.
$(BENCH_VENV)/.installed: benches/install_peers.py
	$(PYTHON) -m venv --clear $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --upgrade pip
	$(BENCH_VENV)/bin/pip install --quiet "torch>=2.10" "matplotlib>=3.8" "numpy>=1.26" setuptools wheel
	$(BENCH_VENV)/bin/python benches/install_peers.py
	touch $@

# How far 8-bit state leads Adam astray, beside Adam in float64, for qadam's codes and the peers in
# `make bench`'s environment: ten minutes. `make accuracy QUICK=1`: fewer steps and seeds, and the peers
# that .venv has, one minute. More options: ACCURACY="--rows Zipf --seeds 0".
ifeq ($(QUICK),1)
accuracy: wheel
	$(BIN)/python benches/accuracy.py --quick $(ACCURACY)
else
accuracy: bench-wheel
	$(BENCH_VENV)/bin/python benches/accuracy.py $(ACCURACY)
endif

# What those errors come to: two models trained with 32-bit and 8-bit state, 3 seeds each: a
# quarter of an hour on 2 cores (TRAINING="--quick" for less, "--models words" for one).
training: wheel
	$(BIN)/python benches/training.py $(TRAINING)

# Paged steps beside unpaged ones, and beside the disk, under a limit of memory; minutes, 10 GB of
# memory and 16 GB of disk (BENCH_PAGING="--quick" for less of everything). Best as root.
bench-paging: wheel
	$(BIN)/python benches/paging.py $(BENCH_PAGING)

# For a machine with a GPU, torch and no network: WHEEL=path [PYTHON=python3] [GPU_CHECK="--only peers"]
gpu-check: PYTHON = python3
gpu-check:
	@test -n "$(WHEEL)" || { echo 'usage: make gpu-check WHEEL=path [PYTHON=python3]'; exit 2; }
	$(PYTHON) benches/gpu_check.py --wheel "$(WHEEL)" $(GPU_CHECK)

clean:
	rm -rf $(VENV) target
