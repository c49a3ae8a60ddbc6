// TensorRT as include/NvInferRuntime.h declares it, on the GPU of the stand-in for libcuda.so.1. The network is average pooling.
//
// A plan is text, one line for each fact:
//
//   standin-plan
//   input NAME TYPE SIZES...           -1 for a size that profiles decide
//   output NAME TYPE KERNEL            the input averaged over KERNEL x KERNEL pixels
//   odd NAME SIZES...                  the shape that the engine reports of an output, instead of the right one
//   wrong NAME                         the context reports a shape of that output that no call can have
//   profile MIN... OPT... MAX...
//   scratch BYTES
//   host_code                          it loads only if host code is allowed
//
// A program that breaks one of TensorRT's rules is ended by abort(), with the rule. standin_fail_at lets any call fail.
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "libcuda.hpp"

namespace {

using nvinfer1::Dims;
using Sizes = std::vector<std::int64_t>;

constexpr std::size_t alignment = 256;

[[noreturn]] void broken(const char* rule) {
  std::fprintf(stderr, "a rule of TensorRT is broken: %s\n", rule);
  std::abort();
}

void keep(bool rule_is_kept, const char* rule) {
  if (!rule_is_kept) broken(rule);
}

unsigned long long number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

Dims dims_of(const Sizes& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) dims.d[i] = sizes[i];
  return dims;
}

std::size_t volume(const Sizes& sizes) {
  std::size_t count = 1;
  for (const std::int64_t size : sizes) count *= static_cast<std::size_t>(size);
  return count;
}

struct Output {
  std::string name;
  nvinfer1::DataType type;
  std::int64_t kernel;
};

struct Plan {
  std::string input;
  nvinfer1::DataType input_type = nvinfer1::DataType::kFLOAT;
  Sizes sizes;
  std::vector<Output> outputs;
  std::map<std::string, Sizes> odd;
  std::string wrong;
  std::vector<std::vector<Sizes>> profiles;
  std::size_t scratch = 0;
  bool has_host_code = false;

  bool is_dynamic() const {
    for (const std::int64_t size : sizes) {
      if (size == -1) return true;
    }
    return false;
  }
};

nvinfer1::DataType type_of(const std::string& name) {
  return name == "FLOAT" ? nvinfer1::DataType::kFLOAT : name == "HALF" ? nvinfer1::DataType::kHALF
       : name == "UINT8" ? nvinfer1::DataType::kUINT8 : nvinfer1::DataType::kINT8;
}

bool read(const std::string& text, Plan& plan) {
  std::istringstream lines(text);
  std::string line;
  if (!std::getline(lines, line) || line != "standin-plan") return false;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string what, type;
    words >> what;
    std::int64_t size = 0;
    if (what == "input") {
      words >> plan.input >> type;
      plan.input_type = type_of(type);
      while (words >> size) plan.sizes.push_back(size);
    } else if (what == "output") {
      Output output{};
      words >> output.name >> type >> output.kernel;
      output.type = type_of(type);
      plan.outputs.push_back(output);
    } else if (what == "odd") {
      words >> type;
      Sizes& sizes = plan.odd[type];
      while (words >> size) sizes.push_back(size);
    } else if (what == "wrong") {
      words >> plan.wrong;
    } else if (what == "profile") {
      Sizes all;
      while (words >> size) all.push_back(size);
      const auto third = static_cast<std::ptrdiff_t>(all.size() / 3);
      std::vector<Sizes> bounds;
      for (std::ptrdiff_t i = 0; i < 3; ++i) bounds.emplace_back(all.begin() + i * third, all.begin() + (i + 1) * third);
      plan.profiles.push_back(bounds);
    } else if (what == "scratch") {
      words >> plan.scratch;
    } else if (what == "host_code") {
      plan.has_host_code = true;
    }
  }
  return !plan.sizes.empty();
}

Sizes pooled(const Sizes& sizes, std::int64_t kernel) {
  Sizes found = sizes;
  for (std::size_t i = 2; i < found.size(); ++i) found[i] = found[i] == -1 ? -1 : found[i] / kernel;
  return found;
}

struct Library {
  nvinfer1::ILogger* logger = nullptr;
  std::atomic<int> runtimes{0}, engines{0}, contexts{0};

  bool fails(const char* what) {
    if (standin_note(what) == 0) return false;
    logger->log(nvinfer1::ILogger::Severity::kERROR, (std::string(what) + ":\n  a reason of its own").c_str());
    return true;
  }
  bool refuse(const char* why) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, why);
    return false;
  }
} library;

/// What one call computes, when the GPU comes to it.
struct Work {
  const float* input;
  Sizes sizes;
  std::vector<std::pair<float*, std::int64_t>> outputs;
  const void* scratch;
  std::size_t scratch_size;
};

void check_range(const void* pointer, std::size_t size, const char* rule) {
  keep(size == 0 || standin_range_is_known(number(pointer), size) != 0, rule);
}

void compute(void* data) {
  const std::unique_ptr<Work> work(static_cast<Work*>(data));
  check_range(work->input, volume(work->sizes) * 4, "the input is freed before the work that reads it is done");
  check_range(work->scratch, work->scratch_size, "scratch memory is freed before the work that uses it is done");
  const std::int64_t height = work->sizes[2], width = work->sizes[3];
  for (const auto& [target, kernel] : work->outputs) {
    const Sizes sizes = pooled(work->sizes, kernel);
    check_range(target, volume(sizes) * 4, "an output is freed before the work that writes it is done");
    for (std::int64_t plane = 0; plane < sizes[0] * sizes[1]; ++plane) {
      for (std::int64_t y = 0; y < sizes[2]; ++y) {
        for (std::int64_t x = 0; x < sizes[3]; ++x) {
          double sum = 0;
          for (std::int64_t i = 0; i < kernel; ++i) {
            for (std::int64_t k = 0; k < kernel; ++k) {
              sum += static_cast<double>(work->input[(plane * height + y * kernel + i) * width + x * kernel + k]);
            }
          }
          target[(plane * sizes[2] + y) * sizes[3] + x] = static_cast<float>(sum / static_cast<double>(kernel * kernel));
        }
      }
    }
  }
}

class Engine;

class Context final : public nvinfer1::IExecutionContext {
 public:
  Context(Engine& engine, const Plan& plan);
  ~Context() noexcept override;

  bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept override {
    if (library.fails("setOptimizationProfileAsync")) return false;
    keep(stream != nullptr, "a profile is set on the default stream");
    profile_ = index;
    return true;
  }

  bool setInputShape(const char* name, const Dims& dims) noexcept override {
    keep(name == plan_.input, "a shape is set for a tensor that is no input");
    keep(profile_ >= 0, "a shape is set before the profile");
    if (library.fails("setInputShape")) return false;
    const Sizes sizes(dims.d, dims.d + dims.nbDims);
    if (sizes.size() != plan_.sizes.size()) return library.refuse("the shape has another number of axes");
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const bool is_fixed = plan_.sizes[i] != -1;
      const auto* bounds = is_fixed ? nullptr : &plan_.profiles[static_cast<std::size_t>(profile_)];
      const bool fits = is_fixed ? sizes[i] == plan_.sizes[i] : (*bounds)[0][i] <= sizes[i] && sizes[i] <= (*bounds)[2][i];
      if (!fits) return library.refuse("the shape is outside the profile");
    }
    sizes_ = sizes;
    has_memory_ = false;
    return true;
  }

  std::int32_t inferShapes(std::int32_t, const char**) noexcept override {
    if (library.fails("inferShapes")) return -1;
    return sizes_.empty() ? 1 : 0;
  }

  Dims getTensorShape(const char* name) const noexcept override {
    if (standin_note("getTensorShape") != 0) return Dims{-1, {}};
    if (name == plan_.wrong) return dims_of({sizes_[0] + 1, 3, 1, 1});
    for (const Output& output : plan_.outputs) {
      if (output.name == name) return dims_of(pooled(sizes_, output.kernel));
    }
    return dims_of(sizes_);
  }

  std::size_t updateDeviceMemorySizeForShapes() noexcept override {
    keep(!sizes_.empty(), "memory is asked for before a shape is set");
    return needed();
  }

  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override {
    keep(static_cast<std::size_t>(size) >= needed(), "the scratch memory is smaller than this shape needs");
    keep(number(memory) % alignment == 0, "the scratch memory is not aligned");
    check_range(memory, needed(), "the scratch memory is no memory of the GPU");
    scratch_ = memory;
    has_memory_ = true;
  }

  bool setInputTensorAddress(const char* name, const void* data) noexcept override {
    keep(name == plan_.input, "the address of an input is set for a tensor that is none");
    keep(number(data) % alignment == 0, "the address of the input is not aligned");
    if (library.fails("setInputTensorAddress")) return false;
    input_ = data;
    return true;
  }

  bool setTensorAddress(const char* name, void* data) noexcept override {
    keep(number(data) % alignment == 0, "the address of an output is not aligned");
    if (library.fails("setTensorAddress")) return false;
    addresses_[name] = data;
    return true;
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    keep(!is_used_.exchange(true), "two threads use one context at once");
    const bool done = enqueue(stream);
    is_used_ = false;
    return done;
  }

 private:
  std::size_t needed() const { return plan_.scratch == 0 ? 0 : plan_.scratch * static_cast<std::size_t>(sizes_[0]); }

  bool enqueue(cudaStream_t stream) {
    keep(!sizes_.empty(), "a context runs without a shape");
    keep(needed() == 0 || has_memory_, "a context runs without scratch memory for its shape");
    keep(number(stream) > 2, "work on a default stream makes TensorRT wait for the device");
    keep(input_ != nullptr && addresses_.size() == plan_.outputs.size(), "a context runs without an address");
    if (library.fails("enqueueV3")) return false;
    auto work = std::make_unique<Work>();
    work->input = static_cast<const float*>(input_);
    work->sizes = sizes_;
    for (const Output& output : plan_.outputs) {
      work->outputs.emplace_back(static_cast<float*>(addresses_[output.name]), output.kernel);
    }
    work->scratch = scratch_;
    work->scratch_size = needed();
    if (standin_kernel(stream, compute, work.get()) != 0) return library.refuse("the kernel was not launched");
    (void)work.release();
    return true;
  }

  Engine& engine_;
  const Plan& plan_;
  std::int32_t profile_;
  Sizes sizes_;
  const void* input_ = nullptr;
  std::map<std::string, void*> addresses_;
  void* scratch_ = nullptr;
  bool has_memory_ = false;
  std::atomic<bool> is_used_{false};
};

#ifdef STANDIN_RTX
class RuntimeConfig final : public nvinfer1::IRuntimeConfig {
 public:
  void setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy asked) noexcept override {
    strategy = asked;
  }
  void setDynamicShapesKernelSpecializationStrategy(
      nvinfer1::DynamicShapesKernelSpecializationStrategy asked) noexcept override {
    is_eager = asked == nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER;
  }
  nvinfer1::ExecutionContextAllocationStrategy strategy = nvinfer1::ExecutionContextAllocationStrategy::kSTATIC;
  bool is_eager = false;
};
#endif

class Engine final : public nvinfer1::ICudaEngine {
 public:
  explicit Engine(Plan plan) : plan_(std::move(plan)) { ++library.engines; }
  ~Engine() noexcept override {
    keep(contexts == 0, "an engine is destroyed before its contexts");
    --library.engines;
  }

  std::int32_t getNbIOTensors() const noexcept override { return static_cast<std::int32_t>(plan_.outputs.size() + 1); }
  const char* getIOTensorName(std::int32_t index) const noexcept override {
    return index == 0 ? plan_.input.c_str() : plan_.outputs[static_cast<std::size_t>(index - 1)].name.c_str();
  }
  nvinfer1::TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    return name == plan_.input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
  }
  nvinfer1::DataType getTensorDataType(const char* name) const noexcept override {
    for (const Output& output : plan_.outputs) {
      if (output.name == name) return output.type;
    }
    return plan_.input_type;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    const auto odd = plan_.odd.find(name);
    if (odd != plan_.odd.end()) return dims_of(odd->second);
    for (const Output& output : plan_.outputs) {
      if (output.name == name) return dims_of(pooled(plan_.sizes, output.kernel));
    }
    return dims_of(plan_.sizes);
  }
  std::int32_t getNbOptimizationProfiles() const noexcept override {
    return static_cast<std::int32_t>(plan_.profiles.size());
  }
  Dims getProfileShape(const char*, std::int32_t index, nvinfer1::OptProfileSelector which) const noexcept override {
    return dims_of(plan_.profiles[static_cast<std::size_t>(index)][static_cast<std::size_t>(which)]);
  }

#ifdef STANDIN_RTX
  nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override {
    return library.fails("createRuntimeConfig") ? nullptr : new RuntimeConfig;
  }
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::IRuntimeConfig* config) noexcept override {
    keep(static_cast<RuntimeConfig*>(config)->is_eager, "TensorRT-RTX is not asked to compile kernels at once");
    return create(static_cast<RuntimeConfig*>(config)->strategy);
  }
#else
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    return create(strategy);
  }
#endif

  std::atomic<int> contexts{0};

 private:
  nvinfer1::IExecutionContext* create(nvinfer1::ExecutionContextAllocationStrategy strategy) {
    keep(strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED, "contexts do not allocate for themselves here");
    return library.fails("createExecutionContext") ? nullptr : new Context(*this, plan_);
  }

  Plan plan_;
};

// The first profile of a plan that has one alone is set already.
Context::Context(Engine& engine, const Plan& plan) : engine_(engine), plan_(plan), profile_(plan.profiles.size() < 2 ? 0 : -1) {
  ++engine_.contexts;
  ++library.contexts;
}

Context::~Context() noexcept {
  --engine_.contexts;
  --library.contexts;
}

class Runtime final : public nvinfer1::IRuntime {
 public:
  Runtime() { ++library.runtimes; }
  ~Runtime() noexcept override {
    keep(library.engines == 0 || library.runtimes > 1, "a runtime is destroyed before its engines");
    --library.runtimes;
  }

  void setEngineHostCodeAllowed(bool allowed) noexcept override { is_code_allowed_ = allowed; }
  void setDLACore(std::int32_t core) noexcept override { keep(core < getNbDLACores(), "a DLA core is asked for that is none"); }
  std::int32_t getNbDLACores() const noexcept override {
    const char* const cores = std::getenv("STANDIN_DLA_CORES");
    return cores == nullptr ? 0 : std::atoi(cores);
  }

  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) noexcept override {
    if (library.fails("deserializeCudaEngine")) return nullptr;
    std::string text(static_cast<const char*>(data), size);
    if (text.compare(0, 4, "vtrt") == 0) text = text.substr(64);
    Plan plan;
    if (!read(text, plan)) {
      library.refuse("Serialization assertion failed");
      return nullptr;
    }
    if (plan.has_host_code && !is_code_allowed_) {
      library.refuse("the plan has host code, which is not allowed");
      return nullptr;
    }
    return new Engine(plan);
  }

 private:
  bool is_code_allowed_ = false;
};

}  // namespace

void* createInferRuntime_INTERNAL(void* logger, std::int32_t version) noexcept {
  library.logger = static_cast<nvinfer1::ILogger*>(logger);
  keep(version == NV_TENSORRT_VERSION, "the headers are of another release than the library");
  if (library.fails("createInferRuntime")) return nullptr;
  return static_cast<nvinfer1::IRuntime*>(new Runtime);
}

#ifdef STANDIN_RTX
std::int32_t getInferLibMajorVersion() noexcept { return 1; }
std::int32_t getInferLibMinorVersion() noexcept { return 7; }
std::int32_t getInferLibPatchVersion() noexcept { return 1; }
std::int32_t getInferLibBuildVersion() noexcept { return 116; }
#else
std::int32_t getInferLibMajorVersion() noexcept { return 11; }
std::int32_t getInferLibMinorVersion() noexcept { return 4; }
std::int32_t getInferLibPatchVersion() noexcept { return 0; }
std::int32_t getInferLibBuildVersion() noexcept { return 106; }
#endif

/// Return how many runtimes, engines and contexts there are.
extern "C" int standin_tensorrt_objects() { return library.runtimes + library.engines + library.contexts; }
