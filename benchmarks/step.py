"""One optimiser step of MSN on images, beside lightly's documented example, on the same views and masks; and beside a matrix product.

    python benchmarks/step.py                          # ViT-S/16, 1 target + 1 random + 10 focal views, 8 images, one thread: some minutes
    python benchmarks/step.py --batch 4 --repeat 3     # a first look
    python benchmarks/step.py --recompute              # ours with train.activation_checkpointing=true
    python benchmarks/step.py --save                   # the row goes to nbs/results/step.csv

Both networks are trained in float32 by AdamW, with a target network that follows, 1,024 prototypes and a head of three layers. Views, and
which patches each keeps, are drawn once and given to both. Steps alternate, and the medians are compared. The share of the matrix rate is
the operations of a step (counted by torch) over its seconds, divided by what plain products of the same shapes reach in the same run.
Peak memory is measured in a process for each, without the libraries and the weights' first copy: resident at the peak less resident at the start.
"""
import argparse, copy, json, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmsn.commands import cli
from mmsn.config import load_config
from mmsn.generate.model import build_model
from mmsn.launch import checkpoint_blocks
from mmsn.testing import toy_cohort
from mmsn.threads import peak_memory


def open_ours(batch, folder, recompute=False):
    "Our model with its optimiser, the views of one batch, and a function that takes a step."
    config = load_config('cxr_vits16', [f'data.cohort={folder}', 'train.run=none', f'optim.batch_size={batch}', 'train.mixed_precision="no"'])
    cohort = toy_cohort(folder, n=4*batch, size=224)
    torch.manual_seed(0)
    model = build_model(config, cohort).train()
    if recompute: checkpoint_blocks(model)
    with torch.no_grad(): views = model.views(cohort.batch(cohort.rows('train')[:batch], ['cxr']), 0, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    def step():
        optimizer.zero_grad(set_to_none=True)
        model(views).loss.backward()
        optimizer.step()
        model.update_target(.996)
    return step, views


def open_lightly(views):
    "lightly's example of MSN (lightly 1.5 and 1.6, examples/pytorch/msn.py), on our views."
    from lightly.loss import MSNLoss
    from lightly.models import utils
    from lightly.models.modules.heads import MSNProjectionHead
    from lightly.models.modules.masked_vision_transformer_torchvision import MaskedVisionTransformerTorchvision
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    target = MaskedVisionTransformerTorchvision(VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=384*4))
    target_head, prototypes = MSNProjectionHead(input_dim=384), torch.nn.Linear(256, 1024, bias=False).weight
    anchor, anchor_head = copy.deepcopy(target), copy.deepcopy(target_head)
    for m in (target, target_head): utils.deactivate_requires_grad(m)
    optimizer, criterion = torch.optim.AdamW([*anchor.parameters(), *anchor_head.parameters(), prototypes], 1e-4), MSNLoss()
    rgb = lambda x: x.expand(-1, 3, -1, -1)                                   # its network reads three channels
    def kept(v):                                                              # its indices count the class token
        return None if v.keep is None else torch.cat([torch.zeros(len(v.keep), 1, dtype=torch.long), v.keep.long() + 1], 1)
    whole, groups = rgb(views.targets['cxr'].x), [(rgb(v.x), kept(v)) for v in views.anchors['cxr']]
    def step():
        utils.update_momentum(anchor, target, .996)
        utils.update_momentum(anchor_head, target_head, .996)
        t = target_head(target(images=whole))
        a = torch.cat([anchor_head(anchor(images=x, idx_keep=keep)) for x, keep in groups])
        criterion(a, t, prototypes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def matrix_rate(tokens, width=384, seconds=4.):
    "Operations a second of the products of a transformer block: (tokens, d) by d × 3d, d × d, d × 4d, 4d × d."
    shapes = [(tokens, width, 3*width), (tokens, width, width), (tokens, width, 4*width), (tokens, 4*width, width)]
    pairs, done = [(torch.randn(n, k), torch.randn(k, m)) for n, k, m in shapes], 0
    for a, b in pairs: a @ b
    start = time.process_time()
    while time.process_time() - start < seconds:
        for a, b in pairs: a @ b
        done += sum(2*n*k*m for n, k, m in shapes)
    return done/(time.process_time() - start)


def resident():
    "Resident bytes now."
    return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()


def peak(which, batch, recompute):
    "Megabytes that two steps add at their highest, in a process of its own."
    words = [sys.executable, __file__, '--one', which, '--batch', str(batch), *['--recompute']*recompute]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--repeat', type=int, default=5, help='steps of each that are timed')
    p.add_argument('--recompute', action='store_true', help='blocks are computed again in the backward pass')
    p.add_argument('--save', action='store_true')
    p.add_argument('--one', choices=['ours', 'lightly'], help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ours, views = open_ours(a.batch, Path(folder)/'cohort', a.recompute)
        if a.one == 'lightly': ours = None
        steps = dict(ours=ours) if a.one == 'ours' else dict(ours=ours, lightly=open_lightly(views))
        if a.one:
            before = resident()
            for _ in range(2): steps[a.one]()
            return print(json.dumps((peak_memory() - before)/1e6))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): steps['ours']()     # the fused attention of a CPU is not counted
        steps['lightly']()
        taken = dict(ours=[], lightly=[])
        for _ in range(a.repeat):
            for name, step in steps.items():
                start = time.process_time(); step()
                taken[name].append(time.process_time() - start)
        tokens = max(v.x.shape[0]*(v.x.shape[-1]//16)**2 for v in views.anchors['cxr'])
        rate = matrix_rate(tokens)
    seconds = {name: statistics.median(t) for name, t in taken.items()}
    memory = {name: peak(name, a.batch, a.recompute) for name in taken}
    row = dict(batch=a.batch, recompute=a.recompute, seconds=seconds['ours'], lightly_seconds=seconds['lightly'], ratio=seconds['lightly']/seconds['ours'],
               gflop=counter.get_total_flops()/1e9, gflop_per_s=counter.get_total_flops()/1e9/seconds['ours'], matrix_gflop_per_s=rate/1e9,
               share_of_matrix_rate=counter.get_total_flops()/seconds['ours']/rate, mb=memory['ours'], lightly_mb=memory['lightly'], memory_ratio=memory['ours']/memory['lightly'])
    for name, value in row.items(): print(f'{name:22} {value:,.3f}' if isinstance(value, float) else f'{name:22} {value}')
    if a.save:
        path = Path(__file__).parents[1]/'nbs'/'results'/'step.csv'
        known = pd.read_csv(path) if path.is_file() else pd.DataFrame()
        if len(known): known = known[(known.batch != a.batch) | (known.recompute != a.recompute)]
        pd.concat([known, pd.DataFrame([row])]).sort_values(['batch', 'recompute']).round(4).to_csv(path, index=False)


if __name__ == '__main__': main()
