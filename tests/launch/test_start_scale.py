"""What 1,024 ranks do at a start: one of them reads for all, and the store is asked a few times by each."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from fiberpo_megatron import rendezvous
from fiberpo_megatron.cli import rank as rank_module
from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.doctor import ranks as doctor
from fiberpo_megatron.doctor.examination import before_a_run
from fiberpo_megatron.engines.addresses import free_ports
from fiberpo_megatron.rendezvous import first_ranks_text
from tests.counting_store import CountingStore

ROOT = Path(__file__).parents[2]
RANKS = 1024
MINUTE = timedelta(minutes=1)


def on_all_ranks(work):
    """The results of 1,024 ranks that run at the same time, rank 0 last, as when its machine is slow."""
    with ThreadPoolExecutor(RANKS) as pool:
        others = [pool.submit(work, rank) for rank in range(1, RANKS)]
        return [pool.submit(work, 0).result(), *(other.result() for other in others)]


def test_one_rank_reads_the_config():
    store, reads = CountingStore(), []

    def read() -> str:
        reads.append(1)
        return "settings \u2028 é"

    said = on_all_ranks(lambda rank: first_ranks_text("the config", read, MINUTE, store, rank))
    assert set(said) == {"settings \u2028 é"} and len(reads) == 1
    assert store.calls <= 2 * RANKS


def test_one_rank_of_the_doctor_reads_what_all_say():
    store = CountingStore()
    said = on_all_ranks(lambda rank: doctor.gather(store, rank, RANKS, 60.0, {"host": f"n{rank // 8}"}))
    present, missing = said[0]
    assert len(present) == RANKS and present[1023] == {"host": "n127"}
    assert all(each == ({}, []) for each in said[1:]) and missing == []
    assert store.calls <= 6 * RANKS


def test_the_ranks_behind_the_first_check_no_software(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(doctor, "meet", lambda timeout: [])
    monkeypatch.setattr("fiberpo_megatron.doctor.examination._software", lambda config: pytest.fail("it looked"))
    assert before_a_run(load_config(ROOT / "examples/demo/train.toml")) == []


def test_a_failure_of_rank_0_and_its_silence_are_said():
    store = CountingStore()
    with pytest.raises(ValueError, match="odd value"):
        first_ranks_text("the config", lambda: str(int("odd value")), MINUTE, store, 0)
    with pytest.raises(RuntimeError, match="reading the config failed on rank 0: .*odd value"):
        first_ranks_text("the config", str, MINUTE, store, 1)
    with pytest.raises(TimeoutError, match=r"rank 0 did not share the model within 0\.01 s"):
        first_ranks_text("the model", str, timedelta(seconds=0.01), store, 1)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.toml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_comes_back_from_the_text_that_is_shared(path: Path):
    config = load_config(path)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_only_rank_0_opens_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the real store: rank 1's machine need not even have it."""
    (port,) = free_ports(1, "127.0.0.1")
    values = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_stores", [])
    demo, missing = ROOT / "examples/demo/train.toml", tmp_path / "missing.toml"
    monkeypatch.setenv("RANK", "0")
    first = rank_module.shared_config(demo, ["--run.seed", "41"])
    monkeypatch.setenv("RANK", "1")
    assert rank_module.shared_config(missing, []) == first and first.run.seed == 41
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="missing.toml does not exist"):
        rank_module.shared_config(missing, [])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="reading the config failed on rank 0: config file .* does not exist"):
        rank_module.shared_config(demo, [])
