"Image files of every kind of damage, the store's processes, and a run that is killed. The lessons are in the notebook data.images."
import multiprocessing, os, shutil, struct, subprocess, sys, time, zlib

import numpy as np, pandas as pd, psutil, pytest
from fastcore.test import test_eq, test_fail
from PIL import Image
from pathlib import Path

from mmsn.data.images import _cut, _decode, _decode_block, _process_block, _results, check_image, inside, load_image, open_image, store_images
from mmsn.data.writer import CohortWriter
from mmsn.options import InputError

for helper in (test_eq, test_fail): helper.__test__ = False   # fastcore's assertions are no tests of ours
PATHS = [f'files/{i}.jpg' for i in range(5)]


def drawing(height, width, seed=0):
    "A chest that nobody owns: two dark lungs, a bright heart, ribs, noise; (height, width) uint8."
    r = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:height*1j, -1:1:width*1j]
    image = 170 - 40*y**2 + 8*np.sin(25*(y + .3*x**2))
    for side in (-1, 1): image -= 110*np.exp(-(((x - .42*side)/.3)**4 + ((y + .05)/.62)**4))
    image += 70*np.exp(-((x - .12)/.25)**2 - ((y - .3)/.3)**2)*r.uniform(.7, 1.2)
    return np.clip(image + r.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def png_header(width, height):
    "A PNG of 45 bytes that claims any size."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)) + chunk(b'IDAT', b'')


@pytest.fixture
def tmp(tmp_path):
    "A folder with five good files and eight odd ones."
    for name in ('files', 'hostile'): (tmp_path/name).mkdir()
    for i, p in enumerate(PATHS): Image.fromarray(drawing(120 + 10*i, 160, i)).save(tmp_path/p, quality=95)
    whole, hostile = (tmp_path/PATHS[0]).read_bytes(), tmp_path/'hostile'
    contents = {'empty.jpg': b'', 'cut.jpg': whole[:len(whole)//2], 'text.jpg': b'<html>404 not found</html>', 'bomb.png': png_header(60_000, 60_000),
                'warned.png': png_header(10_000, 9_000)}
    for name, content in contents.items(): (hostile/name).write_bytes(content)
    Image.fromarray(drawing(90, 70)).save(hostile/'png.jpg', format='PNG')
    Image.fromarray(drawing(90, 70)).save(hostile/'cut.png')
    (hostile/'cut.png').write_bytes((hostile/'cut.png').read_bytes()[:2000])
    return tmp_path


@pytest.fixture
def store(tmp):
    def store(folder, paths, workers=1, **kw):
        with CohortWriter(tmp/folder, 'drawings') as w:
            stored = store_images(paths, 32, w.add_images('cxr', 32, 32), root=tmp, workers=workers, **kw)
            n = np.arange(len(paths))
            return stored, w.close(pd.DataFrame(dict(sample_id=n, subject_id=n, split='train', cxr_index=stored.index)))
    return store


def test_headers(tmp):
    test_eq(len((tmp/'hostile'/'bomb.png').read_bytes()), 45)
    image = open_image(tmp/'hostile'/'png.jpg')
    test_eq((image.format, image.size), ('PNG', (70, 90)))
    test_fail(lambda: open_image(tmp/'hostile'/'bomb.png'), contains='too large')
    test_fail(lambda: open_image(tmp/'hostile'/'warned.png'), contains='too large')       # Pillow alone would only warn here
    test_fail(lambda: open_image(tmp/'hostile'), contains='no such file')


def test_grey(tmp):
    deep = np.linspace(0, 4095, 64*64).reshape(64, 64).astype(np.uint16)          # 12 bits in 16
    Image.fromarray(deep).save(tmp/'deep.png')
    grey = np.asarray(_decode(tmp/'deep.png')[0])
    test_eq((grey.dtype, grey.min(), grey.max()), (np.uint8, 0, 255))
    assert np.abs(grey - deep/4095*255).max() <= .5
    Image.fromarray(np.full((8, 8), 700, np.uint16)).save(tmp/'flat.png'); test_eq(np.asarray(_decode(tmp/'flat.png')[0]).max(), 0)    # no contrast at all
    colour = np.zeros((8, 8, 3), np.uint8); colour[..., 1] = 200
    Image.fromarray(colour).save(tmp/'colour.png'); test_eq(np.asarray(_decode(tmp/'colour.png')[0])[0, 0], round(.587*200))
    test_fail(lambda: _decode(tmp/'hostile'/'cut.jpg'), contains='truncated')
    test_fail(lambda: _decode(tmp/'hostile'/'cut.png'), contains='truncated')


def test_fit(tmp):
    square = drawing(64, 64)
    Image.fromarray(square).save(tmp/'square.png')
    test_eq(load_image(tmp/'square.png', 64), square)                                        # the right size already: untouched
    stripes = np.zeros((40, 100), np.uint8); stripes[:, :25] = stripes[:, 75:] = 255         # bright ends, dark centre
    Image.fromarray(stripes).save(tmp/'stripes.png')
    test_eq((load_image(tmp/'stripes.png', 20).max(), load_image(tmp/'stripes.png', 20, 'squash').max()), (0, 255))
    test_eq(load_image(tmp/'stripes.png', 200).shape, (200, 200))                            # smaller than wanted: enlarged
    test_fail(lambda: load_image(tmp/'square.png', 64, 'pad'), contains="'crop' or 'squash'")


def test_reduced_decoding(tmp):
    Image.fromarray(np.kron(drawing(636, 764), np.ones((4, 4), np.uint8))).save(tmp/'full.jpg', quality=90)
    image = Image.open(tmp/'full.jpg').convert('L'); w, h = image.size
    full = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=((w - h)/2, 0, (w + h)/2, h)))
    assert np.abs(full.astype(int) - load_image(tmp/'full.jpg', 224)).mean() < 1


def test_check_image(tmp):
    checks = {p.name: check_image(p) for p in sorted((tmp/'hostile').iterdir())}
    test_eq({name: check.reason for name, check in checks.items()},
            {'bomb.png': 'too large', 'cut.jpg': 'truncated', 'cut.png': 'truncated', 'empty.jpg': 'zero bytes', 'png.jpg': '', 'text.jpg': 'not an image',
             'warned.png': 'too large'})
    test_eq(checks['png.jpg'].note, 'PNG named .jpg')
    test_eq((check_image(tmp/'absent.jpg').reason, check_image(tmp/PATHS[0])), ('no such file', ('', '')))


def test_inside():
    test_eq(inside('images', 'p10/a.jpg'), Path('images/p10/a.jpg'))
    for path in ('../secret.jpg', 'a/../../secret.jpg', '/etc/passwd', '..\\secret.jpg'): test_fail(lambda: inside('images', path), contains='leaves the folder')
    test_eq(inside('images', 'a..b.jpg').name, 'a..b.jpg')                                  # dots in a name are just dots


def test_blocks(tmp):
    test_eq(_cut(5, 64), [slice(0, 5)])
    test_eq([len(_cut(n, 64)) for n in (0, 100, 640, 4096, 377_110)], [0, 13, 64, 64, 5893])
    for n in (1, 63, 1000): test_eq(np.concatenate([np.arange(n)[s] for s in _cut(n, 64)]), np.arange(n))          # every one, once, in order
    chunk = _decode_block([tmp/PATHS[0], tmp/'hostile'/'empty.jpg', tmp/'hostile'/'png.jpg'], 64, 'crop')
    test_eq((chunk.images.shape, chunk.reasons, chunk.notes), ((2, 64, 64), ['', 'zero bytes', ''], ['', '', 'PNG named .jpg']))
    test_eq(chunk.images[0], load_image(tmp/PATHS[0], 64))


def test_kept_blocks(tmp):
    (tmp/'kept').mkdir()
    files = [tmp/p for p in PATHS] + [tmp/'hostile'/'empty.jpg']
    again = lambda fit='crop': _process_block(files, 64, fit, tmp/'kept')
    blocks = [again() for _ in range(2)]
    test_eq([b.reused for b in blocks], [False, True])
    for a, b in zip(blocks[0][:3], blocks[1]): test_eq(a, b)
    kept, = (tmp/'kept').iterdir()
    content = bytearray(kept.read_bytes()); content[len(content)//2] ^= 1                       # one bit of the pixels
    kept.write_bytes(content); test_eq(again().reused, False)
    kept.write_bytes(content[:1000]); test_eq(again().reused, False)
    test_eq(again('squash').reused, False)                                                      # another question
    os.utime(files[0], (0, 0)); test_eq(again().reused, False)                                  # a file was touched
    test_eq(again().reused, True)


def test_processes(tmp):
    others = set(multiprocessing.active_children())                                                          # of other tests
    def children(): return [c for c in multiprocessing.active_children() if c not in others]
    jobs = [([tmp/p], 32, 'crop', None) for p in PATHS*4]
    results = list(_results(jobs, 2))
    for job, block in zip(jobs, results): test_eq(block.images[0], load_image(job[0][0], 32))                # in order
    test_eq((len(results), children()), (20, []))                                     # nobody is left
    results = _results(jobs*1000, 2); next(results)
    results.close()                                                                                          # as an error or Ctrl-C would
    assert not children()
    results = _results(jobs*1000, 2); next(results)
    children()[0].kill()                                                              # as the system does when memory runs out
    test_fail(lambda: list(results), contains='use fewer workers')


def test_bad_among_good(tmp, store):
    for p in sorted((tmp/'hostile').iterdir()): shutil.copy(p, tmp/'files')
    names = [f'files/{p.name}' for p in sorted((tmp/'hostile').iterdir())]
    many = (PATHS*200)[:990]
    mixed = many[:500] + names + ['files/absent.jpg'] + many[500:]
    stored, cohort = store('mixed', mixed, workers=2)
    test_eq((len(stored.rejected), len(stored.noted)), (7, 1))
    bad = [mixed.index(p) for p in stored.rejected.path]
    test_eq((np.flatnonzero(stored.index < 0).tolist(), cohort.present('cxr').sum()), (bad, len(mixed) - 7))
    test_eq(np.sort(stored.index[stored.index >= 0]), np.arange(len(mixed) - 7))
    for i in (0, 499, mixed.index('files/png.jpg'), 700): test_eq(cohort[i]['cxr'], load_image(tmp/mixed[i], 32))     # rows after a bad one are not shifted
    test_eq(cohort[bad[0]]['cxr'], None)
    test_eq(store('one', mixed, block=7)[0].index, stored.index)                                          # workers and blocks change nothing
    test_eq((tmp/'one'/'cxr.npy').read_bytes() == (tmp/'mixed'/'cxr.npy').read_bytes(), True)
    with pytest.raises(InputError): store('stopped', names + PATHS*20)
    assert not (tmp/'stopped').exists() and not list(tmp.glob('.stopped*'))
    test_eq(len(pd.read_csv(tmp/'stopped.rejected.csv')), 6)                                   # of the block that made it certain
    test_eq(len(store('forced', names + PATHS*20, most_bad=.1)[0].rejected), 6)                # a person may decide otherwise
    test_fail(lambda: store('leaves', PATHS + ['../elsewhere.jpg']), contains='leaves the folder')
    test_eq(store('none', PATHS)[0].rejected.empty, True)


def test_killed_run(tmp, store):
    "A program without a main guard is killed as soon as four blocks are kept: its processes end, and the next run decodes the rest only."
    Image.fromarray(np.kron(drawing(636, 764), np.ones((4, 4), np.uint8))).save(tmp/'full.jpg', quality=90)
    full_size = [f'files/full-{i}.jpg' for i in range(96)]
    for p in full_size: os.link(tmp/'full.jpg', tmp/p)
    (tmp/'script.py').write_text(f"""from mmsn.data.writer import CohortWriter
from mmsn.data.images import store_images
with CohortWriter({str(tmp/'killed')!r}, 'killed') as w:
    store_images({full_size!r}, 32, w.add_images('cxr', 32, 32), root={str(tmp)!r}, workers=2, resume={str(tmp/'blocks')!r})
""")
    program = subprocess.Popen([sys.executable, tmp/'script.py'], stderr=subprocess.DEVNULL)
    while program.poll() is None and len(list((tmp/'blocks').glob('*.npz'))) < 4: time.sleep(.05)
    orphans = psutil.Process(program.pid).children(recursive=True)
    program.kill(); program.wait()
    gone, alive = psutil.wait_procs(orphans, timeout=10)
    assert len(gone) >= 2 and not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive
    again, cohort = store('again', full_size, workers=2, resume=tmp/'blocks')
    once, _ = store('once', full_size, resume=tmp/'other blocks')
    assert 32 <= again.reused < 96 and once.reused == 0
    assert (tmp/'again'/'cxr.npy').read_bytes() == (tmp/'once'/'cxr.npy').read_bytes()
    test_eq((cohort.present('cxr').all(), not list((tmp/'blocks').glob('.*'))), (True, True))
