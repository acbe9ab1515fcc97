"""Self-supervised pre-training for patients with several kinds of data at once, by masked siamese networks.

    from mmsn import prepare, load_config, train, evaluate, open_encoder
    cohort = prepare.synthetic('cohorts/first', patients=400)
    run = train(load_config('demo', ['data.cohort=cohorts/first', 'train.run=runs/first']))
    evaluate(run)

Everything is loaded when it is first asked for: `import mmsn` is quick and needs no torch.
"""
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"
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
