"""How fast 95 % intervals come: AUROC and AUPRC of 25 labels, 12,000 subjects, 1,000 resamples, beside a loop over scikit-learn.

    python benchmarks/bootstrap.py                                   # seconds
    python benchmarks/bootstrap.py --labels 14 --subjects 2000 --resamples 200 --loop 200

`mmsn.evaluate.metrics.bootstrap` sorts each label once and takes each resample as weights of the rows. The loop does what is
usually done, on the same resamples: weigh the rows, then `roc_auc_score` and `average_precision_score` for every label. It takes
minutes for all resamples, so `--loop` of them state its rate; on these its numbers, and the intervals of the macro means made of
them, have to be ours to 1e-10, or the script fails. `--save` writes the line to nbs/results/bootstrap.csv.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

from mmsn.options import InputError
from mmsn.config import cli
from mmsn.evaluate.metrics import METRICS, bootstrap, interval, macro, subject_weights

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'


def patients(labels, subjects, seed=0):
    "Labels and scores (N, K) of known difficulty, prevalence 2 to 30 %, a twentieth unknown; a fifth of the subjects come twice."
    rng = np.random.default_rng(seed)
    who = np.concatenate([np.arange(subjects), np.arange(subjects//5)])
    y = (rng.random((len(who), labels)) < np.linspace(.02, .3, labels)).astype(float)
    scores = rng.normal(size=y.shape) + y*np.linspace(.3, 1.8, labels)
    y[rng.random(y.shape) < .05] = np.nan
    return y, scores.round(3), who      # rounded, so that there are ties


def loop(y, scores, weights):
    "dict metric -> (R, K): scikit-learn, one label and one resample at a time."
    known, functions = ~np.isnan(y), (roc_auc_score, average_precision_score)
    found = np.full((2, weights.shape[1], y.shape[1]), np.nan)
    for r, w in enumerate(weights.T):
        for k, rows in enumerate(known.T):
            for m, f in enumerate(functions): found[m, r, k] = f(y[rows, k], scores[rows, k], sample_weight=w[rows])
    return dict(zip(METRICS, found))


def timed(f, *args, **kw):
    "(result, seconds)."
    start = time.perf_counter()
    return f(*args, **kw), time.perf_counter() - start


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--labels', type=int, default=25, help='labels')
    p.add_argument('--subjects', type=int, default=12_000, help='subjects; a fifth of them have two rows')
    p.add_argument('--resamples', type=int, default=1000, help='resamples of subjects')
    p.add_argument('--loop', type=int, default=20, help='resamples that scikit-learn is given, the first ones')
    p.add_argument('--save', action='store_true', help='write nbs/results/bootstrap.csv')
    args = p.parse_args(argv)
    if not 2 <= args.loop <= args.resamples: raise InputError('--loop should lie between 2 and --resamples')
    y, scores, who = patients(args.labels, args.subjects)
    ours, seconds = timed(bootstrap, y, scores, who, args.resamples)
    weights = next(subject_weights(who, args.resamples)) if args.loop <= 64 else np.concatenate(list(subject_weights(who, args.resamples)), 1)
    theirs, slow = timed(loop, y, scores, weights[:, :args.loop].astype(np.float64))
    worst = max(abs(ours[m][:args.loop] - theirs[m]).max() for m in METRICS)
    for m in METRICS: worst = max(worst, *(abs(a - b) for a, b in zip(interval(macro(ours[m][:args.loop])), interval(macro(theirs[m])))))
    rate, theirs_rate = args.labels*args.resamples/seconds, args.labels*args.loop/slow
    row = dict(labels=args.labels, subjects=args.subjects, rows=len(y), resamples=args.resamples, seconds=round(seconds, 2), loop_resamples=args.loop,
               loop_seconds=round(slow, 2), loop_estimate=round(args.labels*args.resamples/theirs_rate), ratio=round(rate/theirs_rate, 1), largest_difference=float(f'{worst:.1e}'))
    print(f'{args.labels} labels x {args.subjects:,} subjects ({len(y):,} rows) x {args.resamples:,} resamples, AUROC and AUPRC')
    print(f'mmsn          {seconds:8.1f} s   {rate:9,.0f} label-resamples a second')
    print(f'scikit-learn  {slow:8.1f} s   {theirs_rate:9,.0f} label-resamples a second, on {args.loop} of the resamples: {row["loop_estimate"]:,} s for all')
    print(f'ratio         {row["ratio"]:8.1f}     largest difference of a value or an interval on the same resamples {worst:.1e}')
    if worst > 1e-10: raise InputError(f'the two differ by {worst:.1e}: one of them is wrong')
    if args.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(RESULTS/'bootstrap.csv', index=False)


if __name__ == '__main__': main()
