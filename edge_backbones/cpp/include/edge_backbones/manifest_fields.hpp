// Read the parts of manifest.json, field by field; manifest_json.hpp puts them together.
#pragma once

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "json.hpp"
#include "manifest.hpp"

namespace edge_backbones {

namespace detail {

constexpr std::int64_t any_least = INT64_MIN, any_most = INT64_MAX;

/// Return whether a text is `prefix`, then `least` to `most` characters of a kind, as Python's re.search with "^...$" finds it.
/// "$" matches before a line break at the end too.
template <class Kind>
bool matches(const std::string& text, const std::string& prefix, Kind kind, std::size_t least, std::size_t most = SIZE_MAX) {
  if (text.compare(0, prefix.size(), prefix) != 0) return false;
  std::size_t end = text.size();
  if (end > prefix.size() && text[end - 1] == '\n') --end;
  const std::size_t count = end - prefix.size();
  if (count < least || count > most) return false;
  for (std::size_t i = prefix.size(); i < end; ++i) {
    if (!kind(text[i])) return false;
  }
  return true;
}

inline bool is_lower(char c) { return c >= 'a' && c <= 'z'; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }

inline std::string read_sha256(const Node& node) {
  auto found = node.text(0, 64);
  if (!matches(found, "", [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); }, 64, 64)) {
    node.refuse("Expected `str` matching regex '^[0-9a-f]{64}$'");
  }
  return found;
}

inline FileRecord read_file_record(const Node& node) {
  Fields fields(node);
  FileRecord record;
  record.path = fields.at("path").text(1, 512);
  record.sha256 = read_sha256(fields.at("sha256"));
  record.size = static_cast<std::uint64_t>(fields.at("size").whole(0, std::int64_t{1} << 50));
  fields.finish();
  return record;
}

inline std::optional<FileRecord> read_given_file(Fields& fields, const char* name) {
  const auto node = fields.given(name);
  return node ? std::optional<FileRecord>(read_file_record(*node)) : std::nullopt;
}

inline std::string read_text(const Node& node) { return node.text(); }
inline std::string read_word(const Node& node) { return node.text(1, 100); }
inline std::string read_name(const Node& node) { return node.text(1, 300); }
inline std::int64_t read_size(const Node& node) { return node.whole(1, 1 << 24); }
inline std::int64_t read_large_size(const Node& node) { return node.whole(1, std::int64_t{1} << 31); }
inline std::string read_layout(const Node& node) { return node.one_of({"NCHW", "NHWC", "NLC", "NC"}); }

inline Precision read_precision(const Node& node) {
  const auto found = precision_of(node.text());
  if (!found) node.refuse("Invalid enum value " + quoted(shortened(node.text(), 60)));
  return *found;
}

inline DType read_float_type(const Node& node) {
  return node.one_of({"float32", "float16"}) == "float16" ? DType::float16 : DType::float32;
}

template <class T, class Read>
std::optional<T> read_given(Fields& fields, const char* name, Read read) {
  const auto node = fields.given(name);
  return node ? std::optional<T>(read(*node)) : std::nullopt;
}

template <class T, class Read>
void read_if(Fields& fields, const char* name, T& into, Read read) {
  if (const auto node = fields.find(name)) into = read(*node);
}

inline bool read_bool(const Node& node) { return node.boolean(); }

inline std::vector<std::string> read_texts(const Node& node) { return node.list(read_text); }
inline std::vector<std::string> read_names(const Node& node) { return node.list(read_name, 0, 1024); }

inline ShapeRange read_range(const Node& node) {
  Fields fields(node);
  ShapeRange range;
  range.min = read_size(fields.at("min"));
  range.opt = read_size(fields.at("opt"));
  range.max = read_size(fields.at("max"));
  fields.finish();
  if (range.min > range.opt || range.opt > range.max) node.refuse("a shape range needs 1 <= min <= opt <= max");
  return range;
}

inline FrameSpec read_frame(const Node& node) {
  Fields fields(node);
  FrameSpec frame;
  frame.height = read_size(fields.at("height"));
  frame.width = read_size(fields.at("width"));
  frame.color = fields.at("color").one_of({"rgb", "bgr", "gray", "nv12", "yuyv"});
  read_if(fields, "matrix", frame.matrix, [](const Node& n) { return n.one_of({"bt601", "bt709"}); });
  read_if(fields, "range", frame.range, [](const Node& n) { return n.one_of({"limited", "full"}); });
  fields.finish();
  if ((frame.is_yuv() && frame.width % 2 != 0) || (frame.color == "nv12" && frame.height % 2 != 0)) {
    node.refuse(frame.color + " frames have even sides");
  }
  if (!frame.is_yuv() && (frame.matrix != "bt601" || frame.range != "limited")) {
    node.refuse("matrix and range are of nv12 and yuyv frames, and color is " + frame.color);
  }
  return frame;
}

inline InputSpec read_input(const Node& node) {
  Fields fields(node);
  InputSpec input;
  input.name = fields.at("name").one_of({"pixel_values", "image", "frame"});
  input.channels = read_size(fields.at("channels"));
  input.batch = read_range(fields.at("batch"));
  input.height = read_range(fields.at("height"));
  input.width = read_range(fields.at("width"));
  read_if(fields, "size_multiple", input.size_multiple, read_size);
  read_if(fields, "pixel_dtype", input.pixel_dtype, read_float_type);
  input.frame = read_given<FrameSpec>(fields, "frame", read_frame);
  fields.finish();
  if (input.name != "pixel_values" && input.pixel_dtype != DType::float32) node.refuse(input.name + " is uint8, and has a pixel_dtype");
  if ((input.name == "frame") != input.frame.has_value()) {
    node.refuse("an input called frame says what its frames are, and no other does: this is " + input.name);
  }
  if (input.frame && input.channels != 3 && !(input.channels == 1 && input.frame->color == "gray")) {
    node.refuse(input.frame->color + " frames do not become " + std::to_string(input.channels) + " channels");
  }
  if (input.frame && !(input.height.is_fixed() && input.width.is_fixed())) {
    node.refuse("frames are resized to one size, not to " + input.height.str() + " x " + input.width.str());
  }
  return input;
}

/// Refuse kept stages that are not among the stages, in their order, each once, or whose indices are others.
inline void require_aligned(const Node& node, const BackboneSpec& spec) {
  const auto count = static_cast<std::int64_t>(spec.stage_names.size());
  std::vector<std::string> ordered;
  for (const std::string& name : spec.stage_names) {
    if (std::count(spec.out_features.begin(), spec.out_features.end(), name) != 0) ordered.push_back(name);
  }
  bool fits = !spec.out_features.empty() && ordered == spec.out_features && spec.out_indices.size() == ordered.size() &&
              std::set<std::string>(ordered.begin(), ordered.end()).size() == ordered.size();
  std::int64_t before = -1;
  for (std::size_t i = 0; fits && i < ordered.size(); ++i) {
    std::int64_t index = spec.out_indices[i];
    if (index < 0 && index >= -count) index += count;
    fits = index > before && index < count && spec.stage_names[static_cast<std::size_t>(index)] == ordered[i];
    before = index;
  }
  if (!fits) node.refuse("out_features and out_indices do not agree with each other and with stage_names");
}

inline BackboneSpec read_backbone(const Node& node) {
  const auto pair = [](const Node& n) {
    const auto two = n.list(read_size, 2, 2);
    return std::make_pair(two[0], two[1]);
  };
  const auto extra = [](const Node& n) {
    Fields fields(n);
    ExtraOutput found;
    found.name = read_name(fields.at("name"));
    found.layout = read_layout(fields.at("layout"));
    found.channels = read_size(fields.at("channels"));
    fields.finish();
    return found;
  };
  Fields fields(node);
  BackboneSpec spec;
  spec.stage_names = read_names(fields.at("stage_names"));
  spec.out_features = read_names(fields.at("out_features"));
  spec.out_indices = fields.at("out_indices").list([](const Node& n) { return n.whole(any_least, any_most); }, 0, 1024);
  spec.channels = fields.at("channels").list(read_size, 0, 1024);
  spec.strides = fields.at("strides").list(pair, 0, 1024);
  spec.num_features = fields.at("num_features").list(read_size, 0, 1024);
  spec.layouts = fields.at("layouts").list(read_layout, 0, 1024);
  read_if(fields, "cls_tokens", spec.cls_tokens, read_names);
  read_if(fields, "hidden_states", spec.hidden_states, read_names);
  read_if(fields, "extras", spec.extras, [&](const Node& n) { return n.list(extra, 0, 1024); });
  read_if(fields, "has_attentions", spec.has_attentions, read_bool);
  read_if(fields, "map_dtype", spec.map_dtype, read_float_type);
  read_if(fields, "channels_last", spec.channels_last, read_bool);
  fields.finish();
  require_aligned(node, spec);
  const std::size_t kept = spec.out_features.size();
  if (spec.channels.size() != kept || spec.strides.size() != kept || spec.layouts.size() != kept) {
    node.refuse(std::to_string(kept) + " stages need as many channels, strides and layouts");
  }
  if (spec.num_features.size() != spec.stage_names.size()) {
    node.refuse(std::to_string(spec.stage_names.size()) + " stage names need as many num_features");
  }
  const auto names = spec.outputs();
  const std::set<std::string> different(names.begin(), names.end());
  if (different.size() != names.size()) node.refuse("engine outputs must have different names, got " + text_of(names));
  if (!spec.cls_tokens.empty() && spec.cls_tokens.size() != kept) {
    node.refuse(std::to_string(kept) + " stages need as many class tokens, got " + text_of(spec.cls_tokens));
  }
  for (const auto* list : {&spec.cls_tokens, &spec.hidden_states}) {
    for (const std::string& name : *list) {
      if (different.count(name) == 0) node.refuse("class tokens or hidden states " + quoted(name) + " are no outputs");
    }
  }
  return spec;
}

inline ImageConfig read_image(const Node& node) {
  const auto numbers = [](const Node& n) { return n.list([](const Node& one) { return one.number(); }); };
  Fields fields(node);
  ImageConfig image;
  image.mean = numbers(fields.at("mean"));
  image.std = numbers(fields.at("std"));
  read_if(fields, "channel_order", image.channel_order, [](const Node& n) { return n.one_of({"rgb", "bgr"}); });
  const auto choice = [&](const char* name, std::initializer_list<const char*> choices, const char* otherwise) {
    const auto found = fields.find(name);
    return found ? found->one_of(choices) : std::string(otherwise);
  };
  choice("interpolation", {"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"}, "");
  choice("sampling", {"antialias", "centres", "corners"}, "");
  choice("arithmetic", {"pillow", "torchvision", "float"}, "");
  const auto crop = fields.find("crop_pct");
  const double crop_pct = crop ? crop->number() : 0.875;
  const std::string mode = choice("crop_mode", {"center", "squash", "border", "pad"}, "center");
  const auto edge = [&](const char* name, bool may_be_null) -> std::optional<std::int64_t> {
    const auto found = may_be_null ? fields.given(name) : fields.find(name);
    return found ? std::optional<std::int64_t>(found->whole(1, 1 << 20)) : std::nullopt;
  };
  const bool has_edge = static_cast<int>(edge("short_edge", true).has_value()) + edge("long_edge", true).has_value() > 0;
  edge("size_multiple", false);
  if (const auto fill = fields.given("fill")) fill->one_of({"black", "mean"});
  choice("rounding", {"timm", "transformers", "transformers_pil", "paddle"}, "");
  fields.finish();
  bool fits = !image.mean.empty() && image.mean.size() == image.std.size();
  for (const double value : image.mean) fits = fits && std::fabs(value) <= 1e6;
  for (const double value : image.std) fits = fits && value >= 1 / 1e6 && value <= 1e6;
  if (!fits) node.refuse("mean and std need one value of pixels in 0..1 per channel");
  if (!(crop_pct >= 0.01 && crop_pct <= 4.0)) node.refuse("crop_pct must be in [0.01, 4.0], got " + general(crop_pct));
  if (has_edge && mode != "border" && mode != "pad") {
    node.refuse("short_edge and long_edge are for crop_mode border and pad, not " + mode);
  }
  return image;
}

inline Source read_source(const Node& node) {
  Fields fields(node);
  Source source;
  source.library = fields.at("library").one_of({"timm", "transformers", "torch"});
  source.name = fields.at("name").text(0, 1000);
  source.weights = fields.at("weights").one_of({"pretrained", "checkpoint", "random", "module"});
  if (const auto hash = fields.given("weights_sha256")) read_sha256(*hash);
  if (const auto seed = fields.given("seed")) seed->any_whole();
  if (const auto warmed = fields.find("batch_norm_warmed")) warmed->boolean();
  if (const auto options = fields.find("options")) options->map([](const Node& n) { n.any_whole(); });
  if (const auto config = fields.find("config")) config->map([](const Node&) {});
  read_if(fields, "preprocessing", source.preprocessing, read_text);
  read_if(fields, "preprocessing_notes", source.preprocessing_notes, read_texts);
  fields.finish();
  return source;
}

inline double read_decibels(const Node& node) { return node.number(-1e4, 1e4); }
inline double read_cosine(const Node& node) { return node.number(-1.001, 1.001); }
inline double read_positive(const Node& node) { return node.number(0, HUGE_VAL); }
inline double read_milliseconds(const Node& node) { return node.number(0, 1e9, true); }

inline Gate read_gate(const Node& node) {
  Fields fields(node);
  Gate gate;
  gate.min_cosine = read_given<double>(fields, "min_cosine", read_cosine);
  gate.min_sqnr_db = read_given<double>(fields, "min_sqnr_db", read_decibels);
  gate.max_relative = read_given<double>(fields, "max_relative", [](const Node& n) { return n.number(0, 1e30); });
  fields.finish();
  return gate;
}

inline GraphRecord read_graph(const Node& node) {
  Fields fields(node);
  GraphRecord graph;
  graph.format = fields.at("format").one_of({"onnx", "torchscript"});
  graph.precision = read_precision(fields.at("precision"));
  graph.file = read_file_record(fields.at("file"));
  if (const auto opset = fields.given("opset")) opset->whole(1, 1000);
  if (const auto excluded = fields.find("excluded")) read_texts(*excluded);
  graph.gate = read_given<Gate>(fields, "gate", read_gate);
  fields.finish();
  return graph;
}

inline GpuKey read_gpu_key(const Node& node) {
  const auto architecture = [](const Node& n) {
    auto found = n.text(0, 6);
    if (!matches(found, "sm_", is_digit, 2, 3)) n.refuse("Expected `str` matching regex '^sm_[0-9]{2,3}$'");
    return found;
  };
  const auto profile = [](const Node& n) {
    const auto three = n.list([](const Node& axes) { return axes.list(read_large_size, 0, 16); }, 3, 3);
    return std::array<Shape, 3>{three[0], three[1], three[2]};
  };
  Fields fields(node);
  GpuKey gpu;
  gpu.architectures = fields.at("architectures").list(architecture, 1);
  read_if(fields, "hardware_compatibility", gpu.hardware_compatibility,
          [](const Node& n) { return n.one_of({"none", "ampere_plus", "same_compute_capability"}); });
  read_if(fields, "version_compatible", gpu.version_compatible, read_bool);
  read_if(fields, "host_code", gpu.host_code, read_bool);
  read_if(fields, "refittable", gpu.refittable, read_bool);
  read_if(fields, "stripped", gpu.stripped, read_bool);
  gpu.dla_core = read_given<std::int64_t>(fields, "dla_core", [](const Node& n) { return n.whole(0, 64); });
  gpu.driver = read_given<std::string>(fields, "driver", read_text);
  gpu.multiprocessors = read_given<std::int64_t>(fields, "multiprocessors", read_large_size);
  read_if(fields, "profiles", gpu.profiles, [&](const Node& n) { return n.list(profile); });
  fields.finish();
  return gpu;
}

inline EngineKey read_key(const Node& node) {
  Fields fields(node);
  EngineKey key;
  const Node flavour = fields.at("flavour");
  key.flavour = flavour.text(0, 40);
  const auto rest = [](char c) { return is_lower(c) || is_digit(c) || c == '_'; };
  if (key.flavour.empty() || !is_lower(key.flavour[0]) || !matches(key.flavour, "", rest, 1)) {
    flavour.refuse("Expected `str` matching regex '^[a-z][a-z0-9_]*$'");
  }
  key.library_version = read_word(fields.at("library_version"));
  key.architecture = read_word(fields.at("architecture"));
  key.cpu_features = fields.at("cpu_features").list(read_word, 0, 64);
  key.device_name = read_word(fields.at("device_name"));
  key.precision = read_precision(fields.at("precision"));
  key.graph_sha256 = read_sha256(fields.at("graph_sha256"));
  key.gpu = read_given<GpuKey>(fields, "gpu", read_gpu_key);
  if (const auto format = fields.find("computes_in")) key.computes_in = format->one_of({"fp32", "fp16", "bf16"});
  fields.finish();
  std::vector<std::string> words = {key.flavour, key.library_version, key.architecture, key.device_name};
  words.insert(words.end(), key.cpu_features.begin(), key.cpu_features.end());
  for (const std::string& word : words) {
    if (!is_printable(word)) node.refuse(quoted(word) + " is no name of a library or a device");
  }
  return key;
}

inline ParityReport read_parity(const Node& node) {
  const auto stage = [](const Node& n) {
    Fields fields(n);
    StageParity found;
    found.stage = read_name(fields.at("stage"));
    found.cosine = read_cosine(fields.at("cosine"));
    found.sqnr_db = read_decibels(fields.at("sqnr_db"));
    found.max_abs = read_positive(fields.at("max_abs"));
    found.relative = read_positive(fields.at("relative"));
    found.finite = fields.at("finite").boolean();
    found.passed = fields.at("passed").boolean();
    fields.finish();
    return found;
  };
  Fields fields(node);
  ParityReport report;
  report.precision = read_precision(fields.at("precision"));
  report.gate = read_gate(fields.at("gate"));
  report.stages = fields.at("stages").list(stage);
  fields.finish();
  return report;
}

}  // namespace detail
}  // namespace edge_backbones
