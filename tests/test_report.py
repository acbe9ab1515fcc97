"The page of a report in a real browser, where there is one: nothing runs, nothing is fetched, nothing sticks out of a phone's screen."
import json, re, shutil, subprocess

import numpy as np, pandas as pd, pytest

from mmsn.evaluate.report import write_report

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FRAME = '''<!DOCTYPE html><meta charset="utf-8"><iframe src="report/report.html" width="{width}" height="900" style="border: 0"></iframe><p id="found"></p><script>
document.querySelector('iframe').onload = e => {{ const d = e.target.contentDocument, r = d.documentElement
  document.getElementById('found').textContent = JSON.stringify({{width: r.clientWidth, content: r.scrollWidth, images: [...d.images].map(i => i.naturalWidth), scripts: d.scripts.length}}) }}
</script>'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A report of invented numbers with wide tables and a figure of several panels."
    report = tmp_path_factory.mktemp('page')/'report'
    report.mkdir()
    rng = np.random.default_rng(0)
    rows = [dict(encoder=e, input=i, fraction=f, shots=0, draws=5, deviation=.01, auroc=a, low=a - .02, high=a + .02)
            for e in ('pretrained', 'random', 'scratch', 'plain') for i in ('joint', 'cxr', 'ehr') for f in (.01, .05, .1, 1.) for a in [rng.uniform(.6, .9)]]
    pd.DataFrame(rows).to_csv(report/'summary.csv', index=False)
    labels = [dict(encoder=r['encoder'], input=r['input'], label=f'a diagnosis of a long name, number {k}', metric=m, value=r['auroc'], rows=100, labels=1, positives=9 + k)
              for r in rows if r['fraction'] == 1 for k in range(25) for m in ('auroc', 'auprc')]
    pd.DataFrame(labels).to_csv(report/'labels.csv', index=False)
    (report/'about.json').write_text(json.dumps(dict(name='page', sentence='Invented.', inputs=['joint', 'cxr', 'ehr'], prototypes=8, facts=dict(evaluation='mmsn-evaluate ' + 'a-long-path/'*20))))
    write_report(report)
    return report.parent


@pytest.mark.skipif(not BROWSER, reason='no Chromium here')
@pytest.mark.parametrize('width', [390, 1280])
def test_fits_the_screen(folder, tmp_path, width):
    (folder/'frame.html').write_text(FRAME.format(width=width))
    quiet = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run', f'--user-data-dir={tmp_path}']
    done = subprocess.run([BROWSER, *quiet, '--allow-file-access-from-files', '--virtual-time-budget=5000', '--enable-logging=stderr', '--window-size=1400,1000', '--dump-dom', (folder/'frame.html').as_uri()],
                          capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<p id="found">(.*?)</p>', done.stdout)[1])
    assert found['content'] <= found['width'] <= width, found
    assert found['scripts'] == 0 and found['images'] and all(found['images'])
    assert 'CONSOLE' not in done.stderr, done.stderr


def test_nothing_is_fetched(folder):
    text = (folder/'report'/'report.html').read_text()
    assert not re.findall(r'<(?:script|iframe|object|link rel="style)|(?:src|href|srcset)="(?!data:|#)|url\(|@import', text)
