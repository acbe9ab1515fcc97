"A card beside every exported encoder, the hub (never by itself), ONNX beside torch, predictions for meds-evaluation, labels of ACES."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mmsn import MMSN, open_encoder, prepare
from mmsn.card import model_card, origin_of, write_card
from mmsn.convert import main as convert
from mmsn.data.cohort import Cohort
from mmsn.data.patients import about_data
from mmsn.files import seal
from mmsn.options import InputError
from mmsn.testing import toy_cohort, toy_config


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return toy_cohort(tmp_path_factory.mktemp('share')/'cohort', 120)


def exported(cohort, folder, *names, **changes): return MMSN.from_config(toy_config(*names, **changes), cohort).save_pretrained(folder)


class Hub:
    "What `HfApi` does, written down."
    calls = []
    def create_repo(self, name, **options): self.calls.append(('create', name, options))
    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        from pathlib import Path
        self.calls.append(('upload', repo_id, sorted(p.name for p in Path(folder_path).iterdir()), allow_patterns))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: 'a token')
    return Hub


def test_push(cohort, tmp_path, hub, capsys):
    "Private, three files; invented patients need no warning."
    encoder = open_encoder(exported(cohort, tmp_path/'e'))
    assert encoder.push_to_hub('somebody/first') == 'https://huggingface.co/somebody/first'
    (_, name, options), (_, _, files, allowed) = hub.calls
    assert name == 'somebody/first' and options['private'] is True and sorted(files) == sorted(allowed)
    assert 'WARNING' not in capsys.readouterr().out


def test_push_says_what_data_allow(cohort, tmp_path, hub, capsys):
    "Weights of credentialed data are not pushed in silence; the card says it in its first lines."
    model = MMSN.from_config(toy_config(), cohort)
    model.data = model.data | dict(name='mimic', prepared=dict(command='prepare_mimic'))
    model.save_pretrained(tmp_path/'e')
    convert([str(tmp_path/'e'), '--push', 'somebody/first', '--public'])
    assert 'WARNING: These weights were trained on credentialed data' in capsys.readouterr().out
    assert hub.calls[0][2]['private'] is False
    assert 'credentialed data' in (tmp_path/'e'/'README.md').read_text(encoding='utf-8')[:1200]


def test_a_joined_cohort_is_what_its_strictest_source_is(cohort, tmp_path):
    "And two joined cohorts of invented patients are invented."
    other = toy_cohort(tmp_path/'b', 60, seed=1)
    prepare.join([cohort.folder, other.folder], tmp_path/'both')
    assert origin_of(about_data(Cohort.open(tmp_path/'both'))) == 'invented'
    meta = json.loads((tmp_path/'b'/'cohort.json').read_text(encoding='utf-8'))
    meta['provenance'] = dict(command='prepare_mimic', options={})
    (tmp_path/'b'/'cohort.json').write_text(json.dumps(seal({k: v for k, v in meta.items() if k != 'seal'})), encoding='utf-8')
    prepare.join([cohort.folder, tmp_path/'b'], tmp_path/'mixed', name='synthetic')
    assert origin_of(about_data(Cohort.open(tmp_path/'mixed'))) == 'credentialed'
    prepare.join([tmp_path/'both', tmp_path/'mixed'], tmp_path/'nested')
    assert origin_of(about_data(Cohort.open(tmp_path/'nested'))) == 'credentialed'


@pytest.mark.parametrize('words, message', [
    (['--push', 'first'], 'OWNER/NAME'), (['--push', 'a/b'], 'no token'), ([], 'OUT is missing'), (['--onnx', 'x.bin'], '.onnx'),
    (['out', '--onnx', 'x.onnx'], 'not both'), (['--public'], '--push')])
def test_refused(cohort, tmp_path, monkeypatch, capsys, words, message):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    exported(cohort, tmp_path/'e')
    with pytest.raises(SystemExit) as e: convert([str(tmp_path/'e'), *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count('\n') == 1


def test_card_is_plain_text(cohort, tmp_path):
    "A name in a cohort is no link, picture or heading on the page of the hub."
    about = json.loads((exported(cohort, tmp_path/'e')/'config.json').read_text(encoding='utf-8'))
    about['data']['name'] = '![x](http://a/b.png) <script>\n# Title'
    card = model_card(about)
    assert '![x](http' not in card and '<script>' not in card and '\n# Title' not in card


def test_own_readme_stays(cohort, tmp_path):
    folder = exported(cohort, tmp_path/'e')
    (folder/'README.md').write_text('mine', encoding='utf-8')
    assert write_card(folder).read_text(encoding='utf-8') == 'mine'


@pytest.mark.parametrize('names, changes', [
    (('cxr',), {}), (('ehr',), {}), (('cxr', 'ehr', 'labs', 'facts'), {}), (('cxr', 'ehr'), dict(cxr=dict(views=dict(random=1, focal=2, random_size=12, focal_size=8, patch_drop=.25)))),
    (('ehr',), dict(ehr=dict(encoder=dict(name='transformer', hidden=32, dim=32, heads=2, pool='mean')))), (('ehr',), dict(ehr=dict(encoder=dict(name='gru', hidden=16, dim=16, pool=['max', 'last'])))),
    (('cxr',), dict(cxr=dict(encoder=dict(dim=32, depth=1, heads=2, patch=4, pool='cls')))), (('ehr',), dict(ehr=dict(encoder=dict(name='axial', hidden=16, dim=16, heads=2))))],
    ids=['image', 'series', 'everything', 'shrunk', 'transformer', 'gru', 'cls', 'axial'])
def test_onnx(cohort, tmp_path, names, changes):
    "The file gives what torch gives, to 1e-4, for other numbers of patients and hours than it was written with."
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    from mmsn.share import Exported
    changes = {k: {**__import__('mmsn.testing', fromlist=['_TOY'])._TOY[k], **v} for k, v in changes.items()}
    encoder = open_encoder(exported(cohort, tmp_path/'e', *names, **changes))
    convert([str(tmp_path/'e'), '--onnx', str(tmp_path/'e.onnx')])
    session, graph = onnxruntime.InferenceSession(str(tmp_path/'e.onnx')), Exported(encoder)
    for rows in (range(23), [3]):
        batch = cohort.batch(list(rows))
        given = dict(zip(graph.inputs, (x.numpy() for x in graph.inputs_of(batch))))
        found = dict(zip(graph.outputs, session.run([f'{o}_embedding' for o in graph.outputs], {i.name: given[i.name] for i in session.get_inputs()})))
        for name, x in encoder.encode(batch).items(): np.testing.assert_allclose(found[name], x.numpy(), atol=1e-4, equal_nan=True)


def test_onnx_says_what_it_cannot(cohort, tmp_path, capsys):
    "A recurrent network of both directions either is exported right or is refused in one line; never a wrong file."
    pytest.importorskip('onnxruntime'), pytest.importorskip('onnx')
    exported(cohort, tmp_path/'e', 'ehr', ehr=dict(encoder=dict(name='lstm', hidden=16, dim=16, bidirectional=True)))
    try: convert([str(tmp_path/'e'), '--onnx', str(tmp_path/'e.onnx')])
    except SystemExit as e:
        assert e.code == 2 and 'cannot be written as ONNX' in capsys.readouterr().err and not (tmp_path/'e.onnx').exists()


def meds_of(folder, n=40):
    "Events of a rate of 40 subjects over two days, and labels as ACES writes them in either form."
    rng, start = np.random.default_rng(0), pd.Timestamp('2150-01-01')
    rows = [(i, start + pd.Timedelta(hours=float(h)), 'HR', float(rng.normal(80 + 20*(i % 2), 5)), None) for i in range(n) for h in np.sort(rng.uniform(0, 48, 9))]
    table = pd.DataFrame(rows, columns=['subject_id', 'time', 'code', 'numeric_value', 'text_value']).astype(dict(text_value='string'))
    (folder/'meds'/'data').mkdir(parents=True)
    table.to_parquet(folder/'meds'/'data'/'0.parquet', index=False)
    (folder/'codes.csv').write_text('code,channel,unit,low,high,normal\nHR,Heart Rate,bpm,0,350,86\n', encoding='utf-8')
    when, came = [start + pd.Timedelta(hours=48)]*n, [i % 2 for i in range(n)]
    meds = pd.DataFrame(dict(subject_id=range(n), prediction_time=when, boolean_value=[bool(c) for c in came], integer_value=None, float_value=None, categorical_value=None))
    meds.to_parquet(folder/'in_meds.parquet', index=False)
    pd.DataFrame(dict(subject_id=range(n), trigger=start, index_timestamp=when, label=came)).to_parquet(folder/'in_aces.parquet', index=False)


@pytest.mark.parametrize('name', ['in_meds', 'in_aces'])
def test_aces_labels_and_predictions(tmp_path, name):
    "A parquet file of ACES in either form gives labels; the evaluation leaves predictions in the schema of meds-evaluation."
    import pyarrow as pa, pyarrow.parquet as pq
    from mmsn import prepare
    from mmsn.evaluate.evaluation import evaluate
    meds_of(tmp_path)
    cohort = prepare.meds(tmp_path/'meds', tmp_path/'codes.csv', tmp_path/'cohort', labels=[str(tmp_path/f'{name}.parquet')])
    assert cohort.labels == [name] and cohort.samples[name].tolist() == [i % 2 for i in range(40)]
    exported(cohort, tmp_path/'e', 'ehr')
    evaluate(tmp_path/'e', ['protocols=[linear_probe]', 'bootstrap=10', 'pictures=false', 'map_samples=20', 'baselines=false', f'data.cohort={tmp_path/"cohort"}'], tmp_path/'report', page=False)
    schema = pq.read_schema(tmp_path/'report'/'meds'/f'{name}.parquet')
    assert [(f.name, f.type) for f in schema] == [('subject_id', pa.int64()), ('prediction_time', pa.timestamp('us')), ('boolean_value', pa.bool_()), ('predicted_boolean_value', pa.bool_()), ('predicted_boolean_probability', pa.float64())]
    t = pd.read_parquet(tmp_path/'report'/'meds'/f'{name}.parquet')
    assert (t.boolean_value == t.subject_id % 2).all() and t.predicted_boolean_probability.between(0, 1).all() and len(t) == (cohort.samples.split == 'test').sum()


def test_meds_dev(tmp_path):
    "The three commands of benchmarks/meds_dev/model.yaml, filled in as MEDS-DEV's runner does, end in its predictions."
    import subprocess, sys
    from pathlib import Path

    import yaml
    here = Path(__file__).resolve().parents[1]/'benchmarks'/'meds_dev'
    meds_of(tmp_path, 80)
    (tmp_path/'labels').mkdir()
    (tmp_path/'in_meds.parquet').rename(tmp_path/'labels'/'0.parquet')
    commands = yaml.safe_load((here/'model.yaml').read_text(encoding='utf-8'))['commands']
    words = dict(dataset_dir=tmp_path/'meds', model_dir=here, demo=True, labels_dir=tmp_path/'labels', split='held_out')
    steps = [(commands['unsupervised']['train'], 'a', ''), (commands['supervised']['train'], 'b', 'a'), (commands['supervised']['predict'], 'c', 'b')]
    for command, out, before in steps:
        text = command.format(**words, output_dir=tmp_path/out, model_initialization_dir=tmp_path/before).replace('python ', f'{sys.executable} ', 1)
        done = subprocess.run(text, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    t = pd.read_parquet(tmp_path/'c'/'predictions.parquet')
    assert list(t) == ['subject_id', 'prediction_time', 'boolean_value', 'predicted_boolean_value', 'predicted_boolean_probability'] and len(t) > 3
    assert (t.boolean_value == t.subject_id % 2).all() and t.predicted_boolean_probability.between(0, 1).all()
