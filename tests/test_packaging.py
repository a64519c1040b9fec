"""What is installed is what is here: the wheel, used outside the checkout."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def run(code: str, *, cwd: Path, path: Path | None = None) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    result = {"controlprefix"}
    for folder in ("controlprefix", "attributes", "store"):
        base = "controlprefix" if folder == "controlprefix" else f"controlprefix.{folder}"
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            result.add(".".join([base, *inner]))
    assert sorted(listed) == sorted(result)


def test_the_links_lead_to_the_folders_at_the_root() -> None:
    for name in ("attributes", "store"):
        link = ROOT / "controlprefix" / name
        if not link.is_symlink():
            pytest.skip("this checkout has no links; the build mapping does without")
        assert link.resolve() == ROOT / name


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    left_behind = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "*.db")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_behind)  # the build writes here
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(installed), str(wheel)],
        check=True,
        capture_output=True,
    )
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {
        "bin",
        "controlprefix",
    }
    code = """
import controlprefix, controlprefix.store, controlprefix.attributes, importlib.util
from controlprefix import ControlPrefix, Geometry, Prefix
from controlprefix.store import NewVersion, PrefixKey, PrefixStore, upgrade
assert upgrade("sqlite:///prefixes.db")[0] is None  # the migrations are in the wheel
geometry = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4)
with PrefixStore("sqlite:///prefixes.db") as store:
    prefix = Prefix.random(geometry, num_slots=3)
    store.put([NewVersion(PrefixKey("user", "ana"), prefix)])
    assert store.for_model("").get(PrefixKey("user", "ana")).value.num_slots == 3
assert importlib.util.find_spec("store") is None and importlib.util.find_spec("attributes") is None
print(controlprefix.__file__)
"""
    assert Path(run(code, cwd=tmp_path, path=installed)).is_relative_to(installed)
    assert (installed / "controlprefix" / "py.typed").is_file()
    assert (installed / "controlprefix" / "serving" / "playground" / "users.js").is_file()
    demo_data = installed / "controlprefix" / "cli" / "demo_data"
    assert {path.name for path in demo_data.iterdir()} == {
        path.name for path in (ROOT / "controlprefix" / "cli" / "demo_data").iterdir()
    }


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys, controlprefix, controlprefix.cli
heavy = {"torch", "transformers", "sqlalchemy", "sentence_transformers", "accelerate"}
print(sorted(heavy & set(sys.modules)))
"""
    assert run(code, cwd=tmp_path) == "[]"


@pytest.mark.slow
def test_using_the_engine_does_not_load_sentence_transformers(tmp_path: Path) -> None:
    code = "import sys, controlprefix.engine; print('sentence_transformers' in sys.modules)"
    assert run(code, cwd=tmp_path) == "False"


def test_all_public_names_can_be_imported() -> None:
    import controlprefix

    for name in controlprefix.__all__:
        assert getattr(controlprefix, name).__doc__
    assert sorted(controlprefix.__all__) == controlprefix.__all__ == dir(controlprefix)
    with pytest.raises(AttributeError, match="has no attribute 'Controlprefix'"):
        controlprefix.Controlprefix  # noqa: B018


def test_the_images_packages_are_those_tested_with_hashes() -> None:
    text = (ROOT / "deploy" / "requirements.txt").read_text().replace("\\\n", " ")
    locked = {}
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", value) for value in hashes), line
        name, _, version = requirement.strip().partition("==")
        locked[canonicalize_name(name)] = version
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    tested = {canonicalize_name(name): version for name, version in constraints.items()}
    assert {name: tested[name] for name in locked.keys() & tested.keys()} == {
        name: locked[name] for name in locked.keys() & tested.keys()
    }
    assert "torch" not in locked  # the image installs the build for CPUs first
    extras = {"demo", "embeddings", "encryption", "postgres", "serve", "vllm"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"]]
    for extra in extras:
        needed += project["optional-dependencies"][extra]
    for name in {Requirement(line).name for line in needed} - {"torch", "controlprefix"}:
        assert canonicalize_name(name) in locked, f"{name}: run make lock"
