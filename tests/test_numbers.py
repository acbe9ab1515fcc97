"Numbers in prose are true: what the home page, the gallery, the walk-throughs and the how-to pages say is compared with the tables in nbs/results."
import json, re

import pandas as pd
import pytest

from notebook_metrics import ROOT, cells
from readme import pictures, readme

RESULTS = ROOT/'nbs'/'results'
PAGES = [ROOT/'nbs'/f'{n}.ipynb' for n in ('index', 'gallery', 'map')] + sorted(p for d in ('tutorials', 'howto', 'concepts') for p in (ROOT/'nbs'/d).glob('*.ipynb'))


def prose(book): return '\n'.join(re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)|\$[^$]*\$', ' ', s, flags=re.S) for t, s, _ in cells(book) if t == 'markdown')


def table(name): return pd.read_csv(RESULTS/f'{name}.csv')


def demo(encoder, inputs='joint'): return table('demo').query('encoder == @encoder and input == @inputs').iloc[0, 2:].astype(float)


def bar(name): return table('demo_bars').set_index('bar').loc[name]


def ahead(inputs, columns=slice(None)):
    "How far the pretrained encoder of the demo is above the best of its baselines, at each fraction."
    return (demo('pretrained', inputs) - pd.concat([demo(e, inputs) for e in ('random', 'scratch', 'plain', 'booster')], axis=1).max(axis=1)).iloc[columns]


def of_nih(): return table('gallery_nih').query('shots == 0').dropna(subset='auroc')


def of_stays(inputs): return table('gallery_physionet2012').query('shots == 0 and input == @inputs').pivot(index='encoder', columns='fraction', values='auroc')


def clearly(inputs):
    "Fractions at which the pretrained encoder is above every baseline of ICU stays, by the interval of the difference."
    return set(table('gallery_physionet2012').query('shots == 0 and input == @inputs and encoder == "pretrained" and clear').fraction)


def of_images(epochs): return table('rivals_images').query('epochs == @epochs').groupby('objective')[['auroc_0.05', 'auroc_0.1', 'auroc_1']].mean()


def in_text(measure, encoder):
    "Means over the seeds, by objective and direction."
    t = table('text').query('encoder == @encoder')
    return t[t.measure.str.endswith(measure)].groupby(['objective', 'measure']).value.mean()


def of_demo(inputs): return table('gallery_synthetic').query('shots == 0 and input == @inputs').pivot(index='encoder', columns='fraction', values='auroc')


def above_all(inputs): return of_demo(inputs).loc['pretrained'] - of_demo(inputs).drop(['pretrained', 'finetuned', 'stacked']).max()


def found_in(images): return table('generate').query('images == @images').set_index('finding')


CLAIMS = {   # (page, words of it) -> whether the tables say so
    ('index', 'With few labels the fused encoder is far ahead of every baseline'): lambda: (ahead('joint', slice(0, 2)) > .07).all(),
    ('index', 'with all of them still ahead of training from scratch'): lambda: demo('pretrained').iloc[2] > demo('scratch').iloc[2],
    ('index', 'the image encoder is ahead at every fraction'): lambda: (ahead('cxr') > 0).all(),
    ('index', 'the chart encoder up to a tenth of the labels'): lambda: (ahead('ehr', slice(0, 2)) > 0).all() and ahead('ehr').iloc[2] < 0,
    ('index', 'find each other many times better than chance'): lambda: bar('image <-> EHR, recall@10, times chance').value > 4,
    ('index', 'costs the fused encoder a sixth of its AUROC'): lambda: abs(bar('70 % of patches masked, relative loss, fused').value - 1/6) < .02,
    ('index', 'the image alone twice as much'): lambda: abs(bar('70 % of patches masked, relative loss, image alone').value/bar('70 % of patches masked, relative loss, fused').value - 2) < .3,
    ('index', 'loses a fifth of its own on such images'): lambda: abs(table('hidden').query('trained == "masked"').relative_loss.mean() - .2) < .03,
    ('index', 'the fused encoder loses a twentieth, the image still three tenths'): lambda: (abs(bar('70 % of patches masked, relative loss, fused, probe also on masked copies').value - .05) < .005
        and abs(bar('70 % of patches masked, relative loss, image alone, probe also on masked copies').value - .3) < .02),
    ('index', 'Not reached: hiding'): lambda: set(table('demo_bars').query('not reached').bar.str[:7]) == {'70 % of'},
    ('gallery', 'The intervals of all encoders overlap at every fraction of labels'): lambda: all(g.low.max() <= g.high.min() for _, g in of_nih().groupby(['input', 'fraction'])),
    ('gallery', '70 % of the patches hidden (second table) its AUROC does not fall'): lambda: table('gallery_nih_robustness').query("corruption == 'patches' and severity == .7 and encoder == 'pretrained'").relative_loss.max() < .02,
    ('gallery', 'falls by eight hundredths of itself and that of the supervised one by thirteen, on 114 test images'): lambda: (lambda t: [round(t.relative_loss[n], 2) for n in ('random', 'scratch')] == [.08, .13] and (t.rows == 114).all())(
        table('gallery_nih_robustness').query("corruption == 'patches' and severity == .7").set_index('encoder')),
    ('gallery', 'One in a hundred labels is fewer than five deaths'): lambda: of_stays('joint')[.01].isna().all(),
    ('gallery', 'ahead of every baseline with a twentieth and a tenth of the labels'): lambda: clearly('joint') == clearly('vitals') == {.05, .1},
    ('gallery', 'With all labels it is level with boosted trees on summaries'): lambda: abs(of_stays('joint')[1.]['pretrained'] - of_stays('joint')[1.]['booster']) < .005,
    ('gallery', 'the laboratory values alone are learned as well from scratch'): lambda: (of_stays('labs').loc['scratch'] > of_stays('labs').loc['pretrained'] - .014).drop(.01).all() and not clearly('labs'),
    ('gallery', 'SimCLR and VICReg are first'): lambda: set(of_images(10).auroc_1.nlargest(2).index) == set(of_images(10)['auroc_0.1'].nlargest(2).index) == {'simclr', 'vicreg'},
    ('gallery', 'no more than two hundredths above its random start'): lambda: (of_images(10).loc['msn'] - of_images(10).loc['random']).between(0, .0205).all(),
    ('gallery', 'it is four to five hundredths above it'): lambda: (of_images(40).loc['msn'] - of_images(10).loc['random']).round(2).isin([.04, .05]).all(),
    ('gallery', 'So many epochs bring SimCLR five to eight'): lambda: (of_images(40).loc['simclr'] - of_images(10).loc['random']).between(.05, .085).all() and (of_images(40).loc['simclr'] > of_images(40).loc['msn']).all(),
    ('gallery', 'Hidden patches cost MSN least of the three there, six hundredths'): lambda: (lambda t: (1 - t.masked_70/t.auroc_1).idxmin() == 'msn' and round((1 - t.masked_70/t.auroc_1)['msn'], 2) == .06)(
        table('rivals_images').query('epochs == 40').groupby('objective')[['masked_70', 'auroc_1']].mean()),
    ('gallery', 'With the report of somebody else the reader finds nothing'): lambda: (found_in('drawn from another report').low < .5).all(),
    ('gallery', 'finds the hyperinflated chest (*copd*) best, then the large heart and the oedema'): lambda: list(found_in('drawn from the report').drop('mean').auroc.nlargest(3).index) == ['copd', 'heart failure', 'oedema'],
    ('gallery', 'pneumonia, effusion and stroke it does not find with any certainty'): lambda: (lambda t: {'pneumonia', 'effusion', 'stroke'} == set(t[t.low < .5].index))(found_in('drawn from the report').drop('mean')),
    ('gallery', 'The mean is .598, with a 95 % interval from .578 to .620'): lambda: [round(found_in('drawn from the report').loc['mean'][k], 3) for k in ('auroc', 'low', 'high')] == [.598, .578, .620],
    ('gallery', 'that is a quarter of what it finds in real images (.912): more than a third is lost to the words of the VAE (.761)'): lambda: (lambda real, told, drawn:
        abs((drawn - .5)/(real - .5) - .25) < .02 and (real - told)/(real - .5) > 1/3 and [round(real, 3), round(told, 3)] == [.912, .761])(
        *(found_in(k).loc['mean'].auroc for k in ('real', 'told again by the VAE', 'drawn from the report'))),
    ('gallery', 'Without the one view that hides most of an image'): lambda: (lambda d: d.between(.045, .065).all())(of_images(40).loc['msn, no heavy view'] - of_images(10).loc['random']),
    ('gallery', 'hidden patches cost it twice as much'): lambda: (lambda t: abs((1 - t.masked_70/t.auroc_1)['msn, no heavy view']/(1 - t.masked_70/t.auroc_1)['msn'] - 2) < .2)(
        table('rivals_images').query('epochs == 40').groupby('objective')[['masked_70', 'auroc_1']].mean()),
    ('gallery', 'with few labels SimCLR is two hundredths above that, with all of them four; MSN as the preset has it one at the most'): lambda: (lambda simclr, msn:
        (simclr.iloc[:2].between(.015, .025)).all() and round(simclr.iloc[2], 2) in (.04, .05) and msn.between(0, .0125).all())(*(of_images(40).loc[n] - of_images(0).loc['plain'] for n in ('simclr', 'msn'))),
    ('gallery', 'The frozen encoder is ahead of every baseline at every fraction of labels, for both modalities together and for the image'): lambda: (above_all('joint') > 0).all() and (above_all('cxr') > 0).all(),
    ('gallery', 'the chart up to a tenth of the labels, and with all of them the same network from scratch is a hundredth ahead'): lambda: (above_all('ehr').drop(1.) > 0).all() and abs(of_demo('ehr').loc['scratch', 1.] - of_demo('ehr').loc['pretrained', 1.] - .01) < .003,
    ('gallery', 'Fine-tuning adds nothing to the frozen encoder with few labels, and with all of them a hundredth for the image and less for the chart'): lambda: all(
        abs(of_demo(i).loc["finetuned"] - of_demo(i).loc["pretrained"]).drop(1.).max() < .003 for i in ('joint', 'cxr', 'ehr')) and [round(of_demo(i).loc['finetuned', 1.] - of_demo(i).loc['pretrained', 1.], 2) for i in ('cxr', 'ehr')] == [.01, .01],
    ('gallery', 'loses more than a third of its AUROC, as the same network from scratch does, and both modalities together lose a sixth, where'): lambda: (lambda t:
        t['pretrained', 'cxr'] > 1/3 < t['scratch', 'cxr'] and abs(t['pretrained', 'joint'] - 1/6) < .01 and round(t['scratch', 'joint'], 2) in (.03, .04))(
        table('gallery_synthetic_robustness').query("corruption == 'patches' and severity == .7").set_index(['encoder', 'input']).relative_loss),
    ('gallery', 'Eight or nine of a hundred images find their report with either method'): lambda: in_text('recall@10', 'pretrained').between(.075, .096).all(),
    ('gallery', 'four times what chance gives (two), and a little more than a canonical correlation of pixels and counts of words (seven or eight)'): lambda: (
        in_text('recall@10', 'pretrained')/(10/488)).between(3.5, 4.7).all() and (in_text('recall@10', 'pretrained') - in_text('recall@10', 'CCA of plain features')).between(.002, .025).all() and in_text('recall@10', 'CCA of plain features').round(2).isin([.07, .08]).all(),
    ('gallery', 'With shuffled pairs it is chance'): lambda: (in_text('recall@10', 'pretrained, shuffled pairs') - 10/488).abs().max() < .008,
    ('gallery', 'the contrast of ConVIRT is 3.89'): lambda: round(in_text('batches of 32', 'pretrained')['convirt'].item(), 2) == 3.89,
    ('gallery', 'one or two hundredths above where it began (`images alone`), and that start was seven above a random one'): lambda: (
        in_text('linear probe AUROC, macro', 'pretrained') - in_text('linear probe AUROC, macro', 'images alone').max()).between(.005, .025).all() and round(
        in_text('linear probe AUROC, macro', 'images alone').max() - in_text('linear probe AUROC, macro', 'random').max(), 2) == .07,
    ('gallery', 'above chance with four seeds of five at most'): lambda: (lambda t: (t.value < .5).any() and len(t) == 5)(table('text').query('measure == "zero-shot AUROC, macro" and encoder == "pretrained"')),
    ('gallery', 'With few labels all but SimSiam are ahead of summaries and pixels'): lambda: (lambda t: (t.drop(['plain', 'booster', 'simsiam']).iloc[:, :2] > t.loc[['plain', 'booster']].max().iloc[:2]).all(axis=None)
        and 3 <= (t.auroc_1.drop(['plain', 'booster']) < t.auroc_1['plain']).sum() <= 6)(
        table('rivals').query('input == "joint"').groupby('objective')[['auroc_0.05', 'auroc_0.1', 'auroc_1']].mean()),
    ('faq', 'recorded at 12,000 rows a second'): lambda: 'CHAIN, LEAST, MOST = 12_000' in (ROOT/'benchmarks'/'extraction.py').read_text(encoding='utf-8'),
    ('faq', '313 million rows of chart events, 3.1 has 433 million'): lambda: 'FULL, ROWS_A_STAY, OURS = 433_000_000' in (ROOT/'benchmarks'/'extraction.py').read_text(encoding='utf-8'),
    ('faq', 'the published rules give 140 stays, 129 without a transfer, 112 with one stay left in the admission; 54 of them last 48 hours, and 9 of these patients die'):
        lambda: re.search(r'140 stays, 129 .* 112 .* 54 of them last 48 hours, 9 of these die', ' '.join(s for _, s, _ in cells(ROOT/'nbs'/'22b_data.mimic.stays.ipynb'))),
}


@pytest.mark.parametrize('page, words', CLAIMS, ids=lambda x: x[:40])
def test_claims(page, words):
    book = next(p for p in PAGES if p.stem == page)
    text = ' '.join(' '.join(s for t, s, _ in cells(book) if t == 'markdown').split())
    assert words in text, 'the page says it otherwise now: change the claim here too'
    assert CLAIMS[page, words]()


def test_table_of_the_readme():
    "Every row and number of results/demo.csv, with three digits."
    lines = [l for l in readme().splitlines() if re.match(r'\| (joint|cxr|ehr) \|', l)]
    want = [f'| {r.input} | {r.encoder} | ' + ' | '.join(f'{v:.3f}' for v in r.iloc[2:]) + ' |' for _, r in table('demo').iterrows()]
    assert lines == want


def test_pictures_are_drawn_from_the_tables():
    for name, svg in pictures().items(): assert (ROOT/'nbs'/'images'/name).read_text(encoding='utf-8') == svg, 'run python tests/readme.py'
    assert pictures()['demo.svg'].count('<circle') == (table('demo').encoder != 'shuffled pairs').sum()*3     # the control is in the table alone


def shown(book):
    "Numbers of a page's own code and text outputs, as written and rounded."
    text = ' '.join(s for t, s, _ in cells(book) if t == 'code')
    for _, _, c in cells(book):
        for o in c.get('outputs', []): text += ' '.join([''.join(o.get('text', '')), *(''.join(v) for k, v in o.get('data', {}).items() if k.startswith('text/'))])
    return set(re.findall(r'\d*\.\d+', text))


@pytest.mark.parametrize('book', PAGES, ids=lambda b: b.stem)
def test_measured_numbers_have_a_source(book):
    "A number with three decimals in prose, which is a measurement, is in a table of results or among what the page itself computes."
    pool = {f'{abs(v):.3f}' for p in RESULTS.glob('*.csv') for v in pd.to_numeric(pd.read_csv(p).stack(), errors='coerce').dropna()}
    own = shown(book)
    for number in re.findall(r'(?<![\d.:])\d?\.\d{3}(?![\d.])', prose(book)):
        assert f'{float(number):.3f}' in pool or number in own or number.lstrip('0') in {o.lstrip('0') for o in own}, f'{number}: from where?'


def test_version_is_the_same_everywhere():
    import mmsn
    assert f'version: {mmsn.__version__}\n' in (ROOT/'CITATION.cff').read_text(encoding='utf-8')
    assert f'version = {{{mmsn.__version__}}}' in readme()
    assert re.search(rf'^## {re.escape(mmsn.__version__)}\b', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)


def test_lock_file_meets_the_bounds():
    "requirements-lock.txt is a set that the bounds of settings.ini allow, without anybody's paths."
    from packaging.requirements import Requirement
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    lock = dict(l.split('==') for l in (ROOT/'requirements-lock.txt').read_text(encoding='utf-8').splitlines() if l and not l.startswith('#'))
    lock = {k.lower().replace('_', '-'): v for k, v in lock.items()}
    for line in ini['DEFAULT']['requirements'].split('\n'):
        if line.strip():
            r = Requirement(line.strip())
            assert r.specifier.contains(lock[r.name.lower().replace('_', '-')].split('+')[0]), line


def test_workflows():
    "The workflows are YAML, test the versions that are stated, and the scripts they call exist and do what they say."
    import runpy, yaml
    flows = {p.stem: p.read_text(encoding='utf-8') for p in (ROOT/'.github'/'workflows').glob('*.yml')}
    jobs = {n: yaml.safe_load(t)['jobs'] for n, t in flows.items()}
    ini = (ROOT/'settings.ini').read_text(encoding='utf-8')
    stated = [re.search(rf'^{k} = (\S+)', ini, re.M)[1] for k in ('min_python', 'max_python')]
    assert [m['python'] for m in jobs['test']['test']['strategy']['matrix']['include']] == stated
    for script in {s for t in flows.values() for s in re.findall(r'\.ci/\w+\.py', t)}: assert (ROOT/script).is_file(), script
    bounds = runpy.run_path(str(ROOT/'.ci'/'bounds.py'))
    assert bounds['lowest']('torch>=2.9\ntorchvision>=0.24\nduckdb>=2.0,<3') == ['torch==2.9.*', 'torchvision==0.24.*', 'duckdb==2.0.*']
    names = runpy.run_path(str(ROOT/'.ci'/'addresses.py'))
    pyproject = names['with_urls']((ROOT/'pyproject.toml').read_text(encoding='utf-8'), 'a', 'b')
    assert pyproject.count('[project.urls]') == 1 and names['with_urls'](pyproject, 'c', 'd') == pyproject
    quarto = yaml.safe_load(names['with_source']((ROOT/'_quarto.yml').read_text(encoding='utf-8'), 'a', 'b'))
    assert quarto['website']['navbar']['right'][-1] == dict(text='Source', href='https://github.com/a/b')
    json.loads((ROOT/'.devcontainer'/'devcontainer.json').read_text(encoding='utf-8'))
    for p in (ROOT/'.github'/'ISSUE_TEMPLATE').glob('*.yml'): assert yaml.safe_load(p.read_text(encoding='utf-8'))
