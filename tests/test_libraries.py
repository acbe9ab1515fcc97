"Image networks of other libraries by name: their features are the library's own, and what cannot be had is one line."
import json, pickle

import numpy as np
import pytest
import torch
from torch import nn

from mmsn.evaluate.features import extract_features, feature_matrix
from mmsn.libraries import _layers_of, open_library
from mmsn.options import InputError
from mmsn.sources import open_encoder
from mmsn.testing import toy_cohort

PROCESSOR = dict(image_processor_type='ViTImageProcessor', image_mean=[.4, .5, .6], image_std=[.2, .25, .3],
                 size=dict(height=32, width=32))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return toy_cohort(tmp_path_factory.mktemp('toy')/'cohort', n=24)


@pytest.fixture
def saved(tmp_path):
    def save(model, processor=PROCESSOR):
        model.save_pretrained(tmp_path/'model')
        if processor: (tmp_path/'model'/'preprocessor_config.json').write_text(json.dumps(processor))
        return f'hf:{tmp_path/"model"}'
    return save


def small(kind, **more):
    import transformers
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16)
    return getattr(transformers, f'{kind}Config')(**sizes | more)


def test_a_trained_pooling_is_used(saved):
    from transformers import ViTModel
    torch.manual_seed(0)
    vit = ViTModel(small('ViT')).eval()
    network, x = open_library(saved(vit)), torch.randn(3, 3, 32, 32)
    assert network.size == 32 and network.mean == (.4, .5, .6)
    torch.testing.assert_close(network.net.eval()(x), vit(pixel_values=x).pooler_output)


def test_the_image_half_of_a_pair(saved):
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = dict(sizes, vocab_size=99, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(sizes, image_size=32, patch_size=16), projection_dim=16)).eval()
    network, x = open_library(saved(clip)), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network.net.eval()(x), clip.vision_model(pixel_values=x).pooler_output)


def test_a_text_model_is_refused(saved):
    from transformers import BertConfig, BertModel
    model = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(InputError, match='is no image model'): open_library(saved(model))


def test_weights_that_do_not_fill_the_network(saved, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import ViTModel
    name = saved(ViTModel(small('ViT')))
    file = tmp_path/'model'/'model.safetensors'
    state = {k: v for k, v in load_file(file).items() if 'layernorm_before' not in k}
    save_file(state, file, metadata=dict(format='pt'))
    with pytest.raises(InputError, match='do not fill its network'): open_library(name)


def test_pickled_weights_are_not_read(saved, tmp_path):
    from transformers import ViTModel
    vit = ViTModel(small('ViT'))
    name = saved(vit)
    (tmp_path/'model'/'model.safetensors').unlink()
    torch.save(vit.state_dict(), tmp_path/'model'/'pytorch_model.bin')
    with pytest.raises(InputError, match='could not be opened'): open_library(name)


def test_code_beside_a_model_does_not_run(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='own', auto_map=dict(AutoConfig='own.Own', AutoModel='own.Model'))))
    (tmp_path/'own.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")\n')
    with pytest.raises(InputError, match='could not be opened'): open_library(f'hf:{tmp_path}')
    assert not (tmp_path/'ran').exists()


def test_encodes_a_cohort(saved, cohort):
    from transformers import ViTModel
    torch.manual_seed(0)
    encoder = open_encoder(saved(ViTModel(small('ViT'))), cohort)
    features = feature_matrix(extract_features(encoder, cohort, np.arange(12)), 'cxr')
    assert features.shape == (12, 32) and (np.isnan(features).all(1) == ~cohort.present('cxr')[:12]).all()
    other = feature_matrix(extract_features(encoder.untrained(1), cohort, np.arange(12)), 'cxr')
    assert np.nanmax(abs(other - features)) > .01


def test_missing_packages_are_one_line(monkeypatch):
    import sys
    for name, package in (('timm', 'timm'), ('xrv', 'torchxrayvision')):
        monkeypatch.setitem(sys.modules, package, None)
        if name == 'xrv': monkeypatch.setitem(sys.modules, 'torchxrayvision.models', None)
        with pytest.raises(InputError, match=f'pip install {package}'): open_library(f'{name}:anything')


def test_timm():
    pytest.importorskip('timm')
    network = open_library('timm:vit_tiny_patch16_224', pretrained=False)
    assert network.size == 224 and network.net.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 192)


def test_xrv_reads_the_pickle_of_a_whole_network(monkeypatch, tmp_path):
    xrv = pytest.importorskip('torchxrayvision.models')
    torch.manual_seed(0)
    published = xrv.DenseNet(weights=None, num_classes=18).eval()
    torch.save(published, tmp_path/'published.pt')
    monkeypatch.setattr(xrv, 'get_weights', lambda name: tmp_path/'published.pt')
    network, x = open_library('xrv:densenet121-res224-all'), torch.rand(2, 1, 64, 64)
    seen = (x - network.mean[0])/network.std[0]
    torch.testing.assert_close(seen, (2*x - 1)*1024, rtol=1e-5, atol=1e-3)      # the range of that package
    torch.testing.assert_close(network.net.eval()(seen), published.features2(seen))


class Trap:
    def __reduce__(self): return open, ('ran', 'w')


def test_a_pickle_that_would_call_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = nn.Sequential(nn.Linear(2, 1))
    layers.trap = Trap()
    torch.save(layers, 'whole.pt')
    with pytest.raises(InputError, match='could run code'): _layers_of('whole.pt', [])
    with open('plain.pkl', 'wb') as f: pickle.dump(Trap(), f)
    with pytest.raises(InputError): _layers_of('plain.pkl', [])
    assert not (tmp_path/'ran').exists()
