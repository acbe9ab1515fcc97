"How the notebooks read, in numbers: `python tests/notebook_metrics.py [FOLDER or NOTEBOOK …]` prints the table and what is over a limit; test_notebooks.py holds the project to it."
import ast, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPORT = re.compile(r'^#\|\s*exports?\b', re.M)
EXPORTED_CODE = re.compile(r'^#\|\s*exports\b', re.M)
HIDDEN = re.compile(r'^#\|\s*(hide\b|default_exp\b|eval:\s*false)|nbdev_export\(\)', re.M)
ASSERTS = re.compile(r'\bassert\b|\btest_\w+\(|expect_fail|raises\(')
HEADING = re.compile(r'^#{1,6} ', re.M)
FULL_PROSE = ('views', 'loss', 'heads', 'watch', 'model', 'sources', 'run', 'loop', 'train', 'evaluate')   # rooms that are to explain as much as they compute


def cells(book): return [(c['cell_type'], ''.join(c['source']), c) for c in json.loads(Path(book).read_text(encoding='utf-8'))['cells']]


def body(code): return [l for l in code.splitlines() if l.strip() and not l.lstrip().startswith('#|')]


def parsed(code):
    "Statements of a code cell; none for a cell of magics."
    try: return ast.parse('\n'.join(l for l in code.splitlines() if not l.startswith(('#|', '%', '!')))).body
    except SyntaxError: return []


def only_imports(code):
    nodes = parsed(code)
    return bool(nodes) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)


def words(text): return len(re.findall(r'\w+', text))


def definitions(code): return sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in parsed(code))


def ends_in_value(code, cell):
    "Whether the last statement is an expression that left something to see: no assertion, no print."
    nodes = parsed(code)
    if not nodes or not isinstance(nodes[-1], ast.Expr) or not cell.get('outputs'): return False
    value = nodes[-1].value
    return not (isinstance(value, ast.Call) and re.fullmatch(r'print|test_\w+|expect_fail', ast.unparse(value.func)))


def commented(code):
    "Whether comments stand inside the code (strings aside)."
    return any(re.search(r'(^|\s)#(?!\|)', re.sub(r'''('[^'\n]*'|"[^"\n]*")''', '', l)) for l in code.splitlines() if not l.startswith('#|'))


def public_symbols(codes):
    "Public functions, classes and methods added by patch."
    return sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_') for s in codes for n in parsed(s))


def measure(book):
    "The numbers of one notebook: sums, which `table` turns into means."
    book = Path(book)
    all_cells = cells(book)
    code = [(s, c) for t, s, c in all_cells if t == 'code']
    prose = [s for t, s, _ in all_cells if t == 'markdown']
    exports = [(s, c) for s, c in code if EXPORT.search(s) and not only_imports(s) and '__main__' not in s]
    lessons = [(s, c) for s, c in code if not EXPORT.search(s) and not HIDDEN.search(s) and body(s) and not only_imports(s)]
    headings = [s for s in prose if HEADING.search(re.sub(r'^```.*?^```', '', s, flags=re.M | re.S))]
    lines = [l for s, _ in exports for l in body(s)]
    use = next(((s, c) for s, c in code if not EXPORT.search(s) and 'default_exp' not in s and body(s) and not only_imports(s) and not HIDDEN.search(s)), ('', {}))
    return dict(
        book=book.stem, cells=len(all_cells), exports=len(exports), export_lines=len(lines), longest=max([len(body(s)) for s, _ in exports], default=0),
        several=sum(definitions(s) > 1 for s, _ in exports), wide=sum(len(l) > 120 for l in lines), widest=max(map(len, lines), default=0),
        hidden=sum(not EXPORTED_CODE.search(s) for s, _ in exports), words=sum(map(words, prose)), exported_words=sum(words(s) for s, _ in exports),
        lessons=len(lessons), lesson_lines=sum(len(body(s)) for s, _ in lessons), shown=sum(ends_in_value(s, c) for s, c in lessons),
        commented=sum(commented(s) for s, _ in lessons), asserting=sum(bool(ASSERTS.search(s)) for s, _ in lessons), public=public_symbols([s for s, _ in exports]),
        headings=len(headings), headings_alone=sum(len(s.strip().splitlines()) == 1 or s.startswith('# ') for s in headings),
        timed=sum(bool(re.search(r'perf_counter|process_time|time\.time', s) and re.search(r'assert[^\n]*[<>]', s)) for s, _ in lessons),
        temporary='/tmp/' in json.dumps([c.get('outputs', []) for _, c in code]),
        use_runs=bool(use[1].get('outputs')) and not use[0].lstrip().startswith('```'), use_lines=len(body(use[0])))


def module(book): return next((m[1] for t, s, _ in cells(book) if t == 'code' and (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)


def books(): return sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if module(p))


LIMITS = {   # what: (a number of all notebooks together, its bound, whether it is a largest)
    'export cell, mean lines': (12, True), 'export cell, most lines': (40, True), 'export cells with several definitions': (.10, True),
    'export lines over 120 characters': (.02, True), 'export cells hidden from the site': (.10, True), 'lesson cell, mean lines': (5, True),
    'lesson cells that end in a value or figure': (.60, False), 'lesson cells with comments': (.10, True), 'words of prose an exported word': (.7, False),
    'the same, where learning and judging are explained': (1., False), 'headings in cells of their own': (1., False),
    'asserting lesson cells a public symbol': (.9, False), 'opening uses that run': (1., False), 'timed assertions': (0, True), 'outputs with a temporary path': (0, True)}


def table(rows):
    "What -> number, over all `rows` of `measure`."
    total = lambda key, some=rows: sum(r[key] for r in some)
    ratio = lambda a, b, some=rows: total(a, some)/max(total(b, some), 1)
    full = [r for r in rows if re.search(rf'^\d\d\w?_({"|".join(FULL_PROSE)})\b', r['book'])]
    return dict(zip(LIMITS, (
        ratio('export_lines', 'exports'), max(r['longest'] for r in rows), ratio('several', 'exports'), ratio('wide', 'export_lines'), ratio('hidden', 'exports'),
        ratio('lesson_lines', 'lessons'), ratio('shown', 'lessons'), ratio('commented', 'lessons'), ratio('words', 'exported_words'), ratio('words', 'exported_words', full or rows),
        ratio('headings_alone', 'headings'), ratio('asserting', 'public'), total('use_runs')/len(rows),
        total('timed'), total('temporary'))))


def over(numbers): return [f'{what}: {numbers[what]:.3g} ({"at most" if most else "at least"} {bound})' for what, (bound, most) in LIMITS.items() if (numbers[what] > bound if most else numbers[what] < bound)]


if __name__ == '__main__':
    given = [b for a in map(Path, sys.argv[1:]) for b in (sorted(a.glob('*.ipynb')) if a.is_dir() else [a])] or books()
    rows = [measure(b) for b in given if module(b)]
    for r in rows:
        print(f"{r['book']:30} {r['cells']:3} cells · export {r['export_lines']/max(r['exports'], 1):4.1f} lines, longest {r['longest']:2}, several {r['several']:2} of {r['exports']:2}, "
              f"wide {r['wide']:2} · lesson {r['lesson_lines']/max(r['lessons'], 1):4.1f} lines, {r['shown']:2} of {r['lessons']:2} shown, {r['asserting']:2} assert for {r['public']:2} public, commented {r['commented']:2} · "
              f"words {r['words']/max(r['exported_words'], 1):.2f} · headings {r['headings_alone']}/{r['headings']} · use {'runs' if r['use_runs'] else 'DOES NOT RUN'}")
    numbers = table(rows)
    print()
    for what, value in numbers.items(): print(f'{what:55} {value:7.3f}   {"at most" if LIMITS[what][1] else "at least"} {LIMITS[what][0]}')
    if faults := over(numbers): print('\nover the limits:', *faults, sep='\n- '); raise SystemExit(1)
