#!/usr/bin/env python3
"""Measure how long a worker of `chat` takes to open a large data set, and how much memory it then uses.

.venv/bin/python tools/bench_prompts.py --rows 1000000

It writes the data sets and a cache folder into a temporary folder, and opens each in new processes: at first without an
index, then with the index that the first process has kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import json, sys, time
from pathlib import Path
from fiberpo_megatron.environments.builtin.chat import Chat
start, cpu = time.perf_counter(), time.process_time()
chat = Chat(sys.argv[1], deduplicate=json.loads(sys.argv[2]))
opened, cpu = time.perf_counter() - start, time.process_time() - cpu
start = time.perf_counter()
for k in range(1000):
    chat.train(k * 7919 % chat.train_size)
read = (time.perf_counter() - start) / 1000
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
private, most = (int(status[name].split()[0]) / 1024 for name in ("RssAnon", "VmHWM"))
print(json.dumps([opened, cpu, private, most, read * 1e6]))
"""


def write(folder: Path, rows: int) -> list[Path]:
    """Write the same problems as JSON lines, as one parquet file of few row groups, and as a data set folder."""
    import datasets
    import pyarrow.parquet

    records = folder / "train.jsonl"
    with records.open("w") as file:
        for k in range(rows):
            prompt = (
                f"Problem {k}: a train leaves at {k % 24} o'clock with {k % 97} km/h. " + "How far does it get? " * 10
            )
            file.write(json.dumps({"prompt": prompt, "answer": k * 7 % 1000, "level": k % 5}) + "\n")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_json(str(records), cache_dir=str(folder / "datasets"))
    pyarrow.parquet.write_table(table.data.table, folder / "train.parquet")
    table.save_to_disk(folder / "saved")
    return [records, folder / "train.parquet", folder / "saved"]


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{name}/cache", "OMP_NUM_THREADS": "1"}
        print(
            "data set      | duplicates | index | opened in s | CPU s | private MiB | most MiB | us a task", flush=True
        )
        for path in write(Path(name), rows):
            for deduplicate in (False, True):
                for kept in ("made", "kept"):
                    command = [sys.executable, "-c", PROBE, str(path), json.dumps(deduplicate)]
                    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                    opened, cpu, private, most, read = json.loads(done.stdout.splitlines()[-1])
                    removed = "left out" if deduplicate else "kept"
                    row = f"{path.name:13} | {removed:10} | {kept:5} | {opened:11.2f} | {cpu:5.2f} | "
                    print(f"{row}{private:11.0f} | {most:8.0f} | {read:9.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
