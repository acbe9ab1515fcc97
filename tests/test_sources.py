"`mmsn.sources` in bulk: names of transformers forth and back, files that may not be opened, stems of one and three channels, starts of models, third-party encoders."
import dataclasses, importlib.util, json, math, os, pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.test import expect_fail, test_close as close, test_eq as eq
from safetensors.torch import save_file

from mmsn.convert import save_transformers
from mmsn.data.cohort import ModalityInfo
from mmsn.data.synthetic import draw_images, draw_truth
from mmsn.encoders.vit import ViT
from mmsn.evaluate.features import extract_features, feature_matrix, fingerprint
from mmsn.model import MMSN
from mmsn.options import Config, Fusion, Head, ImageEncoder, ImageModality, ImageViews, InputError, Loss, SeriesEncoder, SeriesModality, SeriesViews
from mmsn.sources import (IMAGENET, ImageWeights, fold_channels, for_images, from_published, from_transformers, init_model, load_encoder, open_encoder,
                          read_source, read_weights, renormalise, shape_of, to_transformers, transformers_names, unfold_channels)
from mmsn.testing import toy_cohort

transformers = pytest.importorskip('transformers')


def theirs_and_ours(channels=3, seed=0):
    "A ViTMSNModel with random weights, and a `ViT` of the same shape with other ones."
    torch.manual_seed(seed)
    shape = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512, image_size=64, patch_size=16, num_channels=channels)
    theirs = transformers.ViTMSNModel(transformers.ViTMSNConfig(**shape)).eval()
    for p in theirs.parameters(): p.data += .1*torch.randn_like(p)
    return theirs, ViT(ImageEncoder(dim=128, depth=3, heads=2, channels=channels), 64).eval()


def apart(theirs, ours, x):
    "Largest difference of the tokens."
    with torch.no_grad(): return (theirs(x, interpolate_pos_encoding=True).last_hidden_state - ours.tokens(x)).abs().max().item()


def published(path, encoder, prototypes=torch.zeros(1024, 256), prefix='module.', **more):
    "Write a file of the published layout."
    head = {'fc.fc1.weight': torch.zeros(8, 128), 'fc.last_layer.bias': torch.zeros(4)}
    torch.save(dict(target_encoder={prefix + k: v for k, v in (encoder | head).items()}, prototypes=prototypes, **more), path)
    return path


@pytest.fixture
def w(tmp_path, monkeypatch):
    "A network in both libraries, its published file msn.pth.tar and its transformers folder hf in the folder of the test, and grey images."
    monkeypatch.chdir(tmp_path)
    theirs, ours = theirs_and_ours()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    q, state = torch.randn(16, 8), ours.state_dict()
    published('msn.pth.tar', state, q)
    theirs.save_pretrained('hf')
    grey = torch.as_tensor(draw_images(draw_truth(64, np.random.default_rng(0)), 64, np.random.default_rng(1))).float()[:, None]/255
    as_rgb = (grey.repeat(1, 3, 1, 1) - torch.tensor(IMAGENET[0]).view(3, 1, 1))/torch.tensor(IMAGENET[1]).view(3, 1, 1)
    with torch.no_grad(): three = ours(as_rgb)
    config = ImageEncoder(dim=128, depth=3, heads=2, patch=16, channels=3)
    return SimpleNamespace(theirs=theirs, ours=ours, state=state, q=q, grey=grey, m=grey.mean().item(), s=grey.std().item(), as_rgb=as_rgb, three=three, config=config, size=64)


def test_names():
    four, five = transformers_names(1, 4), transformers_names(1, 5)
    eq((len(four), sum(map(len, five.values()))), (18, 22))
    whole = ViT(ImageEncoder(dim=64, depth=1, heads=1), 32).state_dict()
    eq(set(four), set(whole)); eq(set(five), set(whole))
    with expect_fail(InputError, 'should be 4 or 5'): transformers_names(1, 3)


def test_forth_and_back(w):
    for h, wide in ((64, 64), (96, 96), (32, 80), (112, 112)): assert apart(w.theirs, w.ours, torch.randn(4, 3, h, wide)) < 1e-5
    other, start = theirs_and_ours(seed=1)
    assert apart(other, start, torch.randn(4, 3, 64, 64)) > .1
    other.load_state_dict(to_transformers(start.state_dict()))
    assert apart(other, start, torch.randn(4, 3, 96, 96)) < 1e-5
    for layout in (4, 5):
        there = to_transformers(w.state, layout)
        more = {'classifier.weight': torch.zeros(2, 128), 'vit.embeddings.mask_token': torch.zeros(1, 1, 128)}
        back = from_transformers({f'vit.{k}': v for k, v in there.items()} | more)
        eq(set(back), set(w.state))
        assert all(torch.equal(v, w.state[k]) for k, v in back.items())
        there['layers.0.extra'] = torch.zeros(1)
        with expect_fail(InputError, 'which a vision transformer' if layout == 5 else 'these weights lack'): from_transformers(there)


def test_names_of_the_installed_version(w):
    eq(set(to_transformers(w.state)), set(w.theirs.state_dict()))
    classifier = transformers.ViTMSNForImageClassification(w.theirs.config)
    eq(len(from_transformers(classifier.state_dict())), len(w.state))
    with expect_fail(InputError, 'these weights lack'): from_transformers({})
    for kw in (dict(pool='mean'), dict(stem='conv')):
        with expect_fail(InputError, 'takes pool=cls and stem=linear'): to_transformers(ViT(ImageEncoder(dim=64, depth=1, heads=1, **kw), 32).state_dict())


def test_files_that_are_read(w):
    for prefix, path, more in (('module.', 'msn.pth.tar', {}), ('', 'plain.pt', dict(epoch=800, opt=dict(lr=.001))), ('module.module.', 'twice.pth', {})):
        encoder, prototypes = read_weights(published(path, w.state, w.q, prefix, **more))
        assert torch.equal(prototypes, w.q) and all(torch.equal(encoder[k], v) for k, v in w.state.items()) and set(encoder) == set(w.state)
    save_file({'target_encoder.' + k: v.half() for k, v in w.state.items()} | dict(prototypes=w.q), 'msn.safetensors')
    encoder, prototypes = read_weights('msn.safetensors')
    eq(set(encoder), set(w.state))
    assert torch.equal(prototypes, w.q) and encoder['norm.weight'].dtype == torch.float32
    torch.save(dict(target_encoder=w.state), 'bare.pt')
    assert read_weights('bare.pt')[1] is None


class Attack:
    "Unpickling this would make a folder."
    def __reduce__(self): return os.mkdir, ('attacked',)


def test_files_that_are_refused(w, monkeypatch):
    "One line each, nothing is run, whatever the environment says; and the attack was real."
    state = w.state
    torch.save(dict(target_encoder=Attack()), 'zip.pt')
    torch.save(dict(target_encoder=state, prototypes=Attack()), 'old.pth', _use_new_zipfile_serialization=False)
    for protocol in (2, 4): Path(f'raw{protocol}.pth.tar').write_bytes(pickle.dumps(dict(target_encoder=Attack()), protocol))
    Path('disguised.safetensors').write_bytes(Path('zip.pt').read_bytes())
    Path('empty.pt').touch()
    Path('text.pt').write_text('hello')
    Path('half.pt').write_bytes(Path('msn.pth.tar').read_bytes()[:5000])
    torch.save(torch.nn.Linear(2, 2), 'module.pt')
    torch.save(dict(target_encoder=dict(a='b')), 'words.pt')
    torch.save(dict(target_encoder=state | {'norm.bias': torch.full((128,), math.nan)}), 'nan.pt')
    torch.save(dict(target_encoder=state, prototypes=w.q[0]), 'one.pt')
    Path('weights.bin').touch()
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    for name in ('zip.pt', 'old.pth', 'raw2.pth.tar', 'raw4.pth.tar', 'disguised.safetensors', 'module.pt', 'empty.pt', 'text.pt', 'half.pt', 'words.pt',
                 'nan.pt', 'one.pt', 'weights.bin', 'nowhere.pt'):
        with pytest.raises(InputError) as e: read_weights(name)
        assert '\n' not in str(e.value) and name in str(e.value)
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    assert not Path('attacked').exists()
    torch.load('zip.pt', weights_only=False)
    assert Path('attacked').is_dir()


def test_shapes(w):
    encoder, _ = read_weights('msn.pth.tar')
    state = from_published(encoder)
    config, size = shape_of(state)
    eq((config, size), (w.config, 64))
    odd = ViT(ImageEncoder(dim=448, depth=1, heads=7, mlp_ratio=61.5/448, channels=3), 16).state_dict()     # 448*(61/448) < 61
    eq(set(from_published(odd)), set(odd))
    vit = ViT(config, size)
    vit.load_state_dict(state)
    assert apart(w.theirs, vit.eval(), torch.randn(2, 3, 64, 64)) < 1e-5
    for name, patch in (('tiny', 16), ('small', 16), ('base', 4), ('base', 8), ('large', 7), ('large', 16)):
        part = ImageEncoder(size=name, patch=patch, channels=3)
        with torch.device('meta'): shapes = ViT(part, 224).state_dict()
        eq(shape_of(shapes), (ImageEncoder(**dataclasses.asdict(part) | dict(size='')), 224))
    for change, says in ((dict(extra=w.q), 'hold extra'), ({'norm.bias': torch.zeros(3)}, 'norm.bias is (3,)'), (dict(pos_embed=torch.zeros(1, 15, 128)), 'not a square'),
                         ({'patch_embed.proj.weight': torch.zeros(100, 3, 16, 16)}, 'heads'), ({'patch_embed.proj.weight': torch.zeros(128, 4, 16, 16)}, '4 channels')):
        with expect_fail(InputError, says): from_published(state | change)
    with expect_fail(InputError, 'lack blocks.1.norm1.bias'): from_published({k: v for k, v in state.items() if k != 'blocks.1.norm1.bias'})


def test_channels():
    torch.manual_seed(0)
    w, b, x, w3 = torch.randn(8, 1, 4, 4), torch.randn(8), torch.randn(5, 1, 4, 4), torch.randn(8, 3, 4, 4)
    conv, colour = torch.nn.functional.conv2d, torch.randn(5, 3, 4, 4)
    close(fold_channels(unfold_channels(w)), w, 1e-6)
    eq(fold_channels(unfold_channels(w)).shape, w.shape)
    close(conv(x.repeat(1, 3, 1, 1), unfold_channels(w), b), conv(x, w, b), 1e-5)
    close(conv(colour, unfold_channels(w), b), conv(colour.mean(1, keepdim=True), w, b), 1e-5)
    close(conv(x.repeat(1, 3, 1, 1), w3, b), conv(x, fold_channels(w3), b), 1e-5)
    for old, new in ((IMAGENET, (.5, .25)), ((.5, .25), IMAGENET), (IMAGENET, IMAGENET)):
        there = renormalise(w3, b, old, new); again = renormalise(*there, new, old)
        close(again[0], w3, 1e-5); close(again[1], b, 1e-4)


def test_for_images(w):
    found, m, s = ImageWeights('weights', w.config, 64, w.state, *IMAGENET), w.m, w.s
    for channels, normal in ((1, (None, None)), (1, (m, s)), (3, (None, None)), (3, (m, s)), (3, ((.4, .5, .6), (.1, .2, .3)))):
        got = for_images(found, channels, *normal)
        eq((got.config.channels, len(got.mean), len(got.std)), (channels,)*3)
        for twice in (got, for_images(got, 4 - channels, .3, .2)):
            fresh = ViT(twice.config, 64).eval(); fresh.load_state_dict(twice.state)
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (twice.mean, twice.std))
            close(fresh((w.grey - mean)/std), w.three, 1e-4)
    assert for_images(found, 3).state['patch_embed.proj.weight'] is w.state['patch_embed.proj.weight']
    close(for_images(found, 1).mean, [sum(IMAGENET[0])/3], 1e-9)
    with expect_fail(InputError, 'should be 1 or 3'): for_images(found, 2)
    with expect_fail(InputError, 'one for each of 1'): for_images(found, 1, (.1, .2, .3), .2)


def test_load_encoder(w):
    for source in ('msn.pth.tar', 'hf'):
        c1, s1 = load_encoder(source, mean=w.m, std=w.s)
        fresh = ViT(c1, 64).eval(); fresh.load_state_dict(s1)
        eq(c1, dataclasses.replace(w.config, channels=1)); close(fresh((w.grey - w.m)/w.s), w.three, 1e-4)
        c3, s3 = load_encoder(source, channels=3)
        eq(c3, w.config); assert all(torch.equal(v, s3[k]) for k, v in w.state.items())
    about = json.loads(Path('hf/config.json').read_text())
    for wrong, says in ((dict(layer_norm_eps=1e-12), 'layer_norm_eps=1e-12'), (dict(hidden_act='relu'), 'hidden_act'), (dict(model_type='vit'), "model_type='vit'"),
                        (dict(num_attention_heads=5), 'heads')):
        Path('hf/config.json').write_text(json.dumps(about | wrong))
        with expect_fail(contains=says): load_encoder('hf')
    Path('hf/config.json').write_text('no')
    with expect_fail(InputError, 'cannot be read as JSON'): load_encoder('hf')
    Path('folder').mkdir()
    with expect_fail(InputError, 'no encoder'): load_encoder('folder')
    with expect_fail(InputError, 'no encoder at nowhere'): load_encoder('nowhere')


def model_of(w, prototypes=16, output=8, pixels=64, series=True, **encoder):
    "A small MMSN for 64-pixel chests of mean m and standard deviation s, and a chart."
    image = ImageModality(encoder=ImageEncoder(**dict(dim=128, depth=3, heads=2) | encoder), views=ImageViews(random_size=pixels, focal_size=32, focal=2))
    chart = SeriesModality(encoder=SeriesEncoder(hidden=8, dim=8), views=SeriesViews(focal=2))
    hr = dict(name='hr', kind='continuous', columns=[0, 1], mask=1, unit='', normal=80., low=0., high=200., categories=None)
    infos = dict(cxr=ModalityInfo.from_dict('cxr', dict(kind='image', height=64, width=64, mean=w.m, std=w.s)),
                 ehr=ModalityInfo.from_dict('ehr', dict(kind='timeseries', columns=['hr', 'mask'], mean=[80., 0.], std=[10., 1.], timestep=1., channels=[hr])))
    return MMSN(Config(modalities=dict(cxr=image) | (dict(ehr=chart) if series else {}), head=Head(hidden=16, depth=1, output=output), loss=Loss(prototypes=prototypes)), infos)


def test_init_model(w):
    x = (w.grey - w.m)/w.s
    model = model_of(w)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    init_model(model, 'msn.pth.tar')
    for network in (model.online, model.target): close(network.encoders['cxr'].eval()(x), w.three, 1e-4)
    assert torch.equal(model.prototypes, w.q) and model.prototypes.requires_grad
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, fresh[k])}
    eq(moved, {'prototypes'} | {f'{n}.encoders.cxr.{k}' for n in ('online', 'target') for k in w.state})

    smaller = model_of(w, pixels=48, channels=3, prototypes=9)       # resized as the source does it itself
    init_model(smaller, 'hf')
    rgb48, grey48 = (torch.nn.functional.interpolate(v, 48) for v in (w.as_rgb, x))
    close(smaller.online.encoders['cxr'].eval()(grey48), w.ours(rgb48), 1e-4)

    model.save_pretrained('ours')                                    # of two modalities, into a model of one
    again = model_of(w, series=False)
    init_model(again, 'ours')
    close(again.target.encoders['cxr'](x), w.three, 1e-4)
    sines = dict(pool='mean', stem='conv', positions='sincos')
    model_of(w, series=False, **sines).save_pretrained('sines')
    other = model_of(w, pixels=32, **sines)
    init_model(other, 'sines')
    eq(other.online.encoders['cxr'].pos_embed.shape[1], 4)

    for kw, says in ((dict(dim=64), "does not fit modality 'cxr': set modalities.cxr.encoder.dim=128"),
                     (dict(patch=8, pool='mean'), 'modalities.cxr.encoder.patch=16 modalities.cxr.encoder.pool=cls'), (dict(positions='sincos'), 'positions=learned'),
                     (dict(size='tiny'), "set modalities.cxr.encoder.size='' modalities.cxr.encoder.dim=128")):
        with expect_fail(InputError, says): init_model(model_of(w, **kw), 'msn.pth.tar')
    model_of(w, pixels=32, series=False, size='tiny').save_pretrained('tiny')
    with expect_fail(InputError, "'cxr': set modalities.cxr.encoder.size=tiny"): init_model(model, 'tiny')
    with expect_fail(InputError, "no image modality 'ehr' (it has cxr)"): init_model(model, 'ours', 'ehr')


def test_open_encoder(tmp_path):
    "Every kind of source embeds the same patients; one network under several names agrees; what does not fit is refused."
    tmp, cohort = tmp_path, toy_cohort(tmp_path/'toy')
    vit = ImageModality(encoder=ImageEncoder(dim=64, depth=3, heads=2, patch=4), views=ImageViews(random=1, focal=0, random_size=16))
    chart = SeriesModality(encoder=SeriesEncoder(hidden=16, dim=16), views=SeriesViews(random=1, focal=0))
    config = Config(modalities=dict(cxr=vit, ehr=chart), fusion=Fusion(dim=24), head=Head(hidden=8, output=8), loss=Loss(prototypes=4))
    run = MMSN.from_config(config, cohort).eval()
    run.save_pretrained(tmp/'run'/'encoder')
    save_transformers(read_source(tmp/'run'/'encoder'), tmp/'msn', layout=4)
    torch.manual_seed(0)
    encoders = dict(run=open_encoder(tmp/'run', cohort), exported=open_encoder(tmp/'run'/'encoder', cohort), transformers=open_encoder(tmp/'msn', cohort),
                    weights=open_encoder(tmp/'msn'/'model.safetensors', cohort), resnet=open_encoder('torchvision:resnet18', cohort, pretrained=False))
    if importlib.util.find_spec('timm'): encoders['timm'] = open_encoder('timm:vit_small_patch16_224', cohort, pretrained=False)
    else:
        with expect_fail(InputError, 'pip install timm'): open_encoder('timm:vit_small_patch16_224', cohort)
    rows, tables = np.arange(24), {}
    for name, encoder in encoders.items():
        tables[name] = extract_features(encoder, cohort, rows, patches=0.)
        eq(np.isnan(feature_matrix(tables[name], 'cxr')).all(1), ~cohort.present('cxr')[rows])
    pd.testing.assert_frame_equal(tables['run'], tables['exported'])
    close(np.nan_to_num(feature_matrix(tables['run'], 'cxr')), np.nan_to_num(feature_matrix(tables['transformers'], 'cxr')), 1e-4)
    assert fingerprint(encoders['run']) == fingerprint(run)
    assert len({fingerprint(e) for e in (*encoders.values(), open_encoder('torchvision:resnet18', cohort, pretrained=False))}) >= 4

    for name in ('weights', 'resnet'):
        whole, half = (feature_matrix(extract_features(encoders[name].train(), cohort, rows, patches=p), 'cxr') for p in (0., .5))
        again = feature_matrix(extract_features(encoders[name], cohort, rows[::-1], patches=.5, batch_size=5), 'cxr')[::-1]
        seen = cohort.present('cxr')[rows]
        close(half[seen], again[seen], 1e-3)
        assert abs(whole - half)[seen].max(1).min() > 1e-3
    eq(np.isnan(extract_features(encoders['resnet'], cohort, rows, drop='cxr')['joint.0']).all(), True)
    with expect_fail(InputError, "no modality 'ehr' to drop"): encoders['resnet'].encode(cohort.batch(rows), drop=('ehr',))

    elsewhere = toy_cohort(tmp/'elsewhere', n=40)
    elsewhere.modalities['ehr'].info['columns'][0] = 'pulse'
    with expect_fail(InputError, 'pulse, rate'): open_encoder(tmp/'run', elsewhere)
    del elsewhere.modalities['cxr']
    with expect_fail(InputError, "reads modality 'cxr', which"): open_encoder(tmp/'run', elsewhere)
    with expect_fail(InputError, 'has no images'): open_encoder('torchvision:resnet18', elsewhere, pretrained=False)
    with expect_fail(InputError, 'no classifier'): open_encoder('torchvision:resnet17', cohort)
    with expect_fail(InputError, 'no encoder at'): open_encoder(tmp/'nowhere', cohort)
