"""The blocks of Python in the README and in docs/."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
# What a person reads; docs/api.md lists names alone.
PAGES = [README, *(page for page in sorted(DOCS.glob("*.md")) if page.name != "api.md")]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
