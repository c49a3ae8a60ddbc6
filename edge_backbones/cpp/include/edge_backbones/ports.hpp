// Compare the inputs and outputs of an engine with those in its manifest, as engines/ports.py does.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace edge_backbones {

/// An input or output as the engine reports it. In `shape`, -1 stands for an axis of variable size.
struct Port {
  std::string name;
  bool is_input = false;
  std::string dtype;           ///< TensorRT's name: FLOAT, HALF, UINT8.
  std::optional<Shape> shape;  ///< Nothing for an unknown shape.
};

namespace detail {

inline const char* port_dtype(DType dtype) {
  return dtype == DType::float32 ? "FLOAT" : dtype == DType::float16 ? "HALF" : "UINT8";
}

inline std::string shown(const Shape& shape) {
  std::vector<std::string> sizes;
  for (const std::int64_t size : shape) sizes.push_back(size == -1 ? "any" : std::to_string(size));
  return "(" + joined(sizes) + ")";
}

inline std::string sizes_of(const InputSpec& input) {
  std::vector<std::string> axes = {input.batch.str()};
  const std::string channels = std::to_string(input.channels), height = input.height.str(), width = input.width.str();
  if (input.frame) {
    for (const std::int64_t size : input.frame->shape()) axes.push_back(std::to_string(size));
  } else if (input.layout() == "NCHW") {
    axes.insert(axes.end(), {channels, height, width});
  } else {
    axes.insert(axes.end(), {height, width, channels});
  }
  return "(" + joined(axes) + ")";
}

/// Return whether each axis is variable, or has the one size that the manifest allows.
inline bool takes(const std::optional<Shape>& shape, const InputSpec& input) {
  if (!shape) return true;
  const Shape least = input.min_shape(), most = input.max_shape();
  if (shape->size() != 4) return false;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::int64_t size = (*shape)[i];
    if (size != -1 && !(size == least[i] && size == most[i])) return false;
  }
  return true;
}

/// Return whether a map of `cells` cells can have this stride, by the build's rules; variable sizes always can.
inline bool explains(const ShapeRange& pixels, std::int64_t cells, std::int64_t stride) {
  if (cells == -1 || !pixels.is_fixed()) return true;
  if (cells < 0 || cells > (std::int64_t{1} << 31)) return false;
  const std::int64_t left = pixels.max - cells * stride;  // padding adds up to one cell; without it, up to two are lost
  if (-stride < left && left < 2 * stride) return true;
  const double quotient = cells > 0 ? static_cast<double>(pixels.max) / static_cast<double>(cells) : 0;
  return cells > 0 && stride == std::max(std::int64_t{1}, static_cast<std::int64_t>(std::nearbyint(quotient)));
}

/// Return where the shape of one output does not match the manifest, as a phrase; "" if it does.
inline std::string wrong_shape(const OutputSpec& output, const Shape& shape, const InputSpec& input) {
  std::string promise = output.engine_layout + " with " + std::to_string(output.channels) + " channels and batch " +
                        input.batch.str();
  bool fits = shape.size() == output.engine_layout.size();
  const auto size = [&](char axis) { return shape[output.engine_layout.find(axis)]; };
  if (fits) {
    fits = size('C') == -1 || size('C') == output.channels;
    fits = fits && (size('N') == -1 || (input.batch.is_fixed() && size('N') == input.batch.min));
    if (fits && output.strides && output.engine_layout.find('H') != std::string::npos) {
      const auto [down, across] = *output.strides;
      promise += ", strides " + std::to_string(down) + " and " + std::to_string(across) + " of " + input.height.str() + " x " +
                 input.width.str() + " pixels";
      fits = explains(input.height, size('H'), down) && explains(input.width, size('W'), across);
    }
  }
  return fits ? "" : output.name + " has shape " + shown(shape) + ", the manifest promises " + promise;
}

}  // namespace detail

/// Return where an engine's inputs and outputs differ from the manifest's, one phrase each; empty if they match.
inline std::vector<std::string> mismatches(const std::vector<Port>& ports, const InputSpec& input, const BackboneSpec& spec) {
  std::vector<std::string> takes, returns, reasons, odd;
  std::map<std::string, const Port*> by_name;
  const Port* taken = nullptr;
  const std::string promised = detail::port_dtype(spec.map_dtype);
  for (const Port& port : ports) {
    (port.is_input ? takes : returns).push_back(port.name);
    if (port.is_input) {
      taken = &port;
      continue;
    }
    by_name[port.name] = &port;
    if (port.dtype != promised) odd.push_back(port.name + " " + port.dtype);
  }
  if (takes != std::vector<std::string>{input.name}) {
    reasons.push_back("it takes " + text_of(takes) + ", the manifest says [" + quoted(input.name) + "]");
  } else {
    const std::string wanted = detail::port_dtype(input.dtype());
    if (taken->dtype != wanted) reasons.push_back("its input is " + taken->dtype + ", the manifest says " + wanted);
    if (!detail::takes(taken->shape, input)) {
      reasons.push_back("it takes " + detail::shown(taken->shape.value_or(Shape{})) + ", the manifest says " +
                        detail::sizes_of(input));
    }
  }
  auto sorted_returns = returns, sorted_outputs = spec.outputs();
  std::sort(sorted_returns.begin(), sorted_returns.end());
  std::sort(sorted_outputs.begin(), sorted_outputs.end());
  if (sorted_returns != sorted_outputs) {
    reasons.push_back("it returns " + text_of(returns) + ", the manifest promises " + text_of(spec.outputs()));
  } else {
    for (const OutputSpec& output : spec.described_outputs()) {
      const auto& shape = by_name.at(output.name)->shape;
      const std::string wrong = shape ? detail::wrong_shape(output, *shape, input) : "";
      if (!wrong.empty()) reasons.push_back(wrong);
    }
  }
  if (!odd.empty()) reasons.push_back("it returns " + joined(odd) + ", the manifest promises " + promised);
  return reasons;
}

}  // namespace edge_backbones
