"""generate() gives what Transformers gives, streams it, and refuses what cannot work."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from moerunner.errors import CheckpointError, SpecError, UnsupportedError  # noqa: E402
from moerunner.generate import generate  # noqa: E402
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
