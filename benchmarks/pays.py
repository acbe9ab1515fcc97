"""What makes pre-training pay on real charts: read-out, terms of the loss, encoders, one at a time, on PhysioNet 2012.

    MMSN_DATA=folder python benchmarks/pays.py mmsn-pays                       # every arm, evaluated on *validation*
    MMSN_DATA=folder python benchmarks/pays.py mmsn-pays --arms cells both     # some of them
    MMSN_DATA=folder python benchmarks/pays.py mmsn-pays --test                # the chosen preset, read on test once
    MMSN_DATA=folder python benchmarks/pays.py mmsn-both --vitals-labs         # two modalities of one stay, read on test: pays_vitals_labs.csv

Arms are the preset `physionet2012` with a few changes. Pre-training sees the training charts only, and never a label. Where it is chosen,
probes are fitted on training patients and read on validation patients, the test split is not touched; `--test` reads test. Writes
nbs/results/pays.csv (or pays_test.csv), and pays_recall.csv (or pays_test_recall.csv) with the R² of the channels' statistics. Trained arms
are kept in the folder, and a second call goes on from there.
"""
import argparse, os, time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from mmsn.config import cli, load_config
from mmsn.data.cohort import Cohort
from mmsn.evaluate.evaluation import evaluate
from mmsn.evaluate.features import beside, channel_recall, extract_features, feature_matrix, joint_facts, plain_baselines
from mmsn.evaluate.probes import fit_probe, low_shot
from mmsn.evaluate.task import Task, make_draws
from mmsn.evaluate.trees import fit_booster
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


def task_of(cohort):
    "Labels of train, and of validation in the place of test."
    whole = Task.of(cohort, (), cohort.rows(None, ['ehr'], 'any'))
    on = np.isin(whole.split, ('train', 'val'))
    split = np.where(whole.split[on] == 'train', 'train', 'test')
    return Task(whole.labels[on], split, whole.subjects[on], whole.names, whole.groups, whole.ids[on], whole.rows[on])


def scores(X, task, draws, row, solver=partial(fit_probe, folds=5)):
    "AUROC and AUPRC by fraction and draw."
    t = low_shot({'joint': X}, task, draws, row, solver, resamples=0)
    t = t[(t.label == 'mortality') & t.metric.isin(('auroc', 'auprc'))]
    return t.rename(columns=dict(encoder='row'))[['row', 'fraction', 'draw', 'metric', 'value']]


def read_arm(model, cohort, task, draws, facts, plain, encoder):
    "Scores of the frozen chart with facts, and with the plain features too; R² of the channels' statistics."
    X = feature_matrix(extract_features(model.eval(), cohort, task.rows), 'ehr')
    stacked = [scores(beside(X, plain), task, draws, 'stacked')]*(encoder == 'pretrained')
    recall = channel_recall(X, cohort, task.rows, 'ehr', task.at('train'), task.at('test'), ('Weight',)).groupby('statistic').r2.median()
    return pd.concat([scores(beside(X, facts), task, draws, encoder), *stacked]), recall


def study(cohort, models, epochs):
    "Every arm read on validation: nbs/results/pays.csv and pays_recall.csv."
    task = task_of(cohort)
    draws, train = make_draws(task, FRACTIONS), task.at('train')
    facts, base = joint_facts(cohort, task.rows, train, ['ehr']), plain_baselines(cohort, task.rows, train, ['ehr'])
    rows = [scores(base['plain']['joint'], task, draws, 'plain').assign(arm='plain'),
            scores(base['booster']['joint'], task, draws[draws.fraction > 0], 'booster', fit_booster).assign(arm='plain')]
    recalls = []
    for (arm, seed), (model, seconds) in models.items():
        for encoder, m in (('pretrained', model), ('random', model.untrained())):
            table, recall = read_arm(m, cohort, task, draws, facts, base['plain']['joint'], encoder)
            rows.append(table.assign(arm=arm, seed=seed, seconds=seconds))
            recalls.append(recall.round(3).to_frame().T.assign(arm=arm, seed=seed, encoder=encoder))
        print(arm, seed, seconds, rows[-2].query('metric == "auroc"').groupby('fraction').value.mean().round(3).to_dict(), flush=True)
    pd.concat(rows).assign(epochs=epochs).round(4).to_csv(RESULTS/'pays.csv', index=False)
    pd.concat(recalls).to_csv(RESULTS/'pays_recall.csv', index=False)


def test(out, models, epochs, name='pays_test'):
    "The preset read on test, its baselines beside the first seed: nbs/results/NAME.csv and NAME_recall.csv."
    tables, recalls = [], []
    for i, seed in enumerate(seed for _, seed in models):
        run = out/f'preset-{seed}-{epochs:g}'
        protocols = ['low_shot', 'linear_probe', *['supervised', 'finetune']*(i == 0)]
        more = []
        if name != 'pays_test': protocols, more = ['low_shot'], ['bootstrap=200', f'baselines={str(i == 0).lower()}']   # two modalities: a question of rows, not of networks
        if not (run/'report'/'about.json').is_file():
            evaluate(run, [f'protocols=[{",".join(protocols)}]', 'shots=[]', 'map_samples=20', f'fractions={list(FRACTIONS)}', *more], page=False)
        tables.append(pd.read_csv(run/'report'/'summary.csv').assign(seed=seed))
        recalls.append(pd.read_csv(run/'report'/'channels.csv').assign(seed=seed))
    pd.concat(tables).round(4).to_csv(RESULTS/f'{name}.csv', index=False)
    if name == 'pays_test': pd.concat(recalls).groupby(['seed', 'encoder', 'statistic']).r2.median().round(3).to_csv(RESULTS/f'{name}_recall.csv')


def folder_of(out, arm, seed, epochs): return out/f'{"".join(c if c.isalnum() else "-" for c in arm)}-{seed}-{epochs:g}'


def train_arm(out, cohort, arm, changes, seed, epochs, preset='physionet2012'):
    "The trained model of one arm and seed, and the CPU seconds it took; trained only where it is not there."
    folder = folder_of(out, arm, seed, epochs)
    config = load_config(preset, [f'data.cohort={cohort.folder}', f'train.run={folder}', f'train.seed={seed}',
                                           f'optim.epochs={epochs}', 'train.threads=1', 'train.probe_every=0', *changes])
    clock = folder/'seconds.txt'
    if not clock.is_file():
        start, trainer = time.process_time(), Trainer(config, cohort)
        trainer.fit()
        if trainer.step < trainer.total: raise SystemExit(f'stopped at step {trainer.step} of {trainer.total}: the same command goes on')
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
    p.add_argument('--vitals-labs', action='store_true', help='the preset of two modalities, read on test')
    p.add_argument('--ready', action='store_true', help='read what is trained, train nothing')
    p.add_argument('--only-train', action='store_true', help='train what is not there and stop')
    a = p.parse_args(argv)
    if unknown := [arm for arm in a.arms or () if arm not in ARMS]: raise InputError(f'no arm {unknown[0]!r}: there is {", ".join(ARMS)}')
    if not (data := os.environ.get('MMSN_DATA')): raise InputError('set MMSN_DATA to the folder with physionet2012/')
    place = a.out/'cohort'
    cohort = Cohort.open(place) if place.exists() else physionet2012(Path(data)/'physionet2012', place, vitals_labs=a.vitals_labs)
    on_test, preset = a.test or a.vitals_labs, 'physionet2012_vitals_labs' if a.vitals_labs else 'physionet2012'
    arms = {'preset': []} if on_test else {k: ARMS[k] for k in a.arms or ARMS}
    epochs = a.epochs or (load_config(preset).optim.epochs if on_test else 20)
    models = {}
    for seed in a.seeds:
        for arm, changes in arms.items():
            if a.ready and not (folder_of(a.out, arm, seed, epochs)/'seconds.txt').is_file(): continue
            models[arm, seed] = train_arm(a.out, cohort, arm, changes, seed, epochs, preset)
            print(f'{arm}, seed {seed}: {models[arm, seed][1]} s', flush=True)
    if a.only_train: return
    if on_test: test(a.out, models, epochs, 'pays_vitals_labs' if a.vitals_labs else 'pays_test')
    else: study(cohort, models, epochs)


if __name__ == '__main__': main()
