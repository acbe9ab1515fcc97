"Labels and splits that an evaluation cannot use: undefined for every encoder and in every mean, or refused at once in one line."
import json

import numpy as np
import pandas as pd
import pytest

import mmsn.testing as testing
from conftest import refused
from mmsn.evaluate.__main__ import main
from mmsn.evaluate.evaluation import evaluate
from mmsn.evaluate.compare import evaluate_runs
from mmsn.model import MMSN
from mmsn.options import InputError

FAST = ['draws=1', 'fractions=[1]', 'shots=[1]', 'bootstrap=20', 'scratch_epochs=1', 'finetune_epochs=1', 'pictures=false', 'cache=false', 'corruptions=[patches]', 'masked=[0,.5]', 'map_samples=20',
        'protocols=[low_shot,linear_probe,knn,robustness,missing,retrieval]']
ALL = ['protocols=[low_shot,linear_probe,knn,supervised,finetune,robustness,missing,retrieval]']


@pytest.fixture
def made(tmp_path, monkeypatch):
    "A cohort of toy patients whose table of samples was changed first, and an encoder for it."
    def make(change=lambda s: s, n=200, *modalities):
        samples = testing._toy_samples
        monkeypatch.setattr(testing, '_toy_samples', lambda *a: change(samples(*a)))
        cohort = testing.toy_cohort(tmp_path/'cohort', n=n)
        MMSN.from_config(testing.toy_config(*modalities), cohort).save_pretrained(tmp_path/'encoder')
        return tmp_path
    return make


def results(folder, *more, page=False):
    out = folder/'report'
    evaluate(folder/'encoder', [*FAST, f'data.cohort={folder/"cohort"}', *more], out, page=page)
    return {p.stem: pd.read_csv(p) for p in out.glob('*.csv')}, json.loads((out/'about.json').read_text())


def one_class(label, split, value):
    def change(s):
        at = s.split == split
        s.loc[at, label] = np.where(s[label][at].isna(), np.nan, value) if value is not None else np.nan
        return s
    return change


CASES = dict(negative_train=('train', 0), positive_train=('train', 1), unknown_train=('train', None), negative_test=('test', 0), positive_test=('test', 1), unknown_test=('test', None))

@pytest.mark.parametrize('case', CASES)
def test_a_label_of_one_class_is_undefined_everywhere(case, made, capsys):
    split, value = CASES[case]
    whole = case == 'positive_train'                                   # networks from scratch take longest
    t, about = results(made(one_class('heart', split, value)), *ALL*whole)
    for name in ('scores', 'labels', 'calibration', 'knn', 'subgroups'):
        found = t[name]
        assert found.value[found.label == 'heart'].isna().all(), name
        assert found.value[found.label == 'lung'].notna().any(), name
    found = t['scores'][(t['scores'].fraction == 1) & (t['scores'].metric == 'auroc')]
    assert {'pretrained', 'random', 'plain', 'booster'} | ({'scratch', 'finetuned'} if whole else set()) <= set(found.encoder)
    for _, one in found.groupby(['encoder', 'input']):                 # in no mean
        v = one.set_index('label').value
        assert v.macro == pytest.approx(v[['lung', 'both']].mean())
    s = t['summary'][t['summary'].fraction == 1]
    assert (s.counted == 2).all() and (s.labels == 3).all()
    said = [line for line in about['notices'] if "'heart' is undefined" in line]
    assert len(said) == 1 and f'{split}: ' in said[0] and said[0] in capsys.readouterr().out
    counts = t['splits'].set_index(['label', 'split'])
    assert (counts.loc[('heart', split), ['positive', 'negative']] == 0).any() and counts.loc['heart'][['positive', 'negative', 'unknown']].to_numpy().sum() == counts.loc['heart'].samples.sum()


def test_robustness_and_missing_leave_it_out_too(made):
    "A probe of a label that nobody in train has scores a constant: .5 in every mean of before."
    folder = made(one_class('both', 'train', 0))                        # the last, as folds are drawn by a label's number
    some = ['protocols=[robustness,missing]']
    with_, _ = results(folder, *some)
    without, _ = results(folder, *some, 'labels=[heart,lung]')
    for name in ('robustness', 'missing'):
        assert np.allclose(with_[name].auroc, without[name].auroc), name


def test_a_rare_label_is_undefined_in_robustness_as_in_every_table(made):
    def change(s):
        train = s.index[s.split == 'train']
        s.loc[train, 'both'] = 0.
        s.loc[train[:4], 'both'] = 1.
        return s
    folder = made(change)
    a, about = results(folder, 'protocols=[robustness]')
    b, _ = results(folder, 'protocols=[robustness]', 'labels=[heart,lung]')
    assert np.allclose(a['robustness'].auroc, b['robustness'].auroc)


def test_no_validation_split(made):
    folder = made(lambda s: s.assign(split=s.split.replace('val', 'train')))
    t, about = results(folder)
    assert t['summary'].auroc.notna().any() and 'val 0' not in ' '.join(about['notices'])
    with pytest.raises(InputError, match='no val samples .*prepare it with another split'): results(folder, 'select=validation')


def test_validation_without_a_label_of_both_classes(made):
    def change(s): return s.assign(**{n: np.where(s.split == 'val', 0, s[n]) for n in ('heart', 'lung', 'both')})
    folder = made(change)
    assert results(folder)[0]['summary'].auroc.notna().any()
    with pytest.raises(InputError, match='both classes in val.*use evaluate.select=cv'): results(folder, 'select=validation')


REFUSED = dict(
    no_test=(lambda s: s.assign(split=s.split.replace('test', 'val')), "no test samples \\(train 120, val 80, test 0\\)"),
    no_train=(lambda s: s.assign(split=s.split.replace('train', 'val')), "no train samples \\(train 0, val 160, test 40\\)"),
    nothing_positive=(lambda s: s.assign(heart=0., lung=0., both=0.), 'no label .* has both classes in train and in test: heart \\(train: 0 positive'),
    nothing_known=(lambda s: s.assign(heart=np.nan, lung=np.nan, both=np.nan), 'no label .* 120 unknown'),
    never_both=(lambda s: s.assign(heart=(s.split == 'train')*1., lung=(s.split == 'test')*1., both=1.), 'no label .* has both classes'))

@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_asked_is_refused_at_once(case, made, capsys, monkeypatch):
    change, message = REFUSED[case]
    folder = made(change)
    monkeypatch.setattr('mmsn.evaluate.evaluation.extract_features', lambda *a, **k: pytest.fail('something was computed'))
    line = refused(main, [folder/'encoder', f'data.cohort={folder/"cohort"}', '--out', folder/'report'], capsys)
    import re
    assert re.search(message, line), line
    assert not (folder/'report').exists() and not list(folder.glob('.*'))


def test_several_runs_are_asked_the_same_way(made, capsys):
    folder = made(one_class('heart', 'test', 0))
    MMSN.from_config(testing.toy_config(train=dict(threads=1, log_every=1, seed=5)), __import__('mmsn').Cohort.open(folder/'cohort')).save_pretrained(folder/'second')
    more = [*FAST[:-1], 'protocols=[low_shot]', f'data.cohort={folder/"cohort"}']
    evaluate_runs([folder/'encoder', folder/'second'], more, folder/'comparison')
    c = pd.read_csv(folder/'comparison'/'comparison.csv')
    assert c.value[c.label == 'heart'].isna().all() and c.value[c.label == 'lung'].notna().all()
    assert "'heart' is undefined" in ' '.join(json.loads((folder/'comparison'/'about.json').read_text())['notices'])


@pytest.mark.parametrize('split', ['train', 'test'])
def test_an_input_that_nobody_has_is_left_out(split, made):
    def change(s): return s.assign(cxr_index=np.where((s.split == split) & (s.ehr_length > 0), -1, s.cxr_index)).pipe(lambda s: s[~((s.split == split) & (s.ehr_length == 0))])
    t, about = results(made(change))
    assert set(t['summary'].input) == {'joint', 'ehr'}
    assert any(n.startswith('cxr is undefined') for n in about['notices'])
    if split == 'test': assert any('retrieval is left out' in n for n in about['notices']) and 'retrieval' not in t


def test_samples_that_drop_out_are_counted(made):
    def change(s): return s.assign(cxr_index=np.where(s.index % 7 == 0, -1, s.cxr_index), ehr_length=np.where(s.index % 7 == 0, 0, s.ehr_length))
    t, about = results(made(change), 'protocols=[knn]')
    out = [n for n in about['notices'] if 'left out' in n]
    assert out and out[0].startswith('29 of 200 samples of the cohort are left out (train ')


def test_samples_with_facts_only_are_counted(made, capsys):
    "An encoder that reads facts keeps them; how many there are in each split is said on the console and in the report."
    def change(s): return s.assign(cxr_index=np.where(s.index % 7 == 0, -1, s.cxr_index), ehr_length=np.where(s.index % 7 == 0, 0, s.ehr_length))
    folder = made(change, 200, 'cxr', 'ehr', 'facts')
    t, about = results(folder, 'protocols=[knn]')
    bare = testing.Cohort.open(folder/'cohort').samples.query('cxr_index < 0 and ehr_length == 0 and facts_index >= 0').split.value_counts()
    said = [n for n in about['notices'] if 'facts only' in n]
    assert len(said) == 1 and said[0] in capsys.readouterr().out and bare.sum() == 29
    assert f'29 of 200 samples have facts only (train {bare["train"]}, val {bare["val"]}, test {bare["test"]})' in said[0]


@pytest.mark.parametrize('n', [50])
def test_few_patients_end_in_a_report(n, made):
    "Too few for most protocols: what can be said is said, the rest is named, and the page is whole."
    t, about = results(made(n=n), page=True)
    assert (pd.Series(about['notices']).str.contains('left out|undefined')).any()


def test_a_label_called_like_a_mean_is_refused(made, monkeypatch):
    from mmsn.evaluate.task import Task, usable_task
    task = Task(np.tile([[0.], [1.]], (4, 1)), np.repeat(['train', 'test'], 4), np.arange(8), ['macro'])
    with pytest.raises(InputError, match='name of a mean'): usable_task(task, 'it')
    with pytest.raises(InputError, match='has no labels'): usable_task(Task(np.zeros((8, 0)), task.split, task.subjects, []), 'it')
    with pytest.raises(InputError, match='twice'): usable_task(Task(np.zeros((8, 2)), task.split, task.subjects, ['a', 'a']), 'it')
