"The names at the top, called with what they cannot mean: one line that names the argument, what it should be and what it was."
import pytest
import torch

from mmsn import MMSN, Cohort, evaluate, load_config, open_encoder, prepare, train
from mmsn.options import InputError
from mmsn.sources import ImageModel
from mmsn.testing import toy_cohort, toy_config


@pytest.fixture(scope='module')
def patients(tmp_path_factory):
    cohort = toy_cohort(tmp_path_factory.mktemp('toy')/'toy')
    return cohort, cohort.batch(range(4)), MMSN.from_config(toy_config(), cohort)


@pytest.mark.parametrize('call, said', [
    (lambda: open_encoder(5), r'source should be a path.*not 5 \(int\)'),
    (lambda: open_encoder('x', cohort='cohorts/x'), r"cohort should be an open cohort .*not 'cohorts/x' \(str\)"),
    (lambda: open_encoder('x', modality=3), r'modality should be .*not 3'),
    (lambda: open_encoder('torchvision:resnet18', pretrained='no'), r'pretrained should be True or False'),
    (lambda: train('demo'), r"config should be a config, .*not 'demo'"),
    (lambda: train(toy_config(), 'cohorts/x'), r'cohort should be an open cohort'),
    (lambda: load_config(5), r'source should be a preset'),
    (lambda: load_config('demo', 'optim.epochs=3'), r'overrides should be a list'),
    (lambda: load_config('demo', [3]), r'each of overrides .*not 3'),
    (lambda: evaluate(5), r"source should be a run's folder"),
    (lambda: evaluate('runs/x', 5), r'overrides should be a list'),
    (lambda: prepare.synthetic(5), r'out should be .*not 5'),
    (lambda: Cohort.open(5), r'folder should be .*not 5')])
def test_front_door_names_the_argument(call, said):
    with pytest.raises(InputError, match=said): call()


@pytest.mark.parametrize('words, said', [
    (dict(drop=3), r'drop should be the name of a modality'), (dict(drop='mri'), r"no modality 'mri'"), (dict(patches='half'), r"not 'half'"),
    (dict(patches=True), r'not True \(bool\)'), (dict(patches=1.), r'below 1'), (dict(patches=float('nan')), r'below 1, not nan'), (dict(seed=1.5), r'seed should be a whole number')])
def test_encode_names_the_option(patients, words, said):
    _, batch, model = patients
    with pytest.raises(InputError, match=said): model.encode(batch, **words)
    image = ImageModel(torch.nn.Flatten(), 'cxr', 16, (.5,), (.5,), 'a toy', None)
    with pytest.raises(InputError, match=said): image.encode(batch, **words)


def test_encode_wants_a_batch(patients):
    with pytest.raises(InputError, match='encode wants a batch'): patients[2].encode([1, 2])


def test_encode_takes_one_name_or_several(patients):
    _, batch, model = patients
    one, same, none = (model.encode(batch, drop=d)['joint'] for d in ('cxr', ['cxr'], ()))
    assert torch.equal(one, same) and not torch.equal(one, none)


def test_help_of_the_package():
    "help(mmsn) says what it is, shows the way in Python, and where each thing is explained."
    import mmsn, pydoc
    text = pydoc.plain(pydoc.render_doc(mmsn))
    for said in ('Labels are scarce', 'from mmsn import prepare', 'prepare.synthetic(', 'encoder.encode(', 'mmsn.prepare', 'mmsn-prepare', 'open_encoder'): assert said in text, said
    for said in ('drop', 'patches', 'seed', 'NaN'): assert said in open_encoder.__doc__
