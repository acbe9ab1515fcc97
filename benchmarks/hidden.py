"""What hiding 70 % of the patches costs a network that had every label and was trained for it, beside which the demo's bar is to be read.

    python benchmarks/hidden.py mmsn-bars/seed-0/cohort            # after demo_bars.py; minutes on one core: nbs/results/hidden.csv

The image encoder of the preset demo is trained with all training labels and a new fraction of patches hidden in every patient and step, up to `--most`, and read on test
patients with none and with 70 % hidden; beside it the same network that never saw a hidden patch. It is a reference and no proof of a limit: one recipe, chosen by validation
patients whose images are half hidden too.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmsn.config import cli, load_config
from mmsn.data.cohort import Cohort
from mmsn.encoders.fusion import JointEncoder
from mmsn.evaluate.metrics import auroc, macro
from mmsn.evaluate.networks import EndToEnd, PlainViews, network_scores, train_end_to_end
from mmsn.evaluate.task import Task
from mmsn.views.images import patch_mask
from mmsn.views.patient import Views
from mmsn.views.random import make_key

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'


class Hidden(PlainViews):
    "Plain views of patients with a fraction of the patches between `least` and `most` hidden, other ones at every look."
    least, most, looks, patch = 0., 0., 0, 16

    def __call__(self, rows, names):
        views, *rest = super().__call__(rows, names)
        if not self.most: return views, *rest
        self.looks += 1
        tokens = (views['cxr'].x.shape[-1]//self.patch)**2
        key = make_key(7, self.looks, torch.as_tensor(rows)[None], 0, 'hidden patches')
        return {'cxr': replace(views['cxr'], keep=patch_mask(key, tokens, (self.least, self.most), False))}, *rest

    def hiding(self, least, most):
        self.least, self.most, self.looks = least, most, 0
        return self


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('cohort')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--epochs', type=float, default=30)
    p.add_argument('--most', type=float, default=.8)
    a = p.parse_args(argv)
    cohort, config = Cohort.open(a.cohort), load_config('demo')
    config = replace(config, modalities=dict(cxr=config.modalities['cxr']))
    task, views, rows = Task.of(cohort), Views(config.modalities, cohort.modalities), []
    has = cohort.present('cxr')[task.rows]
    at = {s: np.flatnonzero(has & (task.split == s)) for s in ('train', 'val', 'test')}
    part = {s: (task.rows[i], task.labels[i]) for s, i in at.items()}
    for seed in a.seeds:
        for name, most in dict(masked=a.most, clean=0.).items():
            torch.manual_seed(seed)
            net = EndToEnd(views, JointEncoder(config, cohort.modalities), 'cxr', len(task.names))
            read = Hidden(views, cohort).hiding(0., most)
            read.patch = config.modalities['cxr'].encoder.patch
            train_end_to_end(net, read, part['train'], part['val'], config.evaluate.scratch_lr, a.epochs, patience=5, checks=10, seed=seed)
            clean, hidden = (macro(auroc(part['test'][1], network_scores(net, read.hiding(s, s), part['test'][0]))) for s in (0., .7))
            rows.append(dict(trained=name, seed=seed, clean=clean, hidden=hidden, relative_loss=(clean - hidden)/clean))
            print({k: round(float(v), 3) if not isinstance(v, str) else v for k, v in rows[-1].items()}, flush=True)
    table = pd.DataFrame(rows).astype(dict(clean=float, hidden=float))
    table.round(4).to_csv(RESULTS/'hidden.csv', index=False)
    print(table.groupby('trained')[['clean', 'hidden', 'relative_loss']].mean().round(3).to_string())


if __name__ == '__main__': main()
