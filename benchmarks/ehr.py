"""Stays a CPU-second through views, encoder and the term on cells, in batch and stay by stay.

    python benchmarks/ehr.py                        # 48-hour stays, batches of 64, LSTM of 128 units, 1 random and 2 focal views
    python benchmarks/ehr.py --encoder axial --focal 10 --batch 128

Both do what a training step of `ehr_lstm` with `loss.cells` does, forward and backward: draw the views, encode them, and ask the states
for the values that were hidden and for the next hour. In batch, every view, mask and window is one operation of a tensor for all stays. The peers:

stay by stay   the same model and functions called with one stay at a time, gradients added up; its views are equal to the batch's (compared here)
numpy views    a Dataset that makes the views of one stay with numpy and pads them, as most code for charts does; encoder and term in batch

All run in float32 with one thread, alternating; medians of CPU seconds.
"""
import argparse, statistics, tempfile, time
from pathlib import Path

import numpy as np
import torch

from mmsn.commands import cli
from mmsn.config import load_config
from mmsn.groups import embed
from mmsn.model import MMSN
from mmsn.prepare import synthetic
from mmsn.views.patient import SeriesView


def open_model(a, folder):
    "The model with its term on cells, and the cohort."
    cohort = synthetic(folder/'cohort', patients=4*a.batch, image_size=16, seed=0, say=len)
    words = [f'data.cohort={cohort.folder}', f'optim.batch_size={a.batch}', 'loss.cells.weight=1', 'loss.cells.kind=[forecast, value]' if a.encoder != 'axial' else 'loss.cells.kind=[value]',
             f'modalities.ehr.encoder.name={a.encoder}', f'modalities.ehr.views.focal={a.focal}', *a.changes]
    torch.manual_seed(0)
    return MMSN.from_config(load_config('ehr_lstm', words), cohort).train(), cohort


def parts_of(model, views, present):
    "Encoder and term of these anchors (list of `SeriesView`), each a function to call."
    states, n = [], sum(v.n for v in views)
    encode = lambda: embed(model.online, 'ehr', views, present, n, states)
    ask = lambda h: model.auxiliary['cells'].series['ehr'](views, states, present, model.target.encoders['ehr'], h)[0]
    return encode, ask


def learn(model, make_views, present, weight=1.):
    "Views, encoder, term and backward pass; CPU seconds of each."
    clock = [time.process_time()]
    def lap(value): clock.append(time.process_time()); return value
    views = lap(make_views())
    encode, ask = parts_of(model, views, present)
    h = lap(encode())
    loss = lap(ask(h))
    lap((weight*loss).backward())
    return np.diff(clock)


def in_batch(model, batch): return learn(model, lambda: model.views(batch, 0, 0).anchors['ehr'], batch.present['ehr'])


def stay_by_stay(model, batch):
    "The same with each stay on its own."
    total = 0
    for i, length in enumerate(batch.lengths['ehr'].tolist()):
        own = batch.select(slice(i, i + 1))
        own.data['ehr'] = own.data['ehr'][:, :length]                # as it is without the others' padding
        total = total + learn(model, lambda: model.views(own, 0, 0).anchors['ehr'], own.present['ehr'], 1/batch.size)
    return total


def numpy_views(x, recipe, owner, normal, rng):
    "Random and focal views of one stay (T, C): [(view, truth)], as a Dataset would make them."
    made, K = [], owner.max() + 1
    for n, masks, share in ((recipe.random, recipe.random_masks, (1., 1.)), (recipe.focal, recipe.focal_masks, recipe.focal_window)):
        for _ in range(n):
            T = max(int(len(x)*rng.uniform(*share)), 1)
            start = rng.integers(len(x) - T + 1)
            truth, hidden = x[start:start + T], np.zeros((T, K), bool)
            hidden.ravel()[rng.permutation(T*K)[:int(T*K*masks.cell)]] = True
            hidden[rng.permutation(T)[:int(T*masks.time)]] = True
            hidden[:, rng.permutation(K)[:int(K*masks.channel)]] = True
            made.append((np.where(hidden[:, owner], normal, truth), truth))
    return made


def by_dataset(model, batch, rng=np.random.default_rng(0)):
    "The views of each stay by numpy, padded; then the batch."
    part = model.views.parts['ehr']
    owner, normal, ignored, mean, std = (t.numpy() for t in (part.owner, part.normal, part.ignored, part.mean, part.std))
    def collate():
        "(n·B, T, C) of both kinds of view."
        samples = []
        for x, length in zip(batch.data['ehr'].numpy(), batch.lengths['ehr'].tolist()):
            samples.append(numpy_views(np.where(ignored, normal, (x[:length] - mean)/std).astype(np.float32), part.recipe, owner, normal, rng))
        views, r = [], part.recipe.random
        for columns in (range(r), range(r, r + part.recipe.focal)):
            if not len(columns): continue
            flat = [samples[i][j] for j in columns for i in range(len(samples))]
            x, truth = (torch.nn.utils.rnn.pad_sequence([torch.from_numpy(v[k]) for v in flat], batch_first=True) for k in (0, 1))
            views.append(SeriesView(x, torch.tensor([len(v) for v, _ in flat]), len(columns), truth))
        return views
    return learn(model, collate, batch.present['ehr'])


def compare_views(model, batch):
    "The largest difference between a stay's views in the batch and on its own."
    worst, whole = 0., model.views(batch, 0, 0).anchors['ehr']
    for i, length in enumerate(batch.lengths['ehr'].tolist()):
        own = batch.select(slice(i, i + 1))
        own.data['ehr'] = own.data['ehr'][:, :length]
        for a, b in zip(whole, model.views(own, 0, 0).anchors['ehr']):
            rows = a.x[i::batch.size]
            assert torch.equal(a.lengths[i::batch.size], b.lengths)
            worst = max(worst, (rows[:, :b.x.shape[1]] - b.x).abs().max().item(), rows[:, b.x.shape[1]:].abs().sum().item())
    return worst


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--encoder', choices=['lstm', 'gru', 'transformer', 'axial'], default='lstm')
    p.add_argument('--focal', type=int, default=2, help='focal views')
    p.add_argument('--repeat', type=int, default=5)
    p.add_argument('changes', nargs='*', help='key=value changes of the config')
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, cohort = open_model(a, Path(folder))
        rows = cohort.rows('train', ['ehr'])[:a.batch]
        batch = cohort.batch(rows, ['ehr'], [])
        print(f'{len(rows)} stays of up to {batch.data["ehr"].shape[1]} hours and {batch.data["ehr"].shape[2]} columns, {a.encoder}, {model.views.n} views; '
              f'a stay\'s views in the batch and alone differ by {compare_views(model, batch):g}')
        arms, taken = {'in batch': in_batch, 'stay by stay': stay_by_stay, 'numpy views': by_dataset}, {}
        for run in arms.values(): run(model, batch)
        for _ in range(a.repeat):
            for name, run in arms.items():
                model.zero_grad(set_to_none=True)
                taken.setdefault(name, []).append(run(model, batch))
    print(f'{"stays a CPU-second":16}{"all":>9}{"views":>9}{"encoder":>9}{"term":>9}{"backward":>9}{"ratio":>8}{"of views":>9}')
    mean = {name: np.array([statistics.median(column) for column in zip(*t)]) for name, t in taken.items()}
    for name, seconds in mean.items():
        ours = mean['in batch']
        print(f'{name:16}{len(rows)/seconds.sum():9,.0f}' + ''.join(f'{len(rows)/s:9,.0f}' for s in seconds) + f'{seconds.sum()/ours.sum():8.2f}{seconds[0]/ours[0]:9.2f}')


if __name__ == '__main__': main()
