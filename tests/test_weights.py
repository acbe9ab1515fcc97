"Weights as they are published: the full list of names, in every wrapping, through every door; and what is refused, with the prefix that was found."
import json, math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mmsn.testing as testing
from conftest import refused
from mmsn.convert import main as convert
from mmsn.encoders.vit import ViT
from mmsn.evaluate.evaluation import evaluate
from mmsn.model import MMSN
from mmsn.options import ImageEncoder, InputError
from mmsn.sources import open_encoder, read_source, read_weights
from mmsn.train import train

DIM, Q = 64, 8
SHAPE = dict(dim=DIM, depth=2, heads=1, patch=4, channels=3)


def encoder(seed=0, **kw):
    "The tensors of a small vision transformer, by the published names."
    torch.manual_seed(seed)
    state = ViT(ImageEncoder(**SHAPE | kw), 16).state_dict()
    return {k: v + .02*torch.randn_like(v) for k, v in state.items()}


def head():
    "The entries of a projection head of three layers with batch norms, by the published names."
    linear = lambda n, a, b: {f'fc.fc{n}.weight': torch.randn(b, a), f'fc.fc{n}.bias': torch.randn(b)}
    norm = lambda n, d: {f'fc.bn{n}.{k}': torch.ones(d) for k in ('weight', 'bias', 'running_mean', 'running_var')} | {f'fc.bn{n}.num_batches_tracked': torch.tensor(125_000)}
    return linear(1, DIM, 32) | norm(1, 32) | linear(2, 32, 32) | norm(2, 32) | linear(3, 32, Q)


WHOLE = encoder() | head()
pre = lambda prefix, state=WHOLE: OrderedDict((prefix + k, v) for k, v in state.items())
OTHER = encoder(seed=9)
FILES = {
    'published': ('w.pth.tar', dict(target_encoder=pre('module.'), prototypes=torch.randn(16, Q))),
    'with a run beside it': ('w.pth.tar', dict(encoder=pre('module.', OTHER), target_encoder=pre('module.'), prototypes=torch.randn(16, Q), opt=dict(state={}), epoch=800, loss=1.5, batch_size=16, world_size=8, lr=1e-3, scaler=None)),
    'no prefix': ('w.pt', dict(target_encoder=WHOLE)),
    'compiled': ('w.pt', dict(target_encoder=pre('module._orig_mod.'))),
    'compiled first': ('w.pt', dict(target_encoder=pre('_orig_mod.module.'))),
    'bare': ('w.pth', WHOLE),
    'bare, module': ('w.pth', pre('module.')),
    'backbone': ('w.pth', pre('backbone.') | {'head.weight': torch.zeros(3), 'head.count': torch.tensor(3)}),
    'encoder': ('w.pth', pre('encoder.') | {'decoder.weight': torch.zeros(3)}),
    'state_dict': ('w.pth', dict(state_dict=pre('module.encoder.'), epoch=3, arch='vit')),
    'model': ('w.pth', dict(model=WHOLE, optimizer={}, args=dict(lr=.1))),
    'model, model': ('w.pth', dict(model=dict(state_dict=pre('model.')))),
    'dino': ('w.pth', dict(student=pre('module.backbone.', OTHER) | {'module.head.last_layer.weight_g': torch.ones(3)}, teacher=pre('backbone.') | {'head.mlp.0.weight': torch.zeros(3)}, epoch=100, dino_loss=dict(center=torch.zeros(1, 3)))),
    'autoencoder': ('w.pth', dict(model=encoder() | {'mask_token': torch.zeros(1, 1, DIM), 'decoder_embed.weight': torch.zeros(4, DIM), 'decoder_blocks.0.norm1.weight': torch.zeros(4)})),
    'student only': ('w.pth', dict(student=pre('module.backbone.'))),
    'lightning': ('w.ckpt', {'state_dict': pre('model.'), 'epoch': 3, 'global_step': 10, 'pytorch-lightning_version': '2.4', 'optimizer_states': [dict(state={}, param_groups=[])], 'lr_schedulers': [], 'loops': {}, 'callbacks': {}, 'hyper_parameters': dict(lr=.1)}),
    'lightning, two': ('w.ckpt', dict(state_dict=pre('student.backbone.', OTHER) | pre('teacher.backbone.') | {'student.head.w': torch.zeros(2), 'prototypes.weight': torch.zeros(4, 2)})),
    'lightning, compiled': ('w.ckpt', dict(state_dict=pre('model._orig_mod.encoder.'))),
    'both flat': ('w.pth', pre('encoder.', OTHER) | pre('target_encoder.')),
    'momentum': ('w.pth', pre('encoder.', OTHER) | pre('momentum_encoder.')),
    'half': ('w.pt', dict(target_encoder={k: v.half() if v.is_floating_point() else v for k, v in WHOLE.items()})),
    'bfloat16': ('w.pt', dict(target_encoder={k: v.bfloat16() if v.is_floating_point() else v for k, v in WHOLE.items()})),
    'parameters': ('w.pt', dict(target_encoder={k: torch.nn.Parameter(v, requires_grad=v.is_floating_point()) if v.is_floating_point() else v for k, v in WHOLE.items()})),
    'bad head': ('w.pt', dict(target_encoder=WHOLE | {'fc.fc1.weight': torch.full((2, 2), math.nan), 'fc.note': 'text'})),
    'hub': ('pytorch_model.bin', WHOLE),
    'safetensors': ('w.safetensors', pre('module.') | dict(prototypes=torch.randn(16, Q))),
    'safetensors, target': ('w.safetensors', pre('target_encoder.module.')),
}


def write(folder, name, content):
    path = folder/name
    save_file({k: v.contiguous() for k, v in content.items()}, path) if name.endswith('safetensors') else torch.save(content, path)
    return path


@pytest.mark.parametrize('case', FILES)
def test_every_wrapping_opens(case, tmp_path):
    state, prototypes = read_weights(path := write(tmp_path, *FILES[case]))
    want = encoder()
    assert set(state) == set(want)
    near = 1e-2 if case in ('half', 'bfloat16') else 0
    for k in want: torch.testing.assert_close(state[k], want[k], atol=near, rtol=near)
    assert (prototypes is None) == ('prototypes' not in FILES[case][1])
    read = read_source(path)
    assert (read.config.dim, read.config.depth, read.config.heads, read.config.patch, read.size) == (DIM, 2, 1, 4, 16)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    return testing.toy_cohort(tmp_path_factory.mktemp('toy')/'cohort', n=60)


@pytest.mark.parametrize('case', ['published', 'dino', 'lightning', 'safetensors'])
def test_every_door(case, tmp_path, cohort, capsys):
    "mmsn-convert both ways, train.init_from and an evaluation of the file itself."
    path, want = write(tmp_path, *FILES[case]), encoder()
    convert([str(path), str(tmp_path/'mmsn')]); convert([str(path), str(tmp_path/'hf'), '--to', 'transformers'])
    assert '64/2/1' in capsys.readouterr().out
    for folder in ('mmsn', 'hf'):
        state = read_source(tmp_path/folder).state
        torch.testing.assert_close(state['blocks.1.attn.qkv.weight'], want['blocks.1.attn.qkv.weight'])
    part = dict(encoder=dict(dim=DIM, depth=2, heads=1, patch=4, pool='cls', positions='learned'))
    config = testing.toy_config('cxr', cxr=part, train=dict(threads=1, log_every=1, run=str(tmp_path/'run'), init_from=str(path), probe_every=0), data=dict(cohort=str(cohort.folder), workers=0),
                                optim=dict(batch_size=16, epochs=1, warmup_epochs=0., lr=1e-12))
    train(config)
    trained = MMSN.from_pretrained(tmp_path/'run'/'encoder').target.encoders['cxr'].state_dict()
    torch.testing.assert_close(trained['blocks.1.mlp.fc1.weight'], want['blocks.1.mlp.fc1.weight'], atol=1e-6, rtol=0)
    assert open_encoder(path, cohort).config.modalities
    page = evaluate(path, [f'data.cohort={cohort.folder}', 'protocols=[knn]', 'bootstrap=5', 'pictures=false', 'cache=false', 'baselines=false'], tmp_path/'report', page=False)
    assert (page.parent/'knn.csv').is_file()


class Foreign:
    pass


def wrong():
    cut = {k: v for k, v in WHOLE.items() if k != 'blocks.1.norm1.bias'}
    round_ = {'state_dict': {}}
    round_['state_dict'] = round_
    expand = encoder() | {'norm.bias': torch.zeros(1).expand(10**12)}
    yield 'unknown prefix', 'w.pt', pre('image_tower.visual.'), "begin with 'image_tower.visual.'"
    yield 'unknown prefix below', 'w.pt', dict(state_dict=pre('model.vision.')), "begin with 'model.vision.'"
    yield 'two networks', 'w.pt', pre('model.') | pre('backbone.', OTHER), "several networks, 'backbone.' and 'model.'"
    yield 'a tensor lacks', 'w.pt', dict(target_encoder=cut), 'blocks.1.norm1.bias'
    yield 'more than it has', 'w.pt', WHOLE | {'blocks.0.ls1.gamma': torch.ones(DIM)}, 'blocks.0.ls1.gamma'
    yield 'another network', 'w.pt', {'conv1.weight': torch.zeros(8, 3, 7, 7), 'layer1.0.bn1.num_batches_tracked': torch.tensor(3)}, 'no vision transformer of the published layout|should be a tensor'
    yield 'counter in the encoder', 'w.pt', WHOLE | {'blocks.0.count': torch.tensor(3)}, 'blocks.0.count should be a tensor'
    yield 'nan', 'w.pt', dict(target_encoder=WHOLE | {'norm.bias': torch.full((DIM,), math.nan)}), 'norm.bias should be a tensor of finite'
    yield 'itself', 'w.pt', round_, 'has no target_encoder'
    yield 'expanded', 'w.pt', expand, 'norm.bias should be a tensor of finite'
    yield 'sparse', 'w.pt', WHOLE | {'norm.bias': torch.zeros(DIM).to_sparse()}, 'norm.bias should be'
    yield 'complex', 'w.pt', WHOLE | {'norm.bias': torch.zeros(DIM, dtype=torch.complex64)}, 'norm.bias should be'
    yield 'nothing', 'w.pt', {}, 'has no target_encoder.*nothing'
    yield 'a list', 'w.pt', [torch.zeros(3)], 'has no target_encoder'
    yield 'a tensor', 'w.pt', torch.zeros(3), 'has no target_encoder'
    yield 'numbers', 'w.pt', dict(epoch=3, lr=.1), 'has no target_encoder.*epoch, lr'
    yield 'another ending', 'w.pkl', WHOLE, 'should end in'
    yield 'prototypes of one row', 'w.pt', dict(target_encoder=WHOLE, prototypes=torch.zeros(4)), 'should be a matrix'

WRONG = {name: rest for name, *rest in wrong()}

@pytest.mark.parametrize('case', WRONG)
def test_what_is_refused(case, tmp_path, capsys, monkeypatch):
    import re
    name, content, message = WRONG[case]
    line = refused(convert, [write(tmp_path, name, content), tmp_path/'out'], capsys)
    assert re.search(message, line), line
    assert not (tmp_path/'out').exists()


def test_a_foreign_object_is_never_opened(tmp_path, capsys):
    "Lightning keeps objects of other libraries in `hyper_parameters`; opening them could run code."
    path = tmp_path/'w.ckpt'
    torch.save(dict(state_dict=pre('model.'), hyper_parameters=Foreign()), path)
    assert 'test_weights.Foreign), and opening that could run code: refused' in refused(convert, [path, tmp_path/'out'], capsys)
