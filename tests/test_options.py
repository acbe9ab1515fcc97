"No option is read and ignored: whatever key of a config is changed, something that is computed or written changes."
import io, json, tempfile, typing
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

import mmsn.evaluate.evaluation as evaluation
import mmsn.loop as training
from mmsn.evaluate import beside
from mmsn.evaluate.networks import supervised
from mmsn.evaluate.task import Task, make_draws
from mmsn.train import train as run_training
from mmsn.checkpoint import latest
from mmsn.dials import DRAWING, OBJECTIVES, Objectives
from mmsn.options import MODALITIES, Config, InputError
from mmsn.config import build, check, check_single, load_config, presets, to_dict
from mmsn.data.writer import CohortWriter
from mmsn.model import MMSN
from mmsn.testing import toy_cohort, toy_config
from mmsn.schedules import schedule, sharpening, steps_per_epoch, total_steps

HOURS, SIZE = 24, 32
ENCODING = [p for p in presets() if load_config(p).objective not in DRAWING]   # what the others can be told is proven in test_generate
SERIES = {name: ['Height', 'Weight', 'rate', 'pressure'] for name in ('ehr', 'vitals', 'labs')}   # the presets ignore two of them


def make_cohort(folder, n=96, seed=0):
    "Patients with everything that any preset asks for; a third of them lack one modality."
    rng, i = np.random.default_rng(seed), np.arange(n)
    samples = pd.DataFrame(dict(sample_id=i, subject_id=i, split=np.array(['train', 'train', 'val', 'test'])[i % 4], cxr_index=np.where(i % 9, i, -1), facts_index=i))
    samples['odd'], samples['late'] = (i // 4) % 2*1., (i // 8) % 2*1.
    with CohortWriter(folder, 'options', ['odd', 'late']) as writer:
        writer.add_images('cxr', SIZE, SIZE).append(rng.integers(0, 256, (n, SIZE, SIZE)).astype(np.uint8))
        writer.add_tabular('facts', pd.DataFrame(rng.normal(size=(n, 3)), columns=['age', 'sex', 'height']))
        for name, names in SERIES.items():
            k = len(names)
            channels = [dict(name=c, kind='continuous', columns=[j, j + 1], mask=k + j, unit='', normal=0., low=-9., high=9., categories=None) for j, c in enumerate(names)]
            lengths = np.where(i % 9 == 4, 0, rng.integers(HOURS//2, HOURS + 1, n)) if name == 'ehr' else np.full(n, HOURS)
            rows = lengths.sum()
            writer.add_timeseries(name, channels, names + [f'{c} seen' for c in names]).append(np.hstack([rng.normal(size=(rows, k)), np.ones((rows, k))]).astype(np.float32))
            samples[f'{name}_start'], samples[f'{name}_length'] = np.cumsum(lengths) - lengths, lengths
        return writer.close(samples)


@pytest.fixture(scope='module')
def cohorts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('options')
    return make_cohort(folder/'one'), make_cohort(folder/'other', seed=1)


# Every preset, made so small that a step takes milliseconds; and one config that has all kinds of modality.
SMALL = dict(image={'encoder.dim': 16, 'encoder.depth': 2, 'encoder.heads': 2, 'encoder.patch': 8, 'views.random_size': 32, 'views.focal_size': 16, 'views.random': 1, 'views.focal': 2},
             timeseries={'encoder.hidden': 8, 'encoder.dim': 8, 'views.random': 1, 'views.focal': 2}, tabular={'encoder.hidden': 4, 'encoder.dim': 4})
REST = {'head.hidden': 12, 'head.output': 8, 'loss.prototypes': 6, 'loss.weight': 1., 'optim.batch_size': 8, 'optim.epochs': 1, 'optim.warmup_epochs': .5,
        'train.log_every': 1, 'train.probe_every': 0, 'train.threads': 1, 'train.mixed_precision': 'no', 'data.workers': 0, 'evaluate.draws': 2, 'evaluate.bootstrap': 5, 'evaluate.fractions': [.5, 1.],
        'evaluate.scratch_epochs': 1}
ALL = dict(name='all', modalities=dict(cxr=dict(kind='image'), ehr=dict(kind='timeseries'), facts=dict(kind='tabular')))


@lru_cache
def whole(preset):
    "A small config as JSON."
    tree = to_dict(build(Config, ALL) if preset == 'all' else load_config(preset))
    for name, m in tree['modalities'].items():
        for key, value in SMALL[m['kind']].items(): put(tree, f'modalities.{name}.{key}', value)
    for key, value in REST.items(): put(tree, key, value)
    if len(tree['modalities']) > 1: put(tree, 'fusion.dim', 12)
    return json.dumps(tree)


def put(tree, path, value):
    *parts, last = path.split('.')
    for p in parts: tree = tree[p]
    assert last in tree, path
    tree[last] = value


def config_of(preset, changes=()):
    "The small config of a preset with changed keys, read as strictly as any config."
    tree = json.loads(whole(preset))
    for path, value in dict(changes).items(): put(tree, path, value)
    return check_single(check(build(Config, tree)))


def keys_of(preset):
    "Dotted path -> value, of every key."
    def walk(part, where):
        for k, v in part.items():
            if isinstance(v, dict): yield from walk(v, f'{where}{k}.')
            else: yield where + k, v
    return dict(walk(json.loads(whole(preset)), ''))


def general(path, kinds):
    "The key of any modality of that kind: modalities.cxr.weight -> image.weight."
    parts = path.split('.')
    return '.'.join([kinds[parts[1]], *parts[2:]]) if parts[0] == 'modalities' else path


def kinds_of(preset): return {name: m['kind'] for name, m in json.loads(whole(preset))['modalities'].items()}


# What a key is changed to. `only(value, …)` matters where other keys hold (the heads of a transformer, in a transformer; a key that begins with a dot is
# of the same modality), `everywhere(value)` is changed in all modalities together, and `refused(value)` should not be accepted.
def only(value, **context): return 'only', value, {k.replace('__', '.'): v for k, v in context.items()}
def everywhere(value): return 'everywhere', value, {}
def refused(value): return 'refused', value, {}


PROTOTYPES = only(5, fusion__space='own', fusion__aim=['own'])
IMAGE = dict(
    kind=refused('timeseries'), weight=2., drop=.3, alone=only(False, fusion__aim=['own'], fusion__space='own'), prototypes=PROTOTYPES,
    encoder=dict(name=refused('resnet'), size='tiny', channels=3, dim=24, depth=1, heads=4, patch=4, mlp_ratio=2., stem=('linear', 'conv'), pool=('cls', 'mean'),
                 mask_stem=only(('not',), __encoder__stem='conv', __views__patch_drop=.4, __views__heavy=0),
                 positions=('learned', 'sincos'), init=('trunc', 'fan_in'), drop_path=.9),
    views=dict(random=everywhere(2), focal=everywhere(3), random_size=40, focal_size=24, random_scale=[.3, .4], focal_scale=[.9, 1.], ratio=[1., 1.], patch_drop=only(.5, __views__heavy=0, loss__tokens__weight=0.), shared_mask=only(True, __views__patch_drop=.4, __views__heavy=0),
               heavy=only((0, 1), loss__tokens__weight=0.), heavy_drop=only([.6, .7], __views__heavy=1),
               flip=1., rotation=45., jitter=.1, brightness=.9, contrast=.9, blur=only(1., __views__random_size=96), noise=.3))
MASKS = dict(time=.5, channel=.5, cell=.6, drop_start=.5)
TIMESERIES = dict(
    kind=refused('tabular'), weight=2., drop=.3, alone=only(False, fusion__aim=['own'], fusion__space='own'), prototypes=PROTOTYPES, ignore=['rate'],
    encoder=dict(name='gru', hidden=12, layers=2, heads=only(2, __encoder__name='transformer', loss__cells__weight=0.), dropout=only(.5, __encoder__layers=2), bidirectional=True, pool=(['last'], ['mean']),
                 inputs=(['since'], []), bin=only(2, __encoder__name='axial', __encoder__pool=['last'], __encoder__inputs=[], loss__cells__weight=0.), dim=12),
    views=dict(preset='rotation', random=everywhere(2), focal=everywhere(3), random_masks=MASKS, focal_masks=MASKS, focal_window=[.8, .9], noise=.7, shift=.7, downsample=[2], reverse=1.))
TABULAR = dict(kind=refused('image'), alone=True, weight=only(2., __alone=True), drop=only(.3, __alone=True), anchor_only=True,
               prototypes=only(5, __alone=True, fusion__space='own', fusion__aim=['own']), encoder=dict(hidden=6, dim=6))
OTHER = dict(
    image=IMAGE, timeseries=TIMESERIES, tabular=TABULAR,
    fusion=dict(dim=20, drop=.3, aim=(['own'], ['joint']), space=only(('own', 'shared'), fusion__aim=['own']), weight=2.,
                contrast=dict(weight=.5, loss=only(('infonce', 'sigmoid'), fusion__contrast__weight=.5), dim=only(9, fusion__contrast__weight=.5), depth=only(1, fusion__contrast__weight=.5))),
    head=dict(hidden=20, depth=1, output=12, norm=('layer', 'none'), norm_input=('not',), predict=1),
    loss=dict(prototypes=9, freeze_prototypes=True, temperature=.3, sharpen=.6, final_sharpen=.9, label_smoothing=.3, sinkhorn_iterations=0, me_max_weight=4., entropy_weight=1., prior=.5, weight=.5,
              cells=dict(weight=.5, kind=only(['value'], loss__cells__weight=1.), horizon=only(3, loss__cells__weight=1.), presence=only(.1, loss__cells__weight=1.), summary=only(.1, loss__cells__weight=1., loss__cells__kind=['summary']))),
    optim=dict(optimizer='radam', batch_size=6, accumulation=2, epochs=2., warmup_epochs=.9, start_lr=1e-5, lr=.01, final_lr=1e-4, weight_decay=.2, final_weight_decay=.7, clip=1e-3,
               momentum=.5, final_momentum=.7, schedule_stretch=2.))


HEAVY = dict(modalities__cxr__views__heavy=1)   # an image that hides patches: without one, a term on hidden patches is refused
OTHER['loss']['tokens'] = dict(weight=only((1., .5), **HEAVY), kind=only('pixels', loss__tokens__weight=1., **HEAVY))


def change_of(preset, path, value):
    "(context, change, whether it should be refused) for one key of a preset."
    kinds, parts = kinds_of(preset), path.split('.')
    new, context, what = OTHER, {}, ''
    for part in general(path, kinds).split('.'): new = new[part]
    if isinstance(new, tuple) and new[0] in ('only', 'everywhere', 'refused'): what, new, context = new
    if new == ('not',): new = not value
    if isinstance(new, tuple): new = next(w for w in new if w != value)
    if len(kinds) == 1 and (parts[0] == 'fusion' or parts[-1] in ('alone', 'weight', 'drop', 'prototypes') and parts[0] == 'modalities'): what, context = 'refused', {}     # there is nothing to fuse
    if path.startswith('loss.cells') and 'timeseries' not in kinds.values(): what, new, context = 'refused', dict(weight=1., kind=['nothing'], horizon=0, presence=-1., summary=-1.)[parts[-1]], {}
    if path.startswith('loss.tokens') and 'image' not in kinds.values(): what, new, context = 'refused', dict(weight=1., kind='nothing')[parts[-1]], {}
    assert what or new != value, f'choose another value for {path}: {preset} has {value!r} already'
    changes = {f'modalities.{n}.views.{parts[-1]}': new for n, k in kinds.items() if k != 'tabular'} if what == 'everywhere' else {path: new}
    return {'.'.join(parts[:2]) + k if k[0] == '.' else k: v for k, v in context.items()}, changes, what == 'refused'


def tensors(x):
    "Everything in nested containers, as a flat list of tensors."
    if is_dataclass(x): return tensors([getattr(x, f.name) for f in fields(x)])
    if isinstance(x, dict): return [t for v in x.values() for t in tensors(v)]
    if isinstance(x, (list, tuple)): return [t for v in x for t in tensors(v)]
    return [] if x is None else [torch.as_tensor(x).detach()]


def differ(a, b):
    a, b = tensors(a), tensors(b)
    return len(a) != len(b) or any(x.shape != y.shape or not torch.equal(x.double().nan_to_num(-1e30), y.double().nan_to_num(-1e30)) for x, y in zip(a, b))


STAGES = ['model', 'views', 'loss', 'schedule']


class Computed:
    "What a config leads to, step by step, each computed when it is asked for."
    def __init__(self, config, cohort): self.config, self.cohort, self.done = config, cohort, {}

    def __getitem__(self, name):
        if name not in self.done: self.done[name] = getattr(self, name)()
        return self.done[name]

    def built(self): return MMSN.from_config(self.config, self.cohort)
    def seen(self):
        rows = training.training_rows(self.cohort, self.config)[:8]
        return self['built'].views(self.cohort.batch(rows, list(self.config.modalities)), self.config.train.seed, 0)

    def model(self):      # copies: a forward moves the statistics of batch norms
        return [{k: v.clone() for k, v in self['built'].state_dict().items()}, [p.requires_grad for p in self['built'].parameters()]]
    def views(self): return [self['seen'].targets, self['seen'].anchors]
    def loss(self):
        torch.manual_seed(0)
        out = self['built'](self['seen'])
        out.loss.backward()
        return [out.loss, out.metrics, [p.grad for p in self['built'].parameters()]]

    def schedule(self):
        o, n = self.config.optim, steps_per_epoch(len(training.training_rows(self.cohort, self.config)), self.config.optim)
        total = total_steps(o, n)
        return [[*schedule(o, s, n), sharpening(self.config.loss, s, total)] for s in range(total)]

    def run(self):
        "Weights and metrics of a whole run."
        with tempfile.TemporaryDirectory() as tmp: return train(self.config, Path(tmp)/'run', self.cohort)


def train(config, folder, cohort):
    "Train in `folder`, in silence; returns the weights."
    with redirect_stdout(io.StringIO()): run = run_training(at(config, run=str(folder)), cohort)
    return latest(run/'checkpoints')[0]


def at(config, **values): return replace(config, train=replace(config.train, **values))


@pytest.mark.parametrize('preset', [*ENCODING, 'all'])
def test_keys_of_model_views_loss_and_schedule(preset, cohorts):
    "Each key of a preset changes weights, views, the loss or the schedule, or is refused."
    before, silent = {'{}': Computed(config_of(preset), cohorts[0])}, []
    again = Computed(config_of(preset), cohorts[0])
    for computed in (before['{}'], again): [computed[stage] for stage in STAGES]
    assert not any(differ(before['{}'][stage], again[stage]) for stage in STAGES + ['run']*(preset == 'demo')), 'the same config twice should give the same'
    assert not differ(before['{}']['model'], Computed(config_of(preset), cohorts[0])['model']), 'what was computed should not change afterwards'
    for path, value in keys_of(preset).items():
        if path.split('.')[0] not in ('modalities', 'fusion', 'head', 'loss', 'optim'): continue
        context, changes, wrong = change_of(preset, path, value)
        if wrong:
            with pytest.raises(InputError): MMSN.from_config(config_of(preset, changes), cohorts[0])
            continue
        key = json.dumps(context)
        if key not in before: before[key] = Computed(config_of(preset, context), cohorts[0])
        a, b = before[key], Computed(config_of(preset, context | changes), cohorts[0])
        found = next((stage for stage in STAGES if differ(a[stage], b[stage])), None)
        if found is None or found == 'schedule' and preset == 'demo': found = 'run' if differ(a['run'], b['run']) else None
        if not found: silent.append(path)
    assert not silent, f'{preset}: these keys are read and ignored: {silent}'


# The keys that are not of the model: what each does, seen once.
ONCE = {}


def once(*keys):
    "Mark a function (tmp, cohorts, monkeypatch) as the proof for `keys`."
    def mark(f): ONCE.update({k: f for k in keys}); return f
    return mark


def trainer(tmp, cohort, **changes): return training.Trainer(config_of('demo', {'train.run': str(tmp)} | {k.replace('__', '.'): v for k, v in changes.items()}), cohort)


@once('name', 'train.run')
def names(tmp, cohorts, monkeypatch):
    with redirect_stdout(io.StringIO()) as said: run_training(config_of('demo', {'name': 'mine', 'train.run': str(tmp/'there'), 'optim.epochs': .2}), cohorts[0])
    assert said.getvalue().startswith('mine: ') and (tmp/'there'/'config.yaml').is_file()


@once('data.cohort', 'train.seed')
def other_data_and_chance(tmp, cohorts, monkeypatch):
    first, same, seed = (next(trainer(tmp/'order', cohorts[0], train__seed=s).batches())[1][0].data for s in (0, 0, 1))
    assert not differ(first, same) and differ(first, seed)                     # the order
    a, b = (MMSN.from_config(config_of('demo', {'train.seed': s}), cohorts[0]) for s in (0, 1))
    assert differ(a.state_dict(), b.state_dict())
    opened = training.Trainer(config_of('demo', {'data.cohort': str(cohorts[1].folder), 'train.run': str(tmp/'other')}))
    assert opened.cohort.hash == cohorts[1].hash != cohorts[0].hash


@once('data.samples', 'data.shuffle_pairs', 'data.workers')
def samples(tmp, cohorts, monkeypatch):
    assert len(trainer(tmp/'any', cohorts[0]).rows) > len(trainer(tmp/'paired', cohorts[0], data__samples='paired').rows)
    (_, [a]), (_, [b]) = (next(trainer(tmp/str(s), cohorts[0], data__shuffle_pairs=s, data__samples='paired').batches()) for s in (False, True))
    assert torch.equal(a.data['cxr'], b.data['cxr']) and differ(a.data['ehr'], b.data['ehr'])
    asked, real = {}, training.loader
    monkeypatch.setattr(training, 'loader', lambda *args, **kw: asked.update(kw) or real(*args, **kw | dict(workers=0)))
    next(trainer(tmp/'workers', cohorts[0], data__workers=1).batches())
    assert asked['workers'] == 1


@once('train.checkpoint_every', 'train.keep_last', 'train.log_every', 'train.resume', 'train.keep_every', 'train.keep_best')
def files(tmp, cohorts, monkeypatch):
    def run(name, **changes):
        train(config_of('demo', {'optim.epochs': .6} | {k.replace('__', '.'): v for k, v in changes.items()}), tmp/name, cohorts[0])      # 4 steps
        return [p.name for p in sorted((tmp/name/'checkpoints').iterdir()) if p.name.startswith('step')], len(pd.read_csv(tmp/name/'metrics.csv'))
    (last,), rows = run('plain')
    some, _ = run('every', train__checkpoint_every=1)
    three, _ = run('keep', train__checkpoint_every=1, train__keep_last=3)
    even, _ = run('multiples', train__checkpoint_every=1, train__keep_last=1, train__keep_every=2)
    best, _ = run('best', train__checkpoint_every=1, train__keep_last=1, train__keep_best='lr')                     # lowest at the first step
    assert (len(some), len(three), len(even), len(best), rows) == (2, 3, 2, 2, 4)
    assert run('log', train__log_every=3)[1] == 2
    with pytest.raises(InputError, match='already holds a run'): trainer(tmp/'plain', cohorts[0], train__resume='never')


# Dial of an objective -> what it is changed to; what else the objective needs of the small demo.
SIDE_BY_SIDE = {'fusion.dim': 0, 'fusion.contrast.weight': 0., 'fusion.contrast.loss': 'sigmoid'}
NEEDS = {'mae': SIDE_BY_SIDE | {'modalities.ehr.encoder.dim': 0, 'objectives.mae.dim': 16, 'objectives.mae.heads': 2, 'objectives.mae.depth': 1}, 'clip': SIDE_BY_SIDE, 'siglip': SIDE_BY_SIDE, 'dino': {'objectives.dino.outputs': 12}}
DIALS = {'simclr.temperature': .1, 'simsiam.bottleneck': 5, 'vicreg.invariance': 3., 'vicreg.variance': 3., 'vicreg.covariance': 3., 'mae.hidden': .5, 'mae.cells': .2, 'mae.dim': 24, 'mae.depth': 2, 'mae.heads': 4, 'mae.normalise': False,
         'dino.outputs': 20, 'dino.temperature': .3, 'dino.teacher_temperature': .08, 'dino.centre': .1, 'clip.dim': 7, 'clip.depth': 1, 'siglip.dim': 7, 'siglip.depth': 1}


@once('objective', *(f'objectives.{dial}' for dial in DIALS))
def objectives(tmp, cohorts, monkeypatch):
    "Each dial changes weights, views, the loss, or (the centre, which moves after a step) a whole run; and each objective another loss."
    base = {name: Computed(config_of('demo', {'objective': name} | NEEDS.get(name, {})), cohorts[0]) for name in ('msn', *(d.split('.')[0] for d in DIALS))}
    assert len({c['loss'][0].item() for c in base.values()}) == len(base) == 8
    for dial, value in DIALS.items():
        name = dial.split('.')[0]
        changed = Computed(config_of('demo', {'objective': name} | NEEDS.get(name, {}) | {f'objectives.{dial}': value}), cohorts[0])
        assert any(differ(base[name][stage], changed[stage]) for stage in (['run'] if dial == 'dino.centre' else STAGES)), dial
        with pytest.raises(InputError, match='no effect'): config_of('demo', {f'objectives.{dial}': value})


@once(*(f'objectives.{k}.{f.name}' for k in DRAWING for f in fields(Objectives.__dataclass_fields__[k].default_factory)))
def drawing(tmp, cohorts, monkeypatch):
    "Test_generate changes each of them; `vae` names a model, and is proven there too."
    from test_generate import DIALS
    assert all({*DIALS[k]} | {'vae'} >= {f.name for f in fields(Objectives.__dataclass_fields__[k].default_factory)} for k in DRAWING)


# Option of a text, or dial of an objective of images and texts -> what it is changed to.
TEXT = {'encoder.dim': 48, 'encoder.depth': 2, 'encoder.heads': 4, 'encoder.length': 6, 'encoder.pool': 'cls', 'views.random': 2, 'views.focal': 3, 'views.drop': .6, 'views.shuffle': 1.,
        'views.focal_span': [.8, .9], 'weight': 3., 'drop': .5, 'alone': False, 'prototypes': 5}
PAIRED = {'convirt.temperature': .5, 'convirt.weight': .3, 'convirt.hidden': 20, 'convirt.dim': 20, 'gloria.attention': 9., 'gloria.word': 9., 'gloria.pair': 3., 'gloria.layers': 1, 'gloria.dim': 20}


@once('text.kind', 'text.encoder.name', *(f'text.{key}' for key in TEXT), *(f'objectives.{dial}' for dial in PAIRED))
def texts(tmp, cohorts, monkeypatch):
    "Each changes weights, views or the loss; a language model that is not there is named."
    from test_text import IMAGE, ONE
    toy = toy_cohort(tmp/'toy', n=60, reports=True)
    def computed(objective='msn', report=None, cxr=None, **dials):
        if objective == 'msn': return Computed(toy_config('cxr', 'report', report=report or {}, cxr=cxr or {}, fusion=dict(dim=0, space='own', aim=['own', 'joint'])), toy)
        return Computed(toy_config('cxr', 'report', cxr=IMAGE, report=dict(kind='text', views=ONE, encoder=dict(dim=32, depth=2, heads=2, length=24)), fusion=dict(dim=0), objective=objective, objectives={objective: SMALL_PAIRS[objective] | dials}), toy)
    def nested(tree, key, value):
        head, _, rest = key.partition('.')
        return tree | {head: nested(tree.get(head, {}), rest, value) if rest else value}
    start = to_dict(toy_config('cxr', 'report'))['modalities']
    for key, value in TEXT.items():
        other = {}
        if key in ('views.random', 'views.focal'): other = nested(start['cxr'], key, value)           # as many views of both
        if key == 'views.shuffle': base = computed(report=nested(start['report'], key, 0.))
        else: base = computed()
        changed = computed(report=nested(start['report'], key, value), cxr=other)
        assert any(differ(base[stage], changed[stage]) for stage in ('model', 'loss')), key
    with pytest.raises(InputError): computed(report=nested(start['report'], 'encoder.name', f'hf:{tmp}/nowhere'))['built']
    with pytest.raises(InputError): computed(report=start['report'] | dict(kind='image'))
    for dial, value in PAIRED.items():
        name, key = dial.split('.')
        assert any(differ(computed(name)[stage], computed(name, **{key: value})[stage]) for stage in ('model', 'loss')), dial


SMALL_PAIRS = dict(convirt=dict(hidden=16, dim=16), gloria=dict(dim=16, layers=2))


@once('train.probe_every')
def probed(tmp, cohorts, monkeypatch):
    train(config_of('demo', {'train.probe_every': 2}), tmp/'probed', cohorts[0])
    assert pd.read_csv(tmp/'probed'/'metrics.csv')['probe/auroc'].notna().any()


@once('train.init_from')
def weights(tmp, cohorts, monkeypatch):
    train(config_of('demo'), tmp/'one', cohorts[0])
    a, b = (trainer(tmp/name, cohorts[0], train__init_from=source).model.state_dict() for name, source in (('two', ''), ('three', str(tmp/'one'/'encoder'))))
    assert differ(a, b)


@once('train.threads', 'train.mixed_precision', 'train.tracker')
def hardware(tmp, cohorts, monkeypatch):
    before = torch.get_num_threads()
    try: trainer(tmp/'threads', cohorts[0], train__threads=2); assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
    reset = lambda: AcceleratorState._reset_state(True)      # one process, one precision, unless told otherwise
    weights = []
    for p in ('no', 'bf16'):
        reset()
        weights.append(train(config_of('demo', {'train.mixed_precision': p, 'optim.epochs': .2}), tmp/p, cohorts[0])['model'])
    exact, half = weights
    reset()
    assert differ(exact, half) and all(v.dtype == exact[k].dtype for k, v in half.items())
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match='needs a GPU'): trainer(tmp/'fp16', cohorts[0], train__mixed_precision='fp16')
        reset()
    with pytest.raises(InputError, match='tensorboard'): trainer(tmp/'tracker', cohorts[0], train__tracker='tensorbord')


@once('train.activation_checkpointing', 'train.compile', 'train.profile')
def speed(tmp, cohorts, monkeypatch):
    "That they compute the same is shown in test_launch.py; that the loop reads them shows where they are refused, since an LSTM has no blocks to wrap."
    for key in ('activation_checkpointing', 'compile'):
        with pytest.raises(InputError, match=f'train.{key}'): run_training(config_of('ehr_lstm', {f'train.{key}': True, 'train.run': str(tmp/key)}), cohorts[0])
    train(config_of('ehr_lstm', {'train.profile': True}), tmp/'profile', cohorts[0])
    assert list((tmp/'profile').rglob('trace.json'))


@once('evaluate.scratch_epochs', 'evaluate.scratch_lr')
def scratch(tmp, cohorts, monkeypatch):
    task = Task.of(cohorts[0])
    draws = make_draws(task, [1.], 1)
    def scores(**change): return supervised(config_of('ehr_lstm', {f'evaluate.{k}': v for k, v in change.items()}), cohorts[0], task, draws, ['ehr'], resamples=0, least=1).value
    base = scores()
    assert not base.equals(scores(scratch_epochs=40)) and not base.equals(scores(scratch_lr=.3))


@once('evaluate.labels', 'evaluate.fractions', 'evaluate.shots', 'evaluate.draws', 'evaluate.bootstrap', 'evaluate.baselines', 'evaluate.facts', 'evaluate.select', 'evaluate.masked', 'evaluate.probe_masked', 'evaluate.seed',
      'evaluate.probe', 'evaluate.probe_lrs', 'evaluate.probe_epochs', 'evaluate.protocols', 'evaluate.neighbours', 'evaluate.corruptions',
      'evaluate.map_labels', 'evaluate.map_samples', 'evaluate.pictures', 'evaluate.cache', 'evaluate.finetune_epochs', 'evaluate.finetune_lr', 'evaluate.finetune_decay')
def evaluated(tmp, cohorts, monkeypatch):
    for name in ('write_report', 'write_pictures'): monkeypatch.setattr(evaluation, name, mock.MagicMock())
    monkeypatch.setattr(beside, 'supervised', lambda *args, **kw: pd.DataFrame())
    train(config_of('demo', {'optim.epochs': .2, 'data.cohort': str(cohorts[0].folder)}), tmp/'run', cohorts[0])
    def tables(name, *overrides, protocols='low_shot,knn,robustness'):
        asked = ['evaluate.baselines=false', 'evaluate.masked=[0.0]', f'evaluate.protocols=[{protocols}]', 'evaluate.corruptions=[patches]', 'evaluate.cache=false', 'evaluate.map_samples=12', *overrides]
        with redirect_stdout(io.StringIO()): evaluation.evaluate(tmp/'run', asked, tmp/name)
        return {p.name: p.read_text() for p in (tmp/name).glob('*.csv')}
    whole = tables('whole')
    assert tables('same') == whole
    # each key in the protocol that reads it: the others would compute the same again
    changes = dict(low_shot=['fractions=[1.0]', 'shots=[1]', 'draws=1', 'bootstrap=9', 'baselines=true', 'select=validation', 'seed=1', 'protocols=[knn]'],
                   knn=['labels=[odd]', 'facts=false', 'neighbours=3', 'map_labels=[odd]', 'map_samples=3'], robustness=['masked=[0.0,0.6]', 'probe_masked=true', 'corruptions=[contrast]'])
    for protocol, some in changes.items():
        base = tables(protocol, protocols=protocol)
        for change in some: assert tables(change.split('=')[0], f'evaluate.{change}', protocols=protocol) != base, change
    sgd = tables('sgd', 'evaluate.probe=sgd', 'evaluate.probe_lrs=[1.0]', protocols='low_shot')
    assert sgd['scores.csv'] != whole['scores.csv']
    for change in ('probe_lrs=[30.0]', 'probe_epochs=150'): assert tables(change.split('=')[0], 'evaluate.probe=sgd', 'evaluate.probe_lrs=[1.0]', f'evaluate.{change}', protocols='low_shot') != sgd, change
    some = ['evaluate.fractions=[1.0]', 'evaluate.draws=1', 'evaluate.finetune_epochs=15']
    tuned = [tables(f'tuned{i}', *some, *([f'evaluate.finetune_{c}'] if c else []), protocols='finetune')['scores.csv'] for i, c in enumerate(('', 'epochs=50', 'lr=0.1', 'decay=0.2'))]
    assert len(set(tuned)) == len(tuned)
    asked = evaluation.write_pictures.call_count
    assert asked and not (tmp/'run'/'features').exists()
    assert tables('shy', 'evaluate.pictures=false', 'evaluate.cache=true') == whole and evaluation.write_pictures.call_count == asked and (tmp/'run'/'features').is_dir()


@pytest.mark.parametrize('proof', dict.fromkeys(ONCE.values()), ids=lambda f: f.__name__)
def test_other_keys(proof, tmp_path, cohorts, monkeypatch): proof(tmp_path, cohorts, monkeypatch)


def fields_of(cls, where=''):
    "Every key that a config class can have."
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]): yield from fields_of(hints[f.name], f'{where}{f.name}.')
        elif f.name != 'modalities': yield where + f.name


def test_every_field_is_covered():
    "A new option comes with its proof, or fails here."
    have = {*fields_of(Config), *(key for kind, cls in MODALITIES.items() for key in fields_of(cls, f'{kind}.'))}
    tested = {general(path, kinds_of(p)) for p in [*ENCODING, 'all'] for path in keys_of(p) if path.split('.')[0] in ('modalities', 'fusion', 'head', 'loss', 'optim')}
    missing = sorted(have - tested - set(ONCE))
    assert not missing, f'no proof that these keys do anything: {missing}'
