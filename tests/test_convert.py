"`mmsn-convert` from outside: full-size published files, both layouts of transformers, what may not be opened, and that nothing is left behind."
import json, os, pickle, subprocess, sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import refused, run
from mmsn import sources
from mmsn.options import Config, Head, ImageEncoder, ImageModality, ImageViews, Loss, SeriesModality
from mmsn.convert import main
from mmsn.sources import read_source
from mmsn.data.cohort import ModalityInfo
from mmsn.encoders.vit import ViT
from mmsn.model import MMSN

SMALL = dict(dim=128, depth=2, heads=2, patch=8)


def write(path, pixels=32, prefix='module.', prototypes=(16, 8), **kw):
    "A file of the published layout with random weights; returns its encoder."
    torch.manual_seed(0)
    vit = ViT(ImageEncoder(**SMALL | dict(channels=3) | kw), pixels).eval()
    for p in vit.parameters(): p.data += .02*torch.randn_like(p)
    encoder = {prefix + k: v for k, v in vit.state_dict().items()} | {prefix + 'fc.fc1.weight': torch.zeros(4, 4)}
    torch.save(dict(target_encoder=encoder, prototypes=torch.randn(prototypes)), path)
    return vit


def grey(n, size, mean, std):
    "Grey images: repeated and normalised for ImageNet's weights, and once by `mean` and `std`."
    g = torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(1))
    m, s = (torch.tensor(v).view(3, 1, 1) for v in sources.IMAGENET)
    return (g.repeat(1, 3, 1, 1) - m)/s, (g - mean)/std


class Attack:
    def __init__(self, where): self.where = str(where)

    def __reduce__(self): return os.mkdir, (self.where,)


def test_published_small_model_full_size(tmp_path):
    "S/16 at 224 pixels as published: through the command to mmsn, and the same features on grey images."
    vit = write(tmp_path/'s16.pth.tar', 224, prototypes=(1024, 256), size='small', patch=16)
    out = run('mmsn.convert', tmp_path/'s16.pth.tar', tmp_path/'out').stdout
    assert '384/12/6' in out and '224 pixels' in out and 'prototypes 1024 x 256' in out
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    model = MMSN.from_pretrained(tmp_path/'out')
    info = model.infos['cxr']
    rgb, one = grey(2, 224, float(info.mean[0]), float(info.std[0]))
    with torch.no_grad(): torch.testing.assert_close(model.target.encoders['cxr'](one), vit(rgb), atol=1e-4, rtol=0)


@pytest.mark.parametrize('layout', [4, 5, None])
@pytest.mark.parametrize('channels', [1, 3, None])
def test_transformers(tmp_path, layout, channels):
    "What is written for transformers computes the same there, on its own and on other image sizes."
    transformers = pytest.importorskip('transformers')
    vit = write(tmp_path/'w.pt')
    main([str(tmp_path/'w.pt'), str(tmp_path/'hf'), '--to', 'transformers'] + (['--layout', str(layout)] if layout else []) + (['--channels', str(channels)] if channels else []))
    names = load_file(tmp_path/'hf'/'model.safetensors')
    assert ('layers.1.attention.q_proj.weight' in names) == ((layout or sources.installed_layout()) == 5)
    theirs, report = transformers.ViTMSNModel.from_pretrained(tmp_path/'hf', output_loading_info=True)
    assert not any(report.values())
    about = json.loads((tmp_path/'hf'/'preprocessor_config.json').read_text())
    for size in (32, 48):
        rgb, one = grey(2, size, sum(about['image_mean'])/len(about['image_mean']), sum(about['image_std'])/len(about['image_std']))
        with torch.no_grad(): got = theirs.eval()(one if channels == 1 else rgb, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(got, vit.tokens(rgb), atol=1e-5 if channels != 1 else 1e-4, rtol=0)


def test_exported_encoder_there_and_back(tmp_path, capsys):
    "An encoder of two images and a chart: one of its images, through transformers, and back bit for bit."
    image = lambda dim: ImageModality(encoder=ImageEncoder(**SMALL | dict(dim=dim, heads=dim//64)), views=ImageViews(random_size=32, focal_size=16))
    picture = dict(kind='image', height=32, width=32, std=.2)
    hr = dict(name='hr', kind='continuous', columns=[0, 1], mask=1, unit='', normal=80., low=0., high=200., categories=None)
    infos = dict(front=picture | dict(mean=.4), side=picture | dict(mean=.6), ehr=dict(kind='timeseries', columns=['hr', 'mask'], mean=[80., 0.], std=[10., 1.], timestep=1., channels=[hr]))
    config = Config(modalities=dict(front=image(64), side=image(128), ehr=SeriesModality()), head=Head(hidden=8, depth=1, output=8), loss=Loss(prototypes=4))
    model = MMSN(config, {k: ModalityInfo.from_dict(k, v) for k, v in infos.items()})
    model.save_pretrained(tmp_path/'ours')
    assert 'front or side' in refused(main, [tmp_path/'ours', tmp_path/'hf', '--to', 'transformers'], capsys)
    assert "'ehr'" in refused(main, [tmp_path/'ours', tmp_path/'hf', '--modality', 'ehr'], capsys)
    main([str(tmp_path/'ours'), str(tmp_path/'hf'), '--to', 'transformers', '--modality', 'side'])
    assert json.loads((tmp_path/'hf'/'preprocessor_config.json').read_text())['image_mean'] == pytest.approx([.6])
    main([str(tmp_path/'hf'), str(tmp_path/'back'), '--modality', 'side'])
    back, first = read_source(tmp_path/'back'), model.target.encoders['side'].state_dict()
    assert back.name == 'side' and back.state.keys() == first.keys() and all(torch.equal(v, first[k]) for k, v in back.state.items())


@pytest.mark.parametrize('protocol', ['zip', 'legacy', 2, 4])
def test_a_pickle_that_would_run_code(tmp_path, protocol, capsys, monkeypatch):
    "It is refused in one line with exit code 2, whatever the environment says, and it does not run."
    path, wrong = tmp_path/'evil.pth.tar', dict(target_encoder=Attack(tmp_path/'attacked'))
    if isinstance(protocol, int): path.write_bytes(pickle.dumps(wrong, protocol))
    else: torch.save(wrong, path, _use_new_zipfile_serialization=protocol == 'zip')
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    assert 'could run code: refused' in refused(main, [path, tmp_path/'out'], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['evil.pth.tar']


def test_wrong_input(tmp_path, capsys):
    "One line each, and nothing is written."
    write(tmp_path/'w.pt')
    (tmp_path/'half.pt').write_bytes((tmp_path/'w.pt').read_bytes()[:3000])
    (tmp_path/'other').mkdir(); (tmp_path/'other'/'thesis.txt').touch()
    torch.save(dict(encoder={}), tmp_path/'none.pt')
    for argv, says in ((['half.pt', 'out'], 'damaged'), (['none.pt', 'out'], 'target_encoder'), (['nowhere', 'out'], 'nowhere'), (['w.pt', 'other'], 'choose another folder'),
                       (['w.pt', 'other', '--to', 'transformers'], 'choose another folder'), (['w.pt', 'out', '--layout', '5'], '--to transformers'), (['other', 'out'], 'config.json'),
                       (['w.pt', 'out', '--modality', 'a b'], '--modality')):
        assert says in refused(main, [tmp_path/argv[0], tmp_path/argv[1], *argv[2:]], capsys)
    done = subprocess.run([sys.executable, '-m', 'mmsn.convert', tmp_path/'w.pt', tmp_path/'out', '--channels', '4'], capture_output=True, text=True)
    assert done.returncode == 2 and 'invalid choice' in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['half.pt', 'none.pt', 'other', 'w.pt']


@pytest.mark.parametrize('to', ['mmsn', 'transformers'])
def test_a_write_that_fails(tmp_path, to, monkeypatch):
    "The folder that was there stays whole, and no half-written one remains."
    write(tmp_path/'w.pt')
    main([str(tmp_path/'w.pt'), str(tmp_path/'out'), '--to', to])
    before = {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir()}

    def fails(*args, **kwargs): raise RuntimeError('the disk is full')
    monkeypatch.setattr('mmsn.convert.save_file' if to == 'transformers' else 'mmsn.model.save_file', fails)
    with pytest.raises(RuntimeError): main([str(tmp_path/'w.pt'), str(tmp_path/'out'), '--to', to])
    assert {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'w.pt']


def test_a_run_is_its_encoder(tmp_path, capsys):
    "Wherever an encoder is read, the folder of the run that holds it will do."
    from mmsn.convert import main
    from mmsn.model import MMSN, local_folder
    from mmsn.sources import open_encoder, read_source
    from mmsn.testing import toy_cohort, toy_config
    run = tmp_path/'run'
    MMSN.from_config(toy_config(), toy_cohort(tmp_path/'cohort')).save_pretrained(run/'encoder')
    assert local_folder(run) == local_folder(run/'encoder') == run/'encoder'
    assert read_source(run).what == read_source(run/'encoder').what and open_encoder(run).folder == run/'encoder'
    main([str(run), str(tmp_path/'out')])
    assert 'wrote' in capsys.readouterr().out and (tmp_path/'out'/'config.json').is_file()
