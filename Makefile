# The README's two commands are `make demo` and `make test`; each sets up everything on a fresh machine.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The first of these that is 3.11 or later and, on a Mac, not an Intel build: MLX has wheels for no other. macOS itself
# has 3.9. `make test PYTHON=...` takes another.
PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
  $$p -c 'import platform as p, sys; sys.exit(sys.version_info < (3, 11) or (p.system(), p.machine()) == ("Darwin", "x86_64"))' \
  >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: demo test check bench slow oracle clean

demo: $(STAMP)
	$(PY) scripts/demo.py

test: $(STAMP)
	$(PY) -m pytest -q -m "not slow and not oracle"

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

bench: $(STAMP)
	$(PY) benchmarks/startup.py
	$(PY) benchmarks/codecs.py
	$(PY) benchmarks/convert.py
	$(PY) benchmarks/generate.py
	$(PY) benchmarks/sizes.py
	$(PY) benchmarks/peaks.py
	$(PY) benchmarks/fit_speed.py --report

slow: $(STAMP)
	$(PY) -m pytest -q -m slow

# Against llama.cpp's own tools, built from source in .oracle/ the first time.
oracle: $(STAMP)
	$(PY) scripts/oracle.py

# uv where it is installed (seconds), else venv + pip (a minute).
$(STAMP): pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  echo "Setting up $(VENV) with uv"; \
	  uv venv -q --allow-existing --python 3.11 $(VENV) 2>/dev/null || uv venv -q --allow-existing $(VENV); \
	  uv pip install -q --python $(PY) -e '.[dev]' pip; \
	else \
	  test -n "$(PYTHON)" || { \
	    echo "Python 3.11 or later is needed (on a Mac: for Apple silicon), and none is on the PATH."; \
	    echo "  Next: install it from python.org or with brew, or install uv, which brings its own."; exit 1; }; \
	  echo "Setting up $(VENV) with $(PYTHON), venv and pip (about a minute)"; \
	  $(PYTHON) -m venv $(VENV) && $(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-out
