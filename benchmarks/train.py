"""A whole training, from image files to steps, beside lightly's documented example of MSN on the same files.

    python benchmarks/train.py                                     # ViT-S/16, NIH's sample images where MMSN_DATA has them, else drawn ones
    python benchmarks/train.py --vit laptop --batch 32 --steps 20  # the network of the presets demo, nih and images
    python benchmarks/train.py --data drawn --side 1024 --ending png
    python benchmarks/train.py --auroc --vit laptop --batch 32 --budget 600     # CPU seconds to the same validation AUROC

Both train one ViT in float32, one process, one thread, by AdamW, with 1,024 prototypes and a head of three layers, on 1 target, 1 random and
`--focal` focal views of the same sizes. Ours is `mmsn-prepare` once and then a run of `Trainer` with its files, metrics, checkpoint and
encoder; theirs reads the files through PIL and MSNTransform in a DataLoader without workers, as in lightly's examples/pytorch/msn.py (which
hides 15 % of the patches of focal views too, and saves nothing). Each arm is a process of its own, arms alternate, medians are compared.

With `--auroc` a linear probe (`mmsn.early.ridge_probe`) on NIH's or IU's labels reads both encoders every so often, on the same split; its
seconds do not count. Of lightly's two networks the better one is read, at each of `--peer-lr`. Ours is the same network and views, and once
more with the views and the optimiser of the preset nih.
"""
import argparse, copy, json, math, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd

from mmsn.commands import cli
from mmsn.testing import open_data

VITS = dict(laptop=(96, 2, 3), tiny=(192, 12, 3), small=(384, 12, 6), base=(768, 12, 12))    # dim, depth, heads
SIZE = 224                                                                                   # of the stored images


def draw_images(folder, n, side, ending):
    "`n` drawn radiographs of `side` pixels with grain, and a CSV of their names and a label."
    from PIL import Image
    (folder/'images').mkdir(parents=True)
    rng, (y, x) = np.random.default_rng(0), np.mgrid[-1:1:side*1j, -1:1:side*1j].astype(np.float32)
    label = rng.random(n) < .5
    for i in range(n):
        image = 170 - 40*y**2 + 8*np.sin(25*(y + .3*x**2)) + 20*label[i]*np.exp(-((x - .4)**2 + y**2)/.05)
        for s in (-1, 1): image -= 110*np.exp(-(((x - .42*s)/(.3 + .05*rng.random()))**4 + ((y + .05)/.62)**4))
        grain = rng.normal(0, 2, image.shape).astype(np.float32)
        Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8)).save(folder/'images'/f'{i}.{ending}')
    pd.DataFrame(dict(image=[f'{i}.{ending}' for i in range(n)], heart=label.astype(int))).to_csv(folder/'images.csv', index=False)


def prepare(data, source, out, size=SIZE):
    "The cohort of the files: NIH's, IU's or drawn ones."
    from mmsn import prepare as p
    options = dict(size=size, workers=1, most_shared=1.)
    if data == 'drawn': return p.images(source/'images.csv', source/'images', out, labels=['heart'], **options)
    return (p.nih if data == 'nih' else p.iu)(source, out, **options)


def files_of(data, source, cohort):
    "(path of the file of each sample of the cohort, its split)."
    from mmsn.data.cohort import Cohort
    samples = Cohort.open(cohort).samples
    column = next(c for c in ('image', 'image_id', 'filename') if c in samples)
    known = {p.name: p for p in (source/'images').iterdir()} | {p.stem: p for p in (source/'images').iterdir()}
    return [known[str(n)] for n in samples[column]], samples.split.to_numpy()


def config_of(a, run, epochs, recipe):
    "Our config: the same network and views as lightly's, or with the views and the optimiser of the preset nih."
    from mmsn.config import load_config
    dim, depth, heads = VITS[a.vit]
    network = [f'modalities.cxr.encoder.{k}={v}' for k, v in dict(dim=dim, depth=depth, heads=heads).items()]
    same = [f'modalities.cxr.views.focal={a.focal}', f'modalities.cxr.views.random_size={a.sizes[0]}', f'modalities.cxr.views.focal_size={a.sizes[1]}']
    run = [f'data.cohort={a.cohort}', 'data.workers=0', f'train.run={run}', 'train.threads=1', 'train.mixed_precision="no"', f'optim.batch_size={a.batch}', f'optim.epochs={epochs}']
    return load_config(*(('nih', run) if recipe == 'preset' else ('cxr_vits16', network + same + run)))


def train_ours(a, folder, recipe='same'):
    "A run of ours; the seconds of this process after each step, and AUROC where it is asked for."
    from mmsn.config import load_config
    from mmsn.data.cohort import Cohort
    from mmsn.early import EarlyWarning
    from mmsn.loop import Trainer
    class Timed(Trainer):
        "A trainer that notes the processor's time after each step."
        def take(self, batches):
            out = super().take(batches)
            seconds.append(time.process_time() - aside[0])
            if not a.budget: return out
            if seconds[-1] - begun >= a.budget: self.stop = True
            if seconds[-1] - begun >= (1 + len(found))*a.budget/a.probes: look(self)
            return out
    def look(trainer):
        "A probe, whose seconds are set aside."
        before = time.process_time()
        found.append((seconds[-1] - begun if seconds else 0., early.probe(trainer.accelerator.unwrap_model(trainer.model))))
        aside[0] += time.process_time() - before
    seconds, aside, found = [], [0.], []
    rows = len(Cohort.open(a.cohort).rows('train'))
    if a.budget:                                                             # its schedules need the number of epochs: a few steps say how many fit
        config = config_of(a, folder/'trial', math.ceil(8*a.batch/rows), recipe)
        trial, times, a_budget = Timed(config), seconds, a.budget
        a.budget = 0; batches = trial.batches()
        for _ in range(6): trial.take(batches)
        a.budget = a_budget
        step = (times[-1] - times[1])/4
        epochs = max(a.budget/step/(rows//a.batch), 2)
        seconds.clear()
    else: epochs = a.steps/(rows//a.batch)
    begun = time.process_time()
    trainer = Timed(config_of(a, folder/'run', epochs, recipe))
    if a.budget:
        early = EarlyWarning(trainer.cohort, trainer.config)
        before = time.process_time()
        start = early.probe(trainer.accelerator.unwrap_model(trainer.model))
        aside[0] += time.process_time() - before
    trainer.fit()
    if a.budget: found.insert(0, (0., start))
    return dict(steps=seconds, call=time.process_time() - begun - aside[0], found=found, images=trainer.step*trainer.batch)


def train_lightly(a, folder, lr=1.5e-4):
    "lightly's example of MSN (lightly 1.5 and 1.6, examples/pytorch/msn.py) on the training files; the same as `train_ours` returns."
    import torch
    from lightly.loss import MSNLoss
    from lightly.models import utils
    from lightly.models.modules.heads import MSNProjectionHead
    from lightly.models.modules.masked_vision_transformer_torchvision import MaskedVisionTransformerTorchvision
    from lightly.transforms import MSNTransform
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision.models import VisionTransformer
    torch.set_num_threads(1)
    begun = time.process_time()
    torch.manual_seed(0)
    paths, split = files_of(a.data, a.source, a.cohort)
    transform = MSNTransform(random_size=a.sizes[0], focal_size=a.sizes[1], focal_views=a.focal)
    class Files(Dataset):
        def __init__(self, paths): self.paths = paths
        def __len__(self): return len(self.paths)
        def __getitem__(self, i): return transform(Image.open(self.paths[i]).convert('RGB'))
    loader = DataLoader(Files([p for p, s in zip(paths, split) if s == 'train']), a.batch, shuffle=True, drop_last=True)
    dim, depth, heads = VITS[a.vit]
    target = MaskedVisionTransformerTorchvision(VisionTransformer(image_size=224, patch_size=16, num_layers=depth, num_heads=heads, hidden_dim=dim, mlp_dim=dim*4))
    target_head, prototypes = MSNProjectionHead(input_dim=dim), torch.nn.Linear(256, 1024, bias=False).weight
    anchor, anchor_head = copy.deepcopy(target), copy.deepcopy(target_head)
    for m in (target, target_head): utils.deactivate_requires_grad(m)
    optimizer, criterion = torch.optim.AdamW([*anchor.parameters(), *anchor_head.parameters(), prototypes], lr), MSNLoss()
    def masked(images):
        keep, _ = utils.random_token_mask(size=(len(images), (images.shape[-1]//16)**2), mask_ratio=.15)
        return anchor_head(anchor(images=images, idx_keep=keep))
    def step(views):
        utils.update_momentum(anchor, target, .996)
        utils.update_momentum(anchor_head, target_head, .996)
        aims = target_head(target(images=views[0]))
        out = torch.cat([masked(views[1]), masked(torch.cat(views[2:]))])
        criterion(out, aims, prototypes.data).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds, aside, found = [], 0., []
    probe = lightly_probe(a, (anchor, target)) if a.budget else None
    if a.budget:
        begun = time.process_time()
        found.append((0., probe()))
        aside = time.process_time() - begun
    while not a.budget and len(seconds) < a.steps or a.budget and (not seconds or seconds[-1] - begun < a.budget):
        for views in loader:
            step(views)
            seconds.append(time.process_time() - aside)
            if a.budget and seconds[-1] - begun >= len(found)*a.budget/a.probes:
                before = time.process_time()
                found.append((seconds[-1] - begun, probe()))
                aside += time.process_time() - before
            if a.budget and seconds[-1] - begun >= a.budget or not a.budget and len(seconds) >= a.steps: break
    return dict(steps=seconds, call=time.process_time() - begun - aside, found=found, images=len(seconds)*a.batch)


def lightly_probe(a, networks):
    "The probe of `EarlyWarning` on lightly's networks: the better one counts."
    import torch
    from torch.nn import functional as F
    from mmsn.data.cohort import Cohort
    from mmsn.early import EarlyWarning, ridge_probe
    cohort = Cohort.open(a.cohort)
    early = EarlyWarning(cohort, config_of(a, Path('none'), 1, 'same'))
    def read(network, rows):
        out = []
        for at in np.split(rows, range(128, len(rows), 128)):
            x = cohort.batch(at, ['cxr'], []).data['cxr'].float()/255
            if x.shape[-1] != a.sizes[0]: x = F.interpolate(x, 2*(a.sizes[0],), mode='bilinear', antialias=True)
            x = (x.expand(-1, 3, -1, -1) - torch.tensor([.485, .456, .406])[:, None, None])/torch.tensor([.229, .224, .225])[:, None, None]
            out.append(network(images=x).numpy())
        return np.concatenate(out).astype(float)
    def probe():
        scores = []
        for n in networks:
            n.eval()
            with torch.no_grad(): x, x_val = read(n, early.train), read(n, early.val)
            n.train()
            scores.append(ridge_probe(x, early.labels[early.train], x_val, early.labels[early.val]))
        return max(scores)
    return probe


def one(a, arm, folder):
    "What one process says; called in it."
    import torch
    torch.set_num_threads(1)
    wall = time.perf_counter()
    if arm == 'prepare':
        begun = time.process_time()
        made = prepare(a.data, a.source, folder/'cohort')
        told = dict(call=time.process_time() - begun, images=len(made))
    else:
        name, _, how = arm.partition(':')
        told = train_ours(a, folder, how or 'same') if name == 'ours' else train_lightly(a, folder, float(how or 1.5e-4))
    print(json.dumps(told | dict(wall=time.perf_counter() - wall)))


def child(a, arm):
    "Run one arm in a process of its own; what it said, with the seconds of the whole process."
    words = [sys.executable, __file__, '--one', arm, '--data', a.data, '--source', str(a.source), '--cohort', str(a.cohort), '--vit', a.vit, '--batch', str(a.batch), '--steps', str(a.steps),
             '--focal', str(a.focal), '--sizes', *map(str, a.sizes), '--budget', str(a.budget if a.auroc else 0), '--probes', str(a.probes)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(words, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    if out.returncode: raise SystemExit(out.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads(out.stdout.splitlines()[-1]) | dict(process=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def speed(a, made):
    "Both trainings, alternating; the table and the ratios."
    told = dict(ours=[], lightly=[])
    for i in range(a.repeat):
        for arm in told: told[arm].append(child(a, arm))
    rate = {arm: statistics.median(a.batch*(len(t['steps']) - 2)/(t['steps'][-1] - t['steps'][1]) for t in runs) for arm, runs in told.items()}
    middle = lambda arm, key: statistics.median(t[key] for t in told[arm])
    each = made['process']/made['images']
    passes = 1/(1/rate['ours'] + each/a.passes)
    images = told['ours'][0]['images']
    print(f'mmsn-prepare, once: {made["images"]} images, {1/each:.1f} a CPU-second ({made["process"]:.1f} CPU-s with the start of the process, {made["wall"]:.1f} s)')
    row = lambda what, ours, theirs: print(f'{what:66} {ours:8.3f} {theirs:8.3f} {ours/theirs:6.2f}')
    print(f'{"images a CPU-second":66} {"mmsn":>8} {"lightly":>8}  ratio')
    row('from files to steps, without start and end', rate['ours'], rate['lightly'])
    row(f'the same, with the preparation on top, over {a.passes} passes', passes, rate['lightly'])
    row(f'{images} images, whole processes, the preparation aside', images/middle('ours', 'process'), images/middle('lightly', 'process'))
    row(f'{images} images, whole processes, with the preparation of all', images/(middle('ours', 'process') + made['process']), images/middle('lightly', 'process'))
    row('images a second of the clock, start and end of the process aside', images/middle('ours', 'wall'), images/middle('lightly', 'wall'))
    spread = {arm: [round(a.batch*(len(t['steps']) - 2)/(t['steps'][-1] - t['steps'][1]), 3) for t in runs] for arm, runs in told.items()}
    print(f'aim 2.5 {"reached" if passes/rate["lightly"] >= 2.5 else "NOT REACHED"}; images a CPU-second of each run: {spread}')


def auroc(a):
    "AUROC against CPU seconds of each arm, and when each reaches the best of lightly's."
    told = {}
    for arm in ['ours:same', 'ours:preset', *(f'lightly:{lr:g}' for lr in a.peer_lr)]:
        told[arm] = child(a, arm)['found']
        print(f'{arm:16} ' + ', '.join(f'{s:.0f} s {v:.3f}' for s, v in told[arm]), flush=True)
    peers = [n for n in told if n.startswith('lightly')]
    for of, names in (('lightly', peers), ('ours with the same views', ['ours:same'])):
        best = max(v for n in names for s, v in told[n] if s)
        first = {n: next((s for s, v in found if s and v >= best), None) for n, found in told.items()}
        print(f'the best of {of} is {best:.3f}, reached after ' + ', '.join(f'{n} {"more than " + format(a.budget, ".0f") if s is None else format(s, ".0f")}' for n, s in first.items()) + ' CPU-s')
        mine, theirs = first['ours:same'], min((first[n] or math.inf for n in peers))
        if mine: print(f'ratio with the same views: {"at least " if theirs == math.inf else ""}{min(theirs, a.budget)/mine:.1f}, aim 2')


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', choices=['nih', 'iu', 'drawn'], help='nih where MMSN_DATA has it, else drawn')
    p.add_argument('--images', type=int, default=256, help='drawn images')
    p.add_argument('--side', type=int, default=512, help='their side in pixels')
    p.add_argument('--ending', choices=['jpg', 'png'], default='jpg')
    p.add_argument('--vit', choices=list(VITS), default='small')
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--steps', type=int, default=7)
    p.add_argument('--focal', type=int, default=10, help='focal views')
    p.add_argument('--sizes', type=int, nargs=2, default=[224, 96], help='pixels of random and focal views')
    p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--passes', type=int, default=100, help='epochs over which the preparation is divided')
    p.add_argument('--auroc', action='store_true')
    p.add_argument('--budget', type=float, default=600, help='CPU seconds of each arm of --auroc')
    p.add_argument('--probes', type=int, default=12, help='times that an arm of --auroc is probed')
    p.add_argument('--peer-lr', type=float, nargs='+', default=[1.5e-4, 1e-3], help="lightly's learning rates; the example has 1.5e-4")
    for hidden in ('--one', '--source', '--cohort'): p.add_argument(hidden, type=str if hidden == '--one' else Path, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.one:
        with tempfile.TemporaryDirectory() as folder: return one(a, a.one, a.cohort.parent if a.one == 'prepare' else Path(folder))
    a.data = a.data or ('nih' if open_data('nih') else 'drawn')
    with tempfile.TemporaryDirectory() as folder:
        a.source, a.cohort = open_data(a.data), Path(folder)/'cohort'
        if a.data == 'drawn':
            a.source = Path(folder)/'drawn'
            draw_images(a.source, a.images, a.side, a.ending)
        made = child(a, 'prepare')
        print(f'{a.data}, {made["images"]} images; ViT {a.vit} {VITS[a.vit]}, batch {a.batch}, views 2 of {a.sizes[0]} and {a.focal} of {a.sizes[1]}, float32, one thread', flush=True)
        auroc(a) if a.auroc else speed(a, made)


if __name__ == '__main__': main()
