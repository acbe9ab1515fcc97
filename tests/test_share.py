"A card beside every exported encoder, the hub (never by itself), ONNX beside torch, predictions for meds-evaluation, labels of ACES."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mmsn import MMSN, open_encoder
from mmsn.card import model_card, write_card
from mmsn.convert import main as convert
from mmsn.data.cohort import Cohort
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
