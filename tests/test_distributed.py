"Two processes with half of the batch each are one process with all of it: loss and gradients, through gloo and DDP."
import os, socket

import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmsn.loss import msn_loss

VIEWS, SAMPLES, INPUT = 3, 8, 6
CASES = {'default': {}, 'weights': dict(me_max_weight=5., entropy_weight=.5), 'prior': dict(prior=.25), 'unbalanced': dict(sinkhorn_iterations=0)}
SIZES = {'even': (4, 4), 'uneven': (6, 2), 'one empty': (8, 0)}   # samples a process


class Toy(nn.Module):
    "An encoder and prototypes, in one forward."
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(INPUT, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16))
        self.prototypes = nn.Parameter(torch.randn(5, 16))

    def forward(self, anchors, targets, **kw):
        with torch.no_grad(): h = self.encoder(targets)
        return msn_loss(self.encoder(anchors), h, self.prototypes, **kw)


def batch(start, stop):
    "Anchors (view-major) and targets of samples start to stop."
    g = torch.Generator().manual_seed(1)
    anchors, targets = torch.randn(VIEWS, SAMPLES, INPUT, generator=g), torch.randn(SAMPLES, INPUT, generator=g)
    return anchors[:, start:stop].reshape(-1, INPUT), targets[start:stop]


def step(wrap, start, stop, **kw):
    "The terms of the loss and the gradients of one step, from the same initial weights."
    torch.manual_seed(0)
    model = wrap(Toy())
    out = model(*batch(start, stop), **kw)
    out.loss.backward()
    return {n: x.detach().float() for n, x in out._asdict().items()} | {n.removeprefix('module.'): p.grad for n, p in model.named_parameters()}


def worker(rank, port, folder):
    "One process: what it sees of every case and split, as files."
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try:
        for case, kw in CASES.items():
            for split, sizes in SIZES.items():
                save_file(step(DistributedDataParallel, sum(sizes[:rank]), sum(sizes[:rank+1]), **kw), f'{folder}/{rank}-{case}-{split}.safetensors')
    finally: dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "The folder of what both processes saw."
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(worker, (free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize('split', SIZES)
@pytest.mark.parametrize('case', CASES)
def test_two_ranks_are_one(found, case, split):
    "Loss, every term, and the gradients that DDP averaged equal those of one process, on both ranks."
    wanted = step(lambda model: model, 0, SAMPLES, **CASES[case])
    assert wanted['prototypes'].norm(dim=1).min() > 1e-4
    for rank in (0, 1):
        seen = load_file(found/f'{rank}-{case}-{split}.safetensors')
        for name, value in wanted.items(): torch.testing.assert_close(seen[name], value, atol=1e-6, rtol=1e-6, msg=lambda m: f'rank {rank}, {name}: {m}')


# The whole model

CONFIG = dict(modalities=dict(cxr=dict(kind='image', encoder=dict(dim=16, depth=1, heads=2, patch=8, pool='mean', positions='sincos', init='fan_in'),
                                       views=dict(random=1, focal=1, random_size=16, focal_size=8, patch_drop=.25)),
                              ehr=dict(kind='timeseries', encoder=dict(hidden=16, dim=16), views=dict(random=1, focal=1))),
              fusion=dict(dim=16), head=dict(hidden=32, depth=1, output=8, norm='layer'), loss=dict(prototypes=6))
IMAGES = {'paired': [1]*8, 'some': [1, 0, 1, 1, 0, 1, 0, 1], 'one rank has none': [1, 0, 1, 1, 0, 0, 0, 0], 'nobody': [0]*8}   # who of eight samples has an image


def model_step(wrap, start, stop, images):
    "Loss, metrics and gradients of one step of an MMSN on samples start to stop."
    from mmsn.config import Config, build
    from mmsn.data.cohort import Batch, ModalityInfo
    from mmsn.model import MMSN
    channel = dict(name='hr', kind='continuous', columns=[0, 1], mask=1, unit='', normal=0., low=-9., high=9., categories=None)
    infos = dict(cxr=ModalityInfo('cxr', 'image', dict(kind='image', height=16, width=16, mean=.5, std=.25)),
                 ehr=ModalityInfo('ehr', 'timeseries', dict(kind='timeseries', timestep=1., channels=[channel], columns=['hr', 'mask'], mean=[0., 0.], std=[1., 1.])))
    g = torch.Generator().manual_seed(2)
    has = torch.tensor(images).bool()
    x = torch.cat([torch.randn(8, 12, 1, generator=g), torch.ones(8, 12, 1)], 2)
    batch = Batch(index=torch.arange(8), data=dict(cxr=torch.randint(0, 256, (8, 1, 16, 16), generator=g).to(torch.uint8), ehr=x), lengths=dict(ehr=torch.full((8,), 12)),
                  present=dict(cxr=has, ehr=torch.ones(8, dtype=torch.bool)), labels=torch.zeros(8, 0)).select(slice(start, stop))
    inner = MMSN(build(Config, CONFIG), infos)
    model = wrap(inner)
    for step in range(2):   # a second forward and backward: DDP notices only then that a parameter was left out
        model.zero_grad()
        with torch.no_grad(): views = inner.views(batch, 0, 0)
        out = model(views)
        out.loss.backward()
    metrics = {k: v for k, v in out.metrics.items() if not k.endswith('effective_rank')}
    return dict(loss=out.loss.detach(), **metrics, **{f'gradient {n}': p.grad for n, p in inner.named_parameters() if p.requires_grad})


def model_worker(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try:
        for case, images in IMAGES.items(): save_file(model_step(DistributedDataParallel, 4*rank, 4*rank + 4, images), f'{folder}/{rank}-{case}.safetensors')
    finally: dist.destroy_process_group()


@pytest.fixture(scope='module')
def model_found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    mp.spawn(model_worker, (free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize('case', IMAGES)
def test_model_on_two_ranks_is_one(model_found, case):
    "The same of MMSN with every group of anchors, whoever lacks an image, without find_unused_parameters."
    wanted = model_step(lambda model: model, 0, 8, IMAGES[case])
    for rank in (0, 1):
        seen = load_file(model_found/f'{rank}-{case}.safetensors')
        assert seen.keys() == wanted.keys()
        for name, value in wanted.items(): torch.testing.assert_close(seen[name], value, atol=2e-6, rtol=1e-5, equal_nan=True, msg=lambda m: f'rank {rank}, {name}: {m}')
