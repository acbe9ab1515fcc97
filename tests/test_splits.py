"One list of subjects for every source: who trains and who tests. The lessons are in data.splits."
import itertools, tarfile
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from conftest import ROOT
from mmsn.data.cohort import Cohort
from mmsn.data.splits import divide, read_split, split_counts
from mmsn.data.tables import split_of
from mmsn.options import InputError
from mmsn.prepare import main

SUBJECTS = list(range(1, 9))
RIGHT = {s: ('train', 'val', 'test', 'train')[s % 4] for s in SUBJECTS}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_list(column='subject_id', subjects=RIGHT, name='list.csv', form=str):
    Path(name).write_text(f'{column},split\n' + ''.join(f'{form(s)},{w}\n' for s, w in subjects.items()))
    return name


def pictures(folder='images'):
    Path(folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for s in SUBJECTS: Image.fromarray(rng.integers(0, 255, (20, 24)).astype('uint8')).save(f'{folder}/{s}.png')


def table_words():
    Path('t.csv').write_text('subject_id,time,variable,value\n' + ''.join(f'{s},0.5,HR,{60 + s}\n' for s in SUBJECTS))
    Path('ch.csv').write_text('name,unit,low,high,normal\nHR,bpm,1,300,80\n')
    Path('y.csv').write_text('subject_id,died,split\n' + ''.join(f'{s},0,train\n' for s in SUBJECTS))
    return ['table', 't.csv', 'ch.csv', 'out', '--labels', 'y.csv'], 'subject_id'


def yaib_words():
    Path('y').mkdir()
    pd.DataFrame(dict(stay_id=SUBJECTS, time=[0]*8, hr=[80.]*8)).to_parquet('y/dyn.parquet')
    return ['table', 'y', 'out'], 'stay_id'


def images_words():
    pictures()
    pd.DataFrame(dict(image=[f'{s}.png' for s in SUBJECTS], patient=SUBJECTS)).to_csv('scans.csv', index=False)
    return ['images', 'scans.csv', 'images', 'out', '--size', '16', '--subject', 'patient'], 'patient'


def nih_words():
    pictures()
    pd.DataFrame(dict(image=[f'{s}.png' for s in SUBJECTS], finding_labels='Mass', patient_id=SUBJECTS, age=50, sex=['M', 'F']*4, view='PA')).to_csv('labels.csv', index=False)
    Path('test_list.txt').write_text('1.png\n2.png\n')
    return ['nih', '.', 'out', '--size', '16'], 'Patient ID'


def iu_words():
    pictures()
    pd.DataFrame(dict(image=[f'{s}.png' for s in SUBJECTS], uid=SUBJECTS, projection='Frontal')).to_csv('images.csv', index=False)
    pd.DataFrame(dict(uid=SUBJECTS, MeSH='x', Normal=[0, 1]*4)).to_csv('labels_from_mesh.csv', index=False)
    return ['iu', '.', 'out', '--size', '16'], 'uid'


def physionet(sets=('a',)):
    "Eight records over the sets, in folders or archives."
    parts = np.array_split(SUBJECTS, len(sets))
    for name, records in zip(sets, parts):
        Path(f'set-{name}').mkdir()
        for r in records:
            Path(f'set-{name}/{r}.txt').write_text(f'Time,Parameter,Value\n00:00,RecordID,{r}\n00:00,Age,60\n00:30,HR,{60 + r}\n')
        Path(f'Outcomes-{name}.txt').write_text('RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n' + ''.join(f'{r},1,1,5,-1,{r % 2}\n' for r in records))


def physionet_words():
    physionet()
    return ['physionet2012', '.', 'out'], 'RecordID'


def medfuse_words():
    from mmsn.data.mimic.channels import channel_set
    names = [c.name for c in channel_set('benchmark')]
    for part, who in (('train', SUBJECTS[:6]), ('test', SUBJECTS[6:])):
        Path(f'in-hospital-mortality/{part}').mkdir(parents=True)
        for s in who:
            Path(f'in-hospital-mortality/{part}/{s}_episode1_timeseries.csv').write_text(','.join(['Hours', *names]) + '\n' + ','.join(['0.5', *('80' if n == 'Heart Rate' else '' for n in names)]) + '\n')
    for part, who in (('train', SUBJECTS[:4]), ('val', SUBJECTS[4:6]), ('test', SUBJECTS[6:])):
        Path(f'in-hospital-mortality/{part}_listfile.csv').write_text('stay,period_length,stay_id,y_true\n' + ''.join(f'{s}_episode1_timeseries.csv,48,{s},{s % 2}\n' for s in who))
    return ['medfuse', '.', 'out', '--task', 'mortality'], 'subject_id'


def meds_words():
    Path('data').mkdir(), Path('metadata').mkdir()
    t = pd.Timestamp('2150-01-01')
    rows = [(s, t + pd.Timedelta(h, 'h'), code, x) for s in SUBJECTS for h, code, x in ((0, 'ICU', None), (1, 'HR', 70. + s))]
    pd.DataFrame(rows, columns=['subject_id', 'time', 'code', 'numeric_value']).to_parquet('data/0.parquet')
    pd.DataFrame(dict(subject_id=SUBJECTS, split='train')).to_parquet('metadata/subject_splits.parquet')
    Path('codes.csv').write_text('code,channel,unit,low,high,normal,scale,offset\nHR,HR,bpm,1,300,80,1,0\n')
    return ['meds', '.', 'codes.csv', 'out', '--start', 'ICU'], 'subject_id'


SOURCES = dict(table=table_words, yaib=yaib_words, images=images_words, nih=nih_words, iu=iu_words, physionet2012=physionet_words, medfuse=medfuse_words, meds=meds_words)


@pytest.mark.parametrize('source', SOURCES)
def test_every_source_follows_a_list(capsys, source):
    words, column = SOURCES[source]()
    for name in dict.fromkeys((column, 'subject_id')):                      # the source's own name of a subject, and ours
        main([*words, '--split', write_list(name), '--overwrite'])
        samples, shown = Cohort.open('out').samples, capsys.readouterr().out
        assert dict(zip(samples.subject_id, samples.split)) == RIGHT
        assert '8  subjects listed' in shown and '0  subjects not listed: divided by hash' in shown
    some = {s: w for s, w in RIGHT.items() if s < 6}
    main([*words, '--split', write_list(subjects=some, form=lambda s: f'{s:03d}'), '--overwrite'])
    samples, shown = Cohort.open('out').samples, capsys.readouterr().out
    assert dict(zip(samples.subject_id, samples.split)) == {s: some.get(s, split_of([s])[0]) for s in SUBJECTS}
    assert '5  subjects listed' in shown and '3  subjects not listed: divided by hash' in shown
    for rows, said in (({f'x{s}': 'test' for s in SUBJECTS}, 'is a list of other subjects: only 0 of 8'), ({1: 'holdout'}, "'holdout' of subject 1")):
        with pytest.raises(SystemExit) as stop: main([*words, '--split', write_list(subjects=rows), '--overwrite'])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    Path('list.csv').write_text('subject_id,split\n1,train\n01,test\n')
    with pytest.raises(SystemExit) as stop: main([*words, '--split', 'list.csv', '--overwrite'])
    assert stop.value.code == 2 and 'subject 1 is in test and in train' in capsys.readouterr().err
    assert dict(zip(samples.subject_id, samples.split)) == {s: some.get(s, split_of([s])[0]) for s in SUBJECTS}      # the earlier cohort stays


@pytest.mark.parametrize('source', ['synthetic', 'mimic'])
def test_synthetic_patients_follow_a_list(capsys, source):
    words = ['synthetic', 'out', '--patients', '12', '--image-size', '32', '--keep-files']
    main(words)
    before = Cohort.open('out').samples
    Path('list.csv').write_text('subject_id,split\n' + ''.join(f'{s},test\n' for s in before.subject_id.unique()))
    if source == 'mimic': words = ['mimic', 'out', '--mimic-iv', 'out-files/mimic-iv', '--task', 'mortality', '--samples', 'ehr']
    main([*(w for w in words if w != '--keep-files'), '--split', 'list.csv', '--overwrite'])
    assert set(Cohort.open('out').samples.split) == {'test'} and 'subjects listed' in capsys.readouterr().out


def test_old_ways_still_work(capsys):
    words, _ = table_words()
    main(words)
    assert set(Cohort.open('out').samples.split) == {'train'}               # the column of the labels
    main([*words, '--split', 'hash', '--overwrite'])
    samples = Cohort.open('out').samples
    assert samples.split.tolist() == split_of(samples.subject_id).tolist() and 'with a split in the labels, not used' in capsys.readouterr().out
    words, _ = images_words()
    pd.read_csv('scans.csv').assign(fold=list(RIGHT.values())).to_csv('scans.csv', index=False)
    main([*words, '--split', 'fold', '--overwrite'])
    assert Cohort.open('out').samples.split.tolist() == list(RIGHT.values())
    with pytest.raises(SystemExit): main([*words, '--split', 'floods', '--overwrite'])
    assert "no column 'floods', and there is no such file" in capsys.readouterr().err


def test_images_without_subjects_are_listed_by_file(capsys):
    images_words()
    write_list('image', {f'{s}.png': w for s, w in RIGHT.items()})
    main(['images', 'scans.csv', 'images', 'out', '--size', '16', '--split', 'list.csv'])
    assert Cohort.open('out').samples.split.tolist() == list(RIGHT.values())


def test_nih_says_its_test_list(capsys):
    words, _ = nih_words()
    main(words)
    shown, samples = capsys.readouterr().out, Cohort.open('out').samples
    assert 'test_list.txt says who tests' in shown and '2  test by test_list.txt' in shown
    assert samples.subject_id[samples.split == 'test'].tolist() == [1, 2]
    main([*words, '--split', write_list('patient_id'), '--overwrite'])
    assert 'test_list.txt' not in capsys.readouterr().out


@pytest.mark.parametrize('sets', [c for n in (1, 2, 3) for c in itertools.combinations('abc', n)])
def test_physionet_sets_alone_and_together(capsys, sets):
    physionet(sets)
    if len(sets) == 2:                                                      # an archive beside a folder
        with tarfile.open(f'set-{sets[0]}.tar.gz', 'w:gz') as t: t.add(f'set-{sets[0]}')
        import shutil; shutil.rmtree(f'set-{sets[0]}')
    first = np.array_split(SUBJECTS, len(sets))[0]
    write_list('RecordID', {s: 'train' if s in first else 'test' for s in SUBJECTS})     # train in one set, test in the others
    main(['physionet2012', '.', 'out', '--split', 'list.csv'])
    samples = Cohort.open('out').samples
    assert samples.subject_id.tolist() == SUBJECTS and samples.mortality.tolist() == [s % 2 for s in SUBJECTS]
    assert samples.split.tolist() == ['train' if s in first else 'test' for s in SUBJECTS]


@pytest.mark.parametrize('ids, listed, right', [
    (['007', '8'], ['7', '8'], ['test', 'test']), ([7, 8], ['7.0', '8.0'], ['test', 'test']), (['7.0', '8.0'], ['7', '08'], ['test', 'test']), ([' 7', '8 '], ['7', '8'], ['test', 'test']),
    (['P1', 'P2'], ['P1', 'P2'], ['test', 'test']), ([10000032, 10000980], ['10000032', '10000980'], ['test', 'test'])])
def test_ids_in_one_form(ids, listed, right):
    Path('l.csv').write_text('subject_id,split\n' + ''.join(f'{i},test\n' for i in listed))
    assert divide(ids, 'l.csv').tolist() == right and split_counts(ids, 'l.csv')[0] == ('subjects listed', 2)


@pytest.mark.parametrize('text, said', [
    ('subject_id,fold\n1,train\n', "no column 'split'"), ('subject_id,split\n,train\n', 'without a subject'), ('subject_id,split\n1,\n', "split '' of subject 1"), ('', 'empty'),
    ('1,0\n2,1\n', 'has no header'), ('who,split\n1,train\n', "no column 'subject_id'"), ('subject_id;split\n1;train\n', 'semicolons'), ('subject_id,split\n1,train,\n', 'line 2')])
def test_lists_that_are_refused(text, said):
    Path('l.csv').write_text(text)
    with pytest.raises(InputError) as e: read_split('l.csv')
    assert said in str(e.value) and '\n' not in str(e.value)


def test_forms_of_lists():
    Path('l.csv').write_text('note,Split,Subject ID\n,TRAIN,1\n,validate,2\n,held_out,3\n')
    assert read_split('l.csv').split.tolist() == ['train', 'val', 'test']
    pd.DataFrame(dict(subject_id=[1, 2], split=['tuning', 'held_out'])).to_parquet('l.parquet')
    assert read_split('l.parquet').split.tolist() == ['val', 'test']
    Path('testset.csv').write_text('1,1\n2,0\n')
    Path('valset.csv').write_text('1,0\n2,1\n')
    assert divide([1, 2, 3], 'testset.csv, valset.csv').tolist() == ['test', 'val', 'train']
    Path('l.csv').write_text('subject_id,split\n1,test\n2,test\n')
    assert divide(range(1000), 'l.csv')[1:3].tolist() == ['test', 'test']       # a short list of many subjects is a list
