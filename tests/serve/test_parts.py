"""The parts of the server in this process: text in pieces, sampling, both engines, and an engine that fails."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.conftest import shipped

import moerunner
from moerunner.errors import UnsupportedError
from moerunner.models.checkpoint import read_tokenizer
from moerunner.serve import Limits, engine_for
from moerunner.serve.alone import Alone
from moerunner.serve.batching import Batching, check
from moerunner.serve.sampling import choose, narrowed, weighed
from moerunner.serve.text import Pieces
from moerunner.serve.work import Wanted, Work, ends_of


class Bytes:
    """A tokenizer with one token for each byte; 256 is special."""

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i < 256).decode(errors="replace") + "<end>" * (not skip_special_tokens and 256 in ids)


# ---- text


@settings(max_examples=100)
@given(st.text(st.sampled_from("abé漢🙂\n"), max_size=30), st.data())
def test_pieces_put_together_are_the_text(text, data):
    raw = list(text.encode())
    pieces, out = Pieces(Bytes()), []
    while raw:
        n = data.draw(st.integers(1, 4))
        out.append(pieces.add(raw[:n]))
        raw = raw[n:]
    assert "".join(out) + pieces.end() == text
    assert "\ufffd" not in "".join(out)


@settings(max_examples=100)
@given(
    st.text(st.sampled_from("ab"), max_size=30), st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=3)
)
def test_nothing_of_a_stop_string_gets_out(text, stops):
    pieces, out = Pieces(Bytes(), stops), ""
    for byte in text.encode():
        out += pieces.add([byte])
        if pieces.stopped:
            break
    out += pieces.end()
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    first = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)[0] if ends else len(text)
    assert not any(stop in out for stop in stops)
    assert pieces.stopped == bool(ends)
    assert text[:first].startswith(out)
    assert ends or out == text


def test_bytes_that_are_no_text_come_out_in_the_end():
    pieces = Pieces(Bytes())
    assert "".join(pieces.add([0xE6]) for _ in range(40)) + pieces.end() == "\ufffd" * 40


# ---- sampling


def test_the_likeliest_token_at_temperature_0():
    logits = torch.randn(5, 50)
    assert torch.equal(choose(logits, [Wanted([1], 1, temperature=0.0)] * 5, [0] * 5), logits.argmax(-1))


def test_a_narrow_choice_keeps_what_it_says():
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0]).log()
    assert narrowed(scores, 2, 1.0).exp().tolist() == pytest.approx([0, 4, 0, 3])
    assert narrowed(scores, 0, 0.7).exp().tolist() == pytest.approx([0, 4, 0, 3])
    assert narrowed(scores, 0, 0.4).exp().tolist() == pytest.approx([0, 4, 0, 0])
    assert narrowed(scores, 3, 0.78).exp().tolist() == pytest.approx([0, 4, 2, 3]), "of the three, not of all"


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0])
    n = 20_000
    wanted = [Wanted([1], 1, temperature=2.0, seed=i) if i % 2 else Wanted([1], 1, temperature=2.0) for i in range(n)]
    drawn = choose(logits.expand(n, 3), wanted, [0] * n).bincount(minlength=3) / n
    # 6 standard deviations of a share of 20,000 draws
    assert torch.allclose(drawn, (logits / 2).softmax(-1), atol=0.022, rtol=0)


def test_a_seed_and_a_position_fix_a_draw():
    logits = torch.zeros(64, 1000)
    wanted = [Wanted([1], 1, seed=7)] * 64
    first = choose(logits, wanted, list(range(64)))
    assert len(set(first.tolist())) > 40
    assert torch.equal(first.flip(0), choose(logits, wanted, list(range(64))[::-1]))


def test_penalties_are_taken_once_and_for_each_time_and_of_their_own_row_only():
    logits = torch.randn(4, 6)
    wanted = [
        Wanted([1], 1, presence=0.5, frequency=0.25),
        Wanted([1], 1),
        Wanted([1], 1, bias=((3, 2.0), (0, -1.0))),
        Wanted([1], 1, frequency=-1.0, bias=((5, 1.0),)),
    ]
    change = weighed(logits, wanted, [[2, 4, 2, 2], [2, 2], [], [5]]) - logits
    expected = torch.zeros(4, 6)
    expected[0, 2], expected[0, 4] = -0.5 - 3 * 0.25, -0.5 - 0.25
    expected[2, 3], expected[2, 0] = 2.0, -1.0
    expected[3, 5] = 2.0
    assert torch.allclose(change, expected, atol=1e-6)


# ---- engines


@pytest.fixture(scope="module")
def model():
    return moerunner.load(shipped(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(shipped())


@pytest.fixture(scope="module")
def batching(tokenizer):
    """Of a model of its own: older releases change the attention of the model that they batch."""
    model = moerunner.load(shipped(), dtype=torch.float32)
    engine, why = engine_for(model, tokenizer, limits=Limits(running=4), cache_tokens=512)
    assert (engine.name, why) == ("continuous batching", "")
    yield engine
    engine.stop()


async def written(engine, *wanted):
    """The tokens of several requests at once."""

    async def one(number, ask):
        work = Work(f"r{number}-{id(ask)}", ask, asyncio.get_running_loop())
        engine.submit(work)
        tokens = []
        while (item := await asyncio.wait_for(work.arrivals.get(), 60)) is not None:
            if isinstance(item, BaseException):
                raise item
            tokens += item
        return tokens

    return await asyncio.gather(*(one(i, ask) for i, ask in enumerate(wanted)), return_exceptions=True)


ASKS = [Wanted([521, 3974, 343, 100 + i], 12, temperature=0.0) for i in range(6)]
ASKS += [Wanted([521, 3974, 343], 12, temperature=0.9, top_p=0.95, top_k=40, seed=i) for i in range(4)]


def test_both_engines_write_the_same(model, batching):
    alone = Alone(model, capacity=512)
    alone.start()
    try:
        assert asyncio.run(written(alone, *ASKS)) == asyncio.run(written(batching, *ASKS))
    finally:
        alone.stop()
    assert alone.problem() == "stopped"


def test_penalties_and_probabilities_are_those_of_the_model(model, batching):
    """Each step again from the whole text: the token is the likeliest after the penalty, its probability the model's own."""
    ask = Wanted([521, 3974, 343], 24, temperature=0.0, presence=0.5, frequency=0.5, logprobs=2)

    async def ask_it(engine):
        work = Work(f"scored by {engine.name}", ask, asyncio.get_running_loop())
        engine.submit(work)
        while (item := await asyncio.wait_for(work.arrivals.get(), 60)) is not None:
            assert isinstance(item, list), item
        return work.scores

    alone = Alone(model, capacity=512)
    alone.start()
    try:
        for engine in (alone, batching):
            scores = asyncio.run(ask_it(engine))
            tokens = [score.id for score in scores]
            assert len(tokens) == 24
            with torch.no_grad():
                logits = model(torch.tensor([ask.prompt + tokens[:-1]])).logits[0, len(ask.prompt) - 1 :]
            for i, (score, own) in enumerate(zip(scores, logits, strict=True)):
                counts = torch.tensor(tokens[:i], dtype=torch.long).bincount(minlength=len(own))
                left = own - 0.5 * (counts > 0) - 0.5 * counts
                assert left[score.id] >= left.max() - 1e-3
                assert score.logprob == pytest.approx(float(own.log_softmax(-1)[score.id]), abs=1e-3)
                values = own.log_softmax(-1).topk(2).values.tolist()
                assert [value for _, value in score.likeliest] == pytest.approx(values, abs=1e-3)
    finally:
        alone.stop()


@pytest.mark.parametrize("kind", ["batching", "alone"])
def test_an_end_token_ends_a_text(model, batching, kind):
    engine = batching if kind == "batching" else Alone(model, capacity=512)
    if kind == "alone":
        engine.start()
    (whole,) = asyncio.run(written(engine, ASKS[0]))
    (cut,) = asyncio.run(written(engine, Wanted(ASKS[0].prompt, 12, temperature=0.0, ends=frozenset({whole[3]}))))
    assert cut == whole[: whole.index(whole[3]) + 1]
    if kind == "alone":
        engine.stop()


def test_more_than_the_cache_holds_is_still_written(batching, monkeypatch):
    """Four texts of three pages each and nine pages: some lose their place and start again."""
    engine, moved = Batching(batching._model, capacity=96, cache_tokens=96, max_running=4), []
    engine.start()
    try:
        manager = engine._manager.batch_processor.offloading_manager
        right = manager.offload_requests
        monkeypatch.setattr(manager, "offload_requests", lambda: moved.append(1) or right())
        asks = [Wanted([521, 3974, 343, 100 + i], 76, temperature=0.8, seed=i) for i in range(4)]
        together = asyncio.run(written(engine, *asks))
        assert moved
        assert [len(tokens) for tokens in together] == [76] * 4
        assert together[0] == asyncio.run(written(engine, asks[0]))[0]
    finally:
        engine.stop()


def test_a_failing_batch_fails_its_requests_and_the_engine_goes_on(batching, monkeypatch):
    before = asyncio.run(written(batching, ASKS[0]))
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        raise torch.OutOfMemoryError("no room for this batch")

    with monkeypatch.context() as broken:
        broken.setattr(batching._model.model, "forward", fails)
        (error,) = asyncio.run(written(batching, ASKS[1]))
    assert isinstance(error, RuntimeError)
    assert "no room for this batch" in str(error)
    assert calls
    assert asyncio.run(written(batching, ASKS[0])) == before
    assert batching.problem() is None


def test_a_cancelled_request_leaves_nothing_behind(batching):
    async def leave():
        work = Work("leaves", Wanted([521, 3974], 400, temperature=0.0), asyncio.get_running_loop())
        batching.submit(work)
        await asyncio.wait_for(work.arrivals.get(), 60)
        batching.cancel(work)
        batching.cancel(work)
        while batching.running():
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert batching._router.works == {}
    assert batching._router.result_handlers == {}
    assert batching._router.output_queue.empty()


def test_an_engine_that_writes_another_text_than_generate_is_refused(model, monkeypatch):
    right = Batching.submit

    def elsewhere(self, work):
        work.wanted = Wanted([5] + work.wanted.prompt[1:30], work.wanted.max_new_tokens, temperature=0.0)
        right(self, work)

    monkeypatch.setattr(Batching, "submit", elsewhere)
    with pytest.raises(UnsupportedError, match="another text than generate's"):
        check(Batching(model, capacity=512, cache_tokens=1024, max_running=2), model, 4096)


def test_what_ends_a_text_is_in_the_generation_config(model, tokenizer):
    assert ends_of(model, tokenizer) == {0}
