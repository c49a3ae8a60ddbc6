// The seam between this library and the libraries that run engines: Session, and BackEnd, which makes sessions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "types.hpp"

namespace edge_backbones {

struct Host;

/// How an engine is loaded.
struct LoadOptions {
  int threads = 0;               ///< Most CPU threads; 0 for the library's choice among the CPUs that this process may use.
  int gpu = -1;                  ///< Index of the GPU; -1 for the CPU.
  bool allow_host_code = false;  ///< Run engines that are programs, and runtimes inside plans.
};

/// One loaded engine. Several threads may call `run` at once. Destroy it only when no thread is in a call.
class Session {
 public:
  Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  virtual ~Session() = default;

  /// Run the engine once, on memory of the host.
  ///
  /// `input` is row-major without gaps and has the dtype of the input. Its shape is one that the engine takes without
  /// splitting or filling. `outputs` has one tensor per output, in the order of `BackboneSpec::described_outputs`, each
  /// row-major in the engine's own layout, with the shape that `output_shape` returns. Backbone, which calls this, has checked
  /// all of it. Throws Code::inference if the library fails.
  virtual void run(const ConstTensor& input, const std::vector<Tensor>& outputs) = 0;

  /// Enqueue one call on a stream of the GPU (a cudaStream_t) and return without waiting. All pointers are of the device.
  ///
  /// The default is for engines on the CPU: it throws Code::input.
  virtual void run_on_device(const ConstTensor& input, const std::vector<Tensor>& outputs, void* stream) {
    (void)input, (void)outputs, (void)stream;
    throw Error(Code::input, "this engine runs on the CPU and takes no memory of a GPU: call run, or open an engine for a GPU");
  }

  /// Return the shape of one output, in the engine's own layout, for an input of a shape that the engine takes.
  ///
  /// `output` counts as in `BackboneSpec::described_outputs`.
  virtual Shape output_shape(std::size_t output, const Shape& input_shape) const = 0;
};

/// One library that runs engines. A back end is data alone: copy it, and pass it in Options::back_ends.
///
/// `compat.hpp` knows the rules of every flavour of the Python package by its name, so `reasons_against` stays null for them.
/// `host.hpp` asks the driver about the GPU: back ends do not describe it.
struct BackEnd {
  std::string flavour;                 ///< Name in the keys of engines: "openvino", "tensorrt", ...
  std::string (*version)() = nullptr;  ///< Return the library's full version as keys have it; "" if it cannot be used here.
  /// Load the bytes of an engine; the session keeps them. The key's reasons have been checked. Throws Code::engine_mismatch
  /// for bytes that are no engine of this library or whose inputs and outputs are not those of the manifest.
  std::unique_ptr<Session> (*load)(const Manifest& manifest, const EngineRecord& engine, std::vector<char>&& bytes,
                                   const LoadOptions& options) = nullptr;
  /// Return why an engine with this key cannot run on a host, one phrase with a fix each. Null: the rules of compat.hpp.
  std::vector<std::string> (*reasons_against)(const EngineKey& key, const Host& host) = nullptr;
};

}  // namespace edge_backbones
