"The config files of the earlier image–text code: published values arrive, every key counts or is explained, and a file trains."
import pandas as pd
import pytest
from omegaconf import OmegaConf

from conftest import run
from mmsn.config import load_config
from mmsn.options import InputError
from mmsn.seed_text import DIRECT, NAMED, OF_MODEL, RULES, RULES_OF, flat, plan_text, read_seed
from mmsn.testing import toy_cohort

PLATEAU = 'lr_decay: ReduceLROnPlateau\n  lr_decay_params: {{factor: {}, patience: 5, min_lr: 0.000001, threshold: 0.01, threshold_mode: abs}}'
CNN = 'cnn: {proto: CNN, backbone: resnet50, output_layer: avgpool, dropout_out: 0.0, permute: batch_first, freeze: False}'
DATA = '''dataset:
  proto: ImSeq
  image: {{root: data/mimic-cxr/, file: image.tok, image_path: data/images/, resize: 256, crop: 224, ext: .jpg, load_memory: False}}
  seq: {{root: data/mimic-cxr/, tokenizer: null, file: report.tok, tokenizer_max_len: {}, processing: r2gen_clean_report}}
'''
IMAGES = '''dataset: {proto: ImageDataset, root: data/mimic-cxr/, file: image.tok, image_path: data/images/, load_memory: False, ext: .jpg,
  custom_transform_val: "transforms.Compose([transforms.Resize((224, 224))])"}
'''
ENSEMBLE = '''validator: {batch_size: 32, splits: [validate]}
ensemblor:
  batch_size: 32
  splits: [train, validate, test]
  post_processing:
    - plot_representation: {keys: [linguistic, visual], labels_keep: [Pleural Effusion, Pneumonia], max_samples_per_class: 100}
  mode: best-1
'''
FILES = dict(
    convirt='name: convirt_mimic\nckpt_dir: ckpt\n' + DATA.format(128) + f'''model:
  proto: ConVIRT
  forward_batch_size: 4
  {CNN}
  projection: {{visual_embedding_dim: 2048, textual_embedding_dim: 768, projection_dim: 768}}
  loss: {{proto: ConVIRTLoss, tau: 0.1, lambda_: 0.75}}
trainor:
  optimizer: RAdam
  optim_params: {{lr: 5e-5}}
  batch_size: 32
  {PLATEAU.format(.5)}
  epochs: 99
  eval_start: 0
  early_stop: 20
  early_stop_metric: loss
''' + ENSEMBLE,
    gloria=DATA.format(128) + f'''model:
  proto: GLoRIA
  encoder: {{proto: null, last_n_layers: 4}}
  {CNN}
  visual_embedder: {{interm_feature_dim: 1024, feature_dim: 2048}}
  loss: {{local_loss_weight: 1.0, global_loss_weight: 1.0, temp1: 4.0, temp2: 5.0, temp3: 10.0}}
trainor:
  optimizer: Adam
  optim_params: {{lr: 0.0001}}
  batch_size: 48
  {PLATEAU.format(.8)}
  epochs: 99
  early_stop: 20
''' + ENSEMBLE,
    simclr='name: simclr_mimic\nckpt_dir: ckpt\n' + IMAGES + f'''model:
  proto: SimCLR
  {CNN}
  projection: {{visual_embedding_dim: 2048, projection_dim: 768}}
  loss: {{tau: 0.5}}
trainor:
  optimizer: RAdam
  optim_params: {{lr: 0.001}}
  batch_size: 16
  {PLATEAU.format(.8)}
  epochs: 999
''',
    vae='name: vae\n' + IMAGES + f'''model: {{proto: VAE, image_size: 256, num_layers: 3, num_tokens: 8192, codebook_dim: 1024, hidden_dim: 128, num_resnet_blocks: 1,
  temperature: 0.9, straight_through: False}}
trainor:
  optimizer: Adam
  optim_params: {{lr: 1e-3}}
  batch_size: 32
  {PLATEAU.format(.8)}
  epochs: 500
''',
    dalle=DATA.format(100).replace('resize: 256, crop: 224, ', '') + '''model:
  proto: DALLE
  vae: {image_size: 256, num_layers: 3, num_tokens: 8192, codebook_dim: 1024, hidden_dim: 128, num_resnet_blocks: 1, temperature: 0.9, straight_through: False}
  dalle: {dim: 1024, num_text_tokens: 6867, text_seq_len: 100, depth: 12, heads: 16, dim_head: 64, attn_dropout: 0.1, ff_dropout: 0.1}
trainor: {optimizer: RAdam, optim_params: {lr: '3e-4'}, batch_size: 2, clip_grad_norm: 0.5, grad_accu: 5, epochs: 99}
ensemblor: {generate_images: True, num_images: 5, mode: all}
''')
SMALL = ['trainor.batch_size=8', 'trainor.epochs=1', 'dataset.image.resize=32', 'dataset.image.crop=32', 'train.threads=1']


@pytest.fixture(params=FILES)
def seed(request, tmp_path):
    path = tmp_path/f'{request.param}.yml'
    path.write_text(FILES[request.param])
    return request.param, path


def test_published_values(seed):
    "The table of published values, method by method."
    name, path = seed
    c, _ = read_seed(path)
    o, d = c.optim, getattr(c.objectives, name)
    assert c.objective == name
    rest = (o.optimizer, o.lr, o.batch_size, o.accumulation, o.clip, o.weight_decay, o.final_lr, o.warmup_epochs, o.epochs)
    assert rest == dict(convirt=('radam', 5e-5, 32, 1, 0, 0, 1e-6, 0, 99), gloria=('adamw', 1e-4, 48, 1, 0, 0, 1e-6, 0, 99), simclr=('radam', 1e-3, 16, 1, 0, 0, 1e-6, 0, 999),
                        vae=('adamw', 1e-3, 32, 1, 0, 0, 1e-6, 0, 500), dalle=('radam', 3e-4, 2, 5, .5, 0, 3e-4, 0, 99))[name]
    if name == 'convirt': assert (d.temperature, d.weight, d.hidden, d.dim) == (.1, .75, 768, 768)
    if name == 'gloria': assert (d.attention, d.word, d.pair, d.layers) == (4, 5, 10, 4)
    if name == 'simclr': assert (d.temperature, c.head.hidden, c.head.depth, c.head.output) == (.5, 2048, 1, 768)
    if name == 'vae': assert (d.pixels, d.layers, d.codes, d.dim, d.hidden, d.blocks, d.temperature, d.temperature_decay, d.temperature_floor) == (256, 3, 8192, 1024, 128, 1, .9, 1e-6, .5)
    if name == 'dalle': assert (d.length, d.dim, d.depth, d.heads, d.dim_head, d.image_weight) == (100, 1024, 12, 16, 64, 7)
    if name in ('convirt', 'gloria', 'simclr'):
        image = c.modalities['cxr']
        assert image.encoder.name == 'resnet50' and (image.views.random, image.views.focal, image.views.random_size, image.views.patch_drop) == (1, 0, 224, 0)
    if name in ('convirt', 'gloria'):
        assert image.views.random_scale == ((224/256)**2,)*2 and c.modalities['report'].encoder.length == 128 and c.data.samples == 'paired'
        assert (c.evaluate.map_labels, c.evaluate.map_samples) == (('Pleural Effusion', 'Pneumonia'), 100)


def test_every_key_counts_or_is_explained(seed):
    "A key of a file changes the config when it is another value, or has a note, or asks for nothing."
    name, path = seed
    tree = OmegaConf.to_container(OmegaConf.load(path))
    plan = plan_text(tree)
    for key in flat(tree):
        if any(n.startswith(f'{key}=') for n in plan.notes): continue
        if key in NAMED and key not in RULES_OF[name]:
            value = plan.get(key, flat(tree)[key])
            assert value == NAMED[key][1] or key.endswith('visual_embedding_dim') and value == 2048, key
            continue
        ours = (DIRECT | OF_MODEL[name] | RULES | RULES_OF[name]).get(key)
        assert ours, key
    for key in ('trainor.early_stop', 'trainor.lr_decay', 'trainor.lr_decay_params.patience', 'ensemblor.splits', 'ensemblor.num_images'):
        if key in flat(tree): assert any(n.startswith(f'{key}=') for n in plan.notes), key


@pytest.mark.parametrize('name', FILES)
def test_every_honoured_key_changes_the_config(name, tmp_path):
    "Each key that is not named alone moves at least one option."
    tree = OmegaConf.create(FILES[name])
    other = {'trainor.optimizer': 'AdamW', 'model.cnn.backbone': 'resnet18', 'model.encoder.proto': 'owner/model', 'model.vae.ckpt': 'runs/v', 'trainor.use_amp': True, 'model.image_size': 128,
             'model.num_layers': 2, 'dataset.image.crop': 192, 'dataset.crop': 192, 'dataset.image.resize': 320, 'name': 'other', 'ckpt_dir': 'other', 'trainor.ckpt_dir': 'other', 'model.dalle.text_seq_len': 32,
             'dataset.seq.tokenizer_max_len': 48, 'model.projection.projection_dim': 64, 'trainor.lr_decay_params.min_lr': 1e-7, 'trainor.optim_params.lr': 1e-2, 'trainor.clip_grad_norm': 2.,
             'ensemblor.post_processing.plot_representation.labels_keep': ['Edema'], 'model.loss.lambda_': .25}
    for key in (DIRECT | OF_MODEL[name] | RULES | RULES_OF[name]):
        if key in ('model.proto', 'trainor.lr_min') or key == 'trainor.ckpt_dir' and 'ckpt_dir' in tree or key == 'dataset.crop' and name != 'simclr': continue
        before, after = (OmegaConf.to_container(tree, resolve=True) for _ in range(2))
        part = after
        if 'post_processing' in key: after['ensemblor'] = dict(post_processing=[dict(plot_representation={key.rsplit('.', 1)[1]: other.get(key, 7)})])
        else:
            *path, last = key.split('.')
            for p in path: part = part.setdefault(p, {})
            if name == 'simclr' and key == 'dataset.image.crop': part[last] = 192
            else: part[last] = other.get(key, 7)
        assert plan_text(before).out != plan_text(after).out, key


def test_includes_numbers_as_text_and_dotted_words(tmp_path):
    (tmp_path/'config').mkdir()
    (tmp_path/'config'/'base.yml').write_text(FILES['convirt'])
    (tmp_path/'config'/'iu.yml').write_text("includes:\n  - config/base.yml\nname: iu\ntrainor: {batch_size: '16'}\ndataset: {seq: {tokenizer_max_len: 60}}\n")
    c, _ = read_seed(tmp_path/'config'/'iu.yml', overrides=['model.loss.tau=0.2', 'trainor.grad_accu=4', 'optim.epochs=3', 'name=mine'])
    assert (c.optim.batch_size, c.optim.accumulation, c.optim.epochs, c.objectives.convirt.temperature, c.train.run, c.name) == (16, 4, 3, .2, 'ckpt/mine', 'mine')
    assert c.modalities['report'].encoder.length == 60 and c.optim.lr == 5e-5


@pytest.mark.parametrize('old, new, said', [
    ('proto: ConVIRT\n', 'proto: ConVIRTT\n', "did you mean 'ConVIRT'"), ('tau: 0.1', 'tau: hot', 'model.loss.tau should be float'), ('tau:', 'tou:', "did you mean 'model.loss.tau'"),
    ('lambda_:', 'temp1:', 'model.loss.temp1 is a key of GLoRIA'), ('optimizer: RAdam', 'optimizer: Lion', 'RAdam, Adam, AdamW'), ('resnet50', 'densenet121', 'resnet18 or resnet50'),
    ('{lr: 5e-5}', '{}', 'trainor.optim_params.lr is missing'), ('crop: 224', 'crop: 300', 'larger than'), ('name: convirt_mimic', 'includes: [../x.yml]', 'includes names files'),
    ('name: convirt_mimic', 'includes: [no.yml]', 'neither here'), ('trainor:', 'trainer:', 'unknown key'), ('proto: ConVIRT\n', 'proto: [ConVIRT]\n', 'model.proto should be one of'), ('mode: best-1', 'mode: [1]', 'ensemblor.mode should be str'),
    ('name: convirt_mimic', 'includes: 5', 'includes should list files'), ('    - plot_representation:', '    - 5\n    - plot_representation:', 'should list steps'), ('lr: 5e-5', 'lr: nan', 'optim.start_lr'), ('epochs: 99', 'epochs: -1', 'optim.epochs')])
def test_wrong_files(tmp_path, old, new, said):
    path = tmp_path/'f.yml'
    assert old in FILES['convirt']
    path.write_text(FILES['convirt'].replace(old, new))
    with pytest.raises(InputError) as e: read_seed(path)
    assert said in str(e.value) and str(path) in str(e.value) and '\n' not in str(e.value)


def test_values_that_mean_something_else_are_explained(tmp_path):
    path = tmp_path/'f.yml'
    path.write_text(FILES['convirt'].replace('freeze: False', 'freeze: True').replace('dropout_out: 0.0', 'dropout_out: 0.3'))
    notes = '\n'.join(read_seed(path)[1])
    assert 'model.cnn.freeze=true: encoders are trained' in notes and 'model.cnn.dropout_out=0.3' in notes and 'model.cnn.permute' not in notes


def test_trains(tmp_path):
    "A file trains on a cohort of images and reports, warns, and names its run."
    toy_cohort(tmp_path/'cohort', n=60, reports=True)
    path = tmp_path/'convirt.yml'
    path.write_text(FILES['convirt'].replace('ckpt_dir: ckpt', f'ckpt_dir: {tmp_path}/ckpt').replace('resnet50', 'resnet18').replace('2048', '512'))
    done = run('mmsn.train', '--seed-config', path, f'data.cohort={tmp_path}/cohort', *SMALL)
    assert 'warning: trainor.early_stop=20: ' in done.stderr and 'Traceback' not in done.stderr
    curve = pd.read_csv(tmp_path/'ckpt'/'convirt_mimic'/'metrics.csv')
    assert curve.objective.notna().any()
    page = run('mmsn.evaluate', '--seed-config', path, f'data.cohort={tmp_path}/cohort', *SMALL[:-1], 'ensemblor.post_processing=[{plot_representation: {labels_keep: [heart], max_samples_per_class: 5}}]',
               'evaluate.protocols=[knn]', 'evaluate.baselines=false', 'evaluate.bootstrap=5')
    report = tmp_path/'ckpt'/'convirt_mimic'/'report'
    assert 'warning: ensemblor.splits=' in page.stderr and (report/'knn.csv').is_file()
    assert (load_config(report/'config.yaml').evaluate.map_labels, load_config(report/'config.yaml').evaluate.map_samples) == (('heart',), 5)
