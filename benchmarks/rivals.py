"""Every objective with the same encoders, views, batch, steps and patients: one row for each objective, seed and input.

    python benchmarks/rivals.py mmsn-rivals                            # synthetic patients, image and chart: nbs/results/rivals.csv
    MMSN_DATA=folder python benchmarks/rivals.py mmsn-rivals --images  # IU and NIH radiographs: nbs/results/rivals_images.csv
    python benchmarks/rivals.py mmsn-rivals --objectives simclr mae    # some of them

The learning rate of each objective is chosen from one short list, the same for all, by the AUROC of a probe on *validation*, with the first seed;
test is read once, with that rate, for every seed. Encoders are those of the presets `demo` and `images_open`, with embeddings that no layer joins
(`fusion.dim=0`, `encoder.dim=0`), since some objectives would leave such a layer untrained; `msn` keeps the spaces and aims of the preset, and
`msn + contrast` also its contrast; `msn, no heavy view` leaves out the one view of `images_open` that hides 30 to 80 % of its patches. Runs and finished rows are kept in the folder: a second call goes on from there.
"""
import argparse, contextlib, io, os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from mmsn.config import cli, load_config
from mmsn.data.cohort import Cohort
from mmsn.dials import DRAWING, OBJECTIVES
from mmsn.evaluate.features import extract_features, feature_matrix, plain_baselines
from mmsn.evaluate.probes import fit_probe, linear_probe, low_shot, summarise
from mmsn.evaluate.robustness import missing, robustness
from mmsn.evaluate.task import Task, make_draws
from mmsn.evaluate.trees import fit_booster
from mmsn.loop import Trainer
from mmsn.model import MMSN
from mmsn.options import InputError
from mmsn.prepare import iu, join, nih, synthetic
from mmsn.threads import peak_memory

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'
FRACTIONS, RATES, PROBE = (.05, .1, 1.), (1e-3, 4e-3), partial(fit_probe, folds=5)
RIVALS = [o for o in OBJECTIVES[1:] if o not in (*DRAWING, 'convirt', 'gloria')]     # these need reports: benchmarks/text.py, generate.py
BASELINES = dict(plain=PROBE, booster=fit_booster)      # pixels and summaries, no encoder
ARMS = ['random', *BASELINES, 'msn', 'msn, no heavy view', 'msn + contrast', *RIVALS]
ALONE = ['msn, no heavy view']                    # of images: the preset `demo` has no such view
TOGETHER = ['msn + contrast', 'clip', 'siglip']  # of two modalities
FUSED = ['fusion.dim=0', 'modalities.ehr.encoder.dim=0']
BARE = ['fusion.contrast={weight: 0, loss: sigmoid}']
# of the size of these encoders, as far as the papers' own are for a million pictures
DIALS = dict(dino=['objectives.dino.outputs=256'], mae=['objectives.mae={dim: 48, depth: 1, heads: 4}'], clip=['objectives.clip.dim=64'], siglip=['objectives.siglip.dim=64'])


def changes_of(arm, images):
    "What an arm changes in its preset."
    changes = [] if images else [*FUSED, *(BARE if arm != 'msn + contrast' else [])]
    if arm in ALONE: changes.append('modalities.cxr.views.heavy=0')
    return changes + ([f'objective={arm}', *DIALS.get(arm, [])] if arm in RIVALS else [])


def open_cohort(out, images, patients):
    "The cohort of the comparison, made where it is not there."
    place = out/('images' if images else 'synthetic')
    if place.exists(): return Cohort.open(place)
    if not images: return synthetic(place, patients=patients, seed=11)
    if not (data := os.environ.get('MMSN_DATA')): raise InputError('set MMSN_DATA to the folder with iu/ and nih/')
    for name, make in dict(iu=iu, nih=nih).items():
        if not (out/name).exists(): make(Path(data)/name, out/name, size=72)
    return join([out/'iu', out/'nih'], place)


def config_of(run, cohort, arm, images, rate, seed, epochs):
    return load_config('images_open' if images else 'demo', [f'data.cohort={cohort.folder}', f'train.run={run}', f'train.seed={seed}', 'train.threads=1', 'train.probe_every=0',
                                                             f'optim.epochs={epochs}', f'optim.lr={rate}', *changes_of(arm, images)])


def memory_of(arm, cohort, images):
    "GB of a process at its highest that takes five steps of an arm and nothing else."
    words = [sys.executable, __file__, cohort.folder.parent, '--one', arm, *['--images']*images]
    return float(subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True).stdout.split()[-1])


def five_steps(arm, cohort, images):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        trainer = Trainer(config_of(Path(folder)/'run', cohort, arm, images, RATES[0], 0, 1), cohort)
        trainer.total = 5
        trainer.fit()
    print(round(peak_memory()/1e9, 4))


def trained(out, cohort, arm, images, rate, seed, epochs):
    "The model of one run and seconds of CPU a step; trained where it is not there."
    folder = out/f'{"images" if images else "fused"}-{arm.replace(" ", "").replace(",", "-")}-{rate:g}-{seed}-{epochs:g}'
    config = config_of(folder, cohort, arm, images, rate, seed, epochs)
    if arm == 'random': return MMSN.from_config(config, cohort).eval(), np.nan
    clock = folder/'seconds.txt'
    if not clock.is_file():
        trainer = Trainer(config, cohort)
        first, start = trainer.step, time.process_time()
        trainer.fit()
        if trainer.step < trainer.total: raise SystemExit(f'stopped at step {trainer.step} of {trainer.total}: the same command goes on')
        clock.write_text(f'{(time.process_time() - start)/max(trainer.total - first, 1):.4f}')
    return MMSN.from_pretrained(folder/'encoder'), float(clock.read_text())


def on_validation(model, cohort):
    "Macro AUROC of a probe fitted on training labels and read on validation."
    whole = Task.of(cohort)
    on = np.isin(whole.split, ('train', 'val'))
    task = Task(whole.labels[on], np.where(whole.split[on] == 'train', 'train', 'test'), whole.subjects[on], whole.names, whole.groups, whole.ids[on], whole.rows[on])
    t = linear_probe({'joint': feature_matrix(extract_features(model, cohort, task.rows), 'joint')}, task, 'arm', PROBE, resamples=0)
    return t[(t.label == 'macro') & (t.metric == 'auroc')].value.item()


def on_test(model, cohort):
    "One row for each input: AUROC by fraction, with 70 % of the patches hidden, and with a modality alone."
    task = Task.of(cohort)
    table, names = extract_features(model, cohort, task.rows), list(model.config.modalities)
    inputs = names if len(names) == 1 else ['joint', *names]
    scores = summarise(low_shot({n: feature_matrix(table, n) for n in inputs}, task, make_draws(task, FRACTIONS), 'arm', PROBE, resamples=0))
    rows = scores.pivot(index='input', columns='fraction', values='auroc').rename(columns=lambda f: f'auroc_{f:g}')
    hidden = robustness({'arm': model}, cohort, task, {'arm': table}, (0., .7), inputs=inputs, resamples=0)
    rows['masked_70'] = hidden[hidden.severity > 0].set_index('input').auroc
    if len(names) > 1:
        alone = missing({'arm': model}, cohort, task, {'arm': table}, resamples=0).set_index('seen').auroc
        for n in names: rows.loc['joint', f'{n}_alone'] = alone[n]
    return rows.reset_index()


def of_baseline(name, cohort, images):
    "The same AUROC from pixels of small images and summaries of charts."
    task, names = Task.of(cohort), ['cxr'] if images else ['cxr', 'ehr']
    features = plain_baselines(cohort, task.rows, task.at('train'), names, facts=False)[name]
    scores = summarise(low_shot({n: features[n] for n in (names if images else ['joint', *names])}, task, make_draws(task, FRACTIONS), name, BASELINES[name], resamples=0))
    return scores.pivot(index='input', columns='fraction', values='auroc').rename(columns=lambda f: f'auroc_{f:g}').reset_index().assign(objective=name, seed=0, epochs=0.)


@cli
def main(argv=None):
    "Train the arms, choose their rates, read them, write the table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path, help='folder of the cohort and the runs')
    p.add_argument('--images', action='store_true', help='radiographs of IU and NIH instead of synthetic patients')
    p.add_argument('--objectives', nargs='*', default=[o for o in ARMS if o not in ALONE], help=f'some of {", ".join(ARMS)} (default: all but the arm of images alone)')
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1])
    p.add_argument('--epochs', type=float, default=12)
    p.add_argument('--patients', type=int, default=1000, help='synthetic ones')
    p.add_argument('--one', choices=ARMS, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if unknown := [o for o in a.objectives if o not in ARMS]: raise InputError(f'no objective {unknown[0]!r}: there is {", ".join(ARMS)}')
    a.out.mkdir(parents=True, exist_ok=True)
    cohort, name = open_cohort(a.out, a.images, a.patients), 'rivals_images' if a.images else 'rivals'
    if a.one: return five_steps(a.one, cohort, a.images)
    path = a.out/f'{name}.csv'
    done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=['objective', 'seed', 'epochs'])
    wanted = [o for o in a.objectives if o not in (TOGETHER if a.images else ALONE)]
    for arm in wanted:
        have = {tuple(r) for r in done[['objective', 'seed', 'epochs']].itertuples(index=False)}
        if all((arm, s, a.epochs) in have for s in a.seeds): continue
        if arm in BASELINES:
            if not (done.objective == arm).any(): done = pd.concat([done, of_baseline(arm, cohort, a.images)], ignore_index=True)
            done.round(4).to_csv(path, index=False)
            continue
        rate = RATES[0]
        if arm != 'random':
            by_rate = {r: on_validation(trained(a.out, cohort, arm, a.images, r, a.seeds[0], a.epochs)[0], cohort) for r in RATES}
            rate = max(by_rate, key=by_rate.get)
            print(arm, 'validation AUROC by learning rate:', {f'{r:g}': round(v, 4) for r, v in by_rate.items()}, flush=True)
        for seed in a.seeds:
            if (arm, seed, a.epochs) in have: continue
            model, seconds = trained(a.out, cohort, arm, a.images, rate, seed, a.epochs)
            rows = on_test(model, cohort).assign(objective=arm, seed=seed, lr=rate, epochs=a.epochs, seconds_a_step=seconds)
            done = pd.concat([done, rows], ignore_index=True) if len(done) else rows
            done.round(4).to_csv(path, index=False)
            print(arm, seed, rows.set_index('input').filter(like='auroc').round(3).to_dict('index'), flush=True)
    used = {arm: memory_of(arm, cohort, a.images) for arm in done.objective.unique() if arm not in ('random', *BASELINES)}
    done['memory_gb'] = done.objective.map(used)
    order = ['objective', 'seed', 'input']
    done[order + [c for c in done if c not in order]].round(4).to_csv(RESULTS/f'{name}.csv', index=False)
    print('wrote', RESULTS/f'{name}.csv', flush=True)


if __name__ == '__main__': main()
