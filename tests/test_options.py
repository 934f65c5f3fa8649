"""Numbers that no command can use are refused in one line that names the option, with exit code 2."""

import argparse
import importlib
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import runs

pytest.importorskip("tyro", reason="tyro, which the commands need, is not installed")
from meanflow.errors import UserError

ROOT = Path(__file__).parents[1]


def numbers() -> list[tuple[str, str]]:
    """Section and name of every float of a run, tuples of them too."""
    config = runs.tiny()
    return [
        (section.name, field.name)
        for section in fields(config) if is_dataclass(value := getattr(config, section.name))
        for field in fields(value)
        if isinstance(each := getattr(value, field.name), float)
        or (isinstance(each, tuple) and each and isinstance(each[0], float))
    ]  # fmt: skip


def test_every_float_is_known():
    assert {section for section, _ in numbers()} == {"model", "objective", "optim", "data", "guard"} and len(
        numbers()
    ) >= 20


@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")), ids=str)
@pytest.mark.parametrize("section, name", numbers(), ids=".".join)
def test_a_run_refuses_what_is_not_finite(section, name, value):
    config = getattr(runs.tiny(), section)
    held = getattr(config, name)
    with pytest.raises(UserError, match=f"^{section}.{name}: got ") as error:
        replace(config, **{name: (held[0], value) if isinstance(held, tuple) else value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ("inf", "-inf", "nan", "1e999"))
@pytest.mark.parametrize("script, before, option, after", [
    ("train", ("digits",), "--optim.lr", ()), ("train", ("imagenet-b4",), "--objective.tangent", ("1",)),
    ("quickstart", (), "--guard.spike", ()), ("sample", ("RUN",), "--times", ("0.5", "0")),
    ("evaluate", ("RUN",), "--times", ("0",)),
])  # fmt: skip
def test_a_command_names_the_option_that_is_not_finite(command, script, before, option, after, value):
    code, _, err = command(script, *before, option, value, *after)
    said = option.removeprefix("--") + ": got "
    assert code == 2 and said in err and "wanted a finite number" in err and err.count("\n") == 1, err


TOGETHER = {
    "digits --model.mlp-ratio -1": "model.mlp_ratio: got -1.0, wanted a positive number",
    "digits --model.mlp-ratio 0.001": "model.mlp_ratio: got 0.001, wanted a positive number",
    "digits --model.head-depth 2": "model.head_depth: got 2, wanted 1 or more with objective.direction v_head, else 0",
    "digits --model.head-depth 5": "model.head_depth: got 5, wanted a whole number from 0 to the depth 4",
    "digits --objective.direction v_head": "model.head_depth: got 0, wanted 1 or more with objective.direction v_head",
    "digits --objective.guidance-input omega": "objective.guidance_input: got 'omega', wanted what model.guid",
    "digits --model.guidance-input omega": "objective.guidance_input: got 'none', wanted what model.guidance_input",
    "digits --model.network imf --model.num-heads 32": "model.num_heads: got 32, wanted heads of an even part",
    "digits --model.time-embedding tau,level": "model.time_embedding: got 'tau,level', wanted one of t,h t,r t,r,h h t",
    "digits-soflow --model.time-embedding tau,level": "model.time_embedding: got 'tau,level', wanted one of t,h t,r",
    "digits-shortcut --model.time-embedding t": "model.time_embedding: got 't', wanted one of tau,level t,h t,r",
    "digits-ict --model.time-embedding t,h": "model.time_embedding: got 't,h', wanted one of t with this objective",
    "digits-scm --model.no-log-variance": "model.log_variance: got False, wanted True with this objective",
    "digits-soflow --model.guidance-input omega": "objective.guidance_input: got 'none', wanted what model.guidance",
    "digits-shortcut --train.groups 32": "train.batch: got 64, wanted one bootstrap sample or more in each of 32",
    "digits-ict --optim.algorithm radam": "optim.implementation: got 'native', wanted torch; no other has radam",
    "digits --optim.warmup-steps 5000": "optim.warmup_steps: got 5000, wanted at most the 1800 train.steps",
    "imagenet-b4 --optim.warmup-steps 20 --train.steps 10": "optim.warmup_steps: got 20, wanted at most the 10",
}


@pytest.mark.parametrize("line, message", TOGETHER.items(), ids=TOGETHER)
def test_options_that_cannot_work_together_are_named(command, line, message):
    code, _, err = command("train", *line.split(), "--dry-run")
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_a_trial_of_a_preset_may_end_within_its_warm_up(command, tmp_path):
    code, out, err = command("train", "digits", "--train.steps", 1, "--train.device", "cpu", "--out", tmp_path / "run")
    assert code == 0, err
    assert "train.steps 1 end within optim.warmup_steps 100: the rate reaches 1% of optim.lr" in out


# --- the benchmarks ---


class Parsed(Exception):
    """Ends a benchmark once its parser is known."""


def parser_of(module: str, monkeypatch) -> argparse.ArgumentParser:
    found = []

    def stop(parser, args=None, namespace=None):
        found.append(parser)
        raise Parsed

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(Parsed):
            importlib.import_module(f"benchmarks.{module}").main([])
    return found[0]


BENCHMARKS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "add_argument" in path.read_text()
    and "def main(" in path.read_text()
)  # fmt: skip


@pytest.mark.parametrize("module", BENCHMARKS)
def test_a_benchmark_refuses_what_is_not_finite(module, monkeypatch, capsys):
    parser = parser_of(module, monkeypatch)
    kinds = {action.option_strings[-1]: action for action in parser._actions if action.option_strings and action.type}
    assert not any(action.type is float for action in kinds.values())
    for option, action in kinds.items():
        if action.type.__name__ not in ("finite", "positive"):
            continue
        for value in ("inf", "nan"):
            with pytest.raises(SystemExit) as exit:
                parser.parse_args([option, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)])
            assert exit.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


CPU = ("--device", "cpu")


@pytest.mark.parametrize("module, args, message", [
    ("step", (*CPU, "--model", "Q/3"), "model: got 'Q/3'"), ("step", (*CPU, "--compare", "fastest"), "--compare: got"),
    ("scaling", (*CPU, "--model", "Q/3"), "model: got 'Q/3'"),
    ("breakdown", (*CPU, "--kappa", "2"), "objective.kappa: got 2"),
    ("accounting", ("--preset", "none", "--batch", "8"), "preset: got 'none'"),
    ("inference", (*CPU, "--model", "Q/3"), "model: got 'Q/3'"), ("projection", ("/nowhere",), "ROWS: got /nowhere"),
    ("recipes", ("--mfu", "2"), "mfu: got 2"),
])  # fmt: skip
def test_bad_input_to_a_benchmark_is_one_line_and_exit_code_2(module, args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        sys.exit(importlib.import_module(f"benchmarks.{module}").main(list(args)))
    err = capsys.readouterr().err
    assert exit.value.code == 2 and message in err and "Traceback" not in err
    assert err.count("\n") == 1 or err.startswith("usage: ")  # argparse's own way
