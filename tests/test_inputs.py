"Tables as people have them: commas too many, times of every kind, ids in several spellings, words for labels. Each is read right, or refused in one line."
import gzip, io, os, subprocess, sys, zipfile

import duckdb, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from conftest import refused
from mmsn.data.cohort import Cohort
from mmsn.data.ids import check_meeting, plain_ids, subject_numbers
from mmsn.data.long import read_channels, read_long
from mmsn.data.mimic.xrays import CHEXPERT, findings, load_images
from mmsn.data.tables import connect, label_columns, label_sql, open_table, read_text
from mmsn.data.times import find_format
from mmsn.options import InputError
from mmsn.prepare import main

CHANNELS = 'name,unit,low,high,normal\nHR,bpm,1,300,80\nTemp,C,20,45,37\n'
LONG = 'subject_id,time,variable,value\n1,0.5,HR,80\n2,0.7,HR,90\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A working folder with a table and its channels."
    monkeypatch.chdir(tmp_path)
    write(channels=CHANNELS, long=LONG)
    return tmp_path


def write(**files):
    "Files of text or bytes, as NAME.csv."
    for name, text in files.items():
        with open(f'{name}.csv', 'wb') as f: f.write(text if isinstance(text, bytes) else text.encode())


def table(*options, source='long.csv'):
    "The cohort that the command makes."
    main(['table', source, 'channels.csv', 'out', '--overwrite', *map(str, options)])
    return Cohort.open('out', verify=True)


def no(capsys, *options, source='long.csv', says):
    "The command refuses in one line that says `says`, none of it DuckDB's, and leaves nothing."
    line = refused(main, ['table', source, 'channels.csv', 'out', *map(str, options)], capsys)
    assert says in line, line
    assert not os.path.exists('out')
    assert not any(w in line for w in ('strict_mode', 'null_padding', 'Binder', 'Conversion', 'Invalid Input', 'VARCHAR', 'utf-8\' codec'))
    return line


def hours(cells, starts=None, **options):
    "Hours of the events of one subject whose times are `cells`."
    quoted = [f'"{c}"' if ',' in c or '"' in c else c for c in cells]
    write(long='subject_id,time,variable,value\n' + ''.join(f'1,{c},HR,{60 + i}\n' for i, c in enumerate(quoted)))
    if starts is not None: write(starts='subject_id,start,end\n' + starts)
    events = read_long('long.csv', read_channels('channels.csv'), 'starts.csv' if starts is not None else None, **options)[1]
    return events.sort_values('value').hours.round(6).tolist()


# --- rows and headers ---

def test_a_comma_too_many(place, capsys):
    write(y='subject_id,died,icu\n1,1,0,\n2,0,1,\n')
    no(capsys, '--labels', 'y.csv', says='y.csv, line 2 has 4 cells where the header has 3')
    write(y='subject_id,died,icu\n1,1,0\n2,0\n')
    no(capsys, '--labels', 'y.csv', says='y.csv, line 3 has 2 cells where the header has 3')
    write(long=LONG + '1,1.5,HR,80,5\n')
    no(capsys, says='long.csv, line 4 has 5 cells where the header has 4')
    write(long=LONG + '1,1.5,HR\n')
    no(capsys, says='line 4 has 3 cells where the header has 4')


def test_an_empty_cell_too_many(place, capsys):
    write(long=LONG + '1,1.5,HR,80,\n')
    no(capsys, says='long.csv, line 4 has 5 cells where the header has 4')
    write(long=LONG, starts='subject_id,start,end\n1,0,48,\n2,0,48,\n')
    no(capsys, '--starts', 'starts.csv', says='starts.csv, line 2 has 4 cells where the header has 3')


def test_columns_without_a_name(place, capsys):
    write(long='subject_id,time,variable,value,\n1,0.5,HR,80,\n')                       # a comma at the end of every line
    assert table()[0]['ehr'][0, 0] == 80
    write(long=',subject_id,time,variable,value\n0,1,0.5,HR,80\n1,2,1.5,HR,90\n')       # what pandas writes
    cohort = table()
    assert cohort.samples.subject_id.tolist() == [1, 2] and cohort[1]['ehr'][-1, 0] == 90
    assert 'has no name' in capsys.readouterr().err
    write(y=',subject_id,died\n0,1,1\n1,2,0\n')
    assert table('--labels', 'y.csv').samples.died.tolist() == [1, 0]
    assert 'y.csv has no name and counts the rows' in capsys.readouterr().err
    write(y='Unnamed: 0,subject_id,died,\n0,1,1,\n1,2,0,\n')                            # read and written again; an empty column
    cohort = table('--labels', 'y.csv')
    assert cohort.labels == ['died'] and cohort.samples.died.tolist() == [1, 0]
    write(y='subject_id,died,\n1,1,0\n2,0,1\n')
    no2 = lambda says: refused(main, ['table', 'long.csv', 'channels.csv', 'other', '--labels', 'y.csv'], capsys)
    assert "column 3 of y.csv has no name but holds '0' (row 1)" in no2('')
    write(long='subject_id,time,variable,value,\n1,0.5,HR,80,7\n')
    assert "no name but holds '7'" in refused(main, ['table', 'long.csv', 'channels.csv', 'other'], capsys)


def test_headers(place, capsys):
    write(long='subject_id,time,variable,value,value\n1,0.5,HR,80,81\n')
    no(capsys, says="long.csv has the column 'value' twice")
    write(y='subject_id,died,died\n1,1,0\n')
    no(capsys, '--labels', 'y.csv', says="y.csv has the column 'died' twice")
    write(long='\ufeff subject_id , time,variable ,value\r\n1,0.5,HR,80\r\n')              # a mark, blanks, Windows
    assert table()[0]['ehr'][0, 0] == 80
    write(long='subject_id,time,variable,value,Value\n1,0.5,HR,80,81\n')
    assert table()[0]['ehr'][0, 0] == 80
    write(long='pid,time,variable,value\n1,0.5,HR,80\n')
    line = refused(main, ['table', 'long.csv', 'channels.csv', 'other'], capsys)
    assert 'did you mean' not in line and 'pid' in line
    write(long='subjectid,time,variable,value\n1,0.5,HR,80\n')
    assert "did you mean 'subjectid'" in refused(main, ['table', 'long.csv', 'channels.csv', 'other'], capsys)


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, 'w') as z: z.writestr('long.csv', LONG)

@pytest.mark.parametrize('content, says', [
    (LONG.encode('utf-16'), 'UTF-16: save it as CSV in UTF-8'), (LONG.encode('utf-16-be'), 'UTF-16'), (LONG.encode('utf-16-le'), 'UTF-16'),
    (ZIP.getvalue(), 'a zip archive or an Excel workbook'), (gzip.compress(LONG.encode(), mtime=0), 'name it .csv.gz'), (b'PAR1xyz', 'name it .parquet'),
    (LONG.replace(',', ';').encode(), 'separated by semicolons'), (LONG.replace(',', '\t').encode(), 'separated by tabs'),
    (LONG.replace(',', '|').encode(), 'separated by bars'), (b'sep=;\n' + LONG.replace(',', ';').encode(), "'sep=;'"), (b'', 'is empty'), (b'\n', 'is empty'),
    ('subject_id,time,variable,value\n1,0.5,caf\xe9,80\n'.encode('latin-1'), 'not UTF-8'), (b'<!DOCTYPE html><html>', 'web page'), (b'\0\1\2\3', 'binary')],
    ids=['utf-16', 'utf-16-be', 'utf-16-le', 'zip', 'gz', 'parquet', 'semicolons', 'tabs', 'bars', 'sep', 'nothing', 'a line break', 'latin-1', 'html', 'binary'])
@pytest.mark.parametrize('which', ['long', 'y'])
def test_what_is_no_csv(place, capsys, content, says, which):
    write(**{which: content})
    no(capsys, *(['--labels', 'y.csv'] if which == 'y' else []), says=says)


def test_the_same_as_gz_and_parquet(place):
    before = table()[1]['ehr']
    (place/'long.csv.gz').write_bytes(gzip.compress(LONG.encode()))
    np.testing.assert_array_equal(table(source='long.csv.gz')[1]['ehr'], before)
    pd.read_csv('long.csv').to_parquet('long.parquet')
    np.testing.assert_array_equal(table(source='long.parquet')[1]['ehr'], before)
    write(y='subject_id,died\n1,1\n2,0\n')
    pd.read_csv('y.csv').to_parquet('y.parquet')
    assert table('--labels', 'y.parquet').samples.died.tolist() == [1, 0]


def test_decimal_commas(place, capsys):
    write(long='subject_id,time,variable,value\n1,0.5,HR,"70,5"\n')
    no(capsys, says="column 'value' of long.csv holds '70,5': write numbers with a decimal point")
    write(long=LONG, channels='name,unit,low,high,normal\nHR,bpm,1,300,"80,5"\n')
    no(capsys, says='with a decimal point')


# --- times ---

READ = {   # name: (cells, options, hours since the first of dates, or as they are)
    'twelve hours': (['2020-03-04 11:30:00 AM', '2020-03-04 01:30:00 PM', '2020-03-04 11:30:00 PM'], {}, [0, 2, 12]),
    'midnight and noon': (['2020-03-04 12:00 AM', '2020-03-04 12:00 PM', '2020-03-04 1:00 p.m.'], {}, [0, 12, 13]),
    'offsets': (['2020-07-01T10:00:00Z', '2020-07-01T10:30:00+02:00', '2020-07-01T13:00:00+02:00'], {}, [1.5, 0, 2.5]),
    'offsets without colon': (['2020-07-01 10:00:00+0000', '2020-07-01 10:00:00-0530', '2020-07-01 10:00+01'], {}, [1, 6.5, 0]),
    'letters': (['2020-07-01 10:00 UTC', '2020-07-01 10:00 EST', '2020-07-01 10:00 gmt'], {}, [0, 5, 0]),
    'places in winter and summer': (['2020-03-28 12:00 Europe/Berlin', '2020-03-29 12:00 Europe/Berlin'], {}, [0, 23]),
    'Java': (['2020-07-01T10:00:00+02:00[Europe/Berlin]', '2020-07-01T09:00:00Z'], {}, [0, 1]),
    'UTC and an offset': (['2020-07-01 10:00 UTC+2', '2020-07-01 10:00 UTC'], {}, [0, 2]),
    '24:00': (['2020-03-04 22:00', '2020-03-04 24:00'], {}, [0, 2]),
    'fractions': (['2020-03-04 10:00:00.000', '2020-03-04 10:00:01.5', '2020-03-04T10:00:00,5'], {}, [0, 1.5/3600, .5/3600]),
    'no seconds, slashes, one digit': (['2020/3/4 1:05', '2020-03-04 02:05', '2020.03.04T03:05'], {}, [0, 1, 2]),
    'dates': (['2020-03-04', '2020-03-05', ' 2020-03-05 12:00 '], {}, [0, 24, 36]),
    'day first': (['03/04/2021 10:00', '25/04/2021 10:00', '05/04/2021 1:00 PM'], {}, [0, 22*24, 51]),
    'month first': (['03/04/2021 10:00', '03/25/2021 10:00'], {}, [0, 21*24]),
    'month names': (['4-Mar-2020 13:30', '4 March 2020 14:30', '05MAR2020:13:30:00'], {}, [0, 1, 24]),
    'month names first': (['Mar 4, 2020 1:30 PM', 'March 5, 2020 1:30 PM'], {}, [0, 24]),
    'compact': (['20200304', '20200306'], {}, [0, 48]),
    'compact with time': (['202003041330', '202003041430'], {}, [0, 1]),
    'compact, to the second': (['20200304133000', '20200304T143000'][:1]*2 + ['20200304133600'], {}, [0, 0, .1]),
    'compact, with T and Z': (['20200304T133000Z', '20200304T143000Z'], {}, [0, 1]),
    'unix': (['1583364600', '1583368200'], {}, [0, 1]),
    'unix as floats': (['1583364600.0', '1.5833682e9'], {}, [0, 1]),
    'unix milliseconds': (['1583364600000', '1583368200000'], {}, [0, 1]),
    'unix nanoseconds': (['1583364600000000000', '1583368200000000000'], {}, [0, 1]),
    'hours': (['0.5', '3', '1e1', '+2', '.25'], {}, [.5, 3, 10, 2, .25]),
    'quoted': (['"0.5"', '"3"'], {}, [.5, 3]),
    'minutes': (['30', '47', '2879'], dict(time_unit='minutes'), [.5, 47/60, 2879/60]),
    'seconds': (['1800', '7200'], dict(time_unit='seconds'), [.5, 2]),
    'milliseconds': (['1800000', '7200000'], dict(time_unit='milliseconds'), [.5, 2]),
    'days': (['0.5', '2'], dict(time_unit='days'), [12, 48]),
    'clock': (['00:07', '36:15:30'], dict(time_unit='clock'), [7/60, 36 + 15/60 + 30/3600]),
    'time spans of pandas': (['0 days 00:30:00', '1 days 02:00:00'], {}, [.5, 26]),
    'empty cells': (['0.5', '', 'NaN', 'NULL', ' ', '2'], {}, [.5, 2]),
    'early years': (['1900-01-01 10:00', '1900-01-01 11:00'], {}, [0, 1]),
    'years of MIMIC': (['2180-07-23 14:00:00', '2180-07-23 15:00:00'], {}, [0, 1]),
}

@pytest.mark.parametrize('name', READ)
def test_times_that_are_read(place, name):
    cells, options, right = READ[name]
    if '"' in cells[0]:
        write(long='subject_id,time,variable,value\n' + ''.join(f'1,{c},HR,{60 + i}\n' for i, c in enumerate(cells)))
        got = read_long('long.csv', read_channels('channels.csv'))[1].sort_values('value').hours.tolist()
    else: got = hours(cells, **options)
    assert got == pytest.approx(right, abs=1e-5), got


REFUSED = {
    'day or month': (['03/04/2021 10:00', '05/04/2021 10:00'], {}, "'03/04/2021 10:00'"),
    'day and month': (['25/04/2021', '04/25/2021'], {}, 'day first and dates with the month first'),
    'two digits': (['03/04/21 10:00'], {}, 'a year of two digits'),
    'a word': (['0.5', '2', 'soon'], {}, "holds 'soon' (row 3)"),
    'a decimal comma': (['0,5'], {}, "'0,5' (row 1)"),
    'with and without zone': (['2020-07-01T10:00:00Z', '2020-07-01 10:30:00'], {}, 'times with a zone'),
    'hours and dates': (['0.5', '2020-07-01 10:30:00'], {}, 'two kinds'),
    '13 PM': (['2020-03-04 13:30 PM'], {}, "'2020-03-04 13:30 PM' (row 1), which is no time"),
    '0 AM': (['2020-03-04 0:30 AM'], {}, 'is no time'),
    '30 February': (['2020-02-29', '2020-02-30'], {}, "'2020-02-30' (row 2)"),
    'minute 60': (['2020-02-29 10:60'], {}, 'is no time'),
    'second 60': (['2020-02-29 10:00:60'], {}, 'is no time'),
    '25 o\'clock': (['2020-02-29 25:00'], {}, 'is no time'),
    'after 24:00': (['2020-02-29 24:01'], {}, 'is no time'),
    'a wide offset': (['2020-02-29 10:00+99:00'], {}, 'is no time'),
    'an unknown zone': (['2020-02-29 10:00 IST'], {}, "'IST', which is not known"),
    'an hour that was not': (['2020-03-29 02:30:00 Europe/Berlin'], {}, 'showed twice or not at all'),
    'an hour that was twice': (['2020-10-25 02:30:00 Europe/Berlin'], {}, 'showed twice or not at all'),
    'times of day': (['08:15', '23:10'], {}, 'times of day without a date'),
    'no hours': (['5', '20000000'], {}, 'from 5 to 20000000, which cannot be hours'),
    'infinite': (['0.5', 'inf'], {}, "'inf' (row 2)"),
    'underscores': (['1_000'], {}, "'1_000'"),
    'hexadecimal': (['0x10'], {}, "'0x10'"),
    'nothing': (['', ''], {}, 'holds no times'),
    'long stays': (['30', '47', '2879'], {}, '--time-unit'),
    'serial dates of Excel': (['43894.4375', '43894.5'], {}, '--time-unit'),
    'a unit of dates': (['2020-07-01 10:30:00'], dict(time_unit='minutes'), 'not numbers of minutes'),
    'an unknown unit': (['1'], dict(time_unit='fortnights'), 'should be one of auto, hours'),
    'negative hours': (['-5', '-4', '3'], {}, 'outside their stays'),
    'injection': (["1'); drop table cells; --"], {}, 'is no time'),
    'numbers for a clock': (['1', '2'], dict(time_unit='clock'), 'not clock times'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_times_that_are_refused(place, name):
    cells, options, says = REFUSED[name]
    with pytest.raises(InputError) as error: hours(cells, **options)
    assert says in str(error.value) and '\n' not in str(error.value), error.value


def test_types_of_parquet(place):
    stamps = pd.Series(pd.to_datetime(['2020-07-01 10:00', '2020-07-01 11:30']))
    columns = dict(zone=stamps.dt.tz_localize('Europe/Berlin'), plain=stamps, seconds=stamps.astype('datetime64[s]'), spans=pd.Series(pd.to_timedelta(['0h', '90min'])),
                   text=stamps.astype(str), iso=stamps.dt.strftime('%Y-%m-%dT%H:%M:%SZ'), unix=stamps.astype('datetime64[s]').astype('int64'), hours=pd.Series([0, 1.5]),
                   date=pd.Series([pd.Timestamp('2020-07-01').date(), pd.Timestamp('2020-07-02').date()]))
    for name, time in columns.items():
        pd.DataFrame(dict(subject_id=[1, 1], time=time, variable='HR', value=[60., 61])).to_parquet('t.parquet')
        got = read_long('t.parquet', read_channels('channels.csv'))[1].hours.tolist()
        assert got == ([0, 24] if name == 'date' else [0, 1.5]), name
    duckdb.connect().sql("copy (select 1 as subject_id, interval (i*90) minute as time, 'HR' as variable, 60 + i as value from range(2) r(i)) to 't.parquet'")
    assert read_long('t.parquet', read_channels('channels.csv'))[1].hours.tolist() == [0, 1.5]


def test_starts(place):
    dates = ['2020-07-01T12:00:00+02:00', '2020-07-01T11:30:00Z']
    assert hours(dates, '1,2020-07-01T09:00:00Z,\n') == [1, 2.5]
    assert hours(dates, '1,2020-07-01 05:00:00 America/New_York,2020-07-02 05:00:00 America/New_York\n') == [1, 2.5]
    assert hours(['25/04/2021 10:00', '25/04/2021 11:00'], '1,05/04/2021 10:00,\n', outside=1) == [480, 481]      # the order that the table has
    assert hours(['1583364600', '1583368200'], '1,1583361000,\n') == [1, 2]
    assert hours(['60', '90'], '1,30,\n', time_unit='minutes') == [.5, 1]
    for starts, says in (('1,2020-07-01 09:00:00,\n', 'dates without a time zone, the times of long.csv are dates with a time zone'), ('1,5,\n', 'holds hours'),
                         ('1,soon,\n', "column 'start' of starts.csv holds 'soon' (row 1)"), ('1,,\n', "row 1 of starts.csv has no 'start'"),
                         ('1,2020-07-01T09:00:00Z,later\n', "column 'end' of starts.csv holds 'later'"), ('2,2020-07-01T09:00:00Z,\n', 'only 0 of 1 ids'),
                         ('1,2021-07-01T09:00:00Z,\n', '2 of 2 measurements of long.csv lie outside their stays: they are from 2020-07-01 10:00 UTC to 2020-07-01 11:30 UTC, '
                          'the stays from 2021-07-01 09:00 UTC'), ('1,2020-07-01T09:00:00Z,\n1.0,2020-07-01T09:00:00Z,\n', 'a stay that is there already')):
        with pytest.raises(InputError) as error: hours(dates, starts)
        assert says in str(error.value), error.value


def test_the_command_says_how_times_were_read(place, capsys):
    write(long='subject_id,time,variable,value\n1,30,HR,80\n1,47,HR,81\n1,2879,HR,90\n')
    no(capsys, says='say what they are (--time-unit minutes')
    cohort = table('--time-unit', 'minutes')
    assert 'read as minutes: 0.5 h to 47.9833 h' in capsys.readouterr().out and cohort[0]['ehr'].shape[0] == 48
    assert cohort[0]['ehr'][[0, 47], 0].tolist() == [81, 90]
    write(long='subject_id,time,variable,value\n1,100,HR,80\n')
    line = refused(main, ['table', 'long.csv', 'channels.csv', 'other'], capsys)
    assert 'no measurement of long.csv lies in the first 48 hours of its stay: they go from 100 to 100 hours' in line


def test_a_grid_that_no_machine_holds(place, capsys):
    no(capsys, '--timestep', '1e-7', says='7,000,000 rows, more than 500,000')
    write(long=LONG + '1,10000000,HR,80\n')
    no(capsys, '--hours', 0, '--time-unit', 'hours', says='a stay of 1e+07 hours at 1 hours a row has 10,000,000 rows')


ZONES = """
import duckdb, sys
from mmsn.data.long import read_channels, read_long
for source in ('t.csv', 't.parquet'):
    events = read_long(source, read_channels('channels.csv'), 'starts.csv')[1]
    print(events.hours.tolist())
"""

def test_no_zone_of_the_machine(place):
    write(t='subject_id,time,variable,value\n1,2020-07-01T10:00:00Z,HR,80\n1,2020-07-01 10:30:00 Europe/Berlin,HR,90\n', starts='subject_id,start\n1,2020-07-01T04:00:00-04:00\n')
    pd.DataFrame(dict(subject_id=1, time=pd.to_datetime(['2020-07-01 10:00', '2020-07-01 08:30'], utc=True), variable='HR', value=[80., 90])).to_parquet('t.parquet')
    said = {subprocess.run([sys.executable, '-c', ZONES], env=dict(os.environ, TZ=zone), capture_output=True, text=True, check=True).stdout
            for zone in ('Asia/Tokyo', 'America/New_York')}
    assert said == {'[0.5, 2.0]\n[0.5, 2.0]\n'}


# --- ids ---

@pytest.mark.parametrize('ids, labels, right', [
    (['007', '008'], ['7', '8'], [7, 8]), (['1.0', '2.0'], ['1', '2'], [1, 2]), ([' 1 ', '2'], ['1', '2'], [1, 2]), (['1', '2'], ['1.00', '02'], [1, 2]),
    (['a', 'b'], [' a', 'b '], None), (['\u00a01', '2'], ['1', '2'], [1, 2])])
def test_ids_that_meet(place, ids, labels, right):
    write(long='subject_id,time,variable,value\n' + ''.join(f'{i},0.5,HR,80\n' for i in ids), y='subject_id,died\n' + ''.join(f'{i},{k}\n' for k, i in enumerate(labels)))
    cohort = table('--labels', 'y.csv')
    assert len(cohort) == 2 and cohort.samples.died.tolist() == [0, 1] and (cohort.samples.ehr_length > 0).all()
    if right: assert cohort.samples.subject_id.tolist() == right


def test_ids_that_never_meet(place, capsys):
    write(y='subject_id,died\n7,1\n8,0\n')
    no(capsys, '--labels', 'y.csv', says="only 0 of 2 ids of the labels are among those of the stays of long.csv: the first has '7', the second '1'")
    write(y='subject_id,died\n1,1\n8,0\n9,0\n')
    no(capsys, '--labels', 'y.csv', says='only 1 of 3 ids')
    write(long=LONG.replace('\n1,', '\nP1,').replace('\n2,', '\nP2,'), y='subject_id,died\np1,1\np2,0\n')
    no(capsys, '--labels', 'y.csv', says='differ in case only')
    write(long=LONG, y='subject_id,died\n1,1\n2,0\n9,0\n')
    cohort = table('--labels', 'y.csv')
    assert '1  rows of no stay with measurements' in capsys.readouterr().out and len(cohort) == 3
    write(y='subject_id,died\n1,1\n001,0\n')
    assert 'subject 1 twice' in refused(main, ['table', 'long.csv', 'channels.csv', 'other', '--labels', 'y.csv'], capsys)
    write(y='subject_id,died\n1.23457E+11,1\n2,0\n')
    assert 'has rounded it' in refused(main, ['table', 'long.csv', 'channels.csv', 'other', '--labels', 'y.csv'], capsys)


def test_one_patient_in_one_split(place):
    write(long='subject_id,time,variable,value\nnan,1,HR,80\n2,1,HR,80\n')
    assert table().samples.subject_id.tolist() == [2]
    numbers = subject_numbers(['007', '7', '7.0', 'P8'])
    assert len(set(numbers[:3])) == 1 and numbers[3] != numbers[0]
    assert subject_numbers(['007', '7', '7.0', ' 7 ']).tolist() == [7]*4
    assert subject_numbers(['12', 'A7']).tolist() == [subject_numbers(['12', 'x'])[0], subject_numbers(['A7'])[0]]      # as cohorts before had it


def physionet(folder, records, outcomes):
    "Set A of the Challenge 2012 with these records, and outcomes of those."
    (folder/'set-a').mkdir()
    for r in records: (folder/'set-a'/f'{r}.txt').write_text(f'Time,Parameter,Value\n00:00,RecordID,{r}\n00:00,Age,50\n00:07,HR,80\n')
    (folder/'set-a'/'._1.txt').write_bytes(b'\0\5\x16\7Mac OS X')
    rows = ''.join(f'{r},1,1,5,-1,{i % 2}\n' for i, r in enumerate(outcomes))
    (folder/'Outcomes-a.txt').write_text('RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n' + rows)


def test_outcomes_of_other_records(place, capsys):
    physionet(place, (1, 2, 3), (7, 8, 9))
    line = refused(main, ['physionet2012', '.', 'out'], capsys)
    assert 'only 0 of 3 ids of Outcomes-a.txt' in line and "'7'" in line and "'1'" in line
    (place/'Outcomes-a.txt').write_text((place/'Outcomes-a.txt').read_text().replace('\n7,', '\n1,').replace('\n8,', '\n02,').replace('\n9,', '\n3.0,'))
    main(['physionet2012', '.', 'out'])
    assert Cohort.open('out').samples.mortality.tolist() == [0, 1, 0]


def meds(folder, time, subject=(1, 1, 2), labels=(1, 2), value=(True, False)):
    "A data set of three events and the labels of two subjects."
    for d in ('data', 'died'): (folder/d).mkdir(exist_ok=True)
    pd.DataFrame(dict(subject_id=subject, time=time, code='HR', numeric_value=[60., 61, 62])).to_parquet(folder/'data'/'0.parquet')
    (folder/'data'/'._0.parquet').write_bytes(b'\0\5\x16\7')
    pd.DataFrame(dict(subject_id=labels, prediction_time=pd.to_datetime(['2020-07-02']*2), boolean_value=value)).to_parquet(folder/'died'/'0.parquet')
    (folder/'codes.csv').write_text('code,channel,normal\nHR,HR,80\n')


def test_meds(place, capsys):
    stamps = pd.Series(pd.to_datetime(['2020-07-01 10:00', '2020-07-01 11:30', '2020-07-01 10:00']))
    words = ['meds', '.', 'codes.csv', 'out', '--labels', 'died', '--hours', '0', '--overwrite']
    for time in (stamps, stamps.dt.tz_localize('UTC').dt.tz_convert('Asia/Tokyo'), stamps.dt.strftime('%Y-%m-%d %I:%M:%S %p'), stamps.dt.strftime('%Y-%m-%dT%H:%M:%SZ')):
        meds(place, time)
        main(words)
        made = Cohort.open('out')
        assert made.samples.window_start.tolist() == [pd.Timestamp('2020-07-01 10:00')]*2 and made.samples.died.tolist() == [1, 0]
        assert made[0]['ehr'][[0, 1], 0].tolist() == [60, 61]
    for wrong, says in ((dict(time=[1, 2, 3]), 'should hold timestamps, not BIGINT'), (dict(time=['soon']*3), "holds 'soon'"), (dict(time=stamps, labels=(7, 8)), 'only 0 of 2 ids of the labels'),
                        (dict(time=stamps, subject=('P1', 'P1', 'P2')), "'P1': it should be whole numbers"), (dict(time=stamps, value=('maybe', 'no')), "'maybe': it should be true or false")):
        meds(place, **wrong)
        assert says in (line := refused(main, words, capsys)), line
    meds(place, stamps, subject=('01', '1', '2'), value=('Yes', 'no'))
    main(words)
    assert Cohort.open('out').samples.died.tolist() == [1, 0]


# --- labels ---

@pytest.mark.parametrize('words, right', [('1 0', [1, 0]), ('1.0 0.0', [1, 0]), ('True False', [1, 0]), ('YES no', [1, 0]), ('t F', [1, 0]), ('y N', [1, 0]), ('positive Negative', [1, 0]),
                                          ('-1 1', [np.nan, 1]), ('NA 1', [np.nan, 1])])
def test_words_for_labels(place, words, right):
    a, b = words.split()
    write(y=f'subject_id,died\n1,{a}\n2, {b} \n')
    np.testing.assert_array_equal(table('--labels', 'y.csv').samples.died, right)
    con = duckdb.connect()
    got = [con.execute(f"select {label_sql('?')}", [w]*label_sql('?').count('?')).fetchone()[0] for w in (a, b)]
    np.testing.assert_array_equal([np.nan if x is None or x == -1 else x for x in got], right)


def test_labels_that_are_none(place, capsys):
    for text, says in (('subject_id,died\n1,maybe\n2,0\n', "'maybe' (row 1)"), ('subject_id,died\n1,2\n2,0\n', 'should be 1, 0, -1 or empty, not 2'), ('subject_id,sample_id,died\n1,1,1\n2,2,0\n', "'sample_id'"),
                       ('subject_id,ehr_start,died\n1,1,1\n2,0,0\n', "'ehr_start'"), ('subject_id,subject,died\n1,1,1\n2,0,0\n', "'subject'"), ('subject_id,died\n1,"0,5"\n', "'0,5'")):
        write(y=text)
        no(capsys, '--labels', 'y.csv', says=says)
    write(y='subject_id,died,rare\n1,1,0\n2,0,0\n')
    table('--labels', 'y.csv')
    assert "attention: no sample is positive for 'rare'" in capsys.readouterr().out


def cxr(folder, **change):
    "The metadata and the labels of two studies."
    meta = pd.DataFrame(dict(dicom_id=['a', 'b'], subject_id=[1, 2], study_id=[11, 12], ViewPosition='AP', StudyDate=['21500103', '21500104'], StudyTime=['103000.5', '93000'])).assign(**change)
    meta.to_csv(folder/'mimic-cxr-2.0.0-metadata.csv.gz', index=False)


@pytest.mark.parametrize('change', [{}, dict(StudyDate=['2150-01-03', '2150-01-04']), dict(StudyDate=['2150/01/03', '2150/01/04'], StudyTime=['10:30:00', '09:30']), dict(StudyDate=['21500103.0', '21500104.0'])])
def test_dates_of_xrays(place, change):
    cxr(place, **change)
    con = connect(place/'spill', threads=1)
    load_images(con, place)
    assert [str(t) for t, in con.execute('select taken from images order by dicom_id').fetchall()] == ['2150-01-03 10:30:00', '2150-01-04 09:30:00']
    con.close()


def test_words_in_the_tables_of_findings(place):
    con = connect(place/'spill', threads=1)
    for yes, no_, unsure in (('1.0', '0.0', '-1.0'), ('True', 'False', '-1'), ('yes', 'NO', '')):
        pd.DataFrame(dict(subject_id=[1, 2], study_id=[11, 12], **{c: [yes, no_] for c in CHEXPERT})).assign(Edema=[unsure, yes]).to_csv('mimic-cxr-2.0.0-chexpert.csv.gz', index=False)
        found = findings(con, place, [11, 12])
        assert found.Pneumonia.tolist() == [1, 0] and found.Edema.tolist() == [0, 1]
    pd.DataFrame(dict(subject_id=[1], study_id=[11], **{c: ['perhaps'] for c in CHEXPERT})).to_csv('mimic-cxr-2.0.0-chexpert.csv.gz', index=False)
    with pytest.raises(InputError, match='study 11: a label should be 1, 0, -1 or empty'): findings(con, place, [11])
    cxr(place, StudyDate=['3 January', '4 January'])
    with pytest.raises(InputError, match='should be YYYYMMDD'): load_images(con, place)
    con.close()


def test_times_of_mimic_tables(place):
    con = connect(place/'spill', threads=1)
    right = ['2150-03-04 11:30:00', '2150-03-04 13:30:00', None]
    for cells in (['2150-03-04 11:30:00', '2150-03-04 13:30:00'], ['2150-03-04 11:30:00 AM', '2150-03-04 1:30:00 PM'], ['2150-03-04T13:30:00+02:00', '2150-03-04 13:30:00 UTC'],
                  ['03/04/2150 11:30', '03/04/2150 1:30 PM', '', '03/25/2150 10:00'], ['4-Mar-2150 11:30', '4-Mar-2150 13:30']):
        write(icustays='stay_id,intime\n' + ''.join(f'{i},{c}\n' for i, c in enumerate([*cells, ''])))
        open_table(con, place, 'icustays', 'stay_id bigint, intime timestamp')
        assert [t and str(t) for t, in con.execute('select intime from icustays where stay_id < 3 order by stay_id').fetchall()] == right[:2] + [None]
    for cell, says in (('03/04/2150 11:30', 'day or month'), ('soon', "holds 'soon' (row 1)"), ('3.5', 'should hold dates, not hours such as 3.5'), ('2150-03-04 10:00 Europe/Berlin', 'write UTC')):
        write(icustays=f'stay_id,intime\n1,{cell}\n')
        with pytest.raises(InputError, match=says.replace('(', r'\(').replace(')', r'\)')): open_table(con, place, 'icustays', 'stay_id bigint, intime timestamp')
    con.close()


# --- what holds for every cell ---

quick = settings(derandomize=True, max_examples=60, deadline=None)
moments = st.datetimes(pd.Timestamp('1900-01-01').to_pydatetime(), pd.Timestamp('2200-12-31').to_pydatetime()).map(lambda t: t.replace(microsecond=0))


def seconds(cells, **options):
    "The kind of a column of texts and its moments."
    with duckdb.connect() as con:
        con.execute('create table cells as select unnest(?) as t', [list(cells)])
        f = find_format(con, 'cells', 't', 'time', **options)
        return f, [x for x, in con.execute(f'select {f.moment("t", "g")} from (select *, {f.parts("t")} as g from cells)').fetchall()]


@quick
@given(st.lists(moments, min_size=1, max_size=5), st.sampled_from(['%Y-%m-%d %H:%M:%S', '%Y-%m-%dT%H:%M:%SZ', '%Y-%m-%d %I:%M:%S %p', '%Y/%m/%d %H:%M:%S', '%d-%b-%Y %H:%M:%S', '%Y%m%d%H%M%S',
                                                                  '%B %d, %Y %I:%M:%S %p', '%Y%m%dT%H%M%S', '%d%b%Y:%H:%M:%S']))
def test_a_date_comes_back(times, form):
    got = seconds([t.strftime(form) for t in times])[1]
    assert got == [t.replace(tzinfo=pd.Timestamp(0, tz='UTC').tzinfo).timestamp() for t in times]


@quick
@given(moments, st.integers(-14*60, 14*60))
def test_an_offset_is_taken_off(time, minutes):
    sign, h, m = '-' if minutes < 0 else '+', *divmod(abs(minutes), 60)
    f, (got,) = seconds([f'{time:%Y-%m-%d %H:%M:%S}{sign}{h:02}:{m:02}'])
    assert f.kind == 'utc' and got == time.replace(tzinfo=pd.Timestamp(0, tz='UTC').tzinfo).timestamp() - minutes*60


@quick
@given(st.lists(st.floats(-1e5, 1e5).map(lambda x: round(x, 4)), min_size=1, max_size=5), st.sampled_from([('hours', 1), ('minutes', 60), ('seconds', 3600), ('days', 1/24)]))
def test_a_number_comes_back(numbers, unit):
    f, got = seconds([repr(x) for x in numbers], unit=unit[0])
    assert f.kind == 'elapsed' and got == pytest.approx([x/unit[1] for x in numbers])


@quick
@given(st.text(max_size=25))
def test_any_text_is_read_or_refused(text):
    try: f, got = seconds([text])
    except InputError as e: assert '\n' not in str(e) or '\n' in text or '\r' in text
    else: assert all(x is not None and np.isfinite(x) for x in got)


@quick
@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=6), st.data())
def test_whole_numbers_are_one_id(ids, data):
    spell = [data.draw(st.sampled_from([f'{i}', f'00{i}', f'{i}.0', f' {i} ', f'{i}.'])) for i in ids]
    assert subject_numbers(spell).tolist() == ids


@quick
@given(st.lists(st.from_regex(r'[A-Z]{1,3}-\d{1,4}', fullmatch=True), min_size=1, max_size=6))
def test_texts_are_ids_as_they_are(ids):
    assert plain_ids([f' {i}\t' for i in ids]).tolist() == ids
    assert check_meeting(plain_ids(ids), ids, 'a', 'b') == 0


@quick
@given(st.text(max_size=12).filter(lambda t: t.strip() and '"' not in t))
def test_a_label_is_read_or_refused(text):
    try: got = label_columns(pd.DataFrame(dict(y=pd.Series([text], dtype='str'))), ['y'], 'y.csv').y[0]
    except InputError: return
    assert np.isnan(got) or got in (0, 1)


# --- tables of images ---

def test_tables_of_images(place, capsys):
    from PIL import Image
    os.mkdir('images')
    rng = np.random.default_rng(0)
    for n in 'abcd': Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(f'images/{n}.png')
    write(shift='image,file,y\na.png,b.png,1,\nb.png,c.png,0,\nc.png,d.png,1,\nd.png,a.png,0,\n', patients='image,patient,y\na.png,007,yes\nb.png,7,no\nc.png,7.0,YES\nd.png,P8,0\n')
    words = ['images', 'out', '--size', 16, '--labels', 'y']
    assert 'shift.csv, line 2 has 4 cells where the header has 3' in refused(main, ['images', 'shift.csv', *words], capsys)
    main(['images', 'patients.csv', 'images', 'out', '--size', '16', '--labels', 'y', '--subject', 'patient'])
    made = Cohort.open('out').samples
    assert made.subject_id.nunique() == 2 and made.groupby('subject_id').split.nunique().max() == 1 and made.y.tolist() == [1, 0, 1, 0]
