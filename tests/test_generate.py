"Models that draw: a run that was interrupted is bit-equal to one that was not, processes share a batch, folders draw by themselves, and what is wrong is one line."
import io, json, os, shutil, socket
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from mmsn.config import load_config
from mmsn.data.cohort import Cohort
from mmsn.generate.__main__ import main
from mmsn.generate.model import DalleModel, VAEModel, build_model, open_generator, tokens_of
from mmsn.loop import Trainer
from mmsn.options import InputError
from mmsn.run import subjects_of_run
from mmsn.testing import toy_cohort, toy_config
from mmsn.train import train

VAE = dict(pixels=16, layers=2, codes=12, dim=8, hidden=8, temperature_decay=.01, temperature_floor=.4)
OPTIM = dict(batch_size=16, epochs=2, warmup_epochs=.5, lr=3e-3, weight_decay=0., final_weight_decay=0., clip=.5)

# what each dial is changed to
DIALS = dict(vae=dict(pixels=32, layers=1, codes=5, dim=4, hidden=4, blocks=2, temperature=.5, temperature_decay=.5, temperature_floor=.89, kl=.1),
             dalle=dict(length=9, dim=8, depth=1, heads=4, dim_head=4, mlp_ratio=2., image_weight=1.))


def config(kind, folder, vae='', run='run', **kw):
    "A small config of either objective on the toy cohort in `folder`."
    optim, own = OPTIM | kw.pop('optim', {}), kw.pop('own', {})
    common = dict(data=dict(cohort=str(folder/'cohort'), samples='paired'), train=dict(run=str(folder/run), threads=1, log_every=1, **kw.pop('train', {})), objective=kind, optim=optim) | kw
    if kind == 'vae': return toy_config('cxr', objectives=dict(vae=VAE | own), **common)
    dalle = dict(vae=str(vae or folder/'vae'), length=20, dim=16, depth=2, heads=2, dim_head=8) | own
    return toy_config('cxr', 'report', objectives=dict(dalle=dalle), **common)


def quiet(f, *a, **kw):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()): f(*a, **kw)
    return out.getvalue()


def fails(*words):
    "The line that the command ends on, with code 2."
    with redirect_stderr(io.StringIO()) as line, redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as e: main([*map(str, words)])
    assert e.value.code == 2 and line.getvalue().count('\n') == 1
    return line.getvalue()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A cohort with reports, a run of a VAE and one of DALL-E."
    folder = tmp_path_factory.mktemp('generate')
    cohort = toy_cohort(folder/'cohort', n=200, reports=True)
    for kind in ('vae', 'dalle'): quiet(train, config(kind, folder, run=kind), cohort)
    return folder


@pytest.mark.parametrize('kind', ['vae', 'dalle'])
@pytest.mark.parametrize('optimizer', ['adamw', 'radam'])
def test_resume_is_bit_equal(place, kind, optimizer):
    "Stopped after five steps, in mid-epoch, and resumed by the same command: weights, moments and metrics are those of the run that was not stopped."
    cohort, ends = Cohort.open(place/'cohort'), []
    for name in ('whole', 'torn'):
        c = config(kind, place, run=f'{kind}-{optimizer}-{name}', optim=dict(optimizer=optimizer, accumulation=2, epochs=4))
        if name == 'torn':
            first = Trainer(c, cohort)
            real = first.take
            def take(batches):
                found = real(batches)
                first.stop = first.step >= 5
                return found
            first.take = take
            quiet(first.fit)
            assert first.step == 5 and 5 % first.steps_per_epoch
            (place/c.train.run/'.model-7-new').mkdir()                # what a process left that was killed while it exported
        quiet(train, c, cohort)
        run = place/f'{kind}-{optimizer}-{name}'
        assert not [*run.glob('.model-*')] and (run/'model'/'config.json').is_file()
        last = sorted((run/'checkpoints').glob('step-*'))[-1]
        ends.append((load_file(last/'model.safetensors'), load_file(last/'optimizer.safetensors'), pd.read_csv(run/'metrics.csv').drop(columns=['samples_per_s', 'memory_gb'])))
    for a, b in zip(ends[0][:2], ends[1][:2]):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    pd.testing.assert_frame_equal(ends[0][2], ends[1][2], check_exact=True)


def test_optimizers_differ_and_adamw_is_as_before(place):
    "RAdam is another optimiser; the default is AdamW, bit for bit, as a loop over torch's own says."
    cohort, ends = Cohort.open(place/'cohort'), {}
    for name in ('adamw', 'radam'):
        t = Trainer(config('vae', place, run=f'optim-{name}', optim=dict(optimizer=name)), cohort)
        batches = t.batches()
        for _ in range(8): t.take(batches)
        ends[name] = t.model.vae.codebook.weight.detach().clone()
        assert type(getattr(t.optimizer, 'optimizer', t.optimizer)).__name__.lower() == name
    assert not torch.equal(*ends.values())
    with pytest.raises(InputError, match="'adamw', 'radam'"): config('vae', place, optim=dict(optimizer='sgd'))


def step(rows, folder, kind, wrap):
    "Loss and gradients of one step on `rows` of the cohort."
    cohort = Cohort.open(folder/'cohort')
    c = config(kind, folder)
    model = build_model(c, cohort)
    batch = cohort.batch(rows, list(c.modalities))
    whole = wrap(model)             # kept: without it no gradient is averaged
    out = whole(model.views(batch, 3, 1), model.annealed(4))
    out.loss.backward()
    return {'loss': out.loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def rank(i, port, folder):
    "One of two processes, each with every second row."
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=i, world_size=2)
    rows = Cohort.open(folder/'cohort').rows('train', ['cxr', 'report'], 'paired')[:8]
    for kind in ('vae', 'dalle'): save_file({k: v.contiguous() for k, v in step(rows[i::2], folder, kind, DistributedDataParallel).items()}, folder/f'{kind}-{i}.safetensors')
    dist.destroy_process_group()
    os._exit(0)


def test_two_ranks_are_one(place):
    "Two processes of four samples have the loss of one of eight, to 1e-6, and its gradients."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(rank, (port, place), nprocs=2)
    rows = Cohort.open(place/'cohort').rows('train', ['cxr', 'report'], 'paired')[:8]
    for kind in ('vae', 'dalle'):
        wanted, seen = step(rows, place, kind, lambda m: m), [load_file(place/f'{kind}-{i}.safetensors') for i in (0, 1)]
        torch.testing.assert_close((seen[0]['loss'] + seen[1]['loss'])/2, wanted['loss'], atol=1e-6, rtol=1e-6)
        assert wanted.keys() == seen[0].keys() and wanted['loss'] > 0
        whole = lambda found: torch.cat([found[name].flatten() for name in sorted(set(wanted) - {'loss'})])
        for found in seen: assert (whole(found) - whole(wanted)).norm() <= 1e-5*whole(wanted).norm(), kind     # single gradients may cancel to rounding errors
    one, other = (step(rows, place, 'vae', lambda m: m)['loss'], step(rows[::-1].copy(), place, 'vae', lambda m: m)['loss'])
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)                # the noise belongs to the sample, not to its place in the batch


def test_the_vae_stays_and_its_hash_is_known(place):
    "A run of DALL-E holds the VAE that it names, unchanged, and says whose it is; another VAE at that place is refused."
    a, b = load_file(place/'vae'/'model'/'model.safetensors'), load_file(place/'dalle'/'model'/'model.safetensors')
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    about = json.loads((place/'dalle'/'model'/'config.json').read_text())
    assert about['vae']['weights'] == json.loads((place/'vae'/'model'/'config.json').read_text())['weights']
    assert subjects_of_run(place/'vae') <= subjects_of_run(place/'dalle')
    cohort = Cohort.open(place/'cohort')
    shutil.copytree(place/'vae', place/'first')
    c = config('dalle', place, vae=place/'first', run='exchanged', train=dict(checkpoint_every=2))
    quiet(train, c, cohort)
    quiet(train, config('vae', place, run='second', train=dict(seed=1)), cohort)
    shutil.rmtree(place/'first'); shutil.copytree(place/'second', place/'first')
    with pytest.raises(InputError, match='is another VAE than'): Trainer(c, cohort)


@pytest.mark.parametrize('kind', ['vae', 'dalle'])
def test_a_damaged_folder_is_refused(place, kind):
    folder = place/f'damaged-{kind}'
    shutil.copytree(place/kind/'model', folder)
    (folder/'model.safetensors').write_bytes((place/kind/'model'/'model.safetensors').read_bytes()[:-4] + b'abcd')
    with pytest.raises(InputError, match='was changed'): open_generator(folder)
    (folder/'model.safetensors').write_bytes(b'nothing')
    with pytest.raises(InputError, match='safetensors'): open_generator(folder)
    (folder/'config.json').write_text('{"format": "mmsn-generator"}')
    with pytest.raises(InputError): open_generator(folder)


def test_configs_that_do_not_fit():
    "Other modalities than the objective reads, or options of encoders."
    for words, match in ((['vae', 'data.samples=paired', 'train.probe_every=5'], 'probe_every is about encoders'), (['vae', 'train.init_from=x'], 'init_from is about'), (['dalle', 'data.samples=any'], 'data.samples=paired'),
                         (['demo', 'objective=dalle'], 'one modality of kind image and one of kind text'), (['vae', 'objectives.dalle.dim=7'], 'has no effect while objective is vae'),
                         (['vae', 'objectives.vae.layers=0'], 'should lie between'), (['demo', 'objectives.vae.kl=1'], 'has no effect')):
        with pytest.raises(InputError, match=match): load_config(words[0], words[1:])
    for name, pixels, codes in (('vae', 64, 256), ('vae_256', 256, 8192)):
        o = load_config(name).objectives.vae
        assert (o.pixels, o.codes) == (pixels, codes)
    full = load_config('dalle_256')
    assert (full.optim.optimizer, full.optim.lr, full.optim.clip, full.optim.accumulation, full.objectives.dalle.depth) == ('radam', 3e-4, .5, 5, 12)


def test_each_option_has_an_effect(place):
    "Whatever dial is changed, weights or loss of a step are others."
    cohort = Cohort.open(place/'cohort')
    def first(kind, at=4, **own):
        c = config(kind, place, own=own)
        torch.manual_seed(0)
        model = build_model(c, cohort)
        batch = cohort.batch(cohort.rows('train', list(c.modalities), 'paired')[:6], list(c.modalities))
        return [p.shape for p in model.parameters()], model(model.views(batch, 0, 0), model.annealed(at)).loss.item()
    for kind, changes in DIALS.items():
        before = first(kind)
        assert before == first(kind)
        for key, value in changes.items(): assert first(kind, **{key: value}) != before, key
    with pytest.raises(InputError, match='cannot be halved 2 times'): first('vae', pixels=18)


def test_command(place, tmp_path):
    "Images of reports, the same for the same seed and others for another; without a cohort; and lines for what is wrong."
    alone = tmp_path/'model'
    shutil.copytree(place/'dalle'/'model', alone)                    # neither run, VAE nor cohort beside it
    def drawn(out, *words):
        quiet(main, [str(alone), '--report', 'The heart is enlarged.', '--images', '2', '--out', str(tmp_path/out), *words])
        return [(tmp_path/out/f).read_bytes() for f in pd.read_csv(tmp_path/out/'generated.csv').file]
    figures = plt.get_fignums()
    assert drawn('a') == drawn('a') == drawn('b') != drawn('c', '--seed', '1')
    assert plt.get_fignums() == figures, 'a figure that was saved is still open'
    table = pd.read_csv(tmp_path/'c'/'generated.csv')
    assert list(table.seed) == [1, 1] and set(table.text) == {'The heart is enlarged.'}
    quiet(main, [str(place/'dalle'), '--samples', '3', '--images', '1', '--split', 'val'])
    table = pd.read_csv(place/'dalle'/'generated'/'generated.csv')
    cohort = Cohort.open(place/'cohort')
    where = cohort.samples.reset_index().set_index('sample_id').loc[table.sample_id, 'index']
    assert [cohort.text(i) for i in where] == list(table.text) and set(cohort.samples.split.iloc[where]) == {'val'}
    said = quiet(main, [str(place/'vae'), '--samples', '2'])
    assert 'told again in 16 words each' in said
    for words, match in (([place/'cohort'], 'no model that draws'), ([tmp_path/'x'], 'no model at'), ([place/'vae', '--report', 'heart'], 'knows no reports'), ([alone, '--report', ''], 'has no words'),
                         ([alone, '--images', '0'], '--images should lie'), ([alone, '--temperature', '-1'], '--temperature'), ([alone, '--report', 'x', '--out', place/'vae'], 'was not written by mmsn-generate'),
                         ([alone, '--top-k', '-1'], '--top-k'), ([alone, '--report', 'x', '--cohort', 'y'], 'give --report or --cohort'), ([alone, '--split', 'tset'], 'invalid choice')):
        assert match in fails(*words), words


def test_evaluating_a_model_that_draws(place):
    "It has no encoder, and that is said in a line."
    from mmsn.sources import open_encoder
    with pytest.raises(InputError, match='draws images'): open_encoder(place/'vae')
    with pytest.raises(InputError, match='draws images'): open_encoder(place/'dalle'/'model')


def test_shuffled_pairs_are_the_control(place):
    "data.shuffle_pairs gives each image the report of another patient."
    cohort = Cohort.open(place/'cohort')
    seen = [next(Trainer(config('dalle', place, run=f'pairs-{s}', data=dict(cohort=str(place/'cohort'), samples='paired', shuffle_pairs=s)), cohort).batches())[1][0] for s in (False, True)]
    assert torch.equal(seen[0].data['cxr'], seen[1].data['cxr']) and not torch.equal(seen[0].lengths['report'], seen[1].lengths['report'])
