"""Which files of a package import which, read from their source: for types alone or not, anywhere in a file."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path


def files_of(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py*") if path.suffix in (".py", ".pyi"))


def name_of(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").as_posix()


def imports_of(path: Path, package: Path) -> set[str]:
    """The package's own files that a file imports."""
    found = set()
    for folder, name in _imported(path, package):
        places = [folder / f"{name}.py", folder / f"{name}.pyi", folder / name / "__init__.py"] if name else []
        places += [folder.with_suffix(".py"), folder.with_suffix(".pyi"), folder / "__init__.py"]
        found.add(name_of(next(place for place in places if place.is_file()), package))
    return found


def _imported(path: Path, package: Path) -> Iterator[tuple[Path, str]]:
    """A folder or module, and what is taken from it: ``from .core import plan`` is (core, plan)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
            base = package.parent.joinpath(*(node.module or "").split("."))
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            yield from ((package.parent.joinpath(*parts), "") for parts in modules if parts[0] == package.name)


def faults_of(path: Path, package: Path, order: Sequence[str]) -> list[str]:
    """What a file imports that isn't above it in this list, or that it isn't in the list itself.

    An ``__init__`` that imports nothing need not be.
    """
    name, imports = name_of(path, package), imports_of(path, package)
    if name not in order:
        return [] if path.name == "__init__.py" and not imports else [f"{name} is not in the list"]
    above = order[: order.index(name)]
    return [f"{name} may not import {other}" for other in sorted(imports) if other not in above]
