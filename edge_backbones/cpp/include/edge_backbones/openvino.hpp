// Run engines with OpenVINO on the CPU, with the settings of engines/openvino/session.py.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/op/parameter.hpp>
#include <openvino/op/relu.hpp>
#include <openvino/op/result.hpp>
#include <openvino/runtime/core.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compat.hpp"
#include "cpus.hpp"
#include "manifest.hpp"
#include "ports.hpp"
#include "session.hpp"

namespace edge_backbones {

/// Return OpenVINO's full version, as keys of engines have it.
inline std::string openvino_version() { return ov::get_openvino_version().buildNumber; }

namespace detail {

/// Return why OpenVINO refused, in its own words on one line, without places in its sources and links.
inline std::string openvino_cause(const std::string& said) {
  std::string found;
  std::istringstream lines(said);
  for (std::string line; std::getline(lines, line);) {
    if (line.find("://") != std::string::npos) continue;
    for (const char* frame : {"Exception from ", "Check '"}) {  // "Exception from src/x.cpp:12:", "Check 'a' failed at x:12:"
      const std::size_t begin = line.find(frame);
      if (begin == std::string::npos) continue;
      std::size_t end = line.find(".cpp:", begin);
      if (end == std::string::npos) end = line.find(".hpp:", begin);
      end = end == std::string::npos ? end : line.find(':', end + 5);
      if (end != std::string::npos) line.erase(begin, end + 1 - begin);
    }
    std::istringstream words(line);
    for (std::string word; words >> word;) found += (found.empty() ? "" : " ") + word;
  }
  while (!found.empty() && found.back() == '.') found.pop_back();
  if (found == "std::bad_alloc") found = "out of memory (std::bad_alloc)";
  return shortened(visible(found.empty() ? said : found), 500);
}

/// Return the one Core of this process, which is kept for good.
///
/// A forked child of the process that made it cannot use it: it would wait for threads that it does not have. Throws
/// Code::inference there. The Core is never destroyed: its CPU plugin gives the thread that made it a signal stack
/// (sigaltstack), and unmaps that when it is destroyed.
inline ov::Core& openvino_core() {
  struct Made {
    ov::Core core;
    pid_t process = ::getpid();
  };
  static Made* const made = new Made;
  if (made->process != ::getpid()) {
    throw Error(Code::inference,
                "OpenVINO was started in the process that this one was forked from, and its threads do not exist here: fork "
                "before a bundle is opened, or start workers with exec");
  }
  return made->core;
}

/// Return plugin settings: one stream, low latency, no pinning, and the number format to compute in.
inline ov::AnyMap openvino_settings(int threads, const std::string& computes_in) {
  ov::AnyMap settings{{"INFERENCE_PRECISION_HINT", computes_in == "fp32"   ? "f32"
                                                   : computes_in == "fp16" ? "f16"
                                                                           : computes_in},
                      {"PERFORMANCE_HINT", "LATENCY"},
                      {"NUM_STREAMS", "1"},
                      {"ENABLE_CPU_PINNING", false}};
  if (threads > 0) settings["INFERENCE_NUM_THREADS"] = threads;
  return settings;
}

/// Return the number of threads that OpenVINO chooses here, read from a model that does nothing.
inline int openvino_own_threads() {
  static const int chosen = [] {
    auto pixels = std::make_shared<ov::op::v0::Parameter>(ov::element::f32, ov::PartialShape{1});
    auto relu = std::make_shared<ov::op::v0::Relu>(pixels);
    auto model = std::make_shared<ov::Model>(ov::OutputVector{relu}, ov::ParameterVector{pixels}, "nothing");
    auto compiled = openvino_core().compile_model(model, "CPU", openvino_settings(0, "fp32"));
    return compiled.get_property("INFERENCE_NUM_THREADS").as<int>();
  }();
  return chosen;
}

/// Return how many threads OpenVINO may use, 0 for its own choice. It keeps to the affinity mask and not to cgroup quotas.
inline int openvino_threads(int asked) {
  const int limit = asked == 0 ? cpu_limit() : 0;
  return limit == 0 ? asked : std::min(limit, openvino_own_threads());
}

inline ov::element::Type openvino_type(DType dtype) {
  return dtype == DType::float32 ? ov::element::f32 : dtype == DType::float16 ? ov::element::f16 : ov::element::u8;
}

inline std::string port_type(const ov::element::Type& type) {
  return type == ov::element::f32   ? "FLOAT"
         : type == ov::element::f16 ? "HALF"
         : type == ov::element::u8  ? "UINT8"
         : type == ov::element::bf16 ? "BF16"
                                     : type.get_type_name();
}

inline std::optional<Shape> port_shape(const ov::PartialShape& shape) {
  if (shape.rank().is_dynamic()) return std::nullopt;
  Shape sizes;
  for (const ov::Dimension& one : shape) sizes.push_back(one.is_dynamic() ? -1 : one.get_length());
  return sizes;
}

/// One engine in OpenVINO. Threads may share it: every call borrows an infer request of its own.
class OpenVinoSession final : public Session {
 public:
  OpenVinoSession(const Manifest& manifest, const EngineRecord& engine, std::vector<char>&& bytes, const LoadOptions& options)
      : blob_(std::move(bytes)) {
    try {
      // The weights of the model may point into the blob, so it lives as long as the model.
      const ov::Tensor tensor(ov::element::u8, ov::Shape{blob_.size()}, blob_.data());
      const auto settings = openvino_settings(openvino_threads(options.threads), compat::computed_in(engine.key));
      model_ = openvino_core().import_model(tensor, "CPU", settings);
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      throw Error(Code::engine_mismatch, "OpenVINO " + openvino_version() + " does not load this engine (" +
                                             openvino_cause(error.what()) + "): run edge-backbones compile on this machine");
    }
    require_ports(manifest);
  }

  /// In a forked child the engine is kept for good: releasing it would wait for threads that the child does not have.
  ~OpenVinoSession() override {
    if (process_ == ::getpid()) return;
    struct Kept {
      ov::CompiledModel model;
      std::vector<ov::InferRequest> idle;
      std::vector<char> blob;
    };
    new Kept{std::move(model_), std::move(idle_), std::move(blob_)};
  }

  void run(const ConstTensor& input, const std::vector<Tensor>& outputs) override {
    try {
      ov::InferRequest request = borrow();
      set_input(request, input);
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        const ov::Shape shape(outputs[i].shape.begin(), outputs[i].shape.end());
        request.set_output_tensor(ports_[i], ov::Tensor(openvino_type(outputs[i].dtype), shape, outputs[i].data));
      }
      request.infer();
      give_back(std::move(request));  // a request that failed is never used again
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      refuse(input.dtype, input.shape, error);
    }
  }

  /// OpenVINO tells the shapes of an engine with variable sizes only after it ran: the first call for a size runs zeros.
  Shape output_shape(std::size_t output, const Shape& input_shape) const override {
    if (!fixed_.empty()) return fixed_.at(output);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = shapes_.find(input_shape);
      if (found != shapes_.end()) return found->second.at(output);
    }
    openvino_core();  // throws in a forked child, which would wait for ever
    const DType dtype = input_dtype_;
    std::vector<char> zeros(size_of(input_shape) * bytes_of(dtype));
    std::vector<Shape> shapes;
    try {
      ov::InferRequest request = model_.create_infer_request();
      set_input(request, ConstTensor(zeros.data(), dtype, input_shape));
      request.infer();
      for (const std::size_t port : ports_) {
        const ov::Shape shape = request.get_output_tensor(port).get_shape();
        shapes.emplace_back(shape.begin(), shape.end());
      }
    } catch (const std::exception& error) {
      refuse(dtype, input_shape, error);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shapes_.size() >= 256) shapes_.clear();  // a program that asks for every size keeps little
    return shapes_.emplace(input_shape, std::move(shapes)).first->second.at(output);
  }

 private:
  void require_ports(const Manifest& manifest) {
    const auto names = manifest.backbone.outputs();
    const std::set<std::string> wanted(names.begin(), names.end());
    std::vector<Port> ports;
    std::vector<std::string> returned;
    // A port may have several names, because OpenVINO merges equal tensors.
    const auto name_of_port = [](const ov::Output<const ov::Node>& port, const std::set<std::string>& preferred) {
      const auto& all = port.get_names();
      for (const std::string& one : all) {
        if (preferred.count(one) != 0) return one;
      }
      return all.empty() ? std::string() : port.get_any_name();
    };
    for (const auto& port : model_.inputs()) {
      const std::string name = port.get_names().empty() ? manifest.input.name : name_of_port(port, {manifest.input.name});
      ports.push_back({name, true, port_type(port.get_element_type()), port_shape(port.get_partial_shape())});
    }
    for (const auto& port : model_.outputs()) {
      returned.push_back(name_of_port(port, wanted));
      ports.push_back({returned.back(), false, port_type(port.get_element_type()), port_shape(port.get_partial_shape())});
    }
    auto sorted_returned = returned, sorted_names = names;
    std::sort(sorted_returned.begin(), sorted_returned.end());
    std::sort(sorted_names.begin(), sorted_names.end());
    if (sorted_returned != sorted_names) {
      throw Error(Code::engine_mismatch, "the engine returns " + text_of(returned) + ", the manifest promises " +
                                             text_of(names) + ": build it again");
    }
    const auto wrong = mismatches(ports, manifest.input, manifest.backbone);
    if (!wrong.empty()) {
      throw Error(Code::engine_mismatch,
                  "the engine is not the one of this manifest: " + joined(wrong, "; ") + ". Build it again");
    }
    bool all_fixed = true;
    for (const std::string& name : names) {
      const auto at = std::find(returned.begin(), returned.end(), name) - returned.begin();
      ports_.push_back(static_cast<std::size_t>(at));
      const auto shape = port_shape(model_.outputs()[ports_.back()].get_partial_shape());
      fixed_.push_back(shape.value_or(Shape{-1}));
      all_fixed = all_fixed && std::count(fixed_.back().begin(), fixed_.back().end(), -1) == 0;
    }
    if (!all_fixed) fixed_.clear();
    input_dtype_ = manifest.input.dtype();
  }

  static void set_input(ov::InferRequest& request, const ConstTensor& input) {
    const ov::Shape shape(input.shape.begin(), input.shape.end());
    // OpenVINO takes writable memory only, although it does not write to an input.
    request.set_input_tensor(ov::Tensor(openvino_type(input.dtype), shape, const_cast<void*>(input.data)));
  }

  [[noreturn]] static void refuse(DType dtype, const Shape& shape, const std::exception& error) {
    throw Error(Code::inference, std::string("OpenVINO failed on ") + name_of(dtype) + " " + text_of(shape) + ": " +
                                     openvino_cause(error.what()));
  }

  ov::InferRequest borrow() {
    openvino_core();  // throws in a forked child, which would wait for ever
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        ov::InferRequest request = std::move(idle_.back());
        idle_.pop_back();
        return request;
      }
    }
    return model_.create_infer_request();
  }

  void give_back(ov::InferRequest&& request) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(request));
  }

  pid_t process_ = ::getpid();
  std::vector<char> blob_;
  mutable ov::CompiledModel model_;  // its const calls are not marked const
  DType input_dtype_ = DType::float32;
  std::vector<std::size_t> ports_;  // by output of the manifest
  std::vector<Shape> fixed_;        // empty if sizes vary
  mutable std::mutex mutex_;
  mutable std::map<Shape, std::vector<Shape>> shapes_;
  std::vector<ov::InferRequest> idle_;
};

}  // namespace detail

/// Return the back end that runs engines of OpenVINO on the CPU.
inline BackEnd openvino_back_end() {
  BackEnd back_end;
  back_end.flavour = "openvino";
  back_end.version = &openvino_version;
  back_end.load = [](const Manifest& manifest, const EngineRecord& engine, std::vector<char>&& bytes,
                     const LoadOptions& options) -> std::unique_ptr<Session> {
    return std::make_unique<detail::OpenVinoSession>(manifest, engine, std::move(bytes), options);
  };
  return back_end;
}

}  // namespace edge_backbones
