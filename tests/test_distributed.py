"Processes that share a batch are one process with all of it: loss, gradients, ten steps of training, evaluation; and the run resumes when their number changes."
import gc, json, os, signal, socket, time

import pandas as pd, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmsn.loss import msn_loss

VIEWS, SAMPLES, INPUT = 3, 8, 6
CASES = {'default': {}, 'weights': dict(me_max_weight=5., entropy_weight=.5), 'prior': dict(prior=.25), 'prior weights': dict(prior=(5, 4, 3, 2, 1)),
         'smoothed': dict(label_smoothing=.2), 'unbalanced': dict(sinkhorn_iterations=0)}
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


def leave():
    "End a worker whose files are written, without the destructors of C++: about one in ten aborted in them (torch 2.15, gloo, `terminate called`), after Python had ended."
    os._exit(0)


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
    leave()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module', autouse=True)
def imported():
    "What the processes import, once: each is forked from this one, and would take three seconds for it."
    import torch._dynamo
    import accelerate, mmsn.evaluate.features, mmsn.loop, mmsn.train


def fresh(rank, worker, *args):
    "In a forked process: without what Accelerate remembers of trainings that this process has done."
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(reset_partial_state=True), GradientState._reset_state()
    worker(rank, *args)


def start(world, worker, *args, **kw): return mp.start_processes(fresh, (worker, *args), nprocs=world, start_method='fork', **kw)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "The folder of what both processes saw."
    folder = tmp_path_factory.mktemp('ranks')
    start(2, worker, free_port(), str(folder))
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
OTHER = dict(CONFIG, fusion=dict(dim=16, aim='cross', weight=2.), head=dict(CONFIG['head'], predict=1), loss=dict(prototypes=6, label_smoothing=.1, prior=.25))
CONFIGS = {'default': CONFIG, 'cross': dict(OTHER, modalities=dict(CONFIG['modalities'], cxr=dict(CONFIG['modalities']['cxr'], weight=.5, drop=.5)))}
# Spaces of their own, every aim there, three modalities of which one is a table that appears alone too.
SPACES = dict(OTHER, fusion=dict(dim=16, space='own', aim=['own', 'cross', 'joint'], weight=2.),
              modalities=dict(cxr=dict(CONFIG['modalities']['cxr'], weight=.5, drop=.5, prototypes=5), ehr=CONFIG['modalities']['ehr'], facts=dict(kind='tabular', encoder=dict(hidden=8, dim=8), alone=True)))
CONFIGS['spaces'] = SPACES
# Hidden patches predicted, in a heavy view with a mask for each sample and in a light one.
TOKENS = dict(CONFIG, modalities=dict(CONFIG['modalities'], cxr=dict(kind='image', encoder=dict(CONFIG['modalities']['cxr']['encoder'], stem='conv', mask_stem=True),
                                                                     views=dict(random=2, focal=0, heavy=1, random_size=32, focal_size=8, patch_drop=.25))),
              loss=dict(prototypes=6, tokens=dict(weight=.7)))
CONFIGS['tokens'] = dict(TOKENS, modalities=dict(TOKENS['modalities'], ehr=dict(kind='timeseries', encoder=dict(hidden=16, dim=16), views=dict(random=2, focal=0))))
# Cells of a chart forecast, filled in and known to the target, from states read both ways: ranks hold unequal numbers of cells.
CONFIGS['cells'] = dict(CONFIG, modalities=dict(CONFIG['modalities'], ehr=dict(kind='timeseries', encoder=dict(hidden=16, dim=0, bidirectional=True, pool=['mean', 'max', 'last'], inputs=['since', 'count']),
                                                                               views=dict(random=1, focal=1, random_masks=dict(cell=.3, channel=.3)))),
                        loss=dict(prototypes=6, weight=.5, cells=dict(weight=.7, kind=['forecast', 'value', 'latent', 'summary'], horizon=3)))
# Contrasts between modalities, whose rows are the patients that have both: their number differs from process to process.
CONFIGS |= {f'contrast, {loss}': dict(CONFIG, fusion=dict(dim=16, contrast=dict(weight=.5, loss=loss, dim=8, depth=depth))) for loss, depth in (('sigmoid', 0), ('infonce', 1))}
# The rivals: strangers, variances, centres and hidden parts of all processes.
BARE = dict(CONFIG, fusion=dict(dim=0), modalities=dict(CONFIG['modalities'], ehr=dict(kind='timeseries', encoder=dict(hidden=16, dim=0, pool=['mean']), views=dict(random=1, focal=1))))
CONFIGS |= {name: dict(CONFIG, objective=name, objectives={name: dict(outputs=9)} if name == 'dino' else {}) for name in ('simclr', 'simsiam', 'vicreg', 'dino')}
CONFIGS |= {name: dict(BARE, objective=name, objectives={name: dict(dim=8) | (dict(depth=1, heads=2) if name == 'mae' else {})}) for name in ('mae', 'clip', 'siglip')}
IMAGES = {'paired': [1]*8, 'some': [1, 0, 1, 1, 0, 1, 0, 1], 'one rank has none': [1, 0, 1, 1, 0, 0, 0, 0], 'nobody': [0]*8}   # who of eight samples has an image


def model_step(wrap, start, stop, images, config):
    "Loss, metrics and gradients of one step of an MMSN on samples start to stop."
    from mmsn.options import Config
    from mmsn.config import build
    from mmsn.data.cohort import Batch
    from mmsn.data.cohort import ModalityInfo
    from mmsn.model import MMSN
    channel = dict(name='hr', kind='continuous', columns=[0, 1], mask=1, unit='', normal=0., low=-9., high=9., categories=None)
    infos = dict(cxr=ModalityInfo('cxr', 'image', dict(kind='image', height=16, width=16, mean=.5, std=.25)),
                 ehr=ModalityInfo('ehr', 'timeseries', dict(kind='timeseries', timestep=1., channels=[channel], columns=['hr', 'mask'], mean=[0., 0.], std=[1., 1.])))
    infos['facts'] = ModalityInfo('facts', 'tabular', dict(kind='tabular', columns=['age', 'sex'], mean=[60., .5], std=[9., .5]))
    g = torch.Generator().manual_seed(2)
    has = torch.tensor(images).bool()
    x = torch.cat([torch.randn(8, 12, 1, generator=g), torch.ones(8, 12, 1)], 2)
    batch = Batch(index=torch.arange(8), data=dict(cxr=torch.randint(0, 256, (8, 1, 16, 16), generator=g).to(torch.uint8), ehr=x, facts=torch.arange(16.).view(8, 2)), lengths=dict(ehr=torch.full((8,), 12)),
                  present=dict(cxr=has, ehr=torch.ones(8, dtype=torch.bool), facts=torch.arange(8) != 3), labels=torch.zeros(8, 0)).select(slice(start, stop))
    inner = MMSN(build(Config, config), infos)
    model = wrap(inner)
    for step in range(2):   # a second forward and backward: DDP notices only then that a parameter was left out
        model.zero_grad()
        with torch.no_grad(): views = inner.views(batch, 0, 0)
        out = model(views)
        out.loss.backward()
    metrics = {k: v for k, v in out.metrics.items() if not k.endswith(('effective_rank', 'spread'))}     # of the rows of a process
    metrics |= {f'buffer {n}': b for n, b in inner.named_buffers() if n.endswith('centres')}
    return dict(loss=out.loss.detach(), **metrics, **{f'gradient {n}': p.grad for n, p in inner.named_parameters() if p.requires_grad})


def model_worker(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try:
        for name, config in CONFIGS.items():
            for case, images in IMAGES.items(): save_file(model_step(DistributedDataParallel, 4*rank, 4*rank + 4, images, config), f'{folder}/{rank}-{name}-{case}.safetensors')
    finally: dist.destroy_process_group()
    leave()


@pytest.fixture(scope='module')
def model_found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    start(2, model_worker, free_port(), str(folder))
    return folder


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('case', IMAGES)
def test_model_on_two_ranks_is_one(model_found, case, config):
    "The same of MMSN with every group of anchors, whoever lacks an image, without find_unused_parameters."
    wanted = model_step(lambda model: model, 0, 8, IMAGES[case], CONFIGS[config])
    for rank in (0, 1):
        seen = load_file(model_found/f'{rank}-{config}-{case}.safetensors')
        assert seen.keys() == wanted.keys()
        for name, value in wanted.items(): torch.testing.assert_close(seen[name], value, atol=2e-6, rtol=1e-5, equal_nan=True, msg=lambda m: f'rank {rank}, {name}: {m}')


# The trainer: 24 samples on one process, 12 and 12, 8 + 8 + 8; and 16 on three, which is 6 + 5 + 5

TRAINER = ['modalities.cxr.encoder.dim=24', 'modalities.cxr.encoder.depth=2', 'modalities.cxr.encoder.patch=8', 'modalities.cxr.views.random_size=16',
           'modalities.cxr.views.focal_size=8', 'modalities.ehr.encoder.hidden=16', 'modalities.ehr.encoder.dim=16', 'modalities.ehr.ignore=[]', 'fusion.dim=24',
           'head.hidden=32', 'head.output=16', 'head.norm=layer', 'loss.prototypes=8', 'optim.epochs=2', 'optim.warmup_epochs=1', 'train.threads=1', 'train.log_every=1']
SPLITS = {'2 processes': (2, 12), '3 processes': (3, 8), '3 processes, uneven': (3, 16)}


def step_slack(p, optimizer, lr, largest):
    """How much further one of AdamW's steps moves each entry of `p` if gradients err by 1 of `largest`, their largest entry so far.
    The step is lr·u, u = m/(√v + ε), where m is a weighted mean of gradients and √v a weighted norm of them, so that an error e in each moves both by e at most:
    |Δu| ≤ e(1 + |u|)/(√v + ε). It is large only where gradients are near rounding, as those of an entry that happens to stand at a minimum."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    m, v = (state[k]/(1 - beta**state['step']) for k, beta in zip(('exp_avg', 'exp_avg_sq'), group['betas']))
    below = v.sqrt() + group['eps']
    return lr*largest*(1 + m.abs()/below)/below


def train_worker(rank, world, port, folder, config, steps):
    "Ten steps of one process: the first step's loss and gradients, the target after all; and features of the test split, gathered."
    if world > 1: os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    from mmsn.config import load_config
    from mmsn.evaluate.features import extract_features, feature_matrix
    from mmsn.schedules import schedule
    from mmsn.loop import Trainer, gather_rows, train_step
    uneven = folder.endswith('uneven')
    trainer = Trainer(load_config('demo', [*config, f'train.run={folder}/none']))
    if uneven: trainer.batch = 16           # as a run that was started on one process and resumes on three
    inner, batches, seen = trainer.accelerator.unwrap_model(trainer.model), trainer.batches(), {}
    trainer.steps_per_epoch = len(trainer.rows)//trainer.batch
    trained = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    largest, slack, target = ({n: 0. for n in trained} for _ in range(3))
    for step in range(steps):
        epoch, found = next(batches)
        values = schedule(trainer.config.optim, step, trainer.steps_per_epoch)
        out, norm = train_step(trainer.accelerator, trainer.model, trainer.optimizer, found, values, trainer.config, epoch, step)
        trainer.step += 1
        for n, p in trained.items():
            largest[n] = max(largest[n], p.grad.abs().max().item())
            slack[n] = slack[n] + step_slack(p, trainer.optimizer, values.lr, largest[n])
            target[n] = values.momentum*target[n] + (1 - values.momentum)*slack[n]
        if step == 0: seen |= {f'gradient {n}': p.grad.clone() for n, p in trained.items()} | {'loss of step 1': out.loss.detach()}
    seen |= {f'target {n}': w.clone() for n, w in inner.state_dict().items() if n.startswith('target') and w.is_floating_point()}
    seen |= {f'after {n}': p.detach().clone() for n, p in trained.items()} | {f'loss of step {steps}': out.loss.detach()}
    seen |= {f'slack of after {n}': x for n, x in slack.items()}
    seen |= {f'slack of target {b}{n[len(a):]}': x for a, b in inner._followers().items() for n, x in target.items() if n.startswith(f'{a}.')}
    rows = trainer.cohort.rows('test', list(trainer.config.modalities))
    mine = torch.arange(rank, len(rows), world)
    table = extract_features(inner.eval(), trainer.cohort, rows[mine.numpy()], batch_size=7)
    seen['features'] = gather_rows(torch.tensor(feature_matrix(table, 'joint')), mine)
    seen['ids'] = gather_rows(torch.tensor(table.sample_id.tolist()), mine)
    if rank == world - 1: save_file({k: v.contiguous() for k, v in seen.items()}, f'{folder}.safetensors')
    # DDP's reducer has to go before its process group: in torch 2.9 the last reference to a destroyed group waits for a thread that waits for the interpreter
    accelerator = trainer.accelerator
    del trainer, inner, trained, batches, out, norm, p
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    from mmsn.testing import toy_cohort
    return toy_cohort(tmp_path_factory.mktemp('toy')/'cohort', n=240)


@pytest.fixture(scope='module')
def ten_steps(toy, tmp_path_factory):
    "What the last process of each split saw, by name; 'whole 24' and 'whole 16' are one process."
    folder, found = tmp_path_factory.mktemp('ten'), {}
    for name, (world, size) in {'whole 24': (1, 24), 'whole 16': (1, 16), **SPLITS}.items():
        path = folder/name.replace(' ', '-').replace(',', '')
        start(world, train_worker, world, free_port(), str(path), [*TRAINER, f'data.cohort={toy.folder}', f'optim.batch_size={size}'], 10)
        found[name] = load_file(f'{path}.safetensors')
    return found


def difference(a, b, slack=0.):
    "Largest difference of two tensors beyond `slack`, over the largest entry."
    return (((a.double() - b.double()).abs() - slack).clamp_min(0).max()/a.double().abs().max().clamp_min(1e-30)).item()


def without_keys(found):
    "The same without the attention's key biases: softmax ignores them, so their gradient is rounding, which AdamW divides by rounding."
    third = lambda v: torch.cat([v[:len(v)//3], v[-(len(v)//3):]])
    return {k: third(v) if k.endswith('qkv.bias') else v for k, v in found.items()}


def summed_rows(batch):
    "Rows that the gradient of an image encoder's weight sums over: samples, views of each, tokens of a view."
    from mmsn.config import load_config
    image = load_config('demo', TRAINER).modalities['cxr']
    tokens = lambda size: (size//image.encoder.patch)**2
    return batch*(image.views.random*tokens(image.views.random_size) + image.views.focal*tokens(image.views.focal_size))


@pytest.mark.parametrize('split', SPLITS)
def test_ten_steps_do_not_depend_on_processes(ten_steps, split):
    "Loss, gradients of every parameter, weights and target after ten steps, and gathered features; differences over the largest entry of each tensor."
    whole, seen = (without_keys(ten_steps[k]) for k in ('whole 16' if 'uneven' in split else 'whole 24', split))
    assert whole.keys() == seen.keys() and 'gradient prototypes' in whole
    assert whole['ids'].equal(seen['ids']), 'nobody is lost or counted twice in evaluation'
    # a gradient is a sum over rows, which several processes add in another order: n float32 additions wander by eps*sqrt(n) of the largest term, in each of the two sums
    rounding = 2*torch.finfo(torch.float32).eps*summed_rows(16 if 'uneven' in split else 24)**.5
    # an entry that was born 0 is nothing but ten of AdamW's steps, each a ratio of small numbers: single tensors are looser than the whole,
    # and an entry whose gradients are themselves near that rounding may differ by what it makes of the steps (`step_slack`)
    for kind, most in {'loss of step 1': rounding, 'gradient': rounding, 'loss of step 10': 5e-6, 'features': 5e-6, 'target': 1e-4, 'after': 1e-4}.items():
        found = {k: difference(v, seen[k], rounding*whole.get(f'slack of {k}', 0.)) for k, v in whole.items() if k == kind or k.startswith(f'{kind} ') and kind in ('gradient', 'target', 'after')}
        if kind == 'features': assert whole[kind].isfinite().all()
        worst = max(found, key=found.get)
        x, y = (torch.cat([t[k].flatten().double() for k in found]) for t in (whole, seen))
        together = ((x - y).norm()/x.norm()).item()
        print(f'\n{split}: {kind}: {found[worst]:.1e} ({worst}, of {len(found)}); all together {together:.1e}', end='')
        assert found[worst] <= most and together <= 2e-6


def test_key_biases_have_no_gradient(ten_steps):
    "A key bias adds one number to all logits of a query, which softmax ignores: its gradient is what rounding leaves of the gradient of all three biases."
    rounding = 2*torch.finfo(torch.float32).eps*summed_rows(24)**.5
    for found in ten_steps.values():
        biases = [v for k, v in found.items() if k.startswith('gradient ') and k.endswith('qkv.bias')]
        assert len(biases) == 2
        for query, key, value in (b.chunk(3) for b in biases): assert key.abs().max() <= rounding*value.abs().max() and query.abs().max() > 100*key.abs().max()


# Going on on another number of processes, and signals

def part_worker(rank, world, port, config, until=None):
    "Train up to step `until`, or to the end."
    if world > 1: os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    from mmsn.config import load_config
    from mmsn.loop import Trainer
    trainer = Trainer(load_config('demo', config))
    if until: trainer.total = until
    trainer.fit()


def part(world, *args, **kw): return start(world, part_worker, world, free_port(), *args, **kw)


@pytest.fixture(scope='module')
def unchanged(toy, tmp_path_factory):
    "The curve of a run on one process, and its last weights."
    from mmsn.checkpoint import latest
    folder = tmp_path_factory.mktemp('unchanged')/'run'
    part(1, [*TRAINER, f'data.cohort={toy.folder}', 'optim.batch_size=24', f'train.run={folder}'])
    return pd.read_csv(folder/'metrics.csv'), latest(folder/'checkpoints')[0]['model']


@pytest.mark.parametrize('before,after', [(1, 2), (2, 1), (2, 3)])
def test_goes_on_on_another_number_of_processes(toy, unchanged, tmp_path, before, after):
    """The global batch and order stay, so does the curve; stopped in mid-epoch. So do all weights that an output depends on, to the rounding of so many steps, of the largest entry of each; key biases, whose
    gradient is rounding (see `without_keys`), differ by no more than AdamW can move them: (1 - beta1)/sqrt(1 - beta2) of the learning rate a step, in either run."""
    from mmsn.checkpoint import latest
    unchanged, weights = unchanged
    config = [*TRAINER, f'data.cohort={toy.folder}', f'optim.batch_size={24//before}', f'train.run={tmp_path/"run"}']
    part(before, config, 7)
    part(after, config)
    curve = pd.read_csv(tmp_path/'run'/'metrics.csv')
    assert list(curve.step) == list(unchanged.step) and len(curve) > 9
    for name in ('loss', 'gradient_norm', 'joint/cross_entropy', 'cxr/me_max', 'lr', 'momentum'):
        pd.testing.assert_series_equal(curve[name], unchanged[name], rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path/'run'/'run.json').read_text())['processes'] == before
    states = [json.loads(p.read_text())['processes'] for p in sorted((tmp_path/'run'/'checkpoints').glob('*/state.json'))]
    assert states == [before, after]
    seen = latest(tmp_path/'run'/'checkpoints')[0]['model']
    found, wanted = ({k: v for k, v in without_keys(w).items() if v.is_floating_point()} for w in (seen, weights))
    worst = max(difference(v, found[k]) for k, v in wanted.items())
    keys = max((v - seen[k]).abs().max().item() for k, v in weights.items() if k.endswith('qkv.bias'))
    print(f'\n{before} -> {after}: weights {worst:.1e}, key biases {keys:.1e}', end='')
    # each step adds the rounding of its longest sum over the batch (see `test_ten_steps_do_not_depend_on_processes`); how much of it remains differs between versions of torch
    rounding = 2*torch.finfo(torch.float32).eps*summed_rows(24)**.5
    assert worst <= len(curve)*rounding and keys <= 2*.1/.001**.5*curve.lr[7:].sum()


@pytest.mark.parametrize('number,rank', [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_process_stops_all(toy, tmp_path, number, rank):
    "Only one hears it; both finish the same step and leave with 0, and the checkpoint loads."
    from mmsn.checkpoint import latest
    folder = tmp_path/'run'
    context = part(2, [*TRAINER, f'data.cohort={toy.folder}', 'optim.batch_size=12', f'train.run={folder}', 'optim.epochs=10000'], join=False)
    deadline = time.time() + 120
    while time.time() < deadline and not ((folder/'metrics.jsonl').exists() and (folder/'metrics.jsonl').read_text().count('\n') > 3): time.sleep(.02)
    os.kill(context.processes[rank].pid, number)
    for process in context.processes: process.join(60)
    assert [p.exitcode for p in context.processes] == [0, 0]
    _, state = latest(folder/'checkpoints')
    assert state['step'] == len((folder/'metrics.jsonl').read_text().splitlines()) > 3


def tracked_worker(rank, world, port, config, folder):
    "Train to the end with a tracker that writes what it is told into a file of the folder; then the processes still hear one another."
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    from accelerate.tracking import GeneralTracker
    from mmsn import loop
    from mmsn.config import load_config

    class Lines(GeneralTracker):
        name, requires_logging_directory, tracker = 'lines', False, None
        def __init__(self): super().__init__(_blank=True)
        def write(self, line):
            with open(folder/f'lines-{rank}', 'a') as f: f.write(f'{line}\n')
        def store_init_configuration(self, values): self.write(values['name'])
        def log(self, values, step=None, **kwargs): self.write(step)
        def finish(self): self.write('end')

    loop.make_trackers = lambda *_: (dict(log_with=Lines()), {})
    trainer = loop.Trainer(load_config('demo', [*config, 'train.tracker=tensorboard']))
    trainer.fit()
    heard = loop.gather_rows(torch.tensor([rank]), torch.tensor([rank])).tolist()
    (folder/f'heard-{rank}').write_text(json.dumps(heard))


def test_a_tracked_run_on_two_processes_ends(toy, tmp_path):
    "The tracker is told to finish, and the process group stays, as without one: to destroy it while DDP holds it may wait for ever (torch 2.9, see `train_worker`)."
    config = [*TRAINER, f'data.cohort={toy.folder}', 'optim.batch_size=12', f'train.run={tmp_path/"run"}', 'optim.epochs=1', 'optim.warmup_epochs=0']
    context = start(2, tracked_worker, 2, free_port(), config, tmp_path, join=False)
    for process in context.processes: process.join(240)                 # ten seconds where nothing else runs; one that waits for ever is what this is about
    codes = [p.exitcode for p in context.processes]
    for process in context.processes: process.kill()
    assert codes == [0, 0] and [json.loads((tmp_path/f'heard-{rank}').read_text()) for rank in (0, 1)] == [[0, 1]]*2
    steps = pd.read_csv(tmp_path/'run'/'metrics.csv').step
    assert (tmp_path/'lines-0').read_text().split() == ['demo', *map(str, steps), 'end'] and len(steps) > 3
