"""What our code never does: unpickle what came over the network, evaluate text, or hand text to a shell."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fiberpo_megatron"
SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if "sglang_cpu" not in p.parts]
REFUSED = {
    # last part of a called name: why
    "eval": "runs text",
    "exec": "runs text",
    "loads": "pickle.loads of bytes from elsewhere runs code",
    "Unpickler": "runs code",
    "system": "hands text to a shell",
    "all_gather_object": "pickles over the network",
    "gather_object": "pickles over the network",
    "broadcast_object_list": "pickles over the network",
    "scatter_object_list": "pickles over the network",
    "send_object_list": "pickles over the network",
    "recv_object_list": "pickles over the network",
}
HARMLESS = {"json.loads", "tomllib.loads", "safetensors.torch.load"}
UNPICKLERS = {
    "certify/processes.py": "pipes that only it and the children hold that it started itself",
    "mcore/checkpoint/metadata.py": "its reader knows torch's classes alone and calls nothing",
}
"""The modules that may import pickle, and why that is safe."""


def calls(source: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(source.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def offences(source: Path) -> list[str]:
    found = []
    for name, call in calls(source):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        last = name.rpartition(".")[2]
        if name in HARMLESS:
            continue
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        elif options.get("shell", "False") != "False":
            found.append(f"line {call.lineno}: {name} with a shell")
        elif options.get("allow_pickle", "False") != "False":
            found.append(f"line {call.lineno}: {name} unpickles")
        elif last in REFUSED and not (last in ("eval", "exec") and "." in name):  # model.eval() is something else
            found.append(f"line {call.lineno}: {name} {REFUSED[last]}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_code_comes_from_data(source: Path):
    found = offences(source)
    if str(source.relative_to(PACKAGE)) == "certify/processes.py":
        found = [offence for offence in found if "pickle.loads" not in offence]
    assert not found


def test_two_modules_alone_unpickle_and_no_model_folder_is_trusted():
    text = {str(source.relative_to(PACKAGE)): source.read_text() for source in PACKAGE.rglob("*.py")}
    unpicklers = [name for name, source in text.items() if re.search(r"^\s*(import|from) .*pickle", source, re.M)]
    assert sorted(unpicklers) == sorted(UNPICKLERS)
    everywhere = "\n".join(text.values())
    assert everywhere.count(".from_pretrained(") == 2  # the tokenizer, and the model of check-model
    assert re.findall(r"trust_remote_code\W+(\w+)", everywhere).count("False") == 2
    assert "trust_remote_code=True" not in everywhere


def test_the_check_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.test_security.PACKAGE", tmp_path)
    bad = [
        "import pickle, torch, subprocess, numpy as np, torch.distributed as dist",
        "pickle.loads(b'')",
        "dist.broadcast_object_list([])",
        "torch.load('x')",
        "subprocess.run('x', shell=True)",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
    ]
    path = tmp_path / "bad.py"
    path.write_text("\n".join(bad))
    assert len(offences(path)) == len(bad) - 1
