"What was written is what is read: sealed cohorts and what a changed one does to a training, hashes that are compared once, cohorts that are replaced, weights that are no numbers."
import json, os, random, shutil, signal, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mmsn.files
from conftest import one_line, refused, run
from mmsn.checkpoint import checkpoints, save_checkpoint
from mmsn.data.cohort import Cohort, _json
from mmsn.data.join import prepare_join
from mmsn.data.writer import CohortWriter
from mmsn.evaluate.evaluation import open_evaluated
from mmsn.files import abandoned, beside, new_folder, read_sealed, seal, sha256, swap_in, sweep, write_sealed
from mmsn.loop import NonFinite, Trainer
from mmsn.model import MMSN
from mmsn.options import InputError
from mmsn.prepare import main as prepare_main, replacing
from mmsn.run import open_run
from mmsn.testing import toy_cohort, toy_config
from mmsn.train import main as train_main


def config_of(tmp, **changes):
    return toy_config(optim=dict(batch_size=16, epochs=1), data=dict(cohort=str(tmp/'cohort')), train=dict(run=str(tmp/'run'), threads=1) | changes)


def change(path, at, value=None):
    "One bit flipped, or bytes replaced, in place."
    with open(path, 'r+b') as f:
        f.seek(at); old = f.read(1) if value is None else value
        f.seek(at); f.write(bytes([old[0] ^ 4]) if value is None else value)


def edit_json(path, edit, sealed=False):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(_json(seal(content) if sealed else content))


def dtype_swap(folder, dtype):
    "The chart in another type or shape, with sizes and hashes that are right, and the seal as well."
    np.save(folder/'ehr.npy', dtype(np.load(folder/'ehr.npy')))
    def edit(m): m['files']['ehr.npy'] = dict(bytes=(folder/'ehr.npy').stat().st_size, sha256=sha256(folder/'ehr.npy'))
    edit_json(folder/'cohort.json', edit, True)


DAMAGE = {
    **{f'bit {k}': lambda f, k=k: change(f/('cxr.npy', 'ehr.npy', 'samples.parquet')[k % 3], -1 - 97*k + os.path.getsize(f/('cxr.npy', 'ehr.npy', 'samples.parquet')[k % 3])) for k in range(9)},
    **{f'third {k}': lambda f, k=k: change(f/'cxr.npy', 128 + k*os.path.getsize(f/'cxr.npy')//3, bytes((os.path.getsize(f/'cxr.npy') - 128)//3)) for k in range(3)},
    'mean': lambda f: edit_json(f/'cohort.json', lambda m: m['modalities']['cxr'].update(mean=.25)),
    'label renamed': lambda f: edit_json(f/'cohort.json', lambda m: m['labels'].reverse()),
    'std 0, sealed': lambda f: edit_json(f/'cohort.json', lambda m: m['modalities']['cxr'].update(std=0), True),
    'float64': lambda f: dtype_swap(f, np.float64), 'big-endian': lambda f: dtype_swap(f, lambda x: x.astype('>f4')), 'float16': lambda f: dtype_swap(f, np.float16),
    'a column less': lambda f: dtype_swap(f, lambda x: x[:, :-1]), 'turned': lambda f: dtype_swap(f, lambda x: np.asfortranarray(x)),
    'NaN, sealed': lambda f: dtype_swap(f, lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.float32(np.nan), x)),
    'longer': lambda f: (f/'ehr.npy').open('ab').write(b'x')}


@pytest.mark.parametrize('what', DAMAGE)
def test_a_changed_cohort_does_not_train(tmp_path, what):
    "Each damage alone: one line, and no run."
    cohort = toy_cohort(tmp_path/'cohort', n=120)
    cohort.check_unchanged()                                  # remembered as right, before it is changed
    DAMAGE[what](cohort.folder)
    with pytest.raises(InputError) as e: Trainer(config_of(tmp_path)).fit()
    assert '\n' not in str(e.value) and str(cohort.folder) in str(e.value)
    assert not list((tmp_path/'run').glob('*')) if (tmp_path/'run').exists() else True


def test_compared_once(tmp_path, monkeypatch):
    "The second run reads no array; a touched file is read again, whatever its time says; --verify reads all."
    cohort, read = toy_cohort(tmp_path/'cohort', n=40), []
    monkeypatch.setattr(mmsn.files, 'sha256', lambda path: read.append(path.name) or sha256(path))
    def names(*args, **kw): read.clear(); Cohort.open(cohort.folder).check_unchanged(*args, **kw); return sorted(n for n in read if n != 'samples.parquet')
    assert names(['cxr']) == ['cxr.npy'] and names(['cxr']) == []
    assert names() == ['ehr.npy', 'facts.npy', 'labs.npy'] and names() == []
    assert names(verify=True) == ['cxr.npy', 'ehr.npy', 'facts.npy', 'labs.npy']
    before = os.stat(cohort.folder/'cxr.npy')
    change(cohort.folder/'cxr.npy', 300); change(cohort.folder/'cxr.npy', 300)          # back to what it was
    os.utime(cohort.folder/'cxr.npy', ns=(before.st_atime_ns, before.st_mtime_ns))
    assert names() == ['cxr.npy'] and names() == []
    copy = Path(shutil.copytree(cohort.folder, tmp_path/'copy'))                          # a copy is another matter
    read.clear(); Cohort.open(copy).check_unchanged(['cxr']); assert 'cxr.npy' in read


def test_a_cohort_that_cannot_be_written(tmp_path):
    "The memory goes to the run's folder; a memory that is nonsense is none."
    cohort = toy_cohort(tmp_path/'cohort', n=120)
    (cohort.folder/'.verified.json').mkdir()                                              # stands for a read-only disk
    Trainer(config_of(tmp_path)).fit()
    assert set(json.loads((tmp_path/'run'/'.verified.json').read_text())) == {'samples.parquet', 'cxr.npy', 'ehr.npy'}
    for nonsense in ('[', '[]', '7', '{"cxr.npy": 3}', '['*100_000, '\xff'):
        (tmp_path/'run'/'.verified.json').write_bytes(nonsense.encode('latin1'))
        cohort.check_unchanged(run=tmp_path/'run')
    change(cohort.folder/'cxr.npy', 300)
    with pytest.raises(InputError, match='cxr.npy was changed'): cohort.check_unchanged(run=tmp_path/'run')


def test_verify_everywhere(tmp_path, capsys):
    "A bit that rots unnoticed by the file system is found by --verify of each command, and by Cohort.open(…, verify=True)."
    cohort = toy_cohort(tmp_path/'cohort', n=120)
    words = ['demo', f'data.cohort={cohort.folder}', f'train.run={tmp_path}/rot', 'modalities.cxr.encoder.dim=24', 'modalities.cxr.encoder.depth=1', 'modalities.cxr.encoder.patch=8',
             'modalities.cxr.views.random_size=16', 'modalities.cxr.views.focal_size=8', 'modalities.ehr.encoder.hidden=16', 'modalities.ehr.encoder.dim=16', 'modalities.ehr.ignore=[]',
             'fusion.dim=24', 'head.hidden=32', 'head.output=16', 'loss.prototypes=8', 'optim.batch_size=16', 'optim.epochs=1', 'optim.warmup_epochs=0', 'train.threads=1']
    Trainer(config_of(tmp_path)).fit()
    prepare_main(['verify', str(cohort.folder)])
    assert 'files are what was written, sealed' in capsys.readouterr().out
    change(cohort.folder/'cxr.npy', 300)
    memory = cohort.folder/'.verified.json'
    known = json.loads(memory.read_text())
    known['cxr.npy'][1:] = mmsn.files._stamp(cohort.folder/'cxr.npy')                     # as if nothing had touched it
    memory.write_text(json.dumps(known))
    Cohort.open(cohort.folder).check_unchanged()
    assert 'cxr.npy was changed' in refused(prepare_main, ['verify', cohort.folder], capsys)
    assert 'cxr.npy was changed' in refused(train_main, [*words, '--verify'], capsys)
    with pytest.raises(InputError, match='cxr.npy was changed'): Cohort.open(cohort.folder, verify=True)
    with pytest.raises(InputError, match='cxr.npy was changed'): open_evaluated(tmp_path/'run', verify=True)
    open_evaluated(tmp_path/'run')


def test_verify_after_preparing(tmp_path):
    done = run('mmsn.prepare', 'synthetic', tmp_path/'new', '--patients', 20, '--verify')
    assert 'files are what was written, sealed' in done.stdout


def test_an_older_cohort(tmp_path, capsys):
    "Without a seal: opens, is said to have none, trains if its hashes are right, gets a seal and keeps its name."
    cohort = toy_cohort(tmp_path/'cohort', n=120)
    edit_json(cohort.folder/'cohort.json', lambda m: m.pop('seal'))
    with pytest.warns(UserWarning, match=r'without a seal: mmsn-prepare verify .* --seal'): older = Cohort.open(cohort.folder)
    assert older.hash == cohort.hash
    older.check_unchanged()
    prepare_main(['verify', str(cohort.folder), '--seal'])
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert Cohort.open(cohort.folder).hash == cohort.hash
    edit_json(cohort.folder/'cohort.json', lambda m: m.pop('seal'))
    change(cohort.folder/'ehr.npy', 300)
    with pytest.warns(UserWarning): assert 'ehr.npy was changed' in refused(prepare_main, ['verify', cohort.folder, '--seal'], capsys)
    assert 'seal' not in json.loads((cohort.folder/'cohort.json').read_text())


def test_what_is_made_of_a_changed_cohort(tmp_path):
    a, b = toy_cohort(tmp_path/'a', n=30), toy_cohort(tmp_path/'b', n=30, seed=1)
    change(b.folder/'labs.npy', 200)
    with pytest.raises(InputError, match='labs.npy was changed'): prepare_join([a.folder, b.folder], tmp_path/'both')
    assert not (tmp_path/'both').exists()


def killed(call, rename):
    "Run `call` in a child that dies at its `rename`-th rename; whether it was killed."
    pid = os.fork()
    if not pid:
        import sys
        seen = [0]
        def hook(event, arguments):
            if event != 'os.rename': return
            seen[0] += 1
            if seen[0] == rename: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        code = 1
        try: call(); code = 0
        finally: os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def again(folder):
    with replacing(folder, overwrite=True): toy_cohort(folder, n=30, seed=1)


def test_overwrite_killed_at_every_rename(tmp_path):
    "Whatever the moment: one of the two cohorts is there, or the next start puts it back; nothing else is left."
    folder, seen = tmp_path/'cohort', []
    old, new = toy_cohort(folder, n=30).hash, toy_cohort(tmp_path/'other', n=30, seed=1).hash
    shutil.rmtree(tmp_path/'other')
    for rename in range(1, 9):
        was_killed = killed(lambda: again(folder), rename)
        if not folder.exists():
            with pytest.raises(InputError, match='the earlier one is .*move it back, or give the same mmsn-prepare again'): Cohort.open(folder)
            seen.append('aside')
        if was_killed: assert len(abandoned(folder)) > 0
        with replacing(folder, overwrite=True): pass                       # the next start
        assert [p.name for p in tmp_path.iterdir()] == ['cohort']
        found = Cohort.open(folder, verify=True).hash
        seen.append(dict([(old, 'old'), (new, 'new')])[found])
        if not was_killed: break
        shutil.rmtree(folder); toy_cohort(folder, n=30)
    assert seen[-1] == 'new' and 'aside' in seen and 'old' in seen, seen


def test_only_the_dead_are_cleared_away(tmp_path):
    living, = [tmp_path/f'{beside(tmp_path/"cohort")}x'] ; living.mkdir()
    for name in ('.cohort-notes', '.cohort-abcdef-1-1-x', '.other-000000-1-1-x'): (tmp_path/name).mkdir()      # somebody's, another machine's, another cohort's
    dead = tmp_path/living.name.replace(f'-{os.getpid()}-', '-4000000-'); dead.mkdir()
    sweep(tmp_path/'cohort')
    assert not dead.exists() and len(list(tmp_path.iterdir())) == 4
    with CohortWriter(tmp_path/'cohort', 'x'): assert living.exists()


def test_an_error_while_overwriting(tmp_path):
    "The earlier cohort stays, and can be read all the time."
    cohort = toy_cohort(tmp_path/'cohort', n=30)
    for error in (InputError, KeyboardInterrupt):
        with pytest.raises(error), replacing(cohort.folder, overwrite=True):
            with CohortWriter(cohort.folder, 'half') as w:
                w.add_images('cxr', 4, 4).append(np.zeros((2, 4, 4), np.uint8))
                assert Cohort.open(cohort.folder).hash == cohort.hash
                raise error('in the middle')
    assert Cohort.open(cohort.folder, verify=True).hash == cohort.hash and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match='exists already'): CohortWriter(cohort.folder, 'not allowed')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('sealed')
    toy_cohort(tmp/'cohort', n=120)
    Trainer(config_of(tmp, checkpoint_every=2)).fit()
    return tmp


def test_weights_that_are_no_numbers(trained, tmp_path):
    "Neither saved, nor exported, nor read; the checkpoint before stays."
    shutil.copytree(trained, tmp_path/'t')
    trainer = Trainer(config_of(tmp_path/'t', checkpoint_every=2))
    trainer.metrics, last = None, checkpoints(tmp_path/'t'/'run'/'checkpoints')[-1]
    with torch.no_grad(): trainer.model.prototypes[0, 0] = torch.nan
    trainer.step += 1
    with pytest.raises(NonFinite, match='prototypes holds values that are not finite; it is not saved'): trainer.save()
    with pytest.raises(InputError, match='prototypes of the model is not finite'): trainer.model.save_pretrained(tmp_path/'encoder')
    with pytest.raises(InputError, match='w of step 3 is not finite'): save_checkpoint(tmp_path/'c', 3, dict(model={'w': torch.tensor([torch.inf])}), {})
    assert checkpoints(tmp_path/'t'/'run'/'checkpoints')[-1] == last and not (tmp_path/'encoder').exists() and not list((tmp_path/'c').rglob('*'))


def test_an_older_encoder_and_run(trained, tmp_path):
    "Without hash and seal they open, and a run resumes."
    shutil.copytree(trained, tmp_path/'t')
    run = tmp_path/'t'/'run'
    for path, keys in ((run/'encoder'/'config.json', ('seal', 'weights')), (run/'run.json', ('seal', 'pretrained_on'))):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))
    MMSN.from_pretrained(run/'encoder')
    assert open_run(config_of(tmp_path/'t', checkpoint_every=2), Cohort.open(tmp_path/'t'/'cohort'))[1][1]['step'] > 2


def test_an_edited_config_is_not_what_a_run_was(trained, tmp_path):
    shutil.copytree(trained, tmp_path/'t')
    path = tmp_path/'t'/'run'/'config.yaml'
    path.write_text(path.read_text().replace('draws: ', 'draws: 1'))
    with pytest.raises(InputError, match='config.yaml was changed since the run was started'): open_evaluated(tmp_path/'t'/'run')
    assert open_evaluated(trained/'run', ['draws=3']).config.evaluate.draws == 3


def test_enormous_encoders_reserve_nothing(trained, tmp_path):
    "A config.json, sealed anew, that asks for a model of terabytes or of a million layers: one line, at once."
    for key, value in (('hidden', 10**7), ('depth', 10**6), ('output', 10**8)):
        folder = Path(shutil.copytree(trained/'run'/'encoder', tmp_path/key))
        about = json.loads((folder/'config.json').read_text())
        part = about['config']['head'] if key != 'depth' else about['config']['modalities']['cxr']['encoder']
        part[key] = value
        (folder/'config.json').write_text(json.dumps(seal(about)))
        with pytest.raises(InputError): MMSN.from_pretrained(folder)


def test_sealed_tables_of_every_kind(tmp_path):
    "Numbers, texts, gaps, every bit pattern of NaN: equal after reading, and refused where one cell is another."
    odd = np.frombuffer(np.uint32([0x7fc00001, 0xffc00000, 0x7f800001, 0x3f800000]).tobytes(), np.float32)
    table = pd.DataFrame(dict(i=np.arange(4), f=odd, d=[1., np.nan, -0., np.inf], b=[True, False, True, True], t=['a', None, '', 'é\n"'], u=np.arange(4, dtype=np.uint8)))
    write_sealed(table, tmp_path/'t.parquet')
    pd.testing.assert_frame_equal(read_sealed(tmp_path/'t.parquet'), pd.read_parquet(tmp_path/'t.parquet'))
    for column, value in (('i', 9), ('f', 2.), ('b', False), ('t', 'b'), ('u', 9)):
        import pyarrow as pa, pyarrow.parquet as pq
        other = table.copy(); other.loc[0, column] = value
        about = pq.read_schema(tmp_path/'t.parquet').metadata
        pq.write_table(pa.Table.from_pandas(other, preserve_index=False).replace_schema_metadata(about), tmp_path/'o.parquet')
        with pytest.raises(InputError, match='was changed'): read_sealed(tmp_path/'o.parquet')


def test_the_hash_of_a_table_is_what_it_was():
    "Tables that were sealed before are still read: whole numbers beyond 2^53, halves, and every NaN."
    from mmsn.files import _table_hash
    odd = np.frombuffer(np.uint32([0x7fc00001, 0xffc00000, 0x7f800001, 0x3f800000]).tobytes(), np.float32)
    table = pd.DataFrame(dict(i=np.arange(4), big=np.array([2**53 + 1, -2**62 - 3, 0, 7]), f=odd, d=[1., np.nan, -0., np.inf], b=[True, False, True, True],
                              t=['a', None, '', 'é\n"'], u=np.arange(4, dtype=np.uint8), h=np.float16([1, np.nan, 2, 3])))
    assert _table_hash(table) == '7c87478bc04c5f3267752478c47f8648a1c0b06dd5d26fbd0a943a11dfff5b5c'
    assert _table_hash(table.assign(f=table.f.iloc[::-1].to_numpy())) != _table_hash(table) != _table_hash(table.assign(b=False))


def test_stamps_of_stages_that_are_nonsense(tmp_path):
    "A stage whose stamp is damaged is made again."
    from mmsn.data.tables import Stages
    made = lambda: Stages(tmp_path).make('rows', dict(a=1), lambda folder: (folder/'x').write_text('1'))
    for text in ('[', '[1]', '7', '['*100_000, '{"sha256": 3}', ''):
        (made()/'stage.json').write_text(text)
        stages = Stages(tmp_path)
        stages.make('rows', dict(a=1), lambda folder: (folder/'x').write_text('2'))
        assert stages.reused == [] and (tmp_path/'rows'/'x').read_text() == '2'


def test_a_killed_synthetic_preparation_leaves_nothing_for_long(tmp_path):
    "The files that it wrote on the way go with the next start."
    from mmsn import prepare
    def die(*args, **options): os.kill(os.getpid(), signal.SIGKILL)
    pid = os.fork()
    if not pid:
        import mmsn.prepare
        mmsn.prepare.prepare_mimic = die
        try: prepare.synthetic(tmp_path/'cohort', patients=5)
        finally: os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]) and len(list(tmp_path.glob('.cohort-*'))) == 1
    with replacing(tmp_path/'cohort'): toy_cohort(tmp_path/'cohort', n=30)
    assert [p.name for p in tmp_path.iterdir()] == ['cohort']


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one(tmp_path, monkeypatch):
    "A disk that fails between the two renames, an error while the folder is filled: what was there is there, and nothing beside it."
    folder, real = tmp_path/'encoder', Path.rename
    with new_folder(folder) as new: (new/'old').touch()
    with pytest.raises(ZeroDivisionError), new_folder(folder) as new: (new/'half').touch(); 1/0
    def rename(path, to):
        if path.name.endswith('-new'): raise error
        return real(path, to)
    monkeypatch.setattr(Path, 'rename', rename)
    for error in (OSError(28, 'No space left on device'), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(folder) as new: (new/'new').touch()
        assert [p.name for p in folder.iterdir()] == ['old'] and [p.name for p in tmp_path.iterdir()] == ['encoder']


def test_a_folder_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    "Files, the folder, the rename, and the parent that lists it, in this order; one function for cohorts, checkpoints, encoders and reports, and its older name."
    from mmsn import checkpoint, files
    assert checkpoint.publish is swap_in
    done, real = [], Path.rename
    monkeypatch.setattr(files, 'fsync', lambda path: done.append(Path(path).name))
    monkeypatch.setattr(Path, 'rename', lambda path, to: done.append(f'{path.name} -> {Path(to).name}') or real(path, to))
    for i in range(2):
        (tmp_path/'new').mkdir(); (tmp_path/'new'/'file').write_text(str(i))
        swap_in(tmp_path/'new', tmp_path/'out')
        assert done[:2] == ['file', 'new'] and done[-2:] == ['new -> out', tmp_path.name] and len(done) == 4 + i
        done.clear()
    assert (tmp_path/'out'/'file').read_text() == '1' and [p.name for p in tmp_path.iterdir()] == ['out']


def test_what_was_set_aside_is_not_left_beside_a_new_folder(tmp_path):
    "Whoever writes next clears away what a killed process set aside, also where nothing else sweeps."
    dead = tmp_path/beside(tmp_path/'out').replace(f'-{os.getpid()}-', '-4000000-')
    (dead.with_name(dead.name + 'earlier')/'out').mkdir(parents=True); (dead.with_name(dead.name + 'earlier')/'out'/'old').touch()
    (tmp_path/'new').mkdir(); (tmp_path/'new'/'file').touch()
    swap_in(tmp_path/'new', tmp_path/'out')
    assert [p.name for p in tmp_path.iterdir()] == ['out'] and [p.name for p in (tmp_path/'out').iterdir()] == ['file']


def test_swap_in_keeps_a_file(tmp_path):
    "A file that stands where a folder should go is somebody's, and stays."
    (tmp_path/'new').mkdir(), (tmp_path/'new'/'a').write_text('1'), (tmp_path/'out').write_text('precious')
    with pytest.raises(NotADirectoryError): swap_in(tmp_path/'new', tmp_path/'out')
    assert (tmp_path/'out').read_text() == 'precious' and (tmp_path/'new'/'a').is_file()
