# make demo   from nothing to feature maps: installs, builds a trained network in int8, runs it, shows what it sees
# make check  the lints and the unit tests: what to run before a commit, in less than four minutes on two cores
# make test   installs and runs every test but test-consumers, those of transformers twice (newest, 4.44); no GPU, no model hub
# make test-consumers  what uses a bundle beside Python: C++, ROS 2, Triton, GStreamer, in environments of their own
# make test-cpp  of these the C++ library alone, with every back end that can be compiled here, libtorch too
# make lint   formatting, lint, types, direction of imports, Dockerfile.jetson
# make docs   builds the documentation from docs/ and the code into site/, and checks its links; open site/index.html
# make coverage  builds one of every kind of backbone (hours); writes benchmarks/results/coverage.json and its page
# make gpu    tests and figures of this machine's NVIDIA GPU in at most 15 minutes; again: what was left. Installs nothing,
#             needs numpy and msgspec; writes benchmarks/results/<device>.json. GPU="--only memory engines": these parts.
# make bench  the figures of the README, side by side with their peers, in half an hour; writes benchmarks/results.
#             BENCH=--quick: five minutes, stores nothing. BENCH="--only resnet50 growth": these, the others stay.
# make fuzz   random damage to every kind of file that a stranger may hand over, in some minutes; prints what it found.
#             FUZZ="--share 0.01": a minute. FUZZ="--only manifests golden": these kinds.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OLD_TRANSFORMERS = $(VENV)/transformers-4.44
# A process for every core; more than four would need more memory than a laptop has. Each computes with one thread: several
# wait for each other on cores that they share.
# Files go to the processes in the order of tests/conftest.py, the longest first.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Of C++, make test compiles one program: tests/install/test_verify_in_cpp.py.
BESIDE_PYTHON = tests/cpp tests/conformance tests/consumers

.DELETE_ON_ERROR:
.PHONY: demo check test test-consumers test-cpp lint docs bench fuzz gpu coverage schema networks clean

demo: $(VENV)/.demo
	$(BIN)/python -m build_scripts.demo

check: lint
	$(PYTEST) tests/unit

# The unit tests run apart from the rest, so that they prove that they do without torch.
test: $(VENV)/.dev $(OLD_TRANSFORMERS)/.installed
	$(BIN)/python -m build_scripts.fetch_bindings
	$(BIN)/python -m build_scripts.fetch_cuda
	$(BIN)/python -m build_scripts.fetch_chromium
	$(BIN)/python -m build_scripts.fetch_systemd
	$(PYTEST) tests/unit
	$(PYTEST) --ignore tests/unit $(BESIDE_PYTHON:%=--ignore %)
	@if [ -d $(OLD_TRANSFORMERS)/transformers ]; then \
	  set -x; PYTHONPATH=$(OLD_TRANSFORMERS) $(PYTEST) tests/transformers; \
	else echo "transformers 4.44 has no wheels for this Python (3.10 to 3.12 have): its tests were left out"; fi

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile.jetson

test-consumers: $(VENV)/.dev $(VENV)/ros2/.installed $(VENV)/triton/.installed $(VENV)/gstreamer/.installed
	$(PYTEST) $(BESIDE_PYTHON)

test-cpp: $(VENV)/.dev
	$(PYTEST) tests/cpp tests/conformance tests/consumers/libtorch

# Not --quiet, which would hide warnings from --strict.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.dev $(VENV)/nncf/.installed
	$(BIN)/python -m benchmarks.run --nncf $(VENV)/nncf/bin/python $(BENCH)

fuzz: $(VENV)/.dev
	$(BIN)/python -m build_scripts.fuzz $(FUZZ)

gpu:
	$(PYTHON) -m benchmarks.gpu_suite $(GPU)

coverage: $(VENV)/.dev
	$(BIN)/python -m build_scripts.sweep

schema: $(VENV)/.dev
	$(BIN)/python -m build_scripts.write_schema

networks: $(VENV)/.dev
	$(BIN)/python -m build_scripts.write_networks

# Beside the venv's own release: the oldest one that is supported, in a folder that goes first on the path.
$(OLD_TRANSFORMERS)/.installed: $(VENV)/.dev
	rm -rf $(OLD_TRANSFORMERS) && mkdir $(OLD_TRANSFORMERS)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
	  $(BIN)/python -m pip install --quiet --no-deps --target $(OLD_TRANSFORMERS) transformers==4.44.2 \
	    tokenizers==0.19.1 huggingface-hub==0.24.7 requests urllib3 charset-normalizer certifi idna; fi
	touch $@

# In an environment of its own: it asks for other releases of what torch and transformers ask for.
$(VENV)/nncf/.installed: $(VENV)/.dev
	rm -rf $(VENV)/nncf && $(PYTHON) -m venv $(VENV)/nncf
	$(VENV)/nncf/bin/python -m pip install --quiet nncf "openvino==$$($(BIN)/python -c \
	  'import importlib.metadata as m; print(m.version("openvino"))')"
	touch $@

# In an environment of its own: a real tritonserver with the Python backend alone, whose process is built for numpy 1, and what
# EdgeBackbone needs there, in the releases that built the bundles.
$(VENV)/triton/.installed: $(VENV)/.dev
	rm -rf $(VENV)/triton && $(PYTHON) -m venv $(VENV)/triton
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
	  $(VENV)/triton/bin/python -m pip install --quiet nvidia-pytriton==0.7.0 'tritonclient[http,grpc]' 'numpy<2' msgspec \
	    Pillow "openvino==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("openvino"))')"; \
	else echo "numpy 1 has no wheels for this Python (3.10 to 3.12 have): the tests with a Triton server are left out"; fi
	touch $@

# Of the system's Python, which the distribution's bindings of GStreamer belong to.
$(VENV)/gstreamer/.installed: $(VENV)/.dev
	$(BIN)/python -m build_scripts.fetch_gstreamer
	rm -rf $(VENV)/gstreamer && /usr/bin/python3 -m venv --system-site-packages $(VENV)/gstreamer
	$(VENV)/gstreamer/bin/python -m pip install --quiet numpy msgspec Pillow matplotlib \
	  "openvino==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("openvino"))')"
	touch $@

# ROS 2 as wheels. Importing them starts Python again, with another library path, at every start of this environment's.
$(VENV)/ros2/.installed: $(VENV)/.dev
	rm -rf $(VENV)/ros2 && $(PYTHON) -m venv $(VENV)/ros2
	$(VENV)/ros2/bin/python -m pip install --quiet ros-rclpy ros-sensor-msgs ros-std-msgs ros-std-srvs ros-diagnostic-msgs \
	  ros-lifecycle-msgs ros-rmw-fastrtps-cpp ros-rmw-implementation msgspec Pillow matplotlib psutil \
	  $$($(BIN)/python -c 'import importlib.metadata as m; print(*(f"{n}=={m.version(n)}" for n in ("numpy", "openvino")))')
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edge_backbones needs Python 3.10 or newer; say which: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Compiling every module of every library would take half of pip's time; Python compiles those that are imported.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo_output samples site .cache
