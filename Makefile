# make demo | test | fuzz | lint | docs | env | clean. Everything lives in .venv; a second run starts at once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Only where torch brings none of its own: its CUDA builds need exactly the triton they pin.
TRITON ?= triton==3.9.0
JOBS ?= 2
# A test is run once more, and said so, where a rank was lost to a segmentation fault or a corrupt heap: see
# tests/conftest.py.
PYTEST_FLAGS ?= -n $(JOBS) --dist worksteal --reruns 1 --only-rerun 'exit code -(11|6)'

PIP := .venv/bin/python -m pip --disable-pip-version-check install -q
KEY := $(shell printf '%s' '$(PYTHON) $(TORCH) $(TRITON)' | cksum | cut -d' ' -f1)
STAMP := .venv/installed-$(KEY)
BUILT := .venv/built-$(KEY)

.PHONY: demo test fuzz lint docs env clean

demo: env
	GOMP_SPINCOUNT=20000 .venv/bin/prfl demo

# Processes of the suite import the engine, and every worker the tests: Python compiles them once.
test: export PYTHONDONTWRITEBYTECODE :=
test: env
	.venv/bin/python -m pytest $(PYTEST_FLAGS)

# The operations on random inputs under AddressSanitizer and UndefinedBehaviorSanitizer, FUZZ_SECONDS in all. Its
# interceptor of exceptions wants libstdc++ to be loaded as early as itself; --capture=sys leaves it stderr.
FUZZ_SECONDS ?= 300
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1
fuzz: env
	PRFL_BUILD_CUDA=0 CXXFLAGS='$(SANITIZERS)' .venv/bin/python setup.py -q build \
		--build-lib build/sanitized --build-temp build/sanitized-temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized PRFL_FUZZ_SECONDS=$(FUZZ_SECONDS) \
		.venv/bin/python -m pytest -x --capture=sys tests/test_fuzz_operations.py

lint: env
	.venv/bin/ruff check .

# build/site: docs/ and a reference from docstrings; a warning is an error. The sources are read, not imported.
docs: .venv/docs
	mkdir -p build/docs
	ln -sfn ../../engine build/docs/prfl_engine
	ln -sfn ../../kernels build/docs/prfl_kernels
	ln -sfn ../../benchmarks build/docs/prfl_bench
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

.venv/docs: $(STAMP) requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	touch $@

env: $(BUILT)

# The stamp is the last thing written, and older ones go first: neither an interrupted install nor a
# change of TORCH and back leaves one that says more than is true.
$(STAMP): requirements.txt requirements-data.txt setup.py pyproject.toml
	rm -f .venv/installed-*
	$(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)'
	$(PIP) -r requirements.txt
	@if [ "$$(uname -s)" = Linux ] && ! .venv/bin/python -m pip show -q triton 2>/dev/null; \
		then echo "$(PIP) '$(TRITON)'"; $(PIP) '$(TRITON)'; fi
	$(PIP) --no-deps -r requirements-data.txt
	touch $@

# The package with its compiled kernels; objects that did not change are kept in build/.
$(BUILT): $(STAMP) $(shell find csrc -type f)
	rm -f .venv/built-*
	$(PIP) --no-deps --no-build-isolation -e .
	@.venv/bin/python -c 'from prfl_kernels import extension; [print(*row) for row in extension.report()]'
	touch $@

clean:
	rm -rf .venv build dist kernels/_C.*.so *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
