"The contract of a notebook, and the agreement of what is generated with what it is generated from."
import ast, importlib, importlib.util, re, subprocess, sys

import pytest

from notebook_metrics import EXPORT, ROOT, books, cells, measure, module, only_imports, over, parsed, table
from readme import readme

BOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = {p: module(p) for p in books()}


def of(book): return book.relative_to(ROOT/'nbs').as_posix()


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_has_title_and_purpose(book):
    "The first cell is the title and one line of what it is, and nothing else: the site takes the whole cell away. The second says what it is for."
    (kind, title, _), (second_kind, purpose, _), *_ = cells(book)
    assert kind == second_kind == 'markdown', 'the first two cells should be Markdown'
    assert re.fullmatch(r'# \S[^\n]*\n+(> \S[^\n]*\n?)+', title), 'the first cell should hold a title and one quoted line, nothing else'
    assert len(purpose.split()) >= 25, 'the second cell should say what the notebook is for'


@pytest.mark.parametrize('book', MODULES, ids=of)
def test_contract(book):
    "What every notebook keeps by itself; the numbers over all of them are in test_the_table."
    code = [(s, c) for t, s, c in cells(book) if t == 'code']
    n = measure(book)
    assert n['cells'] <= 120, f'{n["cells"]} cells'
    assert n['longest'] <= 40, f'an export cell of {n["longest"]} lines'
    assert n['widest'] <= 140, f'an exported line of {n["widest"]} characters'
    assert n['lesson_lines'] <= 6*n['lessons'], 'lesson cells of more than six lines on average'
    assert n['asserting'] >= max(1, n['public']//2), f'{n["public"]} public symbols, {n["asserting"]} lesson cells that assert'
    assert n['asserting'] >= max(1, n['exports']//3), f'{n["exports"]} export cells, {n["asserting"]} that assert'
    assert n['words'] >= n['export_lines']/2, f'{n["words"]} words of prose for {n["export_lines"]} exported lines'
    assert any(c.get('outputs') for _, c in code), 'no committed output'
    assert n['headings'] == n['headings_alone'], 'a heading that shares its cell'
    assert n['use_runs'], 'the opening use shows nothing'
    assert not n['timed'], 'a timed assertion'
    assert 'nbdev_export()' in code[-1][0], 'the last cell should export'
    assert not any(o.get('output_type') == 'error' for _, c in code for o in c.get('outputs', [])), 'a committed traceback'


def test_the_table():
    "The table of the redesign, over all notebooks: `python tests/notebook_metrics.py` prints it."
    assert not over(table([measure(b) for b in MODULES]))


@pytest.mark.parametrize('book', MODULES, ids=of)
def test_imports(book):
    "A notebook exports imports only from notebooks of lower number, and keeps imports in cells of their own (the site runs every cell that has one)."
    rank = {m: of(p) for p, m in MODULES.items()}
    for t, s, _ in cells(book):
        if t != 'code': continue
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in parsed(s)) and not re.search(r'^#\|\s*(hide|exec_doc)', s, re.M):
            assert only_imports(s) or 'nbdev' in s, f'imports and other code in one cell:\n{s}'
        if EXPORT.search(s):
            for used in re.findall(r'^\s*from (mmsn[\w.]*) import', s, re.M):
                name = used.removeprefix('mmsn.')
                assert rank.get(name, '') <= of(book) or name in ('show',), f'{of(book)} imports {used} of {rank.get(name)}'


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_staging_stays_where_it_is(book):
    "nbdev runs every cell that imports while it stages the site: one that changes the folder too would hide the project's settings from all later pages."
    for t, s, _ in cells(book):
        if t == 'code' and 'nbdev_export' not in s and re.search(r'^\s*(import|from) ', s, re.M): assert not re.search(r'\bchdir\(', s), f'an import beside a change of folder:\n{s[:200]}'


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_outputs_show_no_machine(book):
    "No path of anybody's machine, and none that is gone tomorrow, in what is committed."
    assert not re.search(r'/(work|home|root|Users|tmp)/\w', book.read_text(encoding='utf-8')), 'an absolute path of a machine'


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_what_has_to_fail_is_tried(book):
    "`expect_fail` is a context: called like a function it runs nothing, and can never fail."
    for t, s, _ in cells(book):
        if t != 'code' or 'expect_fail' not in s: continue
        nodes = [n for statement in parsed(s) for n in ast.walk(statement)]
        managed = {id(i.context_expr) for n in nodes if isinstance(n, ast.With) for i in n.items}
        calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'expect_fail']
        assert all(id(n) in managed for n in calls), f'expect_fail without with:\n{s}'


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_outputs_need_no_kernel(book):
    "A widget without its kernel is an empty place on the site, and the page would fetch a script of others to draw it."
    assert 'jupyter.widget-' not in book.read_text(encoding='utf-8'), 'the output of a widget'


@pytest.mark.parametrize('book', BOOKS, ids=of)
def test_names_no_numbers(book):
    "Notebooks are renumbered now and then: prose names modules."
    for t, s, _ in cells(book):
        if t == 'markdown' and book.stem not in ('index', 'map'): assert not re.search(r'\b\d\d[a-f]?_[a-z]\w+(\.\w+)*\b(?!\.csv)', s), f'a notebook by its number:\n{s[:200]}'


def test_readme_equals_index():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert text == readme(), 'run `make readme`'
    assert 'echo:' not in text and 'read_csv' not in text, 'code that is not for readers'


def test_map_names_every_module():
    "The map is true: every exported module is in it with its notebook, and nothing else; the README has every decade and leads to it."
    text = '\n'.join(s for t, s, _ in cells(ROOT/'nbs'/'map.ipynb'))
    rows = re.findall(r'^\| \[([\w.]+)\]\(([\w.]+)\.ipynb\) \| `mmsn\.([\w.]+)` \|', text, re.M)
    assert {m for *_, m in rows} == set(MODULES.values()) and len(rows) == len(MODULES)
    for name, link, m in rows: assert name == link and module(ROOT/'nbs'/f'{name}.ipynb') == m, name
    short = readme().split('## The map')[1].split('\n## ')[0]
    assert 'nbs/map.ipynb' in short and {p.stem[0] for p in MODULES} == set(re.findall(r'^\| (\d)x \|', short, re.M))


def test_results_say_where_they_come_from():
    "nbs/results/README.md names every table and the script that makes it, and these scripts exist."
    text = (ROOT/'nbs'/'results'/'README.md').read_text(encoding='utf-8')
    assert set(re.findall(r'`([\w]+\.csv)`', text)) == {p.name for p in (ROOT/'nbs'/'results').glob('*.csv')}
    for script in re.findall(r'`(benchmarks/\w+\.py)', text): assert (ROOT/script).is_file(), script


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


@pytest.mark.parametrize('name', ['prepare', 'train', 'evaluate', 'convert', 'encode', 'generate', 'demo'])
def test_help(name):
    "Every command explains itself, without loading torch first."
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('mmsn.{name}', run_name='__main__')\nfinally: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'usage' in out.stdout.lower() and out.stdout.rstrip().endswith('False'), out.stdout + out.stderr


@pytest.mark.parametrize('script', sorted((ROOT/'benchmarks').rglob('*.py')), ids=lambda p: p.stem)
def test_benchmarks_import_what_there_is(script):
    "A measurement is made once in a while: what it takes from mmsn is still there."
    for node in ast.walk(ast.parse(script.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'mmsn':
            module = importlib.import_module(node.module)
            for a in node.names: assert hasattr(module, a.name) or importlib.util.find_spec(f'{node.module}.{a.name}'), f'{node.module} has no {a.name}'


def test_a_model_loads_no_more_than_it_needs():
    "Libraries that take a fifth of a second or more are loaded by those who use them; what reads new patients too."
    code = '''if True:
        import sys, mmsn.model
        late = ('torchvision', 'sklearn', 'accelerate', 'transformers', 'matplotlib', 'lightly', 'pandas', 'pyarrow', 'duckdb', 'huggingface_hub', 'PIL', 'mmsn.data.patients')
        print([m for m in late if m in sys.modules])'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_front_door():
    "The names at the top are there, lazily, with a docstring; importing mmsn loads no torch; modules that are functions too can be imported in any order."
    code = '''if True:
        import sys, mmsn
        assert 'torch' not in sys.modules
        names = ['Cohort', 'MMSN', 'load_config', 'prepare', 'train', 'evaluate', 'open_encoder']
        assert set(names) <= set(dir(mmsn))
        from mmsn import Cohort, MMSN, load_config, prepare, train, evaluate, open_encoder
        assert all(getattr(mmsn, n).__doc__.strip() for n in names)
        import mmsn.train as module
        from mmsn.train import main
        from mmsn import train as again
        from mmsn.evaluate import evaluate as function, linear_probe, low_shot, knn, finetune, robustness, extract_features
        assert again is module and callable(train) and callable(evaluate) and callable(function) and callable(prepare.synthetic)
        print('fine')'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout == 'fine\n', out.stderr
