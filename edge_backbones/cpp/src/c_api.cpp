// The C functions of edge_backbones.h, over Backbone. No exception leaves this file.
#include <edge_backbones/edge_backbones.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <edge_backbones/backbone.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#ifndef EDGE_BACKBONES_VERSION
#define EDGE_BACKBONES_VERSION "unknown"
#endif

namespace eb = edge_backbones;

namespace {

static_assert(static_cast<int>(eb::DType::float32) == EB_FLOAT32 && static_cast<int>(eb::DType::float16) == EB_FLOAT16 &&
              static_cast<int>(eb::DType::uint8) == EB_UINT8);

// A plain array: to report that memory has run out must not need memory.
thread_local char last_error[4096] = "";

int32_t failed(int32_t code, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  std::size_t end = std::strlen(last_error);
  if (end == sizeof last_error - 1) {  // not in the middle of a character
    while (end > 0 && (static_cast<unsigned char>(last_error[end - 1]) & 0xc0u) == 0x80u) --end;
    if (end > 0 && static_cast<unsigned char>(last_error[end - 1]) >= 0xc0u) --end;
    last_error[end] = '\0';
  }
  return code;
}

int32_t code_of(eb::Code code) noexcept {
  switch (code) {
    case eb::Code::bundle: return EB_BUNDLE;
    case eb::Code::manifest: return EB_MANIFEST;
    case eb::Code::integrity: return EB_INTEGRITY;
    case eb::Code::engine_mismatch: return EB_ENGINE_MISMATCH;
    case eb::Code::input: return EB_INPUT;
    case eb::Code::inference: return EB_INFERENCE;
    case eb::Code::missing_dependency: return EB_MISSING_DEPENDENCY;
  }
  return EB_INTERNAL;
}

/// Run a function; return EB_OK, or the code of what it throws.
template <class Function>
int32_t guarded(Function function) noexcept {
  last_error[0] = '\0';
  try {
    function();
    return EB_OK;
  } catch (const eb::Error& error) {
    return failed(code_of(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return failed(EB_MEMORY, "this process has no memory left: stop other programs, or raise its limit");
  } catch (const std::exception& error) {
    return failed(EB_INTERNAL, error.what());
  } catch (...) {
    return failed(EB_INTERNAL, "something was thrown that is no exception");
  }
}

[[noreturn]] void refuse(const std::string& message) { throw eb::Error(eb::Code::input, message); }

void require_pointer(const void* pointer, const char* name) {
  if (pointer == nullptr) refuse(std::string(name) + " is NULL: pass an address");
}

/// An open bundle, with the texts that callers get pointers to.
struct Open {
  explicit Open(eb::Backbone&& backbone_) : backbone(std::move(backbone_)) {
    const eb::InputSpec& input = backbone.input();
    description = input.describe();
    layout = input.layout();
    const auto described = backbone.manifest().backbone.described_outputs();
    for (const std::string& name : backbone.outputs()) {
      outputs.push_back(*std::find_if(described.begin(), described.end(), [&](const auto& one) { return one.name == name; }));
    }
    has_all = outputs.size() == described.size();
  }

  eb::Backbone backbone;
  std::string description, layout;
  std::vector<eb::OutputSpec> outputs;  // those that a call returns
  bool has_all = false;                 // whether these are all that the engine computes
};

/// The open bundles by handle. Calls share them, so that eb_close in another thread releases none that is in use.
class Handles {
 public:
  eb_backbone add(std::shared_ptr<Open> open) {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_.emplace(next_, std::move(open));
    return next_++;
  }

  std::shared_ptr<Open> get(eb_backbone handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = open_.find(handle);
    if (found == open_.end()) refuse_handle(handle);
    return found->second;
  }

  std::shared_ptr<Open> remove(eb_backbone handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = open_.find(handle);
    if (found == open_.end()) refuse_handle(handle);
    std::shared_ptr<Open> open = std::move(found->second);
    open_.erase(found);
    return open;
  }

 private:
  [[noreturn]] void refuse_handle(eb_backbone handle) const {
    const bool was_open = handle != 0 && handle < next_;
    refuse(was_open ? "this backbone was closed: open the bundle again"
                    : std::to_string(handle) + " is no handle of a backbone: pass one that eb_open wrote");
  }

  std::mutex mutex_;
  std::map<eb_backbone, std::shared_ptr<Open>> open_;
  eb_backbone next_ = 1;
};

/// Never destroyed: threads of the program may still run while it ends.
Handles& handles() {
  static Handles* const all = new Handles;
  return *all;
}

/// Copy a struct of this library into the caller's, which may be longer, and not shorter.
template <class Info>
void fill(Info* target, const Info& info, const char* name) {
  if (target->size < sizeof(Info)) {
    refuse(std::string(name) + ".size is " + std::to_string(target->size) + ", this library writes " +
           std::to_string(sizeof(Info)) + " bytes: set it to sizeof(" + name + ")");
  }
  const std::size_t size = target->size;
  *target = info;
  target->size = size;
}

eb::Shape shape_of(const int64_t* sizes, std::size_t axes) {
  require_pointer(sizes, "input_shape");
  if (axes > EB_MAX_AXES) refuse("an input of " + std::to_string(axes) + " axes does not fit: it has 4");
  return {sizes, sizes + axes};
}

void require_room(const std::string& name, const void* memory, std::size_t given, std::size_t needed, eb::DType dtype) {
  if (given < needed) {
    refuse("the memory of " + name + " has " + std::to_string(given) + " bytes and needs " + std::to_string(needed));
  }
  if (reinterpret_cast<std::uintptr_t>(memory) % eb::bytes_of(dtype) != 0) {
    refuse("the memory of " + name + " is not aligned for " + eb::name_of(dtype) + ": pass a multiple of " +
           std::to_string(eb::bytes_of(dtype)) + " bytes");
  }
}

eb::ConstTensor input_of(const Open& open, const void* input, std::size_t input_bytes, const eb::Shape& shape) {
  require_pointer(input, "input");
  const eb::InputSpec& spec = open.backbone.input();
  spec.require(shape);
  eb::ConstTensor tensor(input, spec.dtype(), shape);
  require_room(spec.name, input, input_bytes, tensor.bytes(), tensor.dtype);
  return tensor;
}

/// Return the caller's memory as tensors. Outputs that are left out get memory of `rest`; without it they are refused.
std::vector<eb::Tensor> outputs_of(const Open& open, const eb::Shape& input, void* const* outputs, const std::size_t* bytes,
                                   std::size_t count, std::vector<std::vector<char>>* rest) {
  require_pointer(outputs, "outputs");
  require_pointer(bytes, "output_bytes");
  if (count != open.outputs.size()) {
    refuse("output_count is " + std::to_string(count) + ", this backbone returns " + std::to_string(open.outputs.size()) +
           ": see eb_output_count");
  }
  std::vector<eb::Tensor> found;
  for (std::size_t i = 0; i < count; ++i) {
    eb::Tensor tensor(outputs[i], open.outputs[i].dtype, open.backbone.output_shape(i, input),
                      open.backbone.output_strides(i, input));
    if (tensor.data != nullptr) {
      require_room(open.outputs[i].name, tensor.data, bytes[i], tensor.bytes(), tensor.dtype);
    } else if (rest != nullptr) {
      rest->emplace_back(tensor.bytes());
      tensor.data = rest->back().data();
    } else {
      refuse("outputs[" + std::to_string(i) + "] is NULL: on the GPU every output needs memory");
    }
    found.push_back(std::move(tensor));
  }
  return found;
}

eb::Options options_of(const eb_options* given) {
  eb::Options options;
  if (given == nullptr) return options;
  if (given->size < sizeof(eb_options)) {
    refuse("eb_options.size is " + std::to_string(given->size) + ", this library reads " + std::to_string(sizeof(eb_options)) +
           " bytes: set it to sizeof(eb_options)");
  }
  if (given->engine != nullptr) options.engine = given->engine;
  if (given->device != nullptr) options.device = given->device;
  if (given->stage_count != 0) require_pointer(given->stages, "stages");
  for (std::size_t i = 0; i < given->stage_count; ++i) {
    require_pointer(given->stages[i], "a name in stages");
    options.stages.emplace_back(given->stages[i]);
  }
  options.threads = given->threads;
  options.allow_host_code = given->allow_host_code != 0;
  options.check_finite = given->accept_not_finite == 0;
  options.signature_checked = given->signature_checked != 0;
  return options;
}

template <class Sizes>
void copy_sizes(const Sizes& sizes, int64_t (&target)[EB_MAX_AXES]) {
  std::copy_n(sizes.begin(), std::min<std::size_t>(sizes.size(), EB_MAX_AXES), target);
}

void copy_range(const eb::ShapeRange& range, int64_t (&target)[3]) {
  target[0] = range.min;
  target[1] = range.opt;
  target[2] = range.max;
}

}  // namespace

int32_t eb_abi_version(void) { return EB_ABI_VERSION; }

const char* eb_version(void) { return EDGE_BACKBONES_VERSION; }

const char* eb_last_error(void) { return last_error; }

const char* eb_code_name(int32_t code) {
  switch (code) {
    case EB_OK: return "OK";
    case EB_BUNDLE: return "BundleError";
    case EB_MANIFEST: return "ManifestError";
    case EB_INTEGRITY: return "IntegrityError";
    case EB_ENGINE_MISMATCH: return "EngineMismatchError";
    case EB_INPUT: return "InputError";
    case EB_INFERENCE: return "InferenceError";
    case EB_MISSING_DEPENDENCY: return "MissingDependencyError";
    case EB_MEMORY: return "MemoryError";
    default: return "an internal error";
  }
}

int32_t eb_open(const char* path, const eb_options* options, eb_backbone* backbone) {
  return guarded([&] {
    require_pointer(backbone, "backbone");
    *backbone = 0;
    require_pointer(path, "path");
    *backbone = handles().add(std::make_shared<Open>(eb::Backbone::from_pretrained(path, options_of(options))));
  });
}

int32_t eb_close(eb_backbone backbone) {
  return guarded([&] { handles().remove(backbone).reset(); });
}

int32_t eb_engine(eb_backbone backbone, const char** name, const char** device) {
  return guarded([&] {
    const auto open = handles().get(backbone);
    if (name != nullptr) *name = open->backbone.engine_name().c_str();
    if (device != nullptr) *device = open->backbone.device().c_str();
  });
}

int32_t eb_input(eb_backbone backbone, eb_input_info* info) {
  return guarded([&] {
    const auto open = handles().get(backbone);
    require_pointer(info, "info");
    const eb::InputSpec& input = open->backbone.input();
    eb_input_info found{};
    found.name = input.name.c_str();
    found.description = open->description.c_str();
    found.layout = open->layout.c_str();
    found.dtype = static_cast<int32_t>(input.dtype());
    const eb::Shape opt = input.opt_shape();
    found.axes = static_cast<int32_t>(opt.size());
    copy_sizes(opt, found.opt_shape);
    copy_range(input.batch, found.batch);
    copy_range(input.height, found.height);
    copy_range(input.width, found.width);
    found.multiple = input.size_multiple;
    fill(info, found, "eb_input_info");
  });
}

int32_t eb_output_count(eb_backbone backbone, size_t* outputs, size_t* stages) {
  return guarded([&] {
    const auto open = handles().get(backbone);
    if (outputs != nullptr) *outputs = open->outputs.size();
    if (stages != nullptr) *stages = open->backbone.out_features().size();
  });
}

int32_t eb_output(eb_backbone backbone, size_t output, const int64_t* input_shape, size_t axes, eb_output_info* info) {
  return guarded([&] {
    const auto open = handles().get(backbone);
    require_pointer(info, "info");
    const eb::Shape input = input_shape == nullptr ? open->backbone.opt_shape() : shape_of(input_shape, axes);
    const eb::Shape shape = open->backbone.output_shape(output, input);
    const eb::OutputSpec& spec = open->outputs.at(output);
    eb_output_info found{};
    found.name = spec.name.c_str();
    found.layout = spec.layout.c_str();
    found.dtype = static_cast<int32_t>(spec.dtype);
    found.axes = static_cast<int32_t>(shape.size());
    found.channels = spec.channels;
    if (spec.strides) {
      found.stride[0] = spec.strides->first;
      found.stride[1] = spec.strides->second;
    }
    copy_sizes(shape, found.shape);
    copy_sizes(open->backbone.output_strides(output, input), found.strides);
    found.bytes = eb::size_of(shape) * eb::bytes_of(spec.dtype);
    fill(info, found, "eb_output_info");
  });
}

int32_t eb_run(eb_backbone backbone, const void* input, size_t input_bytes, const int64_t* input_shape, size_t axes,
               void* const* outputs, const size_t* output_bytes, size_t output_count) {
  return guarded([&] {
    const auto open = handles().get(backbone);
    const eb::Shape shape = shape_of(input_shape, axes);
    const eb::ConstTensor pixels = input_of(*open, input, input_bytes, shape);
    std::vector<std::vector<char>> rest;
    rest.reserve(open->outputs.size());
    open->backbone.run(pixels, outputs_of(*open, shape, outputs, output_bytes, output_count, &rest));
  });
}

int32_t eb_run_on_device(eb_backbone backbone, const void* input, size_t input_bytes, const int64_t* input_shape, size_t axes,
                         void* const* outputs, const size_t* output_bytes, size_t output_count, void* stream) {
  return guarded([&] {
    const auto open = handles().get(backbone);
    if (!open->has_all) refuse("on the GPU the engine writes every stage: open the bundle without a choice of stages");
    const eb::Shape shape = shape_of(input_shape, axes);
    const eb::ConstTensor pixels = input_of(*open, input, input_bytes, shape);
    open->backbone.run_on_device(pixels, outputs_of(*open, shape, outputs, output_bytes, output_count, nullptr), stream);
  });
}
