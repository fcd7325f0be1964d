"""Tensor maps: what Hopper's copy engine knows of a matrix (ops/panels.py), made by the driver."""

from __future__ import annotations

import ctypes

import torch

from tri_mpk.errors import DeviceError
from tri_mpk.ops.op import TENSOR_MAPS, TensorHandle, TensorMap
from tri_mpk.ops.panels import PANEL, TENSOR_MAP_BYTES
from tri_mpk.program import Program

# Of CUtensorMapDataType and other enumerations of cuda.h
DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}
NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTE_TO_128_BYTES, ZEROS_OUTSIDE = 0, 3, 2, 0
MAP_BYTES = TENSOR_MAP_BYTES.value


def fill_tensor_maps(program: Program) -> None:
    """Writes the program's maps to the tensor that holds them, on the device. All tensors must have their memory."""
    words = [encode(tensor_map, program.tensors[tensor_map.tensor]) for tensor_map in program.maps]
    program.tensors[TENSOR_MAPS].data.copy_(torch.frombuffer(bytearray(b"".join(words)), dtype=torch.int64))


def encode(tensor_map: TensorMap, tensor: TensorHandle) -> bytes:
    encode_tiled = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    out = (ctypes.c_ubyte * (MAP_BYTES + 64))()
    begin = -ctypes.addressof(out) % 64  # the driver wants it aligned
    dims = (ctypes.c_uint64 * 2)(tensor_map.num_columns, tensor_map.num_rows)
    strides = (ctypes.c_uint64 * 1)(tensor_map.num_columns * tensor.dtype.itemsize)
    box = (ctypes.c_uint32 * 2)(PANEL.value, tensor_map.box_rows)
    element_strides = (ctypes.c_uint32 * 2)(1, 1)
    code = encode_tiled(
        ctypes.c_void_p(ctypes.addressof(out) + begin), DATA_TYPES[tensor.dtype], 2,
        ctypes.c_void_p(tensor.data.data_ptr()), dims, strides, box, element_strides,
        NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTE_TO_128_BYTES, ZEROS_OUTSIDE,
    )  # fmt: skip
    if code:
        raise DeviceError(f"the driver makes no tensor map of {tensor_map}: error {code} of cuTensorMapEncodeTiled")
    return bytes(out)[begin : begin + MAP_BYTES]
