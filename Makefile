# The README's two commands are `make demo` and `make test`; each sets up everything on a fresh machine.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test check bench slow clean

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

slow: $(STAMP)
	$(PY) -m pytest -q -m "slow or oracle"

# uv where it is installed (seconds), else venv + pip (a minute).
$(STAMP): pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  echo "Setting up $(VENV) with uv"; \
	  uv venv -q --allow-existing --python 3.11 $(VENV) 2>/dev/null || uv venv -q --allow-existing $(VENV); \
	  uv pip install -q --python $(PY) -e '.[dev]' pip; \
	else \
	  echo "Setting up $(VENV) with venv and pip (about a minute)"; \
	  python3 -m venv $(VENV) && $(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-out
