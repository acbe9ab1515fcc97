"New patients, from files and from Python, embedded as a cohort that was prepared from the same files; a killed run; what is refused."
import json, os, subprocess, sys, time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmsn import MMSN, open_encoder, prepare
from mmsn.data.cohort import Cohort
from mmsn.data.images import store_images
from mmsn.data.long import prepare_table, read_channels, read_long
from mmsn.data.meds import prepare_meds
from mmsn.data.timeseries import add_series
from mmsn.data.writer import CohortWriter
from mmsn.encode import Sources, encode_patients, encode_source, main
from mmsn.evaluate.features import extract_features
from mmsn.files import seal
from mmsn.options import InputError
from mmsn.testing import toy_cohort, toy_config

CHANNELS = 'name,unit,low,high,normal\nHeart Rate,bpm,0,350,86\nTemperature,°C,25,45,36.6\nLactate,mmol/L,0,40,1.5\n'


def values(table, prefix=''): return table[[c for c in table if '.' in c and c.startswith(prefix)]].to_numpy(float)


def same(a, b): np.testing.assert_allclose(values(a), values(b), atol=1e-6)


def measurements(folder, n=40, seed=0, dates=False):
    "A long table with units, unknown variables, stays of different length, and ids as text."
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        for v, unit, mean, sd in (('Heart Rate', 'bpm', 85, 15), ('Temperature', '°F', 98.5, 1), ('Lactate', 'mmol/L', 2, .5), ('Note', '', 1, 1)):
            for t in np.sort(rng.uniform(0, rng.uniform(3, 60), rng.integers(0, 12))): rows.append((f'p{i:03d}', round(float(t), 3), v, round(float(rng.normal(mean, sd)), 3), unit))
        rows.append((f'p{i:03d}', 0., 'Heart Rate', 80., 'bpm'))
    table = pd.DataFrame(rows, columns=['subject_id', 'time', 'variable', 'value', 'unit']).sample(frac=1, random_state=0)
    if dates: table['time'] = (pd.Timestamp('2150-03-01 07:10') + pd.to_timedelta((table.time*3600).round(), unit='s')).astype(str)
    table.to_csv(folder/'new.csv', index=False)
    (folder/'channels.csv').write_text(CHANNELS, encoding='utf-8')
    return table


def pictures(folder, names, seed=1):
    rng = np.random.default_rng(seed)
    for n in names:
        (folder/'images'/n).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 22), np.uint8)).save(folder/'images'/n)


def trained(cohort, folder, *modalities, **changes):
    MMSN.from_config(toy_config(*modalities, **changes), cohort).save_pretrained(folder)
    return open_encoder(folder)


@pytest.mark.parametrize('dates', [False, True])
def test_table(tmp_path, dates):
    "Text ids, °F beside °C, hours or dates, an hours limit that the encoder remembers."
    measurements(tmp_path, dates=dates)
    prepare_table(tmp_path/'new.csv', tmp_path/'channels.csv', tmp_path/'cohort', hours=24, timestep=.5)
    cohort = Cohort.open(tmp_path/'cohort')
    encoder = trained(cohort, tmp_path/'encoder', 'ehr')
    assert encoder.data['prepared']['hours'] == 24
    told = []
    made = pd.read_parquet(encode_source(encoder, tmp_path/'new.csv', tmp_path/'out.parquet', batch_size=7, say=told.append))
    expected = extract_features(encoder, cohort, np.arange(len(cohort)))
    assert made.subject_id.tolist() == cohort.samples.subject.tolist()
    same(made, expected)
    assert any('Note' in line for line in told)


def test_stays(tmp_path):
    "Several stays a subject, by a table of starts; both ids are kept."
    table = measurements(tmp_path, dates=True)
    starts = pd.DataFrame([(s, f'2150-03-0{d} 06:00:00', f'{s}{d}') for s in sorted(set(table.subject_id)) for d in (1, 2)], columns=['subject_id', 'start', 'stay_id'])
    starts.to_csv(tmp_path/'starts.csv', index=False)
    prepare_table(tmp_path/'new.csv', tmp_path/'channels.csv', tmp_path/'cohort', starts=tmp_path/'starts.csv')
    cohort = Cohort.open(tmp_path/'cohort')
    encoder = trained(cohort, tmp_path/'encoder', 'ehr')
    made = pd.read_parquet(encode_source(encoder, Sources(str(tmp_path/'new.csv'), starts=str(tmp_path/'starts.csv')), tmp_path/'out.parquet'))
    assert made.stay_id.tolist() == cohort.samples.stay_id.tolist() and made.subject_id.nunique() == 40
    same(made, extract_features(encoder, cohort, np.arange(len(cohort))))


@pytest.mark.parametrize('fit', ['crop', 'squash'])
def test_images(tmp_path, fit):
    "Images that are not square, in folders of their own, with facts; the encoder remembers how they were made square."
    names = [f'{i % 3}/{i:02d}.png' for i in range(20)]
    pictures(tmp_path, names)
    pd.DataFrame(dict(image=sorted(names), age=range(30, 50), sex=['F', 'M']*10)).to_csv(tmp_path/'list.csv', index=False)
    prepare.images(tmp_path/'list.csv', tmp_path/'images', tmp_path/'cohort', size=16, fit=fit, facts=['age', 'sex'])
    cohort = Cohort.open(tmp_path/'cohort')
    config = toy_config('cxr', 'facts')
    config = replace(config, modalities={'cxr': config.modalities['cxr'], 'demographics': config.modalities['facts']})
    MMSN.from_config(config, cohort).save_pretrained(tmp_path/'encoder')
    encoder = open_encoder(tmp_path/'encoder')
    made = pd.read_parquet(encode_source(encoder, Sources(str(tmp_path/'images'), facts=str(tmp_path/'list.csv')), tmp_path/'out.parquet', batch_size=6))
    assert made.image.tolist() == sorted(names)
    same(made, extract_features(encoder, cohort))
    rows = pd.read_csv(tmp_path/'list.csv')
    python = encode_patients(encoder, dict(cxr=[tmp_path/'images'/n for n in rows.image], demographics=rows.drop(columns='image')))
    same(python, made)


def meds(folder, n=30, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        t0 = pd.Timestamp('2120-01-01') + pd.Timedelta(days=int(rng.integers(0, 300)))
        rows += [(i, pd.Timestamp('2060-05-01'), 'MEDS_BIRTH', None, None), (i, None, f'GENDER//{"MF"[i % 2]}', None, None), (i, t0, 'ICU_ADMISSION//MICU', None, None)]
        for code, mean, sd in (('HR', 85, 15), ('TEMP//F', 98.5, 1), ('LAC', 18., 4.), ('OTHER', 1, 1)):
            rows += [(i, t0 + pd.Timedelta(hours=float(h)), code, float(rng.normal(mean, sd)), None) for h in rng.uniform(0, 60, rng.integers(1, 9))]
    table = pd.DataFrame(rows, columns=['subject_id', 'time', 'code', 'numeric_value', 'text_value'])
    (folder/'meds'/'data').mkdir(parents=True)
    table.astype(dict(subject_id='int64', text_value='string')).to_parquet(folder/'meds'/'data'/'0.parquet', index=False)
    codes = 'code,channel,unit,low,high,normal,scale,offset\nHR,Heart Rate,bpm,0,350,86,,\nTEMP//*,Temperature,°C,25,45,36.6,0.5555555,-17.77777\nLAC,Lactate,mmol/L,0,40,1.5,0.111,\n'
    (folder/'codes.csv').write_text(codes, encoding='utf-8')


@pytest.mark.parametrize('labelled', [False, True])
def test_meds(tmp_path, labelled):
    "Windows from a start event, and windows up to the prediction times of labels; facts of codes."
    meds(tmp_path)
    how = dict(start='ICU_ADMISSION//*')
    if labelled:
        table = pd.DataFrame([(i, pd.Timestamp('2121-01-01') + pd.Timedelta(hours=i), i % 3 == 0) for i in range(30)], columns=['subject_id', 'prediction_time', 'boolean_value'])
        table.to_parquet(tmp_path/'death.parquet', index=False)
        how |= dict(labels=[str(tmp_path/'death.parquet')])
    hours = 0 if labelled else 48
    prepare_meds(tmp_path/'meds', tmp_path/'codes.csv', tmp_path/'cohort', facts='GENDER//*', hours=hours, **how)
    cohort = Cohort.open(tmp_path/'cohort')
    config = toy_config('ehr', 'facts')
    MMSN.from_config(replace(config, modalities={'ehr': config.modalities['ehr'], 'demographics': config.modalities['facts']}), cohort).save_pretrained(tmp_path/'encoder')
    encoder = open_encoder(tmp_path/'encoder')
    s = Sources(str(tmp_path/'meds'), codes=str(tmp_path/'codes.csv'), start='ICU_ADMISSION//*', labels=tuple(how.get('labels', ())), fact_codes=('GENDER//*',))
    made = pd.read_parquet(encode_source(encoder, s, tmp_path/'out.parquet', batch_size=8))
    assert made.subject_id.tolist() == cohort.samples.subject_id.tolist() and (pd.to_datetime(made.window_end) == cohort.samples.window_end).all()
    same(made, extract_features(encoder, cohort, np.arange(len(cohort))))


def mixed_cohort(folder):
    "Measurements of 40 people and images of 30, of whom 5 have nothing else, put into one cohort by hand."
    measurements(folder)
    pictures(folder, [f'p{i:03d}.png' for i in range(15, 45)])
    channels = read_channels(folder/'channels.csv')
    stays, events, _ = read_long(folder/'new.csv', channels)
    end = events.groupby('stay').hours.max().reindex(stays.index).fillna(0).clip(.5, 48).to_numpy()
    who = [*stays.subject, *(f'p{i:03d}' for i in range(40, 45))]
    with CohortWriter(folder/'cohort', 'mixed', []) as w:
        first, length, _ = add_series(w, 'ehr', channels, events, end)
        at = np.array([int(s[1:]) for s in who])
        stored = store_images([f'p{i:03d}.png' for i in range(15, 45)], 16, w.add_images('cxr', 16, 16), root=folder/'images', workers=1)
        index = np.where(at >= 15, stored.index[np.clip(at - 15, 0, 29)], -1)
        none = np.zeros(5, np.int64)
        cohort = w.close(pd.DataFrame(dict(sample_id=at, subject_id=at, split='train', ehr_start=np.r_[first, none], ehr_length=np.r_[length, none], cxr_index=index)))
    return cohort, who


def test_mixed(tmp_path):
    "Images beside a table, by name and by list; people with one of both."
    cohort, who = mixed_cohort(tmp_path)
    encoder = trained(cohort, tmp_path/'encoder', 'cxr', 'ehr')
    made = pd.read_parquet(encode_source(encoder, Sources(str(tmp_path/'new.csv'), images=str(tmp_path/'images')), tmp_path/'out.parquet', batch_size=9))
    assert made.subject_id.tolist() == who
    assert made['cxr.0'].isna().sum() == 15 and made['ehr.0'].isna().sum() == 5 and made['joint.0'].notna().all()
    same(made, extract_features(encoder, cohort, np.arange(len(cohort))))
    pd.DataFrame(dict(subject_id=[f'p{i:03d}' for i in range(15, 45)], image=[f'p{i:03d}.png' for i in range(15, 45)])).to_csv(tmp_path/'list.csv', index=False)
    s = Sources(str(tmp_path/'new.csv'), images=str(tmp_path/'images'), listed=str(tmp_path/'list.csv'))
    assert pd.read_parquet(encode_source(encoder, s, tmp_path/'again.parquet', batch_size=9)).equals(made)
    table = pd.read_csv(tmp_path/'new.csv')
    python = encode_patients(encoder, dict(ehr=table, cxr={w: tmp_path/'images'/f'{w}.png' for w in who if int(w[1:]) >= 15}))
    same(python.set_index('subject_id').loc[who].reset_index(), made)


def test_words(tmp_path):
    "Channels that are choices are read from a long table by their words; a word that is none is named."
    cohort = toy_cohort(tmp_path/'cohort', 40)
    encoder = trained(cohort, tmp_path/'encoder', 'ehr')
    rows, info = [], cohort.modalities['ehr']
    for i in np.flatnonzero(cohort.present('ehr')):
        x = cohort[i]['ehr']
        rows.append((i, len(x) - .5, 'nothing', '0'))
        for t, row in enumerate(x):
            if row[3]: rows.append((i, t + .5, 'rate', f'{row[0]:.6f}'))
            if row[4]: rows.append((i, t + .5, 'state', ['calm', 'ill'][int(row[2])]))
    table = pd.DataFrame(rows, columns=['subject_id', 'time', 'variable', 'value'])
    table.to_csv(tmp_path/'new.csv', index=False)
    made = pd.read_parquet(encode_source(encoder, tmp_path/'new.csv', tmp_path/'out.parquet'))
    assert (made['ehr.0'].notna()).all() and len(made) == cohort.present('ehr').sum()
    table.replace('ill', 'il').to_csv(tmp_path/'odd.csv', index=False)
    with pytest.raises(InputError, match="'il' for 'state', which is one of 'calm', 'ill'"): encode_source(encoder, tmp_path/'odd.csv', tmp_path/'x.parquet')


def test_killed(tmp_path):
    "SIGKILL after the first parts: the same command goes on, and the file is the same to the byte."
    toy_cohort(tmp_path/'cohort', 400)
    trained(Cohort.open(tmp_path/'cohort'), tmp_path/'encoder', 'cxr', 'ehr')
    words = [sys.executable, '-m', 'mmsn.encode', 'encoder', 'cohort']
    run = lambda out, *more: subprocess.Popen([*words, out, '--batch-size', '16', *more], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    p, parts = run('a.parquet'), tmp_path/'.a.parquet-parts'
    while p.poll() is None and len(list(parts.glob('0*.parquet'))) < 3: time.sleep(.01)
    p.kill()
    p.wait()
    kept = len(list(parts.glob('0*.parquet')))
    assert kept >= 3 and not (tmp_path/'a.parquet').exists()
    p = run('a.parquet')
    said = p.communicate()[0]
    assert p.returncode == 0 and 'kept from an earlier run' in said and not parts.exists()
    p = run('b.parquet')
    p.communicate()
    assert (tmp_path/'a.parquet').read_bytes() == (tmp_path/'b.parquet').read_bytes()
    assert not [f for f in os.listdir(tmp_path) if f.startswith('.') and 'parquet' in f]


def test_old_encoders_open(tmp_path):
    "An encoder of before, without an entry `data`, reads new patients by the defaults."
    cohort = toy_cohort(tmp_path/'cohort', 40)
    trained(cohort, tmp_path/'encoder', 'cxr')
    path = tmp_path/'encoder'/'config.json'
    about = json.loads(path.read_text(encoding='utf-8'))
    about.pop('data'), about.pop('seal')
    path.write_text(json.dumps(seal(about)), encoding='utf-8')
    encoder = open_encoder(tmp_path/'encoder')
    assert encoder.data == {}
    assert encoder.encode(dict(cxr=[np.zeros((16, 16), np.uint8)]))['cxr'].shape == (1, 32)


REFUSED = dict(
    unit=(lambda t: t.assign(unit=None), 'is it another unit', ()),
    unknown_unit=(lambda t: t.replace('bpm', 'parsec'), "'parsec'", ()),
    name=(lambda t: t.replace('Heart Rate', 'heart_rate'), "a channel 'Heart Rate'", ()),
    no_channel=(lambda t: t.assign(variable='x'), 'is a measurement of a channel', ()),
    column=(lambda t: t.rename(columns=dict(time='when')), "no column 'time'", ()),
    decimal=(lambda t: t.assign(value=t.value.astype(str).str.replace('.', ',')), 'decimal point', ()),
    option=(lambda t: t, '--codes is for MEDS', ('--codes', 'c.csv')),
    fit=(lambda t: t, '--fit is for images', ('--fit', 'squash')),
    starts=(lambda t: t, 'no file', ('--starts', 'none.csv')))


@pytest.mark.parametrize('case', REFUSED)
def test_refused(tmp_path, case, capsys):
    "One line and exit code 2, and nothing is left behind."
    change, message, words = REFUSED[case]
    table = measurements(tmp_path)
    prepare_table(tmp_path/'new.csv', tmp_path/'channels.csv', tmp_path/'cohort')
    trained(Cohort.open(tmp_path/'cohort'), tmp_path/'encoder', 'ehr')
    change(table).to_csv(tmp_path/'new.csv', index=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(tmp_path/'encoder'), str(tmp_path/'new.csv'), str(tmp_path/'out.parquet'), *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count('\n') == 1, err
    assert not [f for f in os.listdir(tmp_path) if 'out.parquet' in f]


def test_types(tmp_path):
    "What is no image, no series and no fact, in Python."
    cohort = toy_cohort(tmp_path/'cohort', 40)
    encoder = trained(cohort, tmp_path/'encoder', 'cxr', 'ehr', 'facts')
    image, series = np.zeros((16, 16), np.uint8), cohort[int(np.flatnonzero(cohort.present('ehr'))[0])]['ehr']
    for patients, message in (
            (dict(cxr=[image/255]), 'uint8'), (dict(cxr=['no.png']), 'no.png'), (dict(cxr=[3]), 'int'), (dict(cxr=image[0]), 'should be a list'),
            (dict(ehr=[series[:, :3]]), r'hours, 5'), (dict(ehr=['x']), 'data frame'), (dict(ehr=[series*np.nan]), 'not finite'),
            (dict(ehr=[series*[100, 1, 1, 1, 1]]), 'another unit'), (dict(facts=[[1, 2, 3]]), '2 numbers'), (dict(facts=pd.DataFrame(dict(age=[5]))), "no column 'male'"),
            (dict(cxr=[image], ehr=[series, series]), 'not equally many'), (dict(x=[image]), 'reads no'), ({}, 'no patient'), (dict(facts=pd.DataFrame(dict(age=['old'], male=[1]))), 'numbers')):
        with pytest.raises(InputError, match=message): encode_patients(encoder, patients)


def test_most_bad(tmp_path):
    "A broken image is a refusal that names it; --most-bad 1 gives an empty row and says so."
    pictures(tmp_path, ['a.png', 'b.png'])
    (tmp_path/'images'/'b.png').write_bytes(b'no image')
    cohort = toy_cohort(tmp_path/'cohort', 40)
    encoder, told = trained(cohort, tmp_path/'encoder', 'cxr'), []
    with pytest.raises(InputError, match='b.png'): encode_source(encoder, tmp_path/'images', tmp_path/'x.parquet')
    made = pd.read_parquet(encode_source(encoder, Sources(str(tmp_path/'images'), most_bad=1.), tmp_path/'x.parquet', say=told.append))
    assert made['joint.0'].isna().tolist() == [False, True] and 'b.png' in ' '.join(told)


def test_cohort_of_another_unit(tmp_path):
    "A cohort whose columns have the names of the encoder's, in another unit, is refused."
    measurements(tmp_path)
    prepare_table(tmp_path/'new.csv', tmp_path/'channels.csv', tmp_path/'cohort')
    encoder = trained(Cohort.open(tmp_path/'cohort'), tmp_path/'encoder', 'ehr')
    (tmp_path/'channels.csv').write_text(CHANNELS.replace('°C,25,45,36.6', '°F,80,115,98'), encoding='utf-8')
    prepare_table(tmp_path/'new.csv', tmp_path/'channels.csv', tmp_path/'other')
    with pytest.raises(InputError, match="'°F'.*'°C'"): encode_source(encoder, tmp_path/'other', tmp_path/'x.parquet')


def test_a_median_that_may_be_another_unit_is_told(tmp_path, capsys):
    "Within the limits of its channel it is no error, and it is not silent."
    from mmsn.data.patients import _check_median
    _check_median('lactate', 'mmol/L', 12, 0, 18., 0., 40., (1.9, .7), 'new.csv')
    _check_median('rate', '/min', 12, 0, 95., 0., 300., (80., 10.), 'new.csv')
    said = capsys.readouterr().err
    assert "values of 'lactate' in new.csv is 18, and was 1.9" in said and 'rate' not in said


@pytest.mark.parametrize('words', ['--hours=24', '--time=when', '--outside=.1', '--time-unit=days'])
def test_options_without_a_use_are_refused(tmp_path, words, capsys):
    (tmp_path/'images').mkdir()
    Image.new('L', (16, 16)).save(tmp_path/'images'/'a.png')
    trained(toy_cohort(tmp_path/'cohort', 40), tmp_path/'encoder', 'cxr')
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(tmp_path/'encoder'), str(tmp_path/'images'), str(tmp_path/'out.parquet'), words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and f'{words.split("=")[0]} is for a table' in err and err.count('\n') == 1, err
