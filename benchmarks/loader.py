"""Samples a second of `mmsn.data.loader`, cold and warm, by number of workers, beside a plain Dataset over PNG files.

    python benchmarks/loader.py                                # 8,000 images of 224 pixels, 0, 1 and 2 workers
    python benchmarks/loader.py --images 40000 --workers 0 4 8 --folder /scratch

Both read the same uint8 images in an order shuffled anew, in batches of 64, as tensors; nothing is done with them. The peer is what most
code does: torch's Dataset whose item is np.array(Image.open(file)), in a DataLoader. Cold means that the kernel was asked to forget the
files (posix_fadvise DONTNEED; all that a process without privileges can do); the share of the array that was in memory at the start is
given. A disk that is itself a file on a host may still answer from the host's memory. Warm is the next pass over the same files. CPU
seconds count the workers too. Arms alternate.
"""
import argparse, ctypes, mmap, os, resource, statistics, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmsn.commands import cli
from mmsn.data.cohort import Cohort
from mmsn.data.loader import loader
from mmsn.data.writer import CohortWriter
from mmsn.threads import cores


def write_both(folder, n, size):
    "A cohort of `n` drawn images, and each as a PNG file."
    (folder/'png').mkdir(parents=True)
    rng, (y, x) = np.random.default_rng(0), np.mgrid[-1:1:size*1j, -1:1:size*1j].astype(np.float32)
    plain = [170 - 40*y**2 - 110*np.exp(-((abs(x) - .42)/(.3 + .01*k))**4 - ((y + .05)/.62)**4) for k in range(8)]
    grain = rng.normal(0, 2, (64, size, size)).astype(np.float32)
    with CohortWriter(folder/'cohort', 'drawn', [], {}, dict(command='loader.py', invented=True)) as w:
        images = w.add_images('cxr', size, size)
        for i in range(n):
            one = np.clip(np.roll(plain[i % 8] + grain[i % 64], i, 1), 0, 255).astype(np.uint8)
            Image.fromarray(one).save(folder/'png'/f'{i}.png')
            images.append(one[None])
        w.close(pd.DataFrame(dict(sample_id=np.arange(n), subject_id=np.arange(n), split=np.array(['train']*8 + ['val', 'test'])[np.arange(n) % 10], cxr_index=np.arange(n))))
    os.sync()


def forget(folder):
    "Ask the kernel to forget the files of a folder."
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally: os.close(file)


def in_memory(path):
    "The share of a file that the kernel holds in memory."
    with open(path, 'r+b') as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped)//mmap.PAGESIZE)
        held, start = (ctypes.c_ubyte*pages)(), ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), held)
        del start
    if failed: return float('nan')
    return float((np.frombuffer(held, np.uint8) & 1).mean())


class Files(Dataset):
    "The peer: PNG files, one at a time."
    def __init__(self, folder, n): self.paths = [folder/f'{i}.png' for i in range(n)]
    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return torch.from_numpy(np.array(Image.open(self.paths[i])))


def cpu():
    "Seconds of this process and its ended children."
    return sum(t.ru_utime + t.ru_stime for t in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def one_pass(make):
    "(samples, seconds, CPU seconds) of an epoch over the loader that `make` makes; its workers have ended."
    start, used, n = time.perf_counter(), cpu(), 0
    for batch in make(): n += len(batch) if torch.is_tensor(batch) else batch.size
    return n, time.perf_counter() - start, cpu() - used


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=8000)
    p.add_argument('--size', type=int, default=224, help='their side in pixels')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--workers', type=int, nargs='+', default=sorted({0, 1, cores()}))
    p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--folder', type=Path, help='on the disk that should be measured')
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder = Path(folder)
        write_both(folder, a.images, a.size)
        size = [sum(f.stat().st_size for f in (folder/d).iterdir())/1e6 for d in ('cohort', 'png')]
        print(f'{a.images:,} images of {a.size} pixels: cohort {size[0]:.0f} MB, PNG files {size[1]:.0f} MB; batches of {a.batch}, {cores()} cores', flush=True)
        def ours(workers, epoch):
            cohort = Cohort.open(folder/'cohort')
            return loader(cohort, np.arange(a.images), ['cxr'], a.batch, shuffle=True, epoch=epoch, workers=workers)
        def theirs(workers, epoch): return DataLoader(Files(folder/'png', a.images), a.batch, shuffle=True, num_workers=workers)
        for i in range(a.repeat):
            for workers in a.workers:
                for name, make, where in (('mmsn', ours, 'cohort'), ('PNG files', theirs, 'png')):
                    forget(folder/where)
                    held = in_memory(folder/'cohort'/'cxr.npy') if name == 'mmsn' else float('nan')
                    for state in ('cold', 'warm'):
                        n, seconds, used = one_pass(lambda: make(workers, i))
                        rows.append(dict(arm=name, state=state, workers=workers, rate=n/seconds, core=n/used, held=held))
    table = pd.DataFrame(rows).groupby(['state', 'workers', 'arm'])[['rate', 'core', 'held']].median().unstack()
    print(f'{"":6}{"workers":>8}{"samples/s":>12}{"PNG files":>11}{"ratio":>7}{"a CPU-s":>11}{"PNG files":>11}{"ratio":>7}')
    for (state, workers), row in table.iterrows():
        wall, core = row['rate'], row['core']
        print(f'{state:6}{workers:8}{wall["mmsn"]:12,.0f}{wall["PNG files"]:11,.0f}{wall["mmsn"]/wall["PNG files"]:7.1f}{core["mmsn"]:11,.0f}{core["PNG files"]:11,.0f}{core["mmsn"]/core["PNG files"]:7.1f}')
    print(f'in memory at the start of the cold passes: {statistics.median(r["held"] for r in rows if r["arm"] == "mmsn"):.1%} of the array')


if __name__ == '__main__': main()
