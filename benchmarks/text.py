"""Images and reports of Indiana University: ConVIRT and GLoRIA trained on pairs, read on patients kept aside.

    MMSN_DATA=folder python benchmarks/text.py mmsn-text               # both objectives; minutes on one core, hours with --epochs 100
    MMSN_DATA=folder python benchmarks/text.py mmsn-text --epochs 20   # longer

A uid counts as a patient. Encoders start at random: a small vision transformer on images of 64 pixels (--resnet: a ResNet-18), a small
transformer on word pieces learned from the training reports. Nothing is chosen by looking at test. Measured on the test split: recall@1, 5, 10 of the other half both ways beside shuffled
pairs, the random start, CCA of plain features and chance; AUROC of labels with 20 positives or more by a linear probe on the frozen image
embedding and by prompts without a label; and on the validation split the contrast at batches of 32, whose value for an encoder that knows
nothing is log 32 = 3.47. Writes nbs/results/text.csv. Trained runs are kept in the folder, and a second call goes on from there.
"""
import argparse, os, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmsn.config import build, check, check_single, cli
from mmsn.data.cohort import Cohort
from mmsn.evaluate.features import extract_features, feature_matrix
from mmsn.evaluate.probes import linear_probe
from mmsn.evaluate.robustness import retrieval
from mmsn.evaluate.task import Task
from mmsn.evaluate.text import zero_shot
from mmsn.loop import Trainer
from mmsn.model import MMSN
from mmsn.objectives.convirt import convirt_loss
from mmsn.objectives.gloria import local_similarity
from mmsn.options import Config, InputError
from mmsn.prepare import iu

RESULTS, SIZE = Path(__file__).resolve().parents[1]/'nbs'/'results', 64
# what a label is called in a report
NAMES = dict(Normal='acute cardiopulmonary abnormality', Pleural_Effusion='pleural effusion', Nodule_Mass='nodule', Scoliosis_Spine='scoliosis', Support_Device='catheter',
             Calcinosis='calcification', Hyperinflation='hyperinflation')


def config_of(objective, cohort, run, epochs, seed, resnet=False):
    "One image view and one text view of each study; the same encoders, batch and steps for both objectives."
    net = dict(name='resnet18', patch=16) if resnet else dict(dim=96, depth=3, heads=4, patch=8, pool='mean', positions='sincos', init='fan_in')
    image = dict(kind='image', encoder=net,
                 views=dict(random=1, focal=0, random_size=SIZE, focal_size=SIZE, random_scale=[.6, 1.], patch_drop=0., blur=0.))
    report = dict(kind='text', encoder=dict(dim=96, depth=2, heads=4, length=80), views=dict(random=1, focal=0, drop=.1, shuffle=.5))
    return check_single(check(build(Config, dict(
        name=objective, modalities=dict(cxr=image, report=report), objective=objective, objectives={objective: dict(dim=128) | (dict(hidden=256) if objective == 'convirt' else {})},
        fusion=dict(dim=0), data=dict(cohort=str(cohort), samples='paired'), optim=dict(batch_size=32, epochs=epochs, lr=1e-3, weight_decay=.02, final_weight_decay=.02),
        train=dict(run=str(run), seed=seed, threads=1, checkpoint_every=10**6)))))


@torch.no_grad()
def validation_loss(model, cohort, rows, batch=32):
    "Mean contrast of validation patients in batches of 32, plain views: ConVIRT's, or GLoRIA's global and local terms together."
    o, (image, text), losses = model.objective, model.objective.names, []
    for at in np.split(rows, range(batch, len(rows), batch)):
        if len(at) < batch: continue
        views = model.views.plain(cohort.batch(at, [image, text], []))
        z = o.space({n: model.target.encoders[n](*v.args()) for n, v in views.items()})
        if not hasattr(o, 'local_heads'):
            losses.append(convirt_loss(z[image], z[text], o.dials.temperature, o.dials.weight))
            continue
        regions = o.regions(model.target.encoders[image].states(*views[image].args()), model.target.encoders[image])
        words = o.words(model.target.encoders[text].states(*views[text].args()), views[text].x, views[text].lengths)
        own = torch.arange(batch)
        for s in (z[image] @ z[text].T, local_similarity(regions, *words)):
            losses.append(sum(torch.nn.functional.cross_entropy(o.dials.pair*m, own) for m in (s, s.T)))
    return float(torch.stack(losses).mean())*(2 if hasattr(o, 'local_heads') else 1)


def measure(name, models, cohort, task):
    "Rows of the table for one objective."
    out, test = [], task.rows[task.at('test')]
    for query, gallery in (('cxr', 'report'), ('report', 'cxr')):
        t = retrieval(models, cohort, test, query, gallery, task=task, resamples=200)
        for r in t[t.space != 'embedding'].itertuples():
            out += [dict(encoder=r.encoder, measure=f'{query} to {gallery}, recall@{k}', value=v, low=low, high=high, chance=k/r.rows, rows=r.rows)
                    for k, v, low, high in ((1, r.recall_1, None, None), (5, r.recall_5, None, None), (10, r.recall, r.low, r.high))]
    tables = {n: extract_features(m, cohort, task.rows) for n, m in models.items()}
    for r in zero_shot(models, cohort, task, 'cxr', 'report', tables, {n: v for n, v in NAMES.items() if n in task.names}, 200).query("metric == 'auroc'").itertuples():
        out.append(dict(encoder=r.encoder, measure=f'zero-shot AUROC, {r.label}', value=r.value, low=r.low, high=r.high, chance=.5, rows=r.rows))
    for n, t in tables.items():
        p = linear_probe({'cxr': feature_matrix(t, 'cxr')}, task, n, resamples=200)
        for r in p.query("metric == 'auroc'").itertuples():
            out.append(dict(encoder=n, measure=f'linear probe AUROC, {r.label}', value=r.value, low=r.low, high=r.high, chance=.5, rows=r.rows))
    val = cohort.rows('val', ['cxr', 'report'], 'paired')
    out += [dict(encoder=n, measure='validation loss at batches of 32', value=validation_loss(m, cohort, val), rows=len(val)) for n, m in models.items()]
    return pd.DataFrame(out).assign(objective=name)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('folder', help='cohort and runs go here')
    p.add_argument('--epochs', type=float, default=10)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--resnet', action='store_true')
    p.add_argument('--objectives', nargs='+', default=['convirt', 'gloria'])
    a = p.parse_args(argv)
    data, folder = Path(os.environ.get('MMSN_DATA', ''))/'iu', Path(a.folder)
    if not data.is_dir(): raise InputError(f'no IU data at {data}: set MMSN_DATA')
    if not (folder/'iu'/'cohort.json').is_file(): iu(data, folder/'iu', size=SIZE, reports=True)
    cohort, tables = Cohort.open(folder/'iu'), []
    known = cohort.label_matrix()
    at = {s: known[cohort.rows(s, ['cxr', 'report'], 'paired')] for s in ('train', 'test')}
    labels = [n for i, n in enumerate(cohort.labels) if min((y[:, i] == 1).sum() for y in at.values()) >= 20]
    task = Task.of(cohort, labels, cohort.rows(None, ['cxr', 'report'], 'paired'))
    for objective in a.objectives:
        config, start = config_of(objective, folder/'iu', folder/f'{objective}-{"resnet" if a.resnet else "vit"}-{a.epochs:g}-{a.seed}', a.epochs, a.seed, a.resnet), time.perf_counter()
        if not (Path(config.train.run)/'encoder').is_dir(): Trainer(config, cohort).fit()
        model = MMSN.from_pretrained(Path(config.train.run)/'encoder')
        tables.append(measure(objective, dict(pretrained=model, random=model.untrained(a.seed).eval()), cohort, task))
        print(f'{objective}: {time.perf_counter() - start:.0f} s', flush=True)
        table = pd.concat(tables)[['objective', 'encoder', 'measure', 'value', 'low', 'high', 'chance', 'rows']].assign(image='resnet18' if a.resnet else 'vit', epochs=a.epochs, seed=a.seed)
        RESULTS.mkdir(exist_ok=True)
        table.round(4).to_csv(RESULTS/'text.csv', index=False)
    print(table[~table.measure.str.contains('AUROC, [A-Z]')].to_string(index=False))


if __name__ == '__main__': main()
