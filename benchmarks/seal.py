"""What sealing costs: opening a cohort of 400,000 images, comparing it with its hashes, and how fast that is beside `sha256sum`.

    python benchmarks/seal.py [--images 400000] [--side 224] [--hash-gb 4] [--folder DIR]

The images are a sparse file: 20 GB for the eye, next to nothing on the disk. Opening is measured in processes of their own, with the libraries already loaded: seconds, and
what the resident memory grew by, at its highest and afterwards. Hashing is measured on the first `--hash-gb` of them, beside coreutils' `sha256sum` on the same file.
"""
import argparse, json, os, re, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd

from mmsn.data.cohort import _json
from mmsn.data.writer import ArrayWriter
from mmsn.files import seal, sha256

MEASURE = '''
import json, sys, time
import pyarrow.parquet
from mmsn.data.cohort import Cohort
def memory():
    lines = dict(line.split(':') for line in open('/proc/self/status') if line.startswith(('VmRSS', 'VmHWM')))
    return {k: int(v.split()[0])/1024 for k, v in lines.items()}
open('/proc/self/clear_refs', 'w').write('5')          # the highest so far is now
before, start, used = memory(), time.perf_counter(), time.process_time()
cohort = Cohort.open(sys.argv[1])
opened, used = time.perf_counter() - start, time.process_time() - used
after = memory()
if sys.argv[2] == 'verify':
    start = time.perf_counter(); cohort.check_unchanged(); first = time.perf_counter() - start
    top = memory()['VmHWM']
    start = time.perf_counter(); cohort.check_unchanged(); again = time.perf_counter() - start
    print(json.dumps(dict(first=first, again=again, peak=top - before['VmRSS'])))
else: print(json.dumps(dict(seconds=opened, cpu=used, stays=after['VmRSS'] - before['VmRSS'], peak=after['VmHWM'] - before['VmRSS'])))
'''


def cohort_of(folder, n, side, hashed=True):
    "A sealed cohort of `n` black images, sparse, with fourteen labels and the texts that X-rays have."
    folder.mkdir(parents=True)
    empty = ArrayWriter(folder/'cxr.npy', 'uint8', (side, side)); empty.n = n; empty._header(); empty.file.close()
    os.truncate(folder/'cxr.npy', empty.begin + n*side*side)
    rng, at, labels = np.random.default_rng(0), np.arange(n), [f'finding {i}' for i in range(14)]
    split = np.array(['train']*8 + ['val', 'test'])[at//3 % 10]
    texts = dict(dicom_id=[f'{i:08x}-{7*i:08x}' for i in at], view='AP')
    table = pd.DataFrame(dict(sample_id=at, subject_id=at//3, split=split, cxr_index=at, study_id=at//2, **texts, **{k: (rng.random(n) < .1).astype(np.float32) for k in labels}))
    table.to_parquet(folder/'samples.parquet', index=False)
    files = {p.name: dict(bytes=p.stat().st_size, sha256=sha256(p) if hashed or p.suffix != '.npy' else '0'*64) for p in sorted(folder.iterdir())}
    entry = dict(kind='image', file='cxr.npy', height=side, width=side, mean=.5, std=.25)
    meta = dict(format=1, name='sparse', provenance={}, modalities=dict(cxr=entry), labels=labels, label_groups={}, files=files)
    (folder/'cohort.json').write_text(_json(seal(meta)), encoding='utf-8')


def measure(folder, what): return json.loads(subprocess.run([sys.executable, '-c', MEASURE, folder, what], capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def cpu(call):
    "Seconds of processor time that a call takes, its children's included."
    total = lambda: sum(os.times()[:4])
    before = total(); call()
    return total() - before


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--images', type=int, default=400_000)
    p.add_argument('--side', type=int, default=224)
    p.add_argument('--hash-gb', type=float, default=4.)
    p.add_argument('--folder', type=Path)
    a = p.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=a.folder) as tmp:
        big, part = Path(tmp)/'big', Path(tmp)/'part'
        cohort_of(big, a.images, a.side, hashed=False)
        runs = [measure(big, 'open') for _ in range(3)]
        best = {k: min(r[k] for r in runs) for k in runs[0]}
        print(f'open {a.images:,} images of {a.side} pixels ({(big/"cxr.npy").stat().st_size/1e9:.1f} GB, {os.stat(big/"cxr.npy").st_blocks*512/1e6:.1f} MB on disk): '
              f'{best["seconds"]:.2f} s ({best["cpu"]:.2f} s of processor time), +{best["stays"]:.0f} MB, at most +{best["peak"]:.0f} MB (best of {len(runs)})')
        n = max(1, int(a.hash_gb*1e9/a.side**2))
        cohort_of(part, n, a.side)
        gb = (part/'cxr.npy').stat().st_size/1e9
        seen = measure(part, 'verify')
        print(f'compare {gb:.1f} GB with its hashes: {seen["first"]:.1f} s the first time, {seen["again"]*1e3:.1f} ms once remembered, at most +{seen["peak"]:.0f} MB')
        peer = lambda: subprocess.run(['sha256sum', part/'cxr.npy'], check=True, stdout=subprocess.DEVNULL)
        ours, theirs = min(cpu(lambda: sha256(part/'cxr.npy')) for _ in range(2)), min(cpu(peer) for _ in range(2))
        name = re.sub(r'\s+', ' ', subprocess.run(['sha256sum', '--version'], capture_output=True, text=True).stdout.splitlines()[0])
        print(f'hash: {gb/ours:.2f} GB a second of processor time, {name} {gb/theirs:.2f}: {theirs/ours:.2f} times as fast')


if __name__ == '__main__': main()
