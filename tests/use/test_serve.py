"""`espalier serve` over a real socket, on tiny models: prompts, answers, streaming, refusals, the line, and its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import espalier
from espalier.data.formats import read_examples
from espalier.encode.encode import Encoder
from espalier.encode.template import resolve_template
from espalier.errors import AdapterError, UsageError
from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import choose_dtype, load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.generate import Generated, Sampling, generate
from espalier.use.probes import prompt_ids
from espalier.use.serving import app as app_module
from espalier.use.serving.answers import Answer, StopText
from espalier.use.serving.command import _bound, greeting, make_server, run_serve
from espalier.use.serving.gate import MAX_BODY_BYTES
from espalier.use.serving.models import Served, load_served
from espalier.use.serving.options import ServeOptions, check_options
from espalier.use.serving.worker import Worker

CHAT = "/v1/chat/completions"
PEAR = [{"role": "user", "content": "a pear"}]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> tuple[int, str | None, str]:
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.status, self.json["error"]["param"], self.json["error"]["message"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream without its [DONE]."""
        lines = [line for line in self.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass
class Running:
    """A server in a thread of this process."""

    port: int
    server: Any
    worker: Worker
    log: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = self.send(method, path, body, **headers)
        response = connection.getresponse()
        reply = Reply(response.status, dict(response.getheaders()), response.read().decode("utf-8"))
        connection.close()
        return reply

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"Content-Type": "application/json", **names})
        return connection

    def chat(self, model: str = "pear", messages: Any = PEAR, **fields: Any) -> Reply:
        return self.ask("POST", CHAT, {"model": model, "messages": messages, **fields})


def folder_of(place: Path, source: Path, base: Path, template: str | None = None, scale: float = 1.0) -> Path:
    """An adapter as a run of ours leaves it, its lora_B times `scale`."""
    folder = Path(shutil.copytree(source, place))
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name: tensor * scale if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
    tokenizer = load_tokenizer(base)
    resolve_template(tokenizer, template)
    tokenizer.save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    record = {"base": {"name": str(base), "fingerprint": base_fingerprint(base)}, "stop_ids": [1]}
    (folder / "espalier.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, adapter_good_dir: Path, tiny_llama_dir: Path) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        "pear": folder_of(place / "pear", adapter_good_dir, tiny_llama_dir),
        "v1.5-plum": folder_of(place / "plum", adapter_good_dir, tiny_llama_dir, "atom", scale=-3.0),
    }


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Served:
    return load_served(folders, use_cpu=True, notice=lambda line: None)


@contextlib.contextmanager
def running(served: Served, **options: Any) -> Iterator[Running]:
    settings = ServeOptions(**{"max_new_tokens": 24, **options})
    log: list[str] = []
    with _bound(settings.host, 0) as taken:
        worker = Worker(settings.max_queue)
        server = make_server(served, settings, worker, log.append)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield Running(taken.getsockname()[1], server, worker, log)
        finally:
            server.should_exit = True
            worker.close()
            thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[Running]:
    with running(served) as found:
        yield found


def alone(folder: Path, base: Path, messages: Any, **settings: Any) -> Generated:
    """What `generate` says with this adapter alone on the base."""
    model = load_adapter(load_model(base, device="cpu", dtype=choose_dtype("cpu")[0]), folder, notice=lambda line: None)
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(tokenizer, resolve_template(tokenizer), messages)
    return generate(model, tokenizer, [ids], **{"max_new_tokens": 24, "stop_ids": [1], **settings})[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Answers last until this event, or until they are given up."""
    release = threading.Event()

    def slow(served: Any, ask: Any, ids: Any, given_up: Callable[[], bool], say: Callable[[str], None]) -> Any:
        say("begun")
        while not release.wait(0.01):
            if given_up():
                return None
        return Answer("begun", 1, "stop")

    monkeypatch.setattr(app_module, "answer", slow)
    return release


@pytest.mark.parametrize("name", ["pear", "v1.5-plum"])
def test_prompt_ids_are_those_of_training(
    server: Running, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[list[int]] = []
    real = app_module.answer
    monkeypatch.setattr(app_module, "answer", lambda *args: (seen.append(args[2]), real(*args))[1])
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c 你好"},
    ]
    row = {"messages": [*turns, {"role": "assistant", "content": "the answer"}]}
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    tokenizer = load_tokenizer(folders[name])
    encoder = Encoder(tokenizer, resolve_template(tokenizer), train_on="last")
    [encoded] = encoder.encode_batch(read_examples([str(tmp_path / "row.jsonl")]))[0].rows
    first = next(place for place, label in enumerate(encoded.labels) if label != -100)
    reply = server.chat(name, turns, max_tokens=1)
    assert reply.status == 200, reply.text
    assert seen == [list(encoded.input_ids[:first])]
    assert reply.json["usage"]["prompt_tokens"] == first


def test_greedy_answers_match_generate(
    server: Running, folders: dict[str, Path], tiny_llama_dir: Path, served: Served
) -> None:
    texts = {}
    for name in ("pear", "v1.5-plum", "tiny-llama", "pear"):
        choice = server.chat(name).json["choices"][0]
        texts[name] = choice["message"]["content"]
        if name in folders:
            expected = alone(folders[name], tiny_llama_dir, PEAR)
            assert texts[name] == expected.text
            assert choice["finish_reason"] == ("stop" if expected.stopped else "length")
    tokenizer = load_tokenizer(tiny_llama_dir)
    base = load_model(tiny_llama_dir, device="cpu", dtype=choose_dtype("cpu")[0])
    ids = prompt_ids(tokenizer, resolve_template(tokenizer), PEAR)
    expected = generate(base, tokenizer, [ids], max_new_tokens=24, stop_ids=[1])[0]
    assert texts["tiny-llama"] == expected.text
    assert len(set(texts.values())) == 3
    assert not any(parameter.requires_grad for parameter in served.model.parameters())


def test_completion_form_and_usage(server: Running) -> None:
    found = server.chat(max_tokens=5).json
    assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
    assert (found["object"], found["model"], found["id"][:9]) == ("chat.completion", "pear", "chatcmpl-")
    prompt = found["usage"]["prompt_tokens"]
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["choices"][0]["message"]["role"] == "assistant"


def test_a_stop_token_counts_and_ends(
    folders: dict[str, Path], tmp_path: Path, tiny_llama_dir: Path, server: Running
) -> None:
    """The fourth greedy token made a stop token: three tokens of text, four generated."""
    ids = alone(folders["pear"], tiny_llama_dir, PEAR).ids
    assert ids[3] not in ids[:3]
    folder = Path(shutil.copytree(folders["pear"], tmp_path / "short"))
    record = json.loads((folder / "espalier.json").read_text())
    (folder / "espalier.json").write_text(json.dumps(record | {"stop_ids": [ids[3]]}))
    with running(load_served({"short": folder}, use_cpu=True, notice=lambda line: None)) as other:
        found = other.chat("short").json
        streamed = other.chat("short", stream=True).events
    assert found["usage"]["completion_tokens"] == 4
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["choices"][0]["message"]["content"] == load_tokenizer(folder).decode(ids[:3])
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_streamed_chunks_join_to_the_answer(server: Running) -> None:
    whole = server.chat().json
    reply = server.chat(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    pieces = [delta["content"] for delta in deltas[1:-1]]
    assert len(pieces) > 3
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in server.chat(stream=True).events)


def test_stop_texts_cut_the_answer(server: Running) -> None:
    whole = server.chat().json["choices"][0]["message"]["content"]
    stop = whole[6:9]
    cut = whole[: whole.index(stop)]
    for stops in (stop, ["\x01", stop]):
        found = server.chat(stop=stops).json
        assert found["choices"][0]["message"]["content"] == cut
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] < 24
        events = server.chat(stop=stops, stream=True).events
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == cut


def test_stop_text_holds_back_what_may_become_one() -> None:
    text = StopText(["END", "\n\n"])
    assert [text.push(piece) for piece in ("aE", "N", "X\n", "b\n", "\nc")] == ["a", "", "ENX", "\nb", ""]
    assert text.hit
    ended = StopText(["END"])
    assert ended.push("the E") == "the "
    assert (ended.flush(), ended.hit) == ("E", False)


def test_sampling_is_by_seed(server: Running, folders: dict[str, Path], tiny_llama_dir: Path) -> None:
    first, again = (
        server.chat(temperature=1.5, top_p=0.9, seed=7).json["choices"][0]["message"]["content"] for _ in range(2)
    )
    assert first == again == alone(folders["pear"], tiny_llama_dir, PEAR, sampling=Sampling(1.5, 0.9, 7)).text
    unseeded = {server.chat(temperature=1.5).json["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(unseeded) > 1


def test_models_and_health(server: Running) -> None:
    listed = server.ask("GET", "/v1/models").json
    assert [model["id"] for model in listed["data"]] == ["pear", "v1.5-plum", "tiny-llama"]
    assert server.ask("GET", "/v1/models/v1.5-plum").json == listed["data"][1]
    there = "there is no model 'fig' here; there is pear, v1.5-plum, tiny-llama"
    assert server.ask("GET", "/v1/models/fig").error == (404, "model", there)
    assert server.chat("fig").error == (404, "model", there)
    assert server.ask("GET", "/health").json == {"status": "ok", "requests": 0}
    assert server.ask("GET", "/v2").error == (404, None, "GET /v2: Not Found")
    assert server.ask("GET", CHAT).error == (405, None, f"GET {CHAT}: Method Not Allowed")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "is not done here"),
        ({"n": 2}, "n", "2 is not done here"),
        ({"logprobs": True}, "logprobs", "True is not done here"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not done here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "0.5 is not done here"),
        ({"temprature": 0.5}, "temprature", "is not done here"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "it is 3 and max_completion_tokens is 4"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stop": list("abcde")}, "stop", "5 texts; 4 at most"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for answers that are streamed"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "is not done here"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "unknown role 'robot'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a text is expected"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bo"}]}, "messages[0].name", "is not done here"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "'image_url' parts are not done here",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_field(server: Running, fields: Any, param: str, said: str) -> None:
    status, named, message = server.ask("POST", CHAT, {"model": "pear", "messages": PEAR, **fields}).error
    assert (status, named) == (400, param)
    assert message.startswith(f"{param}")
    assert said in message


def test_fields_that_ask_for_what_is_done_anyway(server: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "pear"}]}]
    neutral = {"n": 1, "tools": [], "logprobs": None, "presence_penalty": 0, "user": "u1", "max_completion_tokens": 24}
    found = server.chat(messages=parts, response_format={"type": "text"}, **neutral).json
    assert found["choices"] == server.chat().json["choices"]


def test_template_refusals_and_long_prompts(server: Running) -> None:
    late = [*PEAR, {"role": "system", "content": "late"}]
    status, param, message = server.chat("v1.5-plum", late).error
    assert (status, param) == (400, "messages")
    assert message == ("the chat template refuses these messages: template atom: the system text must come first")
    long = server.chat(messages=[{"role": "user", "content": "word " * 400}])
    status, param, message = long.error
    assert (status, param) == (400, "messages")
    assert re.fullmatch(r"the messages have [\d,]{3,} tokens and the model holds 128, the answer included", message)
    assert long.json["error"]["code"] == "context_length_exceeded"


def test_bodies_that_are_none(server: Running) -> None:
    assert server.ask("POST", CHAT, b'{"model":').error == (400, None, "the body is no JSON: Expecting value")
    assert server.ask("POST", CHAT, b"\xff").status == 400
    assert server.ask("POST", CHAT, b"[" * 100_000).status == 400
    assert server.ask("POST", CHAT, b"[]").error[0] == 400
    plain = server.ask("POST", CHAT, b"{}", **{"Content-Type": "text/plain"})
    assert plain.error == (415, None, "the body must be sent as Content-Type: application/json")
    limit = f"the body is over the limit of {MAX_BODY_BYTES:,} bytes"
    assert server.ask("POST", CHAT, None, Content_Length=str(MAX_BODY_BYTES + 1)).error == (413, None, limit)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    pieces = (b" " * 2**20 for _ in range(5))
    with contextlib.suppress(ConnectionError):  # the server may close while the rest is sent
        connection.request("POST", CHAT, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_log_has_one_line_a_request_without_contents(served: Served) -> None:
    with running(served) as server:
        asked = [
            lambda: server.chat(messages=[{"role": "user", "content": "secret"}], max_tokens=2),
            lambda: server.chat("fig"),
            lambda: server.ask("GET", "/a%0a%e4b?key=secret"),
        ]
        for number, ask in enumerate(asked, start=1):
            ask()
            wait_for(lambda n=number: len(server.log) == n)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d POST /v1/chat/completions 200 pear \d+\+2 tokens length \d+\.\d\d s", server.log[0]
    )
    assert re.fullmatch(r"\S+ POST /v1/chat/completions 404 model \S+ s", server.log[1])
    assert re.fullmatch(r"\S+ GET /a\?+b 404 \S+ s", server.log[2])
    assert "secret" not in "".join(server.log)


def test_full_line_is_503_and_a_client_that_leaves_makes_room(served: Served, held: threading.Event) -> None:
    with running(served, max_queue=1) as server:
        body = {"model": "pear", "messages": PEAR}
        first = server.send("POST", CHAT, {**body, "stream": True})
        response = first.getresponse()
        while b"begun" not in response.fp.readline():
            pass
        second = server.send("POST", CHAT, body)
        wait_for(lambda: server.worker.num_jobs == 2)
        full = server.chat()
        assert full.error == (503, None, "2 requests are being answered or wait (--max_queue); try again")
        assert int(full.headers["retry-after"]) >= 1
        response.close()
        first.close()  # the running one leaves: the second runs
        wait_for(lambda: server.worker.num_jobs == 1)
        third = server.send("POST", CHAT, body)
        wait_for(lambda: server.worker.num_jobs == 2)
        third.close()  # one that waits leaves
        wait_for(lambda: server.worker.num_jobs == 1)
        second.close()  # one that runs and is not streamed leaves
        wait_for(lambda: server.worker.num_jobs == 0)
        held.set()
        assert server.chat().json["choices"][0]["message"]["content"] == "begun"
        wait_for(lambda: sum("the client left" in line for line in server.log) == 3)


def test_a_client_that_leaves_ends_its_generation(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real answer, each token slowed down: it ends before its tokens do."""
    from espalier.use.serving import answers

    given, real = [], answers.stream

    def slow(*args: Any, ended: Callable[[], bool], **settings: Any) -> Any:
        def counted() -> bool:
            given.append(1)
            time.sleep(0.05)
            return ended()

        return real(*args, ended=counted, **settings)

    monkeypatch.setattr(answers, "stream", slow)
    with running(served, max_new_tokens=100) as server:
        connection = server.send("POST", CHAT, {"model": "pear", "messages": PEAR, "max_tokens": 100})
        wait_for(lambda: len(given) > 2)
        connection.close()
        wait_for(lambda: server.worker.num_jobs == 0)
    assert len(given) < 60


def test_a_fault_of_the_model_is_500_and_the_server_goes_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory\nmore")

    with monkeypatch.context() as patched:
        patched.setattr(app_module, "answer", broken)
        assert server.chat().error == (500, None, "the model failed: RuntimeError: out of memory")
        assert '"the model failed: RuntimeError' in server.chat(stream=True).text
    assert server.chat(max_tokens=1).status == 200


def test_api_key(served: Served) -> None:
    with running(served, api_key="schlüssel") as server:
        needs = (401, None, "this server needs its API key: Authorization: Bearer KEY")
        assert server.ask("GET", "/v1/models").error == needs
        assert server.ask("GET", "/v1/models", Authorization="Bearer other").error == needs
        assert server.ask("POST", CHAT, b"x", Authorization="schlüssel").error == needs
        right = {"Authorization": "Bearer " + "schlüssel".encode().decode("latin-1")}
        assert server.ask("GET", "/v1/models", **right).status == 200
        assert server.ask("GET", "/health").status == 200
        assert server.ask("GET", "/health", Host="example.org").status == 200


def test_without_a_key_only_this_machine_is_served(server: Running) -> None:
    status, _, message = server.ask("GET", "/v1/models", Host="example.org:80").error
    assert (status, message.startswith("the host 'example.org:80' is not this machine")) == (403, True)
    for host in ("localhost:1", "[::1]:8000", "127.0.0.1"):
        assert server.ask("GET", "/v1/models", Host=host).status == 200


def test_stop_lets_the_running_answer_end(served: Served, held: threading.Event) -> None:
    with running(served) as server:
        runs = server.send("POST", CHAT, {"model": "pear", "messages": PEAR})
        wait_for(lambda: server.worker.num_jobs == 1)
        waits = server.send("POST", CHAT, {"model": "pear", "messages": PEAR})
        wait_for(lambda: server.worker.num_jobs == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        response = waits.getresponse()
        assert (response.status, json.loads(response.read())["error"]["message"]) == (503, "the server is stopping")
        held.set()
        response = runs.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["choices"][0]["message"]["content"] == "begun"
        for connection in (runs, waits):
            connection.close()


def test_second_signal_ends_the_running_answer(served: Served, held: threading.Event) -> None:
    with running(served) as server:
        runs = server.send("POST", CHAT, {"model": "pear", "messages": PEAR, "stream": True})
        response = runs.getresponse()
        while b"begun" not in response.fp.readline():
            pass
        server.server.handle_exit(signal.SIGTERM, None)
        server.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server.worker.num_jobs == 0)
        runs.close()
    assert server.log[:2] == ["stopping; the running answer has 8 s", "stopping at once"]
    assert not held.is_set()


def test_greeting(served: Served, folders: dict[str, Path]) -> None:
    lines = greeting(served, ServeOptions(host="0.0.0.0"), 8000)
    assert lines[0] == "models: pear, v1.5-plum, tiny-llama"
    base, pear, plum = served.base.path, folders["pear"], folders["v1.5-plum"]
    assert lines[2] == (
        f"for load use vLLM: vllm serve {base} --enable-lora --lora-modules pear={pear} v1.5-plum={plum}"
        f" --tokenizer {pear} --chat-template {pear}/chat_template.jinja --generation-config {pear}"
    )
    assert lines[3].startswith("(vLLM has one chat template a server")
    assert lines[4] == "warning: everyone who reaches 0.0.0.0 can use this server; --api_key asks for a key"
    assert lines[5] == "serving on http://0.0.0.0:8000/v1 (without a key); Ctrl-C stops"
    assert not any("warning" in line for line in greeting(served, ServeOptions(host="0.0.0.0", api_key="k"), 1))
    assert not any("warning" in line for line in greeting(served, ServeOptions(), 1))


def test_options_are_refused_together(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pear = str(folders["pear"])
    bad = ServeOptions((pear, f"pear={pear}", f"={pear}"), port=70000, api_key=" ", max_queue=-1, max_new_tokens=0)
    with pytest.raises(UsageError) as caught:
        check_options(bad)
    assert [detail.split(":")[0] for detail in caught.value.details] == [
        "--port 70000",
        "--api_key is empty",
        "--max_queue -1",
        "--max_new_tokens 0",
        f"--adapter pear={pear}",
        f"--adapter ={pear}",
    ]
    assert check_options(ServeOptions((pear, f"b={pear}"))) == {"pear": folders["pear"], "b": folders["pear"]}
    with pytest.raises(AdapterError, match="no such adapter folder"):
        check_options(ServeOptions(("name=/nowhere",)))
    monkeypatch.setattr("espalier.use.serving.options.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(UsageError) as caught:
        run_serve(ServeOptions((pear,)))
    assert str(caught.value) == (
        'espalier serve needs uvicorn, which is not installed\n  pip install "espalier-lm[serve]"'
    )


def test_a_taken_port_is_one_message(server: Running, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=f"127.0.0.1:{server.port} cannot be served on: Address already in use"):
        run_serve(ServeOptions((str(folders["pear"]),), port=server.port))


def test_adapters_that_cannot_share_a_base(
    folders: dict[str, Path], shared: Path, cases: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    pear = folders["pear"]
    with pytest.raises(UsageError, match="the base is called 'tiny-llama', and so is an adapter"):
        load_served({"tiny-llama": pear}, use_cpu=True)
    other = Path(shutil.copytree(pear, tmp_path / "other"))
    record = json.loads((pear / "espalier.json").read_text())
    record["base"]["name"] = str(shared / "tiny-llama-other")
    (other / "espalier.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="the adapters name different bases"):
        load_served({"pear": pear, "other": other}, use_cpu=True)
    with pytest.raises(AdapterError, match="trained on another base"):
        load_served({"pear": pear, "other": pear}, str(shared / "tiny-llama-other"), use_cpu=True)
    enlarged = cases / "D04_resized_embeddings" / "adapter"
    with pytest.raises(AdapterError) as caught:
        load_served({"pear": pear, "large": enlarged}, str(tiny_llama_dir), use_cpu=True)
    assert caught.value.details == (f"large ({enlarged}): it brings its own lm_head.weight",)


def test_base_that_an_adapter_changes_is_not_served(cases: Path, tiny_llama_dir: Path) -> None:
    said: list[str] = []
    enlarged = cases / "D04_resized_embeddings" / "adapter"
    found = load_served({"large": enlarged}, str(tiny_llama_dir), use_cpu=True, notice=said.append)
    assert list(found.layouts) == ["large"]
    assert said[-1] == (
        "the base is not served under its own name: the adapter changes it (it brings its own lm_head.weight)"
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_the_command_serves_and_stops(folders: dict[str, Path], number: int, code: int) -> None:
    source = str(Path(espalier.__file__).parents[1])
    command = [
        sys.executable,
        "-m",
        "espalier",
        "serve",
        "--adapter",
        f"x={folders['pear']}",
        "--port",
        "0",
        "--use_cpu",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source, "ESPALIER_API_KEY": "k"}
    )
    try:
        assert process.stderr is not None
        said = []
        while not said or not said[-1].startswith("serving on"):
            said.append(process.stderr.readline())
            assert said[-1], said
        found = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+)/v1 \(with the API key\); Ctrl-C stops\n", said[-1])
        assert found is not None, said
        server = Running(int(found[1]), None, None)  # type: ignore[arg-type]
        body = {"model": "x", "messages": PEAR, "max_tokens": 3}
        assert server.ask("POST", CHAT, body, Authorization="Bearer k").json["usage"]["completion_tokens"] == 3
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert "Traceback" not in rest
    lines = rest.splitlines()  # the line of the answer itself may come before or after "stopping"
    assert [line for line in lines if "POST" not in line][-2:] == ["stopping; the running answer has 8 s", "stopped"]
