"""The staged notebooks as pages, near to what Quarto makes of them: pandoc, the site's filter, sidebar and style.

`python tests/site_pages.py [OUT [EXTRA.css …]]` renders `_proc` (which `nbdev-proc-nbs` leaves) into OUT, for a look where there is no Quarto
and for `test_site_links.py`. Pandoc comes with `pypandoc_binary`. Links, anchors, images and texts are those of the real site;
the outer look is not."""
import base64, html, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def pandoc():
    "The path of pandoc, or None."
    if found := shutil.which('pandoc'): return found
    try: import pypandoc
    except ImportError: return None
    try: return pypandoc.get_pandoc_path()
    except OSError: return None


def site(): return yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))


def staged_books(proc): return sorted(p for p in Path(proc).rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@cache
def front(book):
    "The front matter of a staged notebook."
    return yaml.safe_load(''.join(read(book)['cells'][0]['source']).strip().strip('-'))


def read(book): return json.loads(Path(book).read_text(encoding='utf-8'))


def addresses(proc):
    "Path of each staged notebook below `proc` -> path of its page."
    return {p.relative_to(proc).as_posix(): (p.parent/front(p)['output-file']).relative_to(proc).as_posix() for p in staged_books(proc)}


def sidebar(proc, contents=None, depth=0):
    "(depth, text or None, notebook or None) of every line of the sidebar, in order; globs as Quarto reads them."
    books = addresses(proc)
    for item in site()['website']['sidebar']['contents'] if contents is None else [contents] if isinstance(contents, str) else contents:
        if isinstance(item, dict) and 'section' in item:
            yield depth, item['section'], None
            yield from sidebar(proc, item['contents'], depth + 1)
        elif isinstance(item, dict) and 'href' in item: yield depth, item.get('text'), item['href']
        else:
            pattern = item['auto'] if isinstance(item, dict) else item
            found = [b for b in books if fnmatch(b, pattern) and b.count('/') == pattern.count('/')]
            if '*' not in pattern and not found: found = [pattern]
            for b in found: yield depth, None, b


def markdown(book, images, prefix):
    "A staged notebook as one text of Markdown; its pictures are written into the folder `images`."
    parts = []
    for i, cell in enumerate(read(book)['cells'][1:]):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'raw': continue
        if cell['cell_type'] == 'markdown': parts.append(source); continue
        options = dict(m.groups() for m in re.finditer(r'^#\|\s*([\w-]+):\s*(.*)$', source, re.M))
        code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
        if options.get('include') == 'false': continue
        block = f'````{{.sourceCode .python}}\n{code}\n````'
        if options.get('code-fold'): block = f'<details{" open" if options["code-fold"] == "show" else ""}><summary>{options.get("code-summary", "Code").strip(chr(34))}</summary>\n\n{block}\n\n</details>'
        if code and options.get('echo') != 'false': parts.append(block)
        alts = json.loads(options['fig-alt']) if options.get('fig-alt', '').startswith(('[', '"')) else options.get('fig-alt', '')
        alts = [alts] if isinstance(alts, str) else list(alts)
        if options.get('output') == 'false': continue
        for j, o in enumerate(cell.get('outputs', [])):
            data = o.get('data', {})
            kind = next((k for k in ('image/png', 'image/jpeg', 'image/svg+xml') if k in data), None)
            if 'text/markdown' in data:
                text = ''.join(data['text/markdown'])
                parts.append(text if re.search(r'^#{1,6} ', text, re.M) else f'::: {{.cell-output .cell-output-display}}\n{text}\n:::')
            elif kind:
                name = f'{book.stem}-{i}-{j}.{kind.split("/")[1].split("+")[0]}'
                content = ''.join(data[kind])
                (images/name).write_bytes(content.encode() if 'svg' in kind else base64.b64decode(content))
                alt = html.escape(alts.pop(0) if alts else '', quote=True)
                parts.append(f'::: {{.cell-output .cell-output-display}}\n```{{=html}}\n<p><img src="{prefix}pictures/{name}" alt="{alt}"></p>\n```\n:::')
            else:
                text = ''.join(o.get('text', data.get('text/plain', '')))
                parts.append(f'::: {{.cell-output}}\n````\n{text.rstrip()}\n````\n:::')
    return '\n\n'.join(parts)


TEMPLATE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><meta name="description" content="{description}"><link rel="icon" href="{prefix}favicon.svg">{styles}</head>
<body class="nav-sidebar floating nav-fixed quarto-light">
<header id="quarto-header" class="headroom fixed-top"><nav class="navbar navbar-expand-lg"><div class="navbar-container container-fluid"><a class="navbar-brand" href="{prefix}index.html">mmsn</a>{navbar}</div></nav></header>
<div id="quarto-content" class="quarto-container page-columns page-rows-contents page-layout-article page-navbar">
<nav id="quarto-sidebar" class="sidebar collapse sidebar-navigation floating overflow-auto">{sidebar}</nav>
<div id="quarto-margin-sidebar" class="sidebar margin-sidebar"><nav id="TOC" role="doc-toc"><h2 id="toc-title">On this page</h2>
$toc$
</nav></div>
<main class="content" id="quarto-document-content"><header id="title-block-header" class="quarto-title-block default"><div class="quarto-title"><h1 class="title">{title}</h1></div><div><div class="description">{description}</div></div></header>
$body$
</main></div>
<footer class="footer"><div class="nav-footer"><div class="nav-footer-center">{footer}</div></div></footer></body></html>'''


def page(book, proc, out, books, lines, styles, colours=True):
    "Write the page of one staged notebook."
    rel = book.relative_to(proc).as_posix()
    target = out/books[rel]
    prefix = '../'*rel.count('/')
    about = front(book)
    link = lambda b: html.escape(prefix + books.get(b, b))
    title_of = lambda b: html.escape(front(proc/b)['title']) if b in books else b
    side = ''.join(f'<div class="sidebar-section" style="padding-left:{depth}em"><b>{html.escape(text)}</b></div>' if b is None else
                   f'<div class="sidebar-item" style="padding-left:{depth}em"><a class="sidebar-link{" active" if b == rel else ""}" href="{link(b)}">{html.escape(text) if text else title_of(b)}</a></div>'
                   for depth, text, b in lines)
    nav = site()['website']['navbar']
    navbar = ''.join(f'<ul class="navbar-nav {side}">' + ''.join(f'<li class="nav-item"><a class="nav-link" href="{link(n["href"])}">{n["text"]}</a></li>' for n in nav.get(key, [])) + '</ul>'
                     for key, side in (('left', 'navbar-nav-scroll me-auto'), ('right', 'navbar-nav-scroll ms-auto')))
    template = TEMPLATE.format(title=html.escape(about['title']), description=html.escape(about.get('description', '')), prefix=prefix, navbar=navbar, sidebar=side,
                               footer=site()['website']['page-footer']['center'], styles=''.join(f'<link rel="stylesheet" href="{prefix}{s}">' for s in styles))
    file = out/'pictures'/f'{book.stem}.template.html'
    file.write_text(template, encoding='utf-8')
    text = markdown(book, out/'pictures', prefix)
    run = subprocess.run([pandoc(), '-f', 'markdown', '-t', 'html5', '--mathml', '--toc', '--toc-depth=3', '--standalone', '--template', str(file), '--lua-filter', str(ROOT/'nbs'/'site.lua'),
                          '--metadata', 'title=x', *['--no-highlight']*(not colours)], input=text, capture_output=True, text=True)
    file.unlink()
    if run.returncode: raise RuntimeError(f'{rel}: {run.stderr[-1000:]}')
    def address(match):
        "Notebooks become pages, as Quarto does it; paths from the root of the site become relative."
        path, hash_, anchor = match[2].partition('#')
        if path.startswith('/'): path = prefix + path[1:]
        elif path.endswith('.ipynb') and '://' not in path:
            b = os.path.normpath(os.path.join(os.path.dirname(rel), path)).replace(os.sep, '/')
            if b in books: path = os.path.relpath(books[b], os.path.dirname(rel) or '.').replace(os.sep, '/')
        return f'{match[1]}"{path}{hash_}{anchor}"'
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(re.sub(r'(\bhref=)"([^"]*)"', address, run.stdout), encoding='utf-8')


def render(proc, out, styles=('styles.css',), only=None, colours=True):
    "Write the pages of the staged notebooks in `proc` to `out`, with coloured code (most of the time); the files beside them are copied. Returns the pages' number."
    proc, out = Path(proc), Path(out)
    (out/'pictures').mkdir(parents=True, exist_ok=True)
    for p in proc.rglob('*'):
        if p.is_file() and p.suffix in ('.svg', '.csv', '.css', '.png', '.md', '.txt'):
            (out/p.relative_to(proc)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, out/p.relative_to(proc))
    books, lines = addresses(proc), list(sidebar(proc))
    todo = [b for b in staged_books(proc) if only is None or b.relative_to(proc).as_posix() in only]
    with ThreadPoolExecutor(2) as pool: list(pool.map(lambda b: page(b, proc, out, books, lines, styles, colours), todo))
    return len(todo)


if __name__ == '__main__':
    place, extra = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_pages'), [Path(f) for f in sys.argv[2:]]
    place.mkdir(parents=True, exist_ok=True)
    for f in extra: shutil.copyfile(f, place/f.name)
    print(render(ROOT/'_proc', place, (*[f.name for f in extra], 'styles.css')), 'pages')
