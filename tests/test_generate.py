"""generate() gives what Transformers gives, streams it, and refuses what cannot work."""

import copy
import inspect
import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import moerunner  # noqa: E402
from moerunner.errors import CheckpointError, SpecError, UnsupportedError  # noqa: E402
from moerunner.generate import generate  # noqa: E402
from moerunner.models.decoding.cache import Unfit  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402

PROMPT = "one two three"


@pytest.fixture(scope="module")
def model():
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "one", "two", "three"])}
    words |= {f"w{i}": i for i in range(len(words), 256)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def by_transformers(model, tokenizer, **options):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_is_what_transformers_gives(model, tokenizer):
    expected = by_transformers(model, tokenizer, max_new_tokens=12, do_sample=False)
    made = generate(model, tokenizer, PROMPT, max_new_tokens=12)
    assert made.text == expected
    assert expected.split()


def test_a_seed_repeats_the_sample_of_transformers(model, tokenizer):
    torch.manual_seed(5)
    expected = by_transformers(model, tokenizer, max_new_tokens=12, do_sample=True, temperature=2.0, top_p=0.9, top_k=0)
    options = {"max_new_tokens": 12, "temperature": 2.0, "top_p": 0.9}
    first = generate(model, tokenizer, PROMPT, seed=5, top_k=0, **options)
    assert first.text == expected
    assert generate(model, tokenizer, PROMPT, seed=6, **options).text != first.text


def test_the_pieces_of_the_stream_are_the_text(model, tokenizer):
    pieces = []
    made = generate(model, tokenizer, PROMPT, max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces) == made.text
    assert len(pieces) > 2, "it came in one piece"


def test_the_numbers_are_of_this_run(model, tokenizer):
    made = generate(model, tokenizer, PROMPT, max_new_tokens=9)
    assert made.prompt_tokens == 3
    assert 1 <= made.new_tokens <= 9
    assert 0 < made.first_token_seconds < made.seconds
    assert made.tokens_per_second == pytest.approx((made.new_tokens - 1) / (made.seconds - made.first_token_seconds))
    assert made.to_dict()["text"] == made.text


def test_one_token_has_a_speed(model, tokenizer):
    assert generate(model, tokenizer, PROMPT, max_new_tokens=1).tokens_per_second > 0


def test_an_empty_prompt_starts_from_the_first_token_of_a_text(model, tokenizer):
    assert generate(model, tokenizer, "", max_new_tokens=2).prompt_tokens == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"max_new_tokens": 600}, "512"),
        ({"min_p": 0.5}, "min_p"),
        ({"no_such_thing": 5}, "no_such_thing"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"do_sample": True}, "temperature above 0"),
        ({"stop": [""]}, "stop"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"temperature": 1.0, "top_k": -3}, "top_k"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long)}, "not both"),
    ],
)
def test_what_cannot_work_is_refused_by_name(model, tokenizer, options, named):
    with pytest.raises(SpecError, match=named):
        generate(model, tokenizer, PROMPT, **options)


def test_an_encoder_and_decoder_gives_all_its_text(tokenizer):
    model = tiny_model("switch_transformers")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    pieces = []
    made = generate(model, tokenizer, PROMPT, max_new_tokens=5, stream=pieces.append)
    assert made.new_tokens == output.shape[1] - 1
    assert made.text == tokenizer.decode(output[0, 1:], skip_special_tokens=True)


def test_settings_of_the_model_for_several_texts_give_one(tokenizer):
    model = tiny_model("mixtral")
    expected = generate(model, tokenizer, PROMPT, max_new_tokens=4).text
    model.generation_config.update(num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=4).text == expected


def test_scores_that_are_not_numbers_are_no_text(tokenizer):
    model = tiny_model("mixtral")
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        generate(model, tokenizer, PROMPT)


def test_the_tokenizer_of_another_model(tokenizer):
    with pytest.raises(CheckpointError, match="the token 5, and the model knows 5"):
        generate(tiny_model("mixtral", vocab_size=5), tokenizer, PROMPT)


def test_a_model_that_writes_no_text_is_not_supported(model, tokenizer):
    with pytest.raises(UnsupportedError, match="MixtralModel"):
        generate(model.model, tokenizer, PROMPT)


FAMILIES = "mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 gpt_oss glm4_moe ernie4_5_moe phimoe".split()


def batch():
    """Three rows, two with padding on the left."""
    ids = torch.randint(6, 250, (3, 21))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :2] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    """With padding, past the sliding window, in chunks that do not divide the prompt, a row ending before the others."""
    model = tiny_model(family)
    moerunner.patch(model)
    ids, mask = batch()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 10}
    free = model.generate(**options, do_sample=False, pad_token_id=0, eos_token_id=None)
    end = int(free[1, 21 + 3])  # what row 1 says fourth ends it
    expected = model.generate(**options, do_sample=False, pad_token_id=0, eos_token_id=end)
    assert (expected[1, 25:] == 0).all(), "the end is not reached"
    for chunk in (None, 8):
        made = generate(model, **options, pad_token_id=0, eos_token_id=end, prefill_chunk=chunk)
        assert made.sequences.tolist() == expected.tolist()
        assert (made.decode, made.note) == ("Python", "")
        assert made.prompt_tokens == int(mask.sum())


@pytest.mark.parametrize(
    ("family", "reason"),
    [("qwen3_next", "LinearAttention"), ("minimax", "of its own kind"), ("switch_transformers", "encoder")],
)
def test_a_model_without_a_static_cache_runs_as_transformers_has_it_and_it_is_said(family, reason):
    model = tiny_model(family)
    moerunner.patch(model)
    ids, mask = batch()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    made = generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=5)
    assert made.sequences.tolist() == expected.tolist()
    assert made.decode == "Transformers"
    assert reason in made.note
    assert "prefill_chunk" not in made.note
    chunks = generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=5, prefill_chunk=4)
    assert chunks.sequences.tolist() == expected.tolist()
    assert "prefill_chunk" in chunks.note


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_transformers_own_loop_takes_the_prompt_in_chunks(family, monkeypatch):
    """As on several ranks, where it is the loop of every model."""

    def unfit(*_):
        raise Unfit("there is no reason")

    model = tiny_model(family)
    ids, mask = batch()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    monkeypatch.setattr("moerunner.generate.text._by_our_loop", unfit)
    widths = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    made = generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0, prefill_chunk=8)
    assert made.sequences.tolist() == expected.tolist()
    assert widths == [8, 8, 5, 1, 1, 1, 1]
    assert made.note == "Transformers' own loop: there is no reason"


def test_a_search_of_transformers_own_runs_in_its_own_loop(model, tokenizer):
    expected = by_transformers(model, tokenizer, max_new_tokens=6, num_beams=3, do_sample=False)
    made = generate(model, tokenizer, PROMPT, max_new_tokens=6, num_beams=3)
    assert made.text == expected
    assert "beam search" in made.note


def test_a_failure_of_the_static_cache_before_the_first_token_is_said(model, tokenizer, monkeypatch):
    def refuses(*_, **__):
        raise TypeError("no such argument")

    monkeypatch.setattr("moerunner.generate.loop.Step.__init__", refuses)
    made = generate(model, tokenizer, PROMPT, max_new_tokens=5)
    assert made.decode == "Transformers"
    assert "no such argument" in made.note
    assert made.text == by_transformers(model, tokenizer, max_new_tokens=5, do_sample=False)


def test_every_parameter_that_chooses_tokens_reaches_transformers(model, tokenizer):
    how = {"top_k": 20, "min_p": 0.02, "typical_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    torch.manual_seed(3)
    expected = by_transformers(model, tokenizer, max_new_tokens=12, do_sample=True, temperature=1.5, **how)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=12, temperature=1.5, seed=3, **how).text == expected
    greedy = by_transformers(model, tokenizer, max_new_tokens=12, do_sample=False, repetition_penalty=3.0)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=12, repetition_penalty=3.0).text == greedy


def test_a_batch_of_prompts_is_each_prompt_alone(model, tokenizer):
    prompts = ["one two three", "w77", "w9 w8 w7 w6 w5 w4 three"]
    alone = [generate(model, tokenizer, prompt, max_new_tokens=7) for prompt in prompts]
    pieces = {i: [] for i in range(3)}
    made = generate(model, tokenizer, prompts, max_new_tokens=7, stream=lambda row, text: pieces[row].append(text))
    assert made.texts == tuple(one.text for one in alone)
    assert made.prompt_tokens == 11
    assert made.new_tokens == sum(one.new_tokens for one in alone)
    for row, text in enumerate(made.texts):
        assert "".join(pieces[row]) == text
        assert pieces[row][-1] == "", "its end is told"
    assert made.to_dict()["texts"] == list(made.texts)
    with pytest.raises(ValueError, match="3 texts"):
        _ = made.text


@pytest.fixture(scope="module")
def bytewise():
    """A token for each byte: stop texts of several tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain)


def test_a_stop_text_ends_a_row_and_no_other(model, bytewise):
    texts = {prompt: generate(model, bytewise, prompt, max_new_tokens=16).text for prompt in ("def f(", "xy", "a = 1", "zzz")}
    prompts, stop = next(
        ([one, other], texts[one][i : i + 2])
        for one, other in itertools.permutations(texts, 2)
        for i in range(2, len(texts[one]) - 3)
        if texts[one][i : i + 2].isascii() and texts[one].index(texts[one][i : i + 2]) == i
        if texts[one][i : i + 2] not in texts[other]
    )
    first, second = (texts[prompt] for prompt in prompts)
    kept = first[: first.index(stop) + 2]
    pieces = [[], []]
    made = generate(model, bytewise, prompts, max_new_tokens=16, stop=stop, stream=lambda row, text: pieces[row].append(text))
    assert made.texts == (kept, second)
    assert ["".join(row) for row in pieces] == [kept, second]
    inputs = bytewise(prompts[0], return_tensors="pt")["input_ids"]
    expected = model.generate(inputs, max_new_tokens=16, do_sample=False, stop_strings=[stop], tokenizer=bytewise)
    alone = generate(model, bytewise, prompts[0], max_new_tokens=16, stop=[stop])
    assert alone.sequences.tolist() == expected.tolist()
    assert alone.text == kept


def test_a_tokenizer_in_which_no_stop_can_be_found_is_told(model, tokenizer):
    with pytest.raises(UnsupportedError, match="the tokenizer"):
        generate(model, tokenizer, PROMPT, stop="two")


def test_a_chat_goes_through_the_template(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(UnsupportedError, match="no chat template"):
        generate(model, tokenizer, "w50", chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ 'w1' + m['role'][0] | string }} {{ m['content'] }} {% endfor %}two"
    expected = generate(model, tokenizer, "<pad> w50 two", max_new_tokens=6)
    assert generate(model, tokenizer, "w50", max_new_tokens=6, chat=True).text == expected.text
    message = [{"role": "user", "content": "w50"}]
    assert generate(model, tokenizer, message, max_new_tokens=6).text == expected.text
    assert generate(model, tokenizer, [message, message], max_new_tokens=6).texts == (expected.text,) * 2


class Graph:
    """Stands for a CUDA graph on a CPU: nothing happens while it is captured, and a replay writes to the same place."""

    def __init__(self, run, tensors):
        kept = [(tensor, tensor.clone()) for tensor in tensors]
        self.run, self.out, self.replays = run, run(), 0
        for tensor, value in kept:
            tensor.copy_(value)

    def replay(self):
        self.replays += 1
        self.out.copy_(self.run())


def captured_on_a_cpu(monkeypatch, change=lambda out: out):
    """Has `generate` capture here. Gives the list that the graphs come to."""
    made = []

    def recorded(run):
        step = run.__self__
        big = [t for layer in step._cache.layers for t in (layer.keys, layer.values)]
        graph = Graph(lambda: change(run()), [*big, *step._small_state()])
        made.append(graph)
        return graph, graph.out

    monkeypatch.setattr("moerunner.models.decoding.step.recorded", recorded)
    monkeypatch.setattr("moerunner.generate.text._why_not", lambda model: "")
    return made


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_step_is_captured_once_and_replayed(family, monkeypatch):
    model = tiny_model(family)
    moerunner.patch(model)
    ids, mask = batch()
    expected = generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=14)
    graphs = captured_on_a_cpu(monkeypatch)
    made = generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=14)
    assert made.sequences.tolist() == expected.sequences.tolist()
    assert (made.decode, made.note) == ("CUDA graph", "")
    assert [graph.replays for graph in graphs] == [13]


def test_a_graph_that_says_something_else_is_not_believed(model, tokenizer, monkeypatch):
    expected = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    graphs = captured_on_a_cpu(monkeypatch, change=lambda out: 1.1 * out)
    made = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    assert made.text == expected.text
    assert made.decode == "Python"
    assert "other logits" in made.note
    assert graphs[0].replays == 1


def test_a_step_that_cannot_be_captured_is_said(model, tokenizer, monkeypatch):
    def recorded(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    expected = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    captured_on_a_cpu(monkeypatch)
    monkeypatch.setattr("moerunner.models.decoding.step.recorded", recorded)
    made = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    assert made.text == expected.text
    assert made.note == "the step cannot be captured: operation not permitted when stream is capturing"


def test_a_cache_that_counts_in_python_is_not_captured(model, tokenizer, monkeypatch):
    from transformers.cache_utils import StaticLayer

    update = StaticLayer.update
    monkeypatch.setattr(
        StaticLayer, "update", lambda self, *a, **k: setattr(self, "n", getattr(self, "n", 0) + 1) or update(self, *a, **k)
    )
    captured_on_a_cpu(monkeypatch)
    made = generate(model, tokenizer, PROMPT, max_new_tokens=6)
    assert (made.decode, made.note) == ("Python", "the cache counts in Python (n of layer 0)")


def test_a_single_token_attends_without_copies_of_keys():
    """Where Transformers itself repeats keys; against its own function."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from moerunner.models.decoding.attention import attend

    query, key, value = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 12)
    mask = torch.rand(2, 1, 1, 24) < 0.7
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = attend(sdpa_attention_forward, module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_function_is_called_by_the_name_of_its_module():
    import moerunner.generate as module

    assert callable(moerunner.generate)
    assert callable(module)
    assert "max_new_tokens" in inspect.signature(module).parameters
