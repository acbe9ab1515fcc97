"Tables of measurements as people have them: columns of any name, stays, units, wide tables, drafts, folders of YAIB. The lessons are in data.formats, data.units, data.draft and data.yaib."
import itertools
from pathlib import Path

import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest

from conftest import one_line
from mmsn.data.cohort import Cohort
from mmsn.data.units import conversion
from mmsn.prepare import main

CHANNELS = 'name,unit,low,high,normal\nHR,bpm,1,300,80\nTemp,C,20,45,37\nGlucose,mg/dL,1,2000,100\n'
LONG = [(1, .5, 'HR', 80.), (1, 1.5, 'HR', 90.), (1, 1.5, 'Temp', 38.5), (2, .2, 'HR', 70.), (2, 2.9, 'Glucose', 110.)]
NAMES = ['subject_id', 'time', 'variable', 'value']


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('ch.csv').write_text(CHANNELS)
    return tmp_path


def made(capsys, *words, out='o'):
    "The cohort that the command makes, and what it printed."
    main(['table', *map(str, words)])
    return Cohort.open(out, verify=True), capsys.readouterr().out


def refused(capsys, *words, said):
    "Exit code 2, one line that says `said`, nothing left behind."
    before = sorted(p.name for p in Path().iterdir())
    with pytest.raises(SystemExit) as stop: main(['table', *map(str, words)])
    error = [l for l in capsys.readouterr().err.splitlines() if l.startswith('mmsn: ')]
    assert stop.value.code == 2 and len(error) == 1 and said in error[0], error
    assert sorted(p.name for p in Path().iterdir()) == before
    return error[0]


def grids(cohort, modality='ehr'):
    "The arrays of all samples."
    return [np.asarray(cohort[i][modality]).tolist() if cohort[i][modality] is not None else None for i in range(len(cohort))]


# -- stays ---------------------------------------------------------------------------------------------------------

STAYS = 'subject_id,stay_id,time,variable,value\n1,10,0.5,HR,80\n1,11,0.5,HR,60\n1,11,1.5,HR,61\n'


def test_two_stays_are_not_merged(capsys):
    Path('k4_stays.csv').write_text(STAYS)
    c, _ = made(capsys, 'k4_stays.csv', 'ch.csv', 'o')
    assert c.samples.stay_id.astype(str).tolist() == ['10', '11'] and c.samples.subject_id.tolist() == [1, 1]
    assert [[r[0] for r in g] for g in grids(c)] == [[80.], [60., 61.]]


def test_labels_by_stay(capsys):
    Path('t.csv').write_text(STAYS)
    Path('y.csv').write_text('stay_id,subject_id,died,split\n11,1,1,train\n10,1,0,train\n12,3,1,test\n')
    c, _ = made(capsys, 't.csv', 'ch.csv', 'o', '--labels', 'y.csv')
    assert dict(zip(c.samples.stay_id.astype(str), c.samples.died)) == {'10': 0, '11': 1, '12': 1}
    assert c.samples.subject_id.tolist() == [1, 1, 3] and grids(c)[2] is None       # labelled, never measured
    Path('y.csv').write_text('stay_id,died\n11,1\n10,0\n12,1\n')
    c, shown = made(capsys, 't.csv', 'ch.csv', 'o', '--labels', 'y.csv', '--overwrite')
    assert len(c) == 2 and 'labelled, left out: no row in the table' in shown       # whose stay 12 is, nobody says
    Path('y.csv').write_text('stay_id,subject_id,died\n11,2,1\n10,1,0\n')
    refused(capsys, 't.csv', 'ch.csv', 'p', '--labels', 'y.csv', said='stay 11 is of subject 1')


def test_stays_with_timestamps(capsys):
    rows = [('1', 'A', '2150-03-01 08:30'), ('1', 'A', '2150-03-01 09:15'), ('1', 'B', '2150-03-09 12:00'), ('2', 'C', '2150-03-01 00:10')]
    pd.DataFrame(rows, columns=['subject_id', 'stay_id', 'time']).assign(variable='HR', value=[80, 81, 60, 50]).to_csv('t.csv', index=False)
    c, _ = made(capsys, 't.csv', 'ch.csv', 'o')
    assert [[r[0] for r in g] for g in grids(c)] == [[81.], [60.], [50.]]               # hour 0 of each stay is its first row


def test_stays_and_starts_must_agree(capsys):
    Path('t.csv').write_text(STAYS + '1,11,-3,HR,20\n1,,0.5,HR,20\n')
    Path('s.csv').write_text('subject_id,stay_id,start,end\n1,10,0,4\n1,11,0,1\n')
    refused(capsys, 't.csv', 'ch.csv', 'o', '--starts', 's.csv', said='is a stay that is there already')   # two stays at one time
    Path('s.csv').write_text('subject_id,stay_id,start,end\n1,10,0.25,4\n1,11,0,1\n')
    c, shown = made(capsys, 't.csv', 'ch.csv', 'o', '--starts', 's.csv')
    assert [[r[0] for r in g] for g in grids(c)] == [[80.]*4, [60.]]
    for said in ('before the start of its stay', 'after the end of its stay', 'no stay_id'): assert said in shown
    for text, said in (('subject_id,start\n1,0\n', 'needs a stay_id'), ('subject_id,stay_id,start\n2,10,0\n1,11,0\n', 'stay 10 is of subject 1'),
                       ('subject_id,stay_id,start\n1,a,0\n1,b,1\n', 'only 0 of 2 stays')):
        Path('s.csv').write_text(text)
        refused(capsys, 't.csv', 'ch.csv', 'p', '--starts', 's.csv', said=said)
    Path('t.csv').write_text('subject_id,stay_id,time,variable,value\n1,,0.5,HR,80\n')
    refused(capsys, 't.csv', 'ch.csv', 'p', said='no row of t.csv names its stay')
    Path('t.csv').write_text(STAYS + '2,11,0.5,HR,20\n')
    refused(capsys, 't.csv', 'ch.csv', 'p', said='stay 11 is of subject 1 in one row and of 2 in another')


# -- units ---------------------------------------------------------------------------------------------------------

UNITS = 'subject_id,time,variable,value,unit\n1,0.5,Glucose,5.5,mmol/L\n1,1.5,Glucose,99,mg/dL\n2,0.5,Temp,98.6,F\n2,1.5,Temp,37,C\n'


def test_units_are_converted(capsys):
    Path('k4_units.csv').write_text(UNITS)
    c, shown = made(capsys, 'k4_units.csv', 'ch.csv', 'o')
    one, two = np.array(grids(c)[0]), np.array(grids(c)[1])
    np.testing.assert_allclose(one[:, 2], [5.5*18.0156, 99], rtol=1e-6)
    np.testing.assert_allclose(two[:, 1], [37., 37.], atol=1e-4)
    assert 'Glucose: converted from mmol/L to mg/dL' in shown and 'Temp: converted from F to C' in shown


@pytest.mark.parametrize('rows, channels, said', [
    ('1,0.5,Glucose,5.5,IU\n', None, "1 rows of 'Glucose' in t.csv are in 'IU', the channel is in 'mg/dL'"),
    ('1,0.5,HR,5.5,mmol/L\n1,0.6,Temp,37,C\n', None, "1 rows of 'HR'"),
    ('1,0.5,Glucose,5.5,mmol/L\n1,1.5,Glucose,99,\n', None, 'have no unit'),
    ('1,0.5,Temp,98.6,F\n1,1.5,Temp,37,C\n', 'name,unit,low,high,normal\nTemp,,20,120,37\n', 'say in the table of channels'),
    ('1,0.5,Hb,8,mmol/L\n', 'name,unit,low,high,normal\nHb,g/dL,1,25,12\n', 'no factor is known'),
])
def test_units_that_cannot_be_converted(capsys, rows, channels, said):
    Path('t.csv').write_text('subject_id,time,variable,value,unit\n' + rows)
    if channels: Path('ch.csv').write_text(channels)
    refused(capsys, 't.csv', 'ch.csv', 'o', said=said)


def test_units_that_say_nothing_new(capsys):
    Path('t.csv').write_text('subject_id,time,variable,value,unit\n1,0.5,HR,80,/min\n1,1.5,HR,81,\n1,1.6,other,5,??\n1,0.5,Temp,37,°C\n')
    c, shown = made(capsys, 't.csv', 'ch.csv', 'o')
    assert [r[0] for r in grids(c)[0]] == [80., 81.] and 'HR: without a unit, taken as bpm' in shown and 'converted' not in shown
    Path('ch.csv').write_text('name,normal\nHR,80\nTemp,37\n')
    c, shown = made(capsys, 't.csv', 'ch.csv', 'o', '--overwrite')
    assert 'Temp: kept in °C, the channel names no unit' in shown


FACTORS = [  # value, unit, target, channel, what it is (clinical tables: AMA Manual of Style, SI conversion)
    (5.5, 'mmol/L', 'mg/dL', 'Glucose', 99.1), (99.1, 'mg/dL', 'mmol/L', 'glu', 5.5), (88.4, 'µmol/L', 'mg/dL', 'Creatinine', 1.), (1., 'mg/dl', 'umol/l', 'crea', 88.4),
    (17.1, 'μmol/L', 'mg/dL', 'Bilirubin', 1.), (2., 'mmol/L', 'mg/dL', 'Lactate', 18.02), (120., 'g/L', 'g/dL', 'Hemoglobin', 12.), (12., 'g/dL', 'g/l', 'hgb', 120.),
    (7., 'mmol/L', 'mg/dL', 'BUN', 19.6), (7., 'mmol/L', 'mg/dL', 'Urea', 42.04), (2.5, 'mmol/L', 'mg/dL', 'Calcium', 10.02), (5., 'mEq/L', 'mmol/L', 'Calcium', 2.5),
    (1., 'mmol/L', 'mg/dL', 'Magnesium', 2.43), (2., 'mEq/L', 'mmol/L', 'Mg', 1.), (4., 'mmol/L', 'mEq/L', 'Potassium', 4.), (140., 'mEq/L', 'mmol/L', 'Na', 140.),
    (98.6, '°F', '°C', 'Temp', 37.), (37., 'C', 'F', 'Temp', 98.6), (310.15, 'K', 'deg C', 'T', 37.), (150., 'lb', 'kg', 'Weight', 68.04), (150., 'lbs', 'kg', 'W', 68.04),
    (70., 'in', 'cm', 'Height', 177.8), (1.78, 'm', 'cm', 'Height', 178.), (13.3, 'kPa', 'mmHg', 'PaO2', 99.8), (40, 'mm Hg', 'kPa', 'pCO2', 5.33), (10., 'cmH2O', 'mmHg', 'PEEP', 7.36),
    (40., '%', 'fraction', 'FiO2', .4), (.4, 'fraction', '%', 'FiO2', 40.), (.42, 'L/L', '%', 'Hct', 42.), (7.5, '10^9/L', 'K/uL', 'WBC', 7.5), (7.5, 'G/L', '10*3/uL', 'WBC', 7.5),
    (7500., '/µL', 'K/uL', 'WBC', 7.5), (5., 'x10^12/L', 'M/uL', 'RBC', 5.), (2., 'mg/L', 'mg/dL', 'CRP', .2), (5., 'ng/mL', 'ug/L', 'Troponin', 5.), (5., 'ng/L', 'ng/mL', 'TnT', .005),
    (60., 'ml/h', 'mL/min', 'Urine', 1.), (1., 'L', 'ml', 'Urine', 1000.), (30., 'U/L', 'IU/L', 'ALT', 30.), (.5, 'µkat/L', 'U/L', 'ALT', 30.), (80., 'beats/min', 'bpm', 'HR', 80.),
    (80., '{beats}/min', '/min', 'HR', 80.), (100., 'mmHg', 'mm[Hg]', 'MAP', 100.), (3.2, 'mmol/L', 'mg/dL', 'Phosphate', 9.91), (24., 'mmol/L', 'mEq/L', 'HCO3', 24.)]


@pytest.mark.parametrize('value, unit, target, name, right', FACTORS)
def test_factors(value, unit, target, name, right):
    factor, offset = conversion(unit, target, name)
    assert value*factor + offset == pytest.approx(right, rel=5e-3)
    back, shift = conversion(target, unit, name)
    assert (value*factor + offset)*back + shift == pytest.approx(value, rel=1e-9)     # and back again


@pytest.mark.parametrize('unit, target, name', [
    ('mmol/L', 'mg/dL', 'X'), ('mmol/L', 'g/dL', 'Hemoglobin'), ('mmol/L', 'mg/dL', 'Creatine Kinase'), ('%', 'mg/dL', 'Glucose'), ('F', 'mmHg', 'Temp'), ('g/L', '10^9/L', 'WBC'),
    ('mEq/L', 'mmol/L', 'X'), ('mL', 'mL/h', 'Urine'), ('kg', 'cm', 'Weight'), ('foo', 'bar', ''), ('foo', 'mg/dL', 'Glucose'), ('', 'mg/dL', 'Glucose'), ('1', 'mg', ''), ('mL/min', 'mg/dL', 'Creatinine')])
def test_no_factor_is_guessed(unit, target, name): assert conversion(unit, target, name) is None


def test_units_of_any_text():
    "Whatever stands in the column: no traceback, no factor between dimensions, and each factor undone by the one back."
    given = pytest.importorskip('hypothesis')
    from hypothesis import strategies as st
    from mmsn.data.units import readings
    words = sorted({u for _, u, v, _, _ in FACTORS} | {v for _, u, v, _, _ in FACTORS})
    names = sorted({n for *_, n, _ in FACTORS})

    @given.settings(max_examples=500, deadline=None, database=None)
    @given.given(st.one_of(st.sampled_from(words), st.text(max_size=12)), st.one_of(st.sampled_from(words), st.text(max_size=12)), st.one_of(st.sampled_from(names), st.text(max_size=12)), st.floats(.01, 1e4))
    def check(unit, target, name, value):
        way, back = conversion(unit, target, name), conversion(target, unit, name)
        assert (way is None) == (back is None)
        if way is None: return
        assert np.isfinite(way).all() and way[0] > 0
        assert (value*way[0] + way[1])*back[0] + back[1] == pytest.approx(value, rel=1e-8, abs=1e-6)
        a, b = {r.dimension for r in readings(unit)}, {r.dimension for r in readings(target)}
        assert a & b or way == (1., 0.) or {*a, *b} <= {'mass a litre', 'amount a litre', 'equivalents a litre', 'count'}
    check()


# -- names of columns, wide tables ---------------------------------------------------------------------------------

def long(names=NAMES): return pd.DataFrame(LONG, columns=names)


def wide(): return long().pivot(index=['subject_id', 'time'], columns='variable', values='value').reset_index()


@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_names_are_options(capsys, kind):
    write = lambda t, p: t.to_csv(p, index=False) if kind == 'csv' else t.to_parquet(p)
    write(long(), f't.{kind}')
    write(long(['pid', 'charttime', 'item', 'valuenum']), f'u.{kind}')
    a, _ = made(capsys, f't.{kind}', 'ch.csv', 'o')
    b, _ = made(capsys, f'u.{kind}', 'ch.csv', 'p', '--subject', 'pid', '--time', 'charttime', '--variable', 'item', '--value', 'valuenum', out='p')
    assert np.array_equal(a.array('ehr'), b.array('ehr')) and a.samples.equals(b.samples)
    Path('y.csv').write_text('pid,died\n1,1\n2,0\n')                                   # labels and starts may use these names too
    Path('s.csv').write_text('pid,start\n1,0\n2,0\n')
    c, _ = made(capsys, f'u.{kind}', 'ch.csv', 'p', '--subject', 'pid', '--time', 'charttime', '--variable', 'item', '--value', 'valuenum', '--labels', 'y.csv', '--starts', 's.csv', '--overwrite', out='p')
    assert np.array_equal(a.array('ehr'), c.array('ehr')) and c.samples.died.tolist() == [1, 0]


def test_names_that_are_not_there(capsys):
    long(['pid', 'time', 'variable', 'value']).to_csv('t.csv', index=False)
    assert 'did you mean' not in refused(capsys, 't.csv', 'ch.csv', 'o', said="there are 'pid', 'time', 'variable', 'value'; --subject names it")
    refused(capsys, 't.csv', 'ch.csv', 'o', '--subject', 'pidd', said="did you mean 'pid'?")
    refused(capsys, 't.csv', 'ch.csv', 'o', '--subject', 'pid', '--unit', 'valueuom', said="no column 'valueuom'")
    refused(capsys, 't.csv', 'ch.csv', 'o', '--subject', 'pid', '--time', 'pid', said='two things at once')
    long().rename(columns=dict(value='val')).to_csv('t.csv', index=False)
    refused(capsys, 't.csv', 'ch.csv', 'o', said="no column 'value'; did you mean 'val'?")


@pytest.mark.parametrize('kind, empty', list(itertools.product(['csv', 'parquet'], ['', 'NaN', 'NA', 'null'])))
def test_wide_is_long(capsys, kind, empty):
    long().to_csv('t.csv', index=False)
    a, _ = made(capsys, 't.csv', 'ch.csv', 'o')
    w = wide()
    if kind == 'csv': w.to_csv('w.csv', index=False, na_rep=empty)
    else: w.to_parquet('w.parquet')
    b, shown = made(capsys, f'w.{kind}', 'ch.csv', 'p', out='p')
    assert np.array_equal(a.array('ehr'), b.array('ehr')) and a.samples.equals(b.samples)
    assert '5  rows' in shown and 'no number' not in shown


def test_wide_with_more_columns(capsys):
    wide().assign(note='x', flag=[True, False, True, False]).to_csv('w.csv', index=False)
    _, shown = made(capsys, 'w.csv', 'ch.csv', 'o')
    assert '4  column note' in shown and '4  column flag' in shown
    wide()[['subject_id', 'time', 'HR']].rename(columns=dict(HR='pulse')).to_csv('w.csv', index=False)
    refused(capsys, 'w.csv', 'ch.csv', 'p', said="no column of w.csv is a channel, such as 'HR'; there are 'pulse'")


@pytest.mark.parametrize('text', ['subject_id,time,HR\n0,1,0.5,\n1,2,1.5,\n', 'subject_id,time,HR\n1,0.5,80\n1,1.5,81,\n', 'subject_id,time,HR\n1,0.5,80,5\n', 'subject_id,time,HR\r\n1,0.5,80,\r\n'])
def test_a_comma_too_many(capsys, text):
    Path('w.csv').write_bytes(text.encode())
    assert 'line ' in refused(capsys, 'w.csv', 'ch.csv', 'o', said='cells where the header has 3')
    refused(capsys, 'w.csv', '--draft', 'd.csv', said='cells where the header has 3')
    long().to_csv('t.csv', index=False)
    Path('s.csv').write_text('subject_id,start\n1,0,\n2,0\n')
    refused(capsys, 't.csv', 'ch.csv', 'o', '--starts', 's.csv', said='s.csv, line 2')


def test_an_empty_last_cell_is_no_comma_too_many(capsys):
    Path('w.csv').write_text('subject_id,time,HR,note\n1,0.5,80,\n1,1.5,81,"a, b,"\n1,1.6,82,"two\nlines, and,"\n')
    c, _ = made(capsys, 'w.csv', 'ch.csv', 'o')
    assert [r[0] for r in grids(c)[0]] == [80., 82.]


def test_wide_with_stays(capsys):
    w = wide().assign(stay_id=[10, 10, 20, 20])
    w.to_csv('w.csv', index=False)
    c, _ = made(capsys, 'w.csv', 'ch.csv', 'o')
    assert c.samples.sample_id.tolist() == [10, 20]
    w.drop(columns='subject_id').to_csv('w.csv', index=False)
    refused(capsys, 'w.csv', 'ch.csv', 'p', said='with --subject stay_id every stay counts as a patient of its own')
    c, _ = made(capsys, 'w.csv', 'ch.csv', 'p', '--subject', 'stay_id', out='p')
    assert c.samples.subject_id.tolist() == [10, 20]


# -- drafts --------------------------------------------------------------------------------------------------------

def table(n=400, seed=0):
    rng = np.random.default_rng(seed)
    rows = [pd.DataFrame(dict(subject_id=rng.integers(1, 20, n), time=rng.uniform(0, 30, n).round(2), variable=v, value=rng.normal(m, s, n).round(1), unit=u))
            for v, m, s, u in (('HR', 85, 12, 'bpm'), ('BE', 0, 5, 'mEq/L'))]
    return pd.concat(rows)


def test_draft_and_cohort(capsys):
    t = table()
    t.loc[t.index[:1], 'value'] = 99999                                                # a slip of the pen
    t.to_csv('t.csv', index=False)
    main(['table', 't.csv', '--draft', 'd.csv'])
    shown, d = capsys.readouterr().out, pd.read_csv('d.csv').set_index('name')
    assert 'mmsn-prepare table t.csv d.csv OUT' in shown and not Path('o').exists()
    assert d.unit.to_dict() == dict(HR='bpm', BE='mEq/L') and d.rows.to_dict() == dict(HR=400, BE=400)
    hr = t[t.variable == 'HR'].value
    assert d.normal.HR == pytest.approx(hr.median(), rel=1e-3) and d.low.HR >= 0 and d.low.BE < -15
    c, _ = made(capsys, 't.csv', 'd.csv', 'o')
    assert [ch['name'] for ch in c.modalities['ehr'].channels] == ['BE', 'HR']
    before = Path('d.csv').read_bytes()
    refused(capsys, 't.csv', '--draft', 'd.csv', said='exists already and is not replaced')
    assert Path('d.csv').read_bytes() == before


def test_draft_refuses_a_column_without_a_name(capsys):
    Path('u.csv').write_text('subject_id,time,variable,value,\n1,0,HR,80,x\n1,1,HR,81,y\n')
    refused(capsys, 'u.csv', '--draft', 'd.csv', said='u.csv')
    assert not Path('d.csv').exists()


def test_draft_range_is_robust():
    from mmsn.data.draft import draft_range
    assert draft_range(50, 120, 40) == (15., 160.)


def test_draft_of_wide_tables_and_of_none(capsys):
    wide().to_csv('w.csv', index=False)
    main(['table', 'w.csv', '--draft', 'd.csv'])
    capsys.readouterr()
    a, _ = made(capsys, 'w.csv', 'd.csv', 'o')
    assert sorted(ch['name'] for ch in a.modalities['ehr'].channels) == ['Glucose', 'HR', 'Temp']
    refused(capsys, 'w.csv', '--draft', 'none/d.csv', said='no folder')
    refused(capsys, 'none.csv', '--draft', 'e.csv', said='no file none.csv')
    refused(capsys, 'w.csv', said='--draft channels.csv drafts')
    refused(capsys, 'w.csv', 'p', said='--draft channels.csv drafts')
    refused(capsys, 'w.csv', 'nochannels.csv', 'p', said='--draft nochannels.csv drafts one')


def test_words_in_any_order(capsys):
    long().to_csv('t.csv', index=False)
    for i, words in enumerate((['t.csv', '--hours', '4', 'ch.csv', 'o0'], ['--hours', '4', 't.csv', 'ch.csv', 'o1'], ['t.csv', 'ch.csv', '--hours', '4', 'o2'])):
        made(capsys, *words, out=f'o{i}')
    with pytest.raises(SystemExit) as stop: main(['table', 't.csv', 'ch.csv', 'o', 'more'])
    assert stop.value.code == 2 and 'unrecognized arguments: more' in capsys.readouterr().err


# -- YAIB ----------------------------------------------------------------------------------------------------------

def yaib(folder, unit='s', kind=None):
    "A task of three stays, times as hours (numbers) or as durations of `unit`."
    Path(folder).mkdir()
    hours = np.array([0, 1, 2, 0, 1, 0])
    time = hours if kind == 'numbers' else pa.array(hours*dict(s=3600, ms=3600*10**3, us=3600*10**6, ns=3600*10**9)[unit], pa.duration(unit))
    dyn = pa.table(dict(stay_id=[31, 31, 31, 32, 32, 40], time=time, hr=[80., 82., None, 95., None, 60.], temp=[37., None, 38., None, 36.5, None]))
    pq.write_table(dyn, f'{folder}/dyn.parquet')
    pd.DataFrame(dict(stay_id=[31, 32, 40], age=[64., 71., 50.], sex=['Male', 'Female', 'Male'], height=[180., None, 170.], weight=[80., 60., None])).to_parquet(f'{folder}/sta.parquet')
    pd.DataFrame(dict(stay_id=[31, 32, 40], label=[0, 1, 0])).to_parquet(f'{folder}/outc.parquet')
    return pd.DataFrame([(s, h + .5, v, x) for s, h, v, x in ((31, 0, 'hr', 80), (31, 1, 'hr', 82), (32, 0, 'hr', 95), (40, 0, 'hr', 60), (31, 0, 'temp', 37), (31, 2, 'temp', 38),
                         (32, 1, 'temp', 36.5))], columns=NAMES)


@pytest.mark.parametrize('unit, kind', [('s', None), ('ms', None), ('us', None), ('ns', None), ('', 'numbers')])
def test_yaib_is_the_long_table(capsys, unit, kind):
    yaib('mortality24', unit, kind).to_csv('t.csv', index=False)
    c, shown = made(capsys, 'mortality24', 'o')
    Path('ch.csv').write_text('name,unit,low,high,normal\nhr,bpm,0,350,86\ntemp,C,20,45,36.6\n')
    a, _ = made(capsys, 't.csv', 'ch.csv', 'p', out='p')
    assert np.array_equal(a.array('ehr'), c.array('ehr')) and [len(g) for g in grids(c)] == [3, 2, 1]
    assert c.samples.label.tolist() == [0, 1, 0] and c.samples.sample_id.tolist() == [31, 32, 40]
    assert c.modalities['demographics'].columns == ['age', 'sex_Female', 'sex_Male', 'height', 'weight']
    assert grids(c, 'demographics')[0] == [64., 0., 1., 180., 80.] and 'each stay counts as a patient' in shown


def test_yaib_with_own_channels_and_without_files(capsys):
    yaib('y')
    Path('ch.csv').write_text('name,unit,low,high,normal\nhr,bpm,0,350,86\n')
    c, shown = made(capsys, 'y', 'ch.csv', 'o')
    assert c.array('ehr').shape[1] == 2 and '3  column temp' in shown
    for f in ('sta', 'outc'): Path(f'y/{f}.parquet').unlink()
    c, shown = made(capsys, 'y', 'o', '--overwrite')
    assert c.labels == [] and set(c.modalities) == {'ehr'} and 'no outc.parquet' in shown
    main(['table', 'y', '--draft', 'd.csv'])
    assert pd.read_csv('d.csv').name.tolist() == ['hr', 'temp']
    capsys.readouterr()
    refused(capsys, 'y', 'ch.csv', 'p', '--starts', 'ch.csv', said='leave out --starts')
    Path('e').mkdir()
    refused(capsys, 'e', 'ch.csv', 'p', said='a folder without dyn.parquet')


def test_yaib_outcomes_that_are_no_labels(capsys):
    yaib('y')
    pd.DataFrame(dict(stay_id=[31, 31, 32], time=[0, 1, 0], label=[0, 1, 0])).to_parquet('y/outc.parquet')
    c, shown = made(capsys, 'y', 'o')
    assert c.labels == [] and 'of every hour, not used' in shown
    pd.DataFrame(dict(stay_id=[31, 32, 40], label=[2.5, 1., 0.])).to_parquet('y/outc.parquet')
    c, shown = made(capsys, 'y', 'o', '--overwrite')
    assert c.labels == [] and 'label: not 0 or 1, not used' in shown
    pd.DataFrame(dict(stay_id=[31, 32, 40], label=[True, False, None])).to_parquet('y/outc.parquet')
    c, _ = made(capsys, 'y', 'o', '--overwrite')
    assert c.samples.label[:2].tolist() == [1, 0] and np.isnan(c.samples.label[2])
    Path('y/sta.parquet').write_bytes(b'PAR1 no')
    refused(capsys, 'y', 'p', said='sta.parquet')
