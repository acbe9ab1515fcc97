"Options and configs that nobody should write, or that somebody else wrote: each is refused in one line with exit code 2, and no value is read that is not written there."
import argparse, inspect, math, typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from conftest import one_line, refused, run
from mmsn import prepare as preparation
from mmsn.config import build, check, load_config, presets, to_dict
from mmsn.evaluate.__main__ import main as evaluate
from mmsn.launch import SLURM_RANGES, Slurm, split_slurm
from mmsn.options import MODALITIES, Config, InputError
from mmsn.prepare import main as prepare, parser
from mmsn.ranges import PREPARE as LIMITS, RANGES
from mmsn.train import main as train

ALL = 'modalities: {cxr: {kind: image}, ehr: {kind: timeseries}, facts: {kind: tabular}, report: {kind: text}}\n'
NAMES = dict(image='cxr', timeseries='ehr', tabular='facts', text='report')


def numeric(hint):
    "int or float if values of this type hold such numbers, else None."
    if hint in (int, float): return hint
    return next(filter(None, map(numeric, typing.get_args(hint))), None)


def numbers_of(cls, where=''):
    "(dotted key, class, field, int or float, how many it takes) of every number that an option class holds."
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        if is_dataclass(hint): yield from numbers_of(hint, f'{where}{f.name}.')
        elif kind := numeric(hint):
            pair = typing.get_origin(hint) is tuple and Ellipsis not in typing.get_args(hint)
            yield where + f.name, cls.__name__, f.name, kind, 2 if pair else 1


NUMBERS = [*numbers_of(Config), *(x for kind, cls in MODALITIES.items() for x in numbers_of(cls, f'modalities.{NAMES[kind]}.'))]


def outside(r, kind):
    "Values that a range does not hold, next to its ends."
    step = (lambda x, to: math.nextafter(x, to)) if kind is float else (lambda x, to: x + (1 if to > x else -1))
    return [kind(r.low) if r.above else step(kind(r.low), -math.inf), step(kind(r.high), math.inf)]


def test_every_number_has_a_range():
    "A new numeric option comes with its range in `mmsn.ranges`, or fails here; and no range is of an option that is gone."
    assert {(c, f) for _, c, f, _, _ in NUMBERS} == {(c, f) for c, of in RANGES.items() for f in of}
    assert len(NUMBERS) > 110


def test_defaults_and_presets_lie_in_their_ranges():
    check(Config())
    for name in presets(): load_config(name)


@pytest.mark.parametrize('key,cls,field,kind,n', NUMBERS, ids=[x[0] for x in NUMBERS])
def test_number_outside_its_range(tmp_path, key, cls, field, kind, n):
    "nan, both infinities, and the first value beyond either end; as a change and in a file; the ends themselves are in the range."
    (tmp_path/'all.yaml').write_text(ALL)
    r = RANGES[cls][field]
    for value in (math.nan, math.inf, -math.inf, *outside(r, kind)):
        text = f'[{value!r},{value!r}]' if n == 2 else repr(value)
        with pytest.raises(InputError) as said: load_config(tmp_path/'all.yaml', [f'{key}={text}'.replace('nan', '.nan').replace('inf', '.inf')])
        assert key in str(said.value) and '\n' not in str(said.value) and len(str(said.value)) < 300, said.value
        assert kind is int and not math.isfinite(value) or str(r) in str(said.value) or 'should be one of' in str(said.value), said.value
    for value in (r.high, *([] if r.above else [r.low])): assert r.holds(kind(value))


@pytest.mark.parametrize('key', ['random_scale', 'focal_scale', 'ratio', 'heavy_drop', 'focal_window'])
def test_ends_in_the_wrong_order(tmp_path, key):
    (tmp_path/'all.yaml').write_text(ALL)
    name = 'ehr' if key == 'focal_window' else 'cxr'
    with pytest.raises(InputError, match='a lower and an upper end'): load_config(tmp_path/'all.yaml', [f'modalities.{name}.views.{key}=[0.9,0.8]'])
    load_config(tmp_path/'all.yaml', [f'modalities.{name}.views.{key}=[0.8,0.8]'])


BOMB = '\n'.join(['a0: &a0 [x]', *(f'a{i}: &a{i} [{",".join([f"*a{i - 1}"]*10)}]' for i in range(1, 7))])
FILES = {   # name -> (text or bytes of a file, what is said)
    'laughs': (BOMB, 'stands for more than 50,000 values'), 'ring': ('a: &a [*a]', 'inside itself'), 'ring of two': ('a: &a {b: &b {c: *a}}', 'inside itself'), 'no anchor': ('a: *b', 'inside itself or for nothing'),
    'deep list': ('a: ' + '['*5000 + ']'*5000, 'nest'), 'deep keys': ('{a: '*200 + '1' + '}'*200, 'nested more than 32 deep'), 'deep lines': ('\n'.join(' '*i + f'k{i}:' for i in range(300)), 'nested'),
    'twice': ('optim: {lr: 1}\noptim: {lr: 2}', 'duplicate key optim'), 'twice inside': ('optim: {lr: 1, lr: 2}', 'duplicate key lr'), 'twice of a modality': ('modalities: {cxr: {kind: image}, cxr: {kind: image}}', 'duplicate key cxr'),
    'huge': ('# ' + 'x'*(2**20), 'larger than 1,048,576 bytes'), 'many': ('loss: {prior: [' + '1,'*60_000 + '1]}', 'more than 50,000 values'), 'env': ('name: ${oc.env:HOME}', 'interpolation'),
    'env with a default': ('name: "${oc.env:NOT_THERE,x}"', 'interpolation'), 'reference': ('optim: {lr: 1e-3, final_lr: "${optim.lr}"}', 'interpolation'), 'in a key': ('"${oc.env:HOME}": 1', 'interpolation'),
    'in a list': ('evaluate: {labels: [a, "b ${oc.env:HOME}"]}', 'interpolation'), 'escaped': (r'name: "\\${oc.env:HOME}"', 'interpolation'), 'decode': ('name: ${oc.decode:"1"}', 'interpolation'), 'unclosed': ('name: "${"', 'interpolation'),
    'block text': ('name: |\n  ${oc.env:HOME}', 'interpolation'), 'python object': ('a: !!python/object/apply:os.system ["touch hacked"]', 'not YAML'), 'python name': ('a: !!python/name:os.system', 'not YAML'), 'own tag': ('a: !mine 1', 'not YAML'),
    'list': ('- a\n- b', 'keys and values'), 'word': ('hello', 'unknown key'), 'number': ('3', ''), 'bytes': (b'\xff\xfe\x00\x01', 'not text in UTF-8'), 'zip': (b'PK\x03\x04\x14\x00\x00\x00', 'YAML'),
    'zeros': (b'\x00'*100, 'not YAML'), 'two documents': ('a: 1\n---\nb: 2', 'not YAML'), 'tab': ('optim:\n\tlr: 1', 'not YAML'), 'open': ('optim: {lr: 1', 'not YAML'), 'long integer': ('optim: {lr: ' + '9'*5000 + '}', 'YAML'),
    'long hexadecimal': ('optim: {batch_size: 0x' + 'f'*5000 + '}', 'should lie between'), 'large integer': ('optim: {lr: 1' + '0'*400 + '}', 'should be float'), 'merge of nothing': ('<<: 5', 'not YAML'),
    'binary': ('name: !!binary aGk=', 'should be str'), 'key that is a list': ('? [a]\n: 1', 'not YAML'), 'key that is a number': ('1: 2', "unknown key '1'"), 'no value': ('optim: ???', 'keys and values'),
    'part is a number': ('optim: 3', 'keys and values'), 'part is false': ('optim: false', 'keys and values'), 'part is empty text': ('optim: ""', 'keys and values'), 'part is a list': ('optim: [1, 2]', 'keys and values'),
    'modality is a number': ('modalities: {cxr: 5}', 'keys and values'), 'modality is a word': ('modalities: {cxr: image}', 'keys and values'), 'modalities are a list': ('modalities: [cxr]', 'at least one modality'),
    'kind is a list': ('modalities: {cxr: {kind: [image]}}', 'should be one of image'), 'kind is a mapping': ('modalities: {cxr: {kind: {image: 1}}}', 'should be one of'), 'name is a number': ('modalities: {1: {kind: image}}', 'called by a word'),
    'no modality': ('modalities: {}', 'at least one modality'), 'surrogate': ('name: "\\ud800"', '')}


@pytest.mark.parametrize('name', FILES)
def test_file_that_is_no_config(tmp_path, monkeypatch, capsys, name):
    "Refused by the command in one short line; nothing ran, nothing of the environment is in it, and it took no time that an attacker could use."
    monkeypatch.setenv('HOME', '/secret/place')
    monkeypatch.chdir(tmp_path)
    text, says = FILES[name]
    Path('bad.yaml').write_bytes(text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass'))
    line = refused(train, ['bad.yaml', 'data.cohort=nowhere'], capsys)
    assert says in line and 'secret' not in line and len(line) < 500, line
    assert [p.name for p in tmp_path.iterdir()] == ['bad.yaml']


CHANGES = {   # change -> what is said
    'optim.clip=.nan': 'between 0 and', 'optim.clip=nan': 'between 0 and', 'optim.lr=.inf': 'between 0 and 1,000', 'optim.lr=inf': 'between 0 and 1,000', 'optim.lr=-1': 'between 0 and 1,000', 'optim.lr=1e400': 'between 0', 'optim.momentum=2': 'between 0 and 1',
    'optim.warmup_epochs=-1': 'between 0 and', 'optim.schedule_stretch=0': 'above 0', 'loss.prior=-5': 'between 0 and', 'loss.prior=.nan': 'between 0', 'data.workers=-1': 'between 0 and 256', 'data.workers=100000': 'between 0 and 256',
    'train.threads=1000000': 'between 0 and 1,024', 'train.threads=-1': 'between 0', 'optim.batch_size=1000000000': 'between 1 and', 'optim.batch_size=10**9': 'should be int', 'optim.batch_size=64.5': 'should be int', 'optim.batch_size=true': 'should be int',
    'modalities.cxr.views.random_size=1000000': 'between 1 and 4,096', 'modalities.cxr.encoder.dim=99999999': 'between 1 and', 'modalities.cxr.encoder.depth=100000': 'between 0', 'loss.prototypes=100000000': 'between 1', 'train.seed=-1': 'between 0', 'train.seed=99999999999999999999': 'between 0',
    'optim.epochs=1e9': 'above 0', 'optim.epochs=0': 'above 0', 'optim.lr=': 'should be float', 'optim.lr=[1,2]': 'should be float', 'optim.lr={a: 1}': 'should be float', 'optim=3': 'keys and values', 'optim=false': 'keys and values', 'optim=[]': 'optim=[]',
    'optim.lr.x=1': '', '=3': 'no key', 'optim..lr=1': 'no key', 'a b=1': 'unknown key', 'optim.lr': 'not a key=value pair', '.'.join(['a']*100) + '=1': 'no key', 'x'*100_000 + '=1': 'unknown key', 'name=' + '['*500 + ']'*500: 'nested', 'name=' + 'x'*2_000_000: 'longer than',
    'name=${oc.env:HOME}': 'interpolation', 'train.run=runs/${oc.env:USER}': 'interpolation', 'optim.final_lr=${optim.lr}': 'interpolation', '${oc.env:HOME}=1': 'interpolation', 'evaluate.labels=["${oc.env:HOME}"]': 'interpolation', 'data.cohort=${now:%Y}': 'interpolation',
    'name=*a': 'inside itself or for nothing', 'name=!!python/name:os.system': 'cannot be read', 'name={': 'not YAML', 'name="': 'not YAML', "name='\x00'": 'YAML', 'optim.lr=' + '9'*5000: 'cannot be read', 'optim.lr=1' + '0'*400: 'should be float',
    'modalities=': 'at least one modality', 'modalities=5': 'at least one modality', 'modalities.cxr=5': 'keys and values', 'modalities.cxr.kind=[image]': 'should be one of', 'fusion.aim={a: b}': 'fusion.aim={a: b}', 'evaluate.fractions=[0.1,.nan]': 'above 0 and at most 1', 'evaluate.fractions=[2]': 'above 0',
    'evaluate.shots=[0]': 'between 1', 'evaluate.masked=[-0.1]': 'between 0 and 1', 'evaluate.probe_lrs=[.inf]': 'above 0', 'modalities.ehr.views.downsample=[0]': 'between 1', 'modalities.cxr.views.random_scale=[0.9,0.1]': 'lower and an upper', 'modalities.cxr.views.random_scale=[.nan,1]': 'above 0'}


@pytest.mark.parametrize('change', CHANGES, ids=lambda c: c[:40].replace('\x00', '0'))
def test_change_that_means_nothing(tmp_path, monkeypatch, capsys, change):
    monkeypatch.setenv('HOME', '/secret/place')
    monkeypatch.chdir(tmp_path)
    line = refused(train, ['demo', 'data.cohort=nowhere', change], capsys)
    assert CHANGES[change] in line and 'secret' not in line and len(line) < 600, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('word', ['name=costs $5', 'name=$HOME', 'name={$}', 'name=a$', 'name=$$'])
def test_a_dollar_is_a_letter(word):
    "Only ${…} is refused."
    assert '$' in str(load_config('demo', [word.replace('{$}', '"{$}"')]).name)


def test_anchors_are_read(tmp_path):
    "What YAML's anchors are for still works."
    (tmp_path/'mine.yaml').write_text('modalities:\n  a: &chart {kind: timeseries, encoder: {hidden: 16}}\n  b: *chart\n  c: {<<: *chart, weight: 2}\n')
    config = load_config(tmp_path/'mine.yaml')
    assert config.modalities['a'] == config.modalities['b'] and config.modalities['c'].weight == 2 and config.modalities['c'].encoder.hidden == 16


@pytest.mark.parametrize('word,says', [('slurm.nodes=0', 'between 1'), ('slurm.nodes=100000000', 'between 1'), ('slurm.time=-5', 'between 1'), ('slurm.gpus_per_node=-1', 'between 0'), ('slurm.mem_gb=.nan', 'should be int'), ('slurm.account=${oc.env:HOME}', 'interpolation'),
                                       ('slurm.=1', 'key'), ('slurm.nodes', 'key=value'), ('slurm.nodes=[1]', 'should be int'), ('slurm.partition=' + '['*100 + ']'*100, 'nested')])
def test_slurm_words(capsys, word, says): assert says in refused(train, ['demo', word], capsys)


def test_slurm_ranges():
    assert {f for _, _, f, _, _ in numbers_of(Slurm)} == set(SLURM_RANGES['Slurm'])
    for _, _, f, kind, _ in numbers_of(Slurm):
        for value in outside(SLURM_RANGES['Slurm'][f], kind):
            with pytest.raises(InputError, match=f'slurm.{f} should lie'): split_slurm([f'slurm.{f}={value}'])


@pytest.mark.parametrize('words', [['nothing'], ['--out'], ['--nonsense'], ['run', '--out', 'x', '--nonsense', 'y'], ['nowhere', 'draws=0'], ['nowhere', 'evaluate.draws=.nan'], ['nowhere', 'labels=${oc.env:HOME}'], ['a', 'b', 'c'], ['draws=1'], ['', 'draws=1'], ['x'*5000], ['nowhere', 'data.cohort=' + 'y'*5000]])
def test_evaluate_words(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setenv('HOME', '/secret/place'); monkeypatch.chdir(tmp_path); monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert 'secret' not in refused(evaluate, words, capsys)
    assert not list(tmp_path.iterdir())


# mmsn-prepare

def prepare_numbers():
    "(source, flag, argument, range) of every number that mmsn-prepare takes."
    sub = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for source, p in sub.choices.items():
        for a in p._actions:
            if a.option_strings and a.type in (preparation._natural, float): yield source, a.option_strings[0], a.dest, a.type


@pytest.mark.parametrize('source,flag,name,kind', [*prepare_numbers()], ids=lambda x: getattr(x, '__name__', str(x)))
def test_prepare_numbers(tmp_path, monkeypatch, capsys, source, flag, name, kind):
    "Each has a range of its own; what lies outside is refused before anything is opened or written."
    monkeypatch.chdir(tmp_path)
    assert name in LIMITS, f'give {flag} a range in PREPARE of mmsn.ranges'
    places = dict(synthetic=1, mimic=1, physionet2012=2, nih=2, iu=2, images=3, table=3, medfuse=2, meds=3).get(source, 2)
    low, high = outside(LIMITS[name], int if kind is not float else float)
    for value in ('nan', 'inf', '-inf', '-1', low, high, '1e5x', '', '9'*4000, '9'*5000):
        line = refused(prepare, [source, *['x']*places, f'{flag}={value}'], capsys)
        assert flag in line and len(line) < 6000, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words', [[], ['nothing'], ['table'], ['table', '--help=1'], ['images', 'a', 'b', 'c', '--fit', 'stretch'], ['meds', 'a', 'b', 'c', '--memory', 'lots'], ['mimic', 'out', '--tasks', 'nothing'], ['table', 'a', 'b', 'c', '--nonsense'],
                                   ['synthetic', ''], ['synthetic', 'x'*300], ['synthetic', '/'.join(['y'*200]*40)], ['synthetic', 'a\x00b'], ['synthetic', '/dev/null'], ['synthetic', '/dev/null/x'], ['synthetic', '/proc/mmsn'], ['join', 'a', 'b'], ['merge', 'a', 'b'], ['merge', 'a'], ['mimic', 'a', '--shards', '2', '--shard', '0'], ['mimic', 'a', '--shard', '0']])
def test_prepare_words(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    refused(prepare, words, capsys)
    assert not list(tmp_path.iterdir())


def test_in_processes_of_their_own(tmp_path):
    "The same from a shell: one line on standard error, and nothing else."
    for command in (['mmsn.train', 'demo', 'optim.lr=.inf'], ['mmsn.prepare', 'meds', 'a', 'b', 'c', '--threads', 1_000_000_000], ['mmsn.evaluate', 'nowhere', 'draws=0'], ['mmsn.convert', 'nowhere', 'x'*300], ['mmsn.demo', '--out', 'x'*300]):
        done = run(*command, code=2, cwd=tmp_path, fork=False)
        assert one_line(done) and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir()), done.stderr
