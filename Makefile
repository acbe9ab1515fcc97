# Two commands matter: `make demo` and `make test`. Each does all set-up on a machine that has git, make and Python >= 3.10.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= mmsn-demo

# Two cores, two processes: one thread each. Two threads on shared cores were three times slower.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help demo test notebooks unit readme clean lab

help:
	@echo 'make demo    synthetic patients -> pre-training -> evaluation -> report, in $(OUT)/'
	@echo 'make test    every notebook and every test'
	@echo 'make lab     JupyterLab on the notebooks'
	@echo 'make readme  README.md from nbs/index.ipynb'

$(STAMP): settings.ini setup.py pyproject.toml
	@echo '== installing mmsn into $(VENV) (the first time takes a few minutes)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mmsn-demo --out $(OUT)

test: $(STAMP) notebooks unit

notebooks: $(STAMP)
	@echo '== notebooks'
	$(TEST_ENV) $(BIN)/nbdev-test --n-workers 2 --timing --do-print

unit: $(STAMP)
	@echo '== tests'
	$(TEST_ENV) $(BIN)/python -m pytest -q --durations 8

# Without quarto: nbconvert makes it, and a test holds the two equal.
readme: $(STAMP)
	$(BIN)/python tests/readme.py

lab: $(STAMP)
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build dist _docs _proc *.egg-info
