"Evaluation: what was learned, beside the baselines. The parts are in the notebooks 60 to 66."
from .features import extract_features, feature_matrix, plain_features
from .metrics import bootstrap, difference_table, interval, metric_table
from .probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from .robustness import missing, retrieval, robustness
