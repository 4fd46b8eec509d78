import csv
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from comparison.campaign import PlannedRun, execute, plan, require_same_settings, stop_reason, unfinished
from comparison.measures import FINISHED, Outcome, Run, load_ended, measure, outcomes, read_outcome, spread
from comparison.plots import PANELS, mean_line, write_plots
from comparison.tables import markdown_table, write_tables

from fiberpo_megatron.config import dump_config
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineUnreachable
from fiberpo_megatron.telemetry.report.run_data import Series
from fiberpo_megatron.telemetry.sinks import JsonlSink

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/stability/stability.toml"


def run_folder(
    folder: Path,
    *,
    held_out: Sequence[float],
    accuracy: Sequence[float],
    ratio_max: Sequence[float] = (2.0, 3.0),
    outcome: str = FINISHED,
) -> Path:
    """A run folder with one training step per value of `accuracy`, and evaluations after 0, 1, 2, ... steps."""
    with closing(JsonlSink(folder / "metrics.jsonl")) as sink:
        for step, value in enumerate(held_out):
            sink.write(step, "eval", {"accuracy": value})
        for step, value in enumerate(accuracy):
            metrics = {
                "accuracy": value,
                "entropy": 0.5 - step / 10,
                "ratio/mean": 1.0,
                "ratio/p99": 1.5,
                "ratio/max": ratio_max[min(step, len(ratio_max) - 1)],
                "gradient_norm": 1.0,
                "gradient_norm_max": 4.0 - step,
                "seconds/total": 2.0,
            }
            sink.write(step, "train", metrics)
    Outcome(outcome, 12.34).write(folder)
    return folder


def ended(objective: str, seed: int, folder: Path) -> Run:
    run = load_ended(objective, seed, folder)
    assert run is not None
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two finished runs of grpo; of gspo one that finished and one that stopped in its second step."""
    grpo_1 = run_folder(tmp_path / "a", held_out=[0.4, 0.6, 0.5], accuracy=[0.4, 0.5, 0.6])
    grpo_2 = run_folder(tmp_path / "b", held_out=[0.4, 0.5, 0.7], accuracy=[0.4, 0.6, 0.8], ratio_max=[9.0, 5.0])
    gspo_1 = run_folder(tmp_path / "c", held_out=[0.4, 0.3], accuracy=[0.4, 0.3])
    gspo_2 = run_folder(tmp_path / "d", held_out=[0.4], accuracy=[0.2], outcome="stopped: x is not | finite")
    return [ended("grpo", 1, grpo_1), ended("grpo", 2, grpo_2), ended("gspo", 1, gspo_1), ended("gspo", 2, gspo_2)]


def test_measures_of_a_run(runs: list[Run]):
    result = measure(runs[0])
    assert (result.held_out_before, result.held_out_final, result.held_out_best) == (0.4, 0.5, 0.6)
    assert result.accuracy_last == pytest.approx(0.5)
    assert (result.ratio_max, result.gradient_norm_max) == (3.0, 4.0)
    assert result.entropy_end == pytest.approx(0.3)
    assert (result.steps, result.seconds) == (3, 12.3)


def test_the_last_accuracy_covers_ten_steps(tmp_path: Path):
    folder = run_folder(tmp_path / "long", held_out=[], accuracy=[0.0] * 5 + [1.0] * 10)
    assert measure(ended("grpo", 1, folder)).accuracy_last == 1.0


def test_a_stopped_run_has_no_final_accuracy_and_values_that_are_not_finite_do_not_count(tmp_path: Path):
    folder = run_folder(
        tmp_path / "r", held_out=[0.4], accuracy=[0.5, 0.1], ratio_max=[7.0, float("nan")], outcome="stopped: nan"
    )
    result = measure(ended("grpo", 1, folder))
    assert (result.held_out_final, result.held_out_best) == (None, None)
    assert result.ratio_max == 7.0


def test_spread_is_the_sample_deviation():
    value = spread([1.0, None, 3.0])
    assert value is not None
    assert (value.mean, value.deviation, value.count) == (2.0, pytest.approx(2**0.5), 2)
    assert spread([None]) is None
    single = spread([5.0])
    assert single is not None
    assert single.deviation is None


def test_table(runs: list[Run]):
    head, rule, grpo, gspo = markdown_table([measure(run) for run in runs]).splitlines()
    assert head.count("|") == rule.count("|") == grpo.count("|") == gspo.count("|") - 1  # an escaped one in the reason
    assert grpo == (
        "| grpo | 2 | 40.0 ± 0.0 % | 60.0 ± 14.1 % | 65.0 ± 7.1 % | 55.0 ± 7.1 % | 6 ± 4.24 | 4 ± 0 | 0.3 ± 0 "
        "| 2 finished |"
    )
    assert gspo.startswith("| gspo | 2 | 40.0 ± 0.0 % | 30.0 % | 30.0 % |")
    assert "1 finished; seed 2 stopped after 1 steps: x is not \\| finite" in gspo


def test_files(runs: list[Run], tmp_path: Path):
    results = [measure(run) for run in runs]
    table, csv_file, summary = write_tables(results, {"steps": 3}, tmp_path / "out")
    assert table.read_text() == markdown_table(results) + "\n"
    rows = list(csv.DictReader(csv_file.open()))
    assert [(row["objective"], row["seed"], row["held_out_final"]) for row in rows] == [
        ("grpo", "1", "0.5"),
        ("grpo", "2", "0.7"),
        ("gspo", "1", "0.3"),
        ("gspo", "2", ""),
    ]
    content = json.loads(summary.read_text())
    assert content["objectives"]["gspo"]["held_out_final"] == {"mean": 0.3, "deviation": None, "count": 1}
    assert content["objectives"]["gspo"]["outcome"] == outcomes(results[2:])


def test_plots(runs: list[Run], tmp_path: Path):
    path = write_plots(runs, "3 steps", tmp_path / "out")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    metrics = {(panel.kind, panel.metric) for panel in PANELS}
    assert all(runs[0].series(kind, metric) is not None for kind, metric in metrics)


def test_the_mean_line_ends_where_the_first_seed_ends():
    long = Series(np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0]))
    short = Series(np.array([1, 2, 3]), np.array([3.0, 6.0, np.nan]))
    mean = mean_line([long, short])
    assert mean.steps.tolist() == [1, 2]
    assert mean.values.tolist() == [2.0, 4.0]


def planned(folder: Path, *overrides: str) -> list[PlannedRun]:
    return plan(["fiberpo", "grpo"], [1, 2], folder, CONFIG, overrides)


def test_runs_differ_in_objective_and_seed_only(tmp_path: Path):
    configs = [run.config() for run in planned(tmp_path, "--trainer.steps", "5")]
    assert [(c.algorithm.objective.use, c.run.seed) for c in configs] == [
        ("fiberpo", 1),
        ("grpo", 1),
        ("fiberpo", 2),
        ("grpo", 2),
    ]
    assert len({c.run.folder for c in configs}) == 4
    rest = [c.model_dump(exclude={"run": {"folder", "seed"}, "algorithm": {"objective"}}) for c in configs]
    assert all(other == rest[0] for other in rest)
    assert rest[0]["trainer"]["steps"] == 5


def test_an_objective_may_have_options_of_its_own(tmp_path: Path):
    tuned, default = plan(["grpo epsilon=[0.2,0.1]", "gspo"], [1], tmp_path, CONFIG, [])
    assert (tuned.name, tuned.folder.name) == ("grpo epsilon=[0.2,0.1], seed 1", "grpo-epsilon=-0.2-0.1--seed1")
    assert tuned.config().algorithm.objective.use == "grpo"
    assert tuned.config().algorithm.epsilon == (0.2, 0.1)
    assert default.config().algorithm.epsilon is None
    with pytest.raises(ValueError, match="'epsilon' is no option; write NAME KEY=VALUE"):
        plan(["grpo epsilon"], [1], tmp_path, CONFIG, [])


def test_the_shipped_setting_is_off_policy():
    batch = planned(Path("unused"))[0].config().batch
    assert batch.epochs * batch.mini_batches in (8, 16)


def test_another_setting_needs_another_folder(tmp_path: Path):
    run = planned(tmp_path)[0]
    require_same_settings(run)  # nothing there yet
    run.folder.mkdir()
    made = run.config().model_dump()
    made["rollout"]["engine"]["urls"] = ["http://127.0.0.1:1"]  # the engine's address is no setting
    (run.folder / "config.toml").write_text(dump_config(type(run.config()).model_validate(made)))
    require_same_settings(run)
    changed = planned(tmp_path, "--optimizer.learning_rate", "5e-5")[0]
    with pytest.raises(ValueError, match=r"other settings \(optimizer.learning_rate\); choose another --folder"):
        require_same_settings(changed)


def test_ended_runs_are_skipped_and_stopped_ones_repeated_on_request(tmp_path: Path):
    first, second, third, fourth = planned(tmp_path)
    run_folder(first.folder, held_out=[], accuracy=[0.5])
    run_folder(second.folder, held_out=[], accuracy=[0.5], outcome="stopped: nan")
    assert unfinished([first, second, third, fourth], retry_stopped=False) == [third, fourth]
    assert unfinished([first, second, third, fourth], retry_stopped=True) == [second, third, fourth]
    assert read_outcome(second.folder) is None


@pytest.fixture
def engine() -> Iterator[EngineAddress]:
    """A server that answers every GET."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield EngineAddress(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def program(tmp_path: Path, text: str) -> list[str]:
    """A stand-in for the CLI that writes its arguments to argv.json and then runs `text`."""
    file = tmp_path / "program.py"
    file.write_text(f"import json, sys\njson.dump(sys.argv[1:], open({str(tmp_path / 'argv.json')!r}, 'w'))\n{text}\n")
    return [sys.executable, str(file)]


def test_a_finished_run(tmp_path: Path, engine: EngineAddress):
    run = planned(tmp_path)[1]
    outcome = execute(run, engine, lambda _: None, program(tmp_path, ""))
    assert outcome.text == FINISHED
    assert read_outcome(run.folder) is not None
    words = json.loads((tmp_path / "argv.json").read_text())
    assert words[:2] == ["train", str(CONFIG)]
    assert "--resume" not in words
    assert words[-2:] == ["--rollout.engine.urls", f'["{engine.url}"]']


def test_an_interrupted_run_goes_on(tmp_path: Path, engine: EngineAddress):
    run = planned(tmp_path)[0]
    run_folder(run.folder, held_out=[], accuracy=[0.5])
    execute(run, engine, lambda _: None, program(tmp_path, ""))
    assert json.loads((tmp_path / "argv.json").read_text())[2] == "--resume"


def test_a_run_that_raises_is_recorded_as_stopped(tmp_path: Path, engine: EngineAddress):
    failing = "print('fiberpo: rank 0: step 3: the gradient of w is not finite', file=sys.stderr); sys.exit(1)"
    run = planned(tmp_path)[0]
    outcome = execute(run, engine, lambda _: None, program(tmp_path, failing))
    assert outcome.text == "stopped: step 3: the gradient of w is not finite"
    assert read_outcome(run.folder) == Outcome(outcome.text, pytest.approx(outcome.seconds, abs=0.1))


@pytest.mark.parametrize("code", [2, 130])
def test_a_refused_config_or_a_signal_is_no_result(tmp_path: Path, engine: EngineAddress, code: int):
    run = planned(tmp_path)[0]
    with pytest.raises(RuntimeError, match=f"exit code {code}"):
        execute(run, engine, lambda _: None, program(tmp_path, f"sys.exit({code})"))
    assert read_outcome(run.folder) is None


def test_a_run_that_lost_its_engine_is_no_result(tmp_path: Path):
    run = planned(tmp_path)[0]
    with pytest.raises(EngineUnreachable):
        execute(run, EngineAddress("http://127.0.0.1:1"), lambda _: None, program(tmp_path, "sys.exit(1)"))
    assert read_outcome(run.folder) is None


def test_a_run_that_lost_one_connection_is_no_result(tmp_path: Path, engine: EngineAddress):
    lost = "fiberpo: rank 0: EngineUnreachable: engine http://e: the connection was lost during POST /generate"
    failing = f"print({lost!r}, file=sys.stderr); sys.exit(1)"
    run = planned(tmp_path)[0]
    with pytest.raises(RuntimeError, match="connection was lost.*the same command goes on with this run"):
        execute(run, engine, lambda _: None, program(tmp_path, failing))
    assert read_outcome(run.folder) is None


def test_stop_reason():
    assert stop_reason("step 1\nfiberpo: rank 1: bad value \n  | trace\nfiberpo: log of that rank: x\n") == "bad value"
    assert stop_reason("") == "no message"
