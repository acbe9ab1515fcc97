"The site's links, anchors, pictures and their words: over the staged notebooks, and over their pages where pandoc is there."
import json, os, re
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import site_pages
from notebook_metrics import ROOT
from site_pages import addresses, read, sidebar, site, staged_books
from test_site import staged          # noqa: F401 (the fixture that stages them)


def test_sidebar_holds_every_page_once(staged):
    lines = Counter(b for _, _, b in sidebar(staged) if b)
    assert set(lines) == set(addresses(staged)), 'pages that are not in the sidebar, or entries without a page'
    assert not [b for b, n in lines.items() if n > 1]
    navbar = site()['website']['navbar']
    for entry in navbar['left'] + navbar['right']: assert entry['href'] in lines, entry


def test_groups_of_the_sidebar(staged):
    groups = [text for depth, text, b in sidebar(staged) if depth == 0]
    assert groups == ['Start', 'Tutorials', 'How-to', 'Concepts', 'The notebooks', 'Gallery']


def test_pages_have_addresses_of_their_own(staged):
    assert not [a for a, n in Counter(addresses(staged).values()).items() if n > 1]


def test_theme_asks_nobody():
    "Light and dark are ours, without web fonts and MathJax; style files hold no address."
    html = site()['format']['html']
    assert html['html-math-method'] == 'mathml' and set(html['theme']) == {'light', 'dark'}
    for name in {f for files in html['theme'].values() for f in files if f.endswith('.scss')} | {html['css']}:
        text = (ROOT/'nbs'/name).read_text(encoding='utf-8')
        assert '//' not in re.sub(r'^\s*//.*$', '', text, flags=re.M) and '@import' not in text, name
    assert '$web-font-path: false' in (ROOT/'nbs'/'site.scss').read_text(encoding='utf-8')
    for files in html['theme'].values(): assert 'site.scss' in files


def test_outputs_need_no_script(staged):
    "Quarto adds jQuery and require.js where an output is HTML or JavaScript."
    for book in staged_books(staged):
        kinds = {k for c in read(book)['cells'] for o in c.get('outputs', []) for k in o.get('data', {})}
        assert not kinds & {'text/html', 'application/javascript'}, book.name


def test_pictures_have_words(staged):
    for book in staged_books(staged):
        for c in read(book)['cells']:
            source = ''.join(c['source'])
            if any(k.startswith('image/') for o in c.get('outputs', []) for k in o.get('data', {})) and not re.search(r'^#\|\s*include:\s*false', source, re.M):
                alt = re.search(r'^#\|\s*fig-alt:\s*(\S.*)$', source, re.M)
                assert alt and len(re.sub(r'\W', '', alt[1])) >= 10, f'{book.name}: a figure without words\n{source[:200]}'
            if c['cell_type'] == 'markdown':
                for words, target in re.findall(r'!\[([^\]]*)\]\(([^)\s]+)', source):
                    assert words.strip(), f'{book.name}: {target} without words'
                    assert '://' not in target and (book.parent/target).is_file(), f'{book.name}: no picture {target}'


def test_ordinary_words_are_no_links(staged):
    for book in staged_books(staged):
        for c in read(book)['cells']:
            if c['cell_type'] == 'markdown':
                assert not re.search(r'\[`(train|test|main|run|metrics|window|build|finish|demo|_\w+)`\]\([^)]*\.html', ''.join(c['source'])), book.name


@pytest.fixture(scope='module')
def pages(staged, tmp_path_factory):
    bs4 = pytest.importorskip('bs4')
    if site_pages.pandoc() is None: pytest.skip('pandoc is not installed: pip install pypandoc_binary')
    out = tmp_path_factory.mktemp('pages')
    assert site_pages.render(staged, out, colours=False) == len(staged_books(staged))
    return out, {p: bs4.BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(out.rglob('*.html'))}


def faults_of(root, pages):
    "What is wrong with rendered pages (path -> soup) below `root`: kind -> list of 'page: what'."
    ids = {p: {e['id'] for e in s.find_all(id=True)} for p, s in pages.items()}
    faults = defaultdict(list)
    for p, soup in pages.items():
        rel = p.relative_to(root).as_posix()
        add = lambda kind, what: faults[kind].append(f'{rel}: {what}')
        for name, n in Counter(e['id'] for e in soup.find_all(id=True)).items():
            if n > 1: add('an id that is there twice', name)
        if len(soup.find_all('h1')) != 1: add('not one h1', len(soup.find_all('h1')))
        if not (soup.title and soup.title.get_text(strip=True)): add('no title', '')
        for tag, attr in (('a', 'href'), ('img', 'src'), ('link', 'href'), ('script', 'src'), ('iframe', 'src')):
            for e in soup.find_all(tag):
                if (value := e.get(attr)) is None: continue
                url = urlsplit(value)
                if value == '': add(f'empty {tag}', e.get_text()[:30]); continue
                if url.scheme in ('mailto', 'data'): continue
                if url.scheme or url.netloc:
                    if tag != 'a': add('asks another server', value)
                    elif url.scheme != 'https' or '.' not in url.netloc: add('no address of a web page', value)
                    continue
                if url.path.startswith('/'): add('a path that breaks below a sub-path', value); continue
                target = Path(os.path.normpath(p.parent/unquote(url.path))) if url.path else p
                if target.is_dir(): target = target/'index.html'
                if not target.exists(): add(f'dead {tag}', value)
                elif url.fragment and target in ids and tag == 'a' and unquote(url.fragment) not in ids[target]: add('dead anchor', value)
        for e in soup.find_all('img'):
            if not (e.get('alt') or '').strip(): add('img without words', (e.get('src') or '')[:60])
    return dict(faults)


def test_pages_have_no_fault(pages):
    root, soups = pages
    faults = faults_of(root, soups)
    assert not faults, json.dumps(faults, indent=1)[:6000]


def test_checker_finds_faults(tmp_path):
    "The checker itself, on a page where each thing is wrong once."
    bs4 = pytest.importorskip('bs4')
    page = tmp_path/'index.html'
    page.write_text('<title>t</title><h1 id="a">x</h1><p id="a"><a href="gone.html">x</a><a href="#gone">x</a><img src="https://example.com/x.png">'
                    '<a href="/x.html">x</a><a href="#a">fine</a><a href="index.html#a">fine</a><a href="https://arxiv.org/abs/1">fine</a>', encoding='utf-8')
    found = faults_of(tmp_path, {page: bs4.BeautifulSoup(page.read_text(encoding='utf-8'), 'html.parser')})
    assert {k: len(v) for k, v in found.items()} == {'an id that is there twice': 1, 'dead a': 1, 'dead anchor': 1, 'asks another server': 1, 'a path that breaks below a sub-path': 1, 'img without words': 1}
