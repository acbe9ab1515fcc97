"""Constraints for pip from settings.ini: `python .ci/bounds.py lowest` pins PyTorch, torchvision and DuckDB to their lower bounds, `newest` pins nothing."""
import re, sys
from configparser import ConfigParser
from pathlib import Path

PINNED = ('torch', 'torchvision', 'duckdb')      # what changes most from version to version under what is computed here


def lowest(requirements):
    "name==bound.* of each of PINNED among lines `name>=bound,…`."
    bounds = dict(re.findall(r'^\s*([\w-]+)\s*>=\s*([\d.]+)', requirements, re.M))
    return [f'{name}=={bounds[name]}.*' for name in PINNED]


if __name__ == '__main__':
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(Path(__file__).resolve().parents[1]/'settings.ini', encoding='utf-8')
    if sys.argv[1:] == ['lowest']: print('\n'.join(lowest(ini['DEFAULT']['requirements'])))
    elif sys.argv[1:] != ['newest']: raise SystemExit(__doc__)
