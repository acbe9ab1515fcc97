"""The demo against its bars: three pre-training seeds, without modality dropping, and with broken pairs (the control).

    python benchmarks/demo_bars.py mmsn-bars            # everything, about two hours on two cores; goes on where it stopped
    python benchmarks/demo_bars.py mmsn-bars --seeds 0 --others 0  # a first look

Writes nbs/results/demo.csv (the README's table) and nbs/results/demo_bars.csv (every bar, reached or not).
"""
import argparse
import math
from pathlib import Path

import pandas as pd

from mmsn.config import cli, load_config
from mmsn.demo import demo
from mmsn.evaluate.evaluation import evaluate
from mmsn.train import train

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'
FRACTIONS = (.01, .1, 1.)


def variant(out, name, seed, *overrides):
    "A run on the same cohort with other settings, evaluated without baselines; returns its folder."
    run = out/f'{name}-{seed}'
    config = load_config('demo', [f'data.cohort={out/"seed-0"/"cohort"}', f'train.run={run}', f'train.seed={seed}', *overrides])
    train(config)
    if not (run/'report'/'about.json').is_file(): evaluate(run, ['baselines=false', 'bootstrap=100', 'protocols=[low_shot,robustness,retrieval]', 'corruptions=[patches]', 'shots=[]'])
    return run


def main_run(out, seed):
    "The demo itself with one seed; later seeds use the first one's cohort."
    folder = out/f'seed-{seed}'
    if seed and not folder.exists():
        folder.mkdir(parents=True)
        (folder/'cohort').symlink_to((out/'seed-0'/'cohort').resolve())
    if not (folder/'run'/'report'/'about.json').is_file(): demo(folder, seed=seed)
    return folder/'run'


def taught(run):
    "Robustness of a run with a probe that is fitted also on training patients with hidden patches; returns the table."
    place = run.parent/'masked'
    if not (place/'about.json').is_file():
        evaluate(run, ['protocols=[robustness]', 'corruptions=[patches]', 'probe_masked=true', 'baselines=false', 'pictures=false'], place, page=False)
    return pd.read_csv(place/'robustness.csv').query("encoder != 'pretrained'")


def scores(runs):
    "Mean AUROC over runs: a series by (input, encoder, fraction)."
    return pd.concat([pd.read_csv(r/'report'/'summary.csv').query('shots == 0 and fraction in @FRACTIONS') for r in runs]).groupby(['input', 'encoder', 'fraction'], sort=False).auroc.mean()


def mean_of(runs, name, **where):
    "Mean over runs of the rows of a report's table that match."
    tables = [pd.read_csv(r/'report'/f'{name}.csv') for r in runs]
    return pd.concat([t[(t[list(where)] == pd.Series(where)).all(axis=1)] for t in tables])


def searched(runs):
    "Rows of retrieval of the pretrained encoder, both ways, in the space that its contrast learned where it has one."
    t = mean_of(runs, 'retrieval', encoder='pretrained')
    return t[t.space == ('contrast' if (t.space == 'contrast').any() else 'embedding')]


def bars(runs, without, control):
    "Every bar of the demo: what is measured, what it is held against, whether it is reached."
    s, rows = scores(runs), []
    def bar(name, value, least): rows.append(dict(bar=name, value=round(value, 4), bound=round(least, 4), relation='>=', reached=value >= least))
    def most(name, value, bound): rows.append(dict(bar=name, value=round(value, 4), bound=round(bound, 4), relation='<=', reached=value <= bound))
    for other, margin in (('random', .02), ('plain', .01), ('scratch', .01)): bar(f'fused, 1 %: {other} + {margin}', s['joint', 'pretrained', .01], s['joint', other, .01] + margin)
    bar('fused, 10 %: random + 0.015', s['joint', 'pretrained', .1], s['joint', 'random', .1] + .015)
    for f in FRACTIONS: bar(f'image, {f:.0%}: random + 0.04', s['cxr', 'pretrained', f], s['cxr', 'random', f] + .04)
    for f in FRACTIONS: bar(f'image, {f:.0%}: plain image', s['cxr', 'pretrained', f], s['cxr', 'plain', f])
    for f in (.01, .1): bar(f'EHR, {f:.0%}: random + 0.01', s['ehr', 'pretrained', f], s['ehr', 'random', f] + .01)
    if without: bar('modality dropping, fused 1 %: without it, same seeds', scores(runs[:len(without)])['joint', 'pretrained', .01], scores(without)['joint', 'pretrained', .01])
    k = load_config(runs[0]/'config.yaml').loss.prototypes
    last = pd.concat([pd.read_csv(r/'metrics.csv').tail(10) for r in runs])
    most('image anchors, cross entropy: log K - 0.2', last['cxr/cross_entropy'].mean(), math.log(k) - .2)
    for name, input, bound in (('fused', 'joint', .059), ('image alone', 'cxr', .10)):
        hidden = mean_of(runs, 'robustness', encoder='pretrained', input=input, corruption='patches', severity=.7)
        most(f'70 % of patches masked, relative loss, {name}', hidden.relative_loss.mean(), bound)
        hidden = pd.concat([taught(r) for r in runs]).query('input == @input and severity == .7')
        most(f'70 % of patches masked, relative loss, {name}, probe also on masked copies', hidden.relative_loss.mean(), bound)
    pairs, cca = searched(runs), mean_of(runs, 'retrieval', encoder='CCA of plain features')
    bar('image <-> EHR, recall@10, times chance', pairs.times_chance.mean(), 2.6)
    bar('image <-> EHR, recall@10, times chance: CCA of plain features', pairs.times_chance.mean(), cca.times_chance.mean())
    bar('image <-> EHR, pair AUROC', pairs.pair_auroc.mean(), .64)
    bar('image <-> EHR, same phenotype among the ten nearest: chance', pairs.same_phenotype.mean(), pairs.same_phenotype_chance.mean())
    if control:
        broken = searched(control)
        # "at chance": the lower end of its interval does not lie above it
        most('control: lower end of recall@10', broken.low.mean(), broken.chance.mean())
        most('control: lower end of pair AUROC', broken.pair_low.mean(), .5)
    return pd.DataFrame(rows)


def table(runs, control):
    "The README's table: one row an input and encoder."
    broken = [scores(control).rename({'pretrained': 'shuffled pairs'}, level='encoder')] if control else []
    t = pd.concat([scores(runs), *broken]).unstack('fraction')
    order = [(i, e) for i in ('joint', 'cxr', 'ehr') for e in ('pretrained', 'random', 'scratch', 'plain', 'booster', *['shuffled pairs']*bool(control))]
    t = t.reindex(order).round(3)
    t.columns = [f'{c:.0%} of labels' for c in t.columns]
    return t.rename_axis(['input', 'encoder']).reset_index()


@cli
def main(argv=None):
    p = argparse.ArgumentParser('demo_bars', description=__doc__.splitlines()[0])
    p.add_argument('out', type=Path, help='folder for the runs')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='pre-training seeds (default: 0 1 2)')
    p.add_argument('--others', type=int, default=2, help='how many of the seeds are also run without modality dropping and with broken pairs (default: 2)')
    args = p.parse_args(argv)
    runs = [main_run(args.out, s) for s in args.seeds]
    without = [variant(args.out, 'no-dropping', s, 'fusion.drop=0', 'fusion.space=shared', 'fusion.aim=mean') for s in args.seeds[:args.others]]
    control = [variant(args.out, 'shuffled', s, 'data.shuffle_pairs=true') for s in args.seeds[:args.others]]
    RESULTS.mkdir(exist_ok=True)
    table(runs, control).to_csv(RESULTS/'demo.csv', index=False)
    found = bars(runs, without, control)
    found.to_csv(RESULTS/'demo_bars.csv', index=False)
    print(table(runs, control).to_string(index=False), found.to_string(index=False), sep='\n\n')


if __name__ == '__main__': main()
