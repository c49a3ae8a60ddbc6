// Compare the inputs and outputs of an engine with those in its manifest: the rules and sentences of engines/ports.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "text.hpp"
#include "types.hpp"

namespace edge_backbones::ports {

/// An input or output as the engine reports it. `dtype` is TensorRT's name (FLOAT); in `shape`, -1 is an axis of variable size.
struct Port {
  std::string name;
  bool is_input = false;
  std::string dtype;
  Shape shape;
};

/// Return TensorRT's name of a dtype.
inline const char* engine_name(DType dtype) noexcept {
  return dtype == DType::float32 ? "FLOAT" : dtype == DType::float16 ? "HALF" : "UINT8";
}

namespace detail {

inline std::string shown(const Shape& shape) {
  std::vector<std::string> sizes;
  for (const std::int64_t size : shape) sizes.push_back(size == -1 ? "any" : std::to_string(size));
  return "(" + joined(sizes) + ")";
}

inline std::string sizes_of(const InputSpec& input) {
  std::vector<std::string> axes{input.batch.str()};
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
inline bool takes(const Shape& shape, const InputSpec& input) {
  const Shape least = input.min_shape(), most = input.max_shape();
  if (shape.size() != 4) return false;
  for (std::size_t i = 0; i < 4; ++i) {
    if (shape[i] != -1 && !(shape[i] == least[i] && least[i] == most[i])) return false;
  }
  return true;
}

/// Return whether a map of `cells` cells can have this stride, by the build's rules; variable sizes always can.
inline bool explains(const ShapeRange& pixels, std::int64_t cells, std::int64_t stride) {
  if (cells == -1 || !pixels.is_fixed()) return true;
  const std::int64_t left = pixels.max - cells * stride;  // padding adds up to one cell; without it, up to two are lost
  if (-stride < left && left < 2 * stride) return true;
  if (cells <= 0) return false;
  // Python's round: halves go to the even neighbour.
  const std::int64_t whole = pixels.max / cells, twice = 2 * (pixels.max % cells);
  const bool is_up = twice > cells || (twice == cells && whole % 2 == 1);
  return stride == std::max<std::int64_t>(1, whole + (is_up ? 1 : 0));
}

/// Return why a shape is not that of an output in the manifest; empty if it is.
inline std::string wrong_shape(const OutputSpec& output, const Shape& shape, const InputSpec& input) {
  const std::string& layout = output.engine_layout;
  std::string promise =
      layout + " with " + std::to_string(output.channels) + " channels and batch " + input.batch.str();
  bool fits = shape.size() == layout.size();
  if (fits) {
    const auto size = [&](char axis) { return shape[layout.find(axis)]; };
    fits = size('C') == -1 || size('C') == output.channels;
    fits = fits && (size('N') == -1 || (input.batch.is_fixed() && size('N') == input.batch.max));
    if (fits && output.strides && layout.find('H') != std::string::npos) {
      const auto [down, across] = *output.strides;
      promise += ", strides " + std::to_string(down) + " and " + std::to_string(across) + " of " + input.height.str() + " x " +
                 input.width.str() + " pixels";
      fits = explains(input.height, size('H'), down) && explains(input.width, size('W'), across);
    }
  }
  if (fits) return "";
  return output.name + " has shape " + shown(shape) + ", the manifest promises " + promise;
}

}  // namespace detail

/// Return where an engine's inputs and outputs differ from the manifest's, one phrase each; empty if they match.
inline std::vector<std::string> mismatches(const std::vector<Port>& ports, const InputSpec& input, const BackboneSpec& spec) {
  std::vector<std::string> taken, returned, reasons, odd;
  const std::string promised = engine_name(spec.map_dtype);
  for (const Port& port : ports) {
    (port.is_input ? taken : returned).push_back(port.name);
    if (!port.is_input && port.dtype != promised) odd.push_back(port.name + " " + port.dtype);
  }
  if (taken != std::vector<std::string>{input.name}) {
    reasons.push_back("it takes " + text_of(taken) + ", the manifest says " + text_of(std::vector<std::string>{input.name}));
  } else {
    const Port& found = *std::find_if(ports.begin(), ports.end(), [](const Port& port) { return port.is_input; });
    const std::string wanted = engine_name(input.dtype());
    if (found.dtype != wanted) reasons.push_back("its input is " + found.dtype + ", the manifest says " + wanted);
    if (!detail::takes(found.shape, input)) {
      reasons.push_back("it takes " + detail::shown(found.shape) + ", the manifest says " + detail::sizes_of(input));
    }
  }
  const std::vector<std::string> outputs = spec.outputs();
  std::vector<std::string> here = returned, there = outputs;
  std::sort(here.begin(), here.end());
  std::sort(there.begin(), there.end());
  if (here != there) {
    reasons.push_back("it returns " + text_of(returned) + ", the manifest promises " + text_of(outputs));
  } else {
    for (const OutputSpec& output : spec.described_outputs()) {
      const auto is_it = [&](const Port& port) { return !port.is_input && port.name == output.name; };
      const std::string wrong = detail::wrong_shape(output, std::find_if(ports.begin(), ports.end(), is_it)->shape, input);
      if (!wrong.empty()) reasons.push_back(wrong);
    }
  }
  if (!odd.empty()) reasons.push_back("it returns " + joined(odd) + ", the manifest promises " + promised);
  return reasons;
}

}  // namespace edge_backbones::ports
