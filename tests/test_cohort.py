"Cohorts written, read, damaged and put in order: six invented patients, exact numbers. The lessons are in the notebooks data.cohort, data.writer, data.loader."
import json, os, pickle, shutil

import numpy as np, pandas as pd, psutil, pytest, torch
from fastcore.test import test_close, test_eq, test_fail

from mmsn.data.cohort import Cohort, ModalityInfo, _json, check_samples, offsets, open_array, ranges, sha256
from mmsn.data.loader import epoch_order, loader
from mmsn.data.writer import ArrayWriter, CohortWriter, fit_normaliser, fit_pixels, fit_table
from mmsn.files import seal
from mmsn.options import InputError

for helper in (test_close, test_eq, test_fail): helper.__test__ = False   # fastcore's assertions are no tests of ours

CHANNELS = [dict(name='Heart Rate', kind='continuous', columns=[0, 1], mask=4, unit='bpm', normal=86, low=0, high=350, categories=None),
            dict(name='Rhythm', kind='categorical', columns=[1, 4], mask=5, unit='', normal='sinus', low=None, high=None,
                 categories=['sinus', 'paced', 'fibrillation'])]
COLUMNS = ['Heart Rate', 'Rhythm=sinus', 'Rhythm=paced', 'Rhythm=fibrillation', 'Heart Rate observed', 'Rhythm observed']
LENGTHS = np.array([5, 12, 0, 9, 20, 3])
SAMPLES = pd.DataFrame(dict(
    sample_id=np.arange(100, 106), subject_id=[1, 2, 3, 4, 5, 5], split=['train', 'train', 'train', 'val', 'test', 'test'],
    ehr_start=offsets(LENGTHS), ehr_length=LENGTHS, cxr_index=[0, -1, 1, 2, 3, -1], facts_index=np.arange(6), Death=[0, 1, 0, np.nan, 1, 0]))
FACTS = pd.DataFrame(dict(age=[71., 34, np.nan, 55, 80, 80], male=[1., 0, 1, 1, 0, 0]))
IMAGES = np.random.default_rng(1).integers(0, 256, (4, 32, 32), dtype=np.uint8)


def toy(hours, rng):
    "Grid (hours, 6) of one made-up stay: value, one-hot, two observation masks."
    grid = np.zeros((hours, 6), np.float32)
    grid[:, 0] = rng.normal(90, 10, hours)
    grid[np.arange(hours), 1 + rng.integers(0, 3, hours)] = 1
    grid[:, 4:] = rng.random((hours, 2)) < .8
    return grid


def write(folder, samples=SAMPLES):
    "The toy cohort in `folder`."
    rng = np.random.default_rng(0)
    with CohortWriter(folder, 'toy', labels=['Death'], provenance=dict(command='this test', source='numpy')) as w:
        ehr = w.add_timeseries('ehr', CHANNELS, COLUMNS)
        for hours in LENGTHS: ehr.append(toy(hours, rng))
        w.add_images('cxr', 32, 32).append(IMAGES)
        w.add_tabular('facts', FACTS)
        return w.close(samples)


@pytest.fixture
def cohort(tmp_path): return write(tmp_path/'toy')


def test_folder_and_batches(cohort):
    test_eq(sorted(p.name for p in cohort.folder.iterdir()), ['cohort.json', 'cxr.npy', 'ehr.npy', 'facts.npy', 'samples.parquet'])
    test_eq([b.size for b in loader(cohort, cohort.rows('train'), batch_size=2)], [2, 1])
    test_eq(len(pickle.loads(pickle.dumps(cohort))._arrays), 0)


def test_modality(cohort):
    ehr = cohort.modalities['ehr']
    test_close(ehr.normal*ehr.std + ehr.mean, [86, 1, 0, 0, 0, 0], eps=1e-4)     # 86 bpm, sinus, nobody looked
    test_eq(ModalityInfo.from_dict('ehr', json.loads(json.dumps(ehr.to_dict()))).normal, ehr.normal)
    test_eq((cohort.modalities['cxr'].height, cohort.modalities['cxr'].width, ehr.width, cohort.modalities['facts'].width), (32, 32, 6, 2))


def test_ragged():
    test_eq(offsets([5, 0, 2]), [0, 5, 5])
    test_eq(ranges([10, 99, 3], [3, 0, 2]), [10, 11, 12, 3, 4])
    test_eq(ranges([], []).shape, (0,))


@pytest.mark.parametrize('change', [dict(sample_id=[1, 1, 2, 3, 4, 5]), dict(split=['train']*5 + ['val']), dict(split=['train']*5 + ['validate']),
                                    dict(cxr_index=[4]*6), dict(ehr_length=[99]*6), dict(cxr_index=[np.nan]*6)], ids=str)
def test_samples_refused(change):
    kinds = dict(ehr=('timeseries', LENGTHS.sum()), cxr=('image', 4), facts=('tabular', 6))
    check_samples(SAMPLES, kinds, ['Death'], 'the table')
    with pytest.raises(InputError): check_samples(SAMPLES.assign(**change), kinds, ['Death'], 'the table')
    test_fail(lambda: check_samples(SAMPLES.drop(columns='Death'), kinds, ['Death'], 'the table'), contains="no column 'Death'")


def flip(folder):
    with open(folder/'cxr.npy', 'r+b') as f:
        f.seek(-1, 2); last = f.read(1)
        f.seek(-1, 2); f.write(bytes([last[0] ^ 1]))


def edit(**change):
    return lambda f: (f/'cohort.json').write_text(json.dumps(dict(json.loads((f/'cohort.json').read_text()), **change)))


def test_damage(cohort):
    Cohort.open(cohort.folder, verify=True)
    meta = json.loads((cohort.folder/'cohort.json').read_text())
    leaving = dict(meta['modalities'], cxr=dict(meta['modalities']['cxr'], file='../other/cxr.npy'))
    damages = [
        (flip, True, 'was changed'), (lambda f: os.truncate(f/'ehr.npy', 200), False, 'has 200 bytes'), (lambda f: (f/'cxr.npy').unlink(), False, 'is missing'),
        (edit(format=2), False, 'format 2'), (edit(modalities=leaving), False, 'leaves the cohort folder'),
        (edit(files={'/etc/passwd': {}}), False, 'leaves the cohort folder'), (lambda f: (f/'cohort.json').write_text('{'), False, 'is not JSON')]
    copy = cohort.folder.parent/'copy'
    for change, verify, message in damages:
        shutil.copytree(cohort.folder, copy)
        change(copy)
        with pytest.raises(InputError, match=message) as error: Cohort.open(copy, verify=verify)
        assert '\n' not in str(error.value)
        shutil.rmtree(copy)
    test_fail(lambda: Cohort.open(cohort.folder.parent/'nothing'), contains='make one with mmsn-prepare')


def test_rows_and_labels(cohort):
    item = cohort[1]
    test_eq((item['ehr'].shape, item['cxr'], item['facts'].tolist()), ((12, 6), None, [34, 0]))
    test_eq(cohort[2]['cxr'], IMAGES[1])
    test_eq(cohort.rows('train').tolist(), [0, 1, 2])
    test_eq(cohort.rows('train', ['ehr', 'cxr'], 'paired').tolist(), [0])
    test_eq(cohort.label_matrix(rows=[3, 1]).tolist()[1], [1.]); assert np.isnan(cohort.label_matrix(rows=[3])).all()
    test_eq(cohort.label_matrix([]).shape, (6, 0))
    test_fail(lambda: cohort.rows('train', ['ehrr']), contains="no modality 'ehrr'; did you mean 'ehr'?")
    test_fail(lambda: cohort.label_matrix(['Deth']), contains="did you mean 'Death'?")
    test_fail(lambda: cohort.rows('validate'), contains='no split')


def test_check_has(cohort):
    kinds, columns = dict(ehr='timeseries', facts='tabular'), dict(ehr=COLUMNS, facts=['age', 'male'])
    cohort.check_has(kinds, 'the config')
    cohort.check_has(kinds, 'the config', columns)
    for kinds, columns, message in [
        (dict(xr='image'), {}, "the config reads modality 'xr', which .* does not have"), (dict(ehr='image'), {}, 'of kind timeseries'),
        (dict(facts='tabular'), dict(facts=['age', 'weight']), 'male, weight'), (dict(facts='tabular'), dict(facts=['male', 'age']), 'another order'),
        (dict(facts='tabular'), dict(facts=[]), 'age, male')]:
        with pytest.raises(InputError, match=message): cohort.check_has(kinds, 'the config', columns)


def test_batch(cohort):
    b = cohort.batch([4, 2, 1])
    test_eq((b.data['ehr'].shape, b.data['cxr'].shape, b.data['facts'].shape), ((3, 24, 6), (3, 1, 32, 32), (3, 2)))
    test_eq((b.lengths['ehr'].tolist(), b.present['ehr'].tolist(), b.present['cxr'].tolist()), ([20, 0, 12], [True, False, True], [True, True, False]))
    test_eq(b.data['ehr'][0, :20].numpy(), cohort[4]['ehr'])
    test_eq((b.data['ehr'][2, 12:].abs().sum().item(), b.data['cxr'][2].sum().item()), (0, 0))     # padding and missing are zero
    test_eq((b.select(b.present['cxr']).size, b.select(torch.tensor([2])).index.tolist(), cohort.batch([]).size), (2, [1], 0))
    p = cohort.batch([0, 3], ['ehr', 'cxr'], partner=np.array([3, 1, 2, 0, 4, 5]))                # the X-rays of 0 and 3 change places
    test_eq((p.data['ehr'][0, :5].numpy(), p.data['cxr'][0, 0].numpy(), p.labels[0].item()), (cohort[0]['ehr'], cohort[3]['cxr'], 0))
    b = cohort.batch(range(6))
    shown = torch.where(torch.arange(b.data['ehr'].shape[1]) < b.lengths['ehr'][:, None], b.data['ehr'][..., 0], torch.nan)
    assert torch.isnan(shown[2]).all() and not b.present['cxr'][[1, 5]].any()


def test_array_writer(tmp_path):
    a = ArrayWriter(tmp_path/'a.npy', 'float32', (3,))
    test_eq([a.append(np.ones((n, 3))) for n in (2, 0, 5)], [0, 2, 2])
    test_eq(a.finish().shape, (7, 3))
    test_eq(ArrayWriter(tmp_path/'b.npy', 'uint8', (4, 4)).finish().shape, (0, 4, 4))
    test_fail(lambda: ArrayWriter(tmp_path/'c.npy', 'uint8', (2,)).append(np.ones((1, 2))), contains='holds uint8, not float64')
    np.save(tmp_path/'evil.npy', np.array([dict()], dtype=object), allow_pickle=True)
    test_fail(lambda: open_array(tmp_path/'evil.npy'), contains='not a readable array')


def test_normaliser():
    rng = np.random.default_rng(0)
    x = np.concatenate([toy(40, rng) for _ in range(50)])
    x[7, 0] = 9_999_999; x[7, 4] = 1                                     # a typing error, observed
    starts, hours = np.arange(0, 2000, 40), np.full(50, 40)
    mean, std = fit_normaliser(x, starts, hours, CHANNELS)
    observed = np.clip(x[x[:, 4] > 0, 0].astype(float), 0, 350)
    test_close((mean[0], std[0]), (observed.mean(), observed.std()), eps=1e-9)
    test_eq((mean[1:].tolist(), std[1:].tolist()), ([0]*5, [1]*5))
    for block in (1, 333): test_close(fit_normaliser(x, starts, hours, CHANNELS, block), (mean, std), eps=1e-9)
    x[:, 4] = 0
    test_eq([v[0] for v in fit_normaliser(x, starts, hours, CHANNELS)], [86, 1])     # never observed


def test_pixels_and_tables():
    test_close(fit_pixels(IMAGES, np.arange(4)), (IMAGES.mean()/255, IMAGES.std()/255), eps=1e-9)
    mean, std = fit_table(np.array([[1., 5, np.nan], [3, 5, np.nan], [np.nan, 5, np.nan]]))
    test_eq((mean.tolist(), std.tolist()), ([2, 5, 0], [1, 1, 1]))


def test_json(cohort):
    text = (cohort.folder/'cohort.json').read_text()
    test_eq(json.loads(text)['files']['cxr.npy'], dict(bytes=(cohort.folder/'cxr.npy').stat().st_size, sha256=sha256(cohort.folder/'cxr.npy')))
    test_eq(json.loads(_json(dict(a=['x [1, 2]', '{,'], b=[[1, 2], []], c=[dict(d=1.5)]))), dict(a=['x [1, 2]', '{,'], b=[[1, 2], []], c=[dict(d=1.5)]))


def test_shared_stays(tmp_path):
    shared = pd.concat([SAMPLES, SAMPLES.assign(sample_id=SAMPLES.sample_id + 100, ehr_length=SAMPLES.ehr_length//2)])
    one = write(tmp_path/'shared', shared)
    test_close(one.modalities['ehr'].mean, fit_normaliser(one.array('ehr'), SAMPLES.ehr_start[:3], SAMPLES.ehr_length[:3], CHANNELS)[0], 1e-4)


def test_nothing_half_written(cohort, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    test_fail(lambda: write(tmp_path/'bad', SAMPLES.assign(sample_id=7)), contains='duplicate sample_id, such as 7')
    test_fail(lambda: write(tmp_path/'bad', SAMPLES.assign(subject_id=1)), contains='subjects in more than one split, such as 1')
    test_fail(lambda: write(tmp_path/'toy'), contains='exists already')
    try:
        with CohortWriter(tmp_path/'bad', 'bad') as w:
            w.add_images('cxr', 8, 8).append(IMAGES[:, :8, :8])
            raise KeyboardInterrupt
    except KeyboardInterrupt: pass
    w = CohortWriter(tmp_path/'bad', 'bad'); del w                          # never closed

    def unfinished():
        with CohortWriter(tmp_path/'bad', 'bad') as w:
            w.add_timeseries('ehr', CHANNELS, COLUMNS).append(np.full((sum(LENGTHS), 6), np.nan))
            w.close(SAMPLES)
    test_fail(unfinished, contains='not finite')
    test_eq(sorted(p.name for p in tmp_path.iterdir()), before)


def test_epoch_order():
    test_eq(epoch_order(8, 0, 0).tolist(), [0, 1, 6, 3, 5, 4, 2, 7])       # pinned: this must never change
    test_eq(np.sort(epoch_order(1000, 3, 7)), np.arange(1000))
    orders = np.stack([epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in range(20)])
    assert abs(np.corrcoef(orders) - np.eye(40)).max() < .15               # neighbours in seed or epoch are unrelated (5 standard deviations)
    first = np.bincount([epoch_order(10, s, 0)[0] for s in range(2000)], minlength=10)
    assert ((first - 200)**2/200).sum() < 27.9                             # chi-square with 9 degrees of freedom, p = 0.001


@pytest.fixture
def big(tmp_path):
    "103 patients with stays of 1 to 30 hours and images of 8 pixels."
    n, rng = 103, np.random.default_rng(2)
    with CohortWriter(tmp_path/'big', 'big') as w:
        hours = 1 + np.arange(n) % 30
        w.add_timeseries('ehr', CHANNELS, COLUMNS).append(np.concatenate([toy(h, rng) for h in hours]))
        w.add_images('cxr', 8, 8).append(rng.integers(0, 256, (n, 8, 8), dtype=np.uint8))
        return w.close(pd.DataFrame(dict(sample_id=np.arange(n), subject_id=np.arange(n), split='train', ehr_start=offsets(hours), ehr_length=hours,
                                         cxr_index=np.arange(n))))


def test_global_order(big):
    rows = big.rows('train')
    def order(**kw): return [b.index.tolist() for b in loader(big, rows, shuffle=True, seed=5, epoch=2, **kw)]
    one = order(batch_size=12)
    test_eq(sorted(sum(one, [])), list(range(103)))                              # everyone once
    test_eq((len(one), len(one[-1]), len(order(batch_size=12, drop_last=True))), (9, 7, 8))
    for world in (2, 3, 4, 6):                                                   # rank slices interleave to the one-rank batch
        ranks = [order(batch_size=12//world, world=world, rank=r) for r in range(world)]
        test_eq([[ranks[i % world][b][i//world] for i in range(len(one[b]))] for b in range(9)], one)
        test_eq({len(r) for r in ranks}, {9})
    uneven = [order(size=12, world=5, rank=r) for r in range(5)]                 # 12 on five ranks: 3, 3, 2, 2, 2
    test_eq([len(r[0]) for r in uneven], [3, 3, 2, 2, 2])
    test_eq([[uneven[i % 5][b][i//5] for i in range(len(one[b]))] for b in range(9)], one)
    for start in (0, 3, 8, 9, 20): test_eq(order(batch_size=12, start=start), one[start:])
    assert order(batch_size=12) == one and [b.index.tolist() for b in loader(big, rows, shuffle=True, seed=5, epoch=3, batch_size=12)] != one


def test_workers_change_nothing(big):
    rows, state = big.rows('train'), torch.get_rng_state()
    with_workers = list(loader(big, rows, batch_size=12, shuffle=True, seed=5, epoch=2, workers=2))
    alone = list(loader(big, rows, batch_size=12, shuffle=True, seed=5, epoch=2))
    test_eq([b.index.tolist() for b in with_workers], [b.index.tolist() for b in alone])
    assert all(torch.equal(a.data[k], b.data[k]) for a, b in zip(alone, with_workers) for k in a.data)
    assert torch.equal(torch.get_rng_state(), state)                             # the global generator was left alone
    test_fail(lambda: loader(big, rows, modalities=['xr']), contains='no modality')
    test_eq(sum(b.size for epoch in range(3) for b in loader(big, rows, batch_size=64, shuffle=True, epoch=epoch)), 3*103)


def test_larger_than_memory(cohort, tmp_path):
    "400,000 images of 224 pixels in a sparse file: opening them and reading a batch takes next to no memory."
    n, side, huge = 400_000, 224, tmp_path/'huge'
    huge.mkdir()
    meta = json.loads((cohort.folder/'cohort.json').read_text())
    empty = ArrayWriter(huge/'cxr.npy', 'uint8', (side, side)); empty.n = n; empty._header(); empty.file.close()
    os.truncate(huge/'cxr.npy', empty.begin + n*side*side)
    split = np.array(['train']*8 + ['val', 'test'])[np.arange(n)//3 % 10]
    pd.DataFrame(dict(sample_id=np.arange(n), subject_id=np.arange(n)//3, split=split, cxr_index=np.arange(n),
                      Pneumonia=np.zeros(n, np.float32))).to_parquet(huge/'samples.parquet', index=False)
    files = {f: dict(bytes=(huge/f).stat().st_size, sha256=sha256(huge/f) if f != 'cxr.npy' else '') for f in ('cxr.npy', 'samples.parquet')}
    modalities = dict(cxr=dict(meta['modalities']['cxr'], height=side, width=side))
    (huge/'cohort.json').write_text(json.dumps(seal(dict(meta, name='huge', labels=['Pneumonia'], modalities=modalities, files=files))))
    def resident(): return psutil.Process().memory_info().rss/2**20
    split = None
    before = resident()
    opened = Cohort.open(huge)
    image, batch = opened[n//2]['cxr'], opened.batch(np.arange(0, n, n//64)[:64])
    test_eq((image.shape, batch.data['cxr'].shape), ((side, side), (64, 1, side, side)))
    assert resident() - before < 50
