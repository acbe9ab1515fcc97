"How commands end when they are told to, when a process of theirs is killed, and when the disk is not as it should be: one line, an exit code, and nothing half-written."
import json, os, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, SMALL, one_line, refused, run
from mmsn.checkpoint import latest
from mmsn.commands import check_writable
from mmsn.options import InputError

ENV = {k: v for k, v in os.environ.items() if not k.startswith(('ACCELERATE', 'MASTER'))} | dict(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')


def start(*command, **kwargs):
    "A command in a session of its own, so that a signal can go to all of its processes, as a terminal's does."
    return subprocess.Popen([sys.executable, '-m', *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENV, **kwargs)


def end(process, seconds=90):
    "(exit code, standard output, lines of standard error without the progress bar) of a command that is ending."
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError('it does not end:\n' + '\n'.join(process.communicate()))
    return process.returncode, out, [line for line in re.split(r'[\r\n]+', err) if line.strip() and 'step/s' not in line and 's/step' not in line and '?step' not in line]


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
    stuck = "import sys, time; from mmsn import loop; take = loop.Trainer.take; loop.Trainer.take = lambda self, b: take(self, b) if self.step < 3 else [time.sleep(.1) for _ in range(10**6)]; from mmsn.train import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, '-c', stuck, *words, f'train.run={folder}', 'train.checkpoint_every=1'], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=ENV)
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
    slow = "import sys, time\n{}\nfrom mmsn.train import main\nmain(sys.argv[1:])"
    places = dict(importing="import builtins; real = builtins.__import__\ndef slow(name, *a, **k):\n    if name == 'accelerate': print('now', flush=True); time.sleep(60)\n    return real(name, *a, **k)\nbuiltins.__import__ = slow",
                  building="from mmsn.model import MMSN\ndef slow(*a): print('now', flush=True); time.sleep(60)\nMMSN.from_config = slow")
    for name, patch in places.items():
        process = subprocess.Popen([sys.executable, '-c', slow.format(patch), *words, f'train.run={tmp_path/"run"}'], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
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
        if stage == 'report': wait(lambda: psutil.Process(process.pid).children(recursive=True) and (run_folder/'.report.tmp'/'about.json').exists(), process)
        else: wait(lambda: (run_folder/'.report.tmp').exists(), process)
        time.sleep(.2)
        (os.killpg if stage == 'report' else os.kill)(process.pid, number)
        found, _, lines = end(process)
        assert found == code and said(lines, 'ended by SIGTERM' if number == signal.SIGTERM else 'interrupted'), (stage, lines)
        assert sorted(p.name for p in run_folder.iterdir() if p.name != 'features') == before


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
