"Folders of .tok files by the command: what is right becomes a cohort, what is broken gets one line."
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from mmsn.data.cohort import Cohort
from mmsn.prepare import main

SPLITS = dict(train=range(4), validate=range(4, 6), test=range(6, 8))
PATH = 'p1{0}/p1000000{0}/s{0}/x.png'
TEXT = ['no effusion .', 'large effusion .', 'clear lungs .', 'small effusion .', 'no edema .', 'edema .', 'clear .', 'left effusion .']
FOUND = ['', 'Effusion,Edema', '', 'Effusion', '', 'Edema', '', 'Effusion']


def lines(name, rows): Path('data', f'{name}.tok').write_text('\n'.join(rows) + '\n')


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder that is right, to be made wrong one file at a time."
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(8):
        path = Path('data', PATH.format(i))
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (20, 24)).astype('uint8')).save(path)
    lines('labels', ['multi-label', 'Effusion', 'Edema'])
    for split, n in SPLITS.items():
        lines(f'{split}.image', [PATH.format(i) for i in n])
        lines(f'{split}.report', [TEXT[i] for i in n])
        lines(f'{split}.label', [FOUND[i] for i in n])


def made(*words): main(['tok', 'data', 'out', '--size', '16', '--workers', '0', *words]); return Cohort.open('out', verify=True)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop: made(*words)
    said = [x for x in capsys.readouterr().err.splitlines() if x.strip()]
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith('mmsn: '), said
    assert not Path('out').exists() and not list(Path().glob('.out*'))
    return said[0]


def report(cohort, i):
    s, m = cohort.samples.iloc[i], cohort.modalities['report']
    numbers = np.asarray(cohort.array('report'))[s.report_start:s.report_start + s.report_length]
    return m.vocabulary.decode(numbers)


def test_a_folder(capsys):
    "Image, report, labels and patient of each line belong together."
    c = made('--subject', r'p\d{8}')
    assert len(c) == 8 and c.labels == ['Effusion', 'Edema']
    assert c.samples.split.tolist() == ['train']*4 + ['val']*2 + ['test']*2
    assert c.samples.image.tolist() == [PATH.format(i) for i in range(8)]
    assert [report(c, i) for i in range(4)] == ['no effusion.', 'large effusion.', 'clear lungs.', 'small effusion.']
    assert c.label_matrix().tolist() == [[float(n in f) for n in c.labels] for f in FOUND]
    assert c.samples.subject_id.nunique() == 8 and 'counts as a patient' not in capsys.readouterr().out


def test_alone_is_said(capsys):
    assert made().samples.subject_id.nunique() == 8
    out = capsys.readouterr().out
    assert 'every sample counts as a patient of its own' in out and r"--subject 'p\d{8}'" in out and '4  lines of train.image.tok' in out


def test_subjects_by_table_and_file():
    pd.DataFrame(dict(image=[PATH.format(i) for i in range(8)], subject_id=[1, 1, 2, 2, 3, 3, 4, 4])).to_csv('who.csv', index=False)
    assert made('--subject', 'who.csv').samples.subject_id.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    for split, n in SPLITS.items(): lines(f'{split}.subject', [f'{i//2}' for i in n])
    assert made('--overwrite').samples.subject_id.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sections_windows_lines_and_odd_signs():
    "Findings and impression are two sections; CRLF, a byte-order mark and a form feed do not shift a line."
    for split, n in SPLITS.items():
        Path('data', f'{split}.report.tok').unlink()
        lines(f'{split}.impression', [f'impression {i} .' for i in n])
        Path('data', f'{split}.findings.tok').write_bytes('\ufeff'.encode() + b'\r\n'.join(f'findings \x0c {i} .'.encode() for i in n) + b'\r\n\r\n')
    c = made()
    assert c.modalities['report'].info['sections'] == ['findings', 'impression']
    assert [report(c, i) for i in (0, 7)] == ['findings 0.\nimpression 0.', 'findings 7.\nimpression 7.']


def test_several_images():
    lines('train.image', [f'{PATH.format(0)},{PATH.format(1)}', f'{PATH.format(2)} , {PATH.format(3)}'])
    lines('train.report', TEXT[:2]), lines('train.label', FOUND[:2])
    assert len(made()) == 6
    c = made('--pick', 'all', '--overwrite')
    assert len(c) == 8 and c.samples.subject_id[:4].nunique() == 2 and report(c, 2) == report(c, 3) == 'large effusion.'


def test_one_label_and_a_split_without():
    lines('labels', ['single-label', 'Normal', 'Other'])
    lines('train.label', ['Normal', 'Other', '', 'Normal']), lines('validate.label', ['Other', 'Normal'])
    Path('data/test.label.tok').unlink()
    m = made().label_matrix()
    assert m[:2].tolist() == [[1, 0], [0, 1]] and np.isnan(m[2]).all() and np.isnan(m[6:]).all()


def gone(name): Path('data', f'{name}.tok').unlink()
def raw(name, content): Path('data', f'{name}.tok').write_bytes(content)


@pytest.mark.parametrize('spoil, words, said', [
    (lambda: lines('train.report', TEXT[:3]), [], 'train.report.tok has 3 lines and train.image.tok has 4'),
    (lambda: lines('train.label', ['', 'Edma', '', '']), [], "train.label.tok, line 2: labels.tok does not name 'Edma'; did you mean 'Edema'?"),
    (lambda: lines('train.image', ['none.png', *[PATH.format(i) for i in (1, 2, 3)]]), [], '(no such file: 1)'),
    (lambda: raw('test.report', b''), [], 'test.report.tok is empty'),
    (lambda: raw('test.report', b'ok .\n\xe9d\xe8me .\n'), [], 'test.report.tok, line 2: the byte 0xe9 is not UTF-8'),
    (lambda: raw('test.report', b'ok .\n\0\0\n'), [], 'is no text'),
    (lambda: lines('test.image', ['../../etc/passwd', 'x']), [], "test.image.tok, line 1: the path '../../etc/passwd' leaves the folder"),
    (lambda: lines('test.image', ['/etc/passwd', 'x']), [], "test.image.tok, line 1: the path '/etc/passwd' leaves the folder"),
    (lambda: lines('test.image', ['', PATH.format(7)]), [], 'test.image.tok, line 1 names no image'),
    (lambda: lines('test.image', [PATH.format(0), PATH.format(7)]), [], 'train.image.tok, line 1 and test.image.tok, line 1 name the same image'),
    (lambda: gone('test.report'), [], 'no file data/test.report.tok'),
    (lambda: gone('train.image'), [], 'holds no train.image.tok (labels.tok'),
    (lambda: gone('labels'), [], 'no file data/labels.tok'),
    (lambda: lines('val.image', ['a.png']), [], 'the same split'),
    (lambda: lines('labels', ['Effusion', 'Edema']), [], 'line 1 should say multi-label or single-label'),
    (lambda: lines('labels', ['multi-label', 'Edema', 'Edema']), [], "'Edema' twice"),
    (lambda: lines('labels', ['multi-label', 'split', 'Effusion', 'Edema']), [], "the label 'split'"),
    (lambda: lines('labels', ['single-label', 'Effusion', 'Edema']), [], 'line 2 has 2 labels'),
    (lambda: None, ['--subject', r'p\d+'], 'finds \'p10\' and \'p10000000\''),
    (lambda: None, ['--subject', 'q(.*)'], 'finds no subject'),
    (lambda: None, ['--subject', 'p(('], 'or a regular expression'),
    (lambda: None, ['--subject', 'none.csv'], 'no file none.csv'),
    (lambda: None, ['--subject', 'x'], 'subject x is in'),
    (lambda: None, ['--texts', 'summary'], 'no file data/train.summary.tok'),
    (lambda: None, ['--root', 'nowhere'], 'no folder of images at nowhere'),
])
def test_broken(capsys, spoil, words, said):
    spoil()
    assert said in refused(capsys, *words)


def test_patients_across_splits_can_be_divided_anew(capsys):
    for split, n in SPLITS.items(): lines(f'{split}.subject', [f'{i % 4}' for i in n])
    assert 'subject 0 is in train and in val' in refused(capsys)
    c = made('--split', 'hash')
    assert (c.samples.groupby('subject_id').split.nunique() == 1).all() and len(c) == 8
