// Find NaN and infinity by their bits: with -ffast-math compilers assume that there are none, and std::isfinite is always true.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "types.hpp"

namespace edge_backbones::detail {

inline std::uint32_t float_bits(const void* value) noexcept {
  std::uint32_t bits = 0;
  std::memcpy(&bits, value, sizeof bits);
  return bits;
}

inline std::uint32_t half_bits(const void* value) noexcept {
  std::uint16_t bits = 0;
  std::memcpy(&bits, value, sizeof bits);
  return bits;
}

/// Return whether the float32 at an address, which need not be aligned, is neither NaN nor infinite.
inline bool is_finite_at(const void* value) noexcept { return (float_bits(value) & 0x7f800000u) != 0x7f800000u; }

/// Return whether a tensor has neither NaN nor infinity: in those, all bits of the exponent are ones.
inline bool is_finite(const ConstTensor& input) {
  const std::size_t count = input.size();
  const auto* values = static_cast<const char*>(input.data);
  std::uint32_t found = 0;
  if (input.dtype == DType::float32) {
    for (std::size_t i = 0; i < count; ++i) found |= static_cast<std::uint32_t>(!is_finite_at(values + 4 * i));
  } else if (input.dtype == DType::float16) {
    for (std::size_t i = 0; i < count; ++i) {
      found |= static_cast<std::uint32_t>((half_bits(values + 2 * i) & 0x7c00u) == 0x7c00u);
    }
  }
  return found == 0;
}

/// How many values of an image are NaN, and how many infinite.
struct NotFinite {
  std::size_t nan = 0, infinite = 0;
};

/// Count the values of one image that are not finite. `input` is row-major, of float32 or float16.
inline NotFinite not_finite(const ConstTensor& input, std::size_t begin, std::size_t end) noexcept {
  const auto* values = static_cast<const char*>(input.data);
  const bool is_half = input.dtype == DType::float16;
  const std::uint32_t infinity = is_half ? 0x7c00u : 0x7f800000u, all_but_sign = is_half ? 0x7fffu : 0x7fffffffu;
  NotFinite found;
  for (std::size_t i = begin; i < end; ++i) {
    const std::uint32_t bits = (is_half ? half_bits(values + 2 * i) : float_bits(values + 4 * i)) & all_but_sign;
    found.nan += bits > infinity;
    found.infinite += bits == infinity;
  }
  return found;
}

}  // namespace edge_backbones::detail
