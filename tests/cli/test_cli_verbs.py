"""What each verb prints and returns when the input is good, and when the model is wrong."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from moerunner.cli import demo, drawing, env, shell
from moerunner.runner import MoERunner

FEW = ("--tokens", 24, "--oracle-tokens", 2)


def no_constants(text):
    raise AssertionError(f"{text} is not JSON")


def parsed(outcome):
    """The only thing on stdout, read strictly."""
    return json.loads(outcome.out, parse_constant=no_constants)


@pytest.fixture
def doubled(monkeypatch):
    """Every runner's output is twice what it should be."""
    right = MoERunner.forward
    monkeypatch.setattr(MoERunner, "forward", lambda self, x, **inputs: 2 * right(self, x, **inputs))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_verify_a_family(cli, family):
    outcome = cli("verify", "--family", family, *FEW)
    assert outcome.code == 0
    assert outcome.err == ""
    assert f"{family}, float32 on " in outcome.out
    assert "random tokens, seed 0" in outcome.out
    assert "model.layers.1.mlp" in outcome.out
    assert "\nok: " in outcome.out


def test_verify_a_folder(cli, saved):
    outcome = cli("verify", saved, *FEW)
    assert outcome.code == 0
    assert "24 tokens (moerunner's own source)" in outcome.out
    data = parsed(cli("verify", saved, "--text", "abc def", "--json"))
    assert data["ok"] is True
    assert (data["tokens"], data["sample"]) == (7, "the text given")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verify_in_low_precision(cli, saved, dtype):
    data = parsed(cli("verify", saved, "--dtype", dtype, "--json", *FEW))
    assert (data["ok"], data["dtype"]) == (True, dtype)
    assert all(layer["vs_oracle"]["max"] > 1e-5 for layer in data["layers"])


@pytest.mark.usefixtures("doubled")
def test_verify_finds_a_wrong_layer(cli, saved):
    outcome = cli("verify", saved, *FEW)
    assert outcome.code == 1
    assert "MISMATCH" in outcome.out
    assert "model.layers.2.mlp: output" in outcome.out
    data = parsed(cli("verify", saved, "--json", *FEW))
    assert data["ok"] is False
    assert any(reason.startswith("model.layers.2.mlp: output") for reason in data["reasons"])


def test_infinity_is_still_json(cli, monkeypatch):
    right = MoERunner.forward
    monkeypatch.setattr(MoERunner, "forward", lambda self, x, **inputs: torch.inf * right(self, x, **inputs))
    outcome = cli("verify", "--family", "mixtral", "--json", *FEW)
    assert outcome.code == 1
    assert parsed(outcome)["layers"][0]["vs_transformers"]["max"] == "inf"


def test_generate_streams_the_text_and_tells_the_speed_apart(cli, saved):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer("def f(", return_tensors="pt")
    tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(tokens[0, 6:], skip_special_tokens=True)
    outcome = cli("generate", saved, "def f(", "--max-new-tokens", 8)
    assert outcome.code == 0
    assert outcome.out == expected + "\n"
    assert "tokens/s" in outcome.err
    data = parsed(cli("generate", saved, "def f(", "--max-new-tokens", 8, "--json"))
    assert data["text"] == expected
    assert data["prompt_tokens"] == 6


def test_generate_several_prompts_in_turn(cli, saved, tmp_path):
    def alone(prompt, *args):
        return parsed(cli("generate", saved, prompt, "--max-new-tokens", 6, "--json", *args))["text"]

    (tmp_path / "prompts.txt").write_text("x = 1\n\nclass A:\n")
    texts = ["def f(", "x = 1", "class A:"]
    given = ("generate", saved, "def f(", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 6)
    outcome = cli(*given)
    assert outcome.code == 0
    assert outcome.out == "\n\n".join(text + alone(text) for text in texts) + "\n"
    assert "18 tokens, " in outcome.err
    assert "in 3 prompts" in outcome.err
    options = ("--set", "repetition_penalty=5.0", "--prefill-chunk", 3)
    data = parsed(cli(*given, "--json", *options))
    assert data["prompts"] == texts
    assert data["texts"] == [alone(text, *options) for text in texts]
    assert data["texts"] != [alone(text) for text in texts]
    assert (data["decode"], data["note"]) == ("Python", "")


def test_generate_says_what_moerunner_did_not_run(cli, saved, tmp_path):
    from moerunner.verify import tiny_model

    shutil.copytree(saved, tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    outcome = cli("generate", tmp_path / "llama", "abc", "--max-new-tokens", 2, "--allow-unpatched")
    assert outcome.code == 0
    assert "note: the model has no MoE block" in outcome.err
    assert parsed(cli("generate", saved, "abc", "--max-new-tokens", 2, "--json"))["report"]["skipped"] == []


def test_inspect_for_people_and_for_machines(cli, saved):
    outcome = cli("inspect", saved, "--ep", 2, "--tp", 2)
    assert outcome.code == 0
    assert outcome.err == ""
    for words in (
        "deepseek_v3, DeepseekV3ForCausalLM, float32 (by the config)",
        "MoE in 2 of the 3 layers of model.layers: 1-2\n",
        "of which each of 4 ranks holds",
        "model.layers.1-2.mlp, 2 layers",
        "8 of width 32, 2 for each token",
        "1 of 2 groups by their two best",
        "1.7 on the weights",
        "not triton: runs on cuda, not on cpu" if not torch.cuda.is_available() else "triton",
    ):
        assert words in outcome.out
    assert "plan " not in outcome.out
    data = parsed(cli("inspect", saved, "--json"))
    assert (data["ok"], data["model_type"], data["layers"], data["files"]) == (True, "deepseek_v3", 3, True)
    assert data["stacks"] == [{"name": "model.layers", "layers": 3, "moe": [1, 2]}]
    (kind,) = data["kinds"]
    assert kind["spec"]["num_experts"] == 8
    assert kind["plan"]["backend"] == kind["plan"]["steps"][4]["kernel"]
    assert data["left_alone"] == data["notes"] == []


def test_inspect_explains_the_whole_plan(cli, saved):
    outcome = cli("inspect", saved, "--ep", 2, "--explain")
    assert "dp 1 x ep 2 x tp 1" in outcome.out
    assert "collectives: all_reduce over ep" in outcome.out


def test_inspect_says_what_each_rank_holds_and_has_to_do(cli, saved, tmp_path):
    outcome = cli("inspect", saved, "--ep", 4, "--tp", 2)
    assert "Expected load (even routing), 1 is the mean" in outcome.out
    rows = [line.split() for line in outcome.out.partition("1 is the mean")[2].splitlines()]
    assert [row[:2] for row in rows[2:6]] == [["0-1", "0-1"], ["2-3", "2-3"], ["4-5", "4-5"], ["6-7", "6-7"]]
    assert {row[-1] for row in rows[2:6]} == {"1.00"}
    assert "busiest rank, on average over the layers: 1.00" in outcome.out
    assert "Expected load" not in cli("inspect", saved).out

    trace = tmp_path / "loads.json"
    trace.write_text(json.dumps([[6, 0, 0, 0, 1, 1, 0, 0], [1] * 8]))
    told = cli("inspect", saved, "--ep", 2, "--trace", trace).out
    assert f"Expected load ({trace}), 1 is the mean" in told
    assert "1.50 in model.layers.1.mlp" in told
    assert "Expected load" in cli("inspect", saved, "--layout", "ep=2,redundant=2", "--trace", trace).out
    data = parsed(cli("inspect", saved, "--layout", "dp=2,ep=2", "--trace", trace, "--json"))
    assert (data["layout"]["dp"], data["layout"]["ep"], data["layout"]["world"]) == (2, 2, 4)
    assert data["load"]["source"] == str(trace)
    first, second = data["load"]["layers"]
    assert (first["name"], first["per_ep"], first["busiest"]) == ("model.layers.1.mlp", [1.5, 0.5], 1.5)
    assert second["per_ep"] == [1, 1]
    assert first["placed"] == 1.5, "one expert has more than half of the load: no place helps"
    assert [(r["rank"], r["dp"], r["ep"], r["load"], r["most"]) for r in data["ranks"]] == [
        (0, 0, 0, 1.25, 1.5), (1, 0, 1, 0.75, 1.0), (2, 1, 0, 1.25, 1.5), (3, 1, 1, 0.75, 1.0),
    ]  # fmt: skip
    size = data["bytes"]["moe_per_rank"] + data["bytes"]["rest"]
    assert {rank["size"] for rank in data["ranks"]} == {size}
    skewed = parsed(cli("inspect", saved, "--ep", 2, "--skew", 1, "--json"))["load"]
    assert skewed["source"] == "skew 1"
    assert skewed["layers"][0]["busiest"] > 1.4


def test_inspect_needs_no_weights_and_reads_none(cli, folder, monkeypatch):
    from moerunner.models.tensorfile import Reader

    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("a weight was read"))
    whole = parsed(cli("inspect", folder, "--json"))
    (folder / "model.safetensors").unlink()
    outcome = cli("inspect", folder)
    assert outcome.code == 0
    assert "note: no weights were looked at" in outcome.out
    bare = parsed(cli("inspect", folder, "--json"))
    assert (bare["files"], bare["bytes"], bare["kinds"]) == (False, whole["bytes"], whole["kinds"])


def test_inspect_a_quantised_model(cli, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    outcome = cli("inspect", folder, "--dtype", "bfloat16")
    assert outcome.code == 0
    assert "note: the weights are quantised (fp8) and cannot be loaded yet; sizes are those of plain bfloat16" in outcome.out


def test_inspect_a_model_without_moe(cli, tmp_path):
    from moerunner.verify import tiny_model

    tiny_model("llama").save_pretrained(tmp_path)
    outcome = cli("inspect", tmp_path)
    assert outcome.code == 0
    assert "3 layers, and no MoE block" in outcome.out
    assert parsed(cli("inspect", tmp_path, "--json"))["kinds"] == []


def test_families_for_people_and_for_machines(cli):
    from moerunner.models import registry

    outcome = cli("families")
    assert (outcome.code, outcome.err) == (0, "")
    data = parsed(cli("families", "--json"))
    assert [row["name"] for row in data["rows"]] == [family.name for family in registry.registered()]
    assert all(f"\n{row['name']}" in outcome.out for row in data["rows"])
    assert cli("families", "--markdown").out.startswith("# Model families\n")
    assert parsed(cli("families", "--markdown", "--json")) == data


def test_env_for_people_and_for_machines(cli):
    outcome = cli("env")
    assert outcome.code == 0
    for word in ("torch", "cpu", "gpu", "eager", "trial   ok"):
        assert word in outcome.out
    data = parsed(cli("env", "--json"))
    assert data["versions"]["torch"] == torch.__version__
    assert data["smoke"]["ok"]
    assert {"name", "available", "reason"} == set(data["backends"][0])


def test_what_a_library_prints_stays_out_of_the_json(cli, monkeypatch):
    from moerunner import env

    facts = env.collect()
    monkeypatch.setattr(env, "collect", lambda: print("a library's note") or facts)
    outcome = cli("env", "--json")
    assert parsed(outcome) == json.loads(json.dumps(facts))
    assert "a library's note" in outcome.err


def test_env_tells_no_paths(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    text = cli("env", "--json").out
    assert "someone" not in text
    assert sys.prefix not in text


@pytest.mark.usefixtures("doubled")
def test_env_says_when_this_machine_computes_wrongly(cli):
    outcome = cli("env")
    assert outcome.code == 4
    assert "trial   WRONG" in outcome.out


@pytest.fixture
def shipped():
    try:
        return demo.shipped_model()
    except shell.MoEError:
        pytest.skip("the shipped model is not built")


@pytest.mark.usefixtures("shipped")
def test_demo(cli):
    outcome = cli("demo", "--max-new-tokens", 12)
    assert outcome.code == 0
    assert outcome.err == ""
    for word in ("deepseek_v3", "held-out loss", "model.layers.5.mlp", "busiest", "def quicksort(", "tokens/s", "s in all"):
        assert word in outcome.out
    assert "the same text" in outcome.out
    assert "\nok: 5 MoE layers" in outcome.out


@pytest.mark.usefixtures("shipped")
def test_demo_for_machines(cli):
    data = parsed(cli("demo", "--max-new-tokens", 4, "--json"))
    assert data["ok"] is True
    assert data["same_text"] is True
    assert data["generated"]["new_tokens"] == 4
    assert len(data["verify"]["layers"]) == 5
    assert data["training"]["heldout_loss"] < 3


@pytest.mark.usefixtures("shipped", "doubled")
def test_demo_fails_if_the_layers_are_wrong(cli):
    outcome = cli("demo", "--max-new-tokens", 4)
    assert outcome.code == 1
    assert "MISMATCH" in outcome.out


def test_demo_without_its_model_is_bad_input(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(demo.resources, "files", lambda _: tmp_path)
    outcome = cli("demo")
    assert outcome.code == 2
    assert "shipped model" in outcome.err


# ---- what every verb shares


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("kernel\nfailed"), 4, "RuntimeError: kernel failed. Run again with --debug"),
        (torch.OutOfMemoryError("too much"), 4, "out of memory: too much. Choose a smaller --dtype"),
        (MemoryError(), 4, "out of memory"),
        (ImportError("No module named 'x'"), 3, "pip install"),
        (PermissionError(13, "Permission denied", "weights"), 2, "weights"),
    ],
)
def test_errors_become_one_line_and_a_code(cli, monkeypatch, error, code, words):
    def fail():
        raise error

    monkeypatch.setattr("moerunner.env.collect", fail)
    outcome = cli("env")
    assert outcome.code == code
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("1k", 1000), ("1K", 1024), ("1.5k", 1500), ("2m", 2_000_000)])
def test_readable_numbers(text, number):
    assert shell.count(text) == number


def test_a_table_has_lines_only_on_a_terminal(capsys):
    screen = shell.Screen()
    screen.table(["name", "count"], [["a", "1"], ["bb", "22"]])
    assert capsys.readouterr().out == "name  count\na         1\nbb       22\n"
    screen.terminal = True
    screen.table(["name", "count"], [["a", "1"]])
    assert "──" in capsys.readouterr().out


def test_a_long_name_is_not_cut_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "model.language_model.layers.12.feed_forward"
    screen = shell.Screen()
    screen.terminal = True
    screen.table(["layer", "vs [HF]", "vs f64"], [[name, "1.2e-07", "3.4e-07"]])
    out = capsys.readouterr().out
    assert "[HF]" in out
    assert all(number in out for number in ("1.2e-07", "3.4e-07"))
    assert "".join(line.split()[0] for line in out.splitlines()[3:] if line.strip()) == name


def test_long_cells_are_wrapped_where_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = shell.Screen()
    screen.terminal = True
    text = "sigmoid, bias in the choice [a_key_" + 40 * "x" + "]"
    screen.table(["family", "router"], [["toy", text]], numbers=False, wrap=True)
    out = capsys.readouterr().out
    assert "".join(out.split()).endswith("toy" + text.replace(" ", ""))
    assert max(map(len, out.splitlines())) <= 40


class Layer:
    name, load, imbalance = "layer", [0, 4, 8], 2.0


def test_bars_in_a_terminal_without_unicode(capsys, monkeypatch):
    monkeypatch.setattr(drawing, "encoding", lambda: "ascii")
    drawing.show_loads(shell.Screen(), [Layer])
    assert " 48" in capsys.readouterr().out


def test_loads_in_colour_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(shell.Screen, "drawing", True)
    monkeypatch.setenv("COLUMNS", "60")
    many = type("Layer", (), {"name": "wide", "load": list(range(300)), "imbalance": 2.0})
    drawing.show_loads(shell.Screen(), [Layer, many])
    out = capsys.readouterr().out
    assert "66.7%" in out
    assert "the busiest expert of the layer" in out
    assert max(map(len, out.splitlines())) <= 60
    assert drawing.levels([0, 1, 4, 8], 4) == [0, 1, 4, 8]
    assert drawing.levels([0, 1, 4, 8], 2) == [1, 8], "of two neighbours the busier"


def test_inspect_draws_a_tree_on_a_terminal(cli, saved, monkeypatch):
    plain = cli("inspect", saved, "--ep", 2).out
    monkeypatch.setattr(shell.Screen, "drawing", True)
    monkeypatch.setenv("COLUMNS", "200")
    drawn = cli("inspect", saved, "--ep", 2).out
    assert "model.layers  □■■" in drawn
    assert "█ routed" in drawn
    facts = [line.strip() for line in plain.splitlines() if line.startswith("  ")]
    assert facts
    squeezed = " ".join(drawn.split())
    assert all(" ".join(fact.split()) in squeezed for fact in facts)


def test_route_for_people_and_for_machines(cli, saved, tmp_path):
    (tmp_path / "text").write_text("def f(x):\n    return x\n" * 40)
    outcome = cli("route", saved, "--text", tmp_path / "text", "--tokens", 300)
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("300 tokens (text) through 2 MoE layers", "model.layers.2.mlp", "busiest / mean", " of 8"):
        assert words in outcome.out
    data = parsed(cli("route", saved, "--text", tmp_path / "text", "--tokens", 300, "--json"))
    assert (data["ok"], data["tokens"], data["files"]) == (True, 300, [])
    for layer in data["layers"]:
        assert sum(layer["load"]) == 2 * 300
    (tmp_path / "loads.json").write_text(json.dumps(data))
    planned = cli("plan", "--config", saved, "--ranks", 2, "--nvlink", 450, "--net", 50, "--trace", tmp_path / "loads.json")
    assert planned.code == 0, "what route measures, plan takes"
    assert "A GPU reads 4,800 GB/s" in planned.out, "it says what it took for granted"


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_route_draws_and_puts_the_numbers_beside(cli, saved, tmp_path, suffix, begins):
    pytest.importorskip("matplotlib")
    outcome = cli("route", saved, "--tokens", 64, "--plot", tmp_path / f"loads{suffix}")
    assert outcome.code == 0
    assert (tmp_path / f"loads{suffix}").read_bytes().startswith(begins)
    lines = (tmp_path / "loads.csv").read_text().splitlines()
    assert lines[0] == "layer,expert,tokens,share,weight"
    assert len(lines) == 1 + 2 * 8
    assert sum(int(line.split(",")[2]) for line in lines[1:]) == 2 * 2 * 64
    assert (tmp_path / "loads.pairs.csv").read_text().startswith("layer,expert,other,tokens,lift\n")
    assert len(list(tmp_path.iterdir())) == 3


def moerunner(*args, **options):
    return subprocess.Popen([sys.executable, "-m", "moerunner", *args], stderr=subprocess.PIPE, text=True, **options)


def test_the_module_is_a_program():
    process = moerunner("verify", "--family", "mixtral", "--tokens", "8", "--json", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["ok"] is True


def test_a_reader_that_leaves_is_no_traceback():
    process = moerunner("env", stdout=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 141
    assert err == ""


def test_an_interrupt_is_no_traceback():
    code = """
import signal, sys, time, moerunner.env
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
moerunner.env.collect = lambda: print("at work", flush=True) or time.sleep(100)
from moerunner.cli import main
sys.argv = ["moerunner", "env"]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().splitlines() == ["moerunner: interrupted"]


def test_env_collects_without_the_command_line():
    from moerunner.env import collect

    facts = collect()
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert env.run is not collect
