"""What shards save and what they cost: one preparation of MIMIC against 1, 2, 4 shards and their merge, on generated chartevents.

    python benchmarks/shards.py /tmp/mmsn-shards                                        # 3 and 10 million rows
    python benchmarks/shards.py /tmp/mmsn-shards --rows 3e6 10e6 30e6 100e6 --shards 1 2 4
    python benchmarks/shards.py /tmp/mmsn-shards --format parquet                       # chartevents converted once, as the how-to advises

The tables are those of `extraction.py` (MIMIC-IV's columns and mix of items, 5,900 rows a stay). Every preparation, shard and merge is a process of its own,
one after the other, with one thread, so that its processor seconds and its peak memory are its own; `alone` is the time until the cohort is there when each
shard has a machine: the longest shard and the merge. The merged cohort must have the hash of the single one, or the script fails. `--save` writes
nbs/results/shards.csv.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pandas as pd

from extraction import FULL, ROWS_A_STAY, generate
from mmsn.config import cli
from mmsn.data.cohort import Cohort
from mmsn.data.mimic.prepare import prepare_mimic
from mmsn.data.mimic.shards import merge_shards, prepare_shard
from mmsn.options import InputError
from mmsn.threads import peak_memory

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'
OPTIONS = dict(tasks='mortality', hours=84, threads=1)                    # the whole of every stay
HUNDRED = 100*FULL                                                       # rows of a hundred MIMICs


def tables(folder, rows, kind):
    "The generated tables, as `.csv.gz` or with the two large ones as parquet; and the seconds that the conversion took."
    csv = folder/f'{rows}-csv.gz'
    generate(csv, rows)
    if kind == 'csv.gz': return csv, 0.
    made, begin = folder/f'{rows}-parquet', time.process_time()
    if not (made/'done').is_file():
        for inside in ('hosp', 'icu'): (made/inside).mkdir(parents=True, exist_ok=True)
        for path in csv.glob('*/*.csv.gz'):
            to = made/path.relative_to(csv)
            if path.name.startswith(('chartevents', 'labevents')):
                to = to.with_name(to.name.replace('.csv.gz', '.parquet'))
                duckdb.execute(f"copy (select * from read_csv('{path}', all_varchar=true)) to '{to}' (format parquet)")
            else: to.write_bytes(path.read_bytes())
        (made/'seconds').write_text(str(time.process_time() - begin))
        (made/'done').touch()
    return made, float((made/'seconds').read_text())


def one(what, iv, out, shards, shard):
    "In this process: one preparation, shard or merge; prints one line of JSON."
    begin, memory = time.perf_counter(), '2GB'
    if what == 'whole': prepare_mimic(iv, out, memory=memory, **OPTIONS)
    elif what == 'shard': prepare_shard(iv, out, shards=shards, shard=shard, memory=memory, **OPTIONS)
    else: merge_shards(Path(f'{out}-in'), out, memory=memory, threads=1)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(dict(wall=time.perf_counter() - begin, cpu=used.ru_utime + used.ru_stime, peak_gb=peak_memory()/1e9)))


def measured(*words):
    "The same in a process of its own."
    told = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if told.returncode: raise InputError(f'{" ".join(map(str, words))} failed: {told.stderr.strip().splitlines()[-1]}')
    return json.loads(told.stdout.splitlines()[-1])


def fresh(folder):
    "A place for what is about to be measured."
    if folder.exists(): subprocess.run(['rm', '-r', str(folder)], check=True)
    return folder


def measure(folder, rows, numbers, kind):
    "A row for the whole, and one for each number of shards."
    iv, converted = tables(folder, rows, kind)
    print(f'{rows:,} rows in {kind}' + f', converted in {converted:.0f} processor seconds, once'*(converted > 0), flush=True)
    whole = measured(fresh(folder/'whole'), '--one', 'whole', '--iv', iv)
    made = [dict(rows=rows, format=kind, shards=0, cpu=whole['cpu'], longest_cpu=whole['cpu'], peak_gb=whole['peak_gb'], merge_cpu=0., merge_gb=0., alone=whole['wall'])]
    for n in numbers:
        out = fresh(folder/f'of{n}')
        fresh(folder/f'of{n}-in')
        parts = [measured(folder/f'of{n}-in', '--one', 'shard', '--iv', iv, '--number', n, '--shard', k) for k in range(n)]
        merge = measured(out, '--one', 'merge')
        if Cohort.open(out).hash != Cohort.open(folder/'whole').hash: raise InputError(f'{n} shards of {rows:,} rows give another cohort')
        most = lambda key: max(p[key] for p in parts)
        made.append(dict(rows=rows, format=kind, shards=n, cpu=sum(p['cpu'] for p in parts) + merge['cpu'], longest_cpu=most('cpu'), peak_gb=most('peak_gb'),
                         merge_cpu=merge['cpu'], merge_gb=merge['peak_gb'], alone=most('wall') + merge['wall']))
    return made


def slope(table, column):
    "What a million more rows cost, between the smallest and the largest size: the start of a process, always the same, is not in it."
    a, b = table.iloc[0], table.iloc[-1]
    return (b[column] - a[column])/(b.rows - a.rows)*1e6


def told(table):
    "What follows from the table, in words."
    for (kind, n), part in table.groupby(['format', 'shards']):
        part, name = part.sort_values('rows'), f'{kind}, {n} shards' if n else f'{kind}, one preparation'
        if len(part) < 2: print(f'{name}: one size only, no growth'); continue
        each, merging = slope(part, 'longest_cpu'), slope(part, 'merge_cpu')
        on_paper = ', '.join(f'{(each + merging)*rows/1e6/3600:,.2f} h for {rows:,} rows' for rows in (FULL, HUNDRED))
        print(f'{name}: {each:.3f} processor seconds a million rows in the longest job, {merging:.3f} in the merge, memory {slope(part, "peak_gb")*1e3:.1f} MB; '
              f'on paper, one core a job: {on_paper}')
    for kind, part in table.groupby('format'):
        if part.rows.nunique() > 1 and part.shards.nunique() > 2: floor(kind, part)


def floor(kind, part):
    "Of the slope of one preparation, what N shards divide, and what each of them does again: reading."
    slopes = {n: slope(p.sort_values('rows'), 'longest_cpu') for n, p in part.groupby('shards') if n}
    few, many = min(slopes), max(slopes)
    divided = (slopes[few] - slopes[many])/(1/few - 1/many)
    print(f'{kind}: of {slopes[few]:.3f} processor seconds a million rows, {max(slopes[few] - divided/few, 0):.3f} are spent by every shard, however many there are: on paper '
          f'{max(slopes[few] - divided/few, 0)*HUNDRED/1e6/3600:,.1f} h for {HUNDRED:,} rows')


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='folder for generated tables, which are kept for the next time, and cohorts')
    p.add_argument('--rows', type=float, nargs='+', default=[3e6, 10e6], help='rows of chartevents, one run each')
    p.add_argument('--shards', type=int, nargs='+', default=[1, 2, 4], help='numbers of shards')
    p.add_argument('--format', nargs='+', choices=('csv.gz', 'parquet'), default=['csv.gz', 'parquet'], help='of the tables of events')
    p.add_argument('--save', action='store_true', help='write nbs/results/shards.csv')
    for name, kind in (('one', str), ('iv', Path), ('number', int), ('shard', int)): p.add_argument(f'--{name}', type=kind, help=argparse.SUPPRESS)
    o = p.parse_args(argv)
    if o.one: return one(o.one, o.iv, Path(o.out), o.number, o.shard)
    if min(o.rows) < ROWS_A_STAY: raise InputError(f'--rows should be at least {ROWS_A_STAY:,}, one stay')
    made = []
    for kind in o.format:
        for rows in sorted(map(int, o.rows)):
            made += measure(Path(o.out), rows, sorted(o.shards), kind)
            print(pd.DataFrame(made).tail(len(o.shards) + 1).round(2).to_string(index=False), flush=True)
    table = pd.DataFrame(made)
    told(table)
    if o.save: table.round(2).to_csv(RESULTS/'shards.csv', index=False)


if __name__ == '__main__': main()
