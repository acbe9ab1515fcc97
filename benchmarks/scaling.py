"""What a step costs as the batch, views, images, tokens and stays grow; and what pre-training on all of MIMIC-CXR would cost, as an estimate.

    python benchmarks/scaling.py                         # some minutes: measured slopes, counted operations, and the estimate
    python benchmarks/scaling.py --estimate              # the estimate alone; see --help for its rates
    python benchmarks/scaling.py --estimate --gpus 1 8 64 512 --per-gpu 32 --tflops 200

Measured: CPU seconds and counted operations of one optimiser step (torch's FlopCounterMode, attention written out, an LSTM left out) of a small network, one thread, each dial alone.
The slope is that of a line through (log dial, log cost): 1, cost grows as the dial does. Operations are those of products, which is why their
slope is cleaner. The ranks are two processes of gloo on the cores of this machine: what one optimiser step sends.

The peer in this run is the law that the counts must follow: a transformer's 2·parameters·tokens, and 4·layers·width·tokens² for attention, each
three times where there are gradients; the ratio of what was counted to that law is printed. The estimate rests on counted operations, on sizes
of weights, and on rates that are options: it is printed as an estimate, and nothing in it was measured on a GPU.
"""
import argparse, math, os, socket, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmsn.commands import cli
from mmsn.config import load_config
from mmsn.data.cohort import Cohort
from mmsn.loop import make_optimizer
from mmsn.model import MMSN
from mmsn.options import InputError
from mmsn.testing import toy_cohort

IMAGES, SIDE, EPOCHS = 377_110, 224, 100                   # of MIMIC-CXR-JPG 2.0.0; pixels of the store; passes
STAYS, HOURS, COLUMNS = 377_110, 48, 76                    # a chart beside each image at the most: hours and columns of MIMIC's 17 channels
_C, _E = 'modalities.cxr', 'modalities.ehr'
SMALL = [f'{_C}.encoder.dim=96', f'{_C}.encoder.depth=2', f'{_C}.encoder.heads=3', f'{_C}.views.focal=2', f'{_C}.views.random_size=64', f'{_C}.views.focal_size=32']
# dial -> (modality, overrides of a value, values); the cohort has images of 224 pixels and stays of up to 192 hours
DIALS = {'batch': ('cxr', lambda v: [], (4, 8, 16, 32)),
         'focal views': ('cxr', lambda v: [f'{_C}.views.focal={v}'], (4, 8, 16, 32)),
         'side of an image': ('cxr', lambda v: [f'{_C}.views.random_size={v}', f'{_C}.views.focal_size={v//2}'], (64, 96, 160, 224)),
         'tokens (smaller patches)': ('cxr', lambda v: [f'{_C}.views.random_size=128', f'{_C}.views.focal_size=64', f'{_C}.encoder.patch={round(128/v**.5)}'], (64, 256, 1024)),
         'stays in a batch': ('ehr', lambda v: [], (8, 16, 32, 64)),
         'hours of a stay, LSTM': ('ehr', lambda v: [], (24, 48, 96, 192)),
         'hours of a stay, transformer': ('ehr', lambda v: [f'{_E}.encoder.name=transformer', f'{_E}.encoder.layers=2'], (24, 48, 96, 192))}


def open_step(kind, words, batch, cohort):
    "A function that takes one optimiser step, and the model."
    config = load_config('cxr_vits16' if kind == 'cxr' else 'ehr_lstm', [*(SMALL if kind == 'cxr' else [f'{_E}.ignore=[]', f'{_E}.views.focal=2', 'loss.cells.weight=1', 'loss.cells.kind=[value]']),
                         'train.mixed_precision="no"', *words])
    torch.manual_seed(0)
    model = MMSN.from_config(config, cohort).train()
    optimizer, rows = make_optimizer(model, config, 'cpu'), cohort.rows('train', [kind])[:batch]
    data = cohort.batch(rows, [kind], [])
    def step():
        optimizer.zero_grad(set_to_none=True)
        model(model.views(data, 0, 0)).loss.backward()
        optimizer.step()
        model.update_target(.996)
    return step, model


def operations(call):
    "Operations of the products in a call, attention written out: torch does not count its fused form on a CPU, nor an LSTM."
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): call()
    return counter.get_total_flops()


def cost(step, repeat):
    "(median CPU seconds, counted operations) of a step."
    counted = operations(step)
    taken = []
    for _ in range(repeat):
        start = time.process_time(); step()
        taken.append(time.process_time() - start)
    return statistics.median(taken), counted


def slope(x, y): return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(a, folder):
    "Each dial alone; prints a line each. Seconds of the values alternate with nothing: one process, one thread."
    cohorts = {}
    def cohort(hours):
        if hours not in cohorts: cohorts[hours] = toy_cohort(folder/str(hours), n=128, hours=hours, size=224)
        return cohorts[hours]
    print(f'{"dial":30}{"values":24}{"CPU seconds of a step":34}{"slope":>6}{"GFLOP":>34}{"slope":>7}')
    for dial, (kind, words, values) in DIALS.items():
        found = []
        for v in values:
            hours = v if 'hours' in dial else 48
            batch = v if dial in ('batch', 'stays in a batch') else 8 if kind == 'cxr' else 32
            found.append(cost(open_step(kind, words(v), batch, cohort(hours))[0], a.repeat))
        seconds, flops = zip(*found)
        texts = ' '.join(f'{s:.3f}' for s in seconds), ' '.join(f'{f/1e9:.2f}' for f in flops)
        slopes = [f'{slope(values, seconds):.2f}', f'{slope(values, flops):.2f}' if min(flops) else '-']
        print(f'{dial:30}{" ".join(map(str, values)):24}{texts[0]:34}{slopes[0]:>6}{texts[1]:>34}{slopes[1]:>7}', flush=True)


RANK = '''
import sys, time, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from scaling import open_step
from mmsn.data.cohort import Cohort
torch.set_num_threads(1)
world = int(sys.argv[4])
if world > 1: dist.init_process_group('gloo', rank=int(sys.argv[3]), world_size=world, init_method=f'tcp://127.0.0.1:{sys.argv[5]}')
step, model = open_step('cxr', [], 8, Cohort.open(sys.argv[2]))
gradients = [p for p in model.parameters() if p.requires_grad]
flat = torch.zeros(sum(p.numel() for p in gradients))
def whole():
    step()
    if world > 1: dist.all_reduce(flat)
whole(); whole()
begun, wall, n = time.process_time(), time.perf_counter(), 8
for _ in range(n): whole()
print((time.process_time() - begun)/n, (time.perf_counter() - wall)/n, flat.numel()*4)
'''

def ranks(folder):
    "CPU seconds of a step on one and two processes, 8 images each, whose gradients are summed by gloo."
    toy_cohort(folder/'ranks', n=128, hours=12, size=224)
    for world in (1, 2):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        words = [sys.executable, '-c', RANK, str(Path(__file__).parent), str(folder/'ranks')]
        running = [subprocess.Popen([*words, str(r), str(world), str(port)], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1')) for r in range(world)]
        told = [[float(x) for x in p.communicate()[0].splitlines()[-1].split()] for p in running]
        cpu, wall, size = np.mean(told, 0)
        print(f'{world} rank{"s" if world > 1 else " "}: {cpu:.3f} CPU-seconds a step and rank, {wall:.3f} s; {8*world/wall:.1f} images a second; {size/1e6*(world > 1):.1f} MB summed a step', flush=True)


def full_model(folder):
    "ViT-S/16 and the LSTM of charts, fused, as the preset mimic_fusion has them, on a toy cohort of full-size images."
    cohort = toy_cohort(folder/'full', n=20, hours=48, size=SIDE)
    config = load_config('mimic_fusion', [f'{_E}.ignore=[]', 'train.mixed_precision="no"'])
    torch.manual_seed(0)
    return MMSN.from_config(config, cohort).train(), cohort


def law(model, views, batch):
    """Operations that a transformer of this size must take, without heads: 2·parameters·tokens and attention, forward of
    the target, forward and backward of the anchors."""
    e = model.config.modalities['cxr'].encoder
    weights = e.depth*(4 + 2*e.mlp_ratio)*e.dim**2                   # of the blocks
    def forward(view):
        patches = (view.x.shape[-1]//e.patch)**2
        tokens = 1 + (patches if view.keep is None else view.keep.shape[1])
        return len(view.x)*(2*weights*tokens + 4*e.depth*e.dim*tokens**2 + 2*e.patch**2*e.dim*patches)
    return forward(views.targets['cxr']) + 3*sum(map(forward, views.anchors['cxr']))


def count(folder, batch=4):
    "Counted operations of a step for a patient with image and chart, and sizes of the model."
    model, cohort = full_model(folder)
    rows = cohort.rows('train', ['cxr', 'ehr'], 'paired')[:batch]
    with torch.no_grad(): views = model.views(cohort.batch(rows, ['cxr', 'ehr'], []), 0, 0)
    counted = operations(lambda: model(views).loss.backward())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(p.numel() for p in model.parameters())
    exported = sum(p.numel() for p in model.target.parameters())
    # what autograd keeps of one image: tokens times layers times about 17 widths in 2 bytes (arXiv 2205.05198: 34·s·b·h bytes a layer, without its softmax)
    e = model.config.modalities['cxr'].encoder
    tokens = sum(len(v.x)*(1 + ((v.x.shape[-1]//e.patch)**2 if v.keep is None else v.keep.shape[1])) for v in views.anchors['cxr'])/batch
    # LSTM: 8·hidden·(hidden + columns) operations an hour and view, which torch does not count as products; three times for gradients
    s = model.config.modalities['ehr']
    chart_hours = HOURS*(1 + 3*(1 + s.views.focal*sum(s.views.focal_window)/2))
    chart = 2*4*s.encoder.hidden*(s.encoder.hidden + COLUMNS)*chart_hours
    return dict(flops=counted/batch, law=law(model, views, batch)/batch, chart=chart, trained=trained, held=held, exported=exported, activations=34*e.dim*e.depth*tokens, optimizer=2*trained)


def estimate(a, c):
    "Hours, memory and bytes on each number of GPUs."
    per_image = c['flops'] + c['chart']
    print(f'\nESTIMATE, not a measurement: ViT-S/16 with the LSTM of charts, preset mimic_fusion, {IMAGES:,} images of MIMIC-CXR, {EPOCHS} epochs')
    print(f'counted: {c["flops"]/1e9:.1f} GFLOP a patient and step, {c["flops"]/c["law"]:.2f} times the law of a transformer; the chart adds {c["chart"]/1e9:.2f} by its formula')
    print(f'parameters: {c["trained"]/1e6:.1f} M trained, {c["held"]/1e6:.1f} M held; rates: {a.tflops:g} TFLOP/s at the most (--tflops), of which {a.mfu:.0%} are reached (--mfu), '
          f'{a.nvlink:g} GB/s within a machine of {a.node} GPUs (--nvlink, --node), {a.net:g} GB/s between them and GPU (--net), {a.latency*1e6:g} µs a hop (--latency), {a.disk:g} GB/s a machine from disk (--disk)')
    store = IMAGES*SIDE**2 + STAYS*HOURS*COLUMNS*4
    checkpoint = 4*(c['held'] + c['optimizer'])
    print(f'store: {IMAGES*SIDE**2/1e9:.1f} GB of images and at most {STAYS*HOURS*COLUMNS*4/1e9:.1f} GB of charts; a checkpoint {checkpoint/1e6:.0f} MB (two kept, one being written: {3*checkpoint/1e6:.0f} MB), '
          f'an encoder {4*c["exported"]/1e6:.0f} MB; all-reduce {4*c["trained"]/1e6:.0f} MB of gradients a step')
    print(f'{"GPUs":>5}{"batch":>7}{"steps":>10}{"compute ms":>12}{"sum ms":>8}{"disk ms":>9}{"step ms":>9}{"hours":>8}{"efficiency":>11}{"GB a GPU":>10}')
    held = 4*(c['held'] + c['optimizer'] + c['trained'])                     # weights, two moments, gradients, in float32
    alone, scales = per_image*a.per_gpu/(a.tflops*1e12*a.mfu), []
    for n in a.gpus:
        compute, machines = alone, math.ceil(n/a.node)
        rate = a.nvlink if machines == 1 else min(a.nvlink, a.net)
        reduce = (2*(n - 1)/n*4*c['trained']/(rate*1e9) + 2*(n - 1)*a.latency) if n > 1 else 0.
        read = min(n, a.node)*a.per_gpu*(SIDE**2 + HOURS*COLUMNS*4)/(a.disk*1e9)         # by each machine, ahead of the step
        step = max(compute + a.exposed*reduce, read)
        steps = EPOCHS*IMAGES//(a.per_gpu*n)
        memory = (held + a.per_gpu*c['activations'])/1e9
        scales.append((n, alone/step))
        print(f'{n:5}{a.per_gpu*n:7,}{steps:10,}{compute*1e3:12.1f}{reduce*1e3:8.2f}{read*1e3:9.2f}{step*1e3:9.1f}{steps*step/3600:8.2f}{alone/step:11.0%}{memory:10.1f}')
    below = limit(a, c)
    print(f'where it stops, by bandwidth: with {a.per_gpu} patients a GPU the sum of gradients takes {a.exposed:.0%} of {2*4*c["trained"]/(a.net*1e9)*1e3:.1f} ms and more between machines, beside {alone*1e3:.1f} ms of compute; '
          f'efficiency falls below half {"at " + format(below, ",") + " GPUs" if below else "nowhere below 100,000 GPUs"}.')
    batch = 4096
    print(f'where it stops, by the batch: MSN was published with batches of 1,024 (arXiv 2204.07141), and steps become few: {batch:,} patients a step are reached at {batch//a.per_gpu} GPUs, {EPOCHS*IMAGES//batch:,} steps in all. '
          f'With a batch of 1,024 held, {a.gpus[-1]} GPUs have {1024/a.gpus[-1]:g} patients each: {per_image*1024/a.gpus[-1]/(a.tflops*1e12*a.mfu)*1e3:.1f} ms of compute beside {2*4*c["trained"]/(a.net*1e9)*1e3:.1f} ms of sums.')


def limit(a, c):
    "The number of GPUs from which efficiency is below a half; none below 100,000."
    alone = (c['flops'] + c['chart'])*a.per_gpu/(a.tflops*1e12*a.mfu)
    for n in (2**k for k in range(1, 17)):
        rate = a.nvlink if n <= a.node else min(a.nvlink, a.net)
        if a.exposed*(2*(n - 1)/n*4*c['trained']/(rate*1e9) + 2*(n - 1)*a.latency) > alone: return n


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--estimate', action='store_true', help='leave the measurements out')
    p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--gpus', type=int, nargs='+', default=[1, 8, 64])
    p.add_argument('--per-gpu', type=int, default=128, help='patients a GPU and step (default 128: 1,024, as published, on 8)')
    p.add_argument('--tflops', type=float, default=312., help="dense bf16 products of one GPU (default 312: NVIDIA's data sheet of the A100)")
    p.add_argument('--mfu', type=float, default=.3, help='share of that which training reaches (default .3, an assumption: S/16 has narrow products; the aim of this project for ViT-B/16 is .45 of the measured rate)')
    p.add_argument('--nvlink', type=float, default=300., help="GB/s one way within a machine (default 300: NVIDIA's data sheet of the A100, 600 both ways)")
    p.add_argument('--net', type=float, default=25., help='GB/s a GPU between machines (default 25: one HDR InfiniBand port of 200 Gbit/s a GPU, as in the DGX A100)')
    p.add_argument('--node', type=int, default=8, help='GPUs of a machine')
    p.add_argument('--latency', type=float, default=5e-6, help='seconds a hop of the ring (default 5e-6, an assumption)')
    p.add_argument('--exposed', type=float, default=.5, help='share of the sum that the backward pass does not hide (default .5, an assumption)')
    p.add_argument('--disk', type=float, default=1., help='GB/s that a machine reads (default 1, an assumption: a network file system)')
    a = p.parse_args(argv)
    if min(*a.gpus, a.per_gpu, a.node) < 1 or min(a.tflops, a.mfu, a.nvlink, a.net, a.disk) <= 0: raise InputError('numbers of GPUs, patients and rates should be above zero')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not a.estimate:
            measure(a, folder)
            ranks(folder)
        estimate(a, count(folder))


if __name__ == '__main__': main()
