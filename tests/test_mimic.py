"MIMIC to a cohort: the counts of the open demo under both rule sets, layouts, resuming, and what is wrong gets one line and exit code 2."
import gzip, os, shutil, signal, struct, subprocess, sys, zlib
from pathlib import Path

import duckdb, numpy as np, pandas as pd, pytest
from PIL import Image

from conftest import refused
from mmsn.data.cohort import Cohort
from mmsn.data.mimic.prepare import prepare_mimic
from mmsn.data.mimic.stays import MORTALITY
from mmsn.data.synthetic import synthesise
from mmsn.data.synthetic_mimic import write_mimic
from mmsn.data.tables import find_table
from mmsn.prepare import main
from mmsn.testing import open_data

DEMO = open_data('mimic-iv-demo')
needs_demo = pytest.mark.skipif(DEMO is None, reason='no MIMIC-IV demo: set MMSN_DATA to the folder that holds mimic-iv-demo')
BOTH = ('clean', 'benchmark')


# --- the demo: every count that is known ---

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "Cohorts of the demo and the counts of their summaries by (rules, task), each made once."
    folder, made = tmp_path_factory.mktemp('demo'), {}
    def get(rules, tasks, **options):
        key = (rules, tasks, *options.items())
        if key not in made:
            out = folder/str(len(made))
            summary = prepare_mimic(DEMO, out, tasks=tasks, rules=rules, channels='benchmark' if rules == 'benchmark' else 'compact', threads=1, **options)
            made[key] = Cohort.open(out, verify=True), summary.set_index(['part', 'what'])['count']
        return made[key]
    return get


def dropped(count, word):
    "How many stays the rule that has `word` in its name dropped."
    stays = count['stays']
    return int(stays[[w.startswith('dropped') and word in w for w in stays.index]].sum())


@needs_demo
@pytest.mark.parametrize('rules, eligible, kept, deaths', [('clean', 110, 53, 8), ('benchmark', 112, 54, 9)])
def test_stays_of_mortality(demo, rules, eligible, kept, deaths):
    cohort, count = demo(rules, 'mortality')
    assert count['stays', 'in icustays'] == 140
    assert dropped(count, 'transfer') == 11                                  # 129 left
    assert dropped(count, 'several') == 129 - eligible
    assert dropped(count, 'younger') == 0
    assert dropped(count, 'shorter than 48') == eligible - kept
    assert count['stays', 'kept'] == len(cohort) == kept
    assert count['positive', MORTALITY] == cohort.samples[MORTALITY].sum() == deaths
    assert (cohort.samples.ehr_length == 48).all()


@needs_demo
@pytest.mark.parametrize('rules, kept, hours', [('clean', 110, 9155), ('benchmark', 112, 9269)])
def test_stays_of_phenotyping(demo, rules, kept, hours):
    cohort, count = demo(rules, 'phenotyping')
    assert len(cohort) == count['stays', 'kept'] == kept and cohort.samples.subject_id.nunique() == 91
    assert cohort.array('ehr').shape == (hours, 34 if rules == 'clean' else 76)
    assert cohort.samples.groupby('subject_id').split.nunique().max() == 1


@needs_demo
def test_clean_says_why_it_keeps_two_stays_fewer(demo):
    stays = demo('clean', 'mortality')[1]['stays']
    assert stays[[w.startswith('dropped') and 'benchmark keeps' in w for w in stays.index]].tolist() == [2]


POSITIVE = {   # stays with each phenotype: of 110 under clean, of 112 under benchmark
    'Acute and unspecified renal failure': (28, 30),
    'Acute cerebrovascular disease': (4, 4),
    'Acute myocardial infarction': (10, 10),
    'Cardiac dysrhythmias': (36, 32),
    'Chronic kidney disease': (25, 26),
    'Chronic obstructive pulmonary disease and bronchiectasis': (16, 16),
    'Complications of surgical procedures or medical care': (28, 27),
    'Conduction disorders': (9, 10),
    'Congestive heart failure; nonhypertensive': (23, 25),
    'Coronary atherosclerosis and other heart disease': (33, 32),
    'Diabetes mellitus with complications': (18, 11),
    'Diabetes mellitus without complication': (26, 26),
    'Disorders of lipid metabolism': (54, 50),
    'Essential hypertension': (46, 46),
    'Fluid and electrolyte disorders': (39, 40),
    'Gastrointestinal hemorrhage': (13, 13),
    'Hypertension with complications and secondary hypertension': (26, 27),
    'Other liver diseases': (13, 14),
    'Other lower respiratory disease': (14, 11),
    'Other upper respiratory disease': (8, 7),
    'Pleurisy; pneumothorax; pulmonary collapse': (15, 11),
    'Pneumonia': (13, 14),
    'Respiratory failure; insufficiency; arrest (adult)': (26, 18),
    'Septicemia (except in labor)': (15, 17),
    'Shock': (15, 15),
}


@needs_demo
@pytest.mark.parametrize('rules', BOTH)
def test_phenotypes(demo, rules):
    cohort, count = demo(rules, 'phenotyping')
    assert {n: int(count['positive', n]) for n in cohort.labels} == {n: both[BOTH.index(rules)] for n, both in POSITIVE.items()}
    assert not np.isnan(cohort.label_matrix()).any() and set(cohort.label_groups.values()) == {'acute', 'mixed', 'chronic'}


SHARE = {      # per cent of the 48 hours of each stay that have a value
    'Capillary refill rate': (13.3, 0.0),
    'Diastolic blood pressure': (94.4, 94.5),
    'Fraction inspired oxygen': (15.7, 15.7),
    'Glascow coma scale eye opening': (27.7, 27.6),
    'Glascow coma scale motor response': (27.4, 27.4),
    'Glascow coma scale total': (27.4, 0.0),
    'Glascow coma scale verbal response': (27.7, 27.6),
    'Glucose': (25.9, 25.5),
    'Heart Rate': (96.1, 96.1),
    'Height': (0.9, 0.0),
    'Mean blood pressure': (94.5, 94.6),
    'Oxygen saturation': (94.5, 94.6),
    'Respiratory rate': (96.0, 96.2),
    'Systolic blood pressure': (94.4, 94.5),
    'Temperature': (34.4, 31.9),
    'Weight': (5.4, 4.6),
    'pH': (11.0, 11.5),
}


@needs_demo
@pytest.mark.parametrize('rules', BOTH)
def test_coverage(demo, rules):
    cohort, _ = demo(rules, 'mortality')
    info, x = cohort.modalities['ehr'], cohort.array('ehr')
    share = {c['name']: round(100*float(x[:, c['mask']].mean()), 1) for c in info.channels}
    assert share == {n: both[BOTH.index(rules)] for n, both in SHARE.items()}


@needs_demo
@pytest.mark.parametrize('rules', BOTH)
def test_every_row_has_a_fate(demo, rules):
    _, count = demo(rules, 'mortality')
    events = count['events']
    assert events['rows of the 17 channels'] == events.sum() - events['rows of the 17 channels']
    assert dict(events) == EVENTS[rules]


EVENTS = {
    'clean': {'rows of the 17 channels': 68386, 'dropped: outside the window': 43266, 'dropped: filed elsewhere': 0, 'dropped: no number': 0, 'dropped: out of range': 16, 'dropped: not arterial': 20, 'used': 25084},
    'benchmark': {'rows of the 17 channels': 69092, 'dropped: outside the window': 44081, 'dropped: filed elsewhere': 0, 'dropped: no number': 319, 'dropped: out of range': 0, 'dropped: not arterial': 0, 'used': 24692},
}


@needs_demo
def test_hourly_tasks(demo):
    cohort, count = demo('clean', 'decompensation,los')
    s = cohort.samples
    assert s.hour.min() == 5 and (s.ehr_length == s.hour).all() and (s.sample_id == s.stay_id*10_000 + s.hour).all()
    assert (len(s), int(s[cohort.labels[0]].sum())) == HOURLY
    assert (s[cohort.labels[1:]].sum(axis=1) == 1).all() and len(cohort.labels) == 11
    assert len(cohort.array('ehr')) == 9155                                   # prefixes share the rows of their stay
    half, _ = demo('clean', 'decompensation,los', every=12)
    assert set(half.samples.sample_id) == set(s.sample_id[s.hour % 12 == 0])


HOURLY = (8606, 152)   # samples, and of them those of patients who die within 24 hours


@needs_demo
def test_channels_and_rules_combine(demo, tmp_path):
    for rules, channels, width in (('clean', 'benchmark', 76), ('benchmark', 'compact', 34)):
        prepare_mimic(DEMO, tmp_path/rules, rules=rules, channels=channels, threads=1)
        made, other = Cohort.open(tmp_path/rules), demo(rules, 'mortality')[0]
        assert made.array('ehr').shape[1] == width
        assert made.samples.sample_id.tolist() == other.samples.sample_id.tolist()
        a, b = ({c['name']: (c, x.array('ehr')) for c in x.modalities['ehr'].channels} for x in (made, other))
        for name in a:                                                        # the same hours, and the same numbers, whatever the columns
            (ca, xa), (cb, xb) = a[name], b[name]
            assert np.array_equal(xa[:, ca['mask']], xb[:, cb['mask']]), name
            if ca['kind'] == cb['kind'] == 'continuous': assert np.array_equal(xa[:, ca['columns'][0]], xb[:, cb['columns'][0]]), name


@needs_demo
def test_left_closed_hours(demo, tmp_path):
    prepare_mimic(DEMO, tmp_path/'left', closed='left', threads=1)
    left, right = Cohort.open(tmp_path/'left'), demo('clean', 'mortality')[0]
    assert left.array('ehr').shape == right.array('ehr').shape and not np.array_equal(left.array('ehr'), right.array('ehr'))


# --- layouts and formats ---

def copy_table(source, target, columns='*', order=''):
    "Write table `source` to `target` (.csv, .csv.gz, .parquet) with other columns and another order of rows."
    target.parent.mkdir(parents=True, exist_ok=True)
    how = '(format parquet)' if target.suffix == '.parquet' else '(header, compression gzip)' if target.suffix == '.gz' else '(header)'
    duckdb.connect().execute(f"copy (select {columns} from read_csv('{source}', all_varchar=true) {order and f'order by {order}'}) to '{target}' {how}")


TABLES = ('hosp/patients', 'hosp/admissions', 'hosp/labevents', 'hosp/diagnoses_icd', 'icu/icustays', 'icu/chartevents')


def rewrite(folder, version, ending='.csv.gz'):
    "The demo (of release 2.2) in the layout of release `version`, in another order of rows."
    for name in TABLES:
        place, columns = name, '*'
        table = name.split('/')[1]
        if version == '1.0':
            if table in ('patients', 'admissions'): place = f'core/{table}'
            if table == 'admissions': columns = '* exclude (race, admit_provider_id), race as ethnicity'
            if table == 'labevents': columns = '* exclude (order_provider_id)'
            if table == 'chartevents': columns = '* exclude (caregiver_id)'
        if version == '3.1':
            if table == 'patients': columns = "* replace (case when row_number() over () = 1 then '2020 - 2022' else anchor_year_group end as anchor_year_group)"
            if table in ('labevents', 'chartevents'): columns = "'x' as first_column, *, 'y' as last_column"
        copy_table(DEMO/f'{name}.csv.gz', folder/f'{place}{ending}', columns, 'hash(columns(*)::varchar)' if table != 'chartevents' else 'hash(charttime), hash(value)')
    return folder


@needs_demo
@pytest.mark.parametrize('rules', BOTH)
def test_layouts_and_formats_give_the_same_cohort(tmp_path, rules):
    options = dict(tasks='mortality,phenotyping', rules=rules, threads=1)
    prepare_mimic(DEMO, tmp_path/'as it is', **options)
    known, layouts = Cohort.open(tmp_path/'as it is'), set()
    layouts.add(known.provenance['layout'])
    for version, ending in (('1.0', '.csv'), ('2.2', '.csv.gz'), ('3.1', '.parquet')):
        prepare_mimic(rewrite(tmp_path/version, version, ending), tmp_path/f'of {version}', **options)
        made = Cohort.open(tmp_path/f'of {version}')
        assert made.hash == known.hash, version
        layouts.add(made.provenance['layout'])
        shutil.rmtree(tmp_path/version)
    assert len(layouts) == 3, layouts                                         # 1.0, 2.2 and 3.1 are told apart, by what the files show


# --- resuming ---

KILLED = '''
import os, signal, sys
import mmsn.data.mimic.prepare as p
def die(con, mimic_iv, folder, *args, **kwargs):
    (p.Path(folder)/'half').write_text('half of the events')
    os.kill(os.getpid(), signal.SIGKILL)
setattr(p, sys.argv[3], die)
p.prepare_mimic(sys.argv[1], sys.argv[2], tasks='mortality,phenotyping', threads=1)
'''


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "60 synthetic patients as MIMIC files."
    return write_mimic(synthesise(60, image_size=32, seed=1, lacking=.2), tmp_path_factory.mktemp('files')/'files')


@pytest.mark.skipif(os.name == 'nt', reason='there is no SIGKILL')
@pytest.mark.parametrize('where, kept', [('scan_events', ['stays']), ('write_series', ['stays', 'events'])])
def test_killed_and_resumed(files, tmp_path, where, kept):
    iv, out = files/'mimic-iv', tmp_path/'cohort'
    killed = KILLED.replace('(con, mimic_iv, folder, *args, **kwargs):\n    (p.Path(folder)/', '(con, a, b, *args, **kwargs):\n    (p.Path(sys.argv[2]).parent/')
    done = subprocess.run([sys.executable, '-c', KILLED if where == 'scan_events' else killed, str(iv), str(out), where])
    assert done.returncode == -signal.SIGKILL and not out.exists()
    said = []
    prepare_mimic(iv, out, tasks='mortality,phenotyping', threads=1, say=said.append)
    assert [s.split(':')[0] for s in said if 'kept from an earlier run' in s] == kept
    prepare_mimic(iv, tmp_path/'direct', tasks='mortality,phenotyping', threads=1)
    assert Cohort.open(out, verify=True).hash == Cohort.open(tmp_path/'direct').hash
    assert {p.name for p in tmp_path.iterdir()} - {'half'} == {'cohort', 'direct'}                # nothing is left over


def test_another_file_is_not_resumed(files, tmp_path):
    "A stage is used again only if its files and its options are the same."
    iv, said = tmp_path/'iv', []
    shutil.copytree(files/'mimic-iv', iv)
    prepare_mimic(iv, tmp_path/'a', threads=1, work=tmp_path, keep_work=True)
    (tmp_path/'a').rename(tmp_path/'b')
    os.utime(find_table(iv, 'chartevents'))
    prepare_mimic(iv, tmp_path/'a', threads=1, work=tmp_path, say=said.append)
    assert any(s.startswith('stays: kept') for s in said) and any(s.startswith('events: done') for s in said)
    assert Cohort.open(tmp_path/'a').hash == Cohort.open(tmp_path/'b').hash and not (tmp_path/'a-work').exists()


# --- hostile input ---

@pytest.fixture
def own(files, tmp_path, monkeypatch):
    "A copy of the files of this test's own, that may be broken."
    shutil.copytree(files, tmp_path/'files')
    monkeypatch.chdir(tmp_path)
    return tmp_path/'files'


IV, CXR = ['--mimic-iv', 'files/mimic-iv', '--threads', 1], ['--mimic-cxr', 'files/mimic-cxr-jpg', '--image-size', 16]


def wrong(capsys, *options, said):
    "The command ends with code 2 and the one line that says `said`; there is no cohort, nothing half-written."
    line = refused(main, ['mimic', 'out', *options], capsys)
    assert said in line, line
    left = {p.name for p in Path().iterdir()} - {'files', 'out.rejected.csv'}
    assert left <= {'.out-work'}, left
    if left: assert not [p for p in Path('.out-work').iterdir() if p.name not in ('stays', 'events', 'images')]
    return line


def rows_of(path, change):
    "Rewrite a table with `change(DataFrame of texts)`."
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


def as_gz(path):
    "Table `path` as .csv.gz."
    if path.suffix == '.gz': return path
    made = path.with_name(path.name + '.gz')
    made.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return made


@pytest.mark.parametrize('table', ['chartevents', 'labevents', 'icustays'])
def test_truncated_gz(own, capsys, table):
    path = as_gz(find_table(own/'mimic-iv', table))
    path.write_bytes(path.read_bytes()[:-60])
    wrong(capsys, *IV, said=path.name)


def test_missing_column(own, capsys):
    rows_of(find_table(own/'mimic-iv', 'chartevents'), lambda t: t.rename(columns={'valuenum': 'valuenumber'}))
    wrong(capsys, *IV, said="has no column 'valuenum'; did you mean 'value")


def test_renamed_table(own, capsys):
    path = find_table(own/'mimic-iv', 'icustays')
    path.rename(path.with_name(path.name.replace('icustays', 'icustay')))
    wrong(capsys, *IV, said="is it the one named 'icustay'?")
    shutil.rmtree(own/'mimic-iv')
    wrong(capsys, *IV, said='no folder files/mimic-iv')


def test_rows_that_are_odd_are_counted(own, capsys):
    "Words for numbers, times out of order, outside the stay, and no times at all: counted, and on it goes."
    prepare_mimic(own/'mimic-iv', 'plain', threads=1)
    path = find_table(own/'mimic-iv', 'chartevents')
    def change(t):
        pulse = t.index[t.itemid == '220045'][:4]
        t.loc[pulse[:2], ['value', 'valuenum']] = [['fast', ''], ['fast', '']]
        t.loc[pulse[2], 'charttime'] = '2031-01-01 00:00:00'                  # decades before the stay
        t.loc[pulse[3], 'charttime'] = 'yesterday'
        return t.iloc[::-1]                                                   # out of order
    rows_of(path, change)
    main(['mimic', 'out', *map(str, IV)])
    shown = capsys.readouterr().out
    assert '2  dropped: no number' in shown and '2  dropped: outside the window' in shown and '2  Heart Rate: fast' in shown
    a, b = Cohort.open('plain'), Cohort.open('out')
    lost = a.array('ehr')[:, 17:].sum() - b.array('ehr')[:, 17:].sum()
    assert 1 <= lost <= 4 and len(a) == len(b)


def test_duplicated_stays(own, capsys):
    path = find_table(own/'mimic-iv', 'icustays')
    rows_of(path, lambda t: pd.concat([t, t.iloc[:3]]))                       # the same rows again are harmless
    prepare_mimic(own/'mimic-iv', 'twice', threads=1)
    assert len(Cohort.open('twice')) == len(set(pd.read_csv(path).stay_id))
    shutil.rmtree('twice')
    rows_of(path, lambda t: pd.concat([t, t.iloc[:1].assign(outtime='2199-01-01 00:00:00')]))
    wrong(capsys, *IV, said='is there twice with different facts')


def huge(side):
    "A PNG of a hundred bytes that says it is `side` pixels wide and high."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


BAD = {'truncated': lambda good: good[:len(good)//2], 'zero bytes': lambda good: b'', 'not an image': lambda good: b'<html>404</html>', 'too large': lambda good: huge(60_000)}


@pytest.mark.parametrize('reason', BAD)
def test_a_few_bad_images_are_listed_many_stop(own, capsys, reason):
    for p in sorted((own/'mimic-cxr-jpg').rglob('*.jpg'))[:9]: p.write_bytes(BAD[reason](p.read_bytes()))
    assert 'images cannot be used, more than 1% of ' in wrong(capsys, *IV, *CXR, said=f'({reason}: ')
    assert pd.read_csv('out.rejected.csv').reason.eq(reason).all()


def test_one_bad_image_in_a_hundred(tmp_path):
    source = write_mimic(synthesise(120, image_size=16, seed=2), tmp_path/'files')
    images = sorted((source/'mimic-cxr-jpg').rglob('*.jpg'))
    images[5].write_bytes(b'')
    Image.open(images[7]).save(images[7], format='PNG')                       # a PNG by the name of .jpg is used
    counts = {}
    for samples, n in (('partial', 120), ('paired', 119), ('cxr', 119)):
        summary = prepare_mimic(source/'mimic-iv', tmp_path/samples, source/'mimic-cxr-jpg', tasks='radiology', samples=samples, image_size=16, threads=1, workers=1)
        counts[samples] = summary.set_index(['part', 'what'])['count']
        cohort = Cohort.open(tmp_path/samples, verify=True)
        assert len(cohort) == n and cohort.present('cxr').sum() == 119
        assert counts[samples]['images', 'dropped: not readable'] == 1 and counts[samples]['images', 'stored'] == 119
        rejected = pd.read_csv(tmp_path/samples/'rejected.csv')
        assert rejected.reason.tolist() == ['zero bytes'] and rejected.path[0].endswith(images[5].name)
    assert np.isnan(Cohort.open(tmp_path/'partial').label_matrix()).all(1).sum() == 1    # no X-ray, no findings


@pytest.mark.parametrize('name', ['../../../../../../../secret', 'a/../../../../../../../secret'])
def test_path_that_leaves_the_folder(own, capsys, name):
    path = find_table(own/'mimic-cxr-jpg', 'mimic-cxr-2.0.0-metadata')
    rows_of(path, lambda t: t.assign(dicom_id=[name, *t.dicom_id[1:]]))
    line = refused(main, ['mimic', 'out', *IV, *CXR], capsys)
    assert 'leaves' in line and not Path('out').exists()


def test_lists_of_subjects(own, capsys):
    subjects = pd.read_csv(find_table(own/'mimic-iv', 'patients')).subject_id
    listed = pd.DataFrame(dict(subject_id=subjects, split=np.where(np.arange(len(subjects)) % 3 == 0, 'test', 'train')))
    listed.to_csv('files/split.csv', index=False)
    main(['mimic', 'out', *map(str, IV), '--split', 'files/split.csv'])
    s = Cohort.open('out').samples
    assert s.split.tolist() == listed.set_index('subject_id').split[s.subject_id].tolist()
    shutil.rmtree('out')
    pd.concat([listed, listed.iloc[:1].assign(split='val')]).to_csv('files/split.csv', index=False)
    wrong(capsys, *IV, '--split', 'files/split.csv', said=f'subject {subjects[0]} is in')
    wrong(capsys, *IV, '--split', 'files/none.csv', said='no list of subjects at files/none.csv')


def test_options_that_do_not_fit(own, capsys):
    for options, said in ((['--task', 'mortalty', *IV], "mean 'mortality'"), (['--task', 'los,mortality', *IV], 'two cohorts'),
                          (['--samples', 'paired', *IV], 'need MIMIC-CXR-JPG'), (['--hours', 0, *IV], 'such as 48'), (CXR, 'MIMIC-IV is missing'),
                          (['--labels', 'Mortality', *IV], "mean 'In-hospital mortality'"), (['--views', 'APP', *IV, *CXR], "no image has the view 'APP'"),
                          (['--hours', 5000, *IV], 'no stay is left')):
        wrong(capsys, *options, said=said)
    assert 'OUT is missing' in refused(main, ['mimic', *IV], capsys)


# --- check ---

def test_check_writes_nothing(own, capsys):
    before = sorted(str(p) for p in Path().rglob('*'))
    main(['mimic', '--check', *map(str, IV[:2]), *CXR[:2]])
    assert 'nothing is written' in capsys.readouterr().out
    assert sorted(str(p) for p in Path().rglob('*')) == before
    find_table(own/'mimic-iv', 'labevents').unlink()
    assert 'labevents' in refused(main, ['mimic', '--check', *IV[:2]], capsys)


# --- the other ways in and out of pairing ---

def test_pairing_never_looks_ahead(own, capsys):
    "An X-ray from after the hours that are read is not paired, unless the guard is taken away."
    path = find_table(own/'mimic-cxr-jpg', 'mimic-cxr-2.0.0-metadata')
    main(['mimic', 'now', *map(str, IV + CXR), '--hours', '48'])
    stays = pd.read_csv(find_table(own/'mimic-iv', 'icustays'), parse_dates=['intime', 'outtime']).set_index('subject_id')
    def later(t):
        when = stays.intime.reindex(t.subject_id.astype(int)) + pd.Timedelta(hours=48, minutes=1)
        keep = when.notna().to_numpy()
        t.loc[keep, 'StudyDate'] = when[keep].dt.strftime('%Y%m%d').to_numpy()
        t.loc[keep, 'StudyTime'] = when[keep].dt.strftime('%H%M%S').astype(int).astype(str).to_numpy()
        return t
    rows_of(path, later)
    long = (stays.outtime - stays.intime > pd.Timedelta(hours=49)).sum()
    assert 'dropped: outside the time read of a stay' in refused(main, ['mimic', 'late', *IV, *CXR], capsys)    # none is left, which is said
    main(['mimic', 'open', *map(str, IV + CXR), '--no-guard'])
    now, wide = (Cohort.open(c).present('cxr').sum() for c in ('now', 'open'))
    assert now > 0 and 0 < wide <= long


def test_hourly_samples_see_only_earlier_xrays(own):
    main(['mimic', 'out', *map(str, IV + CXR), '--task', 'decompensation'])
    s = Cohort.open('out').samples
    meta = pd.read_csv(find_table(own/'mimic-cxr-jpg', 'mimic-cxr-2.0.0-metadata'), dtype=str).set_index('dicom_id')
    taken = pd.to_datetime(meta.StudyDate + meta.StudyTime.str.split('.').str[0].str.zfill(6))
    intime = pd.read_csv(find_table(own/'mimic-iv', 'icustays'), parse_dates=['intime']).set_index('stay_id').intime
    seen = s[s.cxr_index >= 0]
    gap = taken[seen.dicom_id].to_numpy() - intime[seen.stay_id].to_numpy()
    assert len(seen) and (gap <= pd.to_timedelta(seen.hour, 'h').to_numpy()).all()
    first = s[s.stay_id.isin(seen.stay_id)].groupby('stay_id').apply(lambda g: (g.cxr_index >= 0).is_monotonic_increasing)
    assert first.all()


def test_reports(own):
    "Reports lie in a tree of their own; their sections come along, by study."
    meta = pd.read_csv(find_table(own/'mimic-cxr-jpg', 'mimic-cxr-2.0.0-metadata'))
    for i, (subject, study) in enumerate(zip(meta.subject_id, meta.study_id)):
        path = Path(f'files/reports/files/p{str(subject)[:2]}/p{subject}/s{study}.txt')
        path.parent.mkdir(parents=True, exist_ok=True)
        if i: path.write_text(f' FINAL REPORT\n\n FINDINGS:  Lungs of study {study}\n are clear.\n\n IMPRESSION:  Nothing.\n')
    main(['mimic', 'out', *map(str, IV + CXR), '--task', 'radiology', '--reports', 'files/reports'])
    s, reports = Cohort.open('out', verify=True).samples, pd.read_parquet('out/reports.parquet').set_index('study_id')
    seen = s[s.cxr_index >= 0]
    told = reports.loc[seen.study_id]
    assert told.report.tolist() == seen.report.tolist()
    assert all(f == f'Lungs of study {i} are clear.' for i, f in told.findings.items() if f) and told.impression.isin(['Nothing.', '']).all()


# --- times as other programs write them ---

def as_clock(form):
    "A change of a table that writes its times in another form."
    def change(table):
        for c in [c for c in table if c.endswith('time')]:
            times = pd.to_datetime(table[c].where(table[c] != ''))
            table[c] = times.dt.strftime(form).fillna('')
        return table
    return change


@pytest.mark.parametrize('form', ['%Y-%m-%d %I:%M:%S %p', '%Y-%m-%dT%H:%M:%S+00:00', '%d-%b-%Y %H:%M:%S'])
def test_times_of_other_programs(own, form):
    options = dict(tasks='mortality', hours=48, threads=1)
    prepare_mimic(own/'mimic-iv', 'before', **options)
    for name in ('icustays', 'admissions', 'chartevents', 'labevents'): rows_of(find_table(own/'mimic-iv', name), as_clock(form))
    prepare_mimic(own/'mimic-iv', 'after', **options)
    before, after = Cohort.open('before'), Cohort.open('after')
    np.testing.assert_array_equal(before.array('ehr'), after.array('ehr'))
    assert before.samples.equals(after.samples)
