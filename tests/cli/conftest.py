"""A small model folder with a tokenizer, and the command line called in this process."""

import shutil
from dataclasses import dataclass

import pytest

pytest.importorskip("transformers")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Runs `moerunner ...` and gives the exit code and what was printed."""
    from moerunner.cli import app

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            app([str(arg) for arg in args], prog_name="moerunner")
        return Outcome(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny DeepSeek-V3 with a tokenizer that has one token for each byte."""
    from moerunner.verify import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model("deepseek_v3")
    model.save_pretrained(folder)
    bytewise(folder)
    return folder


def bytewise(folder):
    """Puts a tokenizer with one token for each byte into a folder."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the model folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")
