// Choose the engine of a bundle that runs on a machine, with the rules and the messages of engines/select.py.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "compat.hpp"
#include "host.hpp"
#include "manifest.hpp"
#include "promises.hpp"
#include "session.hpp"

namespace edge_backbones {

/// A device by its name: "auto", "cpu", "cuda" or "cuda:1".
struct Device {
  std::string place = "auto";  ///< auto, cpu or cuda.
  int gpu = 0;
};

/// Return the device of a name. Throws Code::input for other text.
inline Device parse_device(const std::string& name) {
  if (name == "auto" || name == "cpu" || name == "cuda") return {name, 0};
  const std::string digits = name.compare(0, 5, "cuda:") == 0 ? name.substr(5) : "";
  if (digits.empty() || digits.size() > 3 || digits.find_first_not_of("0123456789") != std::string::npos) {
    throw Error(Code::input, "device must be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got " + quoted(name));
  }
  return {"cuda", std::stoi(digits)};
}

/// What a choice depends on, beside the bundle: the machine, and what the user asked for.
struct Wish {
  std::string engine;            ///< A precision, a flavour or a name in the manifest; "" for any.
  std::string place = "cpu";     ///< auto, cpu or cuda.
  bool allow_host_code = false;  ///< Allow engines that are programs, and runtimes inside plans.
};

namespace select {

using Reasons = compat::Reasons;

inline bool is_meant(const EngineRecord& record, const std::string& engine) {
  return engine.empty() || engine == name_of(record.key.precision) || engine == record.key.flavour || engine == record.name;
}

/// Return the command that rebuilds a bundle with graphs of these precisions, beside those that it has.
inline std::string way_to_build(const Manifest& manifest, const std::vector<Precision>& precisions) {
  std::vector<Precision> wanted;
  const auto want = [&](Precision one) {
    if (std::find(wanted.begin(), wanted.end(), one) == wanted.end()) wanted.push_back(one);
  };
  for (const GraphRecord& graph : manifest.graphs) {
    if (graph.format == "onnx") want(graph.precision);
  }
  for (const Precision one : precisions) want(one);
  std::vector<std::string> asked;
  bool calibrated = false;
  for (const Precision one : wanted) {
    asked.push_back(std::string("--precision ") + name_of(one));
    calibrated = calibrated || one == Precision::int8 || one == Precision::fp8;
  }
  return "A graph is made where the network is: edge-backbones build MODEL " + manifest.folder + " " + joined(asked, " ") +
         (calibrated ? " --images FOLDER" : "") +
         " --overwrite, on the workstation and with the options that it was built with";
}

/// Return the command that makes the engine that was asked for, if none fits.
inline std::string advice(const Manifest& manifest, const Wish& wish) {
  const auto has_graph = [&](const char* format, Precision precision) {
    return std::any_of(manifest.graphs.begin(), manifest.graphs.end(), [&](const GraphRecord& graph) {
      return graph.format == format && graph.precision == precision;
    });
  };
  const std::string& path = manifest.folder;
  std::string command = "Run: edge-backbones compile " + path;
  if (const auto precision = precision_of(wish.engine)) {
    if (!has_graph("onnx", *precision)) return way_to_build(manifest, {*precision});
    command += " --precision " + wish.engine;
  } else if (const Flavour* flavour = find_flavour(wish.engine)) {
    if (wish.engine == "torchscript" && !has_graph("torchscript", Precision::fp32)) return way_to_build(manifest, {});
    const std::string way = wish.engine == "torch_tensorrt"
                                ? "edge-backbones build MODEL " + path + " --flavour torch_tensorrt --overwrite"
                                : "edge-backbones compile " + path + " --flavour " + wish.engine;
    return "Run: " + way + (flavour->on_cpu ? "" : " (on the machine with that GPU)");
  } else if (!wish.engine.empty() && !manifest.engines.empty()) {
    return "Ask for one of these, or for a precision or a flavour: edge-backbones inspect " + path;
  }
  // On a machine with a GPU, the command compiles for the GPU unless the CPU is named.
  return command + (wish.place == "cpu" ? " --device cpu" : wish.place == "cuda" ? " (on the machine with that GPU)" : "");
}

/// Return why an engine does not run on a kind of device, as one phrase; empty if it does.
inline Reasons against_place(const EngineRecord& engine, const std::string& place) {
  const Flavour* flavour = find_flavour(engine.key.flavour);
  if (flavour == nullptr || place == "auto" || (place == "cpu" ? flavour->on_cpu : flavour->on_gpu)) return {};
  const std::string there = flavour->on_cpu ? "cpu" : "cuda";
  return {"runs on " + there + ", not on " + place + ": ask for it there (device='" + there + "', --device " + there + ")"};
}

/// Return why an engine that runs code on the CPU cannot run: it was not asked for by name, or code is not allowed.
inline Reasons code_reasons(const EngineRecord& engine, const Wish& wish) {
  const EngineKey& key = engine.key;
  const Flavour* flavour = find_flavour(key.flavour);
  const bool named = wish.engine == key.flavour || wish.engine == engine.name;
  if (flavour != nullptr && flavour->is_program && !(wish.allow_host_code && named)) {
    return {"is a program, which may do whatever its author wrote: it is run only when asked for by name, and with "
            "allow_host_code=True (engine=" + quoted(key.flavour) + "; --engine " + key.flavour + " --allow-host-code)"};
  }
  if (key.gpu && key.gpu->host_code && !wish.allow_host_code) {
    return {"carries a runtime, which is code: it is run only with allow_host_code=True (--allow-host-code)"};
  }
  return {};
}

/// Return why an engine of a bundle cannot run, one phrase each; empty if it can. Its parity must be inside its gate.
inline Reasons reasons_against(const Manifest& manifest, const EngineRecord& engine, const Host& host, const Wish& wish,
                               const std::vector<BackEnd>& back_ends = {}) {
  Reasons reasons = against_place(engine, wish.place);
  compat::append(reasons, code_reasons(engine, wish));
  compat::append(reasons, promises::reasons_against(manifest, engine));
  return reasons.empty() ? compat::reasons_against(engine.key, host, back_ends) : reasons;
}

/// Return the engines that `wish.engine` asks for and that nothing speaks against. Throws Code::engine_mismatch for none.
inline std::vector<const EngineRecord*> fitting_engines(const Manifest& manifest, const Wish& wish,
                                                        const std::function<Reasons(const EngineRecord&)>& against) {
  std::vector<const EngineRecord*> wanted, fitting;
  std::vector<std::string> held;
  for (const EngineRecord& engine : manifest.engines) {
    held.push_back(engine.name);
    if (is_meant(engine, wish.engine)) wanted.push_back(&engine);
  }
  if (wanted.empty()) {
    const std::string asked = wish.engine.empty() ? "engine" : "engine " + quoted(wish.engine);
    throw Error(Code::engine_mismatch, manifest.folder + " has no " + asked + "; it holds: " +
                                           (held.empty() ? "none" : joined(held)) + ". " + advice(manifest, wish));
  }
  std::vector<std::string> listed;
  bool to_allow = false;
  for (const EngineRecord* engine : wanted) {
    const Reasons why = against(*engine);
    if (why.empty()) fitting.push_back(engine);
    listed.push_back(engine->name + ": " + joined(why, " and "));
    to_allow = to_allow || (why.size() == 1 && why[0].find("allow_host_code=True") != std::string::npos);
  }
  if (fitting.empty()) {
    // If code is not allowed, a newly compiled engine would not be allowed either.
    throw Error(Code::engine_mismatch, "no engine of " + manifest.folder + " can run here. " + joined(listed, "; ") + "." +
                                           (to_allow ? "" : " " + advice(manifest, wish)));
  }
  return fitting;
}

/// Return the milliseconds by which engines are compared, by name; empty if they were not all timed.
inline std::map<std::string, double> comparable_times(const std::vector<const EngineRecord*>& engines) {
  for (const auto field : {&EngineRecord::pipelined_milliseconds, &EngineRecord::milliseconds}) {
    std::map<std::string, double> found;
    for (const EngineRecord* engine : engines) {
      if (engine->*field) found[engine->name] = *(engine->*field);
    }
    if (found.size() == engines.size()) return found;
  }
  return {};
}

/// Return the best engine of a bundle that can run on `host`. Throws Code::engine_mismatch, with a reason for each, for none.
///
/// If all of them were timed side by side, the fastest is the best; otherwise the one with the fewest bits. An engine for the
/// GPU is better than one for the CPU.
inline const EngineRecord& choose_engine(const Manifest& manifest, const Host& host, const Wish& wish,
                                         const std::vector<BackEnd>& back_ends = {}) {
  auto fitting = fitting_engines(manifest, wish, [&](const EngineRecord& engine) {
    return reasons_against(manifest, engine, host, wish, back_ends);
  });
  std::string place = wish.place;
  if (place == "auto") {  // the CPU's engines and the GPU's were not timed against each other
    std::vector<const EngineRecord*> on_gpu;
    for (const EngineRecord* engine : fitting) {
      if (engine->key.gpu) on_gpu.push_back(engine);
    }
    if (!on_gpu.empty()) fitting = on_gpu;
    place = fitting.front()->key.gpu ? "cuda" : "cpu";
  }
  using P = Precision;
  const std::vector<P> order = place == "cpu" ? std::vector<P>{P::int8, P::fp16, P::bf16, P::fp32, P::fp8}
                                              : std::vector<P>{P::int8, P::fp8, P::fp16, P::bf16, P::fp32};
  const auto times = comparable_times(fitting);
  const auto rank = [&](std::ptrdiff_t position) {
    // Equally fast or not timed: fewer bits first. Within a precision: the engine that is most specific to this device, then
    // the newest.
    const EngineRecord& engine = *fitting[static_cast<std::size_t>(position)];
    const auto time = times.find(engine.name);
    const Flavour* flavour = find_flavour(engine.key.flavour);
    std::vector<double> ranks = {time == times.end() ? 0.0 : time->second};
    const auto add = [&](std::ptrdiff_t value) { ranks.push_back(static_cast<double>(value)); };
    add(std::find(order.begin(), order.end(), engine.key.precision) - order.begin());
    add(flavour == nullptr ? std::ptrdiff_t{99} : flavour - flavours);
    if (const auto& gpu = engine.key.gpu) {
      add(gpu->hardware_compatibility != "none");
      add(gpu->version_compatible);
      add(gpu->dla_core.has_value());
    }
    add(-static_cast<std::ptrdiff_t>(engine.key.cpu_features.size()));
    add(-position);
    return ranks;
  };
  std::ptrdiff_t best = 0;
  for (std::ptrdiff_t i = 1; i < static_cast<std::ptrdiff_t>(fitting.size()); ++i) {
    if (rank(i) < rank(best)) best = i;
  }
  return *fitting[static_cast<std::size_t>(best)];
}

/// Return why `choose_engine` did not choose each of the other engines, as a phrase by name, in the manifest's order.
inline std::vector<std::pair<std::string, std::string>> passed_over(const Manifest& manifest, const EngineRecord& chosen,
                                                                    const Host& host, const Wish& wish,
                                                                    const std::vector<BackEnd>& back_ends = {}) {
  std::vector<std::pair<std::string, std::string>> found;
  std::vector<const EngineRecord*> runnable = {&chosen};
  for (const EngineRecord& other : manifest.engines) {
    if (other.name == chosen.name) continue;
    Reasons reasons;
    if (!is_meant(other, wish.engine)) reasons.push_back("engine=" + quoted(wish.engine) + " was asked for");
    if (reasons.empty()) reasons = reasons_against(manifest, other, host, wish, back_ends);
    if (reasons.empty() && other.key.gpu.has_value() == chosen.key.gpu.has_value()) runnable.push_back(&other);
    found.emplace_back(other.name, reasons.empty() ? "would run, and " + chosen.name + " is preferred" : joined(reasons, "; "));
  }
  const auto times = comparable_times(runnable);  // of all at once, as choose_engine compares them
  if (times.empty()) return found;
  for (std::size_t i = 1; i < runnable.size(); ++i) {
    for (auto& [name, why] : found) {
      if (name != runnable[i]->name) continue;
      why = "takes " + detail::formatted("%.2f", times.at(name)) + " ms, the one that runs " +
            detail::formatted("%.2f", times.at(chosen.name)) + " ms";
    }
  }
  return found;
}

/// Return what `engine` stands for: a precision, a flavour and a full name as they are, a prefix as the full name.
///
/// Throws Code::engine_mismatch for a prefix of several names.
inline std::string full_name(const Manifest& manifest, const std::string& engine) {
  std::vector<std::string> meant;
  for (const EngineRecord& record : manifest.engines) {
    if (record.name == engine) return engine;
    if (!engine.empty() && record.name.compare(0, engine.size(), engine) == 0) meant.push_back(record.name);
  }
  if (precision_of(engine) || find_flavour(engine) != nullptr || meant.empty()) return engine;
  if (meant.size() > 1) {
    throw Error(Code::engine_mismatch, quoted(engine) + " begins the names of " + std::to_string(meant.size()) +
                                           " engines of " + manifest.folder + ": " + joined(meant) + ". Type more of one");
  }
  return meant.front();
}

}  // namespace select
}  // namespace edge_backbones
