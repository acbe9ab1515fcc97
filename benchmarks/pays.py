"""What makes pre-training pay on real charts: read-out, terms of the loss, encoders, one at a time, on PhysioNet 2012.

    MMSN_DATA=folder python benchmarks/pays.py mmsn-pays                       # every arm, evaluated on *validation*
    MMSN_DATA=folder python benchmarks/pays.py mmsn-pays --arms cells both     # some of them
    MMSN_DATA=folder python benchmarks/pays.py mmsn-pays --test                # the chosen preset, read on test once

Arms are the preset `physionet2012` with a few changes. Pre-training sees the training charts only, and never a label. Where it is chosen,
probes are fitted on training patients and read on validation patients, the test split is not touched; `--test` reads test. Writes
nbs/results/pays.csv (or pays_test.csv): arm, seed, seconds, row, fraction, draw, metric, value; and pays_recall.csv, the R² of the channels'
statistics. Finished arms are kept in the folder, and a second call goes on from there.
"""
import argparse, os, shutil, time
from pathlib import Path

import numpy as np
import pandas as pd

from mmsn.config import cli, load_config
from mmsn.data.cohort import Cohort
from mmsn.evaluate.features import beside, channel_recall, extract_features, joint_facts, plain_baselines
from mmsn.evaluate.probes import fit_booster, fit_probe, low_shot
from mmsn.evaluate.task import Task, make_draws
from mmsn.loop import Trainer
from mmsn.model import MMSN
from mmsn.options import InputError
from mmsn.prepare import physionet2012

RESULTS, FRACTIONS, SEEDS = Path(__file__).resolve().parents[1]/'nbs'/'results', (.05, .1, .25, 1.), (0, 1, 2)
_E, _V = 'modalities.ehr.encoder', 'modalities.ehr.views'
OLD = [f'{_E}.name=lstm', f'{_E}.pool=mean', f'{_E}.inputs=[]', f'{_E}.dim=128']   # the read-out of version 0.1
NEW = [f'{_E}.name=lstm', f'{_E}.pool=[mean, max, last]', f'{_E}.inputs=[since, count]', f'{_E}.dim=0']
AXIAL = [f'{_E}.{k}={v}' for k, v in dict(name='axial', hidden=24, layers=2, bin=4, dim=0, pool='[last]', inputs='[]').items()]
WHOLE, WINDOWS = [f'{_V}.random=1', f'{_V}.focal=0'], [f'{_V}.random=1', f'{_V}.focal=2']
BARE, MASKED = [f'{_V}.random_masks={{cell: 0}}'], [f'{_V}.random_masks={{cell: .2, channel: .2}}']
def terms(msn, cells, kind='[forecast]', horizon=12):
    return [f'loss.weight={msn}', f'loss.cells.weight={cells}', f'loss.cells.kind={kind}', f'loss.cells.horizon={horizon}']
MSN, NOISE, QUIET = ['loss.weight=1', 'loss.cells.weight=0'], [f'{_V}.noise=0.1'], [f'{_V}.noise=0']
# arm -> changes to the preset; each says everything that distinguishes it, so that it stays what it was when the preset changes
ARMS = {'MSN as in 0.1': [*OLD, *WINDOWS, *BARE, *MSN, *NOISE],
        'MSN': [*NEW, *WINDOWS, *BARE, *MSN, *NOISE],
        'forecast, next hour': [*NEW, *WHOLE, *BARE, *terms(0, 1, horizon=1), *QUIET],
        'forecast': [*NEW, *WHOLE, *BARE, *terms(0, 1), *QUIET],
        'forecast, masked': [*NEW, *WHOLE, *MASKED, *terms(0, 1), *QUIET],
        'forecast, masked, MSN .03': [*NEW, *WHOLE, *MASKED, *terms(.03, 1), *QUIET],
        'forecast, masked, MSN 1': [*NEW, *WHOLE, *MASKED, *terms(1, 1), *QUIET],
        'value': [*NEW, *WHOLE, *MASKED, *terms(0, 1, '[value]'), *QUIET],
        'latent': [*NEW, *WHOLE, *MASKED, *terms(0, 1, '[latent]'), *QUIET],
        'forecast and value': [*NEW, *WHOLE, *MASKED, *terms(0, 1, '[forecast, value]'), *QUIET],
        'both ways': [*NEW, f'{_E}.bidirectional=true', f'{_E}.hidden=64', *WHOLE, *MASKED, *terms(0, 1), *QUIET],
        'axial, value': [*AXIAL, *WHOLE, *MASKED, *terms(0, 1, '[value]'), *QUIET]}


def task_of(cohort, test):
    "The task with the labels of train, and of what is evaluated: test, or validation in its place."
    whole = Task.of(cohort, (), cohort.rows(None, ['ehr'], 'any'))
    on = np.isin(whole.split, ('train', 'test' if test else 'val'))
    split = np.where(whole.split[on] == 'train', 'train', 'test')
    return Task(whole.labels[on], split, whole.subjects[on], whole.names, whole.groups, whole.ids[on], whole.rows[on])


def scores(X, task, draws, row, solver=lambda *a, **k: fit_probe(*a, folds=5, **k)):
    "AUROC and AUPRC by fraction and draw."
    t = low_shot({'joint': X}, task, draws, row, solver, resamples=0)
    return t[(t.label != 'macro') & t.metric.isin(('auroc', 'auprc'))].rename(columns=dict(encoder='row'))[['row', 'fraction', 'draw', 'metric', 'value']]


def read(model, cohort, task, draws, facts, plain, row):
    "Scores of the frozen chart with facts, of it and the plain features together, and its recall of the channels."
    model.eval()
    X = np.stack(extract_features(model, cohort, task.rows)['ehr'])
    rows = [scores(beside(X, facts), task, draws, row)]
    if row != 'random': rows.append(scores(beside(X, plain), task, draws, 'stacked'))
    return pd.concat(rows)


def train_arm(out, cohort, arm, changes, seed, epochs):
    "The trained model of one arm and seed, and the CPU seconds it took; trained only where it is not there."
    folder = out/f'{"".join(c if c.isalnum() else "-" for c in arm)}-{seed}-{epochs:g}'
    config = load_config('physionet2012', [f'data.cohort={cohort.folder}', f'train.run={folder}', f'train.seed={seed}',
                                           f'optim.epochs={epochs}', 'train.threads=1', 'train.probe_every=0', *changes])
    clock = folder/'seconds.txt'
    if not clock.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        start = time.process_time()
        Trainer(config, cohort).fit()
        clock.write_text(f'{time.process_time() - start:.0f}')
    return MMSN.from_pretrained(folder/'encoder'), int(clock.read_text())


@cli
def main(argv=None):
    "Train the arms, read them, write the table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path, help='folder of the cohort and the runs')
    p.add_argument('--arms', nargs='*', help='some of the arms')
    p.add_argument('--seeds', type=int, nargs='*', default=SEEDS)
    p.add_argument('--epochs', type=float, help='of each arm (20; with --test those of the preset)')
    p.add_argument('--test', action='store_true', help='the preset itself, read on test')
    p.add_argument('--only-train', action='store_true', help='train what is not there and stop')
    a = p.parse_args(argv)
    if unknown := [arm for arm in a.arms or () if arm not in ARMS]: raise InputError(f'no arm {unknown[0]!r}: there is {", ".join(ARMS)}')
    if not (data := os.environ.get('MMSN_DATA')): raise InputError('set MMSN_DATA to the folder with physionet2012/')
    place = a.out/'cohort'
    cohort = Cohort.open(place) if place.exists() else physionet2012(Path(data)/'physionet2012', place)
    arms = {'preset': []} if a.test else {k: ARMS[k] for k in a.arms or ARMS}
    epochs = a.epochs or (load_config('physionet2012').optim.epochs if a.test else 20)
    models = {}
    for seed in a.seeds:
        for arm, changes in arms.items():
            models[arm, seed] = train_arm(a.out, cohort, arm, changes, seed, epochs)
            print(f'{arm}, seed {seed}: {models[arm, seed][1]} s', flush=True)
    if not a.only_train: write(a.out, cohort, models, epochs, a.test)


