"The nine published config files of the earlier academic code, key for key: every value arrives, and every key counts."
import pytest
from fastcore.test import test_eq as same, test_fail as fails
from omegaconf import OmegaConf

from mmsn.config import _walk
from mmsn.options import InputError
from mmsn.seed_config import DIRECT, LINEAR_NAMED, LINEAR_RULES, NAMED, RULES, flat_values, is_linear, read_seed_config, translate

CRITERION = '''
criterion: {{batch_size: 64, temperature: 0.1, start_sharpen: 0.25, final_sharpen: 0.25, me_max: true, memax_weight: 1.0,
            use_ent: true, ent_weight: 0.0, use_sinkhorn: true, num_proto: {}}}'''
OPTIMIZATION = '''
optimization: {{epochs: {}, warmup: 15, start_lr: 2e-4, lr: 1e-3, final_lr: 1e-6, weight_decay: 0.04, final_weight_decay: 0.4, clip_grad: 3.0}}'''

msn_vits16 = CRITERION.format(1024) + '''
data: {color_jitter_strength: 0.5, patch_drop: 0.15, rand_size: 224, focal_size: 96, rand_views: 1, focal_views: 10, label_smoothing: 0.0,
       pin_mem: true, num_workers: 10, image_folder: imagenet/, root_path: datasets/}
logging: {folder: logs/, write_tag: msn_vits16}
meta: {model_name: deit_small, hidden_dim: 2048, output_dim: 256, use_bn: true, use_pred_head: false, drop_path_rate: 0.0,
       load_checkpoint: false, read_checkpoint: null, bottleneck: 1, copy_data: false, use_fp16: false}''' + OPTIMIZATION.format(800)

msn_cxr_random = CRITERION.format(16) + '''
data: {color_jitter_strength: 0.5, patch_drop: 0.15, rand_size: 224, focal_size: 96, rand_views: 1, focal_views: 10, label_smoothing: 0.0,
       pin_mem: true, num_workers: 10, image_folder: mimic-cxr/, root_path: datasets/}
logging: {folder: logs/, write_tag: msn_cxr_random}
meta: {model_name: deit_small, hidden_dim: 2048, output_dim: 256, use_bn: true, use_pred_head: false, drop_path_rate: 0.0,
       load_checkpoint: false, read_checkpoint: null, bottleneck: 1, copy_data: false, use_fp16: false}''' + OPTIMIZATION.format(100)

msn_vits16_medfuse_cxr = CRITERION.format(32) + '''
data: {color_jitter_strength: 0.5, patch_drop: 0.15, rand_size: 224, focal_size: 96, rand_views: 1, focal_views: 10, label_smoothing: 0.0,
       pin_mem: true, num_workers: 10, image_folder: mimic-cxr/, root_path: datasets/}
logging: {folder: logs/, write_tag: msn_vits16_medfuse_cxr}
meta: {model_name: deit_small, hidden_dim: 2048, output_dim: 256, use_bn: true, use_pred_head: false, drop_path_rate: 0.0,
       load_checkpoint: true, read_checkpoint: weights/vits16_800ep.pth.tar, bottleneck: 1, copy_data: false, use_fp16: false}''' + OPTIMIZATION.format(200)

msn_ehr_lstm = CRITERION.format(64) + '''
data: {modality: ehr, distributed: false, augmentation: sampling_rotation_gaussian, views: 11, label_smoothing: 0.0, pin_mem: true, num_workers: 18}
logging: {folder: logs/, write_tag: msn_ehr_lstm}
meta: {model_name: lstm, hidden_dim: 1024, output_dim: 128, use_bn: true, use_pred_head: false, drop_path_rate: 0.0,
       load_checkpoint: false, read_checkpoint: null, bottleneck: 1, copy_data: false, use_fp16: false}
evaluation: {eval: true, fname: lineval_medfuse_ehr.yaml}''' + OPTIMIZATION.format(100)

msn_fusion_random = CRITERION.format(64) + '''
data: {color_jitter_strength: 0.5, patch_drop: 0.15, rand_size: 224, focal_size: 96, rand_views: 1, focal_views: 10, label_smoothing: 0.0,
       pin_mem: true, num_workers: 18, image_folder: mimic-cxr/, root_path: datasets/, ehr_augmentation: gaussian}
logging: {folder: logs/, write_tag: msn_fusion_random}
meta: {model_name: deit_small, hidden_dim: 2048, output_dim: 256, use_bn: true, use_pred_head: false, drop_path_rate: 0.0,
       load_checkpoint: false, read_checkpoint: null, bottleneck: 1, copy_data: false, use_fp16: false}''' + OPTIMIZATION.format(100)


tree = lambda text: OmegaConf.to_container(OmegaConf.create(text))
TRAINING = dict(msn_vits16=msn_vits16, msn_cxr_random=msn_cxr_random, msn_vits16_medfuse_cxr=msn_vits16_medfuse_cxr, msn_ehr_lstm=msn_ehr_lstm, msn_fusion_random=msn_fusion_random)
CONFIGS = {name: translate(tree(text))[0] for name, text in TRAINING.items()}
lineval = '''
meta: {{model_name: {}, master_port: 8888, load_checkpoint: false, training: true, copy_data: false, device: "cuda:0"}}
data: {{root_path: datasets/, image_folder: mimic-cxr/, num_classes: {}}}
optimization: {{weight_decay: 0.0, lr: 6.4, epochs: 100, num_blocks: 1, normalize: true}}
logging: {{folder: logs/lineval/, write_tag: {}, pretrain_path: {}}}'''
LINEVAL = dict(
    lineval_msn_vits16=lineval.format('deit_small', 1000, 'vits16', 'weights/vits16_800ep.pth.tar'),
    medfuse_cxr_vits16=lineval.format('deit_small', 14, 'cxr', 'logs/msn_vits16_medfuse_cxr'),
    medfuse_ehr=lineval.format('LSTM', 25, 'ehr', 'logs/msn_ehr_lstm'),
    medfuse_fusion=lineval.format('deit_small', 25, 'fusion', 'logs/msn_fusion_random'))


def other(value):
    "A value of the same type that is not this one."
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1 if value else .5
    words = dict(deit_small='deit_base', LSTM='deit_small', lstm='deit_small', ehr='cxr', gaussian='rotation', sampling_rotation_gaussian='rotation_gaussian')
    return words.get(value, f'other{value or ""}')


def outcome(t):
    "What becomes of a file: config and notes, or the reason why it is refused."
    try: c, notes = translate(t)
    except InputError as e: return None, [str(e)]
    return dict(_walk(c)), notes


def changed(text, section, **kw):
    t = tree(text); t.setdefault(section, {}).update(kw)
    return translate(t)


def test_values_of_training_files():
    made = CONFIGS
    for name, c in made.items():
        l, o, h = c.loss, c.optim, c.head
        same((o.batch_size, l.temperature, l.sharpen, l.final_sharpen, l.me_max_weight, l.entropy_weight, l.sinkhorn_iterations), (64, .1, .25, .25, 1., 0., 3))
        same((l.freeze_prototypes, l.label_smoothing, h.norm, h.predict), (False, 0., 'batch', 0))
        same((o.warmup_epochs, o.start_lr, o.lr, o.final_lr, o.weight_decay, o.final_weight_decay, o.clip), (15, 2e-4, 1e-3, 1e-6, .04, .4, 3.))
        same((c.name, c.train.run), (name, f'logs/{name}'))

    by = lambda f: [f(c) for c in made.values()]
    same(by(lambda c: c.loss.prototypes), [1024, 16, 32, 64, 64])
    same(by(lambda c: c.optim.epochs), [800, 100, 200, 100, 100])
    same(by(lambda c: (c.head.hidden, c.head.output)), [(2048, 256)]*3 + [(1024, 128), (2048, 256)])
    same(by(lambda c: c.data.workers), [10, 10, 10, 18, 18])
    same(by(lambda c: {n: m.kind for n, m in c.modalities.items()}), [dict(cxr='image')]*3 + [dict(ehr='timeseries'), dict(cxr='image', ehr='timeseries')])
    same(by(lambda c: c.train.init_from), ['', '', 'weights/vits16_800ep.pth.tar', '', ''])


def test_views_and_encoders():
    made = CONFIGS
    for name, c in made.items():
        if 'cxr' in c.modalities:
            e, v = c.modalities['cxr'].encoder, c.modalities['cxr'].views
            same((e.size, e.dim, e.depth, e.heads, e.patch, e.drop_path), ('small', 384, 12, 6, 16, 0.))
            same((v.random, v.focal, v.random_size, v.focal_size, v.patch_drop, v.brightness, v.contrast), (1, 10, 224, 96, .15, .4, .4))
        if 'ehr' in c.modalities:
            e, v = c.modalities['ehr'].encoder, c.modalities['ehr'].views
            same((e.name, v.random, v.focal), ('lstm', 1, 10))
            same((v.noise, v.focal_window), (.1, (1., 1.)))
    alone, fused = (made[n].modalities['ehr'].views for n in ('msn_ehr_lstm', 'msn_fusion_random'))
    same((alone.preset, alone.downsample, alone.reverse), ('sampling_rotation_gaussian', (1, 2, 3), .5))
    same((fused.preset, fused.downsample, fused.reverse), ('gaussian', (1,), 0.))


def test_linear_files():
    for text in LINEVAL.values():
        c, notes = translate(tree(text))
        t = tree(text)
        same((c.train.init_from, c.evaluate.fractions, c.name, c.train.run), (t['logging']['pretrain_path'], (1.,), t['logging']['write_tag'], f'logs/lineval/{t["logging"]["write_tag"]}'))
        same((c.evaluate.probe, c.evaluate.probe_lrs, c.evaluate.probe_epochs), ('sgd', (6.4,), 100))
        same(list(c.modalities), ['ehr' if t['meta']['model_name'] == 'LSTM' else 'cxr'])
        same(len(notes), len(LINEAR_NAMED))


def test_every_key_counts():
    "Whatever single key is changed, the config or the notes change: in the keys that the tables name, and nowhere else."
    changes_by_key = {}
    for name, text in (TRAINING | LINEVAL).items():
        config, notes = outcome(tree(text))
        for section, part in tree(text).items():
            for key, value in part.items():
                t = tree(text); t[section][key] = other(value)
                c, n = outcome(t)
                path, linear = f'{section}.{key}', name in LINEVAL
                assert (c, n) != (config, notes), f'{name}: {path} does nothing'
                changes_by_key.setdefault(path, set())
                if c is None: continue                       # refused: nobody overlooks that
                changed = [k for k in config if config[k] != c.get(k)]
                ours = (LINEAR_RULES if linear else DIRECT | RULES).get(path, (None, ''))[1].replace('image.', 'modalities.cxr.').replace('timeseries.', 'modalities.ehr.').split()
                consequences = dict(size='dim depth heads', preset='random_masks focal_masks focal_window noise downsample reverse')
                ours += [o.rsplit('.', 1)[0] + '.' + k for o in ours for k in consequences.get(o.rsplit('.', 1)[-1], '').split()]
                if set(c) == set(config): ours = [o for o in ours if o != 'modalities']      # the same modalities as before
                assert all(any(k == o or k.startswith(o + '.') for o in ours) for k in changed), (name, path, changed, ours)
                changes_by_key[path].update(changed)
    same(set(changes_by_key) | {'criterion.freeze_proto', 'meta.two_layer'}, set(DIRECT | RULES | NAMED | LINEAR_RULES | LINEAR_NAMED))   # none is left out


def test_other_keys():
    "Keys that the published files do not have, and twists that they do not show."
    assert changed(msn_vits16, 'criterion', freeze_proto=True)[0].loss.freeze_prototypes
    assert any('two_layer=true' in n for n in changed(msn_vits16, 'meta', two_layer=True)[1])
    same(changed(msn_vits16, 'criterion', me_max=False)[0].loss.me_max_weight, 0.)
    same(changed(msn_vits16, 'criterion', ent_weight=.5)[0].loss.entropy_weight, .5)
    same(changed(msn_vits16, 'criterion', use_sinkhorn=False)[0].loss.sinkhorn_iterations, 0)
    same(changed(msn_vits16, 'criterion', final_sharpen=.1)[0].loss.final_sharpen, .1)
    same(changed(msn_vits16, 'meta', use_pred_head=True)[0].head.predict, 1)
    same(changed(msn_vits16, 'meta', use_bn=False)[0].head.norm, 'none')
    same(changed(msn_vits16, 'data', label_smoothing=.1)[0].loss.label_smoothing, .1)
    same(changed(msn_vits16, 'data', color_jitter_strength=1.)[0].modalities['cxr'].views.contrast, .8)
    same(changed(msn_ehr_lstm, 'data', views=5)[0].modalities['ehr'].views.focal, 4)
    same(changed(msn_fusion_random, 'data', focal_views=3)[0].modalities['ehr'].views.focal, 3)
    assert 'random weights' in changed(msn_vits16, 'meta', read_checkpoint='x.pth')[1][0] + changed(msn_vits16, 'meta', read_checkpoint='x.pth')[1][1]
    fails(lambda: changed(msn_vits16, 'meta', model_name='resnet50'), contains='deit_SIZE')
    fails(lambda: changed(msn_ehr_lstm, 'data', modality='cxr'), contains='encodes no images')
    fails(lambda: changed(msn_ehr_lstm, 'data', views=0), contains='at least 1')
    fails(lambda: changed(msn_vits16, 'optimisation', lr=1), contains="did you mean 'optimization'")
    fails(lambda: changed(msn_vits16, 'logging', pretrain_path='x'), contains='unknown key')
    fails(lambda: changed(msn_ehr_lstm, 'data', augmentation='gausian'), contains='gausian')


def test_unknown_keys():
    known = DIRECT | RULES | NAMED
    same(flat_values(dict(criterion=dict(num_proto=16), optimization=dict(lr='1e-3'), meta=None), known), {'criterion.num_proto': 16, 'optimization.lr': 1e-3})
    for wrong in (dict(criterium={}), dict(criterion=dict(num_protos=16)), dict(criterion=dict(batch_size='many')), dict(criterion=16), dict(meta=dict(model=1))):
        with pytest.raises(InputError): flat_values(wrong, known)
    fails(lambda: is_linear(dict(optim=dict(lr=1))), contains='neither')


def test_refused_files(tmp_path):
    path = tmp_path/'msn_fusion_random.yaml'
    path.write_text(msn_fusion_random)
    (tmp_path/'list.yaml').write_text('- a')
    wrong = [dict(path=path, linear=True), dict(path=path, modalities=dict(a='image', b='image')), dict(path=path, overrides=['optim.lrr=1']),
             dict(path=path, overrides=['lr']), dict(path=tmp_path/'none.yaml'), dict(path=tmp_path/'list.yaml')]
    for kw in wrong:
        with pytest.raises(InputError): read_seed_config(**kw)
