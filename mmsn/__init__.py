"""Labels are scarce in medicine; unlabelled records are not. **mmsn** pretrains one encoder on patients who have chest X-rays, ICU time series, demographics, or any part of these, without labels, and shows honestly, with few labels and beside the baselines, what was learned.

In Python the same way is

```python
from mmsn import prepare, load_config, train, evaluate, open_encoder

cohort = prepare.synthetic('cohorts/first', patients=400, seed=7)  # a cohort
cohort.show(0)                                    # one patient, as a figure
run = train(load_config('demo', ['data.cohort=cohorts/first', 'train.run=runs/first']))
evaluate(run)                                     # tables, and a report
encoder = open_encoder(run, cohort)
features = encoder.encode(cohort.batch(range(16)))
# {'cxr': (16, 96), 'ehr': (16, 128), 'joint': (16, 128)}
```

Each of these names explains itself (`help(prepare.table)`, `help(open_encoder)`), and so does each command (`mmsn-prepare --help`, `mmsn-train --keys`).

Modules:

- `mmsn.config`: YAML files, presets and dotted overrides to one checked `Config`, and back.
- `mmsn.data.loader`: Samples to a batch in one read, and loaders that keep a global order on any number of processes.
- `mmsn.data.timeseries`: From irregular events to an hourly grid: one row an hour, the last value of the hour, what was not measured filled in, and a mask that says so.
- `mmsn.data.writer`: Arrays that grow by blocks, normalisers fitted on training patients, and a folder that is whole or not there.
- `mmsn.evaluate.pairs`: How much two modalities of one patient have in common: measures of retrieval, and what can be reached without pre-training.
- `mmsn.launch`: Before a run and around it: a dry run, the largest batch that fits, trackers, a trace, and options that trade time for memory.
- `mmsn.libraries`: torchvision, timm, transformers and TorchXRayVision: an image network by name, without its last layer, with what it wants to be shown.
- `mmsn.loop`: Batches, views, one forward a step, the optimiser, the target network, and a checkpoint now and then.
- `mmsn.options`: Every option of a run: one frozen dataclass for each part, each field with its default and what it means.
- `mmsn.prepare`: From tables and images, real or synthetic, to a cohort: a function for each source, and the command `mmsn-prepare`.
- `mmsn.run`: The folder of one training: what it is known by, who holds it, its metrics.
- `mmsn.sources`: One door for every encoder: a run, an exported folder, the hub, published weights, and the networks of four libraries.
- `mmsn.testing`: The patients that every notebook meets: a small cohort, a small config, and where open data lie.
- `mmsn.train`: One call, or one command on one process or many, from a config to a run."""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.2.0"
__all__ = ['Cohort', 'MMSN', 'load_config', 'prepare', 'train', 'evaluate', 'open_encoder']
_WHERE = dict(Cohort='data.cohort', MMSN='model', load_config='config', open_encoder='sources')   # the others are modules that can be called


def __getattr__(name):
    if name not in __all__: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'mmsn.{_WHERE[name]}'), name) if name in _WHERE else import_module(f'mmsn.{name}')


def __dir__(): return sorted({*globals(), *__all__})


def callable_module(name:str, function):
    "Let the module `name` be called as `function`: `from mmsn import train` is the module and the function, whichever was imported first."
    if (module := sys.modules.get(name)) is None or name == '__main__': return
    module.__class__ = type('CallableModule', (ModuleType,), dict(__call__=staticmethod(function), __doc__=function.__doc__))
