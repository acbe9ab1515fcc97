"""Evaluation: what an encoder has learned, beside its baselines. `mmsn.evaluate(run)` does all of it; the parts are the modules below."""
from importlib import import_module

from mmsn import callable_module

_WHERE = {name: module for module, names in dict(
    evaluation='evaluate', compare='evaluate_runs', features='block_features channel_recall extract_features feature_matrix fingerprint plain_baselines plain_features',
    metrics='Calibration Ranking bootstrap difference_table interval metric_table reliability_curve subgroup_columns subgroups',
    predictions='Predictions compare ensemble open_predictions paired_difference save_predictions', task='Task draw_rows make_draws',
    probes='fit_probe fit_sgd knn linear_probe low_shot probe_solver summarise', networks='finetune supervised',
    pairs='fit_cca label_agreement placements references', robustness='CORRUPTIONS Corruption missing retrieval robustness').items() for name in names.split()}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_WHERE[name]}'), name)


def __dir__(): return sorted({*globals(), *__all__})


def _evaluate(source, *args, **options):
    from .evaluation import evaluate
    return evaluate(source, *args, **options)


callable_module(__name__, _evaluate)
