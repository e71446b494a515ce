// A tensor as the kernels see it: address, element type, strides. Its last dimension has stride 1.
#pragma once

#include <cstdint>

namespace prfl {

struct bf16 {
  uint16_t bits;
};

enum class DType : int { f32 = 0, bf16 = 1 };

struct View {
  void* data = nullptr;  // null where an optional tensor is absent
  DType dtype = DType::f32;
  int64_t stride[3] = {0, 0, 0};  // in elements, of all dimensions but the last

  explicit operator bool() const { return data != nullptr; }

  template <class T>
  T* at(int64_t i = 0, int64_t j = 0, int64_t k = 0) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }

  // The same from index i of the first dimension on.
  View from(int64_t i) const {
    View part = *this;
    if (data) part.data = dtype == DType::f32 ? static_cast<void*>(at<float>(i)) : at<bf16>(i);
    return part;
  }
};

}  // namespace prfl
