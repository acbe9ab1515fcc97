"""MIMIC-IV and MIMIC-CXR-JPG, as they are downloaded, to a cohort.

`prepare_mimic` does all of it; its parts are the modules channels, stays, events, xrays, prepare and check.
"""
from .channels import BENCHMARK, CHANNELS, ITEMS, NAMES, WORDS, channel_set, item_table
from .stays import MORTALITY, PHENOTYPES, load_stays, mimic_layout, phenotypes, select_stays, split_of, stay_rules
from .events import fates, hourly, scan_events, write_series
from ..splits import divide, read_split
from .xrays import CHEXPERT, findings, load_images, pair_images, read_report
from .prepare import TASKS, MimicOptions, prepare_mimic
from .check import check_mimic
