# Two commands matter: `make demo` and `make test`. Each does all set-up on a machine that has git, make and Python >= 3.10.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= mmsn-demo

# Two cores, two processes: one thread each. Two threads on shared cores were three times slower.
# Lessons on open data run where MMSN_DATA names the folder that holds them, and are skipped elsewhere.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help demo test notebooks unit readme site pages clean lab

help:
	@echo 'make demo    synthetic patients -> pre-training -> evaluation -> report, in $(OUT)/'
	@echo 'make test    every notebook and every test'
	@echo 'make lab     JupyterLab on the notebooks'
	@echo 'make readme  README.md from nbs/index.ipynb'
	@echo 'make pages   the pages in _pages, nearly as the site has them, without quarto'
	@echo 'make site    the pages in _docs (needs quarto; GALLERY=FOLDER adds the reports that benchmarks/gallery.py made there)'

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
	$(TEST_ENV) $(BIN)/python tests/run_notebooks.py -n 2

unit: $(STAMP)
	@echo '== tests'
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 8

# Without quarto: nbconvert makes it, and a test holds the two equal.
readme: $(STAMP)
	$(BIN)/python tests/readme.py

# The gallery's reports are made by a script, not kept in the repository: with GALLERY the site gets them.
site: $(STAMP)
	test -z '$(GALLERY)' || $(BIN)/python benchmarks/gallery.py '$(GALLERY)' $(if $(OPEN),--open '$(OPEN)')
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/nbdev-docs

# Without quarto: the same links, pictures and texts by pandoc, for a look and for the tests.
pages: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/nbdev-proc-nbs
	$(BIN)/python tests/site_pages.py _pages

lab: $(STAMP)
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build dist _docs _proc _pages *.egg-info
