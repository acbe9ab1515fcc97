"README.md is nbs/index.ipynb as Markdown. `python tests/readme.py` writes it; `readme()` is what a test compares with."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme():
    "Markdown of the index notebook: cells with `#| hide` left out, links to notebooks made to work on a repository page."
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = re.sub(r'^(#\|[^\n]*\n)+', '', c.source)      # what goes to the docstring of the package
        if c.cell_type == 'code' and re.match(r'#\|\s*echo:\s*false', c.source): c.metadata['transient'] = dict(remove_source=True)      # its output is what a reader wants
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#|nbs/|\.\./)([\w./]+(?:\.ipynb|\.csv|/)|tutorials)\)', r'](nbs/\1)', text)
    text = text.replace('](../', '](')
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    print(f'wrote {ROOT/"README.md"}')
