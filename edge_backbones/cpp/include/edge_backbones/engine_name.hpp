// The name of an engine: a hash of its key, written as JSON exactly as Python (msgspec) writes it.
#pragma once

#include <cstdio>
#include <string>

#include "manifest.hpp"
#include "sha256.hpp"

namespace edge_backbones {

namespace detail {

/// Return a text in quotes as msgspec writes it: UTF-8 as it is, control characters escaped.
inline std::string json_text(const std::string& text) {
  std::string found = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const char* short_forms = "\b\t\n\f\r";
    if (c == '"' || c == '\\') {
      found += '\\';
      found += c;
    } else if (byte != 0 && byte < 0x20 && std::char_traits<char>::find(short_forms, 5, c) != nullptr) {
      found += '\\';
      found += c == '\b' ? 'b' : c == '\t' ? 't' : c == '\n' ? 'n' : c == '\f' ? 'f' : 'r';
    } else if (byte < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(byte));
      found += escape;
    } else {
      found += c;
    }
  }
  return found + "\"";
}

/// Return a JSON array of what `write` makes of every item.
template <class Items, class Write>
std::string json_list(const Items& items, Write write) {
  std::string found = "[";
  for (const auto& item : items) found += (found.size() > 1 ? "," : "") + write(item);
  return found + "]";
}

inline std::string json_of(const GpuKey& gpu) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  const auto number = [](std::int64_t value) { return std::to_string(value); };
  const auto shape = [&](const Shape& sizes) { return json_list(sizes, number); };
  return "{\"architectures\":" + json_list(gpu.architectures, json_text) +
         ",\"hardware_compatibility\":" + json_text(gpu.hardware_compatibility) +
         ",\"version_compatible\":" + flag(gpu.version_compatible) + ",\"host_code\":" + flag(gpu.host_code) +
         ",\"refittable\":" + flag(gpu.refittable) + ",\"stripped\":" + flag(gpu.stripped) +
         ",\"dla_core\":" + (gpu.dla_core ? number(*gpu.dla_core) : "null") +
         ",\"driver\":" + (gpu.driver ? json_text(*gpu.driver) : "null") +
         ",\"multiprocessors\":" + (gpu.multiprocessors ? number(*gpu.multiprocessors) : "null") + ",\"profiles\":" +
         json_list(gpu.profiles, [&](const std::array<Shape, 3>& one) { return json_list(one, shape); }) + "}";
}

inline std::string json_of(const EngineKey& key) {
  return "{\"flavour\":" + json_text(key.flavour) + ",\"library_version\":" + json_text(key.library_version) +
         ",\"architecture\":" + json_text(key.architecture) + ",\"cpu_features\":" + json_list(key.cpu_features, json_text) +
         ",\"device_name\":" + json_text(key.device_name) + ",\"precision\":" + json_text(name_of(key.precision)) +
         ",\"graph_sha256\":" + json_text(key.graph_sha256) + ",\"gpu\":" + (key.gpu ? json_of(*key.gpu) : "null") +
         (key.computes_in ? ",\"computes_in\":" + json_text(*key.computes_in) : "") + "}";
}

}  // namespace detail

/// Return a readable name, different for every key: "openvino-2026.4.1-x86_64-avx512_vnni-int8-1b2c3d4e".
inline std::string name_of(const EngineKey& key) {
  std::string device = key.architecture + (key.cpu_features.empty() ? "" : "-" + key.cpu_features.back());
  if (key.gpu) device = key.gpu->architectures.front();
  const std::string written = detail::json_of(key);
  return key.flavour + "-" + key.library_version.substr(0, key.library_version.find('-')) + "-" + device + "-" +
         name_of(key.precision) + "-" + sha256(written.data(), written.size()).substr(0, 8);
}

}  // namespace edge_backbones
