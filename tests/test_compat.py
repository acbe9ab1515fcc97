"What version 0.1.0 wrote opens and resumes: a cohort, a stopped run of image and chart, an exported encoder of charts (tests/files/v0.1)."
import json, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mmsn import Cohort, MMSN, open_encoder

FILES = Path(__file__).parent/'files'/'v0.1'


@pytest.fixture
def old(tmp_path, monkeypatch):
    "A copy of the files, and the working directory in it, as the run knew it."
    shutil.copytree(FILES, tmp_path/'v0.1')
    monkeypatch.chdir(tmp_path/'v0.1')
    return tmp_path/'v0.1'


def test_cohort_opens(old):
    cohort = Cohort.open(old/'cohort', verify=True)
    assert cohort.hash == json.loads((old/'run'/'run.json').read_text())['cohort'] and len(cohort) == 80


@pytest.mark.parametrize('name, folder', [('run', 'run/encoder'), ('chart', 'encoder')])
def test_encoder_gives_the_same_features(old, name, folder):
    cohort, wanted = Cohort.open('cohort'), load_file('features.safetensors')
    for model in (MMSN.from_pretrained(folder), open_encoder(folder, cohort)):
        for key, x in model.encode(cohort.batch(range(6), list(model.config.modalities))).items():
            torch.testing.assert_close(x.nan_to_num(-9.), wanted[f'{name}.{key}'], atol=1e-5, rtol=1e-5)


def test_run_resumes(old):
    "From step 4 of 10, along the losses of the run that 0.1.0 did not stop (bits are not promised across processors)."
    subprocess.run([sys.executable, '-m', 'mmsn.train', 'run/config.yaml', 'data.cohort=cohort', 'train.run=run'], check=True, capture_output=True)
    losses = pd.read_csv('run/metrics.csv').set_index('step').loss
    np.testing.assert_allclose(losses, json.loads(Path('expected.json').read_text())['losses'], rtol=1e-4)
