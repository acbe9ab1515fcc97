"""The site's gallery: the full report of one run on each of three sets that may be shown.

    python benchmarks/gallery.py mmsn-gallery --open FOLDER       # about an hour on two cores; goes on where it stopped
    python benchmarks/gallery.py mmsn-gallery --only synthetic

FOLDER holds the open sets as `physionet2012` and `nih`, in the layouts that mmsn-prepare reads. Writes nbs/gallery/NAME.html, the reports,
and nbs/results/gallery_NAME.csv, gallery_NAME_robustness.csv and gallery_NAME_missing.csv, which the page nbs/gallery.ipynb reads.
"""
import argparse, shutil
from pathlib import Path

from mmsn.options import InputError
from mmsn.config import cli, load_config
from mmsn.evaluate.evaluation import evaluate
from mmsn.prepare import main as prepare
from mmsn.loop import Trainer

NBS = Path(__file__).resolve().parents[1]/'nbs'
ASKED = ['fractions=[0.01,0.05,0.1,1.0]', 'corruptions=all', 'protocols=[low_shot,linear_probe,knn,supervised,finetune,robustness,missing,retrieval]', 'finetune_epochs=10']
# name -> (preset, arguments of mmsn-prepare before and after the cohort's folder)
SETS = dict(synthetic=('demo', lambda source: ['synthetic'], []),
            physionet2012=('physionet2012_vitals_labs', lambda source: ['physionet2012', str(source/'physionet2012')], ['--vitals-labs']),
            nih=('nih', lambda source: ['nih', str(source/'nih')], ['--size', '128']))


def make(name, out, source):
    "Prepare, train and evaluate one set, each step unless it is there already; returns the report's folder."
    preset, before, after = SETS[name]
    cohort, run = out/f'{name}-cohort', out/name
    if not (cohort/'cohort.json').is_file():
        if name != 'synthetic' and not source: raise InputError(f'{name} is an open set: add --open FOLDER, which holds it as {name}')
        prepare([*before(source), str(cohort), *after])
    trainer = Trainer(load_config(preset, [f'data.cohort={cohort}', f'train.run={run}']))
    trainer.fit()
    if trainer.step < trainer.total: raise SystemExit(f'stopped at step {trainer.step} of {trainer.total} of {name}: the same command goes on')
    if not (run/'report'/'about.json').is_file(): evaluate(run, ASKED)
    return run/'report'


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('out', type=Path, help='folder for cohorts and runs')
    p.add_argument('--open', type=Path, help='folder of the open sets')
    p.add_argument('--only', nargs='+', choices=list(SETS), default=list(SETS), help='which (default: all)')
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.only:
        report = make(name, a.out, a.open)
        (NBS/'gallery').mkdir(exist_ok=True)
        shutil.copy(report/'report.html', NBS/'gallery'/f'{name}.html')
        for table, end in (('summary', ''), ('robustness', '_robustness'), ('missing', '_missing')):
            if (report/f'{table}.csv').is_file(): shutil.copy(report/f'{table}.csv', NBS/'results'/f'gallery_{name}{end}.csv')
        print(f'{name}: {NBS/"gallery"/name}.html')


if __name__ == '__main__': main()
