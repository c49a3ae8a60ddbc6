// Runs the TorchScript graph of a bundle with libtorch, on the CPU.
//
// Such a file is a program, and libtorch does what it says: it runs only if it is asked for by name and LoadOptions allow it.
// The headers of torch 2.14 need C++20.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/script.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpus.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "session.hpp"
#include "text.hpp"
#include "types.hpp"

namespace edge_backbones {

/// Return the release of libtorch, as keys of engines have it.
inline std::string libtorch_version() { return TORCH_VERSION; }

namespace detail {

/// Return why torch failed, in its own words: the first sentence of the last line. It writes a trace before the cause.
inline std::string torch_cause(const std::exception& error) {
  const auto* own = dynamic_cast<const c10::Error*>(&error);
  std::istringstream lines(own == nullptr ? error.what() : own->what_without_backtrace());
  std::string last;
  for (std::string line; std::getline(lines, line);) {
    const std::size_t begin = line.find_first_not_of(" \t\r"), end = line.find_last_not_of(" \t\r");
    if (begin != std::string::npos) last = line.substr(begin, end + 1 - begin);
  }
  const std::string kind = "RuntimeError: ";
  if (last.compare(0, kind.size(), kind) == 0) last = last.substr(kind.size());
  last = last.substr(0, last.find(". "));
  while (!last.empty() && last.back() == '.') last.pop_back();
  return last.empty() ? "it does not say why" : shortened(last, 500);
}

inline torch::ScalarType torch_type(DType dtype) {
  return dtype == DType::float32 ? torch::kFloat32 : dtype == DType::float16 ? torch::kFloat16 : torch::kUInt8;
}

/// The bytes of a program, as torch reads them: without a copy and without a file.
class TorchBytes final : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit TorchBytes(const std::vector<char>& bytes) : bytes_(bytes) {}

  std::size_t size() const override { return bytes_.size(); }
  std::size_t read(std::uint64_t position, void* buffer, std::size_t count, const char*) const override {
    if (position >= bytes_.size()) return 0;
    const std::size_t there = std::min(count, bytes_.size() - static_cast<std::size_t>(position));
    std::memcpy(buffer, bytes_.data() + position, there);
    return there;
  }

 private:
  const std::vector<char>& bytes_;
};

/// Set the number of threads that torch uses for this thread's calls, and the one before again at the end. 0: leave it.
class TorchThreads {
 public:
  explicit TorchThreads(int wanted) : before_(wanted > 0 ? at::get_num_threads() : 0) {
    if (wanted > 0 && wanted != before_) at::set_num_threads(wanted);
    is_other_ = wanted > 0 && wanted != before_;
  }
  TorchThreads(const TorchThreads&) = delete;
  TorchThreads& operator=(const TorchThreads&) = delete;
  ~TorchThreads() {
    if (is_other_) at::set_num_threads(before_);
  }

 private:
  int before_;
  bool is_other_ = false;
};

/// A loaded TorchScript file on the CPU. Threads may share it. torch optimises it in its first calls, which are slower.
class TorchScriptSession final : public Session {
 public:
  TorchScriptSession(const Manifest& manifest, const EngineRecord& engine, const std::vector<char>& bytes,
                     const LoadOptions& options)
      : input_(manifest.input), outputs_(manifest.backbone.described_outputs()), threads_(options.threads) {
    if (!options.allow_host_code) {
      throw Error(Code::engine_mismatch,
                  engine.name + " is a program, and it is run only with allow_host_code=True (--allow-host-code)");
    }
    if (options.gpu >= 0) {
      throw Error(Code::engine_mismatch, engine.name + " runs on the CPU in C++ programs, and device is cuda: ask for device "
                                             "cpu, or open the bundle with Python's EdgeBackbone");
    }
    try {
      module_ = torch::jit::load(std::make_shared<TorchBytes>(bytes), torch::Device(torch::kCPU), /*load_debug_files=*/false);
      module_.eval();
      const auto returned = module_.get_method("forward").graph()->outputs().at(0)->type();
      if (const auto tuple = returned->cast<c10::TupleType>()) require_count(tuple->elements().size());
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      throw Error(Code::engine_mismatch, "torch " + libtorch_version() + " does not load this TorchScript (" +
                                             torch_cause(error) + "): build or compile it again");
    }
  }

  void run(const ConstTensor& input, const std::vector<Tensor>& outputs) override {
    const std::vector<torch::Tensor> maps = forward(input);
    for (std::size_t i = 0; i < maps.size(); ++i) {
      const Shape shape = maps[i].sizes().vec();
      if (shape != outputs[i].shape) {
        throw Error(Code::inference, "torch returns " + outputs_[i].name + " of shape " + text_of(shape) + " for " +
                                         describe(input) + ", expected " + text_of(outputs[i].shape));
      }
      std::memcpy(outputs[i].data, maps[i].data_ptr(), outputs[i].bytes());
    }
  }

  /// torch tells the shapes only of what it has computed: the first call for a size runs zeros.
  Shape output_shape(std::size_t output, const Shape& input_shape) const override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = shapes_.find(input_shape);
      if (found != shapes_.end()) return found->second.at(output);
    }
    const std::vector<char> zeros(size_of(input_shape) * bytes_of(input_.dtype()));
    std::vector<Shape> shapes;
    for (const torch::Tensor& map : forward(ConstTensor(zeros.data(), input_.dtype(), input_shape))) {
      shapes.push_back(map.sizes().vec());
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shapes_.size() >= 256) shapes_.clear();  // a program that asks for every size keeps little
    return shapes_.emplace(input_shape, std::move(shapes)).first->second.at(output);
  }

 private:
  static std::string describe(const ConstTensor& input) {
    return std::string(name_of(input.dtype)) + " " + text_of(input.shape);
  }

  void require_count(std::size_t returned) const {
    if (returned == outputs_.size()) return;
    std::vector<std::string> names;
    for (const OutputSpec& output : outputs_) names.push_back(output.name);
    throw Error(Code::engine_mismatch, "the program returns " + std::to_string(returned) +
                                           " tensors, the manifest promises " + text_of(names) + ": build it again");
  }

  /// Return the outputs in the manifest's dtype, row-major in the engine's own layout.
  std::vector<torch::Tensor> forward(const ConstTensor& input) const {
    if (process_ != ::getpid()) {
      throw Error(Code::inference,
                  "torch was started in the process that this one was forked from, and its threads do not exist here: fork "
                  "before a bundle is opened, or start workers with exec");
    }
    const int limit = threads_ == 0 ? cpu_limit_ : 0;
    const TorchThreads threads(limit == 0 ? threads_ : std::min(limit, at::get_num_threads()));
    const c10::InferenceMode guard;
    try {
      // torch takes writable memory only, although a network does not write to its input.
      const torch::Tensor pixels =
          torch::from_blob(const_cast<void*>(input.data), c10::IntArrayRef(input.shape), torch_type(input.dtype));
      torch::jit::Module module = module_;  // a handle; running it does not change it
      const torch::IValue returned = module.forward({pixels});
      std::vector<torch::Tensor> maps;
      if (returned.isTensor()) {
        maps.push_back(returned.toTensor());
      } else if (returned.isTuple()) {
        for (const torch::IValue& one : returned.toTupleRef().elements()) maps.push_back(one.toTensor());
      } else {
        for (const torch::IValue& one : returned.toListRef()) maps.push_back(one.toTensor());
      }
      require_count(maps.size());
      for (std::size_t i = 0; i < maps.size(); ++i) maps[i] = maps[i].to(torch_type(outputs_[i].dtype)).contiguous();
      return maps;
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      throw Error(Code::inference, "torch failed on " + describe(input) + ": " + torch_cause(error));
    }
  }

  InputSpec input_;
  std::vector<OutputSpec> outputs_;
  int threads_;
  pid_t process_ = ::getpid();
  int cpu_limit_ = cpu_limit();
  torch::jit::Module module_;
  mutable std::mutex mutex_;
  mutable std::map<Shape, std::vector<Shape>> shapes_;
};

}  // namespace detail

/// Return the back end that runs the TorchScript graph of a bundle with libtorch, on the CPU.
inline BackEnd libtorch_back_end() {
  BackEnd back_end;
  back_end.flavour = "torchscript";
  back_end.version = &libtorch_version;
  back_end.load = [](const Manifest& manifest, const EngineRecord& engine, std::vector<char>&& bytes,
                     const LoadOptions& options) -> std::unique_ptr<Session> {
    return std::make_unique<detail::TorchScriptSession>(manifest, engine, bytes, options);
  };
  return back_end;
}

}  // namespace edge_backbones
