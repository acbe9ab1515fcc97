"Evaluation: what was learned, beside the baselines. The parts are in the notebooks 60 to 66."
from .features import any_encoder, block_features, extract_features, feature_matrix, fingerprint, plain_features
from .metrics import (Calibration, Predictions, Ranking, bootstrap, compare, difference_table, ensemble, interval, metric_table, open_predictions,
                      paired_difference, reliability_curve, save_predictions, subgroup_columns, subgroups)
from .probes import Task, draw_rows, finetune, fit_probe, fit_sgd, knn, linear_probe, low_shot, make_draws, probe_solver, summarise, supervised
from .robustness import CORRUPTIONS, Corruption, missing, retrieval, robustness
