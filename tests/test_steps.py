"An evaluation that is stopped goes on from its protocols, to the same tables byte for byte."
import subprocess, sys, time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mmsn import MMSN, open_encoder
from mmsn.evaluate import beside, evaluation
from mmsn.evaluate.evaluation import evaluate
from mmsn.evaluate.steps import Steps
from mmsn.testing import toy_cohort, toy_config

OPTIONS = ['protocols=[low_shot,linear_probe,knn,supervised,robustness,missing]', 'draws=1', 'bootstrap=20', 'pictures=false', 'fractions=[0.5,1.0]', 'shots=[1]',
           'corruptions=[contrast]', 'map_samples=20', 'scratch_epochs=1']


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.name not in ('about.json', 'config.yaml')}


def test_stopped(tmp_path, monkeypatch, capsys):
    toy_cohort(tmp_path/'cohort', 200)
    MMSN.from_config(toy_config(), toy_cohort(tmp_path/'c2', 200)).save_pretrained(tmp_path/'encoder')
    words = [*OPTIONS, f'data.cohort={tmp_path/"cohort"}']
    evaluate(tmp_path/'encoder', words, tmp_path/'whole', page=False)
    def stop(ev): raise KeyboardInterrupt
    for name, before in (('knn', ['linear_probe', 'low_shot']), ('robustness', ['knn', 'linear_probe', 'low_shot', 'supervised'])):
        with monkeypatch.context() as m:
            m.setitem(evaluation.PROTOCOL_TABLES, name, stop)
            with pytest.raises(KeyboardInterrupt): evaluate(tmp_path/'encoder', words, tmp_path/'report', page=False)
        parts = tmp_path/'report-parts'
        assert sorted(p.name for p in parts.iterdir() if p.is_dir()) == before and not (tmp_path/'report').exists()
    assert (parts/'low_shot'/'scores.csv').is_file() and (parts/'knn'/'knn.csv').is_file()
    capsys.readouterr()
    evaluate(tmp_path/'encoder', words, tmp_path/'report', page=False)
    said = capsys.readouterr().out
    assert said.count('kept from an evaluation that was stopped') == 4 and not parts.exists()
    assert contents(tmp_path/'report') == contents(tmp_path/'whole')


def test_stopped_between_inputs(tmp_path, monkeypatch, capsys):
    "The network of one input is kept when it is trained; what a killed process had begun is begun again."
    MMSN.from_config(toy_config(), toy_cohort(tmp_path/'cohort', 120)).save_pretrained(tmp_path/'encoder')
    words = [*OPTIONS[1:], 'protocols=[supervised,robustness]', f'data.cohort={tmp_path/"cohort"}']
    evaluate(tmp_path/'encoder', words, tmp_path/'whole', page=False)
    train = beside.NETWORKS['supervised']
    def killed(ev, name):
        if name == 'ehr': raise KeyboardInterrupt
        return train(ev, name)
    with monkeypatch.context() as m:
        m.setitem(beside.NETWORKS, 'supervised', killed)
        with pytest.raises(KeyboardInterrupt): evaluate(tmp_path/'encoder', words, tmp_path/'report', page=False)
    parts = tmp_path/'report-parts'
    assert sorted(p.name for p in parts.iterdir() if p.is_dir()) == ['supervised-cxr', 'supervised-joint']
    (parts/'.supervised-ehr.begun').mkdir()
    capsys.readouterr()
    monkeypatch.setattr(beside, 'halves', lambda: (1, 1))
    evaluate(tmp_path/'encoder', words, tmp_path/'report', page=False)
    assert capsys.readouterr().out.count('kept from an evaluation that was stopped') == 2 and not parts.exists()
    assert contents(tmp_path/'report') == contents(tmp_path/'whole')


def test_two_processes(tmp_path, monkeypatch, capsys):
    "A process that trains the networks meanwhile gives the same tables; one that dies costs nothing but time."
    MMSN.from_config(toy_config(), toy_cohort(tmp_path/'cohort', 120)).save_pretrained(tmp_path/'encoder')
    words = [*OPTIONS[1:], 'protocols=[low_shot,supervised,robustness,missing]', f'data.cohort={tmp_path/"cohort"}']
    evaluate(tmp_path/'encoder', words, tmp_path/'alone', page=False)
    capsys.readouterr()
    monkeypatch.setattr(beside, 'halves', lambda: (1, 1))
    meanwhile = evaluation._meanwhile
    def patient(ev, names):     # toys are done before the other process has begun: wait until it has
        while not (tmp_path/'two-parts'/'.supervised-joint.begun').exists(): time.sleep(.05)
        meanwhile(ev, names)
    with monkeypatch.context() as m:
        m.setattr(evaluation, '_meanwhile', patient)
        evaluate(tmp_path/'encoder', words, tmp_path/'two', page=False)
    said = capsys.readouterr().out
    assert 'supervised joint: done by the process beside' in said and said.index('missing') < said.index('supervised') < said.index('robustness (')
    assert said.index('robustness of the frozen encoders') < said.index('supervised (')      # not after the networks are there

    class Dies(beside.Beside):
        def __init__(self, *words): super().__init__(*words); self.process.kill()
    monkeypatch.setattr(beside, 'Beside', Dies)
    evaluate(tmp_path/'encoder', words, tmp_path/'dead', page=False)
    assert 'done by' not in capsys.readouterr().out
    assert contents(tmp_path/'alone') == contents(tmp_path/'two') == contents(tmp_path/'dead')
    assert not list(tmp_path.glob('*-parts'))


def test_threads(tmp_path, monkeypatch):
    "Beside another process every library keeps to its threads, and does so too where an evaluation goes on after that process has done its part."
    class Silent(beside.Beside):
        def __init__(self, names, *words): self.names = names
        def stop(self): pass
    monkeypatch.setattr(beside, 'Beside', Silent); monkeypatch.setattr(beside, 'halves', lambda: (1, 1))
    threads = lambda: ({p['num_threads'] for p in threadpool_info()}, torch.get_num_threads())
    ev = SimpleNamespace(options=SimpleNamespace(protocols=('low_shot', 'supervised'), baselines=True), ours=True, inputs=['joint', 'cxr'], device='cpu', steps=Steps(tmp_path/'parts', 'plan'))
    before = torch.get_num_threads()
    with threadpool_limits(2):
        torch.set_num_threads(2)
        with beside.two_processes(ev, 'run'): one, started = threads(), ev.steps.beside
        ev.steps.beside = None
        (tmp_path/'parts'/'supervised').mkdir(); (tmp_path/'parts'/'supervised'/'step.json').write_text('{}')
        with beside.two_processes(ev, 'run'): again, nobody = threads(), ev.steps.beside
        ev.options.protocols = ('low_shot',)
        with beside.two_processes(ev, 'run'): alone = threads()
    torch.set_num_threads(before)
    assert (one, again, alone) == (({1}, 1), ({1}, 1), ({2}, 2)) and started is not None and nobody is None


def test_the_process_ends_with_its_evaluation():
    "Killed or not, an evaluation leaves nobody behind."
    words = 'import sys, time; from mmsn.evaluate.ahead import _end_with; _end_with(sys.stdin.buffer); print("on", flush=True); time.sleep(300)'
    process = subprocess.Popen([sys.executable, '-c', words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'on\n' and process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 1


def test_another_plan_begins_anew(tmp_path, monkeypatch, capsys):
    "Other options, another encoder: nothing kept is used."
    cohort = toy_cohort(tmp_path/'cohort', 120)
    MMSN.from_config(toy_config('ehr'), cohort).save_pretrained(tmp_path/'encoder')
    words = ['protocols=[low_shot,knn]', 'bootstrap=10', 'pictures=false', 'draws=1', 'map_samples=20', f'data.cohort={tmp_path/"cohort"}']
    def stop(ev): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setitem(evaluation.PROTOCOL_TABLES, 'knn', stop)
        with pytest.raises(KeyboardInterrupt): evaluate(tmp_path/'encoder', words, tmp_path/'report', page=False)
    evaluate(tmp_path/'encoder', [*words, 'seed=1'], tmp_path/'report', page=False)
    assert 'kept from' not in capsys.readouterr().out and not (tmp_path/'report-parts').exists()


def test_card_gets_the_numbers(tmp_path):
    "The evaluation of an exported encoder of a run ends in its card."
    from mmsn.card import write_card
    cohort = toy_cohort(tmp_path/'cohort', 120)
    MMSN.from_config(toy_config('ehr'), cohort).save_pretrained(tmp_path/'encoder')
    words = ['protocols=[low_shot,linear_probe]', 'bootstrap=10', 'pictures=false', 'draws=1', 'map_samples=20', f'data.cohort={tmp_path/"cohort"}']
    evaluate(tmp_path/'encoder', words, tmp_path/'report', page=False)
    card = write_card(tmp_path/'encoder', tmp_path/'report').read_text(encoding='utf-8')
    value = pd.read_csv(tmp_path/'report'/'summary.csv').query("encoder == 'pretrained' and fraction == 1").auroc.iloc[0]
    assert f'| {value:.3f} |' in card and 'No evaluation' not in card and open_encoder(tmp_path/'encoder') is not None
