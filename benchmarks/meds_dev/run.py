"mmsn for MEDS-DEV: `pretrain` on unlabelled windows, `train` a probe for a task, `predict` a split."
import argparse, json, shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegressionCV

from mmsn import Cohort, load_config, open_encoder, prepare, train
from mmsn.evaluate.features import extract_features, feature_matrix

SPLITS = dict(train='train', tuning='val', held_out='test')


def events(con, dataset):
    "The views `events` (of the data set) and `known` (subjects of train and tuning)."
    con.execute(f"create view events as select subject_id, time, code, numeric_value as x from read_parquet('{dataset}/data/**/*.parquet', union_by_name=true)")
    splits = Path(dataset)/'metadata'/'subject_splits.parquet'
    if splits.is_file(): con.execute(f"create view known as select subject_id, split from read_parquet('{splits}') where split in ('train', 'tuning')")
    else: con.execute("create view known as select distinct subject_id, 'train' as split from events")


def draft_codes(con, path, most=100):
    "The commonest numeric codes of the training subjects, with limits and normal values."
    table = con.execute(f"""select code, code as channel, quantile_cont(x, .001) as low, quantile_cont(x, .999) as high, median(x) as normal
        from events join known using (subject_id) where split = 'train' and x is not null and isfinite(x) and time is not null and code not like '%*'
        group by code having min(x) < max(x) order by count(distinct subject_id) desc, code limit {most}""").df()
    table.to_csv(path, index=False)
    return len(table)


def draw_windows(con, path, seed=0, each=3):
    "Prediction times without labels: `each` moments of every subject of train and tuning."
    times = con.execute('select distinct subject_id, time from events join known using (subject_id) where x is not null and time is not null order by all').df()
    drawn = times.sample(frac=1, random_state=seed).groupby('subject_id').head(each).sort_values(['subject_id', 'time'])
    drawn = drawn.rename(columns=dict(time='prediction_time')).assign(boolean_value=pd.array([None]*len(drawn), 'boolean'))
    drawn.to_parquet(path, index=False)


def pretrain(dataset, out, demo):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as con:
        events(con, dataset)
        if not draft_codes(con, out/'codes.csv'): raise SystemExit('no numeric code in the training split')
        draw_windows(con, out/'unlabelled.parquet')
    prepare.meds(dataset, out/'codes.csv', out/'cohort', labels=[str(out/'unlabelled.parquet')], overwrite=True)
    more = ['optim.epochs=2', 'optim.batch_size=16', 'train.probe_every=0'] if demo else []
    train(load_config('table', [f'data.cohort={out}/cohort', f'train.run={out}/run', *more]))


def fit(dataset, labels, pretrained, out):
    out, pretrained = Path(out), Path(pretrained)
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(map(str, Path(labels).rglob('*.parquet')))
    table = pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)[['subject_id', 'prediction_time', 'boolean_value']]
    table.to_parquet(out/'task.parquet', index=False)
    cohort = prepare.meds(dataset, pretrained/'codes.csv', out/'cohort', labels=[str(out/'task.parquet')], overwrite=True)
    shutil.copytree(pretrained/'run'/'encoder', out/'encoder', dirs_exist_ok=True)
    X, at = embeddings(cohort, out)
    y, split = cohort.label_matrix(['task'], at)[:, 0], cohort.samples.split.to_numpy()[at]
    on = (split == 'train') & ~np.isnan(y)
    if len(set(y[on])) < 2: raise SystemExit('the training split of this task has one class only')
    mean, std = X[on].mean(0), X[on].std(0) + 1e-6
    folds = int(min(5, np.bincount(y[on].astype(int)).min()))
    if folds < 2: raise SystemExit('the training split of this task has one sample of a class')
    probe = LogisticRegressionCV(Cs=np.logspace(-4, 1, 8), cv=folds, scoring='neg_log_loss', max_iter=2000).fit((X[on] - mean)/std, y[on])
    np.savez(out/'probe.npz', mean=mean, std=std, weight=probe.coef_[0], bias=probe.intercept_)
    (out/'about.json').write_text(json.dumps(dict(prevalence=float(y[on].mean()))))


def embeddings(cohort, folder):
    "(n, d) joint embeddings, and the rows of the samples that have any measurement."
    at = np.flatnonzero(cohort.present('ehr'))
    return feature_matrix(extract_features(open_encoder(Path(folder)/'encoder', cohort), cohort, at), 'joint'), at


def predict(trained, split, out):
    trained, out = Path(trained), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cohort, prevalence = Cohort.open(trained/'cohort'), json.loads((trained/'about.json').read_text())['prevalence']
    X, at = embeddings(cohort, trained)
    with np.load(trained/'probe.npz', allow_pickle=False) as p: logit = ((X - p['mean'])/p['std'])@p['weight'] + p['bias']
    likely = np.full(len(cohort), prevalence)
    likely[at] = 1/(1 + np.exp(-logit))
    asked = pd.read_parquet(trained/'task.parquet').drop_duplicates(['subject_id', 'prediction_time'])
    s = cohort.samples.assign(predicted_boolean_probability=likely, prediction_time=cohort.samples.window_end)
    t = s[s.split == SPLITS.get(split, split)].merge(asked, on=['subject_id', 'prediction_time'])
    t = t[t.boolean_value.notna()].assign(predicted_boolean_value=lambda t: t.predicted_boolean_probability >= .5)
    t = t[['subject_id', 'prediction_time', 'boolean_value', 'predicted_boolean_value', 'predicted_boolean_probability']]
    t.astype(dict(subject_id='int64', prediction_time='datetime64[us]', boolean_value=bool)).to_parquet(out/'predictions.parquet', index=False)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    sub = p.add_subparsers(dest='step', required=True)
    yes = lambda word: str(word).lower() in ('true', '1', 'yes')
    for step, words in (('pretrain', ('dataset', 'out')), ('train', ('dataset', 'labels', 'pretrained', 'out')), ('predict', ('trained', 'split', 'out'))):
        q = sub.add_parser(step)
        for w in words: q.add_argument(f'--{w}', required=True)
        if step == 'pretrain': q.add_argument('--demo', type=yes, default=False)
    a = vars(p.parse_args(argv))
    dict(pretrain=pretrain, train=fit, predict=predict)[a.pop('step')](**a)


if __name__ == '__main__': main()
