"""What ``benchmarks/speed.py`` compares: one model in several runtimes, waveform in, scene embeddings out.

All have the same shape, and where weights can be shared the same weights; each may use all threads.

* reference style: a timm-style ViT in float32 behind nnAudio's spectrogram, window after window.
* m2d-embed: this package in each of its modes.
* ONNX Runtime, OpenVINO: what ``m2d-embed export --onnx`` writes; int8: by ONNX Runtime's dynamic quantisation.
* AST: transformers' Audio Spectrogram Transformer (arXiv 2104.01778) of the size of a ViT-Base, with its own feature
  extractor; it hears 10.24 s at a time, so longer clips are cut, and shorter ones padded by the extractor.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import m2d_embed
from benchmarks.reference_style import ReferenceStyle
from m2d_embed.backends.devices import DTYPES
from m2d_embed.backends.selection import supports_int8
from m2d_embed.config import ModelConfig
from m2d_embed.export import export_onnx
from m2d_embed.m2d import M2D

Run = Callable[[Tensor], Any]
#: Which products of the processor's units limit a runtime.
UNITS = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp32", "int8": "int8"}
REFERENCE = "reference style, fp32"
_AST_SECONDS = 10.24
_SEED = 0


def load(name: str) -> M2D:
    """A ViT-Base of random weights ("base"), or the bundled model ("bundled")."""
    if name == "bundled":
        return m2d_embed.load_model(device="cpu")
    torch.manual_seed(_SEED)
    return M2D(ModelConfig()).eval()


def runtimes(name: str, device: str) -> list[str]:
    """The names of all runtimes that a model can be run in here."""
    ours = ["m2d-embed, fp32", "m2d-embed, bf16"]
    ast = ["transformers AST, fp32"] if name == "base" and importlib.util.find_spec("transformers") else []
    if device != "cpu":
        return [REFERENCE, *ours, "m2d-embed, bf16, compiled", *ast]
    ours.append("m2d-embed, fp16")
    if supports_int8():
        ours.append("m2d-embed, int8")
    others = []
    if importlib.util.find_spec("onnxruntime"):
        others += ["ONNX Runtime, fp32", "ONNX Runtime, int8"]
    if importlib.util.find_spec("openvino"):
        others += ["OpenVINO, fp32", "OpenVINO, bf16"]
    return [REFERENCE, *ours, *others, *ast]


def build(runtime: str, name: str, device: str, folder: Path) -> Run:
    """A runtime with a model in it: (B, samples) float32 on the device -> embeddings.

    Args:
        runtime: one of ``runtimes``.
        name: as for ``load``.
        device: of PyTorch's runtimes.
        folder: for exported files; they are made once.
    """
    family, *settings = runtime.split(", ")
    if family == "transformers AST":
        return _build_ast(device)
    if family == "reference style":
        return ReferenceStyle(load(name).config).eval().to(device)
    if family == "m2d-embed":
        model = load(name).to(device).set_dtype(DTYPES[settings[0]])
        return model.compile_encoder().scene if "compiled" in settings else model.scene
    file = exported(name, folder)
    if family == "OpenVINO":
        return _build_openvino(file, settings[0])
    return _build_onnxruntime(quantized(file) if settings[0] == "int8" else file)


def exported(name: str, folder: Path) -> Path:
    """The ONNX file of a model, made if it is not there."""
    file = folder / f"{name}.onnx"
    if not file.exists():
        export_onnx(load(name), file)
    return file


def quantized(file: Path) -> Path:
    """An ONNX file with int8 matrices, and inputs rounded as they come, made of another if it is not there."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = file.with_name(f"{file.stem}-int8.onnx")
    if not made.exists():
        quantize_dynamic(file, made, weight_type=QuantType.QInt8)
    return made


def _build_onnxruntime(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda audio: session.run(["embeddings"], {"audio": audio.numpy()})


def _build_openvino(file: Path, precision: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    compiled = openvino.compile_model(file, "CPU", settings)
    return lambda audio: compiled(audio.numpy())


def _build_ast(device: str) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    model: Any = ASTModel(ASTConfig())
    extractor: Any = ASTFeatureExtractor  # transformers' classes are not annotated
    return partial(_run_ast, model.eval().to(device), extractor())


def _run_ast(model: Any, extractor: Any, audio: Tensor) -> Tensor:
    rate = extractor.sampling_rate
    pieces = [piece for clip in audio.cpu().numpy() for piece in _pieces(clip, round(_AST_SECONDS * rate))]
    features = extractor(pieces, sampling_rate=rate, return_tensors="pt")["input_values"]
    output: Tensor = model(features.to(model.device)).last_hidden_state
    return output


def _pieces(clip: np.typing.NDArray[np.float32], length: int) -> list[np.typing.NDArray[np.float32]]:
    return [clip[start : start + length] for start in range(0, len(clip), length)]
