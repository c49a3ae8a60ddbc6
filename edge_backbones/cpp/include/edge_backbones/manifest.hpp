// What manifest.json says, as plain structs. read_manifest of manifest_json.hpp fills them in and checks every field.
//
// The fields have the names and meanings of edge_backbones/bundle/manifest.py and spec.py. Fields that no C++ program needs
// (calibration, decision, provenance) are checked and not kept.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "text.hpp"
#include "types.hpp"

namespace edge_backbones {

constexpr int schema_version = 8;
constexpr int oldest_schema_version = 6;
constexpr std::size_t max_manifest_bytes = std::size_t{4} << 20;

/// Number formats of a typed graph.
enum class Precision { fp32, fp16, bf16, int8, fp8 };

inline const char* name_of(Precision precision) noexcept {
  static constexpr const char* names[] = {"fp32", "fp16", "bf16", "int8", "fp8"};
  return names[static_cast<std::size_t>(precision)];
}

inline std::optional<Precision> precision_of(const std::string& name) {
  for (const Precision one : {Precision::fp32, Precision::fp16, Precision::bf16, Precision::int8, Precision::fp8}) {
    if (name == name_of(one)) return one;
  }
  return std::nullopt;
}

/// The sizes that an axis may have. The axis is fixed if min == max.
struct ShapeRange {
  std::int64_t min = 1, opt = 1, max = 1;

  bool is_fixed() const noexcept { return min == max; }
  bool holds(std::int64_t size) const noexcept { return min <= size && size <= max; }
  std::string str() const {
    return is_fixed() ? std::to_string(min) : std::to_string(min) + ".." + std::to_string(max);
  }
};

/// The frames of one camera: their size in pixels, and how a pixel is stored in uint8.
struct FrameSpec {
  std::int64_t height = 0, width = 0;
  std::string color;              ///< rgb, bgr, gray, nv12 or yuyv.
  std::string matrix = "bt601";   ///< bt601 or bt709, for nv12 and yuyv.
  std::string range = "limited";  ///< limited or full, for nv12 and yuyv.

  bool is_yuv() const { return color == "nv12" || color == "yuyv"; }

  /// Return the shape of the array of one frame: rows, columns, bytes.
  std::array<std::int64_t, 3> shape() const {
    const std::int64_t rows = color == "nv12" ? height * 3 / 2 : height;
    return {rows, width, color == "rgb" || color == "bgr" ? 3 : color == "yuyv" ? 2 : 1};
  }

  std::string str() const {
    std::string found = color + " frames of " + std::to_string(height) + "x" + std::to_string(width);
    if (is_yuv()) found += std::string(" (") + (matrix == "bt601" ? "BT.601" : "BT.709") + ", " + range + " range)";
    return found;
  }
};

/// The one input of a graph.
struct InputSpec {
  std::string name;  ///< pixel_values, image or frame.
  std::int64_t channels = 0;
  ShapeRange batch, height, width;
  std::int64_t size_multiple = 1;
  DType pixel_dtype = DType::float32;
  std::optional<FrameSpec> frame;

  DType dtype() const { return name == "pixel_values" ? pixel_dtype : DType::uint8; }
  std::string layout() const { return name == "pixel_values" ? "NCHW" : "NHWC"; }

  /// Return the sizes of the four axes in the layout of this input. `height_` and `width_`: those of the network.
  Shape shape(std::int64_t batch_, std::int64_t height_, std::int64_t width_) const {
    if (frame) {
      const auto one = frame->shape();
      return {batch_, one[0], one[1], one[2]};
    }
    if (layout() == "NCHW") return {batch_, channels, height_, width_};
    return {batch_, height_, width_, channels};
  }
  Shape opt_shape() const { return shape(batch.opt, height.opt, width.opt); }
  Shape min_shape() const { return shape(batch.min, height.min, width.min); }
  Shape max_shape() const { return shape(batch.max, height.max, width.max); }

  /// Return whether a shape in this layout fits, with any batch from 1.
  bool takes(const Shape& given) const {
    if (given.size() != 4 || given[0] < 1) return false;
    if (frame) {
      const auto one = frame->shape();
      return std::equal(one.begin(), one.end(), given.begin() + 1);
    }
    const bool first = layout() == "NCHW";
    const std::int64_t h = given[first ? 2 : 1], w = given[first ? 3 : 2], c = given[first ? 1 : 3];
    return c == channels && fits(height, h) && fits(width, w);
  }

  /// Throw Code::input, with both shapes, for a shape that the engine cannot take.
  void require(const Shape& given) const {
    if (takes(given)) return;
    throw Error(Code::input, name + " of shape " + text_of(given) + " does not fit: this engine takes " + describe());
  }

  /// Return a phrase for messages: dtype, layout and the size of every axis.
  std::string describe() const {
    const std::string h = height.str(), w = width.str(), c = std::to_string(channels);
    std::string sizes = "(batch, " + c + ", " + h + ", " + w + ")";
    if (frame) {
      const auto one = frame->shape();
      sizes = "(batch, " + std::to_string(one[0]) + ", " + std::to_string(one[1]) + ", " + std::to_string(one[2]) + "), " +
              frame->str() + ",";
    } else if (layout() == "NHWC") {
      sizes = "(batch, " + h + ", " + w + ", " + c + ")";
    }
    std::string variable;
    if (!height.is_fixed()) variable = "height";
    if (!width.is_fixed()) variable += variable.empty() ? "width" : " and width";
    const std::string multiples =
        variable.empty() ? "" : ", " + variable + " in multiples of " + std::to_string(size_multiple);
    return std::string(edge_backbones::name_of(dtype())) + " " + layout() + " " + sizes + " with any batch >= 1" + multiples;
  }

 private:
  bool fits(const ShapeRange& axis, std::int64_t size) const {
    return axis.holds(size) && (axis.is_fixed() || size % size_multiple == 0);
  }
};

/// An output that is not the feature map of a kept stage.
struct ExtraOutput {
  std::string name;
  std::string layout;
  std::int64_t channels = 0;
};

/// One output, as callers see it and as an engine returns it.
struct OutputSpec {
  std::string name;
  std::string layout;         ///< Order of the axes that callers see: NCHW, NHWC, NLC or NC.
  std::string engine_layout;  ///< Order of the axes in the engine's own array; another one for channels-last memory.
  std::int64_t channels = 0;
  std::optional<std::pair<std::int64_t, std::int64_t>> strides;  ///< (vertical, horizontal) input pixels per cell.
  DType dtype = DType::float32;

  bool is_reordered() const { return layout != engine_layout; }
};

/// The stages of a backbone. See `BackboneSpec` of spec.py.
struct BackboneSpec {
  std::vector<std::string> stage_names;
  std::vector<std::string> out_features;
  std::vector<std::int64_t> out_indices;  ///< As they were given: -1 stays -1.
  std::vector<std::int64_t> channels;
  std::vector<std::pair<std::int64_t, std::int64_t>> strides;
  std::vector<std::int64_t> num_features;
  std::vector<std::string> layouts;
  std::vector<std::string> cls_tokens, hidden_states;
  std::vector<ExtraOutput> extras;
  bool has_attentions = true;
  DType map_dtype = DType::float32;
  bool channels_last = false;

  /// Return the names of all outputs in the order in which sessions return them: feature maps first.
  std::vector<std::string> outputs() const {
    std::vector<std::string> names = out_features;
    for (const ExtraOutput& extra : extras) names.push_back(extra.name);
    return names;
  }

  /// Return every output in that order.
  std::vector<OutputSpec> described_outputs() const {
    std::vector<OutputSpec> found;
    const auto add = [&](const std::string& name, const std::string& layout, std::int64_t count,
                         std::optional<std::pair<std::int64_t, std::int64_t>> pixels) {
      found.push_back({name, layout, channels_last && layout == "NCHW" ? "NHWC" : layout, count, pixels, map_dtype});
    };
    for (std::size_t i = 0; i < out_features.size(); ++i) add(out_features[i], layouts[i], channels[i], strides[i]);
    for (const ExtraOutput& extra : extras) add(extra.name, extra.layout, extra.channels, std::nullopt);
    return found;
  }
};

/// One file of the bundle; `path` is relative to the folder, with forward slashes.
struct FileRecord {
  std::string path;
  std::string sha256;
  std::uint64_t size = 0;

  bool operator==(const FileRecord& other) const {
    return path == other.path && sha256 == other.sha256 && size == other.size;
  }
  bool operator!=(const FileRecord& other) const { return !(*this == other); }
};

/// Bounds that every output of an engine must keep. Empty: no bound.
struct Gate {
  std::optional<double> min_cosine, min_sqnr_db, max_relative;

  bool operator==(const Gate& other) const {
    return min_cosine == other.min_cosine && min_sqnr_db == other.min_sqnr_db && max_relative == other.max_relative;
  }
  std::string str() const {
    std::string found;
    const auto add = [&](const std::string& part) { found += (found.empty() ? "" : " and ") + part; };
    if (min_cosine) add("cosine >= " + general(*min_cosine));
    if (min_sqnr_db) add("SQNR >= " + general(*min_sqnr_db) + " dB");
    if (max_relative) add("relative error <= " + general(*max_relative));
    return found.empty() ? "finite values" : found;
  }
};

/// An output of an engine compared with its fp32 reference; each figure is that of the worst golden image.
struct StageParity {
  std::string stage;
  double cosine = 0, sqnr_db = 0, max_abs = 0, relative = 0;
  bool finite = false, passed = false;
};

/// Every output of one engine, measured on the golden samples. Without stages the engine was not measured yet.
struct ParityReport {
  Precision precision = Precision::fp32;
  Gate gate;
  std::vector<StageParity> stages;

  bool measured() const noexcept { return !stages.empty(); }
  bool passed() const {
    return measured() && std::all_of(stages.begin(), stages.end(), [](const StageParity& one) { return one.passed; });
  }
};

/// What an engine requires of a GPU. See `GpuKey` of manifest.py.
struct GpuKey {
  std::vector<std::string> architectures;        ///< "sm_87", ...
  std::string hardware_compatibility = "none";   ///< none, ampere_plus or same_compute_capability.
  bool version_compatible = false;
  bool host_code = false;   ///< The plan holds a lean runtime, which is code for the CPU.
  bool refittable = false;
  bool stripped = false;    ///< The plan has no weights.
  std::optional<std::int64_t> dla_core;
  std::optional<std::string> driver;             ///< CUDA version of the driver that compiled it.
  std::optional<std::int64_t> multiprocessors;
  std::vector<std::array<Shape, 3>> profiles;    ///< Input shapes (min, opt, max) of each optimisation profile.
};

/// Where an engine may run: everything that compat.hpp compares with the machine.
struct EngineKey {
  std::string flavour;
  std::string library_version;
  std::string architecture;               ///< Of the CPU, as cpu_features.
  std::vector<std::string> cpu_features;
  std::string device_name;
  Precision precision = Precision::fp32;
  std::string graph_sha256;
  std::optional<GpuKey> gpu;              ///< Empty for an engine that runs on the CPU.
  std::optional<std::string> computes_in; ///< fp32, fp16 or bf16; empty if the key does not say, which means fp32.
};

/// One compiled engine and its parity with fp32.
struct EngineRecord {
  std::string name;  ///< Readable, different for every key: "openvino-2026.4.1-x86_64-avx512_vnni-int8-1b2c3d4e".
  EngineKey key;
  FileRecord file;
  ParityReport parity;
  std::optional<double> milliseconds, pipelined_milliseconds;
  std::optional<FileRecord> layers, timing_cache;
};

/// One graph file.
struct GraphRecord {
  std::string format;  ///< onnx or torchscript.
  Precision precision = Precision::fp32;
  FileRecord file;
  std::optional<Gate> gate;
};

/// The golden samples in golden.npz.
struct GoldenRecord {
  FileRecord file;
  std::vector<std::string> cases;
  std::vector<std::string> images;
};

/// Where the network came from.
struct Source {
  std::string library, name, weights, preprocessing;
  std::vector<std::string> preprocessing_notes;
};

/// How pixels are normalised: one value per channel, for pixels scaled to 0..1. See images/config.py for the resizing.
struct ImageConfig {
  std::vector<double> mean, std;
  std::string channel_order = "rgb";
};

/// The whole of manifest.json, as far as C++ programs need it.
struct Manifest {
  std::string folder;  ///< Path of the bundle, as it was opened; for messages.
  int version = schema_version;
  BackboneSpec backbone;
  InputSpec input;
  ImageConfig image;
  Source source;
  std::vector<GraphRecord> graphs;
  std::vector<EngineRecord> engines;
  GoldenRecord golden;
  std::optional<FileRecord> calibration;
  std::string digest;

  /// Return every file that the bundle must hold.
  std::vector<FileRecord> files() const {
    std::vector<FileRecord> found;
    for (const GraphRecord& graph : graphs) found.push_back(graph.file);
    for (const EngineRecord& engine : engines) {
      found.push_back(engine.file);
      if (engine.layers) found.push_back(*engine.layers);
      if (engine.timing_cache) found.push_back(*engine.timing_cache);
    }
    found.push_back(golden.file);
    if (calibration) found.push_back(*calibration);
    return found;
  }
};

}  // namespace edge_backbones
