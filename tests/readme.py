"""README.md is nbs/index.ipynb as Markdown, and the pictures in it are drawn from tables and settings: `python tests/readme.py` writes them;
`readme()` and `pictures()` are what a test compares with."""
import re
from configparser import ConfigParser
from csv import DictReader
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
CI = '[![tests](../../actions/workflows/test.yml/badge.svg)](../../actions/workflows/test.yml)'      # on the page of the repository only: the site asks no other server


def readme():
    "Markdown of the index notebook: cells with `#| hide` left out, links to notebooks made to work on a repository page."
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = re.sub(r'^(#\|[^\n]*\n)+', '', c.source)      # what goes to the docstring of the package
        if c.cell_type == 'code' and re.match(r'#\|\s*echo:\s*false', c.source): c.metadata['transient'] = dict(remove_source=True)      # its output is what a reader wants
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#|nbs/|\.\./)([\w./]+(?:\.ipynb|\.csv|\.svg|/)|tutorials)\)', r'](nbs/\1)', text)
    text = text.replace('](../', '](').replace('![version]', f'{CI}\n![version]', 1)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def badge(label, value, colour='#17636b'):
    "A badge as SVG, drawn here."
    left, right = (7*len(t) + 14 for t in (label, value))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" viewBox="0 0 {left + right} 20" role="img" font-family="Verdana, sans-serif" font-size="11"><title>{label}: {value}</title>'
            f'<rect width="{left + right}" height="20" rx="3" fill="{colour}"/><path d="M3 0H{left}V20H3A3 3 0 0 1 0 17V3A3 3 0 0 1 3 0" fill="#4a555c"/>'
            f'<g fill="#fff" text-anchor="middle"><text x="{left/2}" y="14">{label}</text><text x="{left + right/2}" y="14">{value}</text></g></svg>\n')


SERIES = dict(pretrained='#b4762a', scratch='#2a8c8c', random='#6f7e88', plain='#8a6fb0', booster='#b05c7a')


def demo_figure():
    "Test AUROC of the demo against the fraction of labels, a panel an input, from results/demo.csv; readable on white and on dark."
    with open(ROOT/'nbs'/'results'/'demo.csv', encoding='utf-8') as f: rows = list(DictReader(f))
    fractions = [c for c in rows[0] if c.endswith('labels')]
    low, high, width, top, height = .5, 1., 250, 58, 220
    y = lambda v: top + height*(high - float(v))/(high - low)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 350" role="img" font-family="system-ui, sans-serif" font-size="17"><title>Test AUROC of the demo by input, encoder and fraction of labels</title>']
    for p, (key, title) in enumerate(dict(joint='image and chart', cxr='image', ehr='chart').items()):
        x0 = 60 + p*305
        x = [x0 + 20, x0 + width/2, x0 + width - 20]
        out.append(f'<text x="{x0 + width/2}" y="{top - 16}" text-anchor="middle" font-weight="600" font-size="19" fill="#6f7e88">{title}</text>')
        for v in (.5, .6, .7, .8, .9, 1.): out.append(f'<path d="M{x0} {y(v):.1f}H{x0 + width}" stroke="#6f7e88" stroke-width="{1.2 if v == .5 else .4}"/><text x="{x0 - 8}" y="{y(v) + 5:.1f}" text-anchor="end" font-size="14" fill="#6f7e88">{v:.1f}</text>')
        for at, f in zip(x, fractions): out.append(f'<text x="{at}" y="{top + height + 22}" text-anchor="middle" font-size="15" fill="#6f7e88">{f.split()[0].rstrip("%")} %</text>')
        for name, colour in reversed(SERIES.items()):
            row = next(r for r in rows if r['input'] == key and r['encoder'] == name)
            points = [(at, y(row[f])) for at, f in zip(x, fractions)]
            thick = 4 if name == 'pretrained' else 2.2
            out.append(f'<polyline points="{" ".join(f"{a},{b:.1f}" for a, b in points)}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
            out += [f'<circle cx="{a}" cy="{b:.1f}" r="{thick + 1}" fill="{colour}"/>' for a, b in points]
    for i, (name, colour) in enumerate(SERIES.items()): out.append(f'<path d="M{150 + 140*i} 330h24" stroke="{colour}" stroke-width="{4 if i == 0 else 2.5}"/><text x="{180 + 140*i}" y="336" fill="{colour}">{name}</text>')
    return '\n'.join([*out, '</svg>']) + '\n'


def pictures():
    "File name -> SVG of every picture that is drawn from numbers."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    return {'demo.svg': demo_figure(), 'badge_version.svg': badge('version', cfg['version']), 'badge_python.svg': badge('python', f'{cfg["min_python"]} – {cfg["max_python"]}'),
            'badge_licence.svg': badge('licence', cfg['license']), 'badge_use.svg': badge('use', 'research only', '#8a5a1e')}


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    for name, svg in pictures().items(): (ROOT/'nbs'/'images'/name).write_text(svg, encoding='utf-8')
    print(f'wrote {ROOT/"README.md"} and {len(pictures())} pictures')
