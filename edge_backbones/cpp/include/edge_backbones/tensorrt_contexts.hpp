// Execution contexts of one plan, each with a stream and memory of its own, and how calls of several threads share them.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda.hpp"
#include "plans.hpp"
#include "tensorrt_engine.hpp"
#include "text.hpp"
#include "types.hpp"

namespace edge_backbones::tensorrt {

/// Most contexts of one session, and so the most calls that run at once; further threads wait for one.
constexpr std::size_t kMostContexts = 32;

namespace detail {

/// One execution context, with a stream and memory of its own. One thread uses it at a time.
class Slot {
 public:
  Slot(const Engine& engine, const plans::Profile& profile)
      : engine_(engine), profile_(profile), context_(engine.new_context()) {
    if (engine_.profiles.size() < 2) return;
    require(context_->setOptimizationProfileAsync(profile_.index, stream_.get()),
            "optimisation profile " + std::to_string(profile_.index));
    stream_.wait();
  }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  /// Waits for the work that uses its memory.
  ~Slot() {
    if (busy_ != nullptr) cuda::quietly(cudaStreamSynchronize(busy_));  // a call failed behind work on this stream
    if (is_pending_) done_.wait_quietly();
    cuda::quietly(cudaStreamSynchronize(stream_.get()));
  }

  int profile() const noexcept { return profile_.index; }
  const Shape& shape() const noexcept { return shape_; }
  const std::vector<Shape>& outputs() const noexcept { return outputs_; }

  /// Return whether work on a stream hardly waits for earlier work of this context. `stream`: null for its own.
  bool is_free_for(cudaStream_t stream) {
    if (is_pending_ && done_.happened()) is_pending_ = false;
    return !is_pending_ || (stream != nullptr && last_ == stream);
  }

  /// Set the shape of the input, and read those of the outputs and the size of the scratch memory.
  void set_shape(const Shape& shape) {
    if (shape == shape_) return;
    shape_.clear();
    Log::get().clear();
    require(context_->setInputShape(engine_.input.c_str(), dims_of(shape)), "an input of shape " + text_of(shape));
    if (context_->inferShapes(0, nullptr) != 0) {
      throw failure("TensorRT does not know the shapes of its outputs for an input of shape " + text_of(shape));
    }
    outputs_.clear();
    for (const std::string& name : engine_.outputs) outputs_.push_back(shape_of(context_->getTensorShape(name.c_str())));
    for (const Shape& output : outputs_) {
      const bool is_known = !output.empty() && *std::min_element(output.begin(), output.end()) >= 1;
      if (!is_known || output[0] != shape[0]) {
        throw failure("TensorRT gives an output of shape " + text_of(output) + " for an input of shape " + text_of(shape));
      }
    }
    const std::size_t size = context_->updateDeviceMemorySizeForShapes();
    grow(scratch_, size, "allocating TensorRT's scratch memory on the GPU");
    if (size != 0) context_->setDeviceMemoryV2(scratch_.data(), static_cast<std::int64_t>(scratch_.size()));
    shape_ = shape;
  }

  /// Run one batch from and to memory of the host, and wait for it.
  void run(const ConstTensor& input, const std::vector<Tensor>& outputs) {
    set_shape(input.shape);
    cudaStream_t const stream = stream_.get();
    const std::size_t size = input.bytes();
    std::vector<std::size_t> offsets;
    std::size_t total = 0;
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      offsets.push_back(total);
      total += cuda::rounded(size_of(outputs_[i]) * engine_.value_bytes[i]);
    }
    grow(input_, size, "allocating the input on the GPU");
    grow(results_, total, "allocating the outputs on the GPU");
    const void* source = input.data;
    if (!cuda::is_page_locked(source, size)) {
      staged_input_.reserve(size, "allocating page-locked memory for the input");
      std::memcpy(staged_input_.data(), source, size);
      source = staged_input_.data();
    }
    if (is_pending_) done_.hold(stream);  // earlier work on another stream still uses the scratch memory
    cuda::check(cudaMemcpyAsync(input_.data(), source, size, cudaMemcpyHostToDevice, stream), "copying the input to the GPU");
    std::vector<void*> targets;
    for (const std::size_t offset : offsets) targets.push_back(results_.bytes() + offset);
    execute(input_.data(), targets, stream);
    std::vector<std::size_t> staged;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      void* target = outputs[i].data;
      if (!cuda::is_page_locked(target, outputs[i].bytes())) {
        staged_results_.reserve(total, "allocating page-locked memory for the outputs");  // once: all of them fit
        target = staged_results_.bytes() + offsets[i];
        staged.push_back(i);
      }
      cuda::check(cudaMemcpyAsync(target, targets[i], outputs[i].bytes(), cudaMemcpyDeviceToHost, stream),
                  "copying an output from the GPU");
    }
    stream_.wait();
    is_pending_ = false;
    for (const std::size_t i : staged) std::memcpy(outputs[i].data, staged_results_.bytes() + offsets[i], outputs[i].bytes());
  }

  /// Enqueue one batch in memory of the GPU on a stream, without waiting.
  void run_on_device(const ConstTensor& input, const std::vector<Tensor>& outputs, cudaStream_t stream) {
    set_shape(input.shape);
    // On a default stream TensorRT would wait for the device: the work runs on its own stream, between two events.
    const bool is_aside = cuda::is_default(stream);
    cudaStream_t const work = is_aside ? stream_.get() : stream;
    busy_ = work;
    if (is_aside) {
      order_.record(stream);
      order_.hold(work);
    }
    if (is_pending_) done_.hold(work);  // of the same handle too: it may be a new stream, which got the handle of an old one
    std::vector<void*> targets;
    for (const Tensor& output : outputs) targets.push_back(output.data);
    execute(input.data, targets, work);
    done_.record(work);
    is_pending_ = true;
    last_ = work;
    if (is_aside) done_.hold(stream);
    busy_ = nullptr;
  }

 private:
  /// Make room in memory that earlier work may still use.
  template <class Memory>
  void grow(Memory& memory, std::size_t size, const char* what) {
    if (size <= memory.size()) return;
    if (is_pending_) done_.wait();
    is_pending_ = false;
    memory.reserve(size, what);
  }

  void execute(const void* input, const std::vector<void*>& outputs, cudaStream_t stream) {
    Log::get().clear();
    require(context_->setInputTensorAddress(engine_.input.c_str(), input), "an address for " + engine_.input);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      require(context_->setTensorAddress(engine_.outputs[i].c_str(), outputs[i]), "an address for " + engine_.outputs[i]);
    }
    require(context_->enqueueV3(stream), "to run an input of shape " + text_of(shape_));
  }

  const Engine& engine_;
  const plans::Profile& profile_;
  cuda::Stream stream_;
  cuda::Event order_, done_;
  cuda::DeviceMemory scratch_, input_, results_;
  cuda::HostMemory staged_input_, staged_results_;
  bool is_pending_ = false;       // work before done_ may still run
  cudaStream_t last_ = nullptr;   // the stream of that work
  cudaStream_t busy_ = nullptr;   // the stream of a call that has not ended well
  Shape shape_;
  std::vector<Shape> outputs_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

/// Lends the contexts of one engine to calls. Threads may share it.
class Slots {
 public:
  explicit Slots(const Engine& engine) : engine_(engine) { idle_.reserve(kMostContexts); }

  /// Return a context for a shape, made if no idle one suits. `stream`: of the caller, null for the context's own.
  std::unique_ptr<Slot> take(const plans::Profile& profile, const Shape& shape, cudaStream_t stream) {
    std::unique_ptr<Slot> replaced;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while (true) {
        const auto best = std::find_if(idle_.begin(), idle_.end(), [&](const auto& slot) {
          return slot->profile() == profile.index && slot->shape() == shape && slot->is_free_for(stream);
        });
        if (best != idle_.end()) return remove(best);
        const auto next = std::find_if(idle_.begin(), idle_.end(), [&](const auto& slot) {
          return slot->profile() == profile.index && (slot->is_free_for(stream) || alive_ >= kMostContexts);
        });
        if (next != idle_.end()) return remove(next);
        if (alive_ < kMostContexts) {
          ++alive_;
          break;
        }
        if (!idle_.empty()) {
          replaced = remove(idle_.begin());
          break;
        }
        returned_.wait(lock);
      }
    }
    try {
      replaced.reset();  // without the lock, because it waits for the GPU
      return std::make_unique<Slot>(engine_, profile);
    } catch (...) {
      forget();
      throw;
    }
  }

  /// Keep a context for the next call. There is room for it: it was made or taken from there.
  void give_back(std::unique_ptr<Slot> slot) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(slot));
    returned_.notify_one();
  }

  /// Release a context: after an error its state is unknown.
  void discard(std::unique_ptr<Slot> slot) noexcept {
    slot.reset();
    forget();
  }

 private:
  std::unique_ptr<Slot> remove(std::vector<std::unique_ptr<Slot>>::iterator which) {
    std::unique_ptr<Slot> slot = std::move(*which);
    idle_.erase(which);
    return slot;
  }

  void forget() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    --alive_;
    returned_.notify_one();
  }

  const Engine& engine_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<std::unique_ptr<Slot>> idle_;
  std::size_t alive_ = 0;  // contexts, lent or idle
};

/// Borrows a context for one call. Unless `is_well`, it is released at the end.
class Lent {
 public:
  Lent(Slots& slots, const plans::Profile& profile, const Shape& shape, cudaStream_t stream)
      : slots_(slots), slot_(slots.take(profile, shape, stream)) {}
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  ~Lent() {
    if (slot_) slots_.discard(std::move(slot_));
  }

  Slot& operator*() const noexcept { return *slot_; }
  void is_well() noexcept { slots_.give_back(std::move(slot_)); }

 private:
  Slots& slots_;
  std::unique_ptr<Slot> slot_;
};

}  // namespace detail

}  // namespace edge_backbones::tensorrt
