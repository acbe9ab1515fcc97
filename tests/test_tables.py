"Downloaded tables: found, read, broken in every way, interrupted and killed. The lessons are in the notebook data.tables."
import gzip, re, signal, subprocess, sys

import duckdb, numpy as np, pandas as pd, pytest
from fastcore.test import test_eq

from mmsn.data.tables import (Stages, _BackgroundQuery, _literal, connect, default_memory, file_stamp, find_table, given_split, header, label_columns, numbers,
                              open_table, read_text, run, split_of, subject_numbers)
from mmsn.options import InputError

test_eq.__test__ = False   # fastcore's assertion is no test of ours


def message(call):
    "The one line of an InputError."
    with pytest.raises(InputError) as error: call()
    assert '\n' not in str(error.value)
    return re.sub(r'process \d+', 'process …', str(error.value))


@pytest.fixture
def tmp(tmp_path):
    core = tmp_path/'old'/'core'
    core.mkdir(parents=True)
    (core/'patient.csv').write_text('subject_id,anchor_age\n1,50\n')
    (core/'admissions.csv').write_text('ethnicity,hadm_id,subject_id\nASIAN,7,1\n"OTHER, ""X""",oops,2\n')
    whole = gzip.compress(b'\xef\xbb\xbfsubject_id,hadm_id\n' + b''.join(b'%d,%d\n' % (i, i*i) for i in range(200_000)))
    (core/'cut.csv.gz').write_bytes(whole[:len(whole)//2])
    return tmp_path


@pytest.fixture
def con(tmp):
    con = connect(tmp/'spill', threads=1)
    yield con
    con.close()


def test_finding(tmp):
    test_eq(find_table(tmp/'old', 'admissions'), tmp/'old'/'core'/'admissions.csv')
    assert 'no folder' in message(lambda: find_table(tmp/'none', 'icustays'))
    assert "named 'patient'" in message(lambda: find_table(tmp/'old', 'patients'))
    assert 'right folder' in message(lambda: find_table(tmp/'old', 'chartevents'))


def test_headers(tmp):
    core = tmp/'old'/'core'
    test_eq(header(core/'admissions.csv'), ['ethnicity', 'hadm_id', 'subject_id'])
    test_eq(header(core/'cut.csv.gz'), ['subject_id', 'hadm_id'])        # a byte order mark is no part of a name; a cut file has a good header
    (core/'empty.csv').write_text('')
    (core/'plain.csv.gz').write_text('subject_id\n1\n')
    (core/'web.parquet').write_text('<html>please log in</html>')
    assert 'is empty' in message(lambda: header(core/'empty.csv'))
    assert 'Not a gzipped file' in message(lambda: header(core/'plain.csv.gz'))
    assert 'not a readable table' in message(lambda: header(core/'web.parquet'))


def test_columns(tmp, con):
    open_table(con, tmp/'old', 'admissions', 'subject_id bigint, hadm_id bigint, race|ethnicity varchar')
    rows = con.execute('select * from admissions').fetchall()
    test_eq(rows, [(1, 7, 'ASIAN'), (2, None, 'OTHER, "X"')])    # order, old name, quotes; a word for a number is NULL
    con.execute('copy admissions to ' + _literal(tmp/'old'/'core'/'again.parquet'))
    open_table(con, tmp/'old', 'again', 'subject_id bigint, hadm_id bigint, race varchar')
    test_eq(con.execute('select * from again').fetchall(), rows)                      # a parquet reads the same
    assert int(default_memory()[:-2]) >= 1000
    assert "did you mean 'hadm_id'" in message(lambda: open_table(con, tmp/'old', 'admissions', 'adm_id bigint'))
    assert 'like 4GB' in message(lambda: connect(tmp/'spill', memory='lots'))


def test_broken_files(tmp, con):
    core = tmp/'old'/'core'
    open_table(con, tmp/'old', 'cut', 'subject_id bigint')
    assert 'cut.csv.gz cannot be read' in message(lambda: run(con, 'select count(*) from cut'))
    for name, text, says in (('torn', b'1,2\n1,2,3,4\n', 'line 3'), ('short', b'1,2\n1\n', 'a row has 1 cells where the header has 2'),
                             ('quote', b'1,"x\n2,3\n', 'quote is not closed')):
        (core/f'{name}.csv').write_bytes(b'subject_id,hadm_id\n' + text)
        open_table(con, tmp/'old', name, 'subject_id bigint, hadm_id varchar')
        assert says in message(lambda: run(con, f'select count(hadm_id) from {name}'))
    (core/'latin.csv').write_bytes(b'subject_id,hadm_id\n1,caf\xe9\n')
    assert 'not UTF-8' in message(lambda: open_table(con, tmp/'old', 'latin', 'subject_id bigint'))
    con.execute('copy (select range as subject_id from range(100000)) to ' + _literal(core/'half.parquet'))
    (core/'half.parquet').write_bytes((core/'half.parquet').read_bytes()[:1000])
    assert 'not a readable table' in message(lambda: open_table(con, tmp/'old', 'half', 'subject_id bigint'))
    with pytest.raises(duckdb.CatalogException): run(con, 'select nothing from nowhere')


def test_progress(tmp, con):
    con.execute("copy (select range as subject_id, range % 97 as itemid, (range * 7919 % 1000) / 10 as valuenum from range(1500000)) to "
                + _literal(tmp/'old'/'long.csv.gz') + ' (header)')
    open_table(con, tmp/'old', 'long', 'subject_id bigint, itemid integer, valuenum double')
    query, percent = _BackgroundQuery(con, 'create or replace table n as select itemid, count(*) c, avg(valuenum) from long group by 1'), []
    while not query.done.wait(.02): percent.append(con.query_progress())
    percent = [s for s in percent if s >= 0]
    assert query.error is None and len(set(percent)) > 3 and percent == sorted(percent)
    test_eq(run(con, 'select sum(c) from n', desc='adding up').fetchall(), [(1_500_000,)])


def test_ctrl_c(tmp):
    code = '''
import os, signal, threading
from mmsn.data.tables import connect, run
con = connect('.', threads=1)
threading.Timer(.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try: run(con, 'select count(*) from range(1000000000000) t(a) where sqrt(a) % 7 = 3')
except KeyboardInterrupt: print('stopped', con.execute('select 42').fetchall())
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp, timeout=60)   # the query would take minutes
    test_eq(out.stdout.strip(), 'stopped [(42,)]')                                                          # and the connection is still of use


def test_stages(tmp):
    calls = []
    def build(folder):
        calls.append(folder.name)
        (folder/'rows.csv').write_text('1\n')

    key = dict(source=file_stamp(tmp/'old'/'core'/'admissions.csv'), rules='clean')
    stages = Stages(tmp/'work')
    folder = stages.make('stays', key, build)
    test_eq((sorted(p.name for p in folder.iterdir()), stages.reused, len(calls)), (['rows.csv', 'stage.json'], [], 1))
    again = Stages(tmp/'work')
    again.make('stays', key, build)
    test_eq((again.reused, len(calls)), (['stays'], 1))                                # nothing to do
    again.make('stays', dict(key, rules='benchmark'), build)
    test_eq((again.reused, len(calls)), (['stays'], 2))                                # another key: built anew

    def fails(folder): build(folder); raise RuntimeError('out of luck')
    with pytest.raises(RuntimeError): again.make('events', key, fails)
    test_eq([p.name for p in (tmp/'work').iterdir()], ['stays'])                       # a failure leaves nothing


def test_killed_stage(tmp):
    code = '''
import time
from mmsn.data.tables import Stages
def build(folder): (folder/'half').write_text('1')
def slow(folder): build(folder); print('writing', flush=True); time.sleep(60)
stages = Stages('killed')
stages.make('stays', {}, build); stages.make('events', {}, slow)
'''
    def build(folder): (folder/'half').write_text('1')
    victim = subprocess.Popen([sys.executable, '-c', code], cwd=tmp, stdout=subprocess.PIPE, text=True)
    test_eq(victim.stdout.readline(), 'writing\n')
    assert 'is at work in' in message(lambda: Stages(tmp/'killed'))
    victim.send_signal(signal.SIGKILL); victim.wait(); victim.stdout.close()
    test_eq([p.name.split('-')[-1] for p in sorted((tmp/'killed').iterdir())], ['events', 'stays'])
    stages = Stages(tmp/'killed')
    test_eq([p.name for p in (tmp/'killed').iterdir()], ['stays'])
    for name in ('stays', 'events'): stages.make(name, {}, build)
    test_eq((stages.reused, sorted(p.name for p in (tmp/'killed').iterdir())), (['stays'], ['events', 'stays']))
    stages.remove()
    assert not (tmp/'killed').exists()


def test_subjects():
    test_eq(subject_numbers(['12', ' 7', '007']), [12, 7, 7])
    a, b, again = subject_numbers(['p10', 'p11', 'p10'])
    assert a == again != b and min(a, b) >= 0
    assert 'row 2' in message(lambda: subject_numbers(['a', None], 'scans.csv'))


def test_splits():
    subjects = np.arange(20_000)
    test_eq(split_of(subjects[::-1])[::-1], split_of(subjects))                       # of the subject alone
    fractions = pd.Series(split_of(subjects)).value_counts(normalize=True)
    assert abs(fractions['train'] - .6) < .02 and abs(fractions['val'] - .2) < .02
    assert (split_of(subjects, seed=1) != split_of(subjects)).any()
    table = pd.DataFrame(dict(split=['Training', ' valid', 'TEST']))
    test_eq(given_split(table, 'split', 'y.csv').tolist(), ['train', 'val', 'test'])
    assert "not 'tune'" in message(lambda: given_split(pd.DataFrame(dict(split=['tune'])), 'split', 'y.csv'))


def test_labels(tmp):
    (tmp/'y.csv').write_text('id,effusion,mass,grade,note\n1,1,,0,fine\n2,0,-1,3,\n')
    y = read_text(tmp/'y.csv', ['id'])
    test_eq(label_columns(y, ['effusion', 'mass'], 'y.csv').isna().sum().to_dict(), dict(effusion=0, mass=2))
    assert "'grade' of y.csv should be 1, 0, -1 or empty, not 3" in message(lambda: label_columns(y, ['grade'], 'y.csv'))
    assert "not 'fine' (row 1)" in message(lambda: numbers(y, 'note', 'y.csv'))
    assert "did you mean 'effusion'" in message(lambda: read_text(tmp/'y.csv', ['efusion']))
    assert 'no file' in message(lambda: read_text(tmp/'none.csv'))


@pytest.mark.parametrize('cells', [None, '2150-01-03T04:05:00', '2150-02-30 04:05:00', '2150-01-03 24:00:00', '2150-01-03 04:05:60', '0000-00-00 00:00:00', '9999-12-31 23:59:59', '2150-01-03', '2150-01-03 04:05:00Z',
                                   'infinity', '2150-1-03  04:05:00', '-123-01-01 00:00:00', '2150-01-03 04:05:.5', 'yesterday', ''])
def test_the_short_question_about_times_agrees_with_the_long_one(cells, con, monkeypatch):
    "A column of plain stamps is recognised at once; whatever else stands in it is treated as if that had never been asked."
    from mmsn.data import times
    found = []
    for short in (True, False):
        with monkeypatch.context() as m:
            if not short: m.setattr(times, '_all_stamps', lambda *a: False)
            run(con, "create or replace table t as select unnest(['2150-01-03 04:05:00', '2150-01-04 04:05:00', $1])::varchar as t".replace('$1', 'null' if cells is None else f"'{cells}'"))
            times.leave_out_words(con, 't', 't')
            try: found.append((con.execute('select count(*) from t').fetchone(), times.find_format(con, 't', 't', 'the column')))
            except InputError as e: found.append(str(e))
    assert found[0] == found[1]
    if cells is None:
        assert times._all_stamps(con, 't', 't')
        for unit in ('hours', 'clock'): assert 'leave out --time-unit' in message(lambda: times.find_format(con, 't', 't', 'the column', unit))
