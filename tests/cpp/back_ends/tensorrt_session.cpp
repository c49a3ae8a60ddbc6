// Sessions of tensorrt.hpp over the stand-ins for CUDA and TensorRT: one case for each argument, see test_tensorrt.py.
#include <edge_backbones/tensorrt.hpp>

#include <array>
#include <atomic>
#include <cmath>
#include <thread>

#include "checks.hpp"
#include "standin/libcuda.hpp"

extern "C" int standin_tensorrt_objects();

namespace eb = edge_backbones;
using eb::Code;
using eb::ConstTensor;
using eb::DType;
using eb::Shape;
using eb::Tensor;
using eb::tensorrt::TensorRtSession;

namespace {

constexpr const char* kPlan =
    "standin-plan\n"
    "input pixel_values FLOAT -1 3 16 24\n"
    "output pool4 FLOAT 4\n"
    "output pool8 FLOAT 8\n"
    "profile 1 3 16 24 2 3 16 24 4 3 16 24\n"
    "scratch 1000\n";

eb::Manifest manifest_of(eb::ShapeRange batch = {1, 2, 4}) {
  eb::Manifest manifest;
  manifest.backbone.stage_names = {"pool2", "pool4", "pool8"};
  manifest.backbone.out_features = {"pool4", "pool8"};
  manifest.backbone.out_indices = {1, 2};
  manifest.backbone.channels = {3, 3};
  manifest.backbone.strides = {{4, 4}, {8, 8}};
  manifest.backbone.num_features = {3, 3, 3};
  manifest.backbone.layouts = {"NCHW", "NCHW"};
  manifest.input.name = "pixel_values";
  manifest.input.channels = 3;
  manifest.input.batch = batch;
  manifest.input.height = {16, 16, 16};
  manifest.input.width = {24, 24, 24};
  return manifest;
}

eb::EngineRecord record_of() {
  eb::EngineRecord record;
  record.name = "tensorrt-test";
  record.key.flavour = eb::tensorrt::kFlavour;
  record.key.library_version = eb::tensorrt::version();
  record.key.gpu = eb::GpuKey{};
  record.key.gpu->architectures = {"sm_89"};
  return record;
}

std::vector<char> bytes_of(const std::string& text) {
  std::string plan = text;
#ifdef STANDIN_RTX
  std::string header(64, '\0');
  const std::size_t size = header.size() + text.size();
  header.replace(0, 4, "vtrt");
  for (std::size_t i = 0; i < 8; ++i) header[16 + i] = static_cast<char>(size >> (8 * i) & 255u);
  header[24] = 1;
  header[25] = 7;
  header[26] = 1;
  header[27] = 116;
  header[32] = 8;  // sm_89
  plan = header + text;
#endif
  return {plan.begin(), plan.end()};
}

std::unique_ptr<TensorRtSession> open(const std::string& plan = kPlan, const eb::Manifest& manifest = manifest_of(),
                                      eb::EngineRecord record = record_of(), const eb::LoadOptions& options = {}) {
  return std::make_unique<TensorRtSession>(manifest, record, bytes_of(plan), options);
}

/// Replace the first `from` of a text, which has to be there.
std::string with(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  HOLDS(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

std::vector<float> image_of(std::int64_t batch, float seed = 1) {
  std::vector<float> values(static_cast<std::size_t>(batch * 3 * 16 * 24));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i) * 0.37f + seed);
  return values;
}

std::vector<float> pooled(const std::vector<float>& image, std::int64_t batch, std::int64_t k) {
  std::vector<float> found;
  for (std::int64_t plane = 0; plane < batch * 3; ++plane) {
    for (std::int64_t y = 0; y < 16; y += k) {
      for (std::int64_t x = 0; x < 24; x += k) {
        double sum = 0;
        for (std::int64_t i = y; i < y + k; ++i) {
          for (std::int64_t j = x; j < x + k; ++j) {
            sum += static_cast<double>(image[static_cast<std::size_t>((plane * 16 + i) * 24 + j)]);
          }
        }
        found.push_back(static_cast<float>(sum / static_cast<double>(k * k)));
      }
    }
  }
  return found;
}

Shape input_shape(std::int64_t batch) { return {batch, 3, 16, 24}; }
Shape map_shape(std::int64_t batch, std::int64_t k) { return {batch, 3, 16 / k, 24 / k}; }

/// One call from and to ordinary memory; checks the maps.
void run_once(eb::Session& session, std::int64_t batch, float seed = 1) {
  const std::vector<float> image = image_of(batch, seed);
  std::vector<float> first(eb::size_of(map_shape(batch, 4)), -9), second(eb::size_of(map_shape(batch, 8)), -9);
  session.run(ConstTensor::of(image.data(), input_shape(batch)),
              {Tensor::of(first.data(), map_shape(batch, 4)), Tensor::of(second.data(), map_shape(batch, 8))});
  HOLDS(first == pooled(image, batch, 4));
  HOLDS(second == pooled(image, batch, 8));
}

/// Memory of the GPU for one call, filled with an image.
struct OnDevice {
  eb::cuda::DeviceMemory input, first, second;
  std::vector<float> image;
  std::int64_t batch;

  OnDevice(std::int64_t batch_, float seed) : image(image_of(batch_, seed)), batch(batch_) {
    input.reserve(image.size() * 4, "input");
    first.reserve(eb::size_of(map_shape(batch, 4)) * 4, "first");
    second.reserve(eb::size_of(map_shape(batch, 8)) * 4, "second");
    const eb::cuda::Stream stream;
    eb::cuda::check(cudaMemcpyAsync(input.data(), image.data(), image.size() * 4, cudaMemcpyHostToDevice, stream.get()), "in");
    stream.wait();
  }

  ConstTensor source() const { return ConstTensor(input.data(), DType::float32, input_shape(batch)); }
  std::vector<Tensor> targets() const {
    return {Tensor(first.data(), DType::float32, map_shape(batch, 4)),
            Tensor(second.data(), DType::float32, map_shape(batch, 8))};
  }

  /// Check what work on `stream` that comes now reads.
  void check(cudaStream_t stream) const {
    for (const auto& [memory, k] : {std::pair<const eb::cuda::DeviceMemory*, std::int64_t>{&first, 4}, {&second, 8}}) {
      std::vector<float> found(eb::size_of(map_shape(batch, k)));
      eb::cuda::check(cudaMemcpyAsync(found.data(), memory->data(), found.size() * 4, cudaMemcpyDeviceToHost, stream), "out");
      eb::cuda::check(cudaStreamSynchronize(stream), "wait");
      HOLDS(found == pooled(image, batch, k));
    }
  }
};

void no_violations() {
  for (std::size_t i = 0; i < standin_violations(); ++i) std::cerr << standin_violation(i) << "\n";
  EQUAL(standin_violations(), std::size_t{0});
}

void nothing_is_left() {
  no_violations();
  EQUAL(standin_tensorrt_objects(), 0);
  for (const char* what : {"stream", "event", "device", "host"}) {
    if (standin_live(what) != 0) std::cerr << what << " is left\n";
    EQUAL(standin_live(what), std::size_t{0});
  }
}

void host_memory() {
  const auto session = open();
  EQUAL(eb::text_of(session->output_shape(0, input_shape(3))), "(3, 3, 4, 6)");
  EQUAL(eb::text_of(session->output_shape(1, input_shape(1))), "(1, 3, 2, 3)");
  for (const std::int64_t batch : {2, 1, 4, 3, 1}) run_once(*session, batch, static_cast<float>(batch));
  EQUAL(standin_calls("cuCtxSynchronize"), std::size_t{0});
}

void page_locked_memory_is_used_in_place() {
  const auto session = open();
  run_once(*session, 2);
  eb::cuda::HostMemory input, first, second;
  const std::vector<float> image = image_of(2, 5);
  input.reserve(image.size() * 4, "input");
  first.reserve(eb::size_of(map_shape(2, 4)) * 4, "first");
  second.reserve(eb::size_of(map_shape(2, 8)) * 4, "second");
  std::memcpy(input.data(), image.data(), image.size() * 4);
  session->run(ConstTensor(input.data(), DType::float32, input_shape(2)),
               {Tensor(first.data(), DType::float32, map_shape(2, 4)), Tensor(second.data(), DType::float32, map_shape(2, 8))});
  HOLDS(std::memcmp(first.data(), pooled(image, 2, 4).data(), first.size()) == 0);
  HOLDS(std::memcmp(second.data(), pooled(image, 2, 8).data(), second.size()) == 0);
}

void later_calls_allocate_nothing() {
  const auto session = open();
  run_once(*session, 4);
  OnDevice there(4, 2);
  const eb::cuda::Stream stream;
  session->run_on_device(there.source(), there.targets(), stream.get());
  there.check(stream.get());
  const auto allocations = [] {
    return standin_calls("cuMemAlloc") + standin_calls("cuMemFree") + standin_calls("cuMemHostAlloc") +
           standin_calls("cuMemFreeHost") + standin_calls("cuStreamCreate") + standin_calls("cuEventCreate");
  };
  const std::size_t before = allocations();
  HOLDS(before > 0);
  for (const std::int64_t batch : {1, 4, 2}) run_once(*session, batch);
  session->run_on_device(there.source(), there.targets(), stream.get());
  there.check(stream.get());
  EQUAL(allocations(), before);
}

void device_memory() {
  const auto session = open();
  const eb::cuda::Stream stream, other;
  const OnDevice one(2, 1), two(4, 2), three(1, 3);
  session->run_on_device(one.source(), one.targets(), stream.get());
  session->run_on_device(two.source(), two.targets(), other.get());
  session->run_on_device(three.source(), three.targets(), stream.get());
  HOLDS(standin_pending(stream.get()) > 0);  // nothing has waited
  HOLDS(standin_pending(other.get()) > 0);
  two.check(other.get());
  one.check(stream.get());
  three.check(stream.get());
}

void one_context_serves_streams_in_turn() {
  const auto session = open();
  const eb::cuda::Stream stream, other;
  const OnDevice one(2, 1), two(4, 2);
  session->run_on_device(one.source(), one.targets(), stream.get());
  one.check(stream.get());
  session->run_on_device(two.source(), two.targets(), other.get());  // the same context, whose memory has to grow
  run_once(*session, 1);
  two.check(other.get());
  EQUAL(standin_tensorrt_objects(), 4);  // runtime, engine, two contexts: the second for the call while `other` was busy
}

void a_new_stream_with_an_old_handle_waits() {
  const auto session = open();
  const OnDevice one(2, 1), two(2, 2);
  cudaStream_t first = nullptr, second = nullptr;
  HOLDS(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking) == cudaSuccess);
  session->run_on_device(one.source(), one.targets(), first);
  HOLDS(cudaStreamDestroy(first) == cudaSuccess);  // its work goes on
  HOLDS(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking) == cudaSuccess);
  EQUAL(second, first);
  const std::size_t before = standin_calls("cuStreamWaitEvent");
  session->run_on_device(two.source(), two.targets(), second);
  EQUAL(standin_calls("cuStreamWaitEvent"), before + 1);
  two.check(second);
  one.check(second);
  HOLDS(cudaStreamDestroy(second) == cudaSuccess);
}

void default_streams() {
  const auto session = open();
  for (cudaStream_t stream : {static_cast<cudaStream_t>(nullptr), cudaStreamLegacy, cudaStreamPerThread}) {
    const OnDevice one(2, 4);
    session->run_on_device(one.source(), one.targets(), stream);
    one.check(stream);
  }
}

void destroyed_with_work_pending() {
  const eb::cuda::Stream stream;
  const OnDevice one(2, 4);
  {
    const auto session = open();
    session->run_on_device(one.source(), one.targets(), stream.get());
  }
  EQUAL(standin_tensorrt_objects(), 0);
  one.check(stream.get());
}

void threads() {
  const auto session = open();
  std::atomic<int> most{0};
  std::vector<std::thread> running;
  for (int i = 0; i < 40; ++i) {
    running.emplace_back([&, i] {
      const eb::cuda::Stream stream;
      for (int k = 0; k < 6; ++k) {
        const std::int64_t batch = 1 + (i + k) % 4;
        run_once(*session, batch, static_cast<float>(i * 7 + k));
        const OnDevice there(batch, static_cast<float>(i - k));
        session->run_on_device(there.source(), there.targets(), stream.get());
        there.check(stream.get());
        EQUAL(eb::text_of(session->output_shape(1, input_shape(batch))), eb::text_of(map_shape(batch, 8)));
        int seen = standin_tensorrt_objects(), before = most;
        while (seen > before && !most.compare_exchange_weak(before, seen)) {
        }
      }
    });
  }
  for (std::thread& one : running) one.join();
  HOLDS(most >= 3);
  HOLDS(most <= 2 + static_cast<int>(eb::tensorrt::kMostContexts));
}

void profiles() {
  const std::string plan = with(kPlan, "profile 1 3 16 24 2 3 16 24 4 3 16 24\n",
                                "profile 1 3 16 24 1 3 16 24 1 3 16 24\nprofile 1 3 16 24 4 3 16 24 4 3 16 24\n");
  const auto session = open(plan);
  for (const std::int64_t batch : {1, 3, 1, 4, 2}) run_once(*session, batch);
  EQUAL(standin_tensorrt_objects(), 4);  // a context for each profile
  EQUAL(REFUSAL(run_once(*session, 5)),
        "InputError: the input of shape (5, 3, 16, 24) fits no optimisation profile of this engine (profile 0: min (1, 3, 16, "
        "24), opt (1, 3, 16, 24), max (1, 3, 16, 24); profile 1: min (1, 3, 16, 24), opt (4, 3, 16, 24), max (4, 3, 16, 24)): "
        "pass a shape inside one, or build the engine with wider ranges");
  run_once(*session, 2);
}

void contexts_of_another_profile_are_replaced() {
  std::string many;
  for (int i = 1; i <= 40; ++i) {
    const std::string shape = std::to_string(i) + " 3 16 24 ";
    many += "profile " + shape + shape + shape + "\n";
  }
  const auto session = open(with(kPlan, "profile 1 3 16 24 2 3 16 24 4 3 16 24\n", many), manifest_of({1, 2, 40}));
  for (std::int64_t batch = 1; batch <= 40; ++batch) run_once(*session, batch);
  EQUAL(standin_tensorrt_objects(), 2 + static_cast<int>(eb::tensorrt::kMostContexts));
  run_once(*session, 1);
}

void fixed_shape() {
  const std::string plan = with(with(kPlan, "-1 3 16 24", "2 3 16 24"), "profile 1 3 16 24 2 3 16 24 4 3 16 24\n", "");
  const auto session = open(plan, manifest_of({2, 2, 2}));
  run_once(*session, 2);
  EQUAL(standin_calls("setOptimizationProfileAsync"), std::size_t{0});
}

void another_gpu() {
  eb::LoadOptions options;
  options.gpu = 1;
  const auto session = open(kPlan, manifest_of(), record_of(), options);
  run_once(*session, 2);
  int current = -1;
  HOLDS(cudaGetDevice(&current) == cudaSuccess);
  EQUAL(current, 0);
  const OnDevice elsewhere(2, 1);
  const eb::cuda::Stream stream;
  EQUAL(REFUSAL(session->run_on_device(elsewhere.source(), elsewhere.targets(), stream.get())),
        "InputError: pixel_values is in the memory of cuda:0, this engine runs on cuda:1: copy it there first");
  options.gpu = 2;
  EQUAL(REFUSAL(open(kPlan, manifest_of(), record_of(), options)),
        "EngineMismatchError: there is no cuda:2 here, 2 GPUs are visible: pass a smaller index");
}

void no_gpu() {
  const std::string said = REFUSAL(open());
  EQUAL(said.find(std::string("EngineMismatchError: the ") + eb::tensorrt::kFlavour + " engine needs an NVIDIA GPU: "), 0u);
  EQUAL(standin_calls("createInferRuntime"), std::size_t{0});
}

void unusable_memory() {
  const auto session = open();
  const OnDevice there(2, 1);
  const eb::cuda::Stream stream;
  std::vector<Tensor> targets = there.targets();
  EQUAL(REFUSAL(session->run_on_device(ConstTensor(there.image.data(), DType::float32, input_shape(2)), targets, stream.get())),
        "InputError: pixel_values is in the memory of the host, this engine runs on cuda:0: copy it there first");
  targets[1].data = const_cast<float*>(there.image.data());
  EQUAL(REFUSAL(session->run_on_device(there.source(), targets, stream.get())),
        "InputError: pool8 is in the memory of the host, this engine runs on cuda:0: copy it there first");
  targets = there.targets();
  targets[0].data = there.first.bytes() + 4;
  EQUAL(REFUSAL(session->run_on_device(there.source(), targets, stream.get())),
        "InputError: pool4 does not start at a multiple of 256 bytes, which TensorRT needs: pass memory as cudaMalloc returns it");
  HOLDS(cuStreamBeginCapture_v2(stream.get(), 2) == 0);
  EQUAL(REFUSAL(session->run_on_device(there.source(), there.targets(), stream.get())),
        "InputError: the stream is being captured, and the memory of a call cannot be part of a CUDA graph: end the capture "
        "first");
  void* graph = nullptr;
  HOLDS(cuStreamEndCapture(stream.get(), &graph) == 0 && cuGraphDestroy(graph) == 0);
  EQUAL(REFUSAL(session->output_shape(2, input_shape(1))), "InputError: there is no output 2: this engine has 2");
  session->run_on_device(there.source(), there.targets(), stream.get());
  there.check(stream.get());
}

/// Return the message without "EngineMismatchError: tensorrt-test: ".
std::string mismatch(const std::string& plan, const eb::Manifest& manifest = manifest_of()) {
  const std::string said = REFUSAL(open(plan, manifest));
  const std::string begin = "EngineMismatchError: tensorrt-test: ";
  EQUAL(said.substr(0, begin.size()), begin);
  return said.substr(begin.size());
}

void other_plans() {
  const std::string library = std::string(eb::tensorrt::kFlavour) + " " + eb::tensorrt::version();
  EQUAL(mismatch("damage"), library + " does not load this plan (Serialization assertion failed): run edge-backbones compile on "
                                      "this machine");
  const auto differs = [&](const std::string& from, const std::string& to) {
    const std::string said = mismatch(with(kPlan, from, to));
    const std::string begin = "the plan is not the one of this manifest: ", end = ". Build it again";
    EQUAL(said.substr(0, begin.size()), begin);
    return said.substr(begin.size(), said.size() - begin.size() - end.size());
  };
  EQUAL(differs("pixel_values", "frame"), "it takes ['frame'], the manifest says ['pixel_values']");
  EQUAL(differs("pixel_values FLOAT", "pixel_values UINT8"), "its input is UINT8, the manifest says FLOAT");
  EQUAL(differs("-1 3 16 24", "-1 3 16 25"), "it takes (any, 3, 16, 25), the manifest says (1..4, 3, 16, 24)");
  EQUAL(differs("output pool8 FLOAT 8", "output pool9 FLOAT 8"),
        "it returns ['pool4', 'pool9'], the manifest promises ['pool4', 'pool8']");
  EQUAL(differs("output pool8 FLOAT", "output pool8 HALF"), "it returns pool8 HALF, the manifest promises FLOAT");
  EQUAL(differs("scratch", "odd pool4 -1 3 7 6\nscratch"),
        "pool4 has shape (any, 3, 7, 6), the manifest promises NCHW with 3 channels and batch 1..4, strides 4 and 4 of 16 x 24 "
        "pixels");
  EQUAL(mismatch(with(kPlan, "4 3 16 24\n", "3 3 16 24\n")),
        "the plan has no optimisation profile for (4, 3, 16, 24), which the manifest promises (profile 0: min (1, 3, 16, 24), "
        "opt (2, 3, 16, 24), max (3, 3, 16, 24)): compile it again");
}

void host_code() {
  const std::string plan = std::string(kPlan) + "host_code\n";
  const std::string said = mismatch(plan);
  HOLDS(said.find("(the plan has host code, which is not allowed): if the plan carries a lean runtime and you trust it, set "
                  "allow_host_code; else run edge-backbones compile on this machine") != std::string::npos);
  eb::LoadOptions options;
  options.allow_host_code = true;
  run_once(*open(plan, manifest_of(), record_of(), options), 2);
}

void stripped() {
  eb::EngineRecord record = record_of();
  record.key.gpu->stripped = true;
  EQUAL(REFUSAL(open(kPlan, manifest_of(), record)),
        "EngineMismatchError: tensorrt-test: was written without weights, and the C++ library takes none from a graph: compile "
        "it without --strip, or run it in Python");
  EQUAL(standin_calls("createInferRuntime"), std::size_t{0});
}

void dla() {
  eb::EngineRecord record = record_of();
  record.key.gpu->dla_core = 1;
  if (std::getenv("STANDIN_DLA_CORES") != nullptr) {
    run_once(*open(kPlan, manifest_of(), record), 2);
    return;
  }
  EQUAL(REFUSAL(open(kPlan, manifest_of(), record)),
        "EngineMismatchError: tensorrt-test: this plan is for DLA core 1, and this machine has 0 DLA cores: run edge-backbones "
        "compile on this machine");
}

void wrong_shapes() {
  const auto session = open(std::string(kPlan) + "wrong pool4\n");
  EQUAL(REFUSAL(run_once(*session, 2)).substr(0, 101),
        "InferenceError: TensorRT gives an output of shape (3, 3, 1, 1) for an input of shape (2, 3, 16, 24): ");
}

void reasons_in_the_log() {
  const auto session = open();
  const std::string begin = "InferenceError: TensorRT ";
  standin_fail_at("enqueueV3", 1, 719);
  EQUAL(REFUSAL(run_once(*session, 2)),
        begin + "refused to run an input of shape (2, 3, 16, 24): enqueueV3: a reason of its own");
  standin_reset();
  standin_fail_at("createExecutionContext", 1, 719);
  EQUAL(REFUSAL(run_once(*session, 2)), begin + "made no execution context: createExecutionContext: a reason of its own");
  standin_reset();
  standin_fail_at("createInferRuntime", 1, 719);
  EQUAL(REFUSAL(open()), std::string("EngineMismatchError: tensorrt-test: ") + eb::tensorrt::kFlavour +
                             " cannot start: createInferRuntime: a reason of its own");
  standin_reset();
  run_once(*session, 2);
}

void memory_runs_out() {
  const auto session = open();
  run_once(*session, 1);
  standin_set_memory(4096);
  const std::string said = REFUSAL(run_once(*session, 4));
  EQUAL(said.substr(0, 16), "InferenceError: ");
  HOLDS(said.find(" on the GPU failed: ") != std::string::npos);
  HOLDS(said.find(". Run smaller batches or fewer threads, or end what else uses this GPU") != std::string::npos);
  standin_set_memory(std::size_t{1} << 30);
  run_once(*session, 4);
}

/// Everything that a program does with a session.
void whole_life(const OnDevice& there, const eb::cuda::Stream& stream) {
  const auto session = open();
  (void)session->output_shape(0, input_shape(1));
  run_once(*session, 1);
  session->run_on_device(there.source(), there.targets(), stream.get());
  session->run_on_device(there.source(), there.targets(), nullptr);
  run_once(*session, 4);
}

void every_call_fails_once(int code) {
  int refused = 0;
  {
    const OnDevice there(2, 1);
    const eb::cuda::Stream stream;
    std::array<std::size_t, 4> before{standin_live("stream"), standin_live("event"), standin_live("device"),
                                      standin_live("host")};
    for (long nth = 1;; ++nth) {
      standin_reset();
      standin_fail_at("*", nth, code);
      std::string said;
      try {
        whole_life(there, stream);
      } catch (const eb::Error& error) {
        said = error.what();
        HOLDS(error.code() == Code::inference || error.code() == Code::engine_mismatch);
        ++refused;
      }
      const std::string failed = standin_failed();
      no_violations();
      standin_reset();
      EQUAL(cudaGetLastError(), cudaSuccess);  // the caller's next check does not find our error
      EQUAL(standin_tensorrt_objects(), 0);
      const std::array<std::size_t, 4> now{standin_live("stream"), standin_live("event"), standin_live("device"),
                                           standin_live("host")};
      // A call that frees and fails has not freed: nobody can.
      const bool is_release = failed.find("Destroy") != std::string::npos || failed.find("Free") != std::string::npos;
      if (now != before && !is_release) std::cerr << "left over after " << nth << ": " << failed << "\n";
      HOLDS(now == before || is_release);
      before = now;
      if (failed.empty()) break;
    }
    whole_life(there, stream);
  }
  HOLDS(refused > 30);
  std::exit(0);  // what could not be freed is left
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, std::function<void()>> cases{
      {"host_memory", host_memory},
      {"page_locked_memory_is_used_in_place", page_locked_memory_is_used_in_place},
      {"later_calls_allocate_nothing", later_calls_allocate_nothing},
      {"device_memory", device_memory},
      {"one_context_serves_streams_in_turn", one_context_serves_streams_in_turn},
      {"a_new_stream_with_an_old_handle_waits", a_new_stream_with_an_old_handle_waits},
      {"default_streams", default_streams},
      {"destroyed_with_work_pending", destroyed_with_work_pending},
      {"threads", threads},
      {"profiles", profiles},
      {"contexts_of_another_profile_are_replaced", contexts_of_another_profile_are_replaced},
      {"fixed_shape", fixed_shape},
      {"another_gpu", another_gpu},
      {"no_gpu", no_gpu},
      {"unusable_memory", unusable_memory},
      {"other_plans", other_plans},
      {"host_code", host_code},
      {"stripped", stripped},
      {"dla", dla},
      {"wrong_shapes", wrong_shapes},
      {"reasons_in_the_log", reasons_in_the_log},
      {"memory_runs_out", memory_runs_out},
      {"every_call_fails_once", [] { every_call_fails_once(719); }},
      {"memory_runs_out_in_every_call", [] { every_call_fails_once(2); }},
  };
  const int result = checks::run(cases, count, arguments);
  if (result == 0 && arguments[1] != std::string("no_gpu")) nothing_is_left();
  return result;
}
