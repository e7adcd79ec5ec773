"""The command line as a user meets it: help, unknown names, run files, refusals. All through the real entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from espalier.cli import app, main
from espalier.config import RunConfig, options
from espalier.errors import EspalierError, UsageError
from espalier.flags import parse_flags
from espalier.runfile import _ELSEWHERE, build_config
from espalier.training.arguments import REFUSED, check_trackers, refused_options, training_arguments

GOLDEN = Path(__file__).parent / "golden"


def configured(*argv: str) -> RunConfig:
    return build_config(*parse_flags(argv))


def error_of(*argv: str) -> str:
    with pytest.raises(UsageError) as error:
        configured(*argv)
    return str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["check", "--help"],
        ["chat", "--help"],
        ["merge", "--help"],
        ["verify", "--help"],
        ["import", "--help"],
    ],
)
def test_help_imports_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['espalier', *sys.argv[1:]]\n"
        "from espalier.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "espalier" in done.stdout


def test_train_help_is_the_golden_text() -> None:
    """Written by scripts/write_golden.py. Every common option stands in it."""
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == 0
    assert result.output == (GOLDEN / "train_help.txt").read_text(encoding="utf-8")
    for f in options():
        assert (f"--{f.name} " in result.output) == bool(f.metadata["common"]), f.name


def test_underscores_dashes_equals_and_booleans() -> None:
    config = configured(
        "--dataset-path",
        "a.jsonl",
        "b.jsonl",
        "--lora-rank=4",
        "--fp16",
        "--no_skip_overlength",
        "--learning_rate",
        "1e-3",
    )
    assert config.dataset_path == ["a.jsonl", "b.jsonl"]
    assert (config.lora_rank, config.fp16, config.skip_overlength, config.learning_rate) == (4, True, False, 1e-3)


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert configured("--max_steps", "120000", "--max_steps", "20").max_steps == 20


def test_unknown_flag_names_the_nearest() -> None:
    assert error_of("--lora_rnk", "8", "--learning_rat", "1") == (
        "the command line is not understood\n"
        "  - --lora_rnk: there is no such option (did you mean lora_rank?)\n"
        "  - --learning_rat: there is no such option (did you mean learning_rate?)\n"
        "  `espalier train --help` lists the options that matter, `--help-all` all of them."
    )


def test_wrong_values_are_told_together() -> None:
    text = error_of("--lora_rank", "eight", "--learning_rate", "fast", "--overlength", "cut", "--fp16", "maybe")
    assert text.splitlines()[:5] == [
        "4 options are wrong",
        "  - --lora_rank: 'eight' is not a whole number",
        "  - --learning_rate: 'fast' is not a number",
        "  - --overlength: 'cut' is not one of drop, truncate_prompt, split, error",
        "  - --fp16: 'maybe' is not true or false",
    ]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--continue_training"], "--continue_training needs --checkpoint: the adapter folder to start from"),
        (["--fp16", "--bf16"], "--bf16, --fp16 and --fp32 exclude each other"),
        (["--lora_rank", "0"], "--lora_rank: 0 is not 1 or more"),
        (["--learning_rate", "nan"], "--learning_rate: 'nan' is not a finite number"),
        (["--lora_alpha", "inf"], "--lora_alpha: 'inf' is not a finite number"),
        (["--num_train_epochs=-inf"], "--num_train_epochs: '-inf' is not a finite number"),
        (["--logging_steps", "0"], "--logging_steps: 0.0 is not above 0"),
        (["--save_steps", "-1"], "--save_steps: -1.0 is not above 0"),
        (["--weight_decay", "-1"], "--weight_decay: -1.0 is not 0 or more"),
        (["--max_grad_norm", "-1"], "--max_grad_norm: -1.0 is not 0 or more"),
        (["--warmup_steps", "-1"], "--warmup_steps: -1.0 is not 0 or more"),
        (["--seed", "-1"], "--seed: -1 is not 0 or more"),
        (["--seed", "4294967296"], "--seed: 4294967296 is above 4294967295"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers: -1 is not 0 or more"),
        (["--num_encode_workers", "0"], "--num_encode_workers: 0 is not 1 or more"),
        (["--min_shared_tokens", "0"], "--min_shared_tokens: 0 is not 1 or more"),
        (["--layers_to_transform", "0", "-1"], "--layers_to_transform: -1 is not 0 or more"),
        (["--init_lora_weights", "pisa"], "--init_lora_weights: 'pisa' is not one of true, false, gaussian, pissa,"),
        (["--eval_fraction", "0.1", "--eval_steps", "5"], "--eval_steps changes nothing with --eval_strategy no"),
        (["--lora_dropout", "1"], "--lora_dropout: 1.0 is not at least 0 and below 1"),
        (["--load_best_model_at_end"], "--load_best_model_at_end needs held-out rows"),
        (["--skip_overlength", "--overlength", "split"], "--skip_overlength means --overlength drop"),
        (["--lora_rank"], "--lora_rank: a value is missing"),
        (["stray"], "'stray': no option takes this; values follow their --option"),
        (["--seed", "1", "2"], "--seed: takes one value, not ['1', '2']"),
    ],
)
def test_options_that_cannot_be(argv: list[str], problem: str) -> None:
    assert f"  - {problem}" in error_of(*argv)


def test_run_file_holds_the_same_names_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning-rate: 1e-4\nlora_rank: 4\ntree: off\neval_strategy: no\nadam_beta1: 0.8\n"
        "target_modules: [q_proj, v_proj]\nsave_steps: 0.5\ncolumns: {prompt: q}\n"
    )
    config = configured("--config", str(file), "--lora_rank", "16")
    assert (config.learning_rate, config.lora_rank, config.tree, config.eval_strategy) == (1e-4, 16, "off", "no")
    assert config.training_arguments == {"adam_beta1": 0.8}
    assert (config.target_modules, config.columns) == (["q_proj", "v_proj"], {"prompt": "q"})
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert configured("--config", str(again)) == config


def test_run_file_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rnk: 8\nmax_steps: soon\n")
    assert error_of("--config", str(file)).splitlines()[1:3] == [
        f"  - {file}: lora_rnk: there is no such option (did you mean lora_rank?)",
        f"  - {file}: max_steps: 'soon' is not a whole number",
    ]
    file.write_text("- a\n")
    assert str(file) in error_of("--config", str(file))
    file.write_text("a: [")
    assert "this is no YAML" in error_of("--config", str(file))
    file.write_text("seed: 1\nseed: 2\n")
    assert "'seed' is given twice, line 2" in error_of("--config", str(file))
    assert "there is no such run file" in error_of("--config", str(tmp_path / "none.yaml"))


def test_every_training_argument_is_accepted_or_refused_with_a_reason() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    names = {f.name for f in fields(TrainingArguments) if f.init}
    gone = {"gradient_checkpointing", "local_rank"}  # names of older releases
    new = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # of newer ones
    assert not set(REFUSED) - names - gone - new, "refusals of options that do not exist"
    assert refused_options({"label_smoothing_factor": 0.1, "remove_unused_columns": False, "adam_beta2": 0.9}) == [
        "--label_smoothing_factor 0.1: the loss is the plain cross-entropy of the answer tokens"
    ]
    config = configured("--adam_beta2", "0.95", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--output_dir", "x")
    args = training_arguments(config)
    assert (args.adam_beta2, args.lr_scheduler_kwargs) == (0.95, {"num_cycles": 2})


@pytest.mark.parametrize(
    ("names", "details"),
    [
        (["wnadb", "none"], ["there is no tracker 'wnadb' (did you mean wandb?)"]),
        (
            ["comet_ml", "wandb"],
            ["comet_ml is not installed: pip install comet-ml", "wandb is not installed: pip install wandb"],
        ),
    ],
)
def test_trackers_are_known_and_installed(
    names: list[str], details: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_comet_available", lambda: False)
    with pytest.raises(UsageError, match="cannot be") as error:
        check_trackers(configured("--report_to", *names))
    assert list(error.value.details) == details
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    check_trackers(configured("--report_to", "wandb"))


def test_transformers_own_refusal_is_ours() -> None:
    with pytest.raises(UsageError, match="transformers refuses these options"):
        training_arguments(configured("--optim", "no_such", "--output_dir", "x"))


def test_bad_input_exits_2_without_traceback_and_leaves_nothing(
    tmp_path: Path,
    tiny_llama_dir: Path,
    adapter_good_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    model = ("--model_path", str(tiny_llama_dir))
    out = ("--output_dir", "out")
    from_adapter = ("--continue_training", "--checkpoint", str(adapter_good_dir))
    cases = [
        (["--dataset_path", "none.jsonl", *model, *out], "none.jsonl"),
        (["--dataset_path", str(tmp_path), *model, *out], str(tmp_path)),
        (["--dataset_path", "empty.jsonl", *model, *out], "empty.jsonl"),
        (["--dataset_path", "rows.jsonl", *model, *out, "--target_modules", "W_pack"], "'W_pack' matches nothing"),
        (["--dataset_path", "rows.jsonl", "--model_path", "./nowhere", *out], "there is no model at './nowhere'"),
        (["--dataset_path", "rows.jsonl", *model, "--output_dir", "full"], "full: this folder is not empty"),
        (["--dataset_path", "rows.jsonl", *model, "--output_dir", "rows.jsonl"], "rows.jsonl: this is a file"),
        (["--dataset_path", "rows.jsonl", *model], "--output_dir: no folder for the run"),
        (["--dataset_path", "rows.jsonl", *model, *out, "--max_seq_length", "2"], "no row is left to train on"),
        (["--dataset_path", "rows.jsonl", *model, *out, "--continue_training", "--checkpoint", "full"], "no adapter"),
        (
            ["--dataset_path", "rows.jsonl", *model, *out, "--modules_to_save", "lm_heed", "--fp32"],
            "did you mean lm_head?",
        ),
        (
            ["--dataset_path", "rows.jsonl", *model, *out, "--lora_rank", "16", "--use_dora", *from_adapter],
            "  - --lora_rank 16: the adapter has 4\n  - --use_dora True: the adapter has ",
        ),
        (["--dataset_path", "rows.jsonl", *model, *out, "--eval_dataset_path", "no.jsonl"], "no.jsonl: no such file"),
        (["--dataset_path", "rows.jsonl", *model, *out, "--deepspeed", "ds.json"], "--deepspeed ds.json:"),
    ]
    for argv, words in cases:
        monkeypatch.setattr(sys, "argv", ["espalier", "train", *argv])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == 2, (argv, said)
        assert said.err.startswith("error: "), said
        assert words in said.err, said
        assert "Traceback" not in said.err + said.out
        assert not (tmp_path / "out").exists(), argv
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["note.txt"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "espalier: No such command 'trian'. Did you mean 'train'?"),
        (["check"], "espalier check: Missing argument 'FILE'"),
        (["verify", "--adapter", "runs/a"], "espalier verify: No such option: --adapter"),
        (["verify", "--adapter", "runs/a"], "Usage: espalier verify [OPTIONS] PATH; `espalier verify --help` lists"),
        (["chat", "hello"], "espalier chat: Missing option '--adapter'"),
        (
            ["merge", "--adapter", "a", "--output_dir", "b", "--dtype", "f8"],
            "espalier merge: Invalid value for '--dtype'",
        ),
        (["inspect", "a.jsonl", "--row", "one"], "espalier inspect: Invalid value for '--row'"),
    ],
)
def test_usage_errors_look_like_all_errors(
    argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["espalier", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.startswith("error: espalier")
    assert words in said.err


def test_check_refuses_options_that_need_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["espalier", "check", "a.jsonl", "--max_seq_length", "10", "--train_on", "last"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == (
        "error: --max_seq_length, --train_on: without a model no token is counted: this changes nothing\n"
        "  Add --model_path.\n"
    )


def test_names_of_other_tools_lead_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = error_of("--lr", "1", "--batch_size", "2", "--epochs", "3", "--model_name_or_path", "m", "--dataset", "d")
    found = ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "model_path", "dataset_path")
    assert [f"(did you mean {name}?)" in text for name in found] == [True] * 5
    assert not set(_ELSEWHERE.values()) - {f.name for f in options()}
    assert not set(_ELSEWHERE) & {f.name for f in options()}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text("")
    assert "'my.jsonl': no option takes this; rows are given as --dataset_path my.jsonl" in error_of("my.jsonl")


def test_readme_lists_every_command_in_the_order_of_the_help() -> None:
    """In its block of command lines, each with its own first line where there are several."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Use it")[1].split("Rows may be")[0]
    shown = [line.split()[1] for line in block.splitlines() if line.startswith("    espalier ")]
    assert list(dict.fromkeys(shown)) == [command.name for command in app.registered_commands]
    for command in app.registered_commands:
        assert command.callback is not None
        assert (command.callback.__doc__ or "").strip()


def test_error_text_has_what_where_and_what_to_do() -> None:
    error = EspalierError("what", where="file:3", todo="Do this.", details=["one", "two"])
    assert str(error) == "file:3: what\n  - one\n  - two\n  Do this."
    assert error.exit_code == 2


def test_options_page_is_that_of_the_code() -> None:
    import importlib.util

    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("options_page", root / "scripts" / "options_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run scripts/options_page.py"
