"A run is evaluated from anywhere: its cohort is found from where the command runs, from the run, or where it lay."
import json, shutil
from dataclasses import replace
from pathlib import Path

import pytest

import mmsn.testing as testing
from conftest import refused
from mmsn.files import seal
from mmsn.evaluate.__main__ import main
from mmsn.evaluate.evaluation import open_evaluated
from mmsn.options import InputError
from mmsn.run import find_cohort, open_cohort
from mmsn.train import train


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A project with a cohort and a run that names it by a path from the project's folder."
    project = tmp_path_factory.mktemp('work')/'project'
    testing.toy_cohort(project/'cohorts'/'toy', n=60)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(project)
        train(testing.toy_config(train=dict(threads=1, log_every=1, run='runs/a', probe_every=0), data=dict(cohort='cohorts/toy', workers=0), optim=dict(batch_size=16, epochs=1, warmup_epochs=0., lr=1e-3)))
    return project


@pytest.fixture
def project(made, tmp_path):
    "A copy of it that may be changed, in another place."
    shutil.copytree(made, tmp_path/'copy')
    return tmp_path/'copy'


def test_from_another_folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (made/'runs'/'a', made/'runs'/'a'/'encoder'): assert open_evaluated(source).cohort.folder.resolve() == made/'cohorts'/'toy'
    monkeypatch.chdir(made/'runs')
    assert open_evaluated('a').cohort.folder.resolve() == made/'cohorts'/'toy'


def test_moved_together(project, made, monkeypatch, tmp_path):
    "The copy beside the run is taken, not the one where it once lay."
    monkeypatch.chdir(tmp_path)
    assert find_cohort('cohorts/toy', project/'runs'/'a') == project/'cohorts'/'toy'
    (project/'deep'/'er').mkdir(parents=True)
    shutil.move(project/'runs'/'a', project/'deep'/'er'/'a')
    assert find_cohort('cohorts/toy', project/'deep'/'er'/'a') == project/'cohorts'/'toy'


def test_where_it_lay(project, made, monkeypatch, tmp_path):
    "Only the run was moved: the noted path leads back."
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(project/'cohorts')
    assert find_cohort('cohorts/toy', project/'runs'/'a') == made/'cohorts'/'toy'


def test_a_training_goes_on_where_it_was_moved(project, made, monkeypatch, tmp_path):
    "Runs and cohorts on another disk: the command with the run's new place is enough. A new run has only the name."
    monkeypatch.chdir(tmp_path)
    config = testing.toy_config(train=dict(threads=1, log_every=1, run=str(project/'runs'/'a'), probe_every=0), data=dict(cohort='cohorts/toy', workers=0),
                                optim=dict(batch_size=16, epochs=1, warmup_epochs=0., lr=1e-3))
    assert open_cohort(config).folder.resolve() == project/'cohorts'/'toy'
    assert train(config) == project/'runs'/'a'
    with pytest.raises(InputError, match='cohorts/toy'): open_cohort(replace(config, train=replace(config.train, run=str(project/'runs'/'new'))))


def test_a_run_that_notes_nothing(project, monkeypatch, tmp_path):
    "Runs of before know no places; folders above the run are tried."
    monkeypatch.chdir(tmp_path)
    about = json.loads((project/'runs'/'a'/'run.json').read_text())
    for k in ('folder', 'beside'): del about[k]
    (project/'runs'/'a'/'run.json').write_text(json.dumps(about))
    assert find_cohort('cohorts/toy', project/'runs'/'a') == project/'cohorts'/'toy'


def test_another_cohort_of_that_name_is_not_taken_unseen(project, made, monkeypatch, tmp_path, capsys):
    testing.toy_cohort(tmp_path/'cohorts'/'toy', n=50, seed=7)
    monkeypatch.chdir(tmp_path)
    assert find_cohort('cohorts/toy', project/'runs'/'a') == project/'cohorts'/'toy'
    shutil.rmtree(project/'cohorts')
    about = project/'runs'/'a'/'run.json'
    about.write_text(json.dumps(json.loads(about.read_text()) | dict(folder='/nowhere', beside='../nowhere')))
    said = []
    assert find_cohort('cohorts/toy', project/'runs'/'a', said.append) == tmp_path/'cohorts'/'toy'
    assert len(said) == 1 and 'is not the cohort that' in said[0]


def test_nowhere(project, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(project/'cohorts')
    about = project/'runs'/'a'/'run.json'
    about.write_text(json.dumps(seal(json.loads(about.read_text()) | dict(folder='/nowhere/toy', beside='../nowhere'))))
    line = refused(main, [project/'runs'/'a'], capsys)
    for place in ('no cohort at cohorts/toy', str(tmp_path/'cohorts'/'toy'), str(project/'cohorts'/'toy'), '/nowhere/toy', 'add data.cohort=FOLDER'): assert place in line, place
    assert 'no cohort at elsewhere' in refused(main, [project/'runs'/'a', 'data.cohort=elsewhere'], capsys)
