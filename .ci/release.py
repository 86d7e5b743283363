"""One wheel and one sdist to publish, with what a user needs to trust them: make release-wheel.

    dist/*.whl                manylinux_2_28, by auditwheel, whose symbols and abi3 are audited
    dist/*.tar.gz             the sdist, which a wheel has been built from
    dist/SHA256SUMS           of both
    dist/*.cdx.json           a CycloneDX bill of materials: what lies in the binary, and what it needs

Each is built twice and must come out the same, byte for byte: SOURCE_DATE_EPOCH is the last commit's date.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
GLIBC = os.environ.get("CWCLIP_GLIBC", "2.28")
PYTHON = sys.executable


def main() -> None:
    epoch = output("git", "log", "-1", "--format=%ct")
    os.environ.update(SOURCE_DATE_EPOCH=epoch, CWCLIP_GLIBC=GLIBC, PYTHONHASHSEED="0")
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    sdist = twice("the sdist", build_sdist)
    wheel = twice("the wheel", lambda folder: build_wheel(sdist, folder))
    run(PYTHON, "-m", "abi3audit", "--strict", wheel)
    check_symbols(wheel)
    shown = output(PYTHON, "-m", "auditwheel", "show", wheel)
    print("\n".join(line for line in shown.splitlines() if "manylinux" in line or "glibc" in line.lower()))
    bill_of_materials(wheel)
    files = sorted(path for path in DIST.iterdir() if path.is_file())
    (DIST / "SHA256SUMS").write_text("".join(f"{digest(path)}  {path.name}\n" for path in files))
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size:>12,} bytes  dist/{path.name}")


def twice(what: str, build: object) -> Path:
    """Builds it in two folders, compares, and keeps one."""
    made = []
    for _ in range(2):
        folder = Path(tempfile.mkdtemp())
        made.append(build(folder))
    if digest(made[0]) != digest(made[1]):
        sys.exit(f"{what} came out otherwise the second time: compare {made[0]} and {made[1]}")
    print(f"{what}: the same bytes twice", flush=True)
    return Path(shutil.move(made[0], DIST / made[0].name))


def build_sdist(folder: Path) -> Path:
    """From a clean copy of what is committed, so that nothing else gets into it."""
    copy = checkout(folder)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(folder)!r}))"
    run(PYTHON, "-c", code, cwd=copy, env={**os.environ, "CWCLIP_BUILD": "none"})
    (made,) = folder.glob("*.tar.gz")
    return repacked(made)


def repacked(sdist: Path) -> Path:
    """The same with one date and no owner: setuptools writes those of the moment."""
    plain = sdist.with_suffix("")
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with tarfile.open(sdist) as old, tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    subprocess.run(["gzip", "--no-name", "--force", "-9", plain], check=True)
    return sdist


def checkout(folder: Path) -> Path:
    """What is committed, alone."""
    copy = folder / "source"
    copy.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", copy], input=archive.stdout, check=True)
    return copy


def build_wheel(sdist: Path, folder: Path) -> Path:
    """From the sdist, always at one path: nvcc writes paths into its objects."""
    source = Path(tempfile.gettempdir()) / "cwclip_release"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (unpacked,) = source.iterdir()
    raw = folder / "raw"
    pip = [PYTHON, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", raw, unpacked]
    run(*pip)
    (made,) = raw.glob("*.whl")
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{os.uname().machine}"
    run(PYTHON, "-m", "auditwheel", "repair", "--plat", platform, "--exclude", "libtorch_cpu.so", "-w", folder, made)
    shutil.rmtree(source)
    (repaired,) = folder.glob("*.whl")
    return repaired


def check_symbols(wheel: Path) -> None:
    """Every symbol that has to be found is of a versioned library, Python or torch; auditwheel sees versions alone.

    What only a newer glibc has would be left over otherwise, and found missing on old nodes.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".so"))
        listed = output("nm", "-D", "--undefined-only", archive.extract(name, folder))
    strong = [line.split()[1] for line in listed.splitlines() if line.split()[0] == "U"]
    left = [name for name in strong if "@" not in name and not re.match("_?Py|torch_|aoti_torch_", name)]
    if left:
        sys.exit(f"symbols of nobody's: {', '.join(left)}")


def bill_of_materials(wheel: Path) -> None:
    """CycloneDX 1.6: the wheel, what is linked into its binary, and what it needs at run time."""
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith("METADATA"))
        needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", archive.read(name).decode(), re.M)
    compiler = os.environ.get("CXX", "g++").split()[0]
    linked = [("libstdc++", output(compiler, "-dumpfullversion"), "GPL-3.0-only WITH GCC-exception-3.1")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None and os.environ.get("CWCLIP_BUILD", "auto") in ("auto", "cuda"):
        linked.append(("cudart", re.search(r"V(\S+)", output(nvcc, "--version"))[1], "LicenseRef-NVIDIA-CUDA-EULA"))
    components = [
        {"type": "library", "name": each, "version": found, "licenses": [{"expression": terms}]}
        for each, found, terms in linked
    ]
    components += [{"type": "library", "name": each, "scope": "required"} for each in needed]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": "cwclip_kernels",
                "name": "cwclip_kernels",
                "version": version,
                "licenses": [{"license": {"id": "MIT"}}],
                "hashes": [{"alg": "SHA-256", "content": digest(wheel)}],
            }
        },
        "components": components,
    }
    (DIST / f"cwclip_kernels-{version}.cdx.json").write_text(json.dumps(bill, indent=2) + "\n")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def output(*command: object) -> str:
    return subprocess.check_output(list(map(str, command)), cwd=ROOT, text=True).strip()


def run(*command: object, **options: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
