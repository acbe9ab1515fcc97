

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness

# %% ../../nbs/66_evaluate.ipynb #e0f384ad
from mmsn.evaluate.features import extract_features, feature_matrix, plain_features
from mmsn.evaluate.metrics import bootstrap, difference_table, interval, metric_table
from mmsn.evaluate.probes import Task, draw_rows, finetune, knn, linear_probe, low_shot, make_draws, summarise, supervised
from mmsn.evaluate.robustness import missing, retrieval, robustness