"The contract of a notebook, and the agreement of what is generated with what it is generated from."
import json, re, subprocess, sys
from pathlib import Path

import pytest

from readme import ROOT, readme

BOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def cells(path): return [(c['cell_type'], ''.join(c['source']), c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]


def module(path): return next((m[1] for t, s, _ in cells(path) if t == 'code' and (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)


MODULES = {p: m for p in BOOKS if (m := module(p))}
EXPORT = re.compile(r'^#\|\s*exports?\b', re.M)
PROOF = re.compile(r'\bassert\b|\btest_\w+\(|expect_fail|raises\(')


def of(book): return book.relative_to(ROOT/'nbs').as_posix()


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_has_title_and_purpose(book):
    "Title, one line of what it is, a paragraph of what it is for."
    kind, first, _ = cells(book)[0]
    assert kind == 'markdown' and re.match(r'# \S', first), 'the first cell should be Markdown with a title'
    assert re.search(r'^> \S', first, re.M), 'the first cell should say in one quoted line what the notebook is'
    assert len(first.split()) >= 25, 'the first cell should say what the notebook is for'


@pytest.mark.parametrize('book', MODULES, ids=of)
def test_contract(book):
    "Small export cells, each near its proof and its prose; committed outputs; the last cell exports."
    all_cells = cells(book)
    code = [(s, c) for t, s, c in all_cells if t == 'code']
    exports = [s for s, _ in code if EXPORT.search(s)]
    longest = max(len(s.splitlines()) for s in exports)
    lines = sum(len(s.splitlines()) for s in exports)
    words = sum(len(s.split()) for t, s, _ in all_cells if t == 'markdown')
    proofs = sum(bool(PROOF.search(s)) for s, _ in code if not EXPORT.search(s))
    assert len(all_cells) <= 120, f'{len(all_cells)} cells'
    assert longest <= 40, f'an export cell of {longest} lines'
    assert proofs >= max(1, len(exports)//3), f'{len(exports)} export cells, {proofs} that assert'
    assert words >= lines/2, f'{words} words of prose for {lines} exported lines'
    assert any(c.get('outputs') for _, c in code), 'no committed output'
    assert 'nbdev_export()' in code[-1][0], 'the last cell should export'
    assert not any(o.get('output_type') == 'error' for _, c in code for o in c.get('outputs', [])), 'a committed traceback'


@pytest.mark.parametrize('book', MODULES, ids=of)
def test_imports_point_backwards(book):
    "A notebook imports only from notebooks of lower number."
    rank = {m: of(p) for p, m in MODULES.items()}
    for t, s, _ in cells(book):
        if t == 'code' and EXPORT.search(s):
            for used in re.findall(r'^\s*from (mmsn[\w.]*) import', s, re.M):
                later = rank.get(used.removeprefix('mmsn.'), '')
                assert later <= of(book), f'{of(book)} imports {used} of {later}'


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_outputs_show_no_machine(book):
    "No path of anybody's machine in what is committed."
    text = book.read_text(encoding='utf-8')
    assert not re.search(r'/(work|home|root|Users)/\w', text), 'an absolute path of a machine'


def test_readme_equals_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(), 'run `make readme`'


def test_readme_names_every_module():
    "The map in the README is true: every exported module is in it, and nothing else."
    named = set(re.findall(r'`mmsn\.([\w.]+)`', readme().split('## The map')[1].split('\n## ')[0]))
    assert named == set(MODULES.values()) - {m for m in MODULES.values() if m.endswith('__init__')}


def test_version():
    import mmsn
    assert f'version = {mmsn.__version__}\n' in (ROOT/'settings.ini').read_text(encoding='utf-8')


def test_dynamic_fields_are_those_that_setup_sets():
    tomllib = pytest.importorskip('tomllib')   # Python 3.11
    dynamic = set(tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']['dynamic'])
    setup = (ROOT/'setup.py').read_text(encoding='utf-8')
    field = dict(version='version', description='description', author='authors', keywords='keywords', install_requires='dependencies',
                 extras_require='optional-dependencies', entry_points='entry-points')
    assert dynamic == {field[k] for k in re.findall(r'^    (\w+)=', setup, re.M) if k in field} | {'scripts'}


@pytest.mark.parametrize('name', ['prepare', 'train', 'evaluate', 'demo'])
def test_help(name):
    "Every command explains itself."
    out = subprocess.run([sys.executable, '-m', f'mmsn.{name}', '--help'], capture_output=True, text=True)
    assert out.returncode == 0 and 'usage' in out.stdout.lower()
