"""The small model that the gate's parts are tried on."""

import pytest

from nanogpt_mac.cli import compose


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"line {i}: the quick brown fox, {i * i} lazy dogs\n" for i in range(300)))
    corpus = ("data=text", f"data.path={folder / 'text.txt'}", f"data.dir={folder / 'data'}")
    sizes = ("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "batch_size=3")
    return compose(["experiment=smoke", *corpus, *sizes, "model.bias=true", "backend=cpu", "compile=false"])
