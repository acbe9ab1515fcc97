"Proofs of `mmsn.model` that are too long for its notebook: every gradient, aim, space, option, edge case and file."
import copy, json, math, shutil, tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.test import expect_fail, test_close as close, test_eq as eq
from safetensors.torch import load_file

from mmsn.config import build, check
from mmsn.data.writer import CohortWriter
from mmsn.loss import assign, log_probs, msn_loss
from mmsn.model import MMSN, _FORMAT, embed
from mmsn.options import Config, InputError
from mmsn.testing import toy_cohort, toy_config
from mmsn.watch import collapsed



def tiny_cohort(folder, n=96, size=32, hours=12, missing=4, seed=0):
    "Patients with an image `cxr`, charts `ehr` and `labs`, and a table `facts`; every `missing`-th has no image."
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=n), np.linspace(-1, 1, size)
    disc = np.hypot(y[:, None], y[None]) < (.5 + .15*z)[:, None, None]
    images = np.clip(60 + 120*disc + 15*rng.normal(size=(n, size, size)), 0, 255).astype(np.uint8)
    lengths = rng.integers(4, hours + 1, n)
    with CohortWriter(folder, 'tiny', ['big']) as w:
        for name, width in (('ehr', 3), ('labs', 2)):
            channels = [dict(name=f'{name}{i}', kind='continuous', columns=[i, i + 1], mask=width + i, unit='', normal=80., low=0., high=200., categories=None) for i in range(width)]
            x = np.stack([80 + 10*z.repeat(lengths) + 5*rng.normal(size=lengths.sum()) for _ in range(width)], 1)
            w.add_timeseries(name, channels, [f'{name}{i}' for i in range(width)] + [f'mask {i}' for i in range(width)]).append(np.hstack([x, np.ones_like(x)]).astype(np.float32))
        w.add_images('cxr', size, size).append(images)
        w.add_tabular('facts', pd.DataFrame(dict(age=60 + 5*z, sex=rng.integers(0, 2, n))))
        start = np.cumsum(lengths) - lengths
        i = np.arange(n)
        return w.close(pd.DataFrame(dict(sample_id=i, subject_id=i, split='train', ehr_start=start, ehr_length=lengths, labs_start=start, labs_length=lengths,
                                         cxr_index=np.where(i % missing, i, -1) if missing else i, facts_index=i, big=(z > 0).astype(float))))

def tiny_config(*modalities, **parts):
    "A model small enough to train within this page; a part that is named like a modality changes that."
    image = dict(kind='image', encoder=dict(dim=32, depth=1, heads=2, patch=8, pool='mean', positions='sincos', init='fan_in'),
                 views=dict(random=1, focal=2, random_size=32, focal_size=16, patch_drop=.25))
    series = dict(kind='timeseries', encoder=dict(hidden=32, dim=32, pool='mean'), views=dict(random=1, focal=2, focal_window=[.5, .8]))
    known = dict(cxr=image, ehr=series, labs=series, facts=dict(kind='tabular', encoder=dict(hidden=16, dim=8)))
    known = {m: part | parts.pop(m, {}) for m, part in known.items()}
    base = dict(modalities={m: known[m] for m in modalities}, fusion=dict(dim=32), head=dict(hidden=32, depth=1, output=16, norm_input=True), loss=dict(prototypes=8))
    return check(build(Config, base | parts))


def spaced(*names, aim=('own', 'cross'), fusion={}, **parts):
    "A config with a space for each modality."
    return tiny_config(*(names or ('cxr', 'ehr')), fusion=dict(dim=32, space='own', aim=aim) | fusion, **parts)


def run_steps(model, cohort, steps, batch_size=48, lr=3e-3):
    "Train and return the metrics of each step."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    rows, rng = [], np.random.default_rng(0)
    for step in range(steps):
        batch = cohort.batch(rng.permutation(len(cohort))[:batch_size])
        with torch.no_grad(): views = model.views(batch, seed=0, epoch=step)
        out = model(views)
        optimizer.zero_grad(); out.loss.backward(); optimizer.step()
        model.update_target(.95)
        rows.append({k: float(v) for k, v in out.metrics.items()} | dict(loss=out.loss.item()))
    return pd.DataFrame(rows)

def with_aim(aim, *names, **parts):
    "The model of an aim, and its target assignments on the batch."
    m = MMSN.from_config(tiny_config(*(names or ('cxr', 'ehr')), fusion=dict(dim=32, aim=aim), **parts), cohort)
    v = m.views(batch, 0, 0)
    return m(v), m._aims(v, v.present, m.terms(3), .25)[0]

def step_of(*names, sharpen=None, **parts):
    "A fresh model's output on the batch, with gradients."
    m = MMSN.from_config(tiny_config(*names, **parts), cohort)
    out = m(m.views(batch, 0, 0), sharpen)
    out.loss.backward()
    return m, out


tmp = tempfile.TemporaryDirectory()
torch.manual_seed(0)
cohort = tiny_cohort(f'{tmp.name}/tiny')
config = tiny_config('cxr', 'ehr')
batch = cohort.batch(np.arange(32))
PREDICT = tiny_config('cxr', 'ehr', head=dict(hidden=32, depth=1, output=16, norm_input=True, predict=1))


def test_start():
    "The same config and seed give the same start, and options leave the other parts alone."
    model = MMSN.from_config(config, cohort)
    again = MMSN.from_config(config, cohort)
    for (name, p), q in zip(model.state_dict().items(), again.state_dict().values()): assert torch.equal(p, q), name
    assert model.prototypes.abs().max() <= 16**-.5 and not any(p.requires_grad for m in (model.target, model.target_head) for p in m.parameters())
    assert model.online.training and not model.target.training and model.target_head.training
    with_predictor = MMSN.from_config(tiny_config('cxr', 'ehr', head=dict(hidden=32, depth=1, output=16, norm_input=True, predict=1)), cohort)
    for name, p in model.state_dict().items(): assert torch.equal(p, with_predictor.state_dict()[name]), name
    eq({name.split('.')[0] for name in with_predictor.state_dict().keys() - model.state_dict().keys()}, {'predictor'})
    with expect_fail(contains="modality 'cxr'"): MMSN(tiny_config('cxr'), {})


def test_start_of_spaces():
    "A table has no space of its own, and the shared parts start alike."
    own_space = MMSN.from_config(spaced('cxr', 'ehr', 'facts', cxr=dict(prototypes=5)), cohort)
    eq([(name, list(space.cross), len(space.prototypes)) for name, space in own_space.spaces.items()], [('cxr', ['ehr'], 5), ('ehr', ['cxr'], 8)])
    eq([len(space.cross) for space in MMSN.from_config(spaced(aim='own'), cohort).spaces.values()], [0, 0])
    shared = MMSN.from_config(tiny_config('cxr', 'ehr', 'facts'), cohort).state_dict()
    for name, p in shared.items(): assert torch.equal(p, own_space.state_dict()[name]), name
    eq(len(MMSN.from_config(replace(own_space.config, modalities=dict(cxr=own_space.config.modalities['cxr'])), cohort).spaces), 0)


def test_groups():
    "Views of each group of anchors."
    model = MMSN.from_config(config, cohort)
    eq(model.groups(3), dict(joint=[0, 1, 2], cxr=[0, 1, 2], ehr=[0, 1, 2]))
    half = MMSN.from_config(tiny_config('cxr', 'ehr', fusion=dict(dim=32, drop=.5), cxr=dict(drop=1.)), cohort).groups(11)
    eq((half['ehr'], half['cxr']), ([0, 1, 3, 5, 7, 9], list(range(11))))
    eq(MMSN.from_config(tiny_config('cxr', 'ehr', 'facts', fusion=dict(dim=32, drop=0.)), cohort).groups(3), dict(joint=[0, 1, 2]))
    eq(list(MMSN.from_config(tiny_config('cxr', 'ehr', 'facts'), cohort).groups(3)), ['joint', 'cxr', 'ehr'])
    eq(list(MMSN.from_config(tiny_config('ehr'), cohort).groups(3)), ['joint'])


def test_term_names():
    "Names of the terms."
    names = lambda *modalities, **fusion: list(MMSN.from_config(tiny_config(*modalities, fusion=dict(dim=32) | fusion), cohort).terms(3))
    eq(names('cxr', 'ehr'), ['joint', 'cxr', 'ehr'])
    eq(names('cxr', 'ehr', aim=['joint', 'cross']), ['joint', 'cxr', 'cxr-to-others', 'ehr', 'ehr-to-others'])
    eq(names('cxr', 'ehr', 'labs', space='own', aim=['own', 'cross']), ['joint', 'cxr', 'cxr-to-ehr', 'cxr-to-labs', 'ehr', 'ehr-to-cxr', 'ehr-to-labs', 'labs', 'labs-to-cxr', 'labs-to-ehr'])
    eq(names('cxr', 'ehr', space='own', aim=['joint', 'own']), ['joint', 'cxr-to-joint', 'cxr', 'ehr-to-joint', 'ehr'])
    eq(names('ehr'), ['joint'])


def test_gradients():
    "Every online parameter learns, no target does, and the terms are those of msn_loss."
    model = MMSN.from_config(config, cohort)
    batch = cohort.batch(np.arange(32))
    out = model(model.views(batch, seed=0, epoch=0))
    out.loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad: assert p.grad is not None and p.grad.abs().sum() > 0, f'{name} gets no gradient'
        else: assert p.grad is None, f'{name} of the target got a gradient'
    groups = model.groups(3)
    one = MMSN.from_config(tiny_config('ehr', head=dict(hidden=32, norm='layer', output=16)), cohort)
    views = one.views(batch, seed=0, epoch=0)
    z = one.head(torch.cat([one.online.encode_one('ehr', v) for v in views.anchors['ehr']]))
    h = one.target_head(one.target.encode_one('ehr', views.targets['ehr']))
    wanted, found = msn_loss(z, h, one.prototypes), one(views)
    close(found.loss, wanted.loss, 1e-5)
    close(found.metrics['joint/floor'], wanted.floor, 1e-5)
    close(out.loss, sum(out.metrics[f'{g}/cross_entropy'] + out.metrics[f'{g}/me_max'] for g in groups)/3, 1e-5)


def test_aims():
    "What each aim compares anchors with."
    aimed = {aim: with_aim(aim) for aim in ('joint', 'own', 'mean', 'cross')}
    ce = {aim: float(out.metrics['cxr/cross_entropy']) for aim, (out, _) in aimed.items()}
    close(ce['mean'], (ce['joint'] + ce['own'])/2, 1e-5)
    assert len({round(v, 3) for v in ce.values()}) == 4
    has = batch.present['cxr']
    own, cross = aimed['own'][1], aimed['cross'][1]
    close(cross['cxr'], own['ehr'][has], 1e-6)
    close(cross['ehr'][has], own['cxr'], 1e-6)
    close(cross['ehr'][~has], own['ehr'][~has], 1e-6)
    eq(cross['joint'], own['joint'])
    own, cross = (with_aim(aim, 'cxr', 'ehr', 'labs')[1] for aim in ('own', 'cross'))
    close(cross['cxr'], (own['ehr'] + own['labs'])[has]/2, 1e-6)
    close(cross['labs'][has], (own['cxr'] + own['ehr'][has])/2, 1e-6)
    close(cross['labs'][~has], own['ehr'][~has], 1e-6)
    own, cross = (with_aim(aim, ehr=dict(drop=0.))[1] for aim in ('own', 'cross'))
    eq((list(cross), cross['cxr'].shape == own['cxr'].shape), (['joint', 'cxr'], True))
    assert (cross['cxr'] - own['cxr']).abs().max() > .01


def test_spaces():
    "Each term recomputed from the parts; spaces follow, are saved and loaded."
    layer = dict(head=dict(hidden=32, depth=1, output=16, norm='layer'))
    spacious = MMSN.from_config(spaced('cxr', 'ehr', 'labs', aim=['own', 'cross', 'joint'], cxr=dict(prototypes=5), **layer), cohort)
    v = spacious.views(batch, 0, 0)
    out = spacious(v)
    out.loss.backward()
    h, t = ({k: embed(net, k, views[k] if net is spacious.online else [views[k]], v.present[k], n) for k in spacious.infos} for net, views, n in ((spacious.online, v.anchors, 3), (spacious.target, v.targets, 1)))
    views_of = lambda x, rows: x.view(3, 32, -1)[:, rows].flatten(0, 1)
    for a in spacious.spaces:
        for b, space in spacious.spaces.items():
            both, name = v.present[a] & v.present[b], a if a == b else f'{a}-to-{b}'
            head = space.head if a == b else space.cross[a]
            everyone = spacious.target_heads[b](t[b][v.present[b]])
            if a == b: close(out.metrics[f'{a}/loss'], msn_loss(head(views_of(h[a], both)), everyone, space.prototypes).loss, 1e-5)
            else:
                aim = assign(everyone, space.prototypes)[both[v.present[b]]]
                close(out.metrics[f'{name}/cross_entropy'], -(aim.repeat(3, 1)*log_probs(head(views_of(h[a], both)), space.prototypes)).sum(1).mean(), 1e-5)
            close(out.metrics[f'{name}/chance'], math.log(5 if b == 'cxr' else 8), 1e-6)
    close(out.loss, np.mean([float(out.metrics[f'{name}/loss']) for name in spacious.terms(3)]), 1e-5)
    for name, p in spacious.named_parameters(): assert not p.requires_grad or p.grad.abs().sum() > 0, f'{name} gets no gradient'
    for q in (spacious.prototypes, *(space.prototypes for space in spacious.spaces.values())): assert q.grad.norm(dim=1).min() > 0
    z = spacious.spaces['ehr'].head(h['ehr'].detach())
    wanted, = torch.autograd.grad(msn_loss(z, spacious.target_heads['ehr'](t['ehr']), spacious.spaces['ehr'].prototypes).loss/len(spacious.terms(3)), spacious.spaces['ehr'].prototypes)
    close(spacious.spaces['ehr'].prototypes.grad, wanted, 1e-6)
    run = torch.optim.SGD([p for p in spacious.parameters() if p.requires_grad], 1.)
    born = copy.deepcopy(spacious.target_heads)
    run.step()
    spacious.update_target(.9)
    for name, space in spacious.spaces.items():
        for old, now, online in zip(born[name].parameters(), spacious.target_heads[name].parameters(), space.head.parameters()): close(now, .9*old + .1*online.detach(), 1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(born.parameters(), spacious.target_heads.parameters()))
    again = MMSN.from_pretrained(spacious.save_pretrained(f'{tmp.name}/spaces'))
    assert not any('spaces.' in k and '.head.' in k or k.startswith('online') for k in load_file(f'{tmp.name}/spaces/model.safetensors'))
    for name, p in spacious.state_dict().items():
        if not name.startswith(tuple(f'{a}.' for a in spacious._followers())): eq(again.state_dict()[name], p)
    for a, b in spacious._followers().items(): eq(list(again.get_submodule(a).state_dict().values()), list(spacious.get_submodule(b).state_dict().values()))
    for name, x in spacious.eval().assignments(batch).items(): eq(again.assignments(batch)[name].nan_to_num(), x.nan_to_num())


def test_nothing_in_common():
    "No two modalities together, one patient, a table alone."
    apart = cohort.batch(np.array([1, 2]))
    apart.present = {name: p & torch.tensor([name == 'cxr', name == 'ehr']) for name, p in apart.present.items()}
    for names, b in ((('cxr', 'ehr'), apart), (('cxr', 'ehr', 'facts'), cohort.batch(np.array([0, 4, 8]))), (('ehr', 'cxr'), cohort.batch(np.array([0])))):
        for norm in ('batch', 'layer'):
            x = MMSN.from_config(spaced(*names, aim=['cross', 'own', 'joint'], head=dict(hidden=32, output=16, norm=norm, predict=1), **({'facts': dict(alone=True)} if 'facts' in names else {})), cohort)
            found = x(x.views(b, 0, 0))
            found.loss.backward()
            assert found.loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in x.parameters() if p.requires_grad)
            if b is apart: assert found.metrics['cxr-to-ehr/loss'].isnan() and found.metrics['cxr/loss'].isfinite()


def test_frozen_spaces():
    "Frozen prototypes and a prior in spaces of their own."
    frozen = MMSN.from_config(spaced(loss=dict(prototypes=8, freeze_prototypes=True, prior=.25), cxr=dict(prototypes=5)), cohort)
    frozen(frozen.views(batch, 0, 0)).loss.backward()
    eq([(len(x.prior), x.prototypes.grad) for x in frozen.spaces.values()], [(5, None), (8, None)])


def test_weights():
    "The loss is the weighted mean; weight 0 moves nothing."
    group_loss = lambda out, g: float(out.metrics[f'{g}/loss'])
    for joint, image, chart in ((1., 1., 1.), (2., .5, 1.), (0., 3., 1.), (1., 0., 0.)):
        _, weighted = step_of('cxr', 'ehr', fusion=dict(dim=32, weight=joint), cxr=dict(weight=image), ehr=dict(weight=chart))
        close(weighted.loss.item(), (joint*group_loss(weighted, 'joint') + image*group_loss(weighted, 'cxr') + chart*group_loss(weighted, 'ehr'))/(joint + image + chart), 1e-5)
    watched, _ = step_of('cxr', 'ehr', cxr=dict(weight=0.), ehr=dict(weight=0.), fusion=dict(dim=32), head=dict(hidden=32, norm='layer', output=16))
    joint_only, _ = step_of('cxr', 'ehr', fusion=dict(dim=32, drop=0.), head=dict(hidden=32, norm='layer', output=16))
    for (name, a), b in zip(watched.named_parameters(), joint_only.parameters()):
        if a.requires_grad: close(a.grad, b.grad, 1e-5)


@pytest.mark.parametrize('config', [tiny_config, spaced])
def test_prototypes_that_teach_nothing(config):
    "loss.weight=0: the gradients of a vanishing weight, for every parameter one, and no word of prototypes."
    models = {}
    for weight in (0., 1e-9):
        torch.manual_seed(0)
        models[weight] = m = MMSN.from_config(config('cxr', 'ehr', loss=dict(prototypes=8, weight=weight, cells=dict(weight=1.))), cohort)
        out = m(m.views(batch, 0, 0))
        out.loss.backward()
        assert any(k.endswith('/used') for k in out.metrics) == ('chance' in out.metrics) == bool(weight)
        assert {'cxr/effective_rank', 'joint/effective_rank', 'cells/loss'} <= set(out.metrics)
        close(out.loss.item(), out.metrics['cells/loss'].item(), 1e-6)
    for (name, a), b in zip(models[0.].named_parameters(), models[1e-9].parameters()):
        if a.requires_grad: close(a.grad, b.grad, 1e-6)
    assert any(p.grad.any() for p in models[0.].online.encoders['ehr'].parameters()) and not models[0.].prototypes.grad.any()


def test_anchor_only():
    "Facts for anchors only change anchors and no target."
    four, out = step_of('cxr', 'ehr', 'labs', 'facts', fusion=dict(dim=32, aim='joint'), facts=dict(anchor_only=True), head=dict(hidden=32, output=16, norm='layer'))
    older = cohort.batch(np.arange(32))
    older.data['facts'] = older.data['facts'] + torch.tensor([20., 0.])
    older_views, usual_views = four.views(older, 0, 0), four.views(batch, 0, 0)
    targets = [four._aims(v, v.present, four.terms(3), .25)[0] for v in (usual_views, older_views)]
    for g in targets[0]: eq(targets[0][g], targets[1][g])
    ages = [four(v).metrics for v in (usual_views, older_views)]
    assert abs(ages[0]['joint/cross_entropy'] - ages[1]['joint/cross_entropy']) > 1e-4
    for g in ('cxr', 'ehr', 'labs'): close(ages[0][f'{g}/cross_entropy'], ages[1][f'{g}/cross_entropy'], 1e-6)
    seen = MMSN.from_config(tiny_config('cxr', 'ehr', 'labs', 'facts', fusion=dict(dim=32, aim='joint')), cohort)
    targets = [seen._aims(seen.views(b, 0, 0), b.present, seen.terms(3), .25)[0] for b in (batch, older)]
    assert (targets[0]['joint'] - targets[1]['joint']).abs().max() > 1e-3
    only_facts = cohort.batch(np.arange(4))
    only_facts.present = {name: p & torch.tensor([name == 'facts', True, True, True]) for name, p in only_facts.present.items()}
    found = four(four.views(only_facts, 0, 0))
    assert found.loss.isfinite() and found.metrics['joint/cross_entropy'].isfinite()
    eq(len(four._aims(four.views(only_facts, 0, 0), only_facts.present, four.terms(3), .25)[0]['joint']), 3)


def test_every_option():
    "Each option changes the loss."
    changes = {'as it is': {}, 'loss.temperature=0.2': dict(loss=dict(temperature=.2)), 'loss.sharpen=0.1': dict(loss=dict(sharpen=.1)), 'sharpen=0.1 of the step': dict(sharpen=.1),
               'loss.label_smoothing=0.1': dict(loss=dict(label_smoothing=.1)), 'loss.prior=0.25': dict(loss=dict(prior=.25)), 'loss.prior=[8,…,1]': dict(loss=dict(prior=list(range(8, 0, -1)))),
               'loss.sinkhorn_iterations=0': dict(loss=dict(sinkhorn_iterations=0)), 'loss.me_max_weight=5': dict(loss=dict(me_max_weight=5.)), 'loss.entropy_weight=0.5': dict(loss=dict(entropy_weight=.5)),
               'loss.prototypes=16': dict(loss=dict(prototypes=16)), 'head.predict=1': dict(head=dict(predict=1)), 'head.depth=2': dict(head=dict(depth=2)), 'head.norm=layer': dict(head=dict(norm='layer')),
               'head.norm_input=false': dict(head=dict(norm_input=False)), 'head.hidden=64': dict(head=dict(hidden=64)), 'head.output=8': dict(head=dict(output=8)),
               **{f'fusion.aim={aim}': dict(fusion=dict(aim=aim)) for aim in ('own', 'joint', 'cross')}, 'fusion.drop=0.3': dict(fusion=dict(drop=.3)), 'fusion.weight=2': dict(fusion=dict(weight=2.)),
               'fusion.aim=[own,cross]': dict(fusion=dict(aim=['own', 'cross'])), 'space=own': dict(fusion=dict(space='own', aim='own')),
               'space=own, aim=[own,cross]': dict(fusion=dict(space='own', aim=['own', 'cross'])), 'space=own, aim=[own,joint]': dict(fusion=dict(space='own', aim=['own', 'joint'])),
               'space=own, cxr.prototypes=16': dict(fusion=dict(space='own', aim='own'), cxr=dict(prototypes=16)),
               'fusion.dim=16': dict(fusion=dict(dim=16)), 'modalities.cxr.weight=2': dict(cxr=dict(weight=2.)), 'modalities.cxr.drop=0.3': dict(cxr=dict(drop=.3)), 'modalities.cxr.alone=false': dict(cxr=dict(alone=False)),
               'modalities.facts.alone=true': dict(facts=dict(alone=True)), 'modalities.facts.anchor_only=true': dict(facts=dict(anchor_only=True))}
    start = dict(loss=dict(prototypes=8), head=dict(hidden=32, depth=1, output=16, norm_input=True), fusion=dict(dim=32))
    losses = {}
    for name, change in changes.items():
        m, out = step_of('cxr', 'ehr', 'facts', **{k: start[k] | v if k in start else v for k, v in (start | change).items()})
        losses[name] = out.loss.item()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad), name
        if 'prototypes' not in name: assert m.prototypes.grad.norm(dim=1).min() > 0, name
    eq(losses['loss.sharpen=0.1'], losses.pop('sharpen=0.1 of the step'))
    values = sorted(losses.values())
    assert min(b - a for a, b in zip(values, values[1:])) > 1e-6


def test_target_follows():
    "Weights averaged, buffers copied."
    model = MMSN.from_config(config, cohort)
    batch = cohort.batch(np.arange(32))
    out = model(model.views(batch, seed=0, epoch=0))
    out.loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.)
    before = {n: p.clone() for n, p in model.target.named_parameters()}
    optimizer.step()
    model.update_target(.9)
    for (name, t), o in zip(model.target.named_parameters(), model.online.parameters()): close(t, .9*before[name] + .1*o.detach(), 1e-6)
    for b, a in zip(model.target_head.buffers(), model.head.buffers()): eq(b, a)
    assert sum(float((before[n] - p).abs().sum()) for n, p in model.target.named_parameters()) > 0
    model.update_target(0.)
    for t, o in zip(model.target.parameters(), model.online.parameters()): assert torch.equal(t, o)


def test_encode():
    "Missing, dropped, hidden and corrupted inputs."
    model = MMSN.from_config(config, cohort)
    f = model.encode(batch)
    eq({n: tuple(x.shape) for n, x in f.items()}, dict(cxr=(32, 32), ehr=(32, 32), joint=(32, 32)))
    has = batch.present['cxr']
    assert f['cxr'][~has].isnan().all() and f['cxr'][has].isfinite().all() and f['joint'].isfinite().all() and not has.all()
    close(model.encode(batch.select(slice(5, 9)))['joint'], f['joint'][5:9], 1e-5)
    dropped = model.encode(batch, drop=['cxr'])
    assert dropped['cxr'].isnan().all()
    close(dropped['joint'][~has], f['joint'][~has], 1e-5)
    assert (dropped['joint'] - f['joint'])[has].abs().amax(1).min() > 0
    eq(model.encode(batch, drop='cxr')['joint'], dropped['joint'])
    with expect_fail(contains="no modality 'ct'"): model.encode(batch, drop=['ct'])
    half = model.encode(batch, patches=.5)
    eq(half['cxr'][has], model.encode(batch, patches=.5)['cxr'][has])
    assert not torch.equal(half['cxr'][has], model.encode(batch, patches=.5, seed=1)['cxr'][has])
    eq(half['ehr'], f['ehr'])
    with expect_fail(contains='below 1'): model.encode(batch, patches=1.0)
    def dark(name, view):
        if name == 'cxr': view.x = torch.zeros_like(view.x)
        return view
    black = model.encode(batch, corrupt=dark)['cxr'][has]
    close(black, black[:1].expand_as(black), 1e-5)


def test_assignments():
    "Prototypes of every space."
    model = MMSN.from_config(config, cohort)
    has = batch.present['cxr']
    own_space = MMSN.from_config(spaced(cxr=dict(prototypes=5)), cohort)
    a = own_space.assignments(batch)
    eq({name: tuple(x.shape) for name, x in a.items()}, dict(joint=(32, 8), cxr=(32, 5), ehr=(32, 8)))
    eq(a['cxr'].isnan().all(1), ~has)
    for x in a.values(): close(x[has].sum(1), torch.ones(int(has.sum())), 1e-5)
    for name, x in own_space.assignments(batch.select(slice(4, 7))).items(): close(x.nan_to_num(), a[name][4:7].nan_to_num(), 1e-5)
    close(own_space.assignments(batch, drop='cxr')['joint'][~has], a['joint'][~has], 1e-5)
    assert own_space.assignments(batch, drop='cxr')['cxr'].isnan().all() and own_space.training and own_space.target_head.training and not own_space.target.training
    eq(list(model.assignments(batch)), ['joint'])


def test_learns():
    "Sixty steps."
    model = MMSN.from_config(config, cohort)
    curve = run_steps(model, cohort, 60)
    start, end = curve[:5].mean(), curve[-5:].mean()
    assert end.loss < start.loss - .3, (start.loss, end.loss)
    for g in ('joint', 'ehr'): assert end[f'{g}/cross_entropy'] < end.chance - .5, g
    assert end['cxr/cross_entropy'] < start['cxr/cross_entropy'] - .5


def test_collapse():
    "Prototypes that all point the same way are reported."
    broken = MMSN.from_config(config, cohort)
    broken.prototypes.data[:] = broken.prototypes.data[:1]
    assert 'alike' in collapsed(broken(broken.views(batch, 0, 0)).metrics)


def test_modalities():
    "Every list of modalities, empty and single rows."
    for names in (['cxr'], ['ehr'], ['ehr', 'labs'], ['cxr', 'ehr', 'facts'], ['cxr', 'facts'], ['labs', 'ehr', 'facts', 'cxr']):
        m = MMSN.from_config(tiny_config(*names), cohort)
        m(m.views(batch, 0, 0)).loss.backward()
        silent = [n for n, p in m.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
        eq(silent, [])
        eq(set(m.encode(batch)), {*names, 'joint'})
    layer = tiny_config('cxr', 'ehr', head=dict(hidden=32, output=16, norm='layer'))
    for cfg, rows in ((config, [0, 4, 8]), (config, [0]), (layer, [1]), (layer, [0]), (tiny_config('cxr'), [0, 4])):
        m, b = MMSN.from_config(cfg, cohort), cohort.batch(np.array(rows))
        out = m(m.views(b, 0, 0))
        out.loss.backward()
        assert out.loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    frozen = MMSN.from_config(tiny_config('ehr', loss=dict(prototypes=8, freeze_prototypes=True, prior=.25), head=dict(hidden=32, output=16, predict=2)), cohort)
    born = frozen.prototypes.clone()
    run_steps(frozen, cohort, 2)
    assert torch.equal(frozen.prototypes, born)
    assert frozen(frozen.views(batch, 0, 0)).metrics['joint/me_max'] >= 0


def test_files(monkeypatch):
    "What is written, loaded and refused."
    model = MMSN.from_config(config, cohort)
    with_predictor = MMSN.from_config(PREDICT, cohort)
    folder = model.save_pretrained(f'{tmp.name}/encoder')
    loaded = MMSN.from_pretrained(folder)
    eq(sorted(p.name for p in folder.iterdir()), ['README.md', 'config.json', 'model.safetensors'])
    for name, x in model.encode(batch).items(): eq(loaded.encode(batch)[name].nan_to_num(), x.nan_to_num())
    for t, o in zip(loaded.target.parameters(), loaded.online.parameters()): assert torch.equal(t, o)
    assert loaded.online.encoders['ehr'].training is False and all(p.requires_grad for p in loaded.online.parameters())
    again = MMSN.from_pretrained(with_predictor.save_pretrained(f'{tmp.name}/predictor'))
    for name, p in with_predictor.state_dict().items(): eq(again.state_dict()[name], p)
    model.update_target(0.)
    model.save_pretrained(folder)
    eq([p.name for p in Path(tmp.name).iterdir() if p.name.startswith('.')], [])
    other = Path(tmp.name)/'other'
    other.mkdir()
    (other/'thesis.txt').write_text('mine')
    with expect_fail(contains='no encoder of mmsn'): model.save_pretrained(other)
    eq([p.name for p in other.iterdir()], ['thesis.txt'])
    cut, mixed, damaged = (Path(shutil.copytree(folder, f'{tmp.name}/{n}')) for n in ('cut', 'mixed', 'damaged'))
    one = MMSN.from_config(tiny_config('ehr', head=dict(hidden=32, norm='layer', output=16)), cohort)
    weights = (cut/'model.safetensors').read_bytes()
    (cut/'model.safetensors').write_bytes(weights[:len(weights)//2])
    one.save_pretrained(f'{tmp.name}/one')
    shutil.copy(f'{tmp.name}/one/model.safetensors', mixed)
    (damaged/'config.json').write_text(json.dumps(dict(format=_FORMAT, modalities=dict(cxr={}))))
    def offline(name, **kw): raise ConnectionError('no network')
    monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
    for source in (other, 'nowhere/at/all', 'owner/name', cut, mixed, damaged):
        with pytest.raises(InputError): MMSN.from_pretrained(source)
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, allow_patterns: folder)
    eq(MMSN.from_pretrained('owner/name').config, config)


def test_calls():
    "Each encoder is called once for each shape, on rows that are there."
    calls = {}
    counted = MMSN.from_config(config, cohort)
    for which in ('online', 'target'):
        for name, e in getattr(counted, which).encoders.items():
            e.register_forward_hook(lambda m, args, out, key=(which, name): calls.setdefault(key, []).append(len(out)))
    counted(counted.views(batch, 0, 0))
    there = int(batch.present['cxr'].sum())
    eq((calls['online', 'cxr'], calls['target', 'cxr']), ([there, 2*there], [there]))
    assert len(calls['online', 'ehr']) <= 2 and sum(calls['online', 'ehr']) == 3*32


def test_heavy_views():
    "A heavy view hides another fraction of patches in each sample; other views and the loss of their anchors stay as they were."
    conv = dict(encoder=dict(dim=32, depth=1, heads=2, patch=8, stem='conv', mask_stem=True, pool='mean', positions='sincos', init='fan_in'))
    recipe = dict(random=2, focal=1, random_size=32, focal_size=16, patch_drop=.25)
    m = MMSN.from_config(tiny_config('cxr', cxr=conv | dict(views=recipe | dict(heavy=1))), cohort)
    light = MMSN.from_config(tiny_config('cxr', cxr=conv | dict(views=recipe)), cohort)
    views, usual = m.views(batch, 0, 0), light.views(batch, 0, 0)
    heavy, random, focal = views.anchors['cxr']
    assert heavy.keep.dtype == torch.bool and len(heavy.keep.sum(1).unique()) > 3
    eq(torch.cat([heavy.x, random.x]), usual.anchors['cxr'][0].x); eq(random.keep, usual.anchors['cxr'][0].keep[32:]); eq(focal.x, usual.anchors['cxr'][1].x)
    some = m.views(batch.select(torch.tensor([7, 3])), 0, 0).anchors['cxr'][0]
    eq(some.keep, heavy.keep[[7, 3]])
    h = embed(m.online, 'cxr', views.anchors['cxr'], batch.present['cxr'], 3)
    for i in (1, 2, 3):   # a view alone gives the embedding that it has beside the others
        close(m.online.encoders['cxr'](heavy.x[i:i+1], heavy.keep[i:i+1].nonzero()[None, :, 1]), h[i:i+1], 1e-4)
    close(h[32:64], embed(light.online, 'cxr', usual.anchors['cxr'], batch.present['cxr'], 3)[32:64], 1e-5)
    assert m(views).loss.isfinite()
    with expect_fail(contains='views.heavy=2 is more than the random views (1)'):
        MMSN.from_config(tiny_config('cxr', cxr=dict(views=dict(random=1, heavy=2, random_size=32, focal_size=16))), cohort)


def test_hidden_patches_at_encoding():
    "What a hidden patch holds does not reach the features, with either stem."
    for stem in (dict(stem='linear'), dict(stem='conv'), dict(stem='conv', mask_stem=True)):
        m = MMSN.from_config(tiny_config('cxr', cxr=dict(encoder=dict(dim=32, depth=1, heads=2, patch=8, pool='mean', positions='sincos') | stem)), cohort)
        keep = m._visible('cxr', m.views.plain(batch)['cxr'], batch.index, .7, 0)
        hidden = torch.ones(32, 16).scatter(1, keep, 0.).view(32, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
        fill = lambda name, view: replace(view, x=torch.where(hidden, 7., view.x))
        has = batch.present['cxr']
        eq(m.encode(batch, patches=.7, corrupt=fill)['cxr'][has], m.encode(batch, patches=.7)['cxr'][has])
        assert not torch.equal(m.encode(batch, corrupt=fill)['cxr'][has], m.encode(batch)['cxr'][has])


def test_term_on_hidden_patches():
    "The loss is the siamese one plus weight times the term; its target is the anchor's own crop whole; saved and read back it is the same."
    views = dict(random=2, focal=1, heavy=1, random_size=32, focal_size=16, patch_drop=.25)
    parts = dict(cxr=dict(views=views), ehr=dict(views=dict(random=2, focal=1)))
    plain, m = (MMSN.from_config(tiny_config('cxr', 'ehr', **parts, **extra), cohort) for extra in ({}, dict(loss=dict(prototypes=8, tokens=dict(weight=.5)))))
    for name, p in plain.state_dict().items(): assert torch.equal(p, m.state_dict()[name]), name
    eq({k.split('.')[0] for k in m.state_dict().keys() - plain.state_dict().keys()}, {'auxiliary'})
    v = m.views(batch, 0, 0)
    out, without = m(v), plain(v)
    close(out.loss, without.loss + .5*out.metrics['tokens/loss'], 1e-5)
    for k, x in without.metrics.items(): close(out.metrics[k], x, 1e-5)
    image, total = m.auxiliary['tokens'].images['cxr'], 0.
    with torch.no_grad():
        for view in v.anchors['cxr'][:2]:   # by hand, a row at a time
            errors = []
            for i in batch.present['cxr'].nonzero()[:, 0].tolist():
                keep = view.keep[i:i+1]
                if keep.dtype == torch.bool: keep = keep.nonzero()[None, :, 1]
                hidden = torch.ones(16).scatter(0, keep[0], 0.).bool()
                truth = torch.nn.functional.layer_norm(m.target.encoders['cxr'].tokens(view.x[i:i+1]), (32,))
                errors.append(torch.nn.functional.smooth_l1_loss(image.head(m.online.encoders['cxr'].tokens(view.x[i:i+1], keep), keep), truth, reduction='none')[0, hidden])
            total += torch.cat(errors).mean()/2
    close(out.metrics['tokens/loss'], total, 1e-4)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    assert all(p.grad is None for p in m.target.parameters())
    again = MMSN.from_pretrained(m.save_pretrained(Path(tmp.name)/'tokens'))
    for name, p in m.auxiliary.state_dict().items(): assert torch.equal(again.auxiliary.state_dict()[name], p), name
    with torch.autocast('cpu', torch.bfloat16): assert m(v).loss.isfinite()


def test_term_on_hidden_patches_learns():
    "In a few steps the term falls by a third, with a class token and with the mean of tokens, for tokens and for pixels."
    for pool, kind in (('mean', 'latent'), ('cls', 'pixels')):
        encoder = dict(dim=32, depth=1, heads=2, patch=8, pool=pool, positions='sincos', init='fan_in')
        m = MMSN.from_config(tiny_config('cxr', cxr=dict(encoder=encoder), loss=dict(prototypes=8, tokens=dict(weight=1., kind=kind))), cohort)
        rows = run_steps(m, cohort, 40)
        assert rows['tokens/loss'][-5:].mean() < .8*rows['tokens/loss'][:5].mean(), (pool, kind, rows['tokens/loss'].tolist())


def test_contrast_space_is_exported(tmp_path):
    "The heads of the contrast go with an exported encoder: the same embeddings in their space."
    cohort = toy_cohort(tmp_path/'toy')
    model = MMSN.from_config(toy_config('cxr', 'ehr', fusion=dict(contrast=dict(weight=.5, dim=8))), cohort)
    batch = cohort.batch(np.arange(32))
    loaded = MMSN.from_pretrained(model.save_pretrained(tmp_path/'encoder'))
    z, again = model.contrast_space(model.encode(batch)), loaded.contrast_space(loaded.encode(batch))
    assert set(z) == {'cxr', 'ehr'} and z['cxr'].shape == (32, 8)
    for name in z: assert torch.equal(z[name].nan_to_num(), again[name].nan_to_num())
