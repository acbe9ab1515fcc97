"""Links, anchors, pictures and their words over a rendered site: `python .ci/check_pages.py _docs`. The rules are those of tests/test_site_links.py."""
import json, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from bs4 import BeautifulSoup
from test_site_links import faults_of

root = Path(sys.argv[1])
pages = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(root.rglob('*.html')) if not {'site_libs', 'gallery'} & set(p.relative_to(root).parts)}
faults = faults_of(root, pages)
print(f'{len(pages)} pages', json.dumps(faults, indent=1) if faults else 'without a fault')
raise SystemExit(1 if faults or not pages else 0)
