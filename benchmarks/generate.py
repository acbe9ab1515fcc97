"""How well DALL-E draws what a report asks for, on synthetic patients whose reports say what their images show.

    python benchmarks/generate.py mmsn-generate               # all of it; goes on where it stopped

Prepares a cohort with reports (seed 5, not that of any other study), trains the presets `vae` and `dalle`, and a reader: a small
convolutional network that finds the findings in *real* training images. The reader then looks at the held-out patients' real images, at
what the VAE's words keep of these, at images drawn from their reports, and at images drawn from the report of somebody else (the control,
whose AUROC is .5 if the reader judges nothing but what was asked for). A finding counts where the report speaks of it with presence.

Writes nbs/results/generate.csv (images, finding, AUROC, 95 % interval over patients), nbs/results/generate_curves.csv (the losses of both
runs), WORK/grid.png and of that a small copy, nbs/images/drawn.png.
"""
import argparse, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from mmsn.config import cli, load_config
from mmsn.data.cohort import Cohort
from mmsn.data.synthetic import CONDITIONS
from mmsn.generate.images import show_grid
from mmsn.generate.model import open_generator, resized
from mmsn.prepare import synthetic
from mmsn.run import run_config
from mmsn.show import plt, save_figure
from mmsn.train import train

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'
FINDINGS = ('heart failure', 'oedema', 'pneumonia', 'effusion', 'pneumothorax', 'copd', 'tamponade', 'sepsis', 'stroke', 'diabetes')   # that reports name
SIZE, WIDTHS = 64, (24, 48, 96, 128)


class Reader(nn.Module):
    "Images (B, 1, 64, 64) in 0..1 -> logits of the findings."
    def __init__(self, findings):
        super().__init__()
        layers = [layer for a, b in zip((1, *WIDTHS), WIDTHS)
                  for layer in (nn.Conv2d(a, b, 3, 2 if a > 1 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())]
        self.net = nn.Sequential(nn.AvgPool2d(1), *layers, nn.Flatten(2))
        self.out = nn.Linear(2*WIDTHS[-1], findings)

    def forward(self, x):
        h = self.net(2*x - 1)
        return self.out(torch.cat([h.mean(2), h.amax(2)], 1))


def real_images(cohort, rows): return resized(cohort.batch(rows, ['cxr']).data['cxr'], SIZE)


def shifted(x, generator):
    "Images moved by up to three pixels, a little brighter or darker and blurred or not: a reader should not rest on single pixels."
    dx, dy = torch.randint(-3, 4, (2,), generator=generator).tolist()
    x = torch.roll(x, (dy, dx), (2, 3))
    if torch.rand((), generator=generator) < .5: x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode='replicate'), 3, 1)
    return x*(1 + .2*(torch.rand(len(x), 1, 1, 1, generator=generator) - .5)) + .03*torch.randn(x.shape, generator=generator)


def train_reader(x, y, epochs, batch=64, lr=3e-3):
    torch.manual_seed(0)
    model, g = Reader(y.shape[1]), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=.01)
    steps = epochs*(len(x)//batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(batch)[:len(x)//batch]:
            loss = F.binary_cross_entropy_with_logits(model(shifted(x[rows], g)), y[rows])
            optimiser.zero_grad(); loss.backward(); optimiser.step(); rate.step()
        print(f'reader, epoch {epoch + 1}: loss {loss.item():.3f}', flush=True)
    return model.eval()


@torch.no_grad()
def read(model, x): return torch.cat([model(part).sigmoid() for part in x.split(256)]).numpy()


def scores(p, y, draws=500):
    "(finding, AUROC, low, high) of each finding, and of their mean, from resampled patients."
    rng, n = np.random.default_rng(0), len(y)
    def all_of(rows): return np.array([roc_auc_score(y[rows, k], p[rows, k]) for k in range(y.shape[1])])
    point, again = all_of(np.arange(n)), []
    while len(again) < draws:
        rows = rng.integers(0, n, n)
        if (y[rows].sum(0) > 0).all(): again.append(all_of(rows))
    again = np.array(again)
    low, high = np.percentile(again, (2.5, 97.5), 0)
    mean = np.percentile(again.mean(1), (2.5, 97.5))
    return [*zip(FINDINGS, point, low, high), ('mean', point.mean(), *mean)]


def curves(runs):
    "The losses of the runs, every twentieth row."
    parts = []
    for name, run in runs.items():
        t = pd.read_csv(run/'metrics.csv')
        t = t.iloc[[*range(0, len(t) - 1, max(1, len(t)//25)), len(t) - 1]]
        parts.append(t[['step', 'epoch', *[c for c in ('error', 'words', 'text', 'image') if c in t], 'loss']].assign(objective=name))
    table = pd.concat(parts)
    return table[['objective', 'step', 'epoch', 'loss', *[c for c in ('error', 'words', 'text', 'image') if c in table]]].round(5)


@cli
def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('work', type=Path, help='folder of cohort and runs')
    p.add_argument('--patients', type=int, default=6000)
    p.add_argument('--reader-epochs', type=int, default=10)
    p.add_argument('--test', type=int, default=600, help='held-out patients that are drawn')
    p.add_argument('--change', action='append', default=[], help='key=value of the preset vae or dalle, as vae:key=value')
    a = p.parse_args()
    folder, start = a.work/'cohort', time.time()
    cohort = Cohort.open(folder) if (folder/'cohort.json').is_file() else synthetic(folder, patients=a.patients, seed=5, reports=True)
    def run(name, *more):
        own = [c.partition(':')[2] for c in a.change if c.startswith(f'{name}:')]
        return train(load_config(name, [f'data.cohort={folder}', f'train.run={a.work/name}', *more, *own]), cohort)
    runs = dict(vae=run('vae'))
    runs['dalle'] = run('dalle', f'objectives.dalle.vae={runs["vae"]}')
    labels = [CONDITIONS[c] for c in FINDINGS]
    rows = {s: cohort.rows(s, ['cxr', 'report'], 'paired') for s in ('train', 'test')}
    y = {s: cohort.label_matrix(labels, r) for s, r in rows.items()}
    reader = train_reader(real_images(cohort, rows['train']), torch.from_numpy(y['train']), a.reader_epochs)
    test = rows['test'][:a.test]
    truth, x = y['test'][:a.test], real_images(cohort, test)
    batch, model = cohort.batch(test, ['cxr', 'report']), open_generator(runs['dalle'])
    tokens, lengths = batch.data['report'], batch.lengths['report']
    other = np.roll(np.random.default_rng(5).permutation(len(test)), 1)[np.argsort(np.random.default_rng(5).permutation(len(test)))]
    bytes_of = lambda t: torch.from_numpy(t)[:, None].float()/255
    again = bytes_of(open_generator(runs['vae']).reconstruct((x[:, 0]*255).round().to(torch.uint8).numpy()))
    drawn = model.draw(tokens, lengths, seed=1)[:, 0]
    shuffled = model.draw(tokens[other], lengths[other], seed=2)[:, 0]
    kinds = {'real': x, 'told again by the VAE': again, 'drawn from the report': bytes_of(drawn), 'drawn from another report': bytes_of(shuffled)}
    rounded = lambda v: round(float(v), 4)
    table = [dict(images=kind, finding=f, auroc=rounded(v), low=rounded(l), high=rounded(h), patients=len(test),
                  positive=int(truth[:, FINDINGS.index(f)].sum()) if f in FINDINGS else '')
             for kind, images in kinds.items() for f, v, l, h in scores(read(reader, images), truth)]
    table = pd.DataFrame(table)
    table.to_csv(RESULTS/'generate.csv', index=False)
    curves(runs).to_csv(RESULTS/'generate_curves.csv', index=False)
    error = ((again - x)**2).mean().item()
    show = slice(0, 6)
    figure = show_grid(model.draw(tokens[show], lengths[show], n=4, seed=1), [cohort.text(i, 'report') for i in test[show]], batch.data['cxr'][show, 0].numpy())
    save_figure(figure, a.work/'grid'); plt.close(figure)
    grid = Image.open(a.work/'grid.png').convert('L')
    grid.resize((grid.width*3//4, grid.height*3//4), Image.LANCZOS).quantize(24).save(RESULTS.parent/'images'/'drawn.png', optimize=True)
    print(table.pivot(index='finding', columns='images', values='auroc')[list(kinds)].to_string())
    print(f'reconstruction error of held-out images {error:.4f} (variance {x.var().item():.4f}); {time.time() - start:.0f} s')


if __name__ == '__main__': main()
