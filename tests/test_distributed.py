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
