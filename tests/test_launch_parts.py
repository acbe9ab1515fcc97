"Parts of mmsn.launch that take more lines than a page has room for: refusals in bulk, memory that is really taken, the halves of a job, its stored file."
import gc, json, math, os, pickletools, shutil, signal, threading, time, types
from importlib.resources import files

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from mmsn.config import presets
from mmsn.launch import (Job, Slurm, compile_encoders, count_flops, find_batch, make_executor, memory_limit, processes_of, profiled, rank_environment, split_slurm,
                         submit)
from mmsn.options import InputError


def card(size, error=None):
    "A step on a pretended GPU on which `size` samples fit."
    def step(n):
        if n > size: raise error or torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    return step


@pytest.mark.parametrize('error', [RuntimeError('CUBLAS_STATUS_ALLOC_FAILED'), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_every_allocator_is_understood(error): assert find_batch(card(3, error), memory=math.inf) == 3


def test_errors_of_a_step_come_through():
    with pytest.raises(InputError, match='not even one sample'): find_batch(card(0), memory=math.inf)
    with pytest.raises(RuntimeError, match='shapes differ'): find_batch(card(7, RuntimeError('shapes differ')), memory=math.inf)      # a bug is a bug


def test_memory_that_is_really_taken(tmp_path):
    "Each sample holds 4 MB and the process may grow by 400 MB: 100, up to what the operating system rounds, and no trial far above."
    tried = []
    def hold(n):
        tried.append(n)
        x = torch.ones(n << 20)                                             # 4n MB
        time.sleep(.02); return x.sum()
    hold(1); gc.collect()                                                   # what torch and earlier tests still take is no part of a sample
    tried.clear()
    n = find_batch(hold, start=4, limit=1000, memory=psutil.Process().memory_info().rss + 400*2**20)
    assert 70 < n <= 110 and max(tried) <= 128, (n, tried)
    (cgroup := tmp_path/'memory.max').write_text(str(2**30))
    if memory_limit() > 2**30: assert memory_limit(cgroup=cgroup) == int(.9*2**30)
    cgroup.write_text('max\n'); assert memory_limit(cgroup=cgroup) > 0


def test_flops_of_a_backward_pass():
    linear = torch.nn.Linear(100, 50)
    assert count_flops(lambda: linear(torch.ones(7, 100)).sum().backward()) == 2*(2*7*100*50)       # no gradient of the input is wanted


def test_a_trace_of_a_run_shorter_than_it(tmp_path):
    for _ in profiled(iter([1, 2, 3]), tmp_path, steps=50, skip=1): torch.ones(9, 9) @ torch.ones(9, 9)
    assert json.loads((tmp_path/'trace.json').read_text())['traceEvents']


def test_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    none = types.SimpleNamespace(encoders={})
    with pytest.raises(InputError, match='no effect'): compile_encoders(types.SimpleNamespace(online=none, target=none))


def test_files_for_accelerate(tmp_path):
    read = {p.name: load_config_from_file(str(p)) for p in sorted((files('mmsn')/'accelerate_configs').iterdir())}
    assert {c.mixed_precision for c in read.values()} == {'no'} and not {p.removesuffix('.yaml') for p in read} & set(presets())
    (tmp_path/'bad.yaml').write_text('distributed_type: MULTI_GPU\nnum_procs: 8\n')
    with pytest.raises(InputError, match='num_procs'): processes_of(tmp_path/'bad.yaml')
    with pytest.raises(InputError, match='does not exist'): processes_of(tmp_path/'none.yaml')


@pytest.mark.parametrize('words,message', [(['slurm.gpu_per_node=8'], "did you mean 'gpus_per_node'"), (['slurm.time=long'], 'slurm.time should be int'),
                                           (['slurm.nodes=0'], 'between 1 and'), (['slurm.cluster=local', 'slurm.nodes=2'], 'one node')])
def test_slurm_words_that_are_refused(words, message):
    with pytest.raises(InputError, match=message): split_slurm(words)


def test_ranks():
    "One process is told nothing; on one machine they meet at 127.0.0.1; a hundred jobs have a hundred ports, or nearly."
    every = [rank_environment(r, 16, r % 8, 2, ['node7', 'node9'], '4711') for r in range(16)]
    assert [int(e['RANK']) for e in every] == list(range(16))
    assert {(e['MASTER_ADDR'], e['MASTER_PORT'], e['WORLD_SIZE'], e['LOCAL_WORLD_SIZE']) for e in every} == {('node7', every[0]['MASTER_PORT'], '16', '8')}
    assert rank_environment(1, 2, 1, 1, ['odd_name'], '1')['MASTER_ADDR'] == '127.0.0.1'
    assert rank_environment(0, 1, 0, 1, ['node7'], '4711') == {}
    assert set(rank_environment(0, 2, 0, 1, [''], '1', cpu=True)) - set(every[0]) == {'ACCELERATE_USE_CPU'}
    ports = {rank_environment(0, 2, 0, 1, [''], str(job))['MASTER_PORT'] for job in range(100)}
    assert len(ports) > 95 and all(20000 <= int(p) < 40000 for p in ports)


def test_the_halves_of_a_job(tmp_path, monkeypatch):
    "A command that waits for SIGTERM and takes its time over saving: SIGUSR2 does it no harm, `checkpoint` gives it time and queues the same again."
    pytest.importorskip('submitit')
    for key, value in dict(SUBMITIT_EXECUTOR='local', SUBMITIT_LOCAL_JOB_ID='77', SUBMITIT_FOLDER=str(tmp_path)).items(): monkeypatch.setenv(key, value)
    (tmp_path/'waits.py').write_text('''
import os, pathlib, signal, sys, time
def stop(*_): time.sleep(.3); pathlib.Path('saved').write_text(os.environ.get('RANK', 'alone')); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path('ready').touch()
time.sleep(60)
''')
    job = Job(['demo'], str(tmp_path), 'waits')
    waiting = threading.Thread(target=job, daemon=True); waiting.start()
    while not (tmp_path/'ready').exists(): time.sleep(.01)
    os.kill(job.child.pid, signal.SIGUSR2); time.sleep(.1)
    assert waiting.is_alive()                                               # ignored, as it has to be
    again = job.checkpoint()
    assert (tmp_path/'saved').read_text() == 'alone'                        # it was given time to save
    assert (again.function.argv, again.function.child) == (['demo'], None)
    waiting.join(5)
    (tmp_path/'fails.py').write_text('raise SystemExit(3)')
    with pytest.raises(RuntimeError, match='exit code 3'): Job(['demo'], str(tmp_path), 'fails')()


def test_no_slurm_here(tmp_path):
    pytest.importorskip('submitit')
    if shutil.which('srun'): pytest.skip('there is one')
    with pytest.raises(InputError, match='slurm.cluster=local'): make_executor(Slurm(nodes=2), tmp_path)


def test_the_stored_job_names_our_class(tmp_path, monkeypatch):
    "What submitit has pickled is small, and holds the class by name."
    pytest.importorskip('submitit')
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'sbatch').write_text('#!/bin/sh\necho Submitted batch job 4711\n')
    (tmp_path/'bin'/'srun').write_text('#!/bin/sh\n')
    for f in (tmp_path/'bin').iterdir(): f.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    assert submit(['demo'], Slurm(nodes=2, gpus_per_node=8), tmp_path/'runs'/'mine').job_id == '4711'
    stored = next((tmp_path/'runs'/'mine.slurm').glob('*_submitted.pkl'))
    strings = [a for _, a, _ in pickletools.genops(stored.read_bytes()) if isinstance(a, str)]
    assert 'mmsn.slurm' in strings and 'Job' in strings and stored.stat().st_size < 2000 and not any('torch' in s for s in strings)
