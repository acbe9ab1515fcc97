"What stands around a run: options that change cost and not results, trackers, files for launchers, and a job that is pre-empted and resumes."
import importlib.util, json, math, os, re, shutil, signal, subprocess, sys, time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from conftest import ROOT, SMALL, refused, run
from mmsn import launch, train
from mmsn.config import load_config, presets
from mmsn.data.cohort import Cohort
from mmsn.model import MMSN
from mmsn.schedules import schedule
from mmsn.train import main
from mmsn.loop import make_optimizer, train_step

DEEP = ['modalities.cxr.encoder.depth=3', 'modalities.cxr.encoder.drop_path=0.4', 'modalities.cxr.encoder.heads=3', 'head.norm=layer']


class Run:
    "A model and what it takes to step it, without a run folder."
    def __init__(self, cohort, *changes, precision='no', wrap=lambda model: model):
        self.cohort, self.config = Cohort.open(cohort), load_config('demo', [*SMALL, *changes])
        self.rows, self.model = self.cohort.rows('train'), wrap(MMSN.from_config(self.config, self.cohort))
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision)
        self.model, self.optimizer = self.accelerator.prepare(self.model, make_optimizer(self.model, self.config, 'cpu'))
        self.step = 0

    def batch(self, n=16): return self.cohort.batch(np.random.default_rng(self.step).choice(self.rows, n, replace=False), list(self.config.modalities))

    def take(self, batches=None):
        values = schedule(self.config.optim, self.step, 10)
        out, norm = train_step(self.accelerator, self.model, self.optimizer, batches or [self.batch()], values, self.config, 0, self.step)
        self.step += 1
        return out, norm

    def gradients(self): return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def one_state():
    "Accelerate keeps its precision for the whole process: every test starts anew."
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(True)


def relative(a, b): return max(((a[k] - b[k]).float().norm()/a[k].float().norm().clamp_min(1e-12)).item() for k in a)


def test_activation_checkpointing_changes_nothing(cohort):
    "Ten steps with stochastic depth: loss, gradients, and every weight of the online and target networks."
    a, b = Run(cohort, *DEEP), Run(cohort, *DEEP, 'train.activation_checkpointing=true')
    launch.speed_options(b.model, b.config.train)
    for _ in range(10):
        (x, _), (y, _) = a.take(), b.take()
        assert abs(x.loss - y.loss) <= 1e-6*abs(x.loss) and relative(a.gradients(), b.gradients()) <= 1e-6
    assert relative({k: v for k, v in a.model.state_dict().items() if v.is_floating_point()}, b.model.state_dict()) <= 1e-6
    none = Run(cohort, 'train.activation_checkpointing=false')
    assert launch.speed_options(none.model, none.config.train) is none.model and not any('forward' in m.__dict__ for m in none.model.modules())


@pytest.mark.skipif(not any(shutil.which(c) for c in ('g++', 'clang++', 'c++')), reason='torch.compile on a CPU needs a C++ compiler')
def test_compile_same_loss_and_no_storm(cohort):
    "Inductor's program, with activation checkpointing inside: the same loss to 1e-5 over six steps, and no new graph after the second (51a counts them where shapes vary)."
    from torch._dynamo.utils import counters
    torch._dynamo.reset(); counters.clear()
    plain = ['modalities.cxr.encoder.heads=3', 'head.norm=layer', *(f'modalities.{m}.views.focal=0' for m in ('cxr', 'ehr'))]
    a, b = Run(cohort, *plain), Run(cohort, *plain, 'train.compile=true', 'train.activation_checkpointing=true')
    launch.speed_options(b.model, b.config.train)
    graphs, rows = [], a.cohort.rows('train', ['cxr', 'ehr'], 'paired')
    for _ in range(6):
        batch = a.cohort.batch(np.random.default_rng(a.step).choice(rows, 16, replace=False), ['cxr', 'ehr'])
        (x, _), (y, _) = a.take([batch]), b.take([batch])
        assert abs(x.loss - y.loss) <= 1e-5*abs(x.loss)
        graphs.append(counters['stats']['unique_graphs'])
    print('graphs', graphs)
    assert 0 < graphs[-1] == graphs[1] <= 4, graphs


def test_compile_without_compiler(cohort, monkeypatch):
    monkeypatch.setattr(launch.shutil, 'which', lambda name: None)
    with pytest.raises(ValueError, match='needs a C'): launch.compile_encoders(Run(cohort).model)


def test_bf16(cohort):
    "The loss is computed in float32 and is close; weights stay float32."
    from accelerate.state import AcceleratorState
    a = Run(cohort, 'head.norm=layer')
    (x, _), exact = a.take(), a.gradients()
    AcceleratorState._reset_state(True)
    b = Run(cohort, 'head.norm=layer', precision='bf16')
    (y, _), rounded = b.take(), b.gradients()
    assert y.loss.dtype == torch.float32 and {p.dtype for p in b.model.parameters()} == {torch.float32}
    assert 0 < abs(x.loss - y.loss) < .02*abs(x.loss)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rounded)]
    assert torch.cosine_similarity(*flat, dim=0) > .98


def test_accumulation_is_the_mean_of_its_micro_batches(cohort):
    "Where the loss does not tie samples together, two micro-batches of 8 are one batch of 16; with Sinkhorn, me-max and a contrast they are not, as the option says."
    alone = ['head.norm=layer', 'loss.sinkhorn_iterations=0', 'loss.me_max_weight=0', 'fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid', 'data.samples=paired', 'optim.clip=0', 'train.seed=3']
    for changes, same in ((alone, True), (['head.norm=layer', 'data.samples=paired', 'optim.clip=0', 'train.seed=3'], False)):
        a, b = Run(cohort, *changes), Run(cohort, *changes)
        rows = a.cohort.rows('train', list(a.config.modalities), 'paired')[:16]
        a.take([a.cohort.batch(rows)])
        b.take([b.cohort.batch(rows[:8]), b.cohort.batch(rows[8:])])
        assert (relative(a.gradients(), b.gradients()) < 1e-4) == same


def test_clip(cohort):
    "Clipping shortens the gradient and keeps its direction; a bound that is not reached, and 0, change nothing."
    runs = {clip: Run(cohort, 'head.norm=layer', f'optim.clip={clip}') for clip in (0, 1e6, .01)}
    norms = {clip: float(r.take()[1]) for clip, r in runs.items()}
    flat = {clip: torch.cat([g.flatten() for g in r.gradients().values()]) for clip, r in runs.items()}
    assert norms[0] == norms[1e6] == norms[.01] > .01                  # reported before clipping
    assert flat[0].equal(flat[1e6]) and math.isclose(flat[.01].norm(), .01, rel_tol=1e-3)
    assert torch.cosine_similarity(flat[0], flat[.01], dim=0) > .999999


def test_find_batch_on_a_real_step(cohort):
    "Whole steps of growing size on a CPU: a limit that is given is kept, and a larger one gives no less."
    r = Run(cohort)
    def step(n): r.take([r.cohort.batch(launch.hardest_rows(r.cohort, r.rows, n, list(r.config.modalities)))])
    for n in (1, 64): step(n)
    now = psutil.Process().memory_info().rss
    small, large = (launch.find_batch(step, 8, 256, memory=now + more*2**20) for more in (40, 400))
    print('within 40 MB', small, 'within 400 MB', large)
    assert 1 <= small <= large <= 256


def test_dry_run_counts_and_writes_nothing(cohort, tmp_path):
    r = Run(cohort, f'train.run={tmp_path}/run')
    r.total, r.run = 100, tmp_path/'run'
    def batches():
        while True: yield None
    r.batches, take = batches, r.take
    r.take = lambda found: take([next(found) or r.batch()])
    found = launch.dry_run(r)
    assert found['steps'] == 100 and found['flops'] > 1e6 and found['seconds'] > 0 and not list(tmp_path.iterdir())
    assert 'nothing has been written' in launch.describe(found)


@pytest.mark.parametrize('name', ['tensorboard', 'trackio', 'wandb', 'mlflow'])
def test_tracker(name, tmp_path, monkeypatch):
    "Through Accelerate, offline, every file below the run's folder. Skipped where the library is not installed."
    if importlib.util.find_spec(name) is None: pytest.skip(f'{name} is not installed')      # not imported yet: trackio reads its folder then
    monkeypatch.chdir(tmp_path)
    for key in [k for k in os.environ if k.startswith(name.upper())]: monkeypatch.delenv(key)
    arguments, init = launch.make_trackers(name, tmp_path/'run')
    accelerator = Accelerator(cpu=True, **arguments)
    accelerator.init_trackers('demo', {'optim.lr': '0.1'}, init)
    for step in range(3): accelerator.log({'loss': 1/(step + 1), 'joint/used': 3.}, step=step)
    accelerator.end_training()
    assert [p.name for p in tmp_path.iterdir()] == ['run'] and any(p.is_file() for p in (tmp_path/'run'/'trackers').rglob('*'))


def test_missing_tracker_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'pip install wandb, or pip install "mmsn\[trackers\]"'): launch.make_trackers('wandb', tmp_path)


def test_accelerate_files():
    "Each loads with Accelerate's own class, goes into the wheel, and is no preset."
    found = sorted((ROOT/'mmsn'/'accelerate_configs').glob('*'))
    assert [p.stem for p in found] == ['cpu2', 'gpu1', 'gpu2x8', 'gpu8']
    assert all(load_config_from_file(str(p)).num_processes for p in found)
    assert not {p.stem for p in found} & set(presets())
    patterns = re.findall(r"'(presets/[^']*)'", (ROOT/'setup.py').read_text(encoding='utf-8'))
    for p in (ROOT/'mmsn'/'presets').rglob('*.yaml'):
        assert any(p.relative_to(ROOT/'mmsn').parent == Path(q).parent and fnmatch(p.name, Path(q).name) for q in patterns), p


def last(folder): return sorted((folder/'checkpoints').glob('step-*'))[-1]


def wait(until, seconds=180):
    deadline = time.time() + seconds
    while not until():
        assert time.time() < deadline, 'it took too long'
        time.sleep(.02)


@pytest.fixture
def job_of(cohort, tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    monkeypatch.chdir(tmp_path)
    def start(*words):
        words, slurm = launch.split_slurm(['demo', f'data.cohort={cohort}', 'train.run=run', *SMALL, *words, 'slurm.cluster=local'])
        return launch.submit(words, slurm, Path('run')), tmp_path/'run'
    return start


def test_preempted_job_goes_on_exactly(job_of, cohort, tmp_path):
    "Submitit's signal in the middle: the run saves, is queued again, resumes, and ends where a run that nobody disturbed does."
    job, folder = job_of('optim.epochs=30')
    metrics = folder/'metrics.jsonl'
    wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5)
    for task in psutil.Process(int(job.job_id)).children(): task.send_signal(signal.SIGUSR2)
    job.wait()
    log = job.paths.stdout.read_text() + job.paths.stderr.read_text()
    assert job.state == 'FINISHED' and job.exception() is None, log
    assert 'stopped at step' in log and 'resuming from step' in log and 'Requeued job' in log, log
    run('mmsn.train', 'demo', f'data.cohort={cohort}', 'train.run=whole', *SMALL, 'optim.epochs=30', cwd=tmp_path)
    for name in ('model.safetensors', 'optimizer.safetensors'):
        a, b = load_file(last(folder)/name), load_file(last(tmp_path/'whole')/name)
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_two_processes_as_a_job(job_of):
    "Ranks and the address to meet at come from the job's environment."
    job, folder = job_of('slurm.processes_per_node=2')
    job.wait()
    log = job.paths.stdout.read_text() + job.paths.stderr.read_text()
    assert 'on 2 × cpu' in log and (folder/'encoder').is_dir(), log


def test_a_job_that_fails_says_so(job_of):
    job, _ = job_of('optim.batch_size=5000')
    job.wait()
    assert 'exit code 2' in str(job.exception()) and 'lower optim.batch_size' in job.paths.stderr.read_text()


# The command, with what stands in mmsn.launch wired in

@pytest.fixture
def words(cohort, tmp_path): return ['demo', f'data.cohort={cohort}', f'train.run={tmp_path}/run', *SMALL]


def test_dry_run_and_find_batch_of_the_command(words, tmp_path, capsys):
    "Both take whole steps; neither leaves a file."
    main([*words, '--dry-run'])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ['parameters', 'batch', 'memory', 'arithmetic', 'time', 'files'] and f'{tmp_path}/run/config.yaml' in said
    main([*words, '--find-batch'])
    assert re.fullmatch(r'optim\.batch_size=\d+', capsys.readouterr().out.strip())
    assert not list(tmp_path.iterdir())
    assert 'lower optim.batch_size' in refused(main, [*words, '--dry-run', 'optim.batch_size=4000'], capsys)


def test_profile_of_the_command(words, tmp_path):
    "A trace of a run of a few steps is there, and its weights and curve are those of the run without; so they are with activations computed again."
    main(words)
    for name, option in (('traced', 'train.profile=true'), ('recomputed', 'train.activation_checkpointing=true')):
        main([*words, f'train.run={tmp_path}/{name}', option])
        a, b = (load_file(last(tmp_path/n)/'model.safetensors') for n in ('run', name))
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    trace = json.loads((tmp_path/'traced'/'profile'/'trace.json').read_text())
    assert any('conv' in e.get('name', '') for e in trace['traceEvents']) and 'conv' in (tmp_path/'traced'/'profile'/'operations.txt').read_text()
    assert not (tmp_path/'run'/'profile').exists()
    main([*words, 'train.profile=true', 'train.activation_checkpointing=true'])           # both may change in a run that is there


def test_slurm_words_of_the_command(words, tmp_path, capsys):
    "With the local executor: the job's own log tells of the run, which is whole when the command is done; what is wrong is said before there is a job."
    pytest.importorskip('submitit')
    for wrong, says in ((['slurm.node=2'], "did you mean 'nodes'"), (['slurm.cluster=local', 'optim.batch_size=4000'], 'lower optim.batch_size'),
                        (['slurm.cluster=local', 'data.cohort=nowhere'], 'nowhere'), *([] if shutil.which('srun') else [(['slurm.nodes=2'], 'slurm.cluster=local')])):
        assert says in refused(main, [*words, *wrong], capsys)
    assert not (tmp_path/'run').exists() and not list(tmp_path.rglob('*_submitted.pkl'))
    main([*words, 'optim.epochs=1', 'slurm.cluster=local'])
    said = capsys.readouterr().out
    assert said.startswith('job ') and (tmp_path/'run'/'encoder').is_dir()
    assert 'finished step' in Path(re.search(r'log (\S+),', said)[1]).read_text()


def test_slurm_job_that_fails_fails_the_command(words, monkeypatch, capsys):
    "What a script that waits for it sees; a real job that fails is further up."
    job = SimpleNamespace(job_id='7', paths=SimpleNamespace(stdout='out', stderr='err'), exception=lambda: RuntimeError('exit code 2'))
    monkeypatch.setattr(train, 'submit', lambda *args: job)
    with pytest.raises(SystemExit, match='mmsn: job 7 failed: err says why'): main([*words, 'slurm.cluster=local'])


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
@pytest.mark.parametrize('launcher', ['torchrun', 'accelerate'])
def test_processes_without_a_gpu_find_each_other(launcher, words, tmp_path):
    "torchrun says nothing of CPUs, and `accelerate launch` with a file starts one process: both are two processes of one run. A dry run is taken by both."
    start = dict(torchrun=['torch.distributed.run', '--nproc_per_node', 2, '--master_port', 29713, '-m', 'mmsn.train'],
                 accelerate=['accelerate.commands.launch', '--config_file', ROOT/'mmsn'/'accelerate_configs'/'cpu2.yaml', '-m', 'mmsn.train'])[launcher]
    env = {k: v for k, v in os.environ.items() if not k.startswith(('ACCELERATE', 'MASTER'))} | dict(OMP_NUM_THREADS='1')
    done = run(*start, *words, *(['optim.epochs=1'] if launcher == 'torchrun' else ['--dry-run']), env=env)
    if launcher == 'torchrun':
        about = json.loads((tmp_path/'run'/'run.json').read_text())
        assert (about['processes'], about['batch']) == (2, 32) and done.stdout.count('on 2 × cpu') == 1
    else: assert done.stdout.count('16 samples × 2 processes on cpu') == 1 and not list(tmp_path.iterdir())


def test_one_command_in_a_folder(words, tmp_path, capsys):
    "While another process trains there, the folder is refused and left alone; when that was killed, it is free at once, and what it left is cleared."
    folder = tmp_path/'run'; folder.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on n1'); f.flush(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, '-c', hold, folder/'.lock'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        assert 'process 7 on n1 is training in' in refused(main, words, capsys)
        assert [p.name for p in folder.iterdir()] == ['.lock']
        holder.kill()
    main([*words, 'optim.epochs=1'])
    assert (folder/'encoder').is_dir() and not (folder/'.lock').exists()


def test_fsdp_is_refused(words, monkeypatch, capsys, tmp_path):
    "Its checkpoints would be shards."
    monkeypatch.setattr(Accelerator, 'distributed_type', DistributedType.FSDP)
    assert 'sharded checkpoints of FSDP' in refused(main, words, capsys) and not list(tmp_path.iterdir())
