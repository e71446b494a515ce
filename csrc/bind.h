// What cpu/bind.cpp and cuda/bind.cpp share: how a tensor comes from Python.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/view.h"

void bind_cuda(pybind11::module_& m);  // in cuda/bind.cpp; there only where PRFL_CUDA is defined

namespace pybind11::detail {

// None, or (tensor, address, dtype code, stride, ...) with up to three strides. The tensor is there only to
// keep its memory alive as long as the tuple is.
template <>
struct type_caster<prfl::View> {
  PYBIND11_TYPE_CASTER(prfl::View, const_name("tuple | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr())) return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(source.ptr());
    if (size < 3 || size > 6) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1));
    value.dtype = static_cast<prfl::DType>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 2)));
    for (Py_ssize_t i = 3; i < size; i++)
      value.stride[i - 3] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }
};

}  // namespace pybind11::detail
