"Reports as a modality: hostile texts, vocabularies, views that depend on the key alone, training that resumes bit for bit and is the same on two processes."
import os, shutil, socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from mmsn.data.cohort import Cohort
from mmsn.data.join import prepare_join
from mmsn.data.mimic.xrays import read_report
from mmsn.data.reports import add_reports, open_vocabulary
from mmsn.data.text import LONGEST, SPECIAL, clean, sentences, train_vocabulary, words
from mmsn.data.writer import CohortWriter
from mmsn.loop import Trainer
from mmsn.model import MMSN
from mmsn.options import InputError
from mmsn.prepare import main
from mmsn.testing import toy_cohort, toy_config

TEXTS = ['The heart is enlarged. There is a small effusion.', 'No pneumothorax. XXXX is clear, as ___ was.', 'Lines and tubes: unchanged!']
ONE = dict(random=1, focal=0)
IMAGE = dict(encoder=dict(dim=32, depth=1, heads=2, patch=4, pool='mean', positions='sincos', init='fan_in'), views=dict(ONE, random_size=16, focal_size=8, patch_drop=0.))


@pytest.fixture(scope='module')
def vocabulary(): return train_vocabulary(TEXTS, size=400)


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_cohort(tmp_path_factory.mktemp('text')/'toy', n=120, reports=True)


def write(folder, texts, split=None, **options):
    "A cohort of texts alone."
    texts = texts if isinstance(texts, pd.DataFrame) else pd.DataFrame(dict(report=texts))
    split = split or ['train']*len(texts)
    with CohortWriter(folder, 'texts') as writer:
        at, _ = add_reports(writer, texts, np.array(split) == 'train', **options)
        return writer.close(pd.DataFrame(dict(sample_id=range(len(texts)), subject_id=range(len(texts)), split=split)).join(at))


def config_of(objective, **more):
    parts = dict(cxr=IMAGE, report=dict(views=ONE), fusion=dict(dim=0), objective=objective)
    return toy_config('cxr', 'report', objectives={objective: dict(dim=16)}, **parts, **more)


# --- texts from anywhere ---

@pytest.mark.parametrize('text, told', {
    'empty': ('', ''), 'blank': (' \t\r\n\x00\x0b ', ''), 'not UTF-8': (b'no \xff effusion.', 'no � effusion.'), 'control': ('a\x07b\x1b[31mc', 'a b [31mc'),
    'marks': ('XXXX and ___, x-xxxx', '___ and ___, x- ___'), 'markup': ('<script>alert(1)</script>', '<script>alert(1)</script>'), 'surrogate': ('a\ud800b', 'a b')}.values())
def test_clean(text, told): assert clean(text).replace(' ,', ',') == told


def test_no_text_becomes_a_special_token(vocabulary):
    "The name of a special token in a report is a bracket, a word and a bracket."
    special = {vocabulary.pad, vocabulary.cls, vocabulary.mask}
    for name in SPECIAL.values():
        numbers = vocabulary.encode(f'{name} {name.lower()}.')
        assert not special & set(numbers.tolist()) and (numbers == vocabulary.sep).sum() == 1
    assert vocabulary.decode(vocabulary.encode('[MASK] effusion.')) == '[mask] effusion.'


@pytest.mark.parametrize('text', ['a. '*400_000, ' '*10**6, '. '*500_000, 'x'*10**6, '_ '*500_000, '\x00'*10**6, '(1. '*300_000])
def test_a_megabyte_is_cut(vocabulary, text): assert len(vocabulary.encode(text)) <= LONGEST


def test_sentences_and_sections_come_back(vocabulary):
    numbers = vocabulary.encode('The heart is enlarged. No effusion.', '', 'Clear.')
    assert (numbers == vocabulary.sep).sum() == 5 and vocabulary.decode(numbers).splitlines() == ['the heart is enlarged. no effusion.', '', 'clear.']
    assert sentences('Dr. Smith saw 3.5 cm. 1. Clear. 2. No. 3 tube') == ['Dr. Smith saw 3.5 cm.', '1. Clear.', '2. No. 3 tube']


def test_pieces_are_those_of_tokenizers(vocabulary):
    "The greedy cut of every word is what the library tokenizers gives for the same vocabulary."
    tokenizers = pytest.importorskip('tokenizers')
    other = tokenizers.models.WordPiece(vocabulary.ids, unk_token='[UNK]')
    for w in {w for t in TEXTS for w in words(clean(t))} | {'effusions', 'heartened', 'untubed', '☃', 'x9y'}:
        assert tuple(x.id for x in other.tokenize(w)) == vocabulary.pieces(w)


def test_vocabulary_of_training_patients_alone(tmp_path):
    "A word that only a test patient has is no piece of the vocabulary; the same reports give the same files."
    split = ['train', 'train', 'test']
    one, two = (write(tmp_path/n, ['The heart. The heart.', 'The lungs.', 'Zyzzyva zyzzyva.'], split) for n in 'ab')
    assert 'zyzzyva' not in one.modalities['report'].vocabulary.ids and one.text(2) == 'zyzzyva zyzzyva.'
    assert one.hash == two.hash


# --- the folder ---

def test_cohort_is_checked(tmp_path):
    "Numbers that the vocabulary does not have, and a vocabulary that was changed, are refused."
    cohort = write(tmp_path/'a', TEXTS)
    assert Cohort.open(tmp_path/'a', verify=True).text(0) == 'the heart is enlarged. there is a small effusion.'
    path = tmp_path/'a'/'report.vocabulary.json'
    path.write_text(path.read_text().replace('"[SEP]"', '"[XEP]"'))
    with pytest.raises(InputError, match='was changed since it was written'): Cohort.open(tmp_path/'a')
    array = np.load(tmp_path/'a'/'report.npy')
    array[0] = 60_000
    np.save(tmp_path/'a'/'report.npy', array)
    with pytest.raises(InputError, match='numbers that its vocabulary does not have'): cohort._check_values('report')


def test_missing_and_shared_reports(tmp_path):
    cohort = write(tmp_path/'a', ['Clear.', '', None, 'Clear.'])
    assert cohort.present('report').tolist() == [True, False, False, True] and cohort.samples.report_start[3] == 0
    batch = cohort.batch([0, 1])
    assert batch.data['report'].dtype == torch.int64 and (batch.data['report'][1] == 0).all() and batch.lengths['report'].tolist() == [len(cohort[0]['report']), 0]
    with pytest.raises(InputError, match='has a word'): write(tmp_path/'b', ['', ' '])


def test_join_wants_one_vocabulary(tmp_path):
    a, b = write(tmp_path/'a', TEXTS), write(tmp_path/'b', TEXTS[::-1], tokenizer=str(tmp_path/'a'))
    write(tmp_path/'c', TEXTS[:1])
    prepare_join([tmp_path/'a', tmp_path/'b'], tmp_path/'both')
    joined = Cohort.open(tmp_path/'both', verify=True)
    assert [joined.text(i) for i in range(6)] == [a.text(i) for i in range(3)] + [b.text(i) for i in range(3)]
    with pytest.raises(InputError, match='differs in vocabulary'): prepare_join([tmp_path/'a', tmp_path/'c'], tmp_path/'no')


def test_read_report(tmp_path):
    "Sections of a dictation; bytes that are no text, and a huge file, end no preparation."
    path = tmp_path/'s1.txt'
    path.write_bytes(b' FINAL REPORT\r\n\r\n FINDINGS:  Clear \xff lungs.\r\n\r\n IMPRESSION:  <b>Nothing.</b>\r\n')
    assert read_report(path) == dict(findings='Clear � lungs.', impression='<b>Nothing.</b>')
    path.write_bytes(b' FINDINGS: ' + b'a'*(2**21))
    assert len(read_report(path)['findings']) < 2**20 and read_report(path)['impression'] == ''
    path.write_bytes(bytes(range(256))*100)
    assert read_report(path) == dict(findings='', impression='')


def test_column_of_a_csv(tmp_path, capsys):
    "`mmsn-prepare images --reports`: columns of text beside the images; a column that is not there is named."
    from PIL import Image
    for i in range(4): Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path/f'{i}.png')
    table = pd.DataFrame(dict(image=[f'{i}.png' for i in range(4)], split=['train', 'train', 'val', 'test'], findings=['Clear lungs.', 'Line one.\nLine "two".', None, '=1+1'], impression=['', 'Clear.', '', 'x']))
    table.to_csv(tmp_path/'a.csv', index=False)
    words_of = ['images', str(tmp_path/'a.csv'), str(tmp_path), str(tmp_path/'out'), '--size', '16', '--split', 'split', '--reports']
    main([*words_of, 'findings,impression'])
    cohort = Cohort.open(tmp_path/'out', verify=True)
    assert [cohort.text(i) for i in range(4)] == ['clear lungs.', 'line one. line " two ".\nclear.', None, '= 1 + 1\nx']
    with pytest.raises(SystemExit) as e: main([*words_of[:3], str(tmp_path/'other'), *words_of[4:], 'finding'])
    assert e.value.code == 2 and "'finding'" in capsys.readouterr().err and not (tmp_path/'other').exists()


@pytest.mark.parametrize('key', ['stay_id', 'subject_id'])
def test_columns_of_the_labels_of_a_table(tmp_path, capsys, key):
    "Notes by stay or by patient, ids written otherwise; words of test patients are not learned; what is no text is refused; a model trains on it."
    stays = [(s, 10*s + k) for s in range(24) for k in range(2)]
    rows = [(s, k, h, v, 80 + h) for s, k in stays for h in range(3) for v in ('HR', 'RR')]
    pd.DataFrame(rows, columns=['subject_id', 'stay_id', 'time', 'variable', 'value']).to_csv(tmp_path/'t.csv', index=False)
    (tmp_path/'c.csv').write_text('name,unit,low,high,normal\nHR,,0,300,80\nRR,,0,300,80\n')
    said = lambda s: 'Zebra stripes.' if s > 19 else '' if s == 3 else 'Lungs are clear.' if s % 2 else 'Lungs are full.'
    labels = pd.DataFrame([{'subject_id': s, 'stay_id': f'{k}.0', 'split': 'test' if s > 19 else 'val' if s > 15 else 'train', 'dead': s % 2, 'note': said(s), 'plan': None} for s, k in stays])
    if key == 'subject_id': labels = labels.drop(columns='stay_id').drop_duplicates('subject_id')
    labels.to_csv(tmp_path/'l.csv', index=False)
    words = ['table', tmp_path/'t.csv', tmp_path/'c.csv', tmp_path/'out', '--labels', tmp_path/'l.csv']
    for more, line in ((['--reports', 'nte'], "no column 'nte'"), (['--reports', 'note,split'], "'split'"), (['--reports', 'note', '--modality', 'report'], "called 'report'"), (['--tokenizer', 'x'], 'should hold numbers')):
        with pytest.raises(SystemExit) as e: main([*map(str, words), *more])
        assert e.value.code == 2 and line in capsys.readouterr().err and not (tmp_path/'out').exists()
    main([*map(str, words), '--reports', 'note,plan'])
    cohort = Cohort.open(tmp_path/'out')
    vocabulary, texts = cohort.modalities['report'].vocabulary, dict(zip(cohort.samples.subject_id, (cohort[i]['report'] for i in range(len(cohort)))))
    assert cohort.labels == ['dead'] and len(cohort) == 48 and texts[3] is None and vocabulary.decode(texts[0]) == 'lungs are full.'
    assert 'lungs' in vocabulary.tokens and 'zebra' not in vocabulary.tokens and cohort.provenance['reports'] == ['note', 'plan']
    assert all((cohort[i]['report'] is None) == (s == 3) for i, s in enumerate(cohort.samples.subject_id))


@pytest.mark.parametrize('weight, warned', [(0., True), (1., False)])
def test_an_encoder_that_nothing_teaches_is_named(tmp_path, toy, capsys, weight, warned):
    "A forecast of charts alone leaves an encoder of reports at its random start, and the run says so, once."
    config = toy_config('ehr', 'report', loss=dict(weight=weight, prototypes=8, cells=dict(weight=1.)), data=dict(cohort=str(toy.folder)), train=dict(run=str(tmp_path/'run'), log_every=1), optim=dict(batch_size=16, epochs=1))
    Trainer(config, toy).fit()
    told = [line for line in capsys.readouterr().out.splitlines() + (tmp_path/'run'/'metrics.csv').read_text().splitlines() if 'no term of the loss teaches' in line]
    assert len(told) == warned and all("'report'" in line and 'step 3' in line for line in told)


def test_foreign_vocabulary(tmp_path):
    "A language model's tokenizer: special tokens in a report are text, the mark is one token, the cohort needs no library cache."
    transformers = pytest.importorskip('transformers')
    own = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'[]._', 'the', 'heart', 'mask', '##s', 'clear']
    (tmp_path/'vocab.txt').write_text('\n'.join(own))
    transformers.BertTokenizerFast(str(tmp_path/'vocab.txt')).save_pretrained(tmp_path/'bert')
    cohort = write(tmp_path/'a', ['The heart is ___ clear.', '[MASK] hearts.'], tokenizer=str(tmp_path/'bert'))
    v = cohort.modalities['report'].vocabulary
    assert [v.tokens[i] for i in cohort[0]['report']] == ['the', 'heart', '[UNK]', '_', 'clear', '.', '[SEP]']
    assert [v.tokens[i] for i in cohort[1]['report']] == ['[', 'mask', ']', 'heart', '##s', '.', '[SEP]']
    assert v.continues.nonzero()[0].tolist() == [own.index('##s')] and Cohort.open(tmp_path/'a', verify=True).hash == cohort.hash


def test_language_model_by_folder(tmp_path):
    "hf:FOLDER trains, and its exported encoder opens when the folder is gone."
    transformers = pytest.importorskip('transformers')
    shape = dict(vocab_size=500, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(transformers.BertConfig(**shape)).save_pretrained(tmp_path/'bert')
    cohort = toy_cohort(tmp_path/'toy', n=40, reports=True)
    config = toy_config('report', report=dict(encoder=dict(name=f'hf:{tmp_path/"bert"}', length=16)))
    model, batch = MMSN.from_config(config, cohort).eval(), cohort.batch(range(8), ['report'])
    model(model.views(batch, 0, 0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = model.encode(batch)['report']
    model.save_pretrained(tmp_path/'encoder')
    (tmp_path/'bert').rename(tmp_path/'gone')
    assert torch.equal(MMSN.from_pretrained(tmp_path/'encoder').encode(batch)['report'].nan_to_num(), before.nan_to_num())
    with pytest.raises(InputError, match='no language model could be had'): MMSN.from_config(config, Cohort.open(tmp_path/'toy'))


@pytest.mark.parametrize('source, says', {'nothing': ('nowhere', 'no tokenizer at nowhere'), 'an empty folder': ('.', 'no tokenizer could be had')}.values())
def test_no_tokenizer(source, says, tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says): open_vocabulary(source)


# --- views and training ---

def test_views_are_a_function_of_the_key(toy):
    "The same patient has the same views in another batch, beside other patients; another epoch has others."
    model = MMSN.from_config(toy_config('report'), toy)
    rows = toy.rows('train', ['report'])[:12]
    alone, other = model.views(toy.batch(rows[3:4], ['report']), 5, 2), model.views(toy.batch(rows, ['report']), 5, 2)
    later, differ = model.views(toy.batch(rows, ['report']), 5, 3), 0
    for a, b, c in zip(alone.anchors['report'], other.anchors['report'], later.anchors['report']):
        for i in range(a.n):
            k = int(a.lengths[i])
            assert k == b.lengths[3 + 12*i] and torch.equal(a.x[i, :k], b.x[3 + 12*i, :k])
        differ += int(not torch.equal(b.x, c.x))
    assert differ


def test_nothing_behind_a_text_matters(toy):
    "Padding changes no embedding."
    model = MMSN.from_config(toy_config('cxr', 'report'), toy).eval()
    rows = toy.rows('test', ['report'])
    short = rows[np.argsort(toy.samples.report_length.to_numpy()[rows], kind='stable')[:1]]
    alone, among = (model.encode(toy.batch(r, ['cxr', 'report']))['report'] for r in (short, np.r_[short, rows]))
    assert torch.allclose(alone[0].nan_to_num(), among[0].nan_to_num(), atol=1e-5)


@pytest.mark.parametrize('objective', ['msn', 'convirt', 'gloria'])
def test_resume_is_bit_equal(objective, toy, tmp_path):
    "Half a run, then the rest, is the whole run; a patient without a report takes part."
    def config(name, **optim):
        base = toy_config('cxr', 'ehr', 'report') if objective == 'msn' else config_of(objective)
        return replace(base, data=replace(base.data, cohort=str(toy.folder)), optim=replace(base.optim, epochs=2., batch_size=24), train=replace(base.train, run=str(tmp_path/name), checkpoint_every=2))
    Trainer(config('whole')).fit()
    Trainer(config('half')).fit()
    last = sorted((tmp_path/'half'/'checkpoints').iterdir())[-1]
    for folder in (last, tmp_path/'half'/'encoder'): shutil.rmtree(folder)        # as if it had been killed after the checkpoint before
    assert (tmp_path/'half'/'checkpoints').exists() and any((tmp_path/'half'/'checkpoints').iterdir())
    Trainer(config('half')).fit()
    a, b = (load_file(tmp_path/n/'encoder'/'model.safetensors') for n in ('whole', 'half'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps_of(folder, rank, world):
    "Loss and gradients of a step of each objective, of this process's share of sixteen patients."
    cohort = Cohort.open(Path(folder)/'toy')
    for objective in ('msn', 'convirt', 'gloria'):
        config = toy_config('cxr', 'report', head=dict(hidden=32, depth=1, output=16, norm='layer')) if objective == 'msn' else config_of(objective)
        model = MMSN.from_config(config, cohort)
        net = DistributedDataParallel(model) if world > 1 else model
        out = net(model.views(cohort.batch(cohort.rows('train')[:16][rank*16//world:(rank + 1)*16//world], ['cxr', 'report']), 0, 0))
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        save_file({n: g.contiguous() for n, g in grads.items()} | {'loss': out.loss.detach()[None]}, f'{folder}/{objective}-{rank}-of-{world}.safetensors')


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try: steps_of(folder, rank, 2)
    finally: dist.destroy_process_group()
    os._exit(0)


def test_two_processes_are_one(tmp_path):
    "Two processes of eight patients give the loss and the gradients of one with sixteen."
    toy_cohort(tmp_path/'toy', n=60, reports=True)
    steps_of(str(tmp_path), 0, 1)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), 2)
    for objective in ('msn', 'convirt', 'gloria'):
        one, two = (load_file(tmp_path/f'{objective}-0-of-{w}.safetensors') for w in (1, 2))
        assert torch.allclose(one['loss'], two['loss'], atol=1e-5), objective
        for n, g in one.items(): assert torch.allclose(g, two[n], atol=2e-5), (objective, n)
