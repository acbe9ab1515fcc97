"""Images and reports of Indiana University: ConVIRT and GLoRIA trained on pairs, read on patients kept aside.

    MMSN_DATA=folder python benchmarks/text.py mmsn-text                        # both objectives from nothing
    MMSN_DATA=folder python benchmarks/text.py mmsn-text --init-from ENCODER    # the image encoder from images alone, such as the
                                                                                # run of simclr that `rivals.py --images` leaves

A uid counts as a patient. The image encoder is that of the preset `images_open` on images of 64 pixels (--resnet: a ResNet-18), the text
encoder one block over word pieces learned from the training reports: 1,490 pairs teach no larger one, and half of the words are dropped from
each view, or the pairs are learned by heart. The learning rate is chosen on validation with the first seed; test is read once, for every seed.
Measured on the test split: recall@1, 5, 10 of the other half both ways beside shuffled pairs, the random start, CCA of plain features and
chance; AUROC of labels with 20 positives or more by a linear probe on the frozen image embedding, beside the encoder it started from, and by
prompts without a label; and on the validation split the contrast at batches of 32, whose value for an encoder that knows nothing is
log 32 = 3.47. Writes nbs/results/text.csv. Trained runs are kept in the folder, and a second call goes on from there. An encoder that is
started from must not have seen test patients: that of `rivals.py` has the same split, which is compared.
"""
import argparse, os, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmsn.config import build, check, check_single, cli, load_config
from mmsn.config import to_dict as config_to_dict
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

RESULTS, SIZE, STARTED = Path(__file__).resolve().parents[1]/'nbs'/'results', 64, 'images alone'
# what a label is called in a report
NAMES = dict(Normal='acute cardiopulmonary abnormality', Pleural_Effusion='pleural effusion', Nodule_Mass='nodule', Scoliosis_Spine='scoliosis', Support_Device='catheter',
             Calcinosis='calcification', Hyperinflation='hyperinflation')


def config_of(objective, cohort, run, epochs, seed, rate, resnet=False, start=''):
    "One image view and one text view of each study; the same encoders, batch and steps for both objectives."
    net = dict(name='resnet18', patch=16) if resnet else config_to_dict(load_config('images_open'))['modalities']['cxr']['encoder']
    image = dict(kind='image', encoder=net, views=dict(random=1, focal=0, random_size=SIZE, focal_size=SIZE, random_scale=[.8, 1.], patch_drop=0., blur=0., jitter=0.))
    report = dict(kind='text', encoder=dict(dim=96, depth=1, heads=4, length=80), views=dict(random=1, focal=0, drop=.5, shuffle=0.))
    return check_single(check(build(Config, dict(
        name=objective, modalities=dict(cxr=image, report=report), objective=objective, objectives={objective: dict(dim=128) | (dict(hidden=256) if objective == 'convirt' else {})},
        fusion=dict(dim=0), data=dict(cohort=str(cohort), samples='paired'), optim=dict(batch_size=128, epochs=epochs, lr=rate, weight_decay=.3, final_weight_decay=.3),
        train=dict(run=str(run), seed=seed, threads=1, checkpoint_every=10**6, init_from=start)))))


def trained(objective, cohort, a, rate, seed):
    kind = ('resnet' if a.resnet else 'vit') + ('-started' if a.init_from else '')
    run = a.folder/f'{objective}-{kind}-{a.epochs:g}-{rate:g}-{seed}'
    if not (run/'encoder').is_dir(): Trainer(config_of(objective, cohort.folder, run, a.epochs, seed, rate, a.resnet, str(a.init_from or '')), cohort).fit()
    return MMSN.from_pretrained(run/'encoder')


def on_validation(model, cohort):
    "Recall@10 among the validation patients, mean of both ways."
    rows = cohort.rows('val', ['cxr', 'report'], 'paired')
    both = [retrieval({'': model}, cohort, rows, *names, resamples=2).query("space == 'contrast' and encoder == ''").recall.item() for names in (('cxr', 'report'), ('report', 'cxr'))]
    return float(np.mean(both))


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


def measure(models, cohort, task):
    "Rows of the table for one trained model, `pretrained`, its random start, and the encoder of images that it started from."
    out, test, pairs = [], task.rows[task.at('test')], {n: m for n, m in models.items() if n != STARTED}
    for query, gallery in (('cxr', 'report'), ('report', 'cxr')):
        t = retrieval(pairs, cohort, test, query, gallery, task=task, resamples=200)
        for r in t[t.space != 'embedding'].itertuples():
            out += [dict(encoder=r.encoder, measure=f'{query} to {gallery}, recall@{k}', value=v, low=low, high=high, chance=k/r.rows, rows=r.rows)
                    for k, v, low, high in ((1, r.recall_1, None, None), (5, r.recall_5, None, None), (10, r.recall, r.low, r.high))]
    tables = {n: extract_features(m, cohort, task.rows) for n, m in models.items()}
    told = {n: tables[n] for n in pairs}
    for r in zero_shot(pairs, cohort, task, 'cxr', 'report', told, {n: v for n, v in NAMES.items() if n in task.names}, 200).query("metric == 'auroc'").itertuples():
        out.append(dict(encoder=r.encoder, measure=f'zero-shot AUROC, {r.label}', value=r.value, low=r.low, high=r.high, chance=.5, rows=r.rows))
    for n, t in tables.items():
        p = linear_probe({'cxr': feature_matrix(t, 'cxr')}, task, n, resamples=200)
        for r in p.query("metric == 'auroc'").itertuples():
            out.append(dict(encoder=n, measure=f'linear probe AUROC, {r.label}', value=r.value, low=r.low, high=r.high, chance=.5, rows=r.rows))
    val = cohort.rows('val', ['cxr', 'report'], 'paired')
    out += [dict(encoder=n, measure='validation loss at batches of 32', value=validation_loss(m, cohort, val), rows=len(val)) for n, m in pairs.items()]
    return pd.DataFrame(out)


def same_split(start, cohort):
    "Raise InputError where an encoder of `rivals.py` was trained on other patients than the training ones of this cohort."
    listed = Path(start).parent/'pretrained_on.csv'
    other = Path(start).parents[1]/'images'/'samples.parquet'      # the joined cohort beside the run
    if not (listed.is_file() and other.is_file()): raise InputError(f'{start} does not say whom it was trained on: name the encoder of a run that rivals.py --images left')
    theirs = pd.read_parquet(other).query("source == 'iu'")
    ours = set(cohort.samples[cohort.samples.split == 'train'].subject_id.astype(str))
    seen = set(theirs[theirs.subject_id.isin(pd.read_csv(listed).subject_id)].subject.str.removeprefix('iu:'))
    if not seen or seen - ours: raise InputError(f'{start} was trained on patients that are no training patients here')


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('folder', type=Path, help='cohort and runs go here')
    p.add_argument('--epochs', type=float, default=30)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--rates', type=float, nargs='+', default=[5e-4, 1e-3], help='of which validation chooses one')
    p.add_argument('--init-from', type=Path, help='an encoder of images alone')
    p.add_argument('--resnet', action='store_true')
    p.add_argument('--objectives', nargs='+', default=['convirt', 'gloria'])
    a = p.parse_args(argv)
    data = Path(os.environ.get('MMSN_DATA', ''))/'iu'
    if not data.is_dir(): raise InputError(f'no IU data at {data}: set MMSN_DATA')
    if not (a.folder/'iu'/'cohort.json').is_file(): iu(data, a.folder/'iu', size=SIZE, reports=True)
    cohort = Cohort.open(a.folder/'iu')
    if a.init_from: same_split(a.init_from, cohort)
    known = cohort.label_matrix()
    at = {s: known[cohort.rows(s, ['cxr', 'report'], 'paired')] for s in ('train', 'test')}
    labels = [n for i, n in enumerate(cohort.labels) if min((y[:, i] == 1).sum() for y in at.values()) >= 20]
    task = Task.of(cohort, labels, cohort.rows(None, ['cxr', 'report'], 'paired'))
    image = ('resnet18' if a.resnet else 'vit') + (' from images alone' if a.init_from else '')
    for objective in a.objectives:
        path, start = RESULTS/'text.csv', time.perf_counter()
        scores = {rate: on_validation(trained(objective, cohort, a, rate, a.seeds[0]), cohort) for rate in a.rates}
        rate = max(scores, key=scores.get)
        print(f'{objective}: recall@10 on validation by learning rate { {r: round(v, 4) for r, v in scores.items()} }', flush=True)
        for seed in a.seeds:
            done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=['objective', 'image', 'epochs', 'seed'])
            same = (done.objective == objective) & (done.image == image) & (done.epochs == a.epochs) & (done.seed == seed)
            if same.any(): continue
            model = trained(objective, cohort, a, rate, seed)
            models = dict(pretrained=model, random=model.untrained(seed).eval()) | ({STARTED: MMSN.from_pretrained(a.init_from)} if a.init_from else {})
            table = measure(models, cohort, task).assign(objective=objective, image=image, epochs=a.epochs, seed=seed, lr=rate)
            table = pd.concat([done, table[['objective', 'encoder', 'measure', 'value', 'low', 'high', 'chance', 'rows', 'image', 'epochs', 'seed', 'lr']].round(4)])
            RESULTS.mkdir(exist_ok=True)
            table.to_csv(path, index=False)
        print(f'{objective}: {time.perf_counter() - start:.0f} s', flush=True)
    table = pd.read_csv(path)
    few = table[~table.measure.str.contains('AUROC, [A-Z]')]
    print(few.groupby(['objective', 'image', 'encoder', 'measure'], sort=False).value.mean().round(4).to_string())


if __name__ == '__main__': main()
