"""`moerunner serve`, asked by the `openai` client and by curl as people do it."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from tests.serve.conftest import BODY, KEY, RUNNING, WAITING, Server, shipped

PROMPT = "def quicksort("


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.facts["url"], api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def expected():
    """The text that `generate` writes, greedily."""
    import torch

    import moerunner
    from moerunner.generate import generate
    from moerunner.models.checkpoint import read_tokenizer

    model, tokenizer = moerunner.load(shipped(), dtype=torch.float32), read_tokenizer(shipped())
    return generate(model, tokenizer, PROMPT, max_new_tokens=24).text


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# ---- what it answers


def test_it_says_what_it_serves(server, client):
    assert server.facts["engine"] == "continuous batching"
    assert server.facts["why"] is None
    (model,) = client.models.list().data
    assert model.id == server.facts["model"] == "demo"
    assert model.max_model_len == server.facts["context"] == 512
    assert client.models.retrieve("demo").id == "demo"
    assert server.ask("/health") == (200, {"status": "ok"})


def test_a_completion_is_what_generate_writes(client, expected):
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    assert made.choices[0].text == expected
    assert made.choices[0].finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (5, 24, 29)


def test_a_stream_is_the_same_text_in_pieces(client, expected):
    chunks = list(
        client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert len(chunks) > 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1])


def test_a_chat_goes_through_the_template(client, expected):
    halves = [{"role": "system", "content": "def "}, {"role": "user", "content": [{"type": "text", "text": "quicksort("}]}]
    whole = client.chat.completions.create(model="demo", messages=halves, max_tokens=24, temperature=0)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens == 24
    chunks = list(client.chat.completions.create(model="demo", messages=halves, max_tokens=24, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(c.usage is None for c in chunks), "nobody asked for it"
    fewer = client.chat.completions.create(model="demo", messages=halves, max_completion_tokens=3, temperature=0)
    assert fewer.usage.completion_tokens == 3


def test_a_prompt_of_token_ids(client, expected):
    ids = _tokenizer()(PROMPT)["input_ids"]
    for prompt in (ids, [ids], [PROMPT]):
        made = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0)
        assert made.choices[0].text == expected


def test_a_stop_string_ends_the_text_and_is_not_in_it(client, expected):
    stop = expected[9:14]
    at = expected.index(stop)
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=["never there", stop])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (expected[:at], "stop")
    assert made.usage.completion_tokens < 24
    pieces = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == expected[:at]


def test_requests_that_come_together_get_what_each_gets_alone(client):
    prompts = [f"def f{i}(x):\n" for i in range(3 * RUNNING)]

    def ask(prompt):
        return client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0).choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(RUNNING + WAITING) as together:
        assert list(together.map(ask, prompts)) == alone


def test_a_seed_repeats_a_draw_whatever_the_company(client):
    def ask(seed):
        made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=16, temperature=1.0, top_p=0.99, seed=seed)
        return made.choices[0].text

    first = [ask(seed) for seed in range(4)]
    assert len(set(first)) > 1
    with ThreadPoolExecutor(4) as together:
        assert list(together.map(ask, range(4))) == first


def test_several_texts_of_one_prompt_are_those_of_the_next_seeds(client):
    draw = {"model": "demo", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0}
    alone = [client.completions.create(**draw, seed=5 + i) for i in range(3)]
    made = client.completions.create(**draw, seed=5, n=3)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert [choice.text for choice in made.choices] == [one.choices[0].text for one in alone]
    assert made.usage.prompt_tokens == 5
    assert made.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    free = client.completions.create(**draw, n=8)
    assert len({choice.text for choice in free.choices}) > 1


def test_several_prompts_in_one_request(client, expected):
    prompts = ["class A", PROMPT, "import "]
    draw = {"model": "demo", "max_tokens": 24, "temperature": 0}
    alone = [client.completions.create(**draw, prompt=prompt) for prompt in prompts]
    made = client.completions.create(**draw, prompt=prompts, n=2)
    assert [choice.text for choice in made.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert [choice.index for choice in made.choices] == list(range(6))
    assert made.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    ids = [_tokenizer()(prompt)["input_ids"] for prompt in prompts]
    assert client.completions.create(**draw, prompt=ids).choices[1].text == expected


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_stream_of_several_texts(client, kind):
    draw = {"model": "demo", "max_tokens": 16, "temperature": 1.0, "seed": 5, "n": 3}
    if kind == "text":
        create, draw = client.completions.create, draw | {"prompt": PROMPT}
    else:
        create, draw = client.chat.completions.create, draw | {"messages": [{"role": "user", "content": PROMPT}]}
    whole = create(**draw)
    texts, ends = ["", "", ""], [[], [], []]
    *chunks, last = create(**draw, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        assert not ends[choice.index], "nothing comes behind the end"
        texts[choice.index] += choice.text if kind == "text" else choice.delta.content or ""
        ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.text if kind == "text" else choice.message.content for choice in whole.choices]
    assert ends == [[choice.finish_reason] for choice in whole.choices]
    assert last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_bias_and_penalties_change_the_choice(client, expected):
    first = _tokenizer()(PROMPT + expected)["input_ids"][5]
    draw = {"model": "demo", "prompt": PROMPT, "temperature": 0}
    forced = client.completions.create(**draw, max_tokens=4, logit_bias={str(first): 100})
    assert forced.choices[0].text == _tokenizer().decode([first] * 4)
    banned = client.completions.create(**draw, max_tokens=4, logit_bias={str(first): -100}, logprobs=0)
    assert banned.choices[0].logprobs.tokens[0] != _tokenizer().decode([first])
    more = client.completions.create(**draw, max_tokens=60, frequency_penalty=2.0, presence_penalty=2.0, logprobs=0)
    plain = client.completions.create(**draw, max_tokens=60, logprobs=0)
    assert len(set(more.choices[0].logprobs.tokens)) > len(set(plain.choices[0].logprobs.tokens))


def test_probabilities_of_the_tokens(client, expected):
    draw = {"model": "demo", "max_tokens": 24, "temperature": 0}
    made = client.completions.create(**draw, prompt=PROMPT, logprobs=3).choices[0]
    found = made.logprobs
    assert "".join(found.tokens) == made.text == expected
    assert [made.text[at : at + len(word)] for at, word in zip(found.text_offset, found.tokens, strict=True)] == found.tokens
    assert all(max(likely.values()) == own for own, likely in zip(found.token_logprobs, found.top_logprobs, strict=True))
    assert all(0 > own > -10 for own in found.token_logprobs)
    chat = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 3}
    said = client.chat.completions.create(**draw, **chat).choices[0].logprobs.content
    assert [one.token for one in said] == found.tokens
    assert [one.logprob for one in said] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert all(bytes(one.bytes).decode() == one.token for one in said)
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token for one in said)
    chunks = client.chat.completions.create(**draw, **chat, stream=True)
    pieces = [one.token for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert pieces == found.tokens
    heat = draw | {"temperature": 2.0, "seed": 1, "max_tokens": 8}
    drawn = client.completions.create(**heat, prompt=PROMPT, logprobs=0).choices[0].logprobs
    assert [len(likely) for likely in drawn.top_logprobs] == [1] * 8
    assert [[own] for own in drawn.token_logprobs] == [list(likely.values()) for likely in drawn.top_logprobs]


def test_a_narrow_choice_is_greedy(client, expected):
    for narrow in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-9}):
        made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=1.5, **narrow)
        assert made.choices[0].text == expected


def test_defaults_are_those_of_openai(client):
    assert client.completions.create(model="demo", prompt=PROMPT).usage.completion_tokens == 16
    long = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x = 1\n" * 120}])
    assert long.usage.total_tokens == 512 or long.choices[0].finish_reason == "stop"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server, expected):
    def curl(*args, body=None):
        sent = ["curl", "-sS", "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json", *args]
        return subprocess.run(sent, input=body, capture_output=True, text=True, timeout=60, check=True).stdout

    body = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0})
    url = f"{server.url}/v1/completions"
    assert json.loads(curl(url, "-d", body))["choices"][0]["text"] == expected
    events = curl("-N", url, "-d", body[:-1] + ', "stream": true}').split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    large = json.dumps({"prompt": "x" * (50 * BODY)})
    assert curl("-o", "/dev/null", "-w", "%{http_code}", url, "-d", "@-", body=large) == "413"
    assert "moerunner_generated_tokens_total" in curl(f"{server.url}/metrics")


def test_metrics_count_what_happened(server, client):
    names = ("prompt_tokens_total", "generated_tokens_total", "first_token_seconds_count", "expert_tokens_total")
    before = {name: server.metric(f"moerunner_{name}") for name in names}
    requests = server.metric("moerunner_requests_total", endpoint="completions", status=200)
    client.completions.create(model="demo", prompt=[[11, 12, 13, 14, 15, 16, 17]], max_tokens=5, temperature=0)
    after = {name: server.metric(f"moerunner_{name}") - before[name] for name in names}
    assert after["prompt_tokens_total"] == 7
    assert after["generated_tokens_total"] == 5
    assert after["first_token_seconds_count"] == 1
    more = after["expert_tokens_total"] - (7 + 4) * 4 * 5
    assert 0 <= more <= 4 * 5, "all tokens but the last, 4 experts each, 5 layers; the engine may be a step ahead"
    assert server.metric("moerunner_requests_total", endpoint="completions", status=200) == requests + 1
    assert server.metric("moerunner_layer_imbalance", layer="model.layers.5.mlp") >= 1
    assert server.metric("moerunner_requests_running") == server.metric("moerunner_requests_waiting") == 0


# ---- what it refuses


def refused(answer, status, *words, param=None, code=None):
    given, body = answer
    assert given == status, body
    error = body["error"]
    assert error["type"]
    if param:
        assert error["param"] == param
    if code:
        assert error["code"] == code
    for word in words:
        assert word in error["message"], error


GOOD = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", "half of a pair \ud800"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": ["a"] * (RUNNING + WAITING + 1)}, "n"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": "half of a pair \ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 451}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 7}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"n": 0}, "n"),
        ({"n": RUNNING + WAITING + 1}, "n"),
        ({"n": 10**9}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"logit_bias": {"a word": 1.0}}, "logit_bias"),
        ({"logit_bias": {str(10**6): 1.0}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1.0}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(server, change, param):
    refused(server.ask("/v1/completions", GOOD | change), 400, param=param)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "please refuse"}]}, "it says refuse"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, ""),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 5}, "logprobs to be true"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
    ids=str,
)
def test_a_bad_chat_is_explained(server, change, word):
    refused(server.ask("/v1/chat/completions", CHAT | change), 400, word)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", ""),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=["empty", "cut", "list", "bytes", "nan", "infinite", "deep", "long number"],
)
def test_a_malformed_body(server, raw, word):
    refused(server.ask("/v1/completions", raw=raw), 400, word)


def test_a_prompt_too_long(server):
    many = {"prompt": "x = 1\n" * 400, "max_tokens": 4}
    refused(server.ask("/v1/completions", many), 400, "512", code="context_length_exceeded")
    refused(server.ask("/v1/completions", GOOD | {"prompt": [5] * 500, "max_tokens": 13}), 400, "at most 12 new tokens")
    assert server.ask("/v1/completions", GOOD | {"prompt": [5] * 500, "max_tokens": 12})[0] == 200


def test_a_body_too_large(server):
    refused(server.ask("/v1/completions", GOOD | {"prompt": "x" * BODY}), 413, str(BODY))
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n"
    chunked += f"Authorization: Bearer {KEY}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as wire:
        wire.sendall(chunked)
        for _ in range(3 * BODY // 4096):  # no length was declared
            try:
                wire.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            except OSError:
                break
        assert b" 413 " in wire.recv(4096)


def test_what_is_not_served(server):
    refused(server.ask("/v1/embeddings", {}), 404, "/v1/completions")
    refused(server.ask("/v1/completions"), 405, "GET")
    refused(server.ask("/v1/models/another"), 404, "another", code="model_not_found")
    refused(server.ask("/v1/completions", GOOD | {"model": "another"}), 404, "another", code="model_not_found")
    refused(server.ask("/v1/completions", GOOD, headers={"Content-Type": "text/plain"}), 415, "application/json")
    refused(server.ask("/reset", {}), 404)
    refused(server.ask("/load_model", {"model": "x"}), 404)


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, f"Bearer  {KEY}"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/nothing"])
def test_the_key(server, key, path):
    refused(server.ask(path, headers={"Authorization": key}), 401, "Bearer", code="invalid_api_key")
    assert server.ask("/health", headers={"Authorization": key})[0] == 200


def test_the_openai_client_gets_its_own_errors(server, client):
    with pytest.raises(openai.BadRequestError, match="at most 450"):
        client.completions.create(model="demo", prompt=PROMPT, max_tokens=1000)
    with pytest.raises(openai.NotFoundError, match="another"):
        client.completions.create(model="another", prompt=PROMPT)
    stranger = openai.OpenAI(base_url=server.facts["url"], api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


# ---- people who leave, and too many of them


def post(server, body):
    """A connection with a request on its way."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    wire = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    wire.sendall(f"{head}Authorization: Bearer {server.key}\r\n\r\n".encode() + data)
    return wire


LONG = {"prompt": PROMPT, "max_tokens": 450, "temperature": 0}


@pytest.mark.parametrize(("stream", "texts"), [(True, 1), (False, 1), (True, 3), (False, 3)])
def test_a_client_that_leaves_ends_its_work(server, stream, texts):
    before = server.metric("moerunner_requests_total", status=499)
    written = server.metric("moerunner_generated_tokens_total")
    wire = post(server, LONG | {"stream": stream, "n": texts})
    until(lambda: server.metric("moerunner_generated_tokens_total") > written)
    wire.close()
    until(lambda: server.metric("moerunner_requests_total", status=499) == before + 1)
    until(lambda: server.metric("moerunner_requests_running") + server.metric("moerunner_requests_waiting") == 0)
    assert server.metric("moerunner_generated_tokens_total") - written < 450 * texts
    assert server.ask("/v1/completions", GOOD)[0] == 200


def test_too_many_at_once_are_told_to_come_again(server):
    wires = [post(server, LONG | {"stream": True}) for _ in range(RUNNING + WAITING)]
    try:

        def open_requests():
            return server.metric("moerunner_requests_running") + server.metric("moerunner_requests_waiting")

        until(lambda: open_requests() == RUNNING + WAITING)
        assert server.metric("moerunner_requests_running") <= RUNNING
        refused(server.ask("/v1/completions", GOOD), 429, "try again", code="overloaded")
    finally:
        for wire in wires:
            wire.close()
    until(lambda: server.metric("moerunner_requests_running") + server.metric("moerunner_requests_waiting") == 0)
    assert server.ask("/v1/completions", GOOD)[0] == 200


def test_noise_on_the_wire_does_not_harm(server):
    for noise in (
        b"\x16\x03\x01" + b"\x00" * 64,
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"\r\n" * 200,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as wire:
            wire.sendall(noise)
    half = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
    half.close()
    assert server.ask("/v1/completions", GOOD)[0] == 200
    assert server.process.poll() is None


# ---- the end


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stop_finishes_what_runs(tiny_server, number, code):
    server = tiny_server()
    assert server.facts["engine"] == "one request at a time"
    assert "values" in server.facts["why"]
    assert server.ask("/v1/completions", {"prompt": "abc", "max_tokens": 3})[1]["usage"]["completion_tokens"] == 3
    asked = openai.OpenAI(base_url=server.facts["url"], api_key="none", max_retries=0, timeout=60)  # from one token to the next
    draw = {"model": server.facts["model"], "prompt": "abc", "temperature": 0}
    pieces = asked.completions.create(**draw, max_tokens=200, stream=True, stream_options={"include_usage": True})
    next(pieces)
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(asked.completions.create, **draw, max_tokens=3, timeout=600)
        until(lambda: server.metric("moerunner_requests_waiting") == 1)
        server.process.send_signal(number)
        *_, last = pieces
        assert last.usage.completion_tokens == 200
        assert waiting.result(60).usage.completion_tokens == 3
    assert server.ended() == (code, "", "")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tiny_server):
    server = tiny_server("--context", 4000)
    wire = post(server, {"prompt": "abc", "max_tokens": 3900, "temperature": 0, "stream": True})
    until(lambda: server.metric("moerunner_generated_tokens_total") > 5)
    server.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert server.process.poll() is None, "it finishes what runs"
    assert server.stop(signal.SIGINT)[0] == 130
    with wire, contextlib.suppress(ConnectionResetError):
        while piece := wire.recv(BODY):
            assert b"[DONE]" not in piece


@pytest.mark.slow
def test_an_interrupt_while_the_engine_starts():
    """At the first token of the check; its thread must not keep the process."""
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from moerunner.serve import batching
right = batching.Sampling.__call__
def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return right(*args)
batching.Sampling.__call__ = interrupted
from moerunner.cli import main
sys.argv = ["moerunner", "serve", sys.argv[1], "--port", "0"]
main()
"""
    run = [sys.executable, "-c", code, str(shipped())]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "moerunner: interrupted\n"


@pytest.fixture
def tiny_server(request, tmp_path):
    """Of a model that continuous batching cannot run: its keys are wider than its values."""
    from tests.cli.conftest import bytewise

    from moerunner.verify import tiny_model

    model = tiny_model("deepseek_v3")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(tmp_path / "tiny")
    bytewise(tmp_path / "tiny")

    def start(*options):
        server = Server(tmp_path / "tiny", *options)
        request.addfinalizer(lambda: server.process.poll() is None and server.process.kill())
        return server

    return start


def _tokenizer():
    from moerunner.models.checkpoint import read_tokenizer

    return read_tokenizer(shipped())
