// Find the reasons why an engine does not run on a machine, in the sentences of the Python package.
//
// The reasons come from the engine's key in the manifest. Nothing is loaded to find them, because a library that loads an
// engine of another machine may crash the process.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "host.hpp"
#include "manifest.hpp"
#include "session.hpp"

namespace edge_backbones {

/// What this release knows of an engine library without loading it. The rows are those of engines/registry.py, in its order.
struct Flavour {
  const char* name;
  const char* component;    ///< Component of find_package that runs it from C++; "" if none does.
  bool on_cpu, on_gpu;
  bool from_graph;          ///< Engines are compiled from a graph of the bundle, not only by a build.
  bool is_program;          ///< Engines are code that may do whatever its author wrote.
};

inline constexpr Flavour flavours[] = {
    {"tensorrt", "TensorRT", false, true, true, false},
    {"tensorrt_rtx", "TensorRT_RTX", false, true, true, false},
    {"openvino", "OpenVINO", true, false, true, false},
    {"onnxruntime", "", true, false, true, false},
    {"torch_tensorrt", "", false, true, false, true},
    {"torchscript", "libtorch", true, true, true, true},
    {"tensorrt_lean", "TensorRT", false, true, false, false},
};

/// Return the row of a flavour; null if this release does not know it.
inline const Flavour* find_flavour(const std::string& name) noexcept {
  for (const Flavour& one : flavours) {
    if (name == one.name) return &one;
  }
  return nullptr;
}

namespace compat {

using Reasons = std::vector<std::string>;

/// Return how to get an engine that fits this machine, as the end of a sentence.
inline std::string remedy(const std::string& flavour) {
  return flavour == "torch_tensorrt" ? "run edge-backbones build MODEL BUNDLE --flavour torch_tensorrt --overwrite here"
                                     : "run edge-backbones compile here";
}

/// Return why a library is not there. It is the one sentence that differs from Python's: a program has what it was built with.
inline std::string missing(const std::string& flavour) {
  const Flavour* known = find_flavour(flavour);
  const std::string component = known == nullptr ? "" : known->component;
  if (component.empty()) {
    return "needs " + flavour + ", which C++ programs do not run: open the bundle with Python's EdgeBackbone, or compile an "
           "engine for openvino";
  }
  const std::string target = component == "OpenVINO" ? "openvino" : component == "TensorRT" ? "tensorrt"
                             : component == "TensorRT_RTX" ? "tensorrt_rtx" : "libtorch";
  return "needs " + flavour + ", which this program was built without: add COMPONENTS " + component +
         " to find_package(edge_backbones), and link edge_backbones::" + target;
}

/// Return the numbers in a version text: 10, 3, 0 for 10.3.0; one zero for text without numbers. Nine digits each at most.
inline std::vector<std::int64_t> numbers(const std::string& version) {
  std::vector<std::int64_t> found;
  int digits = 0;
  for (const char c : version) {
    if (c < '0' || c > '9') {
      digits = 0;
    } else if (digits == 0 || digits == 9) {
      found.push_back(c - '0');
      digits = 1;
    } else {
      found.back() = found.back() * 10 + (c - '0');
      ++digits;
    }
  }
  return found.empty() ? std::vector<std::int64_t>{0} : found;
}

/// Return the number format that OpenVINO is asked for when it loads an engine: fp32 if the key does not say.
inline std::string computed_in(const EngineKey& key) { return key.computes_in.value_or("fp32"); }

/// Return whether a CPU computes fp16 or bf16 itself. True for fp32.
inline bool has_units(const std::string& format, const std::vector<std::string>& features) {
  const std::vector<std::string> units =
      format == "bf16" ? std::vector<std::string>{"avx512_bf16", "amx_bf16"}
                       : std::vector<std::string>{"avx512_fp16", "amx_fp16", "asimdhp"};
  return format == "fp32" || std::find_first_of(units.begin(), units.end(), features.begin(), features.end()) != units.end();
}

inline Reasons against_library(const EngineKey& key, const Host& host) {
  const std::string* here = host.version(key.flavour);
  if (here == nullptr) return {missing(key.flavour)};
  if (*here == key.library_version) return {};
  return {"compiled with " + key.flavour + " " + key.library_version + "; here " + *here + ": " + remedy(key.flavour) +
          ", or install that release"};
}

inline Reasons against_cpu(const EngineKey& key, const Host& host) {
  const std::string fix = remedy(key.flavour);
  if (key.architecture != host.architecture) {
    return {"compiled for " + key.architecture + "; this machine is " + host.architecture + ": " + fix};
  }
  std::vector<std::string> lacking;
  for (const std::string& feature : key.cpu_features) {
    const auto& there = host.cpu_features;
    if (std::find(there.begin(), there.end(), feature) == there.end()) lacking.push_back(feature);
  }
  if (!lacking.empty()) {
    return {"compiled for a CPU with " + joined(lacking) + "; this one (" + host.device_name + ") has none: " + fix};
  }
  const std::string format = computed_in(key);
  if (!has_units(format, host.cpu_features)) {
    return {"computes in " + format + "; this CPU (" + host.device_name + ") has no instructions for it: " + fix};
  }
  return {};
}

inline std::string no_gpu(const Host& host) {
  return "needs an NVIDIA GPU: " + (host.no_gpu.empty() ? "none was asked for (device=cuda)" : host.no_gpu);
}

inline Reasons against_architecture(const std::string& flavour, const GpuKey& asked, const Gpu& gpu) {
  const auto& there = asked.architectures;
  const bool later = asked.hardware_compatibility == "ampere_plus" && numbers(gpu.architecture)[0] >= 80;
  if (later || std::find(there.begin(), there.end(), gpu.architecture) != there.end()) return {};
  return {"compiled for " + joined(there) + "; this GPU (" + gpu.name + ") is " + gpu.architecture + ": " + remedy(flavour)};
}

inline Reasons against_driver(const GpuKey& asked, const Gpu& gpu) {
  if (!asked.driver || numbers(gpu.driver)[0] >= numbers(*asked.driver)[0]) return {};
  return {"compiled under a driver for CUDA " + *asked.driver + "; the one here serves CUDA " + gpu.driver +
          ": update the driver"};
}

/// Return why no library loads a plan.
inline Reasons against_plan_library(const EngineKey& key, const GpuKey& asked, const Host& host) {
  const std::string* here = host.version(key.flavour);
  if (asked.version_compatible) {
    std::vector<const std::string*> found;
    for (const char* name : {"tensorrt", "tensorrt_lean"}) {
      if (const std::string* version = host.version(name)) found.push_back(version);
    }
    // Newer releases run the lean runtime that a plan carries. A plan without one needs the runtime of its own release.
    for (const std::string* version : found) {
      const bool newer = numbers(*version) >= numbers(key.library_version);
      if (*version == key.library_version || (newer && asked.host_code)) return {};
    }
    if (here == nullptr && !found.empty()) here = found.front();
  }
  if (here == nullptr) {
    if (host.jetson && key.flavour == "tensorrt_rtx") {
      return {"needs " + key.flavour + ", which no Jetson has: " + remedy(key.flavour)};
    }
    return {missing(key.flavour)};
  }
  if (*here == key.library_version) return {};
  return {"compiled with " + key.flavour + " " + key.library_version + (asked.host_code ? " or newer" : "") + "; here " + *here +
          ": " + remedy(key.flavour) + ", or install that release"};
}

/// Return the library that loads a plan: its own, or the lean runtime for a version-compatible plan.
inline std::string library_to_load(const EngineKey& key, const Host& host) {
  const std::string *own = host.version(key.flavour), *lean = host.version("tensorrt_lean");
  if (!key.gpu || !key.gpu->version_compatible || (own != nullptr && *own == key.library_version)) return key.flavour;
  const bool runs = own != nullptr && key.gpu->host_code && numbers(*own) >= numbers(key.library_version);
  return runs || lean == nullptr ? key.flavour : "tensorrt_lean";
}

inline void append(Reasons& reasons, const Reasons& more) { reasons.insert(reasons.end(), more.begin(), more.end()); }

/// Return why a plan of TensorRT, TensorRT-RTX or the lean runtime cannot run on a host.
inline Reasons against_plan(const EngineKey& key, const Host& host) {
  if (!key.gpu) return {"is a plan, and its key says nothing of a GPU: " + remedy(key.flavour)};
  const GpuKey& asked = *key.gpu;
  Reasons reasons = against_plan_library(key, asked, host);
  if (reasons.empty() && asked.stripped && library_to_load(key, host) == "tensorrt_lean") {
    reasons.push_back(
        "was written without weights, and tensorrt_lean takes none from a graph: compile it without --strip, or install "
        "tensorrt");
  }
  const bool times_kernels = key.flavour == "tensorrt";  // TensorRT-RTX compiles for any machine
  if (times_kernels && key.architecture != host.architecture) {
    reasons.push_back("compiled on " + key.architecture + "; this machine is " + host.architecture + ": " +
                      remedy(key.flavour));
  }
  if (!host.gpu) {
    reasons.push_back(no_gpu(host));
    return reasons;
  }
  const Gpu& gpu = *host.gpu;
  const Reasons elsewhere = against_architecture(key.flavour, asked, gpu);
  append(reasons, elsewhere);
  if (elsewhere.empty() && times_kernels && asked.hardware_compatibility == "none") {
    // All modules of Jetson Orin have the same name, so compare the number of SMs too.
    const bool same_count = !asked.multiprocessors || *asked.multiprocessors == gpu.multiprocessors;
    if (key.device_name != gpu.name || !same_count) {
      const std::string count = asked.multiprocessors ? std::to_string(*asked.multiprocessors) : "None";
      reasons.push_back("compiled for the kernels of " + key.device_name + " (" + count + " SMs); this GPU is " + gpu.name +
                        " (" + std::to_string(gpu.multiprocessors) +
                        " SMs), and only plans with --hardware-compatibility move between models: " + remedy(key.flavour));
    }
  }
  append(reasons, against_driver(asked, gpu));
  return reasons;
}

inline Reasons against_torch_tensorrt(const EngineKey& key, const Host& host) {
  Reasons reasons = against_library(key, host);
  if (key.architecture != host.architecture) {
    reasons.push_back("compiled on " + key.architecture + "; this machine is " + host.architecture + ": " +
                      remedy(key.flavour));
  }
  if (!host.gpu || !key.gpu) {
    reasons.push_back(no_gpu(host));
    return reasons;
  }
  append(reasons, against_architecture(key.flavour, *key.gpu, *host.gpu));
  append(reasons, against_driver(*key.gpu, *host.gpu));
  return reasons;
}

/// Return why an engine with this key cannot run on a host, one phrase with a fix each; empty if it can.
inline Reasons reasons_against(const EngineKey& key, const Host& host, const std::vector<BackEnd>& back_ends = {}) {
  for (const BackEnd& one : back_ends) {
    if (one.flavour == key.flavour && one.reasons_against != nullptr) return one.reasons_against(key, host);
  }
  const std::string& flavour = key.flavour;
  if (flavour == "openvino" || flavour == "onnxruntime") {
    Reasons reasons = against_library(key, host);
    append(reasons, against_cpu(key, host));
    return reasons;
  }
  if (flavour == "tensorrt" || flavour == "tensorrt_rtx" || flavour == "tensorrt_lean") return against_plan(key, host);
  if (flavour == "torch_tensorrt") return against_torch_tensorrt(key, host);
  if (flavour == "torchscript") return host.version(flavour) == nullptr ? against_library(key, host) : Reasons{};
  return {"is of the flavour " + flavour +
          ", which this release does not know: upgrade edge-backbones, or install the package that adds it"};
}

}  // namespace compat
}  // namespace edge_backbones
