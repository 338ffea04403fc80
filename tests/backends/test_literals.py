"""A back end is named by its twin and its own files: everything else, the registry included, asks what it can do."""

import ast

import pytest
from fakes.support import ROOT

from nanogpt_mac.backends.kinds import KINDS

PACKAGE = ROOT / "nanogpt_mac"
NAMES = KINDS.keys() | {here.device for kind in KINDS.values() for here in kind.devices}
FRAMEWORKS = sorted({kind.framework for kind in KINDS.values()})
OF_ONE = ("entry", "backend", "arrays", "nets", "parts", "world")  # NAME_backend.py and what lies beside it
OF_EACH = ("backends/{}_entry.py", "backends/{}_backend.py", "gpt/{}_gpt.py")
TWINS_AND_BACK_ENDS = {place.format(n) for n in FRAMEWORKS for place in OF_EACH}
ITS_OWN = TWINS_AND_BACK_ENDS | {f"backends/{n}_{of}.py" for n in FRAMEWORKS for of in OF_ONE}

# Rooms whose subject is one device: MPS, seen through torch, with the CPU beside it. No other back end is named there.
ABOUT_MPS = {
    "simulator": "it is the simulated MPS device",
    "operators": "the table of what MPS has, and what falls back to the CPU",
    "fallbacks": "what leaves the GPU under torch's MPS",
    "compile_report": "what Inductor made for MPS: calls of Metal kernels",
    "coverage": "the report on MPS, and its sweeps against the CPU",
}
ELSEWHERE = {  # file -> names, and why
    "backends/torch_choices.py": ({"cpu", "cuda", "mps"}, "how torch_backend.py runs on each of its devices"),
    "backends/by_hand/metal.py": ({"metal"}, "the name of Apple's framework, which PyObjC brings"),
    "backends/by_hand/torch_devices.py": ({"cuda"}, "where the kernels in Triton run"),
    "fallbacks/cuda_map.py": ({"cuda", "mps"}, "the device that a stranger's program asks for"),
    "gpt/pretrained.py": ({"cpu"}, "where torch.load puts a checkpoint: into the host's memory"),
    "compare/published.py": ({"cpu", "mps"}, "results that others published, in their words"),
    "suites/ops/rows.py": ({"cpu", "mps"}, "the columns of a published table"),
    "suites/nets/contents.py": ({"cpu", "mps"}, "the columns of a published table, and the field of CPU time"),
    "suites/nets/measured.py": ({"cpu"}, "the field of CPU time, of whichever back end"),
    "suites/nets/by_hand.py": ({"metal", "mps", "mlx", "cuda"}, "who submits kernels written by hand, in a way's name"),
    "suites/gemm/contents.py": ({"cpu"}, "the unit whose peak is cited, beside the GPU"),
}


def named(path):
    """(line, literal) of the string constants of a file that are a back end's or a device's name, and nothing else."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lower() in NAMES:
            yield node.lineno, node.value


def test_nothing_else_names_a_back_end():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in ITS_OWN:
            continue
        about_mps = {"mps", "simulated-mps", "cpu", "metal"} if name.split("/")[0] in ABOUT_MPS else set()
        allowed = about_mps | ELSEWHERE.get(name, (set(), ""))[0]
        found += [f"{name}:{line}: {literal!r}" for line, literal in named(path) if literal.lower() not in allowed]
    assert found == []


def test_the_registry_and_the_back_ends_are_found(tmp_path):
    """The test can fail: it sees the names where they are."""
    assert {literal for _, literal in named(PACKAGE / "backends/torch_entry.py")} >= {"mps", "cuda", "cpu"}
    assert {literal for _, literal in named(PACKAGE / "backends/mlx_backend.py")} == {"metal", "cuda", "cpu"}
    (tmp_path / "x.py").write_text('"""About mlx."""\nif backend == "MLX": print(f"{backend} mps")\n')
    assert list(named(tmp_path / "x.py")) == [(2, "MLX")]
    assert all((PACKAGE / name).exists() for name in (*TWINS_AND_BACK_ENDS, *ABOUT_MPS))
    for name, (names, _) in ELSEWHERE.items():
        assert {literal.lower() for _, literal in named(PACKAGE / name)} == names


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_entry_is_whole(kind):
    cls = kind.load() if kind.missing() is None else None
    assert cls is None or cls.__module__ == kind.cls.partition(":")[0]
    assert kind.devices
    for here in kind.devices:
        assert (here.framework, here.compiles) == (kind.framework, bool(kind.compiler))
        assert here.memory
        assert kind.on(here.device) is here
