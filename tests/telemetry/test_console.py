import io

from fiberpo_megatron.telemetry.console import Console, format_line


def test_a_line_has_the_numbers_that_matter_and_skips_missing_ones():
    metrics = {
        "reward/mean": 0.4123,
        "accuracy": 0.5,
        "seconds/total": 2.345,
        "ratio/p99": float("nan"),
        "x": 1,
    }
    line = format_line(12, "train", metrics, 150)
    assert line == "step  12/150  reward 0.412  acc 50.0 %  ratio p99 nan  time 2.35 s"
    assert format_line(0, "eval", {"accuracy": 0.25}, 9) == "eval 0/9  held-out accuracy 25.0 %"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_whole_lines_with_the_time_left():
    file, clock = io.StringIO(), Clock()
    console = Console("train", total_steps=10, first_step=4, file=file, clock=clock)
    clock.now = 60.0
    console.write(4, "train", {"reward/mean": 0.5, "note": "text"})
    console.write(5, "eval", {"accuracy": 1.0})
    console.close()
    assert file.getvalue().splitlines() == [
        "step  5/10  reward 0.5  left 5:00",
        "eval  5/10  held-out accuracy 100.0 %",
    ]


def test_a_very_long_line_is_not_folded():
    file = io.StringIO()
    console = Console("t", total_steps=1, file=file)
    names = [
        "reward/mean",
        "accuracy",
        "entropy",
        "ratio/p99",
        "token/clip_share",
        "gradient_norm",
        "seconds/total",
    ]
    console.write(0, "train", dict.fromkeys(names, 123.456))
    assert len(file.getvalue().splitlines()) == 1


def test_supervised_steps_are_thinned_out_but_the_last_is_shown():
    file, clock = io.StringIO(), Clock()
    console = Console("sft", total_steps=100, file=file, clock=clock)
    for step in range(100):
        clock.now += 0.125
        console.write(step, "sft", {"loss": 1.0})
    shown = [int(line.split()[1].split("/")[0]) for line in file.getvalue().splitlines()]
    assert shown == [1, 17, 33, 49, 65, 81, 97, 100]


def test_a_terminal_has_a_progress_bar_under_the_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = Console("demo", total_steps=3, file=file)
    console.write(1, "train", {"reward/mean": 0.5})
    console.close()
    shown = file.getvalue()
    assert "step 2/3  reward 0.5" in shown and "demo" in shown and "left" not in shown
