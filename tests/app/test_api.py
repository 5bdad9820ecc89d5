"""What programs may call, through Gradio's own client and by plain HTTP."""

from __future__ import annotations

import own_code
import pytest
import yaml
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.app.runs import until


@pytest.fixture(scope="module")
def client(site) -> Client:
    # Its own 5 seconds are few where other tests use the machine too.
    return Client(site.url, verbose=False, httpx_kwargs={"timeout": 120})


@pytest.fixture(scope="module")
def recipe(client) -> str:
    return client.predict(api_name="/recipes")["forkme"].replace(
        "data.jsonl", "package:demo/instructions.jsonl"
    )


def test_the_endpoints_are_these_and_no_others(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {
        f"/{name}" for name in ("recipes", "check", "start", "runs", "status", "metrics", "stop")
    }


def test_a_run_from_start_to_stop(client, recipe):
    # German, since the German home page of the same server lists it.
    run = client.predict(recipe, "Testlauf", api_name="/start")
    assert {"run": run, "name": "Testlauf"}.items() <= client.predict(api_name="/runs")[0].items()
    wait_for(client, run, "running")
    client.predict(run, api_name="/stop")
    ended = wait_for(client, run, "stopped")
    rows = client.predict(run, 0, api_name="/metrics")
    assert rows
    assert client.predict(run, len(rows), api_name="/metrics") == []
    assert ended["step"] >= max(row["step"] for row in rows)


def wait_for(client: Client, run: str, state: str) -> dict:
    def reached() -> dict | None:
        status = client.predict(run, api_name="/status")
        return status if status["state"] == state else None

    return until(reached, 60)


def test_a_checked_recipe_is_the_one_that_is_run(client, recipe):
    checked = client.predict(recipe, api_name="/check")
    assert checked["model"]["class_path"] == "lightning_peft.tasks.CausalLM"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {class_path: os.system}", "os.system"),
        ("!!python/object/apply:os.system [id]", "python/object"),
        ("just text", "just text"),
    ],
)
def test_a_hostile_recipe_is_refused_with_the_reason(client, text, message):
    with pytest.raises(AppError) as refusal:
        client.predict(text, api_name="/check")
    assert message in str(refusal.value)


@pytest.mark.parametrize("run", ["", "../..", "20200101-000000-none-0000", "a\nb"])
def test_runs_that_are_not_there_are_refused(client, run):
    for name, more in (("/status", []), ("/metrics", [0]), ("/stop", [])):
        with pytest.raises(AppError, match="There is no run"):
            client.predict(run, *more, api_name=name)


def test_code_of_a_model_is_run_only_for_a_caller_who_names_the_model(client, recipe):
    content = yaml.safe_load(recipe)
    given = {"model": "me/our", "revision": own_code.COMMIT, "trust_remote_code": True}
    content["model"]["init_args"] |= given
    trusting = yaml.safe_dump(content)
    before = client.predict(api_name="/runs")
    for words in ([], [""], ["me/other"], ["yes"], ["ME/OUR"]):
        for name, more in (("/check", []), ("/start", ["coded"])):
            with pytest.raises(AppError, match='trust_remote_code_of="me/our"'):
                client.predict(trusting, *more, *words, api_name=name)
    assert client.predict(api_name="/runs") == before
    checked = client.predict(trusting, trust_remote_code_of="me/our", api_name="/check")
    assert checked["model"]["init_args"]["trust_remote_code"] is True
    run = client.predict(trusting, "coded", "me/our", api_name="/start")
    assert client.predict(api_name="/runs")[0]["run"] == run
    wait_for(client, run, "finished")
