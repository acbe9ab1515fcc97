"The loop from outside: runs, resumes, is killed, runs on two processes, and says what is wrong in one line."
import json, shutil, signal, subprocess, sys, time

import pandas as pd
import pytest
from safetensors.torch import load_file

from conftest import SMALL, one_line, refused, run
from mmsn.data.cohort import Cohort
from mmsn.train import main


def words(cohort, folder, *more): return ['demo', f'data.cohort={cohort}', f'train.run={folder}', *SMALL, *more]


def train(cohort, folder, *more, **kwargs): return run('mmsn.train', *words(cohort, folder, *more), **kwargs)


def last(folder): return sorted((folder/'checkpoints').glob('step-*'))[-1]


def same(a, b):
    "Every tensor of two checkpoints is equal bit for bit."
    for name in ('model.safetensors', 'optimizer.safetensors'):
        x, y = load_file(last(a)/name), load_file(last(b)/name)
        assert x.keys() == y.keys()
        assert all(x[k].equal(y[k]) for k in x), [k for k in x if not x[k].equal(y[k])]


@pytest.fixture(scope='module')
def whole(cohort, tmp_path_factory):
    "A run that nothing interrupts."
    folder = tmp_path_factory.mktemp('runs')/'whole'
    train(cohort, folder, 'optim.epochs=6')
    return folder


def curve(folder): return pd.read_csv(folder/'metrics.csv').drop(columns=['samples_per_s', 'memory_gb'])


def test_run_folder(whole):
    assert {p.name for p in whole.iterdir()} == {'config.yaml', 'run.json', 'metrics.jsonl', 'metrics.csv', 'checkpoints', 'encoder'}
    rows = curve(whole)
    assert list(rows.step) == list(range(1, len(rows) + 1)) and rows.notna().all().all()


def test_terminated_run_goes_on_exactly(cohort, whole, tmp_path):
    "SIGTERM in the middle: exit code 0, and the same command ends where the uninterrupted run did."
    folder = tmp_path/'killed'
    command = [sys.executable, '-m', 'mmsn.train', 'demo', f'data.cohort={cohort}', f'train.run={folder}', *SMALL, 'optim.epochs=6']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not ((folder/'metrics.jsonl').exists() and len((folder/'metrics.jsonl').read_text().splitlines()) >= 3): time.sleep(.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    stopped = json.loads((last(folder)/'state.json').read_text())
    assert 0 < stopped['step'] <= stopped['total']
    train(cohort, folder, 'optim.epochs=6', 'data.workers=1')
    same(folder, whole)
    pd.testing.assert_frame_equal(curve(folder), curve(whole), check_exact=True)


def test_killed_without_warning(cohort, whole, tmp_path):
    "SIGKILL between checkpoints: the run goes on from the last one and ends the same."
    folder = tmp_path/'killed'
    command = [sys.executable, '-m', 'mmsn.train', 'demo', f'data.cohort={cohort}', f'train.run={folder}', *SMALL, 'optim.epochs=6', 'train.checkpoint_every=2']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not list(folder.glob('checkpoints/step-*')): time.sleep(.01)
    process.kill(); process.wait()
    train(cohort, folder, 'optim.epochs=6')
    same(folder, whole)


def test_two_processes(cohort, tmp_path, capsys):
    "`accelerate launch` on two CPU processes trains the same code; the two hold the same weights by construction of DDP."
    folder = tmp_path/'two'
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--num_processes', '2', '--cpu', '-m', 'mmsn.train', 'demo', f'data.cohort={cohort}',
                           f'train.run={folder}', *SMALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder/'run.json').read_text())['processes'] == 2
    samples = len(Cohort.open(cohort).rows('train', ['cxr', 'ehr']))
    assert len(curve(folder)) == 2*(samples//32), 'two epochs of whole global batches of 2 x 16'
    assert 'processes' in refused(main, words(cohort, folder), capsys)


@pytest.mark.parametrize('change,says', [
    (['optim.learning_rate=1'], "did you mean"), (['optim.lr=fast'], 'should be float'), (['data.cohort=nowhere'], 'nowhere'),
    (['loss.temprature=0.2'], "did you mean 'temperature'"), (['optim.batch_size=4000'], 'lower optim.batch_size'), (['head.norm=bach'], "did you mean 'batch'"),
    (['modalities.ct={kind: image}'], "'ct'"), (['lr'], 'key=value'), (['modalities.cxr.kind=timeseries'], 'encoder.depth')])
def test_wrong_input(cohort, tmp_path, capsys, change, says):
    "One clear line, exit code 2, and nothing written."
    line = refused(main, words(cohort, tmp_path/'run', *change), capsys)
    assert says in line, line
    assert not (tmp_path/'run').exists()


def test_missing_config_in_a_process_of_its_own(tmp_path): assert 'preset' in one_line(run('mmsn.train', tmp_path/'none.yaml', code=2))


def test_resume_refuses_other_values(cohort, whole, tmp_path, capsys):
    folder = tmp_path/'copy'; shutil.copytree(whole, folder)
    assert 'optim.lr' in refused(main, words(cohort, folder, 'optim.epochs=6', 'optim.lr=0.1'), capsys)
    assert 'train.resume' in refused(main, words(cohort, folder, 'optim.epochs=6', 'train.resume=never'), capsys)


def test_folder_that_is_not_a_run(cohort, tmp_path, capsys):
    (tmp_path/'precious.txt').write_text('mine')
    assert 'not a run' in refused(main, words(cohort, tmp_path), capsys)
    assert [p.name for p in tmp_path.iterdir()] == ['precious.txt']


def test_non_finite_stops_before_the_step(cohort, tmp_path):
    "An absurd learning rate: the run stops with one line, exit code 1, and what was saved before it loads."
    folder = tmp_path/'nan'
    done = train(cohort, folder, 'optim.epochs=20', 'optim.start_lr=1e30', 'optim.lr=1e30', 'optim.clip=0', 'train.checkpoint_every=1', code=1)
    assert 'not finite' in one_line(done) and 'step' in one_line(done)
    saved = list(folder.glob('checkpoints/step-*'))
    assert saved
    for checkpoint in saved: assert all(w.isfinite().all() for w in load_file(checkpoint/'model.safetensors').values())
