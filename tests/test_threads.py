"Threads on machines that are shared: what is chosen, that the trial leaves nothing behind, and that a run keeps its choice."
import json, os, subprocess, sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from mmsn import processes
from mmsn.loop import Trainer
from mmsn.testing import toy_cohort, toy_config


@pytest.fixture
def cohort(tmp_path): return toy_cohort(tmp_path/'cohort', n=60, hours=6, size=8)


@pytest.fixture
def chosen(monkeypatch):
    "Threads may be chosen, of two cores, and none is changed in this process; a list of what torch was told."
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(processes, 'cores', lambda: 2)
    monkeypatch.setattr(processes, 'others', lambda: 0.)
    told = []
    monkeypatch.setattr(torch, 'set_num_threads', told.append)
    return told


def config(cohort, run, epochs=50, **train):
    cxr = dict(encoder=dict(dim=8, depth=1, heads=2, patch=4, pool='mean', positions='sincos', init='fan_in'), views=dict(random=1, focal=1, random_size=8, focal_size=4, patch_drop=.25))
    ehr = dict(encoder=dict(hidden=8, dim=8, pool='mean'), views=dict(random=1, focal=1, focal_window=[.5, .8]))
    return toy_config(cxr=cxr, ehr=ehr, head=dict(hidden=8, depth=1, output=4, norm='batch'), loss=dict(prototypes=4), fusion=dict(dim=8), optim=dict(batch_size=16, epochs=epochs),
                      data=dict(cohort=str(cohort.folder)), train=dict(run=str(run), threads=0) | train)


def last(run): return load_file(sorted((run/'checkpoints').glob('step-*'))[-1]/'model.safetensors')


def test_a_trial_leaves_nothing_behind(cohort, tmp_path, chosen):
    "With batch normalisation, whose statistics move with each forward: the run ends bit for bit as one that tried nothing."
    for name, words in (('tried', {}), ('told', dict(threads=1))):
        trainer = Trainer(config(cohort, tmp_path/name, **words), cohort)
        assert trainer.total >= 100
        trainer.fit()
        if name == 'tried': assert {1, 2} <= set(chosen[:-1]) and len(chosen) > 4
    a, b = last(tmp_path/'tried'), last(tmp_path/'told')
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) and any('running_mean' in k for k in a)
    assert json.loads((tmp_path/'tried'/'run.json').read_text())['threads'] in (1, 2)


def test_the_quickest_is_taken_and_kept(cohort, tmp_path, chosen, monkeypatch):
    "One of two threads because that is quicker; the run resumes with it when two would be, and with one core where there is no second."
    monkeypatch.setattr(processes, 'quickest', lambda step, numbers: (1, dict.fromkeys(numbers, 1.)))
    trainer = Trainer(config(cohort, tmp_path/'run', epochs=100), cohort)
    trainer.total = 100
    trainer.fit()
    assert chosen[-1] == 1 and json.loads((tmp_path/'run'/'run.json').read_text())['threads'] == 1
    monkeypatch.setattr(processes, 'quickest', lambda step, numbers: (2, dict.fromkeys(numbers, 1.)))
    again = Trainer(config(cohort, tmp_path/'run', epochs=100), cohort)
    again.total = 102
    again.fit()
    assert again.step == 102 and chosen[-1] == 1


@pytest.mark.parametrize('epochs,busy,expected', [(1, 0., 2), (1, 2., 1), (1, .1, 2)])
def test_a_short_run_takes_what_others_leave(cohort, tmp_path, chosen, monkeypatch, epochs, busy, expected):
    monkeypatch.setattr(processes, 'others', lambda: busy)
    Trainer(config(cohort, tmp_path/'run', epochs=epochs), cohort).fit()
    assert chosen == [expected]


@pytest.mark.parametrize('words,environment', [(dict(threads=1), {}), ({}, dict(OMP_NUM_THREADS='1'))])
def test_who_has_decided_is_left_alone(cohort, tmp_path, chosen, monkeypatch, words, environment):
    monkeypatch.setattr(processes, 'others', lambda: pytest.fail('it looked'))
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    Trainer(config(cohort, tmp_path/'run', epochs=1, **words), cohort).fit()
    assert set(chosen) <= {1}


def test_a_run_of_an_older_version_keeps_what_torch_takes(cohort, tmp_path, chosen, monkeypatch):
    "It recorded no number."
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 5)
    Trainer(config(cohort, tmp_path/'run', epochs=1, threads=1), cohort).fit()
    path = tmp_path/'run'/'run.json'
    about = {k: v for k, v in json.loads(path.read_text()).items() if k not in ('threads', 'seal')}
    path.write_text(json.dumps(about))
    with pytest.warns(UserWarning, match='optim.epochs changed'): again = Trainer(config(cohort, tmp_path/'run', epochs=2), cohort)
    again.fit()
    assert chosen[-1] == 5


def test_importing_changes_no_environment():
    "Only a command tells OpenMP how to wait; with what the user has said it does not, nor too late."
    code = """import os, sys
before = dict(os.environ)
import mmsn, mmsn.threads, mmsn.model
assert dict(os.environ) == before
assert not mmsn.threads.wait_asleep(busy=9) and dict(os.environ) == before      # torch is there
del sys.modules['torch']
os.getloadavg = lambda: (9., 9., 9.)                                            # of commands that have ended
alone = {}
assert not mmsn.threads.wait_asleep(alone, busy=0.) and alone == {'GOMP_SPINCOUNT': '10000'}
mmsn.threads.others, alone = lambda seconds: 0., {}
assert not mmsn.threads.wait_asleep(alone) and alone == {'GOMP_SPINCOUNT': '10000'}
assert mmsn.threads.wait_asleep(busy=9) and os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'
os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'
assert not mmsn.threads.wait_asleep(busy=9) and os.environ['OMP_WAIT_POLICY'] == 'ACTIVE'
os._exit(7)"""
    environment = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'KMP_BLOCKTIME', 'GOMP_SPINCOUNT')}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 7, done.stderr
