"""What a training costs beside other work, and what the choice of threads costs on a quiet machine.

    python benchmarks/threads.py [--busy 2] [--epochs 1] [--repeat 2] [--out results/threads.csv]

Each setting trains the preset demo on toy patients in a process of its own, as `mmsn-train` does, with and without `--busy` processes that do nothing but count.
`default` is what the command chooses; `as before` is a thread for each core that waits without sleeping, `asleep` one that sleeps at once; `one` is one thread. The last lines are the two figures:
seconds a step of `default` beside the busy processes over its fair share (the processor time a step takes with one thread, on the part of the cores that is this
process's among all), which should be at most 1.5; and without them over the better of the others, at most 1.02. The machine should do nothing else.
"""
import argparse, os, platform, re, resource, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd

SETTINGS = dict(default=({}, []), **{'as before': (dict(OMP_WAIT_POLICY='ACTIVE'), ['train.threads={cores}']), 'asleep': (dict(OMP_WAIT_POLICY='PASSIVE'), ['train.threads={cores}'])}, one=({}, ['train.threads=1']))
DECIDED = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME', 'GOMP_SPINCOUNT')


def measure(name, cohort, folder, epochs, busy):
    "Seconds and processor seconds a step of one setting, start and end of the process taken off, and the threads that were chosen."
    from mmsn.threads import cores
    environment, words = SETTINGS[name]
    environment = {k: v for k, v in os.environ.items() if k not in DECIDED} | environment
    words = [w.format(cores=cores()) for w in words]
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
    time.sleep(1)
    def run(epochs, place):
        "(seconds, processor seconds) of a training."
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, '-m', 'mmsn.train', 'demo', f'data.cohort={cohort}', f'train.run={place}', f'optim.epochs={epochs}', 'optim.batch_size=32', 'train.checkpoint_every=100000', *words]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    try: (long, cpu), (short, start) = run(epochs, folder/'long'), run(max(epochs//3, 1), folder/'short')
    finally:
        for p in others: p.kill(); p.wait()
    steps = [pd.read_json(folder/n/'metrics.jsonl', lines=True).step.max() for n in ('long', 'short')]
    chosen = re.search(r'"threads": (\d+)', (folder/'long'/'run.json').read_text())
    n = steps[0] - steps[1]
    return dict(setting=name, busy=busy, seconds=(long - short)/n, processor=(cpu - start)/n, threads=int(chosen[1]) if chosen else None)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--busy', type=int, default=2)
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--repeat', type=int, default=2)
    p.add_argument('--only', choices=list(SETTINGS), nargs='*', default=list(SETTINGS))
    p.add_argument('--out')
    args = p.parse_args()
    from mmsn.testing import toy_cohort
    from mmsn.threads import cores, others
    print(f'{platform.processor() or platform.machine()}, {cores()} cores, {others(1.):.2f} of them used by others before the start', flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        cohort = toy_cohort(Path(tmp)/'cohort', n=480).folder
        for i in range(args.repeat):
            for busy in sorted({0, args.busy}):
                for name in args.only:
                    rows.append(measure(name, cohort, Path(tmp)/f'{name}-{busy}-{i}', args.epochs, busy))
                    print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if args.out: table.to_csv(args.out, index=False)
    least = table.groupby(['busy', 'setting'])[['seconds', 'processor']].min()
    print(least.round(3).to_string())
    if {'default', 'one'} <= set(args.only):
        share = min(1., cores()/(args.busy + 1))
        if args.busy: print(f'beside {args.busy} busy processes: {least.seconds[args.busy, "default"]/(least.processor[0, "one"]/share):.2f} times the fair share (at most 1.5)')
        quiet = least.seconds[0]
        print(f'on a quiet machine: {quiet["default"]/quiet.drop("default").min():.3f} times the better of the others (at most 1.02)')


if __name__ == '__main__': main()
