"Reads settings.ini, the one source of packaging metadata, for the fields that pyproject.toml declares dynamic."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def lines(key): return [line.strip() for line in cfg[key].splitlines() if line.strip()]


setup(
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    keywords=[word.strip() for word in cfg['keywords'].split(',')],
    install_requires=lines('requirements'),
    extras_require=dict(
        dev=lines('dev_requirements'),
        maps=['umap-learn'],
        trackers=['tensorboard', 'trackio', 'wandb', 'mlflow'],
        vision=['transformers', 'timm'],
        xrv=['torchxrayvision'],
        text=['transformers'],
        slurm=['submitit'],
        dicom=['pydicom>=3'],
        onnx=['onnx>=1.16', 'onnxruntime>=1.18'],
    ),
    packages=find_packages(include=['mmsn', 'mmsn.*']),
    package_data={'mmsn': ['presets/*.yaml', 'accelerate_configs/*.yaml', 'data/mimic/icd.csv.gz']},
    entry_points=dict(console_scripts=lines('console_scripts'), nbdev=['mmsn=mmsn._modidx:d']),
)
