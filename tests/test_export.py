"""sodfast export: what other runtimes get is the source, at any batch and size."""

import sys

import pytest
import torch
from command_line import run

import sodfast
from sodfast.export import export


@pytest.fixture
def model(small_csnet):
    return small_csnet()


@torch.no_grad()
def test_onnx_has_plain_ops_and_dynamic_sizes(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "x.onnx"
    assert export(model, path) < 1e-4
    graph = onnx.load(path)
    assert {entry.domain for entry in graph.opset_import} == {""}
    assert {node.domain for node in graph.graph.node} == {""}
    session = runtime.InferenceSession(path)
    for shape in ((1, 3, 48, 80), (3, 3, 112, 32)):
        x = torch.randn(shape)
        (got,) = session.run(["logits"], {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pt2_from_the_command_line(model, tmp_path, capsys):
    sodfast.save(model, tmp_path / "x.safetensors")
    path = tmp_path / "x.pt2"
    status, out, err = run(capsys, "export", tmp_path / "x.safetensors", "-o", path)
    assert status == 0, err
    assert "within" in out
    program = torch.export.load(path).module()
    x = torch.randn(3, 3, 64, 48)
    torch.testing.assert_close(program(x), model(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sodfast_file(compiled, model, tmp_path):
    path = tmp_path / "x.sodfast"
    assert export(model, path) < 1e-4
    x = torch.randn(1, 3, 64, 48)
    assert torch.equal(sodfast.load_plan(path)(x), sodfast.fuse(model)(x))


def test_nothing_wrong_is_written(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in \.onnx, \.pt2, \.sodfast"):
        export(model, tmp_path / "x.tflite")
    monkeypatch.setitem(
        export.__globals__["_WRITERS"], ".pt2", lambda *_: (b"", lambda x: torch.zeros(1))
    )
    with pytest.raises(ValueError, match="not written, because its logits differ"):
        export(model, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    pytest.importorskip("onnx")
    with pytest.raises(ModuleNotFoundError, match="onnxruntime"):
        export(model, tmp_path / "x.onnx")
