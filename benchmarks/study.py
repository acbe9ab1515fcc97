"""A study of the masks and of what is around them, on synthetic patients of a generator seed that is not the reported one.

    python benchmarks/study.py mmsn-study                     # every arm; goes on where it stopped
    python benchmarks/study.py mmsn-study --arms none 'random only'    # some of them
    python benchmarks/study.py mmsn-study --long              # the main arm, long, several seeds: the study column of the bars
    python benchmarks/study.py mmsn-study --terms             # what each term of the loss brings, alone and beside the others

One arm is the preset `demo` with a few changes. Writes nbs/results/study.csv (or study_long.csv, study_terms.csv): arm, seed, seconds, cross entropies, and
the test AUROC of frozen features by input and share of labels, for the pretrained encoder, the same one untrained, and plain features.
"""
import argparse, math, shutil, time
from pathlib import Path

import pandas as pd

from mmsn.options import InputError
from mmsn.config import cli, load_config
from mmsn.data.cohort import Cohort
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.task import Task, make_draws
from mmsn.evaluate.probes import low_shot, summarise
from mmsn.model import MMSN
from mmsn.prepare import main as prepare
from mmsn.loop import Trainer

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'
_CXR, _EHR = 'modalities.cxr.views', 'modalities.ehr.views'


def views(random, focal): return [f'{v}.{kind}={n}' for v in (_CXR, _EHR) for kind, n in (('random', random), ('focal', focal))]
def ehr(**masks): return [f'{_EHR}.{group}_masks={{{", ".join(f"{k}: {v}" for k, v in ({"cell": 0.} | masks).items())}}}' for group in ('random', 'focal')]


SMALL = [f'{_CXR}.focal_size=32', f'{_CXR}.focal_scale=[0.2,0.5]']   # crops of half the side
MIDDLING = [f'{_CXR}.focal_size=48', f'{_CXR}.focal_scale=[0.35,0.8]']
CELLS = [*SMALL, *ehr(cell=.3)]
BARE = [f'{_CXR}.patch_drop=0', *ehr(), f'{_EHR}.noise=0']   # no patch, cell or hour is hidden; crops and brightness stay
PATCHES = [f'{_CXR}.patch_drop=0.25']
# arm -> (what it belongs to, changes to the preset). Three anchor views a patient, where the name says no other number. Each arm says
# everything that distinguishes it, so that it stays what it was when the preset learns from it.
ARMS = {'both': ('masks', CELLS),
        'none': ('masks', [*views(3, 0), *BARE]),
        'random only': ('masks', [*views(3, 0), *PATCHES, *ehr(cell=.3)]),
        'focal only': ('masks', [*views(0, 3), *SMALL, *BARE]),
        'patches dropped': ('masks', [*PATCHES, *CELLS]),
        'EHR: windows only': ('EHR masks', [*SMALL, *ehr()]),
        'EHR: hours': ('EHR masks', [*SMALL, *ehr(time=.3)]),
        'EHR: channels': ('EHR masks', [*SMALL, *ehr(channel=.3)]),
        'EHR: start': ('EHR masks', [*SMALL, *ehr(drop_start=.3)]),
        'crops of middling size': ('crops', [*MIDDLING, *ehr()]),
        'middling, patches dropped': ('crops', [*MIDDLING, *ehr(), *PATCHES]),
        'large crops only': ('crops', [f'{_CXR}.random=3', f'{_CXR}.focal=0', *ehr()]),
        'two large crops': ('crops', [f'{_CXR}.random=2', f'{_CXR}.focal=0', f'{_EHR}.focal=1', *ehr()]),
        'no modality dropping': ('modalities', [*CELLS, 'fusion.drop=0', 'fusion.space=shared', 'fusion.aim=mean']),
        'one space for all': ('modalities', [*CELLS, 'fusion.space=shared', 'fusion.aim=mean']),
        'no cross-modal aim': ('modalities', [*CELLS, 'fusion.aim=[own, joint]']),
        'no Sinkhorn': ('assignment', [*CELLS, 'loss.sinkhorn_iterations=0']),
        'no Sinkhorn, me-max 5': ('assignment', [*CELLS, 'loss.sinkhorn_iterations=0', 'loss.me_max_weight=5'])}
MAIN = 'crops of middling size'   # what the preset became

NO_MSN, NO_CONTRAST, FORECAST = ['loss.weight=0'], ['fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid'], ['loss.cells.weight=1', 'loss.cells.kind=[forecast]', 'loss.cells.horizon=6']
HIDING = [f'{_CXR}.heavy=1', 'modalities.cxr.encoder.mask_stem=true']
TERMS = {'MSN and contrast': ('terms', []),   # the preset
         'MSN alone': ('terms', NO_CONTRAST),
         'contrast alone': ('terms', NO_MSN),
         'cells alone': ('terms', NO_MSN + NO_CONTRAST + FORECAST),
         'contrast and cells': ('terms', NO_MSN + FORECAST),
         'MSN, contrast and cells': ('terms', FORECAST),
         'one heavily masked view': ('terms', HIDING),
         'one heavily masked view, tokens': ('terms', HIDING + ['loss.tokens.weight=0.5'])}


def score(features, task, draws, encoder):
    "Test AUROC by input and share of labels."
    return summarise(low_shot(features, task, draws, encoder, resamples=0))[['encoder', 'input', 'fraction', 'auroc']]


def frozen(model, cohort, task):
    "Input -> features (N, d) of the task's patients."
    table = extract_features(model.eval(), cohort, task.rows)
    return {name: feature_matrix(table, name) for name in ('joint', *model.config.modalities)}


def run_arm(out, cohort, task, draws, arm, changes, seed, epochs):
    "Train one arm and evaluate it beside the same encoder untrained; returns its rows."
    name = ''.join(c if c.isalnum() else '-' for c in arm)
    folder = out/f'{name}-{seed}-{epochs:g}'
    if (folder/'study.csv').is_file(): return pd.read_csv(folder/'study.csv')
    config = load_config('demo', [f'data.cohort={cohort.folder}', f'train.run={folder}', f'train.seed={seed}', f'optim.epochs={epochs}', 'train.threads=1', *changes])
    start = time.perf_counter()
    trainer = Trainer(config, cohort)
    trainer.fit()
    if trainer.step < trainer.total: raise SystemExit(f'stopped at step {trainer.step} of {trainer.total} of {name}: the same command goes on')   # a signal: half an arm is no result
    seconds = time.perf_counter() - start
    last = pd.read_csv(folder/'metrics.csv').tail(10).mean()
    rows = pd.concat([score(frozen(MMSN.from_pretrained(folder/'encoder'), cohort, task), task, draws, 'pretrained'),
                      score(frozen(MMSN.from_config(config, cohort), cohort, task), task, draws, 'random')])
    known = {k.replace('/', ' '): round(v, 3) for k, v in last.items() if k.endswith('/cross_entropy')}
    rows = rows.assign(arm=arm, seed=seed, epochs=epochs, seconds=round(seconds), chance=round(math.log(config.loss.prototypes), 3), **known)
    rows.to_csv(folder/'study.csv', index=False)
    shutil.rmtree(folder/'checkpoints', ignore_errors=True)
    return rows


def collect(out, plain, epochs, arms):
    "Every arm in the folder that was trained that long, in this call or before, below the plain features."
    found = pd.concat([pd.read_csv(f) for f in sorted(out.glob('*/study.csv'))])
    found = found[(found.epochs == epochs) & found.arm.isin(arms)].sort_values(['arm', 'seed'], key=lambda c: c.map(list(arms).index) if c.name == 'arm' else c, kind='stable')
    return pd.concat([plain, found]).assign(group=lambda t: t.arm.map(lambda n: arms[n][0] if n in arms else 'baseline'))


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('out', type=Path, help='folder of the cohort and of the runs')
    p.add_argument('--arms', nargs='+', default=None, metavar='ARM', help=f'of {", ".join(ARMS)} (default all)')
    p.add_argument('--seeds', type=int, nargs='+', default=[0], help='of the pre-training (default 0)')
    p.add_argument('--main-seeds', type=int, nargs='+', default=[0, 1, 2], help='of the main arm, the preset (default 0 1 2)')
    p.add_argument('--epochs', type=float, default=None, help='of each arm (default 24, 100 with --long, 36 with --terms)')
    p.add_argument('--long', action='store_true', help='only the main arm, for 100 epochs')
    p.add_argument('--terms', action='store_true', help=f'instead the arms {", ".join(TERMS)}, with the epochs of the preset')
    a = p.parse_args(argv)
    known, fractions = (TERMS, (.05, .1, 1.)) if a.terms else (ARMS, (.01, .1, 1.))
    arms, epochs = a.arms or ([MAIN] if a.long else list(known)), a.epochs or (100 if a.long else 36 if a.terms else 24)
    for arm in arms:
        if arm not in known: raise InputError(f'no arm {arm!r}: choose of {", ".join(known)}')
    a.out.mkdir(parents=True, exist_ok=True)
    if not (a.out/'cohort'/'cohort.json').is_file(): prepare(['synthetic', str(a.out/'cohort'), '--seed', '1'])
    cohort = Cohort.open(a.out/'cohort')
    task = Task.of(cohort)
    draws = make_draws(task, fractions, 5)
    plain = score(plain_features(cohort, task.rows, ['cxr', 'ehr']), task, draws, 'plain').assign(arm='plain', epochs=0)
    for arm in arms:
        for seed in (a.main_seeds if arm == MAIN else a.seeds): run_arm(a.out, cohort, task, draws, arm, known[arm][1], seed, epochs)
    made = collect(a.out, plain, epochs, known)
    RESULTS.mkdir(exist_ok=True)
    made.round(4).to_csv(RESULTS/('study_long.csv' if a.long else 'study_terms.csv' if a.terms else 'study.csv'), index=False)
    print(made[made.encoder != 'random'].pivot_table(index=['group', 'arm', 'input'], columns='fraction', values='auroc', sort=False).round(3).to_string())


if __name__ == '__main__': main()
