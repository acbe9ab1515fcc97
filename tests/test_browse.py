"Widgets without a browser: what a slider, a list and a button change."
import asyncio, json
from pathlib import Path

import numpy as np
import pytest

from mmsn.browse import browse, follow, rows_with
from mmsn.options import InputError
from mmsn.testing import toy_cohort, toy_config
from mmsn.train import train


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return toy_cohort(tmp_path_factory.mktemp('browse')/'cohort', 60)


def test_rows(cohort):
    assert list(rows_with(cohort)) == list(range(len(cohort)))
    for split in ('train', 'val', 'test'):
        got = rows_with(cohort, split, 'lung')
        assert list(got) == [i for i, r in enumerate(cohort.samples.itertuples()) if r.split == split and r.lung == 1]


def test_every_control_draws(cohort):
    "Each change gives one new figure, of the row that the widget says."
    pytest.importorskip('ipywidgets')
    b, seen = browse(cohort, toy_config()), []
    for control, value in ((b.place, 5), (b.what, 'views'), (b.epoch, 7), (b.what, 'patient'), (b.split, 'test'), (b.label, 'heart')):
        before = b.figure
        control.value = value
        assert b.figure is not before
        seen.append(b.row)
    assert seen[:4] == [5]*4 and b.place.value == 0 and b.row == rows_with(cohort, 'test', 'heart')[0]
    assert b.place.max == len(rows_with(cohort, 'test', 'heart')) - 1


def test_nobody(cohort):
    "A label that nobody of a split has: words instead of a figure, and a way back."
    pytest.importorskip('ipywidgets')
    b = browse(cohort)
    b.cohort = type('Nobody', (), dict(samples=cohort.samples.assign(heart=0.), labels=cohort.labels, __len__=lambda s: len(cohort), show=cohort.show))()
    b.label.value = 'heart'
    assert b.figure is None and not len(b.rows)
    b.label.value = ''
    assert b.figure is not None and b.row == 0


def test_live(cohort, tmp_path):
    "Lines that arrive are drawn by the task, a torn last line waits, and it ends when it is switched off."
    pytest.importorskip('ipywidgets')
    run = train(toy_config(optim=dict(epochs=2, batch_size=8), train=dict(run=str(tmp_path/'run'), threads=1, log_every=1)), cohort)
    path = run/'metrics.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text('')
    async def watch():
        f = follow(run, seconds=.01)
        assert f.figure is None and f.step == 0
        f.live.value = True
        path.write_text(''.join(lines[:3]) + lines[3][:20])
        await asyncio.sleep(.5)
        assert f.step == json.loads(lines[2])['step'] and f.figure is not None
        path.write_text(''.join(lines))
        await asyncio.sleep(.5)
        assert f.step == json.loads(lines[-1])['step']
        path.write_text('damaged\n' + ''.join(lines))
        await asyncio.sleep(.1)
        assert 'line 1 of' in f.said.value and not f.task.done()
        task, f.live.value = f.task, False
        await asyncio.sleep(.05)
        assert task.done() and f.task is None
    asyncio.run(watch())


def test_refused(cohort, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='is no run'): follow(tmp_path)
    with pytest.raises(InputError, match='an open cohort'): browse(str(cohort.folder))
    monkeypatch.setitem(__import__('sys').modules, 'ipywidgets', None)
    with pytest.raises(InputError, match='pip install ipywidgets'): browse(cohort)
