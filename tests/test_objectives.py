"The rivals of the masked siamese loss: values against plain numpy and against lightly, what a config refuses, gradients, files, resume, evaluation."
import io, json, math
from contextlib import redirect_stdout

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import SMALL
from mmsn.config import load_config
from mmsn.data.cohort import Cohort
from mmsn.dials import OBJECTIVES
from mmsn.evaluate import evaluate
from mmsn.evaluate.figures import training_figure
from mmsn.evaluate.robustness import retrieval
from mmsn.loop import Trainer
from mmsn.model import MMSN
from mmsn.objectives.choice import OBJECTIVE_CLASSES
from mmsn.objectives.dino import dino_loss, next_centre
from mmsn.objectives.mae import hidden_error, pixels
from mmsn.objectives.simclr import nt_xent
from mmsn.objectives.simsiam import negative_cosine
from mmsn.objectives.vicreg import vicreg
from mmsn.options import InputError
from mmsn.testing import toy_cohort, toy_config
from mmsn.watch import collapsed

# What makes each objective of a small config of images and charts; those that train no fusion have none.
BARE = dict(fusion=dict(dim=0), ehr=dict(encoder=dict(hidden=16, dim=0, pool='mean')))
CHANGES = {'simclr': {}, 'simsiam': {}, 'vicreg': {}, 'mae': dict(BARE, objectives=dict(mae=dict(dim=16, depth=1, heads=2))),
           'dino': dict(objectives=dict(dino=dict(outputs=12))), 'clip': dict(BARE, objectives=dict(clip=dict(dim=8))), 'siglip': dict(BARE, objectives=dict(siglip=dict(dim=8, depth=1)))}
ALL = list(CHANGES)


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_cohort(tmp_path_factory.mktemp('toy')/'cohort', n=200)


def small(name, *modalities, **changes):
    if len(modalities) == 1: changes = {k: v for k, v in CHANGES[name].items() if k != 'fusion' and k in ('objectives', *modalities)} | changes
    else: changes = CHANGES[name] | changes
    return toy_config(*modalities, objective=name, **changes)


def two(n=12, d=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)


def unit(x): return x/np.linalg.norm(x, axis=1, keepdims=True)


def softmax(x): return np.exp(x)/np.exp(x).sum(1, keepdims=True)


# The same formulas in numpy, without the code that is tested.
def numpy_nt_xent(a, b, tau):
    z = unit(np.concatenate([a, b]))
    s, n, total = z@z.T/tau, len(a), 0
    for i in range(2*n): total -= s[i, (i + n) % (2*n)] - np.log(sum(np.exp(s[i, k]) for k in range(2*n) if k != i))
    return total/(2*n)


def numpy_vicreg(a, b, i=25, v=25, c=1):
    std = lambda z: np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
    def cov(z): m = np.cov(z.T); return (m[~np.eye(len(m), dtype=bool)]**2).sum()/len(m)
    return i*((a - b)**2).mean() + v*(std(a) + std(b))/2 + c*(cov(a) + cov(b))


def numpy_dino(s, t, centre, tau, teacher_tau): return -(softmax((t - centre)/teacher_tau)*np.log(softmax(s/tau))).sum(1).mean()


def numpy_pixels(x, side):
    "(N, L, side²) of (N, H, W), each patch normalised."
    p = np.stack([[x[n, i:i + side, j:j + side].ravel() for i in range(0, x.shape[1], side) for j in range(0, x.shape[2], side)] for n in range(len(x))])
    return (p - p.mean(2, keepdims=True))/np.sqrt(p.var(2, keepdims=True) + 1e-4)


def test_losses_against_numpy():
    a, b = two()
    x, y = a.double().numpy(), b.double().numpy()
    centre = np.linspace(-.5, .5, 7)
    for tau in (.1, .5): assert nt_xent(a, b, tau).item() == pytest.approx(numpy_nt_xent(x, y, tau), abs=1e-5)
    assert negative_cosine(a, b).item() == pytest.approx(-(unit(x)*unit(y)).sum(1).mean(), abs=1e-6)
    assert vicreg(a/3, b/3).item() == pytest.approx(numpy_vicreg(x/3, y/3), rel=1e-5)
    assert vicreg(a/3, b/3, (2., 3., 5.)).item() == pytest.approx(numpy_vicreg(x/3, y/3, 2, 3, 5), rel=1e-5)
    assert dino_loss(a, b, torch.from_numpy(centre).float(), .2, .1).item() == pytest.approx(numpy_dino(x, y, centre, .2, .1), rel=1e-5)
    np.testing.assert_allclose(next_centre(torch.from_numpy(centre).float(), b, .9), .9*centre + .1*y.mean(0), atol=1e-6)
    image = np.random.default_rng(0).random((3, 8, 12))
    np.testing.assert_allclose(pixels(torch.from_numpy(image).float()[:, None], 4), numpy_pixels(image, 4), atol=1e-4)
    keep = torch.tensor([[0, 3], [1, 2], [4, 5]])
    hidden = np.ones((3, 6), bool)
    np.put_along_axis(hidden, keep.numpy(), False, 1)
    p, t = (np.random.default_rng(s).random((3, 6, 16)) for s in (1, 2))
    assert hidden_error(*map(torch.from_numpy, (p, t)), keep).item() == pytest.approx(((p - t)**2)[hidden].mean(), abs=1e-6)


def test_losses_against_lightly():
    "Values and gradients, to 1e-5."
    lightly = pytest.importorskip('lightly.loss')
    a, b = two()
    centre = torch.linspace(-.3, .3, 7)
    dino = lightly.DINOLoss(output_dim=7, warmup_teacher_temp=.04, teacher_temp=.04, student_temp=.1)
    dino.center.copy_(centre.view(1, 1, -1))
    pairs = {'simclr': (lambda x: nt_xent(x, b, .5), lambda x: lightly.NTXentLoss(.5)(x, b)),
             'simsiam': (lambda x: negative_cosine(x, b), lambda x: lightly.NegativeCosineSimilarity()(x, b)),
             'vicreg': (lambda x: vicreg(x, b), lambda x: lightly.VICRegLoss()(x, b)),
             'dino': (lambda x: dino_loss(x, b, centre), lambda x: dino([b], [torch.zeros_like(b), x]))}
    for name, (ours, theirs) in pairs.items():
        seen = []
        for loss in (ours, theirs):
            x = a.clone().requires_grad_()
            value = loss(x)
            value.backward()
            seen.append((value.detach(), x.grad))
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5, msg=lambda m: f'{name}: {m}')
    torch.testing.assert_close(next_centre(centre, b, .9), dino.center[0, 0], atol=1e-6, rtol=1e-6)


def test_stopped_gradients():
    a, b = (x.requires_grad_() for x in two())
    negative_cosine(a, b).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None
    dino_loss(a, b).backward()
    assert b.grad is None


def test_names(): assert OBJECTIVES[:1 + len(ALL)] == ('msn', *ALL) and set(OBJECTIVE_CLASSES) <= set(OBJECTIVES)      # those of images and reports, and what draws, have tests of their own


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('modalities', [('cxr', 'ehr'), ('cxr',), ('ehr',)], ids='-'.join)
def test_step_and_files(toy, tmp_path, name, modalities):
    "Every trainable parameter has a gradient, whoever is missing; the exported encoder is the trained one; the start can be had again."
    if name in ('clip', 'siglip') and len(modalities) == 1:
        with pytest.raises(InputError, match='compares two modalities'): small(name, *modalities)
        return
    model = MMSN.from_config(small(name, *modalities), toy)
    for present in ('nobody', 'some'):
        batch = toy.batch(np.arange(40))
        if present == 'nobody' and 'cxr' in modalities: batch.present['cxr'] &= False
        model.zero_grad()
        out = model(model.views(batch, 0, 0))
        out.loss.backward()
        for n, p in model.named_parameters(): assert (p.grad is not None) == p.requires_grad, n
        assert out.loss.isfinite() and all(v.ndim == 0 for v in out.metrics.values())
        if present == 'some': assert sum(p.grad.abs().sum() for p in model.online.parameters() if p.requires_grad) > 0
    assert not hasattr(model, 'prototypes') and not hasattr(model, 'target_head')
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1).step()
    model.update_target(.9)
    same = [torch.equal(a, b) for a, b in zip(model.online.parameters(), model.target.parameters())]
    assert all(same) == (name != 'dino'), 'without a teacher the target is what was trained'
    loaded = MMSN.from_pretrained(model.save_pretrained(tmp_path/'encoder'))
    for key, x in model.eval().encode(batch).items(): assert torch.equal(loaded.encode(batch)[key].nan_to_num(), x.nan_to_num())
    for key, t in loaded.state_dict().items():
        if not key.startswith(('online.', 'objective.head.')): assert torch.equal(t, model.state_dict()[key]), key
    start, again = MMSN.from_config(model.config, toy).state_dict(), model.untrained().state_dict()
    assert all(torch.equal(start[k], again[k]) for k in start)
    assert 'prototypes' in str(pytest.raises(InputError, model.assignments, batch).value)


def test_teacher_of_dino_follows(toy):
    model = MMSN.from_config(small('dino', 'cxr', 'ehr'), toy)
    head, teacher = model.objective.head.prototypes, model.objective.teacher_head.prototypes
    head.data += 1
    before = teacher.clone()
    model.update_target(.75)
    torch.testing.assert_close(teacher, .75*before + .25*head.detach())
    centres = model.objective.centres.clone()
    views = model.views(toy.batch(np.arange(32)), 0, 0)
    model.eval()(views); assert torch.equal(model.objective.centres, centres), 'only training moves the centres'
    model.train()(views); assert (model.objective.centres != centres).any(1).all()


def test_pairs_have_a_shared_space(toy):
    model, batch = MMSN.from_config(small('clip', 'cxr', 'ehr'), toy).eval(), toy.batch(np.arange(20))
    z = model.contrast_space(model.encode(batch))
    torch.testing.assert_close(z['cxr'][batch.present['cxr']].norm(dim=1), torch.ones(int(batch.present['cxr'].sum())))
    with pytest.raises(InputError, match='no space'): MMSN.from_config(small('simclr', 'cxr', 'ehr'), toy).contrast_space({})


def test_auxiliary_terms_beside_an_objective(toy):
    "Cells, tokens and a contrast are added to a rival as to the siamese loss, and loss.weight is the rival's."
    config = small('simclr', 'cxr', 'ehr', fusion=dict(dim=32, contrast=dict(weight=.5, dim=8)), loss=dict(weight=.25, cells=dict(weight=2., kind=['forecast', 'latent']), tokens=dict(weight=3.)))
    model = MMSN.from_config(config, toy)
    torch.manual_seed(0)
    out = model(model.views(toy.batch(np.arange(32)), 0, 0))
    m = out.metrics
    rival = sum(m[f'{g}/objective'] for g in ('joint', 'cxr', 'ehr'))/3
    torch.testing.assert_close(out.loss.detach(), .25*rival + 2*m['cells/loss'] + 3*m['tokens/loss'] + .5*m['contrast/loss'])
    plain = MMSN.from_config(small('simclr', 'cxr', 'ehr'), toy)
    torch.testing.assert_close(m['joint/objective'], plain(plain.views(toy.batch(np.arange(32)), 0, 0)).metrics['joint/objective'])


def test_groups_are_weighted_as_the_siamese_ones(toy):
    model = MMSN.from_config(small('vicreg', 'cxr', 'ehr', cxr=dict(weight=3., drop=.5), fusion=dict(dim=32, weight=2.)), toy)
    out = model(model.views(toy.batch(np.arange(32)), 0, 0))
    values = [out.metrics[f'{g}/objective'] for g in ('joint', 'cxr', 'ehr')]
    torch.testing.assert_close(out.loss.detach(), (2*values[0] + 3*values[1] + values[2])/6)


@pytest.mark.parametrize('stem', [dict(stem='linear'), dict(stem='conv'), dict(stem='conv', mask_stem=True)], ids=str)
def test_no_hidden_pixel_reaches_the_encoder(toy, stem):
    "The gradient of all visible tokens by the pixels is 0 in each hidden patch, and not in the visible ones."
    config = small('mae', 'cxr', cxr=dict(encoder=dict(dim=32, depth=1, heads=2, patch=4, pool='cls', **stem)))
    model = MMSN.from_config(config, toy)
    view = model.views(toy.batch(np.flatnonzero(toy.present('cxr'))[:8]), 0, 0).anchors['cxr'][0]
    x = view.x.clone().requires_grad_()
    model.online.encoders['cxr'].tokens(x, view.keep).square().sum().backward()
    by_patch = F.unfold(x.grad, 4, stride=4).abs().sum(1)
    seen = torch.zeros(by_patch.shape, dtype=torch.bool).scatter(1, view.keep, True)
    assert by_patch[~seen].max() == 0 and (by_patch[seen] > 0).all() and seen.sum(1).tolist() == [4]*len(x)


def test_hidden_cells_of_a_chart(toy):
    "Half of the cells are hidden, none is shown that the truth has and the view has not."
    model = MMSN.from_config(small('mae', 'ehr'), toy)
    views = model.views(toy.batch(np.flatnonzero(toy.present('ehr'))[:64]), 0, 0)
    view, = views.anchors['ehr']
    seen, there = view.x[..., 3:] > .5, view.truth[..., 3:] > .5
    assert view.n == views.n == 3 and not (seen & ~there).any() and .4 < seen.sum()/there.sum() < .6


def test_wrong_configs(toy):
    demo = ['fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid']
    wrong = {'objective=simclrr': "did you mean 'simclr'", 'objectives.simclr.temperature=.2': 'has no effect while objective is msn', 'objectives.dino.outputs=1': 'between 2 and',
             'objectives.simclr.temprature=1': "did you mean 'temperature'", 'objective=clip fusion.dim=0': 'fusion.contrast.weight=0', 'objective=clip ' + ' '.join(demo): 'set fusion.dim=0',
             'objective=mae objectives.mae.hidden=1': 'at most 0.99', 'objective=mae': 'modalities.ehr.encoder.dim=0', 'objective=mae modalities.ehr.encoder.dim=0': 'set fusion.dim=0'}
    for changes, says in wrong.items():
        with pytest.raises(InputError) as e: load_config('demo', changes.split())
        assert says in str(e.value) and '\n' not in str(e.value), e.value
    with pytest.raises(InputError, match='encoder.name=vit'): small('mae', 'cxr', cxr=dict(encoder=dict(name='resnet18')))
    with pytest.raises(InputError, match="does not train the table 'facts'"): toy_config('cxr', 'facts', objective='clip', fusion=dict(dim=0))
    with pytest.raises(InputError, match='teaches nothing'): MMSN.from_config(small('dino', 'cxr', objectives=dict(dino=dict(teacher_temperature=.2))), toy)
    with pytest.raises(InputError, match='multiple of 4'): MMSN.from_config(small('mae', 'cxr', objectives=dict(mae=dict(dim=18, heads=2))), toy)


def test_collapse_is_said():
    assert 'alike' in collapsed({'cxr/spread': torch.tensor(.01)}) and collapsed({'cxr/spread': .5, 'ehr/spread': math.nan}) is None


RUNS = {'simclr': [], 'simsiam': [], 'vicreg': [], 'dino': ['objectives.dino.outputs=16'],
        'mae': ['fusion.dim=0', 'fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid', 'modalities.ehr.encoder.dim=0', 'objectives.mae={dim: 16, depth: 1, heads: 2}'],
        'clip': ['fusion.dim=0', 'fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid', 'objectives.clip.dim=8'],
        'siglip': ['fusion.dim=0', 'fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid', 'objectives.siglip.dim=8']}


def started(cohort, folder, name, *more): return Trainer(load_config('demo', [f'data.cohort={cohort}', f'train.run={folder}', *SMALL, f'objective={name}', *RUNS[name], *more]))


@pytest.mark.parametrize('name', ALL)
def test_resumes_exactly(cohort, tmp_path, name):
    "A run that is left in mid-epoch and resumed ends as one that was not: weights, centres, moments and curve."
    for folder, until in (('whole', None), ('left', 3), ('left', None)):
        trainer = started(cohort, tmp_path/folder, name)
        if until: trainer.total = until
        with redirect_stdout(io.StringIO()): trainer.fit()
    for part in ('model', 'optimizer'):
        a, b = (load_file(sorted((tmp_path/run).glob('checkpoints/step-*'))[-1]/f'{part}.safetensors') for run in ('whole', 'left'))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows = [[line for line in (tmp_path/run/'metrics.csv').read_text().splitlines()] for run in ('whole', 'left')]
    assert len(rows[0]) == len(rows[1]) > 4


def test_embeddings_side_by_side_are_not_compared(cohort):
    "Without a layer that joins them, an image and a chart fill different parts of the joint embedding, and their cosine is the same for every pair."
    cohort = Cohort.open(cohort)
    rows = cohort.rows('test')
    spaces = lambda *changes: {s for m in [MMSN.from_config(toy_config('cxr', 'ehr', **dict(changes)), cohort).eval()] for s in retrieval(dict(a=m), cohort, rows, 'cxr', 'ehr', k=1, resamples=0).get('space', [])}
    assert spaces() == {'embedding'} and spaces(('fusion', dict(dim=0))) == set()


def test_a_run_without_prototypes_shows_none(cohort, tmp_path):
    "loss.weight=0: its report and its card say what it learned from, and nothing of prototypes that nobody taught."
    trainer = Trainer(load_config('demo', [f'data.cohort={cohort}', f'train.run={tmp_path/"run"}', *SMALL, 'optim.epochs=1', 'loss.weight=0', 'loss.cells.weight=1', 'fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid']))
    with redirect_stdout(io.StringIO()):
        trainer.fit()
        evaluate(tmp_path/'run', ['protocols=[linear_probe]', 'bootstrap=0', 'draws=1', 'map_samples=5', 'baselines=false', 'corruptions=[patches]'], page=False)
    card, report = (tmp_path/'run'/'encoder'/'README.md').read_text(), tmp_path/'run'/'report'
    assert 'by terms on single cells of its charts with mmsn' in card and 'by masked siamese' not in card and '| prototypes | none |' in card
    assert list(report.rglob('views.png')) and not list(report.rglob('prototypes*'))
    figure = training_figure(pd.read_csv(report/'metrics.csv'), 8)
    ranks = next(ax for ax in figure.axes if ax.get_title('left') == 'effective rank')
    assert [ax.get_title('left') for ax in figure.axes] == ['loss of cells', 'effective rank', 'gradient norm', 'learning rate']
    assert len({line.get_color() for line in ranks.lines}) == 3


@pytest.mark.parametrize('name', ['simclr', 'clip', 'dino'])
def test_evaluation(cohort, tmp_path, name):
    "The same evaluation for a rival, with retrieval in the space of those that have one, and the figures that a run without prototypes has."
    trainer = started(cohort, tmp_path/'run', name, 'optim.epochs=1', 'fusion.contrast.weight=0', 'fusion.contrast.loss=sigmoid')
    with redirect_stdout(io.StringIO()):
        trainer.fit()
        evaluate(tmp_path/'run', ['protocols=[linear_probe,retrieval]', 'bootstrap=0', 'draws=1', 'map_samples=5', 'baselines=false', 'corruptions=[patches]'], page=False)
    report = tmp_path/'run'/'report'
    assert f'by the objective {name} with mmsn' in (tmp_path/'run'/'encoder'/'README.md').read_text()
    # the embeddings of clip lie side by side
    assert set(pd.read_csv(report/'retrieval.csv').space) == {'plain', 'contrast' if name == 'clip' else 'embedding'}
    assert list(report.rglob('views.png')) and not list(report.rglob('prototypes*'))
    figure = training_figure(pd.read_csv(report/'metrics.csv'), json.loads((report/'about.json').read_text())['prototypes'])
    titles = [ax.get_title('left') or ax.get_title() for ax in figure.axes]
    assert ('cross entropy' in titles) == (name == 'dino') and ('loss' in titles) == (name == 'simclr') and 'effective rank' in titles
    assert json.loads((report/'about.json').read_text())['prototypes'] == (16 if name == 'dino' else 8)
