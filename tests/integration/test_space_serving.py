"""The Space over HTTP, driven by gradio_client: what programs get, what is refused, and a crowd."""

from __future__ import annotations

import threading

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from hf_context_prune.publishing.space.settings import Limits
from tests.support.space_models import HeldStore, serving, settings_of

WAITING = 4


@pytest.fixture(scope="module")
def store():
    return HeldStore()


@pytest.fixture(scope="module")
def url(tiny_space, store):
    limits = Limits(new_tokens=100, prompt_characters=400, waiting=WAITING)
    with serving(settings_of(tiny_space, limits=limits), store) as address:
        yield address


@pytest.fixture
def client(url):
    made = Client(url, verbose=False)
    yield made
    made.close()


def test_a_program_streams_both(client):
    views = list(client.submit("Medicine", "the patient", new_tokens=12, api_name="/compare"))
    last = views[-1]
    assert last["dense"]["tokens"] == last["pruned"]["tokens"] == 12
    assert last["dense"]["model"] == "base"
    assert last["pruned"]["model"] == "variable"
    for side in ("dense", "pruned"):
        assert last[side]["tokens_per_second"] > 0
        assert last[side]["first_token_seconds"] > 0
        assert last[side]["megabytes"] > 0
    assert [view["dense"]["tokens"] for view in views] == sorted(view["dense"]["tokens"] for view in views)
    assert "".join(piece["text"] for piece in last["pieces"]) == "the patient" + last["dense"]["text"]
    assert all({"text", "dense_bits", "pruned_bits"} == piece.keys() for piece in last["pieces"])


def test_what_a_program_leaves_out_is_within_the_limits(tiny_space):
    with serving(settings_of(tiny_space, limits=Limits(new_tokens=5)), HeldStore()) as address:
        last = Client(address, verbose=False).predict("Law", "the court", api_name="/compare")
    assert last["dense"]["tokens"] == 5


def test_one_model_down(client):
    last = client.predict("Lost", "the patient", new_tokens=3, api_name="/compare")
    assert last["dense"]["tokens"] == 3
    assert "does not exist" in last["pruned"]["problem"]


REFUSED = (
    ({"domain": "../../etc"}, "Choose one of the domains"),
    ({"prompt": "x" * 50_000}, "50,000 characters.*at most 400"),
    ({"prompt": ["x"]}, "no text"),
    ({"mode": "__import__"}, "mode"),
    ({"new_tokens": 10**9}, "from 1 to 100"),
    ({"temperature": -1}, "from 0 to 1.5"),
)


def test_what_a_program_may_not_ask(client, subtests):
    for given, message in REFUSED:
        values = {"domain": "Law", "prompt": "the court", "new_tokens": 2} | given
        with subtests.test(message=message), pytest.raises(AppError, match=message):
            client.predict(**values, api_name="/compare")


def test_the_only_way_in(client, url):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/compare"}
    upload = httpx.post(f"{url}/gradio_api/upload", files={"files": ("x.txt", b"12345")})
    assert upload.status_code == 413
    past_the_queue = httpx.post(f"{url}/gradio_api/run/compare", json={"data": ["Law", "x", "Chat", 1, 0]})
    assert past_the_queue.status_code == 404
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=space.yaml", "/monitoring"):
        assert httpx.get(url + path).status_code in (403, 404)


def test_a_crowd_is_turned_away_and_the_page_lives(url, client, store):
    store.hold()
    first = client.submit("Law", "the court", new_tokens=4, api_name="/compare")
    store.waits.acquire(timeout=60)  # it is at its first step, and stays there
    crowd = [client.submit("Law", "the court", new_tokens=4, api_name="/compare") for _ in range(30)]
    turned_away, admitted = [], []

    def outcome(job):
        try:
            admitted.append(job.result(timeout=120))
        except Exception as error:
            turned_away.append(str(error))

    threads = [threading.Thread(target=outcome, args=(job,)) for job in crowd]
    for thread in threads:
        thread.start()
    while len(turned_away) < 30 - WAITING:
        threads[0].join(0.05)
    store.release()
    for thread in threads:
        thread.join(120)
    assert len(admitted) == WAITING
    assert set(turned_away) == {"Queue is full! Please try again."}
    assert first.result(timeout=60)["pruned"]["tokens"] == 4
    assert client.predict("Law", "the court", new_tokens=2, api_name="/compare")["dense"]["tokens"] == 2


def test_a_cancelled_request_stops_between_two_tokens(client, store):
    client.predict("Law", "the court", new_tokens=2, api_name="/compare")
    before = store.steps
    store.hold()
    job = client.submit("Law", "the court", new_tokens=100, api_name="/compare")
    store.run(5)
    cancelling = threading.Thread(target=job.cancel)
    cancelling.start()
    while cancelling.is_alive():  # Gradio answers after the step that is on its way
        store.let(1)
        cancelling.join(0.1)
    store.release()
    client.predict("Law", "the court", new_tokens=2, api_name="/compare")  # its turn comes, so the other one is over
    assert store.steps - before < 150  # of 204
