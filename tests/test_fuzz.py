"""Two hundred damaged files of each kind: flipped bits, cuts, and files sealed anew around values that cannot be. Each is refused in one line (InputError)
or read as what it was; nothing else is raised and nothing is read as something else. A seed makes the damage, so that a failure can be looked at again."""
import copy, json, os, random, shutil, struct, time, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmsn.checkpoint import _sealed, checkpoints, latest, load_checkpoint, optimizer_tensors, read_state
from mmsn.data.cohort import Cohort, _json
from mmsn.evaluate.features import _read_cached, extract_features
from mmsn.evaluate.predictions import Predictions, open_predictions, save_predictions
from mmsn.files import seal, sha256, write_sealed
from mmsn.loop import Trainer
from mmsn.model import MMSN
from mmsn.options import InputError
from mmsn.run import Metrics, open_run, read_rows, read_run, run_config, subjects_of_run
from mmsn.testing import toy_cohort, toy_config

N = 200                                                          # of each kind
COUNTS = {}
# values that some entry or other cannot be; `deep` is replaced by nested brackets in the text of a file
STRANGE = [None, True, -1, 0, 0.5, 1e308, -1e39, 2**70, 10**12, '', 'x', 'nan', '../../etc/passwd', '/etc/passwd', 'a\0b', '\x1b[2J', 'x'*10_000, [], [[]], {}, {'a': 1},
           [None], [1e39], ['a', 'a'], 'deep']


def flipped(data, rng):
    "`data` with one bit flipped."
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def cut(data, rng):
    "`data` cut short, or with something after its end, or with a third of it zero."
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0: return data[:at] + bytes(len(data)//3) + data[at + len(data)//3:]
    return data + bytes(rng.randrange(1, 9)) if kind == 1 else data[:at]


def leaves(tree, path=()):
    "Paths of every value in nested dictionaries and lists, branches included."
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, (dict, list)): yield from leaves(value, (*path, key))


def with_value(tree, path, value):
    "A copy of `tree` with another value at `path`; with `del` without it."
    tree = copy.deepcopy(tree)
    part = tree
    for key in path[:-1]: part = part[key]
    if value == 'del': del part[path[-1]]
    else: part[path[-1]] = value
    return tree


def strange(tree, rng):
    "A copy of `tree` with one value that is strange, or gone."
    path = rng.choice(list(leaves(tree)))
    return path, with_value(tree, path, rng.choice([*STRANGE, 'del']))


def text_of(tree):
    "JSON in which the word `deep` is a hundred thousand brackets."
    return json.dumps(tree).replace('"deep"', '['*100_000)


def judge(kind, read, same, what):
    "Read a damaged file and count what came of it: refused, or equal."
    count = COUNTS.setdefault(kind, Counter(tried=0, refused=0, equal=0))
    count['tried'] += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            value = read()
    except InputError as e:
        line = ' '.join(str(e).split())
        assert line and len(line) < 1200 and 'Traceback' not in line, line
        count['refused'] += 1
        return
    except Exception as e: raise AssertionError(f'{kind}, {what}: {type(e).__name__}: {e}') from e
    assert same(value), f'{kind}, {what}: read as something else'
    count['equal'] += 1


def damages(path, rng, n=N):
    "Write `n` damaged versions of a file, one after the other, and then the whole one again; yields what was done."
    data = path.read_bytes()
    for i in range(n):
        bad = (flipped, cut)[i % 2](data, rng)
        if bad == data: bad = data[:-1]
        path.write_bytes(bad)
        yield f'damage {i} of {path.name}'
    path.write_bytes(data)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A cohort, a run of a few steps on it, and what an evaluation leaves, all small."
    home = tmp_path_factory.mktemp('fuzz')
    cohort = toy_cohort(home/'cohort', n=60, hours=6, size=8)
    cxr = dict(encoder=dict(dim=8, depth=1, heads=2, patch=4, pool='mean', positions='sincos', init='fan_in'), views=dict(random=1, focal=1, random_size=8, focal_size=4, patch_drop=.25))
    ehr = dict(encoder=dict(hidden=8, dim=8, pool='mean'), views=dict(random=1, focal=1, focal_window=[.5, .8]))
    config = toy_config(cxr=cxr, ehr=ehr, head=dict(hidden=8, depth=1, output=4), loss=dict(prototypes=4), fusion=dict(dim=8), optim=dict(batch_size=16, epochs=2),
                        data=dict(cohort=str(home/'cohort')), train=dict(run=str(home/'run'), threads=1, log_every=1, checkpoint_every=2, keep_last=9))
    Trainer(config, cohort).fit()
    return home, cohort, config


def contents(cohort):
    "Everything that a training would read, comparable."
    cohort.check_unchanged()
    return [cohort.hash, cohort.name, cohort.labels, json.dumps(cohort.meta['modalities']), cohort.samples.to_csv(), *(cohort.array(n).tobytes() for n in cohort.modalities)]


def test_cohort_json(home):
    home, cohort, _ = home
    rng, path, whole = random.Random(1), home/'cohort'/'cohort.json', contents(cohort)
    read = lambda: contents(Cohort.open(home/'cohort'))
    for what in damages(path, rng, N//2): judge('cohort.json', read, whole.__eq__, what)
    meta, text = json.loads(path.read_text()), path.read_text()
    free = ('provenance', 'name', 'labels', 'label_groups')          # another name is another cohort; what cannot be a name is refused
    for i in range(N//2):
        where, bad = strange({k: v for k, v in meta.items() if k != 'seal'}, rng)
        path.write_text(text_of(seal(bad)))
        # sealed anew, a possible value is by definition another cohort: it must open as exactly what the file says
        said = json.loads(path.read_text()) if 'deep' not in json.dumps(bad) else None
        judge('cohort.json', lambda: (Cohort.open(home/'cohort'), read())[0].meta, lambda m: said is not None and m == said, f'{where} = {str(bad)[:0]}')
    path.write_text(text)
    assert read() == whole


@pytest.mark.parametrize('name', ['cxr', 'ehr', 'facts', 'labs'])
def test_arrays(home, name):
    home, cohort, _ = home
    rng, path, whole = random.Random(name), home/'cohort'/f'{name}.npy', contents(cohort)
    read = lambda: contents(Cohort.open(home/'cohort'))
    for what in damages(path, rng, N//4): judge('arrays', read, whole.__eq__, what)
    # sealed anew: another type, another shape, numbers that are none
    data, array, meta_path = path.read_bytes(), np.load(path), home/'cohort'/'cohort.json'
    text = meta_path.read_text()
    with np.errstate(invalid='ignore'): swaps = [array.astype(t) for t in ('float64', 'int32', 'uint16', 'float16', '>f4', 'S4')] + [array[:, :-1], array[..., None], array.T, np.asfortranarray(array), array[:1], array.ravel()]
    if array.dtype == np.float32:
        for bad in (np.inf, -np.inf, *([np.nan] if name != 'facts' else [])):
            other = array.copy(); other[rng.randrange(len(array)), 0] = bad
            swaps.append(other)
    for i, other in enumerate(swaps):
        np.save(path, other)
        meta = json.loads(text)
        meta['files'][path.name] = dict(bytes=path.stat().st_size, sha256=sha256(path))
        meta_path.write_text(_json(seal(meta)))
        judge('arrays', read, lambda _: False, f'{name} as {other.dtype} {other.shape}, {i}')
    path.write_bytes(data); meta_path.write_text(text)
    assert read() == whole


def test_samples(home):
    home, cohort, _ = home
    rng, path, whole = random.Random(3), home/'cohort'/'samples.parquet', contents(cohort)
    read = lambda: contents(Cohort.open(home/'cohort'))
    for what in damages(path, rng, N//2): judge('samples.parquet', read, whole.__eq__, what)
    meta_path = home/'cohort'/'cohort.json'
    data, text, table = path.read_bytes(), meta_path.read_text(), pd.read_parquet(path)

    def resealed():
        meta = json.loads(text)
        meta['files'][path.name] = dict(bytes=path.stat().st_size, sha256=sha256(path))
        meta_path.write_text(_json(seal(meta)))
    for i in range(N//2):
        # sealed anew: half are damaged bytes that parquet's reader has to refuse, half are tables that no cohort has
        if i % 2: path.write_bytes(flipped(data[:8], rng) + data[8:] if i % 4 == 1 else cut(data[:-8], rng)[:len(data)//2] + data[-8:])
        else:
            other, column = table.copy(), rng.choice(list(table))
            kind = i//2 % 6
            if kind == 0: other = other.drop(columns=column)
            elif kind == 1: column = rng.choice(['cxr_index', 'ehr_start', 'ehr_length', 'facts_index']); other[column] = 10**rng.randrange(4, 17)
            elif kind == 2: column = rng.choice(['sample_id', 'split']); other[column] = rng.choice([7, 'train', None, -3.5])
            elif kind == 3: column = rng.choice(['cxr_index', 'ehr_length', 'sample_id']); other[column] = [rng.choice([None, 'x', [1], -7])]*len(other)
            elif kind == 4: other = other.iloc[:0]
            else: column = rng.choice(['heart', 'lung']); other[column] = rng.choice(['yes', 3., -1., np.inf])
            other.to_parquet(path, index=False)
        if path.read_bytes() == data: continue
        resealed()
        judge('samples.parquet', read, lambda v: v[4] == whole[4] and v[5:] == whole[5:], f'{i}: {column if i % 2 == 0 else "bytes"}')
    path.write_bytes(data); meta_path.write_text(text)
    assert read() == whole


def state_of(tensors):
    return {f'{g}/{k}': t.numpy().tobytes() for g, part in tensors.items() for k, t in part.items()}


TRAINERS = []

def resumed(config, cohort):
    "Step, weights and state of the optimiser that a resuming run starts from, put back into one trainer again and again."
    if not TRAINERS: TRAINERS.append(Trainer(config, cohort))
    trainer = TRAINERS[0]
    inner, optimizer = trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer.optimizer
    optimizer.state.clear()
    step = trainer._restore(inner, optimizer, *latest(Path(config.train.run)/'checkpoints', lambda line: None))
    return step, {k: v.numpy().tobytes() for k, v in inner.state_dict().items()}, state_of(dict(o=optimizer_tensors(optimizer, trainer.names)))


def newest(home): return checkpoints(home/'run'/'checkpoints')[-1]


def test_manifest(home):
    "Read one step: another value than it had is refused, whether its hash is right or not."
    home, cohort, config = home
    rng, folder = random.Random(4), newest(home)
    path, state = folder/'state.json', read_state(folder)
    for what in damages(path, rng, N//2): judge('checkpoint manifest', lambda: load_checkpoint(folder)[1], state.__eq__, what)
    text, body = path.read_text(), {k: v for k, v in state.items() if k != 'sha256'}
    whole = resumed(config, cohort)
    for i in range(N//2):
        where, bad = strange(body, rng)
        path.write_text(_sealed(bad) if 'deep' not in json.dumps(bad) else text_of(bad))
        # step and files have one meaning here; the rest, if it is possible at all, is what the file says
        said = json.loads(path.read_text()) if 'deep' not in json.dumps(bad) else None
        judge('checkpoint manifest', lambda: load_checkpoint(folder)[1], lambda s: s == said and where[0] not in ('step', 'files'), f'{where}')
    path.write_text(_sealed(dict(body, step=-1)))
    assert latest(home/'run'/'checkpoints', lambda line: None)[1]['step'] < state['step']         # the one before
    path.write_text(text)
    assert resumed(config, cohort) == whole


def test_tensors(home):
    home, cohort, config = home
    rng, folder = random.Random(5), newest(home)
    whole, state = state_of(load_checkpoint(folder)[0]), read_state(folder)
    for part in ('model', 'optimizer'):
        for what in damages(folder/f'{part}.safetensors', rng, N//4): judge('checkpoint tensors', lambda: state_of(load_checkpoint(folder)[0]), whole.__eq__, what)
    start, manifest = resumed(config, cohort), (folder/'state.json').read_text()
    for i in range(N//2):
        part = ('model', 'optimizer')[i % 2]
        path = folder/f'{part}.safetensors'
        data, tensors = path.read_bytes(), load_file(path)
        name = rng.choice(list(tensors))
        kind = i//2 % 7
        if kind == 0: del tensors[name]
        elif kind == 1: tensors[name] = torch.full_like(tensors[name].float(), rng.choice([np.nan, np.inf, -np.inf]))
        elif kind == 2: tensors[name] = torch.zeros(3, 5, 7)
        elif kind == 3: tensors[name] = tensors[name].double()
        elif kind == 4: tensors[rng.choice(['x', 'a/b/c', '/', '../x', 'online.gone'])] = torch.zeros(2)
        elif kind == 5: tensors = {}
        else: tensors[f'{name}x'] = tensors.pop(name)
        save_file(tensors, path)
        if kind == 6 and i % 4 == 0: path.write_bytes(struct.pack('<Q', 2**40) + path.read_bytes()[8:])        # a header of a terabyte
        body = {k: v for k, v in state.items() if k != 'sha256'}
        (folder/'state.json').write_text(_sealed(dict(body, files=dict(body['files'], **{path.name: sha256(path)}))))
        judge('checkpoint tensors', lambda: resumed(config, cohort), lambda r: r == start or r[0] < start[0], f'{part} {kind} {name}')
        path.write_bytes(data)
    (folder/'state.json').write_text(manifest)
    assert resumed(config, cohort) == start


def facts_of_run(home, config, cohort):
    "What a resuming run and an evaluation take from the files of a run."
    run, saved, processes = open_run(config, cohort, warn=lambda line: None)
    c = run_config(run)
    return [saved[1]['step'], processes, repr(replace(c, data=replace(c.data, cohort=''))), sorted(subjects_of_run(run)), read_run(run)]


@pytest.mark.parametrize('name', ['config.yaml', 'run.json', 'pretrained_on.csv'])
def test_run_files(home, name):
    home, cohort, config = home
    rng, path = random.Random(name), home/'run'/name
    whole = facts_of_run(home, config, cohort)
    run = home/'run'
    facts = {'config.yaml': lambda: repr(run_config(run)), 'run.json': lambda: read_run(run), 'pretrained_on.csv': lambda: subjects_of_run(run)}[name]
    same = facts().__eq__
    for what in damages(path, rng, N//4): judge('run files', facts, same, what)
    text = path.read_text()
    if name == 'run.json':
        for i in range(N//4):
            where, bad = strange({k: v for k, v in json.loads(text).items() if k != 'seal'}, rng)
            path.write_text(text_of(seal(bad)))
            # `threads` is what the quickest of a trial was, and a run of before that has none: a possible number, or none, is not another run
            inert = where[0] in ('folder', 'beside', 'mmsn', 'torch', 'python', 'started', 'command', 'config', 'pretrained_on', 'batch', 'threads')
            judge('run files', lambda: open_run(config, cohort, warn=lambda line: None)[2] and read_run(run), lambda f: f == json.loads(path.read_text()) and inert, f'{where}')
    if name == 'config.yaml':
        for bad in ('['*100_000, '{'*50_000, '- a', 'optim: 3', 'name: !!python/object:os.system x', '\x00', 'a: &a [*a]', 'optim: {lr: [1, 2]}', 'modalities: [1]', '5', '""', 'a: b: c'):
            path.write_text(bad)
            judge('run files', lambda: facts_of_run(home, config, cohort), lambda f: False, bad[:30])
    path.write_text(text)
    assert facts_of_run(home, config, cohort) == whole


def test_metrics(home):
    home, cohort, config = home
    rng, path = random.Random(7), home/'run'/'metrics.jsonl'
    _, saved, _ = open_run(config, cohort, warn=lambda line: None)
    def read():
        read_rows(path, saved[1]['step'], saved[1]['rows'])          # what `open_run` does
        return [json.dumps(r) for r in Metrics(home/'run', saved[1]['step']).rows]
    whole, data = read(), path.read_bytes()
    def damaged():
        for i in range(N):
            lines = data.decode().splitlines()
            if i % 4 < 2: path.write_bytes((flipped, cut)[i % 2](data, rng))
            elif i % 4 == 2:
                row, at = json.loads(lines[0]), rng.randrange(len(lines))
                lines[at] = text_of(strange(row, rng)[1]); path.write_text('\n'.join(lines) + '\n')
            else:
                lines.insert(rng.randrange(len(lines)), rng.choice(['[]', '7', 'null', '['*100_000, '{"step": "x"}', '{"step": -1}', '{}', '{"step": 1.5}', '\u2028'])); path.write_text('\n'.join(lines) + '\n')
            yield f'{i}'
        path.write_bytes(data)
    for what in damaged():
        # an end that was cut off, or zeros after it, is what a killed process leaves; everything before the checkpoint counts
        judge('metrics.jsonl', read, whole.__eq__, what)
    assert read() == whole


def encoded(folder, cohort):
    model = MMSN.from_pretrained(folder)
    return {k: v.nan_to_num(-9).numpy().tobytes() for k, v in model.encode(cohort.batch(range(8), list(model.config.modalities))).items()}


def test_encoder_config(home):
    home, cohort, _ = home
    rng, folder = random.Random(8), home/'run'/'encoder'
    whole, path = encoded(folder, cohort), folder/'config.json'
    for what in damages(path, rng, N//2): judge('encoder config', lambda: encoded(folder, cohort), whole.__eq__, what)
    text = path.read_text()
    about = {k: v for k, v in json.loads(text).items() if k != 'seal'}
    for i in range(N//2):
        where, bad = strange({k: about[k] for k in (('config', 'modalities'), tuple(about))[i % 2]}, rng)
        bad = about | bad if where[0] in bad else {k: v for k, v in about.items() if k != where[0]}
        path.write_text(text_of(seal(bad)))
        # what is possible is another encoder; it must be a model that gives numbers
        judge('encoder config', lambda: encoded(folder, cohort), lambda e: all(np.isfinite(np.frombuffer(x, np.float32)).all() for x in e.values()), f'{where}')
    path.write_text(text)
    assert encoded(folder, cohort) == whole


def test_encoder_weights(home):
    home, cohort, _ = home
    rng, folder = random.Random(9), home/'run'/'encoder'
    whole, path = encoded(folder, cohort), folder/'model.safetensors'
    for what in damages(path, rng, N//2): judge('encoder weights', lambda: encoded(folder, cohort), whole.__eq__, what)
    data, text = path.read_bytes(), (folder/'config.json').read_text()
    for i in range(N//2):
        tensors = load_file(path)
        name = rng.choice(list(tensors))
        kind = i % 6
        if kind == 0: del tensors[name]
        elif kind == 1: tensors[name] = torch.full_like(tensors[name].float(), rng.choice([np.nan, np.inf]))
        elif kind == 2: tensors[name] = torch.zeros(3, 5, 7)
        elif kind == 3: tensors[name] = tensors[name].double()
        elif kind == 4: tensors[rng.choice(['x', '../x', 'online.gone'])] = torch.zeros(2)
        else: tensors = {}
        save_file(tensors, path, dict(format='pt'))
        (folder/'config.json').write_text(json.dumps(seal(dict(json.loads(text), weights=sha256(path)))))
        judge('encoder weights', lambda: encoded(folder, cohort), lambda _: False, f'{kind} {name}')
        path.write_bytes(data)
    (folder/'config.json').write_text(text)
    assert encoded(folder, cohort) == whole


def test_features(home):
    "A damaged cache is computed again: the result is the same."
    home, cohort, _ = home
    rng, model = random.Random(10), MMSN.from_pretrained(home/'run'/'encoder')
    read = lambda: extract_features(model, cohort, range(12), cache=home/'features').to_csv()
    whole, = {read() for _ in range(2)}
    path, = (home/'features').glob('*.parquet')
    data = path.read_bytes()
    for i in range(N):
        bad = (flipped, cut)[i % 2](data, rng)
        path.write_bytes(bad)
        judge('features cache', read, whole.__eq__, f'{i}')
    path.unlink()
    pd.read_parquet(io_bytes(data)).to_parquet(path)                 # without its hash: not trusted
    assert read() == whole and _read_cached(path) is not None


def io_bytes(data):
    import io
    return io.BytesIO(data)


def test_predictions(home):
    home, cohort, _ = home
    rng, path = random.Random(11), home/'p.parquet'
    labels = cohort.label_matrix()
    p = Predictions(labels, np.random.default_rng(0).normal(size=labels.shape), tuple(cohort.labels), cohort.samples.sample_id.to_numpy(), cohort.samples.subject_id.to_numpy(),
                    cohort.samples.split.to_numpy(str))
    save_predictions(p, path)
    def read():
        q = open_predictions(path)
        return [q.names, q.labels.tobytes(), q.scores.tobytes(), q.ids.tobytes(), q.subjects.tobytes(), q.split.tolist()]
    whole = read()
    for what in damages(path, rng, N//2): judge('predictions', read, whole.__eq__, what)
    data, table = path.read_bytes(), pd.read_parquet(path)
    for i in range(N//2):
        other, kind = table.copy(), i % 6
        column = rng.choice([c for c in table if c.startswith(('label', 'score'))])
        if kind == 0: other = other.drop(columns=rng.choice([*(c for c in table if c.startswith('score')), 'sample_id', 'subject_id', 'split']))
        elif kind == 1: other[column] = rng.choice(['x', 'deep'])
        elif kind == 2: column = 'label.heart'; other[column] = rng.choice([.5, -1., 7., np.inf])
        elif kind == 3: other['sample_id'] = 7
        elif kind == 4: column = 'score.heart'; other[column] = rng.choice([np.nan, np.inf])
        else: other['split'] = rng.choice(['validate', '', None, 3])
        write_sealed(other, path)
        judge('predictions', read, lambda _: False, f'{kind} {column}')
    path.write_bytes(data)
    assert read() == whole


def test_counts():
    "The table of what was tried; every kind of file was."
    if len(COUNTS) < 10: pytest.skip('only some kinds were tried')
    for kind, c in COUNTS.items(): print(f'{kind:22} tried {c["tried"]:4}  refused {c["refused"]:4}  equal {c["equal"]:4}  tracebacks 0  silently changed 0')
    assert all(c['tried'] >= .8*N and c['refused'] + c['equal'] == c['tried'] for c in COUNTS.values())
