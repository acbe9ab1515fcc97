"""Images and stays a CPU-second of `mmsn-encode`, beside a plain loop of the same model.

    python benchmarks/encode.py                                 # 256 JPEG files, 1,000 stays of a CSV table
    python benchmarks/encode.py --vit small --images 128 --kinds images
    python benchmarks/encode.py --kinds stays --stays 5000

`images` are files in a folder: the loop opens each with PIL, cuts it to a square, resizes it as the cohort's images were, and calls the model,
one image at a time; and once more 64 at a time. `stays` are a long CSV table: the loop groups it with pandas, lays each stay on its hours,
and calls the model with one stay; and with 64. `cohort` are the rows of a cohort, read and encoded one at a time, and 64 at a time.
`mmsn-encode` (`mmsn.encode.encode_source`, 256 at a time) also checks the input, writes its parts for a resume, and joins them to one file;
the loops write their embeddings with pandas. Embeddings are compared. Float32, one thread, one process, networks at a random start; start of
the process and the libraries are not counted. Arms alternate; medians.
"""
import argparse, resource, statistics, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from mmsn.commands import cli
from mmsn.config import load_config
from mmsn.data.cohort import Batch, Cohort
from mmsn.encode import Sources, encode_source
from mmsn.model import MMSN
from mmsn.prepare import images as prepare_images, table as prepare_table

VITS = dict(laptop=(96, 2, 3), small=(384, 12, 6))   # dim, depth, heads
CHANNELS = 12


def draw_files(folder, n, side):
    "`n` drawn JPEG files of about `side` pixels."
    folder.mkdir()
    rng, (y, x) = np.random.default_rng(0), np.mgrid[-1:1:side*1.2j, -1:1:side*1j].astype(np.float32)
    for i in range(n):
        image = 170 - 40*y**2 - 110*np.exp(-((abs(x) - .42)/(.3 + .002*(i % 50)))**4 - ((y + .05)/.62)**4) + rng.normal(0, 2, x.shape).astype(np.float32)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder/f'{i:06d}.jpg', quality=92)
    pd.DataFrame(dict(image=[f'{i:06d}.jpg' for i in range(n)])).to_csv(folder.parent/'images.csv', index=False)


def draw_table(folder, n, hours=48):
    "A long table of `n` stays, each channel measured in a third of the hours; and the table of channels."
    rng, rows = np.random.default_rng(0), []
    seen = rng.random((n, hours, CHANNELS)) < 1/3
    stay, hour, channel = seen.nonzero()
    time = hour + .01 + .98*rng.random(len(hour))
    value = (50 + 5*channel + 10*rng.normal(size=len(hour))).clip(0, 200).round(1)
    pd.DataFrame(dict(subject_id=stay, time=time.round(3), variable=np.char.add('c', channel.astype(str)), value=value)).to_csv(folder/'table.csv', index=False)
    names = [f'c{k}' for k in range(CHANNELS)]
    pd.DataFrame(dict(name=names, unit='', low=0, high=300, normal=[50 + 5*k for k in range(CHANNELS)])).to_csv(folder/'channels.csv', index=False)
    return hours


def model_of(preset, cohort, *words):
    torch.manual_seed(0)
    return MMSN.from_config(load_config(preset, [f'data.cohort={cohort.folder}', *words]), cohort).eval()


def batch_of(name, x, lengths=None):
    "A `Batch` of arrays that are in a list; a series is padded."
    n = len(x)
    if lengths is None: data, has = torch.from_numpy(np.stack(x))[:, None], {}
    else: data, has = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(v) for v in x], batch_first=True), {name: torch.tensor(lengths)}
    return Batch(torch.arange(n), {name: data}, has, {name: torch.ones(n, dtype=torch.bool)}, torch.zeros(n, 0))


def written(parts, out):
    "The embeddings of a loop as a parquet file; returns them."
    z = np.concatenate(parts)
    pd.DataFrame(z, columns=[f'joint.{i}' for i in range(z.shape[1])]).to_parquet(out)
    return z


def loop_images(model, folder, out, size, each):
    "The peer for images."
    held, parts = [], []
    for path in sorted(folder.iterdir()):
        image = Image.open(path).convert('L')
        w, h = image.size
        s = min(w, h)
        held.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=((w - s)/2, (h - s)/2, (w + s)/2, (h + s)/2))))
        if len(held) == each: parts.append(model.encode(batch_of('cxr', held))['joint'].numpy()); held = []
    if held: parts.append(model.encode(batch_of('cxr', held))['joint'].numpy())
    return written(parts, out)


def laid(own, normal, hours):
    "(hours, 2·channels) of the measurements of a stay: the last value of an hour, carried on, and whether it was measured."
    x = np.tile(np.r_[normal, np.zeros(CHANNELS)], (hours, 1)).astype(np.float32)
    own = own.sort_values(['time', 'value'])
    for k in range(CHANNELS):
        rows = own[own.variable == f'c{k}']
        last = np.nan
        by_hour = dict(zip(rows.time.astype(int), rows.value))
        for h in range(hours):
            if h in by_hour: last, x[h, CHANNELS + k] = by_hour[h], 1
            if last == last: x[h, k] = last
    return x


def loop_stays(model, table, out, hours, each):
    "The peer for a table."
    held, parts = [], []
    normal = np.array([50 + 5*k for k in range(CHANNELS)])
    def encode(): parts.append(model.encode(batch_of('ehr', held, [len(x) for x in held]))['joint'].numpy()); held.clear()
    for _, own in pd.read_csv(table).groupby('subject_id'):
        held.append(laid(own, normal, min(hours, int(own.time.max()) + 1)))
        if len(held) == each: encode()
    if held: encode()
    return written(parts, out)


def loop_cohort(model, folder, out, names, each):
    "The peer for a cohort."
    cohort = Cohort.open(folder)
    rows = cohort.rows(None, names)
    return written([model.encode(cohort.batch(at, names, []))['joint'].numpy() for at in np.split(rows, range(each, len(rows), each))], out)


def ours(model, source, out):
    encode_source(model, Sources(str(source), workers=1), out, overwrite=True)
    return pd.read_parquet(out).filter(regex=r'^joint\.').to_numpy()


def cpu(): return sum(t.ru_utime + t.ru_stime for t in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def compare(kind, n, arms, repeat):
    "Each arm (a function that returns embeddings) alternately; prints its line."
    rates, made = {}, {}
    for _ in range(repeat):
        for name, run in arms.items():
            used, start = cpu(), time.perf_counter()
            made[name] = run()
            rates.setdefault(name, []).append((n/(cpu() - used), n/(time.perf_counter() - start)))
    middle = {name: [statistics.median(r) for r in zip(*pairs)] for name, pairs in rates.items()}
    for name, (core, wall) in middle.items():
        apart = np.nanmax(np.abs(made[name] - made['mmsn-encode']))
        print(f'{kind:8}{name:16}{core:10,.1f} a CPU-second{wall:10,.1f} a second{middle["mmsn-encode"][0]/core:8.2f}   {apart:.1e}', flush=True)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kinds', nargs='+', choices=['images', 'stays', 'cohort'], default=['images', 'stays', 'cohort'])
    p.add_argument('--images', type=int, default=256)
    p.add_argument('--side', type=int, default=1024, help='of the JPEG files in pixels')
    p.add_argument('--vit', choices=list(VITS), default='laptop')
    p.add_argument('--stays', type=int, default=1000)
    p.add_argument('--repeat', type=int, default=3)
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    print(f'{"":24}{"":24}{"":18} ratio   largest difference')
    with tempfile.TemporaryDirectory() as folder:
        f = Path(folder)
        if {'images', 'cohort'} & set(a.kinds):
            draw_files(f/'files', a.images, a.side)
            cohort = prepare_images(f/'images.csv', f/'files', f/'images', say=len, most_shared=1.)
            dim, depth, heads = VITS[a.vit]
            image_model = model_of('cxr_vits16', cohort, *(f'modalities.cxr.encoder.{k}={v}' for k, v in dict(dim=dim, depth=depth, heads=heads).items()))
        if 'images' in a.kinds:
            arms = {'mmsn-encode': lambda: ours(image_model, f/'files', f/'a.parquet'), 'loop, one': lambda: loop_images(image_model, f/'files', f/'b.parquet', 224, 1),
                    'loop, 64': lambda: loop_images(image_model, f/'files', f/'c.parquet', 224, 64)}
            compare('images', a.images, arms, a.repeat)
        if 'stays' in a.kinds:
            hours = draw_table(f, a.stays)
            stays = prepare_table(f/'table.csv', f/'channels.csv', f/'stays', say=len)
            chart_model = model_of('ehr_lstm', stays)
            arms = {'mmsn-encode': lambda: ours(chart_model, f/'table.csv', f/'d.parquet'), 'loop, one': lambda: loop_stays(chart_model, f/'table.csv', f/'e.parquet', hours, 1),
                    'loop, 64': lambda: loop_stays(chart_model, f/'table.csv', f/'g.parquet', hours, 64)}
            compare('stays', a.stays, arms, a.repeat)
        if 'cohort' in a.kinds:
            arms = {'mmsn-encode': lambda: ours(image_model, f/'images', f/'h.parquet'), 'loop, one': lambda: loop_cohort(image_model, f/'images', f/'i.parquet', ['cxr'], 1),
                    'loop, 64': lambda: loop_cohort(image_model, f/'images', f/'j.parquet', ['cxr'], 64)}
            compare('cohort', a.images, arms, a.repeat)


if __name__ == '__main__': main()
