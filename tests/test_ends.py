"How commands end when they are told to, when a process of theirs is killed, and when the disk is not as it should be: one line, an exit code, and nothing half-written."
import contextlib, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, SMALL, refused, run
from forks import Command
from mmsn.checkpoint import latest
from mmsn.commands import check_writable
from mmsn.options import InputError

ENV = {k: v for k, v in os.environ.items() if not k.startswith(('ACCELERATE', 'MASTER'))} | dict(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')


def start(*command, **kwargs):
    "A command in a session of its own, so that a signal can go to all of its processes, as a terminal's does."
    return Command(*command, env=ENV, **kwargs)


def end(process, seconds=90):
    "(exit code, standard output, lines of standard error without the progress bar) of a command that is ending."
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError('it does not end:\n' + '\n'.join(process.communicate()))
    return process.returncode, out, [line for line in re.split(r'[\r\n]+', err) if line.strip() and not re.search(r': [\d,]+ of [\d,]+ (steps|patients)', line) and 'step/s' not in line and 's/step' not in line and '?step' not in line]


def wait(until, process, seconds=120):
    "Until something is true of a running command."
    deadline = time.time() + seconds
    while not until():
        assert process.poll() is None, '\n'.join(process.communicate())
        assert time.time() < deadline, 'it took too long'
        time.sleep(.02)


def rows(folder): return (folder/'metrics.jsonl').read_text().count('\n') if (folder/'metrics.jsonl').exists() else 0


@pytest.fixture(scope='module')
def words(cohort): return ['demo', f'data.cohort={cohort}', *SMALL, 'optim.epochs=10000']


def said(lines, beginning):
    "The one line that a command said as it ended; no traceback anywhere."
    assert not any('Traceback' in line for line in lines) and [line for line in lines if line.startswith('mmsn: ')] == lines[-1:] and lines[-1].startswith(f'mmsn: {beginning}'), lines
    return lines[-1]


# Ctrl-C and SIGTERM

@pytest.mark.parametrize('workers,whole_group', [(0, False), (2, True)])
def test_ctrl_c_saves(words, tmp_path, workers, whole_group):
    "One Ctrl-C, to the process or from a terminal to it and its readers: the step is finished, saved, and said in one line with exit code 130."
    folder = tmp_path/'run'
    process = start('mmsn.train', *words, f'train.run={folder}', f'data.workers={workers}')
    wait(lambda: rows(folder) > 2, process)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    code, out, lines = end(process)
    line = said(lines, 'interrupted: stopped at step ')
    assert code == 130 and 'is saved; the same command resumes' in line
    _, state = latest(folder/'checkpoints')
    assert f'step {state["step"]} of' in line and state['step'] == rows(folder) and (folder/'encoder'/'config.json').is_file() and not (folder/'.lock').exists()


def test_sigterm_to_all_processes_saves(words, tmp_path):
    "As a scheduler sends it, to the run and its readers."
    folder = tmp_path/'run'
    process = start('mmsn.train', *words, f'train.run={folder}', 'data.workers=2')
    wait(lambda: rows(folder) > 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, out, lines = end(process)
    assert code == 0 and 'stopped at step' in out and not any('Traceback' in line for line in lines), lines
    assert latest(folder/'checkpoints')[1]['step'] == rows(folder)


def test_second_ctrl_c_ends_at_once(words, tmp_path):
    "It does not wait for the end of a step, here a step that lasts for ever."
    folder = tmp_path/'run'
    stuck = "import time; from mmsn import loop; take = loop.Trainer.take; loop.Trainer.take = lambda self, b: take(self, b) if self.step < 3 else [time.sleep(.1) for _ in range(10**6)]"
    process = start('mmsn.train', *words, f'train.run={folder}', 'train.checkpoint_every=1', before=stuck)
    wait(lambda: rows(folder) > 2, process)
    time.sleep(.5)
    process.send_signal(signal.SIGINT)
    time.sleep(.5)
    assert process.poll() is None
    began = time.time()
    process.send_signal(signal.SIGINT)
    code, out, lines = end(process, 10)
    assert code == -signal.SIGINT and time.time() - began < 5 and said(lines, 'interrupted twice')
    assert latest(folder/'checkpoints')[1]['step'] == 3


@pytest.mark.parametrize('number,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_loop(words, tmp_path, number, code):
    "While libraries are imported, and while the model is built: one line, no traceback, nothing written."
    importing = "import sys, time\nimport builtins; real = builtins.__import__\ndef slow(name, *a, **k):\n    if name == 'accelerate': print('now', flush=True); time.sleep(60)\n    return real(name, *a, **k)\nbuiltins.__import__ = slow\nfrom mmsn.train import main\nmain(sys.argv[1:])"
    building = "import time\nfrom mmsn.model import MMSN\ndef slow(*a): print('now', flush=True); time.sleep(60)\nMMSN.from_config = slow"
    options = [*words, f'train.run={tmp_path/"run"}']
    starts = dict(importing=lambda: subprocess.Popen([sys.executable, '-c', importing, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV, start_new_session=True),
                  building=lambda: start('mmsn.train', *options, before=building))
    for name in starts:
        process = starts[name]()
        assert process.stdout.readline() == 'now\n', name
        process.send_signal(number)
        found, _, lines = end(process, 20)
        assert found == code and said(lines, 'ended by SIGTERM' if number == signal.SIGTERM else 'interrupted'), name
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_prepare_leaves_nothing(tmp_path, number, code):
    "Whatever it is at, and whoever of its processes hears it."
    for i, until in enumerate(('drawing', 'writing', 'reading', '.')):
        process = start('mmsn.prepare', 'synthetic', tmp_path/'out', '--patients', 400 if i else 3000)
        seen = ''
        while until not in seen or len(seen.splitlines()) < i + 1: seen += process.stdout.readline()
        time.sleep(.3*i)
        os.killpg(process.pid, number) if i % 2 else process.send_signal(number)
        found, _, lines = end(process)
        assert found == code and said(lines, 'ended by SIGTERM' if number == signal.SIGTERM else 'interrupted'), (until, lines)
        assert [p.name for p in tmp_path.iterdir() if not p.name.endswith('work')] == [], until


@pytest.fixture(scope='module')
def trained(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')/'run'
    run('mmsn.train', 'demo', f'data.cohort={cohort}', *SMALL, f'train.run={folder}', 'optim.epochs=1')
    return folder


FEW = ['protocols=[low_shot]', 'baselines=false', 'pictures=false', 'draws=1', 'bootstrap=5', 'fractions=[1.0]', 'shots=[2]']


@pytest.mark.parametrize('number,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_evaluate_leaves_nothing(trained, tmp_path, number, code):
    "While it computes, and while the report's notebook runs in a process of its own."
    run_folder = tmp_path/'run'; shutil.copytree(trained, run_folder)
    before = sorted(p.name for p in run_folder.iterdir())
    for stage in ('computing', 'report'):
        process = start('mmsn.evaluate', run_folder, *FEW)
        held = []
        if stage == 'report':
            wait(lambda: (run_folder/'.report.tmp'/'about.json').exists() and held.extend(psutil.Process(process.pid).children(recursive=True)) or held, process)
            for p in held:               # or a slow machine sees the report whole before the signal arrives
                with contextlib.suppress(psutil.NoSuchProcess): p.suspend()
        else: wait(lambda: (run_folder/'.report.tmp').exists(), process)
        time.sleep(.2)
        (os.killpg if stage == 'report' else os.kill)(process.pid, number)
        for p in held:
            with contextlib.suppress(psutil.NoSuchProcess): p.resume()
        found, _, lines = end(process)
        assert found == code and said(lines, 'ended by SIGTERM' if number == signal.SIGTERM else 'interrupted'), (stage, lines)
        assert sorted(p.name for p in run_folder.iterdir() if p.name not in ('features', 'report-parts')) == before


# Several processes

def children(process, seconds=90, n=2):
    "The processes that a launcher started."
    def found(): return [p for p in psutil.Process(process.pid).children(recursive=True) if 'mmsn.train' in ' '.join(p.cmdline())]
    wait(lambda: len(found()) >= n, process, seconds)
    return found()


def launch(kind, words, folder):
    "A run on two processes, past its first steps; the launcher and its processes."
    own = f"from mmsn.train import start_processes; start_processes(2, {[*words, f'train.run={folder}']!r})"
    port = 20_000 + os.getpid() % 9000
    command = dict(own=['-c', own], torchrun=['-m', 'torch.distributed.run', '--nproc_per_node', 2, '--master_port', port, '-m', 'mmsn.train', *words, f'train.run={folder}'],
                   accelerate=['-m', 'accelerate.commands.launch', '--num_processes', 2, '--cpu', '--main_process_port', port, '-m', 'mmsn.train', *words, f'train.run={folder}'])[kind]
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENV, cwd=ROOT)
    wait(lambda: rows(folder) > 2, process, 180)
    return process, children(process)


def gone(processes, seconds):
    "Seconds until all have ended; they are killed if it takes too long."
    began = time.time()
    _, alive = psutil.wait_procs(processes, seconds)
    for p in alive: p.kill()
    assert not alive, f'{len(alive)} of {len(processes)} still train after {seconds} s'
    return time.time() - began


@pytest.mark.parametrize('kind', ['own', 'torchrun'])
@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_process_ends_the_others(words, tmp_path, kind, rank):
    "Killed as the system does when memory runs out: the other says so in one line and ends, within a bounded time; the run resumes."
    folder = tmp_path/'run'
    process, ranks = launch(kind, [*words, 'train.checkpoint_every=2'], folder)
    victim = next(p for p in ranks if p.environ().get('RANK') == str(rank))
    victim.kill()
    gone(ranks, 45)
    code, out, lines = end(process, 60)
    ours = [line for line in lines if line.startswith('mmsn: ')]
    assert code and len(ours) == 1 and ('another process of this run has ended' in ours[0] or kind == 'torchrun' and 'ended by SIGTERM' in ours[0]), (code, lines)      # torchrun sends SIGTERM too
    assert kind == 'torchrun' or not any('Traceback' in line for line in lines), lines
    assert latest(folder/'checkpoints')[1]['step'] > 0


@pytest.mark.parametrize('kind', ['own', 'torchrun', 'accelerate'])
def test_no_orphans(words, tmp_path, kind):
    "The launcher is killed: what it launched finishes its step, saves and ends."
    folder = tmp_path/'run'
    process, ranks = launch(kind, words, folder)
    process.kill()
    seconds = gone(ranks, 45)
    code, out, lines = end(process)
    assert not any('Traceback' in line for line in lines), lines
    assert any('launched this run has ended' in line or 'stopped at step' in line for line in [*lines, *out.splitlines()])
    assert latest(folder/'checkpoints')[1]['step'] == rows(folder)
    print(f'{kind}: {seconds:.1f} s')


@pytest.mark.parametrize('kind', ['own', 'torchrun'])
def test_ctrl_c_in_a_terminal(words, tmp_path, kind):
    "It reaches the launcher and what it launched, some of them twice: all save, and one line is said."
    folder = tmp_path/'run'
    process, ranks = launch(kind, words, folder)
    os.killpg(process.pid, signal.SIGINT)
    gone(ranks, 45)
    code, out, lines = end(process)
    ours = [line for line in lines if line.startswith('mmsn: ')]
    assert code and len(ours) == 1 and 'interrupted: stopped at step' in ours[0], lines
    assert kind == 'torchrun' or code == 130 and not any('Traceback' in line for line in lines), lines
    assert latest(folder/'checkpoints')[1]['step'] == rows(folder)


# Disks

@pytest.fixture
def disk(tmp_path):
    "A file system of 1 MB of which little is free, where one may be mounted."
    folder = tmp_path/'disk'; folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], capture_output=True).returncode: pytest.skip('a small tmpfs cannot be mounted here')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


def fill(disk, left):
    "Leave `left` bytes of a disk free."
    (disk/'other').write_bytes(bytes(shutil.disk_usage(disk).free - left))


def read_only(disk):
    if subprocess.run(['mount', '-o', 'remount,ro', disk], capture_output=True).returncode: pytest.skip('cannot be remounted')


def commands(cohort, trained, out):
    "Every command that writes a folder, told to write `out`; the work that should not have begun is replaced by a failure."
    from mmsn import convert, demo, prepare, train
    from mmsn.evaluate.__main__ import main as evaluate
    other = trained.parent/'other'
    if not other.exists(): shutil.copytree(cohort, other)
    return {'prepare synthetic': (prepare.main, ['synthetic', out, '--patients', 120]), 'prepare join': (prepare.main, ['join', cohort, other, out]), 'evaluate': (evaluate, [trained, '--out', out, *FEW]),
            'convert': (convert.main, [trained/'encoder', out]), 'convert for transformers': (convert.main, [trained/'encoder', out, '--to', 'transformers']), 'demo': (demo.main, ['--out', out, '--patients', 120]),
            'train': (train.main, ['demo', f'data.cohort={cohort}', *SMALL, f'train.run={out}'])}


NAMES = ['prepare synthetic', 'prepare join', 'evaluate', 'convert', 'convert for transformers', 'demo', 'train']


@pytest.fixture
def no_work(monkeypatch):
    "Whatever takes long must not be reached."
    def reached(*a, **k): raise AssertionError('the work began')
    for place in ('mmsn.prepare.synthesise', 'mmsn.prepare.prepare_join', 'mmsn.evaluate.evaluation.evaluate_protocols', 'mmsn.sources.read_source', 'mmsn.loop.Trainer.take'): monkeypatch.setattr(place, reached)


@pytest.mark.parametrize('name', NAMES)
def test_places_that_cannot_be_written(cohort, trained, tmp_path, disk, capsys, no_work, name):
    "Below a file, a file itself, a name too long, a link to nothing, a full disk, a read-only disk: each command says so in one line before it works, and leaves nothing."
    (tmp_path/'file').write_text('mine'); (tmp_path/'link').symlink_to('nowhere')
    before = sorted(p.name for p in tmp_path.iterdir())
    places = {tmp_path/'file'/'out': 'file', tmp_path/'file': 'file', tmp_path/('x'*300): 'File name too long', tmp_path/'link': 'link', disk/'out': 'No space left', disk/'deep'/'out': 'No space left'}
    fill(disk, 0)
    for out, says in places.items():
        main, words = commands(cohort, trained, out)[name]
        line = refused(main, words, capsys)
        assert says in line or name in ('train', 'evaluate', 'convert', 'convert for transformers') and ('not a run' in line or 'is no' in line or 'not a report' in line or 'choose another' in line), (out, line)
    (disk/'other').unlink()
    read_only(disk)
    main, words = commands(cohort, trained, disk/'out')[name]
    assert 'Read-only file system' in refused(main, words, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == before and (tmp_path/'file').read_text() == 'mine' and not list(disk.iterdir())


@pytest.mark.parametrize('name', [name for name in NAMES if 'transformers' not in name])      # which has no such encoder as this one
def test_a_disk_that_fills_up(cohort, trained, disk, capsys, monkeypatch, name):
    "There is room for the trial and not for the result: one line, exit code 2, and nothing half-written (an evaluation keeps the protocols that it finished)."
    if name == 'convert': monkeypatch.setattr('mmsn.convert.check_writable', lambda out: None)      # this encoder is smaller than the trial
    fill(disk, 8192 if name == 'convert' else 17*4096)
    main, words = commands(cohort, trained, disk/'out')[name]
    line = refused(main, words, capsys)
    assert 'No space left' in line, line
    assert {p.name for p in disk.iterdir()} <= {'other', 'out', 'out.slurm', 'out-parts'} and not [p for p in disk.rglob('*') if p.suffix == '.npy' or p.name.endswith(('.safetensors', '.html'))], list(disk.rglob('*'))
    assert (disk/'out').exists() <= (name in ('train', 'demo'))


def test_a_file_limit(cohort, tmp_path):
    "The other way in which a system says that there is enough (`ulimit -f`): the run, its checkpoint and its encoder."
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))'
    process = start('mmsn.train', 'demo', f'data.cohort={cohort}', *SMALL, f'train.run={tmp_path/"run"}', 'optim.epochs=1', before=limit)
    code, _, lines = end(process)
    assert code == 2 and 'File too large' in said(lines, '')
    assert not list((tmp_path/'run').rglob('*.safetensors')) and not list((tmp_path/'run').rglob('.encoder*'))


def test_an_encoder_that_cannot_be_written(cohort, tmp_path, monkeypatch, capsys):
    "The checkpoint is whole, the export after it fails: one line, and the same command goes on from there when there is room."
    from safetensors import SafetensorError
    from mmsn import model
    from mmsn.train import main
    words = ['demo', f'data.cohort={cohort}', *SMALL, f'train.run={tmp_path/"run"}', 'optim.epochs=1']
    def full(*a, **k): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr(model, 'save_file', full)
    assert 'No space left on device' in refused(main, words, capsys)
    assert latest(tmp_path/'run'/'checkpoints') and not (tmp_path/'run'/'encoder').exists() and not list((tmp_path/'run').glob('.encoder*'))
    monkeypatch.undo()
    main(words)
    assert (tmp_path/'run'/'encoder'/'model.safetensors').is_file()


# A run that cannot learn

@pytest.mark.parametrize('changes,silent', [(['optim.lr=1e-12'], False), (['optim.lr=1e-12', 'optim.start_lr=0', 'optim.final_lr=0'], False), (['optim.momentum=1.0'], False), ([], True)])
def test_says_whether_anything_was_learned(tmp_path_factory, tmp_path, capfd, changes, silent):
    "The preset demo, on few patients: no word where it learns; a warning where the encoder is still its random start, by whichever option."
    from mmsn.config import load_config
    from mmsn.testing import toy_cohort
    from mmsn.train import train
    cohort = toy_cohort(tmp_path/'cohort', n=240)
    small = ['modalities.cxr.encoder.patch=8', 'modalities.cxr.views.random_size=16', 'modalities.cxr.views.focal_size=8', 'modalities.ehr.ignore=[]', 'optim.batch_size=32', 'train.threads=1']
    train(load_config('demo', [*small, f'train.run={tmp_path/"run"}', 'optim.epochs=10', *changes]), cohort)
    seen = capfd.readouterr()
    assert ('hardly differs from its random start' in seen.out + seen.err) != silent, seen
    assert silent or 'validation patients' in seen.out + seen.err and (tmp_path/'run'/'encoder').is_dir()


def test_says_what_is_too_short(cohort, tmp_path, capfd):
    "Before the first step; and channels to ignore that a cohort lacks are noted, a slip of a name is refused."
    from mmsn.train import main
    words = ['demo', f'data.cohort={cohort}', *SMALL, f'train.run={tmp_path/"run"}', 'optim.epochs=1']
    main([*words, 'optim.warmup_epochs=3', 'optim.batch_size=32', 'modalities.ehr.ignore=[Height,Albumin of the moon]'])
    out = capfd.readouterr().out
    assert 'warm-up of 3 epochs is not shorter than the run of 1' in out and 'fewer than five' in out and 'the cohort has no Albumin of the moon' in out
    assert 'did you mean \'Height\'' in refused(main, [*words, f'train.run={tmp_path/"other"}', 'modalities.ehr.ignore=[Heigth]'], capfd)


def test_a_run_of_an_older_version_resumes(cohort, tmp_path, capfd):
    "Its config.yaml holds the numbers that were defaults then; the same command, which leaves them out, goes on with these."
    from mmsn.config import load_config
    from mmsn.train import main
    (tmp_path/'mine.yaml').write_text('modalities: {ehr: {kind: timeseries, encoder: {hidden: 8, dim: 8}, views: {focal: 1}}}\nhead: {hidden: 16, output: 8}\nloss: {prototypes: 8}\n')
    words = [tmp_path/'mine.yaml', f'data.cohort={cohort}', 'optim.batch_size=16', 'optim.epochs=2', 'train.threads=1', f'train.run={tmp_path/"run"}']
    main([str(w) for w in [*words, 'optim.warmup_epochs=15', 'optim.momentum=0.996']])
    main([str(w) for w in words])
    config = load_config(tmp_path/'run'/'config.yaml')
    assert (config.optim.warmup_epochs, config.optim.momentum) == (15., .996)
    main([str(w) for w in [*words, f'train.run={tmp_path/"new"}']])
    config = load_config(tmp_path/'new'/'config.yaml')
    assert config.optim.warmup_epochs == .3 and config.optim.momentum == .9
