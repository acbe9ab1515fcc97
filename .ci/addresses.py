"""Says in pyproject.toml and _quarto.yml where a rendered site and its source are: `python .ci/addresses.py OWNER/REPOSITORY`.

The project itself names no host. The workflow that renders the site knows one, and runs this before: 'source' beside each function then leads
to its line, and 'Source' in the navigation to the repository."""
import re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_urls(pyproject, owner, name):
    "The text of pyproject.toml with addresses, once."
    if '[project.urls]' in pyproject: return pyproject
    urls = f'[project.urls]\nRepository = "https://github.com/{owner}/{name}"\nDocumentation = "https://{owner}.github.io/{name}"\n\n'
    return pyproject.replace('[tool.nbdev]', urls + '[tool.nbdev]', 1)


def with_source(quarto, owner, name):
    "The text of _quarto.yml whose entry 'Source' leads to the repository."
    return re.sub(r'(- text: Source\n\s+href: )\S+', rf'\g<1>https://github.com/{owner}/{name}', quarto, count=1)


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].count('/') != 1: raise SystemExit(__doc__)
    for file, change in (('pyproject.toml', with_urls), ('_quarto.yml', with_source)):
        path = ROOT/file
        path.write_text(change(path.read_text(encoding='utf-8'), *sys.argv[1].split('/')), encoding='utf-8')
