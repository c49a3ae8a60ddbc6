// Move values between tensors of one shape and other strides, and between the engine's layout and that of callers.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "types.hpp"

namespace edge_backbones::detail {

/// Return the strides of a tensor, also where they were left out.
template <class AnyTensor>
std::vector<std::int64_t> strides_of(const AnyTensor& tensor) {
  return tensor.strides.empty() ? row_major(tensor.shape) : tensor.strides;
}

/// Copy values between tensors of one shape and dtype, whatever their strides.
inline void copy_tensor(const ConstTensor& from, const Tensor& to) {
  const std::size_t bytes = bytes_of(from.dtype), count = size_of(from.shape);
  if (count == 0) return;
  if (from.is_contiguous() && to.is_contiguous()) {
    std::memcpy(to.data, from.data, count * bytes);
    return;
  }
  const auto source = strides_of(from), target = strides_of(to);
  const std::size_t axes = from.shape.size();
  if (axes == 0) {
    std::memcpy(to.data, from.data, bytes);
    return;
  }
  std::vector<std::int64_t> index(axes, 0);
  const std::int64_t last = from.shape[axes - 1];
  const auto step = static_cast<std::ptrdiff_t>(bytes);
  while (true) {
    std::ptrdiff_t a = 0, b = 0;
    for (std::size_t i = 0; i + 1 < axes; ++i) {
      a += index[i] * source[i];
      b += index[i] * target[i];
    }
    const char* read = static_cast<const char*>(from.data) + a * step;
    char* written = static_cast<char*>(to.data) + b * step;
    if (source[axes - 1] == 1 && target[axes - 1] == 1) {
      std::memcpy(written, read, static_cast<std::size_t>(last) * bytes);
    } else {
      for (std::int64_t i = 0; i < last; ++i) {
        std::memcpy(written + i * target[axes - 1] * step, read + i * source[axes - 1] * step, bytes);
      }
    }
    std::size_t axis = axes - 1;
    while (axis > 0 && ++index[axis - 1] == from.shape[axis - 1]) index[--axis] = 0;
    if (axis == 0) return;
  }
}

/// Return the shape that callers see of an output whose engine returns this shape.
inline Shape callers_shape(const OutputSpec& output, const Shape& engine) {
  if (!output.is_reordered() || engine.size() != 4) return engine;
  return {engine[0], engine[3], engine[1], engine[2]};  // NHWC, seen as NCHW
}

/// Return the strides, in elements, that callers see of an output in the engine's own dense memory.
inline std::vector<std::int64_t> callers_strides(const OutputSpec& output, const Shape& engine) {
  const auto dense = row_major(engine);
  if (!output.is_reordered() || engine.size() != 4) return dense;
  return {dense[0], dense[3], dense[1], dense[2]};
}

/// Return whether two lists of strides reach the same places of a shape.
inline bool same_strides(const Shape& shape, const std::vector<std::int64_t>& one, const std::vector<std::int64_t>& other) {
  if (one.size() != shape.size() || other.size() != shape.size()) return false;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] > 1 && one[i] != other[i]) return false;
  }
  return true;
}

}  // namespace edge_backbones::detail
