#!/usr/bin/env bash
# `quantize_dynamic` makes an invalid graph of a valid one that holds ONNX's own operator `Attention` (opset 23).
#
# One expects operators that the quantiser does not know to stay in float. It takes ONNX's `Attention`, though, for the
# operator of the same name in com.microsoft, and writes a QAttention whose inputs are others; the file is written without
# a word, and fails when a session opens it. ONNX has the operator since opset 23: export audio transformers with less if
# they are to be quantised, and attention becomes other operators.
# Seen on 2026-12-01 with onnxruntime 1.31.1 and onnx 1.23.2, on Linux for x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

rng = np.random.default_rng(0)
weights = [numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32), name) for name in "qkv"]
nodes = [helper.make_node("MatMul", ["x", name], [f"x{name}"], name=f"matmul_{name}") for name in "qkv"]
nodes.append(helper.make_node("Attention", ["xq", "xk", "xv"], ["y"], name="attention", q_num_heads=2, kv_num_heads=2))
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5, 16])
graph = helper.make_graph(nodes, "attention", [value("x")], [value("y")], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "float.onnx")
x = rng.standard_normal((1, 5, 16)).astype(np.float32)
session = onnxruntime.InferenceSession("float.onnx")
print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__, "opset 23, float:", session.run(None, {"x": x})[0].shape)
quantize_dynamic("float.onnx", "int8.onnx", weight_type=QuantType.QInt8)
print("operators of the quantised file:", sorted({f"{n.domain}:{n.op_type}" for n in onnx.load("int8.onnx").graph.node}))
try:
    onnxruntime.InferenceSession("int8.onnx")
except Exception as error:
    print("opening it:", type(error).__name__, str(error).splitlines()[0][:160])
else:
    raise SystemExit("the quantised file opens now")
PYTHON
