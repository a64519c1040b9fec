"""Jobs over HTTP: accepted, watched, cancelled, and forgotten with their user."""

import contextlib
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from servers import Served

TEXTS = ["the sea is wide", "the sea is deep", "we sail today"]


def finished(served: "Served", location: str) -> dict[str, Any]:
    last = ""
    with httpx.stream("GET", f"{served.base}{location}/events", timeout=60) as response:
        for line in response.iter_lines():
            last = line if line.startswith("data:") else last
    result: dict[str, Any] = httpx.get(f"{served.base}{location}").json()
    assert result["status"] in last
    return result


@pytest.mark.slow
def test_training_is_accepted_and_done(served: "Served") -> None:
    users = f"{served.base}/v1/users"
    body = {"texts": TEXTS, "train": {"steps": 3, "num_slots": 2}, "keep_texts": True}
    response = httpx.put(f"{users}/eva", json=body)
    assert response.status_code == 202
    assert response.json()["status"] in ("queued", "running")
    job = finished(served, response.headers["Location"])
    assert (job["status"], job["version"], job["user"]) == ("succeeded", 1, "eva")
    listed = httpx.get(f"{served.base}/v1/jobs", params={"user": "eva"}).json()["jobs"]
    assert [entry["id"] for entry in listed] == [job["id"]]
    assert httpx.get(f"{users}/eva").json()["versions"][0]["num_slots"] == 2
    feedback = {"user": "eva", "prompt": "Hi", "chosen": "hello", "rejected": "Sir"}
    for prompt in ("Hi", "Ho", "He"):
        httpx.post(f"{served.base}/v1/feedback", json={**feedback, "prompt": prompt})
    response = httpx.post(f"{users}/eva/learn", json={"steps": 2})
    assert finished(served, response.headers["Location"])["version"] == 2
    httpx.delete(f"{users}/eva")
    assert httpx.get(f"{served.base}/v1/jobs/{job['id']}").status_code == 404
    assert httpx.get(f"{served.base}/v1/jobs", params={"user": "eva"}).json() == {"jobs": []}


def test_mistakes_of_clients_are_answered(served: "Served") -> None:
    users = f"{served.base}/v1/users"
    for body, words in (
        ({"texts": ["x"], "train": {"steps": 0}}, "steps"),
        ({"texts": ["x"], "train": {"epochs": 3}}, "epochs"),
        ({"texts": ["x"], "train": {}, "refine": True}, "refine"),
    ):
        response = httpx.put(f"{users}/eva", json=body)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
    assert httpx.get(f"{served.base}/v1/jobs/none").status_code == 404
    assert httpx.delete(f"{served.base}/v1/jobs/none").status_code == 404


@pytest.mark.slow
def test_jobs_that_cannot_do_anything_are_refused_at_once(served: "Served") -> None:
    answer = httpx.post(f"{served.base}/v1/users/nobody/learn", json={})
    assert answer.status_code == 400
    assert "/v1/feedback" in answer.json()["error"]["message"]
    body = {"texts": ["a"], "train": {"as_codes": True}}
    answer = httpx.put(f"{served.base}/v1/users/bo", json=body)
    assert answer.status_code == 400
    assert "is for a decoder" in answer.json()["error"]["message"]
    for change in ({"as_codes": True}, {"num_slots": 2}):
        fields = {"texts": ["mine"], "keep_texts": True, "train": change, "guard": True}
        assert httpx.put(f"{served.base}/v1/users/bo", json=fields).status_code == 400
    assert httpx.delete(f"{served.base}/v1/users/bo").status_code == 404  # nothing was kept
    accepted = httpx.put(
        f"{served.base}/v1/users/kept",
        json={"texts": ["mine"], "keep_texts": True, "train": {"steps": 1}},
    )
    assert accepted.status_code == 202
    finished(served, accepted.headers["Location"])
    assert served.gateway._tenants._store.for_tenant("mine").user_texts("kept") == ["mine"]


@pytest.mark.slow
def test_a_tenant_watches_a_few_jobs_at_a_time(served: "Served") -> None:
    body = {"texts": TEXTS, "train": {"steps": 200, "num_slots": 2}}
    job = httpx.put(f"{served.base}/v1/users/zoe", json=body).json()["id"]
    address = f"{served.base}/v1/jobs/{job}/events"
    with httpx.Client(timeout=60) as client, contextlib.ExitStack() as streams:
        for _ in range(16):
            stream = streams.enter_context(client.stream("GET", address))
            assert stream.status_code == 200
        assert client.get(address).status_code == 503
    httpx.delete(f"{served.base}/v1/jobs/{job}")
    deadline = time.monotonic() + 30
    while httpx.get(address).status_code == 503:  # until the server has seen them end
        assert time.monotonic() < deadline
        time.sleep(0.1)
    httpx.delete(f"{served.base}/v1/users/zoe")
