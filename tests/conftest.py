"What the tests share: a small cohort of synthetic patients, and a way to run a command as a user would."
import os
# before torch is imported: a process forked from one that has used OpenMP's threads waits for them for ever
for _name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(_name, '1')

import signal, subprocess, sys
from pathlib import Path

import pytest

from forks import Command

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {f'mmsn.{name}' for name in ('prepare', 'train', 'evaluate', 'convert', 'encode', 'demo')}
# a shell starts jobs in the background with Ctrl-C ignored, and what they start ignores it too: tests that send one would wait
signal.signal(signal.SIGINT, signal.default_int_handler)

# A config small enough that a step takes milliseconds; everything else as the demo's.
SMALL = ['modalities.cxr.encoder.dim=24', 'modalities.cxr.encoder.depth=1', 'modalities.cxr.views.random_size=32', 'modalities.cxr.views.focal_size=16',
         'modalities.ehr.encoder.hidden=16', 'modalities.ehr.encoder.dim=16', 'fusion.dim=24', 'head.hidden=32', 'head.output=16', 'loss.prototypes=8',
         'optim.batch_size=16', 'optim.epochs=2', 'optim.warmup_epochs=0.5', 'train.log_every=1', 'train.threads=1']


# files whose tests take longest begin first, so that two workers (`pytest -n 2 --dist loadfile --no-loadscope-reorder`) end together; those of the site are far
# apart, as the first of them stages the pages and the other finds them there
LONG = [f'test_{name}.py' for name in ('ends', 'launch', 'train', 'options', 'undefined', 'mimic_odd', 'mimic', 'distributed', 'shards', 'site_links', 'steps', 'inputs', 'objectives', 'prepare', 'hostile', 'fuzz',
                                       'encode', 'hostile_report', 'seed_config', 'share', 'notebooks', 'text', 'generate', 'formats', 'sources', 'threads', 'pictures', 'splits', 'model')]


def pytest_collection_modifyitems(items): items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def run(module, *words, code=0, fork=None, env=None, cwd=None, **kwargs):
    """Run `python -m module …`; asserts its exit code; returns the finished process. Commands of mmsn are forked from a process that has imported what they need
    (`forks`), unless `fork` is false: then it starts as it does for a user."""
    if fork is None: fork = module in COMMANDS and not kwargs
    if fork:
        process = Command(module, *words, env=env, cwd=cwd)
        done = subprocess.CompletedProcess([module, *words], None, *process.communicate())
        done.returncode = process.returncode
    else: done = subprocess.run([sys.executable, '-m', module, *map(str, words)], capture_output=True, text=True, env=env, cwd=cwd, **kwargs)
    assert done.returncode == code, f'exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}'
    return done


def one_line(done):
    "The error that a person sees of a finished process: one line that starts with the project's name, and no traceback."
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert 'Traceback' not in done.stderr and lines and lines[-1].startswith('mmsn: '), done.stderr
    return lines[-1]


def refused(main, argv, capsys):
    "The one line with which a command, called here, refuses what it is given, with exit code 2."
    with pytest.raises(SystemExit) as left: main([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and lines[-1].startswith('mmsn: '), lines
    return lines[-1]


@pytest.fixture(scope='session')
def cohort(tmp_path_factory):
    "120 synthetic patients as a cohort folder, made by the command."
    folder = tmp_path_factory.mktemp('cohort')/'synthetic'
    run('mmsn.prepare', 'synthetic', folder, '--patients', 120, '--seed', 5)
    return folder
