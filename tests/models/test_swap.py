"""Functions that are replaced while text is generated: for whom, and that they are put back."""

import threading

import pytest

transformers = pytest.importorskip("transformers")

from moerunner.models.decoding import fused  # noqa: E402
from moerunner.models.decoding.swap import swapped  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402


def own():
    return "own"


def ours(_):
    return lambda: "ours"


def test_the_last_to_leave_puts_it_back():
    table = {"f": own, "g": own}

    def interrupted():
        with swapped([(table, "f")], ours):
            with swapped([(table, "f"), (table, "absent")], ours):
                assert table["f"]() == "ours"
            assert (table["f"](), table["g"]()) == ("ours", "own")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert table == {"f": own, "g": own}


def test_another_thread_sees_no_change():
    table, inside, leave = {"f": own}, threading.Event(), threading.Event()

    def elsewhere():
        with swapped([(table, "f")], ours):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    inside.wait()
    try:
        assert table["f"]() == "own", "this thread did not ask for it"
        with swapped([(table, "f")], ours):
            assert table["f"]() == "ours"
        assert table["f"] is not own, "the other thread is still inside"
    finally:
        leave.set()
        thread.join()
    assert table["f"] is own


def test_what_somebody_else_puts_there_stays():
    table = {"f": own}
    with swapped([(table, "f")], ours):
        table["f"] = max
    assert table["f"] is max


def test_what_is_not_replaced_stays():
    table = {"f": own}
    with swapped([(table, "f")], lambda _: None):
        assert table["f"] is own


def test_transformers_table_is_left_as_it_was():
    """It would otherwise hide what is registered later."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, model = ALL_ATTENTION_FUNCTIONS["sdpa"], tiny_model("mixtral")
    with fused(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        assert model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    try:
        AttentionInterface.register("sdpa", max)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is max
        ALL_ATTENTION_FUNCTIONS["sdpa"] = min  # of this table only
        with fused(model):
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is min
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    finally:
        AttentionInterface.register("sdpa", before)
