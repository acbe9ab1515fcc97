"""How long an evaluation takes, protocol by protocol, and what probes and intervals of many patients ask of memory.

    python benchmarks/evaluate.py RUN                       # the whole evaluation of a run, in two processes and in one, in turn
    python benchmarks/evaluate.py --rows 1000000            # probes and intervals of a million patients with 25 labels

With RUN (of mmsn-demo, say) `mmsn-evaluate` is called twice in new folders, once as it comes, with a second process that trains the
networks from scratch where there are cores for it, and once with one thread in one process, which is the peer; a line for each protocol.

With --rows, features (N, --width) and labels (N, --labels) with a known signal are made, half of them for training. `fit_probe` chooses
each label's penalty of six by five folds; the peer is scikit-learn's LogisticRegression, one label, fold and penalty at a time, on --peer
of the rows, where the same `fit_probe` is timed as well and has to give the same AUROC to 2e-3. Then `bootstrap` with --resamples of the
other half; `benchmarks/bootstrap.py` holds that against scikit-learn. CPU seconds, and the highest resident memory of a process of its own.
"""
import argparse, os, re, resource, subprocess, sys, tempfile, time
from itertools import product
from pathlib import Path

import numpy as np

from mmsn.commands import cli
from mmsn.evaluate.metrics import auroc, bootstrap, interval, macro
from mmsn.evaluate.probes import STRENGTHS, fit_probe
from mmsn.evaluate.task import subject_folds
from mmsn.options import InputError
from mmsn.threads import peak_memory


def spent():
    "CPU seconds of this process and of its children that have ended."
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def one_evaluation(run, out, threads):
    "Seconds at which each protocol began and the end, and CPU seconds of the evaluation without the process beside it."
    limits = {f'{n}_NUM_THREADS': str(threads) for n in ('OMP', 'MKL', 'OPENBLAS')} if threads else {}
    free = {k: v for k, v in os.environ.items() if not k.endswith('_NUM_THREADS')}
    start, cpu = time.perf_counter(), spent()
    done = subprocess.run([sys.executable, '-m', 'mmsn.evaluate', run, 'cache=false', '--out', out], env=free | limits, capture_output=True, text=True)
    if done.returncode: raise InputError(done.stderr.strip().splitlines()[-1])
    marks = [(int(s), name.strip()) for s, name in re.findall(r'^ +(\d+) s  ([a-z ]+?)(?: \(\d+ of .*)?$', done.stdout, re.M)]
    return marks, time.perf_counter() - start, spent() - cpu


def tell(run):
    "The evaluation of a run in two processes and in one."
    walls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, threads in (('as it comes', 0), ('one process, one thread', 1)):
            marks, walls[name], cpu = one_evaluation(run, f'{folder}/{threads}', threads)
            print(f'{name}: {walls[name]:.0f} s, {cpu:.0f} CPU-s with the processes that it started')
            for (begin, what), (end, _) in zip(marks, [*marks[1:], (walls[name], '')]): print(f'  {what:<14} {end - begin:5.0f} s')
    print(f'{walls["one process, one thread"]/walls["as it comes"]:.2f} times as fast as one process with one thread')


def patients(n, width, labels, seed=0):
    "Features (n, width) that correlate, and labels of prevalence 2 to 30 %, a twentieth unknown."
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, width), np.float32)
    X[:, 1:] += .5*X[:, :-1]
    score = X[:, :64]@rng.normal(size=(min(width, 64), labels)).astype(np.float32)/8 + rng.standard_normal((n, labels), np.float32)
    Y = (score > np.quantile(score, 1 - np.linspace(.02, .3, labels), axis=0).diagonal()).astype(np.float64)
    Y[rng.random(Y.shape, np.float32) < .05] = np.nan
    return X, Y


def loop(X, Y, X_test):
    "Scores of the test rows by scikit-learn, one label, fold and penalty at a time."
    from sklearn.linear_model import LogisticRegression
    mean, std, out = X.mean(0), X.std(0), np.zeros((len(X_test), Y.shape[1]))
    X, X_test, fold = (X - mean)/std, (X_test - mean)/std, subject_folds(Y)
    for k in range(Y.shape[1]):
        f, y = fold[:, k], Y[:, k]
        loss = np.zeros(len(STRENGTHS))
        for (j, C), i in product(enumerate(STRENGTHS), range(f.max() + 1)):
            fit = LogisticRegression(C=C, max_iter=1000).fit(X[(f >= 0) & (f != i)], y[(f >= 0) & (f != i)])
            loss[j] -= fit.predict_log_proba(X[f == i])[np.arange((f == i).sum()), y[f == i].astype(int)].sum()
        on = ~np.isnan(y)
        out[:, k] = LogisticRegression(C=STRENGTHS[loss.argmin()], max_iter=1000).fit(X[on], y[on]).decision_function(X_test)
    return out


def measured(what, f, *args, **options):
    "The result of a call and its CPU seconds; prints a line with the highest memory of the process so far."
    start = time.process_time()
    result = f(*args, **options)
    took = time.process_time() - start
    print(f'{what}: {took:.1f} CPU-s; {peak_memory()/2**30:.2f} GB at the highest so far', flush=True)
    return result, took


def tell_large(a):
    "Probes and intervals of many patients."
    X, Y = patients(a.rows, a.width, a.labels)
    half, few = a.rows//2, min(a.peer, a.rows//2)
    print(f'{a.rows:,} patients, {a.width} features ({X.nbytes/2**30:.2f} GB), {a.labels} labels: '
          f'{peak_memory()/2**30:.2f} GB at the highest so far')
    test = X[half:half + 20000].astype(np.float64), Y[half:half + 20000]
    ours, fast = measured(f'probes, {few:,} training rows', fit_probe, X[:few], Y[:few], folds=5)
    theirs, slow = measured('scikit-learn in a loop, the same', loop, X[:few].astype(np.float64), Y[:few], test[0])
    gap = np.abs(auroc(test[1], ours.scores(test[0])) - auroc(test[1], theirs)).max()
    print(f'{slow/fast:.1f} times as fast; AUROC differs by {gap:.1e} at most')
    if gap > 2e-3: raise InputError('the probes do not agree')
    probe, _ = measured(f'probes, {half:,} training rows', fit_probe, X[:half], Y[:half], folds=5)
    scores = probe.scores(X[half:])
    found, _ = measured(f'intervals, {a.rows - half:,} test rows, {a.resamples} resamples', bootstrap, Y[half:], scores, None, a.resamples)
    low, high = interval(macro(found['auroc']))
    print(f'mean AUROC {macro(auroc(Y[half:], scores)):.4f} ({low:.4f} to {high:.4f})')


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('run', nargs='?', help='a run whose whole evaluation is timed')
    p.add_argument('--rows', type=int, default=0, help='patients of which probes and intervals are measured')
    p.add_argument('--width', type=int, default=128, help='features')
    p.add_argument('--labels', type=int, default=25, help='labels')
    p.add_argument('--resamples', type=int, default=1000, help='resamples of subjects')
    p.add_argument('--peer', type=int, default=4000, help='training rows that scikit-learn is given')
    a = p.parse_args(argv)
    if not (a.run or a.rows): raise InputError('give the folder of a run, or --rows')
    if a.run: tell(a.run)
    if a.rows: tell_large(a)


if __name__ == '__main__': main()
