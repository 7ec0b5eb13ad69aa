"""8-bit ONNX graphs: weights in blocks of 32 inputs, and activations that ONNX Runtime quantises as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 32


def quantise(path: Path) -> None:
    """Replace the weights of the projections and of a tied embedding by int8 weights, with one scale per 32 inputs.

    Level 4 makes ONNX Runtime quantise the activations too, dynamically, in blocks of the same size. A single scale for
    a whole activation, as in `quantize_dynamic`, fails on the few huge features that language models have.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(path)
    _split_gemm(model.graph)
    tables = _untie(model.graph)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    _share_rows(quantizer.model.model.graph, tables)
    data = path.with_name(f"{path.name}.data")
    data.unlink()
    onnx.save_model(quantizer.model.model, path, save_as_external_data=True, location=data.name)


def _untie(graph: Any) -> dict[str, str]:  # noqa: ANN401
    """Give a head that is the transposed embedding a constant of its own, which the quantiser needs.

    Returns:
        The embedding's name by the name of the head's weight.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    tables: dict[str, str] = {}
    for table in {node.input[0] for node in graph.node if node.op_type == "Gather"} & constants.keys():
        rows = numpy_helper.to_array(constants[table]).T
        # Small tables come transposed; the fusions let the product transpose a large one.
        for name, tensor in constants.items():
            if tuple(tensor.dims) == rows.shape and np.array_equal(numpy_helper.to_array(tensor), rows):
                tables[name] = table
        for place, node in enumerate(graph.node):
            if node.op_type == "FusedMatMul" and node.input[1] == table and _only_transposes(node):
                weight = f"{table}.{place}"
                tables[weight] = table
                graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(rows), weight))
                product = helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name)
                graph.node.remove(node)
                graph.node.insert(place, product)
    return tables


def _only_transposes(node: Any) -> bool:  # noqa: ANN401
    """Tell whether a FusedMatMul is a product with its transposed second input, and nothing more."""
    from onnx import helper

    options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return options.pop("transB", 0) == 1 and options.pop("alpha", 1.0) == 1.0 and not any(options.values())


def _share_rows(graph: Any, tables: dict[str, str]) -> None:  # noqa: ANN401
    """Gather the embedding's rows from the quantised head, so that the file holds the tied table once."""
    from onnx import helper

    for product in [node for node in graph.node if node.op_type == "MatMulNBits"]:
        sizes = {item.name: helper.get_attribute_value(item) for item in product.attribute}
        table = tables.get(product.input[1].removesuffix("_Q8"))
        if table is None or sizes["K"] % _BLOCK:
            continue  # a padded row can't be gathered
        place, gather = next((i, n) for i, n in enumerate(graph.node) if n.op_type == "Gather" and n.input[0] == table)
        shapes = {"rows": [sizes["N"], sizes["K"]], "scales": [sizes["N"], sizes["K"] // _BLOCK]}
        nodes = []
        for source, (kind, shape) in zip(product.input[1:3], shapes.items(), strict=True):
            graph.initializer.append(helper.make_tensor(f"{table}.{kind}.shape", 7, [2], shape))
            nodes.append(helper.make_node("Reshape", [source, f"{table}.{kind}.shape"], [f"{table}.{kind}"]))
        inputs = [f"{table}.rows", gather.input[1], f"{table}.scales"]
        options = {"bits": 8, "block_size": _BLOCK, "gather_axis": 0, "quantize_axis": 1}
        nodes.append(
            helper.make_node("GatherBlockQuantized", inputs, list(gather.output), domain="com.microsoft", **options)
        )
        del graph.node[place]
        for node in reversed(nodes):
            graph.node.insert(place, node)
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == table))


def _split_gemm(graph: Any) -> None:  # noqa: ANN401
    """Replace each Gemm (in GPT-2, and in OPT's MLPs), which the quantiser skips, by a product and a sum."""
    from onnx import helper, numpy_helper

    constants, replaced = {tensor.name: tensor for tensor in graph.initializer}, set()
    for place in reversed(range(len(graph.node))):
        node = graph.node[place]
        options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        transposed = options.pop("transB", 0)
        scaled = any(
            options.get(name, usual) != usual for name, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        )
        if node.op_type != "Gemm" or scaled or len(node.input) < 3 or node.input[1] not in constants:
            continue
        inputs, weight, bias = node.input
        if transposed:
            values = numpy_helper.to_array(constants[weight]).T
            replaced.add(weight)
            weight = f"{weight}.{place}"  # another node may read the original
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), weight))
        product = f"{node.output[0]}.product"
        parts = (
            helper.make_node("MatMul", [inputs, weight], [product], name=f"{node.name}.product"),
            helper.make_node("Add", [product, bias], list(node.output), name=f"{node.name}.sum"),
        )
        del graph.node[place]
        for part in reversed(parts):
            graph.node.insert(place, part)
    replaced -= {name for node in graph.node for name in node.input}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name in replaced:
            del graph.initializer[place]
