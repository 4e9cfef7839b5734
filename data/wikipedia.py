"""wikipedia: 98 articles of the English Wikipedia (2.8 MB of text), from a real dump of 2016.

The Python package gensim carries this piece of a dump among its tests: 206 pages, the rest are
redirects and disambiguation pages. Wikipedia's text is by its authors under CC BY-SA
(creativecommons.org/licenses/by-sa/4.0); name them if you publish what you make of it.

    python data/wikipedia.py        prints where the file is, and where the whole of it is
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from nanochat import InputError
from nanochat.runtime import run_as_script

FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def prepare() -> Path:
    """The path of the dump; corpus.prepare reads it as it is."""
    package = find_spec("gensim")  # found, not imported: importing it takes seconds
    path = Path(package.submodule_search_locations[0]) / FILE if package else None
    if path is None or not path.exists():  # gensim below 4.0 has no such file
        raise InputError('wikipedia is not installed: pip install -c constraints.txt -e ".[sample]"')
    return path


def main() -> None:
    """Print where the sample is, under which licence, and where to find more."""
    print(prepare())
    print("licence: CC BY-SA, the authors of Wikipedia")
    print("whole dumps: https://dumps.wikimedia.org/enwiki/latest/enwiki-latest-pages-articles.xml.bz2")
    print("(22 GB; other languages: zhwiki, dewiki, …); give the URL or the file to train.py --data")


if __name__ == "__main__":
    run_as_script(main)
