"""The README's blocks of Python."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
PYTHON = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
