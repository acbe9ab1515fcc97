"""Images stored per second and core, against a plain loop with Pillow, on full-size X-rays made here.

    python benchmarks/images.py                      # 512 images of 2544 x 3056 pixels, one process and one a core
    python benchmarks/images.py --images 2000 --workers 1 2 4 8 16

The plain loop is what most preparation scripts do: Image.open, convert('L'), resize, array, one image after the other.
Both read the same files in the same run (files in the page cache) and make the same 224 x 224 array. "Per core" counts
seconds of CPU, start and end of the processes included, so that other work on the machine does not change it.
"""
import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mmsn.config import cli
from mmsn.data.writer import ArrayWriter
from mmsn.data.images import store_images
from mmsn.threads import cores

HEIGHT, WIDTH, ALL = 3056, 2544, 377_110        # the commonest size in MIMIC-CXR-JPG, and the number of its images


def drawing(seed):
    "Ribs, lungs and grain, (HEIGHT, WIDTH) uint8; as a JPEG of quality 95 about 1.5 MB, like MIMIC's."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:HEIGHT*1j, -1:1:WIDTH*1j].astype(np.float32)
    image = 170 - 40*y**2 + 8*np.sin(25*(y + .3*x**2))
    for side in (-1, 1): image -= 110*np.exp(-(((x - .42*side)/.3)**4 + ((y + .05)/.62)**4))
    return np.clip(image + rng.normal(0, 2, image.shape).astype(np.float32), 0, 255).astype(np.uint8)


def write_images(folder, n, kinds=6):
    "`n` JPEG files of `kinds` drawings (each file has its own bytes on disk); their names."
    for k in range(kinds): Image.fromarray(drawing(k)).save(folder/f'kind-{k}.jpg', quality=95)
    names = [f'{i}.jpg' for i in range(n)]
    for i, name in enumerate(names): shutil.copyfile(folder/f'kind-{i % kinds}.jpg', folder/name)
    return names


def plain_loop(folder, names, size):
    "The peer: (n, size, size) uint8, one image after the other."
    out = np.empty((len(names), size, size), np.uint8)
    for i, name in enumerate(names):
        image = Image.open(folder/name).convert('L')
        w, h = image.size
        s = min(w, h)
        box = ((w - s)/2, (h - s)/2, (w + s)/2, (h + s)/2)
        out[i] = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return out


def store(folder, names, size, workers):
    "The same by `store_images`."
    writer = ArrayWriter(folder/'out'/'cxr.npy', np.uint8, (size, size))
    store_images(names, size, writer, root=folder, workers=workers)
    (folder/'out'/'rejected.csv').unlink()
    return writer.finish()


def cpu():
    "Seconds of CPU that this process and its ended children have used."
    return sum(t.ru_utime + t.ru_stime for t in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def rates(call, n):
    "Images a second, images a second of CPU, and the result of one call."
    start, used = time.perf_counter(), cpu()
    result = call()
    return n/(time.perf_counter() - start), n/(cpu() - used), result


@cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=512, help='number of files')
    parser.add_argument('--size', type=int, default=224, help='side of the stored images')
    parser.add_argument('--workers', type=int, nargs='+', default=sorted({1, cores()}), help='numbers of processes to try')
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder/'out').mkdir()
        names = write_images(folder, a.images)
        size = sum((folder/n).stat().st_size for n in names)/len(names)/1e6
        print(f'{a.images} JPEG files of {WIDTH} x {HEIGHT}, {size:.1f} MB each, to {a.size} x {a.size}; {cores()} cores')
        part = names[:max(a.images//4, 12)]
        wall, peer, wanted = rates(lambda: plain_loop(folder, part, a.size), len(part))
        print(f'{"plain Pillow loop":25}{wall:6.1f} images/s; {peer:5.1f} per core')
        for workers in a.workers:
            wall, core, array = rates(lambda: store(folder, names, a.size, workers), len(names))
            apart = np.abs(array[:len(part)].astype(int) - wanted).mean()
            print(f'{f"store_images, {workers} process" + "es"*(workers > 1):25}{wall:6.1f} images/s; {core:5.1f} per core = {core/peer:.2f} x the loop; '
                  f'{ALL:,} images in {ALL/wall/3600:.1f} h; {apart:.2f} of 255 grey levels apart')


if __name__ == '__main__': main()
