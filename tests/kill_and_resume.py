"""Kill a run again and again with SIGKILL, resume each time with another number of workers, and compare its end, bit for bit, with the run never killed.

    python tests/kill_and_resume.py --kills 25 [--prepare-kills 15] [--processes 2] [--seed 0]

Kills come in three kinds, in turn: at a random moment; at a random file operation in the run's folder (renames, removals, the opening of each file that is
written), so that every point between two of them has its chance; and within milliseconds of the first byte of a checkpoint. Processes are forked from
this one, which has imported everything: a start takes a second instead of ten, and the memory of the one killed is gone as it would be.

With --prepare-kills, preparations are killed too, new ones and ones that replace a cohort (--overwrite): at a random moment, or at a random file operation. After
each, the place holds the earlier cohort, the new one, or nothing but what the next start puts back or removes; the last attempt's cohort is that of the one never killed.
"""
import argparse, json, os, random, shutil, signal, socket, sys, tempfile, time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmsn.checkpoint import checkpoints, load_checkpoint
from mmsn.config import load_config
from mmsn.data.cohort import Cohort
from mmsn.options import InputError
from mmsn.prepare import table
from mmsn.testing import toy_cohort
from mmsn.train import train

CONFIG = ['modalities.cxr.encoder.dim=24', 'modalities.cxr.encoder.depth=1', 'modalities.cxr.encoder.patch=8', 'modalities.cxr.views.random_size=16',
          'modalities.cxr.views.focal_size=8', 'modalities.ehr.encoder.hidden=16', 'modalities.ehr.encoder.dim=16', 'modalities.ehr.ignore=[]', 'fusion.dim=24',
          'head.hidden=32', 'head.output=16', 'loss.prototypes=8', 'optim.epochs=5', 'optim.warmup_epochs=1', 'train.threads=1', 'train.log_every=1',
          'train.checkpoint_every=4', 'train.keep_last=1', 'train.keep_every=12', 'train.keep_best=loss_above_floor']
CHANGING = {'samples_per_s', 'memory_gb'}     # of the metrics: the clock and the machine


def kill_at(folder, n):
    "Die at the n-th file operation in `folder` (audit events; fsync and what safetensors does inside are not among them)."
    seen = [0]
    def hook(event, arguments):
        if event not in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir') or not str(arguments[0]).startswith(folder): return
        seen[0] += 1
        if seen[0] == n: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def start(cohort, folder, workers, processes, at=None):
    "Fork the processes of one attempt; their ids."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    found = []
    for rank in range(processes):
        pid = os.fork()
        if pid: found.append(pid); continue
        code = 1
        try:
            out = os.open(f'{folder}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            if processes > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
            if at and rank == 0: kill_at(str(folder), at)
            train(load_config('demo', [*CONFIG, f'optim.batch_size={24//processes}', f'data.cohort={cohort}', f'train.run={folder}', f'data.workers={workers}']))
            code = 0
        except BaseException as e: print(f'{type(e).__name__}: {e}', flush=True)
        finally: os._exit(code)
    return found


def wait(pids, until, stop=lambda: False):
    "Wait for all, or kill them: at the time `until`, when `stop` says so, or when one was killed. Whether they were killed; RuntimeError if one failed."
    left, killed = set(pids), False
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done: continue
            left.remove(pid)
            if os.WIFSIGNALED(status): killed = True
            elif os.WEXITSTATUS(status) and not killed: raise RuntimeError('a process failed by itself')
        if left and (killed or time.monotonic() > until or stop()):
            killed = True
            for pid in left: os.kill(pid, signal.SIGKILL)
            until = float('inf')
        time.sleep(.0003)
    return killed


def end(folder):
    "All that two equal runs have in common, by name."
    last = checkpoints(folder/'checkpoints')[-1]
    tensors, state = load_checkpoint(last)
    rows = [{k: v for k, v in json.loads(line).items() if k not in CHANGING} for line in (folder/'metrics.jsonl').read_text().splitlines()]
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))
    return dict(tensors, encoder=load_file(folder/'encoder'/'model.safetensors')), dict(step=state['step'], rows=rows, files=files, columns=(folder/'metrics.csv').read_text().splitlines()[0])


def compare(a, b):
    "Raise AssertionError unless the two ends are equal bit for bit; the number of tensors."
    (x, facts), (y, others) = a, b
    assert x.keys() == y.keys() and all(x[g].keys() == y[g].keys() for g in x)
    different = [f'{g}: {k}' for g in x for k in x[g] if not torch.equal(x[g][k], y[g][k])]
    assert not different, different
    for name in facts: assert facts[name] == others[name], f'{name}: {facts[name]} and {others[name]}'
    return sum(map(len, x.values()))


def tables(tmp):
    "A long table of 40 patients, and its channels."
    tmp.mkdir()
    rows = [f'{p},{h}.5,pulse,{60 + (7*p + 3*h) % 50}' for p in range(40) for h in range(24)]
    (tmp/'long.csv').write_text('\n'.join(['subject_id,time,variable,value', *rows]) + '\n')
    (tmp/'channels.csv').write_text('name,unit,low,high,normal\npulse,bpm,1,299,86\n')
    return tmp


def preparation(source, out, hours, at=None):
    "Fork a preparation that may replace what is there, and dies at its `at`-th file operation in the folder of `out`; its id."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        log = os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if at: kill_at(str(out.parent), at)
        table(source/'long.csv', source/'channels.csv', out, hours=hours, overwrite=True)
        code = 0
    except BaseException as e: print(f'{type(e).__name__}: {e}', flush=True)
    finally: os._exit(code)


def hash_of(folder):
    try: return Cohort.open(folder, verify=True).hash
    except InputError: return None


def kill_preparations(kills, rng, tmp):
    "Kill `kills` preparations; raises AssertionError where one of them hides a cohort, leaves half of one, or something behind."
    source, place = tables(tmp/'source'), tmp/'places'
    place.mkdir()
    began = time.monotonic()
    for hours, name in ((24, 'a'), (12, 'b')): assert not wait([preparation(source, tmp/name, hours)], float('inf')), Path(f'{tmp}/{name}.log').read_text()
    length, a, b = (time.monotonic() - began)/2, hash_of(tmp/'a'), hash_of(tmp/'b')
    done, counts = 0, dict(earlier=0, new=0, nothing=0, aside=0)
    while done < kills:
        out, replaces = place/'cohort', bool(rng.randrange(3))
        if replaces: shutil.copytree(tmp/'a', out)
        while True:                                        # the same command again and again, until it is not killed
            at = rng.randint(1, 40) if done < kills and done % 2 else None
            late = time.monotonic() + rng.uniform(.1, 1.1)*length if done < kills and not at else float('inf')
            killed = wait([preparation(source, out, 12, at)], late)
            if not killed: break
            done, found = done + 1, hash_of(out)
            aside = not found and bool(list(place.glob('.cohort-*-earlier/cohort/cohort.json')))
            assert found in (a, b) or (aside or not replaces) and not found, f'kill {done}: {found}'
            assert found or not out.exists(), 'half a cohort'
            counts['aside' if aside else 'earlier' if found == a else 'new' if found else 'nothing'] += 1
            print(f'kill {done} of a preparation: {"operation" if at else "moment"}; {"replacing; " if replaces else ""}then there was {"the earlier one, set aside" if aside else "the earlier one" if found == a else "the new one" if found else "nothing"}', flush=True)
        assert hash_of(out) == b, Path(f'{out}.log').read_text()[-2000:]
        left = sorted(p.name for p in place.iterdir() if p.name not in ('cohort', 'cohort.log'))
        assert not left, left
        shutil.rmtree(out)
    print(f'preparations killed: {done} of {kills}, every last one equal; after a kill there was {", ".join(f"{v} times {k}" for k, v in counts.items())}; {time.monotonic() - began:.0f} s')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--kills', type=int, default=25)
    p.add_argument('--prepare-kills', type=int, default=0)
    p.add_argument('--processes', type=int, default=1)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    rng, tmp = random.Random(args.seed), Path(tempfile.mkdtemp())
    if args.prepare_kills: kill_preparations(args.prepare_kills, rng, tmp)
    if not args.kills: return shutil.rmtree(tmp)
    toy_cohort(tmp/'cohort', n=240)
    began = time.monotonic()
    assert not wait(start(tmp/'cohort', tmp/'whole', 0, args.processes), float('inf')), (tmp/'whole.log').read_text()
    length, whole = time.monotonic() - began, end(tmp/'whole')
    print(f'never killed: {whole[1]["step"]} steps in {length:.1f} s on {args.processes} process(es), {len(whole[1]["rows"])} rows of metrics')
    kills = writes = runs = tensors = 0
    survived, workers = 0, None
    while kills < args.kills:
        folder, here = tmp/f'run{runs}', 0
        while True:
            workers = rng.choice([w for w in (0, 1, 2) if w != workers])
            kind = ('moment', 'operation', 'write')[kills % 3] if kills < args.kills else 'none'
            late = time.monotonic() + rng.uniform(0, length) if kind == 'moment' else float('inf')
            wanted = rng.randint(1, 3)
            def writing(seen=[set()]):
                "In the `wanted`-th checkpoint of this attempt, some of its milliseconds later."
                if kind != 'write': return False
                now = {p.name for p in (folder/'checkpoints').glob('.step-*.tmp')} if folder.exists() else set()
                if now - seen[0]: seen[0] = seen[0] | now
                if len(seen[0]) < wanted: return False
                time.sleep(rng.uniform(0, .01))
                return True
            try: killed = wait(start(tmp/'cohort', folder, workers, args.processes, rng.randint(1, 120) if kind == 'operation' else None), late, writing)
            except RuntimeError: raise SystemExit(f'after kill {kills} the run did not resume:\n{Path(f"{folder}.log").read_text()[-3000:]}')
            if not killed: break
            kills, here = kills + 1, here + 1
            left = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('.*')) if folder.exists() else []
            writes += bool(left)
            saved = [p.name for p in checkpoints(folder/'checkpoints')]
            print(f'kill {kills}: {kind}, {workers} workers; checkpoints {", ".join(saved) or "none"}{"; half-written: " + ", ".join(left) if left else ""}', flush=True)
        tensors = compare(end(folder), whole)
        survived, runs = survived + here, runs + 1
        print(f'run {runs}: finished after {here} kills, equal: {tensors} tensors (weights, target, prototypes, optimiser, encoder) and {len(whole[1]["rows"])} rows of metrics', flush=True)
    print(f'kills survived: {survived} of {kills}, {writes} of them in the middle of a write; {runs} runs; {time.monotonic() - began:.0f} s')
    shutil.rmtree(tmp)


if __name__ == '__main__': main()
