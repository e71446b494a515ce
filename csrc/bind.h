// What the bind files share: how a tensor comes from Python, and how the arguments of a launch do.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <vector>

#include "cpu/view.h"

void bind_cpu(pybind11::module_& m);   // in cpu/bind.cpp
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

namespace prfl {

// A keyword as Python has it: interned, so that looking it up makes no string.
struct Word : pybind11::object {
  Word(const char* text) : object(PyUnicode_InternFromString(text), stolen_t{}) {}
  std::string text() const { return cast<std::string>(); }
};

// A launch takes keywords alone, one for every field of its struct of arguments `A`. A bind file lists the
// fields once, and that list is the signature.
template <class A>
struct Field {
  Word name;
  void (*fill)(A& arguments, pybind11::handle given);
};

inline void fill(View& member, pybind11::handle given) { member = given.cast<View>(); }

template <class T>
void fill(T*& member, pybind11::handle given) {
  member = static_cast<T*>(given.cast<View>().data);
}

template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
void fill(T& member, pybind11::handle given) {
  member = given.cast<T>();
}

// A tensor and its first strides.
template <class T, class... Strides>
void fill_strided(pybind11::handle given, T*& member, Strides&... strides) {
  const View view = given.cast<View>();
  member = static_cast<T*>(view.data);
  int i = 0;
  ((strides = view.stride[i++]), ...);
}

// In the list of a struct that is named A there. PRFL_FIELD(x) is the keyword x of the member x.
#define PRFL_NAMED(name, member) {name, [](A& a, pybind11::handle given) { prfl::fill(a.member, given); }}
#define PRFL_FIELD(member) PRFL_NAMED(#member, member)

// The struct that the keywords make. TypeError names a keyword that is missing, unknown or of a wrong type.
template <class A>
A filled(const char* launch, const std::vector<Field<A>>& fields, const pybind11::dict& given) {
  const auto wrong = [&](const std::string& what) { return pybind11::type_error(launch + (": got " + what)); };
  A arguments{};
  for (const Field<A>& field : fields) {
    const pybind11::handle value = PyDict_GetItemWithError(given.ptr(), field.name.ptr());
    if (!value) throw wrong("no argument " + field.name.text() + ", want it");
    try {
      field.fill(arguments, value);
    } catch (const pybind11::cast_error&) {
      throw wrong(Py_TYPE(value.ptr())->tp_name + (" for " + field.name.text()));
    }
  }
  if (given.size() == fields.size()) return arguments;
  for (const auto& [key, value] : given) {
    bool known = false;
    for (const Field<A>& field : fields) known = known || field.name.equal(key);
    if (!known) throw wrong(pybind11::cast<std::string>(key) + ", which is none of its arguments");
  }
  return arguments;
}

}  // namespace prfl
