"Config files of the earlier academic code, at the command line; what becomes of each key is in nbs/01_seed_config.ipynb."
import pandas as pd
import pytest

from conftest import SMALL, refused, run
from mmsn.config import load_config
from mmsn.train import main

SEED = '''
criterion: {num_proto: 8, batch_size: 16, final_sharpen: 0.5, use_ent: true, ent_weight: 0.0}
data: {ehr_augmentation: gaussian, rand_views: 1, focal_views: 2, rand_size: 32, focal_size: 16, image_folder: images/, pin_mem: true}
logging: {folder: FOLDER, write_tag: seeded}
meta: {model_name: deit_tiny, use_fp16: true}
optimization: {epochs: 1, warmup: 0}
'''
MINE = ["modalities.cxr.encoder.size=", *[o for o in SMALL if not o.startswith(('loss', 'optim', 'modalities.cxr.views'))], 'modalities.cxr.encoder.heads=3']


@pytest.fixture
def seed(tmp_path):
    path = tmp_path/'fusion.yaml'
    path.write_text(SEED.replace('FOLDER', str(tmp_path/'logs')))
    return path


def test_train_and_evaluate(cohort, seed, tmp_path):
    "Training goes by the file, warns of what does nothing, and a linear-evaluation file evaluates it."
    done = run('mmsn.train', '--seed-config', seed, f'data.cohort={cohort}', *MINE)
    folder = tmp_path/'logs'/'seeded'
    assert 'warning: meta.use_fp16=true' in done.stderr and 'warning: data.image_folder="images/"' in done.stderr and 'Traceback' not in done.stderr
    config = load_config(folder/'config.yaml')
    assert (config.loss.prototypes, config.modalities['ehr'].views.preset, config.optim.epochs, config.name) == (8, 'gaussian', 1, 'seeded')
    curve = pd.read_csv(folder/'metrics.csv')
    assert curve.sharpen.iloc[0] == .25 and curve.sharpen.iloc[-1] == .5
    linear = tmp_path/'linear.yaml'
    linear.write_text(f'meta: {{model_name: deit_tiny, device: "cuda:0"}}\noptimization: {{lr: 6.4}}\nlogging: {{folder: {tmp_path}/lineval, write_tag: tag, pretrain_path: {folder}}}\n')
    done = run('mmsn.evaluate', '--seed-config', linear, 'evaluate.baselines=false', 'evaluate.bootstrap=5', 'evaluate.masked=[]')
    assert 'warning: meta.device="cuda:0"' in done.stderr
    assert load_config(tmp_path/'lineval'/'tag'/'config.yaml').evaluate.probe_lrs == (6.4,)
    assert set(pd.read_csv(tmp_path/'lineval'/'tag'/'summary.csv').fraction) == {1.}


def test_wrong_input(cohort, seed, tmp_path, capsys):
    say = lambda *words: refused(main, ['--seed-config', *words], capsys)
    assert 'data.cohort' in say(seed)
    assert 'no file' in say(tmp_path/'none.yaml')
    assert 'nowhere' in say(seed, 'data.cohort=nowhere')
    assert 'key=value' in say(seed, 'demo', f'data.cohort={cohort}')
    for old, new, says in (('num_proto', 'num_protos', "did you mean 'criterion.num_proto'"), ('criterion', 'criterium', "did you mean 'criterion'"), ('deit_tiny', 'deit_tin', 'deit_SIZE'),
                           ('gaussian', 'gausian', 'gausian'), ('batch_size: 16', 'batch_size: x', 'should be int'), ('rand_size: 32', 'rand_size: 33', 'multiple')):
        wrong = tmp_path/'wrong.yaml'
        wrong.write_text(seed.read_text().replace(old, new))
        assert says in say(wrong, f'data.cohort={cohort}', *MINE), new
    assert not (tmp_path/'logs').exists()
