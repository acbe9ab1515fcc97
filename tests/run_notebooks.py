"""Run every notebook, two at a time: `python tests/run_notebooks.py [-n PROCESSES] [NOTEBOOK …]`; the exit code is 1 if one fails.

What runs is what `nbdev-test` runs, its own `test_nb`. But each notebook has a process to itself, forked from one that has imported torch and its like: that starts
in milliseconds, and nothing of a notebook is still there, or walked through by the collector of garbage, while the next one runs. The longest begin first."""
import argparse, os, sys, time
# before torch is imported: a process forked from one that has used OpenMP's threads waits for them for ever
for _name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(_name, '1')
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]

# in this order, before all others: they take longest
LONG = ['83_evaluate.evaluation', '20_data.synthetic', '66_train', '90_demo', '52z_objectives.choice', '22e_data.mimic.prepare', '76_evaluate.robustness', '85_evaluate', '53_model', '84_evaluate.compare', '52i_objectives.mae', '26_data.medfuse',
        '14_data.images', '28_prepare', '51d_tokens', '25_data.folders', '23_data.physionet', '75_evaluate.networks', '22c_data.mimic.events', '81_evaluate.inspect', '86_browse', '22b_data.mimic.stays', '02_show', '74_evaluate.probes']
BARE = ['00e_threads']     # tells what happens in a process that has not imported torch


def books(given):
    "Paths of the notebooks to run, the longest first."
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    found = [Path(g).absolute() for g in given] or [Path(p).absolute() for p in nbglob(get_config().nbs_path, as_path=True)]
    return sorted(found, key=lambda p: (LONG.index(p.stem) if p.stem in LONG else len(LONG), p))


def test(book):
    "In a process of its own: run one notebook, and end with 0 if nothing in it fails."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config, ok = get_config(), False
    flags = config.tst_flags.split() if isinstance(config.tst_flags, str) else config.tst_flags
    try:
        os.chdir(book.parent)
        ok = test_nb(book, skip_flags=flags, force_flags=[], basepath=config.config_path)[0]
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(not ok)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('notebook', nargs='*')
    p.add_argument('-n', type=int, default=2, help='processes at a time')
    args = p.parse_args(argv)
    running, seconds, failed = {}, {}, []
    todo = sorted(books(args.notebook)[::-1], key=lambda b: b.stem in BARE)
    import nbdev.test
    from forks import warm
    while todo or running:
        while todo and len(running) < args.n:
            if todo[-1].stem not in BARE and 'torch' not in sys.modules: warm()
            book = todo.pop()
            if not (pid := os.fork()): test(book)
            running[pid] = book, time.time()
        pid, status, used = os.wait3(0)
        book, began = running.pop(pid)
        seconds[book] = time.time() - began, used.ru_utime + used.ru_stime
        if status: failed.append(book)
        print(f'{"FAILED " if status else ""}{book.relative_to(ROOT)}: {seconds[book][0]:.0f} s', flush=True)
    for book, (wall, cpu) in sorted(seconds.items(), key=lambda kv: -kv[1][1])[:12]: print(f'{cpu:6.1f} CPU seconds  {book.name}')
    print(f'{len(seconds) - len(failed)} notebooks ran in {sum(c for _, c in seconds.values()):.0f} CPU seconds' + f', {len(failed)} failed: {", ".join(b.name for b in failed)}'*bool(failed))
    return bool(failed)


if __name__ == '__main__': sys.exit(main())
