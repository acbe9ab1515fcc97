"What a reader of the site gets: every paragraph and every exported line of the notebooks reaches the staged page."
import fcntl, os, re, subprocess, sys, tempfile
from pathlib import Path

import pytest

from notebook_metrics import EXPORTED_CODE, ROOT, cells

BOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


# what the command nbdev-proc-nbs does, in one process, which reads the project's settings once and not for every cell, and does not tidy up a shell for each
# notebook as it ends: these were two thirds of its time
STAGE = '''import os
from functools import cache
import nbdev.processors, nbdev.serve
nbdev.processors.get_config = cache(nbdev.processors.get_config)
nbdev.serve.proc_nbs(n_workers=0)
os._exit(0)'''


@pytest.fixture(scope='module')
def staged():
    "The folder of pages as nbdev hands them to Quarto; pages of notebooks that did not change are left as they are."
    tools = Path(sys.executable).parent
    with open(Path(tempfile.gettempdir())/f'mmsn-staging-{os.getuid()}', 'w') as lock:      # by one test process at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        out = subprocess.run([sys.executable, '-c', STAGE], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, PATH=f'{tools}{os.pathsep}{os.environ["PATH"]}'))
    assert out.returncode == 0, (out.stdout + out.stderr)[-2000:]
    return ROOT/'_proc'


def letters(text):
    "Letters and digits alone: links that nbdev adds to names, and Quarto's attributes, are no change of the text."
    text = re.sub(r'\[(`[^`]*`)\]\([^)]*\)', r'\1', text)
    text = re.sub(r'^#\|.*$', '', text, flags=re.M)
    return re.sub(r'\W', '', text)


@pytest.mark.parametrize('book', BOOKS, ids=lambda b: b.relative_to(ROOT/'nbs').as_posix())
def test_page_is_whole(staged, book):
    page = cells(staged/book.relative_to(ROOT/'nbs'))
    prose = letters('\n'.join(s for t, s, _ in page if t == 'markdown'))
    code = {s for t, s, _ in page if t == 'code'}
    lines = {line.rstrip() for s in code for line in s.splitlines()}
    for kind, source, _ in cells(book)[1:]:
        if kind == 'markdown' and not re.search(r'^#\|\s*hide', source, re.M):
            for paragraph in re.split(r'\n\s*\n', source): assert letters(paragraph) in prose, f'not on the page: {paragraph[:200]}'
        elif EXPORTED_CODE.search(source):
            missing = [l for l in source.splitlines() if l.strip() and not l.startswith('#|') and l.rstrip() not in lines]
            assert not missing, f'exported lines that are not on the page: {missing[:3]}'
