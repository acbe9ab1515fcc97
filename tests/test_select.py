"How penalties are chosen within the labels of a draw: the folds against a plain loop over scikit-learn."
from itertools import product

import numpy as np
from fastcore.test import test_close, test_eq
from sklearn.linear_model import LogisticRegression

from mmsn.evaluate import probes
from mmsn.evaluate.probes import STRENGTHS, _design, cross_validated_loss, fit_probe, fit_sgd
from mmsn.evaluate.task import subject_folds

test_close.__test__ = test_eq.__test__ = False


def hard_case(n, d):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))/d**.5
    x[:, -1] = x[:, 0] + x[:, 1]
    x = (x - x.mean(0))/x.std(0)
    y = (x[:, :3] + rng.normal(size=(n, 3)) > .7).astype(float)
    y[:n//3, 1] = np.nan
    return x, y


def test_folds_against_a_loop():
    x, y = hard_case(200, 20)
    x, who, Cs = (x - x.mean(0))/x.std(0), np.arange(200)//2, (1e-3, 1e-2, .1, 1.)
    fold, slow = subject_folds(y, who), np.zeros((3, len(Cs)))
    for k, j, f in product(range(3), range(len(Cs)), range(5)):
        on, out = (fold[:, k] >= 0) & (fold[:, k] != f), fold[:, k] == f
        fit = LogisticRegression(C=Cs[j], tol=1e-10, solver='newton-cholesky').fit(x[on], y[on, k])
        slow[k, j] -= fit.predict_log_proba(x[out])[np.arange(out.sum()), y[out, k].astype(int)].sum()/(fold[:, k] >= 0).sum()
    fast = cross_validated_loss(_design(x)[0], y, Cs, fold)
    test_close(fast[np.isfinite(fast)], slow[np.isfinite(fast)], 2e-3)
    test_eq(fit_probe(x, y, Cs=Cs, folds=5, subjects=who).C, np.array(Cs)[slow.argmin(1)])
    lonely = y.copy(); lonely[np.flatnonzero(y[:, 0] == 1)[1:], 0] = 0
    for fit, options in ((fit_probe, STRENGTHS), (fit_sgd, (.3, 3., 30.))):
        p = fit(x, lonely, folds=5); assert np.isin(p.C, options).all() and np.isfinite(p.weight).all()
        test_eq(fit(x, lonely[:, :1], folds=5).C[0], options[len(options)//2])


def test_labels_in_parts(monkeypatch):
    "Where labels are fitted a few at a time, each is what it is among all."
    x, y = hard_case(300, 12)
    whole = fit_probe(x, y, folds=5)
    monkeypatch.setattr(probes, '_CELLS', 300*5*2)
    test_eq([p.stop - p.start for p in probes._in_parts(300, 3, 5)], [2, 2])
    parts = fit_probe(x, y, folds=5)
    test_eq(parts.C, whole.C)
    test_close(parts.weight, whole.weight, 1e-9)
