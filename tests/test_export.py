"""Exported graphs, run by other runtimes, against the model on real audio."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, random_model
from test_cli import run

from m2d_embed import export
from m2d_embed.audio.clips import load_audio
from m2d_embed.config import FeatureConfig, HeadConfig
from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.export import DEFAULT_OPSET, ExportError, describe, export_onnx, export_program, layout
from m2d_embed.model.windows import cut

SMALL = replace(TINY, depth=2)
#: A window that ends in frames which no column holds, and so many of them that the model would like to keep them.
UNEVEN = replace(SMALL, name="m2d_vit_test-80x73p16x16", input_size=(80, 73))
LABELS = ("dog", "rain", "Türglocke")
#: Shorter than half an FFT, than a hop, than a patch; one window, almost, just over it; several, at all kinds of ends.
LENGTHS = (1, 37, 199, 200, 201, 399, 1000, 2559, 6000, 10_239, 10_240, 11_519, 11_520, 11_680, 11_681, 23_000, 47_321)


@pytest.fixture(scope="module")
def sounds() -> torch.Tensor:
    """Real audio, two channels of it: one as loud as can be, one nearly silent."""
    clips = [
        load_audio(DATA / "digits" / "7_theo_0.opus", 16_000),
        load_audio(DATA / "sounds" / "complete.oga", 16_000),
    ]
    alarm = load_audio(DATA / "sounds" / "alarm-clock-elapsed.oga", 16_000)
    samples = torch.from_numpy(np.concatenate([*clips, alarm]))
    return torch.stack([samples / samples.abs().max(), 1e-4 * samples.flip(0)])


def batches(sounds: torch.Tensor):
    for number, length in enumerate(LENGTHS):
        start = 1000 * number
        yield sounds[:, start : start + length] if number % 3 else sounds[:1, start : start + length]


def expected(model, audio: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        if kind == "timestamps":
            return tuple(model.timestamps(audio))
        return (model.scene(audio) if kind == "scene" else model.logits(audio).sigmoid(),)


def assert_same(run_graph, model, sounds: torch.Tensor, kind: str) -> None:
    for audio in batches(sounds):
        for got, wanted in zip(run_graph(audio), expected(model, audio, kind), strict=True):
            assert tuple(got.shape) == tuple(wanted.shape)
            torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=0, atol=1e-4)


def onnx_session(file: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def tagger(**head) -> torch.nn.Module:
    config = replace(UNEVEN, depth=1, head=HeadConfig(LABELS, **head))
    return random_model(config)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch_frames, windows", [(16, (64, 71, 72, 73, 79)), (4, (64, 66, 67)), (5, (27, 28)), (1, (7,))]
)
def test_layout_is_what_cut_and_interleave_do(patch_frames, windows):
    for window_frames in windows:
        config = replace(TINY, input_size=(80, window_frames), patch_size=(16, patch_frames))
        for hop_frames in (n for n in range(1, patch_frames + 1) if patch_frames % n == 0):
            shifts = range(0, patch_frames, hop_frames)
            for num_frames in range(1, 3 * window_frames + 20):
                cuts = [cut(num_frames, config, shift) for shift in shifts]
                columns = [sum(window.columns for window in windows) for windows in cuts]
                found = layout(num_frames, config, hop_frames)
                # as in `interleave`: as far as there is no gap
                assert found.embeddings == min(n * len(shifts) + i for i, n in enumerate(columns))
                assert found.width == min(-(-num_frames // patch_frames), config.grid_size[1])
                if len(shifts) == 1:
                    assert found.windows == len(cuts[0])


CASES = {
    "16x16": (SMALL, FeatureConfig()),
    "uneven window": (UNEVEN, FeatureConfig()),
    "mean and std": (UNEVEN, FeatureConfig(scene_pooling="mean_std")),
    "uneven window, fine hop": (UNEVEN, FeatureConfig(hop_ms=20)),
    "layers of the model": (replace(UNEVEN, layers=(0, 1)), FeatureConfig()),
    "16x4, layers": (
        replace(SMALL, input_size=(80, 70), patch_size=(16, 4)),
        FeatureConfig(layers=(0, -1), layer_pooling="concat", flat=True),
    ),
    "16x4, mean, hop": (replace(SMALL, patch_size=(16, 4)), FeatureConfig(layers=(0, 1), hop_ms=10)),
    "80x2, first layer": (replace(SMALL, patch_size=(80, 2)), FeatureConfig(layers=(0,))),
    "32 kHz": (
        replace(SMALL, sample_rate=32_000, n_fft=800, hop_length=320, f_max=16_000.0),
        FeatureConfig(flat=True, hop_ms=80),
    ),
}


@pytest.mark.parametrize("kind", ["scene", "timestamps"])
@pytest.mark.parametrize("case", CASES)
def test_graph_is_the_model(case, kind, sounds):
    config, features = CASES[case]
    model = random_model(config, features=features)
    graph = export._Graph(model, kind)
    with torch.no_grad():
        assert_same(graph, model, sounds, kind)


@pytest.mark.parametrize("head", [{}, {"features": "flat"}, {"scene_pooling": "mean_std"}])
def test_graph_of_a_classifier_is_the_model(head, sounds):
    model = tagger(**head)
    model.features = FeatureConfig(flat="features" not in head)  # not the head's
    with torch.no_grad():
        assert_same(export._Graph(model, "tags"), model, sounds, "tags")


def test_graph_of_a_single_label_classifier_gives_probabilities(sounds):
    model = tagger(multi_label=False)
    with torch.no_grad():
        (found,) = export._Graph(model, "tags")(sounds)
        torch.testing.assert_close(found, model.logits(sounds).softmax(-1), rtol=0, atol=1e-5)
    assert found.sum(1) == pytest.approx(1.0)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A model, and the ONNX file of its scene embeddings in the newest opset."""
    pytest.importorskip("onnxruntime")
    model = random_model(UNEVEN, features=FeatureConfig(layers=(0, -1), layer_pooling="concat"))
    return model, export_onnx(model, tmp_path_factory.mktemp("scenes") / "scenes.onnx", opset=25)


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """A model, its timestamp embeddings as ONNX in the oldest opset and as a program, and what the command printed."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("columns")
    features = FeatureConfig(layers=(0,), flat=True, hop_ms=20)
    model = random_model(replace(SMALL, patch_size=(16, 4)), features=features)
    model.save_pretrained(folder / "model")
    options = ("--kind", "timestamps", "--layers", "0", "--flat", "--hop-ms", "20", "--opset", "18")
    (folder / "written").mkdir()
    onnx, pt2 = folder / "written" / "columns.onnx", folder / "written" / "columns.pt2"
    result = run("export", "--onnx", onnx, "--pt2", pt2, "--model", folder / "model", *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return model, onnx, pt2, result.stdout


def test_onnx_scenes(scenes, sounds):
    model, written = scenes
    session = onnx_session(written.path)
    assert_same(lambda audio: session.run(None, {"audio": audio.numpy()}), model, sounds, "scene")
    assert written.opset == 25
    assert written.max_difference < 3e-5
    assert written.outputs == {"embeddings": ("batch", "320")}
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("audio", ["batch", "samples"])]
    assert [(x.name, x.shape) for x in session.get_outputs()] == [("embeddings", ["batch", 320])]


def test_onnx_timestamps_in_an_old_opset(columns, sounds):
    model, file, *_ = columns
    session = onnx_session(file)
    assert_same(lambda audio: session.run(None, {"audio": audio.numpy()}), model, sounds, "timestamps")
    shapes = {x.name: x.shape for x in session.get_outputs()}
    assert shapes == {"embeddings": ["batch", "columns", 32], "timestamps_ms": ["batch", "columns"]}
    onnx = pytest.importorskip("onnx")
    assert [(x.domain, x.version) for x in onnx.load(file).opset_import] == [("", 18)]


def test_onnx_is_one_valid_file_that_tells_what_it_is(scenes):
    onnx = pytest.importorskip("onnx")
    model, written = scenes
    assert [file.name for file in written.path.parent.iterdir()] == ["scenes.onnx"]
    assert written.num_bytes == written.path.stat().st_size > 4 * sum(p.numel() for p in model.parameters())
    proto = onnx.load(written.path, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    found = onnx_session(written.path).get_modelmeta().custom_metadata_map
    settings = json.loads(found.pop("settings"))
    assert settings["layers"] == [0, -1]
    assert settings["layer_pooling"] == "concat"
    assert settings["input_size"] == [80, 73]
    del found["m2d_embed_version"]
    assert found == {
        "model": "m2d_vit_test-80x73p16x16",
        "kind": "scene",
        "sample_rate": "16000",
        "embedding_size": "320",
        "source": "",
        "license": "",
    }


def test_the_default_file_can_be_quantised(scenes, sounds, tmp_path):
    """As its users do, in one line; from opset 23 on ONNX Runtime makes an invalid graph of the attention operator."""
    from onnxruntime.quantization import quantize_dynamic

    model, _ = scenes
    written = export_onnx(model, tmp_path / "model.onnx")
    assert written.opset == DEFAULT_OPSET
    quantize_dynamic(written.path, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < written.num_bytes
    (found,) = onnx_session(tmp_path / "int8.onnx").run(None, {"audio": sounds.numpy()})
    (wanted,) = expected(model, sounds, "scene")
    assert torch.cosine_similarity(torch.from_numpy(found), wanted).min() > 0.98


def test_onnx_runs_without_this_package(scenes, sounds, tmp_path):
    model, written = scenes
    np.save(tmp_path / "audio.npy", sounds[:, :20_000].numpy())
    script = (
        "import sys; sys.modules['torch'] = sys.modules['m2d_embed'] = None\n"
        "import numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(written.path)!r})\n"
        "(found,) = session.run(None, {'audio': np.load('audio.npy')})\n"
        "np.save('found.npy', found)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    (wanted,) = expected(model, sounds[:, :20_000], "scene")
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("which, kind", [("scenes", "scene"), ("columns", "timestamps")])
def test_openvino_runs_the_onnx_file(which, kind, sounds, request):
    openvino = pytest.importorskip("openvino")
    model, written, *_ = request.getfixturevalue(which)
    core = openvino.Core()
    file = written if which == "columns" else written.path
    # Its default is bfloat16 where the CPU has it.
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same(lambda audio: list(compiled([audio.numpy()]).values()), model, sounds, kind)


def test_program_of_timestamps(columns, sounds):
    model, _, file, _ = columns
    program = torch.export.load(file).module()
    assert_same(program, model, sounds, "timestamps")
    assert not program(sounds[:, :5000])[0].requires_grad
    with pytest.raises(RuntimeError, match="assertion failed"):
        program(torch.zeros(1, 0))


def test_program_holds_what_it_needs_and_no_pickle(columns):
    model, _, file, _ = columns
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert not any(content.startswith((b"\x80", b"PK")) for content in parts.values())  # pickles and torch.save
    weights = sum(len(content) for name, content in parts.items() if "/weights/weight_" in name)
    unread = sum(p.numel() for p in model.encoder.blocks[1].parameters())
    read = sum(p.numel() for p in model.parameters()) + model.encoder.pos_embed.numel() - unread
    assert weights == 4 * (read + 402 * 400)


def test_program_of_a_classifier(tmp_path, sounds):
    model = random_model(replace(SMALL, depth=1, patch_size=(80, 2), head=HeadConfig(LABELS)))
    written = export_program(model, tmp_path / "tags.pt2", "tags")
    assert [file.name for file in tmp_path.iterdir()] == ["tags.pt2"]
    found = {export.METADATA_FILE: ""}
    assert_same(torch.export.load(written.path, extra_files=found).module(), model, sounds, "tags")
    metadata = json.loads(found[export.METADATA_FILE])
    assert metadata["kind"] == "tags"
    assert json.loads(metadata["labels"]) == list(LABELS)


def test_files_tell_nothing_of_this_machine(columns):
    for file in columns[1:3]:
        content = file.read_bytes()
        if file.suffix == ".pt2":
            with zipfile.ZipFile(file) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        for private in (Path(__file__).parents[1], Path.home(), file.parent, "site-packages", "stack_trace"):
            assert str(private).encode() not in content
    assert sorted(file.name for file in columns[1].parent.iterdir()) == ["columns.onnx", "columns.pt2"]


def test_command_prints_what_it_wrote_and_how_to_use_it(columns, sounds):
    _, onnx, pt2, printed = columns
    shapes = "embeddings (batch, columns, 32), timestamps_ms (batch, columns)"
    heads = [line for line in printed.splitlines() if not line.startswith("    ")]
    for file, about, head in ((onnx, ", opset 18", heads[0]), (pt2, "", heads[1])):
        size = f"{file}: {file.stat().st_size / 1e6:.1f} MB{about}; audio (batch, samples) float32 at 16000 Hz -> "
        assert head.startswith(f"{size}{shapes}; differs from the model by at most ")
    example = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(example) == 6
    for lines, audio in ((example[:3], sounds[:, :9000].numpy()), (example[3:], sounds[:, :9000])):
        names = {"audio": audio}
        exec("\n".join(lines), names)
        assert names["embeddings"].shape == (2, 28, 32)
        assert names["timestamps_ms"][1][:2].tolist() == [15.0, 35.0]


@pytest.mark.slow
def test_bundled_model(bundled, sounds, tmp_path):
    pytest.importorskip("onnxruntime")
    session = onnx_session(export_onnx(bundled, tmp_path / "bundled.onnx").path)
    assert_same(lambda audio: session.run(None, {"audio": audio.numpy()}), bundled, sounds, "scene")
    program = torch.export.load(export_program(bundled, tmp_path / "bundled.pt2", "timestamps").path).module()
    assert_same(program, bundled, sounds, "timestamps")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 22, 23, 24])
def test_onnx_of_a_classifier_in_other_opsets(opset, sounds, tmp_path):
    model = tagger()
    session = onnx_session(export_onnx(model, tmp_path / "tags.onnx", "tags", opset).path)
    assert_same(lambda audio: session.run(None, {"audio": audio.numpy()}), model, sounds, "tags")
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == list(LABELS)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_differs_from_the_model_is_not_kept(scenes, tmp_path, monkeypatch):
    _, written = scenes
    (tmp_path / "old.onnx").write_text("an earlier file")
    onnx = pytest.importorskip("onnx")
    other = random_model(UNEVEN, seed=1, features=FeatureConfig(layers=(0, -1), layer_pooling="concat"))
    with monkeypatch.context() as patch:
        patch.setattr(export, "_as_onnx", lambda graph, opset: onnx.load(written.path))
        with pytest.raises(ExportError, match=r"old\.onnx \(1 x .* samples\): embeddings differ .* not kept"):
            export_onnx(other, tmp_path / "old.onnx", overwrite=True)
        with pytest.raises(ExportError, match=r"embeddings are of shape \(1, 320\), the model's of \(1, 160\)"):
            export_onnx(random_model(UNEVEN), tmp_path / "new.onnx")
        assert written.path.read_bytes() == onnx.load(written.path).SerializeToString()
    assert [file.name for file in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_text() == "an earlier file"


def test_nan_is_a_difference(tmp_path, monkeypatch):
    model = random_model(replace(SMALL, depth=1))
    graph = export._Graph(model, "scene")
    broken = lambda audio: [torch.full((len(audio), 160), torch.nan)]  # noqa: E731
    with pytest.raises(ExportError, match="differ"):
        export._check(graph, model, broken, tmp_path / "x.onnx")


def test_an_export_that_does_not_run_is_reported(tmp_path, tiny):
    def fail(audio):
        raise RuntimeError

    with pytest.raises(ExportError, match=r"samples\): the export does not run \(RuntimeError: \)"):
        export._check(export._Graph(tiny, "scene"), tiny, fail, tmp_path / "x.onnx")


def test_a_runtime_that_cannot_load_is_reported(tmp_path, monkeypatch, tiny):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_as_onnx", lambda graph, opset: onnx.ModelProto())
    with pytest.raises(ExportError, match=r"ONNX Runtime .* does not load the model .*lower opset"):
        export_onnx(tiny, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_cannot_trace_is_reported(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ExportError, match=r"could not trace the model \(RuntimeError: no such thing\)"):
        export_program(random_model(SMALL), tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_paths_and_options(tmp_path, tiny):
    (tmp_path / "there.onnx").touch()
    (tmp_path / "folder.pt2").mkdir()
    for write, path, options, message in [
        (export_onnx, tmp_path / "x.pt2", {}, "ends in .onnx"),
        (export_program, tmp_path / "x.onnx", {}, "ends in .pt2"),
        (export_onnx, tmp_path / "there.onnx", {}, "exists"),
        (export_onnx, tmp_path / "no" / "x.onnx", {}, "does not exist"),
        (export_program, tmp_path / "folder.pt2", {"overwrite": True}, "is a folder"),
        (export_onnx, tmp_path / "x.onnx", {"opset": 17}, "opset 17"),
        (export_onnx, tmp_path / "x.onnx", {"opset": 26}, "18 to 25"),
        (export_program, tmp_path / "x.pt2", {"kind": "frames"}, "'frames'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            write(tiny, path, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.pt2", "there.onnx"]


def test_models_that_cannot_be_exported(tmp_path, tiny):
    with pytest.raises(UnsupportedError, match="no tagging head"):
        export_program(tiny, tmp_path / "x.pt2", "tags")
    with pytest.raises(ConfigError, match="training mode"):
        export_program(tiny.train(), tmp_path / "x.pt2")
    with pytest.raises(UnsupportedError, match=r"bfloat16 on cpu; load it with .*dtype=.fp32"):
        export_program(tiny.eval().set_dtype(torch.bfloat16), tmp_path / "x.pt2")


def test_missing_packages_and_too_many_weights(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(export, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match=r"do not fit one ONNX file; export a \.pt2"):
        export_onnx(tiny, tmp_path / "x.onnx")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"onnx is not installed: pip install 'm2d-embed\[onnx\]'"):
        export_onnx(tiny, tmp_path / "x.onnx")


def test_command_refuses_what_makes_no_sense(tmp_path):
    (tmp_path / "there.pt2").touch()
    onnx = tmp_path / "x.onnx"
    for arguments, message in [
        ((), "--onnx FILE.onnx"),
        (("--onnx", onnx, "--hop-ms", "80"), "--kind timestamps"),
        (("--onnx", onnx, "--kind", "tags", "--flat"), "leave out"),
        (("--onnx", onnx, "--kind", "tags"), "no tagging head"),
        (("--onnx", onnx, "--kind", "timestamps", "--hop-ms", "33"), "hop_ms=33"),
        (("--pt2", tmp_path / "x.pt2", "--opset", "20"), "--opset is for --onnx"),
        (("--pt2", tmp_path / "there.pt2"), "exists"),
        (("--onnx", onnx, "--pt2", tmp_path / "there.pt2"), "exists"),
    ]:
        result = run("export", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["there.pt2"]


def test_description_of_a_program(tmp_path):
    outputs = {"embeddings": ("batch", "columns", "32"), "timestamps_ms": ("batch", "columns")}
    text = describe(export.Export(Path("m.pt2"), 32_000, 1_250_000, outputs, None, 2.3e-6))
    assert text.splitlines()[0] == (
        "m.pt2: 1.2 MB; audio (batch, samples) float32 at 32000 Hz -> embeddings (batch, columns, 32), "
        "timestamps_ms (batch, columns); differs from the model by at most 2e-06"
    )
    assert "embeddings, timestamps_ms = program(audio)" in text
