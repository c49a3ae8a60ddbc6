// Tensors in memory that the caller owns: a pointer, a dtype, a shape and strides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "errors.hpp"

namespace edge_backbones {

/// The types of values that engines take and return.
enum class DType { float32, float16, uint8 };

/// Return numpy's name of a dtype, such as "float32".
inline const char* name_of(DType dtype) noexcept {
  return dtype == DType::float32 ? "float32" : dtype == DType::float16 ? "float16" : "uint8";
}

/// Return the size of one value in bytes.
inline std::size_t bytes_of(DType dtype) noexcept {
  return dtype == DType::float32 ? 4 : dtype == DType::float16 ? 2 : 1;
}

/// The bits of an IEEE 754 half-precision number.
struct Half {
  std::uint16_t bits = 0;

  /// Return the same value in single precision.
  float to_float() const noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t exponent = (bits >> 10) & 31u;
    std::uint32_t fraction = bits & 0x3ffu;
    std::uint32_t found = 0;
    if (exponent == 31u) {
      found = 0x7f800000u | (fraction << 13);
    } else if (exponent != 0) {
      found = ((exponent + 112u) << 23) | (fraction << 13);
    } else if (fraction != 0) {  // a subnormal half is a normal float
      std::uint32_t shift = 0;
      while ((fraction & 0x400u) == 0) {
        fraction <<= 1;
        ++shift;
      }
      found = ((113u - shift) << 23) | ((fraction & 0x3ffu) << 13);
    }
    found |= sign;
    float value = 0;
    std::memcpy(&value, &found, sizeof value);
    return value;
  }
};

/// The dtype of a C++ type.
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<Half> {
  static constexpr DType value = DType::float16;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::uint8;
};

using Shape = std::vector<std::int64_t>;

/// Return how many values a shape has. Throws Code::input for a negative size, and where the number does not fit.
inline std::size_t size_of(const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) {
    if (size < 0) throw Error(Code::input, "a shape has a negative size: " + text_of(shape));
    const auto factor = static_cast<std::size_t>(size);
    if (factor != 0 && count > std::numeric_limits<std::size_t>::max() / 16 / factor) {
      throw Error(Code::input, "a shape has more values than fit into memory: " + text_of(shape));
    }
    count *= factor;
  }
  return count;
}

/// Return the strides, in elements, of a row-major array of this shape.
inline std::vector<std::int64_t> row_major(const Shape& shape) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  return strides;
}

namespace detail {

/// A tensor over memory that somebody else owns. `Pointer` is `const void*` or `void*`.
template <class Pointer>
struct BasicTensor {
  Pointer data = nullptr;
  DType dtype = DType::float32;
  Shape shape;
  std::vector<std::int64_t> strides;  ///< In elements, as many as the shape has axes; empty for row-major memory.

  BasicTensor() = default;
  BasicTensor(Pointer data_, DType dtype_, Shape shape_, std::vector<std::int64_t> strides_ = {})
      : data(data_), dtype(dtype_), shape(std::move(shape_)), strides(std::move(strides_)) {}

  /// Return how many values the tensor has.
  std::size_t size() const { return size_of(shape); }

  /// Return how many bytes the values take without gaps between them.
  std::size_t bytes() const { return size() * bytes_of(dtype); }

  /// Return whether the values lie in row-major order without gaps. The stride of an axis of size 1 does not matter.
  bool is_contiguous() const {
    if (strides.empty()) return true;
    if (strides.size() != shape.size()) return false;
    std::int64_t expected = 1;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      if (shape[axis] == 0) return true;
      if (shape[axis] != 1 && strides[axis] != expected) return false;
      expected *= shape[axis];
    }
    return true;
  }
};

}  // namespace detail

/// A tensor that is only read. Nothing is copied and nothing owned: the memory must outlive every call that gets it.
struct ConstTensor : detail::BasicTensor<const void*> {
  using BasicTensor::BasicTensor;

  /// Return a row-major tensor over an array.
  template <class T>
  static ConstTensor of(const T* values, Shape shape) {
    return ConstTensor(values, DTypeOf<T>::value, std::move(shape));
  }

  /// Return the values. Throws Code::input if `T` is not the dtype.
  template <class T>
  const T* as() const {
    if (DTypeOf<T>::value != dtype) {
      throw Error(Code::input, std::string("a tensor of ") + name_of(dtype) + " was asked for " + name_of(DTypeOf<T>::value));
    }
    return static_cast<const T*>(data);
  }
};

/// A tensor that is written to, over memory that somebody else owns.
struct Tensor : detail::BasicTensor<void*> {
  using BasicTensor::BasicTensor;

  template <class T>
  static Tensor of(T* values, Shape shape) {
    return Tensor(values, DTypeOf<T>::value, std::move(shape));
  }

  /// Return the same memory as a tensor that is only read.
  ConstTensor constant() const { return ConstTensor(data, dtype, shape, strides); }

  template <class T>
  T* as() const {
    if (DTypeOf<T>::value != dtype) {
      throw Error(Code::input, std::string("a tensor of ") + name_of(dtype) + " was asked for " + name_of(DTypeOf<T>::value));
    }
    return static_cast<T*>(data);
  }
};

}  // namespace edge_backbones
