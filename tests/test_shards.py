"MIMIC in shards: whatever their number, the merge gives the cohort of one preparation, to the byte; what does not fit is refused in one line."
import json, os, shutil, signal, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np, pandas as pd, pytest

from conftest import refused
from mmsn import prepare
from mmsn.data.cohort import Cohort, open_array
from mmsn.data.images import store_images
from mmsn.data.mimic.channels import SPECIMEN
from mmsn.data.mimic.prepare import prepare_mimic
from mmsn.data.mimic.shards import file_print, interleave, merge_shards, prepare_shard
from mmsn.data.shards import shard_name, shard_number, shard_of
from mmsn.data.synthetic import synthesise
from mmsn.data.synthetic_mimic import write_mimic
from mmsn.data.writer import ArrayWriter
from mmsn.files import seal
from mmsn.options import InputError
from mmsn.prepare import main
from mmsn.ranges import PREPARE
from mmsn.testing import open_data

DEMO = open_data('mimic-iv-demo')
QUICK = dict(threads=1, workers=1, image_size=16)


def edit(folder, name, change):
    "Rewrite one table as `change` gives it."
    path = next(Path(folder).rglob(f'{name}.csv.gz'))
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


def shifted(table, **plus):
    "Rows with numbers or times moved on."
    for column, by in plus.items():
        old = table[column]
        new = (pd.to_datetime(old) + pd.Timedelta(by)).dt.strftime('%Y-%m-%d %H:%M:%S').where(old != '', '') if isinstance(by, str) else (old.astype(int) + by).astype(str)
        table = table.assign(**{column: new})
    return table


def make_odd(iv, cxr):
    """What the generator lacks, in every table: patients with a second admission, X-rays with two images, copies of another patient's pixels, a file that is cut, a word
    without a number, a row filed under another subject, a specimen that two patients share."""
    stays = pd.read_csv(iv/'icu'/'icustays.csv.gz', dtype=str)
    again, year = stays.iloc[:20], '365D'
    edit(iv, 'icustays', lambda t: pd.concat([t, shifted(again, stay_id=-20_000_001, hadm_id=3, intime=year, outtime=year)]))
    edit(iv, 'admissions', lambda t: pd.concat([t, shifted(t[t.hadm_id.isin(again.hadm_id)], hadm_id=3, admittime=year, dischtime=year).assign(deathtime='')]))
    edit(iv, 'diagnoses_icd', lambda t: pd.concat([t, shifted(t[t.hadm_id.isin(again.hadm_id)], hadm_id=3), t.iloc[:2].assign(icd_code='ZZ99')]))
    edit(iv, 'chartevents', lambda t: odd_events(t, again, year))
    lab = dict(labevent_id='1', hadm_id='', order_provider_id='', storetime='', valueuom='%', ref_range_lower='', ref_range_upper='', flag='', priority='', comments='', specimen_id='77')
    one, other = stays.iloc[0], next(s for s in stays.itertuples() if differ(s.subject_id, stays.subject_id[0]))
    rows = [dict(lab, subject_id=other.subject_id, itemid=str(SPECIMEN[0]), charttime=other.intime, value='ART.', valuenum=''),
            dict(lab, subject_id=one.subject_id, itemid='50817', charttime=shifted(stays.iloc[:1], intime='3h').intime[0], value='91', valuenum='91')]
    edit(iv, 'labevents', lambda t: pd.concat([t, pd.DataFrame(rows)]))
    odd_images(cxr)


def differ(a, b):
    "Whether two subjects are in different shards of two and of three."
    return all(shard_of([int(a)], n) != shard_of([int(b)], n) for n in (2, 3))


def odd_events(t, again, year):
    more = shifted(t[t.hadm_id.isin(again.hadm_id)], stay_id=-20_000_001, hadm_id=3, charttime=year, storetime=year)
    words = t[t.itemid == '220045'].iloc[:12].assign(value=['refused', 'asleep', *['see note']*10], valuenum='')
    filed = t.iloc[:30].assign(subject_id=t.subject_id.iloc[-1])
    return pd.concat([t, more, words, filed])


def odd_images(cxr):
    table = pd.read_csv(cxr/'mimic-cxr-2.0.0-metadata.csv.gz', dtype=str)
    path = lambda r: cxr/'files'/f'p{r.subject_id[:2]}'/f'p{r.subject_id}'/f's{r.study_id}'/f'{r.dicom_id}.jpg'
    more = table.iloc[:15].assign(dicom_id=table.dicom_id.iloc[:15].str[::-1], StudyTime='235959.5')
    for new, other in zip(more.itertuples(), table.iloc[20:35].itertuples()): shutil.copyfile(path(other), path(new))
    more.loc[more.index[:3], 'ViewPosition'] = 'LATERAL'
    edit(cxr, 'mimic-cxr-2.0.0-metadata', lambda t: pd.concat([t, more, more.iloc[:1].assign(subject_id='')]))
    cut = path(next(table.iloc[40:41].itertuples()))
    cut.write_bytes(cut.read_bytes()[:400])


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Folders of MIMIC-IV, MIMIC-CXR-JPG and its reports."
    folder = tmp_path_factory.mktemp('shards')/'files'
    write_mimic(synthesise(130, image_size=24, seed=4, lacking=.15), folder, reports=True)
    make_odd(folder/'mimic-iv', folder/'mimic-cxr-jpg')
    return folder/'mimic-iv', folder/'mimic-cxr-jpg', folder/'mimic-cxr'


def same(one, other):
    "Assert that two cohorts are the same: hash, description, and the bytes of every file."
    a, b = Cohort.open(one, verify=True), Cohort.open(other, verify=True)
    assert a.hash == b.hash
    names = {p.name for p in Path(one).iterdir()}
    assert names == {p.name for p in Path(other).iterdir()}
    for name in names - {'cohort.json'}: assert (Path(one)/name).read_bytes() == (Path(other)/name).read_bytes(), name
    for meta in (a.meta, b.meta): meta.pop('seal'), meta['provenance'].pop('created')
    assert a.meta == b.meta


def parts(to, files, n, **options):
    "All shards of n, in `to`, the last one first."
    for k in reversed(range(n)): prepare_shard(files[0], to, files[1], shards=n, shard=k, **QUICK, **options)
    return to


CASES = {'stays': ((1, 2, 3), dict(tasks='mortality,phenotyping', hours=48)),
         'benchmark': ((3,), dict(tasks='phenotyping,radiology', rules='benchmark', channels='benchmark', samples='paired', pick='all', several_stays=True)),
         'images': ((3,), dict(tasks='radiology', samples='cxr', views='all')),
         'hours': ((3,), dict(tasks='decompensation,los', every=1, closed='left')),
         'official': ((2,), dict(tasks='mortality,phenotyping,radiology', split='cxr', hours=24, transfers=True)),
         'charts': ((2,), dict(tasks='phenotyping', samples='ehr', rules='benchmark', min_age=50, labels='Shock'))}


@pytest.mark.parametrize('case', CASES)
def test_merged_is_one_preparation(tmp_path, files, case):
    numbers, options = CASES[case]
    summary = prepare_mimic(files[0], tmp_path/'whole', files[1], **QUICK, **options)
    for n in numbers:
        told = merge_shards(parts(tmp_path/f'in{n}', files, n, **options), tmp_path/f'of{n}', threads=1)
        pd.testing.assert_frame_equal(told, summary)
        same(tmp_path/'whole', tmp_path/f'of{n}')
    assert not list(tmp_path.glob('.*')) and not list(tmp_path.glob('*/.*-work'))
    odd = summary.set_index(['part', 'what'])['count']
    if case == 'stays':      # what was made odd is there to be merged
        assert (tmp_path/'whole'/'duplicates.csv').is_file() and odd['images', 'dropped: not readable'] == 1 and odd['words without a number', 'Heart Rate: see note'] > 2


@pytest.mark.skipif(DEMO is None, reason='no MIMIC-IV demo: set MMSN_DATA to the folder that holds mimic-iv-demo')
def test_the_demo(tmp_path):
    "The same with real rows: 100 subjects, some of them with several stays, in three shards."
    options = dict(tasks='decompensation,los', rules='benchmark', threads=1)
    prepare_mimic(DEMO, tmp_path/'whole', **options)
    for k in range(3): prepare_shard(DEMO, tmp_path/'in', shards=3, shard=k, **options)
    merge_shards(tmp_path/'in', tmp_path/'merged', threads=1)
    same(tmp_path/'whole', tmp_path/'merged')


def test_reports_and_lists(tmp_path, files, monkeypatch):
    "A vocabulary is learned from all training patients, in the merge; a list of subjects named from another folder is found."
    stays = pd.read_csv(files[0]/'icu'/'icustays.csv.gz')
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(dict(subject_id=stays.subject_id.unique(), split=np.array(['train', 'test', 'val'])[np.arange(stays.subject_id.nunique()) % 3])).to_csv('mine.csv', index=False)
    options = dict(tasks='mortality', reports=str(files[2]), split='mine.csv')
    prepare_mimic(files[0], 'whole', files[1], **QUICK, **options)
    parts('in', files, 2, **options)
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path/'elsewhere')
    merge_shards('../in', tmp_path/'merged', threads=1)
    same(tmp_path/'whole', tmp_path/'merged')
    assert Cohort.open(tmp_path/'merged').modalities['report'].vocabulary.to_dict() and {p.name for p in (tmp_path/'whole').iterdir()} >= {'reports.parquet'}


def test_a_specimen_of_two_patients(tmp_path, files):
    "Blood that another shard's patient says is arterial is arterial: one row more than without him."
    count = lambda summary: summary.set_index(['part', 'what'])['count']['events', 'used']
    with_him = count(prepare_mimic(files[0], tmp_path/'with', None, tasks='mortality', **QUICK))
    iv = tmp_path/'iv'
    shutil.copytree(files[0], iv)
    edit(iv, 'labevents', lambda t: t[~((t.specimen_id == '77') & (t.value == 'ART.'))])
    assert count(prepare_mimic(iv, tmp_path/'without', None, tasks='mortality', **QUICK)) == with_him - 1


def test_a_shard_without_anybody(tmp_path):
    "Few patients, many shards: the empty ones read no table of events, and are merged like the others."
    write_mimic(synthesise(5, image_size=16, seed=2), tmp_path/'files')
    files = tmp_path/'files'/'mimic-iv', tmp_path/'files'/'mimic-cxr-jpg'
    who = pd.read_csv(files[0]/'icu'/'icustays.csv.gz').subject_id
    n = next(n for n in range(2, 20) if len(set(shard_of(who, n))) < n)
    prepare_mimic(*(files[0], tmp_path/'whole', files[1]), **QUICK)
    folder = parts(tmp_path/'in', files, n)
    empty = next(k for k in range(n) if k not in shard_of(who, n))
    assert len(open_array(folder/f'{empty}-of-{n}'/'ehr.npy')) == len(open_array(folder/f'{empty}-of-{n}'/'cxr.npy')) == 0
    merge_shards(folder, tmp_path/'merged', threads=1)
    same(tmp_path/'whole', tmp_path/'merged')


def test_hash():
    "The numbers that the first version gave: a shard of last year fits one of today."
    ids = [10_000_032, 10_000_980, 19_999_987, 1, 0]
    assert shard_of(ids, 5).tolist() == [4, 1, 4, 0, 0] and shard_of(ids, 64).tolist() == [13, 14, 17, 1, 47] and shard_of(ids, 1).tolist() == [0]*5
    found = np.stack([shard_of(10_000_000 + np.arange(20_000), n) for n in (2, 7, 16)])
    for row, n in zip(found, (2, 7, 16)): assert np.bincount(row, minlength=n).min() > .9*20_000/n


KILLED = '''
import os, signal, sys
import mmsn.data.mimic.prepare as p
def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
p.write_series = die
from mmsn.data.mimic.shards import prepare_shard
iv, cxr, out = sys.argv[1:]
prepare_shard(iv, out, cxr, shards=2, shard=1, tasks='mortality', threads=1, workers=1, image_size=16)
'''


def test_a_killed_shard_goes_on(tmp_path, files):
    options = dict(tasks='mortality')
    prepare_mimic(files[0], tmp_path/'whole', files[1], **QUICK, **options)
    done = subprocess.run([sys.executable, '-c', KILLED, *map(str, files[:2]), str(tmp_path/'in')], env=dict(os.environ, TQDM_DISABLE='1'))
    assert done.returncode == -signal.SIGKILL and not (tmp_path/'in'/'1-of-2').exists() and (tmp_path/'in'/'.1-of-2-work'/'events').is_dir()
    with pytest.raises(InputError, match='holds none'): merge_shards(tmp_path/'in', tmp_path/'merged')
    said = []
    prepare_shard(files[0], tmp_path/'in', files[1], shards=2, shard=1, say=said.append, **QUICK, **options)
    assert said[:2] == ['stays: kept from an earlier run', 'events: kept from an earlier run'] and any(s.startswith('images: ') for s in said)
    prepare_shard(files[0], tmp_path/'in', files[1], shards=2, shard=0, **QUICK, **options)
    merge_shards(tmp_path/'in', tmp_path/'merged', threads=1)
    same(tmp_path/'whole', tmp_path/'merged')
    assert sorted(p.name for p in (tmp_path/'in').iterdir()) == ['0-of-2', '1-of-2']


# --- the command ---

@pytest.fixture(scope='module')
def made(tmp_path_factory, files):
    "Two shards as a person types them, and the words for a third kind."
    folder = tmp_path_factory.mktemp('typed')
    words = ['--mimic-iv', str(files[0]), '--mimic-cxr', str(files[1]), '--image-size', '16', '--threads', '1', '--workers', '1']
    for k in ('0', '1'): main(['mimic', str(folder/'in'), *words, '--shards', '2', '--shard', k])
    return folder, words


def test_command(made, files, tmp_path, capsys, monkeypatch):
    folder, words = made
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '1')
    main(['mimic', str(folder/'in'), *words, '--shards', '2', '--overwrite'])
    said = capsys.readouterr().out
    assert 'SLURM_ARRAY_TASK_ID: this is shard 1 of 2' in said and 'mmsn-prepare merge' in said.splitlines()[-1]
    main(['merge', str(folder/'in'), str(tmp_path/'merged'), '--threads', '1', '--verify'])
    main(['merge', str(folder/'in'/'0-of-2'), str(folder/'in'/'1-of-2'), str(tmp_path/'named')])
    main(['mimic', str(tmp_path/'whole'), *words])                           # without --shards the number of the job says nothing
    same(tmp_path/'whole', tmp_path/'merged'), same(tmp_path/'whole', tmp_path/'named')


def test_an_array_of_jobs(made, tmp_path, capfd, monkeypatch):
    "A job for each shard, here by processes of this machine: what they leave is merged to the cohort of one preparation."
    pytest.importorskip('submitit')
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
    assert main(['mimic', str(tmp_path/'in'), *made[1], '--shards', '2', 'slurm.cluster=local']) is None     # a script exits with what its main returns
    assert '2 jobs' in capfd.readouterr().out and sorted(p.name for p in tmp_path.iterdir()) == ['in', 'in.slurm']
    main(['merge', str(tmp_path/'in'), str(tmp_path/'merged')])
    main(['mimic', str(tmp_path/'whole'), *made[1]])
    same(tmp_path/'whole', tmp_path/'merged')
    with pytest.raises(SystemExit, match='mmsn: 2 of 2 jobs failed: .*says why'): main(['mimic', str(tmp_path/'in'), *made[1], '--shards', '2', 'slurm.cluster=local'])


def test_the_door(tmp_path, files):
    "The same in Python; the tables of events and the images need not be there for the merge, and the small ones may have moved."
    moved = tmp_path/'moved'
    shutil.copytree(files[0], moved/'iv'), shutil.copytree(files[1], moved/'cxr')
    places = [prepare.mimic(tmp_path/'in', moved/'iv', moved/'cxr', shards=2, shard=k, **QUICK) for k in range(2)]
    assert [p.name for p in places] == ['0-of-2', '1-of-2']
    (moved/'iv').rename(moved/'there')
    for name in ('icu/chartevents', 'hosp/labevents'): (moved/'there'/f'{name}.csv.gz').unlink()
    shutil.rmtree(moved/'cxr'/'files')
    with pytest.raises(InputError, match='no folder .*moved/iv'): prepare.merge(places, tmp_path/'merged')
    merged = prepare.merge(places, tmp_path/'merged', mimic_iv=moved/'there')
    same(prepare.mimic(tmp_path/'whole', *files[:2], **QUICK).folder, merged.folder)


@pytest.mark.parametrize('words, said', [
    (['--shards', '2'], '2 shards, but which one is this? Add --shard, 0 to 1'), (['--shards', '2', '--shard', '2'], 'shard should be 0 to 1 with 2 shards, not 2'),
    (['--shard', '1'], 'say with --shards of how many'), (['--shards', '10001', '--shard', '0'], '--shards should lie between 0 and 10,000'),
    (['--shards', '2', '--shard', '0'], 'add --overwrite to replace the shard in it'), (['--shards', '2', '--shard', '-1'], '--shard'), (['--shards', '2.5', '--shard', '0'], 'not a whole number'),
    (['--shards', '3', '--shard', '0', '--verify'], '--verify reads a finished cohort'), (['--shards', '3', '--shard', '0', '--hours', '4000'], 'no stay is left of the'),
    (['--shards', '3', '--shard', '0', '--task', 'mortalty'], "did you mean 'mortality'"), (['slurm.cluster=local'], 'slurm.* is for shards'),
    (['--shards', '2', '--shard', '0', 'slurm.cluster=local'], 'leave --shard out'), (['--shards', '2', 'slurm.cluster=local', 'slurm.processes_per_node=2'], 'a shard is one process'),
    (['--shards', '2', 'slurm.nods=2'], "did you mean 'nodes'")])
def test_refused_shards(made, capsys, monkeypatch, words, said):
    folder, given = made
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
    before = sorted(folder.rglob('*'))
    assert said in refused(main, ['mimic', str(folder/'in'), *given, *words], capsys)
    assert sorted(folder.rglob('*')) == before


@pytest.mark.parametrize('task', ['2', 'x', '', '-1', '9'*400])
def test_refused_number_of_a_job(tmp_path, monkeypatch, task):
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', task)
    with pytest.raises(InputError, match='SLURM_ARRAY_TASK_ID should be 0 to 1 .*--array=0-1') as e: shard_number(2)
    assert len(str(e.value)) < 150
    assert shard_number(2, 1) == 1


def test_nothing_is_left_of_a_refused_shard(tmp_path, files, capsys):
    words = ['mimic', str(tmp_path/'in'), '--mimic-iv', str(files[0]), '--shards', '2', '--shard', '0', '--threads', '1']
    refused(main, [*words, '--hours', '4000'], capsys)
    assert not list(tmp_path.iterdir())
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/'cohort.json').write_text('{}')
    assert 'is a cohort: with --shards OUT is the folder of the shards' in refused(main, words, capsys)


def copy_of(made, to):
    shutil.copytree(made[0]/'in', to)
    return to


def rewritten(folder, **change):
    "The record of a shard, changed and sealed again."
    path = folder/'shard.json'
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | change)))


def test_refused_merges(made, files, tmp_path, capsys):
    "Missing, twice, other options, another version, other tables, changed files, a taken place: one line each, and nothing is written."
    good, out = made[0]/'in', str(tmp_path/'out')
    def say(*words): return refused(main, ['merge', *map(str, words), out], capsys)
    (tmp_path/'nothing').mkdir()
    assert 'is no shard and holds none' in say(tmp_path/'nothing') and 'is no shard and holds none' in say(tmp_path/'nowhere')
    assert '1 of 2 shards are missing, the first is number 1' in say(good/'0-of-2')
    assert 'shard 1 of 2 is there twice' in say(good, good/'1-of-2')
    main(['mimic', str(tmp_path/'other'), *made[1], '--shards', '2', '--shard', '1', '--min-age', '40'])
    assert 'differ in the option min_age: 18 and 40' in say(good/'0-of-2', tmp_path/'other')
    main(['mimic', str(tmp_path/'three'), *made[1], '--shards', '3', '--shard', '1'])
    assert 'differ in the number of shards: 2 and 3' in say(good/'0-of-2', tmp_path/'three')
    for change, said in ((dict(mmsn='0.0'), 'differ in the version of mmsn'), (dict(sources={}), 'differ in the table icustays.csv.gz: one has none'), (dict(invented=True), 'whether patients are invented'),
                         (dict(format=2), 'is no record of a shard'), (dict(files=[]), 'is no record of a shard'), (dict(shard='1'), 'is no record of a shard')):
        shutil.rmtree(tmp_path/'copy', ignore_errors=True)
        rewritten(copy_of(made, tmp_path/'copy')/'1-of-2', **change)
        assert said in say(tmp_path/'copy'), said
    for k in range(2): rewritten(tmp_path/'copy'/f'{k}-of-2', shard=k, mmsn='0.0')
    assert 'prepared by mmsn 0.0, this is' in say(tmp_path/'copy')
    assert not (tmp_path/'out').exists() and not list(tmp_path.glob('.*'))


def test_refused_files(made, files, tmp_path, capsys):
    out = str(tmp_path/'out')
    def say(*words): return refused(main, ['merge', *map(str, words), out], capsys)
    folder = copy_of(made, tmp_path/'copy')/'1-of-2'
    record = (folder/'shard.json').read_text()
    (folder/'shard.json').write_text(record.replace('"hash"', '"cxr"'))
    assert 'its seal does not fit' in say(tmp_path/'copy')
    (folder/'shard.json').write_text('[')
    assert 'is not JSON' in say(tmp_path/'copy')
    (folder/'shard.json').write_text(record)
    whole = (folder/'ehr.npy').read_bytes()
    (folder/'ehr.npy').write_bytes(whole[:-4] + b'\0\0\0\1')
    assert 'ehr.npy is not what was written' in say(tmp_path/'copy')
    (folder/'ehr.npy').unlink()
    assert 'has lost ehr.npy' in say(tmp_path/'copy')
    (folder/'ehr.npy').write_bytes(whole)
    rewritten(folder, files=json.loads(record)['files'] | {'../0-of-2/ehr.npy': 'x'})
    assert 'has lost ../0-of-2/ehr.npy' in say(tmp_path/'copy')
    assert 'choose another folder' in refused(main, ['merge', str(made[0]/'in'), str(made[0]/'in')], capsys)
    iv = tmp_path/'iv'
    shutil.copytree(files[0], iv)
    edit(iv, 'patients', lambda t: t.assign(anchor_age='50'))
    assert 'patients.csv.gz is not the table that the shards were prepared from' in say(made[0]/'in', '--mimic-iv', iv)
    assert not (tmp_path/'out').exists()


def test_bad_images_are_judged_together(tmp_path, files):
    "Two of a hundred and thirty are too many for one preparation; a shard that has one of them goes on, a shard that has both stops."
    cxr = tmp_path/'cxr'
    shutil.copytree(files[1], cxr)
    table = pd.read_csv(cxr/'mimic-cxr-2.0.0-metadata.csv.gz').dropna(subset='subject_id').astype({'subject_id': int})
    def cut(rows):
        for r in rows.itertuples(): (cxr/'files'/f'p{str(r.subject_id)[:2]}'/f'p{r.subject_id}'/f's{r.study_id}'/f'{r.dicom_id}.jpg').write_bytes(b'no image')
    options = dict(tasks='radiology', samples='cxr', **QUICK)
    bad = int(shard_of(table.subject_id.iloc[40:41], 2)[0])                  # the shard of the file that is cut
    good = table[shard_of(table.subject_id, 2) != bad]
    cut(good.iloc[50:51])
    with pytest.raises(InputError, match='cannot be used'): prepare_mimic(None, tmp_path/'whole', cxr, **options)
    for k in range(2): prepare_shard(None, tmp_path/'in', cxr, shards=2, shard=k, **options)
    with pytest.raises(InputError, match='cannot be used'): merge_shards(tmp_path/'in', tmp_path/'merged', threads=1)
    assert not (tmp_path/'merged').exists() and (tmp_path/'merged.rejected.csv').read_text().count('\n') >= 3
    cut(good.iloc[51:56])
    with pytest.raises(InputError, match='cannot be used'): prepare_shard(None, tmp_path/'again', cxr, shards=2, shard=1 - bad, **options)


def test_interleave_refuses_what_does_not_fit(tmp_path):
    np.save(tmp_path/'a.npy', np.zeros((3, 2), np.float32)), np.save(tmp_path/'b.npy', np.zeros((2, 2), np.float64))
    def deal(owner, lengths=None, paths=('a.npy', 'a.npy')):
        with_writer = ArrayWriter(tmp_path/'out.npy', np.float32, (2,))
        interleave(with_writer, [tmp_path/p for p in paths], owner, lengths)
        return with_writer.finish()
    assert deal([0, 1, 1, 0, 1, 0]).shape == (6, 2) and deal([0, 1], [3, 3]).shape == (6, 2)
    for owner, lengths, paths in (([0, 1, 1], None, ('a.npy', 'a.npy')), ([0, 1], [3, 2], ('a.npy', 'b.npy')), ([0, 1], [3, 4], ('a.npy', 'a.npy'))):
        with pytest.raises(InputError, match='prepare this shard again'): deal(owner, lengths, paths)


def test_print_of_a_large_table(tmp_path):
    "Of a large file pieces are read, the last byte too; a small one is read whole."
    path = tmp_path/'large'
    with open(path, 'wb') as f: f.truncate(100 << 20)
    before = file_print(path)
    with open(path, 'r+b') as f: f.seek(-1, 2), f.write(b'x')
    assert file_print(path) != before and file_print(path)[0] == 100 << 20
    (tmp_path/'small').write_bytes(bytes(3 << 20))
    before = file_print(tmp_path/'small')
    with open(tmp_path/'small', 'r+b') as f: f.seek(2 << 20), f.write(b'x')
    assert file_print(tmp_path/'small') != before


def test_names_stand_in_order():
    names = [shard_name(100, k) for k in range(100)]
    assert names == sorted(names) and names[7] == '07-of-100' and shard_name(1, 0) == '0-of-1' and shard_name(10, 9) == '9-of-10'


def test_ranges():
    assert PREPARE['shards'].holds(10_000) and not PREPARE['shards'].holds(10_001) and not PREPARE['shard'].holds(-1)


# --- sources that live in a warehouse: parts by subject, each a table, joined at the end ---

def test_parts_of_a_warehouse(tmp_path, monkeypatch):
    "What the how-to says of Spark: parquet in parts, labels too, then `join`: everybody has the hours, the label and the split that one preparation gives."
    rng, n = np.random.default_rng(0), 40
    who = np.repeat(1000 + np.arange(n), 6)
    events = pd.DataFrame(dict(subject_id=who, time=np.tile(np.arange(6)*2., n), variable=np.tile(['pulse', 'lactate'], 3*n), value=rng.normal(80, 5, 6*n).round(1)))
    labels = pd.DataFrame(dict(subject_id=1000 + np.arange(n), died=np.arange(n) % 2))
    (tmp_path/'channels.csv').write_text('name,unit,low,high,normal\npulse,bpm,1,299,86\nlactate,mmol/L,0,200,1.8\n')
    monkeypatch.chdir(tmp_path)
    for name, t in dict(events=events, labels=labels).items():
        t.to_parquet(f'{name}.parquet', index=False)
        for part, rows in t.groupby(shard_of(t.subject_id, 3)):
            Path(f'export/{name}/part={part}').mkdir(parents=True)
            rows.to_parquet(f'export/{name}/part={part}/part-0000.parquet', index=False)
    main(['table', 'events.parquet', 'channels.csv', 'whole', '--labels', 'labels.parquet', '--hours', '12'])
    for part in range(3): main(['table', *map(str, Path(f'export/events/part={part}').glob('*.parquet')), 'channels.csv', f'parts/{part}', '--labels', *map(str, Path(f'export/labels/part={part}').glob('*.parquet')), '--hours', '12'])
    main(['join', 'parts/0', 'parts/1', 'parts/2', 'all'])
    whole, joined = Cohort.open('whole'), Cohort.open('all')
    assert len(joined) == len(whole) == n and np.allclose(whole.modalities['ehr'].mean, joined.modalities['ehr'].mean, rtol=1e-5)
    at = {s.split(':')[1]: i for i, s in enumerate(joined.samples.subject)}
    for i, s in enumerate(whole.samples.itertuples()):
        j = at[str(getattr(s, 'subject', s.subject_id))]
        assert joined.samples.split[j] == s.split and joined.samples.died[j] == s.died and np.array_equal(joined[j]['ehr'], whole[i]['ehr'])


# --- mmsn-encode ---

def test_embeddings_in_shards(tmp_path, monkeypatch, capsys):
    "The files of all shards, one after the other, are the one file, bit for bit; what does not fit is refused before anything is read."
    from mmsn.encode import main as encode
    from mmsn.model import MMSN
    from mmsn.testing import toy_cohort, toy_config
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
    MMSN.from_config(toy_config(), toy_cohort('cohort', n=50)).save_pretrained('encoder')
    words = ['encoder', 'cohort', 'new.parquet', '--batch-size', '8']
    encode(words)
    for k in range(4):
        monkeypatch.setenv('SLURM_ARRAY_TASK_ID', str(k))
        encode([*words, '--shards', '4'])
    assert 'SLURM_ARRAY_TASK_ID: this is shard 3 of 4' in capsys.readouterr().out
    if find_spec('submitit'):
        monkeypatch.delenv('SLURM_ARRAY_TASK_ID')
        assert encode(['encoder', 'cohort', 'queued.parquet', '--batch-size', '8', '--shards', '2', 'slurm.cluster=local']) is None
        queued = [pd.read_parquet(f'queued.{k}-of-2.parquet') for k in range(2)]
        assert pd.concat(queued, ignore_index=True).equals(pd.read_parquet('new.parquet'))
        monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '3')
    parts = [pd.read_parquet(f'new.{k}-of-4.parquet') for k in range(4)]
    assert pd.concat(parts, ignore_index=True).equals(pd.read_parquet('new.parquet')) and min(map(len, parts)) >= 8
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID')
    before = sorted(tmp_path.iterdir())
    for more, said in ((['--shards', '4'], 'which one is this'), (['--shards', '4', '--shard', '4'], 'should be 0 to 3'), (['--shard', '1'], 'say with --shards'),
                       (['--shards', '8', '--shard', '0'], '50 patients are 7 blocks, too few for 8 shards'), (['--shards', '4', '--shard', '0'], 'new.0-of-4.parquet exists already'),
                       (['--shards', '-1'], '--shards should be 0 to 10000'), (['--shards', '4', '--shard', '-1'], '--shard should be 0 to 10000')):
        assert said in refused(encode, [*words, *more], capsys)
    assert sorted(tmp_path.iterdir()) == before
