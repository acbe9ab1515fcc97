"The loop from outside: runs, resumes, is killed, runs on two processes, and says what is wrong in one line."
import errno, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SMALL, one_line, refused, run
from forks import Command
from mmsn.checkpoint import checkpoints, latest, read_state, save_checkpoint
from mmsn.options import InputError
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
    assert {p.name for p in whole.iterdir()} == {'config.yaml', 'run.json', 'pretrained_on.csv', 'metrics.jsonl', 'metrics.csv', 'checkpoints', 'encoder'}
    rows = curve(whole)
    assert list(rows.step) == list(range(1, len(rows) + 1)) and rows.notna().all().all()


def test_terminated_run_resumes_exactly(cohort, whole, tmp_path):
    "SIGTERM in the middle: exit code 0, and the same command ends where the uninterrupted run did."
    folder = tmp_path/'killed'
    process = Command('mmsn.train', *words(cohort, folder, 'optim.epochs=6'), stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not ((folder/'metrics.jsonl').exists() and len((folder/'metrics.jsonl').read_text().splitlines()) >= 3): time.sleep(.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    stopped = json.loads((last(folder)/'state.json').read_text())
    assert 0 < stopped['step'] <= stopped['total']
    train(cohort, folder, 'optim.epochs=6', 'data.workers=1')
    same(folder, whole)
    pd.testing.assert_frame_equal(curve(folder), curve(whole), check_exact=True)


@pytest.mark.parametrize('encoder', ['{name: lstm, pool: [mean, last], inputs: [since]}', '{name: axial, hidden: 8, heads: 2, layers: 1, pool: [last]}'])
def test_cells_resume_exactly(cohort, tmp_path, encoder):
    "A run with terms on cells and probes on validation, left in mid-epoch and resumed, ends as one that was not."
    from mmsn.config import load_config
    from mmsn.loop import Trainer
    kinds = '[value,latent]' if 'axial' in encoder else '[forecast,value,latent]'
    terms = ['loss.weight=0.5', 'loss.cells.weight=1', f'loss.cells.kind={kinds}', 'modalities.ehr.views.random_masks.cell=0.3', 'train.probe_every=2']
    for name, until in (('whole', None), ('left', 3), ('left', None)):
        trainer = Trainer(load_config('demo', words(cohort, tmp_path/name, 'optim.epochs=2', f'modalities.ehr.encoder={encoder}', *terms)[1:]))
        if until: trainer.total = until
        trainer.fit()
    same(tmp_path/'left', tmp_path/'whole')
    assert any(k.startswith('auxiliary.cells') for k in load_file(last(tmp_path/'whole')/'model.safetensors'))
    assert curve(tmp_path/'whole')['cells/loss'].notna().all()


@pytest.mark.parametrize('loss', ['sigmoid', 'infonce'])
def test_contrast_resumes_exactly(cohort, tmp_path, loss):
    "A run with a contrast, left in mid-epoch and resumed, ends as one that was not: heads, scale and intercept too."
    from mmsn.config import load_config
    from mmsn.loop import Trainer
    for name, until in (('whole', None), ('left', 3), ('left', None)):
        trainer = Trainer(load_config('demo', words(cohort, tmp_path/name, 'optim.epochs=2', 'fusion.contrast.weight=0.5', f'fusion.contrast.loss={loss}')[1:]))
        if until: trainer.total = until
        trainer.fit()
    same(tmp_path/'left', tmp_path/'whole')
    pd.testing.assert_frame_equal(curve(tmp_path/'left'), curve(tmp_path/'whole'), check_exact=True)
    assert curve(tmp_path/'whole')['contrast/pair_accuracy'].between(0, 1).all()


def test_killed_without_warning(cohort, whole, tmp_path):
    "SIGKILL between checkpoints: the run resumes from the last one and ends the same."
    folder = tmp_path/'killed'
    process = Command('mmsn.train', *words(cohort, folder, 'optim.epochs=6', 'train.checkpoint_every=2'), stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not list(folder.glob('checkpoints/step-*')): time.sleep(.01)
    process.kill(); process.wait()
    train(cohort, folder, 'optim.epochs=6')
    same(folder, whole)


def test_two_processes(cohort, tmp_path):
    "`accelerate launch` on two CPU processes trains the same code; the two hold the same weights by construction of DDP."
    folder = tmp_path/'two'
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--num_processes', '2', '--cpu', '-m', 'mmsn.train', 'demo', f'data.cohort={cohort}',
                           f'train.run={folder}', *SMALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder/'run.json').read_text())['processes'] == 2
    samples = len(Cohort.open(cohort).rows('train', ['cxr', 'ehr']))
    assert len(curve(folder)) == 2*(samples//32), 'two epochs of whole global batches of 2 x 16'


@pytest.mark.parametrize('change,says', [
    (['optim.learning_rate=1'], "did you mean"), (['optim.lr=fast'], 'should be float'), (['data.cohort=nowhere'], 'nowhere'),
    (['loss.temprature=0.2'], "did you mean 'temperature'"), (['optim.batch_size=4000'], 'lower optim.batch_size'), (['head.norm=bach'], "did you mean 'batch'"),
    (['modalities.ct={kind: image}'], "'ct'"), (['lr'], 'key=value'), (['modalities.cxr.kind=timeseries'], 'encoder.depth')])
def test_wrong_input(cohort, tmp_path, capsys, change, says):
    "One clear line, exit code 2, and nothing written."
    line = refused(main, words(cohort, tmp_path/'run', *change), capsys)
    assert says in line, line
    assert not (tmp_path/'run').exists()


def test_missing_config_in_a_process_of_its_own(tmp_path): assert 'preset' in one_line(run('mmsn.train', tmp_path/'none.yaml', code=2, fork=False))


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
    done = train(cohort, folder, 'optim.epochs=40', 'optim.start_lr=1000', 'optim.lr=1000', 'optim.weight_decay=1000', 'optim.clip=0', 'train.checkpoint_every=1', code=1)
    assert 'not finite' in one_line(done) and 'step' in one_line(done)
    saved = list(folder.glob('checkpoints/step-*'))
    assert saved
    for checkpoint in saved: assert all(w.isfinite().all() for w in load_file(checkpoint/'model.safetensors').values())


def test_loose_ends_of_a_start(cohort, tmp_path):
    "Killed before the last file of a start was there: as good as empty. Killed before the first checkpoint: begun again."
    folder = tmp_path/'run'; folder.mkdir()
    (folder/'run.json').write_text('{"cohort": "ha'); (folder/'.config.yaml.tmp').write_text('name: ha')
    main(words(cohort, folder, 'optim.epochs=1'))
    shutil.rmtree(folder/'checkpoints'); shutil.rmtree(folder/'encoder')
    before = curve(folder)
    main(words(cohort, folder, 'optim.epochs=1'))
    pd.testing.assert_frame_equal(curve(folder), before, check_exact=True)


def test_keeps_the_best(cohort, tmp_path, capsys):
    folder = tmp_path/'run'
    main(words(cohort, folder, 'train.checkpoint_every=2', 'train.keep_last=1', 'train.keep_every=4', 'train.keep_best=gradient_norm'))
    rows = curve(folder)
    steps = [read_state(p)['step'] for p in checkpoints(folder/'checkpoints')]
    mean = {s: rows.gradient_norm[(rows.step > s - 2) & (rows.step <= s)].mean() for s in [*range(2, len(rows), 2), len(rows)]}
    assert steps == sorted({min(mean, key=mean.get), len(rows), *range(4, len(rows) + 1, 4)})
    assert "no metric 'los'" in refused(main, words(cohort, tmp_path/'other', 'train.keep_best=los'), capsys)


def test_kills():
    "The short form of `tests/kill_and_resume.py --kills 25`."
    done = subprocess.run([sys.executable, Path(__file__).with_name('kill_and_resume.py'), '--kills', '3'], capture_output=True, text=True)
    assert done.returncode == 0 and 'kills survived: 3 of 3' in done.stdout, done.stdout + done.stderr


# Twenty steps, written down, from weights that are stored too, because versions of torch draw other numbers from one seed (trunc_normal_ of 2.9 and 2.14).
# On one machine the curve is equal to the last bit; between processors and versions of torch sums are made in another order,
# so only four digits are promised. A change of the method changes the file: MMSN_GOLDEN=write python -m pytest tests/test_train.py -k golden
# A change of the architecture changes the weights as well: MMSN_GOLDEN=weights stores newly drawn ones and their curve.

def begin_from(path):
    "`MMSN.from_config`, whose model then has the weights of the file at `path`; the target begins as the copy of what is trained."
    from mmsn.model import MMSN
    drawn = MMSN.from_config
    def from_config(config, cohort):
        model = drawn(config, cohort)
        if os.environ.get('MMSN_GOLDEN') == 'weights': save_file({k: v for k, v in model.state_dict().items() if not k.startswith('target')}, path)
        weights = load_file(path)
        target = {f'target.{k[7:]}' if k.startswith('online.') else f'target_{k}': v for k, v in weights.items() if k.startswith(('online.', 'head.'))}
        model.load_state_dict(weights | target)
        return model
    return from_config


def test_golden_curve(tmp_path, monkeypatch):
    from mmsn.testing import toy_cohort
    folder, golden = toy_cohort(tmp_path/'cohort', n=240).folder, Path(__file__).with_name('golden.txt')
    monkeypatch.setattr('mmsn.model.MMSN.from_config', begin_from(golden.parent/'files'/'golden.safetensors'))
    main([str(golden.with_suffix('.yaml')), f'data.cohort={folder}', f'train.run={tmp_path/"run"}'])
    names = ['loss', 'joint/cross_entropy', 'cxr/cross_entropy', 'ehr/cross_entropy', 'joint/me_max', 'gradient_norm']
    rows = curve(tmp_path/'run')
    lines = [' '.join(['step', *names]), *(' '.join([f'{r.step}', *(f'{r[n]:.6f}' for n in names)]) for _, r in rows.astype({'step': object}).iterrows())]
    assert len(lines) == 21
    if os.environ.get('MMSN_GOLDEN') in ('write', 'weights'): golden.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    wanted = golden.read_text(encoding='utf-8').splitlines()
    assert wanted[0] == lines[0]
    np.testing.assert_allclose(np.array([x.split() for x in lines[1:]], float), np.array([x.split() for x in wanted[1:]], float), rtol=1e-4, atol=1e-6)


# Faults. What happens to a checkpoint, and what is said; the one before it must be what a run resumes from

def two(folder, n=2000):
    "Checkpoints of steps 1 and 2 of a few kilobytes, as bytes by file name of the second."
    for step in (1, 2): save_checkpoint(folder, step, dict(model={'w': torch.randn(n)}, optimizer={'m': torch.randn(n)}), dict(seed=step))
    return {p.name: p.read_bytes() for p in (folder/'step-00000002').iterdir()}


def passed_over(folder):
    "What is said about the second checkpoint; the first must load."
    said = []
    assert latest(folder, said.append)[1]['step'] == 1
    assert len(said) == 1 and '\n' not in said[0] and 'step-00000002' in said[0]
    return said[0]


def test_a_bit_flipped_anywhere_is_found(tmp_path):
    files, faults = two(tmp_path), 0
    for name, data in files.items():
        for at in range(0, len(data), 16 if name != 'state.json' else 1):
            (tmp_path/'step-00000002'/name).write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
            passed_over(tmp_path); faults += 1
        (tmp_path/'step-00000002'/name).write_bytes(data)
    print(f'\n{faults} bits flipped, {faults} refused')
    assert latest(tmp_path)[1]['step'] == 2 and faults > 1000


def test_a_checkpoint_cut_at_every_kilobyte_is_found(tmp_path):
    files, faults = two(tmp_path, 20_000), 0
    for name, data in files.items():
        for size in [*range(0, len(data), 1024), len(data) - 1]:
            (tmp_path/'step-00000002'/name).write_bytes(data[:size])
            passed_over(tmp_path); faults += 1
        (tmp_path/'step-00000002'/name).unlink()
        passed_over(tmp_path); faults += 1
        (tmp_path/'step-00000002'/name).write_bytes(data)
    print(f'\n{faults} cuts, {faults} refused')
    assert latest(tmp_path)[1]['step'] == 2 and faults > 150


class Touch:
    "A pickle that makes a folder when it is opened."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def test_a_pickle_does_not_run_even_if_the_manifest_vouches_for_it(cohort, whole, tmp_path, capsys):
    "A real run whose newest checkpoint was forged with all hashes right: nothing is touched, the one before is used, and it is said."
    from mmsn.checkpoint import _sealed, sha256
    folder = tmp_path/'run'; shutil.copytree(whole, folder)
    tensors, state = latest(folder/'checkpoints')
    shutil.rmtree(folder/'checkpoints')
    for step in (2, 3): save_checkpoint(folder/'checkpoints', step, tensors, {k: v for k, v in state.items() if k not in ('files', 'sha256')})
    forged = folder/'checkpoints'/'step-00000003'
    torch.save(Touch(tmp_path/'touched'), forged/'model.safetensors'); torch.save(Touch(tmp_path/'touched'), folder/'checkpoints'/'outside.safetensors')
    body = {k: v for k, v in read_state(forged).items() if k != 'sha256'}
    for name in ('model.safetensors', '../outside.safetensors', '/etc/passwd', 'model.pt'):
        digest = sha256(forged/name) if name.endswith('.safetensors') else '0'
        (forged/'state.json').write_text(_sealed(dict(body, files=dict(body['files'], **{name: digest}))))
        said = []
        assert latest(folder/'checkpoints', said.append)[1]['step'] == 2 and said
    assert not (tmp_path/'touched').exists()
    main(words(cohort, folder, 'optim.epochs=6'))
    seen = capsys.readouterr()
    assert 'passing over' in seen.out + seen.err and 'resuming from step 2' in seen.out
    assert not (tmp_path/'touched').exists()


def test_a_checkpoint_of_another_run_is_passed_over(cohort, whole, tmp_path, capsys):
    folder = tmp_path/'run'
    main(words(cohort, folder, 'optim.epochs=1', 'loss.temperature=0.2'))
    shutil.copytree(last(whole), folder/'checkpoints'/last(whole).name)
    capsys.readouterr()
    main(words(cohort, folder, 'optim.epochs=1', 'loss.temperature=0.2'))
    seen = capsys.readouterr()
    assert 'is of another run' in seen.out + seen.err


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 1 MB, where one may be mounted."
    folder = tmp_path/'disk'; folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], capture_output=True).returncode: pytest.skip('a small tmpfs cannot be mounted here')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


def test_full_disk(small_disk):
    "A disk that is really full: one line, nothing half-written stays, the last good one loads; with room again, the same call succeeds."
    tensors = dict(model={'w': torch.randn(100_000)})                         # 400 kB: two fit, a third does not
    for step in (1, 2): save_checkpoint(small_disk, step, tensors, {}, keep_last=2)
    with pytest.raises(InputError, match='No space left on device.*last good one is step-00000002') as e: save_checkpoint(small_disk, 3, tensors, {}, keep_last=2)
    assert '\n' not in str(e.value)
    assert sorted(p.name for p in small_disk.iterdir()) == ['step-00000001', 'step-00000002'] and latest(small_disk)[1]['step'] == 2
    shutil.rmtree(small_disk/'step-00000001')
    save_checkpoint(small_disk, 3, tensors, {}, keep_last=2)
    assert latest(small_disk)[1]['step'] == 3


def test_read_only_disk(small_disk):
    "Remounted read-only: the mode bits would not stop root, this does."
    save_checkpoint(small_disk, 1, dict(model={'w': torch.randn(10)}), {})
    if subprocess.run(['mount', '-o', 'remount,ro', small_disk], capture_output=True).returncode: pytest.skip('cannot be remounted')
    with pytest.raises(InputError, match='Read-only file system.*last good one is step-00000001'): save_checkpoint(small_disk, 2, dict(model={'w': torch.randn(10)}), {})
    assert latest(small_disk)[1]['step'] == 1


@pytest.mark.parametrize('call', ['mkdir', 'fsync', 'rename', 'write_text'])
def test_a_write_that_fails_leaves_the_last_good_one(tmp_path, monkeypatch, call):
    "Every kind of call that writes, made to fail."
    two(tmp_path)
    def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os if call == 'fsync' else Path, call, full)
    with pytest.raises(InputError, match='No space left on device.*last good one is step-00000002'): save_checkpoint(tmp_path, 3, dict(model={'w': torch.zeros(3)}), {})
    monkeypatch.undo()
    assert latest(tmp_path)[1]['step'] == 2 and not list(tmp_path.glob('.step*'))


def test_a_run_on_a_full_disk_says_so_in_one_line(cohort, small_disk, capsys):
    "The whole command: it stops with one line, and what was saved loads."
    run = small_disk/'run'
    line = refused(main, words(cohort, run, 'optim.epochs=20', 'train.checkpoint_every=1', 'train.keep_last=50'), capsys)
    assert 'No space left' in line
    assert latest(run/'checkpoints')[1]['step'] > 0


def test_a_run_where_a_file_stands(cohort, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    assert 'file is a file' in refused(main, words(cohort, tmp_path/'file'/'run'), capsys)
    assert 'not a run' in refused(main, words(cohort, tmp_path/'file'), capsys)


def test_terms_on_hidden_patches_resume_exactly(cohort, tmp_path):
    "A heavy view and the term on hidden patches: from the first checkpoint on, a resumed run is the one that was never stopped, bit for bit."
    terms = ['modalities.cxr.views.heavy=1', 'modalities.cxr.encoder.mask_stem=true', 'loss.tokens.weight=0.5', 'optim.epochs=2', 'train.checkpoint_every=2', 'train.keep_last=99']
    train(cohort, tmp_path/'whole', *terms)
    shutil.copytree(tmp_path/'whole', tmp_path/'resumed')
    first, *later = sorted((tmp_path/'resumed'/'checkpoints').glob('step-*'))
    assert later
    for folder in later: shutil.rmtree(folder)
    train(cohort, tmp_path/'resumed', *terms)
    same(tmp_path/'whole', tmp_path/'resumed')
    assert 'tokens/loss' in curve(tmp_path/'whole') and any(k.startswith('auxiliary.tokens') for k in load_file(last(tmp_path/'whole')/'model.safetensors'))
    pd.testing.assert_frame_equal(curve(tmp_path/'whole'), curve(tmp_path/'resumed'), check_exact=True)
