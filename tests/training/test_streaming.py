"""--streaming: rows are read once, steps follow from (seed, step), a stopped run goes on at the same row."""

from __future__ import annotations

import io
import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import log_of, run, write_rows

from espalier.data.formats import FormatOptions, iter_examples
from espalier.encode.encode import Encoder
from espalier.encode.template import resolve_template
from espalier.errors import DataError, UsageError
from espalier.model.load import load_tokenizer
from espalier.training.faults import Interrupted
from espalier.training.streaming import StreamedSteps
from espalier.training.trainer import LoraTrainer


def stream(model: Path, rows: Path, **options: Any) -> StreamedSteps:
    tokenizer = load_tokenizer(str(model))
    encoder = Encoder(tokenizer, resolve_template(tokenizer, None))
    settings: dict[str, Any] = {"rows_per_step": 4, "num_steps": 100, "window_rows": 8, "seed": 7}
    return StreamedSteps([str(rows)], encoder, FormatOptions(), **{**settings, **options})


def lines_of(steps: StreamedSteps, number: int) -> list[int]:
    return [row.line for row in steps[number].rows]


def test_a_window_is_shuffled_and_every_row_comes_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    steps = stream(tiny_llama_dir, write_rows(tmp_path / "r.jsonl", 18))
    lines = [lines_of(steps, number) for number in range(5)]
    assert [len(step) for step in lines] == [4, 4, 4, 4, 2]
    assert sorted(lines[0] + lines[1]) == list(range(1, 9))
    assert sorted(lines[2] + lines[3]) == list(range(9, 17))
    assert sorted(lines[4]) == [17, 18]
    assert lines[0] + lines[1] != list(range(1, 9))
    assert steps[5].ended
    assert steps[50].ended


def test_a_step_does_not_depend_on_what_was_asked_before(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 40)
    in_order = stream(tiny_llama_dir, rows)
    wanted = [lines_of(in_order, number) for number in range(10)]
    assert [lines_of(stream(tiny_llama_dir, rows), number) for number in range(10)] == wanted
    worker = pickle.loads(pickle.dumps(in_order))
    assert [lines_of(worker, number) for number in range(1, 10, 3)] == wanted[1::3]
    assert lines_of(worker, 0) == wanted[0]  # backwards: the files are read anew


def test_a_step_holds_what_the_encoder_makes_of_its_rows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 8)
    steps = stream(tiny_llama_dir, rows)
    examples = {example.line: example for example in iter_examples([str(rows)])}
    for number in (0, 1):
        for row in steps[number].rows:
            (plain,) = steps.encoder.encode(examples[row.line])  # type: ignore[arg-type]
            np.testing.assert_array_equal(row.input_ids, plain.input_ids)
            np.testing.assert_array_equal(row.labels, plain.labels)


def test_rows_are_skipped_without_being_encoded(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = stream(tiny_llama_dir, write_rows(tmp_path / "r.jsonl", 80))
    encoded: list[int] = []
    encode = Encoder.encode_batch

    def counted(self: Encoder, examples: Any) -> Any:
        encoded.append(len(examples))
        return encode(self, examples)

    monkeypatch.setattr(Encoder, "encode_batch", counted)
    assert len(steps[19].rows) == 4
    assert encoded == [4]


def test_group_by_prefix_puts_like_texts_into_one_step(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 24)  # 6 beginnings, each on 4 rows
    steps = stream(tiny_llama_dir, rows, window_rows=24, group_by_prefix=True)
    found = [sorted(lines_of(steps, number)) for number in range(6)]
    assert sorted(line for step in found for line in step) == list(range(1, 25))
    # A step is a run of the sorted rows from a random offset: it holds rows of two beginnings at most.
    assert all(len({line % 6 for line in step}) <= 3 for step in found)
    assert sum(len({line % 6 for line in step}) for step in found) < 24


def test_the_run_ends_where_the_rows_end(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 10)
    result, said = run(tiny_llama_dir, rows, tmp_path / "out", streaming=True, streaming_window=8, max_steps=50)
    assert result.num_steps == 3
    assert "rows       read once, as the run goes on; shuffled within 8 rows" in said
    assert "the rows ended after step 3: the run ends here" in said
    assert [entry["step"] for entry in log_of(tmp_path / "out")] == [1, 2, 3]


def test_loader_workers_change_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 40)
    logs = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        options = {"streaming": True, "streaming_window": 8, "max_steps": 5, "dataloader_num_workers": workers}
        run(tiny_llama_dir, rows, out, **options)
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in log_of(out)])
    assert logs[0] == logs[1]
    assert len({loss for loss, _ in logs[0]}) == 5


def test_a_stopped_stream_goes_on_at_its_row(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 60)
    options = {"streaming": True, "streaming_window": 8, "max_steps": 12, "lora_dropout": 0.1}
    run(tiny_llama_dir, rows, tmp_path / "whole", **options)
    step = LoraTrainer.training_step

    def stopped(self: LoraTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            raise Interrupted(2)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(tiny_llama_dir, rows, tmp_path / "cut", **options)
    monkeypatch.setattr(LoraTrainer, "training_step", step)
    run(tiny_llama_dir, rows, tmp_path / "cut", **options, resume_from_checkpoint="last")
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    keys = ("step", "loss", "grad_norm", "epoch")
    cut, whole = ([{k: e[k] for k in keys} for e in log_of(tmp_path / d)] for d in ("cut", "whole"))
    assert cut == whole


def bad_rows(path: Path, bad: set[int], count: int = 24) -> Path:
    write_rows(path, count)
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in bad:
        lines[line - 1] = json.dumps({"instruction": f"row {line}", "output": ""})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_bad_rows_are_left_out_by_name(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = bad_rows(tmp_path / "r.jsonl", {3, 13, 14, 15, 16})
    options = {"streaming": True, "streaming_window": 4, "max_steps": 6, "on_bad_row": "skip"}
    result, said = run(tiny_llama_dir, rows, tmp_path / "out", **options)
    assert result.num_steps == 6
    assert f"step 1: 1 rows left out: {rows}:3: no answer ('output' is empty)" in said
    left = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert sorted((row["step"], row["line"]) for row in left) == [(1, 3), (4, 13), (4, 14), (4, 15), (4, 16)]
    by_step = {entry["step"]: entry for entry in log_of(tmp_path / "out")}
    assert "loss" not in by_step.get(4, {})  # no row of step 4 can be used
    assert all("loss" in by_step[step] for step in (1, 2, 3, 5, 6))


def test_a_bad_row_stops_the_run_and_what_was_trained_is_kept(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = bad_rows(tmp_path / "r.jsonl", {18})
    options = {"streaming": True, "streaming_window": 4, "max_steps": 6}
    with pytest.raises(DataError) as caught:
        run(tiny_llama_dir, rows, tmp_path / "out", **options)
    assert caught.value.details == (f"{rows}:18: no answer ('output' is empty)",)
    assert caught.value.what == "1 of 4 rows cannot be used"
    assert (tmp_path / "out" / "checkpoint-4" / "manifest.json").is_file()


def test_a_bad_first_row_stops_before_the_weights(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.training.run.build_trainer", lambda *args: pytest.fail("the weights are loaded"))
    rows = bad_rows(tmp_path / "r.jsonl", {1, 2, 3, 4})
    with pytest.raises(DataError, match="4 of 4 rows cannot be used"):
        run(tiny_llama_dir, rows, tmp_path / "out", streaming=True, streaming_window=4, max_steps=6)
    options = {"streaming": True, "streaming_window": 4, "max_steps": 6, "on_bad_row": "skip"}
    with pytest.raises(DataError, match="no row of the first 4 can be used"):
        run(tiny_llama_dir, rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_that_need_all_rows_are_refused_together(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl")
    with pytest.raises(UsageError) as caught:
        run(tiny_llama_dir, rows, tmp_path / "out", streaming=True, num_train_epochs=2.0, eval_fraction=0.1)
    assert caught.value.details == (
        "--max_steps is not set, and how many rows there are is not known",
        "--num_train_epochs 2: a stream is read once",
        "--eval_fraction 0.1: give held-out rows with --eval_dataset_path",
    )


def test_standard_input_is_read_once(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_rows(tmp_path / "r.jsonl", 10).read_bytes()

    class Stdin:
        buffer = io.BytesIO(text)

    monkeypatch.setattr("sys.stdin", Stdin())
    options = {"streaming": True, "streaming_window": 4, "max_steps": 9, "dataset_path": ["-"]}
    result, said = run(tiny_llama_dir, tmp_path / "r.jsonl", tmp_path / "out", **options)
    assert result.num_steps == 3
    assert "the rows ended after step 3" in said
    steps = [entry["step"] for entry in log_of(tmp_path / "out")]
    assert all(b - a == 1 for a, b in pairwise(steps))


def test_processes_encode_a_step_between_them(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 40)
    wanted = [lines_of(stream(tiny_llama_dir, rows, rows_per_step=10), number) for number in range(4)]
    ranks = [stream(tiny_llama_dir, rows, rows_per_step=10, rank=rank, world=3) for rank in range(3)]
    first = [[row.line for row in steps.first_rows()] for steps in ranks]
    assert first == [wanted[0]] * 3  # the check of the first step has the same rows everywhere
    encoded: list[int] = []
    encode = Encoder.encode_batch
    monkeypatch.setattr(Encoder, "encode_batch", lambda self, rows: encoded.append(len(rows)) or encode(self, rows))
    for number in range(4):
        shares = [lines_of(steps, number) for steps in ranks]
        assert sorted(line for share in shares for line in share) == sorted(wanted[number])
        assert all(share for share in shares)
    assert sum(encoded) == 40


def test_a_bad_row_of_one_process_is_known_to_the_others(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", 12)
    with open(rows, "a", encoding="utf-8") as file:
        file.write('{"instruction": 1}\n')
    ranks = [stream(tiny_llama_dir, rows, rows_per_step=16, rank=rank, world=2) for rank in range(2)]
    found = [[row.line for row in steps[0].bad] for steps in ranks]
    assert sorted(map(len, found)) == [0, 1]
    assert [13] in found
