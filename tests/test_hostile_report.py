"A report whose every name is hostile: no element, attribute or address of theirs reaches the page, and no cell of its tables is a formula."
import csv, json, re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from mmsn.evaluate.predictions import Predictions, save_predictions
from mmsn.evaluate.report import neat, picture, recall_note, save_styles, score_table, write_report
from mmsn.evaluate.figures import low_shot_figure
from mmsn.safe import POLICY, clean_html, file_word, plain_text, read_table, write_table

RUN = '<img src=x onerror=alert(1)>'
NAMES = [RUN, '<script>alert(2)</script>', '"><svg onload=alert(3)>', "' onmouseover='alert(4)", '[x](javascript:alert(5))', '![x](http://evil.example/y.png)', '</code></td><iframe src=//evil.example>',
         '`a` | **b** | $c$', '$\\frac{1}{0}$', '=HYPERLINK("http://evil.example")', '+1+1', '-2+3', '@SUM(A1)', '\tx', '&lt;script&gt;alert(6)&lt;/script&gt;', '<!-- x --><style>*{display:none}</style>',
         '{0.__class__}', '%s %(x)s', '1. one\n\n# two\n\n<b onclick=alert(7)>', 'http://evil.example/z', '‮evil', '../../../etc/x', 'macro_', "'=quoted", '<a href="data:text/html,<script>alert(8)</script>">', '\x1b[31mred']


class Page(HTMLParser):
    "What stands in a page: its elements, its attributes, and the text a person reads."
    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.elements.append(tag); self.attributes += attrs
    def handle_data(self, data): self.text.append(data)


def harmless(text):
    "Assert that nothing in a page runs or is fetched; returns it, parsed."
    page = Page(text)
    assert not set(page.elements) & {'script', 'iframe', 'object', 'embed', 'svg', 'math', 'form', 'input', 'base'}, page.elements
    assert not [k for k, _ in page.attributes if k.startswith('on')]
    for k, v in page.attributes:
        if k in ('href', 'src', 'srcset', 'action', 'data', 'xlink:href', 'formaction', 'poster'): assert re.match(r'#|data:(image/|,)', v or ''), (k, v)
    assert 'evil.example' not in ' '.join(v or '' for k, v in page.attributes if k not in ('alt', 'id') and not (v or '').startswith('#'))
    return page


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A report with every table that a report can have, and hostile names in all of them."
    folder, rng, n = tmp_path_factory.mktemp('hostile')/'report', np.random.default_rng(0), len(NAMES)
    folder.mkdir()
    at = lambda k: NAMES[k % n]
    inputs, encoders, labels = ['joint', at(0)], ['pretrained', 'random', at(10)], NAMES
    value = lambda: rng.uniform(.55, .9)
    cells = [(i, e, f) for i in inputs for e in encoders for f in (.1, 1.)]
    summary = [dict(encoder=e, input=i, fraction=f, shots=0, draws=2, deviation=.01, auroc=a, low=a - .02, high=a + .02, auprc=a/2, auprc_low=.2, auprc_high=.4, counted=3, labels=3, too_few=0) for i, e, f in cells for a in [value()]]
    tables = dict(summary=summary, scores=summary)
    tables['labels'] = [dict(encoder=e, input=i, label=k, metric=m, value=value(), low=.5, high=.9, rows=100, labels=1, positives=9) for i in inputs for e in encoders for k in labels for m in ('auroc', 'auprc')]
    tables['calibration'] = [dict(encoder=e, input=i, label='macro', metric=m, value=.1) for i in inputs for e in encoders for m in ('brier', 'ece')]
    tables['subgroups'] = [dict(encoder='pretrained', input='joint', attribute=a, subgroup=g, label='macro', metric='auroc', value=.7, low=.6, high=.8, subjects=30, positives=9) for a, g in [('all', 'all'), *((at(k), at(k + 1)) for k in range(n))]]
    tables['other'] = [dict(protocol=p, encoder=e, input=i, auroc=value()) for i in inputs for e in encoders for p in (at(2), at(11))]
    tables['robustness'] = [dict(corruption=at(3), modality=at(12), input=i, encoder=e, severity=s, auroc=.7, relative_loss=s/50) for i in inputs for e in encoders for s in (1, 2)]
    tables['missing'] = [dict(encoder=e, seen=s, auroc=value()) for e in encoders for s in (at(4), at(13))]
    tables['retrieval'] = [dict(query=at(5), gallery=at(6), encoder=e, space=at(7), recall=.1, times_chance=2, pair_auroc=.6, pair_low=.5, pair_high=.7, rows=10) for e in encoders]
    tables['channels'] = [dict(encoder=e, input=i, channel=at(k), statistic=at(k + 3), r2=.2 if e == 'random' else .1) for e in ('pretrained', 'random') for i in inputs for k in range(3)]
    tables['map'] = [dict(method='pca', encoder=e, input=i, sample_id=k, x=value(), y=value(), same=.1, chance=.1, **{'class': at(k)}) for e in ('pretrained', 'random') for i in inputs[:2] for k in range(12)]
    tables['comparison'] = [dict(input=i, fraction=1., run=r, label=k, metric=m, value=value(), low=.5, high=.9, difference=0. if r == at(8) else .1, difference_low=0. if r == at(8) else .05, difference_high=0. if r == at(8) else .2, p=.1, rows=100)
                            for i in inputs for r in (at(8), at(14), RUN) for k in ('macro', *labels) for m in ('auroc', 'auprc')]
    tables['ensemble'] = [dict(input=i, n=1, run=at(15), alone=.6, together=.7, chosen=True) for i in inputs]
    for name, rows in tables.items(): write_table(pd.DataFrame(rows), folder/f'{name}.csv')
    steps = np.arange(1, 9)
    pd.DataFrame({'step': steps, 'lr': .1, 'gradient_norm': 1/steps, **{f'{k}/{c}': 1. for k in ('joint', at(0)) for c in ('cross_entropy', 'floor', 'chance', 'used', 'entropy', 'entropy_of_mean', 'effective_rank')}}).to_csv(folder/'metrics.csv', index=False)
    (folder/'predictions').mkdir()
    y = (rng.random((40, 3)) < .4).astype(float)
    for e in encoders:
        p = Predictions(y, rng.normal(size=(40, 3)) + y, tuple(NAMES[:3]), np.arange(40), np.arange(40), np.repeat(['test', 'val'], 20))
        save_predictions(p, folder/'predictions'/f'joint.{file_word(e)}.parquet')
    (folder/'config.yaml').write_text(f'name: {json.dumps(" ".join(NAMES))}\n')
    (folder/'about.json').write_text(json.dumps(dict(name=' '.join(NAMES), sentence='; '.join(NAMES), inputs=inputs, prototypes=8, notices=NAMES, facts=dict(zip(NAMES, NAMES[1:] + NAMES[:1])))))
    write_report(folder)
    return folder


def test_nothing_of_a_name_is_an_element(folder):
    text = (folder/'report.html').read_text()
    page = harmless(text)
    read = ''.join(page.text)
    for name in NAMES:                                                # a reader sees every name as it is
        shown = re.sub(r'[\s\x00-\x1f\u202e]+', ' ', name).strip()
        assert shown in re.sub(r'\s+', ' ', read), name
    assert '\u202e' not in text                                        # nothing turns the text around it
    assert page.elements.count('h1') == 1 and 'b' not in page.elements and 'em' not in page.elements[:6]
    assert f'content="{POLICY}"' in text and text.index('Content-Security-Policy') < text.index('<title>')
    assert "script" not in POLICY and "default-src 'none'" in POLICY


def test_every_section_was_there(folder):
    found = re.findall(r'<h2 id="([\w-]+)"', (folder/'report.html').read_text())
    assert {'What-was-learned', 'Label-by-label', 'Subgroups', 'Corrupted-input', 'Runs-beside-the-first', 'All-together', 'Maps-of-the-test-patients', 'How-training-went'} <= set(found), found


def test_the_notebook_is_harmless_too(folder):
    from nbformat import read
    for cell in read(folder/'report.ipynb', 4).cells:
        if cell.cell_type == 'markdown': harmless(cell.source)
        for out in cell.get('outputs', ()):
            for kind in ('text/html', 'text/markdown'):
                if kind in out.get('data', {}): harmless(out.data[kind])


def test_figures_hold_text_only(folder):
    for path in (folder/'figures').glob('*.svg'):
        text = path.read_text()
        assert not re.search(r'<script|<foreignObject|<image[^>]+href="(?!data:)|<[^>]*\son\w+=', text), path
    assert all(p.parent == folder/'figures' for p in folder.rglob('*.svg'))
    assert not list(folder.parent.glob('*.parquet'))


def test_no_cell_is_a_formula(folder):
    for path in folder.glob('*.csv'):
        if path.name == 'metrics.csv': continue
        with path.open(newline='') as f: cells = [c for row in csv.reader(f) for c in row]
        assert not [c for c in cells if re.match(r'[=+\-@\t\r]', c) and not re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?', c)], path
    assert set(read_table(folder/'labels.csv').label) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_each_name_by_itself(name, tmp_path):
    table = pd.DataFrame([dict(input=name, encoder=name, fraction=1., shots=0, auroc=.7, low=.6, high=.8)])
    harmless(score_table(table).to_html())
    harmless(neat(pd.DataFrame([[.1]], index=pd.MultiIndex.from_tuples([(name, 'x')]), columns=pd.MultiIndex.from_tuples([(name, 'y')]))).to_html())
    harmless(neat(pd.DataFrame([[name]], index=[name], columns=[name])).to_html())
    harmless(recall_note(pd.DataFrame([dict(encoder=e, input=name, channel=name, statistic=name, r2=r) for e, r in (('pretrained', .1), ('random', .2))])))
    save_styles('x', low_shot_figure, table, folder=tmp_path)
    harmless(picture('x', name, tmp_path).data)
    write_table(pd.DataFrame({'name': [name, 'x'], name: [1., 2.]}), tmp_path/'t.csv')
    pd.testing.assert_frame_equal(read_table(tmp_path/'t.csv'), pd.DataFrame({'name': [name, 'x'], name: [1., 2.]}))
    assert '/' not in file_word(name) and not file_word(name).startswith('.')
    harmless(plain_text(name)), harmless(clean_html(name))
    assert not Page(plain_text(name)).elements


DIRTY = ['<scr<script>ipt>x</script>', '<IMG SRC=javascript:alert(1)>', '<img/src=x/onerror=alert(1)>', '<a href=" javascript:alert(1)">x</a>', '<a href="&#106;avascript:alert(1)">x</a>', '<svg><script>x</script></svg>', '<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>',
         '<style>@import "http://evil.example"</style>', '<style>#T_x {font-weight: bold;} body {background: url(http://evil.example)}</style>', '<p style="background: url(http://evil.example)">x</p>', '<!--><img src=x onerror=alert(1)>-->', '<![CDATA[<img src=x onerror=alert(1)>]]>', '<img src=x onerror=alert(1)//',
         '<form action=//evil.example><input></form>', '<base href=//evil.example>', '<meta http-equiv=refresh content="0;url=//evil.example">', '<link rel=stylesheet href=//evil.example>', '<img srcset="//evil.example/x 2x">', '<noscript><p title="</noscript><img src=x onerror=alert(1)>">', '<textarea><img src=x onerror=alert(1)>',
         '<a href="data:text/html,x">x</a>', '<img src="data:image/svg+xml,<svg onload=alert(1)>">', '<iframe srcdoc="<script>x</script>">', '<p id="x" id="y" onclick="x()">', '<div\nonclick=x()>', '<object data=x><embed src=x></object>', '<script src=x>', '<style><img src=x onerror=alert(1)>']

@pytest.mark.parametrize('text', DIRTY)
def test_a_dirty_page_is_cleaned(text):
    cleaned = clean_html(text)
    harmless(cleaned)
    assert 'evil.example' not in cleaned and clean_html(cleaned) == cleaned


def test_figures_of_notebooks_draw_hostile_names(tmp_path, monkeypatch):
    "`cohort.show`, `batch.show` and the repr of tables: a name is text there too, and a dollar no formula."
    import matplotlib.pyplot as plt
    import mmsn.testing as testing
    channel = testing._channel
    monkeypatch.setattr(testing, '_channel', lambda name, *a: channel({'rate': '$\\frac{1}{0}$', 'lactate': '<b onclick=alert(1)>$x^$'}.get(name, name), *a))
    cohort = testing.toy_cohort(tmp_path/'<img src=x onerror=alert(1)>', n=30)
    for fig in (cohort.show(1), cohort.batch(np.arange(4)).show()):
        fig.savefig(tmp_path/'x.svg')
        assert not re.search(r'<script|onclick=alert\(1\)>(?!.*&gt;)|<b ', (tmp_path/'x.svg').read_text())
        plt.close(fig)
    assert '$\\frac{1}{0}$' in ''.join(t.get_text() for ax in cohort.show(1).findobj(plt.Axes) for t in ax.get_yticklabels())
    harmless(pd.DataFrame({NAMES[1]: NAMES[:3]})._repr_html_().split('</style>')[-1])
