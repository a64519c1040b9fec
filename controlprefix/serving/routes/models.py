"""Routes of models, attributes and classification."""

from fastapi import APIRouter
from pydantic import BaseModel

from controlprefix.attributes import Label
from controlprefix.errors import ModelNotFoundError
from controlprefix.serving.bodies import ClassifyBody
from controlprefix.serving.dependencies import ClientDependency, ServerDependency, TenantRoute
from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client

router = APIRouter(prefix="/v1", tags=["models"], route_class=TenantRoute)

_MAX_LISTED = 1000


class ModelEntry(BaseModel):
    """The model, or the model with a task."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str
    has_chat_template: bool
    """Whether it takes messages; else prompts, as /v1/completions does."""


class ModelList(BaseModel):
    """The model, and the model with each task of the tenant (the first thousand)."""

    object: str = "list"
    data: list[ModelEntry]


class LabelEntry(Label):
    """A label that has a prefix."""

    has_dial: bool = False
    """Whether it is calibrated: a request with `calibrated` gives a position of its dial."""


class AttributeEntry(BaseModel):
    """The labels of an attribute that have a prefix."""

    labels: dict[str, LabelEntry]
    opposites: tuple[str, str] | None = None
    """The labels at -1 and at 1, if a request may give a number between them instead."""


class AttributeList(BaseModel):
    """Attributes by name."""

    attributes: dict[str, AttributeEntry]


class Classification(BaseModel):
    """Per text, the probability of each label by attribute."""

    results: list[dict[str, dict[str, float]]]


@router.get("/models")
async def list_models(client: ClientDependency, server: ServerDependency) -> ModelList:
    """The model, and the model with each task of the tenant."""
    return await server.work_pools.run_with_store(_models, client, server)


@router.get("/models/{name:path}")
async def get_model(name: str, client: ClientDependency, server: ServerDependency) -> ModelEntry:
    """The model, or the model with a task, by name."""
    task = name.removeprefix(f"{server.name}/")  # the model's name may contain slashes
    is_here = name == server.name or (
        task != name and await server.work_pools.run_with_store(client.cp.exists, "task", task)
    )
    if not is_here:
        raise ModelNotFoundError(
            f"no model {name[:80]!r} here; there is {server.name!r}, and its tasks as "
            f"{server.name}/<task>: see /v1/models"
        )
    return _entry(name, client, server)


@router.get("/attributes")
async def list_attributes(client: ClientDependency, server: ServerDependency) -> AttributeList:
    """The attributes and labels that have a prefix, with their descriptions."""
    stored = await server.work_pools.run_with_store(client.cp.store.prefixes, "attribute")
    attributes: dict[str, AttributeEntry] = {}
    space = client.cp.attributes
    described = space.keys() if space else set()
    for info in stored:
        if info.fingerprint != server.fingerprint:
            continue
        key, label = info.key, LabelEntry(has_dial="calibrated" in info.current.details)
        if space is not None and key in described:
            in_space = space.attributes[key.attribute].labels[key.label]
            label = label.model_copy(update=in_space.model_dump())
        attributes.setdefault(key.attribute, AttributeEntry(labels={})).labels[key.label] = label
    for name, entry in attributes.items():
        poles = space.attributes[name].poles if space and name in space.attributes else None
        if poles and set(poles) <= entry.labels.keys():
            entry.opposites = (poles[1], poles[0])
    return AttributeList(attributes=attributes)


@router.post("/classify")
async def classify(
    body: ClassifyBody, client: ClientDependency, server: ServerDependency
) -> Classification:
    """The probabilities of labels for texts, by the server's attribute classifiers, if any."""

    def results() -> list[dict[str, dict[str, float]]]:
        rows: list[dict[str, dict[str, float]]] = [{} for _ in body.texts]
        for classifier in server.classifiers:
            probabilities = classifier.probabilities(body.texts).tolist()
            for row, values in zip(rows, probabilities, strict=True):
                row[classifier.attribute] = dict(zip(classifier.labels, values, strict=True))
        return rows

    return Classification(results=await server.work_pools.run_with_model(client.tenant, results))


def _models(client: Client, server: Server) -> ModelList:
    tasks = client.cp.names("task", limit=_MAX_LISTED)
    names = [server.name, *(f"{server.name}/{task}" for task in tasks)]
    return ModelList(data=[_entry(name, client, server) for name in names])


def _entry(name: str, client: Client, server: Server) -> ModelEntry:
    return ModelEntry(id=name, owned_by=client.tenant, has_chat_template=server.has_chat_template)
