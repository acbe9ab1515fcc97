"""How fast MIMIC-IV's largest table is read, and in how much memory: `scan_events` and `write_series` on generated chartevents.

    python benchmarks/extraction.py --folder /tmp/mmsn-extraction                    # 3, 10 and 30 million rows
    python benchmarks/extraction.py --folder /tmp/mmsn-extraction --rows 3_000_000   # a first look

The generated table has MIMIC-IV's 11 columns, 5,900 rows a stay (as the full one), and its mix of items: 14 % of the rows are of
the 17 channels, in the proportions of the MIMIC-IV demo. Each size is read in a fresh process, whole stays, all labels aside.
The peer in the same run is a `csv.DictReader` row loop, the first step of the published chain (mimic3-benchmarks on MIMIC-IV),
on 300,000 of the same rows; the recorded figure of that whole chain on such a machine is 12,000 rows a second.
`--save` writes the table to nbs/results/extraction.csv.
"""
import argparse
import csv
import gzip
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from mmsn.options import InputError
from mmsn.config import cli
from mmsn.data.writer import ArrayWriter
from mmsn.data.mimic.channels import CHANNELS, items_of
from mmsn.data.mimic.events import fates, scan_events, write_series
from mmsn.data.mimic.stays import load_stays, select_stays, stay_rules
from mmsn.data.tables import connect
from mmsn.data.timeseries import layout
from mmsn.threads import peak_memory

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'
CHAIN, LEAST, MOST = 12_000, 20, 4.0         # rows a second of the published chain; times that; GB at 30 million rows
FULL, ROWS_A_STAY, OURS = 433_000_000, 5_900, .14
COLUMNS = 'subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning'
# rows of the MIMIC-IV demo: [item, rows, lowest value, spread] or [item, rows, words]
NUMBERS = [(220051, 5524, 40, 50), (220180, 8349, 40, 50), (224643, 3, 40, 50), (225310, 486, 40, 50), (223835, 1746, 30, 60), (220621, 931, 80, 120),
           (225664, 1637, 80, 150), (226537, 209, 80, 150), (220045, 13913, 50, 80), (226707, 71, 58, 20), (226730, 71, 150, 45), (220052, 5560, 50, 60),
           (220181, 8342, 50, 60), (224322, 38, 50, 60), (225312, 488, 50, 60), (220227, 104, 85, 16), (220277, 13540, 88, 13), (220210, 13913, 10, 25),
           (224422, 93, 5, 20), (224689, 1314, 0, 25), (224690, 1331, 10, 25), (220050, 5525, 80, 90), (220179, 8347, 80, 90), (225309, 486, 80, 90),
           (223761, 3379, 96, 6), (223762, 391, 35, 5), (224639, 441, 50, 70), (226512, 129, 50, 70), (226531, 236, 110, 150), (220274, 128, 7, 1),
           (223830, 644, 7, 1), (226329, 95, 35, 5)]
WORDS = [(220739, 3274, ['None', 'To Pain', 'To Speech', 'Spontaneously']),
         (223901, 3251, ['No response', 'Flex-withdraws', 'Localizes Pain', 'Obeys Commands']),
         (223900, 3266, ['No Response-ETT', 'Confused', 'Oriented']), (223951, 1540, ['Normal <3 Seconds', 'Abnormal >3 Seconds']),
         (224308, 1501, ['Normal <3 Seconds', 'Abnormal >3 Seconds'])]


def slots(n=10_000):
    "A table of n equally likely items: `OURS` of them those of the channels, the rest others, numbers and words."
    ours = pd.DataFrame([(*r, None) for r in NUMBERS] + [(i, r, 0, 1, words) for i, r, words in WORDS], columns=['itemid', 'rows', 'base', 'spread', 'words'])
    known = {i.itemid for i in items_of('clean')}
    assert set(ours.itemid) - known <= {224422, 224689}, 'an item of the mix is not in the table of items'
    many = np.maximum(np.rint(ours.rows/ours.rows.sum()*OURS*n), 1).astype(int)
    made = ours.loc[ours.index.repeat(many)].drop(columns='rows')
    rest = n - len(made)
    other = pd.DataFrame(dict(itemid=230_000 + np.arange(rest) % 1500, base=np.arange(rest) % 90, spread=40,
                              words=[['Yes', 'No', 'WNL', 'Not applicable'] if k % 3 == 0 else None for k in range(rest)]))
    table = pd.concat([made, other], ignore_index=True).sample(frac=1, random_state=0, ignore_index=True)
    return table.assign(slot=np.arange(n))


def rows_sql(begin, end):
    "Rows [begin, end) of chartevents: stay after stay, hour after hour, as MIMIC's own are."
    return f"""select 10000000 + stay as subject_id, 20000000 + stay as hadm_id, 30000000 + stay as stay_id, 40000 + stay % 700 as caregiver_id,
            strftime(t, '%Y-%m-%d %H:%M:%S') as charttime, strftime(t + to_minutes(9), '%Y-%m-%d %H:%M:%S') as storetime, itemid, value,
            case when words is null then value end as valuenum, case when words is null then 'mmHg' end as valueuom, 0 as warning
        from (select *, i // {ROWS_A_STAY} as stay, coalesce(words[(h % len(words))::int + 1], (base + h % spread)::varchar) as value,
                timestamp '2150-01-01 08:00:00' + to_minutes((((i % {ROWS_A_STAY}) * 84 * 4) // {ROWS_A_STAY} * 15)::bigint) as t
            from (select range as i, hash(range) % 10000 as slot, (hash(range + 7) % 1000)::bigint as h from range({begin}, {end})) join slots using (slot))
        order by i"""


def generate(folder, rows):
    "MIMIC-IV's layout with `rows` of chartevents in `folder`, unless it is there already."
    if (folder/'done').is_file(): return
    for inside in ('hosp', 'icu'): (folder/inside).mkdir(parents=True, exist_ok=True)
    con, stays = duckdb.connect(config=dict(memory_limit='2GB', threads=2)), -(-rows//ROWS_A_STAY)
    con.register('mix', slots())
    con.execute('create table slots as from mix')
    part = folder/'part.csv'
    with gzip.open(folder/'icu'/'chartevents.csv.gz', 'wb', compresslevel=1) as out:
        out.write((COLUMNS + '\n').encode())
        for begin in range(0, rows, 1_000_000):
            con.execute(f"copy ({rows_sql(begin, min(begin + 1_000_000, rows))}) to '{part}' (format csv, header false)")
            out.write(part.read_bytes())
    part.unlink()
    def small(name, sql): con.execute(f"copy ({sql}) to '{folder/name}.csv.gz' (format csv, header, compression gzip)")
    s = f'from range({stays}) r(i)'
    small('hosp/patients', f"select 10000000 + i as subject_id, 'F' as gender, 60 as anchor_age, 2150 as anchor_year, null as dod {s}")
    small('hosp/admissions', "select 10000000 + i as subject_id, 20000000 + i as hadm_id, '2150-01-01 00:00:00' as admittime, "
          f"'2150-01-09 00:00:00' as dischtime, null as deathtime, 'WHITE' as race, 0 as hospital_expire_flag {s}")
    small('icu/icustays', "select 10000000 + i as subject_id, 20000000 + i as hadm_id, 30000000 + i as stay_id, 'MICU' as first_careunit, "
          f"'MICU' as last_careunit, '2150-01-01 07:59:47' as intime, '2150-01-04 20:00:00' as outtime, 3.5 as los {s}")
    small('hosp/labevents', "select 10000000 + i as subject_id, 20000000 + i as hadm_id, i * 100 + k as specimen_id, strftime(timestamp "
          "'2150-01-01 09:05:00' + to_hours(2 * k::int), '%Y-%m-%d %H:%M:%S') as charttime, [50931, 50820, 51222, 50971][k % 4 + 1] as itemid, "
          f"'___' as value, [140, 7.38, 11, 4][k % 4 + 1] as valuenum, '' as valueuom {s}, range(40) q(k)")
    (folder/'done').touch()


class Watch(threading.Thread):
    "The largest size of a folder, looked at five times a second."
    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.most, self.over = Path(folder), 0, threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(.2): self.most = max(self.most, size(self.folder))


def size(folder):
    "Bytes of the files in `folder`, as far as they are still there."
    total = 0
    for p in Path(folder).rglob('*'):
        try: total += p.stat().st_size
        except OSError: pass
    return total


def read_one(folder, rules, memory, threads):
    "In this process: scan and write one size; prints one line of JSON."
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        tmp = Path(tmp)
        con, watch = connect(tmp/'spill', memory, threads), Watch(tmp/'spill')
        load_stays(con, folder, rules)
        select_stays(con, stay_rules(('phenotyping',), None, rules), None)
        begin = time.perf_counter()
        events = scan_events(con, folder, tmp/'events', rules)
        middle = time.perf_counter()
        writer = ArrayWriter(tmp/'ehr.npy', np.float32, (len(layout(CHANNELS)[1]),))
        hours = int(write_series(con, events, writer, 'compact', rules).sum())
        end = time.perf_counter()
        watch.over.set()
        print(json.dumps(dict(seconds=end - begin, scan=middle - begin, grid=end - middle, hours=hours,
                              used=int(fates(con, events).used.sum()), kept_mb=size(events)/1e6,
                              spilled_mb=watch.most/1e6,
                              peak_gb=peak_memory()/1e9)))


def peer(folder, rows=300_000):
    "Rows a second of the published chain's first step: a DictReader loop that collects a subject's rows and writes them to his own file."
    items = {str(i.itemid) for i in items_of('benchmark', 'chartevents')}
    names = ['SUBJECT_ID', 'HADM_ID', 'STAY_ID', 'CHARTTIME', 'ITEMID', 'VALUE', 'VALUEUOM']
    with tempfile.TemporaryDirectory() as tmp, gzip.open(folder/'icu'/'chartevents.csv.gz', 'rt', newline='') as f:
        def flush(subject, held):
            path = Path(tmp)/f'{subject}.csv'
            new = not path.exists()
            with open(path, 'a', newline='') as out:
                writer = csv.DictWriter(out, names)
                if new: writer.writeheader()
                writer.writerows(held)
        begin, last, held = time.perf_counter(), '', []
        for n, row in enumerate(csv.DictReader(f), 1):
            if row['subject_id'] != last and held: flush(last, held); held = []
            last = row['subject_id']
            if row['itemid'] in items: held.append({k: row[k.lower()] for k in names})
            if n == rows: break
        if held: flush(last, held)
        return n/(time.perf_counter() - begin)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, nargs='+', default=[3_000_000, 10_000_000, 30_000_000], help='rows of chartevents, one run each')
    p.add_argument('--folder', help='where the generated tables are kept for the next time; a temporary one by default (30 million rows take about 0.4 GB)')
    p.add_argument('--rules', default='clean', choices=('clean', 'benchmark'), help='rule set')
    p.add_argument('--memory', default='', help="DuckDB's limit, such as 2GB; an eighth of the machine's by default")
    p.add_argument('--threads', type=int, default=0, help="DuckDB's threads; 0: all")
    p.add_argument('--save', action='store_true', help='write nbs/results/extraction.csv')
    p.add_argument('--one', help=argparse.SUPPRESS)
    o = p.parse_args(argv)
    if o.one: return read_one(Path(o.one), o.rules, o.memory, o.threads)
    if min(o.rows) < ROWS_A_STAY: raise InputError(f'--rows should be at least {ROWS_A_STAY:,}, one stay')
    with tempfile.TemporaryDirectory() as tmp:
        table = measure(Path(o.folder or tmp), sorted(o.rows), [f'--rules={o.rules}', f'--memory={o.memory}', f'--threads={o.threads}'])
    if o.save: table.to_csv(RESULTS/'extraction.csv', index=False)


def measure(folder, sizes, options):
    "Generate and read every size; prints the table and the bars, returns the table."
    made = []
    for n in sizes:
        begin = time.perf_counter()
        generate(folder/str(n), n)
        megabytes = (folder/str(n)/'icu'/'chartevents.csv.gz').stat().st_size/1e6
        print(f'{n:,} rows generated in {time.perf_counter() - begin:.0f} s, {megabytes:.0f} MB gzipped', flush=True)
        told = subprocess.run([sys.executable, __file__, '--one', str(folder/str(n)), *options], capture_output=True, text=True)
        if told.returncode: raise InputError(f'reading {n:,} rows failed: {told.stderr.strip().splitlines()[-1]}')
        made.append(dict(rows=n, **json.loads(told.stdout.splitlines()[-1])))
    table = pd.DataFrame(made)
    table.insert(1, 'rows_per_second', (table.rows/table.seconds).astype(int))
    print(table.round(2).to_string(index=False))
    beside, last = peer(folder/str(sizes[0])), made[-1]
    speed = last['rows']/last['seconds']
    growth = math.log(last['seconds']/made[0]['seconds'])/math.log(last['rows']/made[0]['rows']) if len(made) > 1 else float('nan')
    whole = last['seconds']*(FULL/last['rows'])**(max(growth, 1) if growth == growth else 1)
    if len(made) > 1: print(f'growth exponent {sizes[0]:,} to {sizes[-1]:,} rows: {growth:.2f} (1: time grows as the rows do)')
    print(f'estimate for {FULL:,} rows: {whole/60:.0f} minutes (extrapolated, not measured)')
    print(f'peer in this run, the DictReader loop (only the first step of the published chain): {beside:,.0f} rows/s, so {speed/beside:.1f} times')
    print(f'published chain as a whole (recorded): {CHAIN:,} rows/s, so {speed/CHAIN:.0f} times; '
          f'bar {LEAST} {"reached" if speed >= LEAST*CHAIN else "NOT REACHED"}')
    print(f'peak memory {last["peak_gb"]:.2f} GB at {last["rows"]:,} rows; bar {MOST:g} GB {"reached" if last["peak_gb"] <= MOST else "NOT REACHED"}')
    return table.assign(peer_rows_per_second=int(beside), growth=growth)


if __name__ == '__main__': main()
