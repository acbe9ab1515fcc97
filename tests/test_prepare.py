"The command mmsn-prepare as a person uses it: what is wrong gets one line and exit code 2, and leaves nothing behind."
import json, shutil, struct, zlib
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from conftest import one_line, run
from mmsn.config import cli
from mmsn.data.cohort import Cohort
from mmsn.prepare import main

N = 200   # images: one of them may be bad, a second stops preparation


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder of small radiographs of nobody."
    folder = tmp_path_factory.mktemp('images')
    for i in range(N): Image.fromarray(np.full((20, 24), i, 'uint8')).save(folder/f'{i}.jpg')
    return folder


def inputs(folder, images):
    "Inputs that are right, in a folder."
    scans = pd.DataFrame(dict(image=[f'{i}.jpg' for i in range(N)], patient=[i//2 for i in range(N)], mass=[i % 2 for i in range(N)]))
    scans.to_csv(folder/'scans.csv', index=False)
    (folder/'long.csv').write_text('subject_id,time,variable,value\n1,0.5,pulse,80\n2,1.5,pulse,90\n3,0.1,pulse,70\n')
    (folder/'channels.csv').write_text('name,unit,low,high,normal\npulse,bpm,1,299,86\n')
    (folder/'labels.csv').write_text('subject_id,sepsis\n1,1\n2,0\n3,\n')
    (folder/'images').symlink_to(images)


@pytest.fixture
def place(tmp_path, images, monkeypatch):
    "A working folder with inputs that are right, to be made wrong one at a time."
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path, images)
    return tmp_path


def refused(capsys, *words, said):
    "The command ends with code 2 and one line that says `said`; no cohort, no temporary folder is left."
    before = set(p.name for p in Path().iterdir())
    with pytest.raises(SystemExit) as stop: main([str(w) for w in words])
    error = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stop.value.code == 2
    assert len(error) == 1 and error[0].startswith('mmsn: '), error
    assert said in error[0], error[0]
    left = set(p.name for p in Path().iterdir()) - before
    assert not {n for n in left if not n.endswith('.rejected.csv')}, left


IMAGES = ['images', 'scans.csv', 'images', 'out', '--size', '16', '--subject', 'patient', '--labels', 'mass']
TABLE = ['table', 'long.csv', 'channels.csv', 'out', '--labels', 'labels.csv']


def test_what_is_right_works(place, capsys):
    main(IMAGES)
    shown = capsys.readouterr().out
    assert 'cohort written to out' in shown and 'out/summary.csv' in shown
    assert len(Cohort.open('out', verify=True)) == N
    main([*TABLE, '--overwrite'])
    assert set(Cohort.open('out', verify=True).modalities) == {'ehr'}


@pytest.mark.parametrize('words, said', [
    (['images', 'none.csv', 'images', 'out'], 'no file none.csv'),
    (['images', 'scans.csv', 'none', 'out'], 'no folder of images at none'),
    (['images', 'scans.csv', 'images', 'out', '--id', 'imge'], "scans.csv has no column 'imge'; did you mean 'image'"),
    ([*IMAGES, '--subject', 'subject'], "scans.csv has no column 'subject'"),
    ([*IMAGES, '--labels', 'mass,effusion'], "scans.csv has no column 'effusion'"),
    ([*IMAGES, '--labels', 'patient'], "label 'patient' of scans.csv should be 1, 0, -1 or empty"),
    ([*IMAGES, '--labels', 'image'], "column 'image' of scans.csv should hold numbers"),
    ([*IMAGES, '--split', 'mass'], "should say train, val or test, not '0'"),
    ([*IMAGES, '--facts', 'image'], "200 different texts"),
    ([*IMAGES, '--size', '4'], '--size should lie between 8 and 4,096'),
    (['table', 'none.csv', 'channels.csv', 'out'], 'no file none.csv'),
    (['table', 'channels.csv', 'channels.csv', 'out'], "channels.csv has no column 'subject_id'"),
    (['table', 'long.csv', 'long.csv', 'out'], "long.csv has no column 'name'"),
    ([*TABLE, '--labels', 'none.csv'], 'no file none.csv'),
    ([*TABLE, '--labels', 'channels.csv'], "channels.csv has no column 'subject_id'"),
    ([*TABLE, '--timestep', '0'], '--timestep should be above 0'),
    (['physionet2012', '.', 'out'], 'no set-a/ or set-a.tar.gz'),
    (['nih', 'none', 'out'], 'no file none/labels.csv'),
    (['nih', '.', 'out'], "labels.csv has no column 'image'"),
    (['iu', 'none', 'out'], 'no file none/images.csv'),
    (['mimic', 'out', '--mimic-iv', 'none'], 'no folder none'),
    (['mimic', 'out', '--mimic-iv', '.'], 'no table icustays'),
    (['mimic', 'out', '--mimic-iv', '.', '--task', 'mortalty'], "did you mean 'mortality'"),
    (['mimic', 'out'], 'MIMIC-IV is missing'),
    (['mimic', '--mimic-iv', '.'], 'OUT is missing'),
    (['mimic', '--check', '--mimic-iv', 'none'], 'no folder none'),
    (['medfuse', 'none', 'out'], 'none'),
    (['meds', 'none', 'none.csv', 'out'], 'none'),
    (['synthetic', 'out', '--lacking', '2'], 'lacking'),
    (['synthetic', 'scans.csv'], 'scans.csv is a file'),
    (['synthetic', '.'], 'no name of its own')])
def test_wrong_words(place, capsys, words, said): refused(capsys, *words, said=said)


def test_duplicate_ids(place, capsys):
    table = pd.read_csv('scans.csv')
    table.assign(image=table.image.replace('7.jpg', '8.jpg')).to_csv('scans.csv', index=False)
    refused(capsys, *IMAGES, said="1 duplicate ids, such as '8.jpg'")
    (place/'channels.csv').write_text('name,normal\npulse,86\npulse,80\n')
    refused(capsys, *TABLE, said="the channel 'pulse' twice")


def test_duplicate_and_bad_labels(place, capsys):
    for text, said in (('subject_id,sepsis\n1,1\n1,0\n', 'subject 1 twice'), ('subject_id,sepsis\n1,3\n', "label 'sepsis' of labels.csv"),
                       ('subject_id,sepsis\n1,maybe\n', "'maybe' (row 1)"), ('subject_id,sepsis\n,1\n', 'without a subject'), ('', 'is empty')):
        (place/'labels.csv').write_text(text)
        refused(capsys, *TABLE, said=said)


def test_times_of_no_kind(place, capsys):
    (place/'long.csv').write_text('subject_id,time,variable,value\n1,later,pulse,80\n')
    refused(capsys, *TABLE, said="column 'time' of long.csv holds 'later' (row 1), which is no time")


def test_no_known_variable(place, capsys):
    (place/'long.csv').write_text('subject_id,time,variable,value\n1,0.5,plse,80\n')
    refused(capsys, *TABLE, said="such as 'pulse'")


def test_broken_long_table(place, capsys):
    (place/'long.csv').write_text('subject_id,time,variable,value\n1,0.5,pulse,80,surplus\n')
    refused(capsys, *TABLE, said='long.csv')
    (place/'long.parquet').write_bytes(b'PAR1 no')
    refused(capsys, 'table', 'long.parquet', 'channels.csv', 'out', said='long.parquet is not a readable table')


def test_subject_in_two_splits(place, capsys):
    pd.read_csv('scans.csv').assign(part=['train', 'test']*(N//2)).to_csv('scans.csv', index=False)
    refused(capsys, *IMAGES, '--split', 'part', said='split by subject')


@pytest.mark.parametrize('name', ['../0.jpg', '/etc/hostname', 'a/../../0.jpg', '..\\0.jpg'])
def test_path_that_leaves_the_folder(place, capsys, name):
    table = pd.read_csv('scans.csv')
    table.assign(image=table.image.replace('7.jpg', name)).to_csv('scans.csv', index=False)
    refused(capsys, *IMAGES, said='leaves the folder of images: refused')


def huge_png():
    "A file of a hundred bytes that says it holds 900 million pixels."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 30_000, 30_000, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


BAD = {'truncated': lambda good: good[:-9], 'zero bytes': lambda good: b'', 'not an image': lambda good: b'<html>404</html>', 'too large': lambda good: huge_png()}


@pytest.fixture
def own_images(place, images):
    "The images as files of this test's own, that may be broken."
    (place/'images').unlink()
    (place/'images').mkdir()
    for p in images.iterdir(): (place/'images'/p.name).write_bytes(p.read_bytes())
    return place/'images'


@pytest.mark.parametrize('reason', BAD)
def test_one_bad_image_is_listed_two_stop(own_images, capsys, reason):
    for name in ('7.jpg', '8.jpg', '9.jpg'):
        if name == '8.jpg':       # with one bad image of 200 it goes on
            main(IMAGES)
            assert f'1  dropped: {reason}' in capsys.readouterr().out
            assert pd.read_csv('out/rejected.csv').to_dict('records') == [dict(modality='cxr', path='7.jpg', reason=reason)]
            cohort = Cohort.open('out', verify=True)
            assert len(cohort) == N - 1 and '7.jpg' not in set(cohort.samples.image)
        path = own_images/name
        path.write_bytes(BAD[reason](path.read_bytes()))
    refused(capsys, *IMAGES, '--overwrite', said=f'images cannot be used, more than 1% of 200 ({reason}: 3): see out.rejected.csv')
    assert len(pd.read_csv('out.rejected.csv')) == 3
    assert len(Cohort.open('out', verify=True)) == N - 1       # the earlier cohort was put back


def test_png_named_jpg_is_used_and_noted(own_images, capsys):
    Image.fromarray(np.full((20, 24), 7, 'uint8')).save(own_images/'7.jpg', format='PNG')
    main(IMAGES)
    assert '1  used, but PNG named .jpg' in capsys.readouterr().out
    cohort = Cohort.open('out')
    assert len(cohort) == N and (cohort[7]['cxr'] == 7).all()


def test_existing_folder(place, capsys):
    main(TABLE)
    capsys.readouterr()
    refused(capsys, *TABLE, said='out exists already')
    (place/'diary').mkdir()
    (place/'diary'/'today.txt').write_text('dear diary')
    for words in (['synthetic', 'diary'], ['synthetic', 'diary', '--overwrite']): refused(capsys, *words, said='diary')
    assert (place/'diary'/'today.txt').read_text() == 'dear diary'


def test_cohort_of_another_format(place, capsys):
    main(TABLE)
    meta = json.loads((place/'out'/'cohort.json').read_text())
    (place/'out'/'cohort.json').write_text(json.dumps(dict(meta, format=99)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: cli(Cohort.open)('out')
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and 'format 99' in error[0]


def test_unknown_words_are_explained(place, capsys):
    for words, said in ((['synthetc', 'out'], "invalid choice: 'synthetc'"), (['synthetic', 'out', '--patient-count', 5], 'unrecognized arguments: --patient-count'),
                        (['synthetic', 'out', '--patients', 'many'], 'not a whole number'), (['synthetic', 'out', '--seed', -1], '--seed'),
                        (['mimic', 'out', '--mimic-iv', '.', '--memory-limit', 'lots'], 'not an amount of memory'), ([], 'SOURCE'), (['synthetic'], 'OUT')):
        with pytest.raises(SystemExit) as stop: main([str(w) for w in words])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    done = run('mmsn.prepare', 'synthetc', 'out', code=2)
    assert 'mmsn-prepare --help explains' in done.stderr and len(done.stderr.strip().splitlines()) == 1 and "invalid choice: 'synthetc'" in done.stderr and 'Traceback' not in done.stderr


def test_as_a_process(place):
    "The exit code and the line of a real process; and the way it is meant."
    assert one_line(run('mmsn.prepare', 'nih', 'none', 'out', code=2, fork=False)) == 'mmsn: no file none/labels.csv'
    done = run('mmsn.prepare', *TABLE)
    assert 'cohort written to out' in done.stdout and not done.stderr.strip()
    assert 'unknown' in run('mmsn.prepare', 'images', '--help').stdout


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, images):
    "Cohorts `a` and `b` of images, `t` of a time series, `large` of larger images."
    folder = tmp_path_factory.mktemp('hospitals')
    inputs(folder, images)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        for name, size in (('a', 16), ('b', 16), ('large', 24)): main(['images', 'scans.csv', 'images', name, '--size', str(size), '--subject', 'patient', '--labels', 'mass'])
        main(['table', 'long.csv', 'channels.csv', 't', '--labels', 'labels.csv'])
    return folder


@pytest.fixture
def hospitals(place, prepared):
    "These cohorts in a folder of a test's own."
    for name in ('a', 'b', 't', 'large'): shutil.copytree(prepared/name, place/name)
    return place


def test_join(hospitals, capsys):
    "Cohorts one after the other, by the command: all samples, new numbers, the old ones as text, labels of both, splits as they were."
    main(['join', 'a', 'b', 't', 'out', '--name', 'three'])
    assert 'of a' in capsys.readouterr().out
    out, parts = Cohort.open('out', verify=True), [Cohort.open(n) for n in 'abt']
    assert (out.name, len(out), out.labels) == ('three', 2*N + 3, ['mass', 'sepsis'])
    s = out.samples
    assert s.sample_id.tolist() == list(range(2*N + 3)) and s.groupby('source').size().to_dict() == dict(a=N, b=N, t=3)
    assert s['sample'].is_unique and s.subject_id.nunique() == s.subject.nunique() == N + 3
    assert s.split.tolist() == [x for c in parts for x in c.samples.split]
    assert s['sample'][N] == f'b:{parts[1].samples.sample_id[0]}' and s.subject[N + 1] == f'b:{parts[1].samples.subject_id[1]}'
    for at, c in zip((0, N, 2*N), parts):
        for i in (0, len(c) - 1):
            item, own = out[at + i], c[i]
            for name in out.modalities:
                if name not in own: assert item[name] is None
                else: np.testing.assert_array_equal(item[name], own[name])
        assert np.array_equal(out.label_matrix(c.labels, range(at, at + len(c))), c.label_matrix(), equal_nan=True)
    assert np.isnan(out.label_matrix(['sepsis'], range(2*N))).all() and np.isnan(out.label_matrix(['mass'], range(2*N, 2*N + 3))).all()
    main(['join', 'out', 'b', 'again'])
    again = Cohort.open('again', verify=True)
    assert again.samples['sample'].is_unique and again.samples['sample'][0].startswith('out:a:') and len(again) == 3*N + 3


def test_join_the_same_gives_the_same(hospitals):
    "The hash of a cohort depends on what is in it only."
    for out in ('one', 'two'): main(['join', 'a', 't', out])
    assert Cohort.open('one').hash == Cohort.open('two').hash
    main(['join', 't', 'a', 'turned'])
    assert Cohort.open('turned').hash != Cohort.open('one').hash


def test_join_by_blocks(hospitals, monkeypatch):
    "Copied a few rows at a time, the arrays are the same."
    from mmsn.data import join
    main(['join', 'a', 'b', 'one'])
    monkeypatch.setattr(join, '_copy', lambda *args, copy=join._copy: copy(*args, size=5000))
    main(['join', 'a', 'b', 'two'])
    assert Cohort.open('one').hash == Cohort.open('two').hash


def test_join_refuses(hospitals, capsys):
    capsys.readouterr()
    for words, said in ((['a', 'large'], "'cxr' differs in size: 16 x 16 pixels in a, 24 x 24 pixels in large; prepare both alike"),
                        (['a'], 'join needs two cohorts or more, not 1'), (['a', './a'], "two of the cohorts are called 'a'"), (['a', 'none'], 'no cohort at none')):
        refused(capsys, 'join', *words, 'out', said=said)
    refused(capsys, 'join', 'a', 'b', 'a', said='a is one of the cohorts to join')
    refused(capsys, 'join', 'a', 'b', 'a', '--overwrite', said='a is one of the cohorts to join')
    (hospitals/'channels.csv').write_text('name,unit,low,high,normal\npulse,bpm,1,250,86\n')
    main(['table', 'long.csv', 'channels.csv', 'u', '--labels', 'labels.csv'])
    capsys.readouterr()
    refused(capsys, 'join', 't', 'u', 'out', said="'ehr' differs in channels")
    main(['table', 'long.csv', 'channels.csv', 'v', '--labels', 'labels.csv', '--modality', 'cxr'])
    capsys.readouterr()
    refused(capsys, 'join', 'a', 'v', 'out', said="'cxr' differs in kind: image in a, timeseries in v")
    assert len(Cohort.open('a', verify=True)) == N
